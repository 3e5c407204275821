import dataclasses
import json

import pytest
from jaxtyping import TypeCheckError

from vision3dgen.metrics.protocols import (
    PROTOCOLS,
    AsIs,
    Chamfer,
    Fixed,
    FScore,
    LongestEdge,
    PointIoU,
    Protocol,
    UnitBall,
    VoxelIoU,
)


def test_the_table_names_each_protocol_once():
    assert list(PROTOCOLS) == [
        "meshrcnn",
        "pixel2mesh",
        "onet",
        "convonet",
        "what3d",
        "atlasnet",
        "r2n2",
        "default",
    ]
    assert all(protocol.name == name and protocol.citation for name, protocol in PROTOCOLS.items())


# frame, scale, samples, (squared, combine, report), (thresholds, comparator, squared, unit), normals, headline, views
PUBLISHED = {
    "meshrcnn": (
        "camera",
        LongestEdge(10.0),
        (10_000, 10_000),
        Chamfer(True, "sum", 1.0),
        FScore((0.1, 0.3, 0.5), "<", False, "percent"),
        "absolute",
        "per_instance",
        "split",
    ),
    "pixel2mesh": (
        "camera",
        Fixed(0.57),
        (10_000, 10_000),
        Chamfer(True, "sum", 1000.0),
        FScore((0.0001, 0.0002), "<", True, "percent"),
        None,
        "class_mean",
        "split",
    ),
    "onet": (
        "object",
        AsIs(1.0),
        (100_000, 100_000),
        Chamfer(False, "mean", 10.0),
        None,
        "absolute",
        "class_mean",
        "first",
    ),
    "convonet": (
        "object",
        AsIs(1.0),
        (100_000, 100_000),
        Chamfer(False, "mean", 10.0),
        FScore((0.01, 0.015, 0.02), "<=", False, "fraction"),
        "absolute",
        "class_mean",
        "first",
    ),
    "what3d": (
        "camera",
        AsIs(None),
        (None, None),
        None,
        FScore((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), "<", False, "fraction"),
        None,
        "per_instance",
        "five",
    ),
    "atlasnet": (
        "object",
        UnitBall(),
        (2500, 2500),
        Chamfer(True, "sum", 1000.0),
        FScore((0.001,), "<", True, "fraction"),
        None,
        "per_instance",
        "first",
    ),
    "r2n2": ("object", AsIs(None), None, None, None, None, "per_instance", "random"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_protocols_are_as_published(name):
    p = PROTOCOLS[name]
    assert (p.frame, p.scale, p.samples, p.chamfer, p.f_score, p.normals, p.aggregation[0], p.views) == PUBLISHED[name]


def test_published_ious():
    assert PROTOCOLS["onet"].iou == (
        PointIoU(100_000, 0.55, "mesh", None, None),
        PointIoU(100_000, 0.55, "network", 0.2, ">="),
    )
    assert PROTOCOLS["r2n2"].iou == (VoxelIoU(32, 0.4, ">="),)
    assert PROTOCOLS["meshrcnn"].iou == PROTOCOLS["pixel2mesh"].iou == PROTOCOLS["atlasnet"].iou == ()


def test_protocols_are_json_and_immutable():
    for protocol in PROTOCOLS.values():
        values = protocol.to_dict()
        assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert PROTOCOLS["meshrcnn"].to_dict()["scale"] == {"kind": "LongestEdge", "length": 10.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOLS["onet"].name = "mine"


def test_no_field_has_a_default():
    for cls in (Protocol, Chamfer, FScore, PointIoU, VoxelIoU, LongestEdge, Fixed, AsIs):
        fields = dataclasses.fields(cls)
        assert all(f.default is f.default_factory is dataclasses.MISSING for f in fields), cls


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frame": "world"}, "'world'"),
        ({"target": "voxels"}, "'voxels'"),
        ({"empty": "skip"}, "'skip'"),
        ({"samples": None}, "give samples exactly when"),
        ({"aggregation": ()}, "at least one aggregation"),
        ({"frame": "camera"}, "IoU needs the object frame"),
    ],
)
def test_contradictory_protocols_are_refused(changes, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):  # the test run's type checker may come first
        dataclasses.replace(PROTOCOLS["default"], **changes)


def test_a_point_iou_of_a_network_says_its_threshold():
    with pytest.raises(ValueError, match="needs a threshold"):
        PointIoU(10, 0.55, "network", None, None)
