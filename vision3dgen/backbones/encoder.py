"""Encoders of shapes given in three dimensions: a cloud or voxels to maps, as a backbone turns images into maps.

Heads need not know which they stand on. Sources: the point and voxel encoders of Occupancy Networks (Mescheder et al.
2019, arXiv:1812.03828), and those with local features of Convolutional Occupancy Networks (Peng et al. 2020,
arXiv:2003.04618), both with the authors' parameter names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.backbones.points import PointEncoder, as_clouds
from vision3dgen.checks import check_shape
from vision3dgen.layers import ResidualLinear, UNet, UNet3d
from vision3dgen.ops.planes import FeatureLayout, maximum_by_cell, mean_by_cell
from vision3dgen.structures import GridSpec, Pointclouds


class Encoder(nn.Module, ABC):
    """A batch of shapes to a list of maps of `channels`.

    takes: the key of the batch that holds the shapes. layout: None where the list holds one code of each shape, as a
    map (B, C, 1, 1), which any head for images takes; else it holds local features, a map (B, C, *sides) for each plane
    of the layout, in its order.
    """

    takes: Literal["cloud", "voxels"]
    channels: list[int]
    layout: FeatureLayout | None = None

    @abstractmethod
    def forward(self, shapes: Any) -> list[Tensor]:
        """Maps of point clouds (`Pointclouds`, or padded points (B, N, 3)) or voxels (B, D, H, W)."""


class PointCode(Encoder):
    """The code of any point encoder."""

    takes = "cloud"

    def __init__(self, network: PointEncoder):
        super().__init__()
        self.network = network
        self.channels = [network.code_channels]

    def forward(self, shapes: Pointclouds | Float[Tensor, "B N D"]) -> list[Tensor]:
        return [self.network(shapes).code[..., None, None]]


class VoxelEncoder(Encoder):
    """Five 3D convolutions, the last four of stride 2, and a linear layer: Occupancy Networks' for voxels.

    resolution: cells along each edge of the voxels, a multiple of 16. The authors' volumes are (x, y, z), and so are
    the axes of these weights; voxels (B, D, H, W) = (z, y, x) are turned here.
    """

    takes = "voxels"

    def __init__(self, *, code_channels: int = 256, resolution: int = 32):
        super().__init__()
        if resolution < 16 or resolution % 16:
            raise ValueError(f"resolution must be a multiple of 16, got {resolution}")
        self.resolution = resolution
        self.channels = [code_channels]
        self.conv_in = nn.Conv3d(1, 32, 3, padding=1)
        self.conv_0 = nn.Conv3d(32, 64, 3, padding=1, stride=2)
        self.conv_1 = nn.Conv3d(64, 128, 3, padding=1, stride=2)
        self.conv_2 = nn.Conv3d(128, 256, 3, padding=1, stride=2)
        self.conv_3 = nn.Conv3d(256, 512, 3, padding=1, stride=2)
        self.fc = nn.Linear(512 * (resolution // 16) ** 3, code_channels)

    def forward(self, shapes: Float[Tensor, "B D H W"]) -> list[Tensor]:
        _check_voxels(shapes, self.resolution)
        x = shapes.permute(0, 3, 2, 1)[:, None]  # (B, 1, x, y, z)
        for convolution in (self.conv_in, self.conv_0, self.conv_1, self.conv_2, self.conv_3):
            x = convolution(x).relu()
        return [self.fc(x.flatten(1))[..., None, None]]


def _check_voxels(voxels: Tensor, resolution: int | None = None) -> None:
    expected = "B D D D" if resolution is None else f"B {resolution} {resolution} {resolution}"
    check_shape(voxels=(voxels, expected))


# ----------------------------------------------------------------------------------------------- local features


class LocalEncoder(Encoder):
    """Features of places, averaged in the cells of each plane of a layout, through a U-Net that all planes share.

    depth: levels of the U-Net of planes (0 for none) with `width` channels at the finest; levels: the grid's.
    """

    layout: FeatureLayout

    def __init__(self, layout: FeatureLayout, code_channels: int, depth: int, levels: int, width: int):
        super().__init__()
        self.layout = layout
        self.code_channels = code_channels
        self.channels = [code_channels] * len(layout.planes)
        flat = any(plane != "grid" for plane in layout.planes)
        self.unet = UNet(code_channels, code_channels, depth=depth, width=width) if flat and depth else None
        volume = "grid" in layout.planes and levels > 0
        self.unet3d = UNet3d(code_channels, code_channels, levels=levels, width=width) if volume else None
        if self.unet is not None and layout.resolution % self.unet.factor:
            raise ValueError(
                f"resolution must be a multiple of {self.unet.factor} for a U-Net of depth {depth}, got "
                f"{layout.resolution}"
            )
        if self.unet3d is not None and layout.grid_resolution < self.unet3d.factor:
            raise ValueError(
                f"grid_resolution must be at least {self.unet3d.factor} for a U-Net of {levels} levels, got "
                f"{layout.grid_resolution}"
            )

    def spread(
        self, features: Float[Tensor, "P C"], points: Float[Tensor, "P 3"], owner: Int[Tensor, " P"], batch: int
    ) -> list[Tensor]:
        """The maps of packed features at points, each of the member `owner` of the batch."""
        maps = []
        for plane in self.layout.planes:
            sides = self.layout.sides(plane)
            count = torch.Size(sides).numel()
            means = mean_by_cell(features, owner * count + self.layout.cells(points, plane), batch * count)
            values = means.view(batch, *sides, -1).movedim(-1, 1)  # the first axis counts fastest, so it comes last
            network = self.unet3d if plane == "grid" else self.unet
            maps.append(values if network is None else network(values))
        return maps


class LocalPoolPointnet(LocalEncoder):
    """Residual layers on each point, each seeing the maxima over its cells of the one before, then `LocalEncoder`.

    The maxima of several planes are summed. Source: Peng et al. 2020, section 3.1; `hidden` channels, `blocks` layers.
    """

    takes = "cloud"

    def __init__(
        self, layout: FeatureLayout | None = None, *, code_channels: int = 32, hidden: int = 32, blocks: int = 5,
        depth: int = 4, levels: int = 3, width: int = 32,
    ):  # fmt: skip
        super().__init__(layout or FeatureLayout(), code_channels, depth, levels, width)
        self.fc_pos = nn.Linear(3, 2 * hidden)
        self.blocks = nn.ModuleList(ResidualLinear(2 * hidden, hidden) for _ in range(blocks))
        self.fc_c = nn.Linear(hidden, code_channels)

    def forward(self, shapes: Pointclouds | Float[Tensor, "B N D"]) -> list[Tensor]:
        clouds = as_clouds(shapes)
        points, owner, batch = clouds.packed, clouds.owner, len(clouds.lengths)
        cells = [self._used_cells(points, owner, plane) for plane in self.layout.planes]
        x = self.fc_pos(points)
        for number, block in enumerate(self.blocks):
            if number:
                pooled = torch.stack([maximum_by_cell(x, index) for index in cells]).sum(0)
                x = torch.cat([x, pooled], dim=1)
            x = block(x)
        return self.spread(self.fc_c(x), points, owner, batch)

    def _used_cells(self, points: Float[Tensor, "P 3"], owner: Int[Tensor, " P"], plane: str) -> Int[Tensor, " P"]:
        """The cell of each point, among the cells that hold any."""
        count = torch.Size(self.layout.sides(plane)).numel()
        return (owner * count + self.layout.cells(points, plane)).unique(return_inverse=True)[1]


class LocalVoxelEncoder(LocalEncoder):
    """One 3^3 convolution of voxels, then `LocalEncoder`: Convolutional Occupancy Networks' for voxels.

    The places are the authors': the outermost voxels lie on the faces of [-0.5, 0.5]^3, half a voxel outside their
    centers. Axes of the weights as for `VoxelEncoder`.
    """

    takes = "voxels"

    def __init__(
        self, layout: FeatureLayout | None = None, *, code_channels: int = 32, depth: int = 4, levels: int = 3,
        width: int = 32,
    ):  # fmt: skip
        super().__init__(layout or FeatureLayout(), code_channels, depth, levels, width)
        self.conv_in = nn.Conv3d(1, code_channels, 3, padding=1)

    def forward(self, shapes: Float[Tensor, "B D H W"]) -> list[Tensor]:
        _check_voxels(shapes)
        batch, side = shapes.shape[:2]
        x = self.conv_in(shapes.permute(0, 3, 2, 1)[:, None]).relu()  # (B, C, x, y, z)
        grid = GridSpec((-0.5,) * 3, (1 / max(side - 1, 1),) * 3, (side,) * 3, "corner")
        points = grid.points(device=x.device).permute(2, 1, 0, 3).reshape(-1, 3)  # x slowest, as the features
        owner = torch.arange(batch, device=x.device).repeat_interleave(len(points))
        features = x.flatten(2).transpose(1, 2).flatten(0, 1)  # (B x y z, C)
        return self.spread(features, points.to(x.dtype).repeat(batch, 1), owner, batch)


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "point_code": PointCode,
    "voxel_code": VoxelEncoder,
    "local_pool_pointnet": LocalPoolPointnet,
    "local_voxels": LocalVoxelEncoder,
}
