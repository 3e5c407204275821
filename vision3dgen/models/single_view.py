"""One image in, one shape out: a backbone and a head."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.heads import Head
from vision3dgen.metrics import Prediction, point_iou
from vision3dgen.structures import GridSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SingleView(nn.Module):
    """Shape from one image: `head(backbone(normalized image))`.

    Images are (B, 3, H, W) in [0, 1] and are normalized here with ImageNet's mean and deviation.
    """

    parts = ("model",)

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The backbone's maps, fine to coarse."""
        return self.backbone((images - self.mean) / self.std)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """The head's own kind of prediction."""
        return self.head(self.features(images))

    def loss(self, batch: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
        return self.head.loss(self(batch["image"]), batch)

    def expected_initial_loss(self, batch: dict[str, Any]) -> float | None:
        """What the head says its loss should be before training."""
        return self.head.expected_initial_loss(batch)

    @torch.no_grad()
    def validation_metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): the loss, and for heads that know an inside the IoU at the query points."""
        raw = self(batch["image"])
        loss = self.head.loss(raw, batch)["loss"]
        measured = {"loss": loss.expand(len(batch["image"]))}
        if self.head.threshold is not None:
            probability = self.head.occupancy(raw, batch["points"])
            assert probability is not None
            measured["iou"] = point_iou(probability >= self.head.threshold, batch["occupancies"] > 0.5)
        return measured

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """What the evaluator and the viewer take: one prediction per image, in the canonical object frame."""
        images = batch["image"]
        raw = self(images)
        shapes = self.head.shape(raw)
        voxels: list[Tensor | None] = [None] * len(images)
        if self.head.threshold is not None:
            grid = GridSpec.cube(32)
            centers = grid.points(device=images.device).view(1, -1, 3).expand(len(images), -1, -1)
            probability = self.head.occupancy(raw, centers)
            assert probability is not None
            voxels = list(probability.view(-1, *grid.shape))
        return [
            Prediction(
                shape=shapes[index],
                voxels=voxels[index],
                occupancy=None,
                frame=batch["frame"][index],
            )
            for index in range(len(images))
        ]
