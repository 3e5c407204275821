"""Captions of generated scenes, from nothing to a table and pictures, in one command.

    python benchmarks/captioning.py --out runs/captioning

Makes the scenes, trains a backbone to recognize single objects, pretrains a masked language model, trains four
captioners from that backbone (CNN + LSTM, with soft attention, with a transformer decoder, and that started from the
language model), and scores them on the test split, whose scenes no model has seen, with greedy and with beam search.
Two baselines show what BLEU is worth here: a caption of a training image at random, and that of the training image
with the nearest pixels. Leaves in the output folder: table.md, table.jsonl, attention_NAME.png, curves.png,
scenes.png, and one run folder per model. Interrupted, it goes on where it was.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.markdown import Markdown
from torch import Tensor

from vision3dgen.config import load
from vision3dgen.experiment import Run, environment
from vision3dgen.files import atomic_write
from vision3dgen.language import words_of
from vision3dgen.metrics import Bleu, Caption, Pointing, bleu, pointing
from vision3dgen.viz import attention_gallery, curves, gallery

CONFIGS = Path(__file__).parents[1] / "configs"
OBJECTS = "recognition_objects_scenes"
LANGUAGE = "language_masked_scenes"
CAPTIONERS = {
    "CNN + LSTM": "captioning_lstm_scenes",
    "CNN + LSTM, attention": "captioning_attention_scenes",
    "CNN + transformer": "captioning_transformer_scenes",
    "CNN + transformer, pretrained": "captioning_pretrained_scenes",
}
console = Console(width=None if sys.stdout.isatty() else 160)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the scenes (default: OUT/scenes)")
    parser.add_argument("--preset", help="a named set of overrides in the configurations, such as tiny")
    parser.add_argument("--beams", type=int, default=4, help="of beam search (default: 4)")
    parser.add_argument("--pictures", type=int, default=6, help="test images drawn (default: 6)")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    root = options.data or options.out / "scenes"
    seconds: dict[str, float] = {}

    def train(name: str, *overrides: str) -> Run:
        console.rule(name)
        config = load(CONFIGS / f"{name}.yaml", [f"prepare.root={root}", *overrides], preset=options.preset)
        run = Run.create(options.out / name, config)
        began = time.perf_counter()
        run.experiment.prepare_data()
        seconds["data"] = seconds.get("data", 0) + time.perf_counter() - began
        began = time.perf_counter()
        run.train(resume=True)
        seconds[name] = time.perf_counter() - began
        return run

    objects = train(OBJECTS)
    console.print(Markdown(objects.evaluate("classes").to_markdown()))
    language = train(LANGUAGE)
    console.print(Markdown(language.evaluate("perplexity").to_markdown()))
    runs = {}
    for name, config in CAPTIONERS.items():
        given = [f"weights.backbone={objects.folder}"]
        given += [f"weights.decoder.source={language.folder}"] if "pretrained" in config else []
        runs[name] = train(config, *given)
    began = time.perf_counter()
    rows = baselines(next(iter(runs.values())))
    for name, run in runs.items():
        for beams in dict.fromkeys((1, options.beams)):
            rows.append(measure(name, run, beams, options.out, options.pictures if beams == 1 else 0))
            rows[-1]["training_seconds"] = round(seconds[CAPTIONERS[name]])
    curves({name: run.folder / "metrics.jsonl" for name, run in runs.items()}, options.out / "curves.png")
    draw_scenes(next(iter(runs.values())), options.out / "scenes.png")
    seconds["evaluation"] = time.perf_counter() - began
    write_tables(options.out, rows, seconds)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def measure(name: str, run: Run, beams: int, out: Path, pictures: int) -> dict[str, Any]:
    """BLEU and pointing of a trained captioner on the test split; some of its attention drawn."""
    model = run.model()
    model.beams = beams
    dataset = run.experiment.dataset("test", fields=("image", "tokens", "objects"), mirror=False)
    said: list[list[str]] = []
    captions: list[Caption] = []
    for batch in run.experiment.batches(dataset, run.experiment.evaluation.batch_size):
        predicted = model.predict(batch)
        captions += predicted
        said += [v.decode(c.tokens).split() for v, c in zip(batch["vocabulary"], predicted)]
    items = [dataset[i] for i in range(len(dataset))]
    row = score(f"{name}", "greedy" if beams == 1 else f"beam {beams}", said, [item["captions"] for item in items])
    looked = [(words, c.attention) for words, c in zip(said, captions) if c.attention is not None]
    if looked:
        size = tuple(items[0]["image"].shape[1:])
        row["pointing"] = pointing(looked, [boxes_by_word(item["objects"]) for item in items], size)
        chosen = [round(i * (len(items) - 1) / max(pictures - 1, 1)) for i in range(pictures)]
        if chosen:
            path = out / f"attention_{CAPTIONERS[name].split('_')[1]}.png"
            attention_gallery([items[i]["image"] for i in chosen], [looked[i] for i in chosen], path, size=96)
    return row


def score(name: str, search: str, said: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    known = [[words_of(text) for text in texts] for texts in references]
    exact = sum(list(words) in texts for words, texts in zip(said, known)) / len(said)
    return {"method": name, "search": search, "bleu": bleu(said, known), "exact": exact}


def baselines(run: Run) -> list[dict[str, Any]]:
    """Captions of training images: of one drawn at random, and of the one with the nearest pixels."""
    train, test = (run.experiment.dataset(split, mirror=False) for split in ("train", "test"))
    references = [test[i]["captions"] for i in range(len(test))]
    pixels = torch.stack([train[i]["image"] for i in range(len(train))]).flatten(1)
    nearest = [int((pixels - test[i]["image"].flatten()).square().sum(1).argmin()) for i in range(len(test))]
    drawn = np.random.default_rng(run.experiment.seed).integers(len(train), size=len(test))
    return [
        score(name, "-", [words_of(train.lines[int(i)]["captions"][0]) for i in chosen], references)
        for name, chosen in (("a random training caption", drawn), ("the nearest training image's", nearest))
    ]


def boxes_by_word(objects: Sequence[Any]) -> dict[str, Tensor]:
    """The boxes of all objects that a color or a category, in singular, may mean."""
    boxes: dict[str, list[Tensor]] = {}
    for one in objects:
        for word in (one.color, one.category):
            boxes.setdefault(word, []).append(one.box)
    return {word: torch.stack(found) for word, found in boxes.items()}


def draw_scenes(run: Run, path: Path) -> None:
    """Some test images under what is said of them."""
    dataset = run.experiment.dataset("test", mirror=False)
    items = [dataset[i] for i in range(min(12, len(dataset)))]
    rows = [items[i : i + 4] for i in range(0, len(items), 4)]
    enlarged = [
        [torch.nn.functional.interpolate(item["image"][None], scale_factor=4)[0] for item in row] for row in rows
    ]
    gallery(enlarged, path=path, captions=[[item["captions"][0] for item in row] for row in rows])


def write_tables(out: Path, rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> None:
    """table.md for people and table.jsonl, a line per method and search, for programs."""
    known = environment()
    machine = f"{known['device']}, {known['threads']} threads, torch {known['torch']}"
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    text = [f"Measured {date.today().isoformat()} on {machine}. Seconds: {spent}.\n"]
    head = ["method", "search", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "exact", "attention on the object", "pointing"]
    text += ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 7]
    records = []
    for row in rows:
        result: Bleu = row["bleu"]
        point: Pointing | None = row.get("pointing")
        looked = [f"{point.inside:.2f} of {point.covered:.2f}", f"{point.ratio:.2f}"] if point else ["", ""]
        numbers = [f"{value:.3f}" for value in (*result.scores, row["exact"])]
        text.append("| " + " | ".join([row["method"], row["search"], *numbers, *looked]) + " |")
        record = {"date": date.today().isoformat(), "method": row["method"], "search": row["search"]}
        record |= {f"BLEU-{n}": value for n, value in enumerate(result.scores, start=1)} | {"exact": row["exact"]}
        record |= {"pointing": point and point.ratio, "training_seconds": row.get("training_seconds")}
        records.append(record | {"environment": known})
    text.append(
        '\n"exact": captions that are a reference word for word. "attention on the object": mean share of attention in '
        "the boxes of what a color or category word names, of the share of the image they cover; pointing: mean ratio."
    )
    with atomic_write(out / "table.md") as file:
        file.write("\n".join(text).encode() + b"\n")
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
