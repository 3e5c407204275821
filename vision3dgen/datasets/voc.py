"""PASCAL VOC: photographs of twenty categories with boxes, and with classes by pixel."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np
import torch

from vision3dgen.datasets.photographs import (
    VOID,
    OnError,
    Photographs,
    box_faults,
    clipped,
    division,
    names_in,
    settle,
)
from vision3dgen.datasets.shapenet import Problem
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import read_index_png

VOC_CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PARTS = ("train", "val", "trainval", "test")


class _Annotation(NamedTuple):
    size: tuple[int, int] | None
    names: list[str]
    boxes: np.ndarray
    difficult: np.ndarray


class VOCDetection(Photographs):
    """Objects with boxes: root holds Annotations/ID.xml, JPEGImages/ID.jpg, ImageSets/Main/PART.txt, or VOCYEAR does.

    split: a part ("train", "val", "trainval", "test"), or of one by `fractions`, see `Selection`. Items have
    `difficult`. A file's xmin to xmax are pixels counted from 1, both included: the box reaches from xmin - 1 to xmax,
    and its area and overlaps are those of the development kit. keep: only these categories, numbered in the order
    given. Annotations are read and checked when the dataset is made; on_error: "raise" stops at the first fault, "skip"
    leaves out the object, or the image, see `problems`. For the items see `photographs`.
    Source: Everingham et al., IJCV 2010.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, year: str = "2007", keep: Sequence[str] | None = None,
        max_side: int | None = None, part: str | None = None, fractions: Mapping[str, float] | None = None,
        seed: int = 0, on_error: OnError = "raise",
    ):  # fmt: skip
        self.root = _year_folder(Path(root), year, "Annotations")
        categories = VOC_CATEGORIES if keep is None else tuple(keep)
        if not categories or len(set(categories)) < len(categories) or not set(categories) <= set(VOC_CATEGORIES):
            raise ValueError(f"keep must be different categories of {VOC_CATEGORIES}, got {categories}")
        ids = _listed(self.root / "ImageSets" / "Main", split, part, fractions, seed)
        problems: list[Problem] = []
        self._objects: dict[str, _Annotation] = {}
        for name in ids:
            path = self.root / "Annotations" / f"{name}.xml"
            try:
                if not self._file(name).is_file():
                    raise FileError(f"{self._file(name)} does not exist")
                annotation = read_voc_annotation(path)
            except (FileError, OSError) as error:
                problems.append(Problem(f"image {name}", str(path), str(error), True))
                continue
            sound, faults = _sound(annotation, name, path, categories)
            problems += faults
            self._objects[name] = sound
        settle(problems, on_error, self.root)
        if not self._objects:
            raise FileError(f"{self.root}: split {split!r} has no images")
        super().__init__([f"VOC{year}/{name}" for name in self._objects], categories, max_side)
        self._names, self.problems = list(self._objects), problems

    def _file(self, name: str) -> Path:
        return safe_join(self.root, f"JPEGImages/{name}.jpg")

    def _picture(self, index: int) -> Path:
        return self._file(self._names[index])

    def _size(self, index: int) -> tuple[int, int] | None:
        return self._objects[self._names[index]].size

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        name = self._names[index]
        objects = self._objects[name]
        for fault in box_faults(objects.boxes, size):  # of a file that does not say how large the picture is
            raise FileError(f"{self.root / 'Annotations' / name}.xml: object {fault.row + 1}: {fault.reason}")
        labels = [self.categories.index(each) + 1 for each in objects.names]
        return {
            "boxes": torch.from_numpy(clipped(objects.boxes, size)).float(),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "difficult": torch.from_numpy(objects.difficult),
        }


def _year_folder(root: Path, year: str, inside: str) -> Path:
    for folder in (root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}", root):
        if (folder / inside).is_dir():
            return folder
    raise FileNotFoundError(f"{root}: no {inside} in it or in its VOC{year}")


def _listed(folder: Path, split: str, part: str | None, fractions: Mapping[str, float] | None, seed: int) -> list[str]:
    part, chosen = division(split, PARTS, part, fractions, seed)
    names = names_in(folder / f"{part}.txt")
    return [names[place] for place in chosen(len(names))]


def _sound(
    annotation: _Annotation, name: str, path: Path, categories: Sequence[str]
) -> tuple[_Annotation, list[Problem]]:
    """The sound objects of the categories, and what is wrong with others."""
    problems = []
    reasons: dict[int, str] = {}
    size = annotation.size or (1 << 30, 1 << 30)
    for fault in box_faults(annotation.boxes, size):
        reasons[fault.row] = fault.reason
    for index, title in enumerate(annotation.names):
        if title not in VOC_CATEGORIES:
            reasons[index] = f"category {title!r} is unknown; VOC has {VOC_CATEGORIES}"
    for index, reason in sorted(reasons.items()):
        where = f"image {name}, object {index + 1} ({annotation.names[index]})"
        problems.append(Problem(where, str(path), reason, True))
    kept = [i for i, title in enumerate(annotation.names) if i not in reasons and title in categories]
    return (
        _Annotation(
            annotation.size,
            [annotation.names[i] for i in kept],
            annotation.boxes[kept].reshape(-1, 4),
            annotation.difficult[kept],
        ),
        problems,
    )


def read_voc_annotation(path: Path) -> _Annotation:
    """The objects of an annotation file, boxes by pixel edges.

    Raises FileError naming the file: not XML, a document type (whose entities could fill the memory), no size or
    object where they should be, numbers that are none.
    """
    root = _parse(path)
    size = None
    try:
        if root.find("size") is not None:
            size = (int(_text(root, "size/height")), int(_text(root, "size/width")))
        names, boxes, difficult = [], [], []
        for entry in root.findall("object"):
            names.append(_text(entry, "name").strip())
            x1, y1, x2, y2 = (float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append([x1 - 1, y1 - 1, x2, y2])
            difficult.append(entry.findtext("difficult", "0").strip() == "1")
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
    size = None if size is not None and min(size) < 1 else size  # some files of 2011 have zeros
    return _Annotation(size, names, np.array(boxes).reshape(-1, 4), np.array(difficult, dtype=bool))


def _text(node: ET.Element, name: str) -> str:
    found = node.findtext(name)
    if found is None:
        raise ValueError(f"{node.tag!r} has no {name!r}")
    return found


def _parse(path: Path) -> ET.Element:
    """XML without a document type: nothing is expanded, nothing is fetched."""
    tree = ET.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise FileError(f"{path}: has a document type, which annotations have not")

    parser.StartElementHandler = lambda tag, attributes: tree.start(tag, attributes)
    parser.EndElementHandler = lambda tag: tree.end(tag)
    parser.CharacterDataHandler = tree.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
        return tree.close()
    except expat.ExpatError as error:
        raise FileError(f"{path}: not XML, or cut short: {error}") from error


class VOCSegmentation(Photographs):
    """Classes by pixel: JPEGImages/ID.jpg, SegmentationClass/ID.png with a palette, ImageSets/Segmentation/PART.txt.

    `semantic` has 0 for the background, 1 to 20 for the categories, 255 on their borders. The PNGs' numbers are read,
    not their colors, when an item is asked for; all at once: `check`. For the other arguments see `VOCDetection`.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, year: str = "2012", max_side: int | None = None,
        part: str | None = None, fractions: Mapping[str, float] | None = None, seed: int = 0,
        on_error: OnError = "raise",
    ):  # fmt: skip
        self.root = _year_folder(Path(root), year, "SegmentationClass")
        names = _listed(self.root / "ImageSets" / "Segmentation", split, part, fractions, seed)
        problems: list[Problem] = []
        self._names: list[str] = []
        for name in names:
            files = [
                safe_join(self.root, f"JPEGImages/{name}.jpg"),
                safe_join(self.root, f"SegmentationClass/{name}.png"),
            ]
            absent = [path for path in files if not path.is_file()]
            if absent:
                problems.append(Problem(f"image {name}", str(absent[0]), f"{absent[0]} does not exist", True))
            else:
                self._names.append(name)
        settle(problems, on_error, self.root)
        if not self._names:
            raise FileError(f"{self.root}: split {split!r} has no images")
        super().__init__([f"VOC{year}/{name}" for name in self._names], VOC_CATEGORIES, max_side)
        self.problems = problems

    def _picture(self, index: int) -> Path:
        return self.root / "JPEGImages" / f"{self._names[index]}.jpg"

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path = self.root / "SegmentationClass" / f"{self._names[index]}.png"
        numbers = read_index_png(path, size)
        wrong = np.setdiff1d(numbers, [*range(len(VOC_CATEGORIES) + 1), VOID])
        if len(wrong):
            raise FileError(f"{path}: pixels must be 0 to {len(VOC_CATEGORIES)} or {VOID}, got {wrong.tolist()}")
        return {"semantic": torch.from_numpy(numbers.astype(np.int64))}
