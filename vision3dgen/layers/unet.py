"""U-Nets over maps and volumes: down by pooling, up again, each level beside what it was on the way down.

Source: Ronneberger et al. 2015 (arXiv:1505.04597); Cicek et al. 2016 (arXiv:1606.06650) in three dimensions. Widths,
order of layers and parameter names are those of Convolutional Occupancy Networks (Peng et al. 2020, arXiv:2003.04618),
whose weights load.
"""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
        return self.conv2(self.conv1(x).relu()).relu()


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.upconv = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.conv1 = nn.Conv2d(2 * outputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"], beside: Float[Tensor, "B C2 H2 W2"]) -> Float[Tensor, "B C2 H2 W2"]:
        x = torch.cat([self.upconv(x), beside], dim=1)
        return self.conv2(self.conv1(x).relu()).relu()


class UNet(nn.Module):
    """Maps (B, inputs, H, W) to (B, outputs, H, W), with `depth` levels of width, 2 width, 4 width ... channels.

    H and W must be multiples of 2^(depth - 1), or it is a ValueError.
    """

    def __init__(self, inputs: int, outputs: int, *, depth: int = 4, width: int = 32):
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"depth and width must be at least 1, got {depth} and {width}")
        self.factor = 2 ** (depth - 1)
        widths = [width << level for level in range(depth)]
        self.down_convs = nn.ModuleList(_Down(a, b) for a, b in zip([inputs, *widths], widths))
        self.up_convs = nn.ModuleList(_Up(a, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.conv_final = nn.Conv2d(width, outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
        if any(side % self.factor for side in x.shape[2:]):
            raise ValueError(
                f"a U-Net of depth {len(self.down_convs)} takes maps whose sides are multiples of {self.factor}, got "
                f"{tuple(x.shape[2:])}"
            )
        levels: list[Tensor] = []
        for down in self.down_convs:
            x = down(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for up, beside in zip(self.up_convs, levels[-2::-1]):
            x = up(x, beside)
        return self.conv_final(x)


class UNet3d(nn.Module):
    """Volumes (B, inputs, D, H, W) to (B, outputs, D, H, W), with `levels` levels of width, 2 width ... channels.

    Group normalization, 3^3 convolution and ReLU, twice at each level; up by repeating cells. Sides must be at least
    2^(levels - 1), or it is a ValueError.
    """

    def __init__(self, inputs: int, outputs: int, *, levels: int = 3, width: int = 32, groups: int = 8):
        super().__init__()
        if levels < 1 or width < 1:
            raise ValueError(f"levels and width must be at least 1, got {levels} and {width}")
        self.factor = 2 ** (levels - 1)
        widths = [width << level for level in range(levels)]
        self.encoders = nn.ModuleList(_level(a, max(b // 2, a), b, groups) for a, b in zip([inputs, *widths], widths))
        self.decoders = nn.ModuleList(_level(a + b, b, b, groups) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.final_conv = nn.Conv3d(width, outputs, 1)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D H W"]:
        if any(side < self.factor for side in x.shape[2:]):
            raise ValueError(
                f"a U-Net of {len(self.encoders)} levels takes volumes of at least {self.factor} cells along each "
                f"axis, got {tuple(x.shape[2:])}"
            )
        levels: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(F.max_pool3d(x, 2) if levels else x)
            levels.append(x)
        for decoder, beside in zip(self.decoders, levels[-2::-1]):
            x = decoder(torch.cat([beside, F.interpolate(x, beside.shape[2:])], dim=1))
        return self.final_conv(x)


def _level(inputs: int, middle: int, outputs: int, groups: int) -> nn.Sequential:
    first, second = _single(inputs, middle, groups), _single(middle, outputs, groups)
    return _named(basic_module=_named(SingleConv1=first, SingleConv2=second))


def _single(inputs: int, outputs: int, groups: int) -> nn.Sequential:
    return _named(
        groupnorm=nn.GroupNorm(groups if inputs >= groups else 1, inputs),
        conv=nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        relu=nn.ReLU(),
    )


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
