"""Regions of a pyramid at one size, each from the level that shows it at about the same number of cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.ops import box_area, roi_align, roi_pool
from vision3dgen.ops.rois import as_regions

CANONICAL = (224.0, 4)  # a region as large as ImageNet's pictures is read from the fourth level, as ImageNet's are


@dataclass(frozen=True)
class Pooling:
    """RoIAlign ("align") or RoIPool ("max") of regions to `resolution` x `resolution` cells.

    samples: along each side of a bin, -1 for one a pixel. aligned: as in `ops.roi_align`; torchvision's detectors are
    not. coarsest: strides beyond are no source of regions: those of a pyramid's extra level, which is for the RPN.
    A region of w x h pixels comes from level floor(4 + log2(sqrt(w h) / 224)), the level of stride 2^k being the k-th;
    from the nearest where there is none. Source: Lin et al. 2017 (arXiv:1612.03144), equation 1.
    """

    resolution: int = 7
    samples: int = 2
    aligned: bool = False
    method: Literal["align", "max"] = "align"
    coarsest: int = 32

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("align", "max"))
        if self.resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {self.resolution}")

    def levels(self, strides: Sequence[int]) -> list[int]:
        """The maps that regions are read from."""
        return [index for index, stride in enumerate(strides) if stride <= self.coarsest] or [0]

    def level_of(self, boxes: Float[Tensor, "R 4"], strides: Sequence[int]) -> Int[Tensor, " R"]:
        """Which of `levels` each region is read from."""
        first = torch.tensor(float(strides[0])).log2().round()
        size, level = CANONICAL
        wanted = (level + (box_area(boxes).sqrt() / size).log2() + 1e-6).floor() - first
        return wanted.clamp(0, len(self.levels(strides)) - 1).long()

    def __call__(
        self, maps: Sequence[Tensor], boxes: Sequence[Float[Tensor, "_ 4"]], strides: Sequence[int]
    ) -> Float[Tensor, "N C P P"]:
        """The regions of all images, one image after the other."""
        used = self.levels(strides)
        if len(used) == 1:
            return self._pool(maps[used[0]], as_regions(boxes), strides[used[0]])
        regions = as_regions(boxes)
        level = self.level_of(regions[:, 1:], [strides[index] for index in used])
        pooled = [self._pool(maps[index], regions[level == index], strides[index]) for index in used]
        order = torch.cat([(level == index).nonzero()[:, 0] for index in used])
        return torch.cat(pooled)[order.argsort()]

    def _pool(self, feature: Tensor, regions: Float[Tensor, "R 5"], stride: int) -> Float[Tensor, "R C P P"]:
        regions = regions.to(feature.dtype)
        if self.method == "max":
            return roi_pool(feature, regions, self.resolution, 1 / stride)
        return roi_align(feature, regions, self.resolution, 1 / stride, self.samples, self.aligned)
