"""Voxelization and cubify."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import naive
from tests.test_inside import box, real
from vision3dgen.ops.inside import contains
from vision3dgen.ops.meshes import ico_sphere, torus
from vision3dgen.ops.voxels import cubify, voxelize
from vision3dgen.structures import Frame, GridSpec, Meshes, join_meshes_as_batch, join_meshes_as_scene

DATA = Path(__file__).parent / "data" / "pytorch3d_0.7.9.npz"


# ----------------------------------------------------------------------------------------------------------- solid


@pytest.mark.parametrize("inside", ["parity", "nonzero", "winding"])
@pytest.mark.parametrize(
    "low, high, count",
    [
        ((1, 1, 1), (4, 5, 6), 3 * 4 * 5),  # faces between samples
        ((1.5, 1.5, 1.5), (4.5, 5.5, 6.5), 3 * 4 * 5),  # faces on samples: lower ones held, upper ones not
        ((0, 0, 0), (7, 11, 13), 7 * 11 * 13),  # the whole grid
        ((-5, -5, -5), (20, 20, 20), 7 * 11 * 13),  # more than the grid
        ((0.6, 1, 1), (1.4, 5, 6), 0),  # between two samples
        ((30, 30, 30), (31, 31, 31), 0),  # elsewhere
    ],
)
def test_boxes_hold_exact_counts(low, high, count, inside):
    grid = GridSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (13, 11, 7))
    full = voxelize(box(low, high), grid, inside=inside)
    assert full.shape == (1, 13, 11, 7)
    assert full.dtype == torch.bool
    assert int(full.sum()) == count


def test_axes_are_z_y_x():
    grid = GridSpec((0.0, 0.0, 0.0), (1.0, 0.5, 2.0), (3, 7, 5))
    full = voxelize(box((1, 0, 4), (3, 1, 6)), grid)[0]
    expected = torch.zeros(3, 7, 5, dtype=torch.bool)
    expected[2, 0:2, 1:3] = True
    assert torch.equal(full, expected)


@pytest.mark.parametrize("align", ["center", "corner"])
def test_solid_equals_the_inside_test_at_every_sample(align):
    grid = GridSpec((-1.2, -1.1, -1.0), (0.11, 0.13, 0.07), (29, 17, 23), align)
    scene = join_meshes_as_batch([ico_sphere(2), torus(0.3, 0.7, 13, 17), ico_sphere(0)])
    points = grid.points(torch.float64).view(1, -1, 3).expand(3, -1, -1)
    for inside in ("parity", "nonzero"):
        full = voxelize(scene, grid, inside=inside)
        assert torch.equal(full.view(3, -1), contains(scene, points, method=inside))
        assert bool(full.flatten(1).any(1).all())


def test_samples_on_vertices_and_edges():
    """Vertices of the octahedron on samples: half-open counts, alike on every refinement."""
    verts = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    faces = torch.tensor([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])
    mesh = Meshes([verts], [faces])
    for n in (2, 4, 8):
        grid = GridSpec.cube(4 * n + 1, -2.0, 2.0, align="corner")
        size = grid.points(torch.float64).abs().sum(-1)
        full = voxelize(mesh, grid)[0]
        assert torch.equal(full[size != 1], (size < 1)[size != 1])


def test_volume_of_a_sphere():
    full = voxelize(ico_sphere(4), GridSpec.cube(64, -1.1, 1.1))
    assert float(full.sum()) * (2.2 / 64) ** 3 == pytest.approx(4 / 3 * np.pi, rel=0.01)


def test_overlapping_parts_and_holes():
    scene = join_meshes_as_scene([box((0, 0, 0), (4, 4, 4)), box((2, 2, 2), (6, 6, 6))])
    grid = GridSpec.cube(7, 0.0, 7.0)
    assert int(voxelize(scene, grid).sum()) == 64 + 64 - 2 * 8
    assert int(voxelize(scene, grid, inside="nonzero").sum()) == 64 + 64 - 8
    assert int(voxelize(scene, grid, inside="winding").sum()) == 64 + 64 - 8
    closed = box((0, 0, 0), (4, 4, 4))
    without_one = Meshes(closed.verts_list(), [closed.faces_list()[0][1:]])
    assert int(voxelize(without_one, grid, inside="winding").sum()) >= 60


def test_real_mesh_solid_agrees_with_winding_numbers(shared_data):
    mesh = Frame.longest_edge(real(shared_data, "spot").verts_packed()).normalize(real(shared_data, "spot"))
    grid = GridSpec.cube(32)
    assert torch.equal(voxelize(mesh, grid), voxelize(mesh, grid, inside="winding"))


# --------------------------------------------------------------------------------------------------------- surface


@pytest.mark.parametrize(
    "low, high, count",
    [
        ((1, 1, 1), (4, 5, 6), 4 * 5 * 6 - 2 * 3 * 4),  # upper faces lie in the next voxels
        ((0.5, 0.5, 0.5), (3.5, 4.5, 5.5), 4 * 5 * 6 - 2 * 3 * 4),
        ((0, 0, 0), (7, 11, 13), 7 * 11 * 13 - 5 * 9 * 11),  # the last voxels own the grid's upper sides
        ((-5, -5, -5), (20, 20, 20), 0),
    ],
)
def test_surfaces_of_boxes_pass_exact_counts(low, high, count):
    grid = GridSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (13, 11, 7))
    assert int(voxelize(box(low, high), grid, "surface").sum()) == count


@pytest.mark.parametrize("seed", range(3))
def test_surface_equals_clipping_each_triangle_by_each_voxel(seed):
    generator = torch.Generator().manual_seed(seed)
    verts = torch.rand(9, 3, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    faces = torch.randint(0, 9, (5, 3), generator=generator)  # degenerate ones too
    grid = GridSpec((0.0, 0.1, 0.0), (0.21, 0.17, 0.13), (7, 5, 3))
    full = voxelize(Meshes([verts], [faces]), grid, "surface")[0]
    half = torch.tensor(grid.spacing, dtype=torch.float64) / 2
    expected = torch.zeros(7, 5, 3, dtype=torch.bool)
    for index, center in zip(np.ndindex(7, 5, 3), grid.points(torch.float64).view(-1, 3)):
        low, high = (center - half).tolist(), (center + half).tolist()
        expected[index] = any(naive.overlaps(verts[face], low, high) for face in faces)
    assert torch.equal(full, expected)


def test_surface_of_a_closed_mesh_separates_inside_from_outside():
    mesh, grid = ico_sphere(3), GridSpec.cube(23, -1.1, 1.1)
    shell = voxelize(mesh, grid, "surface")[0]
    inner = voxelize(mesh, grid)[0] & ~shell
    outer = ~voxelize(mesh, grid)[0] & ~shell
    for axis in range(3):
        for a, b in ((inner, outer), (outer, inner)):
            assert not bool((a.narrow(axis, 0, 22) & b.narrow(axis, 1, 22)).any())


def test_empty_meshes_fill_nothing():
    meshes = Meshes(
        [torch.zeros(0, 3, dtype=torch.float64), *box((0, 0, 0), (2, 2, 2)).verts_list()],
        [torch.zeros(0, 3, dtype=torch.int64), *box((0, 0, 0), (2, 2, 2)).faces_list()],
    )
    for fill in ("solid", "surface"):
        full = voxelize(meshes, GridSpec.cube(5, 0.0, 5.0), fill)
        assert full.flatten(1).any(1).tolist() == [False, True]


def test_vertices_must_be_finite():
    with pytest.raises(ValueError, match="verts must be finite"):
        voxelize(Meshes([torch.full((3, 3), torch.nan)], [torch.tensor([[0, 1, 2]])]), GridSpec.cube(4))


# ---------------------------------------------------------------------------------------------------------- cubify


@pytest.mark.parametrize("align", ["topleft", "corner", "center"])
def test_cubify_equals_pytorch3d_in_order_and_value(align):
    reference = {
        name: np.load(DATA)[f"cubify_{align}/{name}"] for name in ("voxels", "verts", "faces", "num_verts", "num_faces")
    }
    meshes = cubify(torch.from_numpy(reference["voxels"]), 0.5, align=align)
    assert meshes.num_verts_per_mesh().tolist() == reference["num_verts"].tolist()
    assert meshes.num_faces_per_mesh().tolist() == reference["num_faces"].tolist()
    assert np.array_equal(meshes.faces_packed().numpy(), reference["faces"])
    np.testing.assert_allclose(meshes.verts_packed().numpy(), reference["verts"], rtol=1e-5, atol=1e-6)


def test_known_counts():
    assert cubify(0.2 * torch.ones(1, 2, 2, 2), 0.2).num_faces_per_mesh().tolist() == [48]  # the test is >=
    block = torch.zeros(1, 48, 48, 48)
    block[:, 12:36, 12:36, 12:36] = 1
    assert cubify(block, 0.2).num_faces_per_mesh().tolist() == [6912]


def test_cubify_equals_a_loop():
    voxels = torch.rand(3, 5, 2, 7, generator=torch.Generator().manual_seed(0))
    meshes = cubify(voxels, 0.6, align="corner")
    for index in range(3):
        corners, faces = naive.cubes(voxels[index] >= 0.6, lambda z, y, x: (x, y, z))
        found = (meshes.verts_list()[index] + 1) / 2 * torch.tensor([7.0, 2.0, 5.0])
        assert {tuple(v) for v in found.round().int().tolist()} == corners
        assert len(meshes.faces_list()[index]) == faces


def test_cubes_enclose_their_volume():
    voxels = (torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    meshes = cubify(voxels, 0.5, align="corner")
    for index in range(2):
        a, b, c = meshes.verts_list()[index][meshes.faces_list()[index]].double().unbind(1)
        volume = (a * torch.linalg.cross(b, c)).sum() / 6
        assert float(volume) == pytest.approx(float(voxels[index].sum()) * 8 / (4 * 5 * 6), rel=1e-5)


def test_mesh_to_voxels_to_mesh_to_voxels():
    grid = GridSpec.cube(17, -1.0, 1.0)
    voxels = voxelize(torus(0.3, 0.6, 13, 19), grid)
    assert torch.equal(voxelize(cubify(voxels.float(), 0.5, align="corner"), grid), voxels)


def test_features_follow_the_faces_of_their_voxel():
    voxels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    place = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (3, 4, 5)), indexing="ij"))
    meshes = cubify(voxels, 0.5, feats=place.expand(2, 3, 3, 4, 5), align="corner")
    feats = meshes.faces_attributes_packed()["feats"]
    centers = meshes.verts_packed()[meshes.faces_packed()].mean(1)
    normals = meshes.faces_normals_packed()
    step = torch.tensor([2 / 5, 2 / 4, 2 / 3])
    inside = ((centers - 0.25 * step * normals + 1) / step).floor()  # a quarter voxel under the face
    assert torch.equal(inside.flip(1), feats)


def test_empty_and_ragged_cubes():
    voxels = torch.zeros(3, 2, 3, 4)
    voxels[1, 0, 1, 2] = 1
    meshes = cubify(voxels, 0.5)
    assert meshes.num_faces_per_mesh().tolist() == [0, 12, 0]
    assert meshes.num_verts_per_mesh().tolist() == [0, 8, 0]
    assert bool(torch.isfinite(cubify(torch.ones(1, 1, 1, 1), 0.5).verts_packed()).all())
