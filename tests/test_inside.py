"""Winding numbers, inside tests, signed distances."""

import math

import numpy as np
import pytest
import torch

from tests import naive
from vision3dgen.ops import inside
from vision3dgen.ops.inside import contains, nearest_faces, point_triangle_distance, signed_distance, winding_number
from vision3dgen.ops.meshes import ico_sphere, torus
from vision3dgen.ops.solidangle import far_solid_angles
from vision3dgen.structures import Meshes, join_meshes_as_scene

METHODS = ("winding", "nonzero", "parity")
CUBE_VERTS = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=torch.float64)
CUBE_FACES = torch.tensor(
    [
        [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
        [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],
    ]
)  # fmt: skip
OCTAHEDRON = Meshes(
    [torch.tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=torch.float64)],
    [torch.tensor([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])],
)


def box(low, high):
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return Meshes([low + CUBE_VERTS * (high - low)], [CUBE_FACES])


def double(mesh):
    return Meshes([v.double() for v in mesh.verts_list()], mesh.faces_list())


def cloud(count, scale, seed=0):
    return (torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5) * 2 * scale


def real(shared_data, name):
    import trimesh

    mesh = trimesh.load(shared_data / "meshes" / f"{name}.obj", force="mesh", process=False)
    return Meshes([torch.tensor(mesh.vertices)], [torch.tensor(mesh.faces, dtype=torch.int64)])


def around(mesh, count, seed=0):
    low, high = mesh.get_bounding_boxes()[0].unbind(1)
    return (low + high) / 2 + cloud(count, 0.55, seed) * (high - low)


# ---------------------------------------------------------------------------------------------------- inside or not


@pytest.mark.parametrize("method", METHODS)
def test_cube_and_sphere_are_exact(method):
    points = cloud(3001, 1.5)
    inside = ((points > 0) & (points < 1)).all(1)
    assert torch.equal(contains(box((0, 0, 0), (1, 1, 1)), points, method=method), inside)
    sphere = double(ico_sphere(3))
    radius = points.norm(dim=1)
    clear = (radius < 0.98) | (radius > 1)  # an inscribed polyhedron
    assert torch.equal(contains(sphere, points, method=method)[clear], (radius < 0.98)[clear])


@pytest.mark.parametrize("method", METHODS)
def test_rays_through_vertices_and_edges(method):
    """Every point of a lattice aligned with an octahedron: rays meet its corners, its edges and its faces' edges."""
    axis = torch.linspace(-1.5, 1.5, 25, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    size = points.abs().sum(1)
    clear = (size - 1).abs() > 1e-9
    assert torch.equal(contains(OCTAHEDRON, points, method=method)[clear], (size < 1)[clear])


@pytest.mark.parametrize("method", ["parity", "nonzero"])
def test_rays_through_every_vertex_and_edge_of_a_mesh(method):
    mesh = double(ico_sphere(2))
    verts, faces = mesh.get_mesh_verts_faces(0)
    corners = verts[faces]
    marks = torch.cat([verts, (corners + corners.roll(1, 1)).view(-1, 3) / 2, corners.mean(1)])
    heights = torch.tensor([-2.0, -0.3, 0.0, 0.3], dtype=torch.float64)
    points = torch.cat([torch.cat([marks[:, :2], z.expand(len(marks), 1)], dim=1) for z in heights])
    radius = points.norm(dim=1)
    clear = (radius < 0.96) | (radius > 1.001)
    assert int(clear.sum()) > len(points) / 3
    assert torch.equal(contains(mesh, points, method=method)[clear], (radius < 0.96)[clear])


@pytest.mark.parametrize("method", METHODS)
def test_points_on_a_box_follow_the_half_open_rule(method):
    axis = torch.arange(-1, 5, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    inside = (points >= torch.tensor([0.0, 1, 1])).all(1) & (points < torch.tensor([2.0, 3, 4])).all(1)
    assert torch.equal(contains(box((0, 1, 1), (2, 3, 4)), points, method=method), inside)


def test_overlapping_parts():
    scene = join_meshes_as_scene([box((0, 0, 0), (2, 2, 2)), box((1, 1, 1), (3, 3, 3))])
    points = torch.tensor([[0.5, 0.5, 0.5], [1.5, 1.6, 1.7], [2.5, 2.4, 2.6], [2.5, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(winding_number(scene, points), torch.tensor([1.0, 2, 1, 0], dtype=torch.float64))
    assert contains(scene, points).tolist() == [True, True, True, False]
    assert contains(scene, points, method="nonzero").tolist() == [True, True, True, False]
    assert contains(scene, points, method="parity").tolist() == [True, False, True, False]


def test_a_cavity_is_outside():
    inner = box((1, 1, 1), (2, 2, 2))
    shell = join_meshes_as_scene(
        [box((0, 0, 0), (3, 3, 3)), Meshes(inner.verts_list(), [inner.faces_list()[0].flip(1)])]
    )
    points = torch.tensor([[1.5, 1.4, 1.6], [0.5, 1.5, 1.5]], dtype=torch.float64)
    for method in METHODS:
        assert contains(shell, points, method=method).tolist() == [False, True]


def test_turning_a_mesh_inside_out_flips_the_sign():
    sphere = double(ico_sphere(2))
    flipped = Meshes(sphere.verts_list(), [faces.flip(1) for faces in sphere.faces_list()])
    points = cloud(211, 0.9)
    torch.testing.assert_close(winding_number(flipped, points), -winding_number(sphere, points))
    for method in METHODS:
        assert torch.equal(contains(flipped, points, method=method), contains(sphere, points, method=method))


# ------------------------------------------------------------------------------------------------- winding numbers


@pytest.mark.parametrize("seed", range(3))
def test_winding_numbers_of_soups_equal_a_loop(seed):
    """Random faces over few vertices: open, non-manifold, inconsistently oriented, some used twice."""
    generator = torch.Generator().manual_seed(seed)
    verts = torch.rand(11, 3, generator=generator, dtype=torch.float64)
    faces = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(23)])
    faces = torch.cat([faces, faces[:3], faces[5:7].flip(1)])
    points = cloud(29, 1.2, seed)
    expected = [naive.solid_angle_winding(verts, faces, point) for point in points]
    found = winding_number(Meshes([verts], [faces]), points)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("removed, copies", [(1, 1), (7, 1), (40, 1), (7, 3)])
def test_closing_cone_equals_the_sum_over_faces_for_meshes_with_holes(removed, copies):
    sphere = double(ico_sphere(2))
    verts, faces = sphere.get_mesh_verts_faces(0)
    keep = torch.randperm(len(faces), generator=torch.Generator().manual_seed(removed))[removed:].repeat(copies)
    points = cloud(31, 1.3, removed)
    expected = [naive.solid_angle_winding(verts, faces[keep], point) for point in points]
    found = winding_number(Meshes([verts], [faces[keep]]), points)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_duplicated_vertices_do_not_open_a_mesh():
    sphere = double(ico_sphere(1))
    verts, faces = sphere.get_mesh_verts_faces(0)
    soup = Meshes([verts[faces].view(-1, 3)], [torch.arange(3 * len(faces)).view(-1, 3)])
    points = cloud(101, 1.2)
    found = winding_number(soup, points)
    assert torch.equal(found, winding_number(sphere, points))
    assert set(found.tolist()) == {0.0, 1.0}


def test_winding_number_is_smooth_across_a_hole():
    sphere = double(ico_sphere(3))
    verts, faces = sphere.get_mesh_verts_faces(0)
    open_faces = faces[verts[faces].mean(1)[:, 2] < 0.8]
    height = torch.linspace(0, 2, 201, dtype=torch.float64)
    points = torch.stack([torch.full_like(height, 0.01), torch.full_like(height, 0.02), height], dim=1)
    found = winding_number(Meshes([verts], [open_faces]), points)
    assert float(found.diff().abs().max()) < 0.02
    assert bool((found.diff() <= 1e-9).all())
    assert found[0] > 0.85
    assert found[-1] < 0.1


def test_budget_does_not_change_the_result():
    verts, faces = double(ico_sphere(1)).get_mesh_verts_faces(0)
    mesh = Meshes([verts], [faces[::2]])
    points = cloud(37, 1.1)
    expected = winding_number(mesh, points)
    for budget in (1, 1000, 20_000):
        torch.testing.assert_close(winding_number(mesh, points, budget=budget), expected)


def test_winding_number_gradients():
    verts, faces = double(ico_sphere(0)).get_mesh_verts_faces(0)
    verts = verts.clone().requires_grad_()
    points = cloud(5, 0.5).requires_grad_()
    for kept in (faces[:-2], faces[::3]):  # closed by a cone; summed over faces
        assert torch.autograd.gradcheck(lambda v, p, kept=kept: winding_number(Meshes([v], [kept]), p), (verts, points))


# ------------------------------------------------------------------------------------------------------- distances


def test_point_triangle_distance_equals_a_search():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(23, 3, generator=generator, dtype=torch.float64)
    triangles = torch.randn(23, 3, 3, generator=generator, dtype=torch.float64)
    expected = [naive.point_triangle(p, t) for p, t in zip(points, triangles)]
    found = point_triangle_distance(points, triangles)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_degenerate_triangles_are_measured_by_their_sides(scale):
    points = torch.tensor([[0.0, 1.0, 0.0]] * 3, dtype=torch.float32) * scale
    segment, point, sliver = (
        [[-1.0, 0, 0], [0.25, 0, 0], [1, 0, 0]],
        [[0.0, 0, 0]] * 3,
        [[-1.0, 0, 0], [1, 0, 0], [0, 1e-12, 0]],
    )
    found = point_triangle_distance(points, torch.tensor([segment, point, sliver]) * scale)
    torch.testing.assert_close(found, torch.ones(3) * scale)


def test_distance_gradients_are_finite_on_the_surface():
    points = torch.tensor([[0.2, 0.2, 0.0], [1.0, 0, 0], [0.3, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    triangle = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64).expand(3, 3, 3)
    point_triangle_distance(points, triangle).sum().backward()
    expected = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(points.grad, expected)


@pytest.mark.parametrize("offset, scale", [(0.0, 1.0), (1e6, 1.0), (0.0, 1e-6)])
def test_nearest_faces_equal_all_pairs(offset, scale):
    generator = torch.Generator().manual_seed(1)
    verts = torch.rand(53, 3, generator=generator, dtype=torch.float64) * scale + offset
    faces = torch.randint(0, 53, (71, 3), generator=generator)  # slivers, repeated corners, long and short
    points = (torch.rand(1500, 3, generator=generator, dtype=torch.float64) * 2 - 0.5) * scale + offset
    found = nearest_faces(verts, faces, points)
    pairs = point_triangle_distance(points[:, None].expand(-1, 71, 3), verts[faces].expand(1500, 71, 3, 3))
    torch.testing.assert_close(found.distances, pairs.amin(1), rtol=1e-9, atol=1e-9 * scale + 1e-15 * offset)
    chosen = pairs.gather(1, found.indices[:, None])[:, 0]
    torch.testing.assert_close(chosen, pairs.amin(1), rtol=1e-9, atol=1e-9 * scale + 1e-15 * offset)
    torch.testing.assert_close((found.points - points).norm(dim=1), found.distances)


def test_signed_distance_of_a_sphere_and_a_box():
    points = cloud(997, 1.6)
    sphere = double(ico_sphere(4))
    found = signed_distance(sphere, points)
    torch.testing.assert_close(found, points.norm(dim=1) - 1, atol=4e-3, rtol=0)
    found = signed_distance(box((-1, -1, -1), (1, 1, 1)), points)
    gap = points.abs() - 1
    expected = gap.clamp_min(0).norm(dim=1) + gap.amax(1).clamp_max(0)
    torch.testing.assert_close(found, expected)


def test_signed_distance_gradients():
    verts, faces = double(torus(0.3, 1.0, 4, 5)).get_mesh_verts_faces(0)
    verts = verts.clone().requires_grad_()
    points = cloud(7, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, p: signed_distance(Meshes([v], [faces]), p, method="parity"), (verts, points), fast_mode=True
    )
    (slope,) = torch.autograd.grad(signed_distance(Meshes([verts.detach()], [faces]), points).sum(), points)
    torch.testing.assert_close(slope.norm(dim=1), torch.ones(7, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------ containers


def test_batches_equal_single_members_and_empty_members_hold_nothing():
    meshes = Meshes(
        [double(ico_sphere(1)).verts_packed(), torch.zeros(0, 3, dtype=torch.float64), CUBE_VERTS],
        [ico_sphere(1).faces_packed(), torch.zeros(0, 3, dtype=torch.int64), CUBE_FACES[:-1]],
    )
    points = torch.stack([cloud(41, 1.2, seed) for seed in range(3)])
    for function in (winding_number, contains, signed_distance):
        together = function(meshes, points)
        assert together.shape == (3, 41)
        for index in (0, 2):
            assert torch.equal(together[index], function(meshes[index], points[index]))
    assert not bool(contains(meshes, points)[1].any())
    assert bool(winding_number(meshes, points)[1].eq(0).all())
    assert bool(torch.isposinf(signed_distance(meshes, points)[1]).all())
    empty = nearest_faces(meshes.verts_list()[1], meshes.faces_list()[1], points[1])
    assert bool((empty.indices == -1).all())


@pytest.mark.parametrize("method", METHODS)
def test_no_points(method):
    assert contains(OCTAHEDRON, torch.zeros(0, 3), method=method).shape == (0,)
    assert signed_distance(OCTAHEDRON, torch.zeros(1, 0, 3), method=method).shape == (1, 0)


def test_results_have_the_points_type():
    points = cloud(3, 1.0)
    for dtype in (torch.float32, torch.float64):
        assert winding_number(OCTAHEDRON, points.to(dtype)).dtype == dtype
        assert signed_distance(OCTAHEDRON, points.to(dtype)).dtype == dtype


def test_bad_inputs_are_named():
    points = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match="1 meshes"):
        contains(OCTAHEDRON, points)
    with pytest.raises(ValueError, match="points must be finite"):
        winding_number(OCTAHEDRON, torch.full((1, 3), math.nan))
    with pytest.raises(ValueError, match=r"faces must be in \[0, 3\)"):
        nearest_faces(torch.zeros(3, 3), torch.tensor([[0, 1, 3]]), torch.zeros(1, 3))


def test_large_offsets_and_small_scales():
    points = cloud(307, 1.5)
    inside = contains(OCTAHEDRON, points)
    for scale, offset in ((1e-6, 0.0), (1.0, 1e6), (1e6, -1e6)):
        moved = Meshes([OCTAHEDRON.verts_packed() * scale + offset], OCTAHEDRON.faces_list())
        for method in METHODS:
            assert torch.equal(contains(moved, points * scale + offset, method=method), inside)


# ----------------------------------------------------------------------------------------------------- real meshes


@pytest.mark.parametrize("name", ["spot", "cow", "fandisk", "homer", "rocker-arm", "cheburashka"])
def test_methods_agree_on_real_closed_meshes(shared_data, name):
    mesh = real(shared_data, name)
    points = around(mesh, 20_000)
    winding = contains(mesh, points, method="winding")
    assert 0.02 < float(winding.double().mean()) < 0.9
    for method in ("nonzero", "parity"):
        assert float((contains(mesh, points, method=method) == winding).double().mean()) > 0.999


@pytest.mark.parametrize("name", ["spot", "fandisk", "rocker-arm"])
def test_signed_distance_agrees_with_open3d(shared_data, name):
    o3d = pytest.importorskip("open3d")
    mesh = real(shared_data, name)
    points = around(mesh, 2000)
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(
        o3d.core.Tensor(mesh.verts_packed().numpy().astype(np.float32)),
        o3d.core.Tensor(mesh.faces_packed().numpy().astype(np.uint32)),
    )
    queries = o3d.core.Tensor(points.numpy().astype(np.float32))
    size = float(mesh.verts_packed().abs().max())
    found = signed_distance(mesh, points)
    torch.testing.assert_close(
        found.abs(), torch.from_numpy(scene.compute_distance(queries).numpy()).double(), rtol=0, atol=3e-6 * size
    )
    agree = torch.from_numpy(scene.compute_occupancy(queries).numpy() > 0) == (found < 0)
    assert float(agree.double().mean()) > 0.999


@pytest.mark.parametrize("name", ["suzanne", "teapot"])
def test_winding_numbers_of_real_meshes_with_holes_are_bounded_and_right_far_away(shared_data, name):
    mesh = real(shared_data, name)
    points = around(mesh, 200)
    verts, faces = mesh.get_mesh_verts_faces(0)
    expected = [naive.solid_angle_winding(verts, faces, point) for point in points[:3]]
    found = winding_number(mesh, points)
    torch.testing.assert_close(found[:3], torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)
    size = float(verts.abs().max())
    assert float(winding_number(mesh, points[:7] + 100 * size).abs().max()) < 1e-3


@pytest.mark.parametrize("removed, copies", [(0, 1), (0.02, 1), (0.3, 1), (0.02, 2)])
def test_far_triangles_taken_together_keep_the_winding_number(removed, copies, monkeypatch):
    monkeypatch.setattr(inside, "_FEW", 0)
    mesh = ico_sphere(4)
    verts, faces = mesh.verts_packed().double(), mesh.faces_packed()
    generator = torch.Generator().manual_seed(0)
    faces = faces[torch.rand(len(faces), generator=generator) >= removed].repeat(copies, 1)
    holed = Meshes([verts], [faces])
    points = torch.rand(1500, 3, generator=generator, dtype=torch.float64) * 2.4 - 1.2
    exact = winding_number(holed, points)
    for beta, bound in ((2.0, 6e-3), (4.0, 1e-3)):
        error = (winding_number(holed, points, beta=beta) - exact).abs()
        assert error.max() < bound * copies
        assert (error.max() > 0) == (removed > 0)  # a closed surface is counted, not summed
    assert torch.equal(contains(holed, points, beta=6.0), exact.abs() > 0.5)


def test_multipoles_of_a_soup_equal_the_sum_over_its_triangles():
    generator = torch.Generator().manual_seed(1)
    middles = torch.randn(101, 1, 3, generator=generator, dtype=torch.float64) + 50
    corners = middles + 0.1 * torch.randn(101, 3, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, -1.0, 2.0]).double().repeat(34)[:101]
    points = torch.randn(29, 3, generator=generator, dtype=torch.float64) * 2 + 50
    faces = torch.arange(303).view(-1, 3)
    faces = torch.cat([faces[weights > 0], faces[weights < 0].flip(1), faces[weights > 1]])
    exact = torch.tensor([naive.solid_angle_winding(corners.view(-1, 3), faces, point) for point in points]).double()
    errors = [(far_solid_angles(corners, weights, points, beta) - exact).abs().max() for beta in (1.5, 3.0, 100.0)]
    assert errors[0] < 3e-3
    assert errors[1] < errors[0] / 4
    assert errors[2] < 1e-9
    assert torch.equal(far_solid_angles(corners[:0], weights[:0], points, 2.0), torch.zeros(29).double())
    assert far_solid_angles(corners, weights, points[:0], 2.0).shape == (0,)
