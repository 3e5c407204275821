"""Operators on batches of points: neighbors, sampling, packing, alignment, normals.

Batches are padded (B, N, D) with optional `lengths` (B,): points beyond a cloud's length are neither read nor written,
and may hold anything. Names, arguments and results follow PyTorch3D 0.7.9.

Differs: float64 and half precision are accepted; empty clouds, and K beyond the number of points, have defined results;
NaN, infinity and bad lengths are ValueErrors (not checked under `torch.compile`, which cannot branch on values).
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.ops.backends import full_precision, import_pytorch3d, resolve_backend

DISTANCE_BYTES = 64 * 2**20  # the most bytes of pairwise distances held at once
TILE_COLUMNS = 2**16  # the most points of the searched cloud in one tile of distances
TREE_DIMENSIONS = 8  # a KD-tree prunes little beyond
TREE_PAIRS = 2**12  # fewer pairs than this are faster to measure than to sort into a tree


@runtime_checkable
class PointcloudsLike(Protocol):
    """What the operators ask of a batch of point clouds, ours or PyTorch3D's."""

    def points_padded(self) -> Tensor: ...

    def num_points_per_cloud(self) -> Tensor: ...


# --------------------------------------------------------------------------------------------------- neighbors


class Neighbors(NamedTuple):
    """Result of a neighbor search."""

    dists: Tensor  # (B, N, K) squared for norm 2, absolute for norm 1
    idx: Tensor  # (B, N, K) int64 into the searched cloud
    knn: Tensor | None  # (B, N, K, D) the neighbors, when asked for


def checked_lengths(name: str, points: Tensor, lengths: Tensor | None) -> Tensor | None:
    """`lengths` (B,) as int64 beside `points` (B, N, D), both verified."""
    if lengths is not None:
        check_shape(**{f"{name} lengths": (lengths, str(len(points)))})
        if lengths.is_floating_point():
            raise ValueError(f"{name} lengths must be integers, got {lengths.dtype}")
        lengths = lengths.to(points.device, torch.int64)
    if torch.compiler.is_compiling():
        return lengths
    if lengths is not None and len(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > points.shape[1]:
            raise ValueError(f"{name} lengths must be in [0, {points.shape[1]}], got {lengths.tolist()}")
    if not bool(torch.isfinite(points).all()):
        if lengths is not None:
            points = points.where(within(lengths, points.shape[1])[..., None], 0)
        check_finite(**{name: points})
    return lengths


def within(lengths: Int[Tensor, " B"], size: int) -> Tensor:
    """(B, size) mask of the positions before each length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


@full_precision
def knn_points(
    p1: Float[Tensor, "B N D"],
    p2: Float[Tensor, "B M D"],
    lengths1: Int[Tensor, " B"] | None = None,
    lengths2: Int[Tensor, " B"] | None = None,
    norm: int = 2,
    K: int = 1,
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
    *,
    backend: str | None = None,
) -> Neighbors:
    """The K points of p2 nearest to each point of p1, ascending, with gradients to both.

    Returns dists (B, N, K), squared Euclidean for norm 2 and Manhattan for norm 1, idx (B, N, K) and, if `return_nn`,
    knn (B, N, K, D). Zeros stand where p1 has no such point or p2 fewer than K. Holds at most DISTANCE_BYTES of
    distances; `version` is accepted and ignored.
    """
    check_choice("norm", norm, (1, 2))
    size = check_shape(p1=(p1, "B N D"), p2=(p2, "B M D"))
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}")
    lengths1, lengths2 = checked_lengths("p1", p1, lengths1), checked_lengths("p2", p2, lengths2)
    if resolve_backend(backend) == "pytorch3d":
        knn_module = import_pytorch3d("pytorch3d.ops")
        return Neighbors(*knn_module.knn_points(p1, p2, lengths1, lengths2, norm, K, version, return_nn, return_sorted))

    if size["M"] == 0:  # one point nobody may find keeps shapes and graph whole
        p2, lengths2 = F.pad(p2, (0, 0, 0, 1)), torch.zeros(size["B"], dtype=torch.int64, device=p2.device)
    if lengths2 is None and p2.shape[1] < K:
        lengths2 = torch.full((size["B"],), p2.shape[1], dtype=torch.int64, device=p2.device)

    found = nearest_indices(p1, p2, lengths1, lengths2, norm, K)
    absent = torch.zeros((), dtype=torch.bool, device=p1.device)
    if lengths1 is not None:
        absent = ~within(lengths1, size["N"])[..., None]
    if lengths2 is not None:
        absent = absent | ~within(lengths2, K)[:, None]
    ragged = absent.ndim > 0
    idx = found.masked_fill(absent, 0) if ragged else found
    near = _take_rows(p2, idx)
    if ragged:  # padding may hold NaN, which a mask on the distances alone would let into the gradients
        offset = (p1[:, :, None].expand_as(near) - near).masked_fill(absent[..., None], 0)
    else:
        offset = p1[:, :, None] - near
    dists = offset.square().sum(-1) if norm == 2 else offset.abs().sum(-1)  # (B, N, K)
    if return_sorted and K > 1 and not torch.compiler.is_compiling():
        dists, idx, near = _ascending(dists, idx, near, lengths2)
    if not return_nn:
        return Neighbors(dists, idx, None)
    if lengths2 is not None:
        near = near.where(within(lengths2, K)[:, None, :, None], 0)
    return Neighbors(dists, idx, near)


def _ascending(dists: Tensor, idx: Tensor, near: Tensor, lengths2: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Undo the swaps that distances computed in another precision or order can show: rare, so looked for first."""
    keys = dists.detach()
    if lengths2 is not None:
        keys = keys.masked_fill(~within(lengths2, keys.shape[-1])[:, None], torch.inf)
    if not bool((keys[..., 1:] < keys[..., :-1]).any()):
        return dists, idx, near
    order = keys.sort(dim=-1, stable=True).indices
    return dists.gather(2, order), idx.gather(2, order), near.gather(2, order[..., None].expand_as(near))


def _take_rows(points: Float[Tensor, "B M C"], idx: Int[Tensor, "B *K"]) -> Float[Tensor, "B *K C"]:
    """points[b, idx[b, ...]] as one flat row selection, whose backward is much faster than that of `gather`."""
    first = torch.arange(len(points), device=idx.device).view(-1, *[1] * (idx.ndim - 1)) * points.shape[1]
    rows = points.flatten(0, 1).index_select(0, (idx + first).flatten())
    return rows.view(*idx.shape, points.shape[2])


@torch.no_grad()
def nearest_indices(
    p1: Float[Tensor, "B N D"],
    p2: Float[Tensor, "B M D"],
    lengths1: Int[Tensor, " B"] | None,
    lengths2: Int[Tensor, " B"] | None,
    norm: int,
    K: int,
) -> Int[Tensor, "B N K"]:
    """Indices of the K nearest points, nearest first; undefined where either cloud has no such point."""
    _, queries, dimensions = p1.shape
    large = dimensions <= TREE_DIMENSIONS and queries * p2.shape[1] >= TREE_PAIRS
    if large and p1.device.type == "cpu" and not torch.compiler.is_compiling():
        return _tree_search(p1, p2, lengths1, lengths2, norm, K)
    return _tiled_search(p1, p2, lengths2, norm, K)


def build_tree(points: np.ndarray) -> cKDTree:
    """A KD-tree for one pass of queries: midpoint splits cost less to build than they lose in the search."""
    return cKDTree(points, leafsize=24, balanced_tree=False, compact_nodes=False)


def _tree_search(
    p1: Tensor, p2: Tensor, lengths1: Tensor | None, lengths2: Tensor | None, norm: int, K: int
) -> Int[Tensor, "B N K"]:
    batch, queries, _ = p1.shape
    counts1 = [queries] * batch if lengths1 is None else lengths1.tolist()
    counts2 = [p2.shape[1]] * batch if lengths2 is None else lengths2.tolist()
    x, y = p1.detach().double().numpy(), p2.detach().double().numpy()
    idx = np.zeros((batch, queries, K), dtype=np.int64)
    for b, (n, m) in enumerate(zip(counts1, counts2)):
        if n and m:
            k = min(K, m)
            found = build_tree(y[b, :m]).query(x[b, :n], k=k, p=norm, workers=torch.get_num_threads())[1]
            idx[b, :n, :k] = found.reshape(n, k)
    return torch.from_numpy(idx)


def _tiled_search(p1: Tensor, p2: Tensor, lengths2: Tensor | None, norm: int, K: int) -> Int[Tensor, "B N K"]:
    batch, queries, _ = p1.shape
    points = p2.shape[1]
    columns = max(1, min(points, TILE_COLUMNS))
    rows = max(1, DISTANCE_BYTES // (max(batch, 1) * columns * p1.element_size()))
    idx = torch.zeros(batch, queries, K, dtype=torch.int64, device=p1.device)
    for top in range(0, queries, rows):
        best: list[tuple[Tensor, Tensor]] = []  # distances and indices (B, rows, k) of each tile of columns
        for left in range(0, points, columns):
            tile = p2[:, left : left + columns]
            distances = torch.cdist(
                p1[:, top : top + rows], tile, p=float(norm), compute_mode="donot_use_mm_for_euclid_dist"
            )
            if lengths2 is not None:
                distances = distances.masked_fill_(~within(lengths2 - left, tile.shape[1])[:, None], torch.inf)
            nearest, where = _smallest(distances, K)
            best.append((nearest, where + left))
        where = torch.cat([where for _, where in best], dim=2)
        if len(best) > 1:
            where = where.gather(2, _smallest(torch.cat([nearest for nearest, _ in best], dim=2), K)[1])
        idx[:, top : top + rows, : where.shape[2]] = where
    return idx


def _smallest(distances: Float[Tensor, "B N M"], K: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the K smallest, ascending."""
    if K == 1:
        values, columns = distances.min(dim=2, keepdim=True)
        return values, columns
    values, columns = distances.topk(min(K, distances.shape[2]), dim=2, largest=False)
    return values, columns


@full_precision
def knn_gather(
    x: Float[Tensor, "B M U"], idx: Int[Tensor, "B N K"], lengths: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "B N K U"]:
    """Rows of x at the indices `knn_points` returned; zeros for neighbors k beyond a cloud's length."""
    check_shape(x=(x, "B M U"), idx=(idx, "B N K"))
    if x.shape[1] == 0:
        x, lengths = F.pad(x, (0, 0, 0, 1)), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    rows = _take_rows(x, idx)
    if lengths is None:
        return rows
    return rows.masked_fill(~within(lengths.to(idx.device), idx.shape[2])[:, None, :, None], 0)
