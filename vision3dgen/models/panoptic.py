"""Panoptic feature pyramid network: a Mask R-CNN and a class for every pixel, on one pyramid.

Source: Kirillov et al. 2019 (arXiv:1901.02446).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.backbones import Backbone
from vision3dgen.heads.assigner import Assigner, BalancedSampler
from vision3dgen.heads.panoptic import PanopticMerging
from vision3dgen.heads.roi import Canvas, RoIHead
from vision3dgen.heads.rpn import RPN
from vision3dgen.heads.segmentation import VOID, SemanticHead, check_semantic, pixel_cross_entropy
from vision3dgen.models.rcnn import ASSIGNER, RCNN, SAMPLER, Resized, mask_rcnn
from vision3dgen.models.segmentation import image_miou
from vision3dgen.structures import PanopticSegments

MERGING = PanopticMerging()


class PanopticFPN(nn.Module):
    """`detector` finds things, `semantic` says what stuff a pixel is, `merging` makes one map of both.

    Classes 1 to T are the detector's, T + 1 on are stuff; `semantic` tells stuff k as its class k, and every thing as
    its class 0, so it has one class more than there is stuff. weight: of its loss beside the detector's.
    """

    parts = ("model",)
    takes = "image"

    def __init__(
        self, detector: RCNN, semantic: SemanticHead, *, merging: PanopticMerging = MERGING, weight: float = 0.5
    ):
        super().__init__()
        if "mask" not in detector.heads:
            raise ValueError(f'the detector must have a head "mask", it has {sorted(detector.heads)}')
        self.detector, self.semantic = detector, semantic
        self.merging, self.weight = merging, weight

    @property
    def things(self) -> int:
        """How many classes are things."""
        return self.detector.classes

    def loss(
        self, batch: Mapping[str, Any], part: str = "model", generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The detector's terms, "semantic", and "loss"."""
        targets = self._checked(batch)
        detector = self.detector
        canvas = detector.resizing(batch["image"], None, generator)
        truths = detector.resizing.truths(batch, canvas, detector.needs, detector.classes)
        maps = detector.backbone(canvas.images)
        terms = detector.losses(maps, canvas, truths, batch.get("proposals"), generator)
        height, width = canvas.images.shape[-2:]
        logits = self.semantic(maps, (height, width))
        semantic = pixel_cross_entropy(logits, self._on_canvas(targets, canvas))
        return {**terms, "loss": terms["loss"] + self.weight * semantic, "semantic": semantic}

    def _checked(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Class maps in the numbers of `semantic`."""
        if "semantic" not in batch:
            raise ValueError(f"the loss needs 'semantic', the batch has {sorted(batch)}: add it to the data's fields")
        targets = []
        for index, (image, target) in enumerate(zip(batch["image"], batch["semantic"])):
            name = str(batch["id"][index]) if "id" in batch else str(index)
            size = (image.shape[-2], image.shape[-1])
            check_semantic(target, size, self.things + self.semantic.classes, name)
            targets.append(torch.where(target == VOID, VOID, (target - self.things).clamp(min=0)).long())
        return targets

    @staticmethod
    def _on_canvas(targets: list[Tensor], canvas: Canvas) -> Int[Tensor, "B H W"]:
        placed = torch.full(
            (len(targets), *canvas.images.shape[-2:]), VOID, dtype=torch.int64, device=canvas.images.device
        )
        for index, (target, (height, width)) in enumerate(zip(targets, canvas.sizes)):
            resized = F.interpolate(target[None, None].float(), (height, width), mode="nearest-exact")
            placed[index, :height, :width] = resized[0, 0].long()
        return placed

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> list[PanopticSegments]:
        """The segments of each image."""
        detector = self.detector
        canvas = detector.resizing(batch["image"])
        maps = detector.backbone(canvas.images)
        found = detector.find(maps, canvas, batch.get("proposals"))
        stuff = self._stuff(self.semantic(maps, (canvas.images.shape[-2], canvas.images.shape[-1])), canvas)
        return [self.merging(own, classes) for own, classes in zip(found, stuff)]

    def _stuff(self, logits: Float[Tensor, "B K H W"], canvas: Canvas) -> list[Int[Tensor, "_ _"]]:
        """The class of each pixel of the images as they came, in panoptic numbers, 0 for a thing."""
        maps = []
        for own, (height, width), size in zip(logits, canvas.sizes, canvas.originals):
            resized = F.interpolate(own[None, :, :height, :width], size, mode="bilinear", align_corners=False)
            classes = resized[0].argmax(0)
            maps.append(torch.where(classes > 0, classes + self.things, 0))
        return maps

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per image (B,): the loss, the batch's mean for each, and "miou" of the classes of its pixels.

        Pixels of no segment are wrong.
        """
        loss = self.loss(batch, generator=torch.Generator().manual_seed(0))["loss"]
        scores = []
        for own, target in zip(self.predict(batch), batch["semantic"]):
            asked = target != VOID
            scores.append(image_miou(own.semantic()[asked], target[asked]))
        return {"loss": loss.expand(len(scores)), "miou": torch.stack(scores)}


def panoptic_fpn(
    backbone: Backbone, rpn: RPN, box: RoIHead, mask: RoIHead, semantic: SemanticHead, *, resizing: Resized = None,
    assigner: Assigner = ASSIGNER, sampler: BalancedSampler = SAMPLER, merging: PanopticMerging = MERGING,
    weight: float = 0.5,
) -> PanopticFPN:  # fmt: skip
    """A panoptic network of parts: those of `mask_rcnn`, and a head for stuff."""
    detector = mask_rcnn(backbone, rpn, box, mask, resizing=resizing, assigner=assigner, sampler=sampler)
    return PanopticFPN(detector, semantic, merging=merging, weight=weight)
