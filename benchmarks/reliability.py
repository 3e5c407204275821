"""What the library survives: kills at random instants, files that are not what they say. Two tables.

    python benchmarks/reliability.py --out runs/reliability --kills 100 --files 2000

Kills: training, evaluation, preparation, a report, and a sweep where Ray is installed, each in processes of its own
that are killed (SIGKILL, all of a group) at a random instant of the time that an undisturbed run takes, up to three
times, and then left to end. "lost" counts works whose result is not the undisturbed one's, byte for byte but for the
clock's entries; "half-written" counts files that a kill left under their final name and that cannot be read.

Files: every reader of tests/readers.py on valid files that are damaged at random, and on headers that promise 10^12
numbers; "crashed" counts what is neither read nor refused with a reason that names the file.

Leaves table.md and the folders of works whose result was lost. Exit code 1 if anything was lost, half-written or
crashed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from tests.readers import READERS, attempt
from vision3dgen.engine import checkpoint
from vision3dgen.files import atomic_write, read_jsonl
from vision3dgen.io import load_npz

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "import sys; from vision3dgen.cli import main; sys.exit(main())"]
CLOCK = ("seconds", "samples_per_second", "date", "time")  # entries that no two runs have in common
TRAIN = [
    "prepare=null", "trainer.steps=40", "trainer.record.checkpoint_every=5", "trainer.validation.every=10",
    "loader.batch_size=4",
]  # fmt: skip
SPACE = "trainer.optimizer.lr: {log_uniform: [1e-4, 1e-2]}\n"


class Work(NamedTuple):
    """A command that is killed, in a folder that starts as a copy of `start`; `makes` is what counts."""

    command: list[str]
    start: str  # below the folder of the campaign
    makes: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--files", type=int, default=2000, help="damaged files for each reader (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--works", nargs="+", metavar="NAME", help="kill these only (default: all)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text, sound = "", True
    for table, fine in (kill_table(options), file_table(options)):
        text, sound = text + table + "\n", sound and fine
    with atomic_write(options.out / "table.md") as file:
        file.write(text.encode())
    return 0 if sound else 1


# ---------------------------------------------------------------------------------------------------------- kills


def works(folder: Path) -> dict[str, Work]:
    """The works, and what each starts from, made where it is not yet."""
    data, config = folder / "data", str(ROOT / "configs" / "single_view_voxels.yaml")
    train = ["train", config, "--preset", "tiny", "--out", "run", "--resume", *TRAIN, f"data.root={data}"]
    shapes = ["--shapes-per-category", "10", "--categories", "chair", "table", "--views", "2", "--points", "10000"]
    (folder / "nothing").mkdir(exist_ok=True)
    call(["prepare", "procedural", str(data), *shapes], folder)
    for start, before, command in (
        ("trained", "nothing", train),
        ("scored", "trained", ["evaluate", "run", "--device", "cpu"]),
    ):
        if not (folder / start).exists():
            shutil.copytree(folder / before, folder / f".{start}")
            call(command, folder / f".{start}")
            (folder / f".{start}").rename(folder / start)
    few = ["--shapes-per-category", "4", *shapes[2:], "--workers", "2"]
    found = {
        "train": Work(train, "nothing", "run"),
        "evaluate": Work(["evaluate", "run", "--device", "cpu", "--workers", "1"], "trained", "run/evaluation"),
        "prepare": Work(["prepare", "procedural", "data", *few], "nothing", "data"),
        "report": Work(["report", "run", "--items", "2"], "scored", "run/report.html"),
    }
    if importlib.util.find_spec("ray") is not None:
        (folder / "nothing" / "space.yaml").write_text(SPACE)
        sweep = ["sweep", config, "--preset", "tiny", "--space", "space.yaml", "--trials", "2", "--out", "run"]
        sweep += [*TRAIN, f"data.root={data}"]
        found["sweep"] = Work(sweep, "nothing", "run")
    return found


def call(command: list[str], folder: Path) -> None:
    """Run a command of vision3dgen to its end."""
    done = subprocess.run([*COMMAND, *command], cwd=folder, env=surroundings(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {folder} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def surroundings() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def kill_table(options: argparse.Namespace) -> tuple[str, bool]:
    folder = (options.out / "kills").resolve()
    folder.mkdir(exist_ok=True)
    draw, sound = random.Random(options.seed), True
    lines = [
        "| work | seconds | kills | before its first file | works | half-written | lost |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    todo = works(folder)
    if unknown := set(options.works or ()) - set(todo):
        sys.exit(f"unknown works {', '.join(sorted(unknown))}; choose from {', '.join(todo)}")
    todo = {name: work for name, work in todo.items() if options.works is None or name in options.works}
    for name, work in todo.items():
        undisturbed = folder / f"{name}_undisturbed"
        shutil.rmtree(undisturbed, ignore_errors=True)
        shutil.copytree(folder / work.start, undisturbed)
        began = time.monotonic()
        call(work.command, undisturbed)
        seconds, expected = time.monotonic() - began, content(undisturbed / work.makes)
        kills = early = broken = lost = number = 0
        while kills < options.kills // len(todo):
            number += 1
            place = folder / f"{name}_{number}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / work.start, place)
            for _ in range(min(3, options.kills // len(todo) - kills)):
                before = content(place / work.makes)
                if not killed(work.command, place, draw.uniform(0, seconds)):
                    break  # it was faster this time
                kills += 1
                early += content(place / work.makes) == before
                broken += len(unreadable(place))
            call(work.command, place)
            if content(place / work.makes) == expected:
                shutil.rmtree(place)
            else:
                lost += 1
        lines.append(f"| {name} | {seconds:.1f} | {kills} | {early} | {number} | {broken} | {lost} |")
        print(lines[-1], flush=True)
        sound = sound and not broken and not lost
    return "\n".join(lines) + "\n", sound


def killed(command: list[str], folder: Path, after: float) -> bool:
    """Start a command and kill it with all its processes after so many seconds; False if it had ended by then."""
    process = subprocess.Popen(
        [*COMMAND, *command], cwd=folder, env=surroundings(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def content(path: Path) -> dict[str, str]:
    """A hash of every file, without what the clock wrote; hidden ones are leftovers, those in `ray` are Ray's own."""
    if path.is_file():
        return {path.name: digest(path)}
    return {str(file.relative_to(path)): digest(file) for file in files_of(path)}


def files_of(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and "ray" not in parts and not any(part.startswith(".") for part in parts):
            yield file


def digest(path: Path) -> str:
    if path.name == "environment.json":
        return ""  # the command that was resumed is another
    if path.suffix == ".pt":  # its seconds are not another's
        state = torch.load(path, weights_only=True)
        return spelled({key: value for key, value in state.items() if key not in CLOCK})
    data = path.read_bytes()
    if path.name == "meta.json":
        entries = json.loads(data)
        entries["files"].pop("state.pt")
        data = json.dumps(entries).encode()
    if path.suffix == ".html":
        data = re.sub(rb"read [0-9: -]+ UTC", b"", data)
    if path.suffix == ".jsonl":
        data = json.dumps([without_clock(entry) for entry in read_jsonl(path)]).encode()
    return hashlib.sha256(data).hexdigest()


def spelled(value: Any) -> str:
    """Every number of a training state: str of a long tensor leaves out its middle."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().contiguous().flatten()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(dense.view(torch.uint8).numpy()).hexdigest()}"
    if isinstance(value, dict):
        return str(sorted((str(key), spelled(own)) for key, own in value.items()))
    return str([spelled(own) for own in value]) if isinstance(value, list | tuple) else repr(value)


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(own) for key, own in value.items() if key not in CLOCK}
    return value


CHECKS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".npz": load_npz,
    ".png": lambda path: Image.open(path).load(),  # of any depth
    ".html": lambda path: path.read_text().rstrip().endswith("</html>") or 1 / 0,
}


def unreadable(folder: Path) -> list[Path]:
    """Files under their final names that are not whole."""
    found = []
    for path in files_of(folder):
        try:
            if path.name == "meta.json":
                checkpoint.verify(path.parent)
            elif path.suffix in CHECKS:
                CHECKS[path.suffix](path)
        except Exception as error:
            print(f"half-written: {path}: {error}", flush=True)
            found.append(path)
    return found


# ---------------------------------------------------------------------------------------------------------- files


def file_table(options: argparse.Namespace) -> tuple[str, bool]:
    draw, sound = random.Random(options.seed), True
    lines = ["| reader | files | read | refused | crashed |", "|---|--:|--:|--:|--:|"]
    warnings.simplefilter("ignore")
    for name, reader in READERS.items():
        samples, counts = reader.samples(), {"read": 0, "refused": 0, "crashed": 0}
        tries = [*reader.claims, *(damaged(draw.choice(samples), draw) for _ in range(options.files))]
        with tempfile.TemporaryDirectory() as folder:
            for data in tries:
                try:
                    counts[attempt(reader, data, Path(folder))] += 1
                except Exception as error:
                    counts["crashed"] += 1
                    kept = options.out / "crashed" / name.replace(" ", "_")
                    kept.mkdir(parents=True, exist_ok=True)
                    (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
                    print(f"crashed: {name}: {error!r}", flush=True)
        lines.append(f"| {name} | {len(tries)} | {counts['read']} | {counts['refused']} | {counts['crashed']} |")
        print(lines[-1], flush=True)
        sound = sound and not counts["crashed"]
    return "\n".join(lines) + "\n", sound


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated or with other numbers, up to four times."""
    content = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(content))
        kind = draw.randrange(5)
        if kind == 0:
            del content[at:]
        elif kind == 1 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            content[at : at + draw.randint(0, 8)] = draw.randbytes(draw.randint(1, 8))
        elif kind == 3:
            content[at:at] = content[at : at + draw.randint(1, 64)]
        elif digits := [i for i, byte in enumerate(content) if 48 <= byte < 58]:
            place = draw.choice(digits)
            content[place : place + 1] = draw.choice([b"-1", b"99999999999999999999", b"nan", b"1e999", b"0"])
    return bytes(content)


if __name__ == "__main__":
    sys.exit(main())
