"""Value checks for public boundaries; inside the package, functions trust each other."""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_shape(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Match tensors to shape strings and return the sizes, a letter meaning one size everywhere.

    `check_shape(x=(x, "B N 3"), y=(y, "B M 3"))` returns `{"B": ..., "N": ..., "M": ...}` or raises a ValueError
    that names the tensor, the rule and the shape it got.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, spec) in named.items():
        dims = spec.split()
        fits = tensor.ndim == len(dims) and all(
            size == (int(dim) if dim.isdigit() else sizes.setdefault(dim, size))
            for dim, size in zip(dims, tensor.shape)
        )
        if not fits:
            raise ValueError(f"{name} must be ({spec}) with {sizes}, got {tuple(tensor.shape)}")
    return sizes


def check_finite(**named: Tensor) -> None:
    """Raise a ValueError naming the first tensor with NaN or infinity and the index of the first such value."""
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            continue
        if bool(tensor.detach().sum().isfinite()):  # four times as fast as a mask; large numbers may overflow in it
            continue
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{name} must be finite, got {tensor[index].item()} at index {index} of {tuple(tensor.shape)}"
            )


def check_numbers(**named: Tensor) -> None:
    """Raise a ValueError naming the first tensor with NaN and where; infinity is a number here."""
    for name, tensor in named.items():
        if tensor.numel() and bool(tensor.detach().amax().isnan()):  # one pass without a mask; the maximum keeps NaN
            index = tuple(int(i) for i in tensor.isnan().nonzero()[0])
            raise ValueError(f"{name} must not be NaN, it is at index {index} of {tuple(tensor.shape)}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ValueError naming the accepted values, and the nearest of them, unless `value` is one."""
    accepted = list(choices)
    if value in accepted:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in accepted], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {name} {value!r}{hint}; choose from {sorted(accepted, key=str)}")
