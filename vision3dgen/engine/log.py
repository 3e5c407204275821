"""What a run tells while it trains: metrics.jsonl, TensorBoard if asked, and a progress bar or plain lines."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vision3dgen.files import read_jsonl


class Mean:
    """Running means of named scalars that stay on their device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])


class Log:
    """The log of one run from `step` on; entries of later steps, left by a run that was killed, are removed.

    Processes other than the first pass `active=False` and write nothing.
    """

    def __init__(self, run_dir: Path, step: int, steps: int, *, tensorboard: bool = False, active: bool = True):
        self.active, self.steps = active, steps
        self.path = run_dir / "metrics.jsonl"
        self.writer: Any = None
        self.progress: Progress | None = None
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        _cut(self.path, step)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError('tensorboard: true needs TensorBoard: pip install "vision3dgen[viz]"') from error
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        console = Console()
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "ETA", TimeRemainingColumn())
            self.progress = Progress(TextColumn("{task.description}"), *columns, console=console)
            self.task = self.progress.add_task("training", total=steps, completed=step)
        self.first, self.started = step, time.monotonic()

    def __enter__(self) -> "Log":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        if self.writer:
            self.writer.close()

    def advance(self, step: int) -> None:
        if self.progress:
            self.progress.update(self.task, completed=step)

    def write(self, record: dict[str, float]) -> None:
        """One line of metrics.jsonl; `record` has a "step". A value that is not finite is written as null."""
        if not self.active:
            return
        line = json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(error.errno, f"could not append to {self.path}: {error}") from error
        step = int(record["step"])
        if self.writer:
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(name, value, step)
        self._show(step, record)

    def _show(self, step: int, record: dict[str, float]) -> None:
        shown = [f"{name} {value:.4g}" for name, value in record.items() if name.endswith("loss") or "val/" in name]
        if self.progress:
            self.progress.update(self.task, description="  ".join(shown))
            return
        rate = (time.monotonic() - self.started) / max(step - self.first, 1)
        minutes, seconds = divmod(round(rate * (self.steps - step)), 60)
        print(f"step {step}/{self.steps}  {'  '.join(shown)}  ETA {minutes}:{seconds:02d}", flush=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl, in order of step."""
    return read_jsonl(run_dir / "metrics.jsonl")


def _cut(path: Path, step: int) -> None:
    """Drop the entries after `step`, and a last line that a killed run did not finish."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    beside = path.with_name(f".{path.name}")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
