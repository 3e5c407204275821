"""Folders of PLY files, as Open3D writes them: what3d's points/CATEGORY/MODEL/0.ply ..., or CATEGORY/NAME.ply."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from vision3dgen.datasets.layouts.layout import (
    Layout,
    in_file_coordinates,
    model_folder,
    needed,
    subfolders,
    write_text,
)
from vision3dgen.datasets.manifest import SPLITS, SplitManifest
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.datasets.splits import read_ids
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import load_pointcloud, save_pointcloud
from vision3dgen.structures import Pointclouds


class What3D(Layout):
    """what3d's viewer-centred clouds: points/CATEGORY/MODEL/0.ply to 4.ply, one for each view of the model, and
    lists/CATEGORY/train.txt ....

    Each cloud is in its view's coordinates, so each is a model here: MODEL_0, MODEL_1, ....
    """

    name = "what3d"
    fields = ("surface",)
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return (root / "points").is_dir() and (root / "lists").is_dir()

    def members(self) -> dict[str, list[str]]:
        found = {
            category.name: sorted(f"{ply.parent.name}_{ply.stem}" for ply in category.glob("*/*.ply"))
            for category in subfolders(self.root / "points")
        }
        return {category: ids for category, ids in found.items() if ids}

    def manifest(self) -> SplitManifest | None:
        members = self.members()
        splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        for split in SPLITS:
            for category, ids in members.items():
                path = self.root / "lists" / category / f"{split}.txt"
                listed = set(read_ids(path)) if path.is_file() else set()
                splits[split][category] = [name for name in ids if name.rpartition("_")[0] in listed]
        return SplitManifest("what3d", 1, None, splits)

    def path(self, model: Model) -> Path:
        name, _, view = model.id.rpartition("_")
        return safe_join(self.root, f"points/{model.synset}/{name}/{view}.ply")

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model)
        return None if path.is_file() else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model))

    def numbers(self, model: Model) -> list[int]:
        return []

    def read(self, model: Model, field: str) -> Arrays:
        return read_cloud(self.path(model))

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        needed(model, arrays, "surface")
        name, mark, view = model.id.rpartition("_")
        if not (mark and name and view.isdigit()):
            raise FileError(f"{model}: what3d's clouds are MODEL_VIEW, such as {model.id}_0")
        write_cloud(model_folder(root, "points", model.synset, name) / f"{view}.ply", arrays["surface"])

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        for split in SPLITS:
            for category, models in manifest.splits[split].items():
                names = sorted({model.rpartition("_")[0] for model in models})
                write_text(model_folder(root, "lists", category) / f"{split}.txt", "\n".join(names))
        write_text(root / "classes.txt", "\n".join(sorted(manifest.members("all"))))


class PlyFolder(Layout):
    """CATEGORY/NAME.ply: clouds, with normals and colours where they have them; meshes are read as clouds."""

    name = "ply"
    fields = ("surface",)
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return any(next(category.glob("*.ply"), None) for category in subfolders(root)[:5])

    def members(self) -> dict[str, list[str]]:
        found = {c.name: sorted(path.stem for path in c.glob("*.ply")) for c in subfolders(self.root)}
        return {category: ids for category, ids in found.items() if ids}

    def path(self, model: Model) -> Path:
        return safe_join(self.root, f"{model}.ply")

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model)
        return None if path.is_file() else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model))

    def numbers(self, model: Model) -> list[int]:
        return []

    def read(self, model: Model, field: str) -> Arrays:
        return read_cloud(self.path(model))

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        needed(model, arrays, "surface")
        write_cloud(safe_join(model_folder(root, model.synset), f"{model.id}.ply"), arrays["surface"])


def read_cloud(path: Path) -> dict[str, np.ndarray]:
    cloud = load_pointcloud(path)
    named = {"points": cloud.points_packed(), "normals": cloud.normals_packed(), "colors": cloud.features_packed()}
    return {key: tensor.numpy() for key, tensor in named.items() if tensor is not None}


def write_cloud(path: Path, surface: Arrays) -> None:
    given = {
        key: [torch.from_numpy(np.array(surface[key], np.float32).reshape(-1, 3))]
        for key in ("normals", "colors")
        if key in surface
    }
    points = torch.from_numpy(np.array(in_file_coordinates(surface), np.float32))
    save_pointcloud(path, Pointclouds([points], normals=given.get("normals"), features=given.get("colors")))
