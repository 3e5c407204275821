"""Run lengths and polygons: pycocotools' answers, round trips, errors."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from vision3dgen.files import FileError
from vision3dgen.io import rle_from_coco, rle_to_coco
from vision3dgen.ops import Rle, decode_rle, encode_rle, merge_rle, polygons_to_rle, rle_areas, rle_boxes, rle_iou


def some_masks(trial: int) -> np.ndarray:
    rng = np.random.default_rng(trial)
    height, width = rng.integers(1, 40, 2)
    masks = rng.random((5, height, width)) < rng.random()
    if trial % 3 == 0:
        masks = masks.repeat(3, 1).repeat(7, 2)
    masks[0] = trial % 2
    return masks


def test_runs_areas_boxes_unions_and_iou_equal_pycocotools():
    for trial in range(40):
        masks = some_masks(trial)
        rles = encode_rle(torch.from_numpy(masks))
        theirs = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        assert [rle_to_coco(rle)["counts"].encode() for rle in rles] == [code["counts"] for code in theirs]
        assert (decode_rle(rles).numpy() == masks).all()
        assert (rle_areas(rles) == coco_mask.area(theirs)).all()
        expected = coco_mask.toBbox(theirs)
        expected[:, 2:] += expected[:, :2]
        assert (rle_boxes(rles) == expected).all()
        assert rle_to_coco(merge_rle(rles))["counts"].encode() == coco_mask.merge(theirs)["counts"]
        crowd = np.random.default_rng(trial).random(3) < 0.5
        np.testing.assert_allclose(
            rle_iou(rles, rles[:3], crowd), coco_mask.iou(theirs, theirs[:3], crowd.tolist()), atol=1e-12
        )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_polygons_are_drawn_as_pycocotools_draws_them():
    rng = np.random.default_rng(0)
    for trial in range(120):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        reach = 1.4 * max(height, width)
        polygons = [
            (reach * rng.random(2 * int(rng.integers(3, 9))) - 0.14 * reach).tolist() for _ in range(rng.integers(1, 4))
        ]
        if trial % 4 == 0:
            polygons = [np.round(polygon).tolist() for polygon in polygons]
        if trial % 7 == 0:
            polygons[0] += polygons[0][-2:]  # a corner twice
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
        assert (decode_rle([polygons_to_rle(polygons, (height, width))])[0].numpy() == expected).all(), polygons


def test_a_polygon_by_hand():
    square = polygons_to_rle([[1, 2, 4, 2, 4, 5, 1, 5]], (7, 6))
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[2:5, 1:4] = True
    assert torch.equal(decode_rle([square])[0], expected)
    assert int(rle_areas([polygons_to_rle([], (7, 6))])[0]) == 0


@pytest.mark.parametrize("compressed", [True, False])
def test_files_are_read_as_written(compressed: bool):
    masks = torch.rand(3, 300, 70, generator=torch.Generator().manual_seed(0)) > 0.99
    for rle in encode_rle(masks):
        back = rle_from_coco(rle_to_coco(rle, compressed=compressed), (300, 70), "annotation 1")
        assert (back.counts == rle.counts).all()


def test_empty_sets():
    assert decode_rle([], (3, 5)).shape == (0, 3, 5)
    assert encode_rle(torch.zeros(0, 3, 5, dtype=torch.bool)) == []
    assert rle_boxes([]).shape == (0, 4)
    rles = encode_rle(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert rle_iou(rles, []).shape == (2, 0)
    assert (rle_iou(rles, rles) == 0).all()
    with pytest.raises(ValueError, match="needs the size"):
        decode_rle([])


def test_errors_say_where():
    whole = {"size": [4, 5], "counts": [3, 17]}
    assert int(rle_areas([rle_from_coco(whole, (4, 5), "x")])[0]) == 17
    for segmentation, message in (
        ({"size": [5, 4], "counts": [3, 17]}, "annotation 7: segmentation: the run lengths are of 5 x 4 pixels"),
        ({"size": [4, 5], "counts": [3, 16]}, "add up to 19, 4 x 5 pixels are 20"),
        ({"size": [4, 5], "counts": [23, -3]}, "must not be negative"),
        ({"size": [4, 5], "counts": "P"}, "cut short"),
        ({"size": [4, 5], "counts": "3 "}, "' ' at 1"),
        ({"size": [4, 5], "counts": "é"}, "annotation 7"),
        ({"size": [4, 5]}, "must be polygons or"),
        ([[1, 2, 3, 4]], "at least 3 points, got 4 numbers"),
        ([[1, 2, 3, float("nan"), 5, 6]], "got 6 numbers"),
        ([["a", 2, 3, 4, 5, 6]], "annotation 7"),
    ):
        with pytest.raises(FileError, match=message) as caught:
            rle_from_coco(segmentation, (4, 5), "annotation 7")
        assert "annotation 7" in str(caught.value)
    with pytest.raises(ValueError, match="mask 1 is 2 x 2, expected 4 x 5"):
        decode_rle([Rle((4, 5), np.array([20])), Rle((2, 2), np.array([4]))])
    with pytest.raises(ValueError, match="one size"):
        rle_iou([Rle((4, 5), np.array([20]))], [Rle((2, 2), np.array([4]))])
