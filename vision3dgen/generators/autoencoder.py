"""Autoencoders: a code from which the picture can be made again, of the picture as it is or of a damaged one.

    code = encode(damage(x))          loss = -log p(x | decode(code))

Source: Hinton and Salakhutdinov 2006; Vincent et al. 2008 for the denoising autoencoder. An autoencoder is no model of
pictures: it has no `sample`. Its code serves as features (`features`), for a linear classifier for instance.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.config import Named
from vision3dgen.generators.decoder_likelihoods import DECODER_LIKELIHOODS, DecoderLikelihood
from vision3dgen.generators.decoders import DECODERS, Decoder
from vision3dgen.generators.encoders import ENCODERS, Encoder
from vision3dgen.generators.noise import normal, uniform


class Corruption(ABC):
    """How a picture is damaged before it is encoded."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor: ...


class GaussianNoise(Corruption):
    """Noise of deviation `scale` on every value, which may leave [0, 1]."""

    def __init__(self, scale: float = 0.3):
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.scale = scale

    def __call__(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        return images + self.scale * normal(images.shape, images, generator)


class MaskingNoise(Corruption):
    """Each pixel, in all channels, is set to 0 with `probability`."""

    def __init__(self, probability: float = 0.3):
        _check_probability(probability)
        self.probability = probability

    def __call__(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        draws = uniform((len(images), 1, *images.shape[2:]), images, generator)
        return images * (draws >= self.probability)


class SaltAndPepper(Corruption):
    """Each pixel, in all channels, is set to 0 or to 1, with half the `probability` each."""

    def __init__(self, probability: float = 0.3):
        _check_probability(probability)
        self.probability = probability

    def __call__(self, images: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Tensor:
        draws = uniform((len(images), 1, *images.shape[2:]), images, generator)
        salted = torch.where(draws < self.probability / 2, 1.0, images)
        return torch.where(draws >= 1 - self.probability / 2, 0.0, salted)


def _check_probability(probability: float) -> None:
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}")


CORRUPTIONS: dict[str, type[Corruption]] = {
    "gaussian": GaussianNoise,
    "masking": MaskingNoise,
    "salt_and_pepper": SaltAndPepper,
}


class Autoencoder(nn.Module):
    """A picture through a code of `decoder.inputs` numbers; with a `corruption` the denoising autoencoder.

    The code is a linear function of the encoder's features. likelihood: how the picture is compared with the original;
    a Gaussian one is the squared error.
    """

    parts = ("model",)

    def __init__(
        self,
        encoder: Annotated[Encoder, Named(ENCODERS, "mlp")],
        decoder: Annotated[Decoder, Named(DECODERS, "mlp")],
        likelihood: Annotated[DecoderLikelihood, Named(DECODER_LIKELIHOODS, "gaussian")],
        *,
        corruption: Annotated[Corruption | None, Named(CORRUPTIONS, "masking")] = None,
    ):
        super().__init__()
        self.encoder, self.decoder, self.likelihood, self.corruption = encoder, decoder, likelihood, corruption
        self.code = nn.Linear(encoder.features, decoder.inputs)

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Z"]:
        """The codes of whole pictures."""
        return self.code(self.encoder(self.likelihood.observe(images)))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The pictures made again from their codes; a denoising autoencoder is given the damaged ones."""
        return self.likelihood.mean(self.decoder(self.code(self.encoder(images))))

    def log_prob_of(
        self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " B"]:
        """log p(picture | its code), of the damaged one if there is a corruption: minus the loss."""
        observed = self.likelihood.observe(images, generator)
        damaged = observed if self.corruption is None else self.corruption(observed, generator)
        return self.likelihood.log_prob(self.decoder(self.code(self.encoder(damaged))), observed)

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Mean nats of a picture given its code."""
        return {"loss": -self.log_prob_of(batch["image"]).mean()}

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): nats, and the mean squared error of a value of the undamaged picture."""
        observed = self.likelihood.observe(batch["image"])
        error = (self(observed) - observed).square().flatten(1).mean(1)
        return {"loss": -self.log_prob_of(batch["image"]), "squared_error": error}
