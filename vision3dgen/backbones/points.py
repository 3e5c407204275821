"""Encoders of point clouds: points (B, N, 3), ragged, to one code per cloud and features per point.

Sources: PointNet, Qi et al. 2017 (arXiv:1612.00593); PointNet++, Qi et al. 2017b (arXiv:1706.02413); DGCNN, Wang et al.
2019 (arXiv:1801.07829); the residual PointNet of Occupancy Networks, Mescheder et al. 2019 (arXiv:1812.03828), whose
published weights load with strict=True. Clouds are packed while they are encoded, so padding enters neither maxima nor
batch statistics. The maximum over an empty cloud is 0. Letters: P points of all clouds together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vision3dgen.checks import check_shape
from vision3dgen.layers import ResidualLinear
from vision3dgen.ops import ball_query, knn_gather, knn_points, sample_farthest_points
from vision3dgen.ops.points import PointcloudsLike


class PointFeatures(NamedTuple):
    """What an encoder says of a batch of clouds."""

    code: Tensor  # (B, code_channels)
    features: Tensor  # (B, N, channels), zero beyond each length
    transform: Tensor | None = None  # (B, 64, 64), PointNet's, to be kept near orthogonal


class Clouds(NamedTuple):
    """A ragged batch in both forms."""

    padded: Float[Tensor, "B N 3"]
    lengths: Int[Tensor, " B"]
    exists: Bool[Tensor, "B N"]  # row-major, its true entries are the packed points

    @property
    def packed(self) -> Float[Tensor, "P 3"]:
        return self.padded[self.exists]

    @property
    def owner(self) -> Int[Tensor, " P"]:
        return self.exists.nonzero()[:, 0]

    @property
    def first(self) -> Int[Tensor, " B"]:
        """The packed row at which each cloud begins."""
        return self.lengths.cumsum(0) - self.lengths

    def pad(self, packed: Float[Tensor, "P C"]) -> Float[Tensor, "B N C"]:
        padded = packed.new_zeros(*self.exists.shape, packed.shape[1])
        padded[self.exists] = packed
        return padded

    def maximum(self, packed: Float[Tensor, "P C"]) -> Float[Tensor, "B C"]:
        """The maximum over the points of each cloud, 0 for one without any."""
        rows = self.owner[:, None].expand_as(packed)
        return packed.new_zeros(len(self.lengths), packed.shape[1]).scatter_reduce(
            0, rows, packed, "amax", include_self=False
        )


def clouds_of(padded: Float[Tensor, "B N 3"], lengths: Int[Tensor, " B"]) -> Clouds:
    exists = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return Clouds(padded.where(exists[..., None], 0), lengths, exists)


def as_clouds(points: Float[Tensor, "B N D"] | PointcloudsLike, lengths: Int[Tensor, " B"] | None = None) -> Clouds:
    """Padded points with their lengths (all of them without), or a batch of point clouds; a ValueError if not that."""
    if not isinstance(points, Tensor):
        cloud: PointcloudsLike = points
        points, lengths = cloud.points_padded(), cloud.num_points_per_cloud()
    size = check_shape(points=(points, "B N 3"))
    if lengths is None:
        lengths = torch.full((size["B"],), size["N"], device=points.device)
    check_shape(lengths=(lengths, str(size["B"])))
    if size["B"] and not 0 <= int(lengths.min()) <= int(lengths.max()) <= size["N"]:
        raise ValueError(f"lengths must be from 0 to the {size['N']} points given, got {lengths.tolist()}")
    return clouds_of(points, lengths.to(points.device))


class PointEncoder(nn.Module, ABC):
    """Point clouds to `PointFeatures`, with `code_channels` and `channels` (of the features of a point)."""

    code_channels: int
    channels: int

    def forward(
        self, points: Float[Tensor, "B N D"] | PointcloudsLike, lengths: Int[Tensor, " B"] | None = None
    ) -> PointFeatures:
        """Encode padded points with their lengths (all of them without), or a batch of point clouds."""
        clouds = as_clouds(points, lengths)
        count = int(clouds.lengths.sum())
        if self.training and count < 2 and any(isinstance(m, nn.BatchNorm1d) for m in self.modules()):
            raise ValueError(
                f"batch normalization in training needs two points or more, got {count} in {len(clouds.lengths)} clouds"
            )
        return self.encode(clouds)

    @abstractmethod
    def encode(self, clouds: Clouds) -> PointFeatures:
        """What `forward` returns for a checked batch."""


def shared_mlp(*widths: int) -> nn.Sequential:
    """Linear, batch norm and ReLU on each row, through these widths."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


# ----------------------------------------------------------------------------------------------------- PointNet


class TransformNet(nn.Module):
    """A matrix (B, size, size) for each cloud, from its points' features; it starts as the identity."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.local = shared_mlp(size, 64, 128, 1024)
        self.fc = shared_mlp(1024, 512, 256)
        self.matrix = nn.Linear(256, size * size)
        nn.init.zeros_(self.matrix.weight)
        nn.init.zeros_(self.matrix.bias)

    def forward(self, clouds: Clouds, packed: Float[Tensor, "P C"]) -> Float[Tensor, "B C C"]:
        if self.training and len(clouds.lengths) == 1:
            raise ValueError(
                "PointNet's transforms normalize over clouds, and one cloud has no batch statistics: train on two or "
                "more, or build it with transforms=False"
            )
        matrix = self.matrix(self.fc(clouds.maximum(self.local(packed)))).unflatten(1, (self.size, self.size))
        return matrix + torch.eye(self.size, device=matrix.device, dtype=matrix.dtype)


class PointNet(PointEncoder):
    """Each point through the same network, then a maximum: code of 1024, features of 64 (before the maximum's layers).

    `transforms` adds the learned 3x3 and 64x64 matrices of the paper; see `orthogonality`.
    """

    def __init__(self, *, code_channels: int = 1024, transforms: bool = True):
        super().__init__()
        self.code_channels, self.channels = code_channels, 64
        self.input_transform = TransformNet(3) if transforms else None
        self.feature_transform = TransformNet(64) if transforms else None
        self.local = shared_mlp(3, 64, 64)
        self.deep = shared_mlp(64, 64, 128)
        self.last = nn.Sequential(nn.Linear(128, code_channels, bias=False), nn.BatchNorm1d(code_channels))

    def encode(self, clouds: Clouds) -> PointFeatures:
        x = clouds.packed
        if self.input_transform is not None:
            x = _transformed(x, self.input_transform(clouds, x), clouds.owner)
        x = self.local(x)
        matrix = None
        if self.feature_transform is not None:
            matrix = self.feature_transform(clouds, x)
            x = _transformed(x, matrix, clouds.owner)
        return PointFeatures(clouds.maximum(self.last(self.deep(x))), clouds.pad(x), matrix)


def _transformed(
    x: Float[Tensor, "P C"], matrix: Float[Tensor, "B C C"], owner: Int[Tensor, " P"]
) -> Float[Tensor, "P C"]:
    return torch.einsum("pc,pcd->pd", x, matrix[owner])


def orthogonality(matrix: Float[Tensor, "B C C"]) -> Float[Tensor, " B"]:
    """|I - A A'|^2 of each matrix, which PointNet adds to its loss with weight 0.001 (equation 2)."""
    identity = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    return (identity - matrix @ matrix.mT).square().sum(dim=(1, 2))


# --------------------------------------------------------------------------------------------------- PointNet++


class SetAbstraction(nn.Module):
    """Farthest points as centers, each with the maximum over a ball of a network on (features, offset)."""

    def __init__(self, count: int, radius: float, neighbors: int, *widths: int):
        super().__init__()
        # deferred: importing torch-geometric takes as long as importing torch
        from torch_geometric.nn import PointNetConv

        self.count, self.radius, self.neighbors = count, radius, neighbors
        self.conv = PointNetConv(shared_mlp(*widths), add_self_loops=False)

    def forward(self, clouds: Clouds, packed: Float[Tensor, "P C"] | None) -> tuple[Clouds, Float[Tensor, "S C2"]]:
        count = min(self.count, clouds.padded.shape[1])
        positions, _ = sample_farthest_points(clouds.padded, clouds.lengths, K=count)
        centers = clouds_of(positions, clouds.lengths.clamp(max=count))
        near = ball_query(
            centers.padded, clouds.padded, centers.lengths, clouds.lengths, self.neighbors, self.radius, False
        ).idx  # (B, S, K), -1 where there are fewer
        edges = _edges(near, near >= 0, clouds, centers)
        return centers, self.conv((packed, None), (clouds.packed, centers.packed), edges)


def _edges(
    idx: Int[Tensor, "B S K"], found: Bool[Tensor, "B S K"], sources: Clouds, targets: Clouds
) -> Int[Tensor, "2 E"]:
    """Packed (source, target) pairs of neighbors idx into the padded sources."""
    member, target, _ = found.nonzero().unbind(1)
    return torch.stack([sources.first[member] + idx[found], targets.first[member] + target])


class Propagation(nn.Module):
    """Features of centers at more points: the three nearest weighted by inverse squared distance, then a network."""

    def __init__(self, *widths: int):
        super().__init__()
        self.mlp = shared_mlp(*widths)

    def forward(
        self, clouds: Clouds, own: Float[Tensor, "P C"], centers: Clouds, packed: Float[Tensor, "S C2"]
    ) -> Float[Tensor, "P C3"]:
        near = knn_points(clouds.padded, centers.padded, clouds.lengths, centers.lengths, K=3)
        found = torch.arange(3, device=near.idx.device) < centers.lengths[:, None, None]  # (B, 1, 3)
        weight = (1 / (near.dists + 1e-8)).where(found, 0)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-8)
        rows = knn_gather(centers.pad(packed), near.idx, centers.lengths)  # (B, N, 3, C2)
        interpolated = (rows * weight[..., None].to(rows.dtype)).sum(2)
        return self.mlp(torch.cat([own, interpolated[clouds.exists]], dim=1))


class PointNet2(PointEncoder):
    """Single-scale grouping: two levels of balls and a global one, and back: code of 1024, features of 128.

    counts, radii, neighbors: of the two levels. The radii suit clouds whose longest edge is 1; the paper's are 0.2 and
    0.4 for clouds of radius 1. Centers are found from the first point of each cloud on, and a ball with more points
    than `neighbors` keeps those that come first, so the order of the points matters a little.
    """

    def __init__(
        self,
        *,
        counts: tuple[int, int] = (512, 128),
        radii: tuple[float, float] = (0.1, 0.2),
        neighbors: tuple[int, int] = (32, 64),
    ):
        super().__init__()
        self.code_channels, self.channels = 1024, 128
        self.fine = SetAbstraction(counts[0], radii[0], neighbors[0], 3, 64, 64, 128)
        self.coarse = SetAbstraction(counts[1], radii[1], neighbors[1], 128 + 3, 128, 128, 256)
        self.all = shared_mlp(256 + 3, 256, 512, 1024)
        self.back_coarse = shared_mlp(256 + 1024, 256, 256)
        self.back_fine = Propagation(128 + 256, 256, 128)
        self.back = Propagation(3 + 128, 128, 128, 128)

    def encode(self, clouds: Clouds) -> PointFeatures:
        fine, at_fine = self.fine(clouds, None)
        coarse, at_coarse = self.coarse(fine, at_fine)
        code = coarse.maximum(self.all(torch.cat([at_coarse, coarse.packed], dim=1)))
        back = self.back_coarse(torch.cat([at_coarse, code[coarse.owner]], dim=1))
        back = self.back_fine(fine, at_fine, coarse, back)
        return PointFeatures(code, clouds.pad(self.back(clouds, clouds.packed, fine, back)))


# -------------------------------------------------------------------------------------------------------- DGCNN


class DGCNN(PointEncoder):
    """Edge convolutions over neighbors found anew in each layer's own features: code of 1024, features of 512.

    neighbors: the point itself and the nearest others, all where a cloud has fewer.
    Differs: the code is the maximum alone, without the mean the authors' classifier adds.
    """

    def __init__(self, *, neighbors: int = 20, widths: Sequence[int] = (64, 64, 128, 256), code_channels: int = 1024):
        super().__init__()
        from torch_geometric.nn import EdgeConv  # deferred, as above

        self.code_channels, self.channels = code_channels, sum(widths)
        self.neighbors = neighbors
        self.convs = nn.ModuleList(
            EdgeConv(_edge_mlp(2 * inputs, width)) for inputs, width in zip((3, *widths), widths)
        )
        self.last = _edge_mlp(sum(widths), code_channels)

    def encode(self, clouds: Clouds) -> PointFeatures:
        x, layers = clouds.packed, []
        for conv in self.convs:
            padded = clouds.pad(x.detach())
            near = knn_points(padded, padded, clouds.lengths, clouds.lengths, K=self.neighbors).idx  # (B, N, K)
            rank = torch.arange(self.neighbors, device=near.device)
            found = (rank < clouds.lengths[:, None, None]) & clouds.exists[..., None]
            x = conv(x, _edges(near, found, clouds, clouds))
            layers.append(x)
        x = torch.cat(layers, dim=1)
        return PointFeatures(clouds.maximum(self.last(x)), clouds.pad(x))


def _edge_mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.LeakyReLU(0.2))


# ------------------------------------------------------------------------------------ Occupancy Networks' encoder


class ResnetPointnet(PointEncoder):
    """Five residual layers on each point, each seeing the maximum of the one before; no normalization."""

    def __init__(self, *, code_channels: int = 512, hidden: int = 512):
        super().__init__()
        self.code_channels, self.channels = code_channels, hidden
        self.fc_pos = nn.Linear(3, 2 * hidden)
        self.block_0 = ResidualLinear(2 * hidden, hidden)
        self.block_1 = ResidualLinear(2 * hidden, hidden)
        self.block_2 = ResidualLinear(2 * hidden, hidden)
        self.block_3 = ResidualLinear(2 * hidden, hidden)
        self.block_4 = ResidualLinear(2 * hidden, hidden)
        self.fc_c = nn.Linear(hidden, code_channels)

    def encode(self, clouds: Clouds) -> PointFeatures:
        x = self.block_0(self.fc_pos(clouds.packed))
        for block in (self.block_1, self.block_2, self.block_3, self.block_4):
            x = block(torch.cat([x, clouds.maximum(x)[clouds.owner]], dim=1))
        return PointFeatures(self.fc_c(clouds.maximum(x).relu()), clouds.pad(x))


POINT_ENCODERS: dict[str, Callable[..., PointEncoder]] = {
    "pointnet": PointNet,
    "pointnet2": PointNet2,
    "dgcnn": DGCNN,
    "resnet_pointnet": ResnetPointnet,
}
