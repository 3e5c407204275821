"""Search spaces of hyper-parameters: what a trial's values are depends on the space, the seed and its number alone.

A space maps keys to distributions, written `{uniform: [a, b]}`, `{log_uniform: [a, b]}`, `{integer: [a, b]}` (both ends
included) or `{choice: [...]}`. Random search (Bergstra and Bengio 2012, Random Search for Hyper-Parameter Optimization)
draws each key on its own; a grid takes all combinations, for which a continuous key says how many `points` it has.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vision3dgen.checks import check_choice
from vision3dgen.engine.seeding import mix

DIGITS = 4  # of the numbers drawn: a value can be typed, and its trial run by hand
TRIAL = 6  # the use of a seed, see `mix`


class Distribution(ABC):
    """The values a key may take."""

    @abstractmethod
    def draw(self, uniform: float) -> Any:
        """The value at this place of [0, 1)."""

    @abstractmethod
    def grid(self) -> list[Any]:
        """The values of a grid, in order; a ValueError where there is no finite set of them."""

    @abstractmethod
    def ends(self) -> list[Any]:
        """Values that between them show whether the key takes such values at all."""


@dataclass(frozen=True)
class Uniform(Distribution):
    """A number between two, even or, with `log`, even in the logarithm."""

    low: float
    high: float
    points: int | None = None  # in a grid, both ends included
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or not all(map(math.isfinite, (self.low, self.high))):
            raise ValueError(f"needs two numbers, the smaller first, got [{self.low}, {self.high}]")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above 0, got [{self.low}, {self.high}]")
        if self.points is not None and self.points < 2:
            raise ValueError(f"points must be at least 2, got {self.points}")

    def draw(self, uniform: float) -> float:
        if self.log:
            value = math.exp(math.log(self.low) + uniform * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + uniform * (self.high - self.low)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def grid(self) -> list[float]:
        if self.points is None:
            raise ValueError("a grid over a range of numbers needs its `points` beside it")
        return [self.draw(index / (self.points - 1)) for index in range(self.points)]

    def ends(self) -> list[float]:
        return [float(self.low), float(self.high)]


@dataclass(frozen=True)
class Integer(Distribution):
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"needs two whole numbers, the smaller first, got [{self.low}, {self.high}]")

    def draw(self, uniform: float) -> int:
        return self.low + int(uniform * (self.high - self.low + 1))

    def grid(self) -> list[int]:
        return list(range(self.low, self.high + 1))

    def ends(self) -> list[int]:
        return [self.low, self.high]


@dataclass(frozen=True)
class Choice(Distribution):
    """One of the values listed, each as likely."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("needs a list of at least one value")

    def draw(self, uniform: float) -> Any:
        return self.values[int(uniform * len(self.values))]

    def grid(self) -> list[Any]:
        return list(self.values)

    def ends(self) -> list[Any]:
        return list(self.values)


Space = Mapping[str, Distribution]
DISTRIBUTIONS = ("uniform", "log_uniform", "integer", "choice")


def distribution(node: Any) -> Distribution:
    """The distribution that `{log_uniform: [1e-4, 1e-2]}` or the like describes; a ValueError says what is wrong."""
    kinds = [key for key in node if key != "points"] if isinstance(node, Mapping) else []
    if len(kinds) != 1:
        raise ValueError(f"must be one of {', '.join(f'{{{kind}: [...]}}' for kind in DISTRIBUTIONS)}, got {node!r}")
    (kind,) = kinds
    check_choice("distribution", kind, DISTRIBUTIONS)
    values, points = node[kind], node.get("points")
    if not isinstance(values, list | tuple):
        raise ValueError(f"{kind} takes a list, got {values!r}")
    if points is not None and (not kind.endswith("uniform") or type(points) is not int):
        raise ValueError(f"points is the number of values of a uniform or log_uniform range, got {points!r} for {kind}")
    if kind == "choice":
        return Choice(tuple(values))
    numbers = (int,) if kind == "integer" else (int, float)
    if len(values) != 2 or any(type(value) not in numbers for value in values):
        raise ValueError(
            f"{kind} takes [low, high], two {'whole ' if kind == 'integer' else ''}numbers, got {values!r}"
        )
    if kind == "integer":
        return Integer(values[0], values[1])
    return Uniform(values[0], values[1], points=points, log=kind == "log_uniform")


def random_trials(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` random combinations; trial i depends on (seed, i) and on each key alone: more trials or keys leave it."""
    if count < 1:
        raise ValueError(f"a random search needs at least 1 trial, got {count}")
    return [
        {
            key: each.draw(float(np.random.default_rng([mix(seed, TRIAL, number), *key.encode()]).random()))
            for key, each in space.items()
        }
        for number in range(count)
    ]


def grid_trials(space: Space) -> list[dict[str, Any]]:
    """All combinations, the last key changing fastest."""
    axes: list[Sequence[Any]] = []
    for key, each in space.items():
        try:
            axes.append(each.grid())
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return [dict(zip(space, values)) for values in itertools.product(*axes)]
