"""Evaluations that add up over items: each item becomes a row, and the rows of all of them become scores."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import torch

from vision3dgen.engine.processes import processes
from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict, Scores
from vision3dgen.metrics.results import Batch, Row, score_by_all, score_by_one


class Failure(NamedTuple):
    """Instead of a prediction: why there is none."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ItemEvaluator(Evaluator):
    """Rows of items, by all the processes there are, and scores that are computed from rows alone.

    Rows are written as they are made, and items that have one are not predicted again. What failed has the entry
    "failure"; it is counted, listed, and scored as if nothing had been predicted.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # keys of the batch beside id

    @abstractmethod
    def describe(self, name: str) -> dict[str, Any]:
        """Everything that moves the numbers under this name, as JSON types."""

    @abstractmethod
    def row(self, name: str, prediction: Any, batch: Batch, index: int, *, seed: int) -> Row:
        """What one item adds; `prediction` may be a `Failure`. The entry "id" is added."""

    @abstractmethod
    def scores(self, name: str, rows: Sequence[Row], *, seed: int, about: Mapping[str, Any]) -> Scores:
        """The scores of rows, whatever their order."""

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> Scores:
        """Scores of `predict(batch)`, which gives one prediction per item.

        Raises ValueError for what is wrong with all items alike: missing keys, an id seen twice, another header in
        `out`, and for no items at all.
        """
        header = json.loads(json.dumps({"protocol": self.describe(name), "seed": seed, "about": dict(about)}))

        def score(mine: Iterable[Batch], done: Mapping[str, Row], file: IO[str]) -> list[list[str]]:
            return self._write_rows(name, mine, predict, done, file, seed)

        if processes().num_processes == 1:
            rows = score_by_one(batches, out, header, score)
        elif isinstance(batches, Sequence):
            rows = score_by_all(batches, out, header, score)
        else:
            raise ValueError("several processes divide a Sequence of batches, such as `Experiment.batches` gives")
        if not rows:
            raise ValueError("there is nothing to evaluate: no item was given")
        return self.scores(name, rows, seed=seed, about=about)

    def _write_rows(
        self, name: str, batches: Iterable[Batch], predict: Predict, done: Mapping[str, Row], file: IO[str], seed: int
    ) -> list[list[str]]:
        order: list[list[str]] = []
        seen: set[str] = set()
        for batch in batches:
            missing = sorted({"id", *self.needs} - set(batch))
            if missing:
                raise ValueError(f"evaluation needs the batch keys {missing}; the batch has {sorted(batch)}")
            ids = list(batch["id"])
            twice = [item for index, item in enumerate(ids) if item in seen or item in ids[:index]]
            if twice:
                raise ValueError(f"item {twice[0]!r} comes twice: every id must be scored once")
            seen |= set(ids)
            order.append(ids)
            if all(item in done for item in ids):
                continue
            predictions = _predicted(predict, batch, len(ids))
            for index, item in enumerate(ids):
                if item not in done:
                    row = {"id": item, **self.row(name, predictions[index], batch, index, seed=seed)}
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
        return order


def _predicted(predict: Predict, batch: Batch, size: int) -> list[Any]:
    """One prediction per item, without gradients; an exception becomes the failure of each of them."""
    try:
        with torch.no_grad():
            predictions = list(predict(batch))
    except Exception as error:  # the reason is written to every row of the batch and counted
        return [Failure(f"predict: {type(error).__name__}: {error}")] * size
    if len(predictions) != size:
        raise ValueError(f"predict must give one prediction per item, got {len(predictions)} for {size}")
    return predictions


def failures_of(rows: Sequence[Row]) -> dict[str, str]:
    """The reasons of those that failed, by id."""
    return {row["id"]: row["failure"] for row in sorted(rows, key=lambda row: row["id"]) if row["failure"]}


def class_name(label: int, classes: Sequence[str], *, first: int) -> str:
    """What a class is called whose number `first` is classes[0]; its number where it has no name."""
    return classes[label - first] if 0 <= label - first < len(classes) else str(label)


def cell(value: float | None) -> str:
    """A number in a table."""
    return "-" if value is None else f"{value:.4f}"
