"""Voxels over the object's unit cube: from a global code, from a map whose channels are depth, from a volume.

Sources: Choy et al. 2016, 3D-R2N2 (arXiv:1604.00449), also in the feed-forward form used by Mescheder et al. 2019;
Gkioxari et al. 2019, Mesh R-CNN (arXiv:1906.02739), for the voxel tubes.
Differs: the last bias starts at the share of voxels that are occupied (as Lin et al. 2017 start a detector), or a short
training is spent on learning that bias.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.head import Head, View
from vision3dgen.layers import bed_of_nails
from vision3dgen.ops import isosurface
from vision3dgen.structures import GridSpec, Meshes

PRIOR = 0.1  # about the share of a unit cube that an object with longest edge 1 fills
SLOPE = 0.01  # of every leaky ReLU of 3D-R2N2


class VoxelGridHead(Head, ABC):
    """What heads share that predict logits (B, D, H, W) = (z, y, x) on a cubic grid over [-0.5, 0.5]^3.

    threshold: probability from which a voxel counts as occupied.
    """

    def __init__(self, resolution: int, threshold: float):
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}")
        self.grid = GridSpec.cube(resolution)
        self.threshold: float = threshold

    @abstractmethod
    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B D H W"]:
        """The logit of each voxel being occupied."""

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


class VoxelHead(VoxelGridHead):
    """3D transposed convolutions from one global code: code -> 2 width x 4^3, doubled until the resolution.

    channels: the backbone's; the coarsest map is averaged over space. resolution: 4 * 2^k.
    Differs: batch normalization after each transposed convolution.
    """

    def __init__(
        self, channels: list[int], *, resolution: int = 32, code_channels: int = 256, width: int = 128,
        threshold: float = 0.5,
    ):  # fmt: skip
        super().__init__(resolution, threshold)
        doublings = (resolution // 4).bit_length() - 1
        if resolution != 4 * 2**doublings or doublings < 1:
            raise ValueError(f"resolution must be 8, 16, 32, 64 or 128 (4 times a power of two), got {resolution}")
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


class VoxelTubeHead(VoxelGridHead):
    """A 2D network whose output channels are the depth axis: a column of voxels behind each cell of the coarsest map.

    The map is resized to half the resolution (bilinear); four 3x3 convolutions of `width` channels, a 2x2 transposed
    convolution with stride 2 and a 1x1 convolution give `resolution` channels, ReLU between. Sizes are Mesh R-CNN's.
    Differs: its voxels are aligned with the picture; here rows, columns and channels are the object's y, x and z, which
    the network has to learn from the picture's.
    """

    def __init__(
        self, channels: list[int], *, resolution: int = 32, width: int = 256, convolutions: int = 4,
        threshold: float = 0.5,
    ):  # fmt: skip
        super().__init__(resolution, threshold)
        if resolution < 2 or resolution % 2:
            raise ValueError(f"resolution must be even, the map is made at half of it, got {resolution}")
        if convolutions < 1:
            raise ValueError(f"convolutions must be at least 1, got {convolutions}")
        layers: list[nn.Module] = []
        inputs = channels[-1]
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.ReLU()]
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.convolutions = nn.Sequential(*layers)
        self.predictor = nn.Conv2d(width, resolution, 1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        assert self.predictor.bias is not None
        nn.init.constant_(self.predictor.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B D H W"]:
        side = self.grid.shape[0] // 2
        x = F.interpolate(features[-1], (side, side), mode="bilinear", align_corners=False)
        return self.predictor(self.convolutions(x))


class _ResidualUnpooling(nn.Module):
    """Unpooling to twice the side, two 3^3 convolutions, and a shortcut: the identity, 1^3, or 3^3 of the first."""

    def __init__(self, inputs: int, outputs: int, *, last: bool = False):
        super().__init__()
        self.first = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.last = last
        self.shortcut: nn.Module = nn.Identity()
        if last:
            self.shortcut = nn.Conv3d(outputs, outputs, 3, padding=1)
        elif inputs != outputs:
            self.shortcut = nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D2 H2 W2"]:
        x = x if self.last else bed_of_nails(x)
        first = F.leaky_relu(self.first(x), SLOPE)
        second = F.leaky_relu(self.second(first), SLOPE)
        return second + self.shortcut(first if self.last else x)


class VolumeHead(VoxelGridHead):
    """3D-R2N2's residual decoder: a volume (B, C, 4, 4, 4) to voxels by three unpoolings and a last block.

    channels: those of a multi-view encoder, whose volume comes last; resolution: eight times the volume's side. Blocks
    of widths 128, 128, 64, 32 in the paper: values unpooled to the first corner of each cell, two 3^3 convolutions,
    leaky ReLU, and a shortcut; the last block stays at its size and its shortcut convolves its own first layer, as in
    the released code. The two class scores of each voxel are given as their difference: its binary cross-entropy is the
    two-way softmax cross-entropy. threshold: 0.4 in the paper.
    """

    def __init__(
        self, channels: list[int], *, widths: tuple[int, int, int, int] = (128, 128, 64, 32), resolution: int = 32,
        threshold: float = 0.4,
    ):  # fmt: skip
        super().__init__(resolution, threshold)
        if resolution % 8 or resolution < 8:
            raise ValueError(f"resolution must be a multiple of 8, the volume is doubled three times, got {resolution}")
        sizes = [channels[-1], *widths]
        self.blocks = nn.ModuleList(
            _ResidualUnpooling(inputs, outputs, last=index == 3)
            for index, (inputs, outputs) in enumerate(zip(sizes, widths))
        )
        self.scores = nn.Conv3d(widths[-1], 2, 3, padding=1)  # of empty and occupied
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.scores.weight, std=0.001)
        assert self.scores.bias is not None
        with torch.no_grad():
            self.scores.bias[1] = math.log(PRIOR / (1 - PRIOR))

    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B D H W"]:
        x = features[-1]
        if x.ndim != 5 or 8 * x.shape[2] != self.grid.shape[0]:
            raise ValueError(
                f"the volume head takes a volume of {self.grid.shape[0] // 8}^3 cells for its resolution of "
                f"{self.grid.shape[0]}, got {tuple(x.shape)}: it stands behind a multi-view encoder of that size"
            )
        for block in self.blocks:
            x = block(x)
        empty, occupied = self.scores(x).unbind(1)
        return occupied - empty
