"""Feature pyramids: maps of one width, each with what the coarser ones know.

Source: Lin et al. 2017 (arXiv:1612.03144). Parameter names are those of torchvision's `resnet_fpn_backbone`, whose
weights load with strict=True into `resnet_fpn(...)`.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.backbones.backbone import Backbone
from vision3dgen.backbones.resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from vision3dgen.layers import freeze_batch_norm

Norm = Callable[[int], nn.Module]


class Pyramid(nn.Module):
    """A 1x1 convolution of each map, summed from coarse to fine (nearest upsampling), then a 3x3 one of each."""

    def __init__(self, inputs: list[int], channels: int, norm: Norm | None):
        super().__init__()
        self.inner_blocks = nn.ModuleList(_convolution(width, channels, 1, norm) for width in inputs)
        self.layer_blocks = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in inputs)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [block(x) for block, x in zip(self.inner_blocks, maps)]
        total = laterals[-1]
        sums = [total]
        for lateral in reversed(laterals[:-1]):
            total = lateral + F.interpolate(total, size=lateral.shape[2:], mode="nearest")
            sums.insert(0, total)
        return [block(x) for block, x in zip(self.layer_blocks, sums)]


def _convolution(inputs: int, channels: int, kernel: int, norm: Norm | None) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=norm is None)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution) if norm is None else nn.Sequential(convolution, norm(channels))


class FPN(Backbone):
    """A pyramid over any trunk: as many maps of `channels` channels as the trunk's, and one coarser.

    The coarser one, left out with `extra_level=False`, is the coarsest subsampled by 2. norm: what follows each
    convolution, given its channels; None is the paper's, with biases. The trunk is built without a classifier.
    """

    def __init__(self, trunk: Backbone, channels: int = 256, *, extra_level: bool = True, norm: Norm | None = None):
        if trunk.num_classes is not None:
            raise ValueError("the trunk of a feature pyramid has no use for a classifier: build it without num_classes")
        super().__init__(trunk.in_channels, trunk.smallest)
        self.body = trunk
        self.fpn = Pyramid(trunk.channels, channels, norm)
        self.extra_level = extra_level
        self.strides = [*trunk.strides, 2 * trunk.strides[-1]] if extra_level else list(trunk.strides)
        self.channels = [channels] * len(self.strides)

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        maps = self.fpn(self.body(images))
        return [*maps, F.max_pool2d(maps[-1], 1, 2)] if self.extra_level else maps


def resnet_fpn(
    trunk: Callable[..., ResNet], channels: int = 256, *, in_channels: int = 3, frozen_norm: bool = True
) -> FPN:
    """A pyramid over a residual network; `frozen_norm` fixes its batch normalization, as detectors do."""
    body = trunk(in_channels=in_channels)
    if frozen_norm:
        freeze_batch_norm(body)
    return FPN(body, channels)


resnet18_fpn = partial(resnet_fpn, resnet18)
resnet34_fpn = partial(resnet_fpn, resnet34)
resnet50_fpn = partial(resnet_fpn, resnet50)
resnet101_fpn = partial(resnet_fpn, resnet101)

FPNS: dict[str, Callable[..., FPN]] = {
    "resnet18_fpn": resnet18_fpn, "resnet34_fpn": resnet34_fpn, "resnet50_fpn": resnet50_fpn,
    "resnet101_fpn": resnet101_fpn, "fpn": FPN,
}  # fmt: skip
