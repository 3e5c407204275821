"""Splits as each system has them, and that results say which one they are under."""

import json
from pathlib import Path

import pytest

from vision3dgen.datasets import (
    SplitManifest,
    choose_split,
    meshrcnn_split,
    onet_split,
    r2n2_split,
    random_split,
)
from vision3dgen.datasets.splits import fraction_split
from vision3dgen.metrics.protocols import PROTOCOLS
from vision3dgen.metrics.summary import summarize

CHAIR, TABLE = "03001627", "04379243"
MEMBERS = {CHAIR: [f"m{n:02d}" for n in (5, 3, 11, 2, 7)], TABLE: [f"t{n}" for n in range(23)]}


def test_r2n2s_rule():
    split = r2n2_split(MEMBERS)
    assert split.splits["train"][CHAIR] == ["m02", "m03", "m05", "m07"]
    assert split.splits["test"][CHAIR] == ["m11"]
    assert split.splits["val"][CHAIR] == []
    assert [len(split.members(name)[TABLE]) for name in ("train", "test", "all")] == [18, 5, 23]
    assert len(fraction_split(MEMBERS, 0.7, name="kaolin").splits["train"][TABLE]) == 16


def test_random_splits_follow_their_seed_alone():
    split = random_split(MEMBERS, 3)
    assert split.splits["test"][CHAIR] == ["m02"]  # of every version, on every machine
    shuffled = {synset: list(reversed(ids)) for synset, ids in MEMBERS.items()}
    assert random_split(shuffled, 3) == split
    assert random_split(MEMBERS, 4).sha256 != split.sha256
    ids = [model for name in ("train", "val", "test") for model in split.splits[name][TABLE]]
    assert sorted(ids) == sorted(MEMBERS[TABLE])
    assert [len(split.splits[name][TABLE]) for name in ("train", "val", "test")] == [16, 2, 5]


def test_an_equal_division_has_an_equal_hash(tmp_path):
    split = r2n2_split(MEMBERS)
    backwards = {name: {s: list(reversed(m)) for s, m in reversed(of.items())} for name, of in split.splits.items()}
    assert SplitManifest("other", 7, 5, backwards, {"x": "y"}).sha256 == split.sha256
    moved = {**split.splits, "test": {CHAIR: []}}
    assert SplitManifest("r2n2", 1, None, moved).sha256 != split.sha256
    split.write(tmp_path / "s.json")
    assert SplitManifest.read(tmp_path / "s.json", tmp_path).sha256 == split.sha256


def lists(root: Path, **ids: str) -> Path:
    (root / CHAIR).mkdir(exist_ok=True)
    for name, text in ids.items():
        (root / CHAIR / f"{name}.lst").write_text(text)
    return root


def test_occupancy_networks_lists(tmp_path):
    assert onet_split(tmp_path) is None
    split = onet_split(lists(tmp_path, train="b\na", test="c"))  # without a newline at the end
    assert split.splits == {"train": {CHAIR: ["a", "b"]}, "val": {CHAIR: []}, "test": {CHAIR: ["c"]}}
    assert onet_split(lists(tmp_path, train="a\nb\n")).sha256 == split.sha256


def test_meshrcnns_split_divides_views(tmp_path):
    path = tmp_path / "pix2mesh_splits_val05.json"
    content = {"train": {CHAIR: {"a": [0, 2], "b": [0]}}, "val": {}, "test": {CHAIR: {"a": [1]}}}
    path.write_text(json.dumps(content))
    split = meshrcnn_split(path)
    assert split.views_of("train") == {f"{CHAIR}/a": [0, 2], f"{CHAIR}/b": [0]}
    assert split.views_of("all") == {f"{CHAIR}/a": [0, 1, 2], f"{CHAIR}/b": [0]}
    assert split.members("test") == {CHAIR: ["a"]}
    split.write(tmp_path / "own.json")
    assert SplitManifest.read(tmp_path / "own.json", tmp_path) == split
    content["test"][CHAIR]["a"] = [1, 2]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"view 2 of {CHAIR}/a is in 'train' and in 'test'"):
        meshrcnn_split(path)
    path.write_text(json.dumps({"train": {CHAIR: {"../x": [0]}}, "val": {}, "test": {}}))
    with pytest.raises(ValueError, match=r"must not contain '\.\.'"):
        meshrcnn_split(path)


def test_the_split_that_is_chosen(tmp_path):
    own = onet_split(lists(tmp_path, train="m02", test="m03"))
    assert choose_split(None, MEMBERS, own, tmp_path) is own
    assert choose_split("onet", MEMBERS, own, tmp_path) is own
    assert choose_split("r2n2", MEMBERS, own, tmp_path) == r2n2_split(MEMBERS)
    assert choose_split(None, MEMBERS, None, tmp_path) == r2n2_split(MEMBERS)
    assert choose_split("random(3)", MEMBERS, own, tmp_path) == random_split(MEMBERS, 3)
    (tmp_path / "splits").mkdir()
    random_split(MEMBERS, 8).write(tmp_path / "splits" / "mine.json")
    assert choose_split(None, MEMBERS, own, tmp_path).name == "random(8)"
    assert choose_split("mine", MEMBERS, own, tmp_path).name == "random(8)"
    with pytest.raises(ValueError, match=r"no split 'random\(x\)' .* choose from \['mine', 'onet', 'r2n2', 'random"):
        choose_split("random(x)", MEMBERS, own, tmp_path)


def test_the_table_says_the_split():
    about = {"split": {"name": "r2n2", "sha256": "abc"}}
    header = {"protocol": PROTOCOLS["default"].to_dict(), "seed": 0, "repeats": 1, "about": about}
    assert "Split r2n2, sha256 abc." in summarize(header, []).to_markdown()
