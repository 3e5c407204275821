"""What all autoregressive models of images share: exact likelihoods, training, and sampling."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.likelihoods import Likelihood, to_values
from vision3dgen.generators.masked import Cache, CausalConv2d, Pixels
from vision3dgen.losses import check_labels


class Autoregressive(nn.Module, ABC):
    """p(image) as the product over pixels and channels of p(value | all before it), for images of one size.

    Images are (B, C, H, W) in [0, 1] at the levels of the likelihood. With `classes`, every call is about images of
    given classes, labels (B,). A subclass gives the two halves of a network: `vertical`, about the rows above, and
    `horizontal`, for each pixel.
    """

    parts = ("model",)
    period: int | None = 1  # of rows, after which sampling repeats itself; None: never

    def __init__(self, image_shape: Sequence[int], likelihood: Likelihood, classes: int | None):
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W), at least 1 each, got {tuple(image_shape)}")
        if classes is not None and classes < 1:
            raise ValueError(f"classes must be at least 1, or null, got {classes}")
        self.image_shape = tuple(image_shape)
        self.likelihood, self.classes = likelihood, classes

    # ------------------------------------------------------------------------------------------ what a family gives

    def vertical(
        self, above: Float[Tensor, "B C N W"], cond: Int[Tensor, " B"] | None, cache: Cache | None = None
    ) -> Sequence[Any]:
        """What `horizontal` is to know of the rows above, of the image shifted down by a row."""
        return ()

    @abstractmethod
    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        """The likelihood's parameters of each pixel, from the pixels before it: x in [-1, 1], `rows` of `vertical`."""

    def begin_row(self, batch: int, rows: Sequence[Any], cond: Int[Tensor, " B"] | None, cache: Cache) -> Pixels:
        """How the pixels of the row that the cache is at are made, `batch` of them at once, from `rows` of `vertical`.

        By default one after another by `horizontal`; families for which its overhead would be most of the time write
        out what there is to compute for a pixel.
        """

        def step(x: Tensor, column: int) -> Tensor:
            return self.horizontal(x[:, :, None, None], rows, cond, cache.at(cache.row, column))[:, :, 0, 0]

        def observe(x: Tensor, column: int) -> None:
            self.observe(x[:, :, None, None], cache.at(cache.row, column))

        return Pixels(step, observe)

    def observe(self, x: Float[Tensor, "B C 1 1"], cache: Cache) -> None:
        """Take in the values of the pixel at hand, once they are known."""
        for layer in cache.states:
            if isinstance(layer, CausalConv2d) and layer.mask_kind == "A":
                layer.write(x, cache)

    # ------------------------------------------------------------------------------------------------- likelihood

    def forward(
        self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B P H W"]:
        """The likelihood's parameters (logits, for most) of every pixel."""
        self.check_images(images)
        self.check_cond(cond, len(images))
        x = 2 * images - 1
        return self.horizontal(x, self.vertical(F.pad(x, (0, 0, 1, 0))[:, :, :-1], cond), cond)

    def log_prob(self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None) -> Float[Tensor, " B"]:
        """The exact log likelihood of each image in nats; ValueError for pixels that are at none of the levels."""
        values = to_values(images, self.likelihood.levels)
        outputs = self(images, cond)
        outputs = outputs.float() if outputs.dtype.itemsize < 4 else outputs
        return self.likelihood.log_prob(outputs, values).sum((1, 2))

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Bits per dimension, mean over the batch, and the nats of an image for the log."""
        nats = -self._log_prob(batch).mean()
        return {"loss": nats * self._bits, "nats": nats.detach()}

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per image (B,): nats, and bits per dimension."""
        nats = -self._log_prob(batch)
        return {"nats": nats, "bits_per_dim": nats * self._bits}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> Float[Tensor, " B"]:
        """`log_prob` of a batch's images, of their labels if the model has classes."""
        return self._log_prob(batch)

    @property
    def _bits(self) -> float:
        """Bits per dimension of a nat per image."""
        channels, height, width = self.image_shape
        return 1 / (channels * height * width * math.log(2))

    def _log_prob(self, batch: Mapping[str, Any]) -> Tensor:
        return self.log_prob(batch["image"], batch["label"] if self.classes is not None else None)

    # --------------------------------------------------------------------------------------------------- sampling

    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | int | None = None, image: Float[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None, temperature: float = 1.0,
        generator: torch.Generator | None = None, method: str = "cached", batch_size: int | None = None,
    ) -> Float[Tensor, "n C H W"]:  # fmt: skip
        """`sampling.sample` of this model."""
        from vision3dgen.generators import sampling  # which knows this class

        return sampling.sample(
            self, n, cond=cond, image=image, mask=mask, temperature=temperature, generator=generator, method=method,
            batch_size=batch_size,
        )  # fmt: skip

    def check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"images must be {('B', *self.image_shape)}, got {tuple(images.shape)}")

    def check_cond(self, cond: Tensor | None, count: int) -> None:
        if (cond is None) != (self.classes is None):
            wanted = "left out" if self.classes is None else f"labels of {self.classes} classes"
            raise ValueError(f"cond must be {wanted}: the model was built with classes={self.classes}")
        if cond is not None:
            if cond.shape != (count,):
                raise ValueError(f"cond must be ({count},), a label for each image, got {tuple(cond.shape)}")
            check_labels(cond, cond.new_empty(count, self.classes or 1, dtype=torch.float32))


class ClassBias(nn.Module):
    """A bias of maps for each class, or none at all if there are no classes: labels (B,) -> (B, C, 1, 1) or 0."""

    def __init__(self, classes: int | None, channels: int):
        super().__init__()
        self.table = None if classes is None else nn.Embedding(classes, channels)
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, cond: Int[Tensor, " B"] | None) -> Float[Tensor, "B C 1 1"] | float:
        if self.table is None or cond is None:
            return 0.0
        return self.table(cond)[:, :, None, None]

    def row(self, cond: Int[Tensor, " B"] | None) -> Float[Tensor, "B C 1"] | None:
        """The same for a row of pixels, as `CausalConv2d.begin` adds it."""
        return None if self.table is None or cond is None else self.table(cond)[:, :, None]
