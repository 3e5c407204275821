"""Every public operator and loss on the torture set: finite, ragged as single, laws, types, NaN; one table says it all.

`python -m tests.test_degenerate` writes the table into docs/robustness.md.
"""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests import degenerate
from vision3dgen import losses, ops
from vision3dgen.ops import points as point_ops
from vision3dgen.structures import Camera, GridSpec, Meshes, Pointclouds

DOCUMENT = Path(__file__).parents[1] / "docs" / "robustness.md"

# ------------------------------------------------------------------------------------------------------- batches


class MeshBatch(NamedTuple):
    verts: list[Tensor]
    faces: list[Tensor]
    points: Tensor  # (B, 5, 3) queries, some inside and some outside
    unit: float = 1.0  # size of the shapes
    origin: float = 0.0  # where they are

    @property
    def meshes(self) -> Meshes:
        return Meshes(self.verts, self.faces)

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        if len(self.verts) == 1:  # as given, not packed into contiguous memory
            return self.verts[0], self.faces[0]
        return self.meshes.verts_packed(), self.meshes.faces_packed()

    @property
    def grid(self) -> GridSpec:
        low, step = self.origin - 0.3 * self.unit, 0.37 * self.unit
        return GridSpec((low, low, low), (step, step, step), (4, 5, 6))

    def leaves(self) -> list[Tensor]:
        return [*self.verts, self.points]

    def members(self) -> list["MeshBatch"]:
        parts = zip(self.verts, self.faces, self.points)
        return [MeshBatch([v], [f], p[None], self.unit, self.origin) for v, f, p in parts]

    def empty(self, over: str) -> list[bool]:
        return [not len(faces) for faces in self.faces]

    def map(self, function: Callable[[Tensor], Tensor]) -> "MeshBatch":
        return self._replace(verts=[function(v) for v in self.verts], points=function(self.points))


class CloudBatch(NamedTuple):
    x: Tensor  # (B, N, 3), NaN beyond a cloud's points
    y: Tensor  # (B, M, 3), the clouds of x in reverse order and a little moved
    x_lengths: Tensor | None
    y_lengths: Tensor | None
    unit: float = 1.0
    origin: float = 0.0

    @property
    def clouds(self) -> Pointclouds:
        return Pointclouds(unpad(self.x, self.x_lengths))

    @property
    def others(self) -> Pointclouds:
        return Pointclouds(unpad(self.y, self.y_lengths))

    @property
    def pair(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.x, self.y, self.x_lengths, self.y_lengths

    def leaves(self) -> list[Tensor]:
        return [self.x, self.y]

    def members(self) -> list["CloudBatch"]:
        rows = zip(unpad(self.x, self.x_lengths), unpad(self.y, self.y_lengths))
        return [CloudBatch(x[None], y[None], None, None, self.unit, self.origin) for x, y in rows]

    def empty(self, over: str) -> list[bool]:
        alone = [len(x) == 0 for x in self.clouds.points_list()]
        return alone if over == "clouds" else [a or len(y) == 0 for a, y in zip(alone, self.others.points_list())]

    def map(self, function: Callable[[Tensor], Tensor]) -> "CloudBatch":
        return self._replace(x=function(self.x), y=function(self.y))


class VolumeBatch(NamedTuple):
    volume: Tensor  # (B, D, H, W), cut at 0.5
    unit: float = 1.0
    origin: float = 0.0

    def leaves(self) -> list[Tensor]:
        return [self.volume]

    def members(self) -> list["VolumeBatch"]:
        return [VolumeBatch(member[None]) for member in self.volume]

    def empty(self, over: str) -> list[bool]:
        return [bool((member < 0.5).all()) for member in self.volume]

    def map(self, function: Callable[[Tensor], Tensor]) -> "VolumeBatch":
        return VolumeBatch(function(self.volume))


Batch = MeshBatch | CloudBatch | VolumeBatch
_QUERIES = torch.tensor([[0.2, 0.3, 0.1], [2, 1, 1], [0.4, 0.2, 0.3], [-1, 0, 0.25], [0.5, 0, 0]], dtype=torch.float64)


def pad(members: list[Tensor]) -> Tensor:
    padded = pad_sequence(members, batch_first=True, padding_value=math.nan)
    return degenerate.strided(padded) if not members[0].is_contiguous() else padded


def unpad(padded: Tensor, lengths: Tensor | None) -> list[Tensor]:
    counts = [padded.shape[1]] * len(padded) if lengths is None else lengths.tolist()
    return [row[:count] for row, count in zip(padded, counts)]


def make_batch(over: str, case: str, dtype: torch.dtype = torch.float64) -> Batch:
    """One case of the torture set with what operators need beside it."""
    unit = degenerate.SCALE if case == "tiny scale" else 1.0
    origin = degenerate.OFFSET if case == "huge offset" else 0.0
    if over == "volumes":
        return VolumeBatch(degenerate.volume_cases(dtype)[case])
    if over in ("meshes", "queries"):
        verts, faces = degenerate.mesh_cases(dtype)[case]
        queries = (_QUERIES * unit + origin).to(dtype).repeat(len(verts), 1, 1)
        return MeshBatch(verts, faces, queries, unit, origin)
    members = degenerate.cloud_cases(dtype)[case]
    lengths = torch.tensor([len(member) for member in members])
    moved = [member + 0.125 * unit * torch.ones(3, dtype=dtype) for member in members[::-1]]
    return CloudBatch(pad(members), pad(moved), lengths, lengths.flip(0), unit, origin)


# What an operator reads: vertices, also query points, one batch of clouds, two of them, or volumes.
FIELDS = {
    "meshes": ("verts",),
    "queries": ("verts", "points"),
    "clouds": ("x",),
    "pairs": ("x", "y"),
    "volumes": ("volume",),
}
CASES = {
    "meshes": list(degenerate.mesh_cases()),
    "queries": list(degenerate.mesh_cases()),
    "clouds": list(degenerate.cloud_cases()),
    "pairs": list(degenerate.cloud_cases()),
    "volumes": list(degenerate.volume_cases()),
}

# ------------------------------------------------------------------------------------------------------ operators


class Law(NamedTuple):
    """How a result follows when shapes are scaled by s and moved: by s^power, and with them if it is a position."""

    power: int
    moves: bool = False


class Operator(NamedTuple):
    call: Callable[[Any], Any]  # a batch to a list of one tuple of tensors per member, or to one mean over members
    over: str  # meshes, clouds or volumes
    laws: tuple[Law | None, ...] | None  # one per tensor; None where it is not a geometric quantity, or one of several
    empty: str  # what becomes of an empty member: a key of EMPTY
    errors: tuple[str, ...] = ()  # cases that are a ValueError, said in `why`
    why: str = ""
    nan: str = "ValueError"  # or why there is none
    half: str = "bf16"  # type of the result for bf16
    grad: bool = True
    ambiguous: tuple[str, ...] = ()  # cases in which several results are right: only finite values are asked for


def per_member(function: Callable[..., Any]) -> Callable[[Any], list[tuple[Tensor, ...]]]:
    return lambda batch: [function(member) for member in batch.members()]


def rows(*padded: Tensor, lengths: Tensor | None) -> list[tuple[Tensor, ...]]:
    return list(zip(*(unpad(tensor, lengths) for tensor in padded)))


def each(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*tensors))


def by_vertex(batch: MeshBatch, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    counts = [len(v) for v in batch.verts]
    return list(zip(*(tensor.split(counts) for tensor in packed)))


def by_face(batch: MeshBatch, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    counts = [len(f) for f in batch.faces]
    return list(zip(*(tensor.split(counts) for tensor in packed)))


def blocks(batch: MeshBatch, matrix: Tensor) -> list[Tensor]:
    """A matrix over packed vertices, which must not mix members, as one matrix per member."""
    dense, counts = matrix.to_dense(), [len(v) for v in batch.verts]
    parts = [row.split(counts, 1)[member] for member, row in enumerate(dense.split(counts))]
    assert sum(int((part != 0).sum()) for part in parts) == int((dense != 0).sum())
    return parts


def knn(batch: CloudBatch, norm: int) -> list:
    found = ops.knn_points(*batch.pair, K=3, norm=norm, return_nn=True)
    return rows(found.dists, found.knn, lengths=batch.x_lengths)


def gathered(batch: CloudBatch) -> list:
    idx = ops.knn_points(*(cloud.nan_to_num(0, 0, 0) for cloud in batch.pair[:2]), *batch.pair[2:], K=2).idx
    lengths = batch.others.num_points_per_cloud()
    return rows(ops.knn_gather(filled(batch.y, lengths), idx, lengths), lengths=batch.x_lengths)


def filled(padded: Tensor, lengths: Tensor | None) -> Tensor:
    return padded if lengths is None else padded.where(point_ops.within(lengths, padded.shape[1])[..., None], 0)


def masked(batch: CloudBatch) -> list:
    lengths = torch.full((len(batch.x),), batch.x.shape[1]) if batch.x_lengths is None else batch.x_lengths
    last = lengths[:, None] - torch.tensor([[1, 2]])
    return each(ops.masked_gather(filled(batch.x, batch.x_lengths), last.clamp(min=-1)))


def in_ball(batch: CloudBatch) -> list:
    found = ops.ball_query(*batch.pair, K=4, radius=0.6 * batch.unit)
    return rows(found.dists, lengths=batch.x_lengths)


def farthest(batch: CloudBatch) -> list:
    return each(ops.sample_farthest_points(batch.x, batch.x_lengths, K=3)[0])


def packing(batch: CloudBatch) -> tuple[Tensor, Tensor]:
    return batch.clouds.points_packed(), batch.clouds.cloud_to_packed_first_idx()


def padded_again(batch: CloudBatch) -> list:
    packed, first = packing(batch)
    return rows(ops.packed_to_padded(packed, first, batch.x.shape[1]), lengths=batch.x_lengths)


def packed_again(batch: CloudBatch) -> list:
    packed, first = packing(batch)
    again = ops.padded_to_packed(filled(batch.x, batch.x_lengths), first, len(packed))
    return [(member,) for member in again.split(batch.clouds.num_points_per_cloud().tolist())]


def weighted_mean(batch: CloudBatch) -> list:
    x = filled(batch.x, batch.x_lengths)
    lengths = torch.full((len(x),), x.shape[1]) if batch.x_lengths is None else batch.x_lengths
    return each(ops.wmean(x, point_ops.within(lengths, x.shape[1]).to(x.dtype))[:, 0])


_TURN = torch.tensor([[0.6, 0.8, 0], [-0.8, 0.6, 0], [0, 0, 1]], dtype=torch.float64)


def aligned(batch: CloudBatch) -> list:
    clouds, origin = batch.clouds, batch.origin
    target = [2 * turned(member - origin, _TURN.to(member)) + origin for member in clouds.points_list()]
    R, T, s = ops.corresponding_points_alignment(clouds, Pointclouds(target), estimate_scale=True)
    return [(k * turned(x, r) + t, k) for x, r, t, k in zip(clouds.points_list(), R, T, s)]


def turned(points: Tensor, rotation: Tensor) -> Tensor:
    return (points[:, :, None] * rotation).sum(1)  # a matrix product would be rounded by autocast


def icp(batch: CloudBatch) -> list:
    found = ops.iterative_closest_point(batch.clouds, batch.others, max_iterations=3, relative_rmse_thr=-1)
    return [(moved,) for moved in found.Xt.points_list()]


def frames(batch: CloudBatch) -> list:
    found = ops.estimate_pointcloud_local_coord_frames(batch.clouds, 4)
    return rows(found.curvatures, found.local_coord_frames, lengths=batch.x_lengths)


def point_normals(batch: CloudBatch) -> list:
    return rows(ops.estimate_pointcloud_normals(batch.clouds, 4), lengths=batch.x_lengths)


def fake_normals(like: Tensor) -> Tensor:
    """Some normals, one of them zero, as NaN beyond a cloud's points as the points themselves."""
    count = torch.arange(like.shape[1])[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    return (like * 0).where(like.isnan(), count.sin().to(like)) * (like * 0 + 1)


def chamfer(batch: CloudBatch, **options: Any) -> list:
    normals = {}
    if options.get("point_reduction") != "max":
        normals = {"x_normals": fake_normals(batch.x.detach()), "y_normals": fake_normals(batch.y.detach())}
    result = losses.chamfer_distance(*batch.pair, **normals, batch_reduction=None, **options)
    return each(*(part for part in result if part is not None))


def hausdorff(batch: CloudBatch) -> list:
    return each(losses.hausdorff_distance(*batch.pair))


def earth_movers(batch: CloudBatch, **options: Any) -> list:
    return each(*losses.earth_movers_distance(*batch.pair, **options))


def triangles(batch: MeshBatch) -> Tensor:
    verts, faces = batch.packed
    return verts[faces]


def nearest_face(batch: MeshBatch) -> tuple[Tensor, ...]:
    found = ops.nearest_faces(*batch.packed, batch.points[0])
    return found.distances, found.points


def triangle_distances(batch: MeshBatch) -> tuple[Tensor, ...]:
    corners = triangles(batch)
    return (
        ops.point_triangle_distance(batch.points[0, :, None].expand(-1, len(corners), 3), corners.expand(5, -1, 3, 3)),
    )


def streams(batch: MeshBatch) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in batch.verts]


def sampled(batch: MeshBatch) -> list:
    found = ops.sample_surface(batch.meshes, 6, streams(batch))
    return each(found.points, found.normals, found.barycentrics)


def sampled_points(batch: MeshBatch) -> list:
    return each(*ops.sample_points_from_meshes(batch.meshes, 6, return_normals=True, generator=streams(batch)))


def graph_conv(batch: MeshBatch) -> list:
    torch.manual_seed(0)
    layer = ops.GraphConv(3, 4).to(batch.verts[0].dtype)
    return by_vertex(batch, layer(batch.packed[0], batch.meshes.edges_packed()))


def cot(batch: MeshBatch) -> list:
    L, inverse = ops.cot_laplacian(*batch.packed)
    return list(zip(blocks(batch, L), *zip(*by_vertex(batch, inverse))))


def feature_maps(like: Tensor, count: int) -> list[Tensor]:
    drawn = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(like.dtype).expand(count, -1, -1, -1)
    return [drawn, drawn[:, :1]]


def looked_up(batch: MeshBatch) -> list:
    maps = feature_maps(batch.points, len(batch.verts))
    return by_vertex(batch, ops.vert_align(maps, batch.meshes, return_packed=True))


def seen(batch: MeshBatch) -> list:
    eye, target = ([batch.origin + batch.unit * x for x in place] for place in ((2, 2.5, 3), (0.4, 0.3, 0.2)))
    camera = Camera.look_at(eye, target, field_of_view=40, image_size=(6, 7))
    picture = ops.rasterize(batch.meshes, camera, softness=1e-2, near=1e-3 * batch.unit)
    return each(picture.mask, picture.depth, picture.normals)


def voxels(batch: MeshBatch, **options: Any) -> list:
    return each(ops.voxelize(batch.meshes, batch.grid, **options))


def counts(batch: CloudBatch) -> list[int]:
    return batch.clouds.num_points_per_cloud().tolist()


def box_meshes(batch: CloudBatch) -> Meshes:
    verts, faces = degenerate.box(batch.x.dtype)
    return Meshes([verts * batch.unit + batch.origin] * len(batch.x), [faces] * len(batch.x))


def polygons(batch: VolumeBatch) -> list:
    return [(verts,) for verts in ops.marching_cubes(batch.volume, 0.5)[0]]


def unit_grid(batch: VolumeBatch) -> GridSpec:
    depth, height, width = batch.volume.shape[1:]
    return GridSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (depth, height, width))


def extracted(batch: VolumeBatch) -> tuple[Tensor, ...]:
    bump = batch.volume[0].mean()
    mesh = ops.extract_surface(
        lambda p: bump + 0.25 - p.norm(dim=1).to(bump),
        (-1.0, 1.0),
        level=0.5,
        resolution0=4,
        upsampling_steps=1,
        differentiable=True,
        dtype=batch.volume.dtype,
    ).mesh
    return (mesh.verts_packed(),)


SAME, LENGTH, SQUARE, PLACE = Law(0), Law(1), Law(2), Law(1, moves=True)
NO_FACES = ("empty first", "empty middle", "empty last", "empty all", "one vertex", "no faces", "no faces at all")
NO_AREA = ("empty all", "no faces at all", "only zero-area faces")
FEW = ("one point", "one point each")
NO_DIRECTION = ("duplicate points", "one place", "collinear", "coplanar")
ROWS = "moves or averages rows"
STORED = "holds what it was given"
LAYER = "a layer of a network, whose features may be anything"

TABLE: dict[str, Operator] = {
    # clouds
    "knn_points": Operator(lambda b: knn(b, 2), "pairs", (SQUARE, PLACE), "0"),
    "knn_points, norm 1": Operator(lambda b: knn(b, 1), "pairs", (LENGTH, PLACE), "0"),
    "knn_gather": Operator(gathered, "pairs", (PLACE,), "0", nan=ROWS),
    "masked_gather": Operator(masked, "clouds", (PLACE,), "0", nan=ROWS),
    "ball_query": Operator(in_ball, "pairs", (SQUARE,), "0"),
    "sample_farthest_points": Operator(farthest, "clouds", (PLACE,), "0"),
    "packed_to_padded": Operator(padded_again, "clouds", (PLACE,), "0", nan=ROWS),
    "padded_to_packed": Operator(packed_again, "clouds", (PLACE,), "0", nan=ROWS),
    "wmean": Operator(weighted_mean, "clouds", (PLACE,), "0", nan=ROWS),
    "corresponding_points_alignment": Operator(aligned, "clouds", (PLACE, SAME), "unchanged"),
    "iterative_closest_point": Operator(icp, "pairs", None, "unchanged"),
    "estimate_pointcloud_local_coord_frames": Operator(
        frames, "clouds", (SQUARE, SAME), "0", FEW, "fewer points than the neighborhood", ambiguous=NO_DIRECTION
    ),
    "estimate_pointcloud_normals": Operator(
        point_normals, "clouds", (SAME,), "0", FEW, "fewer points than the neighborhood", ambiguous=NO_DIRECTION
    ),
    "vert_align": Operator(
        lambda b: [(m,) for m in ops.vert_align(feature_maps(b.x, len(b.x)), b.clouds, True).split(counts(b))],
        "clouds",
        None,
        "0",
    ),
    "chamfer_distance": Operator(chamfer, "pairs", (SQUARE, SAME), "0", half="float32"),
    "chamfer_distance, max": Operator(
        lambda b: chamfer(b, point_reduction="max"), "pairs", (SQUARE,), "0", half="float32"
    ),
    "chamfer_distance, norm 1": Operator(lambda b: chamfer(b, norm=1), "pairs", (LENGTH, SAME), "0", half="float32"),
    "hausdorff_distance": Operator(hausdorff, "pairs", (LENGTH,), "0", half="float32"),
    "earth_movers_distance": Operator(earth_movers, "pairs", (LENGTH,) * 3, "0", half="float32"),
    "earth_movers_distance, entropic": Operator(
        lambda b: earth_movers(b, method="entropic", max_iterations=20), "pairs", (LENGTH,) * 3, "0", half="float32"
    ),
    "point_mesh_face_distance, clouds": Operator(
        lambda b: losses.point_mesh_face_distance(box_meshes(b), b.clouds), "clouds", (SQUARE,), "0", half="float32"
    ),
    "point_mesh_edge_distance, clouds": Operator(
        lambda b: losses.point_mesh_edge_distance(box_meshes(b), b.clouds), "clouds", (SQUARE,), "0", half="float32"
    ),
    "Pointclouds.get_bounding_boxes": Operator(
        lambda b: each(b.clouds.get_bounding_boxes()), "clouds", (PLACE,), "infinite", nan=STORED
    ),
    # meshes
    "mesh_face_areas_normals": Operator(
        lambda b: by_face(b, *ops.mesh_face_areas_normals(*b.packed)), "meshes", (SQUARE, SAME), "0"
    ),
    "sample_surface": Operator(
        sampled, "meshes", (PLACE, SAME, None), "0, alone a ValueError", NO_AREA, "a mesh without area"
    ),
    "sample_points_from_meshes": Operator(
        sampled_points, "meshes", (PLACE, SAME), "0, alone a ValueError", NO_AREA, "a mesh without area"
    ),
    "nearest_triangles": Operator(
        per_member(lambda b: (ops.nearest_triangles(b.points[0], triangles(b)).barycentrics,)),
        "queries",
        (None,),
        "ValueError",
        NO_FACES,
        "no triangle",
        grad=False,
    ),
    "nearest_points": Operator(
        per_member(lambda b: (ops.nearest_points(triangles(b), b.points[0]).barycentrics,)),
        "queries",
        (None,),
        "0",
        grad=False,
    ),
    "nearest_faces": Operator(per_member(nearest_face), "queries", (LENGTH, PLACE), "infinite"),
    "point_triangle_distance": Operator(per_member(triangle_distances), "queries", (LENGTH,), "0"),
    "winding_number": Operator(lambda b: each(ops.winding_number(b.meshes, b.points)), "queries", (SAME,), "0"),
    "contains": Operator(lambda b: each(ops.contains(b.meshes, b.points)), "queries", (SAME,), "0", grad=False),
    "contains, parity": Operator(
        lambda b: each(ops.contains(b.meshes, b.points, method="parity")), "queries", (SAME,), "0", grad=False
    ),
    "signed_distance": Operator(
        lambda b: each(ops.signed_distance(b.meshes, b.points)), "queries", (LENGTH,), "infinite"
    ),
    "voxelize": Operator(voxels, "meshes", (SAME,), "0", grad=False),
    "voxelize, surface": Operator(lambda b: voxels(b, fill="surface"), "meshes", (SAME,), "0", grad=False),
    "voxelize, winding": Operator(lambda b: voxels(b, inside="winding"), "meshes", (SAME,), "0", grad=False),
    "laplacian": Operator(
        lambda b: [(m,) for m in blocks(b, ops.laplacian(b.packed[0], b.meshes.edges_packed()))],
        "meshes",
        (SAME,),
        "0",
        nan="reads no coordinates",
        grad=False,
    ),
    "norm_laplacian": Operator(
        lambda b: [(m,) for m in blocks(b, ops.norm_laplacian(b.packed[0], b.meshes.edges_packed()))],
        "meshes",
        (Law(-1),),
        "0",
        ambiguous=("zero-area faces",),  # `eps`, a length, is all that coincident vertices have
    ),
    "cot_laplacian": Operator(cot, "meshes", (SAME, Law(-2)), "0"),
    "taubin_smoothing": Operator(
        lambda b: [(v,) for v in ops.taubin_smoothing(b.meshes, num_iter=3).verts_list()],
        "meshes",
        (PLACE,),
        "unchanged",
    ),
    "SubdivideMeshes": Operator(
        lambda b: [(v,) for v in ops.SubdivideMeshes()(b.meshes).verts_list()],
        "meshes",
        (PLACE,),
        "unchanged",
        nan=ROWS,
    ),
    "GraphConv": Operator(graph_conv, "meshes", None, "own part", nan=LAYER),
    "vert_align, meshes": Operator(looked_up, "meshes", None, "own part"),
    "rasterize": Operator(seen, "meshes", (SAME, LENGTH, SAME), "0"),
    "mesh_edge_loss": Operator(lambda b: losses.mesh_edge_loss(b.meshes), "meshes", (SQUARE,), "0", half="float32"),
    **{
        f"mesh_laplacian_smoothing, {method}": Operator(
            lambda b, method=method: losses.mesh_laplacian_smoothing(b.meshes, method),
            "meshes",
            (Law(power),),
            "0",
            half="float32",
        )
        for method, power in (("uniform", 1), ("cot", 1), ("cotcurv", -1))
    },
    "mesh_normal_consistency": Operator(
        lambda b: losses.mesh_normal_consistency(b.meshes), "meshes", (SAME,), "0", half="float32"
    ),
    "point_mesh_face_distance": Operator(
        lambda b: losses.point_mesh_face_distance(b.meshes, Pointclouds(b.points)),
        "queries",
        (SQUARE,),
        "0",
        half="float32",
    ),
    "point_mesh_edge_distance": Operator(
        lambda b: losses.point_mesh_edge_distance(b.meshes, Pointclouds(b.points)),
        "queries",
        (SQUARE,),
        "0",
        half="float32",
    ),
    "Meshes.faces_areas_packed": Operator(
        lambda b: by_face(b, b.meshes.faces_areas_packed()), "meshes", (SQUARE,), "0", nan=STORED
    ),
    "Meshes.faces_normals_packed": Operator(
        lambda b: by_face(b, b.meshes.faces_normals_packed()), "meshes", (SAME,), "0", nan=STORED
    ),
    "Meshes.verts_normals_packed": Operator(
        lambda b: by_vertex(b, b.meshes.verts_normals_packed()), "meshes", (SAME,), "0", nan=STORED
    ),
    "Meshes.laplacian_packed": Operator(
        lambda b: [(m,) for m in blocks(b, b.meshes.laplacian_packed())], "meshes", (SAME,), "0", nan=STORED, grad=False
    ),
    "Meshes.get_bounding_boxes": Operator(
        lambda b: each(b.meshes.get_bounding_boxes()), "meshes", (PLACE,), "infinite without vertices", nan=STORED
    ),
    # volumes and fields
    "marching_cubes": Operator(polygons, "volumes", None, "no rows", nan="ValueError for NaN", half="float32"),
    "isosurface": Operator(
        lambda b: [(v,) for v in ops.isosurface(b.volume, unit_grid(b), level=0.5).verts_list()],
        "volumes",
        None,
        "no rows",
        nan="ValueError for NaN",
        half="float32",
    ),
    "extract_surface": Operator(
        per_member(extracted), "volumes", None, "no rows", nan="ValueError for NaN", half="float32"
    ),
    "cubify": Operator(
        lambda b: [(v,) for v in ops.cubify(b.volume, 0.5).verts_list()],
        "volumes",
        None,
        "no rows",
        nan="ValueError for NaN",
        grad=False,
    ),
}

# Public names that have no row in the table, and why.
EXEMPT = {
    "use_backend": "chooses an implementation, computes nothing",
    "Extraction": "the result of extract_surface",
    "Rasterization": "the result of rasterize",
    **dict.fromkeys(
        ("Contours", "EdgeBoxes", "edge_boxes", "graph_segments", "selective_search", "sliding_windows"),
        "takes pictures: tests/test_proposals.py",
    ),
    "ico_sphere": "takes no geometry",
    "torus": "takes no geometry",
    "softmax_cross_entropy": "takes scores and labels: tests/test_recognition.py",
    "multiclass_hinge": "takes scores and labels: tests/test_recognition.py",
    "check_labels": "computes nothing",
    **dict.fromkeys(
        ("depth_to_mesh", "depth_to_pointclouds", "depth_to_points", "normals_from_depth"),
        "takes pictures: tests/test_depth.py",
    ),
    **dict.fromkeys(
        ("gradient_matching_loss", "normals_loss", "scale_invariant_depth_loss", "silog_loss", "virtual_normal_loss"),
        "takes pictures: tests/test_depth_losses.py",
    ),
    **dict.fromkeys(("field_normals", "refine_surface"), "takes a field: tests/test_refine.py"),
    "simplify_mesh": "takes a mesh of a field: tests/test_refine.py",
    "FeatureLayout": "describes, computes nothing",
    "box3d_overlap": "takes boxes, which are checked: tests/test_boxes.py",
    **dict.fromkeys(
        (
            "box_area",
            "box_iou",
            "clip_boxes_to_image",
            "decode_boxes",
            "encode_boxes",
            "remove_small_boxes",
            "nms",
            "batched_nms",
            "soft_nms",
            "generalized_box_iou",
            "masks_to_boxes",
        ),
        "takes boxes of pictures: tests/test_boxes2d.py",
    ),
    **dict.fromkeys(
        ("roi_align", "roi_pool", "paste_masks", "paste_binary_masks"),
        "takes pictures and boxes of them: tests/test_rois.py",
    ),
    **dict.fromkeys(
        (
            "Rle",
            "encode_rle",
            "decode_rle",
            "rle_areas",
            "rle_boxes",
            "rle_iou",
            "merge_rle",
            "polygons_to_rle",
        ),
        "takes masks: tests/test_rle.py",
    ),
}

# ---------------------------------------------------------------------------------------------------------- checks


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for member in result for tensor in member]


def own_rows(batch: Batch) -> Tensor:
    return batch.clouds.points_packed() if isinstance(batch, CloudBatch) else batch.verts[0]


# What may become of a member without points, faces or voxels.
EMPTY = {
    "0": lambda result, member: all(bool((tensor == 0).all()) for tensor in result),
    "no rows": lambda result, member: all(tensor.numel() == 0 for tensor in result),
    "infinite": lambda result, member: bool(torch.isinf(result[0]).all()),
    "infinite without vertices": lambda result, member: bool(
        (torch.isinf(result[0]) == (not len(own_rows(member)))).all()
    ),
    "0, alone a ValueError": lambda result, member: all(bool((tensor == 0).all()) for tensor in result),
    "unchanged": lambda result, member: torch.equal(result[0], own_rows(member)),
    "own part": lambda result, member: len(result[0]) == len(own_rows(member)),
}

EVERYTHING = [(name, case) for name, operator in TABLE.items() for case in CASES[operator.over]]
# Half precision and autocast differ from float64 in types, not in shapes: two cases do.
FEW_CASES = {
    "meshes": ("empty middle", "sliver faces"),
    "queries": ("empty middle", "zero-area faces"),
    "clouds": ("empty middle", "one place"),
    "pairs": ("empty middle", "duplicate points"),
    "volumes": ("empty middle", "equal to the level"),
}
TYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
MOVING = [name for name, operator in TABLE.items() if operator.laws is not None]


def test_every_public_name_has_a_row_or_a_reason():
    public = {name for name in vars(ops) if not name.startswith("_") and not inspect.ismodule(getattr(ops, name))}
    public |= {n for n, f in vars(losses).items() if inspect.isfunction(f) and f.__module__.startswith(losses.__name__)}
    public = {name for name in public if not name.startswith("_")}
    rows_of = {name.split(",")[0] for name in TABLE if "." not in name}
    assert public == rows_of | set(EXEMPT), public ^ (rows_of | set(EXEMPT))
    assert not rows_of & set(EXEMPT)


def assert_near(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Relative to the largest expected value: small numbers beside large ones are cancellation."""
    assert found.shape == expected.shape, name
    assert found.dtype == expected.dtype, name
    if not found.is_floating_point():
        assert torch.equal(found, expected), name
        return
    finite = expected.isfinite()
    assert torch.equal(found.nan_to_num(0.5)[~finite], expected.nan_to_num(0.5)[~finite]), name
    found, expected = found[finite].detach(), expected[finite].detach()
    if found.numel():
        error, size = float((found - expected).abs().max()), float(expected.abs().max())
        assert error <= tolerance * size, f"{name}: off by {error:.1e} of {size:.1e}"


@pytest.mark.parametrize("name, case", EVERYTHING)
def test_values_and_gradients_are_finite_and_ragged_is_a_loop(name, case):
    operator, batch = TABLE[name], make_batch(TABLE[name].over, case)
    for leaf in batch.leaves():
        leaf.requires_grad_()
    if case in operator.errors:
        with pytest.raises(ValueError):
            operator.call(batch)
        return
    result, members, empty = operator.call(batch), batch.members(), batch.empty(operator.over)
    ragged = isinstance(result, list)
    assert {t.dtype for t in flat(result) if t.is_floating_point()} <= {torch.float64}
    if not ragged:
        assert bool(result.isfinite())
    for b, gone in enumerate(empty if ragged else []):
        if gone:
            assert EMPTY[operator.empty](result[b], members[b]), f"empty member {b} gives {result[b]}"
        else:
            assert all(bool(tensor.isfinite().all()) for tensor in result[b]), f"member {b} gives {result[b]}"

    if operator.grad:
        floating = [tensor for tensor in flat(result) if tensor.requires_grad]
        assert floating or all(t.numel() == 0 for t in flat(result)), "no gradient"
        # weights of different sizes, since gradients of plain sums may cancel
        weighted = [t * torch.arange(1.0, t.numel() + 1).view(t.shape).to(t) for t in floating]
        total = sum((t.nan_to_num(0, 0, 0).sum() for t in weighted), start=0 * batch.leaves()[0].nan_to_num().sum())
        gradients = torch.autograd.grad(total, batch.leaves(), allow_unused=True)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None), gradients
        for leaf, gradient in zip(batch.leaves(), gradients):
            assert gradient is None or not bool(gradient[leaf.isnan()].any()), "a gradient beyond a cloud's points"

    if case in operator.ambiguous:
        return
    with torch.no_grad():
        alone = [single(operator, member) for member in members]
    if not ragged:
        assert not any(bool(loss != 0) for loss, gone in zip(alone, empty) if gone), "an empty member must add zero"
        assert_near(result.detach(), torch.stack(alone).mean(), 1e-12, "mean of members")
        return
    for b, expected in enumerate(alone):
        if expected is None:
            assert empty[b]
            continue
        for found, value in zip(result[b], expected[0]):
            assert_near(found.detach(), value, 1e-8, f"member {b}")


def single(operator: Operator, member: Batch) -> Any:
    """What a batch of one gives; None where that is an error for an empty member."""
    if operator.empty == "0, alone a ValueError" and member.empty(operator.over) == [True]:
        with pytest.raises(ValueError):
            operator.call(member)
        return None
    return operator.call(member)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize(
    "scale, shift, dtype", [(1e-6, 0, torch.float64), (1e-6, 0, torch.float32), (1, 1e6, torch.float64)]
)
def test_results_follow_scale_and_offset(name, scale, shift, dtype):
    operator = TABLE[name]
    # far away, what has nearly no area is another shape; in float32 too
    flat_cases = ("zero-area faces", "sliver faces", "duplicate points", "one place") if dtype == torch.float64 else ()
    for case in ("ragged", *(flat_cases if shift == 0 else ())):
        if case not in CASES[operator.over] or case in operator.ambiguous:
            continue
        batch = make_batch(operator.over, case, dtype)
        moved = batch.map(lambda tensor: tensor * scale + shift)._replace(unit=scale, origin=float(shift))
        before, after = operator.call(batch), operator.call(moved)
        pairs = [((before,), (after,))] if isinstance(before, Tensor) else zip(before, after)
        for old, new in pairs:
            assert len(operator.laws) == len(old)
            for value, found, law in zip(old, new, operator.laws):
                if law is None or (dtype == torch.float32 and not value.is_floating_point()):
                    continue
                if not value.is_floating_point():
                    assert torch.equal(found, value)
                elif value.numel():
                    # against the largest value: what vanishes leaves rounding
                    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
                    back = (found.double() - (shift if law.moves else 0)) / float(scale) ** law.power
                    error = float((back - value).abs().amax())
                    assert error <= tolerance * float(value.abs().max()), (case, law, back, value)


@pytest.mark.parametrize("name", TABLE)
def test_types_in_are_types_out_inside_autocast_too(name):
    operator = TABLE[name]
    for case in set(FEW_CASES[operator.over]) - set(operator.errors):
        rounded = make_batch(operator.over, case, torch.bfloat16)
        half, raised = flat(operator.call(rounded)), flat(operator.call(rounded.map(Tensor.float)))
        batch = make_batch(operator.over, case, torch.float32)
        single = flat(operator.call(batch))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = flat(operator.call(batch))
        assert {t.dtype for t in single if t.is_floating_point()} <= {torch.float32}
        assert {t.dtype for t in half if t.is_floating_point()} <= {TYPES[operator.half]}
        if not operator.empty.startswith("infinite"):
            assert all(bool(t.isfinite().all()) for t in (*half, *single))
        for found, expected in zip(half, raised):
            if operator.nan != LAYER and case not in operator.ambiguous:
                assert_near(found, expected.to(found.dtype), 1e-2, f"{name} in bf16")
        for found, expected in zip(cast, single):
            if operator.nan == LAYER:
                assert found.dtype == torch.bfloat16
            elif case not in operator.ambiguous:
                assert_near(found, expected, 1e-6, name)


@pytest.mark.parametrize("name", TABLE)
def test_nan_and_infinity_are_errors_that_say_where(name):
    operator = TABLE[name]
    batch = make_batch(operator.over, "noise" if operator.over == "volumes" else "single")
    expected = flat(operator.call(batch))
    for field in FIELDS[operator.over]:
        good = getattr(batch, field)
        for bad in degenerate.poisoned(good[0] if isinstance(good, list) else good):
            broken = batch._replace(**{field: [bad] if isinstance(good, list) else bad})
            if operator.nan == "ValueError" or (operator.nan == "ValueError for NaN" and bool(bad.isnan().any())):
                with pytest.raises(ValueError, match=r"(finite|NaN).*(index|at|in) ") as error:
                    operator.call(broken)
                assert re.search(r"\d", str(error.value))
            elif operator.nan != "ValueError for NaN":
                assert len(flat(operator.call(broken))) == len(expected)


@pytest.mark.parametrize("scale, shift", [(1e-6, 0), (1e6, 0), (1, 1e6)])
def test_alignment_takes_the_same_turns_at_every_scale_and_place(scale, shift):
    x = degenerate.cloud(40, 8)[None]
    y = turned(x[0], torch.linalg.matrix_exp(0.1 * (_TURN - _TURN.mT)))[None] + 0.05
    expected = ops.iterative_closest_point(x, y, estimate_scale=True)
    found = ops.iterative_closest_point(x * scale + shift, y * scale + shift, estimate_scale=True)
    assert len(found.t_history) == len(expected.t_history) > 2
    torch.testing.assert_close((found.Xt - shift) / scale, expected.Xt, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.RTs.s, expected.RTs.s, rtol=1e-6, atol=0)


def test_distances_far_from_the_origin_keep_their_digits_in_float32():
    triangle = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 3, 0]]) + 1e6
    point = torch.tensor([0.5, 0.8125, 0.1875]) + 1e6
    assert abs(float(ops.point_triangle_distance(point[None], triangle[None])) - 0.1875) < 1e-6


def test_both_searches_agree_on_the_torture_set(monkeypatch):
    """Small clouds are measured in tiles; made to use the trees of large ones, results are the same."""
    # where several answers are right each search may give another
    names = [n for n, o in TABLE.items() if o.over == "pairs" and o.laws]
    inputs = [
        (name, make_batch(TABLE[name].over, case))
        for name in names
        for case in CASES[TABLE[name].over]
        if case not in TABLE[name].errors
    ]
    expected = [flat(TABLE[name].call(batch)) for name, batch in inputs]
    monkeypatch.setattr(point_ops, "TREE_PAIRS", 0)
    for (name, batch), tiled in zip(inputs, expected):
        for found, value in zip(flat(TABLE[name].call(batch)), tiled):
            assert_near(found, value, 1e-9, name)


def test_memory_stays_within_the_budget():
    """30,000 x 30,000 squared distances alone are 3.6 GB; in a process of its own, for its peak to be seen."""
    script = """
import resource, torch
from vision3dgen.losses import chamfer_distance
from vision3dgen.ops import ball_query, knn_points
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def grown(run):
    before = peak()
    run()
    return peak() - before
small = torch.rand(2, 1, 100, 3)
chamfer_distance(*small).loss, ball_query(*small), knn_points(*torch.rand(2, 1, 100, 9))
x, y = torch.rand(2, 1, 30000, 3)
wide = torch.rand(2, 1, 10000, 9)
x.requires_grad_()
print(grown(lambda: chamfer_distance(x, y).loss.backward()))
print(grown(lambda: knn_points(x, y, K=8).dists.sum().backward()))
print(grown(lambda: ball_query(x, y, K=8, radius=0.05)))
print(grown(lambda: knn_points(*wide, K=2)))
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    grown = [float(line) for line in printed.split()]
    assert len(grown) == 4
    assert max(grown) < 300, f"MB at the peak, above what was there before: {grown}"


# -------------------------------------------------------------------------------------------------------- document


def law_text(law: Law | None) -> str:
    if law is None:
        return "-"
    if law.moves:
        return "s x + t"
    return {-2: "1/s²", -1: "1/s", 0: "1", 1: "s", 2: "s²"}[law.power]


def document_table() -> str:
    lines = [
        "| operator | reads | empty member | ValueError for | NaN | bf16 gives | gradient | scaled by s, moved by t |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, o in TABLE.items():
        laws = "-" if o.laws is None else ", ".join(law_text(law) for law in o.laws)
        half = "bf16, autocast too" if o.nan == LAYER else o.half
        cells = [f"`{name}`", o.over, o.empty, o.why or "-", o.nan, half, "finite" if o.grad else "none", laws]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document_cases() -> str:
    kinds = {"meshes, queries": "meshes", "clouds, pairs": "clouds", "volumes": "volumes"}
    return "\n".join(f"- **{kind}**: {', '.join(CASES[over])}" for kind, over in kinds.items())


def document_parts() -> dict[str, str]:
    return {"cases": document_cases(), "table": document_table()}


def test_the_document_is_the_table():
    text = DOCUMENT.read_text()
    for name, part in document_parts().items():
        assert f"<!-- {name} -->\n{part}\n<!-- end -->" in text, "run python -m tests.test_degenerate"


if __name__ == "__main__":
    written = DOCUMENT.read_text()
    for title, part in document_parts().items():
        head, rest = written.split(f"<!-- {title} -->\n")
        written = f"{head}<!-- {title} -->\n{part}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    DOCUMENT.write_text(written)
