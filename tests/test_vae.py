"""Likelihoods, autoencoders and VAEs against sums over all values, closed forms, and a model whose log p is known."""

import math

import pytest
import torch
from torch import nn

from vision3dgen.generators import (
    CORRUPTIONS,
    VAE,
    Autoencoder,
    Bernoulli,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    DiscretizedLogistic,
    Gaussian,
    MaskingNoise,
    MLPDecoder,
    MLPEncoder,
    Posterior,
    binarize,
    gaussian_kl,
)
from vision3dgen.models import LinearClassifier


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


# -------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("log_scale", [-9.0, -4.5, -1.0, 2.0])
@pytest.mark.parametrize("levels", [2, 32, 256])
def test_probabilities_of_all_levels_sum_to_one(mean, log_scale, levels):
    values = (torch.arange(levels, dtype=torch.float64) / (levels - 1)).view(-1, 1, 1, 1)
    output = torch.tensor([mean, log_scale], dtype=torch.float64).view(1, 2, 1, 1).expand(levels, -1, -1, -1)
    nats = DiscretizedLogistic(levels).log_prob(output, values)
    assert float(nats.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_discretized_logistic_is_the_difference_of_sigmoids():
    levels = 256
    steps = torch.randint(levels, (3, 2, 5, 7), generator=seeded())
    images = steps.double() / (levels - 1)
    output = torch.cat([randn(3, 2, 5, 7, seed=1) / 3, randn(3, 2, 5, 7, seed=2) / 5 - 1], 1).double()
    mean, scale = output[:, :2], output[:, 2:].exp()
    value, half = 2 * images - 1, 1 / (levels - 1)
    upper = torch.where(steps == levels - 1, 1.0, ((value + half - mean) / scale).sigmoid())
    lower = torch.where(steps == 0, 0.0, ((value - half - mean) / scale).sigmoid())
    expected = (upper - lower).log().flatten(1).sum(1)
    torch.testing.assert_close(DiscretizedLogistic().log_prob(output, images), expected)


def test_likelihoods_have_the_gradients_they_should():
    images = torch.randint(256, (2, 1, 3, 2), generator=seeded()).double() / 255
    for likelihood, observed in (
        (Bernoulli(), (images > 0.5).double()),
        (Gaussian(0.3), images),
        (Gaussian(None), images),
        (DiscretizedLogistic(), images),
    ):
        output = randn(2, likelihood.per_value, 3, 2, seed=3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, own=likelihood, seen=observed: own.log_prob(x, seen), output)


def test_gaussian_is_the_density():
    images, output = rand(3, 2, 5, 7), randn(3, 4, 5, 7)
    normal = torch.distributions.Normal(output[:, :2], output[:, 2:].exp())
    torch.testing.assert_close(Gaussian(None).log_prob(output, images), normal.log_prob(images).sum((1, 2, 3)))
    fixed = torch.distributions.Normal(output[:, :2], 0.3)
    torch.testing.assert_close(Gaussian(0.3).log_prob(output[:, :2], images), fixed.log_prob(images).sum((1, 2, 3)))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5), Gaussian(None), DiscretizedLogistic(32)])
def test_samples_follow_the_likelihood(likelihood):
    output = torch.tensor([0.2, -1.5])[: likelihood.per_value].view(1, -1, 1, 1).expand(40_000, -1, 1, 1)
    samples = likelihood.sample(output, seeded())
    error = 4 * float(samples.std()) / 200
    assert float(samples.mean()) == pytest.approx(float(likelihood.mean(output)[0]), abs=error)
    if isinstance(likelihood, DiscretizedLogistic):
        likelihood.observe(samples)  # every draw is on a level
        share = float((samples == samples.median()).float().mean())
        level = samples.median().view(1, 1, 1, 1)
        assert share == pytest.approx(math.exp(likelihood.log_prob(output[:1], level)), abs=0.01)


def test_binary_pictures_are_made_in_three_ways():
    grey = torch.full((4000, 1, 1, 1), 0.3)
    assert binarize(grey, "threshold").sum() == 0
    assert float(binarize(grey, "dynamic", seeded()).mean()) == pytest.approx(0.3, abs=0.03)
    with pytest.raises(ValueError, match=r"images must be 0 or 1, got 0.3.* at index \(0, 0, 0, 0\)"):
        binarize(grey, "none")
    with pytest.raises(ValueError, match=r"unknown binarize 'dynamical'.*did you mean 'dynamic'"):
        Bernoulli("dynamical")


@pytest.mark.parametrize(
    "likelihood, value, message",
    [
        (Bernoulli("threshold"), 1.5, r"images must be in \[0, 1\], got 1.5 at index \(1, 0, 2, 3\)"),
        (DiscretizedLogistic(), -0.1, r"images must be in \[0, 1\], got -0.1"),
        (DiscretizedLogistic(), 0.3011, r"images must have 256 levels, multiples of 1/255"),
        (Gaussian(), math.nan, "images must be finite, got nan"),
        (Bernoulli(), math.nan, "images must be finite, got nan"),
    ],
)
def test_pictures_a_likelihood_does_not_model_are_named(likelihood, value, message):
    images = torch.zeros(2, 1, 5, 7)
    images[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        likelihood.observe(images)


def test_a_decoder_with_the_wrong_number_of_outputs_is_named():
    with pytest.raises(
        ValueError, match=r"needs 2 number\(s\) for each value.*must be \(3, 2, 5, 7\), it is \(3, 1, 5, 7"
    ):
        Gaussian(None).log_prob(torch.zeros(3, 1, 5, 7), torch.zeros(3, 1, 5, 7))
    with pytest.raises(ValueError, match="scale must be > 0, got 0"):
        Gaussian(0.0)


# -------------------------------------------------------------------------------------------------------- VAE


def test_kl_closed_form_is_the_monte_carlo_mean():
    mean, log_variance = randn(3, 5, dtype=torch.float64), randn(3, 5, seed=1, dtype=torch.float64)
    posterior = Posterior(mean.repeat(40_000, 1), log_variance.repeat(40_000, 1))
    z = posterior.sample(seeded())
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    draws = (posterior.log_prob(z) - prior).view(-1, 3)
    error = 4 * draws.std(0) / 200
    assert ((draws.mean(0) - gaussian_kl(mean, log_variance)).abs() < error).all()
    assert gaussian_kl(torch.zeros(1, 5), torch.zeros(1, 5)).item() == 0


def linear_model(noise=0.7, spoil=0.3):
    """p(x | z) = N(Wz + b, noise^2), whose log p(x) and posterior are known; q is off by `spoil`."""
    dims, latents = 5, 2
    model = VAE(MLPEncoder((1, 1, dims), ()), MLPDecoder(latents, (1, 1, dims), ()), Gaussian(noise)).double()
    weight, bias = randn(dims, latents, dtype=torch.float64), randn(dims, seed=1, dtype=torch.float64)
    precision = torch.eye(latents, dtype=torch.float64) + weight.T @ weight / noise**2
    toward = torch.linalg.solve(precision, weight.T) / noise**2  # E(z | x) = toward (x - b)
    with torch.no_grad():
        model.decoder.layers[0].weight.copy_(weight)
        model.decoder.layers[0].bias.copy_(bias)
        model.posterior.weight[:latents] = toward * (1 - spoil)
        model.posterior.bias[:latents] = -toward @ bias
        model.posterior.weight[latents:] = 0
        model.posterior.bias[latents:] = -precision.diagonal().log() + spoil
    covariance = weight @ weight.T + noise**2 * torch.eye(dims, dtype=torch.float64)
    return model, torch.distributions.MultivariateNormal(bias, covariance)


def test_elbo_iwae_and_log_p_are_ordered_where_log_p_is_known():
    model, exact = linear_model()
    x = randn(7, 1, 1, 5, seed=3, dtype=torch.float64)
    truth = exact.log_prob(x.flatten(1))
    many = x.repeat(2000, 1, 1, 1)
    elbo = model.elbo(many, generator=seeded()).elbo.view(-1, 7).mean(0)
    iwae = model.log_prob(many, samples=8, generator=seeded()).view(-1, 7).mean(0)
    assert (elbo < iwae - 0.01).all()
    assert (iwae < truth).all()
    estimate = model.log_prob(x, samples=20_000, chunk=5000, generator=seeded())
    torch.testing.assert_close(estimate, truth, atol=0.03, rtol=0)


def test_the_bound_is_tight_at_the_true_posterior():
    noise, dims = 0.7, 3
    model = VAE(MLPEncoder((1, 1, dims), ()), MLPDecoder(1, (1, 1, dims), ()), Gaussian(noise)).double()
    weight = randn(dims, 1, dtype=torch.float64)
    precision = 1 + float(weight.square().sum()) / noise**2
    with torch.no_grad():
        model.decoder.layers[0].weight.copy_(weight)
        model.decoder.layers[0].bias.zero_()
        model.posterior.weight.zero_()
        model.posterior.weight[0] = weight[:, 0] / noise**2 / precision
        model.posterior.bias.copy_(torch.tensor([0.0, -math.log(precision)]))
    covariance = weight @ weight.T + noise**2 * torch.eye(dims, dtype=torch.float64)
    x = randn(7, 1, 1, dims, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(dims, dtype=torch.float64), covariance)
    one = model.importance_bound(x, samples=1, generator=seeded())  # any single draw gives log p itself
    torch.testing.assert_close(one, exact.log_prob(x.flatten(1)))


def small(classes=None, **options):
    torch.manual_seed(0)
    encoder = ConvolutionalEncoder(1, 12, (5, 7), conditions=classes or 0)
    decoder = ConvolutionalDecoder(3 + (classes or 0), 1, 12, (7, 5))
    return VAE(encoder, decoder, Bernoulli("threshold"), classes=classes, **options)


def test_chunks_do_not_change_the_bound():
    model = small().eval()
    values = [model.log_prob(rand(5, 1, 12, 12), samples=11, chunk=chunk, generator=seeded()) for chunk in (1, 4, 11)]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_one_sample_of_the_importance_bound_is_an_elbo_on_average():
    model, _ = linear_model()
    x = randn(1, 1, 1, 5, seed=3, dtype=torch.float64).repeat(20_000, 1, 1, 1)
    one, elbo = model.log_prob(x, samples=1, generator=seeded(1)), model.elbo(x, generator=seeded(2)).elbo.detach()
    error = 4 * float((one.var() + elbo.var()).sqrt()) / math.sqrt(20_000)
    assert float(one.mean()) == pytest.approx(float(elbo.mean()), abs=error)


def test_beta_weighs_the_kl_in_the_loss_and_not_in_the_log():
    batch = {"image": rand(5, 1, 12, 12)}
    for beta in (1.0, 4.0):
        model = small(beta=beta)
        torch.manual_seed(1)
        terms = {name: float(value.detach()) for name, value in model.loss(batch).items()}
        assert terms["loss"] == pytest.approx(beta * terms["kl"] - terms["reconstruction"], rel=1e-5)
        assert terms["elbo"] == pytest.approx(terms["reconstruction"] - terms["kl"], rel=1e-5)


def test_iwae_training_reaches_every_parameter():
    model = small(samples=3)
    model.loss({"image": rand(5, 1, 12, 12)})["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.loss({"image": rand(5, 1, 12, 12)})["bound"] < 0
    with pytest.raises(ValueError, match="beta must be > 0, and 1 with samples > 1"):
        small(samples=3, beta=2.0)


def test_a_conditional_vae_uses_the_class_in_both_networks():
    model = small(classes=2).eval()
    images, labels = rand(4, 1, 12, 12), torch.tensor([0, 1, 1, 0])
    assert not torch.equal(model.encode(images, labels).mean, model.encode(images, 1 - labels).mean)
    z = randn(4, 3)
    assert not torch.equal(model.decode(z, labels), model.decode(z, 1 - labels))
    model.loss({"image": images, "label": labels})["loss"].backward()
    with pytest.raises(ValueError, match=r"the model needs 4 labels, integers below 2, got None"):
        model.elbo(images)
    with pytest.raises(ValueError, match="labels must be 0 to 1, got 2 at 3"):
        model.sample(4, cond=torch.tensor([0, 1, 1, 2]))
    with pytest.raises(ValueError, match="the model has no classes, but labels were given"):
        small().sample(4, cond=labels)
    with pytest.raises(ValueError, match="with classes=2 the encoder must have conditions=2, it has 0"):
        VAE(MLPEncoder(), MLPDecoder(12), Bernoulli(), classes=2)
    with pytest.raises(ValueError, match="2 leave none of 2"):
        VAE(MLPEncoder(conditions=2), MLPDecoder(2), Bernoulli(), classes=2)


def test_samples_come_again_with_the_seed_and_interpolation_meets_its_ends():
    model = small().eval()
    assert torch.equal(model.sample(3, generator=seeded()), model.sample(3, generator=seeded()))
    binary = model.sample(3, mean=False, generator=seeded())
    assert set(binary.unique().tolist()) <= {0.0, 1.0}
    first, second = rand(2, 1, 12, 12), rand(2, 1, 12, 12, seed=1)
    line = model.interpolate(first, second, 5)
    assert line.shape == (2, 5, 1, 12, 12)
    torch.testing.assert_close(line[:, 0], model(first))
    torch.testing.assert_close(line[:, -1], model(second))
    with pytest.raises(ValueError, match="steps must be at least 2"):
        model.interpolate(first, second, 1)


def test_a_traversal_moves_one_dimension():
    model = small().eval()
    z = randn(2, 3)
    found = model.traverse(z, [0, 2], [-1.0, 0.5, 2.0])
    assert found.shape == (2, 2, 3, 1, 12, 12)
    own = z.clone()
    own[:, 2] = 0.5
    torch.testing.assert_close(found[:, 1, 1], model.decode(own))
    with pytest.raises(ValueError, match=r"dims must be 0 to 2, got \[3\]"):
        model.traverse(z, [3], [0.0])


@pytest.mark.slow
def test_a_vae_learns_to_beat_independent_pixels():
    """Two templates: one latent bit explains them, a model of independent pixels needs log 2 for each free pixel."""
    torch.manual_seed(0)
    choice = torch.randint(2, (256, 1, 1, 1))
    images = torch.where(choice == 0, torch.eye(6), torch.eye(6).flip(1)).view(-1, 1, 6, 6)
    model = VAE(MLPEncoder((1, 6, 6), (32,)), MLPDecoder(2, (1, 6, 6), (32,)), Bernoulli())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        model.loss({"image": images})["loss"].backward()
        optimizer.step()
    nats = float(model.log_prob(images, samples=50, generator=seeded()).mean())
    assert -1.1 < nats < -math.log(2) + 0.05  # 12 log 2 = 8.3 for independent pixels, log 2 at best


# ------------------------------------------------------------------------------------------------- autoencoders


def autoencoder(**options):
    torch.manual_seed(0)
    return Autoencoder(MLPEncoder((1, 5, 7), (16,)), MLPDecoder(3, (1, 5, 7), (16,)), Gaussian(), **options)


def test_the_loss_of_an_autoencoder_is_half_the_squared_error():
    model, images = autoencoder(), rand(4, 1, 5, 7)
    expected = 0.5 * (model(images) - images).square().sum() / 4 + 35 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(model.loss({"image": images})["loss"], expected)
    metrics = model.validation_metrics({"image": images})
    torch.testing.assert_close(metrics["squared_error"], (model(images) - images).square().mean((1, 2, 3)))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_damage_as_often_as_they_say(name):
    corruption, images = CORRUPTIONS[name](0.25), torch.full((50, 3, 20, 20), 0.5)
    damaged = corruption(images, seeded())
    assert torch.equal(damaged, corruption(images, seeded()))
    if name == "gaussian":
        assert float((damaged - images).std()) == pytest.approx(0.25, abs=0.01)
    else:
        assert float((damaged != images).float().mean()) == pytest.approx(0.25, abs=0.01)
        assert torch.equal(damaged[:, 0], damaged[:, 2])  # a pixel is damaged in all channels
    if name == "salt_and_pepper":
        assert float((damaged == 1).float().mean()) == pytest.approx(0.125, abs=0.01)


def test_a_denoising_autoencoder_sees_the_damaged_and_is_asked_for_the_whole_picture():
    model, seen = autoencoder(corruption=MaskingNoise(0.999999)), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = rand(4, 1, 5, 7) + 0.1
    blind = -model.likelihood.log_prob(model.decoder(model.code(model.encoder(torch.zeros_like(images)))), images)
    torch.testing.assert_close(-model.log_prob_of(images), blind)
    assert seen[1].sum() == 0
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"probability must be in \(0, 1\)"):
            MaskingNoise(wrong)


@pytest.mark.slow
def test_features_of_an_autoencoder_serve_a_linear_classifier():
    """Bars in rows or in columns: no pixel tells the class, the code does."""
    generator = seeded()
    labels = torch.randint(2, (400,), generator=generator)
    bars = torch.zeros(400, 1, 5, 7)
    for image, label in zip(bars, labels):
        if label:
            image[0, int(torch.randint(5, (), generator=generator))] = 1
        else:
            image[0, :, int(torch.randint(7, (), generator=generator))] = 1
    torch.manual_seed(0)
    model = Autoencoder(MLPEncoder((1, 5, 7), (64,)), MLPDecoder(8, (1, 5, 7), (64,)), Gaussian())
    classifier = LinearClassifier((64, 1, 1), 2)

    def classify():
        return classifier.loss({"image": model.encoder(bars)[..., None, None].detach(), "label": labels})["loss"]

    for network, loss in ((model, lambda: model.loss({"image": bars})["loss"]), (classifier, classify)):
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    scores = classifier(model.encoder(bars)[..., None, None])
    assert float((scores.argmax(1) == labels).float().mean()) > 0.95
    assert model.features(bars).shape == (400, 8)


def test_networks_say_what_sizes_they_take():
    with pytest.raises(ValueError, match=r"the encoder takes images \('B', 1, 28, 28\), got \(2, 3, 28, 28\)"):
        MLPEncoder()(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"the encoder takes images \('B', 1, 28, 28\), got \(2, 1, 32, 32\)"):
        ConvolutionalEncoder()(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"size must be a multiple of 2 \*\* 3"):
        ConvolutionalDecoder(3, 1, 28, (8, 8, 8))
    with pytest.raises(ValueError, match="cannot be halved 4 times"):
        ConvolutionalEncoder(1, 8, (4, 4, 4, 4))
    for size in (12, 28):
        encoder = ConvolutionalEncoder(2, size, (3, 5))
        assert encoder(torch.zeros(2, 2, size, size)).shape == (2, encoder.features)
        assert ConvolutionalDecoder(3, 2, size, (5, 3))(torch.zeros(2, 3)).shape == (2, 2, size, size)
    assert isinstance(MLPEncoder(hidden=()).layers, nn.Sequential)
