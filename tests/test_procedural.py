"""Procedural shapes: closed, canonical, reproducible, and as varied as their parameters say."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import pi, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh
from manifold3d import Manifold, Mesh64

from vision3dgen.datasets import solids
from vision3dgen.datasets.families import FAMILIES, Range
from vision3dgen.datasets.procedural import (
    CATEGORIES,
    Shape,
    build_shape,
    canonical_order,
    draw_parameters,
    make_shape,
    parameter_space,
    separate,
)
from vision3dgen.datasets.solids import ROUND, SQUARE

NAMES = list(CATEGORIES.values())


def digest(shape: Shape) -> str:
    """One hash of everything in a shape."""
    arrays = (shape.vertices, shape.faces, shape.face_part, shape.colors)
    text = json.dumps([shape.parts, shape.parameters])
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays) + text.encode()).hexdigest()


def edges_are_paired(faces: np.ndarray) -> bool:
    """Every directed edge occurs once, and so does its reverse: closed, manifold along edges and consistently wound."""
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    unique = {(int(a), int(b)) for a, b in directed}
    return len(unique) == len(directed) and all((b, a) in unique for a, b in unique)


def as_solid(shape: Shape) -> Manifold:
    """The shape stretched to fill the unit cube, for comparing what is left when scales are gone."""
    low, high = shape.vertices.min(axis=0), shape.vertices.max(axis=0)
    return Manifold(Mesh64((shape.vertices - low) / (high - low), shape.faces.astype(np.uint64)))


def test_the_categories_are_those_of_r2n2_in_order():
    assert list(CATEGORIES.items()) == [
        ("02691156", "airplane"),
        ("02828884", "bench"),
        ("02933112", "cabinet"),
        ("02958343", "car"),
        ("03001627", "chair"),
        ("03211117", "display"),
        ("03636649", "lamp"),
        ("03691459", "loudspeaker"),
        ("04090263", "rifle"),
        ("04256520", "sofa"),
        ("04379243", "table"),
        ("04401088", "telephone"),
        ("04530566", "watercraft"),
    ]
    assert list(FAMILIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(7))
def test_shapes_are_closed_connected_and_canonical(name: str, seed: int) -> None:
    shape = make_shape(name, seed)
    vertices, faces = shape.vertices, shape.faces
    assert vertices.dtype == np.float64
    assert faces.dtype == shape.face_part.dtype == np.int64
    assert 50 < len(faces) < 10_000
    assert edges_are_paired(faces)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0
    assert mesh.body_count == 1
    assert mesh.area_faces.min() > 1e-13
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    np.testing.assert_allclose(np.linalg.norm(high - low), 1.0, atol=1e-12)
    np.testing.assert_allclose(low + high, 0.0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_six_digits_or_float32_keeps_shapes_closed(name: str) -> None:
    for seed in range(11, 16):
        shape = make_shape(name, seed)
        for vertices in (shape.vertices.round(6), shape.vertices.astype(np.float32)):
            _, merged = np.unique(vertices, axis=0, return_inverse=True)
            assert edges_are_paired(merged.reshape(-1)[shape.faces]), seed


@pytest.mark.parametrize("name", NAMES)
def test_faces_know_their_part_and_parts_their_color(name: str) -> None:
    for seed in range(3):
        shape = make_shape(name, seed)
        assert len(shape.parts) == len(set(shape.parts)) == len(shape.colors) >= 2
        assert shape.face_part.shape == (len(shape.faces),)
        assert set(shape.face_part) <= set(range(len(shape.parts)))
        assert len(set(shape.face_part)) >= 2
        assert shape.colors.min() >= 0
        assert shape.colors.max() <= 1


def part_center(shape: Shape, part: str) -> np.ndarray:
    """Mean of the corners of a part's faces."""
    faces = shape.faces[shape.face_part == shape.parts.index(part)]
    return shape.vertices[faces].reshape(-1, 3).mean(axis=0)


def test_the_front_is_negative_z_and_up_is_y():
    for seed in range(5):
        car = make_shape("car", seed)
        assert part_center(car, "headlights")[2] < -0.2
        assert part_center(car, "taillights")[2] > 0.2
        assert part_center(car, "tires")[1] < part_center(car, "windows")[1]
        assert abs(part_center(car, "tires")[0]) < 0.01
        chair = make_shape("chair", seed)
        assert part_center(chair, "back")[2] > part_center(chair, "seat")[2] + 0.05
        assert part_center(chair, "base")[1] < part_center(chair, "seat")[1] < part_center(chair, "back")[1]
        plane = make_shape("airplane", seed)
        assert part_center(plane, "canopy")[2] < part_center(plane, "wings")[2] < part_center(plane, "fin")[2]
        rifle = make_shape("rifle", seed)
        assert part_center(rifle, "barrel")[2] < part_center(rifle, "receiver")[2] < part_center(rifle, "stock")[2]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_from_the_declared_space(name: str) -> None:
    space = parameter_space(name)
    continuous = {key: options for key, options in space.items() if isinstance(options, Range)}
    discrete = {key: options for key, options in space.items() if not isinstance(options, Range)}
    assert len(continuous) >= 8
    assert all(options.low < options.high for options in continuous.values())
    assert len(discrete) >= 2
    assert all(len(set(options)) == len(options) >= 2 for options in discrete.values())
    for seed in range(50):
        values = draw_parameters(name, seed)
        assert list(values) == list(space)
        assert all(options.low <= float(values[key]) < options.high for key, options in continuous.items())
        assert all(values[key] in options for key, options in discrete.items())
    assert make_shape(name, 3).parameters == draw_parameters(name, 3)


def built_parts(name: str, values: dict[str, float | int | str]) -> list[tuple[str, str, bytes]]:
    """Name, color and surface of each part, before the union."""
    parts = FAMILIES[name].build(SimpleNamespace(**values))
    return [(part, color, solid.to_mesh64().vert_properties.tobytes()) for part, (solid, color) in parts.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_changes_some_shape(name: str) -> None:
    idle = set(parameter_space(name))
    for seed in range(40):
        values = draw_parameters(name, seed)
        before = built_parts(name, values)
        for key in sorted(idle):
            options = parameter_space(name)[key]
            if isinstance(options, Range):
                other = options.low if float(values[key]) > sum(options) / 2 else options.high
                changed = [values | {key: other}]
            else:
                changed = [values | {key: option} for option in options if option != values[key]]
            if any(built_parts(name, trial) != before for trial in changed):
                idle.discard(key)
        if not idle:
            break
    assert not idle


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_extreme_parameters_still_make_one_closed_shape(name: str) -> None:
    space = parameter_space(name)
    rng = np.random.default_rng(7)
    for _ in range(12):
        values = {
            key: options[int(rng.integers(2))]
            if isinstance(options, Range)
            else options[int(rng.integers(len(options)))]
            for key, options in space.items()
        }
        shape = build_shape(name, values)
        mesh = trimesh.Trimesh(shape.vertices, shape.faces, process=False)
        assert mesh.is_watertight
        assert mesh.body_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_two_seeds_are_two_products_and_not_one_scaled(name: str) -> None:
    solids = [as_solid(make_shape(name, seed)) for seed in range(6)]
    overlaps = [
        (a ^ b).volume() / (a + b).volume() for i, a in enumerate(solids) for b in solids[i + 1 :]
    ]  # intersection over union, bounding boxes made equal
    assert max(overlaps) < 0.99
    assert np.quantile(overlaps, 0.8) < 0.92  # the closest are cabinets: boxes differ by what the stretch takes away
    assert np.mean(overlaps) < 0.87


def test_synset_and_name_mean_the_same_category():
    assert digest(make_shape("02933112", 5)) == digest(make_shape("cabinet", 5))


def test_the_same_seed_gives_the_same_bytes_in_every_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_procedural import *;"
        "print(*[digest(make_shape(name, 2)) for name in NAMES])"
    )
    here = [digest(make_shape(name, 2)) for name in NAMES]
    assert len(set(here)) == len(NAMES)
    for hash_seed, threads in (("1", "1"), ("2", "2")):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads}
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
        assert output.split() == here


@pytest.mark.parametrize("call", [make_shape, draw_parameters])
def test_an_unknown_category_is_refused_with_the_accepted_ones(call: Callable[[str, int], object]) -> None:
    with pytest.raises(ValueError, match=r"unknown category 'boat'.*04530566 or 'watercraft'"):
        call("boat", 0)


def test_bad_seeds_and_parameters_are_refused():
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        make_shape("chair", -1)
    values = draw_parameters("chair", 0)
    with pytest.raises(ValueError, match=r"missing or unknown: .'wheels'"):
        build_shape("chair", values | {"wheels": 4})
    with pytest.raises(ValueError, match=r"chair parameter width must be in \[0.42, 0.56\], got 7.0"):
        build_shape("chair", values | {"width": 7.0})
    with pytest.raises(ValueError, match=r"chair parameter width must be in .* got nan"):
        build_shape("chair", values | {"width": float("nan")})
    with pytest.raises(ValueError, match=r"chair parameter back must be one of .*'ladder'.* got 'throne'"):
        build_shape("chair", values | {"back": "throne"})


def test_order_does_not_depend_on_how_the_mesh_was_listed():
    shape = make_shape("bench", 1)
    rng = np.random.default_rng(0)
    new_of_old = rng.permutation(len(shape.vertices))
    vertices = np.empty_like(shape.vertices)
    vertices[new_of_old] = shape.vertices
    rows = rng.permutation(len(shape.faces))
    faces = np.roll(new_of_old[shape.faces][rows], 1, axis=1)
    result = canonical_order(vertices, faces, shape.face_part[rows])
    expected = canonical_order(shape.vertices, shape.faces, shape.face_part)
    for a, b in zip(result, expected):
        np.testing.assert_array_equal(a, b)


def test_sheets_that_touch_along_an_edge_are_separated():
    cube = trimesh.creation.box()
    vertices = np.concatenate([cube.vertices, cube.vertices + np.array([1.0, 1.0, 0.0])])
    faces = np.concatenate([cube.faces, cube.faces + 8]).astype(np.int64)

    def merged_edges_are_paired(points: np.ndarray) -> bool:
        _, index = np.unique(points.round(6), axis=0, return_inverse=True)
        return edges_are_paired(index.reshape(-1)[faces])

    assert not merged_edges_are_paired(vertices)
    moved = separate(vertices, faces)
    assert merged_edges_are_paired(moved)
    assert np.abs(moved - vertices).max() < 2e-5
    np.testing.assert_array_equal(separate(moved, faces), moved)


# The vocabulary of solids, against volumes and extents known in closed form


def extent(solid: Manifold) -> np.ndarray:
    """Lower and upper corner of the bounding box, (2, 3)."""
    return np.array(solid.bounding_box()).reshape(2, 3)


def test_boxes():
    solid = solids.box((2.0, 3.0, 5.0), (1.0, 0.0, -1.0))
    np.testing.assert_allclose(solid.volume(), 30.0, rtol=1e-6)
    np.testing.assert_allclose(extent(solid), [[0, -1.5, -3.5], [2, 1.5, 1.5]], atol=1e-6)
    # Chamfers of leg b cut 12 edge prisms of b^2/2 less what they share: the eight corners keep b^3/6 of each b-cube.
    b = 0.25
    edges = 4 * b**2 / 2 * (2 + 3 + 5 - 6 * b)
    np.testing.assert_allclose(solids.box((2, 3, 5), bevel=b).volume(), 30 - edges - 8 * b**3 * 5 / 6, rtol=1e-5)
    assert solids.box((2, 3, 5), bevel=b).volume() < solids.box((2, 3, 5), bevel=b, segments=3).volume() < 30


def test_lofts_along_each_axis():
    for axis, order in {"x": (2, 1, 0), "y": (0, 2, 1), "z": (0, 1, 2)}.items():
        top = [0.0, 0.0, 0.0]
        top[order[2]] = 3.0
        solid = solids.loft([((0, 0, 0), 2.0, 4.0), ((top[0], top[1], top[2]), 1.0, 2.0)], axis, SQUARE)
        np.testing.assert_allclose(solid.volume(), 3.0 / 3 * (8 + 2 + sqrt(8 * 2)), rtol=1e-5)
        size = extent(solid)[1] - extent(solid)[0]
        np.testing.assert_allclose(size[list(order)], [2.0, 4.0, 3.0], atol=1e-5)


def test_round_solids_approach_their_formulas():
    polygon = 20 / 2 * np.sin(2 * pi / 20) * (0.5 / np.cos(pi / 20)) ** 2  # area of ROUND, whose flats touch the square
    assert solids.lathe([(0, 2.0), (3, 2.0)]).volume() == pytest.approx(polygon * 4 * 3, rel=1e-4)
    assert solids.lathe([(3, 2.0), (0, 2.0)]).volume() > 0  # stations in either direction
    twelve = 12 / 2 * np.sin(2 * pi / 12)
    assert solids.tube([(1, 1, 1), (1, 4, 5)], 0.5).volume() == pytest.approx(twelve * 0.25 * 5, rel=1e-4)
    np.testing.assert_allclose(
        extent(solids.ellipsoid((1, 2, 3), (1, 1, 1))), [[0.5, 0, -0.5], [1.5, 2, 2.5]], atol=1e-6
    )
    np.testing.assert_allclose(
        extent(solids.torus(2.0, 0.5, "x")), [[-0.25, -1.25, -1.25], [0.25, 1.25, 1.25]], atol=0.02
    )
    np.testing.assert_allclose(
        extent(solids.cushion((3, 1, 2), axis="z")), [[-1.5, -0.5, -1], [1.5, 0.5, 1]], atol=1e-5
    )


def test_extrusions_keep_their_orientation():
    corner = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (0, 2)]  # an L, no convex outline
    for outline in (corner, corner[::-1]):
        assert solids.extrude(outline, 2.0, "z").volume() == pytest.approx(8.0, rel=1e-6)
    np.testing.assert_allclose(extent(solids.extrude(corner, 2.0, "x")), [[-1, 0, 0], [1, 2, 3]], atol=1e-6)
    np.testing.assert_allclose(extent(solids.extrude(corner, 2.0, "y")), [[0, -1, 0], [3, 1, 2]], atol=1e-6)
    np.testing.assert_allclose(extent(solids.extrude(corner, 2.0, "z")), [[0, 0, -1], [3, 2, 1]], atol=1e-6)
    beveled = solids.extrude(solids.rectangle(2, 1), 0.5, "y", bevel=0.1)
    np.testing.assert_allclose(extent(beveled), [[-1, -0.25, -0.5], [1, 0.25, 0.5]], atol=1e-6)
    assert beveled.volume() < 1.0


def test_outlines():
    for outline in (ROUND, SQUARE, solids.superellipse(5.0, 24)):
        np.testing.assert_allclose([outline.min(axis=0), outline.max(axis=0)], [[-0.5, -0.5], [0.5, 0.5]], atol=1e-12)
    waypoints = [(0, 0, 0), (1, 0, 0), (1, 2, 0), (4, 2, 1)]
    np.testing.assert_allclose(solids.curve(waypoints, 5)[::5], waypoints, atol=1e-12)
    path = solids.rounded(waypoints, 0.3, closed=False)
    np.testing.assert_allclose(path[[0, -1]], [waypoints[0], waypoints[-1]])
    np.testing.assert_allclose(path[1], (0.7, 0, 0))
    np.testing.assert_allclose(path[3], (0.925, 0.075, 0))  # the parabola's middle: a quarter, a half and a quarter
    strip = solids.arc_strip(2.0, 0.3, 0.1)
    np.testing.assert_allclose([strip[0], strip[6]], [(-1, 0), (0, 0.3)], atol=1e-12)


def test_unions_move_solids_less_than_anyone_sees_and_mirrors_are_symmetric():
    boxes = [solids.box((1, 1, 1), (0.9 * i, 0, 0)) for i in range(5)]
    np.testing.assert_allclose(extent(solids.union(*boxes)), [[-0.5, -0.5, -0.5], [4.1, 0.5, 0.5]], atol=5.1e-4)
    pair = solids.both(solids.box((1, 1, 1), (0.4, 0, 0)))
    np.testing.assert_allclose(extent(pair)[:, 0], [-0.9, 0.9], atol=5.1e-4)
    np.testing.assert_allclose(solids.spread(4, 2.0), [-0.75, -0.25, 0.25, 0.75])
