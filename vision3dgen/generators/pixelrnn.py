"""PixelRNN: Row LSTM and Diagonal BiLSTM, recurrent over the rows or the diagonals of an image."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.autoregressive import Autoregressive, ClassBias
from vision3dgen.generators.likelihoods import Categorical
from vision3dgen.generators.masked import POINT, Cache, CausalConv2d, Pixels, Reach, square
from vision3dgen.generators.pixelcnn import Head


def lstm_cell(gates: Tensor, cell: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The new hidden and cell state: gates are input, forget and output, through a sigmoid, and the candidate's tanh.

    gates have four times as many channels on axis `dim` as the cell.
    """
    i, f, o, g = gates.chunk(4, dim)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def lstm_step(gates: Float[Tensor, "B G"]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`lstm_cell` of gates that are at one place of memory, which it overwrites: (cell, new cell, new hidden state).

    The new states are written to where the last two are; the hidden one is returned.
    """
    hidden = gates.shape[1] // 4
    sigmoids, candidate = gates.split([3 * hidden, hidden], 1)
    i, f, o = sigmoids.chunk(3, 1)
    bounded = torch.empty_like(candidate)

    def step(cell: Tensor, new_cell: Tensor, new_hidden: Tensor) -> Tensor:
        sigmoids.sigmoid_()
        torch.mul(f, cell, out=new_cell).addcmul_(i, candidate.tanh_())
        return torch.mul(o, torch.tanh(new_cell, out=bounded), out=new_hidden)

    return step


@dataclass
class _RowStates:
    """Of a Row LSTM: the last whole row, and as much as there is of the row at hand."""

    hidden: Tensor  # (B, H, W)
    cell: Tensor
    new_hidden: Tensor  # (W, B, H)
    new_cell: Tensor
    row: int | None = None

    def finish(self) -> None:
        if self.row is not None:
            self.hidden.copy_(self.new_hidden.permute(1, 2, 0))
            self.cell.copy_(self.new_cell.permute(1, 2, 0))
        self.row = None


class RowLSTM(nn.Module):
    """A layer of LSTMs that goes down the image, a whole row at a time: maps (B, inputs, H, W) -> (B, hidden, H, W).

    Input to state: a masked convolution along the row. State to state: one over the row above, without a mask.
    kernel_size: of both. Its field over the rows above is a triangle: it misses a part of the corners.
    Source: van den Oord et al. 2016 (arXiv:1601.06759), section 3.1 and equation 3.
    """

    def __init__(self, inputs: int, hidden: int, kernel_size: int = 3, groups: int = 1):
        super().__init__()
        half = square(kernel_size).left
        self.hidden, self.side = hidden, half
        self.input_to_state = CausalConv2d(inputs, 4 * hidden, Reach(0, half, 0), groups=groups, gates=4)
        self.state_to_state = nn.Conv1d(hidden, 4 * hidden, kernel_size, padding=half, bias=False)
        self.hidden_start = nn.Parameter(torch.zeros(hidden))
        self.cell_start = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Float[Tensor, "B I N W"], cache: Cache | None = None) -> Float[Tensor, "B H N W"]:
        gates = self.input_to_state(x, cache)
        state = self._start(len(x), x.shape[3]) if cache is None else self._state(len(x), cache)
        state.finish()
        hidden, cell, out = state.hidden, state.cell, []
        for row in range(x.shape[2]):
            hidden, cell = lstm_cell(gates[:, :, row] + self.state_to_state(hidden), cell)
            out.append(hidden)
        if cache is not None:
            state.hidden.copy_(hidden)
            state.cell.copy_(cell)
        return torch.stack(out, 2)

    def pixels(self, batch: int, cache: Cache) -> Callable[[Tensor, int], Tensor]:
        """`forward` of pixels (B, inputs) by their column; what the row above sends is computed here, for all."""
        state = self._state(batch, cache)
        if state.row != cache.row:
            state.finish()
            state.row = cache.row
        taps = self.input_to_state.begin(batch, cache, self.state_to_state(state.hidden))
        cells, new_cells, hidden = state.cell.permute(2, 0, 1).contiguous(), state.new_cell, state.new_hidden
        lstm, places = lstm_step(taps.output), list(zip(cells.unbind(), new_cells.unbind(), hidden.unbind()))

        def step(x: Tensor, column: int) -> Tensor:
            taps.slots[column].copy_(x)
            taps.product(column, taps.output)
            return lstm(*places[column])

        return step

    def _state(self, batch: int, cache: Cache) -> _RowStates:
        return cache.state(self, lambda: self._start(batch, cache.width))

    def _start(self, batch: int, width: int) -> _RowStates:
        hidden, cell = (
            start[:, None].expand(batch, -1, width).clone() for start in (self.hidden_start, self.cell_start)
        )
        return _RowStates(
            hidden, cell, hidden.new_zeros(width, batch, self.hidden), cell.new_zeros(width, batch, self.hidden)
        )


@dataclass
class _Diagonal:
    """Of one direction of a Diagonal BiLSTM: the row above and as much as there is of the row at hand."""

    above: Tensor  # (B, H, W), hidden states of the row above
    hidden: Tensor  # (1 + W, B, H), of the row at hand after a start of zeros
    cell: Tensor


class DiagonalLSTM(nn.Module):
    """One direction: at (i, j) an LSTM that was at (i, j - 1), whose gates also see the hidden state of (i - 1, j).

    The states of all pixels on a diagonal are computed at once. Outside of the image they are zero.
    """

    def __init__(self, inputs: int, hidden: int, groups: int = 1):
        super().__init__()
        self.hidden = hidden
        self.input_to_state = CausalConv2d(inputs, 4 * hidden, POINT, groups=groups, gates=4)
        # Without a mask: both states belong to other pixels, of which every channel is known.
        self.state_to_state = nn.Linear(2 * hidden, 4 * hidden, bias=False)

    def scan(self, gates: Float[Tensor, "B G N W"], above: Float[Tensor, "B H W"]) -> Float[Tensor, "B H N W"]:
        """Hidden states of N rows, whose gates hold what comes from the input; `above`: of the row above them."""
        batch, _, height, width = gates.shape
        skewed = skew(gates).permute(3, 0, 2, 1).contiguous()  # (N + W - 1, B, N, 4 H): a diagonal is an entry
        upper_edge = F.pad(above.permute(2, 0, 1), (0, 0, 0, 0, 0, height - 1))[:, :, None]  # (N + W - 1, B, 1, H)
        steps, rows = torch.arange(len(skewed), device=gates.device), torch.arange(height, device=gates.device)
        place = steps[:, None] - rows  # the column of each row that a diagonal meets
        inside = ((place >= 0) & (place < width)).to(gates.dtype)[:, None, :, None]
        hidden = cell = gates.new_zeros(batch, height, self.hidden)
        out = []
        for step in range(len(skewed)):
            upper = torch.cat([upper_edge[step], hidden[:, :-1]], 1)
            recurrent = self.state_to_state(torch.cat([hidden, upper], 2))
            hidden, cell = lstm_cell(skewed[step] + recurrent, cell, 2)
            hidden, cell = hidden * inside[step], cell * inside[step]
            out.append(hidden)
        return unskew(torch.stack(out, 3).transpose(1, 2), width)

    def row(
        self, batch: int, state: _Diagonal, cache: Cache
    ) -> Callable[[Float[Tensor, "B I"], int], Float[Tensor, "B H"]]:
        """The hidden state at one place after another of the row at hand, from its input and column."""
        inputs = self.input_to_state.begin(batch, cache)
        before, upper = self.state_to_state.weight.T.split(self.hidden)  # (H, 4 H) each
        before = before.contiguous()
        sums = torch.addmm(inputs.bias, state.above.permute(2, 0, 1).flatten(0, 1), upper).unflatten(0, (-1, batch))
        lstm = lstm_step(inputs.output)
        hidden, cell, sums_of = state.hidden.unbind(), state.cell.unbind(), sums.unbind()

        def step(x: Tensor, column: int) -> Tensor:
            torch.addmm(sums_of[column], x, inputs.lower, out=inputs.output).addmm_(hidden[column], before)
            return lstm(cell[column], cell[column + 1], hidden[column + 1])

        return step


def skew(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H V"]:
    """Row i moved i columns to the right, zeros around: (B, C, H, W + H - 1), whose columns are diagonals of x.

    Source: van den Oord et al. 2016 (arXiv:1601.06759), figure 3.
    """
    height, width = x.shape[2:]
    padded = F.pad(x, (0, height))  # rows of W + H, read with a step of W + H - 1
    return padded.flatten(2)[:, :, : height * (width + height - 1)].unflatten(2, (height, width + height - 1))


def unskew(x: Float[Tensor, "B C H V"], width: int) -> Float[Tensor, "B C H W"]:
    """What `skew` moved, moved back."""
    height = x.shape[2]
    flat = F.pad(x.flatten(2), (0, height))
    return flat.unflatten(2, (height, width + height))[..., :width]


@dataclass
class _BothStates:
    forward: _Diagonal
    backward: _Diagonal  # of the right-to-left direction, at the last whole row, its columns from the right
    shifted: Tensor  # (B, H, W), what that direction adds to the row at hand: its states at the row above
    inputs: Tensor  # (W, B, I), of the row at hand
    row: int | None = None


class DiagonalBiLSTM(nn.Module):
    """Two LSTMs along the diagonals, from the left and from the right: maps (B, inputs, H, W) -> (B, hidden, H, W).

    The second is added a row below, so that it brings what is to the right in the rows above and nothing else: together
    they see all pixels before. Source: van den Oord et al. 2016 (arXiv:1601.06759), section 3.2. Differs: states
    outside of the image are zero, where the skewed maps of published codes compute on padding.
    """

    def __init__(self, inputs: int, hidden: int, groups: int = 1):
        super().__init__()
        self.left_to_right = DiagonalLSTM(inputs, hidden, groups)
        self.right_to_left = DiagonalLSTM(inputs, hidden, groups)

    def forward(self, x: Float[Tensor, "B I N W"], cache: Cache | None = None) -> Float[Tensor, "B H N W"]:
        forward, backward = self.left_to_right, self.right_to_left
        state = self._start(len(x), x.shape[3]) if cache is None else self._state(len(x), cache)
        if cache is not None and state.row is not None:
            self._finish(state, cache)
        first = forward.scan(forward.input_to_state(x), state.forward.above)
        second = backward.scan(backward.input_to_state(x.flip(3)), state.backward.above)
        shifted = torch.cat([state.shifted[:, :, None], second.flip(3)[:, :, :-1]], 2)
        if cache is not None:
            state.forward.above.copy_(first[:, :, -1])
            state.backward.above.copy_(second[:, :, -1])
            state.shifted.copy_(second[:, :, -1].flip(2))
        return first + shifted

    def pixels(self, batch: int, cache: Cache) -> Callable[[Tensor, int], Tensor]:
        """`forward` of pixels (B, inputs) by their column; the other direction is run over the last row here."""
        state = self._state(batch, cache)
        if state.row != cache.row:
            if state.row is not None:
                self._finish(state, cache)
            state.row = cache.row
        left_to_right = self.left_to_right.row(batch, state.forward, cache)
        inputs, shifted = state.inputs.unbind(), state.shifted.permute(2, 0, 1).contiguous().unbind()

        def step(x: Tensor, column: int) -> Tensor:
            inputs[column].copy_(x)
            return left_to_right(x, column) + shifted[column]

        return step

    def _state(self, batch: int, cache: Cache) -> _BothStates:
        return cache.state(self, lambda: self._start(batch, cache.width))

    def _start(self, batch: int, width: int) -> _BothStates:
        like, hidden = self.left_to_right.state_to_state.weight, self.left_to_right.hidden
        rows = [like.new_zeros(batch, hidden, width) for _ in range(3)]
        states = [like.new_zeros(1 + width, batch, hidden) for _ in range(4)]
        inputs = like.new_zeros(width, batch, self.left_to_right.input_to_state.weight.shape[1])
        return _BothStates(_Diagonal(rows[0], *states[:2]), _Diagonal(rows[1], *states[2:]), rows[2], inputs)

    def _finish(self, state: _BothStates, cache: Cache) -> None:
        """The row at hand is complete: run over it from the right."""
        state.forward.above.copy_(state.forward.hidden[1:].permute(1, 2, 0))
        step = self.right_to_left.row(state.inputs.shape[1], state.backward, cache)
        for column, x in enumerate(reversed(state.inputs.unbind())):
            step(x, column)
        state.backward.above.copy_(state.backward.hidden[1:].permute(1, 2, 0))
        state.shifted.copy_(state.backward.above.flip(2))
        state.row = None


class PixelRNN(Autoregressive, ABC):
    """A 7 x 7 masked convolution, recurrent layers of `hidden` units as residuals of twice as many, and a head.

    For RGB `hidden` and `head_channels` must be multiples of 3. levels: 2 for binary images, 256 for 8 bits.
    Source: van den Oord et al. 2016 (arXiv:1601.06759), section 3 and table 1.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], levels: int, hidden: int, layers: Sequence[nn.Module],
        head_channels: int, classes: int | None,
    ):  # fmt: skip
        likelihood = Categorical(image_shape[0], levels)
        super().__init__(image_shape, likelihood, classes)
        groups = likelihood.channels
        self.first = CausalConv2d(groups, 2 * hidden, square(7), "A", groups=groups)
        self.condition = ClassBias(classes, 2 * hidden)
        self.layers = nn.ModuleList(layers)
        self.expand = nn.ModuleList(CausalConv2d(hidden, 2 * hidden, groups=groups) for _ in layers)
        self.head = Head(2 * hidden, head_channels, likelihood)

    def horizontal(
        self, x: Float[Tensor, "B C N W"], rows: Sequence[Any], cond: Int[Tensor, " B"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B P N W"]:  # fmt: skip
        y = self.first(x, cache) + self.condition(cond)
        for layer, expand in zip(self.layers, self.expand):
            y = y + expand(layer(y, cache), cache)
        return self.head(y, cache)

    def begin_row(self, batch: int, rows: Sequence[Any], cond: Int[Tensor, " B"] | None, cache: Cache) -> Pixels:
        first = self.first.begin(batch, cache, self.condition.row(cond))
        layers = [
            (layer.pixels(batch, cache), expand.begin(batch, cache))  # type: ignore[operator]
            for layer, expand in zip(self.layers, self.expand)
        ]
        head = self.head.pixels(batch, cache)

        def step(x: Tensor, column: int) -> Tensor:
            first.slots[column].copy_(x)
            y = first.product(column)
            for layer, expand in layers:
                y.addmm_(layer(y, column), expand.lower).add_(expand.bias)
            return head(y)

        return Pixels(step, lambda x, column: first.slots[column].copy_(x))


class RowLSTMPixelRNN(PixelRNN):
    """`PixelRNN` of `RowLSTM` layers with kernels of `kernel_size`."""

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), levels: int = 2, *, hidden: int = 16, layers: int = 7,
        kernel_size: int = 3, head_channels: int = 32, classes: int | None = None,
    ):  # fmt: skip
        stack = [RowLSTM(2 * hidden, hidden, kernel_size, image_shape[0]) for _ in range(layers)]
        super().__init__(image_shape, levels, hidden, stack, head_channels, classes)


class DiagonalBiLSTMPixelRNN(PixelRNN):
    """`PixelRNN` of `DiagonalBiLSTM` layers. Its MNIST network in the paper: hidden=16, layers=7."""

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), levels: int = 2, *, hidden: int = 16, layers: int = 7,
        head_channels: int = 32, classes: int | None = None,
    ):  # fmt: skip
        stack = [DiagonalBiLSTM(2 * hidden, hidden, image_shape[0]) for _ in range(layers)]
        super().__init__(image_shape, levels, hidden, stack, head_channels, classes)
