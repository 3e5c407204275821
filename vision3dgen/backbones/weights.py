"""Weights from a file into a network, or a list of everything that does not fit."""

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NESTED = ("model", "state_dict")  # keys under which checkpoints keep a state dict
SHOWN = 12  # names of each kind in an error
COUNTER = "num_batches_tracked"  # of batch normalization: older files lack it, and frozen ones have none


class LoadedWeights(NamedTuple):
    """Names of the network's tensors that were loaded, and of what was not."""

    loaded: list[str]
    missing: list[str]  # in the network only; they keep their values
    unexpected: list[str]  # in the file only
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name: (shape in the file, in the network)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    prefix: str = "",
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> LoadedWeights:
    """Load a safetensors or torch file into `model` in place; nothing is loaded when it raises.

    The file holds a state dict, or one under "model" or "state_dict"; a prefix "module." of all names is dropped.
    prefix: take only the names under it ("backbone.body."), without it. rename: from the file's names to the model's
    (`timm_to_vision3dgen`). Counters of batch normalization may be missing or superfluous. Raises OSError if the file
    cannot be read, and one ValueError naming the file and the fault: not a weight file, truncated, pickled objects, or
    (strict) every kind of name or shape that does not fit; without `strict`, only if nothing fits.
    """
    everything = read_weights(path)
    state = {name.removeprefix(prefix): tensor for name, tensor in everything.items() if name.startswith(prefix)}
    if not state:
        raise ValueError(f"{path}: no name begins with {prefix!r}; there are {_some(everything)}")
    if rename is not None:
        try:
            state = dict(rename(state))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    own = model.state_dict()
    counters = {name for name in own.keys() ^ state.keys() if name.rpartition(".")[2] == COUNTER}
    shared = own.keys() & state.keys()
    mismatched = {
        name: (tuple(state[name].shape), tuple(own[name].shape))
        for name in own
        if name in shared and state[name].shape != own[name].shape
    }
    result = LoadedWeights(
        loaded=[name for name in own if name in shared and name not in mismatched],
        missing=[name for name in own if name not in state and name not in counters],
        unexpected=[name for name in state if name not in own and name not in counters],
        mismatched=mismatched,
    )
    misfit = result.missing or result.unexpected or result.mismatched
    if misfit and (strict or not result.loaded):
        raise ValueError(_describe(path, model, result))
    model.load_state_dict({name: state[name] for name in result.loaded}, strict=False)
    return result


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a safetensors or torch file, on the CPU; raises as `load_weights` does."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        try:
            return _state_dict(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(f"{path}: a damaged or truncated safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not a file of plain weights: it is damaged, or holds pickled objects, which can run code and are "
            f"not loaded ({_first_line(error)})"
        ) from error
    except Exception as error:  # of any kind: torch's unpickler trusts the order of the bytes it reads
        raise ValueError(f"{path}: a damaged or truncated torch file ({_first_line(error)})") from error
    return _state_dict(content, path)


def _numpy_scalars() -> list[Any]:
    """What unpickles NumPy numbers, such as the best validation loss that checkpoints keep; it holds no code."""
    make = np.float64(0).__reduce__()[0]
    named = [(make, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*named, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _state_dict(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: holds {type(content).__name__}, not a mapping of names to tensors")
    others = [name for name, value in content.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if others:
        raise ValueError(
            f"{path}: a state dict holds tensors only, or lies under one of {NESTED}; not tensors: {_some(others)}"
        )
    state = dict(content)
    if all(name.startswith("module.") for name in state):  # saved from inside DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _some(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _describe(path: str | os.PathLike[str], model: nn.Module, result: LoadedWeights) -> str:
    shapes = [f"{name} {theirs} for {ours}" for name, (theirs, ours) in result.mismatched.items()]
    faults = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing in the file", result.missing),
            ("unexpected", result.unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    lead = "" if result.loaded else ", nothing of which it has (another architecture?)"
    return f"{path}: not the weights of this {type(model).__name__}{lead}; " + "; ".join(faults)
