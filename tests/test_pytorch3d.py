"""With PyTorch3D installed: its objects go into every operator, its numbers come out, and signatures are the same."""

import inspect

import pytest
import torch

from vision3dgen import losses, ops, structures
from vision3dgen.io import from_pytorch3d, to_pytorch3d
from vision3dgen.ops import ico_sphere, torus
from vision3dgen.structures import Meshes, Pointclouds, join_meshes_as_batch

pytestmark = [pytest.mark.pytorch3d, pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")]
p3d_ops = pytest.importorskip("pytorch3d.ops", reason="PyTorch3D is not installed")
p3d_loss = pytest.importorskip("pytorch3d.loss", reason="PyTorch3D is not installed")
p3d_structures = pytest.importorskip("pytorch3d.structures", reason="PyTorch3D is not installed")


def shapes() -> Meshes:
    """A ragged batch of two closed meshes, made uneven."""
    generator = torch.Generator().manual_seed(0)
    members = [ico_sphere(2), torus(0.3, 0.7, 11, 17)]
    return join_meshes_as_batch(
        [m.offset_verts(0.03 * torch.randn(m.verts_packed().shape, generator=generator)) for m in members]
    )


def clouds(seed: int) -> Pointclouds:
    generator = torch.Generator().manual_seed(seed)
    return Pointclouds([torch.rand(n, 3, generator=generator) for n in (61, 83)])


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.to_dense() if result.is_sparse else result]
    if hasattr(result, "verts_packed"):
        return [result.verts_packed(), result.faces_packed()]
    if hasattr(result, "points_packed"):
        return [result.points_packed()]
    return [tensor for part in result if part is not None for tensor in flat(part)]


MAPS = torch.randn(2, 5, 13, 11, generator=torch.Generator().manual_seed(3))
MESH_CALLS = {
    "mesh_edge_loss": lambda m, s: m.mesh_edge_loss(s, 0.1),
    "mesh_laplacian_smoothing uniform": lambda m, s: m.mesh_laplacian_smoothing(s),
    "mesh_laplacian_smoothing cot": lambda m, s: m.mesh_laplacian_smoothing(s, "cot"),
    "mesh_laplacian_smoothing cotcurv": lambda m, s: m.mesh_laplacian_smoothing(s, "cotcurv"),
    "mesh_normal_consistency": lambda m, s: m.mesh_normal_consistency(s),
    "taubin_smoothing": lambda m, s: m.taubin_smoothing(s, num_iter=3),
    "vert_align": lambda m, s: m.vert_align(MAPS, s, return_packed=True),
    "vert_align padded": lambda m, s: m.vert_align([MAPS, MAPS[:, :2]], s, padding_mode="border"),
    "SubdivideMeshes": lambda m, s: m.SubdivideMeshes()(s),
    "cot_laplacian": lambda m, s: m.cot_laplacian(s.verts_packed(), s.faces_packed()),
    "laplacian": lambda m, s: m.laplacian(s.verts_packed(), s.edges_packed()),
    "norm_laplacian": lambda m, s: m.norm_laplacian(s.verts_packed(), s.edges_packed()),
}
CLOUD_CALLS = {
    "chamfer_distance": lambda m, x, y: m.chamfer_distance(x, y),
    "chamfer_distance single": lambda m, x, y: m.chamfer_distance(x, y, single_directional=True, norm=1),
    "chamfer_distance sum": lambda m, x, y: m.chamfer_distance(x, y, point_reduction="sum", batch_reduction="sum"),
    "corresponding_points_alignment": lambda m, x, y: m.corresponding_points_alignment(x, x, estimate_scale=True),
}


def home(name: str, ours: bool):
    """The module that has a function, ours or PyTorch3D's."""
    name = name.split()[0]
    return next(m for m in ((losses, ops) if ours else (p3d_loss, p3d_ops)) if hasattr(m, name))


@pytest.mark.parametrize("name", MESH_CALLS)
def test_meshes_of_both_kinds_give_pytorch3ds_numbers(name):
    call, mine = MESH_CALLS[name], shapes()
    theirs = to_pytorch3d(mine)
    expected = flat(call(home(name, ours=False), theirs))
    for given in (mine, theirs):
        found = flat(call(home(name, ours=True), given))
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mesh_edge_loss", "mesh_laplacian_smoothing uniform", "mesh_normal_consistency"])
def test_gradients_reach_pytorch3ds_vertices(name):
    mine = shapes()
    verts = [v.clone().requires_grad_() for v in mine.verts_list()]
    gradients = [
        torch.autograd.grad(MESH_CALLS[name](home(name, ours), p3d_structures.Meshes(verts, mine.faces_list())), verts)
        for ours in (True, False)
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLOUD_CALLS)
def test_clouds_of_both_kinds_give_pytorch3ds_numbers(name):
    call, x, y = CLOUD_CALLS[name], clouds(1), clouds(2)
    expected = flat(call(home(name, ours=False), to_pytorch3d(x), to_pytorch3d(y)))
    for given in ((x, y), (to_pytorch3d(x), to_pytorch3d(y))):
        found = flat(call(home(name, ours=True), *given))
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_alignment_by_turns_is_pytorch3ds_member_by_member():
    """Of a ragged batch PyTorch3D aligns the shorter clouds worse than alone: it takes padding for points."""
    x, y = clouds(1), clouds(2)
    found = ops.iterative_closest_point(to_pytorch3d(x), to_pytorch3d(y), max_iterations=3)
    for b in range(2):
        alone = p3d_ops.iterative_closest_point(to_pytorch3d(x[b]), to_pytorch3d(y[b]), max_iterations=3)
        torch.testing.assert_close(found.rmse[b : b + 1], alone.rmse, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.Xt.points_list()[b], alone.Xt.points_list()[0], rtol=1e-4, atol=1e-4)


def test_normals_are_pytorch3ds_lines():
    found, theirs = (module.estimate_pointcloud_normals(to_pytorch3d(clouds(1)), 7) for module in (ops, p3d_ops))
    cosine = (found * theirs).sum(2).abs()
    assert (cosine[0, :61] > 1 - 1e-4).all()
    assert (cosine[1] > 1 - 1e-4).all()


@pytest.mark.parametrize("name", ["point_mesh_face_distance", "point_mesh_edge_distance"])
def test_points_and_meshes(name):
    mine, cloud = shapes(), clouds(4)
    expected = getattr(p3d_loss, name)(to_pytorch3d(mine), to_pytorch3d(cloud))
    if name == "point_mesh_face_distance":  # measured to the plane of small faces too, when it is told so
        expected = p3d_loss.point_mesh_face_distance(to_pytorch3d(mine), to_pytorch3d(cloud), min_triangle_area=1e-9)
    for given in ((mine, cloud), (to_pytorch3d(mine), to_pytorch3d(cloud))):
        torch.testing.assert_close(getattr(losses, name)(*given), expected, rtol=1e-4, atol=1e-6)


def test_samples_lie_on_pytorch3ds_meshes():
    theirs = to_pytorch3d(shapes())
    points, normals = ops.sample_points_from_meshes(theirs, 500, return_normals=True, generator=torch.Generator())
    assert points.shape == normals.shape == (2, 500, 3)
    on_surface = losses.point_mesh_face_distance(theirs, p3d_structures.Pointclouds(list(points)))
    ours = losses.point_mesh_face_distance(shapes(), Pointclouds(list(points)))
    torch.testing.assert_close(on_surface, ours)
    assert ops.contains(theirs, points * 0.5).shape == (2, 500)
    assert ops.winding_number(theirs, points).shape == (2, 500)
    assert ops.signed_distance(theirs, points).shape == (2, 500)
    grid = structures.GridSpec.cube(11, -1.2, 1.2)
    assert torch.equal(ops.voxelize(theirs, grid), ops.voxelize(shapes(), grid))


def test_graph_convolution_takes_pytorch3ds_weights():
    mine = shapes()
    theirs, ours = p3d_ops.GraphConv(3, 7), ops.GraphConv(3, 7)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(
        ours(mine.verts_packed(), mine.edges_packed()), theirs(mine.verts_packed(), mine.edges_packed())
    )


@pytest.mark.parametrize("make", [shapes, lambda: clouds(5)])
def test_conversions_round_trip(make):
    one = make()
    there = to_pytorch3d(one)
    back = from_pytorch3d(there)
    for name in ("verts_list", "faces_list") if isinstance(one, Meshes) else ("points_list",):
        for a, b, c in zip(getattr(one, name)(), getattr(there, name)(), getattr(back, name)()):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


SAME_NAMES = sorted(
    name
    for name, function in (vars(ops) | vars(losses)).items()
    if not name.startswith("_") and callable(function) and (hasattr(p3d_ops, name) or hasattr(p3d_loss, name))
)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_calls_written_for_pytorch3d_are_understood(name):
    """Every argument of theirs is one of ours, in the same place and with the same default."""
    theirs = getattr(p3d_ops, name, None) or getattr(p3d_loss, name)
    ours = getattr(ops, name, None) or getattr(losses, name)
    if inspect.isclass(ours):
        theirs, ours = theirs.__init__, ours.__init__
    own, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    for index, (key, parameter) in enumerate(other.items()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        assert list(own)[index] == key, f"argument {index} is {list(own)[index]}, PyTorch3D's is {key}"
        assert own[key].default == parameter.default, key


@pytest.mark.parametrize("name", ["Meshes", "Pointclouds"])
def test_the_accessors_of_pytorch3d(name):
    """What is left out is written down: in-place twins, private state, and renderer glue."""
    theirs = {key for key in vars(getattr(p3d_structures, name)) if not key.startswith("_") and not key.endswith("_")}
    ours = set(dir(getattr(structures, name)))
    left_out = {
        "Meshes": {"sample_textures", "submeshes", "has_verts_normals"},  # of textures; normals are always there
        "Pointclouds": {"estimate_normals"},  # ops.estimate_pointcloud_normals
    }
    assert theirs - ours - left_out[name] == set()
