"""Regular grids in space."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.checks import check_choice


@dataclass(frozen=True)
class GridSpec:
    """Where the samples of a voxel grid (D, H, W) = (z, y, x) lie in the world.

    origin: the grid box's minimal corner (x, y, z); spacing: distance between samples along (x, y, z); shape (D, H, W).
    align "center": sample i lies at origin + (i + 0.5) * spacing, the box has shape * spacing extent, each sample is a
    cell's centre; "corner": at origin + i * spacing, samples lie on the box's faces.
    """

    origin: tuple[float, float, float]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    align: str = field(default="center")

    def __post_init__(self) -> None:
        check_choice("align", self.align, ("center", "corner"))
        if min(self.shape) < 1 or min(self.spacing) <= 0:
            raise ValueError(f"shape must be >= 1 and spacing > 0 along each axis, got {self.shape} and {self.spacing}")

    @staticmethod
    def cube(resolution: int, low: float = -0.5, high: float = 0.5, align: str = "center") -> "GridSpec":
        """`resolution` samples along each axis of the cube [low, high]^3."""
        check_choice("align", align, ("center", "corner"))
        cells = resolution if align == "center" else resolution - 1
        if cells < 1 or high <= low:
            raise ValueError(
                f"a cube needs at least one cell and high > low, got {resolution} samples in [{low}, {high}]"
            )
        step = (high - low) / cells
        return GridSpec((low, low, low), (step, step, step), (resolution, resolution, resolution), align)

    @property
    def _shift(self) -> float:
        return 0.5 if self.align == "center" else 0.0

    def to_world(self, index: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        """World position of (fractional) sample indices given as (x, y, z)."""
        return self._vector(self.origin, index) + (index + self._shift) * self._vector(self.spacing, index)

    def to_index(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        """(Fractional) sample indices (x, y, z) of world points."""
        return (points - self._vector(self.origin, points)) / self._vector(self.spacing, points) - self._shift

    def points(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "D H W 3"]:
        """World positions (x, y, z) of all samples."""
        depth, height, width = (torch.arange(n, dtype=torch.float64) for n in self.shape)
        z, y, x = torch.meshgrid(depth, height, width, indexing="ij")
        return self.to_world(torch.stack([x, y, z], dim=-1)).to(device, dtype)

    @staticmethod
    def _vector(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)
