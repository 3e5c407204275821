"""What all models have that predict shapes with a head, whatever stands before the head."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.heads import Head
from vision3dgen.metrics import Prediction, point_iou
from vision3dgen.structures import Frame, GridSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
POINTS_AT_ONCE = 1 << 15  # at which an occupancy is asked for


def _member(raw: Any, index: int, size: int) -> tuple[Any, int]:
    """One member of a head's prediction as a batch of one, where it can be taken out, else all of it; and the size.

    A tensor is cut along its first dimension; a field of its own class gives `raw[index]`, as `OccupancyField` does.
    """
    if isinstance(raw, Tensor):
        return raw[index : index + 1], 1
    if hasattr(type(raw), "__getitem__") and not isinstance(raw, dict | list | tuple):
        return raw[index], 1
    return raw, size


class Reconstruction(nn.Module, ABC):
    """Shapes from what a batch holds under `takes`, by a head: all of a model but the way from the one to the other."""

    parts = ("model",)
    takes: str
    head: Head

    @abstractmethod
    def see(self, batch: dict[str, Any]) -> Any:
        """The head's own kind of prediction for a batch."""

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
        measured = {"loss": loss.expand(len(batch[self.takes])), **self.head.validation_metrics(raw, batch)}
        if self.head.threshold is not None:
            probability = self._occupancy(raw, batch["points"], batch)
            measured["iou"] = point_iou(probability >= self.head.threshold, batch["occupancies"] > 0.5)
        return measured

    @torch.no_grad()
    def _occupancy_of(
        self, raw: Any, batch: dict[str, Any], index: int, size: int, points: Float[Tensor, "N 3"]
    ) -> Float[Tensor, " N"]:
        """Probabilities of one member of a batch, on the points' device; a part at a time, for the memory."""
        member, size = _member(raw, index, size)
        keys = ("frame", "camera") if self.head.frame == "camera" else ()
        own = {key: batch[key] if size > 1 else batch[key][index : index + 1] for key in keys}
        device = next(self.parameters()).device
        chunks = [
            self._occupancy(member, chunk.to(device).expand(size, -1, -1), own)[min(index, size - 1)]
            for chunk in points.split(POINTS_AT_ONCE)
        ]
        return torch.cat(chunks).to(points.device)

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        """What the evaluator and the viewer take: one prediction per item, in the head's frame."""
        raw = self.see(batch)
        size = len(batch[self.takes])
        device = next(self.parameters()).device
        shapes = self.head.shape(raw)
        maps = self.head.maps(raw)
        voxels: list[Tensor | None] = [None] * size
        if self.head.threshold is not None and (self.head.frame == "object" or "camera" in batch):
            grid = GridSpec.cube(32)
            centers = grid.points(device=device).view(1, -1, 3).expand(size, -1, -1)
            voxels = list(self._occupancy(raw, centers, batch).view(-1, *grid.shape))
        return [
            Prediction(
                shape=shapes[index],
                voxels=voxels[index],
                occupancy=None if self.head.threshold is None else partial(self._occupancy_of, raw, batch, index, size),
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


class PictureReconstruction(Reconstruction):
    """Shapes from pictures in [0, 1], which are normalized here with ImageNet's mean and deviation."""

    takes = "image"

    def __init__(self, head: Head):
        super().__init__()
        if head.layout is not None:
            raise ValueError(f"{type(head).__name__} reads local features, which images do not have: use an encoder")
        self.head = head
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def normalized(self, images: Float[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
        return (images - self.mean) / self.std
