"""Training throughput of the library's trainer against a plain PyTorch loop: the same model, data and updates.

    python benchmarks/training.py --configs configs/single_view_voxels.yaml --out runs/training

For each configuration the two loops, a process each, take turns step by step, so that a busy machine is busy for both;
they start from the same weights and use the configuration's optimizer, batch size and gradient clipping. Neither keeps
an average of the weights, validates or saves. The plain loop is what one writes by hand: a shuffling DataLoader,
forward, backward, clip, step. Leaves table.md and table.jsonl.
"""

import argparse
import dataclasses
import json
import multiprocessing
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn
from torch.utils.data import DataLoader

from vision3dgen.config import construct, load
from vision3dgen.datasets import collate
from vision3dgen.engine import Data, Optimizer, Record, Trainer, Update, to_device
from vision3dgen.engine.optim import build_optimizer
from vision3dgen.experiment import Experiment, environment
from vision3dgen.files import atomic_write

console = Console(width=None if sys.stdout.isatty() else 120)


class Turn:
    """One of two processes that take turns: a step lasts from one batch being put together to the next."""

    def __init__(self, mine: Semaphore, yours: Semaphore, alone: Event):
        self.mine, self.yours, self.alone = mine, yours, alone
        self.seconds: list[float] = []
        self._began: float | None = None

    def collate(self, items: list[Any]) -> Any:
        if self._began is not None:
            self.seconds.append(clock() - self._began)
            self.yours.release()
        if not self.alone.is_set():
            self.mine.acquire()
        self._began = clock()
        return collate(items)

    def leave(self) -> None:
        """The other one need not wait any more."""
        self.alone.set()
        self.yours.release()


class Steps(NamedTuple):
    """Seconds of each step that counts, of the trainer and of the plain loop."""

    trainer: list[float]
    plain: list[float]

    @property
    def ratio(self) -> float:
        """The trainer's throughput in units of the plain loop's."""
        return sum(self.plain) / sum(self.trainer)

    def interval(self) -> tuple[float, float]:
        """95 % of the ratio, from 1000 resamplings of pairs of steps."""
        ours, theirs = np.array(self.trainer), np.array(self.plain)
        drawn = np.random.default_rng(0).integers(len(ours), size=(1000, len(ours)))
        low, high = np.quantile(theirs[drawn].sum(1) / ours[drawn].sum(1), (0.025, 0.975))
        return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny")
    parser.add_argument("--steps", type=int, default=200, help="steps of each loop that count (default: 200)")
    parser.add_argument("--warmup", type=int, default=20, help="steps before (default: 20)")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides of every configuration")
    options = parser.parse_args()
    measured = {}
    for path in options.configs:
        console.rule(path.stem)
        experiment = construct(Experiment, load(path, options.set, preset=options.preset))
        experiment.prepare_data()
        measured[path.stem] = compare(experiment, options.steps, options.warmup)
    write_tables(options.out, measured)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def compare(experiment: Experiment, steps: int, warmup: int) -> Steps:
    context = multiprocessing.get_context("spawn")
    first, second, alone, results = context.Semaphore(1), context.Semaphore(0), context.Event(), context.Queue()
    total = warmup + steps + 1  # the last batch only ends the step before it
    loops = (trainer_loop, first, second), (plain_loop, second, first)
    started = [
        context.Process(target=run, args=(number, loop, experiment, Turn(mine, yours, alone), total, results))
        for number, (loop, mine, yours) in enumerate(loops)
    ]
    for process in started:
        process.start()
    found: dict[int, list[float]] = {}
    while len(found) < len(started):
        try:
            number, seconds = results.get(timeout=1)
            found[number] = seconds[warmup : warmup + steps]
        except queue.Empty:
            if any(process.exitcode for process in started):
                for process in started:
                    process.terminate()
                raise RuntimeError("a loop failed, see above") from None
    for process in started:
        process.join()
    return Steps(found[0], found[1])


Loop = Callable[[Experiment, Any, Callable[[list[Any]], Any], int], None]


def run(number: int, loop: Loop, experiment: Experiment, turn: Turn, steps: int, results: Any) -> None:
    """The life of a process: both read all data first, so that neither pays for a cold disk."""
    dataset = experiment.dataset("train")
    for index in range(len(dataset)):
        dataset[index]
    loop(experiment, dataset, turn.collate, steps)
    turn.leave()
    results.put((number, turn.seconds))


def update_of(experiment: Experiment) -> Update:
    """The configuration's update without averages, penalties and compilation, which a plain loop does not have."""
    node = experiment.trainer.get("update")
    update = Update() if node is None else construct(Update, node, where="trainer.update")
    return dataclasses.replace(update, ema=None, swa=None, penalty=None, compile=False)


def optimizer_of(experiment: Experiment) -> Optimizer:
    return construct(Optimizer, experiment.trainer["optimizer"], where="trainer.optimizer")


def trainer_loop(experiment: Experiment, dataset: Any, collate: Callable[[list[Any]], Any], steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            experiment.build_model(),
            Data(dataset, experiment.loader.batch_size, collate),
            folder,
            steps=steps,
            optimizer=optimizer_of(experiment),
            update=update_of(experiment),
            record=Record(checkpoint_every=steps + 1),
            seed=experiment.seed,
        )
        trainer.fit()


def plain_loop(experiment: Experiment, dataset: Any, collate: Callable[[list[Any]], Any], steps: int) -> None:
    """The loop one writes by hand."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = experiment.build_model().to(device).train()
    update = update_of(experiment)
    optimizer = build_optimizer(optimizer_of(experiment), dict(model.named_parameters()))
    size = experiment.loader.batch_size
    loader = DataLoader(
        dataset, size, shuffle=True, drop_last=True, collate_fn=collate, pin_memory=device.type == "cuda"
    )
    step = 0
    while True:
        for batch in loader:
            optimizer.zero_grad()
            loss = model.loss(to_device(batch, device))["loss"]
            loss.backward()
            if update.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), update.clip)
            optimizer.step()
            step += 1
            if step == steps:
                return


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def write_tables(out: Path, measured: Mapping[str, Steps]) -> None:
    """table.md for people and table.jsonl, a line per configuration, for programs."""
    known, today = environment(), date.today().isoformat()
    machine = f"{known['device']}, {known['threads']} thread(s), torch {known['torch']}"
    text = [
        f"Measured on {machine}, {today}; a step each in turn.",
        "",
        "| configuration | steps | trainer, ms a step | plain loop, ms a step | throughput, ratio | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    records = []
    for name, steps in measured.items():
        ours, theirs = (1000 * sum(seconds) / len(seconds) for seconds in steps)
        low, high = steps.interval()
        numbers = f"{len(steps.trainer)} | {ours:.2f} | {theirs:.2f} | {steps.ratio:.3f} | {low:.3f} to {high:.3f}"
        text.append(f"| {name} | {numbers} |")
        records.append(
            {"date": today, "config": name, "steps": len(steps.trainer), "trainer_ms": ours, "plain_ms": theirs}
            | {"ratio": steps.ratio, "interval": [low, high], "environment": known}
        )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
