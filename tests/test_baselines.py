import pytest
import torch

from tests.naive import voxel_iou_loop
from vision3dgen.models import MeanShape, OracleNeighbor, Retrieval, ShapeLibrary
from vision3dgen.models.baselines import voxel_ious
from vision3dgen.structures import Frame, Meshes

FRAME = Frame("object")


def boxes(count, seed=0):
    """Voxel grids of random boxes, and a mesh per grid whose first vertex tells it apart."""
    generator = torch.Generator().manual_seed(seed)
    voxels = torch.zeros(count, 8, 8, 8, dtype=torch.bool)
    for grid in voxels:
        low = torch.randint(0, 4, (3,), generator=generator).tolist()
        high = torch.randint(5, 8, (3,), generator=generator).tolist()
        grid[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = True
    meshes = Meshes([torch.full((3, 3), float(i)) for i in range(count)], [torch.tensor([[0, 1, 2]])] * count)
    return voxels, meshes


def library(count=5, views=2):
    voxels, meshes = boxes(count)
    images = torch.rand(count * views, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    batches = [
        {
            "image": images[view::views],
            "id": [f"00000000/m{i}/{view:02d}" for i in range(count)],
            "voxels": voxels.float(),
            "mesh": meshes,
        }
        for view in range(views)
    ]
    return ShapeLibrary.gather(batches, lambda x: x.flatten(1)), images, voxels


def test_pairwise_iou_equals_the_loop():
    a, b = boxes(3, seed=1)[0], boxes(4, seed=2)[0]
    a[2] = False
    b[3] = False
    ours = voxel_ious(a, b)
    for i in range(3):
        for j in range(4):
            assert float(ours[i, j]) == pytest.approx(voxel_iou_loop(a[i], b[j]))


def test_a_library_holds_each_model_once_and_each_view():
    shapes, _, voxels = library()
    assert shapes.models == [f"00000000/m{i}" for i in range(5)]
    assert torch.equal(shapes.voxels, voxels)
    assert shapes.features.shape == (10, 48)
    assert shapes.model_of_view.tolist() == [0, 1, 2, 3, 4] * 2
    with pytest.raises(ValueError, match="at least one training batch"):
        ShapeLibrary.gather([], lambda x: x)


def test_retrieval_finds_the_view_it_has_seen():
    shapes, images, voxels = library()
    baseline = Retrieval(shapes, lambda x: x.flatten(1))
    batch = {"image": images[[3, 8]], "frame": [FRAME] * 2}  # views 1 of model 1 and 0 of model 4
    found = baseline.predict(batch)
    assert [float(p.shape.verts_packed()[0, 0]) for p in found] == [1, 4]
    assert torch.equal(found[0].voxels.bool(), voxels[1])


def test_oracle_takes_the_best_overlap():
    shapes, _, voxels = library()
    truth = voxels[2].clone()
    truth[0, 0, 0] = True
    found = OracleNeighbor(shapes).predict({"voxels": truth[None].float(), "frame": [FRAME]})
    assert float(found[0].shape.verts_packed()[0, 0]) == 2


def test_mean_shape_is_the_best_cut_of_the_mean():
    shapes, _, voxels = library()
    baseline = MeanShape(shapes)
    mean = voxels.float().mean(0)
    reached = voxel_ious(baseline.voxels[None].bool(), voxels).mean()
    for level in (0.2, 0.4, 0.6, 0.8, 1.0):
        assert float(voxel_ious((mean >= level)[None], voxels).mean()) <= float(reached) + 1e-6
    predictions = baseline.predict({"frame": [FRAME] * 3})
    assert len(predictions) == 3
    assert not predictions[0].shape.isempty()
