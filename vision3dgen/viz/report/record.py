"""What a run folder says of itself, read without building anything; what is missing or broken is listed, not raised.

A run may have been killed at any moment, or still be training: a reader of its report must see how far it came.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vision3dgen.config import ConfigError, load

RATHER_COUNTS = ("seed", "total", "dims", "count", "n", "words", "kid_size", "kid_subsets", "nearest", "standard_error")
SETTINGS = ("features", "bin_width", "dims", "kid_size", "kid_subsets", "nearest", "words")


class Item(NamedTuple):
    """One scored item: its numbers are means over the repeats that have them."""

    id: str
    category: str
    status: str  # ok, empty, failed
    reason: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The scores of a run under one name on one split.

    protocol: everything that moves the numbers, as far as the files say. kind: what is measured; numbers of different
    kinds have nothing in common. values: the headline numbers, `spread` their deviation over repeats, `ceiling` what
    the truth itself scores. classes: numbers by category.
    """

    name: str
    split: str
    kind: str
    protocol: Mapping[str, Any]
    seed: int | None
    counts: Mapping[str, int]
    values: Mapping[str, float | None]
    spread: Mapping[str, float | None]
    ceiling: Mapping[str, float | None]
    classes: Mapping[str, Mapping[str, float | None]]
    items: Sequence[Item]


@dataclass
class Record:
    """A run folder as it was found; `faults` says in sentences what is not there or cannot be read."""

    name: str
    folder: Path
    config: str = ""  # YAML
    settings: Mapping[str, Any] = field(default_factory=dict)  # the same by dotted key
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Evaluation] = ()
    checkpoints: Sequence[Mapping[str, Any]] = ()  # the meta.json of each, oldest first
    pictures: Sequence[Path] = ()
    faults: list[str] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether there are weights to predict with."""
        return bool(self.config and (self.checkpoints or (self.folder / "model.safetensors").exists()))


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is that of a run, else the runs in it, else itself: a run that never began to write.

    Raises ValueError where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: a report takes run folders, or a folder of run folders")
    if _is_run(folder):
        return [folder]
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and _is_run(child)] or [folder]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints", "evaluation"))


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """A record for each run found in the folders, named as short as they differ. Raises ValueError as `find_runs`."""
    found = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    parts = [run.resolve().parts for run in found]
    names = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(own[-depth:]))
    return [read_run(run, name) for run, name in zip(found, names)]


def read_run(folder: Path, name: str | None = None) -> Record:
    """What is in a run folder; nothing that is wrong with it is raised."""
    record = Record(name or folder.name, folder)
    record.config, record.settings = _config(folder, record.faults)
    record.environment = _environment(folder, record)
    record.metrics = list(_lines(folder / "metrics.jsonl", record.faults)) if record.config else ()
    record.checkpoints = _checkpoints(folder, record)
    asked = record.settings.get("evaluation.protocols")
    order = asked if isinstance(asked, list) else []  # the first is the run's own measure, others follow by name
    found = _evaluations(folder / "evaluation", record.faults)
    record.evaluations = sorted(found, key=lambda e: order.index(e.name) if e.name in order else len(order))
    record.pictures = [path for path in (folder / "samples" / "samples.png",) if path.exists()]
    if record.config and not record.metrics and not (folder / "model.safetensors").exists():
        record.faults.append("metrics.jsonl has no entry: training has not come to its first record")
    if not record.config and not record.evaluations:
        record.faults.append("there is neither a configuration nor a score: this is not a run folder, or an empty one")
    return record


def _config(folder: Path, faults: list[str]) -> tuple[str, Mapping[str, Any]]:
    path = folder / "config.yaml"
    if not path.exists():
        return "", {}
    try:
        return path.read_text(encoding="utf-8"), dict(_dotted(load(path), ""))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        faults.append(f"the configuration cannot be read: {error}")
        return "", {}


def _dotted(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _dotted(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def _environment(folder: Path, record: Record) -> Mapping[str, Any]:
    path = folder / "environment.json"
    if not path.exists():
        if record.config and not (folder / "model.safetensors").exists():
            record.faults.append("environment.json is not there: training was never started")
        return {}
    return _object(path, record.faults)


def _object(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        faults.append(f"{path.name} must hold a JSON object, got {str(content)[:40]}")
        return {}
    return content


def _lines(path: Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, up to the first line that is none."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            left = f"; it and the {len(lines) - number} after it are left out" if number < len(lines) else ""
            faults.append(f"{path.name}, line {number} is cut short or no JSON object{left}")
            return
        yield entry


def _checkpoints(folder: Path, record: Record) -> list[dict[str, Any]]:
    found = []
    for path in sorted((folder / "checkpoints").glob("step_*")):
        meta = path / "meta.json"
        if meta.exists():
            found.append(_object(meta, record.faults))
        else:
            record.faults.append(f"checkpoint {path.name} is not whole: it has no meta.json")
    if record.config and not found and not (folder / "model.safetensors").exists():
        record.faults.append("there is no whole checkpoint: nothing can be predicted")
    return [meta for meta in found if meta]


# ------------------------------------------------------------------------------------------------------- scores


def _evaluations(folder: Path, faults: list[str]) -> list[Evaluation]:
    names = sorted({path.stem for path in folder.glob("*.json*") if not path.name.startswith(".")})
    found = []
    for stem in names:
        own: list[str] = []
        rows = list(_lines(folder / f"{stem}.jsonl", own))
        summary = _object(folder / f"{stem}.json", own) if (folder / f"{stem}.json").exists() else {}
        if summary:
            try:
                found.append(_evaluation(stem, summary, rows))
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                own.append(f"{stem}.json cannot be shown, it is not a summary that evaluate wrote: {error!r}")
        elif not any(fault.startswith(f"{stem}.json ") for fault in own):
            own.append(f"{stem} has no summary: {max(len(rows) - 1, 0)} items are scored, the scoring is not finished")
        faults += [f"evaluation: {fault}" for fault in own]
    return found


def _evaluation(stem: str, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    name, _, split = stem.rpartition("_")
    protocol = summary.get("protocol")
    about = summary.get("about") or {}
    if isinstance(protocol, Mapping) and "aggregation" in protocol:
        kind, values = "shapes", summary[protocol["aggregation"][0]]
    elif isinstance(protocol, Mapping):
        values = summary["mean"]
        kind = "depth" if "abs_rel" in values else "normals" if "within_30" in values else "pictures"
    else:
        kind, values = name, dict(_numbers(summary))
        protocol = {"name": name} | {key: summary[key] for key in SETTINGS if key in summary}
        protocol |= {key: value for key, value in about.items() if key != "weights"}
    classes = summary.get("classes")
    return Evaluation(
        name=name,
        split=split,
        kind=kind,
        protocol=protocol,
        seed=summary.get("seed"),
        counts={key: value for key, value in summary.items() if key.startswith("n_") and isinstance(value, int)},
        values=values,
        spread=summary.get("spread") or {},
        ceiling=summary.get("ceiling") or {},
        classes=classes if isinstance(classes, Mapping) else {},
        items=[_item(row) for row in rows if "id" in row],
    )


def _numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The scores of a summary that names no protocol: its fractions, and the means of what has several values."""
    for key, value in summary.items():
        if isinstance(value, float) and key not in RATHER_COUNTS:
            yield key, value
        elif isinstance(value, Mapping) and isinstance(value.get("mean"), float):
            yield key, value["mean"]
        elif key in ("manifold", "top") and isinstance(value, Mapping):
            yield from ((f"{key} {name}" if key == "top" else name, v) for name, v in value.items())


def _item(row: Mapping[str, Any]) -> Item:
    measured = row.get("metrics", row)
    repeats = measured if isinstance(measured, list) else [measured]
    names = dict.fromkeys(name for values in repeats for name in values)
    metrics = {}
    for name in names:
        known = [v for values in repeats if isinstance(v := values.get(name), int | float) and not isinstance(v, bool)]
        if known and name != "id":
            metrics[name] = sum(known) / len(known)
    return Item(
        str(row["id"]), str(row.get("category", "")), str(row.get("status", "ok")), str(row.get("reason", "")), metrics
    )
