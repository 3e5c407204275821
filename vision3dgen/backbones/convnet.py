"""Convolutions and pooling in a row: LeNet-5, AlexNet, VGG.

Source: LeCun et al. 1998; Krizhevsky 2014 (arXiv:1404.5997), the one-column AlexNet; Simonyan & Zisserman 2015
(arXiv:1409.1556). AlexNet and VGG have torchvision's parameter names and shapes, so its published weights load with
strict=True when `num_classes` is 1000.
"""

from collections.abc import Callable, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.backbones.backbone import Backbone, pooled_logits, present


class LeNet5(Backbone):
    """LeNet-5: images (B, in_channels, H, W) to maps of 6, 16 and 120 channels at strides 2, 4 and 4.

    size: 28 (MNIST as published, padded by 2 here) or 32, for which the last map is the paper's 1 x 1.
    Differs: pooling is a plain mean, C3 sees every map of S2, tanh is not scaled, the output is linear; on larger
    images the last map is averaged.
    """

    def __init__(self, num_classes: int | None = None, in_channels: int = 1, size: int = 28):
        if size not in (28, 32):
            raise ValueError(f"size must be 28 or 32, got {size}")
        super().__init__(in_channels, size, num_classes)
        self.channels = [6, 16, 120]
        self.strides = [2, 4, 4]
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=(32 - size) // 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc = None
        if num_classes is not None:
            self.fc = nn.Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # Glorot & Bengio 2010, for tanh
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        self.check_images(images)
        first = nn.functional.avg_pool2d(self.conv1(images).tanh(), 2)
        second = nn.functional.avg_pool2d(self.conv2(first).tanh(), 2)
        return [first, second, self.conv3(second).tanh()]

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores; needs `num_classes`."""
        return pooled_logits(self, self.fc, images)


class Convnet(Backbone):
    """A sequence of layers, giving the last map before each pooling and the last of all.

    classifier: None, or a module from the last map, pooled to `grid` x `grid` and flattened, to class scores.
    """

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential | None, grid: int):
        convolutions = [layer for layer in features if isinstance(layer, nn.Conv2d)]
        scores = None if classifier is None else [layer for layer in classifier if isinstance(layer, nn.Linear)][-1]
        super().__init__(
            convolutions[0].in_channels, _smallest(features), None if scores is None else scores.out_features
        )
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = classifier
        self.channels, self.strides = [], []
        channels, stride = self.in_channels, 1
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):
                self.channels.append(channels)
                self.strides.append(stride)
                stride *= layer.stride
            if isinstance(layer, nn.Conv2d):
                channels, stride = layer.out_channels, stride * layer.stride[0]
        self.channels.append(channels)
        self.strides.append(stride)

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        self.check_images(images)
        maps, x = [], images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores; needs `num_classes`."""
        return present(self.classifier)(self.avgpool(self(images)[-1]).flatten(1))


def _smallest(features: nn.Sequential) -> int:
    """The image side that leaves one cell of the last map, going back layer by layer."""
    side = 1
    for layer in reversed(features):
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, stride, padding = (
                value[0] if isinstance(value, tuple) else value
                for value in (layer.kernel_size, layer.stride, layer.padding)
            )
            side = (side - 1) * int(stride) + int(kernel) - 2 * int(padding)
    return side


def alexnet(num_classes: int | None = None, in_channels: int = 3, dropout: float = 0.5) -> Convnet:
    """Five convolutions; images of at least 63 pixels."""
    widths = (64, 192, 384, 256, 256)
    shapes = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
    layers: list[nn.Module] = []
    inputs = in_channels
    for index, (width, (kernel, stride, padding)) in enumerate(zip(widths, shapes)):
        layers += [nn.Conv2d(inputs, width, kernel, stride, padding), nn.ReLU()]
        if index in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
        inputs = width
    classifier = None
    if num_classes is not None:
        classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
    return Convnet(nn.Sequential(*layers), classifier, grid=6)


def vgg(
    counts: Sequence[int], *, batch_norm: bool, num_classes: int | None = None, in_channels: int = 3,
    dropout: float = 0.5,
) -> Convnet:  # fmt: skip
    """Five stages of `counts[i]` 3x3 convolutions, each followed by max pooling; images of at least 32 pixels."""
    layers: list[nn.Module] = []
    inputs = in_channels
    for count, width in zip(counts, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    classifier = None
    if num_classes is not None:
        classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
    network = Convnet(nn.Sequential(*layers), classifier, grid=7)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network


vgg11 = partial(vgg, (1, 1, 2, 2, 2), batch_norm=False)
vgg13 = partial(vgg, (2, 2, 2, 2, 2), batch_norm=False)
vgg16 = partial(vgg, (2, 2, 3, 3, 3), batch_norm=False)
vgg19 = partial(vgg, (2, 2, 4, 4, 4), batch_norm=False)
vgg11_bn = partial(vgg, (1, 1, 2, 2, 2), batch_norm=True)
vgg13_bn = partial(vgg, (2, 2, 2, 2, 2), batch_norm=True)
vgg16_bn = partial(vgg, (2, 2, 3, 3, 3), batch_norm=True)
vgg19_bn = partial(vgg, (2, 2, 4, 4, 4), batch_norm=True)

CONVNETS: dict[str, Callable[..., Backbone]] = {
    "lenet5": LeNet5,
    "alexnet": alexnet,
    "vgg11": vgg11, "vgg13": vgg13, "vgg16": vgg16, "vgg19": vgg19,
    "vgg11_bn": vgg11_bn, "vgg13_bn": vgg13_bn, "vgg16_bn": vgg16_bn, "vgg19_bn": vgg19_bn,
}  # fmt: skip
