"""Search spaces: what is drawn stays in range, is distributed as said, and depends on seed and number alone."""

import math

import pytest

from vision3dgen.engine import Choice, Integer, Uniform, distribution, grid_trials, random_trials

SPACE = {
    "lr": Uniform(1e-4, 1e-1, log=True),
    "decay": Uniform(-1.0, 3.0),
    "layers": Integer(2, 4),
    "name": Choice(("sgd", "adam")),
}


def test_random_values_are_distributed_as_the_space_says():
    trials = random_trials(SPACE, 600, 7)
    logs = [math.log10(trial["lr"]) for trial in trials]
    assert -4 <= min(logs) < -3.9
    assert -1.1 < max(logs) <= -1
    for edge in (-3, -2):  # a third of the draws lies in each decade, give or take 4 standard deviations
        assert sum(log < edge for log in logs) / 600 == pytest.approx((edge + 4) / 3, abs=0.08)
    decays = [trial["decay"] for trial in trials]
    assert -1 <= min(decays) < max(decays) <= 3
    assert sum(decays) / 600 == pytest.approx(1, abs=4 * 4 / math.sqrt(12 * 600))
    for value in (2, 3, 4):
        assert sum(trial["layers"] == value for trial in trials) == pytest.approx(200, abs=50)
    assert {type(trial["layers"]) for trial in trials} == {int}
    assert sum(trial["name"] == "sgd" for trial in trials) == pytest.approx(300, abs=50)
    # Keys are independent: half of those with a large lr have a large decay, and so on
    large = [trial for trial, log in zip(trials, logs) if log > -2.5]
    assert sum(trial["decay"] > 1 for trial in large) / len(large) == pytest.approx(0.5, abs=0.12)
    assert sum(trial["name"] == "sgd" for trial in large) / len(large) == pytest.approx(0.5, abs=0.12)


def test_a_trial_depends_on_seed_and_number_only():
    five = random_trials(SPACE, 5, 1)
    assert random_trials(SPACE, 9, 1)[:5] == five
    assert random_trials(SPACE, 5, 2) != five
    more = {"first": Choice((1, 2)), **SPACE}
    assert [{key: trial[key] for key in SPACE} for trial in random_trials(more, 5, 1)] == five


def test_values_have_few_digits_and_stay_in_range():
    narrow = {"x": Uniform(0.123456, 0.123459)}
    assert all(0.123456 <= trial["x"] <= 0.123459 for trial in random_trials(narrow, 50, 0))
    assert all(float(f"{trial['lr']:.4g}") == trial["lr"] for trial in random_trials(SPACE, 50, 0))


def test_a_grid_takes_all_combinations_the_last_key_fastest():
    space = {"a": Choice(("x", None)), "b": Integer(1, 2), "c": Uniform(1.0, 100.0, points=3, log=True)}
    trials = grid_trials(space)
    assert len(trials) == 2 * 2 * 3
    assert [trial["c"] for trial in trials[:3]] == [1, 10, 100]
    assert trials[:4:3] == [{"a": "x", "b": 1, "c": 1}, {"a": "x", "b": 2, "c": 1}]
    assert Uniform(0.0, 1.0, points=5).grid() == [0, 0.25, 0.5, 0.75, 1]
    assert Integer(3, 3).grid() == Integer(3, 3).ends()[:1] == [3]


def test_a_grid_over_a_range_needs_points():
    with pytest.raises(ValueError, match="decay: a grid over a range"):
        grid_trials({"decay": Uniform(0.0, 1.0)})


@pytest.mark.parametrize(
    "node, found",
    [
        ({"uniform": [0, 1]}, Uniform(0, 1)),
        ({"log_uniform": [1e-4, 1], "points": 3}, Uniform(1e-4, 1, points=3, log=True)),
        ({"integer": [1, 8]}, Integer(1, 8)),
        ({"choice": [[1, 2], None]}, Choice(([1, 2], None))),
    ],
)
def test_distributions_are_read(node, found):
    assert distribution(node) == found


@pytest.mark.parametrize(
    "node, message",
    [
        (3, "must be one of"),
        ({"uniform": [0, 1], "choice": [1]}, "must be one of"),
        ({"loguniform": [0, 1]}, "did you mean 'log_uniform'"),
        ({"uniform": [1, 0]}, "smaller first"),
        ({"uniform": [0, math.inf]}, "smaller first"),
        ({"uniform": [0, 1, 2]}, "two numbers"),
        ({"uniform": [0, "1"]}, "two numbers"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"integer": [0, 1.5]}, "two whole numbers"),
        ({"integer": [False, True]}, "two whole numbers"),
        ({"integer": [2, 1]}, "smaller first"),
        ({"choice": []}, "at least one value"),
        ({"choice": "sgd"}, "takes a list"),
        ({"choice": [1, 2], "points": 2}, "points is the number"),
        ({"uniform": [0, 1], "points": 1}, "points must be at least 2"),
    ],
)
def test_what_is_no_distribution_is_said(node, message):
    with pytest.raises(ValueError, match=message):
        distribution(node)


def test_a_random_search_needs_trials():
    with pytest.raises(ValueError, match="at least 1 trial"):
        random_trials(SPACE, 0, 0)
