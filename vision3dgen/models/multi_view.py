"""Any number of images of one object in, one shape out: a view encoder and a head."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.backbones import ViewEncoder
from vision3dgen.heads import Head, View
from vision3dgen.models.reconstruction import PictureReconstruction


class MultiView(PictureReconstruction):
    """Shape from views of one object (B, V, 3, H, W): `head(encoder(normalized views))`.

    In training a batch is seen by its first n views, n drawn from `fewest_views` to V with torch's global generator;
    elsewhere by all of them. Batches may have "num_views" (B,), how many of the V views each object has, and pictures
    (B, 3, H, W) are one view of each.

    Raises ValueError for a head in the camera's frame: there are several cameras.
    Source: Choy et al. 2016, 3D-R2N2 (arXiv:1604.00449), with `MultiViewEncoder` and `VolumeHead`.
    """

    def __init__(self, encoder: ViewEncoder, head: Head, *, fewest_views: int = 1):
        super().__init__(head)
        if head.frame != "object":
            name = type(head).__name__
            raise ValueError(f"{name} predicts in the camera's frame, but several views have several cameras")
        if fewest_views < 1:
            raise ValueError(f"fewest_views must be at least 1, got {fewest_views}")
        self.encoder = encoder
        self.fewest_views = fewest_views

    def features(self, views: Float[Tensor, "B V 3 H W"], lengths: Int[Tensor, " B"] | None = None) -> list[Tensor]:
        """What the encoder makes of the views."""
        return self.encoder(self.normalized(views), lengths)

    def forward(self, views: Float[Tensor, "B V 3 H W"], lengths: Int[Tensor, " B"] | None = None) -> Any:
        """The head's own kind of prediction."""
        height, width = views.shape[-2:]
        return self.head(self.features(views, lengths), View((height, width)))

    def see(self, batch: dict[str, Any]) -> Any:
        """The prediction from all views of a batch; in training from a random number of them."""
        views, lengths = batch["image"], batch.get("num_views")
        views = views[:, None] if views.ndim == 4 else views
        if self.training:
            most = views.shape[1]
            if most < self.fewest_views:
                raise ValueError(
                    f"fewest_views is {self.fewest_views}, but items have {most} view(s): set the data's views_per_item"
                )
            seen = int(torch.randint(self.fewest_views, most + 1, ()))
            views = views[:, :seen]
            lengths = None if lengths is None else lengths.clamp(max=seen)
        return self(views, lengths)
