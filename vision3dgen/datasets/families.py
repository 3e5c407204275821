"""Parametric families of the 13 categories of 3D-R2N2: each builds a product from its parameters as named solid parts.

A family is a table of parameters (`Range` for a continuous one, a tuple for a discrete one) and a function that turns
one value of each into solids. Every parameter is drawn whatever the style, so that a parameter keeps its value when
the style changes. Solids live in ShapeNet's object frame: +y up, -z front, x to the side; lengths are in units of the
object (only ratios matter, shapes are normalized afterwards), angles in degrees.
"""

from collections.abc import Callable
from math import cos, pi, radians, sin, tan
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from manifold3d import Manifold

from vision3dgen.datasets.solids import (
    ROUND,
    SOFT,
    SQUARE,
    Number,
    Point,
    Station,
    arc_strip,
    both,
    box,
    curve,
    cushion,
    ellipsoid,
    extrude,
    intersection,
    lathe,
    loft,
    rectangle,
    rounded,
    skin,
    spread,
    superellipse,
    torus,
    tube,
    union,
)

Parts = dict[str, tuple[Manifold, str]]  # part name -> solid, name of its color


class Range(NamedTuple):
    """A continuous parameter, uniform in [low, high)."""

    low: float
    high: float


Space = dict[str, Range | tuple[str, ...] | tuple[int, ...]]


class Family(NamedTuple):
    """A category's parameters and the function that builds its parts from one value of each."""

    space: Space
    build: Callable[[SimpleNamespace], Parts]


COLORS: dict[str, tuple[float, float, float]] = {
    "oak": (0.72, 0.53, 0.33),
    "walnut": (0.38, 0.25, 0.17),
    "beech": (0.84, 0.68, 0.48),
    "mahogany": (0.46, 0.20, 0.13),
    "white": (0.93, 0.93, 0.91),
    "cream": (0.90, 0.85, 0.72),
    "gray": (0.55, 0.56, 0.58),
    "charcoal": (0.24, 0.25, 0.27),
    "black": (0.10, 0.10, 0.11),
    "steel": (0.68, 0.70, 0.73),
    "brass": (0.76, 0.60, 0.28),
    "red": (0.70, 0.14, 0.13),
    "orange": (0.87, 0.45, 0.13),
    "yellow": (0.92, 0.75, 0.20),
    "green": (0.23, 0.45, 0.28),
    "olive": (0.38, 0.39, 0.24),
    "teal": (0.13, 0.47, 0.50),
    "blue": (0.17, 0.34, 0.63),
    "navy": (0.13, 0.18, 0.34),
    "burgundy": (0.42, 0.11, 0.18),
    "leather": (0.45, 0.27, 0.16),
    "sand": (0.76, 0.69, 0.56),
    "rubber": (0.08, 0.08, 0.08),
    "glass": (0.14, 0.18, 0.23),
    "screen": (0.07, 0.10, 0.16),
    "glow": (0.98, 0.93, 0.75),
    "lamp red": (0.75, 0.08, 0.08),
}
WOODS = ("oak", "walnut", "beech", "mahogany")
FABRICS = ("gray", "charcoal", "sand", "teal", "navy", "burgundy", "olive", "leather", "cream")
PAINTS = ("white", "black", "gray", "steel", "red", "blue", "navy", "green", "orange", "yellow", "burgundy")


# The formatter would give each number of a station or an outline a line of its own.
# fmt: off

# Airplane

AIRPLANE: Space = {
    "style": ("airliner", "business jet", "propeller", "fighter"),
    "planform": ("straight", "swept", "delta"),
    "tail": ("conventional", "t-tail", "twin"),
    "engines": (1, 2),  # on each side
    "blades": (2, 3, 4),
    "radius": Range(0.046, 0.066),
    "nose": Range(0.10, 0.20),
    "tail_cone": Range(0.22, 0.38),
    "span": Range(0.80, 1.15),
    "root_chord": Range(0.17, 0.24),
    "taper": Range(0.30, 0.60),
    "sweep": Range(0.10, 0.26),
    "dihedral": Range(0.0, 6.0),
    "wing_position": Range(-0.06, 0.04),
    "wing_height": Range(-0.75, 0.75),
    "fin_height": Range(0.12, 0.19),
    "tail_span": Range(0.32, 0.44),
    "engine_size": Range(0.058, 0.080),
    "engine_position": Range(0.26, 0.36),
    "canopy": Range(0.12, 0.20),
    "body": ("white", "cream", "steel", "gray", "olive", "navy"),
    "accent": ("red", "blue", "navy", "orange", "green", "charcoal"),
}


def wing(root: Point, span: Number, chords: tuple[Number, Number], sweep: Number, rise: Number,
         thickness: Number) -> Manifold:
    """Half wing from its root to `span` along x, the tip's middle `sweep` behind and `rise` above the root's."""
    x, y, z = root
    airfoil = superellipse(1.8, 16)
    airfoil[:, 1] *= 1.0 - 0.9 * airfoil[:, 0]  # thick in front (negative z), sharp behind
    stations: list[Station] = []
    for t, scale in ((0.0, 1.0), (0.55, 1.0), (0.97, 1.0), (1.0, 0.6)):
        chord = (chords[0] + (chords[1] - chords[0]) * t) * scale
        depth = thickness * (1.0 - 0.35 * t) * scale
        stations.append(((x + span * t, y + rise * t, z + sweep * t), chord, depth))
    return loft(stations, "x", airfoil)


def airplane(p: SimpleNamespace) -> Parts:
    fighter = p.style == "fighter"
    r = p.radius * (0.95 if fighter else 1.0)
    light = p.style == "propeller" and p.engines == 1
    r *= 1.25 if light else 1.0
    nose = p.nose * (1.7 if fighter else 1.0)
    end = 0.5 - p.tail_cone - (0.15 if light else 0.0)
    cone = 0.5 - end
    lift = 0.2 if fighter else 0.55
    blunt = 0.45 if p.style == "propeller" else 0.16
    sections = [(-0.5, -0.25, blunt), (-0.5 + 0.12 * nose, -0.18, blunt + 0.25), (-0.5 + 0.45 * nose, -0.08, 0.82),
                (-0.5 + nose, 0, 1.0), (end, 0, 1.0), (end + 0.5 * cone, 0.35 * lift, 0.76),
                (0.49, lift, 0.75 if fighter else 0.34), (0.5, lift, 0.7 if fighter else 0.2)]
    fuselage = loft([((0, y * r, z), 2 * r * s, 2.1 * r * s) for z, y, s in sections], "z", ROUND)

    sweep = {"straight": 0.02, "swept": p.sweep, "delta": 0.11 + 0.2 * p.sweep}[p.planform]
    chords = {
        "straight": (p.root_chord, p.root_chord * (p.taper + 0.3)),
        "swept": (p.root_chord * 1.15, p.root_chord * p.taper),
        "delta": (p.root_chord * 2.1, 0.07),
    }[p.planform]
    span = p.span * (1.1 if light else 0.72 if fighter else 0.82 if p.planform == "delta" else 1.0)
    low = {"airliner": -0.6, "business jet": -0.7, "fighter": -0.1}.get(p.style)
    wing_y = (low if low is not None else p.wing_height) * r
    wing_z = p.wing_position + (0.08 if fighter or p.planform == "delta" else 0.0)
    rise = 0.5 * span * tan(radians(p.dihedral))
    wings = both(wing((0, wing_y, wing_z), span / 2, chords, sweep, rise, 0.040))

    fin_chords = (0.17, 0.085)
    top = lift * r + p.fin_height
    twin = p.tail == "twin"
    fin_x = 0.0
    if twin:
        fin_x = 1.1 * r if fighter else p.tail_span * 0.46
    fin = wing((0, 0, 0.38), p.fin_height * (0.9 if twin else 1.0), fin_chords, 0.09, 0.0, 0.036).rotate((0, 0, 90))
    fins = fin.translate((0, lift * r, 0))
    if twin:
        fins = both(fins.rotate((0, 0, -10 if fighter else 0)).translate((fin_x, 0 if fighter else -0.03, 0)))
    tail_y = top - 0.012 if p.tail == "t-tail" else lift * r
    tail_z = 0.455 if p.tail == "t-tail" else 0.405
    stabilizers = both(wing((0, tail_y, tail_z), p.tail_span / 2, (0.13, 0.075), 0.06, 0.0, 0.034))
    parts: Parts = {
        "fuselage": (fuselage, p.body),
        "wings": (wings, "gray" if p.body != "gray" else "steel"),
        "fin": (fins, p.accent),
        "stabilizers": (stabilizers, p.accent if p.style == "propeller" else p.body),
    }

    d = p.engine_size

    def nacelle(x: Number, y: Number, z: Number, length: Number) -> tuple[Manifold, Manifold]:
        shell = [(-0.5, 0.82), (-0.42, 0.96), (-0.1, 1.0), (0.3, 0.8), (0.5, 0.55)]
        cowl = loft([((x, y, z + length * t), d * s, d * s) for t, s in shell], "z")
        mouth = tube([(x, y, z - length * 0.6), (x, y, z - 0.3 * length)], 0.33 * d)
        fan = tube([(x, y, z - 0.44 * length), (x, y, z)], [0.02 * d, 0.36 * d])
        return cowl - mouth, fan

    def propeller(x: Number, y: Number, z: Number, size: Number) -> Manifold:
        blade = ellipsoid((0.034, size, 0.026), (0, size / 2, 0)).rotate((0, 18, 0))
        blades = [blade.rotate((0, 0, 360 * i / p.blades + 20)) for i in range(p.blades)]
        hub = tube([(0, 0, -0.045), (0, 0, -0.02), (0, 0, 0.05)], [0.006, 0.02, 0.026])
        return union(hub, *blades).translate((x, y, z))

    if p.style == "airliner":
        cowls, fans, pylons = [], [], []
        for i in range(p.engines):
            share = p.engine_position + (0.3 * i if p.engines == 2 else 0.0)
            x = span / 2 * (share + 0.04)
            chord = chords[0] + (chords[1] - chords[0]) * 2 * x / span
            y, z = wing_y + rise * 2 * x / span, wing_z + sweep * 2 * x / span - 0.5 * chord
            cowl, fan = nacelle(x, y - 0.62 * d, z + 0.02, 1.9 * d)
            cowls.append(cowl)
            fans.append(fan)
            pylons.append(box((0.022, 0.6 * d, 1.1 * d), (x, y - 0.22 * d, z + 0.6 * d)))
        parts["engines"] = (both(*cowls, *pylons), p.body)
        parts["fans"] = (both(*fans), "charcoal")
    elif p.style == "business jet":
        z = end + 0.3 * cone
        cowl, fan = nacelle(r + 0.5 * d, 0.5 * r, z, 2.4 * d)
        pylon = box((r + 0.5 * d, 0.024, 1.3 * d), (0.5 * (r + 0.5 * d), 0.5 * r, z))
        parts["engines"] = (both(cowl, pylon), p.accent)
        parts["fans"] = (both(fan), "charcoal")
    elif p.style == "fighter":
        intake = loft([((0.9 * r, -0.25 * r, z), 1.1 * r * s, 1.5 * r * s)
                       for z, s in ((-0.16, 1.0), (0.1, 1.05), (0.44, 0.75))], "z", SOFT)
        mouth = box((0.75 * r, 1.1 * r, 0.12), (0.95 * r, -0.25 * r, -0.14))
        nozzles = [
            tube([(x, 0.1 * r, 0.4), (x, 0.1 * r, 0.49), (x, 0.1 * r, 0.53)], [0.62 * r, 0.6 * r, 0.42 * r])
            for x in ((0.62 * r, ) if p.engines == 2 else (0.0, ))
        ]
        parts["intakes"] = (both(intake - mouth), p.body)
        parts["nozzles"] = (both(*nozzles), "charcoal")
        missile = tube([(0, 0, -0.14), (0, 0, -0.08), (0, 0, 0.12)], [0.004, 0.013, 0.013])
        parts["missiles"] = (both(missile.translate((span / 2 - 0.004, wing_y + rise, wing_z + sweep))), p.accent)
    elif p.engines == 1:
        parts["propeller"] = (propeller(0, -0.2 * r, -0.5, 0.15), "charcoal")
    else:
        x = span / 2 * p.engine_position
        y, z = wing_y + rise * 2 * x / span, wing_z + sweep * 2 * x / span - 0.5 * chords[0]
        pod = loft([((x, y, z + t), d * s * 0.9, d * s * 0.9)
                    for t, s in ((-0.07, 0.5), (-0.04, 0.95), (0.05, 1), (0.19, 0.4))], "z")
        parts["engines"] = (both(pod), p.body)
        parts["propeller"] = (both(propeller(x, y, z - 0.07, 0.12)), "charcoal")

    if fighter:
        glass = ellipsoid((1.15 * r, 1.7 * r, p.canopy * 1.4), (0, 0.75 * r, -0.5 + nose + 0.04))
    else:
        glass = fuselage.scale((1.02, 1.03, 1.0)).translate((0, 0.001, -0.002)) ^ box(
            (4 * r, 0.75 * r, p.canopy * 0.5), (0, 0.62 * r, -0.5 + 0.38 * nose + 0.25 * p.canopy))
        if p.style != "propeller":
            stripe = box((4 * r, 0.26 * r, end + 0.5 - nose), (0, 0.32 * r, (end - 0.5 + nose) / 2))
            parts["windows"] = (fuselage.scale((1.01, 1.0, 1.0)) ^ stripe, p.accent)
    parts["canopy"] = (glass, "glass")
    return parts


# Bench

BENCH: Space = {
    "seat": ("slats", "slab", "cushion"),
    "back": ("none", "slats", "spindles", "panel"),
    "legs": ("posts", "panels", "trestle", "sled"),
    "arms": ("none", "square", "curved"),
    "slats": (3, 4, 5),
    "supports": (2, 3),
    "width": Range(1.1, 1.9),
    "depth": Range(0.36, 0.52),
    "height": Range(0.38, 0.48),
    "thickness": Range(0.05, 0.09),
    "back_height": Range(0.34, 0.52),
    "back_tilt": Range(6.0, 18.0),
    "leg": Range(0.055, 0.085),
    "leg_inset": Range(0.02, 0.14),
    "splay": Range(0.0, 0.10),
    "gap": Range(0.18, 0.38),
    "arm_height": Range(0.18, 0.25),
    "wood": (*WOODS, "white", "green"),
    "metal": ("charcoal", "black", "steel", "green"),
}


def bench(p: SimpleNamespace) -> Parts:
    top = p.height
    under = top - p.thickness
    ends = p.width / 2 - p.leg_inset * 0.9 - p.leg / 2
    front, rear = -p.depth / 2, p.depth / 2
    if p.seat == "slats":
        pitch = p.depth / p.slats
        boards = [
            box((p.width, p.thickness * 0.8, pitch * (1 - p.gap * 0.7)), (0, top - 0.4 * p.thickness, z), 0.008)
            for z in spread(p.slats, p.depth)
        ]
        rails = [box((p.leg, 0.06, p.depth * 0.96), (x, under, 0)) for x in (-ends, ends, 0)]
        seat = union(*boards, *rails)
    elif p.seat == "slab":
        seat = box((p.width, p.thickness, p.depth), (0, top - p.thickness / 2, 0), 0.012)
    else:
        pads = p.supports
        frame = box((p.width, 0.05, p.depth), (0, under + 0.02, 0), 0.01)
        tufts = [
            cushion((p.width / pads * 1.0, p.thickness * 1.3, p.depth * 0.98), (x, top, 0))
            for x in spread(pads, p.width * 0.98)
        ]
        seat = union(frame, *tufts)
    parts: Parts = {"seat": (seat, p.wood)}

    xs = [-ends, ends] + ([0.0] if p.supports == 3 and p.legs != "sled" else [])
    legs: list[Manifold] = []
    if p.legs == "posts":
        for x in xs:
            for z in (front + p.leg, rear - p.leg):
                foot = (x + np.sign(x) * p.splay * 0.5, 0.0, z + np.sign(z) * p.splay)
                legs.append(
                    loft([((x, under + 0.02, z), p.leg, p.leg), (foot, p.leg * 0.75, p.leg * 0.75)], "y", SQUARE))
            legs.append(box((p.leg * 0.7, p.leg * 0.7, p.depth - 2 * p.leg), (x, under - 0.01, 0)))
    elif p.legs == "panels":
        for x in xs:
            outline = rectangle(p.depth * 0.94, under + 0.02, 0.0, 1.0 - p.splay) + np.array([0, (under + 0.02) / 2])
            legs.append(extrude(outline, p.leg, "x", (x, 0, 0)))
    elif p.legs == "trestle":
        for x in xs:
            foot = p.depth / 2 + p.splay * 0.3
            legs += [
                tube([(x, under + 0.02, s * 0.6 * foot), (x, 0.03, -s * foot * 0.9)], p.leg * 0.55, 8) for s in (-1, 1)
            ]
            legs.append(box((p.leg, p.leg * 0.8, p.depth * 0.9), (x, under - 0.01, 0)))
        legs.append(box((2 * ends, p.leg * 1.1, p.leg * 1.1), (0, 0.5 * (under + 0.05), 0)))
        legs.append(box((2 * ends, 0.05, 0.12), (0, under, 0)))
    else:
        for x in (-ends, ends):
            path = [(x, under + 0.02, front + 0.05), (x, 0.03, front + 0.05 - p.splay * 0.5),
                    (x, 0.03, rear - 0.05 + p.splay * 0.5), (x, under + 0.02, rear - 0.05)]
            legs.append(tube(rounded(path, 0.09, closed=False), p.leg * 0.45))
    parts["legs"] = (union(*legs), p.metal if p.legs in ("sled", "posts") else p.wood)

    tilt = radians(p.back_tilt)
    if p.back != "none":
        h, t = p.back_height, 0.045
        posts = [box((p.leg * 0.8, h, t), (x, h / 2, 0), 0.006) for x in xs]
        if p.back == "panel":
            back = union(extrude(rectangle(p.width * 0.98, h * 0.8, 0.10), t * 1.2, "z", (0, h * 0.6, -t * 0.4)),
                         *posts)
        elif p.back == "slats":
            n = p.slats
            back = union(
                *posts, *[
                    box((p.width, h * 0.82 / n * (1 - p.gap), t), (0, h * 0.6 + y, -t * 0.6), 0.008)
                    for y in spread(n, h * 0.82)
                ])
        else:
            rails = [box((p.width, 0.07, t * 1.3), (0, y, 0), 0.01) for y in (h - 0.035, h * 0.2)]
            count = 2 * p.slats + 5
            sticks = [tube([(x, h * 0.15, 0), (x, h - 0.03, 0)], 0.019, 8) for x in spread(count, p.width * 0.95)]
            back = union(*posts, *rails, *sticks)
        parts["back"] = (back.rotate((p.back_tilt, 0, 0)).translate((0, under + 0.01, rear - 0.03)), p.wood)
    if p.arms != "none" and p.back != "none":
        arms = []
        for x in (-ends, ends):
            y = top + p.arm_height
            z = rear + tan(tilt) * p.arm_height
            if p.arms == "square":
                arms += [
                    box((p.leg, 0.045, z - front), (x, y, (z + front) / 2), 0.008),
                    box((p.leg * 0.8, p.arm_height + 0.07, p.leg * 0.8),
                        (x, y - (p.arm_height + 0.07) / 2, front + p.leg))
                ]
            else:
                path = [(x, under + 0.02, front + 0.03), (x, y, front + 0.03), (x, y, z)]
                arms.append(tube(rounded(path, 0.16, closed=False, segments=6), 0.028))
        parts["arms"] = (union(*arms), p.metal if p.arms == "curved" else p.wood)
    return parts


# Cabinet

CABINET: Space = {
    "style": ("wardrobe", "sideboard", "chest", "bookcase", "vitrine", "filing"),
    "base": ("plinth", "legs", "feet"),
    "handles": ("knobs", "bars", "rails"),
    "columns": (1, 2, 3),
    "rows": (2, 3, 4, 5),
    "width": Range(0.85, 1.2),
    "height": Range(0.85, 1.2),
    "depth": Range(0.36, 0.52),
    "board": Range(0.035, 0.06),
    "gap": Range(0.014, 0.028),
    "overhang": Range(0.0, 0.05),
    "base_height": Range(0.05, 0.20),
    "leg": Range(0.045, 0.075),
    "leg_taper": Range(0.55, 1.0),
    "handle": Range(0.07, 0.18),
    "handle_position": Range(0.35, 0.65),
    "crown": Range(0.0, 0.05),
    "finish": (*WOODS, "white", "gray", "teal", "navy"),
    "front": (*WOODS, "white", "cream", "charcoal", "olive"),
    "metal": ("brass", "steel", "black"),
}


def cabinet(p: SimpleNamespace) -> Parts:
    width, height, depth = {
        "wardrobe": (p.width * 1.0, p.height * 1.9, p.depth * 1.3),
        "sideboard": (p.width * 1.6, p.height * 0.68, p.depth),
        "chest": (p.width * 0.95, p.height, p.depth * 1.05),
        "bookcase": (p.width * 0.9, p.height * 1.7, p.depth * 0.8),
        "vitrine": (p.width * 0.95, p.height * 1.8, p.depth * 0.95),
        "filing": (p.width * 0.5, p.height * 1.1, p.depth * 1.4),
    }[p.style]
    low = {"plinth": min(0.08, p.base_height), "legs": p.base_height + 0.06, "feet": 0.07}[p.base]
    t = p.board
    front = -depth / 2
    body = box((width, height, depth), (0, low + height / 2, 0))
    columns = {"wardrobe": max(2, p.columns), "chest": min(p.columns, 2), "filing": 1}.get(p.style, p.columns)
    rows = {
        "wardrobe": 1,
        "sideboard": min(p.rows, 3) - 1,
        "chest": p.rows,
        "filing": max(3, p.rows - 1)
    }.get(p.style, p.rows)
    inner_w, inner_h = width - 2 * t, height - 2 * t
    open_share = {"bookcase": 1.0, "vitrine": 0.6}.get(p.style, 0.0)

    doors, handles = [], []
    cell_w, cell_h = inner_w / columns, inner_h / rows
    holes = []
    for i, x in enumerate(spread(columns, inner_w)):
        for y in spread(rows, inner_h):
            center = low + height / 2 + y
            if y + inner_h / 2 > inner_h * (1 - open_share):
                holes.append(box((cell_w - t, cell_h - t, depth), (x, center, front + depth / 2 - t * 1.2)))
                continue
            doors.append(box((cell_w - p.gap, cell_h - p.gap, 0.05), (x, center, front - 0.01), 0.008))
            wide = cell_w > cell_h * 1.1 or p.style in ("chest", "filing")
            side = 0.0 if wide else (1 if i % 2 == 0 else -1) * (cell_w / 2 - 0.05)
            at = (x + side, center + (0 if wide else (p.handle_position - 0.5) * 0.6 * cell_h), front - 0.025)
            if p.handles == "knobs":
                places = (-0.25 * cell_w, 0.25 * cell_w) if wide and cell_w > 0.6 else (0.0, )
                handles += [ellipsoid((0.06, 0.06, 0.07), (at[0] + dx, at[1], at[2] - 0.02), 12) for dx in places]
            elif p.handles == "bars":
                length = min(p.handle * 1.6, 0.7 * (cell_w if wide else cell_h))
                half = np.array((length / 2, 0, 0) if wide else (0, length / 2, 0))
                start, stop, out = np.array(at) - half, np.array(at) + half, np.array((0, 0, -0.06))
                handles.append(tube(rounded([start, start + out, stop + out, stop], 0.03, closed=False), 0.016, 8))
            else:
                size = (cell_w * (0.4 + 2 * p.handle), 0.035, 0.06) if wide else (0.035, cell_h * (0.3 + 2 * p.handle),
                                                                                  0.06)
                handles.append(box(size, (at[0], center + (cell_h / 2 - 0.05 if wide else 0), at[2] - 0.005), 0.008))
    if holes:
        body = body - union(*holes)
    top = box((width + 2 * p.overhang, t, depth + p.overhang), (0, low + height + t / 2 - 0.01, -p.overhang / 2), 0.01)
    parts: Parts = {"body": (body, p.finish), "top": (top, p.finish)}
    if p.crown > 0.02 and p.style in ("wardrobe", "vitrine", "bookcase"):
        y = low + height + t - 0.012
        crown = loft([((0, y, 0), width + p.overhang, depth),
                      ((0, y + p.crown + 0.03, -0.01), width + 0.1 + p.overhang, depth + 0.08),
                      ((0, y + p.crown + 0.06, -0.01), width + 0.1 + p.overhang, depth + 0.08)], "y", SQUARE)
        parts["crown"] = (crown, p.front)
    if doors:
        parts["doors"] = (union(*doors), p.front)
        parts["handles"] = (union(*handles), p.metal)
    x, z = width / 2 - p.leg / 2 - 0.03, depth / 2 - p.leg / 2 - 0.03
    corners = [(sx * x, sz * z) for sx in (-1, 1) for sz in (-1, 1)]
    if p.base == "plinth":
        base = box((width - 0.06, low + 0.02, depth - 0.08), (0, (low + 0.02) / 2, 0.02))
    elif p.base == "legs":
        small = p.leg * p.leg_taper
        base = union(*[
            loft([((a, low + 0.02, b), p.leg * 1.2, p.leg * 1.2), ((a * 1.02, 0, b * 1.02), small,
                                                                   small)], "y", SQUARE if p.leg_taper > 0.8 else ROUND)
            for a, b in corners
        ])
    else:
        size = p.leg * 1.6
        base = union(*[
            lathe([(0, size * 0.7), (0.02, size), (0.055, size), (low + 0.02, size * 0.6)], (a, 0, b))
            for a, b in corners
        ])
    parts["base"] = (base, p.front)
    return parts


# Car

CAR: Space = {
    "style": ("sedan", "hatchback", "suv", "pickup", "van", "coupe"),
    "rims": ("disc", "spokes", "dish"),
    "extra": ("none", "roof rails", "spoiler", "roof box"),
    "length": Range(0.93, 1.08),
    "width": Range(0.93, 1.06),
    "height": Range(0.94, 1.06),
    "clearance": Range(0.17, 0.25),
    "wheel": Range(0.30, 0.37),
    "wheelbase": Range(0.58, 0.64),
    "hood": Range(0.92, 1.10),
    "hood_height": Range(0.58, 0.66),
    "belt": Range(0.60, 0.66),
    "windshield": Range(0.08, 0.15),
    "rear_rake": Range(0.03, 0.10),
    "tumblehome": Range(0.08, 0.20),
    "nose": Range(3.2, 7.0),
    "lamp": Range(0.12, 0.24),
    "paint": PAINTS,
    "bumper": ("charcoal", "steel", "same"),
}


def car(p: SimpleNamespace) -> Parts:
    length, width, height, hood = {
        "sedan": (4.7, 1.85, 1.45, 0.27),
        "hatchback": (4.0, 1.78, 1.5, 0.25),
        "suv": (4.6, 1.95, 1.78, 0.26),
        "pickup": (5.3, 1.95, 1.82, 0.25),
        "van": (4.8, 1.95, 2.05, 0.13),
        "coupe": (4.4, 1.88, 1.28, 0.34),
    }[p.style]
    length, width, height, hood = length * p.length, width * p.width, height * p.height, hood * p.hood
    low = p.clearance * (1.25 if p.style in ("suv", "pickup") else 0.9)
    belt = p.belt * height if p.style != "van" else 0.54 * height
    bonnet = min(p.hood_height * height * (0.95 if p.style == "coupe" else 1.0), belt - 0.02)
    r = p.wheel * (1.1 if p.style in ("suv", "pickup") else 1.0)
    bonnet = max(bonnet, 2.14 * r + 0.10)  # the wheel arch stays below the hood
    belt = max(belt, bonnet + 0.02)
    a = hood + p.windshield * (1.25 if p.style == "coupe" else 1.0)  # where the windshield meets the roof
    roof_end, base = {
        "sedan": (0.70, 0.80 + 0.5 * p.rear_rake),
        "hatchback": (0.90 - p.rear_rake, 0.975),
        "suv": (0.93 - 0.6 * p.rear_rake, 0.985),
        "pickup": (0.58 - 0.3 * p.rear_rake, 0.60),
        "van": (0.97 - 0.3 * p.rear_rake, 0.993),
        "coupe": (0.66, 0.90 + 0.5 * p.rear_rake),
    }[p.style]
    deck = belt + (0.04 if p.style in ("sedan", "coupe") else 0.0)
    side = [(0.012, low), (0.0, low + 0.1), (0.004, bonnet * 0.72), (0.03, bonnet * 0.93), (hood, bonnet + 0.03),
            (a, height * 0.985), ((a + roof_end) / 2, height), (roof_end, height * 0.975), (base, deck),
            (0.985, deck * 0.98), (1.0, deck * 0.8), (1.0, low + 0.12), (0.985, low)]
    profile = rounded([((u - 0.5) * length, v) for u, v in side], 0.16)
    narrow = 1 - p.tumblehome
    half = width / 2
    face = rounded([(-half * 0.94, low), (half * 0.94, low), (half, 0.5 * belt), (half * 0.97, belt),
                    (half * narrow, height), (-half * narrow, height), (-half * 0.97, belt), (-half, 0.5 * belt)], 0.14)
    plan = superellipse(p.nose + (3.0 if p.style == "pickup" else 0.0), 40) * [width, length * 1.001]
    shell = intersection(extrude(profile, 2 * width, "x"), extrude(face, 2 * length, "z"),
                         extrude(plan, 3 * height, "y", (0, height, 0)))

    sill, lintel = belt + 0.05, height - 0.13
    slope = (lintel - bonnet) / (height - bonnet)
    front = (hood + (a - hood) * 0.45 - 0.5) * length + 0.16
    front_top = (hood + (a - hood) * slope - 0.5) * length + 0.14
    rear, rear_top = (base - 0.5) * length - 0.26, (roof_end + (base - roof_end) * 0.2 - 0.5) * length - 0.15
    glazing = rounded([(front, sill), (rear, sill), (max(rear_top, front_top + 0.3), lintel), (front_top, lintel)],
                      0.05)
    cuts = [extrude(glazing, 2 * width, "x")]
    pillars = {
        "sedan": [0.48],
        "hatchback": [0.5],
        "suv": [0.46, 0.74],
        "van": [0.36, 0.66],
        "coupe": [],
        "pickup": []
    }[p.style]
    pillar = [box((2 * width, height, 0.11), (0, belt, (u - 0.5) * length)) for u in pillars]
    side_glass = cuts[0] - union(*pillar) if pillar else cuts[0]
    pane = extrude(
        rounded([(-half * 0.82, sill), (half * 0.82, sill), (half * narrow * 0.8, lintel + 0.02),
                 (-half * narrow * 0.8, lintel + 0.02)], 0.05), 2 * length, "z")
    panels = union(side_glass, pane)
    cabin = shell.trim_by_plane((0, 1, 0), belt - 0.1)
    middle = (0.5 * (hood + base) - 0.5) * length
    cabin = cabin.translate((0, -belt, -middle)).scale((0.965, 0.97, 0.975)).translate((0, belt - 0.01, middle))

    shift = -0.01 * length
    axles = [(-p.wheelbase / 2) * length + shift, (p.wheelbase / 2) * length + shift]
    if p.style == "van":
        axles[0] -= 0.03 * length
    arches = [tube([(s * (half - 0.29), r, z), (s * (half + 1), r, z)], r * 1.14, 24) for s in (-1, 1) for z in axles]
    hollow = union(*arches)
    if p.style == "pickup":
        start, floor = (0.63 - 0.5) * length, max(belt - 0.38, 2.16 * r + 0.05)
        bed = box((width, 1.0, length), (0, floor + 0.5, start + length / 2)) ^ shell.scale((0.84, 2.0, 0.93))
        hollow = union(hollow, bed)
        cabin = cabin.trim_by_plane((0, 0, -1), -start)
    parts: Parts = {"body": (shell - union(panels, hollow), p.paint), "windows": (cabin - hollow, "glass")}

    tires, rims = [], []
    for z in axles:
        x = half - 0.13
        tires.append(
            loft([((x + t, r, z), 2 * r * s, 2 * r * s)
                  for t, s in ((-0.13, 0.92), (-0.09, 1), (0.09, 1), (0.12, 0.92))], "x", superellipse(2.0, 28)))
        tires.append(box((half, 0.14, 0.14), (half / 2 - 0.1, r, z)))
        rim = tube([(x, r, z), (x + 0.135, r, z)], r * 0.62, 20)
        if p.rims == "dish":
            rim = rim - tube([(x + 0.09, r, z), (x + 0.2, r, z)], [r * 0.25, r * 0.62], 20)
        elif p.rims == "spokes":
            rim = rim - tube([(x + 0.10, r, z), (x + 0.2, r, z)], r * 0.54, 20)
            rim = union(
                rim, *[
                    box((0.12, r * 0.16, r * 1.15), (x + 0.075, 0, 0)).rotate((60 * i, 0, 0)).translate((0, r, z))
                    for i in range(3)
                ])
        rims.append(rim)
    parts["tires"] = (both(*tires), "rubber")
    parts["rims"] = (both(*rims), "steel")

    def on_body(region: Manifold, grow: Number = 1.008) -> Manifold:
        center = (low + bonnet) / 2
        swollen = shell.translate((0, -center, 0)).scale((grow, 1.0, grow)).translate((0, center, 0))
        return (swollen ^ region) - hollow

    color = p.paint if p.bumper == "same" else p.bumper
    strip = box((2 * width, 0.17, 2 * length), (0, low + 0.115, 0)) - box((2 * width, 1, length * 0.92), (0, low, 0))
    parts["bumpers"] = (on_body(strip, 1.014), color)
    y = bonnet * 0.78
    grille = box((width * 0.42, 0.15, 0.6), (0, y - 0.03, -length / 2))
    parts["grille"] = (on_body(grille, 1.006), "black")
    inner = half * (0.80 - 1.3 * p.lamp)  # both ends of the plan are rounded: lamps start well inside
    lamp = box((half - inner, 0.13, 0.9), ((half + inner) / 2, y, -length / 2))
    parts["headlights"] = (on_body(both(lamp)), "glow")
    tall = 0.42 if p.style in ("van", "suv") else 0.14
    lamp = box((half - inner, tall, 0.7), ((half + inner) / 2, deck * 0.82 + (tall - 0.14) / 2, length / 2))
    parts["taillights"] = (on_body(both(lamp)), "lamp red")
    mirror = ellipsoid((0.24, 0.16, 0.13),
                       (half * 0.97 + 0.06, belt + 0.09, (hood + 0.35 * (a - hood) - 0.5) * length + 0.14), 12)
    parts["mirrors"] = (both(mirror), p.paint)
    if p.extra == "roof rails" and p.style in ("suv", "van", "hatchback"):
        x, z0, z1 = half * narrow * 0.8, (a - 0.5) * length + 0.15, (roof_end - 0.5) * length - 0.1
        path = [(x, height - 0.05, z0), (x, height + 0.05, z0 + 0.12), (x, height + 0.05, z1 - 0.12),
                (x, height - 0.08, z1)]
        parts["rails"] = (both(tube(path, 0.045, 8)), "charcoal")
    elif p.extra == "spoiler" and p.style in ("coupe", "sedan", "hatchback"):
        z = length / 2 - 0.2 if p.style != "hatchback" else (roof_end - 0.5) * length + 0.02
        y = deck if p.style != "hatchback" else height * 0.975
        blade = box((width * 0.8, 0.06, 0.26), (0, y + (0.16 if p.style != "hatchback" else -0.01), z), 0.015)
        posts = both(box((0.08, 0.3, 0.16), (width * 0.28, y + 0.02, z - 0.02)))
        parts["spoiler"] = (union(blade, posts) if p.style != "hatchback" else blade, p.paint)
    elif p.extra == "roof box" and p.style != "coupe":
        z = ((a + min(roof_end, 0.8)) / 2 - 0.5) * length
        size = (width * 0.5, 0.3, min((roof_end - a) * length * 0.9, 1.7))
        parts["roof box"] = (union(cushion(size, (0, height + 0.15, z)), box((width * 0.55, 0.12, 0.3),
                                                                             (0, height, z))), "charcoal")
    return parts


# Chair

CHAIR: Space = {
    "back": ("slats", "ladder", "panel", "rounded"),
    "base": ("legs", "turned", "sled", "pedestal", "star"),
    "seat": ("flat", "cushion", "round"),
    "arms": ("none", "posts", "loop"),
    "stretchers": ("none", "sides", "box"),
    "slats": (3, 4, 5),
    "width": Range(0.42, 0.56),
    "depth": Range(0.40, 0.52),
    "height": Range(0.40, 0.49),
    "thickness": Range(0.04, 0.075),
    "rear": Range(0.80, 1.0),
    "back_height": Range(0.36, 0.62),
    "back_tilt": Range(4.0, 15.0),
    "back_curve": Range(0.0, 0.07),
    "leg": Range(0.036, 0.056),
    "leg_taper": Range(0.6, 1.0),
    "splay": Range(0.0, 0.07),
    "arm_height": Range(0.18, 0.25),
    "frame": (*WOODS, "white", "black", "steel", "charcoal"),
    "fabric": (*FABRICS, *WOODS),
}


def chair(p: SimpleNamespace) -> Parts:
    w, d, top = p.width, p.depth, p.height
    under = top - p.thickness
    outline = superellipse(2.6, 28) * [w, d] if p.seat == "round" else rectangle(w, d, 0.06, p.rear)
    seat = extrude(outline, p.thickness, "y", (0, top - p.thickness / 2, 0), 0.010)
    if p.seat == "cushion":
        seat = union(
            seat,
            loft([((0, top - 0.01, -0.005), 0.97, 0.97), ((0, top + 0.025, -0.005), 0.96, 0.96),
                  ((0, top + 0.045, -0.005), 0.84, 0.84)], "y", outline))
    parts: Parts = {"seat": (seat, p.fabric)}

    x, z = w / 2 - p.leg * 0.8, d / 2 - p.leg * 0.8
    if p.seat == "round":
        x, z = 0.78 * x, 0.78 * z
    corners = [(sx * x * (p.rear if sz > 0 else 1.0), sz * z) for sx, sz in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    feet = [(a + np.sign(a) * p.splay * 0.6, b + np.sign(b) * p.splay) for a, b in corners]
    small = p.leg * p.leg_taper
    base: list[Manifold] = []
    if p.base in ("legs", "turned"):
        for (a, b), (fa, fb) in zip(corners, feet):
            if p.base == "legs":
                base.append(loft([((a, under + 0.02, b), p.leg, p.leg), ((fa, 0, fb), small, small)], "y", SQUARE))
            else:
                swell = ((1.0, 0.8), (0.8, 1.15), (0.55, 0.95), (0.5, 1.25), (0.45, 0.95), (0.15, p.leg_taper), (0.0,
                                                                                                                 0.8))
                base.append(
                    loft([((fa + (a - fa) * t, (under + 0.02) * t, fb + (b - fb) * t), p.leg * s, p.leg * s)
                          for t, s in swell]))
        y = under * 0.42
        joints = [(a + (fa - a) * 0.58, y, b + (fb - b) * 0.58) for (a, b), (fa, fb) in zip(corners, feet)]
        pairs = {"none": [], "sides": [(0, 3), (1, 2)], "box": [(0, 1), (1, 2), (2, 3), (3, 0)]}[p.stretchers]
        base += [tube([joints[i], joints[j]], 0.4 * p.leg, 8) for i, j in pairs]
    elif p.base == "sled":
        for s in (-1, 1):
            (a, b), (fa, fb) = corners[1], feet[1]
            path = [(s * a, under + 0.02, b), (s * fa, 0.02, fb), (s * fa * p.rear, 0.02, -fb),
                    (s * a * p.rear, under + 0.02, -b)]
            base.append(tube(rounded(path, 0.07, closed=False), p.leg * 0.45))
    else:
        reach = min(w, d) * (0.44 + 0.5 * p.splay) + 0.04
        if p.base == "pedestal":
            base.append(
                lathe([(0, 2 * reach), (0.02, 2 * reach), (0.05, 0.9 * reach), (0.09, 1.3 * p.leg),
                       (0.5 * under, p.leg * 1.1), (under - 0.06, p.leg * 1.2), (under + 0.02, 0.2)]))
        else:
            base.append(
                lathe([(0.06, p.leg), (0.07, 1.6 * p.leg), (0.16, 1.5 * p.leg), (0.17, p.leg), (under - 0.05, p.leg),
                       (under - 0.04, 0.17), (under + 0.02, 0.2)]))
            for i in range(5):
                u, v = cos(2 * pi * i / 5 - pi / 2), sin(2 * pi * i / 5 - pi / 2)
                base.append(tube([(0, 0.12, 0), (u * reach, 0.06, v * reach)], [p.leg * 0.62, p.leg * 0.45], 8))
                base.append(ellipsoid((0.055, 0.06, 0.055), (u * reach, 0.03, v * reach), 12))
    metal = "steel" if p.base in ("sled", "pedestal") and p.frame in WOODS else p.frame
    parts["base"] = (union(*base), metal)

    h, t = p.back_height, 0.036
    rear_w = w * (p.rear if p.seat != "round" else 0.8)
    if p.back == "rounded":
        thick = 0.05
        angle = np.linspace(-0.08, pi + 0.08, 21)
        ring = np.stack([np.cos(angle), np.sin(angle)], 1)
        wrap = np.concatenate(
            [ring * [w / 2 + 0.01, d * 0.55], (ring * [w / 2 + 0.01 - thick, d * 0.55 - thick])[::-1]])
        wall = extrude(wrap, h + 0.06, "y", (0, under + (h + 0.06) / 2, -0.02))
        slope = radians(54 + 1.5 * p.back_tilt)  # the arms rise to the back
        low = top + p.arm_height * 0.8
        wall = wall.trim_by_plane((0, -cos(slope), sin(slope)), -cos(slope) * low - 0.12 * d * sin(slope))
        parts["back"] = (wall, p.fabric)
    else:
        sag = p.back_curve
        post_x = rear_w / 2 - p.leg * 0.7
        posts = [
            loft([((s * post_x, 0, 0), p.leg, p.leg), ((s * post_x, h, 0), 0.8 * p.leg, 0.8 * p.leg)], "y",
                 SQUARE if p.base == "legs" else ROUND) for s in (-1, 1)
        ]

        def rail(y: Number, tall: Number) -> Manifold:
            return extrude(arc_strip(2 * post_x, sag, t), tall, "y", (0, y, -t / 2))

        if p.back == "slats":
            sticks = []
            for sx in spread(p.slats, 2 * post_x * 0.92):
                sz = sag * (1 - (sx / post_x)**2)
                sticks.append(box((0.5 * rear_w / p.slats, h * 0.8, t * 0.85), (sx, h * 0.55, sz), 0.004))
            back = union(*posts, rail(h - 0.035, 0.085), rail(0.14 * h, 0.05), *sticks)
        elif p.back == "ladder":
            back = union(*posts,
                         *[rail(h * 0.58 + y, 0.5 * h * 0.84 / p.slats + 0.01) for y in spread(p.slats, h * 0.84)])
        else:
            panel = extrude(arc_strip(rear_w, sag, 0.05), h, "y", (0, h * 0.52, -0.03))
            mask = rounded([(-rear_w / 2, h * 0.16), (rear_w / 2, h * 0.16), (rear_w * 0.46, h), (-rear_w * 0.46, h)],
                           0.14, segments=6)
            back = union(panel ^ extrude(mask, 1.0, "z"), *[post.trim_by_plane((0, -1, 0), -0.6 * h) for post in posts])
        back = back.rotate((p.back_tilt, 0, 0)).translate(
            (0, under + 0.01, d / 2 - p.leg * 0.6 * (1.6 if p.seat == "round" else 1.0)))
        parts["back"] = (back, p.fabric if p.back == "panel" else p.frame)
        if p.arms != "none":
            y = top + p.arm_height
            back_z = d / 2 - p.leg * 0.6 + tan(radians(p.back_tilt)) * (p.arm_height + p.thickness) - (
                0.02 if p.seat == "round" else 0)
            front = -d * 0.3
            ax, bx = w / 2 - 0.01, rear_w / 2 - p.leg * 0.7
            if p.arms == "posts":
                pad = extrude(
                    rounded([(ax - 0.03, front - 0.06), (ax + 0.03, front - 0.06), (bx + 0.028, back_z + 0.01),
                             (bx - 0.028, back_z + 0.01)], 0.02), 0.034, "y", (0, y, 0))
                arms = both(pad, tube([(ax - 0.015, top - 0.03, front), (ax, y, front)], 0.45 * p.leg, 8))
            else:
                path = [(ax - 0.02, under + 0.02, front + 0.02), (ax, y, front - 0.02), (bx, y, back_z)]
                arms = both(tube(rounded(path, 0.11, closed=False, segments=6), 0.46 * p.leg))
            parts["arms"] = (arms, p.frame)
    return parts


# Display

DISPLAY: Space = {
    "style": ("flat", "curved", "television", "all-in-one", "crt"),
    "stand": ("plate", "round", "feet", "hoop", "easel"),
    "ratio": ("4:3", "16:9", "21:9", "portrait"),
    "buttons": (0, 3, 5),
    "height": Range(0.34, 0.46),
    "thickness": Range(0.034, 0.055),
    "bezel": Range(0.018, 0.036),
    "chin": Range(0.0, 0.05),
    "corner": Range(0.008, 0.04),
    "bulge": Range(0.04, 0.09),
    "tilt": Range(0.0, 9.0),
    "lift": Range(0.06, 0.16),
    "neck": Range(0.045, 0.10),
    "foot_width": Range(0.34, 0.56),
    "foot_depth": Range(0.17, 0.26),
    "curvature": Range(0.05, 0.10),
    "case": ("black", "charcoal", "gray", "white", "steel", "cream"),
    "image": ("screen", "navy", "teal", "charcoal"),
}


def display(p: SimpleNamespace) -> Parts:
    ratio = {"4:3": 1.3, "16:9": 1.75, "21:9": 2.25, "portrait": 0.66}[p.ratio]
    if p.style == "crt":
        ratio = 1.25
    elif p.style == "television":
        ratio = max(ratio, 1.75)
    h = p.height * (1.35 if p.ratio == "portrait" and ratio < 1 else 1.0)
    w = h * ratio
    t = p.thickness
    chin = p.chin + (0.07 if p.style == "all-in-one" else 0.0)
    window = (w - 2 * p.bezel, h - 2 * p.bezel - chin)
    window_y = chin / 2
    frame_outline = rectangle(w, h, p.corner)
    if p.style == "curved":
        sag = p.curvature * w
        panel = extrude(arc_strip(w, sag, t), h, "y", (0, 0, -sag)) ^ extrude(frame_outline, 2.0, "z")
        glass = extrude(arc_strip(w, sag, 0.02), h, "y",
                        (0, 0, -sag - 0.004)) ^ extrude(rectangle(*window, 0.006) + np.array([0, window_y]), 2.0, "z")
    else:
        panel = extrude(frame_outline, t, "z", (0, 0, t / 2), 0.006)
        panel = panel - box((window[0], window[1], 0.016), (0, window_y, 0))
        glass = box((window[0], window[1], 0.03), (0, window_y, 0.006 + 0.015))
    back_z = t
    depth = {"crt": 0.9 * h, "television": p.bulge * 0.7, "all-in-one": p.bulge * 0.6}.get(p.style, p.bulge)
    share = {"crt": (0.96, 0.55), "television": (0.8, 0.7), "all-in-one": (0.9, 0.6)}.get(p.style, (0.62, 0.45))
    wide = 0.35 if p.style == "curved" else 1.0
    hump = loft([((0, 0, back_z - 0.02), wide * share[0] * w, share[0] * h),
                 ((0, 0, back_z + 0.4 * depth), wide * share[0] * 0.97 * w, share[0] * 0.96 * h),
                 ((0, -0.02 * h, back_z + depth), wide * share[1] * w, share[1] * h)], "z", SOFT)
    case = union(panel, hump)
    if p.buttons:
        spots = [(0.3 * w - 0.03 * i, -h / 2 + max(p.bezel + chin, 0.03) / 2) for i in range(p.buttons)]
        bent = p.curvature * w if p.style == "curved" else 0.0
        dots = [
            tube([(x, y, 0.02), (x, y, -0.008)], 0.009, 10).translate((0, 0, -bent * (2 * x / w)**2)) for x, y in spots
        ]
    lift = {"crt": 0.05}.get(p.style, p.lift)
    chin_z = 0.6 * t - 0.45 * h * sin(radians(p.tilt))  # the panel's lower edge, which the tilt brings forward
    center = lift + h / 2 + 0.02

    def place(solid: Manifold) -> Manifold:
        return solid.rotate((p.tilt, 0, 0)).translate((0, center, 0))

    parts: Parts = {"case": (place(case), p.case), "screen": (place(glass), p.image)}
    if p.buttons:
        parts["buttons"] = (place(union(*dots)), "steel" if p.case != "steel" else "charcoal")
    foot_w, foot_d, neck = min(p.foot_width, 0.95 * w), p.foot_depth, p.neck
    z = back_z + 0.4 * depth
    up = center - 0.12 * h
    if p.style == "crt":
        stand = lathe([(0, 0.75 * h), (0.02, 0.75 * h), (0.03, 0.5 * h), (center - 0.4 * h, 0.42 * h)], (0, 0, 0.4 * h))
    elif p.style == "television" and p.stand in ("feet", "hoop"):
        x = 0.36 * w
        leg = union(
            *
            [tube([(x, lift + 0.05, chin_z), (x * 1.08, 0.012, s * foot_d * 0.6)], [0.018, 0.014], 8) for s in (-1, 1)])
        stand = both(leg)
    elif p.stand == "easel":
        x = (0.1 if p.style == "curved" else 0.26) * w
        stand = both(
            loft([((x, center - 0.1 * h, z), neck, 0.03), ((x + 0.04 * w, 0, foot_d * 0.55 + z), neck * 0.7, 0.03)],
                 "y", SQUARE),
            loft([((x, lift + 0.07, chin_z), neck, 0.03), ((x + 0.02 * w, 0, chin_z - 0.06), neck * 0.7, 0.03)], "y",
                 SQUARE))
    elif p.stand == "hoop":
        path = [(foot_w * 0.4, 0.016, -foot_d * 0.55), (foot_w * 0.4, 0.016, z + 0.02),
                (foot_w * 0.16, up * 0.5, z + 0.04), (neck * 0.3, up, z)]
        bar = tube(rounded(path, 0.06, closed=False), 0.017)
        front = tube([(-foot_w * 0.4, 0.016, -foot_d * 0.5), (foot_w * 0.4, 0.016, -foot_d * 0.5)], 0.017)
        stand = union(both(bar), front)
    elif p.stand == "feet":
        path = [(foot_w / 2, 0.015, -foot_d * 0.7), (0, 0.03, z + 0.01)]
        rear = [(foot_w / 2.4, 0.015, z + foot_d * 0.55), (0, 0.03, z + 0.01)]
        column = loft([((0, 0.005, z), neck, 0.04), ((0, up, z), neck * 0.8, 0.034)], "y", SOFT)
        stand = union(both(tube(path, [0.015, 0.024], 8), tube(rear, [0.015, 0.024], 8)), column)
    else:
        outline = superellipse(2.0, 32) if p.stand == "round" else superellipse(8.0, 32)
        foot = loft([((0, 0, z - 0.03), foot_w, foot_d), ((0, 0.012, z - 0.03), foot_w, foot_d),
                     ((0, 0.026, z - 0.03), foot_w * 0.92, foot_d * 0.9)], "y", outline)
        column = loft([((0, 0.01, z), neck * 1.6, 0.06), ((0, 0.05, z), neck, 0.042), ((0, up, z), neck, 0.04)], "y",
                      SOFT)
        stand = union(foot, column)
    parts["stand"] = (stand, "steel" if p.stand == "hoop" else p.case)
    return parts


# Lamp

LAMP: Space = {
    "style": ("table", "floor", "desk", "pendant", "arc", "tripod"),
    "shade": ("cone", "drum", "dome", "globe", "bell"),
    "base": ("disc", "square", "dome", "vase", "stack"),
    "arms": (1, 3),
    "shade_width": Range(0.34, 0.50),
    "shade_height": Range(0.22, 0.36),
    "shade_taper": Range(0.45, 0.75),
    "stem": Range(0.030, 0.045),
    "height": Range(0.40, 0.62),
    "base_width": Range(0.24, 0.36),
    "base_height": Range(0.035, 0.08),
    "belly": Range(0.14, 0.26),
    "belly_position": Range(0.3, 0.6),
    "reach": Range(0.35, 0.6),
    "lower_angle": Range(15.0, 35.0),
    "head_angle": Range(10.0, 40.0),
    "metal": ("brass", "steel", "black", "white", "red", "teal", "oak", "walnut"),
    "cloth": ("cream", "white", "sand", "orange", "teal", "burgundy", "yellow"),
}


def lamp_shade(kind: str, width: Number, height: Number, taper: Number) -> Manifold:
    """Shade hanging from the origin: open below, its walls and its cap thick enough to hold the stem."""
    sides = superellipse(2.0, 28)
    if kind == "globe":
        size = 0.5 * (width + height)
        return Manifold.sphere(0.5, 32).scale((size, size * 0.95, size)).translate((0, -0.45 * size, 0))
    top = {"cone": taper * 0.6, "drum": 0.85 + 0.15 * taper, "dome": 0.3, "bell": 0.35}[kind]
    shapes: dict[str, list[tuple[float, float]]] = {
        "cone": [(0, top), (1, 1)],
        "drum": [(0, top), (1, 1)],
        "dome": [(0, top), (0.12, 0.58), (0.35, 0.82), (0.65, 0.95), (1, 1)],
        "bell": [(0, top), (0.3, 0.42 + 0.1 * taper), (0.6, 0.6), (0.85, 0.82), (1, 1)],
    }
    curves = shapes[kind]
    if len(curves) > 2:
        curves = [(float(u), float(v)) for u, v in curve(curves, 3)]
    outer = lathe([(-height * u, width * v) for u, v in curves], (0, 0, 0), sides)
    wall = 0.035
    inner = lathe([(-height * u - (wall if i == 0 else 0), width * v - 2 * wall)
                   for i, (u, v) in enumerate(curves)] + [(-height - 0.1, width - 2 * wall)], (0, 0, 0), sides)
    return outer - inner


def lamp(p: SimpleNamespace) -> Parts:
    floor = p.style in ("floor", "arc", "tripod")
    # On the axis, 32 voxels to the longest edge miss a round stem thinner than 4.4% of that edge.
    s = p.stem * {"floor": 2.2, "arc": 2.2, "tripod": 1.8, "table": 1.0}.get(p.style, 1.3)
    w, h = p.shade_width, p.shade_height
    shade = lamp_shade(p.shade, w, h, p.shade_taper)
    bulb = ellipsoid((0.1, 0.13, 0.1), (0, -0.11, 0), 12)
    socket = tube([(0, 0.015, 0), (0, -0.09, 0)], 0.03, 10)
    if p.style == "pendant":
        drop = p.height * (1.1 if p.arms == 1 else 1.3)
        n = p.arms
        parts: Parts = {}
        shades, bulbs, cords = [], [], []
        scale = 1.0 if n == 1 else 0.6
        for i in range(n):
            x, z = (0.0, 0.0) if n == 1 else (0.15 * cos(2 * pi * i / 3 + 0.5), 0.15 * sin(2 * pi * i / 3 + 0.5))
            y = -drop * (1.0 if n == 1 else 0.48 + 0.26 * i)
            shades.append(shade.scale((scale, scale, scale)).translate((x, y, z)))
            bulbs.append(union(bulb, socket).scale((scale, scale, scale)).translate((x, y, z)))
            cords.append(tube([(x, 0, z), (x, y - 0.02, z)], 0.5 * s if n == 1 else 0.42 * s, 8))
        rose = p.base_width * 0.55 if n == 1 else 0.42
        plate = lathe([(-0.8 * p.base_height, rose * 0.6), (0, rose), (0.02, rose)])
        parts["shade"] = (union(*shades), p.cloth)
        parts["bulb"] = (union(*bulbs), "glow")
        parts["cord"] = (union(*cords), "black" if p.metal != "black" else "brass")
        parts["canopy"] = (plate, p.metal)
        return parts

    tall = p.height * {"floor": 2.6, "arc": 2.8, "tripod": 2.2, "desk": 1.0}.get(p.style, 0.85)
    spread_ = p.base_width * (1.25 if floor else 1.0)
    if p.style == "desk":
        spread_ *= 0.9
    low = p.base_height
    if p.base == "square":
        base = box((spread_, low, spread_), (0, low / 2, 0), 0.012)
    elif p.base == "dome":
        base = lathe([(0, spread_), (0.02, spread_), (low * 0.8, spread_ * 0.8), (low * 1.5, spread_ * 0.35),
                      (low * 1.7, s)])
    else:
        base = lathe([(0, spread_), (low * 0.7, spread_), (low, spread_ * 0.92)])

    if p.style == "desk":
        a, b = radians(p.lower_angle), radians(p.lower_angle + 55)
        lower, upper = 0.9 * tall, p.reach * 1.1
        elbow = (0.0, low + lower * cos(a), lower * sin(a))
        tip = (0.0, elbow[1] + upper * cos(b), elbow[2] - upper * sin(b))
        arm = union(tube([(0, low - 0.02, 0), elbow], 0.45 * s, 10), tube([elbow, tip], 0.45 * s, 10),
                    ellipsoid((0.07, 0.07, 0.07), elbow, 12), ellipsoid((0.065, 0.065, 0.065), tip, 12))
        head = shade.scale((0.72, 0.8, 0.72)).rotate((p.head_angle, 0, 0)).translate((0, tip[1] + 0.02, tip[2]))
        light = union(bulb, socket).scale((0.8, 0.8, 0.8)).rotate((p.head_angle, 0, 0)).translate(
            (0, tip[1] + 0.02, tip[2]))
        return {
            "base": (base, p.metal),
            "arm": (arm, p.metal),
            "shade": (head, p.metal if p.shade != "drum" else p.cloth),
            "bulb": (light, "glow")
        }
    if p.style == "arc":
        reach = p.reach * 1.7
        path = curve([(0, low - 0.02, 0.35), (0, tall * 0.55, 0.32), (0, tall * 0.95, 0.35 - 0.35 * reach),
                      (0, tall * 0.88, 0.35 - 0.9 * reach), (0, tall * 0.80, 0.35 - reach)])
        end = (0.0, tall * 0.80, 0.35 - reach)
        return {
            "base": (base.scale((1.15, 1.2, 1.15)).translate((0, 0, 0.35)), p.metal),
            "arm": (tube(path, 0.55 * s, 10), p.metal),
            "shade": (shade.translate((0, end[1] + 0.02, end[2])), p.cloth),
            "bulb": (union(bulb, socket).translate((0, end[1] + 0.01, end[2])), "glow")
        }
    parts = {}
    if p.style == "tripod":
        reach = spread_ * 0.9 + 0.05
        legs = []
        for i in range(3):
            u, v = cos(2 * pi * i / 3 + pi / 2), sin(2 * pi * i / 3 + pi / 2)
            legs.append(tube([(0.03 * u, tall, 0.03 * v), (reach * u, 0, reach * v)], [0.55 * s, 0.5 * s], 8))
        hub = lathe([(tall - 0.1, 0.10), (tall + 0.02, 0.12), (tall + 0.04, s)])
        parts["legs"] = (union(*legs), p.metal)
        parts["stem"] = (union(hub, tube([(0, tall - 0.02, 0), (0, tall + h * 0.8, 0)], 0.5 * s, 10)), "brass")
        top = tall + h * 0.85 + 0.02
    elif p.style == "table" and p.base in ("vase", "stack"):
        b, m = p.belly, p.belly_position
        if p.base == "vase":
            profile = [(0, 0.7 * b), (0.02, 0.72 * b), (m * tall * 0.5, 0.92 * b), (m * tall, b),
                       (m * tall + 0.35 * (tall - m * tall), 0.78 * b), (tall * 0.93, 0.34 * b), (tall, 0.42 * b)]
            body = lathe([(y, 1.25 * d) for y, d in profile], (0, 0, 0), superellipse(2.0, 28))
        else:
            balls = [
                ellipsoid((b * f, tall * 0.42, b * f), (0, tall * c, 0))
                for f, c in ((1.0, 0.2), (0.85, 0.52), (0.7, 0.82))
            ]
            body = union(*balls, lathe([(0, 0.9 * b), (0.025, 0.9 * b), (0.03, 0.5 * b)]))
        parts["base"] = (body, p.metal)
        top = tall + 0.06 + h * 0.8
        parts["stem"] = (tube([(0, tall * 0.7, 0), (0, top, 0)], 0.5 * s, 10), "brass")
    else:
        parts["base"] = (base, p.metal)
        bead = (0.9 if floor else 0.4) * p.belly
        rise = [(p.belly_position - 0.06, s), (p.belly_position, bead), (p.belly_position + 0.06, s)]
        collar = lathe([(m * tall, d) for m, d in rise])
        top = tall + h * 0.5
        parts["stem"] = (union(tube([(0, low - 0.02, 0), (0, top, 0)], 0.5 * s, 10), collar), p.metal)
        if p.style == "floor" and p.arms == 3:
            y = tall * 0.58
            end = (0.0, y + 0.12, -0.26)
            reading = lamp_shade("cone", 0.2, 0.16, 0.7).rotate((-25, 0, 0)).translate((0, end[1] + 0.02, end[2]))
            parts["reading arm"] = (tube(rounded([(0, y, 0), (0, y, -0.26), end], 0.1, closed=False), 0.4 * s,
                                         8), p.metal)
            parts["reading shade"] = (union(reading, tube([end, (0, end[1] - 0.06, end[2] + 0.02)], 0.035, 8)), p.metal)
    width = 1.25 if floor else 1.0
    parts["shade"] = (shade.scale((width, width, width)).translate((0, top + 0.01, 0)), p.cloth)
    parts["bulb"] = (union(bulb, socket).translate((0, top, 0)), "glow")
    return parts


# Loudspeaker

LOUDSPEAKER: Space = {
    "style": ("bookshelf", "tower", "center", "cylinder", "sphere", "soundbar"),
    "drivers": (1, 2, 3),
    "support": ("none", "spikes", "plinth", "stand"),
    "port": ("none", "round", "slot"),
    "width": Range(0.20, 0.28),
    "height": Range(0.34, 0.46),
    "depth": Range(0.24, 0.36),
    "bevel": Range(0.006, 0.04),
    "woofer": Range(0.66, 0.84),
    "tweeter": Range(0.22, 0.34),
    "cone_depth": Range(0.02, 0.05),
    "surround": Range(0.014, 0.024),
    "dust_cap": Range(0.25, 0.42),
    "rake": Range(0.0, 8.0),
    "boat_tail": Range(0.55, 1.0),
    "support_height": Range(0.03, 0.07),
    "finish": (*WOODS, "white", "black", "charcoal", "red", "navy"),
    "cone": ("black", "charcoal", "yellow", "steel", "cream"),
}


def loudspeaker(p: SimpleNamespace) -> Parts:
    w, h, d = {
        "tower": (p.width * 0.95, p.height * 2.4, p.depth),
        "center": (p.height * 1.35, p.width * 0.92, p.depth * 0.95),
        "cylinder": (p.width, p.height * 1.1, p.width),
        "sphere": (p.height * 0.85, p.height * 0.85, p.height * 0.85),
        "soundbar": (p.height * 2.6, p.width * 0.55, p.depth * 0.45),
    }.get(p.style, (p.width, p.height, p.depth))
    front = -d / 2
    if p.style == "cylinder":
        cabinet_ = lathe([(0, w * 0.94), (0.015, w), (h - 0.02, w), (h, w * 0.9)], (0, 0, 0), superellipse(2.0, 36))
    elif p.style == "sphere":
        cabinet_ = Manifold.sphere(0.5, 40).scale((w, h, d)).translate((0, h / 2, 0))
    elif p.style == "soundbar":
        cabinet_ = extrude(rectangle(d, h, 0.3 * h), w, "x", (0, h / 2, 0))
    elif p.boat_tail < 0.8:
        side = [(-w / 2, front), (w / 2, front), (w * 0.53, front + 0.3 * d), (w * 0.46, front + 0.7 * d),
                (w / 2 * p.boat_tail, d / 2), (-w / 2 * p.boat_tail, d / 2), (-w * 0.46, front + 0.7 * d),
                (-w * 0.53, front + 0.3 * d)]
        cabinet_ = extrude(rounded(side, 0.02), h, "y", (0, h / 2, 0), 0.008)
    else:
        cabinet_ = box((w, h, d), (0, h / 2, 0), p.bevel, 3)

    def driver(size: Number, x: Number, y: Number, z: Number) -> tuple[Manifold, Manifold, Manifold]:
        """What is cut from the cabinet, the funnel with its cap that fills the cut, and the ring about it."""
        deep = p.cone_depth * size / 0.16

        def funnel(grow: Number) -> Manifold:
            path = [(x, y, z - 0.2), (x, y, z), (x, y, z + deep + grow)]
            return tube(path, [size / 2 + grow, size / 2 + grow, size * 0.18 + grow], 24)

        cap = ellipsoid((size * p.dust_cap, size * p.dust_cap, size * 0.3), (x, y, z + deep), 12)
        ring = torus(size + 0.3 * p.surround, 1.6 * p.surround, "z", (x, y, z))
        return funnel(0.006), union((funnel(0.014) - funnel(0.0)).trim_by_plane((0, 0, 1), z), cap), ring

    woofer = p.woofer * w
    tweeter = p.tweeter * w
    places: list[tuple[float, float, float]] = []  # diameter, x, y
    if p.style == "soundbar":
        size = min(0.62 * h, 0.09)
        places = [(size, x, h / 2) for x in spread(2 * p.drivers + 2, w * 0.92)]
    elif p.style == "cylinder":
        places = []
    elif p.style == "sphere":
        places = [(0.52 * p.woofer * w * 1.2, 0.0, h / 2)]
    elif p.style == "tower":
        places = [(woofer, 0.0, woofer * (0.62 + 1.12 * i)) for i in range(p.drivers)]
        y = places[-1][2] + woofer * 0.62
        places += [(tweeter, 0.0, y + tweeter * 0.75), (0.55 * woofer, 0.0, y + tweeter * 1.5 + 0.36 * woofer)]
        shift = h - 0.05 - places[-1][2] - 0.5 * places[-1][0]
        places = [(size, x, y + shift) for size, x, y in places]
    elif p.style == "center":
        woofer, tweeter = p.woofer * h, p.tweeter * h
        places = [(woofer, -0.5 * w + 0.62 * woofer, h / 2),
                  (tweeter, 0.0 if p.drivers > 1 else 0.25 * w, h * (0.5 if p.drivers < 3 else 0.72))]
        if p.drivers > 1:
            places.append((woofer, 0.5 * w - 0.62 * woofer, h / 2))
        if p.drivers == 3:
            places.append((1.3 * tweeter, 0.0, h * 0.3))
    elif p.drivers == 1:
        places = [(min(0.9 * w, 0.8 * h) * p.woofer / 0.84, 0.0, h / 2)]
    elif p.drivers == 2:
        places = [(woofer, 0.0, woofer * 0.62), (tweeter, 0.0, 0.5 * (woofer * 1.2 + h))]
    else:
        small = min(woofer * 0.72, (h - tweeter) * 0.36)
        places = [(small, 0.0, small * 0.62), (small, 0.0, h - small * 0.62), (tweeter, 0.0, h / 2)]
    recesses, cones, rings = [], [], []
    for size, x, y in places:
        z = front + (0.5 * d * (1 - (1 - (size / d)**2)**0.5) if p.style == "sphere" else 0.0)
        recess, cone, ring = driver(size, x, y, z)
        recesses.append(recess)
        cones.append(cone)
        rings.append(ring)
    parts: Parts = {}
    if p.style == "cylinder":
        band = lathe([(h * 0.07, w * 1.02), (h * 0.3, w * 1.05), (h * (0.72 + p.boat_tail * 0.18), w * 1.02)],
                     (0, 0, 0), superellipse(2.0, 36))
        knob = torus(w * 2 * p.dust_cap, 1.4 * p.surround, "y", (0, h, 0))
        eye, face, ring = driver(p.tweeter * w * 2.2, 0.0, h * 0.42, front + 0.004)
        parts["cabinet"] = (cabinet_ - eye, p.finish)
        parts["grille"] = (band - eye, "charcoal" if p.finish != "charcoal" else "steel")
        parts["cones"] = (face, p.cone)
        parts["surrounds"] = (ring, "black")
        parts["knob"] = (knob, "steel")
    else:
        holes = union(*recesses)
        if p.port != "none" and p.style in ("tower", "bookshelf"):
            low = places[0][2] - 0.6 * places[0][0]  # what is free below the lowest driver
            if p.style == "tower" and low > 0.2:
                mouth = tube([(0, 0.6 * low, front - 0.1), (0, 0.6 * low, front + 0.06)], 0.12 * w, 16)
                slot = box((0.6 * w, 0.03, 0.16), (0, 0.6 * low, front))
                holes = union(holes, slot if p.port == "slot" else mouth)
            elif p.style == "bookshelf" and p.drivers == 2:
                x = w * 0.3
                holes = union(
                    holes,
                    tube([(x, h - 0.06, front - 0.1),
                          (x, h - 0.06, front + 0.06)], 0.025, 12) if p.port == "round" else box((0.7 * w, 0.022, 0.16),
                                                                                                 (0, 0.025, front)))
        parts["cabinet"] = (cabinet_ - holes, p.finish)
        parts["cones"] = (union(*cones), p.cone)
        parts["surrounds"] = (union(*rings), "black" if p.finish != "black" else "steel")
    if p.style in ("bookshelf", "tower") and p.rake > 2:
        parts = {name: (solid.rotate((p.rake, 0, 0)), color) for name, (solid, color) in parts.items()}

    lift = p.support_height
    grow = 0.02 + d / 2 * sin(radians(p.rake))
    x, z = w * 0.36, d * 0.33
    if p.style == "sphere":
        legs = [
            tube([(0, h * 0.3, 0), (0.34 * w * cos(a), -lift, 0.34 * w * sin(a))], [0.03, 0.018], 8)
            for a in (pi / 2, pi * 7 / 6, pi * 11 / 6)
        ]
        if p.support == "stand":
            legs = [lathe([(-0.6 - lift, 0.7 * w), (-0.57 - lift, 0.7 * w), (-0.55 - lift, 0.06), (0.2 * h, 0.06)])]
        elif p.support in ("none", "plinth"):
            legs = [lathe([(-lift, 0.62 * w), (-lift + 0.02, 0.62 * w), (0.3 * h, 0.2 * w)])]
        parts["support"] = (union(*legs), "steel")
    elif p.style == "cylinder" or p.support == "none":
        pass
    elif p.support == "spikes" or p.style == "soundbar":
        spikes = [
            lathe([(-lift, 0.026), (0, 0.05), (grow, 0.05)], (sx * x, 0, sz * z)) for sx in (-1, 1) for sz in (-1, 1)
        ]
        parts["support"] = (union(*spikes), "steel")
    elif p.support == "plinth" or p.style == "tower":
        parts["support"] = (box((w * 1.2, lift + grow, d * 1.12), (0, (grow - lift) / 2 - 0.0, 0),
                                0.008), "black" if p.finish != "black" else "steel")
    else:
        post = loft([((0, -0.6, 0), 0.07, 0.1), ((0, grow, 0), 0.06, 0.09)], "y", SOFT)
        stand = union(post, box((w * 1.15, 0.035, d * 1.05), (0, -0.6, 0), 0.008),
                      box((w * 0.8, 0.03, d * 0.8), (0, 0.0, 0)))
        stand = union(stand, box((w * 0.5, grow, d * 0.5), (0, grow / 2, 0)))
        parts["support"] = (stand, "charcoal")
    return parts


# Rifle

RIFLE: Space = {
    "style": ("assault", "hunting", "sniper", "shotgun", "lever", "bullpup"),
    "stock": ("solid", "cheek rest", "skeleton"),
    "sight": ("scope", "iron", "red dot"),
    "muzzle": ("plain", "brake", "suppressor"),
    "magazine": ("straight", "curved", "drum"),
    "bipod": ("none", "folded out"),
    "barrel_length": Range(0.28, 0.44),
    "barrel": Range(0.030, 0.040),
    "receiver_length": Range(0.22, 0.30),
    "receiver_height": Range(0.055, 0.08),
    "receiver_width": Range(0.040, 0.052),
    "stock_length": Range(0.24, 0.34),
    "stock_drop": Range(0.02, 0.06),
    "butt": Range(0.10, 0.15),
    "forend": Range(0.42, 0.72),
    "forend_height": Range(0.045, 0.065),
    "grip_angle": Range(12.0, 32.0),
    "magazine_length": Range(0.08, 0.17),
    "scope_length": Range(0.16, 0.27),
    "furniture": (*WOODS, "black", "olive", "sand", "charcoal"),
    "metal": ("charcoal", "black", "gray"),
}


def rifle(p: SimpleNamespace) -> Parts:
    """The bore is the line x = y = 0, the receiver starts at z = 0 and reaches to z = its length."""
    length, height, width = p.receiver_length, p.receiver_height, p.receiver_width
    classic = p.style in ("hunting", "lever", "shotgun")
    if p.style == "bullpup":
        length *= 1.9
    barrel_length = p.barrel_length * {"sniper": 1.25, "bullpup": 0.6, "assault": 0.85}.get(p.style, 1.1)
    b = p.barrel
    muzzle_z = -barrel_length
    stages = [(0.02, 1.35), (-0.1 * barrel_length, 1.3), (-0.16 * barrel_length, 1.0), (muzzle_z, 0.86)]
    barrels = [tube([(0, 0, z) for z, _ in stages], [0.5 * b * s for _, s in stages], 12)]
    if p.style in ("shotgun", "lever"):
        barrels.append(tube([(0, -b * 0.95, 0.02), (0, -b * 0.95, muzzle_z * 0.86)], 0.46 * b, 12))
        barrels.append(box((0.6 * b, b * 1.3, 0.03), (0, -0.5 * b, muzzle_z * 0.8)))
    if p.muzzle == "suppressor" and not classic:
        barrels.append(
            tube([(0, 0, muzzle_z + 0.03), (0, 0, muzzle_z + 0.02), (0, 0, muzzle_z - 0.12)],
                 [0.4 * b, 0.85 * b, 0.85 * b], 16))
    elif p.muzzle == "brake" and not classic:
        barrels.append(
            tube([(0, 0, muzzle_z + 0.02), (0, 0, muzzle_z + 0.015), (0, 0, muzzle_z - 0.04), (0, 0, muzzle_z - 0.045)],
                 [0.45 * b, 0.72 * b, 0.72 * b, 0.5 * b], 8))
    parts: Parts = {"barrel": (union(*barrels), p.metal)}
    top = 0.42 * height
    receiver = extrude(
        rounded([(-0.0, -0.55 * height), (length, -0.5 * height), (length, top * 0.8), (length * 0.9, top), (0.0, top)],
                0.02), width, "x", bevel=0.006)
    parts["receiver"] = (receiver, p.metal if p.style != "bullpup" else p.furniture)

    # A classic stock runs from the forend through the grip to the butt; others are assembled from pieces.
    back = length + p.stock_length
    drop, butt = p.stock_drop, p.butt
    reach = -p.forend * barrel_length
    if p.style in ("hunting", "lever", "shotgun") or (p.style == "sniper" and p.stock == "solid"):
        wrist = -0.5 * height
        side = [(length * 0.7, -0.05 * height), (length + 0.05, -0.25 * height),
                (length + 0.10, -0.1 * height - drop * 0.5), (back, -drop), (back + 0.008, -drop - butt * 0.5),
                (back, -drop - butt), (length + 0.10, wrist - 0.045 - drop * 0.5), (length * 0.95, wrist - 0.02),
                (length * 0.7, wrist - 0.01)]
        butt_stock = extrude(rounded(side, 0.03), width * 0.92, "x")
        if p.stock == "cheek rest":
            rest = loft([((0, -drop, back - 0.17), width * 0.6, 0.03),
                         ((0, -drop + 0.008, back - 0.14), width * 0.9, 0.05),
                         ((0, -drop + 0.008, back - 0.05), width * 0.9, 0.05),
                         ((0, -drop, back - 0.03), width * 0.6, 0.03)], "z", SOFT)
            butt_stock = union(butt_stock, rest)
        elif p.stock == "skeleton":
            hole = [(back - 0.12, -drop - 0.38 * butt), (back - 0.03, -drop - 0.28 * butt),
                    (back - 0.03, -drop - 0.74 * butt)]
            butt_stock = butt_stock - extrude(rounded(hole, 0.015), 1, "x")
        fore = loft([((0, -0.5 * height * 0.9, length * 0.5), width * 0.9, 0.02),
                     ((0, -0.42 * height, 0.0), width * 0.96, p.forend_height),
                     ((0, -0.3 * height, reach * 0.9), width * 0.82, p.forend_height * 0.75),
                     ((0, -0.22 * height, reach), width * 0.55, p.forend_height * 0.45)], "z", SOFT)
        if p.style == "shotgun":
            z0 = reach * 0.6
            fore = loft([((0, -0.9 * b, z), width * s, p.forend_height * s)
                         for z, s in ((z0 - 0.085, 0.8), (z0 - 0.07, 1), (z0 + 0.07, 1), (z0 + 0.085, 0.8))], "z", SOFT)
        parts["stock"] = (butt_stock, p.furniture)
        parts["forend"] = (fore, p.furniture)
    else:
        if p.style == "bullpup":
            pad = box((width, butt, 0.05), (0, -0.1 * height - 0.15 * butt, length), 0.012, 2)
            cheek = loft([((0, 0.02, length * 0.55), width * 0.7, 0.05), ((0, 0.0, length), width * 0.9, 0.09)], "z",
                         SOFT)
            lower = extrude(
                rounded([(length * 0.42, -0.3 * height), (length, -0.3 * height), (length, -0.4 * butt),
                         (length * 0.5, -0.5 * height - 0.035)], 0.03), width, "x")
            parts["stock"] = (union(pad, cheek, lower), p.furniture)
        elif p.stock == "skeleton":
            frame = [(length - 0.02, -0.0), (back, -0.01), (back, -butt), (length + 0.05, -0.35 * height - 0.02),
                     (length - 0.02, -0.4 * height)]
            hole = [(length + 0.05, -0.028), (back - 0.03, -0.036), (back - 0.03, -butt + 0.045),
                    (length + 0.09, -0.3 * height - 0.022)]
            parts["stock"] = (extrude(rounded(frame, 0.01), width * 0.7, "x") - extrude(rounded(hole, 0.01), 1, "x"),
                              p.furniture if p.furniture not in WOODS else "black")
        else:
            buffer = tube([(0, -0.012, length - 0.03), (0, -0.012, back - 0.02)], 0.019, 12)
            side = [(length + 0.28 * p.stock_length, 0.012), (back, 0.012), (back, -butt + 0.012),
                    (back - 0.04, -butt + 0.012), (length + 0.35 * p.stock_length, -0.05)]
            pieces = union(buffer, extrude(rounded(side, 0.012), width * 0.85, "x"))
            if p.stock == "cheek rest":
                pieces = union(
                    pieces,
                    box((width * 0.7, 0.045, 0.4 * p.stock_length), (0, 0.02, back - 0.25 * p.stock_length), 0.012, 2))
            parts["stock"] = (pieces, p.furniture)
        grip_z = length * (0.36 if p.style == "bullpup" else 0.86)
        lean = tan(radians(p.grip_angle))
        grip = extrude(
            rounded([(grip_z - 0.028, -0.35 * height), (grip_z + 0.03, -0.35 * height),
                     (grip_z + 0.03 + 0.13 * lean, -0.5 * height - 0.12),
                     (grip_z - 0.012 + 0.13 * lean, -0.5 * height - 0.12)], 0.014), width * 0.8, "x", bevel=0.006)
        parts["grip"] = (grip, p.furniture if p.furniture not in WOODS or p.style == "assault" else "black")
        fh = p.forend_height
        fore = loft([((0, -0.004, 0.02), width * 0.98, fh * 1.05), ((0, -0.004, reach + 0.02), width * 0.9, fh * 0.95),
                     ((0, -0.004, reach), width * 0.7, fh * 0.7)], "z", superellipse(6.0, 16))
        parts["forend"] = (fore, p.furniture)

    mag = p.magazine_length
    mag_z = length * 0.72 if p.style == "bullpup" else length * 0.3
    if p.style not in ("lever", "shotgun"):
        mag = mag * (0.5 if classic or p.style == "sniper" else 1.0)
        y = -0.4 * height
        if p.magazine == "drum" and p.style == "assault":
            magazine = union(
                tube([(-0.035, y - 0.5 * mag - 0.02, mag_z), (0.035, y - 0.5 * mag - 0.02, mag_z)], 0.032 + 0.2 * mag,
                     24), box((width * 0.7, mag, 0.06), (0, y - mag * 0.3, mag_z)))
        else:
            bend = 0.35 * mag if p.magazine == "curved" else 0.08 * mag
            left = [(mag_z - 0.034 - bend * t * t, y - mag * t) for t in (0, 0.25, 0.5, 0.75, 1)]
            right = [(mag_z + 0.034 - bend * t * t * 1.05, y - mag * t * 0.93) for t in (1, 0.75, 0.5, 0.25, 0)]
            magazine = extrude(left + right, width * 0.68, "x")
        parts["magazine"] = (magazine, p.metal)
    trigger_z = {"bullpup": length * 0.24}.get(p.style, length * 0.70)
    y = -0.5 * height
    guard = [(0, y + 0.01, trigger_z - 0.045), (0, y - 0.042, trigger_z - 0.035), (0, y - 0.042, trigger_z + 0.03),
             (0, y + 0.005, trigger_z + 0.05)]
    if p.style == "lever":
        guard = [(0, y + 0.01, trigger_z - 0.05), (0, y - 0.05, trigger_z - 0.03),
                 (0, y - 0.07 - p.stock_drop, trigger_z + 0.12), (0, y - 0.03, trigger_z + 0.14),
                 (0, y + 0.0, trigger_z + 0.02)]
    parts["trigger guard"] = (union(tube(rounded(guard, 0.02, closed=False), 0.009, 8),
                                    box((0.014, 0.05, 0.014), (0, y - 0.01, trigger_z))), p.metal)

    if p.sight == "scope" or p.style == "sniper":
        n, y, z0 = p.scope_length, top + 0.042, length * 0.45
        profile = [(-0.5, 1.5), (-0.28, 1.5), (-0.16, 0.9), (0.22, 0.9), (0.3, 1.25), (0.5, 1.25)]
        scope = tube([(0, y, z0 + n * t) for t, _ in profile], [0.0135 * s for _, s in profile], 16)
        knobs = union(tube([(0, y, z0), (0, y + 0.03, z0)], 0.012, 10), tube([(0, y, z0), (0.03, y, z0)], 0.011, 10))
        mounts = [box((0.022, 0.05, 0.024), (0, y - 0.022, z0 + n * t)) for t in (-0.12, 0.18)]
        parts["scope"] = (union(scope, knobs, *mounts), "black")
        rail = box((0.024, 0.018, max(0.4 * n, 0.5 * length)), (0, top, z0))
        parts["rail"] = (rail, p.metal)
    elif p.sight == "red dot":
        z0 = length * 0.4
        frame = box((0.042, 0.052, 0.06), (0, top + 0.03, z0), 0.008) - box((0.022, 0.026, 1), (0, top + 0.034, z0))
        parts["sight"] = (union(frame, box((0.03, 0.02, 0.09), (0, top, z0))), "black")
    else:
        post = union(box((0.014, 0.05, 0.018), (0, 0.02, muzzle_z + 0.03)),
                     torus(0.032, 0.012, "z", (0, 0.05, muzzle_z + 0.03)))
        rear = box((0.03, 0.035, 0.025), (0, top + 0.008, length * 0.8)) - box((0.012, 0.03, 1),
                                                                               (0, top + 0.022, length * 0.8))
        parts["sight"] = (union(post, rear), p.metal)
    if p.style == "assault" and p.sight != "scope":
        handle = [(0, top - 0.01, length * 0.1), (0, top + 0.035, length * 0.2), (0, top + 0.035, length * 0.75),
                  (0, top - 0.01, length * 0.85)]
        if p.stock != "skeleton" and p.sight == "iron":
            parts["carry handle"] = (tube(rounded(handle, 0.02, closed=False), 0.0105, 8), p.metal)
    if p.style in ("sniper", "hunting"):
        bolt = union(
            tube([(0, 0.01, length * 0.75), (0.045, -0.005, length * 0.78), (0.062, -0.03, length * 0.8)], 0.008, 8),
            ellipsoid((0.024, 0.024, 0.024), (0.062, -0.032, length * 0.8), 8))
        parts["bolt"] = (bolt, "steel")
    if p.bipod != "none" and not classic:
        z0 = reach * 0.8
        legs = both(tube([(0.01, -0.01, z0), (0.075, -0.17, z0 - 0.03)], [0.011, 0.009], 8))
        parts["bipod"] = (union(legs, box((0.04, 0.03, 0.03), (0, -0.02, z0))), p.metal)
    return parts


# Sofa

SOFA: Space = {
    "style": ("straight", "sectional", "chaise", "camelback"),
    "arms": ("square", "rolled", "sloped", "none"),
    "back": ("cushions", "tight", "tufted"),
    "legs": ("blocks", "tapered", "plinth", "sled"),
    "seats": (1, 2, 3),
    "seat_width": Range(0.56, 0.74),
    "depth": Range(0.82, 1.0),
    "seat_height": Range(0.36, 0.45),
    "back_height": Range(0.34, 0.50),
    "back_thickness": Range(0.16, 0.24),
    "back_tilt": Range(4.0, 14.0),
    "arm_width": Range(0.12, 0.24),
    "arm_height": Range(0.16, 0.26),
    "cushion": Range(0.12, 0.18),
    "leg_height": Range(0.07, 0.16),
    "leg": Range(0.06, 0.09),
    "fabric": (*FABRICS, "red", "green", "orange", "white"),
    "pillows": (*FABRICS, "yellow", "red", "white"),
    "wood": WOODS,
}


def sofa(p: SimpleNamespace) -> Parts:
    seats = p.seats if p.style != "camelback" else max(2, p.seats)
    if p.style in ("sectional", "chaise"):
        seats = max(2, seats)
    d, low, top = p.depth, p.leg_height, p.seat_height
    inner = seats * p.seat_width
    arm = p.arm_width if p.arms != "none" else 0.0
    w = inner + 2 * arm
    front, rear = -d / 2, d / 2
    thick = p.back_thickness
    deck = top - p.cushion * 0.75
    frame = box((w - 0.01, deck - low, d - 0.03), (0, (deck + low) / 2, 0), 0.02, 2)
    parts: Parts = {}
    extension = 0.0
    if p.style == "chaise":
        extension = 0.62
    elif p.style == "sectional":
        extension = p.seat_width * 1.2
    side_x = inner / 2 - p.seat_width / 2
    bottoms = [frame]
    pads = []
    for x in spread(seats, inner):
        extra = extension if extension and abs(x - side_x) < 1e-6 else 0.0
        pads.append(
            cushion((p.seat_width * 1.01, p.cushion, d - thick * 0.7 + extra),
                    (x, deck + p.cushion / 2 - 0.01, front + (d - thick * 0.7 - extra) / 2 - 0.01)))
    if extension:
        bottoms.append(
            box((p.seat_width + (arm if p.style == "sectional" else 0), deck - low, extension + 0.2),
                (side_x + (arm / 2 if p.style == "sectional" else 0), (deck + low) / 2, front - extension / 2 + 0.1),
                0.02, 2))
    parts["frame"] = (union(*bottoms), p.fabric)
    parts["seat"] = (union(*pads), p.fabric)

    h = top + p.back_height
    back_pads: list[Manifold] = []
    if p.style == "camelback":
        xs = np.linspace(-w / 2 + 0.02, w / 2 - 0.02, 25)
        ridge = h - 0.02 - 0.10 + 0.16 * np.cos(xs / (w / 2) * pi * 0.8)**2 * (1 if seats < 3 else 0.9)
        outline = np.concatenate([np.stack([xs, ridge], 1), [[w / 2 - 0.02, low + 0.02], [-w / 2 + 0.02, low + 0.02]]])
        back = extrude(outline, thick * 0.8, "z", (0, 0, 0))
        back = back.translate((0, -deck, 0)).rotate((p.back_tilt, 0, 0)).translate((0, deck, rear - thick * 0.55))
        roll = tube(np.stack([xs, ridge - 0.03, np.zeros(25)], 1), 0.065, 12)
        roll = roll.translate((0, -deck, 0)).rotate((p.back_tilt, 0, 0)).translate((0, deck, rear - thick * 0.5))
        back = union(back, roll)
    else:
        tall = p.back_height + top - deck + 0.02
        slab = box((w - 0.02, tall + deck - low, thick * 0.7), (0, (tall - deck + low) / 2, 0), 0.035, 2)
        if p.back == "cushions":
            back_pads = [
                cushion((p.seat_width * 1.0, tall * 0.86, thick * 0.95), (x, tall * 0.58, -thick * 0.42), "z", 0.24)
                for x in spread(seats, inner)
            ]
        elif p.back == "tufted":
            count = 3 * seats
            back_pads = [
                loft([((x, 0.1 * tall, -0.28 * thick), inner / count * 1.02, 0.4 * thick),
                      ((x, 0.9 * tall, -0.28 * thick), inner / count * 1.02, 0.4 * thick),
                      ((x, 0.99 * tall, -0.2 * thick), inner / count * 0.9, 0.3 * thick)], "y", superellipse(2.6, 16))
                for x in spread(count, inner)
            ]
        back = slab.rotate((p.back_tilt, 0, 0)).translate((0, deck, rear - thick * 0.4))
        back_pads = [pad.rotate((p.back_tilt, 0, 0)).translate((0, deck, rear - thick * 0.4)) for pad in back_pads]
    parts["back"] = (back, p.fabric)
    if back_pads:
        parts["back cushions"] = (union(*back_pads), p.fabric)

    if p.arms != "none":
        y = top + p.arm_height
        x = w / 2 - arm / 2
        if p.arms == "square":
            one = box((arm, y - low, d - 0.02), (x, (y + low) / 2, 0), 0.03, 2)
        elif p.arms == "rolled":
            r = arm * 0.52
            one = union(box((arm * 0.72, y - r - low, d - 0.04), (x, (y - r + low) / 2, 0), 0.015),
                        tube([(x + 0.02, y - r, front + 0.005), (x + 0.02, y - r, rear - 0.03)], r, 20))
        else:
            side = [(front + 0.02, low), (rear - 0.02, low), (rear - 0.02, y + 0.14), (front + 0.06, y - 0.05)]
            one = extrude(rounded(side, 0.08), arm, "x", (x, 0, 0))
        arms = both(one) if p.style != "sectional" else union(one.mirror((1, 0, 0)), one)
        parts["arms"] = (arms, p.fabric)
    if p.style == "sectional":
        wall = box((max(arm, 0.14), h - 0.06 - low, extension + 0.06),
                   (w / 2 - max(arm, 0.14) / 2, (h - 0.06 + low) / 2, front - extension / 2 + 0.03), 0.035, 2)
        parts["side back"] = (wall, p.fabric)
    if p.arms != "none" and p.cushion > 0.14:
        toss = cushion((0.36, 0.36, 0.16), (0, 0, 0), "z", 0.4).rotate((p.back_tilt + 16, 28, 0))
        parts["pillows"] = (toss.translate((-inner / 2 + 0.2, top + 0.15, rear - thick - 0.14)), p.pillows)

    spots = [(sx * (w / 2 - 0.09), z) for sx in (-1, 1) for z in (front + 0.1, rear - 0.1)]
    if extension:
        spots += [(side_x + sx * (p.seat_width / 2 - 0.08), front - extension + 0.1) for sx in (-1, 1)]
    if p.legs == "plinth":
        base = box((w - 0.14, low + 0.04, d - 0.14), (0, (low + 0.04) / 2, 0))
        if extension:
            base = union(
                base,
                box((p.seat_width - 0.1, low + 0.04, extension + 0.1),
                    (side_x, (low + 0.04) / 2, front - extension / 2 + 0.12)))
    elif p.legs == "sled" and not extension:
        base = union(*[
            tube(
                rounded([(x, low + 0.03, front +
                          0.1), (x, 0.02, front + 0.07), (x, 0.02, rear - 0.07), (x, low + 0.03, rear -
                                                                                  0.1)], 0.05, closed=False), 0.028, 10)
            for x in (-w / 2 + 0.12, w / 2 - 0.12)
        ])
    else:
        small = p.leg * (0.6 if p.legs == "tapered" else 1.0)
        base = union(*[
            loft([((x, 0, z), small, small), ((x, low + 0.04, z), p.leg * 1.15,
                                              p.leg * 1.15)], "y", ROUND if p.legs == "tapered" else SQUARE)
            for x, z in spots
        ])
    parts["legs"] = (base, "steel" if p.legs == "sled" else p.wood)
    return parts


# Table

TABLE: Space = {
    "style": ("dining", "coffee", "desk", "console", "round"),
    "legs": ("square", "tapered", "turned", "hairpin", "trestle", "pedestal", "panels", "sled"),
    "edge": ("square", "beveled", "soft"),
    "extra": ("none", "shelf", "stretchers", "drawer"),
    "width": Range(1.1, 1.9),
    "depth": Range(0.72, 0.98),
    "height": Range(0.70, 0.80),
    "top": Range(0.045, 0.08),
    "overhang": Range(0.02, 0.14),
    "apron": Range(0.05, 0.11),
    "leg": Range(0.055, 0.095),
    "leg_taper": Range(0.5, 0.9),
    "splay": Range(0.0, 0.10),
    "corner": Range(0.01, 0.16),
    "shelf_height": Range(0.18, 0.40),
    "drawers": Range(0.25, 0.38),
    "finish": (*WOODS, "white", "black", "gray"),
    "frame": (*WOODS, "white", "black", "steel", "charcoal"),
}


def table(p: SimpleNamespace) -> Parts:
    w, d, h = {
        "coffee": (p.width * 0.72, p.depth * 0.75, p.height * 0.56),
        "console": (p.width * 0.85, p.depth * 0.5, p.height * 1.08),
        "desk": (p.width * 0.92, p.depth * 0.85, p.height),
        "round": (p.depth * 1.35, p.depth * 1.35, p.height),
    }.get(p.style, (p.width, p.depth, p.height))
    t, leg = p.top, p.leg * (0.85 if p.style in ("coffee", "console") else 1.0)
    under = h - t
    if p.style == "round":
        outline = superellipse(2.0, 40) * [w, d]
    elif p.edge == "soft":
        outline = superellipse(3.2 + 40 * (0.16 - p.corner), 40) * [w, d]
    else:
        outline = rectangle(w, d, p.corner)
    bevel = {"square": 0.004, "beveled": 0.4 * t, "soft": 0.2 * t}[p.edge]
    parts: Parts = {"top": (extrude(outline, t, "y", (0, h - t / 2, 0), bevel), p.finish)}

    share = 0.66 if p.style == "round" else 1.0
    x, z = share * (w / 2 - p.overhang) - leg / 2, share * (d / 2 - p.overhang *
                                                            (0.6 if p.style != "round" else 1)) - leg / 2
    corners = [(-x, -z), (x, -z), (x, z), (-x, z)]
    feet = [(a + np.sign(a) * p.splay * 0.5, b + np.sign(b) * p.splay * 0.5) for a, b in corners]
    up = under + 0.02
    base: list[Manifold] = []
    four = p.legs in ("square", "tapered", "turned", "hairpin") or (p.style == "desk" and p.legs == "pedestal")
    if four:
        for (a, b), (fa, fb) in zip(corners, feet):
            if p.legs == "turned":
                swell = ((1, 1.1), (0.86, 1.1), (0.84, 0.7), (0.8, 1.0), (0.6, 0.95), (0.2, p.leg_taper), (0.15, 0.95),
                         (0.1, 0.6), (0, 0.7))
                base.append(loft([((a, up * s, b), leg * f, leg * f) for s, f in swell]))
            elif p.legs == "hairpin":
                r = max(0.3 * leg, 0.02)
                pin = [(a - 0.4 * leg - 0.02, up, b), (fa, r, fb), (a + 0.4 * leg + 0.02, up, b)]
                base.append(tube(rounded(pin, 0.04, closed=False), r, 8))
            else:
                f = 1.0 if p.legs == "square" else p.leg_taper
                base.append(
                    loft([((a, up, b), leg, leg), ((fa, 0, fb), leg * f, leg * f)], "y",
                         SQUARE if p.legs == "square" else SOFT))
        base += [box((2 * x, p.apron, 0.045), (0, up - p.apron / 2, s * z)) for s in (-1, 1)]
        base += [box((0.045, p.apron, 2 * z), (s * x, up - p.apron / 2, 0)) for s in (-1, 1)]
    elif p.legs == "pedestal":
        reach = 0.62 * min(w, d)
        if p.splay > 0.05:  # a turned column on four feet
            column = [(0.10, 0.9 * leg), (0.16, 2.0 * leg), (0.3 * under, 1.5 * leg), (0.5 * under, 2.1 * leg),
                      (0.7 * under, 1.3 * leg), (under - 0.06, 1.6 * leg), (up, 0.4 * reach)]
            base.append(lathe(column))
            for i in range(4):
                u, v = cos(pi / 4 + pi / 2 * i), sin(pi / 4 + pi / 2 * i)
                arc = curve([(0, 0.26 * h, 0), (0.28 * reach * u, 0.17 * h, 0.28 * reach * v),
                             (0.6 * reach * u, 0.022, 0.6 * reach * v)], 4)
                base.append(tube(arc, np.linspace(0.5 * leg, 0.36 * leg, len(arc)), 10))
        else:
            base.append(
                lathe([(0, reach), (0.025, reach), (0.05, 0.8 * reach), (0.12, 1.6 * leg), (0.5 * under, 1.2 * leg),
                       (under - 0.1, 1.4 * leg), (up, 0.5 * reach)], outline=superellipse(2.0, 28)))
        if w > 1.5 * d:
            one = union(*base).scale((0.9, 1, 0.9))
            base = [both(one.translate((0.27 * w, 0, 0))), box((0.55 * w, 0.06, 0.08), (0, 0.3 * h, 0))]
    elif p.legs == "trestle":
        for s in (-1, 1):
            base += [
                box((leg, up - 0.05, 0.28 * d), (s * 0.78 * x, up / 2, 0)),
                box((leg * 1.2, 0.07, 0.82 * d * share + 0.08), (s * 0.78 * x, 0.035, 0), 0.015),
                box((leg * 1.2, 0.06, 0.75 * d * share), (s * 0.78 * x, up - 0.03, 0))
            ]
        base.append(box((1.56 * x, 0.1, 0.05), (0, p.shelf_height * h, 0)))
    elif p.legs == "panels":
        for s in (-1, 1):
            side = rectangle(2 * z + leg, up, 0.0, 1 - p.splay) + np.array([0, up / 2])
            base.append(extrude(side, leg * 0.9, "x", (s * x, 0, 0)))
        base.append(box((2 * x, 0.22 * h, 0.045), (0, up - 0.11 * h, 0.6 * z)))
    else:
        for s in (-1, 1):
            path = [(s * x, up, -z * 0.95), (s * x, 0.025, -z), (s * x, 0.025, z), (s * x, up, z * 0.95)]
            base.append(tube(rounded(path, 0.03 + 0.6 * p.splay, closed=False), 0.36 * leg, 10))
            base.append(box((leg * 0.7, 0.05, 2 * z), (s * x, under, 0)))
    parts["legs"] = (union(*base), p.frame)

    if p.style == "desk" or (p.extra == "drawer" and four):
        tall = p.drawers * h * (1.6 if p.style == "desk" else 0.7)
        wide = 0.3 * w if p.style == "desk" else 2 * x - 0.1
        cx = x - wide / 2 - (0.0 if p.style == "desk" else 0.05)
        deep = 2 * z - 0.02
        count = 3 if p.style == "desk" else 1
        if p.style != "desk":
            tall = min(tall, 0.14)
        boxes = box((wide, tall, deep), (cx, up - tall / 2, 0))
        fronts = [
            box((wide - 0.03, tall / count - 0.025, 0.05), (cx, up - 0.02 - tall / 2 + y, -z - 0.005), 0.006)
            for y in spread(count, tall - 0.02)
        ]
        knobs = [
            ellipsoid((0.05, 0.04, 0.05), (cx, up - 0.02 - tall / 2 + y, -z - 0.045), 10)
            for y in spread(count, tall - 0.02)
        ]
        parts["drawers"] = (union(boxes, *fronts), p.finish)
        parts["knobs"] = (union(*knobs), "brass")
        if not four:
            parts["drawers"] = (union(boxes, *fronts, box((2 * x, 0.06, 0.1), (0, under, 0))), p.finish)
    if four and p.extra == "shelf" and p.style != "desk":
        grow = 0.6 * leg + 0.9 * p.splay * (1 - p.shelf_height)
        board = superellipse(2.0, 40) * (2.7 * x + grow) if p.style == "round" else rectangle(
            2 * x + grow, 2 * z + grow, 0.02)
        parts["shelf"] = (extrude(board, 0.04, "y", (0, p.shelf_height * h, 0), 0.008), p.finish)
    elif four and p.extra == "stretchers":
        s = p.shelf_height * 0.6
        k = 1 - s
        joints = [(a + (fa - a) * k, s * h, b + (fb - b) * k) for (a, b), (fa, fb) in zip(corners, feet)]
        bars = [tube([joints[0], joints[3]], 0.35 * leg, 8), tube([joints[1], joints[2]], 0.35 * leg, 8)]
        middle = [tuple((np.array(joints[i]) + np.array(joints[j])) / 2) for i, j in ((0, 3), (1, 2))]
        parts["stretchers"] = (union(*bars, tube(middle, 0.35 * leg, 8)), p.frame)
    return parts


# Telephone

TELEPHONE: Space = {
    "style": ("smartphone", "candybar", "flip", "slider", "desk", "cordless"),
    "keys": ("square", "round", "pill"),
    "antenna": ("none", "stub", "rod"),
    "lenses": (1, 2, 3),
    "width": Range(0.46, 0.56),
    "height": Range(0.96, 1.12),
    "thickness": Range(0.085, 0.14),
    "corner": Range(0.03, 0.12),
    "bevel": Range(0.012, 0.035),
    "bezel": Range(0.025, 0.055),
    "chin": Range(0.03, 0.16),
    "screen": Range(0.36, 0.48),
    "key_size": Range(0.62, 0.84),
    "waist": Range(0.82, 1.0),
    "opening": Range(8.0, 40.0),
    "lean": Range(12.0, 28.0),
    "case": ("black", "white", "charcoal", "steel", "red", "cream", "teal", "navy", "green"),
    "accent": ("steel", "charcoal", "gray", "white", "sand"),
}


def keypad(kind: str, columns: int, rows: int, width: Number, height: Number, fill: Number,
           at: Point) -> list[Manifold]:
    """Keys on a grid about a point, standing out of the plane z = at[2] to the front."""
    cell_w, cell_h = width / columns, height / rows
    keys = []
    for x in spread(columns, width):
        for y in spread(rows, height):
            w, h = cell_w * fill, cell_h * fill
            if kind == "round":
                w = h = min(w, h)
            outline = superellipse({"square": 8.0, "round": 2.0, "pill": 2.6}[kind], 12) * [w, h]
            keys.append(extrude(outline, 0.05, "z", (at[0] + x, at[1] + y, at[2]), 0.008))
    return keys


def telephone(p: SimpleNamespace) -> Parts:
    w, h, t = p.width, p.height, p.thickness
    dark = ("black", "charcoal", "navy")
    key_color = "steel" if p.accent == p.case or (p.accent in dark and p.case in dark) else p.accent

    def slab(width: Number, height: Number, thickness: Number, at: Point) -> Manifold:
        outline = rounded([(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2 * p.waist, 0),
                           (width / 2, height / 2), (-width / 2, height / 2),
                           (-width / 2 * p.waist, 0)] if p.style == "cordless" else [(-width / 2, -height / 2),
                                                                                     (width / 2, -height / 2),
                                                                                     (width / 2, height / 2),
                                                                                     (-width / 2, height / 2)],
                          p.corner, segments=6)
        if p.style == "cordless":
            return extrude(outline, thickness, "z", at)
        return extrude(outline, thickness, "z", at, p.bevel)

    def pane(width: Number, height: Number, at: Point) -> Manifold:
        return extrude(rectangle(width, height, 0.4 * p.corner + 0.005), 0.04, "z", (at[0], at[1], at[2] + 0.012),
                       0.004)

    if p.style == "smartphone":
        body = slab(w, h, t * 0.8, (0, 0, 0))
        z = -0.4 * t
        screen_h = h - 2 * p.bezel - (p.chin if p.chin > 0.08 else 0)
        screen = pane(w - 2 * p.bezel, screen_h, (0, (h - screen_h) / 2 - p.bezel, z))
        parts: Parts = {"body": (body, p.case), "screen": (screen, "screen")}
        if p.chin > 0.08:
            button = extrude(
                superellipse(2.0, 20) * p.chin * 0.75 if p.keys != "pill" else superellipse(4.0, 20) *
                [p.chin * 1.3, p.chin * 0.6], 0.05, "z", (0, -h / 2 + p.bezel + p.chin / 2 - 0.01, z + 0.015))
            parts["button"] = (button, key_color)
        cameras = [
            tube([(w / 2 - 0.11, h / 2 - 0.11 - 0.1 * i, 0), (w / 2 - 0.11, h / 2 - 0.11 - 0.1 * i, 0.4 * t + 0.018)],
                 0.042, 14) for i in range(p.lenses)
        ]
        island = extrude(rectangle(0.13, 0.13 + 0.1 * (p.lenses - 1), 0.05), 0.05, "z",
                         (w / 2 - 0.11, h / 2 - 0.11 - 0.05 * (p.lenses - 1), 0.4 * t - 0.015))
        parts["camera"] = (union(island, *cameras), "black" if p.case != "black" else "gray")
        buttons = [
            box((0.04, 0.1, 0.04), (s * (w / 2), y, 0), 0.008)
            for s, y in ((1, 0.22 * h), (-1, 0.26 * h), (-1, 0.13 * h))
        ]
        parts["side buttons"] = (union(*buttons), key_color)
        return parts

    def aerial(x: Number, y: Number, z: Number) -> Manifold:
        long = 0.12 if p.antenna == "stub" else 0.34
        return tube([(x, y - 0.08, z), (x, y + long * 0.9, z), (x, y + long, z)],
                    [0.036, 0.03 if p.antenna == "stub" else 0.024, 0.018], 10)

    if p.style in ("candybar", "cordless"):
        w = w * 0.84
        tt = t * 1.35
        body = slab(w, h, tt, (0, 0, 0))
        z = -tt / 2
        sh = p.screen * h * 0.72
        y = h / 2 - p.bezel - 0.07 - sh / 2
        parts = {
            "body": (body, p.case),
            "screen": (pane(w * p.waist - 2 * p.bezel - 0.02, sh,
                            (0, y, z)), "teal" if p.style == "cordless" else "screen")
        }
        pad_h = y - sh / 2 + h / 2 - 0.10 - 0.5 * p.chin
        keys = keypad(p.keys, 3, 4, w * p.waist * 0.86, pad_h * 0.8, p.key_size,
                      (0, -h / 2 + 0.05 + 0.5 * p.chin + pad_h * 0.4, z))
        pad = extrude(
            superellipse(2.4, 20) * [0.34 * w, 0.12 * pad_h + 0.05], 0.06, "z",
            (0, -h / 2 + 0.06 + 0.5 * p.chin + pad_h * 0.9, z), 0.01)
        parts["keys"] = (union(*keys, pad), key_color)
        speaker = box((0.3 * w, 0.022, 0.06), (0, h / 2 - 0.05, z - 0.0), 0.004)
        parts["speaker"] = (speaker, "black" if p.case != "black" else "gray")
        if p.antenna != "none" or p.style == "cordless":
            parts["antenna"] = (aerial(w / 2 - 0.08, h / 2, 0.1 * tt), "black" if p.case != "black" else "charcoal")
        if p.style == "cordless":
            dock = loft([((0, -h / 2 - 0.02, 0.03), w * 1.5, tt * 3.2), ((0, -h / 2 + 0.05, 0.03), w * 1.45, tt * 3.0),
                         ((0, -h / 2 + 0.16, 0.06), w * 1.2, tt * 1.9)], "y", SOFT)
            parts["dock"] = (dock, p.accent)
        return parts

    if p.style in ("flip", "slider"):
        w, half_t = w * 0.95, t * 0.85
        half_h = h * 0.58
        z = -half_t / 2
        lower = slab(w, half_h, half_t, (0, -half_h / 2, 0))
        keys = keypad(p.keys, 3, 4, w * 0.84, half_h * 0.62, p.key_size, (0, -half_h * 0.62, z))
        pad = torus(0.17, 0.05, "z", (0, -half_h * 0.18, z))
        if p.style == "flip":
            lid = slab(w * 0.98, half_h, half_t * 0.85, (0, half_h / 2, 0))
            window = pane(w - 2 * p.bezel - 0.08, half_h * (0.45 + 0.6 * p.screen), (0, half_h * 0.5, -half_t * 0.425))
            outer = pane(w * 0.45, half_h * 0.25, (0, half_h * 0.6, half_t * 0.425 - 0.024))
            turn = (-p.opening, 0, 0)
            hinge = tube([(-w * 0.42, 0, 0), (w * 0.42, 0, 0)], half_t * 0.62, 16)
            parts = {
                "body": (lower, p.case),
                "lid": (lid.rotate(turn), p.case),
                "hinge": (hinge, p.accent),
                "screen": (union(window, outer).rotate(turn), "screen")
            }
        else:
            shift = (0, half_h * (0.42 + 0.2 * p.opening / 40), -half_t * 0.88)
            lid = slab(w, half_h * 1.06, half_t, (0, -half_h / 2, 0))
            window = pane(w - 2 * p.bezel - 0.02, half_h * (0.36 + 0.6 * p.screen), (0, -half_h * 0.42, z))
            pad = extrude(superellipse(3, 20) * [0.3 * w, 0.14 * half_h], 0.05, "z", (0, -half_h * 0.88, z), 0.01)
            low_pad = keypad(p.keys, 3, 3, w * 0.84, half_h * 0.40, p.key_size, (0, -half_h * 0.77, z))
            parts = {
                "body": (lower, p.case),
                "lid": (lid.translate(shift), p.accent if p.accent != "gray" else p.case),
                "screen": (window.translate(shift), "screen"),
                "pad": (pad.translate(shift), key_color)
            }
            keys = low_pad
        parts["keys"] = (union(*keys, pad) if p.style == "flip" else union(*keys), key_color)
        if p.antenna != "none":
            parts["antenna"] = (aerial(w / 2 - 0.07, 0.0 if p.style == "flip" else -0.0, 0.25 * half_t), "charcoal")
        return parts

    # A desk telephone: a wedge with keys or a dial, the handset across its cradle.
    depth, wide = h * 0.85, w * 1.7
    rise = tan(radians(p.lean))
    low = 0.10 + 0.3 * t
    profile = [(-depth / 2, 0), (depth / 2, 0), (depth / 2, low + depth * rise),
               (depth * 0.28, low + depth * 0.8 * rise), (-depth / 2, low)]
    base = extrude(rounded(profile, 0.05), wide, "x")
    base = base ^ extrude(rectangle(wide, depth, p.corner + 0.03, p.waist), 3, "y")
    parts = {"base": (base, p.case)}

    def lay(solid: Manifold, along: Number) -> Manifold:
        """Turn something that faces the front so that it lies on the slope, `along` from its front edge."""
        slant = 90 - np.degrees(np.arctan(rise * 1.03))
        return solid.rotate((slant, 0, 0)).translate((0, low + along * depth * rise * 1.03, -depth / 2 + along * depth))

    if p.keys == "round":
        dial = tube([(0, 0, 0.03), (0, 0, -0.055)], [0.27 * depth, 0.23 * depth], 32)
        holes = [
            tube([(0.165 * depth * cos(a), 0.165 * depth * sin(a), -0.02),
                  (0.165 * depth * cos(a), 0.165 * depth * sin(a), -0.2)], 0.033, 10) for a in np.arange(10) * 0.55
        ]
        parts["dial"] = (lay(dial - union(*holes), 0.36), key_color)
        parts["hub"] = (lay(tube([(0, 0, 0), (0, 0, -0.07)], 0.09 * depth, 20),
                            0.36), "steel" if key_color != "steel" else "white")
    else:
        keys = keypad(p.keys, 3, 4, wide * 0.40, depth * 0.46, p.key_size, (-0.16 * wide, 0, -0.005))
        parts["keys"] = (lay(union(*keys), 0.32), key_color)
        glass = pane(wide * 0.3, p.screen * 0.45, (0.27 * wide, 0.05, 0.0))
        side = keypad("pill", 1, p.lenses + 1, wide * 0.2, depth * 0.2, 0.7, (0.27 * wide, -0.14 * depth, -0.005))
        parts["screen"] = (lay(glass, 0.34), "screen")
        parts["side keys"] = (lay(union(*side), 0.34), p.accent if p.accent != "gray" else "white")
    y = low + depth * 0.83 * rise + 0.13
    z = depth * 0.33
    reach = wide * 0.52
    bar = tube(
        curve([(-reach, y, z), (-0.5 * reach, y + 0.055, z), (0, y + 0.07, z), (0.5 * reach, y + 0.055, z),
               (reach, y, z)], 4), 0.055 + 0.1 * (t - 0.08), 12)
    cups = both(lathe([(-0.14, 0.19), (-0.10, 0.22), (-0.02, 0.22), (0.06, 0.12)], (reach * 0.93, y, z)))
    posts = both(box((0.09, 0.3, 0.24), (0.5 * reach, y - 0.12, z), 0.02))
    parts["cradle"] = (posts, p.case)
    parts["handset"] = (union(bar, cups), p.case if p.antenna == "none" else "black")
    return parts


# Watercraft

WATERCRAFT: Space = {
    "style": ("sailboat", "cargo", "cruiser", "speedboat", "warship", "tug", "rowboat"),
    "bow": ("raked", "plumb", "clipper"),
    "masts": (1, 2),
    "funnels": (1, 2, 3),
    "beam": Range(0.17, 0.25),
    "draft": Range(0.09, 0.14),
    "sheer": Range(0.01, 0.05),
    "fullness": Range(1.4, 3.4),
    "transom": Range(0.45, 0.85),
    "entry": Range(0.30, 0.55),
    "rake": Range(0.02, 0.10),
    "cabin_length": Range(0.20, 0.34),
    "cabin_height": Range(0.05, 0.09),
    "cabin_position": Range(-0.05, 0.12),
    "mast_height": Range(0.55, 0.85),
    "boom": Range(0.28, 0.38),
    "load": Range(0.3, 1.0),
    "hull": ("white", "navy", "red", "black", "green", "gray", "mahogany", "teal", "orange"),
    "deck": ("oak", "beech", "sand", "gray", "red"),
    "upper": ("white", "cream", "gray"),
}


def breadth(p: SimpleNamespace, u: Number) -> float:
    """Width of the deck as a share of the beam, from the stem (u = 0) to the transom (u = 1)."""
    if u < p.entry:
        return 1 - (1 - u / p.entry)**2.2
    return 1 - (1 - p.transom) * ((u - p.entry) / (1 - p.entry))**2


def deck_height(p: SimpleNamespace, u: Number) -> float:
    """Height of the deck's edge from the stem (u = 0) to the transom (u = 1): the sheer."""
    return p.sheer * (2.2 * (1 - u)**2 + 0.5 * u**2)


def hull_shape(p: SimpleNamespace, beam: Number, draft: Number) -> Manifold:
    """Hull one unit long with its deck near y = 0, sheer rising to bow and stern."""
    s = np.linspace(-1, 1, 15)
    sections, outlines = [], []
    full = p.fullness + (4.0 if p.style in ("cargo", "warship") else 0.0)
    lead = {"raked": 1.0, "plumb": 0.25, "clipper": 1.6}[p.bow] * p.rake
    for u in (float(v) for v in np.linspace(0, 1, 13)):
        depth = draft * (0.55 + 0.45 * min(1.0, u / 0.3)) * (1.0 if u < 0.7 else 1 - 0.45 * (u - 0.7))
        rim = deck_height(p, u)
        exponent = 1.15 + (full - 1.15) * min(1.0, u / 0.6)
        outline = np.stack([s / 2, np.abs(s)**exponent - 0.5], 1)
        tall = depth + rim
        z = -0.5 + u
        # The stem leans: the keel of the first sections starts behind the deck.
        sections.append((z, rim - tall / 2, max(beam * breadth(p, u), 0.02), tall, lead * (1 - u)**3))
        outlines.append(outline)
    rings = np.empty((len(sections), len(s), 3))
    for ring, (z, y, width, tall, lean), outline in zip(rings, sections, outlines):
        ring[:, 0] = width * outline[:, 0]
        ring[:, 1] = y + tall * outline[:, 1]
        ring[:, 2] = z + lean * (0.5 - outline[:, 1]) * 1.6
    return skin(rings)


def watercraft(p: SimpleNamespace) -> Parts:
    slim = {
        "cargo": 0.85,
        "warship": 0.62,
        "tug": 1.45,
        "rowboat": 1.45,
        "speedboat": 1.2,
        "cruiser": 1.15
    }.get(p.style, 1.0)
    deep = {"tug": 1.35, "rowboat": 1.0, "cargo": 1.3, "warship": 0.9}.get(p.style, 1.0)
    beam, draft = p.beam * slim, p.draft * deep
    hull = hull_shape(p, beam, draft)
    stripe = hull.scale((1.02, 1, 1.0)).trim_by_plane((0, -1, 0), 0.5 * draft)
    parts: Parts = {
        "hull": (hull, p.hull),
        "bottom": (stripe, "burgundy" if p.hull not in ("red", "mahogany") else "charcoal")
    }

    def footing(length: Number, z: Number) -> tuple[float, float]:
        """Lowest height and least width of the deck along a length about z."""
        ends = [min(max(0.5 + z + side * length, 0.0), 1.0) for side in (-0.5, 0.0, 0.5)]
        return min(deck_height(p, u) for u in ends), beam * min(breadth(p, u) for u in ends)

    def block(length: Number, width: Number, height: Number, z: Number, y: Number, rake: Number = 0.1) -> Manifold:
        """Deckhouse with a raked front, standing at height y."""
        stations = [((0, y - 0.02, z), width, length), ((0, y, z), width, length),
                    ((0, y + height, z + 0.5 * rake * length), width * 0.88, length * (1 - rake))]
        return loft(stations, "y", superellipse(7.0, 24))

    def glazing(house: Manifold, y: Number, height: Number) -> Manifold:
        """Band of windows around a deckhouse."""
        low, high = house.bounding_box()[:3], house.bounding_box()[3:]
        x, z = (low[0] + high[0]) / 2, (low[2] + high[2]) / 2
        wider = house.translate((-x, 0, -z)).scale((1.03, 1, 1.02)).translate((x, 0, z))
        return wider.trim_by_plane((0, 1, 0), y).trim_by_plane((0, -1, 0), -y - height)

    z, n, t = p.cabin_position, p.cabin_length, p.cabin_height
    rim = 0.6 * p.sheer
    if p.style == "sailboat":
        house = block(n, beam * 0.55, t * 0.8, z + 0.02, rim * 0.3, 0.25)
        parts["deck"] = (hull.scale((0.9, 1, 0.94)).trim_by_plane((0, 1, 0), -0.02).translate((0, 0.012, 0)), p.deck)
        parts["cabin"] = (house, p.upper)
        parts["windows"] = (glazing(house, rim * 0.3 + t * 0.3, t * 0.25), "glass")
        masts, sails = [], []
        spots = [-0.12] if p.masts == 1 else [-0.18, 0.22]
        for i, mz in enumerate(spots):
            tall = p.mast_height * (1.0 if i == 0 else 0.75)
            long = p.boom * (1.0 if p.masts == 1 else 0.9 if i == 0 else 0.7)
            masts.append(tube([(0, -0.03, mz), (0, tall, mz)], [0.016, 0.012], 10))
            masts.append(tube([(0, 0.11, mz), (0, 0.10, mz + long)], 0.011, 8))
            belly = []
            for v in (0.0, 0.33, 0.66, 0.97):
                chord = long * (1 - v)**0.8 * 0.97 + 0.02
                y = 0.115 + (tall - 0.16) * v
                arc = arc_strip(chord, 0.10 * chord, 0.02, 8)
                belly.append(np.stack([arc[:, 1] - 0.01, np.full(len(arc), y), mz + chord / 2 + arc[:, 0]], 1))
            sails.append(skin(np.stack(belly)))
        tack, head = -0.47, p.mast_height * 0.86
        jib = []
        for v in (0.0, 0.33, 0.66, 0.97):
            lead = tack + (spots[0] - tack) * v
            tail = spots[0] + 0.06 + (spots[0] - spots[0] - 0.06) * v
            chord = max(tail - lead, 0.02)
            arc = arc_strip(chord, 0.12 * chord, 0.02, 8)
            jib.append(
                np.stack([arc[:, 1] - 0.01,
                          np.full(len(arc), 0.05 + (head - 0.05) * v), lead + chord / 2 + arc[:, 0]], 1))
        sails.append(union(skin(np.stack(jib)), tube([(0, p.sheer * 0.6 - 0.02, -0.45), (0, 0.06, -0.455)], 0.012, 8)))
        sails.append(tube([(0.0, head * 0.98, spots[0] - 0.01), (0, head * 0.98, spots[0] + 0.005)], 0.012, 8))
        keel = loft([((0, -draft * 0.8, 0.0), 0.05, 0.22), ((0, -draft - 0.13, 0.05), 0.03, 0.14)], "y")
        rudder = box((0.022, draft * 1.6, 0.06), (0, -draft * 0.8, 0.46))
        parts["masts"] = (union(*masts), "steel" if p.hull != "mahogany" else "oak")
        parts["sails"] = (union(*sails), p.upper if p.upper != "gray" else "orange")
        parts["keel"] = (union(keel, rudder), "charcoal")
    elif p.style == "cargo":
        y, room = footing(0.1, 0.37)
        bridge = block(0.07, beam * 1.02, 0.05, 0.37, y + 0.12, 0.0)
        parts["bridge"] = (union(block(0.09, room * 0.92, 0.14, 0.37, y, 0.0), bridge), p.upper)
        parts["windows"] = (glazing(bridge, y + 0.14, 0.016), "glass")
        stacks: list[tuple[Manifold, str]] = []
        tints = ("red", "blue", "orange", "teal")
        count = 5 if p.cabin_length < 0.27 else 4
        length = 0.66 / count
        for i in range(count):
            zc = -0.36 + 0.66 * (i + 0.5) / count
            layers = 1 + int((0.5 + 0.5 * np.cos(2.7 * i + 9 * p.load)) * (1 + 2 * p.load))
            tall = p.cabin_height * 0.75 * layers + 0.02
            y, room = footing(length, zc)
            stacks.append((box((room * 0.9, tall, length * 0.9), (0, y - 0.015 + tall / 2, zc)), tints[i % 4]))
        for tint in tints:
            chosen = [solid for solid, color in stacks if color == tint]
            parts[f"{tint} containers"] = (union(*chosen), tint)
        funnel = tube([(0, 0.0, 0.43), (0, 0.22 + 0.2 * p.sheer, 0.435)], [0.03, 0.026], 14)
        mast = union(tube([(0, 0, -0.42), (0, 0.14 * p.mast_height + 0.06, -0.42)], 0.011, 8),
                     tube([(0, 0.15, 0.36), (0, 0.25, 0.36)], 0.011, 8))
        parts["funnel"] = (funnel, "orange" if p.funnels == 1 else "blue")
        parts["masts"] = (mast, "steel")
        parts["deck"] = (hull.scale((0.94, 1, 0.97)).trim_by_plane((0, 1, 0), -0.02).translate((0, 0.01, 0)), p.deck)
    elif p.style == "warship":
        y, room = footing(n * 1.6, z * 0.5)
        decks = [
            block(n * 1.6, room * 0.86, t * 0.8, z * 0.5, y, 0.1),
            block(n * 0.9, beam * 0.62, t * 0.8, z * 0.5 - 0.04, y + t * 0.78, 0.15),
            block(n * 0.45, beam * 0.5, t * 0.7, z * 0.5 - 0.07, y + t * 1.5, 0.2)
        ]
        parts["superstructure"] = (union(*decks), p.upper if p.upper != "cream" else "steel")
        parts["windows"] = (glazing(decks[2], y + t * 1.75, 0.02), "glass")
        turrets, guns = [], []
        for sign, tz in ((-1, -0.33), (-1, -0.23), (1, 0.36))[:1 + p.masts + (1 if p.load > 0.6 else 0)][:3]:
            deck, room = footing(0.08, tz)
            ty = deck + 0.015 + (0.025 if tz == -0.23 else 0)
            size = min(0.07, 0.9 * room)
            turrets.append(
                loft([((0, deck - 0.01, tz), size, 0.075), ((0, ty + 0.02, tz), size, 0.075),
                      ((0, ty + 0.04, tz), 0.045, 0.045)], "y", superellipse(4, 16)))
            guns += [tube([(x, ty + 0.018, tz), (x, ty + 0.035, tz + sign * 0.11)], 0.0085, 8) for x in (-0.016, 0.016)]
        parts["turrets"] = (union(*turrets), "gray")
        parts["guns"] = (union(*guns), "charcoal")
        mast_z = z * 0.5 - 0.05
        tall = 0.10 + 0.18 * p.mast_height
        mast = union(tube([(0, y + t, mast_z), (0, y + 2 * t + tall, mast_z)], [0.02, 0.01], 8),
                     box((0.11, 0.016, 0.016), (0, y + 1.6 * t + tall * 0.8, mast_z)),
                     tube([(0, y + t, mast_z + 0.05), (0, y + 2 * t + tall * 0.6, mast_z)], 0.01, 8))
        parts["mast"] = (mast, "charcoal")
        funnels = [
            loft([((0, y + 0.3 * t, z * 0.5 + 0.06 + 0.085 * i), 0.055, 0.065),
                  ((0, y + 2.1 * t, z * 0.5 + 0.075 + 0.085 * i), 0.042, 0.05)]) for i in range(min(p.funnels, 2))
        ]
        parts["funnels"] = (union(*funnels), "gray")
    elif p.style in ("cruiser", "tug"):
        y = rim * 0.3
        tall = t * (1.3 if p.style == "tug" else 1.0)
        long = n * (1.0 if p.style == "tug" else 1.9)
        zc = z - 0.04 if p.style == "tug" else z * 0.5 + 0.04
        first = block(long, beam * 0.74, tall, zc, y, 0.12)
        second = block(long * 0.62, beam * 0.6, tall * 0.9, zc - 0.01 + (0 if p.style == "tug" else 0.04),
                       y + tall * 0.99, 0.3)
        houses, panes = [first, second
                         ], [glazing(first, y + tall * 0.4, tall * 0.32),
                             glazing(second, y + tall * 1.4, tall * 0.34)]
        if p.style == "cruiser" and p.masts == 2:
            third = block(long * 0.36, beam * 0.5, tall * 0.75, zc + 0.06, y + tall * 1.88, 0.3)
            houses.append(third)
            panes.append(glazing(third, y + tall * 2.1, tall * 0.25))
        parts["deck"] = (hull.scale((0.9, 1, 0.94)).trim_by_plane((0, 1, 0), -0.02).translate((0, 0.012, 0)), p.deck)
        parts["cabin"] = (union(*houses), p.upper)
        parts["windows"] = (union(*panes), "glass")
        roof = y + tall * (2.5 if p.style == "cruiser" and p.masts == 2 else 1.8)
        mast = tube([(0, roof - tall, zc + 0.05), (0, roof + 0.25 * p.mast_height - 0.05, zc + 0.06)], [0.016, 0.010],
                    8)
        parts["mast"] = (union(mast, box((0.1, 0.018, 0.018),
                                         (0, roof + 0.12 * p.mast_height - 0.03, zc + 0.056))), "steel")
        if p.style == "tug" or p.funnels > 1:
            rows = (0.0, 0.09, 0.18)[:p.funnels if p.style == "cruiser" else min(p.funnels, 2)]
            top = roof + 0.05
            parts["funnels"] = (union(*[
                loft([((0, y, zc + long * 0.28 + dz), 0.055, 0.06), ((0, top, zc + long * 0.28 + dz + 0.02), 0.045,
                                                                     0.05)]) for dz in rows
            ]), "orange")
        rail = tube([(0, p.sheer * 1.4 + 0.01, -0.42), (0, p.sheer * 1.4 + 0.06, -0.47)], 0.01, 8)
        if p.style == "tug":
            fender = union(*[
                torus(0.07, 0.026, "x", (s * beam * 0.485 * breadth(p, 0.5 + zz), -0.012, zz)) for s in (-1, 1)
                for zz in (-0.02, 0.1, 0.22)
            ])
            parts["fenders"] = (fender, "rubber")
        else:
            parts["rail"] = (union(rail,
                                   tube([(0, p.sheer * 1.6 - 0.04, -0.42), (0, p.sheer * 1.4 + 0.03, -0.42)], 0.012,
                                        8)), "steel")
    else:
        wall = 0.025
        inner = hull_shape(p, beam - 2 * wall, draft).scale((1, 1, 0.92)).translate((0, 0.028, 0.01))
        lid = inner.trim_by_plane((0, 1, 0), -0.4 * draft)
        if p.style == "speedboat":
            cockpit = lid.trim_by_plane((0, 0, 1), z - 0.02)
            parts["hull"] = (hull - cockpit, p.hull)
            parts["deck"] = (hull.scale((0.95, 1, 0.96)).trim_by_plane((0, 1, 0), -0.02).translate(
                (0, 0.008, 0)).trim_by_plane((0, 0, -1), -z + 0.02), p.deck)
            edge = rim * 0.25
            shield = loft([((0, edge - 0.04, z - 0.02), beam * 0.86, 0.10),
                           ((0, edge + t, z + 0.05), beam * 0.66, 0.06)], "y", SOFT)
            inside = loft([((0, edge - 0.05, z + 0.03), beam * 0.74, 0.12),
                           ((0, edge + t + 0.01, z + 0.09), beam * 0.54, 0.09)], "y", SOFT)
            parts["windshield"] = (shield - inside, "glass")
            seats = [
                union(box((beam * 0.3, 0.05, 0.07), (s * beam * 0.2, -0.035, zz)),
                      box((beam * 0.3, 0.09, 0.025), (s * beam * 0.2, 0.0, zz + 0.04), 0.006)) for s in (-1, 1)
                for zz in (z + 0.12, z + 0.26)
            ]
            floor = box((beam * 0.5, 0.05, 0.4), (0, -0.06, z + 0.2))
            parts["seats"] = (union(*seats, floor) ^ union(lid, hull), p.upper if p.upper != "gray" else "orange")
            motors = [
                union(
                    loft([((x, 0.06, 0.53), 0.05, 0.075), ((x, 0.0, 0.525), 0.06, 0.085),
                          ((x, -0.03, 0.52), 0.05, 0.06)], "y"), box((0.03, 0.17, 0.045), (x, -0.09, 0.515)),
                    box((0.04, 0.035, 0.06), (x, -0.035, 0.49))) for x in ((0.0, ) if p.masts == 1 else (-0.04, 0.04))
            ]
            parts["motors"] = (union(*motors), "charcoal")
        else:
            parts["hull"] = (hull - lid, p.hull if p.hull != "gray" else "oak")
            thwarts = [box((beam * 1.2, 0.022, 0.07), (0, -0.012, zz)) for zz in (-0.16, 0.06, 0.28)[:1 + p.funnels]]
            parts["thwarts"] = (union(*thwarts) ^ hull.translate((0, 0.0, 0)), p.deck)
            oar = union(tube([(0.02, 0.0, 0.04), (beam * 0.5 + 0.02, 0.03, 0.0), (0.34, 0.0, -0.08)], 0.0115, 8),
                        box((0.12, 0.022, 0.045), (0.36, -0.005, -0.085), 0.006))
            lock = tube([(beam * 0.44, -0.03, 0.0), (beam * 0.5, 0.04, 0.0)], 0.014, 8)
            parts["oars"] = (both(oar, lock), "beech")
    return parts


# fmt: on
FAMILIES: dict[str, Family] = {
    "airplane": Family(AIRPLANE, airplane),
    "bench": Family(BENCH, bench),
    "cabinet": Family(CABINET, cabinet),
    "car": Family(CAR, car),
    "chair": Family(CHAIR, chair),
    "display": Family(DISPLAY, display),
    "lamp": Family(LAMP, lamp),
    "loudspeaker": Family(LOUDSPEAKER, loudspeaker),
    "rifle": Family(RIFLE, rifle),
    "sofa": Family(SOFA, sofa),
    "table": Family(TABLE, table),
    "telephone": Family(TELEPHONE, telephone),
    "watercraft": Family(WATERCRAFT, watercraft),
}
