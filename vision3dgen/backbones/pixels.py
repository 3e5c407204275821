"""No features at all: the picture itself, for heads that cut regions out of it."""

from jaxtyping import Float
from torch import Tensor

from vision3dgen.backbones.backbone import Backbone


class Pixels(Backbone):
    """Images (B, in_channels, H, W) as the only map, at stride 1. Nothing in it is learned."""

    def __init__(self, in_channels: int = 3):
        super().__init__(in_channels, smallest=1)
        self.channels, self.strides = [in_channels], [1]

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        self.check_images(images)
        return [images]
