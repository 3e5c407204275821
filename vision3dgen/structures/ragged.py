"""Ragged batches: one packed tensor and one count per member, and what follows from them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor


def pack(name: str, value: Sequence[Tensor] | Tensor, row: str, pad: float | None = None) -> tuple[Tensor, Tensor]:
    """Rows of all members in one tensor, and the number of rows of each member."""
    if isinstance(value, Tensor):
        if value.ndim < 2:
            raise ValueError(f"{name} must be a list of ({row}) or a padded (B {row}), got {tuple(value.shape)}")
        if pad is None:
            counts = torch.full((len(value),), value.shape[1], device=value.device, dtype=torch.int64)
            return value.flatten(0, 1), counts
        kept = (value != pad).flatten(2).all(-1)  # (B, N)
        return value[kept], kept.sum(1)
    members = list(value)
    if not members:
        raise ValueError(f"{name} must have at least one member, got an empty list")
    first = members[0]
    for index, member in enumerate(members):
        if member.ndim < 1 or member.shape[1:] != first.shape[1:] or member.dtype != first.dtype:
            raise ValueError(
                f"{name}[{index}] must be (N {' '.join(map(str, first.shape[1:]))}) of {first.dtype} like {name}[0], "
                f"got {tuple(member.shape)} of {member.dtype}"
            )
    counts = torch.tensor([len(member) for member in members], device=first.device, dtype=torch.int64)
    return torch.cat(members), counts


def starts(counts: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Index of each member's first row in the packed tensor."""
    return counts.cumsum(0) - counts


def owner_of(counts: Int[Tensor, " B"]) -> Int[Tensor, " N"]:
    """The member each packed row belongs to."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def to_list(packed: Tensor, counts: Int[Tensor, " B"]) -> list[Tensor]:
    return list(packed.split(counts.tolist()))


def to_padded(packed: Tensor, counts: Int[Tensor, " B"], value: float) -> Tensor:
    """(B, max rows, ...), rows beyond a member's own filled with `value`."""
    longest = int(counts.max()) if len(counts) else 0
    padded = packed.new_full((len(counts), longest, *packed.shape[1:]), value)
    owner = owner_of(counts)
    padded[owner, torch.arange(len(packed), device=packed.device) - starts(counts)[owner]] = packed
    return padded


def take(packed: Tensor, counts: Int[Tensor, " B"], members: Int[Tensor, " M"]) -> Tensor:
    """Packed rows of the chosen members, in the order chosen."""
    taken = counts[members]
    owner = owner_of(taken)
    offset = torch.arange(int(taken.sum()), device=packed.device) - starts(taken)[owner]
    return packed[starts(counts)[members][owner] + offset]


def select(index: Any, length: int, device: torch.device) -> Int[Tensor, " M"]:
    """Member indices meant by `x[index]`: an int, a slice, a list of ints, or an index or mask tensor."""
    members = torch.arange(length, device=device)
    if isinstance(index, int):
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for a batch of {length}")
        return members[index % length][None]
    if isinstance(index, list):
        index = torch.tensor(
            index, device=device, dtype=torch.bool if index and isinstance(index[0], bool) else torch.int64
        )
    return members[index]


Batch = TypeVar("Batch", bound="Ragged")


class Ragged:
    """What `Meshes` and `Pointclouds` share: moving, indexing and splitting through their fields."""

    _tensors: tuple[str, ...]  # fields that hold a tensor
    _dicts: tuple[str, ...]  # fields that hold a dict of tensors

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: build a new one instead of setting {name!r}")

    def _fields(self: Batch, **fields: Any) -> Batch:
        """A new object of the same class with these fields and nothing cached."""
        new = object.__new__(type(self))
        new.__dict__.update(fields)
        return new

    def _map(self: Batch, function: Any) -> Batch:
        fields = {
            name: None if self.__dict__[name] is None else function(self.__dict__[name]) for name in self._tensors
        }
        for name in self._dicts:
            fields[name] = {key: function(value) for key, value in self.__dict__[name].items()}
        return self._fields(**fields)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in (*self._tensors, *self._dicts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def device(self) -> torch.device:
        return self.__dict__[self._tensors[0]].device

    def to(self: Batch, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def pin_memory(self: Batch) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def cpu(self: Batch) -> Batch:
        return self.to("cpu")

    def cuda(self: Batch) -> Batch:
        return self.to("cuda")

    def clone(self: Batch) -> Batch:
        return self._map(lambda tensor: tensor.clone())

    def detach(self: Batch) -> Batch:
        return self._map(lambda tensor: tensor.detach())


def pack_attributes(
    kind: str, attributes: Mapping[str, Sequence[Tensor] | Tensor] | None, counts: Int[Tensor, " B"], rows: int
) -> dict[str, Tensor]:
    """Attributes as packed tensors, one row per vertex or face; a tensor with `rows` rows is taken as packed."""
    packed = {}
    for name, value in (attributes or {}).items():
        if isinstance(value, Tensor):
            if len(value) != rows:
                raise ValueError(f"{kind}_attributes[{name!r}] must have {rows} packed rows, got {tuple(value.shape)}")
            packed[name] = value
            continue
        tensor, own = pack(f"{kind}_attributes[{name!r}]", value, "N C")
        if not torch.equal(own.to(counts.device), counts):
            raise ValueError(
                f"{kind}_attributes[{name!r}] must have {counts.tolist()} rows per member, got {own.tolist()}"
            )
        packed[name] = tensor
    return packed
