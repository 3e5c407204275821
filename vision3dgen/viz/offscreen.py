"""Open3D in a process of its own: pictures without a display, and windows.

Open3D can crash the whole process when its graphics libraries do not fit the machine, or when it meets torch's. Here
that ends a child, and becomes an OffscreenError that says how. The child runs this file and loads NumPy and Open3D
alone. One child draws many pictures, so the renderer is started once.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class OffscreenError(RuntimeError):
    """Open3D could not draw: it is not installed, it failed, it was killed, or it took too long."""


class Triangles(NamedTuple):
    """Triangles that share no corners: colors and normals may jump at every edge."""

    corners: np.ndarray  # (F, 3, 3) float32
    normals: np.ndarray  # (F, 3, 3) float32, at each corner
    colors: np.ndarray  # (F, 3, 3) float32 in [0, 1], at each corner


class Picture(NamedTuple):
    triangles: int  # which of the triangle sets
    intrinsic: np.ndarray  # (3, 3) pixels, centers at integers
    extrinsic: np.ndarray  # (4, 4) world to camera, OpenCV axes


def draw(
    triangles: Sequence[Triangles],
    pictures: Sequence[Picture],
    size: tuple[int, int],
    background: tuple[float, float, float],
    *,
    patience: float = 180.0,
) -> list[np.ndarray]:
    """RGBA pictures (H, W, 4) uint8 by Open3D's offscreen renderer; alpha says where there is a shape.

    The world should be about 1 wide: nearer than 0.1 in front of a camera nothing is drawn. `patience`: seconds
    without a finished picture after which the renderer is taken for hung. Raises OffscreenError.
    """
    if not pictures:
        return []
    with tempfile.TemporaryDirectory(prefix="vision3dgen-") as name:
        folder = Path(name)
        arrays = {f"{field}_{i}": value for i, t in enumerate(triangles) for field, value in t._asdict().items()}
        np.savez(
            folder / "job.npz",
            **arrays,
            which=np.array([p.triangles for p in pictures]),
            intrinsic=np.stack([p.intrinsic for p in pictures]),
            extrinsic=np.stack([p.extrinsic for p in pictures]),
            size=np.array(size),
            background=np.array(background),
        )
        _wait(start("draw", folder), folder, patience, lambda: len(list(folder.glob("[0-9]*.npy"))))
        return [np.load(folder / f"{i}.npy") for i in range(len(pictures))]


def start(task: str, folder: Path, *, display: bool = False) -> subprocess.Popen[bytes]:
    """The child at work on `folder`; what its libraries print goes to `folder/log.txt`."""
    environment = os.environ | ({} if display else {"EGL_PLATFORM": "surfaceless"})
    if not display:  # no window, even where one could be opened
        environment = {k: v for k, v in environment.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    with open(folder / "log.txt", "wb") as log:
        command = [sys.executable, "-P", str(Path(__file__)), task, str(folder)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=None if display else log, stderr=log, env=environment
        )


def _wait(child: subprocess.Popen[bytes], folder: Path, patience: float, progress: Callable[[], int]) -> None:
    done = 0
    try:
        while True:
            try:
                child.wait(patience)
                break
            except subprocess.TimeoutExpired:
                if progress() == done:
                    raise OffscreenError(
                        f"Open3D's renderer finished no picture in {patience:g} s (after {done} pictures)"
                    ) from None
                done = progress()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    check_ended(child, folder, progress())


def check_ended(child: subprocess.Popen[bytes], folder: Path, done: int) -> None:
    """Raise OffscreenError with the signal or the child's last words, unless it ended well."""
    if child.returncode == 0:
        return
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    if child.returncode < 0:
        how = f"was killed by {signal.Signals(-child.returncode).name}"
    else:
        how = f"ended with status {child.returncode}"
    last = f": {lines[-1].strip()}" if lines else ""
    if lines and lines[-1].startswith(("ImportError", "ModuleNotFoundError", "OSError")):
        last += '; give it what it misses, or install it anew: pip install --force-reinstall "vision3dgen[viz]"'
    raise OffscreenError(f"Open3D's renderer {how} after {done} pictures{last}")


# ------------------------------------------------------------------------------------------- inside the child


def _draw(folder: Path) -> None:
    import open3d

    rendering = open3d.visualization.rendering
    with np.load(folder / "job.npz") as job:
        height, width = (int(v) for v in job["size"])
        renderer = rendering.OffscreenRenderer(width, height)
        scene = renderer.scene
        scene.set_background([*job["background"], 1.0])
        scene.view.set_ambient_occlusion(True)
        scene.view.set_shadowing(True, rendering.View.ShadowType.PCF)
        scene.scene.enable_indirect_light(True)
        scene.scene.set_indirect_light_intensity(30_000)
        scene.scene.enable_sun_light(True)
        material = rendering.MaterialRecord()
        material.shader = "defaultLit"
        material.base_roughness = 0.7
        material.base_reflectance = 0.3
        for index, which in enumerate(job["which"]):
            extrinsic = job["extrinsic"][index]
            scene.clear_geometry()
            scene.add_geometry("shape", _mesh(job, which, extrinsic), material)
            # The sun stands above the camera's left shoulder, so that all views are lit alike.
            sun = extrinsic[:3, :3].T @ np.array([0.5, 0.75, 0.6])
            scene.scene.set_sun_light(sun / np.linalg.norm(sun), [1.0, 1.0, 1.0], 65_000)
            renderer.setup_camera(job["intrinsic"][index], extrinsic, width, height)
            color = np.asarray(renderer.render_to_image())
            depth = np.asarray(renderer.render_to_depth_image(z_in_view_space=True))
            alpha = np.where(np.isfinite(depth), 255, 0).astype(np.uint8)
            np.save(folder / "part", np.dstack([color, alpha]))
            os.replace(folder / "part.npy", folder / f"{index}.npy")


def _mesh(job: Any, which: int, extrinsic: np.ndarray | None = None) -> Any:
    """The triangles for a window, or for the shaders of a picture from a known place.

    There they are turned towards the camera, as shapes that were never closed have no outside; their colors are linear.
    """
    import open3d

    corners, normals = job[f"corners_{which}"].astype(np.float64), job[f"normals_{which}"].astype(np.float64)
    colors = job[f"colors_{which}"].astype(np.float64)
    index = np.arange(3 * len(corners), dtype=np.int32).reshape(-1, 3)
    if extrinsic is not None:
        center = -extrinsic[:3, :3].T @ extrinsic[:3, 3]
        facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        away = np.einsum("fc,fc->f", facing, center - corners[:, 0]) < 0
        normals[away] *= -1
        index[away] = index[away][:, ::-1]
        colors = colors**2.2
    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(corners.reshape(-1, 3)), open3d.utility.Vector3iVector(index)
    )
    mesh.vertex_normals = open3d.utility.Vector3dVector(normals.reshape(-1, 3))
    # Without texture coordinates the shader reads garbage ones, and a software renderer filters for minutes; corners
    # at one place with equal ones would be merged, and their normals with them.
    u = np.arange(3 * len(corners)) / (3 * len(corners))
    mesh.triangle_uvs = open3d.utility.Vector2dVector(np.stack([u, np.tile([0.0, 0.0, 1e-3], len(corners))], axis=1))
    mesh.vertex_colors = open3d.utility.Vector3dVector(colors.reshape(-1, 3))
    return mesh


class Walk:
    """Where a reader of the window is: at which sample and head, and what the colors say.

    samples: entries of window.json. Keys: n and p step through samples, h through the heads of one, e turns colors for
    the distance to the truth on and off. A head that a sample lacks is not skipped: it shows as nothing.
    """

    KEYS = "NPHE"

    def __init__(self, samples: Sequence[dict[str, Any]]):
        self.samples, self.at, self.head, self.by_error = samples, 0, 0, False

    def press(self, key: str) -> None:
        if key in "NP":
            self.at = (self.at + (1 if key == "N" else -1)) % len(self.samples)
        elif key == "H":
            self.head = (self.head + 1) % max(len(self.sample["heads"]), 1)
        else:
            self.by_error = not self.by_error

    @property
    def sample(self) -> dict[str, Any]:
        return self.samples[self.at]

    @property
    def shown(self) -> list[dict[str, Any]]:
        """What stands side by side: the head and the truth, or without a truth every shape."""
        heads, truth = self.sample["heads"], self.sample["truth"]
        if truth is None:
            return list(heads)
        return [*heads[self.head % len(heads) :][:1], truth] if heads else [truth]

    def meshes(self) -> list[int | None]:
        """Which triangle set each of `shown` is drawn with."""
        return [entry.get("error" if self.by_error else "mesh", entry["mesh"]) for entry in self.shown]

    @property
    def title(self) -> str:
        names = " | ".join(entry["name"] + (" (empty)" if entry["mesh"] is None else "") for entry in self.shown)
        colored = "    colors: distance to the truth" if self.by_error else ""
        return f"{self.sample['title']}    {names}{colored}"


def _window(folder: Path) -> None:
    """A window on the samples of `window.json`: predictions left, truth right; `open` is written when it is there."""
    import open3d

    walk = Walk(json.loads((folder / "window.json").read_text(encoding="utf-8")))
    with np.load(folder / "job.npz") as job:
        meshes = [_mesh(job, i) for i in range(len(job.files) // len(Triangles._fields))]
    for mesh in meshes:
        mesh.compute_triangle_normals()  # without them the window draws no light
    viewer = open3d.visualization.VisualizerWithKeyCallback()
    title = "n, p: next, previous sample    h: next head    e: distance to the truth    q: close"
    if not viewer.create_window(title, 1280, 720):
        sys.exit("no window could be opened")
    viewer.get_render_option().mesh_show_back_face = True

    def show() -> bool:
        front, up = np.array(walk.sample["front"]), np.array(walk.sample["up"])
        right = np.cross(up, front) / np.linalg.norm(np.cross(up, front))
        viewer.clear_geometries()
        for place, index in enumerate(walk.meshes()):
            if index is not None:
                moved = open3d.geometry.TriangleMesh(meshes[index])
                viewer.add_geometry(moved.translate(place * walk.sample["width"] * right))
        view = viewer.get_view_control()
        view.set_front(front)
        view.set_up(up)
        print(walk.title, flush=True)
        return True

    def on(key: str) -> Callable[[Any], bool]:
        def press(_: Any) -> bool:
            walk.press(key)
            return show()

        return press

    for letter in Walk.KEYS:
        viewer.register_key_callback(ord(letter), on(letter))
    show()
    (folder / "open").touch()
    viewer.run()
    viewer.destroy_window()


if __name__ == "__main__":
    {"draw": _draw, "window": _window}[sys.argv[1]](Path(sys.argv[2]))
