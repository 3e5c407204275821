"""The packed store: the arrays of all shapes of a split, one behind the other, read through memory maps.

    STORE/SPLIT/ARRAY.bin     the bytes of one array of all items, each at a multiple of 64
    STORE/SPLIT/index.npz     ids; of each array where items begin, their shapes, and CRC-32 of every 64 KiB of an item
    STORE/SPLIT/index.json    format, version, split, dtypes, sizes of the files, sha256 of index.npz; written last

A map costs no memory until it is read, and what one process has read is there for the others: workers and ranks share
the pages. A checksum is compared when its 64 KiB are first read by a process, and all of them by `check`; a rewritten
byte is a ValueError naming item and array. Numbers are little endian, booleans eight in a byte. A store is written
beside its place and moved there when it is whole.
"""

import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vision3dgen.datasets.manifest import read_json, sha256, write_json
from vision3dgen.datasets.shape_items import Model, Problem
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import load_npz, save_npz

FORMAT, VERSION = "vision3dgen.store", 1
ALIGN = 64  # bytes
CHUNK = 1 << 16  # bytes under one checksum
DTYPES = ("b1", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8")

NamedArrays = Mapping[str, np.ndarray]  # "points/occupancies" -> array


class _Entry(NamedTuple):
    """What is known of one array of all items."""

    dtype: np.dtype
    starts: np.ndarray  # (n,) bytes from the beginning of the file, -1 where the item has none
    shapes: np.ndarray  # (n, ndim)
    sizes: np.ndarray  # (n,) bytes
    first: np.ndarray  # (n,) its first checksum
    checksums: np.ndarray  # (c,) uint32


class Store:
    """A split of a packed store, open for reading.

    verify: whether checksums are compared at first use; `check` compares all of them in any case. Opening reads the
    index alone. Raises ValueError naming the file for an index of another version, a changed or cut file, and a folder
    that is no store. It is picklable: another process opens its own maps, of the same pages.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        self._open()

    def _open(self) -> None:
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileError(f"{self.folder}: not a packed store, or one that was never finished: no index.json")
        head = read_json(path)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise FileError(f"{path}: not the index of a packed store")
        if head.get("version") != VERSION:
            raise FileError(
                f"{path}: version {head.get('version')!r}, this library reads {VERSION}; pack the data again"
            )
        index = self.folder / "index.npz"
        if not index.is_file() or sha256(index) != head.get("sha256"):
            raise FileError(f"{index}: {'its sha256 differs from index.json' if index.is_file() else 'missing'}")
        arrays = load_npz(index)
        self.about: dict[str, Any] = head["about"]
        self.split: str = head["split"]
        self.models = [Model(str(synset), str(name)) for synset, name in zip(arrays["synset"], arrays["id"])]
        self.rows = {model: row for row, model in enumerate(self.models)}
        if len(self.rows) < len(self.models):
            raise FileError(f"{index}: two items have one id")
        self._entries: dict[str, _Entry] = {}
        self._maps: dict[str, np.ndarray] = {}
        self._verified: dict[str, np.ndarray] = {}
        for number, (name, known) in enumerate(head["arrays"].items()):
            self._entries[name] = self._entry(name, number, known, arrays)
            self._maps[name] = _map(safe_join(self.folder, known["file"]), int(known["bytes"]))
            self._verified[name] = np.zeros(len(self._entries[name].checksums), bool)

    def _entry(self, name: str, number: int, known: Mapping[str, Any], arrays: NamedArrays) -> _Entry:
        """The entry of an array; ValueError where the index does not hang together."""
        where = f"{self.folder / 'index.npz'}: {name}"
        if known["dtype"] not in DTYPES:
            raise FileError(f"{where}: dtype {known['dtype']!r}; known are {', '.join(DTYPES)}")
        dtype = np.dtype(f"<{known['dtype']}")
        starts, shapes, checksums = (arrays[f"{kind}_{number}"] for kind in ("starts", "shapes", "checksums"))
        if len(starts) != len(self.models) or len(shapes) != len(self.models) or shapes.min(initial=0) < -1:
            raise FileError(f"{where}: starts and shapes must be those of {len(self.models)} items")
        sizes = _stored_bytes(shapes, dtype)
        sizes[starts < 0] = 0
        chunks = -(-sizes // CHUNK)
        if (starts + sizes).max(initial=0) > int(known["bytes"]) or chunks.sum() != len(checksums):
            raise FileError(f"{where}: items end behind the {known['bytes']} bytes of its file")
        return _Entry(dtype, starts, shapes, sizes, chunks.cumsum() - chunks, checksums)

    def __len__(self) -> int:
        return len(self.models)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "verify": self.verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    @property
    def names(self) -> list[str]:
        """The arrays there are, such as "points/occupancies"."""
        return list(self._entries)

    def has(self, model: Model, name: str) -> bool:
        return name in self._entries and bool(self._entries[name].starts[self.rows[model]] >= 0)

    def read(self, model: Model, name: str) -> np.ndarray:
        """An item's array, read-only: a view of the map, of which pages are read when they are looked at.

        With `verify`, the whole array is read and compared once in this process.
        """
        entry, row = self._entries[name], self.rows[model]
        start, size = int(entry.starts[row]), int(entry.sizes[row])
        if start < 0:
            raise ValueError(f"{self.folder}: {model} has no {name}")
        if self.verify:
            self._compare(name, row, 0, size)
        shape = tuple(entry.shapes[row].tolist())
        stored = self._maps[name][start : start + size]
        if entry.dtype.kind == "b":
            return np.unpackbits(stored, count=int(np.prod(shape))).astype(bool).reshape(shape)
        return stored.view(entry.dtype).reshape(shape)

    def read_part(self, model: Model, name: str, index: int) -> np.ndarray:
        """`read(model, name)[index]`, of which only the checksums of that part are compared."""
        entry, row = self._entries[name], self.rows[model]
        if entry.dtype.kind == "b" or entry.starts[row] < 0:
            return self.read(model, name)[index]
        shape = tuple(entry.shapes[row].tolist())
        size = int(entry.sizes[row]) // max(shape[0], 1)
        if not 0 <= index < shape[0]:
            raise IndexError(f"{name} of {model} has {shape[0]} parts, got {index}")
        if self.verify:
            self._compare(name, row, index * size, (index + 1) * size)
        start = int(entry.starts[row]) + index * size
        return self._maps[name][start : start + size].view(entry.dtype).reshape(shape[1:])

    def _compare(self, name: str, row: int, begin: int, end: int) -> None:
        """Compare the checksums over these bytes of an item that have not been compared yet."""
        entry, verified = self._entries[name], self._verified[name]
        first = int(entry.first[row])
        chunks = slice(first + begin // CHUNK, first + -(-end // CHUNK))
        if verified[chunks].all():
            return
        origin, stop = int(entry.starts[row]), int(entry.starts[row] + entry.sizes[row])
        for chunk in range(chunks.start, chunks.stop):
            if verified[chunk]:
                continue
            at = origin + (chunk - first) * CHUNK
            if zlib.crc32(self._maps[name][at : min(at + CHUNK, stop)].data) != entry.checksums[chunk]:
                file = self.folder / _file_of(name)
                raise FileError(
                    f"{file}: item {self.models[row]}, {name}: the checksum of bytes {at} to {min(at + CHUNK, stop)} "
                    "differs; copy or pack the store again"
                )
            verified[chunk] = True

    def check(self, names: Sequence[str] | None = None) -> list[Problem]:
        """Compare every checksum of the arrays named, of all by default; what differs, by item and array."""
        problems = []
        for name, entry in self._entries.items():
            if names is not None and name not in names:
                continue
            self._verified[name][:] = False
            for row, model in enumerate(self.models):
                try:
                    self._compare(name, row, 0, int(entry.sizes[row]))
                except FileError as error:
                    problems.append(Problem(str(model), str(self.folder / _file_of(name)), str(error), True))
        return problems


class StoreWriter:
    """Writes a split item by item; see `write_store`."""

    def __init__(self, folder: Path, split: str, about: Mapping[str, Any]):
        self.folder, self.split, self.about = folder, split, about
        self._files: dict[str, Any] = {}
        self._dtypes: dict[str, str] = {}
        self._ends: dict[str, int] = {}
        self._rows: list[tuple[Model, dict[str, tuple[int, tuple[int, ...]]]]] = []
        self._checksums: dict[str, list[int]] = {}
        self._seen: set[Model] = set()

    def add(self, model: Model, arrays: NamedArrays) -> None:
        """One more item. Raises ValueError for an id that was there before, and for an array of another dtype or number
        of dimensions than that of the items before."""
        safe_join(self.folder, str(model))
        if not all((model.synset, model.id)) or model in self._seen:
            raise ValueError(f"{model}: an id must not be empty, and every id must come once")
        self._seen.add(model)
        row: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, array in arrays.items():
            row[name] = (self._append(model, name, array), array.shape)
        self._rows.append((model, row))

    def _append(self, model: Model, name: str, array: np.ndarray) -> int:
        code = array.dtype.str[1:]
        if code not in DTYPES:
            raise ValueError(f"{model}: {name} is {array.dtype}; stored are {', '.join(DTYPES)}")
        known = self._dtypes.setdefault(name, code)
        other = next((row[name][1] for _, row in self._rows if name in row), array.shape)
        if code != known or len(other) != array.ndim:
            raise ValueError(
                f"{model}: {name} is {array.dtype} {array.shape}, in the items before it is {np.dtype(known)} {other}"
            )
        if name not in self._files:
            self._files[name] = open(self.folder / _file_of(name), "wb")  # noqa: SIM115 closed by write_store
            self._ends[name], self._checksums[name] = 0, []
        values = np.ascontiguousarray(array)
        if code == "b1":
            data = np.packbits(values).tobytes()
        else:
            data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
        start = -(-self._ends[name] // ALIGN) * ALIGN
        try:
            self._files[name].write(b"\0" * (start - self._ends[name]) + data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / _file_of(name))) from error
        self._ends[name] = start + len(data)
        self._checksums[name] += [zlib.crc32(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
        return start

    def finish(self) -> None:
        """Write the index of what was added."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        models = [model for model, _ in self._rows]
        arrays: dict[str, np.ndarray] = {
            "synset": np.array([model.synset for model in models], np.str_),
            "id": np.array([model.id for model in models], np.str_),
        }
        known = {}
        for number, name in enumerate(self._files):
            dims = next(len(row[name][1]) for _, row in self._rows if name in row)
            absent = (-1, (-1,) * dims)
            places = [row.get(name, absent) for _, row in self._rows]
            arrays[f"starts_{number}"] = np.array([start for start, _ in places], np.int64)
            arrays[f"shapes_{number}"] = np.array([shape for _, shape in places], np.int64).reshape(len(places), dims)
            arrays[f"checksums_{number}"] = np.array(self._checksums[name], np.uint32)
            known[name] = {"file": _file_of(name), "dtype": self._dtypes[name], "bytes": self._ends[name]}
        save_npz(self.folder / "index.npz", **arrays)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "split": self.split,
            "items": len(models),
            "about": dict(self.about),
        }
        write_json(self.folder / "index.json", {**head, "sha256": sha256(self.folder / "index.npz"), "arrays": known})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def write_store(
    folder: str | os.PathLike[str], split: str, about: Mapping[str, Any] | None = None
) -> Iterator[StoreWriter]:
    """A writer whose items are a store at `folder` when the block ends, and nothing at all when it raises or is killed.

    Raises ValueError if there is something at `folder` already.
    """
    target = Path(folder)
    if target.exists():
        raise ValueError(f"{target} is there already: choose another place, or delete it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
    temporary.mkdir()
    writer = StoreWriter(temporary, split, about or {})
    try:
        yield writer
        writer.finish()
        writer.close()
        os.replace(temporary, target)
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)


def open_splits(root: Path, splits: Sequence[str] | None = None, *, verify: bool = True) -> list[Store]:
    """The splits of a store, all that there are by default; ValueError where one asked for is not there."""
    there = sorted(path.parent.name for path in root.glob("*/index.json"))
    wanted = there if splits is None else splits
    absent = [split for split in wanted if split not in there]
    if absent or not there:
        raise ValueError(f"{root}: no split {absent[0] if absent else ''!r} in this store; it has {there or 'none'}")
    return [Store(root / split, verify=verify) for split in wanted]


def _file_of(name: str) -> str:
    return f"{name.replace('/', '.')}.bin"


def _stored_bytes(shapes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bytes of arrays of these shapes. In floats first: a forged shape must not wrap around."""
    counts = np.prod(shapes.astype(np.float64), axis=1)
    if counts.max(initial=0) > 2**48:
        raise FileError(f"a shape of {shapes[counts.argmax()].tolist()} is no array in a store")
    items = np.prod(shapes, axis=1)
    return -(-items // 8) if dtype.kind == "b" else items * dtype.itemsize


def _map(path: Path, size: int) -> np.ndarray:
    """The bytes of a file, read-only and shared between processes."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise FileError(f"{path}: {'missing' if found is None else f'{found} bytes'}, the index says {size} bytes")
    if size == 0:
        return np.empty(0, np.uint8)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
