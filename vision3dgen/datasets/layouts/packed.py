"""The packed store as a layout: STORE/train, STORE/val, STORE/test, and the manifest of their split."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vision3dgen.datasets.layouts.layout import Layout
from vision3dgen.datasets.manifest import SPLITS, SplitManifest
from vision3dgen.datasets.shape_items import PER_VIEW, Arrays, Model, Problem
from vision3dgen.datasets.splits import read_split
from vision3dgen.datasets.store import open_splits
from vision3dgen.files import FileError


class Packed(Layout):
    """All splits of a store, or those named. Arrays are views of memory maps, their checksums compared at first use."""

    name = "packed"
    trusted = True

    def __init__(self, root: str | os.PathLike[str], splits: tuple[str, ...] | None = None, *, verify: bool = True):
        super().__init__(root)
        self.stores = open_splits(self.root, splits, verify=verify)
        self._of = {model: store for store in reversed(self.stores) for model in store.models}
        self._keys: dict[str, dict[str, str]] = {}  # field -> key of its arrays -> name in the store
        for store in self.stores:
            for name in store.names:
                field, _, key = name.partition("/")
                self._keys.setdefault(field, {})[key] = name
        self.fields = tuple(self._keys)
        self.about = self.stores[0].about
        if "canonical" not in self.about or "split" not in self.about:
            raise FileError(f"{self.root}: a packed store, but not one that pack wrote of shapes")
        self.canonical = bool(self.about["canonical"])
        self.sized = self.about["pictures"] is not None

    @classmethod
    def matches(cls, root: Path) -> bool:
        return next(root.glob("*/index.json"), None) is not None

    def members(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for model in self._of:
            found.setdefault(model.synset, []).append(model.id)
        return {synset: sorted(ids) for synset, ids in sorted(found.items())}

    def manifest(self) -> SplitManifest | None:
        """That of what was packed; models that were left out as broken are not in it."""
        listed = sorted((self.root / "splits").glob("*.json"))
        if len(listed) == 1:
            found = read_split(listed[0], self.root)
            there = {store.split: set(store.models) for store in self.stores}
            kept = {
                split: {s: [m for m in ids if Model(s, m) in there.get(split, ())] for s, ids in members.items()}
                for split, members in found.splits.items()
            }
            views = {
                split: {m: v for m, v in of.items() if Model(*m.split("/", 1)) in there.get(split, ())}
                for split, of in found.views.items()
            }
            return SplitManifest(found.name, found.version, found.seed, kept, views=views)
        splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        for store in self.stores:
            for model in store.models if store.split in SPLITS else []:
                splits[store.split].setdefault(model.synset, []).append(model.id)
        return SplitManifest("packed", 1, None, splits)

    def missing(self, model: Model, field: str) -> str | None:
        names = self._keys.get(field, {}).values()
        there = model in self._of and any(self._of[model].has(model, name) for name in names)
        return None if there else self.where(model, field)

    def where(self, model: Model, field: str) -> str:
        store = self._of.get(model)
        return f"{store.folder if store else self.root}: {field} of {model}"

    def read(self, model: Model, field: str) -> Arrays:
        store = self._of[model]
        return {key: store.read(model, name) for key, name in self._keys[field].items() if store.has(model, name)}

    def numbers(self, model: Model) -> list[int]:
        field = next((f for f in ("camera", *sorted(PER_VIEW)) if f"{f}/numbers" in self._of[model].names), None)
        if field is not None:
            return [int(number) for number in self._of[model].read(model, f"{field}/numbers")]
        pictures = [f for f in sorted(PER_VIEW) if self.missing(model, f) is None]
        return list(range(len(self.read(model, pictures[0])[pictures[0]]))) if pictures else []

    def read_view(self, model: Model, field: str, index: int) -> np.ndarray:
        return self._of[model].read_part(model, f"{field}/{field}", index)

    def check(self, fields: Iterable[str] | None = None) -> list[Problem]:
        """Compare all checksums of fields, by default of all."""
        chosen = self.fields if fields is None else [field for field in fields if field in self.fields]
        names = [name for field in chosen for name in self._keys[field].values()]
        return [problem for store in self.stores for problem in store.check(names)]
