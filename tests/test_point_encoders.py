import numpy as np
import pytest
import torch
from torch import nn

from tests import naive
from tests.published import OUTPUTS, filled, layout, shapes_of
from vision3dgen.backbones import DGCNN, POINT_ENCODERS, PointNet, PointNet2, ResnetPointnet, orthogonality
from vision3dgen.backbones.points import SetAbstraction, clouds_of
from vision3dgen.ops import knn_points
from vision3dgen.structures import Pointclouds

SMALL = {
    "pointnet": {"code_channels": 19},
    "pointnet2": {"counts": (13, 5), "radii": (0.3, 0.6), "neighbors": (7, 3)},
    "dgcnn": {"neighbors": 5, "widths": (4, 6), "code_channels": 11},
    "resnet_pointnet": {"code_channels": 11, "hidden": 7},
}
LENGTHS = [37, 2, 11]


def randomized(module):
    """Nothing zero, nothing at its start: every term of every formula counts."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.3)
    return module.eval()


def cloud(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5


def batch():
    points = cloud(3, 37, 3)
    lengths = torch.tensor(LENGTHS)
    return points, lengths


@pytest.fixture(params=sorted(POINT_ENCODERS))
def encoder(request):
    return randomized(POINT_ENCODERS[request.param](**SMALL[request.param]))


# ---------------------------------------------------------------------------------------------------- every encoder


def test_sizes_are_what_the_encoder_says_and_every_parameter_gets_a_gradient(encoder):
    encoder.train()
    out = encoder(*batch())
    assert out.code.shape == (3, encoder.code_channels)
    assert out.features.shape == (3, 37, encoder.channels)
    (out.code.sum() + out.features.sum()).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_a_ragged_batch_is_each_cloud_on_its_own(encoder):
    points, lengths = batch()
    out = encoder(points, lengths)
    for index, length in enumerate(LENGTHS):
        alone = encoder(points[index : index + 1, :length])
        torch.testing.assert_close(out.code[index], alone.code[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.features[index, :length], alone.features[0], atol=1e-4, rtol=1e-4)
        assert (out.features[index, length:] == 0).all()


@torch.no_grad()
def test_padding_stays_out_of_the_statistics_of_training(encoder):
    points, lengths = batch()
    twin = type(encoder)(**SMALL[next(key for key, kind in POINT_ENCODERS.items() if kind is type(encoder))])
    twin.load_state_dict(encoder.state_dict())
    spoiled = points.clone()
    for index, length in enumerate(LENGTHS):
        spoiled[index, length:] = torch.nan
    clean, other = encoder.train()(points, lengths), twin.train()(spoiled, lengths)
    assert torch.equal(clean.code, other.code)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


@torch.no_grad()
def test_point_clouds_are_taken_as_they_are(encoder):
    points, lengths = batch()
    clouds = Pointclouds([points[index, :length] for index, length in enumerate(LENGTHS)])
    out, expected = encoder(clouds), encoder(points, lengths)
    assert torch.equal(out.code, expected.code)
    assert torch.equal(out.features, expected.features)


def test_an_empty_cloud_has_a_finite_code_and_no_say(encoder):
    points, lengths = batch()
    lengths[1] = 0
    out = encoder(points.requires_grad_(), lengths)
    assert torch.isfinite(out.code).all()
    assert (out.features[1] == 0).all()
    assert torch.equal(out.code[1], encoder(points[:1], torch.tensor([0])).code[0])
    torch.testing.assert_close(out.code[2], encoder(points[2:], lengths[2:]).code[0])
    (gradient,) = torch.autograd.grad(out.code.sum(), points)
    assert torch.isfinite(gradient).all()
    assert (gradient[1] == 0).all()
    assert (gradient[2, 11:] == 0).all()
    assert encoder(torch.zeros(2, 0, 3)).features.shape == (2, 0, encoder.channels)


@torch.no_grad()
def test_the_order_of_the_points_does_not_matter(encoder):
    points = cloud(2, 23, 3)
    if isinstance(encoder, PointNet2):  # the search for centers starts at the first point; balls hold all of them
        encoder.fine.neighbors = encoder.coarse.neighbors = 23
        encoder.fine.count = encoder.coarse.count = 9
        order = torch.cat([torch.tensor([0]), 1 + torch.randperm(22)])
    else:
        order = torch.randperm(23)
    out, permuted = encoder(points), encoder(points[:, order])
    torch.testing.assert_close(permuted.code, out.code)
    torch.testing.assert_close(permuted.features, out.features[:, order])


@torch.no_grad()
def test_state_dicts_make_the_round_trip_and_evaluation_is_deterministic(encoder):
    twin = type(encoder)(**SMALL[next(key for key, kind in POINT_ENCODERS.items() if kind is type(encoder))]).eval()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    assert torch.equal(twin(*batch()).code, encoder(*batch()).code)


@torch.no_grad()
def test_autocast_stays_finite(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(*batch())
    exact = encoder(*batch())
    assert torch.isfinite(out.code).all()
    assert torch.isfinite(out.features).all()
    assert float((out.code - exact.code).norm() / exact.code.norm()) < 0.3


@pytest.mark.parametrize(
    "points, lengths, message",
    [
        (torch.zeros(2, 5, 4), None, r"points must be \(B N 3\).*got \(2, 5, 4\)"),
        (torch.zeros(2, 5, 3), torch.tensor([3, 6]), r"from 0 to the 5 points given, got \[3, 6\]"),
        (torch.zeros(2, 5, 3), torch.tensor([-1, 5]), r"got \[-1, 5\]"),
    ],
)
def test_clouds_it_cannot_take_are_refused(encoder, points, lengths, message):
    with pytest.raises(ValueError, match=message):
        encoder(points, lengths)


def test_one_point_cannot_train_batch_norm_nor_one_cloud_pointnets_transforms():
    with pytest.raises(ValueError, match="two points or more, got 1 in 1 clouds"):
        DGCNN(**SMALL["dgcnn"]).train()(torch.zeros(1, 4, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="transforms=False"):
        PointNet().train()(torch.rand(1, 5, 3))
    PointNet(transforms=False).train()(torch.rand(1, 5, 3))
    ResnetPointnet(**SMALL["resnet_pointnet"]).train()(torch.rand(1, 1, 3))


# --------------------------------------------------------------------------------------------------------- each one


@torch.no_grad()
def test_residual_pointnet_is_the_published_one(shared_data):
    encoder = ResnetPointnet().eval()
    published = layout(shared_data, "onet_pointcloud")
    prefix = "encoder."
    state = {k.removeprefix(prefix): v for k, v in filled(published).items() if k.startswith(prefix)}
    assert shapes_of(encoder) == {k: list(v.shape) for k, v in state.items()}
    encoder.load_state_dict(state, strict=True)
    reference = np.load(shared_data / OUTPUTS / "forward.npz")
    ours = encoder(torch.from_numpy(reference["onet_pointcloud/pointcloud"])).code.numpy()
    theirs = reference["onet_pointcloud/code"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@torch.no_grad()
@pytest.mark.parametrize("channels", [None, 4])
def test_set_abstraction_is_the_naive_one(channels):
    module = randomized(SetAbstraction(7, 0.45, 5, 3 + (channels or 0), 6, 8))
    points, lengths = batch()
    clouds = clouds_of(points, lengths)
    packed = None if channels is None else cloud(len(clouds.packed), channels, seed=3)
    centers, features = module(clouds, packed)
    assert centers.lengths.tolist() == [7, 2, 7]
    row = 0
    for index, length in enumerate(LENGTHS):
        first = int(clouds.first[index])
        own = None if packed is None else packed[first : first + length]
        chosen, expected = naive.set_abstraction(
            points[index, :length], own, module.conv.local_nn, min(7, length), 0.45, 5
        )
        assert torch.equal(centers.padded[index, : len(chosen)], points[index, chosen])
        torch.testing.assert_close(features[row : row + len(chosen)], expected)
        row += len(chosen)
    assert row == len(features)


@torch.no_grad()
def test_edge_convolutions_look_for_neighbors_in_their_own_features():
    encoder = randomized(DGCNN(**SMALL["dgcnn"]))
    points = cloud(1, 23, 3)
    first = naive.edge_convolution(points[0], encoder.convs[0].nn, 5)
    second = naive.edge_convolution(first, encoder.convs[1].nn, 5)
    torch.testing.assert_close(encoder(points).features[0], torch.cat([first, second], dim=1))
    in_space = knn_points(points, points, K=5).idx[0].sort(1).values
    in_features = knn_points(first[None], first[None], K=5).idx[0].sort(1).values
    assert not torch.equal(in_space, in_features)  # so that the second layer tells the two apart


@torch.no_grad()
def test_propagated_features_at_the_centers_are_the_centers_own():
    module = PointNet2(**SMALL["pointnet2"]).back
    module.mlp = nn.Identity()
    clouds = clouds_of(cloud(2, 9, 3), torch.tensor([9, 6]))
    centers = clouds_of(clouds.padded[:, :4], torch.tensor([4, 2]))
    values = cloud(6, 5, seed=4)
    out = module(clouds, clouds.packed, centers, values)
    assert torch.equal(out[:, :3], clouds.packed)
    torch.testing.assert_close(out[:4, 3:], values[:4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[9:11, 3:], values[4:], atol=1e-4, rtol=1e-4)
    x, centers_of = clouds.packed[5], clouds.packed[:4]
    distance = (centers_of - x).square().sum(1)
    near = distance.argsort()[:3]
    weight = 1 / distance[near]
    torch.testing.assert_close(out[5, 3:], (weight[:, None] * values[near]).sum(0) / weight.sum())


def test_orthogonality_is_zero_for_rotations_and_known_for_multiples_of_the_identity():
    rotation = torch.linalg.qr(cloud(2, 5, 5).double()).Q
    torch.testing.assert_close(orthogonality(rotation), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(orthogonality(2 * torch.eye(5)[None]), torch.tensor([45.0]))  # (1 - 4)^2 * 5
    torch.manual_seed(0)
    out = PointNet().train()(cloud(2, 11, 3))
    assert torch.equal(orthogonality(out.transform), torch.zeros(2))  # transforms start as the identity
