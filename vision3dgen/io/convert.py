"""Converters to and from other libraries: same vertices, same order, same faces; colours and normals go along.

The vertex attributes "color" (V, 3) in [0, 1] and "normal" (V, 3), and the face attribute "color", are what the other
side can hold; a warning lists what it cannot. Each library is imported when its function is called.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision3dgen.io.gltf import scene_polygons
from vision3dgen.io.polygons import polygons_to_meshes, to_bytes, warn_not_held
from vision3dgen.structures import Meshes, Pointclouds

# --------------------------------------------------------------------------------------------- numpy and trimesh


def to_numpy(meshes: Meshes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 and faces (F, 3) int64 of one mesh, contiguous."""
    one = _single(meshes)
    return _array(one.verts_packed(), np.float64), _array(one.faces_packed(), np.int64)


def from_numpy(verts: Any, faces: Any) -> Meshes:
    """One mesh, in float32, from vertices (V, 3) and faces (F, 3)."""
    return Meshes([_tensor(verts, np.float32)], [_tensor(faces, np.int64)])


def to_trimesh(meshes: Meshes) -> Any:
    """One mesh as trimesh.Trimesh; vertex colours win over face colours, it holds one of them."""
    import trimesh

    verts, faces = to_numpy(meshes)
    vert = _arrays(meshes.verts_attributes_packed())
    face = _arrays(meshes.faces_attributes_packed())
    warn_not_held("trimesh", "verts", vert, ("color", "normal"))
    warn_not_held("trimesh", "faces", face, () if "color" in vert else ("color",))
    return trimesh.Trimesh(
        verts,
        faces,
        vertex_normals=vert.get("normal"),
        vertex_colors=to_bytes(vert["color"]) if "color" in vert else None,
        face_colors=to_bytes(face["color"]) if "color" in face and "color" not in vert else None,
        process=False,
    )


def from_trimesh(mesh: Any) -> Meshes:
    """One mesh from a trimesh.Trimesh, or from a Scene with each part where its node puts it.

    Textures are skipped, and so are normals: trimesh does not say whether they were given or computed.
    """
    return polygons_to_meshes(type(mesh).__name__, scene_polygons(mesh))


# ------------------------------------------------------------------------------------------------------- Open3D


def to_open3d(shape: Meshes | Pointclouds, *, tensor: bool = False) -> Any:
    """One mesh or cloud as open3d.geometry.TriangleMesh or PointCloud, or their open3d.t twins with `tensor`."""
    o3d = _open3d()
    if isinstance(shape, Meshes):
        verts, faces = to_numpy(shape)
        vert = _arrays(shape.verts_attributes_packed())
        face = _arrays(shape.faces_attributes_packed())
        warn_not_held("Open3D", "verts", vert, ("color", "normal"))
        warn_not_held("Open3D", "faces", face, ("color",) if tensor else ())
    else:
        cloud = _single(shape)
        verts, faces, face = _array(cloud.points_packed(), np.float64), None, {}
        named = {"normal": cloud.normals_packed(), "color": cloud.features_packed()}
        vert = _arrays({name: value for name, value in named.items() if value is not None})
        warn_not_held("Open3D", "points", vert, ("color", "normal"))
    vert = {name: value for name, value in vert.items() if value.shape[1:] == (3,)}
    if tensor:
        return _open3d_tensor(o3d, verts, faces, vert, face)
    vector = o3d.utility.Vector3dVector
    if faces is None:
        legacy = o3d.geometry.PointCloud(vector(verts))
        fields = {"normal": "normals", "color": "colors"}
    else:
        legacy = o3d.geometry.TriangleMesh(vector(verts), o3d.utility.Vector3iVector(faces.astype(np.int32)))
        fields = {"normal": "vertex_normals", "color": "vertex_colors"}
    for name in fields.keys() & vert.keys():
        setattr(legacy, fields[name], vector(np.ascontiguousarray(vert[name], np.float64)))
    return legacy


def from_open3d(shape: Any) -> Meshes | Pointclouds:
    """One mesh or cloud from an Open3D triangle mesh or point cloud, of either kind."""
    o3d = _open3d()
    match shape:
        case o3d.geometry.TriangleMesh():
            vert = {"color": shape.vertex_colors, "normal": shape.vertex_normals}
            vert = {name: np.asarray(value) for name, value in vert.items() if len(value)}
            return _mesh(np.asarray(shape.vertices), np.asarray(shape.triangles), vert, {})
        case o3d.t.geometry.TriangleMesh():
            faces = {"color": shape.triangle.colors.cpu().numpy()} if "colors" in shape.triangle else {}
            points, vert = _open3d_points(shape.vertex)
            return _mesh(points, shape.triangle.indices.cpu().numpy(), vert, faces)
        case o3d.geometry.PointCloud():
            vert = {"color": shape.colors, "normal": shape.normals}
            return _cloud(np.asarray(shape.points), {k: np.asarray(v) for k, v in vert.items() if len(v)})
        case o3d.t.geometry.PointCloud():
            return _cloud(*_open3d_points(shape.point))
    raise ValueError(f"shape must be an Open3D TriangleMesh or PointCloud, got {type(shape).__name__}")


def _open3d() -> Any:
    try:
        import open3d
    except ImportError as error:
        raise ImportError('Open3D is needed: pip install "vision3dgen[viz]"') from error
    return open3d


def _open3d_tensor(
    o3d: Any, points: np.ndarray, faces: np.ndarray | None, vert: dict[str, np.ndarray], face: dict[str, np.ndarray]
) -> Any:
    def tensor(values: np.ndarray, dtype: Any = np.float32) -> Any:
        return o3d.core.Tensor.from_numpy(np.ascontiguousarray(values, dtype))

    if faces is None:
        shape = o3d.t.geometry.PointCloud(tensor(points))
        place = shape.point
    else:
        shape = o3d.t.geometry.TriangleMesh(tensor(points), tensor(faces, np.int64))
        place = shape.vertex
        if "color" in face:
            shape.triangle.colors = tensor(face["color"])
    for name in ("color", "normal"):
        if name in vert:
            setattr(place, f"{name}s", tensor(vert[name]))
    return shape


def _open3d_points(place: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    extra = {name: getattr(place, f"{name}s").cpu().numpy() for name in ("color", "normal") if f"{name}s" in place}
    return place.positions.cpu().numpy(), extra


# ---------------------------------------------------------------------------------------------------- PyTorch3D


def to_pytorch3d(shape: Meshes | Pointclouds) -> Any:
    """A batch as PyTorch3D's Meshes (colours as TexturesVertex) or Pointclouds, sharing memory and gradients."""
    structures, renderer = _pytorch3d()
    if isinstance(shape, Pointclouds):
        return structures.Pointclouds(shape.points_list(), shape.normals_list(), shape.features_list())
    vert = shape.verts_attributes_packed()
    warn_not_held("PyTorch3D", "verts", _arrays(vert), ("color",))
    warn_not_held("PyTorch3D", "faces", _arrays(shape.faces_attributes_packed()), ())
    textures = None
    if "color" in vert:
        textures = renderer.TexturesVertex(list(vert["color"].split(shape.num_verts_per_mesh().tolist())))
    return structures.Meshes(shape.verts_list(), shape.faces_list(), textures)


def from_pytorch3d(shape: Any) -> Meshes | Pointclouds:
    """A batch from PyTorch3D's Meshes (TexturesVertex as colours) or Pointclouds, sharing memory and gradients."""
    structures, renderer = _pytorch3d()
    if isinstance(shape, structures.Pointclouds):
        return Pointclouds(shape.points_list(), shape.normals_list(), shape.features_list())
    if not isinstance(shape, structures.Meshes):
        raise ValueError(f"shape must be PyTorch3D's Meshes or Pointclouds, got {type(shape).__name__}")
    colored = isinstance(shape.textures, renderer.TexturesVertex)
    attributes = {"color": shape.textures.verts_features_list()} if colored else {}
    return Meshes(shape.verts_list(), shape.faces_list(), verts_attributes=attributes)


def _pytorch3d() -> tuple[Any, Any]:
    try:
        from pytorch3d import renderer, structures
    except ImportError as error:
        raise ImportError(
            "PyTorch3D is needed, built for your torch: https://github.com/facebookresearch/pytorch3d/blob/main/INSTALL.md"
        ) from error
    return structures, renderer


# ---------------------------------------------------------------------------------------------- PyTorch Geometric


def to_pyg(shape: Meshes | Pointclouds) -> Any:
    """One mesh or cloud as torch_geometric.data.Data.

    pos (V, 3); for a mesh face (3, F) and edge_index (2, 2E) in both directions; normal and color (V, 3) if there.
    """
    from torch_geometric.data import Data

    one = _single(shape)
    if isinstance(one, Pointclouds):
        named = {"normal": one.normals_packed(), "color": one.features_packed()}
        return Data(pos=one.points_packed(), **{name: value for name, value in named.items() if value is not None})
    vert = one.verts_attributes_packed()
    warn_not_held("PyTorch Geometric", "verts", _arrays(vert), ("color", "normal"))
    warn_not_held("PyTorch Geometric", "faces", _arrays(one.faces_attributes_packed()), ())
    edges = one.edges_packed().t()
    kept = {name: vert[name] for name in ("color", "normal") if name in vert}
    return Data(
        pos=one.verts_packed(), face=one.faces_packed().t(), edge_index=torch.cat([edges, edges.flip(0)], dim=1), **kept
    )


def from_pyg(data: Any) -> Meshes | Pointclouds:
    """One mesh from Data with pos and face, one cloud from Data with pos alone."""
    if data.pos is None:
        raise ValueError(f"data must have pos (V, 3), it has {sorted(data.keys())}")
    vert = {name: data[name] for name in ("color", "normal") if name in data}
    if "face" not in data:
        features = [vert["color"]] if "color" in vert else None
        return Pointclouds([data.pos], [vert["normal"]] if "normal" in vert else None, features)
    return Meshes([data.pos], [data.face.t()], verts_attributes={name: [value] for name, value in vert.items()})


# ------------------------------------------------------------------------------------------------------- shared


def _single(shape: Any) -> Any:
    if len(shape) != 1:
        raise ValueError(f"one member is converted at a time, got a batch of {len(shape)}: take shape[i]")
    return shape


def _mesh(verts: np.ndarray, faces: np.ndarray, vert: dict[str, np.ndarray], face: dict[str, np.ndarray]) -> Meshes:
    return Meshes(
        [_tensor(verts, np.float32)],
        [_tensor(faces, np.int64)],
        verts_attributes={name: [_tensor(value, np.float32)] for name, value in vert.items()},
        faces_attributes={name: [_tensor(value, np.float32)] for name, value in face.items()},
    )


def _cloud(points: np.ndarray, vert: dict[str, np.ndarray]) -> Pointclouds:
    normals, features = ([_tensor(vert[k], np.float32)] if k in vert else None for k in ("normal", "color"))
    return Pointclouds([_tensor(points, np.float32)], normals, features)


def _array(value: Tensor, dtype: Any = None) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy(), dtype)


def _arrays(attributes: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: _array(value) for name, value in attributes.items()}


def _tensor(value: Any, dtype: Any) -> Tensor:
    return torch.from_numpy(np.array(value, dtype))  # a copy: the other library's memory may go away
