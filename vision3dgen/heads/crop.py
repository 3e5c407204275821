"""What is in a region, by a network of its own on the pixels cut out: R-CNN before anything was shared.

Source: Girshick et al. 2014, R-CNN (arXiv:1311.2524). Differs: classes by a softmax with background instead of SVMs, as
in Fast R-CNN, and one network for classes and transforms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.backbones import Backbone
from vision3dgen.heads.box import SELECTION, BoxAnswers, BoxHead, BoxPredictor, Selection
from vision3dgen.heads.pooling import Pooling
from vision3dgen.heads.roi import Canvas, RoIHead, Samples, Truth


class ClassPredictor(nn.Module):
    """A logit for each class, background first; transforms of nothing."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    def forward(self, x: Float[Tensor, "N W"]) -> BoxAnswers:
        logits = self.cls_score(x).float()
        return BoxAnswers(logits, logits.new_zeros(*logits.shape, 4))


class CropHead(BoxHead):
    """The class of a region, and with `moves` its transform, by `trunk` on its pixels at `size` x `size`.

    channels, strides: of the backbone, whose first map must be the canvas itself (`pixels`). context: what is seen
    around a region, on each side, of its own side; beyond the canvas is its mean color. at_once: crops in a batch,
    which bounds memory in evaluation. Losses and detections are `BoxHead`'s.
    """

    def __init__(
        self, channels: list[int], strides: list[int], trunk: Backbone, classes: int, *, size: int = 32,
        context: float = 1 / 14, moves: bool = True, at_once: int = 1024, selection: Selection = SELECTION,
    ):  # fmt: skip
        RoIHead.__init__(self)
        if classes < 1:
            raise ValueError(f"classes must be at least 1, background not counted, got {classes}")
        if strides[0] != 1:
            raise ValueError(f"regions are cut out of the picture: its stride must be 1, got {strides}; use `pixels`")
        if trunk.in_channels != channels[0]:
            raise ValueError(f"trunk must take {channels[0]} channels, the backbone's, got {trunk.in_channels}")
        if size < trunk.smallest or context < 0 or at_once < 1:
            raise ValueError(
                f"needs size >= {trunk.smallest}, context >= 0, at_once >= 1, got {size}, {context} and {at_once}"
            )
        self.classes, self.strides, self.selection = classes, list(strides[:1]), selection
        self.context, self.moves, self.at_once = context, moves, at_once
        self.pooling = Pooling(size, aligned=True)
        self.trunk = trunk
        predictor = BoxPredictor if moves else ClassPredictor
        self.box_predictor = predictor(trunk.channels[-1], classes)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Float[Tensor, "_ 4"]]) -> BoxAnswers:
        if self.training or sum(map(len, boxes)) <= self.at_once:
            return self._answer(maps[0], boxes)
        answers = [
            self._answer(maps[0][index : index + 1], [part])
            for index, own in enumerate(boxes)
            for part in own.split(self.at_once)
        ]
        return BoxAnswers(*(torch.cat(each) for each in zip(*answers)))

    def _answer(self, image: Float[Tensor, "B C H W"], boxes: Sequence[Float[Tensor, "_ 4"]]) -> BoxAnswers:
        wider = []
        for own in boxes:
            margin = self.context * (own[:, 2:] - own[:, :2])
            wider.append(torch.cat([own[:, :2] - margin, own[:, 2:] + margin], 1))
        crops = self.pooling([image], wider, self.strides)
        if not len(crops):
            return self.box_predictor(crops.new_zeros(0, self.trunk.channels[-1]))
        return self.box_predictor(self.trunk(crops)[-1].mean((2, 3)))

    def loss(
        self, maps: Sequence[Tensor], samples: Sequence[Samples], truths: Sequence[Truth], canvas: Canvas,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """ "classifier", and with `moves` "box"."""
        terms: dict[str, Any] = super().loss(maps, samples, truths, canvas, generator)
        return terms if self.moves else {"classifier": terms["classifier"]}
