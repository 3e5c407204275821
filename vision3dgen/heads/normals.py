"""Unit normals of every pixel, in the axes of the picture's camera."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice
from vision3dgen.heads.decoder import SkipDecoder
from vision3dgen.heads.head import Head, View
from vision3dgen.losses import normals_loss
from vision3dgen.metrics.normals import normal_errors
from vision3dgen.structures import Meshes


class NormalsHead(Head):
    """Normals (B, 3, H, W) of length 1 in camera axes (x right, y down, z forward), so that most have z < 0.

    channels, strides: the backbone's. objective: "cosine" or "angular", see `losses.normals_loss`; learned where the
    true normal is not 0. upsampling, width: of the `SkipDecoder`.
    """

    frame = "camera"

    def __init__(
        self, channels: list[int], strides: list[int], *, objective: Literal["cosine", "angular"] = "cosine",
        upsampling: str = "bilinear", width: int = 32,
    ):  # fmt: skip
        super().__init__()
        check_choice("objective", objective, ("cosine", "angular"))
        self.objective: Literal["cosine", "angular"] = objective
        self.decoder = SkipDecoder(channels, strides, width=width, name=upsampling)
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B 3 H W"]:
        if view is None:
            raise ValueError("the normals head needs a view: it predicts pictures of its size")
        return F.normalize(self.last(self.decoder(features, view.image_size)).float(), dim=1)

    def loss(self, prediction: Float[Tensor, "B 3 H W"], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean over pictures of the objective against `batch["normals"]` (B, 3, H, W)."""
        return {"loss": normals_loss(prediction, self._target(prediction, batch), kind=self.objective).mean()}

    @staticmethod
    def _target(prediction: Float[Tensor, "B 3 H W"], batch: Mapping[str, Any]) -> Float[Tensor, "B 3 H W"]:
        if batch["normals"].shape != prediction.shape:
            raise ValueError(
                f"the normals head predicts {tuple(prediction.shape)}, but the data's normals are "
                f"{tuple(batch['normals'].shape)}: both must have the size of the image"
            )
        return batch["normals"].float()

    def shape(self, prediction: Float[Tensor, "B 3 H W"]) -> Meshes:
        """Nothing for each picture: normals alone say how a surface turns, not where it is."""
        nothing = prediction.new_zeros(len(prediction), 0, 3)
        return Meshes(list(nothing), list(nothing.long()))

    def maps(self, prediction: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C H W"]]:
        return {"normals": prediction}

    def validation_metrics(
        self, prediction: Float[Tensor, "B 3 H W"], batch: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, " B"]]:
        """Mean and median angle in degrees, and the share within 11.25; 0 for a picture without true normals."""
        errors = normal_errors(prediction, self._target(prediction, batch))
        return {name: getattr(errors, name).nan_to_num(0) for name in ("mean", "median", "within_11_25")}
