"""What is written down while training: a table, event files for TensorBoard, or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd

from rmprune.extras import extra
from rmprune.processes import is_first
from rmprune.store import write_csv
from rmprune.training import EpochResult

LogKind = Literal["csv", "tensorboard", "none"]
Row = Mapping[str, Any]


class Log(Protocol):
    """Takes what is known after an epoch."""

    def __call__(self, history: Sequence[Row], /) -> None:
        """Write the rows of a stage so far; the last one is new."""


@contextmanager
def opened(kind: LogKind, folder: Path, stage: str, epoch: int) -> Iterator[Log]:
    """A log of one stage of a run; of several processes, the first one's.

    Args:
        kind: ``"csv"``: rows in ``metrics.csv``, beside those of other stages.
            ``"tensorboard"``: the same, and event files in ``tensorboard/STAGE``. ``"none"``.
        folder: Of the run.
        stage: Its name.
        epoch: Epochs that the stage has trained before; events of later ones are dropped.

    Raises:
        UsageError: The extra ``tensorboard`` is missing.
    """
    if kind == "none" or not is_first():
        yield lambda _: None
        return
    if kind == "csv":
        yield lambda history: _write_table(folder / "metrics.csv", stage, history)
        return
    tensorboard = extra("torch.utils.tensorboard", "--log tensorboard", "tensorboard")
    place = folder / "tensorboard" / stage
    with tensorboard.SummaryWriter(str(place), purge_step=epoch + 1) as writer:

        def write(history: Sequence[Row]) -> None:
            _write_table(folder / "metrics.csv", stage, history)
            row = history[-1] if history else {}
            for name, value in row.items():
                if name not in ("stage", "epoch"):
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        yield write


def as_table(history: Sequence[Row]) -> pd.DataFrame:
    """Rows of epochs, a column for each thing that is known."""
    known = ["stage", *(field.name for field in dataclasses.fields(EpochResult))]
    rows = pd.DataFrame(list(history))
    return rows.reindex(columns=[*known, *rows.columns.difference(known)])


def _write_table(path: Path, stage: str, history: Sequence[Row]) -> None:
    """Write the rows of a stage behind those of other stages."""
    rows = as_table(history)
    if path.exists():
        earlier = pd.read_csv(path)
        parts = [earlier[earlier["stage"] != stage], rows]
        rows = pd.concat([part for part in parts if not part.empty] or [rows])
    write_csv(rows, path)
