"""docs/extending.md: the head of its script trains, is scored, and can be named in a configuration."""

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from vision3dgen.experiment import build_parts
from vision3dgen.heads import HEADS
from vision3dgen.models import MODELS, SingleView

ROOT = Path(__file__).parents[1]


def script() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    return block


@pytest.mark.slow
def test_the_script_trains_a_head_and_scores_it(tmp_path):
    path = tmp_path / "ellipsoids.py"
    path.write_text(script())
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    rows = {cells[0]: cells[1:] for cells in table}
    means = dict(zip(rows["class"], rows["**class mean**"]))
    assert float(means["IoU (voxels 32)"]) > 0.1
    assert float(means["F1@0.05"]) > 0
    assert "n_failed 0" in done.stdout


def test_the_script_is_as_short_as_its_title_says():
    lines = [line for line in script().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 40
    assert max(len(line) for line in lines) <= 120


def test_the_head_is_known_by_name_once_it_is_in_the_table():
    scope: dict = {"__name__": "ellipsoids"}
    exec(script(), scope)
    node = yaml.safe_load("{name: single_view, backbone: {name: resnet18}, head: {name: ellipsoid}}")
    with mock.patch.dict(HEADS, ellipsoid=scope["EllipsoidHead"]):
        model = build_parts(node, MODELS)
    assert isinstance(model, SingleView)
    batch = {"image": torch.rand(2, 3, 32, 32), "points": torch.rand(2, 17, 3) - 0.5, "occupancies": torch.ones(2, 17)}
    assert float(model.loss(batch)["loss"].detach()) > 0
