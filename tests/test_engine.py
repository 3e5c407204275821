"""The training loop: gradients of parts, accumulation, two processes, precision, stops, logs, and the order of data."""

import functools
import gc
import itertools
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from vision3dgen import config
from vision3dgen.engine import (
    Averaging,
    Data,
    Objective,
    Optimizer,
    Penalty,
    ProcessLost,
    Record,
    Schedule,
    ShuffleSampler,
    Trainer,
    Update,
    Validation,
    best,
    latest,
    load_weights,
    read_metrics,
    to_device,
)
from vision3dgen.engine.loading import make_loader
from vision3dgen.engine.log import Log
from vision3dgen.engine.seeding import (
    mix,
    preserved_cpu_rng,
    preserved_rng,
    rng_state,
    seed_all,
    seed_cpu,
    set_rng_state,
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


class Points:
    """y = 3 x - 1 at 13 places, in double precision."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.tensor([index / 7 - 1], dtype=torch.float64)
        return {"x": x, "y": 3 * x - 1, "index": torch.tensor(index)}


class Line(nn.Module):
    """Least squares. `poison` maps a call of `loss` to a factor on its loss."""

    def __init__(self, poison: dict[int, float] | None = None):
        super().__init__()
        self.line = nn.Linear(1, 1, dtype=torch.float64)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)
        self.poison, self.calls, self.seen = poison or {}, 0, []

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        assert part == "model"
        assert self.training
        self.calls += 1
        self.seen.append(batch["index"].tolist())
        error = (self.line(batch["x"]) - batch["y"]).square().mean() * self.poison.get(self.calls, 1.0)
        return {"squared": error, "loss": 2 * error}


class Rivals(nn.Module):
    """Two parts that pull at each other: each one's loss has a gradient with respect to both."""

    parts = ("discriminator", "generator")

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.discriminator = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.generator.weight, 2.0)
        nn.init.constant_(self.discriminator.weight, 3.0)

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        trained, other = getattr(self, part), getattr(self, self.parts[self.parts.index(part) - 1])
        assert all(p.requires_grad for p in trained.parameters())
        assert not any(p.requires_grad for p in other.parameters())
        sign = 1 if part == "generator" else -1
        return {"loss": sign * self.discriminator(self.generator(batch["x"] * 0 + 1)).mean()}


SGD = Optimizer("sgd", lr=0.1)


def trainer(run: Path, model: nn.Module | None = None, *, batch_size: int = 4, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {"optimizer": SGD, "steps": 3}
    return Trainer(model or Line(), Data(Points(), batch_size), run, **(defaults | settings))


# The loop


def test_training_finds_the_line(tmp_path: Path):
    run = trainer(tmp_path, epochs=80, steps=None, optimizer=Optimizer("sgd", lr=0.2), record=Record(log_every=100))
    assert run.steps == 80 * 3  # 13 items are 3 batches of 4
    result = run.fit()
    assert result.step == 240
    assert not result.stopped_early
    assert result.checkpoint == latest(tmp_path)
    assert run.model.line.weight.item() == pytest.approx(3, abs=1e-3)
    assert run.model.line.bias.item() == pytest.approx(-1, abs=1e-3)


def test_one_update_by_hand(tmp_path: Path):
    run = trainer(tmp_path, steps=1, schedule=Schedule("constant", warmup=1))
    values = run.train_step([{"x": torch.ones(1, 1).double(), "y": torch.ones(1, 1).double(), "index": torch.ones(1)}])
    # loss = 2 (w x + b - y)^2 at w = b = 0: gradient -4 in each, its norm 4 sqrt(2)
    assert values["loss"].item() == 2
    assert values["squared"].item() == 1
    assert values["grad_norm"].item() == pytest.approx(32**0.5)
    assert run.model.line.weight.item() == pytest.approx(0.4)
    assert run.model.line.bias.item() == pytest.approx(0.4)


def test_clipping_scales_the_gradient_to_its_norm(tmp_path: Path):
    run = trainer(tmp_path, steps=1, update=Update(clip=0.5))
    values = run.train_step([{"x": torch.ones(1, 1).double(), "y": torch.ones(1, 1).double(), "index": torch.ones(1)}])
    assert values["grad_norm"].item() == pytest.approx(32**0.5)  # as it was before
    assert run.model.line.weight.item() == pytest.approx(0.1 * 0.5 / 2**0.5, rel=1e-5)


def gradients(run: Trainer, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    run.train_step(batches)
    return [parameter.grad for parameter in run.model.parameters()]


def test_accumulation_equals_the_big_batch(tmp_path: Path):
    items = [Points()[index] for index in range(6)]
    big = torch.utils.data.default_collate(items)
    small = [torch.utils.data.default_collate(items[start : start + 2]) for start in (0, 2, 4)]
    expected = gradients(trainer(tmp_path / "a"), [big])
    torch.testing.assert_close(gradients(trainer(tmp_path / "b"), small), expected, rtol=1e-14, atol=0)


def test_each_part_is_updated_alone_and_in_turn(tmp_path: Path):
    model = Rivals()
    before = [p.requires_grad for p in model.parameters()]
    run = trainer(tmp_path, model, optimizer=Optimizer("sgd", lr=0.2, parts={"discriminator": {"lr": 0.1}}))
    values = run.train_step([{"x": torch.ones(2, 1, dtype=torch.float64)}])
    # d <- 3 + 0.1 * 2 = 3.2 from the loss -d g; then g <- 2 - 0.2 * 3.2 from the loss d g
    assert model.discriminator.weight.item() == pytest.approx(3.2)
    assert model.generator.weight.item() == pytest.approx(2 - 0.64)
    assert model.discriminator.weight.grad.item() == pytest.approx(-2)  # its own step's, untouched by the generator's
    assert [p.requires_grad for p in model.parameters()] == before
    assert values["discriminator/loss"].item() == -6
    assert values["generator/loss"].item() == pytest.approx(6.4)
    assert set(values) == {f"{part}/{name}" for part in model.parts for name in ("loss", "grad_norm")}


def test_frozen_parameters_stay(tmp_path: Path):
    run = trainer(tmp_path, optimizer=Optimizer("sgd", frozen=["line.bias"]))
    run.fit()
    assert run.model.line.bias.item() == 0
    assert run.model.line.weight.item() != 0


def test_an_l2_penalty_is_weight_decay_for_sgd(tmp_path: Path):
    runs = [
        trainer(tmp_path / "decay", optimizer=Optimizer("sgd", lr=0.1, weight_decay=0.3)),
        trainer(tmp_path / "penalty", update=Update(penalty=Penalty(l2=0.3)), record=Record(log_every=1)),
        trainer(tmp_path / "neither"),
    ]
    weights = []
    for run in runs:
        run.fit()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=0)
    assert not torch.allclose(weights[0], weights[2], rtol=1e-3)
    for entry in read_metrics(tmp_path / "penalty"):
        assert entry["loss"] == pytest.approx(2 * entry["squared"] + entry["penalty"], rel=1e-6)
    assert [entry["penalty"] > 0 for entry in read_metrics(tmp_path / "penalty")] == [False, True, True]  # zeros first


def test_the_elastic_net_of_each_part_reaches_its_gradient(tmp_path: Path):
    model = Rivals()
    run = trainer(tmp_path, model, optimizer=Optimizer("sgd", lr=0.1), update=Update(penalty=Penalty(l1=0.5, l2=0.1)))
    values = run.train_step([{"x": torch.ones(2, 1, dtype=torch.float64)}])
    # d <- 3 - 0.1 (-2 + 0.5 + 0.1 * 3); then g <- 2 - 0.1 (d + 0.5 + 0.1 * 2)
    assert model.discriminator.weight.item() == pytest.approx(3.12)
    assert model.generator.weight.item() == pytest.approx(2 - 0.1 * (3.12 + 0.7))
    assert values["discriminator/penalty"].item() == pytest.approx(0.5 * 3 + 0.05 * 9)
    assert values["discriminator/loss"].item() == pytest.approx(-6 + 1.95)
    assert values["discriminator/grad_norm"].item() == pytest.approx(1.2)


def test_a_term_of_the_same_name_is_refused(tmp_path: Path):
    class Own(Line):
        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            return super().loss(batch, part) | {"penalty": torch.zeros(())}

    with pytest.raises(ValueError, match="has a term 'penalty' already"):
        trainer(tmp_path, Own(), update=Update(penalty=Penalty(l2=1.0))).fit()


def test_nothing_to_penalize_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no trained parameter has two or more dimensions"):
        trainer(tmp_path, Kink(), update=Update(penalty=Penalty(l2=1.0))).train_step([{}])


def test_statistics_of_frozen_layers_stay_through_training_and_validation(tmp_path: Path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
            self.head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()

        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            assert not any(module.training for module in self.trunk)
            assert self.head[0].training
            return {"loss": (self.head(self.trunk(batch["x"])) - batch["y"]).square().mean()}

    model = Normed()
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    run = trainer(
        tmp_path, model, steps=4, optimizer=Optimizer("sgd", frozen=["trunk"]), validation=Validation("n", every=1),
        update=Update(swa=Averaging(start=2)),
    )  # fmt: skip
    run.fit(lambda model: {"n": 1.0})
    for trained in (run.model, run.swa.module):
        for name, value in trained.trunk.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert int(trained.head[0].num_batches_tracked) > 0


def test_learning_rate_follows_the_schedule(tmp_path: Path):
    trainer(tmp_path, steps=4, schedule=Schedule("linear"), record=Record(log_every=1)).fit()
    assert [entry["lr"] for entry in read_metrics(tmp_path)] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_validation_sees_the_average_in_evaluation_mode_and_leaves_no_trace(tmp_path: Path):
    seen = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append(model)
        assert not model.training
        assert not torch.is_grad_enabled()
        random.random(), torch.rand(3)
        return {"bias": model.line.bias.item()}

    class Noisy(Line):
        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            return {"loss": super().loss(batch, part)["loss"] * torch.rand(())}

    often = trainer(tmp_path / "a", Noisy(), update=Update(ema=0.5), validation=Validation("bias", "min", every=1))
    result = often.fit(validate)
    assert [id(model) for model in seen] == [id(often.ema.module)] * 3
    assert result.best == min(entry["val/bias"] for entry in read_metrics(tmp_path / "a") if "val/bias" in entry)
    never = trainer(tmp_path / "b", Noisy(), update=Update(ema=0.5))
    never.fit()
    assert torch.equal(never.model.line.weight, often.model.line.weight)
    load_weights(loaded := Line(), result.checkpoint)
    assert loaded.line.bias.item() == result.best


@pytest.mark.parametrize("mode, scores, stops, best_step", [
    ("max", [1, 3, 2, 3, 4, 5], 4, 2),  # a tie is not better
    ("min", [5, 4, float("nan"), 3, 6, 7], 6, 4),
    ("min", [1, 2, 0, 2, 0.5, 9], 5, 3),
])  # fmt: skip
def test_early_stopping_and_the_best_checkpoint(
    tmp_path: Path, mode: str, scores: list[float], stops: int, best_step: int
):
    remaining = iter(scores)
    run = trainer(tmp_path, steps=6, validation=Validation("score", mode, every=1, patience=2), record=Record(keep=1))
    result = run.fit(lambda model: {"score": next(remaining)})
    assert (result.step, result.stopped_early) == (stops, stops < 6)
    assert result.checkpoint == best(tmp_path) == tmp_path / "checkpoints" / f"step_{best_step:08d}"
    assert result.best == scores[best_step - 1]
    again = trainer(tmp_path, steps=6, validation=Validation("score", mode, every=1, patience=2), record=Record(keep=1))
    if stops < 6:  # resuming does not forget that patience ended
        assert again.fit(lambda model: {"score": 100.0}, resume=True).step == stops


def test_a_configuration_file_builds_it(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("""
        trainer:
          steps: 3
          optimizer: {name: adam, lr: 2e-4, options: {betas: [0.0, 0.9]}, parts: {discriminator: {lr: 4e-4}}}
          schedule: {name: cosine, warmup: 1}
          update: {clip: 1, accumulate: 1, precision: fp32, ema: 0.9}
          validation: {metric: iou, mode: max, every: 2, patience: null}
          record: {log_every: 1, checkpoint_every: 2, keep: 1, tensorboard: false}
          seed: 0
    """)
    node = config.load(tmp_path / "run.yaml")["trainer"]
    run = config.construct(Trainer, node, model=Rivals(), data=Data(Points(), 4), run_dir=tmp_path)
    assert run.lrs == {"discriminator": 4e-4, "generator": 2e-4}
    assert run.update == Update(clip=1.0, ema=0.9)
    assert run.fit(lambda model: {"iou": 0.5}).step == 3
    del node["update"]["clip"]
    again = config.construct(Trainer, node, model=Rivals(), data=Data(Points(), 4), run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"update.clip was 1.0 and is now None"):
        again.fit(lambda model: {"iou": 0.5}, resume=True)


# What stops a run


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_stays(tmp_path: Path, factor: float):
    run = trainer(tmp_path, Line({3: factor}), steps=5, record=Record(checkpoint_every=2))
    with pytest.raises(FloatingPointError, match=rf"step 3: loss 'squared' is {factor}; the update was not made"):
        run.fit()
    found = latest(tmp_path)
    assert found is not None
    load_weights(kept := Line(), found)
    assert found.name == "step_00000002"
    assert torch.equal(kept.line.weight, run.model.line.weight)  # the bad update was not made


class Kink(nn.Module):
    """A finite loss with an infinite gradient in one parameter: sqrt at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Parameter(torch.ones(3))
        self.kink = nn.Parameter(torch.zeros(2))

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {"loss": self.kink.sqrt().sum() + self.fine.sum()}


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path):
    with pytest.raises(FloatingPointError, match="step 1: the gradient of 'kink' is not finite"):
        trainer(tmp_path, Kink()).fit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_later(tmp_path: Path, number: signal.Signals):
    class Preempted(Line):
        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            if self.calls == 2:
                os.kill(os.getpid(), number)
            return super().loss(batch, part)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        trainer(tmp_path / "a", Preempted(), steps=5).fit()
    assert ended.value.code == 128 + number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    found = latest(tmp_path / "a")
    assert found is not None
    assert found.name == "step_00000003"
    resumed, whole = trainer(tmp_path / "a", steps=5), trainer(tmp_path / "b", steps=5)
    assert resumed.fit(resume=True).step == 5
    whole.fit()
    assert torch.equal(resumed.model.line.weight, whole.model.line.weight)
    assert whole.model.seen[3:] == resumed.model.seen


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path):
    thread = threading.Thread(target=trainer(tmp_path).fit)
    thread.start()
    thread.join()
    assert latest(tmp_path) is not None


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="give steps or epochs, at least 1, got steps=None, epochs=None"):
        trainer(tmp_path, steps=None)
    with pytest.raises(ValueError, match="got steps=3, epochs=2"):
        trainer(tmp_path, epochs=2)
    with pytest.raises(ValueError, match=r"unknown part of the model 'generator'; choose from \['model'\]"):
        trainer(tmp_path, optimizer=Optimizer(parts={"generator": {"lr": 1.0}}))
    with pytest.raises(ValueError, match="warms up for 4 steps and the run has 3"):
        trainer(tmp_path, schedule=Schedule("cosine", warmup=4))
    with pytest.raises(ValueError, match="has 13 items, fewer than one batch of 14"):
        trainer(tmp_path, batch_size=14)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Data(Points(), 0)
    with pytest.raises(ValueError, match="go together"):
        trainer(tmp_path).fit(lambda model: {})
    with pytest.raises(ValueError, match=r"validation.metric is 'iou', but validate returned \['loss'\]"):
        trainer(tmp_path, validation=Validation("iou", every=1)).fit(lambda model: {"loss": 1.0})


def test_a_loss_without_the_key_is_named():
    class Wrong(nn.Module):
        def loss(self, batch: Any, part: str) -> dict[str, Tensor]:
            return {"total": torch.zeros(()), "per_item": torch.zeros(3)}

    with pytest.raises(ValueError, match=r"loss\(batch, part='model'\) must return .*'per_item': \(3,\)"):
        Objective(Wrong())({}, "model")


# Precision


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(tmp_path: Path):
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            out = self.layer(batch["x"].float())
            assert out.dtype == torch.bfloat16
            return {"loss": out.float().square().mean()}

    run = trainer(tmp_path, Probe(), update=Update(precision="bf16"))
    run.fit()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_fp16_scales_the_loss_and_skips_an_overflow(tmp_path: Path):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            return {"loss": (self.weight.half() * 1e-3).float().sum() * self.factor}

    model = Small()
    run = trainer(tmp_path, model, update=Update(precision="fp16"))
    model.factor = 0.5
    assert run.train_step([{}])["grad_norm"].item() == pytest.approx(5e-4, rel=1e-3)
    assert 1 - model.weight.item() == pytest.approx(5e-5, rel=5e-3)  # unscaled before the update
    before, scale = model.weight.item(), run.scaler.get_scale()
    model.factor = 1e5  # times the scale of 65536 this is beyond fp16
    run.train_step([{}])
    assert model.weight.item() == before
    assert run.scaler.get_scale() == scale / 2
    other = trainer(tmp_path, Small(), update=Update(precision="fp16"))
    other.load_state_dict(run.state_dict())
    assert other.scaler.get_scale() == scale / 2
    model.factor = float("nan")
    with pytest.raises(FloatingPointError, match="loss 'loss' is nan"):
        run.train_step([{}])


@pytest.mark.parametrize("frozen", [[], ["line.0"]])
def test_compiled_training_equals_plain_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: list[str]):
    class Normed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).double()
            nn.init.zeros_(self.line[1].weight)

        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            return {"loss": (self.line(batch["x"]) - batch["y"]).square().mean()}

    backends = []

    def eager(graph: Any, inputs: list[Tensor]) -> Any:
        backends.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=eager))
    settings = {"optimizer": Optimizer("sgd", lr=0.1, frozen=frozen), "validation": Validation("w", every=1)}
    torch.manual_seed(0)
    plain = trainer(tmp_path / "a", Normed(), **settings)
    torch.manual_seed(0)
    compiled = trainer(tmp_path / "b", Normed(), **settings, update=Update(compile=True))
    for run in (plain, compiled):
        run.fit(lambda model: {"w": model.line[1].weight.item()})
    assert len(backends) == 1  # nothing breaks the graph, and coming back from validation makes no other
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, compiled.model.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's import
def test_a_compiled_network_trains_as_a_plain_one(tmp_path: Path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1)

        def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
            return {"loss": (self.line(batch["x"].float()).tanh() - batch["y"]).square().mean()}

    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        folder = tmp_path / str(compile)
        trainer(folder, Net(), update=Update(compile=compile), record=Record(log_every=1)).fit()
        losses.append([entry["loss"] for entry in read_metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert torch._dynamo.utils.counters["inductor"]  # its compiler ran


# Two processes


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


SHARED = {"update": Update(accumulate=2, ema=0.5), "record": Record(log_every=1), "steps": 3}


def one_of_several(rank: int, port: int, folder: Path, world: int) -> None:
    """A process of a group: three steps of each model, then gradients and weights to a file."""
    torch.set_num_threads(1)
    os.environ.update(
        ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
    )  # fmt: skip
    for kind in (Line, Rivals):
        model = kind()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += rank  # DDP starts every process from the first one's weights
        name = kind.__name__
        run = trainer(folder / name, model, batch_size=2, **SHARED, validation=Validation("rank", every=1))
        run.fit(lambda model: {"rank": float(rank)})
        torch.save(outcome(run), folder / f"{name}{rank}.pt")
    torch.distributed.destroy_process_group()


def outcome(run: Trainer) -> dict[str, Any]:
    return {
        "gradients": {name: p.grad for name, p in run.model.named_parameters()},
        "weights": run.model.state_dict(),
        "average": run.ema.module.state_dict(),
        "metrics": run.metrics,
        "best": run.best,
    }


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one_with_the_combined_batch(tmp_path: Path, world: int):
    torch.multiprocessing.spawn(one_of_several, (free_port(), tmp_path, world), nprocs=world)
    for kind in (Line, Rivals):
        name = kind.__name__
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, world - 1))
        single = trainer(tmp_path / "single" / name, kind(), batch_size=2 * world, **SHARED)
        single.fit()
        expected = outcome(single)
        for what in ("gradients", "weights", "average"):
            for key, value in expected[what].items():
                assert torch.equal(first[what][key], second[what][key]), (what, key)
                torch.testing.assert_close(first[what][key], value, rtol=1e-12, atol=1e-14)
        assert first["metrics"] == second["metrics"] == {"rank": 0.0}  # the first process decides for all
        pair, alone = (
            [value for entry in read_metrics(run) for key, value in entry.items() if "loss" in key]
            for run in (tmp_path / name, tmp_path / "single" / name)
        )
        assert pair == pytest.approx(alone)


def until_lost(rank: int, port: int, folder: Path, world: int) -> None:
    """A process of a run without end; what it was told when another was gone, to a file."""
    torch.set_num_threads(1)
    os.environ.update(
        ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
    )  # fmt: skip
    run = trainer(folder / "run", batch_size=2, steps=10**6, record=Record(log_every=10, checkpoint_every=10))
    try:
        run.fit()
    except ProcessLost as error:
        (folder / f"{rank}.txt").write_text(str(error))
    os._exit(1)  # without waiting for the one that is gone


def test_a_process_that_dies_stops_the_others_and_any_number_goes_on(tmp_path: Path, capfd):
    context, port = torch.multiprocessing.get_context("spawn"), free_port()
    group = [context.Process(target=until_lost, args=(rank, port, tmp_path, 3)) for rank in range(3)]
    for process in group:
        process.start()
    began = time.monotonic()
    while latest(tmp_path / "run") is None:
        assert time.monotonic() - began < 120, "no checkpoint"
        time.sleep(0.1)
    group[1].kill()
    for process in group:
        process.join(60)
        assert not process.is_alive()
    for rank in (0, 2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert f"process {rank} of 3 lost another one" in said
        assert "is whole: resume" in said
    newest = latest(tmp_path / "run")
    step = int(newest.name.removeprefix("step_"))
    capfd.readouterr()
    alone = trainer(tmp_path / "run", batch_size=6, steps=step + 5, record=Record(log_every=1))
    assert alone.fit(resume=True).step == step + 5
    assert f"step {step} was saved by 3 process(es), this run has 1" in capfd.readouterr().out
    unbroken = trainer(tmp_path / "unbroken", batch_size=6, steps=step + 5, record=Record(log_every=10**7))
    unbroken.fit()
    for mine, other in zip(alone.model.parameters(), unbroken.model.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


# Data


def test_an_epoch_is_a_permutation_and_the_position_is_the_state():
    sampler = ShuffleSampler(13, seed=3, batch_size=4)
    draws = list(itertools.islice(sampler, 7))
    assert [draw.epoch for draw in draws] == [0, 0, 0, 1, 1, 1, 2]
    for epoch in (0, 1):
        assert sorted(sampler.order(epoch)) == list(range(13))
        drawn = [index for draw in draws if draw.epoch == epoch for index in draw.indices]
        assert drawn == sampler.order(epoch)[:12]
    assert sampler.order(0) != sampler.order(1)
    for used in range(7):
        other = ShuffleSampler(13, seed=3, batch_size=4)
        other.load_state_dict(sampler.state_dict())
        assert next(iter(other)) == draws[used]
        sampler.advance()


def test_processes_divide_the_samples_of_one():
    one = itertools.islice(ShuffleSampler(29, 1, batch_size=6), 10)
    pairs = zip(*(ShuffleSampler(29, 1, batch_size=3, rank=rank, world=2) for rank in (0, 1)))
    for whole, (left, right) in zip(one, pairs):
        assert whole.indices == left.indices + right.indices
        assert whole.epoch == left.epoch == right.epoch


def test_another_order_is_refused():
    state = ShuffleSampler(13, seed=3).state_dict()
    with pytest.raises(ValueError, match="saved with length=13, this one has length=11"):
        ShuffleSampler(11, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with seed=3, this one has seed=4"):
        ShuffleSampler(13, seed=4).load_state_dict(state)


class Dice:
    """Items that draw from each global generator."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def rolled(items: list[list[float]]) -> list[list[float]]:
    return [*items, [random.random()]]


def test_samples_do_not_depend_on_workers_or_on_what_was_drawn_before():
    def batches(workers: int, start: int) -> list[Any]:
        sampler = ShuffleSampler(7, seed=2, batch_size=2)
        for _ in range(start):
            sampler.advance()
        return list(itertools.islice(make_loader(Data(Dice(), 2, rolled, workers), sampler), 5 - start))

    before = rng_state()
    expected = batches(0, 0)
    for name in ("numpy", "torch"):  # beartype's checks draw from Python's
        assert repr(rng_state()[name]) == repr(before[name])  # the loop's own generators did not move
    drawn = [value for batch in expected for item in batch for value in (item[1:] or item)]
    assert len(set(drawn)) == len(drawn) == 5 * (2 * 3 + 1)  # two items and one collation in each batch
    random.random(), torch.rand(5)
    assert batches(0, 2) == expected[2:]
    assert batches(2, 1) == expected[1:]


class Readers:
    """Items that tell which process made them."""

    def __len__(self) -> int:
        return 97

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_outlive_a_signal_to_the_group():
    batches = iter(make_loader(Data(Readers(), 1, num_workers=1), ShuffleSampler(97)))
    worker = next(batches).item()
    assert worker != os.getpid()
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    assert {next(batches).item() for _ in range(50)} == {worker}


def test_random_states_round_trip():
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), np.random.randn(), torch.rand(()).item(), random.random()  # noqa: NPY002

    seed_all(3)
    random.gauss(0, 1), np.random.randn()  # both now hold the second of a pair  # noqa: NPY002
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    with preserved_rng():
        seed_all(4)
        assert draw() != expected
    assert draw() == expected
    set_rng_state(state)
    with preserved_cpu_rng():
        seed_cpu(5)
        first = draw()
    assert draw() == expected
    seed_cpu(5)
    assert draw() == first
    assert len({mix(0), mix(0, 0), mix(0, 1), mix(1, 0), mix(2**40, 5)}) == 5


class Pair(NamedTuple):
    left: Tensor
    right: list[Tensor]


class Mesh:
    def __init__(self, device: str = "nowhere"):
        self.device = device

    def to(self, device: torch.device) -> "Mesh":
        return Mesh(device.type)


def test_to_device_moves_all_that_moves():
    batch = {"a": torch.ones(2), "b": Pair(torch.ones(3), [torch.ones(5)]), "c": (Mesh(), "text", 3, None)}
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved["b"], Pair)
    assert [t.device.type for t in (moved["a"], moved["b"].left, moved["b"].right[0])] == ["meta"] * 3
    assert moved["c"][0].device == "meta"
    assert moved["c"][1:] == ("text", 3, None)
    assert batch["a"].device.type == "cpu"


# Logs


def test_the_log_holds_means_rates_and_each_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = trainer(tmp_path, steps=5, record=Record(log_every=2), optimizer=Optimizer("sgd", lr=1e-12))
    run.fit()
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["epoch"] for entry in entries] == [0, 1, 1]
    fields = {"step", "epoch", "loss", "squared", "grad_norm", "lr", "seconds", "samples_per_second"}
    assert all(set(entry) == fields for entry in entries)
    points = [Points()[index]["y"].square().item() for index in range(13)]  # the weights hardly move from zero
    means = [sum(points[index] for index in batch) / 4 for batch in run.model.seen]
    expected = [(means[0] + means[1]) / 2, (means[2] + means[3]) / 2, means[4]]
    assert [entry["squared"] for entry in entries] == pytest.approx(expected, rel=1e-6)
    assert all(entry["samples_per_second"] > 0 for entry in entries)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 2/5  loss ")


def test_resuming_cuts_the_log_to_the_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with Log(tmp_path, 2, 5) as log:
        log.write({"step": 3, "loss": float("nan")})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]
    path.write_text('{"step": 1}\nstep 2\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)


def test_a_log_that_cannot_be_written_names_its_file(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = Log(tmp_path / "other", 0, 5)
    log.path = tmp_path / "metrics.jsonl"
    with pytest.raises(OSError, match=r"could not append to .*metrics.jsonl: .*No space left"):
        log.write({"step": 1})


def test_tensorboard_holds_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(tmp_path, record=Record(log_every=1, tensorboard=True)).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    stored = [(event.step, event.value) for event in events.Scalars("loss")]
    assert stored == [(entry["step"], pytest.approx(entry["loss"])) for entry in read_metrics(tmp_path)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "vision3dgen\[viz\]"'):
        Log(tmp_path, 0, 5, tensorboard=True)


def test_a_terminal_gets_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("FORCE_COLOR", "1")
    trainer(tmp_path, record=Record(log_every=1)).fit()
    shown = capsys.readouterr().out
    assert "ETA" in shown
    assert "3/3" in shown
    assert "step 1/3" not in shown
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


class Pictures:
    """13 items of a megabyte."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((512, 512), float(index))}


def test_workers_keep_their_memory_and_files_over_fifty_epochs():
    process = psutil.Process()
    before = set(process.children(recursive=True))
    batches = iter(make_loader(Data(Pictures(), 4, num_workers=2), ShuffleSampler(13, batch_size=4)))

    def held() -> list[tuple[float, int]]:
        group = [process, *(child for child in process.children(recursive=True) if child not in before)]
        return [(each.memory_full_info().uss / 2**20, each.num_fds()) for each in group]

    seen = {}
    try:
        for epoch in range(1, 171):
            for _ in range(3):
                next(batches)
            if epoch in (120, 170):  # before, a worker makes its own what it shared with this process
                gc.collect()
                seen[epoch] = held()
    finally:
        batches._shutdown_workers()
    assert len(seen[120]) == len(seen[170]) >= 3
    for (memory, files), (memory_then, files_then) in zip(seen[170], seen[120]):
        assert memory - memory_then < 60  # of 600 MB that went through since
        assert files - files_then <= 8  # shared memory of batches that are under way
    gone = time.monotonic()
    while set(process.children(recursive=True)) - before and time.monotonic() - gone < 30:
        time.sleep(0.1)
    assert not set(process.children(recursive=True)) - before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_hears_of_each_epoch(num_workers):
    class Epochs(torch.utils.data.Dataset):
        epoch = -1

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.tensor([self.epoch, index])

        def set_epoch(self, epoch):
            self.epoch = epoch

    data = Data(Epochs(), batch_size=2, num_workers=num_workers)
    batches = iter(make_loader(data, ShuffleSampler(4, seed=0, batch_size=2)))
    assert [next(batches)[:, 0].tolist() for _ in range(4)] == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.slow
def test_the_other_examples_of_the_manual_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    manual = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in manual.split("```python\n")[1:]:
        exec(block.split("```")[0], namespace)
    assert set(namespace["parts"]) == {"train", "val", "test"}
    assert namespace["found"].error < 1e-4
    error = namespace["validate"](namespace["ensemble"].models[-1])["error"]
    printed = capsys.readouterr().out.splitlines()
    assert "{'4': 1.0, '2': 0.5, '0': 0.25}" in printed
    members, together = eval(printed[-3]), float(printed[-2])
    assert error == pytest.approx(members[-1], rel=1e-5)
    assert together <= sum(members) / 3


def test_the_example_of_the_manual_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    manual = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    example = manual.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(example, namespace)
    result = namespace["result"]
    assert result.step == 300
    assert result.best < 0.05
    assert capsys.readouterr().out.splitlines()[-1] == str(result)
