"""Generators of shapes: invariances, the terms of their losses, and learning one family each."""

import pytest
import torch

from vision3dgen.generators import (
    GAN,
    R1,
    MLPDiscriminator,
    MLPGenerator,
    OccupancyVAE,
    PointVAE,
    VoxelDiscriminator,
    VoxelGenerator,
)
from vision3dgen.losses import chamfer_distance
from vision3dgen.ops import isosurface
from vision3dgen.structures import GridSpec, Pointclouds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spheres(count, points=64, seed=0):
    generator = seeded(seed)
    directions = torch.nn.functional.normalize(torch.randn(count, points, 3, generator=generator), dim=2)
    return directions * (0.2 + 0.25 * torch.rand(count, 1, 1, generator=generator))


def test_the_code_of_a_cloud_does_not_depend_on_the_order_of_its_points():
    torch.manual_seed(0)
    model, clouds = PointVAE(5, 32).eval(), spheres(3)
    order = torch.randperm(64, generator=seeded())
    torch.testing.assert_close(model.encode(clouds).mean, model.encode(clouds[:, order]).mean)
    assert model.sample(2, generator=seeded()).shape == (2, 32, 3)
    assert torch.equal(model.sample(2, generator=seeded()), model.sample(2, generator=seeded()))
    with pytest.raises(ValueError, match="the model has no classes"):
        model.sample(2, cond=torch.tensor([0, 1]))


def test_the_loss_of_clouds_is_chamfer_and_kl():
    torch.manual_seed(0)
    model, clouds = PointVAE(5, 32, beta=0.5).eval(), spheres(3)
    torch.manual_seed(1)
    terms = model.loss({"surface": Pointclouds(clouds)})
    torch.manual_seed(1)
    posterior = model.encode(clouds)
    distance, _ = chamfer_distance(model.decode(posterior.sample()), clouds)
    torch.testing.assert_close(terms["chamfer"], distance)
    torch.testing.assert_close(terms["loss"], distance + 0.5 * terms["kl"])
    torch.manual_seed(1)
    torch.testing.assert_close(model.loss({"surface": clouds}), terms)
    assert {value.shape for value in model.validation_metrics({"surface": clouds}).values()} == {(3,)}


@pytest.mark.slow
def test_a_cloud_vae_and_a_gan_on_its_codes_learn_spheres():
    torch.manual_seed(0)
    clouds = spheres(32, 32)
    model = PointVAE(4, 32, widths=(32, 64), hidden=(64,), beta=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = None
    for _ in range(120):
        optimizer.zero_grad()
        terms = model.loss({"surface": clouds})
        terms["loss"].backward()
        optimizer.step()
        first = first or float(terms["chamfer"].detach())
    assert float(terms["chamfer"].detach()) < first / 4
    codes = model.eval().encode(clouds).mean.detach()
    gan = GAN(
        MLPGenerator(4, (4,), (32,), bounded=False), MLPDiscriminator((4,), (32,)), penalty=R1(0.1, every=1),
        field="code", bounded=False,
    )  # fmt: skip
    optimizers = {part: torch.optim.Adam(gan.get_submodule(part).parameters(), 2e-3, (0.0, 0.9)) for part in gan.parts}
    for _ in range(120):
        for part in gan.parts:
            optimizers[part].zero_grad()
            gan.loss({"code": codes}, part=part)["loss"].backward()
            optimizers[part].step()
    radii = model.decode(gan.sample(32, generator=seeded())).norm(dim=2).detach()
    assert 0.15 < float(radii.mean()) < 0.5


def occupancies(count, points=128, seed=0):
    generator = seeded(seed)
    places = torch.rand(count, points, 3, generator=generator) - 0.5
    radius = 0.2 + 0.25 * torch.rand(count, 1, generator=generator)
    return places, (places.norm(dim=2) < radius).float()


def test_occupancies_of_a_grid_are_in_the_order_of_voxels():
    torch.manual_seed(0)
    model = OccupancyVAE(3, hidden=8, blocks=1, widths=(8,), resolution=5, size=2.0).eval()
    model.logits = lambda points, z: points[..., 0] - 10 * points[..., 2]
    grid = torch.logit(model.sample(2, generator=seeded()).double())
    torch.testing.assert_close(grid[0, 0, 0].float(), 10 + torch.linspace(-1, 1, 5), atol=1e-2, rtol=0)  # x at z = -1
    assert grid.shape == (2, 5, 5, 5)
    assert model.sample(0).shape == (0, 5, 5, 5)


@pytest.mark.slow
def test_an_occupancy_vae_learns_balls():
    torch.manual_seed(0)
    places, inside = occupancies(48)
    model = OccupancyVAE(3, hidden=32, blocks=2, widths=(32, 32), resolution=16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        terms = model.loss({"points": places, "occupancies": inside})
        terms["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(terms["elbo"], terms["reconstruction"] - terms["kl"])
    share = inside.mean()
    independent = 128 * float(share * share.log() + (1 - share) * (1 - share).log())
    assert float(terms["elbo"].detach()) > independent / 2  # nats of points that know only how many are inside
    model.eval()
    assert {value.shape for value in model.validation_metrics({"points": places, "occupancies": inside}).values()} == {
        (48,)
    }
    grids = model.decode(model.encode(*occupancies(16, seed=1)).mean)  # of balls it has not seen
    assert (grids[:, 8, 8, 8] > 0.5).float().mean() > 0.9
    assert (grids[:, 0, 0, 0] < 0.5).all()
    assert not isosurface(grids[:1], GridSpec.cube(16), level=0.5).isempty()
    assert model.sample(8, generator=seeded()).min() >= 0


def test_a_voxel_gan_trains_both_networks():
    torch.manual_seed(0)
    model = GAN(VoxelGenerator(7, 16, 4), VoxelDiscriminator(16, 4), field="voxels")
    batch = {"voxels": (torch.rand(3, 16, 16, 16, generator=seeded()) > 0.8).float()}
    for part in model.parts:
        model.zero_grad()
        model.loss(batch, part=part)["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.get_submodule(part).parameters())
    samples = model.eval().sample(2, generator=seeded())
    assert samples.shape == (2, 16, 16, 16)
    assert 0 <= samples.min() < samples.max() <= 1


def test_the_published_voxel_networks_have_the_published_sizes():
    generator, discriminator = VoxelGenerator(), VoxelDiscriminator()
    convolutions = [layer for layer in generator.layers if isinstance(layer, torch.nn.ConvTranspose3d)]
    assert [layer.out_channels for layer in convolutions] == [256, 128, 64, 1]
    assert generator.start == (512, 4, 4, 4)
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, torch.nn.Conv3d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512]
