"""Task heads: feature maps in, a prediction out, with its loss and the shape it stands for."""

from vision3dgen.heads.atlas import OUTPUTS as OUTPUTS
from vision3dgen.heads.atlas import TEMPLATES as TEMPLATES
from vision3dgen.heads.atlas import AsCloud as AsCloud
from vision3dgen.heads.atlas import AsMesh as AsMesh
from vision3dgen.heads.atlas import Atlas as Atlas
from vision3dgen.heads.atlas import AtlasHead as AtlasHead
from vision3dgen.heads.atlas import Sphere as Sphere
from vision3dgen.heads.atlas import Squares as Squares
from vision3dgen.heads.head import Head as Head
from vision3dgen.heads.head import View as View
from vision3dgen.heads.occupancy import OccupancyDecoder as OccupancyDecoder
from vision3dgen.heads.occupancy import OccupancyField as OccupancyField
from vision3dgen.heads.occupancy import OccupancyHead as OccupancyHead
from vision3dgen.heads.points import CLOUD_LOSSES as CLOUD_LOSSES
from vision3dgen.heads.points import ChamferLoss as ChamferLoss
from vision3dgen.heads.points import EarthMoversLoss as EarthMoversLoss
from vision3dgen.heads.points import PointHead as PointHead
from vision3dgen.heads.points import TwoBranchPointHead as TwoBranchPointHead
from vision3dgen.heads.voxel import VolumeHead as VolumeHead
from vision3dgen.heads.voxel import VoxelHead as VoxelHead
from vision3dgen.heads.voxel import VoxelTubeHead as VoxelTubeHead

HEADS: dict[str, type[Head]] = {
    "voxels": VoxelHead,
    "voxel_tubes": VoxelTubeHead,
    "volume": VolumeHead,
    "occupancy": OccupancyHead,
    "points": PointHead,
    "points_two_branch": TwoBranchPointHead,
    "atlas": AtlasHead,
}
