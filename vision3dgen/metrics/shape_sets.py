"""A generator of shapes against the shapes of a split, as two sets of point clouds: MMD, COV, 1-NNA and JSD.

Source: Achlioptas et al. 2018 (arXiv:1707.02392), section 4; Yang et al. 2019 (arXiv:1906.12320), section 5.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite
from vision3dgen.files import atomic_write
from vision3dgen.losses import chamfer_distance, earth_movers_distance
from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict
from vision3dgen.metrics.generation import SetScores, jensen_shannon, set_distances, set_scores


def _chamfer(first: Tensor, second: Tensor) -> Tensor:
    return chamfer_distance(first, second, batch_reduction=None)[0]


def _earth_movers(first: Tensor, second: Tensor) -> Tensor:
    return earth_movers_distance(first, second).distance


SHAPE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chamfer": _chamfer,  # mean squared distance to the nearest point, both ways summed
    "earth_movers": _earth_movers,  # exact: the least mean distance of a one-to-one match
}


class Clouds(NamedTuple):
    """Points of the real shapes of a batch, and of as many generated ones; NaN for a shape without a surface."""

    real: Float[Tensor, "B N 3"]
    generated: Float[Tensor, "B N 3"]


@dataclass(frozen=True)
class ShapeSetScores:
    """Generated shapes against those of a split. Shapes without a surface are failures: counted, and in no score."""

    total: int  # of each kind
    n_failed: int
    points: int  # of a shape
    by_distance: dict[str, SetScores]
    jsd: float  # bits
    seed: int
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return asdict(self) | {"by_distance": {name: each._asdict() for name, each in self.by_distance.items()}}

    def to_markdown(self) -> str:
        """A table, then what it rests on."""
        lines = ["| distance | MMD | COV | 1-NNA |", "| --- | ---: | ---: | ---: |"]
        for name, scores in self.by_distance.items():
            lines.append(f"| {name} | {scores.mmd:.5f} | {scores.coverage:.3f} | {scores.one_nna:.3f} |")
        lines.append("")
        lines.append(
            f"JSD {self.jsd:.4f} bits. {self.total} real and {self.total - self.n_failed} generated shapes of "
            f"{self.points} points, seed {self.seed}. n_failed {self.n_failed}."
        )
        return "\n".join(lines) + "\n"


def compare_sets(
    real: Float[Tensor, "R N 3"], generated: Float[Tensor, "G N 3"], distances: Sequence[str] = ("chamfer",)
) -> dict[str, SetScores]:
    """`set_scores` of two sets of clouds by each of the named distances of `SHAPE_DISTANCES`."""
    check_finite(real=real, generated=generated)
    found = {}
    for name in distances:
        check_choice("distance", name, SHAPE_DISTANCES)
        distance = SHAPE_DISTANCES[name]
        sets = ((generated, real), (generated, generated), (real, real))
        found[name] = set_scores(*(set_distances(first, second, distance) for first, second in sets))
    return found


@dataclass(frozen=True, kw_only=True)
class ShapeSetEvaluator(Evaluator):
    """As many generated shapes as the split has, compared as clouds of `points` points each.

    distances: names of `SHAPE_DISTANCES`. radius: of the ball that the shapes lie in, which JSD scales to its own of
    0.5; the half diagonal of the unit cube by default.
    """

    points: int = 512
    distances: Sequence[str] = ("chamfer", "earth_movers")
    radius: float = 0.75**0.5

    def __post_init__(self) -> None:
        for name in self.distances:
            check_choice("distance", name, SHAPE_DISTANCES)
        if self.points < 1 or not self.radius > 0:
            raise ValueError(f"points must be at least 1 and radius > 0, got {self.points} and {self.radius}")

    @property
    def names(self) -> Sequence[str]:
        return ["generated_shapes"]

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> ShapeSetScores:
        """`predict` gives `Clouds` for each batch. Each line of `out`: id of a real shape, and whether that made
        beside it has a surface.
        """
        ids: list[str] = []
        parts: list[Clouds] = []
        for batch in batches:
            parts.append(predict(batch))
            ids += batch["id"]
        if not parts:
            raise ValueError("there is nothing to evaluate: no batch was given")
        real, made = (torch.cat([getattr(part, kind) for part in parts]) for kind in ("real", "generated"))
        if len(real) != len(ids) or len(made) != len(ids):
            raise ValueError(f"predict must give {len(ids)} shapes of both kinds, got {len(real)} and {len(made)}")
        fine = torch.isfinite(made).flatten(1).all(1)
        if not bool(fine.any()):
            raise ValueError(f"none of the {len(made)} generated shapes has a surface")
        header = {"evaluation": name, "seed": seed, "about": dict(about)}
        rows = [{"id": each, "surface": good} for each, good in zip(ids, fine.tolist())]
        with atomic_write(out) as file:
            file.write("".join(json.dumps(row) + "\n" for row in [header, *rows]).encode())
        made = made[fine]
        return ShapeSetScores(
            total=len(real), n_failed=int((~fine).sum()), points=self.points,
            by_distance=compare_sets(real, made, self.distances),
            jsd=jensen_shannon(real / (2 * self.radius), made / (2 * self.radius)), seed=seed, about=dict(about),
        )  # fmt: skip
