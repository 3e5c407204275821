"""Task heads: feature maps in, a prediction out, with its loss and the shape it stands for."""

from vision3dgen.heads.head import Head as Head
from vision3dgen.heads.head import View as View
from vision3dgen.heads.local_occupancy import LocalDecoder as LocalDecoder
from vision3dgen.heads.local_occupancy import LocalOccupancyHead as LocalOccupancyHead
from vision3dgen.heads.occupancy import FieldHead as FieldHead
from vision3dgen.heads.occupancy import OccupancyDecoder as OccupancyDecoder
from vision3dgen.heads.occupancy import OccupancyField as OccupancyField
from vision3dgen.heads.occupancy import OccupancyHead as OccupancyHead
from vision3dgen.heads.voxel import VoxelHead as VoxelHead

HEADS: dict[str, type[Head]] = {
    "voxels": VoxelHead,
    "occupancy": OccupancyHead,
    "local_occupancy": LocalOccupancyHead,
}
