import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.structures import (
    Camera,
    Frame,
    GridSpec,
    Meshes,
    Pointclouds,
    join_meshes_as_batch,
    join_meshes_as_scene,
    join_pointclouds_as_batch,
    join_pointclouds_as_scene,
)

TRIANGLE = torch.tensor([[0, 1, 2]])


def random_meshes(sizes, seed=0, dtype=torch.float32):
    """Meshes with the given (vertices, faces) counts, a colour per vertex and a label per face."""
    generator = torch.Generator().manual_seed(seed)
    verts = [torch.rand(v, 3, generator=generator, dtype=dtype) for v, _ in sizes]
    faces = [torch.randint(max(v, 1), (f, 3), generator=generator) for v, f in sizes]
    colors = {"color": [torch.rand(v, 2, generator=generator) for v, _ in sizes]}
    labels = {"label": [torch.randint(5, (f,), generator=generator) for _, f in sizes]}
    return Meshes(verts, faces, verts_attributes=colors, faces_attributes=labels)


def same(a: Meshes, b: Meshes) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in [
            (a.verts_packed(), b.verts_packed()),
            (a.faces_packed(), b.faces_packed()),
            (a.num_verts_per_mesh(), b.num_verts_per_mesh()),
            (a.num_faces_per_mesh(), b.num_faces_per_mesh()),
            *((a.verts_attributes_packed()[k], v) for k, v in b.verts_attributes_packed().items()),
            *((a.faces_attributes_packed()[k], v) for k, v in b.faces_attributes_packed().items()),
        ]
    )


SIZES = [(5, 7), (0, 0), (11, 3), (3, 0)]


def test_reference_topology_normals_areas(shared_data):
    reference = np.load(shared_data / "reference_outputs" / "pytorch3d_0.7.9.npz")
    verts = [torch.from_numpy(reference[f"meshes/verts{i}"]) for i in (0, 1)]
    faces = [torch.from_numpy(reference[f"meshes/faces{i}"]) for i in (0, 1)]
    meshes = Meshes(verts, faces)
    for ours, key in [
        (meshes.edges_packed(), "edges"),
        (meshes.verts_padded(), "verts_padded"),
        (meshes.faces_padded(), "faces_padded"),
    ]:
        assert np.array_equal(ours, reference[f"meshes/{key}"])
    for ours, key in [
        (meshes.verts_normals_packed(), "vertex_normals"),
        (meshes.faces_normals_packed(), "face_normals"),
        (meshes.faces_areas_packed(), "face_areas"),
    ]:
        np.testing.assert_allclose(ours, reference[f"meshes/{key}"], atol=2e-7)


def test_list_packed_padded_agree():
    meshes = random_meshes(SIZES)
    assert torch.equal(torch.cat(meshes.verts_list()), meshes.verts_packed())
    for index, (v, f) in enumerate(SIZES):
        assert torch.equal(meshes.verts_padded()[index, :v], meshes.verts_list()[index])
        assert (meshes.verts_padded()[index, v:] == 0).all()
        assert torch.equal(meshes.faces_padded()[index, :f], meshes.faces_list()[index])
        assert (meshes.faces_padded()[index, f:] == -1).all()
    offset = meshes.mesh_to_verts_packed_first_idx()[meshes.faces_packed_to_mesh_idx()][:, None]
    assert torch.equal(meshes.faces_packed() - offset, torch.cat(meshes.faces_list()))
    assert torch.equal(meshes.verts_padded().view(-1, 3)[meshes.verts_padded_to_packed_idx()], meshes.verts_packed())
    assert meshes.valid.tolist() == [True, False, True, False]
    assert not meshes.equisized
    assert not meshes.isempty()


def test_padded_input_round_trips():
    meshes = Meshes([torch.rand(5, 3), torch.rand(5, 3)], [TRIANGLE, torch.tensor([[0, 1, 2], [2, 3, 4]])])
    again = Meshes(meshes.verts_padded(), meshes.faces_padded())
    assert same(meshes, again)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=1, max_size=5), st.data())
def test_indexing_a_batch_is_a_loop_over_members(sizes, data):
    meshes = random_meshes(sizes)
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=6))
    picked = meshes[chosen]
    looped = join_meshes_as_batch([meshes[i] for i in chosen])
    assert same(picked, looped)
    assert len(picked) == len(chosen)


def test_indexing_by_slice_mask_and_negative_int():
    meshes = random_meshes(SIZES)
    assert same(meshes[1:3], meshes[[1, 2]])
    assert same(meshes[torch.tensor([True, False, True, False])], meshes[[0, 2]])
    assert same(meshes[-1], meshes[3])
    with pytest.raises(IndexError, match="out of range for a batch of 4"):
        meshes[4]


def test_extend_split_and_join():
    meshes = random_meshes(SIZES)
    assert same(meshes.extend(3), meshes[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
    assert same(join_meshes_as_batch(meshes.split([1, 2, 1])), meshes)
    scene = join_meshes_as_scene(meshes)
    assert len(scene) == 1
    assert torch.equal(scene.faces_packed(), meshes.faces_packed())
    with pytest.raises(ValueError, match="sum to the 4 meshes"):
        meshes.split([1, 2])


def test_joining_batches_with_different_attributes_is_an_error():
    plain = Meshes([torch.rand(3, 3)], [TRIANGLE])
    with pytest.raises(ValueError, match=r"meshes\[1\] has vertex and face attributes"):
        join_meshes_as_batch([plain, random_meshes([(3, 1)])])


def test_topology_is_unique_and_consistent():
    verts, faces = torch.rand(4, 3), torch.tensor([[0, 1, 2], [1, 3, 2]])
    meshes = Meshes([verts, verts], [faces, faces.flip(0)])
    edges = meshes.edges_packed()
    assert edges[:5].tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]
    assert torch.equal(edges[5:] - 4, edges[:5])
    assert meshes.num_edges_per_mesh().tolist() == [5, 5]
    assert meshes.mesh_to_edges_packed_first_idx().tolist() == [0, 5]
    for corner in range(3):  # each face's edge k is the one opposite its vertex k
        own = edges[meshes.faces_packed_to_edges_packed()[:, corner]]
        others = meshes.faces_packed()[:, [i for i in range(3) if i != corner]].sort(1).values
        assert torch.equal(own, others)


def test_normals_of_a_known_triangle_and_of_degenerate_ones():
    verts = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 3, 0], [5, 5, 5]], requires_grad=True)
    meshes = Meshes([verts], [torch.tensor([[0, 1, 2], [0, 0, 1]])])
    assert meshes.faces_normals_packed().tolist() == [[0, 0, 1], [0, 0, 0]]
    assert meshes.faces_areas_packed().tolist() == [3, 0]
    assert meshes.verts_normals_packed().tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    (meshes.faces_areas_packed().sum() + meshes.verts_normals_packed().sum()).backward()
    assert torch.isfinite(verts.grad).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_normals_do_not_depend_on_scale(scale):
    meshes = random_meshes([(7, 5)])
    small = meshes.scale_verts(scale)
    assert torch.allclose(small.faces_normals_packed(), meshes.faces_normals_packed(), atol=1e-5)
    assert torch.allclose(small.verts_normals_packed(), meshes.verts_normals_packed(), atol=1e-5)


def test_laplacian_rows():
    meshes = Meshes([torch.rand(4, 3)], [TRIANGLE])
    dense = meshes.laplacian_packed().to_dense()
    expected = torch.tensor([[-1, 0.5, 0.5, 0], [0.5, -1, 0.5, 0], [0.5, 0.5, -1, 0], [0, 0, 0, 0]])
    assert torch.equal(dense, expected)


def test_moving_scaling_and_boxes():
    meshes = random_meshes(SIZES)
    box = meshes.get_bounding_boxes()
    assert box.shape == (4, 3, 2)
    assert box[1].tolist() == [[math.inf, -math.inf]] * 3
    moved = meshes.offset_verts(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(moved.get_bounding_boxes()[0], box[0] + torch.tensor([[1.0], [2.0], [3.0]]))
    scaled = meshes.scale_verts(torch.tensor([2.0, 3.0, 5.0, 7.0]))
    assert torch.equal(scaled.verts_list()[2], meshes.verts_list()[2] * 5)
    assert torch.equal(meshes.update_padded(meshes.verts_padded() * 2).verts_packed(), meshes.verts_packed() * 2)
    with pytest.raises(ValueError, match="offsets must be"):
        meshes.offset_verts(torch.zeros(5, 3))


def test_a_cached_edge_list_never_goes_stale():
    meshes = random_meshes([(7, 5)])
    edges = meshes.edges_packed()
    moved = meshes.offset_verts(torch.ones(3))
    assert torch.equal(moved.edges_packed(), edges)
    normals = meshes.faces_normals_packed()
    stretched = meshes.update_padded(meshes.verts_padded() * torch.tensor([1.0, 2.0, 3.0]))
    assert not torch.allclose(stretched.faces_normals_packed(), normals)


def test_submeshes_keep_only_what_they_use():
    meshes = random_meshes([(7, 5), (5, 4)])
    parts = meshes.submeshes([[torch.tensor([1, 3])], [torch.tensor([0]), torch.tensor([2])]])
    assert len(parts) == 3
    ours = parts[0].verts_packed()[parts[0].faces_packed()]
    theirs = meshes[0].verts_packed()[meshes[0].faces_packed()[[1, 3]]]
    assert torch.equal(ours, theirs)
    label = meshes[1].faces_attributes_packed()["label"][2:3]
    assert torch.equal(parts[2].faces_attributes_packed()["label"], label)


def test_objects_are_immutable_and_pickle():
    meshes = random_meshes(SIZES)
    with pytest.raises(AttributeError, match="immutable"):
        meshes.verts = 1
    meshes.edges_packed()
    assert same(pickle.loads(pickle.dumps(meshes)), meshes)
    clouds = Pointclouds([torch.rand(3, 3), torch.rand(0, 3)])
    assert torch.equal(pickle.loads(pickle.dumps(clouds)).points_packed(), clouds.points_packed())
    camera = Camera.from_r2n2(30, 25, 0.8)
    assert torch.equal(pickle.loads(pickle.dumps(camera)).rotation, camera.rotation)


def test_bad_meshes_name_the_member_and_the_face():
    with pytest.raises(ValueError, match=r"mesh 1: face 1 is \[0, 1, 9\], but the mesh has 3 vertices"):
        Meshes([torch.rand(4, 3), torch.rand(3, 3)], [TRIANGLE, torch.tensor([[0, 1, 2], [0, 1, 9]])])
    with pytest.raises(ValueError, match=r"verts\[1\] must be"):
        Meshes([torch.rand(4, 3), torch.rand(4, 2)], [TRIANGLE, TRIANGLE])
    with pytest.raises(ValueError, match="as many members"):
        Meshes([torch.rand(4, 3)], [TRIANGLE, TRIANGLE])
    with pytest.raises(ValueError, match="at least one member"):
        Meshes([], [])
    with pytest.raises(ValueError, match="verts must be floating"):
        Meshes([torch.zeros(4, 3, dtype=torch.int64)], [TRIANGLE])
    with pytest.raises(ValueError, match="rows per member"):
        Meshes([torch.rand(4, 3)], [TRIANGLE], verts_attributes={"color": [torch.rand(3, 3)]})


def test_a_batch_of_only_empty_meshes_works():
    empty = Meshes([torch.zeros(0, 3)] * 2, [torch.zeros(0, 3, dtype=torch.int64)] * 2)
    assert empty.isempty()
    assert empty.edges_packed().shape == (0, 2)
    assert empty.verts_padded().shape == (2, 0, 3)
    assert empty.faces_areas_packed().shape == (0,)
    assert empty.verts_normals_packed().shape == (0, 3)
    assert len(empty.extend(2)) == 4


CLOUDS = [5, 0, 11]


def random_clouds():
    points = [torch.rand(n, 3) for n in CLOUDS]
    return Pointclouds(points, [torch.rand(n, 3) for n in CLOUDS], [torch.rand(n, 2) for n in CLOUDS])


def test_clouds_list_packed_padded_agree():
    clouds = random_clouds()
    assert clouds.num_points_per_cloud().tolist() == CLOUDS
    assert clouds.points_padded().shape == (3, 11, 3)
    assert torch.equal(clouds.points_padded().view(-1, 3)[clouds.padded_to_packed_idx()], clouds.points_packed())
    assert torch.equal(clouds.features_list()[2], clouds[2].features_packed())
    assert torch.equal(clouds[[2, 0]].normals_packed()[:11], clouds.normals_list()[2])
    assert join_pointclouds_as_scene(clouds).num_points_per_cloud().tolist() == [16]
    assert torch.equal(join_pointclouds_as_batch(clouds.split([2, 1])).points_packed(), clouds.points_packed())
    assert torch.equal(clouds.update_padded(clouds.points_padded() + 1).points_packed(), clouds.points_packed() + 1)
    assert clouds.extend(2).num_points_per_cloud().tolist() == [5, 5, 0, 0, 11, 11]
    assert torch.equal(clouds.scale(torch.tensor([1.0, 2.0, 3.0])).points_list()[2], clouds.points_list()[2] * 3)


def test_subsample_draws_without_replacement_and_repeatably():
    clouds = random_clouds()
    few = clouds.subsample(7, generator=torch.Generator().manual_seed(3))
    again = clouds.subsample(7, generator=torch.Generator().manual_seed(3))
    assert few.num_points_per_cloud().tolist() == [5, 0, 7]
    assert torch.equal(few.points_packed(), again.points_packed())
    assert len(torch.unique(few[2].points_packed(), dim=0)) == 7
    assert clouds.subsample([1, 2, 3]).num_points_per_cloud().tolist() == [1, 0, 3]


def test_clouds_with_wrong_normals_are_an_error():
    with pytest.raises(ValueError, match="normals must have"):
        Pointclouds([torch.rand(3, 3)], [torch.rand(2, 3)])
    with pytest.raises(ValueError, match="in every batch or in none"):
        join_pointclouds_as_batch([random_clouds(), Pointclouds([torch.rand(3, 3)])])


# --- cameras: the numbers are the known answers for the metadata line "30 25 0 0.8 25"


def test_r2n2_camera_known_answers():
    camera = Camera.from_r2n2(30, 25, 0.8)
    expected = [[0.5, 0, -0.866025], [0.365998, -0.906308, 0.211309], [-0.784886, -0.422618, -0.453154]]
    np.testing.assert_allclose(camera.rotation, expected, atol=1e-6)
    np.testing.assert_allclose(camera.translation, [0, 0, 1.4], atol=1e-12)
    points = torch.tensor([[0, 0, 0], [0.1, 0.2, 0.3], [-0.5, 0, 0]], dtype=torch.float64)
    pixels, depth = camera.project(points)
    np.testing.assert_allclose(pixels, [[68.5, 68.5], [39.9467, 57.4399], [47.6006, 53.2017]], atol=1e-4)
    np.testing.assert_allclose(depth, [1.4, 1.101042, 1.792443], atol=1e-6)
    local = camera.world_to_camera(points)
    np.testing.assert_allclose(local[1], [-0.209808, -0.081269, 1.101042], atol=1e-6)
    # Blender's normalized device depth of the same points, near 0.1 and far 100
    ndc = 1.002002 - 0.2002002 / depth
    np.testing.assert_allclose(ndc, [0.859002, 0.820174, 0.890311], atol=1e-6)


def random_camera(size=(37, 53)):
    camera = Camera.look_at((0.7, 0.4, 1.3), (0.1, -0.1, 0.2), field_of_view=41.0, image_size=size)
    intrinsics = camera.intrinsics.clone()
    intrinsics[0, 2] += 3.0
    intrinsics[1, 2] -= 2.0
    intrinsics[0, 0] *= 1.1
    return Camera(camera.rotation, camera.translation, intrinsics, size)


POINTS = torch.tensor([[0.1, 0.2, 0.3], [-0.2, 0.1, 0.0], [0.05, -0.3, 0.1]], dtype=torch.float64)


def test_unproject_inverts_project():
    camera = random_camera()
    pixels, depth = camera.project(POINTS)
    np.testing.assert_allclose(camera.unproject(pixels, depth), POINTS, atol=1e-12)
    np.testing.assert_allclose(camera.world_to_camera(camera.center[None]), [[0, 0, 0]], atol=1e-12)


def test_look_at_sees_its_target_in_the_middle_with_up_upwards():
    camera = Camera.look_at((2, 1, 3), (0.5, 0.5, 0.5), field_of_view=60.0, image_size=(20, 30))
    target = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.6, 0.5]], dtype=torch.float64)
    pixels, depth = camera.project(target)
    np.testing.assert_allclose(pixels[0], [15, 10], atol=1e-9)
    assert pixels[1, 1] < 10
    assert depth[0] > 0
    assert torch.det(camera.rotation) == pytest.approx(1)
    with pytest.raises(ValueError, match="parallel"):
        Camera.look_at((0, 1, 0), field_of_view=60.0, image_size=(20, 30))


def test_opengl_projects_to_the_same_pixels():
    camera = random_camera()
    view, projection = camera.to_opengl(near=0.1, far=10.0)
    homogeneous = torch.cat([POINTS, torch.ones(3, 1)], dim=1)
    clip = homogeneous @ view.T @ projection.T
    ndc = clip[:, :3] / clip[:, 3:]
    height, width = camera.image_size
    pixels = torch.stack([(ndc[:, 0] + 1) * width / 2, (1 - ndc[:, 1]) * height / 2], dim=1)
    np.testing.assert_allclose(pixels, camera.project(POINTS).pixels, atol=1e-9)
    depth = camera.project(POINTS).depth
    np.testing.assert_allclose(ndc[:, 2], (10.1 / 9.9) - 2 * 10 * 0.1 / 9.9 / depth, atol=1e-9)


@pytest.mark.parametrize("name", ["opengl", "pytorch3d", "open3d", "blender"])
def test_camera_conversions_round_trip(name):
    camera = random_camera()
    if name == "opengl":
        again = Camera.from_opengl(*camera.to_opengl(), camera.image_size)
    elif name == "blender":
        again = Camera.from_blender(camera.to_blender(), camera.intrinsics, camera.image_size)
    else:
        again = getattr(Camera, f"from_{name}")(getattr(camera, f"to_{name}")())
    np.testing.assert_allclose(again.project(POINTS).pixels, camera.project(POINTS).pixels, atol=1e-9)
    assert again.image_size == camera.image_size


def test_pytorch3d_convention_by_formula():
    # x_view = x R + T with +x left, +y up; screen: u = -f x / z + px on the flipped axes
    camera = random_camera()
    theirs = camera.to_pytorch3d()
    view = POINTS @ theirs.R + theirs.T
    pixels = theirs.principal_point - theirs.focal_length * view[:, :2] / view[:, 2:]
    np.testing.assert_allclose(pixels, camera.project(POINTS).pixels, atol=1e-9)


def test_cameras_stack_index_and_resize():
    cameras = Camera.stack([Camera.from_r2n2(a, 27, 0.7) for a in (0, 90, 200)])
    assert len(cameras) == 3
    batch = cameras.project(POINTS.expand(3, -1, -1))
    for index in range(3):
        np.testing.assert_allclose(batch.pixels[index], cameras[index].project(POINTS).pixels)
    half = cameras.resize((274, 68))
    expected = batch.pixels * torch.tensor([68 / 137, 2.0], dtype=torch.float64)
    np.testing.assert_allclose(half.project(POINTS.expand(3, -1, -1)).pixels, expected, atol=1e-9)
    with pytest.raises(ValueError, match="one image size"):
        Camera.stack([cameras[0], half[0]])


# --- frames


def test_frames_are_invertible():
    points = torch.rand(13, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 2.0]) + 7
    for build in (Frame.longest_edge, Frame.unit_diagonal, Frame.unit_ball):
        frame = build(points)
        np.testing.assert_allclose(frame.denormalize(frame.normalize(points)), points, atol=1e-12)
        assert Frame.from_dict(frame.to_dict()) == frame
    edges = Frame.longest_edge(points).normalize(points)
    assert float((edges.amax(0) - edges.amin(0)).max()) == pytest.approx(1)
    np.testing.assert_allclose(edges.amax(0), -edges.amin(0), atol=1e-12)
    ball = Frame.unit_ball(points).normalize(points)
    assert float(ball.norm(dim=1).max()) == pytest.approx(1)
    diagonal = Frame.unit_diagonal(points).normalize(points)
    assert float((diagonal.amax(0) - diagonal.amin(0)).norm()) == pytest.approx(1)


def test_frames_move_meshes_and_clouds_like_points():
    frame = Frame("object", (1.0, 2.0, 3.0), 4.0)
    meshes = random_meshes([(5, 3)])
    assert torch.allclose(frame.normalize(meshes).verts_packed(), frame.normalize(meshes.verts_packed()))
    clouds = Pointclouds([meshes.verts_packed()])
    assert torch.allclose(frame.denormalize(clouds).points_packed(), frame.denormalize(meshes.verts_packed()))


def test_different_frames_are_told_apart():
    frame = Frame("object", (1.0, 2.0, 3.0), 4.0)
    assert frame.close_to(Frame("object", (1.0, 2.0, 3.0), 4.0000001))
    assert not frame.close_to(Frame("camera", (1.0, 2.0, 3.0), 4.0))
    assert not frame.close_to(Frame("object", (1.0, 2.0, 3.1), 4.0))
    with pytest.raises(ValueError, match="scale > 0"):
        Frame("object", (0.0, 0.0, 0.0), 0.0)
    with pytest.raises(ValueError, match="must not be empty"):
        Frame.longest_edge(torch.zeros(0, 3))


# --- grids


@pytest.mark.parametrize("align", ["center", "corner"])
def test_grid_index_and_world_are_inverse(align):
    grid = GridSpec((-1.0, 0.5, 2.0), (0.1, 0.2, 0.3), (3, 5, 7), align)
    points = grid.points(torch.float64)
    assert points.shape == (3, 5, 7, 3)
    index = grid.to_index(points)
    np.testing.assert_allclose(index[2, 4, 6], [6, 4, 2], atol=1e-9)
    np.testing.assert_allclose(grid.to_world(index), points, atol=1e-9)
    shift = 0.5 if align == "center" else 0.0
    np.testing.assert_allclose(
        points[1, 2, 3], [-1 + (3 + shift) * 0.1, 0.5 + (2 + shift) * 0.2, 2 + (1 + shift) * 0.3]
    )


def test_cube_grids_cover_the_cube():
    centers = GridSpec.cube(32).points()
    assert float(centers.min()) == pytest.approx(-0.5 + 1 / 64)
    assert float(centers.max()) == pytest.approx(0.5 - 1 / 64)
    corners = GridSpec.cube(33, -0.55, 0.55, align="corner").points()
    assert float(corners.min()) == pytest.approx(-0.55)
    assert float(corners.max()) == pytest.approx(0.55)
    with pytest.raises(ValueError, match="did you mean 'center'"):
        GridSpec.cube(3, align="centre")
    with pytest.raises(ValueError, match="at least one cell"):
        GridSpec.cube(1, align="corner")


# --- checks


def test_check_shape_names_the_tensor_and_the_rule():
    assert check_shape(x=(torch.rand(2, 5, 3), "B N 3"), y=(torch.rand(2, 7, 3), "B M 3")) == {"B": 2, "N": 5, "M": 7}
    with pytest.raises(ValueError, match=r"y must be \(B M 3\) with \{'B': 2, 'N': 5\}, got \(1, 7, 3\)"):
        check_shape(x=(torch.rand(2, 5, 3), "B N 3"), y=(torch.rand(1, 7, 3), "B M 3"))


def test_check_finite_names_the_place():
    check_finite(x=torch.rand(3), i=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"x must be finite, got nan at index \(1, 0\) of \(2, 2\)"):
        check_finite(x=torch.tensor([[0.0, 1.0], [math.nan, 2.0]]))


def test_check_choice_names_the_nearest():
    check_choice("fruit", "apple", ["apple", "pear"])
    with pytest.raises(
        ValueError, match=r"unknown fruit 'aple' \(did you mean 'apple'\?\); choose from \['apple', 'pear'\]"
    ):
        check_choice("fruit", "aple", ["pear", "apple"])


def test_points_inside_boxes():
    clouds = Pointclouds([torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 0, 0]]), torch.zeros(0, 3), torch.ones(1, 3)])
    one = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    assert clouds.inside_box(one).tolist() == [True, True, False, True]
    each = torch.stack([one, one, one + 2])
    assert clouds.inside_box(each).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="must not be above"):
        clouds.inside_box(one.flip(0))
    with pytest.raises(ValueError, match=r"box must be \(2, 3\) or \(3, 2, 3\), got \(2, 2, 3\)"):
        clouds.inside_box(each[:2])
