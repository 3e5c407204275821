"""Depth, normals and silhouettes of meshes, differentiable in vertices and cameras.

Which face a pixel sees is found exactly and without gradient; what it sees of that face is then computed from the
corners, with gradient. With p = (u, v, 1) a pixel's center and K the intrinsics, corner i of a face with corners
v_0, v_1, v_2 in camera axes has at p the weight

    w_i = (v_j × v_k) · K⁻¹ p,    barycentrics b_i = w_i / Σ w,    depth z = Σ b_i z_i,

which is perspective-correct and needs no division by the corners' depths (Olano & Greer, Triangle scan conversion
using 2D homogeneous coordinates, 1997). A soft silhouette (Liu et al., Soft rasterizer, 2019) gives each pixel the
probability that at least one face covers it,

    1 - Π_f (1 - sigmoid(δ_f d_f² / softness)),

d the distance to the face's outline in the image, δ = 1 inside and -1 outside. Everything runs in float64.

Pairs of a face and a pixel in its box in the image are numbered one after the other and worked off in runs that fit the
budget. There are no bins of limited size, so no face is ever left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from vision3dgen.checks import check_finite
from vision3dgen.ops.backends import import_pytorch3d, resolve_backend
from vision3dgen.ops.meshes import MeshesLike
from vision3dgen.structures import Camera

_Runs = list[tuple[int, int]]  # start and stop
_Function = Callable[..., tuple[Tensor, Tensor]]

_BUDGET = 1 << 28
_TAIL = math.log(1e4 - 1)  # a face that covers a pixel with a probability below 1e-4 is left out there
_FLAT = 1e-14  # of the product of its corners' distances: a face spanning less volume with the camera is seen edge-on
_MARGIN = 0.01  # pixels around a face's box, for rounding

# Bytes of work arrays, measured with some headroom; backward included.
_SEARCH_BYTES = 300  # per pair of a face and a pixel, finding the nearest
_SOFT_BYTES = 900  # per pair, silhouettes
_SURFACE_BYTES = 640  # per covered pixel
_FACE_BYTES = 2200  # per face
_PIXEL_BYTES = 340  # per pixel: results and their gradients
_CHOSEN_BYTES = 120  # per pair chosen under faces_per_pixel


class Rasterization(NamedTuple):
    """What `rasterize` sees at each pixel."""

    mask: Tensor  # (B, H, W) hard: 1 where a face covers the pixel's center; soft: probability that one does
    depth: Tensor  # (B, H, W) along the optical axis at the pixel's center, 0 where there is no face
    normals: Tensor  # (B, H, W, 3) unit face normals in camera axes, towards the camera, 0 where there is no face
    face: Tensor  # (B, H, W) nearest face, into faces_packed(); -1 where there is none
    barycentrics: Tensor  # (B, H, W, 3) perspective-correct weights of its corners, 0 where there is no face


def rasterize(
    meshes: MeshesLike,
    camera: Camera,
    *,
    image_size: tuple[int, int] | None = None,
    softness: float | None = None,
    faces_per_pixel: int | None = None,
    near: float = 1e-6,
    backend: str | None = None,
    budget: int = _BUDGET,
) -> Rasterization:
    """What the cameras see of the meshes: silhouette, depth, normals, and the face and barycentrics behind each pixel.

    camera: one for all meshes, or as many as meshes. image_size: (H, W), the camera's by default; another one resizes
    the camera. softness: None for a hard mask without gradient, else the soft silhouette's sigma, in squared units of
    half the image's shorter side (PyTorch3D's; a border is about 2 sqrt(softness) wide on each side). Depth, normals,
    face and barycentrics are those of the nearest face at the pixel's center in either case. faces_per_pixel: keep only
    the faces nearest in depth in a soft silhouette; None keeps all. near: what lies nearer to the camera's plane is cut
    away, in units of the vertices. Work arrays stay under `budget` bytes; `estimate_memory` gives the whole.

    Depth, barycentrics, normals and the soft mask are differentiable in vertices and in the camera's tensors. Faces
    are seen from both sides; one without area in the image contributes nothing. Raises ValueError for vertices or
    cameras that are not finite.

    Differs: a face that covers a pixel with a probability below 1e-4 is left out there, as in PyTorch3D; unlike
    there, all others count, and no bin overflows.
    """
    backend = resolve_backend(backend)
    verts = meshes.verts_packed()
    _check(verts, camera, len(meshes), image_size, softness, faces_per_pixel, near, budget)
    camera = camera if image_size is None else camera.resize(image_size)
    if camera.translation.ndim == 1:
        rotation, translation, intrinsics = (x.expand(len(meshes), *x.shape) for x in _tensors(camera))
        camera = Camera(rotation, translation, intrinsics, camera.image_size)
    camera = camera.to(verts.device)
    if backend == "pytorch3d" and len(meshes.faces_packed()):  # PyTorch3D has no batch without faces
        return _rasterize_pytorch3d(meshes, camera, softness, faces_per_pixel, near)

    scene = _scene(meshes, camera.to(torch.float64), near)
    height, width = camera.image_size
    pixels = len(meshes) * height * width
    seen = _visible(scene, camera.image_size, pixels, near, budget)
    surface = _surface(scene, seen, camera.image_size, budget)
    if softness is None:
        mask = (seen >= 0).to(torch.float64)
    else:
        mask = _silhouette(scene, camera.image_size, pixels, softness, faces_per_pixel, budget)

    def image(values: Tensor) -> Tensor:
        return values.view(len(meshes), height, width, *values.shape[1:]).to(verts.dtype)

    face = torch.cat([scene.source, scene.source.new_full((1,), -1)])[seen]  # no face, -1, is the last row
    face = face.view(len(meshes), height, width)
    return Rasterization(image(mask), image(surface[:, 3]), image(surface[:, 4:]), face, image(surface[:, :3]))


def estimate_memory(
    num_faces: int, num_pixels: int, *, faces_per_pixel: int | None = None, budget: int = _BUDGET
) -> int:
    """Bytes that `rasterize` and its backward hold at once, at most, for float32 or float64 vertices.

    num_faces of the whole batch; num_pixels B H W. Of backend "torch".
    """
    chosen = 0 if faces_per_pixel is None else _CHOSEN_BYTES * min(faces_per_pixel, num_faces)
    return budget + _FACE_BYTES * num_faces + (_PIXEL_BYTES + chosen) * num_pixels


# ------------------------------------------------------------------------------------------------------- checks


def _tensors(camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
    return camera.rotation, camera.translation, camera.intrinsics


def _check(
    verts: Tensor,
    camera: Camera,
    members: int,
    image_size: tuple[int, int] | None,
    softness: float | None,
    faces_per_pixel: int | None,
    near: float,
    budget: int,
) -> None:
    rotation, translation, intrinsics = _tensors(camera)
    check_finite(verts=verts, rotation=rotation, translation=translation, intrinsics=intrinsics)
    if translation.ndim > 2 or (translation.ndim == 2 and len(translation) != members):
        raise ValueError(
            f"camera must be one, or one for each of {members} meshes, got a batch of {tuple(translation.shape[:-1])}"
        )
    size = camera.image_size if image_size is None else image_size
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size must be (H, W), at least 1 each, got {size}")
    if softness is not None and not 0 < softness < math.inf:
        raise ValueError(f"softness must be > 0, or None for a hard mask, got {softness}")
    if faces_per_pixel is not None and (softness is None or faces_per_pixel < 1):
        raise ValueError(f"faces_per_pixel must be >= 1 and goes with softness, got {faces_per_pixel}")
    if not 0 < near < math.inf:
        raise ValueError(f"near must be > 0, got {near}")
    if budget < 1:
        raise ValueError(f"budget must be a number of bytes > 0, got {budget}")


# -------------------------------------------------------------------------------------------------------- scene


class _Scene(NamedTuple):
    """The faces that can be seen, of all members; float64 and with gradient unless said otherwise."""

    source: Tensor  # (F,) into faces_packed(), ascending
    item: Tensor  # (F,) member, and with it camera and image
    planes: Tensor  # (F, 3, 3) rows give the corners' weights w_i = planes[i] · (u, v, 1), not negative inside
    depths: Tensor  # (F, 3) of the corners
    normals: Tensor  # (F, 3) unit, towards the camera
    outline: Tensor  # (F, 3 or 4, 2) corners in the image of the part in front of the camera
    turn: Tensor  # (F,) 1 or -1, the sense in which the outline runs; no gradient
    volume: Tensor  # (F,) the weights' sum, divided by it, is 1 / depth; no gradient


def _scene(meshes: MeshesLike, camera: Camera, near: float) -> _Scene:
    """Cameras, batched like the meshes, see their faces; those behind the near plane or edge-on are left out."""
    rotation, translation, intrinsics = _tensors(camera)
    owner = meshes.verts_packed_to_mesh_idx()
    verts = meshes.verts_packed().double()
    verts = (rotation[owner] * verts[:, None]).sum(-1) + translation[owner]  # (V, 3) camera axes
    faces, item = meshes.faces_packed(), meshes.faces_packed_to_mesh_idx()

    corners = verts[faces]
    with torch.no_grad():
        v0, v1, v2 = corners.unbind(1)
        volume = (v0 * torch.linalg.cross(v1, v2)).sum(-1)
        edge_on = volume.abs() <= _FLAT * corners.norm(dim=-1).prod(-1)
        index = (~edge_on & (corners[..., 2] > near).any(1)).nonzero()[:, 0]
        side = volume[index].sign()
    corners, faces, item = corners[index], faces[index], item[index]
    planes = _edge_planes(corners, faces) * side[:, None, None]
    planes = (planes[..., None] * torch.linalg.inv(intrinsics)[item][:, None]).sum(-2)
    v0, v1, v2 = corners.unbind(1)
    area = torch.linalg.cross(v1 - v0, v2 - v0)
    normals = -side[:, None] * area / area.norm(dim=-1, keepdim=True)
    front = _cut_front(corners, near)
    outline = (intrinsics[item][:, None] * front[..., None, :]).sum(-1)  # (F, 3 or 4, 3) homogeneous pixels
    handed = torch.linalg.det(intrinsics.detach()).sign()[item]
    outline = outline[..., :2] / outline[..., 2:]
    return _Scene(index, item, planes, corners[..., 2], normals, outline, side * handed, volume[index].abs())


def _edge_planes(corners: Float[Tensor, "F 3 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "F 3 3"]:
    """Normals of the planes through the camera and the edges opposite to corners 0, 1, 2.

    Each is computed from its edge's lower vertex to the higher and then turned, so that the two faces of an edge have
    exactly opposite planes, also where products and sums are fused: no pixel falls between them.
    """
    start, end = [1, 2, 0], [2, 0, 1]
    turned = (faces[:, start] > faces[:, end])[..., None]
    a, b = corners[:, start], corners[:, end]
    plane = torch.linalg.cross(torch.where(turned, b, a), torch.where(turned, a, b))
    return torch.where(turned, -plane, plane)


def _cut_front(corners: Float[Tensor, "F 3 3"], near: float) -> Float[Tensor, "F n 3"]:
    """The polygons of the faces beyond the near plane: triangles, or quadrilaterals if any face crosses it."""
    front = corners[..., 2] > near  # at least one of each face
    crossing = (~front.all(1)).nonzero()[:, 0]
    if not len(crossing):
        return corners
    front = front[crossing]
    tip = front.sum(1) == 1  # else two corners are in front
    odd = torch.where(tip, front.long().argmax(1), front.long().argmin(1))  # the corner alone on its side
    order = (odd[:, None] + torch.arange(3, device=odd.device)) % 3
    a, b, c = corners[crossing].gather(1, order[..., None].expand(-1, -1, 3)).unbind(1)

    def cut(end: Tensor) -> Tensor:
        share = (near - a[:, 2:]) / (end[:, 2:] - a[:, 2:])
        point = a + share * (end - a)
        return torch.cat([point[:, :2], torch.full_like(share, near)], dim=1)

    ab, ac = cut(b), cut(c)
    cropped = torch.where(tip[:, None, None], torch.stack([a, ab, ac, ac], dim=1), torch.stack([ab, b, c, ac], dim=1))
    return corners[:, [0, 1, 2, 2]].index_put((crossing,), cropped)


# -------------------------------------------------------------------------------------------- pairs, run by run


class _Boxes(NamedTuple):
    """Around each face, the box of pixels that it may touch."""

    first: Tensor  # (F,) its first pixel, counted through all images
    width: Tensor  # (F,) its columns
    ends: Tensor  # (F,) number of pixels in the boxes up to this one
    stride: int  # pixels in a row of the image

    @property
    def pairs(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


def _boxes(scene: _Scene, image_size: tuple[int, int], radius: float) -> _Boxes:
    """Boxes `radius` pixels wider than the faces."""
    height, width = image_size
    outline = scene.outline.detach() - 0.5  # in indices: centers of pixels at integers
    last = outline.new_tensor([width - 1, height - 1])
    reach = radius + _MARGIN
    low = (outline.amin(1) - reach).ceil().clamp(min=0).minimum(last + 1).long()
    high = (outline.amax(1) + reach).floor().clamp(min=-1).minimum(last).long()
    extent = (high - low + 1).clamp(min=0)
    first = (scene.item * height + low[:, 1]) * width + low[:, 0]
    return _Boxes(first, extent[:, 0], extent.prod(1).cumsum(0), width)


def _pairs(boxes: _Boxes, start: int, stop: int) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Faces and pixels of the pairs numbered from start to stop."""
    device = boxes.ends.device
    if start == stop:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none
    bounds = torch.tensor([start, stop - 1], device=device)
    begin, end = torch.searchsorted(boxes.ends, bounds, right=True).tolist()
    ends = boxes.ends[begin : end + 1]
    begins = torch.cat([boxes.ends[begin - 1 : begin] if begin else ends.new_zeros(1), ends[:-1]])
    face = torch.arange(begin, end + 1, device=device).repeat_interleave(ends.clamp(max=stop) - begins.clamp(min=start))
    offset = torch.arange(start, stop, device=device) - begins[face - begin]
    width = boxes.width[face]
    return face, boxes.first[face] + offset // width * boxes.stride + offset % width


def _centers(pixel: Int[Tensor, " P"], image_size: tuple[int, int]) -> Float[Tensor, "P 2"]:
    """(u, v) of pixels counted through all images."""
    height, width = image_size
    return torch.stack([pixel % width, pixel // width % height], dim=1).double() + 0.5


def _runs(count: int, bytes_each: int, budget: int) -> _Runs:
    """Consecutive runs that fit the budget; one, empty, of nothing, so that the graph is kept."""
    step = max(budget // bytes_each, 1)
    return [(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


class _Scatter(torch.autograd.Function):
    """The sum, at indices of a tensor of zeros, of values that are made run by run and again in backward.

    `function(start, stop, *inputs)` gives the indices and the values of a run. Nothing made by it outlives its run.
    """

    @staticmethod
    def forward(ctx: Any, function: _Function, runs: _Runs, shape: Sequence[int], *inputs: Tensor) -> Tensor:
        ctx.function, ctx.runs = function, runs
        ctx.save_for_backward(*inputs)
        total = inputs[0].new_zeros(shape)
        for run in runs:
            index, values = function(*run, *inputs)
            total.index_add_(0, index, values)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        twice = torch.is_grad_enabled()  # for second derivatives the graph of all runs is kept
        inputs = [x if twice and x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        sums = [torch.zeros_like(x) for x in inputs]
        for run in ctx.runs:
            with torch.enable_grad():
                index, values = ctx.function(*run, *inputs)
            parts = torch.autograd.grad(values, inputs, grad.index_select(0, index), create_graph=twice)
            sums = [total.add_(part) for total, part in zip(sums, parts)]
        return None, None, None, *sums


# ------------------------------------------------------------------------------------------------ hard surfaces


def _weights(planes: Float[Tensor, "P 3 3"], centers: Float[Tensor, "P 2"]) -> Float[Tensor, "P 3"]:
    return planes[..., 0] * centers[:, :1] + planes[..., 1] * centers[:, 1:] + planes[..., 2]


@torch.no_grad()
def _visible(
    scene: _Scene, image_size: tuple[int, int], pixels: int, near: float, budget: int
) -> Int[Tensor, " pixels"]:
    """The scene's face nearest to the camera at each pixel's center, the first of equals; -1 where there is none."""
    boxes = _boxes(scene, image_size, 0.0)
    none = len(scene.source)
    depth = torch.full((pixels,), math.inf, dtype=torch.float64, device=scene.source.device)
    nearest = torch.full((pixels,), none, dtype=torch.int64, device=scene.source.device)
    for start, stop in _runs(boxes.pairs, _SEARCH_BYTES, budget):
        face, pixel = _pairs(boxes, start, stop)
        weights = _weights(scene.planes[face], _centers(pixel, image_size))
        total = weights.sum(-1)
        inside = ((weights >= 0).all(-1) & (total > 0)).nonzero()[:, 0]
        face, pixel = face[inside], pixel[inside]
        z = (weights[inside] * scene.depths[face]).sum(-1) / total[inside]
        z = torch.where(z >= near, z, math.inf)
        closer = depth.scatter_reduce(0, pixel, z, "amin")
        nearest[closer < depth] = none
        front = ((z == closer[pixel]) & (z < math.inf)).nonzero()[:, 0]
        nearest.scatter_reduce_(0, pixel[front], face[front], "amin")
        depth = closer
    return torch.where(nearest < none, nearest, -1)


def _surface(
    scene: _Scene, seen: Int[Tensor, " pixels"], image_size: tuple[int, int], budget: int
) -> Float[Tensor, "pixels 7"]:
    """Barycentrics, depth and normal that each pixel sees of its face, 0 where it sees none."""
    hit = (seen >= 0).nonzero()[:, 0]

    def meet(start: int, stop: int, planes: Tensor, depths: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        pixel = hit[start:stop]
        face = seen[pixel]
        weights = _weights(planes.index_select(0, face), _centers(pixel, image_size))
        barycentrics = weights / weights.sum(-1, keepdim=True)
        depth = (barycentrics * depths.index_select(0, face)).sum(-1, keepdim=True)
        return pixel, torch.cat([barycentrics, depth, normals.index_select(0, face)], dim=1)

    runs = _runs(len(hit), _SURFACE_BYTES, budget)
    return _Scatter.apply(meet, runs, (len(seen), 7), scene.planes, scene.depths, scene.normals)


# ---------------------------------------------------------------------------------------------- soft silhouettes


def _silhouette(
    scene: _Scene,
    image_size: tuple[int, int],
    pixels: int,
    softness: float,
    faces_per_pixel: int | None,
    budget: int,
) -> Float[Tensor, " pixels"]:
    """Probability that some face covers each pixel.

    log(1 - sigmoid(x)) = -softplus(x) is summed over faces, so that a pixel deep inside many keeps its gradient finite.
    """
    unit = 2 / min(image_size)  # of a pixel, where the image's shorter side is 2
    scale = unit**2 / softness
    boxes = _boxes(scene, image_size, math.sqrt(_TAIL / scale))
    chosen = None
    if faces_per_pixel is not None:
        chosen = _nearest_pairs(scene, image_size, boxes, scale, faces_per_pixel, budget)

    def cover(start: int, stop: int, outline: Tensor) -> tuple[Tensor, Tensor]:
        face, pixel = _pairs(boxes, start, stop) if chosen is None else (part[start:stop] for part in chosen)
        distance = _signed_squared(outline.index_select(0, face), scene.turn[face], _centers(pixel, image_size))
        logit = distance.squared * scale
        kept = (logit > -_TAIL).nonzero()[:, 0]
        return pixel[kept], softplus(logit[kept])

    runs = _runs(boxes.pairs if chosen is None else len(chosen[0]), _SOFT_BYTES, budget)
    return -torch.expm1(-_Scatter.apply(cover, runs, (pixels,), scene.outline))


class _Distance(NamedTuple):
    squared: Tensor  # (P,) to the outline in pixels, positive inside and negative outside
    point: Tensor  # (P, 2) the nearest point of the face: the pixel's center itself inside


def _signed_squared(
    outline: Float[Tensor, "P n 2"], turn: Float[Tensor, " P"], centers: Float[Tensor, "P 2"]
) -> _Distance:
    x, y = (outline - centers[:, None]).unbind(-1)  # (P, n) corners seen from the center
    dx, dy = x.roll(-1, 1) - x, y.roll(-1, 1) - y
    length = dx * dx + dy * dy
    length = torch.where(length > 1e-24, length, 1.0)  # of a shorter edge, its start: less overflows in the gradient
    share = (-(dx * x + dy * y) / length).clamp(0, 1)
    x_near, y_near = x + share * dx, y + share * dy
    squared = x_near * x_near + y_near * y_near
    with torch.no_grad():
        inside = ((x * dy - y * dx) * turn[:, None] >= 0).all(-1)
        edge = squared.argmin(1, keepdim=True)
        point = torch.cat([x_near.gather(1, edge), y_near.gather(1, edge)], dim=1)
        point = torch.where(inside[:, None], centers, centers + point)
    squared = squared.gather(1, edge)[:, 0]
    return _Distance(torch.where(inside, squared, -squared), point)


@torch.no_grad()
def _nearest_pairs(
    scene: _Scene, image_size: tuple[int, int], boxes: _Boxes, scale: float, number: int, budget: int
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Faces and pixels of the pairs with the `number` least depths at each pixel, where a face covers one softly.

    A face's depth is the one at its point nearest to the pixel's center in the image.
    """
    inverse_depth = scene.planes.sum(1) / scene.volume[:, None]  # of (u, v, 1)
    none = torch.zeros(0, dtype=torch.int64, device=boxes.ends.device)
    faces, pixels, closenesses = none, none, none.double()
    for start, stop in _runs(boxes.pairs, _SOFT_BYTES, budget):
        face, pixel = _pairs(boxes, start, stop)
        found = _signed_squared(scene.outline[face], scene.turn[face], _centers(pixel, image_size))
        near = (found.squared * scale > -_TAIL).nonzero()[:, 0]
        face, pixel = face[near], pixel[near]
        closeness = (inverse_depth[face, :2] * found.point[near]).sum(-1) + inverse_depth[face, 2]
        faces, pixels = torch.cat([faces, face]), torch.cat([pixels, pixel])
        closenesses = torch.cat([closenesses, closeness])
        order = closenesses.argsort(descending=True, stable=True)
        order = order[pixels[order].argsort(stable=True)]
        pixels = pixels[order]
        rank = torch.arange(len(pixels), device=pixels.device) - torch.searchsorted(pixels, pixels)
        few = rank < number
        faces, pixels, closenesses = faces[order[few]], pixels[few], closenesses[order[few]]
    return faces, pixels


# ---------------------------------------------------------------------------------------------------- pytorch3d

_PYTORCH3D_FACES = 150  # per pixel, the limit of its CUDA kernels


def _rasterize_pytorch3d(
    meshes: MeshesLike, camera: Camera, softness: float | None, faces_per_pixel: int | None, near: float
) -> Rasterization:
    """The same by PyTorch3D's MeshRasterizer, in float32; normals are ours, from the faces it finds.

    A silhouette takes as many faces per pixel as it needs, or raises ValueError where that is more than CUDA allows.
    """
    structures, renderer = import_pytorch3d("pytorch3d.structures"), import_pytorch3d("pytorch3d.renderer")
    if bool((camera.intrinsics[..., 0, 1] != 0).any()):
        raise ValueError('backend "pytorch3d" has no cameras with skew: use backend "torch"')
    verts, dtype = meshes.verts_packed().float(), meshes.verts_packed().dtype
    num_verts, num_faces = meshes.num_verts_per_mesh(), meshes.num_faces_per_mesh()
    first = (num_verts.cumsum(0) - num_verts)[meshes.faces_packed_to_mesh_idx()]
    local = meshes.faces_packed() - first[:, None]
    theirs = structures.Meshes(list(verts.split(num_verts.tolist())), list(local.split(num_faces.tolist())))
    arguments = camera.to(torch.float32).to_pytorch3d()._asdict()
    rasterizer = renderer.MeshRasterizer(
        cameras=renderer.PerspectiveCameras(**arguments, in_ndc=False, device=verts.device)
    )

    def fragments(blur_radius: float, number: int) -> Any:
        settings = renderer.RasterizationSettings(
            image_size=camera.image_size,
            blur_radius=blur_radius,
            faces_per_pixel=number,
            max_faces_per_bin=max(int(num_faces.max()), 1),  # no bin overflows
            perspective_correct=True,
            z_clip_value=near,
        )
        return rasterizer(theirs, raster_settings=settings)

    seen = fragments(0.0, 1)
    face = seen.pix_to_face[..., 0]
    hit = face >= 0
    scene = _scene(meshes, camera.to(torch.float64), near)
    normals = verts.new_zeros(len(local) + 1, 3).index_put((scene.source,), scene.normals.float())[face]
    if softness is None:
        mask = hit.float()
    else:
        number = 8 if faces_per_pixel is None else faces_per_pixel
        blurred = fragments(_TAIL * softness, number)
        while faces_per_pixel is None and bool((blurred.pix_to_face[..., -1] >= 0).any()):
            if verts.is_cuda and number == _PYTORCH3D_FACES:
                raise ValueError(
                    f"{number} faces or more cover a pixel softly, PyTorch3D's limit on CUDA: use less softness, "
                    'faces_per_pixel or backend "torch"'
                )
            number = min(2 * number, _PYTORCH3D_FACES) if verts.is_cuda else 2 * number
            blurred = fragments(_TAIL * softness, number)
        covered = torch.where(blurred.pix_to_face >= 0, softplus(-blurred.dists / softness), 0.0)
        mask = -torch.expm1(-covered.sum(-1))
    return Rasterization(
        mask.to(dtype),
        torch.where(hit, seen.zbuf[..., 0], 0.0).to(dtype),
        normals.to(dtype),
        face,
        torch.where(hit[..., None], seen.bary_coords[..., 0, :], 0.0).to(dtype),
    )
