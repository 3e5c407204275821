"""What a pinhole camera sees of a mesh: one ray per sample, the nearest face, a simple shading.

Two renderers find the nearest faces, Open3D's ray casting and a z-buffer of our own; all that follows (depth, normals,
colors) is computed from the faces they name, so both give the same picture up to ties at borders. Not differentiable.
"""

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite, check_shape
from vision3dgen.ops.meshes import MeshesLike
from vision3dgen.structures import Camera

RENDERERS = ("auto", "open3d", "builtin")
GRAY = (0.72, 0.72, 0.74)

_PAIRS = 1_000_000  # (face, sample) pairs tested at once by the built-in renderer
_FAN = 64  # vertices with more faces than this (centres of caps) keep each face's own normal
_CORNERS = 1 << 16  # whose pairs are looked at together: of a million faces all at once would be gigabytes
_log = logging.getLogger(__name__)


class Rendering(NamedTuple):
    rgba: Tensor  # (H, W, 4) in [0, 1], color not multiplied by alpha, alpha = covered share of the pixel
    depth: Tensor  # (H, W) along the optical axis at the pixel's center, 0 where nothing is seen
    normals: Tensor  # (H, W, 3) face normals in camera axes, towards the camera, 0 where nothing is seen
    mask: Tensor  # (H, W) whether the ray through the pixel's center meets the mesh
    face_index: Tensor  # (H, W) the face it meets first, -1 where none


def resolve_renderer(name: str = "auto") -> str:
    """The renderer to use: the one named, or for "auto" Open3D where it is installed and ours elsewhere."""
    check_choice("renderer", name, RENDERERS)
    if name != "auto":
        return name
    return _installed_renderer()


@functools.cache
def _installed_renderer() -> str:
    found = "open3d" if importlib.util.find_spec("open3d") else "builtin"
    _log.info("renderer auto: %s", found)
    return found


def raycast(
    meshes: MeshesLike,
    camera: Camera,
    *,
    face_colors: Float[Tensor, "F 3"] | None = None,
    renderer: str = "auto",
    samples: int = 3,
    crease_angle: float = 40.0,
) -> Rendering:
    """A shaded picture, depth, normals and mask of one mesh seen by one camera.

    face_colors: RGB in [0, 1] per face, gray when None. samples: rays per pixel side for the antialiased color and
    alpha (odd: the middle one is the pixel's center, from which depth, normals and mask come). Shading is Lambertian
    with an ambient term, a light at the camera and one above its left shoulder; normals are interpolated across edges
    flatter than `crease_angle` degrees. Faces are seen from both sides; what lies behind the camera is not.
    """
    if len(meshes) != 1 or camera.translation.ndim != 1:
        raise ValueError(f"raycast draws one mesh with one camera, got {len(meshes)} and {camera.translation.shape}")
    views = raycast_views(
        meshes, [camera], face_colors=face_colors, renderer=renderer, samples=samples, crease_angle=crease_angle
    )
    return next(views)


def raycast_views(
    meshes: MeshesLike,
    cameras: Iterable[Camera],
    *,
    face_colors: Float[Tensor, "F 3"] | None = None,
    renderer: str = "auto",
    samples: int = 3,
    crease_angle: float = 40.0,
) -> Iterator[Rendering]:
    """`raycast` by each camera in turn; what does not depend on the camera is made once."""
    renderer = resolve_renderer(renderer)
    verts, faces = meshes.verts_packed().detach(), meshes.faces_packed()
    size = check_shape(verts=(verts, "V 3"), faces=(faces, "F 3"))
    if len(meshes) != 1:
        raise ValueError(f"raycast_views draws one mesh, got {len(meshes)}")
    if samples < 1 or samples % 2 == 0:
        raise ValueError(f"samples must be odd (the middle ray is the pixel's center), got {samples}")
    check_finite(verts=verts)
    if face_colors is None:
        face_colors = verts.new_tensor(GRAY).expand(size["F"], 3)
    check_shape(faces=(faces, "F 3"), face_colors=(face_colors, "F 3"))
    colors = face_colors.double()
    verts = verts.double()
    world_normals = corner_normals(verts[faces], faces, crease_angle)
    find = _Open3D(verts, faces).nearest if renderer == "open3d" else _nearest_builtin
    return (_draw(verts, faces, colors, world_normals, camera, find, samples) for camera in cameras)


def _draw(
    verts: Float[Tensor, "V 3"],
    faces: Int[Tensor, "F 3"],
    colors: Float[Tensor, "F 3"],
    world_normals: Float[Tensor, "F 3 3"],
    camera: Camera,
    find: Callable[[Tensor, Tensor, Camera], Tensor],
    samples: int,
) -> Rendering:
    camera = camera.to(torch.float64).to(verts.device)
    corners = camera.world_to_camera(verts)[faces]  # (F, 3, 3)
    height, width = camera.image_size
    rays = _rays(camera, samples)  # (H s, W s, 3), z = 1
    face = find(corners, rays, camera)

    index = face.view(-1)
    hit = (index >= 0).nonzero()[:, 0]
    met = index[hit]
    normals = world_normals.index_select(0, met) @ camera.rotation.T
    color = _shade(corners.index_select(0, met), normals, rays.view(-1, 3)[hit], colors[met])
    grid = (height, samples, width, samples)
    coverage = (index >= 0).double().view(grid).sum((1, 3))  # samples that meet the mesh
    summed = torch.zeros(len(index), 3, dtype=torch.float64, device=verts.device)
    summed[hit] = color
    mean = summed.view(*grid, 3).sum((1, 3)) / coverage.clamp(min=1)[..., None]
    rgba = torch.cat([mean.clamp(0, 1), (coverage / samples**2)[..., None]], dim=-1)

    middle = slice(samples // 2, None, samples)
    face, rays = face[middle, middle], rays[middle, middle]
    mask = face >= 0
    depth = torch.zeros(height, width, dtype=torch.float64, device=verts.device)
    normals = torch.zeros(height, width, 3, dtype=torch.float64, device=verts.device)
    seen = corners[face[mask]]
    depth[mask] = _intersect(seen, rays[mask]).depth
    facing = _face_normals(seen)
    normals[mask] = torch.where(((facing * rays[mask]).sum(-1) > 0)[:, None], -facing, facing)
    return Rendering(rgba.float(), depth.float(), normals.float(), mask, face)


# ------------------------------------------------------------------------------------------------ rays and faces


def _rays(camera: Camera, samples: int) -> Float[Tensor, "H W 3"]:
    """Directions with z = 1, in camera axes, of samples x samples rays per pixel."""
    height, width = camera.image_size
    k = camera.intrinsics
    v = (torch.arange(height * samples, dtype=k.dtype, device=k.device) + 0.5) / samples
    u = (torch.arange(width * samples, dtype=k.dtype, device=k.device) + 0.5) / samples
    y = (v - k[1, 2]) / k[1, 1]
    x = (u[None] - k[0, 2] - k[0, 1] * y[:, None]) / k[0, 0]
    return torch.stack([x, y[:, None].expand_as(x), torch.ones_like(x)], dim=-1)


class _Intersection(NamedTuple):
    weights: Tensor  # (N, 3) barycentric
    depth: Tensor  # (N,)


def _edge_planes(corners: Float[Tensor, "F 3 3"]) -> Float[Tensor, "F 3 3"]:
    """Normals of the planes through the camera and the edges opposite to corners 0, 1, 2."""
    v0, v1, v2 = corners.unbind(1)
    pairs = ((v1, v2), (v2, v0), (v0, v1))
    return torch.stack([torch.linalg.cross(a, b) for a, b in pairs], dim=1)


def _intersect(corners: Float[Tensor, "N 3 3"], rays: Float[Tensor, "N 3"]) -> _Intersection:
    """Where each ray meets its face's plane; a face seen exactly edge-on is met at its nearest corner."""
    planes = _edge_planes(corners)
    volume = (corners[:, 0] * planes[:, 0]).sum(-1)
    weights = (planes * rays[:, None]).sum(-1)
    total = weights.sum(-1)
    flat = (total == 0) | (volume == 0)
    weights = torch.where(flat[:, None], 1 / 3, weights / torch.where(flat, 1.0, total)[:, None])
    depth = torch.where(flat, corners[..., 2].amin(-1), volume / torch.where(flat, 1.0, total))
    return _Intersection(weights, depth)


class _Open3D:
    """The first face each ray meets, in float32 about the middle of the mesh."""

    def __init__(self, verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]):
        try:
            self.open3d = importlib.import_module("open3d")  # untyped on purpose: its stubs refuse numpy arrays
        except ImportError as error:
            raise ImportError('renderer "open3d" needs Open3D: pip install "vision3dgen[viz]"') from error
        self.scene = None
        if len(faces):
            self.middle = (verts.amin(0) + verts.amax(0)) / 2
            self.scene = self.open3d.t.geometry.RaycastingScene(nthreads=1)
            self.scene.add_triangles(
                self.open3d.core.Tensor((verts - self.middle).float().cpu().numpy()),
                self.open3d.core.Tensor(faces.cpu().numpy().astype("uint32")),
            )

    def nearest(
        self, corners: Float[Tensor, "F 3 3"], rays: Float[Tensor, "H W 3"], camera: Camera
    ) -> Int[Tensor, "H W"]:
        """Index of the first face each ray meets, -1 where none."""
        if self.scene is None:
            return torch.full(rays.shape[:2], -1, dtype=torch.int64, device=rays.device)
        eye = (camera.center - self.middle).expand_as(rays)
        cast = torch.cat([eye, rays @ camera.rotation], dim=-1).float().cpu().numpy()
        found = self.scene.cast_rays(self.open3d.core.Tensor(cast), nthreads=1)["primitive_ids"].numpy()
        face = torch.from_numpy(found.view("int32").astype("int64"))  # "none" is the largest uint32: -1
        return face.to(rays.device)


def _nearest_builtin(
    corners: Float[Tensor, "F 3 3"], rays: Float[Tensor, "H W 3"], camera: Camera
) -> Int[Tensor, "H W"]:
    """Index of the first face each ray meets, -1 where none: each face tests the samples in its projected box.

    A ray d meets a face when d lies on the same side of the three planes through the camera and an edge. Neighboring
    faces share these planes exactly, so there are no cracks, and faces that cross the camera's plane need no clipping
    (M. Olano, T. Greer: Triangle Scan Conversion using 2D Homogeneous Coordinates, 1997).
    """
    height, width = rays.shape[:2]
    planes = _edge_planes(corners)
    volume = (corners[:, 0] * planes[:, 0]).sum(-1)
    planes = planes * volume.sign()[:, None, None]
    volume = volume.abs()

    # Boxes of sample indices; a face that reaches behind the camera may project anywhere.
    step = rays[0, 0].new_tensor([rays[0, -1, 0] - rays[0, 0, 0], rays[-1, 0, 1] - rays[0, 0, 1]])
    behind = (corners[..., 2] <= 1e-9).any(1)
    slopes = corners[..., :2] / corners[..., 2:].clamp(min=1e-9)  # (F, 3, 2)
    skew = camera.intrinsics[0, 1] / camera.intrinsics[0, 0]
    slopes = torch.stack([slopes[..., 0] + skew * slopes[..., 1], slopes[..., 1]], dim=-1)
    first = rays[0, 0, :2] + torch.stack([skew * rays[0, 0, 1], torch.zeros_like(skew)])
    last = slopes.new_tensor([width - 1, height - 1])
    index = (slopes - first) / step * last
    index = torch.where(last > 0, index, 0.0)  # one column or one row: every face may cover it
    low = torch.where(behind[:, None], 0.0, (index.amin(1) - 0.01).ceil().clamp(min=0)).minimum(last + 1).long()
    high = torch.where(behind[:, None], last, (index.amax(1) + 0.01).floor().clamp(min=-1).minimum(last)).long()
    extent = (high - low + 1).clamp(min=0)
    count = extent.prod(1) * ((volume > 0) & (corners[..., 2] > 0).any(1))

    depth = torch.full((height * width,), math.inf, dtype=rays.dtype, device=rays.device)
    nearest = torch.full((height * width,), len(corners), dtype=torch.int64, device=rays.device)
    flat_rays = rays.reshape(-1, 3)
    start = 0
    ends = count.cumsum(0)
    while start < len(corners):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(torch.searchsorted(ends, done + _PAIRS, right=True)), start + 1)
        number = count[start:stop]
        face = torch.repeat_interleave(torch.arange(start, stop, device=rays.device), number)
        offset = torch.arange(len(face), device=rays.device) - (number.cumsum(0) - number)[face - start]
        row = low[face, 1] + torch.div(offset, extent[face, 0].clamp(min=1), rounding_mode="floor")
        sample = row * width + low[face, 0] + offset % extent[face, 0].clamp(min=1)
        weights = (planes[face] * flat_rays[sample][:, None]).sum(-1)
        total = weights.sum(-1)
        inside = (weights >= 0).all(-1) & (total > 0)
        face, sample = face[inside], sample[inside]
        z = volume[face] / total[inside]
        closer = depth.scatter_reduce(0, sample, z, "amin")
        nearest[closer < depth] = len(corners)
        front = z == closer[sample]
        nearest.scatter_reduce_(0, sample[front], face[front], "amin")  # ties: the first face
        depth = closer
        start = stop
    return torch.where(nearest < len(corners), nearest, -1).view(height, width)


# ------------------------------------------------------------------------------------------------------- shading


def _face_normals(corners: Float[Tensor, "F 3 3"]) -> Float[Tensor, "F 3"]:
    return torch.nn.functional.normalize(_area_vectors(corners), dim=-1, eps=1e-30)


def _area_vectors(corners: Float[Tensor, "F 3 3"]) -> Float[Tensor, "F 3"]:
    return torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _shade(
    corners: Float[Tensor, "N 3 3"],
    normals: Float[Tensor, "N 3 3"],
    rays: Float[Tensor, "N 3"],
    colors: Float[Tensor, "N 3"],
) -> Float[Tensor, "N 3"]:
    """Color of each hit sample, from its face's corners, their normals and its color."""
    weights = _intersect(corners, rays).weights.clamp(0, 1)
    normal = (weights[..., None] * normals).sum(1)
    normal = torch.nn.functional.normalize(normal, dim=-1)
    view = -torch.nn.functional.normalize(rays, dim=-1)
    towards = (normal * view).sum(-1, keepdim=True)
    normal = torch.where(towards < 0, -normal, normal)
    key = torch.nn.functional.normalize(rays.new_tensor([-0.45, -0.75, -0.5]), dim=0)  # up is -y, to the camera -z
    light = 0.30 + 0.35 * towards[:, 0].abs() + 0.45 * (normal * key).sum(-1).clamp(min=0)
    return colors * light[:, None]


def corner_normals(
    corners: Float[Tensor, "F 3 3"], faces: Int[Tensor, "F 3"], crease_angle: float
) -> Float[Tensor, "F 3 3"]:
    """For each face's corner, the mean of the normals of the faces there that lie within the crease angle of it."""
    area, unit = _area_vectors(corners), _face_normals(corners)
    own = unit[:, None].repeat(1, 3, 1).view(-1, 3)
    if not len(faces) or crease_angle <= 0:
        return own.view(-1, 3, 3)
    vertex, corner = faces.reshape(-1).sort(stable=True)  # corners grouped by vertex
    valence = torch.bincount(vertex)
    first = valence.cumsum(0) - valence
    valence, first = valence[vertex], first[vertex]
    total, least = torch.zeros_like(own), math.cos(math.radians(crease_angle))
    for start in range(0, len(vertex), _CORNERS):
        mine = slice(start, start + _CORNERS)
        alone = valence[mine] > _FAN
        partners = torch.where(alone, 1, valence[mine])
        row = torch.repeat_interleave(partners)
        step = torch.arange(len(row), device=faces.device) - (partners.cumsum(0) - partners)[row]
        a = start + row
        b = torch.where(alone[row], a, first[mine][row] + step)
        face_a, face_b = corner[a] // 3, corner[b] // 3
        smooth = (unit[face_a] * unit[face_b]).sum(-1) > least
        total.index_add_(0, corner[a[smooth]], area[face_b[smooth]])
    length = total.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, total / length.clamp(min=1e-30), own).view(-1, 3, 3)
