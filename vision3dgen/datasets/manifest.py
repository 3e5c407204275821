"""Split manifests: which models train, validate and test, and what each file of the data must hash to."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from vision3dgen.files import atomic_write, safe_join

SPLITS = ("train", "val", "test")


class Mismatch(NamedTuple):
    file: str  # relative to the root
    reason: str


@dataclass(frozen=True)
class SplitManifest:
    """Models by split and synset, and the sha256 of files relative to the data's root.

    views: split -> "synset/model" -> the numbers of the views that belong to the split, where a split divides the views
    of a model too (Mesh R-CNN's); only then may a model be in two splits.
    """

    name: str
    version: int
    seed: int | None
    splits: Mapping[str, Mapping[str, Sequence[str]]]  # split -> synset -> models
    files: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of who is in which split: whatever its name, its order and its files, an equal division has an equal one."""
        members = {
            split: {synset: sorted(models) for synset, models in self.splits.get(split, {}).items() if models}
            for split in SPLITS
        }
        views = {split: {m: sorted(v) for m, v in of.items()} for split, of in self.views.items() if of}
        text = json.dumps({"splits": members, "views": views}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def members(self, split: str) -> dict[str, list[str]]:
        """Models by synset of train, val or test, sorted; of "all" those of the three."""
        names = SPLITS if split == "all" else (split,)
        synsets = sorted({synset for of in self.splits.values() for synset in of})
        return {s: sorted({m for name in names for m in self.splits[name].get(s, [])}) for s in synsets}

    def views_of(self, split: str) -> dict[str, list[int]] | None:
        """The views of each "synset/model" in a split, None where a model's views are not divided."""
        if not self.views:
            return None
        found: dict[str, list[int]] = {}
        for name in SPLITS if split == "all" else (split,):
            for model, numbers in self.views.get(name, {}).items():
                found[model] = sorted({*found.get(model, []), *numbers})
        return found

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, atomically; the same manifest gives the same bytes."""
        head = {"name": self.name, "version": self.version, "seed": self.seed}
        splits = {split: {key: list(self.splits[split][key]) for key in sorted(self.splits[split])} for split in SPLITS}
        views = {"views": {s: {m: list(v) for m, v in sorted(of.items())} for s, of in self.views.items()}}
        write_json(path, {**head, **splits, **(views if self.views else {}), "files": dict(sorted(self.files.items()))})

    @staticmethod
    def read(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> "SplitManifest":
        """Read a manifest of the data under `root`.

        Raises ValueError, naming the manifest and the key, for what is not a manifest, for a model in two splits and
        for paths that leave `root`.
        """
        data = read_json(path)
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise ValueError(f"{path}: not a split manifest: it must be an object with a name and the splits {SPLITS}")
        views = check_views(path, data.get("views", {}))
        seen: dict[tuple[str, str], str] = {}
        splits: dict[str, dict[str, list[str]]] = {}
        for split in SPLITS:
            members = data.get(split)
            if not isinstance(members, dict) or not all(_strings(models) for models in members.values()):
                raise ValueError(f"{path}: {split!r} must map each synset to a list of model ids")
            splits[split] = members
            for synset, models in members.items():
                for model in models:
                    _check_relative(path, root, f"{split}.{synset}", f"{synset}/{model}")
                    other = seen.setdefault((synset, model), split)
                    if other != split and not views:
                        raise ValueError(f"{path}: {synset}/{model} is in {other!r} and in {split!r}")
        files = data.get("files", {})
        if not isinstance(files, dict) or not _strings(list(files.values())):
            raise ValueError(f"{path}: 'files' must map relative paths to sha256")
        for name in files:
            _check_relative(path, root, "files", name)
        version, seed = data.get("version", 1), data.get("seed")
        if not isinstance(version, int) or not isinstance(seed, int | None):
            raise ValueError(
                f"{path}: 'version' must be an integer and 'seed' one or null, got {version!r} and {seed!r}"
            )
        return SplitManifest(data["name"], version, seed, splits, files, views)

    def verify(self, root: str | os.PathLike[str]) -> list[Mismatch]:
        """The files under `root` that are missing or differ from the manifest."""
        wrong = []
        for name, expected in self.files.items():
            path = safe_join(root, name)
            if not path.is_file():
                wrong.append(Mismatch(name, "missing"))
            elif sha256(path) != expected:
                wrong.append(Mismatch(name, "its sha256 differs"))
        return wrong


def members_of(root: Path, split: str, manifest: str | None = None) -> set[str] | None:
    """Ids of a split's members by the manifest of that name, or the only one, in `root`/splits; None for "all".

    Raises ValueError naming what manifests there are.
    """
    if split == "all":
        return None
    listed = sorted((root / "splits").glob("*.json"))
    if manifest is not None:
        listed = [path for path in listed if path.stem == manifest]
    if len(listed) != 1:
        found = [path.stem for path in listed] or "none" + (f" named {manifest!r}" if manifest else "")
        raise ValueError(f"{root / 'splits'}: one split manifest is needed for {split!r}, found {found}")
    manifests = SplitManifest.read(listed[0], root)
    return {name for names in manifests.splits[split].values() for name in names}


def assign_splits(count: int, fractions: tuple[float, float, float]) -> list[str]:
    """The split of each of `count` models in turn: one for every share that is not 0, the largest first, then each
    for the split most behind its share.

    More models later leave the split of the earlier ones as it is.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"split must be three fractions (train, val, test) that sum to 1, got {fractions}")
    share = {split: Fraction(str(fraction)) for split, fraction in zip(SPLITS, fractions) if fraction}
    taken = dict.fromkeys(share, 0)
    assigned = []
    for index in range(count):
        behind = {split: share[split] * (index + 1) - taken[split] for split in share}
        chosen = max(share, key=lambda split: (not taken[split], behind[split]))
        taken[chosen] += 1
        assigned.append(chosen)
    return assigned


def sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; a ValueError names the file and the place."""
    try:
        return json.loads(Path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def check_views(path: Any, data: Any) -> dict[str, dict[str, list[int]]]:
    """The views of each split and model; ValueError for what is no list of numbers, and for a view in two splits."""
    seen: dict[tuple[str, int], str] = {}
    if not isinstance(data, dict) or not set(data) <= set(SPLITS):
        raise ValueError(f"{path}: 'views' must map {SPLITS} to the views of models")
    for split, members in data.items():
        for model, numbers in members.items() if isinstance(members, dict) else [(split, None)]:
            if not isinstance(numbers, list) or not all(isinstance(n, int) and n >= 0 for n in numbers):
                key = f"{split}.{str(model).replace('/', '.')}"
                raise ValueError(f"{path}: views: {key} must be a list of view numbers")
            for number in numbers:
                if (other := seen.setdefault((model, number), split)) != split:
                    raise ValueError(f"{path}: view {number} of {model} is in {other!r} and in {split!r}")
    return data


def _check_relative(path: Any, root: Any, key: str, name: str) -> None:
    try:
        safe_join(root, name)
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {error}") from error
