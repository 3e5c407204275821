"""PixelRNN: Row LSTM and Diagonal BiLSTM, recurrent over the rows or the diagonals of an image."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.generators.autoregressive import Autoregressive, ClassBias
from vision3dgen.generators.likelihoods import Categorical
from vision3dgen.generators.masked import POINT, Cache, CausalConv2d, Reach, here, square
from vision3dgen.generators.pixelcnn import Head


def lstm_cell(gates: Tensor, cell: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The new hidden and cell state: gates are input, forget and output, through a sigmoid, and the candidate's tanh.

    gates have four times as many channels on axis `dim` as the cell.
    """
    i, f, o, g = gates.chunk(4, dim)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


@dataclass
class _RowStates:
    """Of a Row LSTM: the last whole row, what it sends to the row at hand, and as much as there is of that row."""

    hidden: Tensor  # (B, H, W)
    cell: Tensor
    sent: Tensor  # (B, 4 H, W)
    new_hidden: Tensor
    new_cell: Tensor
    row: int | None = None

    def finish(self) -> None:
        if self.row is not None:
            self.hidden.copy_(self.new_hidden)
            self.cell.copy_(self.new_cell)
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
        state = None if cache is None else cache.state(self, lambda: self._start(gates, cache.width))
        if state is not None and cache is not None and cache.column is not None:
            return self._pixel(gates, state, cache.row, cache.column)
        if state is None:
            state = self._start(gates, x.shape[3])
        state.finish()
        hidden, cell, out = state.hidden, state.cell, []
        for row in range(x.shape[2]):
            hidden, cell = lstm_cell(gates[:, :, row] + self.state_to_state(hidden), cell)
            out.append(hidden)
        if cache is not None:
            state.hidden.copy_(hidden)
            state.cell.copy_(cell)
        return torch.stack(out, 2)

    def _start(self, gates: Tensor, width: int) -> _RowStates:
        hidden, cell = (
            start[:, None].expand(len(gates), -1, width).clone() for start in (self.hidden_start, self.cell_start)
        )
        sent = gates.new_zeros(len(gates), 4 * self.hidden, width)
        return _RowStates(hidden, cell, sent, torch.zeros_like(hidden), torch.zeros_like(cell))

    def _pixel(self, gates: Tensor, state: _RowStates, row: int, column: int) -> Tensor:
        if state.row != row:
            state.finish()
            state.row = row
            state.sent.copy_(self.state_to_state(state.hidden))
        hidden, cell = lstm_cell(gates[:, :, 0, 0] + state.sent[:, :, column], state.cell[:, :, column])
        state.new_hidden[:, :, column], state.new_cell[:, :, column] = hidden, cell
        return hidden[:, :, None, None]


@dataclass
class _Diagonal:
    """Of one direction of a Diagonal BiLSTM: the row above and as much as there is of the row at hand."""

    above: Tensor  # (B, H, W), hidden states of the row above
    hidden: Tensor  # (B, H, 1 + W), of the row at hand after a start of zeros
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

    def step(self, gates: Float[Tensor, "B G"], state: _Diagonal, column: int) -> Float[Tensor, "B H"]:
        """The hidden state at one place of the row at hand."""
        before = torch.cat([state.hidden[:, :, column], state.above[:, :, column]], 1)
        hidden, cell = lstm_cell(gates + self.state_to_state(before), state.cell[:, :, column])
        state.hidden[:, :, column + 1], state.cell[:, :, column + 1] = hidden, cell
        return hidden


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
    backward_above: Tensor  # (B, H, W), hidden states of the right-to-left direction at the last whole row
    shifted: Tensor  # (B, H, W), what that direction adds to the row at hand: its states at the row above
    inputs: Tensor  # (B, I, W), of the row at hand
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
        if cache is not None and cache.column is not None:
            return self._pixel(x, cache.state(self, lambda: self._start(x, cache.width)), cache)
        state = self._start(x, x.shape[3]) if cache is None else cache.state(self, lambda: self._start(x, cache.width))
        if state.row is not None:
            self._finish(state)
        first = forward.scan(forward.input_to_state(x), state.forward.above)
        second = backward.scan(backward.input_to_state(x.flip(3)), state.backward_above.flip(2)).flip(3)
        shifted = torch.cat([state.shifted[:, :, None], second[:, :, :-1]], 2)
        if cache is not None:
            state.forward.above.copy_(first[:, :, -1])
            state.backward_above.copy_(second[:, :, -1])
            state.shifted.copy_(second[:, :, -1])
        return first + shifted

    def _start(self, x: Tensor, width: int) -> _BothStates:
        hidden = self.left_to_right.hidden
        zeros = [x.new_zeros(len(x), hidden, width + extra) for extra in (0, 1, 1, 0, 0)]
        inputs = x.new_zeros(len(x), x.shape[1], width)
        return _BothStates(_Diagonal(*zeros[:3]), zeros[3], zeros[4], inputs)

    def _finish(self, state: _BothStates) -> None:
        """The row at hand is complete: run over it from the right."""
        state.forward.above.copy_(state.forward.hidden[:, :, 1:])
        gates = self.right_to_left.input_to_state(state.inputs[:, :, None].flip(3))
        second = self.right_to_left.scan(gates, state.backward_above.flip(2)).flip(3)[:, :, 0]
        state.backward_above.copy_(second)
        state.shifted.copy_(second)
        state.row = None

    def _pixel(self, x: Tensor, state: _BothStates, cache: Cache) -> Tensor:
        assert cache.column is not None
        if state.row != cache.row:
            if state.row is not None:
                self._finish(state)
            state.row = cache.row
        state.inputs[:, :, cache.column] = x[:, :, 0, 0]
        gates = self.left_to_right.input_to_state(x, cache)[:, :, 0, 0]
        hidden = self.left_to_right.step(gates, state.forward, cache.column)
        return hidden[:, :, None, None] + here(state.shifted[:, :, None], cache)


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
