"""Work divided among processes: order, laziness, time-outs, deaths and errors."""

import multiprocessing
import os
import time

import pytest
import torch

from vision3dgen.parallel import AHEAD, Lost, as_finished, map_in_order


def work(job):
    """A number's square as a tensor, or what the job says."""
    if job == "die":
        os._exit(9)
    if job == "hang":
        time.sleep(600)
    if job == "raise":
        raise OSError("this job is bad")
    assert torch.get_num_threads() == 1
    return (torch.tensor(job) ** 2).tolist()


def test_a_lost_job_costs_only_itself():
    jobs = [2, "hang", 3, "die", 5, 7, "die", 11]
    found = dict(as_finished(work, jobs, workers=2, timeout=5))
    assert [found[i] for i in (0, 2, 4, 5, 7)] == [4, 9, 25, 49, 121]
    assert found[1] == Lost("it took more than 5 s")
    assert found[3] == found[6] == Lost("its process died (out of memory, or a crash)")
    assert not multiprocessing.active_children()


def test_errors_of_jobs_and_of_their_making_come_out_and_end_the_processes():
    with pytest.raises(OSError, match="this job is bad"):
        list(as_finished(work, [1, "hang", "raise"], workers=2))
    assert not multiprocessing.active_children()

    def jobs():
        yield 3
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(as_finished(work, jobs(), workers=0))


def test_jobs_are_drawn_a_few_ahead():
    drawn = []

    def jobs():
        for number in range(50):
            drawn.append(number)
            yield number

    for workers, ahead in ((0, 1), (1, AHEAD)):
        drawn.clear()
        taken = 0
        for index, result in as_finished(work, jobs(), workers=workers):
            assert result == index**2
            taken += 1
            assert len(drawn) - taken <= ahead
        assert taken == 50


def test_in_order_whatever_the_number_of_processes():
    for workers in (1, 2):
        assert list(map_in_order(work, list(range(17)), workers=workers, title="squares")) == [n**2 for n in range(17)]
    assert list(map_in_order(work, [], workers=2, title="squares")) == []
    with pytest.raises(RuntimeError, match="job 1 has no result: its process died"):
        list(map_in_order(work, [3, "die"], workers=2, title="squares"))


def test_bad_settings():
    with pytest.raises(ValueError, match="a timeout needs workers"):
        list(as_finished(work, [1], workers=0, timeout=1))
    for settings in ({"workers": -1}, {"workers": 1, "timeout": 0}):
        with pytest.raises(ValueError, match="workers must be at least 0 and timeout above 0"):
            list(as_finished(work, [1], **settings))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        list(map_in_order(work, [1], workers=0, title=""))
