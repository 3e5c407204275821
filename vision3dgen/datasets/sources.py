"""Where the shapes of a data set come from: generated, any folder of mesh files, or ShapeNetCore."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision3dgen.datasets.manifest import read_json, sha256
from vision3dgen.datasets.procedural import CATEGORIES, make_shape
from vision3dgen.datasets.shapenet import FOLDERS
from vision3dgen.io import load_mesh
from vision3dgen.ops.render import GRAY
from vision3dgen.structures import Meshes

SUFFIXES = (".obj", ".ply", ".off", ".stl", ".glb")
OTHER = ("00000000", "meshes")  # synset and name of meshes whose folder names no category
MESHES = ("models/model_normalized.obj", "model.obj")  # of a model of ShapeNetCore v2 and v1


class Rejected(NamedTuple):
    """What cannot be used, and why."""

    file: str  # relative to the source folder
    step: str  # find, read, check, one of STEPS, write, or process where that is not known
    error: str


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


# ------------------------------------------------------------------------------------------------------- folders


def mesh_files(folder: Path, root: Path) -> list[MeshFile]:
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
            category, model if taken[category, model.lower()] == 1 else f"{model}-{digest(name)[:8]}", str(path), name
        )
        for category, model, name, path in placed
    ]


class Found(NamedTuple):
    """The models of a ShapeNetCore folder."""

    files: list[MeshFile]
    rejected: list[Rejected]
    names: dict[str, str]  # of synsets, as far as they are known


def shapenet_files(folder: Path) -> Found:
    """The models of SYNSET/MODEL/models/model_normalized.obj (v2) or SYNSET/MODEL/model.obj (v1) under a folder.

    The folder holds the synsets, or ShapeNetCore.v2 or another of its names that does. Of two files with one id (v2 and
    v1 beside each other, or ids that differ by case alone, which some file systems cannot hold) the first is taken.
    """
    names = dict(CATEGORIES)
    files: list[MeshFile] = []
    rejected: list[Rejected] = []
    taken: dict[tuple[str, str], str] = {}
    for core in [folder, *(folder / name for name in FOLDERS["core"])]:
        taxonomy = core / "taxonomy.json"
        if taxonomy.is_file():
            names |= _names(taxonomy)
        for synset in _folders(core, re.compile(r"[0-9]{8}")):
            for model in _folders(synset, re.compile(r".*", re.DOTALL)):
                label = model.relative_to(folder).as_posix()
                path = next((model / name for name in MESHES if (model / name).is_file()), None)
                if not model.name.isprintable():
                    rejected.append(Rejected(ascii(label), "find", "an id must be printable"))
                elif path is None:
                    rejected.append(Rejected(label, "find", f"no {' or '.join(MESHES)} in it"))
                elif other := taken.get((synset.name, model.name.casefold())):
                    name = path.relative_to(folder).as_posix()
                    rejected.append(
                        Rejected(name, "find", f"another file has the id {synset.name}/{model.name}: {other}")
                    )
                else:
                    name = path.relative_to(folder).as_posix()
                    taken[synset.name, model.name.casefold()] = name
                    files.append(MeshFile(synset.name, model.name, str(path), name))
    return Found(files, rejected, names)


def _folders(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and pattern.fullmatch(entry.name))
    return [folder / name for name in found]


def _names(path: Path) -> dict[str, str]:
    """The first of the comma-separated names of each synset of a taxonomy.json."""
    entries = read_json(path)
    try:
        return {str(entry["synsetId"]): str(entry["name"]).split(",")[0].strip() for entry in entries}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: must be a list of objects with synsetId and name") from error


def digest(text: str) -> str:
    """32 hexadecimal digits, as ShapeNet's model ids."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:32]
