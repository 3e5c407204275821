"""Batches of point clouds."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_shape
from vision3dgen.structures.ragged import Ragged, owner_of, pack, select, starts, take, to_list, to_padded


class Pointclouds(Ragged):
    """A batch of point clouds with any number of points each.

    points: list of (P_i, 3) or padded (B, P, 3); normals likewise; features: list of (P_i, C) or padded (B, P, C).
    """

    _tensors = ("_points", "_normals", "_features", "_num_points")
    _dicts = ()
    _points: Tensor  # (P, 3)
    _normals: Tensor | None  # (P, 3)
    _features: Tensor | None  # (P, C)
    _num_points: Tensor  # (B,)

    def __init__(
        self,
        points: Sequence[Tensor] | Tensor,
        normals: Sequence[Tensor] | Tensor | None = None,
        features: Sequence[Tensor] | Tensor | None = None,
    ):
        packed, counts = pack("points", points, "P 3")
        check_shape(points=(packed, "P 3"))
        extra: dict[str, Tensor | None] = {}
        for name, value in (("normals", normals), ("features", features)):
            extra[name] = None
            if value is not None:
                extra[name], own = pack(name, value, "P 3" if name == "normals" else "P C")
                if not torch.equal(own, counts):
                    raise ValueError(f"{name} must have {counts.tolist()} rows per cloud, got {own.tolist()}")
        if extra["normals"] is not None:
            check_shape(normals=(extra["normals"], "P 3"))
        self.__dict__.update(_points=packed, _normals=extra["normals"], _features=extra["features"], _num_points=counts)

    def __len__(self) -> int:
        return len(self._num_points)

    def __repr__(self) -> str:
        return f"Pointclouds(points={self._num_points.tolist()}, device={str(self.device)!r})"

    def __getitem__(self, index: Any) -> "Pointclouds":
        """The chosen clouds (int, slice, list, index or mask tensor) as a batch."""
        members = select(index, len(self), self.device)
        taken = {
            name: None if self.__dict__[name] is None else take(self.__dict__[name], self._num_points, members)
            for name in ("_points", "_normals", "_features")
        }
        return self._fields(**taken, _num_points=self._num_points[members])

    @property
    def valid(self) -> Bool[Tensor, " B"]:
        """Whether each cloud has at least one point."""
        return self._num_points > 0

    @property
    def equisized(self) -> bool:
        return bool((self._num_points == self._num_points[:1]).all())

    def isempty(self) -> bool:
        return len(self._points) == 0

    def num_points_per_cloud(self) -> Int[Tensor, " B"]:
        return self._num_points

    def packed_to_cloud_idx(self) -> Int[Tensor, " P"]:
        return owner_of(self._num_points)

    def cloud_to_packed_first_idx(self) -> Int[Tensor, " B"]:
        return starts(self._num_points)

    def padded_to_packed_idx(self) -> Int[Tensor, " P"]:
        """Row of each packed point in `points_padded().view(-1, 3)`."""
        longest = int(self._num_points.max()) if len(self) else 0
        owner = self.packed_to_cloud_idx()
        return torch.arange(len(self._points), device=self.device) - starts(self._num_points)[owner] + owner * longest

    def points_packed(self) -> Float[Tensor, "P 3"]:
        return self._points

    def points_list(self) -> list[Tensor]:
        return to_list(self._points, self._num_points)

    def points_padded(self) -> Float[Tensor, "B P 3"]:
        return to_padded(self._points, self._num_points, 0.0)

    def normals_packed(self) -> Float[Tensor, "P 3"] | None:
        return self._normals

    def normals_list(self) -> list[Tensor] | None:
        return None if self._normals is None else to_list(self._normals, self._num_points)

    def normals_padded(self) -> Float[Tensor, "B P 3"] | None:
        return None if self._normals is None else to_padded(self._normals, self._num_points, 0.0)

    def features_packed(self) -> Float[Tensor, "P C"] | None:
        return self._features

    def features_list(self) -> list[Tensor] | None:
        return None if self._features is None else to_list(self._features, self._num_points)

    def features_padded(self) -> Float[Tensor, "B P C"] | None:
        return None if self._features is None else to_padded(self._features, self._num_points, 0.0)

    def get_cloud(self, index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Points, normals and features of one cloud."""
        one = self[index]
        return one._points, one._normals, one._features

    def inside_box(self, box: Float[Tensor, "2 3"] | Float[Tensor, "B 2 3"]) -> Bool[Tensor, " P"]:
        """Whether each packed point is in its cloud's box of (low, high) corners, or in the one of all; borders count.

        Raises ValueError for a box whose low corner is above its high one.
        """
        if box.shape not in ((2, 3), (1, 2, 3), (len(self), 2, 3)):
            raise ValueError(f"box must be (2, 3) or ({len(self)}, 2, 3), got {tuple(box.shape)}")
        low, high = box.expand(len(self), 2, 3)[owner_of(self._num_points)].unbind(1)
        if bool((box[..., 0, :] > box[..., 1, :]).any()):
            raise ValueError(f"the low corner of a box must not be above its high one, got {box.tolist()}")
        return ((self._points >= low) & (self._points <= high)).all(1)

    def get_bounding_boxes(self) -> Float[Tensor, "B 3 2"]:
        """Minimum and maximum of each cloud; (+inf, -inf) where it has no point."""
        owner = self.packed_to_cloud_idx()[:, None].expand(-1, 3)
        low = self._points.new_full((len(self), 3), math.inf).scatter_reduce(0, owner, self._points, "amin")
        high = self._points.new_full((len(self), 3), -math.inf).scatter_reduce(0, owner, self._points, "amax")
        return torch.stack([low, high], dim=2)

    def _with_points(self, points: Float[Tensor, "P 3"]) -> "Pointclouds":
        return self._fields(
            _points=points, _normals=self._normals, _features=self._features, _num_points=self._num_points
        )

    def offset(self, offsets: Tensor) -> "Pointclouds":
        """Points moved by packed offsets (P, 3), or all by the same (3,)."""
        if offsets.shape not in (self._points.shape, (3,)):
            raise ValueError(f"offsets must be {tuple(self._points.shape)} or (3,), got {tuple(offsets.shape)}")
        return self._with_points(self._points + offsets)

    def scale(self, scale: float | Tensor) -> "Pointclouds":
        """Points multiplied by one number, or by one per cloud (B,)."""
        if isinstance(scale, Tensor) and scale.ndim:
            check_shape(scale=(scale, str(len(self))))
            scale = scale[self.packed_to_cloud_idx()][:, None]
        return self._with_points(self._points * scale)

    def update_padded(
        self, points: Tensor, normals: Tensor | None = None, features: Tensor | None = None
    ) -> "Pointclouds":
        """The same counts with new points (and normals, features), given padded."""
        check_shape(points=(points, f"{len(self)} {int(self._num_points.max())} 3"))
        rows = self.padded_to_packed_idx()
        return self._fields(
            _points=points.flatten(0, 1)[rows],
            _normals=self._normals if normals is None else normals.flatten(0, 1)[rows],
            _features=self._features if features is None else features.flatten(0, 1)[rows],
            _num_points=self._num_points,
        )

    def extend(self, count: int) -> "Pointclouds":
        """Each cloud `count` times in a row: a a b b."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return self[torch.arange(len(self), device=self.device).repeat_interleave(count)]

    def split(self, sizes: Sequence[int]) -> list["Pointclouds"]:
        """The batch cut into batches of these sizes."""
        if sum(sizes) != len(self):
            raise ValueError(f"sizes must sum to the {len(self)} clouds of the batch, got {list(sizes)}")
        return [self[part] for part in torch.arange(len(self), device=self.device).split(list(sizes))]

    def subsample(
        self, max_points: int | Sequence[int] | Tensor, *, generator: torch.Generator | None = None
    ) -> "Pointclouds":
        """At most `max_points` points of each cloud (one number, or one per cloud), drawn without replacement."""
        limits = [max_points] * len(self) if isinstance(max_points, int) else [int(limit) for limit in max_points]
        if len(limits) != len(self):
            raise ValueError(f"max_points must be one number or {len(self)}, got {len(limits)}")
        kept, counts = [], []
        for first, count, limit in zip(starts(self._num_points).tolist(), self._num_points.tolist(), limits):
            chosen = torch.randperm(count, generator=generator)[:limit] if limit < count else torch.arange(count)
            kept.append(first + chosen)
            counts.append(len(chosen))
        rows = torch.cat(kept).to(self.device)
        return self._fields(
            _points=self._points[rows],
            _normals=None if self._normals is None else self._normals[rows],
            _features=None if self._features is None else self._features[rows],
            _num_points=torch.tensor(counts, device=self.device),
        )


def join_pointclouds_as_batch(clouds: Sequence[Pointclouds]) -> Pointclouds:
    """All clouds of several batches in one; normals and features must be in each or in none."""
    clouds = list(clouds)
    if not clouds:
        raise ValueError("clouds must have at least one batch, got an empty list")
    joined: dict[str, Tensor | None] = {}
    for name in ("_points", "_normals", "_features"):
        parts = [batch.__dict__[name] for batch in clouds]
        present = [part is not None for part in parts]
        if any(present) and not all(present):
            raise ValueError(f"{name[1:]} must be in every batch or in none; batch {present.index(False)} has none")
        joined[name] = torch.cat(parts) if all(present) else None
    return clouds[0]._fields(**joined, _num_points=torch.cat([batch._num_points for batch in clouds]))


def join_pointclouds_as_scene(clouds: Pointclouds | Sequence[Pointclouds]) -> Pointclouds:
    """All points as one cloud of a batch of one."""
    batch = clouds if isinstance(clouds, Pointclouds) else join_pointclouds_as_batch(clouds)
    fields = {name: batch.__dict__[name] for name in ("_points", "_normals", "_features")}
    return batch._fields(**fields, _num_points=batch._num_points.sum()[None])
