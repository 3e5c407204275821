"""Region proposal network: where an object may be, whatever it is.

Source: Ren et al. 2015, Faster R-CNN (arXiv:1506.01497), on a pyramid as in Lin et al. 2017 (arXiv:1612.03144).
Parameter names and defaults are torchvision's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.anchors import Anchors
from vision3dgen.heads.assigner import Assigner, BalancedSampler, counts_of
from vision3dgen.heads.regions import EdgeRegions, SelectiveSearchRegions, WindowRegions
from vision3dgen.heads.roi import Canvas, Truth
from vision3dgen.ops import batched_nms, clip_boxes_to_image, decode_boxes, encode_boxes, remove_small_boxes
from vision3dgen.structures import Detections

BETA = 1 / 9  # below it the loss of a transform is quadratic
SMALLEST = 1e-3  # side of a proposal, in pixels


@dataclass(frozen=True)
class Proposals:
    """How many regions a network proposes in (training, evaluation).

    before: the highest scores of each level that suppression looks at. after: what is left of an image. overlap: IoU
    from which the lower score is suppressed, within a level.
    """

    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (2000, 1000)
    overlap: float = 0.7


ANCHORS, PROPOSALS = Anchors(), Proposals()
ASSIGNER, SAMPLER = Assigner(0.7, 0.3, nearest=True), BalancedSampler(256, 0.5)


class Answers(NamedTuple):
    """What the network says of each anchor, by level: (B, A_i), (B, A_i, 4), and the anchors (A_i, 4)."""

    objectness: list[Tensor]  # logits
    transforms: list[Tensor]
    anchors: list[Tensor]


class RPNHead(nn.Module):
    """3x3 convolutions with ReLU, then two 1x1 ones: a logit and a transform for each anchor of a cell."""

    def __init__(self, channels: int, anchors: int, convolutions: int):
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(convolutions))
        )
        self.cls_logits = nn.Conv2d(channels, anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(feature) for feature in maps]
        logits = [self.cls_logits(x).permute(0, 2, 3, 1).flatten(1) for x in hidden]  # (B, H W A)
        transforms = [self.bbox_pred(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in hidden]
        return logits, transforms


class RPN(nn.Module):
    """Anchors on every level, scored and moved; the best of them, suppressed, are the proposals.

    channels, strides: the backbone's, of one width. convolutions: before the last two, 2 in torchvision's second
    version. The losses are the mean binary cross-entropy over the sampled anchors and the smooth L1 distance of the
    transforms of those with an object, over the number sampled.
    """

    def __init__(
        self, channels: list[int], strides: list[int], *, convolutions: int = 1, anchors: Anchors = ANCHORS,
        assigner: Assigner = ASSIGNER, sampler: BalancedSampler = SAMPLER, proposals: Proposals = PROPOSALS,
    ):  # fmt: skip
        super().__init__()
        if len(set(channels)) != 1:
            raise ValueError(f"the maps must have one width, got {channels}: put a pyramid (fpn) over the backbone")
        self.strides = list(strides)
        self.anchors, self.assigner, self.sampler, self.proposals = anchors, assigner, sampler, proposals
        per_cell = len(anchors.of_levels(strides)[0]) * len(anchors.ratios)
        self.head = RPNHead(channels[0], per_cell, convolutions)

    def forward(self, maps: Sequence[Tensor], canvas: Canvas) -> Answers:
        height, width = canvas.images.shape[-2:]
        logits, transforms = self.head(maps)
        return Answers(
            [x.float() for x in logits],
            [x.float() for x in transforms],
            self.anchors(maps, (height, width), self.strides),
        )

    @torch.no_grad()
    def propose(self, answers: Answers, canvas: Canvas) -> list[Detections]:
        """The proposals of each photograph with their objectness, best first; they have no category, label 0."""
        before, after = (counts[0 if self.training else 1] for counts in (self.proposals.before, self.proposals.after))
        top = [logits.topk(min(before, logits.shape[1]), dim=1) for logits in answers.objectness]
        scores = torch.cat([best.values for best in top], dim=1).sigmoid()
        levels = torch.cat([torch.full_like(best.indices[0], level) for level, best in enumerate(top)])
        found = []
        for image, size in enumerate(canvas.sizes):
            boxes = torch.cat(
                [
                    decode_boxes(transforms[image, best.indices[image]], anchors[best.indices[image]])
                    for best, transforms, anchors in zip(top, answers.transforms, answers.anchors)
                ]
            )
            boxes = clip_boxes_to_image(boxes, size)
            large = remove_small_boxes(boxes, SMALLEST)
            boxes, own = boxes[large], scores[image, large]
            kept = batched_nms(boxes, own, levels[large], self.proposals.overlap)[:after]
            found.append(Detections(boxes[kept], own[kept], torch.zeros_like(kept)))
        return found

    def loss(
        self, answers: Answers, truths: Sequence[Truth], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """ "objectness" and "rpn_box"."""
        anchors = torch.cat(answers.anchors)
        logits, transforms = torch.cat(answers.objectness, dim=1), torch.cat(answers.transforms, dim=1)
        distance = transforms.sum() * 0
        asked, wanted = [], []
        for image, truth in enumerate(truths):
            assigned = self.assigner(anchors, truth.boxes)
            sampled = self.sampler(assigned, generator)
            asked.append(logits[image, sampled.all])
            wanted.append(torch.cat([torch.ones(len(sampled.positive)), torch.zeros(len(sampled.negative))]))
            rows = sampled.positive
            target = encode_boxes(truth.boxes[assigned[rows]], anchors[rows])
            distance = distance + F.smooth_l1_loss(transforms[image, rows], target, beta=BETA, reduction="sum")
        count = max(sum(counts_of(asked)), 1)
        entropy = F.binary_cross_entropy_with_logits(
            torch.cat(asked), torch.cat(wanted).to(logits.device), reduction="sum"
        )
        return {"objectness": entropy / count, "rpn_box": distance / count}


# Where regions come from, in a configuration.
RPNS: dict[str, Callable[..., nn.Module]] = {
    "rpn": RPN,
    "windows": WindowRegions,
    "selective_search": SelectiveSearchRegions,
    "edge_boxes": EdgeRegions,
}
