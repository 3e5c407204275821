"""Activations, norms, upsampling and random layers: against torch, formulas, and known answers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.test_docs import ROOT, python_blocks
from vision3dgen import config
from vision3dgen.layers import (
    ACTIVATIONS,
    LAYERS,
    NORMS,
    REGULARIZERS,
    UPSAMPLINGS,
    ChannelLayerNorm,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    DropBlock,
    FrozenBatchNorm2d,
    GatedConvolution,
    Maxout,
    StochasticDepth,
    activation,
    add_spectral_norm,
    bed_of_nails,
    freeze_batch_norm,
    gated_tanh,
    initialize_interpolation,
    norm,
    upsampling,
)
from vision3dgen.ops import GraphConv


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------- activations

FORMULAS = {
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "relu": lambda x: x * (x > 0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "prelu": lambda x: torch.where(x > 0, x, 0.25 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + (-x).exp()),
    "softplus": lambda x: (1 + x.exp()).log(),
    "glu": lambda x: x[..., :2] / (1 + (-x[..., 2:]).exp()),
    "gated_tanh": lambda x: x[:, :3].tanh() / (1 + (-x[:, 3:]).exp()),
    "identity": lambda x: x,
}


def test_every_activation_is_its_formula():
    x = random(5, 6, 4)
    for name, formula in FORMULAS.items():
        torch.testing.assert_close(activation(name)(x), formula(x), msg=name)
    assert set(ACTIVATIONS) == {*FORMULAS, "maxout"}


def test_activations_by_name_take_their_own_settings():
    layer = config.build({"name": "leaky_relu", "negative_slope": 0.2}, ACTIVATIONS)
    assert layer(torch.tensor(-1.0)).item() == pytest.approx(-0.2)
    layer = config.build({"name": "maxout", "inputs": 3, "outputs": 5, "pieces": 7}, ACTIVATIONS)
    assert layer(random(2, 3)).shape == (2, 5)
    with pytest.raises(ValueError, match="unknown activation 'maxout'"):  # it needs sizes
        activation("maxout")


def test_maxout_is_the_largest_of_its_pieces():
    torch.manual_seed(0)
    layer, x = Maxout(3, 5, pieces=4), random(2, 7, 3)
    expected = torch.full((2, 7, 5), -torch.inf)
    for output in range(5):
        for piece in range(4):
            row = 4 * output + piece
            value = x @ layer.linear.weight[row] + layer.linear.bias[row]
            expected[..., output] = expected[..., output].maximum(value)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="pieces must be at least 1, got 0"):
        Maxout(3, 5, 0)


def test_maxout_of_two_can_be_the_absolute_value():
    layer = Maxout(1, 1)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.linear.bias.zero_()
    x = random(11, 1)
    assert torch.equal(layer(x), x.abs())


@pytest.mark.parametrize("spatial", [False, True])
def test_gated_convolution_is_its_equation(spatial):
    torch.manual_seed(0)
    layer = GatedConvolution(nn.Conv2d(3, 10, 3, padding=1), 5, condition_channels=7)
    x = random(2, 3, 5, 4)
    condition = random(2, 7, 5, 4, seed=1) if spatial else random(2, 7, seed=1)
    v = layer.condition.weight
    h = torch.einsum("kc,bchw->bkhw", v, condition) if spatial else (condition @ v.T)[..., None, None]
    both = F.conv2d(x, layer.convolution.weight, layer.convolution.bias, padding=1) + h
    torch.testing.assert_close(layer(x, condition), both[:, :5].tanh() * both[:, 5:].sigmoid())
    with pytest.raises(ValueError, match="condition_channels=7 and condition=None"):
        layer(x)
    with pytest.raises(ValueError, match="if and only if"):
        GatedConvolution(nn.Conv2d(3, 10, 1), 5)(x, condition)
    with pytest.raises(ValueError, match="even number of channels, got 5 on axis 1"):
        gated_tanh(random(2, 5, 3))


# -------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_normalize_what_they_say(dims):
    x = 3 + 2 * random(4, 6, *(5, 7, 3)[:dims])
    places = tuple(range(2, dims + 2))
    over = {"batch": (0, *places), "layer": (1,), "instance": places}
    for name, axes in over.items():
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
        torch.testing.assert_close(norm(name, 6, dims=dims)(x), (x - mean) / (variance + 1e-5).sqrt())
    grouped = x.unflatten(1, (3, 2))
    mean = grouped.mean((2, *(a + 1 for a in places)), keepdim=True)
    variance = grouped.var((2, *(a + 1 for a in places)), keepdim=True, unbiased=False)
    expected = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    torch.testing.assert_close(norm("group", 6, dims=dims, groups=3)(x), expected)
    assert torch.equal(norm("none", 6, dims=dims)(x), x)
    torch.testing.assert_close(norm("frozen_batch", 6, dims=dims)(x), x / (1 + 1e-5) ** 0.5)


def test_every_norm_has_weights_per_channel():
    for name in ("batch", "layer", "instance", "group"):
        layer = norm(name, 64)
        assert {key: tuple(p.shape) for key, p in layer.named_parameters()} == {"weight": (64,), "bias": (64,)}
    built = config.build({"name": "group", "groups": 8}, NORMS, channels=16)
    assert built.num_groups == 8
    with pytest.raises(ValueError, match=r"unknown norm 'bach' \(did you mean 'batch'"):
        norm("bach", 3)
    with pytest.raises(ValueError, match="multiple of groups, got 48 and 32"):
        norm("group", 48)
    with pytest.raises(ValueError, match="unknown dims 4"):
        norm("batch", 3, dims=4)


def test_channel_layer_norm_is_torchs_on_the_last_axis():
    torch.manual_seed(0)
    ours, theirs, x = ChannelLayerNorm(7), nn.LayerNorm(7), random(2, 7, 5, 3)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x).permute(0, 2, 3, 1), theirs(x.permute(0, 2, 3, 1)))


def trained_batch_norm(channels: int = 7) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(channels, eps=1e-3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    for step in range(3):
        layer(1 + 2 * random(2, channels, 5, 3, seed=step))
    return layer


def test_frozen_batch_norm_is_torchs_in_evaluation():
    trained, x = trained_batch_norm(), random(2, 7, 5, 3, seed=9)
    frozen = FrozenBatchNorm2d(7, eps=1e-3)
    frozen.load_state_dict(trained.state_dict(), strict=True)  # with its batch counter
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert not list(frozen.parameters())
    torch.testing.assert_close(frozen.train()(x), trained.eval()(x))
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_freezing_a_network_keeps_its_outputs():
    network = nn.Sequential(nn.Conv2d(3, 7, 1), nn.Sequential(trained_batch_norm(), nn.ReLU())).eval()
    x = random(2, 3, 5, 4)
    expected = network(x)
    assert freeze_batch_norm(network) is network
    assert isinstance(network[1][0], FrozenBatchNorm2d)
    torch.testing.assert_close(network.train()(x), expected)
    assert isinstance(freeze_batch_norm(trained_batch_norm()), FrozenBatchNorm2d)
    with pytest.raises(ValueError, match="without running statistics"):
        freeze_batch_norm(nn.BatchNorm2d(3, track_running_stats=False))


def test_class_conditional_batch_norm_by_hand():
    torch.manual_seed(0)
    layer, x = ConditionalBatchNorm2d(5, 3), random(4, 3, 2, 7)
    labels = torch.tensor([4, 0, 0, 2])
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x, labels), plain)  # starts as plain batch normalization
    nn.init.normal_(layer.gamma.weight)
    nn.init.normal_(layer.beta.weight)
    out = layer(x, labels)
    for b, label in enumerate(labels):
        expected = layer.gamma.weight[label, :, None, None] * plain[b] + layer.beta.weight[label, :, None, None]
        torch.testing.assert_close(out[b], expected)
    out.sum().backward()
    assert not layer.gamma.weight.grad[[1, 3]].any()  # classes that were not there


def test_a_batch_of_one_value_cannot_be_normalized_in_training():
    code = random(1, 5, 1)
    layer = ConditionalBatchNorm1d(5, 3)
    with pytest.raises(ValueError, match=r"more than one value per channel in training, got \(1, 3, 1\): use a batch"):
        layer(random(1, 3, 1), code)
    classes = ConditionalBatchNorm2d(2, 3)
    with pytest.raises(ValueError, match=r"got \(1, 3, 1, 1\)"):
        classes(random(1, 3, 1, 1), torch.tensor([1]))
    assert layer.eval()(random(1, 3, 1), code).isfinite().all()
    assert classes(random(1, 3, 2, 1), torch.tensor([1])).isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's own
        norm("batch", 3)(random(1, 3, 1, 1))


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(network)
    assert add_spectral_norm(network) is network
    for _ in range(50):
        network(random(2, 3, 5, 5))
    for normed, original in zip(network, plain):
        if hasattr(original, "weight"):
            largest = torch.linalg.matrix_norm(original.weight.detach().flatten(1), 2)
            torch.testing.assert_close(normed.weight.detach(), original.weight.detach() / largest, rtol=1e-4, atol=1e-5)
    assert "0.parametrizations.weight.original" in network.state_dict()
    with pytest.raises(ValueError, match="ReLU has no linear, convolution or embedding layer"):
        add_spectral_norm(nn.ReLU())


# --------------------------------------------------------------------------------------------------- upsampling


def test_bed_of_nails_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    expected = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])
    assert torch.equal(bed_of_nails(x)[0, 0], expected)
    x = random(2, 3, 2, 3, 5)
    cubes = bed_of_nails(x, 3)
    assert cubes.shape == (2, 3, 6, 9, 15)
    assert torch.equal(cubes[..., ::3, ::3, ::3], x)
    assert cubes.count_nonzero() == x.numel()


def identity_convolution(block: nn.Module) -> nn.Module:
    """Make the 3x3 convolution of a block of equal channels leave maps alone."""
    with torch.no_grad():
        nn.init.dirac_(block.convolution.weight)
        block.convolution.bias.zero_()
    return block


@pytest.mark.parametrize("name", sorted(UPSAMPLINGS))
@pytest.mark.parametrize("factor", [2, 3])
def test_every_upsampling_gives_its_channels_and_size(name, factor):
    torch.manual_seed(0)
    for dims in (1, 2, 3) if name != "bicubic" else (2,):
        fine = random(2, 3, *(13, 17, 11)[:dims])
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
        x, indices = pool(fine, factor, return_indices=True)
        block = upsampling(name, 3, 5, factor, dims=dims)
        out = block(x, size=fine.shape[2:], indices=indices)
        assert out.shape == (2, 5, *fine.shape[2:])
        if not block.needs_indices:
            assert block(x).shape == (2, 5, *(factor * side for side in x.shape[2:]))
        (out**2).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters())
        assert block.needs_indices == (name == "max_unpooling")


def test_upsampling_values():
    x = random(2, 3, 5, 7)
    for name, mode in (("nearest", "nearest"), ("bilinear", "bilinear"), ("bicubic", "bicubic")):
        corners = None if name == "nearest" else False
        expected = F.interpolate(x, scale_factor=2, mode=mode, align_corners=corners)
        torch.testing.assert_close(identity_convolution(upsampling(name, 3, 3))(x), expected)
    nails = identity_convolution(upsampling("bed_of_nails", 3, 3))
    torch.testing.assert_close(nails(x), bed_of_nails(x))
    assert torch.equal(nails(x, size=(9, 14)), bed_of_nails(x)[:, :, :9])
    assert torch.equal(nails(x, size=(11, 14)), F.pad(bed_of_nails(x), (0, 0, 0, 1)))


def test_max_unpooling_puts_maxima_back():
    fine = random(2, 3, 5, 8)
    pooled, indices = F.max_pool2d(fine, 2, return_indices=True)
    block = identity_convolution(upsampling("max_unpooling", 3, 3))
    out = block(pooled, size=(5, 8), indices=indices)
    assert torch.equal(F.max_pool2d(out.clamp_min(0), 2), pooled.clamp_min(0))
    kept = out != 0
    assert torch.equal(out[kept], fine[kept])
    assert kept.sum() == pooled.numel()
    with pytest.raises(ValueError, match=r"needs the pooling's indices.*\(2, 3, 2, 4\), got None"):
        block(pooled)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution_starts_as_linear_interpolation(factor, dims):
    x = random(2, 3, *(5, 7, 6)[:dims])
    mode = ("linear", "bilinear", "trilinear")[dims - 1]
    expected = F.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)
    inner = (..., *(slice(factor, -factor),) * dims)  # beyond the border interpolation repeats, convolution has zeros
    out = upsampling("transposed", 3, 3, factor, dims=dims)(x)
    torch.testing.assert_close(out[inner], expected[inner])


def test_upsampling_names_bad_input():
    with pytest.raises(ValueError, match=r"unknown upsampling 'bilinar' \(did you mean 'bilinear'"):
        upsampling("bilinar", 3, 5)
    block = upsampling("nearest", 3, 5)
    with pytest.raises(ValueError, match=r"maps must be \(B, 3\) and 2 axes, got \(2, 4, 5, 7\)"):
        block(random(2, 4, 5, 7))
    with pytest.raises(ValueError, match=r"less than 2 from 2 times \(5, 7\), got \(12, 14\)"):
        block(random(2, 3, 5, 7), size=(12, 14))
    with pytest.raises(ValueError, match="for 2 axes, got dims=3"):
        upsampling("bicubic", 3, 5, dims=3)
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        upsampling("nearest", 3, 5, 0)
    with pytest.raises(ValueError, match="between equal channels"):
        initialize_interpolation(nn.ConvTranspose2d(3, 5, 4, 2))


# ------------------------------------------------------------------------------------------------ random layers


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    x = 1 + random(10_007, 3, 2).abs()
    layer = StochasticDepth(0.3)
    out = layer(x, seeded())
    dropped = (out == 0).flatten(1)
    assert torch.equal(dropped.all(1), dropped.any(1))  # all of a sample or nothing
    assert dropped.all(1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(out[~dropped.all(1)], x[~dropped.all(1)] / 0.7)
    assert torch.equal(layer(x, seeded()), out)
    assert not torch.equal(layer(x, seeded(1)), out)
    assert layer.eval()(x) is x


def test_stochastic_depth_of_a_batch_is_one_draw():
    x, layer = torch.ones(5, 3), StochasticDepth(0.5, mode="batch")
    outs = torch.stack([layer(x, seeded(seed)) for seed in range(200)])
    assert set(outs.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(outs.amax((1, 2)), outs.amin((1, 2)))
    assert 70 < (outs[:, 0, 0] == 0).sum() < 130
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\), got 1"):
        StochasticDepth(1.0)
    with pytest.raises(ValueError, match="unknown mode 'column'"):
        StochasticDepth(0.5, "column")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_drop_block_zeroes_whole_cubes(dims):
    x = torch.ones(3, 5, *(29, 31, 23)[:dims])
    layer = DropBlock(0.2, size=5)
    out = layer(x, seeded())
    zero = out == 0
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    # every zero lies in a cube of zeros: eroding and dilating by the block changes nothing
    eroded = 1 - pool((~zero).float(), 5, 1, 0)
    opened = pool(F.pad(eroded, [4] * (2 * dims)), 5, 1, 0) > 0
    assert torch.equal(opened, zero)
    assert zero.float().mean().item() == pytest.approx(0.18, abs=0.06)  # overlapping blocks drop a little less
    assert out.sum().item() == pytest.approx(x.numel(), rel=1e-4)
    assert torch.equal(layer(x, seeded()), out)
    assert layer.eval()(x) is x


def test_drop_block_on_maps_smaller_than_a_block():
    out = DropBlock(0.5, size=7)(torch.ones(211, 3, 2, 4), seeded())
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="odd and at least 1, got 4"):
        DropBlock(0.1, 4)


def test_regularizers_by_name():
    for name, options in (("dropout", {"p": 0.5}), ("fractional_max_pool2d", {"kernel_size": 2, "output_ratio": 0.7})):
        layer = config.build({"name": name, **options}, REGULARIZERS)
        assert layer(torch.ones(2, 3, 20, 10)).shape == ((2, 3, 20, 10) if name == "dropout" else (2, 3, 14, 7))
    layer = REGULARIZERS["alpha_dropout"](0.2)
    x = random(100_003)
    torch.manual_seed(0)
    assert layer(x).var().item() == pytest.approx(1, abs=0.03)


def test_one_table_of_tables():
    assert LAYERS["activation"] is ACTIVATIONS
    assert LAYERS["norm"]["batch"] is NORMS["batch"]
    assert set(LAYERS) == {"activation", "attention", "norm", "recurrent", "regularizer", "upsampling"}
    assert all(callable(entry) for table in LAYERS.values() for entry in table.values())


def test_graph_convolution_is_pygs():
    from torch_geometric.nn import GraphConv as PyGGraphConv

    torch.manual_seed(0)
    ours, theirs = GraphConv(5, 7), PyGGraphConv(5, 7, aggr="add")
    nn.init.normal_(ours.w0.bias)
    nn.init.zeros_(ours.w1.bias)  # PyG has one bias, ours one per neighbor too
    theirs.load_state_dict(
        {"lin_root.weight": ours.w0.weight, "lin_rel.weight": ours.w1.weight, "lin_rel.bias": ours.w0.bias}
    )
    x, edges = random(11, 5), torch.tensor([[0, 1], [1, 2], [0, 7], [7, 10], [3, 1], [9, 0]])
    both_ways = torch.cat((edges, edges.flip(1))).T
    torch.testing.assert_close(ours(x, edges), theirs(x, both_ways))


@pytest.mark.parametrize("index, block", list(enumerate(python_blocks(ROOT / "docs" / "layers.md"))))
def test_the_examples_of_the_page_run(index, block, capsys):
    torch.manual_seed(index)
    exec(compile(block, f"docs/layers.md, example {index}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs" / "layers.md").read_text()
