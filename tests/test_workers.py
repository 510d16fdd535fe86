"""Jobs run where they are sent to, and come back once each."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from rmprune.errors import UsageError
from rmprune.workers import RETRIES, Here, Processes, RayCluster


def collected(workers, jobs):
    """What came of jobs, by their numbers; errors by name."""
    waiting, found = set(workers.start(jobs)), {}
    while waiting:
        number, outcome = workers.finished()
        waiting.remove(number)
        try:
            found[number] = outcome()
        except Exception as error:
            found[number] = type(error).__name__
    return [found[number] for number in sorted(found)]


def divide(a, b):
    return a / b


def threads():
    return os.getpid(), torch.get_num_threads()


def test_here_what_was_started_last_comes_first():
    workers, done = Here(), []
    workers.start([partial(done.append, 1), partial(done.append, 2)])
    for expected in (1, 4, 5, 2):
        workers.finished()[1]()
        assert done[-1] == expected
        if expected == 1:
            workers.start([partial(done.append, 4), partial(done.append, 5)])


def test_processes_share_the_cores():
    workers = Processes(2)
    try:
        jobs = [partial(divide, 6, 3), partial(divide, 1, 0), threads]
        *values, (process, count) = collected(workers, jobs)
        assert values == [2.0, "ZeroDivisionError"]
        assert process != os.getpid()
        assert count == len(os.sched_getaffinity(0)) // 2
    finally:
        workers.close()
    with pytest.raises(UsageError, match="as many cores"):
        Processes(10_000)


def die(path, times):
    """End the process so many times, and then give what was asked."""
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    if len(path.read_text()) <= times:
        os._exit(9)
    return "alive"


@pytest.mark.parametrize(("times", "outcome"), [(1, "alive"), (99, "BrokenProcessPool")])
def test_a_lost_process_costs_no_other_job(tmp_path, times, outcome):
    workers = Processes(1)
    try:
        jobs = [partial(divide, 6, 3), partial(die, tmp_path / "deaths", times)]
        # Many wait behind it, any of which may be the first that is heard to be lost.
        found = collected(workers, [*jobs, *[partial(divide, 8, 2)] * 10])
        assert found == [2.0, outcome, *[4.0] * 10]
        assert len((tmp_path / "deaths").read_text()) <= 1 + RETRIES
        assert collected(workers, [partial(divide, 9, 3)]) == [3.0]
    finally:
        workers.close()


def test_closing_stops_what_runs(tmp_path):
    workers = Processes(1)
    workers.start([partial(late, tmp_path / "begun", tmp_path / "done")])
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    workers.close()
    time.sleep(2)
    assert not (tmp_path / "done").exists()


def late(begun, done):
    begun.touch()
    time.sleep(1)
    done.touch()


def slow(number):
    time.sleep(1)
    return number


def test_jobs_of_a_lost_node_are_done_on_another(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the jobs are defined
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    workers = RayCluster(cluster.address)
    try:
        jobs = [partial(divide, 1, 0), *(partial(slow, number) for number in range(12))]
        waiting, found = set(workers.start(jobs)), []
        while waiting:
            number, outcome = workers.finished()
            waiting.remove(number)
            if number == 0:
                with pytest.raises(ZeroDivisionError):
                    outcome()
                continue
            found.append(outcome())
            if len(found) == 2:
                cluster.remove_node(nodes[0], allow_graceful=False)
        assert sorted(found) == list(range(12))
    finally:
        workers.close()
        cluster.shutdown()


def test_no_cluster():
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="no Ray cluster at"):
        RayCluster("127.0.0.1:1")
