"""One model of a data set: made from its source in steps, written, and recorded.

What is computed is computed from the vertices exactly as the OBJ will hold them. The record, written last, makes the
model complete; a mesh file that cannot be used leaves rejected.json instead.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite
from vision3dgen.datasets.manifest import read_json, sha256, write_json
from vision3dgen.datasets.shapenet import DEPTH_UNITS
from vision3dgen.datasets.sources import Generated, Loaded, MeshFile, Rejected, Source, digest
from vision3dgen.files import atomic_write
from vision3dgen.io import save_mesh, save_npz, save_obj, write_binvox, write_depth_png, write_png
from vision3dgen.ops.inside import nearest_faces, winding_number
from vision3dgen.ops.meshes import sample_points_from_meshes
from vision3dgen.ops.render import Rendering, raycast_views, resolve_renderer
from vision3dgen.ops.repair import BETA, is_inside_grid, remesh_watertight, repair
from vision3dgen.ops.voxels import voxelize
from vision3dgen.parallel import limited
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes

STEPS = ("repair", "watertight", "points", "surface", "distances", "voxels", "surface_voxels", "views")
PLAIN = ("points", "surface", "voxels", "views")  # all that Occupancy Networks and 3D-R2N2 publish
BOX = 0.55  # half edge of the cube of query points
NEAR = (0.025, 0.008)  # deviations of points near the surface: DeepSDF's, whose shapes are twice as large
AMBIGUOUS = 0.1  # winding numbers closer than this to 1/2 are counted

_FORMAT = 2  # of record.json; a change of what is written for the same settings raises it


@dataclass(frozen=True)
class Watertight:
    """How the step "watertight" makes its surface: see `ops.remesh_watertight`.

    resolution: cells along the longest edge; thickness: in longest edges; most: a model whose visible surface is on
    average farther than this from the new one, in longest edges, is rejected.
    """

    resolution: int = 128
    thickness: float = 0.0
    most: float = 0.01


@dataclass(frozen=True)
class Settings:
    """What the bytes of a model depend on, beside its source.

    views: pictures, by 3D-R2N2's cameras unless others are given; points: samples of each kind; image_size: side of the
    pictures; resolutions: of the voxels; steps: a choice of STEPS, in any order; renderer: what finds nearest faces,
    along rays and around points.
    """

    seed: int = 0
    views: int = 24
    points: int = 100_000
    image_size: int = 137
    resolutions: tuple[int, ...] = (32,)
    renderer: str = "auto"
    steps: tuple[str, ...] = tuple(step for step in STEPS if step != "watertight")
    watertight: Watertight = field(default_factory=Watertight)
    cameras: str | None = None  # digest of cameras that are given

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("views", 1), ("points", 1), ("image_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.resolutions or min(self.resolutions) < 1:
            raise ValueError(f"resolution must be at least 1, got {self.resolutions}")
        for step in self.steps:
            check_choice("step", step, STEPS)
        object.__setattr__(self, "steps", tuple(step for step in STEPS if step in self.steps))
        object.__setattr__(self, "resolutions", tuple(self.resolutions))
        object.__setattr__(self, "renderer", resolve_renderer(self.renderer))

    def described(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))


class Limits(NamedTuple):
    """Of one model: seconds by the clock, and memory of its process; None for none."""

    seconds: float | None = None
    mebibytes: int | None = None


class Job(NamedTuple):
    root: Path
    source: Source
    settings: Settings
    cameras: Camera | None  # given ones, a batch
    limits: Limits
    whole: bool  # whether each file's sha256 is reported, or the record's alone


class Done(NamedTuple):
    """A model that is complete."""

    facts: dict[str, Any]  # its record, without files and settings
    files: dict[str, str]  # sha256 of files


def folder_of(root: Path, name: str, source: Source) -> Path:
    return root / name / source.synset / source.model


# ----------------------------------------------------------------------------------------------------- records


def complete(root: Path, source: Source, settings: Settings, *, whole: bool) -> Done | None:
    """A model that is complete; ValueError if it was made with other settings, or from another file."""
    path = folder_of(root, "ShapeNetGeometry", source) / "record.json"
    if not path.is_file():
        return None
    record = read_json(path)
    expected = {**settings.described(), **source.identity}
    found = {**record.get("settings", {}), **record.get("source", {})}
    for key in expected:
        if found.get(key) != expected[key]:
            raise ValueError(
                f"{path}: {source.synset}/{source.model} was prepared with {key}={found.get(key)!r}, now "
                f"{key}={expected[key]!r} is asked for; choose another root or delete this model's folders"
            )
    return _done(root, source, record, whole) if all((root / file).is_file() for file in record["files"]) else None


def rejected_before(root: Path, source: MeshFile, settings: Settings) -> Rejected | None:
    """Why an earlier run with these settings could not use the same file."""
    path = folder_of(root, "ShapeNetGeometry", source) / "rejected.json"
    if not path.is_file():
        return None
    found = read_json(path)
    if found["settings"] != settings.described() or found["source"] != source.identity:
        return None
    return Rejected(source.name, found["step"], found["error"])


def _done(root: Path, source: Source, record: dict[str, Any], whole: bool) -> Done:
    path = folder_of(root, "ShapeNetGeometry", source) / "record.json"
    files = record["files"] if whole else {path.relative_to(root).as_posix(): sha256(path)}
    return Done({key: value for key, value in record.items() if key not in ("files", "settings")}, files)


# ----------------------------------------------------------------------------------------------------- one model


class _At:
    """The step that is being done."""

    step = "read"


def prepare_one(job: Job) -> Done | Rejected:
    """Make and write one model, or say why its file cannot be used.

    Raises OSError when the files cannot be written, and whatever is wrong with a generated shape.
    """
    at = _At()
    source, limits = job.source, job.limits
    try:
        with limited(seconds=limits.seconds, mebibytes=limits.mebibytes):
            loaded = source.load()
            at.step = "check"
            loaded = _check(loaded)
            made = _make(loaded, job, at)
            at.step = "write"
            return _done(job.root, source, _write(job, made), job.whole)
    except Exception as error:  # whatever is wrong with one file of somebody else's, the others go on
        if isinstance(source, Generated):
            error.add_note(f"while generating {source.synset}/{source.model}, shape {source.index}")
            raise
        if at.step == "write" and isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise
        return _reject(job, source, at.step, error)


def _reject(job: Job, source: MeshFile, step: str, error: Exception) -> Rejected:
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return Rejected(source.name, step, f"needs more than {job.limits.mebibytes} MiB of memory")
    reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    rejected = Rejected(source.name, step, reason.replace(source.path, source.name))
    if not isinstance(error, TimeoutError):  # time and memory may suffice another time: nothing is recorded
        path = folder_of(job.root, "ShapeNetGeometry", source) / "rejected.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"settings": job.settings.described(), "source": source.identity}
        write_json(path, {**about, "step": step, "error": rejected.error})
    return rejected


def _check(loaded: Loaded) -> Loaded:
    """Without the vertices no face uses; ValueError for what has no surface."""
    verts, faces = loaded.mesh.get_mesh_verts_faces(0)
    check_finite(vertices=verts)
    if not len(faces):
        raise ValueError(f"no faces ({len(verts)} vertices)")
    mesh = loaded.mesh.submeshes([[torch.arange(len(faces))]])
    low, high = mesh.verts_packed().amin(0), mesh.verts_packed().amax(0)
    diagonal = float((high - low).norm())
    if diagonal == 0 or float(mesh.faces_areas_packed().sum()) <= 1e-12 * diagonal**2:
        raise ValueError(f"no surface: {len(faces)} faces, all of area zero")
    return loaded._replace(mesh=mesh)


# -------------------------------------------------------------------------------------------------------- making


class _Views(NamedTuple):
    lines: list[str] | None  # of rendering_metadata.txt; None for given cameras
    cameras: list[Camera]
    pictures: list[Rendering]


class _Made(NamedTuple):
    mesh: Meshes  # as written, float32
    face_material: Tensor
    materials: Mapping[str, tuple[float, float, float]]
    source_frame: Frame  # from the source's coordinates to the OBJ's
    frame: Frame  # from the OBJ's coordinates to the samples'
    closed: Meshes | None  # what the step "watertight" made, in the OBJ's coordinates
    arrays: dict[str, dict[str, Any]]  # of npz files, by path
    voxels: dict[str, Tensor]  # (D, H, W) bool, by path
    views: _Views | None
    facts: dict[str, Any]


def _make(loaded: Loaded, job: Job, at: _At) -> _Made:
    source, settings = job.source, job.settings
    steps = settings.steps
    source_frame = Frame.unit_diagonal(loaded.mesh.verts_packed())
    verts, faces = source_frame.normalize(loaded.mesh).get_mesh_verts_faces(0)
    mesh, material = Meshes([verts.float()], [faces]), loaded.face_material
    facts: dict[str, Any] = {}
    if "repair" in steps:
        at.step = "repair"
        repaired = repair(mesh)
        if not len(repaired.kept):
            raise ValueError(f"no surface: {len(faces)} faces, all degenerate")
        mesh = repaired.mesh.submeshes([[torch.arange(len(repaired.kept))]])
        material = material[repaired.kept]
        facts["repair"] = repaired.report._asdict()
        facts["watertight"] = repaired.report.watertight
        facts["turned"] = repaired.report.turned == len(repaired.kept)
    else:
        facts["watertight"] = _is_closed(*mesh.get_mesh_verts_faces(0))
        facts["turned"] = facts["watertight"] and _volume(verts, faces) < 0
        if facts["turned"]:
            mesh = Meshes([mesh.verts_packed()], [faces.flip(1)])
    frame = Frame.longest_edge(mesh.verts_packed())
    solid = frame.normalize(Meshes([mesh.verts_packed().double()], [mesh.faces_packed()]))
    closed = None
    if "watertight" in steps:
        at.step = "watertight"
        solid = _watertight(solid, settings, facts)
        closed = frame.denormalize(solid)
    watertight = facts["watertight"] or closed is not None

    key = int(digest(f"{source.synset}/{source.model}"), 16)
    streams = [np.random.default_rng([settings.seed, key, stream]) for stream in range(4)]
    where = {"loc": np.array(frame.center), "scale": np.array(frame.scale)}
    arrays: dict[str, dict[str, Any]] = {}
    points = None
    if "points" in steps or "distances" in steps:
        at.step = "points"
        # Float16 rounds a point by up to 2e-4, so occupancies are asked for the rounded points, as they will be read.
        points = ((streams[1].random((settings.points, 3)) * 2 - 1) * BOX).astype(np.float16)
        winding = winding_number(solid, torch.from_numpy(points.astype(np.float64)), beta=BETA).abs()
        inside = winding > 0.5
        facts["ambiguous"] = float(((winding - 0.5).abs() < AMBIGUOUS).double().mean())
        arrays["ShapeNet/points.npz"] = {"points": points, "occupancies": np.packbits(inside.numpy()), **where}
    generator = torch.Generator().manual_seed(int(streams[2].integers(2**62)))
    if "surface" in steps:
        at.step = "surface"
        on_surface, normals = sample_points_from_meshes(solid, settings.points, True, generator=generator)
        stored = {"points": on_surface[0].numpy(), "normals": normals[0].numpy()}
        arrays["ShapeNet/pointcloud.npz"] = {key: a.astype(np.float16) for key, a in stored.items()} | where
    if points is not None and "distances" in steps:
        at.step = "distances"
        near = _near(solid, settings.points, streams[3])
        signed = _distances(solid, torch.from_numpy(points.astype(np.float64)), inside, settings.renderer)
        within = winding_number(solid, torch.from_numpy(near.astype(np.float64)), beta=BETA).abs() > 0.5
        near_signed = _distances(solid, torch.from_numpy(near.astype(np.float64)), within, settings.renderer)
        arrays["ShapeNetGeometry/distances.npz"] = {
            "distances": signed, "near_points": near, "near_distances": near_signed, **where,
        }  # fmt: skip
    voxels: dict[str, Tensor] = {}
    for size in settings.resolutions:
        grid = GridSpec.cube(size)
        if "voxels" in steps:
            at.step = "voxels"
            filled = voxelize(solid, grid, inside="nonzero")[0] if watertight else is_inside_grid(solid, grid)
            voxels[f"ShapeNetVox{size}/model.binvox"] = filled
            voxels.setdefault("ShapeNet/model.binvox", filled)
        if "surface_voxels" in steps:
            at.step = "surface_voxels"
            voxels[f"ShapeNetVox{size}/surface.binvox"] = voxelize(solid, grid, "surface")[0]
    if not watertight and points is not None and not inside.any():
        solids = [filled for path, filled in voxels.items() if path.endswith("model.binvox")]
        if not any(filled.any() for filled in solids):
            at.step = "points"
            raise ValueError("nothing is inside: an open sheet, no sampled point has a winding number over 0.5")
    views = None
    if "views" in steps:
        at.step = "views"
        views = _draw(mesh, torch.tensor(list(loaded.materials.values()))[material], job, streams[0])
    if "points" not in steps:
        arrays.pop("ShapeNet/points.npz", None)
    facts |= loaded.about
    return _Made(mesh, material, loaded.materials, source_frame, frame, closed, arrays, voxels, views, facts)


def _watertight(solid: Meshes, settings: Settings, facts: dict[str, Any]) -> Meshes:
    how = settings.watertight
    made = remesh_watertight(solid, how.resolution, thickness=how.thickness, renderer=settings.renderer)
    facts["distortion"] = made.distortion._asdict()
    if made.distortion.mean > how.most:
        raise ValueError(
            f"the watertight surface is on average {made.distortion.mean:.4f} longest edges from what can be seen of "
            f"the original, more than {how.most:g}"
        )
    return made.mesh


def _near(solid: Meshes, count: int, stream: np.random.Generator) -> np.ndarray:
    """(N, 3) float32: samples of the surface, moved by normal deviates, one half of each deviation."""
    generator = torch.Generator().manual_seed(int(stream.integers(2**62)))
    surface = sample_points_from_meshes(solid, count, generator=generator)[0].numpy()
    deviation = np.where(np.arange(count) % 2, NEAR[1], NEAR[0])[:, None]
    return (surface + deviation * stream.standard_normal((count, 3))).astype(np.float32)


def _distances(solid: Meshes, points: Tensor, inside: Tensor, renderer: str) -> np.ndarray:
    """(N,) float32 signed distances, negative inside."""
    finder: Literal["torch", "open3d"] = "open3d" if renderer == "open3d" else "torch"
    distances = nearest_faces(solid.verts_packed(), solid.faces_packed(), points, finder=finder).distances
    return torch.where(inside, -distances, distances).float().numpy()


def _draw(mesh: Meshes, face_colors: Tensor, job: Job, stream: np.random.Generator) -> _Views:
    settings = job.settings
    lines = None
    if job.cameras is not None:
        cameras = [job.cameras[index] for index in range(len(job.cameras))]
    else:
        places = [
            (round(360 * a, 6), round(25 + 5 * e, 6), round(0.65 + 0.3 * d, 6))
            for a, e, d in stream.random((settings.views, 3)).tolist()
        ]
        cameras = [Camera.from_r2n2(*place, settings.image_size) for place in places]
        lines = [f"{azimuth} {elevation} 0 {ratio} 25\n" for azimuth, elevation, ratio in places]
    pictures = list(raycast_views(mesh, cameras, face_colors=face_colors, renderer=settings.renderer))
    return _Views(lines, cameras, pictures)


def _is_closed(verts: Tensor, faces: Tensor) -> bool:
    """Whether each edge, vertices at one place being one, is run along as often forth as back."""
    _, place = torch.unique(verts, dim=0, return_inverse=True)
    start = place[faces].reshape(-1)
    end = place[faces].roll(-1, 1).reshape(-1)
    edges = torch.minimum(start, end) * len(verts) + torch.maximum(start, end)
    which = edges.unique(return_inverse=True)[1]
    net = torch.zeros(len(edges), dtype=torch.int64).index_add_(0, which, (end - start).sign())
    return not bool(net.any())


def _volume(verts: Tensor, faces: Tensor) -> float:
    a, b, c = verts[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum()) / 6


# ------------------------------------------------------------------------------------------------------- writing


def _write(job: Job, made: _Made) -> dict[str, Any]:
    """Write a model's files, its record last."""
    root, source = job.root, job.source
    files: list[Path] = []
    cleared: set[Path] = set()

    def place(folder: str, name: str) -> Path:
        path = folder_of(root, folder, source) / name
        if path.parent not in cleared:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(path.parent)
            cleared.add(path.parent)
        files.append(path)
        return path

    obj = place("ShapeNetCore.v2", "models/model_normalized.obj")
    files.append(obj.with_suffix(".mtl"))
    verts, faces = made.mesh.get_mesh_verts_faces(0)
    save_obj(obj, verts, faces, face_material=made.face_material, materials=made.materials)
    if made.closed is not None:
        save_mesh(place("ShapeNetGeometry", "watertight.ply"), made.closed)
    low = [center - made.frame.scale / 2 for center in made.frame.center]
    for name, filled in made.voxels.items():
        write_binvox(place(*name.split("/")), filled, (low[0], low[1], low[2]), made.frame.scale)
    for name, arrays in made.arrays.items():
        save_npz(place(*name.split("/")), **arrays)
    if made.views is not None:
        _write_views(made.views, place)
    write_json(place("ShapeNetGeometry", "frame.json"), made.source_frame.to_dict())
    (folder_of(root, "ShapeNetGeometry", source) / "rejected.json").unlink(missing_ok=True)

    record = {
        "settings": job.settings.described(),
        "source": source.identity,
        **made.facts,
        "files": {path.relative_to(root).as_posix(): sha256(path) for path in files},
    }
    write_json(folder_of(root, "ShapeNetGeometry", source) / "record.json", record)
    return record


def _write_views(views: _Views, place: Any) -> None:
    names = [f"{number:02d}" for number in range(len(views.pictures))]
    for name, picture in zip(names, views.pictures):
        write_png(place("ShapeNetRendering", f"rendering/{name}.png"), _to_bytes(picture.rgba))
        write_depth_png(place("ShapeNetGeometry", f"{name}_depth.png"), picture.depth, units_per_metre=DEPTH_UNITS)
        normals = torch.where(picture.mask[..., None], picture.normals * 0.5 + 0.5, 0)  # black: none
        write_png(place("ShapeNetGeometry", f"{name}_normals.png"), _to_bytes(normals))
        write_png(place("ShapeNetGeometry", f"{name}_mask.png"), picture.mask.numpy())
    with atomic_write(place("ShapeNetRendering", "rendering/renderings.txt")) as file:
        file.write("".join(f"{name}.png\n" for name in names).encode())
    if views.lines is not None:
        with atomic_write(place("ShapeNetRendering", "rendering/rendering_metadata.txt")) as file:
            file.write("".join(views.lines).encode())
        return
    matrices = {}
    for number, camera in enumerate(views.cameras):  # as Occupancy Networks' cameras.npz
        matrices[f"world_mat_{number}"] = torch.cat([camera.rotation, camera.translation[:, None]], 1).double().numpy()
        matrices[f"camera_mat_{number}"] = camera.intrinsics.double().numpy()
    save_npz(place("ShapeNetRendering", "rendering/cameras.npz"), **matrices)


def clear(folder: Path) -> None:
    """Remove what a killed run may have left unfinished."""
    for path in folder.glob(".tmp-*"):
        path.unlink(missing_ok=True)


def _to_bytes(picture: Tensor) -> np.ndarray:
    return (picture * 255).round().byte().numpy()
