"""How long work shows its progress: a hook that callers may pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Passes an iterable on and shows how far it has come."""

    def __call__(
        self,
        iterable: Iterable[T],
        length: int,
        label: str,
        status: Callable[[], str] | None = None,
    ) -> Iterable[T]:
        """Return an iterable over the same items.

        Args:
            iterable: The items.
            length: How many.
            label: What is done with them.
            status: What to show besides, as it stands; asked for at any time.
        """


def no_progress(
    iterable: Iterable[T],
    length: int,  # noqa: ARG001
    label: str,  # noqa: ARG001
    status: Callable[[], str] | None = None,  # noqa: ARG001
) -> Iterable[T]:
    """Show nothing."""
    return iterable
