"""Preparing data: layouts, agreement of everything written, same bytes, resuming, and what is wrong with files."""

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from vision3dgen import files
from vision3dgen.datasets import SplitManifest, prepare_meshes, prepare_procedural
from vision3dgen.datasets.manifest import SPLITS, assign_splits
from vision3dgen.io import load_mesh, load_npz, read_binvox, read_depth_png, read_image
from vision3dgen.ops.inside import contains, nearest_faces, winding_number
from vision3dgen.ops.render import raycast
from vision3dgen.structures import Camera, Frame

CHAIR, TABLE = "03001627", "04379243"
TINY = {"views": 2, "points": 501, "seed": 3}


def make(root: Path, **changes):
    return prepare_procedural(root, **{"shapes_per_category": 2, "categories": ["chair", TABLE], **TINY, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("procedural")
    make(root)
    return root


def models(root: Path) -> list[tuple[str, str]]:
    return [(p.parent.name, p.name) for p in sorted((root / "ShapeNetCore.v2").glob("*/*")) if p.is_dir()]


def tree(root: Path) -> dict[str, str]:
    """sha256 of every file."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def read_views(root: Path, synset: str, model: str) -> list[list[float]]:
    text = (root / "ShapeNetRendering" / synset / model / "rendering" / "rendering_metadata.txt").read_text()
    return [[float(value) for value in line.split(" ")] for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------- the public layouts


def test_every_file_of_the_layouts_is_there(data):
    assert len(models(data)) == 4
    for synset, model in models(data):
        assert len(model) == 32
        int(model, 16)
        rendering = data / "ShapeNetRendering" / synset / model / "rendering"
        assert sorted(os.listdir(rendering)) == ["00.png", "01.png", "rendering_metadata.txt", "renderings.txt"]
        assert (rendering / "renderings.txt").read_text().split() == ["00.png", "01.png"]
        assert read_image(rendering / "01.png").shape == (137, 137, 4)
        geometry = data / "ShapeNetGeometry" / synset / model
        expected = [f"0{view}_{name}.png" for view in range(2) for name in ("depth", "mask", "normals")]
        assert sorted(os.listdir(geometry)) == [*expected, "frame.json", "record.json"]
        assert (data / "ShapeNetVox32" / synset / model / "model.binvox").is_file()
        assert sorted(os.listdir(data / "ShapeNet" / synset / model)) == [
            "model.binvox",
            "pointcloud.npz",
            "points.npz",
        ]
        obj = data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj"
        assert "mtllib model_normalized.mtl" in obj.read_text()
        assert "Kd" in obj.with_suffix(".mtl").read_text()
    taxonomy = json.loads((data / "ShapeNetCore.v2" / "taxonomy.json").read_text())
    assert taxonomy[0] == {"synsetId": CHAIR, "name": "chair", "children": [], "numInstances": 2}
    assert "'04379243':\n  id: '04379243'\n  name: table\n" in (data / "ShapeNet" / "metadata.yaml").read_text()


def test_arrays_have_the_types_of_occupancy_networks(data):
    for synset, model in models(data):
        points = load_npz(data / "ShapeNet" / synset / model / "points.npz")
        assert set(points) == {"points", "occupancies", "loc", "scale"}
        assert points["points"].dtype == np.float16
        assert points["points"].shape == (501, 3)
        assert np.abs(points["points"]).max() <= np.float16(0.55)
        assert points["occupancies"].dtype == np.uint8
        assert points["occupancies"].shape == (63,)
        assert (points["loc"].dtype, points["loc"].shape) == (np.float64, (3,))
        assert (points["scale"].dtype, points["scale"].shape) == (np.float64, ())
        cloud = load_npz(data / "ShapeNet" / synset / model / "pointcloud.npz")
        assert {key: (value.dtype.name, value.shape) for key, value in cloud.items()} == {
            "points": ("float16", (501, 3)),
            "normals": ("float16", (501, 3)),
            "loc": ("float64", (3,)),
            "scale": ("float64", ()),
        }


def test_objs_are_centred_with_diagonal_one(data):
    for synset, model in models(data):
        verts = load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj").verts_packed()
        low, high = verts.amin(0), verts.amax(0)
        torch.testing.assert_close((low + high) / 2, torch.zeros(3), atol=1e-6, rtol=0)
        assert float((high - low).norm()) == pytest.approx(1, abs=1e-6)


def test_cameras_are_drawn_as_in_r2n2(tmp_path):
    make(tmp_path, categories=["chair"], shapes_per_category=1, views=40, points=8, image_size=5)
    ((synset, model),) = models(tmp_path)
    azimuth, elevation, yaw, ratio, fov = np.array(read_views(tmp_path, synset, model)).T
    assert ((azimuth >= 0) & (azimuth < 360)).all()
    assert np.ptp(azimuth) > 270
    assert ((elevation >= 25) & (elevation <= 30)).all()
    assert ((ratio >= 0.65) & (ratio <= 0.95)).all()
    assert np.ptp(ratio) > 0.2
    assert (yaw == 0).all()
    assert (fov == 25).all()


def test_more_views_begin_with_the_same_ones(data, tmp_path):
    make(tmp_path, views=3)
    for synset, model in models(data):
        assert read_views(tmp_path, synset, model)[:2] == read_views(data, synset, model)


def test_lists_and_manifest_say_the_same(data):
    manifest = SplitManifest.read(data / "splits" / "procedural_v1.json", data)
    assert (manifest.name, manifest.version, manifest.seed) == ("procedural_v1", 1, 3)
    for synset in (CHAIR, TABLE):
        listed = []
        for split in SPLITS:
            text = (data / "ShapeNet" / synset / f"{split}.lst").read_text()
            assert not text.endswith("\n")
            assert [line for line in text.split("\n") if line] == manifest.splits[split][synset]
            listed += manifest.splits[split][synset]
        assert sorted((synset, model) for model in listed) == [m for m in models(data) if m[0] == synset]
    assert manifest.verify(data) == []
    assert len(manifest.files) == 4 * 17


# ------------------------------------------------------------------------------- everything written is one shape


def test_pictures_show_the_mesh(data):
    for synset, model in models(data):
        mesh = load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj")
        verts, faces = mesh.get_mesh_verts_faces(0)
        cloud = load_npz(data / "ShapeNet" / synset / model / "pointcloud.npz")
        surface = torch.from_numpy(cloud["points"].astype(np.float64) * cloud["scale"] + cloud["loc"])
        geometry = data / "ShapeNetGeometry" / synset / model
        for number, (azimuth, elevation, _, ratio, _) in enumerate(read_views(data, synset, model)):
            camera = Camera.from_r2n2(azimuth, elevation, ratio)
            mask = torch.from_numpy(read_image(geometry / f"0{number}_mask.png", mode="L") > 127)
            depth = torch.from_numpy(read_depth_png(geometry / f"0{number}_depth.png", units_per_metre=20000)).double()
            assert torch.equal(mask, depth > 0)
            assert torch.equal(mask, raycast(mesh, camera, renderer="builtin", samples=1).mask)
            # what is seen lies on the surface
            rows, columns = mask.nonzero().unbind(1)
            seen = camera.unproject(torch.stack([columns, rows], 1).double() + 0.5, depth[mask])
            assert nearest_faces(verts.double(), faces, seen).distances.max() < 5e-5
            # and the surface lies where it is seen, but for what is out of the picture and for half covered pixels
            near = torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0
            column, row = camera.project(surface).pixels.floor().long().unbind(1)
            inside = (column >= 0) & (column < 137) & (row >= 0) & (row < 137)
            assert near[row[inside], column[inside]].all()
            alpha = read_image(data / "ShapeNetRendering" / synset / model / "rendering" / f"0{number}.png")[..., 3]
            alpha = torch.from_numpy(alpha.astype(np.int64))
            assert (alpha[mask] > 0).all()  # the pixel's center is one of its nine samples
            assert (alpha[~mask] < 255).all()


def test_normals_face_the_camera_and_are_those_of_the_mesh(data):
    synset, model = models(data)[0]
    mesh = load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj")
    azimuth, elevation, _, ratio, _ = read_views(data, synset, model)[0]
    code = read_image(data / "ShapeNetGeometry" / synset / model / "00_normals.png", mode="RGB")
    mask = read_image(data / "ShapeNetGeometry" / synset / model / "00_mask.png", mode="L") > 127
    assert (code[~mask] == 0).all()
    normals = torch.from_numpy(code[mask].astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(normals)), atol=0.01, rtol=0)
    drawn = raycast(mesh, Camera.from_r2n2(azimuth, elevation, ratio), renderer="builtin", samples=1)
    torch.testing.assert_close(normals, drawn.normals[torch.from_numpy(mask)], atol=0.005, rtol=0)
    outward = mesh.faces_normals_packed()[drawn.face_index[drawn.mask]]
    camera = Camera.from_r2n2(azimuth, elevation, ratio)
    torch.testing.assert_close(
        (outward.double() @ camera.rotation.T).float(), drawn.normals[drawn.mask], atol=1e-4, rtol=0
    )


def test_occupancies_are_those_of_the_stored_points(data):
    for synset, model in models(data):
        mesh = load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj")
        stored = load_npz(data / "ShapeNet" / synset / model / "points.npz")
        points = torch.from_numpy(stored["points"].astype(np.float64) * stored["scale"] + stored["loc"])
        inside = np.unpackbits(stored["occupancies"])[:501].astype(bool)
        assert inside.any()
        assert np.array_equal(contains(mesh, points).numpy(), inside)
        frame = Frame.longest_edge(mesh.verts_packed())
        assert frame.close_to(Frame("object", tuple(stored["loc"].tolist()), float(stored["scale"])))


def test_voxels_lie_where_the_binvox_header_says(data):
    for synset, model in models(data):
        mesh = load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj")
        binvox = read_binvox(data / "ShapeNetVox32" / synset / model / "model.binvox")
        assert binvox.voxels.shape == (32, 32, 32)
        centers = binvox.grid.points(torch.float64).view(-1, 3)
        agree = contains(mesh, centers) == binvox.voxels.view(-1)
        # the header's nine digits move the centers a little: only those on the surface may change sides
        assert nearest_faces(*mesh.get_mesh_verts_faces(0), centers[~agree].float()).distances.numel() < 40
        assert (nearest_faces(*mesh.get_mesh_verts_faces(0), centers[~agree].float()).distances < 1e-6).all()
        extent = binvox.scale / 32 * 32
        assert extent == pytest.approx(float(Frame.longest_edge(mesh.verts_packed()).scale), rel=1e-6)


def test_voxels_and_points_agree(data):
    """A point and the cell it lies in may differ only where the surface passes the cell."""
    for synset, model in models(data):
        stored = load_npz(data / "ShapeNet" / synset / model / "points.npz")
        binvox = read_binvox(data / "ShapeNetVox32" / synset / model / "model.binvox")
        points = stored["points"].astype(np.float64)
        inside = np.unpackbits(stored["occupancies"])[:501].astype(bool)
        covered = (np.abs(points) < 0.5).all(1)
        assert not inside[~covered].any()
        x, y, z = np.floor((points[covered] + 0.5) * 32).astype(int).T
        differ = binvox.voxels.numpy()[z, y, x] != inside[covered]
        mesh = Frame("object", tuple(stored["loc"].tolist()), float(stored["scale"])).normalize(
            load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj")
        )
        distance = nearest_faces(
            *mesh.get_mesh_verts_faces(0), torch.from_numpy(points[covered][differ]).float()
        ).distances
        assert (distance < math.sqrt(3) / 2 / 32 * 1.001).all()
        assert differ.mean() < 0.1


def test_surface_points_lie_on_the_surface_with_its_normals(data):
    for synset, model in models(data):
        stored = load_npz(data / "ShapeNet" / synset / model / "pointcloud.npz")
        mesh = Frame("object", tuple(stored["loc"].tolist()), float(stored["scale"])).normalize(
            load_mesh(data / "ShapeNetCore.v2" / synset / model / "models" / "model_normalized.obj")
        )
        points = torch.from_numpy(stored["points"]).float()
        near = nearest_faces(*mesh.get_mesh_verts_faces(0), points)
        assert near.distances.max() < 5e-4  # float16 at 0.5
        cosine = (mesh.faces_normals_packed()[near.indices] * torch.from_numpy(stored["normals"]).float()).sum(1)
        assert (cosine > 0.99).float().mean() > 0.95  # near an edge rounding may find the other face


# ----------------------------------------------------------------------------------------- same bytes, resumed runs


def test_same_bytes_with_one_worker_and_two(tmp_path):
    few = {"shapes_per_category": 1, "views": 1, "points": 64, "renderer": "builtin"}
    make(tmp_path / "one", workers=1, **few)
    make(tmp_path / "two", workers=2, **few)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    make(tmp_path / "other", workers=1, **few | {"seed": 4})
    assert not set(models(tmp_path / "one")) & set(models(tmp_path / "other"))


def test_threads_and_the_global_generators_do_not_matter(data, tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.set_num_threads(3)
    try:
        make(tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert tree(tmp_path) == tree(data)


def test_a_second_run_keeps_what_is_complete(tmp_path):
    first = make(tmp_path)
    before = tree(tmp_path)
    assert (first.written, first.kept, first.rejected) == (4, 0, [])
    synset, model = models(tmp_path)[1]
    (tmp_path / "ShapeNetGeometry" / synset / model / "record.json").unlink()
    (tmp_path / "ShapeNet" / synset / model / "points.npz").write_bytes(b"half")
    other = models(tmp_path)[3]
    (tmp_path / "ShapeNetVox32" / other[0] / other[1] / "model.binvox").unlink()
    second = make(tmp_path)
    assert (second.written, second.kept) == (2, 2)
    assert tree(tmp_path) == before
    assert "0 written, 4 kept, 0 rejected" in str(make(tmp_path))


def test_more_shapes_later_change_nothing_before(tmp_path):
    make(tmp_path, shapes_per_category=1)
    before = {k: v for k, v in tree(tmp_path).items() if "/0" in k and "lst" not in k and k.count("/") > 1}
    old = SplitManifest.read(tmp_path / "splits" / "procedural_v1.json", tmp_path)
    again = make(tmp_path, shapes_per_category=4)
    assert (again.written, again.kept) == (6, 2)
    after = tree(tmp_path)
    assert before
    assert all(after[name] == digest for name, digest in before.items())
    new = SplitManifest.read(tmp_path / "splits" / "procedural_v1.json", tmp_path)
    assert set(old.splits["train"][CHAIR]) <= set(new.splits["train"][CHAIR])


def test_other_settings_over_old_data_are_an_error(tmp_path):
    make(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"record\.json: .* was prepared with views=2, now views=3 is asked for"):
        make(tmp_path, views=3)
    with pytest.raises(ValueError, match="points=501, now points=502"):
        make(tmp_path, points=502)
    assert tree(tmp_path) == before


def test_full_disk_in_the_middle(data, tmp_path, monkeypatch):
    """The error names the file, nothing half written keeps its name, and the next run completes the same bytes."""
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        make(tmp_path)
    assert str(tmp_path) in str(caught.value.filename)
    assert not Path(caught.value.filename).exists()
    monkeypatch.undo()
    whole, partial = tree(data), tree(tmp_path)
    assert len(partial) == 30
    assert all(whole[name] == digest for name, digest in partial.items())
    done = make(tmp_path)
    assert (done.written, done.kept) == (3, 1)
    assert tree(tmp_path) == whole


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categories": ["chairs"]}, "unknown category 'chairs'"),
        ({"shapes_per_category": 0}, "shapes_per_category must be at least 1, got 0"),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"split": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"name": "../x"}, "name must be letters"),
        ({"renderer": "blender"}, "unknown renderer 'blender'"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)
    assert tree(tmp_path) == {}


# -------------------------------------------------------------------------------------------------- anybody's meshes


def box(center=(0.0, 0.0, 0.0), size=(1.0, 2.0, 3.0)) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(size)
    mesh.apply_translation(center)
    return mesh


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Good and bad files, prepared."""
    root = tmp_path_factory.mktemp("mixed")
    source = root / "in"
    (source / "chair" / "old").mkdir(parents=True)
    (source / "04379243").mkdir()
    box((5, 6, 7)).export(source / "box one.obj")
    box().export(source / "chair" / "old" / "a.ply")
    box().export(source / "04379243" / "a.off")
    box().export(source / "04379243" / "a.stl")
    inverted = box()
    inverted.invert()
    inverted.export(source / "inverted.GLB", file_type="glb")
    open_box = box()
    open_box.update_faces(open_box.face_normals[:, 2] < 0.5)
    open_box.export(source / "open.obj")
    bad = source / "bad"
    bad.mkdir()
    whole = (source / "box one.obj").read_text()
    faces = [line for line in whole.splitlines() if line.startswith("f ")]
    (bad / "cut.obj").write_text(whole[: whole.index(faces[5]) + 4])
    (bad / "nan.obj").write_text("v 0 0 0\nv nan 1 0\nv 1 0 0\nf 1 2 3\n")
    (bad / "range.obj").write_text("v 0 0 0\nv 0 1 0\nv 1 0 0\nf 1 2 4\n")
    (bad / "flat.obj").write_text("v 0 0 0\nv 0 1 0\nv 0 2 0\nf 1 2 3\nf 1 1 2\n")
    (bad / "point.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    (bad / "sheet.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (bad / "cloud.obj").write_text("v 0 0 0\nv 0 1 0\nv 1 0 0\n")
    (bad / "empty.obj").write_bytes(b"")
    (bad / "noise.glb").write_bytes(bytes(range(200)))
    (bad / "noise.stl").write_bytes(bytes(range(200)))
    (bad / "readme.txt").write_text("not a mesh")
    out = root / "out"
    done = prepare_meshes(source, out, views=1, points=400, image_size=33)
    return source, out, done


def test_good_files_get_categories_and_ids(mixed):
    _, out, done = mixed
    assert done.written == 6
    listed = json.loads((out / "manifest.json").read_text())["accepted"]
    places = {entry["file"]: (entry["synset"], entry["model"]) for entry in listed}
    digests = {name: hashlib.sha1(name.encode()).hexdigest()[:8] for name in ("04379243/a.off", "04379243/a.stl")}
    assert places == {
        "box one.obj": ("00000000", "box_one"),
        "inverted.GLB": ("00000000", "inverted"),
        "open.obj": ("00000000", "open"),
        "chair/old/a.ply": (CHAIR, "a"),
        **{name: (TABLE, f"a-{digest}") for name, digest in digests.items()},
    }
    manifest = SplitManifest.read(done.manifest, out)
    assert sum(len(ids) for ids in manifest.splits["train"].values()) == 6
    assert not any(manifest.splits["test"].values())
    assert manifest.verify(out) == []


def test_bad_files_are_listed_with_the_reason(mixed):
    _, out, done = mixed
    rejected = {entry.file: entry for entry in done.rejected}
    assert json.loads((out / "manifest.json").read_text())["rejected"] == [entry._asdict() for entry in done.rejected]
    reasons = {
        "bad/cut.obj": ("read", "line"),
        "bad/nan.obj": ("read", "nan"),
        "bad/range.obj": ("read", "4"),
        "bad/flat.obj": ("check", "no surface: 2 faces, all of area zero"),
        "bad/point.obj": ("check", "no surface"),
        "bad/sheet.obj": ("points", "nothing is inside: an open sheet"),
        "bad/cloud.obj": ("read", "no faces"),
        "bad/empty.obj": ("read", "empty"),
        "bad/noise.glb": ("read", ""),
        "bad/noise.stl": ("read", ""),
    }
    assert set(rejected) == set(reasons)
    for name, (step, part) in reasons.items():
        assert rejected[name].step == step
        assert part in rejected[name].error
        assert str(out.parent) not in rejected[name].error  # the same bytes wherever the folder lies
    assert "10 rejected" in str(done)
    assert "bad/cut.obj: " in str(done)


def test_frame_leads_back_to_the_file(mixed):
    source, out, _ = mixed
    original = load_mesh(source / "box one.obj").verts_packed()
    written = load_mesh(out / "ShapeNetCore.v2" / "00000000" / "box_one" / "models" / "model_normalized.obj")
    frame = Frame.from_dict(json.loads((out / "ShapeNetGeometry/00000000/box_one/frame.json").read_text()))
    assert frame.center == pytest.approx((5, 6, 7))
    assert frame.scale == pytest.approx(math.sqrt(14))
    torch.testing.assert_close(frame.denormalize(written).verts_packed(), original, atol=1e-5, rtol=0)


def test_closed_open_and_inverted_meshes(mixed):
    _, out, _ = mixed
    listed = {entry["model"]: entry for entry in json.loads((out / "manifest.json").read_text())["accepted"]}
    assert (listed["box_one"]["watertight"], listed["box_one"]["turned"]) == (True, False)
    assert (listed["inverted"]["watertight"], listed["inverted"]["turned"]) == (True, True)
    assert listed["box_one"]["ambiguous"] == listed["inverted"]["ambiguous"] == 0
    assert listed["open"]["watertight"] is False
    assert 0 < listed["open"]["ambiguous"] < 0.2
    for model in ("box_one", "inverted", "open"):
        mesh = load_mesh(out / "ShapeNetCore.v2" / "00000000" / model / "models" / "model_normalized.obj")
        stored = load_npz(out / "ShapeNet" / "00000000" / model / "points.npz")
        points = stored["points"].astype(np.float64) * stored["scale"] + stored["loc"]
        winding = winding_number(mesh, torch.from_numpy(points))
        assert np.array_equal((winding > 0.5).numpy(), np.unpackbits(stored["occupancies"])[:400].astype(bool))
        cloud = load_npz(out / "ShapeNet" / "00000000" / model / "pointcloud.npz")
        assert ((cloud["points"].astype(float) * cloud["normals"].astype(float)).sum(1) > 0).all()  # outward


def test_more_meshes_into_the_same_folder(mixed, tmp_path):
    source, _, _ = mixed
    inside = source / "prepared"  # its OBJs must not be taken for input
    try:
        first = prepare_meshes(source, inside, views=1, points=50, image_size=9, split=(0.6, 0.2, 0.2))
        again = prepare_meshes(source, inside, views=1, points=50, image_size=9, split=(0.6, 0.2, 0.2))
        assert (first.written, again.written, again.kept) == (6, 0, 6)
        splits = SplitManifest.read(again.manifest, inside).splits
        assert [len(splits[split]["00000000"]) for split in SPLITS] == [1, 1, 1]
        changed = source / "box one.obj"
        before = changed.read_bytes()
        changed.write_bytes(before + b"# another file now\n")
        try:
            with pytest.raises(ValueError, match="was prepared with sha256="):
                prepare_meshes(source, inside, views=1, points=50, image_size=9)
        finally:
            changed.write_bytes(before)
    finally:
        __import__("shutil").rmtree(inside, ignore_errors=True)


def test_colors_of_a_mesh_reach_its_pictures(tmp_path):
    (tmp_path / "in").mkdir()
    mesh = box()
    mesh.visual.vertex_colors = [255, 0, 0, 255]
    mesh.export(tmp_path / "in" / "red.ply")
    prepare_meshes(tmp_path / "in", tmp_path / "out", views=1, points=50, image_size=33)
    picture = read_image(tmp_path / "out/ShapeNetRendering/00000000/red/rendering/00.png")
    seen = picture[picture[..., 3] == 255]
    assert (seen[:, 0] > 60).all()
    assert (seen[:, 1:3] == 0).all()


def test_no_mesh_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        prepare_meshes(tmp_path / "none", tmp_path / "out", views=1)
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"in: no \.obj, \.ply"):
        prepare_meshes(tmp_path / "in", tmp_path / "out", views=1)
    (tmp_path / "in" / "bad.obj").write_text("v 0 0 0\n")
    done = prepare_meshes(tmp_path / "in", tmp_path / "out", views=1, points=8)
    assert (done.written, len(done.rejected)) == (0, 1)


def test_real_meshes(shared_data, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("spot", "suzanne", "alligator"):
        (tmp_path / "in" / f"{name}.obj").write_bytes((shared_data / "meshes" / f"{name}.obj").read_bytes())
    done = prepare_meshes(tmp_path / "in", tmp_path / "out", views=1, points=500, image_size=33)
    assert [(entry.file, entry.step) for entry in done.rejected] == [("alligator.obj", "points")]  # a flat relief
    listed = {
        entry["model"]: entry for entry in json.loads((tmp_path / "out" / "manifest.json").read_text())["accepted"]
    }
    assert listed["spot"]["watertight"] is True
    assert listed["suzanne"]["watertight"] is False


# ----------------------------------------------------------------------------------------------------- split manifests


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 10, 101])
def test_splits_are_near_their_shares_and_stable(count):
    fractions = (0.7, 0.1, 0.2)
    assigned = assign_splits(count, fractions)
    assert assigned == assign_splits(200, fractions)[:count]
    for split, share in zip(SPLITS, fractions, strict=True):
        assert abs(assigned.count(split) - share * count) < 1.5
    assert assigned[:3] == ["train", "test", "val"][:count]
    assert set(assign_splits(count, (1.0, 0.0, 0.0))) <= {"train"}


def manifest_file(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "m.json"
    content = {"name": "m", "version": 1, "seed": 0, "train": {CHAIR: ["a"]}, "val": {}, "test": {}, "files": {}}
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": {CHAIR: ["../../etc"]}}, r"m\.json: train\.03001627: .*must not contain '\.\.'"),
        ({"train": {"..": ["a"]}}, r"must not contain '\.\.'"),
        ({"files": {"../secret": "0"}}, r"m\.json: files: .*must not contain '\.\.'"),
        ({"files": {"/etc/passwd": "0"}}, "must be relative"),
        ({"test": {CHAIR: ["a"]}}, "03001627/a is in 'train' and in 'test'"),
        ({"val": ["a"]}, "'val' must map each synset to a list of model ids"),
        ({"val": {CHAIR: [1]}}, "'val' must map each synset"),
        ({"name": None}, "not a split manifest"),
    ],
)
def test_bad_manifests(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        SplitManifest.read(manifest_file(tmp_path, **changes), tmp_path)


def test_a_manifest_that_is_no_json(tmp_path):
    (tmp_path / "m.json").write_text('{"name": "m", ')
    with pytest.raises(ValueError, match=r"m\.json: not JSON: .* line 1"):
        SplitManifest.read(tmp_path / "m.json", tmp_path)


def test_verify_finds_what_changed(tmp_path):
    good = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "same").write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"y")
    manifest = SplitManifest.read(
        manifest_file(tmp_path, files=dict.fromkeys(("same", "other", "gone"), good)), tmp_path
    )
    assert [tuple(entry) for entry in manifest.verify(tmp_path)] == [
        ("other", "its sha256 differs"),
        ("gone", "missing"),
    ]
    manifest.write(tmp_path / "copy.json")
    assert SplitManifest.read(tmp_path / "copy.json", tmp_path) == manifest
