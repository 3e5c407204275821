"""How long a thousand pairs of meshes take to score under the protocol of Mesh R-CNN, and the same with PyTorch3D.

    python benchmarks/evaluation.py --out runs/evaluation

Generated shapes against copies with noise on their vertices, 10,000 points on each, with and without the sampling
ceiling, in one process and with workers. PyTorch3D's operators, where it is installed, score a few of the same pairs as
Mesh R-CNN's evaluation does; their time for all is extrapolated. Leaves table.md and evaluation.jsonl in the output
folder.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor

from vision3dgen.datasets import CATEGORIES, collate, make_shape
from vision3dgen.experiment import environment
from vision3dgen.files import atomic_write
from vision3dgen.io import to_pytorch3d
from vision3dgen.metrics import PROTOCOLS, Prediction, evaluate
from vision3dgen.structures import Camera, Frame, Meshes, join_meshes_as_batch

PROTOCOL = PROTOCOLS["meshrcnn"]
BATCH = 8
console = Console(width=None if sys.stdout.isatty() else 160)


class Row(NamedTuple):
    by: str
    workers: str
    ceiling: bool
    pairs: int  # scored
    seconds: float  # for all pairs; extrapolated where fewer were scored
    cpu_seconds: float  # the same of all processes' work: what does not depend on who else uses the machine
    chamfer: float  # means, so that it can be seen that both measure the same
    f1: float
    normals: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--shapes", type=int, default=104, help="different ones; the noise differs in every pair")
    parser.add_argument("--rival-pairs", type=int, default=24, help="pairs that PyTorch3D's operators score")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    batches, predictions = make_pairs(options.pairs, options.shapes)
    faces = [len(mesh.faces_packed()) for mesh in predictions.values()]
    console.print(f"{options.pairs} pairs of {min(faces)} to {max(faces)} faces")
    rows = []
    for ceiling in (False, True):
        for workers in options.workers:
            rows.append(ours(batches, predictions, workers=workers, ceiling=ceiling))
            console.print(rows[-1])
    if importlib.util.find_spec("pytorch3d") is not None and options.rival_pairs:
        rows.append(by_pytorch3d(batches, predictions, options.rival_pairs))
        console.print(rows[-1])
    write(options.out, rows, options.pairs)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def make_pairs(count: int, shapes: int) -> tuple[list[dict[str, Any]], dict[str, Meshes]]:
    """Batches of true meshes with cameras, and the predicted mesh of each id."""
    categories = list(CATEGORIES)
    known = []
    for index in track(range(min(shapes, count)), "shapes", console=console, transient=True):
        vertices, faces, *_ = make_shape(categories[index % len(categories)], index)
        known.append(Meshes([torch.from_numpy(vertices).float()], [torch.from_numpy(faces).long()]))
    stream = torch.Generator().manual_seed(0)
    items, predictions = [], {}
    for index in range(count):
        mesh, category = known[index % len(known)], categories[index % len(known) % len(categories)]
        name = f"{category}/{index:06d}/00"
        noise = 0.01 * torch.randn(mesh.verts_packed().shape, generator=stream)
        predictions[name] = Meshes([mesh.verts_packed() + noise], mesh.faces_list())
        camera = Camera.from_r2n2(float(360 * torch.rand((), generator=stream)), 25.0, 0.8).to(torch.float32)
        items.append({"id": name, "category": category, "frame": Frame("object"), "mesh": mesh, "camera": camera})
    return [collate(items[start : start + BATCH]) for start in range(0, count, BATCH)], predictions


def ours(batches: Sequence[dict[str, Any]], predictions: dict[str, Meshes], *, workers: int, ceiling: bool) -> Row:
    def predict(batch: Any) -> list[Prediction]:
        return [Prediction(shape=predictions[name], frame=Frame("object")) for name in batch["id"]]

    start, work = time.perf_counter(), cpu_seconds()
    summary = evaluate(batches, predict, PROTOCOL, out=None, seed=0, repeats=1, ceiling=ceiling, workers=workers)
    seconds, work = time.perf_counter() - start, cpu_seconds() - work
    means = [summary.per_instance[name] for name in ("CD", "F1@0.3 (%)", "|NC|")]
    assert summary.n_ok == len(predictions), summary.failures
    return Row("vision3dgen", str(workers) if workers else "none", ceiling, summary.n_ok, seconds, work, *means)


def by_pytorch3d(batches: Sequence[dict[str, Any]], predictions: dict[str, Meshes], count: int) -> Row:
    """Chamfer distance, F1 and normals as Mesh R-CNN computes them, with PyTorch3D's operators."""
    total = sum(len(batch["id"]) for batch in batches)
    batches = batches[: -(-count // BATCH)]
    seconds, work, scores = 0.0, 0.0, []
    for batch in batches:
        pairs = []
        for shapes in (join_meshes_as_batch([predictions[name] for name in batch["id"]]), batch["mesh"]):
            moved = [camera.world_to_camera(verts) for camera, verts in zip(batch["camera"], shapes.verts_list())]
            pairs.append(to_pytorch3d(Meshes(moved, shapes.faces_list())))
        start, begun = time.perf_counter(), cpu_seconds()
        scores.append(compare(*pairs))
        seconds, work = seconds + time.perf_counter() - start, work + cpu_seconds() - begun
    means = torch.cat(scores).double().mean(0).tolist()
    scored = sum(len(batch["id"]) for batch in batches)
    all_of_them = (seconds * total / scored, work * total / scored)
    return Row("PyTorch3D's operators", "none", False, scored, *all_of_them, *means)


def cpu_seconds() -> float:
    """Of this process and of those it has ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def compare(prediction: Any, target: Any) -> Tensor:
    """(B, 3): Chamfer distance, F1 at 0.3 in percent and absolute normal consistency of a batch."""
    from pytorch3d.ops import knn_gather, knn_points, sample_points_from_meshes

    boxes = target.get_bounding_boxes()  # (B, 3, 2)
    scale = 10 / (boxes[..., 1] - boxes[..., 0]).amax(1)
    x, n = sample_points_from_meshes(prediction.scale_verts(scale), 10_000, return_normals=True)
    y, m = sample_points_from_meshes(target.scale_verts(scale), 10_000, return_normals=True)
    squared, cosines = [], []
    for points, normals, others, their_normals in ((x, n, y, m), (y, m, x, n)):
        found = knn_points(points, others, K=1)
        squared.append(found.dists[..., 0])
        near = knn_gather(their_normals, found.idx)[:, :, 0]
        cosines.append(torch.nn.functional.cosine_similarity(normals, near, dim=2).abs().mean(1))
    precision, recall = (100 * (s.sqrt() < 0.3).float().mean(1) for s in squared)
    f1 = 2 * precision * recall / (precision + recall + 1e-8)
    return torch.stack([squared[0].mean(1) + squared[1].mean(1), f1, sum(cosines) / 2], 1)


def write(out: Path, rows: Sequence[Row], pairs: int) -> None:
    known = environment()
    rival = next((row for row in rows if row.by != "vision3dgen"), None)
    text = [
        f"{pairs} pairs of meshes, protocol `{PROTOCOL.name}`, {known['device']}, {known['threads']} threads, torch "
        f"{known['torch']}, {date.today().isoformat()}. With fewer pairs scored the seconds are extrapolated.",
        "",
        "| by | workers | ceiling | pairs scored | s | PyTorch3D's s | CPU s | mean CD | F1@0.3 (%) | abs. normals |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = f"{rival.seconds / row.seconds:.1f}x" if rival else "-"
        cells = [row.by, row.workers, "yes" if row.ceiling else "no", str(row.pairs), f"{row.seconds:.1f}", ratio]
        cells.append(f"{row.cpu_seconds:.1f}")
        text.append("| " + " | ".join([*cells, f"{row.chamfer:.4f}", f"{row.f1:.2f}", f"{row.normals:.4f}"]) + " |")
    with atomic_write(out / "table.md") as file:
        file.write(("\n".join(text) + "\n").encode())
    with atomic_write(out / "evaluation.jsonl") as file:
        file.writelines(json.dumps(row._asdict() | {"environment": known}).encode() + b"\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
