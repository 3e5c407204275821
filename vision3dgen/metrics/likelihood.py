"""Likelihoods of a split: nats, and bits per dimension at the data's own scale."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.files import atomic_write
from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict


def bits_per_dim(log_prob: Float[Tensor, "*B"], dims: int, bin_width: float = 1.0) -> Float[Tensor, "*B"]:
    """-log2 p of one of `dims` values, given log p of all of them in nats.

    bin_width: 1 for a probability of discrete data. For a density of data with noise added it is the width of a level
    in the units of the density: 1/256 for 8 bits in [0, 1), 2/256 in [-1, 1); the result is an upper bound then.
    """
    if dims < 1 or not bin_width > 0:
        raise ValueError(f"dims must be at least 1 and bin_width > 0, got {dims} and {bin_width}")
    return -(log_prob / dims + math.log(bin_width)) / math.log(2)


@dataclass(frozen=True)
class LikelihoodScores:
    """What a generator makes of a split: means over the images it can tell a number of."""

    nats: float
    bits_per_dim: float
    standard_error: float  # of nats
    total: int
    n_failed: int  # log p is not a number, or infinite
    dims: int
    bin_width: float
    seed: int
    failures: list[str] = field(default_factory=list)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        named = {"nats": self.nats, "bits_per_dim": self.bits_per_dim, "standard_error": self.standard_error}
        counts = {"total": self.total, "n_failed": self.n_failed, "dims": self.dims, "bin_width": self.bin_width}
        return {**named, **counts, "seed": self.seed, "failures": self.failures, "about": dict(self.about)}

    def to_markdown(self) -> str:
        head = "| nats | standard error | bits/dim | images | failed |\n|---:|---:|---:|---:|---:|\n"
        numbers = f"| {self.nats:.3f} | {self.standard_error:.3f} | {self.bits_per_dim:.4f} "
        return f"{head}{numbers}| {self.total} | {self.n_failed} |\n"


@dataclass(frozen=True, kw_only=True)
class LikelihoodEvaluator(Evaluator):
    """Mean of -log p over a split, from log p (B,) in nats that `predict` gives for batch["image"].

    bin_width: as in `bits_per_dim`, 1 for models of discrete values.
    """

    batch_size: int = 64
    bin_width: float = 1.0

    def __post_init__(self) -> None:
        if not self.bin_width > 0:
            raise ValueError(f"bin_width must be > 0, got {self.bin_width}")

    @property
    def names(self) -> Sequence[str]:
        return ["likelihood"]

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> LikelihoodScores:
        """Each line of `out`: id, nats, bits_per_dim; null where log p is not finite."""
        rows: list[dict[str, Any]] = []
        sizes = set()
        for batch in batches:
            log_prob = predict(batch).detach().double().cpu()
            if log_prob.shape != (len(batch["id"]),):
                raise ValueError(f"predict must give log p ({len(batch['id'])},), got {tuple(log_prob.shape)}")
            sizes.add(math.prod(batch["image"].shape[1:]))
            bits = bits_per_dim(log_prob, max(sizes), self.bin_width)
            for item, value, bit in zip(batch["id"], log_prob.tolist(), bits.tolist()):
                good = math.isfinite(value)
                rows.append({"id": item, "nats": -value if good else None, "bits_per_dim": bit if good else None})
        if not rows:
            raise ValueError("there is nothing to evaluate: no batch was given")
        if len(sizes) > 1:
            raise ValueError(f"images must be of one size, got {sorted(sizes)} values")
        with atomic_write(out) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        nats = torch.tensor([row["nats"] for row in rows if row["nats"] is not None], dtype=torch.float64)
        failures = [row["id"] for row in rows if row["nats"] is None]
        if not len(nats):
            raise ValueError(f"log p is not finite for any of the {len(rows)} images")
        (dims,) = sizes
        mean = float(nats.mean())
        error = float(nats.std() / math.sqrt(len(nats))) if len(nats) > 1 else math.nan
        bits_mean = float(bits_per_dim(-nats.mean(), dims, self.bin_width))
        return LikelihoodScores(
            mean, bits_mean, error, len(rows), len(failures), dims, self.bin_width, seed, failures, about
        )
