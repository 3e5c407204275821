"""Ragged batches of meshes and point clouds, cameras, frames and grids.

All are immutable and picklable. Meshes and point clouds store one packed tensor and one count per member; lists, padded
tensors and topology are derived from it, so nothing can go stale. Accessor names are PyTorch3D's: code written for its
`Meshes` and `Pointclouds` runs on these.

Differs: no in-place twins (`offset_verts_`, `scale_verts_`), textures are attributes, empty members are allowed
everywhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice, check_shape

# ---------------------------------------------------------------------------------------------- packed storage


def _pack(name: str, value: Sequence[Tensor] | Tensor, row: str, pad: float | None = None) -> tuple[Tensor, Tensor]:
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


def _first(counts: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Index of each member's first row in the packed tensor."""
    return counts.cumsum(0) - counts


def _owner(counts: Int[Tensor, " B"]) -> Int[Tensor, " N"]:
    """The member each packed row belongs to."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _to_list(packed: Tensor, counts: Int[Tensor, " B"]) -> list[Tensor]:
    return list(packed.split(counts.tolist()))


def _to_padded(packed: Tensor, counts: Int[Tensor, " B"], value: float) -> Tensor:
    """(B, max rows, ...), rows beyond a member's own filled with `value`."""
    longest = int(counts.max()) if len(counts) else 0
    padded = packed.new_full((len(counts), longest, *packed.shape[1:]), value)
    owner = _owner(counts)
    padded[owner, torch.arange(len(packed), device=packed.device) - _first(counts)[owner]] = packed
    return padded


def _take(packed: Tensor, counts: Int[Tensor, " B"], members: Int[Tensor, " M"]) -> Tensor:
    """Packed rows of the chosen members, in the order chosen."""
    taken = counts[members]
    owner = _owner(taken)
    offset = torch.arange(int(taken.sum()), device=packed.device) - _first(taken)[owner]
    return packed[_first(counts)[members][owner] + offset]


def _select(index: Any, length: int, device: torch.device) -> Int[Tensor, " M"]:
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


_Batch = TypeVar("_Batch", bound="_Ragged")


class _Ragged:
    """What `Meshes` and `Pointclouds` share: moving, indexing and splitting through their fields."""

    _tensors: tuple[str, ...]  # fields that hold a tensor
    _dicts: tuple[str, ...]  # fields that hold a dict of tensors

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: build a new one instead of setting {name!r}")

    def _fields(self: _Batch, **fields: Any) -> _Batch:
        """A new object of the same class with these fields and nothing cached."""
        new = object.__new__(type(self))
        new.__dict__.update(fields)
        return new

    def _map(self: _Batch, function: Any) -> _Batch:
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

    def to(self: _Batch, device: torch.device | str) -> _Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def pin_memory(self: _Batch) -> _Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def cpu(self: _Batch) -> _Batch:
        return self.to("cpu")

    def cuda(self: _Batch) -> _Batch:
        return self.to("cuda")

    def clone(self: _Batch) -> _Batch:
        return self._map(lambda tensor: tensor.clone())

    def detach(self: _Batch) -> _Batch:
        return self._map(lambda tensor: tensor.detach())


def _pack_attributes(
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
        tensor, own = _pack(f"{kind}_attributes[{name!r}]", value, "N C")
        if not torch.equal(own.to(counts.device), counts):
            raise ValueError(
                f"{kind}_attributes[{name!r}] must have {counts.tolist()} rows per member, got {own.tolist()}"
            )
        packed[name] = tensor
    return packed


# ------------------------------------------------------------------------------------------------------ meshes


class Meshes(_Ragged):
    """A batch of triangle meshes with any number of vertices and faces each.

    verts: list of (V_i, 3) or padded (B, V, 3); faces: list of (F_i, 3) int64 into the member's own vertices, or padded
    (B, F, 3) with -1. `verts_attributes` and `faces_attributes` (dicts of lists, or of packed tensors) follow every
    operation. Raises ValueError, naming the member and the face, when an index points at no vertex.
    """

    _tensors = ("_verts", "_faces", "_num_verts", "_num_faces")
    _dicts = ("_verts_attributes", "_faces_attributes")
    _verts: Tensor  # (V, 3)
    _faces: Tensor  # (F, 3) into _verts
    _num_verts: Tensor  # (B,)
    _num_faces: Tensor  # (B,)
    _verts_attributes: dict[str, Tensor]
    _faces_attributes: dict[str, Tensor]

    def __init__(
        self,
        verts: Sequence[Tensor] | Tensor,
        faces: Sequence[Tensor] | Tensor,
        *,
        verts_attributes: Mapping[str, Sequence[Tensor] | Tensor] | None = None,
        faces_attributes: Mapping[str, Sequence[Tensor] | Tensor] | None = None,
    ):
        verts_packed, num_verts = _pack("verts", verts, "V 3")
        faces_local, num_faces = _pack("faces", faces, "F 3", pad=-1)
        check_shape(verts=(verts_packed, "V 3"), faces=(faces_local, "F 3"))
        if len(num_verts) != len(num_faces):
            raise ValueError(f"verts and faces must have as many members, got {len(num_verts)} and {len(num_faces)}")
        if not verts_packed.is_floating_point() or faces_local.is_floating_point():
            raise ValueError(
                f"verts must be floating and faces int64, got {verts_packed.dtype} and {faces_local.dtype}"
            )
        faces_local = faces_local.long()
        owner = _owner(num_faces)
        outside = ((faces_local < 0) | (faces_local >= num_verts[owner][:, None])).any(1)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            member = int(owner[row])
            raise ValueError(
                f"faces of mesh {member}: face {row - int(_first(num_faces)[member])} is {faces_local[row].tolist()}, "
                f"but the mesh has {int(num_verts[member])} vertices"
            )
        self.__dict__.update(
            _verts=verts_packed,
            _faces=faces_local + _first(num_verts)[owner][:, None],
            _num_verts=num_verts,
            _num_faces=num_faces,
            _verts_attributes=_pack_attributes("verts", verts_attributes, num_verts, len(verts_packed)),
            _faces_attributes=_pack_attributes("faces", faces_attributes, num_faces, len(faces_local)),
        )

    @classmethod
    def _of_packed(
        cls, verts: Tensor, faces: Tensor, num_verts: Tensor, num_faces: Tensor, faces_attributes: dict[str, Tensor]
    ) -> "Meshes":
        """A batch of what an operator made packed: nothing is copied, and nothing checked."""
        return object.__new__(cls)._fields(
            _verts=verts,
            _faces=faces,
            _num_verts=num_verts,
            _num_faces=num_faces,
            _verts_attributes={},
            _faces_attributes=faces_attributes,
        )

    def __len__(self) -> int:
        return len(self._num_verts)

    def __repr__(self) -> str:
        return (
            f"Meshes(verts={self._num_verts.tolist()}, faces={self._num_faces.tolist()}, device={str(self.device)!r})"
        )

    def __getitem__(self, index: Any) -> "Meshes":
        """The chosen members (int, slice, list, index or mask tensor) as a batch."""
        members = _select(index, len(self), self.device)
        num_verts, num_faces = self._num_verts[members], self._num_faces[members]
        local = self._faces - _first(self._num_verts)[_owner(self._num_faces)][:, None]
        faces = _take(local, self._num_faces, members) + _first(num_verts)[_owner(num_faces)][:, None]
        return self._fields(
            _verts=_take(self._verts, self._num_verts, members),
            _faces=faces,
            _num_verts=num_verts,
            _num_faces=num_faces,
            _verts_attributes={k: _take(v, self._num_verts, members) for k, v in self._verts_attributes.items()},
            _faces_attributes={k: _take(v, self._num_faces, members) for k, v in self._faces_attributes.items()},
        )

    # counts and maps between the storages

    @property
    def valid(self) -> Bool[Tensor, " B"]:
        """Whether each member has at least one face."""
        return self._num_faces > 0

    @property
    def equisized(self) -> bool:
        """Whether all members have the same number of vertices and of faces."""
        return bool((self._num_verts == self._num_verts[:1]).all() and (self._num_faces == self._num_faces[:1]).all())

    def isempty(self) -> bool:
        """Whether no member has a face."""
        return len(self._faces) == 0

    def num_verts_per_mesh(self) -> Int[Tensor, " B"]:
        return self._num_verts

    def num_faces_per_mesh(self) -> Int[Tensor, " B"]:
        return self._num_faces

    def num_edges_per_mesh(self) -> Int[Tensor, " B"]:
        return torch.bincount(self.edges_packed_to_mesh_idx(), minlength=len(self))

    def verts_packed_to_mesh_idx(self) -> Int[Tensor, " V"]:
        return _owner(self._num_verts)

    def faces_packed_to_mesh_idx(self) -> Int[Tensor, " F"]:
        return _owner(self._num_faces)

    def edges_packed_to_mesh_idx(self) -> Int[Tensor, " E"]:
        return self.verts_packed_to_mesh_idx()[self.edges_packed()[:, 0]]

    def mesh_to_verts_packed_first_idx(self) -> Int[Tensor, " B"]:
        return _first(self._num_verts)

    def mesh_to_faces_packed_first_idx(self) -> Int[Tensor, " B"]:
        return _first(self._num_faces)

    def mesh_to_edges_packed_first_idx(self) -> Int[Tensor, " B"]:
        return _first(self.num_edges_per_mesh())

    def verts_padded_to_packed_idx(self) -> Int[Tensor, " V"]:
        """Row of each packed vertex in `verts_padded().view(-1, 3)`."""
        longest = int(self._num_verts.max()) if len(self) else 0
        owner = self.verts_packed_to_mesh_idx()
        return torch.arange(len(self._verts), device=self.device) - _first(self._num_verts)[owner] + owner * longest

    # vertices and faces

    def verts_packed(self) -> Float[Tensor, "V 3"]:
        return self._verts

    def verts_list(self) -> list[Tensor]:
        return _to_list(self._verts, self._num_verts)

    def verts_padded(self) -> Float[Tensor, "B V 3"]:
        """(B, max V, 3), filled with 0."""
        return _to_padded(self._verts, self._num_verts, 0.0)

    def faces_packed(self) -> Int[Tensor, "F 3"]:
        """Faces of all members, as indices into `verts_packed()`."""
        return self._faces

    def _faces_local(self) -> Int[Tensor, "F 3"]:
        return self._faces - _first(self._num_verts)[_owner(self._num_faces)][:, None]

    def faces_list(self) -> list[Tensor]:
        """Faces of each member, as indices into its own vertices."""
        return _to_list(self._faces_local(), self._num_faces)

    def faces_padded(self) -> Int[Tensor, "B F 3"]:
        """(B, max F, 3) indices into each member's own vertices, filled with -1."""
        return _to_padded(self._faces_local(), self._num_faces, -1)

    def get_mesh_verts_faces(self, index: int) -> tuple[Tensor, Tensor]:
        """Vertices (V, 3) and faces (F, 3) of one member."""
        one = self[index]
        return one._verts, one._faces

    def verts_attributes_packed(self) -> dict[str, Tensor]:
        """Attributes with one row per packed vertex."""
        return dict(self._verts_attributes)

    def faces_attributes_packed(self) -> dict[str, Tensor]:
        """Attributes with one row per packed face."""
        return dict(self._faces_attributes)

    # topology

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor]:
        """Unique undirected edges (E, 2) sorted by (low, high), and each face's three edges (opposite v0, v1, v2)."""
        v0, v1, v2 = self._faces.unbind(1)
        pairs = torch.stack([torch.cat([v1, v2, v0]), torch.cat([v2, v0, v1])], dim=1).sort(dim=1).values  # (3F, 2)
        key = pairs[:, 0] * max(len(self._verts), 1) + pairs[:, 1]
        unique, inverse = torch.unique(key, return_inverse=True)
        divisor = max(len(self._verts), 1)
        edges = torch.stack([unique // divisor, unique % divisor], dim=1)
        return edges, inverse.view(3, -1).t()

    def edges_packed(self) -> Int[Tensor, "E 2"]:
        """Unique undirected edges as indices into `verts_packed()`, lower index first, sorted."""
        return self._edges[0]

    def faces_packed_to_edges_packed(self) -> Int[Tensor, "F 3"]:
        """The edges opposite to each face's vertices 0, 1 and 2."""
        return self._edges[1]

    # normals and areas

    @cached_property
    def _area_vectors(self) -> Tensor:
        """(F, 3) cross products of two edges: twice the area, along the normal."""
        v0, v1, v2 = self._verts[self._faces].unbind(1)
        return torch.linalg.cross(v1 - v0, v2 - v0)

    def faces_areas_packed(self) -> Float[Tensor, " F"]:
        return 0.5 * _norm(self._area_vectors)

    def faces_normals_packed(self) -> Float[Tensor, "F 3"]:
        """Unit normals, counter-clockwise faces looking at you; zero for faces without area."""
        return _unit(self._area_vectors)

    def verts_normals_packed(self) -> Float[Tensor, "V 3"]:
        """Unit vertex normals, the adjacent faces' normals summed with their areas as weights; zero without faces."""
        summed = torch.zeros_like(self._verts)
        for corner in range(3):
            summed = summed.index_add(0, self._faces[:, corner], self._area_vectors)
        return _unit(summed)

    def faces_normals_list(self) -> list[Tensor]:
        return _to_list(self.faces_normals_packed(), self._num_faces)

    def faces_normals_padded(self) -> Float[Tensor, "B F 3"]:
        return _to_padded(self.faces_normals_packed(), self._num_faces, 0.0)

    def verts_normals_list(self) -> list[Tensor]:
        return _to_list(self.verts_normals_packed(), self._num_verts)

    def verts_normals_padded(self) -> Float[Tensor, "B V 3"]:
        return _to_padded(self.verts_normals_packed(), self._num_verts, 0.0)

    def laplacian_packed(self) -> Tensor:
        """Uniform Laplacian, sparse (V, V): row i is the mean of i's neighbours minus i; zero where i has none."""
        i, j = self.edges_packed().unbind(1)
        rows, columns = torch.cat([i, j]), torch.cat([j, i])
        count = len(self._verts)
        degree = torch.bincount(rows, minlength=count)
        alone = degree == 0
        values = 1.0 / degree[rows].to(self._verts.dtype)
        diagonal = torch.arange(count, device=self.device)
        indices = torch.stack([torch.cat([rows, diagonal]), torch.cat([columns, diagonal])])
        return torch.sparse_coo_tensor(
            indices, torch.cat([values, alone.to(values.dtype) - 1.0]), (count, count), check_invariants=False
        ).coalesce()

    def get_bounding_boxes(self) -> Float[Tensor, "B 3 2"]:
        """Minimum and maximum of each member along x, y, z.

        Differs: PyTorch3D raises IndexError on a member without vertices; here its box is inverted (+inf, -inf), the
        box that contains nothing.
        """
        owner = self.verts_packed_to_mesh_idx()[:, None].expand(-1, 3)
        low = self._verts.new_full((len(self), 3), math.inf).scatter_reduce(0, owner, self._verts, "amin")
        high = self._verts.new_full((len(self), 3), -math.inf).scatter_reduce(0, owner, self._verts, "amax")
        return torch.stack([low, high], dim=2)

    # new batches

    def _with_verts(self, verts: Float[Tensor, "V 3"]) -> "Meshes":
        fields = {name: self.__dict__[name] for name in (*self._tensors, *self._dicts)}
        new = self._fields(**fields | {"_verts": verts})
        if "_edges" in self.__dict__:  # topology does not depend on positions
            new.__dict__["_edges"] = self._edges
        return new

    def offset_verts(self, offsets: Tensor) -> "Meshes":
        """Vertices moved by packed offsets (V, 3), or all by the same (3,)."""
        if offsets.shape not in (self._verts.shape, (3,)):
            raise ValueError(f"offsets must be {tuple(self._verts.shape)} or (3,), got {tuple(offsets.shape)}")
        return self._with_verts(self._verts + offsets)

    def scale_verts(self, scale: float | Tensor) -> "Meshes":
        """Vertices multiplied by one number, or by one per member (B,)."""
        if isinstance(scale, Tensor) and scale.ndim:
            check_shape(scale=(scale, str(len(self))))
            scale = scale[self.verts_packed_to_mesh_idx()][:, None]
        return self._with_verts(self._verts * scale)

    def update_padded(self, verts: Float[Tensor, "B V 3"]) -> "Meshes":
        """The same topology with new vertices, given padded."""
        check_shape(verts=(verts, f"{len(self)} {int(self._num_verts.max())} 3"))
        return self._with_verts(verts.flatten(0, 1)[self.verts_padded_to_packed_idx()])

    def extend(self, count: int) -> "Meshes":
        """Each member `count` times in a row: a a b b."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return self[torch.arange(len(self), device=self.device).repeat_interleave(count)]

    def split(self, sizes: Sequence[int]) -> list["Meshes"]:
        """The batch cut into batches of these sizes."""
        if sum(sizes) != len(self):
            raise ValueError(f"sizes must sum to the {len(self)} meshes of the batch, got {list(sizes)}")
        return [self[part] for part in torch.arange(len(self), device=self.device).split(list(sizes))]

    def submeshes(self, face_indices: Sequence[Sequence[Tensor]]) -> "Meshes":
        """For each member, one mesh per given set of its faces, keeping only the vertices these use."""
        if len(face_indices) != len(self):
            raise ValueError(f"face_indices must have {len(self)} entries, one per mesh, got {len(face_indices)}")
        parts = []
        for index, chosen in enumerate(face_indices):
            member = self[index]
            for faces_kept in chosen:
                faces = member._faces[faces_kept]
                used, renumbered = torch.unique(faces, return_inverse=True)
                parts.append(
                    Meshes(
                        [member._verts[used]],
                        [renumbered.view(-1, 3)],
                        verts_attributes={k: [v[used]] for k, v in member._verts_attributes.items()},
                        faces_attributes={k: [v[faces_kept]] for k, v in member._faces_attributes.items()},
                    )
                )
        return join_meshes_as_batch(parts)


def join_meshes_as_batch(meshes: Sequence[Meshes]) -> Meshes:
    """All members of several batches in one; attributes must have the same names in each."""
    meshes = list(meshes)
    if not meshes:
        raise ValueError("meshes must have at least one batch, got an empty list")
    verts_names, faces_names = (set(getattr(meshes[0], name)) for name in Meshes._dicts)
    for index, batch in enumerate(meshes):
        if set(batch._verts_attributes) != verts_names or set(batch._faces_attributes) != faces_names:
            own = [sorted(batch._verts_attributes), sorted(batch._faces_attributes)]
            raise ValueError(
                f"meshes[{index}] has vertex and face attributes {own}, meshes[0] has "
                f"{[sorted(verts_names), sorted(faces_names)]}"
            )
    first = torch.tensor([0, *(len(batch._verts) for batch in meshes[:-1])]).cumsum(0).tolist()
    return meshes[0]._fields(
        _verts=torch.cat([batch._verts for batch in meshes]),
        _faces=torch.cat([batch._faces + offset for batch, offset in zip(meshes, first)]),
        _num_verts=torch.cat([batch._num_verts for batch in meshes]),
        _num_faces=torch.cat([batch._num_faces for batch in meshes]),
        _verts_attributes={k: torch.cat([batch._verts_attributes[k] for batch in meshes]) for k in verts_names},
        _faces_attributes={k: torch.cat([batch._faces_attributes[k] for batch in meshes]) for k in faces_names},
    )


def join_meshes_as_scene(meshes: Meshes | Sequence[Meshes]) -> Meshes:
    """All members as one mesh of a batch of one."""
    batch = meshes if isinstance(meshes, Meshes) else join_meshes_as_batch(meshes)
    return batch._fields(
        _verts=batch._verts,
        _faces=batch._faces,
        _num_verts=batch._num_verts.sum()[None],
        _num_faces=batch._num_faces.sum()[None],
        _verts_attributes=batch.verts_attributes_packed(),
        _faces_attributes=batch.faces_attributes_packed(),
    )


def _norm(vectors: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N"]:
    """Length, with a zero (not NaN) gradient at the zero vector."""
    squared = vectors.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _unit(vectors: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
    """Vectors of length one, zero where the vector is zero, whatever the scale."""
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)  # areas of tiny meshes would underflow when squared
    length = _norm(scaled)[..., None]
    return scaled / torch.where(length > 0, length, 1.0)


# ------------------------------------------------------------------------------------------------ point clouds


class Pointclouds(_Ragged):
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
        packed, counts = _pack("points", points, "P 3")
        check_shape(points=(packed, "P 3"))
        extra: dict[str, Tensor | None] = {}
        for name, value in (("normals", normals), ("features", features)):
            extra[name] = None
            if value is not None:
                extra[name], own = _pack(name, value, "P 3" if name == "normals" else "P C")
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
        members = _select(index, len(self), self.device)
        taken = {
            name: None if self.__dict__[name] is None else _take(self.__dict__[name], self._num_points, members)
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
        return _owner(self._num_points)

    def cloud_to_packed_first_idx(self) -> Int[Tensor, " B"]:
        return _first(self._num_points)

    def padded_to_packed_idx(self) -> Int[Tensor, " P"]:
        """Row of each packed point in `points_padded().view(-1, 3)`."""
        longest = int(self._num_points.max()) if len(self) else 0
        owner = self.packed_to_cloud_idx()
        return torch.arange(len(self._points), device=self.device) - _first(self._num_points)[owner] + owner * longest

    def points_packed(self) -> Float[Tensor, "P 3"]:
        return self._points

    def points_list(self) -> list[Tensor]:
        return _to_list(self._points, self._num_points)

    def points_padded(self) -> Float[Tensor, "B P 3"]:
        return _to_padded(self._points, self._num_points, 0.0)

    def normals_packed(self) -> Float[Tensor, "P 3"] | None:
        return self._normals

    def normals_list(self) -> list[Tensor] | None:
        return None if self._normals is None else _to_list(self._normals, self._num_points)

    def normals_padded(self) -> Float[Tensor, "B P 3"] | None:
        return None if self._normals is None else _to_padded(self._normals, self._num_points, 0.0)

    def features_packed(self) -> Float[Tensor, "P C"] | None:
        return self._features

    def features_list(self) -> list[Tensor] | None:
        return None if self._features is None else _to_list(self._features, self._num_points)

    def features_padded(self) -> Float[Tensor, "B P C"] | None:
        return None if self._features is None else _to_padded(self._features, self._num_points, 0.0)

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
        low, high = box.expand(len(self), 2, 3)[_owner(self._num_points)].unbind(1)
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
        for first, count, limit in zip(_first(self._num_points).tolist(), self._num_points.tolist(), limits):
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


# ------------------------------------------------------------------------------------------------------ camera

# OpenGL and Blender cameras look along -z with y up; PyTorch3D's look along +z with x left and y up.
_FLIP_YZ = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
_FLIP_XY = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))


class Projection(NamedTuple):
    pixels: Tensor  # (..., N, 2) u right, v down; pixel (row 0, column 0) covers [0, 1) x [0, 1)
    depth: Tensor  # (..., N) along the optical axis


class OpenGLCamera(NamedTuple):
    view: Tensor  # (..., 4, 4) world to eye, looking along -z
    projection: Tensor  # (..., 4, 4) eye to clip


class PyTorch3DCamera(NamedTuple):
    R: Tensor  # (..., 3, 3) applied to row vectors: x R + T
    T: Tensor  # (..., 3)
    focal_length: Tensor  # (..., 2) pixels, for PerspectiveCameras(in_ndc=False)
    principal_point: Tensor  # (..., 2) pixels
    image_size: Tensor  # (..., 2) height, width


class Open3DCamera(NamedTuple):
    intrinsic: Tensor  # (..., 3, 3) pixels, centres at integers: Open3D's convention
    extrinsic: Tensor  # (..., 4, 4) world to camera
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole cameras in OpenCV's convention: x right, y down, z forward; x_cam = rotation @ x_world + translation.

    rotation (..., 3, 3), translation (..., 3), intrinsics (..., 3, 3) in pixels with pixel (row 0, column 0) covering
    u, v in [0, 1), image_size (H, W). Leading dimensions are a batch of cameras with one image size.
    """

    rotation: Float[Tensor, "*B 3 3"]
    translation: Float[Tensor, "*B 3"]
    intrinsics: Float[Tensor, "*B 3 3"]
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        lead = self.translation.shape[:-1]
        if self.rotation.shape != (*lead, 3, 3) or self.intrinsics.shape != (*lead, 3, 3):
            raise ValueError(
                f"rotation and intrinsics must be {(*lead, 3, 3)} like translation {tuple(self.translation.shape)}, "
                f"got {tuple(self.rotation.shape)} and {tuple(self.intrinsics.shape)}"
            )

    def __len__(self) -> int:
        if self.translation.ndim < 2:
            raise TypeError("a single Camera has no length; stack cameras with Camera.stack")
        return len(self.translation)

    def __getitem__(self, index: Any) -> "Camera":
        return Camera(self.rotation[index], self.translation[index], self.intrinsics[index], self.image_size)

    @staticmethod
    def stack(cameras: Sequence["Camera"]) -> "Camera":
        """A batch of cameras; all must have one image size."""
        sizes = {camera.image_size for camera in cameras}
        if len(sizes) != 1:
            raise ValueError(f"cameras must be at least one and share one image size, got {sorted(sizes)}")
        return Camera(
            torch.stack([camera.rotation for camera in cameras]),
            torch.stack([camera.translation for camera in cameras]),
            torch.stack([camera.intrinsics for camera in cameras]),
            sizes.pop(),
        )

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> "Camera":
        moved = (self.rotation.to(device_or_dtype), self.translation.to(device_or_dtype))
        return Camera(*moved, self.intrinsics.to(device_or_dtype), self.image_size)

    @property
    def center(self) -> Float[Tensor, "*B 3"]:
        """Position of the camera in the world."""
        return -(self.rotation.transpose(-1, -2) @ self.translation[..., None])[..., 0]

    def world_to_camera(self, points: Float[Tensor, "*B N 3"]) -> Float[Tensor, "*B N 3"]:
        return points @ self.rotation.transpose(-1, -2) + self.translation[..., None, :]

    def camera_to_world(self, points: Float[Tensor, "*B N 3"]) -> Float[Tensor, "*B N 3"]:
        return (points - self.translation[..., None, :]) @ self.rotation

    def project(self, points: Float[Tensor, "*B N 3"]) -> Projection:
        """Pixels and depths of world points; points on the camera's plane project to infinity."""
        local = self.world_to_camera(points)
        homogeneous = local @ self.intrinsics.transpose(-1, -2)
        return Projection(homogeneous[..., :2] / homogeneous[..., 2:], local[..., 2])

    def unproject(self, pixels: Float[Tensor, "*B N 2"], depth: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N 3"]:
        """World points seen at these pixels at these depths along the optical axis."""
        rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        rays = torch.linalg.solve(self.intrinsics, rays.transpose(-1, -2)).transpose(-1, -2)
        return self.camera_to_world(rays * depth[..., None])

    def resize(self, image_size: tuple[int, int]) -> "Camera":
        """The same cameras for the image resized to (H, W)."""
        scale = torch.ones_like(self.intrinsics)
        scale[..., 0, :] = image_size[1] / self.image_size[1]
        scale[..., 1, :] = image_size[0] / self.image_size[0]
        return Camera(self.rotation, self.translation, self.intrinsics * scale, image_size)

    @staticmethod
    def look_at(
        eye: Sequence[float] | Tensor,
        target: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
        up: Sequence[float] | Tensor = (0.0, 1.0, 0.0),
        *,
        field_of_view: float,
        image_size: tuple[int, int],
    ) -> "Camera":
        """A camera at `eye` looking at `target`, with a vertical field of view in degrees; float64."""
        eye, target, up = (torch.as_tensor(v, dtype=torch.float64) for v in (eye, target, up))
        forward = target - eye
        right = torch.linalg.cross(forward, up)
        if float(right.norm()) < 1e-9 * max(float(forward.norm()), 1e-300):
            raise ValueError(f"up {up.tolist()} must not be parallel to the viewing direction {forward.tolist()}")
        forward, right = forward / forward.norm(), right / right.norm()
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        focal = 0.5 * image_size[0] / math.tan(math.radians(field_of_view) / 2)
        return Camera(rotation, -rotation @ eye, _intrinsics(focal, image_size), image_size)

    @staticmethod
    def from_r2n2(azimuth: float, elevation: float, distance_ratio: float, image_size: int = 137) -> "Camera":
        """The camera of 3D-R2N2's renderings from a line of rendering_metadata.txt (degrees, distance 1.75 * ratio).

        Source: 3D-R2N2's Blender script (35 mm lens, 32 mm sensor), in OpenCV axes; the world is ShapeNet's (+y up).
        Differs: the file's fifth column (25) is not the field of view (49.1 degrees) and is not used.
        """
        a, e = math.radians(-azimuth), math.radians(-elevation)
        ca, sa, ce, se = math.cos(a), math.sin(a), math.cos(e), math.sin(e)
        world = torch.tensor([[ca * ce, sa * ce, -se], [-sa, ca, 0.0], [ca * se, sa * se, ce]], dtype=torch.float64)
        axes = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        import_axes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        rotation = _FLIP_YZ @ axes @ world @ import_axes
        translation = -_FLIP_YZ @ axes @ torch.tensor([1.75 * distance_ratio, 0.0, 0.0], dtype=torch.float64)
        focal = 35.0 / 32.0 * image_size
        return Camera(rotation, translation, _intrinsics(focal, (image_size, image_size)), (image_size, image_size))

    def to_opengl(self, near: float = 0.01, far: float = 100.0) -> OpenGLCamera:
        """View matrix (eye looks along -z) and projection to clip space, y up, depth -1..1."""
        flip = _FLIP_YZ.to(self.rotation)
        view = _rigid(flip @ self.rotation, self.translation @ flip)
        height, width = self.image_size
        k = self.intrinsics
        projection = torch.zeros_like(view)
        projection[..., 0, 0] = 2 * k[..., 0, 0] / width
        projection[..., 0, 1] = -2 * k[..., 0, 1] / width
        projection[..., 0, 2] = 1 - 2 * k[..., 0, 2] / width
        projection[..., 1, 1] = 2 * k[..., 1, 1] / height
        projection[..., 1, 2] = 2 * k[..., 1, 2] / height - 1
        projection[..., 2, 2] = -(far + near) / (far - near)
        projection[..., 2, 3] = -2 * far * near / (far - near)
        projection[..., 3, 2] = -1
        return OpenGLCamera(view, projection)

    @staticmethod
    def from_opengl(view: Tensor, projection: Tensor, image_size: tuple[int, int]) -> "Camera":
        """Inverse of `to_opengl`."""
        flip = _FLIP_YZ.to(view)
        height, width = image_size
        k = torch.zeros_like(view[..., :3, :3])
        k[..., 0, 0] = projection[..., 0, 0] * width / 2
        k[..., 0, 1] = -projection[..., 0, 1] * width / 2
        k[..., 0, 2] = (1 - projection[..., 0, 2]) * width / 2
        k[..., 1, 1] = projection[..., 1, 1] * height / 2
        k[..., 1, 2] = (1 + projection[..., 1, 2]) * height / 2
        k[..., 2, 2] = 1
        return Camera(flip @ view[..., :3, :3], view[..., :3, 3] @ flip, k, image_size)

    def to_blender(self) -> Float[Tensor, "*B 4 4"]:
        """Camera-to-world matrices of a camera that looks along -z with y up (Blender, NeRF)."""
        flip = _FLIP_YZ.to(self.rotation)
        return _rigid(self.rotation.transpose(-1, -2) @ flip, self.center)

    @staticmethod
    def from_blender(matrix: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> "Camera":
        """Inverse of `to_blender`."""
        rotation = _FLIP_YZ.to(matrix) @ matrix[..., :3, :3].transpose(-1, -2)
        translation = -(rotation @ matrix[..., :3, 3:])[..., 0]
        return Camera(rotation, translation, intrinsics, image_size)

    def to_pytorch3d(self) -> PyTorch3DCamera:
        """Arguments of PyTorch3D's `PerspectiveCameras(..., in_ndc=False)` (+x left, +y up, row vectors)."""
        flip = _FLIP_XY.to(self.rotation)
        k = self.intrinsics
        size = torch.tensor(self.image_size, dtype=k.dtype, device=k.device).expand(*k.shape[:-2], 2)
        return PyTorch3DCamera(
            R=(flip @ self.rotation).transpose(-1, -2),
            T=self.translation @ flip,
            focal_length=torch.stack([k[..., 0, 0], k[..., 1, 1]], dim=-1),
            principal_point=k[..., :2, 2],
            image_size=size,
        )

    @staticmethod
    def from_pytorch3d(camera: PyTorch3DCamera) -> "Camera":
        """Inverse of `to_pytorch3d`, for zero skew."""
        flip = _FLIP_XY.to(camera.R)
        k = torch.zeros_like(camera.R)
        k[..., 0, 0], k[..., 1, 1] = camera.focal_length.unbind(-1)
        k[..., :2, 2] = camera.principal_point
        k[..., 2, 2] = 1
        height, width = (int(v) for v in camera.image_size.reshape(-1, 2)[0])
        return Camera(flip @ camera.R.transpose(-1, -2), camera.T @ flip, k, (height, width))

    def to_open3d(self) -> Open3DCamera:
        """Intrinsic and extrinsic matrices for Open3D, whose pixel centres are at integers."""
        intrinsic = self.intrinsics.clone()
        intrinsic[..., :2, 2] -= 0.5
        height, width = self.image_size
        return Open3DCamera(intrinsic, _rigid(self.rotation, self.translation), width, height)

    @staticmethod
    def from_open3d(camera: Open3DCamera) -> "Camera":
        """Inverse of `to_open3d`."""
        intrinsics = camera.intrinsic.clone()
        intrinsics[..., :2, 2] += 0.5
        extrinsic = camera.extrinsic
        return Camera(extrinsic[..., :3, :3], extrinsic[..., :3, 3], intrinsics, (camera.height, camera.width))


def _intrinsics(focal: float, image_size: tuple[int, int]) -> Float[Tensor, "3 3"]:
    height, width = image_size
    return torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """(..., 4, 4) matrix of a rotation followed by a translation."""
    matrix = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=rotation.dtype, device=rotation.device)
    matrix[..., :3, :3] = rotation
    matrix[..., :3, 3] = translation
    matrix[..., 3, 3] = 1
    return matrix


# ------------------------------------------------------------------------------------------------------- frame


@dataclass(frozen=True)
class Frame:
    """An invertible normalization, x_frame = (x - center) / scale, kept with every sample and prediction.

    name: which axes the normalized coordinates have ("object": ShapeNet's, +y up, -z front; "camera": OpenCV's).
    """

    name: str
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    def __post_init__(self) -> None:
        values = (*self.center, self.scale)
        if len(self.center) != 3 or not all(math.isfinite(v) for v in values) or self.scale <= 0:
            raise ValueError(f"a Frame needs a finite center of 3 and a scale > 0, got {self.center} and {self.scale}")

    def normalize(self, shape: Any) -> Any:
        """Points (..., 3), `Meshes` or `Pointclouds` from the file's coordinates into this frame."""
        return _affine(shape, 1 / self.scale, [-c / self.scale for c in self.center])

    def denormalize(self, shape: Any) -> Any:
        """Points (..., 3), `Meshes` or `Pointclouds` from this frame back into the file's coordinates."""
        return _affine(shape, self.scale, list(self.center))

    def close_to(self, other: "Frame", tolerance: float = 1e-6) -> bool:
        """Whether both frames have the same axes and the same numbers within a relative tolerance of the scale."""
        if self.name != other.name:
            return False
        bound = tolerance * max(self.scale, other.scale)
        return all(abs(a - b) <= bound for a, b in zip((*self.center, self.scale), (*other.center, other.scale)))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "center": list(self.center), "scale": self.scale}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Frame":
        center = [float(v) for v in values["center"]]
        return Frame(str(values["name"]), (center[0], center[1], center[2]), float(values["scale"]))

    @staticmethod
    def longest_edge(points: Float[Tensor, "N 3"], name: str = "object", length: float = 1.0) -> "Frame":
        """Bounding box centred at 0, its longest edge `length` (Occupancy Networks: 1)."""
        low, high = _box(points)
        return _frame(name, (low + high) / 2, float((high - low).max()) / length)

    @staticmethod
    def unit_diagonal(points: Float[Tensor, "N 3"], name: str = "object") -> "Frame":
        """Bounding box centred at 0, its diagonal 1 (ShapeNetCore)."""
        low, high = _box(points)
        return _frame(name, (low + high) / 2, float((high - low).norm()))

    @staticmethod
    def unit_ball(points: Float[Tensor, "N 3"], name: str = "object") -> "Frame":
        """Mean of the points at 0, the farthest at distance 1 (AtlasNet)."""
        _box(points)
        center = points.double().mean(0)
        return _frame(name, center, float((points.double() - center).norm(dim=1).max()))


def _box(points: Float[Tensor, "N 3"]) -> tuple[Tensor, Tensor]:
    check_shape(points=(points, "N 3"))
    if not len(points):
        raise ValueError("points must not be empty: a shape without points has no frame")
    return points.double().amin(0), points.double().amax(0)


def _frame(name: str, center: Tensor, scale: float) -> Frame:
    x, y, z = center.tolist()
    return Frame(name, (x, y, z), scale)


def _affine(shape: Any, scale: float, offset: list[float]) -> Any:
    """scale * x + offset for points, meshes or clouds (ours or PyTorch3D's)."""
    if isinstance(shape, Tensor):
        return shape * scale + torch.tensor(offset, dtype=shape.dtype, device=shape.device)
    if isinstance(shape, Pointclouds):
        moved = shape.points_packed()
        return shape.scale(scale).offset(torch.tensor(offset, dtype=moved.dtype, device=moved.device))
    moved = shape.verts_packed()
    return shape.scale_verts(scale).offset_verts(torch.tensor(offset, dtype=moved.dtype, device=moved.device))


# -------------------------------------------------------------------------------------------------------- grid


@dataclass(frozen=True)
class GridSpec:
    """Where the samples of a voxel grid (D, H, W) = (z, y, x) lie in the world.

    origin: the grid box's minimal corner (x, y, z); spacing: distance between samples along (x, y, z); shape (D, H, W).
    align "center": sample i lies at origin + (i + 0.5) * spacing, the box has shape * spacing extent, each sample is a
    cell's centre; "corner": at origin + i * spacing, samples lie on the box's faces.
    """

    origin: tuple[float, float, float]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    align: str = field(default="center")

    def __post_init__(self) -> None:
        check_choice("align", self.align, ("center", "corner"))
        if min(self.shape) < 1 or min(self.spacing) <= 0:
            raise ValueError(f"shape must be >= 1 and spacing > 0 along each axis, got {self.shape} and {self.spacing}")

    @staticmethod
    def cube(resolution: int, low: float = -0.5, high: float = 0.5, align: str = "center") -> "GridSpec":
        """`resolution` samples along each axis of the cube [low, high]^3."""
        check_choice("align", align, ("center", "corner"))
        cells = resolution if align == "center" else resolution - 1
        if cells < 1 or high <= low:
            raise ValueError(
                f"a cube needs at least one cell and high > low, got {resolution} samples in [{low}, {high}]"
            )
        step = (high - low) / cells
        return GridSpec((low, low, low), (step, step, step), (resolution, resolution, resolution), align)

    @property
    def _shift(self) -> float:
        return 0.5 if self.align == "center" else 0.0

    def to_world(self, index: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        """World position of (fractional) sample indices given as (x, y, z)."""
        return self._vector(self.origin, index) + (index + self._shift) * self._vector(self.spacing, index)

    def to_index(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        """(Fractional) sample indices (x, y, z) of world points."""
        return (points - self._vector(self.origin, points)) / self._vector(self.spacing, points) - self._shift

    def points(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "D H W 3"]:
        """World positions (x, y, z) of all samples."""
        depth, height, width = (torch.arange(n, dtype=torch.float64) for n in self.shape)
        z, y, x = torch.meshgrid(depth, height, width, indexing="ij")
        return self.to_world(torch.stack([x, y, z], dim=-1)).to(device, dtype)

    @staticmethod
    def _vector(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)
