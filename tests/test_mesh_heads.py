"""Mesh heads: published networks, the view volume, graph convolutions, losses, and what goes wrong."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.published import OUTPUTS, filled, layout, shapes_of
from vision3dgen.backbones import resnet50
from vision3dgen.convert import CONVERSIONS
from vision3dgen.datasets import collate
from vision3dgen.experiment import samples
from vision3dgen.heads import (
    GRAPH_CONVOLUTIONS,
    HEADS,
    Deformation,
    DeformationLosses,
    Frustum,
    Pixel2MeshHead,
    RefinementStage,
    SphereHead,
    SphereInitHead,
    StageLosses,
    TrueSurface,
    View,
    VoxMeshHead,
    picture_intrinsics,
    true_surface,
)
from vision3dgen.heads.refinement import project
from vision3dgen.metrics import Prediction
from vision3dgen.models import SingleView
from vision3dgen.ops import contains, ico_sphere, vert_align
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds

CHANNELS = [5, 7, 11]
SIZE = 41
K = [[2.1875, 0, 0, 0], [0, 2.1875, 0, 0], [0, 0, -1.002002, -0.2002002], [0, 0, -1, 0]]
SMALL = {
    "voxmesh": {"resolution": 8, "hidden": 13, "losses": StageLosses(normals=0.1, samples=53)},
    "sphere_init": {"level": 1, "distance": 1.4, "radius": 0.3, "hidden": 13, "losses": StageLosses(samples=53)},
    "pixel2mesh": {"level": 0, "hidden": 13, "residuals": 2, "losses": DeformationLosses(samples=53)},
    "sphere": {"level": 1, "hidden": 13, "residuals": 2, "losses": StageLosses(laplacian=0.1, samples=53)},
}


def small(name, **more):
    torch.manual_seed(0)
    head = HEADS[name](CHANNELS, **{**SMALL[name], **more})
    if name == "voxmesh":
        nn.init.zeros_(head.voxel_head.predictor.bias)  # half full, above the threshold, where a new one is empty
    return head


def maps(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(CHANNELS, (11, 6, 3))
    return [torch.rand(batch, channels, size, size, generator=generator) for channels, size in sizes]


def item(index, mesh=None, fields=("mesh",)):
    """A sphere, off the centre and of another size in the file, seen by a camera of 3D-R2N2's."""
    mesh = ico_sphere(2).scale_verts(0.5) if mesh is None else mesh
    values = {"mesh": mesh, "surface": Pointclouds([mesh.verts_packed()], [mesh.verts_normals_packed()])}
    return {
        "camera": Camera.from_r2n2(30.0 + 71 * index, 25.0, 0.8 + 0.03 * index, SIZE).to(torch.float32),
        "frame": Frame("object", (0.02, -0.03, 0.05 * index), 0.4),
        "id": f"a/b/{index}",
        **{name: values[name] for name in fields},
    }


def batch(size=3, **more):
    return collate([item(index, **more) for index in range(size)])


def view(batch):
    return View((SIZE, SIZE), batch["camera"])


# ------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("fields", [("mesh",), ("mesh", "surface")])
def test_mesh_heads_keep_the_contract(name, fields):
    head, truth = small(name), batch(fields=fields)
    prediction = head(maps(), view(truth))
    losses = head.loss(prediction, truth, torch.Generator().manual_seed(0))
    again = head.loss(prediction, truth, torch.Generator().manual_seed(0))
    assert {key: float(value.detach()) for key, value in losses.items()} == {
        key: float(value.detach()) for key, value in again.items()
    }
    assert all(torch.isfinite(value) for value in losses.values())
    losses["loss"].backward()
    assert [key for key, p in head.named_parameters() if p.grad is None] == []
    assert any(float(p.grad.abs().sum()) > 0 for p in head.parameters())
    shapes = head.shape(prediction)
    assert len(shapes) == 3
    assert not shapes.verts_packed().requires_grad
    f1 = head.validation_metrics(prediction, truth)["f1"]
    assert f1.shape == (3,)
    assert ((f1 >= 0) & (f1 <= 1)).all()
    assert (head.occupancy(prediction, torch.rand(3, 17, 3)) is None) == (name != "voxmesh")


@pytest.mark.parametrize("name", ["sphere_init", "pixel2mesh", "sphere"])
def test_fitting_brings_the_mesh_to_the_truth(name):
    more = {"level": 1} if name == "pixel2mesh" else {}
    losses = type(SMALL[name]["losses"])(samples=331)
    head, truth = small(name, losses=losses, **more), batch(fields=("surface",))
    optimizer = torch.optim.Adam(head.parameters(), lr=4e-3)
    first = last = 0.0
    for step in range(40):
        prediction = head(maps(), view(truth))
        losses = head.loss(prediction, truth, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        last = float(losses["chamfer"].detach())
        first = first or last
    assert last < 0.7 * first


# ------------------------------------------------------------------------------------------------ published networks


def published(shared_data, name):
    state = filled(layout(shared_data, name))
    state["K"] = torch.tensor(K)
    reference = np.load(shared_data / OUTPUTS / "forward.npz")
    return state, {key.partition("/")[2]: reference[key] for key in reference.files if key.startswith(f"{name}/")}


def run_published(shared_data, name, head):
    """Strictly loaded, its recorded image through it."""
    model = SingleView(resnet50(), head).eval()
    state, reference = published(shared_data, name)
    names = CONVERSIONS["meshrcnn"][0]
    renamed = {names.ours(key): value for key, value in state.items() if key != "K"}
    assert {key: list(value.shape) for key, value in renamed.items()} == shapes_of(model)
    model.load_state_dict(renamed, strict=True)
    with torch.no_grad():
        return model(torch.from_numpy(reference["image"])), reference


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


CHANNELS_50 = [256, 512, 1024, 2048]


@pytest.mark.parametrize(
    "name, build",
    [
        ("meshrcnn_voxmesh", lambda: VoxMeshHead(CHANNELS_50)),
        ("meshrcnn_sphereinit", lambda: SphereInitHead(CHANNELS_50, level=2)),
        ("meshrcnn_pixel2mesh", lambda: SphereInitHead(CHANNELS_50, level=2, subdivide=True)),
    ],
)
def test_mesh_rcnn_layouts_and_outputs_are_the_published_ones(shared_data, name, build):
    prediction, reference = run_published(shared_data, name, build())
    if prediction.voxels is not None:
        close(prediction.voxels, reference["voxel_logits"])
    for number, meshes in enumerate(prediction.stages, start=1):
        assert len(meshes.verts_packed()) == reference[f"stage{number}_num_verts"]
        assert len(meshes.faces_packed()) == reference[f"stage{number}_num_faces"]
        theirs = reference[f"stage{number}_verts"]
        ours = meshes.verts_packed()[: len(theirs)].numpy() * (1, -1, -1)  # theirs: y up, looking along -z
        close(ours, theirs)


# --------------------------------------------------------------------------------------------------- the view volume


def test_projection_agrees_with_blenders_of_r2n2():
    camera = Camera.from_r2n2(30.0, 25.0, 0.8)
    cameras = Camera.stack([camera]).to(torch.float32)
    world = torch.tensor([[[0.0, 0, 0], [0.1, 0.2, 0.3], [-0.5, 0, 0]]])
    blender = torch.tensor([[0, 0, 0.859002], [-0.416836, 0.161462, 0.820174], [-0.305100, 0.223332, 0.890311]])
    points = cameras.world_to_camera(world)
    seen = project(points, picture_intrinsics(View((137, 137), cameras), points))
    torch.testing.assert_close(seen[0] * torch.tensor([1.0, -1.0, 1.0]), blender, atol=2e-6, rtol=0)
    default = project(points, picture_intrinsics(None, points))
    torch.testing.assert_close(default, seen, atol=2e-6, rtol=0)


def test_points_behind_the_camera_are_seen_mirrored_and_finite():
    points = torch.tensor([[[0.3, 0.2, -1.0], [0.3, 0.2, 1.0], [0.1, 0.1, 0.0], [0.1, 0.1, -0.01]]])
    seen = project(points, picture_intrinsics(None, points))
    torch.testing.assert_close(seen[0, 0, :2], -seen[0, 1, :2])
    torch.testing.assert_close(seen[0, 2, :2], torch.full((2,), 2.1875))
    torch.testing.assert_close(seen[0, 3, :2], torch.full((2,), -2.1875))


def test_intrinsics_without_cameras_are_those_of_the_picture():
    like = torch.zeros(2, 1)
    wide = picture_intrinsics(View((30, 60), None), like)
    camera = Camera.look_at((0, 0, -2), field_of_view=2 * math.degrees(math.atan(1 / 2.1875)), image_size=(30, 60))
    given = picture_intrinsics(View((30, 60), Camera.stack([camera, camera])), like)
    torch.testing.assert_close(wide, given)


def test_the_volume_is_blenders_and_its_maps_are_inverse():
    frustum = Frustum(8)
    assert frustum.near == pytest.approx(0.603, abs=1e-3)
    assert frustum.far == pytest.approx(2.441, abs=1e-3)
    cameras = batch()["camera"]
    intrinsics = picture_intrinsics(View((SIZE, SIZE), cameras), cameras.translation)
    samples = frustum.grid.points(torch.float64).view(1, -1, 3).expand(3, -1, -1)
    points = frustum.to_camera(samples, intrinsics)
    torch.testing.assert_close(frustum.from_camera(points, intrinsics), samples)
    pixels = points @ cameras.intrinsics.double().mT
    torch.testing.assert_close(pixels[..., 0] / pixels[..., 2], (samples[..., 0] + 1) * SIZE / 2, atol=1e-5, rtol=0)
    device_depth = 1.002002 - 0.2002002 / points[..., 2]  # evenly spaced from 0.67 to 0.92
    torch.testing.assert_close(device_depth, 0.795 + 0.125 * samples[..., 2], atol=1e-9, rtol=0)


def inside_by_definition(frustum, truth):
    """Each sample of the volume, moved to the object frame, tested against the mesh."""
    intrinsics = picture_intrinsics(view(truth), truth["camera"].translation)
    samples = frustum.grid.points().view(1, -1, 3).expand(len(intrinsics), -1, -1)
    world = truth["camera"].camera_to_world(frustum.to_camera(samples, intrinsics))
    own = torch.stack([frame.normalize(points) for frame, points in zip(truth["frame"], world)])
    return contains(truth["mesh"], own).view(-1, *frustum.grid.shape), intrinsics


def test_voxels_of_the_volume_are_the_samples_inside_the_mesh():
    frustum, truth = Frustum(26), batch()
    expected, intrinsics = inside_by_definition(frustum, truth)
    filled = frustum.truth(truth, intrinsics)
    assert 40 < int(filled[0].sum()) < filled[0].numel() / 4
    assert int((filled != expected).sum()) <= 3  # a sample may lie on the surface


def test_voxels_of_the_volume_are_read_from_the_object_frames():
    frustum, truth = Frustum(26), batch()
    expected, intrinsics = inside_by_definition(frustum, truth)
    cells = GridSpec.cube(64).points().view(1, -1, 3).expand(3, -1, -1)
    voxels = contains(truth["mesh"], cells).view(3, 64, 64, 64)
    for values in (voxels, voxels.float()):
        filled = frustum.truth({**truth, "voxels": values}, intrinsics)
        both = (filled & expected).sum() / (filled | expected).sum()
        assert float(both) > 0.9


def test_a_mesh_around_the_camera_fills_what_of_the_volume_it_holds():
    around = item(0, mesh=ico_sphere(3).scale_verts(4.0))  # radius 1.6 in the file, the camera 1.4 from its centre
    truth = collate([around, item(1)])
    frustum = Frustum(14)
    expected, intrinsics = inside_by_definition(frustum, truth)
    filled = frustum.truth(truth, intrinsics)
    assert 0 < int(filled[0].sum()) < filled[0].numel()
    assert int((filled != expected).sum()) <= 3


def test_a_camera_that_does_not_see_the_object_has_an_empty_volume_and_a_finite_loss():
    away = item(0)
    camera = away["camera"]
    turned = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    away["camera"] = Camera(turned @ camera.rotation, turned @ camera.translation, camera.intrinsics, (SIZE, SIZE))
    truth = collate([away, item(1)])
    for name in sorted(SMALL):
        head = small(name)
        prediction = head(maps(2), view(truth))
        losses = head.loss(prediction, truth)
        losses["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in head.parameters())
        if name == "voxmesh":
            filled = head.frustum.truth(truth, prediction.intrinsics)
            assert not filled[0].any()
            assert filled[1].any()


def test_occupancy_answers_for_points_of_the_camera_frame():
    head = small("voxmesh")
    truth = batch()
    prediction = head(maps(), view(truth))
    logits = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    prediction = prediction._replace(voxels=logits)
    samples = head.frustum.grid.points().view(1, -1, 3).expand(3, -1, -1)
    points = head.frustum.to_camera(samples, prediction.intrinsics)
    assert torch.equal(head.occupancy(prediction, points).view(3, 8, 8, 8), logits.sigmoid())
    outside = torch.tensor([[[0.0, 0, -1.4], [0, 0, 0], [0, 0, 0.5], [0, 0, 4.0], [1.4, 0, 1.4]]]).expand(3, -1, -1)
    assert (head.occupancy(prediction, outside) == 0).all()


def test_cubes_stand_around_the_samples_the_truth_is_read_at():
    """With align "center" the mesh of the true voxels is the true surface to within a voxel, and not shifted."""
    truth = batch()
    shift = {}
    for align in ("topleft", "center"):
        head = small("voxmesh", resolution=26, align=align)
        intrinsics = picture_intrinsics(view(truth), maps()[-1])
        filled = head.frustum.truth(truth, intrinsics)
        cubes = head._cubify(20.0 * filled - 10, intrinsics)
        low, high = cubes.get_bounding_boxes().unbind(2)
        inside = contains(cubes, cubes.verts_padded() * 0 + ((low + high) / 2)[:, None])
        assert inside.all()
        place = head.frustum.from_camera(((low + high) / 2)[:, None], intrinsics)[:, 0]
        samples = [member.nonzero().double().mean(0).flip(0) for member in filled]
        expected = head.frustum.grid.to_world(torch.stack(samples))
        shift[align] = float((place - expected)[:, :2].mean())
    assert abs(shift["center"]) < 0.02
    assert shift["topleft"] == pytest.approx(1 / 25, abs=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "resolution must be an even number of voxels, got 7"),
        ((8, 2.0, 1.0), "near and far must be depths with 0 < near < far, got 2.0 and 1.0"),
        ((8, 0.5, 50.0), "far must be below 3.5"),
    ],
)
def test_volumes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Frustum(*arguments)


def test_missing_truths_are_named():
    truth = batch()
    frustum = Frustum(8)
    intrinsics = picture_intrinsics(None, torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"made from camera and voxels or mesh; the batch has \['camera', 'frame'"):
        frustum.truth({key: value for key, value in truth.items() if key != "mesh"}, intrinsics)
    with pytest.raises(ValueError, match=r"needs surface or mesh and camera; the batch has \['frame', 'id', 'mesh'"):
        true_surface({key: value for key, value in truth.items() if key != "camera"}, 5, "camera")
    with pytest.raises(ValueError, match="threshold must be a probability"):
        small("voxmesh", threshold=1.0)
    with pytest.raises(ValueError, match="the ellipsoid must be before the camera"):
        small("pixel2mesh", distance=0.3)
    with pytest.raises(ValueError, match="stages must be at least 1"):
        small("sphere_init", stages=0)


# ------------------------------------------------------------------------------------------------ graph convolutions


def test_torch_geometric_and_ours_agree_in_values_and_gradients():
    from torch_geometric.nn import GraphConv as Theirs

    torch.manual_seed(0)
    mesh = ico_sphere(1)
    edges = mesh.edges_packed()
    x = torch.randn(len(mesh.verts_packed()), 5, dtype=torch.float64, requires_grad=True)
    convs = {name: build(5, 7).double() for name, build in GRAPH_CONVOLUTIONS.items()}
    for parameter in convs["csr"].parameters():
        nn.init.normal_(parameter)
    convs["geometric"].load_state_dict(convs["csr"].state_dict(), strict=True)
    weight = torch.randn(len(x), 7, dtype=torch.float64)
    found = {}
    for name, conv in convs.items():
        out = conv(x, edges)
        found[name] = [out, *torch.autograd.grad((out * weight).sum(), [x, *conv.parameters()])]
    for ours, theirs in zip(found["csr"], found["geometric"]):
        torch.testing.assert_close(ours, theirs)
    layer = Theirs(5, 7).double()  # its bias does not pass along the edges
    own = convs["csr"]
    with torch.no_grad():
        own.w1.bias.zero_()
        layer.lin_rel.weight.copy_(own.w1.weight)
        layer.lin_rel.bias.copy_(own.w0.bias)
        layer.lin_root.weight.copy_(own.w0.weight)
    torch.testing.assert_close(own(x, edges), layer(x, torch.cat([edges, edges.flip(1)]).t()))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_heads_give_the_same_on_either_graph_convolution(name):
    truth = batch()
    heads = [small(name, convolution=convolution) for convolution in ("csr", "geometric")]
    for parameter in heads[0].parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    heads[1].load_state_dict(heads[0].state_dict(), strict=True)
    shapes = [head.shape(head(maps(), view(truth))) for head in heads]
    torch.testing.assert_close(shapes[0].verts_packed(), shapes[1].verts_packed())


# ------------------------------------------------------------------------------------------------------------ stages


def ragged():
    first, second = ico_sphere(1), ico_sphere(0)
    return Meshes(
        [
            first.verts_packed() * 0.2 + torch.tensor([0.1, 0, 1.3]),
            second.verts_packed()[:0],
            second.verts_packed() + 2,
        ],
        [first.faces_packed(), second.faces_packed()[:0], second.faces_packed()],
    )


def test_a_stage_samples_then_convolves_then_moves():
    """The bottleneck before the sampling is the published order, sampling before the bottleneck."""
    torch.manual_seed(0)
    stage = RefinementStage(CHANNELS, previous=3, hidden=13).double()
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.3)
    meshes = ragged()
    meshes = Meshes([v.double() for v in meshes.verts_list()], meshes.faces_list())
    features = [feature.double() for feature in maps()]
    before = torch.randn(len(meshes.verts_packed()), 3, dtype=torch.float64)
    moved, hidden = stage(features, meshes, picture_intrinsics(None, features[0]).double(), before)

    rows = []
    for index, verts in enumerate(meshes.verts_list()):
        for vertex in verts:
            depth = vertex[2].clamp(min=0.1)
            x, y, z = (2.1875 * vertex[0] / depth, 2.1875 * vertex[1] / depth, 1.002002 - 0.2002002 / depth)
            own = [feature[index : index + 1] for feature in features]
            seen = vert_align(own, torch.stack([x, y, z])[None, None])[0, 0]
            rows.append((stage.bottleneck(seen).relu(), torch.stack([x, -y, z])))
    place = torch.stack([row[1] for row in rows])
    x = torch.cat([torch.stack([row[0] for row in rows]), place, before], dim=1)
    neighbors = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, j in meshes.edges_packed().tolist():
        neighbors[i, j] = neighbors[j, i] = 1
    for conv in stage.gconvs:
        h = (conv.w0(x) + neighbors @ conv.w1(x)).relu()
        x = torch.cat([h, place], dim=1)
    offsets = stage.vert_offset(x).tanh() * torch.tensor([1.0, -1, -1], dtype=torch.float64)
    torch.testing.assert_close(hidden, h, atol=1e-6, rtol=1e-6)  # intrinsics are float32
    torch.testing.assert_close(moved.verts_packed(), meshes.verts_packed() + offsets, atol=1e-6, rtol=1e-6)


def test_a_member_does_not_see_the_others():
    head, truth = small("voxmesh", fill_empty=False), batch()
    for parameter in head.mesh_head.parameters():
        nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(head.voxel_head.predictor.weight, std=0.5)
    nn.init.constant_(head.voxel_head.predictor.bias, -1.5)
    head.eval()
    together = head.shape(head(maps(), view(truth)))
    assert len(set(together.num_verts_per_mesh().tolist())) == 3
    for index in range(3):
        camera = View((SIZE, SIZE), truth["camera"][index : index + 1])
        alone = head.shape(head([feature[index : index + 1] for feature in maps()], camera))
        torch.testing.assert_close(alone.verts_packed(), together[index].verts_packed(), atol=1e-5, rtol=1e-5)


def test_faces_are_split_between_stages():
    head = small("sphere_init", level=1, subdivide=True)
    sizes = [meshes.num_verts_per_mesh().tolist() for meshes in head(maps(2)).stages]
    assert sizes == [[42, 42], [162, 162], [642, 642]]
    published = Pixel2MeshHead(CHANNELS, hidden=5, residuals=1)
    assert [len(m.verts_packed()) for m in published(maps(1)).after] == [162, 642, 2562]


def test_a_new_head_starts_at_its_template():
    sphere = small("sphere_init").shape(small("sphere_init")(maps()))
    torch.testing.assert_close(sphere[0].verts_packed().mean(0), torch.tensor([0, 0, 1.4]), atol=1e-5, rtol=0)
    box = small("pixel2mesh", level=3).shape(small("pixel2mesh", level=3)(maps())).get_bounding_boxes()[0]
    torch.testing.assert_close(box.mean(1) * 0.57, torch.tensor([0, 0, 0.8]), atol=1e-3, rtol=0)
    torch.testing.assert_close((box[:, 1] - box[:, 0]) * 0.57 / 2, torch.tensor([0.2, 0.2, 0.4]), atol=2e-3, rtol=0)
    from vision3dgen.losses import mesh_edge_loss  # outwards, not turned inside out

    for meshes in (sphere, small("sphere").shape(small("sphere")(maps()))):
        normals = meshes.verts_normals_packed()
        center = meshes.verts_packed().view(3, -1, 3).mean(1, keepdim=True)
        outward = (meshes.verts_packed().view(3, -1, 3) - center).flatten(0, 1)
        assert ((normals * outward).sum(1) > 0).all()
        assert float(mesh_edge_loss(meshes)) > 0


# ------------------------------------------------------------------------------------------------------------ losses


def cloud(points, normals=None):
    lengths = torch.full((len(points),), points.shape[1])
    return TrueSurface(points, lengths, normals)


def test_stage_losses_are_averaged_and_weighted():
    sphere = ico_sphere(3)
    truth = cloud(sphere.verts_packed()[None].double().float(), sphere.verts_packed()[None])
    stages = [sphere.scale_verts(factor) for factor in (1.0, 1.5, 2.0)]
    weights = StageLosses(chamfer=2.0, normals=0.5, edges=0.25, laplacian=0.0, samples=997)
    losses = weights(stages, truth, torch.Generator().manual_seed(0))
    # spheres about one centre, d apart: d^2 each way, the normals the same
    assert float(losses["chamfer"]) == pytest.approx((0 + 2 * 0.5**2 + 2 * 1.0**2) / 3, rel=0.03)
    assert float(losses["normals"]) == pytest.approx(0, abs=0.02)
    side = float((sphere.verts_packed()[sphere.edges_packed()].diff(dim=1)).square().sum(2).mean())
    assert float(losses["edges"]) == pytest.approx(side * (1 + 2.25 + 4) / 3, rel=1e-5)
    total = 2 * losses["chamfer"] + 0.5 * losses["normals"] + 0.25 * losses["edges"]
    torch.testing.assert_close(losses["loss"], total)
    assert set(losses) == {"loss", "chamfer", "normals", "edges"}


def test_truths_are_moved_to_the_camera():
    truth = batch(fields=("mesh", "surface"))
    by_mesh = true_surface({key: value for key, value in truth.items() if key != "surface"}, 400, "camera")
    by_cloud = true_surface(truth, 400, "camera")
    assert by_cloud.points.shape == (3, 162, 3)  # there are no more
    for index, (frame, camera) in enumerate(zip(truth["frame"], truth["camera"])):
        center = camera.world_to_camera(torch.tensor([frame.center]))
        for own in (by_mesh, by_cloud):
            offset = own.points[index] - center
            np.testing.assert_allclose(offset.norm(dim=1), 0.2, atol=6e-3)
            assert ((offset / 0.2 * own.normals[index]).sum(1) > 0.95).all()
    own = true_surface(truth, 50, "object", torch.Generator().manual_seed(3))
    again = true_surface(truth, 50, "object", torch.Generator().manual_seed(3))
    assert own.points.shape == (3, 50, 3)
    assert torch.equal(own.points, again.points)
    np.testing.assert_allclose(own.points.norm(dim=2), 0.5, atol=1e-4)


def test_normals_without_normals_are_an_error():
    with pytest.raises(ValueError, match="needs a surface with normals"):
        StageLosses(normals=1.0, samples=5)([ico_sphere(0)], cloud(torch.zeros(1, 3, 3)))


def test_pixel2mesh_losses_are_the_sums_they_say():
    torch.manual_seed(0)
    unit = 0.57
    template = ico_sphere(0).extend(2)
    before = template.offset_verts(0.1 * torch.randn(24, 3))
    after = before.offset_verts(0.1 * torch.randn(24, 3))
    points, normals = torch.randn(2, 29, 3), nn.functional.normalize(torch.randn(2, 29, 3), dim=2)
    weights = DeformationLosses()
    for block in (0, 1):
        earlier = [before] * block
        losses = weights(Deformation([*earlier, before], [*earlier, after]), cloud(points, normals))
        if block:
            first = weights(Deformation([before], [before]), cloud(points, normals))
            losses = {name: losses[name] - first.get(name, 0) for name in losses}
        expected = dict.fromkeys(("chamfer", "edges", "normals", "laplacian", "move"), 0.0)
        for b in range(2):
            own, old = after[b].verts_packed(), before[b].verts_packed()
            distance = torch.cdist(points[b], own).square() * unit**2
            expected["chamfer"] += 3000 * (distance.amin(1).mean() + 0.55 * distance.amin(0).mean()) / 2
            edges = after[b].edges_packed().tolist()
            nearest = distance.argmin(0)
            around = {v: [j for i, j in edges if i == v] + [i for i, j in edges if j == v] for v in range(12)}
            for i, j in edges:
                side = own[i] - own[j]
                expected["edges"] += 300 * side.square().sum() * unit**2 / len(edges) / 2
                for end in (i, j):
                    turned = (side / side.norm() * normals[b, nearest[end]]).sum().abs()
                    expected["normals"] += 0.5 * turned / (2 * len(edges)) / 2
            for v in range(12):
                change = (own[v] - own[around[v]].mean(0)) - (old[v] - old[around[v]].mean(0))
                expected["laplacian"] += 1500 * (1.0 if block else 0.3) * change.square().sum() * unit**2 / 12 / 2
                expected["move"] += 100 * (own[v] - old[v]).square().sum() * unit**2 / 12 / 2
        if not block:
            del expected["move"]
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], torch.as_tensor(value), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- robustness


def empty_like(head, members):
    """Voxels of these members below the threshold everywhere."""

    class Emptied(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features):
            logits = self.inner(features)
            down = torch.zeros(len(logits), 1, 1, 1)
            down[members] = 50.0
            return logits - down

    head.voxel_head = Emptied(head.voxel_head)


@pytest.mark.parametrize("members", [[1], [0, 1, 2]])
def test_empty_meshes_lose_nothing_and_keep_the_graph(members):
    head, truth = small("voxmesh", fill_empty=False), batch()
    empty_like(head, members)
    prediction = head(maps(), view(truth))
    assert (prediction.stages[-1].num_verts_per_mesh() == 0).nonzero()[:, 0].tolist() == members
    losses = head.loss(prediction, truth)
    losses["loss"].backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert (float(losses["chamfer"].detach()) == 0) == (len(members) == 3)
    f1 = head.validation_metrics(prediction, truth)["f1"]
    assert (f1[members] == 0).all()
    shapes = head.shape(prediction)
    assert len(shapes) == 3
    assert [index for index in range(3) if not shapes.valid[index]] == members


def test_new_voxels_are_empty():
    logits = HEADS["voxmesh"](CHANNELS, resolution=8, width=5).voxel_head(maps()[-1])
    assert logits.sigmoid().max() < HEADS["voxmesh"](CHANNELS).threshold


def test_where_no_voxel_is_filled_the_middle_becomes_the_mesh():
    head, truth = small("voxmesh"), batch()
    empty_like(head, [1])
    prediction = head(maps(), view(truth))
    faces = prediction.stages[-1].num_faces_per_mesh().tolist()
    assert faces[1] == 12 * 4**2
    assert faces[0] == 12 * 8**2
    places = head.frustum.from_camera(prediction.stages[0][1].verts_padded(), prediction.intrinsics[1:2])[0]
    step = 2 / 7
    torch.testing.assert_close(places.amin(0), torch.full((3,), -1 + 2 * step), atol=1e-4, rtol=0)
    torch.testing.assert_close(places.amax(0), torch.full((3,), -1 + 6 * step), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name, message",
    [
        ("voxmesh", "vertices after mesh stage 2 must be finite"),
        ("sphere_init", "vertices after mesh stage 2 must be finite"),
        ("pixel2mesh", "vertices after block 2 must be finite"),
        ("sphere", "vertices after block 2 must be finite"),
    ],
)
def test_exploded_vertices_are_named(name, message):
    head = small(name)
    with torch.no_grad():
        if name in ("voxmesh", "sphere_init"):
            head.mesh_head.stages[1].vert_offset.bias[0] = torch.nan
        else:
            head.blocks[1].last.w0.bias[0] = torch.inf
    with pytest.raises(ValueError, match=message):
        head(maps())


def test_half_precision_features_give_full_precision_vertices():
    truth = batch()
    for name in sorted(SMALL):
        head = small(name)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = head([feature.bfloat16() for feature in maps()], view(truth))
            losses = head.loss(prediction, truth)
        assert head.shape(prediction).verts_packed().dtype == torch.float32
        losses["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_single_view_predicts_in_the_cameras_frame():
    class Maps(nn.Module):
        def forward(self, images):
            return maps(len(images))

    truth = {**batch(), "image": torch.rand(3, 3, SIZE, SIZE)}
    predictions = SingleView(Maps(), small("voxmesh")).eval().predict(truth)
    assert [prediction.frame for prediction in predictions] == [Frame("camera")] * 3
    assert all(prediction.voxels.shape == (32, 32, 32) for prediction in predictions)
    del truth["camera"]
    predictions = SingleView(Maps(), small("voxmesh")).eval().predict({**truth, "frame": [Frame("object")] * 3})
    assert [prediction.voxels for prediction in predictions] == [None] * 3  # where the object is, no one knows
    head = small("sphere")
    assert isinstance(head, SphereHead)
    assert SingleView(Maps(), head).eval().predict(truth)[2].frame == truth["frame"][2]


def test_the_viewer_is_given_shapes_in_the_object_frame():
    pictures = [{**item(index), "id": f"02691156/b/{index}", "image": torch.zeros(3, 5, 5)} for index in range(2)]

    def truth(batch):
        (own,) = batch["frame"]
        moved = batch["camera"][0].world_to_camera(own.denormalize(batch["mesh"].verts_packed()))
        cloud = Pointclouds([moved])
        shape = batch["mesh"].update_padded(moved[None]) if batch["id"][0].endswith("0") else cloud
        return [Prediction(shape=shape, frame=Frame("camera"))]

    first, second = samples(pictures, 2, {"truth": truth})
    expected = pictures[0]["mesh"].verts_packed()
    torch.testing.assert_close(first.predictions["truth"].verts_packed(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(second.predictions["truth"].points_packed(), expected, atol=1e-5, rtol=0)
