"""Regions of feature maps at one size, and masks of regions back at their place in the image.

`roi_align` and `roi_pool` follow torchvision.ops. Both are sums (or maxima) over bags of pixels: a bin of RoIAlign is a
weighted sum of the pixels around its sampling points, and the weights of a point, by bilinear interpolation, are those
of its column times those of its row. torch's `embedding_bag` adds the rows of an image, channels last, without holding
one value per tap; its gradient is the bag of the transposed relation. On CUDA a Triton kernel does the same.
Differs: a region that no bin can be cut from (not finite) is a ValueError; gradients go to the maps, not to the boxes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vision3dgen.checks import check_finite, check_shape
from vision3dgen.ops.backends import full_precision, import_backend, resolve_backend, triton_runs_on

OFFERED = ("torch", "torchvision")
Regions = Tensor | Sequence[Tensor]  # (R, 5) image number and box, or a list of (R_i, 4), one for each image


def as_regions(boxes: Regions) -> Float[Tensor, "R 5"]:
    """Image number and box of each region, from a list of boxes by image or from what has them already."""
    if isinstance(boxes, Tensor):
        check_shape(boxes=(boxes, "R 5"))
        return boxes
    for index, own in enumerate(boxes):
        check_shape(**{f"boxes[{index}]": (own, "R 4")})
    numbers = [own.new_full((len(own), 1), index) for index, own in enumerate(boxes)]
    return torch.cat([torch.cat(pair, dim=1) for pair in zip(numbers, boxes)])


def _checked(input: Tensor, boxes: Regions) -> Float[Tensor, "R 5"]:
    check_shape(input=(input, "B C H W"))
    if not isinstance(boxes, Tensor) and len(boxes) != len(input):
        raise ValueError(f"boxes must be a list as long as the batch of {len(input)}, got {len(boxes)}")
    if not isinstance(boxes, Tensor) and not boxes:
        return input.new_zeros(0, 5)
    regions = as_regions(boxes).detach().to(input.dtype)
    check_finite(boxes=regions)
    outside = (regions[:, 0] < 0) | (regions[:, 0] >= len(input))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"boxes[{row}] is of image {int(regions[row, 0])}, but the batch holds images 0 to {len(input) - 1}"
        )
    return regions


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"output_size must be at least 1 x 1, got {height} x {width}")
    return height, width


# ------------------------------------------------------------------------------------------------------- RoIAlign


def roi_align(
    input: Float[Tensor, "B C H W"],
    boxes: Regions,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backend: str | None = None,
) -> Float[Tensor, "R C H2 W2"]:
    """Means of bilinear samples over the bins of each region: (R, C, *output_size).

    boxes: as `Regions` says, in pixels of the image; `spatial_scale` times that are pixels of the map. sampling_ratio:
    samples along each side of a bin, -1 for one a pixel, rounded up. aligned: pixel centers are at half-integers, as
    everywhere here; without, as first published, they are at integers and a region is at least 1 wide.
    Computed in float32 or better, in the type of the map. Source: He et al. 2017 (arXiv:1703.06870), section 3.
    """
    pooled = _roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned, backend)
    return pooled.to(input.dtype)


@full_precision
def _roi_align(
    input: Tensor,
    boxes: Regions,
    output_size: int | Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    backend: str | None,
) -> Tensor:
    regions = _checked(input, boxes)
    height, width = _pair(output_size)
    if resolve_backend(backend, offered=OFFERED) == "torchvision":
        vision = import_backend("torchvision", "torchvision.ops")
        return vision.roi_align(input, regions, (height, width), spatial_scale, sampling_ratio, aligned)
    if not len(regions):
        return _no_region(input, height, width)
    low = regions[:, 1:3] * spatial_scale - (0.5 if aligned else 0.0)  # x, y
    high = regions[:, 3:5] * spatial_scale - (0.5 if aligned else 0.0)
    size = high - low if aligned else (high - low).clamp(min=1)
    bins = size / size.new_tensor([width, height])
    if sampling_ratio > 0:
        samples = torch.full_like(bins, sampling_ratio, dtype=torch.int64)
    else:  # an inverted region has none
        samples = bins.ceil().clamp(min=0).long()
    numbers = regions[:, 0].long()
    if triton_runs_on(input.device.type):
        from vision3dgen.ops import kernels

        return kernels.roi_align(input, numbers, low, bins, samples, height, width)
    rows = _as_rows(input)
    pooled = rows.new_zeros(len(regions), height * width, rows.shape[1])
    # Regions with about as many samples go together, or the largest would give all others its number of taps.
    classes = samples.amax(1).clamp(min=1).double().log2().ceil()
    for group in classes.unique().tolist():
        members = (classes == group).nonzero()[:, 0]
        some = [x[members] for x in (numbers, low, bins, samples)]
        pixels, weights = _taps(*some, size=input.shape[2:], bins_of=(height, width))
        bags = _weighted_bags(rows, pixels, weights).unflatten(0, (len(members), -1))
        pooled = bags if len(members) == len(regions) else pooled.index_copy(0, members, bags)
    return pooled.mT.unflatten(2, (height, width))


def _no_region(maps: Float[Tensor, "B C H W"], height: int, width: int) -> Float[Tensor, "0 C H2 W2"]:
    """Nothing, in the graph of the maps."""
    return maps[:0, :, :1, :1].expand(-1, -1, height, width)


def _as_rows(maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "N C"]:
    """A row of channels for each pixel."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _taps(
    numbers: Int[Tensor, " R"],
    low: Float[Tensor, "R 2"],
    bins: Float[Tensor, "R 2"],
    samples: Int[Tensor, "R 2"],
    *,
    size: Sequence[int],
    bins_of: tuple[int, int],
) -> tuple[Int[Tensor, "Q T"], Float[Tensor, "Q T"]]:
    """The pixels that each bin of each region reads, Q = R H2 W2 in this order, and their weights."""
    along = [
        _taps_of_axis(low[:, axis], bins[:, axis], samples[:, axis], bins_of[1 - axis], size[1 - axis])
        for axis in (1, 0)  # y, then x
    ]
    (y, y_weights), (x, x_weights) = along  # (R, H2, Ty), (R, W2, Tx)
    pixels = (numbers[:, None, None] * size[0] + y)[:, :, None, :, None] * size[1] + x[:, None, :, None, :]
    weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]  # (R, H2, W2, Ty, Tx)
    count = y.shape[2] * x.shape[2]
    return pixels.reshape(-1, count), weights.reshape(-1, count)


def _taps_of_axis(
    low: Float[Tensor, " R"], step: Float[Tensor, " R"], samples: Int[Tensor, " R"], bins: int, size: int
) -> tuple[Int[Tensor, "R P T"], Float[Tensor, "R P T"]]:
    """Positions along one axis and their weights, two for each sample; a sample beyond the border by 1 weighs 0."""
    most = int(samples.amax()) if len(samples) else 1
    sample = torch.arange(max(most, 1), device=low.device)
    bin_number = torch.arange(bins, device=low.device)
    each = step / samples.clamp(min=1)  # between samples
    at = (
        low[:, None, None] + bin_number[:, None] * step[:, None, None] + (sample + 0.5) * each[:, None, None]
    )  # (R, P, S)
    counted = (sample < samples[:, None])[:, None] & (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    first = at.floor().clamp(max=max(size - 2, 0))
    part = at - first
    share = counted / samples.clamp(min=1).to(low.dtype)[:, None, None]
    position = first.long()
    positions = torch.stack([position, (position + 1).clamp(max=size - 1)], dim=-1)
    weights = torch.stack([(1 - part) * share, part * share], dim=-1)
    return positions.flatten(2), weights.flatten(2)


class _WeightedBags(torch.autograd.Function):
    """sum_t weights[q, t] * rows[pixels[q, t]]; the gradient of `rows` is a bag too, of what reads each row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(pixels, weights)
        ctx.size = len(rows)
        return F.embedding_bag(pixels, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pixels, weights = ctx.saved_tensors
        read, order = pixels.flatten().sort()
        starts = torch.searchsorted(read, torch.arange(ctx.size, device=read.device))
        readers = order.div(pixels.shape[1], rounding_mode="floor")
        own = weights.flatten()[order]
        return F.embedding_bag(readers, grad.contiguous(), starts, mode="sum", per_sample_weights=own), None, None


def _weighted_bags(rows: Tensor, pixels: Tensor, weights: Tensor) -> Float[Tensor, "Q C"]:
    if not len(pixels) or not len(rows):
        return rows.new_zeros(len(pixels), rows.shape[1]) + 0 * rows.sum()
    return _WeightedBags.apply(rows, pixels, weights.to(rows.dtype))


# -------------------------------------------------------------------------------------------------------- RoIPool


def roi_pool(
    input: Float[Tensor, "B C H W"],
    boxes: Regions,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Float[Tensor, "R C H2 W2"]:
    """Maxima over the bins of each region, whose borders are whole pixels: (R, C, *output_size).

    Both corner pixels, rounded, belong to the region; bins overlap where they do not divide it. A bin outside the map
    is 0. Computed in float32 or better, in the type of the map.
    Source: Girshick 2015 (arXiv:1504.08083), section 2.1.
    """
    return _roi_pool(input, boxes, output_size, spatial_scale, backend).to(input.dtype)


@full_precision
def _roi_pool(
    input: Tensor, boxes: Regions, output_size: int | Sequence[int], spatial_scale: float, backend: str | None
) -> Tensor:
    regions = _checked(input, boxes)
    height, width = _pair(output_size)
    if resolve_backend(backend, offered=OFFERED) == "torchvision":
        vision = import_backend("torchvision", "torchvision.ops")
        return vision.roi_pool(input, regions, (height, width), spatial_scale)
    if not len(regions):
        return _no_region(input, height, width)
    rows = _as_rows(input)
    corners = (regions[:, 1:] * spatial_scale).double()
    corners = (corners.abs() + 0.5).floor().long() * corners.sign().long()  # halves away from 0, as C rounds
    (y0, y1), (x0, x1) = (
        _bins_of_axis(corners[:, axis], corners[:, 2 + axis], count, size)
        for axis, count, size in ((1, height, input.shape[2]), (0, width, input.shape[3]))
    )
    tall, wide = (y1 - y0).clamp(min=0), (x1 - x0).clamp(min=0)  # (R, P)
    counts = (tall[:, :, None] * wide[:, None, :]).flatten()  # (Q,) pixels in each bag
    starts = counts.cumsum(0) - counts
    bag = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    place = torch.arange(len(bag), device=bag.device) - starts[bag]
    across = wide[:, None, :].expand(-1, height, -1).flatten()[bag]
    left = x0[:, None, :].expand(-1, height, -1).flatten()[bag]
    top = y0[:, :, None].expand(-1, -1, width).flatten()[bag]
    number = regions[:, 0].long().repeat_interleave(height * width)[bag]
    y = top + place.div(across, rounding_mode="floor")
    pixels = (number * input.shape[2] + y) * input.shape[3] + left + place % across
    if len(pixels):
        pooled = F.embedding_bag(pixels, rows, starts, mode="max")
    else:
        pooled = rows.new_zeros(len(counts), rows.shape[1]) + 0 * rows.sum()
    return pooled.view(len(regions), height, width, -1).permute(0, 3, 1, 2)


def _bins_of_axis(
    low: Int[Tensor, " R"], high: Int[Tensor, " R"], bins: int, size: int
) -> tuple[Int[Tensor, "R P"], Int[Tensor, "R P"]]:
    """First pixel of each bin and the one behind its last, inside the map."""
    extent = (high - low + 1).clamp(min=1)[:, None]
    number = torch.arange(bins, device=low.device)
    first = (number * extent).div(bins, rounding_mode="floor")
    behind = -(-(number + 1) * extent).div(bins, rounding_mode="floor")
    return (first + low[:, None]).clamp(0, size), (behind + low[:, None]).clamp(0, size)


# ---------------------------------------------------------------------------------------------------------- masks


@full_precision
def paste_masks(
    masks: Float[Tensor, "N M M2"], boxes: Float[Tensor, "N 4"], size: tuple[int, int]
) -> Float[Tensor, "N H W"]:
    """Probabilities of each region's mask at the region's place in an image (height, width); 0 outside.

    The mask is put into a border of zeros one cell wide, its box grown by as much and cut to whole pixels, and resized
    (bilinear) to all pixels from the first corner to the second: torchvision's way. Resizing and placing are one
    product with a matrix for rows and one for columns.
    """
    sizes = check_shape(masks=(masks, "N M M2"), boxes=(boxes, "N 4"))
    padded = F.pad(masks, (1, 1, 1, 1))
    grown = boxes.new_tensor([(sizes["M2"] + 2) / sizes["M2"], (sizes["M"] + 2) / sizes["M"]])
    center, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * grown
    low, high = (center - half).long(), (center + half).long()  # towards 0
    across, down = (
        _resizing(low[:, axis], high[:, axis], sizes[name] + 2, side, masks)
        for axis, name, side in ((0, "M2", size[1]), (1, "M", size[0]))
    )
    return down @ padded @ across.mT


def _resizing(
    low: Int[Tensor, " N"], high: Int[Tensor, " N"], cells: int, side: int, like: Tensor
) -> Float[Tensor, "N S T"]:
    """Matrices from `cells` values to the pixels of an axis of an image, low to high, the others 0."""
    pixel = torch.arange(side, device=low.device)
    extent = (high - low + 1).clamp(min=1)[:, None]
    at = ((pixel - low[:, None] + 0.5) * (cells / extent.double()) - 0.5).clamp(0, cells - 1)  # (N, S)
    weights = (1 - (at[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    inside = (pixel >= low[:, None]) & (pixel < low[:, None] + extent)
    return (weights * inside[..., None]).to(like.dtype)


def paste_binary_masks(
    masks: Float[Tensor, "N M M2"], boxes: Float[Tensor, "N 4"], size: tuple[int, int], threshold: float = 0.5,
    *, memory: int = 1 << 26,
) -> Bool[Tensor, "N H W"]:  # fmt: skip
    """Where `paste_masks` is at least `threshold`, holding at most about `memory` bytes of probabilities at a time."""
    step = max(1, memory // max(4 * math.prod(size), 1))
    parts = [paste_masks(some, own, size) >= threshold for some, own in zip(masks.split(step), boxes.split(step))]
    return torch.cat(parts) if len(masks) else torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
