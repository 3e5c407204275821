"""Mesh files: obj, off, ply, stl, glb. Vertices keep the number and the order they have in the file."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision3dgen.files import atomic_write
from vision3dgen.io.gltf import format_glb, read_glb
from vision3dgen.io.obj import read_obj, write_obj
from vision3dgen.io.off import format_off, read_off
from vision3dgen.io.ply import format_ply, ply_polygons, read_ply
from vision3dgen.io.polygons import (
    MeshError,
    Polygons,
    check_points,
    polygons_to_meshes,
    suffix_of,
    to_array,
    warn_not_held,
)
from vision3dgen.io.stl import format_stl, read_stl
from vision3dgen.structures import Meshes

Arrays = tuple[Any, Any]  # vertices (V, 3) and faces (F, 3): tensors, arrays or lists


def _read_ply(path: Path, data: bytes) -> Polygons:
    return ply_polygons(path, read_ply(path, data))


READERS: dict[str, Callable[[Path, bytes], Polygons]] = {
    ".obj": read_obj,
    ".off": read_off,
    ".ply": _read_ply,
    ".stl": read_stl,
    ".glb": read_glb,
}
HELD = {  # attributes (V, 3) and (F, 3) each format has a place for
    ".obj": (("color",), ("color",)),
    ".off": (("color",), ("color",)),
    ".ply": (("color", "normal"), ("color",)),
    ".stl": ((), ()),
    ".glb": (("color",), ()),
}


def load_mesh(path: str | os.PathLike[str], *, materials: bool = True) -> Meshes:
    """Read a mesh as a batch of one, in float32.

    OBJ, OFF and PLY keep the file's vertices in number and order; STL, which has no indices, joins equal corners; the
    parts of a GLB are moved where its scene puts them and joined. Polygons are cut into fans around their first corner.
    Vertex colours become `verts_attributes["color"]` (V, 3) in [0, 1], normals of PLY and OFF `["normal"]`; colours per
    face, from PLY, OFF or the Kd of an OBJ's materials if its MTL is there and `materials` is set,
    `faces_attributes["color"]` (F, 3). Texture coordinates and images are skipped.

    Raises MeshError naming the file, the reason and the line: no vertices or faces, a value that is not finite, an
    index that points at no vertex, a file cut short or not of its format. Sizes in headers are checked before use.
    """
    path = Path(path)
    suffix = suffix_of(path, READERS)
    data = path.read_bytes()
    if not data:
        raise MeshError(f"{path}: the file is empty")
    polygons = read_obj(path, data, materials=materials) if suffix == ".obj" else READERS[suffix](path, data)
    return polygons_to_meshes(path, polygons)


def save_mesh(path: str | os.PathLike[str], mesh: Any) -> None:
    """Write one mesh as obj, off, ply, stl or glb, atomically.

    mesh: `Meshes` with one member (ours or PyTorch3D's), or a pair of vertices (V, 3) and faces (F, 3). The attributes
    "color" and "normal" are written where the format has a place for them (colours as bytes but in OBJ, whose face
    colours go to an MTL beside it); a warning lists the others. Coordinates come back exact in float32. A mesh without
    faces is written too, except as GLB. Raises MeshError on values that could not be read back.
    """
    path = Path(path)
    suffix = suffix_of(path, HELD)
    verts, faces, verts_attributes, faces_attributes = _one_mesh(path, mesh)
    for kind, attributes, held in zip(("verts", "faces"), (verts_attributes, faces_attributes), HELD[suffix]):
        warn_not_held(path, kind, attributes, held)
    verts_attributes, faces_attributes = (
        {name: value for name, value in attributes.items() if name in held and value.shape[1:] == (3,)}
        for attributes, held in zip((verts_attributes, faces_attributes), HELD[suffix])
    )
    color, face_color = verts_attributes.get("color"), faces_attributes.get("color")
    if suffix == ".obj":
        palette, index = (None, None) if face_color is None else np.unique(face_color, axis=0, return_inverse=True)
        materials = None if palette is None else {f"color_{i}": rgb for i, rgb in enumerate(palette.tolist())}
        write_obj(path, verts, faces, colors=color, face_material=index, materials=materials)
        return
    if suffix == ".glb" and not len(faces):
        raise MeshError(f"{path}: GLB cannot hold a mesh without faces")
    match suffix:
        case ".off":
            content = format_off(verts, faces, color, face_color)
        case ".ply":
            content = format_ply(verts, verts_attributes, faces, faces_attributes)
        case ".stl":
            content = format_stl(verts, faces)
        case _:
            content = format_glb(verts, faces, color)
    with atomic_write(path) as file:
        file.write(content)


def save_obj(
    path: str | os.PathLike[str],
    vertices: Any,
    faces: Any,
    *,
    face_material: Any | None = None,
    materials: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write an OBJ, and an MTL beside it with one diffuse colour per material; equal input gives equal bytes.

    vertices (V, 3), faces (F, 3) from 0, face_material (F,) indices into `materials`, whose values are (r, g, b) in
    [0, 1]. Faces keep their order. Coordinates are written as float32.
    """
    path = Path(path)
    verts, triangles, _, _ = _one_mesh(path, (to_array(vertices).astype(np.float32), faces))
    index = None
    if (face_material is None) != (materials is None):
        raise MeshError(f"{path}: face_material and materials belong together, one is missing")
    if materials is not None:
        index = to_array(face_material)
        if index.shape != (len(triangles),) or ((index < 0) | (index >= len(materials))).any():
            raise MeshError(
                f"{path}: face_material must be ({len(triangles)},) indices into {len(materials)} materials, "
                f"got {index.shape} in [{index.min(initial=0)}, {index.max(initial=0)}]"
            )
        for name, color in materials.items():
            if name.split() != [name] or len(color) != 3 or not all(0.0 <= value <= 1.0 for value in color):
                raise MeshError(f"{path}: material {name!r} must be one word and 3 numbers in [0, 1], got {color}")
    write_obj(path, verts, triangles, face_material=index, materials=materials)


def _one_mesh(path: Path, mesh: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Checked vertices, faces and attributes of what may be written."""
    verts_attributes: dict[str, Any] = {}
    faces_attributes: dict[str, Any] = {}
    if isinstance(mesh, tuple):
        verts, faces = (to_array(value) for value in mesh)
    else:
        if len(mesh) != 1:
            raise MeshError(
                f"{path}: a file holds one mesh, got a batch of {len(mesh)}; take one or join them as a scene"
            )
        verts, faces = to_array(mesh.verts_packed()), to_array(mesh.faces_packed())
        if isinstance(mesh, Meshes):
            verts_attributes, faces_attributes = mesh.verts_attributes_packed(), mesh.faces_attributes_packed()
    verts = verts if verts.dtype == np.float64 else verts.astype(np.float32)
    faces = faces.astype(np.int64).reshape(-1, 3) if not faces.size else faces.astype(np.int64)
    if verts.ndim != 2 or verts.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise MeshError(f"{path}: vertices must be (V, 3) and faces (F, 3), got {verts.shape} and {faces.shape}")
    if len(verts):
        check_points(path, verts)
    if (outside := np.flatnonzero(((faces < 0) | (faces >= len(verts))).any(axis=1))).size:
        face = int(outside[0])
        raise MeshError(f"{path}: face {face} is {faces[face].tolist()}, there are {len(verts)} vertices")
    return (
        verts,
        faces,
        {name: to_array(value) for name, value in verts_attributes.items()},
        {name: to_array(value) for name, value in faces_attributes.items()},
    )
