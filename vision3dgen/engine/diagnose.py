"""What can be learnt about a training before it starts: short experiments on a `Trainer` that leave no trace in it.

Weights, buffers, optimizer state, random states and modes are put back after each. Nothing here judges: the functions
return what they measured.
"""

import copy
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision3dgen.engine.loading import Data, ShuffleSampler, make_loader, to_device
from vision3dgen.engine.optim import Schedule, train_mode
from vision3dgen.engine.seeding import preserved_cpu_rng, preserved_rng, seed_all
from vision3dgen.engine.settings import PRECISIONS
from vision3dgen.engine.trainer import Trainer


class Overfit(NamedTuple):
    """What repeated updates on one batch did."""

    losses: dict[str, list[float]]  # of each part before each update, and after the last
    grad_norms: dict[str, list[float]]  # of each part at each update, before clipping
    no_gradient: list[str]  # trainable parameters whose gradient was None at every update
    zero_gradient: list[str]  # whose gradient was zero at every update
    unmoved: list[str]  # which are what they were


class RangeTest(NamedTuple):
    """The loss while the learning rate grows exponentially."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    grad_norms: list[float]
    steepest: float | None  # learning rate at which the smoothed loss falls fastest; None if it never falls
    lowest: float | None  # at which it is lowest; None likewise
    diverged: float | None  # first learning rate at which the loss had diverged; None if it never did


class Memory(NamedTuple):
    """Bytes that one update holds."""

    batch_size: int
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int  # the most that was kept for the backward pass at any time

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.gradients + self.optimizer + self.activations


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """Whatever trains inside, the trainer outside is what it was; inside, training mode and the trainer's own seed."""
    model, average = trainer.model, trainer.average
    kept = [model, *([average.module] if average else [])]
    tensors = [tensor for module in kept for tensor in (*module.parameters(), *module.buffers())]
    before = [tensor.detach().clone() for tensor in tensors]
    modes = {module: module.training for module in model.modules()}
    optimizers = {part: copy.deepcopy(optimizer.state_dict()) for part, optimizer in trainer.optimizers.items()}
    scaler, averaged = trainer.scaler.state_dict(), average.state_dict() if average else {}
    lrs, schedules, step = dict(trainer.lrs), dict(trainer.schedules), trainer.step
    try:
        with preserved_rng():
            seed_all(trainer.seed)
            train_mode(model)
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
        for module, training in modes.items():
            module.training = training
        for part, optimizer in trainer.optimizers.items():
            optimizer.load_state_dict(optimizers[part])
            optimizer.zero_grad()
        trainer.scaler.load_state_dict(scaler)
        if average:
            average.load_state_dict(averaged)
        trainer.lrs, trainer.schedules, trainer.step = lrs, schedules, step


def initial_losses(trainer: Trainer, batches: Iterable[Any]) -> dict[str, list[float]]:
    """The loss of each part on each batch before any update, in training mode."""
    precision = PRECISIONS[trainer.update.precision]
    losses: dict[str, list[float]] = {part: [] for part in trainer.parts}
    with restored(trainer), torch.no_grad():
        for batch in batches:
            moved = to_device(batch, trainer.device)
            for part in trainer.parts:
                with torch.autocast(trainer.device.type, precision, enabled=precision != torch.float32):
                    losses[part].append(float(trainer.objectives[part](moved, part)["loss"]))
    return losses


def overfit(trainer: Trainer, batch: Any, steps: int) -> Overfit:
    """Update `steps` times on one batch, at the trainer's own learning rate without its schedule.

    A loss or gradient that is not finite ends it: the lists are then shorter. A gradient is zero if it is so exactly
    and at every update: what is zero only at first, because a later layer starts at zero, is not named.
    """
    _check_steps(steps)
    named = {name: p for part in trainer.parts for name, p in trainer.trained[part].items()}
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    seen, nonzero, moved = set[str](), set[str](), set[str]()
    losses: dict[str, list[float]] = {part: [] for part in trainer.parts}
    norms: dict[str, list[float]] = {part: [] for part in trainer.parts}
    with restored(trainer):
        trainer.schedules = dict.fromkeys(trainer.parts, Schedule("constant"))
        for _ in range(steps):
            try:
                values = trainer.train_step([batch])
            except FloatingPointError:
                break
            for part in trainer.parts:
                losses[part].append(float(values[_name(trainer, part, "loss")]))
                norms[part].append(float(values[_name(trainer, part, "grad_norm")]))
            for name in named.keys() - nonzero:
                gradient = named[name].grad
                if gradient is not None:
                    seen.add(name)
                    if bool(gradient.any()):
                        nonzero.add(name)
        else:
            for part, last in initial_losses(trainer, [batch]).items():
                losses[part] += last
        moved = {name for name, parameter in named.items() if not torch.equal(parameter, start[name])}
    return Overfit(
        losses,
        norms,
        no_gradient=[name for name in named if name not in seen],
        zero_gradient=[name for name in named if name in seen - nonzero],
        unmoved=[name for name in named if name not in moved],
    )


def range_test(
    trainer: Trainer, batches: Iterable[Any], *, low: float = 1e-6, high: float = 10.0, steps: int = 100
) -> RangeTest:
    """One update per learning rate from `low` to `high`, evenly in the logarithm; other batches at each.

    Source: Smith 2017, Cyclical Learning Rates (arXiv:1506.01186), section 3.3. Differs: the sweep is exponential and
    watches the training loss, as is usual since. It ends where the running mean of the loss exceeds its first value by
    half of that value and half of what it had fallen by, or where the loss is not finite; it has diverged from where
    the smoothed loss, after its minimum, is above its first value. Smoothing is a centred mean over a tenth of the
    sweep, so that what is read off is not late. Needs a model of one part.
    """
    _check_steps(steps)
    if len(trainer.parts) != 1:
        raise ValueError(f"a learning-rate range test needs one loss that falls, the model has parts {trainer.parts}")
    if not 0 < low < high:
        raise ValueError(f"learning rates must be 0 < low < high, got low={low}, high={high}")
    (part,) = trainer.parts
    sweep = np.geomspace(low, high, steps).tolist()
    losses: list[float] = []
    norms: list[float] = []
    running, lowest, diverged = 0.0, math.inf, None
    with restored(trainer):
        trainer.schedules = {part: Schedule("constant")}
        for number, (lr, batch) in enumerate(zip(sweep, batches), start=1):
            trainer.lrs = {part: lr}
            try:
                values = trainer.train_step([batch])
            except FloatingPointError:
                diverged = lr
                break
            losses.append(float(values["loss"]))
            norms.append(float(values["grad_norm"]))
            running = 0.8 * running + 0.2 * losses[-1]
            mean = running / (1 - 0.8**number)
            lowest = min(lowest, mean)
            if number > 5 and mean - losses[0] > max(losses[0] - lowest, abs(losses[0])) / 2:
                diverged = lr
                break
    lrs = sweep[: len(losses)]
    smoothed = _centred_mean(losses, max(steps // 10, 3))
    if diverged is not None and losses:
        bottom = int(np.argmin(smoothed))
        diverged = next((lr for lr, loss in zip(lrs[bottom:], smoothed[bottom:]) if loss > smoothed[0]), diverged)
    return RangeTest(lrs, losses, smoothed, norms, *_fall(lrs, smoothed), diverged)


def memory(trainer: Trainer, batch: Any, batch_size: int) -> Memory:
    """What one update on `batch` holds: activations are the storages autograd keeps, each counted once.

    Temporaries of operators, the batch where no layer keeps it, and workspaces of libraries are not in it.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*trainer.model.parameters(), *trainer.model.buffers())}
    kept = _Kept(own)
    with restored(trainer):
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, _Saved.get):
            trainer.train_step([batch])
        trained = {id(p): p for part in trainer.parts for p in trainer.trained[part].values()}
        optimizer = [
            value
            for each in trainer.optimizers.values()
            for state in each.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return Memory(
            batch_size,
            parameters=_bytes(trainer.model.parameters()),
            buffers=_bytes(trainer.model.buffers()),
            gradients=_bytes(p.grad for p in trained.values() if p.grad is not None),
            optimizer=_bytes(optimizer),
            activations=kept.most,
        )


def step_rate(trainer: Trainer, batch: Any, *, seconds: float = 3.0, most: int = 20) -> float:
    """Updates per second on one batch already made; the first is not counted."""
    moved = to_device(batch, trainer.device)
    with restored(trainer):
        return _rate(lambda: trainer.train_step([moved]), trainer.device, seconds, most)


def loading_rate(data: Data, *, workers: int, seed: int = 0, seconds: float = 5.0, most: int = 20) -> float:
    """Batches per second that `workers` processes make (0: this process); the first is not counted.

    What a dataset has kept in memory counts: items of another `seed` are other ones, where there are enough of them.
    """
    sampler = ShuffleSampler(len(data.dataset), seed, data.batch_size)
    batches = iter(make_loader(replace(data, num_workers=workers), sampler))
    return _rate(lambda: next(batches), torch.device("cpu"), seconds, most)


class LoadingParts(NamedTuple):
    """Seconds that one item takes in a loader without workers."""

    read: float  # dataset[index]
    join: float  # its share of `collate`


def loading_parts(data: Data, *, seed: int = 0, seconds: float = 2.0, most: int = 10) -> LoadingParts:
    """Where the time of a loader goes: medians over batches of items that no batch before had."""
    order = ShuffleSampler(len(data.dataset), seed, data.batch_size).order(0)
    read, join = [], []
    begun = time.perf_counter()
    with preserved_cpu_rng():
        for start in range(0, len(order) - data.batch_size + 1, data.batch_size):
            first = time.perf_counter()
            items = [data.dataset[index] for index in order[start : start + data.batch_size]]
            middle = time.perf_counter()
            data.collate(items)
            read.append((middle - first) / data.batch_size)
            join.append((time.perf_counter() - middle) / data.batch_size)
            if len(read) >= most or time.perf_counter() - begun > seconds:
                break
    return LoadingParts(statistics.median(read), statistics.median(join))


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on a CUDA device, else resident, since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Saved:
    """A tensor that autograd keeps; tells `_Kept` when it lets go."""

    __slots__ = ("kept", "key", "tensor")

    def __init__(self, tensor: Tensor, key: int, kept: "_Kept"):
        self.tensor, self.key, self.kept = tensor, key, kept

    def get(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        self.kept.drop(self.key)


class _Kept:
    """Storages that autograd holds now, and the most bytes they had at once."""

    def __init__(self, own: set[int]):
        self.own, self.bytes, self.counts = own, dict[int, int](), dict[int, int]()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.counts:
            self.counts[key], self.bytes[key] = 0, 0 if key in self.own else storage.nbytes()
            self.now += self.bytes[key]
            self.most = max(self.most, self.now)
        self.counts[key] += 1
        return _Saved(tensor.detach(), key, self)

    def drop(self, key: int) -> None:
        self.counts[key] -= 1
        if self.counts[key] == 0:
            self.now -= self.bytes.pop(key)
            del self.counts[key]


def _rate(call: Callable[[], Any], device: torch.device, seconds: float, most: int) -> float:
    call()
    gc.collect()
    _wait(device)
    start = time.monotonic()
    for count in itertools.count(1):
        call()
        _wait(device)
        if (took := time.monotonic() - start) > seconds or count == most:
            return count / max(took, 1e-9)
    raise AssertionError  # itertools.count does not end


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(trainer: Trainer, part: str, key: str) -> str:
    return f"{part}/{key}" if len(trainer.parts) > 1 else key


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _centred_mean(values: Sequence[float], width: int) -> list[float]:
    """Means over `width` values around each, over fewer at the ends."""
    half = width // 2
    return [float(np.mean(values[max(i - half, 0) : i + half + 1])) for i in range(len(values))]


def _fall(lrs: Sequence[float], smoothed: Sequence[float]) -> tuple[float | None, float | None]:
    """Where the curve falls fastest over the logarithm, and its minimum; None where it falls by less than 5 %."""
    bottom = int(np.argmin(smoothed)) if smoothed else 0
    if bottom == 0 or smoothed[0] - smoothed[bottom] < 0.05 * abs(smoothed[0]):
        return None, None
    slopes = np.diff(np.asarray(smoothed[: bottom + 1]))  # the learning rates are evenly spaced in the logarithm
    return lrs[int(np.argmin(slopes))], lrs[bottom]


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
