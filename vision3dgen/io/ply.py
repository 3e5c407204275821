"""Stanford polygon files (PLY): text, little and big endian, any properties, polygons of any size.

Differs: trimesh splits vertices at texture seams and refuses binary files that mix triangles and quads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vision3dgen.io.polygons import MeshError, Polygons, numbers, to_bytes, to_unit

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "int64": "i8", "uint64": "u8", "float32": "f4", "float64": "f8",
}  # fmt: skip
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_COLORS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_INDICES = ("vertex_indices", "vertex_index")


class Lists(NamedTuple):
    """The values of a list property."""

    counts: np.ndarray  # (N,)
    values: np.ndarray  # (sum of counts,)


class _Property(NamedTuple):
    name: str
    dtype: np.dtype
    count_dtype: np.dtype | None = None  # of a list


class _Element(NamedTuple):
    name: str
    size: int
    properties: list[_Property]


Columns = dict[str, np.ndarray | Lists]


# ------------------------------------------------------------------------------------------------------ reading


def read_ply(path: Path, data: bytes) -> dict[str, Columns]:
    """All properties of all elements: `{"vertex": {"x": (V,), ...}, "face": {"vertex_indices": Lists, ...}}`."""
    order, elements, start = _read_header(path, data)
    if not order:
        return _read_text(path, data, start, elements)
    body = np.frombuffer(data, np.uint8)
    result: dict[str, Columns] = {}
    for element in elements:
        smallest = sum((p.count_dtype or p.dtype).itemsize for p in element.properties)
        if element.size * smallest > len(body) - start:
            raise MeshError(
                f"{path}: the header says {element.size} {element.name} rows of at least {smallest} bytes, "
                f"{len(body) - start} bytes are left"
            )
        if element.properties:
            columns = _read_equal_rows(body, start, element)
            result[element.name], start = columns or _read_unequal_rows(path, data, start, element)
    if data[start:].strip():
        raise MeshError(f"{path}: {len(data) - start} bytes follow the last row that the header announces")
    return result


def _read_header(path: Path, data: bytes) -> tuple[str, list[_Element], int]:
    """Byte order ("" for text), elements, and where the body starts."""
    if not data.strip():
        raise MeshError(f"{path}: the file is empty")
    if data[:3] != b"ply" or data[3:4] not in (b"\n", b"\r"):
        raise MeshError(f"{path}: not a PLY file, it starts with {data[:8]!r}")
    end = data.find(b"\nend_header")
    stop = data.find(b"\n", end + 1)
    if end < 0 or stop < 0:
        raise MeshError(f"{path}: cut short, the header has no end")
    order, elements = None, list[_Element]()
    for number, line in enumerate(data[:end].decode("latin-1").split("\n")[1:], start=2):
        try:
            match line.split():
                case ["format", name, _]:
                    order = _ORDERS[name]
                case ["element", name, size] if int(size) >= 0 and name not in [e.name for e in elements]:
                    elements.append(_Element(name, int(size), []))
                case ["property", "list", count, kind, name] if _TYPES[count][0] in "iu" and order is not None:
                    dtypes = [np.dtype(order + _TYPES[word]) for word in (kind, count)]
                    elements[-1].properties.append(_Property(name, *dtypes))
                case ["property", kind, name] if order is not None:
                    elements[-1].properties.append(_Property(name, np.dtype(order + _TYPES[kind])))
                case ["comment" | "obj_info", *_] | []:
                    pass
                case _:
                    raise ValueError(line)
        except (ValueError, KeyError, IndexError) as error:
            raise MeshError(f"{path}, line {number}: cannot read the header line {line.strip()[:60]!r}") from error
    if order is None:
        raise MeshError(f"{path}: the header names no format")
    return order, elements, stop + 1


def _read_text(path: Path, data: bytes, start: int, elements: list[_Element]) -> dict[str, Columns]:
    first_line = data[:start].count(b"\n") + 1
    rows, lines = [], []
    for number, line in enumerate(data[start:].decode("latin-1").split("\n"), start=first_line):
        if words := line.split():
            rows.append(words)
            lines.append(number)
    announced = sum(element.size for element in elements if element.properties)
    if announced != len(rows):
        raise MeshError(f"{path}: the header says {announced} rows, {len(rows)} lines follow")
    result: dict[str, Columns] = {}
    done = 0
    for element in elements:
        if not element.properties:
            continue
        own, own_lines = rows[done : done + element.size], lines[done : done + element.size]
        done += element.size
        values = numbers(path, own, own_lines)
        stops = np.cumsum([len(row) for row in own], dtype=np.int64)
        cursor = np.concatenate(
            [np.zeros(min(1, len(own)), np.int64), stops[:-1]]
        )  # (N,) next unread value of each row

        def check(fits: np.ndarray, own_lines: list[int] = own_lines, name: str = element.name) -> None:
            if not fits.all():
                raise MeshError(f"{path}, line {own_lines[int(np.argmin(fits))]}: not the properties of a {name}")

        columns: Columns = {}
        for prop in element.properties:
            check(cursor < stops)
            found = values[cursor]
            cursor = cursor + 1
            if prop.count_dtype is None:
                check(_holds(prop.dtype, found))
                columns[prop.name] = found.astype(prop.dtype)
                continue
            check(_holds(np.dtype(np.int64), found) & (found >= 0) & (found <= stops - cursor))
            counts = found.astype(np.int64)
            listed = values[_spread(cursor, counts)]
            check(np.bincount(np.repeat(np.arange(len(counts)), counts), ~_holds(prop.dtype, listed), len(counts)) == 0)
            columns[prop.name] = Lists(counts, listed.astype(prop.dtype))
            cursor = cursor + counts
        check(cursor == stops)
        result[element.name] = columns
    return result


def _read_equal_rows(body: np.ndarray, start: int, element: _Element) -> tuple[Columns, int] | None:
    """Rows at a constant stride, if they are (lists as long as the first row's everywhere)."""
    fields: list[tuple] = []
    offset = start
    for index, prop in enumerate(element.properties):
        if prop.count_dtype is None:
            fields.append((f"v{index}", prop.dtype))
            offset += prop.dtype.itemsize
            continue
        head = body[offset : offset + prop.count_dtype.itemsize]
        count = int(head.view(prop.count_dtype)[0]) if element.size and len(head) == prop.count_dtype.itemsize else 0
        if not 0 <= count <= len(body):
            return None
        fields += [(f"n{index}", prop.count_dtype), (f"v{index}", prop.dtype, (count,))]
        offset += prop.count_dtype.itemsize + count * prop.dtype.itemsize
    row = np.dtype(fields)
    stop = start + element.size * row.itemsize
    if stop > len(body):
        return None
    rows = body[start:stop].view(row)
    columns: Columns = {}
    for index, prop in enumerate(element.properties):
        values = rows[f"v{index}"]
        if prop.count_dtype is None:
            columns[prop.name] = values
            continue
        counts = rows[f"n{index}"].astype(np.int64)
        if not (counts == values.shape[1]).all():
            return None
        columns[prop.name] = Lists(counts, values.reshape(-1))
    return columns, stop


def _read_unequal_rows(path: Path, data: bytes, start: int, element: _Element) -> tuple[Columns, int]:
    """Rows one after the other, where lists have different lengths."""
    places: list[list[int]] = [[] for _ in element.properties]  # offset of each property's values in each row
    counts: list[list[int]] = [[] for _ in element.properties]
    offset = start
    for row in range(element.size):
        for prop, place, count in zip(element.properties, places, counts):
            size, head = 1, 0
            if prop.count_dtype is not None:
                head = prop.count_dtype.itemsize
                fits = offset + head <= len(data)
                size = int(np.frombuffer(data, prop.count_dtype, 1, offset)[0]) if fits else 0
            place.append(offset + head)
            count.append(size)
            offset += head + size * prop.dtype.itemsize
            if size < 0 or offset > len(data):
                raise MeshError(f"{path}: {element.name} {row} of {element.size} runs past the end of the file")
    body = np.frombuffer(data, np.uint8)
    columns: Columns = {}
    for prop, place, count in zip(element.properties, places, counts):
        sizes = np.array(count, np.int64)
        values = body[_spread(np.array(place, np.int64), sizes * prop.dtype.itemsize)].view(prop.dtype)
        columns[prop.name] = values if prop.count_dtype is None else Lists(sizes, values)
    return columns, offset


def _holds(dtype: np.dtype, values: np.ndarray) -> np.ndarray:
    """Whether each float64 can be stored in the type."""
    if dtype.kind == "f":
        return np.ones(len(values), bool)
    limits = np.iinfo(dtype)
    return (values >= limits.min) & (values <= limits.max) & (values == np.floor(values))


def _spread(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + count - 1 of each row, one row after the other."""
    first = counts.cumsum() - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - first, counts)


def ply_points(path: Path, elements: dict[str, Columns]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Vertex positions (V, 3), and "normal" and "color" (V, 3) if the file has them."""
    columns = elements.get("vertex", {})
    positions = _stack(columns, ("x", "y", "z"))
    if positions is None:
        raise MeshError(f"{path}: no vertex element with x, y and z; it has {sorted(elements)} and {sorted(columns)}")
    attributes = _colors(columns)
    normals = _stack(columns, ("nx", "ny", "nz"))
    return positions.astype(np.float64), attributes if normals is None else {"normal": normals} | attributes


def ply_polygons(path: Path, elements: dict[str, Columns]) -> Polygons:
    """Vertices, polygons, vertex normals and colours."""
    verts, verts_attributes = ply_points(path, elements)
    columns = elements.get("face", {})
    indices = next((columns[name] for name in _INDICES if name in columns), None)
    if not isinstance(indices, Lists) or indices.values.dtype.kind not in "iu":
        raise MeshError(
            f"{path}: no faces; a face element needs an integer list {_INDICES[0]}, it has {sorted(columns)}"
        )
    return Polygons(verts, indices.counts, indices.values.astype(np.int64), verts_attributes, _colors(columns))


def _stack(columns: Columns, names: tuple[str, ...]) -> np.ndarray | None:
    found = [columns.get(name) for name in names]
    return np.stack(found, axis=1) if all(isinstance(column, np.ndarray) for column in found) else None  # type: ignore[arg-type]


def _colors(columns: Columns) -> dict[str, np.ndarray]:
    for names in _COLORS:
        if (found := _stack(columns, names)) is not None:
            return {"color": to_unit(found)}
    return {}


# ------------------------------------------------------------------------------------------------------ writing


def format_ply(
    verts: np.ndarray,
    verts_attributes: Mapping[str, np.ndarray],
    faces: np.ndarray | None = None,
    faces_attributes: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Little-endian PLY: positions in their own precision, "normal" in float, "color" as bytes; faces unless None."""
    kind = "double" if verts.dtype == np.float64 else "float"
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(verts)}"]
    columns = [("x y z", kind, verts)]
    if "normal" in verts_attributes:
        columns.append(("nx ny nz", "float", verts_attributes["normal"]))
    if "color" in verts_attributes:
        columns.append(("red green blue", "uchar", to_bytes(verts_attributes["color"])))
    body = _rows(header, columns)
    if faces is not None:
        header += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        columns = [("", "uchar", np.full((len(faces), 1), 3)), ("", "int", faces)]
        if faces_attributes and "color" in faces_attributes:
            columns.append(("red green blue", "uchar", to_bytes(faces_attributes["color"])))
        body += _rows(header, columns)
    return "\n".join([*header, "end_header", ""]).encode() + body


def _rows(header: list[str], columns: list[tuple[str, str, np.ndarray]]) -> bytes:
    """Columns side by side as bytes; their named properties are appended to the header."""
    fields = []
    for index, (names, kind, values) in enumerate(columns):
        header += [f"property {kind} {name}" for name in names.split()]
        fields.append((str(index), "<" + _TYPES[kind], (values.shape[1],)))
    rows = np.empty(len(columns[0][2]), np.dtype(fields))
    for index, (_, _, values) in enumerate(columns):
        rows[str(index)] = values
    return rows.tobytes()
