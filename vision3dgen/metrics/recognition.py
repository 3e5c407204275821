"""Scores of classifiers: accuracy, top-k, per class, confusion matrix. Counts add up, so batches do not matter."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_numbers
from vision3dgen.files import atomic_write
from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict

Z = 1.959964  # of a two-sided interval of 95 %


def rank_of_label(scores: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """How many classes come before the label, 0 for a right prediction; equal scores go in the order of the classes.

    An item is right among the top k when its rank is below k. Raises ValueError for scores that are not a number.
    """
    check_numbers(scores=scores)
    _check_classes(labels, scores.shape[1])
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def top_k_accuracy(scores: Float[Tensor, "B K"], labels: Int[Tensor, " B"], k: int = 1) -> float:
    """The share of items whose label is among the k largest scores; NaN for no items."""
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be from 1 to the {scores.shape[1]} classes, got {k}")
    right = int((rank_of_label(scores, labels) < k).sum())
    return right / len(labels) if len(labels) else math.nan


def confusion_matrix(predicted: Int[Tensor, " B"], labels: Int[Tensor, " B"], classes: int) -> Int[Tensor, "K K"]:
    """How many items of each class (row) were taken for each class (column); the matrices of batches add up."""
    _check_classes(labels, classes)
    _check_classes(predicted, classes, "predicted")
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def _check_classes(labels: Tensor, classes: int, name: str = "labels") -> None:
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must be 0 to {classes - 1} for {classes} classes, got {int(labels[index])} at {index}"
        )


class Interval(NamedTuple):
    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """The 95 % interval of a share, `right` of `total` independent items. Source: Wilson 1927."""
    if not 0 <= right <= total or not total:
        raise ValueError(f"right must be from 0 to total, and total > 0, got {right} of {total}")
    share = right / total
    middle = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2)) / (1 + Z**2 / total)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))


@dataclass(frozen=True)
class ClassScores:
    """What a classifier got right. `top` maps k to the accuracy among the first k; `confusion[truth][prediction]` are
    counts; items that failed (scores that are not finite) count as wrong and are in no column of the matrix.
    """

    classes: list[str]
    total: int
    n_failed: int
    top: dict[int, float]
    interval: Interval
    per_class: dict[str, float | None]  # None where the class has no item
    class_sizes: dict[str, int]
    confusion: list[list[int]]
    failures: list[str]
    seed: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.top[1]

    @property
    def class_mean(self) -> float:
        """The mean of the classes' accuracies, which does not depend on how frequent they are."""
        known = [value for value in self.per_class.values() if value is not None]
        return math.fsum(known) / len(known)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        values = asdict(self) | {"accuracy": self.accuracy, "class_mean": self.class_mean}
        return values | {"top": {str(k): value for k, value in self.top.items()}, "interval": list(self.interval)}

    def to_markdown(self) -> str:
        """A table of the classes, then the averages and what they rest on."""
        lines = ["| class | n | accuracy | most often taken for |", "| --- | ---: | ---: | --- |"]
        for label, name in enumerate(self.classes):
            row = [0 if other == label else count for other, count in enumerate(self.confusion[label])]
            worst = max(range(len(row)), key=row.__getitem__)
            taken = f"{self.classes[worst]} ({row[worst]})" if row[worst] else ""
            value = self.per_class[name]
            shown = "-" if value is None else f"{value:.4f}"
            lines.append(f"| {_cell(name)} | {self.class_sizes[name]} | {shown} | {_cell(taken)} |")
        lines.append(f"| **class mean** | {self.total} | {self.class_mean:.4f} | |")
        for k, value in self.top.items():
            lines.append(f"| **{'accuracy' if k == 1 else f'top-{k}'}** | {self.total} | {value:.4f} | |")
        low, high = self.interval
        lines.append("")
        lines.append(f"95 % interval of the accuracy {low:.4f} to {high:.4f} (Wilson). n_failed {self.n_failed}.")
        lines += [f"Failed: {', '.join(self.failures)}."] if self.failures else []
        return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


@dataclass(frozen=True, kw_only=True)
class ClassEvaluator(Evaluator):
    """Class scores (B, K) of `predict` against batch["label"]; top: the k of the accuracies beside the first.

    A k that is not below the number of classes is always right, and an error.
    """

    batch_size: int = 256
    top: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(k < 2 for k in self.top):
            raise ValueError(f"top must be numbers of at least 2, got {self.top}")

    @property
    def names(self) -> Sequence[str]:
        return ["classes"]

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> ClassScores:
        """Each line of `out`: id, label, predicted class, rank of the label, score of the prediction."""
        names: dict[int, str] = {}
        rows: list[dict[str, Any]] = []
        classes = None
        for batch in batches:
            with torch.no_grad():
                scores = predict(batch)
            labels = batch["label"]
            if scores.ndim != 2 or len(scores) != len(labels) or classes not in (None, scores.shape[1]):
                raise ValueError(
                    f"predict must give scores ({len(labels)}, {classes or 'K'}), got {tuple(scores.shape)}"
                )
            classes = scores.shape[1]
            names |= dict(zip(labels.tolist(), batch.get("category", [])))
            rows += _rows(batch["id"], scores.detach().cpu(), labels.cpu())
        if classes is None:
            raise ValueError("there is nothing to evaluate: no batch was given")
        if max(self.top, default=0) >= classes:
            raise ValueError(f"top must be below the {classes} classes, got {self.top}")
        twice = len(rows) - len({row["id"] for row in rows})
        if twice:
            raise ValueError(f"{twice} items come twice: every id must be scored once")
        header = {"evaluation": name, "classes": classes, "seed": seed, "about": dict(about)}
        with atomic_write(out) as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in [header, *rows]).encode())
        known = [names.get(label, str(label)) for label in range(classes)]
        if len(set(known)) < classes:  # two classes of one name, or a name that is another's number
            known = [f"{label} {known[label]}" for label in range(classes)]
        return summarize_classes(rows, known, top=self.top, seed=seed, about=about)


def _rows(ids: Sequence[str], scores: Tensor, labels: Tensor) -> Iterable[dict[str, Any]]:
    finite = torch.isfinite(scores).all(1)
    ranks = rank_of_label(torch.where(finite[:, None], scores, 0.0), labels)
    best, predicted = scores.max(1)
    for index, item in enumerate(ids):
        row = {"id": item, "label": int(labels[index])}
        if bool(finite[index]):
            row |= {"predicted": int(predicted[index]), "rank": int(ranks[index]), "score": float(best[index])}
        else:
            row |= {"predicted": None, "rank": None, "score": None}
        yield row


def summarize_classes(
    rows: Sequence[Mapping[str, Any]], classes: Sequence[str], *, top: Sequence[int] = (), seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> ClassScores:  # fmt: skip
    """Averages of rows that `ClassEvaluator` wrote, whatever their order."""
    if not rows:
        raise ValueError("there is nothing to evaluate: no item was given")
    good = [row for row in rows if row["predicted"] is not None]
    matrix = confusion_matrix(
        torch.tensor([row["predicted"] for row in good], dtype=torch.int64),
        torch.tensor([row["label"] for row in good], dtype=torch.int64),
        len(classes),
    )
    sizes = torch.bincount(torch.tensor([row["label"] for row in rows]), minlength=len(classes)).tolist()
    right = {k: sum(row["rank"] < k for row in good) for k in (1, *sorted(top))}
    hits = matrix.diagonal().tolist()
    return ClassScores(
        classes=list(classes),
        total=len(rows),
        n_failed=len(rows) - len(good),
        top={k: count / len(rows) for k, count in right.items()},
        interval=wilson(right[1], len(rows)),
        per_class={name: hits[i] / sizes[i] if sizes[i] else None for i, name in enumerate(classes)},
        class_sizes=dict(zip(classes, sizes)),
        confusion=matrix.tolist(),
        failures=[row["id"] for row in rows if row["predicted"] is None],
        seed=seed,
        about=dict(about or {}),
    )
