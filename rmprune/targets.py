"""Budgets instead of thresholds: how much may be left, and which channels then stay.

Channels go in the order of their scale over what their removal saves. A budget is met by
searching for the threshold on that quotient, and each step of the search looks at the net
itself, converted, pruned and lowered: what is promised is what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from rmprune.errors import PruningError, UsageError

Kind = Literal["latency", "macs", "params", "accuracy-drop"]
TOLERANCE: dict[str, float] = {"latency": 0.05, "macs": 0.03, "params": 0.03}
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What a pruned net shall keep to.

    Attributes:
        kind: ``latency``, ``macs`` or ``params``: shares of the original residual model's.
            ``accuracy-drop``: percentage points on held-out training images.
        value: The share, or the points.
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(
                f"unknown target {self.kind!r}; known: {', '.join(get_args(Kind))}, "
                "as in --target macs=0.3"
            )
        limit = 100 if self.kind == "accuracy-drop" else 1
        if not 0 < self.value < limit:
            unit = "percentage points" if limit == 100 else "a share of the original model"
            raise UsageError(
                f"the target {self.kind} must lie between 0 and {limit} ({unit}), "
                f"but it is {self.value:g}"
            )

    @classmethod
    def parse(cls, text: str) -> Target:
        """A target from ``KIND=VALUE``.

        Raises:
            UsageError: It is none.
        """
        kind, _, value = text.partition("=")
        try:
            return cls(kind, float(value))  # type: ignore[arg-type]  # checked when it is made
        except ValueError as error:
            raise UsageError(
                f"a target is KIND=VALUE, as in macs=0.3 or latency=0.5, but it is {text!r}"
            ) from error

    def after(self, share: float) -> Target:
        """The target of a cost to keep to on the way, after a share of the steps."""
        return Target(self.kind, self.value**share)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def thresholds_of(scores: Mapping[str, Tensor]) -> list[float]:
    """Every threshold that makes a difference, ascending.

    Args:
        scores: Of the channels of every BN; those that are inf never go.
    """
    finite = [score[torch.isfinite(score)].double().cpu() for score in scores.values()]
    values = torch.unique(torch.cat(finite)).tolist()
    return [0.0, *values, *(2 * last + 1 for last in values[-1:])]


def search(
    thresholds: Sequence[float],
    attempt: Callable[[float], T],
    value_of: Callable[[T], float],
    limit: float,
    tolerance: float,
) -> tuple[T, T | None]:
    """Find the smallest threshold whose result has at most a value, by bisection.

    Args:
        thresholds: Ascending; the value falls as they rise, but for noise.
        attempt: Makes something with a threshold.
        value_of: Its value.
        limit: The value that must not be exceeded.
        tolerance: A result is good enough if it lies under the limit by this share of it.

    Returns:
        The result; and if it is not good enough, because one channel more makes a step in the
        value, the result at the other side of that step.

    Raises:
        PruningError: No threshold brings the value under the limit.
    """
    low, high = -1, len(thresholds)
    found: T | None = None
    above: T | None = None
    while high - low > 1:
        middle = (low + high) // 2
        result = attempt(thresholds[middle])
        value = value_of(result)
        if value > limit:
            low, above = middle, result
            continue
        high, found = middle, result
        if value >= limit * (1 - tolerance):
            return found, None
    if found is None:
        raise PruningError(
            f"even the smallest net keeps more than {limit:.1%} of the original; "
            "choose a larger target"
        )
    return found, above
