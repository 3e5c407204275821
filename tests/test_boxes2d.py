import importlib
import sys
import types

import pytest
import torch

from tests import naive
from vision3dgen.ops import (
    batched_nms,
    box_area,
    box_iou,
    clip_boxes_to_image,
    decode_boxes,
    encode_boxes,
    generalized_box_iou,
    masks_to_boxes,
    nms,
    remove_small_boxes,
    roi_align,
    soft_nms,
    suppression,
    use_backend,
)

# Inside out, flat, a point, outside of every picture, huge.
ODD = torch.tensor(
    [
        [5.0, 6.0, 2.0, 1.0], [3.0, 2.0, 3.0, 9.0], [4.0, 4.0, 4.0, 4.0], [-90.0, -80.0, -70.0, -60.0],
        [-1e6, -1e6, 1e6, 1e6],
    ]
)  # fmt: skip


def boxes_of(count, seed=0, side=30.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 100
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator, dtype=dtype) * side + 1], dim=1)


# ------------------------------------------------------------------------------------------------ areas, overlaps


def test_known_areas_and_overlaps():
    a = torch.tensor([[0.0, 0.0, 4.0, 3.0], [1.0, 1.0, 1.0, 5.0]])
    b = torch.tensor([[2.0, 1.0, 6.0, 4.0], [0.0, 0.0, 4.0, 3.0], [10.0, 10.0, 11.0, 11.0]])
    assert box_area(a).tolist() == [12, 0]
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[4 / 20, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    far = 0 - (121 - 13) / 121
    torch.testing.assert_close(generalized_box_iou(a[:1], b), torch.tensor([[4 / 20 - 4 / 24, 1.0, far]]))


def test_overlaps_equal_those_of_single_pairs():
    a, b = torch.cat([boxes_of(13), ODD]), torch.cat([boxes_of(11, seed=1), ODD])
    pairs = [[naive.box_overlap(x, y) for y in b.tolist()] for x in a.tolist()]
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[iou for iou, _ in row] for row in pairs]))
    torch.testing.assert_close(generalized_box_iou(a, b), torch.tensor([[g for _, g in row] for row in pairs]))
    assert torch.equal(box_iou(a, b), box_iou(b, a).T)
    assert box_iou(a, b[:0]).shape == (18, 0)
    assert generalized_box_iou(a[:0], b).shape == (0, 16)


def test_gradients_of_overlaps():
    a, b = (boxes_of(count, seed=count, dtype=torch.float64).requires_grad_() for count in (5, 3))
    assert torch.autograd.gradcheck(box_iou, (a, b))
    assert torch.autograd.gradcheck(generalized_box_iou, (a, b))
    odd = ODD.double().requires_grad_()
    generalized_box_iou(odd, odd).sum().backward()
    assert odd.grad.isfinite().all()


def test_half_precision_overlaps_are_those_of_float32():
    a = boxes_of(7)
    half = box_iou(a.bfloat16(), a.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), box_iou(a.bfloat16().float(), a.bfloat16().float()), atol=1e-2, rtol=0)


def test_clipped_and_small_boxes():
    clipped = clip_boxes_to_image(torch.tensor([[-3.0, 2.0, 20.0, 40.0], [15.0, 1.0, 18.0, 2.0]]), (11, 13))
    assert clipped.tolist() == [[0, 2, 13, 11], [13, 1, 13, 2]]
    assert remove_small_boxes(clipped, 1.0).tolist() == [0]
    assert clip_boxes_to_image(ODD[None].expand(2, -1, -1), (11, 13)).shape == (2, 5, 4)


def test_boxes_around_masks():
    masks = torch.zeros(3, 7, 5, dtype=torch.bool)
    masks[0, 2:6, 1] = True
    masks[0, 3, 4] = True
    masks[1, 6, 4] = True  # one pixel
    assert masks_to_boxes(masks).tolist() == [[1, 2, 5, 6], [4, 6, 5, 7], [0, 0, 0, 0]]
    assert masks_to_boxes(masks[:0]).shape == (0, 4)


# ------------------------------------------------------------------------------------------------------ transforms


def test_transforms_are_those_of_the_paper_and_come_back():
    anchors, boxes = boxes_of(17), boxes_of(17, seed=1)
    weights = (10.0, 10.0, 5.0, 5.0)
    transforms = encode_boxes(boxes, anchors, weights)
    (x0, y0, x1, y1), (a0, b0, a1, b1) = boxes[3].tolist(), anchors[3].tolist()
    wide, tall = a1 - a0, b1 - b0
    expected = [
        10 * ((x0 + x1) / 2 - (a0 + a1) / 2) / wide,
        10 * ((y0 + y1) / 2 - (b0 + b1) / 2) / tall,
        5 * torch.tensor((x1 - x0) / wide).log().item(),
        5 * torch.tensor((y1 - y0) / tall).log().item(),
    ]
    torch.testing.assert_close(transforms[3], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_boxes(transforms, anchors, weights), boxes, rtol=1e-4, atol=1e-4)
    several = torch.stack([transforms, 0 * transforms], dim=1)
    torch.testing.assert_close(decode_boxes(several, anchors, weights)[:, 1], anchors)


def test_a_side_grows_at_most_to_a_sixteenth_of_a_thousand():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 32.0]])
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 50.0, 1e9]]), anchor)
    torch.testing.assert_close(grown, torch.tensor([[8.0 - 500, 16.0 - 1000, 8.0 + 500, 16.0 + 1000]]))


def test_gradients_of_transforms():
    anchors, boxes = (boxes_of(5, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(encode_boxes, (boxes, anchors))
    transforms = (0.1 * torch.randn(5, 3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(decode_boxes, (transforms, anchors))


# ---------------------------------------------------------------------------------------------------- suppression


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("block", [1, 7, 256])
def test_nms_keeps_what_a_loop_keeps(threshold, block, monkeypatch):
    monkeypatch.setattr(suppression, "BLOCK", block)
    boxes = torch.cat([boxes_of(67, side=60.0), ODD, boxes_of(3), boxes_of(3)])  # some of them twice
    scores = (torch.rand(len(boxes), generator=torch.Generator().manual_seed(2)) * 20).floor() / 20  # and equal scores
    groups = torch.arange(len(boxes)) % 5
    assert nms(boxes, scores, threshold).tolist() == naive.nms(boxes, scores, threshold)
    assert batched_nms(boxes, scores, groups, threshold).tolist() == naive.nms(boxes, scores, threshold, groups)


def test_a_chain_is_decided_from_its_head():
    # Each box overlaps its neighbors by a third: every second one goes, however long the chain.
    left = torch.arange(301.0)
    chain = torch.stack([left, 0 * left, left + 2, 0 * left + 1], dim=1)
    assert nms(chain, -left, 0.3).tolist() == list(range(0, 301, 2))


def test_thousands_of_boxes_and_none():
    boxes, scores = boxes_of(5003, side=20.0), torch.rand(5003, generator=torch.Generator().manual_seed(1))
    kept = nms(boxes, scores, 0.4)
    overlaps = box_iou(boxes[kept], boxes[kept]) - torch.eye(len(kept))
    assert float(overlaps.max()) <= 0.4
    assert (scores[kept].diff() <= 0).all()
    gone = torch.ones(5003, dtype=torch.bool)
    gone[kept] = False
    by_better = (box_iou(boxes[kept], boxes[gone]) > 0.4) & (scores[kept][:, None] >= scores[gone])
    assert by_better.any(0).all()
    empty = torch.zeros(0, 4)
    assert nms(empty, torch.zeros(0), 0.5).tolist() == []
    assert batched_nms(empty, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).tolist() == []
    assert soft_nms(empty, torch.zeros(0)).indices.tolist() == []


def test_bad_scores_are_named():
    boxes = boxes_of(3)
    with pytest.raises(ValueError, match="scores must not be NaN, it is at index"):
        nms(boxes, torch.tensor([0.1, torch.nan, 0.3]), 0.5)
    with pytest.raises(ValueError, match="sigma must be above 0"):
        soft_nms(boxes, torch.rand(3), sigma=0.0)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_lowers_what_a_loop_lowers(method):
    boxes = torch.cat([boxes_of(37, side=60.0), ODD])
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(3))
    found = soft_nms(boxes, scores, 0.3, method=method, sigma=0.4, least=0.05)
    expected = naive.soft_nms(boxes, scores, 0.3, method, 0.4, 0.05)
    assert found.indices.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score in expected]), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- backends


def test_a_missing_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    boxes, scores = boxes_of(3), torch.rand(3)
    with pytest.raises(ImportError, match="pip install torchvision"):
        nms(boxes, scores, 0.5, backend="torchvision")
    with pytest.raises(ImportError, match="pip install torchvision"), use_backend("torchvision"):
        pass
    with pytest.raises(ValueError, match="unknown backend 'pytorch3d'"):
        nms(boxes, scores, 0.5, backend="pytorch3d")


def test_the_chosen_backend_is_called(monkeypatch):
    called = []
    fake, operators = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    for name in ("nms", "batched_nms", "roi_align"):
        setattr(operators, name, lambda *args, name=name: called.append((name, len(args))))
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setitem(sys.modules, "torchvision.ops", operators)
    boxes, scores, maps = boxes_of(3), torch.rand(3), torch.rand(1, 2, 5, 7)
    with use_backend("torchvision"):
        with pytest.raises(TypeError):  # what the stand-in returns is no tensor, which the tests' type checks notice
            nms(boxes, scores, 0.5)
        with pytest.raises(TypeError):
            batched_nms(boxes, scores, torch.zeros(3, dtype=torch.int64), 0.5)
        with pytest.raises(TypeError):
            roi_align(maps, [boxes], 7)
    assert called == [("nms", 3), ("batched_nms", 4), ("roi_align", 6)]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_suppression_equals_torchvision():
    boxes, scores = boxes_of(997, side=60.0), torch.rand(997, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(997) % 7
    for threshold in (0.3, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), nms(boxes, scores, threshold, backend="torchvision"))
        theirs = batched_nms(boxes, scores, groups, threshold, backend="torchvision")
        assert torch.equal(batched_nms(boxes, scores, groups, threshold), theirs)
