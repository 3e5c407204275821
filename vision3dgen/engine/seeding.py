"""Random states of Python, NumPy and torch as one thing that can be set, saved and put back."""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One 63-bit seed from several non-negative integers; neighbors such as (0, 1) and (1, 0) are unrelated.

    In this package the first number is the user's seed and the second its use: 0 a sample, 1 a collation, 2 the order
    of an epoch, 3 the training loop of a process, 4 the batches that averaged weights get their statistics from, 5 a
    split, 6 a trial of a search.
    """
    # With their count in front: NumPy takes (1,) and (1, 0) for the same.
    high, low = np.random.SeedSequence((len(numbers), *numbers)).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def quick_mix(*numbers: int) -> int:
    """`mix`, other numbers, in a microsecond: it runs once per sample."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, CUDA included. Call it before building a model."""
    seed_cpu(seed)
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
def preserved_cpu_rng() -> Iterator[None]:
    """`preserved_rng` for the CPU generators alone, at a third of the cost: it runs once per batch."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)


def seed_cpu(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator; CUDA's are left alone, samples are made on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch refuses operations whose result differs from run to run on one machine, and cuDNN does not choose.

    On CUDA, CUBLAS_WORKSPACE_CONFIG must be ":4096:8" before its first product; it is set here where it is not.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
