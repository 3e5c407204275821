"""Which detection found which object, for all images, classes, sizes and thresholds of a set at once.

The rules are sequential: a detection's choice depends on what those before it took. But only within one image and
class, so step r lets the r-th detection of every image and class choose, in all of them together.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from vision3dgen.metrics.detection_protocols import DetectionProtocol
from vision3dgen.metrics.overlap import ImageRecord

BLOCK = 1 << 22  # choices looked at together


class Matched(NamedTuple):
    """Detections of a set that count, by class and then score (equal scores in the order of the images)."""

    labels: Int64[np.ndarray, " D"]
    scores: Float64[np.ndarray, " D"]
    ranks: Int64[np.ndarray, " D"]  # among those of their image and class, from 0
    found: Bool[np.ndarray, "D A T"]  # an object, by range of areas and threshold
    ignored: Bool[np.ndarray, "D A T"]  # neither right nor wrong
    truth_labels: Int64[np.ndarray, " G"]
    regular: Bool[np.ndarray, "G A"]  # truths that are asked for


class _Pairs(NamedTuple):
    detection: np.ndarray
    truth: np.ndarray
    overlap: np.ndarray


def match(records: Sequence[ImageRecord], protocol: DetectionProtocol) -> Matched:
    """The records' detections matched with their truths by the protocol's rule.

    Raises ValueError for an image that comes twice. The records are taken in the order of their ids, so that no order
    and no division of the images moves a number.
    """
    records = sorted(records, key=lambda record: record.id)
    for one, next_ in itertools.pairwise(records):
        if one.id == next_.id:
            raise ValueError(f"image {one.id!r} comes twice: every image must be scored once")
    image = np.repeat(np.arange(len(records)), [len(record.scores) for record in records])
    labels = _joined([record.labels for record in records], np.int64)
    scores = _joined([record.scores for record in records], np.float64)
    counted = _joined([record.counted for record in records], bool)
    areas = _joined([record.areas for record in records], np.float64)

    # The best of each image and class, as many as count
    order = np.lexsort((-scores, labels, image))
    order = order[counted[order]]
    ranks = _places(image[order], labels[order])
    limit = protocol.max_detections[-1]
    if limit is not None:
        order, ranks = order[ranks < limit], ranks[ranks < limit]
    place = np.full(len(labels), -1)
    place[order] = np.arange(len(order))

    truth_labels = _joined([record.truth_labels for record in records], np.int64)
    crowd = _joined([record.crowd for record in records], bool)
    truth_areas = _joined([record.truth_areas for record in records], np.float64)
    ignored = _joined([record.ignored for record in records], bool)
    regular = _inside(truth_areas, protocol) & ~(ignored | crowd)[:, None]

    pairs = _pairs(records, place)
    shape = (len(order), len(protocol.areas), len(protocol.thresholds))
    found, passed = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    _choose(pairs, image[order], labels[order], crowd, regular, protocol, found, passed)
    passed |= ~found & ~_inside(areas[order], protocol)[:, :, None]

    final = np.lexsort((np.arange(len(order)), -scores[order], labels[order]))
    return Matched(
        labels[order][final], scores[order][final], ranks[final], found[final], passed[final], truth_labels, regular
    )


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=kind), *parts])


def _places(*keys: np.ndarray) -> Int64[np.ndarray, " N"]:
    """The place of each row among those before it that have equal keys, which lie together."""
    count = len(keys[0])
    new = np.zeros(count, dtype=bool)
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    new[:1] = True
    starts = np.flatnonzero(new)
    return np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))


def _inside(areas: np.ndarray, protocol: DetectionProtocol) -> Bool[np.ndarray, "N A"]:
    return np.stack(
        [(areas >= each.low) & (areas <= (np.inf if each.high is None else each.high)) for each in protocol.areas], 1
    )


def _pairs(records: Sequence[ImageRecord], place: np.ndarray) -> _Pairs:
    """Pairs with the places of the detections that count, and the numbers of truths over all images."""
    before = np.cumsum([0] + [len(record.scores) for record in records])
    before_true = np.cumsum([0] + [len(record.truth_labels) for record in records])
    detection = _joined([r.pairs[:, 0] + start for r, start in zip(records, before)], np.int64)
    truth = _joined([r.pairs[:, 1] + start for r, start in zip(records, before_true)], np.int64)
    overlap = _joined([record.overlaps for record in records], np.float64)
    known = place[detection] >= 0
    return _Pairs(place[detection][known], truth[known], overlap[known])


def _choose(
    pairs: _Pairs, image: np.ndarray, labels: np.ndarray, crowd: np.ndarray, regular: np.ndarray,
    protocol: DetectionProtocol, found: np.ndarray, passed: np.ndarray,
) -> None:  # fmt: skip
    """Fill in `found`, and `passed` for those that found what is ignored."""
    if not len(pairs.detection):
        return
    active = np.unique(pairs.detection)
    step_of = np.zeros(len(image), dtype=np.int64)
    step_of[active] = _places(image[active], labels[active])
    # Within a detection the preferred truth comes last. Of equal overlaps COCO takes the last truth, VOC the first one.
    last = pairs.truth if protocol.matching == "best_free" else -pairs.truth
    order = np.lexsort((last, pairs.overlap, pairs.detection, step_of[pairs.detection]))
    detection, truth, overlap = (field[order] for field in pairs)
    step = step_of[detection]
    thresholds = np.array(protocol.thresholds)
    taken = np.zeros((len(regular), len(protocol.areas), len(thresholds)), dtype=bool)

    first = np.flatnonzero(np.append(True, detection[1:] != detection[:-1]))  # of each detection's pairs
    sizes = len(protocol.areas) * len(thresholds) * np.diff(np.append(first, len(detection)))
    start = 0
    while start < len(first):  # blocks of detections of one step
        stop = int(np.searchsorted(step[first], step[first[start]], side="right"))
        stop = max(start + 1, min(stop, start + int(np.searchsorted(sizes[start:stop].cumsum(), BLOCK, side="right"))))
        low, high = first[start], first[stop] if stop < len(first) else len(detection)
        mine, objects = detection[first[start:stop]], truth[low:high]
        reach = overlap[low:high, None] >= thresholds
        if protocol.comparator == ">":
            reach = overlap[low:high, None] > thresholds
        number = np.arange(high - low)[:, None, None]
        if protocol.matching == "best_free":
            possible = reach[:, None] & (~taken[objects] | crowd[objects, None, None])
            wish = np.where(possible, number + (high - low) * regular[objects][:, :, None], -1)
            best = np.maximum.reduceat(wish, first[start:stop] - low, axis=0)  # (n, A, T)
            got = best >= 0
        else:
            wish = np.where(reach[:, None], number, -1)
            wish = np.broadcast_to(wish, (high - low, *taken.shape[1:]))
            best = np.maximum.reduceat(wish, first[start:stop] - low, axis=0)
            got = best >= 0
        chosen = objects[best % (high - low)]
        a, t = np.arange(taken.shape[1])[:, None], np.arange(taken.shape[2])
        asked_for = regular[chosen, a]
        if protocol.matching == "best":
            got &= ~(taken[chosen, a, t] & asked_for)
        found[mine] = got
        passed[mine] = got & ~asked_for
        who = np.nonzero(got)
        taken[chosen[who], who[1], who[2]] = True
        start = stop
