"""From run folders to one page: what the runs wrote, and pictures and shapes of what they predict now."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vision3dgen.config import ConfigError
from vision3dgen.datasets import CATEGORIES
from vision3dgen.experiment import Run, predictor
from vision3dgen.models import Reconstruction
from vision3dgen.parallel import tracked
from vision3dgen.samples import sample_of, spread_over
from vision3dgen.structures import Meshes
from vision3dgen.viz import Sample, reconstruction_cells
from vision3dgen.viz.report import Record, read_runs, write_page
from vision3dgen.viz.report.comparison import extremes, principal
from vision3dgen.viz.report.page import run_colors
from vision3dgen.viz.scene import Job, Shape

_log = logging.getLogger(__name__)


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    items: int = 5,
    extreme: int = 1,
    device: torch.device | str = "cpu",
    renderer: str = "auto",
) -> Path:
    """Write one self-contained HTML page about the runs in `folders`, each a run folder or a folder of run folders.

    Drawn are `items` of the split that was scored, spread over it, and for each run the `extreme` worst and best ones
    by the principal metric of its first protocol. What is wrong with a run, such as data that is not there, is written
    in the page. Raises ValueError for a folder that does not exist.
    """
    records = read_runs([Path(folder) for folder in folders])
    found = _samples(records, items, extreme, device)
    cells = (
        reconstruction_cells(found, size=(200, 200), colors=run_colors(records), renderer=renderer) if found else None
    )
    for record in records:
        for fault in record.faults:
            _log.warning("%s: %s", record.name, fault)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, records, found, cells.rows if cells else (), names=CATEGORIES)
    return path


def _samples(records: Sequence[Record], items: int, extreme: int, device: torch.device | str) -> list[Sample]:
    """Of each run that can predict, what it makes of the items; samples of one item are joined."""
    trained = [record for record in records if record.is_trained]
    wanted: dict[str, list[str]] = {}  # what each item is an extreme of
    for record in trained:
        for item, what in _extreme_items(record, extreme):
            wanted.setdefault(item, []).append(what)
    joined: dict[str, Sample] = {}
    for record in tracked(trained, title="predicting"):
        try:
            for sample in _predicted(record, items, list(wanted), device):
                known = joined.get(sample.id)
                joined[sample.id] = sample if known is None else _joined(known, sample)
        except (ValueError, OSError, ImportError) as error:
            record.faults.append(f"nothing could be predicted: {error}")
    titled = [
        replace(sample, title=", ".join([sample.title, *wanted.get(sample.id, ())])) for sample in joined.values()
    ]
    return sorted(titled, key=lambda sample: (sample.id in wanted, sample.id))


def _extreme_items(record: Record, count: int) -> Iterator[tuple[str, str]]:
    """Ids, and of which run they are the worst or best."""
    for evaluation in record.evaluations[:1]:
        metric = principal(evaluation)
        if metric is not None:
            worst, best, labels = extremes(evaluation, metric, count)
            for label, entries in zip(labels, (worst, best)):
                yield from ((entry.id, f"{label} of {record.name}") for entry in entries)


def _predicted(record: Record, items: int, wanted: Sequence[str], device: torch.device | str) -> Iterator[Sample]:
    run = Run.open(record.folder)
    model = run.model(device)
    if not isinstance(model, Reconstruction):
        return
    dataset = run.viewable(model)
    scored = [item.id for item in record.evaluations[0].items] if record.evaluations else []
    places = {name: index for index, name in enumerate(scored)} if len(scored) == len(dataset) else {}
    chosen = spread_over(items, len(dataset)) + [places[name] for name in wanted if name in places]
    predict = predictor(model, device)
    for index in dict.fromkeys(chosen):
        item = dataset[index]
        if places and scored[index] != item["id"]:
            raise ConfigError(
                f"item {index} of the data is {item['id']!r}, but {scored[index]!r} was scored: other data"
            )
        yield _captioned(_sound(sample_of(item, {record.name: predict}, takes=model.takes), record), record)


def _sound(sample: Sample, record: Record) -> Sample:
    """Without the shapes that cannot be drawn, which become faults of the run."""
    kept: dict[str, Shape | None] = {}
    for name, shape in sample.predictions.items():
        try:
            Job(shape).drawn  # noqa: B018 - it raises for what is not finite
            kept[name] = shape
        except ValueError as error:
            record.faults.append(f"the shape of {sample.id} cannot be drawn: {error}")
            kept[name] = None
    return replace(sample, predictions=kept)


def _captioned(sample: Sample, record: Record) -> Sample:
    """With the item's principal number under its picture."""
    for evaluation in record.evaluations[:1]:
        metric = principal(evaluation)
        for item in evaluation.items:
            if metric is not None and item.id == sample.id and metric in item.metrics:
                text = f"{metric} {item.metrics[metric]:.3f}"
                column = record.name if record.name in sample.predictions else f"{record.name} depth"
                return replace(sample, captions={column: text})
    return sample


def _joined(one: Sample, other: Sample) -> Sample:
    """What several runs make of one item; a mesh is the truth before a cloud is."""
    truth = other.truth if isinstance(other.truth, Meshes) and not isinstance(one.truth, Meshes) else one.truth
    return replace(
        one,
        truth=truth,
        predictions={**one.predictions, **other.predictions},
        captions={**one.captions, **other.captions},
        pictures={**one.pictures, **other.pictures},
    )
