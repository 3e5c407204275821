"""Models built from parts by name, and evaluations chosen by name, whatever the task."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch
from torch import nn

from vision3dgen import cli, experiment
from vision3dgen.config import ConfigError, Named, construct, load
from vision3dgen.experiment import Experiment, Run, build_parts
from vision3dgen.metrics import EVALUATIONS, Evaluator


class Trunk(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.channels = [width, 2 * width]


class Pyramid(nn.Module):
    def __init__(self, trunk: nn.Module, outputs: int = 5):
        super().__init__()
        self.trunk, self.channels = trunk, [outputs] * 2


class Top(nn.Module):
    def __init__(self, channels: list[int], hidden: int = 2):
        super().__init__()
        self.channels = channels


class Plain(nn.Module):
    def __init__(self, hidden: int = 2):
        super().__init__()


class Assembly(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module | None = None, classes: int = 7):
        super().__init__()
        self.backbone, self.head, self.classes = backbone, head, classes


class Count(nn.Module):
    """Predicts how many pixels of an image are over a threshold it learns."""

    parts = ("model",)

    def __init__(self, start: float = 0.5):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(start))

    def loss(self, batch, part="model"):
        return {"loss": (batch["image"].mean() - self.threshold).square()}

    def validation_metrics(self, batch):
        return {"error": (batch["image"].mean((1, 2, 3)) - self.threshold).abs()}

    @torch.no_grad()
    def predict(self, batch):
        return (batch["image"] > self.threshold).sum((1, 2, 3))


class Pictures:
    def __init__(self, split: str, count: int = 6):
        self.items = torch.rand(count, 1, 3, 5, generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {"image": self.items[index], "label": torch.tensor(index % 2), "id": f"{index:02d}"}


@dataclass(frozen=True)
class Counted:
    total: int
    n_failed: int

    def to_dict(self):
        return {"total": self.total, "n_failed": self.n_failed}

    def to_markdown(self):
        return f"counted {self.total}"


@dataclass(frozen=True, kw_only=True)
class CountEvaluator(Evaluator):
    failed: int = 0

    @property
    def names(self):
        return ["counts"]

    def score(self, name, batches, predict, out, *, seed, about):
        rows = []
        for batch in batches:
            rows += [{"id": i, "count": int(c)} for i, c in zip(batch["id"], predict(batch))]
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Counted(sum(row["count"] for row in rows), self.failed)


CONFIG = """\
data: {name: pictures}
model: {name: count}
loader: {batch_size: 2}
trainer: {steps: 2, validation: {metric: error, mode: min, every: 1}, optimizer: {name: sgd, lr: 0.1}}
evaluation: {name: counts, batch_size: 4}
"""


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setitem(experiment.PARTS, "trunk", {"trunk": Trunk})
    monkeypatch.setitem(experiment.PARTS, "backbone", {"trunk": Trunk, "pyramid": Pyramid})
    monkeypatch.setitem(experiment.PARTS, "head", {"top": Top, "plain": Plain})
    monkeypatch.setitem(experiment.DATASETS, "pictures", Pictures)
    monkeypatch.setitem(experiment.MODELS, "count", Count)
    monkeypatch.setitem(EVALUATIONS, "counts", CountEvaluator)
    return {"assembly": Assembly, "plain": Plain}


def test_parts_are_built_first_and_channels_reach_those_that_take_them(tables):
    node = {"name": "assembly", "backbone": {"name": "trunk", "width": 11}, "head": {"name": "top", "hidden": 3}}
    model = build_parts(node, tables)
    assert model.head.channels == model.backbone.channels == [11, 22]
    assert build_parts({**node, "head": {"name": "plain"}}, tables).head.__class__ is Plain
    assert build_parts({**node, "head": None}, tables).head is None
    assert build_parts({"name": "assembly", "backbone": {"name": "trunk"}, "classes": 13}, tables).classes == 13
    assert isinstance(build_parts({"name": "plain", "hidden": 5}, tables), Plain)


def test_parts_have_parts(tables):
    node = {
        "name": "assembly",
        "backbone": {"name": "pyramid", "trunk": {"name": "trunk", "width": 7}},
        "head": {"name": "top"},
    }
    model = build_parts(node, tables)
    assert model.backbone.trunk.channels == [7, 14]
    assert model.head.channels == [5, 5]  # of the pyramid, not of its trunk


@pytest.mark.parametrize(
    "node, message",
    [
        ({"name": "assembly"}, "model: 'assembly' needs backbone: torch.nn.modules.module.Module"),
        ({"name": "assembly", "backbone": {"name": "trunc"}}, r"model\.backbone\.name: .* \(did you mean 'trunk'\?\)"),
        ({"name": "assembly", "backbone": "trunk"}, r"model\.backbone: must be a mapping, got 'trunk'"),
        ({"name": "assembly", "backbone": {"width": 3}}, r"model\.backbone: needs a name; choose from"),
        ({"name": "plain", "backbone": {"name": "trunk"}}, r"model\.backbone: unknown key of 'plain'; it takes hidden"),
        ({"name": "assembly", "backbone": {"name": "pyramid", "trunk": {"name": "trunk", "wide": 1}}},
         r"model\.backbone\.trunk\.wide: unknown key of 'trunk'"),
        ({"name": "assembly", "backbone": {"name": "trunk"}, "head": {"name": "top", "channels": [1]}},
         r"model\.head\.channels: is given to 'top' by the program"),
    ],
)  # fmt: skip
def test_faults_of_parts_are_named(tables, node, message):
    with pytest.raises(ConfigError, match=message):
        build_parts(node, tables, where="model")


def test_a_run_of_another_task_trains_and_is_evaluated(tables, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    run = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--out", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--device", "cpu"]) == 0
    model = Run.open(run).model()
    total = int(sum((item["image"] > model.threshold).sum() for item in Pictures("test")))
    assert capsys.readouterr().out == f"counted {total}\n"
    assert json.loads((run / "evaluation" / "counts_test.json").read_text()) == {"total": total, "n_failed": 0}
    assert len((run / "evaluation" / "counts_test.jsonl").read_text().splitlines()) == 6
    assert cli.main(["evaluate", str(run), "--split", "val", "--device", "cpu"]) == 0
    assert (run / "evaluation" / "counts_val.json").exists()

    assert cli.main(["evaluate", str(run), "--protocol", "default", "--device", "cpu"]) == 2
    assert "unknown protocol 'default'; choose from ['counts']" in capsys.readouterr().err
    for command in (["view", str(run)], ["reconstruct", str(run), "a.png", "--out", str(tmp_path)]):
        assert cli.main([*command, "--device", "cpu"]) == 2
        assert f"{command[0]} needs a run that predicts shapes" in (error := capsys.readouterr().err)
        assert "evaluated as 'counts'" in error


def test_items_that_failed_give_exit_code_1(tables, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("batch_size: 4", "batch_size: 4, failed: 2"))
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 1


@pytest.mark.parametrize(
    "evaluation, message",
    [
        ("{name: count}", r"line 5: evaluation.name: unknown name 'count' \(str\) \(did you mean 'counts'"),
        ("{name: counts, repeats: 2}", r"evaluation.repeats: unknown key of 'counts'"),
        ("{protocols: [meshrccn]}", r"evaluation: 'shapes': unknown protocol 'meshrccn' \(did you mean 'meshrcnn'"),
        ("shapes", r"evaluation: expected Evaluator|evaluation: expected a mapping"),
    ],
)
def test_faults_of_an_evaluation_are_named(tables, tmp_path, evaluation, message):
    text = CONFIG.replace("{name: counts, batch_size: 4}", evaluation)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        construct(Experiment, load(tmp_path / "config.yaml"))


def test_a_parameter_marked_as_named_chooses_its_class_by_name():
    @dataclass
    class Cat:
        legs: int = 4

    @dataclass
    class Bird:
        wings: int = 2

    def shelter(animal: Annotated[object, Named({"cat": Cat, "bird": Bird}, "cat")]):
        return animal

    assert construct(shelter, {"animal": {"name": "bird", "wings": 3}}) == Bird(3)
    assert construct(shelter, {"animal": {"legs": 3}}) == Cat(3)
    with pytest.raises(ConfigError, match=r"animal\.wings: unknown key of 'cat'"):
        construct(shelter, {"animal": {"wings": 3}})
