"""Laws of the geometry operators, on clouds, meshes, grids and boxes that Hypothesis makes up: empty ones, ties,
doubles, slivers, faces of one corner, far away and tiny. A loop is the oracle where one is obvious."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests import naive
from vision3dgen.losses import chamfer_distance, earth_movers_distance, hausdorff_distance, point_mesh_face_distance
from vision3dgen.ops import (
    SubdivideMeshes,
    ball_query,
    box_iou,
    contains,
    corresponding_points_alignment,
    cubify,
    decode_rle,
    encode_rle,
    generalized_box_iou,
    isosurface,
    knn_points,
    laplacian,
    masks_to_boxes,
    mesh_face_areas_normals,
    nms,
    packed_to_padded,
    padded_to_packed,
    point_triangle_distance,
    rle_areas,
    rle_boxes,
    rle_iou,
    sample_farthest_points,
    sample_points_from_meshes,
    taubin_smoothing,
    voxelize,
    winding_number,
)
from vision3dgen.structures import GridSpec, Meshes, Pointclouds

law = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCALES = st.sampled_from([1e-6, 1.0, 1e6])


@st.composite
def points(draw, least=0, most=9, dimensions=3):
    """Points (N, D) in float64: on a coarse lattice, so that ties and doubles are common, or anywhere in a cube."""
    count = draw(st.integers(least, most))
    if draw(st.booleans()):
        rows = draw(arrays.arrays(np.int64, (count, dimensions), elements=st.integers(-2, 2))) / 4
    else:
        rows = draw(arrays.arrays(np.float64, (count, dimensions), elements=st.floats(-1, 1, width=32)))
    return torch.tensor(rows * draw(SCALES), dtype=torch.float64).view(count, dimensions)


@st.composite
def meshes(draw, least=1):
    """Vertices (V, 3), and faces (F, 3) of any of them: corners may coincide and edges have any number of faces."""
    verts = draw(points(least=3))
    rows = draw(st.lists(st.tuples(*[st.integers(0, len(verts) - 1)] * 3), min_size=least, max_size=8))
    return verts, torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def grids(dtype, elements):
    return arrays.arrays(dtype, st.tuples(*[st.integers(1, 4)] * 3), elements=elements)


@st.composite
def boxes(draw, most=8):
    """Boxes (N, 4) as two corners, of area zero now and then."""
    count = draw(st.integers(0, most))
    rows = draw(arrays.arrays(np.int64, (count, 4), elements=st.integers(0, 6)))
    low, high = np.minimum(rows[:, :2], rows[:, 2:]), np.maximum(rows[:, :2], rows[:, 2:])
    return torch.tensor(np.concatenate([low, high], 1), dtype=torch.float64).view(count, 4)


def size_of(*tensors):
    """The largest absolute coordinate, which rounding is relative to."""
    return max([float(t.abs().max()) for t in tensors if t.numel()], default=0.0)


def padded(clouds):
    """(B, N, 3) with zeros, and the lengths."""
    lengths = torch.tensor([len(cloud) for cloud in clouds])
    return torch.nn.utils.rnn.pad_sequence(clouds, batch_first=True), lengths


# ------------------------------------------------------------------------------------------------------------ clouds


@law
@given(x=points(), y=points(), K=st.integers(1, 5), norm=st.sampled_from([1, 2]))
def test_nearest_neighbors_are_those_of_a_loop(x, y, K, norm):
    if not len(x) or not len(y):
        return
    found = knn_points(x[None], y[None], K=K, norm=norm)
    expected, _ = naive.knn(x, y, K, norm)
    least = min(K, len(y))
    torch.testing.assert_close(found.dists[0], expected, rtol=1e-9, atol=1e-12 * size_of(x, y) ** norm)
    assert (found.idx[0, :, :least] >= 0).all()
    assert (found.idx[0, :, :least] < len(y)).all()
    for row in found.idx[0, :, :least].tolist():
        assert len(set(row)) == least  # nobody is a neighbor twice


@law
@given(x=points(least=1), y=points(least=1), K=st.integers(1, 4), radius=st.sampled_from([0.1, 0.5, 2.0]))
def test_a_ball_holds_the_first_within_its_radius(x, y, K, radius):
    radius *= max(size_of(x, y), 1e-9)
    gaps = (x[:, None] - y).square().sum(-1).sqrt()
    if ((gaps - radius).abs() < 1e-9 * radius).any():
        return  # on the sphere, rounding decides
    found = ball_query(x[None], y[None], K=K, radius=radius)
    assert found.idx[0].tolist() == naive.ball(x, y, K, radius).tolist()


@law
@given(cloud=points(least=1), K=st.integers(1, 6))
def test_farthest_points_cover_the_cloud(cloud, K):
    """Each is no nearer to those before it than any later one to all of them."""
    _, chosen = sample_farthest_points(cloud[None], K=K)
    order = [index for index in chosen[0].tolist() if index >= 0]
    assert len(order) == min(K, len(cloud))
    assert len({tuple(row) for row in cloud[order].tolist()}) == min(K, len(cloud.unique(dim=0)))
    gaps = [float((cloud[order[:i]] - cloud[order[i]]).square().sum(1).min()) for i in range(1, len(order))]
    slack = 1e-12 * size_of(cloud) ** 2
    assert all(first + slack >= second for first, second in pairwise(gaps))


@law
@given(data=st.data())
def test_chamfer_is_symmetric_and_a_batch_is_its_members(data):
    pairs = [(data.draw(points()), data.draw(points())) for _ in range(data.draw(st.integers(1, 3)))]
    (x, x_lengths), (y, y_lengths) = padded([a for a, _ in pairs]), padded([b for _, b in pairs])
    given_ = {"x_lengths": x_lengths, "y_lengths": y_lengths, "batch_reduction": None}
    there = chamfer_distance(x, y, **given_).loss
    back = chamfer_distance(y, x, x_lengths=y_lengths, y_lengths=x_lengths, batch_reduction=None).loss
    scale = size_of(x, y) ** 2
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12 * scale)
    for value, (a, b) in zip(there.tolist(), pairs):
        if len(a) and len(b):
            assert value == pytest.approx(naive.chamfer(a, b), rel=1e-9, abs=1e-12 * scale)
        else:
            assert value == 0
    same = chamfer_distance(x, x.flip(1) if bool((x_lengths == x.shape[1]).all()) else x, x_lengths, x_lengths)
    assert float(same.loss) == pytest.approx(0, abs=1e-12 * scale)


@law
@given(x=points(least=1, most=6), data=st.data())
def test_earth_movers_distance_is_the_least_of_all_pairings(x, data):
    y = data.draw(points(least=len(x), most=len(x)))
    exact = float(earth_movers_distance(x[None], y[None], method="exact").distance)
    scale = size_of(x, y)
    order = data.draw(st.permutations(range(len(x))))
    assert exact <= float((x - y[list(order)]).norm(dim=1).mean()) + 1e-9 * scale
    assert exact >= float((x.mean(0) - y.mean(0)).norm()) - 1e-9 * scale  # no less than the means move
    assert exact == pytest.approx(float(earth_movers_distance(y[None], x[None]).distance), rel=1e-9, abs=1e-9 * scale)
    near = naive.chamfer(x, y) / 2
    assert float(hausdorff_distance(x[None], y[None])) ** 2 >= near - 1e-9 * scale**2


@law
@given(cloud=points(least=4), turn=arrays.arrays(np.float64, 3, elements=st.floats(-3, 3)), data=st.data())
def test_alignment_undoes_a_similarity(cloud, turn, data):
    centered = cloud - cloud.mean(0)
    spread = torch.linalg.svdvals(centered)
    if float(spread[2]) <= 1e-2 * float(spread[0]):
        return  # flat: more than one rotation does
    rotation = torch.linalg.matrix_exp(
        torch.tensor([[0, -turn[2], turn[1]], [turn[2], 0, -turn[0]], [-turn[1], turn[0], 0]])
    )
    scale, shift = data.draw(st.sampled_from([0.25, 1.0, 3.0])), size_of(cloud) * torch.tensor([[1.0, -2, 3]]).double()
    moved = scale * cloud @ rotation + shift
    found = corresponding_points_alignment(cloud[None], moved[None], estimate_scale=True)
    torch.testing.assert_close(found.R[0], rotation, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.s, torch.tensor([scale]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.T, shift, rtol=0, atol=1e-6 * max(size_of(moved), 1e-300))


@law
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4), width=st.integers(1, 3))
def test_packed_and_padded_hold_the_same(sizes, width):
    starts = torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()])
    packed = torch.arange(1.0, sum(sizes) * width + 1).view(sum(sizes), width)
    wide = packed_to_padded(packed, starts, max(sizes))
    assert padded_to_packed(wide, starts, sum(sizes)).tolist() == packed.tolist()
    assert float(wide.sum()) == float(packed.sum())  # the rest is zeros
    clouds = Pointclouds([torch.ones(size, 3) for size in sizes])
    assert clouds.num_points_per_cloud().tolist() == sizes
    assert clouds.points_padded().shape == (len(sizes), max(sizes), 3)


# ------------------------------------------------------------------------------------------------------------ meshes


@law
@given(mesh=meshes())
def test_areas_and_normals_follow_the_corners(mesh):
    verts, faces = mesh
    found = mesh_face_areas_normals(verts, faces)
    a, b, c = verts[faces].unbind(1)
    expected = torch.linalg.cross(b - a, c - a).norm(dim=1) / 2
    size = size_of(verts) ** 2
    torch.testing.assert_close(found.areas, expected, rtol=1e-6, atol=1e-12 * size)
    lengths = found.normals.norm(dim=1)
    assert (((lengths - 1).abs() < 1e-9) | (lengths == 0)).all()
    for axis in ((a - b), (b - c)):
        assert float((found.normals * axis).sum(1).abs().max()) <= 1e-6 * max(size_of(verts), 1e-300)
    flipped = mesh_face_areas_normals(verts, faces.flip(1))
    torch.testing.assert_close(flipped.areas, found.areas, rtol=1e-9, atol=1e-12 * size)
    torch.testing.assert_close(flipped.normals, -found.normals, rtol=0, atol=1e-6)


@law
@given(mesh=meshes(), count=st.integers(1, 20))
def test_samples_lie_on_the_surface(mesh, count):
    verts, faces = mesh
    shape = Meshes([verts], [faces])
    if float(mesh_face_areas_normals(verts, faces).areas.sum()) == 0:
        return
    found, normals = sample_points_from_meshes(shape, count, True, generator=torch.Generator().manual_seed(0))
    gaps = point_triangle_distance(found[0][:, None].expand(-1, len(faces), 3), verts[faces].expand(count, -1, 3, 3))
    assert float(gaps.min(1).values.max()) <= 1e-6 * size_of(verts)
    lengths = normals.norm(dim=-1)
    assert ((lengths - 1).abs() < 1e-6).all()


@law
@given(mesh=meshes(), cloud=points(least=1, most=4))
def test_distance_to_a_triangle_is_that_of_a_search(mesh, cloud):
    verts, faces = mesh
    scale = size_of(verts, cloud)
    if scale == 0:
        return
    triangles, place = verts[faces[:1]] / scale, cloud[:1] / scale
    found = float(point_triangle_distance(place, triangles)[0])
    assert found == pytest.approx(naive.point_triangle(place[0], triangles[0]), abs=1e-3)
    corners = (triangles[0] - place).norm(dim=1).min()
    assert 0 <= found <= float(corners) + 1e-12
    whole = point_mesh_face_distance(Meshes([verts], [faces]), Pointclouds([cloud]))
    assert math.isfinite(float(whole))
    assert float(whole) >= 0


@law
@given(mesh=meshes())
def test_dividing_a_mesh_keeps_its_area(mesh):
    verts, faces = mesh
    fine = SubdivideMeshes()(Meshes([verts], [faces]))
    assert len(fine.faces_packed()) == 4 * len(faces)
    before, after = (mesh_face_areas_normals(*pair).areas.sum() for pair in (mesh, fine.get_mesh_verts_faces(0)))
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-12 * size_of(verts) ** 2)
    assert torch.isfinite(taubin_smoothing(Meshes([verts], [faces])).verts_packed()).all()


@law
@given(mesh=meshes())
def test_rows_of_the_laplacian_sum_to_zero(mesh):
    verts, faces = mesh
    edges = Meshes([verts], [faces]).edges_packed()
    edges = edges[edges[:, 0] != edges[:, 1]]  # those of a face with a corner twice
    matrix = laplacian(verts, edges).to_dense()
    neighbors = torch.zeros(len(verts)).double().index_add(0, edges.flatten(), torch.ones(edges.numel()).double())
    torch.testing.assert_close(matrix.diagonal(), torch.where(neighbors > 0, -1.0, matrix.diagonal()))
    torch.testing.assert_close(matrix.sum(1)[neighbors > 0], torch.zeros(int((neighbors > 0).sum())).double())
    assert ((matrix != 0) == (matrix.T != 0)).all()


# ------------------------------------------------------------------------------------------------------------- grids


def edge_uses(faces):
    """How often each directed edge occurs, less how often the other way round: 0 everywhere for a closed surface."""
    counts: dict[tuple[int, int], int] = {}
    for a, b, c in faces.tolist():
        for edge in ((a, b), (b, c), (c, a)):
            key = (min(edge), max(edge))
            counts[key] = counts.get(key, 0) + (1 if edge[0] < edge[1] else -1)
    return counts


@law
@given(filled=grids(np.bool_, st.booleans()), align=st.sampled_from(["topleft", "corner", "center"]))
def test_cubes_are_closed_and_hold_their_voxels(filled, align):
    mesh = cubify(torch.tensor(filled)[None].double(), 0.5, align=align)
    verts, faces = mesh.get_mesh_verts_faces(0)
    assert set(edge_uses(faces).values()) <= {0}
    corners, squares = naive.cubes(torch.tensor(filled), lambda *place: place)
    assert len(faces) == squares
    assert len(verts) == len(corners)
    a, b, c = verts[faces].unbind(1)
    volume = float((a * torch.linalg.cross(b, c)).sum()) / 6
    cells = [2 / (n if align == "corner" else max(n - 1, 1)) for n in filled.shape]
    assert abs(volume) == pytest.approx(filled.sum() * math.prod(cells), rel=1e-5, abs=1e-6)


@law
@given(values=grids(np.float64, st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0])))
def test_surfaces_of_any_field_are_closed(values):
    """Values equal to the level and at the border of the grid included; the surface tells the samples apart."""
    grid = GridSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), values.shape, align="corner")
    mesh = isosurface(torch.tensor(values)[None], grid, level=0.0)
    verts, faces = mesh.get_mesh_verts_faces(0)
    assert set(edge_uses(faces).values()) <= {0}
    assert bool(len(faces)) == bool((values >= 0).any())
    if not len(faces):
        return
    z, y, x = np.meshgrid(*(np.arange(n) for n in values.shape), indexing="ij")
    places = torch.tensor(np.stack([x, y, z], -1).reshape(-1, 3), dtype=verts.dtype)
    clear = torch.tensor(values.reshape(-1) != 0)
    inside = winding_number(mesh, places[None])[0] > 0.5
    assert (inside == torch.tensor(values.reshape(-1) > 0))[clear].all()


@law
@given(filled=st.integers(2, 4).flatmap(lambda n: arrays.arrays(np.bool_, (n, n, n), elements=st.booleans())))
def test_solid_voxels_of_cubes_are_the_voxels(filled):
    """Through a mesh and back, by all three ways to tell the inside."""
    shape = filled.shape
    mesh = cubify(torch.tensor(filled)[None].float(), 0.5, align="corner")
    grid = GridSpec.cube(shape[0], -1.0, 1.0)
    z, y, x = np.nonzero(np.ones(shape))
    centers = torch.tensor(np.stack([x, y, z], 1) * 2 + 1, dtype=torch.float32) / shape[0] - 1
    for method in ("parity", "nonzero", "winding"):
        assert voxelize(mesh, grid, "solid", inside=method)[0].tolist() == filled.tolist(), method
        assert contains(mesh, centers[None], method=method)[0].tolist() == filled.reshape(-1).tolist(), method


# ------------------------------------------------------------------------------------------------- boxes and masks


@law
@given(first=boxes(), second=boxes())
def test_overlaps_are_shares_and_symmetric(first, second):
    iou, generalized = box_iou(first, second), generalized_box_iou(first, second)
    for row, a in enumerate(first.tolist()):
        for column, b in enumerate(second.tolist()):
            expected = naive.box_overlap(a, b)
            assert float(iou[row, column]) == pytest.approx(expected[0], abs=1e-9)
            assert float(generalized[row, column]) == pytest.approx(expected[1], abs=1e-9)
    assert torch.equal(iou, box_iou(second, first).T)


@law
@given(found=boxes(), threshold=st.sampled_from([0.0, 0.3, 0.5, 0.9]), data=st.data())
def test_what_is_suppressed_overlaps_something_better(found, threshold, data):
    scores = torch.tensor([data.draw(st.sampled_from([0.1, 0.5, 0.9])) for _ in found], dtype=torch.float64)
    kept = nms(found, scores, threshold)
    assert kept.tolist() == naive.nms(found, scores, threshold)


@law
@given(masks=arrays.arrays(np.bool_, st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5))))
def test_masks_come_back_from_their_runs(masks):
    masks = torch.tensor(masks)
    rles = encode_rle(masks)
    assert torch.equal(decode_rle(rles, tuple(masks.shape[1:])), masks)
    assert rle_areas(rles).tolist() == masks.flatten(1).sum(1).tolist()
    both = (masks[:, None] & masks).flatten(2).sum(2).double()
    either = (masks[:, None] | masks).flatten(2).sum(2).double()
    np.testing.assert_allclose(rle_iou(rles, rles), (both / either.clamp(min=1)).numpy(), atol=1e-12)
    for mask, box, (left, top, right, bottom) in zip(masks, masks_to_boxes(masks).tolist(), rle_boxes(rles).tolist()):
        if mask.any():
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert (left, top) == (float(columns.min()), float(rows.min()))
            assert (right - 1, bottom - 1) == (float(columns.max()), float(rows.max()))
            assert box[:2] == [left, top]
