"""Arrays in npz files: never pickles, never more memory than the file accounts for, equal input gives equal bytes."""

import difflib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from vision3dgen.files import FileError, atomic_write


def load_npz(path: str | os.PathLike[str], *keys: str) -> dict[str, np.ndarray]:
    """The named arrays of an npz file, all of them without names.

    Raises FileError naming file and key: not a zip or cut short, a missing key, pickled objects, a header that claims
    another size than is stored.
    """
    path = Path(path)
    with _archive(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        arrays = {}
        for key in keys or members:
            if key not in members:
                near = difflib.get_close_matches(key, members, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise FileError(f"{path}: no array {key!r}{hint}; it has {sorted(members)}")
            arrays[key] = _read_array(path, key, archive, members[key])
        return arrays


def list_npz(path: str | os.PathLike[str]) -> list[str]:
    """Names of the arrays in an npz file."""
    with _archive(Path(path)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def save_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write arrays (or tensors) as an uncompressed npz file, atomically; the same arrays give the same bytes."""
    converted = {key: np.asarray(value) for key, value in arrays.items()}
    for key, array in converted.items():
        if array.dtype.hasobject:
            raise FileError(f"{path}: array {key!r} holds Python objects, only numbers and strings can be written")
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for key, array in converted.items():
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # not the time of writing
            info.create_system = 3  # not the system's own
            with archive.open(info, "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip file, whose faults, however zipfile reports them, become FileError."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except FileError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise FileError(f"{path}: not an npz file, or a damaged one: {error}") from error


def load_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an npy file; FileError as of `load_npz`."""
    path = Path(path)
    with open(path, "rb") as file:
        return _read_member(path, "of the file", file, path.stat().st_size)


def save_npy(path: str | os.PathLike[str], array: Any) -> None:
    """Write an array (or tensor) as an npy file, atomically."""
    converted = np.asarray(array)
    if converted.dtype.hasobject:
        raise FileError(f"{path}: the array holds Python objects, only numbers and strings can be written")
    with atomic_write(path) as file:
        npy.write_array(file, converted, allow_pickle=False)


def _read_array(path: Path, key: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        return _read_member(path, repr(key), member, info.file_size)


def _read_member(path: Path, name: str, member: Any, size: int) -> np.ndarray:
    """The array in a file of `size` bytes, open at its beginning; `name` is what errors call it."""
    try:
        version = npy.read_magic(member)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"npy version {version}")
        # numpy names only the readers of versions 1 and 2; 3 differs from 2 in non-ASCII field names alone
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
    except (ValueError, SyntaxError, TypeError, KeyError, TokenError, RecursionError) as error:
        raise FileError(f"{path}: array {name} is not a numpy array: {error}") from error
    if dtype.hasobject:
        raise FileError(f"{path}: array {name} holds pickled Python objects, which are never loaded")
    stored, claimed = size - member.tell(), math.prod(shape) * dtype.itemsize
    if stored != claimed or min(shape, default=0) < 0:
        raise FileError(f"{path}: array {name} claims shape {shape} of {dtype}, {claimed} bytes; {stored} are stored")
    values = bytearray(member.read())  # not bytes, so that the array can be written to
    if len(values) != claimed:
        raise FileError(f"{path}: array {name} is cut short, {len(values)} of {claimed} bytes")
    return np.ndarray(shape, dtype, values, order="F" if fortran else "C")
