"""Operators on meshes: sampling, areas and normals, Laplacians, graph convolution, subdivision, smoothing, templates.

Everything reads meshes through accessors that our `Meshes` and PyTorch3D's share. Names, arguments and results follow
PyTorch3D 0.7.9 where it has the operator.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_finite
from vision3dgen.ops.backends import full_precision


@runtime_checkable
class MeshesLike(Protocol):
    """What the operators ask of a batch of meshes, ours or PyTorch3D's."""

    def verts_packed(self) -> Tensor: ...

    def faces_packed(self) -> Tensor: ...

    def num_verts_per_mesh(self) -> Tensor: ...

    def num_faces_per_mesh(self) -> Tensor: ...

    def __len__(self) -> int: ...


# ------------------------------------------------------------------------------------------- areas and normals


class AreasNormals(NamedTuple):
    areas: Tensor  # (F,)
    normals: Tensor  # (F, 3) unit, zero for a face without area


@full_precision
def mesh_face_areas_normals(verts: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> AreasNormals:
    """Area and unit normal (right-hand rule) of each face.

    Differs: faces are measured relative to their own size, so tiny meshes keep unit normals; a face whose normal is
    lost in rounding has normal zero, with zero gradient.
    """
    a, b, c = verts[faces].unbind(1)  # (F, 3) each
    u, v = b - a, c - a
    size = torch.maximum(u.detach().abs().amax(1), v.detach().abs().amax(1))[:, None]  # any scale is exact: it cancels
    size = size.where(size > 0, 1)
    cross = torch.linalg.cross(u / size, v / size)
    squared = cross.square().sum(1, keepdim=True)
    solid = squared > torch.finfo(verts.dtype).eps ** 2
    length = squared.where(solid, 1).sqrt()
    normals = (cross / length).where(solid, 0)
    return AreasNormals((0.5 * size.square() * length).where(solid, 0)[:, 0], normals)


# ---------------------------------------------------------------------------------------------------- sampling


class SurfaceSamples(NamedTuple):
    points: Tensor  # (B, S, 3), with gradients to the vertices
    normals: Tensor  # (B, S, 3) unit face normals, with gradients to the vertices
    faces: Tensor  # (B, S) int64 into each mesh's own faces, -1 for a mesh without faces
    barycentrics: Tensor  # (B, S, 3) weights of the face's corners


def sample_surface(
    meshes: MeshesLike, num_samples: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> SurfaceSamples:
    """Points uniform by area on the surface of each mesh, with where they lie.

    A list of generators gives each mesh its own stream: then its samples do not depend on the rest of the batch. A mesh
    without faces gets zeros. Raises ValueError for NaN vertices, for a batch without any face and, naming the mesh,
    for one whose faces have no area.
    """
    verts, faces = meshes.verts_packed(), meshes.faces_packed()
    counts = meshes.num_faces_per_mesh()
    batch, device = len(meshes), verts.device
    if len(faces) == 0:
        raise ValueError(f"cannot sample a surface: none of the {batch} meshes has a face")
    check_finite(**{"vertices (packed)": verts})

    first = counts.cumsum(0) - counts
    with torch.no_grad():
        owner = torch.repeat_interleave(torch.arange(batch, device=device), counts)
        areas = verts.new_zeros(batch, int(counts.max()), dtype=torch.float64)
        areas[owner, torch.arange(len(faces), device=device) - first[owner]] = mesh_face_areas_normals(
            verts.double(), faces
        ).areas
        cumulative = areas.cumsum(1)
        total = cumulative[:, -1:].contiguous()  # (B, 1)
        flat = ((total[:, 0] == 0) & (counts > 0)).nonzero()
        if len(flat):
            raise ValueError(f"cannot sample the surface of mesh {int(flat[0])}: its faces have no area")
        uniform = _uniform(batch, num_samples, generator, device)
        # the first face whose cumulative area exceeds the draw has area; a draw rounded to the total must not pass it
        last = torch.searchsorted(cumulative, total)
        chosen = torch.searchsorted(cumulative, uniform[..., 0] * total, right=True).minimum(last)  # (B, S)
        root, along = uniform[..., 1].sqrt(), uniform[..., 2]
        barycentrics = torch.stack([1 - root, root * (1 - along), root * along], dim=2).to(verts.dtype)
        present = (counts > 0)[:, None]
        packed = (chosen + first[:, None]).where(present, 0)

    corners = verts[faces[packed]]  # (B, S, 3, 3)
    points = (barycentrics[..., None] * corners).sum(2)
    normals = mesh_face_areas_normals(verts, faces).normals[packed]
    mask = present[..., None]
    return SurfaceSamples(
        points.where(mask, 0), normals.where(mask, 0), chosen.where(present, -1), barycentrics.where(mask, 0)
    )


def _uniform(
    batch: int,
    num_samples: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> Float[Tensor, "B S 3"]:
    """Uniform draws in [0, 1), made where the generator lives; float64 because 24 bits miss faces of large meshes."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        drawn = torch.rand(batch, num_samples, 3, generator=generator, dtype=torch.float64, device=source)
        return drawn.to(device)
    if len(generator) != batch:
        raise ValueError(f"generator must be one, or one per mesh ({batch}), got {len(generator)}")
    each = [torch.rand(num_samples, 3, generator=g, dtype=torch.float64, device=g.device) for g in generator]
    return torch.stack([draw.to(device) for draw in each])


def sample_points_from_meshes(
    meshes: MeshesLike,
    num_samples: int = 10000,
    return_normals: bool = False,
    return_textures: bool = False,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Any:
    """Points uniform by area on each mesh: (B, S, 3), then, as asked, normals (B, S, 3) and textures (B, S, C).

    `return_textures` interpolates the vertex attribute "colors" of our meshes, or samples PyTorch3D's textures.
    Errors are those of `sample_surface`.
    Differs: a mesh without area is a ValueError that names it (PyTorch3D: RuntimeError or a device assert), faces are
    chosen by a float64 cumulative sum (PyTorch3D's multinomial stops at 2^24 faces), float64 meshes work.
    """
    samples = sample_surface(meshes, num_samples, generator)
    result: tuple[Tensor, ...] = (samples.points,)
    if return_normals:
        result += (samples.normals,)
    if return_textures:
        result += (_sample_textures(meshes, samples),)
    return result if len(result) > 1 else result[0]


def _sample_textures(meshes: Any, samples: SurfaceSamples) -> Float[Tensor, "B S C"]:
    present = samples.faces >= 0
    counts = meshes.num_faces_per_mesh()
    packed = (samples.faces + (counts.cumsum(0) - counts)[:, None]).where(present, 0)
    if hasattr(meshes, "sample_textures"):
        if meshes.textures is None:
            raise ValueError("return_textures needs meshes with textures, these have none")
        from types import SimpleNamespace

        fragments = SimpleNamespace(
            pix_to_face=packed.where(present, -1)[:, :, None, None], bary_coords=samples.barycentrics[:, :, None, None]
        )
        return meshes.sample_textures(fragments)[:, :, 0, 0]
    attributes = meshes.verts_attributes_packed()
    if "colors" not in attributes:
        raise ValueError(f'return_textures needs the vertex attribute "colors", these meshes have {sorted(attributes)}')
    corners = attributes["colors"][meshes.faces_packed()[packed]]  # (B, S, 3, C)
    return (samples.barycentrics[..., None] * corners).sum(2).where(present[..., None], 0)
