"""Published checkpoints, here made by the rule of the recorded outputs, to runs and back."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from vision3dgen import cli
from vision3dgen.backbones import read_weights
from vision3dgen.convert import CONVERSIONS, convert, convert_back, write_published, write_run
from vision3dgen.experiment import Run, build_parts
from vision3dgen.heads.mesh import PUBLISHED_K
from vision3dgen.models import MODELS
from vision3dgen.structures import Pointclouds

NETWORKS = {
    "onet_image": "onet",
    "onet_pointcloud": "onet",
    "convonet_3plane": "convonet",
    "convonet_grid32": "convonet",
}
LATENT = {
    "name": "completion",
    "encoder": {"name": "voxel_code", "code_channels": 7, "resolution": 16},
    "head": {"name": "occupancy", "code_channels": None, "hidden": 8, "latent_channels": 5, "threshold": 0.2},
}
ROOMS = {
    "name": "completion",
    "encoder": {
        "name": "local_pool_pointnet", "layout": {"planes": ["xz", "xy", "yz", "grid"], "grid_resolution": 16},
        "hidden": 6, "code_channels": 6, "blocks": 3, "depth": 2, "levels": 2, "width": 8,
    },
    "head": {"name": "local_occupancy", "hidden": 6, "blocks": 3, "threshold": 0.2},
}  # fmt: skip
VOXELS = {
    "name": "completion",
    "encoder": {"name": "local_voxels", "layout": {"planes": ["xz", "xy", "yz"]}, "code_channels": 6, "depth": 2,
                "levels": 0, "width": 8},
    "head": {"name": "local_occupancy", "hidden": 6, "blocks": 5, "threshold": 0.2},
}  # fmt: skip
OWN = {"latent": ("onet", 2, LATENT), "rooms": ("convonet", 0, ROOMS), "local voxels": ("convonet", 1, VOXELS)}


def published_file(path, state):
    """As the authors save: the state beside counters and a NumPy number."""
    torch.save({"model": state, "epoch_it": 7, "loss_val_best": np.float64(0.5)}, path)
    return path


def same_bits(state, other):
    return state.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in state.items()
    )


@pytest.fixture
def make(shared_data, tmp_path):
    def make(name):
        return published_file(tmp_path / f"{name}.pt", filled(layout(shared_data, name)))

    return make


@pytest.mark.parametrize(
    ("name", "system", "head"),
    [
        ("meshrcnn_voxmesh", "meshrcnn", "voxmesh"),
        ("meshrcnn_sphereinit", "meshrcnn", "sphere_init"),
        ("meshrcnn_pixel2mesh", "pixel2mesh+", "sphere_init"),
    ],
)
def test_mesh_rcnn_converts_whole_and_back(shared_data, tmp_path, name, system, head):
    state = filled(layout(shared_data, name)) | {"K": torch.tensor(PUBLISHED_K)}
    conversion = convert(system, published_file(tmp_path / "theirs.pt", state))
    assert conversion.is_whole
    assert conversion.constants == ["K"]
    assert conversion.model["head"]["name"] == head
    assert len(conversion.mapped) == len(state) - 1
    run = write_run(conversion, tmp_path / "run")
    assert same_bits({k: v for k, v in run.model().state_dict().items() if k in conversion.state}, conversion.state)
    back = convert_back(system, tmp_path / "run")
    assert back.is_whole
    assert same_bits(back.state, state)
    wrong = convert(system, published_file(tmp_path / "wrong.pt", state | {"K": torch.eye(4)}))
    with pytest.raises(ValueError, match="1 unmapped"):  # another camera than the heads have
        write_run(wrong, tmp_path / "other")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_published_networks_convert_whole_and_compute_the_recorded_outputs(make, shared_data, name):
    conversion = convert(NETWORKS[name], make(name))
    assert conversion.is_whole
    assert len(conversion.mapped) == len(layout(shared_data, name))
    model = build_parts(conversion.model, MODELS, where="model")
    model.load_state_dict(conversion.state, strict=True)
    # oneDNN's 3D convolution in float32 is off by 2e-4 on some processors, in float64 by nothing
    model.double().eval()
    members = 1 if name == "convonet_grid32" else 2  # its volumes take seconds each
    reference = {
        key: values[:members]
        for key, values in np.load(shared_data / OUTPUTS / "forward.npz").items()
        if key.startswith(f"{name}/")
    }
    given = uniform(2, 3, 224, 224, seed=2).double() if name == "onet_image" else None
    if given is None:
        given = Pointclouds(torch.from_numpy(reference[f"{name}/pointcloud"]).double())
    with torch.no_grad():
        field = model(given)
        logits = field(torch.from_numpy(reference[f"{name}/points"]).double())
    theirs = reference[f"{name}/logits"]
    np.testing.assert_allclose(logits, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    if name.startswith("onet"):
        codes = reference[f"{name}/code"]
        np.testing.assert_allclose(field.conditions[0], codes, rtol=1e-4, atol=1e-4 * np.abs(codes).max())


@pytest.mark.parametrize("name", ["onet_pointcloud", "convonet_3plane"])
def test_there_and_back_keeps_every_bit(make, shared_data, tmp_path, capsys, name):
    path = make(name)
    system, run, back = NETWORKS[name], tmp_path / "run", tmp_path / "back.pt"
    assert cli.main(["convert", system, str(path), str(run)]) == 0
    text = capsys.readouterr().out
    assert all(f" {key} -> " in text for key in layout(shared_data, name))
    assert f"{len(layout(shared_data, name))} mapped, 0 constant, 0 unmapped, 0 missing, 0 mismatched" in text
    opened = Run.open(run)
    opened.experiment.check()
    assert opened.experiment.data["cloud"]["points"] == (300 if system == "onet" else 3000)
    folder = opened.checkpoint()
    assert same_bits(load_file(folder / "model.safetensors"), convert(system, path).state)
    assert opened.model().head.threshold == 0.2

    assert cli.main(["convert", system, str(run), str(back), "--back"]) == 0
    assert same_bits(torch.load(back, weights_only=True)["model"], filled(layout(shared_data, name)))
    assert cli.main(["convert", system, str(folder / "model.safetensors"), str(back), "--back"]) == 0
    assert cli.main(["convert", system, str(path), str(run)]) == 2
    assert "is a run folder already" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(OWN))
def test_networks_without_a_recorded_layout_go_there_and_back(tmp_path, name):
    system, index, section = OWN[name]
    model = build_parts(section, MODELS, where="model")
    ours = filled(shapes_of(model))
    published = CONVERSIONS[system][index]
    theirs = {published.theirs(key): tensor for key, tensor in ours.items()}
    assert None not in theirs
    assert len(theirs) == len(ours)
    conversion = convert(system, published_file(tmp_path / "x.pt", theirs))
    assert conversion.published is published
    assert conversion.is_whole, conversion.to_text()
    assert same_bits(conversion.state, ours)
    rebuilt = build_parts(conversion.model, MODELS, where="model")
    assert rebuilt.encoder.layout == model.encoder.layout
    run = write_run(conversion, tmp_path / "run")
    write_published(convert_back(system, run.folder), tmp_path / "back.pt")
    assert same_bits(torch.load(tmp_path / "back.pt", weights_only=True)["model"], theirs)


def test_prefixes_can_be_inverted_and_marks_tell_networks_apart():
    for networks in CONVERSIONS.values():
        for network in networks:
            assert len(set(network.prefixes.values())) == len(network.prefixes)
            for mark in network.marks:
                assert network.theirs(network.ours(mark)) == mark
        assert len({network.marks for network in networks}) == len(networks)


def test_constants_of_a_file_are_checked_and_restored(tmp_path, monkeypatch):
    network = CONVERSIONS["convonet"][1]
    fixed = type(network)(**{**vars(network), "constants": {"K": [[1.5, 0.0], [0.0, -1.0]]}})
    monkeypatch.setitem(CONVERSIONS, "convonet", (fixed,))
    model = build_parts(VOXELS, MODELS, where="model")
    theirs = {network.theirs(key): tensor for key, tensor in filled(shapes_of(model)).items()}
    theirs["K"] = torch.tensor([[1.5, 0], [0, -1]])
    conversion = convert("convonet", published_file(tmp_path / "x.pt", theirs))
    assert conversion.is_whole
    assert conversion.constants == ["K"]
    run = write_run(conversion, tmp_path / "run")
    write_published(convert_back("convonet", run.folder), tmp_path / "back.pt")
    assert same_bits(torch.load(tmp_path / "back.pt", weights_only=True)["model"], theirs)
    theirs["K"] = torch.tensor([[1.25, 0], [0, -1]])
    assert convert("convonet", published_file(tmp_path / "x.pt", theirs)).unmapped == ["K"]


def test_every_key_that_does_not_fit_is_listed_and_nothing_is_written(make, tmp_path, capsys):
    path = make("convonet_3plane")
    state = torch.load(path, weights_only=False)["model"]
    state["encoder.extra.weight"] = torch.zeros(3)
    state["surplus"] = torch.zeros(3)
    state["decoder.blocks.2.fc_0.weight"] = torch.zeros(32, 31)
    del state["decoder.fc_out.bias"]
    published_file(path, state)
    assert cli.main(["convert", "convonet", str(path), str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    for line in (
        "unmapped    encoder.extra.weight",
        "unmapped    surplus",
        "missing     head.decoder.fc_out.bias",
        "mismatched  decoder.blocks.2.fc_0.weight: (32, 31), expected (32, 32)",
        "97 mapped, 0 constant, 2 unmapped, 1 missing, 1 mismatched",
    ):
        assert line in captured.out
    assert "nothing is written" in captured.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="not written, the file does not fit"):
        write_run(convert("convonet", path), tmp_path / "run")


def test_counters_that_old_files_lack_are_zero(make, tmp_path):
    path = make("onet_pointcloud")
    state = {k: v for k, v in torch.load(path, weights_only=False)["model"].items() if "num_batches" not in k}
    conversion = convert("onet", published_file(path, state))
    assert conversion.is_whole
    model = write_run(conversion, tmp_path / "run").model()
    assert model.head.decoder.bn.bn.num_batches_tracked == 0


def test_numbers_of_an_older_numpy_are_read(make, shared_data, tmp_path):
    """Checkpoints of 2019 name a module that NumPy 2 has renamed."""
    with zipfile.ZipFile(make("onet_pointcloud")) as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                assert b"numpy.core.multiarray" in content
            old.writestr(name, content)
    state = read_weights(tmp_path / "old.pt")
    assert same_bits(state, filled(layout(shared_data, "onet_pointcloud")))


def test_other_networks_and_other_files_are_named(make, tmp_path, capsys):
    path = make("convonet_3plane")
    with pytest.raises(
        ValueError, match=r"not a network of 'onet'.*it looks like Convolutional .* \(system 'convonet'"
    ):
        convert("onet", path)
    torch.save({"model": {"layer.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"lacks what these have: .*decoder\.fc_c\.0\.weight.*begins with layer\.weight"
    ):
        convert("convonet", tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"unknown system 'onnet' \(did you mean 'onet'\?\); choose from"):
        convert("onnet", path)
    with pytest.raises(ValueError, match=r"not a network of 'onet'"):
        convert_back("onet", path)

    class Code:
        def __reduce__(self):
            return json.dumps, ([],)

    torch.save({"model": Code()}, tmp_path / "code.pt")
    assert cli.main(["convert", "onet", str(tmp_path / "code.pt"), str(tmp_path / "run")]) == 2
    assert "pickled objects" in capsys.readouterr().err
    state = torch.load(make("onet_pointcloud"), weights_only=False)["model"]
    del state["encoder.fc_c.weight"]
    with pytest.raises(ValueError, match=r"without 'encoder\.fc_c\.weight', which says how large it is"):
        convert("onet", published_file(tmp_path / "x.pt", state))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint"):
        convert_back("onet", tmp_path / "folder")
