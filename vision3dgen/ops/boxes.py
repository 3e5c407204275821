"""Overlap of boxes: oriented boxes in space, given by their corners.

The volume of two boxes' intersection is the sum over the pieces of their faces that bound it, of a third of the piece's
area times its distance from a point inside (the divergence theorem). A piece of a face is what the other box's six
half-spaces leave of it (Sutherland and Hodgman 1974).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_finite, check_shape
from vision3dgen.ops.backends import full_precision

# Corners of each face, counter-clockwise seen from outside when the corners are in PyTorch3D's order; clockwise of a
# mirrored box, which `_outward` mends.
FACES = ((0, 3, 2, 1), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))
PIECE_CORNERS = 10  # a quadrilateral cut by six planes
PAIR_BYTES = 12 * PIECE_CORNERS * 3 * 8 * 8  # held for a pair at once: pieces in float64 and their copies
BUDGET = 64 * 2**20


class BoxOverlap(NamedTuple):
    """How much every box of one set overlaps every box of another."""

    vol: Tensor  # (N, M) volume of the intersection
    iou: Tensor  # (N, M) its share of the union's


@full_precision
def box3d_overlap(boxes1: Float[Tensor, "N 8 3"], boxes2: Float[Tensor, "M 8 3"], eps: float = 1e-4) -> BoxOverlap:
    """Exact volume of the intersection, and intersection over union, of every pair of oriented boxes, with gradients.

    Corners 0 1 2 3 go around one face and 4 5 6 7 around the opposite one, i beside i + 4. A face whose corners are off
    their plane by more than `eps` of the box's diagonal, and a box flatter than `eps` of it, are ValueErrors.
    Differs: `eps` is relative, so that size and place of the boxes change nothing; gradients; empty sets.
    """
    check_shape(boxes1=(boxes1, "N 8 3"), boxes2=(boxes2, "M 8 3"))
    check_finite(boxes1=boxes1, boxes2=boxes2)
    first, second = _solid("boxes1", boxes1, eps), _solid("boxes2", boxes2, eps)
    near = (first.low[:, None] <= second.high) & (second.low <= first.high[:, None])  # (N, M, 3)
    pairs = near.all(-1).nonzero()
    step = max(1, BUDGET // PAIR_BYTES)
    found = [_intersection(first.take(some[:, 0]), second.take(some[:, 1])) for some in pairs.split(step)]
    shared = torch.cat(found) if found else first.volume[:0]
    smaller = torch.minimum(first.volume[pairs[:, 0]], second.volume[pairs[:, 1]])
    shared = shared.clamp(min=0).minimum(smaller)
    vol = shared.new_zeros(len(boxes1), len(boxes2)).index_put((pairs[:, 0], pairs[:, 1]), shared)
    iou = vol / (first.volume[:, None] + second.volume - vol)
    return BoxOverlap(vol.to(boxes1.dtype), iou.to(boxes1.dtype))


class _Solid(NamedTuple):
    """Boxes with what is asked of them, in float64: a box far from the origin has few digits left for its volume."""

    quads: Tensor  # (N, 6, 4, 3) faces, counter-clockwise seen from outside
    normals: Tensor  # (N, 6, 3) unit, outward
    offsets: Tensor  # (N, 6) distance of each face's plane from the origin, along its normal
    volume: Tensor  # (N,)
    low: Tensor  # (N, 3)
    high: Tensor  # (N, 3)
    diagonal: Tensor  # (N,)

    def take(self, rows: Int[Tensor, " P"]) -> "_Solid":
        return _Solid(*(field[rows] for field in self))


def _solid(name: str, boxes: Float[Tensor, "N 8 3"], eps: float) -> _Solid:
    corners = boxes.double()
    low, high = corners.amin(1), corners.amax(1)
    diagonal = (high - low).detach().norm(dim=-1)
    quads = corners[:, torch.tensor(FACES, device=boxes.device)]  # (N, 6, 4, 3)
    quads = _outward(quads, corners.mean(1))
    area = torch.linalg.cross(quads[:, :, 2] - quads[:, :, 0], quads[:, :, 3] - quads[:, :, 1])
    size = area.norm(dim=-1, keepdim=True)
    normals = area / size.clamp(min=torch.finfo(torch.float64).tiny)
    heights = ((quads - quads.mean(2, keepdim=True)) * normals[:, :, None]).sum(-1).abs().amax(-1)  # (N, 6)
    offsets = (quads.mean(2) * normals).sum(-1)
    thickness = torch.stack([offsets[:, a] + offsets[:, b] for a, b in ((0, 1), (2, 4), (3, 5))], dim=1)
    for problem, per_box in (
        ("has a face that is not flat", heights.amax(1) > eps * diagonal),
        ("is flat: it has no volume", ~(thickness.amin(1) > eps * diagonal)),
    ):
        if bool(per_box.any()):
            index = int(per_box.nonzero()[0])
            raise ValueError(f"{name}[{index}] {problem} (eps = {eps} of its diagonal): {boxes[index].tolist()}")
    center = quads.mean((1, 2))
    volume = _fan_volume(quads, torch.full(quads.shape[:2], 4, device=boxes.device), center[:, None])
    return _Solid(quads, normals, offsets, volume, low, high, diagonal)


def _outward(quads: Float[Tensor, "N 6 4 3"], center: Float[Tensor, "N 3"]) -> Float[Tensor, "N 6 4 3"]:
    """Faces with their corners turned around where the box is given in mirrored order."""
    normals = torch.linalg.cross(quads[:, :, 1] - quads[:, :, 0], quads[:, :, 3] - quads[:, :, 0])
    inward = ((quads.mean(2) - center[:, None]) * normals).sum(-1).sum(-1) < 0
    return torch.where(inward[:, None, None, None], quads.flip(2), quads)


def _intersection(first: _Solid, second: _Solid) -> Float[Tensor, " P"]:
    """Volumes of the intersections of boxes, pair by pair."""
    # Rounding decides on which side of a plane a corner on it lies, so faces that coincide are told apart first: where
    # two faces share a plane and a side, only the first box's counts; where they face each other nothing is between.
    slack = 1e-9 * (first.diagonal + second.diagonal)[:, None, None]
    pieces, counts = [], []
    for own, other, kept in ((first, second, True), (second, first, False)):
        heights = (own.quads[:, :, None] * other.normals[:, None, :, None]).sum(-1) - other.offsets[:, None, :, None]
        coplanar = heights.detach().abs().amax(-1) <= slack  # (P, 6 own, 6 other)
        clipped, count = _clip(own.quads, other, coplanar)
        if not kept:
            count = count.where(~coplanar.any(-1), 0)
        pieces.append(clipped)
        counts.append(count)
    quads, count = torch.cat(pieces, dim=1), torch.cat(counts, dim=1)  # (P, 12, 10, 3), (P, 12)
    used = _used(count)[..., None]
    inner = (quads * used).detach().sum((1, 2)) / used.sum((1, 2)).clamp(min=1)
    return _fan_volume(quads, count, inner[:, None])


def _used(count: Int[Tensor, "P F"]) -> Bool[Tensor, "P F 10"]:
    return torch.arange(PIECE_CORNERS, device=count.device) < count[..., None]


def _clip(
    quads: Float[Tensor, "P 6 4 3"], other: _Solid, coplanar: Bool[Tensor, "P 6 6"]
) -> tuple[Float[Tensor, "P 6 10 3"], Int[Tensor, "P 6"]]:
    """What the other box's half-spaces leave of each face: corners in order, and how many of the ten there are."""
    shape = quads.shape[:2]
    poly = torch.cat([quads, quads.new_zeros(*shape, PIECE_CORNERS - 4, 3)], dim=2)
    count = torch.full(shape, 4, device=quads.device)
    slots = torch.arange(PIECE_CORNERS, device=quads.device)
    for plane in range(6):
        height = (poly * other.normals[:, None, None, plane]).sum(-1) - other.offsets[:, None, None, plane]
        height = height.where(~coplanar[:, :, plane, None], -1.0)  # a face in the plane is kept whole
        used = slots < count[..., None]
        follower = torch.where(slots + 1 < count[..., None], slots + 1, 0)  # (P, 6, 10)
        next_height = height.gather(2, follower)
        next_corner = poly.gather(2, follower[..., None].expand_as(poly))
        inside = used & (height <= 0)
        crosses = used & ((height <= 0) != (next_height <= 0))
        share = height / torch.where(crosses, height - next_height, 1.0)
        cut = poly + torch.where(crosses, share, 0.0)[..., None] * (next_corner - poly)
        # Each corner that is inside, then the place where its edge crosses, moved up to close the gaps.
        keep = torch.stack([inside, crosses], dim=3).flatten(2)  # (P, 6, 20)
        both = torch.stack([poly, cut], dim=3).flatten(2, 3)  # (P, 6, 20, 3)
        count = keep.sum(2)
        order = (~keep).to(torch.uint8).sort(dim=2, stable=True).indices[..., :PIECE_CORNERS]
        poly = both.gather(2, order[..., None].expand(-1, -1, -1, 3))
    return poly, count


def _fan_volume(
    polygons: Float[Tensor, "P F K 3"], count: Int[Tensor, "P F"], inner: Float[Tensor, "P 1 3"]
) -> Float[Tensor, " P"]:
    """Volume of the cones from a point to polygons, as fans of triangles."""
    local = polygons - inner[:, :, None]
    a, b, c = local[:, :, :1], local[:, :, 1:-1], local[:, :, 2:]
    six = (a * torch.linalg.cross(b, c)).sum(-1)  # (P, F, K - 2)
    exists = torch.arange(2, polygons.shape[2], device=count.device) < count[..., None]
    return six.where(exists, 0).sum((1, 2)) / 6
