"""What a loader of shapes gives: items per second from files and from the packed store, memory over ten epochs."""

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from vision3dgen.datasets import ShapeNet, Shapes, collate, pack
from vision3dgen.engine import Data
from vision3dgen.engine.loading import ShuffleSampler, make_loader
from vision3dgen.experiment import environment
from vision3dgen.files import atomic_write
from vision3dgen.io import save_npz, save_obj, write_binvox, write_png
from vision3dgen.ops import ico_sphere

SYNSET = "03001627"
KINDS = {  # what an item is
    "image and points": {"fields": ("image", "points"), "points_per_item": 2048},
    "image, points, surface and mesh": {
        "fields": ("image", "points", "surface", "mesh"),
        "points_per_item": 2048,
        "surface_points": 2048,
    },
}


@dataclass(frozen=True)
class Row:
    """One reader, one kind of item, one number of workers."""

    item: str
    reader: str
    workers: int
    first: float  # items per second of the first epoch
    later: float  # median of the epochs after it
    cpu: float | None  # of those, items per second of processor time; without workers alone
    memory: list[float]  # MiB private to this process and its workers after each epoch
    items: int  # of an epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the data and loader.jsonl")
    parser.add_argument("--data", type=Path, help="a ShapeNet-style folder (default: one is made)")
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=60, help="after which the epochs of a slow reader end")


def run(options: argparse.Namespace) -> int:
    """Every kind of item from both readers; prints a table and appends to loader.jsonl."""
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.data or make(options.out / "data", options.models, options.views, options.points)
    store = options.out / "store"
    if not store.exists():
        start = time.perf_counter()
        print(pack(data, store, image_size=options.image_size, fields=("image", "camera", "points", "surface", "mesh")))
        print(f"packed in {time.perf_counter() - start:.1f} s")
    rows = []
    for kind, arguments in KINDS.items():
        readers: dict[str, Callable[[], Any]] = {
            "store": lambda given=arguments: Shapes(store, "train", **given),
            "store, unverified": lambda given=arguments: Shapes(store, "train", verify=False, **given),
            "files": lambda given=arguments: ShapeNet(data, "train", image_size=options.image_size, **given),
        }
        for reader, open_data in readers.items():
            for workers in options.workers:
                rows.append(measure(kind, reader, open_data(), workers, options))
                print(format_row(rows[-1]), flush=True)
    with atomic_write(options.out / "loader.jsonl") as file:
        for row in rows:
            entry = {"date": date.today().isoformat(), **environment(), **asdict(row)}
            file.write(json.dumps(entry).encode() + b"\n")
    print("\n".join(table(rows)))
    return 0


def measure(kind: str, reader: str, dataset: Any, workers: int, options: argparse.Namespace) -> Row:
    """Epochs of a shuffled loader, batches joined as for training, until the time is up."""
    size = min(options.batch_size, len(dataset))
    sampler = ShuffleSampler(len(dataset), 0, size)
    batches = iter(make_loader(Data(dataset, size, collate, workers), sampler))
    rates, cpu_rates, memory = [], [], []
    begun = time.perf_counter()
    for _ in range(options.epochs):
        start, cpu = time.perf_counter(), processor_seconds()
        for _ in range(sampler.batches_per_epoch):
            next(batches)
        count = sampler.batches_per_epoch * size
        rates.append(count / (time.perf_counter() - start))
        cpu_rates.append(count / (processor_seconds() - cpu))
        memory.append(round(private_mebibytes(), 1))
        if time.perf_counter() - begun > options.seconds:
            break
    later = sorted(rates[1:] or rates)
    cpu_later = sorted(cpu_rates[1:] or cpu_rates)
    return Row(
        kind,
        reader,
        workers,
        round(rates[0], 1),
        round(later[len(later) // 2], 1),
        None if workers else round(cpu_later[len(cpu_later) // 2], 1),
        memory,
        sampler.batches_per_epoch * size,
    )


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def private_mebibytes() -> float:
    """What this process and its workers hold for themselves: shared pages of the store are not in it."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes) / 2**20


def format_row(row: Row) -> str:
    cpu = "-" if row.cpu is None else f"{row.cpu:,.0f}"
    return (
        f"| {row.item} | {row.reader} | {row.workers} | {row.first:,.0f} | {row.later:,.0f} | {cpu} | "
        f"{row.memory[0]:,.0f} to {row.memory[-1]:,.0f} ({len(row.memory)} epochs of {row.items}) |"
    )


def table(rows: Sequence[Row]) -> list[str]:
    head = "| item | reader | workers | items/s, first epoch | later | per second of processor | private MiB |"
    return [head, "|---|---|---|---|---|---|---|", *map(format_row, rows)]


def make(root: Path, models: int, views: int, points: int) -> Path:
    """Models of ShapeNet's size without its shapes: dented spheres of 2,562 vertices, noise as pictures."""
    if (root / "done").exists():
        return root
    rng = np.random.default_rng(0)
    sphere = ico_sphere(4)
    for number in range(models):
        name = f"{number:032x}"
        folders = {
            piece: root / folder / SYNSET / name / inside
            for piece, folder, inside in (
                ("core", "ShapeNetCore.v2", "models"),
                ("samples", "ShapeNet", ""),
                ("voxels", "ShapeNetVox32", ""),
                ("rendering", "ShapeNetRendering", "rendering"),
            )
        }
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        verts = sphere.verts_packed() * torch.from_numpy(0.4 + 0.1 * rng.random((2562, 1))).float()
        save_obj(folders["core"] / "model_normalized.obj", verts, sphere.faces_packed())
        where = {"loc": np.zeros(3), "scale": np.array(1.0)}
        places = ((rng.random((points, 3)) - 0.5) * 1.1).astype(np.float16)
        inside = np.packbits(np.linalg.norm(places.astype(np.float32), axis=1) < 0.45)
        save_npz(folders["samples"] / "points.npz", points=places, occupancies=inside, **where)
        save_npz(folders["samples"] / "pointcloud.npz", points=places, normals=places, **where)
        write_binvox(folders["voxels"] / "model.binvox", torch.from_numpy(rng.random((32, 32, 32)) > 0.5))
        for view in range(views):
            picture = np.zeros((137, 137, 4), np.uint8)
            picture[30:100, 30:100, 3] = 255
            picture[30:100, 30:100, :3] = rng.integers(0, 255, (7, 7, 3)).repeat(10, 0).repeat(10, 1)
            write_png(folders["rendering"] / f"{view:02d}.png", picture)
        names = "".join(f"{view:02d}.png\n" for view in range(views))
        (folders["rendering"] / "renderings.txt").write_text(names)
        (folders["rendering"] / "rendering_metadata.txt").write_text("30.5 27 0 0.8 25\n" * views)
    (root / "done").touch()
    return root
