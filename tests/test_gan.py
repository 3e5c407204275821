"""GANs: losses and penalties against numbers worked out by hand, networks, augmentation, and a ring of Gaussians."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from vision3dgen.engine import Data, Trainer, latest, load_weights
from vision3dgen.engine.optim import EMA, Optimizer
from vision3dgen.engine.settings import Record, Update
from vision3dgen.generators import (
    ADVERSARIAL_LOSSES,
    GAN,
    R1,
    DCGANDiscriminator,
    DCGANGenerator,
    DiffAugment,
    GradientPenalty,
    MLPDiscriminator,
    MLPGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    gradient_penalty,
    r1_penalty,
)
from vision3dgen.generators.diffaugment import random_color, random_cutout, random_translation
from vision3dgen.generators.gan_networks import pyramid


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------------- losses

S = math.log1p(math.exp(-2.0))  # softplus(-2)
T = math.log1p(math.exp(-1.0))  # softplus(-1)


@pytest.mark.parametrize(
    "name, discriminator, generator",
    [  # for logits 2 and -1 of real, 1 and -2 of generated samples
        ("minimax", (S + 1 + T) / 2 + (1 + T + S) / 2, -(1 + T + S) / 2),
        ("non_saturating", (S + 1 + T) / 2 + (1 + T + S) / 2, (T + 2 + S) / 2),
        ("least_squares", (0.5 + 2) / 2 + (0.5 + 2) / 2, (0 + 4.5) / 2),
        ("hinge", (0 + 2) / 2 + (2 + 0) / 2, 0.5),
        ("wasserstein", -0.5 - 0.5, 0.5),
    ],
)
def test_losses_are_their_formulas(name, discriminator, generator):
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([1.0, -2.0])
    game = ADVERSARIAL_LOSSES[name]
    assert float(game.discriminator(real, fake)) == pytest.approx(discriminator)
    assert float(game.generator(fake)) == pytest.approx(generator)


def test_only_the_minimax_generator_saturates():
    """Where the discriminator is sure, its gradient vanishes and the non-saturating one's does not."""
    slopes = {}
    for name, game in ADVERSARIAL_LOSSES.items():
        fake = torch.full((1,), -20.0, requires_grad=True)
        (slope,) = torch.autograd.grad(game.generator(fake), fake)
        slopes[name] = float(slope)
        assert slope < 0  # all of them push the logit up
    assert abs(slopes["minimax"]) < 1e-8
    assert min(abs(value) for name, value in slopes.items() if name != "minimax") > 0.99


def test_logistic_loss_is_finite_for_any_logit():
    real, fake = torch.tensor([-1e4], requires_grad=True), torch.tensor([1e4])
    loss = ADVERSARIAL_LOSSES["non_saturating"].discriminator(real, fake)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    assert float(real.grad) == -1


# ---------------------------------------------------------------------------------------------------- penalties


def test_penalties_of_a_linear_discriminator_are_known():
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)
    real, fake = rand(7, 2, dtype=torch.float64), rand(7, 2, seed=1, dtype=torch.float64)
    torch.testing.assert_close(r1_penalty(lambda x: x @ weight, real), torch.tensor(12.5, dtype=torch.float64))
    torch.testing.assert_close(
        gradient_penalty(lambda x: x @ weight, real, fake), torch.tensor(16.0, dtype=torch.float64)
    )


def test_the_gradient_penalty_looks_between_the_samples():
    """D(x) = |x|^2 / 2 has slope x: at a point between 3 and 5 the norm is between them."""
    seen = []

    def discriminate(x):
        seen.append(x.detach())
        return 0.5 * x.square().flatten(1).sum(1)

    real, fake = torch.full((400, 1), 5.0), torch.full((400, 1), 3.0)
    value = gradient_penalty(discriminate, real, fake, seeded())
    assert 3 <= seen[0].min() < 3.1
    assert 4.9 < seen[0].max() <= 5
    torch.testing.assert_close(value.detach(), (seen[0] - 1).square().mean())


@pytest.mark.parametrize("penalty", [r1_penalty, lambda d, x: gradient_penalty(d, x, x.flip(0), seeded())])
def test_penalties_are_differentiable_in_the_discriminator(penalty):
    x = rand(3, 1, 4, 4, dtype=torch.float64)

    def value(weight, bias):
        return penalty(lambda s: (s.flatten(1) @ weight + bias).tanh().sum(1), x)

    weight, bias = rand(16, 3, seed=1, dtype=torch.float64), rand(3, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(value, (weight.requires_grad_(), bias.requires_grad_()))


def test_a_penalty_passes_through_attention():
    network = ResNetDiscriminator(1, 16, 8, attention=8, spectral=False)
    nn.init.ones_(network.layers[1].gamma)
    penalty = gradient_penalty(network, rand(2, 1, 16, 16), rand(2, 1, 16, 16, seed=1))
    penalty.backward()
    assert network.layers[1].query.weight.grad.abs().sum() > 0


def mlp_gan(**options):
    torch.manual_seed(0)
    return GAN(MLPGenerator(3, (2,), (8,)), MLPDiscriminator((2,), (8,)), **options)


def test_a_lazy_penalty_counts_as_often_as_it_would_have():
    model, batch = mlp_gan(penalty=R1(0.5, every=3)), {"image": rand(6, 2)}
    plain, computed = GAN(model.generator, model.discriminator), []
    for number in range(7):
        losses = []
        for each in (model, plain):
            torch.manual_seed(number)
            losses.append(each.loss(batch, part="discriminator"))
        computed.append("penalty" in losses[0])
        expected = losses[1]["loss"]
        if computed[-1]:
            own = r1_penalty(model.discriminator, 2 * batch["image"] - 1)
            torch.testing.assert_close(losses[0]["penalty"], own)
            expected = expected + 0.5 * 3 * own
        torch.testing.assert_close(losses[0]["loss"], expected)
    assert computed == [True, False, False, True, False, False, True]


def test_a_penalty_beside_batch_normalization_is_refused():
    with pytest.raises(ValueError, match="needs a discriminator without batch normalization"):
        GAN(DCGANGenerator(), DCGANDiscriminator(), penalty=GradientPenalty())
    GAN(DCGANGenerator(), DCGANDiscriminator(norm="layer"), penalty=GradientPenalty())
    with pytest.raises(ValueError, match="weight must be > 0 and every at least 1"):
        R1(0.0)


# ----------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size, start, doublings", [(28, 7, 2), (32, 4, 3), (64, 4, 4), (48, 6, 3), (8, 4, 1)])
def test_sides_are_reached_by_doubling(size, start, doublings):
    assert pyramid(size) == (start, doublings)


def test_a_side_that_cannot_be_reached_is_named():
    for size in (7, 33, 9):
        with pytest.raises(ValueError, match=f"size must be 4, 5, 6 or 7 times a power of two, at least 8, got {size}"):
            pyramid(size)
    with pytest.raises(ValueError, match=r"unknown attention 5; choose from \[14, 28\]"):
        ResNetGenerator(8, 1, 28, 8, attention=5)


NETWORKS = {
    "dcgan": lambda classes: (
        DCGANGenerator(5, 1, 28, 4, classes=classes),
        DCGANDiscriminator(1, 28, 4, classes=classes),
    ),
    "dcgan_projection": lambda classes: (
        DCGANGenerator(5, 3, 16, 4, classes=classes, conditioning="batch_norm"),
        DCGANDiscriminator(3, 16, 4, norm="none", spectral=True, classes=classes, conditioning="projection"),
    ),
    "sngan": lambda classes: (
        ResNetGenerator(5, 1, 28, 8, classes=classes),
        ResNetDiscriminator(1, 28, 8, classes=classes),
    ),
    "sagan": lambda classes: (
        ResNetGenerator(5, 3, 16, 8, attention=16, spectral=True, classes=classes),
        ResNetDiscriminator(3, 16, 8, attention=8, classes=classes),
    ),
    "resnet_concatenation": lambda classes: (
        ResNetGenerator(5, 1, 8, 8, classes=classes, conditioning="concatenation"),
        ResNetDiscriminator(1, 8, 8, norm="layer", spectral=False, classes=classes, conditioning="concatenation"),
    ),
    "mlp": lambda classes: (
        MLPGenerator(5, (1, 8, 8), (8,), classes=classes),
        MLPDiscriminator((1, 8, 8), (8,), classes=classes),
    ),
}


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_pair_of_networks_trains_every_parameter(name, classes):
    torch.manual_seed(0)
    generator, discriminator = NETWORKS[name](classes)
    model = GAN(generator, discriminator, loss="hinge")
    labels = None if classes is None else torch.tensor([0, 2, 1, 0])
    shape = model.sample(4, cond=labels).shape
    batch = {"image": rand(*shape), "label": torch.tensor([0, 2, 1, 0])}
    for part in model.parts:
        model.zero_grad()
        model.loss(batch, part=part)["loss"].backward()
        lonely = [
            key for key, parameter in getattr(model, part).named_parameters()
            if parameter.grad is None and "attention" not in key
        ]  # fmt: skip
        assert lonely == []
    samples = model.eval().sample(4, cond=labels, generator=seeded())
    assert torch.equal(samples, model.sample(4, cond=labels, generator=seeded()))
    assert 0 <= samples.min() < samples.max() <= 1
    if classes is not None:
        trained = model.discriminator
        assert not torch.equal(trained(samples, labels), trained(samples, (labels + 1) % 3))


def test_spectral_norm_bounds_the_discriminator():
    torch.manual_seed(0)
    network = DCGANDiscriminator(1, 16, 4, norm="none", spectral=True)
    for _ in range(50):
        network(rand(2, 1, 16, 16))
    network.eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


def test_the_projection_is_an_inner_product_with_the_class():
    torch.manual_seed(0)
    network = ResNetDiscriminator(1, 8, 6, spectral=False, classes=3).eval()
    x, features = rand(2, 1, 8, 8), []
    network.layers.register_forward_hook(lambda module, inputs, output: features.append(output.relu().sum((2, 3))))
    difference = network(x, torch.tensor([1, 1])) - network(x, torch.tensor([0, 0]))
    table = network.embedding.weight
    torch.testing.assert_close(difference, features[0] @ (table[1] - table[0]))


# ------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_is_seeded_and_differentiable():
    images = rand(3, 3, 6, 8, dtype=torch.float64).requires_grad_()
    augment = DiffAugment()
    assert torch.equal(augment(images, seeded()), augment(images, seeded()))
    assert not torch.equal(augment(images, seeded()), augment(images, seeded(1)))
    assert torch.autograd.gradcheck(lambda x: augment(x, seeded()), images)
    with pytest.raises(ValueError, match=r"unknown policy 'colour'.*did you mean 'color'"):
        DiffAugment(["colour"])


def test_translation_moves_whole_pictures_and_brings_in_zeros():
    images = rand(64, 1, 16, 24) + 1
    moved = random_translation(images, seeded())
    shifts = set()
    for image, result in zip(images, moved):
        matches = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-3, 4)
            if torch.equal(nn.functional.pad(image, (3 + dx, 3 - dx, 2 + dy, 2 - dy))[:, 2:-2, 3:-3], result)
        ]
        assert len(matches) == 1
        shifts.update(matches)
    assert {dy for dy, _ in shifts} == set(range(-2, 3))
    assert {dx for _, dx in shifts} == set(range(-3, 4))


def test_cutout_removes_half_the_sides_where_it_lies_inside():
    gone = (random_cutout(torch.ones(500, 2, 8, 12), seeded()) == 0)[:, 0]
    counts = gone.flatten(1).sum(1)
    assert counts.max() == 4 * 6
    assert counts.min() >= 2 * 3
    assert torch.equal(gone.any(2).sum(1) * gone.any(1).sum(1), counts)  # rectangles


def test_color_changes_are_the_three_in_turn():
    grey = torch.full((2000, 3, 4, 4), 0.2)
    changed = random_color(grey, seeded())
    assert float(changed.std((1, 2, 3)).max()) < 1e-6  # grey stays flat and grey: only brightness is left
    assert -0.3 <= changed.min() < -0.29
    assert 0.69 < changed.max() <= 0.7
    red = torch.zeros(2000, 3, 4, 4)
    red[:, 0] = 1
    spread = random_color(red, seeded()).amax((1, 2, 3)) - random_color(red, seeded()).amin((1, 2, 3))
    assert spread.min() < 0.05
    assert 2.8 < spread.max() <= 3  # saturation of 2 times contrast of 1.5


def test_both_losses_see_augmented_samples():
    model = mlp_gan()
    plain = model.loss({"image": rand(6, 2)}, part="discriminator")
    model.augment = lambda samples: samples * 0
    for part in ("discriminator", "generator"):
        terms = model.loss({"image": rand(6, 2)}, part=part)
        zero = model.discriminator(torch.zeros(1, 2))
        torch.testing.assert_close(terms["fake"], zero[0])
    assert not torch.equal(plain["real"], zero[0])


# ----------------------------------------------------------------------------------------------- the GAN itself


def test_parts_follow_the_number_of_discriminator_steps():
    assert mlp_gan().parts == ("discriminator", "generator")
    model = mlp_gan(discriminator_steps=5)
    assert model.parts == ("discriminator",) * 5 + ("generator",)
    seen = []
    model.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = rand(20, 2)
    for part in model.parts:
        model.loss({"image": image}, part=part)
    assert all(len(samples) == 4 for samples in seen)
    assert not torch.equal(seen[0], seen[2])  # each step has its own real samples
    assert all(any(torch.equal(row, 2 * other - 1) for other in image) for row in seen[0])
    with pytest.raises(ValueError, match="a batch of 3 cannot be divided by 5"):
        model.loss({"image": rand(3, 2)}, part="discriminator")


def test_the_generator_is_not_asked_for_gradients_by_the_discriminator():
    model = mlp_gan()
    model.loss({"image": rand(6, 2)}, part="discriminator")["loss"].backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())


@pytest.mark.parametrize(
    "make, batch, message",
    [
        (mlp_gan, {"image": torch.full((4, 2), 1.5)}, r"images must be in \[0, 1\], got 1.5"),
        (mlp_gan, {"image": torch.full((4, 2), math.nan)}, "images must be finite, got nan"),
        (mlp_gan, {"image": torch.zeros(4, 3)}, r"the generator makes \(2,\), batch\['image'\] has \(3,\)"),
        (
            lambda: GAN(DCGANGenerator(width=2), DCGANDiscriminator(width=2)),
            {"image": torch.zeros(1, 1, 28, 28)},
            "batch normalization needs a batch of two or more in training, got one sample",
        ),
        (
            lambda: GAN(MLPGenerator(3, (2,), classes=2), MLPDiscriminator((2,), classes=2)),
            {"image": torch.zeros(2, 2), "label": torch.tensor([0, 2])},
            "labels must be 0 to 1, got 2 at 1",
        ),
    ],
)
def test_batches_that_cannot_be_trained_on_are_named(make, batch, message):
    with pytest.raises(ValueError, match=message):
        make().loss(batch, part="discriminator")


def test_names_and_classes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"unknown loss 'hing'.*did you mean 'hinge'"):
        mlp_gan(loss="hing")
    with pytest.raises(ValueError, match="unknown part 'model'"):
        mlp_gan().loss({"image": rand(2, 2)}, part="model")
    with pytest.raises(ValueError, match="must have the same classes, got 2 and None"):
        GAN(MLPGenerator(classes=2), MLPDiscriminator())
    with pytest.raises(ValueError, match="labels were given"):
        mlp_gan().sample(2, cond=torch.tensor([0, 1]))


def test_interpolation_stays_on_the_shell_and_meets_its_ends():
    model = mlp_gan().eval()
    first, second = torch.randn(4, 3, generator=seeded()), torch.randn(4, 3, generator=seeded(1))
    first, second = (3 * z / z.norm(dim=1, keepdim=True) for z in (first, second))
    seen = []
    model.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    line = model.interpolate(first, second, 7)
    assert line.shape == (4, 7, 2)
    for z in seen:
        torch.testing.assert_close(z.norm(dim=1), torch.full((4,), 3.0))
    torch.testing.assert_close(seen[0], first)
    torch.testing.assert_close(seen[-1], second)
    steps = [(b - a).norm(dim=1) for a, b in pairwise(seen)]
    torch.testing.assert_close(steps[0], steps[3])


class Ring(torch.utils.data.Dataset):
    """Eight narrow Gaussians on a circle, in [0, 1]."""

    def __init__(self, count):
        angle = torch.arange(count) % 8 * (math.pi / 4)
        noise = 0.01 * torch.randn(count, 2, generator=seeded())
        self.points = (0.5 + 0.35 * torch.stack((angle.cos(), angle.sin()), 1) + noise).clamp(0, 1)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return {"image": self.points[index]}


def test_the_one_trainer_trains_both_parts(tmp_path):
    model = mlp_gan(penalty=R1(0.1, every=2), discriminator_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer("adam", lr=1e-3, parts={"discriminator": {"lr": 2e-3}})
    trainer = Trainer(model, Data(Ring(16), 8), tmp_path, optimizer=optimizer, steps=3, update=Update(ema=0.9))
    trainer.fit()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert int(model.updates) == 6
    assert trainer.lrs == {"discriminator": 2e-3, "generator": 1e-3}
    logged = {name for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {"discriminator/loss", "discriminator/real", "discriminator/penalty", "generator/fake"} <= logged


def test_a_step_that_is_not_finite_stops_and_the_last_checkpoint_is_good(tmp_path):
    model = mlp_gan()
    trainer = Trainer(
        model, Data(Ring(16), 8), tmp_path, optimizer=Optimizer("adam", lr=1e-3), steps=9, update=Update(ema=0.9),
        record=Record(checkpoint_every=2),
    )  # fmt: skip
    made, calls = model.generator.forward, []

    def breaks(z, labels=None):
        calls.append(len(z))
        return made(z, labels) * (math.nan if len(calls) == 10 else 1)  # the generator's own loss of step 5

    model.generator.forward = breaks
    with pytest.raises(
        FloatingPointError, match=r"step 5, part 'generator': loss 'fake' is nan; the update was not made"
    ):
        trainer.fit()
    last = latest(tmp_path)
    assert last.name == "step_00000004"
    other = mlp_gan()
    load_weights(other, last)
    assert all(torch.isfinite(parameter).all() for parameter in other.parameters())


@pytest.mark.slow
def test_a_gan_finds_all_modes_of_a_ring():
    """With the averaged generator, every mode gets samples, and most samples are near one."""
    torch.manual_seed(0)
    model = GAN(MLPGenerator(8, (2,), (64, 64)), MLPDiscriminator((2,), (64, 64)), penalty=R1(0.01, every=1))
    points, average = Ring(4096).points, EMA(model, 0.99)
    optimizers = {
        part: torch.optim.Adam(model.get_submodule(part).parameters(), 2e-3, betas=(0.0, 0.99)) for part in model.parts
    }
    for _ in range(900):
        batch = {"image": points[torch.randint(len(points), (256,))]}
        for part in model.parts:
            optimizers[part].zero_grad()
            model.loss(batch, part=part)["loss"].backward()
            optimizers[part].step()
        average.update(model)
    samples = average.module.sample(2000, generator=seeded())
    angle = torch.arange(8) * (math.pi / 4)
    centers = 0.5 + 0.35 * torch.stack((angle.cos(), angle.sin()), 1)
    near = torch.cdist(samples, centers) < 0.05
    assert float(near.any(1).float().mean()) > 0.6
    assert near.float().mean(0).min() > 0.03  # an eighth each would be 0.125
