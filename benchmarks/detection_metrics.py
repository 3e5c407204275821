"""How long COCO's scores of a thousand images with a hundred detections each take, and the same with pycocotools.

    python benchmarks/detection_metrics.py --out runs/detection_metrics

Random images with 20 objects, one in ten a crowd, and 100 detections around them, of 10 classes. Both begin with
detections and truths in memory, ours as tensors, pycocotools' as its results and annotations, and end with all of
COCO's numbers, which must agree to 1e-6; both encode the masks, given as arrays. CPU seconds of one thread are counted,
so that it does not matter who else uses the machine. Leaves table.md and detection_metrics.jsonl in the output folder.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown

from vision3dgen.experiment import environment
from vision3dgen.files import atomic_write
from vision3dgen.metrics import DETECTION_PROTOCOLS, Truths, average_precision, record_of
from vision3dgen.metrics.precision import headlines
from vision3dgen.structures import Detections

SIDE = 240
OBJECTS = 20
console = Console(width=None if sys.stdout.isatty() else 160)


class Row(NamedTuple):
    overlap: str
    images: int
    detections: int  # in each
    ours: float  # CPU seconds
    pycocotools: float
    encoding: float  # of these, pycocotools' encoding of masks
    ratio: float
    ap: float
    difference: float  # the largest between the two, over all of COCO's numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--overlaps", nargs="+", choices=["boxes", "masks"], default=["boxes", "masks"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for overlap in options.overlaps:
        rows.append(measure(overlap, options.images, options.detections, options.classes))
        console.print(rows[-1])
        if rows[-1].difference > 1e-6:
            raise ValueError(f"{overlap}: the two differ by {rows[-1].difference:g}")
    write(options.out, rows)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def measure(overlap: str, images: int, detections: int, classes: int) -> Row:
    """Both evaluations of the same images; ours image by image as a run does it, its time added up."""
    protocol = DETECTION_PROTOCOLS[f"coco_{overlap}"]
    rng = np.random.default_rng(0)
    records, ours, rival = [], 0.0, Rival(masks=overlap == "masks", classes=classes)
    for number in range(images):
        found, true = make_image(rng, detections, classes, masks=overlap == "masks")
        rival.add(number, found, true)
        start = time.process_time()
        records.append(record_of(found, true, protocol, id=f"{number:06d}"))
        ours += time.process_time() - start
    start = time.process_time()
    values = headlines(average_precision(records, protocol), protocol)
    ours += time.process_time() - start
    theirs, seconds = rival.evaluate()
    seconds += rival.encoding
    mine = np.array([np.nan if value is None else value for value in values.values()])
    difference = float(np.abs(mine - theirs).max())
    return Row(overlap, images, detections, ours, seconds, rival.encoding, seconds / ours, float(mine[0]), difference)


def make_image(
    rng: np.random.Generator, detections: int, classes: int, *, masks: bool
) -> tuple[Detections, Truths]:  # fmt: skip
    """Truths of all of COCO's sizes, and detections around them with corners off by a tenth or so."""
    side = np.exp(rng.uniform(np.log(8), np.log(200), (OBJECTS, 2)))
    corner = rng.uniform(0, SIDE - side)
    boxes = np.concatenate([corner, corner + side], 1).round()
    picked = rng.integers(0, OBJECTS, detections)
    moved = boxes[picked] + rng.normal(0, 0.1, (detections, 4)) * np.tile(side[picked], 2)
    moved = moved.round().clip(0, SIDE)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    labels = rng.integers(1, classes + 1, OBJECTS)
    return (
        Detections(
            torch.tensor(moved),
            torch.tensor(rng.random(detections)),
            torch.tensor(labels[picked]),
            ellipses(moved) if masks else None,
        ),
        Truths(
            torch.tensor(boxes),
            torch.tensor(labels),
            masks=ellipses(boxes) if masks else None,
            crowd=torch.tensor(rng.random(OBJECTS) < 0.1),
        ),
    )


def ellipses(boxes: np.ndarray) -> torch.Tensor:
    """Masks (N, SIDE, SIDE) that fill boxes as ellipses."""
    centers, radii = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    place = np.arange(SIDE) + 0.5
    x, y = ((place - centers[:, axis, None]) / np.maximum(radii[:, axis, None], 0.5) for axis in (0, 1))
    return torch.from_numpy(x[:, None] ** 2 + y[:, :, None] ** 2 <= 1)


class Rival:
    """pycocotools' evaluation, given image by image."""

    def __init__(self, *, masks: bool, classes: int):
        self.masks, self.classes, self.images, self.encoding = masks, classes, 0, 0.0
        self.annotations: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def add(self, number: int, found: Detections, true: Truths) -> None:
        from pycocotools import mask as coco_mask

        def described(boxes: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor | None) -> list[dict[str, Any]]:
            rows, codes = [], []
            if masks is not None:
                start = time.process_time()
                codes = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().view(np.uint8)))
                self.encoding += time.process_time() - start
            for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                row: dict[str, Any] = {"image_id": number, "category_id": int(labels[k])}
                row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                if masks is not None:
                    del row["bbox"]
                    row["segmentation"] = codes[k]
                    row["area"] = int(masks[k].sum())
                rows.append(row)
            return rows

        self.images += 1
        for k, row in enumerate(described(true.boxes, true.labels, true.masks)):
            self.annotations.append(row | {"id": len(self.annotations) + 1, "iscrowd": int(true.crowd[k])})
        rows = described(found.boxes, found.labels, found.masks)
        self.results += [row | {"score": float(score)} for row, score in zip(rows, found.scores)]

    def evaluate(self) -> tuple[np.ndarray, float]:
        """COCO's twelve numbers, and the seconds from results in memory to these."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO()
        truth.dataset = {
            "images": [{"id": number, "height": SIDE, "width": SIDE} for number in range(self.images)],
            "categories": [{"id": k + 1, "name": str(k + 1)} for k in range(self.classes)],
            "annotations": self.annotations,
            "info": {},
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            found = truth.loadRes(self.results)
            start = time.process_time()
            evaluation = COCOeval(truth, found, "segm" if self.masks else "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats, time.process_time() - start


def write(out: Path, rows: list[Row]) -> None:
    """table.md for people, detection_metrics.jsonl for programs."""
    lines = [
        "| overlap of | images x detections | ours, s | pycocotools, s | of it encoding | ratio | AP | difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.overlap} | {row.images} x {row.detections} | {row.ours:.2f} | {row.pycocotools:.2f} | "
        f"{row.encoding:.2f} | {row.ratio:.1f} | {row.ap:.4f} | {row.difference:.1e} |"
        for row in rows
    ]
    about = environment()
    lines += ["", f"{date.today()}, CPU seconds of one thread, {about.get('device', 'CPU')}, the same run for both."]
    with atomic_write(out / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    with atomic_write(out / "detection_metrics.jsonl") as file:
        file.writelines(json.dumps(row._asdict() | {"environment": about}).encode() + b"\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
