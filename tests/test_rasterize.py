"""The rasterizer: analytic pictures, loops, ray casting, finite differences, and fits that must succeed."""

import math
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import naive
from vision3dgen.io import load_mesh
from vision3dgen.ops import ico_sphere, rasterize
from vision3dgen.ops.rasterize import estimate_memory
from vision3dgen.ops.render import raycast
from vision3dgen.structures import Camera, Frame, Meshes, join_meshes_as_batch


def front_camera(height: int = 13, width: int = 17, focal: float = 10.0) -> Camera:
    """At the origin, axes of the world."""
    k = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return Camera(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), k, (height, width))


def skewed_camera(height: int = 13, width: int = 11) -> Camera:
    """Skewed, off center, inside the unit cube."""
    k = torch.tensor([[11.0, 0.7, 5.2], [0.0, 13.0, 7.9], [0.0, 0.0, 1.0]], dtype=torch.float64)
    look = Camera.look_at((0.3, 0.2, 1.1), (0.0, 0.1, 0.0), field_of_view=50, image_size=(height, width))
    return Camera(look.rotation, look.translation, k, (height, width))


def square(half: float, z: float, dtype: torch.dtype = torch.float32) -> Meshes:
    corners = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    return Meshes([torch.tensor(corners, dtype=dtype)], [torch.tensor([[0, 1, 2], [0, 2, 3]])])


def triangle(corners, dtype: torch.dtype = torch.float64) -> Meshes:
    return Meshes([torch.tensor(corners, dtype=dtype)], [torch.tensor([[0, 1, 2]])])


def soup(seed: int = 1, shift: float = 0.0) -> Meshes:
    generator = torch.Generator().manual_seed(seed)
    verts = torch.rand(30, 3, generator=generator) * 2 - 1 + torch.tensor([0.0, 0.0, shift])
    return Meshes([verts], [torch.randint(0, 30, (19, 3), generator=generator)])  # some faces without area


def with_verts(mesh: Meshes, verts: torch.Tensor) -> Meshes:
    return Meshes([verts], [mesh.faces_packed()])


def empty() -> Meshes:
    return Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3).long()])


# ------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_square_covers_its_pixels_and_has_its_depth(dtype):
    drawn = rasterize(square(0.5, 2.0, dtype), front_camera())
    # Projects to 8.5 +- 2.5 columns and 6.5 +- 2.5 rows: columns 6..10, rows 4..8 exactly.
    expected = torch.zeros(1, 13, 17, dtype=dtype)
    expected[:, 4:9, 6:11] = 1
    assert torch.equal(drawn.mask, expected)
    assert (drawn.depth - 2 * expected).abs().max() <= 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(drawn.normals, expected[..., None] * torch.tensor([0, 0, -1], dtype=dtype))
    assert set(drawn.face[expected > 0].tolist()) == {0, 1}
    assert (drawn.face[expected == 0] == -1).all()
    torch.testing.assert_close(drawn.barycentrics.sum(-1), expected)


def test_a_tilted_plane_has_perspective_correct_depth_and_barycentrics():
    camera = front_camera(23, 19, 15.0)
    # Corners of the plane 0.3 x - 0.2 y + z = 2.
    corners = torch.tensor([[x, y, 2 - 0.3 * x + 0.2 * y] for x, y in ((-3.0, -3.0), (3.0, -3.0), (0.0, 4.0))])
    mesh = Meshes([corners.double()], [torch.tensor([[0, 1, 2]])])
    drawn = rasterize(mesh, camera)
    seen = drawn.mask[0] > 0
    rows, columns = seen.nonzero().unbind(1)
    rays = torch.stack([(columns + 0.5 - 9.5) / 15, (rows + 0.5 - 11.5) / 15, torch.ones(len(rows))], 1).double()
    normal = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(drawn.depth[0][seen], 2 / (rays @ normal))
    torch.testing.assert_close(drawn.normals[0][seen], (-normal / normal.norm()).expand(len(rays), 3))
    points = drawn.barycentrics[0][seen] @ corners.double()
    torch.testing.assert_close(points, rays * drawn.depth[0][seen][:, None])


def test_equals_a_triple_loop():
    mesh, camera = soup(), skewed_camera()
    drawn = rasterize(mesh, camera)  # faces behind the camera, faces through it, faces without area
    depth, index = naive.raycast(
        mesh.verts_packed(), mesh.faces_packed(), camera.rotation, camera.translation, camera.intrinsics, (13, 11)
    )
    assert torch.equal(drawn.face[0], index)
    torch.testing.assert_close(drawn.depth[0], depth.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softness", [1e-3, 0.03])
def test_soft_silhouette_equals_a_triple_loop(softness):
    mesh, camera = soup(2, shift=-3.0), skewed_camera()
    mesh = Meshes([mesh.verts_packed().double()], [mesh.faces_packed()[torch.tensor([0, 1, 3, 5, 8, 9, 11])]])
    assert (mesh.faces_areas_packed() > 0).all()
    drawn = rasterize(mesh, camera, softness=softness)
    expected = naive.soft_silhouette(
        *(mesh.verts_packed(), mesh.faces_packed(), camera.rotation, camera.translation, camera.intrinsics),
        (13, 11),
        softness,
    )
    assert 0.1 < expected.mean() < 0.9
    torch.testing.assert_close(drawn.mask[0], expected, atol=7e-4, rtol=0)  # 1e-4 of each of 7 faces is left out
    hard = rasterize(mesh, camera)
    for name in ("depth", "normals", "face", "barycentrics"):
        assert torch.equal(getattr(drawn, name), getattr(hard, name))


@pytest.mark.parametrize("renderer", ["builtin", "open3d"])
def test_agrees_with_ray_casting(shared_data, renderer):
    if renderer == "open3d":
        pytest.importorskip("open3d")
    mesh = load_mesh(shared_data / "meshes" / "spot.obj")
    mesh = Frame.unit_diagonal(mesh.verts_packed()).normalize(mesh)
    camera = Camera.from_r2n2(123.0, 28.0, 0.7, image_size=61)
    drawn, cast = rasterize(mesh, camera), raycast(mesh, camera, renderer=renderer, samples=1)
    mask = drawn.mask[0] > 0
    assert mask.float().mean() > 0.1
    assert (mask == cast.mask).float().mean() > 0.995
    both = mask & cast.mask
    assert (drawn.depth[0] - cast.depth)[both].abs().max() < 1e-4
    same = both & (drawn.face[0] == cast.face_index)
    assert same.sum() > 0.99 * both.sum()
    torch.testing.assert_close(drawn.normals[0][same], cast.normals[same])


def test_the_silhouette_of_a_sphere_has_the_area_of_its_cone():
    camera = Camera.look_at((0.0, 0.0, 2.0), field_of_view=40, image_size=(67, 64))
    radius = float(camera.intrinsics[0, 0]) * math.tan(math.asin(0.5 / 2.0))
    sphere = ico_sphere(3).scale_verts(0.5)
    hard, soft = rasterize(sphere, camera).mask.sum(), rasterize(sphere, camera, softness=1e-6).mask.sum()
    assert abs(float(hard) / (math.pi * radius**2) - 1) < 0.02
    assert abs(float(soft) / (math.pi * radius**2) - 1) < 0.02


def test_neighboring_faces_leave_no_pixel_between_them():
    generator = torch.Generator().manual_seed(3)
    grid = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="xy"), -1).view(-1, 2) - 4
    grid = grid + 0.3 * (torch.rand(81, 2, generator=generator) - 0.5)
    first = torch.arange(81).view(9, 9)[:-1, :-1].reshape(-1)
    faces = torch.cat([torch.stack([first, first + 1, first + 10], 1), torch.stack([first, first + 10, first + 9], 1)])
    mesh = Meshes([torch.cat([grid, torch.full((81, 1), 3.0)], 1)], [faces])
    assert (rasterize(mesh, front_camera(29, 31, 12.0)).mask == 1).all()


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("output", ["depth", "normals", "barycentrics", "mask"])
def test_gradients_by_finite_differences(output):
    camera = front_camera(5, 7, 6.0)
    corners = [[-0.61, -0.42, 1.7], [0.83, -0.31, 2.1], [0.22, 0.77, 1.9], [-0.55, 0.63, 2.6]]
    verts = torch.tensor(corners, dtype=torch.float64, requires_grad=True)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])

    def draw(verts, rotation, translation, intrinsics):
        seen = Camera(rotation, translation, intrinsics, camera.image_size)
        return getattr(rasterize(Meshes([verts], [faces]), seen, softness=0.02), output)

    tensors = [x.clone().requires_grad_() for x in (camera.rotation, camera.translation, camera.intrinsics)]
    assert (draw(verts, *tensors).detach() != 0).sum() > 5
    assert torch.autograd.gradcheck(draw, (verts, *tensors))


def test_gradients_of_faces_through_the_near_plane():
    camera = front_camera(5, 7, 6.0)
    plane = [[-0.4, -0.3], [0.7, -0.2], [0.1, 0.25]]
    for depths in ([1.0, 1.3, -0.4], [-0.3, -0.5, 1.2]):  # one corner behind, or two
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            verts = torch.cat([torch.tensor(plane), torch.tensor(depths)[:, None]], 1).double().requires_grad_()
            faces = torch.tensor([order])

            def draw(verts, faces=faces):
                drawn = rasterize(Meshes([verts], [faces]), camera, softness=0.02, near=0.1)
                return drawn.mask, drawn.depth

            assert 0.1 < draw(verts)[0].mean() < 0.95
            assert (draw(verts)[1] > 0).sum() > 2
            assert torch.autograd.gradcheck(draw, verts)


def test_second_derivatives():
    camera = front_camera(3, 4, 4.0)
    verts = torch.tensor([[-0.6, -0.4, 1.7], [0.8, -0.3, 2.1], [0.2, 0.8, 1.9]], dtype=torch.float64)

    def draw(verts):
        drawn = rasterize(Meshes([verts], [torch.tensor([[0, 1, 2]])]), camera, softness=0.05, budget=3000)
        return drawn.depth, drawn.normals, drawn.mask

    assert (draw(verts)[0] > 0).sum() > 2
    assert torch.autograd.gradgradcheck(draw, verts.requires_grad_())


def test_the_area_of_a_triangle_follows_its_scale_and_its_depth():
    camera = front_camera(41, 43, 40.0)
    base = torch.tensor([[-0.41, -0.33, 2.0], [0.37, -0.29, 2.0], [0.05, 0.43, 2.0]], dtype=torch.float64)
    edge = base[1:] - base[0]
    area = 0.5 * abs(float(edge[0, 0] * edge[1, 1] - edge[0, 1] * edge[1, 0])) * (40 / 2.0) ** 2  # in pixels
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    move = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    verts = base * torch.stack([scale, scale, torch.ones_like(scale)]) + move
    mask = rasterize(Meshes([verts], [torch.tensor([[0, 1, 2]])]), camera, softness=1e-3).mask
    assert abs(float(mask.detach().sum()) / area - 1) < 0.03
    by_scale, by_move = torch.autograd.grad(mask.sum(), (scale, move))
    assert abs(float(by_scale) / (2 * area) - 1) < 0.05  # area ~ scale^2
    assert abs(float(by_move[2]) / (-2 * area / 2.0) - 1) < 0.05  # area ~ 1 / z^2
    side = 0.76 * (40 / 2.0) ** 2  # what one side, 0.76 long, sweeps alone
    assert by_move[:2].abs().max() < 0.1 * side  # it only slides: the other sides take that back


def test_a_border_that_moves_sweeps_pixels():
    # The right border of a long strip that leaves the image left, above and below: one column per 1/10 at z = 1.
    camera = front_camera()
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    corners = torch.tensor([[-9.0, -9.0, 1.0], [0.03, -9.0, 1.0], [0.03, 9.0, 1.0], [-9.0, 9.0, 1.0]]).double()
    verts = corners + offset * torch.tensor([0.0, 1.0, 1.0, 0.0]).double()[:, None] * torch.eye(3).double()[0]
    mask = rasterize(Meshes([verts], [torch.tensor([[0, 1, 2], [0, 2, 3]])]), camera, softness=0.05).mask
    mask.sum().backward()
    assert abs(float(offset.grad) / (13 * 10) - 1) < 0.05


def test_a_sphere_fits_an_ellipse():
    camera = Camera.look_at((0.0, 0.0, 3.0), field_of_view=45, image_size=(32, 32))
    sphere = ico_sphere(1)
    target = rasterize(
        with_verts(sphere, sphere.verts_packed() * torch.tensor([0.9, 0.45, 0.7])), camera, softness=1e-3
    ).mask
    verts = (0.6 * sphere.verts_packed()).requires_grad_()
    optimizer = torch.optim.Adam([verts], lr=0.04)
    losses = []
    for _ in range(15):
        loss = (rasterize(with_verts(sphere, verts), camera, softness=1e-3).mask - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], losses


def test_a_plane_moves_to_its_depth():
    camera = front_camera()
    target = rasterize(triangle([[-3.0, -3.0, 2.6], [3.0, -3.0, 2.2], [0.0, 4.0, 2.9]]), camera).depth
    verts = torch.tensor([[-3.0, -3.0, 2.0], [3.0, -3.0, 2.0], [0.0, 4.0, 2.0]], dtype=torch.float64)
    heights = verts[:, 2].clone().requires_grad_()
    optimizer = torch.optim.Adam([heights], lr=0.1)
    losses = []
    for _ in range(60):
        drawn = rasterize(Meshes([torch.cat([verts[:, :2], heights[:, None]], 1)], [torch.tensor([[0, 1, 2]])]), camera)
        loss = ((drawn.depth - target) * (drawn.mask > 0) * (target > 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0], losses
    torch.testing.assert_close(heights.detach(), torch.tensor([2.6, 2.2, 2.9]).double(), atol=0.15, rtol=0)


# ---------------------------------------------------------------------------------------- batches, sizes, chunks


@pytest.mark.parametrize("softness", [None, 2e-3])
def test_a_ragged_batch_equals_a_loop(softness):
    cameras = [Camera.from_r2n2(a, 25.0, 0.8, image_size=19) for a in (0.0, 70.0, 160.0, 250.0)]
    members = [ico_sphere(1).scale_verts(0.4), empty(), square(0.3, 0.0), soup(4).scale_verts(0.2)]
    batch = rasterize(join_meshes_as_batch(members), Camera.stack(cameras), softness=softness)
    first = 0
    for i, (member, camera) in enumerate(zip(members, cameras)):
        single = rasterize(member, camera, softness=softness)
        for name in ("mask", "depth", "normals", "barycentrics"):
            torch.testing.assert_close(getattr(batch, name)[i], getattr(single, name)[0], atol=1e-6, rtol=1e-6)
        face = single.face[0]
        assert torch.equal(batch.face[i], torch.where(face >= 0, face + first, -1))
        first += len(member.faces_packed())


def test_one_camera_sees_all_members():
    mesh, camera = join_meshes_as_batch([square(0.5, 2.0), square(0.3, 1.0)]), front_camera()
    one, many = rasterize(mesh, camera), rasterize(mesh, Camera.stack([camera, camera]))
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


def test_image_size_resizes_the_camera():
    mesh, camera = ico_sphere(2).offset_verts(torch.tensor([0.0, 0.0, 3.0])), front_camera()
    drawn = rasterize(mesh, camera, image_size=(26, 51))
    expected = rasterize(mesh, camera.resize((26, 51)))
    assert drawn.mask.shape == (1, 26, 51)
    assert torch.equal(drawn.depth, expected.depth)


@pytest.mark.parametrize("budget", [1, 20_000])
@pytest.mark.parametrize("faces_per_pixel", [None, 2])
def test_the_budget_changes_nothing(budget, faces_per_pixel):
    mesh, camera = soup(5), skewed_camera(7, 5)
    drawn, grads = [], []
    for bytes_allowed in (1 << 28, budget):
        verts = mesh.verts_packed().clone().requires_grad_()
        arguments = {"softness": 0.01, "faces_per_pixel": faces_per_pixel, "budget": bytes_allowed}
        drawn.append(rasterize(with_verts(mesh, verts), camera, **arguments))
        (drawn[-1].mask.sum() + drawn[-1].depth.sum() + drawn[-1].barycentrics[..., 0].sum()).backward()
        grads.append(verts.grad)
    assert torch.equal(drawn[0].face, drawn[1].face)
    for a, b in zip(drawn[0], drawn[1], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once that were made inside the block."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.free, key, size)
        return result

    def free(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("softness, faces_per_pixel", [(None, None), (1e-3, None), (1e-3, 3)])
@pytest.mark.parametrize("budget", [200_000, 1 << 28])
def test_memory_stays_under_the_estimate(softness, faces_per_pixel, budget):
    camera = Camera.look_at((0.0, 0.0, 2.5), field_of_view=30, image_size=(128, 128))  # the sphere fills it
    mesh = ico_sphere(2)
    verts = mesh.verts_packed().clone().requires_grad_()
    with LiveBytes() as memory:
        drawn = rasterize(
            with_verts(mesh, verts), camera, softness=softness, faces_per_pixel=faces_per_pixel, budget=budget
        )
        loss = drawn.depth.sum() + drawn.normals[..., 2].sum() + drawn.barycentrics[..., 0].sum()
        (loss if softness is None else loss + drawn.mask.sum()).backward()
    estimate = estimate_memory(320, 128 * 128, faces_per_pixel=faces_per_pixel, budget=budget)
    assert 100 * 128 * 128 < memory.peak < estimate
    if budget == 200_000:
        assert memory.peak - 200_000 > 0.2 * (estimate - 200_000)  # nor is the estimate far from the truth


def test_faces_per_pixel_takes_the_nearest():
    near, far = square(0.25, 1.0, torch.float64), square(2.0, 2.0, torch.float64)
    both = Meshes([torch.cat([far.verts_packed(), near.verts_packed()])], [torch.tensor([[0, 1, 2], [4, 5, 6]])])
    lower, upper = triangle(far.verts_packed()[:3].tolist()), triangle(near.verts_packed()[:3].tolist())
    camera, softness = front_camera(), 0.02
    one = rasterize(both, camera, softness=softness, faces_per_pixel=1).mask
    front, back = (rasterize(mesh, camera, softness=softness).mask for mesh in (upper, lower))
    torch.testing.assert_close(one, torch.where(front > 0, front, back))
    everything = rasterize(both, camera, softness=softness)
    torch.testing.assert_close(rasterize(both, camera, softness=softness, faces_per_pixel=9).mask, everything.mask)
    torch.testing.assert_close(everything.mask, 1 - (1 - front) * (1 - back))


# -------------------------------------------------------------------------------------- what breaks other renderers


@pytest.mark.parametrize("softness", [None, 1e-3])
def test_empty_meshes_keep_the_graph(softness):
    verts = torch.zeros(2, 3, requires_grad=True)
    mesh = Meshes([verts[:0], verts], [torch.zeros(0, 3).long(), torch.zeros(0, 3).long()])
    drawn = rasterize(mesh, front_camera(), softness=softness)
    assert drawn.depth.shape == drawn.mask.shape == drawn.face.shape == (2, 13, 17)
    assert not any(x.any() for x in (drawn.mask, drawn.depth, drawn.normals, drawn.barycentrics))
    assert (drawn.face == -1).all()
    loss = drawn.depth.sum() + drawn.normals.sum() + (0 if softness is None else drawn.mask.sum())
    loss.backward()
    assert torch.equal(verts.grad, torch.zeros(2, 3))


def degenerate_faces() -> Meshes:
    """A triangle and, in front of it, faces without area in the image; an isolated vertex."""
    verts = torch.tensor(
        [
            *([-1.0, -1.0, 2.0], [1.0, -1.0, 2.0], [0.0, 1.0, 2.0]),
            *([-0.5, -0.5, 1.0], [0.0, 0.0, 1.0], [0.5, 0.5, 1.0]),  # on a line
            *([0.1, 0.2, 1.0], [0.1, 0.2, 1.0], [0.3, 0.3, 1.0]),  # two at one place
            *([0.2, 0.1, 1.0], [0.4, 0.2, 2.0], [0.6, 0.3, 3.0]),  # on a line through the camera
            *([0.1, 0.1, 1.0], [0.2, 0.2, 2.0], [0.5, 0.5, 1.0]),  # seen edge-on
            *([0.0, 0.0, 0.0], [0.3, 0.1, 1.0], [0.1, 0.3, 1.0]),  # a corner in the camera's center
            [9.0, 9.0, 9.0],
        ]
    )
    same = torch.tensor([[6, 6, 6], [6, 8, 6]])
    return Meshes([verts], [torch.cat([torch.arange(18).view(6, 3), same])])


@pytest.mark.parametrize("softness", [None, 1e-3])
def test_faces_without_area_in_the_image_contribute_nothing(softness):
    mesh, camera = degenerate_faces(), front_camera()
    verts = mesh.verts_packed().clone().requires_grad_()
    drawn = rasterize(with_verts(mesh, verts), camera, softness=softness)
    alone = rasterize(Meshes([mesh.verts_packed()], [mesh.faces_packed()[:1]]), camera, softness=softness)
    for a, b in zip(drawn, alone, strict=True):
        assert torch.equal(a, b)
    outputs = (drawn.depth, drawn.normals, drawn.barycentrics, *([] if softness is None else [drawn.mask]))
    sum(x.square().sum() for x in outputs).backward()
    assert verts.grad.isfinite().all()
    assert verts.grad[:3].any()
    assert not verts.grad[3:].any()


def test_slivers_and_needles_have_finite_gradients():
    generator = torch.Generator().manual_seed(7)
    verts = torch.rand(60, 3, generator=generator) * 2 - 1
    verts[20:40] = verts[:20] + 10.0 ** -torch.arange(20.0)[:, None] * verts[20:40]  # ever closer to the first 20
    faces = torch.stack([torch.arange(20), torch.arange(20, 40), torch.arange(40, 60)], 1)
    verts = verts.requires_grad_()
    drawn = rasterize(Meshes([verts], [faces]), skewed_camera(), softness=1e-3)
    for x in drawn:
        assert x.isfinite().all()
    sum(x.square().sum() for x in drawn if x.requires_grad).backward()
    assert verts.grad.isfinite().all()


def test_faces_that_cross_the_near_plane_are_cut():
    # A floor under the camera that reaches far behind it: y = 0.5, seen below the horizon.
    floor = triangle([[-50.0, 0.5, -40.0], [50.0, 0.5, -40.0], [0.0, 0.5, 60.0]])
    camera = front_camera(41, 17, 10.0)
    drawn = rasterize(floor, camera, softness=1e-5)
    rows = (torch.arange(41) + 0.5 - 20.5) / 10
    below = rows > 0.5 / 59
    expected = torch.where(below, 0.5 / rows.clamp(min=1e-3), 0.0).double()
    torch.testing.assert_close(drawn.depth[0, :, 8], expected)
    torch.testing.assert_close(drawn.mask[0, :, 8], below.double(), atol=1e-3, rtol=0)
    turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    slope = with_verts(floor, floor.verts_packed() @ turn)  # cut along a slanted line in the image
    cut, whole = (rasterize(slope, camera, near=near).depth for near in (0.4, 1e-6))
    torch.testing.assert_close(cut, torch.where(whole >= 0.4, whole, 0.0))
    assert 0 < (cut > 0).sum() < (whole > 0).sum()
    cut = rasterize(floor, camera, near=0.4)
    assert torch.equal(cut.depth, torch.where(drawn.depth >= 0.4, drawn.depth, 0.0))
    assert cut.mask.sum() < drawn.mask.sum()
    # The soft outline of what is left is that of the quadrilateral cut by hand.
    reach = [50 * (1 - (z + 40) / 100) for z in (0.4, 60.0)]
    corners = torch.tensor([[-reach[0], 0.5, 0.4], [reach[0], 0.5, 0.4], [0.0, 0.5, 60.0]])
    by_hand = rasterize(Meshes([corners.double()], [torch.tensor([[0, 1, 2]])]), camera, softness=1e-3)
    cut = rasterize(floor, camera, near=0.4, softness=1e-3)
    torch.testing.assert_close(cut.mask, by_hand.mask)


def test_a_mirrored_camera_sees_the_mirror_image():
    mesh, camera = soup(2, shift=-3.0), skewed_camera()
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    flip[0, 2] = camera.image_size[1]
    mirror = Camera(camera.rotation, camera.translation, flip @ camera.intrinsics, camera.image_size)
    a, b = rasterize(mesh, camera, softness=0.01), rasterize(mesh, mirror, softness=0.01)
    torch.testing.assert_close(a.mask.flip(2), b.mask)
    torch.testing.assert_close(a.depth.flip(2), b.depth)


def test_what_lies_behind_is_not_seen():
    drawn = rasterize(square(0.5, -2.0), front_camera(), softness=1e-2)
    assert not drawn.mask.any()
    assert (drawn.face == -1).all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_changes_only_depth(scale):
    mesh = ico_sphere(2).scale_verts(0.4)
    camera = Camera.from_r2n2(40.0, 27.0, 0.8, image_size=23)
    far = Camera(camera.rotation, scale * camera.translation, camera.intrinsics, camera.image_size)
    a, b = rasterize(mesh, camera, softness=1e-3), rasterize(mesh.scale_verts(scale), far, softness=1e-3, near=1e-9)
    torch.testing.assert_close(a.mask, b.mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.depth * scale, b.depth, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.normals, b.normals, atol=1e-5, rtol=0)


def test_coincident_faces_show_the_first():
    corners = square(0.5, 2.0)
    twice = Meshes(corners.verts_list(), [torch.cat([corners.faces_packed()] * 2)])
    assert rasterize(twice, front_camera()).face.max() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    mesh, camera = square(0.5, 2.0), front_camera()
    half = rasterize(square(0.5, 2.0, dtype), camera)
    assert half.depth.dtype == half.mask.dtype == half.barycentrics.dtype == dtype
    assert torch.equal(half.depth.float(), rasterize(mesh, camera).depth)
    sphere = ico_sphere(1).offset_verts(torch.tensor([0.0, 0.0, 3.0]))
    expected = rasterize(sphere, camera, softness=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rasterize(sphere, camera, softness=1e-3)
    for a, b in zip(expected, inside, strict=True):
        assert torch.equal(a, b)


def test_bad_input(monkeypatch):
    mesh, camera = square(0.5, 2.0), front_camera()
    with pytest.raises(ValueError, match="one for each of 3 meshes, got a batch of"):
        rasterize(mesh.extend(3), Camera.stack([camera, camera]))
    with pytest.raises(ValueError, match="softness must be > 0"):
        rasterize(mesh, camera, softness=0.0)
    with pytest.raises(ValueError, match="faces_per_pixel must be >= 1 and goes with softness"):
        rasterize(mesh, camera, faces_per_pixel=3)
    with pytest.raises(ValueError, match="near must be > 0"):
        rasterize(mesh, camera, near=0.0)
    with pytest.raises(ValueError, match="budget must be"):
        rasterize(mesh, camera, budget=0)
    with pytest.raises(ValueError, match=r"image_size must be \(H, W\)"):
        rasterize(mesh, camera, image_size=(0, 4))
    with pytest.raises(ValueError, match="verts must be finite"):
        rasterize(mesh.offset_verts(torch.tensor([math.nan, 0.0, 0.0])), camera)
    with pytest.raises(ValueError, match="unknown backend 'pytorch'"):
        rasterize(mesh, camera, backend="pytorch")
    monkeypatch.setitem(sys.modules, "pytorch3d", None)
    with pytest.raises(ImportError, match=r"vision3dgen\[pytorch3d\]"):
        rasterize(mesh, camera, backend="pytorch3d")


# ------------------------------------------------------------------------------------------------------ pytorch3d


@pytest.mark.pytorch3d
@pytest.mark.parametrize("image_size", [(37, 37), (31, 53), (53, 31)])
def test_pytorch3d_draws_the_same(image_size):
    pytest.importorskip("pytorch3d.renderer")
    members = [ico_sphere(2).scale_verts(0.4), empty(), square(0.3, 0.0)]
    mesh = join_meshes_as_batch(members)
    cameras = [Camera.from_r2n2(a, 25.0, 0.8, image_size=64).resize(image_size) for a in (0.0, 70.0, 20.0)]
    shift = torch.tensor([[0.0, 0.0, 1.7], [0.0, 0.0, -2.3], [0.0, 0.0, 0.0]], dtype=torch.float64)
    cameras = [Camera(c.rotation, c.translation, c.intrinsics + shift, image_size) for c in cameras]
    verts, images = mesh.verts_packed(), []
    for backend in ("torch", "pytorch3d"):
        leaf = verts.clone().requires_grad_()
        moved = Meshes(list(leaf.split(mesh.num_verts_per_mesh().tolist())), mesh.faces_list())
        drawn = rasterize(moved, Camera.stack(cameras), softness=1e-4, backend=backend)
        (grad,) = torch.autograd.grad(drawn.mask.square().sum(), leaf)
        images.append((drawn, grad))
    (ours, grad), (theirs, their_grad) = images
    assert (ours.face == theirs.face).float().mean() > 0.995
    same = ours.face == theirs.face
    torch.testing.assert_close(ours.depth[same], theirs.depth[same], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.normals[same], theirs.normals[same], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.barycentrics[same], theirs.barycentrics[same], atol=5e-3, rtol=0)
    assert (ours.mask - theirs.mask).abs().max() < 1e-3
    assert (grad - their_grad).norm() < 1e-3 * grad.norm()


@pytest.mark.pytorch3d
def test_pytorch3d_cuts_at_the_near_plane_and_draws_nothing_of_nothing():
    pytest.importorskip("pytorch3d.renderer")
    mesh, camera = soup(3).scale_verts(2.0), front_camera(29, 31, 12.0)
    ours, theirs = (rasterize(mesh, camera, near=0.05, backend=b) for b in ("torch", "pytorch3d"))
    assert (ours.face == theirs.face).float().mean() > 0.995
    torch.testing.assert_close(ours.depth, theirs.depth, atol=1e-4, rtol=1e-4)
    assert not rasterize(empty(), camera, backend="pytorch3d").mask.any()


@pytest.mark.pytorch3d
def test_pytorch3d_leaves_no_face_out():
    pytest.importorskip("pytorch3d.renderer")
    mesh = square(0.5, 2.0)
    many = Meshes([mesh.verts_packed()], [mesh.faces_packed().repeat(100, 1)])
    ours, theirs = (rasterize(many, front_camera(), softness=1e-2, backend=b).mask for b in ("torch", "pytorch3d"))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    few = rasterize(many, front_camera(), softness=1e-2, backend="pytorch3d", faces_per_pixel=2).mask
    assert (theirs - few).max() > 0.5


@pytest.mark.pytorch3d
def test_pytorch3d_has_no_skew():
    pytest.importorskip("pytorch3d.renderer")
    with pytest.raises(ValueError, match="no cameras with skew"):
        rasterize(soup(), skewed_camera(), backend="pytorch3d")
