"""Settings of a training run in small groups; a configuration file writes each as a mapping."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

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


def check_same(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ValueError naming the first setting that changed since it was saved."""
    for key in sorted(saved.keys() | here.keys()):
        old, new = saved.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_same(old, new, f"{prefix}{key}.")
        elif old != new:
            raise ValueError(f"{prefix}{key} was {old!r} and is now {new!r}; start a new run to change it")
