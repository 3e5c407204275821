"""Generators of shapes: a VAE of point clouds, and one of occupancy functions.

A GAN of voxels is `GAN` with the networks "voxels" and field "voxels" (Wu et al. 2016, 3D-GAN). A GAN on the codes of
an autoencoder is `GAN` with networks "mlp", bounded=False and field "code", and `PointVAE.decode(gan.sample(n))`
makes shapes (Achlioptas et al. 2018, latent GAN). Both VAEs take and give coordinates as they are.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.noise import normal
from vision3dgen.generators.vae import Posterior, gaussian_kl
from vision3dgen.losses import chamfer_distance
from vision3dgen.structures import GridSpec


class PointPooling(nn.Module):
    """Linear layers with batch norm and ReLU at each point, then the maximum over points: (B, N, C) to (B, K)."""

    def __init__(self, inputs: int, widths: Sequence[int] = (64, 128, 128, 256)):
        super().__init__()
        if not widths:
            raise ValueError("widths must not be empty")
        self.features = widths[-1]
        self.layers = nn.Sequential()
        for before, after in pairwise([inputs, *widths]):
            self.layers.extend([nn.Conv1d(before, after, 1), nn.BatchNorm1d(after), nn.ReLU()])

    def forward(self, points: Float[Tensor, "B N C"]) -> Float[Tensor, "B K"]:
        return self.layers(points.transpose(1, 2)).amax(2)


class PointVAE(nn.Module):
    """Clouds of `points` points through a latent code; batch["surface"] is (B, N, 3) or Pointclouds of one size.

    loss: Chamfer distance (squared, both ways) + beta * KL. The distance is no likelihood, so there is no `log_prob`.
    Source: Achlioptas et al. 2018 (arXiv:1707.02392), the networks of their autoencoder; the prior is a VAE's.
    """

    parts = ("model",)

    def __init__(
        self, latents: int = 128, points: int = 2048, *, widths: Sequence[int] = (64, 128, 128, 256),
        hidden: Sequence[int] = (256, 256), beta: float = 1e-3,
    ):  # fmt: skip
        super().__init__()
        if min(latents, points) < 1 or not beta > 0:
            raise ValueError(f"latents and points must be at least 1 and beta > 0, got {latents}, {points} and {beta}")
        self.latents, self.points, self.beta = latents, points, beta
        self.encoder = PointPooling(3, widths)
        self.posterior = nn.Linear(self.encoder.features, 2 * latents)
        self.decoder = nn.Sequential()
        for before, after in pairwise([latents, *hidden]):
            self.decoder.extend([nn.Linear(before, after), nn.ReLU()])
        self.decoder.append(nn.Linear(hidden[-1] if hidden else latents, 3 * points))

    def encode(self, clouds: Float[Tensor, "B N 3"]) -> Posterior:
        """q(z | cloud), for any number of points in any order."""
        return Posterior(*self.posterior(self.encoder(clouds)).chunk(2, 1))

    def decode(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B N 3"]:
        return self.decoder(z).unflatten(1, (self.points, 3))

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N 3"]:
        """n clouds of codes drawn from the prior."""
        _refuse(cond)
        return self.decode(normal((n, self.latents), self.posterior.weight, generator))

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Means over clouds."""
        distances, kl = self._terms(batch["surface"])
        return {"loss": distances.mean() + self.beta * kl.mean(), "chamfer": distances.mean(), "kl": kl.mean()}

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,)."""
        distances, kl = self._terms(batch["surface"])
        return {"chamfer": distances, "kl": kl}

    def _terms(self, surface: Any) -> tuple[Tensor, Tensor]:
        clouds = surface if isinstance(surface, Tensor) else surface.points_padded()
        posterior = self.encode(clouds)
        distances, _ = chamfer_distance(self.decode(posterior.sample()), clouds, batch_reduction=None)
        return distances, gaussian_kl(*posterior)


class OccupancyVAE(nn.Module):
    """A shape as the probability that a point lies inside, a function of the point and of a latent code.

    Batch: points (B, P, 3) and occupancies (B, P). The ELBO is that of the occupancies there, in nats a shape.
    resolution: of the grid that `sample` evaluates, over [-size / 2, size / 2]^3.
    Source: Mescheder et al. 2019 (arXiv:1812.03828), section 3.3, equation 7. Differs: residual blocks that add the
    code instead of conditional batch norm.
    """

    parts = ("model",)

    def __init__(
        self, latents: int = 128, *, hidden: int = 256, blocks: int = 4, widths: Sequence[int] = (64, 128, 256),
        beta: float = 1.0, resolution: int = 32, size: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if min(latents, hidden, blocks) < 1 or resolution < 2 or not beta > 0 or not size > 0:
            raise ValueError("latents, hidden, blocks must be at least 1, resolution 2, beta and size > 0")
        self.latents, self.beta, self.resolution, self.size = latents, beta, resolution, size
        self.encoder = PointPooling(4, widths)
        self.posterior = nn.Linear(self.encoder.features, 2 * latents)
        self.first, self.last = nn.Linear(3, hidden), nn.Linear(hidden, 1)
        self.codes = nn.ModuleList(nn.Linear(latents, hidden) for _ in range(blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)
        )

    def encode(self, points: Float[Tensor, "B P 3"], occupancies: Float[Tensor, "B P"]) -> Posterior:
        """q(z | points and whether they are inside)."""
        return Posterior(*self.posterior(self.encoder(torch.cat([points, occupancies[..., None]], 2))).chunk(2, 1))

    def logits(self, points: Float[Tensor, "B P 3"], z: Float[Tensor, "B Z"]) -> Float[Tensor, "B P"]:
        """Log odds that each point is inside."""
        x = self.first(points)
        for code, block in zip(self.codes, self.blocks):
            x = x + code(z)[:, None]
            x = x + block(x)
        return self.last(x.relu())[..., 0]

    @property
    def grid(self) -> GridSpec:
        """Where `decode` evaluates."""
        return GridSpec.cube(self.resolution, -self.size / 2, self.size / 2, "corner")

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B D H W"]:
        """Probabilities (B, z, y, x) of being inside at the grid's points."""
        axis = torch.linspace(-self.size / 2, self.size / 2, self.resolution).to(z)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1).flatten(0, 2)  # x varies fastest
        shape = (len(z), self.resolution, self.resolution, self.resolution)
        probabilities = [self.logits(grid[None], code[None]).sigmoid()[0] for code in z]
        return torch.stack(probabilities).view(shape) if len(z) else z.new_zeros(shape)

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B D H W"]:
        """`decode` of n codes drawn from the prior."""
        _refuse(cond)
        return self.decode(normal((n, self.latents), self.posterior.weight, generator))

    def elbo(
        self, points: Float[Tensor, "B P 3"], occupancies: Float[Tensor, "B P"],
        *, generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:  # fmt: skip
        """log p(occupancies | z) at one draw of z, and the KL term, of each shape in nats."""
        posterior = self.encode(points, occupancies)
        logits = self.logits(points, posterior.sample(generator))
        nats = -F.binary_cross_entropy_with_logits(logits, occupancies, reduction="none").sum(1)
        return nats, gaussian_kl(*posterior)

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Means over shapes of beta * KL - log p(occupancies | z)."""
        nats, kl = self.elbo(batch["points"], batch["occupancies"])
        loss = (self.beta * kl - nats).mean()
        return {"loss": loss, "elbo": (nats - kl).mean(), "reconstruction": nats.mean(), "kl": kl.mean()}

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,)."""
        nats, kl = self.elbo(batch["points"], batch["occupancies"])
        return {"elbo": nats - kl, "reconstruction": nats, "kl": kl}


def _refuse(cond: Tensor | None) -> None:
    if cond is not None:
        raise ValueError("the model has no classes, but labels were given")
