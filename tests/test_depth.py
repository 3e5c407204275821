"""Depth and normals: geometry of pictures against analytic surfaces, the heads, and training that gets somewhere."""

import math

import numpy as np
import pytest
import torch
from kornia.geometry.depth import depth_to_normals

from vision3dgen.backbones.resnet import BasicBlock, ResNet
from vision3dgen.experiment import build_parts
from vision3dgen.heads import DEPTH_LOSSES, HEADS, DepthHead, NormalsHead, SkipDecoder, View
from vision3dgen.heads.depth import FORMS
from vision3dgen.metrics import normal_errors
from vision3dgen.models import MODELS, MeanDepth, SingleView
from vision3dgen.ops import (
    depth_to_mesh,
    depth_to_pointclouds,
    depth_to_points,
    ico_sphere,
    normals_from_depth,
    rasterize,
)
from vision3dgen.structures import Camera, Frame

HEIGHT, WIDTH = 61, 83


def cameras(height=HEIGHT, width=WIDTH, dtype=torch.float64):
    """Two cameras with different intrinsics, looking at 0 from different places."""
    first = Camera.look_at((0.3, 0.4, 2.6), field_of_view=45, image_size=(height, width))
    second = Camera.look_at((-2.0, 0.9, -1.2), field_of_view=60, image_size=(height, width))
    skewed = second.intrinsics.clone()
    skewed[0, 0] *= 1.1
    skewed[0, 1] = 0.7
    return Camera.stack([first, Camera(second.rotation, second.translation, skewed, (height, width))]).to(dtype)


def sphere_depth(camera, radius=0.5):
    """Analytic depth and outward normals (camera axes) of a ball at 0, at pixel centers; 0 where nothing is seen."""
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], dim=-1).double() @ torch.linalg.inv(camera.intrinsics).T
    center = camera.translation  # of the ball, in camera axes
    a, b, c = rays.square().sum(-1), rays @ center, center.square().sum() - radius**2
    root = b.square() - a * c
    depth = torch.where(root > 0, (b - root.clamp(min=0).sqrt()) / a, 0.0)
    normals = torch.where((root > 0)[..., None], (rays * depth[..., None] - center) / radius, 0.0)
    return depth[None], normals.permute(2, 0, 1)


def sphere_batch():
    pairs = [sphere_depth(camera) for camera in cameras()]
    return torch.stack([depth for depth, _ in pairs]), torch.stack([normals for _, normals in pairs])


def plane_depth(camera, normal, distance):
    """Depth of the plane n . x = distance (camera axes) at every pixel."""
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], dim=-1).double() @ torch.linalg.inv(camera.intrinsics).T
    return (distance / (rays @ normal))[None]


# ---------------------------------------------------------------------------------------------------- operators


def test_points_project_to_the_pixels_they_came_from():
    depth = 1 + torch.rand(2, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    world = depth_to_points(depth, cameras(), frame="world")
    pixels, again = cameras().project(world.flatten(1, 2))
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    torch.testing.assert_close(pixels.view(2, HEIGHT, WIDTH, 2), torch.stack([u, v], -1).double().expand(2, -1, -1, -1))
    torch.testing.assert_close(again.view(2, 1, HEIGHT, WIDTH), depth)
    local = depth_to_points(depth, cameras())
    torch.testing.assert_close(local[..., 2], depth[:, 0])
    torch.testing.assert_close(local.flatten(1, 2), cameras().world_to_camera(world.flatten(1, 2)))


def test_points_of_a_ball_lie_on_it():
    depth, _ = sphere_batch()
    clouds = depth_to_pointclouds(depth, cameras(), frame="world")
    assert clouds.num_points_per_cloud().tolist() == (depth > 0).sum((1, 2, 3)).tolist()
    torch.testing.assert_close(clouds.points_packed().norm(dim=1), torch.full_like(clouds.points_packed()[:, 0], 0.5))
    colors = torch.rand(2, 3, HEIGHT, WIDTH)
    mask = torch.zeros(2, 1, HEIGHT, WIDTH)
    mask[:, :, : HEIGHT // 2] = 1
    upper = depth_to_pointclouds(depth, cameras(), mask, features=colors)
    kept = (depth[1, 0] > 0) & (mask[1, 0] > 0)
    assert torch.equal(upper[1].features_packed(), colors[1, :, kept].T)


def test_a_mesh_of_depth_is_the_visible_surface():
    depth, _ = sphere_batch()
    meshes = depth_to_mesh(depth, cameras(), frame="world")
    assert meshes.valid.all()
    verts = meshes.verts_packed()
    torch.testing.assert_close(verts.norm(dim=1), torch.full_like(verts[:, 0], 0.5))
    middle = verts[meshes.faces_packed()].mean(1)
    assert (meshes.faces_normals_packed() * middle).sum(1).min() > 0  # faces look outward
    for mesh, camera in zip(meshes, cameras()):
        towards = camera.center - mesh.verts_packed()[mesh.faces_packed()].mean(1)
        assert (mesh.faces_normals_packed() * towards).sum(1).min() > 0
        # as seen from the camera it covers the ball but for its rim, and no other pixel
        cover = rasterize(mesh.to("cpu"), camera).mask[0] > 0
        seen = sphere_depth(camera)[0][0] > 0
        assert not (cover & ~seen).any()
        assert (cover & seen).sum() > 0.85 * seen.sum()


def test_no_triangle_spans_a_jump_or_a_hole():
    depth = torch.full((1, 1, 8, 10), 2.0)
    depth[..., 5:] = 2.2  # ten percent farther
    depth[..., 2, 2] = 0
    depth[..., 6, 7] = torch.nan
    one = cameras(8, 10, torch.float32)[:1]
    mesh = depth_to_mesh(depth, one)
    z = mesh.verts_packed()[:, 2][mesh.faces_packed()]
    assert (z.amax(1) == z.amin(1)).all()
    assert sorted(z[:, 0].unique().tolist()) == pytest.approx([2.0, 2.2])
    # squares: 7 x 4 and 7 x 4; around each hole four squares lose one of two triangles
    assert mesh.num_faces_per_mesh().tolist() == [2 * (28 + 28) - 2 * 4]
    assert depth_to_mesh(depth, one, max_jump=0.11).num_faces_per_mesh().tolist() == [2 * 63 - 2 * 4]
    assert len(depth_to_mesh(depth, one, torch.zeros_like(depth)).verts_packed()) == 0


def test_a_ragged_batch_of_meshes_is_its_members():
    depth, _ = sphere_batch()
    depth = torch.cat([depth, torch.zeros_like(depth[:1])])
    three = Camera.stack([*cameras(), cameras()[0]])
    together = depth_to_mesh(depth, three)
    assert together.num_faces_per_mesh()[2] == 0
    for index in range(2):
        alone = depth_to_mesh(depth[index : index + 1], three[index : index + 1])
        torch.testing.assert_close(together[index].verts_packed(), alone.verts_packed())
        assert torch.equal(together[index].faces_packed(), alone.faces_packed())


def test_normals_of_planes_are_exact():
    one = cameras()[:1]
    for values in ((0.0, 0.0, -1.0), (0.4, -0.3, -1.0), (-0.7, 0.1, -1.0)):
        normal = torch.tensor(values, dtype=torch.float64)
        normal = normal / normal.norm()
        depth = plane_depth(one[0], normal, float(normal[2]) * 2)
        assert (depth > 0).all()
        found = normals_from_depth(depth[None], one, max_jump=1.0)
        torch.testing.assert_close(found[0].permute(1, 2, 0), normal.expand(HEIGHT, WIDTH, 3))


def test_normals_from_depth_agree_with_a_ball_with_the_renderer_and_with_kornia():
    depth, normals = sphere_batch()
    found = normals_from_depth(depth, cameras())
    valid = found.abs().sum(1, keepdim=True) > 0
    assert valid.sum() > 0.98 * (depth > 0).sum()
    assert not (valid & ~(depth > 0)).any()
    errors = normal_errors(found, normals, valid)
    assert errors.mean.max() < 1.5  # degrees; what is left is the rim
    assert errors.median.max() < 0.5

    drawn = rasterize(ico_sphere(4).scale_verts(0.5).extend(2), cameras())
    again = normals_from_depth(drawn.depth[:, None], cameras())
    seen = again.abs().sum(1, keepdim=True) > 0
    assert normal_errors(again, drawn.normals.permute(0, 3, 1, 2), seen).mean.max() < 3

    # Away from borders kornia finds the opposite of ours; its pixel centers are integers.
    moved = cameras().intrinsics.clone()
    moved[:, :2, 2] -= 0.5
    theirs = -depth_to_normals(depth, moved)
    inner = torch.nn.functional.max_pool2d((depth == 0).double(), 5, 1, 2) == 0
    assert inner.sum() > 500
    assert normal_errors(theirs, found, inner).mean.max() < 0.5


def test_normals_do_not_look_over_a_jump():
    depth = torch.full((1, 1, 9, 12), 2.0)
    depth[..., 6:] = 3.0
    found = normals_from_depth(depth, cameras(9, 12, torch.float32)[:1])
    torch.testing.assert_close(found, torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand(1, 3, 9, 12))
    lonely = torch.zeros(1, 1, 5, 7)
    lonely[..., 2, 3] = 1.0
    lonely[..., 2, 4] = 1.0  # two in a row have no column
    assert (normals_from_depth(lonely, cameras(5, 7, torch.float32)[:1]) == 0).all()


def test_gradients_go_to_the_depth():
    generator = torch.Generator().manual_seed(0)
    depth = (2 + 0.02 * torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    small = cameras(3, 4)
    for function in (depth_to_points, normals_from_depth):
        assert torch.autograd.gradcheck(lambda x, function=function: function(x, small), depth)
    assert torch.autograd.gradcheck(lambda x: depth_to_mesh(x, small).verts_packed(), depth)


def test_pictures_and_cameras_must_fit():
    depth = torch.ones(2, 1, 5, 7)
    with pytest.raises(ValueError, match=r"needs 2 cameras of 5 x 7 pixels, got \(2,\) of 61 x 83: Camera.resize"):
        depth_to_points(depth, cameras())
    with pytest.raises(ValueError, match=r"needs 2 cameras of 5 x 7 pixels, got \(1,\)"):
        depth_to_points(depth, cameras(5, 7)[:1])
    with pytest.raises(ValueError, match="max_jump must be at least 0"):
        depth_to_mesh(depth, cameras(5, 7), max_jump=-0.1)


# -------------------------------------------------------------------------------------------------------- heads


def features(channels, strides, height, width, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, -(-height // s), -(-width // s), generator=generator) for c, s in zip(channels, strides)
    ]


@pytest.mark.parametrize("name", ["bed_of_nails", "nearest", "bilinear", "bicubic", "transposed"])
@pytest.mark.parametrize(
    "channels, strides",
    [([5, 7, 11], [4, 8, 16]), ([5, 7, 11], [1, 2, 4]), ([13, 13], [14, 14]), ([3], [6]), ([5, 7, 11], [2, 4, 4])],
)
def test_the_decoder_gives_the_size_asked_for(name, channels, strides):
    torch.manual_seed(0)
    decoder = SkipDecoder(channels, strides, width=3, name=name)
    for height, width in ((43, 31), (28, 42)):
        maps = [m.requires_grad_() for m in features(channels, strides, height, width)]
        out = decoder(maps, (height, width))
        assert out.shape == (2, 3, height, width)
        out.square().sum().backward()
        assert all(m.grad.abs().sum() > 0 for m in maps)  # every map is used
    assert all(p.grad is not None for p in decoder.parameters())


def test_maps_smaller_than_their_strides_say_are_brought_to_size():
    decoder = SkipDecoder([3, 5], [2, 4], width=3)
    maps = [torch.rand(2, 3, 12, 9), torch.rand(2, 5, 4, 3)]  # as of convolutions without padding
    assert decoder(maps, (28, 22)).shape == (2, 3, 28, 22)


def test_a_decoder_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"each stride must be a multiple of the one before, got \[4, 6\]"):
        SkipDecoder([3, 5], [4, 6])
    with pytest.raises(ValueError, match="one each for every map"):
        SkipDecoder([3, 5], [4])
    with pytest.raises(ValueError, match="needs a map at every scale"):
        SkipDecoder([3, 5], [4, 8], name="max_unpooling")
    with pytest.raises(ValueError, match="unknown upsampling 'bilinaer'"):
        SkipDecoder([3, 5], [4, 8], name="bilinaer")


def depth_head(**settings):
    torch.manual_seed(0)
    return DepthHead([5, 7], [2, 4], **{"max_depth": 4.0, "min_depth": 0.5, "width": 3, **settings})


def depth_batch(height=22, width=18, batch=2):
    generator = torch.Generator().manual_seed(1)
    depth = 0.6 + 3 * torch.rand(batch, 1, height, width, generator=generator)
    depth[:, :, :5] = 0
    many = Camera.stack([cameras(height, width, torch.float32)[0]] * batch)
    return {"depth": depth, "camera": many, "normals": torch.randn(batch, 3, height, width, generator=generator)}


@pytest.mark.parametrize("name", ["depth", "normals"])
def test_every_picture_head_keeps_the_contract(name):
    torch.manual_seed(0)
    head = HEADS[name]([5, 7], [2, 4], width=3, **({"max_depth": 4.0} if name == "depth" else {}))
    batch = depth_batch()
    view = View((22, 18), batch["camera"])
    maps = features([5, 7], [2, 4], 22, 18)
    prediction = head(maps, view)
    losses = head.loss(prediction, batch)
    losses["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())
    pictures = head.maps(prediction)
    assert pictures[name].shape == batch[name].shape
    assert head.frame == "camera"
    assert head.threshold is None
    assert head.occupancy(prediction, torch.rand(2, 5, 3)) is None
    assert len(head.shape(prediction)) == 2
    measured = head.validation_metrics(prediction, batch)
    assert measured
    assert all(value.shape == (2,) and value.isfinite().all() for value in measured.values())
    with pytest.raises(ValueError, match=f"the {name} head needs a view"):
        head(maps)
    with pytest.raises(ValueError, match="both must have the size of the image"):
        head.loss(prediction, {key: batch[key][..., :17] for key in ("depth", "normals")})


@pytest.mark.parametrize("form", sorted(FORMS))
def test_depth_stays_between_its_bounds(form):
    head = depth_head(form=form)
    for bias, expected in ((-50.0, None), (0.0, None), (50.0, None)):
        torch.nn.init.zeros_(head.last.weight)
        torch.nn.init.constant_(head.last.bias, bias)
        depth = head(features([5, 7], [2, 4], 22, 18), View((22, 18))).depth
        share = 1 / (1 + math.exp(-bias))
        expected = {
            "linear": 0.5 + 3.5 * share,
            "log": 0.5 * 8**share,
            "inverse": 1 / (1 / 4 + (2 - 1 / 4) * share),
        }[form]
        np.testing.assert_allclose(depth.detach(), np.full((2, 1, 22, 18), expected), rtol=1e-5)


@pytest.mark.parametrize("name", [*sorted(DEPTH_LOSSES), "virtual_normals"])
def test_every_objective_is_zero_for_the_truth_and_falls_towards_it(name):
    head, batch = depth_head(objective=name), depth_batch()
    view = View((22, 18), batch["camera"])
    prediction = head(features([5, 7], [2, 4], 22, 18), view)
    loss = head.loss(prediction, batch)["loss"]
    assert loss > 0.01
    loss.backward()
    assert head.last.weight.grad.abs().sum() > 0
    truth = prediction._replace(depth=batch["depth"].where(batch["depth"] > 0, 1.0))
    assert float(head.loss(truth, batch)["loss"]) == pytest.approx(0, abs=1e-3)
    nothing = head.loss(head(features([5, 7], [2, 4], 22, 18), view), batch | {"depth": 0 * batch["depth"]})["loss"]
    assert nothing == 0
    nothing.backward()


def test_several_objectives_are_a_weighted_sum():
    weights = {"silog": 0.5, "gradient_matching": 2.0}
    head, batch = depth_head(objective=weights, foreground=3.0), depth_batch()
    terms = head.loss(head(features([5, 7], [2, 4], 22, 18), View((22, 18))), batch)
    expected = 0.5 * terms["silog"] + 2 * terms["gradient_matching"] + 3 * terms["foreground"]
    torch.testing.assert_close(terms["loss"], expected)


def test_the_foreground_is_where_there_is_depth_or_the_mask():
    head, batch = depth_head(foreground=1.0), depth_batch()
    prediction = head(features([5, 7], [2, 4], 22, 18), View((22, 18), batch["camera"]))
    sure = 40 * (2 * (batch["depth"] > 0).float() - 1)
    known = prediction._replace(logits=sure)
    assert float(head.loss(known, batch)["foreground"]) < 1e-6
    assert float(head.loss(known, batch | {"mask": (batch["depth"] == 0).float()})["foreground"]) > 10
    assert head.validation_metrics(known, batch)["mask_iou"].tolist() == [1, 1]
    assert torch.equal(head.maps(known)["mask"], sure.sigmoid())
    assert (head.maps(known)["depth"] > 0).all()  # of every pixel


def test_the_shape_of_a_depth_head_is_the_foreground_seen_by_the_camera():
    depth, _ = sphere_batch()
    head = depth_head(foreground=1.0)
    view = View((HEIGHT, WIDTH), cameras(dtype=torch.float32))
    prediction = head(features([5, 7], [2, 4], HEIGHT, WIDTH), view)
    filled = depth.where(depth > 0, 3.9).float()
    known = prediction._replace(depth=filled, logits=20 * (2 * (depth > 0).float() - 1))
    meshes = head.shape(known)
    world = cameras(dtype=torch.float32)
    for mesh, camera in zip(meshes, world):
        radius = camera.camera_to_world(mesh.verts_packed()).norm(dim=1)
        torch.testing.assert_close(radius, torch.full_like(radius, 0.5), atol=1e-4, rtol=0)
    assert head.shape(known._replace(cameras=None)).isempty()  # nothing is known of where the pixels look
    assert len(head.shape(known._replace(cameras=None))) == 2


def test_virtual_normals_without_a_camera_are_an_error():
    head, batch = depth_head(objective="virtual_normals"), depth_batch()
    with pytest.raises(ValueError, match="needs the batch's camera"):
        head.loss(head(features([5, 7], [2, 4], 22, 18), View((22, 18))), batch)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_depth": 0.0}, "min_depth must be above 0"),
        ({"min_depth": 5.0}, "below max_depth, got 5.0 and 4.0"),
        ({"objective": "silgo"}, "unknown objective 'silgo' .did you mean 'silog'"),
        ({"objective": {}}, "at least one loss"),
        ({"foreground": -1.0}, "weight of at least 0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        depth_head(**settings)


def test_single_view_predicts_depth_in_the_cameras_frame():
    node = {"name": "single_view", "backbone": {"name": "resnet18"}}
    node["head"] = {"name": "depth", "max_depth": 4.0, "width": 4, "foreground": 1.0}
    model = build_parts(node, MODELS).eval()
    batch = depth_batch(64, 32) | {"image": torch.rand(2, 3, 64, 32)}
    predictions = model.predict(batch)
    assert [p.frame for p in predictions] == [Frame("camera")] * 2
    assert predictions[0].maps["depth"].shape == (1, 64, 32)
    assert predictions[0].maps["mask"].shape == (1, 64, 32)
    assert set(model.validation_metrics(batch)) == {"loss", "abs_rel", "rmse", "delta1", "mask_iou"}


def test_the_mean_depth_is_that_of_the_pixels_seen():
    depth = torch.zeros(4, 1, 2, 3)
    depth[:3, 0, 0, 0] = torch.tensor([1.0, 2.0, 6.0])
    depth[3, 0, 1, 2] = 3.0
    found = MeanDepth([{"depth": depth[:1]}, {"depth": depth[1:]}]).predict({"id": ["a", "b"]})
    assert len(found) == 2
    expected = torch.full((1, 2, 3), 3.0)  # of all four, where nothing was seen
    assert torch.equal(found[1].maps["depth"], expected)
    with pytest.raises(ValueError, match="at least one training picture"):
        MeanDepth([{"depth": 0 * depth}])


# ----------------------------------------------------------------------------------------------------- training


def rendered(count=3, size=24):
    """Ellipsoids at random distances, pictures shaded by their normals."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(count):
        eye = torch.randn(3, generator=generator, dtype=torch.float64)
        eye = eye / eye.norm() * (1.2 + 0.8 * torch.rand(1, generator=generator, dtype=torch.float64))
        camera = Camera.look_at(eye, field_of_view=50, image_size=(size, size)).to(torch.float32)
        axes = 0.15 + 0.3 * torch.rand(1, 3, generator=generator)
        mesh = ico_sphere(2)
        drawn = rasterize(mesh.update_padded(mesh.verts_padded() * axes), camera)
        normals = drawn.normals[0].permute(2, 0, 1).float()
        items.append((0.5 - 0.5 * normals, drawn.depth[None, 0].float(), normals, camera))
    image, depth, normals, views = zip(*items)
    batch = {"image": torch.stack(image), "depth": torch.stack(depth), "normals": torch.stack(normals)}
    return batch | {"camera": Camera.stack(views), "id": [str(i) for i in range(count)]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depth", "normals"])
def test_a_few_pictures_are_learned_by_heart(name):
    torch.manual_seed(0)
    batch = rendered()
    backbone = ResNet(BasicBlock, (1, 1, 1), stem="small", widths=(8, 16, 32))
    channels, strides = backbone.channels, backbone.strides
    head = (
        DepthHead(channels, strides, min_depth=0.3, max_depth=3.0, form="log", foreground=1.0, width=16)
        if name == "depth"
        else NormalsHead(channels, strides, width=16)
    )
    model = SingleView(backbone, head)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    measured = {key: float(value.mean()) for key, value in model.validation_metrics(batch).items()}
    if name == "depth":
        constant = MeanDepth([batch]).depth[None].expand(3, -1, -1, -1)
        baseline = head.validation_metrics(model(batch["image"], batch["camera"])._replace(depth=constant), batch)
        assert measured["abs_rel"] < 0.3 * float(baseline["abs_rel"].mean())
        assert measured["mask_iou"] > 0.9
    else:
        assert measured["mean"] < 15
