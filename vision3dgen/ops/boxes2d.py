"""Boxes in the picture: areas, overlaps, and the transforms by which a detector speaks of them.

A box is (x0, y0, x1, y1) in pixels, its sides at any real number: it covers x0 <= x < x1 and y0 <= y < y1, so an object
of one pixel is 1 wide. Names follow torchvision.ops, arguments and results too.
Differs: a box whose sides are exchanged is empty (torchvision multiplies two negative sides to a positive area), and
the overlap of empty boxes is 0 (torchvision: 0 / 0, NaN).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_shape
from vision3dgen.ops.backends import full_precision

LARGEST_GROWTH = math.log(1000 / 16)  # of a side in one step: what a network says beyond is cut off


@full_precision
def box_area(boxes: Float[Tensor, "N 4"]) -> Float[Tensor, " N"]:
    """Width times height; 0 for a box without inside."""
    check_shape(boxes=(boxes, "N 4"))
    return _area(boxes)


@full_precision
def box_iou(boxes1: Float[Tensor, "N 4"], boxes2: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """Intersection over union of all pairs; 0 where the union is empty."""
    check_shape(boxes1=(boxes1, "N 4"), boxes2=(boxes2, "M 4"))
    shared, union = _overlap(boxes1, boxes2)
    return shared / union.where(union > 0, 1)


@full_precision
def generalized_box_iou(boxes1: Float[Tensor, "N 4"], boxes2: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """IoU less the share of the smallest box around both that neither covers, in (-1, 1].

    Source: Rezatofighi et al. 2019 (arXiv:1902.09630), algorithm 1. Of two empty boxes at one place it is 0.
    """
    check_shape(boxes1=(boxes1, "N 4"), boxes2=(boxes2, "M 4"))
    shared, union = _overlap(boxes1, boxes2)
    low = torch.minimum(boxes1[:, None, :2], boxes2[:, :2])
    high = torch.maximum(boxes1[:, None, 2:], boxes2[:, 2:])
    around = (high - low).clamp(min=0).prod(-1)  # (N, M)
    return shared / union.where(union > 0, 1) - (around - union) / around.where(around > 0, 1)


def _area(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N"]:
    wide, tall = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return wide * tall


def _overlap(boxes1: Float[Tensor, "N 4"], boxes2: Float[Tensor, "M 4"]) -> tuple[Tensor, Tensor]:
    """Areas (N, M) of intersections and unions; axis by axis, for pairs are many and axes two."""
    low = [torch.maximum(boxes1[:, axis, None], boxes2[:, axis]) for axis in (0, 1)]
    high = [torch.minimum(boxes1[:, 2 + axis, None], boxes2[:, 2 + axis]) for axis in (0, 1)]
    shared = (high[0] - low[0]).clamp(min=0) * (high[1] - low[1]).clamp(min=0)
    return shared, _area(boxes1)[:, None] + _area(boxes2) - shared


def clip_boxes_to_image(boxes: Float[Tensor, "*N 4"], size: tuple[int, int]) -> Float[Tensor, "*N 4"]:
    """The part of each box inside an image (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], dim=-1).flatten(-2)


def remove_small_boxes(boxes: Float[Tensor, "N 4"], min_size: float) -> Int[Tensor, " K"]:
    """Indices of the boxes with both sides at least `min_size`."""
    return (boxes[:, 2:] - boxes[:, :2] >= min_size).all(1).nonzero()[:, 0]


def masks_to_boxes(masks: Bool[Tensor, "N H W"]) -> Float[Tensor, "N 4"]:
    """The smallest box around each mask; (0, 0, 0, 0) for an empty one.

    Differs: it ends where the last pixel ends; torchvision's ends where the last pixel begins.
    """
    boxes = []
    for axis in (1, 2):  # rows leave the columns that are filled
        filled = masks.any(axis)
        first = filled.float().argmax(1)
        last = filled.shape[1] - filled.flip(1).float().argmax(1)
        boxes += [first, last.where(filled.any(1), 0)]
    x0, x1, y0, y1 = boxes
    return torch.stack([x0, y0, x1, y1], dim=1).float()


# ---------------------------------------------------------------------------------------------------- transforms


@full_precision
def encode_boxes(
    boxes: Float[Tensor, "N 4"], anchors: Float[Tensor, "N 4"], weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Float[Tensor, "N 4"]:
    """The transforms (tx, ty, tw, th) that turn anchors into boxes, each times its weight.

    tx = (x - x_a) / w_a and ty of the centers, tw = log(w / w_a) and th of the sides. Source: Girshick et al. 2014
    (arXiv:1311.2524), appendix C. Anchors and boxes must have an inside.
    """
    check_shape(boxes=(boxes, "N 4"), anchors=(anchors, "N 4"))
    size, own = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    center, at = boxes[:, :2] + 0.5 * size, anchors[:, :2] + 0.5 * own
    return torch.cat([(center - at) / own, (size / own).log()], dim=1) * boxes.new_tensor(weights)


@full_precision
def decode_boxes(
    transforms: Float[Tensor, "N *K 4"],
    anchors: Float[Tensor, "N 4"],
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    largest: float = LARGEST_GROWTH,
) -> Float[Tensor, "N *K 4"]:
    """Boxes from transforms of anchors, one or K of each: the inverse of `encode_boxes`.

    No side grows more than exp(`largest`) times.
    """
    between = (1,) * (transforms.ndim - 2)
    size = (anchors[:, 2:] - anchors[:, :2]).view(len(anchors), *between, 2)
    center = anchors[:, :2].view(len(anchors), *between, 2) + 0.5 * size
    scaled = transforms / transforms.new_tensor(weights)
    center = scaled[..., :2] * size + center
    half = 0.5 * scaled[..., 2:].clamp(max=largest).exp() * size
    return torch.cat([center - half, center + half], dim=-1)
