"""Losses on pictures of depth and normals: formulas, loops, gradients, and pictures without a valid pixel."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from tests import naive
from vision3dgen.losses import (
    gradient_matching_loss,
    normals_loss,
    scale_invariant_depth_loss,
    silog_loss,
    virtual_normal_loss,
)
from vision3dgen.ops import depth_to_points
from vision3dgen.structures import Camera

PICTURES = {
    "scale_invariant": scale_invariant_depth_loss,
    "silog": silog_loss,
    "gradient_matching": gradient_matching_loss,
}


def pictures(seed=0, batch=3, height=7, width=5):
    """Predictions and truths; the truths have holes, and the second picture has nothing but holes."""
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (
        0.5 + torch.rand(2, batch, 1, height, width, generator=generator, dtype=torch.float64)
    ).unbind()
    target = target * (torch.rand(batch, 1, height, width, generator=generator) > 0.3)
    target[1] = 0
    return prediction, target


def camera(batch, height, width, dtype=torch.float64):
    one = Camera.look_at((0, 0, 3), field_of_view=50, image_size=(height, width)).to(dtype)
    return Camera.stack([one] * batch)


# ------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_eigens_loss_is_its_formula(weight):
    prediction, target = pictures()
    found = scale_invariant_depth_loss(prediction, target, weight=weight)
    for index in (0, 2):
        valid = target[index] > 0
        d = (prediction[index][valid].log() - target[index][valid].log()).tolist()
        n = len(d)
        expected = sum(x * x for x in d) / n - weight * sum(d) ** 2 / n**2
        assert float(found[index]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_a_wrong_scale_alone(k):
    """The known answers: (1 - λ)(ln k)² for Eigen's, 0 for the variance, 10 sqrt(.15) |ln k| for BTS's."""
    _, target = pictures()
    target = target[:1]
    prediction = k * target.where(target > 0, 1)
    assert float(scale_invariant_depth_loss(prediction, target)) == pytest.approx(0.5 * math.log(k) ** 2)
    assert float(scale_invariant_depth_loss(prediction, target, weight=1)) == pytest.approx(0, abs=1e-15)
    assert float(silog_loss(prediction, target)) == pytest.approx(10 * math.sqrt(0.15) * abs(math.log(k)))
    assert float(silog_loss(prediction, target, weight=1, factor=100)) == pytest.approx(0, abs=1e-5)
    assert float(gradient_matching_loss(prediction, target)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scales", [1, 2, 4])
def test_gradient_matching_equals_a_loop(scales):
    prediction, target = pictures()
    found = gradient_matching_loss(prediction, target, scales=scales)
    for index in range(3):
        expected = naive.gradient_matching(prediction[index, 0].tolist(), target[index, 0].tolist(), scales)
        assert float(found[index]) == pytest.approx(expected, rel=1e-10)


def test_a_moved_edge_costs_gradient_matching_more_than_a_wrong_level():
    target = torch.ones(1, 1, 16, 16)
    target[..., 8:] = 2.0
    moved = torch.ones(1, 1, 16, 16)
    moved[..., 9:] = 2.0
    level = target * 1.1
    assert gradient_matching_loss(moved, target) > 0.1
    assert float(gradient_matching_loss(level, target)) == pytest.approx(0, abs=1e-6)


def test_angles_of_normals():
    target = torch.tensor([[0.0, 0.0, -1.0]]).view(1, 3, 1, 1).expand(1, 3, 2, 3).clone()
    for degrees in (0.0, 30.0, 90.0, 180.0):
        angle = math.radians(degrees)
        turned = torch.tensor([math.sin(angle), 0.0, -math.cos(angle)]).view(1, 3, 1, 1).expand(1, 3, 2, 3)
        for length in (1.0, 7.0):
            assert float(normals_loss(length * turned, target, kind="angular")) == pytest.approx(angle, abs=1e-6)
            assert float(normals_loss(length * turned, target)) == pytest.approx(1 - math.cos(angle), abs=1e-6)
    nothing = torch.zeros_like(target)
    assert float(normals_loss(nothing, target, kind="angular")) == pytest.approx(math.pi / 2)
    assert float(normals_loss(nothing, target)) == pytest.approx(1)


def test_virtual_normals_of_planes():
    """All triples of a plane share its normal, so the loss is the distance of the two planes' normals."""
    height, width = 23, 29
    cameras = camera(1, height, width)
    rays = depth_to_points(torch.ones(1, 1, height, width, dtype=torch.float64), cameras)  # z = 1

    def plane(normal):
        normal = torch.tensor(normal, dtype=torch.float64)
        normal = normal / normal.norm()
        return normal, rays * (normal[2] * 3 / (rays @ normal))[..., None]  # through (0, 0, 3)

    (first, points), (second, others) = plane([0.2, 0.1, -1.0]), plane([-0.3, 0.2, -1.0])
    generator = torch.Generator().manual_seed(0)
    found = virtual_normal_loss(points, others, samples=500, generator=generator)
    assert float(found) == pytest.approx(float((first - second).abs().sum()), rel=1e-9)
    assert float(virtual_normal_loss(2 * points, points, samples=500)) == pytest.approx(0, abs=1e-12)  # no scale


def test_virtual_normals_are_drawn_by_the_generator_alone():
    prediction, target = pictures(batch=3, height=11, width=13)
    cameras = camera(3, 11, 13)
    first, second = depth_to_points(prediction, cameras), depth_to_points(target, cameras)

    def loss(seed, samples=97):
        generator = torch.Generator().manual_seed(seed)
        return virtual_normal_loss(first, second, samples=samples, generator=generator)

    assert torch.equal(loss(0), loss(0))
    assert not torch.equal(loss(0), loss(1))
    estimates = torch.stack([loss(seed, 2000) for seed in range(2)])
    assert (estimates[0] - estimates[1]).abs().max() < 0.15 * estimates.max()
    assert loss(0)[1] == 0  # no valid pixel
    assert loss(0)[0] > 0


# ----------------------------------------------------------------------------------------- masks and gradients


def of_points(prediction, target, mask=None):
    cameras = camera(len(prediction), *prediction.shape[2:])
    generator = torch.Generator().manual_seed(3)
    points = (depth_to_points(depth, cameras) for depth in (prediction, target))
    return virtual_normal_loss(*points, mask, samples=50, generator=generator)


EVERY = {**PICTURES, "virtual_normals": of_points}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_only_valid_pixels_count_and_an_empty_picture_is_zero(name):
    prediction, target = pictures()
    mask = torch.rand(3, 1, 7, 5, generator=torch.Generator().manual_seed(9)) > 0.2
    expected = EVERY[name](prediction, target * mask)
    spoiled = torch.where((target > 0) & mask, prediction, torch.nan).requires_grad_()
    for kept in (mask, mask.float()):
        found = EVERY[name](spoiled, target, kept)
        torch.testing.assert_close(found, expected)
        assert found[1] == 0
        (gradient,) = torch.autograd.grad(found.sum(), spoiled)
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()
        assert gradient[0].abs().sum() > 0
    nowhere = EVERY[name](spoiled, torch.zeros_like(target))
    assert nowhere.tolist() == [0, 0, 0]
    nowhere.sum().backward()  # the graph is there
    assert (spoiled.grad == 0).all()


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_infinite_and_negative_truths_are_not_valid(name):
    prediction, target = pictures()
    expected = PICTURES[name](prediction, target)
    for hole in (torch.inf, torch.nan, -1.0):
        torch.testing.assert_close(PICTURES[name](prediction, target.where(target > 0, hole)), expected)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_gradients_are_those_of_finite_differences(name):
    prediction, target = pictures(height=4, width=5)
    assert torch.autograd.gradcheck(lambda x: EVERY[name](x, target), prediction.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("kind", ["cosine", "angular"])
def test_gradients_of_the_normals_loss(kind):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 3, 5, generator=generator, dtype=torch.float64).unbind()
    target[0, :, 1] = 0  # no normal there
    assert torch.autograd.gradcheck(lambda x: normals_loss(x, target, kind=kind), prediction.requires_grad_())
    same = target.clone().requires_grad_()
    loss = normals_loss(same, target, kind=kind)
    assert loss.abs().max() < 1e-7
    loss.sum().backward()
    assert same.grad.isfinite().all()
    none = torch.zeros(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    nowhere = normals_loss(none, torch.zeros_like(target), kind=kind)
    assert nowhere.tolist() == [0, 0]
    nowhere.sum().backward()
    assert (none.grad == 0).all()


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_perfect_prediction_has_no_loss_and_a_finite_gradient(name):
    _, target = pictures()
    prediction = target.where(target > 0, 1).clone().requires_grad_()
    loss = PICTURES[name](prediction, target)
    assert loss.tolist() == [0, 0, 0]
    loss.sum().backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(PICTURES))  # triples of pixels are drawn for all pictures in order
def test_a_picture_has_the_loss_it_has_alone(name):
    prediction, target = pictures()
    together = PICTURES[name](prediction, target)
    alone = torch.cat([PICTURES[name](prediction[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_half_precision_is_computed_in_float32():
    prediction, target = (x.to(torch.bfloat16) for x in pictures())
    for loss in PICTURES.values():
        found = loss(prediction, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(prediction.float(), target.float()))


def test_predictions_of_zero_cost_much_and_stay_finite():
    _, target = pictures()
    zero = torch.zeros_like(target).requires_grad_()
    for loss in PICTURES.values():
        assert loss(zero, target).isfinite().all()
    assert silog_loss(zero, target)[0] > 10


def test_bad_input_is_named():
    prediction, target = pictures()
    with pytest.raises((ValueError, TypeCheckError), match="prediction"):
        silog_loss(prediction[..., :4], target)
    with pytest.raises(ValueError, match="mask must be"):
        silog_loss(prediction, target, target[:2])
    with pytest.raises(ValueError, match=r"weight must be from 0 to 1, got 1\.5"):
        scale_invariant_depth_loss(prediction, target, weight=1.5)
    with pytest.raises(ValueError, match="scales must be at least 1"):
        gradient_matching_loss(prediction, target, scales=0)
