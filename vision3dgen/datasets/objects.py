"""Objects cut out of scenes, one by one: what a captioner's backbone can learn to recognize first."""

from typing import Any

import torch

from vision3dgen.datasets.captions import Captions
from vision3dgen.datasets.procedural import CATEGORIES


class SceneObjects(torch.utils.data.Dataset[dict[str, Any]]):
    """Windows of `size` x `size` pixels around the objects of prepared scenes.

    The scale is that of the scene; a window that would leave the picture is moved inside. For root, split, manifest and
    cache see `Captions`. Items: `image` (3, size, size) in [0, 1], `label` (number of the category in `classes`),
    `category`, and `id` "scene/object". Raises ValueError naming the file for windows larger than the pictures.
    """

    classes = tuple(CATEGORIES.values())

    def __init__(
        self, root: str, split: str, *, size: int = 48, file: str = "scenes.jsonl", manifest: str | None = None,
        cache: bool = False,
    ):  # fmt: skip
        self.size = size
        self.scenes = Captions(root, split, file=file, manifest=manifest, fields=("image", "objects"), cache=cache)
        smallest = min(self.scenes.image_shape(i)[axis] for i in range(len(self.scenes)) for axis in (0, 1))
        if not 1 <= size <= smallest:
            raise ValueError(f"{self.scenes.file}: size must be from 1 to {smallest}, the pictures' side, got {size}")
        self.items = [(i, k) for i, line in enumerate(self.scenes.lines) for k in range(len(line["objects"]))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, number = self.items[index]
        item = self.scenes[scene]
        image, one = item["image"], item["objects"][number]
        corner = (one.box[:2] + one.box[2:] - self.size) / 2
        left, top = (
            int(min(max(float(start), 0), side - self.size)) for start, side in zip(corner, image.shape[:0:-1])
        )
        return {
            "image": image[:, top : top + self.size, left : left + self.size],
            "label": torch.tensor(self.classes.index(one.category)),
            "category": one.category,
            "id": f"{item['id']}/{number}",
        }
