"""The evaluation of semantic segmentation: every number comes from one table of pixels, which adds up over images.

With n_ij the pixels of class i that were taken for class j, t_i = sum_j n_ij and p_j = sum_i n_ij:

    IoU_i = n_ii / (t_i + p_i - n_ii)      pixel accuracy = sum n_ii / sum t_i      class accuracy_i = n_ii / t_i

mIoU and mean accuracy are over the classes that have a pixel in the truth; the frequency-weighted IoU is
sum t_i IoU_i / sum t_i. Source: Long, Shelhamer and Darrell, CVPR 2015.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from vision3dgen.metrics.items import Failure, ItemEvaluator, cell, class_name, failures_of
from vision3dgen.metrics.results import Batch, Row

VOID = 255  # in the truth: not asked


def segmentation_matrix(
    predicted: Shaped[Tensor, "h w"], truth: Shaped[Tensor, "H W"], classes: int
) -> Int64[Tensor, "K P"]:
    """Pixels of each class (row) that were taken for each class (column), where the truth is not 255.

    The last column, beyond the classes, is of pixels taken for none of them. Raises ValueError for another size and for
    a class of the truth that is neither below `classes` nor 255.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"the class map must be {tuple(truth.shape)} like the truth, got {tuple(predicted.shape)}")
    asked = truth != VOID
    true, found = truth[asked].long(), predicted[asked].long()
    if len(true) and not 0 <= int(true.min()) <= int(true.max()) < classes:
        raise ValueError(f"classes must be 0 to {classes - 1} or {VOID}, got {int(true.min())} to {int(true.max())}")
    found = found.where((found >= 0) & (found < classes), classes)
    return torch.bincount(true * (classes + 1) + found, minlength=classes * (classes + 1)).view(classes, classes + 1)


@dataclass(frozen=True)
class SegmentationScores:
    """IoU and accuracy of a set of images. Values are None where no pixel defines them."""

    seed: int
    about: dict[str, Any]
    n_images: int
    n_failed: int  # images without a prediction: each of their pixels is wrong
    pixels: int
    metrics: dict[str, float | None]  # mIoU, pixel_accuracy, mean_accuracy, weighted_iou
    per_class: dict[str, dict[str, float | None]]  # IoU and accuracy
    class_pixels: dict[str, int]
    confusion: list[list[int]]  # [truth][prediction], the last column of pixels taken for no class
    failures: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A line per class that occurs, then the averages, and what they rest on."""
        lines = ["| class | pixels | IoU | accuracy |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {name.replace('|', '/')} | {self.class_pixels[name]} | {cell(row['IoU'])} | {cell(row['accuracy'])} |"
            for name, row in self.per_class.items()
            if self.class_pixels[name] or row["IoU"] is not None
        ]
        lines += ["", "| metric | value |", "| --- | ---: |"]
        lines += [f"| {name} | {cell(value)} |" for name, value in self.metrics.items()]
        lines += ["", f"{self.n_images} images, {self.pixels} pixels, n_failed {self.n_failed}."]
        lines += [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class SegmentationEvaluator(ItemEvaluator):
    """Class maps (B, H, W), or scores of classes (B, K, H, W), against batch["semantic"], where that is not 255.

    Images of differing sizes are lists in both. classes: the names of the classes from 0, for the tables.
    """

    needs: ClassVar[tuple[str, ...]] = ("semantic",)

    classes: list[str] = field(default_factory=list)
    batch_size: int = 4

    @property
    def names(self) -> Sequence[str]:
        return ["segmentation"]

    def describe(self, name: str) -> dict[str, Any]:
        return {"name": name, "void": VOID}

    def row(self, name: str, prediction: Any, batch: Batch, index: int, *, seed: int) -> Row:
        truth = batch["semantic"][index].cpu()
        asked = truth[truth != VOID]
        failure, found = "", torch.full_like(truth, -1)
        if isinstance(prediction, Failure):
            failure = prediction.reason
        elif prediction.is_floating_point() and prediction.ndim == 3 and not bool(prediction.isfinite().all()):
            failure = "the scores of classes are not finite"
        else:
            found = prediction.argmax(0).cpu() if prediction.ndim == 3 else prediction.cpu()
        known = [found[truth != VOID].max()] if found.shape == truth.shape and len(asked) else []
        classes = max([0, *(int(value) for value in [*known, *([asked.max()] if len(asked) else [])])]) + 1
        matrix = segmentation_matrix(found, truth, classes)
        cells = matrix.nonzero()
        rows = [[int(t), int(p) if p < classes else -1, int(matrix[t, p])] for t, p in cells]
        return {"cells": rows, "failure": failure}

    def scores(self, name: str, rows: Sequence[Row], *, seed: int, about: Mapping[str, Any]) -> SegmentationScores:
        return summarize_segmentation(
            rows, classes=self.classes, failures=failures_of(rows), seed=seed, about=dict(about)
        )


def summarize_segmentation(
    rows: Sequence[Row], *, classes: Sequence[str] = (), failures: Mapping[str, str] | None = None, seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> SegmentationScores:  # fmt: skip
    """The scores of rows that `SegmentationEvaluator` wrote, in any order; `classes` are names from 0."""
    cells = [entry for row in rows for entry in row["cells"]]
    count = max([len(classes) - 1, *(max(t, p) for t, p, _ in cells)]) + 1
    matrix = torch.zeros(count, count + 1, dtype=torch.int64)
    for t, p, pixels in cells:
        matrix[t, p] += pixels  # -1 is the last column
    both, truth, predicted = matrix[:, :count].diagonal(), matrix.sum(1), matrix[:, :count].sum(0)
    per_class, names = {}, [class_name(label, classes, first=0) for label in range(count)]
    for label, name in enumerate(names):
        union = int(truth[label] + predicted[label] - both[label])
        per_class[name] = {
            "IoU": int(both[label]) / union if union else None,
            "accuracy": int(both[label]) / int(truth[label]) if truth[label] else None,
        }
    asked = [name for label, name in enumerate(names) if truth[label]]
    total = int(truth.sum())
    weighted = math.fsum(int(truth[names.index(name)]) * (per_class[name]["IoU"] or 0.0) for name in asked)
    metrics = {
        "mIoU": _mean([per_class[name]["IoU"] for name in asked]),
        "pixel_accuracy": int(both.sum()) / total if total else None,
        "mean_accuracy": _mean([per_class[name]["accuracy"] for name in asked]),
        "weighted_iou": weighted / total if total else None,
    }
    return SegmentationScores(
        seed=seed,
        about=dict(about or {}),
        n_images=len(rows),
        n_failed=len(failures or {}),
        pixels=total,
        metrics=metrics,
        per_class=per_class,
        class_pixels=dict(zip(names, truth.tolist())),
        confusion=matrix.tolist(),
        failures=dict(failures or {}),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
