"""Work divided among processes whose results do not depend on how many there are.

`Local` is this machine, `Ray` a cluster; a job may also be limited in time and memory (`limited`), wherever it runs.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from types import FrameType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

AHEAD = 8  # jobs per worker that are drawn before a result is waited for


class Lost(NamedTuple):
    """Why a job has no result."""

    reason: str


class Engine(ABC):
    """Where jobs run, in processes of one thread each."""

    @abstractmethod
    def run(
        self, function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, timeout: float | None = None
    ) -> Iterator[tuple[int, _Result | Lost]]:
        """Number and result of each job as it finishes; `Lost` if its process dies or takes more than `timeout` s."""


@dataclass(frozen=True)
class Local(Engine):
    """So many processes on this machine; 0: this process itself, which nothing protects from its jobs."""

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    def run(
        self, function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, timeout: float | None = None
    ) -> Iterator[tuple[int, _Result | Lost]]:
        workers = min(self.workers, len(jobs))
        yield from as_finished(function, jobs, workers=workers, timeout=timeout if workers else None)


@dataclass(frozen=True)
class Ray(Engine):
    """A Ray cluster: the one at an address ("auto": the one this machine belongs to), else a new one of this machine.

    Files are read and written by the machines of the cluster: their paths must mean the same on all of them.
    """

    address: str | None = None
    workers: int | None = None  # jobs at once; default as many as the cluster has CPUs

    def run(
        self, function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, timeout: float | None = None
    ) -> Iterator[tuple[int, _Result | Lost]]:
        try:
            from vision3dgen import cluster
        except ImportError as error:
            raise ImportError('engine "ray" needs Ray: pip install "vision3dgen[cluster]"') from error
        yield from cluster.as_finished(function, jobs, address=self.address, workers=self.workers, timeout=timeout)


@contextmanager
def limited(*, seconds: float | None = None, mebibytes: int | None = None) -> Iterator[None]:
    """A block that raises TimeoutError after so many seconds, and MemoryError (torch: RuntimeError) above so much
    memory.

    Time counts by the clock, and a single call into a library is not interrupted before it ends; only in a process's
    main thread. Memory is all the data of the process (its size when idle included), and is limited on Linux alone.
    """
    import resource  # Windows has neither this nor the alarm, and does without limits

    if (seconds is not None and not seconds > 0) or (mebibytes is not None and not mebibytes > 0):
        raise ValueError(f"limits must be above 0, got {seconds} s and {mebibytes} MiB")

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, late) if seconds is not None else None
    try:
        if mebibytes is not None:
            most = mebibytes << 20
            if before[1] != resource.RLIM_INFINITY:
                most = min(most, before[1])
            resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def map_in_order(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, workers: int, title: str
) -> Iterator[_Result]:
    """`function` of each job, in order, by so many processes of one thread each; a bar shows on terminals.

    function: defined at the top of a module, with picklable jobs and results, unless there is one worker.
    Raises ValueError for fewer than one worker, RuntimeError if a process dies, and whatever the function raises.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    yield from tracked(_in_order(function, jobs, min(workers, len(jobs))), title=title, total=len(jobs))


def tracked(things: Iterable[_Result], *, title: str, total: int | None = None) -> Iterator[_Result]:
    """The things, one by one, with a bar and the time that is left on a terminal's standard error, and nothing else.

    total: how many there are, for things that have no length.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), "ETA", TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(things, total=total, description=title)


def _in_order(function: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int) -> Iterator[_Result]:
    early: dict[int, _Result] = {}
    following = 0
    for index, result in as_finished(function, jobs, workers=workers if workers > 1 else 0):
        if isinstance(result, Lost):
            raise RuntimeError(f"job {index} has no result: {result.reason}")
        early[index] = result
        while following in early:
            yield early.pop(following)
            following += 1


def as_finished(
    function: Callable[[_Job], _Result], jobs: Iterable[_Job], *, workers: int, timeout: float | None = None
) -> Iterator[tuple[int, _Result | Lost]]:
    """Number and result of each job as it finishes, by so many processes of one thread each; 0: by this one, in order.

    Jobs are drawn when they are needed, a few ahead, so that making them and doing them overlap. A job that runs for
    more than `timeout` seconds, or whose process dies, is `Lost`: the process is ended and replaced, and the others go
    on. function: as in `map_in_order`, unless there are no workers. Raises ValueError for a `timeout` without workers,
    RuntimeError if no process can be started, and whatever the function or the making of jobs raises.
    """
    if workers < 0 or (timeout is not None and timeout <= 0):
        raise ValueError(f"workers must be at least 0 and timeout above 0, got {workers} and {timeout}")
    if workers == 0:
        if timeout is not None:
            raise ValueError("a timeout needs workers: what runs in this process cannot be ended")
        for index, job in enumerate(jobs):
            with one_thread():
                result = function(job)
            yield index, result
        return
    crew = [_Worker(function, timeout) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker[_Job, _Result]] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def run(job: _Job) -> _Result | Lost:
        worker = idle.get()
        try:
            return worker.do(job)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    pending: dict[Future[_Result | Lost], int] = {}
    try:
        for index, job in enumerate(jobs):
            pending[threads.submit(run, job)] = index
            yield from _take(pending, block=len(pending) >= AHEAD * workers)
        while pending:
            yield from _take(pending, block=True)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in crew:
            worker.close()
        threads.shutdown()


def _take(pending: dict[Future[_Result | Lost], int], *, block: bool) -> Iterator[tuple[int, _Result | Lost]]:
    """Results that are there, at least one if `block`; they leave `pending`."""
    done, _ = wait(pending, timeout=None if block else 0, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=pending.__getitem__):
        yield pending.pop(future), future.result()


class _Worker(Generic[_Job, _Result]):
    """A process that does one job after another and is replaced when it dies or takes too long."""

    def __init__(self, function: Callable[[_Job], _Result], timeout: float | None):
        self.function, self.timeout = function, timeout
        self.pool: ProcessPoolExecutor | None = None
        self.process = 0
        self.closed = False

    def do(self, job: _Job) -> _Result | Lost:
        work = pickle.dumps((self.function, job))  # bytes: torch would send tensors as open files, which run out
        try:
            future = self._started().submit(_call, work)
        except BrokenProcessPool:  # it died between two jobs
            self._end()
            future = self._started().submit(_call, work)
        try:
            return future.result(self.timeout)
        except BrokenProcessPool:
            reason = "its process died (out of memory, or a crash)"
        except TimeoutError:
            if future.done():  # in the last moment, or it is the function's own error
                return future.result()
            reason = f"it took more than {self.timeout:g} s"
        self._end()
        return Lost(reason)

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            spawn = multiprocessing.get_context("spawn")  # forked processes hang in OpenMP once the parent has used it
            self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin)
            try:
                self.process = self.pool.submit(_ready, pickle.dumps(self.function)).result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "no worker process can be started; a script that uses workers must do its work under "
                    'if __name__ == "__main__":, because each of them imports it'
                ) from error
            if self.closed:
                self._end()
                raise RuntimeError("closed")
        return self.pool

    def _end(self) -> None:
        """End the process, whatever it is doing."""
        for child in multiprocessing.active_children():
            if child.pid == self.process:
                child.kill()
        pool, self.pool, self.process = self.pool, None, 0
        if pool is not None:
            pool.shutdown()

    def close(self) -> None:
        self.closed = True
        self._end()


def _begin() -> None:
    """One thread, and no life after the parent's: its other workers would wait for jobs for ever."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _ready(function: bytes) -> int:
    """The number of this process, which now has imported what the function needs: no job's time counts that."""
    pickle.loads(function)
    return os.getpid()


def _call(work: bytes) -> Any:
    function, job = pickle.loads(work)
    return function(job)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, as in a worker: the order of sums, so their last bit, may depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
