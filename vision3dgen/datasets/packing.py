"""From any layout to the packed store and back: every array as it is, item by item, in several processes."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vision3dgen.checks import check_choice
from vision3dgen.datasets.layouts import LAYOUTS, Layout, Packed, open_layout
from vision3dgen.datasets.layouts.layout import PICTURES, file_name
from vision3dgen.datasets.manifest import SPLITS, SplitManifest, write_json
from vision3dgen.datasets.shape_items import Arrays, Model, check_rows, composite, is_packed, nearest
from vision3dgen.datasets.splits import choose_split
from vision3dgen.datasets.store import write_store
from vision3dgen.parallel import map_in_order


class Packing(NamedTuple):
    """What a run of `pack` or `unpack` did."""

    root: Path
    counts: dict[str, int]  # split -> models
    rejected: list[dict[str, str]]  # item, reason
    left_out: list[str]  # fields that the target has no place for

    def __str__(self) -> str:
        lines = [f"{self.root}: {', '.join(f'{count} {split}' for split, count in self.counts.items())}"]
        lines += [f"  rejected {entry['item']}: {entry['reason']}" for entry in self.rejected]
        lines += [f"  left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join(lines)


class Pictures(NamedTuple):
    """How pictures are kept: at a size, over a background, so that nothing is left to do when they are read."""

    image_size: int
    background: tuple[float, float, float]


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str | None = None,
    fields: Sequence[str] | None = None,
    manifest: str | None = None,
    image_size: int | None = None,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    on_error: str = "raise",
    workers: int = 0,
) -> Packing:
    """Write a packed store with a folder for each split of a layout's models.

    layout: of the source, by default what it looks like. fields: which to keep, by default all that the first model
    has; a model without one of them is an error. manifest: who is in which split, as of `Shapes`; a model in none of
    them is left out. image_size: keep pictures as `Shapes` would show them at this size over `background`, RGB (depth,
    normals and mask by the nearest pixel); by default as they are, with alpha. on_error: "raise" at the first model
    that is broken, "skip" to leave such models out and list them in OUT/rejected.json. workers: processes that read.

    `out` is there when all of it is whole, or not at all. Raises ValueError if it is there already.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    reader, out = open_layout(source, layout), Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already: choose another place, or delete it")
    division = _division(reader, manifest)
    kept = _kept_fields(reader, division, fields)
    pictures = None if image_size is None else Pictures(image_size, background)
    about: dict[str, Any] = {
        "layout": reader.name if not isinstance(reader, Packed) else reader.about["layout"],
        "canonical": reader.canonical,
        "split": {"name": division.name, "sha256": division.sha256},
        "pictures": None if pictures is None else {"image_size": image_size, "background": list(background)},
        "render_size": None,
    }
    if isinstance(reader, Packed):
        about["render_size"] = reader.about["render_size"]
        if reader.sized and pictures is not None:
            raise ValueError(f"{source}: its pictures were packed at a size already: {reader.about['pictures']}")
        about["pictures"] = reader.about["pictures"] or about["pictures"]
    counts: dict[str, int] = {}
    rejected: list[dict[str, str]] = []
    temporary = out.parent / f".tmp-{out.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for split in SPLITS:
            models = [Model(synset, name) for synset, ids in division.members(split).items() for name in ids]
            if not models:
                continue
            read = partial(_read_model, reader, kept, pictures, on_error)
            with write_store(temporary / split, split, about) as writer:
                for model, found in zip(
                    models, map_in_order(read, models, workers=workers or 1, title=f"packing {split}")
                ):
                    if isinstance(found, str):
                        entry = {"item": str(model), "reason": found}
                        rejected += [] if entry in rejected else [entry]  # its views may be in two splits
                        continue
                    arrays, size = found
                    if size is not None and about["render_size"] not in (None, list(size)):
                        raise ValueError(f"{model}: pictures of {size}, of the models before {about['render_size']}")
                    about["render_size"] = about["render_size"] or (list(size) if size else None)
                    writer.add(model, arrays)
                    counts[split] = counts.get(split, 0) + 1
                writer.about = about
        if not counts:
            raise ValueError(f"{source}: no model is whole and in a split of {division.name!r}")
        (temporary / "splits").mkdir()
        division.write(temporary / "splits" / f"{file_name(division.name)}.json")
        if rejected:
            write_json(temporary / "rejected.json", rejected)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Packing(out, counts, rejected, [])


def unpack(
    source: str | os.PathLike[str], out: str | os.PathLike[str], layout: str, *, splits: Sequence[str] | None = None
) -> Packing:
    """Write the shapes of a packed store, or of any layout, in a layout of `LAYOUTS`; arrays stay equal.

    Fields that the layout has no place for are left out and listed. Raises ValueError if `out` has files already, for
    a layout that is only read, and for a model without what the layout consists of.
    """
    check_choice("layout", layout, LAYOUTS)
    target, reader, out = LAYOUTS[layout], open_layout(source), Path(out)
    if layout == "packed":
        raise ValueError(f"{out}: a packed store is written by pack")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another place")
    division = _division(reader, None)
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    left_out: set[str] = set()
    written: set[Model] = set()
    for split in splits or SPLITS:
        for synset, ids in division.members(split).items():
            for model in (Model(synset, name) for name in ids):
                counts[split] = counts.get(split, 0) + 1
                if model in written:
                    continue
                arrays = {field: reader.read(model, field) for field in reader.fields if reader.has(model, field)}
                left_out |= set(arrays) - set(target.writes)
                target.write(out, model, arrays)
                written.add(model)
    if splits is not None:
        division = SplitManifest(
            division.name, division.version, division.seed,
            {split: division.splits[split] if split in splits else {} for split in SPLITS},
            views={split: views for split, views in division.views.items() if split in splits},
        )  # fmt: skip
    target.write_lists(out, division)
    return Packing(out, counts, [], sorted(left_out))


def _division(reader: Layout, manifest: str | None) -> SplitManifest:
    if isinstance(reader, Packed):
        if manifest is not None:
            own = reader.manifest()
            return choose_split(manifest, reader.members(), own, reader.root / "nowhere")
        found = reader.manifest()
        assert found is not None
        return found
    return choose_split(manifest, reader.members(), reader.manifest(), reader.root)


def _kept_fields(reader: Layout, division: SplitManifest, fields: Sequence[str] | None) -> tuple[str, ...]:
    if fields is not None:
        for name in fields:
            check_choice("field", name, reader.fields)
        return tuple(dict.fromkeys(fields))
    first = next((Model(s, ids[0]) for s, ids in division.members("all").items() if ids), None)
    if first is None:
        raise ValueError(f"{reader.root}: the split {division.name!r} has no model")
    return tuple(name for name in reader.fields if reader.has(first, name))


def _read_model(
    reader: Layout, fields: tuple[str, ...], pictures: Pictures | None, on_error: str, model: Model
) -> tuple[dict[str, np.ndarray], tuple[int, int] | None] | str:
    """The arrays of a model by their names in the store, and the size of its pictures; or why it cannot be read."""
    try:
        arrays: dict[str, np.ndarray] = {}
        size = None
        for field in fields:
            if (path := reader.missing(model, field)) is not None:
                raise ValueError(f"{path}: the file for {field!r} does not exist")
            found = reader.read(model, field)
            check_field(reader.where(model, field), field, found)
            if field in PICTURES and not reader.sized:
                size = (int(found[field].shape[1]), int(found[field].shape[2]))
                if pictures is not None:
                    if field == "image" and found[field].shape[3] == 4 and "mask" not in fields:
                        arrays["mask/mask"] = _at_size("mask", found[field][..., 3], pictures)  # else it would be lost
                    found = {**found, field: _at_size(field, found[field], pictures)}
            arrays |= {f"{field}/{key}": np.asarray(array) for key, array in found.items()}
        return arrays, size
    except (ValueError, OSError) as error:
        if on_error == "raise":
            raise
        return str(error)


def check_field(where: str, field: str, arrays: Arrays) -> None:
    """What a reader of the store takes for granted: shapes that fit, finite values, indices in range."""
    if field == "mesh":
        verts, faces = arrays["verts"], arrays["faces"]
        check_rows(where, "verts", verts)
        if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
            raise ValueError(f"{where}: faces must be (F, 3) integers, got {faces.shape} of {faces.dtype}")
        if len(faces) and not 0 <= faces.min() <= faces.max() < len(verts):
            raise ValueError(f"{where}: faces point at {faces.min()} to {faces.max()} of {len(verts)} vertices")
    if field in ("points", "surface"):
        points = arrays["points"].reshape(-1, arrays["points"].shape[-1])
        check_rows(where, "points", points)
        if field == "points":
            values = arrays["occupancies"]
            fits = values.shape == arrays["points"].shape[:-1] or is_packed(values, len(points))
            rows = arrays["points"].shape[1] if values.ndim == 2 else 0
            if not fits and not (values.ndim == 2 and all(is_packed(row, rows) for row in values)):
                raise ValueError(
                    f"{where}: occupancies of {len(points)} points must be as many values or "
                    f"{-(-len(points) // 8)} bytes of packed bits, got {values.shape} of {values.dtype}"
                )
        normals = arrays.get("normals")
        if normals is not None and normals.shape != arrays["points"].shape:
            raise ValueError(f"{where}: {arrays['points'].shape} points have {normals.shape} normals")
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{where}: {key} must be numbers, got {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{where}: {key} has values that are not finite")


def _at_size(field: str, stack: np.ndarray, pictures: Pictures) -> np.ndarray:
    if field == "image":
        seen = [composite(picture, pictures.background, pictures.image_size).transpose(1, 2, 0) for picture in stack]
    else:
        seen = [nearest(picture, pictures.image_size) for picture in stack]
    return np.stack(seen)
