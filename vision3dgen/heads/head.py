"""What every reconstruction head offers, whatever its representation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.ops import FeatureLayout
from vision3dgen.structures import Camera, Meshes, Pointclouds


class View(NamedTuple):
    """What is known of a batch of pictures beside their features."""

    image_size: tuple[int, int]  # height, width
    cameras: Camera | None = None  # one per picture


class Head(nn.Module, ABC):
    """Feature maps in, a prediction of its own kind out, and the ways to use that prediction.

    `frame` says where shapes and occupancies live: "object" is the canonical one (bounding box centred at 0, longest
    edge 1), "camera" the picture's own camera (x right, y down, z forward, in units of the file). `layout` says
    which local features of an `Encoder` the head reads; without one it takes a backbone's maps, or an encoder's code.
    """

    frame: Literal["object", "camera"] = "object"
    threshold: float | None = None  # probability from which a point counts as inside, for heads that know an inside
    layout: FeatureLayout | None = None

    @abstractmethod
    def forward(self, features: list[Tensor], view: View | None = None) -> Any:
        """The prediction for maps (B, C_i, H_i, W_i), fine to coarse; `view` for heads that predict what it shows."""

    @abstractmethod
    def loss(self, prediction: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scalars to log, of which "loss" is minimized."""

    @abstractmethod
    def shape(self, prediction: Any) -> Meshes | Pointclouds:
        """One surface per batch member; empty where nothing was predicted."""

    def occupancy(self, prediction: Any, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"] | None:
        """Probability that each point of the head's frame is inside, or None for a head that knows no inside."""
        return None

    def maps(self, prediction: Any) -> dict[str, Float[Tensor, "B C H W"]]:
        """Pictures predicted, under the batch's names ("depth", "normals"), at the size of the view."""
        return {}

    def validation_metrics(self, prediction: Any, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, " B"]]:
        """What a run may watch beside the loss and, for heads that know an inside, the IoU."""
        return {}

    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float | None:
        """What the loss should be before training, None where no theory says; `vision3dgen doctor` compares."""
        return None
