"""Object File Format (OFF), with the vertex colours of COFF, per-face colours, and ModelNet's glued headers."""

import re
from itertools import chain
from pathlib import Path

import numpy as np

from vision3dgen.io.polygons import MeshError, Polygons, numbers, read_lines, to_bytes


def read_off(path: Path, data: bytes) -> Polygons:
    """Vertices, polygons and colours of an OFF file."""
    rows, lines = [], []
    for number, line in enumerate(read_lines(path, data), start=1):
        if words := line.split():
            rows.append(words)
            lines.append(number)
    header = re.fullmatch(r"(C?)(N?)OFF(.*)", rows[0][0]) if rows else None
    if header is None:
        found = rows[0][0][:20] if rows else ""
        raise MeshError(f"{path}: not an OFF file (OFF, COFF, NOFF or CNOFF first), it starts with {found!r}")
    colored, normals, glued = header.groups()
    counts_row = [word for word in (glued, *rows[0][1:]) if word]
    start = 1
    if not counts_row and len(rows) > 1:
        counts_row, start = rows[1], 2
    if len(counts_row) < 2:
        raise MeshError(f"{path}, line {lines[start - 1]}: the numbers of vertices and faces are missing")
    num_verts, num_faces = numbers(path, [counts_row[:2]], [lines[start - 1]], int).tolist()
    if num_verts < 0 or num_faces < 0 or num_verts + num_faces > len(rows) - start:
        raise MeshError(
            f"{path}: the header says {num_verts} vertices and {num_faces} faces, {len(rows) - start} lines follow"
        )
    vert_rows, vert_lines = rows[start : start + num_verts], lines[start : start + num_verts]
    start += num_verts
    face_rows, face_lines = rows[start : start + num_faces], lines[start : start + num_faces]

    width = 6 if normals else 3  # columns before the colour
    needed = width + 3 if colored else width
    for row, number in zip(vert_rows, vert_lines):
        if len(row) < needed:
            raise MeshError(f"{path}, line {number}: a vertex needs {needed} numbers, got {len(row)}")
    verts = numbers(path, [row[:3] for row in vert_rows], vert_lines).reshape(-1, 3)
    verts_attributes = {}
    if normals:
        verts_attributes["normal"] = numbers(path, [row[3:6] for row in vert_rows], vert_lines).reshape(-1, 3)
    if colored:
        verts_attributes["color"] = _colors(path, [row[width : width + 3] for row in vert_rows], vert_lines)

    counts = numbers(path, [row[:1] for row in face_rows], face_lines, int)
    for row, number, size in zip(face_rows, face_lines, counts.tolist()):
        if not 0 <= size < len(row):
            raise MeshError(f"{path}, line {number}: a face of {size} corners, {len(row) - 1} numbers follow")
    corners = numbers(path, [row[1 : 1 + n] for row, n in zip(face_rows, counts.tolist())], face_lines, int)
    extra = [row[1 + n :] for row, n in zip(face_rows, counts.tolist())]
    faces_attributes = {}
    if extra and all(len(words) >= 3 for words in extra):
        faces_attributes["color"] = _colors(path, [words[:3] for words in extra], face_lines)
    return Polygons(verts, counts, corners, verts_attributes, faces_attributes, vert_lines, face_lines)


def _colors(path: Path, rows: list[list[str]], lines: list[int]) -> np.ndarray:
    """Integers are of 255, numbers with a point of 1."""
    values = numbers(path, rows, lines).reshape(-1, 3)
    return values if any("." in word for row in rows for word in row) else values / 255.0


def format_off(
    verts: np.ndarray, faces: np.ndarray, colors: np.ndarray | None = None, face_colors: np.ndarray | None = None
) -> bytes:
    """OFF text, or COFF where vertices have colours."""
    head = f"{'OFF' if colors is None else 'COFF'}\n{len(verts)} {len(faces)} 0\n"
    rows: list[list[float]] = (verts + 0.0).tolist()  # no "-0"
    digits = 15 if verts.dtype == np.float64 else 9  # 9 bring float32 back exact
    vert, face = " ".join([f"%.{digits}g"] * 3), "3 %d %d %d"
    if colors is not None:
        vert += " %d %d %d 255"
        rows = [row + color for row, color in zip(rows, to_bytes(colors).tolist())]
    if face_colors is not None:
        face += " %d %d %d"
        faces = np.concatenate([faces, to_bytes(face_colors).astype(faces.dtype)], axis=1)
    body = (vert + "\n") * len(rows) % tuple(chain.from_iterable(rows))
    return (head + body + (face + "\n") * len(faces) % tuple(faces.ravel().tolist())).encode()
