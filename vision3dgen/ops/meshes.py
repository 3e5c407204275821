"""Operators on meshes: sampling, areas and normals, Laplacians, graph convolution, subdivision, smoothing, templates.

Everything reads meshes through accessors that our `Meshes` and PyTorch3D's share. Names, arguments and results follow
PyTorch3D 0.7.9 where it has the operator.
"""

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csr_array
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.ops.backends import full_precision, raise_half
from vision3dgen.ops.boxtree import Measure, nearest_boxed
from vision3dgen.ops.points import nearest_indices, packed_to_padded, within
from vision3dgen.structures import Meshes


@runtime_checkable
class MeshesLike(Protocol):
    """What the operators ask of a batch of meshes, ours or PyTorch3D's."""

    def __len__(self) -> int: ...

    def verts_packed(self) -> Tensor: ...

    def faces_packed(self) -> Tensor: ...

    def edges_packed(self) -> Tensor: ...

    def faces_packed_to_edges_packed(self) -> Tensor: ...

    def verts_packed_to_mesh_idx(self) -> Tensor: ...

    def faces_packed_to_mesh_idx(self) -> Tensor: ...

    def edges_packed_to_mesh_idx(self) -> Tensor: ...

    def num_verts_per_mesh(self) -> Tensor: ...

    def num_faces_per_mesh(self) -> Tensor: ...

    def offset_verts(self, offsets: Tensor) -> Any: ...


def finite_verts(meshes: MeshesLike) -> Float[Tensor, "V 3"]:
    """Packed vertices in float32 or better, or a ValueError if any is NaN or infinite."""
    return _finite(**{"vertices (packed)": raise_half(meshes.verts_packed())})


def _finite(**named: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        check_finite(**named)
    return next(iter(named.values()))


# ------------------------------------------------------------------------------------------- areas and normals


class AreasNormals(NamedTuple):
    areas: Tensor  # (F,)
    normals: Tensor  # (F, 3) unit, zero for a face without area


@full_precision
def mesh_face_areas_normals(verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> AreasNormals:
    """Area and unit normal (right-hand rule) of each face.

    Differs: faces are measured relative to their own size, so tiny meshes keep unit normals; a face whose normal is
    lost in rounding has normal zero, with zero gradient.
    """
    cross, squared, solid, size = _area_vectors(_finite(verts=verts), faces)
    length = squared.where(solid, 1).sqrt()
    inverse = solid / length
    normals = torch.stack([component * inverse for component in cross], dim=1)
    return AreasNormals(0.5 * size.square() * length * solid, normals)


class _AreaVectors(NamedTuple):
    cross: list[Tensor]  # (F,) each, the product of two sides of each face, measured in its size
    squared: Tensor  # (F,) its squared length
    solid: Tensor  # (F,) whether that is more than rounding
    size: Tensor  # (F,) the longest step of the sides along an axis


def _area_vectors(verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> _AreaVectors:
    u, v = _sides(verts, faces)
    steps = [side.detach().abs() for side in (*u, *v)]
    size = functools.reduce(torch.maximum, steps)  # any scale is exact: it cancels
    size = size.where(size > 0, 1)
    scale = 1 / size
    u, v = [side * scale for side in u], [side * scale for side in v]
    cross = _cross(u, v)
    squared = _squared(cross)
    return _AreaVectors(cross, squared, squared > torch.finfo(verts.dtype).eps ** 2, size)


# Vectors by component, a list of three tensors: contiguous rows of F are several times faster than sums and products
# over a dimension of 3.


def _dot(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    return torch.addcmul(torch.addcmul(u[0] * v[0], u[1], v[1]), u[2], v[2])


def _squared(u: Sequence[Tensor]) -> Tensor:
    return _dot(u, u)


def _cross(u: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    return [torch.addcmul(u[i] * v[j], u[j], v[i], value=-1) for i, j in ((1, 2), (2, 0), (0, 1))]


def _sides(verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> tuple[list[Tensor], list[Tensor]]:
    """The sides from the first corner to the second and to the third."""
    i, j, k = (corner.contiguous() for corner in faces.unbind(1))
    u, v = [], []
    for component in verts.unbind(1):
        values = component.contiguous()
        first = values.index_select(0, i)
        u.append(values.index_select(0, j) - first)
        v.append(values.index_select(0, k) - first)
    return u, v


# ---------------------------------------------------------------------------------------------------- sampling


class SurfaceSamples(NamedTuple):
    points: Tensor  # (B, S, 3), with gradients to the vertices
    normals: Tensor  # (B, S, 3) unit face normals, with gradients to the vertices
    faces: Tensor  # (B, S) int64 into each mesh's own faces, -1 for a mesh without faces
    barycentrics: Tensor  # (B, S, 3) weights of the face's corners


def sample_surface(
    meshes: MeshesLike, num_samples: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> SurfaceSamples:
    """Points uniform by area on the surface of each mesh, with where they lie.

    A list of generators gives each mesh its own stream: then its samples do not depend on the rest of the batch. A mesh
    without faces gets zeros. Raises ValueError for NaN vertices, for a batch without any face and, naming the mesh,
    for one whose faces have no area.
    """
    drawn = _draw(meshes, num_samples, generator)
    corners = meshes.verts_packed()[drawn.corners]  # (B, S, 3, 3)
    flat = torch.arange(3 * drawn.faces.numel(), device=corners.device).view(-1, 3)
    normals = mesh_face_areas_normals(corners.reshape(-1, 3), flat).normals.view(*drawn.faces.shape, 3)
    present = (drawn.faces >= 0)[..., None]
    return SurfaceSamples(_places(meshes, drawn), normals.where(present, 0), drawn.faces, drawn.barycentrics)


class _Draw(NamedTuple):
    faces: Tensor  # (B, S) into each mesh's own faces, -1 for a mesh without faces
    corners: Tensor  # (B, S, 3) of those faces, into the packed vertices
    barycentrics: Tensor  # (B, S, 3), zero for a mesh without faces


def _places(meshes: MeshesLike, drawn: _Draw) -> Float[Tensor, "B S 3"]:
    corners = meshes.verts_packed().index_select(0, drawn.corners.flatten()).view(*drawn.corners.shape, 3)
    (p, q, r), (a, b, c) = corners.unbind(2), drawn.barycentrics[..., None].unbind(2)  # (B, S, 3) and (B, S, 1)
    return torch.addcmul(torch.addcmul(a * p, b, q), c, r)


@torch.no_grad()
def _draw(meshes: MeshesLike, num_samples: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> _Draw:
    """Faces drawn by area, and uniform places on them."""
    verts, faces = meshes.verts_packed(), meshes.faces_packed()
    counts = meshes.num_faces_per_mesh()
    batch, device = len(meshes), verts.device
    if len(faces) == 0:
        raise ValueError(f"cannot sample a surface: none of the {batch} meshes has a face")
    _finite(**{"vertices (packed)": verts})
    first = counts.cumsum(0) - counts
    _, squared, solid, size = _area_vectors(verts.double(), faces)
    own = size.square() * squared.where(solid, 0).sqrt()
    cumulative = packed_to_padded(own, first, int(counts.max())).cumsum(1)  # doubled: shares are all that counts
    total = cumulative[:, -1:].contiguous()  # (B, 1)
    flat = ((total[:, 0] == 0) & (counts > 0)).nonzero()
    if len(flat):
        raise ValueError(f"cannot sample the surface of mesh {int(flat[0])}: its faces have no area")
    uniform = _uniform(batch, num_samples, generator, device)
    # the first face whose cumulative area exceeds the draw has area; a draw rounded to the total must not pass it
    last = torch.searchsorted(cumulative, total)
    chosen = torch.searchsorted(cumulative, uniform[..., 0] * total, right=True).minimum(last)  # (B, S)
    root, along = uniform[..., 1].sqrt(), uniform[..., 2]
    barycentrics = torch.stack([1 - root, root * (1 - along), root * along], dim=2).to(verts.dtype)
    present = (counts > 0)[:, None]
    corners = faces.index_select(0, (chosen + first[:, None]).where(present, 0).flatten()).view(*chosen.shape, 3)
    return _Draw(chosen.where(present, -1), corners, barycentrics.where(present[..., None], 0))


def _uniform(
    batch: int,
    num_samples: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> Float[Tensor, "B S 3"]:
    """Uniform draws in [0, 1), made where the generator lives; float64 because 24 bits miss faces of large meshes."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        drawn = torch.rand(batch, num_samples, 3, generator=generator, dtype=torch.float64, device=source)
        return drawn.to(device)
    if len(generator) != batch:
        raise ValueError(f"generator must be one, or one per mesh ({batch}), got {len(generator)}")
    each = [torch.rand(num_samples, 3, generator=g, dtype=torch.float64, device=g.device) for g in generator]
    return torch.stack([draw.to(device) for draw in each])


def sample_points_from_meshes(
    meshes: MeshesLike,
    num_samples: int = 10000,
    return_normals: bool = False,
    return_textures: bool = False,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Any:
    """Points uniform by area on each mesh: (B, S, 3), then, as asked, normals (B, S, 3) and textures (B, S, C).

    `return_textures` interpolates the vertex attribute "colors" of our meshes, or samples PyTorch3D's textures.
    Errors are those of `sample_surface`.
    Differs: a mesh without area is a ValueError that names it (PyTorch3D: RuntimeError or a device assert), faces are
    chosen by a float64 cumulative sum (PyTorch3D's multinomial stops at 2^24 faces), float64 meshes work.
    """
    if not return_normals and not return_textures:
        return _places(meshes, _draw(meshes, num_samples, generator))
    samples = sample_surface(meshes, num_samples, generator)
    result: tuple[Tensor, ...] = (samples.points,)
    if return_normals:
        result += (samples.normals,)
    if return_textures:
        result += (_sample_textures(meshes, samples),)
    return result


def _sample_textures(meshes: Any, samples: SurfaceSamples) -> Float[Tensor, "B S C"]:
    present = samples.faces >= 0
    counts = meshes.num_faces_per_mesh()
    packed = (samples.faces + (counts.cumsum(0) - counts)[:, None]).where(present, 0)
    if hasattr(meshes, "sample_textures"):
        if meshes.textures is None:
            raise ValueError("return_textures needs meshes with textures, these have none")
        fragments = SimpleNamespace(
            pix_to_face=packed.where(present, -1)[:, :, None, None], bary_coords=samples.barycentrics[:, :, None, None]
        )
        return meshes.sample_textures(fragments)[:, :, 0, 0]
    attributes = meshes.verts_attributes_packed()
    if "colors" not in attributes:
        raise ValueError(f'return_textures needs the vertex attribute "colors", these meshes have {sorted(attributes)}')
    corners = attributes["colors"][meshes.faces_packed()[packed]]  # (B, S, 3, C)
    return (samples.barycentrics[..., None] * corners).sum(2).where(present[..., None], 0)


# ---------------------------------------------------------------------------------------------------- nearest


class ClosestPoints(NamedTuple):
    """Matches between points and triangles; a segment is a triangle whose last two corners coincide."""

    indices: Tensor  # (N,) int64: the nearest triangle of each point, or the nearest point of each triangle
    barycentrics: Tensor  # (N, 3) weights of the triangle's corners at its closest place


def closest_barycentrics(
    points: Float[Tensor, "*N 3"], triangles: Float[Tensor, "*N 3 3"]
) -> tuple[Float[Tensor, "*N 3"], Float[Tensor, "*N"]]:
    """Weights of the corners at the place of each triangle closest to its point, and the squared distance to it.

    The foot on the plane where it lies inside, else the best of the three sides. A triangle is taken for its sides when
    its area is lost in rounding relative to its own longest side, never for being small. (Ericson 2005, section 5.1.)
    """
    a, b, c = triangles.unbind(-2)
    ap, ab, ac = (points - a).unbind(-1), (b - a).unbind(-1), (c - a).unbind(-1)

    def dot(u: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:  # by component: summing a dimension of 3 is far slower
        return u[0] * w[0] + u[1] * w[1] + u[2] * w[2]

    bb, bc, cc, pb, pc = dot(ab, ab), dot(ab, ac), dot(ac, ac), dot(ap, ab), dot(ap, ac)
    side = bb - 2 * bc + cc  # squared length of the side b c
    longest = torch.maximum(torch.maximum(bb, cc), side)
    area = bb * cc - bc * bc  # squared, four times
    solid = area > 64 * torch.finfo(area.dtype).eps * longest * longest

    def clip(numerator: Tensor, denominator: Tensor) -> Tensor:
        return (numerator / denominator.where(denominator > 0, 1)).clamp(0, 1)

    zero = torch.zeros_like(bb)
    on_ab, on_ac, on_bc = clip(pb, bb), clip(pc, cc), clip(pc - pb - bc + bb, side)
    inverse = 1 / area.where(solid, 1)
    v, w = (cc * pb - bc * pc) * inverse, (bb * pc - bc * pb) * inverse
    best_v, best_w, best = zero, zero, torch.full_like(bb, torch.inf)
    inside = solid & (v >= 0) & (w >= 0) & (v + w <= 1)
    sides = ((on_ab, zero, None), (zero, on_ac, None), (1 - on_bc, on_bc, None))
    for at_v, at_w, allowed in (*sides, (v, w, inside)):
        offset = [p - at_v * x - at_w * y for p, x, y in zip(ap, ab, ac)]
        squared = dot(offset, offset)
        # the foot wins ties with the sides it may lie on: its gradient sees the plane
        better = squared < best if allowed is None else allowed & (squared <= best)
        best_v, best_w, best = at_v.where(better, best_v), at_w.where(better, best_w), squared.where(better, best)
    return torch.stack([1 - best_v - best_w, best_v, best_w], dim=-1), best


@torch.no_grad()
def nearest_triangles(points: Float[Tensor, "P 3"], triangles: Float[Tensor, "F 3 3"]) -> ClosestPoints:
    """The triangle nearest to each point (exact, the first of equals), and where on it.

    Computed in float64. Raises ValueError when there is no triangle.
    """
    if not len(triangles):
        raise ValueError("there is no triangle to be near to")
    _finite(points=points, triangles=triangles)
    x, corners = points.double(), triangles.double()

    def measure(point: Tensor, triangle: Tensor) -> Tensor:
        return closest_barycentrics(x[point], corners[triangle])[1]

    which = _nearest(x[:, None], corners, measure)
    return ClosestPoints(which, closest_barycentrics(x, corners[which])[0].to(triangles.dtype))


@torch.no_grad()
def nearest_points(triangles: Float[Tensor, "F 3 3"], points: Float[Tensor, "P 3"]) -> ClosestPoints:
    """The point nearest to each triangle (exact, the first of equals), and where on the triangle.

    Computed in float64. Raises ValueError when there is no point.
    """
    if not len(points):
        raise ValueError("there is no point to be near to")
    _finite(triangles=triangles, points=points)
    x, corners = points.double(), triangles.double()

    def measure(triangle: Tensor, point: Tensor) -> Tensor:
        return closest_barycentrics(x[point], corners[triangle])[1]

    which = _nearest(corners, x[:, None], measure)
    return ClosestPoints(which, closest_barycentrics(x[which], corners)[0].to(triangles.dtype))


def _nearest(queries: Float[Tensor, "Q I 3"], contents: Float[Tensor, "T J 3"], measure: Measure) -> Int[Tensor, " Q"]:
    """The nearest content of each query, both given by their corners: one for a point, three for a triangle."""
    if not len(queries):
        return torch.zeros(0, dtype=torch.int64, device=queries.device)
    # the content with the nearest center is near enough to leave few others in question
    likely = nearest_indices(queries.mean(1)[None], contents.mean(1)[None], None, None, 2, 1)[0, :, 0]
    bound = measure(torch.arange(len(queries), device=queries.device), likely)
    rounding = 64 * torch.finfo(bound.dtype).eps * (contents.abs().amax() + queries.abs().amax((1, 2)))
    bound = (bound.sqrt() + rounding).square()
    return nearest_boxed(_boxes(queries), _boxes(contents), bound, measure)


def _boxes(corners: Float[Tensor, "N I 3"]) -> Float[Tensor, "N J 3"]:
    return corners if corners.shape[1] == 1 else torch.stack([corners.amin(1), corners.amax(1)], dim=1)


# -------------------------------------------------------------------------------------------- Laplacian matrices


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """The coalesced matrix of the sums of values at each row and column; torch takes twice as long for it."""
    if values.device.type == "cpu" and not values.requires_grad and not torch.compiler.is_compiling():
        entries = (values.numpy(), (rows.numpy(), columns.numpy()))
        matrix = coo_array(entries, shape=(size, size)).tocsr()  # five times as fast, without a gradient
        matrix.sum_duplicates()
        counts, columns = torch.from_numpy(np.diff(matrix.indptr)), torch.from_numpy(matrix.indices)
        rows = torch.arange(size).repeat_interleave(counts)
        indices, summed = torch.stack([rows, columns.long()]), torch.from_numpy(matrix.data)
        return torch.sparse_coo_tensor(indices, summed, (size, size), check_invariants=False, is_coalesced=True)
    order = _grouped(columns, size)[0]
    order = order[_grouped(rows[order], size)[0]]  # by row, then by column
    rows, columns = rows[order], columns[order]
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    indices = torch.stack([rows[first], columns[first]])
    summed = values.new_zeros(indices.shape[1]).index_add(0, first.cumsum(0) - 1, values[order])
    return torch.sparse_coo_tensor(indices, summed, (size, size), check_invariants=False, is_coalesced=True)


@full_precision
def laplacian(verts: Float[Tensor, "V 3"], edges: Int[Tensor, "E 2"]) -> Tensor:
    """Uniform Laplacian, sparse (V, V): 1 / degree(i) for each neighbor of i, and -1 on the diagonal.

    Differs: the row of a vertex without edges is zero (PyTorch3D has -1, which pulls such vertices to the origin).
    """
    i, j = edges.unbind(1)
    rows, columns = torch.cat([i, j]), torch.cat([j, i])
    degree = torch.bincount(rows, minlength=len(verts))
    diagonal = degree.nonzero()[:, 0]
    values = torch.cat([(1 / degree[rows]).to(verts.dtype), -torch.ones_like(diagonal, dtype=verts.dtype)])
    return _sparse(torch.cat([rows, diagonal]), torch.cat([columns, diagonal]), values, len(verts))


@full_precision
def norm_laplacian(verts: Float[Tensor, "V 3"], edges: Int[Tensor, "E 2"], eps: float = 1e-12) -> Tensor:
    """Sparse (V, V) with 1 / (length + eps) of the edge between i and j."""
    i, j = edges.unbind(1)
    _finite(verts=verts)
    weights = 1 / ((verts[i] - verts[j]).norm(dim=1) + eps)
    return _sparse(torch.cat([i, j]), torch.cat([j, i]), torch.cat([weights, weights]), len(verts))


class CotangentLaplacian(NamedTuple):
    L: Tensor  # sparse (V, V): cot a + cot b, the angles opposite to the edge between i and j
    inv_areas: Tensor  # (V, 1): 1 / the area of the faces around i, zero without any


@full_precision
def cot_laplacian(verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], eps: float = 1e-12) -> CotangentLaplacian:
    """Cotangent Laplacian (Desbrun et al., SIGGRAPH 1999), without diagonal, and inverse areas.

    Differs: `eps` bounds squared areas relative to each face's own size, so tiny meshes keep their angles.
    """
    i, j, weights, inverse = cotangents(verts, faces, eps)
    size = len(verts)
    return CotangentLaplacian(_sparse(torch.cat([i, j]), torch.cat([j, i]), weights.repeat(2), size), inverse)


def cotangents(
    verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"], eps: float = 1e-12
) -> tuple[Int[Tensor, " H"], Int[Tensor, " H"], Float[Tensor, " H"], Float[Tensor, "V 1"]]:
    """Ends i, j of each face's three sides, the cotangent of the angle opposite, and inverse areas (V, 1)."""
    u, v = _sides(_finite(verts=verts), faces)
    w = [across - along for across, along in zip(u, v)]  # from the third corner to the second
    size = functools.reduce(torch.maximum, [side.detach().abs() for side in (*u, *v, *w)])
    scale = 1 / size.where(size > 0, 1)
    u, v, w = ([side * scale for side in sides] for sides in (u, v, w))
    double_area = _squared(_cross(u, v)).clamp(min=4 * eps).sqrt()  # (F,)
    inverse_area = 1 / double_area
    cot = torch.cat([_dot(u, v) * inverse_area, _dot(u, w) * inverse_area, -_dot(v, w) * inverse_area])
    a, b, c = faces.unbind(1)
    areas = 0.5 * double_area * size.square()  # none for a face in one place
    around = verts.new_zeros(len(verts)).index_add(0, torch.cat([a, b, c]), areas.repeat(3))
    inverse = (1 / around.where(around > 0, 1)).where(around > 0, 0)
    return torch.cat([b, c, a]), torch.cat([c, a, b]), cot, inverse[:, None]


def spread_differences(
    verts: Float[Tensor, "V 3"], i: Int[Tensor, " H"], j: Int[Tensor, " H"], weights: Float[Tensor, " H"]
) -> tuple[Float[Tensor, "V 3"], Float[Tensor, "V 1"]]:
    """Sum over the weighted edges at each vertex of neighbor minus vertex, and of the weights.

    Differences rather than a product with the Laplacian: far from the origin that would cancel to noise.
    """
    offsets = weights[:, None] * (verts[j] - verts[i])
    moved = torch.zeros_like(verts).index_add(0, i, offsets).index_add(0, j, -offsets)
    mass = weights.new_zeros(len(verts)).index_add(0, i, weights).index_add(0, j, weights)
    return moved, mass[:, None]


def taubin_smoothing(meshes: MeshesLike, lambd: float = 0.53, mu: float = -0.53, num_iter: int = 10) -> Any:
    """Smooth without shrinking: steps by lambd and mu along the inverse-length Laplacian, in turns (Taubin 1995).

    Differs: vertices without edges stay where they are (PyTorch3D: NaN).
    """
    i, j = meshes.edges_packed().unbind(1)
    start, verts = meshes.verts_packed(), finite_verts(meshes)
    for step in (lambd, mu) * num_iter:
        weights = 1 / ((verts[i] - verts[j]).norm(dim=1) + 1e-12)
        moved, mass = spread_differences(verts, i, j, weights)
        verts = verts + step * moved / mass.where(mass > 0, 1)
    return meshes.offset_verts((verts - start).to(start.dtype))


# --------------------------------------------------------------------------------------------- graph convolution


def _grouped(keys: Int[Tensor, " N"], count: int) -> tuple[Tensor, Tensor]:
    """Positions ordered by key, and where each key's begin, closed by N."""
    if keys.device.type == "cpu" and not torch.compiler.is_compiling():
        # transposing a matrix with one entry a row is a counting sort, several times faster than argsort
        size = len(keys)
        table = csr_array((np.empty(size, dtype=np.bool_), keys.numpy(), np.arange(size + 1)), shape=(size, count))
        columns = table.tocsc()
        return torch.from_numpy(columns.indices).long(), torch.from_numpy(columns.indptr).long()
    ends = torch.bincount(keys, minlength=count).cumsum(0)
    return keys.argsort(stable=True), F.pad(ends, (1, 0))


class _GroupSum(torch.autograd.Function):
    """Sums of rows of x, a product with a 0/1 matrix in CSR form; the backward is that with its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, starts: Tensor, index_t: Tensor, starts_t: Tensor) -> Tensor:
        ctx.save_for_backward(index, starts, index_t, starts_t)
        return F.embedding_bag(index, x, starts, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, starts, index_t, starts_t = ctx.saved_tensors
        summed: Tensor = _GroupSum.apply(grad.contiguous(), index_t, starts_t, index, starts)
        return summed, None, None, None, None


def neighbor_sum(x: Float[Tensor, "V C"], edges: Int[Tensor, "E 2"], directed: bool = False) -> Float[Tensor, "V C"]:
    """Sum of x over each vertex's neighbors; directed, an edge (i, j) adds row j to vertex i only."""
    i, j = edges.unbind(1)
    if directed:
        order, starts = _grouped(i, len(x))
        order_t, starts_t = _grouped(j, len(x))
        return _GroupSum.apply(x, j[order], starts, i[order_t], starts_t)
    order, starts = _grouped(torch.cat([i, j]), len(x))
    index = torch.cat([j, i])[order]
    return _GroupSum.apply(x, index, starts, index, starts)


class GraphConv(nn.Module):
    """Graph convolution w0(x) + sum over neighbors of w1(x); `init` "normal" (std 0.01) or "zero", biases zero.

    Differs: any floating type, autocast included.
    """

    def __init__(self, input_dim: int, output_dim: int, init: str = "normal", directed: bool = False):
        super().__init__()
        check_choice("init", init, ("normal", "zero"))
        self.input_dim, self.output_dim, self.directed = input_dim, output_dim, directed
        self.w0 = nn.Linear(input_dim, output_dim)
        self.w1 = nn.Linear(input_dim, output_dim)
        for linear in (self.w0, self.w1):
            nn.init.normal_(linear.weight, std=0.01) if init == "normal" else nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, verts: Float[Tensor, "V C"], edges: Int[Tensor, "E 2"]) -> Float[Tensor, "V O"]:
        """New features (V, output_dim) from features (V, input_dim) and edges (E, 2) into them."""
        check_shape(verts=(verts, f"V {self.input_dim}"), edges=(edges, "E 2"))
        if verts.device != edges.device:
            raise ValueError(f"verts and edges must be on one device, got {verts.device} and {edges.device}")
        return self.w0(verts) + neighbor_sum(self.w1(verts), edges, self.directed)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, {self.output_dim}, directed={self.directed}"


@full_precision
def vert_align(
    feats: Float[Tensor, "B C H W"] | list[Tensor] | tuple[Tensor, ...],
    verts: Any,
    return_packed: bool = False,
    interp_mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = True,
) -> Float[Tensor, "... C"]:
    """Features of one or several maps (B, C, H, W) at the x, y of vertices, both in [-1, 1], channels concatenated.

    `verts` is (B, V, 3), meshes or point clouds. Returns (B, V, sum C), or (sum V_i, sum C) if `return_packed`.
    """
    maps = [feats] if isinstance(feats, Tensor) else list(feats)
    if isinstance(verts, Tensor):
        places, counts = verts, None
    elif hasattr(verts, "verts_padded"):
        places, counts = verts.verts_padded(), verts.num_verts_per_mesh()
    else:
        places, counts = verts.points_padded(), verts.num_points_per_cloud()
    for index, feature in enumerate(maps):
        check_shape(**{f"feats[{index}]": (feature, "B C H W"), "verts": (places, "B V 3")})
    grid = _finite(verts=places)[..., :2]
    sampled = [
        _sample_map(feature, grid.to(feature.dtype), interp_mode, padding_mode, align_corners) for feature in maps
    ]
    aligned = torch.cat(sampled, dim=2)  # (B, V, C)
    if not return_packed:
        return aligned
    if counts is None:
        return aligned.flatten(0, 1)
    return aligned[within(counts, places.shape[1])]


def _sample_map(
    feature: Float[Tensor, "B C H W"], places: Float[Tensor, "B V 2"], mode: str, padding: str, align_corners: bool
) -> Float[Tensor, "B V C"]:
    batch, channels, height, width = feature.shape
    dense = 4 * places.shape[1] >= height * width  # or turning the map into rows would cost more than it gains
    if feature.device.type != "cpu" or mode != "bilinear" or padding not in ("zeros", "border") or not dense:
        return F.grid_sample(feature, places[:, None], mode, padding, align_corners)[:, :, 0].mT
    # four rows a place, weighted and summed: forward and backward take half the time of torch's sampling of planes
    size = places.new_tensor([width, height])
    at = (places + 1) * (size - 1) / 2 if align_corners else ((places + 1) * size - 1) / 2  # (B, V, 2) in cells
    if padding == "border":
        at = at.clamp(min=0).minimum(size - 1)
    low = at.detach().floor()
    past = at - low
    rows, weights = [], []
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        step = places.new_tensor(corner)
        cell = low + step
        within_map = ((cell >= 0) & (cell < size)).all(-1)
        x, y = cell.clamp(min=0).minimum(size - 1).long().unbind(-1)
        rows.append(y * width + x)
        along, down = (step * past + (1 - step) * (1 - past)).unbind(-1)
        weights.append((along * down).where(within_map, 0))
    first = height * width * torch.arange(batch)[:, None, None]
    flat = feature.flatten(2).mT.reshape(-1, channels)  # (B H W, C)
    index, weight = (torch.stack(rows, dim=2) + first).view(-1, 4), torch.stack(weights, dim=2).view(-1, 4)
    return F.embedding_bag(index, flat, mode="sum", per_sample_weights=weight).view(batch, -1, channels)


# ------------------------------------------------------------------------------------- subdivision and templates


class SubdivideMeshes(nn.Module):
    """Each face split in four at the middles of its edges; new vertices follow the old ones of their mesh.

    `meshes`, a batch with the topology of all batches to come, is divided once and remembered.
    """

    def __init__(self, meshes: MeshesLike | None = None):
        super().__init__()
        self._template = None if meshes is None else _division(meshes)

    def forward(self, meshes: MeshesLike, feats: Tensor | None = None) -> Any:
        """The divided meshes; with `feats`, packed (V, C) or of equal meshes (B, V, C), the pair (meshes, features).

        Features, and attributes of our `Meshes`, are averaged over the ends of each edge; face attributes are repeated.
        """
        division = _division(meshes) if self._template is None else self._template
        if not all(
            torch.equal(own, expected)
            for own, expected in (
                (meshes.num_verts_per_mesh(), division.old_verts),
                (meshes.num_faces_per_mesh(), division.old_faces),
            )
        ):
            raise ValueError("the meshes do not have the topology of the template given to SubdivideMeshes")
        num_verts = division.num_verts.tolist()
        fields: dict[str, Any] = {}
        if isinstance(meshes, Meshes):
            num_faces = [4 * n for n in meshes.num_faces_per_mesh().tolist()]
            fields["verts_attributes"] = {
                name: _divide(value, division).split(num_verts)
                for name, value in meshes.verts_attributes_packed().items()
            }
            fields["faces_attributes"] = {
                name: value[division.parents].split(num_faces)
                for name, value in meshes.faces_attributes_packed().items()
            }
        verts = _divide(meshes.verts_packed(), division).split(num_verts)
        build: Any = type(meshes)
        divided = build(verts=list(verts), faces=division.faces, **fields)
        if feats is None:
            return divided
        if feats.shape[: feats.ndim - 1].numel() != len(meshes.verts_packed()):
            raise ValueError(
                f"feats must have {len(meshes.verts_packed())} rows, one for each vertex, got {tuple(feats.shape)}"
            )
        packed = _divide(feats.reshape(-1, feats.shape[-1]), division)
        return divided, packed.view(len(feats), -1, feats.shape[-1]) if feats.ndim == 3 else packed


class _Division(NamedTuple):
    edges: Tensor  # (E, 2) into the old packed vertices
    order: Tensor  # (V + E,) where each new packed vertex is among old vertices followed by middles
    faces: list[Tensor]  # (4 F_i, 3) into each mesh's own vertices
    parents: Tensor  # (4 F,) the old packed face of each new one
    num_verts: Tensor  # (B,)
    old_verts: Tensor  # (B,)
    old_faces: Tensor  # (B,)


def _division(meshes: MeshesLike) -> _Division:
    faces, edges, sides = meshes.faces_packed(), meshes.edges_packed(), meshes.faces_packed_to_edges_packed()
    batch, old = len(meshes), len(meshes.verts_packed())
    owner = torch.cat([meshes.verts_packed_to_mesh_idx(), meshes.edges_packed_to_mesh_idx()])
    order = owner.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    a, b, c = place[faces].unbind(1)
    bc, ca, ab = place[sides + old].unbind(1)  # middles, each named by the side it divides
    split = torch.stack([a, ab, ca, b, bc, ab, c, ca, bc, bc, ca, ab], dim=1).view(-1, 4, 3)
    num_verts = torch.bincount(owner, minlength=batch)
    first = num_verts.cumsum(0) - num_verts
    split = split - first[meshes.faces_packed_to_mesh_idx()][:, None, None]
    num_faces = meshes.num_faces_per_mesh().tolist()
    parents = torch.arange(len(faces), device=faces.device).split(num_faces)
    return _Division(
        edges,
        order,
        [part.transpose(0, 1).reshape(-1, 3) for part in split.split(num_faces)],
        torch.cat([part.repeat(4) for part in parents]),
        num_verts,
        meshes.num_verts_per_mesh(),
        meshes.num_faces_per_mesh(),
    )


def _divide(values: Tensor, division: _Division) -> Tensor:
    """Packed rows with the means of the edges' ends in between; integers, which have no mean, copy the first end."""
    first, second = values[division.edges[:, 0]], values[division.edges[:, 1]]
    middles = 0.5 * (first + second) if values.is_floating_point() else first
    return torch.cat([values, middles])[division.order]


def ico_sphere(level: int = 0, device: torch.device | str | None = None) -> Meshes:
    """Unit sphere from an icosahedron divided `level` times: 10 * 4^level + 2 vertices, 20 * 4^level faces."""
    if level < 0:
        raise ValueError(f"level must not be negative, got {level}")
    short, long = 0.5257, 0.8507  # PyTorch3D's rounding of the golden rectangle: level 0 is unit to 4 digits
    corners = [(-short, long), (short, long), (-short, -long), (short, -long)]
    verts = torch.tensor(
        [(u, w, 0.0) for u, w in corners] + [(0.0, u, w) for u, w in corners] + [(w, 0.0, u) for u, w in corners]
    )
    sphere = Meshes([verts], [torch.tensor(_ICOSAHEDRON)])
    divide = SubdivideMeshes()
    for _ in range(level):
        sphere = divide(sphere)
        sphere = Meshes([F.normalize(sphere.verts_packed(), dim=1)], [sphere.faces_packed()])
    return sphere if device is None else sphere.to(device)


# fmt: off
_ICOSAHEDRON = [
    (0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11), (1, 5, 9), (5, 11, 4), (11, 10, 2), (10, 7, 6),
    (7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9), (4, 9, 5), (2, 4, 11), (6, 2, 10), (8, 6, 7),
    (9, 8, 1),
]
# fmt: on


def torus(r: float, R: float, sides: int, rings: int, device: torch.device | str | None = None) -> Meshes:
    """Torus about the z axis: a tube of radius r, in `sides` steps, around a circle of radius R, in `rings` steps.

    Vertex i * sides + j lies on ring i at side j; faces look outwards.
    """
    if not R > r > 0 or sides < 3 or rings < 3:
        raise ValueError(f"a torus needs R > r > 0 and at least 3 sides and rings, got {r=}, {R=}, {sides=}, {rings=}")
    i, j = torch.meshgrid(torch.arange(rings), torch.arange(sides), indexing="ij")  # (rings, sides)
    around, across = i * (2 * math.pi / rings), j * (2 * math.pi / sides)
    radius = R + r * across.cos()
    verts = torch.stack([radius * around.cos(), radius * around.sin(), r * across.sin()], dim=2).view(-1, 3)
    here, up = i * sides + j, i * sides + (j + 1) % sides
    ahead, both = (i + 1) % rings * sides + j, (i + 1) % rings * sides + (j + 1) % sides
    faces = torch.stack([here, ahead, both, here, both, up], dim=2).view(-1, 3)
    mesh = Meshes([verts], [faces])
    return mesh if device is None else mesh.to(device)
