"""Probabilities of pixels of so many levels from what a network says of them: exact ones, that sum to 1.

Values are level numbers, 0 to levels - 1, int64; images are value / (levels - 1), in [0, 1].
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-3  # of a level: 8-bit values in half precision are still recognized


def to_values(images: Float[Tensor, "B C H W"], levels: int) -> Int[Tensor, "B C H W"]:
    """Level numbers of images in [0, 1]; ValueError for a pixel that is at none of the levels."""
    scaled = images * (levels - 1)
    values = scaled.round()
    wrong = ~((scaled - values).abs() <= TOLERANCE) | (values < 0) | (values >= levels)  # NaN is wrong too
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"images must be at one of {levels} levels, k / {levels - 1} for k = 0 to {levels - 1}, got "
            f"{images[index].item()} at index {index}"
        )
    return values.long()


def to_images(values: Int[Tensor, "B C H W"], levels: int) -> Float[Tensor, "B C H W"]:
    return values.float() / (levels - 1)


class Likelihood(ABC):
    """The distribution of a pixel of `channels` values, given `outputs` numbers from a network.

    steps: how often the network must be asked for one pixel. uniforms: random numbers that a pixel takes.
    """

    outputs: int
    steps: int
    uniforms: int

    def __init__(self, channels: int, levels: int):
        if levels < 2 or channels < 1:
            raise ValueError(f"a likelihood needs 2 levels and 1 channel at least, got {levels} and {channels}")
        self.channels, self.levels = channels, levels

    @abstractmethod
    def log_prob(self, outputs: Float[Tensor, "B P H W"], values: Int[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        """log p of each pixel in nats."""

    @abstractmethod
    def sample(
        self, outputs: Float[Tensor, "B P"], values: Int[Tensor, "B C"], uniforms: Float[Tensor, "B U"], step: int,
        temperature: float = 1.0,
    ) -> Int[Tensor, "B C"]:  # fmt: skip
        """`values` with those that step number `step` decides."""


class Categorical(Likelihood):
    """A softmax over the levels of each channel; outputs (B, channels * levels, H, W), channel after channel.

    Channels depend on one another through the network alone, which is asked once for each. temperature divides logits.
    Source: van den Oord et al. 2016 (arXiv:1601.06759), section 3.1.
    """

    def __init__(self, channels: int, levels: int):
        super().__init__(channels, levels)
        self.outputs, self.steps, self.uniforms = channels * levels, channels, channels

    def log_prob(self, outputs: Float[Tensor, "B P H W"], values: Int[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        logits = outputs.unflatten(1, (self.channels, self.levels))  # (B, C, L, H, W)
        return logits.log_softmax(2).gather(2, values[:, :, None]).squeeze(2).sum(1)

    def sample(
        self, outputs: Float[Tensor, "B P"], values: Int[Tensor, "B C"], uniforms: Float[Tensor, "B U"], step: int,
        temperature: float = 1.0,
    ) -> Int[Tensor, "B C"]:  # fmt: skip
        if self.channels == 1:
            return inverse_cdf(outputs if temperature == 1 else outputs / temperature, uniforms[:, 0])[:, None]
        logits = outputs[:, step * self.levels : (step + 1) * self.levels]
        values = values.clone()
        values[:, step] = inverse_cdf(logits / temperature, uniforms[:, step])
        return values


class LogisticMixture(Likelihood):
    """A mixture of logistic distributions, cut at half levels, whose first and last bins are open.

    The component is one for all channels of a pixel; the mean of a channel is shifted by tanh(coefficient) times each
    earlier channel's value in [-1, 1]. Outputs: K logits, C K means, C K log scales (at least -7), and K for each of
    the C (C - 1) / 2 pairs of channels: 10 K for RGB. temperature divides the logits and multiplies the scales.
    Source: Salimans et al. 2017, PixelCNN++ (arXiv:1701.05517), equations 2 and 3. Differs: the probability of a bin is
    exact everywhere, and sampled values are levels, where the published code feeds continuous ones back.
    """

    def __init__(self, channels: int, levels: int, mixtures: int = 10):
        super().__init__(channels, levels)
        if mixtures < 1:
            raise ValueError(f"mixtures must be at least 1, got {mixtures}")
        self.mixtures = mixtures
        self.pairs = channels * (channels - 1) // 2
        self.outputs, self.steps = mixtures * (1 + 2 * channels + self.pairs), 1
        self.uniforms = 1 + channels  # which component, and one for each channel

    def log_prob(self, outputs: Float[Tensor, "B P H W"], values: Int[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        logits, means, log_scales, coefficients = self._split(outputs)
        x = self._centered(values.to(outputs.dtype))
        total = logits.log_softmax(1)
        for channel in range(self.channels):
            mean = self._mean(means, coefficients, x, channel)
            total = total + self._log_bin(x[:, channel, None], values[:, channel, None], mean, log_scales[:, channel])
        return total.logsumexp(1)

    def sample(
        self, outputs: Float[Tensor, "B P"], values: Int[Tensor, "B C"], uniforms: Float[Tensor, "B U"], step: int,
        temperature: float = 1.0,
    ) -> Int[Tensor, "B C"]:  # fmt: skip
        logits, means, log_scales, coefficients = self._split(outputs)
        chosen = inverse_cdf(logits / temperature, uniforms[:, 0])[:, None]  # (B, 1)
        x = outputs.new_zeros(len(outputs), self.channels)
        values = values.clone()
        for channel in range(self.channels):
            mean = self._mean(means, coefficients, x, channel).gather(1, chosen)[:, 0]
            scale = log_scales[:, channel].gather(1, chosen)[:, 0].exp() * temperature
            u = uniforms[:, 1 + channel]
            drawn = mean + scale * (u.log() - (-u).log1p())  # u = 0 gives -inf, which is the first level
            level = ((drawn.clamp(-1, 1) + 1) / 2 * (self.levels - 1)).round()
            values[:, channel] = level.long()
            x[:, channel] = self._centered(level)
        return values

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, K, ...), (B, C, K, ...), (B, C, K, ...), (B, pairs, K, ...)."""
        k, c = self.mixtures, self.channels
        logits, means, log_scales, coefficients = outputs.split([k, c * k, c * k, self.pairs * k], 1)
        means, log_scales = means.unflatten(1, (c, k)), log_scales.unflatten(1, (c, k)).clamp(min=-7)
        coefficients = coefficients.reshape(len(outputs), self.pairs, k, *outputs.shape[2:]).tanh()
        return logits, means, log_scales, coefficients

    def _centered(self, values: Tensor) -> Tensor:
        return values * (2 / (self.levels - 1)) - 1

    def _mean(self, means: Tensor, coefficients: Tensor, x: Tensor, channel: int) -> Tensor:
        mean, first = means[:, channel], channel * (channel - 1) // 2
        for earlier in range(channel):
            mean = mean + coefficients[:, first + earlier] * x[:, earlier, None]
        return mean

    def _log_bin(self, x: Tensor, values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """log(sigmoid(a) - sigmoid(b)) with the bin's ends a > b, as logsig(a) + logsig(-b) + log(1 - exp(b - a))."""
        half, inverse = 1 / (self.levels - 1), (-log_scale).exp()
        upper, lower = (x - mean + half) * inverse, (x - mean - half) * inverse
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half * inverse))
        inside = torch.where(values == self.levels - 1, F.logsigmoid(-lower), inside)
        return torch.where(values == 0, F.logsigmoid(upper), inside)


def inverse_cdf(logits: Float[Tensor, "B K"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The category that a uniform number in [0, 1) falls on."""
    below, total = logits.softmax(1).cumsum(1).split([logits.shape[1] - 1, 1], 1)
    return (below <= uniforms[:, None] * total).sum(1)
