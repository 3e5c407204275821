"""What a model says about one item, what is true about it, and the row that comparing them gives."""

from collections.abc import Callable, Mapping, Sequence
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
    score_sound,
    shape_problem,
    surface_metrics,
    unit_frame,
    voxel_iou,
)
from vision3dgen.metrics.summary import Row
from vision3dgen.ops.inside import contains
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds


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


def predict_batch(
    predict: Callable[[Mapping[str, Any]], Sequence[Prediction]], batch: Mapping[str, Any], size: int
) -> list[Prediction]:
    """One prediction per item of a batch, without gradients; an exception becomes the failure of each of them."""
    try:
        with torch.no_grad():
            predictions = list(predict(batch))
    except Exception as error:  # the reason is written to every row of the batch and counted
        return [Prediction(failure=f"predict: {type(error).__name__}: {error}")] * size
    if len(predictions) != size:
        raise ValueError(f"predict must give one Prediction per item, got {len(predictions)} for {size}")
    return predictions


class Truth(NamedTuple):
    """What is true about one item, in its object frame, as far as a protocol asks."""

    id: str
    category: str
    frame: Frame
    camera: Camera | None
    target: Meshes | Pointclouds | None
    voxels: Tensor | None  # (D, H, W)
    points: Tensor | None  # (N, 3)
    occupancies: Tensor | None  # (N,)


class Job(NamedTuple):
    """All that the row of one item depends on; it can be sent to another process."""

    prediction: Prediction  # without maps and occupancy
    probabilities: tuple[Tensor | None, ...]  # what its occupancy says where each IoU of the protocol asks
    truth: Truth
    protocol: Protocol
    seed: int
    repeats: int
    ceiling: bool


def truths_of(batch: Mapping[str, Any], protocol: Protocol) -> list[Truth]:
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
        asked = {"camera", *(key for spec in protocol.iou for key in _iou_keys(spec))}
        asked |= {protocol.target} if protocol.samples is not None else set()
        known = {key: batch[key][index] for key in asked if key in batch}
        truth = Truth(
            name,
            batch["category"][index],
            batch["frame"][index],
            known.get("camera"),
            known.get(protocol.target) if protocol.samples is not None else None,
            known.get("voxels"),
            known.get("points"),
            known.get("occupancies"),
        )
        for spec in protocol.iou:
            _check_iou_truth(spec, truth, protocol)
        result.append(truth)
    return result


def _iou_keys(spec: PointIoU | VoxelIoU) -> tuple[str, ...]:
    return ("voxels",) if isinstance(spec, VoxelIoU) else ("points", "occupancies")


def _check_iou_truth(spec: PointIoU | VoxelIoU, truth: Truth, protocol: Protocol) -> None:
    voxels, points = truth.voxels, truth.points
    if isinstance(spec, VoxelIoU) and voxels is not None and voxels.shape != (spec.resolution,) * 3:
        raise ValueError(
            f"protocol {protocol.name!r} needs voxels of {spec.resolution}^3, {truth.id} has {tuple(voxels.shape)}"
        )
    if isinstance(spec, PointIoU) and points is not None:
        if len(points) < spec.points:
            raise ValueError(
                f"protocol {protocol.name!r} needs {spec.points} points with occupancies per item, {truth.id} has "
                f"{len(points)}: load as many, or change the protocol with dataclasses.replace"
            )
        reach = float(points.abs().max())
        if reach > spec.box + 1e-3:  # half precision files, and their noise
            raise ValueError(
                f"protocol {protocol.name!r} needs points in [-{spec.box}, {spec.box}]^3, "
                f"{truth.id} reaches {reach:.4g}"
            )


def job_of(prediction: Prediction, truth: Truth, protocol: Protocol, *, seed: int, repeats: int, ceiling: bool) -> Job:
    """What scoring takes, the occupancy function already asked: it may hold a network, which stays in this process."""
    probabilities: list[Tensor | None] = []
    if prediction.occupancy is not None and prediction.failure is None:
        try:
            with torch.no_grad():
                probabilities = [_asked(prediction, truth, spec, seed) for spec in protocol.iou]
        except Exception as error:  # the reason is written to the row and counted
            prediction = prediction._replace(failure=f"occupancy: {type(error).__name__}: {error}")
    probabilities = probabilities or [None] * len(protocol.iou)
    bare = prediction._replace(occupancy=None, maps={})
    return Job(bare, tuple(probabilities), truth, protocol, seed, repeats, ceiling)


def _asked(prediction: Prediction, truth: Truth, spec: PointIoU | VoxelIoU, seed: int) -> Tensor | None:
    """The occupancy function at the cells' centers, or at the item's points; None where it is not needed."""
    assert prediction.occupancy is not None
    if isinstance(spec, VoxelIoU):
        if prediction.voxels is not None:
            return None
        device = "cpu" if truth.voxels is None else truth.voxels.device
        centers = GridSpec.cube(spec.resolution).points(device=device)
        return prediction.occupancy(centers.view(-1, 3)).view(centers.shape[:3])
    if spec.source == "mesh" or truth.points is None or truth.occupancies is None:
        return None
    return prediction.occupancy(truth.points[_chosen(truth, spec, seed)])


def _chosen(truth: Truth, spec: PointIoU, seed: int) -> Tensor:
    """Which of the item's points an IoU is measured at."""
    assert truth.points is not None
    order = torch.randperm(len(truth.points), generator=generator(seed, truth.id, 0, "points"))[: spec.points]
    return order.to(truth.points.device)


# ------------------------------------------------------------------------------------------------------ frames


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


def _out_of_sight(shape: Meshes | Pointclouds, camera: Camera) -> bool:
    """Whether a shape of the camera's frame lies behind the camera, or wholly beyond one side of its picture."""
    points = shape.points_packed() if isinstance(shape, Pointclouds) else shape.verts_packed()
    x, y, z = (points.double() @ camera.intrinsics.double().to(points.device).transpose(-1, -2)).unbind(1)
    height, width = camera.image_size
    beyond = (z <= 0, x < 0, y < 0, x > width * z, y > height * z)  # the sides' planes, through the camera
    return any(bool(side.all()) for side in beyond)


# ----------------------------------------------------------------------------------------------------- scoring


def blank_row(truth_id: str, category: str) -> Row:
    """The row of an item of which nothing is known yet."""
    row: Row = {"id": truth_id, "category": category, "status": "failed", "reason": "", "fault": "prediction"}
    return row | {"metrics": [], "ceiling": {}, "points": {}, "unmeasured": {}}


def score_job(job: Job) -> Row:
    """The row of one item: status, reason, one dict of metrics per repeat, its ceiling, what could not be measured.

    Raises ValueError for frames that cannot be compared, which is wrong with all items alike.
    """
    prediction, truth, protocol = job.prediction, job.truth, job.protocol
    row = blank_row(truth.id, truth.category)
    target, target_frame, unit = truth.target, truth.frame, None
    if target is not None:
        try:
            target, target_frame, unit = _placed(target, truth, protocol)
        except _Broken as error:
            return row | {"reason": f"target: {error}", "fault": "target"}
    absent = {iou_column(spec): _absent(spec, truth) for spec in protocol.iou}
    if protocol.samples is None and all(absent.values()):
        return row | {"reason": f"target: {'; '.join(dict.fromkeys(filter(None, absent.values())))}", "fault": "target"}
    if protocol.samples is not None:
        row["metrics"] = [surface_metrics(None, protocol)] * job.repeats
    if prediction.failure is not None:
        return row | {"reason": prediction.failure}
    problem = "no surface" if prediction.shape is None else shape_problem(prediction.shape)
    if problem not in ("", "no surface"):
        return row | {"reason": f"prediction: {problem}"}
    if any(known is not None for known in (prediction.shape, prediction.voxels, *job.probabilities)):
        _check_frame(prediction, target, truth, protocol)
    shape = None if problem else _comparable(prediction, target_frame, truth, protocol)

    try:
        ious, unmeasured, occupied = _ious(job, shape)
        unmeasured = {name: absent[name] or reason for name, reason in unmeasured.items()}
        if protocol.samples is None:
            return row | _volume_row(ious, unmeasured, occupied, shape, job.repeats)
        assert target is not None
        assert unit is not None
        scores = [
            score_sound(
                shape,
                target,
                protocol,
                unit,
                seed=job.seed,
                item=truth.id,
                repeat=repeat,
                ceiling=job.ceiling and repeat == 0,
            )
            for repeat in range(job.repeats)
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
        "unmeasured": unmeasured if first.status == "ok" else {},
    }


def _volume_row(
    ious: dict[str, float | None],
    unmeasured: dict[str, str],
    occupied: bool,
    shape: Meshes | Pointclouds | None,
    repeats: int,
) -> Row:
    """What a protocol without surface metrics makes of an item."""
    nothing = all(value is None for value in ious.values())
    if nothing and shape is not None:  # a surface, but nothing that the protocol scores
        return {"reason": f"prediction: {'; '.join(dict.fromkeys(unmeasured.values()))}"}
    metrics = [ious] * repeats
    if not occupied:
        return {"status": "empty", "fault": "", "metrics": metrics}
    return {"status": "ok", "fault": "", "metrics": metrics, "unmeasured": unmeasured}


class _Broken(ValueError):
    """Why nothing can be scored against a target."""


def _placed(target: Meshes | Pointclouds, truth: Truth, protocol: Protocol) -> tuple[Any, Frame, Frame]:
    """The target in the protocol's axes, its frame, and the unit of the comparison."""
    if problem := shape_problem(target):
        raise _Broken(problem)
    camera = truth.camera
    if protocol.frame == "camera" and camera is not None:
        for name, values in (("rotation", camera.rotation), ("translation", camera.translation)):
            if not bool(torch.isfinite(values).all()):
                raise _Broken(f"the camera's {name} is {values.tolist()}")
    placed, frame = _reframe(target, truth.frame, protocol.frame, truth.frame, camera)
    if protocol.frame == "camera" and camera is not None and _out_of_sight(placed, camera):
        raise _Broken("the camera does not see it")
    try:
        return placed, frame, unit_frame(protocol, placed, truth.id)
    except ValueError as error:
        raise _Broken(str(error)) from error


def _absent(spec: PointIoU | VoxelIoU, truth: Truth) -> str:
    missing = [key for key in _iou_keys(spec) if getattr(truth, key) is None]
    return f"the truth has no {' and '.join(missing)}" if missing else ""


def _check_frame(prediction: Prediction, target: Meshes | Pointclouds | None, truth: Truth, protocol: Protocol) -> None:
    """ValueError unless the prediction's frame is the item's, or the camera's own, and can be sampled."""
    shape, frame = prediction.shape, prediction.frame
    if frame is None:
        raise ValueError(f"the prediction of {truth.id} has no frame: coordinates without one cannot be compared")
    expected = Frame("camera") if shape is not None and frame.name == "camera" else truth.frame
    if not frame.close_to(expected):
        raise ValueError(f"prediction and target of {truth.id} are in different frames, {frame} and {expected}")
    if shape is not None and target is not None:
        check_samples(protocol, shape, target)


def _comparable(
    prediction: Prediction, target_frame: Frame, truth: Truth, protocol: Protocol
) -> Meshes | Pointclouds | None:
    """The predicted shape, which has a surface, in the protocol's axes, as far as the protocol compares shapes."""
    assert prediction.shape is not None
    assert prediction.frame is not None
    if protocol.samples is None and not any(isinstance(spec, PointIoU) for spec in protocol.iou):
        return prediction.shape
    shape, frame = _reframe(prediction.shape, prediction.frame, protocol.frame, truth.frame, truth.camera)
    check_frames(protocol, frame, target_frame)
    return shape


def _ious(job: Job, shape: Meshes | Pointclouds | None) -> tuple[dict[str, float | None], dict[str, str], bool]:
    """The protocol's IoUs, why those that are None are, and whether any volume was predicted."""
    truth = job.truth
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    occupied = False
    for spec, probabilities in zip(job.protocol.iou, job.probabilities):
        value, reason = None, ""
        if isinstance(spec, VoxelIoU):
            grid = _grid(job.prediction.voxels, probabilities, spec.resolution)
            if grid is None:
                reason = "the prediction has no voxels"
            else:
                occupied |= bool(COMPARE[spec.comparator](grid, spec.threshold).any())
                if truth.voxels is not None:
                    voxels = truth.voxels.to(grid.device)[None]
                    value = float(voxel_iou(grid[None], voxels, threshold=spec.threshold, comparator=spec.comparator))
        elif truth.points is not None and truth.occupancies is not None:
            order = _chosen(truth, spec, job.seed)
            inside = _inside(probabilities, shape, truth.points[order], spec)
            if inside is None:
                reason = "the prediction knows no inside" if spec.source == "mesh" else "the prediction is no function"
            else:
                occupied |= bool(inside.any())
                value = float(point_iou(inside[None], truth.occupancies[order][None].to(inside.device)))
        values[iou_column(spec)] = value
        if value is None:
            reasons[iou_column(spec)] = reason
    return values, reasons, occupied


def iou_column(spec: PointIoU | VoxelIoU) -> str:
    """The name of an IoU in tables and rows."""
    if isinstance(spec, VoxelIoU):
        return f"IoU (voxels {spec.resolution})"
    return "IoU (points)" if spec.source == "mesh" else "IoU (points, network)"


def _grid(voxels: Tensor | None, probabilities: Tensor | None, resolution: int) -> Tensor | None:
    """(D, H, W) probabilities of the cells, from the voxels or from the occupancy at the cells' centers."""
    if voxels is not None:
        if voxels.shape != (resolution,) * 3:
            raise ValueError(f"voxels must be {(resolution,) * 3}, got {tuple(voxels.shape)}")
        check_finite(voxels=voxels)
    elif probabilities is not None:
        check_finite(occupancy=probabilities)
    return probabilities if voxels is None else voxels


def _inside(
    probabilities: Tensor | None, shape: Meshes | Pointclouds | None, points: Tensor, spec: PointIoU
) -> Tensor | None:
    """(N,) whether each point is inside the prediction; None when the prediction has no such notion."""
    if spec.source == "network":
        if probabilities is None:
            return None
        check_finite(occupancy=probabilities)
        assert spec.comparator is not None
        assert spec.threshold is not None
        return COMPARE[spec.comparator](probabilities, spec.threshold)
    if isinstance(shape, Pointclouds):
        return None
    if shape is None:
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    return contains(shape, points[None].to(shape.device))[0]
