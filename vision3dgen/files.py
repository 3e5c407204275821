"""Files that are never half written, lines of JSON, and paths that never leave their folder."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO


class FileError(ValueError):
    """A file whose content cannot be read or written as asked; the message names the file and the reason."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` in one step when the block ends, and vanishes when the block raises.

    What was at `path` stays whole through an exception, a full disk or a kill (which may leave a hidden `.tmp-*` beside
    it). The folder must exist. An OSError of the writing itself names `path`.
    """
    target = Path(os.path.realpath(path))  # a link stays a link to the new content
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise  # about another file
        raise OSError(error.errno, f"cannot write, {os.strerror(error.errno)}", str(path)) from error


def safe_join(root: str | os.PathLike[str], relative: str) -> Path:
    """`root / relative` for a path found in a manifest; a FileError naming the entry if it would leave `root`."""
    windows = PureWindowsPath(relative)
    if not relative or "\0" in relative or windows.drive or windows.root:
        raise FileError(f"path {relative!r} must be relative to {os.fspath(root)}")
    if ".." in windows.parts or ".." in PurePosixPath(relative).parts:
        raise FileError(f"path {relative!r} must not contain '..' (it would leave {os.fspath(root)})")
    joined = Path(root, relative)
    if not joined.resolve().is_relative_to(Path(root).resolve()):
        raise FileError(f"path {relative!r} leaves {os.fspath(root)} through a link, to {joined.resolve()}")
    return joined


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a file with one JSON object per line; a ValueError names the line that is none."""
    entries = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {line[:40]}")
        entries.append(entry)
    return entries
