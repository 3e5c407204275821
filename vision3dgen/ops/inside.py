"""Which points are inside a mesh, and how far from its surface: winding numbers, ray crossings, signed distances.

Everything here runs in float64. Rays go along +z and follow one half-open rule: they are treated as if moved by an
infinitely small step toward +x, +y and +z, so a ray through a vertex or an edge meets exactly the faces that the moved
ray meets. Whether a ray passes left of an edge is computed from the edge's end points alone, in the same order for both
of its faces; so faces around a vertex never leave a gap or overlap, whatever the rounding, and the crossings of a
closed mesh are even in number along the whole line.

References: Jacobson et al., Robust inside-outside segmentation using generalized winding numbers, 2013; Van Oosterom &
Strackee, The solid angle of a plane triangle, 1983; Ericson, Real-time collision detection, 2005, section 5.1; Barill
et al., Fast winding numbers for soups and clouds, 2018.
"""

import importlib
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite
from vision3dgen.ops.backends import full_precision
from vision3dgen.ops.meshes import ClosestPoints, MeshesLike, closest_barycentrics, nearest_triangles
from vision3dgen.ops.solidangle import far_solid_angles

_FEW = 1 << 22  # pairs of a triangle and a point that are summed without a tree
_UNSURE = 0.01  # of winding numbers with an expansion: around 1/2 they are found again, with a better one
_CHUNK = 1 << 18  # pairs handled at once where the caller states no budget: their arrays stay near the cache


# ------------------------------------------------------------------------------------------------- public functions


def winding_number(
    meshes: MeshesLike, points: Float[Tensor, "*B N 3"], *, beta: float | None = None, budget: int = 1 << 28
) -> Float[Tensor, "*B N"]:
    """Generalized winding number of each point: how often the surface encloses it, smooth across holes.

    points: (N, 3) for one mesh or (B, N, 3) for B. 1 inside and 0 outside a closed mesh with outward normals, -1
    inside one turned inside out, k inside k overlapping parts, 1/2 just at a flat surface; fractions where the mesh has
    holes. Work arrays stay under `budget` bytes. Differentiable in points and vertices (a closed surface has gradient
    zero) while `beta` is None.

    The surface is closed by cones over the parts of its boundary: the closed surface is counted exactly with rays, and
    only the cones' solid angles (a few faces, as a rule) are summed and taken off. Where the boundary has more edges
    than the mesh has faces the faces' own solid angles are summed. With `beta`, triangles farther away than `beta`
    times the radius of their group are summed together (`solidangle`): the way to hundreds of thousands of points and
    of boundary edges. At 2 the error is below 0.006, mostly below 0.001, and around the halves, where it would matter
    for what is inside, below 0.0002; a closed surface stays exact.
    """
    return _by_member(meshes, points, lambda corners, queries: _winding(corners, queries, budget, beta))


def contains(
    meshes: MeshesLike,
    points: Float[Tensor, "*B N 3"],
    *,
    method: Literal["winding", "nonzero", "parity"] = "winding",
    beta: float | None = None,
    budget: int = 1 << 28,
) -> Bool[Tensor, "*B N"]:
    """Whether each point is inside its mesh.

    points: (N, 3) for one mesh or (B, N, 3) for B. "winding": the winding number is beyond 1/2 in size; right for
    overlapping parts, sensible for holes. "nonzero": crossings of a ray, signed by the faces' orientation, do not
    cancel; "parity": their number is odd. These two need closed meshes, and "parity" parts that do not overlap, but no
    consistent orientation. For points on the surface all follow the half-open rule [low, high) along x, y and z
    where the mesh is closed. A mesh turned inside out contains the same points. beta: as in `winding_number`.
    """
    check_choice("method", method, ("winding", "nonzero", "parity"))

    def test(corners: Tensor, queries: Tensor) -> Tensor:
        if method == "winding":
            return _winding(corners, queries, budget, beta).abs() > 0.5
        crossings = _crossings(corners, queries)
        return crossings.signed != 0 if method == "nonzero" else crossings.total % 2 == 1

    with torch.no_grad():
        return _by_member(meshes, points, test)


def signed_distance(
    meshes: MeshesLike,
    points: Float[Tensor, "*B N 3"],
    *,
    method: Literal["winding", "nonzero", "parity"] = "winding",
    budget: int = 1 << 28,
) -> Float[Tensor, "*B N"]:
    """Distance of each point to the surface, not squared, negative inside.

    points: (N, 3) for one mesh or (B, N, 3) for B; `method` decides the sign as in `contains`. Infinite for a mesh
    without faces. Differentiable in points and vertices; the gradient at distance zero is zero.
    """
    inside = contains(meshes, points, method=method, budget=budget)
    distance = _by_member(meshes, points, lambda corners, queries: _nearest(corners, queries).distances)
    return torch.where(inside, -distance, distance)


class NearestFaces(NamedTuple):
    distances: Tensor  # (N,) not squared, infinite without faces
    indices: Tensor  # (N,) faces, -1 without faces
    points: Tensor  # (N, 3) closest points on the surface


def nearest_faces(
    verts: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    points: Float[Tensor, "N 3"],
    *,
    finder: Literal["torch", "open3d"] = "torch",
) -> NearestFaces:
    """The face nearest to each point, exactly, with the distance (differentiable) and the closest point on it.

    finder "open3d" finds the face in float32, several times faster on CPU: among faces equally near within rounding it
    may be another one. Distance and point are computed in float64 either way.
    """
    check_choice("finder", finder, ("torch", "open3d"))
    _check(verts, faces, points)
    find = _find_open3d if finder == "open3d" and len(faces) else None
    result = _nearest(verts[faces].double(), points.double(), find)
    return NearestFaces(result.distances.to(points.dtype), result.indices, result.points.to(points.dtype))


def _find_open3d(points: Float[Tensor, "N 3"], corners: Float[Tensor, "F 3 3"]) -> ClosestPoints:
    try:
        open3d = importlib.import_module("open3d")  # untyped on purpose: its stubs refuse numpy arrays
    except ImportError as error:
        raise ImportError('finder "open3d" needs Open3D: pip install "vision3dgen[viz]"') from error
    middle = (corners.amin((0, 1)) + corners.amax((0, 1))) / 2
    scene = open3d.t.geometry.RaycastingScene(nthreads=1)
    index = torch.arange(3 * len(corners), dtype=torch.int32).view(-1, 3)
    scene.add_triangles(
        open3d.core.Tensor((corners - middle).reshape(-1, 3).float().cpu().numpy()),
        open3d.core.Tensor(index.numpy().view("uint32")),
    )
    asked = open3d.core.Tensor((points - middle).float().cpu().numpy())
    found = scene.compute_closest_points(asked, nthreads=1)["primitive_ids"].numpy()
    face = torch.from_numpy(found.astype("int64")).to(points.device)
    return ClosestPoints(face, closest_barycentrics(points, corners[face])[0])


@full_precision
def point_triangle_distance(points: Float[Tensor, "*N 3"], triangles: Float[Tensor, "*N 3 3"]) -> Float[Tensor, "*N"]:
    """Distance, not squared, of each point to its triangle (rows are corners); gradient zero at distance zero.

    A triangle whose area is lost in rounding relative to its longest side is measured by its sides, so tiny triangles
    are as good as large ones.
    """
    check_finite(points=points, triangles=triangles)
    weights, _ = closest_barycentrics(points.detach(), triangles.detach())
    # differences first: far from the origin the closest point itself would lose the distance
    return _length((weights[..., None] * (triangles - points[..., None, :])).sum(-2))


# ------------------------------------------------------------------------------------------------------ members


def _by_member(
    meshes: MeshesLike, points: Float[Tensor, "*B N 3"], function: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`function(corners (F, 3, 3), points (N, 3))` in float64 for each mesh and its points."""
    if points.ndim not in (2, 3):
        raise ValueError(f"points must be (N 3) or (B N 3), got {tuple(points.shape)}")
    queries = points[None] if points.ndim == 2 else points
    if len(queries) != len(meshes):
        raise ValueError(f"points must be given for each of {len(meshes)} meshes, got {tuple(points.shape)}")
    verts, faces = meshes.verts_packed(), meshes.faces_packed()
    check_finite(verts=verts, points=points)
    corners = verts[faces].double().split(meshes.num_faces_per_mesh().tolist())
    results = torch.stack([function(member, query.double()) for member, query in zip(corners, queries)])
    results = results.to(points.dtype) if results.is_floating_point() else results
    return results[0] if points.ndim == 2 else results


def _check(verts: Tensor, faces: Tensor, points: Tensor) -> None:
    check_finite(verts=verts, points=points)
    if faces.numel() and not 0 <= int(faces.min()) <= int(faces.max()) < len(verts):
        raise ValueError(f"faces must be in [0, {len(verts)}), got {int(faces.min())} to {int(faces.max())}")


def expand_ranges(first: Int[Tensor, " R"], count: Int[Tensor, " R"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Owner and value of each entry of the ranges [first, first + count), one after the other."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    shift = first - (count.cumsum(0) - count)
    return owner, torch.arange(len(owner), device=count.device) + shift[owner]


def range_batches(count: Int[Tensor, " R"], limit: int) -> list[slice]:
    """Consecutive slices of ranges, each of about `limit` entries and at least one range."""
    if not len(count):
        return []
    batch = count.cumsum(0).sub(1).clamp_min(0) // limit
    ends = torch.cat(
        [(batch.diff() != 0).nonzero()[:, 0] + 1, torch.tensor([len(count)], device=count.device)]
    ).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]


# ---------------------------------------------------------------------------------------------------- crossings


class EdgeLines(NamedTuple):
    """The edges of triangles as lines x(y) in the xy plane, from the lower end to the upper one."""

    low: Tensor  # (F, 3) y of the lower end
    high: Tensor  # (F, 3) y of the upper end; equal for an edge no ray can pass left of
    x: Tensor  # (F, 3) at the lower end
    slope: Tensor  # (F, 3) dx / dy
    sign: Tensor  # (F, 3) 1 for edges that go up along the triangle, -1 for those that go down


def edge_lines(corners: Float[Tensor, "F 3 3"]) -> EdgeLines:
    """Edges in the order that makes an edge the same numbers for both of its faces."""
    start, end = corners, corners.roll(-1, 1)
    up = start[..., 1] <= end[..., 1]
    lower, upper = torch.where(up[..., None], start, end), torch.where(up[..., None], end, start)
    rise = upper[..., 1] - lower[..., 1]
    slope = (upper[..., 0] - lower[..., 0]) / torch.where(rise > 0, rise, 1)
    return EdgeLines(lower[..., 1], upper[..., 1], lower[..., 0], slope, torch.where(up, 1, -1))


class Planes(NamedTuple):
    """The heights z(x, y) of triangles."""

    anchor: Tensor  # (F, 3)
    gradient: Tensor  # (F, 2)
    low: Tensor  # (F,)
    high: Tensor  # (F,)

    def at(self, faces: Int[Tensor, " P"], x: Float[Tensor, " P"], y: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        anchor, gradient = self.anchor[faces], self.gradient[faces]
        z = anchor[:, 2] + gradient[:, 0] * (x - anchor[:, 0]) + gradient[:, 1] * (y - anchor[:, 1])
        return torch.minimum(torch.maximum(z, self.low[faces]), self.high[faces])


def planes(corners: Float[Tensor, "F 3 3"]) -> Planes:
    """Planes of triangles; an upright one, which only rounding lets a ray meet, gets the height of a corner."""
    a, b, c = corners.unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    upright = normal[:, 2] == 0
    gradient = torch.where(upright[:, None], 0, -normal[:, :2] / torch.where(upright, 1, normal[:, 2])[:, None])
    return Planes(a, gradient, corners[..., 2].amin(1), corners[..., 2].amax(1))


class _Crossings(NamedTuple):
    signed: Tensor  # (N,) faces above each point, 1 for those whose normal points up, -1 for those down
    total: Tensor  # (N,) faces above each point


@torch.no_grad()
def _crossings(corners: Float[Tensor, "F 3 3"], points: Float[Tensor, "N 3"]) -> _Crossings:
    """What the ray along +z from each point meets.

    Points are sorted into rows along y and by x within a row; each triangle looks up the points of its rows between its
    bounds in x.
    """
    device = points.device
    signed = torch.zeros(len(points), dtype=torch.int64, device=device)
    total = torch.zeros_like(signed)
    if len(points) and len(corners):
        low, high = points.amin(0), points.amax(0)
        near = (corners.amin(1)[:, :2] <= high[:2]) & (corners.amax(1)[:, :2] >= low[:2])
        corners = corners[near.all(1) & (corners[..., 2].amax(1) > low[2])]
    if not len(points) or not len(corners):
        return _Crossings(signed, total)

    rows = min(1024, math.isqrt(len(corners)) + 1)
    columns = 1 << 20
    span = (high - low)[:2].clamp_min(torch.finfo(torch.float64).tiny)

    def cell(values: Tensor, axis: int, cells: int) -> Tensor:
        return ((values - low[axis]) / span[axis] * cells).clamp(0, cells - 1).long()

    key = cell(points[:, 1], 1, rows) * columns + cell(points[:, 0], 0, columns)
    key, order = key.sort()
    points = points[order].contiguous()
    least, most = corners.amin(1), corners.amax(1)
    top, bottom = cell(most[:, 1], 1, rows), cell(least[:, 1], 1, rows)
    face, row = expand_ranges(bottom, top - bottom + 1)
    first = torch.searchsorted(key, row * columns + cell(least[:, 0], 0, columns)[face])
    last = torch.searchsorted(key, row * columns + cell(most[:, 0], 0, columns)[face], right=True)
    met = last > first
    face, first, count = face[met], first[met], (last - first)[met]

    lines, heights = edge_lines(corners), planes(corners)
    for batch in range_batches(count, _CHUNK):
        owner, point = expand_ranges(first[batch], count[batch])
        owner = face[batch][owner]
        x, y, z = points[point].unbind(1)
        turns = torch.zeros(len(owner), dtype=torch.int64, device=device)
        for edge in range(3):
            passes = (lines.low[:, edge][owner] <= y) & (y < lines.high[:, edge][owner])
            at = lines.x[:, edge][owner] + (y - lines.low[:, edge][owner]) * lines.slope[:, edge][owner]
            turns += torch.where(passes & (x < at), lines.sign[:, edge][owner], 0)
        hit = turns.nonzero()[:, 0]
        above = heights.at(owner[hit], x[hit], y[hit]) > z[hit]
        hit = hit[above]
        signed.index_add_(0, order[point[hit]], turns[hit])
        total.index_add_(0, order[point[hit]], torch.ones_like(hit))
    return _Crossings(signed, total)


# ----------------------------------------------------------------------------------------------- winding numbers


def _winding(
    corners: Float[Tensor, "F 3 3"], points: Float[Tensor, "N 3"], budget: int, beta: float | None
) -> Float[Tensor, " N"]:
    cones, weights = _closing_cones(corners)
    if len(cones) >= len(corners):
        return _angles(corners, corners.new_ones(len(corners)), points, budget, beta)
    weighted = [cones.detach()[weights == weight].repeat(abs(int(weight)), 1, 1) for weight in weights.unique()]
    sides = [part if weight > 0 else part.flip(1) for part, weight in zip(weighted, weights.unique())]
    closed = _crossings(torch.cat([corners.detach(), *sides]), points.detach()).signed
    return closed.double() - _angles(cones, weights, points, budget, beta)


def _angles(
    triangles: Float[Tensor, "F 3 3"],
    weights: Float[Tensor, " F"],
    points: Float[Tensor, "N 3"],
    budget: int,
    beta: float | None,
) -> Float[Tensor, " N"]:
    """Solid angles of triangles, all of them or far ones together; few ones are never worth a tree."""
    if beta is None or len(triangles) * len(points) <= _FEW:
        return _solid_angles(triangles, weights, points, budget)
    triangles, points = triangles.detach(), points.detach()
    total = far_solid_angles(triangles, weights, points, beta)
    # where the error could change the side of a half, the next better expansion
    unsure = (((total.abs() % 1) - 0.5).abs() < _UNSURE).nonzero()[:, 0]
    total[unsure] = far_solid_angles(triangles, weights, points[unsure], 3 * beta)
    return total


def _closing_cones(corners: Float[Tensor, "F 3 3"]) -> tuple[Float[Tensor, "E 3 3"], Float[Tensor, " E"]]:
    """Triangles from the boundary edges to an apex for each connected part, and how often each closes the surface.

    Corners at one position are one vertex. An edge belongs to the boundary when its faces do not run along it as often
    forth as back, so inconsistent orientation and edges of three faces are boundaries too.
    """
    flat = corners.detach().reshape(-1, 3)
    if not len(flat):
        return corners, corners.new_zeros(0)
    name, position = places(flat)
    start, end = name, name.view(-1, 3).roll(-1, 1).reshape(-1)
    size = len(flat)
    key = torch.minimum(start, end) * size + torch.maximum(start, end)
    edges, which = key.unique(return_inverse=True)
    net = torch.zeros(len(edges), dtype=torch.int64, device=flat.device)
    net.index_add_(0, which, (end > start).long() - (end < start).long())
    boundary = net.nonzero()[:, 0]
    names = torch.stack([edges[boundary] // size, edges[boundary] % size], 1)
    ends = corners.reshape(-1, 3)[position[names]]  # (E 2 3)
    part = _connected(names, size)
    count = int(part.max()) + 1 if len(part) else 0
    middle = ends.detach().mean(1)
    index = part[:, None].expand(-1, 3)
    low = middle.new_full((count, 3), math.inf).scatter_reduce_(0, index, middle, "amin")
    high = middle.new_full((count, 3), -math.inf).scatter_reduce_(0, index, middle, "amax")
    # off every plane of symmetry, and off the plane of a flat boundary, so that query points do not lie on the cone
    reach = (high - low).norm(dim=1, keepdim=True)
    apex = (low + high) / 2 + reach * flat.new_tensor([0.0317, -0.0397, 0.0171])
    cones = torch.stack([apex[part], ends[:, 1], ends[:, 0]], dim=1)
    return cones, net[boundary].double()


class Places(NamedTuple):
    number: Tensor  # (N,) the same for points that are equal
    point: Tensor  # (M,) one of the points with each number


def places(points: Float[Tensor, "N 3"]) -> Places:
    """The different places among points."""
    order = torch.arange(len(points), device=points.device)
    for axis in (2, 1, 0):
        order = order[points[order, axis].argsort(stable=True)]
    ordered = points[order]
    new = torch.ones(len(points), dtype=torch.bool, device=points.device)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    return Places(number, order[new])


def _connected(edges: Int[Tensor, "E 2"], size: int) -> Int[Tensor, " E"]:
    """The connected part that each edge belongs to."""
    one = np.ones(len(edges), dtype=np.int8)
    start, end = edges.cpu().numpy().T
    used, local = np.unique(np.concatenate([start, end]), return_inverse=True)
    a, b = local.reshape(2, -1)
    _, label = connected_components(coo_matrix((one, (a, b)), shape=(len(used), len(used))), directed=False)
    return torch.from_numpy(label[a].astype(np.int64)).to(edges.device)


def _solid_angles(
    corners: Float[Tensor, "F 3 3"], weights: Float[Tensor, " F"], points: Float[Tensor, "N 3"], budget: int
) -> Float[Tensor, " N"]:
    """Weighted sum over triangles of the solid angle seen from each point, in units of the full sphere."""
    pairs = max(1, min(budget // 320, _CHUNK // 4))  # 320 bytes: three corner vectors and what is made of them
    faces = max(1, min(len(corners), pairs))
    tiny, eps = torch.finfo(corners.dtype).tiny, torch.finfo(corners.dtype).eps
    totals = []
    for some in points.split(pairs // faces):
        total = some.new_zeros(len(some))
        x, y, z = some[:, :, None].unbind(1)  # (n, 1) each
        for triangles, share in zip(corners.split(faces), weights.split(faces)):
            vectors = [(corner[:, 0] - x, corner[:, 1] - y, corner[:, 2] - z) for corner in triangles.unbind(1)]
            # at a corner the smallest number keeps the root's gradient finite; anywhere else it is lost in rounding
            lengths = [(u * u + v * v + w * w + tiny).sqrt() for u, v, w in vectors]  # (n, f) each
            normal = torch.linalg.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
            terms = [u * n for u, n in zip(vectors[0], normal.unbind(1))]
            volume = sum(terms)
            # seen edge-on, or from a point of the triangle: what rounding leaves must not choose a side
            volume = torch.where(volume.abs() <= 8 * eps * sum(term.abs() for term in terms), 0, volume)
            around = lengths[0] * lengths[1] * lengths[2]
            for one, two, three in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
                around = around + sum(u * v for u, v in zip(vectors[one], vectors[two])) * lengths[three]
            # volume zero: the point lies in the triangle's plane and sees nothing of it, or half, by convention nothing
            angle = torch.where(volume == 0, 0, torch.atan2(volume, torch.where(volume == 0, 1, around)))
            total = total + angle @ share
        totals.append(total / (2 * math.pi))
    return torch.cat(totals)


# ------------------------------------------------------------------------------------------------------ distances


def _dot(a: Float[Tensor, "*N 3"], b: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N"]:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]  # faster than a sum over three


def _length(vectors: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N"]:
    """Length with gradient zero at zero."""
    squared = _dot(vectors, vectors)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


def _nearest(
    corners: Float[Tensor, "F 3 3"],
    points: Float[Tensor, "N 3"],
    find: Callable[[Tensor, Tensor], ClosestPoints] | None = None,
) -> NearestFaces:
    if not len(corners):
        missing = torch.full((len(points),), -1, device=points.device)
        nowhere = points * 0  # with a gradient, zero, as elsewhere
        return NearestFaces(nowhere[:, 0] + math.inf, missing, nowhere + math.nan)
    # The weights are constants here: moving the closest point along its face does not change the distance.
    index, weights = (find or nearest_triangles)(points.detach(), corners.detach())
    closest = (weights[..., None] * corners[index]).sum(1)
    return NearestFaces(_length(closest - points), index, closest)
