"""Batches in a seeded, resumable order: what a sample looks like depends on (seed, epoch, index) and on nothing else.

So the number of workers, a restart in the middle of an epoch, and one GPU or two leave the stream of samples unchanged.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vision3dgen.engine.seeding import mix, preserved_cpu_rng, quick_mix, seed_cpu


@runtime_checkable
class Items(Protocol):
    """A map-style dataset: a length, and an item for each index below it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class EpochAware(Protocol):
    """A dataset whose items differ between epochs, such as one that draws other points in each."""

    def set_epoch(self, epoch: int, /) -> None: ...


@runtime_checkable
class Movable(Protocol):
    """Anything that moves to a device as tensors do: meshes, point clouds, cameras."""

    def to(self, device: Any, /) -> Any: ...


@dataclass(frozen=True)
class Data:
    """What to train on: a map-style dataset, the batch size of one process, how items become a batch, and workers.

    Items and `collate` may draw from Python's, NumPy's and torch's global generators; each is seeded for its sample.
    """

    dataset: Items
    batch_size: int
    collate: Callable[[list[Any]], Any] = default_collate
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                "batch_size must be at least 1 and num_workers at least 0, "
                f"got batch_size={self.batch_size}, num_workers={self.num_workers}"
            )


class Draw(NamedTuple):
    """The samples of one batch of one process."""

    epoch: int
    indices: list[int]


class ShuffleSampler(Sampler[Draw]):
    """Endless batches of `range(length)`, each epoch a fresh permutation that depends on (seed, epoch) only.

    The samples of one step are consecutive in the permutation, and the processes of a `world` divide them, so two
    processes with batches of 3 use the samples one process uses with batches of 6. An incomplete batch at the end of
    an epoch is left out. `advance` is called for each batch used: the iterator itself runs ahead by what the workers
    prefetch, and so cannot say where training stands.
    """

    def __init__(self, length: int, seed: int = 0, batch_size: int = 1, *, rank: int = 0, world: int = 1):
        if length < batch_size * world:
            raise ValueError(
                f"the dataset has {length} items, fewer than one batch of {batch_size} for each of {world} process(es)"
            )
        self.length, self.seed, self.batch_size, self.rank = length, seed, batch_size, rank
        self.stride = batch_size * world
        self.epoch = 0
        self.position = 0  # samples of this epoch already used, over all processes

    @property
    def batches_per_epoch(self) -> int:
        return self.length // self.stride

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch."""
        generator = torch.Generator().manual_seed(mix(self.seed, 2, epoch))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[Draw]:
        epoch, position = self.epoch, self.position
        while True:
            order = self.order(epoch)
            while position + self.stride <= self.length:
                start = position + self.rank * self.batch_size
                yield Draw(epoch, order[start : start + self.batch_size])
                position += self.stride
            epoch, position = epoch + 1, 0

    def advance(self) -> None:
        """One more batch was used."""
        self.position += self.stride
        if self.position + self.stride > self.length:
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"length": self.length, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the order of `state`, which must be over as many samples and with the same seed."""
        for name, here in (("length", self.length), ("seed", self.seed)):
            if state[name] != here:
                raise ValueError(f"the data order was saved with {name}={state[name]}, this one has {name}={here}")
        self.epoch, self.position = state["epoch"], state["position"]


class _Batches(Dataset[Any]):
    """Makes the batch of a `Draw`, every random choice in it seeded."""

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, draw: Draw) -> Any:
        epoch, indices = draw
        if isinstance(self.data.dataset, EpochAware):
            self.data.dataset.set_epoch(epoch)
        items = []
        with preserved_cpu_rng():
            for index in indices:
                seed_cpu(quick_mix(self.seed, 0, epoch, index))
                items.append(self.data.dataset[index])
            seed_cpu(quick_mix(self.seed, 1, epoch, *indices))
            return self.data.collate(items)


def _as_made(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """A signal to the whole group must not take the workers from a loop that is finishing its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(data: Data, sampler: ShuffleSampler) -> DataLoader[Any]:
    """A DataLoader of the batches that `sampler` draws, from where it stands."""
    return DataLoader(
        _Batches(data, sampler.seed),
        batch_size=None,  # the sampler draws whole batches
        sampler=sampler,
        collate_fn=_as_made,
        num_workers=data.num_workers,
        worker_init_fn=_outlive_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),  # else each start would draw from the global generator
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor, and everything that has `.to(device)`, inside nested dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if batch is None or isinstance(batch, str | int | float):  # ids by the hundred: asking them for methods is slow
        return batch
    if isinstance(batch, Movable):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a NamedTuple takes its fields one by one
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
