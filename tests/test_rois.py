import importlib

import pytest
import torch

from tests import naive
from vision3dgen.ops import paste_binary_masks, paste_masks, roi_align, roi_pool
from vision3dgen.ops.rois import as_regions

# Inside, beyond each border, on the last pixel, thin, of no size, inside out, far away.
REGIONS = torch.tensor(
    [
        [0, 3.2, 4.1, 17.9, 13.4], [1, -6.0, -5.0, 9.0, 8.0], [1, 10.3, 7.7, 40.0, 33.0], [0, 21.0, 12.0, 22.0, 13.0],
        [2, 5.0, 2.0, 5.3, 14.0], [0, 7.0, 7.0, 7.0, 7.0], [2, 9.0, 8.0, 3.0, 2.0], [1, 90.0, 80.0, 99.0, 97.0],
        [2, -4e3, -4e3, 4e3, 4e3],
    ]
)  # fmt: skip


def maps_of(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("ratio", [2, 3, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_equals_sampling_point_by_point(aligned, ratio):
    maps, regions = maps_of(3, 2, 7, 11), REGIONS[: 8 if ratio < 0 else 9]  # the last one has a million samples
    pooled = roi_align(maps, regions, (3, 5), 0.5, ratio, aligned)
    expected = naive.roi_align(maps, regions.double(), (3, 5), 0.5, ratio, aligned)
    torch.testing.assert_close(pooled, expected)


def test_roi_align_of_a_ramp_is_the_center_of_each_bin():
    # On a map that is linear in x and y, the mean of samples is the value at a bin's center.
    y, x = torch.meshgrid(torch.arange(17.0), torch.arange(23.0), indexing="ij")
    box = torch.tensor([[2.5, 3.5, 12.5, 13.5]])
    pooled = roi_align((10 * y + x + 5.5)[None, None], [box], 5, aligned=True)  # pixel (0, 0) has its center at 0.5
    centers = torch.arange(5) * 2.0 + 1
    torch.testing.assert_close(pooled[0, 0], 10 * (3.5 + centers)[:, None] + 2.5 + centers)


def test_roi_pool_equals_the_largest_pixel_of_each_bin():
    maps, regions = maps_of(3, 2, 7, 11), REGIONS
    for scale in (0.5, 0.31):
        expected = naive.roi_pool(maps, regions.double(), (3, 5), scale)
        torch.testing.assert_close(roi_pool(maps, regions, (3, 5), scale), expected)
    assert (roi_pool(maps, regions[7:8], (3, 5), 0.5) == 0).all()  # outside


@pytest.mark.parametrize("ratio", [2, -1])
def test_gradients_of_regions(ratio):
    maps = maps_of(3, 2, 5, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: roi_align(m, REGIONS[:8], 2, 0.3, ratio, True), (maps,))
    assert torch.autograd.gradcheck(lambda m: roi_pool(m, REGIONS[:8], (2, 3), 0.3), (maps,))


def test_boxes_by_image_and_with_image_numbers_are_one():
    maps = maps_of(2, 3, 7, 11, dtype=torch.float32)
    boxes = [torch.rand(5, 4) * 5, torch.zeros(0, 4)]
    for box in boxes:
        box[:, 2:] += box[:, :2]
    assert as_regions(boxes)[:, 0].tolist() == [0] * 5
    for pool in (roi_align, roi_pool):
        assert torch.equal(pool(maps, boxes, 3), pool(maps, as_regions(boxes), 3))
        alone = pool(maps[1:], [boxes[0]], 3)
        torch.testing.assert_close(pool(maps, [boxes[1], boxes[0]], 3), alone)


def test_no_region_keeps_the_graph():
    for pool in (roi_align, roi_pool):
        for boxes in ([torch.zeros(0, 4)] * 2, torch.zeros(0, 5)):
            maps = maps_of(2, 3, 5, 7).requires_grad_()
            pooled = pool(maps, boxes, (2, 3))
            assert pooled.shape == (0, 3, 2, 3)
            pooled.sum().backward()
            assert (maps.grad == 0).all()


def test_regions_of_very_different_sizes_do_not_change_one_another():
    maps = maps_of(3, 2, 40, 60, dtype=torch.float32)
    together = roi_align(maps, REGIONS, 3, 1.0, -1)
    for index in range(len(REGIONS)):
        alone = roi_align(maps, REGIONS[index : index + 1], 3, 1.0, -1)
        torch.testing.assert_close(together[index], alone[0], rtol=1e-5, atol=1e-6)


def test_inside_autocast_and_in_half_precision():
    maps = maps_of(3, 2, 7, 11, dtype=torch.float32)
    expected = roi_align(maps.bfloat16().float(), REGIONS, 3, 0.5, 2)
    half = roi_align(maps.bfloat16(), REGIONS, 3, 0.5, 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(roi_align(maps.bfloat16(), REGIONS, 3, 0.5, 2), half)


def test_what_is_wrong_with_regions_is_said():
    maps = maps_of(2, 3, 5, 7)
    with pytest.raises(ValueError, match=r"boxes must be finite, got nan at index \(1, 3\)"):
        roi_align(maps, torch.tensor([[0, 1.0, 1.0, 2.0, 2.0], [0, 1.0, 1.0, torch.nan, 2.0]]), 3)
    with pytest.raises(ValueError, match=r"boxes\[1\] is of image 2, but the batch holds images 0 to 1"):
        roi_pool(maps, torch.tensor([[0, 1.0, 1.0, 2.0, 2.0], [2, 1.0, 1.0, 3.0, 2.0]]), 3)
    with pytest.raises(ValueError, match="a list as long as the batch of 2, got 1"):
        roi_align(maps, [torch.zeros(3, 4)], 3)
    with pytest.raises(ValueError, match=r"boxes\[1\] must be \(R 4\)"):
        roi_align(maps, [torch.zeros(3, 4), torch.zeros(3, 5)], 3)
    with pytest.raises(ValueError, match="output_size must be at least 1 x 1, got 0 x 3"):
        roi_align(maps, torch.zeros(1, 5), (0, 3))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_regions_equal_torchvision():
    maps = maps_of(3, 5, 17, 23, dtype=torch.float32)
    for ratio in (2, -1):
        for aligned in (False, True):
            args = (maps, REGIONS[:8], (3, 5), 0.5, ratio, aligned)
            torch.testing.assert_close(roi_align(*args), roi_align(*args, backend="torchvision"))
    args = (maps, REGIONS, (3, 5), 0.5)
    torch.testing.assert_close(roi_pool(*args), roi_pool(*args, backend="torchvision"))


# ---------------------------------------------------------------------------------------------------------- masks


def test_pasted_masks_equal_resizing_pixel_by_pixel():
    masks = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    boxes = torch.tensor(
        [
            [3.3, 2.1, 14.9, 9.8], [-4.0, -3.0, 6.0, 5.0], [10.0, 9.0, 40.0, 30.0], [5.0, 5.0, 5.4, 5.3],
            [50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 19.0, 13.0],
        ],
        dtype=torch.float64,
    )  # fmt: skip
    pasted = paste_masks(masks, boxes, (13, 19))
    for mask, box, found in zip(masks, boxes.tolist(), pasted):
        torch.testing.assert_close(found, naive.paste_mask(mask, box, (13, 19)))
    assert (pasted[4] == 0).all()
    assert pasted[3].count_nonzero() >= 1  # an object of one pixel has one


def test_binary_masks_are_the_same_whatever_the_memory():
    masks = torch.rand(11, 5, 5, generator=torch.Generator().manual_seed(0))
    boxes = torch.rand(11, 4, generator=torch.Generator().manual_seed(1)) * 9
    boxes[:, 2:] += boxes[:, :2] + 1
    expected = paste_masks(masks, boxes, (17, 19)) >= 0.4
    for memory in (1, 1 << 12, 1 << 26):
        assert torch.equal(paste_binary_masks(masks, boxes, (17, 19), 0.4, memory=memory), expected)
    assert paste_binary_masks(masks[:0], boxes[:0], (17, 19)).shape == (0, 17, 19)
    assert paste_masks(masks[:0], boxes[:0], (17, 19)).shape == (0, 17, 19)
