"""Training throughput of the library's trainer against a plain PyTorch loop: the same model, data and updates.

    python benchmarks/training.py --configs configs/single_view_voxels.yaml --out runs/training

For each configuration both loops train in turns, from the same initial weights, with the configuration's optimizer,
batch size, gradient clipping and number of workers. Neither keeps an average of the weights, validates or, but for the
trainer's checkpoint after its last step, saves; what that checkpoint costs is not counted. The plain loop is what one
writes by hand: a shuffling DataLoader, forward, backward, clip, step. Leaves table.md and table.jsonl.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn
from torch.utils.data import DataLoader

from vision3dgen.config import construct, load
from vision3dgen.datasets import collate
from vision3dgen.engine import Data, Optimizer, Trainer, Update, build_optimizer, read_metrics, seed_all, to_device
from vision3dgen.experiment import Experiment, environment
from vision3dgen.files import atomic_write

console = Console(width=None if sys.stdout.isatty() else 120)


class Rates(NamedTuple):
    """Samples per second of each round."""

    trainer: list[float]
    plain: list[float]

    @property
    def ratio(self) -> float:
        """The trainer's rate in units of the plain loop's: the median over rounds, in each of which both ran."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.trainer, self.plain))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each loop and round (default: 60)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop (default: 5)")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides of every configuration")
    options = parser.parse_args()
    rates = {}
    for path in options.configs:
        console.rule(path.stem)
        experiment = construct(Experiment, load(path, options.set, preset=options.preset))
        experiment.prepare_data()
        rates[path.stem] = compare(experiment, options.steps, options.warmup, options.rounds)
    write_tables(options.out, rates, options)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def compare(experiment: Experiment, steps: int, warmup: int, rounds: int) -> Rates:
    """Both loops in turns, on one dataset, so that what it keeps in memory serves both."""
    data = Data(experiment.dataset("train"), experiment.loader.batch_size, collate, experiment.loader.num_workers)
    for index in range(len(data.dataset)):
        data.dataset[index]  # read once: neither loop pays for a cold disk
    found = Rates([], [])
    for number in range(rounds):
        found.trainer.append(trainer_rate(experiment, data, steps, warmup))
        found.plain.append(plain_rate(experiment, data, steps, warmup))
        console.print(
            f"round {number + 1}: trainer {found.trainer[-1]:.1f}, plain loop {found.plain[-1]:.1f} samples/s"
        )
    return found


def update_of(experiment: Experiment) -> Update:
    """The configuration's update without averages, penalties and compilation, which a plain loop does not have."""
    node = experiment.trainer.get("update")
    update = Update() if node is None else construct(Update, node, where="trainer.update")
    return dataclasses.replace(update, ema=None, swa=None, penalty=None, compile=False)


def optimizer_of(experiment: Experiment) -> Optimizer:
    return construct(Optimizer, experiment.trainer["optimizer"], where="trainer.optimizer")


def trainer_rate(experiment: Experiment, data: Data, steps: int, warmup: int) -> float:
    """Samples per second of `engine.Trainer`, from the seconds of its own log."""
    with tempfile.TemporaryDirectory() as folder:
        node: dict[str, Any] = {"log_every": warmup, "checkpoint_every": 10**9}
        trainer = construct(
            Trainer,
            {"record": node, "steps": warmup + steps},
            model=experiment.build_model(),
            data=data,
            run_dir=folder,
            optimizer=optimizer_of(experiment),
            update=update_of(experiment),
            seed=experiment.seed,
        )
        trainer.fit()
        log = {entry["step"]: entry["seconds"] for entry in read_metrics(Path(folder))}
    return steps * data.batch_size / (log[warmup + steps] - log[warmup])


def plain_rate(experiment: Experiment, data: Data, steps: int, warmup: int) -> float:
    """Samples per second of the loop one writes by hand."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = experiment.build_model().to(device).train()
    seed_all(experiment.seed)
    update = update_of(experiment)
    optimizer = build_optimizer(optimizer_of(experiment), dict(model.named_parameters()))
    loader = DataLoader(
        data.dataset,  # type: ignore[arg-type]
        data.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=data.collate,
        num_workers=data.num_workers,
        pin_memory=device.type == "cuda",
    )
    step, start = 0, 0.0
    while True:
        for batch in loader:
            if step == warmup:
                start = clock(device)
            optimizer.zero_grad()
            loss = model.loss(to_device(batch, device))["loss"]  # type: ignore[operator]
            loss.backward()
            if update.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), update.clip)
            optimizer.step()
            step += 1
            if step == warmup + steps:
                return steps * data.batch_size / (clock(device) - start)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def write_tables(out: Path, rates: Mapping[str, Rates], options: argparse.Namespace) -> None:
    """table.md for people and table.jsonl, a line per configuration, for programs."""
    known, today = environment(), date.today().isoformat()
    machine = f"{known['device']}, {known['threads']} thread(s), torch {known['torch']}"
    text = [
        f"{options.rounds} rounds of {options.steps} steps each on {machine}, {today}.",
        "",
        "| configuration | trainer, samples/s | plain loop, samples/s | ratio | ratio of each round |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    records = []
    for name, found in rates.items():
        each = [ours / theirs for ours, theirs in zip(*found)]
        ours, theirs = (statistics.median(values) for values in found)
        shown = ", ".join(f"{value:.3f}" for value in each)
        text.append(f"| {name} | {ours:.1f} | {theirs:.1f} | {found.ratio:.3f} | {shown} |")
        records.append(
            {"date": today, "config": name, "steps": options.steps, "trainer": found.trainer, "plain": found.plain}
            | {"ratio": found.ratio, "environment": known}
        )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
