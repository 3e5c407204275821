"""Batches of triangle meshes."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_shape
from vision3dgen.structures.ragged import (
    Ragged,
    owner_of,
    pack,
    pack_attributes,
    select,
    starts,
    take,
    to_list,
    to_padded,
)


class Meshes(Ragged):
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
        verts_packed, num_verts = pack("verts", verts, "V 3")
        faces_local, num_faces = pack("faces", faces, "F 3", pad=-1)
        check_shape(verts=(verts_packed, "V 3"), faces=(faces_local, "F 3"))
        if len(num_verts) != len(num_faces):
            raise ValueError(f"verts and faces must have as many members, got {len(num_verts)} and {len(num_faces)}")
        if not verts_packed.is_floating_point() or faces_local.is_floating_point():
            raise ValueError(
                f"verts must be floating and faces int64, got {verts_packed.dtype} and {faces_local.dtype}"
            )
        faces_local = faces_local.long()
        owner = owner_of(num_faces)
        outside = ((faces_local < 0) | (faces_local >= num_verts[owner][:, None])).any(1)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            member = int(owner[row])
            raise ValueError(
                f"faces of mesh {member}: face {row - int(starts(num_faces)[member])} is {faces_local[row].tolist()}, "
                f"but the mesh has {int(num_verts[member])} vertices"
            )
        self.__dict__.update(
            _verts=verts_packed,
            _faces=faces_local + starts(num_verts)[owner][:, None],
            _num_verts=num_verts,
            _num_faces=num_faces,
            _verts_attributes=pack_attributes("verts", verts_attributes, num_verts, len(verts_packed)),
            _faces_attributes=pack_attributes("faces", faces_attributes, num_faces, len(faces_local)),
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
        members = select(index, len(self), self.device)
        num_verts, num_faces = self._num_verts[members], self._num_faces[members]
        local = self._faces - starts(self._num_verts)[owner_of(self._num_faces)][:, None]
        faces = take(local, self._num_faces, members) + starts(num_verts)[owner_of(num_faces)][:, None]
        return self._fields(
            _verts=take(self._verts, self._num_verts, members),
            _faces=faces,
            _num_verts=num_verts,
            _num_faces=num_faces,
            _verts_attributes={k: take(v, self._num_verts, members) for k, v in self._verts_attributes.items()},
            _faces_attributes={k: take(v, self._num_faces, members) for k, v in self._faces_attributes.items()},
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
        return owner_of(self._num_verts)

    def faces_packed_to_mesh_idx(self) -> Int[Tensor, " F"]:
        return owner_of(self._num_faces)

    def edges_packed_to_mesh_idx(self) -> Int[Tensor, " E"]:
        return self.verts_packed_to_mesh_idx()[self.edges_packed()[:, 0]]

    def mesh_to_verts_packed_first_idx(self) -> Int[Tensor, " B"]:
        return starts(self._num_verts)

    def mesh_to_faces_packed_first_idx(self) -> Int[Tensor, " B"]:
        return starts(self._num_faces)

    def mesh_to_edges_packed_first_idx(self) -> Int[Tensor, " B"]:
        return starts(self.num_edges_per_mesh())

    def verts_padded_to_packed_idx(self) -> Int[Tensor, " V"]:
        """Row of each packed vertex in `verts_padded().view(-1, 3)`."""
        longest = int(self._num_verts.max()) if len(self) else 0
        owner = self.verts_packed_to_mesh_idx()
        return torch.arange(len(self._verts), device=self.device) - starts(self._num_verts)[owner] + owner * longest

    # vertices and faces

    def verts_packed(self) -> Float[Tensor, "V 3"]:
        return self._verts

    def verts_list(self) -> list[Tensor]:
        return to_list(self._verts, self._num_verts)

    def verts_padded(self) -> Float[Tensor, "B V 3"]:
        """(B, max V, 3), filled with 0."""
        return to_padded(self._verts, self._num_verts, 0.0)

    def faces_packed(self) -> Int[Tensor, "F 3"]:
        """Faces of all members, as indices into `verts_packed()`."""
        return self._faces

    def _faces_local(self) -> Int[Tensor, "F 3"]:
        return self._faces - starts(self._num_verts)[owner_of(self._num_faces)][:, None]

    def faces_list(self) -> list[Tensor]:
        """Faces of each member, as indices into its own vertices."""
        return to_list(self._faces_local(), self._num_faces)

    def faces_padded(self) -> Int[Tensor, "B F 3"]:
        """(B, max F, 3) indices into each member's own vertices, filled with -1."""
        return to_padded(self._faces_local(), self._num_faces, -1)

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
        return to_list(self.faces_normals_packed(), self._num_faces)

    def faces_normals_padded(self) -> Float[Tensor, "B F 3"]:
        return to_padded(self.faces_normals_packed(), self._num_faces, 0.0)

    def verts_normals_list(self) -> list[Tensor]:
        return to_list(self.verts_normals_packed(), self._num_verts)

    def verts_normals_padded(self) -> Float[Tensor, "B V 3"]:
        return to_padded(self.verts_normals_packed(), self._num_verts, 0.0)

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
