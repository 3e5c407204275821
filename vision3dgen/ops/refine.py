"""What is done to a mesh once it is extracted from a field: fewer faces, a surface nearer to the level, normals.

Source: Mescheder et al. 2019, Occupancy Networks (arXiv:1812.03828), section 3.3.
"""

import importlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.structures import Meshes

Field = Callable[[Tensor], Tensor]  # points (N, 3) to values (N,), larger inside


def refine_surface(
    mesh: Meshes,
    field: Field,
    *,
    level: float,
    steps: int = 30,
    lr: float = 1e-4,
    normal_weight: float = 0.01,
    chunk: int = 16384,
    generator: torch.Generator | None = None,
) -> Meshes:
    """Move the vertices of one mesh so that its faces lie on the level of a field and look down its slope.

    At a random point p of each face, drawn anew in each step, with the face's normal n (equation 6):

        (field(p) - level)^2 + normal_weight |n - n_field(p)|^2,   n_field = -grad field / |grad field|,

    averaged over faces, is lowered by RMSprop. field: probabilities, differentiable; at most `chunk` points at once.
    Faces, and an empty mesh, stay as they are. Raises ValueError for a batch of more than one mesh, or `steps` < 0.
    """
    if len(mesh) != 1:
        raise ValueError(f"mesh must be a batch of one, got {len(mesh)} meshes")
    if steps < 0 or chunk < 1:
        raise ValueError(f"steps must be >= 0 and chunk >= 1, got {steps} and {chunk}")
    faces = mesh.faces_packed()
    if not len(faces):
        return mesh
    with torch.enable_grad():
        verts = mesh.verts_packed().detach().clone().requires_grad_()
        optimizer = torch.optim.RMSprop([verts], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            # Dirichlet(1/2, 1/2, 1/2), as the authors draw: squared normal variables divided by their sum
            weights = torch.randn(len(faces), 3, generator=generator, device=verts.device, dtype=verts.dtype).square()
            weights = weights / weights.sum(1, keepdim=True)
            for part, weight in zip(faces.split(chunk), weights.split(chunk)):
                loss = _misfit(verts[part], weight, field, level, normal_weight) / len(faces)
                (gradient,) = torch.autograd.grad(loss, verts)
                verts.grad = gradient if verts.grad is None else verts.grad + gradient
            optimizer.step()
    return mesh.update_padded(verts.detach()[None])


def _misfit(
    corners: Float[Tensor, "F 3 3"], weights: Float[Tensor, "F 3"], field: Field, level: float, normal_weight: float
) -> Float[Tensor, ""]:
    """The sum over faces of what `refine_surface` lowers."""
    points = (corners * weights[..., None]).sum(1)
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    values = field(points)
    (slope,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    difference = torch.nn.functional.normalize(normals, dim=1) + torch.nn.functional.normalize(slope, dim=1)
    return (values - level).square().sum() + normal_weight * difference.square().sum()


def field_normals(field: Field, points: Float[Tensor, "N 3"], *, chunk: int = 65536) -> Float[Tensor, "N 3"]:
    """Outward unit normals -grad field / |grad field| at points, by differentiation; 0 where the field is flat."""
    pieces = []
    for piece in points.detach().split(chunk):
        with torch.enable_grad():
            piece = piece.clone().requires_grad_()
            (slope,) = torch.autograd.grad(field(piece).sum(), piece)
        length = slope.norm(dim=1, keepdim=True)
        pieces.append(torch.where(length > 0, -slope / length.clamp_min(torch.finfo(slope.dtype).tiny), 0))
    return torch.cat(pieces) if pieces else points


def simplify_mesh(mesh: Meshes, faces: int) -> Meshes:
    """Each mesh of a batch with at most `faces` triangles, by Open3D's quadric error metric; on the CPU.

    Source: Garland & Heckbert 1997. Smaller meshes stay as they are. Raises ValueError for fewer than four faces,
    ImportError saying what to install where Open3D is missing.
    """
    if faces < 4:
        raise ValueError(f"faces must be at least 4, of a tetrahedron, got {faces}")
    try:
        open3d = importlib.import_module("open3d")  # untyped on purpose: its stubs refuse numpy arrays
    except (ImportError, OSError) as error:  # OSError: a shared library that Open3D needs is missing
        raise ImportError(
            f'simplification needs Open3D, which does not import here ({error}): pip install "vision3dgen[viz]"'
        ) from error
    verts_list, faces_list = [], []
    for verts, triangles in zip(mesh.verts_list(), mesh.faces_list()):
        if len(triangles) > faces:
            full = open3d.geometry.TriangleMesh(
                open3d.utility.Vector3dVector(verts.detach().cpu().double().numpy()),
                open3d.utility.Vector3iVector(triangles.cpu().int().numpy()),
            )
            small = full.simplify_quadric_decimation(faces)
            small.remove_unreferenced_vertices()
            verts = torch.from_numpy(np.asarray(small.vertices)).to(verts)
            triangles = torch.from_numpy(np.asarray(small.triangles)).to(triangles)
        verts_list.append(verts)
        faces_list.append(triangles)
    return Meshes(verts_list, faces_list)
