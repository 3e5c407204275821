"""What using a trained model costs: parameters, time and memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class ModelProfile(NamedTuple):
    """What `model.predict` needs for one batch."""

    parameters: int  # numbers that training moves, each counted once
    ms_per_image: float  # median over repetitions, divided by the images of the batch
    peak_memory: int | None  # bytes beyond what was held before the call, None where the system does not tell


def profile_model(model: nn.Module, batch: Any, *, images: int, seconds: float = 3.0, most: int = 50) -> ModelProfile:
    """Time and memory of `model.predict(batch)`, whose batch has so many images and lies on the model's device.

    Repeated for about `seconds`, at least 3 and at most `most` times, after a first call that is not timed: it measures
    the memory. Memory on CUDA is what torch allocated at most; on a CPU, by how much the resident size rose, which
    only Linux tells, after freed memory was given back: pages that were never touched do not count.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def call() -> None:
        model.predict(batch)  # type: ignore[operator]

    training = model.training
    model.eval()
    try:
        call()  # what is built at the first use stays, and is not the batch's
        memory = memory_growth(call, device)
        times: list[float] = []
        while len(times) < most and (len(times) < 3 or sum(times) < seconds):
            times.append(seconds_of(call, device))
    finally:
        model.train(training)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelProfile(parameters, 1000 * statistics.median(times) / images, memory)


def memory_growth(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needed beyond what was there, at its peak; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    switch = Path("/proc/self/clear_refs")
    if not switch.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        call()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier calls freed would be used again, and not be seen
    switch.write_text("5")  # Linux: forget the highest resident size so far
    before = _resident("VmRSS")
    call()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, work queued on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
