"""What the output of a decoder says about a picture: log p(x | output) in nats, summed over the values of the picture.

A likelihood takes pictures in [0, 1] and says what of them it models (`observe`): binary pictures, densities, or one of
a number of levels. The three are different data: their nats must not be compared with each other.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice, check_finite
from vision3dgen.generators.noise import normal, uniform

MIN_LOG_SCALE = -7.0  # Salimans et al. 2017


def check_unit_range(images: Float[Tensor, "B *S"]) -> None:
    """Raise a ValueError naming the first value that is not finite or not in [0, 1]."""
    check_finite(images=images)
    outside = (images < 0) | (images > 1)
    if bool(outside.any()):
        index = tuple(int(i) for i in outside.nonzero()[0])
        raise ValueError(f"images must be in [0, 1], got {images[index].item()} at index {index}")


def binarize(
    images: Float[Tensor, "B *S"], how: str, generator: torch.Generator | None = None
) -> Float[Tensor, "B *S"]:
    """Binary pictures of pictures in [0, 1]: "threshold" at 0.5, "dynamic" (a draw each time), or "none", as they are.

    A dynamic picture has a pixel on with the probability of its grey value (Salakhutdinov and Murray 2008). "none"
    takes pictures of zeros and ones only, and anything else is a ValueError.
    """
    check_choice("binarize", how, ("threshold", "dynamic", "none"))
    check_unit_range(images)
    if how == "threshold":
        return (images >= 0.5).to(images.dtype)
    if how == "dynamic":
        return (uniform(images.shape, images, generator) < images).to(images.dtype)
    grey = (images != 0) & (images != 1)
    if bool(grey.any()):
        index = tuple(int(i) for i in grey.nonzero()[0])
        raise ValueError(
            f"images must be 0 or 1, got {images[index].item()} at index {index}: binarize them, by 'threshold' or "
            "'dynamic'"
        )
    return images


class DecoderLikelihood(nn.Module, ABC):
    """p(x | output) for the output (B, per_value * C, H, W) of a decoder and pictures (B, C, H, W).

    per_value: the numbers that the decoder gives for each value, one group of C channels after the other.
    """

    per_value: int = 1

    @abstractmethod
    def observe(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        """What is modelled of pictures in [0, 1]; a ValueError for pictures that have no such thing."""

    @abstractmethod
    def log_prob(self, output: Float[Tensor, "B C2 *S"], observed: Float[Tensor, "B C *S"]) -> Float[Tensor, " B"]:
        """Nats of each picture."""

    @abstractmethod
    def mean(self, output: Float[Tensor, "B C2 *S"]) -> Float[Tensor, "B C *S"]:
        """The expected picture."""

    @abstractmethod
    def sample(self, output: Float[Tensor, "B C2 *S"], generator: torch.Generator | None = None) -> Tensor:
        """A draw for each output."""

    def check_output(self, output: Tensor, observed: Tensor) -> None:
        """Raise a ValueError unless a decoder's output fits the pictures."""
        expected = (len(observed), self.per_value * observed.shape[1], *observed.shape[2:])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"{type(self).__name__} needs {self.per_value} number(s) for each value of images "
                f"{tuple(observed.shape)}: the decoder's output must be {expected}, it is {tuple(output.shape)}"
            )


class Bernoulli(DecoderLikelihood):
    """Binary pictures; the output is a logit for each pixel. binarize: how grey pictures become binary, see `binarize`.

    Nats under "dynamic" are a draw: give a generator where the number must come again.
    """

    def __init__(self, binarize: str = "none"):
        super().__init__()
        check_choice("binarize", binarize, ("threshold", "dynamic", "none"))
        self.binarize = binarize

    def observe(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        return binarize(images, self.binarize, generator)

    def log_prob(self, output: Float[Tensor, "B C2 *S"], observed: Float[Tensor, "B C *S"]) -> Float[Tensor, " B"]:
        self.check_output(output, observed)
        return -F.binary_cross_entropy_with_logits(output, observed, reduction="none").flatten(1).sum(1)

    def mean(self, output: Float[Tensor, "B C2 *S"]) -> Float[Tensor, "B C *S"]:
        return output.sigmoid()

    def sample(self, output: Float[Tensor, "B C2 *S"], generator: torch.Generator | None = None) -> Tensor:
        return (uniform(output.shape, output, generator) < output.sigmoid()).to(output.dtype)


class Gaussian(DecoderLikelihood):
    """A density on all real values, with its constant: the output is a mean, of deviation `scale`.

    scale: None lets the decoder give the logarithm of a deviation for each value beside the mean, at least exp(-7).
    With a scale of 1 this is half the squared error and D / 2 log(2 pi). Pictures of few levels have no bounded
    density: fit them with a fixed scale, or by `DiscretizedLogistic`.
    """

    def __init__(self, scale: float | None = 1.0):
        super().__init__()
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.scale = scale
        self.per_value = 1 if scale is not None else 2

    def observe(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        check_finite(images=images)
        return images

    def log_prob(self, output: Float[Tensor, "B C2 *S"], observed: Float[Tensor, "B C *S"]) -> Float[Tensor, " B"]:
        self.check_output(output, observed)
        mean, log_scale = self._split(output)
        scaled = (observed - mean) * (-log_scale).exp()
        return (-0.5 * scaled.square() - log_scale - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def mean(self, output: Float[Tensor, "B C2 *S"]) -> Float[Tensor, "B C *S"]:
        return self._split(output)[0]

    def sample(self, output: Float[Tensor, "B C2 *S"], generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(output)
        return mean + log_scale.exp() * normal(mean.shape, mean, generator)

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale is not None:
            return output, output.new_full((1,) * output.ndim, math.log(self.scale)).expand_as(output)
        mean, log_scale = output.chunk(2, 1)
        return mean, log_scale.clamp_min(MIN_LOG_SCALE)


class DiscretizedLogistic(DecoderLikelihood):
    """One of `levels` grey values, each the mass of a logistic density in its bin; the ends take the tails.

    The output is a mean and the logarithm of a scale, both on [-1, 1], the scale at least exp(-7). Pictures must be
    multiples of 1 / (levels - 1), as bytes are; bits per dimension are nats / (D log 2).
    Source: Kingma et al. 2016 (arXiv:1606.04934), appendix; Salimans et al. 2017 (arXiv:1701.05517), equation 2.
    Differs: sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)) is exact for any scale, so no branch
    approximates it by the density.
    """

    per_value = 2

    def __init__(self, levels: int = 256):
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels = levels

    def observe(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        check_unit_range(images)
        steps = images * (self.levels - 1)
        between = (steps - steps.round()).abs() > 1e-2
        if bool(between.any()):
            index = tuple(int(i) for i in between.nonzero()[0])
            raise ValueError(
                f"images must have {self.levels} levels, multiples of 1/{self.levels - 1}, got "
                f"{images[index].item()} at index {index}: this likelihood is for pictures as they were stored"
            )
        return images

    def log_prob(self, output: Float[Tensor, "B C2 *S"], observed: Float[Tensor, "B C *S"]) -> Float[Tensor, " B"]:
        self.check_output(output, observed)
        mean, log_scale = self._split(output)
        inverse, half = (-log_scale).exp(), 1 / (self.levels - 1)
        offset = 2 * observed - 1 - mean
        below_top = F.logsigmoid((offset + half) * inverse)  # log of the mass below the bin's upper end
        above_bottom = F.logsigmoid(-(offset - half) * inverse)
        inside = below_top + above_bottom + (-torch.expm1(-2 * half * inverse)).log()
        level = (observed * (self.levels - 1)).round()
        nats = torch.where(level == 0, below_top, torch.where(level == self.levels - 1, above_bottom, inside))
        return nats.flatten(1).sum(1)

    def mean(self, output: Float[Tensor, "B C2 *S"]) -> Float[Tensor, "B C *S"]:
        """The center of the density, kept in [0, 1]."""
        return (self._split(output)[0] / 2 + 0.5).clamp(0, 1)

    def sample(self, output: Float[Tensor, "B C2 *S"], generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(output)
        u = uniform(mean.shape, mean, generator).clamp(1e-5, 1 - 1e-5)
        values = ((mean + log_scale.exp() * torch.logit(u)) / 2 + 0.5).clamp(0, 1)
        return (values * (self.levels - 1)).round() / (self.levels - 1)

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = output.chunk(2, 1)
        return mean, log_scale.clamp_min(MIN_LOG_SCALE)


DECODER_LIKELIHOODS: dict[str, type[DecoderLikelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
}
