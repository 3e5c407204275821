"""Voxel files: binvox (Patrick Min's format, the one of ShapeNet and 3D-R2N2)."""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vision3dgen.checks import check_shape
from vision3dgen.files import FileError, atomic_write
from vision3dgen.structures import GridSpec

_LARGEST = 2048  # voxels along an axis


class Binvox(NamedTuple):
    """A binvox file."""

    voxels: Tensor  # (D, H, W) bool = (z, y, x)
    translate: tuple[float, float, float]  # the grid box's minimal corner (x, y, z)
    scale: float  # the box's longest edge

    @property
    def grid(self) -> GridSpec:
        """Where the voxels lie in the world the mesh came from: cells, their values at the centres."""
        shape = (self.voxels.shape[0], self.voxels.shape[1], self.voxels.shape[2])
        step = self.scale / max(shape)
        return GridSpec(self.translate, (step, step, step), shape, "center")


def read_binvox(path: str | os.PathLike[str]) -> Binvox:
    """Read a binvox file: run-length coded, in the file x slowest, then z, then y.

    Raises FileError naming file and reason: not binvox, a header line missing or wrong, runs that do not add up to the
    header's size (checked before memory is taken).
    """
    path = Path(path)
    data = path.read_bytes()
    if not data.startswith(b"#binvox"):
        raise FileError(f"{path}: not a binvox file, it starts with {data[:8]!r}")
    header, found, body = data.partition(b"\ndata\n")
    if not found:
        raise FileError(f"{path}: cut short, the header has no line 'data'")
    fields = {words[0]: words[1:] for line in header.decode("latin-1").split("\n") if (words := line.split())}
    if (version := fields.get("#binvox", [])) != ["1"]:
        raise FileError(f"{path}: binvox version {' '.join(version) or 'missing'}, only 1 is supported")
    dims = _header_numbers(path, fields, "dim", 3)
    if any(dim != int(dim) or not 1 <= dim <= _LARGEST for dim in dims):
        raise FileError(f"{path}: dim must be three integers in [1, {_LARGEST}], got {' '.join(fields['dim'])}")
    size_x, size_z, size_y = (int(dim) for dim in dims)
    translate = _header_numbers(path, fields, "translate", 3)
    (scale,) = _header_numbers(path, fields, "scale", 1)
    if scale <= 0:
        raise FileError(f"{path}: scale must be positive, got {scale}")

    runs = np.frombuffer(body, np.uint8, len(body) // 2 * 2).reshape(-1, 2)
    values, counts = runs[:, 0], runs[:, 1].astype(np.int64)
    total = int(counts.sum())
    if len(body) % 2 or total != size_x * size_y * size_z:
        kind = "cut short" if total < size_x * size_y * size_z else "too long"
        raise FileError(
            f"{path}: {kind}, the {len(body)} bytes of data hold {total} voxels, dim says {size_x * size_y * size_z}"
        )
    if (values > 1).any():
        raise FileError(f"{path}: voxels must be 0 or 1, got {values.max()}")
    in_file = np.repeat(values.astype(bool), counts).reshape(size_x, size_z, size_y)
    voxels = torch.from_numpy(np.ascontiguousarray(in_file.transpose(1, 2, 0)))  # (z, y, x)
    return Binvox(voxels, (translate[0], translate[1], translate[2]), scale)


def write_binvox(
    path: str | os.PathLike[str],
    voxels: Bool[Tensor, "D H W"],
    translate: tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: float = 1.0,
) -> None:
    """Write voxels (D, H, W) = (z, y, x) in a box from `translate` with the longest edge `scale`, atomically."""
    check_shape(voxels=(voxels, "D H W"))
    if min(voxels.shape) < 1 or max(voxels.shape) > _LARGEST or not scale > 0:
        raise FileError(f"{path}: needs 1 to {_LARGEST} voxels per axis, scale > 0; got {tuple(voxels.shape)}, {scale}")
    in_file = voxels.cpu().numpy().transpose(2, 0, 1)  # x, z, y
    flat = in_file.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.concatenate([starts, [flat.size]]))
    pieces = -(-lengths // 255)  # a count is one byte
    counts = np.full(int(pieces.sum()), 255, np.uint8)
    counts[pieces.cumsum() - 1] = lengths - 255 * (pieces - 1)
    runs = np.stack([np.repeat(flat[starts].astype(np.uint8), pieces), counts], axis=1)
    header = "#binvox 1\ndim {} {} {}\ntranslate {:.9g} {:.9g} {:.9g}\nscale {:.9g}\ndata\n"
    with atomic_write(path) as file:
        file.write(header.format(*in_file.shape, *translate, scale).encode() + runs.tobytes())


def _header_numbers(path: Path, fields: dict[str, list[str]], key: str, count: int) -> list[float]:
    words = fields.get(key)
    if words is None:
        raise FileError(f"{path}: the header has no line {key!r}")
    if len(words) != count or not all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word) for word in words):
        raise FileError(f"{path}: {key} must be {count} numbers, got {' '.join(words)[:60]!r}")
    values = [float(word) for word in words]
    if not all(map(math.isfinite, values)):
        raise FileError(f"{path}: {key} must be finite, got {' '.join(words)[:60]!r}")
    return values
