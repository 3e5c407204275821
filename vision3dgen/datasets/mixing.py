"""Regularization that works on whole batches of labelled images: cutout, mixup, cutmix.

Each object takes a batch and returns a new one with the same keys. Labels, class numbers (B,) or probabilities (B, K),
come back as probabilities where images were mixed; torch's `cross_entropy` takes either. Draws are made on the CPU from
`generator`, else from torch's global one, which the trainer seeds for each batch when a `Mixed` collates it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot


@runtime_checkable
class Mixing(Protocol):
    """What the classes of this module are."""

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Cutout:
    """A square of `size` pixels filled with `fill` in each image, its middle uniform over the pixels.

    The square is cut off at the border, as in the paper, so that less than the whole of it may be hidden.
    Source: DeVries and Taylor 2017.
    """

    size: int
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        images: Tensor = batch["image"]
        count, _, height, width = images.shape
        hidden = []
        for side in (height, width):
            start = torch.randint(side, (count, 1), generator=generator) - self.size // 2
            place = torch.arange(side)
            hidden.append((place >= start) & (place < start + self.size))
        square = (hidden[0][:, None, :, None] & hidden[1][:, None, None, :]).to(images.device)
        return {**batch, "image": images.masked_fill(square, self.fill)}


@dataclass(frozen=True)
class Mixup:
    """x = lambda x_i + (1 - lambda) x_j, labels alike; j is a permutation of the batch, lambda ~ Beta(alpha, alpha).

    One lambda is drawn for each batch. Source: Zhang et al. 2018, equation 1.
    """

    classes: int
    alpha: float = 0.2
    label: str = "label"

    def __post_init__(self) -> None:
        _check(self.classes, self.alpha)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        images, labels = batch["image"], _soft(batch[self.label], self.classes)
        share = _beta(self.alpha, generator)
        other = torch.randperm(len(images), generator=generator).to(images.device)
        return {
            **batch,
            "image": share * images + (1 - share) * images[other],
            self.label: share * labels + (1 - share) * labels[other],
        }


@dataclass(frozen=True)
class CutMix:
    """A window of each image is replaced by that of another; labels are mixed by the share of pixels each image has.

    The window has the area (1 - lambda) H W for lambda ~ Beta(alpha, alpha) before it is cut off at the border; the
    labels' lambda is counted after that, so it is exact. One window for each batch. Source: Yun et al. 2019, section 3.
    """

    classes: int
    alpha: float = 1.0
    label: str = "label"

    def __post_init__(self) -> None:
        _check(self.classes, self.alpha)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        images, labels = batch["image"], _soft(batch[self.label], self.classes)
        height, width = images.shape[-2:]
        root = (1 - _beta(self.alpha, generator)) ** 0.5
        sides = []
        for side in (height, width):
            length = int(side * root)
            start = int(torch.randint(side, (), generator=generator)) - length // 2
            sides.append((max(start, 0), min(start + length, side)))
        (top, bottom), (left, right) = sides
        other = torch.randperm(len(images), generator=generator).to(images.device)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[other][..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
        return {**batch, "image": mixed, self.label: share * labels + (1 - share) * labels[other]}


@dataclass(frozen=True)
class OneOf:
    """One of several mixings for each batch, each as likely as another."""

    choices: Sequence[Mixing]

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        return self.choices[int(torch.randint(len(self.choices), (), generator=generator))](batch, generator)


@dataclass(frozen=True)
class Mixed:
    """A collate function for `engine.Data` that mixes the batches of another."""

    collate: Callable[[list[Any]], Mapping[str, Any]]
    mixing: Mixing

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        return self.mixing(self.collate(items))


MIXINGS: dict[str, Callable[..., Mixing]] = {"cutout": Cutout, "mixup": Mixup, "cutmix": CutMix}


def _soft(labels: Tensor, classes: int) -> Float[Tensor, "B K"]:
    """Labels as probabilities."""
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != classes:
            raise ValueError(f"labels must be (B,) class numbers or (B, {classes}) probabilities, got {labels.shape}")
        return labels
    if labels.ndim != 1 or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise ValueError(f"labels must be (B,) class numbers from 0 to {classes - 1}, got {labels}")
    return one_hot(labels.long(), classes).float()


def _beta(alpha: float, generator: torch.Generator | None) -> float:
    """A draw from Beta(alpha, alpha), from two gamma variables."""
    concentration = torch.full((2,), alpha, dtype=torch.float64)
    first, second = torch._standard_gamma(concentration, generator=generator).tolist()
    return first / (first + second)


def _check(classes: int, alpha: float) -> None:
    if classes < 2 or not alpha > 0:
        raise ValueError(f"classes must be at least 2 and alpha > 0, got classes={classes}, alpha={alpha}")
