"""Put the nets of several sweeps of one model into one folder, and time all of them in one run.

    python experiments/figure7/gather.py OUT SWEEP...

OUT gets the nets, results.csv, sweep.json and latencies.csv of a sweep. Nets whose files are gone
(plain nets, say, which are too large to keep under version control) stay out. Nets get the name
of their sweep before theirs, and pictures take means over the seeds of each sweep by itself. The
original is that of the first sweep that holds its file.
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
        named = rows[here].assign(sweep=folder.name, net=f"{folder.name}-" + rows[here]["net"])
        for row, own in zip(records(named), records(rows[here]), strict=True):
            shutil.copy(sweep.net_path(folder, own), sweep.net_path(out, row))
        tables.append(named)
    found = pd.concat(tables)
    again = (found["method"] == "original") & found.duplicated(sweep.KEY)
    write_csv(found[~again], out / "results.csv")
    notes = [read_json(folder / "sweep.json") for folder in sweeps]
    plans = [plan for note in notes for plan in note["plans"]]
    write_json({"task": notes[0]["task"], "plans": plans}, out / "sweep.json")
    places = [Platform(engine, 1, batch) for engine in sweep.TIMED_ON for batch in (1, 64)]
    sweep.time_all(out, places, sweep.task_of(out), click.echo)


if __name__ == "__main__":
    main()
