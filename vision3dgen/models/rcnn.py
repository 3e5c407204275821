"""Detectors of regions: a backbone, where objects may be, and heads that each say one thing of a region.

Source: Girshick et al. 2014, R-CNN (arXiv:1311.2524); Girshick 2015, Fast R-CNN (arXiv:1504.08083); Ren et al. 2015,
Faster R-CNN (arXiv:1506.01497); He et al. 2017, Mask R-CNN (arXiv:1703.06870); Gkioxari et al. 2019, Mesh R-CNN
(arXiv:1906.02739). With a ResNet-50 pyramid, parameter names and shapes, and what comes out, are those of torchvision's
fasterrcnn_resnet50_fpn and maskrcnn_resnet50_fpn.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.backbones import Backbone
from vision3dgen.config import Named
from vision3dgen.heads.assigner import Assigner, BalancedSampler
from vision3dgen.heads.regions import Regions
from vision3dgen.heads.roi import Canvas, RoIHead, Samples, Truth, check_classes
from vision3dgen.heads.rpn import RPN
from vision3dgen.models.resizing import Resizing
from vision3dgen.ops import box_iou, clip_boxes_to_image
from vision3dgen.structures import Detections

Proposer = RPN | Regions
ASSIGNER, SAMPLER = Assigner(0.5, 0.5), BalancedSampler(512, 0.25)  # of the proposals


class RCNN(nn.Module):
    """`backbone`, proposals of `rpn` (without one, those of the batch), and `heads` by name, "box" first.

    Images are in [0, 1], of one size or a list; `resizing` puts them on a canvas. What is found is in pixels of the
    images as they came. assigner, sampler: which proposals, and true boxes, the heads' losses are taken on. weights: of
    the loss terms by name, 1 where nothing is said.
    """

    parts = ("model",)
    takes = "image"

    def __init__(
        self, backbone: Backbone, heads: Mapping[str, RoIHead], rpn: Proposer | None = None, *,
        resizing: Resizing | None = None, assigner: Assigner = ASSIGNER, sampler: BalancedSampler = SAMPLER,
        weights: Mapping[str, float] | None = None,
    ):  # fmt: skip
        super().__init__()
        if next(iter(heads), None) != "box":
            raise ValueError(f'the first head must be "box", which says what there is, got {list(heads)}')
        self.classes = check_classes(heads)
        self.resizing = resizing or Resizing()
        self.backbone = backbone
        self.rpn = rpn
        self.heads = dict(heads)
        # Registered as published, one level higher than they stand in the heads.
        self.roi_heads = nn.ModuleDict({name: part for head in heads.values() for name, part in head.named_children()})
        self.assigner, self.sampler, self.weights = assigner, sampler, dict(weights or {})
        self.needs = [key for head in heads.values() for key in head.needs]

    # ------------------------------------------------------------------------------------------------- prediction

    def forward(
        self, images: Float[Tensor, "B 3 H W"] | Sequence[Tensor], proposals: Sequence[Tensor] | None = None,
        intrinsics: Float[Tensor, "B 3 3"] | None = None,
    ) -> list[Detections]:  # fmt: skip
        """What is found in each image, best first; `proposals` (P, 4) of each where there is no `rpn`."""
        canvas = self.resizing(images, intrinsics)
        return self.find(self.backbone(canvas.images), canvas, proposals)

    def find(
        self, maps: Sequence[Tensor], canvas: Canvas, proposals: Sequence[Tensor] | None = None
    ) -> list[Detections]:
        """What is found on maps of the canvas, in pixels of the images as they came."""
        found = self.propose(maps, canvas, proposals)
        for head in self.heads.values():
            found = head.find(maps, found, canvas)
        return [own._replace(boxes=canvas.restored(index, own.boxes)) for index, own in enumerate(found)]

    def propose(
        self, maps: Sequence[Tensor], canvas: Canvas, proposals: Sequence[Tensor] | None = None
    ) -> list[Detections]:
        """Regions on the canvas: the network's, or those given in pixels of the images as they came."""
        if self.rpn is not None:
            return self.rpn.propose(self.rpn(maps, canvas), canvas)
        return [
            Detections(boxes, boxes.new_ones(len(boxes)), torch.zeros(len(boxes), dtype=torch.int64).to(boxes.device))
            for boxes in self._given(proposals, canvas)
        ]

    def _given(self, proposals: Sequence[Tensor] | None, canvas: Canvas) -> list[Float[Tensor, "_ 4"]]:
        if proposals is None:
            raise ValueError("without a region proposal network the batch must have proposals, (P, 4) for each image")
        return [
            clip_boxes_to_image(canvas.placed(index, own.float()), canvas.sizes[index])
            for index, own in enumerate(proposals)
        ]

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> list[Detections]:
        """What is found in each image of a batch."""
        return self(batch["image"], batch.get("proposals"), self._intrinsics(batch))

    def _intrinsics(self, batch: Mapping[str, Any]) -> Float[Tensor, "B 3 3"] | None:
        return batch["camera"].intrinsics if "camera" in batch else None

    # --------------------------------------------------------------------------------------------------- training

    def loss(
        self, batch: Mapping[str, Any], part: str = "model", generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Every term of `rpn` and heads, and "loss", their weighted sum.

        Raises ValueError naming image and annotation for targets that cannot be meant.
        """
        canvas = self.resizing(batch["image"], self._intrinsics(batch), generator)
        truths = self.resizing.truths(batch, canvas, self.needs, self.classes)
        return self.losses(self.backbone(canvas.images), canvas, truths, batch.get("proposals"), generator)

    def losses(
        self, maps: Sequence[Tensor], canvas: Canvas, truths: Sequence[Truth],
        proposals: Sequence[Tensor] | None = None, generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What `loss` returns, on maps of a canvas."""
        terms: dict[str, Tensor] = {}
        if self.rpn is None:
            boxes = self._given(proposals, canvas)
        else:
            answers = self.rpn(maps, canvas)
            terms |= self.rpn.loss(answers, truths, generator)
            boxes = [own.boxes for own in self.rpn.propose(answers, canvas)]
        samples = [self.sample(own, truth, generator) for own, truth in zip(boxes, truths)]
        for head in self.heads.values():
            terms |= head.loss(maps, samples, truths, canvas, generator)
        total = torch.stack([self.weights.get(name, 1.0) * value for name, value in terms.items()]).sum()
        return {"loss": total, **terms}

    @torch.no_grad()
    def sample(
        self, proposals: Float[Tensor, "P 4"], truth: Truth, generator: torch.Generator | None = None
    ) -> Samples:
        """The regions of an image that losses are taken on: of its proposals and its true boxes."""
        boxes = torch.cat([proposals, truth.boxes])
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        assigned = self.assigner(boxes, truth.boxes)
        rows = self.sampler(assigned, generator).all
        objects = assigned[rows]
        labels = torch.zeros_like(objects)
        labels[objects >= 0] = truth.labels[objects[objects >= 0]]
        return Samples(boxes[rows], labels, objects)

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per image (B,): the loss, the batch's mean for each; and "f1" of detections at score and IoU 0.5.

        A detection is right if its true box of the same category, each taken once, best score first, overlaps it by
        half. An image without objects and detections has F1 1. Crowds and difficult objects count as objects here.
        """
        loss = self.loss(batch, generator=torch.Generator().manual_seed(0))["loss"]
        found = self.predict(batch)
        scores = [f1(own, boxes, labels) for own, boxes, labels in zip(found, batch["boxes"], batch["labels"])]
        return {"loss": loss.expand(len(found)), "f1": loss.new_tensor(scores)}


def f1(found: Detections, boxes: Float[Tensor, "M 4"], labels: Tensor, threshold: float = 0.5) -> float:
    """Twice the right detections over detections and objects; 1 where there are neither."""
    likely = found.scores >= threshold
    overlap = box_iou(found.boxes[likely], boxes.to(found.boxes.dtype))
    overlap = overlap.where(found.labels[likely][:, None] == labels, 0).clone()
    right = 0
    for row in range(len(overlap) if len(boxes) else 0):
        best = int(overlap[row].argmax())
        if overlap[row, best] >= threshold:
            right += 1
            overlap[:, best] = 0
    count = len(overlap) + len(boxes)
    return 2 * right / count if count else 1.0


# ------------------------------------------------------------------------------------------------------- factories


RESIZINGS: dict[str, type[Resizing]] = {"resizing": Resizing}
Resized = Annotated[Resizing | None, Named(RESIZINGS, "resizing")]


def sliding_window(
    backbone: Backbone, rpn: Proposer, box: RoIHead, *, resizing: Resized = None, assigner: Assigner = ASSIGNER,
    sampler: BalancedSampler = SAMPLER,
) -> RCNN:  # fmt: skip
    """Every window of a picture cut out and classified, and what overlaps suppressed: `pixels`, `windows`, `crop`."""
    return RCNN(backbone, {"box": box}, rpn, resizing=resizing, assigner=assigner, sampler=sampler)


def slow_rcnn(
    backbone: Backbone, rpn: Proposer, box: RoIHead, *, resizing: Resized = None, assigner: Assigner = ASSIGNER,
    sampler: BalancedSampler = SAMPLER, weights: Mapping[str, float] | None = None,
) -> RCNN:  # fmt: skip
    """R-CNN as it was first: regions that nobody learned (`selective_search`), cut out of `pixels`, each seen by the
    network of a `crop` head, classified and moved."""
    return RCNN(backbone, {"box": box}, rpn, resizing=resizing, assigner=assigner, sampler=sampler, weights=weights)


def fast_rcnn(
    backbone: Backbone, box: RoIHead, *, resizing: Resized = None, assigner: Assigner = ASSIGNER,
    sampler: BalancedSampler = SAMPLER, weights: Mapping[str, float] | None = None,
) -> RCNN:  # fmt: skip
    """Proposals from elsewhere (`batch["proposals"]`), classified and moved."""
    return RCNN(backbone, {"box": box}, None, resizing=resizing, assigner=assigner, sampler=sampler, weights=weights)


def faster_rcnn(
    backbone: Backbone, rpn: Proposer, box: RoIHead, *, resizing: Resized = None, assigner: Assigner = ASSIGNER,
    sampler: BalancedSampler = SAMPLER, weights: Mapping[str, float] | None = None,
) -> RCNN:  # fmt: skip
    """Proposals of a network on the same maps, classified and moved."""
    return RCNN(backbone, {"box": box}, rpn, resizing=resizing, assigner=assigner, sampler=sampler, weights=weights)


def mask_rcnn(
    backbone: Backbone, rpn: Proposer, box: RoIHead, mask: RoIHead, *, resizing: Resized = None,
    assigner: Assigner = ASSIGNER, sampler: BalancedSampler = SAMPLER, weights: Mapping[str, float] | None = None,
) -> RCNN:  # fmt: skip
    """A Faster R-CNN whose detections have masks."""
    heads = {"box": box, "mask": mask}
    return RCNN(backbone, heads, rpn, resizing=resizing, assigner=assigner, sampler=sampler, weights=weights)


def mesh_rcnn(
    backbone: Backbone, rpn: Proposer, box: RoIHead, mask: RoIHead, mesh: RoIHead, *, resizing: Resized = None,
    assigner: Assigner = ASSIGNER, sampler: BalancedSampler = SAMPLER, weights: Mapping[str, float] | None = None,
) -> RCNN:  # fmt: skip
    """A Mask R-CNN whose detections have meshes, in the frame of the camera (`batch["camera"]`)."""
    heads = {"box": box, "mask": mask, "mesh": mesh}
    return RCNN(backbone, heads, rpn, resizing=resizing, assigner=assigner, sampler=sampler, weights=weights)
