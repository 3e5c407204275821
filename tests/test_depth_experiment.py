"""The configurations of depth and normals from end to end, small, and the pictures drawn of what they predict."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vision3dgen import cli
from vision3dgen.experiment import Run, score
from vision3dgen.io import load_npz, load_pointcloud, read_image
from vision3dgen.metrics import Prediction
from vision3dgen.models import MeanDepth
from vision3dgen.samples import sample_of
from vision3dgen.structures import Camera, Frame
from vision3dgen.viz import depth_gallery, depth_picture, normals_picture, scene

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("depth")
    arguments = ["--shapes-per-category", "5", "--categories", "table", "--views", "2", "--points", "500"]
    assert cli.main(["prepare", "procedural", str(root), *arguments, "--workers", "1"]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depth", "normals"])
def test_the_configuration_trains_is_scored_and_shown(name, data, tmp_path, monkeypatch, capsys):
    config = str(CONFIGS / f"{name}_unet_procedural.yaml")
    overrides = ["prepare=null", f"data.root={data}", "data.image_size=32"]
    assert cli.main(["train", config, "--preset", "tiny", "--out", str(tmp_path / "run"), *overrides]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    run = Run.open(tmp_path / "run")
    dataset = run.experiment.dataset("test")
    for protocol in run.experiment.evaluation.names:
        assert f"Protocol {protocol} " in shown
        summary = json.loads((tmp_path / "run" / "evaluation" / f"{protocol}_test.json").read_text())
        assert (summary["n_ok"], summary["n_failed"]) == (len(dataset), 0)
        assert all(np.isfinite(value) for value in summary["mean"].values())
    looked_at(run, name, tmp_path, monkeypatch, capsys)
    if name == "normals":
        return
    batch = next(run.experiment.batches(dataset, 2))
    for prediction, camera in zip(run.model().predict(batch), batch["camera"]):
        assert prediction.maps["depth"].shape == (1, 32, 32)
        if not prediction.shape.isempty():  # the surface lies where its pixels look
            pixels, _ = camera.project(camera.camera_to_world(prediction.shape.verts_packed()))
            torch.testing.assert_close(pixels, pixels.floor() + 0.5, atol=1e-3, rtol=0)
    baseline = MeanDepth(run.experiment.batches(run.experiment.dataset("train"), 4)).predict
    scores = score(tmp_path / "baseline", run.experiment, baseline, "default")
    assert 0 < scores.mean["abs_rel"] < 0.3


def looked_at(run, name, folder, monkeypatch, capsys):
    """view, reconstruct and report, as a user calls them."""
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(scene, "_broken", "no Open3D in this test")
    given = ["--device", "cpu"]
    assert cli.main(["view", str(run.folder), "--items", "2", "--out", str(folder / "view"), *given]) == 0
    assert (folder / "view" / "shapes.png").stat().st_size > 1000
    image = next((Path(run.experiment.data["root"]) / "ShapeNetRendering").rglob("00.png"))
    (folder / "table.png").write_bytes(image.read_bytes())
    assert (
        cli.main(["reconstruct", str(run.folder), str(folder / "table.png"), "--out", str(folder / "out"), *given]) == 0
    )
    values = load_npz(folder / "out" / f"table_{name}.npz")[name]
    assert values.shape == ((1, 32, 32) if name == "depth" else (3, 32, 32))
    assert read_image(folder / "out" / f"table_{name}.png", mode="RGB").shape == (32, 32, 3)
    cloud = folder / "out" / "table.ply"
    if name == "depth" and cloud.exists():  # two steps may leave nothing in the mask
        points = load_pointcloud(cloud).points_packed()
        depths = torch.from_numpy(values).flatten()
        assert torch.isin(points[:, 2].mul(1e3).round(), depths.mul(1e3).round()).float().mean() > 0.9
    capsys.readouterr()
    assert cli.main(["report", str(run.folder), "--items", "2", "--out", str(folder / "page.html"), *given]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "page.html")
    page = (folder / "page.html").read_text()
    assert f"true {name}" in page
    assert "nothing could be predicted" not in page


def test_depth_clouds_lie_on_what_was_seen():
    camera = Camera.look_at((0.0, 0.0, -2.0), field_of_view=40.0, image_size=(8, 12))
    frame = Frame("object", (0.1, 0.2, 0.3), 2.0)
    depth = torch.full((1, 8, 12), 2.0)
    prediction = Prediction(maps={"depth": depth, "mask": torch.arange(96).view(1, 8, 12) / 95}, frame=Frame("camera"))
    item = {"id": "x", "image": torch.rand(3, 8, 12), "depth": depth, "camera": camera, "frame": frame}
    sample = sample_of(item, {"net": lambda batch: [prediction]})
    cloud = sample.predictions["net"]
    assert len(cloud.points_packed()) == 48  # the half that the mask takes for the object
    world = frame.denormalize(cloud.points_packed())
    torch.testing.assert_close(world[:, 2], torch.zeros(48), atol=1e-5, rtol=0)  # the plane through the origin
    assert len(sample.truth.points_packed()) == 96
    torch.testing.assert_close(cloud.features_packed(), item["image"].flatten(1).T[48:])
    assert list(sample.pictures) == ["true depth", "net depth", "net error"]
    assert (sample.pictures["net error"] == sample.pictures["net error"][0, 0]).all()
    without = sample_of({k: v for k, v in item.items() if k != "camera"}, {"net": lambda batch: [prediction]})
    assert without.predictions["net"] is None
    assert without.truth is None


def test_depth_in_colors():
    depth = torch.tensor([[1.0, 2.0, 0.0], [3.0, torch.inf, torch.nan]])[None]
    picture = depth_picture(depth)
    assert picture.shape == (2, 3, 3)
    assert (picture[0, 2] == 255).all()
    assert (picture[1, 1] == 255).all()
    assert (picture[1, 2] == 255).all()
    near, middle, far = (picture[i].astype(int) for i in ((0, 0), (0, 1), (1, 0)))
    assert near.sum() > middle.sum() > far.sum()  # from yellow to violet
    same = depth_picture(2 * depth, (2.0, 6.0))
    assert (same == picture).all()
    assert (depth_picture(torch.zeros(1, 2, 3)) == 255).all()


def test_normals_in_colors():
    normals = torch.zeros(3, 1, 4)
    normals[:, 0, 0] = torch.tensor([0.0, 0.0, -1.0])  # to the camera
    normals[:, 0, 1] = torch.tensor([1.0, 0.0, 0.0])  # right
    normals[:, 0, 2] = torch.tensor([0.0, -1.0, 0.0])  # up
    assert normals_picture(normals)[0].tolist() == [[128, 128, 255], [255, 128, 128], [128, 255, 128], [255, 255, 255]]


def test_a_sheet_has_a_row_for_each_picture(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = list(torch.rand(2, 3, 16, 16, generator=generator))
    truths = list(1 + torch.rand(2, 1, 16, 16, generator=generator))
    truths[1][:, :8] = 0
    sheet = depth_gallery(images, truths, {"same": truths, "far": [2 * t for t in truths]}, tmp_path / "sheet.png")
    assert (read_image(tmp_path / "sheet.png", mode="RGB") == sheet).all()
    smaller = depth_gallery(images[:1], truths[:1], {"same": truths[:1]})
    assert sheet.shape[0] - smaller.shape[0] == 32 + 6  # one more row of twice 16 pixels and the gap
    assert sheet.shape[1] - smaller.shape[1] == 2 * (32 + 6)  # one more method: its depth and its error
