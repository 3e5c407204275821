"""Looking at shapes: Open3D's window where there is a display, pictures and PLY files where there is none."""

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vision3dgen.io import save_mesh, save_pointcloud
from vision3dgen.structures import Pointclouds
from vision3dgen.viz import offscreen
from vision3dgen.viz.gallery import reconstruction_gallery
from vision3dgen.viz.offscreen import OffscreenError
from vision3dgen.viz.scene import (
    PALETTE,
    TRUTH_COLOR,
    Job,
    Sample,
    Shape,
    _shapes,
    _triangles,
    colored_by_distance,
    distance_to_surface,
    render,
    turntable,
)

_log = logging.getLogger(__name__)


class Shown(NamedTuple):
    """Where the shapes can be seen: in a window, or in these files."""

    window: bool
    files: list[Path]

    def __str__(self) -> str:
        return "shown in a window" if self.window else "\n".join(map(str, self.files))


def has_display() -> bool:
    """Whether a window could be opened here."""
    return sys.platform in ("win32", "darwin") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))


def show(
    shapes: Any,
    folder: str | os.PathLike[str] = "view",
    *,
    block: bool | None = None,
    turntables: bool = False,
    renderer: str = "auto",
) -> Shown:
    """Show shapes or samples in Open3D's window; without a display, or without Open3D, write them to `folder`.

    shapes: what `render` takes, or one `Sample` or a list of them, predictions left and truth right. Keys: n and p for
    the next and the previous sample, h for the next head, e for colors of the distance to the truth, q to close. The
    window lives in its own process; `block` waits until it is closed, by default only at a terminal. In `folder`: one
    picture, a PLY per shape in the file's own coordinates, and with `turntables` a GIF per shape.
    """
    samples = [shapes] if isinstance(shapes, Sample) else list(shapes) if _are_samples(shapes) else None
    if samples is None:
        panels = _shapes(shapes)
        named = {f"shape {i}" if len(panels) > 1 else "shape": shape for i, shape in enumerate(panels)}
    if has_display():
        try:
            _open(samples if samples is not None else [Sample(predictions=named)], block)
            return Shown(True, [])
        except OffscreenError as error:
            _log.warning("no window, pictures instead: %s", error)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "shapes.png"
    if samples is None:
        render(shapes, picture, renderer=renderer)
        files = [picture, *_export(folder, "", named, turntables, renderer)]
    else:
        reconstruction_gallery(samples, picture, renderer=renderer)
        files = [picture]
        for index, sample in enumerate(samples):
            stem = f"{index:03d}_" + (sample.title.replace("/", "_") + "_" if sample.title else "")
            files += _export(folder, stem, sample.shapes(), turntables, renderer)
    _log.info("no display: %d files in %s", len(files), folder)
    return Shown(False, files)


def _are_samples(shapes: Any) -> bool:
    return isinstance(shapes, Sequence) and len(shapes) > 0 and all(isinstance(entry, Sample) for entry in shapes)


def _export(folder: Path, stem: str, shapes: dict[str, Shape | None], turntables: bool, renderer: str) -> list[Path]:
    written = []
    for index, (name, shape) in enumerate(shapes.items()):
        drawn = Job(shape).drawn
        if drawn is None:
            continue
        path = folder / f"{stem}{name.replace(' ', '_').replace('/', '_')}.ply"
        (save_pointcloud if isinstance(drawn, Pointclouds) else save_mesh)(path, drawn)
        written.append(path)
        if turntables:
            color = TRUTH_COLOR if name == "truth" else PALETTE[index % len(PALETTE)]
            turntable(shape, path.with_suffix(".gif"), color=color, renderer=renderer)
            written.append(path.with_suffix(".gif"))
    return written


def describe(samples: Sequence[Sample]) -> tuple[list[offscreen.Triangles], list[dict[str, Any]]]:
    """What the window's process is given: triangle sets, and for each sample which of them its shapes are drawn with.

    A head with a truth has a second set, whose colors are its distance to the truth, on one scale for all heads.
    """
    triangles: list[offscreen.Triangles] = []
    described = []
    for sample in samples:
        shapes, heads = sample.shapes(), list(sample.predictions)
        drawn = {name: Job(shape).drawn for name, shape in shapes.items()}
        truth = drawn.get("truth")
        distances = {
            name: distance_to_surface(shape, truth)
            for name, shape in drawn.items()
            if name != "truth" and shape is not None and truth is not None
        }
        largest = max((float(torch.quantile(d[:: len(d) // 100_000 + 1], 0.9)) for d in distances.values()), default=0)
        entries: list[dict[str, Any]] = []
        extent = 0.0
        for name, shape in drawn.items():
            entry: dict[str, Any] = {"name": name, "mesh": None}
            if shape is not None:
                color = TRUTH_COLOR if name == "truth" else PALETTE[heads.index(name) % len(PALETTE)]
                entry["mesh"] = len(triangles)
                triangles.append(_triangles(shape, color))
                extent = max(extent, float(np.hypot(*np.ptp(triangles[-1].corners, axis=(0, 1))[[0, 2]])))
                if name in distances and truth is not None:
                    entry["error"] = len(triangles)
                    triangles.append(_triangles(colored_by_distance(shape, truth, largest or 1.0), color))
            entries.append(entry)
        place = [entry for entry in entries if entry["name"] == "truth"] if heads else []
        described.append(
            {
                "title": sample.title,
                "heads": [entry for entry in entries if entry not in place],
                "truth": place[0] if place else None,
                "width": extent,
                "front": sample.eye,
                "up": sample.up,
            }
        )
    return triangles, described


def _open(samples: Sequence[Sample], block: bool | None) -> None:
    """Start the window's process and wait until the window is there, and with `block` until it is closed."""
    block = sys.stdout.isatty() if block is None else block
    folder = Path(tempfile.mkdtemp(prefix="vision3dgen-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    triangles, described = describe(samples)
    arrays = {f"{field}_{i}": value for i, t in enumerate(triangles) for field, value in t._asdict().items()}
    np.savez(folder / "job.npz", **arrays)
    (folder / "window.json").write_text(json.dumps(described), encoding="utf-8")
    child = offscreen.start("window", folder, display=True)
    while child.poll() is None and not (folder / "open").exists():
        time.sleep(0.05)
    if block or child.poll() is not None:
        child.wait()
        offscreen.check_ended(child, folder, 0)
