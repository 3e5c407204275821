"""Work divided among processes whose results do not depend on how many there are."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def map_in_order(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, workers: int, title: str
) -> Iterator[_Result]:
    """`function` of each job, in order, by so many processes of one thread each; a bar shows on terminals.

    function: defined at the top of a module, with picklable jobs and results, unless there is one worker.
    Raises ValueError for fewer than one worker, and whatever the function raises.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(_results(function, jobs, min(workers, len(jobs))), total=len(jobs))


def _results(function: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int) -> Iterator[_Result]:
    if workers <= 1:
        with one_thread():
            for job in jobs:
                yield function(job)
        return
    spawn = multiprocessing.get_context("spawn")  # forked processes hang in OpenMP once the parent has used it
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, as in a worker: the order of sums, so their last bit, may depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
