"""Losses: pure functions of tensors, `Meshes` and `Pointclouds`, on classes, shapes and pictures of depth."""

from vision3dgen.losses.classes import check_labels as check_labels
from vision3dgen.losses.classes import multiclass_hinge as multiclass_hinge
from vision3dgen.losses.classes import softmax_cross_entropy as softmax_cross_entropy
from vision3dgen.losses.depth import gradient_matching_loss as gradient_matching_loss
from vision3dgen.losses.depth import normals_loss as normals_loss
from vision3dgen.losses.depth import scale_invariant_depth_loss as scale_invariant_depth_loss
from vision3dgen.losses.depth import silog_loss as silog_loss
from vision3dgen.losses.depth import virtual_normal_loss as virtual_normal_loss
from vision3dgen.losses.shapes import Chamfer as Chamfer
from vision3dgen.losses.shapes import EarthMovers as EarthMovers
from vision3dgen.losses.shapes import chamfer_distance as chamfer_distance
from vision3dgen.losses.shapes import earth_movers_distance as earth_movers_distance
from vision3dgen.losses.shapes import hausdorff_distance as hausdorff_distance
from vision3dgen.losses.shapes import mesh_edge_loss as mesh_edge_loss
from vision3dgen.losses.shapes import mesh_laplacian_smoothing as mesh_laplacian_smoothing
from vision3dgen.losses.shapes import mesh_normal_consistency as mesh_normal_consistency
from vision3dgen.losses.shapes import point_mesh_edge_distance as point_mesh_edge_distance
from vision3dgen.losses.shapes import point_mesh_face_distance as point_mesh_face_distance
