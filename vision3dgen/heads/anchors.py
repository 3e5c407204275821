"""Boxes of a few sizes and shapes around every place of every map: what a detector's transforms start from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """Anchors of each level: every size with every ratio, at every cell.

    sizes: sides in pixels, of squares with the anchors' areas, for each level; None is 8 strides, FPN's 32 to 512.
    ratios: height over width. Source: Ren et al. 2015 (arXiv:1506.01497), section 3.1.1, in torchvision's form: sides
    are rounded to even numbers, and centers are at the cells' first corners.
    """

    sizes: tuple[tuple[float, ...], ...] | None = None
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios must be above 0, at least one, got {self.ratios}")
        if self.sizes is not None and any(not level or min(level) <= 0 for level in self.sizes):
            raise ValueError(f"sizes must be above 0, at least one for each level, got {self.sizes}")

    def of_levels(self, strides: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """The sizes of each level."""
        sizes = tuple((8.0 * stride,) for stride in strides) if self.sizes is None else self.sizes
        if len(sizes) != len(strides):
            raise ValueError(f"anchor sizes are given for {len(sizes)} levels, the backbone has {len(strides)}")
        if len({len(level) for level in sizes}) > 1:
            raise ValueError(f"all levels share a network, so each must have as many sizes, got {sizes}")
        return sizes

    def cell(self, sizes: Sequence[float]) -> Float[Tensor, "A 4"]:
        """The anchors around the origin, ratio by ratio."""
        heights = torch.tensor(self.ratios).sqrt()
        areas = torch.tensor(sizes)
        width, height = ((side[:, None] * areas).flatten() for side in (1 / heights, heights))
        return (torch.stack([-width, -height, width, height], dim=1) / 2).round()

    def __call__(
        self, maps: Sequence[Tensor], image_size: tuple[int, int], strides: Sequence[int]
    ) -> list[Float[Tensor, "_ 4"]]:
        """The anchors of each map in pixels of the image (height, width), cell by cell, row by row.

        A cell's side is the image's over the map's, in whole pixels: where the map was rounded up less than the stride.
        """
        anchors = []
        for feature, sizes in zip(maps, self.of_levels(strides)):
            rows, columns = (
                torch.arange(count, device=feature.device) * (side // count)
                for count, side in zip(feature.shape[-2:], image_size)
            )
            y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
            corners = torch.stack([x, y, x, y], dim=1)[:, None] + self.cell(sizes).to(feature.device)
            anchors.append(corners.reshape(-1, 4))
        return anchors
