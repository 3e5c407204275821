"""Gradients of a model's loss held against central differences."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision3dgen.engine.loading import Movable
from vision3dgen.engine.seeding import preserved_rng, seed_all


class GradientCheck(NamedTuple):
    """The parameter element whose two gradients differ most; `error` is |a - n| / max(|a| + |n|, floor)."""

    name: str
    element: tuple[int, ...]
    analytic: float
    numeric: float
    error: float
    errors: dict[str, float]  # the largest error of each parameter that was looked at


def check_gradients(
    model: nn.Module,
    batch: Any,
    part: str = "model",
    *,
    elements: int = 100,
    step: float = 1e-6,
    floor: float = 1e-4,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> GradientCheck:
    """Compare autograd with (L(w + step) - L(w - step)) / (2 step) in float64 on randomly drawn parameter elements.

    The model is copied and left as it is; it runs in the mode it is in, with the global generators set alike for each
    call, so that dropout drops the same units. Gradients smaller than `floor` are compared absolutely: the round-off of
    the difference is about 1e-16 |L| / step. At least one element of each trainable parameter is drawn, then
    uniformly up to `elements`. Raises ValueError naming the worst parameter if its error is above `tolerance`. Next to
    a kink (ReLU, max pooling) the difference is between two slopes: an error there that goes away with a smaller step
    or another batch is not a fault.
    """
    model = copy.deepcopy(model).double()
    batch = _double(batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("nothing to check: no parameter of the model takes a gradient")

    def loss() -> Tensor:
        seed_all(0)
        return model.loss(batch, part=part)["loss"]  # type: ignore[operator]

    drawn = _draw(named, elements, generator)
    found = []
    with preserved_rng():
        gradients = dict(zip(named, torch.autograd.grad(loss(), list(named.values()), allow_unused=True)))
        for name, place in drawn:
            numeric = _slope(loss, named[name].data.view(-1), place, step)
            gradient = gradients[name]
            analytic = 0.0 if gradient is None else gradient.reshape(-1)[place].item()
            error = abs(analytic - numeric) / max(abs(analytic) + abs(numeric), floor)
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), named[name].shape))
            found.append(GradientCheck(name, index, analytic, numeric, error if error == error else float("inf"), {}))
    worst = max(found, key=lambda check: check.error)
    errors = {name: max(check.error for check in found if check.name == name) for name in named}
    worst = worst._replace(errors=errors)
    if worst.error > tolerance:
        raise ValueError(
            f"the gradient of {worst.name!r} at {list(worst.element)} is {worst.analytic:.6g} and differences give "
            f"{worst.numeric:.6g}: relative error {worst.error:.2g}, more than {tolerance:g}"
        )
    return worst


@torch.no_grad()
def _slope(loss: Callable[[], Tensor], weights: Tensor, place: int, step: float) -> float:
    """The central difference of the loss in one element, which is put back."""
    before = weights[place].item()
    values = []
    for shifted in (before + step, before - step):
        weights[place] = shifted
        values.append(loss().item())
    weights[place] = before
    return (values[0] - values[1]) / (2 * step)


def _draw(named: Mapping[str, nn.Parameter], elements: int, generator: torch.Generator | None) -> list[tuple[str, int]]:
    """One element of each parameter, then more up to `elements`, every element of the model as likely as another."""
    sizes = torch.tensor([parameter.numel() for parameter in named.values()])
    names, drawn = list(named), []
    for name, size in zip(names, sizes.tolist()):
        drawn.append((name, int(torch.randint(size, (), generator=generator))))
    ends = sizes.cumsum(0)
    more = max(elements - len(drawn), 0)
    for place in torch.randint(int(ends[-1]), (more,), generator=generator).tolist():
        which = int(torch.searchsorted(ends, place, right=True))
        drawn.append((names[which], place - int(ends[which] - sizes[which])))
    return drawn


def _double(value: Any) -> Any:
    """Every floating-point tensor in nested dicts, lists and tuples, and all that has `.to`, in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_double(item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_double(item) for item in value)
    return value.to(torch.float64) if isinstance(value, Movable) else value
