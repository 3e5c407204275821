"""Point sets: a fixed number of points from the maps of an image, in the object frame.

Source: Fan et al. 2017, A Point Set Generation Network (arXiv:1612.00603), and its port beside Occupancy Networks
(arXiv:1803.02828's successor code), whose decoder's parameter names and sizes the simple network has.
Loss: the squared chamfer distance, or the earth mover's distance, to points drawn on the true surface.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.config import Named
from vision3dgen.heads.head import Head, View
from vision3dgen.losses import chamfer_distance, earth_movers_distance
from vision3dgen.structures import Pointclouds

# ------------------------------------------------------------------------------------------------------ losses


class CloudLoss(ABC):
    """A distance between predicted points and true clouds that can be trained."""

    @abstractmethod
    def __call__(self, points: Float[Tensor, "B N 3"], truth: Pointclouds) -> Float[Tensor, " B"]:
        """One value per item; 0, with its graph, where the true cloud is empty."""


@dataclass(frozen=True)
class ChamferLoss(CloudLoss):
    """Mean squared distance to the nearest neighbor, both directions summed; clouds of any sizes."""

    def __call__(self, points: Float[Tensor, "B N 3"], truth: Pointclouds) -> Float[Tensor, " B"]:
        return chamfer_distance(points, truth, batch_reduction=None).loss


@dataclass(frozen=True)
class EarthMoversLoss(CloudLoss):
    """Least mean of |x - y|^power over all ways to move one cloud onto the other.

    method: "exact" pairs points one to one, so that clouds must have one size (0.1 s for 1,024 points); "entropic"
    takes any sizes. The gradient is that of the pairs found, held fixed.
    """

    method: Literal["exact", "entropic"] = "exact"
    power: Literal[1, 2] = 1

    def __call__(self, points: Float[Tensor, "B N 3"], truth: Pointclouds) -> Float[Tensor, " B"]:
        if self.method == "exact":
            own = points.shape[1]
            for index, count in enumerate(truth.num_points_per_cloud().tolist()):
                if count not in (0, own):
                    raise ValueError(
                        f"the exact earth mover's distance pairs points one to one: {own} are predicted, the surface "
                        f"of item {index} has {count}; set surface_points of the data to {own}, or method to entropic"
                    )
        return earth_movers_distance(points, truth, method=self.method, power=self.power).distance


CLOUD_LOSSES: dict[str, type[CloudLoss]] = {"chamfer": ChamferLoss, "earth_movers": EarthMoversLoss}
CHAMFER = ChamferLoss()


def true_surface(batch: Mapping[str, Any]) -> Pointclouds:
    """`batch["surface"]`, or a ValueError that says where it comes from."""
    if "surface" not in batch:
        raise ValueError(
            "a head that predicts points learns from batch['surface'], which this batch does not have: add 'surface' "
            f"to the data's fields, and say how many points with surface_points; it has {sorted(batch)}"
        )
    return batch["surface"]


def mean_distance(points: Float[Tensor, "B N 3"], truth: Pointclouds) -> Float[Tensor, " B"]:
    """Mean (unsquared) distance to the nearest neighbor, averaged over both directions; 0 for an empty true cloud."""
    found = chamfer_distance(points, truth, batch_reduction=None, point_reduction=None).loss
    counts = (points.new_full((len(points),), points.shape[1]), truth.num_points_per_cloud().to(points.device))
    sides = [squared.sqrt().sum(1) / count.clamp(min=1) for squared, count in zip(found, counts)]
    return (sides[0] + sides[1]) / 2


# ----------------------------------------------------------------------------------------------------- networks


class PointSetHead(Head, ABC):
    """What point set networks share: predictions are points (B, N, 3), the truth is `batch["surface"]`."""

    def __init__(self, points: int, distance: CloudLoss):
        super().__init__()
        if points < 1:
            raise ValueError(f"points must be at least 1, got {points}")
        self.points = points
        self.distance = distance

    @abstractmethod
    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B N 3"]:
        """The points of each image."""

    def loss(self, prediction: Float[Tensor, "B N 3"], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The mean over items of `distance` to `batch["surface"]`; an item without a true point counts 0."""
        return {"loss": self.distance(prediction.float(), true_surface(batch)).mean()}

    def validation_metrics(
        self, prediction: Float[Tensor, "B N 3"], batch: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, " B"]]:
        """ "chamfer": the mean distance of both directions, in units of the longest edge."""
        return {"chamfer": mean_distance(prediction.float(), true_surface(batch))}

    def shape(self, prediction: Float[Tensor, "B N 3"]) -> Pointclouds:
        return Pointclouds(prediction.detach().float())


class PointDecoder(nn.Module):
    """Codes (B, K) to points (B, N, 3) by four fully connected layers of `hidden` units."""

    def __init__(self, code_channels: int, points: int, hidden: int = 512):
        super().__init__()
        self.fc_0 = nn.Linear(code_channels, hidden)
        self.fc_1 = nn.Linear(hidden, hidden)
        self.fc_2 = nn.Linear(hidden, hidden)
        self.fc_out = nn.Linear(hidden, 3 * points)

    def forward(self, code: Float[Tensor, "B K"]) -> Float[Tensor, "B N 3"]:
        x = self.fc_1(self.fc_0(code).relu())
        return self.fc_out(self.fc_2(x.relu()).relu()).unflatten(1, (-1, 3))


class PointHead(PointSetHead):
    """Points from a global code: the mean of the coarsest map, one linear layer, and `PointDecoder`."""

    def __init__(
        self, channels: list[int], *, points: int = 1024, code_channels: int = 256, hidden: int = 512,
        distance: Annotated[CloudLoss, Named(CLOUD_LOSSES, "chamfer")] = CHAMFER,
    ):  # fmt: skip
        super().__init__(points, distance)
        self.fc = nn.Linear(channels[-1], code_channels)
        self.decoder = PointDecoder(code_channels, points, hidden)

    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B N 3"]:
        return self.decoder(self.fc(features[-1].mean(dim=(2, 3))))


class TwoBranchPointHead(PointSetHead):
    """Points from two branches: N - 768 fully connected ones, and 768 as the three channels of a 24 x 32 map.

    The coarsest map, averaged to 3 x 4 cells of `width` channels, feeds both. The convolutional branch doubles it three
    times (5 x 5 transposed convolutions to width / 2, / 4, / 8 channels); at each size the backbone's next finer map,
    averaged to it, is added, as far as there are maps. The branches are free to divide an object between them: smooth
    large parts suit the map, fine ones the independent points.
    Differs: one hourglass instead of three, and maps are averaged to the sizes the paper's encoder has.
    """

    def __init__(
        self, channels: list[int], *, points: int = 1024, width: int = 512, hidden: int = 1024,
        distance: Annotated[CloudLoss, Named(CLOUD_LOSSES, "chamfer")] = CHAMFER,
    ):  # fmt: skip
        super().__init__(points, distance)
        self.grid = (3, 4)
        mapped = 64 * self.grid[0] * self.grid[1]
        if points <= mapped:
            raise ValueError(f"points must be more than the {mapped} of the convolutional branch, got {points}")
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, it is halved three times, got {width}")
        self.reduce = nn.Conv2d(channels[-1], width, 1)
        self.fc_branch = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width * self.grid[0] * self.grid[1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, 3 * (points - mapped)),
        )
        self.deconvolutions, self.laterals, self.convolutions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        finer = channels[-2::-1][:3]
        for level in range(3):
            inputs, outputs = width >> level, width >> (level + 1)
            self.deconvolutions.append(nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1))
            if level < len(finer):
                self.laterals.append(nn.Conv2d(finer[level], outputs, 3, padding=1))
            self.convolutions.append(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.last = nn.Conv2d(width >> 3, 3, 3, padding=1)

    def forward(self, features: list[Tensor], view: View | None = None) -> Float[Tensor, "B N 3"]:
        x = self.reduce(F.adaptive_avg_pool2d(features[-1], self.grid)).relu()  # (B, width, 3, 4)
        free = self.fc_branch(x).unflatten(1, (-1, 3))
        for level, (deconvolution, convolution) in enumerate(zip(self.deconvolutions, self.convolutions)):
            x = deconvolution(x)
            if level < len(self.laterals):
                x = x + self.laterals[level](F.adaptive_avg_pool2d(features[-2 - level], x.shape[2:]))
            x = convolution(x.relu()).relu()
        mapped = self.last(x).flatten(2).transpose(1, 2)  # (B, 768, 3)
        return torch.cat([free, mapped], dim=1)
