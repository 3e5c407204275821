"""Optional packages absent, or present and broken: everything imports, and what needs one says how to get it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vision3dgen.doctor import environment
from vision3dgen.ops import backends

PACKAGES = (
    "h5py", "huggingface_hub", "imageio_ffmpeg", "matplotlib", "open3d", "plotly", "pytorch3d", "ray", "tensorboard",
    "torchvision", "triton",
)  # fmt: skip
NEEDING = ["vision3dgen." + name for name in ("__main__", "cluster", "ops.kernels", "sweep.ray_tune")]  # of them
USES = {  # what needs a package, and the pip line of its error
    "h5py": ("from vision3dgen.datasets.depth import _open; _open(Path('a.mat'))", "vision3dgen[depth]"),
    "huggingface_hub": ("from vision3dgen.pretrained import _hub; _hub()", "vision3dgen[hub]"),
    "imageio_ffmpeg": (
        "from vision3dgen.viz import write_film; write_film('a.mp4', [np.zeros((4, 4, 3), np.uint8)])",
        "vision3dgen[video]",
    ),
    "matplotlib": ("from vision3dgen.viz import figure_of; figure_of(1)", "vision3dgen[viz]"),
    "open3d, simplifying": (
        "from vision3dgen.ops import ico_sphere, simplify_mesh; simplify_mesh(ico_sphere(1), 20)",
        "vision3dgen[viz]",
    ),
    "open3d, drawing": (
        "from vision3dgen.ops import ico_sphere; from vision3dgen.viz import render; "
        "render(ico_sphere(0), size=(8, 8), renderer='open3d')",
        "vision3dgen[viz]",
    ),
    "open3d, views": (
        "from vision3dgen.ops import ico_sphere; from vision3dgen.ops.render import raycast; "
        "from vision3dgen.structures import Camera; "
        "raycast(ico_sphere(0), Camera.look_at((0, 0, 3.0), field_of_view=40, image_size=(8, 8)), renderer='open3d')",
        "vision3dgen[viz]",
    ),
    "plotly": ("from vision3dgen.viz.report.page import write_page; write_page('a.html', [])", "vision3dgen[viz]"),
    "pytorch3d": (
        "from vision3dgen.ops import knn_points; knn_points(*torch.rand(2, 1, 4, 3), backend='pytorch3d')",
        "vision3dgen[pytorch3d]",
    ),
    "ray, preparing": (
        "from vision3dgen.parallel import Ray; list(Ray(None, 1).run(abs, [1]))",
        "vision3dgen[cluster]",
    ),
    "tensorboard": (
        "from vision3dgen.engine.log import Log\nwith Log(Path('.'), 0, 1, tensorboard=True): pass",
        "vision3dgen[viz]",
    ),
    "torchvision": (
        "from vision3dgen.ops import nms; nms(torch.rand(2, 4), torch.rand(2), 0.5, backend='torchvision')",
        "pip install torchvision",
    ),
}
SCRIPT = """
import contextlib, importlib, io, json, os, pkgutil, sys, traceback
from pathlib import Path
kind, folder, packages, needing, uses = json.loads(sys.argv[1])
os.chdir(folder)
if kind == "absent":
    sys.modules.update(dict.fromkeys(packages))
import numpy as np
import torch
import vision3dgen
found = {}
for module in pkgutil.walk_packages(vision3dgen.__path__, "vision3dgen."):
    if module.name not in needing:
        importlib.import_module(module.name)
for name, code in uses.items():
    try:
        exec(code)
        found[name] = "no error"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print("FOUND" + json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["absent", "broken"])
def test_everything_imports_and_errors_name_the_extra(kind, tmp_path):
    fakes = tmp_path / "fakes"
    if kind == "broken":
        for name in PACKAGES:
            (fakes / name).mkdir(parents=True)
            (fakes / name / "__init__.py").write_text(
                "raise ImportError('libnothing.so.1: cannot open shared object')\n"
            )
    given = json.dumps([kind, str(tmp_path), PACKAGES, NEEDING, {name: code for name, (code, _) in USES.items()}])
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, given],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(fakes), str(root)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    for name, (_, line) in USES.items():
        assert line in found[name], (name, found[name])
        assert found[name].startswith(("ImportError", "OffscreenError")), (name, found[name])


def test_a_broken_triton_says_how_to_be_mended(monkeypatch):
    """On CUDA only; no silent change to slower operators, and the doctor names it."""
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(environment, "HAS_TRITON", True)
    monkeypatch.setitem(sys.modules, "triton", None)
    backends.import_triton.cache_clear()
    assert backends.triton_runs_on("cpu") is False
    with pytest.raises(ImportError, match="pip install --force-reinstall triton, or pip uninstall triton"):
        backends.triton_runs_on("cuda")
    (finding,) = environment.check_triton()
    assert finding.verdict == "fail"
    assert "does not import" in finding.message
    assert finding.fix is not None
    assert finding.fix.startswith("pip install --force-reinstall triton")
