"""Which implementation runs an operator, and in which precision.

`torch` (default) needs no compiler: SciPy's KD-tree where it wins on CPU, Triton kernels on CUDA where Triton is
installed, tiled torch elsewhere. `pytorch3d` hands the call to PyTorch3D, `torchvision` that of an operator on boxes or
regions to torchvision. The choice is explicit, by argument or by `use_backend`: a backend that is not installed is an
error, never a silent change of numbers.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vision3dgen.checks import check_choice

BACKENDS = ("torch", "pytorch3d", "torchvision")
INSTALL = {"pytorch3d": 'pip install "vision3dgen[pytorch3d]"', "torchvision": "pip install torchvision"}
MEND_TRITON = "pip install --force-reinstall triton, or pip uninstall triton to run on plain torch, slower"
HAS_TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger(__name__)
_chosen = "torch"  # for the whole process: torch.compile traces a global, not a ContextVar

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator that has this backend on it inside the block, unless a call names its own.

    Raises ImportError, saying what to install, when the backend is missing.
    """
    global _chosen
    before, _chosen = _chosen, resolve_backend(name, offered=BACKENDS)
    try:
        yield
    finally:
        _chosen = before


def resolve_backend(name: str | None = None, *, offered: Sequence[str] = ("torch", "pytorch3d")) -> str:
    """The backend to run on, of those an operator offers: the one named, else that of the enclosing `use_backend`.

    `torch` where nothing is named, and where the enclosing one is not offered.
    """
    if name is None:
        name = _chosen if _chosen in offered else "torch"
    check_choice("backend", name, offered)
    if name != "torch":
        import_backend(name, name)
    return name


def import_backend(backend: str, module: str) -> Any:
    """A module of a backend, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch than its own: RuntimeError
        raise ImportError(
            f'backend "{backend}" needs {module}, which does not import here ({error}): {INSTALL[backend]}'
        ) from error


def import_pytorch3d(module: str) -> Any:
    """PyTorch3D's `module`, or an ImportError that says how to get it."""
    return import_backend("pytorch3d", module)


def triton_runs_on(device_type: str) -> bool:
    """Whether tensors on this device go to the Triton kernels of `vision3dgen.ops.kernels`.

    Raises ImportError, saying how to mend it, where Triton is installed and does not import.
    """
    if device_type != "cuda":
        return False
    if not torch.compiler.is_compiling():
        if HAS_TRITON:
            import_triton()
        else:
            _say_triton_is_missing()
    return HAS_TRITON


@functools.cache
def import_triton() -> Any:
    """The triton module; an ImportError with the pip line where it is broken, never a silent change of speed."""
    try:
        return importlib.import_module("triton")
    except Exception as error:  # a package of compiled code fails in its own ways
        raise ImportError(f"triton is installed and does not import ({error}): {MEND_TRITON}") from error


@functools.cache
def _say_triton_is_missing() -> None:
    _log.warning("Triton is not installed: on CUDA, neighbors and farthest points run on plain torch, slower")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a geometric function in float32 or better, inside autocast too, and cast what it returns back.

    Tensors, in lists and tuples too, are raised to the type they promote to, at least float32; results have the type
    they promote to. Meshes and point clouds count in that, but keep the type they hold: the function raises theirs.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = _floating([*args, *kwargs.values()])
        if not tensors:
            return function(*args, **kwargs)
        dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
        half = dtype in (torch.float16, torch.bfloat16)
        raised = torch.float32 if half else dtype
        device_type = tensors[0].device.type
        if all(x.dtype == raised for x in tensors) and not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            result = function(*_cast(args, raised), **_cast(kwargs, raised))
        return _cast(result, dtype) if half else result

    return wrapped


def raise_half(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _floating(values: Iterable[Any]) -> list[Tensor]:
    """The floating tensors among these values: tensors, lists and tuples of them, what meshes and clouds hold."""
    found = []
    for value in values:
        if isinstance(value, list | tuple):
            found += _floating(value)
        elif hasattr(value, "verts_packed"):
            found.append(value.verts_packed())
        elif hasattr(value, "points_packed"):
            found.append(value.points_packed())
        elif isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of a list, (named) tuple or dict as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    if isinstance(value, tuple):
        items = [_cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
