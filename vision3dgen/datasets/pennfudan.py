"""Pedestrians in street scenes, each with its mask: the Penn-Fudan database."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision3dgen.datasets.photographs import OnError, Photographs, division, settle
from vision3dgen.datasets.shapenet import Problem
from vision3dgen.files import FileError
from vision3dgen.io import read_index_png
from vision3dgen.ops.rle import Rle, decode_rle, encode_rle, rle_boxes

DIVISION = {"train": 45 / 57, "test": 12 / 57}  # nobody published one


class PennFudan(Photographs):
    """Pedestrians with boxes and masks: root holds NAME.png beside NAME_mask.png, or the published PNGImages, PedMasks.

    A mask's pixels are the number of the pedestrian, from 1, and 0 elsewhere. split: "all", or a name of `fractions`,
    by which all are divided at random by `seed`; {train: 45/57, test: 12/57} by default. semantic: items have a
    class map too, 1 where there is a pedestrian. Masks are read when the dataset is made; on_error: "raise" stops at
    what is missing or broken, "skip" leaves those images out, see `problems`. For the items see `photographs`.
    Source: Wang, Shi, Song and Shen, "Object detection combining recognition and segmentation", ACCV 2007.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, semantic: bool = False, max_side: int | None = None,
        fractions: Mapping[str, float] | None = None, seed: int = 0, on_error: OnError = "raise",
    ):  # fmt: skip
        root = Path(root)
        published = (root / "PNGImages").is_dir()
        self.images, self.masks = (root / "PNGImages", root / "PedMasks") if published else (root, root)
        if not self.images.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; it should hold NAME.png and NAME_mask.png")
        found = sorted(p.stem for p in self.images.glob("*.png") if not p.stem.endswith("_mask"))
        if not found:
            raise FileError(f"{self.images}: no picture NAME.png in it")
        whole = split == "all" and "all" not in (fractions or {})
        _, chosen = division(split, ["all"], None if whole else "all", None if whole else fractions or DIVISION, seed)
        names = [found[place] for place in chosen(len(found))]
        self.semantic = semantic
        self._objects: dict[str, list[Rle]] = {}
        problems = []
        for name in names:
            try:
                self._objects[name] = self._read(name)
            except (ValueError, OSError) as error:
                problems.append(Problem(name, str(self._mask(name)), str(error), True))
        super().__init__(list(self._objects), ["pedestrian"], max_side)
        self.problems = settle(problems, on_error, root)
        if not self.ids:
            raise FileError(f"{root}: split {split!r} has no items")

    def _mask(self, name: str) -> Path:
        return self.masks / f"{name}_mask.png"

    def _read(self, name: str) -> list[Rle]:
        numbers = read_index_png(self._mask(name))
        last = int(numbers.max(initial=0))
        missing = sorted(set(range(1, last + 1)) - set(np.unique(numbers).tolist()))
        if missing:
            raise FileError(f"{self._mask(name)}: pedestrian {missing[0]} of {last} has no pixel")
        return encode_rle(torch.from_numpy(numbers[None] == np.arange(1, last + 1)[:, None, None]))

    def _picture(self, index: int) -> Path:
        return self.images / f"{self.ids[index]}.png"

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        rles = self._objects[self.ids[index]]
        try:
            masks = decode_rle(rles, size)
        except ValueError as error:
            raise FileError(
                f"{self._mask(self.ids[index])}: {error}, the size of {self._picture(index).name}"
            ) from error
        target = {
            "boxes": torch.from_numpy(rle_boxes(rles)).float(),
            "labels": torch.ones(len(rles), dtype=torch.int64),
            "masks": masks,
        }
        return target | ({"semantic": masks.any(0).long()} if self.semantic else {})
