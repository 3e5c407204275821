"""Pix3D: photographs of furniture, each with a mesh, its pose and the camera's focal length."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision3dgen.datasets.photographs import (
    OnError,
    Photographs,
    box_faults,
    clipped,
    division,
    mask_faults,
    settle,
)
from vision3dgen.datasets.shapenet import Problem
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import load_mesh, read_image
from vision3dgen.structures import Camera, Meshes

PIX3D_CATEGORIES = ("bed", "bookcase", "chair", "desk", "misc", "sofa", "table", "tool", "wardrobe")
SENSOR = 32.0  # width in millimetres to which the file's focal lengths belong
NEEDED = ("img", "category", "img_size", "mask", "model", "rot_mat", "trans_mat", "focal_length", "bbox")
# Pix3D's cameras look along +z with x to the left and y up, ours with x to the right and y down.
TURN = np.diag([-1.0, -1.0, 1.0])


class Pix3D(Photographs):
    """Furniture with its mesh in the camera's frame: root holds pix3d.json and the folders img, mask, model.

    One object is annotated in each photograph. Items have boxes, labels, masks (`masks=True`), `camera`, whose world is
    the camera's own frame, and `mesh` there, one member: rot_mat and trans_mat are applied. Focal lengths are in
    millimetres on a sensor 32 wide; the principal point is the middle. split: "all", or a name of `fractions`, for no
    division is published with it. keep: only these categories, numbered in the order given. voxels: items have the
    model's solid grid (D, H, W) = (z, y, x) of the file `voxel`, in the model's own axes. The file is checked when the
    dataset is made, pictures and models when they are read (all at once: `check`); on_error as in `VOCDetection`.
    Source: Sun et al., CVPR 2018 (arXiv:1804.04610). Differs: Mesh R-CNN leaves out img/table/1749.jpg and
    img/table/0045.png when it scores.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, keep: Sequence[str] | None = None, masks: bool = True,
        voxels: bool = False, max_side: int | None = None, fractions: Mapping[str, float] | None = None, seed: int = 0,
        on_error: OnError = "raise",
    ):  # fmt: skip
        self.root, self.path = Path(root), Path(root) / "pix3d.json"
        categories = PIX3D_CATEGORIES if keep is None else tuple(keep)
        if not categories or len(set(categories)) < len(categories) or not set(categories) <= set(PIX3D_CATEGORIES):
            raise ValueError(f"keep must be different categories of {PIX3D_CATEGORIES}, got {categories}")
        try:
            entries = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise FileError(f"{self.path}: not JSON, or cut short: {error}") from error
        if not isinstance(entries, list):
            raise FileError(f"{self.path}: must be a list, got {type(entries).__name__}")
        self.masks, self.voxels = masks, voxels
        sound: list[dict[str, Any]] = []
        problems: list[Problem] = []
        seen: set[str] = set()
        for place, entry in enumerate(entries):
            name = entry.get("img", f"entry {place}") if isinstance(entry, dict) else f"entry {place}"
            reason = _entry_fault(entry, self.root, voxels)
            if not reason and name in seen:
                reason = "the image comes twice"
            seen.add(name)
            if reason:
                problems.append(Problem(name, str(self.path), reason, True))
            elif entry["category"] in categories:
                sound.append(entry)
        whole = fractions is None
        _, chosen = division(split, ["all"], None if whole else "all", fractions, seed)
        self._entries = [sound[place] for place in chosen(len(sound))]
        settle(problems, on_error, self.path)
        if not self._entries:
            raise FileError(f"{self.path}: split {split!r} has no images")
        super().__init__([entry["img"] for entry in self._entries], categories, max_side)
        self.problems = problems

    def _picture(self, index: int) -> Path:
        return safe_join(self.root, self._entries[index]["img"])

    def _size(self, index: int) -> tuple[int, int]:
        return _size(self._entries[index])

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        entry = self._entries[index]
        boxes = clipped(np.array([entry["bbox"]], dtype=np.float64), size)
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.tensor([self.categories.index(entry["category"]) + 1]),
            "camera": _camera(entry, size),
            "mesh": self._mesh(entry),
        }
        if self.masks:
            path = safe_join(self.root, entry["mask"])
            masks = read_image(path, size, mode="L")[None] > 127
            for fault in mask_faults(masks, boxes):
                raise FileError(f"{path}: {fault.reason}")
            target["masks"] = torch.from_numpy(masks)
        if self.voxels:
            target["voxels"] = _read_voxels(safe_join(self.root, entry["voxel"]))
        return target

    def _mesh(self, entry: Mapping[str, Any]) -> Meshes:
        model = load_mesh(safe_join(self.root, entry["model"]))
        rotation, shift = np.array(entry["rot_mat"], dtype=float), np.array(entry["trans_mat"], dtype=float)
        turn = torch.from_numpy(TURN @ rotation)
        verts = model.verts_packed().double() @ turn.mT + torch.from_numpy(TURN @ shift)
        if float(verts[:, 2].min()) <= 0:
            raise FileError(f"{self.path}: {entry['img']}: the model reaches behind the camera")
        return Meshes([verts.float()], [model.faces_packed()])


def _size(entry: Mapping[str, Any]) -> tuple[int, int]:
    width, height = entry["img_size"]
    return int(height), int(width)


def _entry_fault(entry: Any, root: Path, voxels: bool) -> str:
    """What is wrong with an entry of the file, "" for nothing."""
    if not isinstance(entry, dict):
        return f"must be an object, got {type(entry).__name__}"
    missing = [key for key in (*NEEDED, *(["voxel"] if voxels else [])) if key not in entry]
    if missing:
        return f"has no {missing}"
    if entry["category"] not in PIX3D_CATEGORIES:
        return f"category {entry['category']!r} is unknown; Pix3D has {PIX3D_CATEGORIES}"
    try:
        box, size = np.array([entry["bbox"]], dtype=np.float64), _size(entry)
        rotation, shift = (np.array(entry[key], dtype=np.float64) for key in ("rot_mat", "trans_mat"))
        focal = float(entry["focal_length"])
    except (TypeError, ValueError) as error:
        return f"has a number that is none: {error}"
    if box.shape != (1, 4) or rotation.shape != (3, 3) or shift.shape != (3,):
        return "needs a bbox of 4 numbers, a rot_mat of 3 x 3 and a trans_mat of 3"
    faults = box_faults(box, size)
    if faults:
        return faults[0].reason
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2) or np.linalg.det(rotation) < 0:
        return f"rot_mat must be a rotation, got {rotation.round(3).tolist()}"
    if not (math.isfinite(focal) and focal > 0 and np.isfinite(shift).all()):
        return f"focal_length must be above 0 and trans_mat finite, got {focal} and {shift.tolist()}"
    for key in ("img", "mask", "model", *(["voxel"] if voxels else [])):
        if not safe_join(root, entry[key]).is_file():
            return f"{root / entry[key]} does not exist"
    return ""


def _camera(entry: Mapping[str, Any], size: tuple[int, int]) -> Camera:
    height, width = size
    focal = float(entry["focal_length"]) * width / SENSOR
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float32)
    return Camera(torch.eye(3), torch.zeros(3), intrinsics, size)


def _read_voxels(path: Path) -> torch.Tensor:
    """The grid "voxel" of a MATLAB file, (x, y, z) there."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        grid = np.asarray(loadmat(path)["voxel"])
    except FileNotFoundError:
        raise
    except (KeyError, ValueError, NotImplementedError, OSError, MatReadError) as error:
        raise FileError(f"{path}: cannot read 'voxel': {error}") from error
    if grid.ndim != 3:
        raise FileError(f"{path}: 'voxel' must have three axes, got {grid.shape}")
    return torch.from_numpy(np.ascontiguousarray(grid.transpose(2, 1, 0) > 0))
