"""Steps that end in NaN: the first bad number is named, the batch is kept, and the step can be done again."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision3dgen.engine import CheckpointError, Data, Optimizer, Record, Trainer, Update, finite_outputs, latest, replay
from vision3dgen.engine import load_fault as load
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Camera, Frame, Meshes, Pointclouds

STRUCTURES = (Camera, Frame, Meshes, Pointclouds)


class Deep(nn.Module):
    """Least squares through layers and dropout; `poisoned` weights become infinite in that layer at step `at`."""

    def __init__(self, at: int, poisoned: str = "", root: bool = False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.at, self.poisoned, self.root, self.calls, self.drawn = at, poisoned, root, 0, []

    def loss(self, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
        self.calls += 1
        if self.poisoned and self.calls == self.at:
            nn.init.constant_(self.get_submodule(self.poisoned).weight, math.inf)
        hidden = self.layers[1](self.layers[0](batch["x"]))
        self.drawn.append((hidden == 0).detach())
        value = (self.layers[2](hidden) - 2 * batch["x"]).square().mean()
        if self.root and self.calls >= self.at:
            value = (value * 0).sqrt()  # finite, its gradient 0 * inf
        return {"loss": value}


def trainer(folder: Path, model: nn.Module, **update: Any) -> Trainer:
    items = [{"x": torch.tensor([i + 1.0]), "id": f"item {i}"} for i in range(8)]
    settings = {"optimizer": Optimizer("sgd", lr=1e-3), "steps": 5, "record": Record(checkpoint_every=2)}
    return Trainer(model, Data(items, batch_size=4), folder, **settings, update=Update(**update))


@pytest.mark.parametrize("poisoned", ["layers.0", "layers.2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_output_that_is_not_finite_is_named_and_the_step_can_be_done_again(tmp_path, poisoned, accumulate):
    torch.manual_seed(0)
    run = trainer(tmp_path, Deep(3 * accumulate, poisoned), accumulate=accumulate)
    with pytest.raises(FloatingPointError, match=rf"step 3: loss 'loss' is .*'{poisoned}' \(Linear\)") as raised:
        run.fit()
    folder = tmp_path / "faults" / "step_00000003"
    assert str(folder) in str(raised.value)
    found = latest(tmp_path)
    assert found is not None
    assert found.name == "step_00000002"

    fault = load(folder, STRUCTURES)
    assert fault.step == 3
    assert len(fault.batches) == accumulate
    assert sorted(fault.batches[-1]) == ["id", "x"]
    again = Deep(0)
    said = replay(folder, again, STRUCTURES)
    assert said is not None
    assert f"'{poisoned}' (Linear)" in said
    if poisoned == "layers.2":
        assert torch.equal(again.drawn[0], run.model.drawn[2 * accumulate])  # dropout draws as it did
    assert all(parameter.grad is None for parameter in again.parameters())


def test_a_gradient_names_its_operation(tmp_path):
    run = trainer(tmp_path, Deep(2, root=True))
    with pytest.raises(FloatingPointError, match=r"step 2: the gradient of 'layers.*'MulBackward0' returned nan"):
        run.fit()
    assert not torch.is_anomaly_enabled()


def test_a_loss_that_comes_of_finite_outputs_is_named(tmp_path):
    class Log(Deep):
        def loss(self, batch, part):
            value = super().loss(batch, part)["loss"]
            return {"term": torch.log(value * 0 - 1), "loss": value + torch.log(value * 0 - 1)}

    with pytest.raises(
        FloatingPointError, match=r"loss 'term' is nan.*; first loss 'term'; the outputs of all modules"
    ):
        trainer(tmp_path, Log(1)).fit()


def test_numbers_that_are_finite_the_second_time_are_not_explained_away(tmp_path):
    class Once(Deep):
        def loss(self, batch, part):
            losses = super().loss(batch, part)
            return {"loss": losses["loss"] * (math.nan if self.calls == 2 else 1.0)}

    with pytest.raises(FloatingPointError, match="done again: nothing, the numbers were finite this time"):
        trainer(tmp_path, Once(9)).fit()


def test_a_batch_of_structures_comes_back(tmp_path):
    class OfMeshes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def loss(self, batch, part):
            return {"loss": self.weight * batch["mesh"].verts_packed().sum() * math.nan}

    mesh = ico_sphere(1)
    camera = Camera.look_at((0.0, 0.0, 3.0), field_of_view=45, image_size=(16, 16))
    batch = {"mesh": mesh, "cloud": Pointclouds(torch.rand(2, 5, 3)), "camera": Camera.stack([camera]), "none": None}
    settings = {"optimizer": Optimizer("sgd", lr=1e-3), "steps": 1}
    run = Trainer(OfMeshes(), Data([batch], 1, collate=lambda items: items[0]), tmp_path, **settings)
    with pytest.raises(FloatingPointError, match="first loss 'loss'"):
        run.fit()
    kept = load(tmp_path / "faults" / "step_00000001", STRUCTURES).batches[0]
    assert torch.equal(kept["mesh"].verts_packed(), mesh.verts_packed())
    assert torch.equal(kept["cloud"].points_packed(), batch["cloud"].points_packed())
    assert torch.equal(kept["camera"].rotation, batch["camera"].rotation)
    with pytest.raises(CheckpointError, match=r"step\.pt cannot be read"):
        load(tmp_path / "faults" / "step_00000001")  # classes that nobody vouched for are refused


def test_a_full_disk_does_not_hide_the_fault(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vision3dgen.engine.trainer.save_fault", full)
    with pytest.raises(FloatingPointError, match=r"step 1: loss 'loss' is .* could not be written: .*No space left"):
        trainer(tmp_path, Deep(1, "layers.0")).fit()


def test_what_is_no_fault_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no step\.pt"):
        load(tmp_path)


def test_outputs_are_watched_only_inside(tmp_path):
    layer = nn.Sequential(nn.Identity())
    with finite_outputs(layer):
        layer(torch.ones(2))
        with pytest.raises(FloatingPointError, match=r"output of '0' \(Identity\), inf at index \(1,\) of \(2,\)"):
            layer(torch.tensor([1.0, math.inf]))
    layer(torch.tensor([math.nan]))
