"""cameras.npz, as Occupancy Networks has it: `world_mat_0` (3, 4) and `camera_mat_0` (3, 3), and so on for each view.

The first takes world to camera coordinates (x right, y down, z forward), the second those to pixels.
"""

import os
import re
from pathlib import Path

import numpy as np
import torch

from vision3dgen.files import FileError
from vision3dgen.io import load_npz
from vision3dgen.structures import Camera


def load_cameras(path: str | os.PathLike[str], image_size: int) -> Camera:
    """The cameras of a file by their numbers, a batch, for pictures of `image_size` pixels a side; float64.

    Raises FileError for a matrix that is missing, of another shape or not finite, and for a turn that is no rotation.
    """
    path = Path(path)
    found = read_cameras(path, [])
    world, matrix = (torch.from_numpy(found[kind]).double() for kind in ("world_mat", "camera_mat"))
    turn = world[:, :, :3]
    for index, number in enumerate(found["numbers"].tolist()):
        if not (bool(world[index].isfinite().all()) and bool(matrix[index].isfinite().all())):
            raise FileError(f"{path}: camera {number} has numbers that are not finite")
        off = float((turn[index] @ turn[index].T - torch.eye(3, dtype=torch.float64)).abs().max())
        if off > 1e-4 or float(torch.linalg.det(turn[index])) < 0:
            raise FileError(
                f"{path}: the left 3 x 3 of world_mat_{number} is no rotation: its product with its transpose is "
                f"{off:.2g} off the identity, its determinant {float(torch.linalg.det(turn[index])):.2g}"
            )
    return Camera(turn.contiguous(), world[:, :, 3].contiguous(), matrix, (image_size, image_size))


def read_cameras(path: Path, numbers: list[int]) -> dict[str, np.ndarray]:
    """cameras.npz: the arrays KIND_0, KIND_1, ... stacked by kind (world_mat, camera_mat, ...)."""
    flat = load_npz(path)
    families: dict[str, dict[int, np.ndarray]] = {}
    for key, value in flat.items():
        found = re.fullmatch(r"(.+)_(\d+)", key)
        if found is None:
            raise FileError(f"{path}: {key!r} is no KIND_NUMBER, such as world_mat_0")
        families.setdefault(found[1], {})[int(found[2])] = value
    numbers = numbers or sorted(families.get("world_mat", {}))
    if not numbers:
        raise FileError(f"{path}: no camera in it; it must have world_mat_0, camera_mat_0, ...")
    arrays = {"numbers": np.array(numbers, np.int64)}
    for kind, each in families.items():
        absent = sorted(set(numbers) - set(each))
        if absent:
            raise FileError(f"{path}: no {kind}_{absent[0]}, but there is a picture {absent[0]:03d}")
        for number in numbers:
            if each[number].shape != each[numbers[0]].shape:
                shape, other = each[number].shape, each[numbers[0]].shape
                raise FileError(f"{path}: {kind}_{number} is {shape}, {kind}_{numbers[0]} is {other}")
        arrays[kind] = np.stack([each[number] for number in numbers])
    for kind, shape in (("world_mat", (3, 4)), ("camera_mat", (3, 3))):
        if kind not in arrays or arrays[kind].shape[1:] != shape:
            raise FileError(
                f"{path}: {kind} must be {shape}, got {arrays[kind].shape[1:] if kind in arrays else 'none'}"
            )
    return arrays
