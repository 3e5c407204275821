"""Settings of a training run in small groups; a configuration file writes each as a mapping."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision3dgen.checks import check_choice

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Penalty:
    """A term added to the loss: l1 * sum |w| + l2 / 2 * sum w^2 over weights; with both it is the elastic net.

    Weights are parameters with two or more dimensions, as for weight decay. With plain SGD, `l2` equals a
    `weight_decay` of the same value; with Adam it does not (Loshchilov and Hutter 2019).
    """

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        if not (self.l1 >= 0 and self.l2 >= 0 and self.l1 + self.l2 > 0):
            raise ValueError(f"l1 and l2 must be >= 0 and one of them > 0, got l1={self.l1}, l2={self.l2}")

    def value(self, parameters: Iterable[Tensor]) -> Tensor:
        """The term, a scalar that is differentiable in the parameters."""
        terms = [self.l1 * w.abs().sum() + self.l2 / 2 * w.square().sum() for w in parameters if w.ndim >= 2]
        if not terms:
            raise ValueError(
                "penalty: no trained parameter has two or more dimensions, so there is nothing to penalize"
            )
        return torch.stack(terms).sum()

    @torch.no_grad()
    def add_gradient(self, parameters: Iterable[Tensor]) -> None:
        """Add l1 * sign(w) + l2 * w to the gradients: exact in any precision, and whatever scales the loss."""
        for w in parameters:
            if w.ndim >= 2:
                own = self.l1 * w.sign() + self.l2 * w
                w.grad = own if w.grad is None else w.grad.add_(own)


@dataclass(frozen=True)
class Averaging:
    """Stochastic weight averaging: the mean of the weights after updates `start`, `start + every`, ... to the end.

    Before the mean is validated or saved, its batch norms get the statistics of `batches` training batches, the same
    ones each time; models without batch norm run none.
    """

    start: int
    every: int = 1
    batches: int = 100

    def __post_init__(self) -> None:
        if min(self.start, self.every, self.batches) < 1:
            raise ValueError(
                f"start, every and batches must be >= 1, got {self.start}, {self.every} and {self.batches}"
            )


@dataclass(frozen=True)
class Sharding:
    """Fully sharded data parallel training: each process keeps a part of every parameter and of its optimizer state.

    The model is gathered as a whole for each step, and let go after it. `units` names modules to gather one at a time
    instead, which saves memory; each must be used through its own `forward` only. One process alone shards nothing.
    """

    units: Sequence[str] = ()


@dataclass(frozen=True)
class Update:
    """How a gradient becomes an update.

    `clip` bounds the gradient's total norm; `accumulate` averages that many batches; `precision` is that of autocast
    (fp16 with loss scaling); `ema` is the decay of the moving average of the weights, `swa` the plain average of late
    ones, and a run keeps at most one of them; `compile` uses torch.compile; `penalty` is added to the loss; `shard`
    trains with FSDP instead of DDP.
    """

    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    ema: float | None = None
    compile: bool = False
    penalty: Penalty | None = None
    swa: Averaging | None = None
    shard: Sharding | None = None

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        if self.accumulate < 1 or (self.clip is not None and not self.clip > 0):
            raise ValueError(f"accumulate must be >= 1 and clip > 0, got {self.accumulate} and {self.clip}")
        if self.ema is not None and self.swa is not None:
            raise ValueError("ema and swa are two averages of the same weights: give one of them")
        if self.shard is not None and (self.ema is not None or self.swa is not None or self.precision == "fp16"):
            raise ValueError(
                "shard goes with precision fp32 or bf16, and without an average of the weights (ema, swa); "
                f"got precision={self.precision!r}, ema={self.ema}, swa={self.swa}"
            )


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
