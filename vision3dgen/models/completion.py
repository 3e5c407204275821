"""A noisy, sparse or coarse shape in, a whole one out: an encoder and a head.

Sources: the completion of point clouds and the super-resolution of voxels of Mescheder et al. 2019 (arXiv:1812.03828)
and Peng et al. 2020 (arXiv:2003.04618).
"""

from typing import Any

from torch import Tensor

from vision3dgen.backbones import Encoder
from vision3dgen.checks import check_finite
from vision3dgen.heads import Head
from vision3dgen.models.reconstruction import Reconstruction
from vision3dgen.structures import Pointclouds

REACH = 1.1  # how far a coordinate may be from the centre: twice the cube that fields are trained in, to spare noise


class Completion(Reconstruction):
    """Shape from a cloud or voxels in the canonical object frame: `head(encoder(shapes))`.

    Every head that takes one global code stands on any encoder without a layout; a head with a layout needs an encoder
    that has the same. Raises ValueError where the two do not fit, for a head in the camera's frame, and for clouds
    that are empty, not finite, or so far from the unit cube that they cannot be in the canonical frame.
    """

    def __init__(self, encoder: Encoder, head: Head):
        super().__init__()
        if head.frame != "object":
            raise ValueError(f"{type(head).__name__} predicts in the {head.frame}'s frame, and a shape has no camera")
        if encoder.layout != head.layout:
            told = [
                f"{type(part).__name__} {said} {'one global code' if part.layout is None else part.layout}"
                for part, said in ((encoder, "gives"), (head, "reads"))
            ]
            raise ValueError(f"encoder and head do not fit: {' and '.join(told)}")
        self.takes = encoder.takes
        self.encoder = encoder
        self.head = head

    def forward(self, shapes: Pointclouds | Tensor) -> Any:
        """The head's own kind of prediction for `Pointclouds`, or voxels (B, D, H, W)."""
        if isinstance(shapes, Pointclouds):
            _check_clouds(shapes)
        return self.head(self.encoder(shapes))

    def see(self, batch: dict[str, Any]) -> Any:
        return self(batch[self.takes])


def _check_clouds(clouds: Pointclouds) -> None:
    if not bool(clouds.valid.all()):
        empty = (~clouds.valid).nonzero().flatten().tolist()
        raise ValueError(f"clouds {empty} of the batch are empty: there is nothing to complete")
    points = clouds.points_packed()
    check_finite(cloud=points)
    far = points.abs().amax(1) > REACH
    if bool(far.any()):
        row = int(far.nonzero()[0])
        raise ValueError(
            f"cloud {int(clouds.packed_to_cloud_idx()[row])} reaches {[round(x, 4) for x in points[row].tolist()]}: "
            f"clouds must be in the canonical frame, centred at 0 with longest edge 1 (Frame.longest_edge(points)), no "
            f"coordinate beyond {REACH}"
        )
