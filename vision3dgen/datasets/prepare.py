"""Data made ready: generated shapes, ShapeNetCore, or any folder of meshes, in the public ShapeNet layouts.

One writer serves all. Under the root, for each synset S and model M, depending on the steps:

    ShapeNetCore.v2/S/M/models/model_normalized.obj, .mtl   bounding box centred at 0, its diagonal 1, +y up, -z front
    ShapeNetRendering/S/M/rendering/00.png ...              137 x 137 RGBA; renderings.txt, rendering_metadata.txt
    ShapeNetVox32/S/M/model.binvox, surface.binvox          solid and surface voxels, in the OBJ's coordinates; 64, 128
    ShapeNet/S/M/points.npz, pointcloud.npz, model.binvox   Occupancy Networks' samples, longest edge 1
    ShapeNetGeometry/S/M/00_depth.png, 00_normals.png, 00_mask.png, distances.npz, watertight.ply, frame.json
    ShapeNetGeometry/S/M/record.json                        written last; or rejected.json

The bytes depend on the arguments and the installed renderer, not on the number of workers. A model is complete once its
record.json is there; a run that was stopped goes on behind the complete ones.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vision3dgen.datasets.manifest import SPLITS, SplitManifest, assign_splits, write_json
from vision3dgen.datasets.prepared import (
    PLAIN,
    Done,
    Job,
    Limits,
    Settings,
    clear,
    complete,
    folder_of,
    prepare_one,
    rejected_before,
)
from vision3dgen.datasets.procedural import CATEGORIES, category_name
from vision3dgen.datasets.sources import (
    MESHES,
    OTHER,
    SUFFIXES,
    Generated,
    MeshFile,
    Rejected,
    Source,
    digest,
    mesh_files,
    shapenet_files,
)
from vision3dgen.files import atomic_write
from vision3dgen.parallel import Engine, Local, Lost, tracked
from vision3dgen.structures import Camera

LIMITS = Limits(seconds=600.0, mebibytes=4096)
_ATTEMPTS = 2  # at a model whose process dies


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
    settings = Settings(seed, views, points, image_size, (resolution,), renderer, PLAIN)
    wanted = {category_name(category) for category in categories} if categories else set(CATEGORIES.values())
    synsets = [synset for synset, category in CATEGORIES.items() if category in wanted]
    sources = [
        Generated(synset, digest(f"{synset}/{seed}/{index}"), index)
        for synset in synsets
        for index in range(shapes_per_category)
    ]
    assigned = assign_splits(shapes_per_category, split)
    return _prepare(Path(root), sources, settings, name, lambda _: assigned, _here(workers)).prepared


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
    settings = Settings(seed, views, points, image_size, (resolution,), renderer, PLAIN)
    assign_splits(1, split)
    sources = mesh_files(folder, root)
    if not sources:
        raise ValueError(
            f"{folder}: no {', '.join(SUFFIXES)} file in it" if folder.is_dir() else f"{folder}: no such folder"
        )
    outcome = _prepare(root, sources, settings, name, lambda count: assign_splits(count, split), _here(workers))
    _write_manifest(root, name, settings, outcome)
    return outcome.prepared


def prepare_shapenet(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    engine: Engine | None = None,
    limits: Limits | None = None,
    cameras: Camera | None = None,
    split: tuple[float, float, float] = (0.7, 0.1, 0.2),
    name: str = "shapenet_v1",
    again: bool = False,
) -> Prepared:
    """Bring ShapeNetCore (v1 or v2) under `source` into the layout of this module under `root`, dirty meshes included.

    settings: what is made of each model, by default everything but watertight surfaces. engine: `parallel.Local` (by
    default with one process) or `parallel.Ray`; the bytes do not depend on it. limits: of each model, by default ten
    minutes and 4 GiB. cameras: a batch to draw every model with, in the OBJ's coordinates, instead of 3D-R2N2's.
    again: try the files once more that an earlier run could not use.

    A model whose file cannot be used, that takes too long or too much memory, or whose process dies twice is listed in
    ROOT/manifest.json with step and reason and costs nothing but itself. Run again to go on: complete models are
    kept, and so are rejections, but for those by time, memory and death.
    Raises ValueError if there is no model, or `root` holds models of other settings; OSError if a file cannot be
    written, and then a second run goes on where this one stopped.
    """
    folder, root = Path(source), Path(root)
    settings, engine, limits = settings or Settings(), engine or Local(), limits or LIMITS
    assign_splits(1, split)
    if cameras is not None:
        cameras = Camera.stack([cameras]) if cameras.translation.ndim == 1 else cameras
        settings = replace(settings, views=len(cameras), cameras=_digest_of(cameras), image_size=cameras.image_size[0])
    found = shapenet_files(folder)
    if not found.files:
        raise ValueError(f"{folder}: no SYNSET/MODEL/{' or '.join(MESHES)} in it; see prepare_meshes for other folders")
    if again:
        for file in found.files:
            (folder_of(root, "ShapeNetGeometry", file) / "rejected.json").unlink(missing_ok=True)
    outcome = _prepare(
        root, found.files, settings, name, lambda count: assign_splits(count, split), engine,
        limits=limits, cameras=cameras, names=found.names, whole=False,
    )  # fmt: skip
    outcome.prepared.rejected.extend(found.rejected)
    _write_manifest(root, name, settings, outcome)
    return outcome.prepared


def _here(workers: int) -> Engine:
    """What made one process enough before there were engines."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return Local(workers if workers > 1 else 0)


def _digest_of(cameras: Camera) -> str:
    """Of cameras' numbers."""
    values = (cameras.rotation, cameras.translation, cameras.intrinsics)
    numbers = b"".join(value.double().cpu().numpy().tobytes() for value in values)
    return hashlib.sha256(numbers + repr(tuple(cameras.image_size)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- a run


class _Outcome(NamedTuple):
    prepared: Prepared
    models: list[tuple[Source, Done]]


def _prepare(
    root: Path,
    sources: Sequence[Source],
    settings: Settings,
    name: str,
    assign: Any,
    engine: Engine,
    *,
    limits: Limits = Limits(),  # noqa: B008, a tuple
    cameras: Camera | None = None,
    names: Mapping[str, str] | None = None,
    whole: bool = True,
) -> _Outcome:
    """Write the models that are not complete, then the lists and the manifest of all."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must be letters, digits, '_' or '-', got {name!r}")
    results: dict[int, Done | Rejected] = {}
    for number, source in enumerate(sources):
        before: Done | Rejected | None = complete(root, source, settings, whole=whole)
        if before is None and isinstance(source, MeshFile):
            before = rejected_before(root, source, settings)
        if before is not None:
            results[number] = before
    kept = sum(isinstance(result, Done) for result in results.values())
    todo = [number for number in range(len(sources)) if number not in results]
    root.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        jobs = [Job(root, sources[number], settings, cameras, limits, whole) for number in todo]
        # a call that does not return, which the job's own alarm cannot interrupt, is ended with its process
        timeout = None if limits.seconds is None else 1.5 * limits.seconds + 30
        lost = []
        for index, result in tracked(
            engine.run(prepare_one, jobs, timeout=timeout), total=len(jobs), title="preparing"
        ):
            number = todo[index]
            if not isinstance(result, Lost):
                results[number] = result
            elif attempt + 1 < _ATTEMPTS:
                lost.append(number)
            else:
                source = sources[number]
                if not isinstance(source, MeshFile):
                    raise RuntimeError(f"{source.synset}/{source.model} has no result: {result.reason}")
                results[number] = Rejected(source.name, "process", f"{_ATTEMPTS} times: {result.reason}")
        todo = sorted(lost)
    models = [(sources[number], done) for number, done in sorted(results.items()) if isinstance(done, Done)]
    rejected = [result for _, result in sorted(results.items()) if isinstance(result, Rejected)]
    manifest = _write_lists(root, models, settings, name, assign, names or {})
    return _Outcome(Prepared(root, len(models) - kept, kept, rejected, manifest), models)


def _write_manifest(root: Path, name: str, settings: Settings, outcome: _Outcome) -> None:
    """manifest.json: what became of each file."""
    about = ("watertight", "ambiguous", "turned", "repair", "distortion")
    accepted = [
        {"file": done.facts["source"]["file"], "synset": source.synset, "model": source.model}
        | {key: done.facts[key] for key in about if key in done.facts}
        for source, done in outcome.models
    ]
    rejected = [entry._asdict() for entry in outcome.prepared.rejected]
    head = {"name": name, "seed": settings.seed, "settings": settings.described()}
    write_json(root / "manifest.json", {**head, "accepted": accepted, "rejected": rejected})


def _write_lists(
    root: Path,
    models: Sequence[tuple[Source, Done]],
    settings: Settings,
    name: str,
    assign: Any,
    names: Mapping[str, str],
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
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            with atomic_write(folder / f"{split}.lst") as file:
                file.write("\n".join(splits[split][synset]).encode())  # readers split at newlines: none at the end
    names = {**CATEGORIES, OTHER[0]: OTHER[1], **names}
    if models:
        write_json(
            root / "ShapeNetCore.v2" / "taxonomy.json",
            [
                {"synsetId": synset, "name": names.get(synset, synset), "children": [], "numInstances": len(ids)}
                for synset, ids in sorted(members.items())
            ],
        )
        with atomic_write(root / "ShapeNet" / "metadata.yaml") as file:
            entries = [
                f"'{synset}':\n  id: '{synset}'\n  name: {names.get(synset, synset)}\n" for synset in sorted(members)
            ]
            file.write("".join(entries).encode())
    (root / "splits").mkdir(exist_ok=True)
    for folder in (root, root / "splits", root / "ShapeNet", root / "ShapeNetCore.v2"):
        clear(folder)
    path = root / "splits" / f"{name}.json"
    files = {file: sha for _, done in models for file, sha in done.files.items()}
    SplitManifest(name, 1, settings.seed, splits, files).write(path)
    return path
