"""Folds and splits: disjoint, covering, balanced, deterministic."""

from collections import Counter

import pytest

from vision3dgen.engine import Fold, k_fold, split


@pytest.mark.parametrize("n, k", [(13, 2), (13, 5), (13, 13), (29, 7)])
def test_folds_are_disjoint_cover_and_are_balanced(n: int, k: int):
    folds = k_fold(n, k, seed=3)
    assert len(folds) == k
    assert sorted(index for fold in folds for index in fold.val) == list(range(n))
    assert all(sorted(fold.train + fold.val) == list(range(n)) for fold in folds)
    sizes = [len(fold.val) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert folds == k_fold(n, k, seed=3)
    assert folds != k_fold(n, k, seed=4)


def test_folds_are_shuffled():
    assert k_fold(101, 2)[0].val not in (list(range(51)), list(range(0, 101, 2)))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_stratified_folds_hold_each_label_alike(k: int):
    labels = ["a"] * 17 + ["b"] * 11 + ["c"] * 3 + ["a"] * 2
    folds = k_fold(len(labels), k, seed=1, labels=labels)
    assert sorted(index for fold in folds for index in fold.val) == list(range(33))
    for label in "abc":
        counts = [Counter(labels[index] for index in fold.val)[label] for fold in folds]
        assert max(counts) - min(counts) <= 1, (label, counts)
    sizes = [len(fold.val) for fold in folds]
    assert max(sizes) - min(sizes) <= 1


def test_plain_folds_need_not_hold_each_label_alike():
    labels = [0] * 6 + [1] * 6
    spread = [
        max(counts) - min(counts)
        for seed in range(20)
        for counts in [[sum(labels[i] for i in fold.val) for fold in k_fold(12, 3, seed)]]
    ]
    assert max(spread) > 1  # else the test above would show nothing


def test_a_split_is_disjoint_covers_and_is_deterministic():
    parts = split(101, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=7)
    assert {name: len(indices) for name, indices in parts.items()} == {"train": 81, "val": 10, "test": 10}
    assert sorted(index for indices in parts.values() for index in indices) == list(range(101))
    assert all(indices == sorted(indices) for indices in parts.values())
    assert parts == split(101, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=7)
    assert parts != split(101, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=8)


@pytest.mark.parametrize(
    "n, fractions, sizes",
    [
        (10, [0.7, 0.2, 0.1], [7, 2, 1]),  # 0.7 + 0.2 + 0.1 is not 1 in binary
        (10, [1 / 3, 1 / 3, 1 / 3], [4, 3, 3]),
        (7, [0.5, 0.25, 0.25], [3, 2, 2]),
        (5, [1.0, 0.0], [5, 0]),
    ],
)
def test_sizes_by_largest_remainder(n: int, fractions: list[float], sizes: list[int]):
    parts = split(n, {str(place): fraction for place, fraction in enumerate(fractions)})
    assert [len(indices) for indices in parts.values()] == sizes


def test_what_cannot_be_divided_is_named():
    assert k_fold(2, 2)[0] in (Fold([0], [1]), Fold([1], [0]))
    with pytest.raises(ValueError, match="k must be from 2 to the 5 items, got 6"):
        k_fold(5, 6)
    with pytest.raises(ValueError, match="k must be from 2 to the 5 items, got 1"):
        k_fold(5, 1)
    with pytest.raises(ValueError, match="one for each of the 5 items, got 2"):
        k_fold(5, 2, labels=[0, 1])
    with pytest.raises(ValueError, match="add up to 1, got"):
        split(10, {"train": 0.8, "val": 0.1})
    with pytest.raises(ValueError, match="must be >= 0"):
        split(10, {"train": 1.5, "val": -0.5})
    with pytest.raises(ValueError, match=r"4 items are too few .* \['val'\] would be empty"):
        split(4, {"train": 0.95, "val": 0.05})
