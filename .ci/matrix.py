"""The tests under several Pythons and versions of what the library stands on. One table.

    python .ci/matrix.py --out runs/matrix --pythons python3.11 python3.13 --versions oldest pinned newest
    python .ci/matrix.py --out runs/matrix --versions pinned --tests tests/test_io.py

"pinned" installs what constraints.txt says, "newest" the newest releases that pyproject.toml accepts, "oldest" the
least version of each package that it names. Each pair has an environment of its own under OUT, which is kept; what pip
and pytest said is in OUT/NAME.log. Leaves table.md. Exit code 1 if a pair could not be installed or a test failed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("oldest", "pinned", "newest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="commands (default: this one)")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest is given (default: all)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["| Python | versions | torch | installed | tests |", "|---|---|---|---|---|"]
    sound = True
    for python in options.pythons:
        for versions in options.versions:
            line, fine = tried(python, versions, options.tests, options.out.resolve())
            lines.append(line)
            sound = sound and fine
            print(line, flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    return 0 if sound else 1


def tried(python: str, versions: str, tests: list[str], out: Path) -> tuple[str, bool]:
    """Install and test one pair; its line of the table, and whether all went well."""
    if shutil.which(python) is None:
        return f"| {python} | {versions} | - | no such command | - |", False
    number = said([python, "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))"])
    name = f"{number}-{versions}"
    folder, log = out / name, out / f"{name}.log"
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = str(folder / "bin" / "python")
    wanted = out / f"{name}.txt"
    wanted.write_text(constraints(versions))
    # The checkout is found by its path, so that no environment changes what another has installed of it.
    install = [own, "-m", "pip", "install", "--quiet", "--constraint", str(wanted), *requirements()]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        log.write_text(done.stderr)
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "see the log")
        return f"| {number} | {versions} | - | {reason.replace('|', '/')} | - |", False
    torch = said([own, "-c", "import torch; print(torch.__version__)"])
    run = subprocess.run(
        [own, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    log.write_text(run.stdout + run.stderr)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", run.stdout)
    outcome = ", ".join(counts) or f"pytest ended with {run.returncode}"
    return f"| {number} | {versions} | {torch} | yes | {outcome} |", run.returncode == 0


def requirements() -> list[str]:
    """What pyproject.toml asks for: the library's own and those of its extras viz and dev."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["viz"], *extras["dev"]]


def constraints(versions: str) -> str:
    """The lines of a constraints file."""
    if versions == "pinned":
        return (ROOT / "constraints.txt").read_text()
    if versions == "newest":
        return ""
    least = [re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", line) for line in requirements()]
    return "".join(f"{found[1]}=={found[2]}\n" for found in least if found)


def said(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
