"""Meshes damaged on purpose, to see what survives of what is computed from them."""

import torch
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.structures import Meshes

DAMAGES = ("removed", "flipped", "doubled", "noise")
NOISE = 0.01  # standard deviation of a moved vertex, in diagonals of the bounding box


def damage(mesh: Meshes, kind: str, share: float, *, generator: torch.Generator | None = None) -> Meshes:
    """One mesh with a share of its faces removed, turned over, there twice, or with their vertices moved.

    "doubled" adds copies, every other one turned over. "noise" moves all vertices of the chosen faces by a normal
    deviate of 1 % of the bounding box's diagonal in each coordinate. The faces are drawn without replacement.
    """
    check_choice("damage", kind, DAMAGES)
    if len(mesh) != 1 or not 0 <= share <= 1:
        raise ValueError(f"damage takes one mesh and a share from 0 to 1, got {len(mesh)} and {share}")
    verts, faces = mesh.get_mesh_verts_faces(0)
    order = torch.randperm(len(faces), generator=generator).to(faces.device)
    chosen, rest = order[: round(share * len(faces))], order[round(share * len(faces)) :]
    if kind == "removed":
        return Meshes([verts], [faces[rest.sort().values]])
    if kind == "flipped":
        return Meshes([verts], [faces.index_put((chosen,), faces[chosen].flip(1))])
    if kind == "doubled":
        copies = torch.cat([faces[chosen[::2]], faces[chosen[1::2]].flip(1)])
        return Meshes([verts], [torch.cat([faces, copies])])
    return Meshes([_moved(verts, faces[chosen].unique(), generator)], [faces])


def _moved(verts: Tensor, which: Tensor, generator: torch.Generator | None) -> Tensor:
    diagonal = (verts.amax(0) - verts.amin(0)).norm()
    deviates = torch.randn(len(which), 3, generator=generator, dtype=torch.float64).to(verts)
    return verts.index_add(0, which, NOISE * diagonal * deviates)
