"""Trained generators of shapes: sets of samples against the test split's, the training split's own floor, and pictures.

    python benchmarks/generated_shapes.py runs/point_vae runs/voxel_gan --out runs/shapes

The runs must be evaluated as `generated_shapes`. The floor is the score of as many training shapes as the test split
has: no generator can be expected to be nearer. Prints a table and leaves in the output folder table.md, training.png,
for each run NAME_samples.png, and of a `PointVAE` NAME_interpolation.png.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vision3dgen.experiment import Run, as_clouds
from vision3dgen.files import atomic_write
from vision3dgen.generators import PointVAE
from vision3dgen.metrics import SetScores, ShapeSetEvaluator, compare_sets, jensen_shannon
from vision3dgen.ops import isosurface
from vision3dgen.structures import GridSpec, Meshes, Pointclouds
from vision3dgen.viz import Job, gallery, render_many

HEADER = "| | n | failed | distance | MMD | COV | 1-NNA | JSD, bits |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=8, help="in a row of a gallery (default: 8)")
    parser.add_argument("--renderer", default="auto", help="of the pictures: open3d, builtin or auto (default)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [Run.open(folder) for folder in options.runs]
    lines = [HEADER, "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
    lines += floor(runs[0])
    for run in runs:
        scores = run.evaluate("generated_shapes").to_dict()
        found = {name: SetScores(**each) for name, each in scores["by_distance"].items()}
        lines += rows(run.folder.name, scores["total"], scores["n_failed"], found, scores["jsd"])
        draw(run, options.out, options.pictures, options.renderer)
    text = "\n".join(lines) + "\n"
    with atomic_write(options.out / "table.md") as file:
        file.write(text.encode())
    print(text)
    training = [item.points_padded()[0] for item in surfaces(runs[0], "train")[: 2 * options.pictures]]
    save(
        [Pointclouds([points]) for points in training], options.out / "training.png", options.pictures, options.renderer
    )
    return 0


def rows(name: str, total: int, failed: int, found: dict[str, SetScores], jsd: float) -> list[str]:
    """Lines of the table, one for each distance."""
    return [
        f"| {name} | {total} | {failed} | {distance} | {each.mmd:.5f} | {each.coverage:.3f} | {each.one_nna:.3f} | "
        f"{jsd:.4f} |"
        for distance, each in found.items()
    ]


def surfaces(run: Run, split: str) -> list[Pointclouds]:
    dataset = run.experiment.dataset(split, fields=["surface"])
    return [dataset[index]["surface"] for index in range(len(dataset))]


def floor(run: Run) -> list[str]:
    """Training shapes, as many as the test split has, against the test split."""
    evaluation = run.experiment.evaluation
    if not isinstance(evaluation, ShapeSetEvaluator):
        raise ValueError(f"{run.folder} is not evaluated as generated_shapes")
    generator = torch.Generator().manual_seed(run.experiment.seed)
    test, train = surfaces(run, evaluation.split), surfaces(run, "train")
    chosen = [train[i] for i in torch.randperm(len(train), generator=generator)[: len(test)].tolist()]
    real, others = (
        as_clouds(torch.cat([each.points_padded() for each in group]), evaluation.points, generator)
        for group in (test, chosen)
    )
    scale = 2 * evaluation.radius
    found = compare_sets(real, others, evaluation.distances)
    return rows("training shapes (floor)", len(test), 0, found, jensen_shannon(real / scale, others / scale))


@torch.no_grad()
def draw(run: Run, out: Path, columns: int, renderer: str) -> None:
    """Samples of a run, and for a VAE of clouds what lies between two test shapes."""
    model, generator = run.model(), torch.Generator().manual_seed(run.experiment.seed)
    samples: Tensor = model.sample(2 * columns, generator=generator)  # type: ignore[operator]
    shapes: list[Meshes | Pointclouds] = [Pointclouds([each]) for each in samples] if samples.ndim == 3 else []
    if samples.ndim == 4:
        meshes = isosurface(samples, getattr(model, "grid", None) or GridSpec.cube(samples.shape[1]), level=0.5)
        shapes = [meshes[index] for index in range(len(samples))]
    save(shapes, out / f"{run.folder.name}_samples.png", columns, renderer)
    if isinstance(model, PointVAE):
        ends = [model.encode(each.points_padded()).mean for each in surfaces(run, "test")[:4]]
        line = [
            torch.lerp(ends[first], ends[first + 1], share)
            for first in (0, 2)
            for share in torch.linspace(0, 1, columns).tolist()
        ]
        clouds = [Pointclouds([model.decode(z)[0]]) for z in line]
        save(clouds, out / f"{run.folder.name}_interpolation.png", columns, renderer)


def save(shapes: list[Meshes | Pointclouds] | list[Pointclouds], path: Path, columns: int, renderer: str) -> None:
    drawn = render_many([Job(shape) for shape in shapes], size=(160, 160), renderer=renderer)
    print(f"{path.name}: drawn by {drawn.renderer}")
    gallery([drawn.images[start : start + columns] for start in range(0, len(shapes), columns)], path=path, gap=2)


if __name__ == "__main__":
    raise SystemExit(main())
