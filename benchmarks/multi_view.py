"""Reconstruction from several views: train one run, then score it on 1, 2, ... views of each test item, as one table.

    python benchmarks/multi_view.py --config configs/multi_view_r2n2.yaml --out runs/multi_view_r2n2 --views 1 2 3 4

The views are the first ones of each item, so that one view is the one that single-view networks are scored on. Leaves
table.md and table.jsonl beside the run folder's own files. Interrupted, it goes on where it was.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.markdown import Markdown

from vision3dgen.config import load
from vision3dgen.experiment import Run, environment, predictor
from vision3dgen.files import atomic_write
from vision3dgen.metrics import Scores, Summary

console = Console(width=None if sys.stdout.isatty() else 160)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", help="a named set of overrides in the configuration, such as tiny")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    run = Run.create(options.out, load(options.config, options.overrides, preset=options.preset))
    run.experiment.prepare_data()
    run.train(resume=True)
    tables = {
        protocol: {views: score(run, protocol, views, device) for views in options.views}
        for protocol in run.experiment.evaluation.names
    }
    write_tables(options.out, tables)
    console.print(Markdown((options.out / "table.md").read_text()))
    return 0


def score(run: Run, protocol: str, views: int, device: torch.device) -> Scores:
    """Scores of the run under a protocol from the first `views` views of each item of its evaluation's split."""
    experiment = run.experiment
    split = experiment.evaluation.split
    dataset = experiment.dataset(split, views="first", views_per_item=views)
    return experiment.evaluation.evaluate(
        protocol,
        experiment.batches(dataset, experiment.evaluation.batch_size),
        predictor(run.model(device), device),
        run.folder / "evaluation" / f"views_{views}",
        split=split,
        seed=experiment.seed,
        about={"weights": run.weights(), "views": views},
    )


def write_tables(out: Path, tables: Mapping[str, Mapping[int, Scores]]) -> None:
    """table.md for people and table.jsonl, a line per protocol and number of views, for programs."""
    known = environment()
    machine = f"{known['device']}, {known['threads']} threads, torch {known['torch']}"
    text = [f"Measured {date.today().isoformat()} on {machine}.\n"]
    records = []
    for protocol, scores in tables.items():
        text += [f"## Protocol `{protocol}`\n", by_views(scores)]
        for views, found in scores.items():
            records.append({"date": date.today().isoformat(), "views": views, "environment": known} | found.to_dict())
    with atomic_write(out / "table.md") as file:
        file.write("\n".join(text).encode())
    with atomic_write(out / "table.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def by_views(scores: Mapping[int, Scores]) -> str:
    """Numbers of views by row, the headline averages by column."""
    summaries = {views: found for views, found in scores.items() if isinstance(found, Summary)}
    hidden = ("Precision", "Recall", "Accuracy", "Completeness")
    columns = [
        name
        for name in dict.fromkeys(name for found in summaries.values() for name in found.headline)
        if not name.startswith(hidden)
    ]
    rows = [
        ["views", *(name.replace("|", "\\|") for name in columns), "ok / empty / failed"],
        ["---:", *["---:"] * (len(columns) + 1)],
    ]
    for views, found in summaries.items():
        values = [found.headline.get(name) for name in columns]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        rows.append([str(views), *cells, f"{found.n_ok} / {found.n_empty} / {found.n_failed}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
