"""What a detector says of one image."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vision3dgen.structures.meshes import Meshes


class Detections(NamedTuple):
    """Found objects of one image, best first: boxes in pixels (xyxy), scores, categories from 1 (0 is background).

    `masks` are at the image's size; `meshes` hold one member per object, in the camera's frame.
    """

    boxes: Float[Tensor, "N 4"]
    scores: Float[Tensor, " N"]
    labels: Int64[Tensor, " N"]
    masks: Bool[Tensor, "N H W"] | None = None
    meshes: Meshes | None = None
