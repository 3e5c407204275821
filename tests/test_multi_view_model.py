"""Models of several views: the data's views, what training and evaluation see, pooling, and what is refused."""

import itertools
import shutil

import pytest
import torch

from vision3dgen import cli
from vision3dgen.backbones import MultiViewEncoder, ViewPooling, resnet18, resnet20
from vision3dgen.config import ConfigError, load
from vision3dgen.datasets import Augment, ShapeNet, collate, prepare_procedural
from vision3dgen.datasets.augment import Crop
from vision3dgen.experiment import Run, build_parts, samples
from vision3dgen.heads import Head, PointHead, VolumeHead
from vision3dgen.io import load_pointcloud
from vision3dgen.models import MODELS, MultiView, SingleView
from vision3dgen.structures import Frame

FIELDS = ("image", "mask", "depth", "normals", "camera", "voxels", "points")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    prepare_procedural(root, shapes_per_category=4, categories=["chair", "table"], views=3, points=300, seed=1)
    return root


def small_encoder():
    torch.manual_seed(0)
    return MultiViewEncoder(resnet20(widths=(4, 6, 8)), code_channels=13, state_channels=5, size=2, grid=2)


def small_model(**settings):
    encoder = small_encoder()
    return MultiView(encoder, VolumeHead(encoder.channels, widths=(5, 5, 3, 3), resolution=16), **settings)


def batch(views=4, objects=2):
    generator = torch.Generator().manual_seed(views)
    return {
        "image": torch.rand(objects, views, 3, 17, 19, generator=generator),
        "voxels": (torch.rand(objects, 16, 16, 16, generator=generator) > 0.5).float(),
        "points": torch.rand(objects, 23, 3, generator=generator) - 0.5,
        "occupancies": (torch.rand(objects, 23, generator=generator) > 0.5).float(),
        "frame": [Frame("object")] * objects,
    }


# -------------------------------------------------------------------------------------------------------- data


def test_an_item_of_several_views_is_its_views_stacked(data):
    single = ShapeNet(data, "train", fields=FIELDS)
    several = ShapeNet(data, "train", fields=FIELDS, views="first", views_per_item=2)
    assert len(several) == len(several.models) == len(single) // 3
    for index in range(len(several)):
        item, views = several[index], [single[3 * index], single[3 * index + 1]]
        assert item["id"] == views[0]["id"]
        for name in ("image", "mask", "depth", "normals"):
            assert torch.equal(item[name], torch.stack([view[name] for view in views]))
        for place, view in enumerate(views):
            assert torch.equal(item["camera"][place].rotation, view["camera"].rotation)
        assert torch.equal(item["voxels"], views[0]["voxels"])
    joined = collate([several[0], several[1]])
    assert joined["image"].shape == (2, 2, 3, 137, 137)
    assert joined["camera"].translation.shape == (2, 2, 3)


def test_random_views_are_distinct_and_follow_seed_epoch_and_index(data):
    single = ShapeNet(data, "train", fields=("image",))
    dataset = ShapeNet(data, "train", fields=("image",), views="random", views_per_item=2, cache=True)
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        item = dataset[0]
        assert torch.equal(item["image"], dataset[0]["image"])
        pair = tuple(next(k for k in range(3) if torch.equal(single[k]["image"], view)) for view in item["image"])
        assert item["id"].endswith(f"/0{pair[0]}")
        seen.add(pair)
    assert all(a != b for a, b in seen)
    assert len(seen) > 3  # of six ordered pairs


def test_one_random_view_is_drawn_as_before_there_were_several(data):
    plain = ShapeNet(data, "train", fields=("image",), views="random")
    one = ShapeNet(data, "train", fields=("image",), views="random", views_per_item=1)
    assert plain[0]["image"].shape == (3, 137, 137)
    assert one[0]["image"].shape == (1, 3, 137, 137)


def test_each_view_is_augmented_on_its_own(data):
    item = ShapeNet(data, "train", fields=("image", "camera"), views="first", views_per_item=3)[0]
    generator = torch.Generator().manual_seed(0)
    moved = Augment([Crop((101, 103))])(item, generator)
    assert moved["image"].shape == (3, 3, 101, 103)
    offsets = (item["camera"].intrinsics - moved["camera"].intrinsics)[:, :2, 2].round().int()  # left, top
    assert len(offsets.unique(dim=0)) == 3
    for view, (left, top) in enumerate(offsets.tolist()):
        window = item["image"][view, :, top : top + 101, left : left + 103]
        torch.testing.assert_close(moved["image"][view], window, atol=1e-4, rtol=0)


def test_more_views_than_there_are_is_an_error_that_names_the_item(data):
    model = ShapeNet(data, "train", fields=("image",)).models[0]
    with pytest.raises(ValueError, match=rf"{model}.*3 views, but views_per_item asks for 5 \("):
        ShapeNet(data, "train", fields=("image",), views="random", views_per_item=5)
    with pytest.raises(ValueError, match="views_per_item needs views to be 'first' or 'random', got 'all'"):
        ShapeNet(data, "train", fields=("image",), views_per_item=2)
    with pytest.raises(ValueError, match="views_per_item must be at least 1 or None, got 0"):
        ShapeNet(data, "train", fields=("image",), views="first", views_per_item=0)


def test_a_model_with_a_broken_view_is_left_out_whole(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    whole = ShapeNet(tmp_path / "data", "train", fields=("image",), views="first", views_per_item=3)
    first, second = whole.models[:2]
    renderings = tmp_path / "data" / "ShapeNetRendering"
    (renderings / first.synset / first.id / "rendering" / "02.png").unlink()
    (renderings / second.synset / second.id / "rendering" / "01.png").write_bytes(b"no picture")
    left = ShapeNet(tmp_path / "data", "train", fields=("image",), views="first", views_per_item=3, on_error="skip")
    assert len(left) == len(whole) - 2
    assert {p.item for p in left.problems if p.required} == {str(first), str(second)}
    assert left[0]["image"].shape[0] == 3
    two = ShapeNet(tmp_path / "data", "train", fields=("image",), views="first", views_per_item=2, on_error="skip")
    assert len(two) == len(whole) - 1  # the third view is not asked for


# ------------------------------------------------------------------------------------------------------- model


def views_seen(model, given):
    """How many views the encoder was given."""
    counts = []
    handle = model.encoder.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].shape[1]))
    model.see(given)
    handle.remove()
    return counts[0]


def test_training_sees_a_random_number_of_views_and_evaluation_all():
    model = small_model().train()
    torch.manual_seed(0)
    counts = [views_seen(model, batch()) for _ in range(40)]
    assert set(counts) == {1, 2, 3, 4}
    torch.manual_seed(0)
    assert [views_seen(model, batch()) for _ in range(40)] == counts
    two = small_model(fewest_views=3).train()
    assert {views_seen(two, batch()) for _ in range(20)} == {3, 4}
    assert {views_seen(model.eval(), batch()) for _ in range(5)} == {4}


def test_every_parameter_gets_a_gradient():
    model = small_model(fewest_views=2).train()
    model.loss(batch())["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_predict_takes_any_number_of_views_and_uses_them():
    model = small_model().eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.head.scores.weight)
    given = batch()
    grids = []
    for count in range(1, 5):
        predictions = model.predict({**given, "image": given["image"][:, :count]})
        assert len(predictions) == 2
        assert predictions[0].voxels.shape == (32, 32, 32)
        assert predictions[0].frame == Frame("object")
        grids.append(predictions[0].voxels)
    for a, b in itertools.pairwise(grids):
        assert not torch.allclose(a, b, atol=1e-5)
    (single,) = {
        tuple(p.voxels.flatten()[:99].tolist()) for p in model.predict({**given, "image": given["image"][:, 0]})[:1]
    }
    assert single == tuple(grids[0].flatten()[:99].tolist())
    measured = model.validation_metrics(given)
    assert measured["iou"].shape == measured["loss"].shape == (2,)


def test_objects_with_fewer_views_than_others():
    model = small_model().eval()
    given = {**batch(), "num_views": torch.tensor([4, 2])}
    alone = batch()
    alone = {**alone, "image": alone["image"][1:, :2], "frame": alone["frame"][:1]}
    torch.testing.assert_close(model.predict(given)[1].voxels, model.predict(alone)[0].voxels)
    model.train()
    for _ in range(8):  # whatever number is drawn, no object has more views than it has
        assert torch.isfinite(model.loss(given)["loss"])


@torch.no_grad()
def test_pooled_views_are_the_mean_or_the_maximum_in_any_order():
    torch.manual_seed(0)
    trunk = resnet20(widths=(4, 6, 8)).eval()
    views = batch(3)["image"]
    each = [trunk(views[:, index]) for index in range(3)]
    for reduce, join in (("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))):
        encoder = ViewPooling(trunk, reduce=reduce)
        assert encoder.channels == trunk.channels
        assert encoder.strides == trunk.strides
        pooled = encoder(views)
        for level, found in enumerate(pooled):
            torch.testing.assert_close(found, join(torch.stack([maps[level] for maps in each])))
        for found, turned in zip(pooled, encoder(views.flip(1))):
            torch.testing.assert_close(found, turned)
        ragged = encoder(views, torch.tensor([3, 1]))
        for whole, found, first in zip(pooled, ragged, each[0]):
            torch.testing.assert_close(found[0], whole[0])
            torch.testing.assert_close(found[1], first[1])


@torch.no_grad()
def test_pooled_views_feed_any_head_and_one_view_is_single_view():
    torch.manual_seed(0)
    backbone = resnet18(widths=(4, 6, 8, 10))
    head = PointHead(backbone.channels, points=17, code_channels=5, hidden=7)
    several, single = MultiView(ViewPooling(backbone), head).eval(), SingleView(backbone, head).eval()
    images = torch.rand(2, 3, 33, 35)
    torch.testing.assert_close(several(images[:, None]), single(images))


def test_what_cannot_be_is_refused():
    class CameraHead(Head):
        frame = "camera"

        def forward(self, features, view=None):
            return features

        def loss(self, prediction, batch):
            return {}

        def shape(self, prediction):
            raise NotImplementedError

    with pytest.raises(ValueError, match="CameraHead predicts in the camera's frame, but several views have several"):
        MultiView(small_encoder(), CameraHead())
    with pytest.raises(ValueError, match="fewest_views must be at least 1, got 0"):
        small_model(fewest_views=0)
    with pytest.raises(
        ValueError, match=r"fewest_views is 3, but items have 2 view\(s\): set the data's views_per_item"
    ):
        small_model(fewest_views=3).train().loss(batch(2))


def test_parts_by_name_know_the_encoders_channels():
    trunk = {"name": "resnet18", "widths": [4, 6, 8, 10]}
    recurrent = {"name": "recurrent", "trunk": trunk, "code_channels": 7, "state_channels": 5}
    model = build_parts(
        {"name": "multi_view", "encoder": recurrent, "head": {"name": "volume", "widths": [5, 3, 3, 3]}}, MODELS
    )
    assert model.head.blocks[0].first.in_channels == 5
    pooled = {"name": "pooled", "trunk": trunk}
    model = build_parts({"name": "multi_view", "encoder": pooled, "head": {"name": "points"}}, MODELS)
    assert model.head.fc.in_features == 10
    with pytest.raises(ConfigError, match=r"expected one of 'max', 'mean' .* got 'median'"):
        build_parts(
            {"name": "multi_view", "encoder": {**pooled, "reduce": "median"}, "head": {"name": "points"}}, MODELS
        )
    with pytest.raises(ConfigError, match="did you mean 'pooled'"):
        build_parts({"name": "multi_view", "encoder": {**pooled, "name": "poled"}, "head": {"name": "points"}}, MODELS)


CONFIG = """\
seed: 3
data: {name: shapenet, root: ROOT, image_size: 32, cache: true, views_per_item: 3}
splits:
  train: {fields: [image, voxels], views: random}
  val: {fields: [image, voxels, points], views: first}
  test: {fields: [image, camera, voxels, mesh], views: first}
model:
  name: multi_view
  encoder: {name: recurrent, trunk: {name: resnet18, widths: [4, 4, 8, 8]}, code_channels: 8, state_channels: 4}
  head: {name: volume, widths: [4, 4, 4, 4], threshold: 0.05}
loader: {batch_size: 3}
trainer:
  steps: 3
  optimizer: {name: adam, lr: 1e-3}
  validation: {metric: iou, every: 3}
  record: {log_every: 1, checkpoint_every: 3}
evaluation: {protocols: [r2n2], repeats: 1}
"""


@pytest.mark.slow
def test_several_views_train_validate_and_are_scored_by_the_command_line(data, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("ROOT", str(data)))
    run = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--out", str(run)]) == 0
    assert cli.main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert "Protocol r2n2" in capsys.readouterr().out
    picture = next((data / "ShapeNetRendering").rglob("00.png"))
    experiment = Run.open(run).experiment
    (shown,) = samples(experiment.dataset("test"), 1, {})  # of several views the first one
    assert shown.image.shape == (3, 32, 32)
    assert shown.camera.translation.shape == (3,)
    assert cli.main(["reconstruct", str(run), str(picture), "--out", str(tmp_path / "out")]) == 0
    assert load(run / "config.yaml")["model"]["name"] == "multi_view"
    assert (
        len(Run.open(run).experiment.dataset("test"))
        == len((run / "evaluation" / "r2n2_test.jsonl").read_text().splitlines()) - 1
    )


@pytest.mark.slow
def test_clouds_are_reconstructed_into_point_files(data, tmp_path):
    text = CONFIG.replace("ROOT", str(data)).replace(", views_per_item: 3", "")
    start, stop = text.index("splits:"), text.index("loader:")
    text = (
        text[:start]
        + "splits:\n  train: {fields: [image, surface], surface_points: 37}\n"
        + "  val: {fields: [image, surface], surface_points: 37}\n"
        + "  test: {fields: [image, camera, voxels, points, mesh], views: first}\n"
        + "model:\n  name: single_view\n  backbone: {name: resnet18, widths: [4, 4, 8, 8]}\n"
        + "  head: {name: points, points: 37, code_channels: 5, hidden: 7, distance: {name: earth_movers}}\n"
        + text[stop:].replace("metric: iou", "metric: chamfer, mode: min").replace("[r2n2]", "[atlasnet]")
    )
    text = text.replace("[image, camera, voxels, points, mesh]", "[image, camera, surface, mesh]")
    (tmp_path / "config.yaml").write_text(text)
    run = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--out", str(run)]) == 0
    assert cli.main(["evaluate", str(run), "--device", "cpu"]) == 0
    picture = next((data / "ShapeNetRendering").rglob("00.png"))
    assert cli.main(["reconstruct", str(run), str(picture), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00.ply"]
    assert load_pointcloud(tmp_path / "out" / "00.ply").num_points_per_cloud().tolist() == [37]
