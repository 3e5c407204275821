"""Feature extractors: images (B, C, H, W) -> list of maps, fine to coarse, with `.channels` and `.strides`.

`ENCODERS` do the same with point clouds and voxels.
"""

from collections.abc import Callable

from vision3dgen.backbones.backbone import Backbone as Backbone
from vision3dgen.backbones.convnet import CONVNETS as CONVNETS
from vision3dgen.backbones.convnet import Convnet as Convnet
from vision3dgen.backbones.convnet import LeNet5 as LeNet5
from vision3dgen.backbones.convnet import alexnet as alexnet
from vision3dgen.backbones.convnet import vgg as vgg
from vision3dgen.backbones.convnet import vgg11_bn as vgg11_bn
from vision3dgen.backbones.convnet import vgg16 as vgg16
from vision3dgen.backbones.encoder import ENCODERS as ENCODERS
from vision3dgen.backbones.encoder import Encoder as Encoder
from vision3dgen.backbones.encoder import LocalPoolPointnet as LocalPoolPointnet
from vision3dgen.backbones.encoder import LocalVoxelEncoder as LocalVoxelEncoder
from vision3dgen.backbones.encoder import PointCode as PointCode
from vision3dgen.backbones.encoder import VoxelEncoder as VoxelEncoder
from vision3dgen.backbones.fpn import FPN as FPN
from vision3dgen.backbones.fpn import FPNS as FPNS
from vision3dgen.backbones.fpn import resnet_fpn as resnet_fpn
from vision3dgen.backbones.hybrid import HYBRIDS as HYBRIDS
from vision3dgen.backbones.hybrid import Hybrid as Hybrid
from vision3dgen.backbones.multiview import VIEW_ENCODERS as VIEW_ENCODERS
from vision3dgen.backbones.multiview import MultiViewEncoder as MultiViewEncoder
from vision3dgen.backbones.multiview import R2N2Encoder as R2N2Encoder
from vision3dgen.backbones.multiview import ViewEncoder as ViewEncoder
from vision3dgen.backbones.multiview import ViewPooling as ViewPooling
from vision3dgen.backbones.pixels import Pixels as Pixels
from vision3dgen.backbones.points import DGCNN as DGCNN
from vision3dgen.backbones.points import POINT_ENCODERS as POINT_ENCODERS
from vision3dgen.backbones.points import PointEncoder as PointEncoder
from vision3dgen.backbones.points import PointFeatures as PointFeatures
from vision3dgen.backbones.points import PointNet as PointNet
from vision3dgen.backbones.points import PointNet2 as PointNet2
from vision3dgen.backbones.points import ResnetPointnet as ResnetPointnet
from vision3dgen.backbones.points import orthogonality as orthogonality
from vision3dgen.backbones.resnet import RESNETS as RESNETS
from vision3dgen.backbones.resnet import ResNet as ResNet
from vision3dgen.backbones.resnet import resnet18 as resnet18
from vision3dgen.backbones.resnet import resnet20 as resnet20
from vision3dgen.backbones.resnet import resnet50 as resnet50
from vision3dgen.backbones.vit import VITS as VITS
from vision3dgen.backbones.vit import VisionTransformer as VisionTransformer
from vision3dgen.backbones.vit import resize_positions as resize_positions
from vision3dgen.backbones.vit import timm_to_vision3dgen as timm_to_vision3dgen
from vision3dgen.backbones.vit import vision3dgen_to_timm as vision3dgen_to_timm
from vision3dgen.backbones.vit import vit_b_16 as vit_b_16
from vision3dgen.backbones.weights import LoadedWeights as LoadedWeights
from vision3dgen.backbones.weights import load_weights as load_weights
from vision3dgen.backbones.weights import read_weights as read_weights

BACKBONES: dict[str, Callable[..., Backbone]] = {
    **CONVNETS,
    **RESNETS,
    **VITS,
    **FPNS,
    **HYBRIDS,
    "pixels": Pixels,
    "r2n2": R2N2Encoder,
}
