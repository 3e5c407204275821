"""Pinhole cameras, and their forms in other systems."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# OpenGL and Blender cameras look along -z with y up; PyTorch3D's look along +z with x left and y up.
_FLIP_YZ = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
_FLIP_XY = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))


class Projection(NamedTuple):
    """Where points are seen."""

    pixels: Tensor  # (..., N, 2) u right, v down; pixel (row 0, column 0) covers [0, 1) x [0, 1)
    depth: Tensor  # (..., N) along the optical axis


class OpenGLCamera(NamedTuple):
    """OpenGL's matrices."""

    view: Tensor  # (..., 4, 4) world to eye, looking along -z
    projection: Tensor  # (..., 4, 4) eye to clip


class PyTorch3DCamera(NamedTuple):
    """The arguments of PyTorch3D's `PerspectiveCameras`."""

    R: Tensor  # (..., 3, 3) applied to row vectors: x R + T
    T: Tensor  # (..., 3)
    focal_length: Tensor  # (..., 2) pixels, for PerspectiveCameras(in_ndc=False)
    principal_point: Tensor  # (..., 2) pixels
    image_size: Tensor  # (..., 2) height, width


class Open3DCamera(NamedTuple):
    """What Open3D's `PinholeCameraParameters` and renderers take."""

    intrinsic: Tensor  # (..., 3, 3) pixels, centres at integers: Open3D's convention
    extrinsic: Tensor  # (..., 4, 4) world to camera
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole cameras in OpenCV's convention: x right, y down, z forward; x_cam = rotation @ x_world + translation.

    rotation (..., 3, 3), translation (..., 3), intrinsics (..., 3, 3) in pixels with pixel (row 0, column 0) covering
    u, v in [0, 1), image_size (H, W). Leading dimensions are a batch of cameras with one image size.
    """

    rotation: Float[Tensor, "*B 3 3"]
    translation: Float[Tensor, "*B 3"]
    intrinsics: Float[Tensor, "*B 3 3"]
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        lead = self.translation.shape[:-1]
        if self.rotation.shape != (*lead, 3, 3) or self.intrinsics.shape != (*lead, 3, 3):
            raise ValueError(
                f"rotation and intrinsics must be {(*lead, 3, 3)} like translation {tuple(self.translation.shape)}, "
                f"got {tuple(self.rotation.shape)} and {tuple(self.intrinsics.shape)}"
            )

    def __len__(self) -> int:
        if self.translation.ndim < 2:
            raise TypeError("a single Camera has no length; stack cameras with Camera.stack")
        return len(self.translation)

    def __getitem__(self, index: Any) -> "Camera":
        return Camera(self.rotation[index], self.translation[index], self.intrinsics[index], self.image_size)

    @staticmethod
    def stack(cameras: Sequence["Camera"]) -> "Camera":
        """A batch of cameras; all must have one image size."""
        sizes = {camera.image_size for camera in cameras}
        if len(sizes) != 1:
            raise ValueError(f"cameras must be at least one and share one image size, got {sorted(sizes)}")
        return Camera(
            torch.stack([camera.rotation for camera in cameras]),
            torch.stack([camera.translation for camera in cameras]),
            torch.stack([camera.intrinsics for camera in cameras]),
            sizes.pop(),
        )

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> "Camera":
        moved = (self.rotation.to(device_or_dtype), self.translation.to(device_or_dtype))
        return Camera(*moved, self.intrinsics.to(device_or_dtype), self.image_size)

    @property
    def center(self) -> Float[Tensor, "*B 3"]:
        """Position of the camera in the world."""
        return -(self.rotation.transpose(-1, -2) @ self.translation[..., None])[..., 0]

    def world_to_camera(self, points: Float[Tensor, "*B N 3"]) -> Float[Tensor, "*B N 3"]:
        return points @ self.rotation.transpose(-1, -2) + self.translation[..., None, :]

    def camera_to_world(self, points: Float[Tensor, "*B N 3"]) -> Float[Tensor, "*B N 3"]:
        return (points - self.translation[..., None, :]) @ self.rotation

    def project(self, points: Float[Tensor, "*B N 3"]) -> Projection:
        """Pixels and depths of world points; points on the camera's plane project to infinity."""
        local = self.world_to_camera(points)
        homogeneous = local @ self.intrinsics.transpose(-1, -2)
        return Projection(homogeneous[..., :2] / homogeneous[..., 2:], local[..., 2])

    def unproject(self, pixels: Float[Tensor, "*B N 2"], depth: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N 3"]:
        """World points seen at these pixels at these depths along the optical axis."""
        rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        rays = torch.linalg.solve(self.intrinsics, rays.transpose(-1, -2)).transpose(-1, -2)
        return self.camera_to_world(rays * depth[..., None])

    def resize(self, image_size: tuple[int, int]) -> "Camera":
        """The same cameras for the image resized to (H, W)."""
        scale = torch.ones_like(self.intrinsics)
        scale[..., 0, :] = image_size[1] / self.image_size[1]
        scale[..., 1, :] = image_size[0] / self.image_size[0]
        return Camera(self.rotation, self.translation, self.intrinsics * scale, image_size)

    @staticmethod
    def look_at(
        eye: Sequence[float] | Tensor,
        target: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
        up: Sequence[float] | Tensor = (0.0, 1.0, 0.0),
        *,
        field_of_view: float,
        image_size: tuple[int, int],
    ) -> "Camera":
        """A camera at `eye` looking at `target`, with a vertical field of view in degrees; float64."""
        eye, target, up = (torch.as_tensor(v, dtype=torch.float64) for v in (eye, target, up))
        forward = target - eye
        right = torch.linalg.cross(forward, up)
        if float(right.norm()) < 1e-9 * max(float(forward.norm()), 1e-300):
            raise ValueError(f"up {up.tolist()} must not be parallel to the viewing direction {forward.tolist()}")
        forward, right = forward / forward.norm(), right / right.norm()
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        focal = 0.5 * image_size[0] / math.tan(math.radians(field_of_view) / 2)
        return Camera(rotation, -rotation @ eye, _intrinsics(focal, image_size), image_size)

    @staticmethod
    def from_r2n2(azimuth: float, elevation: float, distance_ratio: float, image_size: int = 137) -> "Camera":
        """The camera of 3D-R2N2's renderings from a line of rendering_metadata.txt (degrees, distance 1.75 * ratio).

        Source: 3D-R2N2's Blender script (35 mm lens, 32 mm sensor), in OpenCV axes; the world is ShapeNet's (+y up).
        Differs: the file's fifth column (25) is not the field of view (49.1 degrees) and is not used.
        """
        a, e = math.radians(-azimuth), math.radians(-elevation)
        ca, sa, ce, se = math.cos(a), math.sin(a), math.cos(e), math.sin(e)
        world = torch.tensor([[ca * ce, sa * ce, -se], [-sa, ca, 0.0], [ca * se, sa * se, ce]], dtype=torch.float64)
        axes = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        import_axes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        rotation = _FLIP_YZ @ axes @ world @ import_axes
        translation = -_FLIP_YZ @ axes @ torch.tensor([1.75 * distance_ratio, 0.0, 0.0], dtype=torch.float64)
        focal = 35.0 / 32.0 * image_size
        return Camera(rotation, translation, _intrinsics(focal, (image_size, image_size)), (image_size, image_size))

    def to_opengl(self, near: float = 0.01, far: float = 100.0) -> OpenGLCamera:
        """View matrix (eye looks along -z) and projection to clip space, y up, depth -1..1."""
        flip = _FLIP_YZ.to(self.rotation)
        view = _rigid(flip @ self.rotation, self.translation @ flip)
        height, width = self.image_size
        k = self.intrinsics
        projection = torch.zeros_like(view)
        projection[..., 0, 0] = 2 * k[..., 0, 0] / width
        projection[..., 0, 1] = -2 * k[..., 0, 1] / width
        projection[..., 0, 2] = 1 - 2 * k[..., 0, 2] / width
        projection[..., 1, 1] = 2 * k[..., 1, 1] / height
        projection[..., 1, 2] = 2 * k[..., 1, 2] / height - 1
        projection[..., 2, 2] = -(far + near) / (far - near)
        projection[..., 2, 3] = -2 * far * near / (far - near)
        projection[..., 3, 2] = -1
        return OpenGLCamera(view, projection)

    @staticmethod
    def from_opengl(view: Tensor, projection: Tensor, image_size: tuple[int, int]) -> "Camera":
        """Inverse of `to_opengl`."""
        flip = _FLIP_YZ.to(view)
        height, width = image_size
        k = torch.zeros_like(view[..., :3, :3])
        k[..., 0, 0] = projection[..., 0, 0] * width / 2
        k[..., 0, 1] = -projection[..., 0, 1] * width / 2
        k[..., 0, 2] = (1 - projection[..., 0, 2]) * width / 2
        k[..., 1, 1] = projection[..., 1, 1] * height / 2
        k[..., 1, 2] = (1 + projection[..., 1, 2]) * height / 2
        k[..., 2, 2] = 1
        return Camera(flip @ view[..., :3, :3], view[..., :3, 3] @ flip, k, image_size)

    def to_blender(self) -> Float[Tensor, "*B 4 4"]:
        """Camera-to-world matrices of a camera that looks along -z with y up (Blender, NeRF)."""
        flip = _FLIP_YZ.to(self.rotation)
        return _rigid(self.rotation.transpose(-1, -2) @ flip, self.center)

    @staticmethod
    def from_blender(matrix: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> "Camera":
        """Inverse of `to_blender`."""
        rotation = _FLIP_YZ.to(matrix) @ matrix[..., :3, :3].transpose(-1, -2)
        translation = -(rotation @ matrix[..., :3, 3:])[..., 0]
        return Camera(rotation, translation, intrinsics, image_size)

    def to_pytorch3d(self) -> PyTorch3DCamera:
        """Arguments of PyTorch3D's `PerspectiveCameras(..., in_ndc=False)` (+x left, +y up, row vectors)."""
        flip = _FLIP_XY.to(self.rotation)
        k = self.intrinsics
        size = torch.tensor(self.image_size, dtype=k.dtype, device=k.device).expand(*k.shape[:-2], 2)
        return PyTorch3DCamera(
            R=(flip @ self.rotation).transpose(-1, -2),
            T=self.translation @ flip,
            focal_length=torch.stack([k[..., 0, 0], k[..., 1, 1]], dim=-1),
            principal_point=k[..., :2, 2],
            image_size=size,
        )

    @staticmethod
    def from_pytorch3d(camera: PyTorch3DCamera) -> "Camera":
        """Inverse of `to_pytorch3d`, for zero skew."""
        flip = _FLIP_XY.to(camera.R)
        k = torch.zeros_like(camera.R)
        k[..., 0, 0], k[..., 1, 1] = camera.focal_length.unbind(-1)
        k[..., :2, 2] = camera.principal_point
        k[..., 2, 2] = 1
        height, width = (int(v) for v in camera.image_size.reshape(-1, 2)[0])
        return Camera(flip @ camera.R.transpose(-1, -2), camera.T @ flip, k, (height, width))

    def to_open3d(self) -> Open3DCamera:
        """Intrinsic and extrinsic matrices for Open3D, whose pixel centres are at integers."""
        intrinsic = self.intrinsics.clone()
        intrinsic[..., :2, 2] -= 0.5
        height, width = self.image_size
        return Open3DCamera(intrinsic, _rigid(self.rotation, self.translation), width, height)

    @staticmethod
    def from_open3d(camera: Open3DCamera) -> "Camera":
        """Inverse of `to_open3d`."""
        intrinsics = camera.intrinsic.clone()
        intrinsics[..., :2, 2] += 0.5
        extrinsic = camera.extrinsic
        return Camera(extrinsic[..., :3, :3], extrinsic[..., :3, 3], intrinsics, (camera.height, camera.width))


def _intrinsics(focal: float, image_size: tuple[int, int]) -> Float[Tensor, "3 3"]:
    height, width = image_size
    return torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """(..., 4, 4) matrix of a rotation followed by a translation."""
    matrix = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=rotation.dtype, device=rotation.device)
    matrix[..., :3, :3] = rotation
    matrix[..., :3, 3] = translation
    matrix[..., 3, 3] = 1
    return matrix
