"""One training loop for every model of the library.

The model says what to minimize: `model.parts` names its parts, ("model",) or for a GAN ("discriminator", "generator"),
and `model.loss(batch, part=...)` returns a dict of scalars with the key "loss". Each part has an optimizer and a
schedule, and is updated in turn on the same batch. The loop knows nothing of vision.
"""

import copy
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision3dgen.engine import checkpoint
from vision3dgen.engine.faults import Fault, drawn_from, first_fault, save_fault
from vision3dgen.engine.interrupt import Interrupt
from vision3dgen.engine.loading import Data, ShuffleSampler, make_loader, to_device
from vision3dgen.engine.log import Log, Mean
from vision3dgen.engine.optim import (
    EMA,
    SWA,
    Optimizer,
    Schedule,
    build_optimizer,
    by_part,
    check_steps,
    cycle_ends,
    freeze,
    lr_factor,
    recompute_batch_norm,
    set_lr,
    train_mode,
)
from vision3dgen.engine.processes import loss_named, on_cpu
from vision3dgen.engine.seeding import mix, preserved_rng, rng_state, seed_all, set_rng_state
from vision3dgen.engine.settings import PRECISIONS, Record, Update, Validation, check_same
from vision3dgen.engine.sharding import full, gather_weights, local, scatter_state, scatter_weights, shard


class Result(NamedTuple):
    """How a run ended."""

    step: int
    stopped_early: bool
    best: float | None  # the best value of the validation metric
    checkpoint: Path  # the best one if there was validation, else the last


class Objective(nn.Module):
    """`model.loss` as a forward pass: DDP synchronizes gradients only of what goes through its own forward."""

    def __init__(self, model: nn.Module, *, compile: bool = False):
        super().__init__()
        self.model = model  # DDP looks for its parameters here
        loss: Any = model.loss
        self.loss = torch.compile(loss) if compile else loss

    def forward(self, batch: Any, part: str) -> dict[str, Tensor]:
        losses = self.loss(batch, part=part)
        if "loss" not in losses or any(value.ndim for value in losses.values()):
            got = {name: tuple(value.shape) for name, value in losses.items()}
            raise ValueError(f'loss(batch, part={part!r}) must return scalars, one of them "loss"; got shapes {got}')
        return losses


class Trainer:
    """Trains `model` on `data`, writing metrics.jsonl and checkpoints to `run_dir`.

    Give `steps`, the number of updates of each part, or `epochs`. None stands for the defaults of a group of settings,
    and for no validation.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        run_dir: str | Path,
        *,
        optimizer: Optimizer,
        steps: int | None = None,
        epochs: int | None = None,
        schedule: Schedule | None = None,
        update: Update | None = None,
        validation: Validation | None = None,
        record: Record | None = None,
        seed: int = 0,
    ):
        from accelerate import Accelerator  # slow to import

        self.model, self.data, self.run_dir, self.seed = model, data, Path(run_dir), seed
        self.parts: tuple[str, ...] = tuple(getattr(model, "parts", ("model",)))
        self.update, self.record, self.validation = update or Update(), record or Record(), validation
        optimizers, self.schedules = by_part(optimizer, self.parts), by_part(schedule or Schedule(), self.parts)
        # What must be the same for a resumed run to be the run it resumes, as it looks when read back.
        same = {"seed": seed, "update": self.update, "optimizer": optimizers, "schedule": self.schedules}
        self.settings: dict[str, Any] = json.loads(json.dumps(same, default=vars))
        del self.settings["update"]["shard"]  # how the work is divided does not change what is computed

        # Autocast and the gradient scaler are torch's: accelerate's precision is fixed for the life of a process.
        self.accelerator = Accelerator(mixed_precision="no", cpu=on_cpu())
        self.device = self.accelerator.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.update.precision == "fp16")
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.sampler = ShuffleSampler(len(data.dataset), seed, data.batch_size, rank=rank, world=world)
        self.samples_per_step = self.update.accumulate * self.sampler.stride
        self.steps = _steps(steps, epochs, self.sampler.batches_per_epoch, self.update.accumulate)
        for schedule in self.schedules.values():
            check_steps(schedule, self.steps)
        self.snapshots = {end for schedule in self.schedules.values() for end in cycle_ends(schedule, self.steps)}
        swa = self.update.swa
        if swa is not None and swa.start > self.steps:
            raise ValueError(f"swa.start is {swa.start} and the run has {self.steps} steps: nothing would be averaged")

        model.to(self.device)
        for part in self.parts:
            freeze(model, optimizers[part].frozen)
        self.whole: nn.Module | None = None  # of a sharded model: an ordinary one to gather into
        if self.update.shard is not None and world > 1:
            self._shard(self.update.shard.units, world)
        named = {part: _parameters(model, part, self.parts) for part in self.parts}
        self.optimizers = {part: build_optimizer(optimizers[part], named[part]) for part in self.parts}
        self.lrs = {part: optimizers[part].lr for part in self.parts}
        self.trained = {part: {n: p for n, p in named[part].items() if p.requires_grad} for part in self.parts}
        if self.whole is None:
            self.objectives = {part: self._objective(part) for part in self.parts}
        # After DDP gave every process the first one's weights.
        self.ema = EMA(model, self.update.ema) if self.update.ema is not None else None
        self.swa = SWA(model, swa.start, swa.every) if swa is not None else None
        self.statistics_of = 0  # how many sets of weights were averaged when batch norms were last recomputed

        self.step = 0
        self.seconds = 0.0  # of training, without validating and saving, over all starts of this run
        self.metrics: dict[str, float] = {}  # of the last validation
        self.best: float | None = None
        self.stale = 0  # validations since the best
        self.mean = Mean()

    def fit(
        self,
        validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        *,
        resume: bool = False,
        report: Callable[[Mapping[str, float]], None] | None = None,
    ) -> Result:
        """Train to the last step, or until patience ends.

        `validate(model)` returns metrics of the model in evaluation mode, the average of the weights if one is kept; it
        runs in every process and the first one's result counts (`gather_items` makes one of all). `resume` continues
        from the newest whole checkpoint of `run_dir`, or starts where there is none. SIGTERM and SIGINT save a
        checkpoint after the step under way and raise SystemExit(128 + signal); a second one acts at once. `report`
        hears each record of the log, in the first process, once the checkpoint of its step is written.
        """
        if (validate is None) != (self.validation is None):
            raise ValueError("fit(validate) and Trainer(validation=...) go together: give both or neither")
        self._start(resume)
        clock, steps_then = time.monotonic(), self.step
        train_mode(self.model)
        batches = iter(make_loader(self.data, self.sampler))
        main = self.accelerator.is_main_process
        log = Log(self.run_dir, self.step, self.steps, tensorboard=self.record.tensorboard, active=main)

        with loss_named(self._where), log, Interrupt() as interrupt:
            while self.step < self.steps and not self._out_of_patience():
                losses = self.train_step([self._next(batches) for _ in range(self.update.accumulate)])
                self.step += 1
                self.mean.add(losses)
                log.advance(self.step)

                now = time.monotonic()
                last, better = self.step == self.steps, False
                record: dict[str, float] = {}
                if last or self.step % self.record.log_every == 0:
                    self.seconds += now - clock
                    record |= self._means() | {"seconds": self.seconds}
                    record["samples_per_second"] = (self.step - steps_then) * self.samples_per_step / (now - clock)
                    clock, steps_then = now, self.step
                if self.validation and validate and (last or self.step % self.validation.every == 0):
                    better = self._validate(validate)
                    record |= {f"val/{name}": value for name, value in self.metrics.items()}
                if record:
                    record = {"step": self.step, "epoch": self.sampler.epoch} | record
                    log.write(record)

                signal_number = self._agree(interrupt.number)
                ends = last or self._out_of_patience() or signal_number
                cycle_ended = self.step in self.snapshots
                if ends or better or cycle_ended or self.step % self.record.checkpoint_every == 0:
                    self._save(better, cycle_ended)
                if record and report and main:
                    report(record)
                if signal_number:
                    if main:
                        print(f"{signal.Signals(signal_number).name}: stopped after step {self.step}, checkpoint saved")
                    raise SystemExit(128 + signal_number)
                clock += time.monotonic() - now  # validating and saving are not training

        found = checkpoint.best(self.run_dir) or checkpoint.latest(self.run_dir)
        assert found is not None
        return Result(self.step, self.step < self.steps, self.best, found)

    def _where(self) -> str:
        """Where a run that is broken off stands, and how it goes on."""
        newest = checkpoint.latest(self.run_dir)
        if newest is None:
            return f"stopped in step {self.step + 1}, before the first checkpoint"
        return f"stopped in step {self.step + 1}; {newest} is whole: resume, with any number of processes"

    def train_step(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Update every part once on the same batches; returns the losses and the norm of each part's gradient."""
        values: dict[str, Tensor] = {}
        for part in self.parts:
            with self._only(part):
                before = drawn_from()
                try:
                    losses = self._gradients(part, batches)
                    losses["grad_norm"] = self._apply(part, losses)
                except FloatingPointError as error:
                    raise self._kept(part, batches, before, str(error)) from None
                except RuntimeError as error:
                    if not torch.is_anomaly_enabled() or "returned nan values" not in str(error):
                        raise
                    raise self._kept(part, batches, before, str(error)) from None
            prefix = f"{part}/" if len(self.parts) > 1 else ""
            values |= {prefix + name: value for name, value in losses.items()}
        if self.ema:
            self.ema.update(self.model)
        if self.swa:
            self.swa.update(self.model, self.step + 1)
        return values

    @property
    def average(self) -> EMA | SWA | None:
        """The average of the weights that this run keeps."""
        return self.ema or self.swa

    def _gradients(self, part: str, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss over the batches on the part's parameters; returns the mean losses."""
        objective, precision = self.objectives[part], PRECISIONS[self.update.precision]
        self.optimizers[part].zero_grad()
        means: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            # Processes exchange gradients once, in the last backward pass.
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(objective):
                with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
                    losses = objective(to_device(batch, self.device), part)
                self.scaler.scale(losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                share = value.detach().float() / len(batches)
                means[name] = means[name] + share if name in means else share
        return means

    def _apply(self, part: str, losses: dict[str, Tensor]) -> Tensor:
        """Clip, check and apply the gradient of a part; returns its norm before clipping."""
        optimizer, parameters = self.optimizers[part], self.trained[part]
        set_lr(optimizer, self.lrs[part] * lr_factor(self.schedules[part], self.step, self.steps))
        self.scaler.unscale_(optimizer)
        if self.update.penalty is not None:
            self._penalize(part, losses)
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        norm = full(total)
        # One number tells for all of them; only when it is bad do we look for the culprit.
        if not torch.isfinite(norm + losses["loss"].to(norm.device)):
            self._explain(part, losses)
        if self.update.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.update.clip, total)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def _penalize(self, part: str, losses: dict[str, Tensor]) -> None:
        """Add the penalty on the part's weights to its loss and gradient, and a term of that name to the log."""
        penalty, weights = self.update.penalty, self.trained[part].values()
        assert penalty is not None
        if "penalty" in losses:
            raise ValueError("the model's loss has a term 'penalty' already: rename it, or leave out update.penalty")
        with torch.no_grad():
            losses["penalty"] = full(penalty.value(weights)).float()
        losses["loss"] = losses["loss"] + losses["penalty"]
        penalty.add_gradient(weights)

    def _explain(self, part: str, losses: dict[str, Tensor]) -> None:
        """Raise FloatingPointError naming the first loss, else the first gradient, that is not finite."""
        kept = f"the update was not made; checkpoints in {self.run_dir} are untouched"
        for name in sorted(losses, key="loss".__eq__):  # the terms before their sum
            if not torch.isfinite(losses[name]):
                raise FloatingPointError(f"loss {name!r} is {losses[name].item()}; {kept}")
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return  # fp16 overflows now and then: the scaler skips this update and lowers its scale
        for name, parameter in self.trained[part].items():
            if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
                raise FloatingPointError(f"the gradient of {name!r} is not finite; {kept}")
        if self.whole is not None:
            raise FloatingPointError(f"a gradient kept by another process is not finite; {kept}")
        raise FloatingPointError(f"the norm of the gradient overflows, its elements are finite; {kept}")

    def _kept(self, part: str, batches: Sequence[Any], rng: dict[str, Tensor], error: str) -> FloatingPointError:
        """The error to raise, once the step is written down: with the step and the first number that is not finite."""
        where = f"step {self.step + 1}, part {part!r}" if len(self.parts) > 1 else f"step {self.step + 1}"
        if self.whole is not None:  # no process has the whole model, nor could do the step alone
            return FloatingPointError(f"{where}: {error}")
        batches = [to_device(batch, torch.device("cpu")) for batch in batches]
        fault = Fault(self.step + 1, part, error, self.update.precision, batches, rng)
        found = first_fault(self.model, fault, self.device)
        message = f"{where}: {error}; first {found or 'of all, done again: nothing, the numbers were finite this time'}"
        if not self.accelerator.is_main_process:
            return FloatingPointError(message)
        try:
            folder = save_fault(self.run_dir, fault, self.model)
        except (OSError, RuntimeError) as failure:  # the disk may be what is wrong
            return FloatingPointError(f"{message}; its batch could not be written: {failure}")
        return FloatingPointError(f"{message}; its batch and weights are in {folder}")

    def _validate(self, validate: Callable[[nn.Module], Mapping[str, float]]) -> bool:
        """Run the validation, keep its metrics, and tell whether they are the best so far."""
        from accelerate.utils import broadcast_object_list

        assert self.validation is not None
        model = self._finished().to(self.device)
        model.eval()
        with torch.no_grad(), preserved_rng():  # so that validating more or less often trains the same weights
            metrics = {name: float(value) for name, value in validate(model).items()}
        if self.whole is not None:
            self.whole.cpu()
        train_mode(self.model)
        self.metrics = broadcast_object_list([metrics])[0]
        if self.validation.metric not in self.metrics:
            raise ValueError(
                f"validation.metric is {self.validation.metric!r}, but validate returned {sorted(self.metrics)}"
            )
        value, sign = self.metrics[self.validation.metric], 1 if self.validation.mode == "max" else -1
        better = value == value and (self.best is None or sign * value > sign * self.best)  # NaN is never better
        if better:
            self.best = value
        self.stale = 0 if better else self.stale + 1
        return better

    def _out_of_patience(self) -> bool:
        patience = self.validation.patience if self.validation else None
        return patience is not None and self.stale >= patience

    def _means(self) -> dict[str, float]:
        """Mean losses since the last log, over all processes, and the learning rate of each part."""
        means = self.mean.take()
        if self.accelerator.num_processes > 1:
            shared = self.accelerator.reduce(torch.tensor(list(means.values()), device=self.device), "mean")
            means = dict(zip(means, shared.tolist()))
        for part in self.parts:
            factor = lr_factor(self.schedules[part], self.step - 1, self.steps)
            means["lr" if len(self.parts) == 1 else f"{part}/lr"] = self.lrs[part] * factor
        return means

    def _next(self, batches: Iterator[Any]) -> Any:
        batch = next(batches)
        self.sampler.advance()
        return batch

    def _agree(self, number: int) -> int:
        """The signal any process got: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())

    def _finished(self) -> nn.Module:
        """The model to evaluate: the average of the weights if one is kept, and whole if it is sharded."""
        if self.whole is not None:
            gather_weights(self.model, self.whole)
            return self.whole
        if self.swa and self.swa.count != self.statistics_of:
            with preserved_rng():
                recompute_batch_norm(self.swa.module, self._pass_batches)
            self.statistics_of = self.swa.count
        return self.average.module if self.average else self.model

    def _pass_batches(self) -> Iterator[None]:
        """Run the same training batches through the averaged weights, one each time it is asked."""
        assert self.swa is not None
        assert self.update.swa is not None
        order = ShuffleSampler(len(self.data.dataset), mix(self.seed, 4), self.data.batch_size)
        count = min(self.update.swa.batches, order.batches_per_epoch)
        precision = PRECISIONS[self.update.precision]
        for batch in itertools.islice(make_loader(self.data, order), count):
            with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
                for part in self.parts:
                    self.swa.module.loss(to_device(batch, self.device), part=part)  # type: ignore[operator]
            yield

    def _shard(self, units: Sequence[str], world: int) -> None:
        """Cut the model up over the processes; one process alone has nothing to cut."""
        if len(self.parts) > 1:
            raise ValueError(f"shard is for models of one part, this one has {self.parts}")
        self.whole = copy.deepcopy(self.model).cpu()
        objective = Objective(self.model, compile=self.update.compile)
        shard(objective, [self.model.get_submodule(name) for name in units], self.device, world)
        self.objectives = {self.parts[0]: objective}

    def _objective(self, part: str) -> nn.Module:
        """The objective as one part's step uses it: DDP synchronizes what is trainable when it wraps."""
        with self._only(part):
            return self.accelerator.prepare_model(Objective(self.model, compile=self.update.compile))

    @contextmanager
    def _only(self, part: str) -> Iterator[None]:
        """Inside, no parameter but the part's takes a gradient."""
        mine = {id(parameter) for parameter in self.trained[part].values()}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _start(self, resume: bool) -> None:
        found = checkpoint.latest(self.run_dir)
        if found is None:
            seed_all(mix(self.seed, 3, self.accelerator.process_index))
            return
        if not resume:
            raise ValueError(
                f"{self.run_dir} holds a run (its newest checkpoint is {found.name}): resume it or move it"
            )
        state = checkpoint.load(found, self.whole or self.model, self.average.module if self.average else None)
        if self.whole is not None:
            scatter_weights(self.whole, self.model)
        try:
            self.load_state_dict(state)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"cannot resume from {found}: {error}") from error

    def _save(self, best: bool, snapshot: bool) -> None:
        finished = self._finished()
        train_mode(self.model)
        state = self.state_dict()  # gathers from all processes
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.run_dir,
                self.step,
                self.whole or self.model,
                state,
                ema=finished if self.average else None,
                metrics=self.metrics,
                best=best,
                snapshot=snapshot,
                keep=self.record.keep,
            )
        self.accelerator.wait_for_everyone()

    def state_dict(self) -> dict[str, Any]:
        """All that a run is, but for the weights and their moving average."""
        from accelerate.utils import gather_object

        return {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "best": self.best,
            "stale": self.stale,
            "optimizers": {part: full(optimizer.state_dict()) for part, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "swa": self.swa.state_dict() if self.swa else None,
            "sampler": self.sampler.state_dict(),
            "mean": gather_object([self.mean.state_dict()]),  # one for each process, as below
            "rng": gather_object([rng_state()]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; settings that would make it another run are a ValueError naming them."""
        check_same(state["settings"], self.settings)
        for part, optimizer in self.optimizers.items():
            optimizer.load_state_dict(scatter_state(state["optimizers"][part], optimizer))
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.swa:
            self.swa.load_state_dict(state["swa"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.seconds, self.metrics = state["step"], state["seconds"], state["metrics"]
        self.best, self.stale = state["best"], state["stale"]
        means, states = state["mean"], state["rng"]  # of each process; in checkpoints of schema 1 the first one's
        number, count = self.accelerator.process_index, self.accelerator.num_processes
        if len(states) == count:
            self.mean.load_state_dict(means[number] if isinstance(means, list) else means, self.device)
            set_rng_state(states[number])
            return
        seed_all(mix(self.seed, 6, self.step, number))  # the random states of others fit nobody
        if self.accelerator.is_main_process:
            print(
                f"step {self.step} was saved by {len(states)} process(es), this run has {count}: a step has "
                f"{self.samples_per_step} samples, and random numbers are drawn anew"
            )


def _parameters(model: nn.Module, part: str, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of a part under their names in the model."""
    if parts == ("model",):
        return dict(model.named_parameters())
    return dict(model.get_submodule(part).named_parameters(prefix=part))


def _steps(steps: int | None, epochs: int | None, batches_per_epoch: int, accumulate: int) -> int:
    if (steps is None) == (epochs is None) or (steps or epochs or 0) < 1:
        raise ValueError(f"give steps or epochs, at least 1, got steps={steps}, epochs={epochs}")
    return steps or max((epochs or 0) * batches_per_epoch // accumulate, 1)
