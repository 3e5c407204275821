"""Generators of the codes of an autoencoder that was trained before: a prior of a VQ-VAE's, and a GAN on point codes.

The autoencoder is a part of the model, whose weights a configuration takes from its run (`weights`), and is not
trained on. Source: van den Oord et al. 2017 (arXiv:1711.00937), section 3.3; Achlioptas et al. 2018 (arXiv:1707.02392),
section 3.1, latent GAN.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.config import Named
from vision3dgen.generators.adversarial import SLOPE_PENALTIES, SlopePenalty
from vision3dgen.generators.autoregressive import Autoregressive
from vision3dgen.generators.gan import GAN
from vision3dgen.generators.gan_networks import (
    DISCRIMINATOR_NETWORKS,
    GENERATOR_NETWORKS,
    DiscriminatorNetwork,
    GeneratorNetwork,
)
from vision3dgen.generators.imagegpt import ImageGPT
from vision3dgen.generators.pixelcnn import GatedPixelCNN, PixelCNN
from vision3dgen.generators.pixelsnail import PixelSNAIL
from vision3dgen.generators.shapes3d import PointVAE
from vision3dgen.generators.vqvae import VQVAE

PRIORS: dict[str, type[Autoregressive]] = {
    "gated_pixelcnn": GatedPixelCNN,
    "imagegpt": ImageGPT,
    "pixelcnn": PixelCNN,
    "pixelsnail": PixelSNAIL,
}


M = TypeVar("M", bound=nn.Module)


def frozen(module: M) -> M:
    """The module itself, no parameter of which is trained from now on."""
    return module.requires_grad_(False).eval()


class CodePrior(nn.Module):
    """An autoregressive model of the code maps of a VQ-VAE: together they generate pictures.

    Likelihoods are those of the code maps, in nats a map and bits a code, not of the pictures.
    """

    parts = ("model",)

    def __init__(
        self,
        vqvae: Annotated[VQVAE, Named({"vqvae": VQVAE}, "vqvae")],
        prior: Annotated[Autoregressive, Named(PRIORS, "gated_pixelcnn")],
    ):
        super().__init__()
        count = len(vqvae.quantizer.codebook)
        if prior.likelihood.levels != count or prior.image_shape[0] != 1:
            raise ValueError(
                f"the prior must be of maps of 1 channel and {count} levels, the VQ-VAE's codes, got "
                f"{prior.image_shape[0]} and {prior.likelihood.levels}"
            )
        self.vqvae, self.prior, self.classes = frozen(vqvae), prior, prior.classes

    def train(self, mode: bool = True) -> "CodePrior":
        super().train(mode)
        self.vqvae.eval()
        return self

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Bits a code, mean over the batch, and the nats of a map for the log."""
        return self.prior.loss(self._coded(batch))

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per picture (B,): nats of its code map, and bits a code."""
        return self.prior.validation_metrics(self._coded(batch))

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B C H W"]:  # fmt: skip
        """n pictures in [0, 1] of code maps drawn from the prior."""
        levels = self.prior.likelihood.levels
        codes = self.prior.sample(n, cond=cond, temperature=temperature, generator=generator)
        return self.vqvae.decode((codes[:, 0] * (levels - 1)).round().long()).clamp(0, 1)

    def _coded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**batch, "image": self.vqvae.code_images(batch["image"])}


class LatentGAN(GAN):
    """A GAN on the codes that an autoencoder of point clouds gives batch["surface"] (the means of a `PointVAE`)."""

    def __init__(
        self,
        autoencoder: Annotated[PointVAE, Named({"point_vae": PointVAE}, "point_vae")],
        generator: Annotated[GeneratorNetwork, Named(GENERATOR_NETWORKS, "mlp")],
        discriminator: Annotated[DiscriminatorNetwork, Named(DISCRIMINATOR_NETWORKS, "mlp")],
        *,
        loss: str = "wasserstein",
        penalty: Annotated[SlopePenalty | None, Named(SLOPE_PENALTIES, "gradient_penalty")] = None,
        discriminator_steps: int = 5,
    ):
        super().__init__(
            generator, discriminator, loss=loss, penalty=penalty, discriminator_steps=discriminator_steps,
            field="surface", bounded=False,
        )  # fmt: skip
        self.autoencoder = frozen(autoencoder)

    def train(self, mode: bool = True) -> "LatentGAN":
        super().train(mode)
        self.autoencoder.eval()  # its batch norms keep the statistics of its own training
        return self

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N 3"]:
        """n clouds that the autoencoder decodes from generated codes."""
        return self.autoencoder.decode(super().sample(n, cond=cond, generator=generator))

    def _real(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The codes of the batch's clouds, or of a random share of them."""
        surface = batch["surface"]
        clouds, labels = super()._real(
            {**batch, "surface": surface if isinstance(surface, Tensor) else surface.points_padded()}
        )
        with torch.no_grad():
            return self.autoencoder.encode(clouds).mean, labels
