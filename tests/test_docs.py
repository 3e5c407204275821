"""The Python of README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_readme_example_runs(tmp_path):
    (block,) = python_blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 17
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chair.glb").stat().st_size > 1000
    f1, ceiling, loss = (float(word) for word in done.stdout.split())
    assert 0 < f1 < ceiling <= 1
    assert loss > 0


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_test_file_named_in_the_coverage_table_exists():
    text = (ROOT / "docs" / "coverage.md").read_text()
    named = set(re.findall(r"test_\w+\.py", text))
    assert named
    missing = sorted(name for name in named if not (ROOT / "tests" / name).exists())
    assert not missing
