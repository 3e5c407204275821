"""A class for every pixel: fully convolutional and U-shaped heads on a backbone's maps.

Sources: Long et al. 2015, FCN (arXiv:1411.4038); Ronneberger et al. 2015, U-Net (arXiv:1505.04597); Kirillov et al.
2019, Panoptic Feature Pyramid Networks (arXiv:1901.02446), section 3.1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.decoder import SkipDecoder

VOID = 255  # of class maps: nothing is asked here


class SemanticHead(nn.Module, ABC):
    """Maps (B, C_i, H_i, W_i), fine to coarse, to a logit of each of `classes` for every pixel."""

    classes: int

    @abstractmethod
    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Float[Tensor, "B K H W"]:
        """Logits at the size (height, width) of the pictures."""


class FCNHead(SemanticHead):
    """A 3x3 and a 1x1 convolution on one map, then bilinear interpolation to the picture's size.

    level: which map. hidden: channels between, a quarter of the map's when None. Parameter names are torchvision's.
    Differs: the last layer starts small, so that the first loss is log K.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, *, level: int = -1, hidden: int | None = None, dropout: float = 0.1
    ):
        super().__init__()
        _check_classes(classes)
        self.classes, self.level = classes, level
        inputs = channels[level]
        hidden = max(inputs // 4, 1) if hidden is None else hidden
        # Numbered as published, without a name between.
        self.add_module("0", nn.Conv2d(inputs, hidden, 3, padding=1, bias=False))
        self.add_module("1", nn.BatchNorm2d(hidden))
        self.add_module("2", nn.ReLU())
        self.add_module("3", nn.Dropout(dropout))
        self.add_module("4", _last(hidden, classes))

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Float[Tensor, "B K H W"]:
        x = features[self.level]
        for layer in self.children():
            x = layer(x)
        return F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False)


class UNetHead(SemanticHead):
    """The backbone as the way down, a `SkipDecoder` as the way up, a 1x1 convolution.

    upsampling: a name of `layers.UPSAMPLINGS`. width: channels at the picture's size.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], classes: int, *, upsampling: str = "bilinear",
        width: int = 32,
    ):  # fmt: skip
        super().__init__()
        _check_classes(classes)
        self.classes = classes
        self.decoder = SkipDecoder(channels, strides, width=width, name=upsampling)
        self.last = _last(width, classes)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Float[Tensor, "B K H W"]:
        return self.last(self.decoder(list(features), size)).float()


class PyramidHead(SemanticHead):
    """Every level of a pyramid brought to the finest one's scale, summed, classified, interpolated to the picture.

    channels, strides: the pyramid's, each stride twice the one before. levels: how many of the finest are used, all
    when None. A level takes as many steps of convolution (3x3, group normalization, ReLU) and doubling as it is away,
    the finest one convolution.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], classes: int, *, width: int = 128,
        levels: int | None = None, groups: int = 8,
    ):  # fmt: skip
        super().__init__()
        _check_classes(classes)
        self.classes = classes
        self.levels = len(strides) if levels is None else levels
        if not 1 <= self.levels <= len(strides):
            raise ValueError(f"levels must be from 1 to {len(strides)}, the backbone's maps, got {levels}")
        used = list(strides)[: self.levels]
        if any(b != 2 * a for a, b in pairwise(used)):
            raise ValueError(f"each stride must be twice the one before, got {used}")
        self.steps = nn.ModuleList()
        for level in range(self.levels):
            steps, inputs = nn.ModuleList(), channels[level]
            for _ in range(max(level, 1)):
                steps.append(
                    nn.Sequential(
                        nn.Conv2d(inputs, width, 3, padding=1, bias=False),
                        nn.GroupNorm(math.gcd(groups, width), width),
                        nn.ReLU(),
                    )
                )
                inputs = width
            self.steps.append(steps)
        self.last = _last(width, classes)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Float[Tensor, "B K H W"]:
        finest = features[0].shape[-2:]
        total: Any = 0
        for level, (steps, x) in enumerate(zip(self.steps, features)):
            for step in steps:  # type: ignore[attr-defined]
                x = step(x)
                if level:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + x[..., : finest[0], : finest[1]]  # a coarser map may be a cell too large
        return F.interpolate(self.last(total).float(), size=size, mode="bilinear", align_corners=False)


def _last(inputs: int, classes: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


def _check_classes(classes: int) -> None:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")


def pixel_cross_entropy(
    logits: Float[Tensor, "B K H W"], target: Int[Tensor, "B H W"], void: int = VOID
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the pixels that are not `void`; 0, with a graph, where all are."""
    asked = (target != void).sum().clamp(min=1)
    return F.cross_entropy(logits, target, ignore_index=void, reduction="sum") / asked


def check_semantic(target: Tensor, size: tuple[int, int], classes: int, image: str, void: int = VOID) -> None:
    """Raise a ValueError naming the image for a class map that no model of `classes` classes can learn."""
    if tuple(target.shape) != tuple(size):
        raise ValueError(f"image {image!r}: semantic must be {tuple(size)} as the image, got {tuple(target.shape)}")
    wrong = (target != void) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"image {image!r}: class {int(target[row, column])} at row {row}, column {column}, but classes are "
            f"numbered from 0 to {classes - 1}, and {void} is not asked"
        )
