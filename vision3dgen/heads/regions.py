"""Regions that nobody learned to propose: windows, selective search, edge boxes, in the place of an `RPN`.

Source: Girshick et al. 2014, R-CNN (arXiv:1311.2524), takes selective search's; what each is, `ops` says.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.heads.roi import Canvas, Truth
from vision3dgen.ops import EdgeBoxes, edge_boxes, selective_search, sliding_windows
from vision3dgen.structures import Detections

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Regions(nn.Module, ABC):
    """Regions of each photograph on a canvas, found from its pixels alone; their losses are none.

    count: the most of an image in training and evaluation. kept: of how many photographs the regions are remembered,
    as looking again takes longer than a step: they are known by their pixels, so an augmented one is another. mean,
    std: what the canvas was normalized with, as in `Resizing`.
    """

    def __init__(
        self, *, count: tuple[int, int] = (2000, 2000), kept: int = 10_000,
        mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    ):  # fmt: skip
        super().__init__()
        if min(count) < 1 or kept < 0:
            raise ValueError(f"count must be at least 1 and kept at least 0, got {count} and {kept}")
        self.count, self.kept = tuple(count), kept
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._known: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    @abstractmethod
    def find(self, image: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
        """Boxes of an image in [0, 1], likely ones first, and scores from 0 to 1 that fall."""

    @torch.no_grad()
    def forward(self, maps: Sequence[Tensor], canvas: Canvas) -> list[Detections]:
        most = self.count[0 if self.training else 1]
        found = []
        for image, (height, width) in zip(canvas.images, canvas.sizes):
            boxes, scores = self._remembered(image[:, :height, :width])
            boxes, scores = boxes[:most].to(image.device), scores[:most].to(image.device)
            found.append(Detections(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64, device=image.device)))
        return found

    def _remembered(self, image: Float[Tensor, "3 H W"]) -> tuple[Tensor, Tensor]:
        levels = ((image * self.std + self.mean).clamp(0, 1) * 255).round().byte().cpu().contiguous()
        key = hashlib.sha256(repr(tuple(levels.shape)).encode() + levels.numpy().tobytes()).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        found = self.find(levels.float() / 255)
        if self.kept:
            self._known[key] = found
            if len(self._known) > self.kept:
                self._known.popitem(last=False)
        return found

    def propose(self, answers: list[Detections], canvas: Canvas) -> list[Detections]:
        """What `forward` found."""
        return answers

    def loss(
        self, answers: list[Detections], truths: Sequence[Truth], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Nothing: there is nothing to learn."""
        return {}


class WindowRegions(Regions):
    """Every window of a grid, see `ops.sliding_windows`: all of the same score."""

    def __init__(
        self, *, sides: Sequence[float] = (32, 64, 128, 256), ratios: Sequence[float] = (0.5, 1.0, 2.0),
        overlap: float = 0.5, count: tuple[int, int] = (10_000, 10_000), mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):  # fmt: skip
        super().__init__(count=count, kept=0, mean=mean, std=std)
        self.sides, self.ratios, self.overlap = tuple(sides), tuple(ratios), overlap

    def find(self, image: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
        size = (image.shape[1], image.shape[2])
        boxes = sliding_windows(size, sides=self.sides, ratios=self.ratios, overlap=self.overlap)
        return boxes, torch.ones(len(boxes))


class SelectiveSearchRegions(Regions):
    """Boxes of regions joined by similarity, see `ops.selective_search`."""

    def __init__(
        self, *, scales: Sequence[float] = (50.0, 100.0), spaces: Sequence[str] = ("hsv", "lab"), smallest: int = 20,
        count: tuple[int, int] = (2000, 2000), kept: int = 10_000, mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):  # fmt: skip
        super().__init__(count=count, kept=kept, mean=mean, std=std)
        self.scales, self.spaces, self.smallest = tuple(scales), tuple(spaces), smallest

    def find(self, image: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
        boxes = selective_search(image, scales=self.scales, spaces=self.spaces, smallest=self.smallest)
        return boxes, 1 / torch.arange(1, len(boxes) + 1)


class EdgeRegions(Regions):
    """Windows that hold contours whole, see `ops.edge_boxes`."""

    def __init__(
        self, *, method: EdgeBoxes | None = None, overlap: float = 0.75, count: tuple[int, int] = (1000, 1000),
        kept: int = 10_000, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    ):  # fmt: skip
        super().__init__(count=count, kept=kept, mean=mean, std=std)
        self.method, self.overlap = method or EdgeBoxes(), overlap

    def find(self, image: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
        boxes, scores = edge_boxes(image, method=self.method, overlap=self.overlap, count=max(self.count))
        return boxes, scores / scores.max() if len(scores) else scores
