"""Generators on the codes of autoencoders that were trained before: what they train, leave alone, and make."""

import json
from pathlib import Path

import pytest
import torch

from vision3dgen import cli
from vision3dgen.experiment import Run
from vision3dgen.generators import (
    VQVAE,
    CodePrior,
    GatedPixelCNN,
    Gaussian,
    GradientPenalty,
    LatentGAN,
    MLPDiscriminator,
    MLPGenerator,
    PointVAE,
    ResidualDecoder,
    ResidualEncoder,
)
from vision3dgen.structures import Pointclouds

CONFIGS = Path(__file__).parents[1] / "configs"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def code_prior(classes=None):
    torch.manual_seed(0)
    encoder = ResidualEncoder(width=4, halvings=2, blocks=1, block_width=4)
    decoder = ResidualDecoder(inputs=3, width=4, doublings=2, blocks=1, block_width=4)
    vqvae = VQVAE(encoder, decoder, Gaussian(scale=0.1), count=5)
    vqvae.train().loss({"image": torch.rand(4, 1, 12, 8, generator=seeded(1))})  # which places the codes
    prior = GatedPixelCNN((1, 3, 2), 5, channels=4, layers=1, head_channels=4, embedding=3, classes=classes)
    return CodePrior(vqvae, prior)


def test_a_prior_of_codes_is_that_of_the_code_maps():
    model = code_prior(classes=2)
    batch = {"image": torch.rand(4, 1, 12, 8, generator=seeded()), "label": torch.tensor([0, 1, 1, 0])}
    codes = model.vqvae.codes(batch["image"])
    assert codes.shape == (4, 3, 2)
    assert len(codes.unique()) > 1
    expected = model.prior.log_prob(codes[:, None].float() / 4, batch["label"])
    terms = model.loss(batch)
    torch.testing.assert_close(terms["nats"], -expected.mean())
    torch.testing.assert_close(model.validation_metrics(batch)["nats"], -expected)
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in model.vqvae.parameters())
    assert all(parameter.grad is not None for parameter in model.prior.parameters())
    before = model.vqvae.quantizer.codebook.clone()
    model.train().loss(batch)
    assert torch.equal(before, model.vqvae.quantizer.codebook)  # which it would follow in training mode
    assert not model.vqvae.training
    drawn = model.sample(3, cond=torch.tensor([0, 1, 1]), generator=seeded())
    maps = model.prior.sample(3, cond=torch.tensor([0, 1, 1]), generator=seeded())
    assert torch.equal(drawn, model.vqvae.decode((maps[:, 0] * 4).round().long()).clamp(0, 1))
    assert drawn.shape == (3, 1, 12, 8)


def test_a_prior_of_other_codes_is_refused():
    model = code_prior()
    for shape, levels in (((1, 3, 2), 4), ((3, 3, 2), 5)):
        with pytest.raises(ValueError, match=r"maps of 1 channel and 5 levels, the VQ-VAE's codes, got"):
            CodePrior(model.vqvae, GatedPixelCNN(shape, levels, channels=3, head_channels=3))


def latent_gan(**options):
    torch.manual_seed(0)
    networks = MLPGenerator(4, (3,), (8,), bounded=False), MLPDiscriminator((3,), (8,))
    return LatentGAN(PointVAE(3, 16, widths=(8,), hidden=(8,)), *networks, penalty=GradientPenalty(10.0), **options)


def test_a_gan_on_codes_sees_the_codes_of_clouds():
    model = latent_gan(discriminator_steps=1)
    clouds = torch.randn(6, 16, 3, generator=seeded())
    seen = []
    model.discriminator.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    for part in model.parts:
        model.zero_grad()
        model.train().loss({"surface": Pointclouds(clouds)}, part)["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.get_submodule(part).parameters())
    assert all(parameter.grad is None for parameter in model.autoencoder.parameters())
    assert not model.autoencoder.training  # whose batch norms would follow the clouds
    torch.testing.assert_close(seen[0], model.autoencoder.encode(clouds).mean)
    samples = model.eval().sample(2, generator=seeded())
    z = torch.randn(2, 4, generator=seeded())
    torch.testing.assert_close(samples, model.autoencoder.decode(model.generator(z)))
    shares = latent_gan(discriminator_steps=3)
    seen.clear()
    shares.discriminator.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    shares.train().loss({"surface": clouds}, "discriminator")
    assert len(seen[0]) == 2  # a random third of the batch


SHAPES = ("point_vae", "occupancy_vae", "voxel_gan", "latent_gan")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_generators_of_shapes_train_and_are_scored(name, tmp_path, monkeypatch, capsys):
    """From the configuration: data made, trained, samples drawn and compared with the split's."""
    monkeypatch.chdir(tmp_path)
    runs = ["point_vae", name] if name == "latent_gan" else [name]
    for each in runs:
        own = ["weights.autoencoder.source=runs/point_vae"] if each == "latent_gan" else []
        config = str(CONFIGS / f"generation_{each}_chairs.yaml")
        assert cli.main(["train", config, "--preset", "tiny", "--out", f"runs/{each}", *own]) == 0
    if name == "latent_gan":
        first, second = (Run.open(tmp_path / "runs" / each).model() for each in runs)
        torch.testing.assert_close(second.autoencoder.state_dict(), first.state_dict())
    assert cli.main(["sample", f"runs/{name}", "--n", "2", "--out", "samples"]) == 0
    if name == "point_vae":
        assert cli.main(["evaluate", f"runs/{name}", "--device", "cpu"]) == 0
        assert "| earth_movers |" in capsys.readouterr().out
        kept = json.loads((tmp_path / "runs" / name / "evaluation" / "generated_shapes_test.json").read_text())
        assert kept["total"] >= 1
        assert 0 <= kept["by_distance"]["chamfer"]["one_nna"] <= 1


@pytest.mark.slow
def test_a_prior_takes_the_codes_of_a_run(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = f"data.root={shared_data / 'mnist'}"
    for name, own in (("vqvae", []), ("code_prior", ["weights.vqvae.source=runs/vqvae"])):
        config = str(CONFIGS / f"generation_{name}_mnist.yaml")
        assert cli.main(["train", config, "--preset", "tiny", "--out", f"runs/{name}", root, *own]) == 0
    first, second = (Run.open(tmp_path / "runs" / name).model() for name in ("vqvae", "code_prior"))
    torch.testing.assert_close(second.vqvae.state_dict(), first.state_dict())
    assert second.sample(2, cond=torch.tensor([1, 7])).shape == (2, 1, 28, 28)
