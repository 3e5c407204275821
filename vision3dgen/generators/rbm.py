"""The restricted Boltzmann machine: binary pictures v and binary hidden units h that see each other but not their own.

    energy(v, h) = -b.v - c.h - h.W v                    p(v, h) = exp(-energy) / Z
    free energy F(v) = -b.v - sum_j softplus(c_j + W_j v)          log p(v) = -F(v) - log Z

Given one side the other factorizes, so a Markov chain of Gibbs steps draws from the model. The gradient of log p is a
difference of two means of F, at the data and at the model's own draws; contrastive divergence takes for these what k
steps from the data (CD-k) or from where the last update stopped (persistent) lead to.
Source: Smolensky 1986; Hinton 2002; Tieleman 2008; Salakhutdinov and Murray 2008 (annealed importance sampling).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.decoder_likelihoods import binarize as make_binary
from vision3dgen.generators.noise import uniform

LARGEST_EXACT = 20  # units of the smaller side: 2 ** 20 states


class RBM(nn.Module):
    """A restricted Boltzmann machine over binary pictures of `image_shape`.

    steps: k of contrastive divergence. chains: their number makes them persistent, None starts each at the data.
    binarize: how grey pictures become binary, see `generators.binarize`. gibbs_steps: of the chains that `sample` runs
    from independent fair coins. Biases start at 0; `start_at` is better for the visible ones.
    """

    parts = ("model",)
    particles: Tensor

    def __init__(
        self, image_shape: Sequence[int] = (1, 28, 28), hidden: int = 128, *, steps: int = 1, chains: int | None = None,
        binarize: str = "none", gibbs_steps: int = 1000,
    ):  # fmt: skip
        super().__init__()
        if min(hidden, steps, gibbs_steps) < 1 or (chains is not None and chains < 1):
            raise ValueError(
                "hidden, steps, gibbs_steps and chains must be at least 1, got "
                f"{hidden}, {steps}, {gibbs_steps} and {chains}"
            )
        self.image_shape, self.steps, self.binarize, self.gibbs_steps = tuple(image_shape), steps, binarize, gibbs_steps
        visible = math.prod(image_shape)
        self.weight = nn.Parameter(0.01 * torch.randn(hidden, visible))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.persistent = chains is not None
        self.register_buffer("particles", torch.randint(2, (chains or 0, visible)).float())

    @torch.no_grad()
    def start_at(self, pixel_means: Float[Tensor, "*S"]) -> None:
        """Set the visible bias to the log odds of the training set's mean picture, in [0.01, 0.99] (Hinton 2010)."""
        self.visible_bias.copy_(torch.logit(pixel_means.flatten().clamp(0.01, 0.99)))

    def free_energy(self, visible: Float[Tensor, "B V"]) -> Float[Tensor, " B"]:
        """F(v) of binary rows."""
        return -visible @ self.visible_bias - F.softplus(F.linear(visible, self.weight, self.hidden_bias)).sum(1)

    @torch.no_grad()
    def gibbs(
        self, visible: Float[Tensor, "B V"], steps: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B V"]:
        """Where chains stand after `steps` steps, each drawing the hidden units and then the visible ones."""
        for _ in range(steps):
            hidden = _draw(F.linear(visible, self.weight, self.hidden_bias), generator)
            visible = _draw(hidden @ self.weight + self.visible_bias, generator)
        return visible

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """F at the data minus F at the chains: its gradient, not its value, is what is learned by."""
        data = self._rows(batch["image"])
        chains = self.particles if self.persistent else data
        chains = self.gibbs(chains, self.steps)
        if self.persistent and self.training:
            self.particles.copy_(chains)
        energy = self.free_energy(data).mean()
        with torch.no_grad():
            hidden = F.linear(data, self.weight, self.hidden_bias).sigmoid()
            again = (hidden @ self.weight + self.visible_bias).sigmoid()
        return {
            "loss": energy - self.free_energy(chains).mean(),
            "free_energy": energy.detach(),
            "reconstruction_error": (data - again).square().mean(),
        }

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B *S"]:
        """n pictures: the probability of each pixel at the last of `gibbs_steps` steps of n chains."""
        if cond is not None:
            raise ValueError("a restricted Boltzmann machine has no classes, but labels were given")
        start = (uniform((n, len(self.visible_bias)), self.weight, generator) < 0.5).to(self.weight.dtype)
        visible = self.gibbs(start, self.gibbs_steps - 1, generator)
        hidden = _draw(F.linear(visible, self.weight, self.hidden_bias), generator)
        return (hidden @ self.weight + self.visible_bias).sigmoid().unflatten(1, self.image_shape)

    def features(self, images: Float[Tensor, "B *S"]) -> Float[Tensor, "B H"]:
        """The probability of each hidden unit, for a classifier."""
        return F.linear(self._rows(images), self.weight, self.hidden_bias).sigmoid()

    @torch.no_grad()
    def log_partition(self) -> Tensor:
        """log Z, exactly, from all states of the smaller side; a ValueError for more than 20 units there."""
        hidden, visible = self.weight.shape
        units = min(hidden, visible)
        if units > LARGEST_EXACT:
            raise ValueError(
                f"the exact partition function needs a side of at most {LARGEST_EXACT} units, got {hidden} hidden and "
                f"{visible} visible: estimate it by annealed_log_partition"
            )
        states = torch.arange(2**units, device=self.weight.device)[:, None] >> torch.arange(
            units, device=self.weight.device
        )
        rows = (states & 1).to(self.weight.dtype)
        if visible <= hidden:
            return (-self.free_energy(rows)).logsumexp(0)
        field = F.softplus(rows @ self.weight + self.visible_bias).sum(1)  # the visible units summed out
        return (rows @ self.hidden_bias + field).logsumexp(0)

    @torch.no_grad()
    def annealed_log_partition(
        self, chains: int = 100, temperatures: int = 1000, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """An estimate of log Z by annealed importance sampling from the model without weights; too low on average."""
        if chains < 1 or temperatures < 2:
            raise ValueError(f"chains must be at least 1 and temperatures 2, got {chains} and {temperatures}")
        bias = self.visible_bias.expand(chains, -1)
        visible = _draw(bias, generator)
        total = self.weight.new_zeros(chains)
        shares = torch.linspace(0, 1, temperatures).tolist()
        for before, now in pairwise(shares):
            drive = F.linear(visible, self.weight, self.hidden_bias)
            total += F.softplus(now * drive).sum(1) - F.softplus(before * drive).sum(1)
            hidden = _draw(now * drive, generator)
            visible = _draw(now * (hidden @ self.weight) + self.visible_bias, generator)
        start = F.softplus(self.visible_bias).sum() + len(self.hidden_bias) * math.log(2)
        return start + total.logsumexp(0) - math.log(chains)

    @torch.no_grad()
    def log_prob(self, x: Float[Tensor, "B *S"], *, log_partition: Tensor | None = None) -> Float[Tensor, " B"]:
        """Nats of each picture, with the exact log Z unless one is given."""
        log_partition = self.log_partition() if log_partition is None else log_partition
        return -self.free_energy(self._rows(x)) - log_partition

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): the free energy, to hold against that of training items (Hinton 2010)."""
        return {"free_energy": self.free_energy(self._rows(batch["image"]))}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> Float[Tensor, " B"]:
        """`log_prob` of the pictures: exact, so for a small machine only."""
        return self.log_prob(batch["image"])

    def _rows(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"the machine takes images {('B', *self.image_shape)}, got {tuple(images.shape)}")
        return make_binary(images, self.binarize).flatten(1)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Binary units with these log odds of being 1."""
    return (uniform(logits.shape, logits, generator) < logits.sigmoid()).to(logits.dtype)
