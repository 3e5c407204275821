"""Which scores may stand in one table, and why others may not; which items are worst and best."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vision3dgen.viz.report.record import Evaluation, Record

# Of what the package measures: smaller is better, larger is better.
_SHAPES = (("CD", "Accuracy", "Completeness", "EMD", "Hausdorff"), ("|NC|", "NC", "F1", "Precision", "Recall", "IoU"))
_DEPTH = (
    ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "scale_invariant"),
    ("delta1", "delta2", "delta3", "mask_iou"),
)
_NORMALS = (("mean", "median", "rmse"), ("within_11_25", "within_22_5", "within_30"))
_PICTURES = (("nats", "bits_per_dim", "fid", "kid"), ("inception", "precision", "recall", "density", "coverage"))
_WORDS = (("perplexity",), ("accuracy", "class_mean", "top", "exact", "BLEU"))
_ALL = (_SHAPES, _DEPTH, _NORMALS, _PICTURES, _WORDS)
SMALLER_IS_BETTER = frozenset(name for smaller, _ in _ALL for name in smaller)
LARGER_IS_BETTER = frozenset(name for _, larger in _ALL for name in larger)


def direction(metric: str) -> str | None:
    """ "smaller" or "larger", whichever is better; None for a number this module does not know."""
    stem = metric.partition("@")[0].partition(" ")[0].partition("-")[0]
    return "smaller" if stem in SMALLER_IS_BETTER else "larger" if stem in LARGER_IS_BETTER else None


class Scored(NamedTuple):
    record: Record
    evaluation: Evaluation


class Table(NamedTuple):
    """Scores that differ by the run alone: the same items under the same protocol."""

    scored: Sequence[Scored]

    @property
    def title(self) -> str:
        first = self.scored[0].evaluation
        return f"{first.kind.capitalize()} under {first.name}, {first.split} split"

    @property
    def columns(self) -> list[str]:
        """Metrics that at least one run has; those that others are made of come last."""
        known = (name for s in self.scored for name, value in s.evaluation.values.items() if value is not None)
        parts = ("Accuracy", "Completeness", "Precision", "Recall")
        return sorted(dict.fromkeys(known), key=lambda name: name.startswith(parts))


class Refusal(NamedTuple):
    """Two runs whose numbers must not be compared, and what differs."""

    one: str
    other: str
    reasons: Sequence[str]


class Comparison(NamedTuple):
    """What `compare` found."""

    tables: Sequence[Table]
    refusals: Sequence[Refusal]


def compare(records: Sequence[Record]) -> Comparison:
    """Tables of scores that are comparable; a refusal for each pair of runs that measure the same in different ways."""
    groups: dict[str, list[Scored]] = {}
    for record in records:
        for evaluation in record.evaluations:
            groups.setdefault(_identity(evaluation), []).append(Scored(record, evaluation))
    tables = [Table(group) for group in groups.values()]
    refusals = []
    for index, record in enumerate(records):
        for other in records[index + 1 :]:
            for kind in dict.fromkeys(e.kind for e in record.evaluations):
                mine = [e for e in record.evaluations if e.kind == kind]
                theirs = [e for e in other.evaluations if e.kind == kind]
                if theirs and not {_identity(e) for e in mine} & {_identity(e) for e in theirs}:
                    refusals.append(Refusal(record.name, other.name, list(_differences(mine[0], theirs[0]))))
    return Comparison(tables, refusals)


def _identity(evaluation: Evaluation) -> str:
    """Equal where numbers may be compared. Seeds and repeats may differ: their effect is the spread."""
    ids = sorted(item.id for item in evaluation.items)
    return json.dumps([evaluation.kind, evaluation.split, evaluation.protocol, ids], sort_keys=True, default=str)


def _differences(one: Evaluation, other: Evaluation) -> Iterator[str]:
    if one.split != other.split:
        yield f"split: {one.split} against {other.split}"
    for key in dict.fromkeys([*one.protocol, *other.protocol]):
        mine, theirs = one.protocol.get(key), other.protocol.get(key)
        if mine != theirs:
            yield f"{key}: {_short(mine)} against {_short(theirs)}"
    ids = [{item.id for item in evaluation.items} for evaluation in (one, other)]
    if ids[0] != ids[1]:
        common = len(ids[0] & ids[1])
        yield f"items: {len(ids[0])} against {len(ids[1])}, of which {common} are the same"


def _short(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, default=str)


class Extreme(NamedTuple):
    id: str
    category: str
    value: float


class Extremes(NamedTuple):
    """The items with the worst and the best numbers; of a metric without a known direction the lowest and highest."""

    worst: Sequence[Extreme]
    best: Sequence[Extreme]
    labels: tuple[str, str]


def extremes(evaluation: Evaluation, metric: str, count: int) -> Extremes:
    """At most `count` items at each end, no item at both; ties in the order of the ids."""
    known = [
        Extreme(item.id, item.category, item.metrics[metric])
        for item in sorted(evaluation.items, key=lambda item: item.id)
        if metric in item.metrics and item.status != "failed"
    ]
    better = direction(metric)
    ascending = sorted(known, key=lambda entry: entry.value, reverse=better == "smaller")
    count = min(count, len(ascending) // 2) if len(ascending) > 1 else len(ascending)
    labels = ("lowest", "highest") if better is None else ("worst", "best")
    return Extremes(ascending[:count], ascending[len(ascending) - count :][::-1], labels)


def item_metrics(evaluation: Evaluation) -> list[str]:
    """The numbers that single items have, in the order of the headline where it has them."""
    found = dict.fromkeys(name for item in evaluation.items for name in item.metrics)
    return sorted(found, key=lambda name: list(evaluation.values).index(name) if name in evaluation.values else 10**6)


def principal(evaluation: Evaluation) -> str | None:
    """The number by which items are chosen when nobody asks: the F1 with the largest threshold, else the first."""
    names = item_metrics(evaluation)
    scores = [name for name in names if name.startswith("F1")]
    return scores[-1] if scores else next(iter(names), None)


def differing_settings(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Dotted keys of the configurations whose values differ, with the value of each run that has a configuration.

    None stands for null and for a key that is not there."""
    configured = [record for record in records if record.settings]
    keys = dict.fromkeys(key for record in configured for key in record.settings)
    found = {key: [record.settings.get(key) for record in configured] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
