"""Scores of classifiers against loops, the evaluation of runs, their pictures, and their configurations."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_docs import python_blocks
from vision3dgen import cli, viz
from vision3dgen.config import ConfigError, load
from vision3dgen.experiment import Run
from vision3dgen.metrics import (
    ClassEvaluator,
    confusion_matrix,
    rank_of_label,
    summarize_classes,
    top_k_accuracy,
    wilson,
)

CONFIGS = Path(__file__).parents[1] / "configs"
K = 7


def make_items(count=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(5, (count, K), generator=generator).float()  # many equal scores
    return scores, torch.randint(K, (count,), generator=generator)


def batches_of(labels, size):
    for start in range(0, len(labels), size):
        part = range(start, min(start + size, len(labels)))
        yield {
            "id": [f"{i:03d}" for i in part],
            "label": labels[start : start + size],
            "category": [f"c{labels[i]}" for i in part],
            "place": torch.tensor(list(part)),
        }


def evaluate(scores, labels, out, size=8, **settings):
    return ClassEvaluator(**settings).evaluate(
        "classes", batches_of(labels, size), lambda batch: scores[batch["place"]], out, split="test", seed=0
    )


def test_ranks_and_accuracies_are_those_of_loops():
    scores, labels = make_items()
    ranks = []
    for row, label in zip(scores.tolist(), labels.tolist()):
        ranks.append(sorted(range(K), key=lambda j: (-row[j], j)).index(label))
    assert rank_of_label(scores, labels).tolist() == ranks
    for k in range(1, K + 1):
        assert top_k_accuracy(scores, labels, k) == sum(rank < k for rank in ranks) / 53
    assert top_k_accuracy(scores, labels, K) == 1
    assert top_k_accuracy(scores, labels) == float((scores.argmax(1) == labels).double().mean())
    assert math.isnan(top_k_accuracy(scores[:0], labels[:0]))


def test_a_confusion_matrix_counts_and_adds_up():
    scores, labels = make_items()
    predicted = scores.argmax(1)
    matrix = confusion_matrix(predicted, labels, K)
    pairs = Counter(zip(labels.tolist(), predicted.tolist()))
    assert all(matrix[i, j] == pairs[i, j] for i in range(K) for j in range(K))
    pieces = [confusion_matrix(predicted[i : i + 11], labels[i : i + 11], K) for i in range(0, 53, 11)]
    assert torch.equal(sum(pieces), matrix)
    assert confusion_matrix(predicted[:0], labels[:0], K).sum() == 0


@pytest.mark.parametrize(
    "right, total, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)]
)
def test_intervals_are_the_published_ones(right, total, low, high):
    """Newcombe 1998, table 1 for 81 of 263; the others from the closed form z^2 / (n + z^2)."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_bad_input_to_the_scores_is_named():
    scores, labels = make_items()
    with pytest.raises(ValueError, match="k must be from 1 to the 7 classes, got 8"):
        top_k_accuracy(scores, labels, 8)
    with pytest.raises(ValueError, match="labels must be 0 to 6 for 7 classes, got 7 at 3"):
        rank_of_label(scores, labels.index_fill(0, torch.tensor(3), 7))
    with pytest.raises(ValueError, match="predicted must be 0 to 6 for 7 classes, got -1 at 2"):
        confusion_matrix(labels.index_fill(0, torch.tensor(2), -1), labels, K)
    with pytest.raises(ValueError, match=r"scores must not be NaN, it is at index \(1, 2\)"):
        rank_of_label(scores.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), labels)
    with pytest.raises(ValueError, match="right must be from 0 to total"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="no item was given"):
        summarize_classes([], ["a"])


# --------------------------------------------------------------------------------------------------- evaluation


def test_no_split_into_batches_changes_the_scores(tmp_path):
    scores, labels = make_items()
    reference = evaluate(scores, labels, tmp_path / "whole", size=53, top=[3]).to_dict()
    for size in (1, 8, 50):
        assert evaluate(scores, labels, tmp_path / str(size), size=size, top=[3]).to_dict() == reference
    order = torch.randperm(53, generator=torch.Generator().manual_seed(5))
    assert evaluate(scores[order], labels[order], tmp_path / "order", top=[3]).to_dict() == reference
    assert reference["accuracy"] == reference["top"]["1"] == top_k_accuracy(scores, labels)
    assert reference["top"]["3"] == top_k_accuracy(scores, labels, 3)


def test_the_summary_and_the_lines_agree(tmp_path):
    scores, labels = make_items()
    summary = evaluate(scores, labels, tmp_path, top=[2])
    header, *rows = (json.loads(line) for line in (tmp_path / "classes_test.jsonl").read_text().splitlines())
    assert header == {"evaluation": "classes", "classes": K, "seed": 0, "about": {}}
    assert [row["label"] for row in rows] == labels.tolist()
    assert [row["predicted"] for row in rows] == scores.argmax(1).tolist()
    assert summarize_classes(rows, [f"c{i}" for i in range(K)], top=[2]) == summary
    assert json.loads((tmp_path / "classes_test.json").read_text()) == json.loads(json.dumps(summary.to_dict()))
    for label, name in enumerate(summary.classes):
        own = labels == label
        assert summary.class_sizes[name] == int(own.sum())
        assert summary.per_class[name] == float((scores[own].argmax(1) == label).double().mean())
    assert summary.class_mean == pytest.approx(sum(summary.per_class.values()) / K)
    text = summary.to_markdown()
    for part in ("| c0 |", "**class mean**", "**top-2**", "95 % interval", "n_failed 0"):
        assert part in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_scores_that_are_not_finite_count_as_wrong_and_are_listed(tmp_path):
    scores, labels = make_items()
    whole = evaluate(scores, labels, tmp_path / "whole")
    right = int((scores.argmax(1) == labels).nonzero()[0])
    scores[right, 0], scores[right + 1, 1] = math.nan, math.inf
    summary = evaluate(scores, labels, tmp_path / "broken")
    assert summary.n_failed == 2
    assert summary.failures == [f"{right:03d}", f"{right + 1:03d}"]
    assert summary.accuracy <= whole.accuracy - 1 / 53
    assert np.sum(summary.confusion) == 51
    assert f"Failed: {right:03d}" in summary.to_markdown()


def test_classes_without_items_and_of_one_name(tmp_path):
    scores, labels = make_items()
    summary = evaluate(scores, labels.clamp(max=3), tmp_path)
    assert summary.per_class["5"] is None
    assert "| 5 | 0 | - |" in summary.to_markdown()

    def same(batch):
        return scores[batch["place"]]

    batches = [{**batch, "category": ["one"] * len(batch["id"])} for batch in batches_of(labels, 8)]
    summary = ClassEvaluator().evaluate("classes", batches, same, tmp_path, split="same", seed=0)
    assert summary.classes == [f"{i} one" for i in range(K)]


def test_what_is_wrong_with_an_evaluation_is_named(tmp_path):
    scores, labels = make_items()
    with pytest.raises(ValueError, match=r"top must be below the 7 classes, got \[7\]"):
        evaluate(scores, labels, tmp_path, top=[7])
    with pytest.raises(ValueError, match=r"top must be numbers of at least 2, got \[1\]"):
        ClassEvaluator(top=[1])
    with pytest.raises(ValueError, match=r"predict must give scores \(8, K\), got \(8,\)"):
        evaluate(scores[:, 0], labels, tmp_path)
    with pytest.raises(ValueError, match="no batch was given"):
        evaluate(scores, labels[:0], tmp_path)
    twice = [*batches_of(labels, 8), next(batches_of(labels, 1))]
    with pytest.raises(ValueError, match="1 items come twice"):
        ClassEvaluator().score("classes", twice, lambda batch: scores[batch["place"]], tmp_path / "x", seed=0, about={})


# ----------------------------------------------------------------------------------------------------- pictures


def colors(path):
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def test_templates_are_drawn_on_one_scale(tmp_path):
    templates = torch.zeros(3, 1, 4, 5)
    templates[0, 0, 1, 2], templates[1, 0, 0, 0] = 1.0, -1.0
    viz.class_templates(templates, ["a", "b", "c"], tmp_path / "gray.png")
    seen = {tuple(color) for color in colors(tmp_path / "gray.png").tolist()}
    assert (45, 0, 75) in seen  # the ends of PuOr: violet for, brown against
    assert (127, 59, 8) in seen
    viz.class_templates(torch.rand(3, 3, 4, 5), ["a", "b", "c"], tmp_path / "color.pdf")
    assert (tmp_path / "color.pdf").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"templates must be \(K, 1 or 3, H, W\).*got \(3, 2, 4, 5\) and 3 names"):
        viz.class_templates(torch.rand(3, 2, 4, 5), ["a", "b", "c"], tmp_path / "x.png")


def test_figures_of_scores(tmp_path):
    matrix = [[50, 0, 1], [2, 48, 0], [0, 0, 50]]
    viz.confusion_figure(matrix, ["ape", "bee", "cat"], tmp_path / "matrix.svg", title="Linear")
    text = (tmp_path / "matrix.svg").read_text()
    assert text.startswith("<?xml")
    viz.confusion_figure(np.eye(60, dtype=int).tolist(), [str(i) for i in range(60)], tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"confusion must be \(2, 2\) like names, got \(3, 3\)"):
        viz.confusion_figure(matrix, ["a", "b"], tmp_path / "x.png")
    per_class = {"linear": {"a": 0.9, "b": 0.8, "c": None}, "LeNet": {"a": 0.99, "b": 1.0, "c": 0.97}}
    viz.class_accuracy_figure(per_class, tmp_path / "classes.png")
    with pytest.raises(ValueError, match="the classes of 'LeNet' are"):
        viz.class_accuracy_figure({"linear": {"a": 0.9}, "LeNet": {"b": 0.9}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one classifier"):
        viz.class_accuracy_figure({}, tmp_path / "x.png")


def test_mistakes_keep_their_pixels_sharp(tmp_path):
    image = torch.zeros(1, 28, 28)
    image[0, 3, 5] = 1
    sheet = viz.mistakes([image] * 5, ["7"] * 5, ["1"] * 5, tmp_path / "mistakes.png", columns=3, size=84)
    white_blocks = (sheet[6 : 6 + 84, 6 : 6 + 84] == 255).all(-1)
    assert white_blocks.sum() == 9  # one pixel, three times as large
    with pytest.raises(ValueError, match="must be as many, at least one, got 1, 2 and 1"):
        viz.mistakes([image], ["a", "b"], ["c"], tmp_path / "x.png")


# ----------------------------------------------------------------------------------------------- configurations


def run_tiny(name, shared_data, out, *overrides):
    root = f"data.root={shared_data / 'mnist'}"
    arguments = ["train", str(CONFIGS / f"{name}.yaml"), "--preset", "tiny", "--out", str(out), root, *overrides]
    assert cli.main(arguments) == 0
    return Run.open(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("recognition_*_mnist.yaml")))
def test_recognition_configurations_train_and_are_evaluated(name, shared_data, tmp_path, capsys):
    run = run_tiny(name, shared_data, tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["evaluate", str(run.folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "**accuracy** | 200 |" in printed
    assert "**top-2**" in printed
    summary = json.loads((run.folder / "evaluation" / "classes_test.json").read_text())
    assert np.sum(summary["confusion"]) == 200
    assert summary["about"] == {"weights": run.weights()}
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "accuracy", "penalty", "val/accuracy"} <= set(first)


@pytest.mark.slow
def test_transfer_starts_from_another_run(shared_data, tmp_path):
    source = run_tiny("transfer_source_mnist", shared_data, tmp_path / "source").model()
    shares = "data.fractions={train: 0.02, val: 0.01, test: 0.02, unused: 0.95}"
    weights = f"weights.backbone={tmp_path / 'source'}"
    frozen = run_tiny("transfer_frozen_mnist", shared_data, tmp_path / "frozen", weights, shares)
    tuned = run_tiny("transfer_finetune_mnist", shared_data, tmp_path / "tuned", weights, shares)
    kept, moved = frozen.model().state_dict(), tuned.model().state_dict()
    for name, value in source.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(kept[name], value), name
    assert not torch.equal(moved["backbone.conv1.weight"], source.state_dict()["backbone.conv1.weight"])
    assert not torch.equal(kept["fc.weight"], frozen.experiment.build_model().state_dict()["fc.weight"])
    assert frozen.experiment.dataset("train").classes == ["5", "6", "7", "8", "9"]
    # A run needs the weights it started from no longer.
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert frozen.evaluate("classes").total == tuned.evaluate("classes").total > 0


@pytest.mark.slow
def test_weights_of_another_architecture_stop_a_run(shared_data, tmp_path, capsys):
    run_tiny("recognition_lenet_mnist", shared_data, tmp_path / "lenet")
    arguments = [
        "train",
        str(CONFIGS / "transfer_frozen_mnist.yaml"),
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "run"),
    ]
    arguments += [f"data.root={shared_data / 'mnist'}", f"weights.backbone={tmp_path / 'lenet'}"]
    assert cli.main(arguments) == 2
    assert "not the weights of this ResNet" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"weights\.backbone|weights"):
        Run.create(tmp_path / "other", load(CONFIGS / "transfer_frozen_mnist.yaml", ["weights.backbone=3"]))


@pytest.mark.slow
def test_the_benchmark_leaves_a_table_and_pictures(shared_data, tmp_path):
    script = CONFIGS.parent / "benchmarks" / "recognition.py"
    command = [
        sys.executable,
        str(script),
        "--data",
        str(shared_data / "mnist"),
        "--out",
        str(tmp_path),
        "--preset",
        "tiny",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert len(records) == 11
    assert all(record["total"] == 200 and record["test_seconds"] > 0 for record in records)
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {record['method']} |" in text for record in records)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {
        "templates_softmax.png", "templates_svm.png", "confusion_softmax.png", "confusion_resnet.png", "classes.png",
        "mistakes.png",
    }  # fmt: skip


def test_the_examples_of_the_page_run(capsys):
    for block in python_blocks(CONFIGS.parent / "docs" / "recognition.md"):
        exec(block, {})
    printed = capsys.readouterr().out
    assert "tensor([2.3026]) tensor([9.])" in printed
    assert "tensor([0, 1])" in printed
