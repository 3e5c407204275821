"""Arithmetic of convolutions and poolings: output sizes and receptive fields of stacks of layers.

Two ways. `receptive_field`, and `unit_receptive_field` for one place, walk a chain (nn.Sequential, or a list of
modules) and calculate. `measure_receptive_field` runs any network, residual, multi-scale or attending, on input that is
partly NaN and sees how far NaN reaches: it describes no module, and so misses none.

Per axis, a window of k taps, stride s, padding p and dilation d turns n places with a field of r at jumps of j, the
first of which begins at a, into
    floor((n + 2 p - d (k - 1) - 1) / s) + 1,    r + d (k - 1) j,    j s,    a - p j.
A chain is followed backwards, place by place, so that upsampling, where fields differ by place, is exact too.
Statistics of normalizations reach everywhere, and are not counted.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision3dgen.layers.activations import GatedConvolution, GatedTanh
from vision3dgen.layers.norm import ChannelLayerNorm, FrozenBatchNorm2d
from vision3dgen.layers.regularize import DropBlock, StochasticDepth
from vision3dgen.layers.upsample import BedOfNails, Interpolation, MaxUnpooling, TransposedConvolution


class ReceptiveField(NamedTuple):
    """One row of a receptive field table; tuples have one entry per axis."""

    name: str  # path of the module
    layer: str  # what it is
    size: tuple[int, ...]  # of its output
    field: tuple[int, ...]  # from the first to the last input place that one output place depends on, padding
    # included; the most where it varies, and a bound where a kernel smaller than its stride leaves gaps
    jump: tuple[Fraction, ...]  # input places from one output place to the next
    start: tuple[int, ...]  # first input place of the field of output place 0; negative in the padding


class _Axis(NamedTuple):
    """A layer along one axis."""

    places: int  # of the input
    size: int  # of the output
    sources: Callable[[int], Sequence[int]]  # input places an output place reads, ascending, the padding's included
    jump: Fraction
    period: int  # after so many output places the pattern repeats
    border: str = "zeros"  # what is read in the padding


_Step = Callable[[int, int], _Axis]  # (places, axis) -> the layer there

_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOLS = (*_MAX_POOLS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
_ADAPTIVE = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_REFLECTION = (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
_REPLICATION = (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
_CONSTANT = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)  # zero padding is one
_POINTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softmax2d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.LayerNorm,
    ChannelLayerNorm, FrozenBatchNorm2d, StochasticDepth, DropBlock, GatedTanh,
)  # fmt: skip


def receptive_field(network: nn.Module | Iterable[nn.Module], input_size: int | Sequence[int]) -> list[ReceptiveField]:
    """The output size and receptive field after each layer of a chain that changes either; see `ReceptiveField`.

    `network` is an nn.Sequential (nested as you like), one layer, or a list of layers. `input_size` is a side for every
    axis, or one for each. A layer whose field is not known from its settings (a residual block, fractional pooling) is
    a ValueError that names it: `measure_receptive_field` takes those.
    """
    rows = []
    for name, label, chains in _chains(network, input_size):
        fields = [_field(chain) for chain in chains]
        rows.append(
            ReceptiveField(
                name,
                label,
                tuple(chain[-1].size for chain in chains),
                tuple(field for field, _ in fields),
                tuple(math.prod((layer.jump for layer in chain), start=Fraction(1)) for chain in chains),
                tuple(start for _, start in fields),
            )
        )
    return rows


def unit_receptive_field(
    network: nn.Module | Iterable[nn.Module], input_size: int | Sequence[int], unit: Sequence[int] | None = None
) -> "Reach":
    """The input places that the middle place (or `unit`) of a chain's output depends on, calculated.

    The padding is not counted, unlike in `ReceptiveField.field`. Chains, and errors, are those of `receptive_field`.
    """
    steps = list(_chains(network, input_size))
    if not steps:
        raise ValueError("no layer of the chain changes sizes or fields: every place depends on itself alone")
    chains = steps[-1][2]
    size = tuple(chain[-1].size for chain in chains)
    place = _place(unit, size)
    read = [_places_read(chain, at) for chain, at in zip(chains, place)]
    if not all(read):
        raise ValueError(f"place {place} of the output does not depend on the input")
    sides = [chain[0].places for chain in chains]
    return _reach(size, place, [(min(places), max(places)) for places in read], sides)


def receptive_field_table(rows: Sequence[ReceptiveField]) -> str:
    """The rows as text, one line each; equal axes are written once."""
    cells = [["layer", "", "output", "field", "jump", "start"]]
    cells += [[row.name, row.layer, *map(_written, (row.size, row.field, row.jump, row.start))] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2])]
        lines.append("  ".join(left + [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]).rstrip())
    return "\n".join(lines)


class Reach(NamedTuple):
    """What one place of an output map depends on; tuples have one entry per axis."""

    size: tuple[int, ...]  # of the map
    unit: tuple[int, ...]  # the place
    first: tuple[int, ...]  # input place it depends on
    last: tuple[int, ...]  # input place it depends on
    complete: tuple[bool, ...]  # whether the field ends before the input does on both sides: it is then the whole field

    @property
    def field(self) -> tuple[int, ...]:
        return tuple(last - first + 1 for first, last in zip(self.first, self.last))


@torch.no_grad()
def measure_receptive_field(
    network: nn.Module, input_size: Sequence[int], *, channels: int = 3, unit: Sequence[int] | None = None
) -> list[Reach]:
    """The input that the middle place (or `unit`) of each output map of any network depends on, found by running it.

    Maps (B, C, *S), one or a list, from input (B, channels, *input_size). A copy of the network in evaluation mode and
    double precision on the CPU (no fast convolution there mixes neighbors) gets input with NaN from one border up to
    some place, for a bisection of that place per axis and side: about 2 log2(size) runs of 2 images per axis and map.
    Of several branches, the widest counts; so do taps of weight zero. Values the network replaces (nan_to_num,
    comparisons) hide what they touch.
    A place that depends on no input is a ValueError.
    """
    network = copy.deepcopy(network).double().eval().cpu()
    clean = torch.rand(1, channels, *input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reaches = []
    for index, output in enumerate(_maps(network(clean))):
        size = tuple(output.shape[2:])
        place = _place(unit, size)
        flat = 0
        for at, side in zip(place, size):
            flat = flat * side + at

        def reached(inputs: Tensor, index: int = index, flat: int = flat) -> list[bool]:
            values = _maps(network(inputs))[index].flatten(2)[..., flat]  # (B, C)
            return values.isnan().any(1).tolist()

        if not reached(torch.full_like(clean, math.nan))[0]:
            raise ValueError(f"place {place} of output map {index} does not depend on the input")
        ends = [_ends(clean, axis, reached) for axis in range(len(input_size))]
        reaches.append(_reach(size, place, ends, input_size))
    return reaches


def _place(unit: Sequence[int] | None, size: tuple[int, ...]) -> tuple[int, ...]:
    place = tuple(side // 2 for side in size) if unit is None else tuple(unit)
    if len(place) != len(size) or not all(0 <= at < side for at, side in zip(place, size)):
        raise ValueError(f"unit must be a place of the output, which is {size}, got {place}")
    return place


def _reach(
    size: tuple[int, ...], place: tuple[int, ...], ends: Sequence[tuple[int, int]], sides: Sequence[int]
) -> Reach:
    complete = tuple(first > 0 and last < side - 1 for (first, last), side in zip(ends, sides))
    return Reach(size, place, tuple(first for first, _ in ends), tuple(last for _, last in ends), complete)


def _maps(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _ends(clean: Tensor, axis: int, reached: Callable[[Tensor], list[bool]]) -> tuple[int, int]:
    """First and last place of the input along the axis that reach the unit."""
    side = clean.shape[axis + 2]
    low, high = [0, 0], [side - 1, side - 1]  # the answer is in [low, high]: the first place, and the last from the end
    while low < high or low[1] < high[1]:
        middle = [(a + b) // 2 for a, b in zip(low, high)]
        inputs = clean.repeat(2, *(1,) * (clean.ndim - 1))
        inputs[0].narrow(axis + 1, 0, middle[0] + 1).fill_(math.nan)
        inputs[1].narrow(axis + 1, side - 1 - middle[1], middle[1] + 1).fill_(math.nan)
        for index, hit in enumerate(reached(inputs)):
            if hit:
                high[index] = middle[index]
            else:
                low[index] = middle[index] + 1
    return low[0], side - 1 - low[1]


def _field(chain: Sequence[_Axis]) -> tuple[int, int]:
    """The largest field over the places of the last output, and where that of place 0 starts; padding included."""
    fields = []
    for place in range(min(math.prod(layer.period for layer in chain), chain[-1].size)):
        low, high = place, place
        for layer in reversed(chain):
            read = [layer.sources(at) for at in range(low, high + 1) if at in (low, high) or layer.period > 1]
            read = [sources for sources in read if len(sources)]
            if not read:  # between the places that a transposed convolution writes to
                low, high = 0, -1
                break
            low, high = min(sources[0] for sources in read), max(sources[-1] for sources in read)
        fields.append((low, high))
    return max(high - low + 1 for low, high in fields), fields[0][0]


def _places_read(chain: Sequence[_Axis], place: int) -> set[int]:
    """Exactly the places of the input that a place of the last output depends on."""
    places = {place}
    for layer in reversed(chain):
        read = {_inside(source, layer) for at in places for source in layer.sources(at)}
        places = {source for source in read if source is not None}
    return places


def _inside(source: int, layer: _Axis) -> int | None:
    """The place whose value stands at `source`, which may be in the padding; None for a constant."""
    last = layer.places - 1
    if 0 <= source <= last:
        return source
    if layer.border == "reflect":
        return -source if source < 0 else 2 * last - source
    if layer.border == "replicate":
        return min(max(source, 0), last)
    if layer.border == "circular":
        return source % layer.places
    return None


def _dims(modules: Sequence[nn.Module]) -> int:
    """The number of axes the first layer that says so works on; 2 where none does."""
    for layer in (layer for module in modules for layer in module.modules()):
        for cls in type(layer).__mro__:
            if cls.__module__.startswith("torch.nn.modules") and cls.__name__[-2:] in ("1d", "2d", "3d"):
                return int(cls.__name__[-2])
    return 2


def _chains(
    network: nn.Module | Iterable[nn.Module], input_size: int | Sequence[int]
) -> Iterator[tuple[str, str, list[list[_Axis]]]]:
    """Name, description and, per axis, the layers so far, after each layer that changes sizes or fields."""
    modules = [network] if isinstance(network, nn.Module) else list(network)
    sizes = [input_size] * _dims(modules) if isinstance(input_size, int) else list(input_size)
    chains: list[list[_Axis]] = [[] for _ in sizes]
    flat = False
    named = [("", modules[0])] if len(modules) == 1 else [(str(index), module) for index, module in enumerate(modules)]
    for name, module in _leaves(named):
        if isinstance(module, GatedTanh) and module.dim != 1:
            raise ValueError(f"{name} (GatedTanh): only a gate over the channels (dim=1) leaves places alone")
        if isinstance(module, _POINTWISE) or (isinstance(module, nn.Linear) and flat):
            continue
        flat = flat or isinstance(module, nn.Flatten)
        step, label = _step(module), _described(module)
        if step is None:
            raise ValueError(
                f"{name or 'network'} ({type(module).__name__}): its receptive field does not follow from its "
                "settings; give a chain of convolutions, poolings and pointwise layers, or use measure_receptive_field"
            )
        for axis, chain in enumerate(chains):
            layer = step(sizes[axis], axis)
            if layer.size < 1:
                raise ValueError(f"{name} ({label}): nothing is left of {sizes[axis]} places on axis {axis}")
            sizes[axis] = layer.size
            chain.append(layer)
        yield name, label, chains


def _leaves(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in modules:
        parts: Iterable[tuple[str, nn.Module]]
        if isinstance(module, nn.Sequential | nn.ModuleList):
            parts = module._modules.items()  # named_children would leave out a layer's second use
        elif isinstance(module, Interpolation):
            resize = nn.Upsample(scale_factor=module.factor, mode=module.mode)
            parts = [("resize", resize), ("convolution", module.convolution)]
        elif isinstance(module, BedOfNails):
            parts = [("nails", _Cells(module.factor, 1)), ("convolution", module.convolution)]
        elif isinstance(module, MaxUnpooling):  # anywhere in the cell
            parts = [("unpool", _Cells(module.factor, module.factor)), ("convolution", module.convolution)]
        elif isinstance(module, TransposedConvolution | GatedConvolution):
            parts = [("convolution", module.convolution)]
        else:
            yield name, module
            continue
        yield from _leaves((f"{name}.{part}".lstrip("."), child) for part, child in parts)


class _Cells(nn.Module):
    """Each place becomes a cell of `factor` places, of which the first `filled` depend on it."""

    def __init__(self, factor: int, filled: int):
        super().__init__()
        self.factor, self.filled = factor, filled


def _step(module: nn.Module) -> _Step | None:
    if isinstance(module, _Cells):
        return lambda n, axis: _transposed(n, module.filled, module.factor, 0, 1, module.factor - module.filled)
    if isinstance(module, _TRANSPOSED):
        settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.output_padding)
        return lambda n, axis: _transposed(n, *(_at(value, axis) for value in settings))
    if isinstance(module, nn.modules.conv._ConvNd):
        return lambda n, axis: _convolution(module, n, axis)
    if isinstance(module, _POOLS):
        dilation = module.dilation if isinstance(module, _MAX_POOLS) else 1
        padding = getattr(module, "padding", 0)  # LPPool has none
        stride = module.kernel_size if module.stride is None else module.stride
        return lambda n, axis: _window(
            n, _at(module.kernel_size, axis), _at(stride, axis), _at(padding, axis), _at(padding, axis),
            _at(dilation, axis), module.ceil_mode,
        )  # fmt: skip
    if isinstance(module, _ADAPTIVE):
        return lambda n, axis: _adaptive(n, _at(module.output_size, axis))
    if isinstance(module, _REFLECTION + _REPLICATION + _CONSTANT):
        pads = module.padding[::-1]  # torch: last axis first, (before, after) each
        kinds = {"reflect": _REFLECTION, "replicate": _REPLICATION}
        border = next((border for border, kind in kinds.items() if isinstance(module, kind)), "zeros")
        return lambda n, axis: _window(n, 1, 1, pads[2 * axis + 1], pads[2 * axis], 1, border=border)
    if isinstance(module, nn.Upsample):
        return lambda n, axis: _resampled(module, n, axis)
    if isinstance(module, nn.Flatten) and module.start_dim == 1:
        return lambda n, axis: _adaptive(n, 1)
    return None


def _at(value: Any, axis: int) -> Any:
    if not isinstance(value, tuple | list):
        return value
    return value[axis] if len(value) > 1 else value[0]


def _described(module: nn.Module) -> str:
    if isinstance(module, _Cells):
        return f"cells of {module.factor}"
    text = type(module).__name__
    for mark, key in ((" ", "kernel_size"), (" /", "stride"), (" dilation ", "dilation"), (" ", "output_size")):
        value = getattr(module, key, None)
        if value not in (None, 1, (1,), (1, 1), (1, 1, 1)) or (key == "kernel_size" and value is not None):
            text += mark + _written(value if isinstance(value, tuple | list) else (value,))
    return text


def _written(values: Sequence[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _convolution(module: nn.modules.conv._ConvNd, n: int, axis: int) -> _Axis:
    kernel, stride, dilation = (_at(value, axis) for value in (module.kernel_size, module.stride, module.dilation))
    if module.padding == "valid":
        before = after = 0
    elif module.padding == "same":
        before = dilation * (kernel - 1) // 2
        after = dilation * (kernel - 1) - before
    else:
        before = after = _at(module.padding, axis)
    return _window(n, kernel, stride, before, after, dilation, border=module.padding_mode)


def _window(
    n: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil_mode: bool = False,
    border: str = "zeros",
) -> _Axis:  # fmt: skip
    span = dilation * (kernel - 1)
    room = n + before + after - span - 1
    size = room // stride + 1
    if ceil_mode:
        size = -(-room // stride) + 1
        size -= (size - 1) * stride >= n + before  # no window starts in the padding at the end

    def sources(place: int) -> range:
        start = place * stride - before
        return range(start, start + span + 1, dilation)

    return _Axis(n, size, sources, Fraction(stride), 1, border)


def _transposed(n: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int) -> _Axis:
    def sources(place: int) -> list[int]:
        """Input i is written to the places i * stride - padding + dilation * tap."""
        reached = (place + padding - dilation * tap for tap in reversed(range(kernel)))
        return [at // stride for at in reached if at % stride == 0]

    size = (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    return _Axis(n, size, sources, Fraction(1, stride), stride)


def _adaptive(n: int, wanted: int | None) -> _Axis:
    size = n if wanted is None else wanted

    def sources(place: int) -> range:
        return range(place * n // size, -(-(place + 1) * n // size))

    return _Axis(n, size, sources, Fraction(n, size), size)


def _resampled(module: nn.Upsample, n: int, axis: int) -> _Axis:
    if module.size is not None:
        size = _at(module.size, axis)
        ratio = Fraction(n, size)
    else:
        scale = Fraction(_at(module.scale_factor, axis))
        size = math.floor(n * scale)
        ratio = Fraction(n, size) if module.recompute_scale_factor else 1 / scale
    if module.mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic"):
        raise ValueError(f"the field of interpolation mode {module.mode!r} is not known; use measure_receptive_field")
    if module.align_corners:
        ratio = Fraction(n - 1, max(size - 1, 1))

    def sources(place: int) -> range:
        if module.mode.startswith("nearest"):
            at = (place + Fraction(1, 2)) * ratio if module.mode == "nearest-exact" else place * ratio
            return range(math.floor(at), math.floor(at) + 1)
        at = place * ratio if module.align_corners else (place + Fraction(1, 2)) * ratio - Fraction(1, 2)
        first, last = math.floor(at), math.ceil(at)
        more = module.mode == "bicubic" and first != last
        return range(first - more, last + more + 1)

    return _Axis(n, size, sources, ratio, ratio.denominator, "replicate")
