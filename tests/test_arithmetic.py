"""Output sizes and receptive fields against running the layers, gradients, and numbers worked out by hand."""

import random
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import nn

from vision3dgen.backbones import resnet18
from vision3dgen.layers import (
    GatedConvolution,
    GatedTanh,
    SelfAttention2d,
    StochasticDepth,
    measure_receptive_field,
    receptive_field,
    receptive_field_table,
    unit_receptive_field,
    upsampling,
)

VGG16 = nn.Sequential(
    *(
        layer
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
        for layer in [*[nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()] * count, nn.MaxPool2d(2, 2)]
    )
)


def test_vgg16_by_hand():
    rows = receptive_field(VGG16, 224)
    fields = [row.field[0] for row in rows]
    assert fields == [3, 5, 6, 10, 14, 16, 24, 32, 40, 44, 60, 76, 92, 100, 132, 164, 196, 212]  # published for VGG-16
    assert [row.size for row in rows if "Pool" in row.layer] == [(side, side) for side in (112, 56, 28, 14, 7)]
    assert rows[-1].jump == (32, 32)
    assert rows[-1].start == (-90, -90)  # centered on the 32 pixels of its place: -90 + 212 = 32 + 90


def test_alexnet_by_hand():
    layers = [
        nn.Conv2d(3, 2, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(2, 2, 5, padding=2), nn.MaxPool2d(3, 2),
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    rows = receptive_field(layers, (224, 200))
    assert [row.field[0] for row in rows] == [11, 19, 51, 67, 99, 131, 163, 195]
    assert rows[-1].size == (6, 5)
    assert rows[-1].jump == (32, 32)


def random_layer(rng: random.Random, channels: int, dims: int, linear: bool) -> nn.Module:
    """One layer with different settings on each axis."""

    def each(*choices: int) -> tuple[int, ...]:
        return tuple(rng.choice(choices) for _ in range(dims))

    conv, transposed = (
        (nn.Conv1d, nn.ConvTranspose1d),
        (nn.Conv2d, nn.ConvTranspose2d),
        (nn.Conv3d, nn.ConvTranspose3d),
    )[dims - 1]
    kinds = [
        lambda: conv(channels, channels, each(1, 2, 3, 5), each(1, 1, 2, 3), each(0, 1, 2), each(1, 1, 2)),
        lambda: conv(channels, channels, each(2, 3, 4), padding="same", dilation=2),
        lambda: transposed(channels, channels, each(2, 3, 4, 5), each(2, 3), each(0, 1), each(0, 1)),
        lambda: transposed(channels, channels, each(1, 2), each(2, 3), 0, each(0, 1), dilation=each(1, 2)),
        lambda: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](
            each(2, 3), each(1, 2), each(0, 1), ceil_mode=rng.random() < 0.5
        ),
        lambda: nn.Upsample(scale_factor=rng.choice((2, 3)), mode="nearest"),
        lambda: (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[dims - 1](each(0, 1, 2) + each(0, 1, 2)),
        lambda: conv(1, 1, 5, each(1, 2), 2, padding_mode=rng.choice(("reflect", "replicate", "circular"))),
        lambda: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](each(5, 7)),
    ]  # fmt: skip
    if not linear:
        kinds += [
            nn.ReLU,
            lambda: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels),
            lambda: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](
                each(3, 4), each(1, 2), each(0, 1), each(1, 1, 2), ceil_mode=rng.random() < 0.5
            ),
            lambda: nn.Upsample(scale_factor=2, mode=("linear", "bilinear", "trilinear")[dims - 1]),
        ]
        if dims == 2:
            kinds += [
                lambda: nn.ReflectionPad2d((1, 2, 0, 1)),
                lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
                lambda: upsampling(rng.choice(("nearest", "bilinear", "bicubic", "transposed")), channels, channels),
            ]
    return rng.choice(kinds)()


def stacks(count: int, dims: int, sides: tuple[int, ...], *, linear: bool = False):
    """Random chains whose output still has a place, each with its output's size."""
    rng, found = random.Random(dims), []
    torch.manual_seed(dims)
    while len(found) < count:
        network = nn.Sequential(*(random_layer(rng, 1, dims, linear) for _ in range(rng.randint(2, 5)))).eval()
        try:
            size = network(torch.rand(1, 1, *sides)).shape[2:]
        except RuntimeError:  # a layer found too little left
            continue
        if max(size) < 60:
            found.append((network, tuple(size)))
    return found


@pytest.mark.parametrize("dims, count", [(1, 200), (2, 60), (3, 10)])
def test_sizes_and_fields_of_random_chains_are_measured_ones(dims, count):
    sides = (41, 37, 23)[-dims:]
    compared = 0
    for network, size in stacks(count, dims, sides):
        rows = receptive_field(network, sides)
        if not rows:
            assert size == sides
            continue
        assert rows[-1].size == size, network
        unit = tuple(side // 3 for side in size)
        try:
            expected = measure_receptive_field(network, sides, channels=1, unit=unit)[0]
        except ValueError:  # it reads nothing but padding, or the gaps of a transposed convolution
            with pytest.raises(ValueError, match=r"does not depend on the input"):
                unit_receptive_field(network, sides, unit)
            continue
        assert unit_receptive_field(network, sides, unit) == expected, network
        if "circular" not in str(network):  # which brings the other end of the input near
            assert all(a <= b for a, b in zip(expected.field, rows[-1].field)), (network, rows[-1], expected)
        compared += 1
    assert compared > 0.7 * count


@pytest.mark.parametrize("dims, count", [(1, 60), (2, 8)])
def test_gradients_reach_exactly_the_calculated_field(dims, count):
    """Positive weights, so that no gradient cancels: at every place it ends where the field ends."""
    sides = (47, 37)[:dims]
    attained = 0
    for network, size in stacks(count, dims, sides, linear=True):
        rows = receptive_field(network, sides)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(parameter.abs() + 0.1)
        x = torch.rand(1, 1, *sides, dtype=torch.float64).requires_grad_()
        out = network.double()(x)[0, 0]
        for unit in product(*(range(0, side, 3) for side in size)):
            gradient = torch.autograd.grad(out[unit], x, retain_graph=True)[0][0, 0]
            places = gradient.nonzero()
            if len(places):
                reach = unit_receptive_field(network, sides, unit)
                assert reach.first == tuple(places.amin(0).tolist()), (network, unit)
                assert reach.last == tuple(places.amax(0).tolist()), (network, unit)
                attained += reach.field == rows[-1].field
    assert attained > 20


def test_field_jump_and_start_tell_every_place_of_a_chain_without_upsampling():
    rows = receptive_field(VGG16[:17], (120, 100))
    last = rows[-1]
    for unit in ((5, 7), (9, 11), (0, 0), (14, 11)):
        reach = unit_receptive_field(VGG16[:17], (120, 100), unit)
        for axis, side in enumerate((120, 100)):
            first = last.start[axis] + unit[axis] * last.jump[axis]
            assert reach.first[axis] == max(first, 0)
            assert reach.last[axis] == min(first + last.field[axis] - 1, side - 1)
            assert reach.complete[axis] == (first > 0 and first + last.field[axis] < side)


def test_fields_behind_transposed_convolutions_differ_by_place():
    (row,) = receptive_field(nn.ConvTranspose1d(1, 1, 3, 2, 1), 11)
    assert row.size == (21,)
    assert row.field == (2,)  # even places see one input, odd ones two
    assert row.jump == (Fraction(1, 2),)
    fields = [unit_receptive_field(nn.ConvTranspose1d(1, 1, 3, 2, 1), 11, (place,)).field[0] for place in range(21)]
    assert fields == [1, 2] * 10 + [1]
    with pytest.raises(ValueError, match=r"place \(1,\) of the output does not depend on the input"):
        unit_receptive_field(nn.ConvTranspose1d(1, 1, 1, 2), 11, (1,))


def test_layers_of_our_own_and_heads():
    for name in ("bed_of_nails", "nearest", "bilinear", "bicubic", "transposed", "max_unpooling"):
        network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), upsampling(name, 1, 1))
        rows = receptive_field(network, (11, 13))
        assert rows[-1].size == (22, 26)
        assert rows[-1].jump == (Fraction(1, 2), Fraction(1, 2))
        if name != "max_unpooling":
            reaches = [measure_receptive_field(network, (11, 13), channels=1, unit=(y, 13))[0] for y in (10, 11)]
            assert max(reach.field[0] for reach in reaches) == rows[-1].field[0]
    gated = nn.Sequential(GatedConvolution(nn.Conv2d(3, 8, 5, padding=2), 4), StochasticDepth(0.1))
    assert [(row.name, row.field) for row in receptive_field(gated, 23)] == [("0.convolution", (5, 5))]
    head = [nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    assert receptive_field(head, (21, 23))[-1].size == (1, 1)
    assert unit_receptive_field(head, (21, 23)).field == (21, 23)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("unit", [0, 5, 10])
def test_even_kernels_that_keep_the_size_pad_more_behind(unit):
    convolution = nn.Conv1d(1, 1, 4, padding="same")
    reach = unit_receptive_field(convolution, 11, (unit,))
    assert (reach.first, reach.last) == ((max(unit - 1, 0),), (min(unit + 2, 10),))
    assert reach == measure_receptive_field(convolution, (11,), channels=1, unit=(unit,))[0]


@pytest.mark.parametrize(
    "pad, expected",
    [
        (nn.ReflectionPad1d(2), [2, 1, 0, 1, 2, 3, 4, 3, 2]),
        (nn.ReplicationPad1d(2), [0, 0, 0, 1, 2, 3, 4, 4, 4]),
        (nn.Conv1d(1, 1, 1, padding=2, padding_mode="circular"), [3, 4, 0, 1, 2, 3, 4, 0, 1]),
    ],
    ids=["reflect", "replicate", "circular"],
)
def test_what_padding_reads(pad, expected):
    for unit, place in enumerate(expected):
        reach = unit_receptive_field(pad, 5, (unit,))
        assert (reach.first, reach.last) == ((place,), (place,))
        assert reach == measure_receptive_field(pad, (5,), channels=1, unit=(unit,))[0]


def test_a_layer_used_twice_counts_twice():
    convolution = nn.Conv2d(1, 1, 3)
    assert [row.field[0] for row in receptive_field(nn.Sequential(convolution, convolution), 11)] == [3, 5]


def test_residual_networks_are_measured():
    """The widest branch counts: of ResNet-18, 7x7, pool 3, and two 3x3 convolutions in each of two blocks."""
    chain = [nn.Conv2d(3, 1, 7, 2, 3), nn.MaxPool2d(3, 2, 1), *[nn.Conv2d(1, 1, 3, padding=1)] * 4]
    expected = receptive_field(chain, 149)[-1]
    torch.manual_seed(0)
    reach = measure_receptive_field(FirstStage(resnet18()), (149, 149))[0]
    assert reach.size == expected.size
    assert reach.field == expected.field == (43, 43)
    assert reach.complete == (True, True)


class FirstStage(nn.Module):
    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = nn.functional.max_pool2d(self.trunk.bn1(self.trunk.conv1(images)).relu(), 3, 2, 1)
        return [self.trunk.layer1(x)]


def test_attention_sees_everything():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), SelfAttention2d(8))
    (reach,) = measure_receptive_field(network, (11, 13))
    assert (reach.first, reach.last) == ((0, 0), (10, 12))
    assert reach.complete == (False, False)
    with pytest.raises(ValueError, match=r"1 \(SelfAttention2d\): its receptive field does not follow"):
        receptive_field(network, (11, 13))


def test_what_cannot_be_calculated_is_named():
    with pytest.raises(ValueError, match=r"1\.0 \(FractionalMaxPool2d\).*use measure_receptive_field"):
        receptive_field(nn.Sequential(nn.ReLU(), nn.Sequential(nn.FractionalMaxPool2d(2, output_ratio=0.7))), 11)
    with pytest.raises(ValueError, match=r"network \(ResNet\)"):
        receptive_field(resnet18(), 64)
    with pytest.raises(ValueError, match=r"1 \(Linear\)"):  # acts on the last axis
        receptive_field([nn.Conv2d(3, 4, 3), nn.Linear(9, 2)], 11)
    with pytest.raises(ValueError, match=r"2 \(Conv2d 5\): nothing is left of 3 places on axis 1"):
        receptive_field([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 5)], (29, 9))
    with pytest.raises(ValueError, match=r"unit must be a place of the output, which is \(9, 9\), got \(9, 0\)"):
        unit_receptive_field(nn.Conv2d(3, 4, 3), 11, (9, 0))
    with pytest.raises(ValueError, match="itself alone"):
        unit_receptive_field(nn.ReLU(), 11)
    with pytest.raises(ValueError, match="does not depend on the input"):
        measure_receptive_field(nn.ConvTranspose2d(3, 4, 1, 2), (5, 7), unit=(1, 1))
    with pytest.raises(ValueError, match="GatedTanh"):
        receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3), GatedTanh(dim=2)), 11)


def test_the_table():
    rows = receptive_field([nn.Conv2d(3, 4, (3, 5), (1, 2)), nn.MaxPool2d(2), nn.Upsample(scale_factor=4)], (21, 33))
    assert receptive_field_table(rows).splitlines() == [
        "layer                   output  field   jump  start",
        "0      Conv2d 3x5 /1x2   19x15    3x5    1x2      0",
        "1      MaxPool2d 2 /2      9x7    4x7    2x4      0",
        "2      Upsample          36x28    4x7  1/2x1      0",
    ]
