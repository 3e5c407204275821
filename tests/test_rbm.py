"""The restricted Boltzmann machine on sizes where everything can be summed."""

import itertools
import math

import pytest
import torch

from vision3dgen.generators import RBM


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def machine(visible=5, hidden=3, scale=0.8, **options):
    torch.manual_seed(0)
    model = RBM((1, 1, visible), hidden, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64))
    return model


def states(count):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)


def energy(model, visible, hidden):
    return -(model.visible_bias @ visible + model.hidden_bias @ hidden + hidden @ model.weight @ visible)


def test_the_free_energy_sums_out_the_hidden_units():
    model = machine()
    for visible in states(5)[::7]:
        sums = sum(math.exp(-energy(model, visible, hidden).detach()) for hidden in states(3))
        assert float(model.free_energy(visible[None]).detach()) == pytest.approx(-math.log(sums))


@pytest.mark.parametrize("visible, hidden", [(5, 3), (3, 7)])
def test_probabilities_of_all_pictures_sum_to_one(visible, hidden):
    model = machine(visible, hidden)
    total = sum(math.exp(-energy(model, v, h).detach()) for v in states(visible) for h in states(hidden))
    assert float(model.log_partition()) == pytest.approx(math.log(total))
    log_prob = model.log_prob(states(visible).view(-1, 1, 1, visible))
    assert float(log_prob.exp().sum()) == pytest.approx(1)
    torch.testing.assert_close(model.predict({"image": states(visible).view(-1, 1, 1, visible)}), log_prob)


def test_long_chains_draw_from_the_model():
    model = machine(scale=0.5)
    rows = states(5)
    exact = model.log_prob(rows.view(-1, 1, 1, 5)).exp()
    chains = model.gibbs((torch.rand(20_000, 5, generator=seeded()) < 0.5).double(), 30, seeded())
    codes = (chains @ (2.0 ** torch.arange(4, -1, -1, dtype=torch.float64))).long()
    shares = torch.bincount(codes, minlength=32) / 20_000
    assert float((shares - exact).abs().sum()) < 0.05
    samples = model.sample(3, generator=seeded())
    assert samples.shape == (3, 1, 1, 5)
    assert torch.equal(samples, model.sample(3, generator=seeded()))


def test_the_gradient_of_contrastive_divergence_approaches_that_of_the_likelihood():
    """With chains at the model's own distribution, the mean over all states of -log p has the gradient of the loss."""
    model = machine(scale=0.5, steps=50)
    data = states(5)[[3, 17, 30]].repeat(20_000, 1).view(-1, 1, 1, 5)
    torch.manual_seed(0)
    model.loss({"image": data})["loss"].backward()
    rough = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    rows = states(5)
    log_partition = (-model.free_energy(rows)).logsumexp(0)
    (model.free_energy(data.flatten(1)).mean() + log_partition).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(rough[name], parameter.grad, atol=0.02, rtol=0)


def test_annealing_estimates_the_partition_function():
    model = machine(scale=1.0)
    estimate = model.annealed_log_partition(500, 300, generator=seeded())
    assert float(estimate) == pytest.approx(float(model.log_partition()), abs=0.05)
    with pytest.raises(ValueError, match="needs a side of at most 20 units, got 21 hidden and 30 visible"):
        RBM((1, 1, 30), 21).log_partition()


@pytest.mark.parametrize("chains", [None, 50])
def test_it_learns_which_pictures_there_are(chains):
    torch.manual_seed(0)
    data = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(25, 1).view(-1, 1, 1, 4)
    model = RBM((1, 1, 4), 4, steps=2, chains=chains)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    particles = model.particles.clone()
    for _ in range(300):
        optimizer.zero_grad()
        model.loss({"image": data})["loss"].backward()
        optimizer.step()
    share = float(model.log_prob(data[:2]).exp().sum())
    assert share > 0.8  # 2 of 16 pictures, 0.125 at first
    assert torch.equal(model.particles, particles) == (chains is None)
    assert model.features(data).shape == (50, 4)


def test_the_visible_bias_starts_at_the_mean_picture():
    model = RBM((1, 2, 2), 3)
    model.start_at(torch.tensor([[0.0, 0.5], [0.9, 1.0]]))
    torch.testing.assert_close(model.visible_bias.sigmoid(), torch.tensor([0.01, 0.5, 0.9, 0.99]))


def test_bad_input_is_named():
    model = RBM((1, 2, 2), 3)
    with pytest.raises(ValueError, match=r"images must be 0 or 1, got 0.5.* at index \(0, 0, 0, 0\)"):
        model.loss({"image": torch.full((2, 1, 2, 2), 0.5)})
    with pytest.raises(ValueError, match=r"the machine takes images \('B', 1, 2, 2\), got \(2, 1, 3, 2\)"):
        model.log_prob(torch.zeros(2, 1, 3, 2))
    with pytest.raises(ValueError, match="has no classes"):
        model.sample(2, cond=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="chains must be at least 1"):
        RBM(chains=0)
