"""PixelSNAIL: causal convolutions, and attention to every pixel before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.masked import POINT, Cache, CausalConv2d, Reach, here
from vision3dgen.generators.pixelcnnpp import PIXELS, GatedResNet, WeightNormalized, normalized, pixel_likelihood
from vision3dgen.layers import KeyValueCache
from vision3dgen.layers.attention import attention


@dataclass
class _Looked:
    memory: KeyValueCache  # of all pixels before the one at hand
    features: Tensor | None = None  # of the pixel at hand, which with its values make its key


class PixelAttention(nn.Module):
    """Each pixel looks at all pixels before its own, whose keys and values hold their colors too.

    inputs: channels of the image (with what is added to it). Source: Chen et al. 2018 (arXiv:1712.09763), section 3.
    """

    def __init__(self, channels: int, inputs: int, key_channels: int, value_channels: int, dropout: float):
        super().__init__()
        self.split = (key_channels, value_channels)
        seen = channels + inputs
        self.mix = GatedResNet(seen, POINT, 0, dropout, None)
        self.keys_and_values = CausalConv2d(seen, key_channels + value_channels)
        self.mix_query = GatedResNet(channels, POINT, 0, dropout, None)
        self.query = CausalConv2d(channels, key_channels)

    def forward(
        self, features: Float[Tensor, "B C N W"], image: Float[Tensor, "B I N W"], cache: Cache | None, size: int
    ) -> Float[Tensor, "B V N W"]:
        """features: of pixels, from those before; image: their own values, not known yet where they are made."""
        query = _sequence(self.query(self.mix_query(features, None, None, cache), cache))
        if cache is None:
            return _maps(self._look(query, *self._remember(features, image, cache)), features)
        state = cache.state(self, lambda: _Looked(KeyValueCache(size)))
        if cache.column is None:
            return _maps(self._look(query, *state.memory.extend(*self._remember(features, image, cache))), features)
        state.features = features
        memory = state.memory
        if memory.keys is None or memory.values is None:  # the first pixel sees nothing
            return features.new_zeros(len(features), self.split[1], 1, 1)
        keys, values = memory.keys[:, :, : memory.length], memory.values[:, :, : memory.length]
        return _maps(attention(query, keys, values), features)

    def observe(self, image: Float[Tensor, "B I 1 1"], cache: Cache) -> None:
        """Remember the pixel at hand."""
        state = cache.states[self]
        state.memory.extend(*self._remember(state.features, image, None))

    def _remember(self, features: Tensor, image: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        both = self.keys_and_values(self.mix(torch.cat([features, image], 1), None, None, cache), cache)
        keys, values = both.split(self.split, 1)
        return _sequence(keys), _sequence(values)

    def _look(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The last pixels of all look at those before them, not at themselves."""
        count, total = query.shape[2], keys.shape[2]
        before = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count - 1)
        return attention(query, keys, values, before)


def _sequence(maps: Tensor) -> Tensor:
    """(B, C, N, W) -> (B, 1, N W, C): one head."""
    return maps.flatten(2).transpose(1, 2)[:, None]


def _maps(sequence: Tensor, like: Tensor) -> Tensor:
    return sequence[:, 0].transpose(1, 2).unflatten(2, like.shape[2:])


class SnailBlock(nn.Module):
    """Gated residual blocks of 2 x 2 causal convolutions, then attention whose result a 1 x 1 block takes in."""

    def __init__(
        self, channels: int, inputs: int, repeats: int, key_channels: int, value_channels: int, dropout: float,
        classes: int | None,
    ):  # fmt: skip
        super().__init__()
        self.convolutions = nn.ModuleList(GatedResNet(channels, PIXELS, 0, dropout, classes) for _ in range(repeats))
        self.attention = PixelAttention(channels, inputs, key_channels, value_channels, dropout)
        self.mix = GatedResNet(channels, POINT, value_channels, dropout, None)

    def forward(
        self, x: Float[Tensor, "B C N W"], image: Float[Tensor, "B I N W"], cond: Int[Tensor, " B"] | None,
        cache: Cache | None, size: int,
    ) -> Float[Tensor, "B C N W"]:  # fmt: skip
        for block in self.convolutions:
            x = block(x, None, cond, cache)
        return self.mix(x, self.attention(x, image, cache, size), None, cache)


class PixelSNAIL(WeightNormalized):
    """`blocks` of gated residual convolutions, `repeats` in each, and attention to all pixels before.

    mixtures: logistic components of a pixel; None gives images of one channel a softmax over their levels.
    Source: Chen et al. 2018 (arXiv:1712.09763). Its CIFAR-10 network: channels=256, blocks=12, repeats=4,
    key_channels=16, value_channels=128, dropout=0.5, mixtures=10. Differs: queries are of the features alone, the
    place of a pixel is in its key.
    """

    period = None  # what there is to attend to grows

    def __init__(
        self, image_shape: tuple[int, int, int] = (3, 32, 32), levels: int = 256, *, channels: int = 256,
        blocks: int = 12, repeats: int = 4, key_channels: int = 16, value_channels: int = 128,
        mixtures: int | None = 10, dropout: float = 0.5, classes: int | None = None,
    ):  # fmt: skip
        likelihood = pixel_likelihood(image_shape[0], levels, mixtures)
        super().__init__(image_shape, likelihood, classes)
        depth, height, width = image_shape
        inputs = depth + 3  # ones and the place
        rows, columns = torch.arange(height) / height - 0.5, torch.arange(width) / width - 0.5
        place = torch.stack([torch.ones(height, width), *torch.meshgrid(rows, columns, indexing="ij")])
        self.place: Tensor
        self.register_buffer("place", place[None], persistent=False)
        self.from_row_above = CausalConv2d(depth + 1, channels, Reach(0, 1, 1), None)
        self.from_left = CausalConv2d(inputs, channels, Reach(1, 1, 0), "A")
        self.blocks = nn.ModuleList(
            SnailBlock(channels, inputs, repeats, key_channels, value_channels, dropout, classes) for _ in range(blocks)
        )
        self.out = CausalConv2d(channels, likelihood.outputs)
        normalized(self)

    def vertical(
        self, above: Float[Tensor, "B C N W"], cond: Int[Tensor, " B"] | None, cache: Cache | None = None
    ) -> list[Tensor]:
        ones = torch.ones_like(above[:, :1])
        if cache is None or cache.row == 0:
            ones[:, :, 0] = 0  # the row above the image
        return [self.from_row_above(torch.cat([above, ones], 1), cache)]

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        image = self._placed(x, cache)
        y = here(rows[0], cache) + self.from_left(image, cache)
        for block in self.blocks:
            y = block(y, image, cond, cache, self.image_shape[1] * self.image_shape[2])
        return self.out(F.elu(y), cache)

    def observe(self, x: Float[Tensor, "B C 1 1"], cache: Cache) -> None:
        image = self._placed(x, cache)
        self.from_left.write(image, cache)
        for layer in cache.states:
            if isinstance(layer, PixelAttention):
                layer.observe(image, cache)

    def _placed(self, x: Tensor, cache: Cache | None) -> Tensor:
        """x with ones and with where it is in the image."""
        first = 0 if cache is None else cache.row
        place = here(self.place[:, :, first : first + x.shape[2]], cache)
        return torch.cat([x, place.expand(len(x), -1, -1, -1)], 1)
