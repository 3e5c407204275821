"""An image divided into segments: things one by one, stuff by class."""

from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor


class PanopticSegments(NamedTuple):
    """What a panoptic segmentation says of one image: every pixel belongs to one segment or to none."""

    segments: Int64[Tensor, "H W"]  # number of the segment, from 1; 0 is none
    labels: Int64[Tensor, " S"]  # class of segment 1, 2, ..., in the numbering of class maps
    scores: Float[Tensor, " S"]  # of things how likely they are, of stuff 1

    def semantic(self, void: int = 255) -> Int64[Tensor, "H W"]:
        """The class of each pixel, `void` where it belongs to no segment."""
        table = self.labels.new_full((len(self.labels) + 1,), void)
        table[1:] = self.labels
        return table[self.segments]
