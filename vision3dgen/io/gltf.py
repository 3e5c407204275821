"""Binary glTF (GLB) through trimesh: scenes become one mesh, every part moved where its node puts it."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np

from vision3dgen.io.polygons import MeshError, Polygons, to_bytes, to_unit


def read_glb(path: Path, data: bytes) -> Polygons:
    """Vertices, triangles and colours of all parts; textures are skipped, files outside are never opened."""
    import trimesh

    _check_container(path, data)
    try:
        # Joined inside as well: trimesh lets positions of two numbers through, and colors as many as it likes.
        return scene_polygons(trimesh.load_scene(io.BytesIO(data), file_type="glb", process=False))
    except Exception as error:  # what trimesh raises on a faulty file is not one class
        raise MeshError(f"{path}: trimesh cannot read it, {type(error).__name__}: {error}") from error


def scene_polygons(scene: Any) -> Polygons:
    """The triangles of a trimesh Scene, or of one Trimesh.

    Vertex colours become the vertex attribute "color", as do plain material colours (white for the parts without one).
    """
    import trimesh

    parts: list[tuple[np.ndarray, Any]]
    if isinstance(scene, trimesh.Trimesh):
        parts = [(np.eye(4), scene)]
    else:
        placed = [scene.graph[node] for node in scene.graph.nodes_geometry]
        parts = [(transform, scene.geometry[name]) for transform, name in placed]
        parts = [(transform, part) for transform, part in parts if isinstance(part, trimesh.Trimesh)]
    verts, faces, colors, face_colors, first = [np.zeros((0, 3))], [np.zeros((0, 3), np.int64)], [], [], 0
    for transform, part in parts:
        own = np.asarray(part.faces, np.int64)
        mirrored = np.linalg.det(transform[:3, :3]) < 0  # keep the outside out
        faces.append((own[:, ::-1] if mirrored else own) + first)
        verts.append(np.asarray(part.vertices) @ transform[:3, :3].T + transform[:3, 3])
        colors.append(_vertex_colors(part))
        face_colors.append(to_unit(part.visual.face_colors)[:, :3] if part.visual.kind == "face" else None)
        first += len(part.vertices)
    triangles = np.concatenate(faces)
    return Polygons(
        verts=np.concatenate(verts),
        counts=np.full(len(triangles), 3),
        corners=triangles.reshape(-1),
        verts_attributes=_joined(colors, [len(part.vertices) for _, part in parts]),
        faces_attributes=_joined(face_colors, [len(part.faces) for _, part in parts]),
    )


def format_glb(verts: np.ndarray, faces: np.ndarray, colors: np.ndarray | None = None) -> bytes:
    """One mesh with optional vertex colours."""
    import trimesh

    colored = None if colors is None else to_bytes(colors)
    mesh: Any = trimesh.Trimesh(verts, faces, vertex_colors=colored, process=False)
    return bytes(mesh.export(file_type="glb"))


def _vertex_colors(part: Any) -> np.ndarray | None:
    if part.visual.kind == "vertex":
        return to_unit(np.asarray(part.visual.vertex_colors))[:, :3]
    factor = getattr(getattr(part.visual, "material", None), "baseColorFactor", None)
    if factor is None:
        return None
    return np.tile(to_unit(np.asarray(factor))[:3], (len(part.vertices), 1))


def _joined(colors: list[np.ndarray | None], sizes: list[int]) -> dict[str, np.ndarray]:
    if all(color is None for color in colors):
        return {}
    return {"color": np.concatenate([np.ones((n, 3)) if c is None else c for c, n in zip(colors, sizes)])}


def _check_container(path: Path, data: bytes) -> None:
    """Raise MeshError unless the header and chunks of the container add up to the file."""
    if not data.strip():
        raise MeshError(f"{path}: the file is empty")
    if data[:4] != b"glTF" or len(data) < 20:
        raise MeshError(f"{path}: not a GLB file, it starts with {data[:8]!r}")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise MeshError(f"{path}: glTF version {version}, only 2 is supported")
    if length != len(data):
        raise MeshError(f"{path}: the header says {length} bytes, the file has {len(data)}")
    offset = 12
    while offset < length:
        size = struct.unpack_from("<I", data, offset)[0] if offset + 8 <= length else length
        if offset + 8 + size > length:
            raise MeshError(f"{path}: a chunk of {size} bytes at byte {offset} runs past the end of the file")
        offset += 8 + size
