"""From meshes to voxels and back: solid and surface voxelization, cubify.

Voxels are (B, D, H, W) = (z, y, x); where their samples lie is said by a `GridSpec`.

Reference: Akenine-Möller, Fast 3D triangle-box overlap testing, 2001.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice, check_finite, check_numbers, check_shape
from vision3dgen.ops.inside import contains, edge_lines, expand_ranges, planes, range_batches
from vision3dgen.ops.meshes import MeshesLike
from vision3dgen.structures import GridSpec, Meshes

_CHUNK = 1 << 18  # triangle-voxel pairs handled at once


# --------------------------------------------------------------------------------------------------- meshes to voxels


def voxelize(
    meshes: MeshesLike,
    grid: GridSpec,
    fill: Literal["solid", "surface"] = "solid",
    *,
    inside: Literal["parity", "nonzero", "winding"] = "parity",
) -> Bool[Tensor, "B D H W"]:
    """Voxels that a mesh fills, or that its surface passes.

    "solid": the samples of the grid inside the mesh, by the test `inside` as in `contains` ("parity" for closed meshes,
    "nonzero" for overlapping closed parts with consistent orientation, "winding" for holes; it is slow). Samples on the
    surface follow the half-open rule [low, high): a box whose faces lie on sample positions holds those on its lower
    faces and not those on its upper ones.

    "surface": the voxels, one spacing wide around each sample, that meet a triangle, exactly. Voxels are half-open as
    well, so a face on the boundary of two belongs to the upper one; only the grid's last voxels own their upper side.
    """
    check_choice("fill", fill, ("solid", "surface"))
    check_choice("inside", inside, ("parity", "nonzero", "winding"))
    verts, faces = meshes.verts_packed(), meshes.faces_packed()
    check_finite(verts=verts)
    device = verts.device
    depth, height, width = grid.shape
    if fill == "solid" and inside == "winding":
        points = grid.points(torch.float64, device).view(1, -1, 3).expand(len(meshes), -1, -1)
        return contains(meshes, points, method="winding").view(-1, depth, height, width)
    index = torch.arange(max(grid.shape), dtype=torch.float64, device=device)
    x, y, z = grid.to_world(index[:, None].expand(-1, 3)).unbind(1)
    samples = (x[:width].contiguous(), y[:height].contiguous(), z[:depth].contiguous())
    members = verts.detach()[faces].double().split(meshes.num_faces_per_mesh().tolist())
    if fill == "solid":
        return torch.stack([_solid(corners, samples, inside) for corners in members])
    return torch.stack([_surface(corners, samples, grid) for corners in members])


def _solid(
    corners: Float[Tensor, "F 3 3"], samples: tuple[Tensor, Tensor, Tensor], inside: str
) -> Bool[Tensor, "D H W"]:
    """Crossings of the rays along -z from each sample, found by drawing each triangle row by row."""
    x, y, z = samples
    columns, layers = len(x), len(z) + 1
    change = torch.zeros(len(y) * columns * layers, dtype=torch.int32, device=x.device)
    lines, heights = edge_lines(corners), planes(corners)
    bottom = torch.searchsorted(y, corners[..., 1].amin(1).contiguous())
    top = torch.searchsorted(y, corners[..., 1].amax(1).contiguous())
    for batch in range_batches(top - bottom, _CHUNK):
        face, row = expand_ranges(bottom[batch], (top - bottom)[batch])
        face = face + batch.start
        at_y = y[row][:, None]
        low, slope = lines.low[face], lines.slope[face]
        passes = (low <= at_y) & (at_y < lines.high[face])  # two edges of each triangle, or none
        ends = torch.searchsorted(x, lines.x[face] + (at_y - low) * slope)  # samples left of each edge
        first = torch.where(passes, ends, columns).amin(1)
        last = torch.where(passes, ends, 0).amax(1)
        sign = torch.where(passes & (ends == last[:, None]), lines.sign[face], 0).sum(1)
        drawn = (last > first).nonzero()[:, 0]
        face, row, sign, first, count = face[drawn], row[drawn], sign[drawn], first[drawn], (last - first)[drawn]
        for part in range_batches(count, _CHUNK):
            owner, column = expand_ranges(first[part], count[part])
            owner = owner + part.start
            crossing = heights.at(face[owner], x[column], y[row[owner]])
            layer = torch.searchsorted(z, crossing)  # the first sample at or above the face
            cell = (row[owner] * columns + column) * layers + layer
            change.index_add_(
                0, cell, sign[owner].int() if inside == "nonzero" else torch.ones_like(cell, dtype=torch.int32)
            )
    below = change.view(len(y), columns, layers)[:, :, :-1].cumsum(2, dtype=torch.int32)
    filled = below != 0 if inside == "nonzero" else below % 2 == 1
    return filled.permute(2, 0, 1).contiguous()


def _surface(
    corners: Float[Tensor, "F 3 3"], samples: tuple[Tensor, Tensor, Tensor], grid: GridSpec
) -> Bool[Tensor, "D H W"]:
    """Separating axes: the three of the box, the triangle's normal, and the nine products of their edges."""
    device = corners.device
    depth, height, width = grid.shape
    half = torch.tensor(grid.spacing, dtype=torch.float64, device=device) / 2
    full = torch.zeros(depth * height * width, dtype=torch.bool, device=device)
    first, count = [], []
    for axis, positions in enumerate(samples):
        # voxel i is [boundary i, boundary i + 1); its boundaries are those of its neighbors, bit for bit
        boundaries = torch.cat(
            [positions[:1] - half[axis], (positions[1:] + positions[:-1]) / 2, positions[-1:] + half[axis]]
        )
        low, high = corners[..., axis].amin(1).contiguous(), corners[..., axis].amax(1).contiguous()
        start = torch.searchsorted(boundaries, low, right=True) - 1
        end = torch.searchsorted(boundaries, high, right=True)
        cells = len(positions)
        start = torch.where(low == boundaries[-1], cells - 1, start)
        end = torch.where(high == boundaries[-1], cells, end)
        start, end = start.clamp_min(0), end.clamp_max(cells)
        first.append(start)
        count.append((end - start).clamp_min(0))
    total = count[0] * count[1] * count[2]
    center = torch.stack([positions.mean() for positions in samples])
    scale = 16 * torch.finfo(torch.float64).eps * (corners.abs().amax() + center.abs().amax()) if len(corners) else 0.0
    for batch in range_batches(total, _CHUNK):
        face, place = expand_ranges(torch.zeros_like(total[batch]), total[batch])
        face = face + batch.start
        nx, ny = count[0][face], count[1][face]
        ix, iy, iz = first[0][face] + place % nx, first[1][face] + place // nx % ny, first[2][face] + place // (nx * ny)
        middle = torch.stack([samples[0][ix], samples[1][iy], samples[2][iz]], dim=1)
        triangle = corners[face] - middle[:, None]  # (P, 3, 3)
        edges = triangle.roll(-1, 1) - triangle
        normal = torch.linalg.cross(edges[:, 0], edges[:, 1])
        apart = (normal * triangle[:, 0]).sum(1).abs() > normal.abs() @ half + scale * normal.abs().sum(1)
        for edge in range(3):
            for axis in range(3):
                u, v = (axis + 1) % 3, (axis + 2) % 3
                # the product of the edge with a box axis has only the two components (u, v)
                a, b = -edges[:, edge, v], edges[:, edge, u]
                shadow = a[:, None] * triangle[..., u] + b[:, None] * triangle[..., v]  # (P, 3)
                reach = (half[u] + scale) * a.abs() + (half[v] + scale) * b.abs()
                apart |= (shadow.amin(1) > reach) | (shadow.amax(1) < -reach)
        hit = ~apart
        full[(iz[hit] * height + iy[hit]) * width + ix[hit]] = True
    return full.view(depth, height, width)


# --------------------------------------------------------------------------------------------------- voxels to meshes

# The sides of a voxel in the order of their faces, and the corners (x, y, z offsets) of their two triangles.
_SIDES = (
    ((-1, 0, 0), "000 001 010 001 011 010"),
    ((0, 1, 0), "010 011 110 011 111 110"),
    ((0, 0, -1), "000 010 110 000 110 100"),
    ((0, -1, 0), "000 101 001 000 100 101"),
    ((1, 0, 0), "110 111 101 110 101 100"),
    ((0, 0, 1), "001 111 011 001 101 111"),
)


def cubify(
    voxels: Float[Tensor, "N D H W"],
    thresh: float,
    *,
    feats: Float[Tensor, "N K D H W"] | None = None,
    device: Any = None,
    align: Literal["topleft", "corner", "center"] = "topleft",
) -> Meshes:
    """Each voxel with a value `>= thresh` as a cube of 12 triangles, faces between two of them left out.

    With size n along an axis, voxel i spans [i, i + 1] in units of 2 / n from -1 for `align` "corner", so the grid
    fills [-1, 1]; in units of 2 / (n - 1) from -1 for "topleft" and from -1 - 1 / (n - 1) for "center", so voxel
    centers fill [-1, 1] (n = 1: units of 2). Vertices are shared, so voxels that touch along an edge share it (four
    faces meet there). feats: features of voxels, given to their faces as the attribute "feats" (F, K). Not
    differentiable in voxels. Raises ValueError for NaN; infinity is a value.

    Differs: an attribute takes the place of PyTorch3D's atlas textures.
    """
    size = check_shape(voxels=(voxels, "N D H W"))
    check_numbers(voxels=voxels)
    check_choice("align", align, ("topleft", "corner", "center"))
    if feats is not None:
        check_shape(voxels=(voxels, "N D H W"), feats=(feats, "N K D H W"))
    device = voxels.device if device is None else torch.device(device)
    depth, height, width = voxels.shape[1:]
    # PyTorch3D numbers vertices and faces in the order y, x, z
    full = (voxels.detach() >= thresh).to(device).permute(0, 2, 3, 1).contiguous()
    padded = torch.nn.functional.pad(full, (1,) * 6)
    lattice = (height + 1, width + 1, depth + 1)  # corners of voxels; also strides of the padded grid, less one

    # a corner is a vertex when the eight voxels around it are neither all full nor all empty
    every = some = padded
    for axis in (1, 2, 3):
        low, high = (every.narrow(axis, k, every.shape[axis] - 1) for k in range(2))
        some_low, some_high = (some.narrow(axis, k, some.shape[axis] - 1) for k in range(2))
        every, some = low & high, some_low | some_high
    used = some & ~every
    verts_count = used.flatten(1).sum(1)
    number = used.view(-1).cumsum(0, dtype=torch.int32).sub_(1)  # int32: a table this large is read faster
    step, start = [], []
    for n in (size["W"], size["H"], size["D"]):
        step.append(2 / n if align == "corner" else 2 / max(n - 1, 1))
        start.append(-1 - step[-1] / 2 if align == "center" else -1.0)
    axes = [
        torch.arange(n + 1, dtype=torch.float64, device=device).mul(step[i]).add(start[i]).to(voxels.dtype)
        for i, n in enumerate((width, height, depth))
    ]
    _, vy, vx, vz = _unravel(used.view(-1).nonzero()[:, 0], lattice)
    verts = torch.stack([axes[0][vx], axes[1][vy], axes[2][vz]], dim=1)

    cell = full.view(-1).nonzero()[:, 0]
    member, cy, cx, cz = _unravel(cell, (height, width, depth))
    base = ((member * (height + 2) + cy) * (width + 2) + cx) * (depth + 2) + cz
    neighbors = [[((1 + dy) * (width + 2) + 1 + dx) * (depth + 2) + 1 + dz for (dx, dy, dz), _ in _SIDES]]
    bare = ~padded.view(-1)[base[:, None] + torch.tensor(neighbors, device=device)]  # (cells, 6)
    base = ((member * lattice[0] + cy) * lattice[1] + cx) * lattice[2] + cz
    eight = [[(y * lattice[1] + x) * lattice[2] + z for x in (0, 1) for y in (0, 1) for z in (0, 1)]]
    corners = number[base[:, None] + torch.tensor(eight, device=device)]  # (cells, 8)
    pattern = torch.tensor([int(c, 2) for _, triangles in _SIDES for c in triangles.split()], device=device)
    sides = corners.index_select(1, pattern).view(-1, 6)  # (cells * 6, 6): two triangles
    place = bare.view(-1).nonzero()[:, 0]
    faces = sides.index_select(0, place).long().view(-1, 3)
    faces_count = torch.zeros_like(verts_count).index_add_(0, member, 2 * bare.sum(1))
    attributes = {}
    if feats is not None:
        of_voxel = feats.to(device).permute(0, 3, 4, 2, 1).flatten(0, 3)  # (N H W D, K)
        attributes["feats"] = of_voxel[cell[place // len(_SIDES)]].repeat_interleave(2, 0)
    return Meshes._of_packed(verts, faces, verts_count, faces_count, attributes)


def _unravel(index: Int[Tensor, " N"], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch member and three coordinates of positions in a flattened (B, *shape)."""
    rest, last = index // shape[2], index % shape[2]
    rest, middle = rest // shape[1], rest % shape[1]
    return rest // shape[0], rest % shape[0], middle, last
