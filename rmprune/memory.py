"""How much memory a net's activations need, step by step: what an embedded user asks first."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from rmprune.arena import Life, Plan, plan
from rmprune.layers import (
    ACTIVATIONS,
    ChannelGate,
    PartialActivation,
    PartialGroupNorm,
    ResidualBlock,
)
from rmprune.measure import eval_mode
from rmprune.plain import PlainNet

IN_PLACE = (
    *(*ACTIVATIONS, nn.BatchNorm2d, nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd),
    *(PartialActivation, PartialGroupNorm, ChannelGate),
)


def activation_memory(
    net: PlainNet, example_input: Tensor, bytes_per_value: int = 4
) -> pd.DataFrame:
    """What lives while each layer of a net runs, for one image.

    A layer that works on single values does so in place. A block's input lives until it has
    been added. Nothing is counted for weights.

    Args:
        net: With or without additions.
        example_input: ``(N, C, H, W)``.
        bytes_per_value: 4 in float32, 1 in int8.

    Returns:
        A row for every layer that writes a tensor: ``layer``, ``shape`` of its output,
        ``bytes`` of that, and ``live_bytes``, which counts all that is still needed.
        ``attrs["arena_bytes"]`` is the size of a static arena that holds them all, see
        `rmprune.arena.plan`; that of C source is close to it.
    """
    walk = _Walk(bytes_per_value)
    with torch.no_grad(), eval_mode(net):
        result = walk.layers(net.named_children(), walk.write("input", example_input[:1]))
    walk.needed(result)
    lives = walk.lives()
    rows = [
        {
            "layer": name,
            "shape": "×".join(map(str, shape)),
            "bytes": lives[name].bytes,
            "live_bytes": sum(
                life.bytes for life in lives.values() if life.begin <= step <= life.end
            ),
        }
        for step, (name, shape) in enumerate(walk.shapes.items())
    ]
    table = pd.DataFrame(rows)
    placed: Plan = plan(lives)
    table.attrs["arena_bytes"] = placed.bytes
    return table


class _Walk:
    """Notes what is written and how long it is needed."""

    def __init__(self, bytes_per_value: int) -> None:
        self.bytes_per_value = bytes_per_value
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.last_use: dict[str, int] = {}

    def write(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """A new tensor."""
        self.shapes[name] = tuple(value.shape[1:])
        self.last_use[name] = len(self.shapes) - 1
        return name, value

    def needed(self, *tensors: tuple[str, Tensor]) -> None:
        """These are read by what was written last."""
        for name, _ in tensors:
            self.last_use[name] = len(self.shapes) - 1

    def layers(
        self, layers: Iterable[tuple[str, nn.Module]], x: tuple[str, Tensor], scope: str = ""
    ) -> tuple[str, Tensor]:
        """Run layers one after the other; return the last tensor."""
        for name, layer in layers:
            if isinstance(layer, IN_PLACE):
                x = x[0], layer(x[1])
            elif isinstance(layer, ResidualBlock):
                x = self.block(f"{scope}{name}", layer, x)
            else:
                made = self.write(f"{scope}{name}", layer(x[1]))
                self.needed(x)
                x = made
        return x

    def block(self, name: str, block: ResidualBlock, x: tuple[str, Tensor]) -> tuple[str, Tensor]:
        """A block's body, and what is added to its last tensor in place."""
        made = self.layers(block.body.named_children(), x, f"{name}.")
        if isinstance(block.added, nn.Conv2d):
            added = self.write(f"{name}.added", block.added(x[1]))
            self.needed(x, made, added)
        self.needed(x)
        result = block(x[1])
        if block.passed is None:
            return made[0], result
        joined = self.write(f"{name}.joined", result)
        self.needed(x, made)
        return joined

    def lives(self) -> dict[str, Life]:
        """Of all tensors, each step being the writing of one."""
        return {
            name: Life(self.bytes_per_value * torch.Size(shape).numel(), step, self.last_use[name])
            for step, (name, shape) in enumerate(self.shapes.items())
        }


def resident_growth(run: Callable[[], object]) -> int | None:
    """By how many bytes the process's resident memory rises at most while something runs.

    Memory that was freed before is given back to the system first, or it would be used again
    unseen. What an earlier run left allocated is not counted: a network shows its activations
    when it runs for the first time.

    Returns:
        None where the system cannot tell: this needs Linux and its C library.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if sys.platform != "linux" or not reset.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5", encoding="ascii")  # the peak becomes what is resident now
    except (AttributeError, OSError):
        return None
    before = _resident(status, "VmRSS")
    run()
    return max(_resident(status, "VmHWM") - before, 0)


def _resident(status: Path, kind: str) -> int:
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines[kind].split()[0])
