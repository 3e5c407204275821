"""Fully sharded data parallel training with torch's `fully_shard`, its state kept as one process would keep it.

Weights and optimizer states are gathered before they are written and cut up after they are read, so that a checkpoint
does not tell whether, or over how many processes, its run was sharded.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(objective: nn.Module, units: Iterable[nn.Module], device: torch.device, world: int) -> None:
    """Cut the parameters of `objective` over all processes, in place, each starting from the first one's weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for tensor in [*objective.parameters(), *objective.buffers()]:
        torch.distributed.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(device.type, (world,))
    for unit in [*units, objective]:
        fully_shard(unit, mesh=mesh)


def full(value: Any) -> Any:
    """`value` with every sharded tensor in it gathered, which all processes must do together."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full(item) for item in value)
    return value


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def gather_weights(sharded: nn.Module, whole: nn.Module) -> None:
    """Copy the parameters and buffers of a sharded model into an ordinary one."""
    whole.load_state_dict(full(sharded.state_dict()))


@torch.no_grad()
def scatter_weights(whole: nn.Module, sharded: nn.Module) -> None:
    """Copy the parameters and buffers of an ordinary model into a sharded one."""
    for name, target in sharded.state_dict().items():
        local(target).copy_(local(like(whole.state_dict()[name], target)))


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor cut up as `target` is, on its device."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def scatter_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer over whole parameters as that of `optimizer`, whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {
            name: like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    return {**state, "state": cut}
