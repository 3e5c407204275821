"""A training step of Mesh R-CNN's ShapeNet model, on this library's operators and on PyTorch3D's, in one run.

    python benchmarks/training_step.py --out runs/training_step
    python benchmarks/training_step.py --out runs/training_step --graph    with torch-geometric's graph convolution too

ResNet-50, four pictures of 137 x 137, 48^3 voxels in the view volume, meshes of about 1,600 vertices, three stages,
5,000 samples of every surface, the voxels of the view volume made from meshes. The voxels are led to a ball, as those
of an untrained network would fill everything. Columns: the convolutions of backbone and voxel tubes, forward and
backward, which are torch's for all; meshes (cubes, sampled maps, graph convolutions); their losses; the gradients of
both down to the maps. The contestants have the same weights and take turns; a row holds minima over the repeats.

"PyTorch3D" is the published order of work: every stage samples all 3,840 channels at the vertices. "PyTorch3D, maps
reduced first" has this library's order with PyTorch3D's operators. That all compute the same losses is checked.
Leaves table.md and steps.jsonl in the output folder.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

from vision3dgen.backbones import resnet50
from vision3dgen.datasets import collate
from vision3dgen.experiment import environment
from vision3dgen.files import atomic_write
from vision3dgen.heads import GRAPH_CONVOLUTIONS, RefinementStage, View, VoxMeshHead, mesh, refinement
from vision3dgen.losses import Chamfer
from vision3dgen.models import SingleView
from vision3dgen.ops import ico_sphere, sample_points_from_meshes
from vision3dgen.structures import Camera, Frame, Meshes, Pointclouds

HAS_PYTORCH3D = importlib.util.find_spec("pytorch3d") is not None
PHASES = ("convolutions", "meshes", "losses", "gradients")
RADIUS = 9.2  # of the ball in voxels: about 1,600 vertices
console = Console(width=None if sys.stdout.isatty() else 160)


class Ball(nn.Module):
    """Logits with a ball added that decides what is filled."""

    given: Tensor | None = None  # what to answer instead, when they are there already

    def __init__(self, tubes: nn.Module, resolution: int):
        super().__init__()
        self.tubes = tubes
        axis = torch.arange(resolution) - (resolution - 1) / 2
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        self.field: Tensor
        self.register_buffer("field", 8 * ((x * x + y * y + z * z).sqrt() < RADIUS) - 4.0)

    def forward(self, features: Tensor) -> Tensor:
        if self.given is not None:
            return self.given
        logits: Tensor = self.tubes(features)
        return logits + self.field


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", action="store_true", help="also with torch-geometric's graph convolution")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)

    batch = scene(options.batch, device)
    names = ["vision3dgen"] + ["vision3dgen, torch-geometric"] * options.graph
    names += ["PyTorch3D", "PyTorch3D, maps reduced first"] * HAS_PYTORCH3D
    models: dict[str, SingleView] = {}
    for name in names:
        with operators(name):
            models[name] = build("geometric" if "geometric" in name else "csr").to(device)
        models[name].load_state_dict(models["vision3dgen"].state_dict(), strict=True)
    losses = {name: step(name, model, batch, device)[1] for name, model in models.items()}  # warms up as well
    check(losses)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name, model in models.items():
            seconds[name].append(step(name, model, batch, device)[0])
    write(options.out, models["vision3dgen"], batch, seconds, options.repeats)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def scene(size: int, device: torch.device) -> dict[str, Any]:
    """Spheres seen by 3D-R2N2's cameras, with points on them."""
    items = []
    for index in range(size):
        shape = ico_sphere(4).scale_verts(0.5)
        points, normals = sample_points_from_meshes(
            shape, 20_000, return_normals=True, generator=torch.Generator().manual_seed(index)
        )
        items.append(
            {
                "image": torch.rand(3, 137, 137, generator=torch.Generator().manual_seed(index)),
                "camera": Camera.from_r2n2(40.0 * index, 27.0, 0.8).to(torch.float32).to(device),
                "frame": Frame("object", scale=0.6),
                "mesh": shape.to(device),
                "surface": Pointclouds(list(points), list(normals)).to(device),
            }
        )
    batch = collate(items)
    return {**batch, "image": batch["image"].to(device)}


def build(convolution: Any) -> SingleView:
    torch.manual_seed(0)
    backbone = resnet50()
    head = VoxMeshHead(backbone.channels, convolution=convolution)
    head.voxel_head = Ball(head.voxel_head, head.frustum.resolution)  # type: ignore[assignment]
    return SingleView(backbone, head)


def step(
    name: str, model: SingleView, batch: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each phase, and the losses."""
    model.zero_grad()
    torch.manual_seed(0)
    tubes = model.head.voxel_head
    assert isinstance(tubes, Ball)
    with operators(name):
        times = [now(device)]
        maps = model.features(batch["image"])
        made = [*maps, tubes(maps[-1])]
        times.append(now(device))
        *leaves, tubes.given = [value.detach().requires_grad_() for value in made]
        view = View((137, 137), batch["camera"])
        prediction = model.head(leaves, view)
        times.append(now(device))
        losses = model.head.loss(prediction, batch)
        times.append(now(device))
        losses["loss"].backward()
        times.append(now(device))
        torch.autograd.backward(made, [value.grad for value in [*leaves, tubes.given]])
        times.append(now(device))
        tubes.given = None
    forward, meshes, of_losses, gradients, backward = (end - start for start, end in pairwise(times))
    spent = dict(zip(PHASES, (forward + backward, meshes, of_losses, gradients)))
    return spent, {key: float(value.detach()) for key, value in losses.items()}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check(losses: Mapping[str, Mapping[str, float]]) -> None:
    """All contestants must compute the same; the chamfer distance differs by its samples."""
    first = losses["vision3dgen"]
    for name, own in losses.items():
        for key, tolerance in (("voxels", 1e-4), ("edges", 1e-4), ("chamfer", 0.02)):
            if abs(own[key] - first[key]) > tolerance * abs(first[key]):
                raise ValueError(f"{name} has the loss {key} {own[key]}, vision3dgen {first[key]}: not the same work")


# --------------------------------------------------------------------------------------------------- the operators


@contextmanager
def operators(name: str) -> Iterator[None]:
    """The heads on the operators of a contestant: the same names from another library."""
    if not name.startswith("PyTorch3D"):
        yield
        return
    from pytorch3d import loss as p3d_loss
    from pytorch3d import ops as p3d_ops

    def sample(meshes: Any, samples: int, *arguments: Any, generator: Any = None) -> Any:
        return p3d_ops.sample_points_from_meshes(meshes, samples, *arguments)

    def chamfer(*arguments: Any, **named: Any) -> Chamfer:
        return Chamfer(*p3d_loss.chamfer_distance(*arguments, **named))

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (mesh, "cubify", p3d_ops.cubify),
        (refinement, "vert_align", p3d_ops.vert_align),
        (refinement, "sample_points_from_meshes", sample),
        (refinement, "chamfer_distance", chamfer),
        (refinement, "mesh_edge_loss", p3d_loss.mesh_edge_loss),
    ]
    if name == "PyTorch3D":
        replaced.append((RefinementStage, "_sample", sample_all_channels))
    with ExitStack() as stack:
        for place, attribute, other in replaced:
            stack.enter_context(mock.patch.object(place, attribute, other))
        stack.enter_context(mock.patch.dict(GRAPH_CONVOLUTIONS, {"csr": p3d_ops.GraphConv}))
        yield


def sample_all_channels(stage: RefinementStage, maps: Any, seen: Tensor) -> Tensor:
    """The published order: sample, then the bottleneck."""
    sampled: Tensor = stage.bottleneck(refinement.vert_align(list(maps), seen))
    return sampled


# ---------------------------------------------------------------------------------------------------------- writing


def write(
    out: Path,
    model: SingleView,
    batch: Mapping[str, Any],
    seconds: Mapping[str, list[dict[str, float]]],
    repeats: int,
) -> None:
    with torch.no_grad():
        shapes: Meshes = model.head.shape(model(batch["image"], batch["camera"]))
    known = environment()
    best: dict[str, dict[str, float]] = {}
    for name, runs in seconds.items():
        best[name] = {phase: min(own[phase] for own in runs) for phase in PHASES}
        best[name]["meshes in all"] = min(sum(own[phase] for phase in PHASES[1:]) for own in runs)
        best[name]["step"] = min(sum(own.values()) for own in runs)
    columns = list(best["vision3dgen"])
    text = [
        f"Measured {date.today().isoformat()} on {known['device']}, {known['threads']} threads, "
        f"torch {known['torch']}; batch {len(shapes)}, {int(shapes.num_verts_per_mesh()[0])} vertices each, "
        f"minima of {repeats} repeats, seconds.\n",
        f"| operators | {' | '.join(columns)} | meshes, times ours | step, times ours |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    for name, own in best.items():
        cells = [f"{own[column]:.3f}" for column in columns]
        cells += [f"{own[column] / best['vision3dgen'][column]:.2f}" for column in ("meshes in all", "step")]
        text.append(f"| {name} | {' | '.join(cells)} |")
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    lines = [json.dumps({"operators": name, **own, "repeats": repeats, **known}) for name, own in best.items()]
    with atomic_write(out / "steps.jsonl") as file:
        file.write("\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    sys.exit(main())
