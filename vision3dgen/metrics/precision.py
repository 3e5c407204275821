"""Precision over recall, and what is averaged over it.

Down the detections of a class, best score first, tp and fp count those that found an object and those that did not:

    recall = tp / objects      precision = tp / (tp + fp)      p(r) = the highest precision at a recall of r or more

and AP is the mean of p at 11 or 101 recalls from 0 to 1, or the area under p. Detections and objects that are ignored
are in no count.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from vision3dgen.metrics.detection_protocols import DetectionProtocol
from vision3dgen.metrics.matching import Matched, match
from vision3dgen.metrics.overlap import ImageRecord


class AveragePrecision(NamedTuple):
    """By class K, threshold T, range of areas A, number of detections M; NaN for classes without an object to find."""

    labels: Int64[np.ndarray, " K"]
    ap: Float64[np.ndarray, "K T A M"]
    recall: Float64[np.ndarray, "K T A M"]  # the highest that is reached
    precision: Float64[np.ndarray, "K T A M R"]  # p at the protocol's recalls; R = 0 where it takes the area
    objects: Int64[np.ndarray, "K A"]  # to be found


def average_precision(
    records: Sequence[ImageRecord], protocol: DetectionProtocol, labels: Iterable[int] = ()
) -> AveragePrecision:
    """AP of each class of a set of images, which `record_of` made under the same protocol, in any order.

    labels: the classes; those that the images have by default.
    """
    matched = match(records, protocol)
    classes = np.array(sorted({*labels, *matched.truth_labels.tolist(), *matched.labels.tolist()}), dtype=np.int64)
    shape = (len(classes), len(protocol.thresholds), len(protocol.areas), len(protocol.max_detections))
    recalls = recalls_of(protocol)
    ap, recall = np.full(shape, np.nan), np.full(shape, np.nan)
    precision = np.full((*shape, len(recalls)), np.nan)
    objects = np.zeros((len(classes), len(protocol.areas)), dtype=np.int64)
    for k, label in enumerate(classes):
        objects[k] = matched.regular[matched.truth_labels == label].sum(0)
        rows = slice(*np.searchsorted(matched.labels, [label, label + 1]))
        for m, limit in enumerate(protocol.max_detections):
            found = _curves(matched, rows, limit, objects[k], recalls)
            ap[k, ..., m], recall[k, ..., m] = found.ap, found.recall
            precision[k, :, :, m] = found.precision
    return AveragePrecision(classes, ap, recall, precision, objects)


def recalls_of(protocol: DetectionProtocol) -> Float64[np.ndarray, " R"]:
    """The recalls at which the precision is looked up.

    Differs: of 11 recalls the fourth is 0.3, and not 0.1 + 0.1 + 0.1, which three objects of ten do not reach.
    """
    if protocol.recalls is None:
        return np.zeros(0)
    if protocol.recalls == 101:
        return np.linspace(0, 1, 101)  # as COCO's evaluation, to the last bit
    return np.arange(protocol.recalls) / (protocol.recalls - 1)


class _Curves(NamedTuple):
    ap: np.ndarray  # (T, A)
    recall: np.ndarray  # (T, A)
    precision: np.ndarray  # (T, A, R)


def _curves(matched: Matched, rows: slice, limit: int | None, objects: np.ndarray, recalls: np.ndarray) -> _Curves:
    """Of one class and number of detections."""
    kept = slice(None) if limit is None else matched.ranks[rows] < limit
    found, ignored = (field[rows][kept].transpose(2, 1, 0) for field in (matched.found, matched.ignored))  # (T, A, D)
    tp = (found & ~ignored).cumsum(-1)
    counted = (~ignored).cumsum(-1)
    precision = np.divide(tp, counted, out=np.zeros(tp.shape), where=counted > 0)
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    some = objects > 0
    number = np.where(some, objects, 1)
    if not tp.shape[-1]:
        nothing = np.where(some, 0.0, np.nan) + np.zeros(tp.shape[:2])
        return _Curves(nothing, nothing, np.repeat(nothing[..., None], len(recalls), -1))
    recall = np.where(some, tp[..., -1] / number, np.nan)
    if not len(recalls):
        area = (envelope * (found & ~ignored)).sum(-1) / number  # each object found raises the recall by 1 / number
        return _Curves(np.where(some, area, np.nan), recall, np.zeros((*recall.shape, 0)))
    at = np.zeros((*recall.shape, len(recalls)))
    for a, count in enumerate(number.tolist()):
        needed = np.searchsorted(np.arange(count + 1) / count, recalls)  # objects to find for a recall
        rows_of = tp[:, a] + np.arange(len(tp))[:, None] * (count + 2)  # one ascending line of whole numbers
        wanted = needed + np.arange(len(tp))[:, None] * (count + 2)
        first = np.searchsorted(rows_of.ravel(), wanted.ravel()).reshape(wanted.shape)
        first -= np.arange(len(tp))[:, None] * tp.shape[-1]
        there = first < tp.shape[-1]
        at[:, a] = np.where(there, np.take_along_axis(envelope[:, a], np.where(there, first, 0), -1), 0)
    at = np.where(some[:, None], at, np.nan)
    return _Curves(at.mean(-1), recall, at)


def headlines(result: AveragePrecision, protocol: DetectionProtocol) -> dict[str, float | None]:
    """The numbers that are printed: means over classes and thresholds, None where no class has an object.

    AP, and AP50 and AP75 of these thresholds, AP_small, ... of the further ranges of areas; AR_n, the mean recall of n
    detections, AR_small, ... of most detections. Without several numbers of detections there is AR alone.
    """
    values: dict[str, Any] = {"AP": result.ap[:, :, 0, -1]}
    for t, threshold in enumerate(protocol.thresholds):
        if threshold in (0.5, 0.75):
            values[f"AP{round(100 * threshold)}"] = result.ap[:, t, 0, -1]
    values |= {f"AP_{each.name}": result.ap[:, :, a, -1] for a, each in enumerate(protocol.areas) if a}
    for m, limit in enumerate(protocol.max_detections):
        name = "AR" if len(protocol.max_detections) == 1 else f"AR_{limit}"
        values[name] = result.recall[:, :, 0, m]
    values |= {f"AR_{each.name}": result.recall[:, :, a, -1] for a, each in enumerate(protocol.areas) if a}
    return {name: mean_of_known(of) for name, of in values.items()}


def mean_of_known(values: np.ndarray) -> float | None:
    """The mean of those that are not NaN, None if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
