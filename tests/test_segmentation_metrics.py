"""mIoU and panoptic quality: loops, answers by hand, failures, rows in any order."""

import json
import math

import numpy as np
import pytest
import torch

from tests import naive
from vision3dgen.metrics import (
    EVALUATIONS,
    PanopticEvaluator,
    Scores,
    SegmentationEvaluator,
    match_segments,
    panoptic_quality,
    segmentation_matrix,
    summarize_panoptic,
    summarize_segmentation,
)
from vision3dgen.metrics.panoptic import PanopticMatches
from vision3dgen.structures import PanopticSegments


def class_maps(seed=0, classes=4, size=(7, 5)):
    rng = np.random.default_rng(seed)
    truth = torch.from_numpy(rng.integers(0, classes, size))
    truth[torch.from_numpy(rng.random(size) < 0.2)] = 255
    found = truth.where(torch.from_numpy(rng.random(size) < 0.6), torch.from_numpy(rng.integers(0, classes, size)))
    return found.where(found != 255, 0), truth


# ----------------------------------------------------------------------------------------------------- semantic


def test_the_matrix_counts_pixels_one_by_one():
    found, truth = class_maps()
    expected = np.zeros((4, 5), dtype=int)
    found[0, 0] = 9
    for f, t in zip(found.flatten().tolist(), truth.flatten().tolist()):
        if t != 255:
            expected[t, f if f < 4 else 4] += 1
    assert segmentation_matrix(found, truth, 4).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="classes must be 0 to 2 or 255, got 0 to 3"):
        segmentation_matrix(found, truth, 3)
    with pytest.raises(ValueError, match="like the truth"):
        segmentation_matrix(found[1:], truth, 4)


def test_iou_by_hand(tmp_path):
    """Two classes: 3 of 4 pixels right in one, 1 of 2 in the other, and a third one that is in no truth."""
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]])
    found = torch.tensor([[0, 0, 0, 1], [1, 2, 0, 1]])
    batch = {"semantic": truth[None], "id": ["a"]}
    scores = SegmentationEvaluator(classes=["floor", "wall", "rug"]).evaluate(
        "segmentation", [batch], lambda _: found[None], tmp_path, split="test", seed=0
    )
    assert isinstance(scores, Scores)
    assert scores.per_class["floor"] == {"IoU": 3 / 4, "accuracy": 3 / 4}
    assert scores.per_class["wall"] == {"IoU": 1 / 3, "accuracy": 1 / 2}
    assert scores.per_class["rug"] == {"IoU": 0.0, "accuracy": None}
    assert scores.metrics == {
        "mIoU": pytest.approx((3 / 4 + 1 / 3) / 2),
        "pixel_accuracy": pytest.approx(4 / 6),
        "mean_accuracy": pytest.approx(5 / 8),
        "weighted_iou": pytest.approx((4 * 3 / 4 + 2 / 3) / 6),
    }
    assert "| wall | 2 | 0.3333 | 0.5000 |" in scores.to_markdown()
    assert json.loads((tmp_path / "segmentation_test.json").read_text())["pixels"] == 6


def test_scores_of_classes_lists_and_failures(tmp_path):
    found, truth = class_maps()
    other_found, other_truth = class_maps(1, size=(3, 4))
    batch = {"semantic": [truth, other_truth], "id": ["a", "b"]}
    scores = torch.nn.functional.one_hot(found, 4).permute(2, 0, 1).double()
    evaluator = EVALUATIONS["segmentation"]()
    kwargs = {"split": "test", "seed": 0}

    def evaluate(folder, predict):
        return evaluator.evaluate("segmentation", [batch], predict, tmp_path / folder, **kwargs)

    maps = evaluate("maps", lambda _: [found, other_found])
    assert evaluate("scores", lambda _: [scores, other_found]).to_dict() == maps.to_dict()
    both = segmentation_matrix(found, truth, 4) + segmentation_matrix(other_found, other_truth, 4)
    assert maps.confusion == both.tolist()

    bad = evaluate("bad", lambda _: [scores * math.nan, other_found])
    assert bad.n_failed == 1
    assert "not finite" in bad.failures["a"]
    assert bad.pixels == maps.pixels
    assert sum(row[-1] for row in bad.confusion) == int((truth != 255).sum())

    def broken(_):
        raise RuntimeError("no memory")

    none = evaluate("none", broken)
    assert none.metrics["mIoU"] == 0
    assert none.metrics["pixel_accuracy"] == 0
    with pytest.raises(ValueError, match="like the truth"):
        evaluate("size", lambda _: [found[1:], other_found])


def test_images_of_void_and_rows_in_any_order():
    rows = []
    evaluator = SegmentationEvaluator()
    for seed in range(5):
        found, truth = class_maps(seed)
        truth = torch.full_like(truth, 255) if seed == 2 else truth
        batch = {"semantic": truth[None], "id": [str(seed)]}
        rows.append({"id": str(seed), **evaluator.row("segmentation", found, batch, 0, seed=0)})
    assert rows[2]["cells"] == []
    assert summarize_segmentation(rows).to_dict() == summarize_segmentation(rows[::-1]).to_dict()
    nothing = summarize_segmentation([rows[2]])
    assert nothing.metrics["mIoU"] is None
    assert "| mIoU | - |" in nothing.to_markdown()


# ----------------------------------------------------------------------------------------------------- panoptic


def grid_of_segments(seed, segments, size=(9, 11)):
    rng = np.random.default_rng(seed)
    grid = torch.from_numpy(rng.integers(0, segments + 1, (3, 4))).repeat_interleave(3, 0).repeat_interleave(3, 1)
    grid = grid[: size[0], : size[1]].clone()
    grid[torch.from_numpy(rng.random(grid.shape) < 0.1)] = 0
    return grid, torch.from_numpy(rng.integers(1, 4, segments))


def test_matches_equal_a_loop():
    matched = 0
    for seed in range(60):
        true, true_labels = grid_of_segments(seed, 5)
        noise, found_labels = grid_of_segments(seed + 1000, 5)
        keep = torch.from_numpy(np.random.default_rng(seed).random(true.shape) < 0.8)
        found = true.where(keep, noise)
        found_labels = torch.where(torch.arange(5) < 3, true_labels, found_labels)
        crowd = torch.tensor([False, False, seed % 2 == 0, True, False])
        mine = match_segments(PanopticSegments(found, found_labels, torch.ones(5)), true, true_labels, crowd)
        expected = naive.panoptic_matches(
            found.tolist(), found_labels.tolist(), true.tolist(), true_labels.tolist(), crowd.tolist()
        )
        assert [label for label, _ in sorted(mine.matched)] == [label for label, _ in sorted(expected[0])]
        assert [iou for _, iou in sorted(mine.matched)] == pytest.approx([iou for _, iou in sorted(expected[0])])
        assert (sorted(mine.missed), sorted(mine.wrong)) == (sorted(expected[1]), sorted(expected[2]))
        matched += len(mine.matched)
    assert matched > 60


def test_quality_by_hand():
    assert panoptic_quality([0.8, 0.6], wrong=1, missed=1) == pytest.approx((1.4 / 3, 0.7, 2 / 3))
    assert panoptic_quality([], wrong=1, missed=0) == (0, 0, 0)
    assert panoptic_quality([], 0, 0) is None
    images = [
        PanopticMatches([(1, 0.8), (3, 1.0)], [2], []),
        PanopticMatches([(1, 0.6)], [1], [1]),
    ]
    scores = summarize_panoptic(images, things=2, classes=["ball", "box", "floor"])
    assert scores.per_class["ball"]["PQ"] == pytest.approx(1.4 / 3)
    assert scores.metrics["PQ"] == pytest.approx((1.4 / 3 + 0 + 1) / 3)
    assert scores.metrics["PQ_things"] == pytest.approx(1.4 / 6)
    assert scores.metrics["PQ_stuff"] == 1
    assert scores.counts["ball"] == {"matched": 2, "wrong": 1, "missed": 1}
    assert summarize_panoptic(images[::-1], things=2, classes=["ball", "box", "floor"]) == scores


def test_the_truth_itself_is_perfect_and_nothing_is_nothing(tmp_path):
    true, labels = grid_of_segments(0, 5)
    batch = {"panoptic": true[None], "segment_labels": [labels], "id": ["a"]}
    evaluator = PanopticEvaluator(things=2)

    def evaluate(folder, predict):
        return evaluator.evaluate("panoptic", [batch], predict, tmp_path / folder, split="test", seed=0)

    perfect = evaluate("perfect", lambda _: [PanopticSegments(true, labels, torch.ones(5))])
    assert isinstance(perfect, Scores)
    assert perfect.metrics["PQ"] == perfect.metrics["SQ"] == perfect.metrics["RQ"] == 1
    assert "| PQ_things | 1.0000 |" in perfect.to_markdown()

    def broken(_):
        raise RuntimeError("no memory")

    failed = evaluate("failed", broken)
    assert failed.metrics["PQ"] == 0
    assert failed.n_failed == 1
    for bad, message in (
        (PanopticSegments(true + 1, labels, torch.ones(5)), "prediction must be numbered 0 to 5"),
        (PanopticSegments(true[1:], labels, torch.ones(5)), "like the truth"),
    ):
        with pytest.raises(ValueError, match=message):
            match_segments(bad, true, labels)


def test_void_and_crowds_are_not_held_against_a_prediction():
    true = torch.tensor([[1, 1, 0, 0], [2, 2, 0, 0]])
    labels, crowd = torch.tensor([1, 1]), torch.tensor([False, True])
    found = torch.tensor([[1, 1, 1, 2], [3, 3, 0, 2]])
    result = match_segments(PanopticSegments(found, torch.tensor([1, 1, 1]), torch.ones(3)), true, labels, crowd)
    assert result == PanopticMatches([(1, 1.0)], [], [])
    of_another_class = match_segments(
        PanopticSegments(found, torch.tensor([1, 1, 2]), torch.ones(3)), true, labels, crowd
    )
    assert of_another_class.wrong == [2]
