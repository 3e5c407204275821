"""Residual networks as feature extractors: images in, maps out, fine to coarse.

Source: He et al. 2016 (arXiv:1512.03385); pre-activation, He et al. 2016b (arXiv:1603.05027); ResNeXt, Xie et al. 2017;
wide, Zagoruyko & Komodakis 2016. Parameter names, shapes and the place of the stride (in the 3x3 convolution of a
bottleneck) are torchvision's, so its published weights load with strict=True when `num_classes` is given.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.backbones.backbone import Backbone, pooled_logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1
    preactivation = False

    def __init__(self, inputs: int, width: int, stride: int, groups: int, base_width: int, dilation: int = 1):
        super().__init__()
        _check_plain(groups, base_width)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(inputs, width, stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()

    @property
    def last(self) -> nn.Module:
        return self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, grouped), 1x1 convolutions and a shortcut; four times as many channels out."""

    expansion = 4
    preactivation = False

    def __init__(self, inputs: int, width: int, stride: int, groups: int, base_width: int, dilation: int = 1):
        super().__init__()
        middle = int(width * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _projection(inputs, width * self.expansion, stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + shortcut).relu()

    @property
    def last(self) -> nn.Module:
        return self.bn3


class PreActBlock(nn.Module):
    """Normalization and ReLU before each of two 3x3 convolutions; nothing after the sum."""

    expansion = 1
    preactivation = True

    def __init__(self, inputs: int, width: int, stride: int, groups: int, base_width: int, dilation: int = 1):
        super().__init__()
        _check_plain(groups, base_width)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.downsample = _projection(inputs, width, stride, norm=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        active = self.bn1(x).relu()
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.conv1(active)
        return self.conv2(self.bn2(x).relu()) + shortcut

    @property
    def last(self) -> nn.Module:
        return self.conv2


class PreActBottleneck(nn.Module):
    """Normalization and ReLU before each of 1x1, 3x3 (strided, grouped), 1x1; nothing after the sum."""

    expansion = 4
    preactivation = True

    def __init__(self, inputs: int, width: int, stride: int, groups: int, base_width: int, dilation: int = 1):
        super().__init__()
        middle = int(width * (base_width / 64.0)) * groups
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, dilation, dilation, groups, bias=False)
        self.bn3 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, width * self.expansion, 1, bias=False)
        self.downsample = _projection(inputs, width * self.expansion, stride, norm=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        active = self.bn1(x).relu()
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.conv1(active)
        x = self.conv2(self.bn2(x).relu())
        return self.conv3(self.bn3(x).relu()) + shortcut

    @property
    def last(self) -> nn.Module:
        return self.conv3


def _check_plain(groups: int, base_width: int) -> None:
    if groups != 1 or base_width != 64:
        raise ValueError(f"blocks of two convolutions have groups 1 and base_width 64, got {groups} and {base_width}")


def _projection(inputs: int, outputs: int, stride: int, *, norm: bool = True) -> nn.Sequential | None:
    """The 1x1 convolution of a shortcut that changes shape, None where the identity fits."""
    if stride == 1 and inputs == outputs:
        return None
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs)) if norm else nn.Sequential(convolution)


Block = BasicBlock | Bottleneck | PreActBlock | PreActBottleneck


class ResNet(Backbone):
    """A residual network: images (B, in_channels, H, W) to one map per stage.

    stem: "imagenet" (7x7 of stride 2, then pooling: strides 4, 8, 16, 32) or "small" for images of 28 to 64 pixels
    (3x3 of stride 1, no pooling: strides 1, 2, 4, 8). widths: of the stages. dilated: which of them, but the first,
    replace their stride by a dilation of the 3x3 convolutions that follow, so that maps stay fine for one class by
    pixel (Chen et al. 2017, arXiv:1706.05587); torchvision's `replace_stride_with_dilation`. With pre-activation blocks
    the last map is normalized and rectified once more, as in the paper; the others are the sums themselves.
    Differs: the first activation is the first block's own, and its shortcut, where the identity, comes before it.
    """

    def __init__(
        self,
        block: type[Block],
        blocks: tuple[int, ...],
        *,
        num_classes: int | None = None,
        in_channels: int = 3,
        stem: Literal["imagenet", "small"] = "imagenet",
        widths: tuple[int, ...] = (64, 128, 256, 512),
        dilated: tuple[bool, ...] | None = None,
        groups: int = 1,
        base_width: int = 64,
        zero_init_residual: bool = False,
    ):
        super().__init__(in_channels, 1, num_classes)
        if len(blocks) != len(widths):
            raise ValueError(f"blocks and widths must be as many as stages, got {blocks} and {widths}")
        self.channels = [width * block.expansion for width in widths]
        dilated = (False,) * (len(widths) - 1) if dilated is None else dilated
        if len(dilated) != len(widths) - 1:
            raise ValueError(f"dilated must say so for each stage but the first, {len(widths) - 1}, got {dilated}")
        self.strides = [4 if stem == "imagenet" else 1]
        for dilate in dilated:
            self.strides.append(self.strides[-1] * (1 if dilate else 2))
        inputs = widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, inputs, 7, 2, 3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(in_channels, inputs, 3, 1, 1, bias=False)
            self.pool = nn.Identity()
        self.bn1 = None if block.preactivation else nn.BatchNorm2d(inputs)
        self.norm = nn.BatchNorm2d(self.channels[-1]) if block.preactivation else None
        dilation = 1
        for index, (count, width, dilate) in enumerate(zip(blocks, widths, (False, *dilated)), start=1):
            stage: list[nn.Module] = []
            for position in range(count):
                stride = 2 if position == 0 and index > 1 and not dilate else 1
                stage.append(block(inputs, width, stride, groups, base_width, dilation))
                dilation *= 2 if position == 0 and dilate else 1  # the first block still sees undilated neighbors
                inputs = width * block.expansion
            setattr(self, f"layer{index}", nn.Sequential(*stage))
        self.fc = None if num_classes is None else nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:  # each block starts as its shortcut (Goyal et al. 2017)
            for module in self.modules():
                if isinstance(module, Block):
                    nn.init.zeros_(module.last.get_parameter("weight"))

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        self.check_images(images)
        self.check_statistics(images)
        x = self.conv1(images)
        x = self.pool(x if self.bn1 is None else self.bn1(x).relu())
        maps = []
        for index in range(1, len(self.channels) + 1):
            x = self.get_submodule(f"layer{index}")(x)
            maps.append(x)
        if self.norm is not None:
            maps[-1] = self.norm(x).relu()
        return maps

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores from the pooled last map; needs `num_classes`."""
        return pooled_logits(self, self.fc, images)


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(ResNet, Bottleneck, (3, 8, 36, 3))
resnext50_32x4d = partial(ResNet, Bottleneck, (3, 4, 6, 3), groups=32, base_width=4)
resnext101_32x8d = partial(ResNet, Bottleneck, (3, 4, 23, 3), groups=32, base_width=8)
wide_resnet50_2 = partial(ResNet, Bottleneck, (3, 4, 6, 3), base_width=128)
preact_resnet18 = partial(ResNet, PreActBlock, (2, 2, 2, 2))
preact_resnet34 = partial(ResNet, PreActBlock, (3, 4, 6, 3))
preact_resnet50 = partial(ResNet, PreActBottleneck, (3, 4, 6, 3))
preact_resnet101 = partial(ResNet, PreActBottleneck, (3, 4, 23, 3))
preact_resnet152 = partial(ResNet, PreActBottleneck, (3, 8, 36, 3))

# The networks for CIFAR of section 4.2 of the paper: three stages, 6n + 2 layers. Differs: shortcuts that change shape
# are projections (option B), as in the networks above.
resnet20 = partial(ResNet, BasicBlock, (3, 3, 3), stem="small", widths=(16, 32, 64))
resnet56 = partial(ResNet, BasicBlock, (9, 9, 9), stem="small", widths=(16, 32, 64))
preact_resnet20 = partial(ResNet, PreActBlock, (3, 3, 3), stem="small", widths=(16, 32, 64))

# Three stages for small pictures of many objects, whose last map must stay fine enough to tell them apart.
resnet8 = partial(ResNet, BasicBlock, (1, 1, 1), widths=(64, 128, 256))

RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101, "resnet152": resnet152,
    "resnext50_32x4d": resnext50_32x4d, "resnext101_32x8d": resnext101_32x8d, "wide_resnet50_2": wide_resnet50_2,
    "preact_resnet18": preact_resnet18, "preact_resnet34": preact_resnet34, "preact_resnet50": preact_resnet50,
    "preact_resnet101": preact_resnet101, "preact_resnet152": preact_resnet152,
    "resnet8": resnet8, "resnet20": resnet20, "resnet56": resnet56, "preact_resnet20": preact_resnet20,
}  # fmt: skip
