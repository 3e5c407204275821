"""Pictures of depth (B, 1, H, W) as points, meshes and normals, through the cameras that took them.

Depth is along the optical axis; 0, or what is not finite, means that nothing is there. A pixel stands for its center.
Two neighbors lie on one surface where the farther depth is at most 1 + max_jump times the nearer: at W pixels of a
camera with focal length f, a surface turned by an angle a from facing the camera changes by about tan(a) / f per pixel.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vision3dgen.checks import check_choice
from vision3dgen.structures import Camera, Meshes, Pointclouds

MAX_JUMP = 0.05


def depth_to_points(
    depth: Float[Tensor, "B 1 H W"], cameras: Camera, *, frame: Literal["camera", "world"] = "camera"
) -> Float[Tensor, "B H W 3"]:
    """What each pixel's center sees, in the camera's axes or the world's; the camera's center where depth is 0.

    cameras: one per picture, of its size; ValueError otherwise.
    """
    check_choice("frame", frame, ("camera", "world"))
    batch, _, height, width = depth.shape
    if cameras.translation.shape[:-1] != (batch,) or tuple(cameras.image_size) != (height, width):
        raise ValueError(
            f"depth (B, 1, H, W) = {tuple(depth.shape)} needs {batch} cameras of {height} x {width} pixels, got "
            f"{tuple(cameras.translation.shape[:-1])} of {cameras.image_size[0]} x {cameras.image_size[1]}: "
            "Camera.resize gives the cameras of resized pictures"
        )
    cameras = cameras.to(depth.device).to(depth.dtype)
    if frame == "camera":
        here = torch.eye(3, dtype=depth.dtype, device=depth.device).expand(batch, 3, 3)
        cameras = Camera(here, torch.zeros_like(cameras.translation), cameras.intrinsics, cameras.image_size)
    rows = torch.arange(height, dtype=depth.dtype, device=depth.device) + 0.5
    columns = torch.arange(width, dtype=depth.dtype, device=depth.device) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([u, v], dim=-1).view(1, -1, 2).expand(batch, -1, -1)  # (B, H W, 2)
    return cameras.unproject(pixels, depth.flatten(1)).view(batch, height, width, 3)


def depth_to_pointclouds(
    depth: Float[Tensor, "B 1 H W"],
    cameras: Camera,
    mask: Tensor | None = None,
    *,
    features: Float[Tensor, "B C H W"] | None = None,
    frame: Literal["camera", "world"] = "camera",
) -> Pointclouds:
    """The points of the pixels that have a depth, row by row, with the `features` (colors, say) of their pixels.

    mask (B, 1, H, W): pixels to take among them, all by default.
    """
    points, kept = depth_to_points(depth, cameras, frame=frame), pixels_with_depth(depth, mask)
    rows = None if features is None else [own[:, k].t() for own, k in zip(features, kept)]
    return Pointclouds([own[k] for own, k in zip(points, kept)], features=rows)


def depth_to_mesh(
    depth: Float[Tensor, "B 1 H W"],
    cameras: Camera,
    mask: Tensor | None = None,
    *,
    max_jump: float = MAX_JUMP,
    frame: Literal["camera", "world"] = "camera",
) -> Meshes:
    """The visible surface: neighboring pixels joined to triangles that face the camera, unless depth jumps there.

    Each square of four pixels is cut along the diagonal over which depth changes less; a triangle is kept where its
    corners have a depth, are in `mask` (B, 1, H, W), and the farthest is within 1 + max_jump times the nearest. Pixels
    in no triangle are left out. Gradients go to the depth.
    """
    _check_jump(max_jump)
    points, valid = depth_to_points(depth, cameras, frame=frame), pixels_with_depth(depth, mask)
    batch, height, width = valid.shape
    z = depth.detach()[:, 0].where(valid, torch.inf)
    a, b, c, d = z[:, :-1, :-1], z[:, :-1, 1:], z[:, 1:, :-1], z[:, 1:, 1:]  # corners of each square, row by row
    falling = (a - d).abs() < (b - c).abs()  # cut from a to d: true where b or c is missing, false where a or d is
    index = torch.arange(height * width, device=depth.device).view(height, width)
    corner = [i.expand(batch, -1, -1) for i in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:])]
    upper = torch.stack([corner[0], corner[2], corner[3].where(falling, corner[1])], dim=-1)
    lower = torch.stack([corner[0].where(falling, corner[2]), corner[3], corner[1]], dim=-1)
    faces = torch.stack([upper, lower], dim=-2).flatten(1, 3)  # (B, 2 (H - 1) (W - 1), 3)
    depths = z.flatten(1).gather(1, faces.flatten(1)).view(faces.shape)
    nearest, farthest = depths.amin(2), depths.amax(2)
    kept = farthest.isfinite() & (farthest <= (1 + max_jump) * nearest)
    verts_list, faces_list = [], []
    for own_points, own_faces, own_kept in zip(points.flatten(1, 2), faces, kept):
        used, renumbered = own_faces[own_kept].unique(return_inverse=True)
        verts_list.append(own_points[used])
        faces_list.append(renumbered.view(-1, 3))
    return Meshes(verts_list, faces_list)


def normals_from_depth(
    depth: Float[Tensor, "B 1 H W"], cameras: Camera, mask: Tensor | None = None, *, max_jump: float = MAX_JUMP
) -> Float[Tensor, "B 3 H W"]:
    """Unit normals in camera axes, towards the camera, of the surface around each pixel; 0 where there is none.

    The cross product of differences of points to the neighbors in a row and in a column, those to both sides where both
    lie on the same surface, else to one. 0 for a pixel that is alone in its row or its column. Exact on planes.
    Differs: kornia's `depth_to_normals`, which looks away from the camera, takes differences over jumps and background.
    """
    _check_jump(max_jump)
    points, valid = depth_to_points(depth, cameras), pixels_with_depth(depth, mask)
    z = depth.detach()[:, 0].where(valid, torch.inf)
    right, has_right = _differences(points, z, 2, max_jump)
    down, has_down = _differences(points, z, 1, max_jump)
    normals = F.normalize(torch.linalg.cross(down, right), dim=-1, eps=torch.finfo(points.dtype).tiny)
    return normals.where((has_right & has_down)[..., None], 0).permute(0, 3, 1, 2)


def _differences(
    points: Float[Tensor, "B H W 3"], z: Float[Tensor, "B H W"], axis: int, max_jump: float
) -> tuple[Float[Tensor, "B H W 3"], Bool[Tensor, "B H W"]]:
    """Sum of the differences to the next and from the last pixel on the same surface, and whether there is one."""
    count = z.shape[axis] - 1
    before, after = z.narrow(axis, 0, count), z.narrow(axis, 1, count)
    joined = torch.maximum(before, after) <= (1 + max_jump) * torch.minimum(before, after)
    joined &= before.isfinite() & after.isfinite()
    step = points.diff(dim=axis).where(joined[..., None], 0)
    edge, none = torch.zeros_like(points.narrow(axis, 0, 1)), torch.zeros_like(z.narrow(axis, 0, 1), dtype=torch.bool)
    total = torch.cat([step, edge], dim=axis) + torch.cat([edge, step], dim=axis)
    return total, torch.cat([joined, none], dim=axis) | torch.cat([none, joined], dim=axis)


def pixels_with_depth(depth: Float[Tensor, "B 1 H W"], mask: Tensor | None = None) -> Bool[Tensor, "B H W"]:
    """Where depth is positive and finite, and `mask` (B, 1, H, W), if there is one, is above a half."""
    valid = (depth > 0) & depth.isfinite()
    if mask is not None:
        if mask.shape != depth.shape:
            raise ValueError(f"mask must be {tuple(depth.shape)} like depth, got {tuple(mask.shape)}")
        valid = valid & (mask if mask.dtype == torch.bool else mask > 0.5)
    return valid[:, 0]


def _check_jump(max_jump: float) -> None:
    if not max_jump >= 0:
        raise ValueError(f"max_jump must be at least 0, got {max_jump}")
