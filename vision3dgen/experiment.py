"""From a configuration to a run folder, and back: data, model, training, evaluation, reconstruction.

RUN/config.yaml          the resolved configuration; `Run.open` needs nothing else
RUN/environment.json     versions, device and command of the last start
RUN/metrics.jsonl        losses and validation metrics by step
RUN/checkpoints/         newest and best
RUN/evaluation/          NAME_SPLIT.jsonl (a line per item) and NAME_SPLIT.json (the summary)
"""

import inspect
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vision3dgen import __version__, engine
from vision3dgen.backbones import BACKBONES, VIEW_ENCODERS, load_weights
from vision3dgen.config import Config, ConfigError, Named, arguments, build, choose, construct, load, save
from vision3dgen.datasets import AUGMENTATIONS, CATEGORIES, DATASETS, PREPARE, Augment, Augmented, collate
from vision3dgen.engine import Data, Trainer, to_device
from vision3dgen.files import atomic_write
from vision3dgen.heads import HEADS
from vision3dgen.io import read_image, save_mesh, save_pointcloud
from vision3dgen.metrics import EVALUATIONS, Evaluator, Prediction, Scores, ShapeEvaluator
from vision3dgen.models import DECODERS, MODELS
from vision3dgen.structures import Frame, Pointclouds
from vision3dgen.viz import Sample, Shown, show

PARTS: dict[str, Mapping[str, Callable[..., Any]]] = {  # sections of a model that are built first, in this order
    "trunk": BACKBONES,
    "backbone": BACKBONES,
    "encoder": VIEW_ENCODERS,
    "head": HEADS,
    "decoder": DECODERS,
}
GIVEN_TO_TRAINER = ("model", "data", "run_dir", "seed")  # what the experiment passes beside the configuration


@dataclass(frozen=True)
class Loader:
    """How many items one process takes at once, and how many processes read them."""

    batch_size: int
    num_workers: int = 0


@dataclass(frozen=True)
class Initialize:
    """A trained run whose weights a model starts from, where names fit; see `engine.load_fitting`.

    into: the part of the model they are loaded into, such as "decoder"; the whole model by default.
    """

    run: Path
    into: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def load(self, model: nn.Module) -> list[str]:
        """The names loaded; ConfigError if the run or the part does not exist."""
        try:
            part = model.get_submodule(self.into)
        except AttributeError as error:
            parts = [name for name, _ in model.named_children()]
            raise ConfigError(f"initialize.into: the model has no part {self.into!r}; it has {parts}") from error
        return engine.load_fitting(part, Run.open(self.run).checkpoint(), renamed=self.renamed)


@dataclass(frozen=True)
class Experiment:
    """The top level of a configuration.

    data: a dataset by name and its arguments, without the split. splits: arguments that differ for train, val or test.
    model: a model by name and its arguments; those named in `PARTS` (a `backbone`, a `head`) are objects by name too.
    trainer: arguments of `engine.Trainer`. evaluation: one of `EVALUATIONS` by name and its arguments, else shapes.
    weights: by module of the model, the run folder or file of which it takes the first weights, all of them.
    prepare: data to make first, by name and arguments, unless it is there. initialize: a trained run to start from,
    where names fit. augment: `steps` by name and arguments, and what else `datasets.Augment` takes, for the train
    split alone.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    trainer: Mapping[str, Any]
    loader: Loader
    evaluation: Annotated[Evaluator, Named(EVALUATIONS, "shapes")] = field(default_factory=ShapeEvaluator)
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, Path] = field(default_factory=dict)
    prepare: Mapping[str, Any] | None = None
    initialize: Initialize | None = None
    augment: Mapping[str, Any] | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for every fault that can be found without the data."""
        self.build_model()
        arguments(Trainer, self.trainer, where="trainer", built=GIVEN_TO_TRAINER)
        for split in ("train", "val", "test"):
            reader, rest = choose(_with(self.data, self.splits.get(split, {})), DATASETS, where="data")
            arguments(reader, rest, built=() if "split" in rest else ("split",))
        if self.prepare is not None:
            maker, rest = choose(self.prepare, PREPARE, where="prepare")
            arguments(maker, rest, built=())
        self.augmentation()

    def augmentation(self) -> Augment | None:
        """What the items of the train split pass through."""
        if self.augment is None:
            return None
        steps = [build(step, AUGMENTATIONS, where=f"augment.steps[{i}]") for i, step in enumerate(self._steps())]
        return construct(Augment, _without(self.augment, "steps"), where="augment", steps=steps)

    def _steps(self) -> list[Any]:
        steps = self.augment.get("steps") if self.augment is not None else None
        if not isinstance(steps, list):
            raise ConfigError(f"augment needs steps, a list; choose from {sorted(AUGMENTATIONS)}")
        return steps

    def prepare_data(self) -> None:
        """Make the data the configuration describes; what is complete already is left as it is."""
        if self.prepare is not None:
            with engine.main_process_first():
                build(self.prepare, PREPARE)

    def dataset(self, split: str, **arguments: Any) -> Any:
        """A split of the data; `arguments` replace those of the configuration."""
        node = _with(self.data, _with(self.splits.get(split, {}), arguments))
        return build(node, DATASETS, **{"split": split} if "split" not in node else {})

    def build_model(self) -> nn.Module:
        """The untrained model; the same weights for the same seed."""
        engine.seed_all(self.seed)
        return build_parts(self.model, MODELS, where="model")

    @staticmethod
    def batches(dataset: Any, batch_size: int) -> Iterator[dict[str, Any]]:
        """All items of a dataset, in order."""
        for start in range(0, len(dataset), batch_size):
            yield collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])


def build_parts(node: Any, table: Mapping[str, Callable[..., Any]], /, *, where: str = "", **given: Any) -> Any:
    """`config.build`, after the sections of `node` that `PARTS` names, which are built and passed in the same way.

    The parts beside a `backbone` or an `encoder` whose constructors take `channels` or `strides` are given its own.
    """
    target, rest = choose(node, table, where=where)
    parts: dict[str, Any] = {}
    for key, choices in PARTS.items():
        if rest.get(key) is None or key not in inspect.signature(target).parameters:
            continue
        inside = f"{where}.{key}" if where else key
        part, _ = choose(rest[key], choices, where=inside)
        before = next((parts[name] for name in ("encoder", "backbone") if name in parts), None)
        wanted = set() if before is None else {"channels", "strides"} & set(inspect.signature(part).parameters)
        own = {name: getattr(before, name) for name in sorted(wanted)}
        parts[key] = build_parts(rest[key], choices, where=inside, **own)
    return build(_without(node, *parts), table, where=where, **parts, **given)


def load_module(model: nn.Module, name: str, source: Path) -> None:
    """Give the module `name` of `model` the weights of the same module in a run folder, or those in a file, in place.

    Of a run it is the best checkpoint, else the newest. The classifier (`fc`, `classifier`) of a file of published
    weights is left out where the module has none. Raises ValueError or OSError naming file and fault.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        known = sorted(child for child, _ in model.named_children())
        raise ConfigError(f"weights: the model has no module {name!r}; it has {known}") from error
    own = {key.partition(".")[0] for key in module.state_dict()}

    def without_classifier(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        left_out = {"fc", "classifier"} - own
        return {key: value for key, value in state.items() if key.partition(".")[0] not in left_out}

    path, prefix = source, ""
    if source.is_dir():
        folder = engine.best(source) or engine.latest(source)
        if folder is None:
            raise ConfigError(f"weights: {source} has no checkpoint: train it first, or give a file")
        averaged = folder / "ema.safetensors"
        path, prefix = averaged if averaged.exists() else folder / "model.safetensors", f"{name}."
    load_weights(module, path, prefix=prefix, rename=without_classifier)


@dataclass(frozen=True)
class Run:
    """A run folder and the experiment in it."""

    folder: Path
    experiment: Experiment

    @staticmethod
    def create(folder: str | os.PathLike[str], config: Config) -> "Run":
        """A new folder, or an old one with the same configuration; another configuration there is an error."""
        experiment = construct(Experiment, config)
        experiment.check()
        folder = Path(folder)
        path = folder / "config.yaml"
        with engine.main_process_first():
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

    def train(
        self, *, resume: bool = False, report: Callable[[Mapping[str, float]], None] | None = None
    ) -> engine.Result:
        """Train to the end; `resume` continues from the newest whole checkpoint, if there is one.

        `report` is as in `Trainer.fit`.
        """
        if not resume and engine.latest(self.folder) is not None:
            raise ConfigError(f"{self.folder} holds a trained run already: resume it, or choose another folder")
        experiment = self.experiment
        with atomic_write(self.folder / "environment.json") as file:
            file.write(json.dumps(environment(), indent=2).encode() + b"\n")
        dataset, augment = experiment.dataset("train"), experiment.augmentation()
        data = Data(
            dataset if augment is None else Augmented(dataset, augment),
            experiment.loader.batch_size,
            collate,
            experiment.loader.num_workers,
        )
        model = experiment.build_model()
        if engine.latest(self.folder) is None:
            for name, source in experiment.weights.items():
                load_module(model, name, source)
            if experiment.initialize is not None:
                experiment.initialize.load(model)
        given: dict[str, Any] = dict(zip(GIVEN_TO_TRAINER, (model, data, self.folder, experiment.seed)))
        trainer = construct(Trainer, experiment.trainer, where="trainer", **given)
        return trainer.fit(self._validation() if trainer.validation else None, resume=resume, report=report)

    def _validation(self) -> Callable[[nn.Module], dict[str, float]]:
        """Means over the val split of what a model measures about itself; processes divide the batches."""
        dataset, size = self.experiment.dataset("val"), self.experiment.evaluation.batch_size

        def validate(model: nn.Module) -> dict[str, float]:
            device = next(model.parameters()).device
            indices: list[int] = []
            measured: dict[str, list[Tensor]] = {}
            for number in engine.share(-(-len(dataset) // size)):
                mine = range(number * size, min((number + 1) * size, len(dataset)))
                batch = to_device(collate([dataset[index] for index in mine]), device)
                for name, values in model.validation_metrics(batch).items():  # type: ignore[operator]
                    measured.setdefault(name, []).append(values)
                indices += mine
            values = {name: torch.cat(parts) for name, parts in measured.items()}
            gathered = engine.gather_items(indices, values, len(dataset))
            return {name: float(values.double().mean()) for name, values in gathered.items()}

        return validate

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model with the best checkpoint's weights (else the newest's), in evaluation mode."""
        model = self.experiment.build_model()
        engine.load_weights(model, self.checkpoint())
        return model.to(device).eval()

    def reconstruct(self, images: Sequence[Path], out: Path, *, device: torch.device | str = "cpu") -> list[Path]:
        """Shapes of image files as NAME.glb and NAME.ply in `out`, in the canonical frame: one image has no scale.

        Clouds are written as NAME.ply alone. Pictures with alpha are put on white. They should be square and show one
        object, as the training images do.
        """
        self._require_shapes("reconstruct")
        predict = predictor(self.model(device), device)
        size = self.experiment.dataset("train").image_size
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for path in images:
            image = _on_white(torch.from_numpy(read_image(path)))
            image = interpolate(image[None], (size, size), mode="bilinear", antialias=True).clamp(0, 1)
            batch = {"image": image, "frame": [Frame("object")]}
            (prediction,) = predict(batch)
            if prediction.shape is None or prediction.shape.isempty():
                warnings.warn(f"{path}: the prediction is empty, no file is written for it", stacklevel=2)
                continue
            if isinstance(prediction.shape, Pointclouds):
                written.append(out / f"{path.stem}.ply")
                save_pointcloud(written[-1], prediction.shape)
                continue
            for suffix in ("glb", "ply"):
                written.append(out / f"{path.stem}.{suffix}")
                save_mesh(written[-1], prediction.shape)
        return written

    def view(self, items: int, out: Path, *, device: torch.device | str = "cpu") -> Shown:
        """Show predictions beside truths for test items spread over the split; without a display, as files in `out`."""
        self._require_shapes("view")
        dataset = self.experiment.dataset(self.experiment.evaluation.split, fields=("image", "camera", "mesh"))
        predict = predictor(self.model(device), device)
        return show(samples(dataset, items, {self.folder.name: predict}), out)

    def _require_shapes(self, command: str) -> None:
        evaluation = self.experiment.evaluation
        if not isinstance(evaluation, ShapeEvaluator):
            name = next(name for name, kind in EVALUATIONS.items() if kind is type(evaluation))
            raise ConfigError(f"{command} needs a run that predicts shapes; {self.folder} is evaluated as {name!r}")

    def evaluate(self, name: str, *, split: str | None = None, device: torch.device | str = "cpu") -> Scores:
        """Score the run under a name of its evaluation: a protocol, for shapes."""
        return score(
            self.folder / "evaluation",
            self.experiment,
            predictor(self.model(device), device),
            name,
            split=split,
            about={"weights": self.weights()},
        )

    def checkpoint(self) -> Path:
        """The folder of the best checkpoint, else of the newest."""
        found = engine.best(self.folder) or engine.latest(self.folder)
        if found is None:
            raise ConfigError(f"{self.folder} has no checkpoint: train it first")
        return found

    def weights(self) -> str:
        """SHA-256 of the weights that `model` loads: scores of other weights are never mixed in."""
        files = json.loads((self.checkpoint() / "meta.json").read_text(encoding="utf-8"))["files"]
        return files["ema.safetensors" if "ema.safetensors" in files else "model.safetensors"]["sha256"]


def predictor(model: nn.Module, device: torch.device | str) -> Callable[[Mapping[str, Any]], Any]:
    """`model.predict` on a device, for batches and predictions on the CPU."""

    def predict(batch: Mapping[str, Any]) -> Any:
        predictions = model.predict(to_device(batch, torch.device(device)))  # type: ignore[operator]
        return to_device(predictions, torch.device("cpu"))

    return predict


def samples(
    dataset: Any, count: int, predictors: Mapping[str, Callable[[Mapping[str, Any]], Sequence[Prediction]]]
) -> list[Sample]:
    """What each predictor makes of `count` items spread evenly over a dataset, for the viewer."""
    found = []
    for index in sorted({round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)}):
        item = dataset[index]
        batch = collate([item])
        shapes = {name: predict(batch)[0].shape for name, predict in predictors.items()}
        synset, model, view = item["id"].split("/")
        title = f"{CATEGORIES.get(synset, synset)} {model[:8]} {view}"
        image, camera = item["image"], item["camera"]
        if image.ndim == 4:  # of several views the first one is shown
            image, camera = image[0], camera[0]
        found.append(Sample(image, item["mesh"], shapes, camera, item["frame"], title))
    return found


def score(
    folder: Path,
    experiment: Experiment,
    predict: Callable[[Mapping[str, Any]], Any],
    name: str,
    *,
    split: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Scores:
    """Evaluate `predict(batch)` on a split under a name; writes NAME_SPLIT.jsonl and .json to `folder`.

    `about` is what the scores depend on beside protocol, seed and data; scores kept from another `about` are refused.
    """
    evaluation = experiment.evaluation
    split = split or evaluation.split
    batches = experiment.batches(experiment.dataset(split), evaluation.batch_size)
    return evaluation.evaluate(name, batches, predict, folder, split=split, seed=experiment.seed, about=about)


def environment() -> dict[str, Any]:
    """What a number depends on beside its configuration: versions, device, threads and command."""
    return {
        "vision3dgen": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _on_white(rgba: UInt8[Tensor, "H W 4"]) -> Float[Tensor, "3 H W"]:
    color, alpha = rgba[..., :3].float() / 255, rgba[..., 3:].float() / 255
    return (color * alpha + 1 - alpha).permute(2, 0, 1)


def _processor() -> str:
    """The CPU's name and its number of cores."""
    name = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists():
        models = [line.partition(":")[2].strip() for line in known.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def _without(node: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    return _like(node, {key: value for key, value in node.items() if key not in keys}, {})


def _with(node: Mapping[str, Any], more: Mapping[str, Any]) -> Mapping[str, Any]:
    return _like(node, {**node, **more}, getattr(more, "sources", {}))


def _like(node: Mapping[str, Any], values: dict[str, Any], sources: Mapping[str, str]) -> Mapping[str, Any]:
    """`values` with what `node` knows of its place in a file, so that faults are still named."""
    return Config(values, node.source, {**node.sources, **sources}, node.key) if isinstance(node, Config) else values
