"""How a run is scored, whatever its task: the `evaluation` section of a configuration becomes one of these objects."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vision3dgen.checks import check_choice
from vision3dgen.engine.processes import processes
from vision3dgen.files import atomic_write
from vision3dgen.metrics.evaluation import evaluate, evaluate_distributed
from vision3dgen.metrics.protocols import PROTOCOLS
from vision3dgen.metrics.summary import Summary

Batches = Iterable[Mapping[str, Any]]
Predict = Callable[[Mapping[str, Any]], Any]  # what `model.predict` gives for a batch, on the CPU


@runtime_checkable
class Scores(Protocol):
    """The result of an evaluation; an entry "n_failed" of `to_dict()` counts the items that could not be scored."""

    def to_dict(self) -> dict[str, Any]: ...
    def to_markdown(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Evaluator(ABC):
    """Scores predictions on a split under one or several names; `split` and `batch_size` are what a run uses."""

    split: str = "test"
    batch_size: int = 8

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """What a run is scored under when nothing is asked for."""

    @property
    def choices(self) -> Sequence[str]:
        """Every name that may be asked for."""
        return self.names

    @abstractmethod
    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> Scores:
        """Scores of `predict(batch)` over `batches` under `name`; one JSON line per item goes to `out`."""

    def evaluate(
        self,
        name: str,
        batches: Batches,
        predict: Predict,
        folder: Path,
        *,
        split: str,
        seed: int,
        about: Mapping[str, Any] | None = None,
    ) -> Scores:
        """`score`, leaving NAME_SPLIT.jsonl (a line per item) and NAME_SPLIT.json (the summary) in `folder`.

        `about` is what the scores depend on beside seed and data, such as the hash of the weights.
        """
        check_choice("protocol", name, self.choices)
        folder.mkdir(parents=True, exist_ok=True)
        scores = self.score(name, batches, predict, folder / f"{name}_{split}.jsonl", seed=seed, about=about or {})
        if processes().is_main_process:
            with atomic_write(folder / f"{name}_{split}.json") as file:
                file.write(json.dumps(scores.to_dict(), indent=2).encode() + b"\n")
        return scores


@dataclass(frozen=True, kw_only=True)
class ShapeEvaluator(Evaluator):
    """Shapes under the protocols named; more `repeats` of the sampling give the spread.

    ceiling: whether truths are scored against themselves too. workers: processes that score while the model predicts.
    timeout: seconds after which the scoring of an item is given up; it takes a worker to end.
    """

    protocols: list[str] = field(default_factory=lambda: ["default"])
    repeats: int = 2
    ceiling: bool = True
    workers: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name in self.protocols:
            check_choice("protocol", name, PROTOCOLS)
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.timeout is not None and not (self.timeout > 0 and self.workers):
            raise ValueError(
                f"timeout must be above 0 and needs workers, got {self.timeout} and workers={self.workers}"
            )

    @property
    def names(self) -> Sequence[str]:
        return self.protocols

    @property
    def choices(self) -> Sequence[str]:
        return sorted(PROTOCOLS)

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> Summary:
        """As `evaluate` of metrics, by all processes there are; items scored before are not scored again."""
        settings: dict[str, Any] = {"seed": seed, "repeats": self.repeats, "about": about, "ceiling": self.ceiling}
        settings |= {"workers": self.workers, "timeout": self.timeout}
        if processes().num_processes == 1:
            return evaluate(batches, predict, PROTOCOLS[name], out=out, **settings)
        if not isinstance(batches, Sequence):
            raise ValueError("several processes divide a Sequence of batches, such as `Experiment.batches` gives")
        return evaluate_distributed(batches, predict, PROTOCOLS[name], out=out, **settings)
