"""Photographs with annotations: tiny folders in the published layouts, and every fault named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision3dgen.datasets import (
    DATASETS,
    COCODetection,
    COCOPanoptic,
    PennFudan,
    Pix3D,
    VOCDetection,
    VOCSegmentation,
    collate,
)
from vision3dgen.files import FileError
from vision3dgen.io import rle_to_coco, save_mesh, write_png
from vision3dgen.ops import encode_rle, ico_sphere
from vision3dgen.structures import Meshes

SIZE = (23, 31)


def picture(path: Path, size=SIZE, mode="RGB", seed=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def rectangle(x1, y1, x2, y2, size=SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


# -------------------------------------------------------------------------------------------------- Penn-Fudan


def pedestrians(root: Path, published: bool, count=6) -> None:
    for number in range(count):
        name = f"FudanPed{number:05d}"
        images, masks = ("PNGImages", "PedMasks") if published else (".", ".")
        picture(root / images / f"{name}.png", seed=number)
        numbers = rectangle(2, 3, 8, 20) * 1 + rectangle(10, 1, 11, 2) * 2
        (root / masks).mkdir(exist_ok=True)
        write_png(root / masks / f"{name}_mask.png", numbers.astype(np.uint8))


@pytest.mark.parametrize("published", [False, True])
def test_pedestrians_in_both_layouts(tmp_path: Path, published: bool):
    pedestrians(tmp_path, published)
    data = PennFudan(tmp_path, "train", semantic=True, fractions={"train": 0.5, "test": 0.5})
    item = data[0]
    assert item["boxes"].tolist() == [[2, 3, 8, 20], [10, 1, 11, 2]]  # one pixel is an object
    assert item["labels"].tolist() == [1, 1]
    assert torch.equal(item["semantic"] == 1, item["masks"].any(0))
    assert item["image"].shape == (3, *SIZE)
    assert data.categories == ("pedestrian",)
    test = PennFudan(tmp_path, "test", fractions={"train": 0.5, "test": 0.5})
    everything = PennFudan(tmp_path, "all")
    assert sorted([*data.ids, *test.ids]) == everything.ids
    assert len(everything) == 6
    assert data.check() == []
    batch = collate([data[0], data[1]])
    assert batch["image"].shape == (2, 3, *SIZE)
    assert [len(boxes) for boxes in batch["boxes"]] == [2, 2]


def test_faults_of_pedestrians_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        PennFudan(tmp_path / "nothing", "all")
    with pytest.raises(FileError, match=r"no picture NAME\.png"):
        PennFudan(tmp_path, "all")
    pedestrians(tmp_path, False, count=3)
    write_png(tmp_path / "FudanPed00001_mask.png", rectangle(0, 0, 3, 3).astype(np.uint8) * 2)
    with pytest.raises(FileError, match=r"FudanPed00001: .*pedestrian 1 of 2 has no pixel"):
        PennFudan(tmp_path, "all")
    (tmp_path / "FudanPed00002_mask.png").unlink()
    data = PennFudan(tmp_path, "all", on_error="skip")
    assert data.ids == ["FudanPed00000"]
    assert [problem.item for problem in data.problems] == ["FudanPed00001", "FudanPed00002"]
    with pytest.raises(ValueError, match="unknown split 'val'"):
        PennFudan(tmp_path, "val", on_error="skip")
    write_png(tmp_path / "FudanPed00000_mask.png", np.ones((5, 5), np.uint8))
    wrong = PennFudan(tmp_path, "all", on_error="skip")
    assert "the size of FudanPed00000.png" in wrong.check()[-1].reason
    picture(tmp_path / "FudanPed00000_mask.png")
    with pytest.raises(FileError, match="must have a palette or 8 bits of gray"):
        PennFudan(tmp_path, "all")


def test_the_photographs_of_the_shared_folder(shared_data: Path):
    train, test = (PennFudan(shared_data / "pennfudan", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (45, 12)
    assert not set(train.ids) & set(test.ids)
    item = train[0]
    assert item["masks"].flatten(1).any(1).all()
    assert item["boxes"].shape == (len(item["labels"]), 4)
    smaller = PennFudan(shared_data / "pennfudan", "train", max_side=100)[0]
    assert max(smaller["image"].shape) == 100
    assert smaller["masks"].shape[1:] == smaller["image"].shape[1:]
    scale = torch.tensor([s / o for s, o in zip(smaller["image"].shape[:0:-1], item["image"].shape[:0:-1])] * 2)
    torch.testing.assert_close(smaller["boxes"], item["boxes"] * scale)


# --------------------------------------------------------------------------------------------------------- COCO


def coco(root: Path, change=None, part="train") -> None:
    """Three images: one with a polygon and a crowd, one with a single pixel, one without objects."""
    crowd = rle_to_coco(encode_rle(torch.from_numpy(rectangle(15, 10, 30, 20)[None]))[0], compressed=False)
    pixel = rle_to_coco(encode_rle(torch.from_numpy(rectangle(4, 5, 5, 6)[None]))[0])
    content = {
        "images": [
            {"id": 30 - k, "file_name": f"{k}.jpg", "height": SIZE[0], "width": SIZE[1]} for k in range(3)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ball"}],
        "annotations": [
            {"id": 1, "image_id": 30, "category_id": 7, "bbox": [2, 3, 6, 9], "area": 54, "iscrowd": 0,
             "segmentation": [[2, 3, 8, 3, 8, 12, 2, 12]]},
            {"id": 2, "image_id": 30, "category_id": 3, "bbox": [15, 10, 15, 10], "area": 150, "iscrowd": 1,
             "segmentation": crowd},
            {"id": 3, "image_id": 29, "category_id": 3, "bbox": [4, 5, 1, 1], "area": 1, "iscrowd": 0,
             "segmentation": pixel},
        ],
    }  # fmt: skip
    if change is not None:
        change(content)
    for k in range(3):
        picture(root / f"{part}2017" / f"{k}.jpg", mode="L" if k == 2 else "RGB", seed=k)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))


def test_coco_is_read_as_published(tmp_path: Path):
    coco(tmp_path)
    data = COCODetection(tmp_path, "train")
    assert data.categories == ("ball", "cat")
    assert data.ids == ["train2017/2", "train2017/1", "train2017/0"]
    item = data[2]
    assert item["boxes"].tolist() == [[2, 3, 8, 12], [15, 10, 30, 20]]
    assert item["labels"].tolist() == [2, 1]
    assert item["crowd"].tolist() == [False, True]
    assert item["areas"].tolist() == [54, 150]
    assert np.array_equal(item["masks"][0].numpy(), rectangle(2, 3, 8, 12))
    assert np.array_equal(item["masks"][1].numpy(), rectangle(15, 10, 30, 20))
    empty = data[0]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, *SIZE)
    assert torch.equal(empty["image"][0], empty["image"][2])  # gray, three times
    assert data.check() == []
    assert collate([data[i] for i in range(3)])["image"].shape == (3, 3, *SIZE)
    plain = COCODetection(tmp_path, "train", masks=False, keep=["cat"], max_side=15)
    assert "masks" not in plain[0]
    assert [len(plain[i]["labels"]) for i in range(3)] == [0, 0, 1]
    assert plain[2]["labels"].tolist() == [1]
    parts = [COCODetection(tmp_path, name, fractions={"train": 0.67, "val": 0.33}) for name in ("train", "val")]
    assert [len(part) for part in parts] == [2, 1]


FAULTS = [
    (lambda c: c["annotations"][0].update(category_id=99), "annotation 1: category id 99 is unknown"),
    (lambda c: c["annotations"][0].update(bbox=[2, 3, 0, 9]), "annotation 1: the box .2, 3, 2, 12. is degenerate"),
    (lambda c: c["annotations"][0].update(bbox=[2, 3, -2, 9]), "annotation 1: .* is inverted"),
    (lambda c: c["annotations"][0].update(bbox=[40, 3, 5, 5]), "annotation 1: .* is not inside the picture of 23 x 31"),
    (lambda c: c["annotations"][0].update(bbox=[2, 3, 5]), "annotation 1: bbox must be x, y, width, height"),
    (lambda c: c["annotations"][0].update(bbox=[12, 3, 6, 9]), "annotation 1: its mask lies in"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "annotation 1: .*at least 3 points"),
    (lambda c: c["annotations"][0].update(segmentation=None), "annotation 1: .*must be polygons"),
    (lambda c: c["annotations"][1]["segmentation"].update(size=[31, 23]), "annotation 2: .*run lengths are of 31 x 23"),
    (lambda c: c["annotations"][1]["segmentation"].update(counts=[5]), "annotation 2: .*add up to 5"),
    (lambda c: c["annotations"][1].update(image_id=5), "annotation 2: its image 5 is not in the list"),
    (lambda c: c["annotations"][1].update(id=1), "annotation 1: the annotation's id comes twice"),
    (lambda c: c["images"][1].update(id=30), "image id 30 comes twice"),
    (lambda c: c["images"][1].update(file_name="9.jpg"), r"9\.jpg does not exist"),
    (lambda c: c["images"][1].update(file_name="../x.jpg"), r"must not contain '\.\.'"),
]


@pytest.mark.parametrize("change, message", FAULTS)
def test_faults_of_coco_name_image_and_annotation(tmp_path: Path, change, message: str):
    coco(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        COCODetection(tmp_path, "train")
    if "must not contain" not in message:
        data = COCODetection(tmp_path, "train", on_error="skip")
        assert len(data.problems) >= 1
        for index in range(len(data)):
            data[index]


def test_files_that_are_not_coco(tmp_path: Path):
    coco(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    for text, message in (("{", "not JSON, or cut short"), ("[]", "must be an object with the lists"), ("{}", "lists")):
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            COCODetection(tmp_path, "train")
    with pytest.raises(FileNotFoundError):
        COCODetection(tmp_path, "val")
    with pytest.raises(ValueError, match="no published split 'dev'"):
        COCODetection(tmp_path, "dev")
    coco(tmp_path, lambda c: c["categories"].append({"id": 3, "name": "dog"}))
    with pytest.raises(FileError, match="category id 3 comes twice"):
        COCODetection(tmp_path, "train")
    coco(tmp_path)
    with pytest.raises(ValueError, match="keep must be different categories"):
        COCODetection(tmp_path, "train", keep=["dog"])
    (tmp_path / "train2017" / "1.jpg").write_bytes(b"no picture")
    problems = COCODetection(tmp_path, "train").check()
    assert [problem.item for problem in problems] == ["train2017/1"]
    picture(tmp_path / "train2017" / "1.jpg", size=(5, 5))
    assert "must be 23 x 31" in COCODetection(tmp_path, "train").check()[0].reason


def panoptic(root: Path, change=None) -> None:
    numbers = np.full(SIZE, 300)  # stuff
    numbers[2:9, 3:10] = 70_000
    numbers[12:20, 5:25] = 12  # a crowd
    numbers[:2] = 0
    colors = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)
    content = {
        "images": [{"id": 4, "file_name": "4.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [
            {"id": 1, "name": "grass", "isthing": 0}, {"id": 2, "name": "cat", "isthing": 1},
            {"id": 5, "name": "ball", "isthing": 1},
        ],
        "annotations": [{"image_id": 4, "file_name": "4.png", "segments_info": [
            {"id": 300, "category_id": 1, "bbox": [0, 2, 31, 21], "area": 0, "iscrowd": 0},
            {"id": 12, "category_id": 5, "bbox": [5, 12, 20, 8], "area": 160, "iscrowd": 1},
            {"id": 70000, "category_id": 2, "bbox": [3, 2, 7, 7], "area": 49, "iscrowd": 0},
        ]}],
    }  # fmt: skip
    if change is not None:
        change(content["annotations"][0])
    picture(root / "val2017" / "4.jpg")
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).save(folder / "4.png")
    folder.with_suffix(".json").write_text(json.dumps(content))


def test_panoptic_segments_have_one_numbering(tmp_path: Path):
    panoptic(tmp_path)
    data = COCOPanoptic(tmp_path, "val")
    assert data.categories == ("cat", "ball", "grass")
    assert data.things == 2
    item = data[0]
    assert item["segment_labels"].tolist() == [1, 2, 3]
    assert item["segment_crowd"].tolist() == [False, True, False]
    assert item["labels"].tolist() == [1, 2]
    assert item["crowd"].tolist() == [False, True]
    assert item["boxes"].tolist() == [[3, 2, 10, 9], [5, 12, 25, 20]]
    assert item["areas"].tolist() == [49, 160]
    assert torch.equal(item["panoptic"] == 1, item["masks"][0])
    assert torch.equal(item["semantic"] == 255, item["panoptic"] == 0)
    assert set(item["semantic"].unique().tolist()) == {1, 2, 3, 255}
    assert data.check() == []
    reduced = COCOPanoptic(tmp_path, "val", max_side=16)[0]
    assert reduced["panoptic"].shape == reduced["image"].shape[1:] == (12, 16)


def test_faults_of_panoptic_segments_are_named(tmp_path: Path):
    for change, message in (
        (lambda a: a["segments_info"][1].update(category_id=9), "segment 12: category id 9 is unknown"),
        (lambda a: a["segments_info"][1].update(id=300), "segment 300: comes twice"),
        (lambda a: a["segments_info"][1].update(id=0), "segment 0: 0 is the number of no segment"),
        (lambda a: a["segments_info"][1].update(bbox=[5, 12, 0, 8]), "segment 12: .*degenerate"),
        (lambda a: a["segments_info"][1].pop("id"), "not whole: KeyError"),
        (lambda a: a.update(file_name="5.png"), r"5\.png does not exist"),
        (lambda a: a.update(image_id=9), "its image 9 is not in the list"),
    ):
        panoptic(tmp_path, change)
        with pytest.raises(FileError, match=message):
            COCOPanoptic(tmp_path, "val")
    panoptic(tmp_path, lambda a: a["segments_info"].pop(1))
    assert "segments [12] are not in panoptic_val2017.json" in COCOPanoptic(tmp_path, "val").check()[0].reason
    panoptic(tmp_path, lambda a: a["segments_info"][2].update(bbox=[9, 9, 9, 9]))
    assert "segment 70000: its mask lies in" in COCOPanoptic(tmp_path, "val").check()[0].reason


# ---------------------------------------------------------------------------------------------------------- VOC

XML = """<annotation><size><width>31</width><height>23</height><depth>3</depth></size>
<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{x1}</xmin><ymin>4</ymin><xmax>8</xmax><ymax>12</ymax>
</bndbox><part><name>head</name></part></object>
<object><name>cat</name><bndbox><xmin>20</xmin><ymin>20</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>
</annotation>"""


def voc(root: Path, text: str) -> None:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text("000005\n000007\n")
    for name in ("000005", "000007"):
        picture(root / "JPEGImages" / f"{name}.jpg")
    (root / "Annotations/000005.xml").write_text(text)
    (root / "Annotations/000007.xml").write_text("<annotation/>")


def test_voc_boxes_are_pixels_counted_from_one(tmp_path: Path):
    voc(tmp_path / "VOC2007", XML.format(name="person", x1=3))
    data = VOCDetection(tmp_path, "train")
    item = data[0]
    assert item["boxes"].tolist() == [[2, 3, 8, 12], [19, 19, 20, 20]]
    assert item["labels"].tolist() == [15, 8]
    assert item["difficult"].tolist() == [True, False]
    assert item["id"] == "VOC2007/000005"
    assert data[1]["boxes"].shape == (0, 4)
    assert data.check() == []
    kept = VOCDetection(tmp_path / "VOC2007", "train", keep=["cat", "dog"])
    assert kept[0]["labels"].tolist() == [1]
    assert collate([data[0], data[1]])["difficult"][1].shape == (0,)


def test_faults_of_voc_are_named(tmp_path: Path):
    good = XML.format(name="person", x1=3)
    for text, message in (
        (XML.format(name="person", x1=9), r"image 000005, object 1 .person.: the box .* is degenerate"),
        (XML.format(name="person", x1=12), r"object 1 .person.: the box .* is inverted"),
        (XML.format(name="unicorn", x1=3), "category 'unicorn' is unknown"),
        (good.replace("<xmax>8</xmax>", "<xmax>80</xmax>"), "is not inside the picture"),
        (good.replace("<xmax>8</xmax>", ""), "has no 'bndbox/xmax'"),
        (good.replace("<xmax>8<", "<xmax>eight<"), "could not convert"),
        (good[:90], "not XML, or cut short"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + good, "has a document type"),
    ):
        voc(tmp_path, text)
        with pytest.raises(FileError, match=message):
            VOCDetection(tmp_path, "train")
        assert len(VOCDetection(tmp_path, "train", on_error="skip").problems) == 1
    voc(tmp_path, good)
    (tmp_path / "JPEGImages/000007.jpg").unlink()
    with pytest.raises(FileError, match=r"000007\.jpg does not exist"):
        VOCDetection(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no such file; .* has \['train.txt'\]"):
        VOCDetection(tmp_path, "val")
    (tmp_path / "ImageSets/Main/train.txt").write_text("000005\n000005\n")
    with pytest.raises(FileError, match="'000005' is listed twice"):
        VOCDetection(tmp_path, "train")
    (tmp_path / "ImageSets/Main/train.txt").write_text("../000005\n")
    with pytest.raises(FileError, match=r"must not contain '\.\.'"):
        VOCDetection(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no Annotations in it"):
        VOCDetection(tmp_path / "JPEGImages", "train")
    with pytest.raises(ValueError, match="keep must be"):
        VOCDetection(tmp_path, "train", keep=["unicorn"])


def test_voc_classes_are_the_numbers_of_the_palette(tmp_path: Path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    picture(root / "JPEGImages/a.jpg")
    numbers = rectangle(3, 3, 9, 9).astype(np.uint8) * 15
    numbers[0] = 255
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("a\n")

    def save(values):
        image = Image.fromarray(values, mode=None).convert("P") if values.ndim == 3 else Image.fromarray(values)
        if values.ndim == 2:
            image.putpalette(np.random.default_rng(0).integers(0, 255, 768, dtype=np.uint8).tobytes())
        image.save(root / "SegmentationClass/a.png")

    save(numbers)
    data = VOCSegmentation(tmp_path, "val")
    assert torch.equal(data[0]["semantic"], torch.from_numpy(numbers.astype(np.int64)))
    assert data[0]["semantic"].dtype == torch.int64
    assert data.check() == []
    save(np.full(SIZE, 40, np.uint8))
    assert "pixels must be 0 to 20 or 255, got [40]" in VOCSegmentation(tmp_path, "val").check()[0].reason
    picture(root / "SegmentationClass/a.png")
    assert "must have a palette" in VOCSegmentation(tmp_path, "val").check()[0].reason
    (root / "SegmentationClass/a.png").unlink()
    with pytest.raises(FileError, match=r"a\.png does not exist"):
        VOCSegmentation(tmp_path, "val")


# -------------------------------------------------------------------------------------------------------- Pix3D


def pix3d(root: Path, change=None) -> None:
    """A ball half a metre to the left and up, two metres away; x to the left and y up in the file."""
    size = (60, 80)
    ball = ico_sphere(2)
    (root / "model/chair").mkdir(parents=True, exist_ok=True)
    save_mesh(root / "model/chair/ball.obj", Meshes([ball.verts_packed() * 0.2], [ball.faces_packed()]))
    picture(root / "img/chair/0001.png", size=size)
    (root / "mask/chair").mkdir(parents=True, exist_ok=True)
    write_png(root / "mask/chair/0001.png", rectangle(10, 5, 30, 25, size))
    entry = {
        "img": "img/chair/0001.png", "category": "chair", "img_size": [80, 60], "mask": "mask/chair/0001.png",
        "model": "model/chair/ball.obj", "voxel": "model/chair/voxel.mat", "rot_mat": np.eye(3).tolist(),
        "trans_mat": [0.5, 0.3, 2.0], "focal_length": 32.0, "bbox": [10, 5, 30, 25],
    }  # fmt: skip
    from scipy.io import savemat

    grid = np.zeros((3, 5, 7), np.uint8)
    grid[0, 1, 2] = 1
    savemat(root / "model/chair/voxel.mat", {"voxel": grid})
    if change is not None:
        change(entry)
    (root / "pix3d.json").write_text(json.dumps([entry]))


def test_furniture_is_seen_where_it_is_in_the_photograph(tmp_path: Path):
    pix3d(tmp_path)
    data = Pix3D(tmp_path, "all", voxels=True)
    item = data[0]
    assert item["boxes"].tolist() == [[10, 5, 30, 25]]
    assert item["labels"].tolist() == [3]
    assert data.categories[2] == "chair"
    seen = item["camera"].project(item["mesh"].verts_packed())
    middle = (seen.pixels.amin(0) + seen.pixels.amax(0)) / 2
    torch.testing.assert_close(middle, torch.tensor([40 - 20.0, 30 - 12.0]), atol=0.5, rtol=0)  # left and above
    assert float(seen.depth.min()) == pytest.approx(1.8, abs=0.01)
    assert item["voxels"].shape == (7, 5, 3)
    assert bool(item["voxels"][2, 1, 0])
    assert int(item["voxels"].sum()) == 1
    outward = (
        item["mesh"].verts_normals_packed() * (item["mesh"].verts_packed() - torch.tensor([-0.5, -0.3, 2.0]))
    ).sum(1)
    assert bool((outward > 0).all())
    assert data.check() == []
    batch = collate([data[0], data[0] | {"id": "b"}])
    assert len(batch["mesh"]) == 2
    reduced = Pix3D(tmp_path, "all", max_side=40)[0]
    torch.testing.assert_close(
        reduced["camera"].project(reduced["mesh"].verts_packed()).pixels, seen.pixels / 2, atol=1e-3, rtol=0
    )


def test_faults_of_furniture_are_named(tmp_path: Path):
    for change, message in (
        (lambda e: e.update(category="boat"), "category 'boat' is unknown"),
        (lambda e: e.update(bbox=[30, 5, 10, 25]), "is inverted"),
        (lambda e: e.update(bbox=[30, 5, 10]), "a bbox of 4 numbers"),
        (lambda e: e.update(rot_mat=(2 * np.eye(3)).tolist()), "must be a rotation"),
        (lambda e: e.update(focal_length=0), "focal_length must be above 0"),
        (lambda e: e.update(trans_mat=[0, 0, "near"]), "a number that is none"),
        (lambda e: e.update(model="model/no.obj"), r"model/no\.obj does not exist"),
        (lambda e: e.pop("mask"), r"has no \['mask'\]"),
    ):
        pix3d(tmp_path, change)
        with pytest.raises(FileError, match=message):
            Pix3D(tmp_path, "all")
    pix3d(tmp_path, lambda e: e.update(bbox=[50, 5, 70, 25]))
    assert "its mask lies in" in Pix3D(tmp_path, "all").check()[0].reason
    pix3d(tmp_path, lambda e: e.update(trans_mat=[0, 0, 0.1]))
    assert "reaches behind the camera" in Pix3D(tmp_path, "all").check()[0].reason
    (tmp_path / "pix3d.json").write_text("{}")
    with pytest.raises(FileError, match="must be a list"):
        Pix3D(tmp_path, "all")


def test_names_in_the_table():
    for name, kind in (
        ("penn_fudan", PennFudan),
        ("coco_detection", COCODetection),
        ("coco_panoptic", COCOPanoptic),
        ("voc_detection", VOCDetection),
        ("voc_segmentation", VOCSegmentation),
        ("pix3d", Pix3D),
    ):
        assert DATASETS[name] is kind
