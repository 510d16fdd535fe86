"""Whether a training goes through `torch.compile`: measured before it begins."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from rmprune.processes import agreed

Compile = Literal["auto", "off", "on"]
STEPS_WORTH_TIMING = 500
SECONDS_WORTH_COMPILING = 300.0  # compiling takes about a minute and saves about a fifth
ROUNDS = 5


def is_worth_timing(steps: int) -> bool:
    """Whether a training of so many steps could be faster compiled, and can be compiled here."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    return steps >= STEPS_WORTH_TIMING and any(map(shutil.which, compilers))


def pays(step: Callable[[], object], compiled_step: Callable[[], object], steps: int) -> bool:
    """Whether steps are faster compiled, in a training that is long enough to repay it.

    With several processes all of them call this; the first one decides.

    Args:
        step: Does what a step does, and waits for the device.
        compiled_step: The same; compiles when it is called first.
        steps: Of the training.
    """
    _time(step)
    seconds = statistics.median(_time(step) for _ in range(ROUNDS))
    if agreed(lambda: seconds * steps < SECONDS_WORTH_COMPILING):
        return False
    for _ in range(2):  # the second time with the memory of the first
        _time(compiled_step)
    pairs = [(_time(step), _time(compiled_step)) for _ in range(ROUNDS)]
    eager, compiled = (statistics.median(times) for times in zip(*pairs, strict=True))
    return agreed(lambda: bool(compiled < eager))


def compiled(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The module through `torch.compile`; on a GPU as CUDA graphs, which spare the launches.

    Results of a call on a GPU hold until `begin_step`.
    """
    # Graphs would have to hold what DistributedDataParallel sends between the kernels.
    graphs = device.type == "cuda" and not isinstance(module, nn.parallel.DistributedDataParallel)
    return torch.compile(module, mode="reduce-overhead" if graphs else None)


def begin_step(device: torch.device) -> None:
    """Let compiled modules reuse the memory of the step before."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


@contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Steps inside leave no trace in buffers, gradients and generators."""
    buffers = {name: values.clone() for name, values in model.named_buffers()}
    generators = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=generators):
            yield
    finally:
        with torch.no_grad():
            for name, values in model.named_buffers():
                values.copy_(buffers[name])
        model.zero_grad(set_to_none=True)


def _time(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
