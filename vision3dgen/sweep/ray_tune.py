"""The trials of a sweep as Ray Tune runs them: it places them and, in a halving search, stops the worst.

A trial reports each validation; what has ended is written down by the process that started the sweep.
"""

import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from vision3dgen.config import Config
from vision3dgen.engine import read_metrics
from vision3dgen.experiment import Run
from vision3dgen.sweep.trials import Sweep, Trial, as_overrides

DIED = "its process died: out of memory, or killed"
REDUCTION = 3  # a rung of a halving search keeps the best third; rungs are that many times apart


def run(sweep: Sweep, *, address: str | None, cpus: float, gpus: float, say: Callable[[str], None]) -> None:
    """Run the trials of a sweep that have not ended; see `Sweep.run`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to be counted
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose verbose=0 is not silent
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    done = {t.number for t in sweep.trials() if t.status in ("finished", "stopped")}
    # A halving search judges against those that have ended: they are heard again first, and not trained.
    heard = sorted(done) if sweep.search == "halving" else []
    numbers = heard + [number for number in range(len(sweep.plan)) if number not in done]
    if len(done) == len(sweep.plan):
        say(f"all {len(done)} trials have ended already")
        return
    scheduler = FIFOScheduler()
    if sweep.search == "halving":
        scheduler = ASHAScheduler(  # ends by the trial itself, so no rung is the last
            time_attr="step", metric=sweep.metric, mode=sweep.mode, grace_period=sweep.every or 1, max_t=2**40,
            reduction_factor=REDUCTION,
        )  # fmt: skip
    ours = not ray.is_initialized()
    if ours:
        where: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **where)
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)  # errors are in error.txt
    shutil.rmtree(sweep.folder / "ray", ignore_errors=True)  # of an earlier start; all that counts is in trials/
    job = tune.with_parameters(
        _train,
        jobs={number: sweep.source.config(sweep.plan[number]) for number in numbers},
        places={number: sweep.place(number).absolute() for number in numbers},
        metric=sweep.metric,
        done=done,
        threads=max(int(cpus), 1),
        directory=os.getcwd(),
    )
    try:
        tune.Tuner(
            tune.with_resources(job, {"cpu": cpus, "gpu": gpus}),
            param_space={"trial": tune.grid_search(numbers)},
            tune_config=tune.TuneConfig(scheduler=scheduler),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str((sweep.folder / "ray").absolute()),
                callbacks=[Listener(sweep, done, say)],
                verbose=0,
            ),
        ).fit()
    finally:
        if ours:
            ray.shutdown()


def _train(
    config: Mapping[str, Any],
    *,
    jobs: Mapping[int, Config],
    places: Mapping[int, Path],
    metric: str,
    done: Iterable[int],
    threads: int,
    directory: str,
) -> None:
    """One trial, in a process of Ray's; its error, if any, is left in error.txt of the run folder."""
    number = config["trial"]
    place = places[number]
    os.chdir(directory)  # relative paths of the configuration mean what they mean to the command
    torch.set_num_threads(threads)  # rounding depends on their number
    (place / "error.txt").unlink(missing_ok=True)

    def report(record: Mapping[str, Any]) -> None:
        value = record.get(metric)
        if value is not None and math.isfinite(value):
            tune.report({metric: value, "step": int(record["step"]), "ended": False})

    try:
        if (place / "metrics.jsonl").exists():
            for record in read_metrics(place):
                report(record)
        if number not in done:
            run = Run.create(place, jobs[number])
            run.experiment.prepare_data()
            run.train(resume=True, report=report)
        log = read_metrics(place)
        measured = [entry for entry in log if entry.get(metric) is not None]
        if not measured:
            raise ValueError(f"the log has no {metric!r}; it has {sorted({key for entry in log for key in entry})}")
    except Exception as error:
        place.mkdir(parents=True, exist_ok=True)
        lines = [f"{type(error).__name__}: {error}\n", "\n", *traceback.format_exception(error)]
        (place / "error.txt").write_text("".join(lines), encoding="utf-8")
        raise
    tune.report({metric: measured[-1][metric], "step": int(log[-1]["step"]), "ended": True})


class Listener(tune.Callback):
    """Writes trial.json, and tells, as trials end."""

    def __init__(self, sweep: Sweep, done: Iterable[int], say: Callable[[str], None]):
        self.sweep, self.done, self.say = sweep, set(done), say
        self.ended, self.started = len(self.done), time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trial, "finished" if trial.last_result.get("ended") else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        told = self.sweep.place(trial.config["trial"]) / "error.txt"
        self._record(trial, "failed", told.read_text(encoding="utf-8").splitlines()[0] if told.exists() else DIED)

    def _record(self, trial: Any, status: str, error: str | None = None) -> None:
        number = trial.config["trial"]
        if number not in self.done:  # else it was only heard again
            self._tell(self.sweep.record(number, status, error))

    def _tell(self, trial: Trial) -> None:
        self.ended += 1
        self.sweep.write()
        value = "no value" if trial.value is None else f"{self.sweep.metric} {trial.value:.4g}"
        best = self.sweep.trials()[0]
        top = "" if best.value is None else f"; best {best.value:.4g}, trial {best.number}"
        about = trial.error or ", ".join(as_overrides(trial.values))
        self.say(
            f"{self.ended}/{len(self.sweep.plan)} after {time.monotonic() - self.started:.0f} s: trial {trial.number} "
            f"{trial.status} at step {trial.step}, {value} ({about}){top}"
        )
