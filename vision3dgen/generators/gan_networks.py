"""Networks of GANs: DCGAN, residual networks with or without attention, and linear layers for anything small.

Generators map z (B, latents), and labels (B,) if they have classes, to samples in [-1, 1]; discriminators map samples
and labels to logits (B,). Square pictures of a side of 4 to 7 times a power of two: 28, 32, 48, 64.

conditioning   of a generator                                  of a discriminator
concatenation  one-hot label appended to z                     one-hot label as maps appended to the picture
batch_norm     scale and shift of each norm by class
projection                                                     + embedding(label) . features (Miyato & Koyama 2018)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice
from vision3dgen.layers import ConditionalBatchNorm2d, SelfAttention2d, add_spectral_norm, initialize
from vision3dgen.layers import norm as make_norm

Labels = Int[Tensor, " B"] | None


class GeneratorNetwork(nn.Module, ABC):
    """Noise (B, Z) to samples, of a class where the network has `classes`."""

    latents: int
    classes: int | None = None

    @abstractmethod
    def forward(self, z: Float[Tensor, "B Z"], labels: Labels = None) -> Float[Tensor, "B *S"]: ...


class DiscriminatorNetwork(nn.Module, ABC):
    """Samples to one score each, above 0 for real, of a class where the network has `classes`."""

    classes: int | None = None

    @abstractmethod
    def forward(self, samples: Float[Tensor, "B *S"], labels: Labels = None) -> Float[Tensor, " B"]: ...


class Pyramid(NamedTuple):
    start: int  # the smallest side, 4 to 7
    doublings: int


def pyramid(size: int) -> Pyramid:
    """How to reach a side by doubling; a ValueError for sides that cannot be."""
    start, doublings = size, 0
    while start > 7 and start % 2 == 0:
        start, doublings = start // 2, doublings + 1
    if not 4 <= start <= 7 or not doublings:
        raise ValueError(f"size must be 4, 5, 6 or 7 times a power of two, at least 8, got {size}")
    return Pyramid(start, doublings)


class Normalize(nn.Module):
    """Batch normalization, by class where there are classes."""

    def __init__(self, channels: int, classes: int | None):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if classes is None else ConditionalBatchNorm2d(classes, channels)
        self.conditional = classes is not None

    def forward(self, x: Float[Tensor, "B C H W"], labels: Labels) -> Float[Tensor, "B C H W"]:
        return self.norm(x, labels) if self.conditional else self.norm(x)


def _appended(z: Float[Tensor, "B Z"], labels: Labels, classes: int) -> Float[Tensor, "B Z2"]:
    assert labels is not None
    return torch.cat([z, F.one_hot(labels, classes).to(z.dtype)], 1)


def _with_maps(images: Float[Tensor, "B C H W"], labels: Labels, classes: int) -> Float[Tensor, "B C2 H W"]:
    assert labels is not None
    maps = F.one_hot(labels, classes).to(images.dtype)[..., None, None]
    return torch.cat([images, maps.expand(-1, -1, *images.shape[2:])], 1)


def _normalize_spectra(network: nn.Module) -> None:
    """Spectral norm of linear and convolution layers; embeddings of conditional norms keep their scales."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            add_spectral_norm(layer)


class DCGANGenerator(GeneratorNetwork):
    """A linear layer to the smallest maps, then 4x4 transposed convolutions of stride 2 with batch norm and ReLU.

    width: channels of the last maps before the picture; they double towards the start.
    Source: Radford et al. 2016 (arXiv:1511.06434), figure 1. Differs: norms start at a scale of 1 exactly.
    """

    def __init__(
        self, latents: int = 100, channels: int = 1, size: int = 28, width: int = 64, *, classes: int | None = None,
        conditioning: str = "concatenation",
    ):  # fmt: skip
        super().__init__()
        check_choice("conditioning", conditioning, ("concatenation", "batch_norm"))
        self.latents, self.classes = latents, classes
        self.appended = classes if classes is not None and conditioning == "concatenation" else 0
        by_class = classes if conditioning == "batch_norm" else None
        start, doublings = pyramid(size)
        widths = [width << level for level in reversed(range(doublings))]
        self.start = (widths[0], start, start)
        self.first = nn.Linear(latents + self.appended, math.prod(self.start), bias=False)
        self.norms = nn.ModuleList(Normalize(each, by_class) for each in widths)
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=outputs == channels)
            for inputs, outputs in zip(widths, [*widths[1:], channels])
        )
        initialize(self, "dcgan")

    def forward(self, z: Float[Tensor, "B Z"], labels: Labels = None) -> Float[Tensor, "B C H W"]:
        if self.appended:
            z = _appended(z, labels, self.appended)
        x = self.first(z).unflatten(1, self.start)
        for norm, convolution in zip(self.norms, self.convolutions):
            x = convolution(norm(x, labels).relu())
        return x.tanh()


class DCGANDiscriminator(DiscriminatorNetwork):
    """4x4 convolutions of stride 2 with a norm (but for the first) and leaky ReLU of 0.2, then one linear layer.

    norm: "batch" as published; a gradient penalty needs "layer" or "none". spectral: spectral norm on every layer.
    """

    def __init__(
        self, channels: int = 1, size: int = 28, width: int = 64, *, norm: str = "batch", spectral: bool = False,
        classes: int | None = None, conditioning: str = "concatenation",
    ):  # fmt: skip
        super().__init__()
        check_choice("conditioning", conditioning, ("concatenation", "projection"))
        self.classes = classes
        self.appended = classes if classes is not None and conditioning == "concatenation" else 0
        start, halvings = pyramid(size)
        widths = [width << level for level in range(halvings)]
        self.layers = nn.Sequential(nn.Conv2d(channels + self.appended, width, 4, 2, 1), nn.LeakyReLU(0.2))
        for inputs, outputs in pairwise(widths):
            self.layers.extend(
                [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=norm == "none"), make_norm(norm, outputs), nn.LeakyReLU(0.2)]
            )
        self.score = nn.Linear(widths[-1] * start * start, 1)
        self.embedding = nn.Embedding(classes, widths[-1]) if classes is not None and not self.appended else None
        initialize(self, "dcgan")
        if spectral:
            _normalize_spectra(self)
            if self.embedding is not None:
                add_spectral_norm(self.embedding)

    def forward(self, samples: Float[Tensor, "B C H W"], labels: Labels = None) -> Float[Tensor, " B"]:
        if self.appended:
            samples = _with_maps(samples, labels, self.appended)
        features = self.layers(samples)
        score = self.score(features.flatten(1))[:, 0]
        if self.embedding is None:
            return score
        return score + (self.embedding(labels) * features.sum((2, 3))).sum(1)


class UpBlock(nn.Module):
    """norm, ReLU, doubling, 3x3, norm, ReLU, 3x3 beside doubling and 1x1: a residual block of a generator."""

    def __init__(self, inputs: int, outputs: int, classes: int | None):
        super().__init__()
        self.norm1, self.norm2 = Normalize(inputs, classes), Normalize(outputs, classes)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B C H W"], labels: Labels) -> Float[Tensor, "B C2 H2 W2"]:
        branch = self.conv1(F.interpolate(self.norm1(x, labels).relu(), scale_factor=2))
        branch = self.conv2(self.norm2(branch, labels).relu())
        return branch + self.shortcut(F.interpolate(x, scale_factor=2))


class DownBlock(nn.Module):
    """A residual block of a discriminator; `halve` ends it with a mean over 2x2, `first` takes the picture itself."""

    def __init__(self, inputs: int, outputs: int, *, norm: str, halve: bool, first: bool = False):
        super().__init__()
        self.halve, self.first = halve, first
        self.norm1 = nn.Identity() if first else make_norm(norm, inputs)
        self.norm2 = make_norm(norm, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if halve or inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        branch = self.conv1(x if self.first else self.norm1(x).relu())
        branch = self.conv2(self.norm2(branch).relu())
        both = branch + self.shortcut(x)
        return F.avg_pool2d(both, 2) if self.halve else both


class ResNetGenerator(GeneratorNetwork):
    """A linear layer to the smallest maps, a residual block for each doubling, batch norm, ReLU, 3x3, tanh.

    attention: the side of the maps that self-attention follows, None for none. spectral: spectral norm too (SAGAN).
    Source: Gulrajani et al. 2017, appendix F; Miyato et al. 2018, table 4 (SNGAN: latents 128, width 256, size 32);
    Zhang et al. 2019 (SAGAN). Differs: Xavier's initialization without their gain.
    """

    def __init__(
        self, latents: int = 128, channels: int = 3, size: int = 32, width: int = 256, *, attention: int | None = None,
        spectral: bool = False, classes: int | None = None, conditioning: str = "batch_norm",
    ):  # fmt: skip
        super().__init__()
        check_choice("conditioning", conditioning, ("concatenation", "batch_norm"))
        self.latents, self.classes = latents, classes
        self.appended = classes if classes is not None and conditioning == "concatenation" else 0
        by_class = classes if conditioning == "batch_norm" else None
        start, doublings = pyramid(size)
        self.start = (width, start, start)
        self.first = nn.Linear(latents + self.appended, math.prod(self.start))
        self.blocks = nn.ModuleList(UpBlock(width, width, by_class) for _ in range(doublings))
        self.attention = _attention(attention, [start << level for level in range(1, doublings + 1)], width)
        self.norm, self.last = Normalize(width, None), nn.Conv2d(width, channels, 3, padding=1)
        initialize(self, "xavier_uniform")
        if spectral:
            _normalize_spectra(self)

    def forward(self, z: Float[Tensor, "B Z"], labels: Labels = None) -> Float[Tensor, "B C H W"]:
        if self.appended:
            z = _appended(z, labels, self.appended)
        x = self.first(z).unflatten(1, self.start)
        for block, attend in zip(self.blocks, self.attention):
            x = attend(block(x, labels))
        return self.last(self.norm(x, None).relu()).tanh()


class ResNetDiscriminator(DiscriminatorNetwork):
    """Residual blocks that halve the picture down to a side of 4 to 8, two that do not, ReLU, sum over places, linear.

    norm: "none" (SNGAN), or "layer" for a gradient penalty. For the rest see `ResNetGenerator`.
    """

    def __init__(
        self, channels: int = 3, size: int = 32, width: int = 128, *, norm: str = "none", spectral: bool = True,
        attention: int | None = None, classes: int | None = None, conditioning: str = "projection",
    ):  # fmt: skip
        super().__init__()
        check_choice("conditioning", conditioning, ("concatenation", "projection"))
        self.classes = classes
        self.appended = classes if classes is not None and conditioning == "concatenation" else 0
        pyramid(size)
        sides = []
        while size > 8:
            size //= 2
            sides.append(size)
        blocks = [
            DownBlock(channels + self.appended if level == 0 else width, width, norm=norm, halve=True, first=level == 0)
            for level in range(len(sides))
        ] or [DownBlock(channels + self.appended, width, norm=norm, halve=False, first=True)]
        attentions = _attention(attention, sides, width) if sides else [nn.Identity()]
        self.layers = nn.Sequential()
        for block, attend in zip(blocks, attentions):
            self.layers.extend([block, attend])
        self.layers.extend([DownBlock(width, width, norm=norm, halve=False) for _ in range(2)])
        self.score = nn.Linear(width, 1)
        self.embedding = nn.Embedding(classes, width) if classes is not None and not self.appended else None
        initialize(self, "xavier_uniform")
        if self.embedding is not None:
            nn.init.xavier_uniform_(self.embedding.weight)
        if spectral:
            _normalize_spectra(self)
            if self.embedding is not None:
                add_spectral_norm(self.embedding)

    def forward(self, samples: Float[Tensor, "B C H W"], labels: Labels = None) -> Float[Tensor, " B"]:
        if self.appended:
            samples = _with_maps(samples, labels, self.appended)
        features = self.layers(samples).relu().sum((2, 3))
        score = self.score(features)[:, 0]
        return score if self.embedding is None else score + (self.embedding(labels) * features).sum(1)


def _attention(side: int | None, sides: Sequence[int], width: int) -> nn.ModuleList:
    """Self-attention after the block whose maps have this side, nothing after the others."""
    if side is not None:
        check_choice("attention", side, sides)
    return nn.ModuleList(SelfAttention2d(width, pool=2) if own == side else nn.Identity() for own in sides)


class MLPGenerator(GeneratorNetwork):
    """Linear layers with ReLU to samples of any shape; bounded: tanh at the end."""

    def __init__(
        self, latents: int = 64, shape: Sequence[int] = (1, 28, 28), hidden: Sequence[int] = (256, 256), *,
        bounded: bool = True, classes: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.latents, self.classes, self.shape, self.bounded = latents, classes, tuple(shape), bounded
        widths = [latents + (classes or 0), *hidden]
        self.layers = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.layers.extend([nn.Linear(inputs, outputs), nn.ReLU()])
        self.layers.append(nn.Linear(widths[-1], math.prod(shape)))

    def forward(self, z: Float[Tensor, "B Z"], labels: Labels = None) -> Float[Tensor, "B *S"]:
        x = self.layers(z if self.classes is None else _appended(z, labels, self.classes)).unflatten(1, self.shape)
        return x.tanh() if self.bounded else x


class MLPDiscriminator(DiscriminatorNetwork):
    """Linear layers with leaky ReLU of 0.2 on samples of any shape; labels are appended."""

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), hidden: Sequence[int] = (256, 256), *, spectral: bool = False,
        classes: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.classes = classes
        widths = [math.prod(shape) + (classes or 0), *hidden]
        self.layers = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.layers.extend([nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)])
        self.layers.append(nn.Linear(widths[-1], 1))
        if spectral:
            _normalize_spectra(self)

    def forward(self, samples: Float[Tensor, "B *S"], labels: Labels = None) -> Float[Tensor, " B"]:
        flat = samples.flatten(1)
        return self.layers(flat if self.classes is None else _appended(flat, labels, self.classes))[:, 0]


class VoxelGenerator(GeneratorNetwork):
    """A linear layer, then 4x4x4 transposed convolutions of stride 2 with batch norm and ReLU: voxels (B, D, H, W).

    Source: Wu et al. 2016 (arXiv:1610.07584), 3D-GAN: latents 200, size 64, width 64. Differs: z is normal, not uniform
    in [0, 1], and the output tanh, which `GAN` brings to [0, 1].
    """

    def __init__(self, latents: int = 200, size: int = 64, width: int = 64):
        super().__init__()
        self.latents = latents
        start, doublings = pyramid(size)
        widths = [width << level for level in reversed(range(doublings))]
        self.start = (widths[0], start, start, start)
        self.first = nn.Linear(latents, math.prod(self.start), bias=False)
        self.layers = nn.Sequential()
        for inputs, outputs in pairwise([*widths, 1]):
            self.layers.extend(
                [nn.BatchNorm3d(inputs), nn.ReLU(), nn.ConvTranspose3d(inputs, outputs, 4, 2, 1, bias=outputs == 1)]
            )
        initialize(self, "dcgan")

    def forward(self, z: Float[Tensor, "B Z"], labels: Labels = None) -> Float[Tensor, "B D H W"]:
        return self.layers(self.first(z).unflatten(1, self.start))[:, 0].tanh()


class VoxelDiscriminator(DiscriminatorNetwork):
    """4x4x4 convolutions of stride 2 with a norm (but for the first) and leaky ReLU of 0.2, then one linear layer."""

    def __init__(self, size: int = 64, width: int = 64, *, norm: str = "batch"):
        super().__init__()
        start, halvings = pyramid(size)
        widths = [width << level for level in range(halvings)]
        self.layers = nn.Sequential(nn.Conv3d(1, width, 4, 2, 1), nn.LeakyReLU(0.2))
        for inputs, outputs in pairwise(widths):
            self.layers.extend(
                [nn.Conv3d(inputs, outputs, 4, 2, 1, bias=norm == "none"), make_norm(norm, outputs, dims=3)]
            )
            self.layers.append(nn.LeakyReLU(0.2))
        self.score = nn.Linear(widths[-1] * start**3, 1)
        initialize(self, "dcgan")

    def forward(self, samples: Float[Tensor, "B D H W"], labels: Labels = None) -> Float[Tensor, " B"]:
        return self.score(self.layers(samples[:, None]).flatten(1))[:, 0]


GENERATOR_NETWORKS: dict[str, type[GeneratorNetwork]] = {
    "dcgan": DCGANGenerator,
    "resnet": ResNetGenerator,
    "mlp": MLPGenerator,
    "voxels": VoxelGenerator,
}
DISCRIMINATOR_NETWORKS: dict[str, type[DiscriminatorNetwork]] = {
    "dcgan": DCGANDiscriminator,
    "resnet": ResNetDiscriminator,
    "mlp": MLPDiscriminator,
    "voxels": VoxelDiscriminator,
}
