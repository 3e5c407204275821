"""Occupancy Networks' `data/ShapeNet`, and the rooms of Convolutional Occupancy Networks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from vision3dgen.datasets.camera_files import read_cameras
from vision3dgen.datasets.layouts.layout import (
    RENDER_SIZE,
    Layout,
    camera_of,
    members_of,
    model_folder,
    needed,
    stacked,
    stacked_arrays,
    subfolders,
    write_text,
)
from vision3dgen.datasets.manifest import SPLITS, SplitManifest
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.datasets.splits import onet_split
from vision3dgen.files import FileError
from vision3dgen.io import has_alpha, load_npz, read_binvox, read_image, save_npz, write_binvox, write_png

PICTURE_FOLDER = "img_choy2016"
FILES = {"points": "points.npz", "surface": "pointcloud.npz", "sdf": "sdf.npz", "voxels": "model.binvox"}
ROOM_FOLDERS = {"points": "points_iou", "surface": "pointcloud"}


class OccupancyNetworks(Layout):
    """SYNSET/MODEL with points.npz, pointcloud.npz, model.binvox, img_choy2016/000.jpg ... and cameras.npz.

    Written pictures are PNG, without loss; Occupancy Networks read them with `extension: png`. sdf.npz, which the
    original has not, keeps signed distances.
    """

    name = "onet"
    fields = ("points", "surface", "sdf", "voxels", "image", "camera")
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return any(
            (model / file).is_file()
            for category in subfolders(root)[:3]
            for model in subfolders(category)[:3]
            for file in (FILES["points"], FILES["surface"])
        )

    def members(self) -> dict[str, list[str]]:
        return members_of(self.root)

    def manifest(self) -> SplitManifest | None:
        return onet_split(self.root)

    def path(self, model: Model, field: str) -> Path:
        folder = self.root / model.synset / model.id
        if field == "image":
            return folder / PICTURE_FOLDER
        return folder / PICTURE_FOLDER / "cameras.npz" if field == "camera" else folder / FILES[field]

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model, field)
        return None if (path.is_dir() and self._pictures(model) if field == "image" else path.is_file()) else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model, field))

    def numbers(self, model: Model) -> list[int]:
        return [int(path.stem) for path in self._pictures(model)]

    def _pictures(self, model: Model) -> list[Path]:
        found = self.path(model, "image").glob("*")
        return sorted(p for p in found if p.suffix.lower() in (".jpg", ".png") and p.stem.isdigit())

    def read(self, model: Model, field: str) -> Arrays:
        path = self.path(model, field)
        if field == "image":
            return {"image": stacked(self._pictures(model), _read_picture)}
        if field == "camera":
            return read_cameras(path, self.numbers(model))
        return self.read_file(path, field)

    @staticmethod
    def read_file(path: Path, field: str) -> Arrays:
        """The arrays of a binvox or npz file, checked for what the field cannot do without."""
        if field == "voxels":
            voxels, translate, scale = read_binvox(path)
            return {"voxels": voxels.numpy(), "translate": np.array(translate), "scale": np.array(scale)}
        arrays = load_npz(path)
        for key in {"points": ("points", "occupancies"), "surface": ("points",)}.get(field, ()):
            if key not in arrays:
                raise FileError(f"{path}: no array {key!r}; it has {sorted(arrays)}")
        return arrays

    def read_view(self, model: Model, field: str, index: int) -> np.ndarray:
        return _read_picture(self._pictures(model)[index])

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        needed(model, arrays, "points" if "surface" not in arrays else "surface")
        folder = model_folder(root, *model)
        for field in ("points", "surface", "sdf"):
            if field in arrays:
                save_npz(folder / FILES[field], **arrays[field])
        if "voxels" in arrays:
            write_voxels(folder / FILES["voxels"], arrays["voxels"])
        numbers = (
            arrays["camera"]["numbers"] if "camera" in arrays else range(len(arrays.get("image", {}).get("image", ())))
        )
        if "image" in arrays:
            pictures = model_folder(root, *model, PICTURE_FOLDER)
            for number, picture in zip(numbers, arrays["image"]["image"]):
                write_png(pictures / f"{int(number):03d}.png", picture)
        if "camera" in arrays:
            size = arrays["image"]["image"].shape[1:3] if "image" in arrays else (RENDER_SIZE, RENDER_SIZE)
            write_cameras(model_folder(root, *model, PICTURE_FOLDER) / "cameras.npz", arrays["camera"], size)

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        """train.lst, val.lst and test.lst of each category, and metadata.yaml; no newline at the end of a list."""
        write_onet_lists(root, manifest)
        names = sorted({synset for members in manifest.splits.values() for synset in members})
        write_text(root / "metadata.yaml", "".join(f"'{name}':\n  id: '{name}'\n  name: '{name}'\n" for name in names))


class ConvONetRooms(Layout):
    """ROOT/CATEGORY/SCENE with points_iou/points_iou_00.npz ... and pointcloud/pointcloud_00.npz ..., and *.lst.

    The files of a scene, ten as published, are one field: its arrays are stacked. Rooms are in a frame of their own,
    the unit cube, from the beginning.
    """

    name = "convonet_rooms"
    fields = ("points", "surface")
    writes = fields
    canonical = True

    @classmethod
    def matches(cls, root: Path) -> bool:
        scenes = [scene for category in subfolders(root)[:3] for scene in subfolders(category)[:3]]
        return any((scene / folder).is_dir() for scene in scenes for folder in ("points_iou", "pointcloud"))

    def members(self) -> dict[str, list[str]]:
        return members_of(self.root)

    def manifest(self) -> SplitManifest | None:
        return onet_split(self.root, name="convonet")

    def path(self, model: Model, field: str) -> Path:
        return self.root / model.synset / model.id / ROOM_FOLDERS[field]

    def _files(self, model: Model, field: str) -> list[Path]:
        return sorted(self.path(model, field).glob(f"{ROOM_FOLDERS[field]}_*.npz"))

    def missing(self, model: Model, field: str) -> str | None:
        return None if self._files(model, field) else str(self.path(model, field) / f"{ROOM_FOLDERS[field]}_00.npz")

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model, field))

    def numbers(self, model: Model) -> list[int]:
        return []

    def read(self, model: Model, field: str) -> Arrays:
        return stacked_arrays(self._files(model, field), load_npz)

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        needed(model, arrays, *cls.writes)
        for field in cls.writes:
            if arrays[field]["points"].ndim != 3:
                raise ValueError(f"{model}: {field} must be several samplings (K, N, 3), as rooms have them")
            folder = model_folder(root, *model, ROOM_FOLDERS[field])
            for number in range(len(arrays[field]["points"])):
                values = {key: array[number] for key, array in arrays[field].items()}
                save_npz(folder / f"{ROOM_FOLDERS[field]}_{number:02d}.npz", **values)

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        write_onet_lists(root, manifest)


def _read_picture(path: Path) -> np.ndarray:
    return read_image(path, mode="RGBA" if has_alpha(path) else "RGB")


def write_cameras(path: Path, camera: Arrays, size: tuple[int, int]) -> None:
    """cameras.npz, of cameras in any of the forms there are."""
    kinds = {kind: array for kind, array in camera.items() if kind != "numbers"}
    if "world_mat" not in kinds:
        all_of = [camera_of(camera, index, size, str(path)) for index in range(len(camera["numbers"]))]
        worlds = [np.concatenate([c.rotation.numpy(), c.translation.numpy()[:, None]], 1) for c in all_of]
        kinds = {"world_mat": np.array(worlds), "camera_mat": np.array([c.intrinsics.numpy() for c in all_of])}
    flat = {f"{kind}_{int(n)}": row for kind, array in kinds.items() for n, row in zip(camera["numbers"], array)}
    save_npz(path, **flat)


def write_voxels(path: Path, arrays: Arrays) -> None:
    x, y, z = arrays["translate"].tolist()
    write_binvox(path, torch.from_numpy(np.array(arrays["voxels"])), (x, y, z), float(arrays["scale"]))


def write_onet_lists(root: Path, manifest: SplitManifest) -> None:
    for split in SPLITS:
        for synset, models in manifest.splits[split].items():
            write_text(model_folder(root, synset) / f"{split}.lst", "\n".join(sorted(models)))
