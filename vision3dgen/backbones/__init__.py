"""Feature extractors: images (B, C, H, W) -> list of maps, fine to coarse, with `.channels` and `.strides`."""

from collections.abc import Callable

from vision3dgen.backbones.backbone import Backbone as Backbone
from vision3dgen.backbones.convnet import CONVNETS as CONVNETS
from vision3dgen.backbones.convnet import Convnet as Convnet
from vision3dgen.backbones.convnet import LeNet5 as LeNet5
from vision3dgen.backbones.convnet import alexnet as alexnet
from vision3dgen.backbones.convnet import vgg as vgg
from vision3dgen.backbones.resnet import RESNETS as RESNETS
from vision3dgen.backbones.resnet import ResNet as ResNet
from vision3dgen.backbones.resnet import resnet18 as resnet18
from vision3dgen.backbones.resnet import resnet20 as resnet20
from vision3dgen.backbones.resnet import resnet50 as resnet50

BACKBONES: dict[str, Callable[..., Backbone]] = {**CONVNETS, **RESNETS}
