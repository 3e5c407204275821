"""What is kept of a training step that ended in a number that is not finite, and how the step is done again.

    RUN/faults/step_00000012/
        model.safetensors    the weights it was computed with
        step.pt              part, message, batches and random states; read with `weights_only=True`

`replay` computes the loss and its gradient once more and names the first value that is not finite: the output of a
module, or the gradient of an operation.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from vision3dgen.engine.checkpoint import CheckpointError, load_file
from vision3dgen.engine.loading import to_device
from vision3dgen.engine.optim import train_mode
from vision3dgen.engine.seeding import preserved_rng
from vision3dgen.engine.settings import PRECISIONS

FOLDER = "faults"


class Fault(NamedTuple):
    """A step that could not be made."""

    step: int
    part: str
    message: str
    precision: str  # of `settings.PRECISIONS`
    batches: list[Any]
    rng: dict[str, Tensor]  # torch's random states before the part's first forward pass


def drawn_from() -> dict[str, Tensor]:
    """torch's random states, which models draw from: cheap enough to be taken before every step."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else state


def _draw_as(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_fault(run_dir: Path, fault: Fault, model: nn.Module) -> Path:
    """Write a fault and the weights below `run_dir`; returns its folder, which replaces that of an earlier try."""
    folder = run_dir / FOLDER / f"step_{fault.step:08d}"
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"))
    torch.save(fault._asdict(), partial / "step.pt")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def load_fault(folder: str | Path, known: Sequence[type] = ()) -> Fault:
    """Read a fault whose batches hold `known` classes beside tensors; CheckpointError where it is none."""
    path = Path(folder) / "step.pt"
    try:
        with torch.serialization.safe_globals(list(known)):
            return Fault(**torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no fault of a run: it has no step.pt") from error
    except Exception as error:  # torch raises what the damage leads to
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def replay(
    folder: str | Path, model: nn.Module, known: Sequence[type] = (), device: torch.device | str = "cpu"
) -> str | None:
    """Do the step of a fault again with the weights of then; what `first_fault` says of it."""
    fault = load_fault(folder, known)
    load_file(model.cpu(), Path(folder) / "model.safetensors")
    train_mode(model.to(device))
    return first_fault(model, fault, torch.device(device))


def first_fault(model: nn.Module, fault: Fault, device: torch.device) -> str | None:
    """Which value of a step was the first that is not finite, None if all are finite this time.

    Gradients are left as they were; buffers such as the statistics of batch norms go through the step once more.
    """
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    precision = PRECISIONS[fault.precision]
    try:
        for parameter in model.parameters():
            parameter.grad = None
        with preserved_rng(), torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch prints where in the forward pass it was
            _draw_as(fault.rng)
            for batch in fault.batches:
                with finite_outputs(model), torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    losses = model.loss(to_device(batch, device), part=fault.part)  # type: ignore[operator]
                for name in sorted(losses, key="loss".__eq__):  # the terms before their sum
                    if not torch.isfinite(losses[name]):
                        return f"loss {name!r}; the outputs of all modules are finite"
                losses["loss"].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"the gradient of {name!r}"
    except NotFiniteError as error:
        return str(error)
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        return str(error)  # "Function 'SqrtBackward0' returned nan values in its 0th output."
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
    return None


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Inside, every output of a module and every gradient of an operation is checked, at a cost of both passes.

    Not for fp16, whose gradients overflow now and then, which the scaler of the loss repairs.
    """
    with finite_outputs(model), torch.autograd.set_detect_anomaly(True):
        yield


class NotFiniteError(FloatingPointError):
    """A module put out a number that is not finite."""


@contextmanager
def finite_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, the first module whose output is not finite raises `NotFiniteError`, which names it and the place."""

    def check(name: str, module: nn.Module, output: Any) -> None:
        for tensor in _tensors(output):
            bad = ~torch.isfinite(tensor.detach())
            if bad.any():
                index = tuple(int(i) for i in bad.nonzero()[0])
                raise NotFiniteError(
                    f"the output of {name!r} ({type(module).__name__}), {tensor[index].item()} at index {index} of "
                    f"{tuple(tensor.shape)}; {int(bad.sum())} of its {tensor.numel()} numbers are not finite"
                )

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: check(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors inside nested mappings and sequences."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from _tensors(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _tensors(own)
