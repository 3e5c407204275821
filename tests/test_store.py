"""The packed store: what was written is read, nothing half written is, and no damage goes unnoticed."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_layouts import CHAIR, MODELS, make_onet, make_shapenet, numbers
from vision3dgen import cli
from vision3dgen.datasets import Shapes, Store, open_layout, pack, unpack, write_store
from vision3dgen.datasets.shape_items import Model
from vision3dgen.datasets.store import CHUNK
from vision3dgen.doctor import examine_folder, is_sound
from vision3dgen.engine import Data
from vision3dgen.engine.loading import ShuffleSampler, make_loader
from vision3dgen.files import FileError

DTYPES = (np.bool_, np.uint8, np.int16, np.uint16, np.float16, np.int32, np.float32, np.int64, np.float64)
FIELDS = ("image", "points", "surface")


def arrays(seed: int) -> dict[str, np.ndarray]:
    """One of each dtype, of 0 to 3 dimensions, ragged, among them empty ones and some of several checksums."""
    made = {f"f/{np.dtype(d).name}": (numbers(seed + 1, 3, 7, seed=seed) * 9).astype(d) for d in DTYPES}
    return made | {
        "g/scalar": np.array(seed + 0.5),
        "g/empty": np.zeros((seed, 3), np.float32),
        "g/long": numbers(20_011 + seed, 3, seed=seed),
        "g/fortran": np.asfortranarray(numbers(5, 3, seed=seed)),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    with write_store(tmp_path / "train", "train") as writer:
        for seed, name in enumerate(MODELS):
            given = arrays(seed)
            if seed == 1:
                del given["g/scalar"]
            writer.add(Model(CHAIR, name), given)
    return tmp_path / "train"


def test_what_was_written_is_read(folder):
    store = Store(folder)
    assert [model.id for model in store.models] == list(MODELS)
    for seed, model in enumerate(store.models):
        for name, array in arrays(seed).items():
            if (seed, name) == (1, "g/scalar"):
                assert not store.has(model, name)
                continue
            found = store.read(model, name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert np.array_equal(found, array)
            if array.ndim and len(array):
                assert np.array_equal(store.read_part(model, name, len(array) - 1), array[-1])
    with pytest.raises(ValueError, match=f"{CHAIR}/b2 has no g/scalar"):
        store.read(Model(CHAIR, "b2"), "g/scalar")
    with pytest.raises(IndexError, match="has 5 parts, got 5"):
        store.read_part(store.models[0], "g/fortran", 5)


def test_arrays_are_read_only_views_of_shared_pages(folder):
    store = Store(folder)
    found = store.read(store.models[0], "g/long")
    assert found.base is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0
    assert len(pickle.dumps(store)) < 1000  # a place, not the arrays
    again = pickle.loads(pickle.dumps(store)).read(store.models[0], "g/long")
    assert np.array_equal(again, found)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_what_is_read_is_never_a_private_page(folder):
    store = Store(folder)
    assert store.read(store.models[0], "g/long").sum() > 0
    private, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith("g.long.bin")
        elif inside and line.startswith(("Private_Dirty", "Anonymous", "Swap:")):
            private += int(line.split()[1])
    assert private == 0


def test_a_changed_byte_is_named_when_it_is_first_read(folder):
    path, changed = folder / "g.long.bin", Model(CHAIR, "b2")
    place = int(Store(folder)._entries["g/long"].starts[1]) + CHUNK + 5
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    store = Store(folder)
    store.read(Model(CHAIR, "a1"), "g/long")
    store.read_part(changed, "g/long", 0)  # under another checksum
    with pytest.raises(
        FileError, match=rf"g\.long\.bin: item {CHAIR}/b2, g/long: the checksum of bytes \d+ to \d+ diff"
    ):
        store.read(changed, "g/long")
    with pytest.raises(FileError, match="b2, g/long"):
        store.read_part(changed, "g/long", CHUNK // 24 + 1)
    (problem,) = store.check()
    assert (problem.item, Path(problem.file).name) == (f"{CHAIR}/b2", "g.long.bin")
    assert len(Store(folder, verify=False).read(changed, "g/long")) == 20_012


def edit(key: str, value) -> object:
    def change(folder: Path) -> None:
        head = json.loads((folder / "index.json").read_text())
        head[key] = value
        (folder / "index.json").write_text(json.dumps(head))

    return change


def forge_shape(folder: Path) -> None:
    """An index that hangs together by its hash but claims an array of 2^62 rows."""
    from vision3dgen.datasets.manifest import sha256
    from vision3dgen.io import load_npz, save_npz

    known = load_npz(folder / "index.npz")
    known["shapes_0"][0] = 2**62
    save_npz(folder / "index.npz", **known)
    edit("sha256", sha256(folder / "index.npz"))(folder)


def forge_dtype(folder: Path) -> None:
    head = json.loads((folder / "index.json").read_text())
    head["arrays"]["g/long"]["dtype"] = "O"
    (folder / "index.json").write_text(json.dumps(head))


def forge_file(folder: Path) -> None:
    head = json.loads((folder / "index.json").read_text())
    head["arrays"]["g/long"]["file"] = "../../etc/passwd"
    (folder / "index.json").write_text(json.dumps(head))


def cut(name: str, length: int) -> object:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


BAD = {
    "another version": (edit("version", 2), r"index\.json: version 2, this library reads 1; pack the data again"),
    "another format": (edit("format", "x"), r"index\.json: not the index of a packed store"),
    "changed index": (edit("sha256", "0"), r"index\.npz: its sha256 differs from index\.json"),
    "cut index": (cut("index.npz", 100), r"index\.npz: its sha256 differs"),
    "cut head": (cut("index.json", 30), r"index\.json: not JSON"),
    "no head": (lambda folder: (folder / "index.json").unlink(), "never finished: no index.json"),
    "no index": (lambda folder: (folder / "index.npz").unlink(), r"index\.npz: missing"),
    "cut array": (cut("g.long.bin", 4000), r"g\.long\.bin: 4000 bytes, the index says \d+ bytes"),
    "array gone": (lambda folder: (folder / "g.long.bin").unlink(), r"g\.long\.bin: missing"),
    "forged shape": (forge_shape, "is no array in a store"),
    "forged dtype": (forge_dtype, "g/long: dtype 'O'; known are b1, u1"),
    "forged file": (forge_file, r"must not contain '\.\.'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_store_is_not_opened(folder, case):
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Store(folder)


def write_all(folder: Path, items: list) -> None:
    with write_store(folder, "train") as writer:
        for model, given in items:
            writer.add(model, given)


@pytest.mark.parametrize(
    "model, given, message",
    [
        (Model(CHAIR, "new"), {"g/long": np.zeros((3, 3), np.float32)}, "g/long is float32 .* before it is float64"),
        (Model(CHAIR, "new"), {"g/long": np.zeros(3)}, r"g/long is float64 \(3,\), in the items before"),
        (Model(CHAIR, "new"), {"h/x": np.array(["text"])}, "h/x is <U4; stored are b1"),
        (Model(CHAIR, "new"), {"h/x": np.array([{}], object)}, "h/x is object"),
        (Model(CHAIR, "old"), {}, "every id must come once"),
        (Model(CHAIR, ""), {}, "an id must not be empty"),
        (Model(CHAIR, "../x"), {}, r"must not contain '\.\.'"),
        (Model("/etc", "x"), {}, "must be relative"),
    ],
)
def test_what_cannot_be_stored_leaves_nothing(tmp_path, model, given, message):
    items = [(Model(CHAIR, "old"), {"g/long": np.zeros((5, 3))}), (model, given)]
    with pytest.raises(ValueError, match=message):
        write_all(tmp_path / "train", items)
    assert list(tmp_path.iterdir()) == []


def write_and_hang(folder: str) -> None:
    with write_store(folder, "train") as writer:
        writer.add(Model(CHAIR, "a1"), {"g/long": np.zeros((5, 3))})
        Path(f"{folder}.ready").touch()
        time.sleep(600)


def test_a_killed_writer_leaves_no_store(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_and_hang, args=(str(tmp_path / "train"),))
    process.start()
    while not (tmp_path / "train.ready").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "train").exists()
    (left,) = tmp_path.glob(".tmp-*")
    with pytest.raises(ValueError, match="never finished"):
        Store(left)
    with pytest.raises(ValueError, match="no split '' in this store; it has none"):
        open_layout(tmp_path, "packed")
    write_all(tmp_path / "train", [(Model(CHAIR, "a1"), {})])
    with pytest.raises(ValueError, match="is there already"):
        write_all(tmp_path / "train", [])


# --------------------------------------------------------------------------------------------------- as a dataset


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    make_shapenet(root / "in")
    pack(root / "in", root / "store", manifest="r2n2")
    return root


def test_an_empty_split(packed):
    with pytest.raises(ValueError, match=r"no split 'val' in this store; it has \['test', 'train'\]"):
        Shapes(packed / "store", "val", fields=FIELDS)
    with pytest.raises(ValueError, match="r2n2 puts no model"):
        Shapes(packed / "in", "val", fields=FIELDS, manifest="r2n2")
    assert len(Shapes(packed / "store", "all", fields=FIELDS)) == 9


def test_pictures_kept_at_a_size(packed):
    pack(packed / "in", packed / "small", image_size=5, background=(0.0, 0.5, 1.0))
    options = {"fields": ("image", "depth", "normals", "mask", "camera"), "background": (0.0, 0.5, 1.0)}
    small, large = Shapes(packed / "small", "all", **options), Shapes(packed / "in", "all", image_size=5, **options)
    for index in range(len(large)):
        a, b = small[index], large[index]
        for key in ("image", "depth", "normals", "mask"):
            assert torch.equal(a[key], b[key]), key
        assert torch.equal(a["camera"].intrinsics, b["camera"].intrinsics)
    with pytest.raises(ValueError, match="packed at image_size=5, asked for 7"):
        Shapes(packed / "small", "all", image_size=7, **options)
    with pytest.raises(ValueError, match=r"packed over background=\[0.0, 0.5, 1.0\], asked for \[1.0, 1.0, 1.0\]"):
        Shapes(packed / "small", "all", fields=("image",))
    with pytest.raises(ValueError, match=r"packed with the split 'onet', not 'r2n2'|packed with the split"):
        Shapes(packed / "small", "train", fields=("mesh",), manifest="random(1)")


def test_the_mask_of_the_alpha_is_kept(packed, tmp_path):
    shutil.copytree(packed / "in" / "ShapeNetRendering", tmp_path / "in" / "ShapeNetRendering")
    pack(tmp_path / "in", tmp_path / "store", image_size=5)
    small, large = (Shapes(tmp_path / place, "train", fields=("mask",), image_size=5) for place in ("store", "in"))
    for index in range(len(large)):
        assert torch.equal(small[index]["mask"], large[index]["mask"])
    pack(tmp_path / "store", tmp_path / "again")
    assert torch.equal(Shapes(tmp_path / "again", "train", fields=("mask",))[0]["mask"], large[0]["mask"])


def test_workers_read_what_one_process_reads(packed):
    def batches(workers: int) -> list:
        data = Shapes(packed / "store", "train", fields=FIELDS, points_per_item=5, surface_points=3, views="random")
        loader = make_loader(Data(data, 1, list, workers), ShuffleSampler(len(data), 3, 1))
        return [item for _, (item,) in zip(range(5), loader)]

    alone, shared = batches(0), batches(2)
    for a, b in zip(alone, shared):
        assert a["id"] == b["id"]
        assert torch.equal(a["points"], b["points"])
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["surface"].points_packed(), b["surface"].points_packed())
    assert len({tuple(item["points"].flatten().tolist()) for item in alone}) == 5  # epochs differ


def test_a_store_of_a_store_and_the_number_of_workers(packed, tmp_path):
    pack(packed / "store", tmp_path / "again", workers=2)
    pack(packed / "in", tmp_path / "two", manifest="r2n2", workers=2)
    for other in ("again", "two"):
        for path in sorted((packed / "store").rglob("*.bin")):
            assert path.read_bytes() == (tmp_path / other / path.relative_to(packed / "store")).read_bytes()


def test_the_command_line_and_doctor(packed, tmp_path, capsys):
    assert cli.main(["pack", str(packed / "in"), str(tmp_path / "s"), "--fields", "points", "surface"]) == 0
    assert "2 train, 1 test" in capsys.readouterr().out
    assert cli.main(["unpack", str(tmp_path / "s"), str(tmp_path / "onet"), "--layout", "onet"]) == 0
    assert cli.main(["pack", str(packed / "in"), str(tmp_path / "s")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert is_sound(examine_folder(tmp_path / "s"))
    assert is_sound(examine_folder(tmp_path / "onet"))
    path = tmp_path / "s" / "train" / "points.points.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    broken = {finding.name: finding.message for finding in examine_folder(tmp_path / "s") if finding.verdict == "fail"}
    assert "points" in broken  # and the surface, whose frame is that of the points
    assert all(f"item {CHAIR}/b2, points/points: the checksum" in message for message in broken.values())
    (tmp_path / "in").mkdir()
    shutil.copytree(packed / "in", tmp_path / "in", dirs_exist_ok=True)
    (tmp_path / "in" / "ShapeNet" / CHAIR / "a1" / "points.npz").write_bytes(b"x")
    assert cli.main(["pack", str(tmp_path / "in"), str(tmp_path / "t"), "--skip-broken"]) == 1
    assert json.loads((tmp_path / "t" / "rejected.json").read_text())[0]["item"] == f"{CHAIR}/a1"
    assert sum(unpack(tmp_path / "t", tmp_path / "whole", "onet").counts.values()) == 2


def test_unpack_into_what_is_not_empty(packed, tmp_path):
    make_onet(tmp_path / "onet")
    with pytest.raises(ValueError, match="is not empty"):
        unpack(packed / "store", tmp_path / "onet", "onet")
    with pytest.raises(ValueError, match="written by pack"):
        unpack(packed / "store", tmp_path / "x", "packed")
