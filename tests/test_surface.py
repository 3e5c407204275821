"""Marching cubes, isosurfaces, adaptive extraction."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vision3dgen.ops.surface import _table, extract_surface, isosurface, marching_cubes
from vision3dgen.structures import GridSpec

DATA = Path(__file__).parent / "data" / "pytorch3d_0.7.9.npz"
CORNERS = list(itertools.product((0, 1), repeat=3))  # z, y, x: bit x + 2 y + 4 z in this order


def coordinates(*shape):
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def assert_closed_manifold(verts, faces):
    """Every edge in two faces that run along it in opposite directions; every vertex in one fan; no zero area."""
    halves = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forth = halves[:, 0] * len(verts) + halves[:, 1]
    back = halves[:, 1] * len(verts) + halves[:, 0]
    assert len(forth.unique()) == len(forth)
    assert torch.equal(forth.sort().values, back.sort().values)
    # one fan per vertex: walking from face to face around each vertex visits all of its faces
    corner = {}
    for a, b, c in faces.tolist():
        corner[a, b], corner[b, c], corner[c, a] = c, a, b
    degree = torch.bincount(faces.view(-1), minlength=len(verts)).tolist()
    first = {}
    for a, b in corner:
        first.setdefault(a, b)
    for a, start in first.items():
        steps, b = 0, start
        while steps == 0 or b != start:
            b, steps = corner[a, b], steps + 1
        assert steps == degree[a]
    assert set(first) == set(range(len(verts)))
    sides = verts[faces].double()
    assert bool((torch.linalg.cross(sides[:, 1] - sides[:, 0], sides[:, 2] - sides[:, 0]).norm(dim=1) > 0).all())


def volume(verts, faces):
    a, b, c = verts[faces].double().unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


# ------------------------------------------------------------------------------------------------- the case table


def edge_of(digit):
    """Axis of an edge and the coordinates of its lower corner, from the digit's definition."""
    axis, low, high = digit >> 2, digit & 1, digit >> 1 & 1
    at = [low, high]
    return axis, [0 if a == axis else at.pop(0) for a in range(3)]


def segments_on(case, axis, side):
    """Directed boundary segments of a case's triangles on one face of the cell, in the face's own coordinates."""
    table = _table(torch.device("cpu"))
    triangles = table.triangles[table.first[case] : table.first[case] + table.size[case]].tolist()
    halves = [(t[i], t[(i + 1) % 3]) for t in triangles for i in range(3)]
    border = [h for h in halves if h[::-1] not in halves]

    def flat(digit):
        along, at = edge_of(digit)
        if along == axis or at[axis] != side:
            return None
        return along, *(at[a] for a in range(3) if a != axis)

    found = [(flat(a), flat(b)) for a, b in border]
    return {pair for pair in found if None not in pair}


def test_the_table_names_exactly_the_edges_that_change_side():
    table = _table(torch.device("cpu"))
    for case in range(256):
        used = set(table.triangles[table.first[case] : table.first[case] + table.size[case]].view(-1).tolist())
        expected = set()
        for digit in range(12):
            axis, (x, y, z) = edge_of(digit)
            low = x + 2 * y + 4 * z
            if (case >> low & 1) != (case >> (low + (1, 2, 4)[axis]) & 1):
                expected.add(digit)
        assert used == expected, case


def test_neighboring_cells_agree_on_their_shared_face_in_every_case():
    bits = {axis: [b for b in range(8) if not b >> axis & 1] for axis in range(3)}
    for axis in range(3):
        step = 1 << axis
        by_pattern: dict[tuple[int, ...], set] = {}
        for case in range(256):
            upper = tuple(case >> (b + step) & 1 for b in bits[axis])
            segments = segments_on(case, axis, 1)
            assert by_pattern.setdefault(upper, segments) == segments  # a face's segments depend on that face alone
        for case in range(256):
            lower = tuple(case >> b & 1 for b in bits[axis])
            mirrored = {(b, a) for a, b in segments_on(case, axis, 0)}
            assert by_pattern[lower] == mirrored, (axis, case)


def test_no_diagonal_lies_in_a_face_of_its_cell():
    table = _table(torch.device("cpu"))

    def sides(digit):
        along, at = edge_of(digit)
        return {(a, at[a]) for a in range(3) if a != along}

    for case in range(256):
        triangles = table.triangles[table.first[case] : table.first[case] + table.size[case]].tolist()
        halves = [(t[i], t[(i + 1) % 3]) for t in triangles for i in range(3)]
        assert len(set(halves)) == len(halves)
        for a, b in halves:
            assert bool(sides(a) & sides(b)) == ((b, a) not in halves), case


# ------------------------------------------------------------------------------------------------- marching cubes


def test_equals_pytorch3d_in_order_and_value():
    reference = np.load(DATA)
    (verts,), (faces,) = marching_cubes(
        torch.from_numpy(reference["marching_cubes_sphere/volume"])[None],
        float(reference["marching_cubes_sphere/isolevel"]),
        return_local_coords=False,
    )
    assert np.array_equal(faces.numpy(), reference["marching_cubes_sphere/faces"])
    np.testing.assert_allclose(verts.numpy(), reference["marching_cubes_sphere/verts"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [17, 32, 64, 129, 256])
def test_sphere_through_samples_is_a_closed_manifold(size):
    """Squared distances are integers, so many samples equal the level exactly."""
    radius = size // 2 - 2
    center = size // 2
    field = (coordinates(size, size, size) - center).square().sum(-1).float()
    (verts,), (faces,) = marching_cubes(field[None], float(radius**2), return_local_coords=False)
    assert bool((field == radius**2).any())
    if size <= 64:
        assert_closed_manifold(verts, faces)
    halves = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(halves) == 2 * len(halves.sort(1).values.unique(dim=0))
    assert len(verts) - len(faces) // 2 == 2  # Euler: V - E + F = V - F / 2
    # interpolating squares linearly errs by at most 1 / (8 r) of a cell
    assert float(((verts.double() - center).norm(dim=1) - radius).abs().max()) < 1 / (4 * radius)
    assert volume(verts, faces) == pytest.approx(4 / 3 * math.pi * radius**3, rel=3 / radius)


@pytest.mark.parametrize("level", [-2.0, -0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 5, 7), (13, 11, 17)])
def test_noise_gives_closed_manifolds_even_where_samples_equal_the_level(shape, level):
    noise = torch.randint(-2, 3, (2, *shape), generator=torch.Generator().manual_seed(0)).float()
    noise = torch.nn.functional.pad(noise, (1,) * 6, value=-3.0)
    for verts, faces in zip(*marching_cubes(noise, level)):
        assert len(faces)
        assert_closed_manifold(verts, faces)
        assert volume(verts, faces) < 0  # normals point to larger values, here inward


def test_orientation_points_to_larger_values():
    field = (coordinates(9, 9, 9) - 4).norm(dim=-1)  # a signed distance: smaller inside
    (verts,), (faces,) = marching_cubes(field[None], 2.5, return_local_coords=False)
    assert volume(verts, faces) > 0
    (verts,), (faces,) = marching_cubes(-field[None], -2.5, return_local_coords=False)
    assert volume(verts, faces) < 0


def test_local_coordinates_put_first_and_last_samples_at_minus_one_and_one():
    field = torch.rand(2, 5, 7, 11, generator=torch.Generator().manual_seed(0))
    local, faces = marching_cubes(field, 0.5)
    grid, same = marching_cubes(field, 0.5, return_local_coords=False)
    for a, b, f, g in zip(local, grid, faces, same):
        assert torch.equal(f, g)
        torch.testing.assert_close((a + 1) / 2 * torch.tensor([10.0, 6.0, 4.0]), b, rtol=1e-5, atol=1e-5)
        assert float(a.abs().max()) <= 1


def test_default_level_is_the_middle_of_each_volume():
    field = torch.stack([coordinates(4, 5, 6)[..., 2], 3 * coordinates(4, 5, 6)[..., 0]])
    verts, _ = marching_cubes(field, None, return_local_coords=False)
    assert set(verts[0][:, 0].tolist()) == {2.5}  # x from 0 to 5
    assert set(verts[1][:, 2].tolist()) == {1.5}  # z from 0 to 3


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 4, 5), (1, 1, 1), (3, 2, 1), (4, 4, 4)])
def test_nothing_to_extract_gives_empty_tensors(shape):
    field = torch.zeros(2, *shape, requires_grad=True)
    for level in (None, -1.0, 1.0):
        for verts, faces in zip(*marching_cubes(field, level)):
            assert verts.shape == (0, 3)
            assert faces.shape == (0, 3)
            assert verts.dtype == torch.float32
            assert faces.dtype == torch.int64
    assert marching_cubes(torch.zeros(0, 3, 3, 3), 0.5) == ([], [])


def test_vertices_are_differentiable_in_the_volume():
    field = torch.rand(1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: marching_cubes(x, 0.5)[0][0], field)


def test_half_precision_gives_float32_vertices():
    field = torch.rand(1, 4, 5, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    (verts,), (faces,) = marching_cubes(field, 0.5)
    (expected,), (same,) = marching_cubes(field.float(), 0.5)
    assert verts.dtype == torch.float32
    assert torch.equal(verts, expected)
    assert torch.equal(faces, same)


def test_non_contiguous_volumes():
    field = torch.rand(1, 5, 4, 6, generator=torch.Generator().manual_seed(3))
    turned = field.permute(0, 2, 3, 1)
    for a, b in zip(marching_cubes(turned, 0.5), marching_cubes(turned.contiguous(), 0.5)):
        assert torch.equal(a[0], b[0])


def test_bad_volumes_are_errors():
    field = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    field[1, 2, 1, 2] = math.nan
    with pytest.raises(ValueError, match=r"vol_batch must not be NaN, it is at index \(1, 2, 1, 2\)"):
        marching_cubes(field, 0.5)
    field[1, 2, 1, 2] = -math.inf
    with pytest.raises(ValueError, match=r"finite .* member 1"):
        marching_cubes(field, 0.5)
    with pytest.raises(ValueError, match="isolevel"):
        marching_cubes(field, math.nan)


# ------------------------------------------------------------------------------------------------------ isosurface


@pytest.mark.parametrize("align", ["center", "corner"])
@pytest.mark.parametrize("inside", ["above", "below"])
def test_isosurface_lies_in_world_coordinates_with_normals_outward(align, inside):
    grid = GridSpec((-1.0, -2.0, 0.5), (0.1, 0.2, 0.15), (23, 19, 29), align)
    middle = grid.to_world(torch.tensor([14.0, 9.0, 11.0], dtype=torch.float64))
    distance = (grid.points(torch.float64) - middle).norm(dim=-1)
    sign = 1 if inside == "below" else -1
    mesh = isosurface(sign * distance[None], grid, level=sign * 1.0, inside=inside)
    verts, faces = mesh.get_mesh_verts_faces(0)
    torch.testing.assert_close(
        (verts - middle).norm(dim=1), torch.ones(len(verts), dtype=torch.float64), atol=0.01, rtol=0
    )
    assert volume(verts, faces) == pytest.approx(4 / 3 * math.pi, rel=0.03)
    assert_closed_manifold(verts, faces)


@pytest.mark.parametrize("inside", ["above", "below"])
def test_surfaces_that_leave_the_grid_are_capped_at_its_outermost_samples(inside):
    grid = GridSpec.cube(5, 0.0, 4.0, align="corner")
    sign = 1.0 if inside == "above" else -1.0
    full = isosurface(torch.full((1, 5, 5, 5), sign), grid, level=0.0, inside=inside)
    verts, faces = full.get_mesh_verts_faces(0)
    assert_closed_manifold(verts, faces)
    assert volume(verts, faces) == pytest.approx(64, rel=1e-4)
    torch.testing.assert_close(full.get_bounding_boxes()[0], torch.tensor([[0.0, 4.0]] * 3), atol=1e-4, rtol=0)
    assert isosurface(torch.full((1, 5, 5, 5), sign), grid, level=0.0, inside=inside, closed=False).isempty()


def test_isosurface_of_a_batch_keeps_members_apart():
    grid = GridSpec.cube(7)
    values = torch.rand(3, 7, 7, 7, generator=torch.Generator().manual_seed(0))
    values[1] = 0
    together = isosurface(values, grid, level=0.5)
    assert together.num_faces_per_mesh()[1] == 0
    for index in range(3):
        alone = isosurface(values[index : index + 1], grid, level=0.5)
        assert torch.equal(together.verts_list()[index], alone.verts_packed())
        assert torch.equal(together.faces_list()[index], alone.faces_packed())


def test_isosurface_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(5, 5, 5\), got \(5, 5, 6\)"):
        isosurface(torch.zeros(1, 5, 5, 6), GridSpec.cube(5), level=0.5)


# ------------------------------------------------------------------------------------------------ adaptive extraction


def ellipsoid(points):
    return 1 - (points / points.new_tensor([0.45, 0.3, 0.2])).norm(dim=-1)


def two_and_a_bridge(points):
    """Two balls, and a bar between them that passes between the coarse samples."""
    left = (points - points.new_tensor([-0.4, 0.02, 0.01])).norm(dim=-1) - 0.13
    right = (points - points.new_tensor([0.4, 0.02, 0.01])).norm(dim=-1) - 0.13
    across = (points[:, 1:] - points.new_tensor([0.07, 0.06])).abs().amax(1)
    bar = torch.maximum(across - 0.03, points[:, 0].abs() - 0.4)
    return -torch.minimum(torch.minimum(left, right), bar)


@pytest.mark.parametrize("field", [ellipsoid, two_and_a_bridge])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_extraction_equals_dense_evaluation(field, steps):
    result = extract_surface(field, (-0.55, 0.55), level=0.0, resolution0=8, upsampling_steps=steps, chunk=1009)
    grid = GridSpec.cube(8 * 2**steps + 1, -0.55, 0.55, align="corner")
    dense = isosurface(field(grid.points().view(-1, 3)).view(1, *grid.shape), grid, level=0.0)
    assert torch.equal(result.mesh.faces_packed(), dense.faces_packed())
    torch.testing.assert_close(result.mesh.verts_packed(), dense.verts_packed(), rtol=0, atol=1e-6)
    assert result.evaluations <= grid.points()[..., 0].numel()
    if steps == 3:
        assert result.evaluations < 0.35 * grid.points()[..., 0].numel()


def test_extraction_counts_what_it_asks_and_keeps_to_the_chunk():
    asked = []

    def field(points):
        asked.append(len(points))
        return ellipsoid(points)

    result = extract_surface(field, (-0.55, 0.55), level=0.0, resolution0=8, upsampling_steps=2, chunk=500)
    assert sum(asked) == result.evaluations
    assert max(asked) <= 500


def test_extraction_takes_any_grid():
    grid = GridSpec((-0.7, -0.5, -0.4), (0.1, 0.08, 0.07), (12, 13, 14), "center")
    result = extract_surface(ellipsoid, grid, level=0.0, upsampling_steps=1)
    fine = GridSpec((-0.65, -0.46, -0.365), (0.05, 0.04, 0.035), (23, 25, 27), "corner")
    dense = isosurface(ellipsoid(fine.points().view(-1, 3)).view(1, *fine.shape), fine, level=0.0)
    assert torch.equal(result.mesh.faces_packed(), dense.faces_packed())
    torch.testing.assert_close(result.mesh.verts_packed(), dense.verts_packed(), rtol=0, atol=1e-6)


def test_extraction_of_a_signed_distance_that_leaves_the_box_is_closed():
    result = extract_surface(
        lambda p: p.norm(dim=-1) - 0.7, (-0.5, 0.5), level=0.0, resolution0=8, upsampling_steps=1, inside="below"
    )
    verts, faces = result.mesh.get_mesh_verts_faces(0)
    assert_closed_manifold(verts, faces)
    assert volume(verts, faces) > 0
    assert float(verts.abs().max()) < 0.5 + 1e-4


def test_extraction_of_nothing_is_an_empty_mesh():
    for value in (-1.0, 1.0):
        result = extract_surface(
            lambda p, value=value: torch.full_like(p[:, 0], value),
            (-1.0, 1.0),
            level=0.0,
            resolution0=4,
            closed=False,
            differentiable=True,
        )
        assert result.mesh.isempty()
        assert len(result.mesh) == 1
        assert result.evaluations == 125


def test_extraction_names_bad_fields_and_arguments():
    with pytest.raises(ValueError, match="one value per point"):
        extract_surface(lambda p: p, (-1.0, 1.0), level=0.0)
    with pytest.raises(ValueError, match="NaN"):
        extract_surface(lambda p: p[:, 0] * math.nan, (-1.0, 1.0), level=0.0)
    with pytest.raises(ValueError, match="upsampling_steps"):
        extract_surface(ellipsoid, (-1.0, 1.0), level=0.0, upsampling_steps=-1)
    with pytest.raises(ValueError, match="2 samples"):
        extract_surface(ellipsoid, GridSpec.cube(1), level=0.0)


def test_gradient_of_vertices_is_that_of_the_level_set():
    radius = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    center = torch.tensor([0.03, -0.02, 0.01], dtype=torch.float64, requires_grad=True)

    def field(points):
        return radius.square() - (points - center).square().sum(-1)

    result = extract_surface(
        field, (-0.55, 0.55), level=0.0, resolution0=8, upsampling_steps=2, differentiable=True, dtype=torch.float64
    )
    plain = extract_surface(field, (-0.55, 0.55), level=0.0, resolution0=8, upsampling_steps=2, dtype=torch.float64)
    verts = result.mesh.verts_packed()
    torch.testing.assert_close(verts.detach(), plain.mesh.verts_packed())
    assert not plain.mesh.verts_packed().requires_grad
    normals = torch.nn.functional.normalize(verts.detach() - center.detach(), dim=1)
    # Moving the radius moves each vertex along its normal by as much; the vertices are off the sphere by O(h^2).
    (by_radius,) = torch.autograd.grad((verts * normals).sum() / len(verts), radius, retain_graph=True)
    assert float(by_radius) == pytest.approx(1, rel=2e-3)
    (by_center,) = torch.autograd.grad((verts[7] * normals[7]).sum(), center)
    torch.testing.assert_close(by_center, normals[7], rtol=0, atol=1e-9)

    # the volume's derivative is the sphere's area: by finite differences through the whole extraction
    def measured(value):
        nonlocal radius
        radius = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        found = extract_surface(
            field,
            (-0.55, 0.55),
            level=0.0,
            resolution0=16,
            upsampling_steps=2,
            differentiable=True,
            dtype=torch.float64,
        )
        a, b, c = found.mesh.verts_packed()[found.mesh.faces_packed()].unbind(1)
        size = (a * torch.linalg.cross(b, c)).sum() / 6
        return size, radius

    size, at = measured(0.4)
    (slope,) = torch.autograd.grad(size, at)
    step = 1e-3
    difference = (measured(0.4 + step)[0].detach() - measured(0.4 - step)[0].detach()) / (2 * step)
    assert float(slope) == pytest.approx(float(difference), rel=2e-3)
