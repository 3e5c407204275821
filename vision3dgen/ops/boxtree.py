"""A tree of boxes: exact nearest neighbors among triangles or anything else, on CPU and CUDA, without a compiler.

The tree is implicit: boxes are sorted along a Z-order curve, and a node of each level covers four consecutive nodes of
the next. All queries go down it together, one level at a time.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ARITY = 4  # children of a node
_FRONT = 1024  # queries that go down together: what they keep in view stays near the cache
_VIEW = 1 << 18  # pairs of a query and a node that go down together; of more, half the queries wait
_PAIRS = 1 << 18  # distances measured at once

Measure = Callable[[Tensor, Tensor], Tensor]  # (P,) queries and (P,) contents to squared distances (P,)


@torch.no_grad()
def nearest_boxed(
    queries: Float[Tensor, "N I 3"], boxes: Float[Tensor, "M J 3"], bound: Float[Tensor, " N"], measure: Measure
) -> Int[Tensor, " N"]:
    """Index of the content nearest to each query, the first of equals.

    queries, boxes: (low, high) corners around each query and each content, or one corner if it is a point; bound: a
    squared distance within which, rounding included, a content is known to be. All in float64. A node is dropped when
    its box is farther from the query's than the bound.
    """
    order = z_order(boxes.mean(1)).argsort()
    levels = _levels(boxes[order])
    nearest = torch.full((len(queries),), len(boxes), device=queries.device)
    fronts = list(torch.arange(len(queries), device=queries.device).split(_FRONT))
    while fronts:
        front = fronts.pop()
        found = _descend(queries[front], bound[front], levels)
        if found is None:  # equally far from much of the surface, as the center of a ball is
            fronts += front.chunk(2)
            continue
        query, content = front[found[0]], order[found[1]]
        squared = torch.cat([measure(q, c) for q, c in zip(query.split(_PAIRS), content.split(_PAIRS))])
        least = torch.full_like(bound[front], math.inf).scatter_reduce_(0, found[0], squared, "amin")
        best = (squared == least[found[0]]).nonzero()[:, 0]
        nearest.scatter_reduce_(0, query[best], content[best], "amin")
    return nearest


def _descend(
    queries: Float[Tensor, "N I 3"], bound: Float[Tensor, " N"], levels: list[Tensor]
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]] | None:
    """Pairs of a query and a leaf within its bound; None when several queries keep too many nodes in view."""
    child = torch.arange(_ARITY, device=queries.device)
    query = torch.arange(len(queries), device=queries.device)
    node = torch.zeros_like(query)
    for level in levels[1:]:
        if len(query) > _VIEW and len(queries) > 1:
            return None
        query = query.repeat_interleave(_ARITY)
        node = (node[:, None] * _ARITY + child).view(-1)
        box, own = level[node], queries[query]
        u, v, w = torch.maximum(box[:, 0] - own[:, -1], own[:, 0] - box[:, 1]).clamp_min_(0).unbind(1)
        kept = (u * u + v * v + w * w <= bound[query]).nonzero()[:, 0]
        query, node = query[kept], node[kept]
    return query, node


def z_order(centers: Float[Tensor, "M 3"]) -> Int[Tensor, " M"]:
    """Position along a Z-order curve of 2^20 cells per axis."""
    low, high = centers.amin(0), centers.amax(0)
    size = (high - low).amax().clamp_min(torch.finfo(centers.dtype).tiny)
    cells = ((centers - low) / size * (1 << 20)).long().clamp(0, (1 << 20) - 1)
    # move bit i of each coordinate to bit 3 i
    spread = ((32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F))
    for shift, mask in (*spread, (4, 0x10C30C30C30C30C3), (2, 0x1249249249249249)):
        cells = (cells | (cells << shift)) & mask
    return cells[:, 0] | (cells[:, 1] << 1) | (cells[:, 2] << 2)


def _levels(boxes: Float[Tensor, "M J 3"]) -> list[Float[Tensor, "K 2 3"]]:
    """Boxes of the nodes, one tensor per level from the root down; nodes that hold nothing are infinitely far away."""
    size = 1
    while size < len(boxes):
        size *= _ARITY
    low = torch.nn.functional.pad(boxes[:, 0], (0, 0, 0, size - len(boxes)), value=math.inf)
    high = torch.nn.functional.pad(boxes[:, -1], (0, 0, 0, size - len(boxes)), value=-math.inf)
    levels = [torch.stack([low, high], dim=1)]
    while len(low) > 1:
        low, high = low.view(-1, _ARITY, 3).amin(1), high.view(-1, _ARITY, 3).amax(1)
        levels.append(torch.stack([low, high], dim=1))
    return levels[::-1]
