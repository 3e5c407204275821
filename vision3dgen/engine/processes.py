"""The processes of a run: which this one is, and items divided so that none is counted twice or left out."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def on_cpu() -> bool:
    """Whether to compute on the CPU: asked for by accelerate's ACCELERATE_USE_CPU, or all there is."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t")
    return asked or not torch.accelerator.is_available()


def processes() -> Any:
    """accelerate's state of the processes, joined into a group on the first call where there are several.

    Differs: a bare `PartialState()` leaves processes that torchrun started on a CPU as strangers to one another.
    """
    from accelerate import PartialState  # slow to import

    return PartialState(cpu=on_cpu())


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the first process of this machine before the others, which then find what it wrote."""
    with processes().local_main_process_first():
        yield


def share(count: int) -> range:
    """Which of `range(count)` this process takes: every world-th from its rank on; all of them if it is alone.

    Shares are disjoint and cover; with fewer things than processes some are empty.
    """
    state = processes()
    return range(state.process_index, count, state.num_processes)


def gather_objects(value: Any) -> list[Any]:
    """What each process gave, by rank, in every process; picklable values of any size."""
    from accelerate.utils import gather_object

    processes()
    return gather_object([value])


@contextmanager
def raised_by_all() -> Iterator[int]:
    """Run the block, which is given this process's number, and leave it together with all processes.

    An exception in one process raises a RuntimeError that names it in the others, so that none waits for it forever.
    """
    error: Exception | None = None
    try:
        yield processes().process_index
    except Exception as caught:  # raised below, when the others know
        error = caught
    said = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, message in enumerate(said):
        if message is not None:
            raise RuntimeError(f"process {number} failed: {message}")


class ProcessLost(ConnectionError):
    """Another process of this run is gone, so the work that they share cannot go on."""


# What the backends say when a peer does not answer any more.
_GONE = ("closed by peer", "reset by peer", "remote worker", "Broken pipe", "NCCL", "timed out", "Timed out")


@contextmanager
def loss_named(state: Callable[[], str]) -> Iterator[None]:
    """Run the block; where a backend fails because another process is gone, raise `ProcessLost` with `state()`.

    The backends find out by themselves, gloo within seconds, NCCL within its time-out (ten minutes by default).
    """
    try:
        yield
    except RuntimeError as error:
        own = processes()
        if own.num_processes == 1 or not any(word in str(error) for word in _GONE):
            raise
        said = str(error).strip().splitlines()[0]
        raise ProcessLost(
            f"process {own.process_index} of {own.num_processes} lost another one, which died or hangs: {state()} "
            f"({said})"
        ) from error


def gather_items(indices: Sequence[int], values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """What all processes measured of items `range(count)`, in order, on the CPU of every process.

    `indices` are the items this process measured and `values[name]` (len(indices), ...) its measurements; a process
    without items may give no names. A mean of the result adds the same numbers in the same order as one process does,
    whatever their distribution. Raises ValueError, in every process, for an item measured twice or not at all, and for
    names or lengths that do not fit.

    Differs: accelerate's `gather_for_metrics` pads with repeated items and cuts them off again, which relies on its own
    samplers.
    """
    shares = gather_objects((list(indices), {name: value.detach().cpu() for name, value in values.items()}))
    owned = [index for own, _ in shares for index in own]
    if sorted(owned) != list(range(count)):
        missing = sorted(set(range(count)) - set(owned))
        extra = sorted({index for index in owned if owned.count(index) > 1 or not 0 <= index < count})
        raise ValueError(f"each of {count} items must be measured once; missing {missing[:5]}, repeated {extra[:5]}")
    measured = [(own, named) for own, named in shares if own]
    names = sorted({name for _, named in measured for name in named})
    for own, named in measured:
        if sorted(named) != names or any(len(value) != len(own) for value in named.values()):
            shapes = {name: tuple(value.shape) for name, value in named.items()}
            raise ValueError(f"every process must measure {names} of each of its {len(own)} items, one gave {shapes}")
    place = torch.tensor(owned, dtype=torch.long).argsort()
    return {name: torch.cat([named[name] for _, named in measured])[place] for name in names}
