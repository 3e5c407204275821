"""Meshes as they are found made fit for inside tests: faces without area and doubled faces go, orientations agree, and
on request a watertight surface takes the place of the mesh, with its distance from what could be seen of it.

No vertex moves and no hole is filled by `repair`: what is inside a mesh with holes is said by its winding number.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from torch import Tensor

from vision3dgen.checks import check_finite
from vision3dgen.ops.inside import nearest_faces, places, winding_number
from vision3dgen.ops.meshes import MeshesLike
from vision3dgen.ops.render import raycast_views
from vision3dgen.ops.surface import marching_cubes
from vision3dgen.ops.voxels import voxelize
from vision3dgen.structures import Camera, GridSpec, Meshes

BETA = 2.0  # of winding numbers that only decide between inside and outside


class RepairReport(NamedTuple):
    """What a mesh was like, and what was done to its faces; vertices at one place count as one."""

    faces: int  # before
    degenerate: int  # with two corners at one place: removed
    doubled: int  # with the corners of an earlier face, whatever their order: removed
    turned: int  # whose orientation was reversed
    shells: int  # parts connected by edges of two faces
    boundary_edges: int  # of one face, afterwards
    branching_edges: int  # of three faces or more, afterwards
    watertight: bool  # afterwards: each edge is run along as often forth as back

    @property
    def is_clean(self) -> bool:
        return self.watertight and not (self.degenerate or self.doubled or self.turned)


class Repaired(NamedTuple):
    mesh: Meshes  # one member: the vertices as they were, fewer and turned faces
    kept: Tensor  # (F',) which of the faces they were
    report: RepairReport


def repair(meshes: MeshesLike) -> Repaired:
    """One mesh without degenerate and doubled faces, its orientations consistent and outward.

    Faces agree with their neighbors across edges of two faces; a shell keeps the orientation of the larger part of its
    area, unless its volume is negative and it does not lie inside the others: a cavity stays one, an inverted part is
    turned. A mesh that is inside out as a whole is turned first. A Moebius strip keeps one seam.
    """
    if len(meshes) != 1:
        raise ValueError(f"repair takes one mesh, got {len(meshes)}")
    verts, faces = meshes.verts_packed().detach(), meshes.faces_packed()
    check_finite(verts=verts)
    place = places(verts).number[faces]  # (F, 3)
    whole = (place != place.roll(1, 1)).all(1)
    kept = whole.nonzero()[:, 0]
    first = _first_of_equals(place[kept].sort(1).values)
    doubled = len(kept) - len(first)
    kept = kept[first]
    corners = verts.double()[faces[kept]]
    turned, shell = _orient(corners, place[kept])
    mended = torch.where(turned[:, None], faces[kept].flip(1), faces[kept])
    edges = _edges(torch.where(turned[:, None], place[kept].flip(1), place[kept]))
    report = RepairReport(
        faces=len(faces),
        degenerate=int((~whole).sum()),
        doubled=doubled,
        turned=int(turned.sum()),
        shells=int(shell.max()) + 1 if len(shell) else 0,
        boundary_edges=int((edges.sides == 1).sum()),
        branching_edges=int((edges.sides > 2).sum()),
        watertight=not bool(edges.net.any()),
    )
    return Repaired(Meshes([meshes.verts_packed()], [mended]), kept, report)


# ---------------------------------------------------------------------------------------------------- orientation


class _Edges(NamedTuple):
    which: Tensor  # (3 F,) edge of each side of a face, a face's three sides in a row
    forth: Tensor  # (3 F,) whether the side runs from the lower number to the higher one
    sides: Tensor  # (E,) how many there are
    net: Tensor  # (E,) sides that run forth less those that run back


def _edges(place: Int[Tensor, "F 3"]) -> _Edges:
    start, end = place.reshape(-1), place.roll(-1, 1).reshape(-1)
    size = int(place.max()) + 1 if len(place) else 1
    keys, which, count = torch.unique(
        torch.minimum(start, end) * size + torch.maximum(start, end), return_inverse=True, return_counts=True
    )
    forth = start < end
    net = torch.zeros(len(keys), dtype=torch.int64, device=place.device)
    net.index_add_(0, which, torch.where(forth, 1, -1))
    return _Edges(which, forth, count, net)


def _first_of_equals(rows: Int[Tensor, "F 3"]) -> Int[Tensor, " G"]:
    """The first of each group of equal rows, in order."""
    if not len(rows):
        return rows.new_zeros(0)
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    first = rows.new_full((int(group.max()) + 1,), len(rows))
    first.scatter_reduce_(0, group, torch.arange(len(rows), device=rows.device), "amin")
    return first.sort().values


def _orient(corners: Float[Tensor, "F 3 3"], place: Int[Tensor, "F 3"]) -> tuple[Bool[Tensor, " F"], Int[Tensor, " F"]]:
    """Which faces are to be turned, and the shell of each."""
    count = len(place)
    if not count:
        return place.new_zeros(0).bool(), place.new_zeros(0)
    disagree, shell = _disagreement(corners, place)
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    size = area.norm(dim=1)
    shells = int(shell.max()) + 1

    def summed(values: Tensor) -> Tensor:
        return corners.new_zeros(shells, *values.shape[1:]).index_add_(0, shell, values)

    # the larger part of a shell's area is right about it
    turned = disagree ^ (summed(torch.where(disagree, size, -size)) > 0)[shell]
    sign = torch.where(turned, -1.0, 1.0).to(size)
    centroid = corners.mean(1)
    middle = summed(centroid * size[:, None]) / summed(size).clamp_min(torch.finfo(size.dtype).tiny)[:, None]
    volume = summed(sign * ((centroid - middle[shell]) * area).sum(1)) / 6
    inverted = bool(volume.sum() < 0)
    volume = -volume if inverted else volume
    # Rounding gives flat sheets a volume of either sign; they keep their orientation.
    suspect = volume < -1e-9 * summed(size) ** 1.5
    if bool(suspect.any()) and not bool(suspect.all()):
        sides = torch.where((turned ^ inverted)[:, None, None], corners.flip(1), corners)
        others = sides[~suspect[shell]]
        solid = Meshes([others.reshape(-1, 3)], [torch.arange(3 * len(others), device=others.device).view(-1, 3)])
        mine = suspect[shell].nonzero()[:, 0]
        within = winding_number(solid, centroid[mine], beta=BETA).abs() > 0.5
        share = corners.new_zeros(shells).index_add_(0, shell[mine], within.to(size) * size[mine])
        suspect &= share < 0.5 * summed(size)
    return turned ^ inverted ^ suspect[shell], shell


def _disagreement(
    corners: Float[Tensor, "F 3 3"], place: Int[Tensor, "F 3"]
) -> tuple[Bool[Tensor, " F"], Int[Tensor, " F"]]:
    """Whether each face disagrees with its shell's first one, followed along the flattest edges; and the shells."""
    edges = _edges(place)
    shared = edges.sides[edges.which] == 2
    order = edges.which[shared].argsort(stable=True)
    sides = shared.nonzero()[:, 0][order].view(-1, 2)  # two sides of each edge of two faces
    one, two = (sides // 3).unbind(1)
    opposed = edges.forth[sides[:, 0]] == edges.forth[sides[:, 1]]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = torch.nn.functional.normalize(normals, dim=1, eps=1e-300)
    bend = 2 - (normals[one] * normals[two]).sum(1).abs()  # 1 to 2: flat ones are followed first
    count = len(place)
    start, end = one.cpu().numpy(), two.cpu().numpy()
    least = coo_matrix((bend.cpu().numpy(), (np.minimum(start, end), np.maximum(start, end))), (count, count))
    tree = minimum_spanning_tree(_lightest(least))
    shells, shell = connected_components(tree, directed=False)
    # one more node, joined to the first face of each shell, makes the forest a tree
    roots = np.unique(shell, return_index=True)[1]
    forest = coo_matrix(tree)
    rows = np.concatenate([forest.row, np.full(shells, count)])
    columns = np.concatenate([forest.col, roots])
    joined = coo_matrix((np.ones(len(rows)), (rows, columns)), (count + 1, count + 1)).tocsr()
    walk, before = breadth_first_order(joined, count, directed=False)
    different = coo_matrix((opposed.cpu().numpy().astype(np.int8), (start, end)), (count + 1, count + 1)).tocsr()
    walk = walk[1:]
    change = np.asarray(different[walk, before[walk]]).ravel() + np.asarray(different[before[walk], walk]).ravel()
    answer = np.zeros(count + 1, dtype=np.int8)
    for face, previous, step in zip(walk.tolist(), before[walk].tolist(), (change > 0).tolist()):
        answer[face] = answer[previous] ^ step
    device = place.device
    return torch.from_numpy(answer[:-1] > 0).to(device), torch.from_numpy(shell.astype(np.int64)).to(device)


def _lightest(pairs: coo_matrix) -> coo_matrix:
    """Of several entries at one place, the smallest (adding them up is what the library would do)."""
    order = np.lexsort((pairs.data, pairs.col, pairs.row))
    row, column, data = pairs.row[order], pairs.col[order], pairs.data[order]
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    return coo_matrix((data[new], (row[new], column[new])), pairs.shape)


# ------------------------------------------------------------------------------------------------ watertight surface


class Distortion(NamedTuple):
    """Distances between a surface and its watertight replacement, in the mesh's unit."""

    mean: float  # from points that can be seen of the original to the replacement
    largest: float
    back_mean: float  # from points that can be seen of the replacement to the original
    back_largest: float


class Remeshed(NamedTuple):
    mesh: Meshes  # one member, closed and outward
    distortion: Distortion


def remesh_watertight(
    meshes: MeshesLike, resolution: int = 128, *, thickness: float = 0.0, renderer: str = "auto"
) -> Remeshed:
    """The surface around what the winding number says is inside, from a grid of signed distances.

    resolution: cells along the longest edge of the bounding box. thickness: the surface is where the signed distance is
    this (in the mesh's unit): above half a cell, open sheets, which have no inside, become slabs. Distances are exact
    within two cells of the surface, and the surface by linear interpolation. Raises ValueError if nothing is inside.
    """
    if len(meshes) != 1:
        raise ValueError(f"remesh_watertight takes one mesh, got {len(meshes)}")
    if resolution < 2 or thickness < 0:
        raise ValueError(f"resolution must be at least 2 and thickness at least 0, got {resolution} and {thickness}")
    verts, faces = meshes.verts_packed().detach().double(), meshes.faces_packed()
    low, high = verts.amin(0), verts.amax(0)
    cell = float((high - low).amax()) / resolution
    if not len(faces) or cell == 0:
        raise ValueError(f"no surface: {len(faces)} faces")
    margin = math.ceil(thickness / cell) + 2
    counts = [math.ceil(float(extent) / cell) + 2 * margin for extent in high - low]
    x, y, z = ((low + high) / 2 - cell * torch.tensor(counts, dtype=torch.float64, device=low.device) / 2).tolist()
    grid = GridSpec((x, y, z), (cell, cell, cell), (counts[2], counts[1], counts[0]))
    mesh = Meshes([verts], [faces])
    near = voxelize(mesh, grid, "surface")[0].double()
    band = 2 * margin - 1
    near = torch.nn.functional.max_pool3d(near[None, None], band, 1, band // 2)[0, 0] > 0
    inside = is_inside_grid(mesh, grid)
    distance = torch.full(grid.shape, margin * cell, dtype=torch.float64, device=verts.device)
    points = grid.points(torch.float64, verts.device)[near]
    distance[near] = nearest_faces(verts, faces, points).distances
    signed = torch.where(inside, -distance, distance)
    if not bool((signed < thickness).any()):
        raise ValueError("nothing is inside: an open sheet; a thickness makes it a slab")
    corners, triangles = marching_cubes(signed[None], thickness, return_local_coords=False)
    closed = Meshes([grid.to_world(corners[0])], [triangles[0]])
    return Remeshed(closed, distortion(mesh, closed, renderer=renderer))


def is_inside_grid(meshes: MeshesLike, grid: GridSpec) -> Bool[Tensor, "D H W"]:
    """Whether each sample of a grid is where one mesh's winding number is beyond 1/2 in size."""
    points = grid.points(torch.float64, meshes.verts_packed().device)
    return (winding_number(meshes, points.view(-1, 3), beta=BETA).abs() > 0.5).view(grid.shape)


def distortion(original: MeshesLike, replacement: MeshesLike, *, renderer: str = "auto") -> Distortion:
    """How far two surfaces are apart where they can be seen from outside: only what is hidden may differ freely.

    Points are those seen at the pixels of 20 cameras around the original, 64 x 64 each.
    """
    there, back = (
        nearest_faces(to.verts_packed().double(), to.faces_packed(), _seen(of, original, renderer)).distances
        for of, to in ((original, replacement), (replacement, original))
    )
    if not len(there) or not len(back):
        raise ValueError("nothing of the surface can be seen")
    return Distortion(float(there.mean()), float(there.max()), float(back.mean()), float(back.max()))


def _seen(mesh: MeshesLike, about: MeshesLike, renderer: str) -> Float[Tensor, "N 3"]:
    """Points of a mesh seen from the corners of a dodecahedron around another one."""
    verts = about.verts_packed().double()
    middle = (verts.amin(0) + verts.amax(0)) / 2
    radius = float((verts - middle).norm(dim=1).amax())
    golden = (1 + math.sqrt(5)) / 2
    corners = [(a, b, c) for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)]
    for a in (-1 / golden, 1 / golden):
        for b in (-golden, golden):
            corners += [(0.0, a, b), (a, b, 0.0), (b, 0.0, a)]
    cameras = [
        Camera.look_at(
            middle.cpu() + 4 * radius * torch.tensor(corner).double() / math.sqrt(3),
            middle.cpu(),
            (0.1, 0.9, 0.3),
            field_of_view=31.0,
            image_size=(64, 64),
        )
        for corner in corners
    ]
    found = []
    for camera, drawn in zip(cameras, raycast_views(mesh, cameras, renderer=renderer, samples=1)):
        v, u = drawn.mask.nonzero().unbind(1)
        pixels = torch.stack([u, v], dim=1).double() + 0.5
        found.append(camera.unproject(pixels.cpu(), drawn.depth[v, u].double().cpu()))
    return torch.cat(found).to(verts.device)
