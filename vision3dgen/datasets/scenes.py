"""Procedural scenes: colored objects of the 13 categories on a floor, drawn, and put into words.

`make_scene(seed, index)` draws the scene graph, `view_scene` what its camera sees, `sentences` what can truly be said
about it. Objects stand in camera-aligned places such that of each pair one is clearly left of, right of, in front of or
behind the other. Lengths are in units of the floor, +y up, the floor at y = 0; an object's bounding box has about unit
diagonal. The same seed and index give the same scene, whatever else is made.

For captions a scene has one to three objects, each seen whole. For detectors (`objects=N`) it has two to N, which may
hide one another, stands in a room with a wall and a rug (`STUFF`), and is not put into words.

Under the root of prepared scenes:

    images/ID.png, masks/ID.png, depth/ID.png   RGB; object number + 1, 0 for floor; 16 bit, depth times DEPTH_UNITS
    scenes.jsonl                                a line per scene: objects with boxes, camera, captions
    vocabulary.json                             every word of the grammar, so that it does not depend on the sample
    text/train.txt, text/val.txt                sentences about other scenes, which nobody drew
    splits/NAME.json, record.json               scenes of train, val and test, sha256 of every file; settings

Of rooms there are no words; instead `stuff/ID.png` (number of `STUFF` from 1, 0 where an object is seen), and
`shapes/CATEGORY_NUMBER.npz` ("vertices", "faces"), which the "pose" of an object, 3 x 4, moves into the world.
"""

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from manifold3d import Manifold, Mesh64
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.datasets.manifest import SPLITS, SplitManifest, assign_splits, read_json, sha256, write_json
from vision3dgen.datasets.prepare import Prepared
from vision3dgen.datasets.procedural import CATEGORIES, make_shape
from vision3dgen.datasets.vocabulary import Vocabulary
from vision3dgen.files import atomic_write
from vision3dgen.io import save_npz, write_depth_png, write_png
from vision3dgen.ops.render import raycast
from vision3dgen.parallel import map_in_order
from vision3dgen.structures import Camera, Meshes, join_meshes_as_scene

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.13, 0.12),
    "orange": (0.95, 0.50, 0.10),
    "yellow": (0.95, 0.85, 0.20),
    "green": (0.15, 0.55, 0.22),
    "blue": (0.15, 0.32, 0.80),
    "purple": (0.52, 0.20, 0.62),
    "white": (0.97, 0.97, 0.97),
    "black": (0.13, 0.13, 0.14),
}
PLURALS = {name: name + "s" for name in CATEGORIES.values()} | {"bench": "benches", "watercraft": "watercraft"}
NUMBERS = ("a", "two", "three")
RELATIONS = ("left of", "right of", "in front of", "behind")
OPPOSITES = dict(zip(RELATIONS, ("right of", "left of", "behind", "in front of")))
STUFF = ("floor", "wall", "rug")  # what is no object
MOST_OBJECTS = 12  # of a room: more hide one another for want of place
DEPTH_UNITS = 4000.0  # per unit of length, in 16-bit depth pictures: farthest 16.4

_FOLDERS = {"image": "images", "mask": "masks", "depth": "depth", "stuff": "stuff"}
_FORMAT = 1  # of record.json; a change of what is written for the same settings raises it
_SCENES, _TEXT, _ROOMS = 0, 1, 2  # streams of random numbers
_TOLERANCE = 0.01  # of the simplified surfaces: about half a pixel
_APART = 0.85  # between two objects, along the axis of their relation
_TURN = math.pi / 4  # of an object, from facing the camera: from the side, a display is a stick
_LEAST = 80  # pixels of an image of 96 x 96 that must show of each object
_LEAST_HIDDEN = 40  # the same in a room, where others may stand before it
_FLOOR = 30.0  # half the side of the floor: farther than any picture shows
_RUG = 0.004  # its height over the floor: enough for a renderer to know which is above


class SceneObject(NamedTuple):
    category: str  # name
    color: str
    shape: int  # which of the category's shapes
    place: tuple[float, float]  # of its middle on the floor: to the camera's right, away from the camera
    angle: float  # radians, about the vertical, from facing the camera
    size: float  # diagonal of its bounding box


class Room(NamedTuple):
    """What a scene's floor has beside objects."""

    wall: float  # how far the wall is from the middle, straight away from the camera's side
    wall_turn: float  # radians, from facing the camera
    wall_color: tuple[float, float, float]
    rug: tuple[float, float]  # place of its middle, as of an object
    rug_size: tuple[float, float]
    rug_turn: float
    rug_color: tuple[float, float, float]


class Scene(NamedTuple):
    """What there is, and where it is seen from."""

    objects: tuple[SceneObject, ...]
    azimuth: float  # degrees, of the camera around the vertical
    elevation: float
    distance: float
    gray: float  # of the floor
    room: Room | None = None


class SceneView(NamedTuple):
    """What the camera sees of a scene."""

    image: UInt8[Tensor, "H W 3"]
    objects: UInt8[Tensor, "H W"]  # number of the object seen, from 1; 0 is stuff
    stuff: UInt8[Tensor, "H W"]  # number in `STUFF` of the stuff seen, from 1; 0 is an object
    boxes: Float[Tensor, "N 4"]  # xyxy pixels around what is seen of each object
    depth: Float[Tensor, "H W"]  # along the optical axis
    normals: Float[Tensor, "H W 3"]  # camera axes
    camera: Camera


# ------------------------------------------------------------------------------------------------------- the graph


def draw_scene(rng: np.random.Generator, shapes: int) -> Scene:
    """A scene graph: what stands where, in which color; `shapes` of each category to choose from."""
    count = int(rng.choice(3, p=(0.2, 0.45, 0.35))) + 1
    names, colors = list(CATEGORIES.values()), list(COLORS)
    objects: list[SceneObject] = []
    places = _draw_places(rng, count)
    for place in places:
        category, color = names[int(rng.integers(len(names)))], colors[int(rng.integers(len(colors)))]
        if objects and rng.random() < 0.2:  # else "two red chairs" would never be said
            category, color = objects[-1].category, objects[-1].color
        number, angle = int(rng.integers(shapes)), float(rng.uniform(-_TURN, _TURN))
        objects.append(SceneObject(category, color, number, place, angle, float(rng.uniform(0.95, 1.1))))
    extent = float(np.ptp(places, axis=0).max())  # 0 for one object
    distance = float(rng.uniform(1.9, 2.2)) + 0.6 * extent  # so that the objects about fill the picture
    azimuth, elevation = float(rng.uniform(0, 360)), float(rng.uniform(28, 38))
    return Scene(tuple(objects), azimuth, elevation, distance, float(rng.uniform(0.5, 0.7)))


def _draw_places(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Places such that each pair is far apart along one axis and not along the other: else it would be a matter of
    taste which relation holds."""
    first, second = np.triu_indices(count, 1)
    while True:
        drawn = rng.uniform(-1, 1, (64, count, 2))  # as many tries at once
        steps = np.abs(drawn[:, first] - drawn[:, second])
        clear = (steps.max(-1) >= _APART).all(1) & (steps.min(-1) <= 0.6 * _APART).all(1)
        if clear.any():
            chosen = drawn[clear.argmax()]
            placed = chosen - (chosen.min(axis=0) + chosen.max(axis=0)) / 2
            return [(float(x), float(z)) for x, z in placed]


def draw_room(rng: np.random.Generator, shapes: int, count: int, categories: Sequence[str] | None = None) -> Scene:
    """Objects of the categories anywhere on the floor of a room, none inside another, though some hide others."""
    names, colors = list(categories or CATEGORIES.values()), list(COLORS)
    objects: list[SceneObject] = []
    taken: list[Float[np.ndarray, "4 2"]] = []
    side = max(0.95, 0.45 * count**0.5)  # of half the square they stand in: more room for more of them
    while len(objects) < count:
        category, color = names[int(rng.integers(len(names)))], colors[int(rng.integers(len(colors)))]
        number, angle, size = int(rng.integers(shapes)), float(rng.uniform(-_TURN, _TURN)), float(rng.uniform(0.8, 1.1))
        for _ in range(50):
            x, z = rng.uniform(-side, side, 2)
            one = SceneObject(category, color, number, (float(x), float(z)), angle, size)
            own = _footprint(one)
            if not any(_meet(own, other) for other in taken):
                objects.append(one)
                taken.append(own)
                break
    turn = float(rng.uniform(-0.5, 0.5))
    normal = np.array([math.sin(turn), math.cos(turn)])  # away from the camera
    wall = float((np.concatenate(taken) @ normal).max() + rng.uniform(0.1, 0.8))
    tint = 0.75 + 0.2 * rng.random(3)
    rug_color = 0.45 + 0.4 * np.array(COLORS[colors[int(rng.integers(len(colors)))]])
    room = Room(
        wall, turn, _triple(tint), (float(rng.uniform(-0.6, 0.6)), float(rng.uniform(-0.8, 0.4))),
        (float(rng.uniform(0.9, 2.0)), float(rng.uniform(0.7, 1.4))), float(rng.uniform(-math.pi, math.pi)),
        _triple(rug_color),
    )  # fmt: skip
    distance = float(rng.uniform(1.7, 2.0)) + 1.3 * side
    azimuth, elevation = float(rng.uniform(0, 360)), float(rng.uniform(22, 34))
    return Scene(tuple(objects), azimuth, elevation, distance, float(rng.uniform(0.4, 0.6)), room)


def _triple(values: Float[np.ndarray, "3"]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _footprint(one: SceneObject) -> Float[np.ndarray, "4 2"]:
    """Corners of the rectangle around what an object covers of the floor, as places: to the right, away."""
    verts = one.size * _surface(one.category, one.shape)[0][:, [0, 2]].numpy()
    low, high = verts.min(0), verts.max(0)
    corners = np.array([(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])])
    angle = math.pi + one.angle
    cos, sin = math.cos(angle), math.sin(angle)
    x, z = corners[:, 0] * cos + corners[:, 1] * sin, corners[:, 1] * cos - corners[:, 0] * sin
    return np.stack([x + one.place[0], one.place[1] - z], axis=1)  # at azimuth 0 the way away is -z


def _meet(a: Float[np.ndarray, "4 2"], b: Float[np.ndarray, "4 2"]) -> bool:
    """Whether two rectangles overlap: convex shapes are apart if they are along a normal of one of their sides."""
    sides = np.concatenate([np.diff(a[:3], axis=0), np.diff(b[:3], axis=0)])
    axes = np.stack([-sides[:, 1], sides[:, 0]], axis=1)
    first, second = a @ axes.T, b @ axes.T  # (4, axes)
    return bool(((first.min(0) < second.max(0)) & (second.min(0) < first.max(0))).all())


def relation(a: SceneObject, b: SceneObject) -> str:
    """How `a` stands to `b` as the camera sees it; exactly one of `RELATIONS`."""
    right, away = a.place[0] - b.place[0], a.place[1] - b.place[1]
    if abs(right) > abs(away):
        return "right of" if right > 0 else "left of"
    return "behind" if away > 0 else "in front of"


# ------------------------------------------------------------------------------------------------------- the words


class _Group(NamedTuple):
    """Objects of one category and color, which are named together."""

    words: str
    members: tuple[int, ...]


def sentences(scene: Scene) -> list[str]:
    """Everything the grammar can truly say about a whole scene, the plainest first.

    Objects alike in category and color are counted together ("two red chairs"). With one group: the group, with or
    without "there is" and "on the floor". With two: "A left of B" where the relation holds between all their members,
    "A and B" where none does. With three: "A left of B and behind C", else "A and B and C".
    """
    groups = _groups(scene)
    said: list[str] = []
    if len(groups) == 1:
        ((words, members),) = groups
        verb = "is" if len(members) == 1 else "are"
        said = [words, f"there {verb} {words}", f"{words} on the floor", f"there {verb} {words} on the floor"]
    else:
        for first, *rest in permutations(groups):
            held = [_holds(scene, first, other) for other in rest]
            if all(held):
                ends = " and ".join(f"{name} {other.words}" for name, other in zip(held, rest))
                said.append(f"{first.words} {ends}")
        said = said or [" and ".join(group.words for group in order) for order in permutations(groups)]
    return list(dict.fromkeys(said))


def _groups(scene: Scene) -> list[_Group]:
    members: dict[tuple[str, str], list[int]] = {}
    for index in sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].place[0]):  # from left to right
        one = scene.objects[index]
        members.setdefault((one.color, one.category), []).append(index)
    return [_Group(_name(*key, len(found)), tuple(found)) for key, found in members.items()]


def _name(color: str, category: str, count: int) -> str:
    article = "an" if color[0] in "aeiou" else "a"
    return f"{article} {color} {category}" if count == 1 else f"{NUMBERS[count - 1]} {color} {PLURALS[category]}"


def _holds(scene: Scene, a: _Group, b: _Group) -> str | None:
    """The relation in which every member of `a` stands to every member of `b`."""
    found = {relation(scene.objects[i], scene.objects[j]) for i in a.members for j in b.members}
    return found.pop() if len(found) == 1 else None


def grammar_words() -> list[str]:
    """Every word that `sentences` may use, sorted."""
    said = [*NUMBERS, "an", *COLORS, *PLURALS, *PLURALS.values(), *RELATIONS, "and", "there is", "are", "on the floor"]
    return sorted({word for words in said for word in words.split()})


# --------------------------------------------------------------------------------------------------------- the view


@functools.cache
def _surface(category: str, shape: int) -> tuple[Tensor, Tensor]:
    """Vertices and faces of a category's shape, standing on y = 0, simplified to what a small picture shows."""
    made = make_shape(category, shape)
    solid = Manifold(Mesh64(vert_properties=made.vertices, tri_verts=made.faces.astype(np.uint64)))
    mesh = solid.simplify(_TOLERANCE).to_mesh64()
    verts = torch.from_numpy(np.array(mesh.vert_properties)[:, :3].copy())
    verts[:, 1] -= verts[:, 1].min()
    return verts, torch.from_numpy(np.array(mesh.tri_verts).astype(np.int64))


def scene_camera(scene: Scene, image_size: int) -> Camera:
    """The camera a scene is seen from; float64."""
    azimuth, elevation = math.radians(scene.azimuth), math.radians(scene.elevation)
    flat = scene.distance * math.cos(elevation)
    eye = (flat * math.sin(azimuth), scene.distance * math.sin(elevation), flat * math.cos(azimuth))
    target = (0.0, 0.2, 0.0)
    return Camera.look_at(eye, target, field_of_view=38, image_size=(image_size, image_size))


def scene_mesh(scene: Scene) -> Meshes:
    """Stuff and objects, a member each, stuff first, with "color" per face; world coordinates, float64.

    The stuff is two faces for each of `STUFF`, or the floor's alone.
    """
    corners = [(-_FLOOR, -_FLOOR), (_FLOOR, -_FLOOR), (_FLOOR, _FLOOR), (-_FLOOR, _FLOOR)]
    quads = [[(x, 0.0, z) for x, z in corners]]
    tints = [(scene.gray, scene.gray, scene.gray)]
    if scene.room is not None:
        quads += [_wall(scene, scene.room), _rug(scene, scene.room)]
        tints += [scene.room.wall_color, scene.room.rug_color]
    count = len(quads)
    verts = [torch.tensor(quads, dtype=torch.float64).view(-1, 3)]
    faces = [(torch.tensor([(0, 2, 1), (0, 3, 2)]) + 4 * torch.arange(count)[:, None, None]).view(-1, 3)]
    colors = [torch.tensor(tints, dtype=torch.float64).repeat_interleave(2, 0)]
    for one in scene.objects:
        shape, triangles = _surface(one.category, one.shape)
        turn, place = _pose(scene, one)
        verts.append(one.size * shape @ turn.T + place)
        faces.append(triangles)
        colors.append(shape.new_tensor(COLORS[one.color]).expand(len(triangles), 3))
    return Meshes(verts, faces, faces_attributes={"color": colors})


def _on_floor(scene: Scene, place: tuple[float, float]) -> tuple[float, float]:
    """x and z in the world of a place to the camera's right and away from it."""
    azimuth = math.radians(scene.azimuth)
    right = (math.cos(azimuth), -math.sin(azimuth))
    away = (-math.sin(azimuth), -math.cos(azimuth))
    return place[0] * right[0] + place[1] * away[0], place[0] * right[1] + place[1] * away[1]


def _pose(scene: Scene, one: SceneObject) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"]]:
    """Rotation and place in the world of an object's shape."""
    angle = math.pi + math.radians(scene.azimuth) + one.angle  # ShapeNet's front is -z
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float64)
    x, z = _on_floor(scene, one.place)
    return turn, torch.tensor([x, 0.0, z], dtype=torch.float64)


def _wall(scene: Scene, room: Room) -> list[tuple[float, float, float]]:
    sin, cos = math.sin(room.wall_turn), math.cos(room.wall_turn)
    left, right = (_on_floor(scene, (room.wall * sin + s * cos, room.wall * cos - s * sin)) for s in (-_FLOOR, _FLOOR))
    return [
        (left[0], 0.0, left[1]),
        (left[0], _FLOOR, left[1]),
        (right[0], _FLOOR, right[1]),
        (right[0], 0.0, right[1]),
    ]


def _rug(scene: Scene, room: Room) -> list[tuple[float, float, float]]:
    sin, cos = math.sin(room.rug_turn), math.cos(room.rug_turn)
    corners = []
    for s, t in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)):
        u, v = s * room.rug_size[0], t * room.rug_size[1]
        x, z = _on_floor(scene, (room.rug[0] + u * cos - v * sin, room.rug[1] + u * sin + v * cos))
        corners.append((x, _RUG, z))
    return corners


def view_scene(scene: Scene, image_size: int = 96) -> SceneView:
    """Draw a scene with the built-in renderer: objects with 3 x 3 samples per pixel over stuff with one."""
    members, camera = scene_mesh(scene), scene_camera(scene, image_size)
    colors = members.faces_attributes_packed()["color"].float()
    count = len(members[0].faces_packed())
    floor = raycast(members[0], camera, face_colors=colors[:count], renderer="builtin", samples=1)
    things = Meshes(members.verts_list()[1:], members.faces_list()[1:])
    drawn = raycast(join_meshes_as_scene(things), camera, face_colors=colors[count:], renderer="builtin")
    color, alpha = drawn.rgba[..., :3], drawn.rgba[..., 3:]
    image = color * alpha + floor.rgba[..., :3] * (1 - alpha)
    owner = torch.cat([things.faces_packed_to_mesh_idx() + 1, torch.zeros(1, dtype=torch.int64)])  # -1, none, is 0
    objects = owner[drawn.face_index]
    return SceneView(
        (image * 255).round().to(torch.uint8),
        objects.to(torch.uint8),
        torch.where(drawn.mask, 0, floor.face_index // 2 + 1).to(torch.uint8),
        torch.stack([_box(objects == number) for number in range(1, len(scene.objects) + 1)]),
        torch.where(drawn.mask, drawn.depth, floor.depth),
        torch.where(drawn.mask[..., None], drawn.normals, floor.normals),
        camera,
    )


def _box(mask: Tensor) -> Tensor:
    """xyxy around the pixels of a mask, zeros for an empty one."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def make_scene(
    seed: int, index: int, *, image_size: int = 96, shapes: int = 4, objects: int | None = None,
    categories: Sequence[str] | None = None,
) -> tuple[Scene, SceneView]:  # fmt: skip
    """Scene number `index` of a seed and its view; drawn again until enough of every object shows, none cut off.

    objects: a room with at most so many objects, from 2, instead of a scene that can be put into words. categories: of
    a room's objects; all by default.
    """
    rng = np.random.default_rng([seed, _SCENES if objects is None else _ROOMS, index])
    least = _LEAST if objects is None else _LEAST_HIDDEN
    count = None if objects is None else int(rng.integers(2, objects + 1))  # once: many fit less often than few
    while True:
        scene = draw_scene(rng, shapes) if count is None else draw_room(rng, shapes, count, categories)
        if not _fits(scene, image_size):
            continue
        view = view_scene(scene, image_size)
        seen = torch.bincount(view.objects.flatten().long(), minlength=len(scene.objects) + 1)[1:]
        if int(seen.min()) * (96 / image_size) ** 2 >= least:
            return scene, view


def _fits(scene: Scene, image_size: int) -> bool:
    """Whether the picture shows all objects whole, with a pixel to spare."""
    verts = torch.cat(scene_mesh(scene).verts_list()[1:])
    pixels = scene_camera(scene, image_size).project(verts)[0]
    return bool(((pixels > 1) & (pixels < image_size - 1)).all())


# ------------------------------------------------------------------------------------------------------- on the disk


class _Job(NamedTuple):
    root: Path
    seed: int
    number: int
    image_size: int
    shapes: int
    captions: int
    objects: int | None
    categories: Sequence[str] | None


def prepare_scenes(
    root: str | os.PathLike[str],
    *,
    scenes: int,
    seed: int = 0,
    image_size: int = 96,
    shapes: int = 4,
    captions: int = 5,
    sentences: int = 10_000,
    objects: int | None = None,
    categories: Sequence[str] | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    name: str = "scenes_v1",
    workers: int = 1,
) -> Prepared:
    """Draw scenes and put them into words, under `root`.

    shapes: of each category; all splits share them, what is new in val and test is the scene. captions: at most so many
    different ones of each scene. sentences: about scenes that are not drawn, for language models, a tenth of them for
    validation. objects: rooms with at most so many, from 2, instead, of which there are no captions or sentences.
    categories: names of those a room has; all by default, and whatever they are they keep their numbers. split: shares
    of train, val and test. The bytes do not depend on `workers`. Raises ValueError naming what differs if `root` holds
    scenes of other settings; OSError if a file cannot be written.
    """
    for key, value, least in (
        ("scenes", scenes, 1), ("seed", seed, 0), ("image_size", image_size, 16), ("shapes", shapes, 1),
        ("captions", captions, 1), ("sentences", sentences, 0), ("objects", objects, 2),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    if objects is not None and objects > MOST_OBJECTS:
        raise ValueError(f"objects must be at most {MOST_OBJECTS}, which still show in a picture, got {objects}")
    if categories is not None:
        categories = _checked(categories, objects)
    assigned = assign_splits(scenes, split)
    root = Path(root)
    settings: dict[str, Any] = {
        "format": _FORMAT, "scenes": scenes, "seed": seed, "image_size": image_size, "shapes": shapes,
        "captions": captions, "sentences": sentences, "split": list(split), "name": name,
        **({} if objects is None else {"objects": objects}),
        **({} if categories is None else {"categories": list(categories)}),
    }  # fmt: skip
    manifest = root / "splits" / f"{name}.json"
    if _complete(root, settings):
        return Prepared(root, 0, scenes, [], manifest)
    pictures = ("image", "mask", "depth") if objects is None else ("image", "mask", "depth", "stuff")
    for folder in (*(_FOLDERS[key] for key in pictures), "text" if objects is None else "shapes", "splits"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = [_Job(root, seed, index, image_size, shapes, captions, objects, categories) for index in range(scenes)]
    lines = list(map_in_order(_write_scene, jobs, workers=workers, title="drawing scenes"))
    with atomic_write(root / "scenes.jsonl") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    if objects is None:
        Vocabulary(grammar_words()).save(root / "vocabulary.json")
        _write_text(root / "text", seed, sentences)
        files = [root / name for name in ("scenes.jsonl", "vocabulary.json", "text/train.txt", "text/val.txt")]
    else:
        files = [root / "scenes.jsonl", *_write_shapes(root, shapes)]
    files += [root / line[key] for line in lines for key in pictures]
    members = {s: {"scenes": [line["id"] for line, own in zip(lines, assigned) if own == s]} for s in SPLITS}
    digests = {path.relative_to(root).as_posix(): sha256(path) for path in files}
    SplitManifest(name, _FORMAT, seed, members, digests).write(manifest)
    write_json(root / "record.json", {"settings": settings})
    return Prepared(root, scenes, 0, [], manifest)


def _checked(categories: Sequence[str], objects: int | None) -> tuple[str, ...]:
    if objects is None:
        raise ValueError("categories are those of rooms: give objects too, or leave them out")
    if not categories or len(set(categories)) < len(categories):
        raise ValueError(f"categories must be different names, one at least, got {list(categories)}")
    for each in categories:
        check_choice("category", each, tuple(CATEGORIES.values()))
    return tuple(categories)


def _complete(root: Path, settings: dict[str, Any]) -> bool:
    """Whether all is there, record.json being written last; ValueError if it was made with other settings."""
    path = root / "record.json"
    if not path.is_file():
        return False
    found = read_json(path)["settings"]
    for key in {**settings, **found}:
        value = settings.get(key)
        if found.get(key) != value:
            raise ValueError(
                f"{path}: these scenes were prepared with {key}={found.get(key)!r}, now {key}={value!r} is asked for; "
                "choose another root or delete this folder"
            )
    listed = SplitManifest.read(root / "splits" / f"{settings['name']}.json", root)
    return all((root / file).is_file() for file in listed.files)


def _write_scene(job: _Job) -> dict[str, Any]:
    """Draw and write one scene; its line of scenes.jsonl."""
    settings: dict[str, Any] = {"image_size": job.image_size, "shapes": job.shapes, "objects": job.objects}
    settings["categories"] = job.categories
    scene, view = make_scene(job.seed, job.number, **settings)
    name = f"{job.number:06d}"
    files = {key: f"{_FOLDERS[key]}/{name}.png" for key in ("image", "mask", "depth")}
    write_png(job.root / files["image"], view.image.numpy())
    write_png(job.root / files["mask"], view.objects.numpy())
    write_depth_png(job.root / files["depth"], view.depth.numpy(), units_per_metre=DEPTH_UNITS)
    synsets = {category: synset for synset, category in CATEGORIES.items()}
    objects = [
        {"category": one.category, "synset": synsets[one.category], "color": one.color, "box": box, **_rounded(one)}
        for one, box in zip(scene.objects, view.boxes.tolist())
    ]
    camera = {
        "rotation": view.camera.rotation.tolist(),
        "translation": view.camera.translation.tolist(),
        "intrinsics": view.camera.intrinsics.tolist(),
        "image_size": list(view.camera.image_size),
    }
    if job.objects is None:
        said = _choose(sentences(scene), job.captions, np.random.default_rng([job.seed, _SCENES, job.number, 1]))
        return {"id": name, **files, "captions": said, "objects": objects, "camera": camera}
    files["stuff"] = f"{_FOLDERS['stuff']}/{name}.png"
    write_png(job.root / files["stuff"], view.stuff.numpy())
    for entry, one in zip(objects, scene.objects):
        turn, place = _pose(scene, one)
        entry["pose"] = torch.cat([one.size * turn, place[:, None]], dim=1).tolist()
        entry["mesh"] = shape_file(one.category, one.shape)
    return {"id": name, **files, "objects": objects, "camera": camera}


def shape_file(category: str, shape: int) -> str:
    """Where under the root a shape's mesh is, standing on y = 0."""
    return f"shapes/{category}_{shape}.npz"


def _write_shapes(root: Path, shapes: int) -> list[Path]:
    written = []
    for category in CATEGORIES.values():
        for shape in range(shapes):
            verts, faces = _surface(category, shape)
            written.append(root / shape_file(category, shape))
            save_npz(written[-1], vertices=verts.numpy(), faces=faces.numpy().astype(np.int32))
    return written


def camera_of(line: Mapping[str, Any]) -> Camera:
    """The camera of a line of scenes.jsonl; float64."""
    found = line["camera"]
    rotation, translation, intrinsics = (
        torch.tensor(found[key], dtype=torch.float64) for key in ("rotation", "translation", "intrinsics")
    )
    height, width = found["image_size"]
    return Camera(rotation, translation, intrinsics, (height, width))


def _rounded(one: SceneObject) -> dict[str, Any]:
    place = [round(value, 6) for value in one.place]
    return {"shape": one.shape, "place": place, "angle": round(one.angle, 6), "size": round(one.size, 6)}


def _choose(said: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` of the sentences, the first of them always."""
    if len(said) <= count:
        return list(said)
    return [said[0], *(said[i] for i in sorted(1 + rng.permutation(len(said) - 1)[: count - 1]))]


def _write_text(folder: Path, seed: int, count: int) -> None:
    """One sentence about each of `count` scenes, the last tenth for validation."""
    lines = []
    for index in range(count):
        rng = np.random.default_rng([seed, _TEXT, index])
        said = sentences(draw_scene(rng, 1))
        lines.append(said[int(rng.integers(len(said)))])
    held = count // 10
    for name, part in (("train", lines[: count - held]), ("val", lines[count - held :])):
        with atomic_write(folder / f"{name}.txt") as file:
            file.write("".join(f"{line}\n" for line in part).encode())
