"""Where in a picture an object may be, before anything was learned: windows, and selective search.

`sliding_windows` is every box of a grid of places, sizes and shapes. `selective_search` joins segments of similar
color, texture, size and fit, two at a time, and takes the box of each region on the way.
Source: Uijlings, van de Sande, Gevers and Smeulders, Selective Search for Object Recognition, IJCV 2013.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor

from vision3dgen.checks import check_choice, check_numbers, check_shape
from vision3dgen.ops.segments import graph_segments

COLOR_BINS, TEXTURE_BINS, DIRECTIONS = 25, 10, 8
SIMILARITIES = ("color", "texture", "size", "fill")
STRATEGIES = (SIMILARITIES, ("texture", "size", "fill"))  # of the paper's fast version, and two color spaces
_TEXTURE_RANGE = 0.5  # of a Gaussian derivative (sigma 1) of a channel in [0, 1]: an edge from 0 to 1 gives 0.4


def sliding_windows(
    size: tuple[int, int],
    *,
    sides: Sequence[float] = (32, 64, 128, 256),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    overlap: float = 0.65,
) -> Float[Tensor, "N 4"]:
    """Boxes (xyxy, pixels) that lie in a picture of `size` (height, width): each side, the root of the area, in each
    ratio of height to width, moved along each axis such that neighbors have an IoU of at least `overlap`.

    Shapes that do not fit are left out; if none does, the picture itself is the only window. Largest first.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be a height and a width of at least 1, got {size}")
    if not sides or not ratios or min(sides) <= 0 or min(ratios) <= 0:
        raise ValueError(f"sides and ratios must be positive, one at least, got {list(sides)} and {list(ratios)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    share = (1 - overlap) / (1 + overlap)  # of a side, to where the IoU with the box before is `overlap`
    found = []
    for side in sorted(sides, reverse=True):
        for ratio in ratios:
            tall, wide = side * ratio**0.5, side / ratio**0.5
            if tall > height or wide > width:
                continue
            steps = [
                torch.linspace(0, whole - part, max(int(np.ceil((whole - part) / (share * part))) + 1, 1))
                for whole, part in ((height, tall), (width, wide))
            ]
            y, x = torch.meshgrid(*steps, indexing="ij")
            corner = torch.stack([x, y], -1).view(-1, 2)
            found.append(torch.cat([corner, corner + torch.tensor([wide, tall])], 1))
    if not found:
        return torch.tensor([[0.0, 0.0, float(width), float(height)]])
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------- selective search


class _Region(NamedTuple):
    pixels: int
    box: tuple[int, int, int, int]  # x0, y0, x1, y1
    color: Float[np.ndarray, " K"]  # histograms that sum to 1
    texture: Float[np.ndarray, " K"]


def selective_search(
    image: Float[Tensor, "3 H W"],
    *,
    scales: Sequence[float] = (50.0, 100.0),
    spaces: Sequence[str] = ("hsv", "lab"),
    strategies: Sequence[Sequence[str]] = STRATEGIES,
    smallest: int = 20,
    least: float = 4.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N 4"]:
    """Boxes (xyxy, pixels) of regions of an image in [0, 1], those likely to be objects first, none twice.

    A hierarchy for each of `scales` (of `graph_segments`), color spaces (hsv, lab, rgb, gray) and sums of similarities
    (color, texture, size, fill). The first of a hierarchy is the whole picture; the n-th box has the rank n times a
    number drawn from `generator` (by default one of seed 0), and ranks of all hierarchies are sorted together.
    smallest: pixels of a segment. least: side of a box.
    Differs: texture is binned from derivatives in a fixed range, colors of HSV and Lab are taken to [0, 1].
    """
    check_shape(image=(image, "3 H W"))
    check_numbers(image=image)
    if not image.numel():
        raise ValueError(f"image must have a pixel at least, got {tuple(image.shape)}")
    for space in spaces:
        check_choice("color space", space, SPACES)
    for strategy in strategies:
        for name in strategy:
            check_choice("similarity", name, SIMILARITIES)
    if not scales or not spaces or not strategies or not all(strategies):
        raise ValueError("needs a scale, a color space and a strategy of a similarity at least")
    draws = generator or torch.Generator().manual_seed(0)
    pixels = image.detach().float().cpu().clamp(0, 1)
    boxes: list[tuple[int, int, int, int]] = []
    ranks: list[float] = []
    for space in spaces:
        converted = SPACES[space](pixels)
        color, texture = _color_bins(converted.numpy()), _texture_bins(converted.numpy())
        for scale in scales:
            segments = graph_segments(converted, scale, smallest=smallest).numpy()
            regions, neighbors = _regions(segments, color, texture), _neighbors(segments)
            for strategy in strategies:
                found = _hierarchy(regions, neighbors, strategy, segments.size)
                boxes += found
                ranks += (torch.arange(1, len(found) + 1) * torch.rand(len(found), generator=draws)).tolist()
    first: dict[tuple[int, int, int, int], None] = {}
    for index in np.argsort(ranks, kind="stable").tolist():
        x0, y0, x1, y1 = boxes[index]
        if min(x1 - x0, y1 - y0) >= least:
            first.setdefault(boxes[index])
    return torch.tensor(list(first), dtype=torch.float32).view(-1, 4)


def _gray(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 H W"]:
    from kornia.color import rgb_to_grayscale

    return rgb_to_grayscale(image)


def _hsv(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    from kornia.color import rgb_to_hsv

    return rgb_to_hsv(image) / image.new_tensor([2 * np.pi, 1.0, 1.0])[:, None, None]


def _lab(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    from kornia.color import rgb_to_lab

    low, high = image.new_tensor([0.0, -128.0, -128.0]), image.new_tensor([100.0, 127.0, 127.0])
    return ((rgb_to_lab(image) - low[:, None, None]) / (high - low)[:, None, None]).clamp(0, 1)


SPACES: dict[str, Callable[[Tensor], Tensor]] = {"hsv": _hsv, "lab": _lab, "rgb": lambda image: image, "gray": _gray}


def _color_bins(image: Float[np.ndarray, "C H W"]) -> Int[np.ndarray, "C H W"]:
    """Which bin of a histogram of all channels each value falls into."""
    bins = np.minimum((image * COLOR_BINS).astype(np.int64), COLOR_BINS - 1)
    return bins + COLOR_BINS * np.arange(len(image))[:, None, None]


def _texture_bins(image: Float[np.ndarray, "C H W"]) -> Int[np.ndarray, "C D H W"]:
    """The same of Gaussian derivatives in eight directions, the negative ones as zero."""
    down = np.stack([ndimage.gaussian_filter(channel, 1.0, order=(1, 0), mode="nearest") for channel in image])
    right = np.stack([ndimage.gaussian_filter(channel, 1.0, order=(0, 1), mode="nearest") for channel in image])
    angles = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    along = np.cos(angles)[:, None, None] * right[:, None] + np.sin(angles)[:, None, None] * down[:, None]
    bins = np.clip((along / _TEXTURE_RANGE * TEXTURE_BINS).astype(np.int64), 0, TEXTURE_BINS - 1)
    return bins + TEXTURE_BINS * np.arange(len(image) * DIRECTIONS).reshape(len(image), DIRECTIONS, 1, 1)


def _regions(
    segments: Int[np.ndarray, "H W"], color: Int[np.ndarray, "C H W"], texture: Int[np.ndarray, "C D H W"]
) -> list[_Region]:
    count, flat = int(segments.max()) + 1, segments.ravel()
    pixels = np.bincount(flat, minlength=count)
    histograms = []
    for bins, size in ((color, COLOR_BINS * len(color)), (texture, TEXTURE_BINS * DIRECTIONS * len(texture))):
        planes = bins.reshape(-1, segments.size)
        held = np.bincount((flat * size + planes).ravel(), minlength=count * size).reshape(count, size)
        histograms.append(held / (pixels[:, None] * len(planes)))
    places = ndimage.find_objects(segments + 1)
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in places]
    return [_Region(int(n), box, c, t) for n, box, c, t in zip(pixels, boxes, *histograms)]


def _neighbors(segments: Int[np.ndarray, "H W"]) -> list[set[int]]:
    """Of each segment those that share a side of a pixel with it."""
    pairs = np.concatenate(
        [
            np.stack([segments[:, :-1].ravel(), segments[:, 1:].ravel()], 1),
            np.stack([segments[:-1].ravel(), segments[1:].ravel()], 1),
        ]
    )
    found: list[set[int]] = [set() for _ in range(int(segments.max()) + 1)]
    for a, b in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist():
        found[a].add(b)
        found[b].add(a)
    return found


def _hierarchy(
    segments: list[_Region], neighbors: list[set[int]], strategy: Sequence[str], size: int
) -> list[tuple[int, int, int, int]]:
    """The boxes of the segments and of all regions they are joined to, the last joined first."""
    regions, beside = list(segments), [set(each) for each in neighbors]
    queue = [
        (-_similarity(regions[a], regions[b], strategy, size), a, b)
        for a, others in enumerate(beside)
        for b in others
        if a < b
    ]
    heapq.heapify(queue)
    alive = [True] * len(regions)
    while queue:
        _, a, b = heapq.heappop(queue)
        if not (alive[a] and alive[b]):
            continue
        alive[a] = alive[b] = False
        number, joined = len(regions), _join(regions[a], regions[b])
        around = (beside[a] | beside[b]) - {a, b}
        regions.append(joined)
        beside.append(around)
        alive.append(True)
        for other in around:
            beside[other] -= {a, b}
            beside[other].add(number)
            heapq.heappush(queue, (-_similarity(regions[other], joined, strategy, size), other, number))
    return [region.box for region in reversed(regions)]


def _join(a: _Region, b: _Region) -> _Region:
    pixels = a.pixels + b.pixels
    x0, y0, x1, y1 = _around(a, b)
    color = (a.pixels * a.color + b.pixels * b.color) / pixels
    texture = (a.pixels * a.texture + b.pixels * b.texture) / pixels
    return _Region(pixels, (x0, y0, x1, y1), color, texture)


def _around(a: _Region, b: _Region) -> tuple[int, int, int, int]:
    first, second = a.box, b.box
    return (
        min(first[0], second[0]), min(first[1], second[1]), max(first[2], second[2]), max(first[3], second[3])
    )  # fmt: skip


def _similarity(a: _Region, b: _Region, strategy: Sequence[str], size: int) -> float:
    """The sum of the similarities named, each between 0 and 1."""
    total = 0.0
    if "color" in strategy:
        total += float(np.minimum(a.color, b.color).sum())
    if "texture" in strategy:
        total += float(np.minimum(a.texture, b.texture).sum())
    if "size" in strategy:
        total += 1 - (a.pixels + b.pixels) / size
    if "fill" in strategy:
        x0, y0, x1, y1 = _around(a, b)
        total += 1 - ((x1 - x0) * (y1 - y0) - a.pixels - b.pixels) / size
    return total
