"""Wavefront OBJ and MTL: geometry, vertex colours after the coordinates, and one colour per material.

Differs: trimesh and others split a vertex where its texture coordinate or normal changes; here the file's vertices are
kept, in number and order, and texture coordinates and normals are skipped.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from vision3dgen.files import FileError, atomic_write, safe_join
from vision3dgen.io.polygons import MeshError, Polygons, numbers, read_lines

WITHOUT_MATERIAL = (1.0, 1.0, 1.0)  # color of a face whose material has no Kd, where others have


def read_obj(path: Path, data: bytes, *, materials: bool = True) -> Polygons:
    """Vertices, polygons and colours of an OBJ file; statements other than v, f, usemtl and mtllib are skipped."""
    vert_rows: list[list[str]] = []
    vert_lines: list[int] = []
    face_rows: list[list[str]] = []
    face_lines: list[int] = []
    uses: list[str] = []
    use_lines: list[int] = []
    libraries: list[str] = []
    for number, line in enumerate(read_lines(path, data), start=1):
        words = line.split()
        if not words:
            continue
        keyword = words[0]
        if keyword == "v":
            vert_rows.append(words[1:])
            vert_lines.append(number)
        elif keyword == "f":
            face_rows.append(words[1:])
            face_lines.append(number)
        elif keyword == "usemtl":
            uses.append(line.split(maxsplit=1)[1].strip() if len(words) > 1 else "")
            use_lines.append(number)
        elif keyword == "mtllib" and len(words) > 1:
            libraries.append(line.split(maxsplit=1)[1].strip())

    widths = np.fromiter(map(len, vert_rows), np.int64, len(vert_rows))
    if (short := np.flatnonzero(widths < 3)).size:
        raise MeshError(f"{path}, line {vert_lines[short[0]]}: a vertex needs 3 numbers, got {widths[short[0]]}")
    width = int(widths.min(initial=8))
    if not (widths == width).all():
        vert_rows = [row[:width] for row in vert_rows]
    values = numbers(path, vert_rows, vert_lines).reshape(-1, width)
    colored = width in (6, 7)  # x y z [w] r g b

    words_of_faces = list(chain.from_iterable(face_rows))
    if any("/" in word for word in words_of_faces):
        face_rows = [[word.partition("/")[0] for word in row] for row in face_rows]
    counts = np.fromiter(map(len, face_rows), np.int64, len(face_rows))
    corners = numbers(path, face_rows, face_lines, int)
    before = np.repeat(np.searchsorted(vert_lines, face_lines), counts)  # vertices above each corner's line
    corners = np.where(corners < 0, before + corners, corners - 1)

    faces_attributes = {}
    if materials and uses and len(counts):
        palette = _read_libraries(path, libraries)
        if any(name in palette for name in uses):
            table = np.array([palette.get(name, WITHOUT_MATERIAL) for name in uses] + [WITHOUT_MATERIAL])
            faces_attributes["color"] = table[np.searchsorted(use_lines, face_lines, side="right") - 1]
    return Polygons(
        verts=values[:, :3],
        counts=counts,
        corners=corners,
        verts_attributes={"color": values[:, -3:]} if colored else {},
        faces_attributes=faces_attributes,
        verts_lines=vert_lines,
        faces_lines=face_lines,
        base=1,
    )


def read_mtl(path: Path) -> dict[str, tuple[float, float, float]]:
    """Diffuse colour (Kd) of each material that has one as numbers."""
    palette: dict[str, tuple[float, float, float]] = {}
    name = ""
    for number, line in enumerate(read_lines(path, path.read_bytes()), start=1):
        words = line.split()
        if not words:
            continue
        if words[0] == "newmtl" and len(words) > 1:
            name = line.split(maxsplit=1)[1].strip()
        elif words[0] == "Kd" and len(words) > 1 and words[1] not in ("spectral", "xyz"):
            values = numbers(path, [words[1:]], [number])
            if len(values) not in (1, 3) or not np.isfinite(values).all():
                raise MeshError(f"{path}, line {number}: Kd needs 1 or 3 finite numbers, got {words[1:]}")
            red, green, blue = np.broadcast_to(values, 3).tolist()
            palette[name] = (red, green, blue)
    return palette


def _read_libraries(path: Path, libraries: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    palette: dict[str, tuple[float, float, float]] = {}
    for library in libraries:
        whole = _beside(path, library)
        for found in [whole] if whole else [_beside(path, word) for word in library.split()]:
            if found:
                palette |= read_mtl(found)
    return palette


def _beside(path: Path, name: str) -> Path | None:
    """The file an OBJ names, if it is there and inside the OBJ's folder."""
    try:
        found = safe_join(path.parent, name.replace("\\", "/"))
        return found if found.is_file() else None
    except (FileError, OSError):  # a name that is no file's: out of the folder, or longer than names can be
        return None


def format_obj(
    verts: np.ndarray,
    faces: np.ndarray,
    *,
    colors: np.ndarray | None = None,
    library: str = "",
    face_names: Sequence[str] = (),
) -> bytes:
    """OBJ text, with a `usemtl` where a face's material changes; 9 digits bring float32 back exact."""
    digits = 15 if verts.dtype == np.float64 else 9
    parts = [f"mtllib {library}\n"] if library else []
    rows = verts if colors is None else np.concatenate([verts, colors], axis=1)
    rows = rows + 0.0  # no "-0"
    parts.append(("v" + f" %.{digits}g" * rows.shape[1] + "\n") * len(rows) % tuple(rows.ravel().tolist()))
    corners = (faces + 1).ravel().tolist()
    runs = [i for i in range(len(faces)) if i == 0 or (face_names and face_names[i] != face_names[i - 1])]
    for start, stop in zip(runs, [*runs[1:], len(faces)]):
        if face_names:
            parts.append(f"usemtl {face_names[start]}\n")
        parts.append("f %d %d %d\n" * (stop - start) % tuple(corners[3 * start : 3 * stop]))
    return "".join(parts).encode()


def write_obj(
    path: Path,
    verts: np.ndarray,
    faces: np.ndarray,
    *,
    colors: np.ndarray | None = None,
    face_material: np.ndarray | None = None,
    materials: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """An OBJ, and beside it the MTL of its materials if there are any; each file is written atomically."""
    if face_material is None or not materials:
        with atomic_write(path) as file:
            file.write(format_obj(verts, faces, colors=colors))
        return
    names = list(materials)
    library = path.with_suffix(".mtl")
    blocks = ["newmtl {}\nKd {:.9g} {:.9g} {:.9g}\n".format(name, *materials[name]) for name in names]
    with atomic_write(library) as file:  # first: an OBJ never names a library that is not there
        file.write("\n".join(blocks).encode())
    face_names = [names[index] for index in face_material.tolist()]
    with atomic_write(path) as file:
        file.write(format_obj(verts, faces, colors=colors, library=library.name, face_names=face_names))
