"""How much a box looks like the outline of an object, by the contours that it holds whole.

Source: Zitnick and Dollar, Edge Boxes: Locating Object Proposals from Edges, ECCV 2014. Differs: edges are maxima of
the smoothed color gradient, not a structured forest's; boxes are scored, and not moved afterwards to a better place.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import ndimage, sparse
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from vision3dgen.checks import check_numbers, check_shape
from vision3dgen.ops.proposals import sliding_windows
from vision3dgen.ops.suppression import nms

_LEAST_AFFINITY = 0.05  # below it two groups are not one contour
_LEAST_PRODUCT = 1e-3  # of affinities on a path: below it they are taken for none
_NEAR = 2  # pixels between neighboring groups
_AT_ONCE = 1 << 24  # box-group pairs


class Contours(NamedTuple):
    """Groups of edge pixels that bend little, and how well each continues another."""

    strength: Float[np.ndarray, "H W"]  # of an edge pixel, 0 elsewhere
    group: Int[np.ndarray, "H W"]  # number of the group, from 0; -1 is no edge
    weights: Float[np.ndarray, " G"]  # sum of strengths
    affinity: Float[np.ndarray, "G G"]  # the largest product of affinities on a path between two groups


@dataclass(frozen=True)
class EdgeBoxes:
    """How edges are found, grouped and counted; the names in the paper are alpha of windows, kappa, gamma and beta.

    sigma: of the smoothing, pixels. least: strength of an edge pixel, of the strongest. bend: radians a group may turn
    in all. gamma: power of the affinities. kappa: how much large boxes, which hold more edges, pay.
    """

    sigma: float = 1.0
    least: float = 0.1
    bend: float = np.pi / 2
    gamma: float = 2.0
    kappa: float = 1.5

    def contours(self, image: Float[Tensor, "C H W"]) -> Contours:
        """The contours of an image in [0, 1]."""
        check_shape(image=(image, "C H W"))
        check_numbers(image=image)
        if not image.numel():
            raise ValueError(f"image must have a pixel and a channel at least, got {tuple(image.shape)}")
        strength, angle = _edges(image.detach().double().cpu().numpy(), self.sigma, self.least)
        group = _grouped(strength, angle, self.bend)
        count = int(group.max()) + 1
        weights = np.bincount(group[group >= 0], strength[group >= 0], minlength=count)
        return Contours(strength, group, weights, _affinity(group, angle, count, self.gamma))

    def scores(self, contours: Contours, boxes: Float[Tensor, "N 4"]) -> Float[Tensor, " N"]:
        """The sum of the strengths in a box of groups that are not linked to one that crosses its border, less those of
        its middle, over 2 (width + height)^kappa: equations 2 to 4."""
        check_shape(boxes=(boxes, "N 4"))
        check_numbers(boxes=boxes)
        height, width = contours.group.shape
        corners = boxes.detach().double().cpu().numpy()
        lengths = corners[:, 2:] - corners[:, :2]
        pixels = np.stack([np.rint(corners[:, axis]) for axis in range(4)], 1).astype(np.int64)
        pixels = np.clip(pixels, 0, [width, height, width, height])
        places = _places(contours.group)
        held = np.zeros(len(corners))
        at_once = max(_AT_ONCE // max(len(contours.weights), 1), 1)
        for start in range(0, len(corners), at_once):
            part = slice(start, start + at_once)
            held[part] = _held(pixels[part], places, contours)
        quarter = lengths / 4
        inner = np.rint(np.concatenate([corners[:, :2] + quarter, corners[:, 2:] - quarter], 1)).astype(np.int64)
        held -= _sum_inside(contours.strength, np.clip(inner, 0, [width, height, width, height]))
        around = lengths.clip(min=0).sum(1)
        scores = np.divide(held, 2 * around**self.kappa, out=np.zeros_like(held), where=around > 0)
        return torch.from_numpy(scores).to(boxes)


def edge_boxes(
    image: Float[Tensor, "C H W"], *, method: EdgeBoxes | None = None, windows: Float[Tensor, "N 4"] | None = None,
    overlap: float = 0.75, count: int = 1000,
) -> tuple[Float[Tensor, "K 4"], Float[Tensor, " K"]]:  # fmt: skip
    """At most `count` boxes of an image in [0, 1] with positive scores, best first, and these.

    windows: what is scored, by default `sliding_windows` with sides from 16 pixels on, each 1.4 times the last, and
    ratios 1/3 to 3. overlap: IoU from which the lower score is suppressed.
    """
    method = method or EdgeBoxes()
    contours = method.contours(image)
    if windows is None:
        height, width = image.shape[-2:]
        sides = [16 * 2 ** (step / 2) for step in range(32) if 16 * 2 ** (step / 2) <= max(height, width)]
        windows = sliding_windows((height, width), sides=sides or [16.0], ratios=(1 / 3, 0.58, 1.0, 1.73, 3.0))
    scores = method.scores(contours, windows)
    likely = (scores > 0).nonzero()[:, 0]
    likely = likely[scores[likely].argsort(descending=True, stable=True)]
    looked_at = 4 * count  # the best: those behind can only come behind
    while True:
        best = likely[:looked_at]
        kept = best[nms(windows[best], scores[best], overlap)[:count]]
        if len(kept) == count or looked_at >= len(likely):
            return windows[kept], scores[kept]
        looked_at *= 2


def _edges(
    image: Float[np.ndarray, "C H W"], sigma: float, least: float
) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """How strong each pixel is as an edge, 0 where a neighbor across it is stronger, and the direction along the edge,
    which has no sign, in radians."""
    smooth = [{"sigma": sigma, "order": order, "mode": "nearest"} for order in ((1, 0), (0, 1))]
    down, right = (np.stack([ndimage.gaussian_filter(channel, **each) for channel in image]) for each in smooth)
    # The direction of the largest change of color: of the matrix of products of derivatives, summed over the channels.
    xx, yy, xy = (right**2).sum(0), (down**2).sum(0), (right * down).sum(0)
    across = 0.5 * np.arctan2(2 * xy, xx - yy)
    strength = np.sqrt((0.5 * (xx + yy + np.sqrt((xx - yy) ** 2 + 4 * xy**2))).clip(min=0))
    y, x = np.indices(strength.shape).astype(np.float64)
    step_x, step_y = np.cos(across), np.sin(across)
    best = strength > least * strength.max()
    for sign in (-1, 1):
        beside = ndimage.map_coordinates(strength, [y + sign * step_y, x + sign * step_x], order=1, mode="nearest")
        best &= strength >= beside if sign < 0 else strength > beside
    return np.where(best, strength, 0.0), across + np.pi / 2


def _apart(a: float, b: float) -> float:
    """The angle between two directions without sign, at most a right one."""
    apart = abs(a - b) % np.pi
    return min(apart, np.pi - apart)


def _grouped(
    strength: Float[np.ndarray, "H W"], angle: Float[np.ndarray, "H W"], bend: float
) -> Int[np.ndarray, "H W"]:
    """Edge pixels joined one by one to the neighbor, of eight, that turns least, until a group turns too much."""
    height, width = strength.shape
    group = np.full(strength.shape, -1)
    count = 0
    for y, x in np.argwhere(strength > 0).tolist():
        if group[y, x] >= 0:
            continue
        turned, queue = 0.0, [(0.0, y, x)]
        while queue:
            turn, py, px = heapq.heappop(queue)
            if group[py, px] >= 0:
                continue
            turned += turn
            if turned > bend:
                break
            group[py, px] = count
            for ny in range(max(py - 1, 0), min(py + 2, height)):
                for nx in range(max(px - 1, 0), min(px + 2, width)):
                    if strength[ny, nx] > 0 and group[ny, nx] < 0:
                        heapq.heappush(queue, (_apart(angle[py, px], angle[ny, nx]), ny, nx))
        count += 1
    return group


def _affinity(
    group: Int[np.ndarray, "H W"], angle: Float[np.ndarray, "H W"], count: int, gamma: float
) -> Float[np.ndarray, "G G"]:
    """Of neighbors |cos(a - c) cos(b - c)|^gamma, c the direction between their middles; of others by paths."""
    if not count:
        return np.zeros((0, 0))
    y, x = np.nonzero(group >= 0)
    own = group[y, x]
    sizes = np.bincount(own, minlength=count)
    middle = np.stack([np.bincount(own, axis, minlength=count) / sizes for axis in (x, y)], 1)
    double = 2 * angle[y, x]  # directions have no sign: their mean is half that of the doubled ones
    along = 0.5 * np.arctan2(
        np.bincount(own, np.sin(double), minlength=count), np.bincount(own, np.cos(double), minlength=count)
    )
    pairs = []
    for down in range(_NEAR + 1):
        for right in range(-_NEAR, _NEAR + 1):
            if (down, right) <= (0, 0):
                continue
            a = group[: group.shape[0] - down, max(-right, 0) : group.shape[1] - max(right, 0)]
            b = group[down:, max(right, 0) : group.shape[1] - max(-right, 0)]
            meet = (a >= 0) & (b >= 0) & (a != b)
            pairs.append(np.stack([a[meet], b[meet]], 1))
    linked = np.unique(np.sort(np.concatenate(pairs), 1), axis=0)
    i, j = linked.T
    between = np.arctan2(middle[j, 1] - middle[i, 1], middle[j, 0] - middle[i, 0])
    values = np.abs(np.cos(along[i] - between) * np.cos(along[j] - between)) ** gamma
    strong = values > _LEAST_AFFINITY
    # The largest product is the shortest path of -log; a tiny length keeps an affinity of 1 from being no edge.
    lengths = np.maximum(-np.log(values[strong]), 1e-12)
    graph = sparse.coo_matrix((lengths, (i[strong], j[strong])), shape=(count, count)).tocsr()
    found = np.exp(-dijkstra(graph, directed=False))
    return np.where(found < _LEAST_PRODUCT, 0.0, found)


def _places(group: Int[np.ndarray, "H W"]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The columns and rows of each group's pixels."""
    y, x = np.nonzero(group >= 0)
    order = np.argsort(group[y, x], kind="stable")
    if not len(y):
        return []
    ends = np.cumsum(np.bincount(group[y, x]))[:-1]
    return list(zip(np.split(x[order], ends), np.split(y[order], ends)))


def _held(
    pixels: Int[np.ndarray, "N 4"], places: Sequence[tuple[np.ndarray, np.ndarray]], contours: Contours
) -> Float[np.ndarray, " N"]:
    """The weights in each box of the groups inside, as far as they are not linked to one that crosses the border."""
    x0, y0, x1, y1 = np.ascontiguousarray(pixels.T)
    inside = np.zeros((len(places), len(pixels)), dtype=bool)
    linked = np.zeros(inside.shape, dtype=np.float32)
    for number, (x, y) in enumerate(places):
        left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
        inside[number] = (left >= x0) & (top >= y0) & (right <= x1) & (bottom <= y1)
        meets = (left < x1) & (top < y1) & (right > x0) & (bottom > y0) & ~inside[number]
        boxes = np.flatnonzero(meets)
        held = (x >= x0[boxes, None]) & (x < x1[boxes, None]) & (y >= y0[boxes, None]) & (y < y1[boxes, None])
        boxes = boxes[held.any(1)]  # the group has pixels in these, and others outside
        reached = np.flatnonzero(contours.affinity[number])
        place = np.ix_(reached, boxes)
        linked[place] = np.maximum(linked[place], contours.affinity[number, reached, None].astype(np.float32))
    return (contours.weights[:, None] * inside * (1 - linked)).sum(0)


def _sum_inside(values: Float[np.ndarray, "H W"], boxes: Int[np.ndarray, "N 4"]) -> Float[np.ndarray, " N"]:
    """The sum of values in boxes of whole pixels."""
    table = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    x0, y0 = boxes[:, 0], boxes[:, 1]
    x1, y1 = np.maximum(boxes[:, 2], x0), np.maximum(boxes[:, 3], y0)
    return table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
