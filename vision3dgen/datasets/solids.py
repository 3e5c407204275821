"""Solid primitives: outlines, lofts, lathes, tubes, boxes, cushions, and their unions and intersections.

Solids live in ShapeNet's object frame: +y up, -z front, x to the side.
"""

from collections.abc import Sequence
from math import inf, pi

import numpy as np
from manifold3d import CrossSection, Manifold, Mesh64, OpType
from numpy.typing import ArrayLike, NDArray

Number = float | int
Point = tuple[Number, Number, Number]
Array = NDArray[np.float64]
Station = tuple[Point, Number, Number]  # centre of a section, its width and its depth


# Outlines: closed polygons in the plane, (N, 2)


def superellipse(exponent: Number = 2.0, sides: int = 24) -> Array:
    """Outline |2x|^n + |2y|^n = 1 in the unit square about the origin; n = inf with 4 sides is the square itself."""
    angle = (np.arange(sides) + 0.5) * (2 * pi / sides)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.sign(circle) * np.abs(circle) ** (2.0 / exponent)
    return points / (2 * np.abs(points).max(axis=0))


SQUARE = superellipse(inf, 4)
ROUND = superellipse(2.0, 20)
SOFT = superellipse(5.0, 24)  # a square with soft corners


def rounded(points: ArrayLike, radius: Number, closed: bool = True, segments: int = 4) -> Array:
    """Polyline with its corners replaced by parabolic arcs that start `radius` before the corner."""
    corners = np.asarray(points, float)
    result = []
    for i, corner in enumerate(corners):
        if not closed and i in (0, len(corners) - 1):
            result.append(corner)
            continue
        ends = []
        for other in (corners[i - 1], corners[(i + 1) % len(corners)]):
            length = float(np.sqrt(((other - corner) ** 2).sum()))
            ends.append(corner + (other - corner) * min(radius / length, 0.45))
        t = np.linspace(0.0, 1.0, segments + 1)[:, None]
        result.extend((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * corner + t**2 * ends[1])
    return np.stack(result)


def rectangle(width: Number, depth: Number, radius: Number = 0.0, taper: Number = 1.0) -> Array:
    """Rectangle about the origin; its edge at the positive second coordinate is `taper` times as wide as the other."""
    x, y = width / 2, depth / 2
    corners = [(-x, -y), (x, -y), (x * taper, y), (-x * taper, y)]
    return rounded(corners, radius) if radius > 0 else np.array(corners)


def arc_strip(width: Number, sagitta: Number, thickness: Number, samples: int = 12) -> Array:
    """Strip along a parabola of chord `width` whose middle lies `sagitta` behind its ends."""
    x = np.linspace(-width / 2, width / 2, samples + 1)
    y = sagitta * (1 - (2 * x / width) ** 2)
    return np.concatenate([np.stack([x, y], 1), np.stack([x, y + thickness], 1)[::-1]])


def curve(points: ArrayLike, samples: int = 6) -> Array:
    """Catmull-Rom curve through the points, `samples` steps from each to the next."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.arange(samples)[:, None] / samples
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:])
    ]
    return np.concatenate([*pieces, p[-2:-1]])


# Solids

AXES = {"x": (2, 1, 0), "y": (0, 2, 1), "z": (0, 1, 2)}  # coordinates of an outline's two directions, and of its normal


def snap(points: ArrayLike) -> Array:
    """Round to multiples of 2^-20, so that the last bit of a sine does not reach the booleans."""
    return np.ascontiguousarray(np.round(np.asarray(points, float) * 2.0**20) / 2.0**20)


def skin(rings: Array) -> Manifold:
    """Solid through a sequence of rings (K, N, 3), closed by fans about the mean of the first and of the last ring."""
    count, sides = rings.shape[:2]
    points = snap(np.concatenate([rings.reshape(-1, 3), rings[[0, -1]].mean(axis=1)]))
    here = np.arange(sides)
    following = (here + 1) % sides
    faces = []
    for k in range(count - 1):
        a, b = k * sides + here, k * sides + following
        faces += [np.stack([a, b, b + sides], 1), np.stack([a, b + sides, a + sides], 1)]
    last = (count - 1) * sides
    faces.append(np.stack([following, here, np.full(sides, count * sides)], 1))
    faces.append(np.stack([last + here, last + following, np.full(sides, count * sides + 1)], 1))
    triangles = np.concatenate(faces)
    corners = points[triangles]
    if (corners[:, 0] * np.cross(corners[:, 1], corners[:, 2])).sum() < 0:
        triangles = triangles[:, ::-1]
    return Manifold(Mesh64(points, np.ascontiguousarray(triangles, np.uint64)))


def loft(stations: Sequence[Station], axis: str = "y", outline: Array | Sequence[Array] = ROUND) -> Manifold:
    """Solid through sections normal to an axis: each a centre, a width and a depth that scale its unit outline.

    Width and depth lie along x and z for axis y, x and y for axis z, z and y for axis x. One outline serves all
    stations, or there is one for each, with equal numbers of points.
    """
    first, second, _ = AXES[axis]
    outlines = [outline] * len(stations) if isinstance(outline, np.ndarray) else outline
    rings = np.empty((len(stations), len(outlines[0]), 3))
    for ring, (center, width, depth), shape in zip(rings, stations, outlines):
        ring[:] = center
        ring[:, first] += width * shape[:, 0]
        ring[:, second] += depth * shape[:, 1]
    return skin(rings)


def lathe(profile: Sequence[tuple[Number, Number]], at: Point = (0, 0, 0), outline: Array = ROUND) -> Manifold:
    """Solid of revolution about the vertical through `at`: (height above it, diameter) from one end to the other."""
    return loft([((at[0], at[1] + y, at[2]), diameter, diameter) for y, diameter in profile], "y", outline)


def tube(path: ArrayLike, radius: Number | Sequence[Number] | Array, sides: int = 12) -> Manifold:
    """Round bar along a polyline (K, 3), with one radius or one for each point; also cylinders and cones."""
    points = np.asarray(path, float)
    radii = np.broadcast_to(np.asarray(radius, float), len(points))
    steps = np.diff(points, axis=0)
    steps /= np.sqrt((steps**2).sum(axis=1, keepdims=True))
    tangents = np.concatenate([steps[:1], steps[:-1] + steps[1:], steps[-1:]])
    tangents /= np.sqrt((tangents**2).sum(axis=1, keepdims=True))
    normal = np.eye(3)[np.abs(tangents[0]).argmin()]
    angle = (np.arange(sides) + 0.5) * (2 * pi / sides)
    rings = np.empty((len(points), sides, 3))
    for ring, center, tangent, r in zip(rings, points, tangents, radii):
        normal = normal - (normal * tangent).sum() * tangent  # carried along the path, so that the tube does not twist
        normal = normal / np.sqrt((normal**2).sum())
        ring[:] = center + r * (np.cos(angle)[:, None] * normal + np.sin(angle)[:, None] * np.cross(tangent, normal))
    return skin(rings)


def box(size: Point, at: Point = (0, 0, 0), bevel: Number = 0.0, segments: int = 1) -> Manifold:
    """Box about its centre, with chamfered (one segment) or rounded (more) edges."""
    half = np.asarray(size, float) / 2
    bevel = min(bevel, 0.49 * min(size))
    steps = [(i, j, segments - i - j) for i in range(segments + 1) for j in range(segments + 1 - i)]
    octant = np.asarray(steps, float)
    octant /= np.sqrt((octant**2).sum(axis=1, keepdims=True))
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    corner = half - bevel + bevel * octant if bevel > 0 else half[None]
    return Manifold.hull_points(snap((signs[:, None] * corner).reshape(-1, 3))).translate(at)


def extrude(
    outline: ArrayLike, thickness: Number, axis: str = "y", at: Point = (0, 0, 0), bevel: Number = 0.0
) -> Manifold:
    """Polygon swept along an axis, centred about `at`; outlines are (x, z) for axis y, (x, y) for z and (z, y) for x.

    A bevel chamfers the rims of both ends; it needs a convex outline.
    """
    section = CrossSection([snap(outline)])
    if section.area() == 0:  # clockwise outlines are holes to a cross-section
        section = CrossSection([snap(outline)[::-1]])
    if bevel > 0:
        inner = np.asarray(outline, float)
        middle = (inner.max(axis=0) + inner.min(axis=0)) / 2
        span = inner.max(axis=0) - inner.min(axis=0)
        inner = middle + (inner - middle) * (1 - 2 * bevel / span)
        rims = [(outline, thickness / 2 - bevel), (inner, thickness / 2)]
        points = [np.insert(np.asarray(o, float), 2, sign * z, axis=1) for o, z in rims for sign in (-1, 1)]
        solid = Manifold.hull_points(snap(np.concatenate(points)))
    else:
        solid = Manifold.extrude(section, thickness).translate((0, 0, -thickness / 2))
    matrix = np.zeros((3, 4))
    matrix[AXES[axis], (0, 1, 2)] = 1.0
    matrix[:, 3] = at
    return solid.transform(matrix)


def ellipsoid(size: Point, at: Point = (0, 0, 0), segments: int = 16) -> Manifold:
    """Ellipsoid filling a box of the given size."""
    return Manifold.sphere(0.5, segments).scale(size).translate(at)


def torus(diameter: Number, thickness: Number, axis: str = "y", at: Point = (0, 0, 0)) -> Manifold:
    """Ring of round section about an axis; `diameter` is that of its centre line."""
    circle = CrossSection([snap(superellipse(2.0, 10) * thickness + [diameter / 2, 0.0])])
    matrix = np.zeros((3, 4))
    matrix[AXES[axis], (0, 1, 2)] = 1.0
    matrix[:, 3] = at
    return Manifold.revolve(circle, 24).transform(matrix)


def cushion(size: Point, at: Point = (0, 0, 0), axis: str = "y", crown: Number = 0.2) -> Manifold:
    """Soft pad filling a box: rounded outline, bulging faces normal to the axis."""
    first, second, along = AXES[axis]
    stations: list[Station] = []
    rims = ((-0.5, 0.7), (-0.5 + crown * 0.6, 0.93), (-0.5 + crown * 1.6, 1.0))
    for height, scale in (*rims, *((-h, s) for h, s in rims[::-1])):
        center = np.array(at, float)
        center[along] += height * size[along]
        inset = (1 - scale) * min(size)
        stations.append(((center[0], center[1], center[2]), size[first] - inset, size[second] - inset))
    return loft(stations, axis, SOFT)


def union(*solids: Manifold) -> Manifold:
    """All solids as one, each moved by up to 0.0005.

    Solids that share a plane or an edge would leave sheets of the union a rounding error apart, which become one
    non-manifold edge in a file with six digits; after the move no two of them share anything.
    """
    moves = [
        tuple(0.001 * ((i * step) % 1.0 - 0.5) for step in (0.618034, 0.754878, 0.569840))
        for i in range(1, len(solids) + 1)
    ]
    return Manifold.batch_boolean([solid.translate(move) for solid, move in zip(solids, moves)], OpType.Add)


def intersection(*solids: Manifold) -> Manifold:
    """What all solids share."""
    return Manifold.batch_boolean(list(solids), OpType.Intersect)


def both(*solids: Manifold) -> Manifold:
    """The solids and their mirror images across the plane x = 0."""
    return union(*solids, *(solid.mirror((1, 0, 0)) for solid in solids))


def spread(count: int, width: Number) -> list[float]:
    """Centres of `count` equal intervals that fill `width` about zero."""
    return [((i + 0.5) / count - 0.5) * width for i in range(count)]
