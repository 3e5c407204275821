"""Generators on binary MNIST: likelihoods, samples and completions; and what the cached sampler of pixels saves.

    python benchmarks/generation.py --data data/mnist --out runs/generation

Of the 10,000 published test images 8,000 train and 2,000 test, drawn with seed 0, so that the two small files suffice.
"dynamic": training images are binarized anew at each look, test images once ("static"); "threshold": both at one half.
Each network is trained for a few CPU minutes, under OUT/NAME_BINARIZATION.

The sampler is timed on networks as configured, or as large as published, with random weights, which cost the same: CPU
time of the process for images of 28 x 28, of which "cached" is the least of three. "naive" is the least time of three
full forwards times the number of pixels, which is what it is made of, as whole images take up to 15 minutes. That both
draw the same images is checked on images of 8 x 8.
Leaves in the output folder: table.md, table.jsonl, speed.png, samples_NAME.png, completions_NAME.png, and a run folder
per network. Interrupted, it goes on where it was. Exit code 1 if cached and naive samples of one seed differ.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from vision3dgen import viz
from vision3dgen.config import construct, load
from vision3dgen.experiment import Experiment, Run, environment
from vision3dgen.files import atomic_write
from vision3dgen.generators import VAE, Autoregressive
from vision3dgen.metrics import LikelihoodScores
from vision3dgen.viz.gallery import PALETTE, figure_of, save_figure

CONFIGS = Path(__file__).parents[1] / "configs"
SPLIT = ("data.part=test", "data.fractions={train: 0.8, test: 0.2}", "data.seed=0", "trainer.validation=null")
BINARIZATIONS = {
    "dynamic": ("data.binarize=static", "splits.train.binarize=dynamic"),
    "threshold": ("data.binarize=threshold", "splits.train.binarize=threshold"),
}


class Trained(NamedTuple):
    config: str
    overrides: Sequence[str]


TRAINED = {
    "PixelCNN": Trained("pixelcnn", ("trainer.epochs=null", "trainer.steps=1000")),
    "Gated PixelCNN": Trained("gated_pixelcnn", ("trainer.epochs=null", "trainer.steps=1000")),
    "Row LSTM": Trained("row_lstm", ("trainer.epochs=null", "trainer.steps=1500")),
    "ImageGPT": Trained("imagegpt", ("trainer.epochs=null", "trainer.steps=600", "model.layers=4")),
    "VAE": Trained("vae", ("evaluation={name: likelihood}", "trainer.epochs=40", "model.evaluation_samples=64")),
}


class Sampled(NamedTuple):
    config: str
    overrides: Sequence[str]
    batches: Sequence[int]


SAMPLED = {
    "PixelCNN, 32 channels, 15 layers": Sampled("pixelcnn", ("model.layers=15",), (1, 4, 16, 64)),
    "Gated PixelCNN, 128 channels, 10 layers": Sampled(
        "gated_pixelcnn", ("model.channels=128", "model.layers=10"), (1, 4, 16)
    ),
    "ImageGPT": Sampled("imagegpt", (), (1, 4, 16)),
    "Row LSTM": Sampled("row_lstm", (), (1, 4, 16, 64)),
    "Diagonal BiLSTM": Sampled("diagonal_bilstm", (), (1, 4, 16, 64)),
    "PixelCNN++": Sampled("pixelcnnpp", (), (1, 4)),
    "PixelSNAIL": Sampled("pixelsnail", (), (1,)),
}
REPEATS, SIDE = 3, 8

console = Console(width=None if sys.stdout.isatty() else 120)


class Likelihood(NamedTuple):
    model: str
    binarization: str
    parameters: int
    scores: LikelihoodScores
    elbo: float | None  # of a VAE, mean nats; its scores are IWAE bounds


class Timing(NamedTuple):
    model: str
    parameters: int
    batch: int
    cached: float  # seconds of a batch
    naive: float
    same: bool  # both drew the same images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with t10k-{images-idx3,labels-idx1}-ubyte[.gz]"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny")
    parser.add_argument("--models", nargs="*", choices=TRAINED, default=list(TRAINED), help="to train")
    parser.add_argument("--binarizations", nargs="+", choices=BINARIZATIONS, default=list(BINARIZATIONS))
    parser.add_argument("--samplers", nargs="*", choices=SAMPLED, default=list(SAMPLED), help="to time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    likelihoods = []
    for binarization in options.binarizations:
        for model in options.models:
            console.rule(f"{model}, {binarization}")
            likelihoods.append(trained(options, model, binarization, device))
    timings = []
    for model in options.samplers:
        console.rule(model)
        timings += timed(model, options.preset, device)
    write_tables(options.out, likelihoods, timings)
    console.print(Markdown((options.out / "table.md").read_text()))
    if timings:
        draw_speed(options.out / "speed.png", timings)
    return 0 if all(timing.same for timing in timings) else 1


# -------------------------------------------------------------------------------------------------------- likelihood


def trained(options: argparse.Namespace, model: str, binarization: str, device: torch.device) -> Likelihood:
    """Train a network, or go on with it, score it, and draw what it has learned."""
    config, own = TRAINED[model]
    overrides = [f"data.root={options.data}", *BINARIZATIONS[binarization]]
    if options.preset is None:
        overrides += [*SPLIT, *own]
    elif model == "VAE":
        overrides.append("evaluation={name: likelihood}")
    name = f"{config}_{binarization}"
    path = CONFIGS / f"generation_{config}_mnist.yaml"
    run = Run.create(options.out / name, load(path, overrides, preset=options.preset))
    began = time.process_time()
    run.train(resume=True)
    console.print(f"{time.process_time() - began:.0f} s of CPU, less if it was trained before")
    found = run.evaluate("likelihood", device=device)
    assert isinstance(found, LikelihoodScores)
    network = run.model(device)
    if isinstance(network, Autoregressive):
        draw(options.out, name, run, network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Likelihood(model, binarization, parameters, found, elbo(run, network))


@torch.no_grad()
def elbo(run: Run, network: torch.nn.Module) -> float | None:
    """Mean nats of the test images of a VAE, one draw each."""
    if not isinstance(network, VAE):
        return None
    generator = torch.Generator().manual_seed(run.experiment.seed)
    batches = run.experiment.batches(run.experiment.dataset("test"), 200)
    return float(torch.cat([network.elbo(batch["image"], generator=generator).elbo for batch in batches]).mean())


def draw(out: Path, name: str, run: Run, model: Autoregressive) -> None:
    """64 samples, and for eight test images: the lower half hidden, four completions, the truth."""
    samples = model.sample(64, generator=torch.Generator().manual_seed(0)).cpu()
    viz.image_grid(enlarged(samples), out / f"samples_{name}.png")
    dataset = run.experiment.dataset("test")
    truth = torch.stack([dataset[index]["image"] for index in range(min(8, len(dataset)))])
    mask = torch.zeros(truth.shape[2:], dtype=torch.bool)
    mask[: truth.shape[2] // 2] = True
    hidden = torch.where(mask, truth, 0.5)
    generator = torch.Generator().manual_seed(1)
    drawn = [model.sample(len(truth), image=truth, mask=mask, generator=generator).cpu() for _ in range(4)]
    columns = [enlarged(images) for images in (hidden, *drawn, truth)]
    rows = [[column[index] for column in columns] for index in range(len(truth))]
    titles = ["given", *["drawn"] * 4, "truth"]
    viz.gallery(rows, titles, path=out / f"completions_{name}.png", gap=2)


def enlarged(images: Tensor) -> Tensor:
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


# ---------------------------------------------------------------------------------------------------------- sampling


def timed(model: str, preset: str | None, device: torch.device) -> list[Timing]:
    """CPU seconds of batches of images, cached and naive."""
    config, own, batches = SAMPLED[model]
    path = CONFIGS / f"generation_{config}_mnist.yaml"
    overrides = own if preset is None else ()
    small = construct(Experiment, load(path, [*overrides, f"model.image_shape=[1, {SIDE}, {SIDE}]"], preset=preset))
    images = [
        built(small, device).sample(2, generator=torch.Generator().manual_seed(0), method=method)
        for method in ("cached", "naive")
    ]
    network = built(construct(Experiment, load(path, overrides, preset=preset)), device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    network.sample(1, generator=torch.Generator())  # what happens only once
    found = []
    for batch in batches if preset is None else batches[:1]:
        pictures = (torch.rand(batch, *network.image_shape, device=device) > 0.5).float()
        cached, forward = [], []
        for _ in range(REPEATS):
            cached.append(seconds(lambda: network.sample(batch, generator=torch.Generator().manual_seed(0))))  # noqa: B023
            forward.append(seconds(lambda: network(pictures)))  # noqa: B023
        pixels = math.prod(network.image_shape) // network.image_shape[0]
        naive = min(forward) * pixels * network.likelihood.steps
        found.append(Timing(model, parameters, batch, min(cached), naive, torch.equal(*images)))
        console.print(f"batch {batch}: {min(cached):.3f} s, naive {naive:.1f} s, {naive / min(cached):.0f} times")
    return found


def built(experiment: Experiment, device: torch.device) -> Autoregressive:
    network = experiment.build_model().to(device).eval()
    assert isinstance(network, Autoregressive)
    return network


@torch.inference_mode()
def seconds(work: Any) -> float:
    """CPU time of the process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def draw_speed(path: Path, timings: Sequence[Timing]) -> None:
    """How many times faster the cached sampler is, and what an image takes, by batch size."""
    figure, (ratio, each) = figure_of(2)
    for index, model in enumerate(dict.fromkeys(timing.model for timing in timings)):
        own = [timing for timing in timings if timing.model == model]
        batches, color = [timing.batch for timing in own], PALETTE[index % len(PALETTE)]
        label = model.partition(",")[0]
        ratio.plot(batches, [t.naive / t.cached for t in own], marker="o", markersize=3, color=color, label=label)
        each.plot(batches, [t.naive / t.batch for t in own], linestyle=":", color=color)
        each.plot(batches, [t.cached / t.batch for t in own], marker="o", markersize=3, color=color)
    ratio.set(title="naive time / cached time", xscale="log", yscale="log", xlabel="images at once")
    each.set(title="s an image (dotted: naive)", xscale="log", yscale="log", xlabel="images at once")
    for axis in (ratio, each):
        axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axis.minorticks_off()
    ratio.legend(frameon=False, fontsize=6)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------ tables


def write_tables(out: Path, likelihoods: Sequence[Likelihood], timings: Sequence[Timing]) -> None:
    """table.md for people and table.jsonl, a line per row, for programs."""
    known, today = environment(), date.today().isoformat()
    about: Mapping[str, Any] = {"date": today, "environment": known}
    text = [f"Measured {today} on {known['device']}, {known['threads']} thread(s), torch {known['torch']}.", ""]
    records: list[dict[str, Any]] = []
    if likelihoods:
        text.append("| model | binarization | parameters | test nats | standard error | bits/dim |")
        text.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in likelihoods:
        scores = row.scores
        name = row.model if row.elbo is None else f"{row.model}, IWAE-64 (ELBO {-row.elbo:.2f} nats)"
        text.append(
            f"| {name} | {row.binarization} | {row.parameters:,} | {scores.nats:.2f} | {scores.standard_error:.2f} | "
            f"{scores.bits_per_dim:.4f} |"
        )
        records.append({**row._asdict(), "scores": scores.to_dict(), **about})
    if timings:
        text += ["", "| model | parameters | batch | naive, s | cached, s | ratio | same images |"]
        text.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for timing in timings:
        text.append(
            f"| {timing.model} | {timing.parameters:,} | {timing.batch} | {timing.naive:.1f} | {timing.cached:.3f} | "
            f"{timing.naive / timing.cached:.0f} | {'yes' if timing.same else 'NO'} |"
        )
        records.append({**timing._asdict(), **about})
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
