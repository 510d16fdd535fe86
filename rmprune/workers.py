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
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _Begun:
    """A job, its number, and how often it was begun again."""

    number: int
    job: Job
    retries: int = 0


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
        self._count, self._threads = count, cores() // count
        self._pool = self._new_pool()
        self._numbers = itertools.count()
        self._running: dict[concurrent.futures.Future[Any], _Begun] = {}

    def _new_pool(self) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            self._count, multiprocessing.get_context("spawn")
        )

    def start(self, jobs: Iterable[Job]) -> list[int]:
        """Give jobs to the pool, which takes them in the order of their coming."""
        new = [_Begun(number, job) for job, number in zip(jobs, self._numbers, strict=False)]
        for begun in new:
            self._submit(begun)
        return [begun.number for begun in new]

    def _submit(self, begun: _Begun) -> None:
        try:
            future = self._pool.submit(_with_threads, self._threads, begun.job)
        except BrokenProcessPool as error:  # found out about, and mended, by `finished`
            future = concurrent.futures.Future()
            future.set_exception(error)
        self._running[future] = begun

    def finished(self) -> tuple[int, Outcome]:
        """Wait for any process; a job whose process is lost begins again, three times at most."""
        while True:
            done, _ = concurrent.futures.wait(
                self._running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            # A lost process ends all that wait with it: the first one to be given up goes first.
            future = max(done, key=lambda future: self._running[future].retries)
            if not isinstance(future.exception(), BrokenProcessPool):
                return self._running.pop(future).number, future.result
            begun = self._running[future]
            if begun.retries >= RETRIES:
                del self._running[future]
                return begun.number, future.result
            self._begin_again()

    def _begin_again(self) -> None:
        """A new pool for all that has no result: one lost process ends the whole pool."""
        lost = [
            (future, begun)
            for future, begun in self._running.items()
            if not future.done() or isinstance(future.exception(), BrokenProcessPool)
        ]
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._new_pool()
        for place, (future, begun) in enumerate(lost):
            del self._running[future]
            # The first ones were running, and one of them may be what ended its process.
            self._submit(replace(begun, retries=begun.retries + (place < self._count)))

    def close(self) -> None:
        """Stop the processes."""
        processes = list((self._pool._processes or {}).values())  # public from Python 3.14 on
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


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
