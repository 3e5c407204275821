"""Files in and out: order kept, bytes deterministic, every fault named, nothing half written."""

import errno
import json
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from vision3dgen import files, io
from vision3dgen.structures import Meshes, Pointclouds

# A square pyramid: 5 vertices (one of them used by no triangle of its base), a quad and triangles.
VERTS = [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [2.0, 3.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 5.0]]
QUAD_FAN = [[0, 3, 2], [0, 2, 1], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]]
COLORS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [51 / 255, 102 / 255, 153 / 255], [0.0, 0.0, 0.0]]


def pyramid(**attributes) -> Meshes:
    vert = {name: [torch.tensor(value)] for name, value in attributes.items()}
    return Meshes([torch.tensor(VERTS)], [torch.tensor(QUAD_FAN)], verts_attributes=vert)


def random_mesh(seed: int = 0, verts: int = 13, faces: int = 17) -> Meshes:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(verts, 3, generator=generator)
    corners = torch.rand(faces, verts, generator=generator).argsort(1)[:, :3]
    return Meshes([points], [corners])


def same(a: Meshes, b: Meshes, tolerance: float = 0.0) -> bool:
    close = torch.allclose(a.verts_packed(), b.verts_packed(), rtol=0, atol=tolerance)
    return close and torch.equal(a.faces_packed(), b.faces_packed())


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def fault(call, kind: type[Exception] = io.FileError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def full_disk(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)


# -------------------------------------------------------------------------------------------- writing and paths


def test_atomic_write_replaces_at_the_end_only(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with io.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), io.atomic_write(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_atomic_write_follows_a_link_and_honours_the_umask(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with io.atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_write_names_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/a\.obj"), io.atomic_write(tmp_path / "none" / "a.obj"):
        pass
    with pytest.raises(FileNotFoundError, match="elsewhere"), io.atomic_write(tmp_path / "a.obj"):
        (tmp_path / "elsewhere").read_bytes()  # a fault of the block stays its own
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, write",
    [
        *[
            (f"a{suffix}", lambda path: io.save_mesh(path, pyramid()))
            for suffix in (".obj", ".off", ".ply", ".stl", ".glb")
        ],
        ("a.xyz", lambda path: io.save_pointcloud(path, Pointclouds([torch.zeros(1, 3)]))),
        ("a.binvox", lambda path: io.write_binvox(path, torch.ones(2, 3, 5, dtype=torch.bool))),
        ("a.npz", lambda path: io.save_npz(path, x=np.zeros(3))),
        ("a.png", lambda path: io.write_png(path, np.zeros((2, 3), np.uint8))),
        ("d.png", lambda path: io.write_depth_png(path, np.zeros((2, 3)))),
    ],
)
def test_full_disk_keeps_the_old_file(tmp_path, full_disk, name, write):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(OSError, match=rf"cannot write, No space left on device.*{name}") as caught:
        write(tmp_path / name)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / name).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_safe_join(tmp_path):
    inside = tmp_path / "root"
    (inside / "a").mkdir(parents=True)
    assert io.safe_join(inside, "a/b.obj") == inside / "a" / "b.obj"
    assert io.safe_join(inside, "a..b/..c") == inside / "a..b" / "..c"
    (inside / "link").symlink_to(tmp_path)
    (inside / "loop").symlink_to(inside / "a")
    assert io.safe_join(inside, "loop/x") == inside / "loop" / "x"
    for entry in (
        "../x",
        "a/../../x",
        "a/..",
        "..",
        "/etc/passwd",
        "",
        "C:/x",
        "C:x",
        "\\x",
        "a\\..\\..\\x",
        "a\0b",
        "link/x",
    ):
        assert repr(entry) in fault(lambda entry=entry: io.safe_join(inside, entry))


# ------------------------------------------------------------------------------------------------------- meshes


def test_obj_keeps_the_order_of_the_file(write):
    path = write(
        "a.obj",
        "# a comment\nmtllib none.mtl\no thing\nv 0 0 0\nv 2 0 0 # another\nv 2 3 0\r\nv 0 3 0\nvt 0 0\nvt 1 1\n"
        "vn 0 0 1\n\tv  1  1 \\\n 5.0e0\ns off\nf 1/1/1 4/2/1 3/1/1 2/2/1\n"
        "f -5//1 -4//1 -1//1\nf 2/1 3/2 5/1\nf 3 4 5\nl 1 2\nf 4 1 5\n",
    )
    mesh = io.load_mesh(path)
    assert mesh.verts_packed().tolist() == VERTS
    assert mesh.faces_packed().tolist() == QUAD_FAN
    assert mesh.verts_packed().dtype == torch.float32
    assert mesh.verts_attributes_packed() == {}


def test_negative_indices_count_from_their_own_line(write):
    path = write("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 0 0 1\nf -4 -3 -1\nf 1 2 -1\n")
    assert io.load_mesh(path).faces_packed().tolist() == [[0, 1, 2], [0, 1, 3], [0, 1, 3]]


def test_obj_vertex_colors_and_weights(write):
    path = write("a.obj", "v 0 0 0 1 0 0\nv 1 0 0 0 0.5 0\nv 0 1 0 0 0 1\nf 1 2 3\n")
    assert io.load_mesh(path).verts_attributes_packed()["color"].tolist() == [[1, 0, 0], [0, 0.5, 0], [0, 0, 1]]
    path = write("a.obj", "v 0 0 0 1\nv 1 0 0 1\nv 0 1 0 1 0.5 0.5 0.5\nf 1 2 3\n")  # not all colored
    assert io.load_mesh(path).verts_attributes_packed() == {}


def test_obj_material_colors(write, tmp_path):
    text = "mtllib some file.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\nusemtl red one\nf 1 2 3 1\nusemtl gone\n"
    text += "f 1 2 3\nusemtl b\nf 3 2 1\n"
    path = write("a.obj", text)
    assert io.load_mesh(path).faces_attributes_packed() == {}  # the library is not there
    write("some file.mtl", "# c\nnewmtl red one\nKa 1 1 1\nKd 1 0 0.25\n\nnewmtl b\nKd 0.5\nnewmtl c\nKd spectral f\n")
    colors = io.load_mesh(path).faces_attributes_packed()["color"]
    assert colors.tolist() == [[1, 1, 1], [1, 0, 0.25], [1, 0, 0.25], [1, 1, 1], [0.5, 0.5, 0.5]]
    assert io.load_mesh(path, materials=False).faces_attributes_packed() == {}
    write("some file.mtl", "newmtl b\nKd 1 x 0\n")
    assert "some file.mtl, line 2: 'x' is not a number" in fault(lambda: io.load_mesh(path), io.MeshError)
    (tmp_path / "inner").mkdir()
    escaping = write("inner/a.obj", text.replace("some file.mtl", "../some file.mtl"))
    assert io.load_mesh(escaping).faces_attributes_packed() == {}


def test_real_meshes_keep_every_vertex(shared_data):
    for path in sorted((shared_data / "meshes").glob("*.obj")):
        lines = [line.split() for line in path.read_text(encoding="latin-1").split("\n")]
        verts = [[float(word) for word in words[1:4]] for words in lines if words[:1] == ["v"]]
        corners = [len(words) - 1 for words in lines if words[:1] == ["f"]]
        mesh = io.load_mesh(path)
        assert torch.equal(mesh.verts_packed(), torch.tensor(verts))
        assert len(mesh.faces_packed()) == sum(corners) - 2 * len(corners)


@pytest.mark.parametrize("head", ["OFF\n5 5 0\n", "OFF5 5 0\n", "OFF 5 5 0\n", "# c\n\nOFF # c\n# c\n5 5\n"])
def test_off_headers(write, head):
    body = "0 0 0\n2 0 0\n\n2 3 0 # c\n0 3 0\n1 1 5\n4 0 3 2 1\n3 0 1 4\n3 1 2 4\n3 2 3 4\n3 3 0 4\n"
    mesh = io.load_mesh(write("a.off", head + body))
    assert mesh.verts_packed().tolist() == VERTS
    assert mesh.faces_packed().tolist() == QUAD_FAN
    assert mesh.faces_attributes_packed() == {}


def test_off_colors(write):
    path = write(
        "a.off",
        "CNOFF\n3 2 0\n0 0 0 0 0 1 255 0 51 255\n1 0 0 0 0 1 0 0 0 255\n0 1 0 0 0 1 0 0 0 255\n"
        + "3 0 1 2 0.5 0 1\n" * 2,
    )
    mesh = io.load_mesh(path)
    assert torch.allclose(mesh.verts_attributes_packed()["color"][0], torch.tensor([1, 0, 0.2]))
    assert mesh.verts_attributes_packed()["normal"].tolist() == [[0, 0, 1]] * 3
    assert mesh.faces_attributes_packed()["color"].tolist() == [[0.5, 0, 1]] * 2


def ply(kind: str, faces: list[list[int]], *, flags: bool = False, more: str = "") -> bytes:
    """A PLY written value by value: vertices of VERTS as doubles with byte colors, then `faces`."""
    order = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}[kind]
    header = f"ply\nformat {kind} 1.0\ncomment c\nelement vertex 5\n"
    header += "property double x\nproperty double y\nproperty double z\n"
    header += "property uchar red\nproperty uchar green\nproperty uchar blue\n"
    header += f"element face {len(faces)}\n" + ("property short flag\n" if flags else "")
    header += f"property list uchar int vertex_indices\n{more}end_header\n"
    rows = [([*v, *(round(255 * x) for x in c)], "dddBBB") for v, c in zip(VERTS, COLORS)]
    rows += [([*([-7] if flags else []), len(f), *f], ("h" if flags else "") + f"B{len(f)}i") for f in faces]
    if order is None:
        return (header + "".join(" ".join(map(str, values)) + "\n" for values, _ in rows)).encode()
    return header.encode() + b"".join(struct.pack(order + form, *values) for values, form in rows)


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_ply_kinds(write, kind, flags, mixed):
    faces = [[0, 3, 2, 1], *QUAD_FAN[2:]] if mixed else QUAD_FAN
    mesh = io.load_mesh(write("a.ply", ply(kind, faces, flags=flags)))
    assert mesh.verts_packed().tolist() == VERTS
    assert mesh.faces_packed().tolist() == QUAD_FAN
    assert torch.allclose(mesh.verts_attributes_packed()["color"], torch.tensor(COLORS))


def test_stl_text_and_binary_join_equal_corners_in_order(write):
    corners = np.array([[VERTS[i] for i in face] for face in QUAD_FAN], np.float32)
    corners[0, 0] = -0.0
    facets = "".join(
        "facet normal 0 0 0\n outer loop\n"
        + "".join(f"  vertex {x} {y} {z}\n" for x, y, z in c)
        + " endloop\nendfacet\n"
        for c in corners
    )
    text = write("a.stl", f"solid thing\n{facets}endsolid thing\n")
    body = b"".join(np.zeros(3, np.float32).tobytes() + c.tobytes() + b"\0\0" for c in corners)
    binary = write("b.stl", b"solid but binary".ljust(80) + struct.pack("<I", 6) + body)
    first_use = [0, 3, 2, 1, 4]
    for path in (text, binary):
        mesh = io.load_mesh(path)
        assert mesh.verts_packed().tolist() == [VERTS[i] for i in first_use]
        assert [[first_use[i] for i in face] for face in mesh.faces_packed().tolist()] == QUAD_FAN


def test_glb_scene_is_flattened_with_its_transforms(tmp_path):
    part = trimesh.Trimesh(VERTS, QUAD_FAN, process=False)
    colored = trimesh.Trimesh(VERTS, QUAD_FAN, vertex_colors=[[255, 0, 51, 255]] * 5, process=False)
    move, mirror = np.eye(4), np.diag([-1.0, 2.0, 1.0, 1.0])
    move[:3, 3] = [7.0, 11.0, 13.0]
    scene = trimesh.Scene()
    scene.add_geometry(part, node_name="a", geom_name="part", transform=move)
    scene.add_geometry(colored, node_name="b", geom_name="colored", transform=mirror)
    (tmp_path / "a.glb").write_bytes(scene.export(file_type="glb"))
    mesh = io.load_mesh(tmp_path / "a.glb")
    verts = torch.tensor(VERTS)
    placed = [verts + torch.tensor([7.0, 11, 13]), verts * torch.tensor([-1.0, 2, 1])]
    order = [0, 1] if torch.equal(mesh.verts_packed()[:5], placed[0]) else [1, 0]
    assert torch.equal(mesh.verts_packed(), torch.cat([placed[i] for i in order]))
    parts = mesh.faces_packed().view(2, 6, 3) - torch.tensor([0, 5])[:, None, None]
    assert parts[order[0]].tolist() == QUAD_FAN
    assert parts[order[1]].tolist() == [face[::-1] for face in QUAD_FAN]  # mirrored: the outside stays out
    colors = mesh.verts_attributes_packed()["color"].view(2, 5, 3)
    assert torch.allclose(colors[order[1]], torch.tensor([1.0, 0, 0.2]))
    assert torch.equal(io.from_trimesh(scene).verts_packed().sort(0).values, mesh.verts_packed().sort(0).values)


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply", ".stl", ".glb"])
def test_mesh_round_trip(tmp_path, suffix):
    mesh = random_mesh()
    path = tmp_path / f"a{suffix.upper()}"
    io.save_mesh(path, mesh)
    again = io.load_mesh(path)
    if suffix == ".stl":
        corners = mesh.verts_packed()[mesh.faces_packed()]
        assert torch.equal(again.verts_packed()[again.faces_packed()], corners)
        assert len(again.verts_packed()) == len(corners.view(-1, 3).unique(dim=0))
    else:
        assert same(again, mesh)  # exact in float32
    io.save_mesh(tmp_path / f"b{suffix}", mesh)
    assert (tmp_path / f"b{suffix}").read_bytes() == path.read_bytes()
    assert len(trimesh.load_mesh(tmp_path / f"b{suffix}").faces) == len(mesh.faces_packed())  # others read it


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply"])
def test_double_precision_round_trip(tmp_path, suffix):
    verts = np.array(VERTS) / 3.0 + 1000.0
    io.save_mesh(tmp_path / f"a{suffix}", (verts, QUAD_FAN))
    loaded = trimesh.load_mesh(tmp_path / f"a{suffix}", process=False)
    assert np.abs(loaded.vertices - verts).max() < 1e-6


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply", ".glb"])
def test_vertex_colors_round_trip(tmp_path, suffix):
    io.save_mesh(tmp_path / f"a{suffix}", pyramid(color=COLORS))
    again = io.load_mesh(tmp_path / f"a{suffix}")
    assert same(again, pyramid())
    assert torch.allclose(again.verts_attributes_packed()["color"], torch.tensor(COLORS), atol=1e-6)


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply"])
def test_face_colors_round_trip(tmp_path, suffix):
    colors = torch.tensor([*COLORS, COLORS[0]])
    mesh = Meshes([torch.tensor(VERTS)], [torch.tensor(QUAD_FAN)], faces_attributes={"color": [colors]})
    io.save_mesh(tmp_path / f"a{suffix}", mesh)
    again = io.load_mesh(tmp_path / f"a{suffix}")
    assert same(again, mesh)
    assert torch.allclose(again.faces_attributes_packed()["color"], colors, atol=1e-6)


def test_ply_normals_round_trip(tmp_path):
    normals = pyramid().verts_normals_packed()
    io.save_mesh(tmp_path / "a.ply", pyramid(normal=normals.tolist(), color=COLORS))
    again = io.load_mesh(tmp_path / "a.ply").verts_attributes_packed()
    assert torch.equal(again["normal"], normals)
    assert torch.allclose(again["color"], torch.tensor(COLORS))


def test_save_warns_of_what_the_format_cannot_hold(tmp_path):
    with pytest.warns(UserWarning, match=r"a\.stl: cannot hold verts_attributes \['color', 'normal'\], left out"):
        io.save_mesh(tmp_path / "a.stl", pyramid(color=COLORS, normal=COLORS))
    with pytest.warns(UserWarning, match=r"verts_attributes \['label'\]"):
        io.save_mesh(tmp_path / "a.ply", pyramid(color=COLORS, label=[[0.0]] * 5))
    assert "color" in io.load_mesh(tmp_path / "a.ply").verts_attributes_packed()


def test_mesh_without_faces_can_be_written(tmp_path):
    empty = Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.int64)])
    for suffix in (".obj", ".off", ".ply", ".stl"):
        io.save_mesh(tmp_path / f"a{suffix}", empty)
        message = fault(lambda suffix=suffix: io.load_mesh(tmp_path / f"a{suffix}"), io.MeshError)
        assert message.endswith("the file is empty" if suffix == ".obj" else "no vertices")
    assert "cannot hold a mesh without faces" in fault(lambda: io.save_mesh(tmp_path / "a.glb", empty), io.MeshError)


def test_save_refuses_what_could_not_be_read_back(tmp_path):
    path = tmp_path / "a.ply"
    path.write_bytes(b"old")
    two = Meshes([torch.zeros(3, 3)] * 2, [torch.tensor([[0, 1, 2]])] * 2)
    bad = np.array(VERTS)
    bad[3, 1] = np.nan
    for mesh, words in [
        (two, "a batch of 2"),
        ((bad, QUAD_FAN), "vertex 3 is not finite"),
        ((VERTS, [[0, 1, 2], [0, 1, 5]]), "face 1 is [0, 1, 5], there are 5 vertices"),
        ((VERTS, [[0, 1]]), "must be (V, 3) and faces (F, 3)"),
        ((np.zeros((4, 2)), QUAD_FAN), "must be (V, 3)"),
    ]:
        message = fault(lambda mesh=mesh: io.save_mesh(path, mesh), io.MeshError)
        assert message.startswith(str(path))
        assert words in message
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.ply"]


TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
BAD_MESHES = [
    ("a.obj", b"", "the file is empty"),
    ("a.obj", b"  \n\n", "the file is empty"),
    ("a.obj", b"# nothing\n", "no vertices"),
    ("a.obj", TRIANGLE, "no faces (3 vertices)"),
    ("a.obj", "f 1 2 3\n", "no vertices"),
    ("a.obj", TRIANGLE + "f 1 2 4\n", "face 0 (line 4) uses vertex 4 (the first is 1), the file has 3 vertices"),
    ("a.obj", TRIANGLE + "f 1 2 3\nf 1 0 2\n", "face 1 (line 5) uses vertex 0"),
    ("a.obj", TRIANGLE + "f 1 2 -4\n", "face 0 (line 4) uses vertex 0"),
    ("a.obj", TRIANGLE + "f 1 2 3\nf 1 2\n", "face 1 (line 5) has 2 corners, needs 3"),
    ("a.obj", TRIANGLE + "f 1 2 x/1\n", "line 4: 'x' is not an integer"),
    ("a.obj", TRIANGLE + "f 1 2 1.5\n", "line 4: '1.5' is not an integer"),
    ("a.obj", TRIANGLE + "f 1 2 " + "9" * 30 + "\n", "line 4: '" + "9" * 30 + "' is not an integer"),
    ("a.obj", "v 0 0 0\nv 0 nan 0\nv 0 1 0\nf 1 2 3\n", "vertex 1 (line 2) is not finite"),
    ("a.obj", "v 0 0 0\nv 0 1 0\n\nv 0 1 -inf\nf 1 2 3\n", "vertex 2 (line 4) is not finite"),
    ("a.obj", "v 0 0 0\nv 0 1 0\nv 0 1 1e39\nf 1 2 3\n", "vertex 2 (line 3) is not finite"),
    ("a.obj", "v 0 0 0\nv 0 1\n", "line 2: a vertex needs 3 numbers, got 2"),
    ("a.obj", "v 0 0 0\nv 0 1,0 2\n", "line 2: '1,0' is not a number"),
    ("a.obj", b"\x00\x01\x02" * 99, "binary data"),
    ("a.off", "OF\n", "not an OFF file"),
    ("a.off", b"\x00\x01\x02" * 99, "binary data"),
    ("a.off", "# only\n", "not an OFF file"),
    ("a.off", "OFF\n", "line 1: the numbers of vertices and faces are missing"),
    ("a.off", "OFF\n3 x 0\n", "line 2: 'x' is not an integer"),
    (
        "a.off",
        "OFF\n999999999999 999999999999 0\n0 0 0\n",
        "says 999999999999 vertices and 999999999999 faces, 1 lines",
    ),
    ("a.off", "OFF\n-1 2 0\n0 0 0\n", "says -1 vertices"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1\n3 0 1 2\n", "line 5: a vertex needs 3 numbers, got 2"),
    ("a.off", "COFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "line 3: a vertex needs 6 numbers, got 3"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", "line 6: a face of 3 corners, 2 numbers follow"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "face 0 (line 6) uses vertex 3 (the first is 0)"),
    ("a.off", "OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no faces"),
    ("a.ply", b"\x00\x01", "not a PLY file"),
    ("a.ply", b"plywood", "not a PLY file"),
    ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 3\n", "cut short, the header has no end"),
    (
        "a.ply",
        b"ply\nformat ascii 2\nelement vertex -3\nend_header\n",
        "line 3: cannot read the header line 'element vertex -3'",
    ),
    ("a.ply", b"ply\nformat zip 1.0\nend_header\n", "line 2: cannot read"),
    ("a.ply", b"ply\nelement vertex 1\nend_header\n", "names no format"),
    ("a.ply", b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "line 3: cannot read"),
    ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty quad x\nend_header\n", "line 4: cannot read"),
    (
        "a.ply",
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n",
        "no vertex element with x, y and z",
    ),
    ("a.ply", ply("ascii", QUAD_FAN)[:-9], "says 11 rows, 10 lines follow"),
    ("a.ply", ply("ascii", QUAD_FAN)[:-3], "line 24: not the properties of a face"),
    ("a.ply", ply("ascii", QUAD_FAN)[:-1] + b" 1\n", "line 24: not the properties of a face"),
    ("a.ply", ply("ascii", QUAD_FAN) + b"1\n", "says 11 rows, 12 lines follow"),
    ("a.ply", ply("ascii", QUAD_FAN).replace(b"255 0 0", b"256 0 0"), "line 14: not the properties of a vertex"),
    ("a.ply", ply("ascii", QUAD_FAN).replace(b"2.0 3.0", b"2.0 x"), "line 16: 'x' is not a number"),
    ("a.ply", ply("ascii", QUAD_FAN).replace(b"2.0 3.0", b"2.0 nan"), "vertex 2 is not finite"),
    ("a.ply", ply("binary_little_endian", QUAD_FAN)[:-1], "face 5 of 6 runs past the end of the file"),
    ("a.ply", ply("binary_little_endian", [[0, 1, 2, 3], [0, 1, 2]])[:-1], "face 1 of 2 runs past the end of the file"),
    ("a.ply", ply("binary_little_endian", QUAD_FAN) + b"1", "1 bytes follow the last row"),
    ("a.ply", ply("binary_little_endian", [[0, 1, 2], [0, 1, 9]]), "face 1 uses vertex 9"),
    ("a.ply", ply("binary_little_endian", [[0, 1, -2]]), "face 0 uses vertex -2"),
    ("a.ply", ply("binary_little_endian", []), "no faces"),
    (
        "a.ply",
        ply("binary_big_endian", QUAD_FAN).replace(b"vertex 5", b"vertex 999999999999"),
        "says 999999999999 vertex rows",
    ),
    ("a.ply", ply("ascii", QUAD_FAN).replace(b"vertex 5", b"vertex 999999999999"), "says 1000000000005 rows"),
    ("a.ply", ply("ascii", QUAD_FAN).replace(b"vertex_indices", b"corners"), "no faces; a face element needs"),
    ("a.stl", b"\x01" * 50, "not an STL file"),
    ("a.stl", b"\0" * 80 + b"\xff\xff\xff\xff" + b"\0" * 50, "says 4294967295 triangles"),
    ("a.stl", b"\0" * 84, "no vertices"),
    (
        "a.stl",
        "solid a\nfacet\nvertex 0 0 0\nvertex 1 0 0\nendfacet\nendsolid\n",
        "line 5: a facet needs 3 vertices, got 2",
    ),
    ("a.stl", "solid a\nvertex 0 0\nendsolid\n", "line 2: a vertex needs 3 numbers"),
    ("a.stl", "solid a\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendfacet\n" * 3, "cut short, no endsolid"),
    ("a.glb", b"glTF", "not a GLB file"),
    ("a.glb", b"glTF" + struct.pack("<II", 1, 20) + b"\0" * 8, "glTF version 1"),
    ("a.glb", b"glTF" + struct.pack("<II", 2, 99) + b"\0" * 8, "says 99 bytes, the file has 20"),
    ("a.glb", b"glTF" + struct.pack("<IIII", 2, 20, 4000, 0), "a chunk of 4000 bytes at byte 12"),
    ("a.glb", b"glTF" + struct.pack("<II", 2, 24) + struct.pack("<I", 4) + b"JSON{]  ", "trimesh cannot read it"),
    ("a.xyz", "0 0 0\n", "unknown extension '.xyz'; choose from"),
    ("a", "0 0 0\n", "unknown extension ''"),
]


@pytest.mark.parametrize("name, content, words", BAD_MESHES)
def test_faulty_mesh_names_file_and_reason(write, name, content, words):
    path = write(name, content)
    message = fault(lambda: io.load_mesh(path), io.MeshError)
    assert message.startswith(str(path))
    assert words in message


def test_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.obj"):
        io.load_mesh(tmp_path / "none.obj")


@pytest.mark.parametrize("suffix", [".off", ".ply", ".stl", ".glb"])
def test_every_cut_of_a_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    io.save_mesh(path, pyramid())
    whole = path.read_bytes()
    for stop in range(len(whole) - 2 if suffix == ".off" else len(whole)):  # "4\n" may become "4" and mean the same
        path.write_bytes(whole[:stop])
        fault(lambda: io.load_mesh(path), io.MeshError)


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply", ".stl", ".glb", ".npz", ".binvox", ".png"])
def test_flipped_bytes_give_a_result_or_a_clear_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        io.save_npz(path, points=np.array(VERTS), normals=np.array(VERTS))
    elif suffix == ".binvox":
        io.write_binvox(path, torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5)
    elif suffix == ".png":
        io.write_png(path, np.arange(105, dtype=np.uint8).reshape(5, 7, 3))
    else:
        io.save_mesh(path, pyramid(color=COLORS) if suffix != ".stl" else pyramid())
    read = {".npz": io.load_npz, ".binvox": io.read_binvox, ".png": io.read_image}.get(suffix, io.load_mesh)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = whole.copy()
        damaged[random.integers(len(whole), size=random.integers(1, 4))] = random.integers(256)
        path.write_bytes(damaged.tobytes())
        try:
            read(path)
        except io.FileError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 (a damaged file may still be a valid one)


def test_save_obj_with_materials(tmp_path):
    materials = {"wood": (0.5, 0.25, 0.125), "steel": (0.7, 0.7, 0.8)}
    for name in ("a.obj", "b.obj"):
        io.save_obj(tmp_path / name, VERTS, QUAD_FAN, face_material=[0, 0, 1, 1, 0, 1], materials=materials)
    text = (tmp_path / "a.obj").read_text()
    assert text.startswith("mtllib a.mtl\nv 0 0 0\nv 2 0 0\n")
    assert text.endswith("usemtl wood\nf 3 4 5\nusemtl steel\nf 4 1 5\n")
    assert text.count("usemtl") == 4
    assert (tmp_path / "b.obj").read_text() == text.replace("a.mtl", "b.mtl")
    assert (tmp_path / "a.mtl").read_bytes() == (tmp_path / "b.mtl").read_bytes()
    mesh = io.load_mesh(tmp_path / "a.obj")
    assert mesh.verts_packed().tolist() == VERTS
    assert mesh.faces_packed().tolist() == QUAD_FAN
    wood, steel = (torch.tensor(color) for color in materials.values())
    expected = torch.stack([wood, wood, steel, steel, wood, steel])
    assert torch.equal(mesh.faces_attributes_packed()["color"], expected)
    io.save_obj(tmp_path / "c.obj", np.array(VERTS), torch.tensor(QUAD_FAN))
    assert not (tmp_path / "c.mtl").exists()


@pytest.mark.parametrize(
    "index, materials, words",
    [
        ([0] * 5, {"a": (0, 0, 0)}, "face_material must be (6,) indices into 1 materials, got (5,)"),
        ([0, 0, 0, 0, 0, 1], {"a": (0, 0, 0)}, "in [0, 1]"),
        ([0] * 6, {"a b": (0, 0, 0)}, "material 'a b' must be one word"),
        ([0] * 6, {"a": (0, 0, 2)}, "3 numbers in [0, 1]"),
        ([0] * 6, {"a": (0, 0)}, "3 numbers in [0, 1]"),
        ([0] * 6, None, "belong together"),
        (None, {"a": (0, 0, 0)}, "belong together"),
    ],
)
def test_save_obj_refuses_faulty_materials(tmp_path, index, materials, words):
    call = lambda: io.save_obj(tmp_path / "a.obj", VERTS, QUAD_FAN, face_material=index, materials=materials)  # noqa: E731
    assert words in fault(call, io.MeshError)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------- point clouds


@pytest.mark.parametrize("suffix", [".ply", ".npz", ".xyz"])
@pytest.mark.parametrize("normals, colors", [(False, False), (True, False), (True, True), (False, True)])
def test_pointcloud_round_trip(tmp_path, suffix, normals, colors):
    points, normal = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    color = torch.arange(21).view(7, 3) / 255.0
    cloud = Pointclouds([points], [normal] if normals else None, [color] if colors else None)
    path = tmp_path / f"a{suffix}"
    if suffix == ".xyz" and colors and not normals:
        with pytest.warns(UserWarning, match=r"cannot hold points_attributes \['color'\]"):
            io.save_pointcloud(path, cloud)
        colors = False
    else:
        io.save_pointcloud(path, cloud)
    again = io.load_pointcloud(path)
    assert torch.equal(again.points_packed(), points)
    assert (again.normals_packed() is not None) == normals
    assert (again.features_packed() is not None) == colors
    if normals:
        assert torch.equal(again.normals_packed(), normal)
    if colors:
        assert torch.allclose(again.features_packed(), color, atol=1e-7)


def test_pointcloud_files_of_others(write, tmp_path):
    np.savez(
        tmp_path / "a.npz", points=np.ones((7, 3), np.float16), normals=np.ones((7, 3), np.float16), loc=0, scale=1
    )
    assert io.load_pointcloud(tmp_path / "a.npz").points_packed().dtype == torch.float32
    assert io.load_pointcloud(write("a.ply", ply("ascii", []))).points_packed().tolist() == VERTS
    wide = Pointclouds([torch.zeros(2, 3)], features=[torch.ones(2, 5)])
    with pytest.warns(UserWarning, match=r"\['color'\]"):
        io.save_pointcloud(tmp_path / "b.ply", wide)
    io.save_pointcloud(tmp_path / "b.npz", wide)
    assert io.load_pointcloud(tmp_path / "b.npz").features_packed().shape == (2, 5)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.xyz", "", "the file is empty"),
        ("a.xyz", "# c\n", "no points"),
        ("a.xyz", "0 0 0\n1 2\n", "line 2: needs 3, 6 or 9 numbers"),
        ("a.xyz", "0 0 0\n0 0 0 0 0 0\n", "line 2: needs 3, 6 or 9 numbers"),
        ("a.xyz", "0 0 0\n0 x 0\n", "line 2: 'x' is not a number"),
        ("a.xyz", "0 0 0\n0 nan 0\n", "vertex 1 is not finite"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "no vertex element"),
        ("a.pcd", "x", "unknown extension '.pcd'; choose from ['.npz', '.ply', '.xyz']"),
        ("a.npz", "x", "not an npz file"),
    ],
)
def test_faulty_pointcloud(write, name, content, words):
    path = write(name, content)
    message = fault(lambda: io.load_pointcloud(path))
    assert message.startswith(str(path))
    assert words in message


def test_faulty_pointcloud_arrays(tmp_path):
    path = tmp_path / "a.npz"
    io.save_npz(path, points=np.zeros((5, 3)), normals=np.zeros((4, 3)))
    assert "normal must be (5, 3) numbers, got (4, 3)" in fault(lambda: io.load_pointcloud(path))
    io.save_npz(path, points=np.zeros((5, 2)))
    assert "points must be (5, 3) numbers, got (5, 2)" in fault(lambda: io.load_pointcloud(path))
    io.save_npz(path, xyz=np.zeros((5, 3)))
    assert "no array 'points'; it has ['xyz']" in fault(lambda: io.load_pointcloud(path))
    assert "a batch of 2" in fault(lambda: io.save_pointcloud(path, Pointclouds([torch.zeros(2, 3)] * 2)))


# ------------------------------------------------------------------------------------------------------- voxels


def test_binvox_axes_by_hand(write):
    """x slowest, then z, then y: voxel (x, y, z) = (1, 0, 2) of 2 x 3 x 5 (x, y, z) is number 1*15 + 2*3 + 0 = 21."""
    data = bytes([0, 21, 1, 1, 0, 5, 1, 3])  # 30 voxels; then (x, y, z) = (1, 0..2, 4)
    header = b"#binvox 1\ndim 2 5 3\ntranslate -0.5 0.25 1e-1\nscale 2.5\ndata\n"
    voxels, translate, scale = io.read_binvox(write("a.binvox", header + data))
    expected = torch.zeros(5, 3, 2, dtype=torch.bool)  # (z, y, x)
    expected[2, 0, 1] = expected[4, 0, 1] = expected[4, 1, 1] = expected[4, 2, 1] = True
    assert torch.equal(voxels, expected)
    assert (translate, scale) == ((-0.5, 0.25, 0.1), 2.5)


@pytest.mark.parametrize("shape", [(5, 3, 2), (32, 32, 32), (1, 1, 1), (7, 11, 13), (3, 1, 509)])
@pytest.mark.parametrize("fill", [0.0, 0.02, 0.5, 1.0])
def test_binvox_round_trip(tmp_path, shape, fill):
    voxels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < fill
    path = tmp_path / "a.binvox"
    io.write_binvox(path, voxels, (-0.5, -0.25, 0.125), 1.5)
    again = io.read_binvox(path)
    assert torch.equal(again.voxels, voxels)
    assert again.voxels.is_contiguous()
    assert (again.translate, again.scale) == ((-0.5, -0.25, 0.125), 1.5)
    flat = voxels.permute(2, 0, 1).reshape(-1).tolist()  # naive run lengths
    runs: list[list[int]] = []
    for value in flat:
        if runs and runs[-1][0] == value and runs[-1][1] < 255:
            runs[-1][1] += 1
        else:
            runs.append([int(value), 1])
    assert path.read_bytes().partition(b"\ndata\n")[2] == bytes(byte for run in runs for byte in run)


def test_binvox_agrees_with_trimesh(tmp_path):
    voxels = torch.rand(7, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    io.write_binvox(tmp_path / "a.binvox", voxels, (-0.5, -0.25, 0.125), 1.5)
    theirs = trimesh.load(tmp_path / "a.binvox")
    assert np.array_equal(theirs.matrix, voxels.permute(2, 1, 0).numpy())  # (x, y, z)


def test_binvox_grid_places_the_voxels():
    grid = io.Binvox(torch.zeros(4, 4, 4, dtype=torch.bool), (-1.0, 0.0, 2.0), 2.0).grid
    assert grid.points()[0, 0, 0].tolist() == [-0.75, 0.25, 2.25]
    assert grid.points()[3, 0, 0].tolist() == [-0.75, 0.25, 3.75]


HEADER = b"#binvox 1\ndim 2 2 2\ntranslate 0 0 0\nscale 1\ndata\n"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not a binvox file"),
        (b"\x89PNG", "not a binvox file"),
        (b"#binvox 1\ndim 2 2 2\n", "no line 'data'"),
        (HEADER.replace(b"x 1", b"x 2") + b"\0\x08", "binvox version 2"),
        (HEADER.replace(b"dim 2 2 2\n", b"") + b"\0\x08", "no line 'dim'"),
        (HEADER.replace(b"scale 1\n", b"") + b"\0\x08", "no line 'scale'"),
        (HEADER.replace(b"2 2 2", b"2 2") + b"\0\x08", "dim must be 3 numbers"),
        (HEADER.replace(b"2 2 2", b"2 2 x") + b"\0\x08", "dim must be 3 numbers, got '2 2 x'"),
        (HEADER.replace(b"2 2 2", b"2 2 0") + b"\0\x08", "dim must be three integers in [1, 2048], got 2 2 0"),
        (HEADER.replace(b"2 2 2", b"2 2 1.5") + b"\0\x08", "dim must be three integers"),
        (HEADER.replace(b"2 2 2", b"9999999 9999999 9999999") + b"\0\x08", "dim must be three integers in [1, 2048]"),
        (HEADER.replace(b"2 2 2", b"2048 2048 2048") + b"\0\x08", "hold 8 voxels, dim says 8589934592"),
        (HEADER.replace(b"scale 1", b"scale 0") + b"\0\x08", "scale must be positive"),
        (HEADER.replace(b"scale 1", b"scale nan") + b"\0\x08", "scale must be 1 numbers"),
        (HEADER + b"\0\x07", "cut short, the 2 bytes of data hold 7 voxels, dim says 8"),
        (HEADER + b"\0\x08\1", "too long, the 3 bytes"),
        (HEADER + b"\0\x08\1\1", "too long, the 4 bytes of data hold 9 voxels"),
        (HEADER + b"\0\x04\7\4", "voxels must be 0 or 1, got 7"),
    ],
)
def test_faulty_binvox(write, content, words):
    path = write("a.binvox", content)
    message = fault(lambda: io.read_binvox(path))
    assert message.startswith(str(path))
    assert words in message


# ------------------------------------------------------------------------------------------------------- arrays


def test_npz_round_trip_with_numpy(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array(2.5),
        "c": np.zeros((0, 3)),
        "d": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "e": np.array(["x", "yy"]),
        "file": np.packbits([True, False, True]),
    }
    io.save_npz(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **{key: value for key, value in arrays.items() if key != "file"})
    theirs = np.load(tmp_path / "a.npz", allow_pickle=False)
    for path in (tmp_path / "a.npz", tmp_path / "b.npz"):
        for key, value in io.load_npz(path).items():
            assert np.array_equal(value, arrays[key])
            assert value.dtype == arrays[key].dtype
            assert np.array_equal(theirs[key], arrays[key])
            assert value.flags.writeable
    assert list(io.load_npz(tmp_path / "a.npz", "e", "a")) == ["e", "a"]
    assert io.list_npz(tmp_path / "a.npz") == list(arrays)


def test_npz_bytes_do_not_depend_on_the_time(tmp_path, monkeypatch):
    io.save_npz(tmp_path / "a.npz", x=torch.arange(5))
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    io.save_npz(tmp_path / "b.npz", x=torch.arange(5))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_npz_never_loads_pickles(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "a.npz"
    np.savez(path, good=np.zeros(3), bad=np.array([Evil()], dtype=object))
    assert f"{path}: array 'bad' holds pickled Python objects" in fault(lambda: io.load_npz(path))
    assert list(io.load_npz(path, "good")) == ["good"]
    assert not (tmp_path / "ran").exists()
    assert "array 'x' holds Python objects" in fault(lambda: io.save_npz(path, x=np.array([None])))
    assert list(io.load_npz(path, "good")) == ["good"]


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "member, words",
    [
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
            "8000000000000 bytes; 0 are stored",
        ),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}\n"), "claims shape (-1,)"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}\n", b"\0" * 9), "8 bytes; 9 are stored"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", pickle.dumps([1])), "pickled Python objects"),
        (npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}\n"), "is not a numpy array"),
        (npy("__import__('os').getcwd()\n"), "is not a numpy array"),
        (b"\x93NUMPY\x09\x00", "is not a numpy array: "),
        (b"plain text", "is not a numpy array"),
        (b"", "is not a numpy array"),
    ],
)
def test_faulty_npz_member(tmp_path, member, words):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("points.npy", member)
    message = fault(lambda: io.load_npz(path, "points"))
    assert message.startswith(f"{path}: array 'points' ")
    assert words in message


def test_missing_key_and_truncated_npz(tmp_path):
    path = tmp_path / "a.npz"
    io.save_npz(path, points=np.zeros((100, 3)), occupancies=np.zeros(100))
    assert fault(lambda: io.load_npz(path, "point")) == (
        f"{path}: no array 'point' (did you mean 'points'?); it has ['occupancies', 'points']"
    )
    whole = path.read_bytes()
    for stop in range(0, len(whole), 7):
        path.write_bytes(whole[:stop])
        assert str(path) in fault(lambda: io.load_npz(path))
        assert str(path) in fault(lambda: io.list_npz(path))


# ------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("channels, mode", [(None, "L"), (3, "RGB"), (4, "RGBA")])
def test_image_round_trip(tmp_path, channels, mode):
    shape = (7, 5) if channels is None else (7, 5, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for name in ("a.png", "b.png"):
        io.write_png(tmp_path / name, pixels)
    assert np.array_equal(io.read_image(tmp_path / "a.png", size=(7, 5), mode=mode), pixels)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_image_modes(tmp_path):
    io.write_png(tmp_path / "a.png", np.eye(3, dtype=bool))
    assert np.array_equal(io.read_image(tmp_path / "a.png")[..., 0], np.eye(3) * 255)
    assert (io.read_image(tmp_path / "a.png")[..., 3] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "p.png", transparency=0)
    assert io.read_image(tmp_path / "p.png").tolist() == [[[0, 0, 0, 0], [9, 8, 7, 255]]]


def test_depth_round_trip(tmp_path):
    depth = np.array([[0.0, 0.001, 1.2345], [65.535, 2.0, 0.5]])
    io.write_depth_png(tmp_path / "a.png", depth)
    again = io.read_depth_png(tmp_path / "a.png", size=(2, 3))
    assert again.dtype == np.float32
    assert np.abs(again - depth).max() <= 0.0005 + 1e-6
    io.write_depth_png(tmp_path / "a.png", depth / 20, units_per_metre=20_000)
    assert np.abs(io.read_depth_png(tmp_path / "a.png", units_per_metre=20_000) - depth / 20).max() <= 0.000025 + 1e-7


@pytest.mark.parametrize("value", [-0.1, 65.6, float("nan"), float("inf"), 0.0004])
def test_depth_that_cannot_be_stored(tmp_path, value):
    depth = np.ones((3, 5))
    depth[2, 1] = value
    message = fault(lambda: io.write_depth_png(tmp_path / "a.png", depth))
    assert f"depth {value} at (2, 1) cannot be stored, it must be 0 or in [0.001, 65.535] metres" in message
    assert os.listdir(tmp_path) == []


def test_faulty_images(write, tmp_path):
    path = tmp_path / "a.png"
    io.write_png(path, np.random.default_rng(0).integers(0, 256, (137, 137, 4)).astype(np.uint8))
    assert fault(lambda: io.read_image(path, size=(137, 138))) == (
        f"{path}: must be 137 x 138 (height x width), got 137 x 137"
    )
    whole = path.read_bytes()
    for stop in (0, 5, 20, 40, 1000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:stop])
        assert str(path) in fault(lambda: io.read_image(path))
    assert "not an image, it starts with b'#binvox '" in fault(lambda: io.read_image(write("b.png", HEADER)))
    io.write_depth_png(path, np.ones((3, 5)))
    assert "read depth with read_depth_png" in fault(lambda: io.read_image(path))
    io.write_png(path, np.zeros((3, 5), np.uint8))
    assert "must be a 16-bit gray PNG, got mode L" in fault(lambda: io.read_depth_png(path))
    with pytest.raises(ValueError, match="unknown mode 'CMYK'"):
        io.read_image(path, mode="CMYK")
    for bad in (np.zeros((3, 5)), np.zeros((3, 5, 2), np.uint8), np.zeros(3, np.uint8)):
        assert "must be (H, W), (H, W, 3) or (H, W, 4)" in fault(lambda bad=bad: io.write_png(path, bad))
    assert "depth must be (H, W)" in fault(lambda: io.write_depth_png(path, np.zeros(3)))
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        io.read_image(tmp_path / "none.png")


# --------------------------------------------------------------------------------------------------- converters


def test_trimesh_round_trip():
    mesh = pyramid(color=COLORS)
    theirs = io.to_trimesh(mesh)
    assert np.array_equal(theirs.vertices, VERTS)
    assert np.array_equal(theirs.faces, QUAD_FAN)
    again = io.from_trimesh(theirs)
    assert same(again, mesh)
    assert torch.allclose(again.verts_attributes_packed()["color"], torch.tensor(COLORS))
    faces = Meshes(
        [torch.tensor(VERTS)],
        [torch.tensor(QUAD_FAN)],
        faces_attributes={"color": [torch.tensor([*COLORS, COLORS[0]])]},
    )
    again = io.from_trimesh(io.to_trimesh(faces)).faces_attributes_packed()["color"]
    assert torch.allclose(again, torch.tensor([*COLORS, COLORS[0]]))
    normals = mesh.verts_normals_packed()
    assert np.allclose(io.to_trimesh(pyramid(normal=normals.tolist())).vertex_normals, normals)
    with pytest.warns(UserWarning, match=r"trimesh: cannot hold verts_attributes \['label'\]"):
        io.to_trimesh(pyramid(label=[[0.0]] * 5))


def test_numpy_round_trip():
    verts, faces = io.to_numpy(pyramid())
    assert verts.dtype == np.float64
    assert verts.flags.c_contiguous
    assert same(io.from_numpy(verts[::-1], faces), Meshes([torch.tensor(VERTS[::-1])], [torch.tensor(QUAD_FAN)]))
    with pytest.raises(ValueError, match="a batch of 2"):
        io.to_numpy(pyramid().extend(2))


@pytest.mark.parametrize("tensor", [False, True])
def test_open3d_round_trip(tensor):
    pytest.importorskip("open3d")
    mesh = pyramid(color=COLORS, normal=COLORS)
    again = io.from_open3d(io.to_open3d(mesh, tensor=tensor))
    assert same(again, mesh)
    for name in ("color", "normal"):
        assert torch.allclose(again.verts_attributes_packed()[name], torch.tensor(COLORS))
    points, normals, colors = torch.rand(3, 7, 3, generator=torch.Generator().manual_seed(0))
    for cloud in (Pointclouds([points]), Pointclouds([points], [normals], [colors])):
        back = io.from_open3d(io.to_open3d(cloud, tensor=tensor))
        assert torch.equal(back.points_packed(), points)
        assert (back.normals_packed() is None) == (cloud.normals_packed() is None)
        if cloud.normals_packed() is not None:
            assert torch.allclose(back.normals_packed(), normals)
            assert torch.allclose(back.features_packed(), colors)
    plain = io.from_open3d(io.to_open3d(random_mesh(), tensor=tensor))
    assert same(plain, random_mesh())
    assert plain.verts_attributes_packed() == {}
    with pytest.raises(ValueError, match="must be an Open3D TriangleMesh or PointCloud, got list"):
        io.from_open3d([])


def test_open3d_face_colors():
    pytest.importorskip("open3d")
    colors = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    mesh = Meshes([torch.tensor(VERTS)], [torch.tensor(QUAD_FAN)], faces_attributes={"color": [colors]})
    again = io.from_open3d(io.to_open3d(mesh, tensor=True))
    assert torch.equal(again.faces_attributes_packed()["color"], colors)
    with pytest.warns(UserWarning, match=r"Open3D: cannot hold faces_attributes \['color'\]"):
        io.to_open3d(mesh)


def test_pyg_round_trip():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # at its import
        from torch_geometric.data import Data
    mesh = pyramid(color=COLORS, normal=COLORS)
    data = io.to_pyg(mesh)
    assert data.pos.tolist() == VERTS
    assert data.face.t().tolist() == QUAD_FAN
    pairs = set(map(tuple, data.edge_index.t().tolist()))
    expected = {(face[i], face[j]) for face in QUAD_FAN for i in range(3) for j in range(3) if i != j}
    assert pairs == expected
    assert data.edge_index.shape[1] == len(expected)
    again = io.from_pyg(data)
    assert same(again, mesh)
    assert sorted(again.verts_attributes_packed()) == ["color", "normal"]
    cloud = Pointclouds([torch.tensor(VERTS)], [torch.tensor(COLORS)], [torch.tensor(COLORS)])
    back = io.from_pyg(io.to_pyg(cloud))
    assert torch.equal(back.normals_packed(), cloud.normals_packed())
    assert torch.equal(back.features_packed(), cloud.features_packed())
    with pytest.raises(ValueError, match="data must have pos"):
        io.from_pyg(Data(x=torch.zeros(3)))


def test_pytorch3d_absent_is_an_error_that_says_where_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch3d", None)
    for call in (io.to_pytorch3d, io.from_pytorch3d):
        with pytest.raises(ImportError, match=r"github\.com/facebookresearch/pytorch3d/blob/main/INSTALL"):
            call(pyramid())


def test_open3d_absent_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(ImportError, match=r"vision3dgen\[viz\]"):
        io.to_open3d(pyramid())


@pytest.fixture
def pytorch3d(monkeypatch):
    """PyTorch3D, or where it is absent a stand-in whose classes take and give what its own do."""
    try:
        import pytorch3d.renderer
        import pytorch3d.structures  # noqa: F401
    except ImportError:
        structures, renderer = types.ModuleType("pytorch3d.structures"), types.ModuleType("pytorch3d.renderer")

        class TexturesVertex:
            def __init__(self, verts_features):
                self.features = verts_features

            def verts_features_list(self):
                return self.features

        class TheirMeshes(Meshes):
            def __init__(self, verts, faces, textures=None):
                super().__init__(verts, faces)
                self.__dict__["textures"] = textures

        class TheirPointclouds(Pointclouds):
            pass

        structures.Meshes, structures.Pointclouds = TheirMeshes, TheirPointclouds
        renderer.TexturesVertex = TexturesVertex
        package = types.ModuleType("pytorch3d")
        package.structures, package.renderer = structures, renderer
        monkeypatch.setitem(sys.modules, "pytorch3d", package)
        monkeypatch.setitem(sys.modules, "pytorch3d.structures", structures)
        monkeypatch.setitem(sys.modules, "pytorch3d.renderer", renderer)


def test_pytorch3d_round_trip(pytorch3d):
    verts = [torch.rand(5, 3, requires_grad=True), torch.rand(3, 3)]
    faces = [torch.tensor(QUAD_FAN), torch.tensor([[0, 1, 2]])]
    colors = [torch.tensor(COLORS), torch.rand(3, 3)]
    mesh = Meshes(verts, faces, verts_attributes={"color": colors})
    again = io.from_pytorch3d(io.to_pytorch3d(mesh))
    assert same(again, mesh)
    assert again.num_verts_per_mesh().tolist() == [5, 3]
    assert torch.equal(again.verts_attributes_packed()["color"], torch.cat(colors))
    again.verts_packed().sum().backward()
    assert torch.equal(verts[0].grad, torch.ones(5, 3))
    cloud = Pointclouds([torch.rand(5, 3), torch.rand(2, 3)], [torch.rand(5, 3), torch.rand(2, 3)])
    back = io.from_pytorch3d(io.to_pytorch3d(cloud))
    assert torch.equal(back.points_packed(), cloud.points_packed())
    assert torch.equal(back.normals_packed(), cloud.normals_packed())
    with pytest.raises(ValueError, match="must be PyTorch3D's Meshes or Pointclouds, got int"):
        io.from_pytorch3d(3)


def test_glb_never_opens_files_outside(tmp_path):
    """A buffer with a uri is refused, not fetched."""
    (tmp_path / "data.bin").write_bytes(np.array(VERTS[:3], np.float32).tobytes() + struct.pack("<3I", 0, 1, 2))
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5125, "count": 3, "type": "SCALAR"},
        ],
        "bufferViews": [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": 12}],
        "buffers": [{"uri": "data.bin", "byteLength": 48}],
    }
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    path = tmp_path / "a.glb"
    path.write_bytes(b"glTF" + struct.pack("<II", 2, 20 + len(text)) + struct.pack("<I", len(text)) + b"JSON" + text)
    assert "trimesh cannot read it" in fault(lambda: io.load_mesh(path), io.MeshError)


def test_reading_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in (".obj", ".off", ".ply", ".stl", ".glb"):
            io.save_mesh(tmp_path / f"a{suffix}", pyramid())
            io.load_mesh(tmp_path / f"a{suffix}")
