"""The torture set: batches of meshes, point clouds and volumes on which geometry code breaks.

Everything here is legal input, except what `poisoned` returns. Each case is a batch, because half of the trouble is in
batches: members differ in size, and some are empty. `mesh_cases`, `cloud_cases` and `volume_cases` return new tensors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

OFFSET = 1e6
SCALE = 1e-6


class MeshCase(NamedTuple):
    verts: list[Tensor]  # (V_i, 3)
    faces: list[Tensor]  # (F_i, 3) int64, into the member's own vertices


# ----------------------------------------------------------------------------------------------------- base shapes

_TETRAHEDRON = [(0, 0, 0), (1, 0, 0), (0, 1.25, 0), (0.25, 0.25, 1)]
_TETRAHEDRON_FACES = [(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)]
_BOX = [(x, y, z) for x in (0, 1) for y in (0, 1.5) for z in (0, 0.75)]
_BOX_FACES = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1)]
_BOX_FACES += [(2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 5, 7), (1, 7, 3)]


def _mesh(verts: list, faces: list, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(verts, dtype=torch.float64).reshape(-1, 3).to(dtype),
        torch.tensor(faces, dtype=torch.int64).reshape(-1, 3),
    )


def tetrahedron(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Four vertices and four outward faces."""
    return _mesh(_TETRAHEDRON, _TETRAHEDRON_FACES, dtype)


def box(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Eight vertices and twelve outward faces, 1 x 1.5 x 0.75."""
    return _mesh(_BOX, _BOX_FACES, dtype)


def cloud(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points drawn from the unit cube, exact in float32."""
    drawn = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values in a layout that is not contiguous in any dimension."""
    wide = torch.stack([tensor, tensor + 1], dim=-1)
    return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


# ---------------------------------------------------------------------------------------------------------- meshes


def mesh_cases(dtype: torch.dtype = torch.float64) -> dict[str, MeshCase]:
    """Named batches of meshes, none of which may break anything."""
    empty = _mesh([], [], dtype)
    one_vertex = _mesh([(0.5, 0.25, 0.125)], [], dtype)
    loose = (box(dtype)[0], empty[1])
    tetra, brick = tetrahedron(dtype), box(dtype)
    lidless = (brick[0], brick[1][:-2])
    soup = (brick[0][brick[1].flatten()], torch.arange(36).view(-1, 3))
    welded = (torch.cat([brick[0], brick[0][:4]]), torch.cat([brick[1], torch.tensor([[8, 9, 10], [0, 8, 1]])]))
    stray = (torch.cat([tetra[0][:1] + 3, tetra[0], tetra[0][1:] - 2]), tetra[1] + 1)
    fins = _mesh([*_TETRAHEDRON, (1, 1, 1), (1, -1, 0.5)], [*_TETRAHEDRON_FACES, (0, 1, 4), (0, 1, 5)], dtype)
    doubled = (tetra[0], torch.cat([tetra[1], tetra[1], tetra[1][:1].roll(1, 1)]))
    flipped = (brick[0], torch.cat([brick[1][:5], brick[1][5:].flip(1)]))
    inside_out = (tetra[0], tetra[1].flip(1))
    huge = [(verts + OFFSET, faces) for verts, faces in (tetra, brick)]
    tiny = [(verts * SCALE, faces) for verts, faces in (tetra, brick)]
    # one face folded onto its side, two that name a vertex twice or thrice, one whose three corners coincide
    flat_faces = [(8, 4, 0), (3, 3, 5), (2, 2, 2), (1, 9, 10)]
    flat = _mesh([*_BOX, (0.5, 0, 0), _BOX[1], _BOX[1]], [*_BOX_FACES, *flat_faces], dtype)
    heights = [1e-3, 1e-6, 1e-9, 1e-13]
    needles = _mesh(
        [*_TETRAHEDRON, *((0.5, -h, 0) for h in heights)],
        [*_TETRAHEDRON_FACES, *((0, 4 + i, 1) for i in range(len(heights)))],
        dtype,
    )

    batches = {
        "ragged": [tetra, brick, lidless],
        "single": [brick],
        "empty first": [empty, tetra, brick],
        "empty middle": [tetra, empty, empty, brick],
        "empty last": [brick, tetra, empty],
        "empty all": [empty, empty],
        "one vertex": [one_vertex, tetra],
        "no faces": [loose, tetra],
        "no faces at all": [loose, one_vertex],
        "isolated vertices": [stray, tetra],
        "coincident vertices": [soup, welded],
        "zero-area faces": [flat, tetra],
        "only zero-area faces": [(flat[0], flat[1][12:]), tetra],
        "sliver faces": [needles, tetra],
        "non-manifold edge": [fins, tetra],
        "duplicated faces": [doubled, tetra],
        "flipped faces": [flipped, inside_out],
        "huge offset": huge,
        "tiny scale": tiny,
        "non-contiguous": [(strided(v), strided(f)) for v, f in (tetra, inside_out)],
    }
    return {name: MeshCase([m[0] for m in members], [m[1] for m in members]) for name, members in batches.items()}


# ---------------------------------------------------------------------------------------------------------- clouds


def cloud_cases(dtype: torch.dtype = torch.float64) -> dict[str, list[Tensor]]:
    """Named batches of point clouds (P_i, 3), none of which may break anything."""
    empty = cloud(0, dtype=dtype)
    few, many = cloud(5, 1, dtype), cloud(7, 2, dtype)
    along = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    line = (along * torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)).to(dtype)
    plane = cloud(6, 3, dtype) * torch.tensor([1, 1, 0], dtype=dtype)
    return {
        "ragged": [many, few, cloud(4, 4, dtype)],
        "single": [few],
        "empty first": [empty, few, many],
        "empty middle": [many, empty, empty, few],
        "empty last": [few, many, empty],
        "empty all": [empty, empty],
        "one point": [cloud(1, 5, dtype), few],
        "one point each": [cloud(1, 5, dtype), cloud(1, 6, dtype)],
        "duplicate points": [few.repeat(2, 1), many[[0, 0, 0, 1, 2, 2]]],
        "one place": [few[:1].repeat(6, 1), many],
        "collinear": [line, few],
        "coplanar": [plane, many],
        "huge offset": [few + OFFSET, many + OFFSET],
        "tiny scale": [few * SCALE, many * SCALE],
        "non-contiguous": [strided(few), strided(cloud(5, 7, dtype))],
    }


# --------------------------------------------------------------------------------------------------------- volumes


def volume_cases(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Named batches of volumes (B, D, H, W) to be cut at 0.5."""
    noise = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    checkers = (torch.arange(4)[:, None, None] + torch.arange(4)[:, None] + torch.arange(4)) % 2
    mixed = torch.stack([torch.zeros_like(noise[0]), noise[0], torch.ones_like(noise[0])])
    return {
        "noise": noise,
        "empty first": mixed,
        "empty middle": mixed[[1, 0, 0, 1]],
        "empty last": mixed[[1, 2, 0]],
        "empty all": mixed[[0, 0]],
        "full": mixed[[2, 2]],
        "equal to the level": torch.full_like(noise, 0.5),
        "partly equal to the level": (noise * 2).round() / 2,
        "checkers": checkers.to(dtype)[None],
        "one voxel": mixed[[2, 0], :1, :1, :1],
        "one layer": noise[:, :1],
        "huge values": (noise - 0.5) * OFFSET + 0.5,
        "tiny values": (noise - 0.5) * SCALE + 0.5,
        "non-contiguous": noise.transpose(1, 3).contiguous().transpose(1, 3),
    }


# -------------------------------------------------------------------------------------------------------- bad input


def poisoned(tensor: Tensor) -> Iterator[Tensor]:
    """Copies of a tensor (..., N, 3) or of a volume with one NaN, and one infinity of either sign, somewhere inside."""
    for value in (torch.nan, torch.inf, -torch.inf):
        copy = tensor.detach().clone()
        copy.view(-1)[copy.numel() // 2] = value
        yield copy
