"""Diagnosis of a training: what it measures is known in advance, and it leaves no trace."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision3dgen.engine import (
    Averaging,
    Data,
    Optimizer,
    Schedule,
    Trainer,
    Update,
    initial_losses,
    loading_parts,
    loading_rate,
    memory,
    overfit,
    peak_bytes,
    range_test,
    step_rate,
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)


class Plane(nn.Module):
    """Least squares through two linear layers, with a layer that no one calls and one that is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 1)
        self.idle = nn.Linear(3, 1)
        self.cut = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.last.weight)  # so that the first gradient of all below it is zero, and later ones are not

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        x = batch["x"]
        y = self.last(self.norm(self.first(x)).relu()) + 0 * self.cut(x)
        return {"loss": (y[:, 0] - batch["y"]).square().mean()}


class Scale(nn.Module):
    """loss = (w - 1)^2: gradient descent diverges from a learning rate of 1 on, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def loss(self, batch: Any, part: str) -> dict[str, Tensor]:
        return {"loss": (self.w - 1).square() + 0 * batch["y"].sum()}


class Pair(nn.Module):
    parts = ("discriminator", "generator")

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(1, 1), nn.Linear(1, 1)

    def loss(self, batch: Any, part: str) -> dict[str, Tensor]:
        made = self.discriminator(self.generator(batch["y"][:, None])).mean()
        return {"loss": made if part == "generator" else -made}


def items(count: int = 23) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(count, 3, generator=generator)
    return [{"x": x, "y": x.sum()} for x in xs]


def batch(size: int = 7) -> dict[str, Tensor]:
    drawn = items(size)
    return {key: torch.stack([item[key] for item in drawn]) for key in ("x", "y")}


def trainer(model: nn.Module, run: Path, **settings: Any) -> Trainer:
    given: dict[str, Any] = {"optimizer": Optimizer("adam", lr=0.02), "steps": 50} | settings
    return Trainer(model, Data(items(), 7), run, **given)


def state(one: Trainer) -> list[Tensor]:
    kept = [*one.model.state_dict().values(), torch.get_rng_state()]
    if one.average:
        kept += [*one.average.module.state_dict().values(), torch.tensor(list(one.average.state_dict().values()))]
    return [tensor.clone() for tensor in kept]


def test_overfit_names_what_does_not_learn_and_only_that(tmp_path):
    found = overfit(trainer(Plane(), tmp_path), batch(), 40)
    assert found.no_gradient == ["idle.weight", "idle.bias"]
    assert found.zero_gradient == ["cut.weight"]
    assert found.unmoved == ["idle.weight", "idle.bias", "cut.weight"]
    assert len(found.losses["model"]) == 41
    assert len(found.grad_norms["model"]) == 40
    assert found.losses["model"][-1] < 0.2 * found.losses["model"][0]


def test_overfit_ignores_the_schedule_and_ends_where_the_loss_is_not_finite(tmp_path):
    held = trainer(Scale(), tmp_path, optimizer=Optimizer("sgd", lr=0.25), schedule=Schedule("constant", warmup=50))
    # w - 1 is halved by every update
    assert overfit(held, batch(), 3).losses["model"] == pytest.approx([1, 1 / 4, 1 / 16, 1 / 64])
    wild = trainer(Scale(), tmp_path, optimizer=Optimizer("sgd", lr=1e25))
    assert len(overfit(wild, batch(), 9).losses["model"]) == 1


def test_the_range_test_finds_where_gradient_descent_diverges(tmp_path):
    held = trainer(Scale(), tmp_path, optimizer=Optimizer("sgd", lr=0.1))
    found = range_test(held, itertools.repeat(batch()), low=1e-4, high=100, steps=60)
    assert found.diverged is not None
    assert 1 <= found.diverged < 10
    assert found.lrs[1] / found.lrs[0] == pytest.approx((100 / 1e-4) ** (1 / 59))
    errors = list(itertools.accumulate(found.lrs, lambda error, lr: error * (1 - 2 * lr), initial=1.0))
    assert found.losses == pytest.approx([error**2 for error in errors[:-1]], rel=1e-2, abs=1e-8)
    assert found.steepest is not None
    assert found.lowest is not None
    falls = [a**2 - b**2 for a, b in itertools.pairwise(errors)]
    assert found.steepest == pytest.approx(
        found.lrs[falls.index(max(falls))], rel=1
    )  # the smoothing is one octave wide
    assert found.steepest < found.lowest < found.diverged
    assert len(found.losses) == len(found.smoothed) == len(found.lrs) == len(found.grad_norms) < 60


def test_a_loss_that_does_not_fall_suggests_no_learning_rate(tmp_path):
    found = range_test(trainer(Scale(), tmp_path), itertools.repeat(batch()), low=1e-9, high=1e-8, steps=11)
    assert (found.steepest, found.lowest, found.diverged) == (None, None, None)


def test_a_range_test_of_two_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs one loss"):
        range_test(trainer(Pair(), tmp_path), [batch()])
    with pytest.raises(ValueError, match="0 < low < high"):
        range_test(trainer(Scale(), tmp_path), [batch()], low=1, high=0.1)
    with pytest.raises(ValueError, match="at least 2"):
        overfit(trainer(Scale(), tmp_path), batch(), 1)


def test_two_parts_have_two_curves(tmp_path):
    found = overfit(trainer(Pair(), tmp_path), batch(), 5)
    assert {part: len(values) for part, values in found.losses.items()} == {"discriminator": 6, "generator": 6}
    assert found.unmoved == found.no_gradient == []


@pytest.mark.parametrize("average", [{"ema": 0.9}, {"swa": Averaging(1)}])
@pytest.mark.parametrize("model", [Plane, Pair])
def test_no_experiment_leaves_a_trace(tmp_path, model, average):
    held = trainer(model(), tmp_path, update=Update(**average))
    held.model.eval()
    held.train_step([batch()])
    held.model.eval()
    before = state(held)
    moments = held.optimizers[held.parts[-1]].state_dict()["state"][0]["exp_avg"].clone()
    overfit(held, batch(), 3)
    memory(held, batch(), 7)
    initial_losses(held, [batch()])
    step_rate(held, batch(), most=2)
    if model is Plane:
        range_test(held, itertools.repeat(batch()), low=1e-3, high=1, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(before, state(held), strict=True))
    assert torch.equal(moments, held.optimizers[held.parts[-1]].state_dict()["state"][0]["exp_avg"])
    assert not held.model.training
    assert held.lrs == dict.fromkeys(held.parts, 0.02)
    assert held.step == 0
    assert all(parameter.grad is None for parameter in held.model.parameters())


def test_initial_losses_are_those_of_the_first_steps(tmp_path):
    held = trainer(Plane(), tmp_path)
    (loss,) = initial_losses(held, [batch()])["model"]
    assert loss == overfit(held, batch(), 2).losses["model"][0]


class Stack(nn.Module):
    """Two linear layers and a ReLU: autograd keeps the input, and once what the ReLU and the last layer share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(11, 13, bias=False), nn.Linear(13, 17, bias=False)

    def loss(self, batch: Tensor, part: str) -> dict[str, Tensor]:
        return {"loss": self.b(self.a(batch).relu()).sum()}


@pytest.mark.parametrize("size", [1, 5, 29])
def test_memory_is_what_autograd_keeps(tmp_path, size):
    found = memory(trainer(Stack(), tmp_path), torch.randn(size, 11), size)
    weights = 4 * (11 * 13 + 13 * 17)
    assert found.parameters == found.gradients == weights
    assert found.optimizer == 2 * weights + 2 * 4  # Adam's two moments, and a count for each parameter
    assert found.activations == 4 * size * (11 + 13)
    assert found.total == 4 * weights + 8 + 4 * size * 24


def test_activations_of_parts_are_not_summed(tmp_path):
    class Two(nn.Module):
        parts = ("a", "b")

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(11, 13, bias=False), nn.Linear(11, 13, bias=False)

        def loss(self, batch: Tensor, part: str) -> dict[str, Tensor]:
            return {"loss": getattr(self, part)(batch.exp()).sum()}

    assert memory(trainer(Two(), tmp_path), torch.randn(5, 11), 5).activations == 4 * 5 * 11


def test_rates_count_batches(tmp_path):
    made = []

    class Counting(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            made.append(index)
            return super().__getitem__(index)

    assert loading_rate(Data(Counting(items()), 3), workers=0, most=4) > 0
    assert len(made) == 3 * 5  # the first batch warms up
    assert loading_rate(Data(items(), 3), workers=1, most=2) > 0
    made.clear()
    parts = loading_parts(Data(Counting(items()), 3), most=2)
    assert len(set(made)) == 6  # of no item twice
    assert min(parts) > 0
    assert step_rate(trainer(Plane(), tmp_path), batch(), most=2) > 0
    assert peak_bytes(torch.device("cpu")) > 2**20
