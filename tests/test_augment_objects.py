"""Objects under augmentation: class maps, meshes, and rows that leave together with their boxes."""

import pytest
import torch

from vision3dgen.datasets import Augment, DropInvisible, collate
from vision3dgen.datasets.augment import Crop, Flip, Rotate, Translate
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Camera, Meshes

HEIGHT, WIDTH = 23, 29


def scene() -> dict:
    """Three objects; a map that holds the number of each in its box, 9 elsewhere."""
    boxes = torch.tensor([[1, 2, 6, 9], [8, 3, 19, 12], [20, 15, 28, 22]]).float()
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    semantic = torch.full((HEIGHT, WIDTH), 9)
    for number, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        masks[number, y1:y2, x1:x2] = True
        semantic[y1:y2, x1:x2] = number
    return {
        "image": torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)),
        "boxes": boxes, "labels": torch.tensor([3, 1, 2]), "crowd": torch.tensor([False, True, False]),
        "areas": torch.tensor([35.0, 99.0, 56.0]), "masks": masks, "semantic": semantic, "panoptic": semantic + 1,
        "segment_labels": torch.tensor([3, 1, 2]), "id": "a",
    }  # fmt: skip


def test_rows_leave_together_with_their_boxes():
    found = Augment([Crop((23, 9), center=True), DropInvisible()])(scene())  # columns 10 to 19
    assert found["boxes"].tolist() == [[0, 3, 9, 12]]
    assert found["labels"].tolist() == [1]
    assert found["crowd"].tolist() == [True]
    assert found["areas"].tolist() == [99]
    assert found["boxes_visible"].tolist() == [True]
    assert found["masks"].shape == (1, 23, 9)
    assert found["segment_labels"].tolist() == [3, 1, 2]  # numbers of the map, not rows of boxes
    left = Augment([Translate(0.0), Crop((3, 3), center=True), DropInvisible(min_side=4)])(scene())
    assert left["boxes"].shape == (0, 4)
    assert left["labels"].shape == (0,)
    assert left["masks"].shape == (0, 3, 3)


def test_only_what_is_seen_stays():
    hidden = scene()
    hidden["masks"][1] = False  # behind something
    assert Augment([DropInvisible()])(hidden)["labels"].tolist() == [3, 2]
    assert Augment([DropInvisible(min_side=8)])(scene())["labels"].tolist() == [1]
    with pytest.raises(ValueError, match="needs the key 'boxes'"):
        Augment([DropInvisible()])({"image": scene()["image"]})
    with pytest.raises(ValueError, match="min_side"):
        DropInvisible(-1)


def test_maps_move_with_the_masks_and_nothing_is_asked_outside():
    for step in (Flip(1.0), Rotate(35), Translate(0.4)):
        found = Augment([step])(scene(), torch.Generator().manual_seed(2))
        for number in range(3):
            assert torch.equal(found["semantic"] == number, found["masks"][number])
        assert torch.equal(found["panoptic"] == 0, found["semantic"] == 255)
        assert found["semantic"].dtype == torch.int64
        assert set(found["semantic"].unique().tolist()) <= {0, 1, 2, 9, 255}


def test_a_batch_is_its_samples():
    items = [scene(), scene() | {"id": "b"}]
    items[1] = {k: (v[:1] if k in ("boxes", "labels", "crowd", "areas", "masks") else v) for k, v in items[1].items()}
    steps = [Flip(1.0), DropInvisible()]
    batch = Augment(steps)(collate(items))
    for index, item in enumerate(items):
        alone = Augment(steps)(item)
        for key in ("boxes", "labels", "crowd", "masks", "semantic", "panoptic"):
            assert torch.equal(batch[key][index], alone[key]), key


def test_meshes_in_the_cameras_frame_follow_the_picture():
    camera = Camera.look_at((0.0, 0.0, -4.0), field_of_view=40, image_size=(HEIGHT, WIDTH))
    ball = ico_sphere(1)
    places = torch.tensor([[0.4, 0.2, 4.0], [-0.5, -0.3, 5.0]])
    verts = [ball.verts_packed() * 0.2 + place for place in places]
    mesh = Meshes(verts, [ball.faces_packed()] * 2)
    pixels = [camera.project(camera.camera_to_world(v)).pixels for v in verts]
    boxes = torch.stack([torch.cat([p.amin(0), p.amax(0)]) for p in pixels])
    sample = {"image": torch.zeros(3, HEIGHT, WIDTH), "boxes": boxes, "mesh": mesh, "camera": camera}
    sample |= {"labels": torch.tensor([1, 2])}
    for step in (Flip(1.0), Rotate(30)):
        found = Augment([step])(sample, torch.Generator().manual_seed(1))
        lens = found["camera"]
        for new, old in zip(found["mesh"].verts_list(), pixels):
            seen = lens.project(lens.camera_to_world(new)).pixels
            if isinstance(step, Flip):
                torch.testing.assert_close(seen, torch.stack([WIDTH - old[:, 0], old[:, 1]], 1), atol=1e-3, rtol=0)
            else:
                middle = torch.tensor([WIDTH / 2, HEIGHT / 2])
                torch.testing.assert_close((seen - middle).norm(dim=1), (old - middle).norm(dim=1), atol=1e-3, rtol=0)
        first, normals = found["mesh"].verts_list()[0], found["mesh"][0].verts_normals_packed()
        outward = (normals * (first - first.mean(0))).sum(1)
        assert bool((outward > 0).all())
    gone = Augment([Crop((HEIGHT, 10), center=True), DropInvisible()])(sample)
    assert len(gone["mesh"]) == len(gone["boxes"]) == len(gone["labels"])
