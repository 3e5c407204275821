import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vision3dgen.backbones import load_weights, read_weights, resnet18, resnet20, resnet50
from vision3dgen.layers import freeze_batch_norm


def small(**settings):
    return resnet20(widths=(4, 6, 8), **settings)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    network = small(num_classes=5)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 3)
    return network


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def nested(key):
    return lambda state, path: torch.save({key: state, "epoch": 3, "optimizer": {"lr": 0.1}}, path)


WRITERS = {
    "safetensors": save_file,
    "torch": torch.save,
    "torch before 1.6": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "under model": nested("model"),
    "under state_dict": nested("state_dict"),
    "DataParallel": lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, path),
    "both": lambda state, path: nested("state_dict")({f"module.{key}": v for key, v in state.items()}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_kind_of_file_gives_the_same_weights(trained, tmp_path, writer):
    path = tmp_path / "weights.bin"  # told apart by content, not by name
    WRITERS[writer](trained.state_dict(), path)
    network = small(num_classes=5)
    report = load_weights(network, path)
    assert same(network.state_dict(), trained.state_dict())
    assert report.loaded == list(network.state_dict())
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})


def test_what_does_not_fit_is_named_with_both_shapes_and_nothing_is_loaded(trained, tmp_path):
    state = dict(trained.state_dict())
    del state["layer2.0.conv1.weight"]
    state["extra.bias"] = torch.zeros(2)
    state["conv1.weight"] = torch.zeros(4, 1, 3, 3)
    save_file(state, tmp_path / "odd.safetensors")
    network = small(num_classes=7)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(network, tmp_path / "odd.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'odd.safetensors'}: not the weights of this ResNet; "
        "1 missing in the file: layer2.0.conv1.weight; 1 unexpected: extra.bias; 3 of another shape: "
        "conv1.weight (4, 1, 3, 3) for (4, 3, 3, 3), fc.weight (5, 8) for (7, 8), fc.bias (5,) for (7,)"
    )
    assert same(network.state_dict(), before)
    report = load_weights(network, tmp_path / "odd.safetensors", strict=False)
    assert report.missing == ["layer2.0.conv1.weight"]
    assert report.unexpected == ["extra.bias"]
    assert report.mismatched["fc.weight"] == ((5, 8), (7, 8))
    assert len(report.loaded) == len(before) - 4
    after = network.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], state[key] if key in report.loaded else value)


def test_weights_of_another_architecture_are_refused_however_lenient(tmp_path):
    torch.save({"encoder.weight": torch.zeros(1), "decoder.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"nothing of which it has \(another architecture\?\).*102 missing.*90 more"):
        load_weights(resnet18(num_classes=3), tmp_path / "other.pth", strict=False)
    torch.save(resnet18(widths=(4, 8, 12, 16)).state_dict(), tmp_path / "resnet18.pth")
    with torch.device("meta"):
        larger = resnet50()
    with pytest.raises(ValueError, match=r"resnet18.pth: not the weights of this ResNet; .* missing in the file"):
        load_weights(larger, tmp_path / "resnet18.pth")


def test_one_part_of_a_larger_file_is_taken_by_its_prefix(trained, tmp_path):
    state = {f"backbone.body.{key}": value for key, value in trained.state_dict().items()}
    torch.save(state | {"head.weight": torch.zeros(3)}, tmp_path / "detector.pth")
    network = small(num_classes=5)
    load_weights(network, tmp_path / "detector.pth", prefix="backbone.body.")
    assert same(network.state_dict(), trained.state_dict())
    with pytest.raises(ValueError, match=r"no name begins with 'trunk\.'; there are backbone.body.conv1.weight.* more"):
        load_weights(network, tmp_path / "detector.pth", prefix="trunk.")


def test_counters_of_batch_norm_may_be_missing_or_superfluous(trained, tmp_path):
    state = {key: value for key, value in trained.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    network = small(num_classes=5)
    load_weights(network, tmp_path / "old.pth")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    torch.save(trained.state_dict(), tmp_path / "new.pth")
    frozen = freeze_batch_norm(small(num_classes=5))
    load_weights(frozen, tmp_path / "new.pth")
    assert same(frozen.state_dict(), state)


def test_half_precision_files_are_cast_to_the_networks_own(trained, tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in trained.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    network = small(num_classes=5)
    load_weights(network, tmp_path / "half.safetensors")
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, state["conv1.weight"].float())


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_pickled_code_is_not_run(tmp_path):
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"weight": Trap()}, protocol=2))
    torch.save({"weight": Trap()}, tmp_path / "trap2.pth")
    torch.save(small(), tmp_path / "module.pth")
    for name in ("trap.pth", "trap2.pth", "module.pth"):
        with pytest.raises(ValueError, match=rf"{name}: not a file of plain weights: .* can run code"):
            load_weights(small(), tmp_path / name)


@pytest.mark.parametrize("writer", ["safetensors", "torch", "torch before 1.6"])
@pytest.mark.parametrize("kept", [0, 8, 9, 100, 0.5, 0.999])
def test_truncated_files_are_named(trained, tmp_path, writer, kept):
    path = tmp_path / "cut.bin"
    WRITERS[writer](trained.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    network = small(num_classes=5)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"cut\.bin: .*(damaged|truncated)"):
        load_weights(network, path)
    assert same(network.state_dict(), before)


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.zeros(3), "holds Tensor, not a mapping"),
        ([torch.zeros(3)], "holds list, not a mapping"),
        ({}, "holds dict, not a mapping"),
        ({"epoch": 3, "weight": torch.zeros(1)}, "not tensors: epoch"),
        ({3: torch.zeros(1)}, "not tensors: 3"),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(tmp_path, content, message):
    torch.save(content, tmp_path / "content.pt")
    with pytest.raises(ValueError, match=f"content.pt: .*{re.escape(message)}"):
        read_weights(tmp_path / "content.pt")


def test_other_files_and_missing_files(tmp_path):
    (tmp_path / "notes.txt").write_text("these are not weights\n")
    with pytest.raises(ValueError, match=r"notes\.txt: .*damaged"):
        load_weights(nn.Linear(2, 3), tmp_path / "notes.txt")
    with pytest.raises(OSError, match=r"none\.pth"):
        load_weights(nn.Linear(2, 3), tmp_path / "none.pth")
    with pytest.raises(OSError):
        load_weights(nn.Linear(2, 3), tmp_path)
