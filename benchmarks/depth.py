"""Depth from one picture of generated shapes, against the mean depth of the training pictures: a table and a sheet.

    python benchmarks/depth.py --out runs/depth

Trains configs/depth_unet_procedural.yaml, unless the folder holds the run already, and scores both on the test split.
Leaves in the output folder: the run, evaluation/ of the baseline, table.md, and depth.png (images, truths, predictions,
relative errors). Exit code 1 unless the network's AbsRel is at most half the baseline's; a preset is not checked.
"""

import argparse
import sys
from pathlib import Path

from vision3dgen.config import load
from vision3dgen.datasets import collate
from vision3dgen.experiment import Run, predictor, score
from vision3dgen.files import atomic_write
from vision3dgen.metrics import MapScores
from vision3dgen.models import MeanDepth
from vision3dgen.viz import depth_gallery

CONFIG = Path(__file__).parents[1] / "configs" / "depth_unet_procedural.yaml"
COLUMNS = ("abs_rel", "rmse", "silog", "delta1", "delta2", "mask_iou")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configuration, such as tiny; no check")
    parser.add_argument("--items", type=int, default=6, help="rows of the sheet (default: 6)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()

    run = Run.create(options.out / "run", load(CONFIG, options.overrides, preset=options.preset))
    experiment = run.experiment
    experiment.prepare_data()
    run.train(resume=True)
    training = experiment.dataset("train", fields=("depth",))
    baseline = MeanDepth(experiment.batches(training, experiment.evaluation.batch_size)).predict

    lines = [f"| method | protocol | n | {' | '.join(COLUMNS)} |", "| --- | --- | ---: |" + " ---: |" * len(COLUMNS)]
    errors: dict[str, float] = {}
    for name in experiment.evaluation.names:
        found = {
            "mean depth": score(options.out / "evaluation", experiment, baseline, name),
            "network": run.evaluate(name),
        }
        for method, scores in found.items():
            assert isinstance(scores, MapScores)
            values = [scores.mean.get(column) for column in COLUMNS]
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            lines.append(f"| {method} | {name} | {scores.n_ok} | {' | '.join(cells)} |")
            errors.setdefault(method, scores.mean["abs_rel"] or float("nan"))
    with atomic_write(options.out / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines))

    dataset = experiment.dataset("test")
    count = min(options.items, len(dataset))
    items = [dataset[round(i * (len(dataset) - 1) / max(count - 1, 1))] for i in range(count)]
    predict = predictor(run.model(), "cpu")
    batches = [collate([item]) for item in items]
    predictions = {
        name: [method(batch)[0].maps["depth"] for batch in batches]
        for name, method in (("mean depth", baseline), ("network", predict))
    }
    depth_gallery(
        [item["image"] for item in items], [item["depth"] for item in items], predictions, options.out / "depth.png"
    )
    share = errors["network"] / errors["mean depth"]
    print(f"\nAbsRel of the network is {share:.2f} of the mean depth's")
    return 0 if options.preset or share <= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
