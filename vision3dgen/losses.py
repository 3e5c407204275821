"""Losses on point clouds and meshes: pure functions of tensors, `Meshes` and `Pointclouds` (ours or PyTorch3D's).

Names, arguments and results follow PyTorch3D 0.7.9 where it has the loss. Every loss is finite, in value and gradient,
on empty members, duplicate points and faces without area. Half precision is computed, and returned, in float32.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice, check_shape
from vision3dgen.ops.backends import raise_half
from vision3dgen.ops.points import PointcloudsLike, checked_cloud, knn_gather, knn_points, within

# ------------------------------------------------------------------------------------------------ point clouds


class Chamfer(NamedTuple):
    """A loss and, when normals were given, the loss on normals; each a pair per point when nothing is reduced."""

    loss: Any
    loss_normals: Any


def _as_padded(
    name: str, points: Tensor | PointcloudsLike, lengths: Tensor | None, normals: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Padded points, lengths and normals of a tensor or a batch of clouds, in float32 or better."""
    if not isinstance(points, Tensor):
        lengths, normals = points.num_points_per_cloud(), points.normals_padded()  # type: ignore[attr-defined]
        points = points.points_padded()
    elif points.ndim != 3:
        raise ValueError(f"{name} must be point clouds or (B N D), got {tuple(points.shape)}")
    if normals is not None:
        check_shape(**{name: (points, "B N D"), f"{name}_normals": (normals, "B N 3")})
        normals = raise_half(normals)
    return *checked_cloud(name, raise_half(points), lengths), normals


def chamfer_distance(
    x: Float[Tensor, "B N D"] | PointcloudsLike,
    y: Float[Tensor, "B M D"] | PointcloudsLike,
    x_lengths: Int[Tensor, " B"] | None = None,
    y_lengths: Int[Tensor, " B"] | None = None,
    x_normals: Float[Tensor, "B N 3"] | None = None,
    y_normals: Float[Tensor, "B M 3"] | None = None,
    weights: Float[Tensor, " B"] | None = None,
    batch_reduction: str | None = "mean",
    point_reduction: str | None = "mean",
    norm: int = 2,
    single_directional: bool = False,
    abs_cosine: bool = True,
) -> Chamfer:
    """Distance of each point to the nearest point of the other cloud, both directions summed.

    norm 2 is the SQUARED Euclidean distance, norm 1 the Manhattan distance: two points (3, 4) apart are 50 and 14.
    `point_reduction` mean, sum, max (of both directions) or None; `batch_reduction` mean, sum or None. With neither,
    each result is the pair (x to y, y to x). The loss on normals is 1 - |cos| (or 1 - cos) between neighbors.
    `weights` (B,) multiply each cloud's distances; the mean over the batch divides by their sum.
    Differs: a cloud that is empty, or whose partner is, adds zero whatever the reduction (PyTorch3D: sometimes NaN).
    """
    check_choice("batch_reduction", batch_reduction, ("mean", "sum", None))
    check_choice("point_reduction", point_reduction, ("mean", "sum", "max", None))
    if point_reduction is None and batch_reduction is not None:
        raise ValueError(f"batch_reduction must be None when point_reduction is None, got {batch_reduction!r}")
    x, x_lengths, x_normals = _as_padded("x", x, x_lengths, x_normals)
    y, y_lengths, y_normals = _as_padded("y", y, y_lengths, y_normals)
    check_shape(x=(x, "B N D"), y=(y, "B M D"))
    if point_reduction == "max" and (x_normals is not None or y_normals is not None):
        raise ValueError('point_reduction "max" takes no normals: the farthest point says nothing about them')
    if weights is not None:
        check_shape(x=(x, "B N D"), weights=(weights, "B"))
        if bool((weights < 0).any()):
            raise ValueError(f"weights must not be negative, got {weights.tolist()}")

    directions = [_directed(x, y, x_lengths, y_lengths, x_normals, y_normals, weights, norm, abs_cosine)]
    if not single_directional:
        directions.append(_directed(y, x, y_lengths, x_lengths, y_normals, x_normals, weights, norm, abs_cosine))
    if point_reduction is None:
        if single_directional:
            return Chamfer(*directions[0])
        distances, cosines = zip(*directions)
        return Chamfer(distances, None if cosines[0] is None else cosines)

    counts = [x_lengths, y_lengths][: len(directions)]
    losses = []
    for kind in zip(*directions):  # distances of each direction, then normals of each direction
        reduced = [_reduce_points(values, count, point_reduction) for values, count in zip(kind, counts)]
        losses.append(_reduce_batch(reduced, weights, point_reduction, batch_reduction))
    return Chamfer(*losses)


def _directed(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    x_normals: Tensor | None,
    y_normals: Tensor | None,
    weights: Tensor | None,
    norm: int,
    abs_cosine: bool,
) -> tuple[Tensor, Tensor | None]:
    """Distance and, with normals, 1 - cosine from each point of x to its neighbor in y (B, N), zero where none."""
    nearest = knn_points(x, y, x_lengths, y_lengths, norm=norm, K=1)
    distance = nearest.dists[..., 0]
    cosine = None
    if x_normals is not None and y_normals is not None:
        facing = torch.cosine_similarity(
            x_normals, knn_gather(y_normals, nearest.idx, y_lengths)[:, :, 0], dim=2, eps=1e-6
        )
        cosine = 1 - (facing.abs() if abs_cosine else facing)
        if x_lengths is not None:
            cosine = cosine.where(within(x_lengths, x.shape[1]), 0)
        if y_lengths is not None:
            cosine = cosine.where(y_lengths[:, None] > 0, 0)
    if weights is not None:
        distance = distance * weights[:, None]
        cosine = None if cosine is None else cosine * weights[:, None]
    return distance, cosine


def _reduce_points(values: Tensor | None, lengths: Tensor | None, reduction: str) -> Tensor | None:
    if values is None:
        return None
    if reduction == "max":
        return values.amax(1) if values.shape[1] else values.sum(1)
    total = values.sum(1)
    if reduction == "sum":
        return total
    return total / (max(values.shape[1], 1) if lengths is None else lengths.clamp(min=1))


def _reduce_batch(
    directions: list[Tensor | None], weights: Tensor | None, point_reduction: str, reduction: str | None
) -> Tensor | None:
    parts = [part for part in directions if part is not None]
    if not parts:
        return None
    both = torch.stack(parts)  # (1 or 2, B)
    each = both.amax(0) if point_reduction == "max" else both.sum(0)
    if reduction is None:
        return each
    total = each.sum()
    if reduction == "sum":
        return total
    if weights is None:
        return total / max(len(each), 1)
    mass = weights.sum()
    return total / mass.where(mass > 0, 1)
