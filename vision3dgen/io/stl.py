"""Stereolithography (STL), binary and text: triangles without indices, joined where coordinates are equal."""

from pathlib import Path

import numpy as np

from vision3dgen.io.polygons import MeshError, Polygons, numbers, read_lines

_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def read_stl(path: Path, data: bytes) -> Polygons:
    """Triangles of an STL file; vertices are its distinct corners in the order of their first use."""
    count = int.from_bytes(data[80:84], "little")
    if len(data) >= 84 and len(data) == 84 + count * _TRIANGLE.itemsize:
        corners = np.frombuffer(data, _TRIANGLE, offset=84)["corners"].reshape(-1, 3).astype(np.float64)
    elif data.lstrip()[:5].lower() == b"solid" and b"\0" not in data:
        corners = _read_text(path, data)
    elif len(data) < 84:
        raise MeshError(f"{path}: not an STL file, or one cut short ({len(data)} bytes)")
    else:
        raise MeshError(
            f"{path}: the header says {count} triangles, {84 + count * _TRIANGLE.itemsize} bytes, "
            f"the file has {len(data)}"
        )
    _, first, inverse = np.unique(corners, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # np.unique sorts by coordinates
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Polygons(corners[first[order]], np.full(len(corners) // 3, 3), rank[inverse.reshape(-1)])


def _read_text(path: Path, data: bytes) -> np.ndarray:
    rows, lines, inside = [], [], 0
    number = 0
    for number, line in enumerate(read_lines(path, data), start=1):
        words = line.lower().split()
        if words[:1] == ["vertex"]:
            if len(words) != 4:
                raise MeshError(f"{path}, line {number}: a vertex needs 3 numbers, got {len(words) - 1}")
            rows.append(words[1:])
            lines.append(number)
            inside += 1
        elif words[:1] == ["endfacet"]:
            if inside != 3:
                raise MeshError(f"{path}, line {number}: a facet needs 3 vertices, got {inside}")
            inside = 0
        elif words[:1] == ["endsolid"]:
            break
    else:
        raise MeshError(f"{path}, line {number}: cut short, no endsolid")
    if inside:
        raise MeshError(f"{path}, line {number}: a facet is not closed")
    return numbers(path, rows, lines).reshape(-1, 3)


def format_stl(verts: np.ndarray, faces: np.ndarray) -> bytes:
    """Binary STL in float32, with unit normals, zero for triangles without area."""
    triangles = np.zeros(len(faces), _TRIANGLE)
    corners = verts[faces]  # (F, 3, 3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    triangles["normal"] = normals / np.where(length > 0, length, 1.0)
    triangles["corners"] = corners
    return b"vision3dgen".ljust(80) + len(faces).to_bytes(4, "little") + triangles.tobytes()
