"""What is done to an extracted mesh, on fields whose level sets are known."""

import math
import sys

import pytest
import torch

from vision3dgen.ops import extract_surface, field_normals, ico_sphere, refine_surface, simplify_mesh
from vision3dgen.structures import Meshes, join_meshes_as_batch

RADIUS = 0.37


def ball(points):
    """Probability 0.3 on the sphere."""
    return ((RADIUS - points.norm(dim=1)) * 20 + math.log(0.3 / 0.7)).sigmoid()


def coarse():
    return extract_surface(lambda x: (ball(x) > 0.3).float(), (-0.5, 0.5), level=0.5, resolution0=12,
                           upsampling_steps=0).mesh  # fmt: skip


def distance(mesh):
    """Mean distance of the faces' centers from the sphere."""
    return float((mesh.verts_packed()[mesh.faces_packed()].mean(1).norm(dim=1) - RADIUS).abs().mean())


def test_refinement_moves_faces_onto_the_level_and_is_repeatable():
    mesh = coarse()
    settings = {"level": 0.3, "steps": 60, "lr": 1e-3}
    refined = refine_surface(mesh, ball, **settings, generator=torch.Generator().manual_seed(0))
    assert torch.equal(refined.faces_packed(), mesh.faces_packed())
    assert distance(mesh) > 0.01
    assert distance(refined) < 0.35 * distance(mesh)
    again = refine_surface(mesh, ball, **settings, generator=torch.Generator().manual_seed(0), chunk=307)
    torch.testing.assert_close(again.verts_packed(), refined.verts_packed(), atol=1e-4, rtol=0)
    normals = refined.verts_packed()[refined.faces_packed()].mean(1)
    cosine = torch.nn.functional.cosine_similarity(refined.faces_normals_packed(), normals)
    assert float(cosine.mean()) > 0.98  # they look outward


def test_one_step_follows_the_written_formula():
    mesh, weight = ico_sphere(0).scale_verts(0.5), 0.07
    draws = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)).square()
    verts = mesh.verts_packed().clone().requires_grad_()
    loss = 0.0
    for face, row in zip(mesh.faces_packed().tolist(), draws):
        a, b, c = verts[face]
        point = (row[0] * a + row[1] * b + row[2] * c) / row.sum()
        normal = torch.linalg.cross(b - a, c - a)
        target = point / point.norm()  # the field falls outward
        loss = loss + (ball(point[None])[0] - 0.3) ** 2 + weight * (normal / normal.norm() - target).square().sum()
    (gradient,) = torch.autograd.grad(loss / 20, verts)
    expected = verts - 1e-3 * gradient / (gradient.square() * 0.01).sqrt().add(1e-8)  # RMSprop's first step
    refined = refine_surface(mesh, ball, level=0.3, steps=1, lr=1e-3, normal_weight=weight,
                             generator=torch.Generator().manual_seed(3))  # fmt: skip
    torch.testing.assert_close(refined.verts_packed(), expected.detach(), atol=2e-6, rtol=1e-4)


def test_no_gradient_is_needed_around_refinement():
    mesh = coarse()
    with torch.no_grad():
        assert distance(refine_surface(mesh, ball, level=0.3, steps=5, lr=1e-3)) < distance(mesh)
    empty = Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.int64)])
    assert refine_surface(empty, ball, level=0.3).isempty()
    assert torch.equal(refine_surface(mesh, ball, level=0.3, steps=0).verts_packed(), mesh.verts_packed())


def test_normals_are_those_of_the_sphere_and_zero_where_the_field_is_flat():
    points = torch.rand(57, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.no_grad():
        normals = field_normals(ball, points, chunk=11)
    torch.testing.assert_close(normals, points / points.norm(dim=1, keepdim=True), atol=1e-4, rtol=0)
    assert (field_normals(lambda x: x.sum(1) * 0 + 0.3, points) == 0).all()
    assert field_normals(ball, points[:0]).shape == (0, 3)


def test_simplification_keeps_the_sphere_with_fewer_faces():
    pytest.importorskip("open3d")
    sphere, small = ico_sphere(4).scale_verts(RADIUS), ico_sphere(0)
    simple = simplify_mesh(join_meshes_as_batch([sphere, small]), 500)
    assert simple.num_faces_per_mesh().tolist() == [500, 20]
    assert torch.equal(simple[1].verts_packed(), small.verts_packed())
    assert distance(simple[0]) < 0.01
    corners = simple[0].verts_packed()[simple[0].faces_packed()]
    volume = float(torch.linalg.det(corners).sum() / 6)
    assert volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.05)  # positive: still outward


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: refine_surface(ico_sphere(0).extend(2), ball, level=0.3), "batch of one, got 2"),
        (lambda: refine_surface(ico_sphere(0), ball, level=0.3, steps=-1), "steps must be >= 0"),
        (lambda: simplify_mesh(ico_sphere(0), 3), "at least 4"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_open3d_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(ImportError, match=r'pip install "vision3dgen\[viz\]"'):
        simplify_mesh(ico_sphere(1), 10)
