"""Depth and normal metrics: loops, known answers, alignment, crops, and evaluations that nothing can stop."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from tests import naive
from vision3dgen.metrics import (
    DEPTH_PROTOCOLS,
    EVALUATIONS,
    DepthEvaluator,
    NormalsEvaluator,
    Prediction,
    Scores,
    align_depth,
    angles_between,
    depth_errors,
    normal_errors,
    summarize_maps,
)
from vision3dgen.metrics.depth import DepthProtocol, ShareCrop
from vision3dgen.metrics.maps import Unscorable


def pictures(seed=0, batch=3, height=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    prediction = 0.5 + 2 * torch.rand(batch, 1, height, width, generator=generator)
    target = 0.5 + 2 * torch.rand(batch, 1, height, width, generator=generator)
    return prediction, target * (torch.rand(batch, 1, height, width, generator=generator) > 0.3)


# ------------------------------------------------------------------------------------------------------ errors


def test_errors_equal_a_loop():
    prediction, target = pictures()
    found = depth_errors(prediction, target)
    for index in range(3):
        expected = naive.depth_errors(prediction[index].flatten().tolist(), target[index].flatten().tolist())
        assert set(expected) == set(found._fields)
        for name, value in expected.items():
            assert float(getattr(found, name)[index]) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_known_answers():
    truth = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 2, 2)
    for k, deltas in ((1.2, (1, 1, 1)), (1.3, (0, 1, 1)), (1.6, (0, 0, 1)), (1 / 1.3, (0, 1, 1)), (2.0, (0, 0, 0))):
        errors = depth_errors(k * truth, truth)
        assert float(errors.abs_rel) == pytest.approx(abs(k - 1), rel=1e-5)
        assert float(errors.sq_rel) == pytest.approx((k - 1) ** 2 * 15 / 4, rel=1e-5)
        assert float(errors.rmse) == pytest.approx(abs(k - 1) * math.sqrt(85 / 4), rel=1e-5)
        assert float(errors.rmse_log) == pytest.approx(abs(math.log(k)), rel=1e-5)
        assert float(errors.log10) == pytest.approx(abs(math.log10(k)), rel=1e-5)
        assert float(errors.silog) == pytest.approx(0, abs=1e-4)  # no scale
        assert (float(errors.delta1), float(errors.delta2), float(errors.delta3)) == deltas


def test_masks_holes_and_empty_pictures():
    prediction, target = pictures()
    mask = torch.rand(3, 1, 7, 5, generator=torch.Generator().manual_seed(5)) > 0.4
    target[1] = 0
    expected = depth_errors(prediction, target * mask)
    spoiled = prediction.where((target > 0) & mask, torch.nan)
    found = depth_errors(spoiled, target.where(target > 0, -1), mask.float())
    for name in found._fields:
        values = getattr(found, name)
        torch.testing.assert_close(values, getattr(expected, name), equal_nan=True)
        assert values.isnan().tolist() == [False, True, False]
    below = depth_errors(-prediction, target)
    assert float(below.delta3[0]) == 0  # -1 over -1 is no good ratio
    assert below.rmse_log[0].isinf()


# --------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("space", ["depth", "inverse"])
@pytest.mark.parametrize("alignment", ["median", "scale", "scale_shift"])
def test_alignment_undoes_what_it_is_for(alignment, space):
    _, target = pictures(batch=4)
    target[2] = 0
    filled = target.where(target > 0, 1.7)
    scale, shift = 3.0, 0.25 if alignment == "scale_shift" else 0.0
    prediction = scale * filled + shift if space == "depth" else 1 / (scale / filled + shift)
    found = align_depth(prediction, target, alignment=alignment, space=space)
    torch.testing.assert_close(found[[0, 1, 3]], filled[[0, 1, 3]], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], prediction[2])  # nothing to align to
    assert align_depth(prediction, target, alignment="none") is prediction


def test_least_squares_is_what_numpy_finds():
    prediction, target = pictures(batch=1)
    valid = target[0, 0] > 0
    p, t = prediction[0, 0][valid].double().numpy(), target[0, 0][valid].double().numpy()
    (scale, shift), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)
    both = align_depth(prediction, target, alignment="scale_shift")
    np.testing.assert_allclose(both, scale * prediction + shift, rtol=1e-5)
    (scale,), *_ = np.linalg.lstsq(p[:, None], t, rcond=None)
    np.testing.assert_allclose(align_depth(prediction, target, alignment="scale"), scale * prediction, rtol=1e-5)
    (scale, shift), *_ = np.linalg.lstsq(np.stack([1 / p, np.ones_like(p)], 1), 1 / t, rcond=None)
    inverse = align_depth(prediction, target, alignment="scale_shift", space="inverse").double()
    fitted = scale / prediction.double() + shift
    np.testing.assert_allclose(inverse, torch.where(fitted > 0, 1 / fitted, torch.inf), rtol=1e-4)
    median = align_depth(prediction, target, alignment="median")
    np.testing.assert_allclose(median, np.median(t) / np.median(p) * prediction, rtol=1e-5)


def test_an_inverse_that_is_fitted_below_zero_is_infinitely_far():
    target = torch.tensor([1.0, 1.1, 0.0]).view(1, 1, 1, 3)
    prediction = torch.tensor([1.0, 2.0, 20.0]).view(1, 1, 1, 3)
    found = align_depth(prediction, target, alignment="scale_shift", space="inverse")
    torch.testing.assert_close(found[..., :2], target[..., :2])
    wide = align_depth(
        torch.tensor([1.0, 1.02, 20.0]).view(1, 1, 1, 3), target, alignment="scale_shift", space="inverse"
    )
    assert wide[0, 0, 0, 2] == torch.inf


def test_a_constant_prediction_is_shifted_to_the_mean():
    _, target = pictures(batch=1)
    for value in (0.3, 1e4):
        found = align_depth(torch.full_like(target, value), target, alignment="scale_shift")
        torch.testing.assert_close(found, torch.full_like(target, float(target[target > 0].mean())))


# --------------------------------------------------------------------------------------------------- protocols


def test_protocols_take_the_published_pixels():
    """Rows and columns counted by hand from the published numbers."""
    full = torch.ones(1, 480, 640)
    nyu = DEPTH_PROTOCOLS["nyu_eigen"].valid(full)[0]
    assert nyu.sum() == 426 * 560
    assert nyu[45, 41]
    assert nyu[470, 600]
    assert not nyu[44].any()
    assert not nyu[:, 601].any()
    road = torch.ones(1, 375, 1242)
    garg, eigen = (DEPTH_PROTOCOLS[name].valid(road)[0] for name in ("kitti_garg", "kitti_eigen"))
    assert [int(x) for x in garg.nonzero()[0]] == [153, 44]
    assert [int(x) for x in garg.nonzero()[-1]] == [370, 1196]
    assert [int(x) for x in eigen.nonzero()[0]] == [124, 44]
    assert [int(x) for x in eigen.nonzero()[-1]] == [341, 1196]
    with pytest.raises(Unscorable, match="the crop is for pictures of 480 x 640, got 375 x 1242"):
        DEPTH_PROTOCOLS["nyu_eigen"].valid(road)


def test_the_bounds_of_a_protocol_are_strict_and_the_default_takes_every_surface():
    depth = torch.tensor([0.0, 1e-3, 0.5, 79.9, 80.0, 90.0, torch.inf]).view(1, 1, 7)
    plain = dataclasses.replace(DEPTH_PROTOCOLS["kitti_garg"], crop=None)
    assert plain.valid(depth)[0, 0].tolist() == [False, False, True, True, False, False, False]
    assert DEPTH_PROTOCOLS["default"].valid(depth)[0, 0].tolist() == [False, False, True, True, True, True, False]


def test_protocols_are_data():
    for name, protocol in DEPTH_PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.citation
        assert json.loads(json.dumps(protocol.to_dict()))["alignment"] == protocol.alignment
    with pytest.raises(ValueError, match="min_depth must be above 0 and below max_depth"):
        dataclasses.replace(DEPTH_PROTOCOLS["default"], min_depth=0.0)


# -------------------------------------------------------------------------------------------------- evaluation


def depth_items(count=5):
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(count):
        depth = 1 + torch.rand(1, 7, 5, generator=generator)
        depth[:, :2] = 0
        items.append({"id": f"item{index}", "category": "ab"[index % 2], "depth": depth})
    return items


def batches(items, size=2):
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    keys = [key for key in items[0] if isinstance(items[0][key], torch.Tensor)]
    return [
        {key: torch.stack([item[key] for item in part]) for key in keys}
        | {key: [item[key] for item in part] for key in ("id", "category")}
        for part in parts
    ]


def wrong_by(k, **others):
    """Predicts k times the truth; `others` are maps, or a failure, for items by id."""

    def predict(batch):
        found = []
        for item, depth in zip(batch["id"], batch["depth"]):
            own = others.get(item, {"depth": k * depth.where(depth > 0, 3.0)})
            found.append(Prediction(failure=own) if isinstance(own, str) else Prediction(maps=own))
        return found

    return predict


def test_a_set_is_the_mean_of_its_pictures(tmp_path):
    scores = DepthEvaluator().evaluate(
        "default", batches(depth_items()), wrong_by(1.2), tmp_path, split="test", seed=3, about={"weights": "x"}
    )
    assert isinstance(scores, Scores)
    assert scores.mean["abs_rel"] == pytest.approx(0.2, rel=1e-5)
    assert scores.mean["delta1"] == 1
    assert scores.class_sizes == {"a": 3, "b": 2}
    assert (scores.n_ok, scores.n_failed, scores.n_without_truth, scores.replaced) == (5, 0, 0, 0)
    assert scores.pixels == 5 * 25
    written = json.loads((tmp_path / "default_test.json").read_text())
    assert written == json.loads(json.dumps(scores.to_dict()))
    header, *rows = [json.loads(line) for line in (tmp_path / "default_test.jsonl").read_text().splitlines()]
    assert header["protocol"]["name"] == "default"
    assert header["about"] == {"weights": "x"}
    assert [row["id"] for row in rows] == [f"item{index}" for index in range(5)]
    table = scores.to_markdown()
    assert "| **mean** | 5 | 0.2000 |" in table
    assert "n_ok 5" in table


def test_predictions_that_cannot_be_scored_are_listed_and_never_pay(tmp_path):
    items = depth_items(8)
    items[6]["depth"] = torch.zeros(1, 7, 5)
    hole = items[3]["depth"].clone()
    hole[0, 5, 2] = torch.nan
    bad = {
        "item0": "ran out of memory",
        "item1": {"normals": torch.ones(3, 7, 5)},
        "item2": {"depth": torch.ones(1, 7, 6)},
        "item3": {"depth": hole},
        "item4": {"depth": torch.zeros(1, 7, 5)},
        "item5": {"depth": torch.where(torch.arange(7).view(1, 7, 1) < 2, torch.nan, items[5]["depth"])},
    }
    evaluator = DepthEvaluator()
    scores = evaluator.evaluate("default", batches(items), wrong_by(1.0, **bad), tmp_path, split="test", seed=0)
    assert scores.failures == {
        "item0": "ran out of memory",
        "item1": "the model predicts no 'depth', only ['normals']",
        "item2": "depth must be (1, 7, 5) like the truth, got (1, 7, 6)",
        "item3": "depth is not finite at 1 of 25 valid pixels",
        "item6": "no pixel of the true depth counts",
    }
    assert (scores.n_ok, scores.n_failed, scores.n_without_truth) == (3, 5, 1)
    assert scores.replaced == 25  # the zeros of item4, which count as the smallest depth
    assert scores.mean["delta1"] == pytest.approx(2 / 7)  # item5 and item7 of all but the one without truth
    assert scores.mean["abs_rel"] == pytest.approx((1 - np.mean(1e-3 / items[4]["depth"][:, 2:].numpy())) / 3, rel=1e-4)
    assert all(value is not None and math.isfinite(value) for value in scores.mean.values())
    assert "Failed: item3: depth is not finite" in scores.to_markdown()


def test_a_predictor_that_raises_fails_its_batch_only(tmp_path):
    def predict(batch):
        if "item2" in batch["id"]:
            raise RuntimeError("no memory")
        return wrong_by(1.0)(batch)

    scores = DepthEvaluator().evaluate("default", batches(depth_items()), predict, tmp_path, split="val", seed=0)
    assert scores.failures == dict.fromkeys(["item2", "item3"], "predict: RuntimeError: no memory")
    assert scores.mean["delta1"] == pytest.approx(3 / 5)


def test_every_item_failing_is_still_a_table(tmp_path):
    scores = DepthEvaluator().evaluate(
        "default", batches(depth_items(2)), lambda batch: 1 / 0, tmp_path, split="test", seed=0
    )
    assert (scores.n_ok, scores.n_failed) == (0, 2)
    assert "n_failed 2" in scores.to_markdown()


def test_an_interrupted_evaluation_goes_on(tmp_path):
    items, asked = depth_items(), []

    def predict(batch):
        asked.extend(batch["id"])
        return wrong_by(1.1)(batch)

    def evaluate(**changes):
        arguments = {"split": "test", "seed": 0, "about": {"weights": "x"}} | changes
        return DepthEvaluator().evaluate("default", batches(items), predict, tmp_path, **arguments)

    whole = evaluate()
    path = tmp_path / "default_test.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the third item
    asked.clear()
    again = evaluate()
    assert again == whole
    assert asked == ["item2", "item3", "item4"]
    assert path.read_text() == "".join(lines)
    asked.clear()
    assert evaluate() == whole
    assert asked == []
    with pytest.raises(ValueError, match=r"holds results of another run: \['about'\] differ"):
        evaluate(about={"weights": "y"})
    with pytest.raises(ValueError, match=r"\['seed'\] differ"):
        evaluate(seed=1)
    path.write_text("garbage\n")
    with pytest.raises(ValueError, match="not a results file"):
        evaluate()


def test_what_is_wrong_with_all_items_is_an_error(tmp_path):
    items = depth_items(3)
    with pytest.raises(ValueError, match="item 'item0' comes twice"):
        DepthEvaluator().evaluate(
            "default", batches([*items, items[0]]), wrong_by(1.0), tmp_path / "a", split="test", seed=0
        )
    without = [{key: value for key, value in item.items() if key != "depth"} | {"x": torch.ones(1)} for item in items]
    with pytest.raises(ValueError, match=r"needs the batch keys \['depth'\]"):
        DepthEvaluator().evaluate("default", batches(without), wrong_by(1.0), tmp_path / "b", split="test", seed=0)
    with pytest.raises(ValueError, match="one Prediction per item, got 1 for 2"):
        DepthEvaluator().evaluate(
            "default", batches(items), lambda batch: [Prediction()], tmp_path / "c", split="test", seed=0
        )
    with pytest.raises(ValueError, match="nothing to evaluate"):
        DepthEvaluator().evaluate("default", [], wrong_by(1.0), tmp_path / "d", split="test", seed=0)
    with pytest.raises(ValueError, match="unknown protocol 'nyu'"):
        DepthEvaluator(protocols=["nyu"])


def test_alignment_happens_before_the_bounds(tmp_path):
    scores = DepthEvaluator(protocols=["default_median"]).evaluate(
        "default_median", batches(depth_items()), wrong_by(700.0), tmp_path, split="test", seed=0
    )
    assert scores.mean["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert scores.replaced == 0


def test_alignment_of_what_has_no_scale_fails_by_item(tmp_path, monkeypatch):
    inverse = DepthProtocol("inverse", 1e-3, 10.0, None, "scale_shift", "inverse", "a test")
    monkeypatch.setitem(DEPTH_PROTOCOLS, "inverse", inverse)
    bad = {"item1": {"depth": torch.zeros(1, 7, 5)}}
    for name in ("inverse", "default_median"):
        scores = DepthEvaluator().evaluate(
            name, batches(depth_items()), wrong_by(2.0, **bad), tmp_path, split="test", seed=0
        )
        assert list(scores.failures) == ["item1"]
        assert scores.mean["delta1"] == pytest.approx(4 / 5)


def test_a_predicted_mask_is_scored_against_where_there_is_depth(tmp_path):
    items = depth_items(2)
    mask = torch.zeros(1, 7, 5)
    mask[:, 3:] = 0.5  # 20 pixels of the 25, and none beside
    maps = {item["id"]: {"depth": item["depth"], "mask": mask} for item in items}
    scores = DepthEvaluator().evaluate("default", batches(items), wrong_by(1.0, **maps), tmp_path, split="test", seed=0)
    assert scores.mean["mask_iou"] == pytest.approx(0.8)


# ----------------------------------------------------------------------------------------------------- normals


def test_angles_are_those_of_acos_and_right_where_acos_is_not():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 3, 5, 7, generator=generator, dtype=torch.float64).unbind()
    cosine = torch.cosine_similarity(a, b, dim=1)
    torch.testing.assert_close(angles_between(3 * a, b), cosine.acos().rad2deg())
    torch.testing.assert_close(angles_between(a, 2 * a), torch.zeros(3, 5, 7, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (angles_between(a, 0 * b) == 90).all()


def test_statistics_of_angles():
    angles = torch.tensor([0.0, 5.0, 11.0, 12.0, 29.0, 31.0, 90.0, 179.0]).double()
    turned = torch.stack([angles.deg2rad().sin(), 0 * angles, -angles.deg2rad().cos()]).view(1, 3, 2, 4)
    target = torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand(1, 3, 2, 4).double().clone()
    errors = normal_errors(turned, target)
    assert float(errors.mean) == pytest.approx(float(angles.mean()))
    assert float(errors.median) == pytest.approx(20.5)
    assert float(errors.rmse) == pytest.approx(float(angles.square().mean().sqrt()))
    assert [float(x) for x in errors[3:]] == [3 / 8, 4 / 8, 5 / 8]
    target[..., 1, 3] = 0  # no truth for the worst
    assert float(normal_errors(turned, target).mean) == pytest.approx(float(angles[:-1].mean()))
    assert normal_errors(turned, 0 * target).median.isnan().all()
    assert len(normal_errors(turned[:0], target[:0]).mean) == 0


def test_normals_are_evaluated_item_by_item(tmp_path):
    target = torch.nn.functional.normalize(torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    target[:, :, 0] = 0
    target[3] = 0
    items = [{"id": str(i), "category": "a", "normals": t} for i, t in enumerate(target)]

    def predict(batch):
        maps = {"0": batch["normals"][0], "1": 0 * target[1], "2": torch.full((3, 6, 5), torch.nan), "3": target[0]}
        return [Prediction(maps={"normals": maps[item]}) for item in batch["id"]]

    scores = NormalsEvaluator().evaluate("normals", batches(items, 1), predict, tmp_path, split="test", seed=0)
    assert scores.mean["mean"] == pytest.approx(45, abs=1e-3)  # 0 and 90 degrees
    assert scores.mean["within_30"] == pytest.approx(1 / 3)  # the failed one counts as wrong
    assert scores.failures == {
        "2": "normals is not finite at 25 of 25 valid pixels",
        "3": "no pixel of the true normals counts",
    }
    assert scores.replaced == 25


def test_both_evaluations_are_in_the_table():
    assert EVALUATIONS["depth"] is DepthEvaluator
    assert EVALUATIONS["normals"] is NormalsEvaluator
    assert DepthEvaluator().choices == sorted(DEPTH_PROTOCOLS)
    assert ShareCrop((0.5, 1.0), (0.0, 0.25)).region(11, 9) == (slice(5, 11), slice(0, 2))


def test_rows_may_come_in_any_order():
    protocol = {"name": "x", "citation": "y"}
    rows = [
        {"id": str(i), "category": "a", "status": "ok", "fault": "", "reason": "", "pixels": i, "replaced": 0,
         "metrics": {"abs_rel": 0.1 * i}}
        for i in range(5)
    ]  # fmt: skip
    header = {"protocol": protocol, "seed": 0, "about": {}}
    assert summarize_maps(header, rows, shares=()) == summarize_maps(header, rows[::-1], shares=())
    with pytest.raises(ValueError, match="nothing to evaluate"):
        summarize_maps(header, [], shares=())
