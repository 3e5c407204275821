"""Task heads: feature maps in, a prediction out, with its loss and the shape it stands for."""

from vision3dgen.heads.anchors import Anchors as Anchors
from vision3dgen.heads.assigner import Assigner as Assigner
from vision3dgen.heads.assigner import BalancedSampler as BalancedSampler
from vision3dgen.heads.atlas import OUTPUTS as OUTPUTS
from vision3dgen.heads.atlas import TEMPLATES as TEMPLATES
from vision3dgen.heads.atlas import AsCloud as AsCloud
from vision3dgen.heads.atlas import AsMesh as AsMesh
from vision3dgen.heads.atlas import Atlas as Atlas
from vision3dgen.heads.atlas import AtlasHead as AtlasHead
from vision3dgen.heads.atlas import Sphere as Sphere
from vision3dgen.heads.atlas import Squares as Squares
from vision3dgen.heads.box import BoxHead as BoxHead
from vision3dgen.heads.box import Selection as Selection
from vision3dgen.heads.crop import CropHead as CropHead
from vision3dgen.heads.decoder import SkipDecoder as SkipDecoder
from vision3dgen.heads.depth import DEPTH_LOSSES as DEPTH_LOSSES
from vision3dgen.heads.depth import DepthHead as DepthHead
from vision3dgen.heads.depth import DepthPrediction as DepthPrediction
from vision3dgen.heads.frustum import Frustum as Frustum
from vision3dgen.heads.frustum import VoxelTubes as VoxelTubes
from vision3dgen.heads.frustum import picture_intrinsics as picture_intrinsics
from vision3dgen.heads.graph import GRAPH_CONVOLUTIONS as GRAPH_CONVOLUTIONS
from vision3dgen.heads.graph import GeometricGraphConv as GeometricGraphConv
from vision3dgen.heads.head import Head as Head
from vision3dgen.heads.head import View as View
from vision3dgen.heads.local_occupancy import LocalDecoder as LocalDecoder
from vision3dgen.heads.local_occupancy import LocalOccupancyHead as LocalOccupancyHead
from vision3dgen.heads.mask import MaskHead as MaskHead
from vision3dgen.heads.mesh import RefinedMeshes as RefinedMeshes
from vision3dgen.heads.mesh import SphereInitHead as SphereInitHead
from vision3dgen.heads.mesh import VoxMeshHead as VoxMeshHead
from vision3dgen.heads.normals import NormalsHead as NormalsHead
from vision3dgen.heads.occupancy import FieldHead as FieldHead
from vision3dgen.heads.occupancy import OccupancyDecoder as OccupancyDecoder
from vision3dgen.heads.occupancy import OccupancyField as OccupancyField
from vision3dgen.heads.occupancy import OccupancyHead as OccupancyHead
from vision3dgen.heads.panoptic import PanopticMerging as PanopticMerging
from vision3dgen.heads.pixel2mesh import Deformation as Deformation
from vision3dgen.heads.pixel2mesh import DeformationLosses as DeformationLosses
from vision3dgen.heads.pixel2mesh import Pixel2MeshHead as Pixel2MeshHead
from vision3dgen.heads.points import CLOUD_LOSSES as CLOUD_LOSSES
from vision3dgen.heads.points import ChamferLoss as ChamferLoss
from vision3dgen.heads.points import EarthMoversLoss as EarthMoversLoss
from vision3dgen.heads.points import PointHead as PointHead
from vision3dgen.heads.points import TwoBranchPointHead as TwoBranchPointHead
from vision3dgen.heads.pooling import Pooling as Pooling
from vision3dgen.heads.refinement import MeshRefinement as MeshRefinement
from vision3dgen.heads.refinement import RefinementStage as RefinementStage
from vision3dgen.heads.refinement import StageLosses as StageLosses
from vision3dgen.heads.refinement import TrueSurface as TrueSurface
from vision3dgen.heads.refinement import true_surface as true_surface
from vision3dgen.heads.regions import EdgeRegions as EdgeRegions
from vision3dgen.heads.regions import Regions as Regions
from vision3dgen.heads.regions import SelectiveSearchRegions as SelectiveSearchRegions
from vision3dgen.heads.regions import WindowRegions as WindowRegions
from vision3dgen.heads.roi import Canvas as Canvas
from vision3dgen.heads.roi import RoIHead as RoIHead
from vision3dgen.heads.roi import Samples as Samples
from vision3dgen.heads.roi import Truth as Truth
from vision3dgen.heads.roi_mesh import RoIMeshHead as RoIMeshHead
from vision3dgen.heads.rpn import RPN as RPN
from vision3dgen.heads.rpn import RPNS as RPNS
from vision3dgen.heads.rpn import Proposals as Proposals
from vision3dgen.heads.segmentation import FCNHead as FCNHead
from vision3dgen.heads.segmentation import PyramidHead as PyramidHead
from vision3dgen.heads.segmentation import SemanticHead as SemanticHead
from vision3dgen.heads.segmentation import UNetHead as UNetHead
from vision3dgen.heads.segmentation import pixel_cross_entropy as pixel_cross_entropy
from vision3dgen.heads.sphere import SphereHead as SphereHead
from vision3dgen.heads.voxel import VolumeHead as VolumeHead
from vision3dgen.heads.voxel import VoxelHead as VoxelHead
from vision3dgen.heads.voxel import VoxelTubeHead as VoxelTubeHead

HEADS: dict[str, type[Head]] = {
    "atlas": AtlasHead,
    "depth": DepthHead,
    "local_occupancy": LocalOccupancyHead,
    "normals": NormalsHead,
    "occupancy": OccupancyHead,
    "pixel2mesh": Pixel2MeshHead,
    "points": PointHead,
    "points_two_branch": TwoBranchPointHead,
    "sphere": SphereHead,
    "sphere_init": SphereInitHead,
    "volume": VolumeHead,
    "voxel_tubes": VoxelTubeHead,
    "voxels": VoxelHead,
    "voxmesh": VoxMeshHead,
}

ROI_HEADS: dict[str, type[RoIHead]] = {
    "box": BoxHead,
    "crop": CropHead,
    "mask": MaskHead,
    "mesh": RoIMeshHead,
}

SEMANTIC_HEADS: dict[str, type[SemanticHead]] = {
    "fcn": FCNHead,
    "pyramid": PyramidHead,
    "unet": UNetHead,
}
