"""Solid angles of many triangles seen from many points, far triangles taken together as multipoles.

Reference: Barill et al., Fast winding numbers for soups and clouds, 2018. Differs: the tree is the implicit one of
`boxtree`, four children to a node along a Z-order curve; all queries go down it together; near triangles are exact.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.ops.boxtree import z_order

_ARITY = 4  # children of a node
_FRONT = 2048  # queries that go down together
_PAIRS = 1 << 17  # pairs of a query and a node whose terms are computed at once

# the entries of symmetric tensors of rank 2 and 3, each with the number of its orders
_QUADRATIC = (((0, 0), 1), ((1, 1), 1), ((2, 2), 1), ((0, 1), 2), ((0, 2), 2), ((1, 2), 2))
_CUBIC = (
    ((0, 0, 0), 1), ((1, 1, 1), 1), ((2, 2, 2), 1), ((0, 0, 1), 3), ((0, 0, 2), 3), ((0, 1, 1), 3), ((1, 1, 2), 3),
    ((0, 2, 2), 3), ((1, 2, 2), 3), ((0, 1, 2), 6),
)  # fmt: skip


class _Level(NamedTuple):
    """The nodes of one level: where they are expanded, how far they reach, and their moments."""

    center: Tensor  # (K, 3)
    reach: Tensor  # (K,) distance of the farthest corner, squared; -inf for a node that holds nothing
    moments: Tensor  # (K, 22) area vectors (3), first moments (6), second ones (10), trace of these (3)


@torch.no_grad()
def far_solid_angles(
    corners: Float[Tensor, "F 3 3"], weights: Float[Tensor, " F"], points: Float[Tensor, "N 3"], beta: float
) -> Float[Tensor, " N"]:
    """Weighted sum over triangles of the solid angle seen from each point, in units of the full sphere.

    A node of the tree farther from a point than `beta` times its radius is replaced by the first three terms of its
    expansion, computed in float32, whose error falls as beta^-4; triangles nearer than that are exact, in float64.
    """
    total = points.new_zeros(len(points))
    if not len(corners) or not len(points):
        return total
    middle = (corners.amin((0, 1)) + corners.amax((0, 1))) / 2
    corners, points = corners - middle, points - middle
    order = z_order(corners.mean(1)).argsort()
    corners, weights = corners[order], weights[order]
    levels = _levels(corners, weights)
    child = torch.arange(_ARITY, device=points.device)
    places = z_order(points).argsort()  # neighbors open the same nodes
    for front in places.split(_FRONT):
        own, rough = points[front], points[front].float()
        query = torch.arange(len(front), device=points.device)
        node = torch.zeros_like(query)
        found = own.new_zeros(len(front))
        for depth, level in enumerate(levels):
            if depth:
                query = query.repeat_interleave(_ARITY)
                node = (node[:, None] * _ARITY + child).view(-1)
            away = level.center.index_select(0, node) - rough.index_select(0, query)
            squared = _dot(away, away)
            reach = level.reach[node]
            far = squared > beta * beta * reach
            taken = (far & (reach >= 0)).nonzero()[:, 0]
            for some in taken.split(_PAIRS):
                terms = _multipole(level.moments.index_select(0, node[some]), away.index_select(0, some), squared[some])
                found.index_add_(0, query[some], terms.double())
            opened = (~far).nonzero()[:, 0]
            query, node = query[opened], node[opened]
        for some, triangles in zip(query.split(_PAIRS), node.split(_PAIRS)):
            seen = _exact(corners[triangles] - own[some][:, None]) * weights[triangles]
            found.index_add_(0, some, seen)
        total[front] = found
    return total


def _dot(a: Float[Tensor, "P 3"], b: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def _levels(corners: Float[Tensor, "F 3 3"], weights: Float[Tensor, " F"]) -> list[_Level]:
    """From the root down to the triangles."""
    depth = 0
    while _ARITY**depth < len(corners):
        depth += 1
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    size = area.norm(dim=1).clamp_min(torch.finfo(corners.dtype).tiny)
    vectors = area * weights[:, None]
    centroids = corners.mean(1)
    spread = corners - centroids[:, None]
    own = torch.einsum("fki,fkj->fij", spread, spread) / 12  # of a triangle about its centroid, per area
    leaf = torch.arange(len(corners), device=corners.device)
    levels = []
    for level in range(depth + 1):
        node = leaf // _ARITY ** (depth - level)
        count = _ARITY**level

        def gathered(values: Tensor, node: Tensor = node, count: int = count) -> Tensor:
            return values.new_zeros(count, *values.shape[1:]).index_add_(0, node, values)

        center = gathered(centroids * size[:, None]) / gathered(size).clamp_min(1e-300)[:, None]
        offset = centroids - center[node]
        far = (corners - center[node][:, None]).square().sum(2).amax(1)
        reach = far.new_full((count,), -math.inf).scatter_reduce_(0, node, far, "amax")
        first = gathered(vectors[:, :, None] * offset[:, None])  # (K, 3, 3)
        first = (first + first.transpose(1, 2)) / 2
        second = gathered(vectors[:, :, None, None] * (own + offset[:, :, None] * offset[:, None])[:, None])
        symmetric = (second + second.permute(0, 2, 1, 3) + second.permute(0, 3, 2, 1)) / 3
        moments = [gathered(vectors)]
        moments += [first[:, i, j, None] * times for (i, j), times in _QUADRATIC]
        moments += [symmetric[:, i, j, k, None] * times for (i, j, k), times in _CUBIC]
        moments.append(symmetric.diagonal(dim1=1, dim2=2).sum(2))
        levels.append(_Level(*(values.float() for values in (center, reach, torch.cat(moments, dim=1)))))
    return levels


def _multipole(
    moments: Float[Tensor, "P 22"], away: Float[Tensor, "P 3"], squared: Float[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """The expansion of r_i / |r|^3, summed over a node, about its center: terms of rank 1, 2 and 3."""
    x, y, z = away.unbind(1)
    xx, yy, zz, xy, xz, yz = x * x, y * y, z * z, x * y, x * z, y * z
    m = moments.t().contiguous()
    inverse = 1 / squared
    value = m[0] * x + m[1] * y + m[2] * z
    quadratic = m[3] * xx + m[4] * yy + m[5] * zz + m[6] * xy + m[7] * xz + m[8] * yz
    value = value + (m[3] + m[4] + m[5]) - 3 * quadratic * inverse
    cubic = (m[9] * xx + m[12] * xy + m[13] * xz) * x + (m[10] * yy + m[14] * xy + m[15] * yz) * y
    cubic = cubic + (m[11] * zz + m[16] * xz + m[17] * yz) * z + m[18] * xy * z
    value = value + inverse * (7.5 * cubic * inverse - 4.5 * (m[19] * x + m[20] * y + m[21] * z))
    return value * inverse * inverse.sqrt() / (4 * math.pi)


def _exact(triangles: Float[Tensor, "P 3 3"]) -> Float[Tensor, " P"]:
    """Van Oosterom and Strackee's formula for triangles seen from the origin."""
    a, b, c = triangles.unbind(1)
    volume = _dot(a, torch.linalg.cross(b - a, c - a))
    u, v, w = (_dot(side, side).sqrt() for side in (a, b, c))
    around = u * v * w + _dot(a, b) * w + _dot(b, c) * u + _dot(c, a) * v
    return torch.where(volume == 0, 0, torch.atan2(volume, around)) / (2 * math.pi)
