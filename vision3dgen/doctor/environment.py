"""The machine: Python and its packages, accelerators, optional backends, threads, memory, disk.

The ranges of versions are those of the installed package's own metadata, so that they are written once.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vision3dgen import __version__
from vision3dgen.doctor.finding import Finding
from vision3dgen.ops.backends import HAS_TRITON, MEND_TRITON, import_triton
from vision3dgen.viz import offscreen
from vision3dgen.viz.window import has_display

OFFERED = {"viz": "pictures and curves", "pytorch3d": "the backend PyTorch3D", "cluster": "vision3dgen sweep"}
OPEN3D = ("open3d", "open3d-cpu")
OPEN3D_LIBRARIES = "libusb-1.0-0 libgl1 libegl1 libgomp1 libx11-6 libvulkan1 mesa-vulkan-drivers"
GIB = 2**30


class Needed(NamedTuple):
    requirement: Requirement
    extra: str | None  # that asks for it; None: always needed


def needed() -> list[Needed]:
    """What the installed package asks for on this machine, extras of users included."""
    found = []
    for text in metadata.requires("vision3dgen") or []:
        requirement = Requirement(text)
        for extra in (None, *OFFERED):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
                found.append(Needed(requirement, extra))
                break
    return found


def examine_environment() -> list[Finding]:
    """Every check of the environment, in order."""
    return [finding for check in ENVIRONMENT_CHECKS for finding in check()]


def check_python() -> list[Finding]:
    where = f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}"
    try:
        wanted = metadata.metadata("vision3dgen")["Requires-Python"]
    except metadata.PackageNotFoundError:
        fix = "pip install -e . in the checkout"
        return [Finding("python", "warn", f"{where}; vision3dgen is not installed, its ranges are not known", fix)]
    if platform.python_version() not in SpecifierSet(wanted):
        return [Finding("python", "fail", f"{where}; vision3dgen needs {wanted}", f"make a venv with Python {wanted}")]
    return [Finding("python", "ok", f"{where}; vision3dgen {__version__}")]


def check_dependencies() -> list[Finding]:
    """What is always needed: there, and within its range."""
    try:
        always = [each.requirement for each in needed() if each.extra is None]
    except metadata.PackageNotFoundError:
        return []  # check_python has said so
    faults = []
    for requirement in always:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            has = "is not installed" if version is None else f"{version} is installed, not {requirement.specifier}"
            fix = f'pip install "{requirement.name}{requirement.specifier}"'
            faults.append(Finding("dependencies", "fail", f"{requirement.name} {has}", fix))
    return faults or [Finding("dependencies", "ok", f"{len(always)} packages within their ranges")]


def check_torch() -> list[Finding]:
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [Finding("torch", "ok", f"{torch.__version__}, {cuda}")]


def check_cuda() -> list[Finding]:
    """Devices, and a product computed on each; a driver that torch does not use is a warning."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding("cuda", "info", "no NVIDIA driver: everything runs on the CPU")]
        if torch.version.cuda is None:
            fix = "pip install torch from the index for CUDA that pytorch.org names for this driver"
            return [Finding("cuda", "warn", f"{driver}, but torch is built without CUDA", fix)]
        fix = "update the driver, or install a torch built for an older CUDA; see also CUDA_VISIBLE_DEVICES"
        return [Finding("cuda", "warn", f"{driver}, but torch for CUDA {torch.version.cuda} finds no device", fix)]
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            works = float((ones @ ones).sum()) == 64**3
        except RuntimeError as error:
            fix = "another process may hold all its memory (nvidia-smi), or torch has no kernels for it"
            found.append(Finding(f"cuda:{index}", "fail", f"{text}; {str(error).splitlines()[0]}", fix))
            continue
        verdict, result = ("ok", "a product is right") if works else ("fail", "a product of matrices is wrong")
        found.append(Finding(f"cuda:{index}", verdict, f"{text}; {driver or 'driver unknown'}; {result}"))  # type: ignore[arg-type]
    return found


def check_triton() -> list[Finding]:
    if HAS_TRITON:
        try:
            import_triton()
        except ImportError as error:
            return [Finding("triton", "fail", f"installed and does not import: {error.__cause__}", MEND_TRITON)]
        return [Finding("triton", "ok", f"{_version('triton')}: kernels for neighbors and farthest points on CUDA")]
    if torch.cuda.is_available():
        return [Finding("triton", "warn", "not installed: on CUDA, neighbors run slower", "pip install triton")]
    return [Finding("triton", "info", "not installed; it is used on CUDA only")]


def check_optional() -> list[Finding]:
    """Packages of the extras: that they are in range and can be imported. Absence is not a fault."""
    try:
        optional = [each for each in needed() if each.extra is not None and each.requirement.name not in OPEN3D]
    except metadata.PackageNotFoundError:
        return []
    found = []
    once: dict[str, Needed] = {}
    for each in optional:
        once.setdefault(each.requirement.name, each)
    for requirement, extra in once.values():
        assert extra is not None
        name, version, fix = requirement.name, _version(requirement.name), f'pip install "vision3dgen[{extra}]"'
        if version is None:
            found.append(Finding(name, "info", f"not installed; it is for {OFFERED[extra]}", fix))
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(Finding(name, "warn", f"{version} is installed, not {requirement.specifier}", fix))
        else:
            try:
                importlib.import_module(name)
            except ImportError as error:
                fix = f"pip install --force-reinstall --no-deps {name}, built for this torch"
                found.append(Finding(name, "fail", f"{version} does not import: {error}", fix))
            else:
                found.append(Finding(name, "ok", str(version)))
    return found


def check_open3d() -> list[Finding]:
    """Draws a triangle without a display, in a process of its own; says whether a window could be opened."""
    version = next((found for name in OPEN3D if (found := _version(name))), None)
    if version is None:
        fix = 'pip install "vision3dgen[viz]"'
        return [Finding("open3d", "info", "not installed: pictures come from the built-in renderer, no windows", fix)]
    display = "windows open on the display" if has_display() else "no display, so files instead of windows"
    corners = np.array([[[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0]]], dtype=np.float32)
    normals = np.tile(np.array([0, 0, 1], dtype=np.float32), (1, 3, 1))
    triangle = offscreen.Triangles(corners, normals, np.ones((1, 3, 3), dtype=np.float32))
    intrinsic, extrinsic = np.array([[64.0, 0, 31.5], [0, 64, 31.5], [0, 0, 1]]), np.eye(4)
    extrinsic[2, 3] = 2
    try:
        (picture,) = offscreen.draw(
            [triangle], [offscreen.Picture(0, intrinsic, extrinsic)], (64, 64), (1.0, 1.0, 1.0), patience=60
        )
    except offscreen.OffscreenError as error:
        fix = f"apt-get install {OPEN3D_LIBRARIES}"
        return [Finding("open3d", "warn", f"{version} does not draw without a display: {error}; {display}", fix)]
    share = float((picture[..., 3] > 0).mean())
    if not 0.03 < share < 0.1:  # the triangle covers 16 x 32 / 2 of 64 x 64 pixels
        fix = f"apt-get install {OPEN3D_LIBRARIES}"
        return [Finding("open3d", "warn", f"{version} draws without a display, but not what it was given", fix)]
    return [Finding("open3d", "ok", f"{version} draws without a display; {display}")]


def check_threads() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"{threads} of torch on {cores} cores"
    if threads > cores:
        return [Finding("threads", "warn", f"{text}: they wait for one another", f"export OMP_NUM_THREADS={cores}")]
    return [Finding("threads", "ok", text)]


def check_memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}"
    if memory.available < 2 * GIB:
        return [Finding("memory", "warn", text, "stop other processes, or lower loader.batch_size and num_workers")]
    return [Finding("memory", "ok", text)]


def check_disk() -> list[Finding]:
    usage = shutil.disk_usage(Path.cwd())
    text = f"{usage.free / GIB:.1f} GiB free at {Path.cwd()}"
    if usage.free < 2 * GIB:
        return [Finding("disk", "warn", text, "free space: a checkpoint that cannot be written stops a run")]
    return [Finding("disk", "ok", text)]


ENVIRONMENT_CHECKS: list[Callable[[], list[Finding]]] = [
    check_python,
    check_dependencies,
    check_torch,
    check_cuda,
    check_triton,
    check_optional,
    check_open3d,
    check_threads,
    check_memory,
    check_disk,
]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver by its own tool, None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split() if done.returncode == 0 else []
    return f"NVIDIA driver {lines[0]}" if lines else None
