"""A data folder: which parts of the public layouts it has, and every file read once."""

import os
from collections.abc import Sequence
from pathlib import Path

from vision3dgen.datasets import LAYOUTS, ShapeNet, Shapes, SplitManifest, find_layout, open_layout
from vision3dgen.datasets.layouts import Packed
from vision3dgen.datasets.shape_items import Model, Problem
from vision3dgen.datasets.shapenet import FIELDS, FOLDERS, pieces_of
from vision3dgen.doctor.finding import Finding

SHOWN = 5  # problems in the message; all are in the values


def examine_folder(folder: str | os.PathLike[str]) -> list[Finding]:
    """Read a folder of shapes once, field by field, and compare it with the hashes of its split manifests.

    It may have any layout of `LAYOUTS`; of a packed store every checksum is compared. A field whose folder is not there
    at all is reported without judgement; a missing or broken file is a fault.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    layout = find_layout(root)
    if layout is not None and layout != "shapenet":
        return _examine_layout(root, layout)
    there = {piece for piece, names in FOLDERS.items() if any((root / name).is_dir() for name in names)}
    if not there:
        known = ", ".join(name for names in FOLDERS.values() for name in names)
        known += f", nor any of the layouts {', '.join(LAYOUTS)}"
        fix = f"vision3dgen prepare procedural {root} --shapes-per-category 5, or see docs/data.md for the layouts"
        return [Finding("data", "fail", f"{root} has none of the public folders {known}", fix)]
    findings = [
        _examine_field(root, name)
        if there.intersection(pieces_of(name))
        else Finding(name, "info", f"no {' or '.join(FOLDERS[piece][0] for piece in pieces_of(name))} in {root}")
        for name in FIELDS
    ]
    return [*findings, *(_examine_manifest(root, path) for path in sorted((root / "splits").glob("*.json")))]


def _examine_layout(root: Path, name: str) -> list[Finding]:
    try:
        layout = open_layout(root, name)
        models = [Model(synset, model) for synset, ids in layout.members().items() for model in ids]
    except ValueError as error:
        return [Finding("data", "fail", str(error))]
    fields = sorted(set(FIELDS) & set(layout.fields), key=FIELDS.index)
    packed = []
    if isinstance(layout, Packed):
        others = [field for field in layout.fields if field not in FIELDS]
        packed = [_judged(field, layout.check([field]), f"{len(models)} models") for field in others]
    return packed + [
        _examine_field(root, field, Shapes)
        if any(layout.has(model, field) for model in models)
        else Finding(field, "info", f"no model in {root} has it")
        for field in fields
    ]


def _examine_field(root: Path, name: str, reader: type[ShapeNet] | type[Shapes] = ShapeNet) -> Finding:
    try:
        data = reader(root, "all", fields=(name,))
    except ValueError as error:
        return Finding(name, "fail", str(error))
    problems = [problem for problem in data.check() if problem.required]
    return _judged(name, problems, f"{len(data)} items" + (f" of {len(data.models)} models" if not problems else ""))


def _judged(name: str, problems: Sequence[Problem], read: str) -> Finding:
    if not problems:
        return Finding(name, "ok", f"{read} read")
    listed = [f"{problem.item}: {problem.file}: {problem.reason}" for problem in problems]
    more = [f"and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    message = "\n".join([f"{len(listed)} problems in {read}", *listed[:SHOWN], *more])
    fix = "prepare these models again, or leave them out with data.on_error=skip"
    return Finding(name, "fail", message, fix, {"problems": listed})


def _examine_manifest(root: Path, path: Path) -> Finding:
    name = f"splits/{path.name}"
    try:
        manifest = SplitManifest.read(path, root)
    except ValueError as error:
        return Finding(name, "fail", str(error))
    wrong = [f"{mismatch.file}: {mismatch.reason}" for mismatch in manifest.verify(root)]
    counts = ", ".join(f"{sum(map(len, members.values()))} {split}" for split, members in manifest.splits.items())
    if not wrong:
        return Finding(name, "ok", f"{counts}; {len(manifest.files)} files have the hashes it lists")
    message = "\n".join([f"{len(wrong)} of {len(manifest.files)} files are not those it lists", *wrong[:SHOWN]])
    return Finding(name, "fail", message, "prepare or copy the data again", {"files": wrong})
