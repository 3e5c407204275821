"""Encoders of clouds and voxels: maps as a backbone gives them."""

import pytest
import torch

from tests import naive
from tests.published import shapes_of
from vision3dgen.backbones import (
    ENCODERS,
    POINT_ENCODERS,
    LocalPoolPointnet,
    LocalVoxelEncoder,
    PointCode,
    VoxelEncoder,
)
from vision3dgen.ops import FeatureLayout
from vision3dgen.ops.planes import PLANES
from vision3dgen.structures import Pointclouds

BOTH = FeatureLayout(("xz", "grid"), resolution=8, grid_resolution=4)


def encoder(name, depth=2, levels=2):
    torch.manual_seed(0)
    local = {"layout": BOTH, "code_channels": 5, "depth": depth, "levels": levels, "width": 8}
    made = {
        "point_code": lambda: PointCode(POINT_ENCODERS["resnet_pointnet"](code_channels=11, hidden=7)),
        "voxel_code": lambda: VoxelEncoder(code_channels=11, resolution=16),
        "local_pool_pointnet": lambda: LocalPoolPointnet(**local, hidden=7, blocks=3),
        "local_voxels": lambda: LocalVoxelEncoder(**local),
    }[name]()
    for parameter in made.parameters():  # residual branches start at 0
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def shapes(made, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if made.takes == "voxels":
        return (torch.rand(3, 16, 16, 16, generator=generator) > 0.5).float()
    return Pointclouds([torch.rand(n, 3, generator=generator) - 0.5 for n in (37, 5, 23)])


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_every_encoder_keeps_the_contract(name):
    made = encoder(name)
    maps = made(shapes(made))
    assert [values.shape[1] for values in maps] == made.channels
    if made.layout is None:
        assert [values.shape for values in maps] == [(3, made.channels[0], 1, 1)]
    else:
        sides = [made.layout.sides(plane) for plane in made.layout.planes]
        assert [tuple(values.shape[2:]) for values in maps] == sides
    sum(values.square().sum() for values in maps).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.parameters())


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_batch_gives_what_each_member_gives_alone(name):
    made = encoder(name)
    given = shapes(made)
    together = made(given)
    for index in range(3):
        for values, alone in zip(together, made(given[index : index + 1])):
            torch.testing.assert_close(values[index], alone[0], atol=1e-5, rtol=1e-4)


def test_local_pooling_equals_the_loops_and_the_order_of_points_does_not_matter():
    made = encoder("local_pool_pointnet", depth=0, levels=0)
    made.requires_grad_(False)
    points = shapes(made).points_list()[0]
    x = made.fc_pos(points)
    for number, block in enumerate(made.blocks):
        if number:
            pooled = sum(naive.cell_maxima(x, points, PLANES[p], BOTH.sides(p)[0], 0.1) for p in BOTH.planes)
            x = torch.cat([x, pooled], dim=1)
        x = block(x)
    x = made.fc_c(x)
    shuffled = made(points[torch.randperm(37, generator=torch.Generator().manual_seed(1))][None])
    for plane, values, other in zip(BOTH.planes, made(points[None]), shuffled):
        expected = naive.cell_means(x, points, PLANES[plane], BOTH.sides(plane)[0], 0.1)
        torch.testing.assert_close(values[0], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other, values, atol=1e-5, rtol=1e-4)


def test_a_point_without_a_unet_is_seen_in_its_own_cells_alone():
    made = encoder("local_pool_pointnet", depth=0, levels=0)
    points = torch.tensor([[[-0.4, -0.4, -0.4], [0.4, 0.4, 0.4], [0.41, 0.41, 0.41]]], requires_grad=True)
    plane, grid = made(points)
    (gradient,) = torch.autograd.grad(grid[0, :, 0, 0, 0].sum() + plane[0, :, 0, 0].sum(), points)
    assert gradient[0, 0].abs().sum() > 0
    assert (gradient[0, 1:] == 0).all()


def test_an_empty_cloud_has_no_features():
    made = encoder("local_pool_pointnet", depth=0, levels=0)
    for values in made(Pointclouds([torch.rand(5, 3) - 0.5, torch.zeros(0, 3)])):
        assert values[0].abs().sum() > 0
        assert values[1].abs().sum() == 0


def test_voxel_weights_have_the_authors_axes():
    """A kernel that copies the neighbor at smaller x must do so along the last axis of (z, y, x) voxels."""
    made = encoder("local_voxels", depth=0, levels=0)
    with torch.no_grad():
        made.conv_in.weight.zero_()
        made.conv_in.bias.zero_()
        made.conv_in.weight[:, 0, 0, 1, 1] = 1  # (x, y, z): one step back along x
    made.layout = FeatureLayout(("grid",), padding=0.0, grid_resolution=4)
    voxels = torch.zeros(1, 4, 4, 4)
    voxels[0, 1, 2, 0] = 1  # z, y, x
    (grid,) = made(voxels)
    assert grid[0, 0].nonzero().tolist() == [[1, 2, 1]]


def test_local_voxels_lie_where_the_authors_put_them():
    made = encoder("local_voxels", depth=0, levels=0)
    voxels = shapes(made)[:1]
    features = made.conv_in(voxels.permute(0, 3, 2, 1)[:, None]).relu()[0]  # (C, x, y, z)
    at = torch.linspace(-0.5, 0.5, 16)
    places, rows = [], []
    for i in range(16):
        for j in range(16):
            for k in range(16):
                places.append([at[i], at[j], at[k]])
                rows.append(features[:, i, j, k])
    expected = naive.cell_means(torch.stack(rows).detach(), torch.tensor(places), PLANES["grid"], 4, 0.1)
    torch.testing.assert_close(made(voxels)[1][0].detach(), expected, atol=1e-5, rtol=1e-4)


def test_the_voxel_encoder_has_the_published_layout():
    widths = [1, 32, 64, 128, 256, 512]
    expected = {}
    for name, inputs, outputs in zip(("conv_in", "conv_0", "conv_1", "conv_2", "conv_3"), widths, widths[1:]):
        expected |= {f"{name}.weight": [outputs, inputs, 3, 3, 3], f"{name}.bias": [outputs]}
    expected |= {"fc.weight": [256, 512 * 2 * 2 * 2], "fc.bias": [256]}
    assert shapes_of(VoxelEncoder()) == expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VoxelEncoder(resolution=24), "multiple of 16, got 24"),
        (lambda: VoxelEncoder()(torch.zeros(2, 16, 16, 16)), r"voxels must be \(B 32 32 32\)"),
        (lambda: encoder("local_voxels")(torch.zeros(2, 4, 4, 5)), r"voxels must be \(B D D D\)"),
        (lambda: encoder("local_pool_pointnet")(torch.zeros(2, 4, 2)), r"points must be \(B N 3\)"),
        (lambda: LocalPoolPointnet(FeatureLayout(resolution=36)), "multiple of 8 for a U-Net of depth 4, got 36"),
        (lambda: LocalPoolPointnet(FeatureLayout(("grid",), grid_resolution=3)), "at least 4 for a U-Net of 3 levels"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
