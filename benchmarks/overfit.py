"""Ten shapes learned by heart: does each head reach 0.95 of what its score can be? A table.

    python benchmarks/overfit.py --out runs/overfit

Trains the runs of configs/single_view_overfit.yaml, or those named, and scores them on what they were trained on: voxel
or point IoU, whose ceiling is 1, and F1 at 1 % of the longest edge, whose ceiling is that of two independent samplings
of the truth, of as many points as the prediction has (10,000 of a mesh). Depth counts as the cloud of its pixels, in
the unit of the file; normals as the share of pixels within 11.25 degrees. Leaves table.md, table.jsonl and one folder
per run; interrupted, it goes on where it was. Exit code 1 unless the better score of every head is above 0.95.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from single_view import create_runs

from vision3dgen.config import load
from vision3dgen.datasets import collate
from vision3dgen.experiment import Run, environment, predictor
from vision3dgen.files import atomic_write
from vision3dgen.metrics import DepthEvaluator, NormalsEvaluator, Prediction, evaluate, f_score, surface_distances
from vision3dgen.metrics.protocols import PROTOCOLS
from vision3dgen.ops.depth import depth_to_points, pixels_with_depth
from vision3dgen.structures import Pointclouds

CONFIG = Path(__file__).parents[1] / "configs" / "single_view_overfit.yaml"
LEAST = 0.95  # of the ceiling
PERCENT = 0.01  # of the longest edge


class Found(NamedTuple):
    """Scores and what they can be at best, by name."""

    scores: dict[str, float]
    ceilings: dict[str, float]

    @property
    def best(self) -> float:
        """The highest share of a ceiling."""
        return max(score / self.ceilings[name] for name, score in self.scores.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configuration, such as tiny")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="train and score these only (default: all)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()

    runs = create_runs(load(CONFIG, options.overrides, preset=options.preset), options.out, options.runs)
    found: dict[str, Found] = {}
    for name, run in runs.items():
        run.experiment.prepare_data()
        start = time.perf_counter()
        run.train(resume=True)
        seconds = time.perf_counter() - start
        found[name] = measure(run, seed=0)
        print(f"{name}: {seconds:.0f} s, {found[name].best:.3f} of the ceiling", flush=True)
    write(options.out, found)
    print((options.out / "table.md").read_text())
    return int(any(not one.best > LEAST for one in found.values()))


def measure(run: Run, seed: int) -> Found:
    """The scores of a run on the split its evaluation names."""
    experiment = run.experiment
    predict = predictor(run.model("cpu"), "cpu")
    dataset = experiment.dataset(experiment.evaluation.split)
    batches = [collate([dataset[index]]) for index in range(len(dataset))]
    if isinstance(experiment.evaluation, DepthEvaluator):
        return Found({"F1@0.01": fmean(f1_of_depth(batch, predict(batch)[0]) for batch in batches)}, {"F1@0.01": 1.0})
    if isinstance(experiment.evaluation, NormalsEvaluator):
        name = "within_11_25"
        return Found({name: run.evaluate(experiment.evaluation.names[0]).mean[name]}, {name: 1.0})
    protocol = PROTOCOLS["default"]
    shape = predict(batches[0])[0].shape
    if isinstance(shape, Pointclouds):
        count = int(shape.num_points_per_cloud()[0])
        protocol = replace(protocol, name=f"default, {count} points", samples=(count, count))
    summary = evaluate(batches, predict, protocol, out=None, seed=seed, repeats=1)
    scores = {k: v for k, v in summary.headline.items() if k.startswith("IoU") or k == "F1@0.01"}
    ceilings = {k: summary.ceiling.get(k) if k.startswith("F1") else 1.0 for k in scores}
    return Found(
        {k: v for k, v in scores.items() if v is not None}, {k: c for k, c in ceilings.items() if c is not None}
    )


def f1_of_depth(batch: Mapping[str, Any], prediction: Prediction) -> float:
    """F1 at 1 % of the longest edge, of the predicted pixels of the object against the true ones, in space."""
    clouds = [depth_to_points(depth, batch["camera"])[0] for depth in (prediction.maps["depth"][None], batch["depth"])]
    shown = (prediction.maps["mask"][None] > 0.5)[0, 0], pixels_with_depth(batch["depth"])[0]
    ours, true = (cloud[pixels] for cloud, pixels in zip(clouds, shown))
    if not len(ours):
        return 0.0
    within = float(batch["frame"][0].scale) * PERCENT
    distances = surface_distances(ours, None, true, None)
    return float(f_score(distances, (within,), comparator="<", squared=False).f1)


def write(out: Path, found: Mapping[str, Found]) -> None:
    """table.md for people and table.jsonl, a line per head, for programs."""
    known = environment()
    rows = ["| head | score | value | ceiling | share |", "| --- | --- | ---: | ---: | ---: |"]
    records = []
    for name, one in found.items():
        for score, value in one.scores.items():
            ceiling = one.ceilings[score]
            rows.append(f"| {name} | {score} | {value:.3f} | {ceiling:.3f} | {value / ceiling:.3f} |")
        record = {"date": date.today().isoformat(), "head": name, "share": one.best, "passes": one.best > LEAST}
        records.append(record | one._asdict() | {"environment": known})
    machine = f"{known['device']}, {known['threads']} threads, torch {known['torch']}"
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([f"Measured {date.today().isoformat()} on {machine}.\n", *rows, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
