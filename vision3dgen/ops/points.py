"""Operators on batches of points: neighbors, sampling, packing, alignment, normals.

Batches are padded (B, N, D) with optional `lengths` (B,): points beyond a cloud's length are neither read nor written,
and may hold anything. Names, arguments and results follow PyTorch3D 0.7.9.

Differs: float64 and half precision are accepted; empty clouds, and K beyond the number of points, have defined results;
NaN, infinity and bad lengths are ValueErrors (not checked under `torch.compile`, which cannot branch on values).
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.ops.backends import full_precision, import_pytorch3d, raise_half, resolve_backend, triton_runs_on

DISTANCE_BYTES = 64 * 2**20  # the most bytes of pairwise distances held at once
TILE_COLUMNS = 2**16  # the most points of the searched cloud in one tile of distances
PAIRS_AT_ONCE = DISTANCE_BYTES // 64  # the most pairs of a radius search listed at once
KERNEL_NEIGHBORS = 32  # the most neighbors, and
KERNEL_DIMENSIONS = 16  # axes, that the Triton kernels keep in registers
TREE_DIMENSIONS = 8  # a KD-tree prunes little beyond
FEW_QUERIES = 2**12  # fewer than this are answered before threads have started
TREE_PAIRS = 2**12  # fewer pairs than this are faster to measure than to sort into a tree


@runtime_checkable
class PointcloudsLike(Protocol):
    """What the operators ask of a batch of point clouds, ours or PyTorch3D's."""

    def __len__(self) -> int: ...

    def points_padded(self) -> Tensor: ...

    def points_packed(self) -> Tensor: ...

    def num_points_per_cloud(self) -> Tensor: ...


# --------------------------------------------------------------------------------------------------- neighbors


class Neighbors(NamedTuple):
    """Result of a neighbor search."""

    dists: Tensor  # (B, N, K) squared for norm 2, absolute for norm 1
    idx: Tensor  # (B, N, K) int64 into the searched cloud
    knn: Tensor | None  # (B, N, K, D) the neighbors, when asked for


def checked_cloud(name: str, points: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Verified points (B, N, D), zero beyond each length to keep padding out of gradients, and int64 lengths (B,)."""
    if lengths is not None:
        check_shape(**{f"{name} lengths": (lengths, str(len(points)))})
        if lengths.is_floating_point():
            raise ValueError(f"{name} lengths must be integers, got {lengths.dtype}")
        lengths = lengths.to(points.device, torch.int64)
        points = points.where(within(lengths, points.shape[1])[..., None], 0)
    if torch.compiler.is_compiling():
        return points, lengths
    if lengths is not None and bool(((lengths < 0) | (lengths > points.shape[1])).any()):
        raise ValueError(f"{name} lengths must be in [0, {points.shape[1]}], got {lengths.tolist()}")
    check_finite(**{name: points})
    return points, lengths


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
    p1, lengths1 = checked_cloud("p1", p1, lengths1)
    p2, lengths2 = checked_cloud("p2", p2, lengths2)
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
    dists = _lengths(p1[:, :, None] - near, norm)  # (B, N, K)
    if ragged:
        dists = dists.masked_fill(absent, 0)
    if return_sorted and K > 1 and not torch.compiler.is_compiling():
        dists, idx, near = _ascending(dists, idx, near, lengths2)
    if not return_nn:
        return Neighbors(dists, idx, None)
    if lengths2 is not None:
        near = near.where(within(lengths2, K)[:, None, :, None], 0)
    return Neighbors(dists, idx, near)


def _lengths(offsets: Float[Tensor, "*N D"], norm: int) -> Float[Tensor, "*N"]:
    """Squared Euclidean or Manhattan lengths; a few dimensions are added one by one, far faster than a reduction."""
    terms = offsets.square() if norm == 2 else offsets.abs()
    if not 1 <= offsets.shape[-1] <= TREE_DIMENSIONS:
        return terms.sum(-1)
    return functools.reduce(torch.add, terms.unbind(-1))


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
    if K <= KERNEL_NEIGHBORS and _kernels_take(p1):
        from vision3dgen.ops import kernels

        return kernels.nearest_indices(p1, p2, lengths1, lengths2, norm, K)
    large = dimensions <= TREE_DIMENSIONS and queries * p2.shape[1] >= TREE_PAIRS
    if large and p1.device.type == "cpu" and not torch.compiler.is_compiling():
        return _tree_search(p1, p2, lengths1, lengths2, norm, K)
    return _tiled_search(p1, p2, lengths2, norm, K)


def _kernels_take(points: Float[Tensor, "B N D"]) -> bool:
    return 0 < points.shape[2] <= KERNEL_DIMENSIONS and triton_runs_on(points.device.type)


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
    threads = torch.get_num_threads()

    def search(b: int, workers: int) -> None:
        n, m = counts1[b], counts2[b]
        if n and m:
            k = min(K, m)
            found = build_tree(y[b, :m]).query(x[b, :n], k=k, p=norm, workers=workers)[1]
            idx[b, :n, :k] = found.reshape(n, k)

    if 1 < threads <= batch:  # whole clouds side by side: building a tree takes one thread
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(functools.partial(search, workers=1), range(batch)))
    else:
        for b in range(batch):
            search(b, threads if counts1[b] > FEW_QUERIES else 1)
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
        x, idx = F.pad(x, (0, 0, 0, 1)), torch.zeros_like(idx)
    rows = _take_rows(x, idx)
    if lengths is None:
        return rows
    return rows.masked_fill(~within(lengths.to(idx.device), idx.shape[2])[:, None, :, None], 0)


@full_precision
def masked_gather(points: Float[Tensor, "B M U"], idx: Int[Tensor, "B *K"]) -> Float[Tensor, "B *K U"]:
    """Rows of points at idx (B, K) or (B, N, K); zeros where idx is -1."""
    if idx.ndim not in (2, 3) or len(idx) != len(points):
        raise ValueError(f"idx must be (B, K) or (B, N, K) with B = {len(points)}, got {tuple(idx.shape)}")
    if points.shape[1] == 0:
        return points.new_zeros(*idx.shape, points.shape[2]) + points.sum()
    return _take_rows(points, idx.clamp(min=0)).where((idx >= 0)[..., None], 0)


@full_precision
def ball_query(
    p1: Float[Tensor, "B N D"],
    p2: Float[Tensor, "B M D"],
    lengths1: Int[Tensor, " B"] | None = None,
    lengths2: Int[Tensor, " B"] | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    skip_points_outside_cube: bool = False,
    *,
    backend: str | None = None,
) -> Neighbors:
    """The first K points of p2, by index, closer than `radius` to each point of p1.

    Returns squared dists (B, N, K), idx (B, N, K) and, if `return_nn`, knn (B, N, K, D); where there are fewer than K,
    idx is -1 and the others 0. `skip_points_outside_cube` only changes the speed of PyTorch3D.
    """
    check_shape(p1=(p1, "B N D"), p2=(p2, "B M D"))
    if K < 1 or not radius > 0:
        raise ValueError(f"K must be at least 1 and radius positive, got K={K}, radius={radius}")
    p1, lengths1 = checked_cloud("p1", p1, lengths1)
    p2, lengths2 = checked_cloud("p2", p2, lengths2)
    if resolve_backend(backend) == "pytorch3d":
        module = import_pytorch3d("pytorch3d.ops")
        return Neighbors(*module.ball_query(p1, p2, lengths1, lengths2, K, radius, return_nn, skip_points_outside_cube))
    idx = _ball_search(p1, p2, lengths1, lengths2, K, radius)
    near = masked_gather(p2, idx)
    dists = _lengths(p1[:, :, None] - near, 2).where(idx >= 0, 0)
    return Neighbors(dists, idx, near if return_nn else None)


@torch.no_grad()
def _ball_search(
    p1: Tensor, p2: Tensor, lengths1: Tensor | None, lengths2: Tensor | None, K: int, radius: float
) -> Int[Tensor, "B N K"]:
    batch, queries, dimensions = p1.shape
    large = dimensions <= TREE_DIMENSIONS and queries * p2.shape[1] >= TREE_PAIRS
    if not large or p1.device.type != "cpu" or torch.compiler.is_compiling():
        return _ball_tiled(p1, p2, lengths1, lengths2, K, radius)
    counts1 = [queries] * batch if lengths1 is None else lengths1.tolist()
    counts2 = [p2.shape[1]] * batch if lengths2 is None else lengths2.tolist()
    x, y = p1.detach().numpy(), p2.detach().numpy()
    idx = np.full((batch, queries, K), -1, dtype=np.int64)
    for b, (n, m) in enumerate(zip(counts1, counts2)):
        if n and m:
            _ball_tree(x[b, :n], y[b, :m], radius, idx[b, :n])
    return torch.from_numpy(idx)


def _ball_tree(x: np.ndarray, y: np.ndarray, radius: float, idx: np.ndarray) -> None:
    """Fill idx (N, K) for one cloud; the tree only proposes pairs, `radius` is judged in the points' own precision."""
    tree, reach = build_tree(y), radius * (1 + 1e-5)
    pairs = np.cumsum(tree.query_ball_point(x, reach, workers=torch.get_num_threads(), return_length=True))
    parts = np.searchsorted(pairs, np.arange(PAIRS_AT_ONCE, pairs[-1], PAIRS_AT_ONCE))
    for rows in np.split(np.arange(len(x)), np.unique(parts)):
        if not len(rows):
            continue
        found = build_tree(x[rows]).sparse_distance_matrix(tree, reach, output_type="ndarray")
        squared = np.square(x[rows][found["i"]] - y[found["j"]]).sum(1)
        found = found[squared < x.dtype.type(radius**2)]
        table = csr_array((found["v"], (found["i"], found["j"])), shape=(len(rows), len(y)))
        table.sort_indices()
        counts = np.diff(table.indptr)
        rank = np.arange(table.nnz) - np.repeat(table.indptr[:-1], counts)
        kept = rank < idx.shape[1]
        idx[np.repeat(rows, counts)[kept], rank[kept]] = table.indices[kept]


def _ball_tiled(
    p1: Tensor, p2: Tensor, lengths1: Tensor | None, lengths2: Tensor | None, K: int, radius: float
) -> Int[Tensor, "B N K"]:
    batch, queries, _ = p1.shape
    points = p2.shape[1]
    idx = torch.full((batch, queries, K + 1), -1, dtype=torch.int64, device=p1.device)  # the last column is discarded
    rows = max(1, DISTANCE_BYTES // (max(batch * points, 1) * 24))
    columns = torch.arange(points, device=p1.device)
    for top in range(0, queries, rows):
        squared = p1.new_zeros(batch, min(rows, queries - top), points)
        for axis in range(p1.shape[2]):
            squared += (p1[:, top : top + rows, None, axis] - p2[:, None, :, axis]).square_()
        inside = squared < radius**2  # (B, rows, M)
        if lengths2 is not None:
            inside &= within(lengths2, points)[:, None]
        if lengths1 is not None:
            inside &= within(lengths1, queries)[:, top : top + rows, None]
        rank = inside.cumsum(2)
        place = (rank - 1).where(inside & (rank <= K), K)
        idx[:, top : top + rows].scatter_(2, place, columns.expand_as(place))
    return idx[:, :, :K].contiguous()


# ---------------------------------------------------------------------------------------------------- sampling


@full_precision
def sample_farthest_points(
    points: Float[Tensor, "B N D"],
    lengths: Int[Tensor, " B"] | None = None,
    K: int | list[int] | Int[Tensor, " B"] = 50,
    random_start_point: bool = False,
    *,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "B K D"], Int[Tensor, "B K"]]:
    """K points of each cloud, each the farthest from those chosen before it, and their indices.

    The first is point 0, or a random one drawn from `generator`. K may differ between clouds. Where a cloud has fewer
    points than K, points are 0 and indices -1. Gradients reach the chosen points. (Gonzalez 1985; Qi et al. 2017.)
    """
    size = check_shape(points=(points, "B N D"))
    points, lengths = checked_cloud("points", points, lengths)
    wanted = torch.as_tensor(K, dtype=torch.int64, device=points.device)
    if wanted.ndim == 0:
        wanted = wanted.expand(size["B"])
    check_shape(points=(points, "B N D"), K=(wanted, "B"))
    if bool((wanted < 0).any()):
        raise ValueError(f"K must not be negative, got {K}")
    if resolve_backend(backend) == "pytorch3d":
        module = import_pytorch3d("pytorch3d.ops")
        return module.sample_farthest_points(points, lengths, K, random_start_point)

    counts = torch.full_like(wanted, size["N"]) if lengths is None else lengths
    start = torch.zeros_like(wanted)
    if random_start_point:
        device = points.device if generator is None else generator.device
        draw = torch.rand(size["B"], generator=generator, dtype=torch.float64, device=device).to(points.device)
        start = (draw * counts).long()
    columns = int(wanted.max()) if size["B"] else 0
    if _kernels_take(points):
        from vision3dgen.ops import kernels

        idx = kernels.farthest_indices(points.detach(), counts, columns, start)
    else:
        search = _farthest_numpy if points.device.type == "cpu" else _farthest_torch
        idx = search(points.detach(), counts, columns, start)
    idx = idx.where(within(wanted.minimum(counts), columns), -1)
    return masked_gather(points, idx), idx


def _farthest_torch(points: Tensor, counts: Tensor, K: int, start: Tensor) -> Int[Tensor, "B K"]:
    """All clouds in step; meaningful for the first min(K, count) columns of each cloud."""
    axes = points.permute(2, 0, 1).contiguous()  # (D, B, N)
    nearest = torch.full_like(axes[0], torch.inf).where(
        within(counts, points.shape[1]), -1
    )  # squared distance to the chosen set
    idx = torch.zeros(len(points), K, dtype=torch.int64, device=points.device)
    current = start[:, None]
    for k in range(min(K, points.shape[1])):
        idx[:, k] = current[:, 0]
        squared = (axes - axes.gather(2, current.expand(len(axes), -1, 1))).square_().sum(0)
        nearest = torch.minimum(nearest, squared)
        current = nearest.argmax(1, keepdim=True)
    return idx


def _farthest_numpy(points: Tensor, counts: Tensor, K: int, start: Tensor) -> Int[Tensor, "B K"]:
    """The same, cloud by cloud: NumPy's low cost per call makes it twice as fast as torch on CPU."""
    idx = np.zeros((len(points), K), dtype=np.int64)
    for b, (count, current) in enumerate(zip(counts.tolist(), start.tolist())):
        axes = np.ascontiguousarray(points[b, :count].numpy().T)  # (D, count)
        nearest = np.full(count, np.inf, dtype=axes.dtype)
        squared, offset = np.empty_like(nearest), np.empty_like(nearest)
        for k in range(min(K, count)):
            idx[b, k] = current
            squared.fill(0)
            for axis in axes:
                np.subtract(axis, axis[current], out=offset)
                np.multiply(offset, offset, out=offset)
                np.add(squared, offset, out=squared)
            np.minimum(nearest, squared, out=nearest)
            current = int(nearest.argmax())
    return torch.from_numpy(idx)


# ----------------------------------------------------------------------------------------------------- packing


def packed_to_padded(
    inputs: Float[Tensor, "N *D"], first_idxs: Int[Tensor, " B"], max_size: int
) -> Float[Tensor, "B M *D"]:
    """Rows of a packed tensor as (B, max_size, ...), zeros behind each member's own; `first_idxs` where each begins."""
    counts = torch.diff(first_idxs, append=first_idxs.new_tensor([len(inputs)]))
    if len(inputs) == 0:
        return inputs.new_zeros(len(first_idxs), max_size, *inputs.shape[1:]) + inputs.sum()
    if inputs.device.type == "cpu" and not torch.compiler.is_compiling() and len(first_idxs):
        members = [rows[:max_size] for rows in inputs[int(first_idxs[0]) :].split(counts.tolist())]
        padded = torch.nn.utils.rnn.pad_sequence(members, batch_first=True)
        missing = max_size - padded.shape[1]
        return F.pad(padded, (0, 0) * (inputs.ndim - 1) + (0, missing)) if missing else padded
    mask = within(counts, max_size)
    rows = (first_idxs[:, None] + torch.arange(max_size, device=inputs.device)).where(mask, 0)
    return inputs[rows].where(mask.view(*mask.shape, *[1] * (inputs.ndim - 1)), 0)


def padded_to_packed(
    inputs: Float[Tensor, "B *D"], first_idxs: Int[Tensor, " B"], num_inputs: int, max_size_dim: int = 1
) -> Float[Tensor, "N ..."]:
    """The inverse of `packed_to_padded`: `num_inputs` rows, `max_size_dim` being the padded dimension."""
    padded = inputs.movedim(max_size_dim, 1)
    counts = torch.diff(first_idxs, append=first_idxs.new_tensor([num_inputs]))
    members = torch.arange(len(first_idxs), device=inputs.device)
    owner = torch.repeat_interleave(members, counts, output_size=num_inputs)
    return padded[owner, torch.arange(num_inputs, device=inputs.device) - first_idxs[owner]]


@full_precision
def wmean(
    x: Float[Tensor, "... N D"],
    weight: Float[Tensor, "... N"] | None = None,
    dim: int | tuple[int, ...] = -2,
    keepdim: bool = True,
    eps: float = 1e-9,
) -> Tensor:
    """Mean of x over `dim` with a weight for each row; weights summing to less than eps are divided by eps."""
    if weight is None:
        return x.mean(dim=dim, keepdim=keepdim)
    if weight.shape not in (x.shape[:-1], (1,) * (x.ndim - 2) + x.shape[-2:-1]):
        raise ValueError(f"weight must be {tuple(x.shape[:-1])} like the rows of x, got {tuple(weight.shape)}")
    mass = weight[..., None]
    return (x * mass).sum(dim=dim, keepdim=keepdim) / mass.sum(dim=dim, keepdim=keepdim).clamp(min=eps)


# --------------------------------------------------------------------------------------------------- alignment


class SimilarityTransform(NamedTuple):
    """Y = s X R + T for row vectors."""

    R: Tensor  # (B, D, D)
    T: Tensor  # (B, D)
    s: Tensor  # (B,)


class ICPSolution(NamedTuple):
    converged: bool
    rmse: Tensor  # (B,) root mean squared distance to the nearest neighbors
    Xt: Any  # X transformed: a tensor or point clouds, as given
    RTs: SimilarityTransform
    t_history: list[SimilarityTransform]


class _Rotation(torch.autograd.Function):
    """The orthogonal R that maximizes tr(R' A), with a gradient that stays finite where R is not unique.

    A = P R with P symmetric, so dR = W R with P W + W P = dA R' - R dA'. In the basis that makes P diagonal the
    gradient divides by sums of two signed singular values; directions whose sum vanishes are free and get zero.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, allow_reflection: bool) -> Tensor:
        u, singular, vh = torch.linalg.svd(matrix)
        sign = torch.ones_like(singular)
        if not allow_reflection:
            sign[..., -1] = torch.linalg.det(u @ vh).sign()
        rotation = (u * sign[..., None, :]) @ vh
        ctx.save_for_backward(u, singular * sign, rotation)
        return rotation

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        u, singular, rotation = ctx.saved_tensors
        turned = u.mT @ grad @ rotation.mT @ u
        sums = singular[..., :, None] + singular[..., None, :]
        floor = 8 * torch.finfo(grad.dtype).eps * singular.amax(-1)[..., None, None]
        fixed = sums > floor
        inner = (turned - turned.mT).where(fixed, 0) / sums.where(fixed, 1)
        return u @ inner @ u.mT @ rotation, None


def _points_and_lengths(name: str, cloud: Tensor | PointcloudsLike) -> tuple[Tensor, Tensor]:
    """Padded points (B, N, D) and lengths (B,) of a tensor or of point clouds."""
    if isinstance(cloud, Tensor):
        check_shape(**{name: (cloud, "B N D")})
        return checked_cloud(name, cloud, None)[0], torch.full((len(cloud),), cloud.shape[1], device=cloud.device)
    lengths = cloud.num_points_per_cloud()
    return checked_cloud(name, raise_half(cloud.points_padded()), lengths)[0], lengths


@full_precision
def corresponding_points_alignment(
    X: Float[Tensor, "B N D"] | PointcloudsLike,
    Y: Float[Tensor, "B N D"] | PointcloudsLike,
    weights: Float[Tensor, "B N"] | list[Tensor] | None = None,
    estimate_scale: bool = False,
    allow_reflection: bool = False,
    eps: float = 1e-9,
) -> SimilarityTransform:
    """The similarity that brings X closest to Y, point i to point i, in weighted least squares: s X R + T = Y.

    `weights` (B, N) or one tensor per cloud; `eps` bounds their sum from below. No rotation where none is better than
    another (no points, one place), scale 1 for an X without extent. (Umeyama, PAMI 1991.)
    Differs: the gradient is finite where the rotation is not unique (few, coincident or collinear points); the scale of
    tiny clouds is right (PyTorch3D bounds their variance by `eps` as well).
    """
    x, lengths = _points_and_lengths("X", X)
    y, lengths_y = _points_and_lengths("Y", Y)
    size = check_shape(X=(x, "B N D"), Y=(y, "B N D"))
    if not torch.equal(lengths, lengths_y):
        raise ValueError(f"X and Y must have as many points, got {lengths.tolist()} and {lengths_y.tolist()}")
    if isinstance(weights, list):
        if [len(w) for w in weights] != lengths.tolist():
            raise ValueError(f"weights must have {lengths.tolist()} entries, got {[len(w) for w in weights]}")
        weights = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
    if weights is not None:
        check_shape(X=(x, "B N D"), weights=(weights, "B N"))
        check_finite(weights=weights)
    mask = None  # (B, N); None where every point counts alike
    if weights is not None or not isinstance(X, Tensor) or not isinstance(Y, Tensor) or size["N"] == 0:
        mask = within(lengths, size["N"]).to(x.dtype)
        mask = mask if weights is None else mask * weights.to(x.dtype)

    mean_x, mean_y = wmean(x, mask, eps=eps), wmean(y, mask, eps=eps)  # (B, 1, D)
    centered_x, centered_y = x - mean_x, y - mean_y
    mass = lengths.to(x.dtype) if mask is None else mask.sum(1).clamp(min=eps)
    weighted = centered_x if mask is None else centered_x * mask[..., None]
    covariance = weighted.mT @ centered_y / mass[:, None, None]
    free = (covariance == 0).all(-1).all(-1)[:, None, None]
    R: Tensor = _Rotation.apply(covariance + torch.eye(size["D"]).to(covariance) * free, allow_reflection)
    s = torch.ones_like(mass)
    if estimate_scale:
        variance = (weighted * centered_x).sum((1, 2)) / mass
        # what rounding leaves of a cloud in one place is no extent
        rounding = (8 * torch.finfo(x.dtype).eps) ** 2 * (variance + mean_x.square().sum((1, 2)))
        extended = variance > rounding
        s = ((R * covariance).sum((1, 2)) / variance.where(extended, 1)).where(extended, 1)
    T = mean_y[:, 0] - s[:, None] * (mean_x @ R)[:, 0]
    return SimilarityTransform(R, T, s)


def _transform(points: Tensor, transform: SimilarityTransform) -> Tensor:
    return transform.s[:, None, None] * (points @ transform.R) + transform.T[:, None]


@full_precision
def iterative_closest_point(
    X: Float[Tensor, "B N D"] | PointcloudsLike,
    Y: Float[Tensor, "B M D"] | PointcloudsLike,
    init_transform: SimilarityTransform | None = None,
    max_iterations: int = 100,
    relative_rmse_thr: float = 1e-6,
    estimate_scale: bool = False,
    allow_reflection: bool = False,
    verbose: bool = False,
) -> ICPSolution:
    """Align X to Y by turns of nearest neighbors and `corresponding_points_alignment` (Besl and McKay 1992).

    Stops when no cloud's error falls by more than `relative_rmse_thr` of itself, or after `max_iterations`. A cloud
    with nothing to align to stays where it is.
    """
    x, lengths_x = _points_and_lengths("X", X)
    y, lengths_y = _points_and_lengths("Y", Y)
    size = check_shape(X=(x, "B N D"), Y=(y, "B M D"))
    batch, dimensions = size["B"], size["D"]
    if init_transform is None:
        eye = torch.eye(dimensions, dtype=x.dtype, device=x.device).expand(batch, -1, -1)
        transform = SimilarityTransform(eye, x.new_zeros(batch, dimensions), x.new_ones(batch))
    else:
        transform = SimilarityTransform(*init_transform)
        check_shape(X=(x, "B N D"), R=(transform.R, "B D D"), T=(transform.T, "B D"), s=(transform.s, "B"))
    mask = (within(lengths_x, size["N"]) & (lengths_y > 0)[:, None]).to(x.dtype)
    moved = _transform(x, transform)
    history: list[SimilarityTransform] = []
    previous, rmse, converged = None, x.new_zeros(batch), False
    for iteration in range(max_iterations):
        target = knn_points(moved, y, lengths_x, lengths_y, return_nn=True).knn
        assert target is not None
        transform = corresponding_points_alignment(x, target[:, :, 0], mask, estimate_scale, allow_reflection)
        history.append(transform)
        moved = _transform(x, transform)
        squared = wmean((moved - target[:, :, 0]).square().sum(2, keepdim=True), mask)[:, 0, 0]
        rmse = squared.where(squared > 0, 1).sqrt().where(squared > 0, 0)
        if previous is None:
            relative = torch.ones_like(rmse)
        else:
            relative = (previous - rmse) / previous.where(previous > 0, 1)
        if verbose:
            print(f"ICP iteration {iteration}: rmse {rmse.mean().item():.3e}, change {relative.mean().item():.1e}")
        if bool((relative <= relative_rmse_thr).all()):
            converged = True
            break
        previous = rmse
    result = moved if isinstance(X, Tensor) else X.update_padded(moved.to(X.points_packed().dtype))  # type: ignore[attr-defined]
    return ICPSolution(converged, rmse, result, transform, history)


# ----------------------------------------------------------------------------------------------------- normals


class _SymmetricEigen(torch.autograd.Function):
    """Eigenvalues, ascending, and eigenvectors; those of equal eigenvalues are free and exchange no gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values[..., None, :] - values[..., :, None]
        floor = 8 * torch.finfo(values.dtype).eps * values.abs().amax(-1)[..., None, None]
        apart = gaps.abs() > floor
        inner = (vectors.mT @ grad_vectors).where(apart, 0) / gaps.where(apart, 1)
        inner = inner + torch.diag_embed(grad_values)
        grad = vectors @ inner @ vectors.mT
        return 0.5 * (grad + grad.mT)


class LocalFrames(NamedTuple):
    curvatures: Tensor  # (B, N, 3) eigenvalues of the neighborhood's covariance, ascending
    local_coord_frames: Tensor  # (B, N, 3, 3) columns: normal, second and first principal direction


@full_precision
def estimate_pointcloud_local_coord_frames(
    pointclouds: Float[Tensor, "B N 3"] | PointcloudsLike,
    neighborhood_size: int = 50,
    disambiguate_directions: bool = True,
    *,
    use_symeig_workaround: bool = True,
) -> LocalFrames:
    """Principal directions of the `neighborhood_size` points nearest to each point, and their variances.

    `disambiguate_directions` turns normal and first direction to the side where most neighbors lie (Tombari et al.,
    ECCV 2010) and makes the frame right-handed. Raises ValueError, naming the cloud, when a cloud that is not empty has
    fewer than `neighborhood_size` points. `use_symeig_workaround` is accepted and ignored.
    Differs: the gradient is finite where variances are equal.
    """
    points, lengths = _points_and_lengths("pointclouds", pointclouds)
    small = ((lengths > 0) & (lengths < neighborhood_size)).nonzero()
    if len(small):
        index = int(small[0])
        raise ValueError(
            f"neighborhood_size is {neighborhood_size}, but cloud {index} has only {int(lengths[index])} points"
        )
    mask = within(lengths, points.shape[1])[..., None]
    # about the mean: products of large coordinates would lose the shape
    points = points - wmean(points, mask[..., 0].to(points.dtype)).detach()
    near = knn_points(points, points, lengths, lengths, K=neighborhood_size, return_nn=True).knn
    assert near is not None
    centered = near - near.mean(2, keepdim=True)  # (B, N, K, 3)
    covariance = centered.mT @ centered / neighborhood_size
    curvatures, frames = _SymmetricEigen.apply(covariance)
    if disambiguate_directions:
        offsets = near - points[:, :, None]
        normal = _toward_most(frames[..., 0], offsets)
        first = _toward_most(frames[..., 2], offsets)
        frames = torch.stack([normal, torch.linalg.cross(first, normal), first], dim=3)
    return LocalFrames(curvatures.where(mask, 0), frames.where(mask[..., None], 0))


def _toward_most(directions: Float[Tensor, "B N 3"], offsets: Float[Tensor, "B N K 3"]) -> Float[Tensor, "B N 3"]:
    side = (offsets @ directions[..., None])[..., 0] > 0  # (B, N, K)
    return torch.where(2 * side.sum(2, keepdim=True) < offsets.shape[2], -directions, directions)


@full_precision
def estimate_pointcloud_normals(
    pointclouds: Float[Tensor, "B N 3"] | PointcloudsLike,
    neighborhood_size: int = 50,
    disambiguate_directions: bool = True,
    *,
    use_symeig_workaround: bool = True,
    viewpoint: Float[Tensor, "3"] | Float[Tensor, "B 3"] | None = None,
) -> Float[Tensor, "B N 3"]:
    """Unit normal of the plane through each point's neighbors, padded with zeros.

    `viewpoint`, a place that sees the surface, turns every normal toward it; errors and signs otherwise are those of
    `estimate_pointcloud_local_coord_frames`.
    """
    frames = estimate_pointcloud_local_coord_frames(
        pointclouds, neighborhood_size, disambiguate_directions, use_symeig_workaround=use_symeig_workaround
    )
    normals = frames.local_coord_frames[..., 0]
    if viewpoint is None:
        return normals
    points = pointclouds if isinstance(pointclouds, Tensor) else pointclouds.points_padded()
    toward = viewpoint.to(points).view(-1, 1, 3) - points
    return torch.where((normals * toward).sum(2, keepdim=True) < 0, -normals, normals)
