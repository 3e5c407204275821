"""Geometry operators against the libraries that have them too, in one run.

    python benchmarks/ops.py --out runs/ops                     all operators; absent rivals are left out
    python benchmarks/ops.py --out runs/ops --only chamfer knn  those whose name begins so
    python benchmarks/ops.py --out runs/ops --meshes FOLDER     and inside tests on real meshes (OBJ, PLY, OFF, STL)
    python benchmarks/ops.py --out runs/ops --device cuda

Every contestant of a row gets the same input and they take turns, so that a busy machine is busy for all of them; a row
holds medians. Memory is what the process needed beyond its size before the call (on CUDA: what torch allocated). Leaves
table.md, ops.jsonl, scaling.png and, with --meshes, inside.md in the output folder.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from torch import Tensor

from vision3dgen import losses, ops
from vision3dgen.engine import memory_growth, seconds_of
from vision3dgen.experiment import environment
from vision3dgen.files import atomic_write
from vision3dgen.io import load_mesh, to_open3d, to_pytorch3d, to_trimesh
from vision3dgen.structures import Camera, GridSpec, Meshes, Pointclouds

SECONDS = 3.0  # about how long all repetitions of a row may take, for each contestant
REPEATS = (3, 25)  # fewest and most
HAS_PYTORCH3D = importlib.util.find_spec("pytorch3d") is not None
HAS_SKIMAGE = importlib.util.find_spec("skimage") is not None
HAS_OPEN3D = importlib.util.find_spec("open3d") is not None
console = Console(width=None if sys.stdout.isatty() else 160)

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """What one contestant needed for one piece of work."""

    operator: str
    work: str
    passes: str  # forward, or forward + backward
    by: str
    seconds: float
    repeats: int
    mebibytes: float | None


@dataclass(frozen=True)
class Contest:
    """One piece of work and who does it; the first contestant is this library."""

    operator: str
    work: str
    contestants: Mapping[str, Run]
    leaves: tuple[Tensor, ...] = ()  # given: gradients of the results with respect to these are taken too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="operators whose name begins with one of these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--meshes", type=Path, help="folder of meshes for the table of inside tests")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the curves from 1e3 to 1e6 points")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    for contest in contests(device):
        if contest.operator.startswith(tuple(options.only)):
            rows += compete(contest, device)
            console.print(shown(rows[-len(contest.contestants) :]))
    curves = [] if options.no_scaling else scaling(device)
    write(options.out, rows, curves)
    console.print(Markdown((options.out / "table.md").read_text()))
    if options.meshes:
        text = inside_table(options.meshes)
        with atomic_write(options.out / "inside.md") as file:
            file.write(text.encode())
        console.print(Markdown(text))
    return 0


# ----------------------------------------------------------------------------------------------------- measuring


def compete(contest: Contest, device: torch.device) -> list[Row]:
    """Medians of interleaved repetitions, and the memory of one."""
    runs = {name: with_backward(run, contest.leaves) for name, run in contest.contestants.items()}
    memory = {name: peak(run, device) for name, run in runs.items()}  # the first call warms up as well
    first = {name: seconds_of(run, device) for name, run in runs.items()}
    slowest = max(first.values())
    repeats = int(min(max(SECONDS / max(slowest, 1e-6), REPEATS[0]), REPEATS[1]))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    passes = "forward + backward" if contest.leaves else "forward"
    return [
        Row(contest.operator, contest.work, passes, name, statistics.median(seconds[name]), repeats, memory[name])
        for name in runs
    ]


def with_backward(run: Run, leaves: tuple[Tensor, ...]) -> Run:
    if not leaves:
        return run

    def both() -> None:
        torch.autograd.grad(run(), leaves)

    return both


def peak(run: Run, device: torch.device) -> float | None:
    """Mebibytes that a call needed beyond what was there, None where the system does not tell."""
    growth = memory_growth(run, device)
    return None if growth is None else growth / 2**20


# ------------------------------------------------------------------------------------------------------ contests


def contests(device: torch.device) -> Iterator[Contest]:
    """Every operator some other library has too, with that library's call."""
    yield from point_contests(device)
    yield from mesh_contests(device)
    yield from volume_contests(device)
    yield from box_contests(device)
    if device.type == "cpu":
        yield from cpu_contests()


def cloud(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def rivals(**named: Run | None) -> dict[str, Run]:
    return {name.replace("_", " "): run for name, run in named.items() if run is not None}


def point_contests(device: torch.device) -> Iterator[Contest]:
    p3d_ops, p3d_loss = pytorch3d("ops"), pytorch3d("loss")
    on_cpu = device.type == "cpu"
    for batch, points in ((1, 10_000), (4, 2048), (32, 2048)):
        x, y = (cloud(batch, points, 3, seed=s, device=device).requires_grad_() for s in (0, 1))

        def by_cdist(x: Tensor = x, y: Tensor = y) -> Tensor:
            squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
            return (squared.amin(2).mean(1) + squared.amin(1).mean(1)).mean()

        def by_tree(x: Tensor = x, y: Tensor = y) -> float:
            total = 0.0
            for a, b in zip(x.detach().numpy(), y.detach().numpy()):
                total += (cKDTree(b).query(a)[0] ** 2).mean() + (cKDTree(a).query(b)[0] ** 2).mean()
            return total / len(x)

        def ours(x: Tensor = x, y: Tensor = y) -> Tensor:
            return losses.chamfer_distance(x, y)[0]

        def theirs(x: Tensor = x, y: Tensor = y) -> Tensor:
            return p3d_loss.chamfer_distance(x, y)[0]

        work = f"{batch} x {points} against {points}"
        both = rivals(vision3dgen=ours, PyTorch3D=theirs if HAS_PYTORCH3D else None, torch_cdist=by_cdist)
        yield Contest("chamfer_distance", work, both, (x, y))
        with_tree = both | ({"SciPy cKDTree": by_tree} if on_cpu else {})
        yield Contest("chamfer_distance", work, {name: no_grad(run) for name, run in with_tree.items()})

    x, y = (cloud(1, 10_000, 3, seed=s, device=device) for s in (0, 1))
    yield Contest(
        "knn_points",
        "K = 16, 10000 in 10000",
        rivals(
            vision3dgen=lambda: ops.knn_points(x, y, K=16),
            PyTorch3D=(lambda: p3d_ops.knn_points(x, y, K=16)) if HAS_PYTORCH3D else None,
            SciPy_cKDTree=(lambda: cKDTree(y[0].numpy()).query(x[0].numpy(), k=16)) if on_cpu else None,
            Open3D=open3d_knn(x[0], y[0], 16) if on_cpu and HAS_OPEN3D else None,
        ),
    )
    yield Contest(
        "ball_query",
        "K = 16, radius 0.05, 10000 in 10000",
        rivals(
            vision3dgen=lambda: ops.ball_query(x, y, K=16, radius=0.05),
            PyTorch3D=(lambda: p3d_ops.ball_query(x, y, K=16, radius=0.05)) if HAS_PYTORCH3D else None,
            SciPy_cKDTree=(lambda: cKDTree(y[0].numpy()).query_ball_point(x[0].numpy(), 0.05)) if on_cpu else None,
        ),
    )
    many = cloud(4, 10_000, 3, seed=2, device=device)
    yield Contest(
        "sample_farthest_points",
        "4 x 10000 to 1024",
        rivals(
            vision3dgen=lambda: ops.sample_farthest_points(many, K=1024),
            PyTorch3D=(lambda: p3d_ops.sample_farthest_points(many, K=1024)) if HAS_PYTORCH3D else None,
            Open3D=open3d_farthest(many, 1024) if on_cpu and HAS_OPEN3D else None,
        ),
    )
    yield Contest(
        "estimate_pointcloud_normals",
        "1 x 10000, 50 neighbors",
        rivals(
            vision3dgen=lambda: ops.estimate_pointcloud_normals(x),
            PyTorch3D=(lambda: p3d_ops.estimate_pointcloud_normals(x)) if HAS_PYTORCH3D else None,
            Open3D=open3d_normals(x[0], 50) if on_cpu and HAS_OPEN3D else None,
        ),
    )
    turned = 1.1 * many @ torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0].to(device)
    moved = many + 0.01
    indices = torch.randint(10_000, (4, 10_000, 16), generator=torch.Generator().manual_seed(4)).to(device)
    for name, run in {
        "corresponding_points_alignment": lambda m: m.corresponding_points_alignment(many, turned, estimate_scale=True),
        "iterative_closest_point": lambda m: m.iterative_closest_point(many, moved, max_iterations=10),
        "packed_to_padded": lambda m: m.packed_to_padded(
            many.flatten(0, 1), 10_000 * torch.arange(4, device=device), 10_000
        ),
        "knn_gather": lambda m: m.knn_gather(many, indices),
    }.items():
        yield against_pytorch3d(name, "4 x 10000", run)
    boxes = oriented_boxes(100).to(device)
    yield against_pytorch3d("box3d_overlap", "100 against 100", lambda m: m.box3d_overlap(boxes, boxes))


def mesh_contests(device: torch.device) -> Iterator[Contest]:
    sphere = ops.ico_sphere(5)  # 10,242 vertices, 20,480 faces
    noise = 0.01 * torch.randn(10_242, 3, generator=torch.Generator().manual_seed(0))
    shapes = Meshes([sphere.verts_packed() + k * noise for k in range(2)], [sphere.faces_packed()] * 2).to(device)
    theirs = to_pytorch3d(shapes) if HAS_PYTORCH3D else None
    work = "2 meshes of 10242 vertices, 20480 faces"

    verts = torch.randn(20_480, 128, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    edges = shapes[0].edges_packed()
    extra = torch.randint(20_480, (61_440 - len(edges), 2), generator=torch.Generator().manual_seed(2)).to(device)
    edges = torch.cat([edges, extra])
    conv = ops.GraphConv(128, 128).to(device)
    p3d_conv = pytorch3d("ops").GraphConv(128, 128).to(device) if HAS_PYTORCH3D else None
    graph = rivals(
        vision3dgen=lambda: conv(verts, edges).sum(),
        PyTorch3D=(lambda: p3d_conv(verts, edges).sum()) if p3d_conv else None,
        torch_geometric=pyg_graph_conv(verts, edges),
    )
    yield Contest("GraphConv", "128 to 128, 20480 vertices, 61440 edges", graph, (verts,))
    yield Contest(
        "GraphConv", "128 to 128, 20480 vertices, 61440 edges", {name: no_grad(run) for name, run in graph.items()}
    )

    # Losses with gradients to the vertices. Every call makes its own meshes: both libraries keep what they derive.
    leaf = shapes.verts_packed().clone().requires_grad_()
    counts, faces = shapes.num_verts_per_mesh().tolist(), shapes.faces_list()
    points = cloud(2, 2000, 3, seed=5, device=device) * 2 - 1

    def mine() -> Meshes:
        return Meshes(list(leaf.split(counts)), faces)

    def other() -> Any:
        return pytorch3d("structures").Meshes(list(leaf.split(counts)), faces)

    def pair(call: Callable[[Any, Any, Any], Tensor]) -> dict[str, Run]:
        loss, structures = pytorch3d("loss"), pytorch3d("structures")
        return rivals(
            vision3dgen=lambda: call(losses, mine(), Pointclouds(list(points))),
            PyTorch3D=(lambda: call(loss, other(), structures.Pointclouds(list(points)))) if HAS_PYTORCH3D else None,
        )

    for name, call, at in (
        ("mesh_edge_loss", lambda m, shape, _: m.mesh_edge_loss(shape), work),
        ("mesh_laplacian_smoothing uniform", lambda m, shape, _: m.mesh_laplacian_smoothing(shape), work),
        ("mesh_laplacian_smoothing cot", lambda m, shape, _: m.mesh_laplacian_smoothing(shape, "cot"), work),
        ("mesh_normal_consistency", lambda m, shape, _: m.mesh_normal_consistency(shape), work),
        ("point_mesh_face_distance", lambda m, s, p: m.point_mesh_face_distance(s, p), work + ", 2 x 2000 points"),
        ("point_mesh_edge_distance", lambda m, s, p: m.point_mesh_edge_distance(s, p), work + ", 2 x 2000 points"),
    ):
        yield Contest(name, at, pair(call), (leaf,))

    def both(name: str, at: str, call: Callable[[Any, Any], Any]) -> Contest:
        return Contest(
            name,
            at,
            rivals(
                vision3dgen=lambda: call(ops, mine().detach()),
                PyTorch3D=(lambda: call(pytorch3d("ops"), other().detach())) if HAS_PYTORCH3D else None,
            ),
        )

    sampling = both(
        "sample_points_from_meshes", work + ", 10000 each", lambda m, s: m.sample_points_from_meshes(s, 10_000)
    )
    if device.type == "cpu" and HAS_OPEN3D:
        legacy = to_open3d(shapes[0])
        contestants = dict(sampling.contestants)
        contestants["Open3D (twice one)"] = lambda: [legacy.sample_points_uniformly(10_000) for _ in range(2)]
        sampling = Contest(sampling.operator, sampling.work, contestants)
    yield sampling
    maps = torch.randn(2, 64, 56, 56, generator=torch.Generator().manual_seed(6)).to(device)
    yield both("vert_align", work + ", 64 x 56 x 56", lambda m, s: m.vert_align(maps, s, return_packed=True))
    yield both("SubdivideMeshes", work, lambda m, s: m.SubdivideMeshes()(s))
    yield both("taubin_smoothing", work + ", 10 rounds", lambda m, s: m.taubin_smoothing(s, num_iter=10))
    yield both("cot_laplacian", work, lambda m, s: m.cot_laplacian(s.verts_packed(), s.faces_packed()))
    yield both("laplacian", work, lambda m, s: m.laplacian(s.verts_packed(), s.edges_packed()))
    yield both("norm_laplacian", work, lambda m, s: m.norm_laplacian(s.verts_packed(), s.edges_packed()))
    if HAS_PYTORCH3D:
        face_areas = pytorch3d("ops.mesh_face_areas_normals").mesh_face_areas_normals
        triangles = shapes.verts_packed(), shapes.faces_packed()
        yield Contest(
            "mesh_face_areas_normals",
            work,
            {
                "vision3dgen": lambda: ops.mesh_face_areas_normals(*triangles),
                "PyTorch3D": lambda: face_areas(*triangles),
            },
        )
    for name, derive in (
        ("Meshes.edges_packed", lambda s: s.edges_packed()),
        ("Meshes.verts_normals_packed", lambda s: s.verts_normals_packed()),
        ("Meshes.verts_padded", lambda s: s.verts_padded()),
    ):
        yield both(name, work, lambda _, s, derive=derive: derive(s))
    yield rasterizing(shapes[0], theirs)


def rasterizing(sphere: Meshes, theirs: Any) -> Contest:
    camera = Camera.from_r2n2(30.0, 25.0, 0.8, image_size=128).to(sphere.verts_packed().device)
    small = sphere.scale_verts(0.4)
    run = {"vision3dgen": lambda: ops.rasterize(small, camera)}
    if theirs is not None:
        run["PyTorch3D"] = lambda: ops.rasterize(small, camera, backend="pytorch3d")
    return Contest("rasterize", "20480 faces, 128 x 128, hard", run)


def volume_contests(device: torch.device) -> Iterator[Contest]:
    full = (cloud(8, 48, 48, 48, seed=7, device=device) < 0.2).float()
    for align in ("topleft", "corner", "center"):
        yield against_pytorch3d(
            "cubify", f"8 x 48^3, 20 % full, {align}", lambda m, a=align: m.cubify(full, 0.5, align=a)
        )
    axis = torch.linspace(-1, 1, 128)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    ball = (0.7 + 0.1 * torch.sin(9 * x) * torch.sin(8 * y) * torch.sin(7 * z) - (x * x + y * y + z * z).sqrt()).to(
        device
    )
    run = {"vision3dgen": lambda: ops.marching_cubes(ball[None], 0.0)}
    if HAS_PYTORCH3D:
        run["PyTorch3D"] = lambda: pytorch3d("ops.marching_cubes").marching_cubes(ball[None], 0.0)
    if HAS_SKIMAGE and device.type == "cpu":
        from skimage.measure import marching_cubes

        run["scikit-image"] = lambda: marching_cubes(ball.numpy(), 0.0)
    yield Contest("marching_cubes", "128^3", run)


def box_contests(device: torch.device) -> Iterator[Contest]:
    """Suppression and regions of maps, against torch loops, kornia, and torchvision where it can be imported."""
    from kornia.geometry.bbox import nms as kornia_nms
    from kornia.geometry.transform import crop_and_resize

    theirs = torchvision_ops()
    for count in (1000, 10_000):
        corner, size, scores = (cloud(count, n, seed=9 + n, device=device) for n in (2, 3, 1))
        boxes = torch.cat([600 * corner, 600 * corner + 10 + 90 * size[:, :2]], 1)
        run: dict[str, Run] = {
            "vision3dgen": lambda b=boxes, s=scores[:, 0]: ops.nms(b, s, 0.5),
            "torch loop": lambda b=boxes, s=scores[:, 0]: looped_nms(b, s, 0.5),
            "kornia": lambda b=boxes, s=scores[:, 0]: kornia_nms(b, s, 0.5),
        }
        if theirs is not None:
            run["torchvision"] = lambda b=boxes, s=scores[:, 0]: theirs.nms(b, s, 0.5)
        yield Contest("nms", f"{count} boxes", run)
    corner, size = cloud(256, 2, seed=20, device=device), cloud(256, 2, seed=21, device=device)
    boxes = torch.cat([500 * corner, 500 * corner + 20 + 200 * size], 1)
    regions = torch.cat([torch.arange(256, device=device)[:, None] % 2, boxes], 1)
    for passes in (False, True):
        maps = cloud(2, 128, 50, 50, seed=22, device=device).requires_grad_(passes)
        run = {
            "vision3dgen": lambda m=maps: ops.roi_align(m, regions, 7, 1 / 16, 2, True).sum(),
            "torch loop": lambda m=maps: looped_roi_align(m, regions, 7, 1 / 16, 2).sum(),
            # one bilinear sample in the middle of a bin, where RoIAlign has four
            "kornia crop_and_resize": lambda m=maps: crop_and_resize(
                m[regions[:, 0].long()], corners_of(regions[:, 1:] / 16), (7, 7)
            ).sum(),
        }
        if theirs is not None:
            run["torchvision"] = lambda m=maps: theirs.roi_align(m, regions, 7, 1 / 16, 2, True).sum()
        yield Contest("roi_align", "256 regions of 2 x 128 x 50 x 50, 7 x 7", run, (maps,) if passes else ())


def looped_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """A box at a time against all that are left: what one writes without a library."""
    left, kept = scores.argsort(descending=True), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[ops.box_iou(boxes[best][None], boxes[left])[0] <= threshold]
    return torch.stack(kept)


def looped_roi_align(maps: Tensor, regions: Tensor, size: int, scale: float, samples: int) -> Tensor:
    """A region at a time by `grid_sample`."""
    height, width = maps.shape[2:]
    steps = (torch.arange(size * samples, device=maps.device) + 0.5) / (size * samples)
    found = []
    for region in regions:
        x0, y0, x1, y1 = (region[1:] * scale).unbind()
        x, y = x0 + steps * (x1 - x0), y0 + steps * (y1 - y0)
        grid = torch.stack(torch.meshgrid(2 * y / height - 1, 2 * x / width - 1, indexing="ij")[::-1], -1)
        sampled = torch.nn.functional.grid_sample(maps[int(region[0])][None], grid[None], align_corners=False)
        found.append(torch.nn.functional.avg_pool2d(sampled, samples)[0])
    return torch.stack(found)


def corners_of(boxes: Tensor) -> Tensor:
    """The four corners (N, 4, 2) of boxes, clockwise from the top left."""
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([torch.stack(each, 1) for each in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], 1)


def torchvision_ops() -> Any:
    """torchvision.ops, None where there is none or it does not import beside this torch."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError) as error:
        console.print(f"torchvision is left out: {error}")
        return None


def cpu_contests() -> Iterator[Contest]:
    """Inside tests, distances, voxels and files, against Open3D, trimesh and SciPy."""
    shape = ops.ico_sphere(5)
    points = cloud(100_000, 3, seed=8, device=torch.device("cpu")) * 2.4 - 1.2
    work = "100000 points, 20480 faces"
    for name, run in (
        ("contains parity", lambda: ops.contains(shape, points, method="parity")),
        ("contains nonzero", lambda: ops.contains(shape, points, method="nonzero")),
        ("signed_distance nonzero", lambda: ops.signed_distance(shape, points, method="nonzero")),
    ):
        scene = open3d_scene(shape) if HAS_OPEN3D else None
        call = None if scene is None else (scene[1] if "distance" in name else scene[0])
        yield Contest(
            name,
            work,
            rivals(vision3dgen=run, Open3D_raycasting=(lambda c=call: c(points)) if call else None),
        )
    mesh = to_trimesh(shape)
    yield Contest(
        "voxelize surface",
        "20480 faces, 64^3",
        {
            "vision3dgen": lambda: ops.voxelize(shape, GridSpec.cube(64, -1.05, 1.05), "surface"),
            "trimesh": lambda: mesh.voxelized(2.1 / 64),
        },
    )
    x, y = (cloud(1, 500, 3, seed=s, device=torch.device("cpu")) for s in (0, 1))
    yield Contest(
        "earth_movers_distance exact",
        "1 x 500 against 500",
        {
            "vision3dgen": lambda: losses.earth_movers_distance(x, y),
            "SciPy": lambda: linear_sum_assignment(torch.cdist(x[0], y[0]).numpy()),
        },
    )


def against_pytorch3d(name: str, work: str, call: Callable[[Any], Any]) -> Contest:
    """The same call in both modules."""
    theirs = pytorch3d("ops")
    return Contest(
        name, work, rivals(vision3dgen=lambda: call(ops), PyTorch3D=(lambda: call(theirs)) if HAS_PYTORCH3D else None)
    )


def pytorch3d(module: str) -> Any:
    return importlib.import_module(f"pytorch3d.{module}") if HAS_PYTORCH3D else None


def no_grad(run: Run) -> Run:
    def without() -> Any:
        with torch.no_grad():
            return run()

    return without


def oriented_boxes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]
    return (corners - 0.5) @ turn + torch.rand(count, 1, 3, generator=generator)


def open3d_knn(x: Tensor, y: Tensor, k: int) -> Run:
    import open3d as o3d

    queries, points = (o3d.core.Tensor.from_numpy(t.numpy()) for t in (x, y))

    def run() -> Any:
        search = o3d.core.nns.NearestNeighborSearch(points)
        search.knn_index()
        return search.knn_search(queries, k)

    return run


def open3d_farthest(clouds: Tensor, k: int) -> Run:
    import open3d as o3d

    converted = [o3d.t.geometry.PointCloud(o3d.core.Tensor.from_numpy(c.numpy())) for c in clouds]
    return lambda: [c.farthest_point_down_sample(k) for c in converted]


def open3d_normals(points: Tensor, neighbors: int) -> Run:
    import open3d as o3d

    tensor = o3d.core.Tensor.from_numpy(points.numpy())

    def run() -> Any:
        made = o3d.t.geometry.PointCloud(tensor)
        made.estimate_normals(neighbors)
        return made

    return run


def open3d_scene(shape: Meshes) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """Inside test and signed distance by Open3D; building its tree is part of the work, as it is of ours."""
    import open3d as o3d

    converted = to_open3d(shape, tensor=True)

    def scene() -> Any:
        made = o3d.t.geometry.RaycastingScene()
        made.add_triangles(converted)
        return made

    def inside(points: Tensor) -> Any:
        return scene().compute_occupancy(o3d.core.Tensor.from_numpy(points.numpy()))

    def distance(points: Tensor) -> Any:
        return scene().compute_signed_distance(o3d.core.Tensor.from_numpy(points.numpy()))

    return inside, distance


def pyg_graph_conv(verts: Tensor, edges: Tensor) -> Run:
    from torch_geometric.nn import GraphConv

    conv = GraphConv(128, 128).to(verts.device)
    edge_index = torch.cat([edges, edges.flip(1)]).t().contiguous()
    return lambda: conv(verts, edge_index).sum()


# ------------------------------------------------------------------------------------------------------- scaling


def scaling(device: torch.device) -> list[Row]:
    """Chamfer distance of N against N points, forward and backward, while a call takes at most seconds."""
    rows: list[Row] = []
    alive = rivals(
        vision3dgen=lambda x, y: losses.chamfer_distance(x, y)[0],
        PyTorch3D=(lambda x, y: pytorch3d("loss").chamfer_distance(x, y)[0]) if HAS_PYTORCH3D else None,
        torch_cdist=lambda x, y: (lambda d: d.amin(2).mean() + d.amin(1).mean())(torch.cdist(x, y).square()),
    )
    for points in (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000):
        x, y = (cloud(1, points, 3, seed=s, device=device).requires_grad_() for s in (0, 1))
        alive.pop("torch cdist" if points > 15_000 else "", None)  # 3 matrices of N x N floats
        runs = {name: functools.partial(run, x, y) for name, run in alive.items()}
        found = compete(Contest("chamfer_distance", f"1 x {points}", runs, (x, y)), device)
        console.print(shown(found))
        rows += found
        for row in found:
            if row.seconds > 1.5:  # the next size takes ten times as long or more
                alive.pop(row.by if row.by != "vision3dgen" else "", None)
    return rows


def draw_scaling(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Row], float | None]]] = [("seconds", lambda row: row.seconds)]
    if all(row.mebibytes is not None for row in rows):
        panels.append(("MiB beyond the input", lambda row: max(row.mebibytes or 0.0, 0.1)))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, (label, value) in zip(axes[0], panels):
        for color, name in zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7"), dict.fromkeys(row.by for row in rows)):
            mine = [row for row in rows if row.by == name]
            points = [int(row.work.split()[-1]) for row in mine]
            axis.loglog(points, [value(row) for row in mine], "o-", color=color, label=name)
        axis.set(xlabel="points", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle("chamfer distance, forward + backward", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# -------------------------------------------------------------------------------------------------- inside tests


def inside_table(folder: Path) -> str:
    """Agreement with Open3D's ray casting, smoothness and time of the inside tests on every mesh of a folder.

    Points are uniform in the box 1.2 times the mesh's. `flips`: share of neighbors on a 48^3 grid of which one is in;
    of a mesh with holes, rays leave streaks that raise it.
    """
    if not HAS_OPEN3D:
        raise ImportError('the table of inside tests compares with Open3D: pip install "vision3dgen[viz]"')
    import open3d as o3d

    lines = [
        "| mesh | faces | watertight | agreement, winding | agreement, nonzero | flips, winding | flips, Open3D "
        "| s, winding | s, nonzero | s, Open3D |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".obj", ".ply", ".off", ".stl")):
        lines.append(inside_row(path))
        console.print(lines[-1])
    known = environment()
    return (
        f"100,000 points a mesh; {known['device']}, {known['threads']} threads, Open3D {o3d.__version__}, "
        f"{date.today().isoformat()}.\n\n" + "\n".join(lines) + "\n"
    )


def inside_row(path: Path) -> str:
    import trimesh

    shape = load_mesh(path)
    faces = shape.faces_packed()
    closed = trimesh.Trimesh(shape.verts_packed().numpy(), faces.numpy()).is_watertight
    low, high = shape.get_bounding_boxes()[0].unbind(1)
    if bool((high - low).min() <= 1e-6 * (high - low).max()):
        return f"| {path.name} | {len(faces)} | flat, has no inside | | | | | | | |"
    middle, half = (low + high) / 2, 0.6 * (high - low)
    points = middle + half * (cloud(100_000, 3, seed=0, device=torch.device("cpu")) * 2 - 1)
    axes = [torch.linspace(-1, 1, 48)] * 3
    grid = middle + half * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    by_rays = open3d_scene(shape)[0]
    tests: dict[str, Callable[[Tensor], Tensor]] = {
        "winding": lambda at: ops.contains(shape, at, method="winding"),
        "nonzero": lambda at: ops.contains(shape, at, method="nonzero"),
        "Open3D": lambda at: torch.from_numpy(by_rays(at).numpy()) > 0.5,
    }
    answers, seconds = {}, {}
    for name, run in tests.items():
        start = time.perf_counter()
        answers[name] = run(points).flatten()
        seconds[name] = time.perf_counter() - start
    agree = {name: float((answers[name] == answers["Open3D"]).float().mean()) for name in ("winding", "nonzero")}
    flips = {name: flipped(tests[name](grid)) for name in ("winding", "Open3D")}
    cells = [path.name, str(len(faces)), "yes" if closed else "no"]
    cells += [f"{agree[name]:.4%}" for name in agree] + [f"{flips[name]:.3%}" for name in flips]
    cells += [f"{value:.2f}" for value in seconds.values()]
    return "| " + " | ".join(cells) + " |"


def flipped(inside: Tensor) -> float:
    volume = inside.view(48, 48, 48)
    changes = [(volume.narrow(a, 1, 47) != volume.narrow(a, 0, 47)).float().mean() for a in range(3)]
    return float(torch.stack(changes).mean())


# ------------------------------------------------------------------------------------------------------- results


def shown(rows: list[Row]) -> str:
    own = rows[0]
    others = ", ".join(f"{row.by} {row.seconds * 1e3:.2f} ms ({row.seconds / own.seconds:.1f}x)" for row in rows[1:])
    return f"{own.operator} ({own.work}, {own.passes}): {own.seconds * 1e3:.2f} ms; {others or 'nobody else'}"


def write(out: Path, rows: list[Row], curves: list[Row]) -> None:
    known = environment()
    machine = f"{known['device']}, {known['threads']} threads, torch {known['torch']}"
    records = [{"date": date.today().isoformat(), "environment": known} | asdict(row) for row in rows + curves]
    with atomic_write(out / "ops.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    text = [f"Measured {date.today().isoformat()} on {machine}; medians of interleaved repetitions.\n", table(rows)]
    if curves:
        text += ["\nChamfer distance of N against N points, forward + backward:\n", table(curves)]
        draw_scaling(curves, out / "scaling.png")
    with atomic_write(out / "table.md") as file:
        file.write("\n".join(text).encode())


def table(rows: list[Row]) -> str:
    """A row per contest: this library's time and memory, then how many times as long others take, and their memory."""
    lines = ["| operator | work | pass | ms | MiB | PyTorch3D | others |", "|---|---|---|---:|---:|---:|---|"]
    contests: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        contests.setdefault((row.operator, row.work, row.passes), []).append(row)
    for (operator, work, passes), (own, *others) in contests.items():
        ratios = {}
        for row in others:
            memory = "" if row.mebibytes is None else f", {row.mebibytes:.0f} MiB"
            ratios[row.by] = f"{row.seconds / own.seconds:.1f}x{memory}"
        memory = "-" if own.mebibytes is None else f"{own.mebibytes:.0f}"
        theirs = ratios.pop("PyTorch3D", "-")
        rest = "; ".join(f"{name} {ratio}" for name, ratio in ratios.items())
        lines.append(f"| {operator} | {work} | {passes} | {own.seconds * 1e3:.2f} | {memory} | {theirs} | {rest} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
