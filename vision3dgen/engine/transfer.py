"""First weights of a part of a model, taken from another run or from a file of published weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vision3dgen.engine.checkpoint import CheckpointError, best, latest, verify


def load_module(model: nn.Module, name: str, source: Path) -> None:
    """Give the module `name` of `model` the weights in `source`, in place.

    source: a run folder (its best checkpoint, else the newest; the averaged weights where there are some), a
    `.safetensors` file, or a file of torch.save (tensors only, `weights_only=True`). Its names may begin with `name` or
    be the module's own. Classifiers (`fc.`, `classifier.`) that the module does not have are left out. Raises
    CheckpointError naming the file and up to five names that are missing, unknown, or of another shape.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        known = sorted(child for child, _ in model.named_children())
        raise CheckpointError(f"the model has no module {name!r} to load weights into; it has {known}") from error
    path = _file(source)
    found = _read(path)
    inside = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
    found = inside or found
    wanted = module.state_dict()
    heads = {key.partition(".")[0] for key in wanted}
    found = {k: v for k, v in found.items() if k in wanted or k.partition(".")[0] not in {"fc", "classifier"} - heads}
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # absent from old published weights
    faults = [f"missing {key} {tuple(wanted[key].shape)}" for key in wanted if key not in found and key not in counters]
    faults += [f"unknown {key} {tuple(found[key].shape)}" for key in found if key not in wanted]
    faults += [
        f"{key} is {tuple(found[key].shape)}, the model's {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{path} does not fit {name!r} ({type(module).__name__}): {'; '.join(faults[:5])}{more}")
    module.load_state_dict(found, strict=False)


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    folder = best(source) or latest(source)
    if folder is None:
        raise CheckpointError(f"{source} has no checkpoint to take weights from: train it first")
    name = "ema.safetensors" if "ema.safetensors" in verify(folder)["files"] else "model.safetensors"
    return folder / name


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such run folder or file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot read weights, {error}") from error
    except Exception as error:  # pickle's own, for objects that are not tensors
        raise CheckpointError(f"{path}: not a file of tensors alone, {type(error).__name__}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: must hold a mapping of names to tensors (a state dict)")
    return content
