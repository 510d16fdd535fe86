"""Several processes that `torchrun` started, working as one.

All of them run the same program and train on their parts of each batch. What must be the same
everywhere (what a file holds, which channels go, what is fastest) the first process finds out
alone, and tells the others: `agreed`. It alone writes, too. Without torchrun there is one
process, the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from rmprune.errors import PeerError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # the first process may search for long while the others wait


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
        backend = "cpu:gloo,cuda:nccl"
    store, number, size = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # Restarted processes get the store of before, with the addresses of those that are gone.
        store = PrefixStore(f"attempt {_restarts()}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def is_restarted() -> bool:
    """Whether torchrun has started these processes again, after others were lost."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device() -> torch.device:
    """The GPU of this process."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def cores() -> int:
    """CPU cores that this process may use, those of this machine shared out."""
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    else:
        found = os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def agreed(compute: Callable[[], T]) -> T:
    """What the first process computes, in all of them.

    Raises:
        PeerError: In the other processes, where the first one raised; it raises what it did.
    """
    if count() == 1:
        return compute()
    outcome: list[Any] = [None, True]
    try:
        if is_first():
            outcome = [compute(), False]
    finally:
        dist.broadcast_object_list(outcome, src=0)
    value, failed = outcome
    if failed:
        raise PeerError("the first process failed")
    return value  # type: ignore[no-any-return]


def total(values: Tensor) -> Tensor:
    """The sum over all processes, a new tensor like the given one."""
    values = values.clone()
    if count() > 1:
        dist.all_reduce(values)
    return values


def part(items: int) -> slice:
    """Which of so many items are this process's; those of all together are all, once each."""
    return slice(rank(), items, count())
