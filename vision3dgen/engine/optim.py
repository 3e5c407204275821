"""Optimizers and learning-rate schedules by name, parameter groups, and the moving average of weights.

Learning rate of a parameter at a step = lr * scale of its longest matching prefix * `lr_factor(schedule, step, steps)`.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vision3dgen.checks import check_choice

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Optimizer:
    """Which optimizer, and how it treats each parameter.

    `options` are torch's own keywords (`betas`, `eps`, `momentum`, ...). `scales` maps a prefix of parameter names to a
    factor on the learning rate, the longest matching prefix winning; `frozen` lists prefixes that are not trained. A
    prefix ends at a dot: "layer1" matches "layer1.weight" and not "layer10.weight". Norms and biases, that is every
    parameter with fewer than two dimensions, get no weight decay. `parts` maps a part of the model to what is different
    for it, as in `{"discriminator": {"lr": 4e-4}}`.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    frozen: Sequence[str] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("optimizer", self.name, OPTIMIZERS)
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"lr must be > 0 and weight_decay >= 0, got lr={self.lr}, weight_decay={self.weight_decay}"
            )


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves: `warmup` steps up to 1, then the named curve.

    `floor` is the factor at the end of cosine and linear; `milestones` are the steps at which "step" multiplies by
    `gamma`. `parts` is as in `Optimizer`.
    """

    name: str = "constant"
    warmup: int = 0
    floor: float = 0.0
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("schedule", self.name, SCHEDULES)
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")
        if (self.name == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones belong to the schedule 'step' and to no other, "
                f"got name={self.name!r}, milestones={list(self.milestones)}"
            )


def _constant(schedule: Schedule, step: int, progress: float) -> float:
    return 1.0


def _step(schedule: Schedule, step: int, progress: float) -> float:
    return schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)


def _cosine(schedule: Schedule, step: int, progress: float) -> float:
    return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * progress)) / 2


def _linear(schedule: Schedule, step: int, progress: float) -> float:
    return schedule.floor + (1 - schedule.floor) * (1 - progress)


def _inverse_sqrt(schedule: Schedule, step: int, progress: float) -> float:
    return math.sqrt(max(schedule.warmup, 1) / (step + 1))


SCHEDULES: dict[str, Callable[[Schedule, int, float], float]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,  # Loshchilov and Hutter 2017, eq. 5, without restarts
    "linear": _linear,
    "inverse_sqrt": _inverse_sqrt,  # Vaswani et al. 2017, eq. 3, scaled to 1 at the end of the warm-up
}


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor on the learning rate in update number `step`, from 0 to `steps - 1`.

    The first update of a warm-up of w has factor 1/w, its last 1. Cosine and linear reach `floor` at `steps`, one
    update after the last.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    progress = min((step - schedule.warmup) / max(steps - schedule.warmup, 1), 1.0)
    return SCHEDULES[schedule.name](schedule, step, progress)


Settings = TypeVar("Settings", Optimizer, Schedule)


def by_part(settings: Settings, parts: Iterable[str]) -> dict[str, Settings]:
    """The settings of each part of a model: those of all, changed by its entry in `settings.parts`."""
    parts = tuple(dict.fromkeys(parts))
    for part, own in settings.parts.items():
        check_choice("part of the model", part, parts)
        for key in own:
            check_choice(
                f"key of parts.{part}", key, [entry.name for entry in fields(settings) if entry.name != "parts"]
            )
    return {part: replace(settings, parts={}, **settings.parts.get(part, {})) for part in parts}


def freeze(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Stop gradients to every parameter under the prefixes; a prefix that matches none is a ValueError."""
    for prefix in prefixes:
        for parameter in _under(dict(model.named_parameters()), prefix, "frozen").values():
            parameter.requires_grad_(False)


def build_optimizer(settings: Optimizer, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer over the trainable ones of `named`, grouped by learning rate and by weight decay."""
    scale_of = dict.fromkeys(named, 1.0)
    for prefix in sorted(settings.scales, key=len):  # the longest prefix is written last
        scale_of |= dict.fromkeys(_under(named, prefix, "scales"), float(settings.scales[prefix]))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            groups.setdefault((scale_of[name], parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise ValueError(f"nothing to train: every one of the {len(named)} parameters is frozen")
    torch_groups = [
        {"params": parameters, "scale": scale, "weight_decay": settings.weight_decay if decays else 0.0}
        for (scale, decays), parameters in groups.items()
    ]
    try:
        return OPTIMIZERS[settings.name](torch_groups, lr=settings.lr, **settings.options)
    except TypeError as error:
        raise ValueError(f"options {dict(settings.options)} do not fit optimizer {settings.name!r}: {error}") from error


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its scale.

    Differs: torch's LambdaLR keeps a count of its own, which falls behind when mixed precision skips an update; here
    the learning rate is a function of the step and there is nothing to save.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


class EMA:
    """Exponential moving average of a model's parameters and buffers: `module` is a copy to evaluate, not to train.

    average = d * average + (1 - d) * value with d = min(decay, (1 + t) / (10 + t)) at update t from 0, so that a short
    run is not an average of its initial weights. Integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the moving average must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, int]:
        """What is not in `module`, whose weights are saved as a file of their own."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _under(named: Mapping[str, nn.Parameter], prefix: str, option: str) -> dict[str, nn.Parameter]:
    """The parameters whose dotted name is `prefix` or begins with it; none is a ValueError."""
    found = {name: value for name, value in named.items() if f"{name}.".startswith(f"{prefix}.")}
    if not found:
        shown = sorted({name.rsplit(".", 1)[0] for name in named})
        raise ValueError(f"{option}: no parameter is under {prefix!r}; modules with parameters are {shown}")
    return found
