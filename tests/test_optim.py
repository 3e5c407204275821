"""Optimizers, parameter groups, schedules and the moving average, against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

from vision3dgen.engine.optim import (
    EMA,
    OPTIMIZERS,
    SCHEDULES,
    Optimizer,
    Schedule,
    build_optimizer,
    by_part,
    freeze,
    lr_factor,
    set_lr,
)
from vision3dgen.engine.settings import Record, Update, Validation, check_same


def factors(schedule: Schedule, steps: int, count: int) -> list[float]:
    return [lr_factor(schedule, step, steps) for step in range(count)]


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule("constant"), [1, 1, 1, 1, 1, 1]),
        (Schedule("constant", warmup=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Schedule("step", milestones=[2, 5]), [1, 1, 0.1, 0.1, 0.1, 0.01]),
        (Schedule("step", milestones=[3], gamma=0.5, warmup=2), [0.5, 1, 1, 0.5, 0.5, 0.5]),
        (Schedule("cosine"), [1, (2 + HALF * 2) / 4, 0.5, (2 - HALF * 2) / 4, 0, 0]),  # steps = 4, so 0 from 4 on
        (Schedule("cosine", floor=0.2), [1, 0.2 + 0.8 * (2 + HALF * 2) / 4, 0.6, 0.2 + 0.8 * (2 - HALF * 2) / 4, 0.2]),
        (Schedule("cosine", warmup=2), [0.5, 1, 1, 0.5, 0, 0]),
        (Schedule("linear"), [1, 0.75, 0.5, 0.25, 0, 0]),
        (Schedule("linear", warmup=2, floor=0.5), [0.5, 1, 1, 0.75, 0.5]),
        (Schedule("inverse_sqrt"), [1, HALF, 3**-0.5, 0.5]),
        (Schedule("inverse_sqrt", warmup=2), [0.5, 1, (2 / 3) ** 0.5, HALF, (2 / 5) ** 0.5]),
    ],
    ids=repr,
)
def test_schedule_values(schedule: Schedule, expected: list[float]):
    assert factors(schedule, 4, len(expected)) == pytest.approx(expected, abs=1e-15)


def test_every_schedule_is_tested_above_and_joins_its_warmup():
    for name in SCHEDULES:
        schedule = Schedule(name, warmup=7, milestones=[11] if name == "step" else ())
        values = factors(schedule, 23, 23)
        assert values[:7] == pytest.approx([(step + 1) / 7 for step in range(7)])
        assert values[7] == pytest.approx(1, abs=0.07)
        assert values[6:] == sorted(values[6:], reverse=True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


# One update from w = 2 with gradient 3, lr 0.1, no decay; the second update has the same gradient.
HAND_WRITTEN = {
    "sgd": [1.7, 1.4],
    "momentum": [1.7, 1.7 - 0.1 * (0.9 * 3 + 3)],
    "nesterov": [2 - 0.1 * (3 + 0.9 * 3), 2 - 0.57 - 0.1 * (3 + 0.9 * 5.7)],
    "adagrad": [1.9, 1.9 - 0.1 / math.sqrt(2)],
    "rmsprop": [2 - 0.1 / math.sqrt(0.01), 2 - 1 - 0.1 / math.sqrt(0.0199)],
    "adam": [1.9, 1.8],
    "adamw": [1.9, 1.8],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_updates_by_hand(name: str):
    weight = nn.Parameter(torch.full((1, 1), 2.0, dtype=torch.float64))
    optimizer = build_optimizer(Optimizer(name, lr=0.1), {"weight": weight})
    for expected in HAND_WRITTEN[name]:
        weight.grad = torch.full_like(weight, 3.0)
        optimizer.step()
        assert weight.item() == pytest.approx(expected, abs=1e-6)


def test_no_decay_on_norms_and_biases():
    model = net()
    optimizer = build_optimizer(Optimizer("adamw", lr=0.1, weight_decay=0.5), dict(model.named_parameters()))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        decays = name in ("0.weight", "3.weight")
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.1 * 0.5) if decays else before[name])


def test_scales_by_longest_prefix_and_schedule():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.ModuleDict({"layer1": nn.Linear(2, 3), "layer10": nn.Linear(3, 3)})
            self.head = nn.Linear(3, 1)

    model = Model()
    settings = Optimizer("sgd", lr=2.0, scales={"trunk": 0.1, "trunk.layer1": 0.01})
    optimizer = build_optimizer(settings, dict(model.named_parameters()))
    set_lr(optimizer, 2.0 * 0.5)
    lr_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: lr_of[id(p)] for name, p in model.named_parameters()}
    assert found == pytest.approx(
        {
            "trunk.layer1.weight": 0.01,
            "trunk.layer1.bias": 0.01,
            "trunk.layer10.weight": 0.1,  # "trunk.layer1" ends at a dot
            "trunk.layer10.bias": 0.1,
            "head.weight": 1.0,
            "head.bias": 1.0,
        }
    )


def test_frozen_prefixes_are_not_trained():
    model = net()
    freeze(model, ["0", "1"])
    optimizer = build_optimizer(Optimizer("sgd"), dict(model.named_parameters()))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in trained} == {"3.weight", "3.bias"}


def test_a_prefix_that_matches_nothing_is_named():
    model = net()
    with pytest.raises(ValueError, match=r"frozen: no parameter is under 'trunk'; modules.*\['0', '1', '3'\]"):
        freeze(model, ["trunk"])
    with pytest.raises(ValueError, match="scales: no parameter is under '2'"):
        build_optimizer(Optimizer(scales={"2": 0.1}), dict(model.named_parameters()))
    freeze(model, ["0", "1", "3"])
    with pytest.raises(ValueError, match="nothing to train: every one of the 6"):
        build_optimizer(Optimizer(), dict(model.named_parameters()))


def test_ema_by_hand():
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([10.0]))
    model.register_buffer("mean", torch.tensor([20.0]))
    model.register_buffer("count", torch.tensor(0))
    ema = EMA(model, decay=0.15)
    for value in (20.0, 30.0):
        with torch.no_grad():
            model.weight.fill_(value)
        model.count += 1
        ema.update(model)
    # decays 1/10 then min(0.15, 2/11): 10 -> 0.1*10 + 0.9*20 = 19 -> 0.15*19 + 0.85*30 = 28.35
    assert ema.module.weight.item() == pytest.approx(28.35)
    assert ema.module.mean.item() == pytest.approx(20)
    assert ema.module.count.item() == 2
    assert not ema.module.weight.requires_grad
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
        EMA(model, 1.0)


def test_settings_of_each_part():
    settings = Optimizer("adam", lr=0.1, options={"betas": [0.0, 0.9]}, parts={"d": {"lr": 0.4}})
    assert by_part(settings, ("d", "g")) == {
        "d": Optimizer("adam", lr=0.4, options={"betas": [0.0, 0.9]}),
        "g": Optimizer("adam", lr=0.1, options={"betas": [0.0, 0.9]}),
    }
    with pytest.raises(ValueError, match="unknown part of the model 'e'; choose from"):
        by_part(Schedule(parts={"e": {}}), ("d", "g"))
    with pytest.raises(ValueError, match=r"unknown key of parts.d 'rate'; choose from .*'lr'"):
        by_part(Optimizer(parts={"d": {"rate": 0.1}}), ("d", "g"))


def test_options_torch_does_not_know_are_named():
    with pytest.raises(ValueError, match=r"options {'beta': 0.9} do not fit optimizer 'adamw': .*beta"):
        build_optimizer(Optimizer(options={"beta": 0.9}), dict(net().named_parameters()))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (Optimizer, {"name": "adamm"}, r"unknown optimizer 'adamm' \(did you mean 'adam'\?\); choose from"),
        (Optimizer, {"lr": 0.0}, "lr must be > 0"),
        (Optimizer, {"lr": math.nan}, "lr must be > 0"),
        (Optimizer, {"weight_decay": -1.0}, "weight_decay >= 0"),
        (Schedule, {"name": "cosin"}, "unknown schedule 'cosin'"),
        (Schedule, {"name": "step"}, "milestones belong to the schedule 'step'"),
        (Schedule, {"milestones": [3]}, "milestones belong to the schedule 'step'"),
        (Schedule, {"warmup": -1}, "warmup must be at least 0"),
        (Update, {"precision": "float16"}, "unknown precision 'float16'"),
        (Update, {"clip": 0.0}, "clip > 0"),
        (Update, {"accumulate": 0}, "accumulate must be >= 1"),
        (Validation, {"metric": "iou", "mode": "maximum"}, "unknown mode 'maximum'"),
        (Validation, {"metric": "iou", "patience": 0}, "patience must be >= 1"),
        (Record, {"keep": 0}, "must be >= 1, got 20, 200 and 0"),
    ],
)
def test_bad_settings_are_named(kind: type, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_changed_settings_are_named():
    saved = {"seed": 1, "optimizer": {"model": {"lr": 0.1, "options": {}}}}
    check_same(saved, saved)
    with pytest.raises(ValueError, match=r"optimizer.model.lr was 0.1 and is now 0.2"):
        check_same(saved, {"seed": 1, "optimizer": {"model": {"lr": 0.2, "options": {}}}})
    with pytest.raises(ValueError, match=r"optimizer.model.options.eps was None and is now 1"):
        check_same(saved, {"seed": 1, "optimizer": {"model": {"lr": 0.1, "options": {"eps": 1}}}})
