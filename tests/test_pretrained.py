"""Models shared as folders: the round trip of every configuration, cards, and files from strangers."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vision3dgen import cli, engine
from vision3dgen.config import Config, ConfigError, load, variants
from vision3dgen.experiment import Run
from vision3dgen.pretrained import from_pretrained, open_pretrained, push_to_hub, save_pretrained

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
LENET = next(path for path in CONFIGS if path.stem == "recognition_lenet_mnist")


def untrained(folder: Path, config: Config) -> Run:
    """A run whose only checkpoint holds the weights it would start from, moved a little."""
    run = Run.create(folder, config)
    model = run.experiment.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    engine.checkpoint.save(folder, 3, model, {})
    return run


def each_run(path: Path) -> list[Config]:
    """The runs of a configuration; of a product of heads and backbones those with a part that is in none before."""
    config = load(path, preset="tiny")
    if "runs" not in config:
        return [config]
    seen: set[str] = set()
    runs = []
    for run in variants(config).values():
        parts = {f"{key}: {value}" for key, value in run["model"].items()}
        if not parts <= seen:
            runs.append(run)
        seen |= parts
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_model_and_generator_comes_back(path, tmp_path):
    for number, config in enumerate(each_run(path)):
        run = untrained(tmp_path / f"run{number}", config)
        folder = save_pretrained(run, tmp_path / f"shared{number}")
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
        one, other = run.model(), from_pretrained(folder)
        assert type(one) is type(other)
        assert not other.training
        state = other.state_dict()
        for name, value in one.state_dict().items():
            assert torch.equal(value, state[name]), name
        shutil.rmtree(run.folder)
        shutil.rmtree(folder)


@pytest.fixture
def lenet(tmp_path) -> Run:
    run = untrained(tmp_path / "lenet", load(LENET, preset="tiny"))
    (run.folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "command": ["train", "a|b"]}))
    scores = {
        "accuracy": 0.75, "class_mean": 0.5, "n_failed": 2, "seed": 5, "about": {"weights": "x"},
    }  # fmt: skip
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / "classes_test.json").write_text(json.dumps(scores))
    return run


def test_the_card_says_what_scores_rest_on(lenet, tmp_path):
    folder = save_pretrained(lenet, tmp_path / "shared", title="LeNet of a test", license="cc-by-4.0")
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: vision3dgen\n")
    for part in (
        "license: cc-by-4.0", "# LeNet of a test", "| accuracy | 0.7500 |", "seed 5; n_failed 2", "train a\\|b",
        '"name": "classes"', f"SHA-256 `{lenet.weights()}`", "3 steps",
    ):  # fmt: skip
        assert part in text
    parameters = sum(p.numel() for p in lenet.model().parameters())
    assert f"{parameters:,} parameters" in text


def test_a_shared_folder_is_a_run_to_the_other_commands(lenet, tmp_path, capsys):
    assert cli.main(["share", str(lenet.folder), str(tmp_path / "shared")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "shared")
    opened = open_pretrained(tmp_path / "shared")
    assert opened.weights() == lenet.weights()
    again = save_pretrained(opened, tmp_path / "again")  # and can be shared further
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "shared" / "model.safetensors").read_bytes()
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(from_pretrained(again)(images), lenet.model()(images))


def test_first_weights_may_come_from_a_shared_folder(lenet, tmp_path):
    from vision3dgen.experiment import Weights

    folder = save_pretrained(lenet, tmp_path / "shared")
    model = lenet.experiment.build_model()
    Weights(folder).load(model, "")
    for name, value in lenet.model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_faults_are_named(lenet, tmp_path, monkeypatch):
    folder = save_pretrained(lenet, tmp_path / "shared")
    with pytest.raises(ConfigError, match="is a run folder"):
        save_pretrained(lenet, lenet.folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds \['notes.txt'\]"):
        save_pretrained(lenet, folder)
    with pytest.raises(ConfigError, match="neither a folder nor an id"):
        from_pretrained(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"vision3dgen\[hub\]"):
        from_pretrained("owner/name")
    with pytest.raises(ConfigError, match="owner/name"):
        push_to_hub(folder, "name")
    (folder / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"has no README\.md"):
        push_to_hub(folder, "owner/name")
    bare = Run.create(tmp_path / "bare", load(LENET, preset="tiny"))
    with pytest.raises(ConfigError, match="no checkpoint"):
        save_pretrained(bare, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('pickled code ran')",)


def test_a_pickle_is_never_loaded(lenet, tmp_path):
    folder = save_pretrained(lenet, tmp_path / "shared")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        from_pretrained(folder)
    torch.save({"fc.weight": Evil()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        from_pretrained(folder)


def test_a_configuration_cannot_name_code(lenet, tmp_path):
    folder = save_pretrained(lenet, tmp_path / "shared")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text + "evil: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="python/object"):
        from_pretrained(folder)
    (folder / "config.yaml").write_text(text.replace("name: classifier", "name: os.system"))
    with pytest.raises(ConfigError, match=r"unknown name 'os\.system'"):
        from_pretrained(folder)


def test_weights_of_another_model_are_refused(lenet, tmp_path):
    folder = save_pretrained(lenet, tmp_path / "shared")
    from safetensors.torch import save_model

    save_model(nn.Linear(2, 3), str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match="is not of this model"):
        from_pretrained(folder)


def test_the_hub_is_asked_for_three_files_and_given_three(lenet, tmp_path, monkeypatch):
    folder = save_pretrained(lenet, tmp_path / "shared")
    calls = []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision, tuple(allow_patterns)))
        return str(folder)

    class HfApi:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return f"hub/{name}"

        def upload_folder(self, folder_path, repo_id, allow_patterns):
            calls.append((folder_path, repo_id, tuple(allow_patterns)))

    fake = SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    files = ("config.yaml", "model.safetensors", "README.md")
    assert isinstance(from_pretrained("owner/name", revision="v1"), nn.Module)
    assert push_to_hub(folder, "owner/name") == "hub/owner/name"
    assert calls == [("owner/name", "v1", files), ("owner/name", True, True), (str(folder), "owner/name", files)]
