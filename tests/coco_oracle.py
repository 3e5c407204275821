"""Random detection data sets, and what pycocotools says of them."""

import contextlib
import io

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision3dgen.metrics import Truths
from vision3dgen.structures import Detections

IGNORED_AREA = 2e10  # outside all of COCO's ranges: pycocotools ignores such a truth, and overwrites "ignore" itself


def random_image(
    rng: np.random.Generator, side: int, classes: int, most: int, *, masks: bool
) -> tuple[Detections, Truths]:
    """One image: truths, detections around some of them, equal scores, crowds, ignored objects; perhaps nothing."""
    count = int(rng.integers(0, most // 2 + 1))
    corner = rng.integers(0, side - 2, (count, 2))
    extent = rng.integers(1, 1 + np.maximum(side - corner - 1, 1))
    boxes = np.concatenate([corner, corner + np.minimum(extent, rng.integers(1, side, (count, 1)))], 1).astype(float)
    labels = rng.integers(1, classes + 1, count)
    crowd = rng.random(count) < 0.2
    truths = {"crowd": crowd, "ignored": (rng.random(count) < 0.15) & ~crowd}
    # Detections: truths moved a little, some twice, and others anywhere
    picked = rng.integers(0, count, rng.integers(0, most + 1)) if count else np.zeros(0, int)
    reach = np.maximum(boxes[picked, 2:] - boxes[picked, :2], 3) / 4
    moved = boxes[picked] + np.rint(rng.uniform(-1, 1, (len(picked), 4)) * np.tile(reach, 2) * rng.random())
    free = rng.integers(0, side, (int(rng.integers(0, most // 3 + 1)), 4))
    found = np.concatenate([moved, np.concatenate([free[:, :2], free[:, :2] + 1 + free[:, 2:]], 1)])
    found = found.clip(0, side)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    found_labels = np.concatenate([labels[picked], rng.integers(1, classes + 1, len(free))])
    swapped = rng.random(len(found)) < 0.1
    found_labels[swapped] = rng.integers(1, classes + 1, int(swapped.sum()))
    scores = rng.integers(1, 30, len(found)) / 31
    drawn = drawn_true = None
    if masks:
        drawn, drawn_true = _ragged(rng, found, side), _ragged(rng, boxes, side)
    return (
        Detections(torch.tensor(found), torch.tensor(scores), torch.tensor(found_labels), drawn),
        Truths(
            torch.tensor(boxes),
            torch.tensor(labels),
            masks=drawn_true,
            **{name: torch.tensor(flags) for name, flags in truths.items()},
        ),
    )


def _ragged(rng: np.random.Generator, boxes: np.ndarray, side: int) -> torch.Tensor:
    """Masks that fill most of their boxes; now and then none of it."""
    masks = np.zeros((len(boxes), side, side), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
        mask[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < rng.choice([1.0, 0.9, 0.6])
    return torch.from_numpy(masks)


def coco_evaluation(images: list[tuple[Detections, Truths]], side: int, classes: int, *, masks: bool) -> COCOeval:
    """pycocotools' evaluation of images numbered in their order, accumulated and summarized."""
    annotations, results = [], []
    for number, (found, true) in enumerate(images):
        for k, box in enumerate(true.boxes.tolist()):
            x1, y1, x2, y2 = box
            one = {"id": len(annotations) + 1, "image_id": number, "category_id": int(true.labels[k])}
            one |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(true.crowd[k])}
            if masks:
                one["segmentation"] = _encoded(true.masks[k])
                one["area"] = float(true.masks[k].sum())
            one["area"] = IGNORED_AREA if true.ignored[k] else one["area"]
            annotations.append(one)
        for k, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
            one = {"image_id": number, "category_id": int(found.labels[k]), "score": float(found.scores[k])}
            one |= {"segmentation": _encoded(found.masks[k])} if masks else {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(one)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number, "height": side, "width": side} for number in range(len(images))],
        "categories": [{"id": k + 1, "name": str(k + 1)} for k in range(classes)],
        "annotations": annotations,
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found_coco = truth.loadRes(results) if results else COCO()
        if not results:
            found_coco.dataset = truth.dataset | {"annotations": []}
            found_coco.createIndex()
        evaluation = COCOeval(truth, found_coco, "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _encoded(mask: torch.Tensor) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
