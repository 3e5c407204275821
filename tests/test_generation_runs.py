"""Latent and adversarial generators from their configurations: trained, kept, and scored by a classifier's features."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from tests.test_docs import python_blocks
from vision3dgen import cli
from vision3dgen.config import ConfigError, construct, load
from vision3dgen.experiment import Experiment, Run, extractor
from vision3dgen.generators import GAN, VAE, Gaussian

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("vae", "cvae", "betavae", "vqvae", "rbm", "dcgan", "cgan")


def run_tiny(name, shared_data, out, *overrides):
    root = f"data.root={shared_data / 'mnist'}"
    arguments = ["train", str(CONFIGS / f"{name}.yaml"), "--preset", "tiny", "--out", str(out), root, *overrides]
    assert cli.main(arguments) == 0
    return Run.open(out)


@pytest.fixture(scope="module")
def lenet(shared_data, tmp_path_factory):
    return run_tiny("recognition_lenet_mnist", shared_data, tmp_path_factory.mktemp("lenet") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_configurations_train_and_come_back(name, lenet, shared_data, tmp_path, capsys, monkeypatch):
    run = run_tiny(f"generation_{name}_mnist", shared_data, tmp_path / "run", f"evaluation.extractor={lenet.folder}")
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert any(key.endswith("loss") for key in last)
    model = run.model()
    if name == "vqvae":
        assert model.codes(run.experiment.dataset("test")[0]["image"][None]).shape == (1, 7, 7)
        return
    cond = torch.tensor([0, 9]) if getattr(model, "classes", None) else None
    assert model.sample(2, cond=cond).shape == (2, 1, 28, 28)
    if name not in ("cvae", "cgan"):
        return
    capsys.readouterr()
    assert cli.main(["evaluate", str(run.folder), "--device", "cpu"]) == 0
    assert "200 real and 200 generated samples, 120 features" in capsys.readouterr().out
    summary = json.loads((run.folder / "evaluation" / "generation_test.json").read_text())
    assert summary["about"] == {"weights": run.weights(), "extractor": lenet.weights()}
    assert summary["fid"] > 0
    assert len((run.folder / "evaluation" / "generation_test.jsonl").read_text().splitlines()) == 201
    script = runpy.run_path(str(CONFIGS.parent / "benchmarks" / "latent.py"))
    command = ["latent.py", str(run.folder), "--out", str(tmp_path / "out"), "--draws", "2", "--pictures", "3"]
    monkeypatch.setattr("sys.argv", command)
    assert script["main"]() == 0
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| training pictures (floor)", "| run"]
    drawn = {"samples", "interpolation", *(["reconstructions", "traversal"] if name == "cvae" else [])}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"run_{each}.png" for each in drawn}


@pytest.mark.slow
def test_features_come_from_classifiers_only(lenet, shared_data, tmp_path):
    extract = extractor(lenet, "cpu")
    found = extract(torch.rand(3, 1, 28, 28))
    assert found.features.shape == (3, 120)
    assert found.logits.shape == (3, 10)
    other = run_tiny("recognition_softmax_mnist", shared_data, tmp_path / "run")
    with pytest.raises(ConfigError, match="features come from a run whose model is a classifier"):
        extractor(other, "cpu")


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("vae", "model.encoder.hiden=[3]", r"unknown key of 'mlp' \(did you mean 'hidden'\?\)"),
        ("vae", "model.decoder.name=lstm", r"unknown name 'lstm'.*choose from \['convolutional', 'mlp'\]"),
        ("vae", "model.likelihood.name=bernouli", "did you mean 'bernoulli'"),
        ("cvae", "model.classes=9", "the encoder must have conditions=9, it has 10"),
        ("dcgan", "model.loss=hing", "did you mean 'hinge'"),
        ("dcgan", "model.penalty={name: r1, gamma: 1}", "unknown key of 'r1'"),
        ("dcgan", "model.penalty={name: r1}", "needs a discriminator without batch normalization"),
        ("dcgan", "evaluation.nearest=0", "nearest, kid_subsets and splits must be at least 1"),
    ],
)
def test_faults_in_the_parts_of_a_generator_are_named(tmp_path, name, override, message):
    with pytest.raises(ConfigError, match=message):
        Run.create(tmp_path / "run", load(CONFIGS / f"generation_{name}_mnist.yaml", [override]))
    assert not (tmp_path / "run").exists()


def test_the_parts_of_a_configuration_become_objects():
    config = load(CONFIGS / "generation_wgangp_cifar10.yaml", ["model.augment={policies: [color]}"], preset="tiny")
    model = construct(Experiment, config).build_model()
    assert isinstance(model, GAN)
    assert type(model.penalty).__name__ == "GradientPenalty"
    assert model.augment.policies == ("color",)
    assert model.parts.count("discriminator") == 5
    vae = construct(Experiment, load(CONFIGS / "generation_cvae_mnist.yaml", ["model.likelihood={name: gaussian}"]))
    assert isinstance(vae.build_model(), VAE)
    assert isinstance(vae.build_model().likelihood, Gaussian)
    assert vae.build_model().latents == 4


@pytest.mark.parametrize("page", ["latent", "adversarial"])
def test_the_examples_of_the_pages_run(page, capsys):
    blocks = python_blocks(CONFIGS.parent / "docs" / f"{page}.md")
    assert blocks
    for block in blocks:
        exec(block, {})
