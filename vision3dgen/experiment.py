"""From a configuration to a run folder, and back: data, model, training, evaluation, reconstruction.

RUN/config.yaml          the resolved configuration; `Run.open` needs nothing else
RUN/environment.json     versions, device and command of the last start
RUN/metrics.jsonl        losses and validation metrics by step
RUN/checkpoints/         newest and best
RUN/evaluation/          PROTOCOL_SPLIT.jsonl (a line per item) and PROTOCOL_SPLIT.json (the summary)
"""

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vision3dgen import __version__, engine
from vision3dgen.backbones import BACKBONES
from vision3dgen.config import Config, ConfigError, build, construct, load, save
from vision3dgen.datasets import DATASETS, PREPARE, collate
from vision3dgen.engine import Data, Trainer, to_device
from vision3dgen.files import atomic_write
from vision3dgen.heads import HEADS
from vision3dgen.metrics import PROTOCOLS, Summary, evaluate
from vision3dgen.models import MODELS


@dataclass(frozen=True)
class Loader:
    """How many items one process takes at once, and how many processes read them."""

    batch_size: int
    num_workers: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Under which protocols, on which split and how often a run is scored; more `repeats` give the spread."""

    protocols: list[str] = field(default_factory=lambda: ["default"])
    split: str = "test"
    repeats: int = 2
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise ValueError(f"unknown protocol {name!r}; choose from {sorted(PROTOCOLS)}")


@dataclass(frozen=True)
class Experiment:
    """The top level of a configuration.

    data: a dataset by name and its arguments, without the split. model: a model by name, its `backbone` and its `head`.
    trainer: arguments of `engine.Trainer`. prepare: data to make first, by name and arguments, unless it is there.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    trainer: Mapping[str, Any]
    loader: Loader
    evaluation: Evaluation = field(default_factory=Evaluation)
    prepare: Mapping[str, Any] | None = None
    seed: int = 0

    def prepare_data(self) -> None:
        """Make the data the configuration describes; what is complete already is left as it is."""
        if self.prepare is not None:
            build(self.prepare, PREPARE)

    def dataset(self, split: str) -> Any:
        return build(self.data, DATASETS, split=split)

    def build_model(self) -> nn.Module:
        """The untrained model; the same weights for the same seed."""
        engine.seed_all(self.seed)
        backbone = build(_section(self.model, "backbone"), BACKBONES)
        head = build(_section(self.model, "head"), HEADS, channels=backbone.channels)
        return build(_without(self.model, "backbone", "head"), MODELS, backbone=backbone, head=head)

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(items)

    def batches(self, split: str, batch_size: int) -> Iterator[dict[str, Any]]:
        """All items of a split in order."""
        dataset = self.dataset(split)
        for start in range(0, len(dataset), batch_size):
            yield collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])


@dataclass(frozen=True)
class Run:
    """A run folder and the experiment in it."""

    folder: Path
    experiment: Experiment

    @staticmethod
    def create(folder: str | os.PathLike[str], config: Config) -> "Run":
        """A new folder, or an old one with the same configuration; another configuration there is an error."""
        experiment = construct(Experiment, config)
        folder = Path(folder)
        path = folder / "config.yaml"
        if path.exists() and load(path) != config:
            raise ConfigError(f"{path} holds another configuration than the one given; choose another run folder")
        folder.mkdir(parents=True, exist_ok=True)
        save(config, path)
        return Run(folder, experiment)

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> "Run":
        path = Path(folder) / "config.yaml"
        if not path.exists():
            raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
        return Run(Path(folder), construct(Experiment, load(path)))

    def train(self, *, resume: bool = False) -> engine.Result:
        """Train to the end; `resume` continues from the newest whole checkpoint, if there is one."""
        if not resume and engine.latest(self.folder) is not None:
            raise ConfigError(f"{self.folder} holds a trained run already: resume it, or choose another folder")
        experiment = self.experiment
        with atomic_write(self.folder / "environment.json") as file:
            file.write(json.dumps(environment(), indent=2).encode() + b"\n")
        data = Data(
            experiment.dataset("train"),
            experiment.loader.batch_size,
            collate,
            experiment.loader.num_workers,
        )
        trainer = construct(
            Trainer,
            experiment.trainer,
            where="trainer",
            model=experiment.build_model(),
            data=data,
            run_dir=self.folder,
            seed=experiment.seed,
        )
        return trainer.fit(self._validate if trainer.validation else None, resume=resume)

    def _validate(self, model: nn.Module) -> dict[str, float]:
        """Means over the validation items of what the model measures about itself."""
        sums: dict[str, float] = {}
        count = 0
        device = next(model.parameters()).device
        for batch in self.experiment.batches("val", self.experiment.evaluation.batch_size):
            measured = model.validation_metrics(to_device(batch, device))  # type: ignore[operator]
            for name, values in measured.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            count += len(batch["id"])
        if not count:
            raise ConfigError("validation needs items, but the val split has none")
        return {name: total / count for name, total in sums.items()}

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model with the best checkpoint's weights (else the newest's), in evaluation mode."""
        found = engine.best(self.folder) or engine.latest(self.folder)
        if found is None:
            raise ConfigError(f"{self.folder} has no checkpoint: train it first")
        model = self.experiment.build_model()
        engine.load_weights(model, found)
        return model.to(device).eval()

    def evaluate(self, protocol: str, *, split: str | None = None, device: torch.device | str = "cpu") -> Summary:
        """Score the run under a protocol; items scored before are not scored again."""
        model = self.model(device)
        settings = self.experiment.evaluation
        return score(
            self.folder / "evaluation",
            self.experiment,
            lambda batch: model.predict(to_device(batch, torch.device(device))),  # type: ignore[operator]
            protocol,
            split or settings.split,
        )


def score(folder: Path, experiment: Experiment, predict: Any, protocol: str, split: str) -> Summary:
    """Evaluate `predict(batch)` on a split under a protocol; writes PROTOCOL_SPLIT.jsonl and .json to `folder`."""
    settings = experiment.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    summary = evaluate(
        experiment.batches(split, settings.batch_size),
        predict,
        PROTOCOLS[protocol],
        out=folder / f"{protocol}_{split}.jsonl",
        seed=experiment.seed,
        repeats=settings.repeats,
    )
    with atomic_write(folder / f"{protocol}_{split}.json") as file:
        file.write(json.dumps(summary.to_dict(), indent=2).encode() + b"\n")
    return summary


def environment() -> dict[str, Any]:
    """What a number depends on beside its configuration: versions, device, threads and command."""
    cuda = torch.cuda.is_available()
    return {
        "vision3dgen": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _section(node: Mapping[str, Any], key: str) -> Any:
    if key not in node:
        raise ConfigError(f"model needs a {key}: a name and its arguments")
    return node[key]


def _without(node: Mapping[str, Any], *keys: str) -> Config:
    assert isinstance(node, Config)
    return Config({key: value for key, value in node.items() if key not in keys}, node.source, node.sources, node.key)
