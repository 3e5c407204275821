"""Errors of predicted normals: the angle to the true normal, in degrees, per picture.

Differs: the numbers published on NYU Depth v2 (Fouhey et al. 2013 and their successors) are taken over the
pixels of all pictures at once; here each picture has its own, and a set's number is the mean of these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision3dgen.metrics.maps import MapEvaluator, Measured
from vision3dgen.ops.depth import pixels_with_depth

LIMITS = (11.25, 22.5, 30.0)  # degrees


class NormalErrors(NamedTuple):
    """Per picture (B,), angles in degrees; NaN for a picture without a valid pixel."""

    mean: Tensor
    median: Tensor
    rmse: Tensor
    within_11_25: Tensor
    within_22_5: Tensor
    within_30: Tensor


def angles_between(a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B H W"]:
    """Angles in degrees, in float64, whatever the lengths; 90 where either vector is 0."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=1, eps=1e-30) for x in (a, b))
    sine, cosine = torch.linalg.cross(a, b, dim=1).norm(dim=1), (a * b).sum(1)
    known = (a != 0).any(1) & (b != 0).any(1)
    return torch.rad2deg(torch.atan2(sine, cosine)).where(known, 90.0)


def normal_errors(
    prediction: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"], mask: Tensor | None = None
) -> NormalErrors:
    """Statistics of the angles over each picture's pixels with a true normal that is not 0 and which are in `mask`."""
    valid = pixels_with_depth(target.norm(dim=1, keepdim=True), mask)
    angles = angles_between(prediction, target)
    columns = [_statistics(own[kept]) for own, kept in zip(angles, valid)]
    if not columns:
        return NormalErrors(*[angles.new_zeros(0)] * 6)
    return NormalErrors(*torch.stack(columns).unbind(1))


def _statistics(angles: Float[Tensor, " N"]) -> Float[Tensor, " 6"]:
    if not len(angles):
        return angles.new_full((6,), torch.nan)
    within = [(angles < limit).double().mean() for limit in LIMITS]
    ordered = angles.sort().values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return torch.stack([angles.mean(), median, angles.square().mean().sqrt(), *within])


@dataclass(frozen=True, kw_only=True)
class NormalsEvaluator(MapEvaluator):
    """Predicted "normals" against batch["normals"] (B, 3, H, W), where the true normal is not 0."""

    target: ClassVar[str] = "normals"
    shares: ClassVar[tuple[str, ...]] = ("within_11_25", "within_22_5", "within_30")

    @property
    def names(self) -> Sequence[str]:
        return ["normals"]

    def describe(self, name: str) -> dict[str, Any]:
        return {"name": name, "limits": list(LIMITS), "citation": "Fouhey et al. 2013, averaged over pictures"}

    def valid(self, name: str, target: Tensor) -> Bool[Tensor, "H W"]:
        return pixels_with_depth(target.norm(dim=0)[None, None])[0]

    def measure(self, name: str, maps: Mapping[str, Tensor], target: Tensor, valid: Bool[Tensor, "H W"]) -> Measured:
        """A normal of 0 is 90 degrees from every other."""
        errors = normal_errors(maps["normals"][None], target[None], valid[None, None])
        none = (maps["normals"] == 0).all(0)[valid]
        return Measured({key: float(value) for key, value in errors._asdict().items()}, int(none.sum()))
