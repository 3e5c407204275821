"""Photographs with what is annotated in them: what the readers of detection and segmentation data share.

Items are {"image": (3, H, W) in [0, 1], "id": where it comes from} and, as far as the data set has them,

    boxes (N, 4)   xyxy pixels, edges of pixels: a box around one pixel is (x, y, x + 1, y + 1)
    labels (N,)    1 to the number of `categories`
    masks          (N, H, W) bool          areas (N,)  of the annotation, in pixels
    crowd (N,)     a group as one object   difficult (N,)  not to be asked for
    semantic       (H, W) class by pixel, 255 where nothing is asked

An image without objects has N = 0. What is annotated is checked when the dataset is made, before any training: every
fault is a `Problem` that names the image and the box. Images are read as RGB when they are asked for: gray is repeated
in three channels, palettes and CMYK are converted, alpha is left out, 16 bits a channel are an error.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import interpolate

from vision3dgen.checks import check_choice
from vision3dgen.datasets.images import Selection
from vision3dgen.datasets.shapenet import Problem
from vision3dgen.files import FileError
from vision3dgen.io import read_image

OnError = Literal["raise", "skip"]
EDGE = 1.0  # pixels by which annotations leave the picture through rounding; they are cut off
SLACK = 2.0  # pixels between an annotated box and the box around its mask
VOID = 255  # of class maps: nothing is asked here
PIXELS = ("masks", "semantic", "panoptic")


class Photographs(torch.utils.data.Dataset[dict[str, Any]], ABC):
    """Photographs and their annotations; `ids` name the items, `categories` the labels from 1.

    max_side: the longer side to which larger photographs are reduced, with all that is annotated. `problems` are the
    annotations and images left out by on_error="skip".
    """

    categories: tuple[str, ...]

    def __init__(self, ids: Sequence[str], categories: Sequence[str], max_side: int | None):
        if max_side is not None and max_side < 1:
            raise ValueError(f"max_side must be at least 1 pixel or None, got {max_side}")
        self.ids, self.categories, self.max_side = list(ids), tuple(categories), max_side
        self.problems: list[Problem] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        pixels = read_image(self._picture(index), self._size(index), mode="RGB")
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        item = {"image": image, **self._target(index, (image.shape[1], image.shape[2])), "id": self.ids[index]}
        return item if self.max_side is None else reduce(item, self.max_side)

    @abstractmethod
    def _picture(self, index: int) -> Path:
        """The file of a photograph."""

    @abstractmethod
    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """What is annotated in a photograph of this size; FileError for what does not fit."""

    def _size(self, index: int) -> tuple[int, int] | None:
        """The (H, W) that the annotation says a photograph has."""
        return None

    def check(self) -> list[Problem]:
        """Read every item once: what is missing or broken, and what was left out when the dataset was made."""
        return [*self.problems, *_faulty(range(len(self)), self.ids, self.__getitem__, self._picture)]


def _faulty(
    places: Iterable[int], ids: Sequence[str], read: Callable[[int], Any], file: Callable[[int], Path]
) -> Iterator[Problem]:
    for index in places:
        try:
            read(index)
        except (ValueError, OSError) as error:
            yield Problem(ids[index], str(file(index)), str(error), True)


def reduce(item: Mapping[str, Any], max_side: int) -> dict[str, Any]:
    """An item whose longer side is at most `max_side`: antialiased image, masks and maps by the nearest pixel."""
    height, width = item["image"].shape[1:]
    scale = max_side / max(height, width)
    if scale >= 1:
        return dict(item)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    reduced = dict(item)
    reduced["image"] = interpolate(item["image"][None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    x, y = size[1] / width, size[0] / height
    if "boxes" in item:
        reduced["boxes"] = item["boxes"] * torch.tensor([x, y, x, y])
    if "areas" in item:
        reduced["areas"] = item["areas"] * (x * y)
    if "camera" in item:
        reduced["camera"] = item["camera"].resize(size)
    for key in PIXELS:
        if key in item:
            reduced[key] = nearest(item[key], size)
    return reduced


def nearest(maps: Shaped[Tensor, "*N H W"], size: tuple[int, int]) -> Shaped[Tensor, "*N h w"]:
    """Maps at another size; each pixel is the one that holds its center."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1) for new, old in zip(size, maps.shape[-2:])
    )
    return maps[..., rows[:, None], columns]


# ------------------------------------------------------------------------------------------------ checks of objects


class Fault(NamedTuple):
    """What is wrong with an object, by its place among those of its image."""

    row: int
    reason: str


def box_faults(boxes: Float[np.ndarray, "N 4"], size: tuple[int, int]) -> list[Fault]:
    """Boxes (xyxy) that are not finite, inverted, without area, or not inside a picture (H, W), up to `EDGE` pixels."""
    faults = []
    height, width = size
    for index in np.flatnonzero(_bad(boxes, size)):
        x1, y1, x2, y2 = boxes[index].tolist()
        if not np.isfinite(boxes[index]).all():
            reason = "is not finite"
        elif x2 < x1 or y2 < y1:
            reason = "is inverted: x2 must be above x1 and y2 above y1"
        elif x2 == x1 or y2 == y1:
            reason = "is degenerate: it has no area"
        else:
            reason = f"is not inside the picture of {height} x {width} (height x width)"
        faults.append(Fault(int(index), f"the box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) {reason}"))
    return faults


def _bad(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    low, high = boxes[:, :2], boxes[:, 2:]
    limit = np.array(size[::-1])
    fine = (high > low) & (low >= -EDGE) & (high <= limit + EDGE) & (high > 0) & (low < limit)  # False for NaN
    return np.asarray(~fine.all(1))


def clipped(boxes: Float[np.ndarray, "N 4"], size: tuple[int, int]) -> Float[np.ndarray, "N 4"]:
    """Boxes cut off at the borders of the picture."""
    return boxes.clip(0, np.array([size[1], size[0]] * 2))


def mask_faults(masks: Bool[np.ndarray, "N H W"], boxes: Float[np.ndarray, "N 4"]) -> list[Fault]:
    """Masks without a pixel, and those whose box differs from the annotated one by more than `SLACK` pixels."""
    faults = []
    for index, (mask, box) in enumerate(zip(masks, boxes)):
        around = mask_box(mask)
        if around is None:
            faults.append(Fault(index, "its mask has no pixel"))
        elif np.abs(around - box).max() > SLACK:
            faults.append(Fault(index, f"its mask lies in {_plain(around)}, its box is {_plain(box)}"))
    return faults


def mask_box(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "4"] | None:
    """The tightest box around a mask, None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def _plain(box: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box.tolist()) + ")"


def settle(problems: Sequence[Problem], on_error: OnError, source: Path | str) -> list[Problem]:
    """Raise FileError with the first problem unless they are to be skipped; returns them."""
    check_choice("on_error", on_error, ("raise", "skip"))
    if problems and on_error == "raise":
        first = problems[0]
        more = f" ({len(problems) - 1} more; on_error='skip' lists and leaves them out)" if len(problems) > 1 else ""
        raise FileError(f"{source}: {first.item}: {first.reason}{more}")
    return list(problems)


def division(
    split: str, parts: Sequence[str], part: str | None, fractions: Mapping[str, float] | None, seed: int
) -> tuple[str, Callable[[int], list[int]]]:
    """The published part that a split is cut from, and which of so many items of it the split has."""
    selection = Selection(part, fractions, None, seed)
    chosen = selection.part_of(split, parts)
    return chosen, lambda count: selection.indices(split, count) if count else []


def names_in(path: Path) -> list[str]:
    """The first word of each line of a list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        there = sorted(entry.name for entry in os.scandir(path.parent)) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: no such file; {path.parent} has {there[:12]}") from None
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise FileError(f"{path}: the list is empty")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise FileError(f"{path}: {twice!r} is listed twice")
    return names
