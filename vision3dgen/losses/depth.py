"""Losses on pictures of depth and normals: one number per picture, over its valid pixels.

A pixel is valid where the true depth is positive and finite and the mask, if there is one, is set; a picture without
valid pixels has the loss 0, which keeps the graph. With ŷ the prediction, y the truth and n valid pixels,
d = log ŷ - log y. Predictions below `SMALLEST` count as that, without gradient, so that no logarithm is infinite.
Half precision is computed in float32.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.ops.backends import raise_half
from vision3dgen.ops.depth import pixels_with_depth

SMALLEST = 1e-6  # depth


def scale_invariant_depth_loss(
    prediction: Float[Tensor, "B 1 H W"],
    target: Float[Tensor, "B 1 H W"],
    mask: Tensor | None = None,
    *,
    weight: float = 0.5,
) -> Float[Tensor, " B"]:
    """mean(d²) - weight * mean(d)²: `weight` is λ, 0 the squared logarithmic error, 1 its variance, blind to scale.

    Source: Eigen et al. 2014 (arXiv:1406.2283), equation 4, with λ = 0.5. A prediction k times the truth has
    (1 - λ) (log k)².
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be from 0 to 1, got {weight}")
    difference, valid = _log_difference(prediction, target, mask)
    mean = _mean(difference, valid)
    variance = _mean((difference - mean[:, None]).square(), valid)  # not mean(d²) - mean(d)², which cancels
    return variance + (1 - weight) * mean.square()


def silog_loss(
    prediction: Float[Tensor, "B 1 H W"],
    target: Float[Tensor, "B 1 H W"],
    mask: Tensor | None = None,
    *,
    weight: float = 0.85,
    factor: float = 10.0,
) -> Float[Tensor, " B"]:
    """factor * sqrt(mean(d²) - weight * mean(d)²), with no gradient where it is 0.

    The defaults are BTS's (Lee et al. 2019, arXiv:1907.10326, equation 4); weight 1 and factor 100 give KITTI's SILog.
    """
    value = scale_invariant_depth_loss(prediction, target, mask, weight=weight)
    return factor * value.where(value > 0, 1).sqrt().where(value > 0, 0 * value)


def gradient_matching_loss(
    prediction: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"], mask: Tensor | None = None, *,
    scales: int = 4,
) -> Float[Tensor, " B"]:  # fmt: skip
    """Sum over scales of Σ (|∂x d| + |∂y d|) / n: edges of depth should be where the truth has them.

    Scale k takes every 2^k-th pixel of rows and columns, and differences between neighbors of which both are valid; n
    counts the valid pixels taken. Source: Li and Snavely 2018, MegaDepth (arXiv:1804.00607), section 4.
    """
    if scales < 1:
        raise ValueError(f"scales must be at least 1, got {scales}")
    shape = prediction.shape[0], *prediction.shape[2:]
    flat, flat_valid = _log_difference(prediction, target, mask)
    difference, valid = flat.view(shape), flat_valid.view(shape)
    total = flat.sum(1) * 0
    for scale in range(scales):
        d, v = difference[:, :: 2**scale, :: 2**scale], valid[:, :: 2**scale, :: 2**scale]
        changes = sum(
            (d.diff(dim=axis).abs() * (v.narrow(axis, 1, size) & v.narrow(axis, 0, size))).sum((1, 2))
            for axis in (1, 2)
            if (size := d.shape[axis] - 1) > 0
        )
        total = total + changes / v.sum((1, 2)).clamp(min=1)
    return total


def virtual_normal_loss(
    prediction: Float[Tensor, "B H W 3"],
    target: Float[Tensor, "B H W 3"],
    mask: Tensor | None = None,
    *,
    samples: int = 1000,
    min_side: float = 0.1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    """Mean L1 distance of the unit normals of planes through three pixels, in camera axes: the large shape.

    prediction, target: points of the pixels, as of `ops.depth_to_points`; mask (B, 1, H, W). Of `samples` triples drawn
    from the valid pixels those count whose true triangle has angles of 30° to 120° and sides of at least `min_side`
    times the mean true depth. One generator gives the pixels of all pictures, in order. Source: Yin et al. 2019
    (arXiv:1907.12209). Differs: sides are relative to depth (there 0.6 m), and no share of small losses is left out.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    prediction, target = raise_half(prediction), raise_half(target)
    valid = pixels_with_depth(target[..., 2][:, None], mask).flatten(1)  # (B, N)
    count = valid.sum(1)
    first = valid.sort(dim=1, descending=True, stable=True).indices  # (B, N) valid pixels first
    drawn = torch.rand(len(valid), samples * 3, generator=generator, device=_device(generator, valid.device))
    place = (drawn.to(valid.device) * count[:, None]).long()
    index = first.gather(1, place.minimum((count[:, None] - 1).clamp(min=0)))  # (B, 3 S)
    corners = target.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 3)).unflatten(1, (samples, 3))
    moved = prediction.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 3)).unflatten(1, (samples, 3))
    with torch.no_grad():
        sides = corners.roll(-1, 2) - corners  # (B, S, 3, 3) from each corner to the next
        lengths = sides.norm(dim=-1)
        cosines = -(sides * sides.roll(1, 2)).sum(-1) / (lengths * lengths.roll(1, 2)).clamp(min=1e-30)  # of the angles
        scale = (target[..., 2].flatten(1) * valid).nan_to_num(0, 0, 0).sum(1) / count.clamp(min=1)
        used = (lengths >= min_side * scale[:, None, None]).all(-1) & (lengths > 0).all(-1)
        used &= (cosines <= 3**0.5 / 2).all(-1) & (cosines >= -0.5).all(-1) & (count > 0)[:, None]
    true_normal = _plane_normals(corners.where(used[..., None, None], 0))
    normal = _plane_normals(moved.where(used[..., None, None], 0))
    return _mean((normal - true_normal).abs().sum(-1), used)


def _device(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return device if generator is None else generator.device


def _plane_normals(corners: Float[Tensor, "B S 3 3"]) -> Float[Tensor, "B S 3"]:
    """Unit normals of triangles; zero, without gradient, where a triangle has no area."""
    return _unit(torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0]))


def normals_loss(
    prediction: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "B 3 H W"],
    mask: Tensor | None = None,
    *,
    kind: Literal["cosine", "angular"] = "cosine",
) -> Float[Tensor, " B"]:
    """Mean of 1 - cos of the angle between the normals, or of the angle in radians, where there is a true normal.

    Lengths do not matter; a predicted vector of 0 counts as perpendicular. A pixel is valid where the target is not 0
    and the mask (B, 1, H, W), if there is one, is set. The angle is from atan2 (|a × b|, a · b): acos has an infinite
    gradient where it is 0.
    """
    check_choice("kind", kind, ("cosine", "angular"))
    _check_same(prediction, target)
    valid = pixels_with_depth(target.norm(dim=1, keepdim=True), mask).flatten(1)
    a, b = (_unit(raise_half(x).permute(0, 2, 3, 1).flatten(1, 2)) for x in (prediction, target))
    a, b = a.where(valid[..., None], 0), b.where(valid[..., None], 0)
    cosine = (a * b).sum(-1)
    if kind == "cosine":
        return _mean(1 - cosine, valid)
    sine = _length(torch.linalg.cross(a, b))
    known = valid & ((sine > 0) | (cosine != 0))
    angle = torch.atan2(sine.where(known, 1), cosine.where(known, 0))
    return _mean(angle, valid)


def _log_difference(
    prediction: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"], mask: Tensor | None
) -> tuple[Float[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """d at every pixel, 0 where it is not valid, and where it is."""
    _check_same(prediction, target)
    valid = pixels_with_depth(target, mask).flatten(1)
    prediction, target = raise_half(prediction).flatten(1), raise_half(target).flatten(1)
    # the places that do not count are set before the logarithm: after it, their gradient would be NaN
    difference = prediction.where(valid, 1).clamp(min=SMALLEST).log() - target.where(valid, 1).log()
    return difference, valid


def _mean(values: Float[Tensor, "B N"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Over the valid places of each row; 0, with the graph, where there are none."""
    return (values * valid).sum(1) / valid.sum(1).clamp(min=1)


def _length(vectors: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N"]:
    """With a gradient of 0, not NaN, at 0."""
    squared = vectors.square().sum(-1)
    return squared.where(squared > 0, 1).sqrt().where(squared > 0, 0 * squared)


def _unit(vectors: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
    length = _length(vectors)[..., None]
    return vectors / length.where(length > 0, 1)


def _check_same(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction must be {tuple(target.shape)} like the truth, got {tuple(prediction.shape)}")
