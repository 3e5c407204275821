"""Random numbers for a tensor's device: drawn where the generator lives, so that a seed gives the same everywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(size: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers (*size) in the type and on the device of `like`."""
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(size), dtype=like.dtype, device=device, generator=generator).to(like.device)


def uniform(size: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers (*size) in [0, 1) in the type and on the device of `like`."""
    device = like.device if generator is None else generator.device
    return torch.rand(tuple(size), dtype=like.dtype, device=device, generator=generator).to(like.device)
