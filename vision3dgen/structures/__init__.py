"""Ragged batches of meshes and point clouds, cameras, frames and grids.

All are immutable and picklable. Meshes and point clouds store one packed tensor and one count per member; lists, padded
tensors and topology are derived from it, so nothing can go stale. Accessor names are PyTorch3D's: code written for its
`Meshes` and `Pointclouds` runs on these.

Differs: no in-place twins (`offset_verts_`, `scale_verts_`), textures are attributes, empty members are allowed
everywhere.
"""

from vision3dgen.structures.annotations import check_annotations as check_annotations
from vision3dgen.structures.camera import Camera as Camera
from vision3dgen.structures.camera import Open3DCamera as Open3DCamera
from vision3dgen.structures.camera import OpenGLCamera as OpenGLCamera
from vision3dgen.structures.camera import Projection as Projection
from vision3dgen.structures.camera import PyTorch3DCamera as PyTorch3DCamera
from vision3dgen.structures.detections import Detections as Detections
from vision3dgen.structures.frame import Frame as Frame
from vision3dgen.structures.grid import GridSpec as GridSpec
from vision3dgen.structures.meshes import Meshes as Meshes
from vision3dgen.structures.meshes import join_meshes_as_batch as join_meshes_as_batch
from vision3dgen.structures.meshes import join_meshes_as_scene as join_meshes_as_scene
from vision3dgen.structures.panoptic import PanopticSegments as PanopticSegments
from vision3dgen.structures.pointclouds import Pointclouds as Pointclouds
from vision3dgen.structures.pointclouds import join_pointclouds_as_batch as join_pointclouds_as_batch
from vision3dgen.structures.pointclouds import join_pointclouds_as_scene as join_pointclouds_as_scene
