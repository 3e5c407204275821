"""Mesh R-CNN's processed ShapeNet: SYNSET/MODEL with metadata.pt, mesh.pt, voxels.pt, samples.pt and images/."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision3dgen.datasets.layouts.layout import (
    RENDER_SIZE,
    Layout,
    camera_of,
    in_file_coordinates,
    members_of,
    model_folder,
    needed,
    stacked,
    subfolders,
)
from vision3dgen.datasets.manifest import SplitManifest, read_json, write_json
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.datasets.splits import meshrcnn_split
from vision3dgen.files import FileError, atomic_write, safe_join
from vision3dgen.io import read_image, write_png

SPLIT_FILES = ("pix2mesh_splits_val05.json", "splits.json")
KEYS = {
    "mesh": ("mesh.pt", {"verts": "verts", "faces": "faces"}),
    "surface": ("samples.pt", {"points": "points_sampled", "normals": "normals_sampled"}),
    "coords": ("voxels.pt", {"coords": "voxel_coords"}),
    "camera": ("metadata.pt", {"extrinsics": "extrinsics", "intrinsic": "intrinsic"}),
}


class MeshRCNN(Layout):
    """Meshes, samples of their surfaces and pictures with cameras, in the coordinates of ShapeNetCore v1.

    `coords` are the occupied voxels' places (N, 3), along the mesh's box. Files with other than tensors, numbers and
    names in them are refused. Per-view grids (vox48/000.pt) are one field, `view_voxels` (V, D, H, W) = (z, y, x).
    """

    name = "meshrcnn"
    fields = ("mesh", "surface", "coords", "camera", "image", "view_voxels")
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return any((m / "metadata.pt").is_file() for c in subfolders(root)[:3] for m in subfolders(c)[:3])

    def members(self) -> dict[str, list[str]]:
        path = self.root / "summary.json"
        if not path.is_file():
            return members_of(self.root)
        summary = read_json(path)
        for synset, models in summary.items():
            for model in models:
                safe_join(self.root, f"{synset}/{model}")
        return {synset: sorted(models) for synset, models in sorted(summary.items())}

    def manifest(self) -> SplitManifest | None:
        found = next((self.root / name for name in SPLIT_FILES if (self.root / name).is_file()), None)
        return None if found is None else meshrcnn_split(found)

    def path(self, model: Model, field: str) -> Path:
        folder = safe_join(self.root, str(model))
        if field == "view_voxels":
            return next(iter(sorted(p for p in folder.glob("vox*") if p.is_dir())), folder / "vox48")
        return folder / ("images" if field == "image" else KEYS[field][0])

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model, field)
        if field in ("image", "view_voxels"):
            return None if path.is_dir() else str(path)
        return None if path.is_file() else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model, field))

    def numbers(self, model: Model) -> list[int]:
        return [int(Path(name).stem) for name in self._names(model)]

    def _names(self, model: Model) -> list[str]:
        path = self.path(model, "camera")
        names = read_pt(path).get("image_list")
        if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).stem.isdigit() for n in names):
            raise FileError(f"{path}: image_list must be names of pictures such as 00.png")
        return [Path(safe_join(path.parent, name)).name for name in names]

    def _pictures(self, model: Model) -> list[Path]:
        return [self.path(model, "image") / name for name in self._names(model)]

    def read(self, model: Model, field: str) -> Arrays:
        path = self.path(model, field)
        if field == "image":
            return {"image": stacked(self._pictures(model), read_image)}
        if field == "view_voxels":
            grids = stacked(sorted(path.glob("*.pt")), lambda file: _array(file, torch.load(file, weights_only=True)))
            return {"view_voxels": grids}
        content = read_pt(path)
        arrays: dict[str, np.ndarray] = {"numbers": np.array(self.numbers(model))} if field == "camera" else {}
        for key, name in KEYS[field][1].items():
            if name not in content:
                raise FileError(f"{path}: no {name!r}; it has {sorted(content)}")
            arrays[key] = _array(path, content[name])
        return arrays

    def read_view(self, model: Model, field: str, index: int) -> np.ndarray:
        return read_image(self._pictures(model)[index])

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        needed(model, arrays, "mesh", "camera")
        folder = model_folder(root, *model)
        camera, size = dict(arrays["camera"]), (RENDER_SIZE, RENDER_SIZE)
        names = [f"{int(number):02d}.png" for number in camera["numbers"]]
        if "extrinsics" not in camera:
            if "image" in arrays:
                size = arrays["image"]["image"].shape[1:3]
            views = [camera_of(camera, index, size, str(model)).to_opengl(0.1, 100) for index in range(len(names))]
            camera["extrinsics"] = torch.stack([view.view for view in views]).float().numpy()
            camera["intrinsic"] = views[0].projection.float().numpy()
        save_pt(folder / "metadata.pt", _tensors(camera, KEYS["camera"][1]) | {"image_list": names})
        save_pt(folder / "mesh.pt", _tensors(arrays["mesh"], KEYS["mesh"][1]))
        if "surface" in arrays:
            surface = {**arrays["surface"], "points": in_file_coordinates(arrays["surface"])}
            save_pt(folder / "samples.pt", _tensors(surface, KEYS["surface"][1]))
        if "coords" in arrays:
            save_pt(folder / "voxels.pt", _tensors(arrays["coords"], KEYS["coords"][1]))
        if "image" in arrays:
            for name, picture in zip(names, arrays["image"]["image"]):
                write_png(model_folder(root, *model, "images") / name, picture)
        for number, grid in enumerate(arrays.get("view_voxels", {}).get("view_voxels", ())):
            save_pt(
                model_folder(root, *model, f"vox{len(grid)}") / f"{number:03d}.pt", torch.from_numpy(np.array(grid))
            )

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        """summary.json; and the split, of views where it divides them, else of all views of its models."""
        counts = {s: {m: len(_written(root, s, m)) for m in ids} for s, ids in manifest.members("all").items()}
        write_json(root / "summary.json", counts)
        write_json(
            root / SPLIT_FILES[0],
            {
                split: {
                    synset: {
                        model: list(manifest.views[split][f"{synset}/{model}"])
                        if manifest.views
                        else _written(root, synset, model)
                        for model in models
                    }
                    for synset, models in members.items()
                }
                for split, members in manifest.splits.items()
            },
        )


def _written(root: Path, synset: str, model: str) -> list[int]:
    return [int(Path(name).stem) for name in read_pt(root / synset / model / "metadata.pt")["image_list"]]


def read_pt(path: Path) -> dict[str, Any]:
    """A file of torch.save with a dict of tensors, numbers and names; FileError for anything else, pickled code too."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileError(f"{path}: not a file of torch.save with tensors, or a damaged one: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: must hold a dict, got {type(content).__name__}")
    return content


def save_pt(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        torch.save(content, file)


def _array(path: Path, value: Any) -> np.ndarray:
    if not isinstance(value, Tensor):
        raise FileError(f"{path}: must hold tensors, got {type(value).__name__}")
    return value.numpy()


def _tensors(arrays: Arrays, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(arrays[key])) for key, name in names.items() if key in arrays}
