"""Shapes from clouds and voxels: encoders and heads together, the data they take, the command line."""

import json

import numpy as np
import pytest
import torch

from vision3dgen import cli
from vision3dgen.backbones import ENCODERS, LocalPoolPointnet, PointCode, ResnetPointnet, resnet18
from vision3dgen.config import ConfigError, load
from vision3dgen.datasets import InputCloud, ShapeNet, collate, prepare_procedural
from vision3dgen.experiment import Run, build_parts, samples
from vision3dgen.heads import HEADS, LocalOccupancyHead, OccupancyHead, VoxelHead
from vision3dgen.io import load_mesh, save_pointcloud
from vision3dgen.models import MODELS, Completion, SingleView
from vision3dgen.ops import FeatureLayout
from vision3dgen.structures import Pointclouds

CODES = {
    "point_code": {"name": "point_code", "network": {"name": "resnet_pointnet", "code_channels": 16, "hidden": 8}},
    "voxel_code": {"name": "voxel_code", "code_channels": 16},
}
GLOBAL = {
    "voxels": {"name": "voxels", "resolution": 32, "width": 4},
    "occupancy": {"name": "occupancy", "hidden": 8, "threshold": 0.5, "resolution": 8, "upsampling_steps": 0},
}
LOCAL = {
    "local_pool_pointnet": {"name": "local_pool_pointnet", "hidden": 8},
    "local_voxels": {"name": "local_voxels"},
}


def completion(encoder, head):
    torch.manual_seed(0)
    return build_parts({"name": "completion", "encoder": encoder, "head": head}, MODELS, where="model")


def local(encoder):
    layout = {"planes": ["xz", "grid"], "resolution": 8, "grid_resolution": 4}
    head = {"name": "local_occupancy", "hidden": 8, "threshold": 0.5, "resolution": 8, "upsampling_steps": 0}
    return completion({**LOCAL[encoder], "layout": layout, "depth": 2, "levels": 1, "width": 8}, head)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    prepare_procedural(root, shapes_per_category=5, categories=["sofa"], views=1, points=2500, seed=0)
    return root


@pytest.fixture(scope="module")
def batch(data):
    dataset = ShapeNet(data, "train", fields=("cloud", "voxels", "points", "mesh"), points_per_item=64)
    return collate([dataset[i] for i in range(3)])


def every_model():
    found = {f"{e}-{h}": lambda e=e, h=h: completion(CODES[e], GLOBAL[h]) for e in CODES for h in GLOBAL}
    return found | {encoder: lambda encoder=encoder: local(encoder) for encoder in LOCAL}


def test_the_tables_above_hold_every_encoder():
    assert set(CODES) | set(LOCAL) == set(ENCODERS)


@pytest.mark.parametrize("name", sorted(every_model()))
def test_encoders_and_heads_that_fit_train_and_predict(batch, name):
    model = every_model()[name]()
    loss = model.loss(batch)["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    measured = model.validation_metrics(batch)
    assert measured["iou"].shape == measured["loss"].shape == (3,)
    predictions = model.predict(batch)
    assert [prediction.frame for prediction in predictions] == batch["frame"]
    assert all(prediction.voxels.shape == (32, 32, 32) for prediction in predictions)
    assert model.expected_initial_loss(batch) > 0


def test_a_few_steps_learn_a_batch(batch):
    model = local("local_pool_pointnet")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


def test_only_parts_that_fit_are_joined():
    layout = FeatureLayout(("xy",), resolution=8)
    points, planes = PointCode(ResnetPointnet(code_channels=8, hidden=4)), LocalPoolPointnet(layout, depth=1, width=8)
    head = LocalOccupancyHead([32], layout)
    Completion(planes, head)
    with pytest.raises(ValueError, match=r"PointCode gives one global code and LocalOccupancyHead reads FeatureLayout"):
        Completion(points, head)
    with pytest.raises(ValueError, match=r"LocalPoolPointnet gives FeatureLayout.* and OccupancyHead reads one global"):
        Completion(planes, OccupancyHead([32]))
    with pytest.raises(ValueError, match=r"resolution=16.*LocalOccupancyHead reads FeatureLayout.*resolution=8"):
        Completion(LocalPoolPointnet(FeatureLayout(("xy",), resolution=16), depth=1, width=8), head)
    with pytest.raises(ValueError, match="reads local features, which images do not have"):
        SingleView(resnet18(widths=(4, 6, 8, 10)), head)

    class CameraHead(VoxelHead):
        frame = "camera"

    with pytest.raises(ValueError, match="predicts in the camera's frame"):
        Completion(points, CameraHead([8], resolution=8, width=8))


@pytest.mark.parametrize(
    "node, message",
    [
        ({"encoder": CODES["point_code"], "head": {"name": "local_occupancy"}},
         r"model\.head: 'local_occupancy' needs layout, which the encoder 'point_code' does not have"),
        ({"encoder": {"name": "local_pool_pointnet", "layout": {"planes": ["xz", "zy"]}}, "head": GLOBAL["voxels"]},
         r"model\.encoder.*: unknown plane 'zy'.*choose from \['grid', 'xy', 'xz', 'yz'\]"),
        ({"encoder": {"name": "local_pool_pointnet", "layout": {"resolution": 20}}, "head": GLOBAL["voxels"]},
         r"model\.encoder.*resolution must be a multiple of 8 for a U-Net of depth 4, got 20"),
        ({"encoder": {"name": "point_code", "network": {"name": "pointnett"}}, "head": GLOBAL["voxels"]},
         r"model\.encoder\.network\.name: unknown name 'pointnett'"),
        ({"encoder": {"name": "local_pool_pointnet"}, "head": GLOBAL["voxels"]}, "encoder and head do not fit"),
    ],
)  # fmt: skip
def test_faults_of_a_configuration_are_named(node, message):
    with pytest.raises(ConfigError, match=message):
        build_parts({"name": "completion", **node}, MODELS, where="model")


def test_a_head_that_needs_strides_needs_a_backbone(monkeypatch):
    class Strided(VoxelHead):
        def __init__(self, channels: list[int], strides: list[int]):
            super().__init__(channels, resolution=8, width=8)

    monkeypatch.setitem(HEADS, "strided", Strided)
    with pytest.raises(ConfigError, match="'strided' needs strides, which the encoder 'point_code' does not have"):
        completion(CODES["point_code"], {"name": "strided"})


@pytest.mark.parametrize(
    "clouds, message",
    [
        ([torch.rand(5, 3) - 0.5, torch.zeros(0, 3)], r"clouds \[1\] of the batch are empty"),
        ([torch.tensor([[0.1, float("nan"), 0.2]])], "cloud must be finite"),
        ([torch.rand(5, 3) - 0.5, torch.tensor([[0.0, 37.5, 0.1]])],
         r"cloud 1 reaches \[0\.0, 37\.5, 0\.1\]: clouds must be in the canonical frame"),
    ],
)  # fmt: skip
def test_clouds_that_cannot_be_completed_are_named(clouds, message):
    model = completion(CODES["point_code"], GLOBAL["voxels"]).eval()
    with pytest.raises(ValueError, match=message):
        model(Pointclouds(clouds))


def test_noise_may_leave_the_cube_a_little():
    model = local("local_pool_pointnet").eval()
    field = model(Pointclouds([torch.tensor([[0.0, 0.62, 0.1], [0.1, 0.1, 0.1]])]))
    assert torch.isfinite(field(torch.tensor([[[0.0, 0.6, 0.0]]]))).all()


# ---------------------------------------------------------------------------------------------------------- data


def test_input_clouds_are_noisy_samples_drawn_by_seed_epoch_and_index(data):
    def dataset(*fields, seed=0, **cloud):
        return ShapeNet(data, "train", fields=fields, points_per_item=5, cloud=InputCloud(**cloud), seed=seed)

    plain = dataset("cloud", "points", points=300, noise=0.01)
    turned = dataset("points", "surface", "cloud", points=300, noise=0.01)
    for index in range(2):
        item = plain[index]
        assert torch.equal(item["cloud"].points_packed(), turned[index]["cloud"].points_packed())
        assert torch.equal(item["points"], turned[index]["points"])
    first = plain[0]["cloud"].points_packed()
    exact = dataset("cloud", points=300, noise=0.0)[0]["cloud"].points_packed()
    difference = (first - exact).flatten()
    assert float(difference.std()) == pytest.approx(0.01, rel=0.1)
    assert abs(float(difference.mean())) < 0.001
    surface = dataset("surface")[0]["surface"].points_packed()
    assert (torch.cdist(exact, surface).amin(1) < 1e-5).all()
    assert len(exact.unique(dim=0)) == 300  # without replacement
    assert not torch.equal(first, dataset("cloud", seed=1, points=300, noise=0.01)[0]["cloud"].points_packed())
    plain.set_epoch(1)
    assert not torch.equal(first, plain[0]["cloud"].points_packed())


def test_faults_of_input_clouds_are_named(data):
    with pytest.raises(ValueError, match=r"points of at least 1 .* got InputCloud\(points=0"):
        ShapeNet(data, "train", fields=("cloud",), cloud=InputCloud(points=0))
    with pytest.raises(ValueError, match=r"cloud\.points of .*: 3000 asked for, the file has 2500"):
        ShapeNet(data, "train", fields=("cloud",), cloud=InputCloud(points=3000))[0]


# -------------------------------------------------------------------------------------------------- command line

TINY = ["implicit_convonet_planes_quick", "implicit_onet_voxels_shapenet"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    given = [f"data.root={data}", "prepare=null", "loader.batch_size=2"]
    for name in TINY:
        arguments = ["train", f"configs/{name}.yaml", "--preset", "tiny", "--out", str(folder / name), *given]
        assert cli.main(arguments) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_configuration_trains_and_shows_what_it_was_given(runs, name):
    run = Run.open(runs / name)
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert "val/iou" in json.loads(lines[-1])
    model = run.model()
    dataset = run.experiment.dataset("test", fields=(model.takes, "mesh"))
    (shown,) = samples(dataset, 1, {"run": model.predict}, takes=model.takes)
    assert list(shown.predictions) == ["input", "run"]
    assert shown.image is None


@pytest.mark.slow
def test_a_file_is_completed_where_it_is(runs, tmp_path, monkeypatch):
    run = Run.open(runs / TINY[0])
    model = run.model()
    with torch.no_grad():
        model.head.decoder.fc_out.bias.fill_(2.0)  # full almost everywhere, so that there is a shape
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 7 + torch.tensor([100.0, 0, -50])
    save_pointcloud(tmp_path / "scan.ply", Pointclouds([points]))
    monkeypatch.setattr(Run, "model", lambda self, device: model)
    written = run.reconstruct([tmp_path / "scan.ply"], tmp_path / "out")
    assert [path.name for path in written] == ["scan.glb", "scan.ply"]
    box = load_mesh(written[1]).get_bounding_boxes()[0]
    np.testing.assert_allclose(box.mean(1), [103.5, 3.5, -46.5], atol=0.5)
    assert float((box[:, 1] - box[:, 0]).max()) == pytest.approx(1.1 * 7, rel=0.05)


@pytest.mark.slow
def test_voxel_files_are_completed(runs, data, tmp_path):
    path = next((data / "ShapeNetVox32").rglob("*.binvox"))
    run = Run.open(runs / TINY[1])
    given = run._read_input(path, "voxels")
    assert given["voxels"].shape == (1, 32, 32, 32)
    assert given["voxels"].sum() > 0
    run.model().predict(given)


@pytest.mark.slow
def test_an_empty_file_is_named(runs, tmp_path):
    (tmp_path / "nothing.xyz").write_text("")
    run = Run.open(runs / TINY[0])
    with pytest.raises(ValueError, match=r"nothing\.xyz"):
        run._read_input(tmp_path / "nothing.xyz", "cloud")


def test_published_settings_stand_in_the_configurations():
    points, planes = (load(f"configs/implicit_{name}_shapenet.yaml") for name in ("onet_points", "convonet_planes"))
    assert points["data"]["cloud"] == {"points": 300, "noise": 0.005}
    assert planes["data"]["cloud"] == {"points": 3000, "noise": 0.005}
    assert (points["loader"]["batch_size"], planes["loader"]["batch_size"]) == (64, 32)
    assert points["trainer"]["optimizer"] == planes["trainer"]["optimizer"] == {"name": "adam", "lr": 1e-4}
