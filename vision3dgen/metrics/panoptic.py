"""Panoptic quality: how well an image is divided into things and stuff.

A predicted and a true segment of one class match where their IoU is above a half, which can happen to each only once.
The pixels of the union without a truth are left out of it. Over all images, for each class with tp matches, fp
predicted and fn true segments left over:

    SQ = sum of IoU / tp      RQ = tp / (tp + fp / 2 + fn / 2)      PQ = SQ * RQ

averaged over the classes that have a segment in either. A predicted segment that is left over counts for nothing when
more than half of it lies where there is no truth or in a crowd of its class; crowds are never missed.
Source: Kirillov, He, Girshick, Rother and Dollár, CVPR 2019 (arXiv:1801.00868).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision3dgen.metrics.items import Failure, ItemEvaluator, cell, class_name, failures_of
from vision3dgen.metrics.results import Batch, Row
from vision3dgen.structures import PanopticSegments

NO_TRUTH = 0  # number of no segment


class PanopticMatches(NamedTuple):
    """What one image adds, class by class."""

    matched: list[tuple[int, float]]  # class and IoU of each match
    missed: list[int]  # classes of true segments without a match
    wrong: list[int]  # classes of predicted segments without one


def match_segments(
    prediction: PanopticSegments, segments: Tensor, labels: Tensor, crowd: Tensor | None = None
) -> PanopticMatches:
    """Match the segments of an image with the true ones.

    segments: (H, W) numbers of true segments from 1, 0 where nothing is known; labels, crowd: (S,) of segment 1, 2, ...
    Numbers without a pixel are no segments. Raises ValueError for another size, and for numbers without a label.
    """
    found, true = _numbers("prediction", prediction.segments, prediction.labels), _numbers("truth", segments, labels)
    if found.shape != true.shape:
        raise ValueError(f"segments must be {true.shape} like the truth, got {found.shape}")
    found_labels, true_labels = _with_none(prediction.labels), _with_none(labels)
    crowds = np.zeros(len(true_labels), dtype=bool)
    if crowd is not None:
        crowds[1:] = crowd.cpu().numpy()
    rows, columns = len(true_labels), len(found_labels)
    table = np.bincount(true.ravel() * columns + found.ravel(), minlength=rows * columns).reshape(rows, columns)
    true_sizes, found_sizes = table.sum(1), table.sum(0)
    union = true_sizes[:, None] + found_sizes[None] - table - table[NO_TRUTH][None]
    iou = np.divide(table, union, out=np.zeros(table.shape), where=union > 0)
    same = (true_labels[:, None] == found_labels[None]) & ~crowds[:, None]
    same[NO_TRUTH], same[:, NO_TRUTH] = False, False
    pairs = np.argwhere(same & (iou > 0.5))
    matched_true, matched_found = set(pairs[:, 0].tolist()), set(pairs[:, 1].tolist())
    wrong = []
    for k in range(1, columns):
        if not found_sizes[k] or k in matched_found:
            continue
        uncounted = table[NO_TRUTH, k] + table[crowds & (true_labels == found_labels[k]), k].sum()
        if uncounted <= 0.5 * found_sizes[k]:
            wrong.append(int(found_labels[k]))
    missed = [int(true_labels[k]) for k in range(1, rows) if true_sizes[k] and not crowds[k] and k not in matched_true]
    return PanopticMatches([(int(true_labels[t]), float(iou[t, f])) for t, f in pairs], missed, wrong)


def _numbers(name: str, segments: Tensor, labels: Tensor) -> np.ndarray:
    numbers = segments.cpu().numpy().astype(np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() <= len(labels):
        raise ValueError(
            f"segments of the {name} must be numbered 0 to {len(labels)}, the number of labels, got "
            f"{numbers.min()} to {numbers.max()}"
        )
    return numbers


def _with_none(labels: Tensor) -> np.ndarray:
    return np.concatenate([[-1], labels.cpu().numpy().astype(np.int64)])


class Quality(NamedTuple):
    pq: float
    sq: float  # 0 without a match
    rq: float


def panoptic_quality(ious: Sequence[float], wrong: int, missed: int) -> Quality | None:
    """PQ, SQ and RQ of one class from the IoU of its matches and the numbers left over; None for no segment at all."""
    count = len(ious) + wrong / 2 + missed / 2
    if not count:
        return None
    total = math.fsum(ious)
    return Quality(total / count, total / len(ious) if ious else 0.0, len(ious) / count)


@dataclass(frozen=True)
class PanopticScores:
    """Panoptic quality of a set of images. Values are None where no class has a segment."""

    seed: int
    about: dict[str, Any]
    n_images: int
    n_failed: int  # images without a prediction: all of their segments are missed
    metrics: dict[str, float | None]  # PQ, SQ, RQ, and with things and stuff told apart PQ_things, ...
    per_class: dict[str, dict[str, float | None]]  # PQ, SQ, RQ
    counts: dict[str, dict[str, int]]  # matched, wrong, missed
    failures: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A line per class, then the averages, and what they rest on."""
        lines = ["| class | matched | wrong | missed | PQ | SQ | RQ |", "| --- |" + " ---: |" * 6]
        for name, values in self.per_class.items():
            counts = " | ".join(str(self.counts[name][key]) for key in ("matched", "wrong", "missed"))
            quality = " | ".join(cell(values[key]) for key in ("PQ", "SQ", "RQ"))
            lines.append(f"| {name.replace('|', '/')} | {counts} | {quality} |")
        lines += ["", "| metric | value |", "| --- | ---: |"]
        lines += [f"| {name} | {cell(value)} |" for name, value in self.metrics.items()]
        lines += ["", f"{self.n_images} images, n_failed {self.n_failed}."]
        lines += [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class PanopticEvaluator(ItemEvaluator):
    """`PanopticSegments` of each image against batch["panoptic"] and ["segment_labels"], and ["segment_crowd"] if any.

    things: the classes 1 to `things` are things and those above it stuff, averaged apart; None: not told apart.
    classes: the names of the classes from 1, for the tables.
    """

    needs: ClassVar[tuple[str, ...]] = ("panoptic", "segment_labels")

    things: int | None = None
    classes: list[str] = field(default_factory=list)
    batch_size: int = 1

    @property
    def names(self) -> Sequence[str]:
        return ["panoptic"]

    def describe(self, name: str) -> dict[str, Any]:
        return {"name": name, "things": self.things}

    def row(self, name: str, prediction: Any, batch: Batch, index: int, *, seed: int) -> Row:
        segments, labels = batch["panoptic"][index], batch["segment_labels"][index]
        crowd = batch["segment_crowd"][index] if "segment_crowd" in batch else None
        failure = prediction.reason if isinstance(prediction, Failure) else ""
        if failure:
            none = torch.zeros(0, dtype=torch.int64)
            prediction = PanopticSegments(torch.zeros_like(segments), none, none.float())
        found = match_segments(prediction, segments, labels, crowd)
        return {**found._asdict(), "failure": failure}

    def scores(self, name: str, rows: Sequence[Row], *, seed: int, about: Mapping[str, Any]) -> PanopticScores:
        found = [PanopticMatches([(k, iou) for k, iou in row["matched"]], row["missed"], row["wrong"]) for row in rows]
        return summarize_panoptic(
            found, things=self.things, classes=self.classes, failures=failures_of(rows), seed=seed, about=about
        )


def summarize_panoptic(
    images: Sequence[PanopticMatches], *, things: int | None = None, classes: Sequence[str] = (),
    failures: Mapping[str, str] | None = None, seed: int = 0, about: Mapping[str, Any] | None = None,
) -> PanopticScores:  # fmt: skip
    """The scores of images, in any order; for the arguments see `PanopticEvaluator`."""
    ious: dict[int, list[float]] = {}
    left: dict[int, dict[str, int]] = {}
    for image in images:
        for label, iou in image.matched:
            ious.setdefault(label, []).append(iou)
        for key, labels in (("wrong", image.wrong), ("missed", image.missed)):
            for label in labels:
                counts = left.setdefault(label, {"wrong": 0, "missed": 0})
                counts[key] += 1
    quality: dict[int, Quality] = {}
    counts_of: dict[str, dict[str, int]] = {}
    for label in sorted({*ious, *left}):
        mine = left.get(label, {"wrong": 0, "missed": 0})
        of = panoptic_quality(ious.get(label, []), mine["wrong"], mine["missed"])
        assert of is not None
        quality[label] = of
        counts_of[class_name(label, classes, first=1)] = {"matched": len(ious.get(label, [])), **mine}
    metrics = _means(list(quality.values()), "")
    if things is not None:
        metrics |= _means([of for label, of in quality.items() if label <= things], "_things")
        metrics |= _means([of for label, of in quality.items() if label > things], "_stuff")
    return PanopticScores(
        seed=seed,
        about=dict(about or {}),
        n_images=len(images),
        n_failed=len(failures or {}),
        metrics=metrics,
        per_class={
            class_name(label, classes, first=1): {"PQ": of.pq, "SQ": of.sq, "RQ": of.rq}
            for label, of in quality.items()
        },
        counts=counts_of,
        failures=dict(failures or {}),
    )


def _means(qualities: Sequence[Quality], suffix: str) -> dict[str, float | None]:
    """Over classes."""
    columns = list(zip(*qualities)) if qualities else [(), (), ()]
    return {
        name + suffix: math.fsum(values) / len(values) if values else None
        for name, values in zip(("PQ", "SQ", "RQ"), columns)
    }
