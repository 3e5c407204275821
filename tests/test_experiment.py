"""The whole way, small: generated data, training of each head, scoring, reconstruction, the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vision3dgen import cli
from vision3dgen.config import ConfigError, construct, load, variants
from vision3dgen.experiment import Experiment, Run
from vision3dgen.io import load_mesh

CONFIG = """\
seed: 3
prepare: {name: procedural, root: ROOT, shapes_per_category: 5, categories: [table, sofa], views: 2, points: 500}
data: {name: shapenet, root: "${prepare.root}", image_size: 32, points_per_item: 64, cache: true,
       fields: [image, camera, voxels, points, mesh]}
model:
  name: single_view
  backbone: {name: resnet18}
  head: {name: occupancy, hidden: 8, code_channels: 8, threshold: 0.5, resolution: 6, upsampling_steps: 0}
loader: {batch_size: 4}
trainer:
  steps: 4
  optimizer: {name: adam, lr: 1e-3}
  validation: {metric: iou, every: 2}
  record: {log_every: 1, checkpoint_every: 2}
evaluation: {protocols: [r2n2], repeats: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "config.yaml").write_text(CONFIG.replace("ROOT", str(folder / "data")))
    assert cli.main(["train", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.mark.slow
def test_a_run_folder_describes_itself(folder):
    run = folder / "run"
    assert load(run / "config.yaml")["trainer"]["steps"] == 4
    known = json.loads((run / "environment.json").read_text())
    assert known["torch"] == str(torch.__version__)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert any((run / "checkpoints").iterdir())


@pytest.mark.slow
def test_evaluate_prints_a_table_and_keeps_every_item(folder, capsys):
    assert cli.main(["evaluate", str(folder / "run"), "--device", "cpu"]) == 0
    assert "Protocol r2n2" in capsys.readouterr().out
    lines = (folder / "run" / "evaluation" / "r2n2_test.jsonl").read_text().splitlines()
    summary = json.loads((folder / "run" / "evaluation" / "r2n2_test.json").read_text())
    counted = summary["n_ok"] + summary["n_empty"] + summary["n_failed"]
    assert counted == len(lines) - 1 == len(Run.open(folder / "run").experiment.dataset("test"))
    assert cli.main(["evaluate", str(folder / "run"), "--device", "cpu"]) == 0  # nothing is scored twice
    assert (folder / "run" / "evaluation" / "r2n2_test.jsonl").read_text().splitlines() == lines


@pytest.mark.slow
def test_reconstruct_writes_meshes_that_load(folder, tmp_path):
    image = next((folder / "data" / "ShapeNetRendering").rglob("00.png"))
    copy = tmp_path / "table.png"
    copy.write_bytes(image.read_bytes())
    assert cli.main(["reconstruct", str(folder / "run"), str(copy), "--out", str(tmp_path / "out")]) == 0
    mesh = load_mesh(tmp_path / "out" / "table.ply")
    assert torch.isfinite(mesh.verts_packed()).all()


@pytest.mark.slow
def test_training_twice_into_one_folder_is_an_error(folder, capsys):
    config = str(folder / "config.yaml")
    assert cli.main(["train", config, "--out", str(folder / "run")]) == 2
    assert "resume it, or choose another folder" in capsys.readouterr().err
    assert cli.main(["train", config, "--out", str(folder / "run"), "seed=4"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_a_configuration_that_came_to_nothing_is_replaced(folder, tmp_path):
    """A run stopped by its own configuration does not keep the folder from the mended one; what it left does."""
    first, second = load(folder / "config.yaml", ["trainer.steps=1"]), load(folder / "config.yaml", ["trainer.steps=2"])
    Run.create(tmp_path, first)
    (tmp_path / "environment.json").write_text("{}")
    assert load(Run.create(tmp_path, second).folder / "config.yaml") == second
    (tmp_path / "faults").mkdir()
    with pytest.raises(ConfigError, match="another configuration"):
        Run.create(tmp_path, first)
    assert load(tmp_path / "config.yaml") == second


@pytest.mark.slow
@pytest.mark.parametrize("head", ["{name: voxels, resolution: 32, width: 4}"])
def test_the_other_heads_train_by_override(folder, tmp_path, head):
    override = f"model.head={head}"
    assert cli.main(["train", str(folder / "config.yaml"), "--out", str(tmp_path / "run"), override]) == 0
    run = Run.open(tmp_path / "run")
    model = run.model()
    batch = next(run.experiment.batches(run.experiment.dataset("test"), 2))
    predictions = model.predict(batch)
    assert predictions[0].voxels.shape == (32, 32, 32)
    assert np.isfinite(predictions[0].voxels.numpy()).all()


@pytest.mark.slow
def test_only_the_train_split_is_augmented(folder, tmp_path):
    steps = "[{name: rotate, degrees: 20}, {name: color, hue: 0.1}, {name: crop, size: [32, 32]}]"
    overrides = [f"augment={{steps: {steps}, fill: 0.5}}", "trainer.steps=2"]
    assert cli.main(["train", str(folder / "config.yaml"), "--out", str(tmp_path / "run"), *overrides]) == 0
    plain, augmented = Run.open(folder / "run").experiment, Run.open(tmp_path / "run").experiment
    assert plain.augmentation() is None
    augment = augmented.augmentation()
    assert augment.fill == 0.5
    assert [type(step).__name__ for step in augment.steps] == ["Rotate", "ColorJitter", "Crop"]
    first, second = (experiment.dataset("test")[0]["image"] for experiment in (plain, augmented))
    assert torch.equal(first, second)
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (folder / "run", tmp_path / "run")]
    losses = [json.loads(lines[1])["loss"] for lines in logs]  # the first one does not depend on the image yet
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "override, message",
    [
        ("augment={steps: [{name: rotat}]}", "augment.steps[0].name: unknown name 'rotat'"),
        ("augment={steps: [{name: flip}, {name: rotate, angle: 3}]}", "unknown key of 'rotate'"),
        ("augment={fill: 1}", "augment needs steps"),
        ("augment={steps: [], fil: 1}", "did you mean 'fill'"),
        ("trainer.stepps=3", "did you mean 'steps'"),
        ("model.head.name=voxel", "did you mean 'voxels'"),
        ("data.points_per_item=many", "points_per_item"),
        ("prepare.shapes=3", "unknown key of"),
        ("evaluation.protocols=[meshrccn]", "unknown protocol 'meshrccn'"),
        ("seeed=1", "did you mean 'seed'"),
    ],
)
def test_faults_of_a_configuration_are_named(tmp_path, capsys, override, message):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "data")))
    code = cli.main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), override])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists()  # no data was made before the fault was found


def test_open_says_what_is_not_a_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        Run.open(tmp_path)


def test_importing_the_package_is_fast_and_light():
    code = (
        "import sys, time; start = time.perf_counter(); import vision3dgen; took = time.perf_counter() - start; "
        "heavy = [m for m in ('torch', 'numpy', 'open3d', 'torch_geometric') if m in sys.modules]; print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_needs_no_torch():
    code = "import sys; from vision3dgen import cli; cli._parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize("watching", [[], ["--detect-anomaly", "--deterministic"]])
def test_a_step_that_fails_is_kept_and_done_again(folder, tmp_path, capsys, watching):
    config, run = str(folder / "config.yaml"), tmp_path / "run"
    assert cli.main(["train", config, "--out", str(run), "trainer.optimizer.lr=1e30", *watching]) == 1
    said = capsys.readouterr().err
    assert "step 2: " in said
    assert "the output of 'head." in said
    assert not torch.are_deterministic_algorithms_enabled()
    assert cli.main(["doctor", str(run / "faults" / "step_00000002"), "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert "the first that is not finite: the output of 'head." in told
    assert "1 of 1: 0" in told  # the items of the batch


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", [None, "tiny"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_repository_builds(path, preset):
    config = load(path, preset=preset)
    for own in (variants(config) if "runs" in config else {"": config}).values():
        construct(Experiment, own).check()


@pytest.mark.slow
def test_view_leaves_pictures_where_there_is_no_display(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert cli.main(["view", str(folder / "run"), "--items", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert (tmp_path / "shapes.png").stat().st_size > 1000
    assert "shapes.png" in capsys.readouterr().out
