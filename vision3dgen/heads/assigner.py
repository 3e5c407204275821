"""Which true object each anchor or proposal is to find, by overlap; and which of them a loss looks at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.ops import box_iou

BACKGROUND, IGNORED = -1, -2  # in the place of an object's number
PAIRS = 1 << 22  # overlaps held at once


@dataclass(frozen=True)
class Assigner:
    """The object that a box overlaps most: from IoU `positive` on; below `negative` it is background, between ignored.

    nearest: the boxes that overlap an object most of all are its own too, whatever their IoU, so that no object is
    without. Source: Ren et al. 2015 (arXiv:1506.01497), section 3.1.2.
    Differs: an object that no box touches gets none; torchvision gives it every box that touches nothing.
    """

    positive: float = 0.5
    negative: float = 0.5
    nearest: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.negative <= self.positive <= 1:
            raise ValueError(f"needs 0 < negative <= positive <= 1, got {self.negative} and {self.positive}")

    @torch.no_grad()
    def __call__(self, boxes: Float[Tensor, "N 4"], objects: Float[Tensor, "M 4"]) -> Int[Tensor, " N"]:
        """The number of each box's object, BACKGROUND or IGNORED."""
        if not len(objects):
            return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
        parts = boxes.split(max(1, PAIRS // len(objects)))
        if not parts:
            return torch.zeros(0, dtype=torch.int64, device=boxes.device)
        held = [box_iou(parts[0], objects)]  # all of them, as a rule; of many only the first part's are kept
        best = [_overlaps(parts, held, objects, number).max(1) for number in range(len(parts))]
        overlap, found = torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])
        assigned = found.clone()
        assigned[overlap < self.positive] = IGNORED
        assigned[overlap < self.negative] = BACKGROUND
        if self.nearest:
            rows = range(len(parts))
            highest = torch.stack([_overlaps(parts, held, objects, row).amax(0) for row in rows]).amax(0)  # (M,)
            highest = highest.where(highest > 0, 2)
            own = torch.cat([(_overlaps(parts, held, objects, row) == highest).any(1) for row in rows])
            assigned[own] = found[own]
        return assigned


def _overlaps(parts: Sequence[Tensor], held: Sequence[Tensor], objects: Tensor, number: int) -> Float[Tensor, "N M"]:
    return held[number] if number < len(held) else box_iou(parts[number], objects)


class Sampled(NamedTuple):
    """Indices of the boxes that a loss looks at."""

    positive: Int[Tensor, " P"]
    negative: Int[Tensor, " Q"]

    @property
    def all(self) -> Int[Tensor, " S"]:
        return torch.cat([self.positive, self.negative])


@dataclass(frozen=True)
class BalancedSampler:
    """At most `count` boxes of an image, at most the share `positive` of them with an object, drawn at random."""

    count: int = 512
    positive: float = 0.25

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.positive <= 1:
            raise ValueError(f"needs count >= 1 and 0 < positive <= 1, got {self.count} and {self.positive}")

    def __call__(self, assigned: Int[Tensor, " N"], generator: torch.Generator | None = None) -> Sampled:
        """What is drawn of the assigned boxes; background fills what objects leave."""
        positive = _draw(assigned >= 0, int(self.count * self.positive), generator)
        return Sampled(positive, _draw(assigned == BACKGROUND, self.count - len(positive), generator))


def _draw(among: Tensor, count: int, generator: torch.Generator | None) -> Int[Tensor, " S"]:
    rows = among.nonzero()[:, 0]
    order = torch.randperm(len(rows), generator=generator)[:count]
    return rows[order.to(rows.device)]


def counts_of(parts: Sequence[Tensor]) -> list[int]:
    """How many rows each image has."""
    return [len(part) for part in parts]
