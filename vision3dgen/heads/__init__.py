"""Task heads: feature maps in, a prediction out, with its loss and the shape it stands for."""

from vision3dgen.heads.decoder import SkipDecoder as SkipDecoder
from vision3dgen.heads.depth import DEPTH_LOSSES as DEPTH_LOSSES
from vision3dgen.heads.depth import DepthHead as DepthHead
from vision3dgen.heads.depth import DepthPrediction as DepthPrediction
from vision3dgen.heads.head import Head as Head
from vision3dgen.heads.head import View as View
from vision3dgen.heads.normals import NormalsHead as NormalsHead
from vision3dgen.heads.occupancy import OccupancyDecoder as OccupancyDecoder
from vision3dgen.heads.occupancy import OccupancyField as OccupancyField
from vision3dgen.heads.occupancy import OccupancyHead as OccupancyHead
from vision3dgen.heads.voxel import VoxelHead as VoxelHead

HEADS: dict[str, type[Head]] = {
    "voxels": VoxelHead,
    "occupancy": OccupancyHead,
    "depth": DepthHead,
    "normals": NormalsHead,
}
