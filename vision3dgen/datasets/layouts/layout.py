"""What every layout of shapes on disk can say: which models it has, and their arrays under common names.

A field is a group of arrays that are stored together:

| field | arrays |
|---|---|
| mesh | verts (V, 3), faces (F, 3) |
| points | points (N, 3), occupancies (N,) or packed bits; loc (3,), scale () where they are in a frame |
| surface | points (N, 3); normals (N, 3), colors (N, 3), loc, scale where they are there |
| sdf | pos (N, 4), neg (M, 4): x, y, z, signed distance of points outside and inside, in the frame; or distances (N,) |
|     | of the points of `points`, near_points (M, 3) and near_distances (M,); loc, scale |
| voxels | voxels (D, H, W) = (z, y, x) bool, translate (3,), scale () |
| image mask depth normals | one array of the field's name, (V, H, W[, C]) |
| camera | numbers (V,), and r2n2 (V, 5), or world_mat (V, 3, 4) and camera_mat (V, 3, 3), or extrinsics and intrinsic |

What else a file holds keeps the name it has there.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vision3dgen.datasets.manifest import SplitManifest
from vision3dgen.datasets.shape_items import PER_VIEW, Arrays, Model
from vision3dgen.files import FileError, atomic_write, safe_join
from vision3dgen.structures import Camera

PICTURES = tuple(sorted(PER_VIEW - {"camera"}))
RENDER_SIZE = 137  # the side of 3D-R2N2's pictures, which cameras without pictures are for


class Layout(ABC):
    """Models of a folder in one published layout.

    fields: what its files may hold. writes: what `write` puts down, empty where the layout is only read.
    canonical: whether shapes without `loc` and `scale` are in the canonical frame, not in the mesh's coordinates.
    trusted: whether arrays were checked when they were written. sized: whether pictures are kept at another size than
    they were rendered at.
    """

    name: ClassVar[str]
    fields: tuple[str, ...]
    writes: ClassVar[tuple[str, ...]] = ()
    canonical: bool = False
    trusted: bool = False
    sized: bool = False

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")

    @classmethod
    @abstractmethod
    def matches(cls, root: Path) -> bool:
        """Whether a folder looks like this layout."""

    @abstractmethod
    def members(self) -> dict[str, list[str]]:
        """All models by category, sorted."""

    def manifest(self) -> SplitManifest | None:
        """How the layout's own lists divide the models, None where it has none."""
        return None

    @abstractmethod
    def missing(self, model: Model, field: str) -> str | None:
        """The file that is not there but would hold a field; None where it is there."""

    @abstractmethod
    def read(self, model: Model, field: str) -> Arrays:
        """The arrays of a field, of a per-view field those of all views. Raises ValueError or OSError naming file."""

    def numbers(self, model: Model) -> list[int]:
        """The numbers of a model's views, in order."""
        return [int(number) for number in self.read(model, "camera")["numbers"]]

    def read_view(self, model: Model, field: str, index: int) -> np.ndarray:
        """The picture of one view, the index-th."""
        return self.read(model, field)[field][index]

    def where(self, model: Model, field: str) -> str:
        """What an error in a field's arrays begins with: its file."""
        return f"{self.root}: {field} of {model}"

    def has(self, model: Model, field: str) -> bool:
        return field in self.fields and self.missing(model, field) is None

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        """Write a model's fields; those that are not in `writes` are left out, though what is written may need them.

        Raises ValueError naming the field that the layout cannot do without.
        """
        raise ValueError(f"the layout {cls.name!r} is only read")

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        """Write what the layout says of all models: its lists. By default a manifest in ROOT/splits."""
        (root / "splits").mkdir(parents=True, exist_ok=True)
        manifest.write(root / "splits" / f"{file_name(manifest.name)}.json")


def needed(model: Model, arrays: Mapping[str, Arrays], *fields: str) -> None:
    """ValueError for the first of `fields` that is not there to be written."""
    for field in fields:
        if field not in arrays:
            raise ValueError(f"{model} has no {field!r}, which this layout consists of; it has {sorted(arrays)}")


def model_folder(root: Path, *parts: str) -> Path:
    """The folder of a model, made; ValueError for ids that would leave `root`."""
    folder = safe_join(root, "/".join(parts))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_name(name: str) -> str:
    """A split's name as a file's."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted by name, hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted((Path(e.path) for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."), key=lambda p: p.name)


def members_of(folder: Path, has: Any = None) -> dict[str, list[str]]:
    """CATEGORY/MODEL folders; those of which `has(folder)` is false are left out."""
    found = {c.name: [m.name for m in subfolders(c) if has is None or has(m)] for c in subfolders(folder)}
    return {category: ids for category, ids in found.items() if ids}


def stacked(paths: list[Path], read: Any) -> np.ndarray:
    """Arrays of files of one shape, stacked."""
    arrays = [read(path) for path in paths]
    for path, array in zip(paths, arrays):
        if array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
            raise FileError(f"{path}: {array.shape} of {array.dtype}, {paths[0].name} {arrays[0].shape}")
    return np.stack(arrays)


def stacked_arrays(paths: list[Path], read: Any) -> dict[str, np.ndarray]:
    """The arrays of several files with the same names and shapes, stacked."""
    each = [read(path) for path in paths]
    for path, arrays in zip(paths, each):
        if set(arrays) != set(each[0]):
            raise FileError(f"{path}: has {sorted(arrays)}, {paths[0].name} {sorted(each[0])}")
    loaded = dict(zip(paths, each))
    return {key: stacked(paths, lambda path, key=key: loaded[path][key]) for key in each[0]}


def camera_of(arrays: Arrays, index: int, size: tuple[int, int], where: str) -> Camera:
    """The index-th camera of the field `camera`, for pictures of a size; float64."""
    if "r2n2" in arrays:
        azimuth, elevation, _, ratio = (float(value) for value in arrays["r2n2"][index][:4])
        return Camera.from_r2n2(azimuth, elevation, ratio, size[0])
    if "world_mat" in arrays:
        world, matrix = (torch.from_numpy(np.array(arrays[k][index])).double() for k in ("world_mat", "camera_mat"))
        return Camera(world[:, :3].contiguous(), world[:, 3].contiguous(), matrix, size)
    if "extrinsics" in arrays:  # Mesh R-CNN's: the camera looks along -z, intrinsic is a projection to clip space
        view, projection = (
            torch.from_numpy(np.array(a)).double() for a in (arrays["extrinsics"][index], arrays["intrinsic"])
        )
        return Camera.from_opengl(view, projection, size)
    raise ValueError(f"{where}: no cameras in {sorted(arrays)}")


def in_file_coordinates(arrays: Arrays) -> np.ndarray:
    """Points (N, 3) as the mesh's file has them: `loc` and `scale` undone."""
    points = arrays["points"].reshape(-1, arrays["points"].shape[-1])
    if "loc" not in arrays:
        return points
    moved = points.astype(np.float64) * float(arrays["scale"].reshape(-1)[0]) + arrays["loc"].reshape(-1)
    return moved.astype(np.float32)
