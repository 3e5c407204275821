"""Single-view reconstruction from a data folder to a table and pictures, in one command.

    python benchmarks/single_view.py --config configs/single_view_quick.yaml --out runs/single_view_quick

Makes the data if the configuration says how, trains one run per entry of `runs`, scores them under what their
`evaluation` names, shapes beside three baselines that do not reconstruct (mean shape, retrieval, oracle retrieval) and
depth beside the mean depth, and leaves in the output folder: table.md, table.jsonl, gallery.png, depth.png, curves.png,
meshes/*.glb and *.ply, and one run folder per entry. A run may start from an earlier one: `weights: {backbone: NAME}`.
Interrupted, it goes on where it was.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.markdown import Markdown
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.config import Config, ConfigError, load, variants
from vision3dgen.datasets import collate
from vision3dgen.engine import ModelProfile, profile_model, to_device
from vision3dgen.experiment import Run, environment, predictor, samples, score
from vision3dgen.files import atomic_write
from vision3dgen.io import save_mesh
from vision3dgen.metrics import DepthEvaluator, Evaluator, MapScores, Prediction, Scores, ShapeEvaluator, Summary
from vision3dgen.models import MeanDepth, MeanShape, OracleNeighbor, Retrieval, ShapeLibrary
from vision3dgen.structures import Meshes
from vision3dgen.viz import curves, depth_gallery, reconstruction_gallery

Predict = Callable[[Mapping[str, Any]], list[Prediction]]
console = Console(width=None if sys.stdout.isatty() else 160)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configuration, such as tiny")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="train and score these only (default: all)")
    parser.add_argument("--gallery", type=int, default=8, help="test items drawn (default: 8)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()

    config = load(options.config, options.overrides, preset=options.preset)
    runs = create_runs(config, options.out, options.runs)
    seconds: dict[str, float] = {}
    for name, run in runs.items():
        console.rule(f"{name}: data and training")
        run.experiment.prepare_data()
        began = time.perf_counter()
        run.train(resume=True)
        seconds[name] = time.perf_counter() - began

    costs = {}
    for name, run in runs.items():
        console.rule(f"{name}: cost of a prediction")
        costs[name] = cost(run, device)
    models = {name: run.model(device) for name, run in runs.items()}
    baselines, first_weights = baselines_of(runs, models, device)
    tables: dict[str, dict[str, Scores]] = {}
    for kind, others in baselines.items():
        mine = {name: run for name, run in runs.items() if type(run.experiment.evaluation) is kind}
        for protocol in next(iter(mine.values())).experiment.evaluation.names:
            found = tables[f"{kind.__name__}: {protocol}"] = {}
            for name, predict in [*others.items(), *((name, predictor(models[name], device)) for name in mine)]:
                console.rule(f"{name}: scoring under {protocol}")
                experiment = runs[name].experiment if name in mine else next(iter(mine.values())).experiment
                about = {"weights": runs[name].weights()} if name in mine else {"baseline": name} | first_weights
                folder = options.out / name / "evaluation"
                found[name] = score(folder, experiment, predict, protocol, about=about)
    write_tables(options.out, tables, seconds, costs)
    predictors = baselines[ShapeEvaluator] | {name: predictor(model, device) for name, model in models.items()}
    draw(options.out, runs, predictors, options.gallery)
    if DepthEvaluator in baselines:
        draw_depth(options.out, runs, baselines[DepthEvaluator] | predictors, options.gallery)
    console.print(Markdown((options.out / "table.md").read_text()))
    console.print(
        f"{options.out}: table.md table.jsonl gallery.png curves.png meshes/   {time.perf_counter() - start:.0f} s"
    )
    return 0


def create_runs(config: Config, out: Path, names: list[str] | None = None) -> dict[str, Run]:
    """One run per variant of the configuration, or per one named; one that starts from another's weights names it."""
    found = variants(config)
    for name in names or ():
        check_choice("run", name, found)
    runs = {}
    for name, own in found.items():
        if names is not None and name not in names:
            continue
        for part, source in (own.get("weights") or {}).items():
            if source in found:
                own["weights"][part] = str(out / source)
        runs[name] = Run.create(out / name, own)
    return runs


def baselines_of(
    runs: Mapping[str, Run], models: Mapping[str, Any], device: torch.device
) -> tuple[dict[type[Evaluator], dict[str, Predict]], dict[str, str]]:
    """The baselines of each kind of evaluation, and the weights that retrieval depends on.

    Retrieval compares features of the trained backbone of the first run that predicts shapes.
    """
    kinds = {name: type(run.experiment.evaluation) for name, run in runs.items()}
    found: dict[type[Evaluator], dict[str, Predict]] = {kind: {} for kind in kinds.values()}
    first = next((name for name, kind in kinds.items() if kind is ShapeEvaluator), None)
    if first is None:
        raise ConfigError(f"one of the runs {sorted(runs)} must predict shapes: the baselines take its features")
    experiment = runs[first].experiment

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return models[first].features(images.to(device))[-1].mean(dim=(2, 3))

    shapes = experiment.dataset("train", fields=("image", "voxels", "mesh"))
    library = ShapeLibrary.gather(experiment.batches(shapes, 32), features)
    found[ShapeEvaluator] = {
        "mean shape": MeanShape(library).predict,
        "retrieval": Retrieval(library, features).predict,
        "oracle retrieval": OracleNeighbor(library).predict,
    }
    if DepthEvaluator in found:
        depths = experiment.dataset("train", fields=("depth",))
        found[DepthEvaluator] = {"mean depth": MeanDepth(experiment.batches(depths, 32)).predict}
    return found, {"features": runs[first].weights()}


class Cost(NamedTuple):
    """What predicting takes, an image alone and in a batch of the evaluation's size."""

    alone: ModelProfile
    batched: ModelProfile

    def cells(self) -> list[str]:
        memory = self.batched.peak_memory
        return [
            f"{self.alone.parameters / 1e6:.2f}",
            f"{self.alone.ms_per_image:.1f}",
            f"{self.batched.ms_per_image:.1f}",
            "-" if memory is None else f"{memory / 2**20:.0f}",
        ]


COSTS = ["parameters (M)", "ms alone", "ms in a batch", "MiB of a batch"]


def cost(run: Run, device: torch.device) -> Cost:
    """Measured on the first test items; the surface is extracted too."""
    experiment = run.experiment
    dataset, model = experiment.dataset(experiment.evaluation.split), run.model(device)
    profiles = []
    for size in (1, min(experiment.evaluation.batch_size, len(dataset))):
        batch = to_device(next(experiment.batches(dataset, size)), device)
        profiles.append(profile_model(model, batch, images=size))
    return Cost(*profiles)


def write_tables(
    out: Path,
    tables: Mapping[str, Mapping[str, Scores]],
    seconds: Mapping[str, float],
    costs: Mapping[str, Cost],
) -> None:
    """table.md for people and table.jsonl, a line per method and protocol, for programs."""
    known = environment()
    machine = f"{known['device']}, {known['threads']} threads, torch {known['torch']}"
    text = [f"Measured {date.today().isoformat()} on {machine}.\n"]
    records = []
    for protocol, summaries in tables.items():
        shapes = {name: summary for name, summary in summaries.items() if isinstance(summary, Summary)}
        text += [f"## {protocol}\n", comparison(shapes, costs) if shapes else map_comparison(summaries)]
        for name, summary in summaries.items():
            record = {"date": date.today().isoformat(), "method": name, "training_seconds": seconds.get(name)}
            measured = costs[name]._asdict() if name in costs else {}
            record["prediction"] = {size: profile._asdict() for size, profile in measured.items()}
            records.append(record | {"environment": known} | summary.to_dict())
    with atomic_write(out / "table.md") as file:
        file.write("\n".join(text).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def comparison(summaries: Mapping[str, Summary], costs: Mapping[str, Cost]) -> str:
    """Methods by row, the headline averages and costs by column, and the ceiling that sampling puts on the first."""
    any_summary = next(iter(summaries.values()))
    hidden = ("Precision", "Recall", "Accuracy", "Completeness")
    columns = [c for c in dict.fromkeys(c for s in summaries.values() for c in s.headline) if not c.startswith(hidden)]

    def cells(values: Mapping[str, float | None], spread: Mapping[str, float | None]) -> list[str]:
        shown = []
        for column in columns:
            value, std = values.get(column), spread.get(column)
            shown.append("-" if value is None else f"{value:.4f}" + (f" ± {std:.4f}" if std else ""))
        return shown

    rows = [
        ["method", *(column.replace("|", "\\|") for column in columns), "ok / empty / failed", *COSTS],
        ["---", *["---:"] * (len(columns) + 1 + len(COSTS))],
    ]
    for name, summary in summaries.items():
        counts = f"{summary.n_ok} / {summary.n_empty} / {summary.n_failed}"
        costly = costs[name].cells() if name in costs else ["-"] * len(COSTS)
        rows.append([name, *cells(summary.headline, summary.spread), counts, *costly])
    rows.append(["*truth against truth*", *cells(any_summary.ceiling, {}), "", *[""] * len(COSTS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def map_comparison(scores: Mapping[str, Scores]) -> str:
    """Methods by row, means over pictures by column."""
    maps = {name: found for name, found in scores.items() if isinstance(found, MapScores)}
    columns = list(dict.fromkeys(column for found in maps.values() for column in found.mean))
    rows = [["method", *columns, "ok / failed"], ["---", *["---:"] * (len(columns) + 1)]]
    for name, found in maps.items():
        cells = ["-" if (value := found.mean.get(column)) is None else f"{value:.4f}" for column in columns]
        rows.append([name, *cells, f"{found.n_ok} / {found.n_failed}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw_depth(out: Path, runs: Mapping[str, Run], predictors: Mapping[str, Predict], count: int) -> None:
    """depth.png: images, true depths, predicted depths and their errors."""
    names = [name for name, run in runs.items() if isinstance(run.experiment.evaluation, DepthEvaluator)]
    dataset = runs[names[0]].experiment.dataset("test")
    chosen = [
        dataset[index] for index in sorted({round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)})
    ]
    depths = {
        name: [predictors[name](collate([item]))[0].maps["depth"] for item in chosen] for name in ("mean depth", *names)
    }
    depth_gallery([item["image"] for item in chosen], [item["depth"] for item in chosen], depths, out / "depth.png")


def draw(out: Path, runs: Mapping[str, Run], predictors: Mapping[str, Predict], count: int) -> None:
    """gallery.png of inputs, predictions and truths; curves.png; the gallery's shapes as GLB and PLY."""
    experiment = next(iter(runs.values())).experiment
    chosen = samples(experiment.dataset(experiment.evaluation.split), count, predictors)
    drawn = reconstruction_gallery(chosen, out / "gallery.png")
    console.print(f"gallery.png drawn by {drawn.renderer}")
    curves({name: run.folder / "metrics.jsonl" for name, run in runs.items()}, out / "curves.png")
    (out / "meshes").mkdir(exist_ok=True)
    for sample in chosen:
        stem = sample.title.replace(" ", "_")
        for name, shape in sample.shapes().items():  # in the file's own coordinates, not the network's
            if (name in runs or name == "truth") and isinstance(shape, Meshes) and not shape.isempty():
                for suffix in ("glb", "ply"):
                    save_mesh(out / "meshes" / f"{stem}_{name}.{suffix}", shape)


if __name__ == "__main__":
    sys.exit(main())
