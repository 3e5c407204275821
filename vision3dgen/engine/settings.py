"""Settings of a training run: small groups, made from the plain dicts of a configuration file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable

from vision3dgen.checks import check_choice

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """How a gradient becomes an update.

    `clip` bounds the gradient's total norm; `accumulate` averages that many batches; `precision` is that of autocast
    (fp16 with loss scaling); `ema` is the decay of the moving average of the weights; `compile` uses torch.compile.
    """

    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    ema: float | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        if self.accumulate < 1 or (self.clip is not None and not self.clip > 0):
            raise ValueError(f"accumulate must be >= 1 and clip > 0, got {self.accumulate} and {self.clip}")


@dataclass(frozen=True)
class Validation:
    """Every how many steps to validate, and which of the metrics tells the best checkpoint.

    Training stops after `patience` validations in a row without a better one; None never stops.
    """

    metric: str
    mode: str = "max"
    every: int = 200
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("max", "min"))
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"every and patience must be >= 1, got {self.every} and {self.patience}")


@dataclass(frozen=True)
class Record:
    """Every how many steps to log and to save, how many checkpoints to keep beside the best, and TensorBoard."""

    log_every: int = 20
    checkpoint_every: int = 200
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if min(self.log_every, self.checkpoint_every, self.keep) < 1:
            raise ValueError(
                "log_every, checkpoint_every and keep must be >= 1, "
                f"got {self.log_every}, {self.checkpoint_every} and {self.keep}"
            )


T = TypeVar("T")


def from_plain(kind: type[T], value: T | Mapping[str, Any] | None, name: str) -> T:
    """A settings dataclass from the plain dict of a configuration file; `name` is its key there.

    A value that is one already is returned; None gives the defaults. An unknown key, a missing one and a value of the
    wrong type are ValueErrors that name the key.
    """
    if isinstance(value, kind):
        return value
    types: dict[str, Any] = {entry.name: entry.type for entry in fields(kind)}  # type: ignore[arg-type]
    if not (value is None or isinstance(value, Mapping)):
        raise ValueError(f"{name} must have the keys {sorted(types)}, got {value!r}")
    options = dict(value or {})
    for key, option in options.items():
        check_choice(f"key of {name}", key, types)
        if not is_bearable(option, types[key], conf=BeartypeConf(is_pep484_tower=True)):
            raise ValueError(f"{name}.{key} must be {getattr(types[key], '__name__', types[key])}, got {option!r}")
        if isinstance(option, int) and not is_bearable(option, types[key]):
            options[key] = float(option)
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def per_part(kind: type[Any], value: Any, name: str, parts: tuple[str, ...]) -> dict[str, Any]:
    """Settings for each part, from one for all or from a dict with a key per part."""
    if isinstance(value, Mapping) and set(value) == set(parts):
        return {part: from_plain(kind, value[part], f"{name}.{part}") for part in parts}
    return dict.fromkeys(parts, from_plain(kind, value, name))


def check_same(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ValueError naming the first setting that changed since it was saved."""
    for key in sorted(saved.keys() | here.keys()):
        old, new = saved.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_same(old, new, f"{prefix}{key}.")
        elif old != new:
            raise ValueError(f"{prefix}{key} was {old!r} and is now {new!r}; start a new run to change it")
