"""Recurrent cells and stacks written out, convolutional GRUs, and truncated backpropagation through time.

    RNN    h' = tanh(W x + b + U h + c)
    LSTM   i, f, o = sigmoid(...), g = tanh(...);  c' = f c + i g;  h' = o tanh(c')
    GRU    r, z = sigmoid(...);  n = tanh(W x + b + r (U h + c));  h' = (1 - z) n + z h

Sources: Elman 1990; Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; Cho et al. 2014. Parameter
names, shapes, order of gates and initialization are those of torch's modules, whose state dicts load; torch's are the
faster ones. Ours are for changing the equation, and take ragged sequences as `lengths`.
Letters: B batch, T time, C inputs, H hidden, L layers times directions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_shape


class LSTMState(NamedTuple):
    """What an LSTM carries from step to step."""

    hidden: Float[Tensor, "*B H"]
    cell: Float[Tensor, "*B H"]


class RecurrentOutput(NamedTuple):
    """What a recurrent layer makes of a batch of sequences."""

    output: Float[Tensor, "B T *S"]  # the hidden state after each step; zero beyond a sequence's length
    state: Any  # after the last step of each sequence: a tensor, or an LSTMState


Step = Callable[..., tuple[Tensor, ...]]  # (input gates, weight_hh, bias_hh, *state) -> state


def _rnn_step(gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> tuple[Tensor]:
    return ((gates + F.linear(hidden, weight, bias)).tanh(),)


def _lstm_step(
    gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> tuple[Tensor]:
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = F.linear(hidden, weight, bias).chunk(3, -1)
    z = (z + hz).sigmoid()
    return ((1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * hidden,)


class _Cell(nn.Module):
    """One step of a recurrence; the parameters of torch's cells."""

    gates: int

    def __init__(self, inputs: int, hidden: int, bias: bool = True):
        super().__init__()
        self.hidden = hidden
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * hidden)) if bias else None
        self.bias_hh = nn.Parameter(torch.empty(self.gates * hidden)) if bias else None
        _initialize(self, hidden)

    def _input_gates(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih, self.bias_ih)

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.hidden)


class RNNCell(_Cell):
    """x (B, C), state (B, H) or zeros -> state (B, H)."""

    gates = 1

    def forward(self, x: Float[Tensor, "B C"], state: Float[Tensor, "B H"] | None = None) -> Float[Tensor, "B H"]:
        state = self._zeros(x) if state is None else state
        return _rnn_step(self._input_gates(x), self.weight_hh, self.bias_hh, state)[0]


class LSTMCell(_Cell):
    """x (B, C), state of two (B, H) or zeros -> the new state, of which `hidden` is the output."""

    gates = 4

    def forward(self, x: Float[Tensor, "B C"], state: LSTMState | tuple[Tensor, Tensor] | None = None) -> LSTMState:
        hidden, cell = (self._zeros(x), self._zeros(x)) if state is None else state
        return LSTMState(*_lstm_step(self._input_gates(x), self.weight_hh, self.bias_hh, hidden, cell))


class GRUCell(_Cell):
    """x (B, C), state (B, H) or zeros -> state (B, H)."""

    gates = 3

    def forward(self, x: Float[Tensor, "B C"], state: Float[Tensor, "B H"] | None = None) -> Float[Tensor, "B H"]:
        state = self._zeros(x) if state is None else state
        return _gru_step(self._input_gates(x), self.weight_hh, self.bias_hh, state)[0]


class Recurrent(nn.Module, ABC):
    """Layers of a recurrence over x (B, T, C); what `RNN`, `LSTM` and `GRU` share.

    forward(x, state=None, lengths=None) -> `RecurrentOutput` of output (B, T, H or 2H) and state, each of its tensors
    (L, B, H) in torch's order (layer 0 forward, layer 0 backward, layer 1 ...). lengths (B,), each from 0 to T: steps
    beyond a sequence's length change no state and output zeros; the backward direction begins at the last true step.
    `dropout` acts on the output of every layer but the last.
    """

    gates: int
    step: Step

    def __init__(
        self, inputs: int, hidden: int, layers: int = 1, *, bias: bool = True, bidirectional: bool = False,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.inputs, self.hidden, self.layers = inputs, hidden, layers
        self.bidirectional, self.dropout = bidirectional, dropout
        directions = ("", "_reverse") if bidirectional else ("",)
        self.suffixes = [[f"_l{layer}{direction}" for direction in directions] for layer in range(layers)]
        for layer, suffixes in enumerate(self.suffixes):
            width = inputs if layer == 0 else hidden * len(directions)
            for suffix in suffixes:
                for name, shape in (
                    ("weight_ih", (width,)),
                    ("weight_hh", (hidden,)),
                    ("bias_ih", ()),
                    ("bias_hh", ()),
                ):
                    parameter = nn.Parameter(torch.empty(self.gates * hidden, *shape)) if shape or bias else None
                    self.register_parameter(name + suffix, parameter)
        _initialize(self, hidden)

    @abstractmethod
    def _unpack(self, state: Any) -> tuple[Tensor, ...]:
        """The tensors (L, B, H) of a state."""

    @abstractmethod
    def _pack(self, tensors: tuple[Tensor, ...]) -> Any:
        """The state made of tensors (L, B, H)."""

    @abstractmethod
    def _zeros(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """The initial tensors (L, B, H)."""

    def forward(
        self, x: Float[Tensor, "B T C"], state: Any = None, lengths: Int[Tensor, " B"] | None = None
    ) -> RecurrentOutput:
        check_shape(x=(x, f"B T {self.inputs}"))
        active = _active(x, lengths)
        count = self.layers * len(self.suffixes[0])
        initial = self._zeros(x, count) if state is None else self._unpack(state)
        for tensor in initial:
            check_shape(state=(tensor, f"{count} {len(x)} {self.hidden}"))
        final: list[tuple[Tensor, ...]] = []
        for layer, suffixes in enumerate(self.suffixes):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in suffixes:
                start = tuple(tensor[len(final)] for tensor in initial)
                output, end = self._run(x, start, suffix, active)
                outputs.append(output)
                final.append(end)
            x = torch.cat(outputs, -1)
        return RecurrentOutput(x, self._pack(tuple(torch.stack(tensors) for tensors in zip(*final))))

    def _run(
        self, x: Tensor, state: tuple[Tensor, ...], suffix: str, active: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One direction of one layer: the output (B, T, H) and the final state."""
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(self, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gates = F.linear(x, weight_ih, bias_ih)  # of all steps at once
        times = range(x.shape[1])
        outputs: dict[int, Tensor] = {}
        for time in reversed(times) if suffix.endswith("_reverse") else times:
            new = type(self).step(gates[:, time], weight_hh, bias_hh, *state)
            if active is None:
                state, outputs[time] = new, new[0]
            else:
                on = active[:, time, None]
                state = tuple(torch.where(on, a, b) for a, b in zip(new, state))
                outputs[time] = torch.where(on, new[0], 0.0)
        if not outputs:
            return x.new_zeros(len(x), 0, self.hidden), state
        return torch.stack([outputs[time] for time in times], 1), state

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.hidden}, layers={self.layers}, bidirectional={self.bidirectional}"


class _HiddenState(Recurrent, ABC):
    """Recurrences whose state is one tensor (L, B, H)."""

    def _unpack(self, state: Tensor) -> tuple[Tensor, ...]:
        return (state,)

    def _pack(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0]

    def _zeros(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return (x.new_zeros(count, len(x), self.hidden),)


class RNN(_HiddenState):
    """Vanilla recurrent network with tanh; state (L, B, H). See `Recurrent`."""

    gates = 1
    step = staticmethod(_rnn_step)


class GRU(_HiddenState):
    """Gated recurrent unit; state (L, B, H). See `Recurrent`."""

    gates = 3
    step = staticmethod(_gru_step)


class LSTM(Recurrent):
    """Long short-term memory; state `LSTMState` of two (L, B, H). See `Recurrent`."""

    gates = 4
    step = staticmethod(_lstm_step)

    def _unpack(self, state: LSTMState | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(state)

    def _pack(self, tensors: tuple[Tensor, ...]) -> LSTMState:
        return LSTMState(*tensors)

    def _zeros(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return (x.new_zeros(count, len(x), self.hidden), x.new_zeros(count, len(x), self.hidden))


class ConvGRUCell(nn.Module):
    """A GRU whose state is a map (B, hidden, *S) and whose matrices are convolutions; `dims` 1, 2 or 3.

        r, z = sigmoid(W * x + U * h);  n = tanh(W * x + U * (r h));  h' = (1 - z) n + z h

    `inputs` are the channels of maps x, convolved with the same kernel, or a module that turns x into the 3 * hidden
    maps of r, z and n, biases included: 3D-R2N2 takes a linear layer from a vector to 3 * 128 maps of 4^3.
    Sources: Ballas et al. 2016 (arXiv:1511.06432), equations 7 to 10; Choy et al. 2016, 3D-R2N2 (arXiv:1604.00449),
    section 3.2. As in both, and unlike torch's GRU, r acts on the state before it is convolved.
    """

    def __init__(self, inputs: int | nn.Module, hidden: int, kernel_size: int = 3, dims: int = 2):
        super().__init__()
        if dims not in (1, 2, 3) or kernel_size % 2 == 0:
            raise ValueError(f"dims must be 1, 2 or 3 and kernel_size odd, got {dims} and {kernel_size}")
        self.hidden, self.dims = hidden, dims
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        padding = kernel_size // 2
        self.from_input = (
            convolution(inputs, 3 * hidden, kernel_size, padding=padding) if isinstance(inputs, int) else inputs
        )
        self.gates = convolution(hidden, 2 * hidden, kernel_size, padding=padding, bias=False)
        self.candidate = convolution(hidden, hidden, kernel_size, padding=padding, bias=False)

    def forward(
        self, x: Float[Tensor, "B *_"], state: Float[Tensor, "B H *S"] | None = None
    ) -> Float[Tensor, "B H *S"]:
        return self.step(self.from_input(x), state)

    def step(
        self, maps: Float[Tensor, "B H3 *S"], state: Float[Tensor, "B H *S"] | None = None
    ) -> Float[Tensor, "B H *S"]:
        """The new state from what `from_input` made of x."""
        if maps.ndim != 2 + self.dims or maps.shape[1] != 3 * self.hidden:
            raise ValueError(
                f"the input's maps must be (B, {3 * self.hidden}) + {self.dims} axes, got {tuple(maps.shape)}"
            )
        state = maps.new_zeros(len(maps), self.hidden, *maps.shape[2:]) if state is None else state
        from_input, for_candidate = maps.split((2 * self.hidden, self.hidden), 1)
        reset, update = (from_input + self.gates(state)).sigmoid().chunk(2, 1)
        candidate = (for_candidate + self.candidate(reset * state)).tanh()
        return (1 - update) * candidate + update * state


class ConvGRU(nn.Module):
    """`ConvGRUCell` over x (B, T, ...): output (B, T, hidden, *S), state (B, hidden, *S).

    `lengths` (B,), each from 0 to T, is the number of steps (views) of each sample: later ones change no state and
    output zeros. Arguments are the cell's.
    """

    def __init__(self, inputs: int | nn.Module, hidden: int, kernel_size: int = 3, dims: int = 2):
        super().__init__()
        self.cell = ConvGRUCell(inputs, hidden, kernel_size, dims)

    def forward(
        self, x: Float[Tensor, "B T *_"], state: Float[Tensor, "B H *S"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> RecurrentOutput:  # fmt: skip
        if x.shape[1] == 0:
            raise ValueError(f"a convolutional GRU needs at least one step, got {tuple(x.shape)}")
        active = _active(x, lengths)
        maps = self.cell.from_input(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, T, 3 hidden, *S)
        state = maps.new_zeros(len(maps), self.cell.hidden, *maps.shape[3:]) if state is None else state
        outputs = []
        for time in range(x.shape[1]):
            new = self.cell.step(maps[:, time], state)
            if active is None:
                state = new
                outputs.append(new)
            else:
                on = active[:, time].view(-1, *(1,) * (new.ndim - 1))
                state = torch.where(on, new, state)
                outputs.append(torch.where(on, new, 0.0))
        return RecurrentOutput(torch.stack(outputs, 1), state)


class Window(NamedTuple):
    start: int  # of the window in the sequence
    output: Tensor  # (B, up to `window`, ...)
    state: Any  # after the window, with its graph


def truncated_bptt(
    network: Callable[..., Any], x: Float[Tensor, "B T *C"], window: int, state: Any = None
) -> Iterator[Window]:
    """Run `network(x, state) -> (output, state)` over windows of a long sequence, cutting the graph between them.

    Values are those of one run over the whole sequence; a loss on one window has the gradient of full backpropagation
    through time in that window with the state before it held constant. Call backward (and the optimizer) before asking
    for the next window, and memory is that of one window. `network` is one of this module's, torch's with
    `batch_first=True`, or any function. Source: Werbos 1990; Williams & Peng 1990.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 step, got {window}")
    if isinstance(network, nn.RNNBase | Recurrent) and network.bidirectional:
        raise ValueError("a bidirectional network needs the whole sequence at once: it cannot run in windows")
    if isinstance(network, nn.RNNBase) and not network.batch_first:
        raise ValueError("torch's recurrent networks need batch_first=True here")
    return _windows(network, x, window, state)


def _windows(network: Callable[..., Any], x: Tensor, window: int, state: Any) -> Iterator[Window]:
    for start in range(0, x.shape[1], window):
        output, state = network(x[:, start : start + window], state)
        yield Window(start, output, state)
        state = detach(state)


def detach(state: Any) -> Any:
    """The same state, a tensor or a (named) tuple of them, without its history."""
    if isinstance(state, Tensor):
        return state.detach()
    tensors = [detach(part) for part in state]
    return type(state)(*tensors) if hasattr(state, "_fields") else type(state)(tensors)


def _active(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which steps (B, T) belong to the sequences, or None for all."""
    if lengths is None:
        return None
    check_shape(lengths=(lengths, f"{len(x)}"))
    if len(lengths) and not (int(lengths.min()) >= 0 and int(lengths.max()) <= x.shape[1]):
        raise ValueError(f"lengths must be from 0 to the {x.shape[1]} steps of x, got {lengths.tolist()}")
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]


def _initialize(module: nn.Module, hidden: int) -> None:
    bound = 1 / math.sqrt(hidden)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)


RECURRENTS: dict[str, type[nn.Module]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU, "conv_gru": ConvGRU}
