"""Point files: ply, npz, xyz; with normals and colours."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision3dgen.files import atomic_write
from vision3dgen.io.arrays import list_npz, load_npz, save_npz
from vision3dgen.io.ply import format_ply, ply_points, read_ply
from vision3dgen.io.polygons import MeshError, check_points, numbers, read_lines, suffix_of, to_array, warn_not_held
from vision3dgen.structures import Pointclouds

_SUFFIXES = (".npz", ".ply", ".xyz")


def load_pointcloud(path: str | os.PathLike[str]) -> Pointclouds:
    """Read a point cloud as a batch of one, in float32; colours are its features (P, 3) in [0, 1].

    npz: `points`, and `normals` and `features` (or `colors`) if there; Occupancy Networks' `pointcloud.npz` is one, in
    its normalized frame. xyz: lines of 3, 6 (with normals) or 9 (and colours) numbers. ply: the vertex element. Raises
    MeshError, or FileError for npz, naming the file, the reason and the line.
    """
    path = Path(path)
    suffix = suffix_of(path, _SUFFIXES)
    extra: dict[str, np.ndarray]
    if suffix == ".npz":
        names = list_npz(path)
        colors = "features" if "features" in names else "colors"
        extra = load_npz(path, "points", *(name for name in ("normals", colors) if name in names))
        points = extra.pop("points")
        extra = {{"normals": "normal", colors: "color"}[name]: value for name, value in extra.items()}
    elif suffix == ".ply":
        points, extra = ply_points(path, read_ply(path, path.read_bytes()))
    else:
        points, extra = _read_xyz(path)
    for name, value in {"points": points, **extra}.items():
        wide = value.ndim == 2 and (value.shape[1] == 3 or name == "color")
        if not wide or value.shape[0] != len(points) or value.dtype.kind not in "fiu":
            raise MeshError(f"{path}: {name} must be ({len(points)}, 3) numbers, got {value.shape} of {value.dtype}")
    check_points(path, points)
    tensors = {k: [torch.from_numpy(v.astype(np.float32))] for k, v in {"points": points, **extra}.items()}
    return Pointclouds(tensors["points"], normals=tensors.get("normal"), features=tensors.get("color"))


def save_pointcloud(path: str | os.PathLike[str], cloud: Any) -> None:
    """Write one point cloud (ours or PyTorch3D's, a batch of one) as ply, npz or xyz, atomically.

    Features of width 3 are colours in [0, 1] (bytes in PLY); features of another width, and in xyz colours without
    normals, are left out with a warning, but npz holds everything.
    """
    path = Path(path)
    suffix = suffix_of(path, _SUFFIXES)
    if len(cloud) != 1:
        raise MeshError(
            f"{path}: a file holds one cloud, got a batch of {len(cloud)}; take one or join them as a scene"
        )
    named = {"normal": cloud.normals_packed(), "color": cloud.features_packed()}
    points = to_array(cloud.points_packed())
    extra = {name: to_array(value) for name, value in named.items() if value is not None}
    check_points(path, points)
    if suffix == ".npz":
        save_npz(path, points=points, **{{"normal": "normals", "color": "features"}[k]: v for k, v in extra.items()})
        return
    held = ["normal", "color"] if suffix == ".ply" or "normal" in extra else ["normal"]
    warn_not_held(path, "points", extra, held)
    extra = {name: extra[name] for name in held if name in extra and extra[name].shape[1] == 3}
    if suffix == ".ply":
        content = format_ply(points, extra)
    else:
        rows = np.concatenate([points, *extra.values()], axis=1)
        content = ((" ".join(["%.9g"] * rows.shape[1]) + "\n") * len(rows) % tuple(rows.ravel().tolist())).encode()
    with atomic_write(path) as file:
        file.write(content)


def _read_xyz(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows, lines = [], []
    for number, line in enumerate(read_lines(path, path.read_bytes()), start=1):
        if words := line.split():
            rows.append(words)
            lines.append(number)
            if len(words) not in (3, 6, 9) or len(words) != len(rows[0]):
                raise MeshError(f"{path}, line {number}: needs 3, 6 or 9 numbers as the first line, got {len(words)}")
    if not rows:
        raise MeshError(f"{path}: no points")
    values = numbers(path, rows, lines).reshape(len(rows), -1)
    blocks = dict(zip(("points", "normal", "color"), np.split(values, values.shape[1] // 3, axis=1)))
    return blocks.pop("points"), blocks
