from vision3dgen.ops.backends import use_backend as use_backend
from vision3dgen.ops.meshes import mesh_face_areas_normals as mesh_face_areas_normals
from vision3dgen.ops.meshes import sample_points_from_meshes as sample_points_from_meshes
from vision3dgen.ops.meshes import sample_surface as sample_surface
from vision3dgen.ops.points import knn_gather as knn_gather
from vision3dgen.ops.points import knn_points as knn_points
