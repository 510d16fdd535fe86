"""Where the tensors of a network lie in one block of memory, by when they live.

Two tensors may lie at the same place if no step needs both. Placing the largest first, each
at the lowest free place, comes within a few per cent of the least that is possible (Pisarchyk
and Lee 2020, arXiv 2001.03288, section 5: "greedy by size").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Life(NamedTuple):
    """A tensor's memory.

    Attributes:
        bytes: That it takes.
        begin: The step that writes it.
        end: The last step that reads it.
    """

    bytes: int
    begin: int
    end: int

    def meets(self, other: Life) -> bool:
        """Whether some step needs both."""
        return self.begin <= other.end and other.begin <= self.end


class Plan(NamedTuple):
    """Places in an arena.

    Attributes:
        offsets: Of each tensor, in bytes.
        bytes: Of the whole arena.
    """

    offsets: dict[str, int]
    bytes: int


def plan(lives: Mapping[str, Life], alignment: int = 4) -> Plan:
    """Place every tensor.

    Args:
        lives: By name.
        alignment: Of all offsets, in bytes.
    """
    offsets: dict[str, int] = {}
    for name, life in sorted(lives.items(), key=lambda item: -item[1].bytes):
        taken = sorted(
            (offsets[other], offsets[other] + lives[other].bytes)
            for other in offsets
            if lives[other].meets(life)
        )
        place = 0
        for begin, end in taken:
            if place + life.bytes <= begin:
                break
            place = max(place, _aligned(end, alignment))
        offsets[name] = place
    sizes = (offsets[name] + life.bytes for name, life in lives.items())
    return Plan(offsets, _aligned(max(sizes, default=0), alignment))


def peak(lives: Mapping[str, Life]) -> int:
    """The most bytes that live at one step: no arena can be smaller."""
    steps = {life.begin for life in lives.values()}
    alive = (sum(v.bytes for v in lives.values() if v.begin <= s <= v.end) for s in steps)
    return max(alive, default=0)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
