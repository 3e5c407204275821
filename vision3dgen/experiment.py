"""From a configuration to a run folder, and back: data, model, training, evaluation, reconstruction.

RUN/config.yaml          the resolved configuration; `Run.open` needs nothing else
RUN/environment.json     versions, git revision, device and command of the last start
RUN/metrics.jsonl        losses and validation metrics by step
RUN/checkpoints/         newest and best
RUN/evaluation/          NAME_SPLIT.jsonl (a line per item) and NAME_SPLIT.json (the summary)
RUN/samples/             of a generator: samples.npz, and samples.png of images
"""

import inspect
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_origin

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vision3dgen import __version__, engine
from vision3dgen.backbones import BACKBONES, ENCODERS, POINT_ENCODERS, VIEW_ENCODERS, LoadedWeights, load_weights
from vision3dgen.config import Config, ConfigError, Named, arguments, build, choose, construct, load, save
from vision3dgen.datasets import AUGMENTATIONS, DATASETS, PREPARE, Augment, Augmented, collate
from vision3dgen.datasets.shape_items import ShapeItems
from vision3dgen.engine import Data, Trainer, to_device
from vision3dgen.engine.processes import processes
from vision3dgen.files import atomic_write
from vision3dgen.generators import GENERATORS
from vision3dgen.heads import HEADS, ROI_HEADS, RPNS, SEMANTIC_HEADS, DepthHead
from vision3dgen.io import load_pointcloud, read_binvox, read_image, save_mesh, save_npz, save_pointcloud, write_png
from vision3dgen.metrics import (
    EVALUATIONS,
    Clouds,
    Evaluator,
    Features,
    GenerationEvaluator,
    MapEvaluator,
    Pair,
    Scores,
    ShapeEvaluator,
    ShapeSetEvaluator,
    quantize,
)
from vision3dgen.models import DECODERS, MODELS, Classifier, Reconstruction
from vision3dgen.ops import isosurface, sample_points_from_meshes
from vision3dgen.parallel import tracked
from vision3dgen.samples import MAP_PICTURES, visible_cloud
from vision3dgen.samples import samples as samples
from vision3dgen.structures import Camera, Frame, GridSpec, Pointclouds
from vision3dgen.viz import Shown, image_grid, show

PARTS: dict[str, Mapping[str, Callable[..., Any]]] = {  # sections of a model that are built first, in this order
    "trunk": BACKBONES,
    "backbone": BACKBONES,
    "network": POINT_ENCODERS,
    "encoder": {**ENCODERS, **VIEW_ENCODERS},
    "head": HEADS,
    "rpn": RPNS,
    "box": ROI_HEADS,
    "mask": ROI_HEADS,
    "mesh": ROI_HEADS,
    "semantic": SEMANTIC_HEADS,
    "decoder": DECODERS,
}
MODEL_FILE = "model.safetensors"  # of a folder that `pretrained.save_pretrained` wrote: a run without checkpoints
AT_ONCE = 256  # samples that a generator makes at a time: any number of them fits
GIVEN_TO_PARTS = ("channels", "strides", "layout")  # what parts beside a backbone or an encoder may ask to be given
GIVEN_TO_TRAINER = ("model", "data", "run_dir", "seed")  # what the experiment passes beside the configuration


@dataclass(frozen=True)
class Loader:
    """How many items one process takes at once, and how many processes read them."""

    batch_size: int
    num_workers: int = 0


@dataclass(frozen=True)
class Weights:
    """The first weights of a part of a model: those of a trained run, or of a file.

    source: a run folder (its best checkpoint, else its newest) or a file. part: the part of the source's model to take
    them from: of a run the one of the same name, of a file all of it, when nothing is said; "" is the whole model.
    renamed: words of dotted names that are called otherwise here: with {"norm2": "norm3"} `blocks.0.norm2.bias` is
    loaded into `blocks.0.norm3.bias`. fitting: take what has the same name here, instead of all that the part has.
    """

    source: Path
    part: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    fitting: bool = False

    def load(self, model: nn.Module, name: str) -> LoadedWeights:
        """Load them into the part `name` of `model` in place; "" is the whole model.

        The classifier (`fc`, `classifier`) of a file of published weights is left out where the part has none. Raises
        ValueError or OSError naming file and fault; then nothing is loaded.
        """
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            known = sorted(child for child, _ in model.named_children())
            raise ConfigError(f"weights: the model has no part {name!r}; it has {known}") from error
        own = module.state_dict()
        path, part = self.source, self.part or ""
        if self.source.is_dir():
            path = _weights_file(self.source)
            part = name if self.part is None else self.part

        def as_here(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            state = {".".join(self.renamed.get(w, w) for w in key.split(".")): value for key, value in state.items()}
            if not self.fitting:
                left_out = {"fc", "classifier"} - {key.partition(".")[0] for key in own}
                return {key: value for key, value in state.items() if key.partition(".")[0] not in left_out}
            state = {key: value for key, value in state.items() if key in own}
            for key, value in state.items():
                if value.shape != own[key].shape:
                    raise ValueError(
                        f"{key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}; "
                        "build both with the same sizes (of a vocabulary, of the position table, of the width)"
                    )
            return state

        prefix = f"{part}." if part else ""
        return load_weights(module, path, prefix=prefix, rename=as_here, strict=not self.fitting)


def _weights_file(run: Path) -> Path:
    """Of the best checkpoint, else of the newest, the average where there is one; or the file of a folder to share."""
    folder = engine.best(run) or engine.latest(run)
    if folder is None:
        if (run / MODEL_FILE).exists():
            return run / MODEL_FILE
        raise ConfigError(f"{run} has no checkpoint: train it first, or give a file")
    files = engine.checkpoint.verify(folder)["files"]
    return folder / ("ema.safetensors" if "ema.safetensors" in files else "model.safetensors")


@dataclass(frozen=True)
class Experiment:
    """The top level of a configuration.

    data: a dataset by name and its arguments, without the split. splits: arguments that differ for train, val or test.
    model: a model by name and its arguments; those named in `PARTS` (a `backbone`, a `head`) are objects by name too.
    trainer: arguments of `engine.Trainer`. evaluation: one of `EVALUATIONS` by name and its arguments, else shapes.
    weights: by part of the model, where it takes its first weights from: a run folder or file, or `Weights`.
    prepare: data to make first, by name and arguments, unless it is there. augment: `steps` by name and arguments, and
    what else `datasets.Augment` takes, for the train split alone.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    trainer: Mapping[str, Any]
    loader: Loader
    evaluation: Annotated[Evaluator, Named(EVALUATIONS, "shapes")] = field(default_factory=ShapeEvaluator)
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, Path | Weights] = field(default_factory=dict)
    prepare: Mapping[str, Any] | None = None
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
        return build_parts(self.model, {**MODELS, **GENERATORS}, where="model")

    @staticmethod
    def batches(dataset: Any, batch_size: int) -> Iterator[dict[str, Any]]:
        """All items of a dataset, in order."""
        return iter(Batches(dataset, batch_size))


class Batches(Sequence[dict[str, Any]]):
    """All items of a dataset, in order, so many at once; a batch is made when it is asked for.

    title: of a progress bar on a terminal while they are gone through, none by default.
    """

    def __init__(self, dataset: Any, size: int, title: str = ""):
        self.dataset, self.size, self.title = dataset, size, title

    def __iter__(self) -> Iterator[dict[str, Any]]:
        found = (self[number] for number in range(len(self)))
        return tracked(found, title=self.title, total=len(self)) if self.title else found

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.size)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} batches, got {number}")
        start = number * self.size
        return collate([self.dataset[i] for i in range(start, min(start + self.size, len(self.dataset)))])


def build_parts(node: Any, table: Mapping[str, Callable[..., Any]], /, *, where: str = "", **given: Any) -> Any:
    """`config.build`, after the sections of `node` that `PARTS` names, which are built and passed in the same way.

    The parts beside a `backbone` or an `encoder` whose constructors take `channels`, `strides` or `layout` are given
    its own; ConfigError where it has none.
    """
    target, rest = choose(node, table, where=where)
    parts: dict[str, Any] = {}
    for key, choices in PARTS.items():
        parameter = inspect.signature(target).parameters.get(key)
        if rest.get(key) is None or parameter is None or get_origin(parameter.annotation) is Annotated:
            continue  # an annotated one says itself of which table it is
        inside = f"{where}.{key}" if where else key
        part, _ = choose(rest[key], choices, where=inside)
        own: dict[str, Any] = {}
        sources = [name for name in ("encoder", "backbone") if name in parts][:1]
        for source, name in itertools.product(sources, GIVEN_TO_PARTS):
            parameter = inspect.signature(part).parameters.get(name)
            value = getattr(parts[source], name, None)
            if parameter is not None and value is not None:
                own[name] = value
            elif parameter is not None and parameter.default is parameter.empty:
                named, of = rest[key]["name"], rest[source]["name"]
                raise ConfigError(f"{inside}: {named!r} needs {name}, which the {source} {of!r} does not have")
        parts[key] = build_parts(rest[key], choices, where=inside, **own)
    return build(_without(node, *parts), table, where=where, **parts, **given)


STARTED = {"config.yaml", "environment.json"}  # what is in a run folder before anything came of it


@dataclass(frozen=True)
class Run:
    """A run folder and the experiment in it."""

    folder: Path
    experiment: Experiment

    @staticmethod
    def create(folder: str | os.PathLike[str], config: Config) -> "Run":
        """A new folder, or an old one with the same configuration.

        Another configuration there is replaced if nothing came of it, else it is an error.
        """
        experiment = construct(Experiment, config)
        experiment.check()
        folder = Path(folder)
        path = folder / "config.yaml"
        with engine.main_process_first():
            if path.exists() and load(path) != config and {each.name for each in folder.iterdir()} - STARTED:
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
        self,
        *,
        resume: bool = False,
        report: Callable[[Mapping[str, float]], None] | None = None,
        detect_anomaly: bool = False,
    ) -> engine.Result:
        """Train to the end; `resume` continues from the newest whole checkpoint, if there is one.

        `report` is as in `Trainer.fit`. detect_anomaly: every output and gradient is checked (`engine.watched`).
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
            for name, weights in experiment.weights.items():
                weights = Weights(weights) if isinstance(weights, Path) else weights
                weights.load(model, name)
        given: dict[str, Any] = dict(zip(GIVEN_TO_TRAINER, (model, data, self.folder, experiment.seed)))
        trainer = construct(Trainer, experiment.trainer, where="trainer", **given)
        if detect_anomaly and trainer.update.precision == "fp16":
            raise ConfigError("fp16 overflows now and then, by design: detect anomalies in fp32 or bf16")
        with engine.watched(model) if detect_anomaly else nullcontext():
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
        engine.checkpoint.load_file(model, self.weights_file())
        return model.to(device).eval()

    def reconstruct(self, inputs: Sequence[Path], out: Path, *, device: torch.device | str = "cpu") -> list[Path]:
        """Shapes of files as NAME.glb and NAME.ply in `out`: images, or the clouds or voxels that the model completes.

        Of an image the shape is in the canonical frame, for it has no scale; it should be square and show one object,
        as the training images do, and alpha is put on white. Of a cloud (ply, npz, xyz) or voxels (binvox) it is where
        the input is. Clouds are written as NAME.ply alone.
        Depth and normals are written as NAME_depth.png in colors and NAME_depth.npz (the key "depth") for programs; of
        depth there is a cloud NAME.ply too, in the axes of the camera, which is taken to be that of the data's images.
        """
        model = self._reconstruction("reconstruct", device)
        predict = predictor(model, device)
        camera = self._usual_camera() if isinstance(model.head, DepthHead) else None
        out.mkdir(parents=True, exist_ok=True)
        written: list[Path] = []
        for path in tracked(inputs, title="reconstructing"):
            batch = self._read_input(path, model.takes)
            if camera is not None:
                batch["camera"] = Camera.stack([camera])
            (prediction,) = predict(batch)
            maps = {name: prediction.maps[name] for name in MAP_PICTURES if name in prediction.maps}
            for name, values in maps.items():
                written += [out / f"{path.stem}_{name}.png", out / f"{path.stem}_{name}.npz"]
                seen = prediction.maps.get("mask", torch.ones_like(values[:1])) >= 0.5
                write_png(written[-2], MAP_PICTURES[name](values.where(seen, 0)))
                save_npz(written[-1], **{name: values.numpy()})
            shape = visible_cloud(prediction, batch["image"][0], camera) if maps else prediction.shape
            if shape is None or shape.isempty():
                if not maps:
                    warnings.warn(f"{path}: the prediction is empty, no file is written for it", stacklevel=2)
                continue
            assert prediction.frame is not None
            if isinstance(shape, Pointclouds):
                written.append(out / f"{path.stem}.ply")
                save_pointcloud(written[-1], prediction.frame.denormalize(shape))
                continue
            for suffix in ("glb", "ply"):
                written.append(out / f"{path.stem}.{suffix}")
                save_mesh(written[-1], prediction.frame.denormalize(shape))
        return written

    def _usual_camera(self) -> Camera | None:
        """The lens that the first training image was taken with, at the origin; None where the data has no cameras."""
        own = self._with_cameras("train")[0].get("camera")
        if own is None:
            return None
        return Camera(torch.eye(3), torch.zeros(3), own.intrinsics.float(), own.image_size)

    def _read_input(self, path: Path, takes: str) -> dict[str, Any]:
        """A batch of one of what a model takes, in its frame."""
        if takes == "cloud":
            points = load_pointcloud(path).points_packed()
            if not len(points):
                raise ValueError(f"{path}: the cloud is empty: there is nothing to complete")
            frame = Frame.longest_edge(points)
            return {"cloud": frame.normalize(Pointclouds([points])), "frame": [frame]}
        if takes == "voxels":
            voxels, (x, y, z), scale = read_binvox(path)
            frame = Frame("object", (x + scale / 2, y + scale / 2, z + scale / 2), scale)
            return {"voxels": voxels.float()[None], "frame": [frame]}
        size = self.experiment.data.get("image_size") or self.experiment.dataset("train").image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        image = _on_white(torch.from_numpy(read_image(path)))
        image = interpolate(image[None], size, mode="bilinear", antialias=True).clamp(0, 1)
        return {"image": image, "frame": [Frame("object")]}

    def view(self, items: int, out: Path, *, device: torch.device | str = "cpu") -> Shown:
        """Show predictions beside truths for test items spread over the split; without a display, as files in `out`.

        Depth and normals are shown as pictures, depth also as the cloud of what its pixels see.
        """
        model = self._reconstruction("view", device)
        dataset = self.viewable(model)
        return show(samples(dataset, items, {self.folder.name: predictor(model, device)}, takes=model.takes), out)

    def viewable(self, model: Reconstruction) -> Any:
        """The split of the evaluation, with what there is to see of an item beside what `model` takes and predicts."""
        evaluation = self.experiment.evaluation
        if isinstance(evaluation, ShapeEvaluator):
            fields = ("image", "camera", "mesh") if model.takes == "image" else (model.takes, "mesh")
            return self.experiment.dataset(evaluation.split, fields=fields)
        return self._with_cameras(evaluation.split)

    def _with_cameras(self, split: str) -> Any:
        """A split whose items have their camera, where the data has cameras."""
        dataset = self.experiment.dataset(split)
        fields = getattr(dataset, "fields", ("camera",))
        return dataset if "camera" in fields else self.experiment.dataset(split, fields=(*fields, "camera"))

    def sample(
        self, n: int, out: Path, *, classes: Sequence[int] = (), temperature: float | None = None, seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> list[Path]:  # fmt: skip
        """n samples of a generator in `out`: samples.npz ("samples"), and a grid samples.png where they are images.

        classes: given to the samples in turn. temperature: for generators that have one. Returns the files written.
        """
        model = self.model(device)
        if not isinstance(model, tuple(GENERATORS.values())):
            name = self.experiment.model["name"]
            raise ConfigError(f"sample needs a run of a generator, one of {sorted(GENERATORS)}, got {name!r}")
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        draws, parts = torch.Generator().manual_seed(seed), []
        for start in range(0, n, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, n))
            if classes:
                options["cond"] = torch.tensor([classes[i % len(classes)] for i in numbers], device=device)
            with torch.no_grad():
                parts.append(model.sample(len(numbers), generator=draws, **options).cpu())  # type: ignore[operator]
        samples = torch.cat(parts)
        out.mkdir(parents=True, exist_ok=True)
        written = [out / "samples.npz"]
        save_npz(written[0], samples=samples.numpy())
        if samples.ndim == 4 and samples.shape[1] in (1, 3):
            written.append(out / "samples.png")
            enlarged = max(64 // max(samples.shape[2:]), 1)
            image_grid(samples.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3), written[1])
        return written

    def _reconstruction(self, command: str, device: torch.device | str) -> Reconstruction:
        """The model, if it predicts shapes, or pictures of depth or normals."""
        if not isinstance(self.experiment.evaluation, ShapeEvaluator | MapEvaluator):
            self._require_shapes(command)
        model = self.model(device)
        if not isinstance(model, Reconstruction):
            raise ConfigError(f"{command} needs a model that reconstructs, got {self.experiment.model['name']!r}")
        return model

    def _require_shapes(self, command: str) -> ShapeEvaluator:
        evaluation = self.experiment.evaluation
        if not isinstance(evaluation, ShapeEvaluator):
            name = next(name for name, kind in EVALUATIONS.items() if kind is type(evaluation))
            raise ConfigError(f"{command} needs a run that predicts shapes; {self.folder} is evaluated as {name!r}")
        return evaluation

    def evaluate(
        self,
        name: str,
        *,
        split: str | None = None,
        device: torch.device | str = "cpu",
        workers: int | None = None,
    ) -> Scores:
        """Score the run under a name of its evaluation: a protocol, for shapes. Several processes divide the items.

        workers: for shapes, how many processes score in place of what the configuration says.
        """
        processes()  # each of several takes its own device
        experiment, model, about = self.experiment, self.model(device), {"weights": self.weights()}
        if workers is not None:
            evaluation = self._require_shapes("workers")
            experiment = replace(experiment, evaluation=replace(evaluation, workers=workers))
        if isinstance(experiment.evaluation, GenerationEvaluator):
            classifier = Run.open(experiment.evaluation.extractor)
            about["extractor"] = classifier.weights()
            predict: Callable[..., Any] = generated(model, extractor(classifier, device), device, experiment.seed)
        elif isinstance(experiment.evaluation, ShapeSetEvaluator):
            predict = generated_shapes(model, experiment.evaluation.points, device, experiment.seed)
        else:
            predict = predictor(model, device)
        return score(
            self.folder / "evaluation",
            experiment,
            predict,
            name,
            split=split,
            about=about,
        )

    def checkpoint(self) -> Path:
        """The folder of the best checkpoint, else of the newest."""
        found = engine.best(self.folder) or engine.latest(self.folder)
        if found is None:
            raise ConfigError(f"{self.folder} has no checkpoint: train it first")
        return found

    def weights_file(self) -> Path:
        """The safetensors file that `model` loads; ConfigError where there is none."""
        return _weights_file(self.folder)

    def weights(self) -> str:
        """SHA-256 of the weights that `model` loads: scores of other weights are never mixed in."""
        return engine.checkpoint.sha256(self.weights_file())


def predictor(model: nn.Module, device: torch.device | str) -> Callable[[Mapping[str, Any]], Any]:
    """`model.predict` on a device, for batches and predictions on the CPU."""

    def predict(batch: Mapping[str, Any]) -> Any:
        predictions = model.predict(to_device(batch, torch.device(device)))  # type: ignore[operator]
        return to_device(predictions, torch.device("cpu"))

    return predict


def extractor(run: Run, device: torch.device | str) -> Callable[[Tensor], Features]:
    """What the classifier of a run says of pictures: the features before its last layer, and its logits."""
    classifier = run.model(device)
    if not isinstance(classifier, Classifier):
        raise ConfigError(f"{run.folder}: features come from a run whose model is a classifier")

    def extract(images: Tensor) -> Features:
        with torch.no_grad():
            return Features(classifier.features(images), classifier(images))

    return extract


def generated(
    model: nn.Module, extract: Callable[[Tensor], Features], device: torch.device | str, seed: int
) -> Callable[[Mapping[str, Any]], Pair]:
    """Features of a batch and of as many samples of `model`, of the same classes if it has classes, both as bytes."""
    if not callable(getattr(model, "sample", None)):
        raise ConfigError(f"{type(model).__name__} is not a generator: it has no sample()")
    device, draws = torch.device(device), torch.Generator().manual_seed(seed)
    by_class = getattr(model, "classes", None) is not None

    def predict(batch: Mapping[str, Any]) -> Pair:
        images = batch["image"].to(device)
        cond = batch["label"].to(device) if by_class else None
        made = model.sample(len(images), cond=cond, generator=draws)  # type: ignore[operator]
        return to_device(Pair(extract(quantize(images)), extract(quantize(made))), torch.device("cpu"))

    return predict


def generated_shapes(
    model: nn.Module, points: int, device: torch.device | str, seed: int
) -> Callable[[Mapping[str, Any]], Clouds]:
    """Points of the surfaces of a batch and of as many samples of `model`, `points` of each."""
    if not callable(getattr(model, "sample", None)):
        raise ConfigError(f"{type(model).__name__} is not a generator: it has no sample()")
    draws, choices = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    grid = getattr(model, "grid", None)

    def predict(batch: Mapping[str, Any]) -> Clouds:
        real = batch["surface"].points_padded()
        made = model.sample(len(real), generator=draws).cpu()  # type: ignore[operator]
        return Clouds(as_clouds(real, points, choices), as_clouds(made, points, choices, grid))

    return predict


def as_clouds(
    shapes: Float[Tensor, "B N 3"] | Float[Tensor, "B D H W"], points: int, generator: torch.Generator,
    grid: GridSpec | None = None,
) -> Float[Tensor, "B P 3"]:  # fmt: skip
    """Clouds thinned out to so many points, or points of the surfaces of occupancies; NaN for one without a surface.

    grid: where the occupancies are, by default the cells of the unit cube around 0.
    """
    if shapes.ndim == 3:
        if shapes.shape[1] < points:
            raise ValueError(f"clouds have {shapes.shape[1]} points, fewer than the {points} asked for")
        return torch.stack([each[torch.randperm(len(each), generator=generator)[:points]] for each in shapes])
    clouds = shapes.new_full((len(shapes), points, 3), math.nan)
    surfaces = isosurface(shapes, grid or GridSpec.cube(shapes.shape[1]), level=0.5)
    for number in range(len(shapes)):
        if not surfaces[number].isempty():
            clouds[number] = sample_points_from_meshes(surfaces[number], points, generator=generator)[0]
    return clouds


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
    dataset = experiment.dataset(split)
    if isinstance(dataset, ShapeItems):
        about = {**(about or {}), "split": {"name": dataset.split_name, "sha256": dataset.split_sha256}}
    batches = Batches(dataset, evaluation.batch_size, f"scoring, {name}")
    return evaluation.evaluate(name, batches, predict, folder, split=split, seed=experiment.seed, about=about)


def environment() -> dict[str, Any]:
    """What a number depends on beside its configuration: versions, device, threads and command."""
    return {
        "vision3dgen": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _revision() -> str | None:
    """The git commit of the package's source, with "+" where files differ from it; None for an installed package."""
    source = Path(__file__).parents[1]
    if not (source / ".git").exists():
        return None
    told = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(source), *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # no git, or a folder that git does not trust
            return None
        told.append(done.stdout.strip())
    return told[0] + "+" * bool(told[1])


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
