"""Random states of Python, NumPy and torch as one thing that can be set, saved and put back."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One 63-bit seed from several non-negative integers; neighbors such as (0, 1) and (1, 0) are unrelated."""
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, CUDA included. Call it before building a model."""
    _seed_cpu(seed)
    torch.cuda.manual_seed_all(seed)  # does nothing until CUDA is first used, then applies


def rng_state() -> dict[str, Any]:
    """The random states of this process, made of numbers, tuples and tensors only."""
    # NumPy's global generator is what datasets draw from, so it is what must be saved.
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; the CUDA state only where CUDA is."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves the random states outside as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def seeded(numbers: Sequence[int]) -> Iterator[None]:
    """Inside, the CPU generators start from `mix(*numbers)`; outside, they are as they were.

    CUDA's generators are left alone: this wraps the making of single samples, which happens on the CPU.
    """
    # Opaque copies rather than rng_state(): this runs once per sample.
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    _seed_cpu(mix(*numbers))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
