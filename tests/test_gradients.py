"""The gradient check: passes what is right, names what is wrong."""

import pytest
import torch
from torch import Tensor, nn

from vision3dgen.engine import check_gradients


class Scaled(torch.autograd.Function):
    """Multiplication by 3 whose backward pass says `slope`."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return 3 * x

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.slope * gradient, None


class Net(nn.Module):
    def __init__(self, slope: float = 3.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 2, bias=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.slope = slope

    def loss(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        hidden = torch.tanh(self.norm(self.first(batch["x"])))
        hidden = nn.functional.dropout(hidden, 0.4, training=self.training)
        weight = Scaled.apply(self.second.weight, self.slope)
        return {"loss": nn.functional.linear(hidden, weight).square().mean()}


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), "label": torch.arange(5)}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("mode", [True, False])
def test_right_gradients_pass_and_nothing_moves(mode: bool):
    model = Net().train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = check_gradients(model, batch(), generator=generator())
    assert found.error < 1e-5  # round-off where the gradient is 0: a bias before a batch norm
    assert set(found.errors) == {name for name, _ in model.named_parameters()}
    assert found.error == max(found.errors.values()) == found.errors[found.name]
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert found == check_gradients(model, batch(), generator=generator())


def test_a_wrong_gradient_is_named():
    with pytest.raises(ValueError, match=r"the gradient of 'second.weight' at \[\d, \d\] is .* differences give"):
        check_gradients(Net(slope=2.9), batch(), generator=generator())
    found = check_gradients(Net(slope=2.9), batch(), tolerance=1.0, generator=generator())
    assert found.name == "second.weight"
    assert found.error == pytest.approx(0.1 / 5.9, rel=1e-3)
    assert found.analytic / found.numeric == pytest.approx(2.9 / 3, rel=1e-6)
    assert found.errors["first.weight"] < 1e-5


def test_a_model_without_gradients_is_an_error():
    with pytest.raises(ValueError, match="no parameter of the model takes a gradient"):
        check_gradients(Net().requires_grad_(False), batch())
