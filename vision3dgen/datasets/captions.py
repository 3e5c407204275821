"""Reader of pictures with captions: a file of JSON lines beside the pictures.

Each line is `{"id": ..., "image": PATH, "captions": [TEXT, ...]}`, paths relative to the file's folder; lines that
`prepare scenes` writes also have "mask", "depth", "camera" and "objects". Which lines train, validate and test is said
by a split manifest in the folder's `splits`, under the key "scenes" or any other.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from vision3dgen.checks import check_choice
from vision3dgen.datasets.drawn import DrawnItems
from vision3dgen.datasets.manifest import SPLITS, members_of
from vision3dgen.datasets.scenes import DEPTH_UNITS, camera_of
from vision3dgen.datasets.vocabulary import Vocabulary, padded
from vision3dgen.files import read_jsonl, safe_join
from vision3dgen.io import read_depth_png, read_image
from vision3dgen.structures import Camera

FIELDS = ("image", "tokens", "objects", "mask", "depth", "camera")


class CaptionedObject(NamedTuple):
    """An object that captions may name."""

    category: str
    color: str
    box: Float[Tensor, "4"]  # xyxy pixels of the item's image


class Captions(DrawnItems):
    """Pictures with their captions.

    root: folder of `file`, of the vocabulary and of `splits`. split: "train", "val", "test", or "all" lines there are.
    fields: which of image (3, H, W), tokens, objects (a list of `CaptionedObject`), mask (1, H, W) of object numbers,
    depth (1, H, W), camera to read; every item has `captions`, all of them, `vocabulary` and `id` besides. `tokens`
    (T,) are those of one caption, drawn from seed, epoch and index, padded to `max_length` (by default that of the
    longest caption of the file). image_size: side to resize to, antialiased; mask and depth take the nearest pixel.
    unknown: whether a word that the vocabulary does not have becomes <unknown> or an error. mirror: turn half of the
    images, drawn like the captions, left to right, and "left" and "right" in what is said of them; for training. cache:
    keep pictures in memory, as bytes.

    Raises ValueError or OSError naming file and line.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        file: str = "scenes.jsonl",
        vocabulary: str = "vocabulary.json",
        fields: Sequence[str] = ("image", "tokens"),
        image_size: int | None = None,
        max_length: int | None = None,
        manifest: str | None = None,
        unknown: Literal["token", "raise"] = "raise",
        mirror: bool = False,
        cache: bool = False,
        seed: int = 0,
    ):
        check_choice("split", split, (*SPLITS, "all"))
        for name in fields:
            check_choice("field", name, FIELDS)
        if mirror and (others := sorted(set(fields) - {"image", "tokens"})):
            raise ValueError(f"mirror turns image and tokens only, the fields {others} were asked for too")
        self.root, self.file = Path(root), Path(root) / file
        self.fields, self.image_size, self.seed = tuple(fields), image_size, seed
        self.mirror = mirror
        if not self.file.is_file():
            raise ValueError(f"{self.file}: no such file; make one with `vision3dgen prepare scenes {root}`")
        self.vocabulary = Vocabulary.load(self.root / vocabulary)
        lines = read_jsonl(self.file)
        if not lines:
            raise ValueError(f"{self.file}: the file has no line")
        encoded = [self._encode(number, line, unknown, max_length) for number, line in enumerate(lines, start=1)]
        self.max_length = max_length or max(len(tokens) for each in encoded for tokens in each)
        members = members_of(self.root, split, manifest)
        chosen = [i for i, line in enumerate(lines) if members is None or line["id"] in members]
        if not chosen:
            raise ValueError(f"{self.file}: no line is in the split {split!r}")
        self.lines = [lines[i] for i in chosen]
        self._encoded = [encoded[i] for i in chosen]
        self._numbers = [i + 1 for i in chosen]
        for i in range(len(self)):
            if not self._path(i, "image").is_file():
                raise ValueError(f"{self._where(i)}: there is no image {self._path(i, 'image')}")
        self._keep = cache
        self._cache: dict[tuple[int, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self.lines)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: a worker process fills its own."""
        return self.__dict__ | {"_cache": {}}

    def _item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        line = self.lines[index]
        said = self._encoded[index][int(rng.integers(len(self._encoded[index])))]
        captions = list(line["captions"])
        turned = self.mirror and rng.random() < 0.5
        if turned:
            captions = [_turn(text) for text in captions]
            said = self.vocabulary.encode(_turn(self.vocabulary.decode(said)))
        item: dict[str, Any] = {}
        for name in self.fields:
            if name == "tokens":
                item["tokens"] = padded(said, self.max_length)
            elif name == "objects":
                item["objects"] = self._objects(index)
            elif name == "camera":
                item["camera"] = self._camera(index)
            else:
                item[name] = self._pixels(index, name).flip(2) if turned else self._pixels(index, name)
        return item | {"captions": captions, "vocabulary": self.vocabulary, "id": line["id"]}

    # ------------------------------------------------------------------------------------------- lines and splits

    def _encode(self, number: int, line: dict[str, Any], unknown: Any, max_length: int | None) -> list[list[int]]:
        where = f"{self.file}, line {number}"
        for key in ("id", "image"):
            if not isinstance(line.get(key), str):
                raise ValueError(f"{where}: {key!r} must be a string, got {line.get(key)!r}")
        said = line.get("captions")
        if not isinstance(said, list) or not said or not all(isinstance(text, str) and text.strip() for text in said):
            raise ValueError(f"{where}: 'captions' must be at least one text that is not empty, got {said!r}")
        try:
            safe_join(self.root, line["image"])
            encoded = [self.vocabulary.encode(text, unknown=unknown) for text in said]
            for tokens in encoded:
                padded(tokens, max_length or len(tokens))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return encoded

    def _where(self, index: int) -> str:
        return f"{self.file}, line {self._numbers[index]}"

    def _path(self, index: int, key: str) -> Path:
        if not isinstance(self.lines[index].get(key), str):
            raise ValueError(f"{self._where(index)}: the field {key!r} was asked for, but the line does not have it")
        return safe_join(self.root, self.lines[index][key])

    # --------------------------------------------------------------------------------------------------- pictures

    def _pixels(self, index: int, name: str) -> Tensor:
        """image (3, H, W) in [0, 1], mask or depth (1, H, W)."""
        pixels = self._cache.get((index, name))
        if pixels is None:
            pixels = self._read(index, name)
            if self._keep:
                self._cache[index, name] = pixels
        return pixels.float() / 255 if name == "image" else pixels.float()

    def _read(self, index: int, name: str) -> Tensor:
        path = self._path(index, name)
        if name == "image":
            pixels = torch.from_numpy(read_image(path, mode="RGB")).permute(2, 0, 1)
        elif name == "mask":
            pixels = torch.from_numpy(read_image(path, mode="L"))[None]
        else:
            pixels = torch.from_numpy(read_depth_png(path, units_per_metre=DEPTH_UNITS))[None]
        size = self.image_size
        if size is None or pixels.shape[1:] == (size, size):
            return pixels
        if name != "image":
            return interpolate(pixels[None].float(), (size, size), mode="nearest-exact")[0].to(pixels.dtype)
        smaller = interpolate(pixels[None].float(), (size, size), mode="bilinear", antialias=True)[0]
        return smaller.round().clamp(0, 255).to(torch.uint8)

    def image_shape(self, index: int) -> tuple[int, int]:
        """(H, W) of a picture as it lies on the disk."""
        size = self.lines[index].get("camera", {}).get("image_size")
        if size is None:
            size = read_image(self._path(index, "image"), mode="RGB").shape[:2]
        return int(size[0]), int(size[1])

    def _objects(self, index: int) -> list[CaptionedObject]:
        height, width = self.image_shape(index)
        scale = torch.ones(4)
        if self.image_size is not None:
            scale = torch.tensor([self.image_size / width, self.image_size / height]).repeat(2)
        found = self.lines[index].get("objects")
        if found is None:
            raise ValueError(f"{self._where(index)}: the field 'objects' was asked for, but the line does not have it")
        return [CaptionedObject(o["category"], o["color"], torch.tensor(o["box"]) * scale) for o in found]

    def _camera(self, index: int) -> Camera:
        found = self.lines[index].get("camera")
        if found is None:
            raise ValueError(f"{self._where(index)}: the field 'camera' was asked for, but the line does not have it")
        camera = camera_of(self.lines[index])
        return camera if self.image_size is None else camera.resize((self.image_size, self.image_size))


def _turn(text: str) -> str:
    """What is true of the mirror image."""
    return re.sub(r"\b(left|right)\b", lambda found: "right" if found[1] == "left" else "left", text)
