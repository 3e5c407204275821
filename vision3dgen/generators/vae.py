"""Variational autoencoders: p(x) = integral of p(x | z) N(z; 0, 1), bounded from below with the help of q(z | x).

    ELBO(x)   = E_q log p(x | z) - KL(q(z | x) || N(0, 1))                  one draw of z estimates the expectation
    IWAE_k(x) = E log( 1/k sum_i p(x, z_i) / q(z_i | x) ),  z_i ~ q          ELBO = IWAE_1 <= IWAE_k <= log p(x)

Everything is in nats per picture, summed over its values and averaged over pictures. The loss of a beta-VAE weighs the
KL term, and its log still has the ELBO itself.
Source: Kingma and Welling 2014 (arXiv:1312.6114); Higgins et al. 2017 (beta); Sohn et al. 2015 (conditional); Burda et
al. 2016 (arXiv:1509.00519, IWAE).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.config import Named
from vision3dgen.generators.decoder_likelihoods import DECODER_LIKELIHOODS, DecoderLikelihood
from vision3dgen.generators.decoders import DECODERS, Decoder
from vision3dgen.generators.encoders import ENCODERS, Encoder
from vision3dgen.generators.noise import normal


class Posterior(NamedTuple):
    """q(z | x), a Gaussian with a diagonal covariance."""

    mean: Float[Tensor, "B Z"]
    log_variance: Float[Tensor, "B Z"]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B Z"]:
        """A draw, differentiable in the parameters."""
        return self.mean + (0.5 * self.log_variance).exp() * normal(self.mean.shape, self.mean, generator)

    def log_prob(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, " B"]:
        """log q(z | x) in nats."""
        scaled = (z - self.mean).square() * (-self.log_variance).exp()
        return -0.5 * (scaled + self.log_variance + math.log(2 * math.pi)).sum(1)


class Elbo(NamedTuple):
    """The bound of each picture and its two terms: elbo = reconstruction - kl."""

    elbo: Float[Tensor, " B"]
    reconstruction: Float[Tensor, " B"]  # log p(x | z) at one draw of z
    kl: Float[Tensor, " B"]


def gaussian_kl(mean: Float[Tensor, "B Z"], log_variance: Float[Tensor, "B Z"]) -> Float[Tensor, " B"]:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over the dimensions. Source: Kingma and Welling, B."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def class_condition(labels: Tensor | None, classes: int | None, count: int, like: Tensor) -> Tensor | None:
    """Labels as one-hot rows (B, classes), None for an unconditional model; a ValueError where the two disagree."""
    if classes is None:
        if labels is not None:
            raise ValueError("the model has no classes, but labels were given: build it with classes=K")
        return None
    if labels is None or labels.shape != (count,) or labels.is_floating_point():
        got = None if labels is None else (tuple(labels.shape), labels.dtype)
        raise ValueError(f"the model needs {count} labels, integers below {classes}, got {got}")
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels[index])} at {index}")
    return F.one_hot(labels.to(like.device), classes).to(like.dtype)


class VAE(nn.Module):
    """A variational autoencoder of built networks; its latent space has `decoder.inputs` - (classes or 0) dimensions.

    classes: K makes it conditional on batch["label"]; the encoder must then have `conditions` = K, and K of the
    decoder's inputs are the class. beta: weight of the KL term in the loss. samples: with k > 1 the loss is the IWAE
    bound of k draws; beta must be 1 then. evaluation_samples: those of `predict`.
    """

    parts = ("model",)

    def __init__(
        self,
        encoder: Annotated[Encoder, Named(ENCODERS, "mlp")],
        decoder: Annotated[Decoder, Named(DECODERS, "mlp")],
        likelihood: Annotated[DecoderLikelihood, Named(DECODER_LIKELIHOODS, "bernoulli")],
        *,
        classes: int | None = None,
        beta: float = 1.0,
        samples: int = 1,
        evaluation_samples: int = 64,
    ):
        super().__init__()
        self.latents = decoder.inputs - (classes or 0)
        if encoder.conditions != (classes or 0):
            raise ValueError(f"with classes={classes} the encoder must have conditions={classes or 0}, it has "
                             f"{encoder.conditions}")  # fmt: skip
        if self.latents < 1:
            raise ValueError(f"the decoder's inputs are latents and classes; {decoder.inputs} leave none of {classes}")
        if not beta > 0 or min(samples, evaluation_samples) < 1 or (samples > 1 and beta != 1):
            raise ValueError(
                "beta must be > 0, and 1 with samples > 1, samples and evaluation_samples at least 1, got "
                f" beta={beta} and samples={samples}"
            )
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.classes, self.beta, self.samples, self.evaluation_samples = classes, beta, samples, evaluation_samples
        self.posterior = nn.Linear(encoder.features, 2 * self.latents)

    # ---------------------------------------------------------------------------------------------- inference

    def encode(
        self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None,
        *, generator: torch.Generator | None = None,
    ) -> Posterior:  # fmt: skip
        """q(z | x) for pictures in [0, 1]."""
        return self._encode(self.likelihood.observe(images, generator), self._condition(cond, len(images)))

    def elbo(
        self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None,
        *, generator: torch.Generator | None = None,
    ) -> Elbo:  # fmt: skip
        """The bound of each picture, whatever beta is, from one draw of z and the closed form of the KL."""
        observed, condition = self.likelihood.observe(images, generator), self._condition(cond, len(images))
        posterior = self._encode(observed, condition)
        output = self._decode(posterior.sample(generator), condition)
        reconstruction = self.likelihood.log_prob(output, observed)
        kl = gaussian_kl(*posterior)
        return Elbo(reconstruction - kl, reconstruction, kl)

    def importance_bound(
        self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None,
        *, samples: int, chunk: int = 16, generator: torch.Generator | None = None,
    ) -> Float[Tensor, " B"]:  # fmt: skip
        """IWAE_k of each picture, k = samples, decoding `chunk` draws at a time, which does not change the value."""
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, got {samples} and {chunk}")
        observed, condition = self.likelihood.observe(images, generator), self._condition(cond, len(images))
        posterior = self._encode(observed, condition)
        total = torch.full((len(images),), -math.inf, dtype=images.dtype, device=images.device)
        for weights in self._log_weights(posterior, observed, condition, samples, chunk, generator):
            total = torch.logaddexp(total, weights.logsumexp(0))
        return total - math.log(samples)

    @torch.no_grad()
    def log_prob(
        self, x: Float[Tensor, "B C H W"], *, cond: Int[Tensor, " B"] | None = None, samples: int = 100,
        chunk: int = 16, generator: torch.Generator | None = None,
    ) -> Float[Tensor, " B"]:  # fmt: skip
        """Nats of each picture: the IWAE bound of `samples` draws, on average too low and less so with more of them."""
        return self.importance_bound(x, cond, samples=samples, chunk=chunk, generator=generator)

    # ---------------------------------------------------------------------------------------------- generation

    def decode(self, z: Float[Tensor, "B Z"], cond: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B C H W"]:
        """The mean picture of p(x | z)."""
        return self.likelihood.mean(self._decode(z, self._condition(cond, len(z))))

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, mean: bool = True,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B C H W"]:  # fmt: skip
        """n pictures in [0, 1] of z drawn from the prior: the mean of p(x | z), or with mean=False a draw of it too."""
        like = self.posterior.weight
        output = self._decode(normal((n, self.latents), like, generator), self._condition(cond, n))
        return (self.likelihood.mean(output) if mean else self.likelihood.sample(output, generator)).clamp(0, 1)

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """The reconstruction: the mean picture at the mean of q(z | x)."""
        return self.decode(self.encode(images, cond).mean, cond)

    @torch.no_grad()
    def interpolate(
        self, first: Float[Tensor, "B C H W"], second: Float[Tensor, "B C H W"], steps: int = 8,
        *, cond: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T C H W"]:  # fmt: skip
        """Pictures along the straight line between the codes of two pictures, both ends included."""
        if steps < 2:
            raise ValueError(f"steps must be at least 2, the ends, got {steps}")
        start, end = self.encode(first, cond).mean, self.encode(second, cond).mean
        shares = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)
        pictures = [self.decode(torch.lerp(start, end, share), cond) for share in shares]
        return torch.stack(pictures, 1)

    @torch.no_grad()
    def traverse(
        self, z: Float[Tensor, "B Z"], dims: Sequence[int], values: Sequence[float],
        *, cond: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B D T C H W"]:  # fmt: skip
        """Pictures of z with one dimension of `dims` at a time set to each of `values`."""
        if not set(dims) <= set(range(self.latents)):
            raise ValueError(f"dims must be 0 to {self.latents - 1}, got {list(dims)}")
        rows = []
        for dim in dims:
            moved = []
            for value in values:
                own = z.clone()
                own[:, dim] = value
                moved.append(self.decode(own, cond))
            rows.append(torch.stack(moved, 1))
        return torch.stack(rows, 1)

    # ------------------------------------------------------------------------------------------------ training

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Mean over pictures of beta * KL - log p(x | z), or with several samples of minus the IWAE bound."""
        images, labels = batch["image"], self._labels(batch)
        if self.samples > 1:
            bound = self.importance_bound(images, labels, samples=self.samples, chunk=self.samples).mean()
            return {"loss": -bound, "bound": bound}
        terms = self.elbo(images, labels)
        loss = (self.beta * terms.kl - terms.reconstruction).mean()
        return {"loss": loss} | {name: value.mean() for name, value in terms._asdict().items()}

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): the terms of the ELBO, whatever the loss is."""
        return self.elbo(batch["image"], self._labels(batch))._asdict()

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> Float[Tensor, " B"]:
        """`log_prob` of the pictures, nats, from `evaluation_samples` draws."""
        return self.log_prob(batch["image"], cond=self._labels(batch), samples=self.evaluation_samples)

    def _labels(self, batch: Mapping[str, Any]) -> Tensor | None:
        return None if self.classes is None else batch["label"]

    def _condition(self, cond: Tensor | None, count: int) -> Tensor | None:
        return class_condition(cond, self.classes, count, self.posterior.weight)

    def _encode(self, observed: Tensor, condition: Tensor | None) -> Posterior:
        mean, log_variance = self.posterior(self.encoder(observed, condition)).chunk(2, 1)
        return Posterior(mean, log_variance.clamp(-30, 20))

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return self.decoder(z if condition is None else torch.cat([z, condition], 1))

    def _log_weights(
        self, posterior: Posterior, observed: Tensor, condition: Tensor | None, samples: int, chunk: int,
        generator: torch.Generator | None,
    ) -> Iterator[Float[Tensor, "K B"]]:  # fmt: skip
        """log p(x, z) - log q(z | x) of `samples` draws, `chunk` at a time."""
        for start in range(0, samples, chunk):
            count = min(chunk, samples - start)
            # One draw after the other, so that the chunks do not change them.
            z = torch.cat([posterior.sample(generator) for _ in range(count)])
            own = [None if each is None else each.repeat(count, *[1] * (each.ndim - 1))
                   for each in (observed, condition, posterior.mean, posterior.log_variance)]  # fmt: skip
            assert own[0] is not None
            assert own[2] is not None
            assert own[3] is not None
            prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
            given = self.likelihood.log_prob(self._decode(z, own[1]), own[0])
            yield (given + prior - Posterior(own[2], own[3]).log_prob(z)).unflatten(0, (count, -1))
