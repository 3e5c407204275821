"""Scenes: true sentences, exact masks and boxes, depth that fits the geometry, bytes that depend on the seed alone."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vision3dgen import cli
from vision3dgen.datasets import SceneInstances, SplitManifest, make_scene, prepare_scenes, scenes, sentences
from vision3dgen.datasets.procedural import CATEGORIES
from vision3dgen.datasets.scenes import (
    COLORS,
    DEPTH_UNITS,
    OPPOSITES,
    PLURALS,
    RELATIONS,
    Scene,
    SceneObject,
    draw_scene,
    grammar_words,
    relation,
    scene_mesh,
    view_scene,
)
from vision3dgen.files import read_jsonl
from vision3dgen.io import read_depth_png, read_image

SMALL = {"scenes": 5, "seed": 3, "image_size": 41, "shapes": 2, "sentences": 20}


def thing(color, category, right, away):
    return SceneObject(category, color, 0, (right, away), 0.3, 1.0)


def scene(*objects):
    return Scene(objects, 40.0, 30.0, 3.2, 0.6)


def drawn(count=300):
    return [draw_scene(np.random.default_rng([7, i]), 8) for i in range(count)]


# --------------------------------------------------------------------------------------------------------- sentences


def test_one_object_by_hand():
    assert sentences(scene(thing("orange", "airplane", 0, 0))) == [
        "an orange airplane",
        "there is an orange airplane",
        "an orange airplane on the floor",
        "there is an orange airplane on the floor",
    ]


def test_two_objects_by_hand():
    said = sentences(scene(thing("red", "chair", -0.5, 0.1), thing("blue", "bench", 0.5, 0)))
    assert said == ["a red chair left of a blue bench", "a blue bench right of a red chair"]
    said = sentences(scene(thing("red", "chair", 0.1, 0.6), thing("blue", "bench", 0, -0.6)))
    assert sorted(said) == ["a blue bench in front of a red chair", "a red chair behind a blue bench"]


def test_objects_alike_are_counted():
    chairs = [thing("red", "chair", right, 0) for right in (-0.9, 0, 0.9)]
    assert sentences(scene(*chairs))[:2] == ["three red chairs", "there are three red chairs"]
    others = sentences(
        scene(thing("red", "bench", -1, 0.1), thing("red", "bench", -1, -0.9), thing("black", "car", 1, 0))
    )
    assert others == ["two red benches left of a black car", "a black car right of two red benches"]


def test_where_no_relation_holds_for_all_members_none_is_claimed():
    middle = [thing("red", "lamp", -0.9, 0), thing("white", "sofa", 0, 0), thing("red", "lamp", 0.9, 0)]
    assert sentences(scene(*middle)) == ["two red lamps and a white sofa", "a white sofa and two red lamps"]


def test_every_sentence_is_true():
    """Read back by a parser that shares nothing with the grammar but the words."""
    singular = {plural: name for name, plural in PLURALS.items() if plural != "watercraft"}
    for made in drawn():
        for text in sentences(made):
            text = text.removeprefix("there is ").removeprefix("there are ").removesuffix(" on the floor")
            parts = re.split(rf" ({'|'.join(RELATIONS)}|and(?: (?:{'|'.join(RELATIONS)}))?) ", text)
            groups = []
            for phrase in parts[::2]:
                number, color, noun = phrase.split(" ")
                category = singular.get(noun, noun)
                members = [o for o in made.objects if (o.color, o.category) == (color, category)]
                assert len(members) == {"a": 1, "an": 1, "two": 2, "three": 3}[number]
                groups.append(members)
            assert sorted(o for group in groups for o in group) == sorted(made.objects)
            for word, group in zip(parts[1::2], groups[1:]):
                claimed = word.removeprefix("and").strip()
                for a in groups[0]:
                    for b in group if claimed else ():
                        axis = 0 if claimed in ("left of", "right of") else 1
                        step = a.place[axis] - b.place[axis]
                        assert (step > 0) == (claimed in ("right of", "behind"))
                        assert abs(step) > abs(a.place[1 - axis] - b.place[1 - axis])


def test_relations_are_clear_and_opposite():
    for made in drawn():
        for i, a in enumerate(made.objects):
            for b in made.objects[:i]:
                assert relation(a, b) == OPPOSITES[relation(b, a)]
                steps = sorted(abs(x - y) for x, y in zip(a.place, b.place))
                assert steps[1] >= 0.85
                assert steps[0] <= 0.6 * 0.85


def test_the_vocabulary_is_that_of_the_grammar():
    said = {word for made in drawn(1000) for text in sentences(made) for word in text.split()}
    assert said <= set(grammar_words())
    assert {*COLORS, *PLURALS, "an", "there", "are", "three", "and", "behind", "left"} <= said


# -------------------------------------------------------------------------------------------------------------- views


@pytest.fixture(scope="module")
def seen():
    return [make_scene(1, index, image_size=64, shapes=2) for index in range(6)]


def test_boxes_are_those_of_the_masks_and_nothing_is_cut_off(seen):
    for made, view in seen:
        assert view.objects.max() == len(made.objects)
        for number, box in enumerate(view.boxes.tolist(), start=1):
            rows, columns = np.where(view.objects.numpy() == number)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert min(box) > 0
            assert max(box) < 64
            assert len(rows) >= 80 * (64 / 96) ** 2


def test_depth_leads_back_to_the_floor_and_to_the_objects(seen):
    for made, view in seen:
        v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
        pixels = torch.stack([u, v], -1).view(-1, 2).double()
        points = view.camera.unproject(pixels, view.depth.double().view(-1))
        owner = view.objects.view(-1)
        assert points[owner == 0, 1].abs().max() < 1e-3
        boxes = scene_mesh(made).get_bounding_boxes()
        for number in range(1, len(made.objects) + 1):
            inside = points[owner == number]
            assert bool((inside > boxes[number, :, 0] - 0.02).all())
            assert bool((inside < boxes[number, :, 1] + 0.02).all())


def test_sides_and_depths_in_the_picture_are_those_said(seen):
    checked = set()
    for made, view in seen:
        for i, a in enumerate(made.objects):
            for j, b in enumerate(made.objects):
                if i == j:
                    continue
                held = relation(a, b)
                checked.add(held)
                middle = (view.boxes[i] + view.boxes[i].roll(2))[:2] - (view.boxes[j] + view.boxes[j].roll(2))[:2]
                near = view.depth[view.objects == i + 1].min() < view.depth[view.objects == j + 1].min()
                if held in ("left of", "right of"):
                    assert (middle[0] < 0) == (held == "left of")
                else:
                    assert near == (held == "in front of")
    assert checked == set(RELATIONS)


def test_objects_have_their_color_and_stand_on_the_floor():
    made = scene(thing("green", "table", -0.5, 0), thing("red", "lamp", 0.5, 0))
    view = view_scene(made, 48)
    for number, channel in ((1, 1), (2, 0)):
        assert view.image[view.objects == number].float().mean(0).argmax() == channel
    for verts in scene_mesh(made).verts_list()[1:]:
        assert verts[:, 1].min() == pytest.approx(0, abs=1e-9)


def test_an_object_with_angle_zero_faces_the_camera():
    made = scene(SceneObject("chair", "red", 0, (0.4, -0.2), 0.0, 1.1))
    standing, placed = scenes._surface("chair", 0)[0], scene_mesh(made).verts_list()[1]
    turn = torch.linalg.lstsq(standing - standing.mean(0), placed - placed.mean(0)).solution.T / 1.1
    azimuth = math.radians(made.azimuth)
    front = turn @ torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)  # ShapeNet's
    assert front.tolist() == pytest.approx([math.sin(azimuth), 0, math.cos(azimuth)], abs=1e-9)
    camera = scenes.scene_camera(made, 64)
    assert camera.world_to_camera(placed)[:, 0].mean() == pytest.approx(0.4, abs=0.1)  # to the camera's right


def test_a_scene_depends_on_seed_and_index_alone():
    a, b = make_scene(5, 2, image_size=32, shapes=1), make_scene(5, 2, image_size=32, shapes=1)
    assert a[0] == b[0]
    assert torch.equal(a[1].image, b[1].image)
    assert make_scene(6, 2, image_size=32, shapes=1)[0] != a[0]
    assert make_scene(5, 3, image_size=32, shapes=1)[0] != a[0]


# ------------------------------------------------------------------------------------------------------- on the disk


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    assert prepare_scenes(root, **SMALL).written == 5
    return root


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_written_fits_together(root):
    manifest = SplitManifest.read(root / "splits" / "scenes_v1.json", root)
    assert manifest.verify(root) == []
    lines = read_jsonl(root / "scenes.jsonl")
    members = [name for split in manifest.splits.values() for name in split["scenes"]]
    assert sorted(members) == [line["id"] for line in lines] == [f"{i:06d}" for i in range(5)]
    for index, line in enumerate(lines):
        made, view = make_scene(3, index, image_size=41, shapes=2)
        np.testing.assert_array_equal(read_image(root / line["image"], mode="RGB"), view.image.numpy())
        np.testing.assert_array_equal(read_image(root / line["mask"], mode="L"), view.objects.numpy())
        depth = read_depth_png(root / line["depth"], units_per_metre=DEPTH_UNITS)
        np.testing.assert_allclose(depth, view.depth.numpy(), atol=0.6 / DEPTH_UNITS)
        assert line["captions"][0] == sentences(made)[0]
        assert set(line["captions"]) <= set(sentences(made))
        assert [o["box"] for o in line["objects"]] == view.boxes.tolist()
    assert len((root / "text" / "train.txt").read_text().splitlines()) == 18


def test_workers_change_no_byte(root, tmp_path):
    prepare_scenes(tmp_path, **SMALL, workers=2)
    assert tree(tmp_path) == tree(root)


def test_complete_scenes_are_kept_and_other_settings_refused(root, tmp_path):
    before = tree(root)
    done = prepare_scenes(root, **SMALL)
    assert (done.written, done.kept) == (0, 5)
    with pytest.raises(ValueError, match="prepared with seed=3, now seed=4"):
        prepare_scenes(root, **{**SMALL, "seed": 4})
    assert tree(root) == before


def test_a_missing_picture_is_made_again(tmp_path):
    few = {**SMALL, "scenes": 2}
    prepare_scenes(tmp_path, **few)
    before = tree(tmp_path)
    (tmp_path / "images" / "000001.png").unlink()
    assert prepare_scenes(tmp_path, **few).written == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize("changes", [{"scenes": 0}, {"image_size": 8}, {"captions": 0}, {"workers": 0}, {"seed": -1}])
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        prepare_scenes(tmp_path / "root", **{**SMALL, **changes})
    assert not (tmp_path / "root" / "scenes.jsonl").exists()


def test_rooms_have_objects_of_the_categories_asked_for(tmp_path):
    asked = ["lamp", "car"]
    prepare_scenes(tmp_path, scenes=4, image_size=48, shapes=1, objects=4, categories=asked)
    lines = read_jsonl(tmp_path / "scenes.jsonl")
    assert {one["category"] for line in lines for one in line["objects"]} == set(asked)
    item = SceneInstances(str(tmp_path), "all", fields=[])[0]
    numbers = [list(CATEGORIES.values()).index(one["category"]) + 1 for one in lines[0]["objects"]]
    assert item["labels"].tolist() == numbers
    with pytest.raises(ValueError, match=r"prepared with categories=.*now categories=None"):
        prepare_scenes(tmp_path, scenes=4, image_size=48, shapes=1, objects=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"categories": ["car"]}, "give objects too"),
        ({"objects": 3, "categories": []}, "one at least"),
        ({"objects": 3, "categories": ["car", "car"]}, "different names"),
        ({"objects": 3, "categories": ["house"]}, "house"),
    ],
)
def test_categories_that_cannot_be_meant_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        prepare_scenes(tmp_path / "root", **SMALL, **settings)
    assert not (tmp_path / "root").exists()


def test_the_command_line_makes_scenes(tmp_path, capsys):
    arguments = ["prepare", "scenes", str(tmp_path), "--scenes", "1", "--image-size", "32", "--sentences", "10"]
    assert cli.main(arguments) == 0
    assert "1 written" in capsys.readouterr().out
    camera = json.loads((tmp_path / "scenes.jsonl").read_text())["camera"]
    assert camera["intrinsics"][0][0] == pytest.approx(16 / math.tan(math.radians(19)))
