import pytest
import torch
from torch import nn

from vision3dgen.layers import ResidualLinear, UNet, UNet3d


def test_maps_keep_their_size_and_every_parameter_takes_part():
    for network, sides in ((UNet(3, 5, depth=3, width=4), (12, 20)), (UNet3d(3, 5, levels=3, width=8), (5, 6, 7))):
        out = network(torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0)))
        assert out.shape == (2, 5, *sides)
        out.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_each_level_is_joined_with_its_twin_on_the_way_down():
    """With the way down below the first level cut, what is left is the first level beside the zeros from below."""
    torch.manual_seed(0)
    network = UNet(2, 3, depth=2, width=4)
    for parameter in network.up_convs[0].upconv.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 2, 6, 8)
    first = network.down_convs[0](x)
    up = network.up_convs[0]
    expected = network.conv_final(up.conv2(up.conv1(torch.cat([torch.zeros_like(first), first], 1)).relu()).relu())
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("make, sides", [(UNet, (16, 16)), (UNet3d, (8, 8, 8))])
def test_a_shift_by_whole_coarsest_cells_is_followed(make, sides):
    torch.manual_seed(0)
    network = make(1, 2, width=8).eval()
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # it looks at the whole volume
            module.forward = lambda x: x
    x = torch.zeros(1, 1, *(8 * side for side in sides[:1]), *sides[1:])
    x[0, 0, 40:44] = torch.rand(4, *sides[1:])
    shifted = x.roll(network.factor, 2)
    inner = slice(30, -30)
    torch.testing.assert_close(network(shifted)[:, :, inner], network(x).roll(network.factor, 2)[:, :, inner])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: UNet(1, 1, depth=3)(torch.zeros(1, 1, 12, 14)), r"multiples of 4, got \(12, 14\)"),
        (lambda: UNet3d(1, 1, levels=3, width=8)(torch.zeros(1, 1, 4, 3, 4)), r"at least 4 cells .* got \(4, 3, 4\)"),
        (lambda: UNet(1, 1, depth=0), "depth and width must be at least 1"),
        (lambda: UNet3d(1, 1, levels=0), "levels and width must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_residual_layer_starts_as_its_shortcut():
    x = torch.rand(7, 5)
    for outputs in (5, 3):
        layer = ResidualLinear(5, outputs)
        aside = x if outputs == 5 else layer.shortcut(x)
        torch.testing.assert_close(layer(x), aside + layer.fc_1.bias)
        assert (layer.shortcut is None) == (outputs == 5)
