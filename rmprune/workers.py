"""Where the jobs of a sweep run: here one after the other, in processes, or on a Ray cluster.

A job is a function of a module with its arguments, which can be pickled; its result, too.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch

from rmprune.errors import UsageError, first_line
from rmprune.extras import extra
from rmprune.processes import cores
from rmprune.progress import Track, no_progress

RETRIES = 3  # of a job whose process or node is lost: one that needs too much memory kills them all

Job = Callable[[], Any]
Outcome = Callable[[], Any]  # returns a job's result, or raises what it raised


class Workers(Protocol):
    """Runs jobs.

    Attributes:
        track: For the progress of jobs.
    """

    track: Track

    def start(self, jobs: Iterable[Job]) -> list[int]:
        """Begin with some jobs, before those that wait; return a number for each."""

    def finished(self) -> tuple[int, Outcome]:
        """Wait until any job is done; return its number and what came of it."""

    def close(self) -> None:
        """Let go of everything; jobs that are not done are lost."""


class Here:
    """This process, one job after the other; what is started last comes first."""

    def __init__(self, track: Track = no_progress) -> None:
        self.track = track
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, Job]] = []

    def start(self, jobs: Iterable[Job]) -> list[int]:
        """Put jobs in front of those that wait."""
        new = list(zip(self._numbers, jobs, strict=False))
        self._waiting = new + self._waiting
        return [number for number, _ in new]

    def finished(self) -> tuple[int, Outcome]:
        """Do the first job that waits, when its outcome is asked for."""
        return self._waiting.pop(0)

    def close(self) -> None:
        """Nothing is held."""


class Processes:
    """Processes of this machine, which divide its cores between them.

    Args:
        count: How many.

    Raises:
        UsageError: There are fewer cores.
    """

    track: Track = staticmethod(no_progress)

    def __init__(self, count: int) -> None:
        if count > cores():
            raise UsageError(f"{count} jobs at once need as many cores, but there are {cores()}")
        self._threads = cores() // count
        self._pool = concurrent.futures.ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn")
        )
        self._numbers = itertools.count()
        self._running: dict[concurrent.futures.Future[Any], int] = {}

    def start(self, jobs: Iterable[Job]) -> list[int]:
        """Give jobs to the pool, which takes them in the order of their coming."""
        new = {
            self._pool.submit(_with_threads, self._threads, job): number
            for job, number in zip(jobs, self._numbers, strict=False)
        }
        self._running |= new
        return list(new.values())

    def finished(self) -> tuple[int, Outcome]:
        """Wait for any process."""
        done, _ = concurrent.futures.wait(
            self._running, return_when=concurrent.futures.FIRST_COMPLETED
        )
        future = next(iter(done))
        return self._running.pop(future), future.result

    def close(self) -> None:
        """Stop the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class RayCluster:
    """A Ray cluster. A job whose node is lost is done again on another one, three times at most.

    Args:
        address: Of the cluster; ``"local"`` starts one on this machine.
        cpus: That a job takes.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """

    track: Track = staticmethod(no_progress)

    def __init__(self, address: str, cpus: int = 1) -> None:
        self._ray = extra("ray", "--ray", "ray")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address == "local":
                self._ray.init(include_dashboard=False, **quiet)
            else:
                _check_reachable(address)
                self._ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise UsageError(f"no Ray cluster at {address}: {reason}") from error
        gpus = 1 if self._ray.cluster_resources().get("GPU") else 0
        # What a job raises is its result; only a lost process or node makes Ray try again.
        self._remote = self._ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )(_with_threads)
        self._cpus = cpus
        self._numbers = itertools.count()
        self._running: dict[Any, int] = {}

    def start(self, jobs: Iterable[Job]) -> list[int]:
        """Give jobs to the cluster."""
        new = {
            self._remote.remote(self._cpus, job): number
            for job, number in zip(jobs, self._numbers, strict=False)
        }
        self._running |= new
        return list(new.values())

    def finished(self) -> tuple[int, Outcome]:
        """Wait for any job."""
        (done, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        return self._running.pop(done), partial(self._result, done)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def close(self) -> None:
        """Leave the cluster, and stop it if it was started here."""
        self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _with_threads(threads: int, job: Job) -> Any:
    torch.set_num_threads(threads)
    return job()
