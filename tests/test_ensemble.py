"""Ensembles against their members, and the runs their members come from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from vision3dgen.engine import (
    Averaging,
    CheckpointError,
    Data,
    Ensemble,
    Optimizer,
    Record,
    Schedule,
    Trainer,
    Update,
    Validation,
    load_weights,
    snapshots,
)
from vision3dgen.engine.loading import ShuffleSampler, make_loader
from vision3dgen.engine.seeding import mix


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rings:
    """Three noisy classes in the plane."""

    def __init__(self, seed: int = 0, count: int = 97):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.randint(3, (count,), generator=generator)
        angle = 2 * torch.pi * torch.rand(count, generator=generator)
        radius = 1 + self.label + 0.4 * torch.randn(count, generator=generator)
        self.x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index] + 0.05 * torch.randn(2), "label": self.label[index]}


class Classifier(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Dropout(0.1), nn.Linear(13, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self(batch["x"]), batch["label"])}


def run(folder: Path, seed: int = 0, steps: int = 60, **settings) -> Trainer:
    return Trainer(
        Classifier(seed), Data(Rings(), 11), folder, steps=steps, seed=seed,
        **{"optimizer": Optimizer("adam", lr=0.05), "record": Record(log_every=1000, keep=1)} | settings,
    )  # fmt: skip


def likelihoods(ensemble: Ensemble) -> tuple[float, list[float], float, list[float]]:
    """Negative log-likelihood and accuracy of the ensemble and of its members on other data."""
    test = Rings(1, 499)
    with torch.no_grad():
        together, each = ensemble(test.x), ensemble.members(test.x)
    torch.testing.assert_close(together.sum(1), torch.ones(499))
    torch.testing.assert_close(together, each.mean(0))
    accuracy = [(p.argmax(1) == test.label).float().mean().item() for p in (together, *each)]
    nll = [nll_loss(p.log(), test.label).item() for p in (together, *each)]
    return nll[0], nll[1:], accuracy[0], accuracy[1:]


@pytest.mark.slow
def test_independent_models_are_scored_against_their_mixture(tmp_path: Path):
    results = [run(tmp_path / str(seed), seed).fit() for seed in range(3)]
    ensemble = Ensemble.load(Classifier(), [result.checkpoint for result in results])
    nll, members, accuracy, accuracies = likelihoods(ensemble)
    assert nll < sum(members) / 3  # strictly, since the members differ (Jensen)
    assert accuracy > 0.6  # chance is a third
    assert len(set(accuracies)) > 1
    assert not ensemble.train().models[0].training
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


@pytest.mark.slow
def test_each_cycle_of_one_run_leaves_a_snapshot(tmp_path: Path):
    schedule = Schedule("cosine_restarts", cycles=3)
    result = run(tmp_path, schedule=schedule, record=Record(log_every=10, checkpoint_every=7, keep=1)).fit()
    found = snapshots(tmp_path)
    assert [folder.name for folder in found] == ["step_00000020", "step_00000040", "step_00000060"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [folder.name for folder in found]
    assert result.checkpoint == found[-1]
    nll, members, _, _ = likelihoods(Ensemble.load(Classifier(), found))
    assert nll < sum(members) / 3
    (found[1] / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000040/model.safetensors is truncated"):
        snapshots(tmp_path)


def test_other_schedules_leave_none(tmp_path: Path):
    run(tmp_path, steps=3).fit()
    assert snapshots(tmp_path) == []


def test_an_ensemble_of_one_and_of_none():
    model = Classifier().eval()
    x = torch.randn(5, 2)
    torch.testing.assert_close(Ensemble([model])(x), model(x).softmax(1))
    torch.testing.assert_close(Ensemble([model], torch.sigmoid)(x), model(x).sigmoid())
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])


SWA = Update(swa=Averaging(start=4, every=2, batches=5))


def test_the_average_is_evaluated_and_saved_with_statistics_of_its_own(tmp_path: Path):
    trainer = run(tmp_path, steps=9, update=SWA, validation=Validation("score", every=3))
    seen, evaluated = [], []
    step = trainer.train_step

    def watched(batches):
        values = step(batches)
        seen.append([p.detach().clone() for p in trainer.model.parameters()])
        return values

    trainer.train_step = watched
    state = []

    def validate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        evaluated.append(model)
        state.append(torch.get_rng_state())
        return {"score": 1.0}

    result = trainer.fit(validate)
    assert [id(model) for model in evaluated] == [id(trainer.swa.module)] * 3
    averaged = [torch.stack(tensors).mean(0) for tensors in zip(seen[3], seen[5], seen[7])]
    for mean, parameter in zip(averaged, trainer.swa.module.parameters()):
        torch.testing.assert_close(parameter.detach(), mean)
    norm = trainer.swa.module.layers[1]
    order = ShuffleSampler(97, mix(0, 4), 11)
    loader = iter(make_loader(trainer.data, order))
    hidden = [trainer.swa.module.layers[0](next(loader)["x"]).detach() for _ in range(5)]
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    load_weights(loaded := Classifier(), result.checkpoint.with_name("step_00000009"))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.swa.module.state_dict()[name]), name
    plain = run(tmp_path / "plain", steps=9)
    plain.fit()
    for mine, other in zip(trainer.model.parameters(), plain.model.parameters()):
        assert torch.equal(mine, other)  # averaging and its passes leave the training as it was


@pytest.mark.parametrize("stop", [2, 5, 6])  # before the first average, after an odd and an even step
def test_averaging_resumes_exactly(tmp_path: Path, stop: int):
    whole = run(tmp_path / "whole", steps=9, update=SWA)
    whole.fit()
    first = run(tmp_path / "cut", steps=9, update=SWA)
    first.steps = stop
    first.fit()
    second = run(tmp_path / "cut", steps=9, update=SWA)
    second.fit(resume=True)
    for name in ("model", "swa"):
        left, right = ((t.swa.module if name == "swa" else t.model).state_dict() for t in (whole, second))
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_an_average_that_would_be_of_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"swa.start is 4 and the run has 3 steps: nothing would be averaged"):
        run(tmp_path, steps=3, update=SWA)
