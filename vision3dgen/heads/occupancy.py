"""An implicit surface: the probability that a point is inside, conditioned on a global code.

Source: Mescheder et al. 2019, Occupancy Networks (arXiv:1812.03828). Decoder: points -> 5 residual blocks with
conditional batch normalization -> one logit per point; loss: binary cross-entropy summed over points, averaged over
shapes; surface: multiresolution isosurface extraction. Parameter names are the published code's (`decoder.*`, and `fc`
for its `encoder.fc`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.head import Head, View
from vision3dgen.layers import ConditionalBatchNorm1d
from vision3dgen.ops import extract_surface
from vision3dgen.structures import Meshes, join_meshes_as_batch


class _ResidualBlock(nn.Module):
    """Two point-wise layers, each after a conditional batch normalization and ReLU, and the identity."""

    def __init__(self, code_channels: int, channels: int):
        super().__init__()
        self.bn_0 = ConditionalBatchNorm1d(code_channels, channels)
        self.bn_1 = ConditionalBatchNorm1d(code_channels, channels)
        self.fc_0 = nn.Conv1d(channels, channels, 1)
        self.fc_1 = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.fc_1.weight)

    def forward(self, x: Float[Tensor, "B C N"], code: Float[Tensor, "B K 1"]) -> Float[Tensor, "B C N"]:
        hidden = self.fc_0(self.bn_0(x, code).relu())
        return x + self.fc_1(self.bn_1(hidden, code).relu())


class OccupancyDecoder(nn.Module):
    """Logit of being inside at points (B, N, 3), given codes (B, K)."""

    def __init__(self, code_channels: int = 256, hidden: int = 256):
        super().__init__()
        self.fc_p = nn.Conv1d(3, hidden, 1)
        for index in range(5):
            setattr(self, f"block{index}", _ResidualBlock(code_channels, hidden))
        self.bn = ConditionalBatchNorm1d(code_channels, hidden)
        self.fc_out = nn.Conv1d(hidden, 1, 1)

    def forward(self, points: Float[Tensor, "B N 3"], code: Float[Tensor, "B K"]) -> Float[Tensor, "B N"]:
        code = code[..., None]  # (B, K, 1)
        x = self.fc_p(points.transpose(1, 2))  # (B, C, N)
        for index in range(5):
            x = getattr(self, f"block{index}")(x, code)
        return self.fc_out(self.bn(x, code).relu())[:, 0]


@dataclass(frozen=True)
class OccupancyField:
    """The predicted fields of a batch of shapes: call it with points (B, N, 3) for logits (B, N)."""

    decoder: nn.Module  # maps points (B, N, 3) and codes (B, K) to logits (B, N)
    code: Float[Tensor, "B K"]

    def __call__(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        return self.decoder(points, self.code)

    def __len__(self) -> int:
        return len(self.code)

    def __getitem__(self, index: int) -> "OccupancyField":
        return OccupancyField(self.decoder, self.code[index : index + 1])


class OccupancyHead(Head):
    """A field per image: global code from the coarsest map, decoded at any points.

    threshold: probability at which the surface lies (0.2 in the paper). resolution: cells of the first extraction grid
    over [-0.55, 0.55]^3, doubled `upsampling_steps` times where the surface passes.
    """

    def __init__(
        self, channels: list[int], *, code_channels: int = 256, hidden: int = 256, threshold: float = 0.2,
        resolution: int = 32, upsampling_steps: int = 2,
    ):  # fmt: skip
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}")
        self.threshold: float = threshold
        self.box = (-0.55, 0.55)  # the cube query points are drawn from
        self.resolution = resolution
        self.upsampling_steps = upsampling_steps
        self.fc = nn.Linear(channels[-1], code_channels)
        self.decoder = OccupancyDecoder(code_channels, hidden)

    def forward(self, features: list[Tensor], view: View | None = None) -> OccupancyField:
        return OccupancyField(self.decoder, self.fc(features[-1].mean(dim=(2, 3))))

    def loss(self, prediction: OccupancyField, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Binary cross-entropy at `batch["points"]` (B, N, 3) against `batch["occupancies"]` (B, N)."""
        logits = prediction(batch["points"]).float()
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, batch["occupancies"], reduction="none").sum(1).mean()
        }

    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float:
        """log 2 for each point: an untrained field knows nothing."""
        return batch["occupancies"].shape[1] * math.log(2)

    def shape(self, prediction: OccupancyField) -> Meshes:
        """The level set at `threshold` of each field, by multiresolution extraction."""
        return join_meshes_as_batch([self._extract(prediction[index]) for index in range(len(prediction))])

    @torch.no_grad()
    def _extract(self, field: OccupancyField) -> Meshes:
        def logit(points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
            return field(points[None])[0].float()  # closer to linear between samples than the probability

        return extract_surface(
            logit,
            self.box,
            level=math.log(self.threshold / (1 - self.threshold)),
            resolution0=self.resolution,
            upsampling_steps=self.upsampling_steps,
            device=field.code.device,
        ).mesh

    def occupancy(self, prediction: OccupancyField, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        return prediction(points).float().sigmoid()
