import pytest
import torch

from tests import naive
from vision3dgen.ops import FeatureLayout
from vision3dgen.ops.planes import PLANES, maximum_by_cell, mean_by_cell

LAYOUT = FeatureLayout(tuple(PLANES), padding=0.1, resolution=7, grid_resolution=5)


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plane", sorted(PLANES))
def test_means_and_maxima_equal_the_loops(plane):
    points, features = (draw(61, 3) - 0.5) * 1.3, draw(61, 3, seed=1) - 0.5  # some outside the cube
    cells, sides = LAYOUT.cells(points, plane), LAYOUT.sides(plane)
    means = mean_by_cell(features, cells, torch.Size(sides).numel()).view(*sides, 3).movedim(-1, 0)
    resolution = sides[0]
    torch.testing.assert_close(means, naive.cell_means(features, points, PLANES[plane], resolution, 0.1))
    maxima = maximum_by_cell(features, cells.unique(return_inverse=True)[1])
    assert torch.equal(maxima, naive.cell_maxima(features, points, PLANES[plane], resolution, 0.1))


@pytest.mark.parametrize("plane", sorted(PLANES))
def test_a_linear_map_is_read_as_it_is(plane):
    layout = FeatureLayout((plane,), resolution=7, grid_resolution=5)
    axes, side = PLANES[plane], layout.sides(plane)[0]
    at = torch.linspace(0, 1, side, dtype=torch.float64)  # the outermost cells lie on the faces
    values = torch.zeros((side,) * len(axes), dtype=torch.float64)
    for place in range(len(axes)):
        shape = [1] * len(axes)
        shape[len(axes) - 1 - place] = side  # the first axis is the last of the map
        values = values + (place + 2) * at.view(shape)
    points = (draw(2, 31, 3).double() - 0.5) * 1.1
    coordinates = layout.coordinates(points, plane)
    expected = sum((place + 2) * coordinates[..., place] for place in range(len(axes)))
    maps = values.expand(2, 1, *values.shape)
    torch.testing.assert_close(layout.sample([maps], points)[..., 0], expected)


@pytest.mark.parametrize(
    "plane, cell", [("xz", (1, 6)), ("xy", (3, 6)), ("yz", (1, 3)), ("grid", (1, 2, 4))]
)  # of 7, or 5
def test_maps_have_their_first_axis_last(plane, cell):
    point = torch.tensor([[0.5, 0.0, -0.33]])  # x at the far end, y in the middle, z near the low end
    sides = LAYOUT.sides(plane)
    values = mean_by_cell(torch.ones(1, 1), LAYOUT.cells(point, plane), torch.Size(sides).numel()).view(*sides)
    assert values.nonzero().tolist() == [list(cell)]


def test_maps_are_summed_and_an_outside_point_reads_the_border():
    maps = [draw(2, 3, *LAYOUT.sides(plane), seed=seed) for seed, plane in enumerate(LAYOUT.planes)]
    points = (draw(2, 11, 3, seed=9) - 0.5) * 1.1
    each = [
        FeatureLayout((plane,), resolution=7, grid_resolution=5).sample([own], points)
        for plane, own in zip(LAYOUT.planes, maps)
    ]
    torch.testing.assert_close(LAYOUT.sample(maps, points), torch.stack(each).sum(0))
    far, border = torch.tensor([[[9.0, -7, 0.1]]]), torch.tensor([[[0.55, -0.55, 0.1]]])
    one = [values[:1] for values in maps]
    torch.testing.assert_close(LAYOUT.sample(one, far), LAYOUT.sample(one, border), atol=5e-3, rtol=0)


def test_reading_is_differentiable_in_maps_and_points():
    layout = FeatureLayout(("xz", "grid"), resolution=3, grid_resolution=2)
    maps = [draw(1, 2, *layout.sides(plane)).double().requires_grad_() for plane in layout.planes]
    points = ((draw(1, 5, 3, seed=3).double() - 0.5) * 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *m: layout.sample(m, x), (points, *maps))


def test_no_points_give_empty_maps():
    nothing = torch.zeros(0, 3)
    assert mean_by_cell(nothing, LAYOUT.cells(nothing, "xy"), 49).abs().sum() == 0
    assert maximum_by_cell(nothing, torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    maps = [draw(2, 3, *LAYOUT.sides(plane)) for plane in LAYOUT.planes]
    assert LAYOUT.sample(maps, torch.zeros(2, 0, 3)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"planes": ("xz", "zx")}, r"unknown plane 'zx'.*choose from \['grid', 'xy', 'xz', 'yz'\]"),
        ({"planes": ()}, "one or more of"),
        ({"planes": ("xy", "xy")}, "each once"),
        ({"padding": -0.1}, "padding must be at least 0"),
        ({"resolution": 0}, "resolution and grid_resolution at least 1"),
    ],
)
def test_faults_of_a_layout_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureLayout(**settings)


def test_a_map_for_each_plane():
    with pytest.raises(ValueError, match=r"one map for each of \['xz', 'xy', 'yz'\], got 2"):
        FeatureLayout().sample([draw(1, 2, 64, 64)] * 2, draw(1, 3, 3))
