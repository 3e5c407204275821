"""Does preparation survive kills? SIGKILL of a worker and of the parent at random instants, until the work is done.

A folder of damaged generated shapes in ShapeNet's layout is prepared once undisturbed, then again and again, each time
killed: the parent alone, whose workers must end with it, or one worker, whose model another one must make. Each time
the same command is started again until it ends by itself (with --again, which tries models once more that were given
up when their worker died), and every file is compared with the undisturbed one. Leaves table.md. Exit code 1 if a file
differs, is missing or is left over, or if a worker outlives its parent.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from vision3dgen.datasets import DAMAGES, damage, make_shape
from vision3dgen.datasets.objects import CATEGORIES
from vision3dgen.files import atomic_write
from vision3dgen.io import save_mesh
from vision3dgen.structures import Meshes

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from vision3dgen.cli import main; sys.exit(main())",
    "prepare",
    "shapenet",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20, help="half of the parent, half of a worker (default: 20)")
    parser.add_argument("--models", type=int, default=12, help="in the folder (default: 12)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    raw, whole, work = (options.out / name for name in ("raw", "undisturbed", "killed"))
    if not raw.is_dir():
        write_models(raw, options.models)
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    ended = start(raw, whole).wait()
    seconds, expected = time.monotonic() - began, hashes(whole)
    print(f"undisturbed: exit code {ended}, {seconds:.1f} s, {len(expected)} files", flush=True)
    draw = random.Random(options.seed)
    lines = ["| killed | kills | works | files that differ | missing | left over | workers that went on |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    sound = ended in (0, 1)
    for whom in ("parent", "worker"):
        kills = works = 0
        bad = [0, 0, 0, 0]
        while kills < options.kills // 2:
            shutil.rmtree(work, ignore_errors=True)
            works += 1
            for _ in range(2):
                landed, orphans = killed(raw, work, whom, draw.uniform(0.2, 1.0) * seconds)
                kills, bad[3] = kills + landed, bad[3] + orphans
            start(raw, work, "--again").wait()
            found = hashes(work)
            bad[0] += sum(found[name] != expected[name] for name in found.keys() & expected.keys())
            bad[1] += len(expected.keys() - found.keys())
            bad[2] += len(found.keys() - expected.keys())
        lines.append(f"| {whom} | {kills} | {works} | {bad[0]} | {bad[1]} | {bad[2]} | {bad[3]} |")
        print(lines[-1], flush=True)
        sound = sound and not any(bad)
    with atomic_write(options.out / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    return 0 if sound else 1


def write_models(folder: Path, count: int) -> None:
    """OBJ files of broken shapes, as ShapeNetCore.v1 has them."""
    synsets = list(CATEGORIES.items())
    for number in range(count):
        synset, name = synsets[number % len(synsets)]
        shape = make_shape(name, seed=number)
        mesh = Meshes([torch.from_numpy(shape.vertices)], [torch.from_numpy(shape.faces)])
        broken = damage(mesh, DAMAGES[number % len(DAMAGES)], 0.02, generator=torch.Generator().manual_seed(number))
        place = folder / synset / f"{number:032x}"
        place.mkdir(parents=True)
        save_mesh(place / "model.obj", broken)


def start(raw: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [*COMMAND, str(raw), str(out), "--workers", "2", "--views", "4", "--points", "20000", *more]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(raw: Path, out: Path, whom: str, after: float) -> tuple[int, int]:
    """Kills that met the work while it ran, 1 or 0, and workers that outlived their parent by five seconds."""
    parent = start(raw, out)
    try:
        parent.wait(after)
    except subprocess.TimeoutExpired:
        pass
    else:
        return 0, 0
    below = children(parent.pid)
    if whom == "worker":
        if not below:
            parent.wait()
            return 0, 0
        os.kill(random.Random(after).choice(below), signal.SIGKILL)
        parent.wait()
        return 1, 0
    parent.kill()
    parent.wait()
    time.sleep(5)
    return 1, sum(Path(f"/proc/{pid}").exists() for pid in below)


def children(pid: int) -> list[int]:
    """Processes that work for another (Linux), the keeper of shared names left out."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            words = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"resource_tracker" not in words:
                found.append(child)
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Every file but hidden ones, which are leftovers of a kill."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
