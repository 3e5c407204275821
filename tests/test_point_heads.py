"""Point set networks and AtlasNet: losses against loops, published sizes, templates, and what they refuse."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from vision3dgen.datasets import collate
from vision3dgen.heads import (
    AsCloud,
    AsMesh,
    AtlasHead,
    ChamferLoss,
    EarthMoversLoss,
    PointHead,
    Sphere,
    Squares,
    TwoBranchPointHead,
)
from vision3dgen.heads.atlas import PatchDecoder
from vision3dgen.heads.points import PointDecoder, mean_distance
from vision3dgen.metrics import PROTOCOLS, Prediction, evaluate
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Frame, Meshes, Pointclouds


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def maps():
    return [rand(3, 5, 7, 9), rand(3, 11, 4, 5, seed=1)]


def clouds(*sizes):
    return Pointclouds([rand(size, 3, seed=index) - 0.5 for index, size in enumerate(sizes)])


# ------------------------------------------------------------------------------------------------------ losses


def nearest(points, others):
    return [min(float((p - q).square().sum()) for q in others) for p in points]


def test_chamfer_is_the_mean_squared_distance_of_both_directions():
    points, truth = rand(2, 7, 3), clouds(11, 5)
    for index, value in enumerate(ChamferLoss()(points, truth)):
        own = truth.points_list()[index]
        forward, backward = nearest(points[index], own), nearest(own, points[index])
        assert float(value) == pytest.approx(sum(forward) / 7 + sum(backward) / len(own), rel=1e-5)


def test_mean_distance_is_unsquared_and_averages_the_directions():
    points, truth = rand(3, 7, 3), clouds(11, 0, 5)
    found = mean_distance(points, truth)
    for index in (0, 2):
        own = truth.points_list()[index]
        sides = [[math.sqrt(d) for d in nearest(a, b)] for a, b in ((points[index], own), (own, points[index]))]
        assert float(found[index]) == pytest.approx(sum(sum(s) / len(s) for s in sides) / 2, rel=1e-5)
    assert found[1] == 0


@pytest.mark.parametrize("power", [1, 2])
def test_earth_movers_is_the_best_of_all_assignments_and_pulls_each_point_to_its_partner(power):
    points, truth = rand(2, 5, 3).requires_grad_(), clouds(5, 5)
    loss = EarthMoversLoss(power=power)(points, truth)
    (gradient,) = torch.autograd.grad(loss.sum(), points)
    for index in range(2):
        own = truth.points_list()[index]
        offsets = {p: points[index].detach() - own[list(p)] for p in itertools.permutations(range(5))}
        costs = {p: float((o.norm(dim=1) ** power).mean()) for p, o in offsets.items()}
        best = min(costs, key=costs.__getitem__)
        assert float(loss[index].detach()) == pytest.approx(costs[best], rel=1e-5)
        direction = 2 * offsets[best] if power == 2 else F.normalize(offsets[best], dim=1)
        torch.testing.assert_close(gradient[index], direction / 5)


def test_entropic_transport_takes_clouds_of_any_sizes():
    points = rand(2, 7, 3).requires_grad_()
    loss = EarthMoversLoss(method="entropic")(points, clouds(11, 5))
    loss.sum().backward()
    assert (points.grad.abs().sum((1, 2)) > 0).all()


def test_exact_transport_refuses_clouds_of_another_size():
    with pytest.raises(
        ValueError, match=r"7 are predicted, the surface of item 1 has 5; set surface_points of the data to 7"
    ):
        EarthMoversLoss()(rand(2, 7, 3), clouds(7, 5))


# ------------------------------------------------------------------------------------------------------- heads


def heads():
    return {
        "points": PointHead([5, 11], points=13, code_channels=7, hidden=17),
        "earth_movers": PointHead([5, 11], points=13, code_channels=7, hidden=17, distance=EarthMoversLoss()),
        "branches": TwoBranchPointHead([5, 11], points=771, width=16, hidden=19),
        "squares": AtlasHead([5, 11], template=Squares(3), points=39, code_channels=7, hidden=5, output=AsMesh(48)),
        "sphere": AtlasHead([5, 11], template=Sphere(), points=13, code_channels=7, hidden=5, output=AsCloud(42)),
    }


@pytest.mark.parametrize("name", ["points", "earth_movers", "branches", "squares", "sphere"])
def test_an_item_without_truth_is_counted_and_keeps_the_graph(name):
    torch.manual_seed(0)
    head = heads()[name]
    size = 13 if name in ("points", "earth_movers") else 31
    state = torch.get_rng_state()
    loss = head.loss(head(maps()), {"surface": clouds(size, 0, size)})["loss"]
    assert torch.isfinite(loss)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    torch.set_rng_state(state)  # the same random points of a template
    prediction = head(maps())
    only = head.loss(prediction, {"surface": clouds(0, 0, 0)})["loss"]
    assert float(only.detach()) == 0
    only.backward()


@torch.no_grad()
@pytest.mark.parametrize("name", ["points", "branches", "squares", "sphere"])
def test_the_loss_is_the_mean_over_items(name):
    torch.manual_seed(0)
    head = heads()[name].eval()
    truth = clouds(31, 0, 17)
    together = float(head.loss(head(maps()), {"surface": truth})["loss"])
    alone = [
        float(head.loss(head([m[i : i + 1] for m in maps()]), {"surface": truth[i : i + 1]})["loss"]) for i in range(3)
    ]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-4)
    assert alone[1] == 0
    measured = head.validation_metrics(head(maps()), {"surface": truth})
    assert measured["chamfer"].shape == (3,)


@pytest.mark.parametrize("name", ["points", "earth_movers", "branches", "squares", "sphere"])
def test_a_few_steps_bring_points_to_the_truth(name):
    torch.manual_seed(0)
    head = heads()[name]
    size = 13 if name == "earth_movers" else 97
    truth = Pointclouds([0.3 * F.normalize(rand(size, 3, seed=s) - 0.5, dim=1) for s in range(3)])
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = head.loss(head(maps()), {"surface": truth})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_simple_network_has_the_published_sizes():
    head = PointHead([512])
    sizes = {name: tuple(p.shape) for name, p in head.named_parameters() if name.endswith("weight")}
    assert sizes == {
        "fc.weight": (256, 512),
        "decoder.fc_0.weight": (512, 256),
        "decoder.fc_1.weight": (512, 512),
        "decoder.fc_2.weight": (512, 512),
        "decoder.fc_out.weight": (3072, 512),
    }


def test_the_simple_network_is_relu_between_four_layers():
    torch.manual_seed(0)
    decoder = PointDecoder(5, 7, 11)
    x = rand(2, 5)
    state = decoder.state_dict()
    for name in ("fc_0", "fc_1", "fc_2", "fc_out"):
        x = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        x = x if name == "fc_out" else x.clamp_min(0)
    torch.testing.assert_close(decoder(rand(2, 5)), x.view(2, 7, 3))


def test_two_branches_give_free_points_first_then_a_map():
    torch.manual_seed(0)
    head = TwoBranchPointHead([3, 5, 7, 11], points=1024)
    sizes = {name: tuple(p.shape) for name, p in head.named_parameters() if name.endswith("weight")}
    assert sizes["fc_branch.1.weight"] == (1024, 512 * 12)
    assert sizes["fc_branch.3.weight"] == (3 * 256, 1024)
    assert [sizes[f"deconvolutions.{i}.weight"] for i in range(3)] == [
        (512, 256, 5, 5), (256, 128, 5, 5), (128, 64, 5, 5)
    ]  # fmt: skip
    assert [sizes[f"laterals.{i}.weight"][:2] for i in range(3)] == [(256, 7), (128, 5), (64, 3)]
    features = [rand(2, channels, 16 >> i, 16 >> i, seed=i) for i, channels in enumerate((3, 5, 7, 11))]
    points = head(features)
    assert points.shape == (2, 1024, 3)
    with torch.no_grad():
        head.fc_branch[3].bias.add_(1.0)
        head.last.bias.sub_(1.0)
        moved = head(features)
    torch.testing.assert_close(moved[:, :256], points[:, :256] + 1)
    torch.testing.assert_close(moved[:, 256:], points[:, 256:] - 1)
    # each finer map is used, by the map's branch alone
    for index in range(3):
        changed = [f + (i == index) for i, f in enumerate(features)]
        other = head(changed)
        torch.testing.assert_close(other[:, :256], moved[:, :256])
        assert not torch.allclose(other[:, 256:], moved[:, 256:], atol=1e-4)


def test_numbers_of_points_that_cannot_be():
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        PointHead([3], points=0)
    with pytest.raises(ValueError, match="more than the 768 of the convolutional branch, got 768"):
        TwoBranchPointHead([3], points=768)
    with pytest.raises(ValueError, match="width must be a multiple of 8"):
        TwoBranchPointHead([3], width=12)
    with pytest.raises(ValueError, match="multiple of the 25 patches, such as 1000 or 1025, got 1024"):
        AtlasHead([3], points=1024)
    with pytest.raises(ValueError, match="multiple of the 25 patches, such as 25, got 0"):
        AtlasHead([3], points=0)
    with pytest.raises(ValueError, match=r"25 \* k\^2 points with k > 1, such as 2025, 2500, 3025, got 2450"):
        AtlasHead([3], output=AsCloud(2450))
    with pytest.raises(ValueError, match=r"sphere are 12, 42, 162, 642, 2562, 10242, .* got 2500"):
        AtlasHead([3], template=Sphere(), output=AsMesh(2500))
    with pytest.raises(ValueError, match="count must be at least 1"):
        Squares(0)


def test_a_batch_without_surface_says_what_to_add():
    head = heads()["points"]
    with pytest.raises(ValueError, match=r"add 'surface' to the data's fields.*it has \['voxels'\]"):
        head.loss(head(maps()), {"voxels": torch.zeros(3, 1, 1, 1)})


# ------------------------------------------------------------------------------------------------------- atlas


def test_atlas_has_the_published_sizes():
    head = AtlasHead([512])
    assert len(head.decoder) == 25
    sizes = {name: tuple(p.shape) for name, p in head.decoder[0].named_parameters()}
    assert sizes == {
        "conv1.weight": (1024, 2, 1), "conv1.bias": (1024,), "bn1.weight": (1024,), "bn1.bias": (1024,),
        "conv2.weight": (512, 1024, 1), "conv2.bias": (512,), "bn2.weight": (512,), "bn2.bias": (512,),
        "conv_list.0.weight": (512, 512, 1), "conv_list.0.bias": (512,),
        "conv_list.1.weight": (512, 512, 1), "conv_list.1.bias": (512,),
        "bn_list.0.weight": (512,), "bn_list.0.bias": (512,), "bn_list.1.weight": (512,), "bn_list.1.bias": (512,),
        "last_conv.weight": (3, 512, 1), "last_conv.bias": (3,),
    }  # fmt: skip
    assert head.fc.weight.shape == (1024, 512)
    assert head.grid.shape == (25, 100, 2)
    assert AtlasHead([7], template=Sphere(), code_channels=5, hidden=3).grid.shape == (1, 2562, 3)


def test_a_patch_decoder_is_its_formula_point_by_point():
    torch.manual_seed(0)
    decoder = PatchDecoder(2, 7, 5)
    for module in decoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.uniform_(module.bias)
    decoder.eval()
    points, code = rand(3, 2, 11), rand(3, 7, seed=1)
    found = decoder(points, code)
    state = decoder.state_dict()

    def linear(x, name):
        return state[f"{name}.weight"][..., 0] @ x + state[f"{name}.bias"]

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    for b in range(3):
        for n in range(11):
            x = norm(linear(points[b, :, n], "conv1") + code[b], "bn1").clamp_min(0)
            x = norm(linear(x, "conv2"), "bn2").clamp_min(0)
            for layer in range(2):
                x = norm(linear(x, f"conv_list.{layer}"), f"bn_list.{layer}").clamp_min(0)
            torch.testing.assert_close(found[b, :, n], linear(x, "last_conv"), atol=1e-5, rtol=1e-4)


def test_squares_are_covered_once_by_their_triangles():
    grid = Squares(3).regular(48)
    assert grid.points.shape == (3, 16, 2)
    flat = F.pad(grid.points.flatten(0, 1), (0, 1))
    mesh = Meshes([flat], [grid.faces])
    assert len(grid.faces) == 3 * 9 * 2
    torch.testing.assert_close(mesh.faces_areas_packed(), torch.full((54,), 1 / 18))
    torch.testing.assert_close(mesh.faces_normals_packed(), torch.tensor([[0.0, 0, 1]]).expand(54, 3))
    owner = grid.faces // 16  # no triangle between two patches
    assert (owner == owner[:, :1]).all()
    assert owner[:, 0].bincount().tolist() == [18, 18, 18]
    corners = mesh.verts_packed()[grid.faces].mean(1)[:18]
    assert len(corners.round(decimals=4).unique(dim=0)) == 18


def test_a_sphere_stays_closed():
    grid = Sphere().regular(162)
    mesh = Meshes([grid.points[0]], [grid.faces])
    assert 162 - len(mesh.edges_packed()) + len(grid.faces) == 2
    torch.testing.assert_close(grid.points.norm(dim=2), torch.ones(1, 162), atol=1e-3, rtol=0)


def test_random_points_lie_on_the_template_and_follow_the_seed():
    like = torch.zeros(())
    torch.manual_seed(0)
    square, ball = Squares(3).random(5, 600, like=like), Sphere().random(5, 700, like=like)
    assert square.shape == (5, 3, 200, 2)
    assert ball.shape == (5, 1, 700, 3)
    assert 0 <= square.min() < 0.01
    assert 0.99 < square.max() <= 1
    torch.testing.assert_close(square.mean((0, 1, 2)), torch.full((2,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(ball.norm(dim=3), torch.ones(5, 1, 700))
    torch.testing.assert_close(ball.mean((0, 1, 2)), torch.zeros(3), atol=0.05, rtol=0)
    assert not torch.equal(square[0], square[1])
    torch.manual_seed(0)
    assert torch.equal(Squares(3).random(5, 600, like=like), square)


def test_training_draws_points_and_evaluation_does_not():
    torch.manual_seed(0)
    head = heads()["squares"]
    batch = {"surface": clouds(31, 17, 23)}
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.0
    prediction = head(maps())
    assert head.loss(prediction, batch)["loss"] != head.loss(prediction, batch)["loss"]
    head.eval()
    assert head.loss(prediction, batch)["loss"] == head.loss(prediction, batch)["loss"]


def test_a_shape_is_a_mesh_or_a_cloud_as_told():
    torch.manual_seed(0)
    mesh_head = heads()["squares"].eval()
    cloud_head = AtlasHead(
        [5, 11], template=Squares(3), points=39, code_channels=7, hidden=5, output=AsCloud(48)
    ).eval()
    cloud_head.load_state_dict(mesh_head.state_dict())
    mesh, cloud = (head.shape(head(maps())) for head in (mesh_head, cloud_head))
    assert isinstance(mesh, Meshes)
    assert isinstance(cloud, Pointclouds)
    assert mesh.num_faces_per_mesh().tolist() == [54, 54, 54]
    assert torch.equal(mesh.verts_packed(), cloud.points_packed())
    assert not mesh.verts_packed().requires_grad


def test_a_shape_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    head = heads()["squares"].eval()
    together = head.shape(head(maps()))
    for index in range(3):
        alone = head.shape(head([m[index : index + 1] for m in maps()]))
        torch.testing.assert_close(alone.verts_packed(), together[index].verts_packed())


# -------------------------------------------------------------------------------------------------- evaluation


def test_clouds_are_scored_with_the_points_they_have_and_without_normals():
    ball = ico_sphere(3)
    mesh = Meshes([ball.verts_packed() / 2], [ball.faces_packed()])
    item = {"id": "02691156/ball/00", "category": "02691156", "frame": Frame("object"), "mesh": mesh}

    def predict(batch):
        points = F.normalize(torch.randn(97, 3, generator=torch.Generator().manual_seed(0)), dim=1) / 2
        return [Prediction(shape=Pointclouds([points]), frame=batch["frame"][0])]

    summary = evaluate([collate([item])], predict, PROTOCOLS["default"], out=None, seed=0, repeats=2)
    assert (summary.n_ok, summary.n_empty, summary.n_failed) == (1, 0, 0)
    assert summary.points["prediction"] == [97, 97]
    assert "|NC|" not in summary.headline
    assert "|NC|" in summary.ceiling
    assert summary.headline["Precision@0.01"] == pytest.approx(1 - math.exp(-1), abs=0.15)  # as dense as its samples
    assert summary.headline["Precision@0.02"] > 0.9
    assert summary.headline["Recall@0.01"] == pytest.approx(1 - math.exp(-97 * 0.01**2 / 4 / 0.5**2), abs=0.01)
