"""Procedural scenes: one to three colored objects of the 13 categories on a floor, drawn, and put into words.

`make_scene(seed, index)` draws the scene graph, `view_scene` what its camera sees, `sentences` what can truly be said
about it. Objects stand in camera-aligned places such that of each pair one is clearly left of, right of, in front of or
behind the other. Lengths are in units of the floor, +y up, the floor at y = 0; an object's bounding box has about unit
diagonal. The same seed and index give the same scene, whatever else is made.

Under the root of prepared scenes:

    images/ID.png, masks/ID.png, depth/ID.png   RGB; object number + 1, 0 for floor; 16 bit, depth times DEPTH_UNITS
    scenes.jsonl                                a line per scene: objects with boxes, camera, captions
    vocabulary.json                             every word of the grammar, so that it does not depend on the sample
    text/train.txt, text/val.txt                sentences about other scenes, which nobody drew
    splits/NAME.json, record.json               scenes of train, val and test, sha256 of every file; settings
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from manifold3d import Manifold, Mesh64
from torch import Tensor

from vision3dgen.datasets.manifest import SPLITS, SplitManifest, assign_splits, read_json, sha256, write_json
from vision3dgen.datasets.prepare import Prepared
from vision3dgen.datasets.procedural import CATEGORIES, make_shape
from vision3dgen.datasets.vocabulary import Vocabulary
from vision3dgen.files import atomic_write
from vision3dgen.io import write_depth_png, write_png
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
DEPTH_UNITS = 4000.0  # per unit of length, in 16-bit depth pictures: farthest 16.4

_FORMAT = 1  # of record.json; a change of what is written for the same settings raises it
_SCENES, _TEXT = 0, 1  # streams of random numbers
_TOLERANCE = 0.01  # of the simplified surfaces: about half a pixel
_APART = 0.85  # between two objects, along the axis of their relation
_TURN = math.pi / 4  # of an object, from facing the camera: from the side, a display is a stick
_LEAST = 80  # pixels of an image of 96 x 96 that must show of each object
_FLOOR = 30.0  # half the side of the floor: farther than any picture shows


class SceneObject(NamedTuple):
    category: str  # name
    color: str
    shape: int  # which of the category's shapes
    place: tuple[float, float]  # of its middle on the floor: to the camera's right, away from the camera
    angle: float  # radians, about the vertical, from facing the camera
    size: float  # diagonal of its bounding box


class Scene(NamedTuple):
    """What there is, and where it is seen from."""

    objects: tuple[SceneObject, ...]
    azimuth: float  # degrees, of the camera around the vertical
    elevation: float
    distance: float
    gray: float  # of the floor


class SceneView(NamedTuple):
    """What the camera sees of a scene."""

    image: UInt8[Tensor, "H W 3"]
    objects: UInt8[Tensor, "H W"]  # number of the object seen, from 1; 0 is the floor
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
    """Floor and objects, a member each, floor first, with "color" per face; world coordinates, float64."""
    azimuth = math.radians(scene.azimuth)
    right = (math.cos(azimuth), -math.sin(azimuth))  # x and z of the camera's right and of the way away from it
    away = (-math.sin(azimuth), -math.cos(azimuth))
    corners = [(-_FLOOR, -_FLOOR), (_FLOOR, -_FLOOR), (_FLOOR, _FLOOR), (-_FLOOR, _FLOOR)]
    verts = [torch.tensor([(x, 0.0, z) for x, z in corners], dtype=torch.float64)]
    faces = [torch.tensor([(0, 2, 1), (0, 3, 2)])]
    colors = [torch.full((2, 3), scene.gray, dtype=torch.float64)]
    for one in scene.objects:
        shape, triangles = _surface(one.category, one.shape)
        angle = math.pi + azimuth + one.angle  # ShapeNet's front is -z
        cos, sin = math.cos(angle), math.sin(angle)
        turn = shape.new_tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        x = one.place[0] * right[0] + one.place[1] * away[0]
        z = one.place[0] * right[1] + one.place[1] * away[1]
        verts.append(one.size * shape @ turn.T + shape.new_tensor([x, 0.0, z]))
        faces.append(triangles)
        colors.append(shape.new_tensor(COLORS[one.color]).expand(len(triangles), 3))
    return Meshes(verts, faces, faces_attributes={"color": colors})


def view_scene(scene: Scene, image_size: int = 96) -> SceneView:
    """Draw a scene with the built-in renderer: objects with 3 x 3 samples per pixel over a floor with one."""
    members, camera = scene_mesh(scene), scene_camera(scene, image_size)
    colors = members.faces_attributes_packed()["color"].float()
    floor = raycast(members[0], camera, face_colors=colors[:2], renderer="builtin", samples=1)
    things = Meshes(members.verts_list()[1:], members.faces_list()[1:])
    drawn = raycast(join_meshes_as_scene(things), camera, face_colors=colors[2:], renderer="builtin")
    color, alpha = drawn.rgba[..., :3], drawn.rgba[..., 3:]
    image = color * alpha + floor.rgba[..., :3] * (1 - alpha)
    owner = torch.cat([things.faces_packed_to_mesh_idx() + 1, torch.zeros(1, dtype=torch.int64)])  # -1, none, is 0
    objects = owner[drawn.face_index]
    return SceneView(
        (image * 255).round().to(torch.uint8),
        objects.to(torch.uint8),
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


def make_scene(seed: int, index: int, *, image_size: int = 96, shapes: int = 4) -> tuple[Scene, SceneView]:
    """Scene number `index` of a seed and its view; drawn again until enough of every object shows, none cut off."""
    rng = np.random.default_rng([seed, _SCENES, index])
    while True:
        scene = draw_scene(rng, shapes)
        if not _fits(scene, image_size):
            continue
        view = view_scene(scene, image_size)
        seen = torch.bincount(view.objects.flatten().long(), minlength=len(scene.objects) + 1)[1:]
        if int(seen.min()) * (96 / image_size) ** 2 >= _LEAST:
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


def prepare_scenes(
    root: str | os.PathLike[str],
    *,
    scenes: int,
    seed: int = 0,
    image_size: int = 96,
    shapes: int = 4,
    captions: int = 5,
    sentences: int = 10_000,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    name: str = "scenes_v1",
    workers: int = 1,
) -> Prepared:
    """Draw scenes and put them into words, under `root`.

    shapes: of each category; all splits share them, what is new in val and test is the scene. captions: at most so many
    different ones of each scene. sentences: about scenes that are not drawn, for language models, a tenth of them for
    validation. split: shares of train, val and test. The bytes do not depend on `workers`. Raises ValueError naming
    what differs if `root` holds scenes of other settings; OSError if a file cannot be written.
    """
    for key, value, least in (
        ("scenes", scenes, 1), ("seed", seed, 0), ("image_size", image_size, 16), ("shapes", shapes, 1),
        ("captions", captions, 1), ("sentences", sentences, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    assigned = assign_splits(scenes, split)
    root = Path(root)
    settings: dict[str, Any] = {
        "format": _FORMAT, "scenes": scenes, "seed": seed, "image_size": image_size, "shapes": shapes,
        "captions": captions, "sentences": sentences, "split": list(split), "name": name,
    }  # fmt: skip
    manifest = root / "splits" / f"{name}.json"
    if _complete(root, settings):
        return Prepared(root, 0, scenes, [], manifest)
    for folder in ("images", "masks", "depth", "text", "splits"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = [_Job(root, seed, index, image_size, shapes, captions) for index in range(scenes)]
    lines = list(map_in_order(_write_scene, jobs, workers=workers, title="drawing scenes"))
    with atomic_write(root / "scenes.jsonl") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    Vocabulary(grammar_words()).save(root / "vocabulary.json")
    _write_text(root / "text", seed, sentences)
    files = [root / "scenes.jsonl", root / "vocabulary.json", root / "text" / "train.txt", root / "text" / "val.txt"]
    files += [root / line[key] for line in lines for key in ("image", "mask", "depth")]
    members = {s: {"scenes": [line["id"] for line, own in zip(lines, assigned) if own == s]} for s in SPLITS}
    digests = {path.relative_to(root).as_posix(): sha256(path) for path in files}
    SplitManifest(name, _FORMAT, seed, members, digests).write(manifest)
    write_json(root / "record.json", {"settings": settings})
    return Prepared(root, scenes, 0, [], manifest)


def _complete(root: Path, settings: dict[str, Any]) -> bool:
    """Whether all is there, record.json being written last; ValueError if it was made with other settings."""
    path = root / "record.json"
    if not path.is_file():
        return False
    found = read_json(path)["settings"]
    for key, value in settings.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path}: these scenes were prepared with {key}={found.get(key)!r}, now {key}={value!r} is asked for; "
                "choose another root or delete this folder"
            )
    listed = SplitManifest.read(root / "splits" / f"{settings['name']}.json", root)
    return all((root / file).is_file() for file in listed.files)


def _write_scene(job: _Job) -> dict[str, Any]:
    """Draw and write one scene; its line of scenes.jsonl."""
    scene, view = make_scene(job.seed, job.number, image_size=job.image_size, shapes=job.shapes)
    name = f"{job.number:06d}"
    files = {"image": f"images/{name}.png", "mask": f"masks/{name}.png", "depth": f"depth/{name}.png"}
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
    said = _choose(sentences(scene), job.captions, np.random.default_rng([job.seed, _SCENES, job.number, 1]))
    return {"id": name, **files, "captions": said, "objects": objects, "camera": camera}


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
