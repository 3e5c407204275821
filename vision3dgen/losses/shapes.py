"""Losses on point clouds and meshes: pure functions of tensors, `Meshes` and `Pointclouds` (or PyTorch3D's).

They have PyTorch3D 0.7.9's names, arguments and results where it has them, and are finite, in value and gradient, on
empty members, duplicate points and faces without area. Half precision is computed, and returned, in float32.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.ops.backends import raise_half
from vision3dgen.ops.meshes import (
    MeshesLike,
    cotangents,
    finite_verts,
    mesh_face_areas_normals,
    nearest_points,
    nearest_triangles,
    spread_differences,
)
from vision3dgen.ops.points import PointcloudsLike, checked_cloud, knn_gather, knn_points, within

# ------------------------------------------------------------------------------------------------ point clouds


class Chamfer(NamedTuple):
    """A loss and, when normals were given, the loss on normals; each a pair per point when nothing is reduced."""

    loss: Any
    loss_normals: Any


def _as_padded(
    name: str, points: Tensor | PointcloudsLike, lengths: Tensor | None, normals: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Padded points, lengths and normals of a tensor or a batch of clouds, in float32 or better."""
    if not isinstance(points, Tensor):
        lengths, normals = points.num_points_per_cloud(), points.normals_padded()  # type: ignore[attr-defined]
        points = points.points_padded()
    elif points.ndim != 3:
        raise ValueError(f"{name} must be point clouds or (B N D), got {tuple(points.shape)}")
    if normals is not None:
        check_shape(**{name: (points, "B N D"), f"{name}_normals": (normals, "B N 3")})
        normals, _ = checked_cloud(f"{name}_normals", raise_half(normals), lengths)
    return *checked_cloud(name, raise_half(points), lengths), normals


def chamfer_distance(
    x: Float[Tensor, "B N D"] | PointcloudsLike,
    y: Float[Tensor, "B M D"] | PointcloudsLike,
    x_lengths: Int[Tensor, " B"] | None = None,
    y_lengths: Int[Tensor, " B"] | None = None,
    x_normals: Float[Tensor, "B N 3"] | None = None,
    y_normals: Float[Tensor, "B M 3"] | None = None,
    weights: Float[Tensor, " B"] | None = None,
    batch_reduction: str | None = "mean",
    point_reduction: str | None = "mean",
    norm: int = 2,
    single_directional: bool = False,
    abs_cosine: bool = True,
) -> Chamfer:
    """Distance of each point to the nearest point of the other cloud, both directions summed.

    norm 2 is the SQUARED Euclidean distance, norm 1 the Manhattan distance: two points (3, 4) apart are 50 and 14.
    `point_reduction` mean, sum, max (of both directions) or None; `batch_reduction` mean, sum or None. With neither,
    each result is the pair (x to y, y to x). The loss on normals is 1 - |cos| (or 1 - cos) between neighbors.
    `weights` (B,) multiply each cloud's distances; the mean over the batch divides by their sum.
    Differs: a cloud that is empty, or whose partner is, adds zero whatever the reduction (PyTorch3D: sometimes NaN).
    """
    check_choice("batch_reduction", batch_reduction, ("mean", "sum", None))
    check_choice("point_reduction", point_reduction, ("mean", "sum", "max", None))
    if point_reduction is None and batch_reduction is not None:
        raise ValueError(f"batch_reduction must be None when point_reduction is None, got {batch_reduction!r}")
    x, x_lengths, x_normals = _as_padded("x", x, x_lengths, x_normals)
    y, y_lengths, y_normals = _as_padded("y", y, y_lengths, y_normals)
    check_shape(x=(x, "B N D"), y=(y, "B M D"))
    if point_reduction == "max" and (x_normals is not None or y_normals is not None):
        raise ValueError('point_reduction "max" takes no normals: the farthest point says nothing about them')
    if weights is not None:
        check_shape(x=(x, "B N D"), weights=(weights, "B"))
        check_finite(weights=weights)
        if bool((weights < 0).any()):
            raise ValueError(f"weights must not be negative, got {weights.tolist()}")

    directions = [_directed(x, y, x_lengths, y_lengths, x_normals, y_normals, weights, norm, abs_cosine)]
    if not single_directional:
        directions.append(_directed(y, x, y_lengths, x_lengths, y_normals, x_normals, weights, norm, abs_cosine))
    if point_reduction is None:
        if single_directional:
            return Chamfer(*directions[0])
        distances, cosines = zip(*directions)
        return Chamfer(distances, None if cosines[0] is None else cosines)

    counts = [x_lengths, y_lengths][: len(directions)]
    losses = []
    for kind in zip(*directions):  # distances of each direction, then normals of each direction
        reduced = [_reduce_points(values, count, point_reduction) for values, count in zip(kind, counts)]
        losses.append(_reduce_batch(reduced, weights, point_reduction, batch_reduction))
    return Chamfer(*losses)


def _directed(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    x_normals: Tensor | None,
    y_normals: Tensor | None,
    weights: Tensor | None,
    norm: int,
    abs_cosine: bool,
) -> tuple[Tensor, Tensor | None]:
    """Distance and, with normals, 1 - cosine from each point of x to its neighbor in y (B, N), zero where none."""
    nearest = knn_points(x, y, x_lengths, y_lengths, norm=norm, K=1)
    distance = nearest.dists[..., 0]
    cosine = None
    if x_normals is not None and y_normals is not None:
        facing = torch.cosine_similarity(
            x_normals, knn_gather(y_normals, nearest.idx, y_lengths)[:, :, 0], dim=2, eps=1e-6
        )
        cosine = 1 - (facing.abs() if abs_cosine else facing)
        if x_lengths is not None:
            cosine = cosine.where(within(x_lengths, x.shape[1]), 0)
        if y_lengths is not None:
            cosine = cosine.where(y_lengths[:, None] > 0, 0)
        if y.shape[1] == 0:
            cosine = 0 * cosine
    if weights is not None:
        distance = distance * weights[:, None]
        cosine = None if cosine is None else cosine * weights[:, None]
    return distance, cosine


def _reduce_points(values: Tensor | None, lengths: Tensor | None, reduction: str) -> Tensor | None:
    if values is None:
        return None
    if reduction == "max":
        return values.amax(1) if values.shape[1] else values.sum(1)
    total = values.sum(1)
    if reduction == "sum":
        return total
    return total / (max(values.shape[1], 1) if lengths is None else lengths.clamp(min=1))


def _reduce_batch(
    directions: list[Tensor | None], weights: Tensor | None, point_reduction: str, reduction: str | None
) -> Tensor | None:
    parts = [part for part in directions if part is not None]
    if not parts:
        return None
    both = torch.stack(parts)  # (1 or 2, B)
    each = both.amax(0) if point_reduction == "max" else both.sum(0)
    if reduction is None:
        return each
    total = each.sum()
    if reduction == "sum":
        return total
    if weights is None:
        return total / max(len(each), 1)
    mass = weights.sum()
    return total / mass.where(mass > 0, 1)


def hausdorff_distance(
    x: Float[Tensor, "B N D"] | PointcloudsLike,
    y: Float[Tensor, "B M D"] | PointcloudsLike,
    x_lengths: Int[Tensor, " B"] | None = None,
    y_lengths: Int[Tensor, " B"] | None = None,
    *,
    single_directional: bool = False,
) -> Float[Tensor, " B"]:
    """Largest (unsquared) distance from a point of one cloud to the other cloud; of x to y only if single_directional.

    Zero where either cloud is empty.
    """
    x, x_lengths, _ = _as_padded("x", x, x_lengths, None)
    y, y_lengths, _ = _as_padded("y", y, y_lengths, None)
    squared = chamfer_distance(
        x,
        y,
        x_lengths,
        y_lengths,
        batch_reduction=None,
        point_reduction="max",
        single_directional=single_directional,
    ).loss
    return squared.where(squared > 0, 1).sqrt().where(squared > 0, 0)


# ------------------------------------------------------------------------------------------ earth mover's distance


class EarthMovers(NamedTuple):
    """An earth mover's distance between its bounds."""

    distance: Tensor  # (B,) cost of the plan found, with gradients to the points
    lower: Tensor  # (B,) no plan costs less
    upper: Tensor  # (B,) the cost of the plan found: equal to `lower` if it is optimal


ASSIGNMENT_SIZE = 4096  # the most rows of an assignment that stands for clouds of different sizes


def earth_movers_distance(
    x: Float[Tensor, "B N D"] | PointcloudsLike,
    y: Float[Tensor, "B M D"] | PointcloudsLike,
    x_lengths: Int[Tensor, " B"] | None = None,
    y_lengths: Int[Tensor, " B"] | None = None,
    *,
    method: str = "exact",
    power: int = 1,
    epsilon: float = 1e-3,
    max_iterations: int = 200,
) -> EarthMovers:
    """Least mean of |x - y|^power over all ways to move the mass of x (1/N a point) onto y (1/M a point).

    method "exact" solves an assignment (N = M: 0.1 s at 1024 points, growing as N^3) or a linear program. "entropic"
    runs Sinkhorn in float64 with a regularization annealed to `epsilon` times the mean cost (Cuturi 2013), rounds its
    plans to feasible ones (Altschuler et al. 2017) and brackets the exact value by the best of them and the best of
    their feasible duals. The gradient is that of the plan's cost, the plan held fixed. Holds N x M costs per cloud.
    Zero where either cloud is empty.
    """
    check_choice("method", method, ("exact", "entropic"))
    check_choice("power", power, (1, 2))
    if not epsilon > 0 or max_iterations < 1:
        raise ValueError(f"epsilon and max_iterations must be positive, got {epsilon} and {max_iterations}")
    x, x_lengths, _ = _as_padded("x", x, x_lengths, None)
    y, y_lengths, _ = _as_padded("y", y, y_lengths, None)
    check_shape(x=(x, "B N D"), y=(y, "B M D"))
    each = []
    for b in range(len(x)):
        own_x = x[b] if x_lengths is None else x[b, : int(x_lengths[b])]
        own_y = y[b] if y_lengths is None else y[b, : int(y_lengths[b])]
        if len(own_x) == 0 or len(own_y) == 0:
            zero = 0 * (own_x.sum() + own_y.sum())
            each.append(EarthMovers(zero, zero.detach(), zero.detach()))
        elif method == "exact":
            each.append(_exact_transport(own_x, own_y, power))
        else:
            each.append(_entropic_transport(own_x, own_y, power, epsilon, max_iterations))
    if not each:
        return EarthMovers(x.new_zeros(0), x.new_zeros(0), x.new_zeros(0))
    return EarthMovers(*(torch.stack(column) for column in zip(*each)))


def _costs(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], power: int) -> Float[Tensor, "N M"]:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** power


def _exact_transport(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], power: int) -> EarthMovers:
    n, m = len(x), len(y)
    with torch.no_grad():
        cost = _costs(x.double(), y.double(), power).cpu().numpy()
    copies = math.lcm(n, m)
    if n == m or copies <= ASSIGNMENT_SIZE:  # equal masses once each point is as many copies as it takes
        i, j = linear_sum_assignment(cost.repeat(copies // n, 0).repeat(copies // m, 1))
        i, j, mass = i // (copies // n), j // (copies // m), np.full(copies, 1 / copies)
    else:
        ones_n, ones_m = sparse.eye_array(n), sparse.eye_array(m)
        marginals = sparse.vstack([sparse.kron(ones_n, np.ones((1, m))), sparse.kron(np.ones((1, n)), ones_m)])
        totals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
        solution = linprog(cost.ravel(), A_eq=marginals.tocsr(), b_eq=totals, bounds=(0, None), method="highs")
        assert solution.success, solution.message
        used = np.flatnonzero(solution.x)
        i, j, mass = used // m, used % m, solution.x[used]
    weights = torch.from_numpy(mass).to(x)
    offset = x[torch.from_numpy(i).to(x.device)] - y[torch.from_numpy(j).to(x.device)]
    squared = offset.square().sum(1)
    moved = squared if power == 2 else squared.where(squared > 0, 1).sqrt().where(squared > 0, 0)
    distance = (weights * moved).sum()
    return EarthMovers(distance, distance.detach(), distance.detach())


def _entropic_transport(
    x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], power: int, epsilon: float, max_iterations: int
) -> EarthMovers:
    n, m = len(x), len(y)
    with torch.no_grad():
        cost = _costs(x.double(), y.double(), power)
        mean = cost.mean().clamp(min=torch.finfo(torch.float64).tiny)
        f, g = cost.new_zeros(n), cost.new_zeros(m)
        lower, upper, plan = cost.new_zeros(()), cost.new_full((), torch.inf), cost
        stages = max(1, math.ceil(math.log2(1 / epsilon)))
        for stage in range(1, stages + 1):
            blur = mean * max(epsilon, 2.0**-stage)
            for _ in range(math.ceil(max_iterations / stages)):
                f = -blur * torch.logsumexp((g - cost) / blur - math.log(m), dim=1)
                g = -blur * torch.logsumexp((f[:, None] - cost) / blur - math.log(n), dim=0)
            # the last stage has the least blur but may not have converged: the bounds are the best of all
            lower = torch.maximum(lower, f.mean() + (cost - f[:, None]).amin(0).mean())
            candidate = _feasible(((f[:, None] + g - cost) / blur).exp() / (n * m))
            if bool((candidate * cost).sum() < upper):
                plan, upper = candidate, (candidate * cost).sum()
    distance = (plan.to(x.dtype) * _costs(x, y, power)).sum()
    return EarthMovers(distance, lower.to(x.dtype), upper.to(x.dtype))


def _feasible(plan: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """The plan with rows and columns that carry too much scaled down, and what is then missing spread."""
    n, m = plan.shape
    plan = plan * ((1 / n) / plan.sum(1).clamp(min=1 / n))[:, None]
    plan = plan * ((1 / m) / plan.sum(0).clamp(min=1 / m))
    short_x, short_y = (1 / n - plan.sum(1)).clamp(min=0), (1 / m - plan.sum(0)).clamp(min=0)
    return plan + short_x[:, None] * short_y / short_x.sum().clamp(min=torch.finfo(plan.dtype).tiny)


# ------------------------------------------------------------------------------------------------------ meshes


def _per_member(values: Float[Tensor, " N"], owner: Int[Tensor, " N"], batch: int) -> Tensor:
    """Mean over the batch of each member's mean; a member without values counts zero."""
    counts = torch.bincount(owner, minlength=batch)
    return (values / counts[owner]).sum() / max(batch, 1)


def mesh_edge_loss(meshes: MeshesLike, target_length: float = 0.0) -> Tensor:
    """Mean over the batch of each mesh's mean squared difference between edge length and target."""
    verts, edges = finite_verts(meshes), meshes.edges_packed()
    lengths = (verts[edges[:, 0]] - verts[edges[:, 1]]).norm(dim=1)
    return _per_member((lengths - target_length).square(), meshes.edges_packed_to_mesh_idx(), len(meshes))


def mesh_laplacian_smoothing(meshes: MeshesLike, method: str = "uniform") -> Tensor:
    """Mean over the batch of each mesh's mean distance between a vertex and the weighted mean of its neighbors.

    method "uniform", "cot" (cotangent weights) or "cotcurv" (cotangent offset over four times the area around: the
    curvature normal; Desbrun et al., SIGGRAPH 1999). The weights pass no gradient.
    Differs: a vertex with no edges, or no positive weight, adds zero (PyTorch3D adds its distance from the origin).
    """
    check_choice("method", method, ("uniform", "cot", "cotcurv"))
    verts, faces = finite_verts(meshes), meshes.faces_packed()
    if method == "uniform":
        i, j = meshes.edges_packed().unbind(1)
        weights = torch.ones_like(i, dtype=verts.dtype)
    else:
        with torch.no_grad():
            i, j, cot, inverse_areas = cotangents(verts.double(), faces)
            weights = cot.to(verts.dtype)
    moved, mass = spread_differences(verts, i, j, weights)
    if method == "cotcurv":
        offsets = 0.25 * inverse_areas.to(verts.dtype) * moved
    else:
        offsets = (moved / mass.where(mass > 0, 1)).where(mass > 0, 0)
    return _per_member(offsets.norm(dim=1), meshes.verts_packed_to_mesh_idx(), len(meshes))


def mesh_normal_consistency(meshes: MeshesLike) -> Tensor:
    """Mean over the batch of each mesh's mean of 1 - cos between the normals of every two faces that share an edge.

    Normals are oriented by the shared edge, not by the faces: a flat pair gives 0 and a folded one 2 however it winds.
    A face without area counts 1, without gradient.
    """
    verts, faces, edges = finite_verts(meshes), meshes.faces_packed(), meshes.edges_packed()
    edge, order = meshes.faces_packed_to_edges_packed().flatten().sort(stable=True)  # (3F,) face sides grouped by edge
    opposite = faces.flatten()[order]
    pairs = [(edge[:0], opposite[:0], opposite[:0])]
    for step in range(1, int(torch.bincount(edge).amax()) if len(edge) else 0):  # one step unless an edge has > 2 faces
        same = edge[step:] == edge[:-step]
        pairs.append((edge[step:][same], opposite[step:][same], opposite[:-step][same]))
    shared, left, right = (torch.cat(parts) for parts in zip(*pairs))
    start, end = edges[shared].unbind(1)
    normal_left = mesh_face_areas_normals(verts, torch.stack([start, end, left], dim=1)).normals
    normal_right = mesh_face_areas_normals(verts, torch.stack([end, start, right], dim=1)).normals
    cosine = (normal_left * normal_right).sum(1)
    return _per_member(1 - cosine, meshes.edges_packed_to_mesh_idx()[shared], len(meshes))


def point_mesh_face_distance(meshes: MeshesLike, pcls: PointcloudsLike, min_triangle_area: float = 5e-3) -> Tensor:
    """Mean squared distance of points to the nearest face plus that of faces to the nearest point, per mesh, meaned.

    Differs: distances to triangles are exact at every size; `min_triangle_area`, under which PyTorch3D measures to a
    face's sides, is accepted and ignored. A member without faces or without points adds zero.
    """
    return _point_mesh_distance(meshes, pcls, meshes.faces_packed(), meshes.faces_packed_to_mesh_idx())


def point_mesh_edge_distance(meshes: MeshesLike, pcls: PointcloudsLike) -> Tensor:
    """Mean squared distance of points to the nearest edge plus that of edges to the nearest point, per mesh, meaned."""
    edges = meshes.edges_packed()
    sides = torch.cat([edges, edges[:, 1:]], dim=1)  # a segment is a triangle with a corner twice
    return _point_mesh_distance(meshes, pcls, sides, meshes.edges_packed_to_mesh_idx())


def _point_mesh_distance(
    meshes: MeshesLike, clouds: PointcloudsLike, triangles: Int[Tensor, "F 3"], owner: Int[Tensor, " F"]
) -> Tensor:
    if len(meshes) != len(clouds):
        raise ValueError(f"meshes and pcls must be batches of one size, got {len(meshes)} and {len(clouds)}")
    corners = finite_verts(meshes)[triangles]  # (F, 3, 3)
    counts = clouds.num_points_per_cloud()
    points = raise_half(clouds.points_packed())
    check_finite(**{"points (packed)": points})
    if len(triangles) == 0 or len(points) == 0:
        return 0 * (corners.sum() + points.sum())
    each = []
    per_mesh = corners.split(torch.bincount(owner, minlength=len(meshes)).tolist())
    for own_corners, own_points in zip(per_mesh, points.split(counts.tolist())):
        if len(own_corners) == 0 or len(own_points) == 0:
            each.append(0 * (own_corners.sum() + own_points.sum()))
            continue
        to_face = nearest_triangles(own_points.detach(), own_corners.detach())
        to_point = nearest_points(own_corners.detach(), own_points.detach())
        point_side = _squared_to(own_points, own_corners[to_face.indices], to_face.barycentrics)
        face_side = _squared_to(own_points[to_point.indices], own_corners, to_point.barycentrics)
        each.append(point_side.mean() + face_side.mean())
    return torch.stack(each).mean()


def _squared_to(
    points: Float[Tensor, "N 3"], corners: Float[Tensor, "N 3 3"], barycentrics: Float[Tensor, "N 3"]
) -> Float[Tensor, " N"]:
    """Squared distance to the place with these weights: at the closest one its gradient is that of the distance."""
    return (barycentrics[..., None] * (points[:, None] - corners)).sum(1).square().sum(1)
