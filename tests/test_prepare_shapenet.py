"""ShapeNetCore, dirty, made ready: steps, rejections, limits, lost workers; repair and watertight surfaces."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from vision3dgen import cli
from vision3dgen.datasets import (
    DAMAGES,
    Limits,
    Settings,
    ShapeNet,
    Shapes,
    damage,
    load_cameras,
    make_shape,
    prepare_shapenet,
    prepared,
)
from vision3dgen.io import load_npz, read_binvox, save_obj
from vision3dgen.ops.inside import contains
from vision3dgen.ops.meshes import ico_sphere
from vision3dgen.ops.repair import distortion, remesh_watertight, repair
from vision3dgen.parallel import Engine, Local, Lost, limited
from vision3dgen.structures import Camera, Frame, Meshes

TINY = {"views": 1, "points": 301, "image_size": 17, "resolutions": (8,), "renderer": "builtin"}
HERE = Local(0)  # no process of its own: tests are short


def write(
    folder: Path, synset: str, model: str, mesh: trimesh.Trimesh, name: str = "models/model_normalized.obj"
) -> Path:
    path = folder / synset / model / name
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(path)
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def core(tmp_path):
    folder = tmp_path / "in" / "ShapeNetCore.v2"
    box = trimesh.creation.box((1.0, 2.0, 3.0))
    box.faces[3] = box.faces[3][::-1]
    write(folder, "03001627", "aa", box)
    write(folder, "04379243", "tisch_\u00fc", trimesh.creation.icosphere(1), "model.obj")
    write(tmp_path / "in" / "ShapeNetCore.v1", "03001627", "AA", box, "model.obj")
    (folder / "03001627" / "empty" / "models").mkdir(parents=True)
    bad = folder / "03001627" / "bad" / "models" / "model_normalized.obj"
    bad.parent.mkdir(parents=True)
    bad.write_text("mtllib ../../secret.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl none\nf 1 2 3\n")
    return tmp_path / "in"


def test_a_dirty_folder_gives_models_and_reasons(core, tmp_path):
    out = tmp_path / "out"
    done = prepare_shapenet(core, out, Settings(**TINY), engine=HERE)
    assert (done.written, done.kept) == (2, 0)
    reasons = {entry.file: (entry.step, entry.error) for entry in done.rejected}
    assert set(reasons) == {
        "ShapeNetCore.v2/03001627/bad/models/model_normalized.obj",
        "ShapeNetCore.v2/03001627/empty",
        "ShapeNetCore.v1/03001627/AA/model.obj",
    }
    assert "nothing is inside" in reasons["ShapeNetCore.v2/03001627/bad/models/model_normalized.obj"][1]
    assert "another file has the id" in reasons["ShapeNetCore.v1/03001627/AA/model.obj"][1]
    written = json.loads((out / "manifest.json").read_text())
    assert [entry["model"] for entry in written["accepted"]] == ["aa", "tisch_\u00fc"]
    assert written["accepted"][0]["repair"]["turned"] == 1
    assert written["accepted"][0]["watertight"]
    assert [entry["file"] for entry in written["rejected"]] == [entry.file for entry in done.rejected]

    folder = out / "ShapeNetGeometry" / "03001627" / "aa"
    stored = load_npz(folder / "distances.npz")
    assert stored["distances"].shape == stored["near_distances"].shape == (301,)
    points = load_npz(out / "ShapeNet" / "03001627" / "aa" / "points.npz")
    inside = np.unpackbits(points["occupancies"], count=301).astype(bool)
    np.testing.assert_array_equal(stored["distances"] < 0, inside)
    half = np.array([1.0, 2.0, 3.0]) / 6
    where = points["points"].astype(np.float64)
    expected = np.linalg.norm(np.maximum(np.abs(where) - half, 0), axis=1)  # of a box, outside
    np.testing.assert_allclose(stored["distances"][~inside], expected[~inside], atol=1e-5)
    for name in ("model", "surface"):
        filled, _, _ = read_binvox(out / "ShapeNetVox8" / "03001627" / "aa" / f"{name}.binvox")
        assert filled.shape == (8, 8, 8)
        assert filled.any()

    before = tree(out)
    again = prepare_shapenet(core, out, Settings(**TINY), engine=HERE)
    assert (again.written, again.kept) == (0, 2)
    assert again.rejected == done.rejected
    assert tree(out) == before


class Unlucky(Engine):
    """Loses each job so many times."""

    def __init__(self, times: int):
        self.times = times

    def run(self, function, jobs, *, timeout=None):
        self.times -= 1
        for index, job in enumerate(jobs):
            yield index, Lost("its process died") if self.times >= 0 else function(job)


def test_a_lost_model_is_tried_twice(core, tmp_path):
    prepare_shapenet(core, tmp_path / "calm", Settings(**TINY), engine=HERE)
    prepare_shapenet(core, tmp_path / "once", Settings(**TINY), engine=Unlucky(1))
    assert tree(tmp_path / "once") == tree(tmp_path / "calm")
    twice = prepare_shapenet(core, tmp_path / "twice", Settings(**TINY), engine=Unlucky(2))
    assert twice.written == 0
    assert ("process", "2 times: its process died") in [(entry.step, entry.error) for entry in twice.rejected]
    prepare_shapenet(core, tmp_path / "twice", Settings(**TINY), engine=HERE)
    assert tree(tmp_path / "twice") == tree(tmp_path / "calm")


def test_a_model_over_time_is_rejected_with_its_step(core, tmp_path, monkeypatch):
    def slow(*_):
        signal.pause()

    monkeypatch.setattr(prepared, "_draw", slow)
    done = prepare_shapenet(core, tmp_path / "out", Settings(**TINY), engine=HERE, limits=Limits(seconds=3.0))
    late = [(entry.step, entry.error) for entry in done.rejected if entry.step == "views"]
    assert late == [("views", "took more than 3 s")] * 2
    monkeypatch.undo()
    assert prepare_shapenet(core, tmp_path / "out", Settings(**TINY), engine=HERE).written == 2


def test_what_a_killed_run_left_is_cleared(core, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    prepare_shapenet(core, other, Settings(**TINY), engine=HERE)
    folder = out / "ShapeNet" / "03001627" / "aa"
    folder.mkdir(parents=True)
    (folder / ".tmp-1234").write_bytes(b"half")
    prepare_shapenet(core, out, Settings(**TINY), engine=HERE)
    assert tree(out) == tree(other)


def test_a_million_faces_fit_in_the_default_limits(tmp_path):
    mesh = ico_sphere(8)
    path = tmp_path / "in" / "03001627" / "big" / "models" / "model_normalized.obj"
    path.parent.mkdir(parents=True)
    save_obj(path, mesh.verts_packed().numpy(), mesh.faces_packed().numpy())
    settings = Settings(**{**TINY, "renderer": "auto"}, steps=("repair", "points", "voxels", "views"))
    done = prepare_shapenet(tmp_path / "in", tmp_path / "out", settings, engine=HERE)  # limits: as by default
    assert (done.written, done.rejected) == (1, [])
    (line,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["accepted"]
    assert line["watertight"]
    points = load_npz(tmp_path / "out" / "ShapeNet" / "03001627" / "big" / "points.npz")
    inside = np.unpackbits(points["occupancies"], count=301).astype(bool)
    distance = np.linalg.norm(points["points"].astype(np.float64), axis=1)
    clear = np.abs(distance - 0.5) > 1e-3
    np.testing.assert_array_equal(inside[clear], (distance < 0.5)[clear])


@pytest.mark.parametrize("case", ["self-intersecting", "inner shell", "zero faces", "not a number"])
def test_meshes_that_are_odd_have_a_right_inside_or_a_reason(tmp_path, case):
    box = trimesh.creation.box((1.0, 1.0, 1.0))
    meshes = {
        "self-intersecting": [box, box.copy().apply_translation((0.5, 0.25, 0.25))],
        "inner shell": [box, trimesh.creation.box((0.5, 0.5, 0.5))],  # turned as the outer one: no cavity
    }
    path = tmp_path / "in" / "03001627" / "odd" / "models" / "model_normalized.obj"
    path.parent.mkdir(parents=True)
    if case in meshes:
        trimesh.util.concatenate(meshes[case]).export(path)
    else:
        path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n" + ("" if case == "zero faces" else "v nan 0 1\nf 1 2 4\n"))
    settings = Settings(**TINY, steps=("repair", "points"))
    done = prepare_shapenet(tmp_path / "in", tmp_path / "out", settings, engine=HERE)
    if case not in meshes:
        assert [(entry.step, done.written) for entry in done.rejected] == [("read", 0)], done.rejected
        return
    points = load_npz(tmp_path / "out" / "ShapeNet" / "03001627" / "odd" / "points.npz")
    inside = np.unpackbits(points["occupancies"], count=301).astype(bool)
    where = points["points"].astype(np.float64) * points["scale"] + points["loc"]  # the OBJ's coordinates
    frame = Frame.from_dict(
        json.loads((tmp_path / "out" / "ShapeNetGeometry" / "03001627" / "odd" / "frame.json").read_text())
    )
    original = frame.denormalize(torch.from_numpy(where)).numpy()
    expected = np.zeros(301, dtype=bool)
    for each in meshes[case]:
        expected |= ((original > each.bounds[0]) & (original < each.bounds[1])).all(1)
    np.testing.assert_array_equal(inside, expected)


def test_a_full_disk_stops_with_the_file_and_a_second_run_goes_on(core, tmp_path, monkeypatch):
    calm, full = tmp_path / "calm", tmp_path / "full"
    prepare_shapenet(core, calm, Settings(**TINY), engine=HERE)
    left = [7]  # files that still fit

    def sync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="No space left") as caught:
        prepare_shapenet(core, full, Settings(**TINY), engine=HERE)
    assert str(full) in str(caught.value)
    monkeypatch.undo()
    prepare_shapenet(core, full, Settings(**TINY), engine=HERE)
    assert tree(full) == tree(calm)


@pytest.fixture
def camera_file(tmp_path):
    cameras = [Camera.look_at((1.5 * side, 0.7, 1.2), field_of_view=40, image_size=(21, 21)) for side in (-1, 1)]
    arrays = {}
    for number, camera in enumerate(cameras):
        arrays[f"world_mat_{number}"] = torch.cat([camera.rotation, camera.translation[:, None]], 1).double().numpy()
        arrays[f"camera_mat_{number}"] = camera.intrinsics.double().numpy()
    np.savez(tmp_path / "cameras.npz", **arrays)
    return tmp_path / "cameras.npz"


def test_given_cameras_draw_and_are_read_again(core, tmp_path, camera_file):
    out = tmp_path / "out"
    arguments = ["prepare", "shapenet", str(core), str(out), "--points", "301", "--voxels", "8", "32"]
    arguments += ["--cameras", str(camera_file), "--image-size", "21", "--steps", "points", "voxels", "views"]
    assert cli.main(arguments) == 1  # something was rejected
    fields = ("image", "camera", "mesh", "voxels")
    data = ShapeNet(out, "all", categories=["04379243"], fields=fields, render_size=21, voxel_resolution=8)
    assert [item.rsplit("/", 1)[1] for item in (data[0]["id"], data[1]["id"])] == ["00", "01"]
    given = load_cameras(camera_file, 21)
    for index in range(2):
        item = data[index]
        assert item["voxels"].shape == (8, 8, 8)
        torch.testing.assert_close(item["camera"].rotation, given.rotation[index].float())
        torch.testing.assert_close(item["camera"].intrinsics, given.intrinsics[index].float())
        pixels = item["camera"].project(item["frame"].denormalize(item["mesh"]).verts_packed())[0]
        seen = (item["image"] < 1).any(0).nonzero().float()  # rows, columns: over white
        low, high = seen.amin(0).flip(0), seen.amax(0).flip(0) + 1
        assert (pixels.amin(0) - low).abs().max() < 1.5
        assert (pixels.amax(0) - high).abs().max() < 1.5
    shape = Shapes(str(out), "all", categories=["04379243"], fields=("camera",))[0]
    assert torch.equal(shape["camera"].translation.float(), data[0]["camera"].translation)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world_mat_0": np.zeros((3, 4))}, "world_mat_0 is no rotation"),
        ({"world_mat_1": np.full((3, 4), np.nan)}, "camera 1 has numbers that are not finite"),
        ({"camera_mat_1": np.eye(4)}, "camera_mat"),
        ({"what": np.eye(3)}, "KIND_NUMBER"),
    ],
)
def test_cameras_that_cannot_be_meant_are_named(camera_file, change, words):
    with np.load(camera_file) as found:
        np.savez(camera_file, **{**found, **change})
    with pytest.raises(ValueError, match=f"cameras.npz.*{words}"):
        load_cameras(camera_file, 21)


def test_voxels_of_a_resolution_that_is_not_there_are_named(core, tmp_path):
    out = tmp_path / "out"
    prepare_shapenet(core, out, Settings(**TINY), engine=HERE)
    with pytest.raises(ValueError, match=r"voxel_resolution=64.*ShapeNetVox8"):
        ShapeNet(out, "all", fields=("voxels",), voxel_resolution=64)


def test_options_of_a_step_that_is_left_out_are_refused(core, tmp_path, capsys):
    arguments = ["prepare", "shapenet", str(core), str(tmp_path / "out"), "--resolution", "32"]
    assert cli.main(arguments) == 2
    assert "--resolution is of the step watertight" in capsys.readouterr().err


def test_limits_name_what_was_exceeded():
    with pytest.raises(TimeoutError, match=r"took more than 0\.05 s"), limited(seconds=0.05):
        signal.pause()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with pytest.raises(ValueError, match="limits must be above 0"), limited(seconds=0):
        os.abort()


def test_no_models_and_unknown_steps(tmp_path):
    with pytest.raises(ValueError, match=r"no SYNSET/MODEL/models/model_normalized\.obj"):
        prepare_shapenet(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown step 'voxel'"):
        Settings(steps=("voxel",))


# ------------------------------------------------------------------------------------------------------------ repair


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_meshes_keep_their_inside(kind):
    shape = make_shape("chair", 5)
    mesh = Meshes([torch.from_numpy(shape.vertices).double()], [torch.from_numpy(shape.faces)])
    mesh = Frame.longest_edge(mesh.verts_packed()).normalize(mesh)
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(4001, 3, generator=generator, dtype=torch.float64) - 0.5) * 1.1
    truth = contains(mesh, points)
    mended = repair(damage(mesh, kind, 0.02, generator=generator))
    assert (contains(mended.mesh, points, beta=2.0) == truth).double().mean() > 0.98
    count = len(mesh.faces_packed())
    if kind == "flipped":
        assert torch.equal(mended.mesh.faces_packed().sort(1).values, mesh.faces_packed().sort(1).values)
        assert mended.report.turned == round(0.02 * count)
    if kind == "doubled":
        assert mended.report.doubled == round(0.02 * count)
        assert torch.equal(mended.mesh.faces_packed(), mesh.faces_packed())


def test_cavities_stay_and_inverted_parts_are_turned():
    ball = ico_sphere(2)
    verts, faces = ball.verts_packed().double(), ball.faces_packed()
    count = len(verts)
    hollow = Meshes([torch.cat([verts, 0.5 * verts])], [torch.cat([faces, faces.flip(1) + count])])
    assert repair(hollow).report.turned == 0
    assert repair(hollow).report.is_clean
    apart = Meshes([torch.cat([verts, verts + 3])], [torch.cat([faces, faces.flip(1) + count])])
    assert torch.equal(repair(apart).mesh.faces_packed(), torch.cat([faces, faces + count]))
    out = repair(Meshes([verts], [faces.flip(1)]))
    assert out.report.turned == len(faces)
    with pytest.raises(ValueError, match="one mesh, got 2"):
        repair(ball.extend(2))


def test_a_watertight_surface_lies_where_the_mesh_does():
    ball = ico_sphere(3)
    torn = damage(ball, "removed", 0.02, generator=torch.Generator().manual_seed(0))
    made = remesh_watertight(torn, 24, renderer="builtin")
    assert repair(made.mesh).report.watertight
    assert made.distortion.mean < 0.01
    assert distortion(ball, ball, renderer="builtin").largest < 1e-6
    sheet = Meshes([torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])], [torch.tensor([[0, 1, 2]])])
    with pytest.raises(ValueError, match="nothing is inside"):
        remesh_watertight(sheet, 16)
    assert repair(remesh_watertight(sheet, 16, thickness=0.1, renderer="builtin").mesh).report.watertight
