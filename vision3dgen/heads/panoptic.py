"""Things and stuff in one map: how what is found is merged.

Source: Kirillov et al. 2019, Panoptic Segmentation (arXiv:1801.00868), section 6, and Panoptic Feature Pyramid Networks
(arXiv:1901.02446).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vision3dgen.structures import Detections, PanopticSegments


@dataclass(frozen=True)
class PanopticMerging:
    """Detections, best first, take the pixels that no better one has; stuff takes what is left.

    score: of the least likely detection. overlap: share of its pixels that better ones may have, else it is left out.
    stuff: the fewest pixels of a class of stuff, fewer stay void; the published 4096 is for images of 800 x 1333.
    """

    score: float = 0.5
    overlap: float = 0.5
    stuff: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1 or self.stuff < 0:
            raise ValueError(f"needs 0 <= overlap <= 1 and stuff >= 0, got {self.overlap} and {self.stuff}")

    def __call__(self, found: Detections, stuff: Int[Tensor, "H W"]) -> PanopticSegments:
        """Segments of one image; `stuff` is the class of each pixel as stuff, in panoptic numbers, 0 for a thing."""
        if found.masks is None or tuple(found.masks.shape[1:]) != tuple(stuff.shape):
            got = None if found.masks is None else tuple(found.masks.shape)
            raise ValueError(f"merging needs masks (N, {stuff.shape[0]}, {stuff.shape[1]}), got {got}")
        segments = torch.zeros_like(stuff, dtype=torch.int64)
        labels, scores = [], []
        for index in found.scores.argsort(descending=True, stable=True).tolist():
            if float(found.scores[index]) < self.score:
                break
            mask = found.masks[index]
            free = mask & (segments == 0)
            area, left = int(mask.sum()), int(free.sum())
            if not left or area - left > self.overlap * area:
                continue
            labels.append(int(found.labels[index]))
            scores.append(float(found.scores[index]))
            segments[free] = len(labels)
        for label in stuff.unique().tolist():
            region = (stuff == label) & (segments == 0)
            if label and bool(region.any()) and int(region.sum()) >= self.stuff:
                labels.append(label)
                scores.append(1.0)
                segments[region] = len(labels)
        device = stuff.device
        return PanopticSegments(
            segments, torch.tensor(labels, dtype=torch.int64, device=device), torch.tensor(scores, device=device)
        )
