"""Evaluation protocols as data: everything that moves a published number, under the name it was published.

A `Protocol` says in which frame and unit shapes are compared, how many points are drawn, what is squared, summed or
thresholded, and how items are averaged; `metrics/shape.py` and `metrics/evaluation.py` only carry it out. A variation
is `dataclasses.replace(PROTOCOLS["onet"], samples=(10_000, 10_000), name="onet_10k")`: its name and fields travel with
the result. docs/metrics.md has the formulas.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vision3dgen.checks import check_choice

# ------------------------------------------------------------------------------------------------------- scale


@dataclass(frozen=True)
class LongestEdge:
    """Multiply both shapes so that the longest edge of the target's axis-aligned bounding box is `length`.

    The box is taken in the protocol's frame: in a camera frame it turns with the view, and so does the unit.
    """

    length: float


@dataclass(frozen=True)
class Fixed:
    """Multiply both shapes by one factor, the same for every item."""

    factor: float


@dataclass(frozen=True)
class UnitBall:
    """Move the target's centroid to 0 and its farthest point to distance 1; the prediction moves with it.

    For a cloud the centroid is the mean of its points; for a mesh, the mean over its surface.
    """


@dataclass(frozen=True)
class AsIs:
    """Compare in the frame's own unit.

    longest_edge: what the frame promises the target's longest bounding box edge to be; a target more than a fifth away
    is an error, because its numbers would be in another unit. None: nothing is promised.
    """

    longest_edge: float | None


Scale = LongestEdge | Fixed | UnitBall | AsIs

# ----------------------------------------------------------------------------------------------------- metrics

Distance = Literal["<", "<="]
Probability = Literal[">", ">="]
Combine = Literal["sum", "mean"]


@dataclass(frozen=True)
class Chamfer:
    """squared: distances are squared before the mean; combine: of the two directions; report: factor on the result."""

    squared: bool
    combine: Combine
    report: float


@dataclass(frozen=True)
class FScore:
    """Thresholds act on the distance, or on its square if `squared`, in the unit that the scale rule leaves."""

    thresholds: tuple[float, ...]
    comparator: Distance
    squared: bool
    unit: Literal["percent", "fraction"]


@dataclass(frozen=True)
class PointIoU:
    """IoU over `points` of an item's points, which are uniform in [-box, box]^3 of the object frame.

    source "mesh": inside the predicted mesh; "network": the predicted occupancy probability compared with `threshold`.
    """

    points: int
    box: float
    source: Literal["mesh", "network"]
    threshold: float | None
    comparator: Probability | None

    def __post_init__(self) -> None:
        if (self.source == "network") != (self.threshold is not None and self.comparator is not None):
            raise ValueError(
                f"a point IoU of a network needs a threshold and a comparator, of a mesh neither, got {self}"
            )


@dataclass(frozen=True)
class VoxelIoU:
    """IoU of `resolution`^3 cells filling [-0.5, 0.5]^3 of the object frame.

    A cell is occupied where its probability passes `threshold`. The probabilities are the prediction's voxels, or its
    occupancy function at the cells' centers.
    """

    resolution: int
    threshold: float
    comparator: Probability


Aggregation = Literal["per_instance", "class_mean"]

# ---------------------------------------------------------------------------------------------------- protocol


@dataclass(frozen=True)
class Protocol:
    """Everything that moves a score.

    frame: axes of the comparison, "object" (canonical) or "camera" (viewer-centered).
    target: which geometry of an item is the truth, its "mesh" or its "surface" cloud.
    samples: points drawn on prediction and target; None for protocols without surface metrics. A count of None takes
        every point of a cloud, and is an error for a mesh. A cloud with fewer points than asked is taken whole.
    aggregation: the headline average first; "per_instance" over items, "class_mean" over the means of the classes.
    views: which views of a model are scored. "first": view 0 only, checked; the others describe the split to give.
    empty: an empty prediction "exclude"s its item from distances and normals, or is scored as points at the "origin"
        with zero normals. In both it scores 0 in every F-score and IoU, and is counted.
    """

    name: str
    frame: Literal["object", "camera"]
    target: Literal["mesh", "surface"]
    scale: Scale
    samples: tuple[int | None, int | None] | None
    chamfer: Chamfer | None
    f_score: FScore | None
    normals: Literal["absolute", "signed"] | None
    iou: tuple[PointIoU | VoxelIoU, ...]
    aggregation: tuple[Aggregation, ...]
    views: Literal["first", "split", "five", "random"]
    empty: Literal["exclude", "origin"]
    citation: str

    def __post_init__(self) -> None:
        check_choice("frame", self.frame, ("object", "camera"))
        check_choice("target", self.target, ("mesh", "surface"))
        check_choice("empty", self.empty, ("exclude", "origin"))
        surface = self.chamfer is not None or self.f_score is not None or self.normals is not None
        if surface != (self.samples is not None):
            raise ValueError(f"protocol {self.name!r} must give samples exactly when it has surface metrics")
        if not self.aggregation:
            raise ValueError(f"protocol {self.name!r} must name at least one aggregation")
        if self.frame == "camera" and self.iou:
            raise ValueError(f"protocol {self.name!r} compares in the camera frame, IoU needs the object frame")

    def to_dict(self) -> dict[str, Any]:
        """The protocol as JSON types, each part with its `kind`."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


MESHRCNN = Protocol(
    name="meshrcnn",
    frame="camera",
    target="mesh",
    scale=LongestEdge(10.0),
    samples=(10_000, 10_000),
    chamfer=Chamfer(squared=True, combine="sum", report=1.0),
    f_score=FScore((0.1, 0.3, 0.5), "<", squared=False, unit="percent"),
    normals="absolute",
    iou=(),
    aggregation=("per_instance", "class_mean"),
    views="split",
    empty="origin",
    citation="Gkioxari, Malik, Johnson: Mesh R-CNN, ICCV 2019, Table 2",
)

PIXEL2MESH = dataclasses.replace(
    MESHRCNN,
    name="pixel2mesh",
    scale=Fixed(0.57),
    chamfer=Chamfer(squared=True, combine="sum", report=1000.0),
    f_score=FScore((1e-4, 2e-4), "<", squared=True, unit="percent"),
    normals=None,
    aggregation=("class_mean",),
    citation="Wang et al.: Pixel2Mesh, ECCV 2018, Table 1, as evaluated by Mesh R-CNN, ICCV 2019, Table 1",
)

ONET = Protocol(
    name="onet",
    frame="object",
    target="surface",
    scale=AsIs(longest_edge=1.0),
    samples=(100_000, 100_000),
    chamfer=Chamfer(squared=False, combine="mean", report=10.0),
    f_score=None,
    normals="absolute",
    iou=(
        PointIoU(100_000, box=0.55, source="mesh", threshold=None, comparator=None),
        PointIoU(100_000, box=0.55, source="network", threshold=0.2, comparator=">="),
    ),
    aggregation=("class_mean",),
    views="first",
    empty="exclude",
    citation="Mescheder et al.: Occupancy Networks, CVPR 2019, Table 1",
)

CONVONET = dataclasses.replace(
    ONET,
    name="convonet",
    f_score=FScore((0.01, 0.015, 0.02), "<=", squared=False, unit="fraction"),
    citation="Peng et al.: Convolutional Occupancy Networks, ECCV 2020, Table 1",
)

WHAT3D = Protocol(
    name="what3d",
    frame="camera",
    target="surface",
    scale=AsIs(longest_edge=None),
    samples=(None, None),
    chamfer=None,
    f_score=FScore((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), "<", squared=False, unit="fraction"),
    normals=None,
    iou=(),
    aggregation=("per_instance",),
    views="five",
    empty="exclude",
    citation="Tatarchenko et al.: What Do Single-view 3D Reconstruction Networks Learn?, CVPR 2019, Section 5",
)

ATLASNET = Protocol(
    name="atlasnet",
    frame="object",
    target="surface",
    scale=UnitBall(),
    samples=(2500, 2500),
    chamfer=Chamfer(squared=True, combine="sum", report=1000.0),
    f_score=FScore((0.001,), "<", squared=True, unit="fraction"),
    normals=None,
    iou=(),
    aggregation=("per_instance",),
    views="first",
    empty="exclude",
    citation="Groueix et al.: AtlasNet, CVPR 2018, Table 1, and its released evaluation",
)

R2N2 = Protocol(
    name="r2n2",
    frame="object",
    target="mesh",
    scale=AsIs(longest_edge=None),
    samples=None,
    chamfer=None,
    f_score=None,
    normals=None,
    iou=(VoxelIoU(32, threshold=0.4, comparator=">="),),
    aggregation=("per_instance",),
    views="random",
    empty="exclude",
    citation="Choy et al.: 3D-R2N2, ECCV 2016, Section 5",
)

# Ours. Un-squared distances keep the unit of the shape, and one bad point cannot carry the mean; the unit is the
# longest edge, so a distance reads as a fraction of the object; the mean of both directions of one shift is that shift;
# truth is drawn from the mesh, so that repeats and the ceiling are independent samples; 10,000 points leave the ceiling
# of F1@0.01 near 40-90 % and of F1@0.02 above 85 %, so several thresholds are reported beside the ceiling.
DEFAULT = Protocol(
    name="default",
    frame="object",
    target="mesh",
    scale=LongestEdge(1.0),
    samples=(10_000, 10_000),
    chamfer=Chamfer(squared=False, combine="mean", report=1.0),
    f_score=FScore((0.01, 0.02, 0.05), "<", squared=False, unit="fraction"),
    normals="absolute",
    iou=(
        VoxelIoU(32, threshold=0.5, comparator=">="),
        PointIoU(10_000, box=0.55, source="mesh", threshold=None, comparator=None),
    ),
    aggregation=("class_mean", "per_instance"),
    views="split",
    empty="exclude",
    citation="vision3dgen, docs/metrics.md",
)

PROTOCOLS: dict[str, Protocol] = {
    "meshrcnn": MESHRCNN,
    "pixel2mesh": PIXEL2MESH,
    "onet": ONET,
    "convonet": CONVONET,
    "what3d": WHAT3D,
    "atlasnet": ATLASNET,
    "r2n2": R2N2,
    "default": DEFAULT,
}
