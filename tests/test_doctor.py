"""Doctor: each fault it should find is planted, and sound things are called sound."""

import copy
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen import cli, doctor
from vision3dgen.doctor import Finding, Subject, environment, training
from vision3dgen.engine import Data, Optimizer, Trainer
from vision3dgen.engine.diagnose import LoadingParts
from vision3dgen.experiment import Experiment, Loader
from vision3dgen.viz import offscreen


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------- environment


def fake_packages(monkeypatch: pytest.MonkeyPatch, requires: list[str], versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    monkeypatch.setattr(metadata, "version", version)


def test_a_package_out_of_range_and_a_missing_one_are_faults_with_their_pip_line(monkeypatch):
    requires = [
        "numpy>=1.26",
        "scipy<2,>=1.11",
        "rich>=13",
        'winonly>=1; sys_platform == "win32"',
        'x>1; extra == "dev"',
    ]
    fake_packages(monkeypatch, requires, {"numpy": "1.25.9", "rich": "15.0"})
    old, missing = environment.check_dependencies()
    assert (old.verdict, old.fix) == ("fail", 'pip install "numpy>=1.26"')
    assert "1.25.9 is installed" in old.message
    assert (missing.verdict, missing.fix) == ("fail", 'pip install "scipy<2,>=1.11"')
    fake_packages(monkeypatch, requires, {"numpy": "2.0.0", "rich": "15.0", "scipy": "1.12.0rc1"})
    (sound,) = environment.check_dependencies()
    assert sound == Finding("dependencies", "ok", "3 packages within their ranges")


def test_optional_packages_are_no_fault_when_absent_and_one_when_broken(monkeypatch, tmp_path):
    requires = ['matplotlib>=3.8; extra == "viz"', 'ray>=2.40; extra == "cluster"', 'sphinx; extra == "docs"']
    fake_packages(monkeypatch, requires, {"matplotlib": "3.7.0"})
    old, absent = environment.check_optional()
    assert (old.name, old.verdict, old.fix) == ("matplotlib", "warn", 'pip install "vision3dgen[viz]"')
    assert (absent.name, absent.verdict, absent.fix) == ("ray", "info", 'pip install "vision3dgen[cluster]"')
    (tmp_path / "brokenpackage.py").write_text("raise ImportError('libnothing.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    fake_packages(monkeypatch, ['brokenpackage; extra == "viz"'], {"brokenpackage": "1.0"})
    (broken,) = environment.check_optional()
    assert broken.verdict == "fail"
    assert "libnothing.so" in broken.message


def test_an_old_python_is_a_fault(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    (found,) = environment.check_python()
    assert found.verdict == "fail"
    assert "vision3dgen needs >=3.11" in found.message


def test_a_driver_that_torch_does_not_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "_driver", lambda: None)
    assert environment.check_cuda()[0].verdict == "info"
    monkeypatch.setattr(environment, "_driver", lambda: "NVIDIA driver 535.1")
    for cuda, part in ((None, "built without CUDA"), ("12.8", "torch for CUDA 12.8 finds no device")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        (found,) = environment.check_cuda()
        assert found.verdict == "warn"
        assert part in found.message
        assert found.fix


def test_open3d_that_cannot_draw_is_a_warning_with_the_apt_line(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda name: "0.20.0" if name == "open3d-cpu" else None)

    def broken(*_: Any, **__: Any) -> Any:
        raise offscreen.OffscreenError("libEGL.so.1: cannot open shared object file")

    monkeypatch.setattr(offscreen, "draw", broken)
    (found,) = environment.check_open3d()
    assert found.verdict == "warn"
    assert "libEGL.so.1" in found.message
    assert found.fix is not None
    assert "apt-get install" in found.fix
    assert "libegl1" in found.fix
    for share, verdict in ((256, "ok"), (4096, "warn")):  # as many opaque pixels of 64 x 64
        picture = np.zeros((64, 64, 4), np.uint8)
        picture.reshape(-1, 4)[:share, 3] = 255
        monkeypatch.setattr(offscreen, "draw", lambda *_, drawn=picture, **__: [drawn])
        assert environment.check_open3d()[0].verdict == verdict


def test_more_threads_than_cores_and_little_disk_and_memory_are_warnings(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10, "total": 2**34})())
    for check in (environment.check_threads, environment.check_disk, environment.check_memory):
        (found,) = check()
        assert found.verdict == "warn"
        assert found.fix


def test_the_makefile_installs_the_libraries_that_doctor_names():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"OPEN3D_LIBRARIES := {environment.OPEN3D_LIBRARIES}\n" in makefile


# ---------------------------------------------------------------------------------------------------- findings


def test_findings_are_printed_with_their_fix_and_written_as_json(tmp_path, capsys):
    findings = [
        Finding("one", "ok", "fine [not markup]"),
        Finding("two", "warn", "bad\nsecond line", "pip install x[y]", {"losses": (1.0, float("nan"))}),
    ]
    assert not doctor.is_sound(findings)
    assert doctor.is_sound(findings[:1])
    doctor.print_findings(findings)
    text = capsys.readouterr().out
    assert "fine [not markup]" in text
    assert "fix: pip install x[y]" in text
    assert "second line" in text
    doctor.write_findings(findings, tmp_path / "doctor.json")
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written[1]["values"]["losses"] == [1.0, None]
    assert written[0] == {"name": "one", "verdict": "ok", "message": "fine [not markup]", "fix": None, "values": {}}


# -------------------------------------------------------------------------------------------------- data folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor") / "data"
    arguments = ["prepare", "procedural", str(root), "--shapes-per-category", "3", "--categories", "table", "sofa"]
    assert cli.main([*arguments, "--views", "2", "--points", "500"]) == 0
    return root


@pytest.mark.slow
def test_a_whole_folder_is_sound_and_each_fault_is_named(data, tmp_path, capsys):
    assert cli.main(["doctor", str(data), "--out", str(tmp_path)]) == 0
    findings = {f["name"]: f for f in json.loads((tmp_path / "doctor.json").read_text())}
    assert findings["image"]["message"] == "12 items of 6 models read"
    assert findings["mesh"]["message"] == "6 items of 6 models read"
    picture = next((data / "ShapeNetRendering").rglob("01.png"))
    whole = picture.read_bytes()
    try:
        picture.write_bytes(whole[:100])
        assert cli.main(["doctor", str(data)]) == 1
        text = " ".join(capsys.readouterr().out.split())
        assert "fail image: 1 problems in 12 items" in text
        assert picture.parent.parent.name in text
        assert "its sha256 differs" in text
    finally:
        picture.write_bytes(whole)


def test_a_folder_of_something_else_is_a_fault(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "none of the public folders" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- experiment


class Classifier(nn.Module):
    """Ten classes; `fault` plants one."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        self.hidden, self.out = nn.Linear(5, 64), nn.Linear(64, 10)
        if fault == "confident":
            nn.init.normal_(self.out.bias, std=9.0)
        if fault == "unused":
            self.extra = nn.Linear(5, 3)

    def expected_initial_loss(self, batch: Any) -> float:
        return float(np.log(10))

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        logits = self.out(self.hidden(batch["x"]).relu())
        label = batch["label"]
        if self.fault == "shuffled":
            label = torch.randint(10, label.shape)
        if self.fault == "leak":
            logits = logits + 5 * F.one_hot(label, 10)
        if self.fault == "nan":
            logits = logits / 0
        return {"loss": F.cross_entropy(logits, label)}


class Items:
    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(5, generator=generator), "label": torch.randint(10, (), generator=generator)}


def subject(fault: str, folder: Path, *, lr: float = 3e-3, steps: int = 60) -> Subject:
    experiment = Experiment({}, {}, {}, Loader(16))
    trainer = Trainer(Classifier(fault), Data(Items(), 16), folder, optimizer=Optimizer("adam", lr=lr), steps=10)
    return Subject(experiment, trainer, steps=steps)


@pytest.mark.parametrize(
    "fault, verdict, part",
    [
        ("", "ok", "in theory 2.303"),
        ("confident", "warn", "confident and wrong"),
        ("leak", "warn", "knows too much"),
        ("nan", "fail", "before any update"),
    ],
)
def test_the_initial_loss_is_held_against_theory(tmp_path, fault, verdict, part):
    (found,) = training.check_initial_loss(subject(fault, tmp_path))
    assert found.verdict == verdict
    assert part in found.message


def test_a_model_that_states_nothing_is_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "expected_initial_loss", lambda self, batch: None)
    (found,) = training.check_initial_loss(subject("leak", tmp_path))
    assert found.verdict == "info"


@pytest.mark.parametrize(
    "fault, lr, verdicts",
    [
        ("", 0.02, ["ok", "ok"]),
        ("shuffled", 0.02, ["fail", "ok"]),
        ("nan", 0.02, ["fail", "warn"]),
        ("unused", 0.02, ["ok", "warn"]),
        ("", 1e-4, ["fail", "ok"]),
    ],
)
def test_overfitting_finds_models_that_do_not_learn(tmp_path, fault, lr, verdicts):
    found = training.check_overfitting(subject(fault, tmp_path, lr=lr))
    assert [finding.verdict for finding in found][:2] == verdicts
    if fault == "unused":
        assert "2 parameters get no gradient: extra.weight, extra.bias" in found[1].message


@pytest.mark.parametrize("lr, verdict", [(0.01, "ok"), (1e-6, "warn"), (5.0, "fail")])
def test_the_learning_rate_is_held_against_a_range_test(tmp_path, lr, verdict):
    (found,) = training.check_learning_rate(subject("", tmp_path, lr=lr, steps=100))
    assert found.verdict == verdict, found.message
    assert (found.fix is None) == (verdict == "ok")
    if found.fix:
        assert 1e-3 < float(found.fix.partition("=")[2]) < 1


def test_who_waits_for_whom(tmp_path, monkeypatch):
    rates = {0: 10.0, 1: 10.0, 2: 30.0}
    monkeypatch.setattr(training, "loading_rate", lambda data, workers, seed: rates[workers])
    monkeypatch.setattr(training, "loading_parts", lambda data, seed: LoadingParts(0.0625, 0.03125))
    held = subject("", tmp_path)
    for step, verdict, part in ((5.0, "ok", "the loader waits"), (20.0, "warn", "training waits")):
        monkeypatch.setattr(training, "step_rate", lambda trainer, batch, rate=step: rate)
        (found,) = training.check_data_loading(held)
        assert found.verdict == verdict
        assert part in found.message
        loader = {0: 160.0, 1: 160.0, 2: 480.0}
        assert found.values == {"loader": loader, "training": 16 * step, "read": 0.0625, "join": 0.03125}
        assert "an item takes 62.50 ms to read and 31.25 ms to join" in found.message
    assert "the bottleneck is reading items" in found.message
    assert found.fix == "loader.num_workers=2"
    rates[2] = 10.0
    monkeypatch.setattr(training, "loading_parts", lambda data, seed: LoadingParts(0.01, 0.02))
    (found,) = training.check_data_loading(held)
    assert "the bottleneck is joining them into batches" in found.message
    assert "more workers do not help" in found.fix


def test_memory_by_batch_size_is_linear(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_free_bytes", lambda device: 10**9)
    (found,) = training.check_memory(subject("", tmp_path))
    # autograd keeps the input, the hidden layer after its ReLU, the log-probabilities, and labels of 8 bytes
    assert found.values["bytes_per_item"] == 4 * (5 + 64 + 10) + 8
    two, sixteen = found.values["measured"]
    assert (two["batch_size"], sixteen["batch_size"]) == (2, 16)
    rest = 10**9 - sum(sixteen[key] for key in ("parameters", "gradients", "optimizer", "buffers"))
    assert found.values["largest_batch"] == pytest.approx(rest / found.values["bytes_per_item"], rel=1e-3)
    monkeypatch.setattr(training, "_free_bytes", lambda device: 10)
    assert training.check_memory(subject("", tmp_path))[0].verdict == "warn"


class Normalized(nn.Module):
    """Maps of 2 x 2 under batch normalization, which in training and in evaluation are not quite the same network."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm, self.out = nn.Conv2d(1, 8, 1), norm, nn.Linear(8, 10)

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        maps = self.first(batch["x"][:, None, None, :4].unflatten(3, (2, 2))[:, :, 0])
        return {"loss": F.cross_entropy(self.out(self.norm(maps).mean((2, 3))), batch["label"])}


@pytest.mark.parametrize(
    "norm, batch_size, verdict, part",
    [
        (nn.BatchNorm2d(8), 16, "warn", "variances are up to 1.6% larger"),
        (nn.BatchNorm2d(8), 25, "ok", "of 100 values a channel or more (norm)"),
        (nn.BatchNorm2d(8, track_running_stats=False), 16, "info", "no layer"),
        (nn.GroupNorm(2, 8), 16, "info", "no layer"),
    ],
)
def test_batch_normalization_of_few_values_is_a_warning(tmp_path, norm, batch_size, verdict, part):
    trainer = Trainer(Normalized(norm), Data(Items(), batch_size), tmp_path, optimizer=Optimizer("adam"), steps=10)
    before = copy.deepcopy(trainer.model.state_dict())
    held = Subject(Experiment({}, {}, {}, Loader(batch_size)), trainer)
    (found,) = training.check_normalization(held)
    assert found.verdict == verdict
    assert part in found.message
    if verdict == "warn":
        assert found.values == {"values": {"norm": 64}}
        maps = 1e3 * torch.randn(16, 8, 2, 2, dtype=torch.float64)
        once = nn.BatchNorm2d(8, momentum=1.0, dtype=torch.float64)
        with torch.no_grad():
            ratio = once.train()(maps).var() / once.eval()(maps).var()
        assert float(ratio) == pytest.approx(64 / 63, rel=1e-9)  # what the warning says, by torch itself
    after = trainer.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_frozen_normalization_is_the_same_network_in_training(tmp_path):
    optimizer = Optimizer("adam", frozen=["norm"])
    trainer = Trainer(Normalized(nn.BatchNorm2d(8)), Data(Items(), 16), tmp_path, optimizer=optimizer, steps=10)
    (found,) = training.check_normalization(Subject(Experiment({}, {}, {}, Loader(16)), trainer))
    assert found.verdict == "info"


CONFIG = """\
prepare: {name: procedural, root: ROOT, shapes_per_category: 3, categories: [table, sofa], views: 2, points: 500}
data: {name: shapenet, root: "${prepare.root}", image_size: 32, points_per_item: 64, cache: true,
       fields: [image, FIELD]}
model: {name: single_view, backbone: {name: resnet18}, head: HEAD}
loader: {batch_size: 4}
trainer: {steps: 4, optimizer: {name: adam, lr: 1e-3}}
"""
HEADS = [
    ("points", "{name: occupancy, hidden: 8, code_channels: 8, threshold: 0.5, resolution: 6, upsampling_steps: 0}"),
    ("voxels", "{name: voxels, resolution: 32, width: 4}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("field, head", HEADS, ids=[field for field, _ in HEADS])
def test_doctor_of_a_configuration(data, tmp_path, capsys, field, head):
    text = CONFIG.replace("ROOT", str(data)).replace("FIELD", field).replace("HEAD", head)
    (tmp_path / "config.yaml").write_text(text)
    arguments = ["doctor", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out"), "--steps", "6"]
    code = cli.main([*arguments, "--device", "cpu", "loader.batch_size=3"])
    findings = {f["name"]: f for f in json.loads((tmp_path / "out" / "doctor.json").read_text())}
    assert code == (0 if all(f["verdict"] in ("ok", "info") for f in findings.values()) else 1)
    assert {"experiment", "initial loss", "overfitting", "learning rate", "data loading", "memory"} < findings.keys()
    assert findings["initial loss"]["verdict"] == "ok", findings["initial loss"]
    assert findings["gradients"]["verdict"] == "ok", findings["gradients"]
    assert "cut off by the border" in findings["receptive field"]["message"]
    assert len(findings["overfitting"]["values"]["losses"]["model"]) == 7
    assert (tmp_path / "out" / "doctor.png").stat().st_size > 10_000
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert "batches of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_check_that_raises_is_a_fault_and_the_others_go_on(data, tmp_path, capsys, monkeypatch):
    text = CONFIG.replace("ROOT", str(data)).replace("FIELD", "points").replace("HEAD", HEADS[1][1])  # without voxels
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr(training, "TRAINING_CHECKS", [training.check_model, training.check_overfitting])
    assert cli.main(["doctor", str(tmp_path / "config.yaml"), "--device", "cpu"]) == 1
    assert "KeyError" in capsys.readouterr().out


def test_a_fault_of_the_configuration_stops_doctor(tmp_path, capsys):
    text = CONFIG.replace("ROOT", str(tmp_path / "data")).replace("FIELD", "points").replace("HEAD", HEADS[0][1])
    (tmp_path / "config.yaml").write_text(text)
    assert cli.main(["doctor", str(tmp_path / "config.yaml"), "trainer.stepps=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert cli.main(["doctor", str(tmp_path / "config.yaml"), "--device", "tpu"]) == 2
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("page", ["doctor.md", "sweep.md"])
def test_the_python_of_the_pages_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {"__name__": "page"})
    if page == "doctor.md":
        assert "['forgotten.weight', 'forgotten.bias']" in capsys.readouterr().out
