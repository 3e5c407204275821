"""Shapes as a page holds them: small enough that dozens fit, exact to a 65,535th of their box."""

import base64
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.structures import Meshes, Pointclouds

FACES = 12_000  # of a mesh in a page; a browser turns many more, but a page must hold them
POINTS = 20_000


def coarsened(shape: Meshes | Pointclouds) -> Meshes | Pointclouds:
    """The shape itself, or one with at most `FACES` or `POINTS` that looks like it."""
    if isinstance(shape, Pointclouds):
        points, features = shape.points_packed(), shape.features_packed()
        if len(points) <= POINTS:
            return shape
        kept = torch.linspace(0, len(points) - 1, POINTS, device=points.device).round().long()
        return Pointclouds([points[kept]], features=None if features is None else [features[kept]])
    if len(shape.faces_packed()) <= FACES:
        return shape
    return Meshes(*([part] for part in _clustered(shape.verts_packed().double(), shape.faces_packed())))


def packed(
    shape: Meshes | Pointclouds, error: Float[Tensor, " N"] | None = None, *, of: int | None = None
) -> dict[str, Any]:
    """JSON of one mesh or cloud for the page's script: whole 65,535ths of the bounding box, in base64.

    error: a distance per vertex or point, for its color. of: the number of faces or points before it was coarsened.
    """
    points = (shape.verts_packed() if isinstance(shape, Meshes) else shape.points_packed()).detach().cpu().double()
    low = points.amin(0)
    step = (points.amax(0) - low).clamp(min=1e-12) / 65_535
    entry: dict[str, Any] = {
        "low": low.tolist(),
        "step": step.tolist(),
        "points": _encode(((points - low) / step).round().numpy().astype("<u2")),
        "of": size(shape) if of is None else of,
    }
    if isinstance(shape, Meshes):
        wide = len(points) > 65_536
        faces = shape.faces_packed().cpu().numpy()
        entry |= {"faces": _encode(faces.astype("<u4" if wide else "<u2")), "wide": wide}
    else:
        colors = shape.features_packed()
        if colors is not None and colors.shape[1] == 3:
            entry["colors"] = _encode((colors.detach().cpu().clamp(0, 1) * 255).round().numpy().astype(np.uint8))
    if error is not None:
        entry["error"] = _encode(error.detach().cpu().numpy().astype("<f4"))
    return entry


def size(shape: Meshes | Pointclouds) -> int:
    """How many faces or points."""
    return len(shape.faces_packed() if isinstance(shape, Meshes) else shape.points_packed())


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _clustered(points: Float[Tensor, "V 3"], faces: Tensor) -> tuple[Float[Tensor, "W 3"], Tensor]:
    """Vertices that share a cell of a grid become their mean, and faces that collapse vanish; at most `FACES` stay.

    The grid is coarsened until they do (Rossignac and Borrel 1993). Two million faces take seconds.
    """
    low, extent = points.amin(0), float((points.amax(0) - points.amin(0)).max())
    cells = math.ceil(math.sqrt(FACES / 2))  # about as many cells meet a surface as two faces of their box have
    while True:
        cell = ((points - low) / max(extent, 1e-12) * cells).long().clamp(max=cells - 1)
        _, member = torch.unique((cell[:, 0] * cells + cell[:, 1]) * cells + cell[:, 2], return_inverse=True)
        count = int(member.max()) + 1
        a, b, c = torch.sort(member[faces], dim=1).values.unbind(1)
        solid = (a != b) & (b != c)
        _, first = np.unique(((a * count + b) * count + c)[solid].numpy(), return_index=True)
        if len(first) <= FACES:
            break
        cells = int(cells * 0.8)  # of one cell no face is left
    sizes = torch.bincount(member, minlength=count).double()
    means = torch.zeros(count, 3, dtype=torch.float64).index_add_(0, member, points) / sizes[:, None]
    return means.float(), member[faces[solid][torch.from_numpy(first)]]
