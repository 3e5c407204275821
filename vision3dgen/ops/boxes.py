"""Overlap of boxes: oriented boxes in space, given by their corners.

By the divergence theorem a convex body's volume is the sum over its faces of a third of the face's area times the
distance of its plane from the origin, and by Green's theorem that area is a sum over the face's sides, in any order. So
with m = distance * normal of a plane, a side from p to q between planes f and g adds (m_f - m_g) . (p x q) / 6, and the
sides of two boxes' intersection are: what each box leaves of the other's edges, and of the lines in which a face of one
meets a face of the other. Each is a line cut by half-spaces, that is an interval (Cyrus and Beck 1978).
"""

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_finite, check_shape
from vision3dgen.ops.backends import full_precision

# Corners of each face, counter-clockwise seen from outside when the corners are in PyTorch3D's order; clockwise of a
# mirrored box, which `_outward` mends.
FACES = ((0, 3, 2, 1), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))
SHRINK = 1e-9  # of its size the first box is made smaller by, so that no two faces or edges coincide
PAIR_BYTES = 36 * 12 * 8 * 8  # held for a pair at once: the half-spaces of each line in float64, and temporaries
BUDGET = 64 * 2**20


class BoxOverlap(NamedTuple):
    """How much every box of one set overlaps every box of another."""

    vol: Tensor  # (N, M) volume of the intersection
    iou: Tensor  # (N, M) its share of the union's


@full_precision
def box3d_overlap(boxes1: Float[Tensor, "N 8 3"], boxes2: Float[Tensor, "M 8 3"], eps: float = 1e-4) -> BoxOverlap:
    """Volume of the intersection, to 1e-8 of it, and intersection over union of all pairs of oriented boxes.

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
    center: Tensor  # (N, 3)
    volume: Tensor  # (N,)
    low: Tensor  # (N, 3)
    high: Tensor  # (N, 3)

    def take(self, rows: Int[Tensor, " P"]) -> "_Solid":
        return _Solid(*(field[rows] for field in self))

    def around(self, origin: Float[Tensor, "N 3"], scale: float = 1.0) -> "_Planes":
        """The faces and edges seen from an origin, the box scaled about its own center."""
        quads = (self.quads - self.center[:, None, None]) * scale + (self.center - origin)[:, None, None]
        offsets = (quads.mean(2) * self.normals).sum(-1)
        start, end = quads[:, _EDGE_FACE, _EDGE_SIDE], quads[:, _EDGE_FACE, (_EDGE_SIDE + 1) % 4]
        return _Planes(self.normals, offsets, start, end - start)


class _Planes(NamedTuple):
    normals: Tensor  # (P, 6, 3)
    offsets: Tensor  # (P, 6): a point x is inside where normal . x <= offset
    start: Tensor  # (P, 12, 3) of each edge, in the direction in which its first face has it
    along: Tensor  # (P, 12, 3)

    @property
    def feet(self) -> Float[Tensor, "P 6 3"]:
        """The place of each plane nearest to the origin."""
        return self.offsets[..., None] * self.normals


def _edges() -> tuple[Tensor, Tensor, Tensor]:
    """Of each edge: its first face, which of the face's sides it is, and the face on the other side."""
    place = {(q[i], q[(i + 1) % 4]): (face, i) for face, q in enumerate(FACES) for i in range(4)}
    rows = [(*place[u, v], place[v, u][0]) for u, v in place if u < v]
    face, side, opposite = torch.tensor(rows).unbind(1)
    return face, side, opposite


_EDGE_FACE, _EDGE_SIDE, _EDGE_OPPOSITE = _edges()
_PAIRS = torch.tensor(list(itertools.product(range(6), range(6))))  # (36, 2) a face of each box
_OWN = torch.nn.functional.one_hot(_PAIRS, 6).flatten(1).bool()  # (36, 12) the two half-spaces a line is a border of


def _solid(name: str, boxes: Float[Tensor, "N 8 3"], eps: float) -> _Solid:
    corners = boxes.double()
    low, high = corners.amin(1), corners.amax(1)
    diagonal = (high - low).detach().norm(dim=-1)
    center = corners.mean(1)
    quads = _outward((corners - center[:, None])[:, torch.tensor(FACES, device=boxes.device)])  # (N, 6, 4, 3)
    area = torch.linalg.cross(quads[:, :, 2] - quads[:, :, 0], quads[:, :, 3] - quads[:, :, 1])
    size = area.norm(dim=-1, keepdim=True)
    normals = area / size.clamp(min=torch.finfo(torch.float64).tiny)
    middles = quads.mean(2)
    heights = ((quads - middles[:, :, None]) * normals[:, :, None]).sum(-1).abs().amax(-1)  # (N, 6)
    offsets = (middles * normals).sum(-1)
    thickness = torch.stack([offsets[:, a] + offsets[:, b] for a, b in ((0, 1), (2, 4), (3, 5))], dim=1)
    for problem, per_box in (
        ("has a face that is not flat", heights.amax(1) > eps * diagonal),
        ("is flat: it has no volume", ~(thickness.amin(1) > eps * diagonal)),
    ):
        if bool(per_box.any()):
            index = int(per_box.nonzero()[0])
            raise ValueError(f"{name}[{index}] {problem} (eps = {eps} of its diagonal): {boxes[index].tolist()}")
    volume = (offsets * size[..., 0]).sum(-1) / 6
    return _Solid(quads + center[:, None, None], normals, center, volume, low, high)


def _outward(quads: Float[Tensor, "N 6 4 3"]) -> Float[Tensor, "N 6 4 3"]:
    """Faces around the origin with their corners turned around where the box is given in mirrored order."""
    normals = torch.linalg.cross(quads[:, :, 1] - quads[:, :, 0], quads[:, :, 3] - quads[:, :, 0])
    inward = (quads.mean(2) * normals).sum(-1).sum(-1) < 0
    return torch.where(inward[:, None, None, None], quads.flip(2), quads)


def _intersection(first: _Solid, second: _Solid) -> Float[Tensor, " P"]:
    """Volumes of the intersections of boxes, pair by pair."""
    device = first.normals.device
    a, b = first.around(first.center, 1 - SHRINK), second.around(first.center)
    face, opposite = _EDGE_FACE.to(device), _EDGE_OPPOSITE.to(device)
    total = first.volume.new_zeros(())
    for own, other in ((a, b), (b, a)):
        feet = own.feet[:, face] - own.feet[:, opposite]
        whole = torch.zeros_like(own.start[..., 0]), torch.ones_like(own.start[..., 0])
        total = total + _sides(own.start, own.along, other.normals, other.offsets, feet, whole)

    f, g = _PAIRS.to(device).unbind(1)
    n_f, n_g = a.normals[:, f], b.normals[:, g]  # (P, 36, 3)
    along = torch.linalg.cross(n_f, n_g)
    squared = along.square().sum(-1)
    parallel = squared < 1e-24
    around_f, around_g = torch.linalg.cross(n_g, along), torch.linalg.cross(along, n_f)
    start = a.offsets[:, f, None] * around_f + b.offsets[:, g, None] * around_g
    start = start / squared.where(~parallel, 1)[..., None]
    feet = (a.feet[:, f] - b.feet[:, g]).where(~parallel[..., None], 0)
    normals, offsets = torch.cat([a.normals, b.normals], dim=1), torch.cat([a.offsets, b.offsets], dim=1)
    endless = torch.full_like(squared, -torch.inf), torch.full_like(squared, torch.inf)
    return total + _sides(start, along, normals, offsets, feet, endless, _OWN.to(device))


def _sides(
    start: Float[Tensor, "P S 3"],
    along: Float[Tensor, "P S 3"],
    normals: Float[Tensor, "P H 3"],
    offsets: Float[Tensor, "P H"],
    feet: Float[Tensor, "P S 3"],
    interval: tuple[Float[Tensor, "P S"], Float[Tensor, "P S"]],
    ignored: Bool[Tensor, "S H"] | None = None,
) -> Float[Tensor, " P"]:
    """What lines start + t along add to the volume, t in the interval and inside all half-spaces but the ignored."""
    rate = along @ normals.mT  # (P, S, H)
    room = offsets[:, None] - start @ normals.mT
    parallel = rate.detach().abs() < 1e-14 * along.detach().norm(dim=-1, keepdim=True)
    if ignored is not None:
        parallel = parallel | ignored
        room = room.where(~ignored, 1.0)
    at = room / rate.where(~parallel, 1.0)
    low = at.where((rate < 0) & ~parallel, -torch.inf).amax(-1).maximum(interval[0])
    high = at.where((rate > 0) & ~parallel, torch.inf).amin(-1).minimum(interval[1])
    there = (low < high) & low.isfinite() & high.isfinite() & ~((room < 0) & parallel).any(-1)
    length = (high.where(there, 0) - low.where(there, 0))[..., None]
    # p x q = (start + low along) x (start + high along) = (high - low) start x along
    return (feet * torch.linalg.cross(start, along) * length).sum((1, 2)) / 6
