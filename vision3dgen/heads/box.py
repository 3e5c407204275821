"""What an object is and where exactly: a class and a transform for each region.

Source: Girshick 2015, Fast R-CNN (arXiv:1504.08083), equations 1 to 3. Parameter names and defaults are torchvision's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.pooling import Pooling
from vision3dgen.heads.roi import Canvas, RoIHead, Samples, Truth, of_objects
from vision3dgen.ops import (
    batched_nms,
    clip_boxes_to_image,
    decode_boxes,
    encode_boxes,
    remove_small_boxes,
    soft_nms,
)
from vision3dgen.structures import Detections

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the transforms: about one over their deviations
BETA = 1 / 9
SMALLEST = 1e-2  # side of a detection, in pixels


@dataclass(frozen=True)
class Selection:
    """Which of the scored boxes are detections.

    score: the least. overlap: IoU from which the lower score of one class is suppressed. count: the most in an image.
    soft: how scores are lowered instead of boxes suppressed, see `ops.soft_nms`.
    """

    score: float = 0.05
    overlap: float = 0.5
    count: int = 100
    soft: Literal["linear", "gaussian"] | None = None

    def __call__(self, boxes: Float[Tensor, "R K 4"], scores: Float[Tensor, "R K"]) -> Detections:
        """The detections among a box and a probability for each of K classes, numbered from 1; best first."""
        labels = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(scores).flatten()
        flat, own = boxes.flatten(0, 1), scores.flatten()
        likely = (own > self.score).nonzero()[:, 0]
        likely = likely[remove_small_boxes(flat[likely], SMALLEST)]
        flat, own, labels = flat[likely], own[likely], labels[likely]
        if self.soft is None:
            kept = batched_nms(flat, own, labels, self.overlap)[: self.count]
            return Detections(flat[kept], own[kept], labels[kept])
        lowered, rows = [own[:0]], [likely[:0]]
        for label in labels.unique():
            members = (labels == label).nonzero()[:, 0]
            left = soft_nms(flat[members], own[members], self.overlap, method=self.soft, least=self.score)
            rows.append(members[left.indices])
            lowered.append(left.scores)
        row, score = torch.cat(rows), torch.cat(lowered)
        best = score.argsort(descending=True, stable=True)[: self.count]
        return Detections(flat[row[best]], score[best], labels[row[best]])


BOX_POOLING, SELECTION = Pooling(7), Selection()


class BoxAnswers(NamedTuple):
    """Of each region."""

    logits: Float[Tensor, "N K1"]  # background first
    transforms: Float[Tensor, "N K1 4"]  # one for each class, background's is never used


class TwoLayers(nn.Module):
    """Two linear layers with ReLU on all that a region holds."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.fc6 = nn.Linear(inputs, width)
        self.fc7 = nn.Linear(width, width)

    def forward(self, pooled: Float[Tensor, "N C P P"]) -> Float[Tensor, "N W"]:
        return self.fc7(self.fc6(pooled.flatten(1)).relu()).relu()


def convolutions_and_layer(channels: int, resolution: int, width: int) -> nn.Sequential:
    """Four 3x3 convolutions with batch normalization and ReLU, then one linear layer: torchvision's second version."""
    blocks = [
        nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        for _ in range(4)
    ]
    for block in blocks:
        nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels * resolution**2, width), nn.ReLU())


class BoxPredictor(nn.Module):
    """Two linear layers: a logit and a transform for each class, background first."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, (classes + 1) * 4)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):  # of the paper
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "N W"]) -> BoxAnswers:
        return BoxAnswers(self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4)))


class BoxHead(RoIHead):
    """A class of `classes` (numbered from 1) or background, and a transform of the region, by two linear layers.

    channels, strides: the backbone's, of one width. network: "layers", or "convolutions" with one layer. The losses are
    the mean cross-entropy over the samples, and the smooth L1 distance between the transforms of those with an object
    and the true ones times (10, 10, 5, 5), over the number of all.
    """

    def __init__(
        self, channels: list[int], strides: list[int], classes: int, *, width: int = 1024,
        network: Literal["layers", "convolutions"] = "layers", pooling: Pooling = BOX_POOLING,
        selection: Selection = SELECTION,
    ):  # fmt: skip
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, background not counted, got {classes}")
        self.classes, self.strides = classes, list(strides)
        self.pooling, self.selection = pooling, selection
        inputs = channels[pooling.levels(strides)[0]]
        self.box_head: nn.Module
        if network == "layers":
            self.box_head = TwoLayers(inputs * pooling.resolution**2, width)
        else:
            self.box_head = convolutions_and_layer(inputs, pooling.resolution, width)
        self.box_predictor: nn.Module = BoxPredictor(width, classes)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Float[Tensor, "_ 4"]]) -> BoxAnswers:
        return self.box_predictor(self.box_head(self.pooling(maps, boxes, self.strides)))

    def loss(
        self, maps: Sequence[Tensor], samples: Sequence[Samples], truths: Sequence[Truth], canvas: Canvas,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """ "classifier" and "box"."""
        answers = self(maps, [own.boxes for own in samples])
        labels = torch.cat([own.labels for own in samples])
        rows = (labels > 0).nonzero()[:, 0]
        positive = [own.positive for own in samples]
        wanted = encode_boxes(
            torch.cat(of_objects(truths, positive, "boxes")), torch.cat([own.boxes for own in positive]), WEIGHTS
        )
        count = max(len(labels), 1)
        entropy = F.cross_entropy(answers.logits, labels, reduction="sum")
        distance = F.smooth_l1_loss(answers.transforms[rows, labels[rows]], wanted, beta=BETA, reduction="sum")
        return {"classifier": entropy / count, "box": distance / count}

    def find(self, maps: Sequence[Tensor], found: Sequence[Detections], canvas: Canvas) -> list[Detections]:
        """The selected boxes of all classes."""
        counts = [len(own.boxes) for own in found]
        answers = self(maps, [own.boxes for own in found])
        probabilities = answers.logits.softmax(1)[:, 1:].split(counts)
        boxes = decode_boxes(answers.transforms, torch.cat([own.boxes for own in found]), WEIGHTS)[:, 1:].split(counts)
        return [
            self.selection(clip_boxes_to_image(own, size), scores)
            for own, scores, size in zip(boxes, probabilities, canvas.sizes)
        ]


def labels_of(found: Sequence[Detections]) -> Int[Tensor, " N"]:
    """The categories of all detections of a batch."""
    return torch.cat([own.labels for own in found])
