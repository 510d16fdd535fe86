"""Every exception that rmprune raises on purpose, under one root."""


class RmpruneError(Exception):
    """Root of all errors whose message is meant for the user: one line, and what to do."""


class UsageError(RmpruneError):
    """The request itself is wrong: an unknown name, a bad value, a path that is not there."""


class DataError(RmpruneError):
    """The images cannot be used: missing, unreadable, or at odds with each other."""


class WeightsError(RmpruneError):
    """The weights do not fit the model."""


class StoreError(RmpruneError):
    """A file cannot be read or written, or is not what it should be."""


class TrainingError(RmpruneError):
    """Training cannot go on."""


def first_line(error: Exception) -> str:
    """The first line of what an exception says, for messages of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class ConversionError(RmpruneError):
    """A network cannot be rewritten without its residual connections.

    Args:
        node: Name of the graph node or module that stands in the way.
        reason: What is wrong with it.
        advice: What could help.
    """

    def __init__(self, node: str, reason: str, advice: str = "") -> None:
        super().__init__(
            f"cannot convert at {node!r}: {reason}" + (f"; {advice}" if advice else "")
        )
        self.node = node
        self.reason = reason
        self.advice = advice


class ExportError(RmpruneError):
    """A network cannot be written in a format, or is not the same there."""


class PruningError(RmpruneError):
    """Channels cannot be selected or removed."""


class PeerError(RmpruneError):
    """Another process of the same run has failed, and tells why."""
