"""Trained latent-variable and adversarial generators: bounds, scores against the floor of real pictures, and pictures.

    python benchmarks/latent.py runs/generation_vae_mnist runs/generation_dcgan_mnist --out runs/latent

The runs must be scored by `generation` and share one extractor. Prints a table and leaves in the output folder table.md
and for each run NAME_samples.png, and of VAEs NAME_reconstructions.png, NAME_interpolation.png and NAME_traversal.png.
The floor is the score of as many training pictures against the test pictures: no generator can be expected below it.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision3dgen.experiment import Run, extractor
from vision3dgen.files import atomic_write
from vision3dgen.generators import GAN, VAE
from vision3dgen.metrics import GenerationEvaluator, Pair, quantize
from vision3dgen.viz import gallery, image_grid, latent_traversals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=500, help="importance samples of IWAE (default: 500)")
    parser.add_argument("--pictures", type=int, default=8, help="in a row of a grid (default: 8)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [Run.open(folder) for folder in options.runs]
    lines = [
        "| | FID | KID x 1000 | IS | precision | recall | density | coverage | ELBO | KL | IWAE |",
        "| --- " + "| ---: " * 10 + "|",
        row("training pictures (floor)", floor(runs[0], options.out), {}),
    ]
    for run in runs:
        scores = run.evaluate("generation").to_dict()
        lines.append(row(run.folder.name, scores, bounds(run, options.draws)))
        draw(run, options.out, options.pictures)
    text = "\n".join(lines) + "\n"
    with atomic_write(options.out / "table.md") as file:
        file.write(text.encode())
    print(text)
    return 0


def row(name: str, scores: Mapping[str, Any], nats: Mapping[str, float]) -> str:
    """A line of the table."""
    cells = [f"{scores['fid']:.2f}", f"{1000 * scores['kid']['mean']:.2f} ± {1000 * scores['kid']['std']:.2f}"]
    cells.append("-" if scores["inception"] is None else f"{scores['inception']['mean']:.2f}")
    cells += [f"{value:.3f}" for value in scores["manifold"].values()]
    cells += [f"{nats[name]:.2f}" if name in nats else "-" for name in ("elbo", "kl", "iwae")]
    return f"| {name} | " + " | ".join(cells) + " |"


def floor(run: Run, out: Path) -> Mapping[str, Any]:
    """Scores of training pictures, as many as the test split has, against the test split."""
    experiment = run.experiment
    evaluation = experiment.evaluation
    if not isinstance(evaluation, GenerationEvaluator):
        raise ValueError(f"{run.folder} is not scored by generation")
    extract = extractor(Run.open(evaluation.extractor), "cpu")
    train = experiment.dataset("train")
    order = iter(torch.randperm(len(train), generator=torch.Generator().manual_seed(experiment.seed)).tolist())

    def predict(batch: Mapping[str, Any]) -> Pair:
        others = torch.stack([train[next(order)]["image"] for _ in batch["id"]])
        return Pair(extract(quantize(batch["image"])), extract(quantize(others)))

    batches = experiment.batches(experiment.dataset(evaluation.split), evaluation.batch_size)
    folder = out / "floor"
    return evaluation.evaluate(
        "generation", batches, predict, folder, split=evaluation.split, seed=experiment.seed
    ).to_dict()


@torch.no_grad()
def bounds(run: Run, draws: int) -> Mapping[str, float]:
    """Mean nats of the test pictures: ELBO, KL and IWAE; nothing for a model that has none."""
    model, experiment = run.model(), run.experiment
    if not isinstance(model, VAE):
        return {}
    generator = torch.Generator().manual_seed(experiment.seed)
    sums, count = {"elbo": 0.0, "kl": 0.0, "iwae": 0.0}, 0
    for batch in experiment.batches(experiment.dataset("test"), 200):
        cond = batch["label"] if model.classes is not None else None
        terms = model.elbo(batch["image"], cond, generator=generator)
        iwae = model.log_prob(batch["image"], cond=cond, samples=draws, generator=generator)
        for name, values in (("elbo", terms.elbo), ("kl", terms.kl), ("iwae", iwae)):
            sums[name] += float(values.double().sum())
        count += len(batch["image"])
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def draw(run: Run, out: Path, columns: int) -> None:
    """Pictures of what a run has learned."""
    model, name = run.model(), run.folder.name
    generator = torch.Generator().manual_seed(run.experiment.seed)
    classes = getattr(model, "classes", None)
    count = columns * (classes or columns)
    cond = torch.arange(classes).repeat_interleave(columns) if classes else None
    save(model.sample(count, cond=cond, generator=generator), out / f"{name}_samples.png", columns)  # type: ignore[operator]
    if isinstance(model, GAN):
        first, second = torch.randn(2, columns, model.generator.latents, generator=generator)
        line = model.interpolate(first, second, columns, cond=None if cond is None else cond[::columns][:columns])
        save(line.flatten(0, 1), out / f"{name}_interpolation.png", columns)
    if isinstance(model, VAE):
        items = next(run.experiment.batches(run.experiment.dataset("test"), 2 * columns))
        labels = items["label"] if classes else None
        images = model.likelihood.observe(items["image"], generator)
        half = None if labels is None else labels[:columns]
        pairs = torch.stack([images[:columns], model(images[:columns], half)], 1)
        gallery(
            [[color(picture) for picture in pairs[:, i]] for i in range(2)],
            path=out / f"{name}_reconstructions.png", gap=2,
        )  # fmt: skip
        line = model.interpolate(images[:columns], images[columns:], columns, cond=half)
        save(line.flatten(0, 1), out / f"{name}_interpolation.png", columns)
        used = model.encode(images, labels).mean.var(0).topk(min(columns, model.latents)).indices.tolist()
        start = model.encode(images[:1], None if labels is None else labels[:1]).mean
        values = torch.linspace(-2.5, 2.5, columns).tolist()
        moved = model.traverse(start, used, values, cond=None if labels is None else labels[:1])
        latent_traversals(moved[0], values, [str(latent) for latent in used], out / f"{name}_traversal.png")


def color(image: Tensor) -> Tensor:
    """Grey pictures in three channels."""
    return image.clamp(0, 1).expand(3, -1, -1) if len(image) == 1 else image.clamp(0, 1)


def save(images: Tensor, path: Path, columns: int) -> None:
    image_grid([color(image) for image in images], path, columns=columns)


if __name__ == "__main__":
    raise SystemExit(main())
