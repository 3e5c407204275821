"""DeepSDF's samples: SdfSamples/SOURCE/CLASS/ID.npz, with SurfaceSamples and NormalizationParameters beside them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vision3dgen.datasets.layouts.layout import Layout, model_folder, needed, subfolders
from vision3dgen.datasets.layouts.plyfolder import read_cloud, write_cloud
from vision3dgen.datasets.manifest import SPLITS, SplitManifest, read_json, write_json
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import load_npz, save_npz

SAMPLES, SURFACES, PARAMETERS = "SdfSamples", "SurfaceSamples", "NormalizationParameters"
SOURCE = "vision3dgen"  # of what is written


class DeepSDF(Layout):
    """pos (N, 4) and neg (M, 4) of each model: x, y, z and signed distance, in x_norm = (x + offset) * scale.

    `loc` is -offset and `scale` 1 / scale of NormalizationParameters: kept with more digits, they lead back to the
    same numbers. Splits are examples/splits-like files ROOT/splits_SPLIT.json: {SOURCE: {CLASS: [ID]}}.
    """

    name = "deepsdf"
    fields = ("sdf", "surface")
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return (root / SAMPLES).is_dir()

    def _sources(self) -> dict[tuple[str, str], str]:
        """The source of each class and id."""
        found: dict[tuple[str, str], str] = {}
        for source in subfolders(self.root / SAMPLES):
            for path in source.glob("*/*.npz"):
                key = (path.parent.name, path.stem)
                if key in found:
                    raise FileError(f"{path}: {'/'.join(key)} is in {found[key]!r} too: two models with one id")
                found[key] = source.name
        return found

    def __init__(self, root: str | Path):
        super().__init__(root)
        self.sources = self._sources()

    def members(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for category, name in sorted(self.sources):
            found.setdefault(category, []).append(name)
        return found

    def manifest(self) -> SplitManifest | None:
        paths = {split: self.root / f"splits_{split}.json" for split in SPLITS}
        if not any(path.is_file() for path in paths.values()):
            return None
        splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        for split, path in paths.items():
            for source in (read_json(path) if path.is_file() else {}).values():
                for category, names in source.items():
                    for name in names:
                        safe_join(self.root, f"{category}/{name}")
                    splits[split].setdefault(category, []).extend(names)
        return SplitManifest("deepsdf", 1, None, splits)

    def path(self, model: Model, field: str) -> Path:
        folder, suffix = {"sdf": (SAMPLES, "npz"), "surface": (SURFACES, "ply"), "frame": (PARAMETERS, "npz")}[field]
        return safe_join(self.root, f"{folder}/{self.sources.get((model.synset, model.id), SOURCE)}/{model}.{suffix}")

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model, field)
        return None if path.is_file() else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model, field))

    def numbers(self, model: Model) -> list[int]:
        return []

    def read(self, model: Model, field: str) -> Arrays:
        path, parameters = self.path(model, field), self.path(model, "frame")
        if field == "surface":  # in the mesh's coordinates
            return read_cloud(path)
        arrays = load_npz(path, "pos", "neg")
        for key, array in arrays.items():
            if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind != "f":
                raise FileError(f"{path}: {key} must be (N, 4) numbers, got {array.shape} of {array.dtype}")
        if parameters.is_file():
            known = load_npz(parameters, "offset", "scale")
            arrays |= {"offset": known["offset"], "scale_deepsdf": known["scale"]}
            arrays |= {"loc": -known["offset"].astype(np.float64), "scale": 1 / known["scale"].astype(np.float64)}
        return arrays

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        """Also of distances of uniform points and of those near the surface, then in their frame, longest edge 1."""
        needed(model, arrays, "sdf")
        sdf = arrays["sdf"]
        if "pos" not in sdf:
            needed(model, arrays, "points")
            places = np.concatenate([arrays["points"]["points"], sdf["near_points"]]).astype(np.float32)
            values = np.concatenate([sdf["distances"], sdf["near_distances"]]).astype(np.float32)
            rows = np.concatenate([places, values[:, None]], axis=1)
            sdf = {**sdf, "pos": rows[values >= 0], "neg": rows[values < 0]}
        samples, parameters = (model_folder(root, f, SOURCE, model.synset) for f in (SAMPLES, PARAMETERS))
        save_npz(safe_join(samples, f"{model.id}.npz"), pos=sdf["pos"], neg=sdf["neg"])
        if "scale_deepsdf" in sdf:
            save_npz(safe_join(parameters, f"{model.id}.npz"), offset=sdf["offset"], scale=sdf["scale_deepsdf"])
        elif "loc" in sdf:
            offset, scale = -np.asarray(sdf["loc"], np.float64), 1 / np.asarray(sdf["scale"], np.float64)
            save_npz(safe_join(parameters, f"{model.id}.npz"), offset=offset, scale=scale)
        if "surface" in arrays:
            write_cloud(
                safe_join(model_folder(root, SURFACES, SOURCE, model.synset), f"{model.id}.ply"), arrays["surface"]
            )

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        for split in SPLITS:
            write_json(
                root / f"splits_{split}.json", {SOURCE: {c: sorted(m) for c, m in manifest.splits[split].items()}}
            )
