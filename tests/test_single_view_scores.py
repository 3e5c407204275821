"""Predictions of `SingleView` scored: networks asked at points, and shapes of the camera's frame."""

import dataclasses

import pytest
import torch

from tests.test_evaluation import QUICK, make_items, to_batches
from vision3dgen.heads import Head, OccupancyHead, VoxelHead
from vision3dgen.metrics import PROTOCOLS, evaluate, point_iou
from vision3dgen.metrics.shape import generator
from vision3dgen.models import SingleView
from vision3dgen.structures import join_meshes_as_batch


class Mean(torch.nn.Module):
    """A backbone of one map: the mean color, and a little of each picture's first pixel."""

    channels, strides = [3], [1]

    def forward(self, images):
        return [images.mean((2, 3), keepdim=True) + images[:, :, :1, :1]]


class InCamera(Head):
    """Knows the truth of the pictures it is shown, in the camera's frame."""

    frame, threshold = "camera", 0.2

    def __init__(self, batch):
        super().__init__()
        self.batch = batch
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, features, view=None):
        assert view.cameras is not None
        return view

    def loss(self, prediction, batch):
        return {"loss": self.nothing}

    def shape(self, prediction):
        shapes = []
        for mesh, frame, camera in zip(self.batch["mesh"], self.batch["frame"], self.batch["camera"]):
            world = frame.denormalize(mesh)
            shapes.append(world.update_padded(camera.to(torch.float32).world_to_camera(world.verts_padded()[0])[None]))
        return join_meshes_as_batch(shapes)

    def occupancy(self, prediction, points):
        """Inside where the point, moved back, is in the box."""
        values = []
        for own, mesh, frame, camera in zip(points, self.batch["mesh"], self.batch["frame"], self.batch["camera"]):
            back = frame.normalize(camera.to(own.dtype).camera_to_world(own))
            values.append((back.abs() < mesh.verts_packed().amax(0)).all(-1))
        return torch.stack(values).float()


def batch_of(count):
    (batch,) = to_batches(make_items(count), count)
    images = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    return batch | {"image": images, "camera": batch["camera"].to(torch.float32)}


HEADS = {
    "a field": lambda: OccupancyHead([3], code_channels=5, hidden=7, resolution=5, upsampling_steps=0),
    "a tensor": lambda: VoxelHead([3], resolution=8, width=8),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_occupancy_of_a_prediction_is_its_networks(name, monkeypatch):
    monkeypatch.setattr("vision3dgen.models.reconstruction.POINTS_AT_ONCE", 13)
    torch.manual_seed(0)
    model = SingleView(Mean(), HEADS[name]()).eval()
    batch = batch_of(3)
    with torch.no_grad():
        expected = model.head.occupancy(model(batch["image"]), batch["points"])
    assert len({tuple(row.tolist()) for row in expected}) == 3
    for prediction, points, values in zip(model.predict(batch), batch["points"], expected):
        torch.testing.assert_close(prediction.occupancy(points), values)


def test_a_head_without_an_inside_has_no_occupancy():
    batch = batch_of(2)
    head = InCamera(batch)
    head.threshold = None
    assert all(p.occupancy is None and p.voxels is None for p in SingleView(Mean(), head).predict(batch))


def test_the_iou_of_a_network_is_measured_at_the_items_points():
    torch.manual_seed(0)
    model = SingleView(Mean(), OccupancyHead([3], code_channels=5, hidden=7, resolution=5, upsampling_steps=0)).eval()
    model.head.decoder.fc_out.bias.data.fill_(-1.4)  # near the protocol's threshold, sigmoid(-1.386) = 0.2
    batch = batch_of(3)
    onet = dataclasses.replace(
        PROTOCOLS["onet"],
        samples=(211, 211),
        iou=tuple(dataclasses.replace(spec, points=101) for spec in PROTOCOLS["onet"].iou),
    )
    summary = evaluate([batch], model.predict, onet, out=None, seed=0, repeats=1)
    expected = []
    for index, item in enumerate(batch["id"]):
        order = torch.randperm(127, generator=generator(0, item, 0, "points"))[:101]
        with torch.no_grad():
            probability = model.head.occupancy(model(batch["image"]), batch["points"][:, order])[index]
        expected.append(float(point_iou((probability >= 0.2)[None], batch["occupancies"][index, order][None])))
    assert 0 < min(expected) < max(expected)
    assert summary.per_instance["IoU (points, network)"] == pytest.approx(sum(expected) / 3)
    assert "IoU (points, network)" in summary.to_markdown()


@pytest.mark.parametrize("name", ["meshrcnn", "quick"])
def test_a_camera_head_is_scored_in_either_frame(name):
    """Viewer-centered predictions against truths of the object frame: moved to the protocol's axes by the camera."""
    protocol = {"quick": QUICK, "meshrcnn": PROTOCOLS["meshrcnn"]}[name]
    protocol = dataclasses.replace(protocol, samples=(211, 211), iou=protocol.iou[1:])  # voxels are 32^3 here
    batch = batch_of(4)
    model = SingleView(Mean(), InCamera(batch))
    assert {p.frame.name for p in model.predict(batch)} == {"camera"}
    summary = evaluate([batch], model.predict, protocol, out=None, seed=0, repeats=1)
    assert summary.n_ok == 4
    for column, value in summary.ceiling.items():
        assert summary.headline[column] == pytest.approx(value, rel=0.15, abs=0.02), column
    if name == "quick":
        assert summary.headline["IoU (points)"] == pytest.approx(1, abs=0.01)
        assert summary.headline["IoU (points, network)"] == pytest.approx(1, abs=0.01)
