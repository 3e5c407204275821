"""Voxel tubes and 3D-R2N2's decoder: formulas, published sizes, what they refuse."""

import math

import pytest
import torch
from torch.nn import functional as F

from vision3dgen.heads import VolumeHead, VoxelTubeHead
from vision3dgen.heads.voxel import PRIOR


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_tubes_have_mesh_rcnns_sizes():
    head = VoxelTubeHead([7, 2048], resolution=48)
    sizes = [tuple(p.shape) for name, p in head.named_parameters() if name.endswith("weight")]
    assert sizes == [(256, 2048, 3, 3), *[(256, 256, 3, 3)] * 3, (256, 256, 2, 2), (48, 256, 1, 1)]
    assert head([rand(1, 7, 3, 3), rand(1, 2048, 2, 2)]).shape == (1, 48, 48, 48)


def test_the_channels_of_a_tube_are_depth():
    torch.manual_seed(0)
    head = VoxelTubeHead([5], resolution=10, width=3, convolutions=2)
    before = head([rand(2, 5, 4, 3)])
    with torch.no_grad():
        head.predictor.bias[7] += 2.0  # z
    after = head([rand(2, 5, 4, 3)])
    changed = torch.zeros(10, 10, 10)
    changed[7] = 2.0
    torch.testing.assert_close(after - before, changed.expand(2, 10, 10, 10))


def test_tubes_look_at_their_surroundings_in_the_map():
    torch.manual_seed(0)
    head = VoxelTubeHead([1], resolution=32, width=4, convolutions=1)
    x = torch.zeros(1, 1, 16, 16)
    y = x.clone()
    y[0, 0, 5, 11] = 1.0  # row, column; no resizing, one 3x3 convolution
    differs = (head([x]) != head([y])).any(1)[0]  # over z
    rows, columns = differs.nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (8, 13)
    assert (columns.min(), columns.max()) == (20, 25)


def test_initial_losses_are_those_of_the_prior():
    torch.manual_seed(0)
    truth = (rand(3, 16, 16, 16) < 0.3).float()
    for head, features in (
        (VoxelTubeHead([5], resolution=16, width=8), [rand(3, 5, 4, 4)]),
        (VolumeHead([5], widths=(8, 8, 4, 4), resolution=16), [rand(3, 5, 2, 2, 2)]),
    ):
        loss = float(head.loss(head(features), {"voxels": truth})["loss"].detach())
        assert loss == pytest.approx(head.expected_initial_loss({"voxels": truth}), abs=0.05)


def published(state, volume):
    """The decoder of 3D-R2N2 written out, layer by layer."""

    def convolve(x, name):
        weight = state[f"{name}.weight"]
        return F.conv3d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def rectify(x):
        return torch.where(x > 0, x, 0.01 * x)

    def unpool(x):
        out = torch.zeros(*x.shape[:2], *(2 * side for side in x.shape[2:]))
        for d in range(x.shape[2]):
            for h in range(x.shape[3]):
                for w in range(x.shape[4]):
                    out[:, :, 2 * d, 2 * h, 2 * w] = x[:, :, d, h, w]
        return out

    x = volume
    for block in range(3):
        x = unpool(x)
        y = rectify(convolve(rectify(convolve(x, f"blocks.{block}.first")), f"blocks.{block}.second"))
        x = y + (convolve(x, f"blocks.{block}.shortcut") if f"blocks.{block}.shortcut.weight" in state else x)
    first = rectify(convolve(x, "blocks.3.first"))
    x = rectify(convolve(first, "blocks.3.second")) + convolve(first, "blocks.3.shortcut")
    return convolve(x, "scores")


def test_the_volume_decoder_is_the_published_one_and_its_loss_the_two_way_softmax():
    torch.manual_seed(0)
    head = VolumeHead([6], widths=(6, 6, 5, 3), resolution=16)
    with torch.no_grad():
        torch.nn.init.normal_(head.scores.weight)
    names = {name for name in head.state_dict() if "shortcut" in name}
    assert names == {f"blocks.{i}.shortcut.{kind}" for i in (2, 3) for kind in ("weight", "bias")}
    volume = rand(2, 6, 2, 2, 2) - 0.5
    scores = published(head.state_dict(), volume)
    logits = head([volume])
    torch.testing.assert_close(logits, scores[:, 1] - scores[:, 0], atol=1e-4, rtol=1e-4)
    truth = rand(2, 16, 16, 16, seed=3) < 0.4
    loss = head.loss(logits, {"voxels": truth})["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(scores, truth.long()), atol=1e-4, rtol=1e-4)
    probability = head.occupancy(logits, head.grid.points().view(1, -1, 3).expand(2, -1, -1)).view(2, 16, 16, 16)
    torch.testing.assert_close(probability, scores.softmax(1)[:, 1], atol=1e-5, rtol=1e-4)


def test_the_volume_decoder_has_the_papers_sizes():
    head = VolumeHead([128])
    sizes = {name: tuple(p.shape) for name, p in head.named_parameters() if name.endswith("weight")}
    assert sizes == {
        "blocks.0.first.weight": (128, 128, 3, 3, 3), "blocks.0.second.weight": (128, 128, 3, 3, 3),
        "blocks.1.first.weight": (128, 128, 3, 3, 3), "blocks.1.second.weight": (128, 128, 3, 3, 3),
        "blocks.2.first.weight": (64, 128, 3, 3, 3), "blocks.2.second.weight": (64, 64, 3, 3, 3),
        "blocks.2.shortcut.weight": (64, 128, 1, 1, 1),
        "blocks.3.first.weight": (32, 64, 3, 3, 3), "blocks.3.second.weight": (32, 32, 3, 3, 3),
        "blocks.3.shortcut.weight": (32, 32, 3, 3, 3),
        "scores.weight": (2, 32, 3, 3, 3),
    }  # fmt: skip
    assert head.threshold == 0.4
    assert float(head.scores.bias[1].detach()) == pytest.approx(math.log(PRIOR / (1 - PRIOR)))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="must be even, the map is made at half of it, got 9"):
        VoxelTubeHead([3], resolution=9)
    with pytest.raises(ValueError, match="convolutions must be at least 1"):
        VoxelTubeHead([3], convolutions=0)
    with pytest.raises(ValueError, match="threshold must be a probability between 0 and 1, got 1"):
        VoxelTubeHead([3], threshold=1.0)
    with pytest.raises(ValueError, match="multiple of 8, the volume is doubled three times, got 20"):
        VolumeHead([3], resolution=20)
    head = VolumeHead([3], widths=(3, 3, 3, 3), resolution=16)
    with pytest.raises(
        ValueError, match=r"takes a volume of 2\^3 cells for its resolution of 16, got \(1, 3, 4, 4, 4\)"
    ):
        head([rand(1, 3, 4, 4, 4)])
    with pytest.raises(ValueError, match=r"got \(1, 3, 4, 4\): it stands behind a multi-view encoder"):
        head([rand(1, 3, 4, 4)])
