"""Data made ready: generated shapes, or any folder of meshes, written in the public ShapeNet layouts.

One writer serves both. Under the root, for each synset and model:

    ShapeNetCore.v2/S/M/models/model_normalized.obj, .mtl   bounding box centred at 0, its diagonal 1, +y up, -z front
    ShapeNetRendering/S/M/rendering/00.png ...              137 x 137 RGBA; renderings.txt, rendering_metadata.txt
    ShapeNetVox32/S/M/model.binvox                          32^3 solid, in the OBJ's coordinates
    ShapeNet/S/M/points.npz, pointcloud.npz, model.binvox   Occupancy Networks' samples, longest edge 1
    ShapeNetGeometry/S/M/00_depth.png, 00_normals.png, 00_mask.png, frame.json, record.json

The bytes depend on the arguments and the installed renderer, not on the number of workers. A model is complete once its
record.json is there; a run that was stopped goes on behind the complete ones.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vision3dgen.checks import check_finite
from vision3dgen.datasets.manifest import SPLITS, SplitManifest, assign_splits, read_json, sha256, write_json
from vision3dgen.datasets.procedural import CATEGORIES, category_name, make_shape
from vision3dgen.datasets.shapenet import DEPTH_UNITS
from vision3dgen.files import atomic_write
from vision3dgen.io import load_mesh, save_npz, save_obj, write_binvox, write_depth_png, write_png
from vision3dgen.ops.inside import contains, winding_number
from vision3dgen.ops.meshes import sample_points_from_meshes
from vision3dgen.ops.render import GRAY, Rendering, raycast_views, resolve_renderer
from vision3dgen.parallel import map_in_order
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes

SUFFIXES = (".obj", ".ply", ".off", ".stl", ".glb")
OTHER = ("00000000", "meshes")  # synset and name of meshes whose folder names no category
BOX = 0.55  # half edge of the cube of query points
AMBIGUOUS = 0.1  # winding numbers closer than this to 1/2 are counted

_FORMAT = 1  # of record.json; a change of what is written for the same settings raises it


class Rejected(NamedTuple):
    file: str  # relative to the source folder
    step: str  # read, check, sample
    error: str


class Prepared(NamedTuple):
    """What a run of `prepare` did."""

    root: Path
    written: int
    kept: int  # complete already
    rejected: list[Rejected]
    manifest: Path  # the split manifest

    def __str__(self) -> str:
        lines = [f"{self.root}: {self.written} written, {self.kept} kept, {len(self.rejected)} rejected"]
        lines += [f"  {file}: {error} ({step})" for file, step, error in self.rejected]
        return "\n".join([*lines, f"splits: {self.manifest}"])


@dataclass(frozen=True)
class Settings:
    """What the bytes of a model depend on, beside its source."""

    seed: int
    views: int
    points: int
    image_size: int
    resolution: int
    renderer: str

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("views", 1), ("points", 1), ("image_size", 1), ("resolution", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Loaded(NamedTuple):
    mesh: Meshes  # one member, float64, in the source's coordinates
    materials: Mapping[str, tuple[float, float, float]]
    face_material: Tensor  # (F,)
    about: Mapping[str, Any]  # for the record


@dataclass(frozen=True)
class Generated:
    """The procedural shape number `index` of a category."""

    synset: str
    model: str
    index: int

    @property
    def identity(self) -> dict[str, Any]:
        return {"category": CATEGORIES[self.synset], "index": self.index}

    def load(self) -> Loaded:
        shape = make_shape(self.synset, int(self.model[:15], 16))
        mesh = Meshes([torch.from_numpy(shape.vertices)], [torch.from_numpy(shape.faces)])
        materials = {part.replace(" ", "_"): (r, g, b) for part, (r, g, b) in zip(shape.parts, shape.colors.tolist())}
        return Loaded(mesh, materials, torch.from_numpy(shape.face_part), {"parameters": dict(shape.parameters)})


@dataclass(frozen=True)
class MeshFile:
    """A mesh file of somebody else's."""

    synset: str
    model: str
    path: str
    name: str  # relative to the source folder

    @property
    def identity(self) -> dict[str, Any]:
        return {"file": self.name, "sha256": sha256(self.path)}

    def load(self) -> Loaded:
        read = load_mesh(self.path)
        verts, faces = read.get_mesh_verts_faces(0)
        color = read.faces_attributes_packed().get("color")
        corner_color = read.verts_attributes_packed().get("color")
        if color is None and corner_color is not None:
            color = corner_color[faces].mean(1)
        if color is None or color.shape[1:] != (3,):
            return Loaded(Meshes([verts.double()], [faces]), {"surface": GRAY}, torch.zeros(len(faces)).long(), {})
        # eight levels per channel keep the materials few
        palette, material = torch.unique((color.clamp(0, 1) * 8).round() / 8, dim=0, return_inverse=True)
        materials = {f"color_{i}": (r, g, b) for i, (r, g, b) in enumerate(palette.tolist())}
        return Loaded(Meshes([verts.double()], [faces]), materials, material, {})


Source = Generated | MeshFile


# ------------------------------------------------------------------------------------------------------- commands


def prepare_procedural(
    root: str | os.PathLike[str],
    *,
    shapes_per_category: int,
    views: int,
    seed: int = 0,
    categories: Sequence[str] | None = None,
    points: int = 100_000,
    split: tuple[float, float, float] = (0.7, 0.1, 0.2),
    name: str = "procedural_v1",
    workers: int = 1,
    renderer: str = "auto",
    image_size: int = 137,
    resolution: int = 32,
) -> Prepared:
    """Generate a ShapeNet-style data set of the 13 categories of 3D-R2N2 under `root`.

    categories: names or synset ids, default all. points: samples in space and on the surface, each. split: shares of
    train, val and test in each category; more shapes later leave the split of the first ones as it is.
    Raises ValueError naming what differs if `root` holds models of other settings; OSError if a file cannot be written,
    and then a second run goes on where this one stopped.
    """
    if shapes_per_category < 1:
        raise ValueError(f"shapes_per_category must be at least 1, got {shapes_per_category}")
    settings = Settings(seed, views, points, image_size, resolution, resolve_renderer(renderer))
    wanted = {category_name(category) for category in categories} if categories else set(CATEGORIES.values())
    synsets = [synset for synset, category in CATEGORIES.items() if category in wanted]
    sources = [
        Generated(synset, _digest(f"{synset}/{seed}/{index}"), index)
        for synset in synsets
        for index in range(shapes_per_category)
    ]
    assigned = assign_splits(shapes_per_category, split)
    return _prepare(Path(root), sources, settings, name, lambda _: assigned, workers).prepared


def prepare_meshes(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    views: int,
    seed: int = 0,
    points: int = 100_000,
    split: tuple[float, float, float] = (1.0, 0.0, 0.0),
    name: str = "meshes_v1",
    workers: int = 1,
    renderer: str = "auto",
    image_size: int = 137,
    resolution: int = 32,
) -> Prepared:
    """Bring every OBJ, PLY, OFF, STL and GLB file under `source` into the ShapeNet layout under `root`.

    A file belongs to the category (synset id or name) its folder is named after, else to "00000000". Meshes are
    centred and scaled to a bounding box diagonal of 1 (frame.json leads back); closed ones that are inside out are
    turned. Inside is where the winding number is beyond 1/2, for open meshes too. A file that cannot be used (broken,
    without area, or an open sheet with nothing inside) is listed in ROOT/manifest.json with step and reason and does
    not stop the run; the manifest also says of each other file whether it is watertight and which share of its points
    has a winding number within 0.1 of 1/2.
    Raises ValueError if there is no mesh file, or `root` holds models of other settings.
    """
    folder, root = Path(source), Path(root)
    settings = Settings(seed, views, points, image_size, resolution, resolve_renderer(renderer))
    assign_splits(1, split)
    sources = _mesh_files(folder, root)
    if not sources:
        raise ValueError(
            f"{folder}: no {', '.join(SUFFIXES)} file in it" if folder.is_dir() else f"{folder}: no such folder"
        )
    outcome = _prepare(root, sources, settings, name, lambda count: assign_splits(count, split), workers)
    accepted = [
        {"file": record["source"]["file"], "synset": source.synset, "model": source.model}
        | {key: record[key] for key in ("watertight", "ambiguous", "turned")}
        for source, record in outcome.records
    ]
    rejected = [entry._asdict() for entry in outcome.prepared.rejected]
    write_json(root / "manifest.json", {"name": name, "seed": seed, "accepted": accepted, "rejected": rejected})
    return outcome.prepared


def _mesh_files(folder: Path, root: Path) -> list[MeshFile]:
    """Mesh files under `folder`, but not those under `root`, with the category their folders name and a model id."""
    ids = {category: synset for synset, category in CATEGORIES.items()} | {synset: synset for synset in CATEGORIES}
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.resolve().is_relative_to(root.resolve())
    )
    placed = []
    for path in found:
        name = path.relative_to(folder).as_posix()
        category = next((ids[part] for part in reversed(Path(name).parts[:-1]) if part in ids), OTHER[0])
        placed.append((category, re.sub(r"[^A-Za-z0-9_-]", "_", path.stem), name, path))
    taken = Counter((category, model.lower()) for category, model, _, _ in placed)
    return [
        MeshFile(
            category, model if taken[category, model.lower()] == 1 else f"{model}-{_digest(name)[:8]}", str(path), name
        )
        for category, model, name, path in placed
    ]


# ---------------------------------------------------------------------------------------------------------- a run


class _Outcome(NamedTuple):
    prepared: Prepared
    records: list[tuple[Source, dict[str, Any]]]


def _prepare(
    root: Path, sources: Sequence[Source], settings: Settings, name: str, assign: Any, workers: int
) -> _Outcome:
    """Write the models that are not complete, then the lists and the manifest of all."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must be letters, digits, '_' or '-', got {name!r}")
    records = {source: record for source in sources if (record := _complete(root, source, settings)) is not None}
    kept = len(records)
    todo = [source for source in sources if source not in records]
    rejected = []
    root.mkdir(parents=True, exist_ok=True)
    jobs = [(root, source, settings) for source in todo]
    for source, result in zip(todo, map_in_order(_prepare_one, jobs, workers=workers, title="preparing")):
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            records[source] = result
    whole = [(source, records[source]) for source in sources if source in records]
    manifest = _write_lists(root, whole, settings, name, assign)
    return _Outcome(Prepared(root, len(records) - kept, kept, rejected, manifest), whole)


def _complete(root: Path, source: Source, settings: Settings) -> dict[str, Any] | None:
    """The record of a model that is complete; ValueError if it was made with other settings."""
    path = _folder(root, "ShapeNetGeometry", source) / "record.json"
    if not path.is_file():
        return None
    record = read_json(path)
    expected = {**_described(settings), **source.identity}
    found = {**record.get("settings", {}), **record.get("source", {})}
    for key in expected:
        if found.get(key) != expected[key]:
            raise ValueError(
                f"{path}: {source.synset}/{source.model} was prepared with {key}={found.get(key)!r}, now "
                f"{key}={expected[key]!r} is asked for; choose another root or delete this model's folders"
            )
    return record if all((root / file).is_file() for file in record["files"]) else None


def _write_lists(
    root: Path, models: Sequence[tuple[Source, dict[str, Any]]], settings: Settings, name: str, assign: Any
) -> Path:
    """taxonomy.json, metadata.yaml, *.lst and the split manifest, which it returns."""
    members: dict[str, list[str]] = {}
    for source, _ in models:
        members.setdefault(source.synset, []).append(source.model)
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for synset, ids in members.items():
        assigned = assign(len(ids))
        for split in SPLITS:
            splits[split][synset] = sorted(model for model, own in zip(ids, assigned) if own == split)
            folder = root / "ShapeNet" / synset
            with atomic_write(folder / f"{split}.lst") as file:
                file.write("\n".join(splits[split][synset]).encode())  # readers split at newlines: none at the end
    names = {**CATEGORIES, OTHER[0]: OTHER[1]}
    if models:
        write_json(
            root / "ShapeNetCore.v2" / "taxonomy.json",
            [
                {"synsetId": synset, "name": names[synset], "children": [], "numInstances": len(ids)}
                for synset, ids in sorted(members.items())
            ],
        )
        with atomic_write(root / "ShapeNet" / "metadata.yaml") as file:
            entries = [f"'{synset}':\n  id: '{synset}'\n  name: {names[synset]}\n" for synset in sorted(members)]
            file.write("".join(entries).encode())
    (root / "splits").mkdir(exist_ok=True)
    path = root / "splits" / f"{name}.json"
    files = {file: digest for _, record in models for file, digest in record["files"].items()}
    SplitManifest(name, _FORMAT, settings.seed, splits, files).write(path)
    return path


# ---------------------------------------------------------------------------------------------------------- a model


class _Shot(NamedTuple):
    azimuth: float
    elevation: float
    distance_ratio: float
    picture: Rendering


class _Made(NamedTuple):
    mesh: Meshes  # as written, float32
    source_frame: Frame  # from the source's coordinates to the OBJ's
    frame: Frame  # from the OBJ's coordinates to the samples'
    points: np.ndarray  # (N, 3) float16
    occupancies: np.ndarray  # (N,) bool
    surface: np.ndarray  # (N, 3) float16
    normals: np.ndarray  # (N, 3) float16
    voxels: Tensor  # (D, H, W) bool
    shots: list[_Shot]
    facts: dict[str, Any]


def _prepare_one(job: tuple[Path, Source, Settings]) -> dict[str, Any] | Rejected:
    """Make and write one model; its record, or the reason why a mesh file cannot be used."""
    root, source, settings = job
    step = "read"
    try:
        loaded = source.load()
        step = "check"
        loaded = _check(loaded)
        step = "sample"
        made = _make(loaded, source, settings)
    except Exception as error:  # whatever is wrong with one file of somebody else's, the others go on
        if isinstance(source, Generated):
            error.add_note(f"while generating {source.synset}/{source.model}, shape {source.index}")
            raise
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        return Rejected(source.name, step, reason.replace(source.path, source.name))
    return _write(root, source, settings, loaded, made)


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


def _make(loaded: Loaded, source: Source, settings: Settings) -> _Made:
    """Everything that is written, computed from the vertices exactly as the OBJ will hold them."""
    source_frame = Frame.unit_diagonal(loaded.mesh.verts_packed())
    verts, faces = source_frame.normalize(loaded.mesh).get_mesh_verts_faces(0)
    verts = verts.float()
    watertight = _is_closed(verts, faces)
    turned = watertight and _volume(verts.double(), faces) < 0
    if turned:
        faces = faces.flip(1)
    mesh = Meshes([verts], [faces])
    frame = Frame.longest_edge(verts)
    canonical = frame.normalize(Meshes([verts.double()], [faces]))

    key = int(_digest(f"{source.synset}/{source.model}"), 16)
    cameras, space, surface = (np.random.default_rng([settings.seed, key, stream]) for stream in range(3))
    # Float16 rounds a point by up to 2e-4, so occupancies are asked for the rounded points, as they will be read.
    points = ((space.random((settings.points, 3)) * 2 - 1) * BOX).astype(np.float16)
    winding = winding_number(canonical, torch.from_numpy(points.astype(np.float64))).abs()
    generator = torch.Generator().manual_seed(int(surface.integers(2**62)))
    on_surface, normals = sample_points_from_meshes(canonical, settings.points, True, generator=generator)
    cells = GridSpec.cube(settings.resolution).points(torch.float64)
    voxels = contains(canonical, cells.view(-1, 3)).view(cells.shape[:3])
    if not watertight and not voxels.any() and not (winding > 0.5).any():
        raise ValueError("nothing is inside: an open sheet, no sampled point has a winding number over 0.5")

    palette = torch.tensor(list(loaded.materials.values()))
    face_colors = palette[loaded.face_material]
    places = [
        (round(360 * a, 6), round(25 + 5 * e, 6), round(0.65 + 0.3 * d, 6))
        for a, e, d in cameras.random((settings.views, 3)).tolist()
    ]
    stands = [Camera.from_r2n2(*place, settings.image_size) for place in places]
    pictures = raycast_views(mesh, stands, face_colors=face_colors, renderer=settings.renderer)
    shots = [_Shot(*place, picture) for place, picture in zip(places, pictures)]
    return _Made(
        mesh,
        source_frame,
        frame,
        points,
        (winding > 0.5).numpy(),
        on_surface[0].numpy().astype(np.float16),
        normals[0].numpy().astype(np.float16),
        voxels,
        shots,
        {
            "watertight": watertight,
            "ambiguous": float(((winding - 0.5).abs() < AMBIGUOUS).double().mean()),
            "turned": turned,
        },
    )


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


def _write(root: Path, source: Source, settings: Settings, loaded: Loaded, made: _Made) -> dict[str, Any]:
    """Write a model's files, its record last."""
    files = []

    def place(folder: str, name: str) -> Path:
        path = _folder(root, folder, source) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append(path)
        return path

    obj = place("ShapeNetCore.v2", "models/model_normalized.obj")
    files.append(obj.with_suffix(".mtl"))
    verts, faces = made.mesh.get_mesh_verts_faces(0)
    save_obj(obj, verts, faces, face_material=loaded.face_material, materials=loaded.materials)

    low = [center - made.frame.scale / 2 for center in made.frame.center]
    for path in (place("ShapeNetVox32", "model.binvox"), place("ShapeNet", "model.binvox")):
        write_binvox(path, made.voxels, (low[0], low[1], low[2]), made.frame.scale)
    where = {"loc": np.array(made.frame.center), "scale": np.array(made.frame.scale)}
    packed = np.packbits(made.occupancies)
    save_npz(place("ShapeNet", "points.npz"), points=made.points, occupancies=packed, **where)
    save_npz(place("ShapeNet", "pointcloud.npz"), points=made.surface, normals=made.normals, **where)

    names = [f"{number:02d}" for number in range(len(made.shots))]
    for name, shot in zip(names, made.shots):
        picture = shot.picture
        write_png(place("ShapeNetRendering", f"rendering/{name}.png"), _to_bytes(picture.rgba))
        write_depth_png(place("ShapeNetGeometry", f"{name}_depth.png"), picture.depth, units_per_metre=DEPTH_UNITS)
        normals = torch.where(picture.mask[..., None], picture.normals * 0.5 + 0.5, 0)  # black: none
        write_png(place("ShapeNetGeometry", f"{name}_normals.png"), _to_bytes(normals))
        write_png(place("ShapeNetGeometry", f"{name}_mask.png"), picture.mask.numpy())
    with atomic_write(place("ShapeNetRendering", "rendering/renderings.txt")) as file:
        file.write("".join(f"{name}.png\n" for name in names).encode())
    with atomic_write(place("ShapeNetRendering", "rendering/rendering_metadata.txt")) as file:
        file.write("".join(f"{s.azimuth} {s.elevation} 0 {s.distance_ratio} 25\n" for s in made.shots).encode())
    write_json(place("ShapeNetGeometry", "frame.json"), made.source_frame.to_dict())

    record = {
        "settings": _described(settings),
        "source": source.identity,
        **made.facts,
        **loaded.about,
        "files": {path.relative_to(root).as_posix(): sha256(path) for path in files},
    }
    write_json(_folder(root, "ShapeNetGeometry", source) / "record.json", record)
    return record


def _folder(root: Path, folder: str, source: Source) -> Path:
    return root / folder / source.synset / source.model


def _described(settings: Settings) -> dict[str, Any]:
    return {"format": _FORMAT, **asdict(settings)}


def _to_bytes(picture: Tensor) -> np.ndarray:
    return (picture * 255).round().byte().numpy()


def _digest(text: str) -> str:
    """32 hexadecimal digits, as ShapeNet's model ids."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:32]
