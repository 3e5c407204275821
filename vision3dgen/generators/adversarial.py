"""What the two networks of a GAN minimize, and penalties on the discriminator's slope. D are logits.

    name             discriminator                              generator
    minimax          softplus(-D(x)) + softplus(D(g))           -softplus(D(g))   maximizes what D minimizes; saturates
    non_saturating   softplus(-D(x)) + softplus(D(g))           softplus(-D(g))
    least_squares    1/2 (D(x) - 1)^2 + 1/2 D(g)^2              1/2 (D(g) - 1)^2
    hinge            max(0, 1 - D(x)) + max(0, 1 + D(g))        -D(g)
    wasserstein      D(g) - D(x)                                -D(g)               needs a penalty on the slope

x are real pictures, g generated ones; all are means over the batch.
Source: Goodfellow et al. 2014; Mao et al. 2017; Lim and Ye 2017; Arjovsky et al. 2017; Gulrajani et al. 2017
(arXiv:1704.00028); Mescheder et al. 2018 (arXiv:1801.04406).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision3dgen.generators.noise import uniform

Scores = Float[Tensor, " B"]
Discriminate = Callable[[Tensor], Tensor]  # (B, *S) to logits (B,), each of its own sample alone


class AdversarialLoss(NamedTuple):
    """The two sides of a game, functions of logits."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # of the logits of real and of generated samples
    generator: Callable[[Tensor], Tensor]  # of the logits of generated samples


def logistic_discriminator(real: Scores, fake: Scores) -> Tensor:
    """Minus the log likelihood of telling both kinds apart, summed over the two; 2 log 2 where every logit is 0."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def minimax_generator(fake: Scores) -> Tensor:
    return -F.softplus(fake).mean()


def non_saturating_generator(fake: Scores) -> Tensor:
    return F.softplus(-fake).mean()


def least_squares_discriminator(real: Scores, fake: Scores) -> Tensor:
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def least_squares_generator(fake: Scores) -> Tensor:
    return 0.5 * (fake - 1).square().mean()


def hinge_discriminator(real: Scores, fake: Scores) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def wasserstein_discriminator(real: Scores, fake: Scores) -> Tensor:
    return fake.mean() - real.mean()


def critic_generator(fake: Scores) -> Tensor:
    """Of the hinge and the Wasserstein game."""
    return -fake.mean()


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    "minimax": AdversarialLoss(logistic_discriminator, minimax_generator),
    "non_saturating": AdversarialLoss(logistic_discriminator, non_saturating_generator),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "hinge": AdversarialLoss(hinge_discriminator, critic_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, critic_generator),
}


def slope(discriminate: Discriminate, samples: Float[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
    """The gradient of each sample's logit with respect to the sample, itself differentiable."""
    samples = samples.detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        return torch.autograd.grad(discriminate(samples).sum(), samples, create_graph=True)[0]


def gradient_penalty(
    discriminate: Discriminate, real: Float[Tensor, "B *S"], fake: Float[Tensor, "B *S"],
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """E (|slope at a x + (1 - a) g| - 1)^2, a uniform for each pair, the norm over all values of a sample.

    Source: Gulrajani et al. 2017, equation 3, without its weight.
    """
    share = uniform((len(real), *[1] * (real.ndim - 1)), real, generator)
    slopes = slope(discriminate, torch.lerp(fake, real, share))
    return (torch.linalg.vector_norm(slopes.flatten(1), dim=1) - 1).square().mean()


def r1_penalty(discriminate: Discriminate, real: Float[Tensor, "B *S"]) -> Tensor:
    """1/2 E |slope at x|^2. Source: Mescheder et al. 2018, equation 9, without its weight."""
    return 0.5 * slope(discriminate, real).square().flatten(1).sum(1).mean()


class SlopePenalty(ABC):
    """A term of the discriminator's loss, counted `every` updates with `every` times its weight."""

    def __init__(self, weight: float, every: int):
        if not weight > 0 or every < 1:
            raise ValueError(f"weight must be > 0 and every at least 1, got {weight} and {every}")
        self.weight, self.every = weight, every

    @abstractmethod
    def __call__(self, discriminate: Discriminate, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty without its weight."""


class GradientPenalty(SlopePenalty):
    """`gradient_penalty`, as in WGAN-GP."""

    def __init__(self, weight: float = 10.0, every: int = 1):
        super().__init__(weight, every)

    def __call__(self, discriminate: Discriminate, real: Tensor, fake: Tensor) -> Tensor:
        return gradient_penalty(discriminate, real, fake)


class R1(SlopePenalty):
    """`r1_penalty`; every 16th update is the lazy one of Karras et al. 2020, StyleGAN2.

    Differs: the optimizer's learning rate and betas are not changed with `every`; set them in the configuration.
    """

    def __init__(self, weight: float = 0.1, every: int = 16):
        super().__init__(weight, every)

    def __call__(self, discriminate: Discriminate, real: Tensor, fake: Tensor) -> Tensor:
        return r1_penalty(discriminate, real)


SLOPE_PENALTIES: dict[str, type[SlopePenalty]] = {"gradient_penalty": GradientPenalty, "r1": R1}
