from unittest import mock

import numpy as np
import pytest
import torch

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from vision3dgen.backbones import resnet18
from vision3dgen.experiment import build_parts
from vision3dgen.heads import HEADS, Head, OccupancyHead, Squares, VoxelHead
from vision3dgen.heads.voxel import PRIOR
from vision3dgen.models import IMAGENET_MEAN, IMAGENET_STD, MODELS, SingleView
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Camera, Frame, GridSpec, Pointclouds

TINY = {
    "voxels": {"resolution": 16, "width": 8, "code_channels": 13},
    "voxel_tubes": {"resolution": 16, "width": 7},
    "volume": {"resolution": 16, "widths": (7, 7, 5, 3)},
    "occupancy": {"hidden": 17, "resolution": 7, "code_channels": 13},
    "points": {"points": 23, "hidden": 17, "code_channels": 13},
    "points_two_branch": {"points": 787, "width": 16, "hidden": 17},
    "atlas": {"template": Squares(5), "points": 35, "hidden": 7, "code_channels": 13},
}


def tiny_head(name):
    return HEADS[name]([5, 11], **TINY[name])


def features(name=""):
    if name == "volume":
        return [torch.rand(3, 11, 2, 2, 2)]
    return [torch.rand(3, 5, 7, 9), torch.rand(3, 11, 4, 5)]


def batch():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 19, 3, generator=generator) - 0.5
    occupied = (torch.rand(3, 19, generator=generator) > 0.5).float()
    voxels = torch.rand(3, 16, 16, 16, generator=generator) > 0.5
    surface = Pointclouds([torch.rand(size, 3, generator=generator) - 0.5 for size in (29, 31, 0)])
    return {"points": points, "occupancies": occupied, "voxels": voxels, "surface": surface}


@pytest.mark.parametrize("name", ["occupancy", "voxels"])  # heads that know an inside
def test_every_head_of_shapes_keeps_the_contract(name):
    head = tiny_head(name)
    prediction = head(features(name))
    losses = head.loss(prediction, batch())
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())
    head.eval()
    shapes = head.shape(prediction)
    assert len(shapes) == 3
    assert all(values.shape == (3,) for values in head.validation_metrics(prediction, batch()).values())
    if head.threshold is None:
        assert head.occupancy(prediction, batch()["points"]) is None
        return
    probability = head.occupancy(prediction, batch()["points"])
    assert probability.shape == (3, 19)
    assert ((probability >= 0) & (probability <= 1)).all()
    assert 0 < head.threshold < 1


@pytest.mark.parametrize("name, prior", [("occupancy", 0.5), ("voxels", PRIOR)])
def test_the_initial_loss_is_that_of_the_prior(name, prior):
    torch.manual_seed(0)
    head = tiny_head(name)
    loss = float(head.loss(head(features()), batch())["loss"].detach())
    per_point = loss / (19 if name == "occupancy" else 1)
    assert per_point == pytest.approx(-0.5 * np.log(prior) - 0.5 * np.log(1 - prior), abs=0.25)  # half are occupied


def test_occupancy_network_layout_and_outputs_are_the_published_ones(shared_data):
    model = SingleView(resnet18(), OccupancyHead([64, 128, 256, 512]))
    ours_of = {"encoder.features.": "backbone.", "encoder.fc.": "head.fc.", "decoder.": "head.decoder."}
    published = layout(shared_data, "onet_image")

    def renamed(name):
        prefix = next(p for p in ours_of if name.startswith(p))
        return ours_of[prefix] + name.removeprefix(prefix)

    assert {renamed(name): shape for name, shape in published.items()} == shapes_of(model)
    model.load_state_dict({renamed(name): tensor for name, tensor in filled(published).items()}, strict=True)
    model.eval()
    reference = np.load(shared_data / OUTPUTS / "forward.npz")
    with torch.no_grad():
        field = model(uniform(2, 3, 224, 224, seed=2))
        logits = field(torch.from_numpy(reference["onet_image/points"]))
    for ours, key in ((field.conditions[0], "code"), (logits, "logits")):
        theirs = reference[f"onet_image/{key}"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_voxel_head_reads_its_own_grid_at_points():
    head = VoxelHead([3], resolution=8, width=8)
    logits = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    grid = GridSpec.cube(8)
    probability = head.occupancy(logits, grid.points().view(1, -1, 3).expand(2, -1, -1))
    assert torch.equal(probability.view(2, 8, 8, 8), logits.sigmoid())
    outside = torch.tensor([[[0.6, 0.0, 0.0], [0.0, -0.51, 0.0]]]).expand(2, -1, -1)
    assert (head.occupancy(logits, outside) == 0).all()


def test_voxel_surface_is_where_the_voxels_are():
    head = VoxelHead([3], resolution=8, width=8)
    logits = torch.full((2, 8, 8, 8), -9.0)
    logits[0, 1, 3, 6] = 9.0  # z, y, x
    meshes = head.shape(logits)
    box = meshes[0].get_bounding_boxes()[0]
    center = box.mean(dim=1)
    np.testing.assert_allclose(center, [-0.5 + 6.5 / 8, -0.5 + 3.5 / 8, -0.5 + 1.5 / 8], atol=1e-5)
    assert meshes.num_faces_per_mesh()[1] == 0


def test_voxel_resolution_must_be_reachable_by_doubling():
    with pytest.raises(ValueError, match="8, 16, 32"):
        VoxelHead([3], resolution=24)


def test_voxels_of_another_resolution_are_named():
    head = VoxelHead([3], resolution=8, width=8)
    with pytest.raises(ValueError, match=r"predicts \(8, 8, 8\), but the data's voxels are \(16, 16, 16\)"):
        head.loss(torch.zeros(3, 8, 8, 8), batch())


def test_occupancy_surface_is_the_level_set_of_its_field():
    torch.manual_seed(0)
    head = OccupancyHead([3], code_channels=4, hidden=8, threshold=0.3, resolution=12, upsampling_steps=1).eval()

    class Ball(torch.nn.Module):
        def forward(self, points, code):
            return (0.3 - points.norm(dim=-1)) * 20 + float(np.log(0.3 / 0.7))

    head.decoder = Ball()
    mesh = head.shape(head([torch.rand(1, 3, 2, 2)]))
    radius = mesh.verts_packed().norm(dim=1)
    np.testing.assert_allclose(radius, np.full(len(radius), 0.3), atol=2e-3)


def test_a_field_of_a_batch_is_its_members_fields():
    torch.manual_seed(0)
    head = tiny_head("occupancy").eval()
    field = head(features())
    points = batch()["points"]
    together = field(points)
    for index in range(3):
        alone = field[index](points[index : index + 1])
        np.testing.assert_allclose(alone[0].detach(), together[index].detach(), atol=1e-5)


def test_single_view_normalizes_images_inside():
    model = SingleView(resnet18(), tiny_head_for_resnet())
    model.eval()
    images = torch.rand(2, 3, 37, 41)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.head(model.backbone((images - mean) / std))
    assert torch.equal(model(images), expected)


def tiny_head_for_resnet():
    return VoxelHead([64, 128, 256, 512], resolution=8, width=8)


class CameraHead(Head):
    """Knows the truth: a ball at a place of the camera's frame, and a picture of constants."""

    frame = "camera"
    threshold = 0.5

    def __init__(self, channels: list[int], strides: list[int]):
        super().__init__()
        self.channels, self.strides = channels, strides

    def forward(self, features, view=None):
        return view

    def loss(self, prediction, batch):
        return {"loss": torch.zeros(())}

    def shape(self, prediction):
        return ico_sphere(1).extend(len(prediction.cameras))

    def occupancy(self, prediction, points):
        return (points.norm(dim=-1) < 2.0).float()  # within 2 of the camera

    def maps(self, prediction):
        return {"depth": torch.ones(len(prediction.cameras), 1, *prediction.image_size)}

    def validation_metrics(self, prediction, batch):
        return {"views": torch.tensor([7.0, 8.0])}


def test_a_head_in_the_cameras_frame_is_asked_there():
    rotation = torch.tensor([[[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]], [[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]])
    cameras = Camera(rotation, torch.tensor([[0.1, 0.2, 1.9], [0.0, 0.3, 2.1]]), torch.eye(3).repeat(2, 1, 1), (5, 7))
    frames = [Frame("object", scale=0.7, center=(0.1, -0.2, 0.3)), Frame("object")]
    points = torch.rand(2, 31, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    distance = torch.stack([(f.denormalize(p) - c.center).norm(dim=-1) for f, p, c in zip(frames, points, cameras)])
    batch = {"image": torch.rand(2, 3, 5, 7), "camera": cameras, "frame": frames, "points": points}
    batch["occupancies"] = (distance < 2.0).float()
    assert 0 < batch["occupancies"].mean() < 1

    node = {"name": "single_view", "backbone": {"name": "resnet18"}, "head": {"name": "camera"}}
    with mock.patch.dict(HEADS, camera=CameraHead):
        model = build_parts(node, MODELS)
    assert model.head.channels == model.backbone.channels
    assert model.head.strides == model.backbone.strides
    measured = model.validation_metrics(batch)
    assert measured["iou"].tolist() == [1, 1]
    assert measured["views"].tolist() == [7, 8]
    for prediction, camera, frame in zip(model.predict(batch), cameras, frames):
        assert prediction.frame == Frame("camera")
        assert prediction.maps["depth"].shape == (1, 5, 7)
        centers = GridSpec.cube(32).points().view(-1, 3)
        inside = (frame.denormalize(centers) - camera.center).norm(dim=-1) < 2.0
        assert (prediction.voxels.view(-1) == inside).float().mean() > 0.999  # but for rounding
