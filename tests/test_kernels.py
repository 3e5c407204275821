"""Triton kernels: interpreted on CPU, compiled for GPUs that need not be there, and run on a GPU if there is one.

Triton reads TRITON_INTERPRET once, when it is imported: each way of running has a process of its own.
"""

import importlib.util
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

from tests import naive
from vision3dgen import ops
from vision3dgen.losses import chamfer_distance
from vision3dgen.ops import backends, knn_points, points, sample_farthest_points

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), needs_triton]


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lattice(*shape, seed=0):
    """Points of a coarse grid: duplicates and equal distances everywhere, and no rounding."""
    return (cloud(*shape, seed=seed) * 5).floor()


# ------------------------------------------------------------------------------------------------- other processes


def _prepare(environment):
    os.environ.update(environment)
    install_import_hook(["vision3dgen"], "tests.check")  # the kernels must bear the checks that tests put around them


def _run(message):
    function, args, kwargs = pickle.loads(message)
    return pickle.dumps(function(*args, **kwargs))


class Worker:
    """Calls functions of this module in one other process; tensors go by value."""

    def __init__(self, **environment):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(environment,))

    def __call__(self, function, *args, **kwargs):
        return pickle.loads(self.pool.submit(_run, pickle.dumps((function, args, kwargs))).result())


@pytest.fixture(scope="module")
def interpreter():
    """Runs functions where Triton kernels take CPU tensors."""
    worker = Worker(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    yield worker
    worker.pool.shutdown()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Runs functions where Triton kernels are compiled."""
    worker = Worker(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    yield worker
    worker.pool.shutdown()


def call(name, *args):
    from vision3dgen.ops import kernels

    return getattr(kernels, name)(*args)


def on_kernels(function, *args, **kwargs):
    """function(...) with every tensor going to the kernels, and the names of those called."""
    from vision3dgen.ops import kernels

    called, before = [], (points.triton_runs_on, kernels._nearest_kernel, kernels._knn_kernel, kernels._farthest_kernel)
    points.triton_runs_on = lambda device_type: True
    for name in ("_nearest_kernel", "_knn_kernel", "_farthest_kernel"):
        setattr(kernels, name, Spy(name, getattr(kernels, name), called))
    try:
        return function(*args, **kwargs), called
    finally:
        points.triton_runs_on, kernels._nearest_kernel, kernels._knn_kernel, kernels._farthest_kernel = before


class Spy:
    def __init__(self, name, kernel, called):
        self.name, self.kernel, self.called = name, kernel, called

    def __getitem__(self, grid):
        self.called.append(self.name)
        return self.kernel[grid]


# ------------------------------------------------------------------------------------------------------- neighbors


def first_of_sorted(x, y, x_lengths, y_lengths, norm, k):
    """Nearest indices by sorting every distance, ties by index; zero where there is none."""
    idx = torch.zeros(*x.shape[:2], k, dtype=torch.int64)
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        offset = x[b, :n, None] - y[b, None, :m]
        distance = sum((o.square() if norm == 2 else o.abs()) for o in offset.unbind(2))
        order = distance.sort(dim=1, stable=True).indices[:, :k]
        idx[b, :n, : order.shape[1]] = order
    return idx


@needs_triton
@pytest.mark.parametrize("k", [1, 2, 17])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3, 5])
def test_nearest_indices_with_ties_duplicates_and_ragged_lengths(interpreter, dimensions, norm, k):
    x, y = lattice(5, 67, dimensions), lattice(5, 131, dimensions, seed=1)
    x_lengths, y_lengths = torch.tensor([67, 1, 0, 65, 13]), torch.tensor([131, 11, 5, 0, 64])
    x[1, 1:], y[1, 11:] = torch.nan, torch.nan  # padding may hold anything
    found = interpreter(call, "nearest_indices", x, y, x_lengths, y_lengths, norm, k)
    assert torch.equal(found, first_of_sorted(x, y, x_lengths, y_lengths, norm, k))


@needs_triton
@pytest.mark.parametrize("k", [1, 32])
def test_nearest_indices_of_many_axes_and_one_axis(interpreter, k):
    for dimensions in (1, 16):
        x, y = lattice(2, 37, dimensions), lattice(2, 71, dimensions, seed=1)
        found = interpreter(call, "nearest_indices", x, y, None, None, 2, k)
        lengths = torch.tensor([37, 37]), torch.tensor([71, 71])
        assert torch.equal(found, first_of_sorted(x, y, *lengths, 2, k))


@needs_triton
@pytest.mark.parametrize("k", [1, 3])
def test_nearest_indices_keep_float64(interpreter, k):
    y = torch.tensor([[[1 + 3e-12], [1 + 1e-12], [1 + 2e-12]]], dtype=torch.float64)
    x = torch.ones(1, 2, 1, dtype=torch.float64)
    found = interpreter(call, "nearest_indices", x, y, None, None, 2, k)
    assert found.tolist() == [[[1, 2, 0][:k]] * 2]


@needs_triton
@pytest.mark.parametrize("k", [1, 3, 5])
def test_distances_that_overflow_still_find_points(interpreter, k):
    x, y = torch.zeros(1, 2, 3), torch.full((1, 4, 3), 1e30)
    y[0, 2] = 0.5
    found = interpreter(call, "nearest_indices", x, y, None, None, 2, k)
    assert found.tolist() == [[[2, 0, 1, 3, 0][:k]] * 2]


@needs_triton
def test_nothing_to_search(interpreter):
    for shape in ((0, 3, 3), (2, 0, 3)):
        assert interpreter(call, "nearest_indices", cloud(*shape), cloud(shape[0], 5, 3), None, None, 2, 2).shape == (
            *shape[:2],
            2,
        )
    assert not interpreter(call, "nearest_indices", cloud(2, 3, 3), cloud(2, 0, 3), None, None, 2, 2).any()
    assert (
        interpreter(call, "farthest_indices", cloud(2, 0, 3), torch.zeros(2), 3, torch.zeros(2)).tolist()
        == [[0] * 3] * 2
    )


@needs_triton
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("k", [1, 5])
def test_knn_points_on_kernels_equals_tree_and_tiles(interpreter, k, norm, monkeypatch):
    x, y, lengths = cloud(2, 97, 3), cloud(2, 83, 3, seed=1), torch.tensor([83, 3])
    got, called = interpreter(on_kernels, knn_points, x, y, None, lengths, norm, k, return_nn=True)
    assert called == ["_nearest_kernel" if k == 1 else "_knn_kernel"]
    for pairs in (0, 10**12):
        monkeypatch.setattr(points, "TREE_PAIRS", pairs)
        for actual, expected in zip(got, knn_points(x, y, None, lengths, norm, k, return_nn=True)):
            assert torch.equal(actual, expected)


@needs_triton
def test_what_the_kernels_cannot_hold_goes_to_tiles(interpreter):
    x, wide = cloud(1, 41, 3), cloud(1, 41, 17)
    for args, kwargs in (((x, x), {"K": 33}), ((wide, wide), {}), ((x[..., :0], x[..., :0]), {})):
        got, called = interpreter(on_kernels, knn_points, *args, **kwargs)
        assert called == []
        assert torch.equal(got.dists, knn_points(*args, **kwargs).dists)
    assert interpreter(on_kernels, knn_points, x, x, K=32)[1] == ["_knn_kernel"]


def chamfer_and_gradients(x, y, **kwargs):
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = chamfer_distance(x, y, **kwargs).loss
    loss.backward()
    return loss.detach(), x.grad, y.grad


@needs_triton
@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_forward_and_backward_on_kernels(interpreter, norm):
    x, y = cloud(3, 53, 3), cloud(3, 71, 3, seed=1)
    lengths = {"x_lengths": torch.tensor([53, 0, 7]), "y_lengths": torch.tensor([71, 5, 1]), "norm": norm}
    (loss, x_grad, y_grad), called = interpreter(on_kernels, chamfer_and_gradients, x, y, **lengths)
    assert called == ["_nearest_kernel"] * 2
    expected = chamfer_and_gradients(x, y, **lengths)
    for actual, wanted in zip((loss, x_grad, y_grad), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)
    per_member = [
        naive.chamfer(x[b, :n].detach(), y[b, :m].detach(), norm) if n and m else 0.0
        for b, (n, m) in enumerate(zip([53, 0, 7], [71, 5, 1]))
    ]
    assert float(loss) == pytest.approx(sum(float(value) for value in per_member) / 3, rel=1e-5)


def half_under_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return knn_points(x, x, K=3)


@needs_triton
def test_half_precision_is_searched_in_float32(interpreter):
    x = cloud(1, 61, 3).bfloat16()
    got, called = interpreter(on_kernels, half_under_autocast, x)
    assert called == ["_knn_kernel"]
    assert got.dists.dtype == torch.bfloat16
    lengths = torch.tensor([61])
    assert torch.equal(got.idx, first_of_sorted(x.float(), x.float(), lengths, lengths, 2, 3))


def compiled_knn(x, y):
    torch._dynamo.config.suppress_errors = False
    return torch.compile(knn_points, backend="aot_eager", fullgraph=True)(x, y, K=2)


@needs_triton
def test_a_whole_graph_holds_the_kernels(interpreter):
    x, y = cloud(1, 61, 3), cloud(1, 79, 3, seed=1)
    got, called = interpreter(on_kernels, compiled_knn, x, y)
    assert called == ["_knn_kernel"]
    assert torch.equal(got.idx, knn_points(x, y, K=2).idx)


# -------------------------------------------------------------------------------------------------- farthest points


@needs_triton
@pytest.mark.parametrize("make", [cloud, lattice, torch.zeros])
@pytest.mark.parametrize("n, dimensions", [(67, 3), (4099, 2), (2048, 5), (1, 3)])
def test_farthest_indices_equal_those_of_cpu(interpreter, n, dimensions, make):
    x, counts = make(3, n, dimensions), torch.tensor([n, n // 2, 0])
    start = torch.tensor([n // 3, 0, 0])
    found = interpreter(call, "farthest_indices", x, counts, 13, start)
    assert torch.equal(found, points._farthest_numpy(x, counts, 13, start))


@needs_triton
def test_sample_farthest_points_on_kernels(interpreter):
    x, lengths, K = cloud(4, 43, 3, dtype=torch.float64), torch.tensor([43, 3, 0, 11]), [7, 5, 2, 0]
    (chosen, idx), called = interpreter(on_kernels, sample_farthest_points, x, lengths, K)
    assert called == ["_farthest_kernel"]
    expected, expected_idx = sample_farthest_points(x, lengths, K)
    assert torch.equal(idx, expected_idx)
    assert torch.equal(chosen, expected)


# -------------------------------------------------------------------------------------------- boxes and regions


def on_region_kernels(function, *args, **kwargs):
    """function(...) with every tensor going to the kernels of boxes and regions, and the names of those called."""
    from vision3dgen.ops import kernels, rois, suppression

    names = ("_suppress_kernel", "_scan_kernel", "_roi_kernel")
    called, before = [], [getattr(kernels, name) for name in names]
    rois.triton_runs_on = suppression.triton_runs_on = lambda device_type: True
    for name, kernel in zip(names, before):
        setattr(kernels, name, Spy(name, kernel, called))
    try:
        return function(*args, **kwargs), called
    finally:
        rois.triton_runs_on = suppression.triton_runs_on = backends.triton_runs_on
        for name, kernel in zip(names, before):
            setattr(kernels, name, kernel)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 67, 131])
def test_suppression_on_kernels_equals_that_of_cpu(interpreter, n, dtype):
    boxes = torch.cat([lattice(n, 2) * 3, lattice(n, 2) * 3 + lattice(n, 2, seed=1) * 4], dim=1).to(dtype)
    scores, groups = cloud(n, seed=2), torch.arange(n) % 3
    for threshold in (0.0, 0.25, 0.5):
        got, called = interpreter(on_region_kernels, ops.nms, boxes, scores, threshold)
        assert called == (["_suppress_kernel", "_scan_kernel"] if n > 1 else [])
        assert torch.equal(got, ops.nms(boxes, scores, threshold))
        got, _ = interpreter(on_region_kernels, ops.batched_nms, boxes, scores, groups, threshold)
        assert torch.equal(got, ops.batched_nms(boxes, scores, groups, threshold))
    assert interpreter(on_region_kernels, ops.nms, boxes[:0], scores[:0], 0.5)[0].tolist() == []


def aligned_and_gradient(maps, regions, *args):
    maps = maps.requires_grad_()
    pooled = ops.roi_align(maps, regions, *args)
    (pooled * torch.arange(pooled.numel()).view_as(pooled).to(pooled) / max(pooled.numel(), 1)).sum().backward()
    return pooled.detach(), maps.grad


@needs_triton
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("channels, dtype", [(3, torch.float64), (131, torch.float32)])
def test_regions_on_kernels_equal_those_of_cpu(interpreter, channels, dtype, ratio, aligned):
    maps = cloud(2, channels, 5, 7, dtype=dtype)
    regions = torch.tensor(
        [[0, 1.3, 0.7, 9.0, 8.2], [1, -5.0, -4.0, 4.0, 3.0], [1, 6.0, 5.0, 2.0, 1.0], [0, 3, 3, 3, 3.0]]
    )
    for given in (regions, regions[:0]):
        got, called = interpreter(on_region_kernels, aligned_and_gradient, maps, given, (2, 3), 0.5, ratio, aligned)
        assert called == ["_roi_kernel"] * (2 if len(given) else 0)
        for found, expected in zip(got, aligned_and_gradient(maps.clone(), given, (2, 3), 0.5, ratio, aligned)):
            torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------- compiled, without a GPU


def compiled_ptx(name, capability, element, options, constants):
    """PTX of a kernel, once ptxas has made it a program for that GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from vision3dgen.ops import kernels

    kernel = getattr(kernels, name)
    types = {"n": "i32", "m": "i32", "k": "i32", "idx": "*i64", "start": "*i32"}
    types |= {"lengths": "*i32", "x_lengths": "*i32", "y_lengths": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, f"*{element}") for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(built.asm["cubin"]) > 0
    return built.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("capability, element", [(80, "fp32"), (90, "fp32"), (90, "fp64")])
def test_kernels_compile_for_gpus(compiler, capability, element):
    largest = torch.finfo(torch.float32 if element == "fp32" else torch.float64).max
    tile = {"D": 3, "NORM": 2, "COLUMNS": 64}
    ptx = compiler(compiled_ptx, "_nearest_kernel", capability, element, {"num_warps": 8}, tile | {"ROWS": 64})
    assert "fma.rn" in ptx
    lists = tile | {"ROWS": 16, "SLOTS": 32, "LARGEST": largest}
    compiler(compiled_ptx, "_knn_kernel", capability, element, {"num_warps": 4}, lists)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    ptx = compiler(compiled_ptx, "_farthest_kernel", capability, element, options, {"D": 3, "BLOCK": 2048})
    assert "fma.rn" not in ptx  # or it would choose other points than the CPU does


# ------------------------------------------------------------------------------------------------- without Triton


def test_without_triton_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    backends._say_triton_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "vision3dgen.ops.backends"):
        assert not backends.triton_runs_on("cpu")
        assert not caplog.records
        assert not backends.triton_runs_on("cuda")
        assert not backends.triton_runs_on("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "Triton is not installed: on CUDA, neighbors and farthest points run on plain torch, slower"
    ]
    backends._say_triton_is_missing.cache_clear()


def test_importing_the_operators_does_not_import_triton():
    code = "import sys, vision3dgen.ops, vision3dgen.losses; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------ on a GPU


def on_gpu(*tensors):
    return [x.cuda() if isinstance(x, Tensor) else x for x in tensors]


class TestGPU:
    pytestmark = cuda

    @pytest.mark.parametrize("norm", [1, 2])
    @pytest.mark.parametrize("k", [1, 2, 17, 32])
    def test_neighbors_equal_those_of_cpu(self, k, norm):
        x, y = cloud(2, 10007, 3), cloud(2, 9973, 3, seed=1)
        x_lengths, y_lengths = torch.tensor([10007, 4999]), torch.tensor([9973, 7])
        got = knn_points(*on_gpu(x, y, x_lengths, y_lengths), norm=norm, K=k)
        expected = knn_points(x, y, x_lengths, y_lengths, norm=norm, K=k)
        torch.testing.assert_close(got.dists.cpu(), expected.dists, rtol=1e-6, atol=1e-12)
        swapped = got.idx.cpu() != expected.idx  # only where rounding makes two distances one
        assert swapped.float().mean() < 1e-4

    @pytest.mark.parametrize("k", [1, 5, 17])
    def test_ties_go_to_the_smallest_index(self, k):
        x, y = lattice(2, 1009, 3), lattice(2, 997, 3, seed=1)
        lengths = torch.tensor([1009, 500]), torch.tensor([997, 3])
        found = call("nearest_indices", *on_gpu(x, y, *lengths), 2, k)
        assert torch.equal(found.cpu(), first_of_sorted(x, y, *lengths, 2, k))

    def test_chamfer_of_large_clouds_stays_below_a_gigabyte(self):
        x, y = (cloud(1, 100_003, 3, seed=s).cuda().requires_grad_() for s in (0, 1))
        torch.cuda.reset_peak_memory_stats()
        chamfer_distance(x, y).loss.backward()
        assert torch.cuda.max_memory_allocated() < 1e9

    def test_chamfer_gradients_equal_those_of_cpu(self):
        x, y = cloud(3, 1009, 3), cloud(3, 997, 3, seed=1)
        lengths = {"x_lengths": torch.tensor([1009, 0, 7]), "y_lengths": torch.tensor([997, 5, 1])}
        got = chamfer_and_gradients(*on_gpu(x, y), **{key: value.cuda() for key, value in lengths.items()})
        for actual, expected in zip(got, chamfer_and_gradients(x, y, **lengths)):
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-8)

    def test_deterministic_gradients_are_equal_bit_by_bit(self):
        x, y = on_gpu(cloud(1, 10007, 3), cloud(1, 101, 3, seed=1))
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (chamfer_and_gradients(x.clone(), y.clone()) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip(first, second):
            assert torch.equal(a, b)

    def test_inside_autocast_geometry_is_float32(self):
        x = cloud(1, 1009, 3).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            got = knn_points(x, x, K=3)
        assert torch.equal(got.dists, knn_points(x, x, K=3).dists)
        assert got.dists.dtype == torch.float32

    def test_a_whole_graph_holds_the_kernels(self):
        x, y = on_gpu(cloud(1, 1009, 3), cloud(1, 997, 3, seed=1))
        compiled = torch.compile(knn_points, fullgraph=True)
        assert torch.equal(compiled(x, y, K=2).idx, knn_points(x, y, K=2).idx)

    @pytest.mark.parametrize("n, dimensions", [(10007, 3), (2048, 2), (100_003, 3)])
    def test_farthest_points_equal_those_of_cpu(self, n, dimensions):
        x, lengths = cloud(3, n, dimensions), torch.tensor([n, n // 2, 0])
        _, idx = sample_farthest_points(*on_gpu(x, lengths), K=101)
        assert torch.equal(idx.cpu(), sample_farthest_points(x, lengths, K=101)[1])
