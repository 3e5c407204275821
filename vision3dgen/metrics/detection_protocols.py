"""Average precision as data: everything that moves a published number, under the name it is known by.

`metrics/overlap.py`, `matching.py` and `precision.py` only carry a protocol out. A variation is
`dataclasses.replace(DETECTION_PROTOCOLS["coco_boxes"], thresholds=(0.5,), name="boxes50")`: its name and fields travel
with the result. docs/detection_metrics.md has the formulas.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vision3dgen.checks import check_choice
from vision3dgen.metrics.protocols import Distance, Probability

# ----------------------------------------------------------------------------------------------------- overlaps


@dataclass(frozen=True)
class BoxIoU:
    """Intersection over union of boxes."""


@dataclass(frozen=True)
class MaskIoU:
    """Intersection over union of masks."""


@dataclass(frozen=True)
class MeshF1:
    """F1 at a distance between points drawn on two meshes, the truth's longest bounding box edge being `longest_edge`.

    samples: points drawn on each. depth: "true" moves the predicted mesh away from the camera or towards it, growing
    with the distance, so that what is seen stays the same and the middle of its depth is the truth's, which no single
    picture tells; "predicted" leaves it where it is.
    """

    threshold: float
    comparator: Distance
    longest_edge: float
    samples: int
    depth: Literal["true", "predicted"]

    def __post_init__(self) -> None:
        check_choice("comparator", self.comparator, ("<", "<="))
        check_choice("depth", self.depth, ("true", "predicted"))


Overlap = BoxIoU | MaskIoU | MeshF1


@dataclass(frozen=True)
class AreaRange:
    """Objects of `low` to `high` square pixels, both included, None for no end; the others are ignored."""

    name: str
    low: float
    high: float | None


EVERY_SIZE = AreaRange("all", 0.0, None)

# ---------------------------------------------------------------------------------------------------- protocol


@dataclass(frozen=True)
class DetectionProtocol:
    """Everything that moves a detection score.

    overlap: what is measured between a detection and a truth of its class.
    thresholds, comparator: the overlaps from which on a detection has found the truth.
    matching: "best_free": the detections of an image, best score first, each take the truth that they overlap most
        among those not taken yet, and an ignored one only where there is no other; "best": each asks for the truth that
        it overlaps most, and is wrong when that is taken.
    recalls: at how many recalls, evenly from 0 to 1, the precision is averaged; None: the area under the curve.
    areas: the ranges of size, the first one of the headline.
    max_detections: how many detections of a class count in an image, ascending, the last for the headline; None: all.
    by_class: whether classes are told apart; else everything is one class.
    gate: box overlap above which a detection and a truth may be compared at all, and below which with all truths a
        detection counts for nothing; None: no gate.
    """

    name: str
    overlap: Overlap
    thresholds: tuple[float, ...]
    comparator: Probability
    matching: Literal["best_free", "best"]
    recalls: int | None
    areas: tuple[AreaRange, ...]
    max_detections: tuple[int | None, ...]
    by_class: bool
    gate: float | None
    citation: str

    def __post_init__(self) -> None:
        check_choice("comparator", self.comparator, (">", ">="))
        check_choice("matching", self.matching, ("best_free", "best"))
        if not self.thresholds or not all(0 < t <= 1 for t in self.thresholds):
            raise ValueError(f"thresholds must be above 0 and at most 1, got {self.thresholds}")
        if self.recalls is not None and self.recalls < 2:
            raise ValueError(f"recalls must be at least 2 or None, got {self.recalls}")
        if not self.areas or not self.max_detections:
            raise ValueError(f"protocol {self.name!r} needs at least one range of areas and one of max_detections")
        limits = [float("inf") if limit is None else limit for limit in self.max_detections]
        if limits != sorted(limits) or limits[0] < 1:
            raise ValueError(f"max_detections must ascend from at least 1, None last, got {self.max_detections}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; the overlap with its `kind`."""
        fields = dataclasses.asdict(self)
        return fields | {"overlap": {"kind": type(self.overlap).__name__, **fields["overlap"]}}


def _percents(first: int, last: int, step: int) -> tuple[float, ...]:
    return tuple(percent / 100 for percent in range(first, last + 1, step))


_COCO = DetectionProtocol(
    name="coco_boxes",
    overlap=BoxIoU(),
    thresholds=_percents(50, 95, 5),
    comparator=">=",
    matching="best_free",
    recalls=101,
    areas=(
        EVERY_SIZE,
        AreaRange("small", 0.0, 32.0**2),
        AreaRange("medium", 32.0**2, 96.0**2),
        AreaRange("large", 96.0**2, None),
    ),
    max_detections=(1, 10, 100),
    by_class=True,
    gate=None,
    citation="Lin et al.: Microsoft COCO, ECCV 2014, and its evaluation server",
)
_VOC2007 = DetectionProtocol(
    name="voc2007",
    overlap=BoxIoU(),
    thresholds=(0.5,),
    comparator=">=",
    matching="best",
    recalls=11,
    areas=(EVERY_SIZE,),
    max_detections=(None,),
    by_class=True,
    gate=None,
    citation="Everingham et al.: The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010, Section 4.2",
)
_VOC2010 = dataclasses.replace(
    _VOC2007,
    name="voc2010",
    recalls=None,
    citation="Everingham et al.: The PASCAL Visual Object Classes Challenge: A Retrospective, IJCV 2015",
)
_PIX3D = dataclasses.replace(
    _VOC2010,
    name="pix3d_boxes",
    comparator=">",
    matching="best_free",
    gate=0.3,
    citation="Gkioxari, Malik, Johnson: Mesh R-CNN, ICCV 2019, Table 5",
)
_F1 = MeshF1(threshold=0.3, comparator="<", longest_edge=10.0, samples=10_000, depth="true")

DETECTION_PROTOCOLS: dict[str, DetectionProtocol] = {
    protocol.name: protocol
    for protocol in (
        _COCO,
        dataclasses.replace(_COCO, name="coco_masks", overlap=MaskIoU()),
        _VOC2007,
        _VOC2010,
        _PIX3D,
        dataclasses.replace(_PIX3D, name="pix3d_masks", overlap=MaskIoU()),
        dataclasses.replace(_PIX3D, name="pix3d_meshes", overlap=_F1),
        dataclasses.replace(
            _PIX3D,
            name="meshes",
            overlap=dataclasses.replace(_F1, depth="predicted"),
            gate=None,
            citation="vision3dgen: pix3d_meshes where every object has a truth, and depth counts",
        ),
        dataclasses.replace(
            _COCO,
            name="proposals",
            max_detections=(10, 100, 1000),
            by_class=False,
            citation="Hosang et al.: What makes for effective detection proposals?, PAMI 2016, as COCO averages it",
        ),
    )
}
