"""Initializations: their statistics, and what becomes of a signal in fifty layers."""

import math

import pytest
import torch
from torch import nn

from vision3dgen.layers import INITIALIZATIONS, add_spectral_norm, fans, initialize, upsampling


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CONVOLUTION = nn.Conv2d(14, 22, (3, 5), stride=(1, 2), groups=2)  # sums 7 * 15 values; each goes to 11 * 15 / 2 outputs
VARIANCES = {
    "small_random": 1e-4,
    "xavier_normal": 2 / (105 + 82.5),
    "xavier_uniform": 2 / (105 + 82.5),
    "kaiming_normal": 2 / 105,
    "kaiming_uniform": 2 / 105,
    "kaiming_fan_out": 2 / 82.5,
    "lecun_normal": 1 / 105,
    "orthogonal": 1 / 105,  # 22 rows of length 105 and norm 1
    "dcgan": 4e-4,
    "truncated_normal": 4e-4 * (1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))),
}


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_variances_by_hand(name):
    layer = initialize(CONVOLUTION, name, generator=seeded())
    assert layer is CONVOLUTION
    weight = layer.weight.detach()
    assert weight.mean().item() == pytest.approx(0, abs=4 * math.sqrt(VARIANCES[name] / weight.numel()))
    assert weight.var().item() == pytest.approx(VARIANCES[name], rel=0.1)
    assert not layer.bias.any()
    if name.endswith("_uniform"):
        assert weight.abs().max().item() <= math.sqrt(3 * VARIANCES[name])
    if name == "truncated_normal":
        assert weight.abs().max().item() <= 0.04
    if name == "orthogonal":
        torch.testing.assert_close(weight.flatten(1) @ weight.flatten(1).T, torch.eye(22), rtol=0, atol=1e-5)
    again = initialize(nn.Conv2d(14, 22, (3, 5), (1, 2), groups=2), name, generator=seeded())
    assert torch.equal(again.weight, layer.weight)


def scales(activation: type[nn.Module], name: str, width: int = 256, depth: int = 50) -> list[float]:
    """Root mean square after every activation of a deep network, from unit normal input."""
    network = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), activation())))
    initialize(network.double(), name, generator=seeded())
    x = torch.randn(512, width, generator=seeded(1), dtype=torch.float64)
    found = []
    with torch.no_grad():
        for layer in network:
            x = layer(x)
            if isinstance(layer, activation):
                found.append(x.square().mean().sqrt().item())
    return found


@pytest.mark.parametrize("name", ["kaiming_normal", "kaiming_uniform", "kaiming_fan_out"])
def test_kaiming_keeps_the_scale_of_fifty_relu_layers(name):
    # of unit input: a ReLU halves the second moment, and the next weights double it
    assert all(0.4 < scale < 2.5 for scale in scales(nn.ReLU, name))


def test_small_random_weights_vanish():
    found = scales(nn.ReLU, "small_random")
    factor = 0.01 * math.sqrt(256 / 2)  # per layer
    assert found[-1] < 1e-40
    assert math.log(found[-1] / found[0]) / 49 == pytest.approx(math.log(factor), rel=0.02)


def test_xavier_is_for_symmetric_activations():
    relu = scales(nn.ReLU, "xavier_normal")
    assert relu[-1] / relu[0] == pytest.approx(2 ** (-49 / 2), rel=1)  # half the second moment lost per layer
    tanh = scales(nn.Tanh, "xavier_normal")
    assert tanh[-1] > 0.05
    assert scales(nn.Identity, "xavier_normal")[-1] == pytest.approx(1, rel=0.7)
    assert scales(nn.Identity, "orthogonal")[-1] == pytest.approx(1, rel=0.02)


def test_lecun_and_selu_normalize_themselves():
    found = scales(nn.SELU, "lecun_normal")
    assert all(0.8 < scale < 1.2 for scale in found)


@pytest.mark.parametrize("name", ["kaiming_normal", "kaiming_uniform"])
def test_kaiming_keeps_the_scale_of_convolutions_and_transposed_ones(name):
    """Down by strided convolutions and up by transposed ones, ten times."""
    layers: list[nn.Module] = []
    for _ in range(10):
        layers += [nn.Conv2d(16, 64, 4, 2, 1, padding_mode="circular"), nn.ReLU()]
        layers += [nn.ConvTranspose2d(64, 16, 4, 2, 1), nn.ReLU()]
    network = initialize(nn.Sequential(*layers), name, generator=seeded())
    with torch.no_grad():
        scale = network(torch.randn(4, 16, 64, 64, generator=seeded(1))).square().mean().sqrt().item()
    assert 0.2 < scale < 2.5  # zeros at the borders take a little


def test_fans_by_hand():
    assert fans(nn.Linear(7, 3)) == (7, 3)
    assert fans(CONVOLUTION) == (105, 82.5)
    assert fans(nn.ConvTranspose2d(6, 10, 4, 2, groups=2)) == (3 * 16 / 4, 5 * 16)
    with pytest.raises(ValueError, match="linear and convolution layers have fans, got ReLU"):
        fans(nn.ReLU())


def test_every_layer_and_nothing_else_is_drawn():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), upsampling("transposed", 5, 5), nn.Linear(5, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    initialize(network, "dcgan", generator=seeded())
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias", "2.convolution.weight", "3.weight", "3.bias"}  # its bias was zero already
    values = torch.cat([network[index].weight.flatten() for index in (0, 3)])
    assert values.std().item() == pytest.approx(0.02, rel=0.2)


def test_a_spectral_norms_original_is_drawn():
    torch.manual_seed(0)
    layer = initialize(add_spectral_norm(nn.Linear(64, 32)), "small_random", generator=seeded())
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(0.01, rel=0.1)


def test_what_cannot_be_initialized_is_named():
    with pytest.raises(ValueError, match=r"unknown initialization 'kaiming'.*choose from"):
        initialize(nn.Linear(2, 3), "kaiming")
    with pytest.raises(ValueError, match="ReLU has no linear or convolution layer"):
        initialize(nn.ReLU(), "dcgan")
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    with pytest.raises(ValueError, match="0: a weight made of several parts"):
        initialize(network, "dcgan")
