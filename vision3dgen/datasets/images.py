"""Pictures with one class each, read in the layouts they are published in: idx, CIFAR's binary records, folders, lists.

Items are {"image": (C, H, W) in [0, 1], "label": int64 scalar, "category": name of the class, "id": its origin}.
Nothing is unpickled. Every fault of a file is a FileError that names it.
"""

import gzip
import math
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_zeros

from vision3dgen.checks import check_choice
from vision3dgen.engine import split as divide
from vision3dgen.files import FileError
from vision3dgen.io import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class Selection(NamedTuple):
    """Which items of the published data a dataset has.

    Without `fractions` a split is a published part, as it is. `fractions`, such as {train: 0.9, val: 0.1}, divide the
    published "train" at random by `seed`, or another `part`; a split they do not name is a published part still, unless
    `part` is given. A fraction may have any name: {train: 0.1, unused: 0.9} trains on a tenth. `keep` leaves only these
    classes, numbers in the published order, and numbers them anew in the order given.
    """

    part: str | None = None
    fractions: Mapping[str, float] | None = None
    keep: Sequence[int] | None = None
    seed: int = 0

    def part_of(self, split: str, parts: Sequence[str]) -> str:
        """The published part that a split is, or is cut from."""
        if self.part is not None:
            check_choice("part", self.part, parts)
        if self.fractions is not None and (split in self.fractions or self.part is not None):
            check_choice("split", split, self.fractions)
            return self.part or "train"
        if split not in parts:
            raise ValueError(
                f"there is no published split {split!r}, only {sorted(parts)}: divide one by fractions, such as "
                "fractions={train: 0.9, val: 0.1}"
            )
        if self.part not in (None, split):
            raise ValueError(f"part {self.part!r} needs fractions that say which share of it is {split!r}")
        return split

    def indices(self, split: str, count: int) -> list[int]:
        """Which of the `count` items of the part belong to a split, ascending."""
        if self.fractions is None or split not in self.fractions:
            return list(range(count))
        return divide(count, self.fractions, self.seed)[split]


class Classification(torch.utils.data.Dataset[dict[str, Any]], ABC):
    """Pictures with labels: `classes` are the names by label, `labels` (N,) are those of the items.

    A subclass hands over all labels of a published part, and reads a picture of it by its place there.
    """

    def __init__(
        self, source: str | os.PathLike[str], split: str, labels: Tensor, classes: Sequence[str], selection: Selection
    ):
        """source: the file or folder to name where nothing is left; labels (M,): of all items of the part."""
        places = torch.tensor(selection.indices(split, len(labels)), dtype=torch.int64)
        labels = labels[places]
        self.classes = list(classes)
        if selection.keep is not None:
            keep = list(selection.keep)
            if len(set(keep)) != len(keep) or not keep or not set(keep) <= set(range(len(classes))):
                raise ValueError(f"keep must be different classes of 0 to {len(classes) - 1}, got {keep}")
            renumbered = torch.full((len(classes),), -1)
            renumbered[torch.tensor(keep)] = torch.arange(len(keep))
            labels = renumbered[labels]
            places, labels = places[labels >= 0], labels[labels >= 0]
            self.classes = [classes[index] for index in keep]
        if not len(places):
            raise ValueError(f"{source}: split {split!r} has no items")
        self.places, self.labels = places, labels  # kept as tensors: a list of a million numbers is copied by workers

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        place, label = int(self.places[index]), self.labels[index]
        return {
            "image": self._image(place),
            "label": label.clone(),
            "category": self.classes[int(label)],
            "id": self._id(place),
        }

    @abstractmethod
    def _image(self, place: int) -> Float[Tensor, "C H W"]:
        """The picture at a place of the published part, in [0, 1]."""

    @abstractmethod
    def _id(self, place: int) -> str:
        """Where it comes from, unique over all parts."""


class _InMemory(Classification):
    """Pictures of one size, all in memory as bytes (M, C, H, W), cut out of a frame of `pad` zeros at random."""

    def __init__(
        self, source: str | os.PathLike[str], split: str, part: str, pixels: np.ndarray, labels: np.ndarray,
        classes: Sequence[str], selection: Selection, pad: int,
    ):  # fmt: skip
        if pad < 0:
            raise ValueError(f"pad must be at least 0 pixels, got {pad}")
        super().__init__(source, split, torch.from_numpy(labels.astype(np.int64)), classes, selection)
        self._pixels, self._part, self.pad = torch.from_numpy(pixels), part, pad

    def _image(self, place: int) -> Float[Tensor, "C H W"]:
        image = self._pixels[place].float() / 255
        if not self.pad:
            return image
        top, left = torch.randint(2 * self.pad + 1, (2,)).tolist()  # the trainer seeds each sample
        framed = pad_zeros(image, (self.pad,) * 4)
        return framed[:, top : top + image.shape[1], left : left + image.shape[2]]

    def _id(self, place: int) -> str:
        return f"{self._part}/{place:05d}"


# ---------------------------------------------------------------------------------------------------------- idx

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an idx file, gzipped or not: bytes 0, 0, type, number of axes; the axes as big-endian int32; values.

    Raises FileError naming the file: wrong magic number, damaged gzip, fewer or more bytes than the header says.
    Source: LeCun, Cortes and Burges, "The MNIST database", file formats.
    """
    path = Path(path)
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            with gzip.GzipFile(fileobj=raw) if packed else raw as file:
                magic = file.read(4)
                if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not magic[3]:
                    raise FileError(
                        f"{path}: not an idx file, it starts with the bytes {magic.hex(' ') or '(none)'}; expected "
                        "00 00, a type of 08, 09, 0b, 0c, 0d or 0e, and the number of axes"
                    )
                sizes = file.read(4 * magic[3])
                if len(sizes) < 4 * magic[3]:
                    raise FileError(f"{path}: cut short within the header, which announces {magic[3]} axes")
                shape = struct.unpack(f">{magic[3]}I", sizes)
                kind = np.dtype(_IDX_TYPES[magic[2]])
                expected = math.prod(shape) * kind.itemsize
                data = _read_at_most(file, expected + 1)  # not more: a few packed bytes could fill the memory
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileError(f"{path}: damaged or cut short gzip, {error}") from error
    if len(data) != expected:
        found = f"{len(data)}" if len(data) < expected else "more"
        raise FileError(f"{path}: the header says {shape}, which is {expected} bytes of values, the file has {found}")
    try:
        return np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("="))
    except ValueError as error:  # an axis of 0, and others too long for any array
        raise FileError(f"{path}: the header says {shape}: {error}") from error


def _read_at_most(file: Any, count: int) -> bytes:
    """Up to `count` bytes, in pieces: a header that promises terabytes must not reserve them."""
    pieces = []
    while count and (piece := file.read(min(count, 1 << 24))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


_MNIST_FILES = {"train": "train", "test": "t10k"}
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


BINARIZATIONS = ("threshold", "dynamic", "static")


class MNIST(_InMemory):
    """Handwritten digits, 1 x 28 x 28: root holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, gzipped or not.

    Published parts: "train" (60,000) and "test" (10,000). pad: zeros around each picture, out of which it is cut at a
    random place (give it to the training split only). binarize: pixels 0 and 1, by "threshold" at one half, or drawn
    with the gray value as the probability of 1, anew at each look ("dynamic", for training) or once and for all by
    place and seed ("static"). Likelihoods under the three are not comparable. For the rest see `Selection`.
    Source: Salakhutdinov and Murray 2008 (dynamic). Differs: the file of Larochelle and Murray 2011, the usual static
    draw, is another one.
    """

    names: Sequence[str] = [str(digit) for digit in range(10)]

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, part: str | None = None,
        fractions: Mapping[str, float] | None = None, keep: Sequence[int] | None = None, seed: int = 0, pad: int = 0,
        binarize: str | None = None,
    ):  # fmt: skip
        if binarize is not None:
            check_choice("binarize", binarize, BINARIZATIONS)
        self.binarize, self.seed = binarize, seed
        selection = Selection(part, fractions, keep, seed)
        part = selection.part_of(split, list(_MNIST_FILES))
        prefix = _MNIST_FILES[part]
        image_path = _packed_or_not(Path(root), f"{prefix}-images-idx3-ubyte")
        label_path = _packed_or_not(Path(root), f"{prefix}-labels-idx1-ubyte")
        pixels, labels = read_idx(image_path), read_idx(label_path)
        if pixels.ndim != 3 or pixels.dtype != np.uint8:
            raise FileError(f"{image_path}: images must be (N, H, W) of bytes, got {pixels.shape} of {pixels.dtype}")
        if labels.ndim != 1 or labels.dtype != np.uint8:
            raise FileError(f"{label_path}: labels must be (N,) bytes, got {labels.shape} of {labels.dtype}")
        if len(pixels) != len(labels):
            raise FileError(f"{image_path} has {len(pixels)} images, but {label_path} has {len(labels)} labels")
        _check_labels(label_path, labels, len(self.names))
        super().__init__(image_path, split, part, pixels[:, None], labels, self.names, selection, pad)

    def _image(self, place: int) -> Float[Tensor, "C H W"]:
        image = super()._image(place)
        if self.binarize is None:
            return image
        if self.binarize == "threshold":
            return (image >= 0.5).float()
        own = (
            None
            if self.binarize == "dynamic"
            else torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {place}".encode()))
        )
        return (torch.rand(image.shape, generator=own) < image).float()


class FashionMNIST(MNIST):
    """Pictures of clothes in the files and the numbers of MNIST. Source: Xiao et al. 2017 (arXiv:1708.07747)."""

    names = FASHION


def _packed_or_not(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; it should hold {name} or {name}.gz")
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    found = sorted(entry.name for entry in root.iterdir())[:10]
    raise FileNotFoundError(f"{root / name}: no such file, nor {name}.gz; the folder has {found or 'nothing'}")


def _check_labels(path: Path, labels: np.ndarray, classes: int, what: str = "label") -> None:
    if len(labels) and labels.max() >= classes:
        index = int((labels >= classes).argmax())
        raise FileError(
            f"{path}: {what} {labels[index]} of item {index} is out of range, it must be 0 to {classes - 1}"
        )


# -------------------------------------------------------------------------------------------------------- CIFAR


class CIFAR10(_InMemory):
    """Small photographs, 3 x 32 x 32: root is, or holds, the folder cifar-10-batches-bin of the binary version.

    Published parts: "train" (50,000) and "test" (10,000). For the rest see `MNIST` and `Selection`.
    Source: Krizhevsky 2009; a record is the label in a byte and 3,072 bytes, red, green and blue plane, row by row.
    """

    folder = "cifar-10-batches-bin"
    files: Mapping[str, Sequence[str]] = {
        "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
        "test": ["test_batch.bin"],
    }
    records: Mapping[str, int] = {"train": 10_000, "test": 10_000}  # in each file
    label_bytes: Sequence[str] = ("label",)
    name_files: Sequence[tuple[str, int]] = (("batches.meta.txt", 10),)
    pickled = "data_batch_1"  # of the Python version

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, part: str | None = None,
        fractions: Mapping[str, float] | None = None, keep: Sequence[int] | None = None, seed: int = 0, pad: int = 0,
    ):  # fmt: skip
        self._read(root, split, Selection(part, fractions, keep, seed), pad, column=0)

    def _read(self, root: str | os.PathLike[str], split: str, selection: Selection, pad: int, *, column: int) -> None:
        """Read the part that holds `split`, labelled by the byte number `column` of each record."""
        part = selection.part_of(split, list(self.files))
        folder = Path(root) / self.folder if (Path(root) / self.folder).is_dir() else Path(root)
        name_file, count = self.name_files[column]
        classes = _read_names(self._expected(folder, name_file), count)
        pieces = []
        for name in self.files[part]:
            path = self._expected(folder, name)
            records = _read_records(path, len(self.label_bytes) + 3 * 32 * 32, self.records[part])
            for place, (what, (_, limit)) in enumerate(zip(self.label_bytes, self.name_files)):
                _check_labels(path, records[:, place], limit, what)
            pieces.append(records)
        data = np.concatenate(pieces)
        pixels = np.ascontiguousarray(data[:, len(self.label_bytes) :].reshape(-1, 3, 32, 32))
        super().__init__(folder, split, part, pixels, data[:, column], classes, selection, pad)

    def _expected(self, folder: Path, name: str) -> Path:
        path = folder / name
        if path.is_file():
            return path
        hint = f"; {self.pickled} is of the Python version, which is not read because it is a pickle"
        hint = hint if any((place / self.pickled).is_file() for place in (folder, *_folders(folder))) else ""
        raise FileNotFoundError(f"{path}: no such file of the binary version of {type(self).__name__}{hint}")


class CIFAR100(CIFAR10):
    """Small photographs of 100 classes: root is, or holds, the folder cifar-100-binary of the binary version.

    labels: "fine", the 100 classes, or "coarse", their 20 groups. A record begins with the coarse label.
    """

    folder = "cifar-100-binary"
    files: Mapping[str, Sequence[str]] = {"train": ["train.bin"], "test": ["test.bin"]}
    records: Mapping[str, int] = {"train": 50_000, "test": 10_000}
    label_bytes = ("coarse label", "fine label")
    name_files = (("coarse_label_names.txt", 20), ("fine_label_names.txt", 100))
    pickled = "train"

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, labels: str = "fine", part: str | None = None,
        fractions: Mapping[str, float] | None = None, keep: Sequence[int] | None = None, seed: int = 0, pad: int = 0,
    ):  # fmt: skip
        check_choice("labels", labels, ("coarse", "fine"))
        self._read(root, split, Selection(part, fractions, keep, seed), pad, column=int(labels == "fine"))


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir()] if folder.is_dir() else []


def _read_records(path: Path, size: int, expected: int) -> np.ndarray:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if len(data) != expected * size:
        raise FileError(
            f"{path}: must be {expected} records of {size} bytes, which is {expected * size}, the file has {len(data)}"
        )
    return data.reshape(expected, size)


def _read_names(path: Path, count: int) -> list[str]:
    names = path.read_text(encoding="utf-8").split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise FileError(f"{path}: must name {count} classes, a line each, got {len(names)}")
    return names


# -------------------------------------------------------------------------------------------- folders and lists


class _Files(Classification):
    """Pictures in files, brought to one size when `image_size` is given."""

    def __init__(
        self, root: Path, split: str, paths: list[str], labels: list[int], classes: Sequence[str],
        selection: Selection, image_size: int | None,
    ):  # fmt: skip
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 or None, got {image_size}")
        super().__init__(root, split, torch.tensor(labels, dtype=torch.int64), classes, selection)
        self.root, self.image_size = root, image_size
        self._paths = np.array(paths)  # one block of memory

    def _image(self, place: int) -> Float[Tensor, "C H W"]:
        picture = torch.from_numpy(read_image(self.root / self._id(place), mode="RGB")).permute(2, 0, 1).float() / 255
        return picture if self.image_size is None else resize_crop(picture, self.image_size)

    def _id(self, place: int) -> str:
        return str(self._paths[place])


class ImageFolder(_Files):
    """A folder per class, as ImageNet and Places365 are unpacked: root/SPLIT/CLASS/picture, or root/CLASS/picture.

    With folders train, val or test in root these are the published parts, else all of root is the part "train". Classes
    are the names of the folders, sorted, and those of "train" hold for all parts. Files that do not end like a picture
    (`SUFFIXES`) are left out. image_size: side of the square that pictures are resized and cut to (`resize_crop`), None
    for as they are. Pictures are read as RGB, when they are asked for. For the rest see `Selection`.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, image_size: int | None = None, part: str | None = None,
        fractions: Mapping[str, float] | None = None, keep: Sequence[int] | None = None, seed: int = 0,
    ):  # fmt: skip
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; it should hold a folder for each class")
        parts = [name for name in ("train", "val", "test") if (root / name).is_dir()]
        selection = Selection(part, fractions, keep, seed)
        part = selection.part_of(split, parts or ["train"])
        folder = root / part if parts else root
        classes = _class_folders(root / "train" if "train" in parts else folder)
        unknown = sorted(set(_class_folders(folder)) - set(classes))
        if unknown:
            raise FileError(f"{folder / unknown[0]}: the class {unknown[0]!r} is not in {root / 'train'}")
        paths, labels = [], []
        for label, name in enumerate(classes):
            if not (folder / name).is_dir():
                continue  # a part without pictures of a class
            found = sorted(e.name for e in os.scandir(folder / name) if e.name.lower().endswith(SUFFIXES))
            if not found:
                raise FileError(f"{folder / name}: no picture of this class, that is, no file ending in {SUFFIXES}")
            paths += [f"{part}/{name}/{file}" if parts else f"{name}/{file}" for file in found]
            labels += [label] * len(found)
        super().__init__(root, split, paths, labels, classes, selection, image_size)


class ImageList(_Files):
    """Pictures named in a text file per part, a relative path and a label in each line, as Places365 publishes them.

    lists: the file of each part, such as {train: places365_train_standard.txt, val: places365_val.txt}. categories: a
    file with the name and the number of a class in each line (categories_places365.txt), numbered 0, 1, ... in any
    order. These files and the paths in them are relative to root; a leading slash in a list is ignored. For the rest
    see `ImageFolder`.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, lists: Mapping[str, str], categories: str,
        image_size: int | None = None, part: str | None = None, fractions: Mapping[str, float] | None = None,
        keep: Sequence[int] | None = None, seed: int = 0,
    ):  # fmt: skip
        root = Path(root)
        selection = Selection(part, fractions, keep, seed)
        part = selection.part_of(split, list(lists))
        names = _read_pairs(root / categories)
        numbers = [number for _, number in names]
        if sorted(numbers) != list(range(len(numbers))):
            raise FileError(f"{root / categories}: the classes must be numbered 0 to {len(numbers) - 1}, each once")
        classes = [name for name, _ in sorted(names, key=lambda pair: pair[1])]
        pairs = _read_pairs(root / lists[part])
        _check_labels(root / lists[part], np.array([label for _, label in pairs]), len(classes))
        paths = [path.lstrip("/") for path, _ in pairs]
        for line, path in enumerate(paths, start=1):
            if ".." in PurePosixPath(path).parts:
                raise FileError(f"{root / lists[part]}, line {line}: {path!r} must not contain '..'")
        super().__init__(root, split, paths, [label for _, label in pairs], classes, selection, image_size)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise FileError(f"{folder}: no folder in it; each class should have one")
    return names


def _read_pairs(path: Path) -> list[tuple[str, int]]:
    """Lines of a path and a number that is not negative."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise FileError(f"{path}, line {number}: must be a path, a space and the number of a class, got {line!r}")
        pairs.append((name.strip(), int(label)))
    if not pairs:
        raise FileError(f"{path}: the list is empty")
    return pairs


def resize_crop(image: Float[Tensor, "C H W"], size: int) -> Float[Tensor, "C S S"]:
    """The middle square of a picture, resized to `size` pixels a side, antialiased.

    Differs: the common protocol for ImageNet brings the shorter side to 256 and keeps 224 of it; this keeps all of it.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square
    return interpolate(square[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
