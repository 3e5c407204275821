"""Residual networks as feature extractors: images in, four maps out, fine to coarse.

Source: He et al. 2016 (arXiv:1512.03385); ResNeXt, Xie et al. 2017; wide, Zagoruyko & Komodakis 2016.
Parameter names, shapes and the place of the stride (in the 3x3 convolution of a bottleneck) are torchvision's, so its
published weights load with strict=True when `num_classes` is given.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, downsample: nn.Module | None, groups: int, base_width: int
    ):
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"basic blocks have groups 1 and width 64, got {groups} and {base_width}")
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided, grouped), 1x1 convolutions and a shortcut; four times as many channels out."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, downsample: nn.Module | None, groups: int, base_width: int
    ):
        super().__init__()
        middle = int(width * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + shortcut).relu()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3


class ResNet(nn.Module):
    """A residual network: images (B, 3, H, W), normalized, to maps at strides 4, 8, 16, 32.

    With `num_classes`, the classifier `fc` exists too and `logits(images)` uses it; without, there is no `fc` at all.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        *,
        num_classes: int | None = None,
        groups: int = 1,
        base_width: int = 64,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        self.channels = [width * block.expansion for width in (64, 128, 256, 512)]
        self.strides = [4, 8, 16, 32]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for index, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512)), start=1):
            stage: list[nn.Module] = []
            for position in range(count):
                stride = 2 if position == 0 and index > 1 else 1
                downsample = None
                if stride != 1 or inputs != width * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(inputs, width * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(width * block.expansion),
                    )
                stage.append(block(inputs, width, stride, downsample, groups, base_width))
                inputs = width * block.expansion
            setattr(self, f"layer{index}", nn.Sequential(*stage))
        self.fc = None if num_classes is None else nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:  # each block starts as the identity (Goyal et al. 2017)
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    nn.init.zeros_(module.last_norm.weight)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        x = self.bn1(self.conv1(images)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        maps = []
        for index in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{index}")(x)
            maps.append(x)
        return maps

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Class scores from the pooled last map; needs `num_classes`."""
        if self.fc is None:
            raise ValueError("this network has no classifier: build it with num_classes")
        return self.fc(self(images)[-1].mean(dim=(2, 3)))


def resnet18(num_classes: int | None = None, zero_init_residual: bool = False) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, zero_init_residual=zero_init_residual)


def resnet34(num_classes: int | None = None, zero_init_residual: bool = False) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, zero_init_residual=zero_init_residual)


def resnet50(num_classes: int | None = None, zero_init_residual: bool = False) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, zero_init_residual=zero_init_residual)


def resnet101(num_classes: int | None = None, zero_init_residual: bool = False) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, zero_init_residual=zero_init_residual)


def resnet152(num_classes: int | None = None, zero_init_residual: bool = False) -> ResNet:
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes=num_classes, zero_init_residual=zero_init_residual)


def resnext50_32x4d(num_classes: int | None = None) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, groups=32, base_width=4)


def resnext101_32x8d(num_classes: int | None = None) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, groups=32, base_width=8)


def wide_resnet50_2(num_classes: int | None = None) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, base_width=128)


RESNETS: dict[str, Callable[..., ResNet]] = {
    function.__name__: function
    for function in (
        resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, resnext101_32x8d, wide_resnet50_2
    )
}  # fmt: skip
