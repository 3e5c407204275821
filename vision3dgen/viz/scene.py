"""Pictures of shapes, always: Open3D's offscreen renderer in a process of its own, else our own ray caster.

Meshes, point clouds and voxel grids are drawn with soft light on a plain background; which renderer drew is part of
the result. Windows open only where there is a display, and never in the process that asks.
"""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vision3dgen.checks import check_choice, check_shape
from vision3dgen.files import atomic_write
from vision3dgen.io import write_png
from vision3dgen.ops import knn_points, nearest_faces
from vision3dgen.ops.render import RENDERERS, corner_normals, raycast
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds
from vision3dgen.viz import offscreen
from vision3dgen.viz.offscreen import OffscreenError

_log = logging.getLogger(__name__)
Color = tuple[float, float, float]
Pixels = UInt8[np.ndarray, "H W 3"]

WHITE: Color = (1.0, 1.0, 1.0)
TRUTH_COLOR: Color = (0.62, 0.62, 0.64)
# Okabe and Ito's colors (told apart by color-blind readers), the lighter ones darkened to stand on white.
PALETTE: tuple[Color, ...] = (
    (0.16, 0.46, 0.72),
    (0.88, 0.48, 0.10),
    (0.05, 0.60, 0.46),
    (0.78, 0.44, 0.62),
    (0.84, 0.64, 0.10),
    (0.36, 0.66, 0.86),
    (0.74, 0.28, 0.12),
)

_SUPERSAMPLING = 2  # pixels drawn per pixel side
_FIELD_OF_VIEW = 28.0  # degrees: little perspective, as product pictures have
_EYE = (0.62, 0.52, -1.0)  # from the front (-z), a little right and above


# ------------------------------------------------------------------------------------------------------- shapes


class Voxels(NamedTuple):
    """Cells of a grid to draw as cubes."""

    occupied: Tensor  # (D, H, W) bool
    grid: GridSpec


Shape = Meshes | Pointclouds | Voxels


@dataclass(frozen=True)
class Sample:
    """One object of a comparison: the input image, the truth, and what each head made of it.

    image: (3, H, W) in [0, 1]. Shapes are in `frame`; `camera`, the image's own, applies to the file's coordinates, so
    shapes are denormalized before they are drawn through it. captions: a line per head, its score say. pictures: what
    else there is to see beside the image, by name: depth in colors, (3, H, W) in [0, 1] or (H, W, 3) uint8. id: the
    item's.
    """

    image: Float[Tensor, "3 H W"] | None = None
    truth: Shape | None = None
    predictions: Mapping[str, Shape | None] = field(default_factory=dict)
    camera: Camera | None = None
    frame: Frame | None = None
    title: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, np.ndarray | Tensor] = field(default_factory=dict)
    id: str = ""

    @property
    def up(self) -> tuple[float, float, float]:
        """Which way is up: +y of objects, -y of what is in a camera's own axes."""
        return (0.0, -1.0, 0.0) if self._in_camera else (0.0, 1.0, 0.0)

    @property
    def eye(self) -> tuple[float, float, float]:
        """From where to look first, relative to the middle: three quarters from the front, or beside the camera."""
        return (0.25, -0.25, -1.0) if self._in_camera else _EYE

    @property
    def _in_camera(self) -> bool:
        return self.frame is not None and self.frame.name == "camera"

    def shapes(self) -> dict[str, Shape | None]:
        """Predictions by head, then the truth, in the coordinates of the camera."""
        named = dict(self.predictions) | ({"truth": self.truth} if self.truth is not None else {})
        return {name: shape if self.frame is None else _denormalize(shape, self.frame) for name, shape in named.items()}


def _denormalize(shape: Shape | None, frame: Frame) -> Shape | None:
    if not isinstance(shape, Voxels):
        return None if shape is None else frame.denormalize(shape)
    grid = shape.grid
    x, y, z = (o * frame.scale + c for o, c in zip(grid.origin, frame.center))
    dx, dy, dz = (s * frame.scale for s in grid.spacing)
    return Voxels(shape.occupied, GridSpec((x, y, z), (dx, dy, dz), grid.shape, grid.align))


def _shapes(shapes: Any) -> list[Shape | None]:
    """One entry per panel, from a shape, a batch or a list of them."""
    if isinstance(shapes, Meshes | Pointclouds):
        return [shapes[i] for i in range(len(shapes))]
    if isinstance(shapes, tuple) and len(shapes) == 2 and isinstance(shapes[1], GridSpec):
        return [Voxels(*shapes)]
    if shapes is None:
        return [None]
    if isinstance(shapes, Sequence) and not isinstance(shapes, str):
        return [shape for entry in shapes for shape in _shapes(entry)]
    raise ValueError(
        f"shapes must be Meshes, Pointclouds, Voxels(occupied, grid) or a list of them, got {type(shapes)}"
    )


def voxels_to_mesh(voxels: Voxels) -> Meshes:
    """One mesh of separate cubes, one for each occupied cell with a free face; its inside is left out."""
    occupied, grid = voxels.occupied.cpu(), voxels.grid
    check_shape(occupied=(occupied, " ".join(map(str, grid.shape))))
    if occupied.dtype != torch.bool:
        raise ValueError(f"occupied must be bool (threshold probabilities first), got {occupied.dtype}")
    padded = torch.nn.functional.pad(occupied, (1,) * 6)
    inner = torch.ones_like(occupied)
    for axis in range(3):
        for start in (0, 2):
            part = [slice(1, -1)] * 3
            part[axis] = slice(start, start + occupied.shape[axis])
            inner &= padded[tuple(part)]
    cells = (occupied & ~inner).nonzero().flip(1)  # (N, 3) x, y, z
    centers = grid.to_world(cells.double()).float()
    gap = 0.06 if max(grid.shape) <= 48 else 0.0  # seams tell cubes apart until they are too small to see
    half = torch.tensor(grid.spacing) * (1 - gap) / 2
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # corner index: 4 x + 2 y + z
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]  # seen from outside
    faces = torch.tensor([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    verts = centers[:, None] + signs * half  # (N, 8, 3)
    index = faces + 8 * torch.arange(len(cells))[:, None, None]  # (N, 12, 3)
    return Meshes([verts.reshape(-1, 3)], [index.reshape(-1, 3)])


@dataclass(frozen=True)
class Job:
    """A picture to draw: a shape, the camera (None: one that fits the shape) and a color where it has none itself."""

    shape: Shape | None
    camera: Camera | None = None
    color: Color = PALETTE[0]

    @cached_property
    def drawn(self) -> Meshes | Pointclouds | None:
        """The shape with cubes for voxels; None when there is nothing to see. Raises ValueError on NaN."""
        shape = voxels_to_mesh(self.shape) if isinstance(self.shape, Voxels) else self.shape
        if shape is None or shape.isempty():
            return None
        points, name = _points(shape)
        bad = (~torch.isfinite(points)).any(1)
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            raise ValueError(f"{name} {index} of the shape is {points[index].tolist()}: it must be finite")
        if len(shape) != 1:
            raise ValueError(f"a picture shows one shape, got a batch of {len(shape)}")
        return shape.detach().cpu()


def _points(shape: Meshes | Pointclouds) -> tuple[Float[Tensor, "N 3"], str]:
    return (shape.verts_packed(), "vertex") if isinstance(shape, Meshes) else (shape.points_packed(), "point")


# ----------------------------------------------------------------------------------------------------- pictures


class Rendering(NamedTuple):
    """One picture, and who drew it."""

    image: np.ndarray  # (H, W, 3) uint8; panels of several shapes lie side by side
    renderer: str  # "open3d" or "builtin"


class Renderings(NamedTuple):
    """Pictures that one renderer drew."""

    images: list[np.ndarray]  # (H, W, 3) uint8 each
    renderer: str  # "open3d" or "builtin"


def render(
    shapes: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    camera: Camera | None = None,
    size: tuple[int, int] = (480, 480),
    colors: Sequence[Color] | None = None,
    background: Color = WHITE,
    renderer: str = "auto",
) -> Rendering:
    """Draw shapes side by side without a window, and write the picture to `path` (PNG) if one is given.

    shapes: Meshes, Pointclouds (each member a panel), Voxels(occupied, grid), or a list of them; None and empty shapes
    give a panel that says so. camera: for all panels, by default one from the front and above that fits them all.
    size: (H, W) of a panel; the picture is (H, n W, 3). colors: RGB in [0, 1] per panel; shapes that carry colors (the
    attribute "color" of vertices or faces, point features of width 3) keep theirs unless it is given. renderer:
    "open3d", "builtin", or "auto" for the first of them that works. Raises ValueError naming a vertex that is not
    finite, and OffscreenError when "open3d" was asked for and failed.
    """
    panels = _shapes(shapes)
    if colors is not None and len(colors) != len(panels):
        raise ValueError(f"colors must be one per panel, {len(panels)}, got {len(colors)}")
    if colors is not None:
        panels = [_plain(shape) for shape in panels]
    chosen = colors if colors is not None else [PALETTE[i % len(PALETTE)] for i in range(len(panels))]
    jobs = [Job(shape, camera, color) for shape, color in zip(panels, chosen)]
    if camera is None:
        shared = fit_camera(panels, size)
        jobs = [Job(job.shape, shared, job.color) for job in jobs]
    result = render_many(jobs, size=size, background=background, renderer=renderer)
    picture = Rendering(np.concatenate(result.images, axis=1), result.renderer)
    if path is not None:
        write_png(path, picture.image)
    return picture


def render_many(
    jobs: Sequence[Job], *, size: tuple[int, int] = (320, 320), background: Color = WHITE, renderer: str = "auto"
) -> Renderings:
    """Draw many pictures of one size (H, W), starting the renderer once; all come from the same renderer."""
    check_choice("renderer", renderer, RENDERERS)
    if min(size) < 1:
        raise ValueError(f"size must be (H, W), each at least 1, got {size}")
    cameras = [fit_camera([job.shape], size) if job.camera is None else job.camera for job in jobs]
    if any(camera.translation.ndim != 1 for camera in cameras):
        raise ValueError("each picture needs one camera, got a batch of cameras: take one of it")
    cameras = [camera.to(torch.float64).to("cpu").resize(size) for camera in cameras]
    shapes = {id(job.shape): job.drawn for job in jobs}  # a shape seen many times is prepared once
    drawings = {}
    for i, (job, camera) in enumerate(zip(jobs, cameras)):
        shape = shapes[id(job.shape)]
        if shape is not None:
            drawings[i] = _Drawing(shape, camera, job.color)
    used, layers = "builtin", None
    if renderer != "builtin":
        try:
            layers, used = _draw_open3d(list(drawings.values()), size, background), "open3d"
        except OffscreenError as error:
            if renderer == "open3d":
                raise
            _fall_back(str(error))
    if layers is None:
        layers = [_draw_builtin(drawing) for drawing in drawings.values()]
    images = [label("empty", size, background) for _ in jobs]
    for i, rgba in zip(drawings, layers):
        images[i] = _composite(rgba, background)
    return Renderings(images, used)


class _Drawing(NamedTuple):
    """A job that is ready: there is something to see, and where from."""

    shape: Meshes | Pointclouds
    camera: Camera
    color: Color


_broken: str | None = None  # why Open3D's renderer failed in this process: it is not tried again


def _fall_back(reason: str) -> None:
    global _broken
    if _broken is None:
        _log.warning("pictures are drawn by the built-in renderer: %s", reason)
    _broken = reason


def _composite(rgba: Float[np.ndarray, "H W 4"], background: Color) -> Pixels:
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return np.round((color * alpha + np.array(background) * (1 - alpha)) * 255).clip(0, 255).astype(np.uint8)


def font(height: float) -> Any:
    """The typeface of every picture with text, `height` pixels high."""
    return ImageFont.load_default(size=height)


def label(text: str, size: tuple[int, int], background: Color = WHITE) -> Pixels:
    """A picture with a word in the middle."""
    image = Image.new("RGB", (size[1], size[0]), tuple(round(v * 255) for v in background))
    gray = (110,) * 3 if sum(background) > 1.5 else (190,) * 3
    middle = (size[1] / 2, size[0] / 2)
    ImageDraw.Draw(image).text(middle, text, fill=gray, font=font(max(min(size) / 12, 8)), anchor="mm")
    return np.array(image)


def fit_camera(shapes: Any, size: tuple[int, int] = (480, 480), *, azimuth: float = 0.0) -> Camera:
    """A three-quarter view from the front and above, as near as all shapes stay inside; objects have +y up, -z front.

    azimuth: degrees by which the camera is turned around the vertical axis.
    """
    points = all_points(_shapes(shapes))
    low, high = points.amin(0), points.amax(0)
    center, radius = (low + high) / 2, max(float((high - low).norm()) / 2, 1e-6)
    camera = _look(center, azimuth, radius, size)
    # On the axis through the center, the distance from which the outermost point meets the border less a margin.
    local = (points - center) @ camera.rotation.T
    slope = torch.tensor([size[1], size[0]]) / 2 * 0.92 / camera.intrinsics[0, 0]
    distance = float((local[:, :2].abs() / slope - local[:, 2:]).max())
    return _look(center, azimuth, max(distance, 0.1 * radius), size)


def _look(center: Float[Tensor, "3"], azimuth: float, distance: float, size: tuple[int, int]) -> Camera:
    c, s = math.cos(math.radians(azimuth)), math.sin(math.radians(azimuth))
    x, y, z = _EYE
    toward = torch.tensor([c * x + s * z, y, c * z - s * x], dtype=torch.float64)
    eye = center + distance * toward / toward.norm()
    return Camera.look_at(eye, center, field_of_view=_FIELD_OF_VIEW, image_size=size)


def all_points(shapes: Sequence[Shape | None]) -> Float[Tensor, "N 3"]:
    """Every vertex and point; the origin when there is none."""
    clouds = [_points(shape)[0].double() for shape in (Job(shape).drawn for shape in shapes) if shape is not None]
    return torch.cat(clouds) if clouds else torch.zeros(1, 3, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ colors of shapes


def _plain(shape: Shape | None) -> Shape | None:
    """The shape without colors of its own."""
    if isinstance(shape, Meshes):
        return Meshes(shape.verts_list(), shape.faces_list())
    if isinstance(shape, Pointclouds):
        return Pointclouds(shape.points_list(), normals=shape.normals_list())
    return shape


def _corner_colors(mesh: Meshes, color: Color) -> Float[Tensor, "F 3 3"]:
    faces, verts = mesh.faces_attributes_packed().get("color"), mesh.verts_attributes_packed().get("color")
    count = len(mesh.faces_packed())
    if verts is not None:
        return verts[mesh.faces_packed()].float().clamp(0, 1)
    if faces is not None:
        return faces[:, None].expand(count, 3, 3).float().clamp(0, 1)
    return torch.tensor(color).expand(count, 3, 3)


def _point_colors(cloud: Pointclouds, color: Color) -> Float[Tensor, "P 3"]:
    features = cloud.features_packed()
    if features is not None and features.shape[1] == 3:
        return features.float().clamp(0, 1)
    return torch.tensor(color).expand(len(cloud.points_packed()), 3)


def _point_radius(points: Float[Tensor, "P 3"]) -> float:
    """Such that points spread over a surface as large as their box nearly touch."""
    diagonal = float((points.amax(0) - points.amin(0)).norm())
    return max(diagonal * min(max(0.45 / math.sqrt(len(points)), 0.002), 0.02), 1e-6)


def camera_mesh(
    camera: Camera, depth: float, image: Float[Tensor, "3 H W"] | None = None, *, color: Color = (0.2, 0.2, 0.22)
) -> Meshes:
    """A camera to look at beside shapes: the pyramid that it sees up to `depth`, and its image at the far end.

    One mesh with the face attribute "color"; edges are thin bars, an image is painted with at most 64 x 64 squares.
    image: in [0, 1], of any size. The camera is one, not a batch; depth is in units of its world.
    """
    if camera.translation.ndim != 1 or not depth > 0:
        raise ValueError(
            f"camera must be a single one and depth above 0, got {tuple(camera.translation.shape)}, {depth}"
        )
    camera = camera.to(torch.float64).to("cpu")
    height, width = camera.image_size
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
    far = camera.unproject(corners, torch.full((4,), depth, dtype=torch.float64))
    apex = camera.center
    ends = [(apex, corner) for corner in far] + [(far[i], far[(i + 1) % 4]) for i in range(4)]
    radius = 0.006 * float((far[1] - far[3]).norm())
    parts = [_bar(start, stop, radius) for start, stop in ends]
    colors = [torch.tensor(color).expand(len(faces), 3) for _, faces in parts]
    if image is not None:
        rows, columns = (min(64, side) for side in image.shape[1:])
        small = torch.nn.functional.interpolate(image[None].float(), (rows, columns), mode="bilinear", antialias=True)
        y, x = torch.meshgrid(torch.linspace(0, height, rows + 1), torch.linspace(0, width, columns + 1), indexing="ij")
        pixels = torch.stack([x, y], dim=-1).reshape(-1, 2).double()
        verts = camera.unproject(pixels, torch.full((len(pixels),), depth, dtype=torch.float64))
        index = torch.arange(len(pixels)).view(rows + 1, columns + 1)
        a, b, c, d = (p.reshape(-1) for p in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]))
        parts.append((verts, torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)])))
        colors.append(small[0].clamp(0, 1).permute(1, 2, 0).reshape(-1, 3).repeat(2, 1))
    starts = np.cumsum([0] + [len(verts) for verts, _ in parts])
    faces = torch.cat([own + int(start) for (_, own), start in zip(parts, starts)])
    verts = torch.cat([own for own, _ in parts]).float()
    return Meshes([verts], [faces], faces_attributes={"color": [torch.cat(colors)]})


def _bar(start: Float[Tensor, "3"], stop: Float[Tensor, "3"], radius: float) -> tuple[Tensor, Tensor]:
    """A square bar between two points: vertices and faces."""
    along = (stop - start) / (stop - start).norm()
    aside = torch.linalg.cross(along, torch.eye(3, dtype=along.dtype)[along.abs().argmin()])
    aside = radius * aside / aside.norm()
    other = torch.linalg.cross(along, aside)
    ring = torch.stack([aside, other, -aside, -other])
    quads = [(i, (i + 1) % 4, (i + 1) % 4 + 4, i + 4) for i in range(4)] + [(3, 2, 1, 0), (4, 5, 6, 7)]
    faces = torch.tensor([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    return torch.cat([start + ring, stop + ring]), faces


def distance_to_surface(shape: Meshes | Pointclouds, truth: Meshes | Pointclouds) -> Float[Tensor, " N"]:
    """How far each vertex or point of one shape is from the surface, or the nearest point, of another; not squared."""
    points = _points(shape)[0].float()
    if isinstance(truth, Meshes):
        return nearest_faces(truth.verts_packed().float(), truth.faces_packed(), points).distances
    return knn_points(points[None], truth.points_packed()[None].float(), K=1).dists[0, :, 0].sqrt()


def colored_by_distance(
    shape: Meshes | Pointclouds, truth: Meshes | Pointclouds, largest: float
) -> Meshes | Pointclouds:
    """The shape with colors for its distance to the truth: cividis, from blue at 0 to yellow at `largest` and more.

    Color-blind readers tell them apart. Needs matplotlib. Raises ValueError where the truth is empty.
    """
    if not largest > 0:
        raise ValueError(f"largest must be a distance above 0, got {largest}")
    if truth.isempty():
        raise ValueError("the truth is empty: there is no distance to it")
    share = (distance_to_surface(shape, truth) / largest).clamp(0, 1)
    colors = torch.from_numpy(colors_of("cividis", share.detach().cpu().double().numpy())).float()
    if isinstance(shape, Meshes):
        return Meshes(shape.verts_list(), shape.faces_list(), verts_attributes={"color": [colors]})
    return Pointclouds(shape.points_list(), normals=shape.normals_list(), features=[colors])


def colors_of(colormap: str, share: np.ndarray) -> np.ndarray:
    """Colors (*share.shape, 3) in [0, 1] of numbers in [0, 1], by one of matplotlib's colormaps."""
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError('pictures of numbers need matplotlib: pip install "vision3dgen[viz]"') from error
    return colormaps[colormap](share)[..., :3]


# -------------------------------------------------------------------------------------------------------- open3d


def _draw_open3d(
    drawings: Sequence[_Drawing], size: tuple[int, int], background: Color
) -> list[Float[np.ndarray, "H W 4"]]:
    if _broken is not None:
        raise OffscreenError(_broken)
    if find_spec("open3d") is None:
        raise OffscreenError('Open3D is not installed: pip install "vision3dgen[viz]"')
    large = (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING)
    sets: dict[tuple[int, Color], int] = {}
    triangles: list[offscreen.Triangles] = []
    frames: list[Frame] = []
    pictures = []
    for shape, camera, color in drawings:
        which = sets.setdefault((id(shape), color), len(sets))
        if which == len(triangles):
            frames.append(Frame.unit_ball(_points(shape)[0]))  # Open3D's clipping distances suit a world 1 wide
            triangles.append(_triangles(frames[-1].normalize(shape), color))
        intrinsic, extrinsic, _, _ = camera.resize(large).to_open3d()
        frame = frames[which]
        extrinsic = extrinsic.clone()
        moved = extrinsic[:3, :3] @ torch.tensor(frame.center, dtype=torch.float64) + extrinsic[:3, 3]
        extrinsic[:3, 3] = moved / frame.scale
        pictures.append(offscreen.Picture(which, intrinsic.numpy(), extrinsic.numpy()))
    grid = (size[0], _SUPERSAMPLING, size[1], _SUPERSAMPLING)
    layers = []
    for rgba in offscreen.draw(triangles, pictures, large, background):
        part = rgba.reshape(*grid, 4).astype(np.float64) / 255
        alpha = part[..., 3:]
        covered = alpha.sum((1, 3))
        color = (part[..., :3] * alpha).sum((1, 3)) / np.maximum(covered, 1e-9)
        layers.append(np.concatenate([color, covered / _SUPERSAMPLING**2], axis=-1))
    return layers


def _triangles(shape: Meshes | Pointclouds, color: Color) -> offscreen.Triangles:
    if isinstance(shape, Meshes):
        faces = shape.faces_packed()
        corners = shape.verts_packed().double()[faces]
        normals, colors = corner_normals(corners, faces, 40.0), _corner_colors(shape, color)
    else:
        points = shape.points_packed().double()
        ball, faces = _icosahedron()
        normals = ball[faces].expand(len(points), 20, 3, 3).reshape(-1, 3, 3)
        corners = points.repeat_interleave(20, 0)[:, None] + _point_radius(points) * normals
        colors = _point_colors(shape, color).repeat_interleave(20, 0)[:, None].expand(-1, 3, 3)
    return offscreen.Triangles(*(part.float().numpy() for part in (corners, normals, colors)))


def _icosahedron() -> tuple[Float[Tensor, "12 3"], Tensor]:
    """Corners on the unit sphere and faces seen from outside; a ball of few triangles."""
    golden = (1 + math.sqrt(5)) / 2
    flat = [(0.0, s, t * golden) for s in (-1.0, 1.0) for t in (-1.0, 1.0)]
    verts = torch.tensor([corner[i:] + corner[:i] for i in range(3) for corner in flat], dtype=torch.float64)
    near = (torch.cdist(verts, verts) - 2).abs() < 1e-6  # every edge is 2 long
    faces = [(a, b, c) for a in range(12) for b in range(a) for c in range(b) if near[a, b] & near[b, c] & near[c, a]]
    index = torch.tensor(faces)
    inward = torch.linalg.det(verts[index]) < 0
    index[inward] = index[inward].flip(1)
    return verts / verts.norm(dim=1, keepdim=True), index


# ------------------------------------------------------------------------------------------------------- built in


def _draw_builtin(drawing: _Drawing) -> Float[np.ndarray, "H W 4"]:
    shape, camera, color = drawing
    if isinstance(shape, Meshes):
        colors = _corner_colors(shape, color).mean(1).to(shape.verts_packed().dtype)
        return raycast(shape, camera, face_colors=colors, renderer="builtin").rgba.double().numpy()
    return _splat(shape, camera, color)


def _splat(cloud: Pointclouds, camera: Camera, color: Color) -> Float[np.ndarray, "H W 4"]:
    """Points as small balls: each pixel of a disc takes the ball that bulges nearest to the camera."""
    factor = 3
    height, width = (side * factor for side in camera.image_size)
    points = cloud.points_packed().double()
    pixels, depth = camera.resize((height, width)).project(points)
    radius = _point_radius(points)
    scale = float(camera.intrinsics[0, 0]) * factor
    front = np.flatnonzero((depth > radius).numpy())
    u, z = pixels.numpy()[front], depth.numpy()[front]
    reach = np.clip(scale * radius / z, 0.75, None)  # pixels; a far point still fills one
    nearest = np.full(height * width, np.inf)
    shade = np.zeros((height * width, 3))
    colors = _point_colors(cloud, color).double().numpy()[front]
    key = np.array([-0.45, -0.75, -0.5]) / np.linalg.norm([-0.45, -0.75, -0.5])  # as the ray caster's light
    limit = math.ceil(float(reach.max())) if len(reach) else 0
    base = np.floor(u).astype(np.int64)
    for dy in range(-limit, limit + 1):
        for dx in range(-limit, limit + 1):
            at = base + np.array([dx, dy])
            offset = (at + 0.5 - u) / reach[:, None]
            squared = (offset**2).sum(1)
            hit = (squared <= 1) & (at >= 0).all(1) & (at < (width, height)).all(1)
            rows = np.flatnonzero(hit)
            bulge = np.sqrt(1 - squared[rows])
            where, distance = at[rows, 1] * width + at[rows, 0], z[rows] - radius * bulge
            order = np.lexsort((distance, where))
            where, first = np.unique(where[order], return_index=True)
            rows, bulge, distance = rows[order][first], bulge[order][first], distance[order][first]
            closer = distance < nearest[where]
            where, rows, bulge = where[closer], rows[closer], bulge[closer]
            nearest[where] = distance[closer]
            normal = np.column_stack([offset[rows], -bulge])
            light = 0.35 + 0.30 * bulge + 0.45 * np.clip(normal @ key, 0, None)
            shade[where] = colors[rows] * light[:, None]
    covered = np.isfinite(nearest).reshape(height // factor, factor, width // factor, factor).sum((1, 3))
    total = shade.reshape(height // factor, factor, width // factor, factor, 3).sum((1, 3))
    mean = total / np.maximum(covered, 1)[..., None]
    return np.concatenate([mean.clip(0, 1), covered[..., None] / factor**2], axis=-1)


# ------------------------------------------------------------------------------------------------------- turning


def turntable(
    shape: Any,
    path: str | os.PathLike[str],
    *,
    frames: int = 36,
    size: tuple[int, int] = (320, 320),
    color: Color = PALETTE[0],
    background: Color = WHITE,
    renderer: str = "auto",
) -> str:
    """Write a GIF or MP4 of one shape turning once around the vertical axis; returns the renderer used."""
    shapes = _shapes(shape)
    if len(shapes) != 1 or frames < 1:
        raise ValueError(f"a turntable shows one shape in at least 1 frame, got {len(shapes)} and {frames}")
    points = all_points(shapes)
    center = (points.amin(0) + points.amax(0)) / 2
    radius = max(float((points - center).norm(dim=1).max()), 1e-6)
    narrow = math.atan(math.tan(math.radians(_FIELD_OF_VIEW) / 2) * min(1.0, size[1] / size[0]))
    distance = radius / math.sin(narrow) * 1.02  # the ball around the shape stays inside from everywhere
    cameras = [_look(center, 360 * i / frames, distance, size) for i in range(frames)]
    jobs = [Job(shapes[0], camera, color) for camera in cameras]
    result = render_many(jobs, size=size, background=background, renderer=renderer)
    write_film(path, result.images)
    return result.renderer


def write_film(path: str | os.PathLike[str], frames: Sequence[Pixels], *, seconds: float = 0.08) -> None:
    """Frames (H, W, 3) uint8 as a GIF, or as an MP4 that every browser plays, by the name's ending.

    An MP4 needs imageio and ffmpeg, and gets even sides by repeating the last row or column. Raises ValueError for
    another ending, ImportError naming the pip line.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix == ".gif":
        images = [Image.fromarray(frame).quantize(128, dither=Image.Dither.NONE) for frame in frames]
        with atomic_write(path) as file:
            images[0].save(
                file, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 * seconds), loop=0
            )
        return
    if suffix != ".mp4":
        raise ValueError(f"{os.fspath(path)}: films are written as .gif or .mp4, not {suffix or 'without an ending'}")
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError('MP4 films need ffmpeg: pip install "vision3dgen[video]"; GIF needs nothing') from error
    even = [np.pad(f, ((0, f.shape[0] % 2), (0, f.shape[1] % 2), (0, 0)), mode="edge") for f in frames]
    with tempfile.TemporaryDirectory(prefix="vision3dgen-") as folder:
        written = os.path.join(folder, "film.mp4")
        size = (even[0].shape[1], even[0].shape[0])
        writer = imageio_ffmpeg.write_frames(written, size, fps=1 / seconds, codec="libx264", macro_block_size=2)
        writer.send(None)
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        with atomic_write(path) as file, open(written, "rb") as film:
            shutil.copyfileobj(film, file)
