"""Triton kernels for CUDA: nearest neighbors and farthest points, without a matrix of distances.

Importing this module needs Triton; what calls it imports it only then. `nearest_indices` and `farthest_indices` are
operators of their own to `torch.compile`. Clouds are read axis by axis, (B, D, N), so that neighboring lanes read
neighboring numbers. Distances are computed and compared in the points' own type, float32 or float64.

The block shapes below were chosen so that the compiler reports no spilled registers, not from timings.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # points compared at once with the rows (queries) of one program
NEAREST_ROWS, NEAREST_WARPS = 64, 8  # half the rows for points of more than NEAREST_BYTES
NEAREST_BYTES = 32
KNN_ROWS, KNN_WARPS = 16, 4  # lists of neighbors take registers too
FARTHEST_BLOCK, FARTHEST_WARPS = 2048, 8
NO_INDEX = tl.constexpr(2**31 - 1)

# Kernels carry `no_type_check` because a checking wrapper, as tests put around every function, cannot be compiled.


@triton.jit
@no_type_check
def _lowest(values, indices):
    """The smallest value of each row and its index; of equal values, the smallest index."""
    value = tl.min(values, axis=1)
    return value, tl.min(tl.where(values == value[:, None], indices, NO_INDEX), axis=1)


@triton.jit
@no_type_check
def _highest(values, indices):
    """The largest value of each row and its index; of equal values, the largest index."""
    value = tl.max(values, axis=1)
    return value, tl.max(tl.where(values == value[:, None], indices, -1), axis=1)


@triton.jit
@no_type_check
def _read_axes(cloud, at, inside, size, absent, D: tl.constexpr):
    """Coordinates of the points `at` of one cloud, a block per axis; `absent` where not `inside`."""
    axes = ()
    for d in tl.static_range(D):
        axes = axes + (tl.load(cloud + d * size + at, mask=inside, other=absent),)  # noqa: RUF005
    return axes


@triton.jit
@no_type_check
def _distances(x, y, D: tl.constexpr, NORM: tl.constexpr):
    """Squared Euclidean or Manhattan distances (rows, columns) between two blocks of points, one axis after another."""
    offset = x[0][:, None] - y[0][None, :]
    total = tl.abs(offset) if NORM == 1 else offset * offset
    for d in tl.static_range(1, D):
        offset = x[d][:, None] - y[d][None, :]
        total += tl.abs(offset) if NORM == 1 else offset * offset
    return total


@triton.jit(do_not_specialize=["n", "m"])
@no_type_check
def _nearest_kernel(
    x,
    y,
    x_lengths,
    y_lengths,
    idx,
    n,
    m,
    D: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The nearest point of y to ROWS points of x.

    Each lane remembers the best of the columns it has seen; they are compared with one another once, at the end.
    """
    blocks = tl.cdiv(n, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    top = (tl.program_id(0) % blocks) * ROWS
    count, points = tl.load(x_lengths + b), tl.load(y_lengths + b)
    row, lane = top + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    queries = _read_axes(x + b * D * n, row, row < count, n, 0.0, D)
    best = tl.full((ROWS, COLUMNS), float("inf"), queries[0].dtype)
    tile = tl.zeros((ROWS, COLUMNS), tl.int32)
    for left in range(0, tl.where(top < count, points, 0), COLUMNS):
        column = left + lane
        distance = _distances(queries, _read_axes(y + b * D * m, column, column < points, m, float("inf"), D), D, NORM)
        closer = distance < best
        best = tl.where(closer, distance, best)
        tile = tl.where(closer, left, tile)
    _, nearest = _lowest(best, tile + lane[None, :])
    tl.store(idx + b * n + row, nearest, mask=row < tl.where(points > 0, count, 0))


@triton.jit(do_not_specialize=["n", "m", "k"])
@no_type_check
def _knn_kernel(
    x,
    y,
    x_lengths,
    y_lengths,
    idx,
    n,
    m,
    k,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The k nearest points of y to ROWS points of x, nearest first.

    A row's list is SLOTS registers in no order. While a tile holds a point nearer than the worst of some row's list,
    the nearest point of the tile takes the place of the worst. Points come in the order of their indices, so at equal
    distances the one already in the list stays.
    """
    blocks = tl.cdiv(n, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    top = (tl.program_id(0) % blocks) * ROWS
    count, points = tl.load(x_lengths + b), tl.load(y_lengths + b)
    row, lane, slot = top + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, SLOTS)
    queries = _read_axes(x + b * D * n, row, row < count, n, 0.0, D)
    # an empty slot is at infinity, with an index of its own that no point has; slots beyond k, and those of absent
    # rows, stand before every point and are never replaced
    open_slots = (row < count)[:, None] & (slot < k)[None, :]
    kept = tl.where(open_slots, float("inf"), -1.0).to(queries[0].dtype)
    kept_idx = tl.zeros((ROWS, SLOTS), tl.int32) + (m + slot)[None, :]
    worst, worst_idx = _highest(kept, kept_idx)
    for left in range(0, tl.where(top < count, points, 0), COLUMNS):
        column = left + lane
        distance = _distances(queries, _read_axes(y + b * D * m, column, column < points, m, float("inf"), D), D, NORM)
        # a distance that overflows is still nearer than no point at all
        distance = tl.where((column < points)[None, :], tl.minimum(distance, LARGEST), float("inf"))
        nearest, nearest_lane = tl.min(distance, axis=1, return_indices=True)
        while tl.max((nearest < worst).to(tl.int32), axis=0) > 0:
            replaced = (nearest < worst)[:, None] & (kept_idx == worst_idx[:, None])
            kept = tl.where(replaced, nearest[:, None], kept)
            kept_idx = tl.where(replaced, left + nearest_lane[:, None], kept_idx)
            worst, worst_idx = _highest(kept, kept_idx)
            distance = tl.where(lane[None, :] == nearest_lane[:, None], float("inf"), distance)
            nearest, nearest_lane = tl.min(distance, axis=1, return_indices=True)
    kept = tl.where(open_slots, kept, float("inf"))
    for rank in range(k):
        _, first = _lowest(kept, kept_idx)
        tl.store(idx + (b * n + row) * k + rank, first, mask=row < tl.where(rank < points, count, 0))
        kept = tl.where(kept_idx == first[:, None], float("inf"), kept)


@triton.jit(do_not_specialize=["n", "k"])
@no_type_check
def _farthest_kernel(points, lengths, start, nearest, idx, n, k, D: tl.constexpr, BLOCK: tl.constexpr):
    """Farthest points of one cloud; `nearest` (B, N) holds each point's distance to those chosen."""
    b = tl.program_id(0).to(tl.int64)
    count, current, lane = tl.load(lengths + b), tl.load(start + b), tl.arange(0, BLOCK)
    cloud, own = points + b * D * n, nearest + b * n
    for chosen in range(tl.minimum(k, count)):
        tl.store(idx + b * k + chosen, current)
        best = tl.full((BLOCK,), -1.0, nearest.dtype.element_ty)
        tile = tl.zeros((BLOCK,), tl.int32)
        center = _read_axes(cloud, current, current < count, n, 0.0, D)
        for left in range(0, count, BLOCK):
            at = left + lane
            axes = _read_axes(cloud, at, at < count, n, 0.0, D)
            squared = tl.zeros((BLOCK,), nearest.dtype.element_ty)
            for d in tl.static_range(D):
                squared += (axes[d] - center[d]) * (axes[d] - center[d])
            distance = tl.minimum(tl.load(own + at, mask=at < count, other=-1.0), squared)
            tl.store(own + at, distance, mask=at < count)
            farther = distance > best
            best = tl.where(farther, distance, best)
            tile = tl.where(farther, left, tile)
        current = tl.min(tl.where(best == tl.max(best, axis=0), tile + lane, NO_INDEX), axis=0)
        tl.debug_barrier()  # the next pass reads what this one wrote


@torch.library.custom_op("vision3dgen::nearest_indices", mutates_args=())
def nearest_indices(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, norm: int, k: int
) -> Tensor:
    """Indices (B, N, K) of the k points of y (B, M, D) nearest to each of x (B, N, D): nearest first, ties by index.

    Zero where either cloud has no such point.
    """
    assert x.dtype in (torch.float32, torch.float64), x.dtype
    assert y.dtype == x.dtype, (x.dtype, y.dtype)
    batch, n, dimensions = x.shape
    m = y.shape[1]
    assert max(n, m) * dimensions < 2**31, (n, m, dimensions)  # offsets within a cloud are 32-bit
    idx = torch.zeros(batch, n, k, dtype=torch.int64, device=x.device)
    if idx.numel() == 0 or m == 0:
        return idx
    clouds = (x.mT.contiguous(), y.mT.contiguous(), _counts(x, x_lengths), _counts(y, y_lengths))
    if k > 1:
        rows = KNN_ROWS
    else:
        rows = NEAREST_ROWS if dimensions * x.element_size() <= NEAREST_BYTES else NEAREST_ROWS // 2
    shape = {"D": dimensions, "NORM": norm, "ROWS": rows, "COLUMNS": COLUMNS}
    grid = (batch * triton.cdiv(n, rows),)
    with torch.cuda.device_of(x):
        if k == 1:
            _nearest_kernel[grid](*clouds, idx, n, m, **shape, num_warps=NEAREST_WARPS)
        else:
            slots, largest = triton.next_power_of_2(k), torch.finfo(x.dtype).max
            _knn_kernel[grid](*clouds, idx, n, m, k, LARGEST=largest, SLOTS=slots, **shape, num_warps=KNN_WARPS)
    return idx


@nearest_indices.register_fake
def _nearest_like(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, norm: int, k: int
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], k, dtype=torch.int64)


@torch.library.custom_op("vision3dgen::farthest_indices", mutates_args=())
def farthest_indices(points: Tensor, counts: Tensor, k: int, start: Tensor) -> Tensor:
    """Indices (B, K) of k points (B, N, D) from `start` (B,) on, each the farthest from those before it, ties by index.

    Zero beyond a cloud's count. One program per cloud, so a single large cloud uses one multiprocessor.
    """
    assert points.dtype in (torch.float32, torch.float64), points.dtype
    batch, n, dimensions = points.shape
    assert n * dimensions < 2**31, (n, dimensions)  # offsets within a cloud are 32-bit
    idx = torch.zeros(batch, k, dtype=torch.int64, device=points.device)
    if idx.numel() == 0 or n == 0:
        return idx
    nearest = torch.full((batch, n), torch.inf, dtype=points.dtype, device=points.device)
    block = min(FARTHEST_BLOCK, triton.next_power_of_2(n))
    with torch.cuda.device_of(points):
        # multiply and add round separately, as on CPU: one other choice would change all after it
        _farthest_kernel[(batch,)](
            points.mT.contiguous(),
            _counts(points, counts),
            start.to(torch.int32),
            nearest,
            idx,
            n,
            k,
            D=dimensions,
            BLOCK=block,
            num_warps=FARTHEST_WARPS,
            enable_fp_fusion=False,
        )
    return idx


@farthest_indices.register_fake
def _farthest_like(points: Tensor, counts: Tensor, k: int, start: Tensor) -> Tensor:
    return points.new_empty(points.shape[0], k, dtype=torch.int64)


def _counts(points: Tensor, lengths: Tensor | None) -> Tensor:
    """The number of points of each cloud as int32 (B,)."""
    if lengths is None:
        return torch.full((len(points),), points.shape[1], dtype=torch.int32, device=points.device)
    return lengths.to(torch.int32)
