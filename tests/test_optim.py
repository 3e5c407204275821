"""Optimizers, parameter groups, schedules and the moving average, against values worked out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from vision3dgen.engine.optim import (
    EMA,
    OPTIMIZERS,
    SCHEDULES,
    SWA,
    Optimizer,
    Schedule,
    build_optimizer,
    by_part,
    check_steps,
    cycle_ends,
    freeze,
    layerwise_scales,
    lr_factor,
    recompute_batch_norm,
    set_lr,
    train_mode,
)
from vision3dgen.engine.settings import Averaging, Penalty, Record, Sharding, Update, Validation, check_same


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
        (Schedule("cosine_restarts", cycles=1), [1, (2 + HALF * 2) / 4, 0.5, (2 - HALF * 2) / 4, 0, 0]),
        (Schedule("cosine_restarts", cycles=2), [1, 0.5, 1, 0.5, 0, 0]),
        (Schedule("cosine_restarts", cycles=2, floor=0.2), [1, 0.6, 1, 0.6, 0.2]),
        (Schedule("cosine_restarts", cycles=3, warmup=1), [1, 1, 1, 1, 0]),
        (Schedule("cosine_restarts", cycles=2, warmup=1), [1, 1, 0.5, 1, 0]),  # cycles of 2 and of 1
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
        cycles = 1 if name == "cosine_restarts" else None
        schedule = Schedule(name, warmup=7, milestones=[11] if name == "step" else (), cycles=cycles)
        values = factors(schedule, 23, 23)
        assert values[:7] == pytest.approx([(step + 1) / 7 for step in range(7)])
        assert values[7] == pytest.approx(1, abs=0.07)
        assert values[6:] == sorted(values[6:], reverse=True)


@pytest.mark.parametrize("schedule, steps, ends", [
    (Schedule("cosine_restarts", cycles=3), 12, [4, 8, 12]),
    (Schedule("cosine_restarts", cycles=3, warmup=2), 13, [6, 10, 13]),
    (Schedule("cosine_restarts", cycles=1, warmup=5), 5, [5]),
    (Schedule("cosine"), 12, []),
])  # fmt: skip
def test_cycles_end_where_the_rate_restarts(schedule: Schedule, steps: int, ends: list[int]):
    assert cycle_ends(schedule, steps) == ends
    values = factors(schedule, steps, steps)
    jumps = [step for step in range(schedule.warmup + 1, steps) if values[step] > values[step - 1]]
    assert jumps == ends[:-1]


def test_a_schedule_that_does_not_fit_the_run_is_named():
    check_steps(Schedule("cosine", warmup=5), 5)
    check_steps(Schedule("cosine_restarts", cycles=5), 5)
    with pytest.raises(ValueError, match="needs at least 1 step, got steps=0"):
        check_steps(Schedule(), 0)
    with pytest.raises(ValueError, match="'cosine' warms up for 6 steps and the run has 5: warmup must be from 0 to 5"):
        check_steps(Schedule("cosine", warmup=6), 5)
    with pytest.raises(ValueError, match=r"cycles must be from 1 to 4, .* got 5"):
        check_steps(Schedule("cosine_restarts", warmup=1, cycles=5), 5)


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


def test_layerwise_scales_fall_from_the_last_layer():
    model = net()
    assert layerwise_scales(model, 0.5) == {"3": 1.0, "1": 0.5, "0": 0.25}
    assert layerwise_scales(model, 0.1, [["0", "1"], "3"]) == pytest.approx({"3": 1.0, "0": 0.1, "1": 0.1})
    optimizer = build_optimizer(Optimizer("sgd", scales=layerwise_scales(model, 0.5)), dict(model.named_parameters()))
    scale_of = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [scale_of[id(p)] for p in model.parameters()] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 0"):
        layerwise_scales(model, 0.0)
    with pytest.raises(ValueError, match="layers: no parameter is under 'head'"):
        layerwise_scales(model, 0.5, ["0", "head"])


def test_options_reach_torch():
    parameters = dict(net().named_parameters())
    optimizer = build_optimizer(
        Optimizer("adam", options={"betas": (0.5, 0.6), "eps": 0.1, "amsgrad": True}), parameters
    )
    assert [(g["betas"], g["eps"], g["amsgrad"]) for g in optimizer.param_groups] == [((0.5, 0.6), 0.1, True)] * 2
    optimizer = build_optimizer(Optimizer("nesterov", options={"momentum": 0.5}), parameters)
    assert all(g["momentum"] == 0.5 and g["nesterov"] for g in optimizer.param_groups)
    optimizer = build_optimizer(Optimizer("rmsprop", options={"alpha": 0.7, "centered": True}), parameters)
    assert all(g["alpha"] == 0.7 and g["centered"] for g in optimizer.param_groups)


def test_frozen_modules_stay_in_evaluation_mode():
    model = net().double()
    freeze(model, ["1"])
    inputs = torch.randn(7, 3, dtype=torch.float64) + 5
    for mode in (True, False):
        for trained in (model, copy.deepcopy(model)):  # an average of the weights is a copy
            trained.train(mode)
            trained(inputs)
            assert trained[1].running_mean.tolist() == [0.0] * 5
            assert int(trained[1].num_batches_tracked) == 0
            expected = trained[3](trained[0](inputs).div(math.sqrt(1 + 1e-5)).relu())
            torch.testing.assert_close(trained(inputs), expected)
    train_mode(model)
    assert [module.training for module in model] == [True, False, True, True]
    other = net()
    other.train()
    other(inputs.float())
    assert int(other[1].num_batches_tracked) == 1  # what would have moved
    freeze(other, ["0.bias"])  # a parameter alone leaves its module as it is
    assert other[0].training
    assert other[0].weight.requires_grad


def test_swa_is_the_mean_of_the_weights_it_was_given():
    model = nn.Linear(3, 2)
    swa = SWA(model, start=3, every=2)
    seen = []
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.normal_(generator=torch.Generator().manual_seed(step))
        swa.update(model, step)
        seen.append(model.weight.detach().clone())
        if step < 3:
            assert swa.count == 0
            assert torch.equal(swa.module.weight, seen[-1])
    assert swa.count == 3
    torch.testing.assert_close(swa.module.weight.detach(), (seen[2] + seen[4] + seen[6]) / 3)
    again = SWA(model, start=3, every=2)
    again.module.load_state_dict(swa.module.state_dict())
    again.load_state_dict(swa.state_dict())
    for each in (swa, again):
        each.update(model, 9)
    assert torch.equal(swa.module.weight, again.module.weight)


def test_recomputed_statistics_are_those_of_the_data():
    model = net().double()
    frozen = nn.Sequential(model, nn.BatchNorm1d(2, dtype=torch.float64))
    freeze(frozen, ["1"])
    batches = [torch.randn(7, 3, dtype=torch.float64) * 3 + 1 for _ in range(5)]
    model[1].momentum = 0.3

    def forward():
        for batch in batches:
            yield frozen(batch)

    recompute_batch_norm(frozen, forward)
    hidden = [model[0](batch) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert model[1].momentum == 0.3
    assert not frozen.training
    assert frozen[1].running_mean.tolist() == [0.0, 0.0]
    recompute_batch_norm(nn.Linear(2, 2), lambda: 1 / 0)  # without batch norm nothing is run


@pytest.mark.parametrize("l1, l2", [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_the_penalty_and_its_gradient_are_the_formula(l1: float, l2: float):
    model = net().double()
    penalty = Penalty(l1=l1, l2=l2)
    weights = [model[0].weight, model[3].weight]  # neither biases nor the norm
    value = penalty.value(model.parameters())
    assert value.item() == pytest.approx(
        sum(l1 * abs(w) + l2 / 2 * w**2 for weight in weights for w in weight.flatten().tolist())
    )
    expected = torch.autograd.grad(value, weights)
    for weight, gradient in zip(weights, expected):
        torch.testing.assert_close(gradient, (l1 * weight.sign() + l2 * weight).detach())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    penalty.add_gradient(model.parameters())
    torch.testing.assert_close(model[0].weight.grad, 1 + expected[0])
    torch.testing.assert_close(model[3].weight.grad, expected[1])
    assert model[0].bias.grad is None
    assert model[1].weight.grad is None


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
        (Schedule, {"name": "cosine_restarts"}, "cycles, at least 1, belong to"),
        (Schedule, {"name": "cosine_restarts", "cycles": 0}, "cycles, at least 1, belong to"),
        (Schedule, {"cycles": 2}, "belong to the schedule 'cosine_restarts' and to no other, got name='constant'"),
        (Penalty, {}, "one of them > 0, got l1=0.0, l2=0.0"),
        (Penalty, {"l1": -1.0, "l2": 2.0}, "must be >= 0"),
        (Averaging, {"start": 0}, "must be >= 1, got 0, 1 and 100"),
        (Update, {"ema": 0.9, "swa": Averaging(1)}, "two averages of the same weights"),
        (Update, {"shard": Sharding(), "ema": 0.9}, "without an average of the weights"),
        (Update, {"shard": Sharding(), "precision": "fp16"}, "precision fp32 or bf16"),
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
