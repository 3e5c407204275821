"""What one image adds to a detection score: its detections, its truths, and how much they overlap."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from vision3dgen.metrics.detection_protocols import DetectionProtocol, MaskIoU, MeshF1
from vision3dgen.metrics.shape import f_score, generator, shape_problem, surface_distances
from vision3dgen.ops import sample_points_from_meshes
from vision3dgen.ops.rle import mask_runs, run_areas, share_of_union, shared_pixels
from vision3dgen.structures import Detections, Meshes

ALL_ONE = 1  # the class of everything where classes are not told apart


class Truths(NamedTuple):
    """The objects that are in one image, a row each.

    masks: at the image's size. meshes: one member per object, in the camera's frame. crowd: groups, which swallow any
    number of detections; ignored: not asked for, such as VOC's difficult objects. areas: annotated, in pixels; of the
    mask or the box where there are none.
    """

    boxes: Float[Tensor, "N 4"]
    labels: Int64[Tensor, " N"]
    masks: Bool[Tensor, "N H W"] | None = None
    meshes: Meshes | None = None
    crowd: Bool[Tensor, " N"] | None = None
    ignored: Bool[Tensor, " N"] | None = None
    areas: Float[Tensor, " N"] | None = None


class ImageRecord(NamedTuple):
    """All that a protocol needs to know of one image; records of shares of a set are joined by joining their lists."""

    id: str
    scores: Float64[np.ndarray, " D"]  # descending
    labels: Int64[np.ndarray, " D"]
    areas: Float64[np.ndarray, " D"]
    counted: Bool[np.ndarray, " D"]  # False for what the gate leaves out
    truth_labels: Int64[np.ndarray, " G"]
    truth_areas: Float64[np.ndarray, " G"]
    crowd: Bool[np.ndarray, " G"]
    ignored: Bool[np.ndarray, " G"]
    pairs: Int64[np.ndarray, "P 2"]  # a detection and a truth of one class that reach the lowest threshold
    overlaps: Float64[np.ndarray, " P"]

    def to_row(self) -> dict[str, Any]:
        """As JSON types; numbers are written so that they come back the same."""
        return {name: value if isinstance(value, str) else value.tolist() for name, value in self._asdict().items()}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "ImageRecord":
        """What `to_row` made."""
        types: dict[str, Any] = dict.fromkeys(("labels", "truth_labels", "pairs"), np.int64)
        types |= dict.fromkeys(("counted", "crowd", "ignored"), bool)
        arrays = {
            name: np.array(row[name], dtype=types.get(name, np.float64)) for name in ImageRecord._fields if name != "id"
        }
        return ImageRecord(id=row["id"], **arrays | {"pairs": arrays["pairs"].reshape(-1, 2)})


def record_of(
    detections: Detections, truths: Truths, protocol: DetectionProtocol, *, id: str, seed: int = 0
) -> ImageRecord:
    """Compare the detections of an image with its truths; `seed` and `id` name the points drawn on meshes.

    Raises ValueError for what the protocol needs and is not there, rows that do not fit one another, a score or box
    that is not finite, a label below 1, masks of another size.
    """
    found = check_detections(detections)
    true = _check_truths(truths)
    order = np.argsort(-found.scores, kind="stable")
    boxes, true_boxes = found.boxes[order], true.boxes
    labels, true_labels = found.labels[order], true.labels
    if not protocol.by_class:
        labels, true_labels = np.full_like(labels, ALL_ONE), np.full_like(true_labels, ALL_ONE)
    areas, true_areas = box_areas(boxes), box_areas(true_boxes)
    same = labels[:, None] == true_labels[None]
    counted: np.ndarray = np.ones(len(labels), dtype=bool)
    if protocol.gate is not None:
        near = box_iou(boxes, true_boxes, true.crowd) > protocol.gate
        counted = np.asarray(near.any(1))
        same &= near
    if isinstance(protocol.overlap, MaskIoU):
        masks = _masks("detections", detections.masks)
        true_masks = _masks("truths", truths.masks)
        if masks.shape[1:] != true_masks.shape[1:] and len(masks) and len(true_masks):
            sizes = tuple(masks.shape[1:]), tuple(true_masks.shape[1:])
            raise ValueError(
                f"masks of detections and truths must be of the image's size, got {sizes[0]} and {sizes[1]}"
            )
        runs, true_runs = mask_runs(masks[torch.from_numpy(order)]), mask_runs(true_masks)
        areas, true_areas = (
            run_areas(one, len(of)).astype(float) for one, of in ((runs, masks), (true_runs, true_masks))
        )
        height, width = masks.shape[1:] if len(masks) else true_masks.shape[1:]
        shared = shared_pixels(runs, true_runs, same, height * width, width).astype(float)
        overlaps = share_of_union(shared, areas, true_areas, true.crowd)
    elif isinstance(protocol.overlap, MeshF1):
        overlaps = _mesh_overlaps(detections.meshes, truths.meshes, order, same, protocol.overlap, id, seed)
    else:
        overlaps = box_iou(boxes, true_boxes, true.crowd)
    reached = overlaps >= min(protocol.thresholds) - 1e-9
    pairs = np.argwhere(same & reached)
    return ImageRecord(
        id=id,
        scores=found.scores[order],
        labels=labels,
        areas=areas,
        counted=counted,
        truth_labels=true_labels,
        truth_areas=true_areas if truths.areas is None else _numbers(truths.areas),
        crowd=true.crowd,
        ignored=true.ignored,
        pairs=pairs,
        overlaps=overlaps[pairs[:, 0], pairs[:, 1]],
    )


def empty_record(truths: Truths, protocol: DetectionProtocol, *, id: str) -> ImageRecord:
    """The record of an image for which there is no detection, such as one whose prediction failed."""
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    if truths.masks is not None:
        none = none._replace(masks=truths.masks[:0])
    return record_of(none._replace(meshes=truths.meshes if len(truths.labels) == 0 else None), truths, protocol, id=id)


# -------------------------------------------------------------------------------------------------------- checks


class _Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class _True(NamedTuple):
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray


def check_detections(detections: Detections) -> _Found:
    """Boxes, scores and labels as arrays; ValueError for rows that do not fit or that cannot be scored."""
    boxes, scores = _numbers(detections.boxes).reshape(-1, 4), _numbers(detections.scores)
    labels = detections.labels.cpu().numpy()
    rows = {"boxes": len(detections.boxes), "scores": len(scores), "labels": len(labels)}
    rows |= {} if detections.masks is None else {"masks": len(detections.masks)}
    rows |= {} if detections.meshes is None else {"meshes": len(detections.meshes)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"detections must have as many rows of each kind, got {rows}")
    bad = ~(np.isfinite(boxes).all(1) & np.isfinite(scores))
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise ValueError(f"detection {index} is not finite: box {boxes[index].tolist()}, score {scores[index]}")
    if len(labels) and labels.min() < 1:
        index = int(labels.argmin())
        raise ValueError(f"detection {index} has the label {labels[index]}; categories are numbered from 1")
    return _Found(boxes, scores, labels)


def _check_truths(truths: Truths) -> _True:
    count = len(truths.labels)
    for name, values in truths._asdict().items():
        if values is not None and len(values) != count:
            raise ValueError(f"truths must have {count} {name} like labels, got {len(values)}")
    none = np.zeros(count, dtype=bool)
    return _True(
        _numbers(truths.boxes).reshape(-1, 4),
        truths.labels.cpu().numpy(),
        none if truths.crowd is None else truths.crowd.cpu().numpy(),
        none if truths.ignored is None else truths.ignored.cpu().numpy(),
    )


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


# ------------------------------------------------------------------------------------------------------ overlaps


def box_areas(boxes: Float64[np.ndarray, "N 4"]) -> Float64[np.ndarray, " N"]:
    """Areas of boxes (xyxy)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def box_iou(
    first: Float64[np.ndarray, "N 4"], second: Float64[np.ndarray, "M 4"], crowd: Bool[np.ndarray, " M"] | None = None
) -> Float64[np.ndarray, "N M"]:
    """Intersection over union of all pairs of boxes (xyxy); over the area of first[i] where crowd[j]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)
    return share_of_union(shared, box_areas(first), box_areas(second), crowd)


def _masks(name: str, masks: Tensor | None) -> Tensor:
    if masks is None:
        raise ValueError(f"the protocol compares masks, the {name} have none")
    return masks.cpu().bool()


def _mesh_overlaps(
    found: Meshes | None, true: Meshes | None, order: np.ndarray, wanted: np.ndarray, rule: MeshF1, id: str, seed: int
) -> np.ndarray:
    """F1 of the wanted pairs, 0 elsewhere; a predicted mesh without a surface, or with NaN, has 0 with all."""
    if true is None or (found is None and len(wanted)):
        raise ValueError(f"the protocol compares meshes, the {'truths' if true is None else 'detections'} have none")
    values = np.zeros(wanted.shape)
    drawn: dict[int, tuple[Meshes, Tensor]] = {}
    for place, object_ in np.argwhere(wanted).tolist():
        assert found is not None
        prediction = found[int(order[place])]
        if shape_problem(prediction):
            continue
        if object_ not in drawn:
            drawn[object_] = _unit_truth(true[object_], rule, id, object_, seed)
        target, points = drawn[object_]
        scale = _longest_edge(true[object_]) / rule.longest_edge
        mesh = _moved(prediction, 1 / scale)
        if rule.depth == "true":
            factor = _middle_depth(target) / _middle_depth(mesh)
            if not factor > 0:  # behind the camera
                continue
            mesh = _moved(mesh, factor)
        stream = generator(seed, id, int(order[place]), "prediction")
        own = sample_points_from_meshes(mesh, rule.samples, generator=stream)[0]
        distances = surface_distances(own.to(points), None, points, None)
        scores = f_score(distances, (rule.threshold,), comparator=rule.comparator, squared=False)
        values[place, object_] = float(scores.f1[0])
    return values


def _unit_truth(mesh: Meshes, rule: MeshF1, id: str, index: int, seed: int) -> tuple[Meshes, Tensor]:
    """A true mesh in the rule's unit and the points drawn on it."""
    if problem := shape_problem(mesh):
        raise ValueError(f"the true mesh {index} of {id}: {problem}")
    target = _moved(mesh, rule.longest_edge / _longest_edge(mesh))
    stream = generator(seed, id, index, "target")
    return target, sample_points_from_meshes(target, rule.samples, generator=stream)[0]


def _moved(mesh: Meshes, factor: float) -> Meshes:
    """Scaled about the camera, in float64."""
    return Meshes([mesh.verts_packed().double() * factor], [mesh.faces_packed()])


def _longest_edge(mesh: Meshes) -> float:
    verts = mesh.verts_packed().double()
    return float((verts.amax(0) - verts.amin(0)).max())


def _middle_depth(mesh: Meshes) -> float:
    depth = mesh.verts_packed()[:, 2]
    return float(depth.min() + depth.max()) / 2
