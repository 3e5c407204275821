"""Readers of captioned images and of text: vocabulary, tokens, masks, and what is wrong with files."""

import json

import numpy as np
import pytest
import torch

from vision3dgen.datasets import Captions, TextLines, Vocabulary, collate, prepare_scenes
from vision3dgen.datasets.manifest import SPLITS, SplitManifest
from vision3dgen.datasets.vocabulary import mask_tokens
from vision3dgen.io import write_png
from vision3dgen.language import END, MASK, PAD, SPECIALS, START, UNKNOWN, words_of

# -------------------------------------------------------------------------------------------------------- vocabulary


def test_text_is_cut_into_lower_case_words_and_marks():
    assert words_of("A car, parked.  Don't\tmix-up 2 É!") == [
        "a",
        "car",
        ",",
        "parked",
        ".",
        "don't",
        "mix-up",
        "2",
        "é",
        "!",
    ]


def test_words_are_numbered_behind_the_special_ones_by_frequency():
    vocabulary = Vocabulary.of(["a red car", "a blue car", "a sofa"], min_count=1)
    assert vocabulary.words == (*SPECIALS, "a", "car", "blue", "red", "sofa")
    assert Vocabulary.of(["a red car", "a blue car"], min_count=2).words[5:] == ("a", "car")
    tokens = vocabulary.encode("A red car zooms")
    assert tokens == [START, 5, 8, 6, UNKNOWN, END]
    assert vocabulary.decode(torch.tensor([*tokens, PAD, 5])) == "a red car <unknown>"
    with pytest.raises(ValueError, match=r"of 10 does not know: \['fast', 'zooms'\]"):
        vocabulary.encode("a car zooms fast", unknown="raise")
    with pytest.raises(ValueError, match="token 10 is not in a vocabulary of 10"):
        vocabulary.decode([10])


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    vocabulary = Vocabulary(["é", "car", "don't", ","])
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary
    assert vocabulary != Vocabulary(["é"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[1]", "not a vocabulary"),
        ('{"format": "vision3dgen vocabulary", "version": 2, "words": []}', "of version 2, this program reads 1"),
        ('{"format": "vision3dgen vocabulary", "version": 1, "words": [1]}', "list of strings"),
        ('{"format": "vision3dgen vocabulary", "version": 1, "words": ["a", "a"]}', r"twice: \['a'\]"),
        ('{"format": "vision3dgen vocabulary", "version": 1, "words": ["<pad>"]}', r"twice: \['<pad>'\]"),
        ('{"format": "vision3dgen vocabulary", "version": 1, "words": ["Two words"]}', "not one lower-case word"),
    ],
)
def test_what_is_wrong_with_a_vocabulary_file_is_said(tmp_path, content, message):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Vocabulary.load(tmp_path / "v.json")
    assert "v.json" in str(error.value)


def test_nothing_to_make_a_vocabulary_of():
    with pytest.raises(ValueError, match="no word occurs 3 times"):
        Vocabulary.of(["a car"], min_count=3)


# ---------------------------------------------------------------------------------------------------------- captions


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions")
    prepare_scenes(root, scenes=6, seed=2, image_size=48, shapes=1, sentences=40, split=(0.5, 0.25, 0.25))
    return root


FIELDS = ("image", "tokens", "objects", "mask", "depth", "camera")


def test_items_of_generated_scenes(scenes):
    data = Captions(str(scenes), "all", fields=FIELDS)
    assert len(data) == 6
    sizes = [len(Captions(str(scenes), split)) for split in SPLITS]
    assert sum(sizes) == 6
    assert min(sizes) >= 1
    for item in (data[i] for i in range(6)):
        assert item["image"].shape == (3, 48, 48)
        assert 0 <= item["image"].min() < item["image"].max() <= 1
        assert item["tokens"].shape == (data.max_length,)
        assert data.vocabulary.decode(item["tokens"]) in item["captions"]
        assert item["mask"].unique().tolist() == list(range(len(item["objects"]) + 1))
        for number, one in enumerate(item["objects"], start=1):
            x0, y0, x1, y1 = (int(x) for x in one.box)
            assert not (item["mask"] == number)[:, :y0].any()
            assert (item["mask"] == number)[:, y0:y1, x0:x1].sum() == (item["mask"] == number).sum()
            assert one.color in item["captions"][0]
    batch = collate([data[0], data[1]])
    assert batch["image"].shape == (2, 3, 48, 48)
    assert [len(said) for said in batch["captions"]] == [len(data[i]["captions"]) for i in (0, 1)]


def test_resizing_moves_boxes_and_cameras_along(scenes):
    large = Captions(str(scenes), "all", fields=FIELDS)[0]
    small = Captions(str(scenes), "all", fields=FIELDS, image_size=24)[0]
    assert small["image"].shape == (3, 24, 24)
    assert small["mask"].shape == small["depth"].shape == (1, 24, 24)
    torch.testing.assert_close(small["image"], torch.nn.functional.avg_pool2d(large["image"], 2), atol=0.2, rtol=0)
    torch.testing.assert_close(small["objects"][0].box, large["objects"][0].box / 2)
    torch.testing.assert_close(small["camera"].intrinsics[:2], large["camera"].intrinsics[:2] / 2)


def test_captions_change_with_the_epoch_and_come_back(scenes):
    data = Captions(str(scenes), "all", cache=True, seed=5)
    again = Captions(str(scenes), "all", seed=5)

    def drawn(dataset):
        return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]

    first = drawn(data)
    assert drawn(again) == first
    data.set_epoch(1)
    assert drawn(data) != first
    data.set_epoch(0)
    assert drawn(data) == first
    assert torch.equal(data[0]["image"], again[0]["image"])  # from the cache, and not


def test_mirror_images_are_told_apart(scenes):
    plain, mirrored = Captions(str(scenes), "all"), Captions(str(scenes), "all", mirror=True)
    turned = 0
    for epoch in range(4):
        plain.set_epoch(epoch)
        mirrored.set_epoch(epoch)
        for i in range(6):
            a, b = plain[i], mirrored[i]
            words = [plain.vocabulary.decode(item["tokens"]).split() for item in (a, b)]
            if torch.equal(a["image"], b["image"]):
                assert words[0] == words[1]
                assert a["captions"] == b["captions"]
            else:
                turned += 1
                assert torch.equal(a["image"].flip(2), b["image"])
                swapped = {"left": "right", "right": "left"}
                assert words[1] == [swapped.get(word, word) for word in words[0]]
                assert " ".join(words[1]) in b["captions"]
    assert 5 < turned < 19
    with pytest.raises(ValueError, match=r"the fields \['objects'\] were asked for too"):
        Captions(str(scenes), "all", mirror=True, fields=("image", "objects"))


def write(root, lines, words=("a", "red", "car"), images=("0.png", "1.png")):
    root.mkdir(exist_ok=True)
    (root / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    Vocabulary(words).save(root / "vocabulary.json")
    for name in images:
        write_png(root / name, np.zeros((8, 12, 3), np.uint8))


def line(number, *captions, **more):
    return {"id": str(number), "image": f"{number}.png", "captions": list(captions), **more}


def test_ones_own_captions_need_no_more_than_three_keys(tmp_path):
    write(tmp_path, [line(0, "A car."), line(1, "a red car", "a car")], words=("a", "red", "car", "."))
    data = Captions(str(tmp_path), "all", file="captions.jsonl")
    assert data.max_length == 5
    assert data[0]["tokens"].tolist() == [START, 5, 7, 8, END]
    assert data[1]["captions"] == ["a red car", "a car"]
    (tmp_path / "splits").mkdir()
    manifest = SplitManifest("mine", 1, None, {"train": {"x": ["1"]}, "val": {"x": []}, "test": {"x": ["0"]}})
    manifest.write(tmp_path / "splits" / "mine.json")
    assert Captions(str(tmp_path), "train", file="captions.jsonl")[0]["id"] == "1"
    with pytest.raises(ValueError, match="no line is in the split 'val'"):
        Captions(str(tmp_path), "val", file="captions.jsonl")


GOOD = line(0, "a car")


@pytest.mark.parametrize(
    "lines, changes, message",
    [
        ([GOOD, line(1, "a blue car")], {}, r"line 2: 'a blue car' has words .* does not know: \['blue'\]"),
        ([], {}, "the file has no line"),
        ([GOOD, line(2, "a car")], {}, r"line 2: there is no image .*2.png"),
        ([GOOD, line(1)], {}, r"line 2: 'captions' must be at least one text"),
        ([line(1, " ")], {}, r"line 1: 'captions' must be at least one text"),
        ([{"image": "0.png", "captions": ["a"]}], {}, r"line 1: 'id' must be a string, got None"),
        ([["a"]], {}, "line 1: must be a JSON object"),
        ([{**GOOD, "image": "../0.png"}], {}, r"line 1: path '../0.png' must not contain"),
        ([GOOD, line(1, "a red car")], {"max_length": 4}, r"line 2: 5 tokens with <start> and <end> do not fit into 4"),
        ([GOOD], {"split": "train"}, "one split manifest is needed for 'train', found none"),
        ([GOOD], {"split": "trian"}, "did you mean 'train'"),
        ([GOOD], {"fields": ("images",)}, "did you mean 'image'"),
    ],
)
def test_what_is_wrong_with_captions_is_said(tmp_path, lines, changes, message):
    write(tmp_path, lines)
    with pytest.raises(ValueError, match=message):
        Captions(**{"root": str(tmp_path), "split": "all", "file": "captions.jsonl", **changes})


@pytest.mark.parametrize("field", ["mask", "objects", "camera"])
def test_fields_that_a_line_does_not_have(tmp_path, field):
    write(tmp_path, [GOOD])
    data = Captions(str(tmp_path), "all", file="captions.jsonl", fields=[field])
    with pytest.raises(ValueError, match=f"line 1: the field '{field}' was asked for"):
        data[0]


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(ValueError, match=r"scenes\.jsonl: no such file; make one with"):
        Captions(str(tmp_path), "all")
    write(tmp_path, [GOOD])
    (tmp_path / "captions.jsonl").write_text(json.dumps(GOOD) + "\n{\n")
    with pytest.raises(ValueError, match=r"captions.jsonl, line 2: not JSON"):
        Captions(str(tmp_path), "all", file="captions.jsonl")


def test_unknown_words_may_become_a_token(tmp_path):
    write(tmp_path, [line(0, "a blue car")])
    data = Captions(str(tmp_path), "all", file="captions.jsonl", unknown="token")
    assert data[0]["tokens"].tolist() == [START, 5, UNKNOWN, 7, END]


# -------------------------------------------------------------------------------------------------------------- text


@pytest.fixture
def text(tmp_path):
    (tmp_path / "train.txt").write_text("a red car\n\na car and a car\n")
    Vocabulary(["a", "red", "car", "and"]).save(tmp_path / "v.json")
    return {"path": str(tmp_path / "{split}.txt"), "split": "train", "vocabulary": str(tmp_path / "v.json")}


def test_lines_of_text(text):
    data = TextLines(**text)
    assert len(data) == 2
    item = data[1]
    assert item["id"] == "train.txt, line 3"
    assert item["tokens"].tolist() == [START, 5, 7, 8, 5, 7, END]
    assert data[0]["tokens"].tolist() == [START, 5, 6, 7, END, PAD, PAD]
    first = [data[i]["masked"].tolist() for i in range(2)]
    assert [TextLines(**text)[i]["masked"].tolist() for i in range(2)] == first
    masks = []
    for epoch in range(20):
        data.set_epoch(epoch)
        item = data[1]
        known = item["targets"] != PAD
        assert known.any()
        assert torch.equal(item["targets"][known], item["tokens"][known])
        assert torch.equal(item["masked"][~known], item["tokens"][~known])
        masks.append(tuple(item["masked"].tolist()))
    assert len(set(masks)) > 5


def test_fifteen_percent_are_chosen_and_replaced_as_in_bert():
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[START], rng.integers(5, 1000, 60_000), [UNKNOWN] * 1000, [END], [PAD] * 999])
    masked, targets = mask_tokens(tokens, 1000, 0.15, rng)
    chosen = targets != PAD
    assert not chosen[(tokens == START) | (tokens == END) | (tokens == PAD)].any()
    assert (targets[chosen] == tokens[chosen]).all()
    assert (masked[~chosen] == tokens[~chosen]).all()
    assert chosen.sum() / 61_000 == pytest.approx(0.15, abs=0.006)
    assert (masked[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.015)
    assert (masked[chosen] == tokens[chosen]).mean() == pytest.approx(0.1, abs=0.012)
    others = masked[chosen & (masked != MASK) & (masked != tokens)]
    assert others.min() >= 5  # never a special token


def test_one_word_at_least_is_left_out():
    for seed in range(20):
        _, targets = mask_tokens(np.array([START, 7, END, PAD]), 9, 0.01, np.random.default_rng(seed))
        assert targets.tolist() == [PAD, 7, PAD, PAD]
    with pytest.raises(ValueError, match="no word to mask"):
        mask_tokens(np.array([START, END]), 9, 0.15, np.random.default_rng(0))


@pytest.mark.parametrize(
    "content, changes, message",
    [
        ("a car\na blue car\n", {}, r"train.txt, line 2: .* does not know: \['blue'\]"),
        ("\n \n", {}, "train.txt: no line with a word in it"),
        (
            "a car\na car and a red car\n",
            {"max_length": 5},
            "line 2: 8 tokens with <start> and <end> do not fit into 5",
        ),
        ("a car", {"mask": 1.0}, "mask must be a share between 0 and 1"),
    ],
)
def test_what_is_wrong_with_text_is_said(text, tmp_path, content, changes, message):
    (tmp_path / "train.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        TextLines(**text, **changes)


def test_text_that_is_not_there_or_not_utf8(text, tmp_path):
    with pytest.raises(OSError, match=r"val.txt"):
        TextLines(**{**text, "split": "val"})
    (tmp_path / "train.txt").write_bytes(b"a c\xff")
    with pytest.raises(ValueError, match=r"train.txt: not UTF-8 text \(byte 3\)"):
        TextLines(**text)
