"""Networks from pictures to vectors (`ENCODERS`) or to smaller maps (`MAP_ENCODERS`), for all autoencoders."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.layers import activation as make_activation
from vision3dgen.layers import norm as make_norm


class Encoder(nn.Module, ABC):
    """Pictures (B, C, H, W) and a condition (B, K), if `conditions` = K > 0, to vectors (B, features)."""

    features: int
    conditions: int = 0

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "B C H W"], condition: Float[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B F"]: ...


class MLPEncoder(Encoder):
    """Linear layers with an activation after each; the condition is appended to the pixels. No layer: the pixels."""

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), hidden: Sequence[int] = (400,), *, conditions: int = 0,
        activation: str = "relu",
    ):  # fmt: skip
        super().__init__()
        self.image_shape, self.conditions = tuple(image_shape), conditions
        widths = [math.prod(image_shape) + conditions, *hidden]
        self.layers = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.layers.extend([nn.Linear(inputs, outputs), make_activation(activation)])
        self.features = widths[-1]

    def forward(
        self, images: Float[Tensor, "B C H W"], condition: Float[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B F"]:
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"the encoder takes images {('B', *self.image_shape)}, got {tuple(images.shape)}")
        flat = images.flatten(1)
        return self.layers(flat if condition is None else torch.cat([flat, condition], 1))


class ConvolutionalEncoder(Encoder):
    """4x4 convolutions of stride 2, each with a norm and an activation, down to one vector of all places.

    size: of the square pictures, halved (rounded down) by each of `widths`. A condition is appended as maps that are
    the same everywhere. norm: a name of `layers.NORMS`.
    """

    def __init__(
        self, in_channels: int = 1, size: int = 28, widths: Sequence[int] = (32, 64), *, conditions: int = 0,
        norm: str = "batch", activation: str = "relu",
    ):  # fmt: skip
        super().__init__()
        if not widths or size >> len(widths) < 1:
            raise ValueError(f"size {size} cannot be halved {len(widths)} times, and widths must not be empty")
        self.image_shape, self.conditions = (in_channels, size, size), conditions
        self.layers = nn.Sequential()
        channels = in_channels + conditions
        for width in widths:
            self.layers.extend(
                [
                    nn.Conv2d(channels, width, 4, 2, 1, bias=norm == "none"),
                    make_norm(norm, width),
                    make_activation(activation),
                ]
            )
            channels = width
        self.features = channels * (size >> len(widths)) ** 2

    def forward(
        self, images: Float[Tensor, "B C H W"], condition: Float[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B F"]:
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"the encoder takes images {('B', *self.image_shape)}, got {tuple(images.shape)}")
        if condition is not None:
            images = torch.cat([images, condition[..., None, None].expand(-1, -1, *images.shape[2:])], 1)
        return self.layers(images).flatten(1)


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), `hidden` channels between: the block of VQ-VAE (arXiv:1711.00937)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x + self.branch(x)


class MapEncoder(nn.Module, ABC):
    """Pictures (B, C, H, W) to maps (B, features, H', W')."""

    features: int

    @abstractmethod
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F H2 W2"]: ...


class ResidualEncoder(MapEncoder):
    """Halves a picture `halvings` times, then `blocks` residual blocks. (van den Oord et al. 2017, section 4.1)."""

    def __init__(
        self, in_channels: int = 1, width: int = 128, *, halvings: int = 2, blocks: int = 2, block_width: int = 32
    ):
        super().__init__()
        if halvings < 1:
            raise ValueError(f"halvings must be at least 1, got {halvings}")
        self.features = width
        self.layers = nn.Sequential()
        channels = in_channels
        for number in range(halvings):
            outputs = width if number == halvings - 1 else max(width // 2, 1)
            self.layers.extend([nn.Conv2d(channels, outputs, 4, 2, 1), nn.ReLU()])
            channels = outputs
        self.layers.append(nn.Conv2d(width, width, 3, padding=1))
        self.layers.extend([ResidualBlock(width, block_width) for _ in range(blocks)])
        self.layers.append(nn.ReLU())

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F H2 W2"]:
        return self.layers(images)


ENCODERS: dict[str, type[Encoder]] = {"mlp": MLPEncoder, "convolutional": ConvolutionalEncoder}
MAP_ENCODERS: dict[str, type[MapEncoder]] = {"residual": ResidualEncoder}
