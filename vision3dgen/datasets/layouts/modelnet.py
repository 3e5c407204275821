"""ModelNet10 and ModelNet40: CATEGORY/train/NAME.off and CATEGORY/test/NAME.off."""

from collections.abc import Mapping
from pathlib import Path

from vision3dgen.datasets.layouts.layout import Layout, model_folder, needed, subfolders
from vision3dgen.datasets.manifest import SPLITS, SplitManifest
from vision3dgen.datasets.shape_items import Arrays, Model
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import load_mesh, save_mesh

PARTS = ("train", "test")


class ModelNet(Layout):
    """Meshes of one category in a folder of two parts. The glued headers (`OFF490 518 0`) of ModelNet40 are read."""

    name = "modelnet"
    fields = ("mesh",)
    writes = fields

    @classmethod
    def matches(cls, root: Path) -> bool:
        return any(next((c / part).glob("*.off"), None) for c in subfolders(root)[:5] for part in PARTS)

    def _parts(self) -> dict[str, dict[str, list[str]]]:
        parts: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        for category in subfolders(self.root):
            for part in PARTS:
                parts[part][category.name] = sorted(path.stem for path in (category / part).glob("*.off"))
            both = set(parts["train"][category.name]) & set(parts["test"][category.name])
            if both:
                raise FileError(f"{category}: {min(both)!r} is in train and in test: two models with one id")
        return parts

    def members(self) -> dict[str, list[str]]:
        parts = self._parts()
        found = {name: sorted(parts["train"][name] + parts["test"][name]) for name in parts["train"]}
        return {name: ids for name, ids in found.items() if ids}

    def manifest(self) -> SplitManifest | None:
        return SplitManifest("modelnet", 1, None, self._parts())

    def path(self, model: Model) -> Path:
        places = [safe_join(self.root, f"{model.synset}/{part}/{model.id}.off") for part in PARTS]
        return next((path for path in places if path.is_file()), places[0])

    def missing(self, model: Model, field: str) -> str | None:
        path = self.path(model)
        return None if path.is_file() else str(path)

    def where(self, model: Model, field: str) -> str:
        return str(self.path(model))

    def numbers(self, model: Model) -> list[int]:
        return []

    def read(self, model: Model, field: str) -> Arrays:
        verts, faces = load_mesh(self.path(model)).get_mesh_verts_faces(0)
        return {"verts": verts.numpy(), "faces": faces.numpy()}

    @classmethod
    def write(cls, root: Path, model: Model, arrays: Mapping[str, Arrays]) -> None:
        """Into `train`, from where `write_lists` moves what is tested."""
        needed(model, arrays, "mesh")
        folder = model_folder(root, model.synset, "train")
        save_mesh(safe_join(folder, f"{model.id}.off"), (arrays["mesh"]["verts"], arrays["mesh"]["faces"]))

    @classmethod
    def write_lists(cls, root: Path, manifest: SplitManifest) -> None:
        """ModelNet has no validation part: its models stay in `train`, with a manifest beside that tells them apart."""
        for synset, models in manifest.splits["test"].items():
            for model in models:
                source = root / synset / "train" / f"{model}.off"
                source.replace(model_folder(root, synset, "test") / source.name)
        if any(manifest.splits["val"].values()):
            super().write_lists(root, manifest)
