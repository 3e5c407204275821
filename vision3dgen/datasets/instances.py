"""Prepared scenes as data for detectors: boxes, masks and meshes of objects, classes and segments of all pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.datasets.manifest import SPLITS, members_of
from vision3dgen.datasets.photographs import Photographs, box_faults, mask_faults
from vision3dgen.datasets.procedural import CATEGORIES
from vision3dgen.datasets.scenes import DEPTH_UNITS, STUFF, camera_of
from vision3dgen.files import FileError, read_jsonl, safe_join
from vision3dgen.io import load_npz, read_depth_png, read_image
from vision3dgen.structures import Meshes

FIELDS = ("masks", "semantic", "panoptic", "depth", "camera", "mesh")


class SceneInstances(Photographs):
    """Scenes of `prepare scenes`, best those with `objects`: what is in each, and where exactly.

    Things are numbered 1 to 13 as in `categories`, stuff (`scenes.STUFF`) goes on from 14, in class maps too, where
    every pixel has a class and 0 is nothing. split: "train", "val", "test" or "all". fields: which of masks (N, H, W),
    semantic (H, W), panoptic (H, W) of segment numbers from 1 with `segment_labels` (S,), things first, depth
    (1, H, W), camera, and mesh (a member for each box, in the camera's frame) to read beside image, boxes, labels, id.

    Raises ValueError or OSError naming file, line and object, for all but the pixels before any item is read.
    """

    things = tuple(CATEGORIES.values())
    classes = ("", *things, *STUFF)  # of class maps

    def __init__(
        self, root: str, split: str, *, fields: Sequence[str] = ("masks",), file: str = "scenes.jsonl",
        manifest: str | None = None, max_side: int | None = None,
    ):  # fmt: skip
        check_choice("split", split, (*SPLITS, "all"))
        for name in fields:
            check_choice("field", name, FIELDS)
        self.root, self.file, self.fields = Path(root), Path(root) / file, tuple(fields)
        if not self.file.is_file():
            raise FileError(f"{self.file}: no such file; make one with `vision3dgen prepare scenes {root} --objects 5`")
        members = members_of(self.root, split, manifest)
        lines = read_jsonl(self.file)
        seen: set[str] = set()
        for number, line in enumerate(lines, start=1):
            self._check(f"{self.file}, line {number}", line)
            if line["id"] in seen:
                raise FileError(f"{self.file}, line {number}: the id {line['id']!r} is that of another line")
            seen.add(line["id"])
        self.lines = [line for line in lines if members is None or line["id"] in members]
        if not self.lines:
            raise FileError(f"{self.file}: no line is in the split {split!r}")
        super().__init__([line["id"] for line in self.lines], self.things, max_side)
        self._shapes: dict[str, tuple[Tensor, Tensor]] = {}

    def _check(self, where: str, line: dict[str, Any]) -> None:
        """Raise FileError for a line that cannot be meant."""
        keys = ("id", "image", "mask", *(("depth",) if "depth" in self.fields else ()))
        for key in keys:
            if not isinstance(line.get(key), str):
                raise FileError(f"{where}: {key!r} must be a string, got {line.get(key)!r}")
        for key in keys[1:]:
            if not safe_join(self.root, line[key]).is_file():
                raise FileError(f"{where}: there is no {key} {safe_join(self.root, line[key])}")
        objects = line.get("objects")
        if not isinstance(objects, list):
            raise FileError(f"{where}: 'objects' must be a list, got {objects!r}")
        try:
            size = camera_of(line).image_size
            boxes = np.array([one["box"] for one in objects], dtype=np.float64).reshape(-1, 4)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{where}: needs a camera, and a box (x0, y0, x1, y1) of each object: {error!r}") from error
        faults = box_faults(boxes, size)
        if faults:
            raise FileError(f"{where}: image {line['id']!r}, object {faults[0].index}: {faults[0].reason}")
        for index, one in enumerate(objects):
            name = f"{where}: image {line['id']!r}, object {index}"
            if one.get("category") not in self.things:
                known = f"it must be one of {sorted(self.things)}"
                raise FileError(f"{name}: unknown category {one.get('category')!r}; {known}")
            if "mesh" not in self.fields:
                continue
            if "mesh" not in one or np.shape(one.get("pose")) != (3, 4):
                raise FileError(f"{name} has no mesh and pose, which scenes have that are prepared with `objects`")
            if not safe_join(self.root, one["mesh"]).is_file():
                raise FileError(f"{name}: there is no mesh {safe_join(self.root, one['mesh'])}")

    def _picture(self, index: int) -> Path:
        return safe_join(self.root, self.lines[index]["image"])

    def _size(self, index: int) -> tuple[int, int]:
        return camera_of(self.lines[index]).image_size

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        line = self.lines[index]
        objects = line["objects"]
        boxes = torch.tensor([one["box"] for one in objects], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([self.things.index(one["category"]) + 1 for one in objects], dtype=torch.int64)
        item: dict[str, Any] = {"boxes": boxes, "labels": labels}
        if {"masks", "semantic", "panoptic"} & set(self.fields):
            item |= self._maps(index, size, boxes, labels)
        if "depth" in self.fields:
            depth = read_depth_png(safe_join(self.root, line["depth"]), units_per_metre=DEPTH_UNITS)
            item["depth"] = torch.from_numpy(depth)[None].float()
        if "camera" in self.fields:
            item["camera"] = camera_of(line).to(torch.float32)
        if "mesh" in self.fields:
            item["mesh"] = self._mesh(index)
        return item

    def _maps(self, index: int, size: tuple[int, int], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of masks, semantic, panoptic and segment_labels what is asked for."""
        line = self.lines[index]
        path = safe_join(self.root, line["mask"])
        numbers = torch.from_numpy(read_image(path, size, mode="L")).long()
        if int(numbers.max()) > len(labels):
            raise FileError(f"{path}: object {int(numbers.max())} of {len(labels)} in {self.file}")
        masks = numbers == torch.arange(1, len(labels) + 1)[:, None, None]
        faults = mask_faults(masks.numpy(), boxes.numpy())
        if faults:
            raise FileError(f"{path}: image {line['id']!r}, object {faults[0].index}: {faults[0].reason}")
        stuff = torch.ones_like(numbers)  # the floor
        if "stuff" in line:
            path = safe_join(self.root, line["stuff"])
            stuff = torch.from_numpy(read_image(path, size, mode="L")).long()
            stray = (stuff > len(STUFF)) | ((stuff > 0) == (numbers > 0))
            if bool(stray.any()):
                row, column = stray.nonzero()[0].tolist()
                raise FileError(
                    f"{path}: stuff {int(stuff[row, column])} at row {row}, column {column}, where the mask has "
                    f"object {int(numbers[row, column])}; it must be 1 to {len(STUFF)}, or 0 on objects"
                )
        classes = torch.cat([torch.zeros(1, dtype=torch.int64), labels])[numbers]
        semantic = torch.where(numbers > 0, classes, len(self.things) + stuff)
        found: dict[str, Tensor] = {}
        if "masks" in self.fields:
            found["masks"] = masks
        if "semantic" in self.fields:
            found["semantic"] = semantic
        if "panoptic" in self.fields:
            seen = stuff[numbers == 0].unique()
            place = torch.zeros(len(STUFF) + 1, dtype=torch.int64)
            place[seen] = len(labels) + torch.arange(1, len(seen) + 1)
            found["panoptic"] = torch.where(numbers > 0, numbers, place[stuff])
            found["segment_labels"] = torch.cat([labels, len(self.things) + seen])
        return found

    def _mesh(self, index: int) -> Meshes:
        """The objects in the frame of the camera."""
        camera = camera_of(self.lines[index])
        verts, faces = [], []
        for one in self.lines[index]["objects"]:
            shape, triangles = self._shape(one["mesh"])
            pose = torch.tensor(one["pose"], dtype=torch.float64)
            verts.append(camera.world_to_camera(shape @ pose[:, :3].T + pose[:, 3]).float())
            faces.append(triangles)
        return Meshes(verts, faces)

    def _shape(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._shapes:
            arrays = load_npz(safe_join(self.root, name), "vertices", "faces")
            self._shapes[name] = torch.from_numpy(arrays["vertices"]).double(), torch.from_numpy(arrays["faces"]).long()
        return self._shapes[name]
