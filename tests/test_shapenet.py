"""Reading ShapeNet-style folders, ours and others': one shape in every field, and an error for every broken file."""

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vision3dgen.datasets import ShapeNet, collate, prepare_procedural
from vision3dgen.datasets.shapenet import FIELDS
from vision3dgen.io import load_mesh, read_image, save_mesh, save_npz, write_binvox, write_png
from vision3dgen.ops.inside import contains, nearest_faces
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds

CHAIR, TABLE = "03001627", "04379243"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    prepare_procedural(root, shapes_per_category=3, categories=["chair", "table"], views=3, points=600, seed=1)
    return root


@pytest.fixture
def copy(data, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def first_model(root: Path) -> tuple[str, str]:
    model = ShapeNet(root, "train", fields=("points",)).models[0]
    return model.synset, model.id


def same(a, b) -> bool:
    if isinstance(a, Meshes):
        return torch.equal(a.verts_packed(), b.verts_packed()) and torch.equal(a.faces_packed(), b.faces_packed())
    if isinstance(a, Pointclouds):
        normals = [shape.normals_packed() for shape in (a, b)]
        same_normals = normals == [None, None] or torch.equal(*normals)
        return torch.equal(a.points_packed(), b.points_packed()) and same_normals
    if isinstance(a, Camera):
        return torch.equal(a.rotation, b.rotation) and torch.equal(a.intrinsics, b.intrinsics)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ----------------------------------------------------------------------------------------------------------- an item


def test_an_item_has_the_keys_types_and_ranges_of_the_contract(data):
    dataset = ShapeNet(data, "train", fields=FIELDS, points_per_item=50, surface_points=70)
    assert dataset.split_name == "procedural_v1 (version 1)"
    assert len(dataset) == 2 * 3
    item = dataset[1]
    shapes = {key: tuple(value.shape) for key, value in item.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "image": (3, 137, 137),
        "mask": (1, 137, 137),
        "depth": (1, 137, 137),
        "normals": (3, 137, 137),
        "voxels": (32, 32, 32),
        "points": (50, 3),
        "occupancies": (50,),
    }
    assert all(value.dtype == torch.float32 for value in item.values() if isinstance(value, torch.Tensor))
    assert 0 <= item["image"].min() < item["image"].max() == 1
    for key in ("mask", "voxels", "occupancies"):
        assert set(item[key].unique().tolist()) == {0.0, 1.0}
    assert item["surface"].num_points_per_cloud().tolist() == [70]
    assert item["category"] == dataset.models[0].synset
    assert item["id"] == f"{dataset.models[0]}/01"
    assert dataset[-1]["id"] == dataset[5]["id"]
    with pytest.raises(IndexError, match="6 is out of range for 6"):
        dataset[6]


def test_all_fields_of_an_item_are_one_shape(data):
    dataset = ShapeNet(data, "all", fields=FIELDS)
    for index in range(0, len(dataset), 4):
        item = dataset[index]
        mesh, frame, camera = item["mesh"], item["frame"], item["camera"]
        verts, faces = mesh.get_mesh_verts_faces(0)
        low, high = verts.amin(0), verts.amax(0)
        torch.testing.assert_close(low, -high, atol=1e-6, rtol=0)
        assert float((high - low).max()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(contains(mesh, item["points"]), item["occupancies"] > 0.5)
        centers = GridSpec.cube(32).points()
        differ = contains(mesh, centers.view(-1, 3)).view(32, 32, 32) != (item["voxels"] > 0.5)
        assert (nearest_faces(verts, faces, centers[differ]).distances < 1e-6).all()  # on the surface, by rounding
        assert nearest_faces(verts, faces, item["surface"].points_packed()).distances.max() < 5e-4
        # the picture: depth and camera are in the file's coordinates
        file = frame.denormalize(mesh)
        rows, columns = item["mask"][0].nonzero().unbind(1)
        seen = camera.unproject(torch.stack([columns, rows], 1) + 0.5, item["depth"][0][rows, columns])
        assert nearest_faces(*file.get_mesh_verts_faces(0), seen).distances.max() < 1e-4
        assert (item["depth"][item["mask"] == 0] == 0).all()
        length = item["normals"].norm(dim=0)
        torch.testing.assert_close(length, item["mask"][0], atol=1e-5, rtol=0)
        on_white = item["image"].amin(0) > 254.5 / 255
        near = torch.nn.functional.max_pool2d(item["mask"], 3, 1, 1)[0] > 0
        assert on_white[~near].all()


def test_the_mesh_is_the_file_in_the_frame(data):
    item = ShapeNet(data, "train", fields=("mesh",))[0]
    path = data / "ShapeNetCore.v2" / item["id"][:-3] / "models" / "model_normalized.obj"
    torch.testing.assert_close(item["frame"].denormalize(item["mesh"]).verts_packed(), load_mesh(path).verts_packed())
    assert item["frame"].close_to(Frame.longest_edge(load_mesh(path).verts_packed()))


def test_pictures_over_a_background_and_resized(data):
    fields = ("image", "mask", "depth", "normals", "camera")
    white = ShapeNet(data, "train", fields=fields)[0]
    rgba = read_image(data / "ShapeNetRendering" / white["id"][:-3] / "rendering" / "00.png") / 255.0
    expected = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    torch.testing.assert_close(
        white["image"], torch.from_numpy(expected.transpose(2, 0, 1)).float(), atol=0.51 / 255, rtol=0
    )
    red = ShapeNet(data, "train", fields=fields, background=(1.0, 0.0, 0.0))[0]
    assert red["image"][:, 0, 0].tolist() == [1, 0, 0]
    small = ShapeNet(data, "train", fields=fields, image_size=45)[0]
    assert small["image"].shape == (3, 45, 45)
    assert small["camera"].image_size == (45, 45)
    # antialiased: the mean stays; other maps keep values that were there, each at its pixel's place
    torch.testing.assert_close(small["image"].mean((1, 2)), white["image"].mean((1, 2)), atol=3e-3, rtol=0)
    places = (torch.arange(45) + 0.5) * 137 / 45
    nearest = (torch.arange(137)[None] + 0.5 - places[:, None]).abs().argmin(1)
    for name in ("depth", "mask", "normals"):
        assert torch.equal(small[name], white[name][:, nearest[:, None], nearest])
    point = torch.zeros(1, 3)
    pixel = small["camera"].project(point).pixels * 137 / 45
    torch.testing.assert_close(pixel, white["camera"].project(point).pixels)


def test_points_are_drawn_from_seed_epoch_and_index(data):
    dataset = ShapeNet(data, "train", fields=("points", "surface"), points_per_item=100, surface_points=90)
    everything = ShapeNet(data, "train", fields=("points", "surface"))
    first = dataset[0]
    torch.manual_seed(5)
    assert all(same(first[key], dataset[0][key]) for key in first)
    dataset.set_epoch(1)
    later = dataset[0]
    assert not same(first["points"], later["points"])
    assert not same(first["surface"], later["surface"])
    dataset.set_epoch(0)
    assert all(same(first[key], dataset[0][key]) for key in first)
    other = ShapeNet(data, "train", fields=("points", "surface"), points_per_item=100, surface_points=90, seed=1)
    assert not same(first["points"], other[0]["points"])
    # without replacement, each with its own label and normal
    rows = torch.cdist(first["points"].double(), everything[0]["points"].double()).argmin(1)
    assert len(rows.unique()) == 100
    assert torch.equal(everything[0]["points"][rows], first["points"])
    assert torch.equal(everything[0]["occupancies"][rows], first["occupancies"])


@pytest.mark.parametrize("views, expected", [("all", ["00", "01", "02"]), ("first", ["00"]), (2, ["00", "01"])])
def test_views(data, views, expected):
    dataset = ShapeNet(data, "test", categories=["chair"], fields=("camera",), views=views)
    assert [dataset[i]["id"][-2:] for i in range(len(dataset))] == expected


def test_random_views_follow_seed_and_epoch(data):
    dataset = ShapeNet(data, "all", fields=("camera",), views="random")
    assert len(dataset) == 6
    drawn = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        drawn.append([dataset[i]["id"] for i in range(6)])
        assert drawn[-1] == [dataset[i]["id"] for i in range(6)]
    assert len({identifier for ids in drawn for identifier in ids}) > 6


def test_without_a_picture_there_is_one_item_per_model(data):
    dataset = ShapeNet(data, "all", fields=("voxels",))
    assert len(dataset) == 6
    assert sorted(dataset[0]) == ["category", "frame", "id", "voxels"]


def test_cached_and_pickled_items_are_the_same(data):
    plain = ShapeNet(data, "train", fields=FIELDS, points_per_item=40)
    cached = ShapeNet(data, "train", fields=FIELDS, points_per_item=40, cache=True)
    for _ in range(2):
        for key, value in plain[3].items():
            assert same(value, cached[3][key])
    again = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 20_000  # without what it holds in memory
    for key, value in pickle.loads(pickle.dumps(again[3])).items():
        assert same(value, plain[3][key])


def test_cached_items_cannot_be_damaged_by_their_user(data):
    dataset = ShapeNet(data, "train", fields=FIELDS, cache=True)
    before = dataset[0]
    kept = {key: value.clone() for key, value in before.items() if isinstance(value, torch.Tensor)}
    for key in kept:
        before[key].zero_()
    assert all(torch.equal(dataset[0][key], value) for key, value in kept.items())


def test_spawned_workers_give_the_same_batches(data):
    dataset = ShapeNet(data, "test", fields=("image", "camera", "points", "surface", "mesh"), points_per_item=32)
    loader = DataLoader(dataset, 3, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    for start, batch in zip((0, 3), loader, strict=True):
        expected = collate([dataset[i] for i in range(start, start + 3)])
        assert all(same(value, batch[key]) for key, value in expected.items())


# ------------------------------------------------------------------------------------------------------------ batches


def test_collate_joins_ragged_items(data):
    dataset = ShapeNet(data, "all", fields=FIELDS, points_per_item=16, views="first")
    items = [dataset[i] for i in range(len(dataset))]
    batch = collate(items)
    assert batch["image"].shape == (6, 3, 137, 137)
    assert batch["camera"].rotation.shape == (6, 3, 3)
    assert len(batch["mesh"]) == len(batch["surface"]) == 6
    assert not batch["mesh"].equisized
    for index, item in enumerate(items):
        assert torch.equal(batch["mesh"][index].verts_packed(), item["mesh"].verts_packed())
        assert batch["frame"][index] is item["frame"]
    assert batch["category"] == [CHAIR] * 3 + [TABLE] * 3
    assert batch["id"] == [item["id"] for item in items]


def test_collate_keeps_empty_clouds():
    items = [{"id": str(n), "surface": Pointclouds([torch.ones(n, 3)])} for n in (0, 7, 2)]
    assert collate(items)["surface"].num_points_per_cloud().tolist() == [0, 7, 2]


def test_collate_keeps_photographs_and_their_boxes_apart():
    items = [
        {"id": str(n), "image": torch.rand(3, 5, 4 + n), "boxes": torch.rand(n, 4), "labels": torch.arange(n)}
        for n in range(3)
    ]
    batch = collate(items)
    for key in ("image", "boxes", "labels"):
        for value, item in zip(batch[key], items, strict=True):
            torch.testing.assert_close(value, item[key])
    assert collate(items[1:2] * 2)["image"].shape == (2, 3, 5, 5)


def test_collate_names_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one item"):
        collate([])
    with pytest.raises(ValueError, match=r"items 'b' and 'a' do not have the same keys: \['x'\]"):
        collate([{"id": "a"}, {"id": "b", "x": 1}])
    with pytest.raises(ValueError, match=r"x of 'b' is \(3,\), of 'a' \(2,\)"):
        collate([{"id": "a", "x": torch.ones(2)}, {"id": "b", "x": torch.ones(3)}])


# ----------------------------------------------------------------------------------------- folders made by others


def tetrahedron(shift: float = 0.0) -> Meshes:
    verts = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 1]]) * 0.3 + shift
    return Meshes([verts], [torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])])


def picture(path: Path, size: int = 137) -> None:
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[20:40, 30:50] = (0, 0, 255, 255)
    write_png(path, rgba)


@pytest.fixture
def others(tmp_path) -> Path:
    """ShapeNetCore v1 and 3D-R2N2's renderings and voxels, no manifest: seven chairs, two views."""
    for number in range(7):
        core = tmp_path / "ShapeNetCore.v1" / CHAIR / f"m{number}"
        core.mkdir(parents=True)
        save_mesh(core / "model.obj", tetrahedron())
        rendering = tmp_path / "ShapeNetRendering" / CHAIR / f"m{number}" / "rendering"
        rendering.mkdir(parents=True)
        picture(rendering / "00.png")
        picture(rendering / "01.png")
        (rendering / "renderings.txt").write_text("00.png\n01.png\n")
        (rendering / "rendering_metadata.txt").write_text(f"{number} 25.5 0 0.8 25\n200.5 29 0 0.7 25\n")
        voxels = torch.zeros(32, 32, 32, dtype=torch.bool)
        voxels[3, 5, 9] = True
        folder = tmp_path / "ShapeNetVox32" / CHAIR / f"m{number}"
        folder.mkdir(parents=True)
        # the tetrahedron's box is [0, .3] x [0, .6] x [0, .3]: longest edge 0.6, center (.15, .3, .15)
        write_binvox(folder / "model.binvox", voxels, (-0.15, 0.0, -0.15), 0.6)
    return tmp_path


R2N2 = ("image", "mask", "camera", "voxels", "mesh")


def test_r2n2_folders_without_a_manifest(others):
    train, test = (ShapeNet(others, split, fields=R2N2) for split in ("train", "test"))
    assert train.split_name == test.split_name == "3D-R2N2's rule (sorted, 80 % train, 20 % test)"
    assert [model.id for model in train.models] == ["m0", "m1", "m2", "m3", "m4"]
    assert [model.id for model in test.models] == ["m5", "m6"]
    assert len(ShapeNet(others, "all", fields=R2N2)) == 14
    item = train[3]
    assert item["frame"].close_to(Frame("object", (0.15, 0.3, 0.15), 0.6))
    assert item["voxels"].nonzero().tolist() == [[3, 5, 9]]
    assert item["mask"].sum() == 400
    expected = Camera.from_r2n2(200.5, 29, 0.7).to(torch.float32)
    assert torch.equal(item["camera"].rotation, expected.rotation)
    with pytest.raises(ValueError, match=r"3D-R2N2's rule has no 'val'"):
        ShapeNet(others, "val", fields=R2N2)


def test_pieces_can_lie_anywhere(others, tmp_path):
    shutil.move(others / "ShapeNetVox32", tmp_path / "elsewhere")
    pieces = {"voxels": tmp_path / "elsewhere", "renderings": others / "ShapeNetRendering"}
    dataset = ShapeNet(pieces, "train", fields=("image", "voxels"))
    assert dataset[0]["frame"].close_to(Frame("object", (0.15, 0.3, 0.15), 0.6))  # the binvox file's own box
    assert len(ShapeNet(others / "ShapeNetCore.v1", "all", fields=("mesh",))) == 7
    with pytest.raises(ValueError, match=r"unknown piece 'voxel'.*did you mean 'voxels'"):
        ShapeNet({"voxel": tmp_path}, "train")
    with pytest.raises(ValueError, match="the folder for 'core' does not exist"):
        ShapeNet({"core": tmp_path / "nowhere"}, "train")


def test_lists_of_occupancy_networks(others):
    points = np.random.default_rng(0).random((10, 3)) - 0.5
    where = {"loc": np.array([0.1, 0.2, 0.3]), "scale": np.array(2.0)}
    for number in range(7):
        folder = others / "ShapeNet" / CHAIR / f"m{number}"
        folder.mkdir(parents=True)
        save_npz(folder / "points.npz", points=points, occupancies=points[:, 0] > 0, **where)  # not packed
    for split, ids in (("train", "m6\nm1"), ("val", "m2"), ("test", "")):
        (others / "ShapeNet" / CHAIR / f"{split}.lst").write_text(ids)
    dataset = ShapeNet(others, "train", fields=("points",))
    assert dataset.split_name == "Occupancy Networks' lists"
    assert [model.id for model in dataset.models] == ["m1", "m6"]
    assert dataset[0]["frame"] == Frame("object", (0.1, 0.2, 0.3), 2.0)
    assert torch.equal(dataset[0]["occupancies"], (dataset[0]["points"][:, 0] > 0).float())
    (others / "ShapeNet" / CHAIR / "val.lst").write_text("../../m2")
    with pytest.raises(ValueError, match=r"val\.lst: .*must not contain '\.\.'"):
        ShapeNet(others, "val", fields=("points",))


def test_voxels_placed_by_header_or_as_a_cube(others):
    path = others / "ShapeNetVox32" / CHAIR / "m0" / "model.binvox"
    voxels = torch.zeros(32, 32, 32, dtype=torch.bool)
    voxels[8:24, 8:24, 8:24] = True
    write_binvox(path, voxels, (-0.45, -0.3, -0.45), 1.2)  # twice as large a box about the same center
    placed = ShapeNet(others, "train", fields=("voxels", "mesh"))[0]["voxels"]
    assert placed.sum() == 32**3
    cube = ShapeNet(others, "train", fields=("voxels", "mesh"), voxel_placement="cube")[0]["voxels"]
    assert torch.equal(cube > 0.5, voxels)
    write_binvox(path, voxels, (-0.15 + 0.6 * 4 / 32, 0.0, -0.15 - 0.6 * 3 / 32), 0.6)  # moved by whole cells
    moved = ShapeNet(others, "train", fields=("voxels", "mesh"))[0]["voxels"] > 0.5
    assert moved.nonzero().amin(0).tolist() == [5, 8, 12]
    assert moved.sum() == 16**3
    write_binvox(path, voxels, (10.0, 10.0, 10.0), 0.6)
    with pytest.raises(ValueError, match=r"model\.binvox: translate .* outside the object.*voxel_placement='cube'"):
        ShapeNet(others, "train", fields=("voxels", "mesh"))[0]


def test_categories_by_name_synset_and_taxonomy(data, copy):
    assert ShapeNet(data, "all", categories=["table"], fields=("mesh",)).synsets == [TABLE]
    assert ShapeNet(data, "all", categories=[TABLE, "chair"], fields=("mesh",)).synsets == [TABLE, CHAIR]
    entries = [{"synsetId": TABLE, "name": "table,desk", "children": [], "numInstances": 3}]
    (copy / "ShapeNetCore.v2" / "taxonomy.json").write_text(json.dumps(entries))
    assert ShapeNet(copy, "all", categories=["desk"], fields=("mesh",)).synsets == [TABLE]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_empty_and_foreign_folders(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder"):
        ShapeNet(tmp_path / "none", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder is empty"):
        ShapeNet(tmp_path / "empty", "train")
    (tmp_path / "foreign" / "photos").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"none of the folders of the public layouts .*ShapeNetCore\.v2"):
        ShapeNet(tmp_path / "foreign", "train")
    (tmp_path / "bare" / "ShapeNetCore.v2").mkdir(parents=True)
    with pytest.raises(ValueError, match="no SYNSET/MODEL folders"):
        ShapeNet(tmp_path / "bare", "train", fields=("mesh",))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categories": ["chairs"]}, r"unknown category 'chairs' .*choose from 03001627 \(chair\)"),
        ({"categories": ["02691156"]}, "unknown category '02691156'"),
        ({"fields": ("images",)}, "unknown field 'images'.*did you mean 'image'"),
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"views": 0}, "views must be at least 1"),
        ({"points_per_item": 0}, "points_per_item must be at least 1"),
        ({"manifest": "v9"}, r"no split manifest 'v9'.*procedural_v1"),
    ],
)
def test_bad_arguments(data, changes, message):
    with pytest.raises(ValueError, match=message):
        ShapeNet(data, **{"split": "train", **changes})


def test_more_points_than_the_file_has(data):
    with pytest.raises(ValueError, match=r"points_per_item of .*: 601 asked for, the file has 600"):
        ShapeNet(data, "train", points_per_item=601)[0]


def test_a_field_without_its_folder(others):
    with pytest.raises(ValueError, match=r"field 'points' needs ShapeNet, found .*ShapeNetCore\.v1"):
        ShapeNet(others, "train", fields=("points",))
    with pytest.raises(ValueError, match="field 'depth' needs ShapeNetGeometry"):
        ShapeNet(others, "train", fields=("depth",))


def test_splits_that_are_ambiguous_or_leave_the_folder(copy):
    manifest = copy / "splits" / "procedural_v1.json"
    shutil.copy(manifest, copy / "splits" / "other.json")
    with pytest.raises(ValueError, match=r"several split manifests, choose one: manifest=\['other', 'procedural_v1'\]"):
        ShapeNet(copy, "train")
    assert len(ShapeNet(copy, "train", manifest="other"))
    content = json.loads(manifest.read_text())
    content["train"][CHAIR].append("../../../../etc")
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"procedural_v1\.json: train\.03001627: .*must not contain '\.\.'"):
        ShapeNet(copy, "train", manifest="procedural_v1")


BROKEN = {  # what is done to a file of a good folder -> what the error says
    "missing view": (
        "ShapeNetRendering/*/rendering/01.png",
        lambda p: p.unlink(),
        r"01\.png: .*'image' does not exist",
    ),
    "wrong size": ("ShapeNetRendering/*/rendering/01.png", lambda p: picture(p, 64), r"01\.png: must be 137 x 137"),
    "cut picture": (
        "ShapeNetRendering/*/rendering/01.png",
        lambda p: p.write_bytes(p.read_bytes()[:300]),
        r"01\.png: cannot decode",
    ),
    "no picture": ("ShapeNetRendering/*/rendering/00.png", lambda p: p.write_text("x"), r"00\.png: not an image"),
    "no cameras": (
        "ShapeNetRendering/*/rendering/rendering_metadata.txt",
        lambda p: p.unlink(),
        "rendering_metadata.txt: missing",
    ),
    "few cameras": (
        "ShapeNetRendering/*/rendering/rendering_metadata.txt",
        lambda p: p.write_text("1 25 0 0.8 25\n"),
        "1 cameras for 3 pictures",
    ),
    "bad cameras": (
        "ShapeNetRendering/*/rendering/rendering_metadata.txt",
        lambda p: p.write_text("1 25 0 0.8 25\n1 x 0 0.8 25\n1 25 0 0.8 25\n"),
        r"rendering_metadata\.txt: line 2",
    ),
    "turned camera": (
        "ShapeNetRendering/*/rendering/rendering_metadata.txt",
        lambda p: p.write_text("1 25 9 0.8 25\n" * 3),
        "line 1 turns the camera by 9",
    ),
    "depth of 8 bits": (
        "ShapeNetGeometry/*/00_depth.png",
        lambda p: Image.fromarray(np.zeros((137, 137), np.uint8)).save(p),
        r"00_depth\.png: a depth map must be a 16-bit",
    ),
    "missing mask": ("ShapeNetGeometry/*/02_mask.png", lambda p: p.unlink(), r"02_mask\.png: .*does not exist"),
    "cut binvox": (
        "ShapeNetVox32/*/model.binvox",
        lambda p: p.write_bytes(p.read_bytes()[:-10]),
        r"model\.binvox: cut short",
    ),
    "no binvox": ("ShapeNetVox32/*/model.binvox", lambda p: p.write_text("PLY"), r"model\.binvox: not a binvox file"),
    "flat binvox": (
        "ShapeNetVox32/*/model.binvox",
        lambda p: write_binvox(p, torch.ones(2, 4, 4, dtype=torch.bool)),
        "voxels must fill a cube",
    ),
    "missing points": ("ShapeNet/*/points.npz", lambda p: p.unlink(), r"points\.npz: .*'points' does not exist"),
    "cut npz": ("ShapeNet/*/points.npz", lambda p: p.write_bytes(p.read_bytes()[:99]), r"points\.npz: not an npz"),
    "pickled objects": (
        "ShapeNet/*/points.npz",
        lambda p: np.savez(p, points=np.array([{}], object), occupancies=np.zeros(1), loc=np.zeros(3), scale=1.0),
        r"points\.npz: array 'points' holds pickled",
    ),
    "other arrays": (
        "ShapeNet/*/points.npz",
        lambda p: np.savez(p, points=np.zeros((4, 3)), loc=np.zeros(3), scale=1.0),
        r"points\.npz: no array 'occupancies'",
    ),
    "too few occupancies": (
        "ShapeNet/*/points.npz",
        lambda p: np.savez(p, points=np.zeros((9, 3)), occupancies=np.zeros(1, np.uint8), loc=np.zeros(3), scale=1.0),
        r"points\.npz: occupancies of 9 points .* 2 bytes",
    ),
    "points with NaN": (
        "ShapeNet/*/points.npz",
        lambda p: np.savez(p, points=np.full((8, 3), np.nan), occupancies=np.zeros(8), loc=np.zeros(3), scale=1.0),
        r"points\.npz: points has values that are not finite",
    ),
    "flat points": (
        "ShapeNet/*/points.npz",
        lambda p: np.savez(p, points=np.zeros((8, 2)), occupancies=np.zeros(8), loc=np.zeros(3), scale=1.0),
        r"points\.npz: points must be \(N, 3\)",
    ),
    "normals missing": (
        "ShapeNet/*/pointcloud.npz",
        lambda p: np.savez(p, points=np.zeros((8, 3)), normals=np.zeros((7, 3)), loc=np.zeros(3), scale=1.0),
        r"pointcloud\.npz: \(8, 3\) points have \(7, 3\) normals",
    ),
    "missing mesh": (
        "ShapeNetCore.v2/*/models/model_normalized.obj",
        lambda p: p.unlink(),
        r"model_normalized\.obj: .*'mesh' does not exist",
    ),
    "cut mesh": (
        "ShapeNetCore.v2/*/models/model_normalized.obj",
        lambda p: p.write_text(p.read_text()[: len(p.read_text()) // 4]),
        r"model_normalized\.obj, line \d+: ",
    ),
    "mesh with NaN": (
        "ShapeNetCore.v2/*/models/model_normalized.obj",
        lambda p: p.write_text("v 0 0 nan\nv 0 1 0\nv 1 0 0\nf 1 2 3\n"),
        r"model_normalized\.obj: .*(nan|finite)",
    ),
    "faces out of range": (
        "ShapeNetCore.v2/*/models/model_normalized.obj",
        lambda p: p.write_text("v 0 0 0\nv 0 1 0\nv 1 0 0\nf 1 2 9\n"),
        r"model_normalized\.obj: .*9",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_listed_and_left_out(copy, case):
    pattern, damage, message = BROKEN[case]
    synset, model = first_model(copy)
    damage(copy / pattern.replace("*", f"{synset}/{model}"))

    def read_all():
        dataset = ShapeNet(copy, "train", fields=FIELDS)
        return [dataset[i] for i in range(len(dataset))]

    with pytest.raises(ValueError, match=message):
        read_all()
    skipping = ShapeNet(copy, "train", fields=FIELDS, on_error="skip")
    assert skipping.problems
    assert all(problem.required and problem.item.startswith(f"{synset}/{model}") for problem in skipping.problems)
    assert all(Path(problem.file).parent.is_dir() for problem in skipping.problems)
    assert {Path(problem.file).name for problem in skipping.problems} == {pattern.split("/")[-1]}
    per_view = "/0" in pattern
    assert len(skipping) == (5 if per_view else 3)
    ids = [skipping[i]["id"] for i in range(len(skipping))]  # whole, without None
    assert len(set(ids)) == len(ids)


def test_nothing_whole_left(copy):
    for path in copy.glob("ShapeNet/*/*/points.npz"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no item is whole; the first problem: .*points\.npz"):
        ShapeNet(copy, "train", on_error="skip")


def test_check_lists_optional_pieces_too(copy):
    assert ShapeNet(copy, "all", fields=FIELDS).check() == []
    synset, model = first_model(copy)
    (copy / "ShapeNet" / synset / model / "pointcloud.npz").unlink()
    dataset = ShapeNet(copy, "train", fields=("image", "voxels"))
    (problem,) = dataset.check()
    assert (problem.item, problem.required) == (f"{synset}/{model}", False)
    assert problem.file.endswith("pointcloud.npz")
    assert math.isfinite(float(dataset[0]["image"].sum()))
