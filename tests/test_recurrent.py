"""Recurrent layers against torch's with copied weights, ragged sequences, and truncated backpropagation."""

import pytest
import torch
from torch import nn

from vision3dgen.layers import (
    GRU,
    LSTM,
    RECURRENTS,
    RNN,
    ConvGRU,
    ConvGRUCell,
    GRUCell,
    LSTMCell,
    LSTMState,
    RNNCell,
    truncated_bptt,
)

B, T, C, H = 3, 7, 5, 4
LENGTHS = torch.tensor([7, 2, 5])
STACKS = {"rnn": (RNN, nn.RNN), "lstm": (LSTM, nn.LSTM), "gru": (GRU, nn.GRU)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(name: str, layers: int = 1, **options):
    """Ours and torch's of the same weights."""
    torch.manual_seed(0)
    ours, theirs = STACKS[name]
    ours, theirs = ours(C, H, layers, **options), theirs(C, H, layers, batch_first=True, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.double(), theirs.double()


def tensors(state) -> list[torch.Tensor]:
    return [state] if isinstance(state, torch.Tensor) else list(state)


@pytest.mark.parametrize("ours, theirs", [(RNNCell, nn.RNNCell), (LSTMCell, nn.LSTMCell), (GRUCell, nn.GRUCell)])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_torchs(ours, theirs, bias):
    torch.manual_seed(0)
    theirs = theirs(C, H, bias=bias).double()
    ours = ours(C, H, bias=bias).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, state = random(B, C), random(B, H, seed=1)
    if isinstance(ours, LSTMCell):
        state = LSTMState(state, random(B, H, seed=2))
    for given in (None, state):
        for a, b in zip(tensors(ours(x, given)), tensors(theirs(x, given)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}], ids=str)
def test_stacks_are_torchs(name, options):
    layers = 3
    ours, theirs = pair(name, layers, **options)
    x = random(B, T, C).requires_grad_()
    count = layers * (2 if options.get("bidirectional") else 1)
    state = random(count, B, H, seed=1)
    if name == "lstm":
        state = (state, random(count, B, H, seed=2))
    for given in (None, state):
        expected, expected_state = theirs(x, given)
        output, final = ours(x, given)
        torch.testing.assert_close(output, expected)
        for a, b in zip(tensors(final), tensors(expected_state), strict=True):
            torch.testing.assert_close(a, b)
    weights = random(*output.shape, seed=3)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad((y * weights).sum(), (x, *net.parameters()))
        for y, net in ((output, ours), (expected, theirs))
    )
    for a, b in zip(ours_gradient, theirs_gradient, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_ragged_sequences_are_torchs_packed_ones(name, bidirectional):
    ours, theirs = pair(name, 2, bidirectional=bidirectional)
    x = random(B, T, C)
    packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, expected_state = theirs(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    output, state = ours(x, lengths=LENGTHS)
    torch.testing.assert_close(output, expected)
    for a, b in zip(tensors(state), tensors(expected_state), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", STACKS)
def test_nothing_of_the_padding_reaches_output_or_gradient(name):
    ours, _ = pair(name, 2, bidirectional=True)
    x = random(B, T, C).requires_grad_()
    output, _ = ours(x, lengths=LENGTHS)
    gradient = torch.autograd.grad(output.pow(2).sum(), x)[0]
    for b, length in enumerate(LENGTHS):
        assert not output[b, length:].any()
        assert not gradient[b, length:].any()
        assert gradient[b, :length].abs().amin(-1).all()


@pytest.mark.parametrize("name", STACKS)
def test_empty_sequences_keep_their_state(name):
    ours, _ = pair(name, 2)
    state = random(2, B, H, seed=1)
    state = LSTMState(state, random(2, B, H, seed=2)) if name == "lstm" else state
    output, final = ours(random(B, T, C), state, torch.tensor([0, 3, 0]))
    assert not output[[0, 2]].any()
    for a, b in zip(tensors(final), tensors(state)):
        assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])
        assert not torch.equal(a[:, 1], b[:, 1])
    output, final = ours(random(B, 0, C), state)
    assert output.shape == (B, 0, H)
    assert all(torch.equal(a, b) for a, b in zip(tensors(final), tensors(state)))
    assert ours(random(0, T, C)).output.shape == (0, T, H)


def test_dropout_between_layers_only_in_training():
    torch.manual_seed(0)
    one, two = LSTM(C, H, dropout=0.9), LSTM(C, H, 2, dropout=0.9)
    x = random(B, T, C).float()
    assert torch.equal(one(x).output, one(x).output)
    assert not torch.equal(two(x).output, two(x).output)
    two.eval()
    assert torch.equal(two(x).output, two(x).output)


NETWORKS = {
    "ours": lambda: LSTM(C, H, 2).double(),
    "torch's": lambda: nn.GRU(C, H, batch_first=True).double(),
    "conv_gru": lambda: ConvGRU(C, H, dims=1).double(),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("window", [1, 3, 7, 11])
def test_truncated_gradients_are_those_of_full_backpropagation_in_the_window(name, window):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    x = random(2, T, C, 5) if name == "conv_gru" else random(2, T, C)
    full, _ = network(x)
    state, ends = None, []
    for start, output, after in truncated_bptt(network, x, window):
        ends.append(start + output.shape[1])
        torch.testing.assert_close(output, full[:, start : ends[-1]])
        weights = random(*output.shape, seed=start)
        ours = torch.autograd.grad((output * weights).sum(), tuple(network.parameters()))
        # full backpropagation through one run that begins at the window, from a constant state
        alone, _ = network(x[:, start : ends[-1]], state)
        expected = torch.autograd.grad((alone * weights).sum(), tuple(network.parameters()))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
        state = after.detach() if isinstance(after, torch.Tensor) else tuple(part.detach() for part in after)
    assert ends[-1] == T
    assert len(ends) == -(-T // window)


def test_a_window_of_the_whole_sequence_is_full_backpropagation_and_a_shorter_one_is_not():
    torch.manual_seed(0)
    network, x = RNN(C, H).double(), random(2, T, C)
    full = torch.autograd.grad(network(x).output[:, -1].sum(), network.weight_hh_l0)[0]
    last = {w: list(truncated_bptt(network, x, w))[-1].output[:, -1].sum() for w in (T, 3)}
    torch.testing.assert_close(torch.autograd.grad(last[T], network.weight_hh_l0)[0], full)
    assert not torch.allclose(torch.autograd.grad(last[3], network.weight_hh_l0)[0], full)


def test_weights_may_change_between_windows():
    """Each window's graph is its own, so that an optimizer may step before the next one."""
    torch.manual_seed(0)
    network = GRU(C, H)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for part in truncated_bptt(network, random(2, T, C).float(), 2):
        optimizer.zero_grad()
        part.output.sum().backward()
        optimizer.step()


def test_windows_refuse_what_cannot_be_cut():
    x = random(2, T, C)
    with pytest.raises(ValueError, match="window must be at least 1 step, got 0"):
        truncated_bptt(RNN(C, H), x, 0)
    for network in (GRU(C, H, bidirectional=True), nn.GRU(C, H, bidirectional=True, batch_first=True)):
        with pytest.raises(ValueError, match="bidirectional"):
            truncated_bptt(network, x, 2)
    with pytest.raises(ValueError, match="batch_first"):
        truncated_bptt(nn.GRU(C, H), x, 2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutional_gru_is_its_equations_in_loops(dims):
    """With a kernel of 3 in each axis: a sum over neighbors, zero outside."""
    torch.manual_seed(0)
    cell = ConvGRUCell(2, 3, 3, dims).double()
    size = (2, 3, 4)[:dims]
    x, state = random(1, 2, *size), random(1, 3, *size, seed=1)

    def convolved(weight, maps, bias=None):
        out = torch.zeros(1, len(weight), *size, dtype=torch.float64)
        for place in torch.cartesian_prod(*map(torch.arange, size)).reshape(-1, dims).tolist():
            for offset in torch.cartesian_prod(*[torch.arange(3)] * dims).reshape(-1, dims).tolist():
                source = [p + o - 1 for p, o in zip(place, offset)]
                if all(0 <= s < n for s, n in zip(source, size)):
                    kernel = weight[(..., *offset)]
                    out[(0, slice(None), *place)] += kernel @ maps[(0, slice(None), *source)]
        return out if bias is None else out + bias.view(1, -1, *[1] * dims)

    for given in (None, state):
        h = torch.zeros_like(state) if given is None else given
        wx = convolved(cell.from_input.weight, x, cell.from_input.bias)
        r, z = (wx[:, :6] + convolved(cell.gates.weight, h)).sigmoid().chunk(2, 1)
        n = (wx[:, 6:] + convolved(cell.candidate.weight, r * h)).tanh()
        torch.testing.assert_close(cell(x, given), (1 - z) * n + z * h)


def test_convolutional_gru_is_shift_equivariant_and_ragged():
    torch.manual_seed(0)
    layer = ConvGRU(2, 3, dims=2).double()
    x = random(B, 5, 2, 11, 13)
    x[..., :4, :] = 0
    x[..., -4:, :] = 0
    lengths = torch.tensor([5, 0, 3])
    output, state = layer(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        assert not output[b, length:].any()
        if length:
            alone = layer(x[b : b + 1, :length])
            torch.testing.assert_close(output[b, :length], alone.output[0])
            torch.testing.assert_close(state[b], alone.state[0])
        else:
            assert not state[b].any()
    one = layer(x[:, :1]).output
    shifted = layer(x[:, :1].roll(1, 3)).output
    torch.testing.assert_close(shifted[..., 3:-3, 1:-1], one.roll(1, 3)[..., 3:-3, 1:-1])


def test_convolutional_gru_from_vectors_as_in_3d_r2n2():
    torch.manual_seed(0)
    to_maps = nn.Sequential(nn.Linear(11, 3 * 5 * 8), nn.Unflatten(1, (3 * 5, 2, 2, 2)))
    layer = ConvGRU(to_maps, 5, dims=3)
    output, state = layer(random(B, 4, 11).float())
    assert output.shape == (B, 4, 5, 2, 2, 2)
    assert torch.equal(state, output[:, -1])
    output.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_every_recurrent_layer_is_in_the_table_and_bad_input_is_named():
    assert set(RECURRENTS) == {"rnn", "lstm", "gru", "conv_gru"}
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        RNN(C, H, 0)
    layer = GRU(C, H)
    with pytest.raises(ValueError, match=r"x must be \(B T 5\)"):
        layer(torch.rand(B, T, C + 1))
    with pytest.raises(ValueError, match=r"state must be \(1 3 4\)"):
        layer(torch.rand(B, T, C), torch.rand(2, B, H))
    with pytest.raises(ValueError, match=r"from 0 to the 7 steps of x, got \[7, 8, 1\]"):
        layer(torch.rand(B, T, C), lengths=torch.tensor([7, 8, 1]))
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3 and kernel_size odd, got 2 and 4"):
        ConvGRU(C, H, 4)
    with pytest.raises(ValueError, match=r"maps must be \(B, 12\) \+ 3 axes, got \(3, 12, 5, 7\)"):
        ConvGRU(nn.Identity(), H, dims=3)(torch.rand(B, T, 12, 5, 7))
    with pytest.raises(ValueError, match="at least one step"):
        ConvGRU(C, H)(torch.rand(B, 0, C, 5, 7))
