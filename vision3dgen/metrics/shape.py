"""Scores of one predicted shape against one true shape.

With d(p) the distance from a predicted point to the nearest true point, and d(g) the other way round:
chamfer = combine(mean d(p)^k, mean d(g)^k), k = 2 if squared else 1; precision = share of predicted points with
d(p) < t, recall = share of true points with d(g) < t, F1 their harmonic mean; normal consistency = mean over both
directions of the cosine between a point's normal and its nearest neighbor's; IoU = |both| / |either|.

Nothing that moves a number has a default: functions take every such argument, `score_shape` takes a `Protocol`.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.metrics.protocols import Combine, Distance, Fixed, LongestEdge, Probability, Protocol, UnitBall
from vision3dgen.ops import knn_points, mesh_face_areas_normals, sample_points_from_meshes
from vision3dgen.structures import Frame, Meshes, Pointclouds

COMPARE = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}

# ------------------------------------------------------------------------------------------------ intersection


def voxel_iou(
    pred: Shaped[Tensor, "B D H W"], target: Shaped[Tensor, "B D H W"], *, threshold: float, comparator: Probability
) -> Float[Tensor, " B"]:
    """Intersection over union of each pair of grids, `pred` being occupied where it passes the threshold.

    pred: probabilities or booleans; target: booleans, or zeros and ones. Raises ValueError for NaN and for a target
    with other values.
    Source: Choy et al., ECCV 2016, equation 3 (per sample, to be averaged by the caller).
    Differs: two empty grids agree, IoU 1 (3D-R2N2, Occupancy Networks and Kaolin: 0/0, NaN); probabilities are compared
    with the threshold (Kaolin's `iou` takes any non-zero as occupied).
    """
    check_choice("comparator", comparator, (">", ">="))
    check_shape(pred=(pred, "B D H W"), target=(target, "B D H W"))
    check_finite(pred=pred)
    return _iou(COMPARE[comparator](pred, threshold).flatten(1), _binary("target", target).flatten(1))


def point_iou(pred: Shaped[Tensor, "B N"], target: Shaped[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Intersection over union of two sets of points inside, each given as booleans or zeros and ones.

    Source: Mescheder et al., CVPR 2019, supplementary 2.1: a Monte Carlo estimate of the volumes' IoU.
    Differs: no point inside either is IoU 1 (Occupancy Networks: NaN).
    """
    check_shape(pred=(pred, "B N"), target=(target, "B N"))
    return _iou(_binary("pred", pred), _binary("target", target))


def _binary(name: str, values: Tensor) -> Tensor:
    occupied = values.bool()
    if values.dtype != torch.bool and not bool((occupied.to(values.dtype) == values).all()):
        raise ValueError(f"{name} must be booleans, or zeros and ones, got values in [{values.min()}, {values.max()}]")
    return occupied


def _iou(a: Bool[Tensor, "B N"], b: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    union = (a | b).sum(1).double()
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0)


# --------------------------------------------------------------------------------------------------- distances


class SurfaceDistances(NamedTuple):
    """Nearest neighbors both ways, all that surface metrics are made of."""

    to_target: Tensor  # (N,) Euclidean, from each predicted point to the nearest true point
    to_pred: Tensor  # (M,) Euclidean, from each true point to the nearest predicted point
    to_target_cosine: Tensor | None  # (N,) between the predicted point's normal and its nearest true point's
    to_pred_cosine: Tensor | None  # (M,)


def surface_distances(
    pred_points: Float[Tensor, "N 3"],
    pred_normals: Float[Tensor, "N 3"] | None,
    target_points: Float[Tensor, "M 3"],
    target_normals: Float[Tensor, "M 3"] | None,
) -> SurfaceDistances:
    """One nearest-neighbor search each way; unit normals are optional, and cosines None without both.

    Raises ValueError for an empty cloud, whose distances are undefined, and for NaN.
    """
    check_shape(pred_points=(pred_points, "N 3"), target_points=(target_points, "M 3"))
    for name, points in (("pred_points", pred_points), ("target_points", target_points)):
        if not len(points):
            raise ValueError(f"{name} must have at least one point: distances to an empty set are undefined")
    to_target, forward = _nearest(pred_points, target_points)
    to_pred, backward = _nearest(target_points, pred_points)
    if pred_normals is None or target_normals is None:
        return SurfaceDistances(to_target, to_pred, None, None)
    check_shape(
        pred_points=(pred_points, "N 3"),
        pred_normals=(pred_normals, "N 3"),
        target_points=(target_points, "M 3"),
        target_normals=(target_normals, "M 3"),
    )
    check_finite(pred_normals=pred_normals, target_normals=target_normals)
    return SurfaceDistances(
        to_target,
        to_pred,
        (pred_normals * target_normals[forward]).sum(1),
        (target_normals * pred_normals[backward]).sum(1),
    )


def _nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    found = knn_points(points[None], others[None], K=1)
    return found.dists[0, :, 0].sqrt(), found.idx[0, :, 0]


def chamfer(distances: SurfaceDistances, *, squared: bool, combine: Combine) -> Float[Tensor, ""]:
    """Mean nearest-neighbor distance of the two directions, squared first or not, their sum or mean.

    Equals PyTorch3D's `chamfer_distance(norm=2)` for squared=True, combine="sum"; Occupancy Networks' "Chamfer-L1" for
    squared=False, combine="mean" (it is Euclidean, not Manhattan).
    """
    check_choice("combine", combine, ("sum", "mean"))
    accuracy, completeness = directed(distances, squared=squared)
    total = accuracy + completeness
    return total if combine == "sum" else total / 2


class Directed(NamedTuple):
    accuracy: Tensor  # () mean from prediction to target
    completeness: Tensor  # () mean from target to prediction


def directed(distances: SurfaceDistances, *, squared: bool) -> Directed:
    """Mean distance (or squared distance) of each direction."""
    power = 2 if squared else 1
    return Directed((distances.to_target**power).mean(), (distances.to_pred**power).mean())


class FScores(NamedTuple):
    precision: Tensor  # (T,) in [0, 1]
    recall: Tensor  # (T,)
    f1: Tensor  # (T,)


def f_score(
    distances: SurfaceDistances, thresholds: Sequence[float], *, comparator: Distance, squared: bool
) -> FScores:
    """Precision, recall and F1 at each threshold, which acts on the distance, or on its square if `squared`.

    Source: Knapitsch et al., Tanks and Temples, 2017; Tatarchenko et al., CVPR 2019, equation 1.
    Differs: precision = recall = 0 gives F1 0 (Convolutional Occupancy Networks: NaN; Mesh R-CNN: 0 by an epsilon of
    1e-8, here absent); recall is the share of true points (Kaolin mixes predicted and true counts); precision belongs
    to the prediction (what3d swaps both names, with the same F1).
    """
    check_choice("comparator", comparator, ("<", "<="))
    if not thresholds or min(thresholds) < 0:
        raise ValueError(f"thresholds must be one or more numbers >= 0, got {list(thresholds)}")
    precision, recall = (
        torch.stack([COMPARE[comparator](d**2 if squared else d, t).double().mean() for t in thresholds])
        for d in (distances.to_target, distances.to_pred)
    )
    total = precision + recall
    return FScores(precision, recall, torch.where(total > 0, 2 * precision * recall / total.clamp(min=1e-300), 0.0))


def normal_consistency(distances: SurfaceDistances, *, absolute: bool) -> Float[Tensor, ""]:
    """Mean over both directions of the mean cosine (or its absolute value) between nearest neighbors' normals.

    Raises ValueError when the distances were measured without normals.
    Differs: two samplings of one curved surface stay slightly below 1, see the ceiling.
    """
    cosines = (distances.to_target_cosine, distances.to_pred_cosine)
    if cosines[0] is None or cosines[1] is None:
        raise ValueError("normal consistency needs the normals of both shapes, these distances have none")
    forward, backward = (c.abs().mean() if absolute else c.mean() for c in cosines if c is not None)
    return (forward + backward) / 2


# ---------------------------------------------------------------------------------------------------- one item


class ShapeScore(NamedTuple):
    """Surface metrics of one item: columns named with their unit, None where undefined."""

    status: Literal["ok", "empty", "failed"]
    reason: str  # why it failed, else ""
    metrics: dict[str, float | None]
    ceiling: dict[str, float | None]  # two independent samplings of the target scored against each other
    points: dict[str, int]  # drawn on "prediction", "target" and, for the ceiling, "ceiling"


def score_shape(
    prediction: Meshes | Pointclouds | None,
    target: Meshes | Pointclouds,
    protocol: Protocol,
    *,
    frame: Frame | None,
    target_frame: Frame,
    seed: int,
    item: str,
    repeat: int = 0,
    ceiling: bool = True,
) -> ShapeScore:
    """Surface metrics of one predicted shape under a protocol.

    frame, target_frame: where the coordinates of each live; both must be the protocol's axes and agree.
    seed, item, repeat: name the random draws, so a score depends on neither batch nor order.

    A prediction that is None, has no point or no area is "empty": it scores 0 in F1, precision and recall; its
    distances and normals are None, or those of points at the origin, as the protocol says. NaN in it is "failed": the
    metrics are empty. Raises ValueError for frames that differ, a broken target, a batch of more than one.
    Differs: Mesh R-CNN and Occupancy Networks drop or crash on such items.
    """
    if protocol.samples is None:
        raise ValueError(f"protocol {protocol.name!r} has no surface metrics")
    if len(target) != 1 or (prediction is not None and len(prediction) != 1):
        sizes = (0 if prediction is None else len(prediction), len(target))
        raise ValueError(f"score_shape takes one shape each, got batches of {sizes}: index them")
    if problem := shape_problem(target):
        raise ValueError(f"target of {item}: {problem}")
    check_frames(protocol, frame if prediction is not None else target_frame, target_frame)
    check_samples(protocol, prediction, target)
    problem = "no surface" if prediction is None else shape_problem(prediction)
    if problem and problem != "no surface":
        prediction, failure = None, f"prediction: {problem}"
    else:
        prediction, failure = (None if problem else prediction), ""
    unit = unit_frame(protocol, target, item)
    score = score_sound(prediction, target, protocol, unit, seed=seed, item=item, repeat=repeat, ceiling=ceiling)
    return score._replace(status="failed", reason=failure, metrics={}) if failure else score


def score_sound(
    prediction: Meshes | Pointclouds | None,
    target: Meshes | Pointclouds,
    protocol: Protocol,
    unit: Frame,
    *,
    seed: int,
    item: str,
    repeat: int,
    ceiling: bool,
) -> ShapeScore:
    """`score_shape` for shapes known to have a surface and no bad number, None for an empty one, and their unit.

    Looking for faults again takes as long as a third of the scoring.
    """
    assert protocol.samples is not None
    truth = unit.normalize(target)
    target_draw = _draw(truth, protocol.samples[1], generator(seed, item, repeat, "target"))
    points = {"prediction": 0, "target": len(target_draw[0])}
    ceiling_metrics: dict[str, float | None] = {}
    if ceiling:
        one, other = _independent(truth, target_draw, seed, item, repeat, protocol)
        points["ceiling"] = len(one[0])
        if len(one[0]):
            ceiling_metrics = surface_metrics(surface_distances(*one, *other), protocol)

    if prediction is None:
        metrics = surface_metrics(None, protocol)
        if protocol.empty == "origin":
            origin = target_draw[0].new_zeros(1, 3)  # any number of equal points has the same means as one
            scored = surface_metrics(surface_distances(origin, origin, *target_draw), protocol)
            metrics = {name: scored[name] if value is None else value for name, value in metrics.items()}
        return ShapeScore("empty", "", metrics, ceiling_metrics, points)
    pred_points, pred_normals = _draw(
        unit.normalize(prediction), protocol.samples[0], generator(seed, item, repeat, "prediction")
    )
    like = target_draw[0]  # the prediction may live on another device or in another precision
    pred_draw = pred_points.to(like), None if pred_normals is None else pred_normals.to(like)
    points["prediction"] = len(pred_points)
    return ShapeScore(
        "ok", "", surface_metrics(surface_distances(*pred_draw, *target_draw), protocol), ceiling_metrics, points
    )


def check_frames(protocol: Protocol, frame: Frame | None, target_frame: Frame) -> None:
    """Raise a ValueError unless both shapes live in one frame that has the protocol's axes."""
    if frame is None:
        raise ValueError("the prediction has no frame: coordinates without a frame cannot be compared")
    if not frame.close_to(target_frame):
        raise ValueError(f"prediction and target are in different frames, {frame} and {target_frame}")
    if frame.name != protocol.frame:
        raise ValueError(f"protocol {protocol.name!r} compares in the {protocol.frame!r} frame, got {frame}")


def check_samples(protocol: Protocol, prediction: Meshes | Pointclouds | None, target: Meshes | Pointclouds) -> None:
    """Raise a ValueError when a mesh is to be sampled and the protocol gives no number of points."""
    assert protocol.samples is not None
    for name, shape, count in zip(("prediction", "target"), (prediction, target), protocol.samples):
        if count is None and isinstance(shape, Meshes):
            raise ValueError(
                f"protocol {protocol.name!r} takes point clouds as they are, but the {name} is a mesh: sample it, or "
                "set the number of points with dataclasses.replace(protocol, samples=...)"
            )


def shape_problem(shape: Meshes | Pointclouds) -> str:
    """Why a shape cannot be sampled: "no surface", where its first bad number is, or "" if it can."""
    rows = shape.points_packed() if isinstance(shape, Pointclouds) else shape.verts_packed()
    kind = "point" if isinstance(shape, Pointclouds) else "vertex"
    bad = (~torch.isfinite(rows)).any(1)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        return f"{kind} {index} is {rows[index].tolist()}"
    if isinstance(shape, Pointclouds):
        normals = shape.normals_packed()
        if normals is not None and not bool(torch.isfinite(normals).all()):
            return "a normal is not finite"
        return "" if len(rows) else "no surface"
    area = mesh_face_areas_normals(rows.double(), shape.faces_packed()).areas.sum()  # as the sampler measures it
    return "" if float(area) > 0 else "no surface"


def unit_frame(protocol: Protocol, target: Meshes | Pointclouds, item: str) -> Frame:
    """The protocol's scale rule for this target, as the frame both shapes are moved into."""
    scale = protocol.scale
    if isinstance(scale, Fixed):
        return Frame(protocol.frame, scale=1 / scale.factor)
    if isinstance(scale, UnitBall):
        return _unit_ball(protocol.frame, target)
    box = target.get_bounding_boxes()[0].double()
    edge = float((box[:, 1] - box[:, 0]).max())
    if isinstance(scale, LongestEdge):
        if edge == 0:
            raise ValueError(f"target of {item} is a single point: it has no longest edge to be {scale.length}")
        return Frame(protocol.frame, scale=edge / scale.length)
    if scale.longest_edge is not None and abs(edge - scale.longest_edge) > 0.2 * scale.longest_edge:
        raise ValueError(
            f"protocol {protocol.name!r} needs targets normalized to a longest edge of {scale.longest_edge}, "
            f"that of {item} is {edge:.4g}"
        )
    return Frame(protocol.frame)


def _unit_ball(name: str, target: Meshes | Pointclouds) -> Frame:
    """Centroid of the points, or of the surface, at 0; the farthest point or vertex at distance 1."""
    if isinstance(target, Pointclouds):
        return Frame.unit_ball(target.points_packed(), name)
    verts = target.verts_packed().double()
    corners = verts[target.faces_packed()]  # (F, 3, 3)
    areas = mesh_face_areas_normals(verts, target.faces_packed()).areas
    center = (areas[:, None] * corners.mean(1)).sum(0) / areas.sum()
    x, y, z = center.tolist()
    return Frame(name, (x, y, z), float((corners - center).norm(dim=2).max()))


def surface_metrics(distances: SurfaceDistances | None, protocol: Protocol) -> dict[str, float | None]:
    """The protocol's columns, each named with its unit; for None, those of an empty prediction: 0 and undefined."""
    columns: dict[str, float | None] = {}
    if protocol.chamfer is not None:
        spec = protocol.chamfer
        unit = "" if spec.report == 1 else f" (x{spec.report:g})"
        values: dict[str, Tensor | None] = dict.fromkeys(("CD", "Accuracy", "Completeness"))
        if distances is not None:
            values["CD"] = chamfer(distances, squared=spec.squared, combine=spec.combine)
            values["Accuracy"], values["Completeness"] = directed(distances, squared=spec.squared)
        columns |= {name + unit: None if v is None else float(v) * spec.report for name, v in values.items()}
    if protocol.normals is not None:
        known = distances is not None and distances.to_target_cosine is not None
        absolute = protocol.normals == "absolute"
        name = "|NC|" if absolute else "NC"
        columns[name] = float(normal_consistency(distances, absolute=absolute)) if known and distances else None
    if protocol.f_score is not None:
        f = protocol.f_score
        factor, unit = (100.0, " (%)") if f.unit == "percent" else (1.0, "")
        zeros = torch.zeros(len(f.thresholds))
        scores = FScores(zeros, zeros, zeros)
        if distances is not None:
            scores = f_score(distances, f.thresholds, comparator=f.comparator, squared=f.squared)
        for index, threshold in enumerate(f.thresholds):
            label = f"@d2<{threshold:g}{unit}" if f.squared else f"@{threshold:g}{unit}"
            for name, score in (("F1", scores.f1), ("Precision", scores.precision), ("Recall", scores.recall)):
                columns[name + label] = float(score[index]) * factor
    return columns


# ---------------------------------------------------------------------------------------------------- sampling

Draw = tuple[Tensor, Tensor | None]  # points (N, 3) and their normals


def generator(seed: int, item: str, repeat: int, role: str) -> torch.Generator:
    """The random stream of one role in one item, the same on every machine and in every order of items."""
    digest = hashlib.sha256(f"{seed}\0{item}\0{repeat}\0{role}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(shape: Meshes | Pointclouds, count: int | None, stream: torch.Generator) -> Draw:
    if isinstance(shape, Pointclouds):
        available = int(shape.num_points_per_cloud()[0])
        return _rows(shape, torch.randperm(available, generator=stream)[:count])
    assert count is not None
    points, normals = sample_points_from_meshes(shape, count, return_normals=True, generator=stream)
    return points[0], normals[0]


def _rows(cloud: Pointclouds, rows: Tensor) -> Draw:
    points, normals, _ = cloud.get_cloud(0)
    rows = rows.to(points.device)
    return points[rows], None if normals is None else normals[rows]


def _independent(
    truth: Meshes | Pointclouds, drawn: Draw, seed: int, item: str, repeat: int, protocol: Protocol
) -> tuple[Draw, Draw]:
    """Two disjoint draws from the target, as many points as the protocol's where the target has that many.

    A cloud with fewer than twice as many is cut in halves, and its ceiling is a pessimistic one (none for one point).
    """
    assert protocol.samples is not None
    if not isinstance(truth, Pointclouds):
        count = protocol.samples[1] if protocol.samples[0] is None else protocol.samples[0]
        return _draw(truth, count, generator(seed, item, repeat, "ceiling")), drawn
    order = torch.randperm(len(truth.points_packed()), generator=generator(seed, item, repeat, "target"))
    counts = [len(order) if count is None else count for count in protocol.samples]
    half = min(*counts, len(order) // 2)
    return _rows(truth, order[len(order) - half :]), _rows(truth, order[:half])
