"""What the heads of regions share: the canvas they look at, the objects on it, and how each adds what it finds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vision3dgen.structures import Detections, Meshes


class Canvas(NamedTuple):
    """Photographs of any size, resized, normalized and put into the first corner of images of one size."""

    images: Float[Tensor, "B 3 H W"]
    sizes: list[tuple[int, int]]  # height, width of each photograph on it
    originals: list[tuple[int, int]]  # and as it was
    intrinsics: Float[Tensor, "B 3 3"] | None = None  # of each photograph on it, where cameras are known

    def scale(self, index: int) -> tuple[float, float]:
        """What x and y of a photograph are multiplied with on the canvas."""
        (height, width), (before_y, before_x) = self.sizes[index], self.originals[index]
        return width / before_x, height / before_y

    def placed(self, index: int, boxes: Float[Tensor, "N 4"]) -> Float[Tensor, "N 4"]:
        """Boxes of a photograph as they are on the canvas."""
        x, y = self.scale(index)
        return boxes * boxes.new_tensor([x, y, x, y])

    def restored(self, index: int, boxes: Float[Tensor, "N 4"]) -> Float[Tensor, "N 4"]:
        """Boxes of the canvas as they are in the photograph."""
        x, y = self.scale(index)
        return boxes * boxes.new_tensor([1 / x, 1 / y, 1 / x, 1 / y])


class Truth(NamedTuple):
    """The objects of one photograph, on the canvas."""

    boxes: Float[Tensor, "M 4"]
    labels: Int[Tensor, " M"]
    masks: Bool[Tensor, "M H W"] | None = None  # at the photograph's size on the canvas
    meshes: Meshes | None = None  # in the camera's frame


class Samples(NamedTuple):
    """Regions of one photograph that losses are taken on."""

    boxes: Float[Tensor, "R 4"]
    labels: Int[Tensor, " R"]  # 0 is background
    objects: Int[Tensor, " R"]  # the number of each region's object; of background it means nothing

    @property
    def positive(self) -> "Samples":
        """Those with an object."""
        return Samples(*(part[self.labels > 0] for part in self))


class RoIHead(nn.Module, ABC):
    """One thing said of each region. Its networks have published names: `RCNN` lists them one level higher.

    `needs` are keys of the batch that its loss takes beside boxes and labels.
    """

    needs: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Float[Tensor, "_ 4"]]) -> Any:
        """The networks' answer for the regions of each photograph, all in one batch."""

    @abstractmethod
    def loss(
        self, maps: Sequence[Tensor], samples: Sequence[Samples], truths: Sequence[Truth], canvas: Canvas,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Named terms, weighted as published; zeros that keep the graph where there is no object."""

    @abstractmethod
    def find(self, maps: Sequence[Tensor], found: Sequence[Detections], canvas: Canvas) -> list[Detections]:
        """What was found (boxes on the canvas), with what this head knows of it."""


def positives(samples: Sequence[Samples]) -> list[Samples]:
    """The regions with an object, of each photograph."""
    return [own.positive for own in samples]


def of_objects(truths: Sequence[Truth], samples: Sequence[Samples], name: str) -> list[Any]:
    """A field of the truth for each region with an object, by photograph."""
    return [getattr(truth, name)[own.objects] for truth, own in zip(truths, samples)]


def check_classes(heads: Mapping[str, nn.Module]) -> int:
    """The number of categories, which all heads that know one must agree on."""
    counts = {name: getattr(head, "classes", None) for name, head in heads.items()}
    known = {name: count for name, count in counts.items() if isinstance(count, int)}
    if len(set(known.values())) > 1:
        raise ValueError(f"the heads do not speak of as many categories: {known}")
    return next(iter(known.values()))
