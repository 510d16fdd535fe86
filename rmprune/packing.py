"""Groups of a convolution made anew for the channels that it still needs; tensors only.

What is left of a grouped convolution falls into parts that share no channel: what remains of its
groups, and single channels that are copied. These are packed into equal groups like things into
bins, with channels of zeros where a group is not full.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Part = tuple[list[int], list[int]]  # its inputs and its outputs


class Prices(NamedTuple):
    """Weights of a connection, of an input where it is made, of an output where it is read."""

    taps: float
    per_input: float
    per_output: float


@dataclass(frozen=True)
class Groups:
    """The channels of a convolution, group by group.

    Attributes:
        number: Of the groups; they divide both numbers of channels.
        inputs: ``(in,)``: which of the former channels each is.
        outputs: ``(out,)``.
    """

    number: int
    inputs: Tensor
    outputs: Tensor

    def cost(self, prices: Prices) -> float:
        """Weights of the convolution, and of the layers beside it for these channels."""
        return _cost(
            self.number,
            len(self.inputs) // self.number,
            len(self.outputs) // self.number,
            prices,
        )


def _cost(groups: int, inputs: int, outputs: int, prices: Prices) -> float:
    each = prices.taps * inputs * outputs + prices.per_input * inputs + prices.per_output * outputs
    return groups * each


def pack(used: Tensor, groups: int, alive: tuple[Tensor, Tensor], prices: Prices) -> Groups | None:
    """The groups that cost least of those with no more channels than there were.

    Args:
        used: ``(out, in / groups)`` of bool: which weights are not zero.
        groups: Of the convolution.
        alive: Inputs and outputs that stay, ``(in,)`` and ``(out,)`` of bool; no others are used.
        prices: What channels cost.

    Returns:
        The groups, the largest parts evenly spread (longest first; Graham 1969); None if there
        are none, or nothing is alive.
    """
    parts = _parts(used, groups, alive)
    if not parts:
        return None
    total = [sum(len(part[side]) for part in parts) for side in (0, 1)]
    largest = [max(len(part[side]) for part in parts) for side in (0, 1)]

    def at_least(number: int) -> float:
        inputs, outputs = (
            max(most, -(-n // number)) for n, most in zip(total, largest, strict=True)
        )
        return _cost(number, inputs, outputs, prices)

    best: Groups | None = None
    for number in sorted(range(1, len(parts) + 1), key=at_least):
        if best is not None and at_least(number) >= best.cost(prices):
            break
        bins = _spread(parts, number)
        inputs, outputs = (_padded([b[side] for b in bins], alive[side]) for side in (0, 1))
        if inputs is None or outputs is None:
            continue
        found = Groups(number, inputs, outputs)
        if best is None or found.cost(prices) < best.cost(prices):
            best = found
    return best


def _parts(used: Tensor, groups: int, alive: tuple[Tensor, Tensor]) -> list[Part]:
    """The living channels by connected part, the largest first."""
    parts: dict[int, Part] = {}
    for side, labels in enumerate(_labels(used, groups)):
        for channel in alive[side].nonzero().flatten().tolist():
            parts.setdefault(int(labels[channel]), ([], []))[side].append(channel)
    return sorted(parts.values(), key=lambda part: -len(part[0]) - len(part[1]))


def _labels(used: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The first input of the part of each channel, ``(in,)`` and ``(out,)``.

    An output that reads nothing has a number of its own, behind those of the inputs.
    """
    outputs, share = used.shape
    group = torch.arange(outputs, device=used.device) // (outputs // groups)
    column = group[:, None] * share + torch.arange(share, device=used.device)
    labels, alone = torch.arange(groups * share, device=used.device), groups * share
    while True:
        rows = torch.where(used, labels[column], alone).amin(1)
        reached = torch.where(used, rows[:, None], alone)
        spread = labels.scatter_reduce(0, column.flatten(), reached.flatten(), "amin")
        if torch.equal(spread, labels):
            break
        labels = spread
    own = alone + torch.arange(outputs, device=used.device)
    return labels, torch.where(rows == alone, own, rows)


def _spread(parts: Sequence[Part], number: int) -> list[Part]:
    """Bins of about equal numbers of channels."""
    bins: list[Part] = [([], []) for _ in range(number)]
    loads = [(0, place) for place in range(number)]
    for inputs, outputs in parts:
        load, place = heapq.heappop(loads)
        bins[place][0].extend(inputs)
        bins[place][1].extend(outputs)
        heapq.heappush(loads, (load + len(inputs) + len(outputs), place))
    return bins


def _padded(bins: Sequence[list[int]], alive: Tensor) -> Tensor | None:
    """Channels bin by bin, each filled with dead ones; None if these are too few."""
    width = max(map(len, bins))
    if width * len(bins) > len(alive) or not width:
        return None
    dead = iter((~alive).nonzero().flatten().tolist())
    filled = [sorted(b) + [next(dead) for _ in range(width - len(b))] for b in bins]
    return torch.tensor(filled).flatten()
