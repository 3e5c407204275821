"""Scores of a whole set of items, resumable, by one process or many, with nothing dropped in silence.

`evaluate` writes one JSON line per item and returns a `Summary`; `evaluate_distributed` does the same with the
processes of a group, and leaves the same file. Neither the number of workers nor that of processes moves a number: only
the entry `seconds` of a line, which no summary has, tells them apart.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from vision3dgen.engine.loading import to_device
from vision3dgen.metrics.prediction import Job, Prediction, blank_row, job_of, predict_batch, score_job, truths_of
from vision3dgen.metrics.protocols import Protocol
from vision3dgen.metrics.results import Batch, Row, score_by_all, score_by_one
from vision3dgen.metrics.summary import Summary, summarize
from vision3dgen.parallel import Lost, as_finished

Predict = Callable[[Batch], Sequence[Prediction]]


def evaluate(
    items: Iterable[Batch],
    predict: Predict,
    protocol: Protocol,
    *,
    out: str | os.PathLike[str] | None,
    seed: int,
    repeats: int,
    about: Mapping[str, Any] | None = None,
    ceiling: bool = True,
    workers: int = 0,
    timeout: float | None = None,
) -> Summary:
    """Score `predict` on every item of a loader's batches under a protocol.

    items: batches with keys id, category, frame, and what the protocol needs of mesh, surface, voxels, points,
    occupancies, camera. predict: one `Prediction` per item of a batch, called in this process without gradients.
    out: file of one JSON line per item after a header; items already in it are not predicted again, and a line cut by a
    kill is dropped. repeats: independent samplings of every shape; the spread is taken over them.
    about: free entries for the header, such as the checkpoint's hash: results of another header are never mixed in.
    ceiling: whether every truth is scored against itself too. workers: processes that score while this one predicts;
    0 scores in this process. timeout: seconds after which the scoring of one item is given up, with workers.

    An exception in `predict` fails its batch; one in scoring, a time-out, and a worker that dies fail the item; all are
    counted and listed. Raises ValueError for what is wrong with all items alike: frames that differ, missing keys, an
    id seen twice, another header in `out`.
    """
    header = _header(protocol, seed, repeats, about, ceiling)
    run = _Run(predict, protocol, header, workers, timeout)
    if out is None:
        order, rows = _score_all(items, run, {}, None)
        return summarize(header, [rows[name] for ids in order for name in ids])
    path = Path(out)
    return summarize(header, score_by_one(items, path, header, run.score))


def evaluate_distributed(
    batches: Sequence[Batch],
    predict: Predict,
    protocol: Protocol,
    *,
    out: str | os.PathLike[str],
    seed: int,
    repeats: int,
    about: Mapping[str, Any] | None = None,
    ceiling: bool = True,
    workers: int = 0,
    timeout: float | None = None,
) -> Summary:
    """As `evaluate`, by all processes of a group, which call this together and return the same summary.

    The batches, made when they are indexed, are divided; they stay whole, so that predictions are those of one
    process. `out` must be on a disk that all processes see: each appends to a part of its own beside it, and the first
    one joins the parts at the end, and at the start those that a run of any number of processes left unfinished.
    An error in one process is raised in all.
    """
    path = Path(out)
    header = _header(protocol, seed, repeats, about, ceiling)
    run = _Run(predict, protocol, header, workers, timeout)
    return summarize(header, score_by_all(batches, path, header, run.score))


class _Run(NamedTuple):
    predict: Predict
    protocol: Protocol
    header: dict[str, Any]
    workers: int
    timeout: float | None

    def score(self, batches: Iterable[Batch], done: Mapping[str, Row], file: IO[str]) -> list[list[str]]:
        return _score_all(batches, self, done, file)[0]


def _header(
    protocol: Protocol, seed: int, repeats: int, about: Mapping[str, Any] | None, ceiling: bool
) -> dict[str, Any]:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    header = {"protocol": protocol.to_dict(), "seed": seed, "repeats": repeats, "about": dict(about or {})}
    header |= {} if ceiling else {"ceiling": False}
    return json.loads(json.dumps(header, allow_nan=False))


def _score_all(
    batches: Iterable[Batch], run: _Run, done: Mapping[str, Row], file: IO[str] | None
) -> tuple[list[list[str]], dict[str, Row]]:
    """Ids by batch, and the row of each; rows that are not `done` are written to the file as they are finished."""
    order: list[list[str]] = []
    rows: dict[str, Row] = {}
    sent: list[tuple[Row, float]] = []  # what is known of each job: its row so far, seconds of prediction
    for number, outcome in as_finished(
        _timed, _jobs(batches, run, done, order, sent), workers=run.workers, timeout=run.timeout
    ):
        row, predicting = sent[number]
        if isinstance(outcome, Lost):
            row |= {"reason": f"scoring: {outcome.reason}", "seconds": None}
        else:
            row, scoring = outcome
            row["seconds"] = round(predicting + scoring, 4)
        rows[row["id"]] = row
        if file is not None:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
    return order, rows | {name: done[name] for ids in order for name in ids if name in done}


def _jobs(
    batches: Iterable[Batch],
    run: _Run,
    done: Mapping[str, Row],
    order: list[list[str]],
    sent: list[tuple[Row, float]],
) -> Iterator[Job]:
    """Predictions to be scored, made as they are asked for; fills `order` and `sent`."""
    seen: set[str] = set()
    for batch in batches:
        truths = truths_of(batch, run.protocol)
        for truth in truths:
            if truth.id in seen:
                raise ValueError(f"item {truth.id!r} comes twice: every id must be scored once")
            seen.add(truth.id)
        order.append([truth.id for truth in truths])
        pending = [index for index, truth in enumerate(truths) if truth.id not in done]
        if not pending:
            continue
        start = time.perf_counter()
        predictions = predict_batch(run.predict, batch, len(truths))
        share_of_one = (time.perf_counter() - start) / len(truths)
        for index in pending:
            start, truth = time.perf_counter(), truths[index]
            job = job_of(
                predictions[index],
                truth,
                run.protocol,
                seed=run.header["seed"],
                repeats=run.header["repeats"],
                ceiling=run.header.get("ceiling", True),
            )
            if run.workers:
                job = to_device(job, torch.device("cpu"))
            sent.append((blank_row(truth.id, truth.category), share_of_one + time.perf_counter() - start))
            yield job


def _timed(job: Job) -> tuple[Row, float]:
    """The row of a job and the seconds it took."""
    start = time.perf_counter()
    return score_job(job), time.perf_counter() - start
