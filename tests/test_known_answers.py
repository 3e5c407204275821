"""Numbers that the evaluators of published systems give, and what ours gives for the same call."""

import math

import pytest
import torch

from vision3dgen.losses import chamfer_distance
from vision3dgen.metrics import chamfer, f_score, normal_consistency, point_iou, surface_distances, voxel_iou
from vision3dgen.ops import ico_sphere, knn_points, sample_points_from_meshes
from vision3dgen.structures import Camera, Meshes

ORIGIN, AWAY = torch.zeros(1, 1, 3), torch.tensor([[[3.0, 4.0, 0.0]]])


@pytest.mark.parametrize("norm, expected", [(2, 50), (1, 14)])
def test_pytorch3ds_chamfer_distance_of_two_points(norm, expected):
    assert float(chamfer_distance(ORIGIN, AWAY, norm=norm).loss) == expected


@pytest.mark.parametrize(
    "system, squared, combine, expected",
    [
        ("Occupancy Networks, Chamfer-L1", False, "mean", 5),
        ("Occupancy Networks, Chamfer-L2", True, "mean", 25),
        ("Mesh R-CNN, AtlasNet, Kaolin", True, "sum", 50),
        ("Kaolin, squared=False", False, "sum", 10),
    ],
)
def test_the_same_points_in_each_system(system, squared, combine, expected):
    distances = surface_distances(ORIGIN[0], None, AWAY[0], None)
    assert float(chamfer(distances, squared=squared, combine=combine)) == expected


def test_a_hemisphere_against_its_sphere():
    """F .555 with recall .427 at a radius of .06 and samples of 2,000, where Kaolin's formula says .670 and .580."""
    sphere = ico_sphere(5)
    streams = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    above = sample_points_from_meshes(sphere, 4000, generator=streams[0])[0]
    above, all_over = above[above[:, 2] > 0], sample_points_from_meshes(sphere, 2000, generator=streams[1])[0]
    distances = surface_distances(above, None, all_over, None)
    scores = f_score(distances, [0.06], comparator="<", squared=False)
    hits, misses = float((distances.to_target < 0.06).sum()), float((distances.to_pred >= 0.06).sum())
    kaolin = hits / (hits + misses)
    assert float(scores.recall) < 0.52 < kaolin
    assert float(scores.f1) < 2 * scores.precision * kaolin / (scores.precision + kaolin) - 0.05


def test_iou_of_nothing_with_nothing():
    empty = torch.zeros(1, 3, 3, 3)
    assert voxel_iou(empty, empty, threshold=0.4, comparator=">=").tolist() == [1]  # theirs: 0 / 0
    assert point_iou(empty.flatten(1), empty.flatten(1)).tolist() == [1]


def test_a_surface_against_itself_has_consistent_normals():
    """Nearest neighbors of other samplings, not the same index: near 1, never the .801 that users report."""
    sphere = ico_sphere(5)
    draws = [sample_points_from_meshes(sphere, 5003, True, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    (x, n), (y, m) = ((points[0], normals[0]) for points, normals in draws)
    assert float(normal_consistency(surface_distances(x, n, y, m), absolute=True)) > 0.995


def test_an_empty_mesh_beside_others_is_sampled_as_zeros():
    empty = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)
    ball = ico_sphere(1)
    batch = Meshes([ball.verts_packed(), empty[0]], [ball.faces_packed(), empty[1]])
    points, normals = sample_points_from_meshes(batch, 7, True)
    assert points[1].abs().sum() == normals[1].abs().sum() == 0
    assert points[0].norm(dim=1).min() > 0.8
    assert batch.get_bounding_boxes()[1].tolist() == [[math.inf, -math.inf]] * 3  # PyTorch3D: IndexError


def test_a_mesh_without_area_is_named():
    flat = Meshes([torch.ones(3, 3)], [torch.tensor([[0, 1, 2]])])
    with pytest.raises(ValueError, match="mesh 0"):  # PyTorch3D: invalid multinomial distribution
        sample_points_from_meshes(flat, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_neighbors_in_other_precisions(dtype):
    found = knn_points(ORIGIN.to(dtype), AWAY.to(dtype))  # PyTorch3D: RuntimeError
    assert found.dists.dtype == dtype
    assert found.dists.item() == 25


@pytest.mark.parametrize("ndc, depth", [(0.67, 0.603), (0.92, 2.441)])
def test_blenders_depth(ndc, depth):
    """The renderings of 3D-R2N2: near 0.1, far 100."""
    camera = Camera.from_r2n2(0.0, 0.0, 1.0)
    projection = camera.to_opengl(near=0.1, far=100.0).projection
    clip = projection @ torch.tensor([0, 0, -0.2002002 / (1.002002 - ndc), 1], dtype=projection.dtype)
    assert float(clip[2] / clip[3]) == pytest.approx(ndc, abs=1e-5)
    assert 0.2002002 / (1.002002 - ndc) == pytest.approx(depth, abs=5e-4)
