"""Indices of items divided into folds and splits, the same for the same seed."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch

from vision3dgen.engine.seeding import mix


class Fold(NamedTuple):
    """The indices of one round of cross-validation, ascending."""

    train: list[int]
    val: list[int]


def k_fold(n: int, k: int, seed: int = 0, labels: Sequence[Hashable] | None = None) -> list[Fold]:
    """The k rounds of cross-validation over `range(n)`: each item is in `val` once, and fold sizes differ by at most 1.

    With `labels`, one of each item, the folds are stratified: the numbers of a label in two folds differ by at most 1.
    Source: Kohavi 1995.
    """
    if not 2 <= k <= n:
        raise ValueError(f"k must be from 2 to the {n} items, got {k}")
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must be one for each of the {n} items, got {len(labels)}")
    order = _permutation(n, seed)
    if labels is not None:
        first = {label: place for place, label in reversed(list(enumerate(labels)))}
        order.sort(key=lambda index: first[labels[index]])  # stable: label by label, and dealt out on from there
    held = [sorted(order[fold::k]) for fold in range(k)]
    return [Fold(sorted(set(range(n)) - set(val)), val) for val in held]


def split(n: int, fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[int]]:
    """`range(n)` divided by named fractions, as in `split(1000, {"train": 0.8, "val": 0.1, "test": 0.1})`.

    The fractions must add up to 1. Sizes are n times the fraction rounded by largest remainder (the earlier name at a
    tie), so that they add up to n; a split of a positive fraction that would be empty is a ValueError. Indices ascend.
    """
    if not fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-9:
        raise ValueError(f"fractions must be >= 0 and add up to 1, got {dict(fractions)}")
    exact = {name: n * fraction for name, fraction in fractions.items()}
    sizes = {name: int(size + 1e-9) for name, size in exact.items()}
    by_remainder = sorted(fractions, key=lambda name: sizes[name] - exact[name])
    for name in by_remainder[: n - sum(sizes.values())]:
        sizes[name] += 1
    empty = [name for name, fraction in fractions.items() if fraction > 0 and not sizes[name]]
    if empty:
        raise ValueError(f"{n} items are too few for fractions {dict(fractions)}: {empty} would be empty")
    order, start, parts = _permutation(n, seed), 0, {}
    for name, size in sizes.items():
        parts[name] = sorted(order[start : start + size])
        start += size
    return parts


def _permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, 5))).tolist()
