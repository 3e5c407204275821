"""PixelCNN++: two causal streams in a U-Net, and a mixture of logistic distributions for each pixel."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from vision3dgen.generators.autoregressive import Autoregressive, ClassBias
from vision3dgen.generators.likelihoods import Categorical, Likelihood, LogisticMixture
from vision3dgen.generators.masked import Cache, CausalConv2d, CausalUpsample2d, Reach, here

ROWS = Reach(1, 1, 1)  # 2 x 3, of the vertical stream
PIXELS = Reach(1, 1, 0)  # 2 x 2, of the other one


def pixel_likelihood(channels: int, levels: int, mixtures: int | None) -> Likelihood:
    """A mixture of so many logistics, or a softmax if `mixtures` is None, which images of one channel may have."""
    if mixtures is not None:
        return LogisticMixture(channels, levels, mixtures)
    if channels > 1:
        raise ValueError(
            f"images of {channels} channels need mixtures: this network has no masks within a pixel, and a softmax for "
            "each channel would take them for independent"
        )
    return Categorical(channels, levels)


def concat_elu(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
    """ELU of x and of -x: twice the channels."""
    return F.elu(torch.cat([x, -x], 1))


def normalized(module: nn.Module) -> nn.Module:
    """Weight normalization of every causal convolution and upsampling in a module, in place."""
    layers = [layer for layer in module.modules() if isinstance(layer, CausalConv2d | CausalUpsample2d)]
    for layer in layers:
        weight_norm(layer, dim=0 if isinstance(layer, CausalConv2d) else 1)
    return module


class GatedResNet(nn.Module):
    """x + a * sigmoid(b), with [a, b] two convolutions of x, a 1 x 1 of another stream between them.

    others: channels of that stream, 0 for none.
    Source: the published code of Salimans et al. 2017 (arXiv:1701.05517), section 2.
    """

    def __init__(self, channels: int, reach: Reach, others: int, dropout: float, classes: int | None):
        super().__init__()
        mask = "B" if reach.right == 0 else None  # None is for maps that were shifted down
        self.first = CausalConv2d(2 * channels, channels, reach, mask)
        self.other = CausalConv2d(2 * others, channels, mask=None) if others else None
        self.dropout = nn.Dropout(dropout)
        self.second = CausalConv2d(2 * channels, 2 * channels, reach, mask)
        self.condition = ClassBias(classes, 2 * channels)

    def forward(
        self, x: Float[Tensor, "B C H W"], other: Float[Tensor, "B C3 H W"] | None, cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B C H W"]:  # fmt: skip
        y = self.first(concat_elu(x), cache)
        if self.other is not None:
            assert other is not None
            y = y + self.other(concat_elu(other), cache)
        y = self.second(self.dropout(concat_elu(y)), cache) + self.condition(cond)
        signal, gate = y.chunk(2, 1)
        return x + signal * gate.sigmoid()


class Scale(nn.Module):
    """One resolution of both streams: blocks on the way down, and on the way up with what was there on the way down."""

    def __init__(self, channels: int, blocks: int, dropout: float, classes: int | None, *, last: bool):
        super().__init__()
        c = channels

        def stack(count: int, reach: Reach, others: int) -> nn.ModuleList:
            return nn.ModuleList(GatedResNet(c, reach, others, dropout, classes) for _ in range(count))

        self.rows_down, self.pixels_down = stack(blocks, ROWS, 0), stack(blocks, PIXELS, c)
        ups = blocks + (not last)  # finer scales also meet what they had before the first block
        self.rows_up, self.pixels_up = stack(ups, ROWS, c), stack(ups, PIXELS, 2 * c)
        self.last = last
        if not last:
            self.rows_shrink = CausalConv2d(c, c, ROWS, None, stride=2)
            self.pixels_shrink = CausalConv2d(c, c, PIXELS, stride=2)
            self.rows_grow, self.pixels_grow = CausalUpsample2d(c, c), CausalUpsample2d(c, c)


class PixelCNNpp(Autoregressive):
    """Gated residual blocks at `scales` resolutions, `blocks` at each, with short cuts between the ways down and up.

    mixtures: logistic components of a pixel; None gives images of one channel a softmax over their levels. Inputs get
    a channel of ones, which tells the image from what is outside. Sizes need not be even.
    Source: Salimans et al. 2017 (arXiv:1701.05517). Its CIFAR-10 network: channels=160, blocks=5, scales=3,
    dropout=0.5, mixtures=10. Differs: upsampling has kernels of 2 x 2; weight normalization starts from torch's
    initialization, not from a batch of data.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (3, 32, 32), levels: int = 256, *, channels: int = 160,
        blocks: int = 5, scales: int = 3, mixtures: int | None = 10, dropout: float = 0.5, classes: int | None = None,
    ):  # fmt: skip
        likelihood = pixel_likelihood(image_shape[0], levels, mixtures)
        super().__init__(image_shape, likelihood, classes)
        if min(channels, blocks, scales) < 1:
            raise ValueError(f"channels, blocks and scales must be at least 1, got {channels}, {blocks}, {scales}")
        self.period = 2 ** (scales - 1)
        inputs = image_shape[0] + 1
        self.from_rows = CausalConv2d(inputs, channels, ROWS, None)
        self.from_row_above = CausalConv2d(inputs, channels, Reach(0, 1, 1), None)
        self.from_left = CausalConv2d(inputs, channels, Reach(1, 1, 0), "A")
        self.scales = nn.ModuleList(
            Scale(channels, blocks, dropout, classes, last=number == scales - 1) for number in range(scales)
        )
        self.out = CausalConv2d(channels, likelihood.outputs, mask=None)
        normalized(self)

    def vertical(
        self, above: Float[Tensor, "B C N W"], cond: Int[Tensor, " B"] | None, cache: Cache | None = None
    ) -> list[Any]:
        """For each scale the maps of its blocks, down and up; before them what starts the other stream."""
        above = _with_ones(above, first=cache is None or cache.row == 0)
        maps: list[Any] = [None] * len(self.scales)
        self._rows(0, self.from_rows(above, cache), maps, cond, cache)
        return [self.from_row_above(above, cache), *maps]

    def _rows(self, number: int, x: Tensor, maps: list[Any], cond: Tensor | None, cache: Cache | None) -> Tensor:
        scale = self.scales[number]
        down = [x]
        for block in scale.rows_down:
            down.append(block(down[-1], None, cond, cache))
        y, size, skips = down[-1], (x.shape[2], x.shape[3]), down[:-1]
        if not scale.last:
            coarse = scale.rows_shrink(y, cache)
            if coarse is not None:
                coarser = None if cache is None else cache.coarser()
                coarse = self._rows(number + 1, coarse, maps, cond, coarser)
            y, skips = scale.rows_grow(coarse, size, cache), list(down)
        up = []
        for block in scale.rows_up:
            y = block(y, skips.pop(), cond, cache)
            up.append(y)
        maps[number] = (down[1:], up)
        return y

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        start, *maps = rows
        y = here(start, cache) + self.from_left(_with_ones(x, first=False), cache)
        return self.out(F.elu(self._pixels(0, y, maps, cond, cache)), cache)

    def _pixels(self, number: int, x: Tensor, maps: Sequence[Any], cond: Tensor | None, cache: Cache | None) -> Tensor:
        scale, (rows_down, rows_up) = self.scales[number], maps[number]
        down = [x]
        for block, other in zip(scale.pixels_down, rows_down):
            down.append(block(down[-1], here(other, cache), cond, cache))
        y, size, skips = down[-1], (x.shape[2], x.shape[3]), down[:-1]
        if not scale.last:
            coarse = scale.pixels_shrink(y, cache)
            if coarse is not None:
                coarser = None if cache is None else cache.coarser()
                coarse = self._pixels(number + 1, coarse, maps, cond, coarser)
            y, skips = scale.pixels_grow(coarse, size, cache), list(down)
        for block, other in zip(scale.pixels_up, rows_up):
            y = block(y, torch.cat([here(other, cache), skips.pop()], 1), cond, cache)
        return y

    def observe(self, x: Float[Tensor, "B C 1 1"], cache: Cache) -> None:
        self.from_left.write(_with_ones(x, first=False), cache)


def _with_ones(x: Tensor, *, first: bool) -> Tensor:
    """x and a channel of ones, zeros in the row above the image where the `first` row is it."""
    ones = torch.ones_like(x[:, :1])
    if first:
        ones[:, :, 0] = 0
    return torch.cat([x, ones], 1)
