"""Detectors and segmentation networks on generated rooms, from random weights to scores on rooms nobody trained on.

    python benchmarks/detection.py --out runs/detection

Draws the rooms, trains a sliding window, R-CNN, FCN, Faster R-CNN, Mask R-CNN, panoptic FPN and Mesh R-CNN as
configured, and a U-Net for each upsampling that is asked for. Mask R-CNN starts from the Faster R-CNN, the next two
from the Mask R-CNN, and their steps come on top. With --pennfudan, Faster R-CNN on photographs of pedestrians too,
scored on the photographs that it was trained on and on the others. With --proposals, the share of the objects of both
that a region nobody learned is on.
Leaves in the output folder: table.md, table.jsonl, detections.png, meshes.png, segments.png, pedestrians.png and a run
folder for each. Interrupted, it goes on where it was; CPU seconds are then those of the last part.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown

from vision3dgen import viz
from vision3dgen.config import load
from vision3dgen.datasets import PennFudan, SceneInstances, collate
from vision3dgen.engine import to_device
from vision3dgen.experiment import Run, environment, predictor
from vision3dgen.files import atomic_write
from vision3dgen.heads import EdgeRegions, SelectiveSearchRegions, WindowRegions
from vision3dgen.layers import UPSAMPLINGS
from vision3dgen.ops import box_iou
from vision3dgen.structures import Detections

CONFIGS = Path(__file__).parents[1] / "configs"
console = Console(width=None if sys.stdout.isatty() else 150)


class Trained(NamedTuple):
    config: str
    after: str | None = None  # whose weights it starts from
    part: str = ""  # of the model that takes them
    overrides: Sequence[str] = ()


FEW = ("trainer.steps=400", "trainer.schedule.warmup=20", "trainer.validation.every=200")
TRAINED = {
    "sliding window": Trained("detection_windows_scenes"),
    "R-CNN": Trained("detection_rcnn_scenes"),
    "FCN": Trained("segmentation_fcn_scenes"),
    "Faster R-CNN": Trained("detection_fasterrcnn_scenes"),
    "Mask R-CNN": Trained("detection_maskrcnn_scenes", "Faster R-CNN", "", FEW),
    "panoptic FPN": Trained("panoptic_fpn_scenes", "Mask R-CNN", "detector", FEW),
    "Mesh R-CNN": Trained("detection_meshrcnn_scenes", "Mask R-CNN", "", FEW),
}
COLUMNS = {  # of the table: what a score is called under which name of an evaluation
    "AP": ("coco_boxes", "AP"),
    "AP50": ("coco_boxes", "AP50"),
    "mask AP": ("coco_masks", "AP"),
    "mask AP50": ("coco_masks", "AP50"),
    "mesh AP50": ("pix3d_meshes", "AP"),
    "PQ": ("panoptic", "PQ"),
    "mIoU": ("segmentation", "mIoU"),
}
DRAWN = 6  # test images in a picture
TIMED = 16


class Row(NamedTuple):
    model: str
    split: str
    parameters: int
    steps: int
    cpu_seconds: float  # of the training, since it was last started
    milliseconds: float  # of CPU, for an image
    images: int
    failed: int
    scores: dict[str, float | None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rooms", type=Path, help="where the rooms are, or will be (default: OUT/rooms)")
    parser.add_argument("--models", nargs="*", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--upsamplings", nargs="*", choices=UPSAMPLINGS, default=[], help="of U-Nets (default: none)")
    parser.add_argument("--pennfudan", type=Path, metavar="FOLDER", help="train on these photographs too")
    parser.add_argument("--proposals", action="store_true", help="measure the recall of regions that nobody learned")
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    runs: dict[str, Run] = {}
    rows: list[Row] = []
    for model in options.models:
        runs[model] = run = create(options, TRAINED[model], model)
        rows.append(row_of(model, run, trained(model, run), "test", device))
    for name in options.upsamplings:
        model = f"U-Net, {name}"
        run = create(options, Trained("segmentation_unet_scenes"), model, [f"model.upsampling={name}"])
        rows.append(row_of(model, run, trained(model, run), "test", device))
    if options.pennfudan is not None:
        model = "Faster R-CNN, pedestrians"
        given = [f"data.root={options.pennfudan}"]
        run = create(options, Trained("detection_fasterrcnn_pennfudan"), model, given, rooms=False)
        seconds = trained(model, run)
        rows += [row_of(model, run, seconds, split, device) for split in ("train", "test")]
        pedestrians(options.out / "pedestrians.png", run, device)
    if options.proposals:
        folders = {"rooms, test": SceneInstances(str(options.rooms or options.out / "rooms"), "test", fields=[])}
        if options.pennfudan is not None:
            folders["pedestrians"] = PennFudan(str(options.pennfudan), "train", max_side=256)
        write_recalls(options.out / "proposals.md", folders)
    write_tables(options.out, rows)
    draw(options.out, runs, device)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def create(
    options: argparse.Namespace, about: Trained, model: str, overrides: Sequence[str] = (), *, rooms: bool = True
) -> Run:
    given = [*(about.overrides if options.preset is None else ()), *overrides]
    if rooms:
        given.append(f"prepare.root={options.rooms or options.out / 'rooms'}")
    if about.after is not None:
        source = {"source": str(folder_of(options.out, about.after)), "part": "", "fitting": True}
        given.append(f"weights={json.dumps({about.part: source})}")
    return Run.create(
        folder_of(options.out, model), load(CONFIGS / f"{about.config}.yaml", given, preset=options.preset)
    )


def folder_of(out: Path, model: str) -> Path:
    return out / "".join(letter if letter.isalnum() else "_" for letter in model.lower())


def trained(model: str, run: Run) -> float:
    """Train a run, or go on with it; CPU seconds of that."""
    console.rule(model)
    run.experiment.prepare_data()
    began = time.process_time()
    run.train(resume=True)
    return time.process_time() - began


def row_of(model: str, run: Run, seconds: float, split: str, device: torch.device) -> Row:
    """Score a run under all names of its evaluation."""
    scores: dict[str, float | None] = {}
    images = failed = 0
    for name in run.experiment.evaluation.names:
        found: Any = run.evaluate(name, split=split, device=device)
        console.print(Markdown(found.to_markdown()))
        images, failed = found.n_images, max(failed, found.n_failed)
        scores |= {column: found.metrics[key] for column, (own, key) in COLUMNS.items() if own == name}
    network = run.model(device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    steps = run.experiment.trainer["steps"]
    return Row(model, split, parameters, steps, seconds, milliseconds(run, device), images, failed, scores)


def milliseconds(run: Run, device: torch.device) -> float:
    """CPU time of an image, one after another, after one that does not count."""
    predict = predictor(run.model(device), device)
    dataset = run.experiment.dataset("test")
    batches = [collate([dataset[index]]) for index in range(min(TIMED, len(dataset)))]
    predict(batches[0])
    began = time.process_time()
    for batch in batches:
        predict(batch)
    return 1000 * (time.process_time() - began) / len(batches)


# --------------------------------------------------------------------------------------------------------- proposals

REGIONS = {
    "sliding windows": WindowRegions(sides=(16, 24, 36, 54, 81, 122), ratios=(0.4, 0.7, 1.0, 1.7, 2.5), overlap=0.6),
    "selective search": SelectiveSearchRegions(),
    "edge boxes": EdgeRegions(),
}
COUNTS, OVERLAPS = (10, 100, 1000), (0.5, 0.7)


def best_overlap(boxes: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return box_iou(boxes, found).amax(1) if len(found) else torch.zeros(len(boxes))


def write_recalls(path: Path, folders: Mapping[str, Any]) -> None:
    """The share of all objects that one of the first regions overlaps enough; CPU milliseconds of an image."""
    heads = [f"{count} at {overlap}" for overlap in OVERLAPS for count in COUNTS]
    text = [f"| images | objects | regions | {' | '.join(heads)} | mean count | ms per image |"]
    text.append("| --- | ---: | --- |" + " ---: |" * (len(heads) + 2))
    for name, dataset in folders.items():
        items = [dataset[index] for index in range(len(dataset))]
        objects = sum(len(item["boxes"]) for item in items)
        for kind, regions in REGIONS.items():
            found, began = [], time.process_time()
            for item in items:
                boxes, _ = regions.find(item["image"])
                draws = torch.Generator().manual_seed(0)
                found.append(boxes[torch.randperm(len(boxes), generator=draws)] if kind == "sliding windows" else boxes)
            each = 1000 * (time.process_time() - began) / len(items)
            best = [
                [
                    box_iou(item["boxes"], own[:count]).amax(1) if len(own) else torch.zeros(len(item["boxes"]))
                    for count in COUNTS
                ]
                for item, own in zip(items, found)
                if len(item["boxes"])
            ]
            recall = [
                float(torch.cat([overlaps[index] >= least for overlaps in best]).float().mean())
                for least in OVERLAPS
                for index in range(len(COUNTS))
            ]
            count = sum(map(len, found)) / len(found)
            shares = " | ".join(f"{value:.2f}" for value in recall)
            text.append(f"| {name} | {objects} | {kind} | {shares} | {count:.0f} | {each:.0f} |")
            console.print(text[-1])
    with atomic_write(path) as file:
        file.write("\n".join([*text, ""]).encode())


# ------------------------------------------------------------------------------------------------------------ tables


def write_tables(out: Path, rows: Sequence[Row]) -> None:
    """table.md for people and table.jsonl, a line per row, for programs."""
    known, today = environment(), date.today().isoformat()
    columns = [column for column in COLUMNS if any(column in row.scores for row in rows)]
    text = [
        f"Measured {today} on {known['device']}, {known['threads']} thread(s), torch {known['torch']}.",
        "",
        f"| model | split | images | parameters | steps | CPU s | {' | '.join(columns)} | ms per image |",
        "| --- | --- |" + " ---: |" * (len(columns) + 5),
    ]
    for row in rows:
        values = [row.scores.get(column) for column in columns]
        cells = " | ".join("-" if value is None else f"{value:.3f}" for value in values)
        text.append(
            f"| {row.model} | {row.split} | {row.images} | {row.parameters:,} | {row.steps} | {row.cpu_seconds:.0f} | "
            f"{cells} | {row.milliseconds:.0f} |"
        )
    about = {"date": today, "environment": known}
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps({**row._asdict(), **about}) + "\n" for row in rows).encode())


# ---------------------------------------------------------------------------------------------------------- pictures


def draw(out: Path, runs: Mapping[str, Run], device: torch.device) -> None:
    """What the detectors find in the first test images, their meshes, and what is said of every pixel."""
    found: dict[str, Sequence[Any]] = {}
    batch: dict[str, Any] = {}
    for model, run in runs.items():
        dataset = run.experiment.dataset("test", fields=["masks", "semantic", "camera", "mesh"])
        batch = collate([dataset[index] for index in range(min(DRAWN, len(dataset)))])
        found[model] = predictor(run.model(device), device)(to_device(batch, device))
        found[model] = to_device(found[model], torch.device("cpu"))
    if not batch:
        return
    names, images = dataset.things, list(batch["image"])
    meshes = batch["mesh"].split([len(boxes) for boxes in batch["boxes"]])
    truths = [
        Detections(boxes, torch.ones(len(boxes)), labels, masks, own)
        for boxes, labels, masks, own in zip(batch["boxes"], batch["labels"], batch["masks"], meshes)
    ]
    plain = {name: found[name] for name in ("sliding window", "R-CNN", "Faster R-CNN", "Mask R-CNN") if name in found}
    if plain:
        seen = [truth._replace(meshes=None) for truth in truths]
        enlarged = [enlarge(image) for image in images]
        bigger = {name: [grow(own) for own in each] for name, each in plain.items()}
        viz.detection_gallery(enlarged, [grow(own) for own in seen], bigger, out / "detections.png", names=names)
    if "Mesh R-CNN" in found:
        sizes = [(2 * image.shape[1], 2 * image.shape[2]) for image in images]
        cameras = [batch["camera"][index].resize(size) for index, size in enumerate(sizes)]
        shapes = [grow(truth._replace(masks=None)) for truth in truths]
        mine = [grow(own._replace(masks=None)) for own in found["Mesh R-CNN"]]
        seen_large = [enlarge(image) for image in images]
        viz.detection_gallery(
            seen_large, shapes, {"Mesh R-CNN": mine}, out / "meshes.png", names=names, by="object", cameras=cameras
        )
    pixels = {name: found[name] for name in ("FCN", "panoptic FPN") if name in found}
    if pixels:
        rows = []
        for index, (image, truth) in enumerate(zip(images, batch["semantic"])):
            drawn = [viz.class_picture(pixels["FCN"][index])] if "FCN" in pixels else []
            if "panoptic FPN" in pixels:
                drawn.append(viz.panoptic_picture(pixels["panoptic FPN"][index]))
            rows.append([image, viz.class_picture(truth), *drawn])
        viz.gallery(rows, ["image", "truth", *pixels], path=out / "segments.png", gap=2)


def enlarge(image: torch.Tensor, times: int = 2) -> torch.Tensor:
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def grow(found: Detections, times: int = 2) -> Detections:
    """Detections of the enlarged image."""
    masks = None if found.masks is None else enlarge(found.masks, times)
    return found._replace(boxes=times * found.boxes, masks=masks)


def pedestrians(path: Path, run: Run, device: torch.device) -> None:
    """What is found in photographs that were not trained on."""
    dataset = run.experiment.dataset("test")
    batch = collate([dataset[index] for index in range(min(DRAWN, len(dataset)))])
    found = predictor(run.model(device), device)(batch)
    truths = [
        Detections(boxes, torch.ones(len(boxes)), labels) for boxes, labels in zip(batch["boxes"], batch["labels"])
    ]
    viz.detection_gallery(list(batch["image"]), truths, {"Faster R-CNN": found}, path, names=dataset.categories)


if __name__ == "__main__":
    sys.exit(main())
