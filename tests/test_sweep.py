"""Sweeps: the space is held against the configuration, tables and pictures; with Ray, the whole way."""

import gzip
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from vision3dgen import cli
from vision3dgen.config import ConfigError, load, load_flat
from vision3dgen.engine import Choice, Uniform, latest, read_metrics
from vision3dgen.experiment import Run
from vision3dgen.files import read_jsonl
from vision3dgen.sweep import Source, Sweep, Trial, as_overrides, draw, read_space, table

CONFIG = """\
data: {name: mnist, root: ROOT, part: test, fractions: {train: 0.5, val: 0.5}}
model: {name: linear_classifier, loss: softmax}
loader: {batch_size: 8}
trainer:
  steps: 12
  optimizer: {name: sgd, lr: 1e-2}
  validation: {metric: accuracy, every: 2}
  record: {log_every: 4, checkpoint_every: 4, keep: 1}
evaluation: {name: classes}
"""
SPACE = """\
trainer.optimizer.lr: {log_uniform: [1e-5, 1.0]}
trainer.optimizer.weight_decay: {choice: [0, 0.1]}   # a key that the file does not have
"""

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "vision3dgen[cluster]"'
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Forty pictures in MNIST's format: class k is a bright row k."""
    folder = tmp_path_factory.mktemp("mnist")
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 60, (40, 28, 28), dtype=np.uint8)
    images[np.arange(40), 2 * labels] = 250
    for name, head, content in (
        ("images-idx3", struct.pack(">4I", 2051, 40, 28, 28), images),
        ("labels-idx1", struct.pack(">2I", 2049, 40), labels),
    ):
        with gzip.open(folder / f"t10k-{name}-ubyte.gz", "wb") as file:
            file.write(head + content.tobytes())
    return folder


@pytest.fixture
def files(root, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("ROOT", str(root)))
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def source(files: Path) -> Source:
    return Source(files / "config.yaml")


# ---------------------------------------------------------------------------------------------------- pure parts


def test_a_space_is_read_and_its_values_become_overrides(files):
    space = read_space(files / "space.yaml", source(files))
    assert space == {
        "trainer.optimizer.lr": Uniform(1e-5, 1, log=True),
        "trainer.optimizer.weight_decay": Choice((0, 0.1)),
    }
    values = {"trainer.optimizer.lr": 3e-5, "model": {"name": "fully_connected", "hidden": [7]}, "seed": 3}
    config = source(files).config(values)
    assert config["trainer"]["optimizer"] == {"name": "sgd", "lr": 3e-5}
    assert config["model"] == {"name": "fully_connected", "hidden": [7]}
    assert load(files / "config.yaml", as_overrides(values)) == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("trainer.optimizer.lrr: {uniform: [0.1, 1]}", "line 1: trainer.optimizer.lrr: .*did you mean 'lr'"),
        ("a: {choice: [1]}", "line 1: a: .*unknown key"),
        (
            "seed: {integer: [0, 3]}\nmodel.name: {choice: [linear_classifier, linear]}",
            "line 2: model.name: .*unknown name",
        ),
        ("trainer.optimizer.lr: {uniform: [0, 1]}", "lr must be > 0"),
        ("loader.batch_size: {uniform: [1, 8]}", "expected int"),
        ("loader.batch_size: {intger: [1, 8]}", "did you mean 'integer'"),
        ("prepare.views: {integer: [1, 8]}", "prepare is not searched"),
        ("trainer.optimizer..lr: {uniform: [0.1, 1]}", "a key must be a word"),
        ("seed: {integer: [0, 1]}\nseed: {integer: [0, 2]}", "given twice"),
    ],
)
def test_a_fault_of_the_space_is_named_with_its_line(files, text, message):
    (files / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_space(files / "space.yaml", source(files))


def test_a_flat_file_keeps_its_dotted_keys(tmp_path):
    (tmp_path / "flat.yaml").write_text("a.b[0].c: 1e-3\ninherit: x\n")
    assert load_flat(tmp_path / "flat.yaml") == {"a.b[0].c": 1e-3, "inherit": "x"}
    with pytest.raises(ConfigError, match="a key must be a word"):
        load(tmp_path / "flat.yaml")


def test_a_folder_holds_one_sweep(files):
    first = Sweep.create(files / "out", source(files), files / "space.yaml", trials=3, seed=5)
    assert (first.metric, first.mode, first.search) == ("val/accuracy", "max", "random")
    assert {trial.status for trial in first.trials()} == {"waiting"}
    longer = Sweep.create(files / "out", source(files), files / "space.yaml", trials=5, seed=5)
    assert longer.plan[:3] == first.plan
    with pytest.raises(ConfigError, match="with seed 5, not 6"):
        Sweep.create(files / "out", source(files), files / "space.yaml", trials=3, seed=6)
    (files / "space.yaml").write_text("seed: {integer: [0, 3]}")
    with pytest.raises(ConfigError, match="with space"):
        Sweep.create(files / "out", source(files), files / "space.yaml", trials=3, seed=5)
    (files / "space.yaml").write_text(SPACE)
    with pytest.raises(ConfigError, match="another configuration"):
        Sweep.create(files / "out", Source(files / "config.yaml", ["seed=9"]), files / "space.yaml", trials=3, seed=5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"trials": 2, "search": "randm"}, "did you mean 'random'"),
        ({}, "needs its number of trials"),
        ({"trials": 2, "mode": "top"}, "unknown mode"),
        ({"search": "grid"}, "lr: a grid over a range"),
        ({"trials": 0}, "at least 1 trial"),
    ],
)
def test_settings_are_checked_before_anything_is_written(files, settings, message):
    with pytest.raises(ValueError, match=message):
        Sweep.create(files / "out", source(files), files / "space.yaml", **settings)
    assert not (files / "out").exists()


def test_a_grid_has_as_many_trials_as_combinations(files):
    (files / "space.yaml").write_text("seed: {integer: [0, 2]}\nmodel.loss: {choice: [softmax, hinge]}")
    made = Sweep.create(files / "out", source(files), files / "space.yaml", search="grid")
    assert len(made.plan) == 6
    with pytest.raises(ValueError, match="6 combinations, not 4 trials"):
        Sweep.create(files / "out", source(files), files / "space.yaml", search="grid", trials=4)


def test_a_sweep_needs_a_metric(files):
    config = load(files / "config.yaml", ["trainer.validation=null"])
    assert config["trainer"]["validation"] is None
    without = Source(files / "config.yaml", ["trainer.validation=null"])
    with pytest.raises(ConfigError, match="needs a metric"):
        Sweep.create(files / "out", without, files / "space.yaml", trials=1)
    with pytest.raises(ConfigError, match=r"has no trainer\.validation"):
        Sweep.create(files / "out", without, files / "space.yaml", trials=1, metric="val/loss")
    assert Sweep.create(files / "out", without, files / "space.yaml", trials=1, metric="loss").metric == "loss"


def test_a_trial_is_recorded_from_its_log(files):
    made = Sweep.create(files / "out", source(files), files / "space.yaml", trials=4)
    for number, values in enumerate(([0.2, 0.9, None, 0.4], [], [0.95])):
        place = made.place(number)
        place.mkdir(parents=True)
        lines = [json.dumps({"step": 3 * step, "val/accuracy": v}) + "\n" for step, v in enumerate(values, start=1)]
        (place / "metrics.jsonl").write_text("".join(lines) + json.dumps({"step": 99, "loss": 1.0}) + "\n")
    assert made.record(0, "finished") == Trial(0, made.plan[0], "finished", 0.9, 99)
    assert made.record(1, "failed", "ValueError: no | luck\nat all") == made.trial(1)
    made.record(2, "stopped")
    assert [trial.number for trial in made.trials()] == [2, 0, 1, 3]
    made.write()
    rows = (files / "out" / "table.md").read_text().splitlines()
    assert rows[0] == "| trial | val/accuracy | trainer.optimizer.lr | trainer.optimizer.weight_decay | step | status |"
    assert rows[2].startswith("| 2 | 0.95 | ")
    assert rows[4].endswith(r"| 99 | failed: ValueError: no \| luck at all |")
    assert rows[5].endswith("| 0 | waiting |")
    assert [entry["number"] for entry in read_jsonl(files / "out" / "table.jsonl")] == [2, 0, 1, 3]
    assert (files / "out" / "trials.png").stat().st_size > 5_000


def test_the_lowest_is_best_where_less_is_better(files):
    made = Sweep.create(files / "out", source(files), files / "space.yaml", trials=2, metric="loss", mode="min")
    for number, values in enumerate(([3.0, 1.0, 2.0], [0.5, 4.0])):
        made.place(number).mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": value}) + "\n" for step, value in enumerate(values)]
        (made.place(number) / "metrics.jsonl").write_text("".join(lines))
        made.record(number, "finished")
    assert [(trial.number, trial.value) for trial in made.trials()] == [(1, 0.5), (0, 1.0)]


def test_the_picture_takes_choices_of_any_kind(tmp_path):
    space = {"a": Choice(({"name": "sgd"}, None, [1, 2])), "b": Choice((1, 2.5))}
    trials = [
        Trial(0, {"a": {"name": "sgd"}, "b": 1}, "finished", 0.5, 3),
        Trial(1, {"a": [1, 2], "b": 2.5}, "stopped", 0.7, 3),
        Trial(2, {"a": None, "b": 1}, "failed", None, 0, "ValueError: x"),
    ]
    draw(trials, space, "val/iou", tmp_path / "trials.png")
    assert (tmp_path / "trials.png").stat().st_size > 5_000
    assert '{"name": "sgd"}' in table(trials, "val/iou")


def test_without_ray_the_error_says_what_to_install(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["sweep", str(files / "config.yaml"), "--space", str(files / "space.yaml"), "--trials", "2"]
    assert cli.main([*arguments, "--out", str(files / "out")]) == 2
    assert 'pip install "vision3dgen[cluster]"' in capsys.readouterr().err


def test_training_reports_each_record_once_its_checkpoint_is_there(files, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    heard = []

    def report(record):
        newest = latest(files / "run")
        heard.append((dict(record), newest.name if newest else None))

    Run.create(files / "run", load(files / "config.yaml")).train(report=report)
    assert [record for record, _ in heard] == read_metrics(files / "run")
    assert {record["step"]: name for record, name in heard}[12] == "step_00000012"
    assert {record["step"]: name for record, name in heard}[4] == "step_00000004"


# ------------------------------------------------------------------------------------------------------ with Ray


def states(made: Sweep) -> list[list[float]]:
    """The validation curve of every trial, by number."""
    return [
        [entry["val/accuracy"] for entry in read_metrics(made.place(number)) if "val/accuracy" in entry]
        for number in range(len(made.plan))
    ]


@with_ray
@pytest.mark.slow
def test_a_sweep_runs_is_resumed_and_does_not_depend_on_parallelism(files, capsys):
    arguments = ["sweep", str(files / "config.yaml"), "--space", str(files / "space.yaml"), "--seed", "3"]
    assert cli.main([*arguments, "--trials", "3", "--out", str(files / "a")]) == 0
    told = capsys.readouterr().out
    assert "3/3 after" in told
    a = Sweep.create(files / "a", source(files), files / "space.yaml", trials=3, seed=3)
    assert [trial.status for trial in a.trials()] == ["finished"] * 3
    assert all(trial.step == 12 for trial in a.trials())
    best = a.trials()[0]
    assert f"| {best.number} | {best.value:.5g} |" in told
    run = Run.open(a.place(best.number))  # a run folder like any other
    assert run.model() is not None

    # A trial that is there already is not run again, and one more is
    before = (a.place(0) / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main([*arguments, "--trials", "4", "--out", str(files / "a")]) == 0
    assert (a.place(0) / "metrics.jsonl").stat().st_mtime_ns == before
    assert "4/4 after" in capsys.readouterr().out

    # One after the other gives what two at once gave
    one = ["--cpus-per-trial", str(os.cpu_count()), "--trials", "4", "--out", str(files / "b")]
    assert cli.main([*arguments, *one]) == 0
    a = Sweep.create(files / "a", source(files), files / "space.yaml", trials=4, seed=3)
    b = Sweep.create(files / "b", source(files), files / "space.yaml", trials=4, seed=3)
    assert a.plan == b.plan
    for left, right in zip(states(a), states(b), strict=True):
        assert left == pytest.approx(right)
        assert len(left) == 6


@with_ray
@pytest.mark.slow
def test_a_trial_that_fails_is_listed_and_the_others_go_on(files, capsys):
    # A batch of 64 is more than the 20 items of the training split: a fault that only the data shows
    (files / "space.yaml").write_text("loader.batch_size: {choice: [4, 64]}\nseed: {choice: [1]}")
    arguments = ["sweep", str(files / "config.yaml"), "--space", str(files / "space.yaml"), "--search", "grid"]
    assert cli.main([*arguments, "--out", str(files / "out")]) == 1
    told = capsys.readouterr().out
    assert "| 64 | 1 | 0 | failed: " in told
    assert "fewer than one batch of 64" in told
    made = Sweep.create(files / "out", source(files), files / "space.yaml", search="grid")
    assert [trial.status for trial in made.trials()] == ["finished", "failed"]
    assert "Traceback" in (made.place(1) / "error.txt").read_text()


@with_ray
@pytest.mark.slow
def test_a_halving_search_stops_the_worst_and_goes_on_where_it_was(files, capsys):
    # Learning rates of 1e-9 learn nothing; on one CPU at a time the good ones come first and set the bar
    (files / "space.yaml").write_text("trainer.optimizer.lr: {choice: [1e-2, 1e-9]}")
    options = ["--search", "halving", "--trials", "6", "--cpus-per-trial", str(os.cpu_count())]
    arguments = ["sweep", str(files / "config.yaml"), "--space", str(files / "space.yaml"), *options]
    assert cli.main([*arguments, "--out", str(files / "out")]) == 0
    made = Sweep.create(files / "out", source(files), files / "space.yaml", trials=6, search="halving")
    by_status = {status: [t for t in made.trials() if t.status == status] for status in ("finished", "stopped")}
    assert len(by_status["finished"]) + len(by_status["stopped"]) == 6
    assert by_status["stopped"]
    assert all(trial.step < 12 for trial in by_status["stopped"])
    assert all(trial.step == 12 for trial in by_status["finished"])
    capsys.readouterr()
    longer = [*arguments, "--trials", "7", "--out", str(files / "out")]
    assert cli.main(longer) == 0
    told = capsys.readouterr().out
    assert "7/7 after" in told
    assert "6/7 after" not in told
