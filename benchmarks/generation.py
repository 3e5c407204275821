"""Autoregressive generators on binary MNIST: likelihoods, samples and completions, and what the cached sampler saves.

    python benchmarks/generation.py --data data/mnist --out runs/generation

Of the 10,000 published test images 8,000 train and 2,000 test, drawn with seed 0, so that the two small files suffice;
training images are binarized anew at each look, test images once. PixelCNN and Gated PixelCNN are trained, STEPS of
their configurations; the sampler is timed on all families as they are configured, with random weights where they are
not trained, which costs the same. Times are of the process's CPU, so that what else runs does not count.
Leaves in the output folder: table.md, table.jsonl, samples_NAME.png, completions_NAME.png, and a run folder per
network. Interrupted, it goes on where it was. Exit code 1 if cached and naive samples of one seed differ.
"""

import argparse
import json
import sys
import time
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
from vision3dgen.generators import Autoregressive
from vision3dgen.metrics import LikelihoodScores

CONFIGS = Path(__file__).parents[1] / "configs"
SPLIT = ("data.part=test", "data.fractions={train: 0.8, test: 0.2}", "data.seed=0", "trainer.validation=null")
STEPS = ("trainer.epochs=null", "trainer.steps=1000")
TRAINED = {"PixelCNN": "pixelcnn", "Gated PixelCNN": "gated_pixelcnn"}
OTHERS = {
    "Row LSTM": "row_lstm",
    "Diagonal BiLSTM": "diagonal_bilstm",
    "PixelCNN++": "pixelcnnpp",
    "PixelSNAIL": "pixelsnail",
    "ImageGPT": "imagegpt",
}
SIZES = {"trained": (8, 16, 28), "others": (8, 16)}  # of the images that are drawn; larger ones take minutes naively
BATCHES = {"trained": (1, 16), "others": (1,)}

console = Console(width=None if sys.stdout.isatty() else 120)


class Timing(NamedTuple):
    model: str
    parameters: int
    size: int
    batch: int
    cached: float  # seconds an image
    naive: float
    same: bool  # both drew the same images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with t10k-{images-idx3,labels-idx1}-ubyte[.gz]"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    scores: dict[str, LikelihoodScores] = {}
    for method, name in TRAINED.items():
        console.rule(method)
        run = create_run(options, name)
        run.train(resume=True)
        found = run.evaluate("likelihood", device=device)
        assert isinstance(found, LikelihoodScores)
        scores[method] = found
        draw(options.out, name, run, device)
    timings = []
    for kind, names in (("trained", TRAINED), ("others", OTHERS)):
        for method, name in names.items():
            for size in SIZES[kind] if options.preset is None else (5,):
                for batch in BATCHES[kind] if size < 28 else (1,):
                    timings.append(timed(method, name, size, batch, options.preset, device))
                    console.print(timings[-1])
    write_tables(options.out, scores, timings)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0 if all(timing.same for timing in timings) else 1


def create_run(options: argparse.Namespace, name: str) -> Run:
    own = (*SPLIT, *STEPS) if options.preset is None else ()
    overrides = [f"data.root={options.data}", *own]
    config = load(CONFIGS / f"generation_{name}_mnist.yaml", overrides, preset=options.preset)
    return Run.create(options.out / name, config)


def draw(out: Path, name: str, run: Run, device: torch.device) -> None:
    """64 samples, and for eight test images: the lower half hidden, four completions, the truth."""
    model = run.model(device)
    assert isinstance(model, Autoregressive)
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


def timed(method: str, name: str, size: int, batch: int, preset: str | None, device: torch.device) -> Timing:
    """CPU seconds for each image, cached and naive, of images size x size."""
    config = load(CONFIGS / f"generation_{name}_mnist.yaml", [f"model.image_shape=[1, {size}, {size}]"], preset=preset)
    model = construct(Experiment, config).build_model().to(device)
    assert isinstance(model, Autoregressive)
    images, seconds = {}, {}
    model.sample(1, generator=torch.Generator())  # what happens only once
    for kind in ("cached", "naive"):
        began = time.process_time()
        images[kind] = model.sample(batch, generator=torch.Generator().manual_seed(0), method=kind)
        seconds[kind] = (time.process_time() - began) / batch
    parameters = sum(parameter.numel() for parameter in model.parameters())
    same = torch.equal(images["cached"], images["naive"])
    return Timing(method, parameters, size, batch, seconds["cached"], seconds["naive"], same)


def write_tables(out: Path, scores: dict[str, LikelihoodScores], timings: list[Timing]) -> None:
    """table.md for people and table.jsonl, a line per row, for programs."""
    known, today = environment(), date.today().isoformat()
    machine = f"{known['device']}, {known['threads']} thread(s), torch {known['torch']}"
    parameters = {timing.model: timing.parameters for timing in timings}
    text = [f"Measured {today} on {machine}.", "", "| model | parameters | test nats | standard error | bits/dim |"]
    text.append("| --- | ---: | ---: | ---: | ---: |")
    records: list[dict[str, Any]] = []
    about = {"date": today, "environment": known}
    for method, found in scores.items():
        text.append(
            f"| {method} | {parameters[method]:,} | {found.nats:.2f} | {found.standard_error:.2f} | "
            f"{found.bits_per_dim:.4f} |"
        )
        records.append({"model": method, **found.to_dict(), **about})
    text += [
        "",
        "| model | parameters | image | batch | naive, s an image | cached, s an image | ratio | same images |",
    ]
    text.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for timing in timings:
        text.append(
            f"| {timing.model} | {timing.parameters:,} | {timing.size} x {timing.size} | {timing.batch} | "
            f"{timing.naive:.3f} | {timing.cached:.3f} | {timing.naive / timing.cached:.1f} | "
            f"{'yes' if timing.same else 'NO'} |"
        )
        records.append({**timing._asdict(), **about})
    with atomic_write(out / "table.md") as file:
        file.write("\n".join([*text, ""]).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
