"""How many models a second are prepared: every step, 100,000 + 100,000 points, 32^3 voxels, 24 views of 137 x 137.

Generated shapes, their faces divided until there are about 10,000, whole and with 2 % of the faces missing, in
ShapeNet's layout, prepared by `vision3dgen prepare shapenet` with two workers, and with Ray where it is installed,
whose bytes must be the same. Wall time, the start of the processes included. Leaves table.md. Exit code 1 if bytes
differ.
"""

import argparse
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from kills import COMMAND, hashes

from vision3dgen.datasets import damage, make_shape
from vision3dgen.datasets.objects import CATEGORIES
from vision3dgen.files import atomic_write
from vision3dgen.io import save_mesh
from vision3dgen.ops import SubdivideMeshes
from vision3dgen.structures import Meshes

FACES = 10_000
SHAPENET = 51_300  # models of ShapeNetCore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=int, default=26, help="of each kind (default: 26)")
    parser.add_argument("--workers", type=int, default=2)


def run(options: argparse.Namespace) -> int:
    lines = [
        "| meshes | faces, mean | models | workers | s | models / s | CPU s a model | ShapeNetCore, hours | as local |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    same = True
    for kind, share in (("whole", 0.0), ("2 % of faces missing", 0.02)):
        raw = options.out / kind.split()[0]
        faces = write_models(raw, options.models, share)
        local = options.out / f"{raw.name}_local"
        ways = {f"{options.workers}": (local, ["--workers", str(options.workers)])}
        if importlib.util.find_spec("ray") is not None:
            ways["4, Ray"] = (options.out / f"{raw.name}_ray", ["--engine", "ray", "--workers", "4"])
        for name, (out, more) in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            began, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*COMMAND, str(raw), str(out), *more], env=surroundings, check=False)
            seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
            each = f"{spent / options.models:.1f}" if "Ray" not in name else "-"  # its workers are not ours to count
            equal = hashes(out) == hashes(local)
            same = same and equal and done.returncode in (0, 1)
            rate = options.models / seconds
            lines.append(
                f"| {kind} | {faces:,.0f} | {options.models} | {name} | {seconds:.0f} | {rate:.2f} | "
                f"{each} | {SHAPENET / rate / 3600:.0f} | {'yes' if equal else 'NO'} |"
            )
            print(lines[-1], flush=True)
    with atomic_write(options.out / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    return 0 if same else 1


def write_models(folder: Path, count: int, share: float) -> float:
    """OBJ files of shapes with about FACES faces; returns the mean."""
    synsets, total = list(CATEGORIES.items()), 0
    for number in range(count):
        synset, name = synsets[number % len(synsets)]
        shape = make_shape(name, seed=number)
        mesh = Meshes([torch.from_numpy(shape.vertices)], [torch.from_numpy(shape.faces)])
        while len(mesh.faces_packed()) < FACES / 2:
            mesh = SubdivideMeshes()(mesh)
        broken = damage(mesh, "removed", share, generator=torch.Generator().manual_seed(number))
        total += len(broken.faces_packed())
        place = folder / synset / f"{number:032x}"
        place.mkdir(parents=True, exist_ok=True)
        save_mesh(place / "model.obj", broken)
    return total / count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
