"""Layouts of shapes: each read from files written as their systems publish them, and every array equal after a round
trip through the packed store."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision3dgen.datasets import LAYOUTS, Shapes, find_layout, open_layout, pack, unpack
from vision3dgen.datasets.shape_items import Model
from vision3dgen.structures import Camera, Frame

CHAIR = "03001627"
MODELS = ("a1", "b2", "größe")
FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
VERTS = np.array([[0, 0, 0], [0.25, 0, 0], [0, 0.5, 0], [0, 0, 0.25]], np.float32)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def binvox(path: Path, filled: np.ndarray) -> None:
    """Voxels (z, y, x) as the format has them: run lengths, x slowest, then z, then y."""
    flat = filled.transpose(2, 0, 1).reshape(-1)
    body = b"".join(bytes([int(value), 1]) for value in flat)
    path.write_bytes(b"#binvox 1\ndim 5 5 5\ntranslate 0 0 0\nscale 0.5\ndata\n" + body)


def obj(path: Path) -> None:
    lines = [f"v {x} {y} {z}" for x, y, z in VERTS.tolist()] + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in FACES]
    path.write_text("\n".join(lines) + "\n")


def picture(path: Path, channels: int = 4, seed: int = 0, size: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((numbers(size, size, channels, seed=seed) * 255).astype(np.uint8)).save(path)


def onet_samples(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    where = {"loc": np.array([0.125, 0.25, 0.125]), "scale": np.array(0.5)}
    points = (numbers(19, 3, seed=seed) - 0.5).astype(np.float16)
    inside = np.packbits(points[:, 0] > 0)
    np.savez(folder / "points.npz", points=points, occupancies=inside, **where)
    np.savez(folder / "pointcloud.npz", points=points[:17], normals=points[:17], **where)


def make_shapenet(root: Path, core: str = "ShapeNetCore.v2", mesh: str = "models/model_normalized.obj") -> None:
    for seed, model in enumerate(MODELS):
        file = root / core / CHAIR / model / mesh
        file.parent.mkdir(parents=True)
        obj(file)
        onet_samples(root / "ShapeNet" / CHAIR / model, seed)
        voxels = root / "ShapeNetVox32" / CHAIR / model
        voxels.mkdir(parents=True)
        binvox(voxels / "model.binvox", numbers(5, 5, 5, seed=seed) > 0.5)
        rendering = root / "ShapeNetRendering" / CHAIR / model / "rendering"
        geometry = root / "ShapeNetGeometry" / CHAIR / model
        geometry.mkdir(parents=True)
        for view in range(3):
            picture(rendering / f"{view:02d}.png", 4, seed + view)
            picture(geometry / f"{view:02d}_normals.png", 3, seed + view)
            depth = (numbers(7, 7, seed=seed + view) * 60000).astype(np.uint16)
            Image.fromarray(depth).save(geometry / f"{view:02d}_depth.png")
            Image.fromarray((depth > 30000).astype(np.uint8) * 255).save(geometry / f"{view:02d}_mask.png")
        (rendering / "renderings.txt").write_text("00.png\n01.png\n02.png\n")
        lines = [f"{10.5 * view + seed} 27.25 0 0.8 25\n" for view in range(3)]
        (rendering / "rendering_metadata.txt").write_text("".join(lines))
        np.savez(
            geometry / "distances.npz",
            distances=numbers(19, seed=seed).astype(np.float32) - 0.5,
            near_points=numbers(13, 3, seed=seed).astype(np.float16),
            near_distances=numbers(13, seed=seed).astype(np.float32) - 0.5,
            loc=np.zeros(3),
            scale=np.array(1.0),
        )


def make_onet(root: Path) -> None:
    for seed, model in enumerate(MODELS):
        folder = root / CHAIR / model
        onet_samples(folder, seed)
        binvox(folder / "model.binvox", numbers(5, 5, 5, seed=seed) > 0.5)
        cameras = {}
        for view in range(3):
            path = folder / "img_choy2016" / f"{view:03d}.jpg"
            picture(path, 3, seed + view)
            camera = Camera.from_r2n2(30 * view + seed, 26, 0.75, 7)
            world = torch.cat([camera.rotation, camera.translation[:, None]], 1)
            cameras |= {f"world_mat_{view}": world.numpy(), f"camera_mat_{view}": camera.intrinsics.numpy()}
        np.savez(folder / "img_choy2016" / "cameras.npz", **cameras)
    for split, ids in (("train", "b2\na1"), ("val", ""), ("test", "größe")):
        (root / CHAIR / f"{split}.lst").write_text(ids, encoding="utf-8")  # without a newline at the end


def make_rooms(root: Path) -> None:
    for seed, scene in enumerate(MODELS):
        for number in range(2):
            points = numbers(16, 3, seed=seed * 7 + number).astype(np.float32) - 0.5
            for folder, arrays in (
                ("points_iou", {"points": points, "occupancies": np.packbits(points[:, 0] > 0), "z_scale": np.ones(1)}),
                ("pointcloud", {"points": points[:11], "normals": points[:11]}),
            ):
                path = root / "rooms_04" / scene / folder / f"{folder}_{number:02d}.npz"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, **arrays)
    for split, ids in (("train", "a1"), ("val", "b2"), ("test", "größe")):
        (root / "rooms_04" / f"{split}.lst").write_text(ids, encoding="utf-8")


def make_meshrcnn(root: Path) -> None:
    projection = [[2.1875, 0, 0, 0], [0, 2.1875, 0, 0], [0, 0, -1.002002, -0.2002002], [0, 0, -1, 0]]
    for seed, model in enumerate(MODELS):
        folder = root / CHAIR / model
        folder.mkdir(parents=True)
        names = [f"{view:02d}.png" for view in range(3)]
        views = [Camera.from_r2n2(30 * view + seed, 26, 0.75, 7).to_opengl().view.float() for view in range(3)]
        metadata = {"image_list": names, "intrinsic": torch.tensor(projection), "extrinsics": torch.stack(views)}
        torch.save(metadata, folder / "metadata.pt")
        torch.save({"verts": torch.from_numpy(VERTS), "faces": torch.from_numpy(FACES)}, folder / "mesh.pt")
        torch.save({"voxel_coords": torch.rand(5, 3)}, folder / "voxels.pt")
        torch.save({"points_sampled": torch.rand(23, 3), "normals_sampled": torch.rand(23, 3)}, folder / "samples.pt")
        for view, name in enumerate(names):
            picture(folder / "images" / name, 4, seed + view)
        (folder / "vox5").mkdir()
        for view in range(3):
            torch.save((torch.rand(5, 5, 5) > 0.5).byte(), folder / "vox5" / f"{view:03d}.pt")
    (root / "summary.json").write_text(json.dumps({CHAIR: dict.fromkeys(MODELS, 3)}))
    split = {"train": {CHAIR: {"a1": [0, 1], "b2": [0, 1, 2]}}, "val": {}, "test": {CHAIR: {"a1": [2], "größe": [1]}}}
    (root / "pix2mesh_splits_val05.json").write_text(json.dumps(split))


def make_atlasnet(root: Path) -> None:
    for seed, model in enumerate(MODELS):
        folder = root / "ShapeNetV1PointCloud" / CHAIR
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{model}.points.ply.npy", numbers(29, 7, seed=seed).astype(np.float32))
        for view in range(2):
            picture(root / "ShapeNetV1Renderings" / CHAIR / model / "rendering" / f"{view:02d}.png", 4, seed + view)
    taxonomy = [{"synsetId": CHAIR, "name": "chair"}]
    (root / "ShapeNetV1PointCloud" / "taxonomy.json").write_text(json.dumps(taxonomy))


def make_modelnet(root: Path) -> None:
    for part, names in (("train", MODELS[:2]), ("test", MODELS[2:])):
        for name in names:
            path = root / "chair" / part / f"{name}.off"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [" ".join(map(str, row)) for row in VERTS.tolist()] + [f"3 {a} {b} {c}" for a, b, c in FACES]
            path.write_text("OFF4 4 0\n" + "\n".join(rows) + "\n")  # ModelNet40's glued header


def ply(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ["ply", "format ascii 1.0", "element vertex 31", *(f"property float {axis}" for axis in "xyz"), "end_header"]
    rows = [" ".join(map(repr, row)) for row in numbers(31, 3, seed=seed).astype(np.float32).tolist()]
    path.write_text("\n".join([*head, *rows]) + "\n")


def make_what3d(root: Path) -> None:
    for seed, model in enumerate(MODELS):
        for view in range(2):
            ply(root / "points" / "chair" / model / f"{view}.ply", seed * 3 + view)
    for split, ids in (("train", "a1\nb2\n"), ("val", ""), ("test", "größe\n")):
        path = root / "lists" / "chair" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ids, encoding="utf-8")
    (root / "classes.txt").write_text("chair\n")


def make_ply(root: Path) -> None:
    for seed, model in enumerate(MODELS):
        ply(root / "chair" / f"{model}.ply", seed)


def make_deepsdf(root: Path) -> None:
    for seed, model in enumerate(MODELS):
        for folder, arrays in (
            ("SdfSamples", {"pos": numbers(37, 4, seed=seed), "neg": -numbers(31, 4, seed=seed)}),
            ("NormalizationParameters", {"offset": -numbers(3, seed=seed), "scale": np.array(1.7)}),
        ):
            path = root / folder / "ShapeNetV2" / CHAIR / f"{model}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **{key: array.astype(np.float32) for key, array in arrays.items()})
        ply(root / "SurfaceSamples" / "ShapeNetV2" / CHAIR / f"{model}.ply", seed)
    for split, ids in (("train", ["a1", "b2"]), ("test", ["größe"])):
        (root / f"splits_{split}.json").write_text(json.dumps({"ShapeNetV2": {CHAIR: ids}}))


MAKE: dict[str, Callable[[Path], None]] = {
    "shapenet": make_shapenet,
    "onet": make_onet,
    "convonet_rooms": make_rooms,
    "meshrcnn": make_meshrcnn,
    "atlasnet": make_atlasnet,
    "modelnet": make_modelnet,
    "what3d": make_what3d,
    "ply": make_ply,
    "deepsdf": make_deepsdf,
}


def arrays_of(root: Path) -> dict[str, np.ndarray]:
    layout = open_layout(root)
    models = [Model(category, name) for category, names in layout.members().items() for name in names]
    return {
        f"{model} {field} {key}": array
        for model in models
        for field in layout.fields
        if layout.has(model, field)
        for key, array in layout.read(model, field).items()
    }


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        assert np.array_equal(array, b[name]), name


@pytest.mark.parametrize("name", MAKE)
def test_every_array_is_equal_after_the_store_and_back(tmp_path, name):
    MAKE[name](tmp_path / "in")
    assert find_layout(tmp_path / "in") == name
    before = arrays_of(tmp_path / "in")
    assert len({key.split()[0] for key in before}) == (6 if name == "what3d" else 3)
    done = pack(tmp_path / "in", tmp_path / "store")
    assert find_layout(tmp_path / "store") == "packed"
    assert_equal(before, arrays_of(tmp_path / "store"))
    back = unpack(tmp_path / "store", tmp_path / "out", name)
    assert (back.counts, back.left_out) == (done.counts, [])
    assert find_layout(tmp_path / "out") == name
    assert_equal(before, arrays_of(tmp_path / "out"))
    again = [open_layout(tmp_path / place).manifest() for place in ("store", "out")]
    own = open_layout(tmp_path / "in").manifest()
    for manifest in again:
        assert manifest is None or own is None or manifest.sha256 == own.sha256


def test_every_layout_is_tried():
    assert {*MAKE, "packed"} == set(LAYOUTS)


@pytest.mark.parametrize("name", MAKE)
def test_items_of_the_store_are_those_of_the_folder(tmp_path, name):
    MAKE[name](tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "store")
    fields = {f for f in LAYOUTS[name](tmp_path / "in").fields if f not in ("sdf", "coords", "view_voxels")}
    if name == "atlasnet":
        fields |= {"cloud"}
    more = {"voxel_placement": "cube", "points_per_item": 5, "cloud": None} if "points" in fields else {}
    options = {"fields": sorted(fields - {"cloud"}), "image_size": 5 if "image" in fields else None, "seed": 3, **more}
    for split in ("train", "test"):
        folder, store = (Shapes(tmp_path / place, split, **options) for place in ("in", "store"))
        assert len(folder) == len(store) > 0
        assert (folder.split_name, folder.split_sha256) == (store.split_name, store.split_sha256)
        for index in range(len(folder)):
            a, b = folder[index], store[index]
            assert a.keys() == b.keys()
            for key, value in a.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, b[key]), key
                elif key == "surface":
                    assert torch.equal(value.points_packed(), b[key].points_packed())
                elif key == "mesh":
                    assert torch.equal(value.verts_packed(), b[key].verts_packed())
                elif key == "camera":
                    assert torch.equal(value.rotation, b[key].rotation)
                    assert torch.equal(value.intrinsics, b[key].intrinsics)
                else:
                    assert value == b[key], key


def test_shapenet_core_v1(tmp_path):
    make_shapenet(tmp_path, "ShapeNetCore.v1", "model.obj")
    item = Shapes(tmp_path, "all", fields=("mesh", "points"))[0]
    assert torch.equal(item["frame"].denormalize(item["mesh"].verts_packed()), torch.from_numpy(VERTS))


def test_what_is_in_the_files_coordinates_is_brought_into_the_frame(tmp_path):
    make_meshrcnn(tmp_path)
    data = Shapes(tmp_path, "train", fields=("mesh", "surface", "image", "camera"))
    assert [item["id"] for item in data] == [f"{CHAIR}/a1/00", f"{CHAIR}/a1/01"] + [
        f"{CHAIR}/b2/0{i}" for i in range(3)
    ]
    item = data[0]
    assert item["frame"] == Frame("object", (0.125, 0.25, 0.125), 0.5)
    stored = torch.load(tmp_path / CHAIR / "a1" / "samples.pt")["points_sampled"]
    assert torch.allclose(item["surface"].points_packed(), (stored - torch.tensor([0.125, 0.25, 0.125])) / 0.5)
    expected = Camera.from_r2n2(0, 26, 0.75, 7)
    assert torch.allclose(item["camera"].rotation.double(), expected.rotation, atol=1e-6)
    assert torch.allclose(item["camera"].intrinsics.double(), expected.intrinsics, atol=1e-6)
    mask = Shapes(tmp_path, "train", fields=("mask",))[0]["mask"]  # the picture's alpha
    alpha = np.array(Image.open(tmp_path / CHAIR / "a1" / "images" / "00.png"))[..., 3]
    assert torch.equal(mask, torch.from_numpy(alpha > 127).float()[None])


def test_rooms_draw_from_all_their_files(tmp_path):
    make_rooms(tmp_path)
    item = Shapes(tmp_path, "train", fields=("points", "surface"))[0]
    assert item["points"].shape == (32, 3)
    assert item["surface"].num_points_per_cloud().tolist() == [22]
    assert torch.equal(item["occupancies"], (item["points"][:, 0] > 0).float())
    assert item["frame"] == Frame("object")


def test_other_layouts_from_one(tmp_path):
    make_shapenet(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "store", manifest="random(5)")
    assert unpack(tmp_path / "store", tmp_path / "onet", "onet").left_out == ["depth", "mask", "mesh", "normals"]
    mine, theirs = open_layout(tmp_path / "in"), open_layout(tmp_path / "onet")
    model = Model(CHAIR, "b2")
    for field in ("points", "surface", "voxels", "image"):
        assert_equal(dict(mine.read(model, field)), dict(theirs.read(model, field)))
    cameras = [Shapes(tmp_path / place, "all", fields=("camera",))[4]["camera"] for place in ("in", "onet")]
    assert torch.equal(cameras[0].rotation, cameras[1].rotation)

    unpack(tmp_path / "in", tmp_path / "deepsdf", "deepsdf")
    sdf, made = mine.read(model, "sdf"), open_layout(tmp_path / "deepsdf").read(model, "sdf")
    assert len(made["pos"]) + len(made["neg"]) == 19 + 13
    assert (made["pos"][:, 3] >= 0).all()
    assert (made["neg"][:, 3] < 0).all()
    assert np.isclose(
        np.sort(np.concatenate([made["pos"], made["neg"]])[:, 3]).sum(),
        sdf["distances"].sum() + sdf["near_distances"].sum(),
    )
    make_modelnet(tmp_path / "modelnet")
    with pytest.raises(ValueError, match="has no 'sdf', which this layout consists of"):
        unpack(tmp_path / "modelnet", tmp_path / "no", "deepsdf")


BAD = {  # layout, what is done to it, what the error says
    "npz bomb": ("onet", "a1/points.npz", lambda p: bomb(p), r"points\.npz: array 'points' claims shape"),
    "cut npz": ("onet", "a1/points.npz", lambda p: p.write_bytes(p.read_bytes()[:90]), r"points\.npz: not an npz file"),
    "other dtype": (
        "onet",
        "a1/pointcloud.npz",
        lambda p: np.savez(p, points=np.array([["a", "b", "c"]])),
        r"pointcloud\.npz: points must be numbers, got <U1",
    ),
    "no world_mat": (
        "onet",
        "a1/img_choy2016/cameras.npz",
        lambda p: np.savez(p, world_mat_0=np.zeros((3, 4)), camera_mat_0=np.eye(3)),
        r"cameras\.npz: no world_mat_1",
    ),
    "an id twice": ("onet", "train.lst", lambda p: p.write_text("a1\na1"), r"train\.lst: 'a1' comes twice"),
    "in two splits": ("onet", "val.lst", lambda p: p.write_text("a1"), r"val\.lst: 'a1' is in 'train' too"),
    "leaves the folder": ("onet", "val.lst", lambda p: p.write_text("../x"), r"val\.lst: .*must not contain '\.\.'"),
    "absolute": ("onet", "val.lst", lambda p: p.write_text("/etc"), r"val\.lst: .*must be relative"),
    "pickled code": (
        "meshrcnn",
        "a1/mesh.pt",
        lambda p: torch.save(Path("x"), p),
        r"mesh\.pt: not a file of torch\.save",
    ),
    "cut pt": (
        "meshrcnn",
        "a1/mesh.pt",
        lambda p: p.write_bytes(p.read_bytes()[:90]),
        r"mesh\.pt: not a file of torch",
    ),
    "no faces": (
        "meshrcnn",
        "a1/mesh.pt",
        lambda p: torch.save({"verts": torch.rand(3, 3)}, p),
        r"mesh\.pt: no 'faces'; it has \['verts'\]",
    ),
    "faces out of range": (
        "meshrcnn",
        "a1/mesh.pt",
        lambda p: torch.save({"verts": torch.rand(3, 3), "faces": torch.tensor([[0, 1, 9]])}, p),
        r"mesh\.pt: faces point at 0 to 9 of 3 vertices",
    ),
    "a picture gone": ("meshrcnn", "a1/images/01.png", lambda p: p.unlink(), r"01\.png"),
    "views not there": (
        "meshrcnn",
        "../pix2mesh_splits_val05.json",
        lambda p: p.write_text(json.dumps({"train": {CHAIR: {"a1": ["0"]}}, "val": {}, "test": {}})),
        r"train\.03001627\.a1 must be a list of view numbers",
    ),
}


def bomb(path: Path) -> None:
    """A header that claims 8 TB."""
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("points.npy", header.getvalue() + b"\0" * 64)


@pytest.mark.parametrize("case", BAD)
def test_what_is_broken_is_named_and_can_be_left_out(tmp_path, case):
    name, file, damage, message = BAD[case]
    MAKE[name](tmp_path / "in")
    path = (tmp_path / "in" / CHAIR / file).resolve()
    damage(path)
    with pytest.raises((ValueError, OSError), match=message):
        pack(tmp_path / "in", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".tmp*"))
    if path.parent.name == CHAIR or path.suffix == ".json":
        return  # the split itself
    done = pack(tmp_path / "in", tmp_path / "store", on_error="skip")
    assert [entry["item"] for entry in done.rejected] == [f"{CHAIR}/a1"]
    assert sum(done.counts.values()) == 2


def test_one_id_in_two_places(tmp_path):
    make_modelnet(tmp_path)
    (tmp_path / "chair" / "test" / "a1.off").write_bytes((tmp_path / "chair" / "train" / "a1.off").read_bytes())
    with pytest.raises(ValueError, match="'a1' is in train and in test: two models with one id"):
        open_layout(tmp_path)


def test_check_names_item_and_file(tmp_path):
    make_onet(tmp_path)
    (tmp_path / CHAIR / "a1" / "pointcloud.npz").unlink()
    damaged = tmp_path / CHAIR / "b2" / "points.npz"
    damaged.write_bytes(damaged.read_bytes()[:50])
    data = Shapes(tmp_path, "train", fields=("points",))
    problems = {(problem.item, Path(problem.file).name): problem.required for problem in data.check()}
    assert problems == {
        (f"{CHAIR}/a1", "pointcloud.npz"): False,
        (f"{CHAIR}/b2/00", "points.npz"): True,
    }
    kept = Shapes(tmp_path, "train", fields=("points",), on_error="skip")
    assert [model.id for model, _ in kept.items] == ["a1"]
    assert len(kept.problems) == 1


def test_folders_of_no_layout(tmp_path):
    with pytest.raises(ValueError, match="its layout is none of packed, shapenet"):
        open_layout(tmp_path)
    with pytest.raises(ValueError, match=r"unknown layout 'onett'.*did you mean 'onet'"):
        open_layout(tmp_path, "onett")
    with pytest.raises(ValueError, match="no such folder"):
        open_layout(tmp_path / "x")
    make_ply(tmp_path)
    with pytest.raises(ValueError, match=r"no field 'mesh' in this 'ply'; it has surface"):
        Shapes(tmp_path, "train", fields=("mesh",))
