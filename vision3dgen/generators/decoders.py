"""Networks from vectors (`DECODERS`) or maps (`MAP_DECODERS`) to what a likelihood needs to know of a picture.

The output is linear: the likelihood says what it means (a logit, a mean, a mean and a log scale).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.generators.encoders import ResidualBlock
from vision3dgen.layers import activation as make_activation
from vision3dgen.layers import norm as make_norm


class Decoder(nn.Module, ABC):
    """Vectors (B, inputs), a condition appended if there is one, to pictures' parameters (B, C, H, W)."""

    inputs: int

    @abstractmethod
    def forward(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B C H W"]: ...


class MLPDecoder(Decoder):
    """Linear layers with an activation between them. image_shape: of the output, `per_value` times the channels."""

    def __init__(
        self, inputs: int, image_shape: tuple[int, int, int] = (1, 28, 28), hidden: Sequence[int] = (400,), *,
        activation: str = "relu",
    ):  # fmt: skip
        super().__init__()
        self.inputs, self.image_shape = inputs, tuple(image_shape)
        widths = [inputs, *hidden]
        self.layers = nn.Sequential()
        for width, outputs in pairwise(widths):
            self.layers.extend([nn.Linear(width, outputs), make_activation(activation)])
        self.layers.append(nn.Linear(widths[-1], math.prod(image_shape)))

    def forward(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B C H W"]:
        return self.layers(z).unflatten(1, self.image_shape)


class ConvolutionalDecoder(Decoder):
    """A linear layer to maps of `widths[0]` channels, then 4x4 transposed convolutions of stride 2, one per width.

    size: of the square output, a multiple of 2 ** len(widths). out_channels: `per_value` times the channels.
    """

    def __init__(
        self, inputs: int, out_channels: int = 1, size: int = 28, widths: Sequence[int] = (64, 32), *,
        norm: str = "batch", activation: str = "relu",
    ):  # fmt: skip
        super().__init__()
        if not widths or size % 2 ** len(widths):
            raise ValueError(f"size must be a multiple of 2 ** {len(widths)}, and widths not empty, got {size}")
        self.inputs = inputs
        self.start = (widths[0], size >> len(widths), size >> len(widths))
        self.first = nn.Linear(inputs, math.prod(self.start))
        self.layers = nn.Sequential(make_norm(norm, widths[0]), make_activation(activation))
        for channels, width in pairwise(widths):
            self.layers.extend(
                [
                    nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=norm == "none"),
                    make_norm(norm, width),
                    make_activation(activation),
                ]
            )
        self.layers.append(nn.ConvTranspose2d(widths[-1], out_channels, 4, 2, 1))

    def forward(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B C H W"]:
        return self.layers(self.first(z).unflatten(1, self.start))


class MapDecoder(nn.Module, ABC):
    """Maps (B, inputs, H', W') to pictures' parameters (B, C, H, W)."""

    inputs: int

    @abstractmethod
    def forward(self, maps: Float[Tensor, "B Z H2 W2"]) -> Float[Tensor, "B C H W"]: ...


class ResidualDecoder(MapDecoder):
    """The mirror image of `ResidualEncoder`: `blocks` residual blocks, then `doublings` of the size."""

    def __init__(
        self, inputs: int, out_channels: int = 1, width: int = 128, *, doublings: int = 2, blocks: int = 2,
        block_width: int = 32,
    ):  # fmt: skip
        super().__init__()
        if doublings < 1:
            raise ValueError(f"doublings must be at least 1, got {doublings}")
        self.inputs = inputs
        self.layers = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1))
        self.layers.extend([ResidualBlock(width, block_width) for _ in range(blocks)])
        channels = width
        for _ in range(doublings - 1):
            outputs = max(width // 2, 1)
            self.layers.extend([nn.ReLU(), nn.ConvTranspose2d(channels, outputs, 4, 2, 1)])
            channels = outputs
        self.layers.extend([nn.ReLU(), nn.ConvTranspose2d(channels, out_channels, 4, 2, 1)])

    def forward(self, maps: Float[Tensor, "B Z H2 W2"]) -> Float[Tensor, "B C H W"]:
        return self.layers(maps)


DECODERS: dict[str, type[Decoder]] = {"mlp": MLPDecoder, "convolutional": ConvolutionalDecoder}
MAP_DECODERS: dict[str, type[MapDecoder]] = {"residual": ResidualDecoder}
