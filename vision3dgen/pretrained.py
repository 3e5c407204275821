"""Trained models to share: a folder of weights, configuration and a card, here or on the Hugging Face hub.

    FOLDER/model.safetensors   the weights `Run.model` loads: the best checkpoint's, their average where there is one
    FOLDER/config.yaml         the experiment, so that the folder is a run folder to every command but train
    FOLDER/README.md           the card: what it is, its scores with their protocols, how it was trained

Nothing in it is pickled, and no code in it is run: a folder from a stranger can be wrong, but not harmful.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from vision3dgen import __version__
from vision3dgen.config import ConfigError
from vision3dgen.experiment import MODEL_FILE, Run
from vision3dgen.files import atomic_write
from vision3dgen.viz.report import Evaluation, Record, read_run

FILES = ("config.yaml", MODEL_FILE, "README.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_pretrained(
    run: Run | str | os.PathLike[str], folder: str | os.PathLike[str], *, title: str = "", license: str = ""
) -> Path:
    """Write a trained run as a folder to share, and return it.

    title: of the card, the run's name by default; license: of the weights, an SPDX identifier, left open by default.
    Raises ConfigError for a run without a whole checkpoint, and for a folder that holds something else.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    folder = Path(folder)
    weights = run.weights_file()
    if folder.resolve() == run.folder.resolve() or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} is a run folder: choose another one to share")
    foreign = sorted(path.name for path in folder.glob("*") if path.name not in FILES) if folder.is_dir() else []
    if foreign:
        raise ConfigError(f"{folder} holds {foreign}, which are not of a model to share: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in ((weights, MODEL_FILE), (run.folder / "config.yaml", "config.yaml")):
        with atomic_write(folder / name) as file, open(source, "rb") as content:
            shutil.copyfileobj(content, file)
    with atomic_write(folder / "README.md") as file:
        file.write(card(run, title=title, license=license).encode("utf-8"))
    return folder


def from_pretrained(
    source: str | os.PathLike[str], *, revision: str | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model in a folder, or under an id "owner/name" of the hub, in evaluation mode.

    Raises ValueError or OSError for a source that is neither, or whose files do not fit each other, and ImportError
    naming the pip line where an id is given without huggingface_hub.
    """
    return open_pretrained(source, revision=revision).model(device)


def open_pretrained(source: str | os.PathLike[str], *, revision: str | None = None) -> Run:
    """As `from_pretrained`, the run: to reconstruct, sample or evaluate with."""
    folder = Path(source)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(os.fspath(source)):
            raise ConfigError(f"{os.fspath(source)!r} is neither a folder nor an id owner/name of the hub")
        hub = _hub()
        folder = Path(hub.snapshot_download(os.fspath(source), revision=revision, allow_patterns=list(FILES)))
    return Run.open(folder)


def push_to_hub(folder: str | os.PathLike[str], name: str, *, private: bool = True) -> str:
    """Upload what `save_pretrained` wrote as owner/name, by the account of huggingface_hub, and return its address."""
    folder = Path(folder)
    missing = [file for file in FILES if not (folder / file).exists()]
    if missing:
        raise ConfigError(f"{folder} has no {', '.join(missing)}: write it with save_pretrained first")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"the hub's names are owner/name, got {name!r}")
    api = _hub().HfApi()
    address = str(api.create_repo(name, private=private, exist_ok=True))
    api.upload_folder(folder_path=str(folder), repo_id=name, allow_patterns=list(FILES))
    return address


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('the hub needs huggingface_hub: pip install "vision3dgen[hub]"') from error
    return huggingface_hub


# --------------------------------------------------------------------------------------------------------- card


def card(run: Run, *, title: str = "", license: str = "") -> str:
    """What a reader of the weights must know, in Markdown with the hub's header."""
    record = read_run(run.folder)
    model = run.experiment.model
    header: dict[str, Any] = {"library_name": "vision3dgen", "tags": ["vision3dgen", str(model["name"])]}
    header |= {"license": license} if license else {}
    parameters = sum(p.numel() for p in run.model().parameters())
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {title or run.folder.resolve().name}",
        f"`{_described(model)}`, {parameters:,} parameters.",
        "```python\nfrom vision3dgen.pretrained import from_pretrained\n\n"
        'model = from_pretrained("FOLDER or owner/name")\n```',
        "## Scores",
        *(list(_scores(record)) or ["Not scored."]),
        "## Training",
        *_training(record),
        f"Written by vision3dgen {__version__}; weights SHA-256 `{run.weights()}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _described(node: Mapping[str, Any]) -> str:
    parts = [
        f"{key}: {_described(value)}" for key, value in node.items() if isinstance(value, Mapping) and "name" in value
    ]
    return str(node["name"]) + (f" ({', '.join(parts)})" if parts else "")


def _scores(record: Record) -> Iterator[str]:
    for evaluation in record.evaluations:
        known = {name: value for name, value in evaluation.values.items() if value is not None}
        rows = [
            f"| {name.replace('|', chr(92) + '|')} | {value:.4f}{_spread(evaluation, name)} |"
            for name, value in known.items()
        ]
        counts = ", ".join(f"{key} {value}" for key, value in evaluation.counts.items())
        yield f"Protocol `{evaluation.name}`, {evaluation.split} split, seed {evaluation.seed}; {counts}."
        yield "\n".join(["| metric | value |", "| --- | ---: |", *rows])
        protocol = json.dumps(evaluation.protocol, indent=2)
        yield f"<details><summary>What moves these numbers</summary>\n\n```json\n{protocol}\n```\n</details>"


def _spread(evaluation: Evaluation, name: str) -> str:
    spread = evaluation.spread.get(name)
    return f" ± {spread:.1g}" if spread else ""


def _training(record: Record) -> Iterator[str]:
    last = record.checkpoints[-1] if record.checkpoints else {}
    if last:
        yield f"{last.get('step')} steps with `config.yaml`."
    rows = {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in record.environment.items()}
    if rows:
        lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
        yield "\n".join(["| | |", "| --- | --- |", *lines])
