"""What a table says of a set of items: a mean per class, both averages, the sampling ceiling, the spread over repeats,
and how many predictions were empty, failed or could not be measured. docs/metrics.md says what each counts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

Row = dict[str, Any]  # what is kept of one item, a line of a results file

Values = dict[str, float | None]


@dataclass(frozen=True)
class Summary:
    """Averages of a run with all that qualifies them. Values are None where no item defines them."""

    protocol: dict[str, Any]
    seed: int
    repeats: int
    about: dict[str, Any]
    n_ok: int
    n_empty: int
    n_failed: int
    points: dict[str, list[int]]  # fewest and most drawn on "prediction", "target", "ceiling"
    classes: dict[str, Values]  # category -> column -> mean
    class_sizes: dict[str, int]
    class_mean: Values
    per_instance: Values
    scored: dict[str, int]  # column -> number of items in its mean
    ceiling: Values  # headline average of target against target
    spread: Values  # standard deviation over repeats of the headline average; None for one repeat
    empty: list[str]
    failures: dict[str, str]  # id -> reason
    unmeasured: dict[str, dict[str, int]]  # column -> why it is not there -> in how many items

    @property
    def headline(self) -> Values:
        """The average that the protocol's authors report."""
        return self.class_mean if self.protocol["aggregation"][0] == "class_mean" else self.per_instance

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The table: classes, averages, spread and ceiling; without precision, recall and the one-way distances."""
        details = ("Precision", "Recall", "Accuracy", "Completeness")
        columns = [name for name in self.scored if not name.startswith(details)]
        total = self.n_ok + self.n_empty + self.n_failed
        table = [[name, str(self.class_sizes[name]), *_cells(self.classes[name], columns)] for name in self.classes]
        averages = {"class_mean": self.class_mean, "per_instance": self.per_instance}
        for name in ("class_mean", "per_instance"):
            mark = "**" if name == self.protocol["aggregation"][0] else ""
            label = f"{mark}{name.replace('_', ' ')}{mark}"
            table.append([label, str(total), *_cells(averages[name], columns)])
        table.append(["items in the mean", "", *(str(self.scored[name]) for name in columns)])
        table.append([f"spread (std of {self.repeats} repeats)", "", *_cells(self.spread, columns)])
        table.append(["ceiling (truth against truth)", "", *_cells(self.ceiling, columns)])
        head = ["class", "n", *columns]
        lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1)), *map(_line, table), ""]
        drawn = ", ".join(f"{name} {_range(*bounds)}" for name, bounds in self.points.items())
        lines.append(
            f"Protocol {self.protocol['name']} ({self.protocol['citation']}), seed {self.seed}. Points drawn: "
            f"{drawn or 'none'}. n_ok {self.n_ok}, n_empty {self.n_empty}, n_failed {self.n_failed}."
        )
        if "split" in self.about:
            lines.append(f"Split {self.about['split']['name']}, sha256 {self.about['split']['sha256']}.")
        lines += [f"Empty: {', '.join(self.empty)}."] if self.empty else []
        lines += [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]
        for name, reasons in self.unmeasured.items():
            lines += [f"Not measured: {name}: {reason} ({count} items)" for reason, count in reasons.items()]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(values: Values, columns: Sequence[str]) -> list[str]:
    found = [values.get(name) for name in columns]
    return ["-" if value is None else f"{value:.4g}" for value in found]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def summarize(header: Mapping[str, Any], rows: Iterable[Row]) -> Summary:
    """Averages of rows written under one header, whatever their order.

    A failed or empty prediction scores 0 in every F1, precision, recall and IoU that other items have, so that crashing
    never pays; distances and normals average the items that define them. An item whose target is broken
    is counted as failed and averaged nowhere.
    """
    rows = sorted(rows, key=lambda row: row["id"])
    repeats, aggregation = header["repeats"], header["protocol"]["aggregation"][0]
    present = {name for row in rows for metrics in row["metrics"] for name, v in metrics.items() if v is not None}
    ordered = dict.fromkeys(name for row in rows for metrics in row["metrics"] for name in metrics)
    columns = [name for name in ordered if name in present]
    worst: Values = {name: 0.0 if name.startswith(("F1", "Precision", "Recall", "IoU")) else None for name in columns}
    per_repeat: list[list[tuple[str, Values]]] = [[] for _ in range(repeats)]
    for row in rows:
        if row["fault"] == "target":
            continue
        for repeat in range(repeats):
            values = row["metrics"][repeat] if row["metrics"] else {}
            if row["status"] != "ok":
                values = {name: worst[name] if values.get(name) is None else values[name] for name in columns}
            per_repeat[repeat].append((row["category"], values))

    averaged = [_averages(pairs, columns) for pairs in per_repeat]
    classes = {name: _over([a.classes[name] for a in averaged], columns) for name in averaged[0].classes}
    heads = [a.class_mean if aggregation == "class_mean" else a.per_instance for a in averaged]
    ceilings = [(row["category"], row["ceiling"]) for row in rows if row["ceiling"]]
    ceiling = _averages(ceilings, list(dict.fromkeys(name for _, values in ceilings for name in values)))
    categories = [row["category"] for row in rows]
    drawn: dict[str, list[int]] = {}
    for row in rows:
        for name, count in row["points"].items():
            low, high = drawn.get(name, (count, count))
            drawn[name] = [min(low, count), max(high, count)]
    status = [row["status"] for row in rows]
    return Summary(
        protocol=dict(header["protocol"]),
        seed=header["seed"],
        repeats=repeats,
        about=dict(header["about"]),
        n_ok=status.count("ok"),
        n_empty=status.count("empty"),
        n_failed=status.count("failed"),
        points=drawn,
        classes=classes,
        class_sizes={name: categories.count(name) for name in sorted(set(categories))},
        class_mean=_over([a.class_mean for a in averaged], columns),
        per_instance=_over([a.per_instance for a in averaged], columns),
        scored={name: sum(values.get(name) is not None for _, values in per_repeat[0]) for name in columns},
        ceiling=ceiling.class_mean if aggregation == "class_mean" else ceiling.per_instance,
        spread={name: _std([head[name] for head in heads]) for name in columns},
        empty=[row["id"] for row in rows if row["status"] == "empty"],
        failures={row["id"]: row["reason"] for row in rows if row["status"] == "failed"},
        unmeasured=_counted(rows),
    )


def _counted(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        for name, reason in row.get("unmeasured", {}).items():  # files of earlier versions lack it
            of_column = counts.setdefault(name, {})
            of_column[reason] = of_column.get(reason, 0) + 1
    return counts


class _Averages(NamedTuple):
    classes: dict[str, Values]
    class_mean: Values
    per_instance: Values


def _averages(pairs: Sequence[tuple[str, Values]], columns: Sequence[str]) -> _Averages:
    names = sorted({name for name, _ in pairs})
    classes = {name: _over([values for owner, values in pairs if owner == name], columns) for name in names}
    return _Averages(classes, _over(list(classes.values()), columns), _over([v for _, v in pairs], columns))


def _over(values: Sequence[Values], columns: Sequence[str]) -> Values:
    """Mean of each column over those that define it."""
    means: Values = {}
    for name in columns:
        known = [value for v in values if (value := v.get(name)) is not None]
        means[name] = math.fsum(known) / len(known) if known else None
    return means


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
