"""COCO: photographs of common objects with boxes and masks, and their panoptic division."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vision3dgen.datasets.photographs import (
    VOID,
    OnError,
    Photographs,
    box_faults,
    clipped,
    division,
    mask_box,
    mask_faults,
    settle,
)
from vision3dgen.datasets.shapenet import Problem
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import read_image, rle_from_coco
from vision3dgen.ops.rle import Rle, decode_rle, rle_boxes

PARTS = ("train", "val", "test")


class _Categories(NamedTuple):
    names: list[str]  # by label, from 1
    labels: dict[int, int]  # of category ids


class _Image(NamedTuple):
    id: int
    file: str
    size: tuple[int, int]


class _Objects(NamedTuple):
    """Of one image, a row each."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: list[Rle]


class COCODetection(Photographs):
    """Objects with boxes and masks: root holds annotations/instances_PARTYEAR.json and the folder PARTYEAR of images.

    split: a part ("train", "val"), or of one by `fractions`, see `Selection`. year: the suffix of files and folders.
    Labels are the categories in the order of their ids, numbered from 1 (COCO's ids have gaps), or those of `keep`, by
    name in that order, without the objects of the others. Images without objects stay. masks: whether items have them;
    they are drawn once when the dataset is made, and kept as run lengths. Everything in the file is checked then:
    on_error: "raise" stops at the first fault, "skip" leaves out the annotation, or the image, see `problems`.
    For the items see `photographs`; `areas` are the annotated ones. Source: Lin et al., ECCV 2014 (arXiv:1405.0312).
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, year: str = "2017", masks: bool = True,
        keep: Sequence[str] | None = None, max_side: int | None = None, part: str | None = None,
        fractions: Mapping[str, float] | None = None, seed: int = 0, on_error: OnError = "raise",
    ):  # fmt: skip
        root = Path(root)
        part, chosen = division(split, PARTS, part, fractions, seed)
        self.path = root / "annotations" / f"instances_{part}{year}.json"
        self.folder, self.masks = root / f"{part}{year}", masks
        content = _read_json(self.path)
        every = _categories(self.path, content["categories"])
        names = _kept(every.names, keep)
        images, problems = _images(self.path, content["images"], self.folder)
        images = [images[place] for place in chosen(len(images))]
        rows, more = _by_image(content["annotations"], {image.id for image in images}, content["images"])
        objects: list[_Objects] = []
        faults: list[Problem] = []
        for image in images:
            found, own = _objects(rows.get(image.id, []), image, every, names, masks)
            objects.append(found)
            faults += own
        problems = settle([*problems, *more, *faults], on_error, self.path)
        self._images, self._objects = images, objects
        if not images:
            raise FileError(f"{self.path}: split {split!r} has no images")
        super().__init__([f"{part}{year}/{Path(image.file).stem}" for image in images], names, max_side)
        self.problems = problems

    def _picture(self, index: int) -> Path:
        return safe_join(self.folder, self._images[index].file)

    def _size(self, index: int) -> tuple[int, int]:
        return self._images[index].size

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        objects = self._objects[index]
        target = _tensors(objects.boxes, objects.labels, objects.crowd, objects.areas)
        return target | ({"masks": decode_rle(objects.masks, size)} if self.masks else {})


def _tensors(boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, areas: np.ndarray) -> dict[str, Any]:
    return {
        "boxes": torch.from_numpy(boxes).float().view(-1, 4),
        "labels": torch.from_numpy(labels.astype(np.int64)),
        "crowd": torch.from_numpy(crowd.astype(bool)),
        "areas": torch.from_numpy(areas).float(),
    }


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise FileError(f"{path}: not JSON, or cut short: {error}") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in lists):
        there = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise FileError(f"{path}: must be an object with the lists {lists}, got {there}")
    return content


def _categories(path: Path, entries: list[Any], order: Any = None) -> _Categories:
    try:
        pairs = [(entry["id"], entry["name"]) for entry in sorted(entries, key=order or (lambda entry: entry["id"]))]
    except (TypeError, KeyError) as error:
        raise FileError(f"{path}: every category needs an id and a name: {error!r}") from error
    twice = [number for number, count in Counter(number for number, _ in pairs).items() if count > 1]
    if twice or not pairs:
        raise FileError(f"{path}: category id {twice[0]} comes twice" if twice else f"{path}: there are no categories")
    return _Categories([name for _, name in pairs], {number: k + 1 for k, (number, _) in enumerate(pairs)})


def _kept(names: Sequence[str], keep: Sequence[str] | None) -> list[str]:
    """The names of the labels: all, or those asked for."""
    if keep is None:
        return list(names)
    if not keep or len(set(keep)) != len(keep) or not set(keep) <= set(names):
        raise ValueError(f"keep must be different categories of {sorted(names)}, got {list(keep)}")
    return list(keep)


def _images(path: Path, entries: list[Any], folder: Path) -> tuple[list[_Image], list[Problem]]:
    """In the order of their ids; those that come twice or have no file are problems."""
    try:
        found = [_Image(e["id"], e["file_name"], (int(e["height"]), int(e["width"]))) for e in entries]
    except (TypeError, KeyError, ValueError) as error:
        raise FileError(f"{path}: every image needs an id, file_name, height and width: {error!r}") from error
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it should hold the images of {path}")
    there = {entry.name for entry in os.scandir(folder)}
    counts = Counter(image.id for image in found)
    images: dict[int, _Image] = {}
    problems = []
    for image in found:
        if counts[image.id] > 1 and image.id in images:
            problems.append(Problem(f"image {image.id}", str(path), f"image id {image.id} comes twice", True))
        elif image.file not in there and not safe_join(folder, image.file).is_file():
            missing = f"{folder / image.file} does not exist"
            problems.append(Problem(f"image {image.id}", str(folder / image.file), missing, True))
        else:
            images[image.id] = image
    return [images[number] for number in sorted(images)], problems


def _by_image(
    annotations: list[Any], chosen: set[int], entries: list[Any]
) -> tuple[dict[int, list[Any]], list[Problem]]:
    """Annotations by image; of those whose image the file does not have, and of ids that come twice, problems."""
    known = {entry["id"] for entry in entries}
    rows: dict[int, list[Any]] = {}
    problems: list[Problem] = []
    seen: set[Any] = set()
    for place, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or "image_id" not in annotation:
            problems.append(Problem(f"annotation at {place}", "", "it has no image_id", True))
            continue
        name, image = _name(annotation, place), annotation["image_id"]
        if image not in known:
            problems.append(Problem(name, "", f"its image {image} is not in the list of images", True))
        elif "id" in annotation and annotation["id"] in seen:
            problems.append(Problem(f"image {image}, {name}", "", "the annotation's id comes twice", True))
        elif image in chosen:
            rows.setdefault(image, []).append((name, annotation))
        seen.add(annotation.get("id"))
    return rows, problems


def _name(annotation: Mapping[str, Any], place: int) -> str:
    return f"annotation {annotation['id']}" if "id" in annotation else f"annotation at {place}"


def _objects(
    rows: list[tuple[str, Any]], image: _Image, every: _Categories, names: Sequence[str], masks: bool
) -> tuple[_Objects, list[Problem]]:
    """The sound annotations of an image, and what is wrong with the others."""
    problems: list[Problem] = []
    kept: list[tuple[np.ndarray, int, bool, float, Rle | None]] = []

    def wrong(name: str, reason: str) -> None:
        problems.append(Problem(f"image {image.id} ({image.file}), {name}", image.file, reason, True))

    for name, annotation in rows:
        category = annotation.get("category_id")
        if category not in every.labels:
            wrong(name, f"category id {category!r} is unknown; the file has {sorted(every.labels)}")
            continue
        title = every.names[every.labels[category] - 1]
        if title not in names:
            continue
        try:
            x, y, width, height = (float(value) for value in annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            wrong(name, f"bbox must be x, y, width, height, got {annotation.get('bbox')!r}")
            continue
        box = np.array([x, y, x + width, y + height])
        faults = box_faults(box[None], image.size)
        if faults:
            wrong(name, faults[0].reason)
            continue
        rle = None
        if masks:
            try:
                rle = rle_from_coco(annotation.get("segmentation"), image.size, name)
            except FileError as error:
                wrong(name, str(error).partition(": ")[2])
                continue
            fault = _disagreement(rle, box)
            if fault:
                wrong(name, fault)
                continue
        area = float(annotation.get("area", width * height))
        kept.append((box, names.index(title) + 1, bool(annotation.get("iscrowd", 0)), area, rle))
    boxes = np.array([each[0] for each in kept]).reshape(-1, 4)
    return (
        _Objects(
            clipped(boxes, image.size),
            np.array([each[1] for each in kept], dtype=np.int64),
            np.array([each[2] for each in kept], dtype=bool),
            np.array([each[3] for each in kept], dtype=np.float64),
            [each[4] for each in kept if each[4] is not None],
        ),
        problems,
    )


def _disagreement(rle: Rle, box: np.ndarray) -> str:
    """What is wrong between a mask and its box, as `mask_faults` says it, "" for nothing."""
    around = rle_boxes([rle])[0].astype(int)
    stamp = np.zeros((1, max(around[3], 1), max(around[2], 1)), dtype=bool)
    stamp[0, around[1] : around[3], around[0] : around[2]] = True
    faults = mask_faults(stamp, box[None])
    return faults[0].reason if faults else ""


class COCOPanoptic(Photographs):
    """Images divided into things and stuff: annotations/panoptic_PARTYEAR.json, the folder of that name, and PARTYEAR.

    The folder of that name holds a PNG for each image: a pixel is the number of its segment, R + 256 G + 65536 B; 0 is
    none. One numbering of classes holds in `labels`, `segment_labels` and `semantic`: things 1 to `things`, then stuff,
    each in the order of the ids. Items have boxes, labels, masks, crowd and areas of the things, `semantic`, and

        panoptic (H, W)   number of the segment, from 1, things first in the order of the boxes; 0 is none
        segment_labels (S,), segment_crowd (S,)   of segment 1, 2, ...

    The file is checked when the dataset is made, a PNG when it is read (all at once: `check`). For the other arguments
    see `COCODetection`. Source: Kirillov et al., CVPR 2019 (arXiv:1801.00868).
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, year: str = "2017", max_side: int | None = None,
        part: str | None = None, fractions: Mapping[str, float] | None = None, seed: int = 0,
        on_error: OnError = "raise",
    ):  # fmt: skip
        root = Path(root)
        part, chosen = division(split, PARTS, part, fractions, seed)
        self.path = root / "annotations" / f"panoptic_{part}{year}.json"
        self.folder, self.divisions = root / f"{part}{year}", self.path.with_suffix("")
        content = _read_json(self.path)
        order = _things_first(self.path, content["categories"])
        every = _categories(self.path, content["categories"], order)
        self.things = sum(bool(entry["isthing"]) for entry in content["categories"])
        images, problems = _images(self.path, content["images"], self.folder)
        images = [images[place] for place in chosen(len(images))]
        wanted = {image.id for image in images}
        rows, more = _by_image(content["annotations"], wanted, content["images"])
        self._images: list[_Image] = []
        self._segments: list[dict[int, dict[str, Any]]] = []
        self._files: list[str] = []
        problems += more
        for image in images:
            own = rows.get(image.id, [])
            where = f"image {image.id} ({image.file})"
            try:
                if len(own) != 1:
                    raise FileError(f"{len(own)} annotations, expected one")
                segments = _segments(own[0][1], image, every)
                path = safe_join(self.divisions, own[0][1]["file_name"])
                if not path.is_file():
                    raise FileError(f"{path} does not exist")
            except (FileError, KeyError, TypeError) as error:
                reason = str(error) if isinstance(error, FileError) else f"the annotation is not whole: {error!r}"
                problems.append(Problem(where, str(self.path), reason, True))
                continue
            self._images.append(image)
            self._segments.append(segments)
            self._files.append(own[0][1]["file_name"])
        settle(problems, on_error, self.path)
        if not self._images:
            raise FileError(f"{self.path}: split {split!r} has no images")
        super().__init__([f"{part}{year}/{Path(image.file).stem}" for image in self._images], every.names, max_side)
        self.problems = problems

    def _picture(self, index: int) -> Path:
        return safe_join(self.folder, self._images[index].file)

    def _size(self, index: int) -> tuple[int, int]:
        return self._images[index].size

    def _target(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path = safe_join(self.divisions, self._files[index])
        colors = read_image(path, size, mode="RGB").astype(np.int64)
        numbers = colors @ np.array([1, 256, 65536])
        segments = self._segments[index]
        ids = list(segments)
        there = set(np.unique(numbers).tolist()) - {0}
        if there != set(ids):
            unknown, absent = sorted(there - set(ids)), sorted(set(ids) - there)
            raise FileError(f"{path}: segments {unknown} are not in {self.path.name}; {absent} have no pixel")
        labels = np.array([segments[number]["label"] for number in ids], dtype=np.int64)
        crowd = np.array([segments[number]["crowd"] for number in ids], dtype=bool)
        panoptic = np.zeros(size, dtype=np.int64)
        for place, number in enumerate(ids):
            panoptic[numbers == number] = place + 1
        semantic = np.concatenate([[VOID], labels])[panoptic]
        count = int((labels <= self.things).sum())
        masks = panoptic[None] == np.arange(1, count + 1)[:, None, None]
        boxes = np.array([segments[number]["box"] for number in ids[:count]]).reshape(-1, 4)
        for fault in mask_faults(masks, boxes):
            raise FileError(f"{path}: segment {ids[fault.row]}: {fault.reason}")
        around = [mask_box(mask) for mask in masks]
        tight = np.array([box for box in around if box is not None]).reshape(-1, 4)
        target = _tensors(tight, labels[:count], crowd[:count], masks.sum((1, 2)).astype(np.float64))
        return target | {
            "masks": torch.from_numpy(masks),
            "semantic": torch.from_numpy(semantic),
            "panoptic": torch.from_numpy(panoptic),
            "segment_labels": torch.from_numpy(labels),
            "segment_crowd": torch.from_numpy(crowd),
        }


def _things_first(path: Path, entries: list[Any]) -> Any:
    if any(not isinstance(entry, dict) or "isthing" not in entry for entry in entries):
        raise FileError(f"{path}: every category of a panoptic file needs isthing")
    return lambda entry: (not entry["isthing"], entry["id"])


def _segments(annotation: Mapping[str, Any], image: _Image, every: _Categories) -> dict[int, dict[str, Any]]:
    """Label, box and crowd of the segments by number, things first; FileError naming the segment."""
    segments: dict[int, dict[str, Any]] = {}
    for entry in annotation["segments_info"]:
        number, category = int(entry["id"]), entry["category_id"]
        if category not in every.labels:
            raise FileError(f"segment {number}: category id {category!r} is unknown")
        if number in segments or number == 0:
            raise FileError(f"segment {number}: " + ("comes twice" if number else "0 is the number of no segment"))
        x, y, width, height = (float(value) for value in entry["bbox"])
        box = np.array([x, y, x + width, y + height])
        for fault in box_faults(box[None], image.size):
            raise FileError(f"segment {number}: {fault.reason}")
        segments[number] = {"label": every.labels[category], "box": box, "crowd": bool(entry.get("iscrowd", 0))}
    return dict(sorted(segments.items(), key=lambda pair: pair[1]["label"]))
