"""Who trains and who is tested, as each system has it: its own files or its own rule, as a `SplitManifest`.

Numbers under different splits do not compare, so every dataset of shapes says its split's name and the sha256 of its
division, and scores carry both.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vision3dgen.datasets.manifest import SPLITS, SplitManifest, assign_splits, read_json
from vision3dgen.files import safe_join

Members = Mapping[str, Sequence[str]]  # synset -> ids of all its models


def r2n2_split(members: Members, *, name: str = "r2n2") -> SplitManifest:
    """3D-R2N2's: of each category's sorted ids the first 80 % train, the others test."""
    return _cut({synset: sorted(ids) for synset, ids in members.items()}, {"train": 0.8, "test": 1.0}, name)


def fraction_split(members: Members, train: float, *, name: str) -> SplitManifest:
    """The first `train` of each category's sorted ids train, the others test: Kaolin's with 0.7."""
    return _cut({synset: sorted(ids) for synset, ids in members.items()}, {"train": train, "test": 1.0}, name)


def random_split(members: Members, seed: int, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> SplitManifest:
    """Shares of each category for train, val and test; the order is that of hashes of (seed, synset, id).

    It depends on nothing but seed, ids and fractions: not on the order of a folder, not on a version of a generator.
    """
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for synset, ids in members.items():
        order = sorted(ids, key=lambda model: hashlib.sha256(f"{seed}/{synset}/{model}".encode()).digest())
        assigned = assign_splits(len(order), fractions)
        for split in SPLITS:
            splits[split][synset] = sorted(model for model, own in zip(order, assigned) if own == split)
    return SplitManifest(f"random({seed})", 1, seed, splits)


def onet_split(folder: str | os.PathLike[str], *, name: str = "onet", suffix: str = ".lst") -> SplitManifest | None:
    """Occupancy Networks' train.lst, val.lst and test.lst in each category's folder; None where no category has any.

    A category with some of the three has none in the others. Raises ValueError for ids that leave the folder, that come
    twice, or that are in two splits.
    """
    folder = Path(folder)
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    found = False
    for category in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        owner: dict[str, str] = {}
        for split in SPLITS:
            path = category / f"{split}{suffix}"
            splits[split][category.name] = read_ids(path) if path.is_file() else []
            found = found or path.is_file()
            for model in splits[split][category.name]:
                if (other := owner.setdefault(model, split)) != split:
                    raise ValueError(f"{path}: {model!r} is in {other!r} too")
    return SplitManifest(name, 1, None, splits) if found else None


def meshrcnn_split(path: str | os.PathLike[str], *, name: str = "meshrcnn") -> SplitManifest:
    """Mesh R-CNN's and Pixel2Mesh's `pix2mesh_splits_val05.json`: {split: {synset: {model: [numbers of views]}}}.

    It divides views, not models: some models have views in train and others in test.
    """
    data = read_json(path)
    splits: dict[str, dict[str, list[str]]] = {}
    views: dict[str, dict[str, list[int]]] = {}
    owner: dict[tuple[str, int], str] = {}
    for split in SPLITS:
        members = data.get(split) if isinstance(data, dict) else None
        if not isinstance(members, dict):
            raise ValueError(f"{path}: {split!r} must map each synset to its models and their views")
        splits[split], views[split] = {}, {}
        for synset, models in members.items():
            if not isinstance(models, dict):
                raise ValueError(f"{path}: {split}.{synset} must map each model to a list of views")
            splits[split][synset] = sorted(models)
            for model, numbers in models.items():
                _check_id(path, f"{synset}/{model}")
                if not isinstance(numbers, list) or not all(isinstance(n, int) and n >= 0 for n in numbers):
                    raise ValueError(f"{path}: {split}.{synset}.{model} must be a list of view numbers")
                views[split][f"{synset}/{model}"] = numbers
                for number in numbers:
                    if (other := owner.setdefault((f"{synset}/{model}", number), split)) != split:
                        raise ValueError(f"{path}: view {number} of {synset}/{model} is in {other!r} and in {split!r}")
    return SplitManifest(name, 1, None, splits, views=views)


def read_split(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> SplitManifest:
    """A file of ours, or one of Mesh R-CNN's."""
    data = read_json(path)
    if isinstance(data, dict) and "name" not in data and set(SPLITS) <= set(data):
        return meshrcnn_split(path)
    return SplitManifest.read(path, root)


def choose_split(
    wanted: str | None, members: Members, own: SplitManifest | None, root: str | os.PathLike[str]
) -> SplitManifest:
    """The split asked for: "r2n2", "random(SEED)", the name or path of a manifest in ROOT/splits; by default the only
    manifest there, else the layout's own, else 3D-R2N2's rule.

    The name of the layout's own lists (such as "onet") asks for these even beside a manifest.
    """
    listed = sorted((Path(root) / "splits").glob("*.json"))
    if wanted is None:
        if len(listed) > 1:
            raise ValueError(f"{root}: several split manifests, choose one: manifest={[p.stem for p in listed]}")
        if listed:
            return read_split(listed[0], root)
        return own or r2n2_split(members)
    for path in (Path(root) / "splits" / f"{wanted}.json", Path(wanted)):
        if path.is_file():
            return read_split(path, root)
    if own is not None and wanted == own.name:
        return own
    if wanted == "r2n2":
        return r2n2_split(members)
    if found := re.fullmatch(r"random\((\d+)\)", wanted):
        return random_split(members, int(found[1]))
    accepted = [*(p.stem for p in listed), *([own.name] if own else []), "r2n2", "random(SEED)", "a file"]
    raise ValueError(f"no split {wanted!r} for {root}; choose from {list(dict.fromkeys(accepted))}")


def read_ids(path: Path) -> list[str]:
    """The model ids of a list, one on a line, sorted; ValueError for one that leaves the folder or comes twice."""
    models = path.read_text(encoding="utf-8").split()
    for model in models:
        _check_id(path, model)
    if len(set(models)) < len(models):
        twice = next(model for index, model in enumerate(models) if model in models[:index])
        raise ValueError(f"{path}: {twice!r} comes twice")
    return sorted(models)


def _check_id(path: str | os.PathLike[str], name: str) -> None:
    try:
        safe_join(Path(path).parent, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _cut(members: Members, until: Mapping[str, float], name: str) -> SplitManifest:
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for synset, ids in members.items():
        first = 0
        for split in SPLITS:
            splits[split][synset] = []
            if split in until:
                last = int(until[split] * len(ids))
                splits[split][synset], first = list(ids[first:last]), last
    return SplitManifest(name, 1, None, splits)
