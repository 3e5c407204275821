"""Checkpoints that are either whole or not there.

    RUN/checkpoints/step_00000200/
        model.safetensors   weights
        ema.safetensors     their average, moving (EMA) or plain (SWA), where there is one
        state.pt            optimizers, random states, data order, counters; loads with `weights_only=True`
        meta.json           schema, step, metrics, whether it was the best so far or ended a cycle of the schedule,
                            size and SHA-256 of the other files

A checkpoint is written to a hidden folder beside, synced to disk, and renamed: a write that is killed or runs out of
space leaves the earlier ones as they were. What is damaged afterwards is found by size and hash, and named.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from vision3dgen import __version__

SCHEMA = 2  # raised when the files or keys of a checkpoint change
READABLE = (1, 2)  # 1 had no snapshots, and the running means of the first process only; `verify` refuses the others


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another model; the message names the file and the reason."""


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    ema: nn.Module | None = None,
    metrics: Mapping[str, float] | None = None,
    best: bool = False,
    snapshot: bool = False,
    keep: int = 2,
) -> Path:
    """Write one checkpoint, then delete old ones; returns its folder.

    The newest `keep` stay, the newest marked `best`, and all marked `snapshot`.

    `state` must be made of tensors, numbers, strings, dicts, lists and tuples. A failed write raises OSError naming the
    folder and leaves every earlier checkpoint in place.
    """
    folder = _folder(run_dir) / f"step_{step:08d}"
    partial = folder.with_name(f".partial_{folder.name}")
    _remove_leftovers(run_dir)
    try:
        partial.mkdir(parents=True)
        save_model(model, str(partial / "model.safetensors"))
        if ema is not None:
            save_model(ema, str(partial / "ema.safetensors"))
        with open(partial / "state.pt", "wb") as file:
            torch.save(dict(state), file)
        meta = {
            "schema": SCHEMA,
            "vision3dgen": __version__,
            "torch": str(torch.__version__),
            "step": step,
            "best": best,
            "snapshot": snapshot,
            "metrics": {name: value if math.isfinite(value) else None for name, value in (metrics or {}).items()},
            "files": {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in partial.iterdir()},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        if folder.exists():  # only a damaged one, passed over when this run was resumed
            folder.rename(folder.with_name(f"{partial.name}_replaced"))
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        shutil.rmtree(partial, ignore_errors=True)  # give the space back; what cannot be removed now is a leftover
        number = error.errno if isinstance(error, OSError) else None
        message = f"could not write checkpoint {folder} (earlier checkpoints are intact): {error}"
        raise OSError(number, message) from error
    _remove_leftovers(run_dir)
    _prune(run_dir, keep)
    return folder


def verify(folder: Path) -> dict[str, Any]:
    """The content of meta.json, once every file is known to be whole; raises CheckpointError otherwise."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        schema, files = meta["schema"], meta["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no meta.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'meta.json'} is damaged: {error!r}") from error
    if schema not in READABLE:
        raise CheckpointError(f"{folder} has checkpoint schema {schema!r}; vision3dgen {__version__} reads {READABLE}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes of {expected['size']}")
        if sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded when it was written")
    return meta


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if it never wrote one.

    A damaged one is passed over with a warning; if all are damaged, that is a CheckpointError.
    """
    return _whole(run_dir, best=False)


def best(run_dir: Path) -> Path | None:
    """The whole checkpoint with the best validation metric, None if the run marked none."""
    return _whole(run_dir, best=True)


def snapshots(run_dir: Path) -> list[Path]:
    """The whole checkpoints that end a cycle of the schedule, oldest first; a damaged one is a CheckpointError."""
    return [folder for folder in reversed(_newest_first(run_dir)) if verify(folder).get("snapshot", False)]


def load_weights(model: nn.Module, folder: Path, *, ema: bool = True) -> dict[str, Any]:
    """Load a checkpoint's weights in place and return its meta.json; `ema` takes the moving average where there is one.

    Raises CheckpointError if a file is damaged or its names and shapes are not the model's.
    """
    meta = verify(folder)
    name = "ema.safetensors" if ema and "ema.safetensors" in meta["files"] else "model.safetensors"
    load_file(model, folder / name)
    return meta


def load(folder: Path, model: nn.Module, ema: nn.Module | None = None) -> dict[str, Any]:
    """Load the weights of a checkpoint in place, the moving average too if there is one, and return its state."""
    meta = verify(folder)
    if (ema is not None) != ("ema.safetensors" in meta["files"]):
        has, wants = ("no", "one") if ema is not None else ("a", "none")
        raise CheckpointError(f"{folder} has {has} moving average of the weights and this run keeps {wants}")
    load_file(model, folder / "model.safetensors")
    if ema is not None:
        load_file(ema, folder / "ema.safetensors")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def load_file(model: nn.Module, path: Path) -> None:
    """Load a safetensors file in place; a CheckpointError names the file that is damaged, or of another model."""
    try:
        load_model(model, path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except RuntimeError as error:  # torch's list of missing, unexpected and misshapen names
        raise CheckpointError(f"{path} is not of this model: {error}") from error


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _newest_first(run_dir: Path) -> list[Path]:
    return sorted(_folder(run_dir).glob("step_*"), reverse=True)


def _whole(run_dir: Path, *, best: bool) -> Path | None:
    damaged, whole = [], 0
    for folder in _newest_first(run_dir):
        try:
            marked = verify(folder)["best"]
        except CheckpointError as error:
            damaged.append(str(error))
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=3)
            continue
        if marked or not best:
            return folder
        whole += 1
    if damaged and not whole:
        raise CheckpointError(f"no whole checkpoint in {_folder(run_dir)}: {'; '.join(damaged)}")
    return None


def _prune(run_dir: Path, keep: int) -> None:
    """Delete old checkpoints; their metadata is trusted here, hashing them all at each save would be slow."""
    kept_best = False
    for age, folder in enumerate(_newest_first(run_dir)):
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            marked, snapshot = meta["best"], meta.get("snapshot", False)
        except (OSError, ValueError, KeyError):
            continue  # damaged: `latest` names it, and a person decides
        if age < keep or snapshot or (marked and not kept_best):
            kept_best = kept_best or marked
            continue
        doomed = folder.with_name(
            f".partial_{folder.name}_old"
        )  # renamed first: a half-deleted one must not look whole
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _remove_leftovers(run_dir: Path) -> None:
    for leftover in _folder(run_dir).glob(".partial_*"):
        shutil.rmtree(leftover)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
