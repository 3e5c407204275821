"""AtlasNet's point clouds: ShapeNetV1PointCloud/SYNSET/MODEL.points.ply.npy, in the coordinates of ShapeNetCore v1."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vision3dgen.datasets.layouts.layout import Layout, in_file_coordinates, model_folder, needed, stacked, subfolders
from vision3dgen.datasets.manifest import SplitManifest, write_json
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.datasets.splits import r2n2_split
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import load_npy, read_image, save_npy, write_png

CLOUDS, RENDERINGS, SUFFIX = "ShapeNetV1PointCloud", "ShapeNetV1Renderings", ".points.ply.npy"


class AtlasNet(Layout):
    """About 30,000 points of each model, their normals in columns 3 to 5 where there are as many, and pictures.

    Its split is the first 80 % of each category's sorted files. The pictures, 3D-R2N2's, are without cameras here.
    """

    name = "atlasnet"
    fields = ("surface", "image")
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return (root / CLOUDS).is_dir()

    def members(self) -> dict[str, list[str]]:
        found = {
            synset.name: sorted(path.name.removesuffix(SUFFIX) for path in synset.glob(f"*{SUFFIX}"))
            for synset in subfolders(self.root / CLOUDS)
        }
        return {synset: ids for synset, ids in found.items() if ids}

    def manifest(self) -> SplitManifest | None:
        return r2n2_split(self.members(), name="atlasnet")

    def path(self, model: Model, field: str) -> Path:
        if field == "image":
            return safe_join(self.root, f"{RENDERINGS}/{model}/rendering")
        return safe_join(self.root, f"{CLOUDS}/{model}{SUFFIX}")

    def _pictures(self, model: Model) -> list[Path]:
        return sorted(p for p in self.path(model, "image").glob("*.png") if p.stem.isdigit())

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model, field)
        there = bool(self._pictures(model)) if field == "image" else path.is_file()
        return None if there else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model, field))

    def numbers(self, model: Model) -> list[int]:
        return [int(path.stem) for path in self._pictures(model)]

    def read(self, model: Model, field: str) -> Arrays:
        if field == "image":
            return {"image": stacked(self._pictures(model), read_image), "numbers": np.array(self.numbers(model))}
        path = self.path(model, field)
        table = load_npy(path)
        if table.ndim != 2 or table.shape[1] < 3 or table.dtype.kind != "f":
            raise FileError(f"{path}: must be (N, 3 or more) numbers, got {table.shape} of {table.dtype}")
        last = 6 if table.shape[1] >= 6 else 3
        columns = {"points": table[:, :3], "normals": table[:, 3:6], "columns": table[:, last:]}
        return {key: np.ascontiguousarray(value) for key, value in columns.items() if value.shape[1]}

    def read_view(self, model: Model, field: str, index: int) -> np.ndarray:
        return read_image(self._pictures(model)[index])

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        needed(model, arrays, "surface")
        surface = {
            key: array.reshape(-1, array.shape[-1]) for key, array in arrays["surface"].items() if array.ndim > 1
        }
        points = in_file_coordinates(arrays["surface"])
        rest = [surface[key].astype(points.dtype) for key in ("normals", "columns") if key in surface]
        folder = model_folder(root, CLOUDS, model.synset)
        save_npy(safe_join(folder, f"{model.id}{SUFFIX}"), np.concatenate([points, *rest], axis=1))
        if "image" in arrays:
            folder = model_folder(root, RENDERINGS, *model, "rendering")
            pictures = arrays["image"]["image"]
            numbers = arrays["image"].get("numbers", arrays.get("camera", {}).get("numbers", range(len(pictures))))
            for number, picture in zip(numbers, pictures):
                write_png(folder / f"{int(number):02d}.png", picture)

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        """taxonomy.json; and, where the split is another than the layout's rule, its manifest."""
        members = manifest.members("all")
        write_json(root / CLOUDS / "taxonomy.json", [{"synsetId": synset, "name": synset} for synset in members])
        if manifest.sha256 != r2n2_split(members).sha256:
            super().write_lists(root, manifest)
