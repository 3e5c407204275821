"""Photographs of any size as one batch, and their objects with them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.roi import Canvas, Truth
from vision3dgen.models.reconstruction import IMAGENET_MEAN, IMAGENET_STD
from vision3dgen.ops import clip_boxes_to_image
from vision3dgen.structures import Meshes, check_annotations


class Resizing(nn.Module):
    """Each photograph at the scale that makes its shorter side `shortest`, but its longer one at most `longest` pixels.

    shortest: of several, one is drawn for each photograph in training, and the last used in evaluation. divisor: sides
    of the canvas are multiples of it. mean, std: of each channel, to normalize with. Zeros fill what is left of the
    canvas. Scales and rounding are torchvision's.
    """

    def __init__(
        self, shortest: int | tuple[int, ...] = 800, longest: int = 1333, *, divisor: int = 32,
        mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    ):  # fmt: skip
        super().__init__()
        self.shortest = (shortest,) if isinstance(shortest, int) else tuple(shortest)
        if not self.shortest or not 1 <= min(self.shortest) <= max(self.shortest) <= longest:
            raise ValueError(f"needs 1 <= shortest <= longest, got {shortest} and {longest}")
        self.longest, self.divisor = longest, divisor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"] | Sequence[Tensor],
        intrinsics: Float[Tensor, "B 3 3"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Canvas:
        """Images (3, H_i, W_i) in [0, 1] as a `Canvas`; intrinsics follow them."""
        for index, image in enumerate(images):
            if image.ndim != 3 or len(image) != 3 or not image.numel():
                raise ValueError(f"image {index} must be (3, H, W) with a pixel at least, got {tuple(image.shape)}")
        originals = [(image.shape[1], image.shape[2]) for image in images]
        sizes = [self.size_of(size, generator) for size in originals]
        placed = []
        for image, size in zip(images, sizes):
            normalized = ((image - self.mean) / self.std)[None]
            placed.append(F.interpolate(normalized, size=size, mode="bilinear", align_corners=False)[0])
        sides = [max(size[axis] for size in sizes) for axis in (0, 1)]
        height, width = (-(-side // self.divisor) * self.divisor for side in sides)
        canvas = placed[0].new_zeros(len(placed), 3, height, width)
        for index, image in enumerate(placed):
            canvas[index, :, : image.shape[1], : image.shape[2]] = image
        found = Canvas(canvas, sizes, originals)
        if intrinsics is not None:
            scales = torch.tensor([[*found.scale(index), 1.0] for index in range(len(sizes))])
            intrinsics = scales.to(intrinsics)[:, :, None] * intrinsics
        return found._replace(intrinsics=intrinsics)

    def size_of(self, size: tuple[int, int], generator: torch.Generator | None = None) -> tuple[int, int]:
        """What a photograph (height, width) is resized to; in training drawn where there are several sizes."""
        number = len(self.shortest) - 1
        if self.training and number:
            number = int(torch.randint(len(self.shortest), (), generator=generator))
        # One division in float32, as torchvision's: the last pixel may depend on it.
        short, long = torch.tensor([min(size), max(size)], dtype=torch.float32)
        scale = float(torch.minimum(self.shortest[number] / short, self.longest / long))
        return max(math.floor(size[0] * scale), 1), max(math.floor(size[1] * scale), 1)

    def truths(self, batch: Mapping[str, Any], canvas: Canvas, needs: Sequence[str], classes: int) -> list[Truth]:
        """The objects of a batch on the canvas; ValueError naming image and annotation for what cannot be meant.

        needs: keys beside boxes and labels. Crowds and difficult objects are left out.
        """
        missing = [key for key in ("boxes", "labels", *needs) if key not in batch]
        if missing:
            raise ValueError(f"the loss needs {missing}, the batch has {sorted(batch)}")
        counts = [len(boxes) for boxes in batch["boxes"]]
        meshes: list[Meshes | None] = [None] * len(counts)
        if "mesh" in needs:
            if len(batch["mesh"]) != sum(counts):
                raise ValueError(
                    f"mesh must have one member for each box, {counts} in the images of this batch, got "
                    f"{len(batch['mesh'])}"
                )
            meshes = list(batch["mesh"].split(counts))
        return [
            self._truth(batch, canvas, index, meshes[index], "masks" in needs, classes) for index in range(len(counts))
        ]

    def _truth(
        self, batch: Mapping[str, Any], canvas: Canvas, index: int, meshes: Meshes | None, masked: bool, classes: int
    ) -> Truth:
        boxes, labels = batch["boxes"][index].float(), batch["labels"][index].long()
        masks = batch["masks"][index].bool() if masked else None
        name = str(batch["id"][index]) if "id" in batch else str(index)
        check_annotations(name, canvas.originals[index], boxes, labels, masks, classes=classes)
        kept = torch.ones_like(labels, dtype=torch.bool)
        for flag in ("crowd", "difficult"):
            if flag in batch:
                kept &= ~batch[flag][index].bool()
        rows = kept.nonzero()[:, 0]
        size = canvas.sizes[index]
        boxes = clip_boxes_to_image(canvas.placed(index, boxes[rows]), size)
        if masks is not None:
            masks = masks[rows]
            if len(rows) and tuple(masks.shape[1:]) != size:
                masks = F.interpolate(masks[:, None].float(), size=size)[:, 0] > 0.5
        if meshes is not None:
            behind = meshes.get_bounding_boxes()[:, 2, 0] <= 0
            if bool(behind.any()):
                raise ValueError(
                    f"image {name!r}, annotation {int(behind.nonzero()[0])}: its mesh is not in front of the camera; "
                    "meshes beside boxes are in the camera's frame, z forward"
                )
            meshes = meshes[rows]
        return Truth(boxes, labels[rows], masks, meshes)
