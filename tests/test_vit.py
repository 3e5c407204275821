import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.naive import timm_vit
from tests.published import filled, shapes_of
from vision3dgen.backbones import (
    BACKBONES,
    VisionTransformer,
    load_weights,
    resize_positions,
    timm_to_vision3dgen,
    vision3dgen_to_timm,
)


def tiny(**settings):
    torch.manual_seed(0)
    defaults = {"image_size": 28, "patch_size": 7, "depth": 3, "heads": 2, "width": 10, "mlp_width": 13}
    network = VisionTransformer(**(defaults | settings)).eval()
    network.load_state_dict(filled(shapes_of(network)))
    return network


# ------------------------------------------------------------------------------------------------------- timm's names


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16"])
def test_timms_names_make_the_round_trip(name):
    with torch.device("meta"):
        state = BACKBONES[name](num_classes=1000).state_dict()
    theirs = vision3dgen_to_timm(state)
    assert theirs["blocks.11.attn.qkv.weight"].shape == (3 * len(theirs["norm.weight"]), len(theirs["norm.weight"]))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.bias"} < set(theirs)
    assert not set(theirs) & set(state)
    back = timm_to_vision3dgen(theirs)
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)


@torch.no_grad()
def test_timms_weights_give_timms_outputs(tmp_path):
    """Against timm's forward pass written from its names."""
    network = tiny(num_classes=5)
    theirs = filled(shapes_of_timm(network))
    torch.save({"model": theirs}, tmp_path / "timm.pth")
    load_weights(network, tmp_path / "timm.pth", rename=timm_to_vision3dgen)
    x = torch.rand(3, 3, 28, 28)
    torch.testing.assert_close(network.logits(x), timm_vit(theirs, x, heads=2))


def shapes_of_timm(network):
    return {name: list(tensor.shape) for name, tensor in vision3dgen_to_timm(network.state_dict()).items()}


def test_names_of_another_network_are_named():
    with pytest.raises(ValueError, match=r"of timm in these names: \['layer1.0.conv1.weight', 'blocks.0.ls1.gamma'\]"):
        timm_to_vision3dgen({"layer1.0.conv1.weight": torch.zeros(1), "blocks.0.ls1.gamma": torch.zeros(1)})
    with pytest.raises(ValueError, match="of vision3dgen in these names"):
        vision3dgen_to_timm({"cls_token": torch.zeros(1)})


# ----------------------------------------------------------------------------------------------------- any image size


def test_positions_on_their_own_grid_are_the_embedding_itself():
    embedding = torch.rand(1, 17, 6)
    assert resize_positions(embedding, (4, 4)) is embedding


def test_resized_positions_keep_the_class_token_constants_and_linear_ramps():
    row = torch.arange(8.0)[:, None].expand(8, 8)
    grid = torch.stack([torch.full((8, 8), 0.25), row, row.T], dim=-1).flatten(0, 1)  # constant, down, right
    embedding = torch.cat([torch.tensor([[5.0, 6.0, 7.0]]), grid])[None]
    resized = resize_positions(embedding, (16, 24))
    assert resized.shape == (1, 1 + 16 * 24, 3)
    assert resized[0, 0].tolist() == [5.0, 6.0, 7.0]
    cells = resized[0, 1:].unflatten(0, (16, 24))
    np.testing.assert_allclose(cells[..., 0], 0.25, atol=1e-6)
    centers = (np.arange(16) + 0.5) / 2 - 0.5  # of the new cells, in old cells
    np.testing.assert_allclose(cells[4:-4, 7, 1], centers[4:-4], atol=0.1)  # the cubic (a = -0.75) wobbles on a ramp
    centers = (np.arange(24) + 0.5) / 3 - 0.5
    np.testing.assert_allclose(cells[7, 6:-6, 2], centers[6:-6], atol=0.1)


@torch.no_grad()
def test_what_does_not_fill_a_patch_is_padded_below_and_on_the_right():
    network = tiny(num_classes=5)
    x = torch.rand(2, 3, 25, 38)
    padded = F.pad(x, (0, 4, 0, 3))
    assert torch.equal(network(x)[0], network(padded)[0])
    assert torch.equal(network.logits(x), network.logits(padded))
    assert network(x)[0].shape == (2, 10, 4, 6)


@torch.no_grad()
def test_an_embedding_of_another_grid_is_refused_with_both_shapes_and_can_be_resized(tmp_path):
    state = tiny().state_dict()
    torch.save(state, tmp_path / "small.pth")
    larger = tiny(image_size=42)
    with pytest.raises(ValueError, match=r"encoder.pos_embedding \(1, 17, 10\) for \(1, 37, 10\)"):
        load_weights(larger, tmp_path / "small.pth")

    def resized(state):
        return {**state, "encoder.pos_embedding": resize_positions(state["encoder.pos_embedding"], (6, 6))}

    load_weights(larger, tmp_path / "small.pth", rename=resized)
    x = torch.rand(2, 3, 42, 42)
    torch.testing.assert_close(larger(x)[0], tiny()(x)[0])  # which the small one does on its own
    with pytest.raises(ValueError, match=r"1 \+ n\^2 rows \(class token, square grid\), got \(1, 16, 10\)"):
        resize_positions(torch.rand(1, 16, 10), (6, 6))


# --------------------------------------------------------------------------------------------------------- as backbone


@torch.no_grad()
def test_maps_at_several_depths_are_the_normed_tokens_there():
    network = tiny(depths=(1, 3))
    shallow = tiny(depth=1)
    shared = {key: value for key, value in network.state_dict().items() if key in shallow.state_dict()}
    shallow.load_state_dict(shared)
    x = torch.rand(2, 3, 28, 35)
    first, last = network(x)
    torch.testing.assert_close(first, shallow(x)[0])
    torch.testing.assert_close(last, tiny()(x)[0])
    assert network.channels == [10, 10]
    assert network.strides == [7, 7]


@torch.no_grad()
def test_cells_of_the_map_lie_where_their_patches_do():
    network = tiny()
    network.encoder.pos_embedding.zero_()
    x = torch.rand(1, 3, 28, 35)
    moved = x.roll((7, 14), dims=(2, 3))  # without positions, attention is blind to where patches are
    torch.testing.assert_close(network(moved)[0], network(x)[0].roll((1, 2), dims=(2, 3)))


def test_a_new_classifier_starts_undecided():
    network = VisionTransformer(28, 7, depth=1, heads=2, width=10, mlp_width=13, num_classes=4)
    assert torch.equal(network.logits(torch.rand(2, 3, 28, 28)), torch.zeros(2, 4))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_size": 30}, "multiple of patch_size 7, got 30"),
        ({"heads": 3}, "multiple of heads, got 10 and 3"),
        ({"depths": (1, 2)}, r"from at least 1 to 3, the number of blocks, got \(1, 2\)"),
        ({"depths": (3, 1)}, r"got \(3, 1\)"),
        ({"depths": (0, 3)}, r"got \(0, 3\)"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
