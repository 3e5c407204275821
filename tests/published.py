"""Deterministic weights and inputs with which published networks' outputs were recorded."""

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

OUTPUTS = "reference_outputs"


def layout(shared_data: Path, name: str) -> dict[str, list[int]]:
    """Parameter names and shapes of a published network."""
    return json.loads((shared_data / OUTPUTS / "state_dict_layouts.json").read_text())[name]


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict drawn by the rule the recorded outputs used: one random stream per name."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif len(shape) >= 2:
            numel = torch.Size(shape).numel()
            state[name] = torch.randn(shape, generator=generator) * (shape[0] / numel) ** 0.5
        elif name.endswith("weight"):
            state[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            state[name] = 0.1 * torch.randn(shape, generator=generator)
    return state


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
