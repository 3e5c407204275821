"""PixelCNN and Gated PixelCNN: masked convolutions, one softmax for each channel of each pixel."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.generators.autoregressive import Autoregressive, ClassBias
from vision3dgen.generators.likelihoods import Categorical
from vision3dgen.generators.masked import Cache, CausalConv2d, Pixels, Reach, here, square
from vision3dgen.layers import gated_tanh


class Head(nn.Module):
    """ReLU, 1 x 1, ReLU, 1 x 1, masked by channel: features to the logits of every level."""

    def __init__(self, channels: int, hidden: int, likelihood: Categorical):
        super().__init__()
        groups = likelihood.channels
        self.hidden = CausalConv2d(channels, hidden, groups=groups)
        self.logits = CausalConv2d(hidden, likelihood.outputs, groups=groups)

    def forward(self, x: Float[Tensor, "B C H W"], cache: Cache | None = None) -> Float[Tensor, "B P H W"]:
        return self.logits(self.hidden(x.relu(), cache).relu(), cache)

    def pixels(self, batch: int, cache: Cache) -> Callable[[Tensor], Tensor]:
        """`forward` of pixels (B, C), which it overwrites."""
        hidden, logits = self.hidden.begin(batch, cache), self.logits.begin(batch, cache)

        def step(x: Tensor) -> Tensor:
            y = torch.addmm(hidden.bias, x.relu_(), hidden.lower).relu_()
            return torch.addmm(logits.bias, y, logits.lower)

        return step


class ResidualBlock(nn.Module):
    """x + 1 x 1 to half the channels, masked k x k, 1 x 1 back, each after a ReLU."""

    def __init__(self, channels: int, kernel_size: int, groups: int):
        super().__init__()
        self.reduce = CausalConv2d(channels, channels // 2, groups=groups)
        self.masked = CausalConv2d(channels // 2, channels // 2, square(kernel_size), groups=groups)
        self.expand = CausalConv2d(channels // 2, channels, groups=groups)

    def forward(self, x: Float[Tensor, "B C H W"], cache: Cache | None = None) -> Float[Tensor, "B C H W"]:
        y = self.masked(self.reduce(x.relu(), cache).relu(), cache)
        return x + self.expand(y.relu(), cache)

    def pixels(self, batch: int, cache: Cache) -> Callable[[Tensor, int], Tensor]:
        """`forward` of pixels (B, C) by their column, which it overwrites."""
        reduce, masked, expand = (layer.begin(batch, cache) for layer in (self.reduce, self.masked, self.expand))

        def step(x: Tensor, column: int) -> Tensor:
            torch.clamp_min(torch.addmm(reduce.bias, x.relu(), reduce.lower), 0, out=masked.slots[column])
            y = masked.product(column).relu_()
            return x.add_(expand.bias).addmm_(y, expand.lower)

        return step


class PixelCNN(Autoregressive):
    """Residual blocks of masked 3 x 3 convolutions after one of 7 x 7 that sees the pixels before its own.

    channels: those of the residual stream, 2 h in the paper; head_channels: of the two last 1 x 1 convolutions. For RGB
    both must be multiples of 3, `channels` of 6: the masks divide them among red, green and blue. levels: 2 for binary
    images, 256 for 8 bits.
    Source: van den Oord et al. 2016 (arXiv:1601.06759), sections 3.2 to 3.4. Its MNIST network: channels=32, layers=7.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), levels: int = 2, *, channels: int = 32, layers: int = 15,
        kernel_size: int = 3, head_channels: int = 32, classes: int | None = None,
    ):  # fmt: skip
        likelihood = Categorical(image_shape[0], levels)
        super().__init__(image_shape, likelihood, classes)
        if channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        groups = likelihood.channels
        self.first = CausalConv2d(groups, channels, square(7), "A", groups=groups)
        self.condition = ClassBias(classes, channels)
        self.blocks = nn.ModuleList(ResidualBlock(channels, kernel_size, groups) for _ in range(layers))
        self.head = Head(channels, head_channels, likelihood)

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        y = self.first(x, cache) + self.condition(cond)
        for block in self.blocks:
            y = block(y, cache)
        return self.head(y, cache)

    def begin_row(self, batch: int, rows: Sequence[Any], cond: Int[Tensor, " B"] | None, cache: Cache) -> Pixels:
        first = self.first.begin(batch, cache, self.condition.row(cond))
        blocks = [block.pixels(batch, cache) for block in self.blocks]  # type: ignore[operator]
        head = self.head.pixels(batch, cache)

        def step(x: Tensor, column: int) -> Tensor:
            first.slots[column].copy_(x)
            y = first.product(column)
            for block in blocks:
                y = block(y, column)
            return head(y)

        return Pixels(step, lambda x, column: first.slots[column].copy_(x))


class VerticalLayer(nn.Module):
    """A gate over the rows above: (new map, what the horizontal gate of this layer is given).

    The stack reads the image a row below, so that a map's own row is of the rows above; `first` reads the image itself.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int, classes: int | None, *, first: bool, last: bool):
        super().__init__()
        half = square(kernel_size).left
        self.gates = CausalConv2d(inputs, 2 * channels, Reach(half - first, half, half), None)
        self.link = CausalConv2d(2 * channels, 2 * channels, mask=None)
        self.condition = ClassBias(None if last else classes, 2 * channels)  # the last one's map goes nowhere

    def forward(
        self, x: Float[Tensor, "B C N W"], cond: Int[Tensor, " B"] | None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        gates = self.gates(x, cache)
        return gated_tanh(gates + self.condition(cond)), self.link(gates, cache)


class HorizontalLayer(nn.Module):
    """A gate over the pixels to the left and the link from above: (new map, skip to the head).

    `first` reads the image itself: it sees the pixels before its own, and has no residual. Nor has the `last` one, from
    which only the skip goes on.
    """

    def __init__(
        self, inputs: int, channels: int, kernel_size: int, groups: int, classes: int | None, *, first: bool,
        last: bool,
    ):  # fmt: skip
        super().__init__()
        reach = Reach(0, square(kernel_size).left, 0)
        self.gates = CausalConv2d(inputs, 2 * channels, reach, "A" if first else "B", groups=groups, gates=2)
        self.residual = None if first or last else CausalConv2d(channels, channels, groups=groups)
        self.skip = CausalConv2d(channels, channels, groups=groups)
        self.condition = ClassBias(classes, 2 * channels)

    def forward(
        self, x: Float[Tensor, "B C N W"], link: Float[Tensor, "B G N W"], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = gated_tanh(self.gates(x, cache) + link + self.condition(cond))
        return out if self.residual is None else x + self.residual(out, cache), self.skip(out, cache)

    def pixels(
        self, link: Float[Tensor, "B G W"], cond: Int[Tensor, " B"] | None, cache: Cache, out: Float[Tensor, "B C"]
    ) -> Callable[[Tensor, int], Tensor]:
        """The new map of pixels (B, C) by their column, which it overwrites; what the skip is of goes to `out`."""
        bias = self.condition.row(cond)
        gates = self.gates.begin(len(link), cache, link if bias is None else link + bias)
        signal, gate = gates.output.chunk(2, 1)
        residual = None if self.residual is None else self.residual.begin(len(link), cache)

        def step(x: Tensor, column: int) -> Tensor:
            gates.slots[column].copy_(x)
            gates.product(column, gates.output)
            torch.mul(signal.tanh_(), gate.sigmoid_(), out=out)
            return out.clone() if residual is None else x.add_(residual.bias).addmm_(out, residual.lower)

        return step


class _Skips(NamedTuple):
    """The sum of the skips of all layers as one product."""

    inputs: Tensor  # (B, layers * C), the maps of a pixel, layer after layer
    weight: Tensor
    bias: Tensor


class GatedPixelCNN(Autoregressive):
    """A vertical stack that sees all rows above, without the blind spot of PixelCNN, and a horizontal one.

    channels: p of the paper, a multiple of the image's channels; the sum of all layers' skips goes to the head. For
    `classes`, each gate has biases of the class (V h of the paper). embedding: levels are read as learned vectors of so
    many numbers, not as numbers, which suits codes that have no order; for images of one channel.
    Source: van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders (arXiv:1606.05328). Differs:
    the vertical stack is shifted down by a row at its input, not at each link; skips are summed for the output.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), levels: int = 2, *, channels: int = 32, layers: int = 10,
        kernel_size: int = 3, head_channels: int = 32, classes: int | None = None, embedding: int | None = None,
    ):  # fmt: skip
        likelihood = Categorical(image_shape[0], levels)
        super().__init__(image_shape, likelihood, classes)
        self.channels, groups = channels, likelihood.channels
        if embedding is not None and (embedding < 1 or groups > 1):
            raise ValueError(
                f"embedding must be at least 1, of images of one channel, got {embedding} and {groups} channels"
            )
        self.embedding = None if embedding is None else nn.Embedding(levels, embedding)
        sizes = [(embedding or groups, 7), *[(channels, kernel_size)] * layers]
        ends = [{"first": i == 0, "last": i == layers} for i in range(layers + 1)]
        self.vertical_layers = nn.ModuleList(
            VerticalLayer(inputs, channels, size, classes, **end) for (inputs, size), end in zip(sizes, ends)
        )
        self.horizontal_layers = nn.ModuleList(
            HorizontalLayer(inputs, channels, size, groups, classes, **end) for (inputs, size), end in zip(sizes, ends)
        )
        self.head = Head(channels, head_channels, likelihood)

    def vertical(
        self, above: Float[Tensor, "B C N W"], cond: Int[Tensor, " B"] | None, cache: Cache | None = None
    ) -> list[Tensor]:
        """What each layer's horizontal gate is given."""
        links, x = [], self._read(above, first=cache is None or cache.row == 0)
        for layer in self.vertical_layers:
            x, link = layer(x, cond, cache)
            links.append(link)
        return links

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        total: Any = 0
        x = self._read(x)
        for layer, link in zip(self.horizontal_layers, rows):
            x, skip = layer(x, here(link, cache), cond, cache)
            total = total + skip
        return self.head(total, cache)

    def begin_row(self, batch: int, rows: Sequence[Any], cond: Int[Tensor, " B"] | None, cache: Cache) -> Pixels:
        skips = cache.state(self, lambda: self._skips(batch, cache))
        first: Callable[..., Any] = self.horizontal_layers[0].gates.begin  # type: ignore[union-attr, assignment]
        layers = [
            layer.pixels(link[:, :, 0], cond, cache, out)  # type: ignore[operator]
            for layer, link, out in zip(self.horizontal_layers, rows, skips.inputs.split(self.channels, 1))
        ]
        slots, head = first(batch, cache).slots, self.head.pixels(batch, cache)

        def step(x: Tensor, column: int) -> Tensor:
            x = self._read(x)
            for layer in layers:
                x = layer(x, column)
            return head(torch.addmm(skips.bias, skips.inputs, skips.weight))

        return Pixels(step, lambda x, column: slots[column].copy_(self._read(x)))

    def _read(self, x: Float[Tensor, "B C *S"], *, first: bool = False) -> Float[Tensor, "B E *S"]:
        """The image as the first layers take it; of rows whose `first` is above the image that one is zeros."""
        if self.embedding is None:
            return x
        levels = self.embedding.num_embeddings
        maps = self.embedding(((x[:, 0] + 1) / 2 * (levels - 1)).round().long()).movedim(-1, 1)
        return torch.cat([torch.zeros_like(maps[:, :, :1]), maps[:, :, 1:]], 2) if first else maps

    def _skips(self, batch: int, cache: Cache) -> "_Skips":
        taps = [layer.skip.begin(batch, cache) for layer in self.horizontal_layers]  # type: ignore[union-attr, operator]
        weight, bias = torch.cat([each.lower for each in taps]), torch.stack([each.bias for each in taps]).sum(0)
        return _Skips(weight.new_zeros(batch, len(weight)), weight, bias)
