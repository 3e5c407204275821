"""Depth of every pixel, and the surface that it shows.

A decoder with skips over the backbone's maps, one bounded value per pixel, losses by name: the usual recipe since BTS
(Lee et al. 2019, arXiv:1907.10326), on any backbone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice
from vision3dgen.heads.decoder import SkipDecoder
from vision3dgen.heads.head import Head, View
from vision3dgen.losses import (
    gradient_matching_loss,
    scale_invariant_depth_loss,
    silog_loss,
    virtual_normal_loss,
)
from vision3dgen.metrics.depth import depth_errors
from vision3dgen.ops.depth import MAX_JUMP, depth_to_mesh, depth_to_points, pixels_with_depth
from vision3dgen.structures import Camera, Meshes


class DepthPrediction(NamedTuple):
    """The depth head's own kind of prediction."""

    depth: Tensor  # (B, 1, H, W) of every pixel, between the head's bounds
    logits: Tensor | None  # (B, 1, H, W) of showing the object, for a head with a foreground
    cameras: Camera | None  # of the pictures


def _linear(share: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * share


def _log(share: Tensor, low: float, high: float) -> Tensor:
    return low * (share * math.log(high / low)).exp()


def _inverse(share: Tensor, low: float, high: float) -> Tensor:
    return 1 / (1 / high + (1 / low - 1 / high) * share)


FORMS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"linear": _linear, "log": _log, "inverse": _inverse}


def _absolute(prediction: Tensor, target: Tensor) -> Tensor:
    valid = pixels_with_depth(target)[:, None]
    return ((prediction - target.where(valid, 0)).abs() * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3)).clamp(min=1)


def _variance(prediction: Tensor, target: Tensor) -> Tensor:
    return silog_loss(prediction, target, weight=1.0)


def _log_error(prediction: Tensor, target: Tensor) -> Tensor:
    return scale_invariant_depth_loss(prediction, target, weight=0.0)


DEPTH_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silog": silog_loss,
    "silog_variance": _variance,
    "scale_invariant": scale_invariant_depth_loss,
    "squared_log": _log_error,
    "absolute": _absolute,
    "gradient_matching": gradient_matching_loss,
}
VIRTUAL_NORMALS = "virtual_normals"  # the one that needs cameras


FOREGROUND = 0.15  # about the share of a rendering that its object covers, which the mask starts at


class DepthHead(Head):
    """Depth (B, 1, H, W) of every pixel of the view, along the optical axis.

    channels, strides: the backbone's. min_depth, max_depth: bounds, in the unit of the data. form: how the network's
    output x reaches them: "linear" low + (high - low) σ(x), "log" linear in the logarithm, "inverse" in 1 / depth.
    objective: a loss of `DEPTH_LOSSES` or "virtual_normals" (which needs the batch's camera), or several with weights.
    foreground: weight of the cross-entropy of a mask that is predicted beside the depth, against `batch["mask"]`, else
    where the true depth is above 0; 0 predicts none. Depth is learned where the truth is above 0. upsampling, width: of
    the `SkipDecoder`. max_jump: which neighbors `shape` joins, see `ops.depth_to_mesh`.
    """

    frame = "camera"

    def __init__(
        self, channels: list[int], strides: list[int], *, max_depth: float, min_depth: float = 1e-3,
        form: Literal["linear", "log", "inverse"] = "linear", objective: str | dict[str, float] = "silog",
        foreground: float = 0.0, upsampling: str = "bilinear", width: int = 32, max_jump: float = MAX_JUMP,
    ):  # fmt: skip
        super().__init__()
        if not 0 < min_depth < max_depth:
            raise ValueError(f"min_depth must be above 0 and below max_depth, got {min_depth} and {max_depth}")
        if not foreground >= 0:
            raise ValueError(f"foreground must be a weight of at least 0, got {foreground}")
        check_choice("form", form, FORMS)
        self.objective = {objective: 1.0} if isinstance(objective, str) else dict(objective)
        for name in self.objective:
            check_choice("objective", name, (*DEPTH_LOSSES, VIRTUAL_NORMALS))
        if not self.objective:
            raise ValueError("objective must name at least one loss")
        self.bounds, self.form, self.foreground, self.max_jump = (min_depth, max_depth), form, foreground, max_jump
        self.decoder = SkipDecoder(channels, strides, width=width, name=upsampling)
        self.last = nn.Conv2d(width, 2 if foreground else 1, 1)
        if foreground:
            assert self.last.bias is not None
            with torch.no_grad():
                self.last.bias[1] = math.log(FOREGROUND / (1 - FOREGROUND))

    def forward(self, features: list[Tensor], view: View | None = None) -> DepthPrediction:
        if view is None:
            raise ValueError("the depth head needs a view: it predicts pictures of its size")
        x = self.last(self.decoder(features, view.image_size)).float()
        depth = FORMS[self.form](x[:, :1].sigmoid(), *self.bounds)
        return DepthPrediction(depth, x[:, 1:] if self.foreground else None, view.cameras)

    def loss(self, prediction: DepthPrediction, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The objective's terms and their weighted sum, means over pictures; `batch["depth"]` is (B, 1, H, W)."""
        target = self._target(prediction, batch)
        terms = {name: self._term(name, prediction, target).mean() for name in self.objective}
        total = torch.stack([weight * terms[name] for name, weight in self.objective.items()]).sum()
        if prediction.logits is not None:
            terms["foreground"] = F.binary_cross_entropy_with_logits(prediction.logits, self._mask(target, batch))
            total = total + self.foreground * terms["foreground"]
        return {"loss": total, **terms}

    def _term(self, name: str, prediction: DepthPrediction, target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, " B"]:
        if name != VIRTUAL_NORMALS:
            return DEPTH_LOSSES[name](prediction.depth, target)
        if prediction.cameras is None:
            raise ValueError(f"objective {name!r} needs the batch's camera: add it to the data's fields")
        return virtual_normal_loss(*(depth_to_points(d, prediction.cameras) for d in (prediction.depth, target)))

    @staticmethod
    def _target(prediction: DepthPrediction, batch: Mapping[str, Any]) -> Float[Tensor, "B 1 H W"]:
        if batch["depth"].shape != prediction.depth.shape:
            raise ValueError(
                f"the depth head predicts {tuple(prediction.depth.shape)}, but the data's depth is "
                f"{tuple(batch['depth'].shape)}: both must have the size of the image"
            )
        return batch["depth"].float()

    @staticmethod
    def _mask(target: Float[Tensor, "B 1 H W"], batch: Mapping[str, Any]) -> Float[Tensor, "B 1 H W"]:
        return batch["mask"].float() if "mask" in batch else pixels_with_depth(target)[:, None].float()

    def shape(self, prediction: DepthPrediction) -> Meshes:
        """The visible surface in the camera's frame, of the foreground if one is predicted; empty without cameras."""
        if prediction.cameras is None:
            nothing = prediction.depth.new_zeros(len(prediction.depth), 0, 3)
            return Meshes(list(nothing), list(nothing.long()))
        mask = None if prediction.logits is None else prediction.logits > 0
        return depth_to_mesh(prediction.depth, prediction.cameras, mask, max_jump=self.max_jump)

    def maps(self, prediction: DepthPrediction) -> dict[str, Float[Tensor, "B C H W"]]:
        """Under "depth" that of every pixel, background too; under "mask" probabilities, if there is a foreground."""
        pictures = {"depth": prediction.depth}
        return pictures if prediction.logits is None else {**pictures, "mask": prediction.logits.sigmoid()}

    def validation_metrics(
        self, prediction: DepthPrediction, batch: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, " B"]]:
        """abs_rel, rmse, delta1, and mask_iou with a foreground; errors of 0 for a picture without true depth."""
        target = self._target(prediction, batch)
        errors = depth_errors(prediction.depth, target)
        measured = {name: getattr(errors, name).nan_to_num(0) for name in ("abs_rel", "rmse", "delta1")}
        if prediction.logits is not None:
            found, true = (x.flatten(1) for x in (prediction.logits > 0, self._mask(target, batch) > 0.5))
            either = (found | true).sum(1)
            measured["mask_iou"] = torch.where(either > 0, (found & true).sum(1) / either.clamp(min=1), 1.0)
        return measured
