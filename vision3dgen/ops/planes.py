"""Features of points on planes and in grids of cells over a cube, and their values at any points.

Source: Peng et al. 2020, Convolutional Occupancy Networks (arXiv:2003.04618), section 3. Letters: D the 2 axes of a
plane or the 3 of a grid, R cells along each. Maps are stored with the first axis last: (B, C, z, x) for "xz".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample

from vision3dgen.checks import check_choice, check_shape

PLANES: dict[str, tuple[int, ...]] = {"xz": (0, 2), "xy": (0, 1), "yz": (1, 2), "grid": (0, 1, 2)}
# The authors' margins, by the number of axes: without them a point on the upper border would have no cell.
_MARGIN = {2: 1e-5, 3: 1e-3}


@dataclass(frozen=True)
class FeatureLayout:
    """Where local features lie: planes, a grid, or both, over the cube [-0.5 - padding / 2, 0.5 + padding / 2]^3.

    resolution: cells along each edge of a plane; grid_resolution: of the grid. Raises ValueError for unknown or
    repeated planes, none at all, and sizes that are not positive.
    """

    planes: tuple[str, ...] = ("xz", "xy", "yz")
    padding: float = 0.1
    resolution: int = 64
    grid_resolution: int = 32

    def __post_init__(self) -> None:
        for plane in self.planes:
            check_choice("plane", plane, PLANES)
        if not self.planes or len(set(self.planes)) < len(self.planes):
            raise ValueError(f"planes must be one or more of {sorted(PLANES)}, each once, got {list(self.planes)}")
        if self.padding < 0 or self.resolution < 1 or self.grid_resolution < 1:
            raise ValueError(
                "padding must be at least 0 and resolution and grid_resolution at least 1, got "
                f"{self.padding}, {self.resolution} and {self.grid_resolution}"
            )

    def sides(self, plane: str) -> tuple[int, ...]:
        """Cells along each axis of a plane or the grid."""
        return (self.grid_resolution if plane == "grid" else self.resolution,) * len(PLANES[plane])

    def coordinates(self, points: Float[Tensor, "*N 3"], plane: str) -> Float[Tensor, "*N D"]:
        """Coordinates in [0, 1) along the axes of a plane; points outside the cube are moved to its border."""
        axes = PLANES[plane]
        margin = _MARGIN[len(axes)]
        wide = torch.promote_types(points.dtype, torch.float32)
        inside = points[..., list(axes)].to(wide) / (1 + self.padding + margin) + 0.5
        return torch.where(inside >= 1, 1 - margin, inside.clamp_min(0))

    def cells(self, points: Float[Tensor, "*N 3"], plane: str) -> Int[Tensor, "*N"]:
        """The number of the cell each point falls in, the first axis counting fastest."""
        index = torch.zeros(points.shape[:-1], dtype=torch.int64, device=points.device)
        steps = self.sides(plane)
        for axis in reversed(range(len(steps))):
            along = (self.coordinates(points, plane)[..., axis] * steps[axis]).long()
            index = index * steps[axis] + along
        return index

    def sample(self, maps: Sequence[Tensor], points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N C"]:
        """The sum over all maps, one (B, C, *sides) for each plane, of their values at points, linear in between.

        The outermost cells' values lie on the cube's faces, as the authors have it (`align_corners`).
        """
        if len(maps) != len(self.planes):
            raise ValueError(f"there must be one map for each of {list(self.planes)}, got {len(maps)}")
        total: Tensor | None = None
        for plane, values in zip(self.planes, maps):
            check_shape(points=(points, "B N 3"), **{f"map {plane}": (values[:, 0].flatten(1), "B cells")})
            at = 2 * self.coordinates(points, plane) - 1  # (B, N, D), the first axis first, as grid_sample wants it
            at = at.view(*at.shape[:2], *(1,) * (at.shape[-1] - 1), at.shape[-1])
            read = grid_sample(values, at.to(values.dtype), padding_mode="border", align_corners=True)  # (B, C, N, 1..)
            total = read.flatten(2) if total is None else total + read.flatten(2)
        assert total is not None
        return total.transpose(1, 2)


def mean_by_cell(features: Float[Tensor, "P C"], cells: Int[Tensor, " P"], count: int) -> Float[Tensor, "M C"]:
    """The mean of the features of each of `count` cells, 0 where there are none."""
    total = features.new_zeros(count, features.shape[1]).index_add(0, cells, features)
    number = features.new_zeros(count).index_add(0, cells, features.new_ones(len(cells)))
    return total / number.clamp(min=1)[:, None]


def maximum_by_cell(features: Float[Tensor, "P C"], cells: Int[Tensor, " P"]) -> Float[Tensor, "P C"]:
    """For each of P points the maximum, channel by channel, over all points of its cell; cells are numbers below P."""
    top = torch.zeros_like(features)
    top = top.scatter_reduce(0, cells[:, None].expand_as(features), features, "amax", include_self=False)
    return top[cells]
