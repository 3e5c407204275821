"""Optimizers and learning-rate schedules by name, parameter groups, and averages of weights.

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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

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

    `floor` is the factor at the end of each cosine and of linear; `milestones` are the steps at which "step" multiplies
    by `gamma`; `cycles` is how many times "cosine_restarts" falls. `parts` is as in `Optimizer`.
    """

    name: str = "constant"
    warmup: int = 0
    floor: float = 0.0
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    cycles: int | None = None
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
        if (self.name == "cosine_restarts") != (self.cycles is not None and self.cycles >= 1):
            raise ValueError(
                f"cycles, at least 1, belong to the schedule 'cosine_restarts' and to no other, "
                f"got name={self.name!r}, cycles={self.cycles}"
            )


def _constant(schedule: Schedule, step: int, steps: int) -> float:
    return 1.0


def _step(schedule: Schedule, step: int, steps: int) -> float:
    return schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)


def _cosine(schedule: Schedule, step: int, steps: int) -> float:
    return _fall(schedule, (1 + math.cos(math.pi * _progress(schedule, step, steps))) / 2)


def _cosine_restarts(schedule: Schedule, step: int, steps: int) -> float:
    if step >= steps:
        return schedule.floor
    length = _cycle_length(schedule, steps)
    return _fall(schedule, (1 + math.cos(math.pi * ((step - schedule.warmup) % length) / length)) / 2)


def _linear(schedule: Schedule, step: int, steps: int) -> float:
    return _fall(schedule, 1 - _progress(schedule, step, steps))


def _inverse_sqrt(schedule: Schedule, step: int, steps: int) -> float:
    return math.sqrt(max(schedule.warmup, 1) / (step + 1))


def _progress(schedule: Schedule, step: int, steps: int) -> float:
    return min((step - schedule.warmup) / max(steps - schedule.warmup, 1), 1.0)


def _fall(schedule: Schedule, left: float) -> float:
    return schedule.floor + (1 - schedule.floor) * left


def _cycle_length(schedule: Schedule, steps: int) -> int:
    assert schedule.cycles is not None
    return max(-(-(steps - schedule.warmup) // schedule.cycles), 1)  # rounded up: the last cycle may be the shorter


SCHEDULES: dict[str, Callable[[Schedule, int, int], float]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,  # Loshchilov and Hutter 2017, eq. 5, without restarts
    "cosine_restarts": _cosine_restarts,  # Huang et al. 2017 (snapshot ensembles), eq. 2, cycles of one length
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
    return SCHEDULES[schedule.name](schedule, step, steps)


def check_steps(schedule: Schedule, steps: int) -> None:
    """Raise a ValueError for a schedule that does not fit into a run of `steps` updates."""
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got steps={steps}")
    if schedule.warmup > steps:
        raise ValueError(
            f"schedule {schedule.name!r} warms up for {schedule.warmup} steps and the run has {steps}: "
            f"warmup must be from 0 to {steps}"
        )
    if schedule.cycles is not None and schedule.cycles > max(steps - schedule.warmup, 1):
        raise ValueError(
            f"cycles must be from 1 to {max(steps - schedule.warmup, 1)}, the steps after the warm-up, "
            f"got {schedule.cycles}"
        )


def cycle_ends(schedule: Schedule, steps: int) -> list[int]:
    """The numbers of updates after which the cycles of "cosine_restarts" are complete; none for other schedules."""
    if schedule.cycles is None:
        return []
    length = _cycle_length(schedule, steps)
    return [*range(schedule.warmup + length, steps, length), steps]


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
    """Stop gradients to every parameter under the prefixes; a prefix that matches none is a ValueError.

    The modules under them stay in evaluation mode, whatever `train()` says later: the statistics of a frozen batch norm
    do not move, and its dropout drops nothing.
    """
    for prefix in prefixes:
        for parameter in _under(dict(model.named_parameters()), prefix, "frozen").values():
            parameter.requires_grad_(False)
        for name, module in model.named_modules():
            if f"{name}.".startswith(f"{prefix}.") and not is_frozen(module):
                # A hook, because `train()` of any module above sets the mode again; it is copied with the module.
                module.register_forward_pre_hook(_stay_in_evaluation)
                module.training = False


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` keeps this module in evaluation mode."""
    return _stay_in_evaluation in module._forward_pre_hooks.values()


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but for the modules that `freeze` keeps in evaluation mode."""
    model.train()
    for module in model.modules():
        if is_frozen(module):
            module.training = False


def _stay_in_evaluation(module: nn.Module, arguments: Any) -> None:
    if module.training:
        module.training = False


def layerwise_scales(
    model: nn.Module, decay: float, layers: Sequence[str | Sequence[str]] | None = None
) -> dict[str, float]:
    """`Optimizer.scales` that train the last layer at the full rate and each one before it at `decay` times the next's.

    `layers` lists prefixes of parameter names from the input to the output, an entry of several prefixes being one
    layer; without it the layers are the direct children of the model that have parameters, in the order of their
    definition. A parameter under no layer keeps the full rate. Source: Howard and Ruder 2018 (discriminative
    fine-tuning, decay 1/2.6); Bao et al. 2022 (BEiT, 0.65 and up).
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    if layers is None:
        layers = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    scales: dict[str, float] = {}
    for depth, entry in enumerate(reversed(layers)):
        for prefix in (entry,) if isinstance(entry, str) else entry:
            _under(dict(model.named_parameters()), prefix, "layers")
            scales[prefix] = decay**depth
    return scales


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


class SWA:
    """Stochastic weight averaging: the plain mean of the weights after updates start, start + every, ...

    `module` is the copy to evaluate; until `start` it holds the current weights. torch's `AveragedModel` does the
    arithmetic. Buffers are copied, so the statistics of batch norm are those of the last weights and not of the mean:
    `recompute_batch_norm` makes them anew. Source: Izmailov et al. 2018, algorithm 1.
    """

    def __init__(self, model: nn.Module, start: int, every: int = 1):
        self.start, self.every = start, every
        self.averaged = AveragedModel(model)
        self.module = self.averaged.module.eval().requires_grad_(False)

    @property
    def count(self) -> int:
        """How many sets of weights the mean is over; 0 before `start`."""
        return int(self.averaged.n_averaged)

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step`, counted from 1."""
        if step >= self.start and (step - self.start) % self.every == 0:
            self.averaged.update_parameters(model)
        elif step < self.start:
            self.averaged.update_parameters(model)  # with a count of 0 it copies
            self.averaged.n_averaged.zero_()

    def state_dict(self) -> dict[str, int]:
        """What is not in `module`, whose weights are saved as a file of their own."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.averaged.n_averaged.fill_(state["count"])


def recompute_batch_norm(model: nn.Module, forward: Callable[[], Iterable[Any]]) -> None:
    """Give every batch norm of `model` the statistics of the passes that `forward()` runs, each counting equally.

    Iterating over `forward()` must call the model on one batch at a time. The model is in training mode meanwhile and
    in evaluation mode afterwards; modules that `freeze` keeps in evaluation mode are left as they are. Nothing is run
    where there is no batch norm with running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and not is_frozen(m)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a cumulative average
    train_mode(model)
    try:
        with torch.no_grad():
            for _ in forward():
                pass
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.eval()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _under(named: Mapping[str, nn.Parameter], prefix: str, option: str) -> dict[str, nn.Parameter]:
    """The parameters whose dotted name is `prefix` or begins with it; none is a ValueError."""
    found = {name: value for name, value in named.items() if f"{name}.".startswith(f"{prefix}.")}
    if not found:
        shown = sorted({name.rsplit(".", 1)[0] for name in named})
        raise ValueError(f"{option}: no parameter is under {prefix!r}; modules with parameters are {shown}")
    return found
