"""The evaluation of detectors: average precision under named protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from vision3dgen.checks import check_choice
from vision3dgen.metrics.detection_protocols import DETECTION_PROTOCOLS, DetectionProtocol, MaskIoU, MeshF1
from vision3dgen.metrics.items import Failure, ItemEvaluator, cell, class_name, failures_of
from vision3dgen.metrics.overlap import ImageRecord, Truths, check_detections, empty_record, record_of
from vision3dgen.metrics.precision import average_precision, headlines, mean_of_known
from vision3dgen.metrics.results import Batch, Row
from vision3dgen.structures import Meshes


@dataclass(frozen=True)
class DetectionScores:
    """Average precision of a set of images. Values are None where there is nothing to find."""

    protocol: dict[str, Any]
    seed: int
    about: dict[str, Any]
    n_images: int
    n_failed: int  # images without a prediction: nothing was found in them
    n_objects: int  # to be found, of all sizes
    n_detections: int
    metrics: dict[str, float | None]  # AP, AP50, AP75, AP_small, ..., AR_100, ...
    per_class: dict[str, dict[str, float | None]]  # AP and AP50 by class
    class_sizes: dict[str, int]
    failures: dict[str, str]  # id -> reason

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A line per class, then every number, and what they rest on."""
        columns = list(next(iter(self.per_class.values()), {"AP": None}))
        lines = [f"| class | objects | {' | '.join(columns)} |", "| --- | ---: |" + " ---: |" * len(columns)]
        for name, values in self.per_class.items():
            row = " | ".join(cell(values[column]) for column in columns)
            lines.append(f"| {name.replace('|', '/')} | {self.class_sizes[name]} | {row} |")
        means = " | ".join(cell(self.metrics.get(column)) for column in columns)
        lines += [f"| **mean** | {self.n_objects} | {means} |", "", "| metric | value |", "| --- | ---: |"]
        lines += [f"| {name} | {cell(value)} |" for name, value in self.metrics.items()]
        lines += [
            "",
            f"Protocol {self.protocol['name']} ({self.protocol['citation']}). {self.n_images} images, "
            f"{self.n_detections} detections of {self.n_objects} objects, n_failed {self.n_failed}.",
        ]
        lines += [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluator(ItemEvaluator):
    """A detector's `Detections` against boxes and labels of the batch, under the protocols named.

    Protocols of masks and meshes need these too. crowd, difficult (ignored) and areas are used where the batch has
    them. classes: the names of the labels from 1, for the tables.
    """

    needs: ClassVar[tuple[str, ...]] = ("boxes", "labels")

    protocols: list[str] = field(default_factory=lambda: ["coco_boxes"])
    classes: list[str] = field(default_factory=list)
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in self.protocols:
            check_choice("protocol", name, DETECTION_PROTOCOLS)

    @property
    def names(self) -> Sequence[str]:
        return self.protocols

    @property
    def choices(self) -> Sequence[str]:
        return sorted(DETECTION_PROTOCOLS)

    def describe(self, name: str) -> dict[str, Any]:
        return DETECTION_PROTOCOLS[name].to_dict()

    def row(self, name: str, prediction: Any, batch: Batch, index: int, *, seed: int) -> Row:
        protocol, item = DETECTION_PROTOCOLS[name], batch["id"][index]
        truths, failure = truths_of(batch, index, protocol), ""
        if isinstance(prediction, Failure):
            failure = prediction.reason
        else:
            try:
                check_detections(prediction)
            except ValueError as error:
                failure = str(error)
        if failure:
            record = empty_record(truths, protocol, id=item)
        else:
            record = record_of(prediction, truths, protocol, id=item, seed=seed)
        return {**record.to_row(), "failure": failure}

    def scores(self, name: str, rows: Sequence[Row], *, seed: int, about: Mapping[str, Any]) -> DetectionScores:
        return summarize_detections(
            [ImageRecord.from_row(row) for row in rows],
            DETECTION_PROTOCOLS[name],
            classes=self.classes,
            failures=failures_of(rows),
            seed=seed,
            about=about,
        )


def truths_of(batch: Batch, index: int, protocol: DetectionProtocol) -> Truths:
    """What is true about one image of a batch, as far as the protocol asks."""
    needed = {MaskIoU: "masks", MeshF1: "mesh"}.get(type(protocol.overlap))
    if needed is not None and needed not in batch:
        raise ValueError(f"protocol {protocol.name!r} needs the batch key {needed!r}; the batch has {sorted(batch)}")
    given = {key: batch[key][index] if key in batch else None for key in ("crowd", "difficult", "areas")}
    return Truths(
        batch["boxes"][index],
        batch["labels"][index],
        masks=batch["masks"][index] if needed == "masks" else None,
        meshes=_members(batch, index) if needed == "mesh" else None,
        crowd=given["crowd"],
        ignored=given["difficult"],
        areas=given["areas"],
    )


def _members(batch: Batch, index: int) -> Meshes:
    """The meshes of one image: members of the batch's are in the order of all its boxes."""
    counts = [len(boxes) for boxes in batch["boxes"]]
    if len(batch["mesh"]) != sum(counts):
        raise ValueError(f"a batch with {sum(counts)} boxes must have as many meshes, got {len(batch['mesh'])}")
    start = sum(counts[:index])
    return batch["mesh"][torch.arange(start, start + counts[index])]


def summarize_detections(
    records: Sequence[ImageRecord], protocol: DetectionProtocol, *, classes: Sequence[str] = (),
    failures: Mapping[str, str] | None = None, seed: int = 0, about: Mapping[str, Any] | None = None,
) -> DetectionScores:  # fmt: skip
    """The scores of records made under one protocol, in any order; `classes` are the names of the labels from 1."""
    if not records:
        raise ValueError("there is nothing to evaluate: no image was given")
    result = average_precision(records, protocol)
    names = [class_name(label, classes, first=1) if protocol.by_class else "all" for label in result.labels.tolist()]
    columns: dict[str, Any] = {"AP": slice(None)}
    if 0.5 in protocol.thresholds:
        half = protocol.thresholds.index(0.5)
        columns["AP50"] = slice(half, half + 1)
    per_class = {
        name: {column: mean_of_known(result.ap[k, rows, 0, -1]) for column, rows in columns.items()}
        for k, name in enumerate(names)
    }
    return DetectionScores(
        protocol=protocol.to_dict(),
        seed=seed,
        about=dict(about or {}),
        n_images=len(records),
        n_failed=len(failures or {}),
        n_objects=int(result.objects[:, 0].sum()),
        n_detections=sum(len(record.scores) for record in records),
        metrics=headlines(result, protocol),
        per_class=per_class,
        class_sizes=dict(zip(names, result.objects[:, 0].tolist())),
        failures=dict(failures or {}),
    )
