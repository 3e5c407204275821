"""Results files: a header line that says what moves the numbers, then one JSON line per item, written as they come.

A file that a kill cut short is taken up again; several processes each write a part of their own, joined at the end.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import IO, Any

from vision3dgen.engine.processes import gather_objects, raised_by_all, share
from vision3dgen.files import atomic_write

Row = dict[str, Any]
Batch = Mapping[str, Any]
ScoreShare = Callable[[Iterable[Batch], Mapping[str, Row], IO[str]], list[list[str]]]  # ids, batch by batch


def score_by_one(batches: Iterable[Batch], path: Path, header: Row, score: ScoreShare) -> list[Row]:
    """The rows of all items of the batches, in their order, which are also those of the file.

    score(batches, done, file): writes a row for each item that is not `done`, and returns the ids, batch by batch.
    """
    done = join_results(path, header)
    with open(path, "a", encoding="utf-8") as file:
        order = score(batches, done, file)
    names = [name for ids in order for name in ids]
    sort_results(path, names)
    return _rows_of(path, names)


def score_by_all(batches: Sequence[Batch], path: Path, header: Row, score: ScoreShare) -> list[Row]:
    """As `score_by_one`, by all processes of a group, which call this together and return the same rows.

    The batches, made when they are indexed, are divided; they stay whole, so that predictions are those of one process.
    `path` must be on a disk that all see. An error in one process is raised in all.
    """
    with raised_by_all() as rank:
        if rank == 0:
            join_results(path, header)
    numbers = share(len(batches))
    order: list[list[str]] = []
    with raised_by_all() as rank:
        done = {row["id"]: row for row in read_results(path)[1]}
        own = path.with_name(f"{path.stem}.part{rank}{path.suffix}")
        resume_results(own, header)
        with open(own, "a", encoding="utf-8") as file:
            order = score((batches[number] for number in numbers), done, file)
    owned = dict(pair for pairs in gather_objects(list(zip(numbers, order))) for pair in pairs)
    names = [name for number in sorted(owned) for name in owned[number]]
    with raised_by_all() as rank:
        if len(set(names)) < len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise ValueError(f"item {twice!r} comes twice: every id must be scored once")
        if rank == 0:
            join_results(path, header)
            sort_results(path, names)
    return _rows_of(path, names)


def _rows_of(path: Path, names: Sequence[str]) -> list[Row]:
    rows = {row["id"]: row for row in read_results(path)[1]}
    return [rows[name] for name in names]


def read_results(path: str | os.PathLike[str]) -> tuple[Row, list[Row]]:
    """Header and rows of a results file; a last line cut short is left out. ValueError names a broken line."""
    header, rows, _ = _parse(Path(path))
    if header is None:
        raise ValueError(f"{path}: no header line, not a results file")
    return header, rows


def _parse(path: Path) -> tuple[Row | None, list[Row], int]:
    """Header, rows and the length in bytes of the whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        kind = "protocol" if number == 1 else "id"
        if not isinstance(lines[-1], dict) or kind not in lines[-1]:
            raise ValueError(f"{path}, line {number}: no {kind!r}, not a line that evaluate wrote")
    return (lines[0] if lines else None), lines[1:], whole


def resume_results(path: Path, header: Row) -> dict[str, Row]:
    """Rows already in the file, which is cut to whole lines, or started with the header."""
    start = json.dumps(header, allow_nan=False) + "\n"
    if path.exists():
        found, rows, whole = _parse(path)
        if found is not None:
            different = sorted(key for key in {*header, *found} if found.get(key) != header.get(key))
            if different:
                raise ValueError(f"{path} holds results of another run: {different} differ; choose another file")
            os.truncate(path, whole)
            return {row["id"]: row for row in rows}
        if not start.startswith(path.read_text(encoding="utf-8")):
            raise ValueError(f"{path}: not a results file; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(start, encoding="utf-8")
    return {}


def join_results(path: Path, header: Row) -> dict[str, Row]:
    """Rows already in a results file, which is made if need be, and in parts beside it, which it takes in."""
    done = resume_results(path, header)
    parts = sorted(path.parent.glob(f"{escape(path.stem)}.part*{escape(path.suffix)}"))
    for part in parts:
        done |= resume_results(part, header)
    if parts:
        _write(path, header, done.values())
        for part in parts:
            part.unlink()
    return done


def sort_results(path: Path, order: Sequence[str]) -> None:
    """Put the rows of a results file in this order, those of other items last; a file in this order is not touched."""
    header, rows = read_results(path)
    known = {row["id"]: row for row in rows}
    wanted = list(dict.fromkeys([*order, *known]))
    if [row["id"] for row in rows] != wanted:
        _write(path, header, [known[name] for name in wanted])


def _write(path: Path, header: Row, rows: Iterable[Row]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(line, allow_nan=False).encode() + b"\n" for line in (header, *rows))
