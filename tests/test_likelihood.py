"""Bits per dimension by hand, the likelihood's evaluator, binary digits, and a generator on the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vision3dgen import cli
from vision3dgen.config import construct, load
from vision3dgen.datasets import MNIST, collate
from vision3dgen.experiment import Experiment, Run
from vision3dgen.generators import GENERATORS, Autoregressive, PixelCNN
from vision3dgen.io import load_npz, read_image
from vision3dgen.metrics import EVALUATIONS, LikelihoodEvaluator, bits_per_dim


def test_bits_of_uniform_models():
    dims = 3 * 5 * 7
    assert float(bits_per_dim(torch.tensor(-dims * math.log(256.0)), dims)) == pytest.approx(8)
    # A density of 1 on [0, 1), of 1/2 on [-1, 1), at 256 levels: the same model in other units.
    assert float(bits_per_dim(torch.tensor(0.0), dims, 1 / 256)) == pytest.approx(8)
    assert float(bits_per_dim(torch.tensor(dims * math.log(0.5)), dims, 2 / 256)) == pytest.approx(8)
    assert torch.equal(bits_per_dim(torch.zeros(2, 3), 1), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="dims must be at least 1 and bin_width > 0, got 0 and 1"):
        bits_per_dim(torch.zeros(1), 0)
    with pytest.raises(ValueError, match="bin_width > 0, got 3 and -1"):
        bits_per_dim(torch.zeros(1), 3, -1.0)


def batches(count: int = 3, size: int = 2):
    for first in range(0, count, size):
        ids = [str(i) for i in range(first, min(first + size, count))]
        yield {"id": ids, "image": torch.zeros(len(ids), 1, 2, 3)}


def test_the_evaluator_averages_images_not_batches(tmp_path):
    known = {"0": -1.0, "1": -2.0, "2": -6.0}

    def predict(batch):
        return torch.tensor([known[i] for i in batch["id"]])

    evaluator = EVALUATIONS["likelihood"]()
    scores = evaluator.evaluate(
        "likelihood", batches(), predict, tmp_path, split="test", seed=4, about={"weights": "x"}
    )
    assert scores.nats == pytest.approx(3)
    assert scores.bits_per_dim == pytest.approx(3 / (6 * math.log(2)))
    assert scores.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert (scores.total, scores.n_failed, scores.dims) == (3, 0, 6)
    rows = [json.loads(line) for line in (tmp_path / "likelihood_test.jsonl").read_text().splitlines()]
    assert [row["nats"] for row in rows] == [1, 2, 6]
    summary = json.loads((tmp_path / "likelihood_test.json").read_text())
    assert (summary["nats"], summary["seed"], summary["about"]) == (3, 4, {"weights": "x"})
    assert "| 3.000 |" in scores.to_markdown()
    density = LikelihoodEvaluator(bin_width=1 / 256)
    assert density.evaluate(
        "likelihood", batches(), predict, tmp_path, split="val", seed=0
    ).bits_per_dim == pytest.approx(8 + 3 / (6 * math.log(2)))


def test_numbers_that_are_none_are_counted(tmp_path):
    values = iter([torch.tensor([-math.inf, -2.0]), torch.tensor([math.nan])])
    scores = LikelihoodEvaluator().evaluate(
        "likelihood", batches(), lambda batch: next(values), tmp_path, split="test", seed=0
    )
    assert (scores.nats, scores.n_failed, scores.failures) == (2, 2, ["0", "2"])
    with pytest.raises(ValueError, match="not finite for any of the 3 images"):
        LikelihoodEvaluator().evaluate(
            "likelihood", batches(), lambda b: torch.full((len(b["id"]),), math.nan), tmp_path, split="test", seed=0
        )
    with pytest.raises(ValueError, match=r"log p \(2,\), got \(2, 1\)"):
        LikelihoodEvaluator().evaluate(
            "likelihood", batches(), lambda b: torch.zeros(len(b["id"]), 1), tmp_path, split="test", seed=0
        )
    with pytest.raises(ValueError, match="nothing to evaluate"):
        LikelihoodEvaluator().evaluate("likelihood", [], lambda b: None, tmp_path, split="test", seed=0)
    with pytest.raises(ValueError, match="bin_width must be > 0"):
        LikelihoodEvaluator(bin_width=0.0)


# ------------------------------------------------------------------------------------------------------ binary digits


@pytest.fixture
def digits(tmp_path):
    """The idx files of seven pictures, from black to white."""
    gray = np.linspace(0, 255, 7).round().astype(np.uint8)
    for name, array in (
        ("t10k-images-idx3-ubyte", np.broadcast_to(gray[:, None, None], (7, 20, 20))),
        ("t10k-labels-idx1-ubyte", np.arange(7, dtype=np.uint8)),
    ):
        sizes = np.array(array.shape, dtype=">i4").tobytes()
        (tmp_path / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    return tmp_path


def test_binary_digits(digits):
    plain = MNIST(digits, "test")
    threshold = MNIST(digits, "test", binarize="threshold")
    dynamic, static = (MNIST(digits, "test", binarize=name) for name in ("dynamic", "static"))
    other = MNIST(digits, "test", binarize="static", seed=1)
    for index in range(7):
        gray = float(plain[index]["image"].mean())
        assert torch.equal(threshold[index]["image"], torch.full((1, 20, 20), float(gray >= 0.5)))
        for drawn in (dynamic, static, other):
            image = drawn[index]["image"]
            assert set(image.unique().tolist()) <= {0.0, 1.0}
            assert float(image.mean()) == pytest.approx(gray, abs=5 * math.sqrt(0.25 / 400))
        assert torch.equal(static[index]["image"], static[index]["image"])
    assert not torch.equal(dynamic[3]["image"], dynamic[3]["image"])
    assert not torch.equal(static[3]["image"], other[3]["image"])
    assert not torch.equal(static[3]["image"], static[2]["image"])
    with pytest.raises(ValueError, match="unknown binarize 'bernoulli'"):
        MNIST(digits, "test", binarize="bernoulli")


def test_the_static_draw_is_of_the_picture_not_of_the_split(digits):
    whole = MNIST(digits, "test", binarize="static")
    part = MNIST(digits, "a", part="test", fractions={"a": 0.5, "b": 0.5}, binarize="static")
    for item in (part[i] for i in range(len(part))):
        same = next(whole[i] for i in range(7) if whole[i]["id"] == item["id"])
        assert torch.equal(same["image"], item["image"])


# --------------------------------------------------------------------------------------------------- the command line

CONFIG = """\
data: {name: mnist, root: ROOT, part: test, fractions: {train: 0.6, test: 0.4}, binarize: static}
model: {name: pixelcnn, image_shape: [1, 20, 20], channels: 4, layers: 1, head_channels: 4, classes: 7}
loader: {batch_size: 2}
trainer: {steps: 2, optimizer: {name: adam, lr: 1e-3}, record: {log_every: 1, checkpoint_every: 2}}
evaluation: {name: likelihood}
"""


def test_a_generator_is_trained_scored_and_drawn_from(digits, capsys, monkeypatch):
    (digits / "config.yaml").write_text(CONFIG.replace("ROOT", str(digits)))
    run = digits / "run"
    assert cli.main(["train", str(digits / "config.yaml"), "--out", str(run)]) == 0
    assert cli.main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert "bits/dim" in capsys.readouterr().out
    model, dataset = Run.open(run).model(), Run.open(run).experiment.dataset("test")
    assert isinstance(model, PixelCNN)
    batch = collate([dataset[i] for i in range(len(dataset))])
    summary = json.loads((run / "evaluation" / "likelihood_test.json").read_text())
    assert summary["nats"] == pytest.approx(-float(model.predict(batch).mean()), rel=1e-5)
    assert summary["total"] == len(dataset)

    monkeypatch.setattr("vision3dgen.experiment.AT_ONCE", 2)
    drawing = ["sample", str(run), "--n", "5", "--class", "1", "6", "--seed", "3", "--device", "cpu"]
    assert cli.main([*drawing, "--out", str(digits / "drawn")]) == 0
    samples = load_npz(digits / "drawn" / "samples.npz")["samples"]
    cond = torch.tensor([1, 6, 1, 6, 1])
    expected = model.sample(5, cond=cond, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(samples, expected.numpy())
    assert min(read_image(digits / "drawn" / "samples.png").shape[:2]) > 2 * 60
    assert cli.main(["sample", str(run), "--n", "1", "--class", "0", "--temperature", "0.5", "--device", "cpu"]) == 0
    assert (run / "samples" / "samples.png").exists()


def test_faults_of_drawing(digits, capsys):
    (digits / "config.yaml").write_text(CONFIG.replace("ROOT", str(digits)))
    run = str(digits / "run")
    assert cli.main(["train", str(digits / "config.yaml"), "--out", run]) == 0
    for arguments, message in [
        (["--n", "0", "--class", "1"], "n must be at least 1"),
        ([], "cond must be labels of 7 classes"),
        (["--class", "7"], "labels must be 0 to 6"),
        (["--class", "1", "--temperature", "0"], "temperature must be a number above 0"),
    ]:
        assert cli.main(["sample", run, "--device", "cpu", *arguments]) == 2
        assert message in capsys.readouterr().err
    linear = ["model={name: linear_classifier, image_shape: [1, 20, 20]}", "evaluation={name: classes}"]
    assert cli.main(["train", str(digits / "config.yaml"), "--out", str(digits / "other"), *linear]) == 0
    assert cli.main(["sample", str(digits / "other"), "--device", "cpu"]) == 2
    assert "sample needs a run of a generator" in capsys.readouterr().err


FAMILIES = sorted(name for name, kind in GENERATORS.items() if issubclass(kind, Autoregressive))


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_of_autoregressive_generators(name, shared_data):
    """Every family has one, whose tiny preset trains on real digits and gives probabilities."""
    path = Path(__file__).parents[1] / "configs" / f"generation_{name}_mnist.yaml"
    experiment = construct(Experiment, load(path, [f"data.root={shared_data / 'mnist'}"], preset="tiny"))
    dataset = experiment.dataset("train")
    batch = collate([dataset[i] for i in range(2)])
    model = experiment.build_model()
    terms = model.loss(batch)
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert 0.1 < float(terms["loss"].detach()) < 12
