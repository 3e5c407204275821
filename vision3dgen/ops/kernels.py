"""Triton kernels for CUDA: nearest neighbors and farthest points without a matrix of distances, regions, suppression.

Importing this module needs Triton; what calls it imports it only then. Each is an operator of its own to
`torch.compile`. Clouds are read axis by axis, (B, D, N), so that neighboring lanes read
neighboring numbers. Distances are computed and compared in the points' own type, float32 or float64.

The block shapes below were chosen so that the compiler reports no spilled registers, not from timings.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # points compared at once with the rows (queries) of one program
NEAREST_ROWS, NEAREST_WARPS = 64, 8  # half the rows for points of more than NEAREST_BYTES
NEAREST_BYTES = 32
KNN_ROWS, KNN_WARPS = 16, 4  # lists of neighbors take registers too
FARTHEST_BLOCK, FARTHEST_WARPS = 2048, 8
SUPPRESS_TILE, SUPPRESS_WARPS = 32, 4
SCAN_WARPS = 8
NMS_BOXES = 2**13  # the most whose marks, a byte for each pair, are held
ROI_CHANNELS, ROI_WARPS = 128, 4  # channels that one program pools
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


# ---------------------------------------------------------------------------------------------------- suppression


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _suppress_kernel(boxes, groups, marks, n, threshold, TILE: tl.constexpr):
    """Marks (n, n): whether the box of a row, if it is kept, suppresses the later one of a column."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    a, b = _read_axes(boxes, row, row < n, n, 0.0, 4), _read_axes(boxes, column, column < n, n, 0.0, 4)
    wide = tl.minimum(a[2][:, None], b[2][None, :]) - tl.maximum(a[0][:, None], b[0][None, :])
    tall = tl.minimum(a[3][:, None], b[3][None, :]) - tl.maximum(a[1][:, None], b[1][None, :])
    shared = tl.maximum(wide, 0.0) * tl.maximum(tall, 0.0)
    area_a = tl.maximum(a[2] - a[0], 0.0) * tl.maximum(a[3] - a[1], 0.0)
    area_b = tl.maximum(b[2] - b[0], 0.0) * tl.maximum(b[3] - b[1], 0.0)
    union = area_a[:, None] + area_b[None, :] - shared
    overlap = shared / tl.where(union > 0, union, 1.0)
    own = tl.load(groups + row, mask=row < n, other=0)
    other = tl.load(groups + column, mask=column < n, other=0)
    over = (overlap > tl.load(threshold)) & (own[:, None] == other[None, :]) & (row[:, None] < column[None, :])
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(marks + at, over.to(tl.int8), mask=(row < n)[:, None] & (column < n)[None, :])


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _scan_kernel(marks, kept, n, BLOCK: tl.constexpr):
    """One program goes down the boxes: one that nobody kept has marked is kept, and its marks count from then on."""
    lane = tl.arange(0, BLOCK)
    gone = tl.zeros((BLOCK,), tl.int32)
    for row in range(n):
        alive = tl.sum(tl.where(lane == row, gone, 0), axis=0) == 0
        own = tl.load(marks + row * n + lane, mask=(lane < n) & alive, other=0)
        gone = gone | own.to(tl.int32)
    tl.store(kept + lane, (gone == 0).to(tl.int8), mask=lane < n)


@torch.library.custom_op("vision3dgen::nms_mask", mutates_args=())
def nms_mask(boxes: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Which of boxes (N, 4), sorted by descending score, are kept (N,): those that none kept before overlaps more."""
    n = len(boxes)
    assert n <= NMS_BOXES, n
    kept = torch.ones(n, dtype=torch.int8, device=boxes.device)
    if n > 1:
        marks = torch.empty(n, n, dtype=torch.int8, device=boxes.device)
        tiles = triton.cdiv(n, SUPPRESS_TILE)
        limit = boxes.new_tensor([threshold])  # in the boxes' own type, which a Python number would not have
        with torch.cuda.device_of(boxes):
            _suppress_kernel[(tiles, tiles)](
                boxes.mT.contiguous(), groups, marks, n, limit, TILE=SUPPRESS_TILE, num_warps=SUPPRESS_WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
            _scan_kernel[(1,)](marks, kept, n, BLOCK=triton.next_power_of_2(n), num_warps=SCAN_WARPS)
    return kept.bool()


@nms_mask.register_fake
def _nms_mask_like(boxes: Tensor, groups: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty(len(boxes), dtype=torch.bool)


# -------------------------------------------------------------------------------------------------------- regions


@triton.jit
@no_type_check
def _roi_kernel(
    rows,
    numbers,
    low,
    bins,
    samples,
    pooled,
    height,
    width,
    channels,
    BINS_H: tl.constexpr,
    BINS_W: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One bin of one region, for BLOCK channels: the mean of its samples, or its gradient given to what they read."""
    bin_number = tl.program_id(0).to(tl.int64)
    region = bin_number // (BINS_H * BINS_W)
    down, across = (bin_number // BINS_W) % BINS_H, bin_number % BINS_W
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = channel < channels
    left, top = tl.load(low + region * 2), tl.load(low + region * 2 + 1)
    wide, tall = tl.load(bins + region * 2), tl.load(bins + region * 2 + 1)
    many_x, many_y = tl.load(samples + region * 2), tl.load(samples + region * 2 + 1)
    image = rows + tl.load(numbers + region) * height * width * channels
    place = pooled + bin_number * channels + channel
    share = 1.0 / tl.maximum(many_x * many_y, 1).to(left.dtype)
    total = tl.zeros((BLOCK,), left.dtype)
    if BACKWARD:
        total = tl.load(place, mask=present, other=0.0) * share
    for i in range(many_y):
        y = top + down * tall + (i + 0.5) * (tall / many_y)
        inside_y = (y >= -1) & (y <= height)
        y = tl.minimum(tl.maximum(y, 0.0), height - 1.0)
        y0 = tl.minimum(tl.floor(y).to(tl.int64), tl.maximum(height - 2, 0))
        part_y = y - y0.to(left.dtype)
        y1 = tl.minimum(y0 + 1, height - 1)
        for j in range(many_x):
            x = left + across * wide + (j + 0.5) * (wide / many_x)
            inside = inside_y & (x >= -1) & (x <= width)
            x = tl.minimum(tl.maximum(x, 0.0), width - 1.0)
            x0 = tl.minimum(tl.floor(x).to(tl.int64), tl.maximum(width - 2, 0))
            part_x = x - x0.to(left.dtype)
            x1 = tl.minimum(x0 + 1, width - 1)
            mask = channel < tl.where(inside, channels, 0)
            a, b = image + (y0 * width + x0) * channels + channel, image + (y0 * width + x1) * channels + channel
            c, d = image + (y1 * width + x0) * channels + channel, image + (y1 * width + x1) * channels + channel
            if BACKWARD:
                tl.atomic_add(a, total * ((1 - part_y) * (1 - part_x)), mask=mask)
                tl.atomic_add(b, total * ((1 - part_y) * part_x), mask=mask)
                tl.atomic_add(c, total * (part_y * (1 - part_x)), mask=mask)
                tl.atomic_add(d, total * (part_y * part_x), mask=mask)
            else:
                total += (1 - part_y) * (1 - part_x) * tl.load(a, mask=mask, other=0.0)
                total += (1 - part_y) * part_x * tl.load(b, mask=mask, other=0.0)
                total += part_y * (1 - part_x) * tl.load(c, mask=mask, other=0.0)
                total += part_y * part_x * tl.load(d, mask=mask, other=0.0)
    if not BACKWARD:
        tl.store(place, total * share, mask=present)


def roi_align(
    maps: Tensor, numbers: Tensor, low: Tensor, bins: Tensor, samples: Tensor, height: int, width: int
) -> Tensor:
    """Regions (R, C, height, width) of maps (B, C, H, W).

    numbers (R,) of their images; low, bins (R, 2) first corners and sizes of a bin, x before y, in pixels whose centers
    are whole numbers; samples (R, 2) in a bin.
    """
    rows = maps.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
    pooled = _roi_rows(rows, numbers, low.contiguous(), bins.contiguous(), samples.contiguous(), height, width)
    return pooled.permute(0, 3, 1, 2)


@torch.library.custom_op("vision3dgen::roi_rows", mutates_args=())
def _roi_rows(
    rows: Tensor, numbers: Tensor, low: Tensor, bins: Tensor, samples: Tensor, height: int, width: int
) -> Tensor:
    pooled = rows.new_empty(len(numbers), height, width, rows.shape[3])
    _launch_roi(rows, numbers, low, bins, samples, pooled, backward=False)
    return pooled


@_roi_rows.register_fake
def _roi_rows_like(
    rows: Tensor, numbers: Tensor, low: Tensor, bins: Tensor, samples: Tensor, height: int, width: int
) -> Tensor:
    return rows.new_empty(numbers.shape[0], height, width, rows.shape[3])


@torch.library.custom_op("vision3dgen::roi_rows_grad", mutates_args=())
def _roi_rows_grad(
    grad: Tensor, numbers: Tensor, low: Tensor, bins: Tensor, samples: Tensor, shape: list[int]
) -> Tensor:
    rows = grad.new_zeros(shape)
    _launch_roi(rows, numbers, low, bins, samples, grad.contiguous(), backward=True)
    return rows


@_roi_rows_grad.register_fake
def _roi_rows_grad_like(
    grad: Tensor, numbers: Tensor, low: Tensor, bins: Tensor, samples: Tensor, shape: list[int]
) -> Tensor:
    return grad.new_empty(shape)


def _launch_roi(
    rows: Tensor, numbers: Tensor, low: Tensor, bins: Tensor, samples: Tensor, pooled: Tensor, *, backward: bool
) -> None:
    if not pooled.numel() or not rows.numel():
        pooled.zero_()
        return
    count, bins_h, bins_w, channels = pooled.shape
    block = min(ROI_CHANNELS, triton.next_power_of_2(channels))
    with torch.cuda.device_of(rows):
        _roi_kernel[(count * bins_h * bins_w, triton.cdiv(channels, block))](
            rows, numbers, low, bins, samples, pooled, rows.shape[1], rows.shape[2], channels, BINS_H=bins_h,
            BINS_W=bins_w, BLOCK=block, BACKWARD=backward, num_warps=ROI_WARPS,
        )  # fmt: skip


def _keep_regions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, numbers, low, bins, samples, _, _ = inputs
    ctx.save_for_backward(numbers, low, bins, samples)
    ctx.shape = list(rows.shape)


def _roi_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _roi_rows_grad(grad, *ctx.saved_tensors, ctx.shape), None, None, None, None, None, None


_roi_rows.register_autograd(_roi_backward, setup_context=_keep_regions)


# ------------------------------------------------------------------------------------------------ nearest, farthest


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
