"""PixelCNN++: two causal streams in a U-Net, and a mixture of logistic distributions for each pixel."""

from abc import ABC
from collections.abc import Mapping, Sequence
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


class WeightNormalized(Autoregressive, ABC):
    """A network of `normalized` layers, which start from the first batch that the network is trained on.

    In that batch, without dropout, each channel of each layer then has mean 0 and deviation 1, of the second layer of
    each `GatedResNet` 0.1. Source: Salimans and Kingma 2016 (arXiv:1602.07868), section 3.
    """

    started: Tensor

    def __init__(self, image_shape: Sequence[int], likelihood: Likelihood, classes: int | None):
        super().__init__(image_shape, likelihood, classes)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        if self.training and not bool(self.started):
            self.start(batch["image"], batch["label"] if self.classes is not None else None)
        return super().loss(batch, part)

    @torch.no_grad()
    def start(self, images: Float[Tensor, "B C H W"], cond: Int[Tensor, " B"] | None = None) -> None:
        """Set scales and biases by a batch of images."""
        training = self.training
        self.eval()
        last = {id(module.second) for module in self.modules() if isinstance(module, GatedResNet)}

        def standardize(layer: Any, _: Any, out: Tensor) -> Tensor:
            axes = (0, *range(2, out.ndim))
            deviation, mean = out.std(axes, correction=0), out.mean(axes)
            wanted = 0.1 if id(layer) in last else 1.0
            scale = torch.where(deviation > 1e-4, wanted / deviation, 1.0)  # a constant channel has none to set
            layer.parametrizations.weight.original0.mul_(scale.view(layer.parametrizations.weight.original0.shape))
            layer.bias.sub_(mean).mul_(scale)
            return (out - mean[:, None, None]) * scale[:, None, None]

        layers = [module for module in self.modules() if isinstance(module, CausalConv2d | CausalUpsample2d)]
        hooks = [layer.register_forward_hook(standardize) for layer in layers]
        try:
            self(images, cond)
        finally:
            for hook in hooks:
                hook.remove()
            self.train(training)
        self.started.fill_(True)


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
    """One resolution of a stream, and inside of it the coarser ones: blocks down, blocks up with what was there before.

    reach: of the kernels. follows: whether each block is given the map that the other stream has at its place.
    """

    def __init__(
        self, channels: int, blocks: int, reach: Reach, dropout: float, classes: int | None, *, follows: bool,
        inner: "nn.Module | None",
    ):  # fmt: skip
        super().__init__()
        other = channels if follows else 0
        ups = blocks if inner is None else blocks + 1  # all maps but the last, which it starts from, or all
        self.down = nn.ModuleList(GatedResNet(channels, reach, other, dropout, classes) for _ in range(blocks))
        self.up = nn.ModuleList(GatedResNet(channels, reach, channels + other, dropout, classes) for _ in range(ups))
        self.inner = inner
        if inner is not None:
            self.shrink = CausalConv2d(channels, channels, reach, "B" if reach.right == 0 else None, stride=2)
            self.grow = CausalUpsample2d(channels, channels)

    def forward(
        self, x: Float[Tensor, "B C H W"], others: Sequence[Any], cond: Int[Tensor, " B"] | None, cache: Cache | None
    ) -> tuple[Tensor, list[Any]]:
        """The map, and of each scale (maps of the blocks down, up), what the other stream takes as `others`.

        Scales that a cache has nothing for, between their rows or columns, are left out.
        """
        down, up = [x], []
        downward, upward = others[0] if others else ([None] * len(self.down), [None] * len(self.up))
        for block, other in zip(self.down, downward):
            down.append(block(down[-1], None if other is None else here(other, cache), cond, cache))
        y, skips, coarser_maps = down[-1], down[:-1], []
        if self.inner is not None:
            coarse = self.shrink(y, cache)
            if coarse is not None:
                coarser = None if cache is None else cache.coarser()
                coarse, coarser_maps = self.inner(coarse, others[1:], cond, coarser)
            y, skips = self.grow(coarse, (x.shape[2], x.shape[3]), cache), down[:]
        for block, other in zip(self.up, upward):
            skip = skips.pop()
            y = block(y, skip if other is None else torch.cat([here(other, cache), skip], 1), cond, cache)
            up.append(y)
        return y, [(down[1:], up), *coarser_maps]


def nested(scales: int, *arguments: Any, follows: bool) -> Scale:
    """Scales inside of one another; `arguments` are those of each."""
    inner = nested(scales - 1, *arguments, follows=follows) if scales > 1 else None
    return Scale(*arguments, follows=follows, inner=inner)


class PixelCNNpp(WeightNormalized):
    """Gated residual blocks at `scales` resolutions, `blocks` at each, with short cuts between the ways down and up.

    mixtures: logistic components of a pixel; None gives images of one channel a softmax over their levels. Inputs get
    a channel of ones, which tells the image from what is outside. Sizes need not be even.
    Source: Salimans et al. 2017 (arXiv:1701.05517). Its CIFAR-10 network: channels=160, blocks=5, scales=3,
    dropout=0.5, mixtures=10. Differs: upsampling has kernels of 2 x 2.
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
        self.rows = nested(scales, channels, blocks, ROWS, dropout, classes, follows=False)
        self.pixels = nested(scales, channels, blocks, PIXELS, dropout, classes, follows=True)
        self.out = CausalConv2d(channels, likelihood.outputs, mask=None)
        normalized(self)

    def vertical(
        self, above: Float[Tensor, "B C N W"], cond: Int[Tensor, " B"] | None, cache: Cache | None = None
    ) -> list[Any]:
        """What starts the other stream, and for each scale the maps of the blocks, down and up."""
        above = _with_ones(above, first=cache is None or cache.row == 0)
        _, maps = self.rows(self.from_rows(above, cache), [], cond, cache)
        return [self.from_row_above(above, cache), *maps]

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        start, *maps = rows
        y = here(start, cache) + self.from_left(_with_ones(x, first=False), cache)
        y, _ = self.pixels(y, maps, cond, cache)
        return self.out(F.elu(y), cache)

    def observe(self, x: Float[Tensor, "B C 1 1"], cache: Cache) -> None:
        self.from_left.write(_with_ones(x, first=False), cache)


def _with_ones(x: Tensor, *, first: bool) -> Tensor:
    """x and a channel of ones, zeros in the row above the image where the `first` row is it."""
    ones = torch.ones_like(x[:, :1])
    if first:
        ones[:, :, 0] = 0
    return torch.cat([x, ones], 1)
