"""Put the nets of several sweeps of one model into one folder, and time all of them in one run.

    python experiments/figure7/gather.py OUT SWEEP...

OUT gets the nets, results.csv, sweep.json and latencies.csv of a sweep. Nets whose files are gone
(plain nets, say, which are too large to keep under version control) stay out; a net that
stands in several sweeps is that of the first. One sweep must hold the original's file.
"""

import shutil
from pathlib import Path

import click
import pandas as pd

from rmprune import sweep
from rmprune.backends import Platform
from rmprune.reports import records
from rmprune.store import read_json, write_csv, write_json

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.argument("out", type=FOLDER)
@click.argument("sweeps", type=FOLDER, nargs=-1, required=True)
def main(out: Path, sweeps: tuple[Path, ...]) -> None:
    (out / "nets").mkdir(parents=True)
    tables = []
    for folder in sweeps:
        rows = sweep.results(folder).dropna(subset=["net"])
        here = [sweep.net_path(folder, row).exists() for row in records(rows)]
        tables.append(rows[here])
        for row in records(rows[here]):
            if not sweep.net_path(out, row).exists():
                shutil.copy(sweep.net_path(folder, row), sweep.net_path(out, row))
    write_csv(pd.concat(tables).drop_duplicates("net"), out / "results.csv")
    notes = [read_json(folder / "sweep.json") for folder in sweeps]
    plans = [plan for note in notes for plan in note["plans"]]
    write_json({"task": notes[0]["task"], "plans": plans}, out / "sweep.json")
    places = [Platform(engine, 1, batch) for engine in sweep.TIMED_ON for batch in (1, 64)]
    sweep.time_all(out, places, sweep.task_of(out), click.echo)


if __name__ == "__main__":
    main()
