"""Every reader of files: a few valid files of it, how they are read, and files made to be refused."""

import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vision3dgen import config
from vision3dgen.datasets import SplitManifest, load_cameras
from vision3dgen.datasets.images import read_idx
from vision3dgen.files import read_jsonl
from vision3dgen.io import (
    load_mesh,
    load_npy,
    load_npz,
    load_pointcloud,
    read_binvox,
    read_depth_png,
    read_image,
    read_index_png,
    save_mesh,
    save_npy,
    save_npz,
    save_pointcloud,
    write_binvox,
    write_depth_png,
)
from vision3dgen.ops import ico_sphere
from vision3dgen.structures import Pointclouds


class Reader(NamedTuple):
    suffix: str
    read: Callable[[Path], Any]
    samples: Callable[[], list[bytes]]
    claims: tuple[bytes, ...] = ()  # files whose headers promise 10^12 things or so, and hold next to nothing


def _written(suffix: str, *writes: Callable[[Path], Any]) -> list[bytes]:
    """The bytes that each writer leaves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        found = []
        for write in writes:
            write(path)
            found.append(path.read_bytes())
        return found


def _meshes(suffix: str) -> list[bytes]:
    sphere = ico_sphere(0)
    return _written(suffix, lambda path: save_mesh(path, sphere))


def _clouds(suffix: str) -> list[bytes]:
    points = torch.arange(21.0).view(1, 7, 3)
    both = Pointclouds(points, normals=points.flip(1), features=points / 21)
    return _written(
        suffix, lambda path: save_pointcloud(path, Pointclouds(points)), lambda path: save_pointcloud(path, both)
    )


def _arrays() -> list[bytes]:
    return _written(".npz", lambda path: save_npz(path, a=np.arange(6.0), b=np.eye(2)))


def _grid() -> list[bytes]:
    return _written(".binvox", lambda path: write_binvox(path, torch.arange(64).view(4, 4, 4) % 3 == 0))


def _depth() -> list[bytes]:
    return _written(".png", lambda path: write_depth_png(path, np.ones((3, 4), np.float32)))


def _picture(mode: str, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)).convert(mode).save(file, form)
    return file.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _huge_png(depth: int, color: int) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 2_000_000, 2_000_000, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"\0" * 64)) + _chunk(b"IEND", b"")


def _npy(shape: str) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64 + 1 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 16


def _config(path: Path) -> Any:
    return config.load(path)


def _manifest(path: Path) -> Any:
    return SplitManifest.read(path, path.parent)


_YAML = b"a: 1\nb: {name: x, c: [1, 2.5, yes]}\nd: ${b.name}\ntiny:\n  a: 2\n"
_LINES = b'{"id": "a", "x": [1, 2]}\n{"id": "b"}\n'
_SPLIT = {
    "name": "s",
    "version": 1,
    "seed": 0,
    "train": {"03001627": ["a"]},
    "val": {},
    "test": {},
    "files": {"a/b": "0"},
}
_IDX = b"\0\0\x08\x03" + struct.pack(">III", 2, 3, 4) + bytes(24)
_PLY = "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\nend_header\n"


def _cameras() -> list[bytes]:
    world = np.concatenate([np.eye(3), np.array([[0.0], [0.0], [2.0]])], axis=1)
    matrix = np.array([[30.0, 0, 10.5], [0, 30.0, 10.5], [0, 0, 1]])
    both = {
        f"{kind}_{number}": value
        for number in range(2)
        for kind, value in (("world_mat", world), ("camera_mat", matrix))
    }
    return _written(".npz", lambda path: save_npz(path, **both))


READERS: dict[str, Reader] = {
    "obj": Reader(".obj", load_mesh, lambda: [*_meshes(".obj"), b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/1/1 2//2 -1\n"]),
    "off": Reader(".off", load_mesh, lambda: _meshes(".off"), (b"OFF\n1000000000000 1000000000000 0\n0 0 0\n",)),
    "stl": Reader(".stl", load_mesh, lambda: _meshes(".stl"), (b"\0" * 80 + struct.pack("<I", 2**32 - 1),)),
    "glb": Reader(".glb", load_mesh, lambda: _meshes(".glb")),
    "ply mesh": Reader(
        ".ply", load_mesh, lambda: _meshes(".ply"),
        (_PLY.format("binary_little_endian", 10**12).encode() + bytes(12),),
    ),
    "ply cloud": Reader(
        ".ply", load_pointcloud, lambda: _clouds(".ply"),
        (_PLY.format("ascii", 10**12).encode() + b"0 0 0\n", _PLY.format("binary_big_endian", 10**12).encode()),
    ),
    "xyz": Reader(".xyz", load_pointcloud, lambda: _clouds(".xyz")),
    "npz cloud": Reader(".npz", load_pointcloud, lambda: _clouds(".npz")),
    "npz": Reader(".npz", load_npz, _arrays),
    "cameras": Reader(".npz", lambda path: load_cameras(path, 21), _cameras),
    "npy": Reader(
        ".npy", load_npy, lambda: _written(".npy", lambda path: save_npy(path, np.arange(6.0).reshape(2, 3))),
        (_npy("(1000000000000,)"), _npy("(-1, 2)"), _npy("(10**12,)")),
    ),
    "binvox": Reader(
        ".binvox", read_binvox, _grid,
        (b"#binvox 1\ndim 100000 100000 100000\ntranslate 0 0 0\nscale 1\ndata\n\x01\xff",),
    ),
    "picture": Reader(".png", read_image, lambda: [*map(_picture, ("RGBA", "L", "RGB"))], (_huge_png(8, 6),)),
    "jpeg": Reader(".jpg", lambda path: read_image(path, mode="RGB"), lambda: [_picture("RGB", "JPEG")]),
    "index picture": Reader(".png", read_index_png, lambda: [_picture("P")], (_huge_png(8, 0),)),
    "depth picture": Reader(
        ".png", read_depth_png, _depth,
        (_huge_png(16, 0),),
    ),
    "idx": Reader("-idx", read_idx, lambda: [_IDX], (b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 4),)),
    "configuration": Reader(".yaml", _config, lambda: [_YAML]),
    "lines": Reader(".jsonl", read_jsonl, lambda: [_LINES]),
    "manifest": Reader(".json", _manifest, lambda: [json.dumps(_SPLIT).encode()]),
}  # fmt: skip


def refused(error: BaseException) -> bool:
    """Whether an error is one that readers are to raise: a ValueError or OSError of theirs, naming the file."""
    return isinstance(error, ValueError | OSError) and not isinstance(error, UnicodeError | json.JSONDecodeError)


def attempt(reader: Reader, data: bytes, folder: Path) -> str:
    """ "read" or "refused"; anything else, a message without the file's name included, is raised."""
    path = folder / f"file{reader.suffix}"
    path.write_bytes(data)
    try:
        reader.read(path)
    except Exception as error:
        if refused(error) and path.name in str(error):
            return "refused"
        raise
    return "read"
