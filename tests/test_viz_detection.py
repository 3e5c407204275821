"""Pictures of what was found: where the ink is, and where it is not."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision3dgen.datasets import PennFudan
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Camera, Detections, PanopticSegments
from vision3dgen.viz import class_picture, detection_gallery, draw_detections, number_color, panoptic_picture

SIZE = (90, 120)


def found(**more) -> Detections:
    boxes = torch.tensor([[20.0, 30, 60, 70], [70, 40, 110, 80]])
    return Detections(boxes, torch.tensor([0.9, 0.3]), torch.tensor([1, 2]), **more)


def inked(picture: np.ndarray) -> np.ndarray:
    return (picture != 255).any(-1)


def test_boxes_masks_and_thresholds():
    white = torch.ones(3, *SIZE)
    picture = draw_detections(white, found(), names=["ball", "box"])
    color = (255 * number_color(0)).round().astype(np.uint8)
    for row, column in ((30, 40), (69, 40), (50, 20), (50, 59)):
        assert picture[row, column].tolist() == color.tolist()
    assert picture[50, 40].tolist() == [255, 255, 255]
    assert not inked(picture)[:, 72:].any()  # below the threshold
    assert inked(draw_detections(white, found(), threshold=0.2))[60, 70]

    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 40:60, 30:50] = True
    tinted = draw_detections(white, found(masks=masks))
    assert tinted[50, 40].tolist() == pytest.approx((255 * (0.55 + 0.45 * number_color(0))).tolist(), abs=1)
    assert tinted[40, 40].tolist() == color.tolist()  # the border
    assert tinted[36, 40].tolist() == [255, 255, 255]
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert (draw_detections(white, nothing) == 255).all()


def test_silhouettes_are_where_the_camera_sees_the_mesh():
    camera = Camera.look_at((0, 0, -4.0), field_of_view=40, image_size=SIZE)
    ball = ico_sphere(2)
    mesh = ball.update_padded(ball.verts_padded() * 0.3 + torch.tensor([0.4, 0.2, 4.0]))
    one = Detections(torch.zeros(1, 4), torch.ones(1), torch.ones(1, dtype=torch.int64), meshes=mesh)
    picture = draw_detections(torch.ones(3, *SIZE), one, camera=camera, names=[""], scores=False)
    pixels = camera.project(camera.camera_to_world(mesh.verts_packed())).pixels
    column, row = pixels.mean(0).long().tolist()
    assert inked(picture)[row, column]
    low, high = pixels.amin(0), pixels.amax(0)
    rows, columns = np.nonzero(inked(picture)[20:])  # below the plate with the name
    assert columns.min() >= low[0] - 1
    assert columns.max() <= high[0] + 1
    assert rows.max() + 20 <= high[1] + 1
    with pytest.raises(ValueError, match="the camera's image_size"):
        draw_detections(torch.ones(3, 10, 10), one, camera=camera)


def test_colors_differ():
    colors = [tuple((255 * number_color(k)).round().tolist()) for k in range(21)]
    assert len(set(colors)) == 21
    assert all(0 <= value <= 255 for color in colors for value in color)


def test_maps_and_segments():
    classes = torch.zeros(6, 8, dtype=torch.int64)
    classes[:, 4:] = 1
    classes[0] = 255
    picture = class_picture(classes)
    assert (picture[0] == 255).all()
    assert picture[3, 1].tolist() == (255 * number_color(0)).round().astype(int).tolist()
    over = class_picture(classes, torch.zeros(3, 6, 8))
    assert (over[0] == 0).all()
    segments = PanopticSegments(classes.clamp(max=2), torch.tensor([3, 5]), torch.ones(2))
    drawn = panoptic_picture(segments)
    assert (drawn[3, 3] == 40).all()
    assert (drawn[3, 1] == 255).all()  # no segment
    assert drawn[3, 6].tolist() == (255 * number_color(3)).round().astype(int).tolist()


def test_a_sheet_of_pedestrians(shared_data, tmp_path):
    data = PennFudan(shared_data / "pennfudan", "test", max_side=160)
    items = [data[i] for i in range(2)]
    truths = [
        Detections(item["boxes"], torch.zeros(len(item["boxes"])), item["labels"], item["masks"]) for item in items
    ]
    guesses = [truth._replace(scores=torch.linspace(0.9, 0.2, len(truth.scores))) for truth in truths]
    path = tmp_path / "pedestrians.png"
    sheet = detection_gallery([i["image"] for i in items], truths, {"guess": guesses}, path, names=["pedestrian"])
    assert (np.array(Image.open(path)) == sheet).all()
    with pytest.raises(ValueError, match="guess must be 2"):
        detection_gallery([i["image"] for i in items], truths, {"guess": guesses[:1]})
