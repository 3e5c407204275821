"""One image in, one shape out: a backbone and a head; and what all models have that predict shapes with a head."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.heads import Head, View
from vision3dgen.metrics import Prediction, point_iou
from vision3dgen.structures import Camera, Frame, GridSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Reconstruction(nn.Module, ABC):
    """Shapes from pictures by a `head`: training, validation and prediction, whatever stands before the head.

    Pictures are in [0, 1], and are normalized here with ImageNet's mean and deviation.
    """

    parts = ("model",)
    head: Head

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @abstractmethod
    def see(self, batch: dict[str, Any]) -> Any:
        """The head's prediction for the pictures of a batch."""

    def loss(self, batch: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
        return self.head.loss(self.see(batch), batch)

    def expected_initial_loss(self, batch: dict[str, Any]) -> float | None:
        """What the head says its loss should be before training."""
        return self.head.expected_initial_loss(batch)

    @torch.no_grad()
    def validation_metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): the loss, what the head measures, and where it knows an inside the IoU at the query points."""
        raw = self.see(batch)
        loss = self.head.loss(raw, batch)["loss"]
        measured = {"loss": loss.expand(len(batch["image"])), **self.head.validation_metrics(raw, batch)}
        if self.head.threshold is not None:
            probability = self._occupancy(raw, batch["points"], batch)
            measured["iou"] = point_iou(probability >= self.head.threshold, batch["occupancies"] > 0.5)
        return measured

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """What the evaluator and the viewer take: one prediction per image, in the head's frame."""
        raw = self.see(batch)
        size = len(batch["image"])
        shapes = self.head.shape(raw)
        maps = self.head.maps(raw)
        voxels: list[Tensor | None] = [None] * size
        if self.head.threshold is not None:
            grid = GridSpec.cube(32)
            centers = grid.points(device=batch["image"].device).view(1, -1, 3).expand(size, -1, -1)
            voxels = list(self._occupancy(raw, centers, batch).view(-1, *grid.shape))
        return [
            Prediction(
                shape=shapes[index],
                voxels=voxels[index],
                frame=Frame("camera") if self.head.frame == "camera" else batch["frame"][index],
                maps={name: values[index] for name, values in maps.items()},
            )
            for index in range(size)
        ]

    def _occupancy(self, raw: Any, points: Float[Tensor, "B N 3"], batch: dict[str, Any]) -> Float[Tensor, "B N"]:
        """What the head says of points of the object frame."""
        if self.head.frame == "camera":
            pairs = zip(points, batch["frame"], batch["camera"])
            points = torch.stack([camera.world_to_camera(frame.denormalize(own)) for own, frame, camera in pairs])
        probability = self.head.occupancy(raw, points)
        assert probability is not None
        return probability


class SingleView(Reconstruction):
    """Shape from one image (B, 3, H, W): `head(backbone(normalized image))`."""

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The backbone's maps, fine to coarse."""
        return self.backbone((images - self.mean) / self.std)

    def forward(self, images: Float[Tensor, "B 3 H W"], cameras: Camera | None = None) -> Any:
        """The head's own kind of prediction."""
        height, width = images.shape[-2:]
        return self.head(self.features(images), View((height, width), cameras))

    def see(self, batch: dict[str, Any]) -> Any:
        return self(batch["image"], batch.get("camera"))
