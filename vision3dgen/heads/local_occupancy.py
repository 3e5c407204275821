"""An implicit surface from local features: each point reads planes or a grid where it lies.

Source: Peng et al. 2020, Convolutional Occupancy Networks (arXiv:2003.04618), section 3.3, with the published code's
parameter names (`decoder.*`). Loss and extraction are those of Occupancy Networks.
"""

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.heads.head import View
from vision3dgen.heads.occupancy import FieldHead, OccupancyField
from vision3dgen.layers import ResidualLinear
from vision3dgen.ops.planes import FeatureLayout


class LocalDecoder(nn.Module):
    """Logit of being inside at points (B, N, 3), given a layout's maps: residual layers, features added to each."""

    def __init__(self, layout: FeatureLayout, channels: int, *, hidden: int = 32, blocks: int = 5):
        super().__init__()
        self.layout = layout
        self.fc_c = nn.ModuleList(nn.Linear(channels, hidden) for _ in range(blocks))
        self.fc_p = nn.Linear(3, hidden)
        self.blocks = nn.ModuleList(ResidualLinear(hidden, hidden) for _ in range(blocks))
        self.fc_out = nn.Linear(hidden, 1)

    def forward(self, points: Float[Tensor, "B N 3"], *maps: Tensor) -> Float[Tensor, "B N"]:
        features = self.layout.sample(maps, points)  # (B, N, C)
        x = self.fc_p(points)
        for added, block in zip(self.fc_c, self.blocks):
            x = block(x + added(features))
        return self.fc_out(x.relu())[..., 0]


class LocalOccupancyHead(FieldHead):
    """A field per shape, read from its local features; see `FieldHead` for the rest.

    channels and layout are the encoder's. hidden: channels of the decoder, blocks: its residual layers.
    """

    def __init__(
        self, channels: list[int], layout: FeatureLayout, *, hidden: int = 32, blocks: int = 5, threshold: float = 0.2,
        resolution: int = 32, upsampling_steps: int = 2, faces: int | None = None, refinement_steps: int = 0,
    ):  # fmt: skip
        super().__init__(
            threshold=threshold, resolution=resolution, upsampling_steps=upsampling_steps, faces=faces,
            refinement_steps=refinement_steps,
        )  # fmt: skip
        self.layout = layout
        self.decoder = LocalDecoder(layout, channels[-1], hidden=hidden, blocks=blocks)

    def forward(self, features: list[Tensor], view: View | None = None) -> OccupancyField:
        return OccupancyField(self.decoder, tuple(features))
