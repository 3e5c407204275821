"""The folders of ShapeNetCore v1 and v2, 3D-R2N2, Occupancy Networks' samples and our geometry, side by side."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vision3dgen.datasets.camera_files import read_cameras
from vision3dgen.datasets.layouts.layout import (
    PICTURES,
    RENDER_SIZE,
    Layout,
    members_of,
    model_folder,
    stacked,
    write_text,
)
from vision3dgen.datasets.layouts.onet import (
    FILES,
    OccupancyNetworks,
    write_cameras,
    write_onet_lists,
    write_voxels,
)
from vision3dgen.datasets.manifest import SplitManifest
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.datasets.shapenet import FOLDERS, MESHES, find_folders, pieces_of, read_views
from vision3dgen.datasets.splits import onet_split
from vision3dgen.io import load_mesh, read_depth_png, read_image, save_npz, save_obj, write_depth_png, write_png

SERVED = ("mesh", "points", "surface", "voxels", "camera", *PICTURES)
DISTANCES = "distances.npz"
MODES = {"image": "RGBA", "mask": "L", "normals": "RGB"}


class ShapeNetFolders(Layout):
    """ROOT/ShapeNetCore.v2 (or .v1), ShapeNetRendering, ShapeNetVox32, ShapeNet, ShapeNetGeometry.

    What `prepare` makes. The mask is a field only where ShapeNetGeometry has it: elsewhere it is the picture's alpha.
    """

    name = "shapenet"
    writes = (*SERVED, "sdf")

    def __init__(self, root: str | os.PathLike[str]):
        super().__init__(root)
        self.root, self.folders = find_folders(root)[0] or Path(root), find_folders(root)[1]
        served = [name for name in SERVED if set(self.folders).intersection(pieces_of(name))]
        if "geometry" not in self.folders and "mask" in served:
            served.remove("mask")
        self.fields = (*served, "sdf") if "geometry" in self.folders else tuple(served)

    @classmethod
    def matches(cls, root: Path) -> bool:
        names = [name for names in FOLDERS.values() for name in names]
        # Occupancy Networks' own folder is called ShapeNet: by itself it is `onet`
        return any((root / name).is_dir() for name in names) or root.name in names[:-2]

    def members(self) -> dict[str, list[str]]:
        found: dict[str, set[str]] = {}
        for folder in self.folders.values():
            for synset, ids in members_of(folder).items():
                found.setdefault(synset, set()).update(ids)
        return {synset: sorted(ids) for synset, ids in sorted(found.items())}

    def manifest(self) -> SplitManifest | None:
        return onet_split(self.folders["samples"]) if "samples" in self.folders else None

    def _candidates(self, model: Model, field: str) -> list[Path]:
        pieces = ("geometry",) if field == "sdf" else pieces_of(field)
        folders = [self.folders[piece] / model.synset / model.id for piece in pieces if piece in self.folders]
        if field == "mesh":
            return [folder / name for folder in folders for name in MESHES]
        if field in ("image", "camera"):
            names = ("rendering_metadata.txt", "cameras.npz")
            return [folder / "rendering" / name for folder in folders for name in names]
        if field == "sdf":
            return [folder / DISTANCES for folder in folders]
        if field in PICTURES:
            return [folder / f"00_{field}.png" for folder in folders]
        return [folder / FILES[field] for folder in folders]

    def path(self, model: Model, field: str) -> Path:
        candidates = self._candidates(model, field)
        return next((path for path in candidates if path.is_file()), candidates[0])

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model, field)
        if not path.is_file():
            return str(path)
        if field in PICTURES:
            return next((str(p) for p in self._pictures(model, field) if not p.is_file()), None)
        return None

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model, field))

    def numbers(self, model: Model) -> list[int]:
        path = self.path(model, "camera")
        if path.name == "cameras.npz":
            return read_cameras(path, [])["numbers"].tolist()
        return [view.number for view in read_views(path.parent)]

    def _pictures(self, model: Model, field: str) -> list[Path]:
        folder, end = self.path(model, field).parent, "" if field == "image" else f"_{field}"
        return [folder / f"{number:02d}{end}.png" for number in self.numbers(model)]

    def read(self, model: Model, field: str) -> Arrays:
        path = self.path(model, field)
        if field == "mesh":
            verts, faces = load_mesh(path, materials=False).get_mesh_verts_faces(0)
            return {"verts": verts.numpy(), "faces": faces.numpy()}
        if path.name == "cameras.npz":
            return read_cameras(path, [])
        if field == "camera":
            views = read_views(path.parent)
            rows = [(v.azimuth, v.elevation, 0.0, v.distance_ratio, v.fov) for v in views]
            return {"numbers": np.array([v.number for v in views], np.int64), "r2n2": np.array(rows, np.float64)}
        if field in PICTURES:
            return {field: stacked(self._pictures(model, field), lambda picture: _read_picture(picture, field))}
        return OccupancyNetworks.read_file(path, field)

    def read_view(self, model: Model, field: str, index: int) -> np.ndarray:
        return _read_picture(self._pictures(model, field)[index], field)

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        if "mesh" in arrays:
            folder = model_folder(root, FOLDERS["core"][0], *model, "models")
            save_obj(folder / "model_normalized.obj", arrays["mesh"]["verts"], arrays["mesh"]["faces"])
        if "points" in arrays or "surface" in arrays:
            samples = {field: arrays[field] for field in ("points", "surface") if field in arrays}
            OccupancyNetworks.write(root / FOLDERS["samples"][0], model, samples)
        if "voxels" in arrays:
            write_voxels(model_folder(root, FOLDERS["voxels"][0], *model) / FILES["voxels"], arrays["voxels"])
        if "sdf" in arrays:
            save_npz(model_folder(root, FOLDERS["geometry"][0], *model) / DISTANCES, **arrays["sdf"])
        if "camera" not in arrays:
            return
        numbers = [int(number) for number in arrays["camera"]["numbers"]]
        folder = model_folder(root, FOLDERS["renderings"][0], *model, "rendering")
        write_text(folder / "renderings.txt", "".join(f"{number:02d}.png\n" for number in numbers))
        if "r2n2" in arrays["camera"]:
            lines = [" ".join(map(repr, row)) for row in arrays["camera"]["r2n2"].tolist()]
            write_text(folder / "rendering_metadata.txt", "".join(f"{line}\n" for line in lines))
        else:
            size = arrays["image"]["image"].shape[1:3] if "image" in arrays else (RENDER_SIZE, RENDER_SIZE)
            write_cameras(folder / "cameras.npz", arrays["camera"], size)
        for field in PICTURES:
            if field not in arrays:
                continue
            place = folder if field == "image" else model_folder(root, FOLDERS["geometry"][0], *model)
            for number, picture in zip(numbers, arrays[field][field]):
                path = place / (f"{number:02d}.png" if field == "image" else f"{number:02d}_{field}.png")
                if field == "depth":
                    write_depth_png(path, picture, units_per_metre=1.0)
                else:
                    write_png(path, picture)

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        super().write_lists(root, manifest)
        if (root / FOLDERS["samples"][0]).is_dir() and not manifest.views:
            write_onet_lists(root / FOLDERS["samples"][0], manifest)


def _read_picture(path: Path, field: str) -> np.ndarray:
    if field == "depth":
        return read_depth_png(path, units_per_metre=1.0).astype(np.uint16)
    return read_image(path, mode=MODES[field])
