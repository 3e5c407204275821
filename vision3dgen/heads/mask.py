"""Which pixels of a region are the object's.

Source: He et al. 2017, Mask R-CNN (arXiv:1703.06870), section 3. Parameter names and defaults are torchvision's.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.box import labels_of
from vision3dgen.heads.pooling import Pooling
from vision3dgen.heads.roi import Canvas, RoIHead, Samples, Truth, positives
from vision3dgen.ops import paste_binary_masks, roi_align
from vision3dgen.structures import Detections

MASK_POOLING = Pooling(14)


class MaskHead(RoIHead):
    """A mask of twice the pooled resolution for each class, of which the region's own is used.

    Four 3x3 convolutions of `width` channels, a 2x2 transposed one of stride 2 and a 1x1 one. The loss is the mean
    binary cross-entropy of the true class' mask over the regions with an object. threshold: probability from which a
    pixel is the object's. Differs: the last layer starts small (deviation 0.001), or the first loss is several times
    log 2.
    """

    needs = ("masks",)

    def __init__(
        self, channels: list[int], strides: list[int], classes: int, *, width: int = 256, convolutions: int = 4,
        pooling: Pooling = MASK_POOLING, threshold: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}")
        self.classes, self.strides, self.pooling, self.threshold = classes, list(strides), pooling, threshold
        widths = [channels[pooling.levels(strides)[0]]] + [width] * convolutions
        self.mask_head = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
                for inputs, outputs in itertools.pairwise(widths)
            )
        )
        logits = nn.Conv2d(width, classes + 1, 1)  # one for background, never used
        self.mask_predictor = nn.Sequential(
            OrderedDict(
                conv5_mask=nn.ConvTranspose2d(widths[-1], width, 2, stride=2),
                relu=nn.ReLU(),
                mask_fcn_logits=logits,
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(logits.weight, std=0.001)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Float[Tensor, "_ 4"]]) -> Float[Tensor, "N K1 M M"]:
        """Logits for each class, background first."""
        return self.mask_predictor(self.mask_head(self.pooling(maps, boxes, self.strides))).float()

    def loss(
        self, maps: Sequence[Tensor], samples: Sequence[Samples], truths: Sequence[Truth], canvas: Canvas,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """ "mask"; the truth is the share of each cell that the object's mask fills."""
        own = positives(samples)
        logits = self(maps, [sample.boxes for sample in own])
        labels = torch.cat([sample.labels for sample in own])
        wanted = []
        for sample, truth in zip(own, truths):
            assert truth.masks is not None
            regions = torch.cat([sample.objects[:, None].to(sample.boxes.dtype), sample.boxes], dim=1)
            wanted.append(roi_align(truth.masks[:, None].float(), regions, logits.shape[-1])[:, 0])
        asked = logits[torch.arange(len(labels), device=labels.device), labels]  # (N, M, M)
        entropy = F.binary_cross_entropy_with_logits(asked, torch.cat(wanted), reduction="sum")
        return {"mask": entropy / max(asked.numel(), 1)}

    def probabilities(self, maps: Sequence[Tensor], found: Sequence[Detections]) -> list[Float[Tensor, "N M M"]]:
        """That each cell of each detection is the object's."""
        labels = labels_of(found)
        logits = self(maps, [own.boxes for own in found])
        own = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        return list(own.split([len(each.boxes) for each in found]))

    def find(self, maps: Sequence[Tensor], found: Sequence[Detections], canvas: Canvas) -> list[Detections]:
        """Masks at the size of each photograph as it was."""
        return [
            own._replace(masks=paste_binary_masks(masks, canvas.restored(index, own.boxes), size, self.threshold))
            for index, (own, masks, size) in enumerate(zip(found, self.probabilities(maps, found), canvas.originals))
        ]
