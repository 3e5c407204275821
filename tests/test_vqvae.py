"""VQ-VAE: the quantizer against loops, its averages, what happens to codes that nobody uses, and code maps."""

import math

import pytest
import torch

from tests import naive
from vision3dgen.generators import VQVAE, Gaussian, ResidualDecoder, ResidualEncoder, VectorQuantizer, k_means


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def rand(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed))


def quantizer(codebook, **options):
    made = VectorQuantizer(len(codebook), codebook.shape[1], **options)
    made.codebook.copy_(codebook)
    return made


def test_nearest_codes_are_those_of_a_loop():
    codebook, maps = randn(11, 3), randn(2, 3, 5, 7, seed=1)
    found = quantizer(codebook).eval()(maps)
    expected = naive.nearest_codes(maps, codebook)
    assert torch.equal(found.codes, expected)
    torch.testing.assert_close(found.maps, codebook[expected].movedim(-1, 1))
    torch.testing.assert_close(found.commitment, (maps - codebook[expected].movedim(-1, 1)).square().sum((1, 2, 3)))


def test_the_gradient_passes_as_if_nothing_were_quantized():
    codebook, maps = randn(11, 3), randn(2, 3, 5, 7, seed=1).requires_grad_()
    weights = randn(2, 3, 5, 7, seed=2)
    found = quantizer(codebook).eval()(maps)
    (gradient,) = torch.autograd.grad((found.maps * weights).sum(), maps)
    torch.testing.assert_close(gradient, weights)
    (gradient,) = torch.autograd.grad(quantizer(codebook).eval()(maps).commitment.sum(), maps)
    torch.testing.assert_close(gradient, 2 * (maps - found.maps).detach())


def test_perplexity_counts_the_codes_in_use():
    codebook = torch.eye(5)
    maps = codebook[torch.tensor([[0, 1, 2, 3]])].movedim(-1, 1)[..., None]  # four codes equally often, the fifth never
    assert float(quantizer(codebook).eval()(maps).perplexity) == pytest.approx(4)
    same = codebook[torch.zeros(1, 4, dtype=torch.int64)].movedim(-1, 1)[..., None]
    assert float(quantizer(codebook).eval()(same).perplexity) == pytest.approx(1)


def test_codes_are_unbiased_averages_of_what_they_stand_for():
    """Written out for two updates: sums and counts decay alike, so their quotient has no bias of the start."""
    made = quantizer(torch.tensor([[-1.0], [1.0]]), decay=0.9, restart_below=0.0)
    made.updates += 1  # no k-means
    first, second = torch.tensor([-1.2, -0.8, 1.5]), torch.tensor([-0.5, 2.5, 1.1])
    made(first.view(1, 1, 1, 3))
    torch.testing.assert_close(made.codebook[:, 0], torch.tensor([-1.0, 1.5]))
    made(second.view(1, 1, 1, 3))
    low = (0.9 * (-2.0) + -0.5) / (0.9 * 2 + 1)
    high = (0.9 * 1.5 + 3.6) / (0.9 * 1 + 2)
    torch.testing.assert_close(made.codebook[:, 0], torch.tensor([low, high]))


def test_a_code_that_is_not_hit_stays_where_it_is():
    """The average of published code starts full with an empty count: one missed batch threw a code to infinity."""
    codebook = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    made = quantizer(codebook, restart_below=0.0)
    made.updates += 1
    for seed in range(3):
        made(0.1 * randn(1, 2, 4, 4, seed=seed))
    torch.testing.assert_close(made.codebook[1], codebook[1])


def test_dead_codes_restart_among_the_data():
    torch.manual_seed(0)
    made = quantizer(torch.cat([torch.zeros(1, 2), torch.full((7, 2), 1e3)]), restart_below=0.1)
    made.updates += 1
    for seed in range(20):
        found = made(randn(4, 2, 5, 5, seed=seed))
    assert made.codebook.abs().max() < 5
    assert float(found.perplexity) > 4
    before = made.codebook.clone()
    made.eval()(randn(4, 2, 5, 5))
    assert torch.equal(made.codebook, before)  # nothing moves in evaluation


def test_the_first_batch_places_the_codes():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = centers.repeat(25, 1) + 0.01 * randn(100, 2)
    made = VectorQuantizer(12, 2)
    made(vectors.T.reshape(1, 2, 10, 10))
    distance = torch.cdist(vectors, made.codebook).amin(1)
    assert distance.max() < 0.1


def test_k_means_lowers_the_error_and_copes_with_few_vectors():
    torch.manual_seed(0)
    vectors = randn(200, 3)
    errors = []
    for iterations in (0, 1, 10):
        torch.manual_seed(1)
        errors.append(float(torch.cdist(vectors, k_means(vectors, 8, iterations)).amin(1).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    few = k_means(randn(3, 2), 7)
    assert few.shape == (7, 2)
    assert torch.isfinite(few).all()
    with pytest.raises(ValueError, match="k-means needs at least one vector"):
        k_means(torch.zeros(0, 2), 3)


def small():
    torch.manual_seed(0)
    encoder = ResidualEncoder(1, 8, halvings=2, blocks=1, block_width=4)
    return VQVAE(encoder, ResidualDecoder(3, 1, 8, doublings=2, blocks=1, block_width=4), Gaussian(0.5), count=13)


def test_pictures_become_integer_images_and_come_back():
    model = small()
    model.loss({"image": rand(5, 1, 12, 20)})  # places the codes
    model.eval()
    codes = model.codes(rand(5, 1, 12, 20))
    assert codes.shape == (5, 3, 5)
    assert codes.dtype == torch.int64
    torch.testing.assert_close(model.decode(codes), model(rand(5, 1, 12, 20)))
    with pytest.raises(ValueError, match="codes must be 0 to 12, got 0 to 13"):
        model.decode(torch.tensor([[[0, 13]]]))


def test_the_loss_does_not_depend_on_the_batch_size():
    model, images = small(), rand(3, 1, 12, 12)
    model.loss({"image": images})
    model.eval()
    once, twice = model.loss({"image": images}), model.loss({"image": images.repeat(2, 1, 1, 1)})
    for name in once:
        torch.testing.assert_close(once[name], twice[name])
    expected = model.commitment * once["commitment"] - once["reconstruction"]
    torch.testing.assert_close(once["loss"], expected)


def test_every_parameter_is_trained():
    model = small()
    model.loss({"image": rand(5, 1, 12, 12)})["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    metrics = model.eval().validation_metrics({"image": rand(5, 1, 12, 12)})
    assert {value.shape for value in metrics.values()} == {(5,)}


class Uniform(torch.nn.Module):
    """A prior that knows nothing, in integers or in grey levels."""

    def __init__(self, grey):
        super().__init__()
        self.grey = grey

    def sample(self, n, *, cond=None, generator=None):
        codes = torch.randint(13, (n, 3, 5), generator=generator)
        return codes[:, None].float() / 12 if self.grey else codes


def test_a_prior_makes_it_a_generator():
    model = small().eval()
    with pytest.raises(ValueError, match=r"train a prior on codes\(images\)"):
        model.sample(2)
    model.quantizer.codebook.copy_(randn(13, 3))
    expected = model.decode(torch.randint(13, (2, 3, 5), generator=seeded())).clamp(0, 1)
    for grey in (False, True):
        model.prior = Uniform(grey)
        torch.testing.assert_close(model.sample(2, generator=seeded()), expected)
    images = rand(2, 1, 12, 20)
    torch.testing.assert_close(model.code_images(images)[:, 0] * 12, model.codes(images).float())


@pytest.mark.slow
def test_it_learns_two_pictures_exactly():
    torch.manual_seed(0)
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, :4] = 1
    images[1, 0, :, 4:] = 1
    encoder = ResidualEncoder(1, 16, halvings=2, blocks=1, block_width=8)
    model = VQVAE(encoder, ResidualDecoder(4, 1, 16, doublings=2, blocks=1, block_width=8), Gaussian(0.1), count=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        terms = model.loss({"image": images})
        terms["loss"].backward()
        optimizer.step()
    assert float((model.eval()(images) - images).abs().max()) < 0.1
    assert 1 < float(terms["perplexity"].detach()) <= 8
    assert math.isfinite(float(terms["commitment"].detach()))


@pytest.mark.parametrize("options", [{"count": 1}, {"decay": 1.0}, {"restart_below": -0.1}])
def test_settings_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match=r"count must be at least 2, decay in \[0, 1\) and restart_below >= 0"):
        VectorQuantizer(**options)
