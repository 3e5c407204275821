"""Ray casting: analytic pictures, a triple loop, and the agreement of the two renderers."""

import importlib.util
import math

import pytest
import torch
import trimesh

from tests import naive
from vision3dgen.ops import render
from vision3dgen.ops.meshes import ico_sphere
from vision3dgen.ops.render import raycast, raycast_views, resolve_renderer
from vision3dgen.structures import Camera, Frame, Meshes

HAVE_OPEN3D = importlib.util.find_spec("open3d") is not None
RENDERERS = [
    "builtin",
    pytest.param("open3d", marks=pytest.mark.skipif(not HAVE_OPEN3D, reason="Open3D is not installed")),
]


def front_camera(height: int = 13, width: int = 17, focal: float = 10.0) -> Camera:
    """At the origin, axes of the world."""
    k = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return Camera(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), k, (height, width))


def from_trimesh(mesh: trimesh.Trimesh) -> Meshes:
    return Meshes([torch.tensor(mesh.vertices).float()], [torch.tensor(mesh.faces).long()])


def square(half: float, z: float) -> Meshes:
    corners = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    return Meshes([torch.tensor(corners)], [torch.tensor([[0, 1, 2], [0, 2, 3]])])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_square_facing_the_camera(renderer):
    camera = front_camera()
    drawn = raycast(square(0.5, 2.0), camera, renderer=renderer)
    # Projects to 8.5 +- 2.5 columns and 6.5 +- 2.5 rows: columns 6..10, rows 4..8 exactly.
    expected = torch.zeros(13, 17, dtype=torch.bool)
    expected[4:9, 6:11] = True
    assert torch.equal(drawn.mask, expected)
    assert torch.equal(drawn.rgba[..., 3], expected.float())
    torch.testing.assert_close(drawn.depth, expected * 2.0)
    torch.testing.assert_close(drawn.normals, expected[..., None] * torch.tensor([0.0, 0.0, -1.0]))
    assert set(drawn.face_index[expected].tolist()) == {0, 1}
    assert (drawn.face_index[~expected] == -1).all()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_alpha_is_the_covered_share(renderer):
    # Left border at u = 6 + 1/3 and right border at u = 10 + 2/3: two thirds of these columns are covered.
    corners = torch.tensor([[-2.1667, -50.0], [2.1667, -50.0], [2.1667, 50.0], [-2.1667, 50.0]]) / 10
    mesh = Meshes([torch.cat([corners, torch.ones(4, 1)], dim=1)], [torch.tensor([[0, 1, 2], [0, 2, 3]])])
    alpha = raycast(mesh, front_camera(), renderer=renderer).rgba[..., 3]
    expected = torch.zeros(17)
    expected[7:10] = 1
    expected[6] = expected[10] = 2 / 3
    torch.testing.assert_close(alpha, expected.expand(13, 17))


@pytest.mark.parametrize("renderer", RENDERERS)
def test_depth_and_normals_of_a_sphere(renderer):
    mesh = from_trimesh(trimesh.creation.icosphere(5, radius=0.4))
    camera = Camera.from_r2n2(40.0, 27.0, 0.8, image_size=61)
    drawn = raycast(mesh, camera, renderer=renderer)
    rows, columns = drawn.mask.nonzero().unbind(1)
    pixels = torch.stack([columns, rows], dim=1).double() + 0.5
    seen = camera.unproject(pixels, drawn.depth[drawn.mask].double())
    torch.testing.assert_close(seen.norm(dim=1), torch.full((len(seen),), 0.4, dtype=torch.float64), atol=4e-4, rtol=0)
    world = drawn.normals[drawn.mask].double() @ camera.rotation
    assert ((world * seen / 0.4).sum(1) > math.cos(math.radians(4))).all()
    # The silhouette of a sphere at distance d is the cone of half angle asin(r / d).
    v, u = torch.meshgrid(torch.arange(61) + 0.5, torch.arange(61) + 0.5, indexing="ij")
    angle = torch.atan(torch.hypot(u - 30.5, v - 30.5) / camera.intrinsics[0, 0])
    limit = math.asin(0.4 / 1.4)
    clear = (angle - limit).abs() > 0.004  # the icosphere is a little smaller than the sphere
    assert torch.equal(drawn.mask[clear], (angle < limit)[clear])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_equals_a_triple_loop(renderer):
    generator = torch.Generator().manual_seed(1)
    verts = torch.rand(30, 3, generator=generator) * 2 - 1
    faces = torch.randint(0, 30, (19, 3), generator=generator)  # a soup, some faces without area
    k = torch.tensor([[11.0, 0.7, 5.2], [0.0, 13.0, 7.9], [0.0, 0.0, 1.0]], dtype=torch.float64)
    look = Camera.look_at((0.3, 0.2, 1.1), (0.0, 0.1, 0.0), field_of_view=50, image_size=(13, 11))
    camera = Camera(look.rotation, look.translation, k, (13, 11))  # skewed, off centre, faces behind it
    drawn = raycast(Meshes([verts], [faces]), camera, renderer=renderer)
    depth, index = naive.raycast(verts, faces, camera.rotation, camera.translation, k, (13, 11))
    assert torch.equal(drawn.face_index, index)
    torch.testing.assert_close(drawn.depth, depth.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_inside_a_box_every_ray_hits(renderer):
    camera = front_camera()
    drawn = raycast(from_trimesh(trimesh.creation.box((4.0, 4.0, 6.0))), camera, renderer=renderer)
    assert drawn.mask.all()
    assert drawn.depth[6, 8] == 3.0
    torch.testing.assert_close(drawn.normals[6, 8], torch.tensor([0.0, 0.0, -1.0]))  # towards the camera, from inside


@pytest.mark.skipif(not HAVE_OPEN3D, reason="Open3D is not installed")
@pytest.mark.parametrize("name", ["spot", "cow", "teapot"])
def test_renderers_agree_on_real_meshes(shared_data, name):
    mesh = from_trimesh(trimesh.load(shared_data / "meshes" / f"{name}.obj", process=False, force="mesh"))
    mesh = Frame.unit_diagonal(mesh.verts_packed()).normalize(mesh)
    camera = Camera.from_r2n2(123.0, 28.0, 0.7)
    a, b = (raycast(mesh, camera, renderer=r) for r in ("open3d", "builtin"))
    assert (a.mask == b.mask).float().mean() > 0.995
    both = a.mask & b.mask
    assert (a.depth - b.depth)[both].abs().max() < 1e-4
    assert (a.rgba - b.rgba).abs().mean() < 1e-3


def test_chunks_change_nothing(monkeypatch):
    mesh = from_trimesh(trimesh.creation.icosphere(2, radius=0.4))
    camera = Camera.from_r2n2(10.0, 26.0, 0.8, image_size=23)
    whole = raycast(mesh, camera, renderer="builtin")
    monkeypatch.setattr(render, "_PAIRS", 7)
    for a, b in zip(whole, raycast(mesh, camera, renderer="builtin"), strict=True):
        assert torch.equal(a, b)


def test_coincident_faces_show_the_first():
    corners = square(0.5, 2.0)
    twice = Meshes(corners.verts_list(), [torch.cat([corners.faces_packed(), corners.faces_packed()])])
    colors = torch.tensor([[1.0, 0.0, 0.0]] * 2 + [[0.0, 1.0, 0.0]] * 2)
    drawn = raycast(twice, front_camera(), face_colors=colors, renderer="builtin")
    assert drawn.face_index.max() == 1
    assert drawn.rgba[6, 8, 0] > 0.3
    assert drawn.rgba[6, 8, 1] == 0


def test_color_scales_the_shading_and_never_the_alpha():
    mesh, camera = square(0.5, 2.0), front_camera()
    white = raycast(mesh, camera, face_colors=torch.ones(2, 3), renderer="builtin").rgba
    dark = raycast(mesh, camera, face_colors=torch.full((2, 3), 0.25), renderer="builtin").rgba
    assert (white <= 1).all()
    assert torch.equal(white[..., 3], dark[..., 3])
    torch.testing.assert_close(
        dark[6, 8, :3], torch.full((3,), 0.25) * (0.30 + 0.35 + 0.45 * 0.5 / 1.00747), atol=5e-3, rtol=0
    )


def test_creases_stay_sharp_and_curves_turn_smooth():
    camera = Camera.from_r2n2(30.0, 27.0, 0.8, image_size=31)
    box, ball = (
        from_trimesh(trimesh.creation.box((0.4, 0.5, 0.6))),
        from_trimesh(trimesh.creation.icosphere(2, radius=0.4)),
    )
    flat, smooth = (raycast(box, camera, renderer="builtin", crease_angle=a).rgba for a in (0.0, 40.0))
    torch.testing.assert_close(flat, smooth)
    flat, smooth = (raycast(ball, camera, renderer="builtin", crease_angle=a).rgba for a in (0.0, 40.0))
    inner = (smooth[..., 3] == 1)[1:-1, 1:-1]

    def roughness(image):
        values = image[..., 0]
        second = (values[2:, 1:-1] - 2 * values[1:-1, 1:-1] + values[:-2, 1:-1]).abs()
        return second[inner].mean()

    assert roughness(smooth) < 0.7 * roughness(flat)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_empty_mesh_draws_nothing(renderer):
    drawn = raycast(Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3).long()]), front_camera(), renderer=renderer)
    assert not drawn.mask.any()
    assert not drawn.rgba.any()


def test_one_pixel_image():
    drawn = raycast(square(5.0, 2.0), front_camera(1, 1), renderer="builtin", samples=1)
    assert drawn.depth.tolist() == [[2.0]]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_several_views_are_those_of_each_camera(renderer):
    mesh, cameras = ico_sphere(1), [Camera.from_r2n2(azimuth, 27.0, 0.9, 17) for azimuth in (0.0, 100.0, 211.0)]
    for camera, drawn in zip(cameras, raycast_views(mesh, iter(cameras), renderer=renderer), strict=True):
        for a, b in zip(drawn, raycast(mesh, camera, renderer=renderer), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="one mesh, got 2"):
        raycast_views(mesh.extend(2), cameras)


def test_bad_input():
    mesh, camera = square(0.5, 2.0), front_camera()
    with pytest.raises(ValueError, match="one mesh with one camera, got 2"):
        raycast(mesh.extend(2), camera)
    with pytest.raises(ValueError, match="one mesh with one camera"):
        raycast(mesh, Camera.stack([camera, camera]))
    with pytest.raises(ValueError, match="samples must be odd"):
        raycast(mesh, camera, samples=2)
    with pytest.raises(ValueError, match="face_colors must be"):
        raycast(mesh, camera, face_colors=torch.ones(3, 3))
    with pytest.raises(ValueError, match="verts must be finite"):
        raycast(mesh.offset_verts(torch.tensor([math.nan, 0.0, 0.0])), camera)
    with pytest.raises(ValueError, match=r"unknown renderer 'open3'.*did you mean 'open3d'"):
        raycast(mesh, camera, renderer="open3")


def test_without_open3d_auto_is_ours_and_the_explicit_choice_an_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open3d", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    render._installed_renderer.cache_clear()
    try:
        assert resolve_renderer("auto") == "builtin"
    finally:
        render._installed_renderer.cache_clear()
    with pytest.raises(ImportError, match=r"vision3dgen\[viz\]"):
        raycast(square(0.5, 2.0), front_camera(), renderer="open3d")
