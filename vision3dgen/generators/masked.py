"""Convolutions that see only what was there before, over whole images, over rows, or pixel by pixel from a cache.

The order is the raster's: rows from the top, in a row from the left, in a pixel by channel. Every layer here computes
the same three ways, so that a network is written once: on a whole image; on the next rows of an image (with a `Cache`);
and on the next pixel (with a `Cache` that has a column), where x is (B, C, 1, 1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice

State = TypeVar("State")


@dataclass(frozen=True)
class Cache:
    """What the layers remember of images `width` pixels wide, and what comes next: rows from `row` on, or a pixel.

    `states` is shared by all views of a cache; layers change what is in it in place.
    """

    width: int
    row: int = 0
    column: int | None = None
    states: dict[nn.Module, Any] = field(default_factory=dict)

    def at(self, row: int, column: int | None = None) -> "Cache":
        return Cache(self.width, row, column, self.states)

    def coarser(self) -> "Cache":
        """The same place in maps of half the size, rounded up."""
        return Cache(-(-self.width // 2), self.row // 2, None if self.column is None else self.column // 2, self.states)

    def state(self, layer: nn.Module, make: Callable[[], State]) -> State:
        """What a layer has kept, made when it is first asked for."""
        if layer not in self.states:
            self.states[layer] = make()
        return self.states[layer]


def here(rows: Float[Tensor, "B C N W"], cache: Cache | None) -> Float[Tensor, "B C M V"]:
    """The part of the map of a row that belongs to the pixel at hand; all of it where there is no pixel."""
    return rows if cache is None or cache.column is None else rows[..., cache.column : cache.column + 1]


class Reach(NamedTuple):
    """How far a kernel sees: rows above its own, and columns to both sides."""

    above: int
    left: int
    right: int


def square(kernel_size: int) -> Reach:
    """The upper half of a kernel_size x kernel_size kernel, an odd number."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    half = kernel_size // 2
    return Reach(half, half, half)


POINT = Reach(0, 0, 0)  # a 1 x 1 kernel


def center_mask(kind: str, inputs: int, outputs: int, groups: int = 1, gates: int = 1) -> Float[Tensor, "O I"]:
    """Which input channels of its own pixel an output channel may see: 1 or 0.

    Channels are divided into `groups` equal runs, one per channel of the image in their order. "A": groups before its
    own; "B": its own too. `gates`: the outputs are so many blocks, each divided into the groups.
    Source: van den Oord et al. 2016, Pixel Recurrent Neural Networks (arXiv:1601.06759), section 3.4.
    """
    check_choice("mask", kind, ("A", "B"))
    if inputs % groups or outputs % (groups * gates):
        raise ValueError(
            f"channels must be multiples of the image's {groups} channels (outputs of {gates} times that), got "
            f"{inputs} to {outputs}"
        )
    source = torch.arange(inputs) * groups // inputs
    target = torch.arange(outputs // gates) * groups * gates // outputs
    seen = source < target[:, None] if kind == "A" else source <= target[:, None]
    return seen.float().repeat(gates, 1)


class Pixels(NamedTuple):
    """How the pixels of a row are made, from the left: `step` may be asked again for the same pixel."""

    step: Callable[
        [Tensor, int], Tensor
    ]  # what is known of a pixel (B, C), its column -> the likelihood's outputs (B, P)
    observe: Callable[[Tensor, int], object]  # its values (B, C) once they are decided, its column


@dataclass
class Taps:
    """The last rows of a layer's input, and as much as there is of the next one, laid out for one product a pixel.

    `slots`, `windows` and `sums` are views, one for each place of the row, so that a pixel costs no indexing.
    """

    history: Tensor  # (B, I, above, W)
    current: Tensor  # (B, (left + W) * I), place after place, zeros before the first column
    above: Tensor  # (W / stride, B, O), what `history` contributes to the row at hand, and the bias
    upper: Tensor  # weights of the rows above
    lower: Tensor  # ((left + 1) * I, O), weights of its own row
    bias: Tensor  # (O,)
    output: Tensor  # (B, O), for a layer whose outputs are used up before the next pixel
    slots: Sequence[Tensor]  # (B, I) of `current`: where the input of a place goes
    windows: Sequence[Tensor]  # (B, (left + 1) * I) of `current`: what the kernel sees at a place
    sums: Sequence[Tensor]  # (B, O) of `above`
    row: int | None = None  # the row at hand, None if `history` ends just above it

    def product(self, column: int, out: Tensor | None = None) -> Float[Tensor, "B O"]:
        """The layer's output at a place of a row, where strides are 1."""
        return torch.addmm(self.sums[column], self.windows[column], self.lower, out=out)


class CausalConv2d(nn.Module):
    """A convolution over the rows above and the left part of its own: maps (B, inputs, H, W) -> (B, outputs, H, W).

    mask: what it sees of its own pixel, as in `center_mask`, and nothing right of it; None sees all of `reach`, its own
    row too, for maps that were shifted down by a row before. stride: of rows and columns, the first at 0; sizes are
    rounded up. Zeros are outside of the image. Weights start uniform, as torch's, by the number of inputs seen.
    With a cache, rows or pixels that fall between strides are taken in, and give None.
    Differs: the rows below the center, which a mask would always hide, are not stored.
    """

    def __init__(
        self, inputs: int, outputs: int, reach: Reach = POINT, mask: str | None = "B", *, groups: int = 1,
        gates: int = 1, stride: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.reach, self.mask_kind, self.stride = reach, mask, stride
        width = reach.left + 1 + reach.right
        visible = torch.ones(outputs, inputs, reach.above + 1, width)
        if mask is not None:
            visible[:, :, -1, reach.left + 1 :] = 0
            visible[:, :, -1, reach.left] = center_mask(mask, inputs, outputs, groups, gates)
        self.all_visible = bool(visible.all())
        self.visible: Tensor
        self.register_buffer("visible", visible, persistent=False)
        self.weight = nn.Parameter(torch.empty_like(visible))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = 1 / math.sqrt(max(float(visible[-1].sum()), 1.0))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def masked_weight(self) -> Tensor:
        return self.weight if self.all_visible else self.weight * self.visible

    def forward(self, x: Float[Tensor, "B I H W"], cache: Cache | None = None) -> Any:
        """(B, outputs, H / stride, W / stride), or None where a cache is between strides."""
        if cache is None:
            return self._convolve(F.pad(x, (0, 0, self.reach.above, 0)))
        state = cache.state(self, lambda: self._start(len(x), cache.width))
        if cache.column is not None:
            return self._pixel(x, state, cache)
        self._finish(state)
        rows = torch.cat([state.history, x], 2)
        if self.reach.above:
            state.history.copy_(rows[:, :, -self.reach.above :])
        if cache.row % self.stride:
            if x.shape[2] > 1:
                raise ValueError(f"rows must start at a multiple of the stride {self.stride}, got {cache.row}")
            return None
        return self._convolve(rows)

    def begin(self, batch: int, cache: Cache, added: Float[Tensor, "B O W"] | None = None) -> Taps:
        """What the pixels of the row at hand need, `batch` of them at once.

        `added` is added to the outputs of the row; (B, O, 1) is the same for all places.
        """
        state = cache.state(self, lambda: self._start(batch, cache.width))
        if state.row == cache.row:
            return state
        self._finish(state)
        state.row = cache.row
        if self.reach.above and cache.row % self.stride == 0:
            rows = F.pad(state.history, (self.reach.left, self.reach.right))
            above = F.conv2d(rows, state.upper, self.bias, self.stride)[:, :, 0]
            state.above.copy_((above if added is None else above + added).permute(2, 0, 1))
        elif added is not None:
            state.above.copy_(added.permute(2, 0, 1))
            state.above.add_(self.bias)
        return state

    def write(self, x: Float[Tensor, "B I 1 1"], cache: Cache) -> None:
        """Replace the input of the pixel at hand, which was not known when the layer was called."""
        assert cache.column is not None
        cache.states[self].slots[cache.column].copy_(x.flatten(1))

    def _convolve(self, rows: Tensor) -> Tensor:
        rows = F.pad(rows, (self.reach.left, self.reach.right)) if self.reach.left or self.reach.right else rows
        return F.conv2d(rows, self.masked_weight(), self.bias, self.stride)

    def _start(self, batch: int, width: int) -> Taps:
        weight, (above, left, _) = self.masked_weight(), self.reach
        outputs, inputs = weight.shape[:2]
        places = 0 if self._is_point else width  # the kernel of a point needs no memory
        current = weight.new_zeros(batch, (left + places) * inputs)
        sums = self.bias.expand(-(-places // self.stride), batch, -1).clone()
        return Taps(
            history=weight.new_zeros(batch, inputs, above, width),
            current=current,
            above=sums,
            upper=weight[:, :, :above].contiguous(),
            lower=weight[:, :, -1, : left + 1].permute(2, 1, 0).flatten(0, 1).contiguous(),
            bias=self.bias,
            output=weight.new_zeros(batch, outputs),
            slots=[current.narrow(1, (left + column) * inputs, inputs) for column in range(places)],
            windows=[current.narrow(1, column * inputs, (left + 1) * inputs) for column in range(places)],
            sums=[sums[place] for place in range(len(sums))],
        )

    @property
    def _is_point(self) -> bool:
        return self.reach == POINT and self.stride == 1

    def _finish(self, state: Taps) -> None:
        """Count the row at hand among those above."""
        if state.row is not None and self.reach.above:
            row = state.current.unflatten(1, (-1, state.history.shape[1]))[:, self.reach.left :]  # (B, W, I)
            state.history.copy_(torch.cat([state.history[:, :, 1:], row.transpose(1, 2)[:, :, None]], 2))
        state.row = None

    def _pixel(self, x: Tensor, state: Taps, cache: Cache) -> Tensor | None:
        batch, column = len(x), cache.column
        assert column is not None
        if self._is_point:
            return torch.addmm(state.bias, x.flatten(1), state.lower).view(batch, -1, 1, 1)
        if state.row != cache.row:
            self.begin(batch, cache)
        state.slots[column].copy_(x.view(batch, -1))
        if cache.row % self.stride or column % self.stride:
            return None
        if self.stride == 1:
            return state.product(column).view(batch, -1, 1, 1)
        sums = state.sums[column // self.stride]
        return torch.addmm(sums, state.windows[column], state.lower).view(batch, -1, 1, 1)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[:2]
        return f"{inputs}, {outputs}, {tuple(self.reach)}, mask={self.mask_kind}, stride={self.stride}"


class CausalUpsample2d(nn.Module):
    """Each place becomes 2 x 2, by a transposed convolution of kernel and stride 2; cut to the finer map's size.

    With a cache, x is None where the finer map's row or column has no place of its own in the coarser one.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, 2, 2))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = 1 / math.sqrt(inputs)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Float[Tensor, "B I h w"] | None, size: tuple[int, int], cache: Cache | None = None
    ) -> Float[Tensor, "B O H W"]:
        """`size` and `cache` are those of the finer map."""
        if x is not None:
            fine = F.conv_transpose2d(x, self.weight, self.bias, 2)  # (B, O, 2 h, 2 w)
            if cache is None:
                return fine[:, :, : size[0], : size[1]]
            if cache.column is None:
                last = fine[:, :, -2:]
                cache.state(self, lambda: torch.zeros_like(last)).copy_(last)
                return fine[:, :, : size[0], : size[1]]
            kept = cache.state(self, lambda: fine.new_zeros(*fine.shape[:2], 2, 2 * -(-cache.width // 2)))
            kept[..., cache.column : cache.column + 2] = fine
        assert cache is not None
        kept = cache.states[self]  # the two rows of the last row of places
        rows = kept[:, :, cache.row % 2 : cache.row % 2 + 1, : cache.width]
        return here(rows, cache)
