"""Generative adversarial networks: any pair of networks, any of the losses, a penalty, augmentation, classes.

One update of the trainer is `discriminator_steps` updates of the discriminator and one of the generator. Their moving
average is the trainer's (`trainer.update.ema`): with it, the generator that is sampled is the averaged one.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.checks import check_choice
from vision3dgen.config import Named
from vision3dgen.generators.adversarial import ADVERSARIAL_LOSSES, SLOPE_PENALTIES, SlopePenalty
from vision3dgen.generators.decoder_likelihoods import check_unit_range
from vision3dgen.generators.diffaugment import DiffAugment
from vision3dgen.generators.gan_networks import (
    DISCRIMINATOR_NETWORKS,
    GENERATOR_NETWORKS,
    DiscriminatorNetwork,
    GeneratorNetwork,
)
from vision3dgen.generators.noise import normal
from vision3dgen.generators.vae import class_condition


class GAN(nn.Module):
    """A generator and a discriminator of batch[field] in [0, 1]; both see [-1, 1].

    loss: a name of `ADVERSARIAL_LOSSES`. penalty: on the slope of the discriminator, at real samples before
    augmentation; a discriminator that has one must not normalize over the batch, for then a sample's slope is that of
    all. augment: applied to what the discriminator sees in both losses. discriminator_steps: with k > 1 each takes its
    own random k-th of the batch, and the generator one too. Classes are those of the networks, labels batch["label"],
    the generated samples having the labels of the real ones.
    bounded: False leaves the data as they are, for a latent GAN on codes.
    """

    updates: Tensor

    def __init__(
        self,
        generator: Annotated[GeneratorNetwork, Named(GENERATOR_NETWORKS, "dcgan")],
        discriminator: Annotated[DiscriminatorNetwork, Named(DISCRIMINATOR_NETWORKS, "dcgan")],
        *,
        loss: str = "non_saturating",
        penalty: Annotated[SlopePenalty | None, Named(SLOPE_PENALTIES, "r1")] = None,
        augment: Annotated[DiffAugment | None, Named({"diffaugment": DiffAugment}, "diffaugment")] = None,
        discriminator_steps: int = 1,
        field: str = "image",
        bounded: bool = True,
    ):
        super().__init__()
        check_choice("loss", loss, ADVERSARIAL_LOSSES)
        if generator.classes != discriminator.classes:
            raise ValueError(
                f"generator and discriminator must have the same classes, got {generator.classes} and "
                f"{discriminator.classes}"
            )
        if discriminator_steps < 1:
            raise ValueError(f"discriminator_steps must be at least 1, got {discriminator_steps}")
        if penalty is not None and _normalizes_batch(discriminator):
            raise ValueError(
                "a penalty on the slope of each sample needs a discriminator without batch normalization: give it "
                "norm='layer' or 'none'"
            )
        self.generator, self.discriminator = generator, discriminator
        self.loss_name, self.penalty, self.augment = loss, penalty, augment
        self.discriminator_steps, self.field, self.bounded = discriminator_steps, field, bounded
        self.classes = generator.classes
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # of the discriminator, for lazy penalties

    @property
    def parts(self) -> tuple[str, ...]:
        """What one update of the trainer trains, in this order."""
        return ("discriminator",) * self.discriminator_steps + ("generator",)

    def loss(self, batch: Mapping[str, Any], part: str) -> dict[str, Tensor]:
        """The loss of a part, the mean logits, and the penalty (without its weight) where it was computed."""
        check_choice("part", part, ("discriminator", "generator"))
        real, labels = self._real(batch)
        game = ADVERSARIAL_LOSSES[self.loss_name]
        if part == "generator":
            logits = self._judge(self._generate(len(real), labels), labels)
            return {"loss": game.generator(logits), "fake": logits.mean()}
        with torch.no_grad():
            fake = self._generate(len(real), labels)
        if fake.shape != real.shape:
            raise ValueError(
                f"the generator makes {tuple(fake.shape[1:])}, batch[{self.field!r}] has {tuple(real.shape[1:])}"
            )
        of_real, of_fake = self._judge(real, labels), self._judge(fake, labels)
        terms = {"loss": game.discriminator(of_real, of_fake), "real": of_real.mean(), "fake": of_fake.mean()}
        if self.penalty is not None and int(self.updates) % self.penalty.every == 0:
            terms["penalty"] = self.penalty(lambda samples: self._discriminate(samples, labels), real, fake)
            terms["loss"] = terms["loss"] + self.penalty.weight * self.penalty.every * terms["penalty"]
        if self.training:
            self.updates += 1
        return terms

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B *S"]:
        """n samples in [0, 1], or of the data's own range where it is not bounded."""
        class_condition(cond, self.classes, n, self._like)
        samples = self._generate(n, cond, generator)
        return (samples / 2 + 0.5).clamp(0, 1) if self.bounded else samples

    @torch.no_grad()
    def interpolate(
        self, first: Float[Tensor, "B Z"], second: Float[Tensor, "B Z"], steps: int = 8,
        *, cond: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T *S"]:  # fmt: skip
        """Samples along the great circle between two draws of z, both ends included, as `sample` gives them.

        Straight lines leave the shell on which draws of many dimensions lie. Source: White 2016 (arXiv:1609.04468).
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2, the ends, got {steps}")
        cosine = nn.functional.cosine_similarity(first, second, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
        angle = cosine.acos()[:, None]
        pictures = []
        for share in torch.linspace(0, 1, steps).tolist():
            z = (((1 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()
            made = self.generator(z, cond)
            pictures.append((made / 2 + 0.5).clamp(0, 1) if self.bounded else made)
        return torch.stack(pictures, 1)

    def _real(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The batch, or a random share of it, and its labels."""
        samples = batch[self.field]
        labels = None if self.classes is None else batch["label"]
        if self.discriminator_steps > 1 and self.training:
            if len(samples) < self.discriminator_steps:
                raise ValueError(
                    f"a batch of {len(samples)} cannot be divided by {self.discriminator_steps} discriminator_steps"
                )
            own = torch.randperm(len(samples), device=samples.device)[: len(samples) // self.discriminator_steps]
            samples, labels = samples[own], None if labels is None else labels[own]
        if self.training and len(samples) < 2 and _normalizes_batch(self):
            raise ValueError("batch normalization needs a batch of two or more in training, got one sample")
        if self.bounded:
            check_unit_range(samples)
            samples = 2 * samples - 1
        if labels is not None:
            class_condition(labels, self.classes, len(samples), samples)
        return samples, labels

    def _generate(self, n: int, labels: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        return self.generator(normal((n, self.generator.latents), self._like, generator), labels)

    def _judge(self, samples: Tensor, labels: Tensor | None) -> Tensor:
        return self._discriminate(samples if self.augment is None else self.augment(samples), labels)

    def _discriminate(self, samples: Tensor, labels: Tensor | None) -> Tensor:
        return self.discriminator(samples) if labels is None else self.discriminator(samples, labels)

    @property
    def _like(self) -> Tensor:
        return next(self.generator.parameters())


def _normalizes_batch(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
