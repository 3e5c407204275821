"""Average precision: pycocotools, loops, answers by hand, protocols, evaluations that stop and go on."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from tests import naive
from tests.coco_oracle import coco_evaluation, random_image
from vision3dgen.datasets import collate
from vision3dgen.metrics import (
    DETECTION_PROTOCOLS,
    EVALUATIONS,
    DetectionEvaluator,
    ImageRecord,
    Scores,
    Truths,
    average_precision,
    record_of,
    summarize_detections,
)
from vision3dgen.metrics.precision import headlines
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Detections, Meshes

COCO, VOC = DETECTION_PROTOCOLS["coco_boxes"], DETECTION_PROTOCOLS["voc2007"]


def found(boxes, scores, labels=None, **more) -> Detections:
    labels = [1] * len(scores) if labels is None else labels
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return Detections(boxes, torch.tensor(scores).double(), torch.tensor(labels, dtype=torch.int64), **more)


def true(boxes, labels=None, **more) -> Truths:
    labels = [1] * len(boxes) if labels is None else labels
    return Truths(
        torch.tensor(boxes, dtype=torch.float64).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        **{name: torch.tensor(value) if isinstance(value, list) else value for name, value in more.items()},
    )


def ap_of(images, protocol, name="AP"):
    records = [record_of(d, t, protocol, id=f"{i:03d}") for i, (d, t) in enumerate(images)]
    return headlines(average_precision(records, protocol), protocol)[name]


# -------------------------------------------------------------------------------------------------- pycocotools


@pytest.mark.parametrize("masks", [False, True])
def test_equals_pycocotools_on_random_data_sets(masks: bool):
    """100 sets of boxes, 100 of masks: crowds, ignored objects, images without objects or detections, equal scores."""
    rng = np.random.default_rng(int(masks))
    protocol = DETECTION_PROTOCOLS["coco_masks" if masks else "coco_boxes"]
    seen = []
    for trial in range(100):
        side = int(rng.choice([20, 60, 150]))
        images = [random_image(rng, side, 2, int(rng.choice([4, 12])), masks=masks) for _ in range(3)]
        expected = coco_evaluation(images, side, 2, masks=masks)
        records = [record_of(d, t, protocol, id=f"{i:03d}") for i, (d, t) in enumerate(images)]
        result = average_precision(records, protocol, labels=[1, 2])
        precision = expected.eval["precision"].transpose(2, 0, 3, 4, 1)
        recall = expected.eval["recall"].transpose(1, 0, 2, 3)
        for mine, theirs in ((result.precision, precision), (result.recall, recall)):
            np.testing.assert_allclose(mine, np.where(theirs < 0, np.nan, theirs), atol=1e-9, err_msg=str(trial))
        numbers = [-1 if value is None else value for value in headlines(result, protocol).values()]
        np.testing.assert_allclose(numbers, expected.stats, atol=1e-9, err_msg=str(trial))
        seen.append(numbers[0])
    assert min(seen) == -1  # no object at all
    assert 0.1 < np.mean(seen) < 0.9


# --------------------------------------------------------------------------------------------------- loops, hand


@pytest.mark.parametrize("name", ["voc2007", "voc2010"])
def test_voc_equals_a_loop(name: str):
    rng = np.random.default_rng(3)
    protocol = DETECTION_PROTOCOLS[name]
    values = []
    for _ in range(30):
        images = [random_image(rng, 30, 1, 14, masks=False) for _ in range(4)]
        images = [(d._replace(scores=torch.rand(len(d.scores)).double()), t._replace(crowd=None)) for d, t in images]
        if not any(bool((~t.ignored).any()) for _, t in images):
            continue
        plain = [
            (list(zip(d.scores.tolist(), d.boxes.tolist())), list(zip(t.boxes.tolist(), t.ignored.tolist())))
            for d, t in images
        ]
        values.append(naive.average_precision(plain, 0.5, protocol.recalls))
        assert ap_of(images, protocol) == pytest.approx(values[-1], abs=1e-12)
    assert len(values) > 20
    assert 0.1 < np.mean(values) < 0.9


def test_ap_by_hand():
    """Right, wrong, right of two objects: precisions 1 and 2/3 at recalls 1/2 and 1."""
    image = (
        found([[0, 0, 10, 10], [50, 50, 60, 60], [20, 0, 30, 10]], [0.9, 0.8, 0.7]),
        true([[0, 0, 10, 10], [20, 0, 30, 10]]),
    )
    assert ap_of([image], DETECTION_PROTOCOLS["voc2010"]) == pytest.approx((1 + 2 / 3) / 2)
    assert ap_of([image], VOC) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert ap_of([image], COCO, "AP50") == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert ap_of([image], COCO, "AR_1") == 0.5
    assert ap_of([image], COCO, "AP_medium") is None
    assert ap_of([image], COCO, "AP_small") == ap_of([image], COCO)


def test_three_of_ten_reach_the_recall_of_three_tenths():
    boxes = [[20 * k, 0, 20 * k + 10, 10] for k in range(10)]
    image = found(boxes[:3], [0.9, 0.8, 0.7]), true(boxes)
    assert ap_of([image], VOC) == pytest.approx(4 / 11)


def test_the_rules_differ_where_a_better_truth_is_taken():
    """The second detection overlaps the taken truth most, and a free one enough."""
    image = found([[0, 0, 10, 10], [1, 0, 11, 10]], [0.9, 0.8]), true([[0, 0, 10, 10], [4, 0, 14, 10]])
    assert ap_of([image], COCO, "AP50") == pytest.approx(1.0)  # 7 of 13
    assert ap_of([image], DETECTION_PROTOCOLS["voc2010"]) == pytest.approx(0.5)


def test_thresholds_include_their_value_or_not():
    image = found([[0, 0, 10, 5]], [1.0]), true([[0, 0, 10, 10]])  # IoU exactly a half
    assert ap_of([image], VOC) == 1
    assert ap_of([image], dataclasses.replace(VOC, comparator=">")) == 0


def test_a_crowd_swallows_and_a_difficult_object_once():
    crowd = [[0, 0, 50, 50]]
    inside = [[0, 0, 10, 10], [20, 20, 30, 30], [100, 0, 110, 10]]
    image = found(inside, [0.9, 0.8, 0.7]), true([*crowd, [100, 0, 110, 10]], crowd=[True, False])
    assert ap_of([image], COCO) == 1
    ignored = found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8]), true([[0, 0, 10, 10]], ignored=[True])
    assert ap_of([ignored], VOC) is None
    both = [ignored, (found([[0, 0, 4, 4]], [0.5]), true([[0, 0, 4, 4]]))]
    assert ap_of(both, VOC) == 1  # VOC forgives any number
    assert ap_of(both, COCO) == pytest.approx(0.5)  # COCO one


def test_proposals_forget_classes_and_the_gate_leaves_out_what_no_truth_is_near():
    image = found([[0, 0, 10, 10]], [1.0], [2]), true([[0, 0, 10, 10]], [1])
    assert ap_of([image], COCO) == 0
    assert ap_of([image], DETECTION_PROTOCOLS["proposals"], "AR_10") == 1
    image = found([[50, 50, 60, 60], [0, 0, 10, 10]], [0.9, 0.8]), true([[0, 0, 10, 10]])
    assert ap_of([image], DETECTION_PROTOCOLS["voc2010"]) == 0.5
    assert ap_of([image], DETECTION_PROTOCOLS["pix3d_boxes"]) == 1


# -------------------------------------------------------------------------------------------------------- meshes


def sphere(x: float, z: float, radius: float = 1.0) -> Meshes:
    ball = ico_sphere(2)
    return ball.update_padded(ball.verts_padded() * radius + torch.tensor([x, 0.0, z]))


def test_meshes_under_pix3ds_rule():
    protocol = dataclasses.replace(
        DETECTION_PROTOCOLS["pix3d_meshes"],
        overlap=dataclasses.replace(DETECTION_PROTOCOLS["pix3d_meshes"].overlap, samples=2000),
    )
    here = dataclasses.replace(protocol, overlap=dataclasses.replace(protocol.overlap, depth="predicted"))
    box = [[10, 10, 30, 30]]
    truth = true(box, meshes=sphere(0.3, 5.0))

    def score(mesh, rule=protocol, boxes=box, label=1):
        return ap_of([(found(boxes, [0.9], [label], meshes=mesh), truth)], rule)

    assert score(sphere(0.3, 5.0)) == 1
    assert score(sphere(0.6, 10.0, 2.0)) == 1  # the same picture at twice the distance
    assert score(sphere(0.6, 10.0, 2.0), here) == 0
    assert score(sphere(0.3, 5.0, 0.5)) == 0  # half as large, where it should be
    assert score(sphere(0.3, 5.0), label=2) == 0
    assert score(sphere(0.3, 5.0), boxes=[[25, 10, 45, 30]]) == 0  # boxes overlap by too little to be compared
    nothing = Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.int64)])
    assert score(nothing) == 0
    bad = sphere(0.3, 5.0)
    assert score(bad.update_padded(bad.verts_padded() * math.nan)) == 0
    record = record_of(found(box, [0.9], meshes=sphere(0.3, 5.0)), truth, protocol, id="a")
    again = record_of(found(box, [0.9], meshes=sphere(0.3, 5.0)), truth, protocol, id="a")
    assert record.overlaps.tolist() == again.overlaps.tolist()
    with pytest.raises(ValueError, match="the detections have none"):
        record_of(found(box, [0.9]), truth, protocol, id="a")
    with pytest.raises(ValueError, match="the true mesh 0 of a: no surface"):
        record_of(found(box, [0.9], meshes=sphere(0, 5)), true(box, meshes=nothing), protocol, id="a")


# --------------------------------------------------------------------------------------------- shares, rows, laws


def random_records(count=12, masks=False, protocol=COCO):
    rng = np.random.default_rng(5)
    images = [random_image(rng, 50, 3, 12, masks=masks) for _ in range(count)]
    return images, [record_of(d, t, protocol, id=f"{i:03d}") for i, (d, t) in enumerate(images)]


def test_order_and_division_of_the_images_change_no_bit():
    _, records = random_records()
    expected = average_precision(records, COCO)
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    for mine, theirs in zip(average_precision(shuffled, COCO), expected):
        np.testing.assert_array_equal(mine, theirs)
    through_json = [ImageRecord.from_row(json.loads(json.dumps(record.to_row()))) for record in records]
    for mine, theirs in zip(average_precision(through_json, COCO), expected):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ValueError, match="image '003' comes twice"):
        average_precision([*records, records[3]], COCO)


def test_the_order_of_detections_does_not_matter_without_equal_scores():
    images, _ = random_records()
    rng = np.random.default_rng(1)
    moved = []
    for d, t in images:
        d = d._replace(scores=torch.from_numpy(rng.permutation(len(d.scores)) + rng.random()))
        order = torch.from_numpy(rng.permutation(len(d.scores)))
        moved.append(((d, t), (Detections(d.boxes[order], d.scores[order], d.labels[order]), t)))
    assert ap_of([one for one, _ in moved], COCO) == ap_of([other for _, other in moved], COCO)


def test_what_cannot_be_compared_is_named():
    good = found([[0, 0, 10, 10]], [0.5])
    truth = true([[0, 0, 10, 10]])
    for bad, message in (
        (good._replace(scores=torch.tensor([math.nan])), "detection 0 is not finite"),
        (good._replace(labels=torch.tensor([0])), "label 0; categories are numbered from 1"),
        (good._replace(scores=torch.rand(2)), "as many rows"),
    ):
        with pytest.raises(ValueError, match=message):
            record_of(bad, truth, COCO, id="a")
    with pytest.raises(ValueError, match="1 crowd like labels, got 2"):
        record_of(good, true([[0, 0, 10, 10]], crowd=[True, False]), COCO, id="a")
    masks = DETECTION_PROTOCOLS["coco_masks"]
    with pytest.raises(ValueError, match="the detections have none"):
        record_of(good, truth, masks, id="a")
    small, large = torch.ones(1, 3, 3, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="of the image's size"):
        record_of(good._replace(masks=small), truth._replace(masks=large), masks, id="a")
    for change, message in (
        ({"thresholds": ()}, "thresholds"),
        ({"max_detections": (None, 10)}, "must ascend"),
        ({"recalls": 1}, "recalls"),
        ({"areas": ()}, "at least one range"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(COCO, **change)


# ----------------------------------------------------------------------------------------------------- evaluator


def batches(images):
    items = [
        {"image": torch.zeros(3, 4, 4), "boxes": t.boxes, "labels": t.labels, "crowd": t.crowd, "difficult": t.ignored,
         "id": f"{i:03d}"}
        for i, (_, t) in enumerate(images)
    ]  # fmt: skip
    return [collate(items[i : i + 5]) for i in range(0, len(items), 5)]


def test_an_evaluation_stops_and_goes_on(tmp_path):
    images, records = random_records()
    asked: list[str] = []

    def predict(batch):
        asked.extend(batch["id"])
        return [images[int(name)][0] for name in batch["id"]]

    evaluator = DetectionEvaluator(classes=["ball", "box", "cone"])
    scores = evaluator.evaluate("coco_boxes", batches(images), predict, tmp_path, split="test", seed=0)
    assert isinstance(scores, Scores)
    expected = headlines(average_precision(records, COCO), COCO)
    assert scores.metrics == expected
    assert scores.n_images == 12
    assert set(scores.per_class) == {"ball", "box", "cone"}
    table = scores.to_markdown()
    assert f"| AP | {expected['AP']:.4f} |" in table
    assert "coco_boxes" in table
    assert json.loads((tmp_path / "coco_boxes_test.json").read_text())["metrics"] == expected

    path = tmp_path / "coco_boxes_test.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    asked.clear()
    again = evaluator.evaluate("coco_boxes", batches(images), predict, tmp_path, split="test", seed=0)
    assert again.to_dict() == scores.to_dict()
    assert 0 < len(asked) < 12
    with pytest.raises(ValueError, match="another run"):
        evaluator.evaluate("coco_boxes", batches(images), predict, tmp_path, split="test", seed=1)
    for row in path.read_text().splitlines()[1:]:
        assert "failure" in json.loads(row)


def test_failures_count_as_nothing_found(tmp_path):
    images, _ = random_records()

    def predict(batch):
        if "000" in batch["id"]:
            raise RuntimeError("out of memory")
        result = [images[int(name)][0] for name in batch["id"]]
        if "007" in batch["id"]:
            bad = found([[0, 0, 1, 1]], [math.nan])
            result[batch["id"].index("007")] = bad
        return result

    scores = DetectionEvaluator().evaluate("coco_boxes", batches(images), predict, tmp_path, split="val", seed=0)
    assert scores.n_failed == 6
    assert "out of memory" in scores.failures["000"]
    assert "not finite" in scores.failures["007"]
    empty = found([], [])
    rest = [(empty if i < 5 or i == 7 else d, t) for i, (d, t) in enumerate(images)]
    assert scores.metrics["AP"] == ap_of(rest, COCO)
    assert "Failed: 000" in scores.to_markdown()


def test_what_is_wrong_with_all_items_is_an_error(tmp_path):
    images, _ = random_records(2)
    evaluator = EVALUATIONS["detection"]()
    assert evaluator.names == ["coco_boxes"]

    def score(name, data, predict=lambda batch: [found([], [])] * len(batch["id"])):
        return evaluator.score(name, data, predict, tmp_path / f"{name}{len(list(tmp_path.iterdir()))}.jsonl", seed=0,
                               about={})  # fmt: skip

    assert score("coco_boxes", batches(images)).metrics["AP"] == 0
    with pytest.raises(ValueError, match=r"needs the batch keys \['boxes', 'labels'\]"):
        score("coco_boxes", [{"id": ["a"]}])
    with pytest.raises(ValueError, match="needs the batch key 'masks'"):
        score("coco_masks", batches(images))
    with pytest.raises(ValueError, match="comes twice"):
        score("coco_boxes", batches(images) * 2)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        score("coco_boxes", [])
    with pytest.raises(ValueError, match="one prediction per item"):
        score("coco_boxes", batches(images), lambda batch: [])
    with pytest.raises(ValueError, match="unknown protocol"):
        DetectionEvaluator(protocols=["voc"])


def test_mesh_truths_are_those_of_the_image(tmp_path):
    protocol = "meshes"
    items = []
    for index, count in enumerate((2, 0, 1)):
        boxes = torch.tensor([[20.0 * k, 0, 20 * k + 10, 10] for k in range(count)]).view(-1, 4)
        spheres = [sphere(0.1 * k, 4.0 + index) for k in range(max(count, 1))]
        mesh = Meshes([m.verts_packed() for m in spheres], [m.faces_packed() for m in spheres])[torch.arange(count)]
        items.append({"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "mesh": mesh, "id": str(index)})
    batch = collate([{"image": torch.zeros(3, 4, 4), **item} for item in items])

    def predict(_):
        return [
            Detections(item["boxes"], torch.ones(len(item["boxes"])), item["labels"], meshes=item["mesh"])
            for item in items
        ]

    scores = DetectionEvaluator().evaluate(protocol, [batch], predict, tmp_path, split="test", seed=0)
    assert scores.metrics["AP"] == 1
    assert scores.n_objects == 3


def test_summaries_need_images():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        summarize_detections([], COCO)
