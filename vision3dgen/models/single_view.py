"""One image in, one shape out: a backbone and a head; and what all models have that predict shapes with a head."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.heads import Head, View
from vision3dgen.models.reconstruction import PictureReconstruction
from vision3dgen.structures import Camera


class SingleView(PictureReconstruction):
    """Shape from one image (B, 3, H, W): `head(backbone(normalized image))`."""

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__(head)
        self.backbone = backbone

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The backbone's maps, fine to coarse."""
        return self.backbone(self.normalized(images))

    def forward(self, images: Float[Tensor, "B 3 H W"], cameras: Camera | None = None) -> Any:
        """The head's own kind of prediction."""
        height, width = images.shape[-2:]
        return self.head(self.features(images), View((height, width), cameras))

    def see(self, batch: dict[str, Any]) -> Any:
        return self(batch["image"], batch.get("camera"))
