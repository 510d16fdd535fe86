"""How long work shows its progress: a hook that callers may pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Passes an iterable on and shows how far it has come."""

    def __call__(self, iterable: Iterable[T], length: int, label: str) -> Iterable[T]:
        """Return an iterable over the same items."""


def no_progress(iterable: Iterable[T], length: int, label: str) -> Iterable[T]:  # noqa: ARG001
    """Show nothing."""
    return iterable
