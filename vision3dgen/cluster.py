"""Jobs on a Ray cluster: tasks of one CPU, placed and restarted by Ray."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from vision3dgen.parallel import Lost, one_thread

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_AHEAD = 2  # tasks per CPU that wait in the cluster
_POLL = 5.0  # seconds between looks at the clock


def as_finished(
    function: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    *,
    address: str | None,
    workers: int | None,
    timeout: float | None,
) -> Iterator[tuple[int, _Result | Lost]]:
    """Number and result of each job as it finishes; see `parallel.Ray`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to be counted
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ours = not ray.is_initialized()
    if ours:
        where: dict[str, Any] = {"address": address} if address else {"include_dashboard": False, "num_cpus": workers}
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **where)
    try:
        yield from _run(function, jobs, workers or int(ray.cluster_resources().get("CPU", 1)), timeout)
    finally:
        if ours:
            ray.shutdown()


def _run(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int, timeout: float | None
) -> Iterator[tuple[int, _Result | Lost]]:
    # max_retries 0: who calls decides what a lost job means; the working folder is the caller's
    task = ray.remote(num_cpus=1, max_retries=0)(_task)
    folder = os.getcwd()
    running: dict[Any, tuple[int, float]] = {}
    waiting = iter(enumerate(jobs))
    more = True
    while more or running:
        while more and len(running) < _AHEAD * workers:
            following = next(waiting, None)
            if following is None:
                more = False
            else:
                running[task.remote(function, following[1], folder)] = (following[0], time.monotonic())
        done, _ = ray.wait(list(running), timeout=_POLL) if running else ([], [])
        for reference in done:
            index, _ = running.pop(reference)
            yield index, _result(reference)
        if timeout is not None:
            # a task may have waited for as many as are ahead of it
            late = [r for r, (_, start) in running.items() if time.monotonic() - start > timeout * (_AHEAD + 1)]
            for reference in late:
                index, _ = running.pop(reference)
                ray.cancel(reference, force=True)
                yield index, Lost(f"it took more than {timeout:g} s")


def _task(function: Callable[[_Job], _Result], job: _Job, folder: str) -> _Result:
    os.chdir(folder)
    with one_thread():
        return function(job)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except WorkerCrashedError:
        return Lost("its process died (out of memory, or a crash)")
    except OutOfMemoryError:
        return Lost("its process died (out of memory)")
    except RayTaskError as error:
        raise error.cause from error
