"""Hyper-parameter search: many run folders from one configuration and a search space, run by Ray Tune.

OUT/config.yaml      the configuration that the trials vary
OUT/sweep.json       space, search, seed, metric: what makes it this sweep
OUT/trials/0007/     a run folder like any other, and trial.json: values, status, best value of the metric; error.txt
OUT/table.md         the trials, best first; table.jsonl holds the same
OUT/trials.png       the metric against each key
OUT/ray/             Ray Tune's own records

Which values a trial has is decided by seed and number, so that it depends neither on how many run at once nor on what
ended first.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vision3dgen.checks import check_choice
from vision3dgen.config import Config, ConfigError, construct, load, load_flat, save
from vision3dgen.engine import Distribution, Space, Uniform, distribution, grid_trials, random_trials, read_metrics
from vision3dgen.experiment import Experiment
from vision3dgen.files import atomic_write
from vision3dgen.viz import PALETTE, figure_of, save_figure

SEARCHES = ("random", "grid", "halving")
NO_RAY = 'vision3dgen sweep needs Ray Tune, and matplotlib for its picture: pip install "vision3dgen[cluster]"'


class Trial(NamedTuple):
    """One trial: `finished`, `stopped` by a halving search, `failed` with its error, or still `waiting`."""

    number: int
    values: Mapping[str, Any]
    status: str
    value: float | None = None  # the best of the metric in its log
    step: int = 0  # of the last entry of its log
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """A configuration that is not read yet: file, overrides, preset."""

    path: Path
    overrides: Sequence[str] = ()
    preset: str | None = None

    def config(self, values: Mapping[str, Any] = {}) -> Config:
        """The configuration with these values for dotted keys, as overrides after the others."""
        return load(self.path, [*self.overrides, *as_overrides(values)], preset=self.preset)


@dataclass(frozen=True)
class Sweep:
    """A search in a folder; `create` makes one or finds it again, `run` goes on with what has not finished."""

    folder: Path
    source: Source
    space: Space
    plan: Sequence[Mapping[str, Any]]  # the values of each trial
    metric: str
    mode: str
    search: str
    every: int | None = field(default=None)  # steps between validations, the first rung of a halving search

    @staticmethod
    def create(
        folder: str | os.PathLike[str],
        source: Source,
        space: str | os.PathLike[str],
        *,
        trials: int | None = None,
        search: str = "random",
        metric: str | None = None,
        mode: str | None = None,
        seed: int = 0,
    ) -> "Sweep":
        """A new sweep, or an old one with the same settings, of which only `trials` may change.

        space: a YAML file, see `read_space`. trials: how many; a grid has as many as it has combinations. metric: a key
        of metrics.jsonl, mode: "max" or "min"; both by default those of trainer.validation. Raises ConfigError for keys
        and values the configuration does not take, and for a folder that holds another sweep.
        """
        check_choice("search", search, SEARCHES)
        config = source.config()
        experiment = construct(Experiment, config)
        found = read_space(space, source)
        validation = experiment.trainer.get("validation") or {}
        if metric is None and "metric" not in validation:
            raise ConfigError("a sweep needs a metric: give one, or trainer.validation.metric in the configuration")
        metric = metric or f"val/{validation['metric']}"
        if metric.startswith("val/") and not validation:
            raise ConfigError(
                f"metric {metric!r} is measured on validation: the configuration has no trainer.validation"
            )
        mode = mode or validation.get("mode", "max")
        check_choice("mode", mode, ("max", "min"))
        if search == "grid":
            plan = grid_trials(found)
            if trials is not None and trials != len(plan):
                raise ValueError(f"the grid has {len(plan)} combinations, not {trials} trials: leave the number out")
        elif trials is None:
            raise ValueError(f"a {search} search needs its number of trials")
        else:
            plan = random_trials(found, trials, seed)
        settings = {"search": search, "seed": seed, "metric": metric, "mode": mode, "space": load_flat(space)}
        folder = Path(folder)
        _claim(folder, config, settings)
        every = validation.get("every", 200) if validation else None
        return Sweep(folder, source, found, plan, metric, mode, search, every)

    def run(
        self,
        *,
        address: str | None = None,
        cpus: float = 1,
        gpus: float | None = None,
        say: Callable[[str], None] = print,
    ) -> list[Trial]:
        """Run what has not finished, on this machine or on the Ray cluster at `address`; returns `trials()`.

        cpus, gpus: of one trial, which decides how many run at once; gpus is 1 by default where there is one. On a
        cluster the sweep's folder, the data and the working directory must be at the same place on every machine. A
        trial that fails is kept with its error; run again, it is tried again. Raises ImportError where Ray is missing.
        """
        try:
            import matplotlib  # noqa: F401 (missing, it should be said before the first trial)

            from vision3dgen.sweep import ray_tune
        except ImportError as error:
            raise ImportError(f"{NO_RAY} ({error})") from error
        construct(Experiment, self.source.config()).prepare_data()
        ray_tune.run(
            self, address=address, cpus=cpus, gpus=float(torch.cuda.is_available()) if gpus is None else gpus, say=say
        )
        self.write()
        return self.trials()

    def trials(self) -> list[Trial]:
        """Every trial, best first, then those without a value in order of their number."""
        found = [self.trial(number) for number in range(len(self.plan))]
        sign = -1 if self.mode == "max" else 1
        return sorted(found, key=lambda t: (t.value is None, sign * (t.value or 0.0), t.number))

    def trial(self, number: int) -> Trial:
        """What the folder says of a trial."""
        path = self.place(number) / "trial.json"
        if not path.exists():
            return Trial(number, self.plan[number], "waiting")
        return Trial(**json.loads(path.read_text(encoding="utf-8")))

    def place(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / "trials" / f"{number:04d}"

    def record(self, number: int, status: str, error: str | None = None) -> Trial:
        """Write trial.json from the log of a run that has ended in this way."""
        place = self.place(number)
        log = read_metrics(place) if (place / "metrics.jsonl").exists() else []
        measured = [entry[self.metric] for entry in log if entry.get(self.metric) is not None]
        value = (max if self.mode == "max" else min)(measured, default=None)
        trial = Trial(number, self.plan[number], status, value, int(log[-1]["step"]) if log else 0, error)
        place.mkdir(parents=True, exist_ok=True)
        with atomic_write(place / "trial.json") as file:
            file.write(json.dumps(trial._asdict(), indent=1).encode() + b"\n")
        return trial

    def write(self) -> None:
        """Write table.md, table.jsonl and trials.png from the trials as they are."""
        trials = self.trials()
        with atomic_write(self.folder / "table.md") as file:
            file.write(table(trials, self.metric).encode())
        with atomic_write(self.folder / "table.jsonl") as file:
            file.writelines(json.dumps(trial._asdict()).encode() + b"\n" for trial in trials)
        if any(trial.value is not None for trial in trials):
            draw(trials, self.space, self.metric, self.folder / "trials.png")


def read_space(path: str | os.PathLike[str], source: Source) -> dict[str, Distribution]:
    """The search space in a YAML file of dotted keys, each checked with the ends of its range in the configuration.

    `trainer.optimizer.lr: {log_uniform: [1e-4, 1e-2]}`; see `engine.distribution` for the others. Raises ConfigError
    naming line and key, with the nearest name where there is one.
    """
    node = load_flat(path)
    space = {}
    for key, value in node.items():
        try:
            space[key] = distribution(value)
        except ValueError as error:
            raise ConfigError(f"{node.sources[key]}: {key}: {error}") from error
        if key.split(".")[0] == "prepare":
            raise ConfigError(f"{node.sources[key]}: {key}: the trials share their data, prepare is not searched")
        for end in space[key].ends():
            try:
                construct(Experiment, source.config({key: end})).check()
            except ConfigError as error:
                raise ConfigError(f"{node.sources[key]}: {key}: {error}") from error
    if not space:
        raise ConfigError(f"{path}: the search space has no key")
    return space


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as the overrides that `vision3dgen train` takes."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def table(trials: Sequence[Trial], metric: str) -> str:
    """The trials in this order as a Markdown table."""
    keys = list(trials[0].values) if trials else []
    lines = [["trial", metric, *keys, "step", "status"]]
    for trial in trials:
        value = "" if trial.value is None else f"{trial.value:.5g}"
        status = f"failed: {trial.error}" if trial.error else trial.status
        shown = [json.dumps(trial.values[key]).strip('"') for key in keys]
        lines.append([str(trial.number), value, *shown, str(trial.step), status.replace("|", r"\|").replace("\n", " ")])
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(trials: Sequence[Trial], space: Space, metric: str, path: Path) -> None:
    """The metric against each key: trials that finished filled, stopped ones hollow, failed ones a cross."""
    figure, axes = figure_of(len(space))
    measured = [trial.value for trial in trials if trial.value is not None]
    bottom = min(measured) - 0.08 * (max(measured) - min(measured) or 1.0)
    looks: dict[str, dict[str, Any]] = {
        "finished": {"marker": "o", "facecolors": PALETTE[0], "edgecolors": PALETTE[0]},
        "stopped": {"marker": "o", "facecolors": "none", "edgecolors": PALETTE[0]},
        "failed": {"marker": "x", "color": PALETTE[1]},
    }
    for axis, (key, each) in zip(axes, space.items()):
        numeric = all(type(value) in (int, float) for value in each.ends())
        names = [] if numeric else [json.dumps(value).strip('"') for value in each.grid()]
        for status, look in looks.items():
            chosen = [trial for trial in trials if trial.status == status]
            places = [t.values[key] if numeric else names.index(json.dumps(t.values[key]).strip('"')) for t in chosen]
            heights = [bottom if t.value is None else t.value for t in chosen]
            if chosen:
                axis.scatter(places, heights, s=22, linewidths=1.2, label=status, **look)
        if isinstance(each, Uniform) and each.log:
            axis.set_xscale("log")
        if names:
            axis.set_xticks(range(len(names)), [name[:24] for name in names])
            axis.margins(x=0.2)
        axis.set(title=key)
    axes[0].set_ylabel(metric, fontsize=8)
    lines = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def _claim(folder: Path, config: Config, settings: Mapping[str, Any]) -> None:
    """Make the folder of a sweep, or see that it is this one's."""
    path, told = folder / "sweep.json", json.loads(json.dumps(settings))
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        for key, value in told.items():
            if held.get(key) != value:
                raise ConfigError(f"{folder} holds a sweep with {key} {held.get(key)!r}, not {value!r}; choose another")
        if load(folder / "config.yaml") != config:
            raise ConfigError(f"{folder} holds a sweep of another configuration; choose another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    save(config, folder / "config.yaml")
    with atomic_write(path) as file:
        file.write(json.dumps(told, indent=1).encode() + b"\n")
