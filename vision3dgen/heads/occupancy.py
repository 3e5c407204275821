"""An implicit surface: the probability that a point is inside, conditioned on a global code.

Source: Mescheder et al. 2019, Occupancy Networks (arXiv:1812.03828). Decoder: points -> 5 residual blocks with
conditional batch normalization -> one logit per point; loss: binary cross-entropy summed over points, averaged over
shapes; surface: multiresolution isosurface extraction. With latent channels it is the generative model of section 3.2:
z ~ q(z | points, occupancies, code) in training, whose divergence from N(0, 1) is added to the loss. Parameter names
are the published code's (`decoder.*`, `encoder_latent.*`, and `fc` for its `encoder.fc`).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.head import Head, View
from vision3dgen.layers import ConditionalBatchNorm1d
from vision3dgen.ops import extract_surface, field_normals, refine_surface, simplify_mesh
from vision3dgen.structures import Meshes, join_meshes_as_batch


@dataclass(frozen=True)
class OccupancyField:
    """The predicted fields of a batch of shapes: call it with points (B, N, 3) for logits (B, N)."""

    decoder: Callable[..., Tensor]  # maps points (B, N, 3) and the conditions to logits (B, N)
    conditions: tuple[Tensor, ...]  # what is known of each shape: (B, ...) each

    def __call__(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        return self.decoder(points, *self.conditions)

    def __len__(self) -> int:
        return len(self.conditions[0])

    def __getitem__(self, index: int) -> "OccupancyField":
        return OccupancyField(self.decoder, tuple(known[index : index + 1] for known in self.conditions))

    @property
    def device(self) -> torch.device:
        return self.conditions[0].device

    def probability(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Of one shape, the probability that each point is inside."""
        return self(points[None])[0].float().sigmoid()


class FieldHead(Head):
    """What all heads that predict an `OccupancyField` do with it; `forward` is left to them.

    threshold: probability at which the surface lies (0.2 in the papers). resolution: cells of the first extraction grid
    over [-0.55, 0.55]^3, doubled `upsampling_steps` times where the surface passes. faces: to how many a mesh is
    simplified then (by Open3D). refinement_steps: of gradient descent on its vertices after that, which takes minutes
    for a large network on a CPU.
    """

    def __init__(
        self, *, threshold: float, resolution: int, upsampling_steps: int, faces: int | None, refinement_steps: int
    ):
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}")
        if resolution < 1 or upsampling_steps < 0 or refinement_steps < 0:
            raise ValueError(
                "resolution must be at least 1, upsampling_steps and refinement_steps at least 0, got "
                f"{resolution}, {upsampling_steps} and {refinement_steps}"
            )
        self.threshold: float = threshold
        self.box = (-0.55, 0.55)  # the cube query points are drawn from
        self.resolution, self.upsampling_steps = resolution, upsampling_steps
        self.faces, self.refinement_steps = faces, refinement_steps

    @abstractmethod
    def forward(self, features: list[Tensor], view: View | None = None) -> OccupancyField:
        """The field of each member of the batch."""

    def loss(self, prediction: OccupancyField, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Binary cross-entropy at `batch["points"]` (B, N, 3) against `batch["occupancies"]` (B, N)."""
        return {"loss": cross_entropy(prediction(batch["points"]), batch["occupancies"])}

    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float | None:
        """log 2 for each point: an untrained field knows nothing."""
        return batch["occupancies"].shape[1] * math.log(2)

    def shape(self, prediction: OccupancyField) -> Meshes:
        """The level set at `threshold` of each field, by multiresolution extraction."""
        return join_meshes_as_batch([self._extract(prediction[index]) for index in range(len(prediction))])

    @torch.no_grad()
    def _extract(self, field: OccupancyField) -> Meshes:
        def logit(points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
            return field(points[None])[0].float()  # closer to linear between samples than the probability

        mesh = extract_surface(
            logit,
            self.box,
            level=math.log(self.threshold / (1 - self.threshold)),
            resolution0=self.resolution,
            upsampling_steps=self.upsampling_steps,
            device=field.device,
        ).mesh
        if self.faces is not None:
            mesh = simplify_mesh(mesh, self.faces)
        if self.refinement_steps:
            generator = torch.Generator(field.device).manual_seed(0)  # the same mesh for the same field
            steps = self.refinement_steps
            mesh = refine_surface(mesh, field.probability, level=self.threshold, steps=steps, generator=generator)
        return mesh

    def normals(self, prediction: OccupancyField, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        """Outward unit normals of the level sets through points, from the fields' gradients."""
        return torch.stack([field_normals(prediction[i].probability, own) for i, own in enumerate(points)])

    def occupancy(self, prediction: OccupancyField, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        return prediction(points).float().sigmoid()


def cross_entropy(logits: Float[Tensor, "B N"], occupancies: Float[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Summed over points, averaged over shapes: equation 3 of the paper, and its published code."""
    return F.binary_cross_entropy_with_logits(logits.float(), occupancies, reduction="none").sum(1).mean()


# ----------------------------------------------------------------------------------------------- the global code


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
    """Logit of being inside at points (B, N, 3), given codes (B, K) and, with latent channels, z (B, Z)."""

    def __init__(self, code_channels: int = 256, hidden: int = 256, latent_channels: int = 0):
        super().__init__()
        self.fc_p = nn.Conv1d(3, hidden, 1)
        self.fc_z = nn.Linear(latent_channels, hidden) if latent_channels else None
        for index in range(5):
            setattr(self, f"block{index}", _ResidualBlock(code_channels, hidden))
        self.bn = ConditionalBatchNorm1d(code_channels, hidden)
        self.fc_out = nn.Conv1d(hidden, 1, 1)

    def forward(
        self, points: Float[Tensor, "B N 3"], code: Float[Tensor, "B K"], z: Float[Tensor, "B Z"] | None = None
    ) -> Float[Tensor, "B N"]:
        code = code[..., None]  # (B, K, 1)
        x = self.fc_p(points.transpose(1, 2))  # (B, C, N)
        if self.fc_z is not None:
            x = x + self.fc_z(z)[..., None]
        for index in range(5):
            x = getattr(self, f"block{index}")(x, code)
        return self.fc_out(self.bn(x, code).relu())[:, 0]


class Posterior(NamedTuple):
    """A normal distribution of independent variables for each member of a batch."""

    mean: Float[Tensor, "B Z"]
    log_deviation: Float[Tensor, "B Z"]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B Z"]:
        """One draw each, differentiable in the parameters."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.log_deviation.exp() * noise

    def divergence(self) -> Float[Tensor, " B"]:
        """Kullback-Leibler divergence from N(0, 1), in nats, summed over the variables."""
        variance = (2 * self.log_deviation).exp()
        return (variance + self.mean.square() - 1 - 2 * self.log_deviation).sum(1) / 2


class LatentEncoder(nn.Module):
    """q(z | points, occupancies, code): layers of 128 on each point, two of which see the maximum over all points."""

    def __init__(self, latent_channels: int, code_channels: int):
        super().__init__()
        self.fc_pos = nn.Linear(3, 128)
        self.fc_c = nn.Linear(code_channels, 128)
        self.fc_0 = nn.Linear(1, 128)
        self.fc_1 = nn.Linear(128, 128)
        self.fc_2 = nn.Linear(256, 128)
        self.fc_3 = nn.Linear(256, 128)
        self.fc_mean = nn.Linear(128, latent_channels)
        self.fc_logstd = nn.Linear(128, latent_channels)

    def forward(
        self, points: Float[Tensor, "B N 3"], occupancies: Float[Tensor, "B N"], code: Float[Tensor, "B K"]
    ) -> Posterior:
        x = self.fc_0(occupancies[..., None]) + self.fc_pos(points) + self.fc_c(code)[:, None]  # (B, N, 128)
        x = self.fc_1(x.relu())
        for layer in (self.fc_2, self.fc_3):
            maximum = x.amax(1, keepdim=True).expand_as(x)
            x = layer(torch.cat([x, maximum], dim=2).relu())
        top = x.amax(1)
        return Posterior(self.fc_mean(top), self.fc_logstd(top))


class OccupancyHead(FieldHead):
    """A field per image or shape: a global code from the coarsest map, decoded at any points.

    code_channels: of the linear layer on the map's mean; None takes the mean as the code, as from an encoder of shapes.
    latent_channels: of z; with them `forward` gives the field of the prior's mean, z = 0, and `draw` others. The rest
    as for `FieldHead`.
    """

    def __init__(
        self, channels: list[int], *, code_channels: int | None = 256, hidden: int = 256, latent_channels: int = 0,
        threshold: float = 0.2, resolution: int = 32, upsampling_steps: int = 2, faces: int | None = None,
        refinement_steps: int = 0,
    ):  # fmt: skip
        super().__init__(
            threshold=threshold, resolution=resolution, upsampling_steps=upsampling_steps, faces=faces,
            refinement_steps=refinement_steps,
        )  # fmt: skip
        if latent_channels < 0:
            raise ValueError(f"latent_channels must be at least 0, got {latent_channels}")
        self.latent_channels = latent_channels
        self.fc = nn.Identity() if code_channels is None else nn.Linear(channels[-1], code_channels)
        width = channels[-1] if code_channels is None else code_channels
        self.decoder = OccupancyDecoder(width, hidden, latent_channels)
        self.encoder_latent = LatentEncoder(latent_channels, width) if latent_channels else None

    def forward(self, features: list[Tensor], view: View | None = None) -> OccupancyField:
        code = self.fc(features[-1].mean(dim=(2, 3)))
        if not self.latent_channels:
            return OccupancyField(self.decoder, (code,))
        return OccupancyField(self.decoder, (code, code.new_zeros(len(code), self.latent_channels)))

    def draw(self, prediction: OccupancyField, *, generator: torch.Generator | None = None) -> OccupancyField:
        """The same fields with z from the prior N(0, 1): one possible shape for each."""
        if not self.latent_channels:
            raise ValueError("this head has no latent code to draw: build it with latent_channels")
        code, mean = prediction.conditions
        z = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return OccupancyField(self.decoder, (code, z))

    def loss(self, prediction: OccupancyField, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """As `FieldHead`; with a latent code, at a draw from q, plus "divergence", both named beside their sum."""
        if self.encoder_latent is None:
            return super().loss(prediction, batch)
        code = prediction.conditions[0]
        points, occupancies = batch["points"], batch["occupancies"]
        posterior = self.encoder_latent(points, occupancies, code)
        reconstruction = cross_entropy(self.decoder(points, code, posterior.sample()), occupancies)
        divergence = posterior.divergence().mean()
        return {
            "loss": reconstruction + divergence,
            "reconstruction": reconstruction,
            "divergence": divergence,
        }

    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float | None:
        """As `FieldHead`; nothing is known of the divergence of a latent code."""
        return None if self.latent_channels else super().expected_initial_loss(batch)
