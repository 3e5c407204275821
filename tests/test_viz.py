"""Pictures without a display: silhouettes against analytic areas, renderers that crash, figures, files for windows."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from vision3dgen.io import load_mesh, load_pointcloud
from vision3dgen.ops.render import raycast
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds
from vision3dgen.viz import (
    Job,
    OffscreenError,
    Sample,
    Voxels,
    camera_mesh,
    colored_by_distance,
    curves,
    distance_to_surface,
    fit_camera,
    gallery,
    image_grid,
    offscreen,
    reconstruction_cells,
    reconstruction_gallery,
    render,
    render_many,
    scene,
    show,
    threshold_curve,
    turntable,
    write_film,
)
from vision3dgen.viz.offscreen import Walk
from vision3dgen.viz.scene import label, voxels_to_mesh
from vision3dgen.viz.window import describe

EMPTY = Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.long)])


@pytest.fixture(autouse=True)
def _no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(scene, "_broken", None)


def sphere(radius: float = 1.0, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Meshes:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    return Meshes([torch.tensor(ball.vertices + center).float()], [torch.tensor(ball.faces)])


def hook() -> Meshes:
    """A shape that no turn or mirror maps to itself."""
    parts = [trimesh.creation.box((1.0, 0.2, 0.3)), trimesh.creation.box((0.2, 0.8, 0.2)), trimesh.creation.icosphere()]
    parts[1].apply_translation((0.4, 0.4, 0.1))
    parts[2].apply_scale(0.25)
    parts[2].apply_translation((-0.45, 0.1, -0.3))
    joined = trimesh.util.concatenate(parts)
    return Meshes([torch.tensor(joined.vertices).float()], [torch.tensor(joined.faces)])


def drawn(image: np.ndarray) -> np.ndarray:
    """Where a picture is not white."""
    return (image < 250).any(-1)


def frontal(size: tuple[int, int], distance: float = 3.0) -> Camera:
    return Camera.look_at((0.0, 0.0, -distance), field_of_view=45.0, image_size=size)


# Off the axis, not square, with another focal length along each axis.
SKEWED = Camera.look_at((0.7, 0.9, -1.6), (0.1, 0.1, 0.0), field_of_view=50.0, image_size=(151, 211))
SKEWED = Camera(
    SKEWED.rotation,
    SKEWED.translation,
    SKEWED.intrinsics + torch.tensor([[9.0, 0.0, -17.0], [0.0, 0.0, 11.0], [0.0, 0.0, 0.0]], dtype=torch.float64),
    SKEWED.image_size,
)
GRID = GridSpec.cube(5)
L_CELLS = torch.zeros(5, 5, 5, dtype=torch.bool)
L_CELLS[1:4, 1, 1:4] = True
L_CELLS[1, 1:5, 1] = True


def jobs() -> dict[str, Job]:
    hooked = hook()
    inside_out = Meshes([hooked.verts_packed()], [hooked.faces_packed().flip(1)])
    cloud = Pointclouds([torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * 0.2])
    return {
        "sphere": Job(sphere(), frontal((317, 317))),
        "hook": Job(hooked, SKEWED),
        "inside out": Job(inside_out, SKEWED),
        "millimetres": Job(hooked.scale_verts(1e-3), _scaled(SKEWED, 1e-3)),
        "empty": Job(EMPTY),
        "points": Job(cloud, SKEWED),
        "voxels": Job(Voxels(L_CELLS, GRID), SKEWED),
    }


def _scaled(camera: Camera, scale: float) -> Camera:
    return Camera(camera.rotation, camera.translation * scale, camera.intrinsics, camera.image_size)


@pytest.fixture(scope="module")
def by_open3d() -> dict[str, np.ndarray]:
    """Every picture from one start of Open3D's renderer."""
    pytest.importorskip("open3d")
    result = render_many(list(jobs().values()), size=(317, 317), renderer="open3d")
    assert result.renderer == "open3d"
    return dict(zip(jobs(), result.images))


@pytest.fixture(scope="module")
def by_builtin() -> dict[str, np.ndarray]:
    result = render_many(list(jobs().values()), size=(317, 317), renderer="builtin")
    assert result.renderer == "builtin"
    return dict(zip(jobs(), result.images))


def check_silhouette(image: np.ndarray) -> None:
    focal = 317 / 2 / math.tan(math.radians(22.5))
    area = math.pi * focal**2 / (3.0**2 - 1)  # the circle in which the tangent cone of the unit sphere meets the image
    assert drawn(image).sum() == pytest.approx(area, rel=0.02)


def test_sphere_silhouette_builtin(by_builtin: dict[str, np.ndarray]) -> None:
    check_silhouette(by_builtin["sphere"])


@pytest.mark.slow
def test_sphere_silhouette_open3d(by_open3d: dict[str, np.ndarray]) -> None:
    check_silhouette(by_open3d["sphere"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hook", "points", "voxels"])
def test_renderers_agree_where_shapes_are(
    name: str, by_open3d: dict[str, np.ndarray], by_builtin: dict[str, np.ndarray]
) -> None:
    one, other = drawn(by_open3d[name]), drawn(by_builtin[name])
    assert one.sum() > 3000
    assert (one & other).sum() / (one | other).sum() > (0.93 if name == "points" else 0.97)


@pytest.mark.slow
def test_open3d_ignores_winding_and_units(by_open3d: dict[str, np.ndarray]) -> None:
    shown = by_open3d["hook"].astype(int)
    for name in ("inside out", "millimetres"):
        assert np.abs(by_open3d[name] - shown).mean() < 1.0, name


@pytest.mark.slow
def test_open3d_lights_flat_faces_evenly(by_open3d: dict[str, np.ndarray]) -> None:
    """Corners at one place keep their own normals: the middle of the bar's front is one plane with one color."""
    camera = SKEWED.resize((317, 317))
    (u, v), _ = (part[0] for part in camera.project(torch.tensor([[0.1, 0.0, -0.15]], dtype=torch.float64)))
    patch = by_open3d["hook"][int(v) - 4 : int(v) + 5, int(u) - 12 : int(u) + 13].astype(int)
    assert np.ptp(patch, axis=(0, 1)).max() < 12


@pytest.mark.slow
def test_background_is_the_one_asked_for(by_open3d: dict[str, np.ndarray]) -> None:
    assert (by_open3d["hook"][0, 0] == 255).all()
    image = render(sphere(), size=(31, 31), background=(1.0, 0.5, 0.0), renderer="builtin").image
    assert image[0, 0].tolist() == [255, 128, 0]


def test_empty_shapes_say_so(by_builtin: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert drawn(by_builtin["empty"]).any()
    assert (by_builtin["empty"] == label("empty", (317, 317))).all()
    for nothing in (
        EMPTY,
        None,
        Pointclouds([torch.zeros(0, 3)]),
        Voxels(torch.zeros(5, 5, 5, dtype=torch.bool), GRID),
    ):
        picture = render(nothing, tmp_path / "empty.png", size=(64, 96), renderer="builtin")
        assert picture.image.shape == (64, 96, 3)
        assert drawn(np.array(Image.open(tmp_path / "empty.png"))).any()


# ---------------------------------------------------------------------------------------- renderers that fail


def fake_open3d(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """An open3d for the child that does this when it is imported, and notes that it was."""
    (folder / "open3d").mkdir()
    note = f"with open({str(folder / 'imports')!r}, 'a') as f: f.write('.')\n"
    (folder / "open3d" / "__init__.py").write_text(note + body)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_native_crash_becomes_an_error_naming_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_open3d(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(OffscreenError, match="killed by SIGSEGV after 0 pictures"):
        render(hook(), renderer="open3d")


def test_auto_survives_a_crash_and_does_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_open3d(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            picture = render(hook(), size=(48, 48))
            assert picture.renderer == "builtin"
            assert drawn(picture.image).sum() > 100
    assert (tmp_path / "imports").read_text() == "."
    (record,) = caplog.records
    assert "built-in renderer" in record.message
    assert "SIGABRT" in record.message


def test_broken_libraries_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_open3d(tmp_path, monkeypatch, "raise OSError('libGL.so.1: cannot open shared object file')")
    with pytest.raises(OffscreenError, match=r"status 1 .*OSError: libGL.so.1: cannot open"):
        render(hook(), renderer="open3d")


def test_a_renderer_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_open3d(tmp_path, monkeypatch, "import time; time.sleep(600)")
    triangle = np.zeros((1, 3, 3), np.float32)
    picture = offscreen.Picture(0, np.eye(3), np.eye(4))
    with pytest.raises(OffscreenError, match=r"no picture in 0.3 s"):
        offscreen.draw([offscreen.Triangles(*[triangle] * 3)], [picture], (8, 8), (1.0, 1.0, 1.0), patience=0.3)


def test_the_child_cannot_open_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":99")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-9")
    body = "import os; raise OSError(f\"{os.environ.get('DISPLAY')} {os.environ.get('WAYLAND_DISPLAY')}\")"
    fake_open3d(tmp_path, monkeypatch, body)
    with pytest.raises(OffscreenError, match="OSError: None None"):
        render(hook(), renderer="open3d")


def test_absent_open3d(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scene, "find_spec", lambda name: None)
    with pytest.raises(OffscreenError, match=r"vision3dgen\[viz\]"):
        render(hook(), renderer="open3d")
    assert render(hook(), size=(32, 32)).renderer == "builtin"
    assert "not installed" in caplog.text


# --------------------------------------------------------------------------------------------- what is drawn


def test_panels_lie_side_by_side() -> None:
    picture = render([hook(), EMPTY, (L_CELLS, GRID)], size=(40, 60), renderer="builtin").image
    assert picture.shape == (40, 180, 3)
    batch = Meshes([hook().verts_packed()] * 2, [hook().faces_packed()] * 2)
    assert render(batch, size=(40, 60), renderer="builtin").image.shape == (40, 120, 3)


def test_shapes_keep_their_colors_unless_told() -> None:
    ball = sphere()
    red = torch.tensor([1.0, 0.0, 0.0])
    painted = [
        Meshes(
            [ball.verts_packed()],
            [ball.faces_packed()],
            verts_attributes={"color": [red.expand(ball.verts_packed().shape)]},
        ),
        Meshes(
            [ball.verts_packed()],
            [ball.faces_packed()],
            faces_attributes={"color": [red.expand(ball.faces_packed().shape)]},
        ),
        Pointclouds([ball.verts_packed()], features=[red.expand(ball.verts_packed().shape)]),
    ]
    blue = (0.0, 0.0, 1.0)
    own = render(painted, size=(32, 32), renderer="builtin").image
    told = render(painted, size=(32, 32), colors=[blue] * 3, renderer="builtin").image
    for i in range(3):
        r, g, b = own[16, 32 * i + 16].tolist()
        assert r > 80
        assert max(g, b) < r / 2  # a cloud lets some background through
        r, g, b = told[16, 32 * i + 16].tolist()
        assert b > 80
        assert max(r, g) < b / 2


def test_nearer_points_hide_farther_ones() -> None:
    points = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, -0.5], [0.0, 0.7, 0.0], [0.0, 0.0, -9.0]])  # the last: behind
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        cloud = Pointclouds([points[order]], features=[colors[order]])
        image = render(cloud, camera=frontal((64, 64)), size=(64, 64), renderer="builtin").image
        assert image[32, 32].argmax() == 1
        ys, _ = np.nonzero((image[..., 2] > 80) & (image[..., 0] < 50))
        assert ys.mean() < 25  # +y is up
        assert not ((image[..., 0] > 80) & (image[..., 1] > 80) & (image[..., 2] < 50)).any()


def test_voxels_become_cubes_where_the_grid_says() -> None:
    grid = GridSpec((1.0, 2.0, 3.0), (0.1, 0.2, 0.3), (2, 3, 5))
    occupied = torch.zeros(2, 3, 5, dtype=torch.bool)
    occupied[1, 2, 4] = True
    verts = voxels_to_mesh(Voxels(occupied, grid)).verts_packed()
    torch.testing.assert_close(verts.mean(0), grid.points()[1, 2, 4])
    extent = verts.amax(0) - verts.amin(0)
    assert ((extent > 0.9 * torch.tensor(grid.spacing)) & (extent <= torch.tensor(grid.spacing))).all()


def test_cubes_nobody_sees_are_left_out_and_the_rest_are_closed() -> None:
    full = voxels_to_mesh(Voxels(torch.ones(3, 3, 3, dtype=torch.bool), GridSpec.cube(3)))
    assert len(full.verts_packed()) == 26 * 8
    solid = trimesh.Trimesh(full.verts_packed().numpy(), full.faces_packed().numpy(), process=False)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(26 / 27 * 0.94**3, rel=1e-4)  # positive: faces look outwards


@pytest.mark.parametrize("size", [(97, 97), (61, 131), (131, 61)])
def test_default_camera_fits_tightly_from_the_front(size: tuple[int, int]) -> None:
    shape = Meshes([hook().verts_packed() * 7 + 100], [hook().faces_packed()])
    camera = fit_camera(shape, size)
    pixels, depth = camera.project(shape.verts_packed().double())
    share = (pixels / torch.tensor([size[1], size[0]]) * 2 - 1).abs().amax()
    assert float(share) == pytest.approx(0.92, abs=1e-6)
    assert (depth > 0).all()
    offset = camera.center - shape.verts_packed().double().mean(0)
    assert offset[2] < 0  # in front of an object that looks along -z
    assert offset[1] > 0


def test_not_finite_vertex_is_named() -> None:
    verts = hook().verts_packed().clone()
    verts[17, 1] = torch.nan
    with pytest.raises(ValueError, match="vertex 17"):
        render(Meshes([verts], [hook().faces_packed()]), renderer="builtin")
    with pytest.raises(ValueError, match="point 2"):
        render(Pointclouds([torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, torch.inf, 0]])]), renderer="builtin")


def test_bad_input_is_explained() -> None:
    with pytest.raises(ValueError, match="must be Meshes"):
        render("spot.obj")
    with pytest.raises(ValueError, match="threshold"):
        render(Voxels(torch.rand(5, 5, 5), GRID), renderer="builtin")
    with pytest.raises(ValueError, match="occupied must be"):
        render(Voxels(torch.ones(5, 5, 4, dtype=torch.bool), GRID), renderer="builtin")
    with pytest.raises(ValueError, match="colors must be one per panel"):
        render([hook(), hook()], colors=[(1.0, 0.0, 0.0)], renderer="builtin")
    with pytest.raises(ValueError, match="builtin"):
        render(hook(), renderer="pytorch3d")
    with pytest.raises(ValueError, match="batch of cameras"):
        render(hook(), camera=Camera.stack([SKEWED, SKEWED]), renderer="builtin")
    with pytest.raises(ValueError, match="size"):
        render_many([Job(hook(), SKEWED)], size=(0, 5), renderer="builtin")


def test_turntable_turns(tmp_path: Path) -> None:
    assert turntable(hook(), tmp_path / "turn.gif", frames=3, size=(40, 56), renderer="builtin") == "builtin"
    with Image.open(tmp_path / "turn.gif") as film:
        assert (film.n_frames, film.size) == (3, (56, 40))
        frames = []
        for i in range(3):
            film.seek(i)
            frames.append(np.array(film.convert("RGB")))
    for frame in frames:
        border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
        assert not drawn(border).any()  # never cut off
    assert (frames[0] != frames[1]).any()
    with pytest.raises(ValueError, match="one shape"):
        turntable([hook(), hook()], tmp_path / "x.gif")


# ------------------------------------------------------------------------------------------------------- figures


def test_gallery_places_every_cell(tmp_path: Path) -> None:
    red, green = np.zeros((20, 30, 3), np.uint8), torch.zeros(3, 10, 15)
    red[..., 0], green[1] = 255, 1.0
    sheet = gallery([[red, None], [green]], path=tmp_path / "sheet.png", gap=5)
    assert sheet.shape == (5 + 2 * 25, 5 + 2 * 35, 3)
    assert (sheet[5:25, 5:35] == red).all()
    assert (sheet[30:50, 5:35] == (0, 255, 0)).all()  # enlarged
    assert (sheet[:, 35:] == 255).all()
    assert (np.array(Image.open(tmp_path / "sheet.png")) == sheet).all()
    titled = gallery(
        [[red, None], [green]], ["input", "a title much too long"], ["one", "two"], captions=[["x", ""], ["y"]]
    )
    assert titled.shape[0] > sheet.shape[0]
    assert titled.shape[1] > sheet.shape[1]


def test_gallery_bad_input() -> None:
    cell = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one picture"):
        gallery([[None]])
    with pytest.raises(ValueError, match="column_titles must be 1"):
        gallery([[cell]], ["a", "b"])
    with pytest.raises(ValueError, match="row 0, column 1"):
        gallery([[cell, np.zeros((4, 4, 3))]])
    with pytest.raises(ValueError, match="captions"):
        gallery([[cell]], captions=[["a", "b"]])
    with pytest.raises(ValueError, match="at least one"):
        image_grid([])


def test_image_grid_is_near_square() -> None:
    assert image_grid(torch.zeros(7, 3, 11, 11), gap=1).shape == (1 + 3 * 12, 1 + 3 * 12, 3)
    assert image_grid(torch.zeros(7, 3, 11, 11), gap=1, columns=7).shape == (1 + 12, 1 + 7 * 12, 3)


def sample(frame: Frame, camera: Camera | None = SKEWED) -> Sample:
    shape = frame.normalize(hook())
    seen = raycast(hook(), SKEWED, renderer="builtin", samples=1).rgba
    image = (seen[..., :3] * seen[..., 3:] + 1 - seen[..., 3:]).permute(2, 0, 1)
    low = tuple((-0.5 - c) / frame.scale for c in frame.center)
    grid = GridSpec(low, (0.2 / frame.scale,) * 3, (5, 5, 5))
    heads = {"mesh": shape, "voxels": Voxels(L_CELLS, grid), "nothing": None, "blank": EMPTY}
    return Sample(image, shape, heads, camera, frame, "title", {"mesh": "IoU 0.5"})


def test_reconstructions_are_drawn_through_the_camera_of_the_image(tmp_path: Path) -> None:
    size, gap, line = (80, 80), 6, 17
    frame = Frame("object", (0.3, -0.2, 0.1), 2.5)
    result = reconstruction_gallery([sample(frame)], tmp_path / "sheet.png", size=size, renderer="builtin")
    (sheet,) = result.images
    assert result.renderer == "builtin"
    assert (np.array(Image.open(tmp_path / "sheet.png")) == sheet).all()
    assert sheet.shape == (line + 80 + line + 2 * gap, line + 6 * (80 + gap) + gap, 3)
    height, width = size
    cells = [sheet[line + gap :][:height, line + gap + j * (width + gap) :][:, :width] for j in range(6)]
    image, mesh, voxels, nothing, blank, truth = (drawn(cell) for cell in cells)
    assert (image & truth).sum() / (image | truth).sum() > 0.9
    assert (mesh == truth).mean() > 0.99
    rows, columns = np.nonzero(truth)
    assert max(np.ptp(rows) / height, np.ptp(columns) / width) > 0.75  # cut to what there is to see
    assert voxels.sum() > 200
    assert (nothing == blank).all()
    assert 0 < nothing.sum() < 500


def test_frames_do_not_change_the_picture() -> None:
    one = reconstruction_gallery([sample(Frame("object"))], size=(60, 60), renderer="builtin").images[0]
    frame = Frame("object", (0.3, -0.2, 0.1), 2.5)
    other = reconstruction_gallery([sample(frame)], size=(60, 60), renderer="builtin").images[0]
    assert np.abs(one.astype(int) - other).mean() < 0.5


def test_reconstructions_without_camera_or_overlap() -> None:
    away = Camera(
        SKEWED.rotation, SKEWED.translation + torch.tensor([900.0, 0, 0]), SKEWED.intrinsics, SKEWED.image_size
    )
    for camera in (None, away):
        assert reconstruction_gallery([sample(Frame("object"), camera)], size=(40, 40), renderer="builtin").images
    with pytest.raises(ValueError, match="at least one"):
        reconstruction_gallery([])


def test_curves(tmp_path: Path) -> None:
    records = [
        {"step": i, "loss": 1.0 / (i + 1), "lr": 0.1, "val/iou": i / 99 if i % 9 == 0 else None} for i in range(99)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curves({"a": tmp_path / "metrics.jsonl", "b": records[::10]}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 2 * 400
        assert drawn(np.array(image.convert("RGB"))).mean() > 0.01
    curves({"a": records}, tmp_path / "curves.svg", keys=["lr"])
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(ValueError, match="accuracy"):
        curves({"a": records}, tmp_path / "x.png", keys=["accuracy"])
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        curves({"a": records}, tmp_path / "curves.jpeg")
    (tmp_path / "cut.jsonl").write_text('{"step": 1, "loss": 2}\n{"st')
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 2"):
        curves({"a": tmp_path / "cut.jsonl"}, tmp_path / "x.png")


def test_threshold_curve(tmp_path: Path) -> None:
    x = torch.linspace(0, 1, 7)
    threshold_curve(x, {"a": (x, x**2), "b": (x * 0, x * 0)}, tmp_path / "f.pdf")
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="recall of 'a'"):
        threshold_curve(x, {"a": (x, x[:3])}, tmp_path / "f.png")


def test_curves_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"vision3dgen\[viz\]"):
        curves({"a": [{"step": 1, "loss": 1.0}]}, tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------------- windows


def test_show_writes_files_where_there_is_no_display(tmp_path: Path) -> None:
    cloud = Pointclouds([hook().verts_packed()])
    shown = show([hook(), cloud, EMPTY], tmp_path / "new" / "view", turntables=False, renderer="builtin")
    assert not shown.window
    assert [path.name for path in shown.files] == ["shapes.png", "shape_0.ply", "shape_1.ply"]
    assert str(tmp_path) in str(shown)
    torch.testing.assert_close(load_mesh(shown.files[1]).verts_packed(), hook().verts_packed())
    torch.testing.assert_close(load_pointcloud(shown.files[2]).points_packed(), hook().verts_packed())


def test_show_exports_samples_in_the_file_s_coordinates(tmp_path: Path) -> None:
    shown = show([sample(Frame("object", (0.3, -0.2, 0.1), 2.5))], tmp_path, renderer="builtin")
    assert [path.name for path in shown.files] == [
        "shapes.png",
        "000_title_mesh.ply",
        "000_title_voxels.ply",
        "000_title_truth.ply",
    ]
    torch.testing.assert_close(load_mesh(shown.files[1]).verts_packed(), hook().verts_packed(), atol=1e-6, rtol=0)
    low = load_mesh(shown.files[2]).get_bounding_boxes()[0, :, 0]
    torch.testing.assert_close(low, torch.tensor([-0.3, -0.3, -0.3]) + 0.006, atol=1e-5, rtol=0)


def test_show_falls_back_to_files_when_the_window_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DISPLAY", ":99")
    fake_open3d(tmp_path, monkeypatch, "raise OSError('no GLX')")
    shown = show(sample(Frame("object")), tmp_path / "view", block=False, renderer="builtin")
    assert shown.files[0].exists()
    assert "no GLX" in caplog.text


def test_the_window_is_given_each_shape_once_plain_and_once_by_its_error() -> None:
    triangles, (first, second) = describe([sample(Frame("object")), Sample(predictions={"a": hook(), "b": EMPTY})])
    assert [(entry["name"], entry["mesh"]) for entry in first["heads"]] == [
        ("mesh", 0), ("voxels", 2), ("nothing", None), ("blank", None),
    ]  # fmt: skip
    assert [entry.get("error") for entry in first["heads"]] == [1, 3, None, None]
    assert first["truth"] == {"name": "truth", "mesh": 4}
    assert second["truth"] is None
    assert [entry.get("error") for entry in second["heads"]] == [None, None]
    assert (triangles[0].corners == triangles[1].corners).all()
    blue, yellow = triangles[1].colors, triangles[3].colors  # the mesh is the truth, the voxels are not
    assert blue[..., 2].max() < 0.5
    assert np.ptp(blue, axis=(0, 1)).max() < 1e-6
    assert yellow[..., 0].max() > 0.8
    assert len(triangles) == 6


def test_keys_walk_through_samples_heads_and_colors() -> None:
    heads = [{"name": "a", "mesh": 0, "error": 1}, {"name": "b", "mesh": None}]
    truth = {"name": "truth", "mesh": 2}
    walk = Walk([{"title": "one", "heads": heads, "truth": truth}, {"title": "two", "heads": heads, "truth": None}])
    assert (walk.title.split(), walk.meshes()) == (["one", "a", "|", "truth"], [0, 2])
    walk.press("E")
    assert walk.meshes() == [1, 2]
    assert "distance to the truth" in walk.title
    walk.press("H")
    assert walk.meshes() == [None, 2]
    assert "b (empty)" in walk.title
    walk.press("H")
    walk.press("E")
    assert walk.meshes() == [0, 2]
    walk.press("N")
    assert walk.meshes() == [0, None]  # without a truth all heads stand side by side
    walk.press("N")
    assert walk.title.startswith("one")
    walk.press("P")
    assert walk.title.startswith("two")
    assert Walk([{"title": "", "heads": [], "truth": truth}]).meshes() == [2]


def test_samples_in_camera_axes_stand_upright() -> None:
    (seen,) = describe([Sample(predictions={"a": hook()}, frame=Frame("camera"))])[1]
    assert (seen["up"], seen["front"][2]) == ((0.0, -1.0, 0.0), -1.0)
    (object_,) = describe([Sample(predictions={"a": hook()}, frame=Frame("object"))])[1]
    assert object_["up"] == (0.0, 1.0, 0.0)


def test_distance_to_the_surface_is_exact_and_colored() -> None:
    ball, larger = sphere(), sphere(1.25)
    distances = distance_to_surface(larger, ball)
    assert float((distances - 0.25).abs().max()) < 2e-3  # the ball is made of triangles
    to_points = distance_to_surface(larger, Pointclouds([ball.verts_packed()]))
    torch.testing.assert_close(to_points, torch.full_like(to_points, 0.25), atol=1e-5, rtol=0)
    points = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [1.5, 0, 0]])
    colors = colored_by_distance(Pointclouds([points]), ball, 1.0).features_packed()
    assert colors[0, 2] > colors[0, 0]  # blue where it is right
    assert colors[1, 0] > 0.9 > colors[1, 2]  # yellow where it is far
    luminance = colors @ torch.tensor([0.21, 0.72, 0.07])
    assert luminance[0] < luminance[2] < luminance[1]
    assert colored_by_distance(larger, ball, 1.0).verts_attributes_packed()["color"].shape == (2562, 3)
    with pytest.raises(ValueError, match="truth is empty"):
        colored_by_distance(ball, EMPTY, 1.0)
    with pytest.raises(ValueError, match="above 0"):
        colored_by_distance(ball, ball, 0.0)


def test_a_camera_is_drawn_where_it_stands_with_its_image() -> None:
    image = torch.zeros(3, 20, 30)
    image[0, :, :15], image[2, :, 15:] = 1.0, 1.0  # red left, blue right
    seen = camera_mesh(SKEWED, 0.5, image)
    verts, colors = seen.verts_packed(), seen.faces_attributes_packed()["color"]
    assert float((verts - SKEWED.center.float()).norm(dim=1).min()) < 0.02  # the apex
    middle = verts[seen.faces_packed()].mean(1).double()
    pixels, depth = SKEWED.project(middle)
    red, blue = colors[:, 0] > 0.99, colors[:, 2] > 0.99
    assert int(red.sum()) == int(blue.sum()) == 2 * 20 * 15
    torch.testing.assert_close(depth[red | blue], torch.full((1200,), 0.5, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(pixels[red, 0].max()) < 211 / 2 < float(pixels[blue, 0].min())
    assert len(camera_mesh(SKEWED, 0.5).verts_packed()) == 8 * 8
    with pytest.raises(ValueError, match="single"):
        camera_mesh(Camera.stack([SKEWED]), 0.5)


def test_films_by_the_ending_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [np.full((11, 13, 3), shade, np.uint8) for shade in (0, 120, 240)]
    with pytest.raises(ValueError, match=r"\.gif or \.mp4, not \.avi"):
        write_film(tmp_path / "film.avi", frames)
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"vision3dgen\[video\]"):
        write_film(tmp_path / "film.mp4", frames)
    assert not (tmp_path / "film.mp4").exists()


def test_an_mp4_holds_every_frame(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((11, 13, 3), shade, np.uint8) for shade in (0, 120, 240)]
    write_film(tmp_path / "film.mp4", frames)
    reader = ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    assert next(reader)["source_size"] == (14, 12)
    shades = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert shades == pytest.approx([0, 120, 240], abs=6)


def test_cells_carry_pictures_beside_shapes() -> None:
    depth = np.full((10, 20, 3), 7, np.uint8)
    own = Sample(predictions={"a": hook()}, truth=hook(), pictures={"a depth": depth}, title="x")
    (row,) = reconstruction_cells([own], size=(40, 40), renderer="builtin").rows
    assert list(row) == ["a depth", "a", "truth"]
    assert row["a depth"].shape == (40, 40, 3)
    assert (row["a depth"][20] == 7).all()
    alone = Sample(image=torch.ones(3, 8, 8), pictures={"normals": depth}, camera=SKEWED)  # nothing to cut to
    assert reconstruction_gallery([alone], size=(40, 40), renderer="builtin").images[0].shape[1] == 2 * 46 + 6


@pytest.mark.slow
def test_two_million_faces_are_drawn_and_shown_as_files(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=4)
    verts, faces = torch.tensor(ball.vertices).float(), torch.tensor(ball.faces)
    copies = 2_000_000 // len(faces) + 1
    many = Meshes([verts], [faces.repeat(copies, 1)])
    assert len(many.faces_packed()) > 2_000_000
    one = render(sphere(), camera=frontal((97, 97)), size=(97, 97), renderer="builtin").image
    all_ = render(many, camera=frontal((97, 97)), size=(97, 97), renderer="builtin").image
    assert (drawn(one) == drawn(all_)).mean() > 0.99
