import numpy as np
import pytest
import torch

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from vision3dgen.backbones import BACKBONES, RESNETS, resnet18


@pytest.mark.parametrize("name", sorted(RESNETS))
def test_resnet_layout_is_torchvisions(name, shared_data):
    with torch.device("meta"):
        network = RESNETS[name](num_classes=1000)
    assert shapes_of(network) == layout(shared_data, name)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_resnet_outputs_are_torchvisions(name, shared_data):
    network = RESNETS[name](num_classes=1000).eval()
    network.load_state_dict(filled(shapes_of(network)), strict=True)
    with torch.no_grad():
        ours = network.logits(uniform(2, 3, 224, 224, seed=0)).numpy()
    theirs = np.load(shared_data / OUTPUTS / "forward.npz")[f"{name}/logits"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(37, 53), (64, 64)])
def test_maps_have_the_channels_and_strides_they_say(name, size):
    backbone = BACKBONES[name]().eval()
    maps = backbone(torch.rand(2, 3, *size))
    assert [m.shape[1] for m in maps] == backbone.channels
    for feature, stride in zip(maps, backbone.strides):
        assert feature.shape[2:] == tuple(-(-side // stride) for side in size)


def test_without_classes_there_is_no_classifier():
    network = resnet18()
    assert not any(name.startswith("fc") for name in network.state_dict())
    with pytest.raises(ValueError, match="num_classes"):
        network.logits(torch.rand(1, 3, 32, 32))


def test_zero_init_makes_each_block_start_as_its_shortcut():
    network = resnet18(zero_init_residual=True).eval()
    block = network.layer1[1]
    x = torch.rand(2, 64, 7, 11)
    assert torch.equal(block(x), x)


def test_every_parameter_gets_a_gradient():
    network = resnet18()
    sum(m.sum() for m in network(torch.rand(2, 3, 37, 41))).backward()
    assert all(p.grad is not None for p in network.parameters())
