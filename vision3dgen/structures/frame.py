"""Invertible normalizations of shapes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.checks import check_shape
from vision3dgen.structures.pointclouds import Pointclouds


@dataclass(frozen=True)
class Frame:
    """An invertible normalization, x_frame = (x - center) / scale, kept with every sample and prediction.

    name: which axes the normalized coordinates have ("object": ShapeNet's, +y up, -z front; "camera": OpenCV's).
    """

    name: str
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    def __post_init__(self) -> None:
        values = (*self.center, self.scale)
        if len(self.center) != 3 or not all(math.isfinite(v) for v in values) or self.scale <= 0:
            raise ValueError(f"a Frame needs a finite center of 3 and a scale > 0, got {self.center} and {self.scale}")

    def normalize(self, shape: Any) -> Any:
        """Points (..., 3), `Meshes` or `Pointclouds` from the file's coordinates into this frame."""
        return _affine(shape, 1 / self.scale, [-c / self.scale for c in self.center])

    def denormalize(self, shape: Any) -> Any:
        """Points (..., 3), `Meshes` or `Pointclouds` from this frame back into the file's coordinates."""
        return _affine(shape, self.scale, list(self.center))

    def close_to(self, other: "Frame", tolerance: float = 1e-6) -> bool:
        """Whether both frames have the same axes and the same numbers within a relative tolerance of the scale."""
        if self.name != other.name:
            return False
        bound = tolerance * max(self.scale, other.scale)
        return all(abs(a - b) <= bound for a, b in zip((*self.center, self.scale), (*other.center, other.scale)))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "center": list(self.center), "scale": self.scale}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Frame":
        center = [float(v) for v in values["center"]]
        return Frame(str(values["name"]), (center[0], center[1], center[2]), float(values["scale"]))

    @staticmethod
    def longest_edge(points: Float[Tensor, "N 3"], name: str = "object", length: float = 1.0) -> "Frame":
        """Bounding box centred at 0, its longest edge `length` (Occupancy Networks: 1)."""
        low, high = _box(points)
        return _frame(name, (low + high) / 2, float((high - low).max()) / length)

    @staticmethod
    def unit_diagonal(points: Float[Tensor, "N 3"], name: str = "object") -> "Frame":
        """Bounding box centred at 0, its diagonal 1 (ShapeNetCore)."""
        low, high = _box(points)
        return _frame(name, (low + high) / 2, float((high - low).norm()))

    @staticmethod
    def unit_ball(points: Float[Tensor, "N 3"], name: str = "object") -> "Frame":
        """Mean of the points at 0, the farthest at distance 1 (AtlasNet)."""
        _box(points)
        center = points.double().mean(0)
        return _frame(name, center, float((points.double() - center).norm(dim=1).max()))


def _box(points: Float[Tensor, "N 3"]) -> tuple[Tensor, Tensor]:
    check_shape(points=(points, "N 3"))
    if not len(points):
        raise ValueError("points must not be empty: a shape without points has no frame")
    return points.double().amin(0), points.double().amax(0)


def _frame(name: str, center: Tensor, scale: float) -> Frame:
    x, y, z = center.tolist()
    return Frame(name, (x, y, z), scale)


def _affine(shape: Any, scale: float, offset: list[float]) -> Any:
    """scale * x + offset for points, meshes or clouds (ours or PyTorch3D's)."""
    if isinstance(shape, Tensor):
        return shape * scale + torch.tensor(offset, dtype=shape.dtype, device=shape.device)
    if isinstance(shape, Pointclouds):
        moved = shape.points_packed()
        return shape.scale(scale).offset(torch.tensor(offset, dtype=moved.dtype, device=moved.device))
    moved = shape.verts_packed()
    return shape.scale_verts(scale).offset_verts(torch.tensor(offset, dtype=moved.dtype, device=moved.device))
