"""Classifiers from nearest neighbors to residual networks on MNIST: one table, and pictures.

    python benchmarks/recognition.py --data data/mnist --out runs/recognition

Of the 10,000 published test images 8,000 train and 2,000 test, drawn with seed 0, so that the two small files suffice.
Steps and rates are those of configs/recognition_*_mnist.yaml; there is no validation, and the last weights count.
Leaves in the output folder: table.md, table.jsonl, templates_softmax.png, templates_svm.png, confusion_softmax.png,
confusion_resnet.png, classes.png, mistakes.png, and one run folder per network. Interrupted, it goes on where it was.
Exit code 1 if a check under the table fails.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from vision3dgen import viz
from vision3dgen.config import load
from vision3dgen.engine import Ensemble, read_metrics
from vision3dgen.experiment import Experiment, Run, environment, predictor, score
from vision3dgen.files import atomic_write
from vision3dgen.metrics import ClassScores
from vision3dgen.models import NearestNeighbors

CONFIGS = Path(__file__).parents[1] / "configs"
SPLIT = ("data.part=test", "data.fractions={train: 0.8, test: 0.2}", "data.seed=0", "trainer.validation=null")
NETWORKS = {  # method: the configuration's middle name, and the seed
    "softmax, linear": ("softmax", 0),
    "SVM, linear": ("svm", 0),
    "fully connected, 256 hidden": ("mlp", 0),
    "LeNet-5": ("lenet", 0),
    "LeNet-5, seed 1": ("lenet", 1),
    "LeNet-5, seed 2": ("lenet", 2),
    "ResNet-20, half width": ("resnet", 0),
}
MEMBERS = ("LeNet-5", "LeNet-5, seed 1", "LeNet-5, seed 2")
ENSEMBLE = "ensemble of the 3 LeNet-5"
TARGET = 0.985  # of the best convolutional network

console = Console(width=None if sys.stdout.isatty() else 120)


class Row(NamedTuple):
    method: str
    scores: ClassScores
    parameters: int | None
    train_seconds: float
    test_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with t10k-{images-idx3,labels-idx1}-ubyte[.gz]"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny; no checks")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for every network")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()

    runs: dict[str, Run] = {}
    rows: list[Row] = []
    models = {}
    for method, (name, seed) in NETWORKS.items():
        console.rule(method)
        run = create_run(options, name, seed)
        run.train(resume=True)
        runs[method], models[method] = run, run.model(device)
        trained = read_metrics(run.folder)[-1]["seconds"]
        about = {"weights": run.weights()}
        parameters = sum(parameter.numel() for parameter in models[method].parameters())
        rows.append(
            timed(method, run.experiment, run.folder, predictor(models[method], device), about, trained, parameters)
        )

    experiment = runs["LeNet-5"].experiment
    ensemble = Ensemble([models[method] for method in MEMBERS])
    members = [row for row in rows if row.method in MEMBERS]
    about = {"members": [runs[method].weights() for method in MEMBERS]}

    def vote(batch: Mapping[str, Any]) -> Tensor:
        return ensemble(batch["image"].to(device)).log().cpu()

    rows.append(
        timed(
            ENSEMBLE, experiment, options.out / "ensemble", vote, about,
            sum(row.train_seconds for row in members), sum(row.parameters or 0 for row in members),
        )
    )  # fmt: skip
    rows = [*neighbors(experiment, options.out, device), *rows]

    checks = check(rows) if options.preset is None else {}
    write_tables(options.out, rows, checks)
    draw(options.out, rows, experiment, models)
    console.print(Markdown((options.out / "table.md").read_text()))
    console.print(f"{options.out}: table.md table.jsonl *.png   {time.perf_counter() - start:.0f} s")
    return 0 if all(checks.values()) else 1


def create_run(options: argparse.Namespace, name: str, seed: int) -> Run:
    """The run of a network on the benchmark's split; a preset brings a split of its own."""
    split = SPLIT if options.preset is None else ()
    overrides = [f"data.root={options.data}", f"seed={seed}", *split, *options.overrides]
    config = load(CONFIGS / f"recognition_{name}_mnist.yaml", overrides, preset=options.preset)
    return Run.create(options.out / f"{name}_{seed}", config)


def timed(
    method: str, experiment: Experiment, folder: Path, predict: Callable[[Mapping[str, Any]], Tensor],
    about: Mapping[str, Any], train_seconds: float, parameters: int | None,
) -> Row:  # fmt: skip
    began = time.perf_counter()
    scores = score(folder / "evaluation", experiment, predict, "classes", about=about)
    assert isinstance(scores, ClassScores)
    return Row(method, scores, parameters, train_seconds, time.perf_counter() - began)


def neighbors(experiment: Experiment, out: Path, device: torch.device) -> list[Row]:
    """Nearest neighbors in pixels, without training; three of them, a usual choice and not tuned."""
    dataset = experiment.dataset("train", pad=0)
    rows = []
    for metric in ("l1", "l2", "cosine"):
        console.rule(f"3 nearest neighbors, {metric}")
        began = time.perf_counter()
        batches = experiment.batches(dataset, 1000)
        model = NearestNeighbors.gather(batches, len(dataset.classes), k=3, metric=metric, device=device)
        gathered = time.perf_counter() - began

        def predict(batch: Mapping[str, Any], model: NearestNeighbors = model) -> Tensor:
            return model.scores(batch["image"].to(device)).cpu()

        name = {"l1": "L1", "l2": "L2"}.get(metric, metric)
        folder = out / f"neighbors_{metric}"
        rows.append(timed(f"3 nearest neighbors, {name}", experiment, folder, predict, {}, gathered, None))
    return rows


def check(rows: list[Row]) -> dict[str, bool]:
    """What must hold of the numbers, in words."""
    accuracy = {row.method: row.scores.accuracy for row in rows}
    best = max(accuracy["LeNet-5"], accuracy["ResNet-20, half width"])
    mean = sum(accuracy[member] for member in MEMBERS) / len(MEMBERS)
    return {
        f"LeNet-5 or ResNet-20 above {TARGET:.1%}: {best:.2%}": best > TARGET,
        f"the ensemble not below its mean member: {accuracy[ENSEMBLE]:.2%} and {mean:.2%}": accuracy[ENSEMBLE] >= mean,
    }


def write_tables(out: Path, rows: list[Row], checks: Mapping[str, bool]) -> None:
    """table.md for people and table.jsonl, a line per method, for programs."""
    known, today = environment(), date.today().isoformat()
    total = rows[0].scores.total
    machine = f"{known['device']}, {known['threads']} thread(s), torch {known['torch']}"
    text = [
        f"Measured {today} on {machine}; {total} test images.",
        "",
        "| method | parameters | test accuracy, % | 95 % interval | mistakes | training, s | test, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    records = []
    for row in rows:
        low, high = row.scores.interval
        mistakes = row.scores.total - round(row.scores.accuracy * row.scores.total)
        text.append(
            f"| {row.method} | {'-' if row.parameters is None else f'{row.parameters:,}'} | "
            f"{100 * row.scores.accuracy:.2f} | {100 * low:.1f} to {100 * high:.1f} | {mistakes} | "
            f"{row.train_seconds:.1f} | {row.test_seconds:.1f} |"
        )
        record = {"date": today, "method": row.method, "parameters": row.parameters}
        record |= {"training_seconds": round(row.train_seconds, 2), "test_seconds": round(row.test_seconds, 2)}
        records.append(record | {"environment": known} | row.scores.to_dict())
    text += ["", *(f"- {'holds' if holds else 'FAILS'}: {words}" for words, holds in checks.items())]
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def draw(out: Path, rows: list[Row], experiment: Experiment, models: Mapping[str, Any]) -> None:
    """The pictures: templates of both linear classifiers, confusion matrices, accuracy per class, mistakes."""
    scores = {row.method: row.scores for row in rows}
    for name, method in (("softmax", "softmax, linear"), ("svm", "SVM, linear")):
        viz.class_templates(models[method].templates(), scores[method].classes, out / f"templates_{name}.png")
    for name, method in (("softmax", "softmax, linear"), ("resnet", "ResNet-20, half width")):
        found = scores[method]
        title = f"{method}: {100 * found.accuracy:.2f} % of {found.total}"
        viz.confusion_figure(found.confusion, found.classes, out / f"confusion_{name}.png", title=title)
    shown = ["3 nearest neighbors, L2", "softmax, linear", "SVM, linear", "LeNet-5", "ResNet-20, half width"]
    viz.class_accuracy_figure({name: scores[name].per_class for name in shown}, out / "classes.png")

    dataset, model = experiment.dataset("test"), models["ResNet-20, half width"]
    wrong: list[tuple[Tensor, str, str]] = []
    for batch in experiment.batches(dataset, 250):
        predicted = predictor(model, next(model.parameters()).device)(batch).argmax(1)
        for index in (predicted != batch["label"]).nonzero().flatten().tolist():
            name = dataset.classes[int(predicted[index])]
            wrong.append((batch["image"][index], batch["category"][index], name))
    if wrong:
        images, truths, guesses = zip(*wrong[:32])
        viz.mistakes(images, truths, guesses, out / "mistakes.png")


if __name__ == "__main__":
    sys.exit(main())
