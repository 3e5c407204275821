"""Losses: PyTorch3D's numbers, loop twins, laws, empty members, degenerate input, bad input."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from tests import naive
from vision3dgen import losses
from vision3dgen.losses import (
    chamfer_distance,
    earth_movers_distance,
    hausdorff_distance,
    mesh_edge_loss,
    mesh_laplacian_smoothing,
    mesh_normal_consistency,
    point_mesh_edge_distance,
    point_mesh_face_distance,
)
from vision3dgen.ops import ico_sphere, sample_points_from_meshes
from vision3dgen.structures import Meshes, Pointclouds, join_meshes_as_batch

REFERENCE = dict(np.load(Path(__file__).parent / "data" / "pytorch3d_0.7.9.npz"))


def reference(key):
    return torch.from_numpy(REFERENCE[key])


def assert_same(actual, expected, digits=1e-5):
    """To `digits` of the largest expected number."""
    scale = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(actual, expected, rtol=0, atol=digits * scale)


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# chamfer


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chamfer_equals_pytorch3d(norm, reduction):
    key = f"chamfer_norm{norm}_{reduction}"
    x, y = reference(f"{key}/x").requires_grad_(), reference(f"{key}/y").requires_grad_()
    found = chamfer_distance(
        x,
        y,
        *(reference(f"{key}/{name}") for name in ("lengths_x", "lengths_y", "normals_x", "normals_y")),
        point_reduction=reduction,
        norm=norm,
    )
    assert_same(found.loss.detach(), reference(f"{key}/loss"))
    assert_same(found.loss_normals, reference(f"{key}/loss_normals"))
    grad_x, grad_y = torch.autograd.grad(found.loss, [x, y])
    assert_same(grad_x, reference(f"{key}/grad_x"))
    assert_same(grad_y, reference(f"{key}/grad_y"))


def test_chamfer_of_two_points_and_of_shifted_grids():
    x, y = reference("chamfer_two_points/x"), reference("chamfer_two_points/y")
    for norm in (1, 2):
        assert torch.equal(chamfer_distance(x, y, norm=norm).loss, reference(f"chamfer_two_points/norm{norm}"))
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0), torch.arange(7.0))[None]
    loss, _ = chamfer_distance(grid, grid + torch.tensor([0.25, 0, 0]))
    assert float(loss) == pytest.approx(2 * 0.0625)


@pytest.mark.parametrize("norm", [1, 2])
def test_chamfer_of_ragged_batches_is_that_of_its_members(norm):
    x, y = [cloud(n, 3, seed=n) for n in (17, 5, 1)], [cloud(n, 3, seed=n) for n in (11, 1, 23)]
    expected = torch.tensor([naive.chamfer(p, q, norm) for p, q in zip(x, y)])
    each = chamfer_distance(Pointclouds(x), Pointclouds(y), batch_reduction=None, norm=norm).loss
    torch.testing.assert_close(each, expected)
    mean = chamfer_distance(Pointclouds(x), Pointclouds(y), norm=norm).loss
    torch.testing.assert_close(mean, expected.mean())
    weights = torch.tensor([1.0, 0, 3])
    weighted = chamfer_distance(Pointclouds(x), Pointclouds(y), weights=weights, norm=norm).loss
    torch.testing.assert_close(weighted, (weights * expected).sum() / 4)
    summed = chamfer_distance(Pointclouds(x), Pointclouds(y), batch_reduction="sum", norm=norm).loss
    torch.testing.assert_close(summed, expected.sum())


def test_chamfer_laws():
    x, y = cloud(2, 31, 3), cloud(2, 37, 3, seed=1)
    loss = chamfer_distance(x, y).loss
    torch.testing.assert_close(loss, chamfer_distance(y, x).loss)
    torch.testing.assert_close(9 * loss, chamfer_distance(3 * x, 3 * y).loss)
    torch.testing.assert_close(3 * chamfer_distance(x, y, norm=1).loss, chamfer_distance(3 * x, 3 * y, norm=1).loss)
    assert float(chamfer_distance(x, x[:, torch.randperm(31)]).loss) == 0
    there, back = (chamfer_distance(*pair, single_directional=True).loss for pair in ((x, y), (y, x)))
    torch.testing.assert_close(there + back, loss)


def test_chamfer_reductions_and_normals():
    x, y = cloud(2, 7, 3), cloud(2, 5, 3, seed=1)
    normals_x = torch.nn.functional.normalize(cloud(2, 7, 3, seed=2) - 0.5, dim=2)
    normals_y = torch.nn.functional.normalize(cloud(2, 5, 3, seed=3) - 0.5, dim=2)
    lengths = torch.tensor([7, 3])
    arguments = {"x_lengths": lengths, "x_normals": normals_x, "y_normals": normals_y}
    (near_x, near_y), (cos_x, cos_y) = chamfer_distance(
        x, y, **arguments, batch_reduction=None, point_reduction=None, abs_cosine=False
    )
    assert near_x.shape == cos_x.shape == (2, 7)
    assert near_y.shape == cos_y.shape == (2, 5)
    assert not near_x[1, 3:].any()
    assert not cos_x[1, 3:].any()
    loss, loss_normals = chamfer_distance(x, y, **arguments, batch_reduction=None, abs_cosine=False)
    torch.testing.assert_close(loss, near_x.sum(1) / lengths + near_y.mean(1))
    torch.testing.assert_close(loss_normals, cos_x.sum(1) / lengths + cos_y.mean(1))
    farthest = chamfer_distance(x, y, lengths, batch_reduction=None, point_reduction="max").loss
    torch.testing.assert_close(farthest, torch.maximum(near_x.amax(1), near_y.amax(1)))
    alone = chamfer_distance(
        x, y, **arguments, batch_reduction=None, point_reduction=None, single_directional=True, abs_cosine=False
    )
    assert torch.equal(alone.loss, near_x)
    assert torch.equal(alone.loss_normals, cos_x)
    same = chamfer_distance(x, x, x_normals=normals_x, y_normals=-normals_x)
    assert float(same.loss_normals) == pytest.approx(0, abs=1e-6)
    signed = chamfer_distance(x, x, x_normals=normals_x, y_normals=-normals_x, abs_cosine=False)
    assert float(signed.loss_normals) == pytest.approx(4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_chamfer_of_empty_clouds_is_zero_and_keeps_the_graph(reduction, sizes):
    full = cloud(7, 3)
    x, y = (cloud(n, 3, seed=n).requires_grad_() for n in sizes)
    batch = Pointclouds([full, x, full]), Pointclouds([full + 1, y, full])
    each = chamfer_distance(*batch, batch_reduction=None, point_reduction=reduction).loss
    assert float(each[1].detach()) == 0
    torch.testing.assert_close(each[0], chamfer_distance(full[None], full[None] + 1, point_reduction=reduction).loss)
    each.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(y.grad).all()
    padded = torch.zeros(1, sizes[0], 3), torch.zeros(1, sizes[1], 3)
    assert float(chamfer_distance(*padded, point_reduction=reduction).loss) == 0


def test_chamfer_gradients():
    x, y = cloud(2, 5, 3, dtype=torch.float64), cloud(2, 7, 3, seed=1, dtype=torch.float64)
    for norm in (1, 2):
        assert gradcheck(
            lambda x, y, norm=norm: chamfer_distance(x, y, torch.tensor([5, 2]), norm=norm).loss,
            (x.requires_grad_(), y.requires_grad_()),
        )


def test_chamfer_in_half_precision_is_float32():
    x, y = cloud(1, 101, 3), cloud(1, 103, 3, seed=1)
    half = chamfer_distance(x.bfloat16(), y.bfloat16()).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, chamfer_distance(x.bfloat16().float(), y.bfloat16().float()).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chamfer_distance(x, y).loss, chamfer_distance(x, y).loss)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_reduction": "max"}, "unknown batch_reduction 'max'"),
        ({"point_reduction": "median"}, "unknown point_reduction 'median'"),
        ({"point_reduction": None}, "batch_reduction must be None"),
        ({"point_reduction": "max", "x_normals": cloud(2, 5, 3)}, "takes no normals"),
        ({"weights": torch.tensor([-1.0, 1])}, "weights must not be negative"),
        ({"norm": 0}, "unknown norm 0"),
        ({"x_lengths": torch.tensor([6, 1])}, "x lengths must be in"),
        ({"x": torch.full((2, 5, 3), torch.nan)}, "x must be finite"),
    ],
)
def test_chamfer_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        chamfer_distance(**{"x": cloud(2, 5, 3), "y": cloud(2, 7, 3)} | change)


def test_chamfer_of_weights_that_are_all_zero():
    x = cloud(2, 5, 3).requires_grad_()
    for reduction in ("mean", "sum"):
        loss = chamfer_distance(x, x.detach() + 1, weights=torch.zeros(2), batch_reduction=reduction).loss
        loss.backward()
        assert float(loss.detach()) == 0
        assert not x.grad.any()


# Hausdorff and earth mover's distance


def test_hausdorff_equals_scipy_and_is_finite_at_zero():
    from scipy.spatial.distance import directed_hausdorff

    x, y = [cloud(17, 3), cloud(5, 3)], [cloud(11, 3, seed=1), torch.zeros(0, 3)]
    found = hausdorff_distance(Pointclouds(x), Pointclouds(y))
    there, back = directed_hausdorff(x[0], y[0])[0], directed_hausdorff(y[0], x[0])[0]
    torch.testing.assert_close(found, torch.tensor([max(there, back), 0.0]))
    one = hausdorff_distance(x[0][None], y[0][None], single_directional=True)
    torch.testing.assert_close(one, torch.tensor([there], dtype=torch.float32))
    same = x[0][None].clone().requires_grad_()
    hausdorff_distance(same, same.detach()).sum().backward()
    assert not same.grad.any()


@pytest.mark.parametrize("power", [1, 2])
def test_earth_movers_distance_of_known_pairs(power):
    x = cloud(1, 13, 3, dtype=torch.float64)
    offset = torch.tensor([3.0, 4, 0], dtype=torch.float64)
    moved = (x + offset)[:, torch.randperm(13)]
    found = earth_movers_distance(x, moved, power=power)  # a translation is optimal
    assert float(found.distance) == pytest.approx(5.0**power)
    assert float(earth_movers_distance(x, x.flip(1), power=power).distance) == pytest.approx(0, abs=1e-12)
    line = torch.arange(4.0, dtype=torch.float64)[None, :, None]
    halves = torch.tensor([[[0.5], [2.5]]], dtype=torch.float64)
    assert float(earth_movers_distance(line, halves, power=power).distance) == pytest.approx(0.5**power)


def test_earth_movers_distance_of_different_sizes_both_ways(monkeypatch):
    x, y = cloud(2, 7, 3, dtype=torch.float64), cloud(2, 5, 3, seed=1, dtype=torch.float64)
    lengths = torch.tensor([5, 3])
    by_copies = earth_movers_distance(x, y, y_lengths=lengths)
    monkeypatch.setattr(losses.shapes, "ASSIGNMENT_SIZE", 1)
    by_program = earth_movers_distance(x, y, y_lengths=lengths)
    torch.testing.assert_close(by_copies.distance, by_program.distance)
    torch.testing.assert_close(by_copies.distance, earth_movers_distance(y, x, x_lengths=lengths).distance)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sizes", [(31, 31), (29, 17)])
@pytest.mark.parametrize("epsilon, iterations", [(1e-3, 500), (0.1, 3)])
def test_entropic_bounds_hold_the_exact_value(power, sizes, epsilon, iterations):
    x, y = cloud(2, sizes[0], 3, dtype=torch.float64), cloud(2, sizes[1], 3, seed=1, dtype=torch.float64)
    exact = earth_movers_distance(x, y, power=power)
    assert torch.equal(exact.lower, exact.upper)
    found = earth_movers_distance(x, y, method="entropic", power=power, epsilon=epsilon, max_iterations=iterations)
    assert (found.lower <= exact.distance + 1e-12).all()
    assert (found.upper >= exact.distance - 1e-12).all()
    torch.testing.assert_close(found.distance, found.upper)
    if epsilon < 0.01:
        assert ((found.upper - found.lower) / exact.distance < 0.05).all()


def test_earth_movers_distance_gradients():
    x, y = cloud(1, 7, 3, dtype=torch.float64), cloud(1, 7, 3, seed=1, dtype=torch.float64)
    for power in (1, 2):
        assert gradcheck(
            lambda x, y, power=power: earth_movers_distance(x, y, power=power).distance,
            (x.requires_grad_(), y.requires_grad_()),
        )
    same = cloud(1, 5, 3).requires_grad_()
    for method in ("exact", "entropic"):
        earth_movers_distance(same, same.detach(), method=method).distance.sum().backward()
        assert torch.isfinite(same.grad).all()


def test_earth_movers_distance_of_ragged_and_empty_clouds():
    x = Pointclouds([cloud(7, 3), cloud(0, 3), cloud(5, 3)])
    y = Pointclouds([cloud(7, 3, seed=1), cloud(3, 3), cloud(0, 3)])
    for method in ("exact", "entropic"):
        found = earth_movers_distance(x, y, method=method)
        alone = earth_movers_distance(x.points_list()[0][None], y.points_list()[0][None], method=method)
        torch.testing.assert_close(found.distance, torch.tensor([float(alone.distance), 0, 0]))
    with pytest.raises(ValueError, match="unknown method 'auction'"):
        earth_movers_distance(x, y, method="auction")
    with pytest.raises(ValueError, match="epsilon and max_iterations must be positive"):
        earth_movers_distance(x, y, method="entropic", epsilon=0.0)


# losses on meshes

MESH_LOSSES = {
    "mesh_loss_edge": functools.partial(mesh_edge_loss, target_length=0.1),
    "mesh_loss_normal_consistency": mesh_normal_consistency,
    "mesh_loss_lap_uniform": functools.partial(mesh_laplacian_smoothing, method="uniform"),
    "mesh_loss_lap_cot": functools.partial(mesh_laplacian_smoothing, method="cot"),
    "mesh_loss_lap_cotcurv": functools.partial(mesh_laplacian_smoothing, method="cotcurv"),
}
POINT_LOSSES = {"point_mesh_face": point_mesh_face_distance, "point_mesh_edge": point_mesh_edge_distance}
# its float32 gradients of these are themselves 1e-5 to 3e-5 from those in float64
LESS_EXACT = {"mesh_loss_lap_cot": 4e-5, "mesh_loss_lap_cotcurv": 4e-5}


def reference_loss(key, dtype=torch.float32):
    verts = [reference(f"meshes/verts{i}").to(dtype).requires_grad_() for i in range(2)]
    batch = Meshes(verts, [reference("meshes/faces0"), reference("meshes/faces1")])
    if key in MESH_LOSSES:
        loss = MESH_LOSSES[key](batch)
    else:
        points = [reference(f"{key}/points{i}").to(dtype) for i in range(2)]
        loss = POINT_LOSSES[key](batch, Pointclouds(points))
    return loss.detach(), torch.autograd.grad(loss, verts)


@pytest.mark.parametrize("key", [*MESH_LOSSES, *POINT_LOSSES])
def test_mesh_losses_equal_pytorch3d(key):
    loss, grads = reference_loss(key)
    assert_same(loss, reference(f"{key}/loss"))
    for i, (grad, exact) in enumerate(zip(grads, reference_loss(key, torch.float64)[1])):
        assert_same(grad, reference(f"{key}/grad{i}"), LESS_EXACT.get(key, 1e-5))
        assert_same(grad.double(), exact)  # ours are


def bumpy(level, seed):
    sphere = ico_sphere(level)
    return sphere.offset_verts(0.1 * torch.randn(sphere.verts_packed().shape, generator=torch.manual_seed(seed)))


@pytest.mark.parametrize("method", ["uniform", "cot", "cotcurv"])
def test_laplacian_smoothing_equals_loops(method):
    mesh = bumpy(1, 0)
    expected = naive.laplacian_smoothing(mesh.verts_packed().double(), mesh.faces_packed(), method)
    torch.testing.assert_close(mesh_laplacian_smoothing(mesh, method).double(), expected, rtol=1e-5, atol=0)


def test_normal_consistency_equals_loops_on_non_manifold_edges():
    verts = cloud(6, 3, dtype=torch.float64)
    faces = torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4], [5, 1, 0], [4, 1, 2]])  # four faces on one edge
    torch.testing.assert_close(
        mesh_normal_consistency(Meshes([verts], [faces])), naive.normal_consistency(verts, faces)
    )


def test_normal_consistency_of_flat_folded_and_right_pairs():
    base = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    for last, expected in (([0.0, -1, 0], 0.0), ([0.0, 1, 0], 2.0), ([0.0, 0, 1], 1.0)):
        verts = torch.cat([base, torch.tensor([last])])
        for winding in ([1, 0, 3], [0, 1, 3]):  # the same whichever way the second face winds
            mesh = Meshes([verts], [torch.tensor([[0, 1, 2], winding])])
            assert float(mesh_normal_consistency(mesh)) == pytest.approx(expected, abs=1e-6)


def test_edge_loss_of_a_tetrahedron():
    verts = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    mesh = Meshes([verts], [torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])])
    assert float(mesh_edge_loss(mesh)) == pytest.approx((3 * 1 + 3 * 2) / 6)
    assert float(mesh_edge_loss(mesh, target_length=1.0)) == pytest.approx(3 * (math.sqrt(2) - 1) ** 2 / 6)


def test_point_face_distance_above_a_square_at_every_scale():
    square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    points = torch.tensor([[0.75, 0.25, 0.5], [0.25, 0.75, -0.5]])
    for scale in (1e-3, 1.0, 1e3):
        found = point_mesh_face_distance(Meshes([square * scale], [faces]), Pointclouds([points * scale]))
        assert float(found) / scale**2 == pytest.approx(0.25 + 0.25, rel=1e-5)


def test_points_on_a_fine_sphere_have_no_distance_to_it():
    sphere = ico_sphere(4)  # most faces are smaller than PyTorch3D's min_triangle_area
    points = sample_points_from_meshes(sphere, 5003, generator=torch.Generator().manual_seed(0))[0]
    corners = sphere.verts_packed()[sphere.faces_packed()]
    found = losses.shapes.nearest_triangles(points, corners)
    assert float(losses.shapes._squared_to(points, corners[found.indices], found.barycentrics).max()) < 1e-12
    # what is left of the loss is the way from faces to points: less than their spacing
    assert float(point_mesh_face_distance(sphere, Pointclouds([points]))) < 1e-3


def everything(mesh, seed=5):
    """All losses of a batch of one size, with points where they need them."""
    clouds = Pointclouds([cloud(7, 3, seed=seed + i) for i in range(len(mesh))])
    values = [loss(mesh) for loss in MESH_LOSSES.values()]
    return torch.stack(values + [loss(mesh, clouds) for loss in POINT_LOSSES.values()]), clouds


def test_losses_of_a_ragged_batch_are_the_mean_of_its_members():
    members = [bumpy(0, 1), bumpy(1, 2), bumpy(0, 3)]
    batch = join_meshes_as_batch(members)
    values, clouds = everything(batch)
    each = []
    for i, member in enumerate(members):
        own = [loss(member) for loss in MESH_LOSSES.values()]
        each.append(torch.stack(own + [loss(member, clouds[i]) for loss in POINT_LOSSES.values()]))
    torch.testing.assert_close(values, torch.stack(each).mean(0))


def test_empty_members_add_zero_anywhere():
    member, none = bumpy(0, 1), Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3).long()])
    batch = join_meshes_as_batch([none, member, none])
    clouds = Pointclouds([cloud(3, 3), cloud(7, 3), cloud(0, 3)])
    for loss in MESH_LOSSES.values():
        torch.testing.assert_close(3 * loss(batch), loss(member))
        assert float(loss(none)) == 0
    for loss in POINT_LOSSES.values():
        torch.testing.assert_close(3 * loss(batch, clouds), loss(member, clouds[1]))
        assert float(loss(none, clouds[0])) == 0
        assert float(loss(member, clouds[2])) == 0


DEGENERATE = {
    "coincident": (torch.ones(4, 3), [[0, 1, 2], [1, 2, 3]]),
    "collinear": (torch.arange(4.0)[:, None].expand(4, 3), [[0, 1, 2], [1, 2, 3]]),
    "repeated corner": (torch.rand(4, 3, generator=torch.manual_seed(0)), [[0, 0, 1], [1, 2, 3]]),
    "sliver": (torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 1e-7, 0], [0.5, 1, 0]]), [[0, 1, 2], [0, 1, 3]]),
    "isolated vertex": (torch.rand(5, 3, generator=torch.manual_seed(0)), [[0, 1, 2], [1, 2, 3]]),
    "same face twice": (torch.rand(4, 3, generator=torch.manual_seed(0)), [[0, 1, 2], [0, 1, 2], [0, 2, 1]]),
    "tiny": (1e-6 * torch.rand(4, 3, generator=torch.manual_seed(0)), [[0, 1, 2], [1, 2, 3]]),
    "far": (1e6 + torch.rand(4, 3, generator=torch.manual_seed(0)), [[0, 1, 2], [1, 2, 3]]),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_losses_and_gradients_are_finite_on_degenerate_meshes(case):
    verts, faces = DEGENERATE[case]
    verts = verts.clone().requires_grad_()
    mesh = Meshes([verts], [torch.tensor(faces)])
    points = Pointclouds([torch.cat([verts.detach(), verts.detach()[:1]])])  # on the vertices, one twice
    for key, loss in MESH_LOSSES.items() | POINT_LOSSES.items():
        value = loss(mesh) if key in MESH_LOSSES else loss(mesh, points)
        (grad,) = torch.autograd.grad(value, verts)
        assert torch.isfinite(value), key
        assert torch.isfinite(grad).all(), key


def test_isolated_vertices_are_not_pulled_to_the_origin():
    mesh = bumpy(0, 1)
    more = Meshes([torch.cat([mesh.verts_packed(), torch.full((1, 3), 9.0)])], [mesh.faces_packed()])
    for method in ("uniform", "cot", "cotcurv"):
        torch.testing.assert_close(
            13 * mesh_laplacian_smoothing(more, method), 12 * mesh_laplacian_smoothing(mesh, method)
        )


@pytest.mark.parametrize("method", ["uniform", "cot", "cotcurv"])
def test_laplacian_smoothing_far_from_the_origin(method):
    mesh = bumpy(1, 2)
    far = mesh.scale_verts(1024.0).offset_verts(torch.full((3,), 2.0**20))  # a grid of 1/8: exact to 1e-4
    factor = 1024.0 if method != "cotcurv" else 1 / 1024
    near = mesh_laplacian_smoothing(mesh, method) * factor
    torch.testing.assert_close(mesh_laplacian_smoothing(far, method), near, rtol=1e-2, atol=0)


# cotangent weights are constants to the gradient, so finite differences of those losses differ from it
@pytest.mark.parametrize("key", [key for key in [*MESH_LOSSES, *POINT_LOSSES] if "cot" not in key])
def test_mesh_loss_gradients(key):
    mesh = bumpy(0, 3)
    points = Pointclouds([cloud(5, 3, dtype=torch.float64)])

    def loss(verts):
        own = Meshes([verts], [mesh.faces_packed()])
        return MESH_LOSSES[key](own) if key in MESH_LOSSES else POINT_LOSSES[key](own, points)

    assert gradcheck(loss, mesh.verts_packed().double().requires_grad_())


def test_point_losses_pass_gradients_to_points():
    mesh = bumpy(0, 3)
    exact = Meshes([mesh.verts_packed().double()], [mesh.faces_packed()])
    points = cloud(5, 3, dtype=torch.float64).requires_grad_()
    for loss in POINT_LOSSES.values():
        assert gradcheck(lambda p, loss=loss: loss(exact, Pointclouds([p])), points)


def test_mesh_losses_reject():
    mesh = bumpy(0, 1)
    broken = mesh.offset_verts(torch.tensor([torch.nan, 0, 0]))
    for loss in MESH_LOSSES.values():
        with pytest.raises(ValueError, match=r"vertices \(packed\) must be finite"):
            loss(broken)
    for loss in POINT_LOSSES.values():
        with pytest.raises(ValueError, match=r"vertices \(packed\) must be finite"):
            loss(broken, Pointclouds([cloud(3, 3)]))
        with pytest.raises(ValueError, match=r"points \(packed\) must be finite"):
            loss(mesh, Pointclouds([cloud(3, 3) * torch.nan]))
        with pytest.raises(ValueError, match="batches of one size, got 1 and 2"):
            loss(mesh, Pointclouds([cloud(3, 3)] * 2))
    with pytest.raises(ValueError, match="unknown method 'cotan'"):
        mesh_laplacian_smoothing(mesh, "cotan")


def test_mesh_losses_of_half_precision_meshes_are_float32():
    mesh = bumpy(0, 1)
    half = Meshes([mesh.verts_packed().bfloat16()], [mesh.faces_packed()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in MESH_LOSSES.values():
            assert loss(half).dtype == torch.float32
            torch.testing.assert_close(loss(half), loss(mesh), rtol=0.1, atol=0.01)
