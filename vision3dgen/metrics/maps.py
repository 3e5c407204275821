"""The evaluation of predicted pictures (depth, normals): item by item, resumable, with nothing dropped in silence."""

import json
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict
from vision3dgen.metrics.prediction import Prediction, predict_batch

Row = dict[str, Any]
Values = dict[str, float | None]


class Unscorable(ValueError):
    """Why one prediction, or one truth, cannot be scored."""


class Measured(NamedTuple):
    metrics: dict[str, float]
    replaced: int  # valid pixels whose prediction had to be replaced before it could be compared


@dataclass(frozen=True, kw_only=True)
class MapEvaluator(Evaluator):
    """Predicted pictures against those of the batch, over the pixels that have a truth.

    A prediction that is missing, of another size, or not finite at a valid pixel fails; an item without a valid pixel
    has nothing to be scored against. Both are in n_failed and listed with their reason. A failed prediction scores 0 in
    every share that is better when larger, so that failing never pays, and is in no other mean.
    """

    target: ClassVar[str]  # key of the batch and of `Prediction.maps`
    shares: ClassVar[tuple[str, ...]]

    @abstractmethod
    def describe(self, name: str) -> dict[str, Any]:
        """Everything that moves the numbers under this name, as JSON types, with a name and a citation."""

    @abstractmethod
    def valid(self, name: str, target: Tensor) -> Bool[Tensor, "H W"]:
        """Which pixels of a true picture (C, H, W) count; `Unscorable` for a picture that does not fit."""

    @abstractmethod
    def measure(self, name: str, maps: Mapping[str, Tensor], target: Tensor, valid: Bool[Tensor, "H W"]) -> Measured:
        """The numbers of one item, whose predicted picture has the truth's size and is finite where it counts."""

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> "MapScores":
        """Scores of `predict(batch)`, a list of `Prediction`; items scored before are not scored again.

        A batch needs id and the target's key; category, if it is there, groups the means. Raises ValueError for what is
        wrong with all items alike: missing keys, an id seen twice, another header in `out`.
        """
        header = json.loads(json.dumps({"protocol": self.describe(name), "seed": seed, "about": dict(about)}))
        done = _resume(out, header)
        rows: list[Row] = []
        seen: set[str] = set()
        with open(out, "a", encoding="utf-8") as file:
            for batch in batches:
                missing = sorted({"id", self.target} - set(batch))
                if missing:
                    raise ValueError(f"evaluation needs the batch keys {missing}; the batch has {sorted(batch)}")
                twice = [item for item in batch["id"] if item in seen] + _repeated(batch["id"])
                if twice:
                    raise ValueError(f"item {twice[0]!r} comes twice: every id must be scored once")
                seen |= set(batch["id"])
                rows += [done[item] for item in batch["id"] if item in done]
                if all(item in done for item in batch["id"]):
                    continue
                predictions = predict_batch(predict, batch, len(batch["id"]))
                for index, item in enumerate(batch["id"]):
                    if item in done:
                        continue
                    row = {"id": item, "category": batch["category"][index] if "category" in batch else ""}
                    row |= self._row(name, predictions[index], batch[self.target][index])
                    rows.append(row)
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
        return summarize_maps(header, rows, shares=self.shares)

    def _row(self, name: str, prediction: Prediction, target: Tensor) -> Row:
        row: Row = {"status": "failed", "fault": "truth", "reason": "", "pixels": 0, "replaced": 0, "metrics": {}}
        try:
            valid = self.valid(name, target)
            row["pixels"] = int(valid.sum())
            if not row["pixels"]:
                raise Unscorable(f"no pixel of the true {self.target} counts")
            row["fault"] = "prediction"
            if prediction.failure is not None:
                raise Unscorable(prediction.failure)
            self._check(prediction.maps, target, valid)
            measured = self.measure(name, prediction.maps, target, valid)
        except Unscorable as error:
            return row | {"reason": str(error)}
        return row | {"status": "ok", "fault": "", "metrics": measured.metrics, "replaced": measured.replaced}

    def _check(self, maps: Mapping[str, Tensor], target: Tensor, valid: Bool[Tensor, "H W"]) -> None:
        if self.target not in maps:
            raise Unscorable(f"the model predicts no {self.target!r}, only {sorted(maps)}")
        found = maps[self.target]
        if found.shape != target.shape:
            raise Unscorable(f"{self.target} must be {tuple(target.shape)} like the truth, got {tuple(found.shape)}")
        bad = int((~found.isfinite().all(0) & valid).sum())
        if bad:
            raise Unscorable(f"{self.target} is not finite at {bad} of {int(valid.sum())} valid pixels")


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for index, name in enumerate(names) if name in names[:index]]


def _resume(path: Path, header: Row) -> dict[str, Row]:
    """Rows that the file has already, cut to whole lines; a file that is new is started with the header."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    try:
        found, *rows = (json.loads(line) for line in content[:whole].splitlines())
    except ValueError as error:
        raise ValueError(f"{path}: not a results file ({error}); choose another file") from error
    different = [key for key in header if not isinstance(found, dict) or found.get(key) != header[key]]
    if different:
        raise ValueError(f"{path} holds results of another run: {different} differ; choose another file")
    os.truncate(path, whole)
    return {row["id"]: row for row in rows}


# ------------------------------------------------------------------------------------------------------ summary


@dataclass(frozen=True)
class MapScores:
    """Means of a set of pictures. Values are None where no item defines them."""

    protocol: dict[str, Any]
    seed: int
    about: dict[str, Any]
    n_ok: int
    n_failed: int  # items that could not be scored, for want of a prediction or of a truth
    n_without_truth: int  # of these
    pixels: int  # valid ones of the items scored
    replaced: int  # of these
    mean: Values  # over items
    class_mean: Values  # over the means of the categories
    classes: dict[str, Values]
    class_sizes: dict[str, int]
    failures: dict[str, str]  # id -> reason

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A line per category, the averages, and what they rest on."""
        columns = list(self.mean)
        lines = [f"| class | n | {' | '.join(columns)} |", "| --- | ---: |" + " ---: |" * len(columns)]
        scored = self.n_ok + self.n_failed - self.n_without_truth
        table = [(name, self.class_sizes[name], self.classes[name]) for name in self.classes if len(self.classes) > 1]
        for name, size, values in [*table, ("class mean", scored, self.class_mean), ("**mean**", scored, self.mean)]:
            cells = ["-" if (v := values[column]) is None else f"{v:.4f}" for column in columns]
            lines.append(f"| {(name or '-').replace('|', '/')} | {size} | {' | '.join(cells)} |")
        lines += [
            "",
            f"Protocol {self.protocol['name']} ({self.protocol['citation']}): per-picture numbers, averaged. "
            f"n_ok {self.n_ok}, n_failed {self.n_failed} (of which {self.n_without_truth} have no truth). "
            f"{self.replaced} of {self.pixels} pixels were outside what can be compared and were replaced.",
        ]
        if "split" in self.about:
            lines.append(f"Split {self.about['split']['name']}, sha256 {self.about['split']['sha256']}.")
        lines += [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines) + "\n"


def summarize_maps(header: Mapping[str, Any], rows: Iterable[Row], *, shares: Sequence[str]) -> MapScores:
    """Averages of rows written under one header, whatever their order; `shares` are 0 for a failed prediction."""
    rows = sorted(rows, key=lambda row: row["id"])
    if not rows:
        raise ValueError("there is nothing to evaluate: no item was given")
    good = [row for row in rows if row["status"] == "ok"]
    columns = list(dict.fromkeys(name for row in good for name in row["metrics"]))
    counted: list[tuple[str, Values]] = []
    for row in rows:
        if row["fault"] == "prediction":
            counted.append((row["category"], {name: 0.0 for name in columns if name in shares}))
        elif row["status"] == "ok":
            counted.append((row["category"], row["metrics"]))
    names = sorted({category for category, _ in counted})
    classes = {name: _means([v for owner, v in counted if owner == name], columns) for name in names}
    return MapScores(
        protocol=dict(header["protocol"]),
        seed=header["seed"],
        about=dict(header["about"]),
        n_ok=len(good),
        n_failed=len(rows) - len(good),
        n_without_truth=sum(row["fault"] == "truth" for row in rows),
        pixels=sum(row["pixels"] for row in good),
        replaced=sum(row["replaced"] for row in good),
        mean=_means([values for _, values in counted], columns),
        class_mean=_means(list(classes.values()), columns),
        classes=classes,
        class_sizes={name: sum(owner == name for owner, _ in counted) for name in names},
        failures={row["id"]: row["reason"] for row in rows if row["status"] != "ok"},
    )


def _means(values: Sequence[Values], columns: Sequence[str]) -> Values:
    """Mean of each column over those that define it."""
    found: Values = {}
    for name in columns:
        known = [value for v in values if (value := v.get(name)) is not None]
        found[name] = math.fsum(known) / len(known) if known else None
    return found
