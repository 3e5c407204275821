import pytest
import torch
from torch import nn

from vision3dgen.engine import memory_growth, profile_model

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20


class Model(nn.Module):
    """Seven times eleven weights and eleven biases, of which the biases are not trained; predicting touches memory."""

    def __init__(self, mebibytes: int):
        super().__init__()
        self.layer = nn.Linear(7, 11)
        self.layer.bias.requires_grad_(False)
        self.again = self.layer.weight
        self.mebibytes = mebibytes
        self.calls = 0

    def predict(self, batch):
        assert not self.training
        self.calls += 1
        torch.ones(self.mebibytes * MEBIBYTE, dtype=torch.uint8)
        return self.layer(batch)


def test_what_a_prediction_costs():
    model = Model(64).train()
    profile = profile_model(model, torch.zeros(3, 7), images=3, seconds=0, most=5)
    assert profile.parameters == 77
    assert profile.ms_per_image > 0
    assert model.calls == 5  # a first one, one for the memory, three that are timed
    assert model.training
    assert profile.peak_memory is None or 60 * MEBIBYTE < profile.peak_memory < 90 * MEBIBYTE


def test_memory_that_was_freed_before_is_not_counted_and_that_which_is_used_again_is():
    torch.ones(200 * MEBIBYTE, dtype=torch.uint8)
    growth = memory_growth(lambda: torch.ones(50 * MEBIBYTE, dtype=torch.uint8), CPU)
    assert growth is None or 45 * MEBIBYTE < growth < 80 * MEBIBYTE
    nothing = memory_growth(lambda: None, CPU)
    assert nothing is None or nothing < 5 * MEBIBYTE


def test_bad_input():
    with pytest.raises(ValueError, match="images must be at least 1"):
        profile_model(Model(1), torch.zeros(1, 7), images=0)
