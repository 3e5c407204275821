"""Scores of a whole set of items, resumable, with nothing dropped in silence.

`evaluate` writes one JSON line per item and returns a `Summary`: a table per class, both averages, the sampling
ceiling, the spread over repeats, and how many predictions were empty or failed. docs/metrics.md says what each counts.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision3dgen.checks import check_finite
from vision3dgen.metrics.protocols import PointIoU, Protocol, VoxelIoU
from vision3dgen.metrics.shape import (
    COMPARE,
    check_frames,
    check_samples,
    generator,
    point_iou,
    score_shape,
    shape_problem,
    surface_metrics,
    unit_frame,
    voxel_iou,
)
from vision3dgen.ops.inside import contains
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds

Row = dict[str, Any]


class Prediction(NamedTuple):
    """What a model says about one item.

    shape: one mesh or cloud, None when nothing was extracted; voxels: (D, H, W) probabilities filling [-0.5, 0.5]^3 of
    the object frame; occupancy: maps points (N, 3) of the object frame, on the truth's device, to probabilities (N,);
    frame: where the coordinates live, needed with any of these; failure: why there is no prediction (a time-out, say);
    maps: pictures (C, H, W) by the name of what they predict, such as "depth".
    """

    shape: Meshes | Pointclouds | None = None
    voxels: Tensor | None = None
    occupancy: Callable[[Tensor], Tensor] | None = None
    frame: Frame | None = None
    failure: str | None = None
    maps: Mapping[str, Tensor] = MappingProxyType({})


class _Item(NamedTuple):
    """What is true about one item, in its object frame; `target` in the protocol's."""

    id: str
    category: str
    frame: Frame
    camera: Camera | None
    target: Meshes | Pointclouds | None
    target_frame: Frame
    voxels: Tensor | None  # (D, H, W)
    points: Tensor | None  # (N, 3)
    occupancies: Tensor | None  # (N,)


# -------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    items: Iterable[Mapping[str, Any]],
    predict: Callable[[Mapping[str, Any]], Sequence[Prediction]],
    protocol: Protocol,
    *,
    out: str | os.PathLike[str] | None,
    seed: int,
    repeats: int,
    about: Mapping[str, Any] | None = None,
) -> "Summary":
    """Score `predict` on every item of a loader's batches under a protocol.

    items: batches with keys id, category, frame, and what the protocol needs of mesh, surface, voxels, points,
    occupancies, camera. predict: one `Prediction` per item of a batch, called without gradients.
    out: file of one JSON line per item after a header; items already in it are not predicted again, and a line cut by a
    kill is dropped. repeats: independent samplings of every shape; the spread is taken over them.
    about: free entries for the header, such as the checkpoint's hash: results of another header are never mixed in.

    An exception in `predict` fails its batch, one in scoring its item; both are counted and listed. Raises ValueError
    for what is wrong with all items alike: frames that differ, missing keys, an id seen twice, another header in `out`.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    header = {"protocol": protocol.to_dict(), "seed": seed, "repeats": repeats, "about": dict(about or {})}
    header = json.loads(json.dumps(header, allow_nan=False))
    done: dict[str, Row] = {} if out is None else _resume(Path(out), header)
    rows: list[Row] = []
    seen: set[str] = set()
    with nullcontext() if out is None else open(out, "a", encoding="utf-8") as file:
        for batch in items:
            truths = _items(batch, protocol)
            for truth in truths:
                if truth.id in seen:
                    raise ValueError(f"item {truth.id!r} comes twice: every id must be scored once")
                seen.add(truth.id)
            pending = [index for index, truth in enumerate(truths) if truth.id not in done]
            rows += [done[truth.id] for truth in truths if truth.id in done]
            if not pending:
                continue
            start = time.perf_counter()
            predictions = _predict(predict, batch, len(truths))
            share = (time.perf_counter() - start) / len(truths)
            for index in pending:
                start = time.perf_counter()
                row = _score(predictions[index], truths[index], protocol, seed, repeats)
                row["seconds"] = round(share + time.perf_counter() - start, 4)
                rows.append(row)
                if file is not None:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
    return summarize(header, rows)


def _predict(predict: Callable[..., Sequence[Prediction]], batch: Mapping[str, Any], size: int) -> list[Prediction]:
    try:
        with torch.no_grad():
            predictions = list(predict(batch))
    except Exception as error:  # the reason is written to every row of the batch and counted
        return [Prediction(failure=f"predict: {type(error).__name__}: {error}")] * size
    if len(predictions) != size:
        raise ValueError(f"predict must give one Prediction per item, got {len(predictions)} for {size}")
    return predictions


def _items(batch: Mapping[str, Any], protocol: Protocol) -> list[_Item]:
    """The truth of each item of a batch, checked for what the protocol asks of all."""
    needed = ["id", "category", "frame"] + ([protocol.target] if protocol.samples is not None else [])
    needed += ["camera"] if protocol.frame == "camera" else []
    missing = [key for key in needed if key not in batch]
    if missing:
        raise ValueError(f"protocol {protocol.name!r} needs the batch keys {missing}; the batch has {sorted(batch)}")
    result = []
    for index, name in enumerate(batch["id"]):
        if protocol.views == "first" and name.count("/") == 2 and name.rsplit("/", 1)[1].lstrip("0"):
            raise ValueError(f"protocol {protocol.name!r} scores view 0 of each model, got {name!r}")
        frame = batch["frame"][index]
        camera = batch["camera"][index] if "camera" in batch else None
        target, target_frame = None, frame
        if protocol.samples is not None:
            target, target_frame = batch[protocol.target][index], frame
            if not shape_problem(target):
                target, target_frame = _reframe(target, frame, protocol.frame, frame, camera)
        voxels, points, occupancies = (
            batch[key][index] if key in batch else None for key in ("voxels", "points", "occupancies")
        )
        for spec in protocol.iou:
            _check_iou_truth(spec, name, protocol, voxels, points)
        result.append(
            _Item(name, batch["category"][index], frame, camera, target, target_frame, voxels, points, occupancies)
        )
    return result


def _check_iou_truth(
    spec: PointIoU | VoxelIoU, item: str, protocol: Protocol, voxels: Tensor | None, points: Tensor | None
) -> None:
    if isinstance(spec, VoxelIoU) and voxels is not None and voxels.shape != (spec.resolution,) * 3:
        raise ValueError(
            f"protocol {protocol.name!r} needs voxels of {spec.resolution}^3, {item} has {tuple(voxels.shape)}"
        )
    if isinstance(spec, PointIoU) and points is not None:
        if len(points) < spec.points:
            raise ValueError(
                f"protocol {protocol.name!r} needs {spec.points} points with occupancies per item, {item} has "
                f"{len(points)}: load as many, or change the protocol with dataclasses.replace"
            )
        reach = float(points.abs().max())
        if reach > spec.box + 1e-3:  # half precision files, and their noise
            raise ValueError(
                f"protocol {protocol.name!r} needs points in [-{spec.box}, {spec.box}]^3, {item} reaches {reach:.4g}"
            )


def _reframe(
    shape: Meshes | Pointclouds, frame: Frame, axes: str, object_frame: Frame, camera: Camera | None
) -> tuple[Meshes | Pointclouds, Frame]:
    """A shape with other axes, by the item's own camera: object frame -> file -> camera frame, or back."""
    if frame.name == axes:
        return shape, frame
    if camera is None or {frame.name, axes} != {"object", "camera"}:
        raise ValueError(f"cannot move a shape from frame {frame.name!r} to {axes!r} without the item's camera")
    world = frame.denormalize(shape)
    if axes == "camera":
        return _turn(world, camera), Frame("camera")
    rotation = camera.rotation.transpose(-1, -2)
    back = Camera(rotation, camera.center, camera.intrinsics, camera.image_size)
    return object_frame.normalize(_turn(world, back)), object_frame


def _turn(shape: Meshes | Pointclouds, camera: Camera) -> Meshes | Pointclouds:
    """Rotated and translated by the camera's extrinsics, normals too."""
    if isinstance(shape, Pointclouds):
        points, normals, _ = shape.get_cloud(0)
        camera = camera.to(points.dtype).to(points.device)
        turned = None if normals is None else [normals @ camera.rotation.transpose(-1, -2)]
        return Pointclouds([camera.world_to_camera(points)], turned)
    verts, faces = shape.get_mesh_verts_faces(0)
    camera = camera.to(verts.dtype).to(verts.device)
    return Meshes([camera.world_to_camera(verts)], [faces])


def _score(prediction: Prediction, item: _Item, protocol: Protocol, seed: int, repeats: int) -> Row:
    """The row of one item: status, reason, one dict of metrics per repeat, its ceiling."""
    row: Row = {"id": item.id, "category": item.category, "status": "failed", "reason": "", "fault": "prediction"}
    row |= {"metrics": [], "ceiling": {}, "points": {}}
    if problem := _target_problem(item, protocol):
        return row | {"reason": f"target: {problem}", "fault": "target"}
    if protocol.samples is not None:
        row["metrics"] = [surface_metrics(None, protocol)] * repeats
    if prediction.failure is not None:
        return row | {"reason": prediction.failure}
    shape, frame = prediction.shape, prediction.frame
    if shape is not None and (problem := shape_problem(shape)) not in ("", "no surface"):
        return row | {"reason": f"prediction: {problem}"}
    if any(value is not None for value in (shape, prediction.voxels, prediction.occupancy)):
        shape, frame = _comparable(prediction, item, protocol)

    try:
        ious, occupied = _ious(prediction, shape, item, protocol, seed)
        if protocol.samples is None:
            return row | {"status": "ok" if occupied else "empty", "fault": "", "metrics": [ious] * repeats}
        assert item.target is not None
        scores = [
            score_shape(
                shape,
                item.target,
                protocol,
                frame=frame,
                target_frame=item.target_frame,
                seed=seed,
                item=item.id,
                repeat=repeat,
                ceiling=repeat == 0,
            )
            for repeat in range(repeats)
        ]
    except Exception as error:  # written to the row, counted and listed in the summary
        return row | {"reason": f"scoring: {type(error).__name__}: {error}"}
    first = scores[0]
    return row | {
        "status": first.status,
        "fault": "",
        "metrics": [score.metrics | ious for score in scores],
        "ceiling": first.ceiling,
        "points": first.points,
    }


def _target_problem(item: _Item, protocol: Protocol) -> str:
    """Why nothing can be scored against this item, or ""."""
    if item.target is None:
        return ""
    if problem := shape_problem(item.target):
        return problem
    try:
        unit_frame(protocol, item.target, item.id)
    except ValueError as error:
        return str(error)
    return ""


def _comparable(
    prediction: Prediction, item: _Item, protocol: Protocol
) -> tuple[Meshes | Pointclouds | None, Frame | None]:
    """The predicted shape in the protocol's axes; ValueError unless its frame is the item's, or the camera's own."""
    shape, frame = prediction.shape, prediction.frame
    if frame is None:
        raise ValueError(f"the prediction of {item.id} has no frame: coordinates without one cannot be compared")
    expected = Frame("camera") if shape is not None and frame.name == "camera" else item.frame
    if not frame.close_to(expected):
        raise ValueError(f"prediction and target of {item.id} are in different frames, {frame} and {expected}")
    if shape is None or protocol.samples is None:
        return shape, frame
    assert item.target is not None
    check_samples(protocol, shape, item.target)
    if shape_problem(shape):
        return shape, item.target_frame
    shape, frame = _reframe(shape, frame, protocol.frame, item.frame, item.camera)
    check_frames(protocol, frame, item.target_frame)
    return shape, frame


def _ious(
    prediction: Prediction, shape: Meshes | Pointclouds | None, item: _Item, protocol: Protocol, seed: int
) -> tuple[dict[str, float | None], bool]:
    """The protocol's IoUs, None where item or prediction lack what it takes; whether any volume was predicted."""
    values: dict[str, float | None] = {}
    occupied = False
    for spec in protocol.iou:
        value = None
        if isinstance(spec, VoxelIoU):
            grid = _probabilities(prediction, spec.resolution, item)
            if grid is not None:
                occupied |= bool(COMPARE[spec.comparator](grid, spec.threshold).any())
                if item.voxels is not None:
                    truth = item.voxels.to(grid.device)[None]
                    value = float(voxel_iou(grid[None], truth, threshold=spec.threshold, comparator=spec.comparator))
        elif item.points is not None and item.occupancies is not None:
            order = torch.randperm(len(item.points), generator=generator(seed, item.id, 0, "points"))[: spec.points]
            order = order.to(item.points.device)
            inside = _inside(prediction, shape, item.points[order], spec)
            if inside is not None:
                value = float(point_iou(inside[None], item.occupancies[order][None].to(inside.device)))
        values[iou_column(spec)] = value
    return values, occupied


def iou_column(spec: PointIoU | VoxelIoU) -> str:
    """The name of an IoU in tables and rows."""
    if isinstance(spec, VoxelIoU):
        return f"IoU (voxels {spec.resolution})"
    return "IoU (points)" if spec.source == "mesh" else "IoU (points, network)"


def _probabilities(prediction: Prediction, resolution: int, item: _Item) -> Tensor | None:
    """(D, H, W) probabilities of the cells, from the voxels or from the occupancy at the cells' centers."""
    if prediction.voxels is not None:
        if prediction.voxels.shape != (resolution,) * 3:
            raise ValueError(f"voxels must be {(resolution,) * 3}, got {tuple(prediction.voxels.shape)}")
        check_finite(voxels=prediction.voxels)
        return prediction.voxels
    if prediction.occupancy is None:
        return None
    device = "cpu" if item.voxels is None else item.voxels.device
    centers = GridSpec.cube(resolution).points(device=device)
    with torch.no_grad():
        values = prediction.occupancy(centers.view(-1, 3))
    check_finite(occupancy=values)
    return values.view(centers.shape[:3])


def _inside(
    prediction: Prediction, shape: Meshes | Pointclouds | None, points: Tensor, spec: PointIoU
) -> Tensor | None:
    """(N,) whether each point is inside the prediction; None when the prediction has no such notion."""
    if spec.source == "network":
        if prediction.occupancy is None:
            return None
        with torch.no_grad():
            values = prediction.occupancy(points)
        check_finite(occupancy=values)
        assert spec.comparator is not None
        assert spec.threshold is not None
        return COMPARE[spec.comparator](values, spec.threshold)
    if isinstance(shape, Pointclouds):
        return None
    if shape is None or shape_problem(shape) == "no surface":
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    return contains(shape, points[None].to(shape.device))[0]


# ------------------------------------------------------------------------------------------------ results file


def read_results(path: str | os.PathLike[str]) -> tuple[Row, list[Row]]:
    """Header and rows of a results file; a last line cut short is left out. ValueError names a broken line."""
    header, rows, _ = _parse(Path(path))
    if header is None:
        raise ValueError(f"{path}: no header line, not a results file")
    return header, rows


def _parse(path: Path) -> tuple[Row | None, list[Row], int]:
    """Header, rows and the length in bytes of the whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        kind = "protocol" if number == 1 else "id"
        if not isinstance(lines[-1], dict) or kind not in lines[-1]:
            raise ValueError(f"{path}, line {number}: no {kind!r}, not a line that evaluate wrote")
    return (lines[0] if lines else None), lines[1:], whole


def _resume(path: Path, header: Row) -> dict[str, Row]:
    """Rows already in the file, which is cut to whole lines, or started with the header."""
    start = json.dumps(header, allow_nan=False) + "\n"
    if path.exists():
        found, rows, whole = _parse(path)
        if found is not None:
            different = [key for key in header if found.get(key) != header[key]]
            if different:
                raise ValueError(f"{path} holds results of another run: {different} differ; choose another file")
            os.truncate(path, whole)
            return {row["id"]: row for row in rows}
        if not start.startswith(path.read_text(encoding="utf-8")):
            raise ValueError(f"{path}: not a results file; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(start, encoding="utf-8")
    return {}


# ----------------------------------------------------------------------------------------------------- summary

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
        lines += [f"Empty: {', '.join(self.empty)}."] if self.empty else []
        lines += [f"Failed: {name}: {reason}" for name, reason in self.failures.items()]
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
    )


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
