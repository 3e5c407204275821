"""Masks as run lengths: small, exact, and compared without being drawn.

An `Rle` counts the pixels of alternating runs, outside first, going down the columns from left to right: pixel (row,
column) of a picture of height H has the place column * H + row. So [2, 1, H * W - 3] is the one pixel in row 2 of
column 0. It is what COCO stores; `io/coco.py` reads and writes its files.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

POLYGON_STEPS = 5  # positions to a pixel at which COCO's polygons are drawn


class Rle(NamedTuple):
    """A mask of `size` (H, W) as run lengths that add up to H * W."""

    size: tuple[int, int]
    counts: Int64[np.ndarray, " R"]


class Runs(NamedTuple):
    """The runs of pixels inside several masks, none of them empty, mask after mask."""

    starts: Int64[np.ndarray, " R"]
    ends: Int64[np.ndarray, " R"]
    owners: Int64[np.ndarray, " R"]  # which mask a run belongs to


def encode_rle(masks: Bool[Tensor, "N H W"]) -> list[Rle]:
    """The run lengths of each mask."""
    count, height, width = masks.shape
    pixels = height * width
    if not count or not pixels:
        return [Rle((height, width), np.zeros(0, dtype=np.int64)) for _ in range(count)]
    flat = np.ascontiguousarray(masks.cpu().numpy().transpose(0, 2, 1)).reshape(count, pixels)
    changed = flat.copy()  # before each mask lies the outside
    np.not_equal(flat[:, 1:], flat[:, :-1], out=changed[:, 1:])
    places = np.flatnonzero(changed)
    bounds = np.sort(np.concatenate([np.arange(count + 1) * pixels, places]), kind="stable")
    pieces = 1 + np.bincount(places // pixels, minlength=count)
    return [Rle((height, width), each) for each in np.split(np.diff(bounds), pieces.cumsum()[:-1])]


def _from_changes(places: Int64[np.ndarray, " P"], size: tuple[int, int]) -> Rle:
    """From the ascending places at which outside becomes inside and back."""
    bounds = np.concatenate([[0], places, [size[0] * size[1]]])
    return Rle(size, np.diff(bounds).astype(np.int64))


def decode_rle(rles: Sequence[Rle], size: tuple[int, int] | None = None) -> Bool[Tensor, "N H W"]:
    """The masks; `size` says how large none are.

    Raises ValueError naming the mask whose size differs from the others', or whose runs do not add up to its size.
    """
    if size is None and not rles:
        raise ValueError("decode_rle needs the size of the picture when there are no masks")
    height, width = size if size is not None else rles[0].size
    masks = np.zeros((len(rles), width, height), dtype=bool)
    for number, rle in enumerate(rles):
        if tuple(rle.size) != (height, width):
            raise ValueError(f"mask {number} is {rle.size[0]} x {rle.size[1]}, expected {height} x {width}")
        check_rle(rle, f"mask {number}")
        masks[number] = np.repeat(np.arange(len(rle.counts)) % 2 == 1, rle.counts).reshape(width, height)
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(0, 2, 1)))


def check_rle(rle: Rle, where: str) -> None:
    """Raise a ValueError saying `where` unless the run lengths are not negative and add up to the size."""
    height, width = rle.size
    if height < 0 or width < 0 or (rle.counts < 0).any():
        raise ValueError(f"{where}: sizes and run lengths must not be negative, got {height} x {width}")
    total = int(rle.counts.sum())
    if total != height * width:
        raise ValueError(f"{where}: the run lengths add up to {total}, {height} x {width} pixels are {height * width}")


def runs_of(rles: Sequence[Rle]) -> Runs:
    """The runs inside the masks, in order."""
    pieces = np.array([len(rle.counts) for rle in rles], dtype=np.int64)
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(rle.counts for rle in rles)])
    first = pieces.cumsum() - pieces
    ends = counts.cumsum()
    before = np.append(0, ends)[first]  # all pixels of the masks before
    owners = np.repeat(np.arange(len(rles)), pieces)
    ends -= before[owners]
    inside = ((np.arange(len(counts)) - first[owners]) % 2 == 1) & (counts > 0)
    return Runs((ends - counts)[inside], ends[inside], owners[inside])


def mask_runs(masks: Bool[Tensor, "N H W"]) -> Runs:
    """The runs inside masks, row after row (an `Rle`'s go down the columns), which is enough to compare masks with."""
    flat = np.ascontiguousarray(masks.cpu().numpy()).reshape(len(masks), masks.shape[1] * masks.shape[2])
    if not flat.size:
        none = np.zeros(0, dtype=np.int64)
        return Runs(none, none, none)
    changed = np.zeros((len(flat), flat.shape[1] + 1), dtype=bool)  # outside lies before and after each mask
    np.not_equal(flat[:, 1:], flat[:, :-1], out=changed[:, 1:-1])
    changed[:, 0], changed[:, -1] = flat[:, 0], flat[:, -1]
    places = np.flatnonzero(changed)
    owners = places[::2] // changed.shape[1]
    return Runs(places[::2] - owners * changed.shape[1], places[1::2] - owners * changed.shape[1], owners)


def run_areas(runs: Runs, count: int) -> Int64[np.ndarray, " N"]:
    """How many pixels are inside each of `count` masks."""
    return np.bincount(runs.owners, weights=runs.ends - runs.starts, minlength=count).astype(np.int64)


def run_extents(runs: Runs, count: int, line: int | Int64[np.ndarray, " R"]) -> Float64[np.ndarray, "N 4"]:
    """The first line, the first place in a line, the last line and place (one more each) of `count` masks; else zeros.

    line: places to a line: the height where runs go down columns, the width where they go along rows.
    """
    extents = np.zeros((count, 4))
    starts, ends, owners = runs
    if not len(starts):
        return extents
    first, last = starts // line, (ends - 1) // line
    whole = last > first  # a run over the end of a line reaches the start of the next one
    low = np.where(whole, 0, starts % line)
    high = np.where(whole, line, (ends - 1) % line + 1)
    some, place = np.unique(owners, return_index=True)
    extents[some, 0], extents[some, 1] = (np.minimum.reduceat(sides, place) for sides in (first, low))
    extents[some, 2], extents[some, 3] = (np.maximum.reduceat(sides, place) for sides in (last + 1, high))
    return extents


def rle_areas(rles: Sequence[Rle]) -> Int64[np.ndarray, " N"]:
    """How many pixels are inside each."""
    return run_areas(runs_of(rles), len(rles))


def rle_boxes(rles: Sequence[Rle]) -> Float64[np.ndarray, "N 4"]:
    """The tightest boxes (xyxy, pixel edges) around the masks; zeros for an empty mask."""
    runs = runs_of(rles)
    heights = np.array([rle.size[0] for rle in rles], dtype=np.int64)[runs.owners]
    return run_extents(runs, len(rles), heights)


def shared_pixels(
    one: Runs, other: Runs, wanted: Bool[np.ndarray, "N M"], pixels: int, line: int
) -> Int64[np.ndarray, "N M"]:
    """How many pixels masks share, of the wanted pairs, 0 elsewhere; all have so many pixels, and places to a line.

    With B(x) the number of pixels of the second mask before place x, a run from s to e shares B(e) - B(s) with it.
    """
    shared = np.zeros(wanted.shape, dtype=np.int64)
    mine, others = run_extents(one, len(wanted), line), run_extents(other, wanted.shape[1], line)
    low = np.maximum(mine[:, None, :2], others[None, :, :2])
    high = np.minimum(mine[:, None, 2:], others[None, :, 2:])
    pairs = np.argwhere(wanted & (high > low).all(-1))
    if not len(pairs):
        return shared
    span = pixels + 1  # one line of places for all masks
    starts, lengths = other.starts + other.owners * span, other.ends - other.starts
    before = np.append(0, lengths.cumsum())
    counts = np.bincount(one.owners, minlength=len(wanted))
    first_run = counts.cumsum() - counts

    sizes = counts[pairs[:, 0]]
    stops = sizes.cumsum()
    within = np.arange(stops[-1]) - np.repeat(stops - sizes, sizes)
    run = np.repeat(first_run[pairs[:, 0]], sizes) + within
    shift = np.repeat(pairs[:, 1] * span, sizes)

    def pixels_before(place: np.ndarray) -> np.ndarray:
        index = np.searchsorted(starts, place, side="right")
        last = np.maximum(index - 1, 0)
        return np.where(index > 0, before[last] + np.minimum(place - starts[last], lengths[last]), 0)

    found = pixels_before(one.ends[run] + shift) - pixels_before(one.starts[run] + shift)
    shared[pairs[:, 0], pairs[:, 1]] = np.add.reduceat(found, stops - sizes)
    return shared


def rle_iou(
    first: Sequence[Rle], second: Sequence[Rle], crowd: Bool[np.ndarray, " M"] | None = None
) -> Float64[np.ndarray, "N M"]:
    """Intersection over union of all pairs of masks of one size; over the area of first[i] where crowd[j].

    Raises ValueError for masks of different sizes. Two empty masks have the IoU 0.
    """
    sizes = {tuple(rle.size) for rle in (*first, *second)}
    if len(sizes) > 1:
        raise ValueError(f"masks must have one size, got {sorted(sizes)}")
    one, other = runs_of(first), runs_of(second)
    height, width = next(iter(sizes), (0, 0))
    every = np.ones((len(first), len(second)), dtype=bool)
    shared = shared_pixels(one, other, every, height * width, height).astype(float)
    areas = run_areas(one, len(first)).astype(float), run_areas(other, len(second)).astype(float)
    return share_of_union(shared, *areas, crowd)


def share_of_union(
    shared: Float64[np.ndarray, "N M"],
    first: Float64[np.ndarray, " N"],
    second: Float64[np.ndarray, " M"],
    crowd: Bool[np.ndarray, " M"] | None = None,
) -> Float64[np.ndarray, "N M"]:
    """Shared areas over those of the unions, or over the first's own where the second is a crowd; 0 over 0 is 0."""
    union = first[:, None] + second[None] - shared
    if crowd is not None:
        union = np.where(crowd[None], first[:, None], union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def merge_rle(rles: Sequence[Rle]) -> Rle:
    """The union of masks of one size."""
    if len(rles) == 1:
        return rles[0]
    starts, ends, _ = runs_of(rles)
    steps, signs = np.concatenate([starts, ends]), np.repeat([1, -1], len(starts))
    places, which = np.unique(steps, return_inverse=True)
    covered = np.bincount(which, weights=signs, minlength=len(places)).cumsum() > 0.5
    changes = places[np.flatnonzero(covered != np.concatenate([[False], covered[:-1]]))]
    height, width = rles[0].size
    return _from_changes(changes[changes < height * width], (height, width))


def polygons_to_rle(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Rle:
    """The union of polygons [x1, y1, x2, y2, ...] in pixels, as COCO draws them.

    Outlines go through the points of a grid five times as fine; a column's pixels change between outside and inside
    where the outline crosses its middle, at the next pixel below. Raises ValueError for a polygon with an odd number of
    coordinates, with fewer than six, or with some that are not finite; no polygon is an empty mask.
    """
    return merge_rle([_polygon(polygon, size) for polygon in polygons] or [_from_changes(np.zeros(0, np.int64), size)])


def _polygon(coordinates: Sequence[float], size: tuple[int, int]) -> Rle:
    height, width = size
    flat = np.asarray(coordinates, dtype=np.float64)
    if flat.ndim != 1 or len(flat) % 2 or len(flat) < 6 or not np.isfinite(flat).all():
        raise ValueError(
            f"a polygon must be x and y of at least 3 points, got {len(flat)} numbers: {flat[:8].tolist()}"
        )
    corners = np.trunc(POLYGON_STEPS * flat.reshape(-1, 2) + 0.5).astype(np.int64)
    along, down = _outline(corners, np.roll(corners, -1, axis=0))
    crossed = np.flatnonzero(along[1:] != along[:-1])
    x = (np.minimum(along[crossed], along[crossed + 1]) + 0.5) / POLYGON_STEPS - 0.5
    y = (np.minimum(down[crossed], down[crossed + 1]) + 0.5) / POLYGON_STEPS - 0.5
    middle = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    rows = np.ceil(y[middle].clip(0, height)).astype(np.int64)
    places, times = np.unique(x[middle].astype(np.int64) * height + rows, return_counts=True)
    changes = places[times % 2 == 1]
    return _from_changes(changes[changes < height * width], (height, width))


def _outline(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole points along each side, one for each step of its longer direction, in order; x and y."""
    delta = np.abs(end - start)
    flat = delta[:, 0] >= delta[:, 1]
    steps = delta.max(1)
    turned = np.where(flat, start[:, 0] > end[:, 0], start[:, 1] > end[:, 1])  # drawn from the smaller end
    low, high = np.where(turned[:, None], end, start), np.where(turned[:, None], start, end)
    long, short = np.where(flat, low[:, 0], low[:, 1]), np.where(flat, low[:, 1], low[:, 0])
    rise = np.where(flat, high[:, 1] - low[:, 1], high[:, 0] - low[:, 0])
    slope = rise / np.maximum(steps, 1)

    side = np.repeat(np.arange(len(start)), steps + 1)
    stops = (steps + 1).cumsum()
    step = np.arange(stops[-1]) - np.repeat(stops - steps - 1, steps + 1)
    step = np.where(turned[side], steps[side] - step, step)
    main = long[side] + step
    other = np.trunc(short[side] + slope[side] * step + 0.5).astype(np.int64)
    return np.where(flat[side], main, other), np.where(flat[side], other, main)
