"""A configured experiment: its initial loss, overfitting, learning rate, data loading, memory, normalization, maps."""

import itertools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision3dgen.backbones import Backbone
from vision3dgen.config import construct
from vision3dgen.datasets import collate
from vision3dgen.doctor.finding import Finding, Verdict
from vision3dgen.engine import (
    Data,
    Memory,
    Overfit,
    RangeTest,
    ShuffleSampler,
    Trainer,
    initial_losses,
    loading_parts,
    loading_rate,
    memory,
    overfit,
    peak_bytes,
    range_test,
    restored,
    step_rate,
    to_device,
)
from vision3dgen.engine.loading import make_loader
from vision3dgen.experiment import Experiment
from vision3dgen.layers import measure_receptive_field
from vision3dgen.viz import PALETTE, figure_of, save_figure

INITIAL_TOLERANCE = 0.5  # of the theoretical value
OVERFIT_FRACTION = 0.2  # of the initial loss
FEW_VALUES = 100  # of a channel, from which batch normalization differs by 1 % between training and evaluation
SHOWN = 6  # names of parameters in a message; all are in the values
MIB = 2**20


@runtime_checkable
class StatesInitialLoss(Protocol):
    """A model that knows what its loss should be before training, or for this batch does not: None."""

    def expected_initial_loss(self, batch: Any, /) -> float | None: ...


class Curves(NamedTuple):
    """What is drawn; None for what was not measured."""

    overfit: Overfit | None
    range: RangeTest | None
    memory: list[Memory]
    lr: float
    expected: float | None


@dataclass
class Subject:
    """An experiment under examination: what its checks share, and the curves they leave for the picture.

    small: items in the batch to overfit. steps: updates of the overfitting and the range test.
    """

    experiment: Experiment
    trainer: Trainer
    small: int = 8
    steps: int = 100
    overfit: Overfit | None = None
    range: RangeTest | None = None
    memory: tuple[Memory, ...] = ()
    expected: float | None = None

    @staticmethod
    def create(experiment: Experiment, folder: Path, *, steps: int = 100) -> "Subject":
        """Make the data if need be, the model and the trainer; nothing is written to `folder`."""
        experiment.prepare_data()
        loader = experiment.loader
        data = Data(experiment.dataset("train"), loader.batch_size, collate, loader.num_workers)
        given: dict[str, Any] = {
            "model": experiment.build_model(),
            "data": data,
            "run_dir": folder,
            "seed": experiment.seed,
        }
        trainer = construct(Trainer, experiment.trainer, where="trainer", **given)
        return Subject(experiment, trainer, small=min(8, loader.batch_size), steps=steps)

    def batches(self, batch_size: int | None = None) -> Iterator[Any]:
        """Training batches without end, in the order of a run, made in this process."""
        data = replace(self.trainer.data, num_workers=0)
        if batch_size is not None:
            data = replace(data, batch_size=batch_size)
        return iter(make_loader(data, ShuffleSampler(len(data.dataset), self.trainer.seed, data.batch_size)))

    @property
    def lr(self) -> float:
        return self.trainer.lrs[self.trainer.parts[0]]

    @property
    def curves(self) -> Curves:
        return Curves(self.overfit, self.range, list(self.memory), self.lr, self.expected)


def examine_experiment(
    experiment: Experiment, out: Path | None = None, *, device: str | None = None, steps: int = 100
) -> list[Finding]:
    """Every check of an experiment, in order; with `out`, the curves are drawn to OUT/doctor.png.

    A check that raises is a fault with the error as its message, and the others go on. The data is prepared first.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    _choose_device(device)
    subject = Subject.create(experiment, out or Path("doctor"), steps=steps)
    findings = []
    for check in TRAINING_CHECKS:
        try:
            findings += check(subject)
        except Exception as error:  # the model's and the data's own code runs here: whatever it raises is the finding
            name = check.__name__.removeprefix("check_").replace("_", " ")
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}, line {place.lineno}"
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {error}", f"look at {where}"))
    if out is not None:
        draw(subject.curves, out / "doctor.png")
        findings.append(Finding("picture", "info", str(out / "doctor.png")))
    return findings


# ------------------------------------------------------------------------------------------------------- checks


def check_model(subject: Subject) -> list[Finding]:
    model, trainer = subject.trainer.model, subject.trainer
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for part in trainer.parts for p in trainer.trained[part].values())
    parts = f", parts {', '.join(trainer.parts)}" if len(trainer.parts) > 1 else ""
    data = trainer.data
    text = (
        f"{count:,} parameters, {trained:,} of them trained{parts}, on {trainer.device}; "
        f"{len(data.dataset):,} items, batches of {data.batch_size}, {trainer.steps:,} steps"
    )
    return [Finding("experiment", "info", text, values={"parameters": count, "trained": trained})]


def check_initial_loss(subject: Subject) -> list[Finding]:
    """The mean loss over four batches against `expected_initial_loss`, where the model states it."""
    trainer = subject.trainer
    batches = list(itertools.islice(subject.batches(), 4))
    losses = {part: sum(values) / len(values) for part, values in initial_losses(trainer, batches).items()}
    values: dict[str, Any] = {"losses": losses}
    bad = [part for part, loss in losses.items() if loss != loss or abs(loss) == float("inf")]
    if bad:
        return [Finding("initial loss", "fail", f"{losses} before any update", "look for a division by 0", values)]
    shown = ", ".join(f"{loss:.4g}" + (f" ({part})" if len(losses) > 1 else "") for part, loss in losses.items())
    with restored(trainer):
        stated = [_expected(trainer.model, to_device(batch, trainer.device)) for batch in batches]
    if len(losses) > 1 or any(value is None for value in stated):
        return [Finding("initial loss", "info", f"{shown}; the model states no theoretical value", values=values)]
    (loss,) = losses.values()
    subject.expected = expected = sum(value for value in stated if value is not None) / len(stated)
    values["expected"] = expected
    text = f"{loss:.4g}, in theory {expected:.4g}"
    if abs(loss - expected) <= INITIAL_TOLERANCE * abs(expected):
        return [Finding("initial loss", "ok", text, values=values)]
    if loss > expected:
        fix = "start the last layer smaller, or look at the scale of the input"
        return [Finding("initial loss", "warn", f"{text}: the untrained model is confident and wrong", fix, values)]
    fix = "look for the target in the input, for a wrong reduction of the loss, for weights that are trained already"
    return [Finding("initial loss", "warn", f"{text}: the untrained model knows too much", fix, values)]


def check_overfitting(subject: Subject) -> list[Finding]:
    """One small batch, again and again: a model that cannot learn it by heart will learn nothing."""
    trainer = subject.trainer
    small = next(subject.batches(subject.small))
    subject.overfit = found = overfit(trainer, small, subject.steps)
    return [_judge_losses(subject, found), *_judge_parameters(found)]


def _judge_losses(subject: Subject, found: Overfit) -> Finding:
    name, what = "overfitting", f"{subject.steps} updates on one batch of {subject.small}"
    curves = {part: values for part, values in found.losses.items() if values}
    values = {"losses": found.losses, "grad_norms": found.grad_norms}
    if len(next(iter(found.losses.values()))) <= subject.steps:
        done = len(next(iter(found.losses.values())))
        fix = "lower trainer.optimizer.lr, clip with trainer.update.clip"
        return Finding(name, "fail", f"loss or gradient is not finite at update {done + 1} on one batch", fix, values)
    shown = ", ".join(f"{c[0]:.4g} -> {c[-1]:.4g}" + (f" ({p})" if len(curves) > 1 else "") for p, c in curves.items())
    if len(curves) > 1:
        return Finding(name, "info", f"{shown} in {what}; rivals have no loss that must fall", values=values)
    ((first, *_, last),) = curves.values()
    text = f"loss {shown} in {what}"
    if first <= 0:
        return Finding(name, "info" if last < first else "fail", text, values=values)
    if last <= OVERFIT_FRACTION * first:
        return Finding(name, "ok", text, values=values)
    if last <= 0.9 * first:
        fix = "more --steps; another learning rate (below); is there a floor to this loss?"
        return Finding(name, "warn", f"{text}: above {OVERFIT_FRACTION:.0%} of where it began", fix, values)
    fix = "do targets belong to their inputs, does the loss see the prediction, is the learning rate right (below)?"
    return Finding(name, "fail", f"{text}: it does not learn", fix, values)


def _judge_parameters(found: Overfit) -> list[Finding]:
    faults = []
    for names, what, fix in (
        (found.no_gradient, "get no gradient", "call them in the loss, or list them under trainer.optimizer.frozen"),
        (found.zero_gradient, "have a gradient of zero", "look for dead units, detach(), a factor of zero"),
        (
            sorted(set(found.unmoved) - set(found.no_gradient) - set(found.zero_gradient)),
            "did not move",
            "is the learning rate too small for the precision of the weights?",
        ),
    ):
        if names:
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            text = f"{len(names)} parameters {what}: {shown}"
            faults.append(Finding("gradients", "warn", text, fix, {"names": names}))
    return faults or [Finding("gradients", "ok", "every trained parameter has a gradient and moves")]


def check_learning_rate(subject: Subject) -> list[Finding]:
    """The configured learning rate against a range test."""
    name, trainer = "learning rate", subject.trainer
    if len(trainer.parts) > 1:
        return [Finding(name, "info", f"no range test: {' and '.join(trainer.parts)} have no one loss that falls")]
    subject.range = found = range_test(trainer, subject.batches(), steps=subject.steps)
    values = found._asdict() | {"configured": subject.lr}
    ends = f"diverges at {found.diverged:.2g}" if found.diverged else "does not diverge up to 10"
    if found.steepest is None or found.lowest is None:
        text = f"the loss falls at no learning rate and {ends}; configured is {subject.lr:.2g}"
        return [Finding(name, "warn", text, "more --steps; then look at overfitting above", values)]
    text = (
        f"the loss falls fastest at {found.steepest:.2g}, is lowest at {found.lowest:.2g} and {ends}; "
        f"configured is {subject.lr:.2g}"
    )
    verdict: Verdict = "ok"
    if found.diverged and subject.lr >= found.diverged:
        verdict = "fail"
    elif subject.lr > 3 * found.lowest or subject.lr < found.steepest / 30:
        verdict = "warn"
    fix = None if verdict == "ok" else f"trainer.optimizer.lr={found.steepest:.1g}"
    return [Finding(name, verdict, text, fix, values)]


def check_data_loading(subject: Subject) -> list[Finding]:
    """Who waits for whom: items per second of the loader against those of the training step, and what is slowest."""
    trainer, workers = subject.trainer, subject.trainer.data.num_workers
    size = trainer.data.batch_size
    counts = sorted({0, 1, 2, workers})
    rates = {count: size * loading_rate(trainer.data, workers=count, seed=count) for count in counts}
    step = size * step_rate(trainer, next(subject.batches()))
    parts = loading_parts(trainer.data, seed=max(counts) + 1)
    loader = ", ".join(f"{rate:.0f} with {count or 'no'} worker{'s' * (count != 1)}" for count, rate in rates.items())
    text = f"items/s: the loader {loader}; training {step:.0f}"
    values = {"loader": rates, "training": step, "read": parts.read, "join": parts.join}
    each = f"an item takes {1000 * parts.read:.2f} ms to read and {1000 * parts.join:.2f} ms to join"
    if rates[workers] >= step:
        found = f"{text}: the loader waits for training\nthe bottleneck is the training step; {each}"
        return [Finding("data loading", "ok", found, values=values)]
    slowest = "reading items" if parts.read >= parts.join else "joining them into batches"
    found = f"{text}: training waits for the loader\nthe bottleneck is {slowest}; {each}"
    enough = min(-(-step // rates[0]), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    more = max(int(enough), 1)
    fix = "smaller pictures or packed data (vision3dgen pack); more workers do not help"
    if more > workers and rates.get(more, max(rates.values())) > rates[workers]:
        fix = f"loader.num_workers={more}"
    return [Finding("data loading", "warn", found, fix, values)]


def check_memory(subject: Subject) -> list[Finding]:
    """Measured at two batch sizes; activations grow linearly between and beyond."""
    trainer, size = subject.trainer, subject.trainer.data.batch_size
    sizes = sorted({min(2, size), size})
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    subject.memory = found = tuple(memory(trainer, next(subject.batches(each)), each) for each in sizes)
    last = found[-1]
    per_item = (last.activations - found[0].activations) / max(last.batch_size - found[0].batch_size, 1)
    fixed = last.total - last.activations
    free = _free_bytes(trainer.device)
    rows = [
        f"parameters {_mib(last.parameters)}, buffers {_mib(last.buffers)}, gradients {_mib(last.gradients)}, "
        f"optimizer {_mib(last.optimizer)}, activations {_mib(last.activations)}: {_mib(last.total)} MiB "
        f"at batch size {size}"
    ]
    values: dict[str, Any] = {"measured": [each._asdict() for each in found], "free": free}
    verdict: Verdict = "ok" if last.total < free else "warn"
    if per_item > 0:
        table = [(each, int(last.total + (each - size) * per_item)) for each in (size // 2, 2 * size, 4 * size) if each]
        rows.append("; ".join(f"batch size {each}: about {_mib(total)} MiB" for each, total in table))
        fits = max(int((free - fixed - last.activations + size * per_item) / per_item), 0)
        rows.append(
            f"{_mib(free)} MiB are free: by this count batches up to about {fits} fit, less what operators need"
        )
        values |= {"bytes_per_item": per_item, "largest_batch": fits}
    rows.append(f"most so far: {_mib(peak_bytes(trainer.device))} MiB {_PEAK[trainer.device.type]}")
    fix = None if verdict == "ok" else "smaller loader.batch_size with trainer.update.accumulate, or precision: bf16"
    return [Finding("memory", verdict, "\n".join(rows), fix, values)]


def check_receptive_field(subject: Subject) -> list[Finding]:
    """Size, stride and receptive field of each map of the backbone, at the size of the training images."""
    model = subject.trainer.model
    backbone = next((module for module in model.modules() if isinstance(module, Backbone)), None)
    batch = next(subject.batches(1)) if backbone is not None else {}
    if backbone is None or "image" not in batch:
        return [Finding("receptive field", "info", "the model has no backbone that takes images")]
    sides = tuple(batch["image"].shape[2:])
    reaches = measure_receptive_field(backbone, sides, channels=backbone.in_channels)
    rows = [f"of the {len(reaches)} maps of {type(backbone).__name__} from images of {_by(sides)}"]
    for reach, channels, stride in zip(reaches, backbone.channels, backbone.strides):
        cut = "" if all(reach.complete) else ", cut off by the border"
        rows.append(
            f"stride {stride:2}: {channels:4} channels, {_by(reach.size):7} places, field {_by(reach.field)}{cut}"
        )
    values = {"maps": [reach._asdict() | {"field": reach.field} for reach in reaches]}
    return [Finding("receptive field", "info", "\n".join(rows), values=values)]


def check_normalization(subject: Subject) -> list[Finding]:
    """Values of a channel that each batch normalization sees in a training batch.

    Training divides by their variance, evaluation by a running one of n - 1 in the denominator (torch.nn.BatchNorm2d):
    of few values, the two networks differ, and what training shows is not what evaluation gets.
    """
    trainer, name = subject.trainer, "normalization"
    counts: dict[str, int] = {}

    def count(layer: str, module: nn.Module, x: Tensor) -> None:
        if module.training:  # frozen ones use their running statistics in training too
            counts[layer] = min(x.numel() // max(x.shape[1], 1), counts.get(layer, x.numel()))

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, layer=layer: count(layer, module, inputs[0]))
        for layer, module in trainer.model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    try:
        if hooks:
            initial_losses(trainer, [next(subject.batches())])
    finally:
        for hook in hooks:
            hook.remove()
    if not counts:
        return [Finding(name, "info", "no layer keeps statistics of its batches")]
    least = min(counts, key=lambda layer: counts[layer])
    few = [layer for layer, values in counts.items() if values < FEW_VALUES]
    text = f"{len(counts)} layers keep statistics of batches, of {counts[least]:,} values a channel or more ({least})"
    if not few:
        return [Finding(name, "ok", text, values={"values": counts})]
    more = counts[least] / max(counts[least] - 1, 1) - 1
    text += f"\n{len(few)} of fewer than {FEW_VALUES}: in evaluation variances are up to {more:.1%} larger"
    fix = "larger batches or images, finer last maps (stem: small, dilated), or a normalization without batches"
    return [Finding(name, "warn", text, fix, {"values": counts})]


TRAINING_CHECKS: list[Callable[[Subject], list[Finding]]] = [
    check_model,
    check_initial_loss,
    check_overfitting,
    check_learning_rate,
    check_data_loading,
    check_memory,
    check_normalization,
    check_receptive_field,
]

_PEAK = {"cuda": "allocated on the device", "cpu": "resident in this process"}


# ------------------------------------------------------------------------------------------------------ picture


def draw(curves: Curves, path: Path) -> None:
    """Loss and gradient norm on one batch, loss against the learning rate, memory against the batch size."""
    figure, axes = figure_of(4)
    loss, norm, rate, held = axes
    if curves.overfit:
        for index, part in enumerate(curves.overfit.losses):
            label = part if len(curves.overfit.losses) > 1 else None
            loss.plot(curves.overfit.losses[part], color=PALETTE[index], label=label)
            norm.plot(curves.overfit.grad_norms[part], color=PALETTE[index])
        if min(min(values, default=0) for values in curves.overfit.losses.values()) > 0:
            loss.set_yscale("log")
        norm.set_yscale("log")
        if curves.expected is not None:
            loss.axhline(curves.expected, color=PALETTE[2], linestyle=":", label="initial loss in theory")
        if loss.get_legend_handles_labels()[0]:
            loss.legend(framealpha=0.8, edgecolor="none", fontsize=8)
    loss.set(title="Loss on one batch", xlabel="update")
    norm.set(title="Gradient norm on one batch", xlabel="update")
    if curves.range:
        rate.plot(curves.range.lrs, curves.range.losses, color=PALETTE[0], alpha=0.3, linewidth=0.8)
        rate.plot(curves.range.lrs, curves.range.smoothed, color=PALETTE[0])
        marks = (("configured", curves.lr), ("steepest", curves.range.steepest), ("diverged", curves.range.diverged))
        for index, (label, at) in enumerate(marks, start=1):
            if at is not None:
                rate.axvline(at, color=PALETTE[index], linestyle="--", label=f"{label} {at:.2g}")
        rate.set_xscale("log")
        top = 1.5 * max(curves.range.smoothed[: max(len(curves.range.smoothed) * 3 // 4, 1)])
        if min(curves.range.losses) >= 0:
            rate.set_ylim(0, top)
        rate.legend(framealpha=0.8, edgecolor="none", fontsize=8, loc="upper left")
    rate.set(title="Loss while the rate grows", xlabel="learning rate")
    if curves.memory:
        last, first = curves.memory[-1], curves.memory[0]
        slope = (last.activations - first.activations) / max(last.batch_size - first.batch_size, 1)
        sizes = [0, 4 * last.batch_size]
        level = 0.0
        for index, key in enumerate(("parameters", "gradients", "optimizer", "activations")):
            amount = getattr(last, key) / MIB
            grown = [
                amount + (size - last.batch_size) * slope / MIB if key == "activations" else amount for size in sizes
            ]
            held.fill_between(
                sizes, level, [level + each for each in grown], color=PALETTE[index], alpha=0.7, label=key
            )
            level += amount
        held.axvline(last.batch_size, color="black", linestyle=":", linewidth=1)
        held.legend(framealpha=0.8, edgecolor="none", fontsize=8, loc="upper left")
        held.set_xlim(0, sizes[1])
        held.set_ylim(bottom=0)
    held.set(title="Memory (MiB)", xlabel="batch size")
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------------------- pieces


def _expected(model: nn.Module, batch: Any) -> float | None:
    return model.expected_initial_loss(batch) if isinstance(model, StatesInitialLoss) else None


def _choose_device(device: str | None) -> None:
    """Make accelerate, which places a trainer, take this device."""
    if device is None:
        return
    kind, _, index = device.partition(":")
    if kind == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif kind == "cuda" and int(index or 0) < torch.cuda.device_count():
        torch.cuda.set_device(int(index or 0))
    else:
        raise ValueError(f"device must be cpu, or cuda or cuda:N where there is one, got {device!r}")


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _mib(count: float) -> str:
    return f"{count / MIB:,.0f}" if count >= 10 * MIB else f"{count / MIB:.1f}"
