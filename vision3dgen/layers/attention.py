"""Attention: scaled dot products with masks, several heads, transformer blocks, and self-attention over maps.

Masks follow `torch.nn.functional.scaled_dot_product_attention`: a boolean mask is True where a query may look, a float
mask is added to the scores. A query that may look nowhere gets zeros, not NaN. `causal` aligns the ends: of T queries
and S keys, query i sees keys 0 to i + S - T, so that the last query sees every key, whether earlier keys are cached or
not. Letters: T queries, S keys, D features, h heads.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.layers.activations import activation as build_activation
from vision3dgen.layers.regularize import StochasticDepth

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


class _Visible(NamedTuple):
    mask: Mask | None  # to attend with; every row sees something, for not every fused kernel survives one that does not
    blind: Bool[Tensor, "... T 1"] | None  # queries that saw nothing, to be zeroed


def causal_mask(queries: int, keys: int, device: torch.device | str | None = None) -> Bool[Tensor, "T S"]:
    """True where query i of the last `queries` positions of `keys` may look: at keys up to i + keys - queries."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def padding_mask(lengths: Tensor, size: int) -> Bool[Tensor, "B 1 S"]:
    """True at the first `lengths[b]` keys of each sample: a mask for every query of a ragged batch."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]


def _visible(query: Tensor, key: Tensor, mask: Mask | None, causal: bool) -> _Visible:
    if causal:
        ahead = causal_mask(query.shape[-2], key.shape[-2], query.device)
        if mask is None:
            mask = ahead
        else:
            mask = mask & ahead if mask.dtype == torch.bool else mask.masked_fill(~ahead, -math.inf)
    if mask is None:
        return _Visible(None, None)
    if mask.dtype == torch.bool:
        blind = ~mask.any(-1, keepdim=True)
        return _Visible(mask | blind, blind)
    blind = (mask == -math.inf).all(-1, keepdim=True)
    return _Visible(mask.masked_fill(blind, 0.0).to(query.dtype), blind)


def attention(
    query: Float[Tensor, "*B T D"],
    key: Float[Tensor, "*B S D"],
    value: Float[Tensor, "*B S E"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "*B T E"]:
    """softmax(scale * query key^T + mask) value, with scale 1/sqrt(D) unless given; mask broadcasts to (*B, T, S).

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; computed by torch's fused kernels. Differs: rows without
    a key are zero; `causal` aligns the ends (torch aligns the beginnings).
    """
    if causal and mask is None and query.shape[-2] == key.shape[-2]:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    mask, blind = _visible(query, key, mask, causal)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out if blind is None else out.masked_fill(blind, 0.0)


def attention_weights(
    query: Float[Tensor, "*B T D"],
    key: Float[Tensor, "*B S D"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*B T S"]:
    """The softmax of `attention` written out: each row sums to 1, or is zero where the query may look nowhere."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    mask, blind = _visible(query, key, mask, causal)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    return weights if blind is None else weights.masked_fill(blind, 0.0)


class Heads(NamedTuple):
    query: Float[Tensor, "B h T D"]
    key: Float[Tensor, "B h S D"]
    value: Float[Tensor, "B h S D"]


class KeyValueCache:
    """Keys and values of positions that were seen, in room for `size` of them."""

    def __init__(self, size: int):
        self.size, self.length = size, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(
        self, key: Float[Tensor, "B h T D"], value: Float[Tensor, "B h T E"]
    ) -> tuple[Float[Tensor, "B h S D"], Float[Tensor, "B h S E"]]:
        """All keys and values so far, with T more at the end; ValueError where there is no room for them."""
        end = self.length + key.shape[2]
        if end > self.size:
            raise ValueError(f"the cache has room for {self.size} positions, got {end}")
        if self.keys is None or self.values is None:
            self.keys = key.new_zeros(*key.shape[:2], self.size, key.shape[3])
            self.values = value.new_zeros(*value.shape[:2], self.size, value.shape[3])
        self.keys.narrow(2, self.length, key.shape[2]).copy_(key)
        self.values.narrow(2, self.length, key.shape[2]).copy_(value)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class MultiHeadAttention(nn.Module):
    """Attention in `heads` subspaces: queries (B, T, channels) look at keys and values, themselves when none are given.

    `key_channels` and `value_channels` are those of another source (cross-attention over image features). A mask is
    (T, S), (B, T, S) for all heads, or (B, heads, T, S); T or heads may be 1. Parameters and their initialization are
    those of `torch.nn.MultiheadAttention`, whose state dict loads. `project` and `combine` are the two halves around
    the attention itself. With `past`, whose keys and values come first, those given are added to it.
    Source: Vaswani et al. 2017, section 3.2.2.
    Differs: batch first; boolean masks are True where attention is allowed; weights come from `weights`.
    """

    def __init__(
        self, channels: int, heads: int, *, key_channels: int | None = None, value_channels: int | None = None,
        bias: bool = True, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        self.channels, self.heads, self.dropout = channels, heads, dropout
        sources = (channels, key_channels or channels, value_channels or channels)
        self.packed = sources == (channels,) * 3
        if self.packed:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(channels, sources[0]))
            self.k_proj_weight = nn.Parameter(torch.empty(channels, sources[1]))
            self.v_proj_weight = nn.Parameter(torch.empty(channels, sources[2]))
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels)) if bias else None
        self.out_proj = nn.Linear(channels, channels, bias=bias)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def project(
        self, query: Float[Tensor, "B T C"], key: Float[Tensor, "B S K"], value: Float[Tensor, "B S V"]
    ) -> Heads:
        """Queries, keys and values of every head, (B, heads, T or S, channels / heads)."""
        if self.packed and key is query and value is query:
            projected: Sequence[Tensor] = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights: Sequence[Tensor] = (
                self.in_proj_weight.chunk(3) if self.packed
                else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )  # fmt: skip
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        return Heads(*(x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected))

    def combine(self, heads: Float[Tensor, "B h T D"]) -> Float[Tensor, "B T C"]:
        """The output (B, T, channels) of what every head saw."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def forward(
        self,
        query: Float[Tensor, "B T C"],
        key: Float[Tensor, "B S K"] | None = None,
        value: Float[Tensor, "B S V"] | None = None,
        mask: Mask | None = None,
        *,
        causal: bool = False,
        past: KeyValueCache | None = None,
    ) -> Float[Tensor, "B T C"]:
        key = query if key is None else key
        heads = self.project(query, key, key if value is None else value)
        if past is not None:
            heads = Heads(heads.query, *past.extend(heads.key, heads.value))
        dropout = self.dropout if self.training else 0.0
        return self.combine(attention(*heads, _per_head(mask), causal=causal, dropout=dropout))

    def weights(
        self,
        query: Float[Tensor, "B T C"],
        key: Float[Tensor, "B S K"] | None = None,
        mask: Mask | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "B h T S"]:
        """The weights `forward` attends with (before dropout), one map per head; rows sum to 1."""
        key = query if key is None else key
        bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[:2]
        weight = self.in_proj_weight.chunk(3)[:2] if self.packed else (self.q_proj_weight, self.k_proj_weight)
        queries, keys = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key), weight, bias)
        )
        return attention_weights(queries, keys, _per_head(mask), causal=causal)

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, dropout={self.dropout}"


def _per_head(mask: Mask | None) -> Mask | None:
    return mask[:, None] if mask is not None and mask.ndim == 3 else mask


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer network on each position, both as residuals: (B, T, C) -> (B, T, C).

    `pre_norm` normalizes before each residual branch (Xiong et al. 2020), else after each sum (Vaswani et al. 2017).
    `hidden` is 4 C unless given. `stochastic_depth` is the probability of leaving a branch out for a sample. With
    `causal=True` this is the block of GPT, and `past` keeps what earlier calls saw. Parameter names are those of
    `torch.nn.TransformerEncoderLayer`.
    """

    def __init__(
        self, channels: int, heads: int, hidden: int | None = None, *, activation: str = "gelu", pre_norm: bool = True,
        dropout: float = 0.0, stochastic_depth: float = 0.0, eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        hidden = 4 * channels if hidden is None else hidden
        self.pre_norm = pre_norm
        self.self_attn = MultiHeadAttention(channels, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps), nn.LayerNorm(channels, eps)
        self.activation = build_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.drop = nn.Sequential(nn.Dropout(dropout), StochasticDepth(stochastic_depth))

    def forward(
        self, x: Float[Tensor, "B T C"], mask: Mask | None = None, *, causal: bool = False,
        past: KeyValueCache | None = None,
    ) -> Float[Tensor, "B T C"]:  # fmt: skip
        if self.pre_norm:
            x = x + self.drop(self.self_attn(self.norm1(x), mask=mask, causal=causal, past=past))
            return x + self.drop(self._network(self.norm2(x)))
        x = self.norm1(x + self.drop(self.self_attn(x, mask=mask, causal=causal, past=past)))
        return self.norm2(x + self.drop(self._network(x)))

    def weights(
        self, x: Float[Tensor, "B T C"], mask: Mask | None = None, *, causal: bool = False
    ) -> Float[Tensor, "B h T T"]:
        """The attention weights `forward` uses at this input."""
        return self.self_attn.weights(self.norm1(x) if self.pre_norm else x, mask=mask, causal=causal)

    def _network(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerDecoderBlock(nn.Module):
    """Causal self-attention, attention to a memory, and a two-layer network, all as residuals.

    x (B, T, C), memory (B, S, memory_channels or C) -> (B, T, C). `pre_norm`, `hidden` and `stochastic_depth` are as in
    `TransformerBlock`. Parameter names are those of `torch.nn.TransformerDecoderLayer`.
    Differs: causal unless told otherwise, because a decoder that forgets it learns to copy its target.
    """

    def __init__(
        self, channels: int, heads: int, hidden: int | None = None, *, memory_channels: int | None = None,
        activation: str = "gelu", pre_norm: bool = True, dropout: float = 0.0, stochastic_depth: float = 0.0,
        eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        hidden = 4 * channels if hidden is None else hidden
        self.pre_norm = pre_norm
        self.self_attn = MultiHeadAttention(channels, heads, dropout=dropout)
        self.multihead_attn = MultiHeadAttention(
            channels, heads, key_channels=memory_channels, value_channels=memory_channels, dropout=dropout
        )
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels, eps) for _ in range(3))
        self.activation = build_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.drop = nn.Sequential(nn.Dropout(dropout), StochasticDepth(stochastic_depth))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        memory: Float[Tensor, "B S M"],
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        causal: bool = True,
    ) -> Float[Tensor, "B T C"]:
        x = self._attend_self(x, mask, causal)
        if self.pre_norm:
            x = x + self.drop(self.multihead_attn(self.norm2(x), memory, mask=memory_mask))
            return x + self.drop(self._network(self.norm3(x)))
        x = self.norm2(x + self.drop(self.multihead_attn(x, memory, mask=memory_mask)))
        return self.norm3(x + self.drop(self._network(x)))

    def memory_weights(
        self,
        x: Float[Tensor, "B T C"],
        memory: Float[Tensor, "B S M"],
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        causal: bool = True,
    ) -> Float[Tensor, "B h T S"]:
        """The weights with which `forward` looks at the memory: for an image, where each word looked."""
        x = self._attend_self(x, mask, causal)
        return self.multihead_attn.weights(self.norm2(x) if self.pre_norm else x, memory, memory_mask)

    def _attend_self(self, x: Tensor, mask: Mask | None, causal: bool) -> Tensor:
        if self.pre_norm:
            return x + self.drop(self.self_attn(self.norm1(x), mask=mask, causal=causal))
        return self.norm1(x + self.drop(self.self_attn(x, mask=mask, causal=causal)))

    def _network(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def sinusoidal_positions(size: int | Sequence[int], channels: int) -> Float[Tensor, "*S C"]:
    """Sines at even and cosines at odd channels of wavelengths from 2 pi to 10000 * 2 pi: (*size, channels).

    Several axes (H, W) share the channels equally, the first axis first. Source: Vaswani et al. 2017, section 3.5.
    """
    sizes = (size,) if isinstance(size, int) else tuple(size)
    each = channels // len(sizes)
    if channels != each * len(sizes) or each % 2 or each == 0:
        raise ValueError(f"channels must be a multiple of twice the number of axes, got {channels} for {len(sizes)}")
    parts = []
    for axis, count in enumerate(sizes):
        shape = [1] * len(sizes) + [each]
        shape[axis] = count
        parts.append(_sinusoids(torch.arange(count), each).view(shape).expand(*sizes, each))
    return torch.cat(parts, -1)


def _sinusoids(positions: Tensor, channels: int) -> Tensor:
    frequency = 10000.0 ** -(torch.arange(0, channels, 2, device=positions.device).double() / channels)
    angle = positions[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).float()  # (N, channels)


class SinusoidalPositions(nn.Module):
    """Adds `sinusoidal_positions` to x (B, T, C), whose first token stands at `start`; any length, no parameters."""

    def forward(self, x: Float[Tensor, "B T C"], start: int = 0) -> Float[Tensor, "B T C"]:
        if x.shape[2] % 2:
            raise ValueError(f"sinusoidal positions need an even number of channels, got {tuple(x.shape)}")
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return x + _sinusoids(positions, x.shape[2]).to(x.dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector per position to x (B, T, C), T + start <= length; `weight` (length, C) as an embedding's.

    Starts at a standard deviation of 0.02 (BERT, GPT and ViT). Longer input is a ValueError.
    """

    def __init__(self, length: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, channels) * 0.02)

    def forward(self, x: Float[Tensor, "B T C"], start: int = 0) -> Float[Tensor, "B T C"]:
        end = start + x.shape[1]
        if end > len(self.weight):
            raise ValueError(f"there are {len(self.weight)} learned positions, got {x.shape[1]} tokens from {start} on")
        return x + self.weight[start:end]


class SelfAttention2d(nn.Module):
    """Self-attention over the places of a map: x + gamma * output(attention(query(x), key(x), value(x))).

    All four maps are 1x1 convolutions; gamma starts at 0, so that the block starts as the identity. Queries and keys
    have C / 8 channels and values C / 2 unless given; `pool` > 1 takes the maximum of keys and values over squares of
    that side (2 in the authors' code). Scores are not scaled.
    Source: Zhang et al. 2019, SAGAN (arXiv:1805.08318), section 3, with the value channels of the authors' code.
    """

    def __init__(
        self, channels: int, *, key_channels: int | None = None, value_channels: int | None = None, pool: int = 1
    ):
        super().__init__()
        key_channels = key_channels or max(channels // 8, 1)
        value_channels = value_channels or max(channels // 2, 1)
        self.query = nn.Conv2d(channels, key_channels, 1, bias=False)
        self.key = nn.Conv2d(channels, key_channels, 1, bias=False)
        self.value = nn.Conv2d(channels, value_channels, 1, bias=False)
        self.output = nn.Conv2d(value_channels, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.pool = pool

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        query, key, value = self.query(x), self._pooled(self.key(x)), self._pooled(self.value(x))
        seen = attention(_places(query), _places(key), _places(value), scale=1.0)  # (B, HW, value_channels)
        return x + self.gamma * self.output(seen.transpose(1, 2).unflatten(2, x.shape[2:]))

    def weights(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W H2 W2"]:
        """Where each place looks; the last two axes sum to 1, over the pooled places if keys are pooled."""
        query, key = self.query(x), self._pooled(self.key(x))
        weights = attention_weights(_places(query), _places(key), scale=1.0)
        return weights.unflatten(2, key.shape[2:]).unflatten(1, query.shape[2:])

    def _pooled(self, x: Tensor) -> Tensor:
        return x if self.pool == 1 else F.max_pool2d(x, self.pool)


def _places(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, HW, C)


ATTENTIONS: dict[str, type[nn.Module]] = {
    "multi_head": MultiHeadAttention,
    "transformer": TransformerBlock,
    "transformer_decoder": TransformerDecoderBlock,
    "self_attention_2d": SelfAttention2d,
    "sinusoidal_positions": SinusoidalPositions,
    "learned_positions": LearnedPositions,
}
