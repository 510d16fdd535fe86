"""What commands say while they work, and about a net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import click

from rmprune import reports
from rmprune.plain import PlainNet

T = TypeVar("T")


def progress_bar(
    iterable: Iterable[T], length: int, label: str, status: Callable[[], str] | None = None
) -> Iterator[T]:
    """Show a bar with the time left and a status; on a pipe, only the label."""
    show = None if status is None else lambda _: status()
    with click.progressbar(iterable, length=length, label=label, item_show_func=show) as bar:
        yield from bar


def say_size(net: PlainNet, path: Path) -> None:
    """Tell the parameters and the MACs of a net that lies at a path."""
    table = reports.layer_table(net)
    params, macs = int(table["params"].sum()), int(table["macs"].sum())
    click.echo(f"{path}: {params:,} parameters, {macs / 1e6:.2f} MMACs an image")
