"""Voxels by 3D transposed convolutions from one global code.

Source: the decoder of Choy et al. 2016 (3D-R2N2) in the feed-forward form used by Mescheder et al. 2019:
code -> 256 x 4^3 -> three stride-2 transposed convolutions -> one logit per voxel.
Differs: batch normalization after each transposed convolution, and a last bias that starts at the share of voxels that
are occupied (as Lin et al. 2017 start a detector), or a short training is spent on learning that bias.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.head import Head, View
from vision3dgen.ops import isosurface
from vision3dgen.structures import GridSpec, Meshes

PRIOR = 0.1  # about the share of a unit cube that an object with longest edge 1 fills


class VoxelHead(Head):
    """Occupancy logits (B, D, H, W) = (z, y, x) on a cubic grid over [-0.5, 0.5]^3.

    channels: the backbone's; the coarsest map is averaged over space. resolution: 4 * 2^k. threshold: probability from
    which a voxel counts as occupied.
    """

    def __init__(
        self, channels: list[int], *, resolution: int = 32, code_channels: int = 256, width: int = 128,
        threshold: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        doublings = (resolution // 4).bit_length() - 1
        if resolution != 4 * 2**doublings or doublings < 1:
            raise ValueError(f"resolution must be 8, 16, 32, 64 or 128 (4 times a power of two), got {resolution}")
        self.grid = GridSpec.cube(resolution)
        self.threshold: float = threshold
        self.fc = nn.Linear(channels[-1], code_channels)
        self.fc_volume = nn.Linear(code_channels, width * 2 * 4**3)
        layers: list[nn.Module] = []
        inputs = width * 2
        for level in range(doublings):
            outputs = max(width >> level, 8)
            layers += [
                nn.ConvTranspose3d(inputs, outputs, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm3d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        last = nn.Conv3d(inputs, 1, 1)
        assert last.bias is not None
        nn.init.constant_(last.bias, math.log(PRIOR / (1 - PRIOR)))
        self.deconv = nn.Sequential(*layers, last)

    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B D H W"]:
        code = self.fc(features[-1].mean(dim=(2, 3))).relu()  # (B, K)
        volume = self.fc_volume(code).relu().view(len(code), -1, 4, 4, 4)
        return self.deconv(volume)[:, 0]

    def loss(self, prediction: Float[Tensor, "B D H W"], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean binary cross-entropy over voxels, against `batch["voxels"]` (B, D, H, W) on the head's own grid."""
        if batch["voxels"].shape != prediction.shape:
            raise ValueError(
                f"the voxel head predicts {tuple(prediction.shape[1:])}, but the data's voxels are "
                f"{tuple(batch['voxels'].shape[1:])}: set the head's resolution to the data's"
            )
        return {"loss": F.binary_cross_entropy_with_logits(prediction.float(), batch["voxels"].float())}

    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float:
        """Cross-entropy of the voxels with the prior that the last bias starts at."""
        share = float(batch["voxels"].float().mean())
        return -share * math.log(PRIOR) - (1 - share) * math.log(1 - PRIOR)

    def shape(self, prediction: Float[Tensor, "B D H W"]) -> Meshes:
        """The level set of the probabilities at `threshold`, closed where it reaches the grid's border."""
        return isosurface(prediction.detach().float().sigmoid(), self.grid, level=self.threshold)

    def occupancy(self, prediction: Float[Tensor, "B D H W"], points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        """Probability of the voxel each point falls in; 0 outside the grid."""
        index = self.grid.to_index(points).round().long()  # (B, N, 3) as x, y, z
        size = torch.tensor(self.grid.shape[::-1], device=points.device)
        inside = ((index >= 0) & (index < size)).all(-1)
        x, y, z = index.clamp_min(0).minimum(size - 1).unbind(-1)
        batch = torch.arange(len(points), device=points.device)[:, None]
        return prediction.float().sigmoid()[batch, z, y, x] * inside
