"""Mesh operators: PyTorch3D's numbers, loop twins, laws, empty members, degenerate faces, bad input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch.autograd import gradcheck, gradgradcheck

from tests import naive
from vision3dgen.ops import (
    GraphConv,
    SubdivideMeshes,
    boxtree,
    cot_laplacian,
    ico_sphere,
    laplacian,
    mesh_face_areas_normals,
    meshes,
    nearest_points,
    nearest_triangles,
    norm_laplacian,
    sample_points_from_meshes,
    sample_surface,
    taubin_smoothing,
    torus,
    vert_align,
)
from vision3dgen.structures import Meshes, Pointclouds

REFERENCE = dict(np.load(Path(__file__).parent / "data" / "pytorch3d_0.7.9.npz"))
TETRAHEDRON = (
    torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)


def reference(key):
    return torch.from_numpy(REFERENCE[key])


def assert_same(actual, expected):
    """To 1e-5 of the largest expected number."""
    scale = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def reference_meshes():
    return Meshes(
        [reference("meshes/verts0"), reference("meshes/verts1")],
        [reference("meshes/faces0"), reference("meshes/faces1")],
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_empty_members(verts, faces):
    """A batch with empty members in every position and one with vertices only."""
    none, nothing = verts[:0], faces[:0]
    return Meshes([none, verts, none, verts + 2, verts, none], [nothing, faces, nothing, faces, nothing, nothing])


# areas and normals


def test_areas_and_normals_equal_pytorch3d():
    batch = reference_meshes()
    found = mesh_face_areas_normals(batch.verts_packed(), batch.faces_packed())
    assert_same(found.areas, reference("meshes/face_areas"))
    assert_same(found.normals, reference("meshes/face_normals"))


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6])
def test_areas_and_normals_at_every_scale(scale):
    verts, faces = TETRAHEDRON
    found = mesh_face_areas_normals(verts * scale, faces)
    torch.testing.assert_close(found.areas / scale**2, torch.tensor([0.5, 0.5, 0.5, math.sqrt(3) / 2]))
    expected = torch.tensor([[0.0, 0, -1], [0, -1, 0], [-1, 0, 0], [3**-0.5] * 3])
    torch.testing.assert_close(found.normals, expected)


def test_areas_and_normals_of_degenerate_faces_are_zero_with_zero_gradient():
    verts = torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 0, 0]], requires_grad=True)
    found = mesh_face_areas_normals(verts, torch.tensor([[0, 1, 2], [0, 3, 1], [0, 0, 0]]))
    assert not found.areas.any()
    assert not found.normals.any()
    (found.areas.sum() + found.normals.sum()).backward()
    assert not verts.grad.any()
    assert mesh_face_areas_normals(verts[:0], torch.zeros(0, 3, dtype=torch.int64)).normals.shape == (0, 3)


def test_areas_and_normals_gradients_and_nan():
    verts = torch.rand(5, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    faces = torch.tensor([[0, 1, 2], [3, 1, 4]])
    assert gradcheck(lambda v: tuple(mesh_face_areas_normals(v, faces)), verts)
    with pytest.raises(ValueError, match="verts must be finite"):
        mesh_face_areas_normals(verts * torch.nan, faces)


# sampling


def test_samples_lie_where_they_say():
    batch = with_empty_members(*TETRAHEDRON)
    found = sample_surface(batch, 97, seeded())
    for i, (verts, faces) in enumerate(zip(batch.verts_list(), batch.faces_list())):
        if not len(faces):
            assert (found.faces[i] == -1).all()
            assert not any(part[i].any() for part in (found.points, found.normals, found.barycentrics))
            continue
        torch.testing.assert_close(found.barycentrics[i].sum(1), torch.ones(97))
        assert (found.barycentrics[i] >= 0).all()
        corners = verts[faces[found.faces[i]]]
        torch.testing.assert_close((found.barycentrics[i][..., None] * corners).sum(1), found.points[i])
        torch.testing.assert_close(found.normals[i], mesh_face_areas_normals(verts, faces).normals[found.faces[i]])


def test_samples_are_uniform_by_area():
    verts, faces = TETRAHEDRON
    number = 200_003
    found = sample_surface(Meshes([verts], [faces]), number, seeded())
    areas = mesh_face_areas_normals(verts, faces).areas
    share = found.faces[0].bincount(minlength=4) / number
    torch.testing.assert_close(share, areas / areas.sum(), atol=5e-3, rtol=0)
    for face in range(4):  # uniform in a triangle: barycentrics have mean 1/3 and variance 1/18
        inside = found.barycentrics[0][found.faces[0] == face]
        torch.testing.assert_close(inside.mean(0), torch.full((3,), 1 / 3), atol=5e-3, rtol=0)
        torch.testing.assert_close(inside.var(0), torch.full((3,), 1 / 18), atol=2e-3, rtol=0)


def test_samples_never_fall_on_faces_without_area():
    verts, faces = TETRAHEDRON
    flat = torch.tensor([[0, 0, 1], [1, 1, 1]])
    found = sample_surface(Meshes([verts], [torch.cat([flat, faces[:1], flat, faces[1:], flat])]), 5003, seeded())
    assert set(found.faces.unique().tolist()) == {2, 5, 6, 7}


def test_samples_of_a_mesh_do_not_depend_on_its_batch():
    batch = with_empty_members(*TETRAHEDRON)
    whole = sample_surface(batch, 13, [seeded(i) for i in range(len(batch))])
    alone = sample_surface(batch[3], 13, [seeded(3)])
    for part, own in zip(whole, alone):
        assert torch.equal(part[3:4], own)
    again = [sample_points_from_meshes(batch, 13, generator=seeded()) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match=r"one per mesh \(6\), got 2"):
        sample_surface(batch, 13, [seeded(), seeded()])


def test_sample_points_from_meshes_returns_what_is_asked():
    verts, faces = TETRAHEDRON
    plain = Meshes([verts, verts[:0]], [faces, faces[:0]])
    colored = Meshes([verts, verts[:0]], [faces, faces[:0]], verts_attributes={"colors": [verts, verts[:0]]})
    points = sample_points_from_meshes(plain, 7)
    assert points.shape == (2, 7, 3)
    points, normals = sample_points_from_meshes(plain, 7, return_normals=True)
    assert normals.shape == (2, 7, 3)
    points, normals, colors = sample_points_from_meshes(colored, 7, return_normals=True, return_textures=True)
    torch.testing.assert_close(colors, points)  # the color of a vertex is its position
    with pytest.raises(ValueError, match='needs the vertex attribute "colors"'):
        sample_points_from_meshes(plain, 7, return_textures=True)


def test_samples_pass_gradients_to_vertices():
    verts, faces = TETRAHEDRON
    verts = verts.double().requires_grad_()

    def sample(verts):
        found = sample_surface(Meshes([verts], [faces]), 5, seeded())
        return found.points, found.normals

    assert gradcheck(sample, verts)


def test_sampling_at_odd_scales_and_offsets():
    verts, faces = TETRAHEDRON
    for scale, offset in ((1e-6, 0.0), (1.0, 1e6), (1e-18, 0.0)):
        points = sample_points_from_meshes(Meshes([verts * scale + offset], [faces]), 101, generator=seeded())
        assert torch.isfinite(points).all()
        assert (points - offset).abs().max() <= max(scale, 0.1 * (offset > 0) + scale)


@pytest.mark.parametrize(
    "verts, faces, message",
    [
        (TETRAHEDRON[0] * 0, TETRAHEDRON[1], "surface of mesh 1: its faces have no area"),
        (TETRAHEDRON[0] * torch.nan, TETRAHEDRON[1], "must be finite"),
    ],
)
def test_sampling_rejects(verts, faces, message):
    with pytest.raises(ValueError, match=message):
        sample_surface(Meshes([TETRAHEDRON[0], verts], [TETRAHEDRON[1], faces]), 5)


def test_sampling_rejects_a_batch_without_faces():
    with pytest.raises(ValueError, match="none of the 2 meshes has a face"):
        sample_points_from_meshes(Meshes([torch.zeros(3, 3), torch.zeros(0, 3)], [torch.zeros(0, 3).long()] * 2))


# nearest triangles and points


@pytest.fixture(params=["whole", "pieces"])
def search(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(boxtree, "_FRONT", 7)
        monkeypatch.setattr(boxtree, "_VIEW", 20)
        monkeypatch.setattr(boxtree, "_PAIRS", 41)
    return request.param


def scattered(number, seed, stretch=1.0):
    return torch.rand(number, 3, 3, generator=seeded(seed), dtype=torch.float64) * stretch


def lengths_to(points, triangles, found):
    return (points - (found.barycentrics[..., None] * triangles[found.indices]).sum(1)).norm(dim=1)


def test_distance_to_one_triangle_equals_a_fine_grid():
    points = torch.randn(31, 3, generator=seeded(1), dtype=torch.float64)
    for triangle in scattered(7, 2).unbind(0):
        barycentrics, squared = meshes.closest_barycentrics(points, triangle.expand(31, 3, 3))
        expected = torch.tensor([naive.point_triangle(p, triangle) for p in points], dtype=torch.float64)
        torch.testing.assert_close(squared.sqrt(), expected, atol=1e-6, rtol=0)
        assert (barycentrics >= -1e-12).all()
        torch.testing.assert_close(barycentrics.sum(1), torch.ones(31, dtype=torch.float64))


@pytest.mark.parametrize("stretch", [(1.0, 1.0, 1.0), (1.0, 1.0, 1e-9), (1000.0, 1.0, 0.0)])
def test_nearest_triangles_and_points_are_the_nearest_of_all(search, stretch):
    triangles = scattered(53, 3) * torch.tensor(stretch, dtype=torch.float64)
    triangles = torch.cat([triangles, 0.01 * triangles + 0.3])  # two sizes
    points = torch.randn(61, 3, generator=seeded(4), dtype=torch.float64)
    pairs = meshes.closest_barycentrics(points[:, None].expand(61, 106, 3), triangles.expand(61, 106, 3, 3))[1].sqrt()
    to_triangle = nearest_triangles(points, triangles)
    torch.testing.assert_close(lengths_to(points, triangles, to_triangle), pairs.amin(1))
    to_point = nearest_points(triangles, points)
    place = (to_point.barycentrics[..., None] * triangles).sum(1)
    torch.testing.assert_close((points[to_point.indices] - place).norm(dim=1), pairs.amin(0))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_points_of_a_surface_are_on_it_at_every_scale(search, scale):
    sphere = ico_sphere(3).scale_verts(scale)
    triangles = sphere.verts_packed()[sphere.faces_packed()]
    points = sample_points_from_meshes(sphere, 101, generator=seeded())[0]
    assert (lengths_to(points, triangles, nearest_triangles(points, triangles)) < 1e-6 * scale).all()


def test_segments_are_triangles_with_a_corner_twice(search):
    a, b = torch.tensor([0.0, 0, 0]), torch.tensor([2.0, 0, 0])
    triangle = torch.stack([a, b, b])[None]
    points = torch.tensor([[1.0, 1, 0], [-3, 4, 0], [5, 4, 0], [2, 0, 0]])
    torch.testing.assert_close(
        lengths_to(points, triangle, nearest_triangles(points, triangle)), torch.tensor([1.0, 5, 5, 0])
    )
    point = torch.tensor([[3.0, 4, 12]])
    collapsed = torch.zeros(1, 3, 3)
    torch.testing.assert_close(lengths_to(point, collapsed, nearest_triangles(point, collapsed)), torch.tensor([13.0]))


def test_points_equally_far_from_all_of_a_surface_wait_for_each_other(monkeypatch):
    sphere = ico_sphere(3)
    points = torch.zeros(40, 3, dtype=torch.float64)
    descend, seen = boxtree._descend, []

    def counted(queries, bound, levels):
        found = descend(queries, bound, levels)
        seen.append(0 if found is None else len(found[0]))
        return found

    monkeypatch.setattr(boxtree, "_descend", counted)
    monkeypatch.setattr(boxtree, "_VIEW", 1000)
    triangles = sphere.verts_packed()[sphere.faces_packed()].double()
    found = nearest_triangles(points, triangles)
    expected = meshes.closest_barycentrics(points[:1].expand(1280, 3), triangles)[1]
    assert torch.equal(found.indices, expected.argmin().expand(40))
    assert 1280 <= max(seen) <= 4 * 1000 + 1280


def test_of_equals_the_first_is_nearest(search):
    points = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]).repeat(20, 1)
    triangles = torch.tensor([[[1.0, 1, 1], [2, 1, 1], [1, 2, 1]], [[0, 0, 0], [-1, 0, 0], [0, -1, 0]]]).repeat(9, 1, 1)
    assert torch.equal(nearest_triangles(points, triangles).indices, torch.tensor([0, 1]).repeat(40))
    assert torch.equal(nearest_points(triangles, points).indices, torch.tensor([0, 1]).repeat(9))


def test_nearest_of_nothing():
    with pytest.raises(ValueError, match="no triangle"):
        nearest_triangles(torch.zeros(2, 3), torch.zeros(0, 3, 3))
    with pytest.raises(ValueError, match="no point"):
        nearest_points(torch.zeros(2, 3, 3), torch.zeros(0, 3))
    assert nearest_triangles(torch.zeros(0, 3), torch.zeros(2, 3, 3)).indices.shape == (0,)
    assert nearest_points(torch.zeros(0, 3, 3), torch.zeros(2, 3)).barycentrics.shape == (0, 3)


# Laplacians and smoothing


def test_laplacian_is_the_mean_of_neighbors_minus_the_vertex():
    verts = torch.rand(5, 3, generator=seeded())
    edges = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 3]])  # vertex 4 is alone
    moved = laplacian(verts, edges) @ verts
    torch.testing.assert_close(moved[2], (verts[0] + verts[1] + verts[3]) / 3 - verts[2])
    assert not moved[4].any()
    batch = reference_meshes()
    ours = laplacian(batch.verts_packed(), batch.edges_packed()).to_dense()
    torch.testing.assert_close(ours, batch.laplacian_packed().to_dense())


def test_norm_laplacian_is_symmetric_with_inverse_lengths():
    verts, _ = TETRAHEDRON
    dense = norm_laplacian(verts, torch.tensor([[0, 1], [2, 3]])).to_dense()
    assert torch.equal(dense, dense.T)
    torch.testing.assert_close(dense[[0, 2], [1, 3]], torch.tensor([1, 2**-0.5]))
    assert int((dense != 0).sum()) == 4


def test_cotangent_laplacian_of_right_triangles():
    verts = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    found = cot_laplacian(verts, torch.tensor([[0, 1, 2], [3, 2, 1]]))
    expected = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]])  # the diagonal faces 90 degrees
    torch.testing.assert_close(found.L.to_dense(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.inv_areas[:, 0], torch.tensor([2.0, 1, 1, 2]))
    small = cot_laplacian(verts * 1e-6, torch.tensor([[0, 1, 2], [3, 2, 1]]))
    torch.testing.assert_close(small.L.to_dense(), expected, atol=1e-6, rtol=0)


def test_taubin_equals_pytorch3d_and_leaves_lone_vertices():
    smooth = taubin_smoothing(reference_meshes(), num_iter=int(REFERENCE["taubin/num_iter"]))
    assert_same(smooth.verts_packed(), reference("taubin/verts"))
    verts, faces = TETRAHEDRON
    lone = Meshes([torch.cat([verts, torch.full((1, 3), 7.0)]), verts[:0]], [faces, faces[:0]])
    assert torch.equal(taubin_smoothing(lone).verts_packed()[4], torch.full((3,), 7.0))
    shifted = taubin_smoothing(lone.offset_verts(torch.full((3,), 8.0))).offset_verts(torch.full((3,), -8.0))
    torch.testing.assert_close(shifted.verts_packed(), taubin_smoothing(lone).verts_packed(), atol=1e-5, rtol=0)


def test_taubin_of_coincident_vertices_is_finite():
    verts = torch.zeros(4, 3, requires_grad=True)
    smooth = taubin_smoothing(Meshes([verts], [TETRAHEDRON[1]]), num_iter=2).verts_packed()
    smooth.sum().backward()
    assert torch.isfinite(smooth).all()
    assert torch.isfinite(verts.grad).all()


# graph convolution


def load_graph_conv(**options):
    layer = GraphConv(7, 5, **options)
    layer.load_state_dict(
        {f"w{i}.{name}": reference(f"graph_conv/{letter}{i}") for i in (0, 1) for name, letter in PARAMETERS}
    )
    return layer


PARAMETERS = (("weight", "w"), ("bias", "b"))


def test_graph_conv_equals_pytorch3d():
    x = reference("graph_conv/x").requires_grad_()
    out = load_graph_conv()(x, reference("graph_conv/edges"))
    assert_same(out.detach(), reference("graph_conv/out"))
    assert_same(torch.autograd.grad(out, x, reference("graph_conv/grad_out"))[0], reference("graph_conv/grad_x"))


@pytest.mark.parametrize("directed", [False, True])
def test_graph_conv_equals_loops_with_repeated_edges_and_loops(directed):
    layer = GraphConv(3, 2, directed=directed).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=seeded()))
    x = torch.rand(7, 3, generator=seeded(1), dtype=torch.float64).requires_grad_()
    edges = torch.tensor([[0, 1], [0, 1], [4, 2], [5, 5], [6, 0]])
    expected = naive.graph_conv(x, edges, layer.w0.weight, layer.w0.bias, layer.w1.weight, layer.w1.bias, directed)
    torch.testing.assert_close(layer(x, edges), expected)
    assert gradcheck(lambda x: layer(x, edges), x)
    assert gradgradcheck(lambda x: layer(x, edges).square(), x)
    assert torch.equal(layer(x, edges), layer(x, edges.flip(0)))  # the order of edges is no matter


def test_graph_conv_without_edges_or_vertices():
    layer = GraphConv(3, 2)
    x, none = torch.rand(5, 3), torch.zeros(0, 2, dtype=torch.int64)
    torch.testing.assert_close(layer(x, none), layer.w0(x))
    empty = x[:0].requires_grad_()
    out = layer(empty, none)
    assert out.shape == (0, 2)
    out.sum().backward()
    assert empty.grad.shape == (0, 3)


def test_graph_conv_initialization_types_and_errors():
    zero, normal = GraphConv(64, 64, init="zero"), GraphConv(64, 64)
    assert not any(parameter.any() for parameter in zero.parameters())
    assert 0.009 < float(normal.w1.weight.detach().std()) < 0.011
    assert not normal.w0.bias.any()
    edges = torch.tensor([[0, 1]])
    for dtype in (torch.float64, torch.bfloat16):
        assert normal.to(dtype)(torch.rand(3, 64, dtype=dtype), edges).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normal.float()(torch.rand(3, 64), edges).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown init 'xavier'"):
        GraphConv(3, 2, init="xavier")
    with pytest.raises((ValueError, TypeCheckError), match="verts must be"):
        normal(torch.rand(3, 5), edges)


def test_grouping_is_the_same_compiled_or_not(monkeypatch):
    keys = torch.randint(0, 11, (101,), generator=seeded())
    order, starts = meshes._grouped(keys, 13)
    assert torch.equal(order, keys.argsort(stable=True))
    assert starts.tolist() == [int((keys < key).sum()) for key in range(14)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, general in zip((order, starts), meshes._grouped(keys, 13)):
        assert torch.equal(ours, general)


# vertex alignment


def test_vert_align_equals_pytorch3d():
    feats, verts = reference("vert_align/feats").requires_grad_(), reference("vert_align/verts").requires_grad_()
    out = vert_align(feats, verts)
    assert_same(out.detach(), reference("vert_align/out"))
    grads = torch.autograd.grad(out, [feats, verts], reference("vert_align/grad_out"))
    assert_same(grads[0], reference("vert_align/grad_feats"))
    assert_same(grads[1], reference("vert_align/grad_verts"))


def test_vert_align_reads_pixels_at_corners_and_packs():
    image = torch.arange(15.0).view(1, 1, 3, 5).expand(2, -1, -1, -1)
    corners = torch.tensor([[-1.0, -1, 9], [1, -1, 9], [-1, 1, 9], [1, 1, 9], [0, 0, 9]])
    batch = Meshes([corners, corners[:2]], [torch.zeros(0, 3).long()] * 2)
    padded = vert_align([image, 2 * image], batch)
    assert padded.shape == (2, 5, 2)
    assert padded[0, :, 0].tolist() == [0, 4, 10, 14, 7]
    packed = vert_align((image, 2 * image), batch, return_packed=True)
    assert torch.equal(packed, torch.cat([padded[0], padded[1, :2]]))
    assert torch.equal(vert_align(image, Pointclouds([corners, corners[:2]]), return_packed=True), packed[:, :1])
    assert vert_align(image, corners.expand(2, -1, -1), return_packed=True).shape == (10, 1)
    with pytest.raises(ValueError, match="verts must be finite"):
        vert_align(image, corners.expand(2, -1, -1) * torch.nan)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [True, False])
def test_vert_align_is_torchs_sampling_whatever_the_number_of_vertices(padding, align):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, h, w, generator=generator, dtype=torch.float64) for h, w in ((3, 5), (7, 4), (1, 2))]
    maps = [feature.requires_grad_() for feature in maps]
    for count in (1, 37):  # fewer than a map has cells, and more
        verts = (2.6 * torch.rand(2, count, 3, generator=generator, dtype=torch.float64) - 1.3).requires_grad_()
        grad = torch.randn(2, count, 9, generator=generator, dtype=torch.float64)
        ours = vert_align(maps, verts, padding_mode=padding, align_corners=align)
        planes = [
            torch.nn.functional.grid_sample(feature, verts[:, None, :, :2], "bilinear", padding, align)[:, :, 0].mT
            for feature in maps
        ]
        theirs = torch.cat(planes, dim=2)
        torch.testing.assert_close(ours, theirs)
        for own, other in zip(
            torch.autograd.grad(ours, [*maps, verts], grad), torch.autograd.grad(theirs, [*maps, verts], grad)
        ):
            torch.testing.assert_close(own, other)


# subdivision and templates


def test_subdivision_equals_pytorch3d():
    divided = SubdivideMeshes()(reference_meshes())
    assert_same(divided.verts_packed(), reference("subdivide/verts"))
    assert torch.equal(divided.faces_packed(), reference("subdivide/faces"))
    assert torch.equal(divided.num_verts_per_mesh(), reference("subdivide/num_verts"))


def test_subdivision_of_a_ragged_batch_is_that_of_its_members():
    batch = with_empty_members(*TETRAHEDRON)
    divided = SubdivideMeshes()(batch)
    for i in range(len(batch)):
        alone = SubdivideMeshes()(batch[i])
        assert torch.equal(divided[i].verts_packed(), alone.verts_packed())
        assert torch.equal(divided[i].faces_packed(), alone.faces_packed())
    areas = mesh_face_areas_normals(batch.verts_packed(), batch.faces_packed()).areas
    new = mesh_face_areas_normals(divided.verts_packed(), divided.faces_packed())
    torch.testing.assert_close(new.areas.sum(), areas.sum())


def test_subdivision_carries_features_and_attributes():
    verts, faces = TETRAHEDRON
    batch = Meshes(
        [verts, verts + 1],
        [faces, faces[:2]],
        verts_attributes={"place": [verts, verts + 1]},
        faces_attributes={"label": [torch.arange(4), torch.arange(4, 6)]},
    )
    divided, features = SubdivideMeshes()(batch, batch.verts_packed())
    assert torch.equal(features, divided.verts_packed())
    assert torch.equal(divided.verts_attributes_packed()["place"], divided.verts_packed())
    labels = divided.faces_attributes_packed()["label"]
    old = mesh_face_areas_normals(batch.verts_packed(), batch.faces_packed()).normals
    new = mesh_face_areas_normals(divided.verts_packed(), divided.faces_packed()).normals
    torch.testing.assert_close(new, old[labels])
    equal = Meshes([verts, verts + 1], [faces, faces])
    divided, features = SubdivideMeshes(equal)(equal, equal.verts_padded())
    assert torch.equal(features, divided.verts_padded())
    with pytest.raises(ValueError, match="topology of the template"):
        SubdivideMeshes(equal)(batch)
    with pytest.raises(ValueError, match="feats must have 8 rows"):
        SubdivideMeshes()(batch, torch.zeros(7, 2))


@pytest.mark.parametrize("level", range(4))
def test_ico_sphere_equals_pytorch3d(level):
    sphere = ico_sphere(level)
    assert_same(sphere.verts_packed(), reference(f"ico_sphere_{level}/verts"))
    assert torch.equal(sphere.faces_packed(), reference(f"ico_sphere_{level}/faces"))
    assert torch.equal(sphere.edges_packed(), reference(f"ico_sphere_{level}/edges"))


def test_ico_sphere_tends_to_the_sphere():
    sphere = ico_sphere(5)
    verts, faces = sphere.verts_packed().double(), sphere.faces_packed()
    a, b, c = verts[faces].unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum() / 6
    assert float(volume) == pytest.approx(4 / 3 * math.pi, rel=2e-3)
    assert float(mesh_face_areas_normals(verts, faces).areas.sum()) == pytest.approx(4 * math.pi, rel=2e-3)
    with pytest.raises(ValueError, match="level must not be negative"):
        ico_sphere(-1)


def test_torus_is_closed_and_has_the_right_area_and_volume():
    r, R = 0.7, 2.3
    mesh = torus(r, R, sides=101, rings=211, device="cpu")
    verts, faces = mesh.verts_packed().double(), mesh.faces_packed()
    assert len(verts) == 101 * 211
    assert len(verts) - len(mesh.edges_packed()) + len(faces) == 0  # Euler characteristic
    a, b, c = verts[faces].unbind(1)
    volume = float((a * torch.linalg.cross(b, c)).sum() / 6)
    assert volume == pytest.approx(2 * math.pi**2 * R * r * r, rel=2e-3)
    area = float(mesh_face_areas_normals(verts, faces).areas.sum())
    assert area == pytest.approx(4 * math.pi**2 * R * r, rel=2e-3)
    with pytest.raises(ValueError, match="R > r > 0"):
        torus(2.0, 1.0, 5, 7)
