"""Regions that nobody learned: graph segments, selective search, contours, windows; and detectors that cut them out."""

import math

import numpy as np
import pytest
import torch
from skimage.segmentation import felzenszwalb

from tests import naive
from vision3dgen.backbones import BACKBONES, Pixels
from vision3dgen.heads import (
    BalancedSampler,
    Canvas,
    CropHead,
    EdgeRegions,
    Selection,
    SelectiveSearchRegions,
    WindowRegions,
)  # fmt: skip
from vision3dgen.models import Resizing, sliding_window, slow_rcnn
from vision3dgen.ops import EdgeBoxes, box_iou, edge_boxes, graph_segments, selective_search, sliding_windows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks(height: int = 61, width: int = 83) -> tuple[torch.Tensor, torch.Tensor]:
    """Rectangles of plain colors on a plain ground, and their boxes."""
    image = torch.full((3, height, width), 0.3)
    boxes = torch.tensor([[8.0, 5.0, 30.0, 25.0], [40.0, 30.0, 75.0, 50.0], [50.0, 6.0, 66.0, 20.0]])
    for (x0, y0, x1, y1), color in zip(boxes.int().tolist(), ((0.9, 0.1, 0.1), (0.1, 0.2, 0.9), (0.9, 0.9, 0.2))):
        image[:, y0:y1, x0:x1] = torch.tensor(color)[:, None, None]
    return image, boxes


# ----------------------------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize("seed", range(6))
def test_segments_are_those_of_the_definition(seed):
    image = torch.rand(3, 5, 7, generator=generator(seed)).round(decimals=1)  # equal edges occur
    scale, smallest = (30.0, 200.0, 500.0)[seed % 3], (0, 3)[seed % 2]
    found = graph_segments(image, scale, sigma=0, smallest=smallest)
    assert found.tolist() == naive.graph_segments(image, scale, smallest)


@pytest.mark.parametrize(("scale", "sigma"), [(50.0, 0.8), (150.0, 0.5)])
def test_segments_are_about_those_of_scikit_image(scale, sigma):
    image, _ = blocks()
    image = (image + 0.03 * torch.randn(image.shape, generator=generator())).clamp(0, 1)
    ours = graph_segments(image, scale, sigma=sigma, smallest=20).numpy()
    theirs = felzenszwalb(image.permute(1, 2, 0).double().numpy(), scale=scale, sigma=sigma, min_size=20)
    pairs = np.random.default_rng(0).integers(ours.size, size=(2, 20_000))
    same = [each.ravel()[pairs[0]] == each.ravel()[pairs[1]] for each in (ours, theirs)]
    assert (same[0] == same[1]).mean() > 0.95  # the Rand index; equal edges come in another order


def test_segments_are_numbered_by_their_first_pixels_and_large_enough():
    image, boxes = blocks()
    found = graph_segments(image, 100.0, sigma=0)
    first = [int((found.flatten() == number).nonzero()[0]) for number in range(int(found.max()) + 1)]
    assert first == sorted(first)
    assert len(first) == len(boxes) + 1
    noise = torch.rand(3, 19, 23, generator=generator())
    assert torch.bincount(graph_segments(noise, 1.0, smallest=15).flatten()).min() >= 15
    assert int(graph_segments(noise[:, :1, :1], 1.0).max()) == 0
    assert int(graph_segments(torch.zeros(1, 4, 4), 0.0).max()) == 0  # all edges weigh nothing


@pytest.mark.parametrize(
    ("image", "settings", "words"),
    [
        (torch.zeros(3, 0, 4), {}, "a pixel and a channel"),
        (torch.full((3, 4, 4), math.nan), {}, "image"),
        (torch.zeros(3, 4, 4), {"scale": -1.0}, "at least 0"),
    ],
)
def test_pictures_without_segments_are_refused(image, settings, words):
    with pytest.raises(ValueError, match=words):
        graph_segments(image, **settings)


# --------------------------------------------------------------------------------------------------- selective search


def test_plain_blocks_are_found_exactly():
    image, boxes = blocks()
    found = selective_search(image)
    overlap = box_iou(boxes, found).amax(1)
    assert overlap.min() > 0.75  # smoothing makes a rim
    assert [0.0, 0.0, 83.0, 61.0] in found.tolist()
    assert torch.unique(found, dim=0).shape == found.shape
    assert (found[:, 2:] - found[:, :2]).min() >= 4
    assert torch.equal(found, selective_search(image))
    other = selective_search(image, generator=generator(1))
    assert not torch.equal(found, other)
    assert sorted(other.tolist()) == sorted(found.tolist())  # the draws decide the order alone


def test_every_box_is_of_segments_or_their_unions():
    image, _ = blocks()
    segments = graph_segments(image, 100.0)
    pieces = [(segments == number).nonzero() for number in range(int(segments.max()) + 1)]
    ends_x = {int(piece[:, 1].min()) for piece in pieces} | {int(piece[:, 1].max()) + 1 for piece in pieces}
    ends_y = {int(piece[:, 0].min()) for piece in pieces} | {int(piece[:, 0].max()) + 1 for piece in pieces}
    found = selective_search(image, scales=(100.0,), spaces=("rgb",))
    assert {*found[:, 0::2].flatten().int().tolist()} <= ends_x
    assert {*found[:, 1::2].flatten().int().tolist()} <= ends_y


def test_regions_alike_are_joined_first():
    image = torch.full((3, 40, 90), 0.5)
    image[0, :, :30], image[0, :, 30:60], image[2, :, 60:] = 0.9, 0.8, 0.95  # two reds and a blue
    found = selective_search(image, scales=(1.0,), spaces=("rgb",), strategies=(("color",),), smallest=200)
    assert box_iou(torch.tensor([[0.0, 0.0, 60.0, 40.0]]), found).max() > 0.9
    assert box_iou(torch.tensor([[30.0, 0.0, 90.0, 40.0]]), found).max() < 0.7


def test_one_color_is_one_region_and_odd_settings_are_refused():
    assert selective_search(torch.full((3, 9, 11), 0.2)).tolist() == [[0.0, 0.0, 11.0, 9.0]]
    assert selective_search(torch.full((3, 2, 11), 0.2)).shape == (0, 4)  # lower than the least side
    image = torch.rand(3, 8, 8)
    for settings, words in (
        ({"spaces": ("cmyk",)}, "color space"),
        ({"strategies": (("shape",),)}, "similarity"),
        ({"scales": ()}, "at least"),
        ({"strategies": ((),)}, "at least"),
    ):
        with pytest.raises(ValueError, match=words):
            selective_search(image, **settings)
    with pytest.raises(ValueError, match="pixel"):
        selective_search(torch.zeros(3, 0, 3))


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.65])
def test_windows_lie_inside_and_neighbors_overlap(overlap):
    size, side, ratio = (53, 71), 16.0, 2.0
    found = sliding_windows(size, sides=(side,), ratios=(ratio,), overlap=overlap)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2] <= 71 + 1e-4).all()
    assert (found[:, 3] <= 53 + 1e-4).all()
    tall, wide = side * ratio**0.5, side / ratio**0.5
    torch.testing.assert_close(found[:, 3] - found[:, 1], torch.full((len(found),), tall), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[:, 2] - found[:, 0], torch.full((len(found),), wide), rtol=1e-5, atol=1e-4)
    first_row = found[found[:, 1] == 0]
    if overlap:
        assert box_iou(first_row[:-1], first_row[1:]).diagonal().min() >= overlap - 1e-4
    lefts, tops = found[:, 0].unique(), found[:, 1].unique()
    assert len(found) == len(lefts) * len(tops)
    assert lefts[-1] == pytest.approx(71 - wide, abs=1e-4)  # to the last column


def test_windows_larger_than_the_picture_are_left_out():
    assert sliding_windows((10, 12), sides=(64,)).tolist() == [[0.0, 0.0, 12.0, 10.0]]
    found = sliding_windows((64, 64), sides=(8, 32, 16))
    areas = ((found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])).round()
    assert (areas.diff() <= 0).all()
    for settings in ({"sides": ()}, {"ratios": (0.0,)}, {"overlap": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            sliding_windows((9, 9), **settings)


# ----------------------------------------------------------------------------------------------------------- contours


def test_scores_are_those_of_the_definition():
    image, _ = blocks(31, 43)
    image = (image + 0.05 * torch.randn(image.shape, generator=generator())).clamp(0, 1)
    method = EdgeBoxes(least=0.05)
    contours = method.contours(image)
    assert len(contours.weights) > 5
    boxes = 31 * torch.rand(40, 4, generator=generator(1))
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] / 2 + 1], 1).round()
    found = method.scores(contours, boxes)
    expected = naive.edge_box_scores(contours, boxes.tolist(), method.kappa)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_affinities_are_the_best_products_on_paths():
    image, _ = blocks(31, 43)
    affinity = EdgeBoxes().contours(image).affinity
    assert np.allclose(affinity, affinity.T)
    assert np.allclose(np.diag(affinity), 1)
    for middle in range(len(affinity)):
        through = affinity[:, middle, None] * affinity[None, middle]
        assert (affinity >= through - 1e-9).all()


def test_an_outline_scores_more_than_a_box_that_cuts_it():
    image, boxes = blocks()
    method = EdgeBoxes()
    contours = method.contours(image)
    rim = boxes + torch.tensor([-2.0, -2.0, 2.0, 2.0])
    cut = boxes + torch.tensor([6.0, 0.0, 6.0, 0.0])
    assert (method.scores(contours, rim) > 4 * method.scores(contours, cut).clamp(min=0.0)).all()
    found, scores = edge_boxes(image, count=50)
    assert box_iou(boxes, found).amax(1).min() > 0.65
    assert (scores.diff() <= 0).all()
    assert (scores > 0).all()
    assert (box_iou(found, found) - torch.eye(len(found))).max() <= 0.75 + 1e-6


def test_edges_of_a_disk_run_along_it():
    y, x = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    image = (((x - 20) ** 2 + (y - 20) ** 2) < 12**2).float()[None]
    contours = EdgeBoxes().contours(image)
    rows, columns = np.nonzero(contours.group >= 0)
    assert np.abs(np.hypot(rows - 20, columns - 20) - 11.7).max() < 1.5
    assert len(rows) > 2 * np.pi * 12 * 0.8  # all around, and thin
    assert len(rows) < 2 * np.pi * 12 * 1.5


def test_a_picture_without_edges_has_no_boxes():
    found, scores = edge_boxes(torch.full((3, 20, 30), 0.4))
    assert found.shape == (0, 4)
    assert scores.shape == (0,)
    assert EdgeBoxes().scores(EdgeBoxes().contours(torch.zeros(1, 5, 5)), torch.zeros(0, 4)).shape == (0,)
    with pytest.raises(ValueError, match="pixel"):
        EdgeBoxes().contours(torch.zeros(3, 0, 0))


# ---------------------------------------------------------------------------------------------------------- detectors

CLASSES = 3


def detector(kind: str):
    torch.manual_seed(0)
    backbone = Pixels()
    channels, strides = backbone.channels, backbone.strides
    trunk = BACKBONES["resnet8"](stem="small", widths=(8, 16, 32))
    given = {"resizing": Resizing(64, 96, divisor=1), "sampler": BalancedSampler(16, 0.5)}
    selection = Selection(score=0.01)
    if kind == "windows":
        box = CropHead(channels, strides, trunk, CLASSES, size=24, moves=False, selection=selection)
        return sliding_window(backbone, WindowRegions(sides=(16, 32), ratios=(0.7, 1.4), overlap=0.6), box, **given)
    regions = SelectiveSearchRegions() if kind == "selective_search" else EdgeRegions(count=(80, 40))
    box = CropHead(channels, strides, trunk, CLASSES, size=24, at_once=64, selection=selection)
    return slow_rcnn(backbone, regions, box, **given)


def street() -> dict:
    image, boxes = blocks(64, 96)
    plain = torch.full_like(image, 0.5)
    none = torch.zeros(0, dtype=torch.int64)
    return {
        "image": torch.stack([image, plain]),
        "id": ["a", "b"],
        "boxes": [boxes, torch.zeros(0, 4)],
        "labels": [torch.tensor([1, 2, 3]), none],
    }


@pytest.mark.parametrize("kind", ["windows", "selective_search", "edge_boxes"])
def test_losses_reach_every_parameter(kind):
    model = detector(kind)
    terms = model.loss(street(), generator=generator())
    assert set(terms) == ({"loss", "classifier"} if kind == "windows" else {"loss", "classifier", "box"})
    terms["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_window_is_where_it_was():
    model = detector("windows").eval()
    (found, _) = model.predict(street())
    windows = sliding_windows((64, 96), sides=(16, 32), ratios=(0.7, 1.4), overlap=0.6)
    assert len(found.boxes)
    apart = (found.boxes[:, None] - windows).abs().amax(2)
    assert apart.amin(1).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["windows", "selective_search"])
def test_a_picture_is_learned_by_heart(kind):
    model, batch = detector(kind), street()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    draws = generator()
    for _ in range(150 if kind == "windows" else 60):
        optimizer.zero_grad()
        model.loss(batch, generator=draws)["loss"].backward()
        optimizer.step()
    found, empty = model.eval().predict(batch)
    for box, label in zip(batch["boxes"][0], batch["labels"][0]):
        overlap = box_iou(box[None], found.boxes)[0]
        hits = (overlap > 0.5) & (found.labels == label) & (found.scores > 0.5)
        assert hits.any(), (kind, label, found)
    assert not (empty.scores > 0.5).any()


def test_crops_in_parts_and_at_once_are_the_same():
    model = detector("selective_search").eval()
    batch = street()
    parts = model.predict(batch)
    model.heads["box"].at_once = 10_000
    for own, other in zip(parts, model.predict(batch)):
        assert torch.equal(own.labels, other.labels)
        torch.testing.assert_close(own.boxes, other.boxes, rtol=1e-4, atol=1e-3)


def test_regions_of_a_picture_are_remembered_by_its_pixels():
    calls = []

    class Counted(SelectiveSearchRegions):
        def find(self, image):
            calls.append(image)
            return super().find(image)

    regions = Counted(kept=2)
    image, _ = blocks()
    images = torch.stack([image, image.flip(2), image.flip(1)])
    normalized = (images - regions.mean) / regions.std
    canvas = Canvas(normalized, [(61, 83)] * 3, [(61, 83)] * 3)
    first = regions([], canvas)
    assert len(calls) == 3
    torch.testing.assert_close(calls[0], image, rtol=0, atol=0.51 / 255)  # as it was, to a level
    regions([], canvas._replace(images=normalized[1:], sizes=[(61, 83)] * 2, originals=[(61, 83)] * 2))
    assert len(calls) == 3
    again = regions([], canvas._replace(images=normalized[:1], sizes=[(61, 83)], originals=[(61, 83)]))
    assert len(calls) == 4  # the first was forgotten
    assert torch.equal(first[0].boxes, again[0].boxes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 0}, "size"),
        ({"classes": 0}, "classes"),
        ({"strides": [4]}, "stride must be 1"),
        ({"channels": [5]}, "5 channels"),
    ],
)
def test_heads_that_cannot_be_meant_are_refused(settings, words):
    trunk = BACKBONES["resnet8"](stem="small", widths=(8, 16, 32))
    given = {"channels": [3], "strides": [1], "trunk": trunk, "classes": 2, **settings}
    with pytest.raises(ValueError, match=words):
        CropHead(**given)
    with pytest.raises(ValueError, match="count"):
        SelectiveSearchRegions(count=(0, 1))
