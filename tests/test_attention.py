"""Attention against torch's modules with copied weights, the formula in loops, and its laws."""

import math

import pytest
import torch
from torch import nn

from tests.naive import attention as naive_attention
from vision3dgen.layers import (
    ATTENTIONS,
    KeyValueCache,
    LearnedPositions,
    MultiHeadAttention,
    SelfAttention2d,
    SinusoidalPositions,
    TransformerBlock,
    TransformerDecoderBlock,
    attention_weights,
    causal_mask,
    padding_mask,
    sinusoidal_positions,
)
from vision3dgen.layers.attention import attention

T, S, D, E = 5, 7, 3, 11
INF = math.inf


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(*batch: int, queries: int = T, keys: int = S):
    return random(*batch, queries, D), random(*batch, keys, D, seed=1), random(*batch, keys, E, seed=2)


MASK = random(2, T, S, seed=3) > 0
MASK[1, 3] = False  # a query that may look nowhere
MASKS = {
    "none": None,
    "boolean": MASK,
    "additive": torch.where(MASK, random(2, T, S, seed=4), -INF),
    "shared": MASK[0],
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("keys", [T, S])
def test_attention_is_the_formula(name, causal, keys):
    query, key, value = qkv(2, keys=keys)
    mask = MASKS[name]
    mask = None if mask is None else mask[..., :keys]
    expected, weights = naive_attention(query, key, value, mask, causal, 1 / math.sqrt(D))
    torch.testing.assert_close(attention(query, key, value, mask, causal=causal), expected)
    torch.testing.assert_close(attention_weights(query, key, mask, causal=causal), weights)


def test_rows_without_keys_are_zero_with_zero_gradients():
    query, key, value = (x.requires_grad_() for x in qkv(2))
    for mask in (MASKS["boolean"], MASKS["additive"]):
        out = attention(query, key, value, mask)
        assert torch.equal(out[1, 3], torch.zeros(E, dtype=out.dtype))
        gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
        assert all(bool(g.isfinite().all()) for g in gradients)
        assert torch.equal(gradients[0][1, 3], torch.zeros(D, dtype=out.dtype))
    nothing = attention(query, key[:, :0], value[:, :0], torch.ones(T, 0, dtype=torch.bool))
    assert torch.equal(nothing, torch.zeros(2, T, E, dtype=torch.float64))
    # more queries than keys: the first ones stand before every key
    assert not attention(query, key[:, :3], value[:, :3], causal=True)[:, :2].any()


def test_attention_gradients():
    inputs = [x.requires_grad_() for x in qkv(1, queries=3, keys=5)]
    bias = random(3, 5, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, MASK[1:, 1:4, :5], causal=True), inputs)
    assert torch.autograd.gradcheck(attention, (*inputs, bias))


def future_gradients(function, x):
    """|d output at t / d input at s| as (T, T)."""
    x = x.requires_grad_()
    steps = range(x.shape[1])  # cubed, for the sum of a layer normalization is constant
    return torch.stack([torch.autograd.grad((function(x)[:, t] ** 3).sum(), x)[0].abs().sum((0, 2)) for t in steps])


@pytest.mark.parametrize("block", ["attention", "pre", "post", "decoder"])
def test_causal_blocks_have_no_gradient_to_the_future(block):
    torch.manual_seed(0)
    x, memory = random(2, 7, 6), random(2, 5, 6)
    function = {
        "attention": lambda x: MultiHeadAttention(6, 2).double()(x, causal=True),
        "pre": lambda x: TransformerBlock(6, 3).double()(x, causal=True),
        "post": lambda x: TransformerBlock(6, 3, pre_norm=False).double()(x, causal=True),
        "decoder": lambda x: TransformerDecoderBlock(6, 3).double()(x, memory),
    }[block]
    seen = future_gradients(function, x) > 0
    assert torch.equal(seen, torch.ones(7, 7, dtype=torch.bool).tril())


def test_causality_aligns_the_ends():
    """Queries for the last positions only give what a full pass gives there: keys may be cached."""
    query, key, value = qkv(2, queries=S)
    full = attention(query, key, value, causal=True)
    torch.testing.assert_close(attention(query[:, -3:], key, value, causal=True), full[:, -3:])
    assert causal_mask(2, 3).tolist() == [[True, True, False], [True, True, True]]


def copied(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    """Ours with torch's weights, norms and biases made other than their trivial initial values."""
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            parameter.add_(random(*parameter.shape, seed=index) * 0.1)
    ours.double().load_state_dict(theirs.state_dict(), strict=True)
    return ours


@pytest.mark.parametrize("sizes", [(6, 6), (5, 7), (6, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_is_torchs(sizes, bias):
    kdim, vdim = sizes
    theirs = nn.MultiheadAttention(6, 3, bias=bias, kdim=kdim, vdim=vdim, batch_first=True).double()
    ours = copied(MultiHeadAttention(6, 3, key_channels=kdim, value_channels=vdim, bias=bias), theirs)
    query, key, value = random(2, T, 6), random(2, S, kdim, seed=1), random(2, S, vdim, seed=2)
    mask = MASK.clone()
    mask[:, :, 0] = True  # torch gives NaN for rows without keys
    expected, weights = theirs(query, key, value, attn_mask=~mask.repeat_interleave(3, 0), average_attn_weights=False)
    torch.testing.assert_close(ours(query, key, value, mask), expected)
    torch.testing.assert_close(ours.weights(query, key, mask), weights)
    per_head = mask[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(ours(query, key, value, per_head), expected)


def test_multi_head_attention_to_itself_and_its_halves():
    torch.manual_seed(0)
    ours = MultiHeadAttention(6, 2).double()
    x = random(2, T, 6)
    torch.testing.assert_close(ours(x), ours(x, x.clone(), x.clone()))
    heads = ours.project(x, x, x)
    assert heads.query.shape == (2, 2, T, 3)
    torch.testing.assert_close(ours.combine(attention(*heads)), ours(x))


def test_a_cached_step_equals_the_full_pass():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(6, 2).double(), random(2, T, 6)
    full = layer(x, causal=True)
    keys, values = random(2, 2, 0, 3), random(2, 2, 0, 3)
    for t in range(T):
        token = x[:, t : t + 1]
        query, key, value = layer.project(token, token, token)
        keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        torch.testing.assert_close(layer.combine(attention(query, keys, values, causal=True)), full[:, t : t + 1])


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_block_is_torchs(pre_norm, activation):
    theirs = nn.TransformerEncoderLayer(6, 3, 13, 0.0, activation, batch_first=True, norm_first=pre_norm).double()
    ours = copied(TransformerBlock(6, 3, 13, activation=activation, pre_norm=pre_norm), theirs)
    x, lengths = random(2, T, 6), torch.tensor([T, 3])
    padding = padding_mask(lengths, T)
    expected = theirs(x, src_key_padding_mask=~padding[:, 0])
    torch.testing.assert_close(ours(x, padding), expected)
    causal = theirs(x, src_mask=~causal_mask(T, T))
    torch.testing.assert_close(ours(x, causal=True), causal)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_transformer_decoder_block_is_torchs(pre_norm):
    theirs = nn.TransformerDecoderLayer(6, 3, 13, 0.0, "relu", batch_first=True, norm_first=pre_norm).double()
    ours = copied(TransformerDecoderBlock(6, 3, 13, activation="relu", pre_norm=pre_norm), theirs)
    x, memory = random(2, T, 6), random(2, S, 6, seed=1)
    padding = padding_mask(torch.tensor([S, 2]), S)
    expected = theirs(x, memory, tgt_mask=~causal_mask(T, T), memory_key_padding_mask=~padding[:, 0])
    torch.testing.assert_close(ours(x, memory, memory_mask=padding), expected)
    torch.testing.assert_close(ours(x, memory, causal=False), theirs(x, memory))


def test_memory_of_other_channels_and_its_weights():
    torch.manual_seed(0)
    block = TransformerDecoderBlock(6, 3, memory_channels=11)
    x, memory = random(2, T, 6).float(), random(2, S, 11).float()
    padding = padding_mask(torch.tensor([S, 2]), S)
    weights = block.memory_weights(x, memory, memory_mask=padding)
    assert weights.shape == (2, 3, T, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, T))
    assert not weights[1, :, :, 2:].any()
    seen = block(x, memory, memory_mask=padding)[1]
    assert torch.equal(seen, block(x, memory.index_fill(1, torch.tensor([2, 5]), 9.0), memory_mask=padding)[1])


def test_transformer_without_positions_commutes_with_permutations():
    torch.manual_seed(0)
    block, x = TransformerBlock(6, 2).double(), random(2, T, 6)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]))
    torch.testing.assert_close(block.weights(x).sum(-1), torch.ones(2, 2, T, dtype=x.dtype))


def test_dropout_and_stochastic_depth_act_in_training_only():
    torch.manual_seed(0)
    block = TransformerBlock(6, 2, dropout=0.5, stochastic_depth=0.5)
    x = random(2, T, 6).float()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    x = random(97, 3, 6).float()
    untouched = (TransformerBlock(6, 2, stochastic_depth=0.9)(x) == x).flatten(1).all(1)
    assert 60 < untouched.sum() < 92  # both branches are left out with probability 0.81


def test_sinusoidal_positions_by_hand():
    table = sinusoidal_positions(11, 6)
    for t in range(11):
        for pair in range(3):
            angle = t / 10000 ** (2 * pair / 6)
            assert table[t, 2 * pair : 2 * pair + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)])
    grid = sinusoidal_positions((5, 7), 8)
    assert torch.equal(grid[2, 3], torch.cat((sinusoidal_positions(5, 4)[2], sinusoidal_positions(7, 4)[3])))
    x = random(2, 4, 6).float()
    torch.testing.assert_close(SinusoidalPositions()(x, start=7), x + table[7:])
    with pytest.raises(ValueError, match="multiple of twice the number of axes, got 6 for 2"):
        sinusoidal_positions((5, 7), 6)
    with pytest.raises(ValueError, match="even number of channels"):
        SinusoidalPositions()(random(2, 4, 5))


def test_learned_positions():
    layer = LearnedPositions(7, 3)
    x = random(2, 3, 3).float()
    torch.testing.assert_close(layer(x, start=4), x + layer.weight[4:])
    with pytest.raises(ValueError, match="7 learned positions, got 3 tokens from 5"):
        layer(x, start=5)


@pytest.mark.parametrize("pool", [1, 2])
def test_self_attention_over_a_map_by_hand(pool):
    torch.manual_seed(0)
    layer, x = SelfAttention2d(16, pool=pool).double(), random(2, 16, 5, 7)
    assert torch.equal(layer(x), x)  # gamma starts at 0
    layer.gamma.data.fill_(0.7)
    key, value = layer.key(x), layer.value(x)
    if pool == 2:
        key, value = nn.functional.max_pool2d(key, 2), nn.functional.max_pool2d(value, 2)
    scores = torch.einsum("bchw,bcuv->bhwuv", layer.query(x), key)
    weights = scores.flatten(3).softmax(-1).view_as(scores)
    expected = x + 0.7 * layer.output(torch.einsum("bhwuv,bcuv->bchw", weights, value))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weights(x), weights)
    assert layer.query.out_channels == 2
    assert layer.value.out_channels == 8


def test_every_attention_trains_every_parameter():
    torch.manual_seed(0)
    x = random(2, 4, 6).float()
    for name, make, inputs in (
        ("multi_head", lambda cls: cls(6, 2, bias=True), (x,)),
        ("transformer", lambda cls: cls(6, 2), (x,)),
        ("transformer_decoder", lambda cls: cls(6, 2), (x, x)),
        ("learned_positions", lambda cls: cls(4, 6), (x,)),
        ("self_attention_2d", lambda cls: cls(6), (x[..., None, :].transpose(1, 3),)),
    ):
        layer = make(ATTENTIONS[name])
        if name == "self_attention_2d":
            layer.gamma.data.fill_(1.0)
        (layer(*inputs) ** 3).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters()), name
    assert set(ATTENTIONS) == {
        "multi_head", "transformer", "transformer_decoder", "learned_positions", "self_attention_2d",
        "sinusoidal_positions",
    }  # fmt: skip


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="channels must be a multiple of heads, got 7 and 2"):
        MultiHeadAttention(7, 2)
    with pytest.raises(ValueError, match=r"unknown activation 'gelo' \(did you mean 'gelu'"):
        TransformerBlock(6, 2, activation="gelo")


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_block_with_a_past_is_the_block_on_everything(pre_norm):
    torch.manual_seed(0)
    block = TransformerBlock(6, 2, pre_norm=pre_norm).eval()
    x = torch.randn(3, 7, 6)
    whole = block(x, causal=True)
    past = KeyValueCache(7)
    parts = [block(piece, causal=True, past=past) for piece in x.split([1, 3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert past.length == 7
    with pytest.raises(ValueError, match="room for 7 positions, got 8"):
        block(x[:, :1], past=past)
