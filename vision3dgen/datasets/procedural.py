"""Procedural stand-in for ShapeNet: the 13 categories of 3D-R2N2 as parametric families of watertight, colored meshes.

`make_shape(category, seed)` draws a product: its parameters come from the family's table, its parts from the family's
function, and one boolean union (manifold3d) makes them a single closed surface that still knows each face's part.
The same category and seed give the same bytes. The families are in `vision3dgen.datasets.families`.
"""

import zlib
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from manifold3d import Error
from scipy.spatial import cKDTree

from vision3dgen.datasets.families import COLORS, FAMILIES, Range
from vision3dgen.datasets.solids import union

CATEGORIES: dict[str, str] = {
    "02691156": "airplane",
    "02828884": "bench",
    "02933112": "cabinet",
    "02958343": "car",
    "03001627": "chair",
    "03211117": "display",
    "03636649": "lamp",
    "03691459": "loudspeaker",
    "04090263": "rifle",
    "04256520": "sofa",
    "04379243": "table",
    "04401088": "telephone",
    "04530566": "watercraft",
}


class Shape(NamedTuple):
    """One closed mesh in ShapeNet's object frame: +y up, -z front, bounding box centred at 0 with diagonal 1."""

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    face_part: Int[np.ndarray, " F"]  # index into parts
    parts: tuple[str, ...]
    colors: Float[np.ndarray, "P 3"]  # rgb in [0, 1], one for each part
    parameters: dict[str, float | int | str]


def category_name(category: str) -> str:
    """Name of a category given as a synset id or as the name itself; ValueError with the accepted values otherwise."""
    name = CATEGORIES.get(category, category)
    if name not in FAMILIES:
        accepted = ", ".join(f"{synset} or {name!r}" for synset, name in CATEGORIES.items())
        raise ValueError(f"unknown category {category!r}; choose from {accepted}")
    return name


def parameter_space(category: str) -> dict[str, Range | tuple[str, ...] | tuple[int, ...]]:
    """Parameters of a category: a `Range(low, high)` for each continuous one, a tuple of choices for a discrete one."""
    return dict(FAMILIES[category_name(category)].space)


def draw_parameters(category: str, seed: int) -> dict[str, float | int | str]:
    """One value for each parameter of a category, uniform over its range or its choices."""
    name = category_name(category)
    # Python's hash() of a string changes from process to process; a checksum does not.
    rng = np.random.default_rng(np.random.SeedSequence([zlib.crc32(name.encode()), seed]))
    values: dict[str, float | int | str] = {}
    for key, options in FAMILIES[name].space.items():
        if isinstance(options, Range):
            values[key] = float(rng.uniform(options.low, options.high))
        else:
            values[key] = options[int(rng.integers(len(options)))]
    return values


def build_shape(category: str, parameters: dict[str, float | int | str]) -> Shape:
    """Build a category's shape from values for all of its parameters, drawn or chosen.

    Raises ValueError for an unknown category or parameter, a missing one, or a value outside of `parameter_space`.
    """
    name = category_name(category)
    family = FAMILIES[name]
    if set(parameters) != set(family.space):
        wrong = sorted(set(parameters) ^ set(family.space))
        raise ValueError(f"parameters of {name} must be exactly {list(family.space)}; missing or unknown: {wrong}")
    for key, options in family.space.items():
        value = parameters[key]
        if isinstance(options, Range):
            if isinstance(value, str) or not options.low <= value <= options.high:
                raise ValueError(f"{name} parameter {key} must be in [{options.low}, {options.high}], got {value!r}")
        elif value not in options:
            raise ValueError(f"{name} parameter {key} must be one of {list(options)}, got {value!r}")
    built = family.build(SimpleNamespace(**parameters))
    solids = [solid.as_original() for solid, _ in built.values()]
    part_of = {solid.original_id(): i for i, solid in enumerate(solids)}
    merged = union(*solids).simplify(1e-5)
    assert merged.status() == Error.NoError
    # Parts can enclose an empty space that nobody would ever see; its shell is dropped, so the inside is filled.
    outer = [component for component in merged.decompose() if component.volume() > 0]
    assert len(outer) == 1, f"{name} fell apart into {len(outer)} pieces: {parameters}"
    mesh = outer[0].to_mesh64()
    starts = mesh.run_index  # three times the first face of each run of faces that come from one part
    counts = [(stop - start) // 3 for start, stop in pairwise(starts)]
    owners = [part_of[original] for original in mesh.run_original_id]
    vertices, faces, face_part = canonical_order(
        unit_diagonal(mesh.vert_properties[:, :3]),
        np.array(mesh.tri_verts, np.int64),
        np.repeat(np.array(owners, np.int64), counts),
    )
    vertices = unit_diagonal(separate(vertices, faces))
    colors = np.array([COLORS[color] for _, color in built.values()])
    return Shape(vertices, faces, face_part, tuple(built), colors, dict(parameters))


def unit_diagonal(vertices: Float[np.ndarray, "V 3"]) -> Float[np.ndarray, "V 3"]:
    """Centre the bounding box at the origin and make its diagonal 1."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return (vertices - (low + high) / 2) / np.sqrt(((high - low) ** 2).sum())


def separate(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]) -> Float[np.ndarray, "V 3"]:
    """Move vertices closer than 2e-6 to one another, or on a face without area, by 1e-5 towards their neighbors.

    Where parts touch along an edge, the union has two sheets there with vertices of their own. A file with six digits,
    or a loader that merges equal positions, would turn them into one edge of four faces and the mesh would leak.
    """
    for _ in range(20):
        crowded = np.unique(cKDTree(vertices).query_pairs(2e-6, output_type="ndarray"))
        corners = vertices[faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        crowded = np.union1d(crowded, faces[(normals**2).sum(axis=1) < 1e-24])
        if len(crowded) == 0:
            return vertices
        total = np.zeros_like(vertices)
        np.add.at(total, faces, corners.sum(axis=1, keepdims=True) - corners)
        count = 2 * np.bincount(faces.reshape(-1), minlength=len(vertices))[:, None]
        step = (total / count - vertices)[crowded]
        step /= np.sqrt((step**2).sum(axis=1, keepdims=True) + 1e-18)
        # Vertices of mirrored sheets would keep meeting: their numbers tell them apart.
        step += 0.5 * ((crowded[:, None] * np.array([0.618034, 0.754878, 0.569840])) % 1.0 - 0.5)
        vertices = vertices.copy()
        vertices[crowded] += 1e-5 * step
    raise AssertionError("vertices did not separate")


def canonical_order(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], face_part: Int[np.ndarray, " F"]
) -> tuple[Float[np.ndarray, "V 3"], Int[np.ndarray, "F 3"], Int[np.ndarray, " F"]]:
    """Sort vertices by position, start each face at its first vertex, and sort faces by part, then by vertices.

    The order then depends on the surface alone, whatever order the booleans happened to work in.
    """
    order = np.lexsort(vertices.T[::-1])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    faces = rank[faces]
    first = faces.argmin(axis=1)
    faces = np.take_along_axis(faces, (first[:, None] + np.arange(3)) % 3, axis=1)
    rows = np.lexsort((*faces.T[::-1], face_part))
    return vertices[order], faces[rows], face_part[rows]


def make_shape(category: str, seed: int) -> Shape:
    """Draw a shape of a category, given as a synset id or a name; the same arguments give the same bytes.

    Raises ValueError for an unknown category, naming the accepted ones, and for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return build_shape(category, draw_parameters(category, seed))
