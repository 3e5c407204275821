"""Feature extractors: images (B, 3, H, W) -> list of maps, fine to coarse, with `.channels` and `.strides`."""

from collections.abc import Callable

from torch import nn

from vision3dgen.backbones.resnet import RESNETS as RESNETS
from vision3dgen.backbones.resnet import ResNet as ResNet
from vision3dgen.backbones.resnet import resnet18 as resnet18

BACKBONES: dict[str, Callable[..., nn.Module]] = {**RESNETS}
