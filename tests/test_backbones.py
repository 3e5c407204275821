import numpy as np
import pytest
import torch
from torch import nn

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from vision3dgen.backbones import BACKBONES, LeNet5, ResNet, alexnet, resnet18, resnet20
from vision3dgen.backbones.resnet import PreActBlock

CLASSIFIERS = (
    "alexnet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg16_bn", "vgg19_bn",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "wide_resnet50_2",
)  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_layout_is_torchvisions(name, shared_data):
    with torch.device("meta"):
        network = BACKBONES[name](num_classes=1000)
    assert shapes_of(network) == layout(shared_data, name)


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d"])
def test_outputs_are_torchvisions(name, shared_data):
    with torch.device("meta"):
        network = BACKBONES[name](num_classes=1000).eval()
    network.load_state_dict(filled(shapes_of(network)), strict=True, assign=True)
    with torch.no_grad():
        ours = network.logits(uniform(2, 3, 224, 224, seed=0)).numpy()
    theirs = np.load(shared_data / OUTPUTS / "forward.npz")[f"{name}/logits"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
