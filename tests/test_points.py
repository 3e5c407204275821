"""Point operators: PyTorch3D's numbers, loop twins, laws, ragged batches, degenerate clouds, bad input."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch.autograd import gradcheck

from tests import naive
from vision3dgen.ops import (
    ball_query,
    corresponding_points_alignment,
    estimate_pointcloud_local_coord_frames,
    estimate_pointcloud_normals,
    iterative_closest_point,
    knn_gather,
    knn_points,
    masked_gather,
    packed_to_padded,
    padded_to_packed,
    points,
    sample_farthest_points,
    use_backend,
    wmean,
)
from vision3dgen.structures import Pointclouds

REFERENCE = dict(np.load(Path(__file__).parent / "data" / "pytorch3d_0.7.9.npz"))


def reference(key):
    return torch.from_numpy(REFERENCE[key])


def assert_same(actual, expected):
    """To 1e-5 of the largest expected number."""
    scale = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["tree", "tiles", "small tiles"])
def search(request, monkeypatch):
    """Each way to search on CPU, the tiles also so small that they must be merged."""
    monkeypatch.setattr(points, "TREE_PAIRS", 0 if request.param == "tree" else 10**12)
    if request.param == "small tiles":
        monkeypatch.setattr(points, "TILE_COLUMNS", 5)
        monkeypatch.setattr(points, "DISTANCE_BYTES", 256)
    monkeypatch.setattr(points, "PAIRS_AT_ONCE", 7)
    return request.param


# nearest neighbors


def test_knn_equals_pytorch3d(search):
    x, y = reference("knn/x").requires_grad_(), reference("knn/y").requires_grad_()
    found = knn_points(x, y, reference("knn/lengths_x"), reference("knn/lengths_y"), K=int(REFERENCE["knn/K"]))
    assert torch.equal(found.idx, reference("knn/idx"))
    assert_same(found.dists.detach(), reference("knn/dists"))
    grad_x, grad_y = torch.autograd.grad(found.dists, [x, y], reference("knn/grad_dists"))
    assert_same(grad_x, reference("knn/grad_x"))
    assert_same(grad_y, reference("knn/grad_y"))


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("K", [1, 3, 13])
@pytest.mark.parametrize("dimensions", [2, 3, 11])
def test_knn_equals_loops_on_ragged_batches(search, norm, K, dimensions):
    x, y = cloud(4, 17, dimensions), cloud(4, 11, dimensions, seed=1)
    lengths_x, lengths_y = torch.tensor([17, 0, 5, 1]), torch.tensor([11, 7, 0, 2])
    found = knn_points(x, y, lengths_x, lengths_y, norm=norm, K=K, return_nn=True)
    for b, (n, m) in enumerate(zip(lengths_x.tolist(), lengths_y.tolist())):
        dists, idx = naive.knn(x[b, :n], y[b, :m], K, norm)
        torch.testing.assert_close(found.dists[b, :n], dists)
        assert torch.equal(found.idx[b, :n], idx)
        assert not found.dists[b, n:].any()
        assert not found.idx[b, n:].any()
        k = min(K, m)
        assert torch.equal(found.knn[b, :n, :k], y[b][idx[:, :k]])
        assert not found.knn[b, :, k:].any()


def test_knn_gradients(search):
    x, y = cloud(2, 5, 3, dtype=torch.float64), cloud(2, 7, 3, seed=1, dtype=torch.float64)
    lengths = torch.tensor([7, 2])
    for norm in (1, 2):
        assert gradcheck(
            lambda x, y, norm=norm: knn_points(x, y, lengths2=lengths, norm=norm, K=3, return_nn=True)[::2],
            (x.requires_grad_(), y.requires_grad_()),
        )


def test_knn_sees_nothing_of_the_padding(search):
    x, y = cloud(2, 7, 3), cloud(2, 5, 3, seed=1)
    x[0, 4:], y[1, 2:] = torch.nan, torch.nan
    x.requires_grad_(), y.requires_grad_()
    found = knn_points(x, y, torch.tensor([4, 7]), torch.tensor([5, 2]), K=3, return_nn=True)
    (found.dists.sum() + found.knn[0].sum()).backward()
    for tensor in (found.dists, x.grad, y.grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_knn_without_points_keeps_shape_and_graph(sizes):
    x, y = torch.rand(2, sizes[0], 3, requires_grad=True), torch.rand(2, sizes[1], 3, requires_grad=True)
    found = knn_points(x, y, K=2, return_nn=True)
    assert found.dists.shape == (2, sizes[0], 2)
    assert found.knn.shape == (2, sizes[0], 2, 3)
    found.dists.sum().backward()
    assert not x.grad.any()


def test_knn_of_duplicates_and_large_offsets(search):
    y = cloud(1, 13, 3).repeat(1, 2, 1)
    dists = knn_points(y, y, K=2).dists
    assert not dists.any()
    x = torch.tensor([[[0.0, 0, 0], [0.25, 0, 0], [1, 0, 0]]]) + 1e6
    assert knn_points(x, x, K=2).dists[0, :, 1].tolist() == [0.0625, 0.0625, 0.5625]


def test_knn_is_ascending_and_invariant_to_order():
    x, y = cloud(1, 97, 3), cloud(1, 101, 3, seed=1)
    dists = knn_points(x, y, K=29).dists
    assert (dists.diff(dim=2) >= 0).all()
    shuffled = knn_points(x, y[:, torch.randperm(101)], K=29).dists
    torch.testing.assert_close(shuffled, dists)


def test_knn_in_half_precision_and_autocast():
    x, y = cloud(1, 101, 3), cloud(1, 89, 3, seed=1)
    exact = knn_points(x.bfloat16().float(), y.bfloat16().float(), K=3)
    half = knn_points(x.bfloat16(), y.bfloat16(), K=3, return_nn=True)
    assert half.dists.dtype == half.knn.dtype == torch.bfloat16
    assert torch.equal(half.dists, exact.dists.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = knn_points(x, y, K=3)
    assert torch.equal(inside.dists, knn_points(x, y, K=3).dists)
    assert knn_points(x.double(), y.double()).dists.dtype == torch.float64


def test_knn_of_views_that_are_not_contiguous():
    x, y = cloud(3, 31, 2).transpose(0, 2), cloud(3, 37, 2, seed=1).transpose(0, 2)
    found, copied = knn_points(x, y, K=2), knn_points(x.contiguous(), y.contiguous(), K=2)
    assert torch.equal(found.dists, copied.dists)


COMPILED = """
import torch
from vision3dgen.losses import chamfer_distance
from vision3dgen.ops import ball_query, knn_points

x, y = torch.rand(2, 13, 3), torch.rand(2, 17, 3)
for operator in (
    lambda x, y: knn_points(x, y, K=2, return_nn=True).knn,
    lambda x, y: ball_query(x, y, K=2).dists,
    lambda x, y: chamfer_distance(x, y).loss,
):
    compiled = torch.compile(operator, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), operator(x, y))
"""


def test_operators_compile_whole():
    # in a process of its own: the shape checks of the test run cannot be traced
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": 3}, "unknown norm 3"),
        ({"K": 0}, "K must be at least 1"),
        ({"lengths1": torch.tensor([8, 2])}, r"p1 lengths must be in \[0, 7\], got \[8, 2\]"),
        ({"lengths2": torch.tensor([-1, 2])}, "p2 lengths"),
        ({"p1": torch.full((2, 7, 3), torch.nan)}, r"p1 must be finite, got nan at index \(0, 0, 0\)"),
        ({"p2": torch.full((2, 5, 3), torch.inf)}, "p2 must be finite"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_knn_rejects(change, message):
    arguments = {"p1": cloud(2, 7, 3), "p2": cloud(2, 5, 3)} | change
    with pytest.raises(ValueError, match=message):
        knn_points(**arguments)


def test_knn_rejects_shapes():
    with pytest.raises((ValueError, TypeCheckError)):
        knn_points(cloud(2, 7, 3), cloud(3, 5, 3))
    with pytest.raises((ValueError, TypeCheckError)):
        knn_points(cloud(2, 7, 3), cloud(2, 5, 2))


def test_knn_gather_pads_with_zeros():
    x, idx = cloud(2, 5, 4), torch.tensor([[[0, 1, 2]], [[3, 4, 0]]])
    rows = knn_gather(x, idx, torch.tensor([3, 2]))
    assert torch.equal(rows[0, 0], x[0, :3])
    assert torch.equal(rows[1, 0, :2], x[1, 3:])
    assert not rows[1, 0, 2].any()
    assert knn_gather(x[:, :0], idx).shape == (2, 1, 3, 4)


def test_masked_gather():
    x, idx = cloud(2, 5, 3), torch.tensor([[4, -1], [-1, 0]])
    rows = masked_gather(x, idx)
    assert torch.equal(rows, torch.stack([torch.stack([x[0, 4], 0 * x[0, 0]]), torch.stack([0 * x[0, 0], x[1, 0]])]))
    assert masked_gather(x, idx[..., None]).shape == (2, 2, 1, 3)
    assert not masked_gather(x[:, :0], torch.full((2, 3), -1)).any()
    with pytest.raises((ValueError, TypeCheckError)):
        masked_gather(x, idx[:1])


# backends


def test_missing_backend_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch3d", None)
    x = cloud(1, 5, 3)
    with pytest.raises(ImportError, match=r"vision3dgen\[pytorch3d\]"), use_backend("pytorch3d"):
        pass
    with pytest.raises(ImportError, match=r"vision3dgen\[pytorch3d\]"):
        knn_points(x, x, backend="pytorch3d")


def test_backend_is_chosen_for_the_block_only(monkeypatch):
    module = type(sys)("pytorch3d")
    module.ops = type(sys)("pytorch3d.ops")
    module.ops.knn_points = lambda *arguments: ("dists", "idx", None)
    monkeypatch.setitem(sys.modules, "pytorch3d", module)
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", module.ops)
    x = cloud(1, 5, 3)
    with use_backend("pytorch3d"):
        assert knn_points(x, x).dists == "dists"
        assert not knn_points(x, x, backend="torch").dists.any()
    assert not knn_points(x, x).dists.any()


@pytest.mark.pytorch3d
def test_backends_agree():
    pytest.importorskip("pytorch3d")
    x, y = cloud(2, 31, 3), cloud(2, 37, 3, seed=1)
    for operator in (knn_points, ball_query):
        ours, theirs = operator(x, y, K=4, return_nn=True), operator(x, y, K=4, return_nn=True, backend="pytorch3d")
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other)
    assert torch.equal(sample_farthest_points(x, K=5)[1], sample_farthest_points(x, K=5, backend="pytorch3d")[1])


# ball query


def test_ball_query_equals_pytorch3d(search):
    found = ball_query(
        *(reference(f"ball_query/{key}") for key in ("x", "y", "lengths_x", "lengths_y")),
        K=int(REFERENCE["ball_query/K"]),
        radius=float(REFERENCE["ball_query/radius"]),
    )
    assert torch.equal(found.idx, reference("ball_query/idx"))
    assert_same(found.dists, reference("ball_query/dists"))


@pytest.mark.parametrize("K", [1, 4, 50])
def test_ball_query_equals_loops_on_ragged_batches(search, K):
    x, y = cloud(3, 17, 3), cloud(3, 23, 3, seed=1)
    lengths_x, lengths_y = torch.tensor([17, 0, 5]), torch.tensor([23, 7, 0])
    found = ball_query(x, y, lengths_x, lengths_y, K=K, radius=0.4)
    for b, (n, m) in enumerate(zip(lengths_x.tolist(), lengths_y.tolist())):
        idx = naive.ball(x[b, :n], y[b, :m], K, 0.4)
        assert torch.equal(found.idx[b, :n], idx)
        near = y[b][idx.clamp(min=0)]
        inside = idx >= 0
        torch.testing.assert_close(found.dists[b, :n][inside], (x[b, :n, None] - near).square().sum(2)[inside])
        assert not found.dists[b, :n][~inside].any()
        assert torch.equal(found.knn[b, :n][inside], near[inside])
        assert (found.idx[b, n:] == -1).all()


def test_ball_query_excludes_the_radius_itself(search):
    x, y = torch.zeros(1, 1, 3), torch.tensor([[[0.5, 0, 0], [0.0, 0.25, 0]]])
    assert ball_query(x, y, K=2, radius=0.5).idx.tolist() == [[[1, -1]]]


def test_ball_query_gradients(search):
    x, y = cloud(1, 5, 3, dtype=torch.float64), cloud(1, 7, 3, seed=1, dtype=torch.float64)
    assert gradcheck(lambda x, y: ball_query(x, y, K=3, radius=0.6)[::2], (x.requires_grad_(), y.requires_grad_()))


def test_ball_query_rejects():
    with pytest.raises(ValueError, match="radius positive"):
        ball_query(cloud(1, 3, 3), cloud(1, 3, 3), radius=0.0)


# farthest points


def test_farthest_points_equal_pytorch3d():
    chosen, idx = sample_farthest_points(reference("fps/x"), reference("fps/lengths"), K=int(REFERENCE["fps/K"]))
    assert torch.equal(idx, reference("fps/idx"))
    assert_same(chosen, reference("fps/points"))


def test_farthest_points_equal_loops_and_torch_path():
    x, lengths, K = cloud(4, 23, 3), torch.tensor([23, 3, 0, 11]), [7, 5, 2, 0]
    chosen, idx = sample_farthest_points(x, lengths, K)
    assert idx.shape == (4, 7)
    in_step = points._farthest_torch(x, lengths, 7, torch.zeros(4, dtype=torch.int64))
    for b, (n, k) in enumerate(zip(lengths.tolist(), K)):
        k = min(n, k)
        if k:
            assert torch.equal(idx[b, :k], naive.farthest(x[b, :n], k))
        assert torch.equal(in_step[b, :k], idx[b, :k])
        assert (idx[b, k:] == -1).all()
        assert torch.equal(chosen[b, :k], x[b][idx[b, :k]])
        assert not chosen[b, k:].any()


def test_farthest_points_random_start_follows_the_generator():
    x = cloud(3, 97, 3)
    draw = [
        sample_farthest_points(x, K=5, random_start_point=True, generator=torch.Generator().manual_seed(s))[1]
        for s in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_farthest_points_pass_gradients():
    x = cloud(1, 7, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: sample_farthest_points(x, K=3)[0], x)
    with pytest.raises(ValueError, match="K must not be negative"):
        sample_farthest_points(x, K=-1)


# packing


def test_packing_round_trip_with_empty_members():
    packed, first = cloud(10, 2), torch.tensor([0, 0, 4, 4, 7])  # sizes 0 4 0 3 3
    padded = packed_to_padded(packed, first, 5)
    assert padded.shape == (5, 5, 2)
    assert torch.equal(padded[1, :4], packed[:4])
    assert not padded[0].any()
    assert not padded[1, 4:].any()
    assert torch.equal(padded_to_packed(padded, first, 10), packed)
    assert torch.equal(padded_to_packed(padded.transpose(1, 2), first, 10, max_size_dim=2), packed)
    assert torch.equal(padded_to_packed(packed_to_padded(packed[:, 0], first, 4), first, 10), packed[:, 0])
    assert packed_to_padded(packed[:0], first * 0, 3).shape == (5, 3, 2)
    assert gradcheck(lambda x: packed_to_padded(x, first, 4), packed.double().requires_grad_())


def test_weighted_mean():
    x, weight = cloud(2, 5, 3), torch.tensor([[1.0, 0, 3, 0, 0], [0, 0, 0, 0, 0]])
    mean = wmean(x, weight)
    torch.testing.assert_close(mean[0, 0], (x[0, 0] + 3 * x[0, 2]) / 4)
    assert not mean[1].any()
    assert torch.equal(wmean(x), x.mean(1, keepdim=True))
    with pytest.raises((ValueError, TypeCheckError)):
        wmean(x, weight[:, :2])


# alignment


def rotation(seed, dimensions=3):
    q, r = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(seed)))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q) if dimensions % 2 else q


def test_alignment_equals_pytorch3d():
    found = corresponding_points_alignment(
        reference("points_alignment/X"), reference("points_alignment/Y"), estimate_scale=True
    )
    for name in found._fields:
        assert_same(getattr(found, name), reference(f"points_alignment/{name}"))


def test_alignment_recovers_similarities_of_ragged_clouds():
    x = [cloud(n, 3, seed=n) for n in (5, 31)]
    y = [2.5 * p @ rotation(i) + torch.tensor([1.0, -2, 3]) for i, p in enumerate(x)]
    found = corresponding_points_alignment(Pointclouds(x), Pointclouds(y), estimate_scale=True)
    for i in range(2):
        torch.testing.assert_close(found.R[i], rotation(i), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.s, torch.tensor([2.5, 2.5]))
    torch.testing.assert_close(found.T, torch.tensor([[1.0, -2, 3]] * 2), atol=1e-4, rtol=0)


def test_alignment_weights_ignore_outliers_and_reflections_are_a_choice():
    x = cloud(1, 17, 3)
    y = x @ rotation(3)
    y[0, 3] += 100
    weights = torch.ones(1, 17)
    weights[0, 3] = 0
    for w in (weights, [weights[0]]):
        torch.testing.assert_close(corresponding_points_alignment(x, y, w).R[0], rotation(3), atol=1e-5, rtol=0)
    mirrored = x * torch.tensor([1.0, 1, -1])
    assert torch.linalg.det(corresponding_points_alignment(x, mirrored).R[0]) > 0
    found = corresponding_points_alignment(x, mirrored, allow_reflection=True)
    torch.testing.assert_close(found.R[0], torch.diag(torch.tensor([1.0, 1, -1])), atol=1e-5, rtol=0)


def test_alignment_gradients():
    x, y = cloud(2, 7, 3, dtype=torch.float64), cloud(2, 7, 3, seed=1, dtype=torch.float64)
    weights = cloud(2, 7, seed=2, dtype=torch.float64)
    for reflection in (False, True):
        assert gradcheck(
            lambda x, y, w, reflection=reflection: tuple(
                corresponding_points_alignment(x, y, w, estimate_scale=True, allow_reflection=reflection)
            ),
            (x.requires_grad_(), y.requires_grad_(), weights.requires_grad_()),
        )


@pytest.mark.parametrize("case", ["one", "coincident", "collinear", "planar"])
def test_alignment_is_finite_where_the_rotation_is_not_unique(case):
    x = {
        "one": torch.ones(1, 1, 3),
        "coincident": torch.ones(1, 5, 3),
        "collinear": torch.arange(5.0)[None, :, None] * torch.tensor([1.0, 2, 3]),
        "planar": cloud(1, 5, 3) * torch.tensor([1.0, 1, 0]),
    }[case].requires_grad_()
    found = corresponding_points_alignment(x, x.detach() @ rotation(5) + 1, estimate_scale=True)
    sum(part.sum() for part in found).backward()
    assert all(torch.isfinite(part).all() for part in found)
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(found.R @ found.R.mT, torch.eye(3)[None], atol=1e-5, rtol=0)


def test_alignment_rejects():
    with pytest.raises(ValueError, match="as many points"):
        corresponding_points_alignment(Pointclouds([cloud(5, 3), cloud(3, 3)]), Pointclouds([cloud(5, 3), cloud(4, 3)]))
    with pytest.raises(ValueError, match="weights must have"):
        corresponding_points_alignment(cloud(1, 5, 3), cloud(1, 5, 3), [torch.ones(4)])


def test_icp_brings_a_moved_cloud_back():
    x = torch.randn(2, 101, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3])
    angle = torch.tensor(0.1)
    turn = torch.tensor([[angle.cos(), angle.sin(), 0], [-angle.sin(), angle.cos(), 0], [0, 0, 1]])
    y = x @ turn + 0.05
    found = iterative_closest_point(x, y)
    assert found.converged
    assert (found.rmse < 1e-5).all()
    torch.testing.assert_close(found.RTs.R, turn.expand(2, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.Xt, y, atol=1e-4, rtol=0)
    again = iterative_closest_point(x, y, init_transform=found.RTs)
    assert len(again.t_history) <= 2
    ragged = iterative_closest_point(Pointclouds([x[0], x[1, :50]]), Pointclouds([y[0], y[1, :50]]))
    torch.testing.assert_close(ragged.Xt.points_list()[1], y[1, :50], atol=1e-4, rtol=0)


def test_icp_of_identical_and_empty_clouds():
    x = Pointclouds([cloud(5, 3), torch.zeros(0, 3)])
    found = iterative_closest_point(x, x)
    assert torch.isfinite(found.rmse).all()
    assert found.converged
    stopped = iterative_closest_point(cloud(1, 31, 3), cloud(1, 31, 3, seed=1), max_iterations=1)
    assert not stopped.converged


# normals


def test_normals_of_a_sphere_and_of_a_plane():
    sphere = torch.nn.functional.normalize(torch.randn(1, 2003, 3, generator=torch.Generator().manual_seed(0)), dim=2)
    normals = estimate_pointcloud_normals(sphere, 17, viewpoint=torch.zeros(3))
    assert ((normals * sphere).sum(2) < -0.97).all()
    plane = torch.cat([cloud(1, 53, 2), torch.full((1, 53, 1), 1e6)], dim=2)
    frames = estimate_pointcloud_local_coord_frames(plane, 7)
    torch.testing.assert_close(frames.local_coord_frames[0, :, 2, 0].abs(), torch.ones(53))
    assert (frames.curvatures[..., 0].abs() < 1e-6).all()
    torch.testing.assert_close(torch.linalg.det(frames.local_coord_frames), torch.ones(1, 53))


def test_normals_turn_toward_most_neighbors():
    bowl = cloud(1, 211, 3) - 0.5
    bowl[..., 2] = bowl[..., 0] ** 2 + bowl[..., 1] ** 2
    normals = estimate_pointcloud_normals(bowl, 31)
    central = bowl[0, :, :2].norm(dim=1) < 0.2
    assert (normals[0, central, 2] > 0).all()


def test_normals_of_ragged_and_degenerate_clouds():
    clouds = Pointclouds([cloud(11, 3), torch.zeros(0, 3), torch.ones(7, 3)])
    padded = clouds.points_padded().requires_grad_()
    normals = estimate_pointcloud_normals(clouds, 5)
    assert not normals[1].any()
    assert not normals[2, 7:].any()
    torch.testing.assert_close(normals[0], estimate_pointcloud_normals(clouds[0], 5)[0])
    estimate_pointcloud_normals(padded[2:, :7], 5).sum().backward()
    assert torch.isfinite(padded.grad).all()
    with pytest.raises(ValueError, match="neighborhood_size is 9, but cloud 2 has only 7 points"):
        estimate_pointcloud_normals(clouds, 9)


def test_normals_gradients():
    x = cloud(1, 7, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: estimate_pointcloud_local_coord_frames(x, 5), x)


# every operator on NaN and in half precision


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: ball_query(x, x, K=2),
        lambda x: sample_farthest_points(x, K=2),
        lambda x: corresponding_points_alignment(x, x),
        lambda x: iterative_closest_point(x, x),
        lambda x: estimate_pointcloud_normals(x, 3),
    ],
)
def test_nan_is_an_error_and_half_precision_comes_back(operator):
    x = cloud(1, 5, 3)
    broken = x.clone()
    broken[0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite, got nan at index \(0, 2, 1\)"):
        operator(broken)
    result = operator(x.bfloat16())
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert tensors
    assert all(t.dtype == torch.bfloat16 for t in tensors)


def test_tiles_hold_no_more_than_the_budget(monkeypatch):
    sizes, search = [], points._smallest
    monkeypatch.setattr(points, "_smallest", lambda d, K: (sizes.append(d.numel() * d.element_size()), search(d, K))[1])
    monkeypatch.setattr(points, "DISTANCE_BYTES", 2**16)
    monkeypatch.setattr(points, "TILE_COLUMNS", 2**8)
    x = cloud(3, 701, 3)
    found = points._tiled_search(x, x, None, 2, 1)
    assert max(sizes) <= 2**16
    assert torch.equal(found[..., 0], torch.arange(701).expand(3, -1))


def test_every_pair_of_dtypes_promotes():
    for a, b in itertools.product([torch.bfloat16, torch.float32, torch.float64], repeat=2):
        dists = knn_points(cloud(1, 5, 3).to(a), cloud(1, 7, 3).to(b)).dists
        assert dists.dtype == torch.promote_types(a, b)
