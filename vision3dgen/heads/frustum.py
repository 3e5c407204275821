"""The camera's view volume as a grid of voxels, and the network that fills it.

Source: Gkioxari et al. 2019, Mesh R-CNN (arXiv:1906.02739), section 3.2 and its ShapeNet experiments: voxel tubes are
2D convolutions whose output channels are the voxels behind a pixel; the volume is that of 3D-R2N2's renderings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.head import View
from vision3dgen.ops import contains, voxelize
from vision3dgen.structures import GridSpec, Meshes

# Blender's clipping planes in Mesh R-CNN: depth d has the normalized device coordinate CLIP[0] - CLIP[1] / d.
CLIP = (1.002002, 0.2002002)  # near 0.1, far 100
FOCAL = 2.1875  # focal length of 3D-R2N2's renderings in halves of the picture: 35 mm before a sensor of 32 mm


def picture_intrinsics(view: View | None, like: Tensor, focal: float = FOCAL) -> Float[Tensor, "B 3 3"]:
    """Matrices from points of the camera frame to homogeneous picture coordinates, x right and y down in [-1, 1].

    Those of the view's cameras; without cameras, that of `focal` halves of the picture's height, for each of `like`.
    """
    if view is None or view.cameras is None:
        height, width = (1, 1) if view is None else view.image_size
        own = torch.diag(like.new_tensor([focal * height / width, focal, 1.0], dtype=torch.float32))
        return own.expand(len(like), 3, 3)
    height, width = view.cameras.image_size
    pixels = view.cameras.intrinsics.to(like.device, torch.float32)
    scale = pixels.new_tensor([[2 / width, 0.0, -1.0], [0.0, 2 / height, -1.0], [0.0, 0.0, 1.0]])
    return scale @ pixels


Depth = float | Float[Tensor, "B 1 1"]  # of all volumes, or of each


def into_volume(
    points: Float[Tensor, "B N 3"], intrinsics: Float[Tensor, "B 3 3"], near: Depth, far: Depth
) -> Float[Tensor, "B N 3"]:
    """Coordinates in the volumes between two depths of points of the camera frame, see `Frustum`."""
    depth = points[..., 2:]
    ahead = depth > 1e-6 * near
    inverse = 1 / depth.where(ahead, 1)
    z = 1 - 2 * (inverse - 1 / far) / (1 / near - 1 / far)
    homogeneous = points @ intrinsics.to(points.dtype).mT
    return torch.cat([homogeneous[..., :2] * inverse, z.where(ahead, -2)], dim=-1)


def out_of_volume(
    coordinates: Float[Tensor, "B N 3"], intrinsics: Float[Tensor, "B 3 3"], near: Depth, far: Depth
) -> Float[Tensor, "B N 3"]:
    """Points of the camera frame at coordinates of the volumes; inverse of `into_volume`."""
    inverse = (1 - coordinates[..., 2:]) / 2 * (1 / near - 1 / far) + 1 / far
    picture = torch.cat([coordinates[..., :2], torch.ones_like(inverse)], dim=-1)
    return torch.linalg.solve(intrinsics.to(picture.dtype), picture.mT).mT / inverse


@dataclass(frozen=True)
class Frustum:
    """The part of a camera's view between two depths, cut into `resolution` voxels along each axis.

    Its coordinates fill [-1, 1]^3: x to the right and y down across the picture, z growing with the inverse of the
    depth from `near` to `far`, so that straight lines stay straight. Sample i of an axis lies at
    -1 + 2 i / (resolution - 1).
    """

    resolution: int = 48
    near: float = CLIP[1] / (CLIP[0] - 0.67)  # 0.603 and 2.441, about the depths that 3D-R2N2's objects reach
    far: float = CLIP[1] / (CLIP[0] - 0.92)

    def __post_init__(self) -> None:
        if self.resolution < 2 or self.resolution % 2:
            raise ValueError(f"resolution must be an even number of voxels, got {self.resolution}")
        if not 0 < self.near < self.far:
            raise ValueError(f"near and far must be depths with 0 < near < far, got {self.near} and {self.far}")
        beyond = (1 / self.near - 1 / self.far) / (self.resolution - 1)  # how far the last voxel reaches past `far`
        if 1 / self.far <= beyond:
            raise ValueError(f"far must be below {1 / beyond:.4g}, or the last voxels have no end, got {self.far}")

    @property
    def grid(self) -> GridSpec:
        """Where the samples are, in the volume's coordinates."""
        return GridSpec.cube(self.resolution, -1.0, 1.0, align="corner")

    def from_camera(self, points: Float[Tensor, "B N 3"], intrinsics: Float[Tensor, "B 3 3"]) -> Float[Tensor, "B N 3"]:
        """Coordinates in the volume of points of the camera frame; z is -2 for points not in front of the camera."""
        return into_volume(points, intrinsics, self.near, self.far)

    def to_camera(
        self, coordinates: Float[Tensor, "B N 3"], intrinsics: Float[Tensor, "B 3 3"]
    ) -> Float[Tensor, "B N 3"]:
        """Points of the camera frame at coordinates of the volume; inverse of `from_camera`."""
        return out_of_volume(coordinates, intrinsics, self.near, self.far)

    @torch.no_grad()
    def truth(self, batch: Mapping[str, Any], intrinsics: Float[Tensor, "B 3 3"]) -> Bool[Tensor, "B D H W"]:
        """The samples inside each object, by its frame and camera.

        Read from `batch["voxels"]`, the object frame's, or if there are none found inside `batch["mesh"]`, whose meshes
        must be closed. Raises ValueError when the batch has neither, or no camera.
        """
        if "camera" not in batch or not {"voxels", "mesh"} & set(batch):
            raise ValueError(
                f"voxels of the view volume are made from camera and voxels or mesh; the batch has {sorted(batch)}"
            )
        cameras, frames = batch["camera"], batch["frame"]
        size = (len(frames), self.resolution, self.resolution, self.resolution)
        samples = self.grid.points(torch.float64, intrinsics.device).view(1, -1, 3).expand(len(frames), -1, -1)
        samples = self.to_camera(samples, intrinsics)
        if "voxels" in batch:
            world = cameras.to(samples.dtype).camera_to_world(samples)
            places = torch.stack([frame.normalize(points) for frame, points in zip(frames, world)])
            voxels = batch["voxels"]
            return (read_voxels(voxels, GridSpec.cube(voxels.shape[-1]), places.to(torch.float32)) > 0.5).view(size)
        inside = []
        for index, (mesh, frame) in enumerate(zip(batch["mesh"].split([1] * len(frames)), frames)):
            camera, own = cameras[index].to(torch.float64), intrinsics[index : index + 1]
            verts = camera.world_to_camera(frame.denormalize(mesh.verts_packed().double()))
            if bool((verts[:, 2] > 0.01 * self.near).all()):  # lines stay straight: the grid is a plain one to the mesh
                seen = Meshes(self.from_camera(verts[None], own), mesh.faces_packed()[None])
                inside.append(voxelize(seen, self.grid, inside="nonzero"))
            else:
                around = Meshes([verts], [mesh.faces_packed()])
                inside.append(contains(around, samples[index : index + 1], method="nonzero").view(1, *size[1:]))
        return torch.cat(inside)


def read_voxels(values: Tensor, grid: GridSpec, points: Float[Tensor, "B N 3"]) -> Shaped[Tensor, "B N"]:
    """The value, of (B, D, H, W), at the sample nearest to each point; 0 beyond half a spacing outside the grid."""
    index = grid.to_index(points).round().long()  # (B, N, 3) as x, y, z
    size = torch.tensor(grid.shape[::-1], device=points.device)
    inside = ((index >= 0) & (index < size)).all(-1)
    x, y, z = index.clamp_min(0).minimum(size - 1).unbind(-1)
    batch = torch.arange(len(points), device=points.device)[:, None]
    return values[batch, z, y, x] * inside


FILLED = 0.1  # about the share of a view volume that an object fills


class VoxelTubes(nn.Module):
    """Logits (B, D, H, W) of the voxels of a view volume from one map (B, C, H', W').

    The map is resized to half the resolution; four 3x3 convolutions and one transposed convolution follow, and a last
    one whose channels are the depths. Parameter names are the published ones.
    Differs: a new network says `FILLED` everywhere, not a half, so that meshes do not start as the whole volume.
    """

    def __init__(self, channels: int, resolution: int = 48, width: int = 256):
        super().__init__()
        self.resolution = resolution
        for index in range(1, 5):
            setattr(self, f"voxel_fcn{index}", nn.Conv2d(channels if index == 1 else width, width, 3, padding=1))
        self.deconv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.predictor = nn.Conv2d(width, resolution, 1)
        for module in self.children():
            assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            assert module.bias is not None
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)
        assert self.predictor.bias is not None
        nn.init.constant_(self.predictor.bias, math.log(FILLED / (1 - FILLED)))

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H2 W2"]:
        size = self.resolution // 2
        x = F.interpolate(features, (size, size), mode="bilinear", align_corners=False)
        for index in range(1, 5):
            x = self.get_submodule(f"voxel_fcn{index}")(x).relu()
        return self.predictor(self.deconv(x).relu())
