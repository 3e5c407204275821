"""Checkpoints of published networks to runs of this library, and back: names as data, weights bit for bit.

`CONVERSIONS` holds a tuple of `Published` networks for each system. `convert` reads a file (pickled code is refused),
finds which of them it is, renames every parameter and builds the model that goes with the shapes; what does not fit is
listed key by key, and then nothing is written.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision3dgen import engine
from vision3dgen.backbones import read_weights
from vision3dgen.checks import check_choice
from vision3dgen.config import save
from vision3dgen.engine import checkpoint
from vision3dgen.experiment import Run, build_parts
from vision3dgen.files import atomic_write
from vision3dgen.heads.mesh import PUBLISHED_K, PUBLISHED_PREFIXES
from vision3dgen.models import MODELS

Shapes = Mapping[str, tuple[int, ...]]  # of the published parameters
COUNTER = ".num_batches_tracked"  # of batch normalization: older files lack it


@dataclass(frozen=True)
class Published:
    """One published network.

    marks: names that it has and the others of its system have not all. prefixes: the beginnings of its names, and what
    stands there here; of several that fit the longest counts. model: the `model` section for the shapes of its
    parameters. experiment: the other sections, as published. constants: tensors of the file that are not weights, by
    name with their values, which have no counterpart here.
    """

    title: str
    marks: tuple[str, ...]
    prefixes: Mapping[str, str]
    model: Callable[[Shapes], dict[str, Any]]
    experiment: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)

    def ours(self, name: str) -> str | None:
        """Our name of a published parameter, None where no prefix fits."""
        return _replaced(name, self.prefixes)

    def theirs(self, name: str) -> str | None:
        """The published name of one of our parameters, None where no prefix fits."""
        return _replaced(name, {ours: theirs for theirs, ours in self.prefixes.items()})


def _replaced(name: str, prefixes: Mapping[str, str]) -> str | None:
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fitting:
        return None
    prefix = max(fitting, key=len)
    return prefixes[prefix] + name.removeprefix(prefix)


class Conversion(NamedTuple):
    """What became of every key of a file."""

    published: Published
    model: dict[str, Any]  # the `model` section
    state: dict[str, Tensor]  # what fits, under its new names
    mapped: dict[str, str]  # the file's name: the new one
    constants: list[str]  # of the file, as expected, or (back) added to it
    unmapped: list[str]  # of the file, without a counterpart
    missing: list[str]  # new names that no key of the file became
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # the file's name: shape there, shape expected

    @property
    def is_whole(self) -> bool:
        return not (self.unmapped or self.missing or self.mismatched)

    def to_text(self) -> str:
        """A line for every key."""
        lines = [f"mapped      {old} -> {new}" for old, new in self.mapped.items()]
        lines += [f"constant    {name}" for name in self.constants]
        lines += [f"unmapped    {name}" for name in self.unmapped]
        lines += [f"missing     {name}" for name in self.missing]
        lines += [f"mismatched  {name}: {got}, expected {want}" for name, (got, want) in self.mismatched.items()]
        counts = ", ".join(
            f"{len(keys)} {kind}"
            for kind, keys in (
                ("mapped", self.mapped), ("constant", self.constants), ("unmapped", self.unmapped),
                ("missing", self.missing), ("mismatched", self.mismatched),
            )
        )  # fmt: skip
        return "\n".join([*lines, f"{self.published.title}: {counts}"])


def convert(system: str, path: str | os.PathLike[str]) -> Conversion:
    """A published checkpoint under our names, and the model it is of.

    Raises ValueError or OSError naming the file if it cannot be read (pickled objects are refused), or if it is not one
    of the system's networks, saying what it lacks.
    """
    check_choice("system", system, CONVERSIONS)
    state = read_weights(path)
    published = _recognize(system, state, path, lambda network: network.marks)
    section = _section(published, {name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    constants = [name for name in state if name in published.constants and _is_constant(published, name, state[name])]
    weights = {name: tensor for name, tensor in state.items() if name not in constants}
    return _compare(published, section, weights, published.ours, _own_shapes(section), constants)


def convert_back(system: str, path: str | os.PathLike[str]) -> Conversion:
    """Our weights, a run folder or its safetensors file, under the published names; raises as `convert` does."""
    check_choice("system", system, CONVERSIONS)
    path = Path(path)
    state = read_weights(path if path.is_file() else _weights_of(path))

    def our_marks(network: Published) -> tuple[str, ...]:
        return tuple(str(network.ours(mark)) for mark in network.marks)

    published = _recognize(system, state, path, our_marks)
    shapes = {published.theirs(name) or name: tuple(tensor.shape) for name, tensor in state.items()}
    section = _section(published, shapes, path)
    expected = {str(published.theirs(name)): shape for name, shape in _own_shapes(section).items()}
    constants = list(published.constants)
    found = _compare(published, section, state, published.theirs, expected, constants)
    values = {name: torch.tensor(value) for name, value in published.constants.items()}
    return found._replace(state=found.state | values)


def write_run(conversion: Conversion, out: str | os.PathLike[str]) -> Run:
    """A run folder of the converted network: config.yaml, and the weights as its only checkpoint.

    It can be evaluated once its `data.root` is yours, and start other runs. ValueError if not everything fits.
    """
    _require_whole(conversion)
    out = Path(out)
    if (out / "config.yaml").exists():
        raise ValueError(f"{out} is a run folder already: choose another one")
    model = build_parts(conversion.model, MODELS, where="model")
    model.load_state_dict(conversion.state, strict=False)  # counters that an old file lacks stay 0
    out.mkdir(parents=True, exist_ok=True)
    save({"seed": 0, "model": conversion.model, **conversion.published.experiment}, out / "config.yaml")
    checkpoint.save(out, 0, model, {})
    return Run.open(out)


def write_published(conversion: Conversion, out: str | os.PathLike[str]) -> None:
    """A torch file {"model": state dict}, as the authors' code loads. ValueError if not everything fits."""
    _require_whole(conversion)
    with atomic_write(out) as file:
        torch.save({"model": conversion.state}, file)


def _require_whole(conversion: Conversion) -> None:
    if not conversion.is_whole:
        raise ValueError(f"not written, the file does not fit: {conversion.to_text().splitlines()[-1]}")


def _recognize(
    system: str, state: Mapping[str, Tensor], path: Any, marks_of: Callable[[Published], Sequence[str]]
) -> Published:
    for network in CONVERSIONS[system]:
        if all(mark in state for mark in marks_of(network)):
            return network
    others = [
        f"{network.title} (system {other!r})"
        for other, networks in CONVERSIONS.items()
        for network in networks
        if all(mark in state for mark in marks_of(network))
    ]
    lacks = "; ".join(
        f"{network.title} has {', '.join(mark for mark in marks_of(network) if mark not in state)}"
        for network in CONVERSIONS[system]
    )
    hint = f"; it looks like {' or '.join(others)}" if others else f"; the file begins with {', '.join([*state][:3])}"
    raise ValueError(f"{path}: not a network of {system!r}, it lacks what these have: {lacks}{hint}")


def _section(published: Published, shapes: Shapes, path: Any) -> dict[str, Any]:
    try:
        return published.model(shapes)
    except KeyError as error:
        raise ValueError(f"{path}: {published.title} without {error.args[0]!r}, which says how large it is") from error


def _own_shapes(section: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    model = build_parts(section, MODELS, where="model")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _is_constant(published: Published, name: str, value: Tensor) -> bool:
    return torch.allclose(value, torch.tensor(published.constants[name], dtype=value.dtype), atol=1e-6)


def _compare(
    published: Published,
    section: dict[str, Any],
    state: Mapping[str, Tensor],
    rename: Callable[[str], str | None],
    expected: Mapping[str, tuple[int, ...]],
    constants: list[str],
) -> Conversion:
    """Every key of `state` under its new name, against the names and shapes `expected`."""
    renamed = {name: rename(name) for name in state}
    known = {old: new for old, new in renamed.items() if new is not None and new in expected}
    mapped = {old: new for old, new in known.items() if tuple(state[old].shape) == expected[new]}
    return Conversion(
        published,
        section,
        {new: state[old] for old, new in mapped.items()},
        mapped,
        constants,
        unmapped=[name for name in state if name not in known],
        missing=[name for name in expected if name not in known.values() and not name.endswith(COUNTER)],
        mismatched={old: (tuple(state[old].shape), expected[new]) for old, new in known.items() if old not in mapped},
    )


def _weights_of(run: Path) -> Path:
    folder = engine.best(run) or engine.latest(run)
    if folder is None:
        raise ValueError(f"{run} has no checkpoint: train it first, or give a safetensors file")
    averaged = folder / "ema.safetensors"
    return averaged if averaged.exists() else folder / "model.safetensors"


# -------------------------------------------------------------------------------------------- published settings


def _experiment(batch_size: int, data: Mapping[str, Any], fields: list[str]) -> dict[str, Any]:
    """The sections beside the model, for the data of Occupancy Networks and the training the authors describe."""
    return {
        "data": {"name": "shapenet", "root": "data", "voxel_placement": "cube", **data},
        "splits": {
            "train": {"fields": [*fields, "points"], "points_per_item": 2048, "views": "random"},
            "val": {"fields": [*fields, "points"], "views": "first"},
            "test": {"fields": [*fields, "points", "surface"], "views": "first"},
        },
        "loader": {"batch_size": batch_size},
        "trainer": {
            "steps": 300_000,
            "optimizer": {"name": "adam", "lr": 1e-4},
            "validation": {"metric": "iou", "mode": "max", "every": 10_000},
        },
        "evaluation": {"protocols": ["onet"], "split": "test"},
    }


def _occupancy_head(shapes: Shapes, **code: Any) -> dict[str, Any]:
    head = {"name": "occupancy", **code, "hidden": shapes["decoder.fc_p.weight"][0], "threshold": 0.2}
    if "decoder.fc_z.weight" in shapes:
        head["latent_channels"] = shapes["decoder.fc_z.weight"][1]
    return head


_RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}


def _image_model(shapes: Shapes) -> dict[str, Any]:
    blocks = len({name.split(".")[3] for name in shapes if name.startswith("encoder.features.layer3.")})
    bottleneck = "encoder.features.layer1.0.conv3.weight" in shapes
    code = shapes["encoder.fc.weight"][0] if "encoder.fc.weight" in shapes else None
    return {
        "name": "single_view",
        "backbone": {"name": _RESNETS.get((blocks, bottleneck), "resnet18")},
        "head": _occupancy_head(shapes, code_channels=code),
    }


def _cloud_model(shapes: Shapes) -> dict[str, Any]:
    code, hidden = shapes["encoder.fc_c.weight"]
    network = {"name": "resnet_pointnet", "code_channels": code, "hidden": hidden}
    return {
        "name": "completion",
        "encoder": {"name": "point_code", "network": network},
        "head": _occupancy_head(shapes, code_channels=None),
    }


def _voxel_model(shapes: Shapes) -> dict[str, Any]:
    code, inputs = shapes["encoder.fc.weight"]
    resolution = 16 * round((inputs / 512) ** (1 / 3))
    return {
        "name": "completion",
        "encoder": {"name": "voxel_code", "code_channels": code, "resolution": resolution},
        "head": _occupancy_head(shapes, code_channels=None),
    }


def _local_model(shapes: Shapes) -> dict[str, Any]:
    """The planes and the resolutions leave no trace in the weights: those of the objects' configurations are taken."""
    flat, volume = "encoder.unet.conv_final.weight", "encoder.unet3d.final_conv.weight"
    depth = _count(shapes, "encoder.unet.down_convs.")
    levels = _count(shapes, "encoder.unet3d.encoders.")
    planes = [*(["xz", "xy", "yz"] if flat in shapes else []), *(["grid"] if volume in shapes else [])]
    encoder: dict[str, Any] = {"layout": {"planes": planes or ["xz", "xy", "yz"]}, "depth": depth, "levels": levels}
    if volume in shapes:
        encoder["layout"]["grid_resolution"] = 8 * 2 ** (levels - 1)
    if "encoder.fc_pos.weight" in shapes:
        code, hidden = shapes["encoder.fc_c.weight"]
        blocks = _count(shapes, "encoder.blocks.")
        encoder = {"name": "local_pool_pointnet", "hidden": hidden, "blocks": blocks, **encoder}
    else:
        code = shapes["encoder.conv_in.weight"][0]
        encoder = {"name": "local_voxels", **encoder}
    width = shapes[flat][1] if flat in shapes else shapes[volume][1] if volume in shapes else 32
    hidden, blocks = shapes["decoder.fc_p.weight"][0], _count(shapes, "decoder.blocks.")
    return {
        "name": "completion",
        "encoder": {**encoder, "code_channels": code, "width": width},
        "head": {"name": "local_occupancy", "hidden": hidden, "blocks": blocks, "threshold": 0.2},
    }


def _count(shapes: Shapes, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def _meshrcnn_model(shapes: Shapes) -> dict[str, Any]:
    """Sphere-Init and Pixel2Mesh+ have the same names and shapes: the file is taken for Sphere-Init's."""
    head: dict[str, Any] = {"name": "sphere_init"}
    if "voxel_head.predictor.weight" in shapes:
        head = {"name": "voxmesh", "resolution": shapes["voxel_head.predictor.weight"][0]}
    head |= {"stages": _count(shapes, "mesh_head.stages."), "hidden": shapes["mesh_head.stages.0.bottleneck.weight"][0]}
    return {"name": "single_view", "backbone": {"name": "resnet50"}, "head": head}


def _pixel2mesh_model(shapes: Shapes) -> dict[str, Any]:
    model = _meshrcnn_model(shapes)
    return model | {"head": model["head"] | {"level": 2, "subdivide": True}}


_MESHRCNN: dict[str, Any] = {  # as published; the pictures are on black
    "data": {"name": "shapenet", "root": "data", "background": [0.0, 0.0, 0.0]},
    "splits": {
        "train": {"fields": ["image", "camera", "voxels", "surface"], "surface_points": 5000},
        "val": {"fields": ["image", "camera", "voxels", "points", "surface"], "views": "first"},
        "test": {"fields": ["image", "camera", "voxels", "mesh"]},
    },
    "loader": {"batch_size": 64},
    "trainer": {
        "steps": 312_000,
        "optimizer": {"name": "adam", "lr": 1e-4},
        "validation": {"metric": "f1", "mode": "max", "every": 6_000},
    },
    "evaluation": {"protocols": ["meshrcnn", "pixel2mesh"], "split": "test"},
}
_MESH_MARKS = ("mesh_head.stages.0.bottleneck.weight", "backbone.stem.0.weight")

_DECODER = {"decoder.": "head.decoder.", "encoder_latent.": "head.encoder_latent."}

CONVERSIONS: dict[str, tuple[Published, ...]] = {
    "onet": (
        Published(
            "Occupancy Network of images",
            ("encoder.features.conv1.weight", "decoder.block0.fc_0.weight"),
            {"encoder.features.": "backbone.", "encoder.fc.": "head.fc.", **_DECODER},
            _image_model,
            _experiment(64, {"image_size": 224}, ["image"]),
        ),
        Published(
            "Occupancy Network of point clouds",
            ("encoder.block_0.fc_0.weight", "decoder.block0.fc_0.weight"),
            {"encoder.": "encoder.network.", **_DECODER},
            _cloud_model,
            _experiment(64, {"cloud": {"points": 300, "noise": 0.005}}, ["cloud"]),
        ),
        Published(
            "Occupancy Network of voxels",
            ("encoder.conv_3.weight", "decoder.block0.fc_0.weight"),
            {"encoder.": "encoder.", **_DECODER},
            _voxel_model,
            _experiment(64, {}, ["voxels"]),
        ),
    ),
    "convonet": (
        Published(
            "Convolutional Occupancy Network of point clouds",
            ("encoder.blocks.0.fc_0.weight", "decoder.fc_c.0.weight"),
            {"encoder.": "encoder.", "decoder.": "head.decoder."},
            _local_model,
            _experiment(32, {"cloud": {"points": 3000, "noise": 0.005}}, ["cloud"]),
        ),
        Published(
            "Convolutional Occupancy Network of voxels",
            ("encoder.conv_in.weight", "decoder.fc_c.0.weight"),
            {"encoder.": "encoder.", "decoder.": "head.decoder."},
            _local_model,
            _experiment(32, {}, ["voxels"]),
        ),
    ),
    "meshrcnn": (
        Published(
            "Mesh R-CNN of ShapeNet, voxels and mesh",
            ("voxel_head.predictor.weight", *_MESH_MARKS),
            PUBLISHED_PREFIXES,
            _meshrcnn_model,
            _MESHRCNN,
            constants={"K": PUBLISHED_K},
        ),
        Published(
            "Mesh R-CNN of ShapeNet, sphere",
            _MESH_MARKS,
            PUBLISHED_PREFIXES,
            _meshrcnn_model,
            _MESHRCNN,
            constants={"K": PUBLISHED_K},
        ),
    ),
    "pixel2mesh+": (
        Published(
            "Pixel2Mesh+ of Mesh R-CNN",
            _MESH_MARKS,
            PUBLISHED_PREFIXES,
            _pixel2mesh_model,
            _MESHRCNN,
            constants={"K": PUBLISHED_K},
        ),
    ),
}
