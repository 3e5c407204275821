"""Scores of generated samples against closed forms and loops, and the evaluation of a run by them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import naive
from vision3dgen.experiment import generated_shapes
from vision3dgen.losses import chamfer_distance
from vision3dgen.metrics import (
    Features,
    GenerationEvaluator,
    Moments,
    Pair,
    ShapeSetEvaluator,
    compare_sets,
    fid,
    frechet_distance,
    inception_score,
    jensen_shannon,
    kid,
    manifold,
    moments,
    polynomial_mmd,
    quantize,
    set_distances,
    set_scores,
)
from vision3dgen.structures import Pointclouds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------- FID and KID


def test_the_distance_of_gaussians_that_commute_is_known():
    """For diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2 of the deviations."""
    first = Moments(torch.tensor([1.0, 2.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 9.0, 0.0]).double()))
    second = Moments(torch.tensor([0.0, 4.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 16.0, 1.0]).double()))
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 1 + 1 + 1)


def test_the_distance_of_any_gaussians_is_scipys():
    from scipy.linalg import sqrtm

    first, second = moments(randn(50, 7)), moments(randn(60, 7, seed=1) @ randn(7, 7, seed=2) + 0.3)
    root = sqrtm((first.covariance @ second.covariance).numpy())
    expected = float((first.mean - second.mean).square().sum() + (first.covariance + second.covariance).trace())
    assert frechet_distance(first, second) == pytest.approx(expected - 2 * root.real.trace())
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second))
    turn = torch.linalg.qr(randn(7, 7, seed=3)).Q
    turned = [Moments(turn @ m.mean, turn @ m.covariance @ turn.T) for m in (first, second)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(first, second))


def test_moments_are_numpys_with_the_unbiased_covariance():
    rows = randn(11, 3)
    assert torch.allclose(moments(rows).covariance, torch.from_numpy(np.cov(rows.numpy().T)))
    assert moments(rows[:, :1]).covariance.shape == (1, 1)


def test_equal_samples_have_distance_zero_and_a_shift_its_square():
    rows = randn(40, 7)
    assert fid(rows, rows) == pytest.approx(0, abs=1e-9)
    assert fid(rows, rows + 2) == pytest.approx(4 * 7)
    assert fid(rows.float(), rows.float()) == pytest.approx(0, abs=1e-6)


def test_fid_refuses_fewer_samples_than_features():
    with pytest.raises(ValueError, match="FID of 7 features needs more samples than that, got 7 generated ones"):
        fid(randn(8, 7), randn(7, 7))
    bad = randn(9, 7)
    bad[3, 2] = math.nan
    with pytest.raises(ValueError, match=r"features must be finite, got nan at index \(3, 2\)"):
        fid(bad, randn(9, 7))


def test_kid_is_the_loop_and_unbiased():
    x, y = randn(5, 3), randn(7, 3, seed=1) + 0.5
    assert float(polynomial_mmd(x, y)) == pytest.approx(naive.polynomial_mmd(x, y))
    whole = kid(x, y[:5], subsets=3, size=5, generator=seeded())
    assert whole.mean == pytest.approx(float(polynomial_mmd(x, y[:5])))
    assert whole.std == pytest.approx(0, abs=1e-12)
    same = torch.tensor(
        [float(polynomial_mmd(randn(20, 3, seed=2 * i), randn(20, 3, seed=2 * i + 1))) for i in range(400)]
    )
    assert abs(float(same.mean())) < 4 * float(same.std()) / 20  # its mean is 0 for equal laws, unlike FID's
    assert same.min() < 0
    assert kid(x, y, subsets=4, size=3, generator=seeded()) == kid(x, y, subsets=4, size=3, generator=seeded())
    with pytest.raises(ValueError, match="size 2 to the 5 rows, got 100 and 1000"):
        kid(x, y)


def test_the_inception_score_has_known_ends():
    sure = 100.0 * torch.eye(7).repeat(10, 1)
    assert inception_score(sure, 5).mean == pytest.approx(7)
    assert inception_score(sure, 5).std == pytest.approx(0, abs=1e-6)
    assert inception_score(torch.zeros(20, 7), 2).mean == pytest.approx(1)
    assert inception_score(sure[:1].repeat(20, 1), 1).mean == pytest.approx(1)  # always the same class
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    q = p.mean(0)
    expected = math.exp(sum(float((row * (row / q).log()).sum()) for row in p) / 2)
    assert inception_score(p.log(), 1).mean == pytest.approx(expected)
    with pytest.raises(ValueError, match="splits must be from 1 to the 4 samples, got 10"):
        inception_score(torch.zeros(4, 2))


@pytest.mark.parametrize("nearest", [1, 3])
def test_precision_recall_density_and_coverage_are_their_definitions(nearest):
    real, generated = randn(23, 3), 0.6 * randn(19, 3, seed=1) + 0.4
    assert manifold(real, generated, nearest=nearest) == pytest.approx(naive.manifold(real, generated, nearest))


def test_fidelity_and_diversity_are_told_apart():
    real = randn(200, 2)
    collapsed = manifold(real, 0.01 * randn(200, 2, seed=1))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.05
    assert collapsed.coverage < 0.2
    scattered = manifold(real, 10 * randn(200, 2, seed=1))
    assert scattered.precision < 0.1
    same = manifold(real, real)
    assert same[:2] == (1, 1)
    assert same.coverage == 1
    with pytest.raises(ValueError, match="nearest must be from 1 to less than the 200 real and 5 generated"):
        manifold(real, real[:5])


def test_a_large_set_in_pieces_is_the_same(monkeypatch):
    real, generated = randn(53, 3), randn(47, 3, seed=1)
    whole = manifold(real, generated)
    monkeypatch.setattr("vision3dgen.metrics.generation.CHUNK", 7)
    assert manifold(real, generated) == pytest.approx(whole)


def test_pictures_are_compared_as_bytes():
    images = torch.tensor([-0.2, 0.1, 0.5, 1.4])
    torch.testing.assert_close(quantize(images), torch.tensor([0.0, 26 / 255, 128 / 255, 1.0]))


def test_scores_are_torch_fidelitys_on_the_same_features():
    """Numbers of torch-fidelity 0.4.0 (float64) for these features, from its functions of features."""
    known = json.loads((Path(__file__).parent / "data" / "torch_fidelity_0.4.0.json").read_text())
    draws = np.random.RandomState(0)  # its stream is frozen
    mixing = draws.normal(size=(24, 24))
    real = np.maximum(draws.normal(size=(300, 24)) @ mixing * 0.3 + 0.2, 0)
    made = np.maximum(draws.normal(size=(400, 24)) @ mixing * 0.25 + 0.35, 0)
    logits = 3 * draws.normal(size=(300, 10))
    real, made, logits = (torch.from_numpy(each) for each in (real, made, logits))
    assert fid(real, made) == pytest.approx(known["fid"], rel=1e-6)
    assert kid(real, made[:300], subsets=2, size=300).mean == pytest.approx(known["kid"], rel=1e-6)
    for splits in (1, 10):
        assert inception_score(logits, splits) == pytest.approx(tuple(known[f"inception_{splits}"]), rel=1e-6)
    for nearest in (3, 5):
        found = manifold(real, made, nearest=nearest)
        assert found[:2] == pytest.approx(tuple(known[f"precision_recall_{nearest}"]), abs=1e-6)


# ------------------------------------------------------------------------------------------------ sets of shapes


def chamfer(x, y):
    return chamfer_distance(x, y, batch_reduction=None)[0]


def cloud(shift, seed=0):
    return 0.05 * torch.randn(1, 16, 3, generator=seeded(seed)) + shift


def test_set_scores_of_a_line_are_worked_out_by_hand():
    """Shapes are numbers: references 0, 1, 10, generated 0.1, 0.2, 3."""
    generated, reference = torch.tensor([0.1, 0.2, 3.0]).double(), torch.tensor([0.0, 1.0, 10.0]).double()

    def table(a, b):
        return (a[:, None] - b).abs()

    scores = set_scores(table(generated, reference), table(generated, generated), table(reference, reference))
    assert scores.mmd == pytest.approx((0.1 + 0.8 + 7) / 3)
    assert scores.coverage == pytest.approx(2 / 3)  # 0.1 and 0.2 are nearest to 0, 3 to 1
    # nearest others: 0.1 > 0 or 0.2 (0.1 each, the first column wins), 0.2 > 0.1, 3 > 1, 0 > 0.1, 1 > 0.2, 10 > 3
    assert scores.one_nna == pytest.approx(2 / 6)


def test_equal_laws_are_not_told_apart_and_different_ones_are():
    reference = torch.cat([cloud(0.1 * i, seed=i) for i in range(12)])
    same = torch.cat([cloud(0.1 * i, seed=100 + i) for i in range(12)])
    collapsed = torch.cat([cloud(0.5, seed=200 + i) for i in range(12)])
    scores = {
        name: set_scores(
            set_distances(own, reference, chamfer),
            set_distances(own, own, chamfer),
            set_distances(reference, reference, chamfer),
        )
        for name, own in (("same", same), ("collapsed", collapsed))
    }
    assert scores["same"].coverage > 0.8 > 0.3 > scores["collapsed"].coverage
    assert scores["same"].mmd < scores["collapsed"].mmd
    assert scores["same"].one_nna < 0.5 < 0.8 < scores["collapsed"].one_nna
    with pytest.raises(ValueError, match="both sets must have shapes, got 0 generated"):
        set_scores(torch.zeros(0, 3), torch.zeros(0, 0), torch.zeros(3, 3))


def test_the_divergence_of_two_sets_is_between_0_and_1_bit():
    first, second = cloud(0.0), cloud(0.0, seed=1)
    assert jensen_shannon(first, first) == 0
    assert 0 < jensen_shannon(first, second) < 1
    assert jensen_shannon(first, second) == pytest.approx(jensen_shannon(second, first))
    apart = jensen_shannon(torch.full((1, 5, 3), -0.25), torch.full((2, 5, 3), 0.25))
    assert apart == pytest.approx(1)
    half = torch.cat([torch.full((1, 5, 3), -0.25), torch.full((1, 5, 3), 0.25)])  # p = (1/2, 1/2), q = (1, 0)
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert jensen_shannon(half, torch.full((1, 5, 3), -0.25)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="first must be finite"):
        jensen_shannon(first * math.nan, second)


def test_two_halves_of_one_set_are_told_apart_half_of_the_time():
    sizes = 0.2 + 0.6 * torch.rand(120, 1, 1, generator=seeded())
    directions = torch.nn.functional.normalize(torch.randn(120, 16, 3, generator=seeded(1)), dim=2)
    clouds = sizes * directions
    halves = compare_sets(clouds[:60], clouds[60:], ("chamfer", "earth_movers"))
    for scores in halves.values():
        assert abs(scores.one_nna - 0.5) < 4 * 0.5 / math.sqrt(120)
        assert scores.coverage > 0.5
    with pytest.raises(ValueError, match="unknown distance 'hausdorff'"):
        compare_sets(clouds[:3], clouds[3:6], ("hausdorff",))


class _Cubes(torch.nn.Module):
    """Occupancies of cubes, of which every third is empty."""

    def sample(self, n, *, generator=None):
        grids = torch.zeros(n, 8, 8, 8)
        grids[:, 2:6, 2:6, 2:6] = 1
        grids[::3] = 0
        return grids


def test_generated_shapes_become_clouds_and_scores(tmp_path):
    predict = generated_shapes(_Cubes(), 64, "cpu", 0)
    batches = [
        {"id": [f"a/{i}" for i in range(4)], "surface": Pointclouds(torch.rand(4, 100, 3, generator=seeded()) - 0.5)},
        {"id": ["b/0"], "surface": Pointclouds(torch.rand(1, 100, 3, generator=seeded(1)) - 0.5)},
    ]
    clouds = predict(batches[0])
    assert clouds.real.shape == clouds.generated.shape == (4, 64, 3)
    assert torch.isnan(clouds.generated).flatten(1).all(1).tolist() == [True, False, False, True]
    assert (
        clouds.generated[1].abs().max() < 0.32
    )  # the cube's half edge is 0.25, its surface half a cell further at most
    assert clouds.generated[1].abs().amax(1).min() > 0.2
    rows = {tuple(point) for point in batches[0]["surface"].points_padded()[0].tolist()}
    assert {tuple(point) for point in clouds.real[0].tolist()} < rows
    evaluator = ShapeSetEvaluator(points=64, distances=("chamfer",))
    scores = evaluator.evaluate("generated_shapes", batches, predict, tmp_path, split="test", seed=0)
    assert (scores.total, scores.n_failed) == (5, 3)
    assert (
        scores.by_distance["chamfer"].coverage == pytest.approx(1 / 5)
        or scores.by_distance["chamfer"].coverage == 2 / 5
    )
    kept = json.loads((tmp_path / "generated_shapes_test.json").read_text())
    assert kept["by_distance"]["chamfer"]["mmd"] == scores.by_distance["chamfer"].mmd
    lines = (tmp_path / "generated_shapes_test.jsonl").read_text().splitlines()
    assert [json.loads(line).get("surface") for line in lines] == [None, False, True, True, False, False]
    assert "| chamfer |" in scores.to_markdown()
    with pytest.raises(ValueError, match="none of the 1 generated shapes has a surface"):
        evaluator.evaluate("generated_shapes", batches[1:], predict, tmp_path, split="test", seed=0)
    with pytest.raises(ValueError, match="clouds have 100 points, fewer than the 200 asked for"):
        generated_shapes(_Cubes(), 200, "cpu", 0)(batches[0])
    with pytest.raises(ValueError, match="Linear is not a generator"):
        generated_shapes(torch.nn.Linear(1, 1), 64, "cpu", 0)
    for settings, message in (
        ({"points": 0}, "points must be at least 1 and radius > 0, got 0"),
        ({"distances": ["f1"]}, "unknown distance 'f1'"),
    ):
        with pytest.raises(ValueError, match=message):
            ShapeSetEvaluator(**settings)


# ------------------------------------------------------------------------------------------------- the evaluator


def evaluate(tmp_path, predict, sizes=(40, 23), **options):
    batches = []
    for number, size in enumerate(sizes):
        batches.append({"image": randn(size, 3, seed=number).float(), "id": [f"{number}/{i}" for i in range(size)]})
    evaluator = GenerationEvaluator(extractor=tmp_path, kid_size=20, kid_subsets=5, splits=3, **options)
    return evaluator.evaluate("generation", batches, predict, tmp_path, split="test", seed=0, about={"weights": "abc"})


def test_the_evaluator_scores_the_whole_split_at_once(tmp_path):
    draws = seeded(7)

    def predict(batch):
        made = torch.randn(batch["image"].shape, generator=draws) + 0.5
        return Pair(Features(batch["image"]), Features(made, made))

    scores = evaluate(tmp_path, predict)
    real = torch.cat([randn(40, 3), randn(23, 3, seed=1)]).float()
    draws = seeded(7)
    made = torch.cat([torch.randn(40, 3, generator=draws), torch.randn(23, 3, generator=draws)]) + 0.5
    assert scores.fid == pytest.approx(fid(real, made))
    assert scores.kid == kid(real, made, subsets=5, size=20, generator=seeded())
    assert scores.manifold == manifold(real, made)
    assert scores.inception == inception_score(made, 3)
    assert (scores.total, scores.n_failed, scores.features) == (63, 0, 3)
    rows = [json.loads(line) for line in (tmp_path / "generation_test.jsonl").read_text().splitlines()][1:]
    assert rows[0]["nearest_real"] == pytest.approx(float(torch.cdist(made[:1].double(), real.double()).min()))
    kept = json.loads((tmp_path / "generation_test.json").read_text())
    assert kept["fid"] == pytest.approx(scores.fid)
    assert kept["manifold"]["precision"] == scores.manifold.precision
    assert "| FID |" in scores.to_markdown()


def test_samples_that_are_not_finite_are_counted(tmp_path):
    def predict(batch):
        made = batch["image"] + 0.1
        made[2] = math.nan
        return Pair(Features(batch["image"]), Features(made))

    scores = evaluate(tmp_path, predict)
    assert scores.n_failed == 2
    assert scores.failures == ["0/2", "1/2"]
    assert scores.inception is None
    assert math.isfinite(scores.fid)
    with pytest.raises(ValueError, match="no feature of the 63 generated samples is finite"):
        evaluate(tmp_path, lambda batch: Pair(Features(batch["image"]), Features(batch["image"] * math.nan)))
    with pytest.raises(ValueError, match="predict must give 40 rows of both kinds, got 40 and 39"):
        evaluate(tmp_path, lambda batch: Pair(Features(batch["image"]), Features(batch["image"][1:])))


def test_settings_out_of_range_are_errors(tmp_path):
    with pytest.raises(ValueError, match="at least 1 and kid_size 2, got 0, 100, 10 and 1000"):
        GenerationEvaluator(extractor=tmp_path, nearest=0)
