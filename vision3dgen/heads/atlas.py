"""Surfaces as the images of patches under learned maps.

Source: Groueix et al. 2018, AtlasNet (arXiv:1802.05384), in its released form: one network per patch takes a point of
the template and the code of the shape to a point in space,

    x = last_conv(f2(f1(f0(relu(bn1(conv1(p) + code))))))

with f of a 1x1 convolution, batch normalization and ReLU. Templates: unit squares, or one sphere. Training draws random
points of the template for every shape; evaluation takes a regular grid, whose faces make a mesh. Loss: squared chamfer
distance. Parameter names are the released code's `decoder.*`, and `fc` for the last layer of its image encoder.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.config import Named
from vision3dgen.heads.head import Head, View
from vision3dgen.heads.points import CHAMFER, CLOUD_LOSSES, CloudLoss, mean_distance, true_surface
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Meshes, Pointclouds

# --------------------------------------------------------------------------------------------------- templates


class Grid(NamedTuple):
    """Regular points of a template, and the triangles between them."""

    points: Tensor  # (P, N, d), for P patches
    faces: Tensor  # (F, 3) rows of the P * N points, patch after patch


class Template(ABC):
    """Where the points come from that are mapped to space: `patches` pieces of `dimensions` coordinates."""

    @property
    @abstractmethod
    def patches(self) -> int: ...

    @property
    @abstractmethod
    def dimensions(self) -> int: ...

    @property
    @abstractmethod
    def grid_points(self) -> int:
        """Regular points of the published evaluation."""

    @abstractmethod
    def random(self, shapes: int, points: int, *, like: Tensor) -> Float[Tensor, "B P N d"]:
        """`points` uniform points for each shape, as many on each patch, from torch's global generator."""

    @abstractmethod
    def regular(self, points: int) -> Grid:
        """`points` points in all, evenly spread; ValueError with the numbers that can be."""

    def check(self, points: int) -> None:
        """ValueError unless `points` random points can be divided among the patches."""
        if points < 1 or points % self.patches:
            below = points // self.patches * self.patches
            near = [count for count in (below, below + self.patches) if count > 0]
            raise ValueError(
                f"points must be a multiple of the {self.patches} patches, such as "
                f"{' or '.join(map(str, near))}, got {points}"
            )


@dataclass(frozen=True)
class Squares(Template):
    """`count` unit squares [0, 1]^2."""

    count: int = 25

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    @property
    def patches(self) -> int:
        return self.count

    @property
    def dimensions(self) -> int:
        return 2

    @property
    def grid_points(self) -> int:
        return 100 * self.count

    def random(self, shapes: int, points: int, *, like: Tensor) -> Float[Tensor, "B P N 2"]:
        return torch.rand(shapes, self.count, points // self.count, 2, device=like.device, dtype=like.dtype)

    def regular(self, points: int) -> Grid:
        side = round((max(points, 0) / self.count) ** 0.5)
        if side < 2 or self.count * side * side != points:
            accepted = [self.count * k * k for k in range(max(side - 1, 2), max(side - 1, 2) + 3)]
            raise ValueError(
                f"a regular grid on {self.count} squares has {self.count} * k^2 points with k > 1, such as "
                f"{', '.join(map(str, accepted))}, got {points}"
            )
        steps = torch.linspace(0, 1, side)
        square = torch.cartesian_prod(steps, steps)  # (k * k, 2), row after row
        corner = torch.cartesian_prod(torch.arange(side - 1), torch.arange(side - 1)) @ torch.tensor([side, 1])
        cell = torch.tensor([[0, side, 1], [1, side, side + 1]])
        faces = (corner[:, None, None] + cell).view(-1, 3)
        offsets = torch.arange(self.count)[:, None, None] * side * side
        return Grid(square.repeat(self.count, 1, 1), (offsets + faces).view(-1, 3))


@dataclass(frozen=True)
class Sphere(Template):
    """One unit sphere; its regular points are those of a divided icosahedron."""

    @property
    def patches(self) -> int:
        return 1

    @property
    def dimensions(self) -> int:
        return 3

    @property
    def grid_points(self) -> int:
        return 2562

    def random(self, shapes: int, points: int, *, like: Tensor) -> Float[Tensor, "B 1 N 3"]:
        return F.normalize(torch.randn(shapes, 1, points, 3, device=like.device, dtype=like.dtype), dim=3)

    def regular(self, points: int) -> Grid:
        accepted = [10 * 4**level + 2 for level in range(8)]
        if points not in accepted:
            raise ValueError(f"regular points of a sphere are {', '.join(map(str, accepted))}, got {points}")
        sphere = ico_sphere(accepted.index(points))
        return Grid(sphere.verts_packed()[None], sphere.faces_packed())


TEMPLATES: dict[str, type[Template]] = {"squares": Squares, "sphere": Sphere}
SQUARES = Squares()


# ----------------------------------------------------------------------------------------------------- outputs


class Output(ABC):
    """What `shape` gives for the mapped points of a regular grid."""

    points: int | None  # of the grid; None for the published number of the template

    @abstractmethod
    def build(self, points: Float[Tensor, "B N 3"], faces: Int[Tensor, "F 3"]) -> Meshes | Pointclouds:
        """One shape per batch member."""


@dataclass(frozen=True)
class AsMesh(Output):
    """The mapped grids with their triangles: a sphere, or open patches that may overlap and need not meet."""

    points: int | None = None

    def build(self, points: Float[Tensor, "B N 3"], faces: Int[Tensor, "F 3"]) -> Meshes:
        return Meshes(list(points), [faces] * len(points))


@dataclass(frozen=True)
class AsCloud(Output):
    """The mapped points alone."""

    points: int | None = None

    def build(self, points: Float[Tensor, "B N 3"], faces: Int[Tensor, "F 3"]) -> Pointclouds:
        return Pointclouds(list(points))


OUTPUTS: dict[str, type[Output]] = {"mesh": AsMesh, "cloud": AsCloud}
MESH = AsMesh()


# ----------------------------------------------------------------------------------------------------- network


class PatchDecoder(nn.Module):
    """The map of one patch: points (B, d, N) and codes (B, K) to points in space (B, 3, N)."""

    def __init__(self, dimensions: int, code_channels: int, hidden: int = 512):
        super().__init__()
        self.conv1 = nn.Conv1d(dimensions, code_channels, 1)
        self.conv2 = nn.Conv1d(code_channels, hidden, 1)
        self.conv_list = nn.ModuleList(nn.Conv1d(hidden, hidden, 1) for _ in range(2))
        self.last_conv = nn.Conv1d(hidden, 3, 1)
        self.bn1 = nn.BatchNorm1d(code_channels)
        self.bn2 = nn.BatchNorm1d(hidden)
        self.bn_list = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(2))

    def forward(self, points: Float[Tensor, "B d N"], code: Float[Tensor, "B K"]) -> Float[Tensor, "B 3 N"]:
        x = self.bn1(self.conv1(points) + code[:, :, None]).relu()
        x = self.bn2(self.conv2(x)).relu()
        for convolution, norm in zip(self.conv_list, self.bn_list):
            x = norm(convolution(x)).relu()
        return self.last_conv(x)


@dataclass(frozen=True)
class Atlas:
    """The predicted surfaces of a batch: call it with template points (B, P, N, d) for points in space (B, P, N, 3)."""

    decoder: nn.ModuleList  # a map for each of the P patches
    code: Float[Tensor, "B K"]

    def __call__(self, points: Float[Tensor, "B P N d"]) -> Float[Tensor, "B P N 3"]:
        mapped = [decode(points[:, patch].mT, self.code).mT for patch, decode in enumerate(self.decoder)]
        return torch.stack(mapped, dim=1)

    def __len__(self) -> int:
        return len(self.code)


class AtlasHead(Head):
    """AtlasNet: patches mapped to the surface by networks that know the shape by a global code.

    template: `Squares(25)` or `Sphere()`. points: drawn per shape in training. output: whether `shape` gives a mesh or
    a cloud, and how fine. The code is the mean of the coarsest map after one linear layer, 1024 numbers in the paper.
    Raises ValueError for numbers of points that the template cannot have.
    """

    def __init__(
        self, channels: list[int], *, template: Annotated[Template, Named(TEMPLATES, "squares")] = SQUARES,
        points: int = 2500, code_channels: int = 1024, hidden: int = 512,
        output: Annotated[Output, Named(OUTPUTS, "mesh")] = MESH,
        distance: Annotated[CloudLoss, Named(CLOUD_LOSSES, "chamfer")] = CHAMFER,
    ):  # fmt: skip
        super().__init__()
        template.check(points)
        grid = template.regular(template.grid_points if output.points is None else output.points)
        self.template, self.points, self.output, self.distance = template, points, output, distance
        self.grid: Tensor
        self.faces: Tensor
        self.register_buffer("grid", grid.points, persistent=False)
        self.register_buffer("faces", grid.faces, persistent=False)
        self.fc = nn.Linear(channels[-1], code_channels)
        self.decoder = nn.ModuleList(
            PatchDecoder(template.dimensions, code_channels, hidden) for _ in range(template.patches)
        )

    def forward(self, features: list[Tensor], view: View | None = None) -> Atlas:
        return Atlas(self.decoder, self.fc(features[-1].mean(dim=(2, 3))))

    def loss(self, prediction: Atlas, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`distance` to `batch["surface"]` from random points of the template in training, else from the grid's."""
        if self.training:
            points = prediction(self.template.random(len(prediction), self.points, like=self.grid)).flatten(1, 2)
        else:
            points = self.grid_of(prediction)
        return {"loss": self.distance(points.float(), true_surface(batch)).mean()}

    def grid_of(self, prediction: Atlas) -> Float[Tensor, "B N 3"]:
        """The regular grid, mapped."""
        return prediction(self.grid.expand(len(prediction), *self.grid.shape)).flatten(1, 2)

    def validation_metrics(self, prediction: Atlas, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, " B"]]:
        """ "chamfer": the mean distance of both directions from the grid, in units of the longest edge."""
        return {"chamfer": mean_distance(self.grid_of(prediction).float(), true_surface(batch))}

    @torch.no_grad()
    def shape(self, prediction: Atlas) -> Meshes | Pointclouds:
        """The regular grid, mapped, as `output` says."""
        return self.output.build(self.grid_of(prediction).float(), self.faces)
