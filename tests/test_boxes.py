"""Overlap of oriented boxes: analytic answers, a Monte Carlo twin, laws, gradients, coinciding faces, bad input."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from vision3dgen.ops import box3d_overlap
from vision3dgen.ops import boxes as box_ops

UNIT = torch.tensor(
    [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.float64
)


def random_boxes(count, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=g, dtype=torch.float64))[0]
    size = torch.rand(count, 1, 3, generator=g, dtype=torch.float64) + 0.3
    place = torch.rand(count, 1, 3, generator=g, dtype=torch.float64)
    return (((UNIT - 0.5) * size) @ turn + 0.7 * place).to(dtype)


def volumes(boxes):
    return torch.linalg.det(boxes[:, [1, 3, 4]] - boxes[:, :1]).abs()


@pytest.mark.parametrize(
    "other, volume",
    [
        (UNIT, 1.0),
        (UNIT + 0.5, 0.125),
        (UNIT + torch.tensor([0.25, 0, 0]), 0.75),  # four pairs of coinciding faces
        (UNIT * 0.5 + 0.25, 0.125),  # inside
        (UNIT * 0.5, 0.125),  # inside, in a corner
        (UNIT * 3 - 1, 1.0),  # around
        (UNIT + torch.tensor([1.0, 0, 0]), 0.0),  # touching in a face,
        (UNIT + torch.tensor([1.0, 1.0, 0]), 0.0),  # an edge,
        (UNIT + 1, 0.0),  # a corner
        (UNIT + 2, 0.0),
        (UNIT[[4, 5, 6, 7, 0, 1, 2, 3]] + 0.5, 0.125),  # corners in mirrored order
    ],
)
def test_known_volumes(other, volume):
    for scale, shift in ((1, 0), (1e-6, 0), (1, 1e6)):
        found = box3d_overlap(scale * UNIT[None] + shift, scale * other[None] + shift)
        expected, size = volume * scale**3, float(volumes(other[None])) * scale**3
        assert float(found.vol) == pytest.approx(expected, rel=1e-7, abs=1e-7 * scale**3)
        assert float(found.iou) == pytest.approx(expected / (scale**3 + size - expected), rel=1e-7, abs=1e-7)


def test_a_turned_square_leaves_an_octagon():
    angle = math.pi / 4
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64
    )
    found = box3d_overlap((UNIT - 0.5)[None], ((UNIT - 0.5) @ turn)[None])
    assert float(found.vol) == pytest.approx(2 * (math.sqrt(2) - 1), rel=1e-8)


def test_random_boxes_agree_with_counted_points():
    first, second = random_boxes(7, 0), random_boxes(5, 1)
    corners = torch.cat([first, second]).flatten(0, 1)
    low, high = corners.amin(0), corners.amax(0)
    points = torch.rand(200_003, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    points = low + points * (high - low)

    def holds(box):
        t = (points - box[0]) @ torch.linalg.inv(box[[1, 3, 4]] - box[0])
        return ((t >= 0) & (t <= 1)).all(-1)

    counts = torch.stack([holds(b) for b in first]).double() @ torch.stack([holds(b) for b in second]).double().T
    expected = counts / len(points) * (high - low).prod()
    found = box3d_overlap(first, second)
    assert (found.vol > 0.05).sum() > 10
    torch.testing.assert_close(found.vol, expected, atol=0.01, rtol=0)
    union = volumes(first)[:, None] + volumes(second) - found.vol
    torch.testing.assert_close(found.iou, found.vol / union)


def test_symmetric_and_unmoved_by_rigid_motion():
    first, second = random_boxes(5, 3), random_boxes(3, 4)
    found = box3d_overlap(first, second)
    torch.testing.assert_close(box3d_overlap(second, first).vol.T, found.vol, rtol=1e-8, atol=1e-11)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    moved = box3d_overlap(first @ turn + 3, second @ turn + 3)
    torch.testing.assert_close(moved.vol, found.vol, rtol=1e-8, atol=1e-11)
    own = box3d_overlap(first, first).iou.diagonal()
    torch.testing.assert_close(own, torch.ones(5, dtype=torch.float64), rtol=1e-8, atol=0)


def test_gradients_of_moving_and_growing():
    first, second = random_boxes(3, 6), random_boxes(2, 7)

    def overlap(shift, growth):
        return box3d_overlap(first + shift, second * growth)

    shift = torch.zeros(3, 1, 3, dtype=torch.float64, requires_grad=True)
    growth = torch.ones(2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(overlap, (shift, growth))


def test_many_pairs_go_in_runs(monkeypatch):
    first, second = random_boxes(7, 8), random_boxes(11, 9)
    whole = box3d_overlap(first, second)
    monkeypatch.setattr(box_ops, "BUDGET", 3 * box_ops.PAIR_BYTES)
    assert torch.equal(box3d_overlap(first, second).vol, whole.vol)


def test_empty_sets_and_types():
    boxes = random_boxes(3, 10, torch.float32)
    assert box3d_overlap(boxes[:0], boxes).vol.shape == (0, 3)
    assert box3d_overlap(boxes, boxes[:0]).iou.shape == (3, 0)
    assert box3d_overlap(boxes, boxes).vol.dtype == torch.float32
    assert box3d_overlap(UNIT[None].bfloat16(), UNIT[None].bfloat16()).iou.dtype == torch.bfloat16


def test_bad_boxes():
    boxes = random_boxes(2, 11)
    bent = boxes.clone()
    bent[1, 6] += 0.3
    with pytest.raises(ValueError, match=r"boxes2\[1\] has a face that is not flat"):
        box3d_overlap(boxes, bent)
    with pytest.raises(ValueError, match=r"boxes1\[0\] is flat: it has no volume"):
        box3d_overlap(boxes * torch.tensor([1.0, 0.0, 1.0]), boxes)
    with pytest.raises(ValueError, match=r"boxes1\[1\] is flat"):
        box3d_overlap(torch.cat([boxes[:1], torch.zeros(1, 8, 3, dtype=torch.float64)]), boxes)
    with pytest.raises(ValueError, match="boxes1 must be finite"):
        box3d_overlap(boxes * math.nan, boxes)


@pytest.mark.pytorch3d
def test_equals_pytorch3d():
    theirs = pytest.importorskip("pytorch3d.ops").box3d_overlap
    first, second = random_boxes(13, 12, torch.float32), random_boxes(17, 13, torch.float32)
    for found, expected in zip(box3d_overlap(first, second), theirs(first, second)):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
