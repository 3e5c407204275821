"""ImageGPT: a transformer decoder over the values of an image, one after another."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.autoregressive import Autoregressive
from vision3dgen.generators.likelihoods import Categorical
from vision3dgen.generators.masked import Cache, Pixels
from vision3dgen.layers import KeyValueCache, TransformerBlock


@dataclass
class _Read:
    """What was read of an image: keys and values of each block, and the last token, None before the first."""

    past: list[KeyValueCache]
    memory: Tensor  # (2 L, B, heads, T, D), the keys and the values of a block after those of the one before
    last: Tensor | None = None  # (B,)

    @property
    def length(self) -> int:
        return self.past[0].length

    def grow(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Room for one token in `memory`, and what is in it with that."""
        place = self.length
        for each in self.past:
            each.length = place + 1
        return self.memory.narrow(3, place, 1).unbind(), self.memory.narrow(3, 0, place + 1).unbind()


def _gelu_of_scaled(x: Tensor) -> Tensor:
    """√2 GELU(√2 x)."""
    return torch.addcmul(x, x, torch.erf(x))


def block_step(block: TransformerBlock, cache: Cache) -> Callable[..., Tensor]:
    """A block that normalizes first on the next token alone: (B, C) -> (B, C), which it overwrites.

    With it come the places (B, heads, 1, D) of its key and value, and all keys and values (B, heads, T, D) so far.
    """
    attention, first, second = block.self_attn, block.norm1, block.norm2
    assert attention.in_proj_bias is not None
    first_layer, second_layer = block.linear1, block.linear2
    layers = (attention.in_proj_weight, attention.out_proj.weight, first_layer.weight, second_layer.weight)
    activation: Callable[[Tensor], Tensor] = block.activation
    # GELU(x) = x / 2 (1 + erf(x / √2)): with the constants in the weights, as torch's is slow for so few numbers
    exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    constant = 0.5**0.5 if exact else 1.0
    scales = (1.0, 1.0, constant, constant)
    inward, outward, wide, narrow, wide_bias = cache.state(
        block,
        lambda: [
            *(scale * weight.T.contiguous() for weight, scale in zip(layers, scales)), constant * first_layer.bias
        ],
    )  # fmt: skip
    if exact:
        activation = _gelu_of_scaled
    in_bias, out_bias, narrow_bias = attention.in_proj_bias, attention.out_proj.bias, second_layer.bias
    norms = [((norm.weight.shape[0],), norm.weight, norm.bias, norm.eps) for norm in (first, second)]
    heads = attention.heads

    def step(y: Tensor, own_key: Tensor, own_value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        together = torch.addmm(in_bias, torch.layer_norm(y, *norms[0]), inward)
        query, key, value = together.view(len(y), 3, heads, 1, -1).unbind(1)
        own_key.copy_(key)
        own_value.copy_(value)
        seen = F.scaled_dot_product_attention(query, keys, values)
        y.add_(out_bias).addmm_(seen.view(y.shape), outward)
        network = activation(torch.addmm(wide_bias, torch.layer_norm(y, *norms[1]), wide))
        return y.add_(narrow_bias).addmm_(network, narrow)

    return step


class ImageGPT(Autoregressive):
    """Causal transformer blocks over the H W C values, pixel after pixel, the channels of a pixel one after another.

    Tokens and places have learned embeddings; the first input is a start, one for each class if there are classes.
    Source: Chen et al. 2020, Generative Pretraining from Pixels. Its networks: width=512, heads=8, layers=24 (S);
    1024, 8, 36 (M); 1536, 16, 48 (L), on 32 x 32. Differs: a token is a value of a channel, not one of 512 colors, so
    that images have a likelihood; layer normalization and GELU are torch's.
    """

    period = None  # what there is to attend to grows

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), levels: int = 2, *, width: int = 64, heads: int = 2,
        layers: int = 8, dropout: float = 0.0, classes: int | None = None,
    ):  # fmt: skip
        likelihood = Categorical(image_shape[0], levels)
        super().__init__(image_shape, likelihood, classes)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.depth, self.levels, self.heads = image_shape[0], levels, heads
        self.length = image_shape[0] * image_shape[1] * image_shape[2]
        self.tokens = nn.Embedding(self.depth * levels, width)
        self.positions = nn.Parameter(torch.empty(self.length, width))
        self.start = nn.Embedding(classes or 1, width)
        for table in (self.tokens.weight, self.positions, self.start.weight):
            nn.init.normal_(table, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, levels)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        tokens = self._tokens(x)
        if cache is None:
            inputs = torch.cat([self._start(cond, len(x)), self.tokens(tokens[:, :-1])], 1)
            return self._outputs(self._read(inputs, 0, None), x)
        state = self._state(len(x), cache)
        if cache.column is None:
            inputs = torch.cat([self._before(state, cond, len(x)), self.tokens(tokens[:, :-1])], 1)
            state.last = tokens[:, -1]
            return self._outputs(self._read(inputs, state.length, state.past), x)
        raise ValueError("a pixel of this model is made by `begin_row`")

    def begin_row(self, batch: int, rows: Sequence[Any], cond: Int[Tensor, " B"] | None, cache: Cache) -> Pixels:
        state = self._state(batch, cache)
        blocks = [block_step(block, cache) for block in self.blocks]  # type: ignore[arg-type]
        positions, norm, width = self.positions.unbind(), self.norm, (self.positions.shape[1],)
        start, last = self._start(cond, batch)[:, 0], self.tokens.weight

        def step(x: Tensor, column: int) -> Tensor:
            place = state.length
            channel = place - (cache.row * cache.width + column) * self.depth
            if channel:
                inputs = last[self._tokens(x[:, :, None, None])[:, channel - 1]]
            else:
                inputs = start if state.last is None else last[state.last]
            y = inputs + positions[place]
            own, seen = state.grow()
            for number, block in enumerate(blocks):
                both = slice(2 * number, 2 * number + 2)
                y = block(y, *own[both], *seen[both])
            y = torch.layer_norm(y, width, norm.weight, norm.bias, norm.eps)
            logits = F.linear(y, self.logits.weight, self.logits.bias)
            if self.depth == 1:
                return logits
            outputs = logits.new_zeros(batch, self.depth, self.levels)  # of one channel; the others' are not asked for
            outputs[:, channel] = logits
            return outputs.flatten(1)

        half, offset = (self.levels - 1) / 2, self.levels * (self.depth - 1)

        def observe(x: Tensor, column: int) -> None:
            state.last = (x[:, -1] * half + (half + offset)).round().long()

        return Pixels(step, observe)

    def _state(self, batch: int, cache: Cache) -> _Read:
        def nothing_read() -> _Read:
            size = self.positions.shape[1] // self.heads
            memory = self.positions.new_zeros(2 * len(self.blocks), batch, self.heads, self.length, size)
            past = [KeyValueCache(self.length) for _ in self.blocks]
            for each, keys, values in zip(past, memory[::2], memory[1::2]):
                each.keys, each.values = keys, values
            return _Read(past, memory)

        return cache.state(self, nothing_read)

    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float:
        """The bits of a level if all are equally probable, which they are as the last layer starts at 0."""
        return math.log2(self.levels)

    def _tokens(self, x: Float[Tensor, "B C N W"]) -> Int[Tensor, "B T"]:
        """Numbers of the values in the order they are read, those of each channel apart."""
        values = ((x + 1) / 2 * (self.levels - 1)).round().long()
        values = values + self.levels * torch.arange(self.depth, device=x.device)[:, None, None]
        return values.permute(0, 2, 3, 1).flatten(1)

    def _start(self, cond: Tensor | None, batch: int) -> Tensor:
        index = torch.zeros(batch, dtype=torch.int64, device=self.positions.device) if cond is None else cond
        return self.start(index)[:, None]

    def _before(self, state: _Read, cond: Tensor | None, batch: int) -> Tensor:
        return self._start(cond, batch) if state.last is None else self.tokens(state.last)[:, None]

    def _read(self, inputs: Tensor, first: int, past: list[KeyValueCache] | None) -> Float[Tensor, "B T L"]:
        """Logits of the tokens that follow `inputs`, which begin at place `first`."""
        count = inputs.shape[1]
        y = self.dropout(inputs + self.positions[first : first + count])
        for number, block in enumerate(self.blocks):
            y = block(y, causal=count > 1, past=None if past is None else past[number])
        return self.logits(self.norm(y))

    def _outputs(self, logits: Float[Tensor, "B T L"], x: Tensor) -> Tensor:
        """(B, N W C, L) -> (B, C L, N, W)."""
        maps = logits.unflatten(1, (*x.shape[2:], self.depth))  # (B, N, W, C, L)
        return maps.permute(0, 3, 4, 1, 2).flatten(1, 2)
