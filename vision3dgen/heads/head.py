"""What every single-view reconstruction head offers, whatever its representation."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.structures import Meshes, Pointclouds


class Head(nn.Module, ABC):
    """Feature maps in, a prediction of its own kind out, and three ways to use that prediction.

    Predictions live in the canonical object frame: bounding box centred at 0, longest edge 1.
    """

    @abstractmethod
    def forward(self, features: list[Tensor]) -> Any:
        """The prediction for maps (B, C_i, H_i, W_i), fine to coarse."""

    @abstractmethod
    def loss(self, prediction: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalars to log, of which "loss" is minimized."""

    @abstractmethod
    def shape(self, prediction: Any) -> Meshes | Pointclouds:
        """One surface per batch member; empty where nothing was predicted."""

    def occupancy(self, prediction: Any, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"] | None:
        """Probability that each point is inside, or None for a head that knows no inside."""
        return None

    def expected_initial_loss(self, batch: dict[str, Any]) -> float | None:
        """What the loss should be before training, None where no theory says; `vision3dgen doctor` compares."""
        return None

    threshold: float | None = None  # probability from which a point counts as inside, for heads that know an inside
