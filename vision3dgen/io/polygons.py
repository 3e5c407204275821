"""Indexed polygons, what every mesh format holds, and the checks between a file's content and `Meshes`."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision3dgen.files import FileError
from vision3dgen.structures import Meshes


class MeshError(FileError):
    """A mesh or point file that cannot be read or written; the message names file, reason, and line if it is text."""


class Polygons(NamedTuple):
    verts: np.ndarray  # (V, 3) float
    counts: np.ndarray  # (F,) corners of each polygon
    corners: np.ndarray  # (sum of counts,) into verts, polygon after polygon
    verts_attributes: Mapping[str, np.ndarray] = {}  # (V, C) each
    faces_attributes: Mapping[str, np.ndarray] = {}  # (F, C) each
    verts_lines: Sequence[int] | None = None  # line of the file each vertex stands on
    faces_lines: Sequence[int] | None = None
    base: int = 0  # number of the first vertex in the file


def polygons_to_meshes(path: Path | str, polygons: Polygons) -> Meshes:
    """One mesh: polygons cut into fans, vertices as they are. Raises MeshError naming the first bad vertex or face."""
    verts, counts, corners = polygons.verts, polygons.counts, polygons.corners
    check_points(path, verts, polygons.verts_lines)
    if not len(counts):
        raise MeshError(f"{path}: no faces ({len(verts)} vertices)")
    if (thin := np.flatnonzero(counts < 3)).size:
        face = int(thin[0])
        raise MeshError(f"{path}: face {face}{_line(polygons.faces_lines, face)} has {counts[face]} corners, needs 3")
    if (outside := np.flatnonzero((corners < 0) | (corners >= len(verts)))).size:
        face = int(np.searchsorted(counts.cumsum(), outside[0], side="right"))
        raise MeshError(
            f"{path}: face {face}{_line(polygons.faces_lines, face)} uses vertex {corners[outside[0]] + polygons.base} "
            f"(the first is {polygons.base}), the file has {len(verts)} vertices"
        )
    parts = counts - 2
    source = np.repeat(np.arange(len(counts)), parts)  # (T,) polygon of each triangle
    within = np.arange(len(source)) - np.repeat(parts.cumsum() - parts, parts)
    first = (counts.cumsum() - counts)[source]
    faces = np.stack([corners[first], corners[first + within + 1], corners[first + within + 2]], axis=1)
    return Meshes(
        [torch.from_numpy(verts.astype(np.float32))],
        [torch.from_numpy(faces.astype(np.int64))],
        verts_attributes={k: [torch.from_numpy(v.astype(np.float32))] for k, v in polygons.verts_attributes.items()},
        faces_attributes={
            k: [torch.from_numpy(v.astype(np.float32)[source])] for k, v in polygons.faces_attributes.items()
        },
    )


def check_points(path: Path | str, points: np.ndarray, lines: Sequence[int] | None = None) -> None:
    """Raise MeshError unless there is a point and all are finite in float32."""
    if not len(points):
        raise MeshError(f"{path}: no vertices")
    if (bad := np.flatnonzero(~(np.abs(points) <= np.finfo(np.float32).max).all(axis=1))).size:
        row = int(bad[0])
        raise MeshError(f"{path}: vertex {row}{_line(lines, row)} is not finite: {points[row].tolist()}")


def suffix_of(path: Path, known: Collection[str]) -> str:
    """The file's extension in lower case; MeshError unless it is known."""
    if path.suffix.lower() not in known:
        raise MeshError(f"{path}: unknown extension {path.suffix!r}; choose from {sorted(known)}")
    return path.suffix.lower()


def to_array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def to_unit(colors: np.ndarray) -> np.ndarray:
    """Colours as floats in [0, 1]; integers are fractions of their type's largest value."""
    return colors / np.iinfo(colors.dtype).max if colors.dtype.kind in "ui" else colors.astype(np.float64)


def to_bytes(colors: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] as bytes, clipped to that range."""
    return np.round(np.clip(colors, 0.0, 1.0) * 255.0).astype(np.uint8)


def warn_not_held(target: Any, kind: str, attributes: Mapping[str, np.ndarray], held: Collection[str]) -> None:
    """Warn about the attributes that `target` has no place for: their name, or their width, is not that of `held`."""
    lost = [name for name, value in attributes.items() if name not in held or value.shape[1:] != (3,)]
    if lost:
        warnings.warn(f"{target}: cannot hold {kind}_attributes {lost}, left out", UserWarning, stacklevel=4)


# --------------------------------------------------------------------------------------------------------- text


def read_lines(path: Path, data: bytes) -> list[str]:
    """Lines of a text format, without comments; a line ending in a backslash is joined with the next."""
    if not data.strip():
        raise MeshError(f"{path}: the file is empty")
    if b"\0" in data:
        raise MeshError(f"{path}: binary data where text was expected")
    text = data.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if "\\\n" in text:
        for number in reversed(range(len(lines) - 1)):
            if lines[number].endswith("\\"):  # the next line stays, empty: numbers keep their meaning
                lines[number], lines[number + 1] = f"{lines[number][:-1]} {lines[number + 1]}", ""
    return [line.partition("#")[0] for line in lines] if "#" in text else lines


def numbers(
    path: Path, rows: Iterable[Sequence[str]], lines: Sequence[int], kind: Callable[[str], float] = float
) -> np.ndarray:
    """All words of all rows as one array, float64 or int64; MeshError naming the line of the first that is neither."""
    rows = list(rows)
    try:
        return np.array([kind(word) for row in rows for word in row], np.float64 if kind is float else np.int64)
    except (ValueError, OverflowError):
        for row, line in zip(rows, lines):
            for word in row:
                try:
                    np.array(kind(word), np.float64 if kind is float else np.int64)
                except (ValueError, OverflowError) as error:
                    what = "a number" if kind is float else "an integer"
                    raise MeshError(f"{path}, line {line}: {word[:40]!r} is not {what}") from error
        raise


def _line(lines: Sequence[int] | None, row: int) -> str:
    return "" if lines is None else f" (line {lines[row]})"
