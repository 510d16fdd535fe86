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
    if len({folder.resolve().name for folder in sweeps}) < len(sweeps):
        raise click.UsageError("two sweeps have the same name, which nets get before theirs")
    if out.exists():
        raise click.UsageError(f"{out} exists; name a new folder")
    tables = []
    for folder in sweeps:
        rows = sweep.results(folder).dropna(subset=["net"])
        files = [sweep.net_path(folder, row) for row in records(rows)]
        tables.append(rows.assign(sweep=folder.resolve().name, file=files))
    found = pd.concat(tables)
    found = found[[file.exists() for file in found["file"]]]
    found = found[(found["method"] != "original") | ~found.duplicated(sweep.KEY)]
    found = found.assign(net=found["sweep"] + "-" + found["net"])
    (out / "nets").mkdir(parents=True)
    for row in records(found):
        shutil.copy(row["file"], sweep.net_path(out, row))
    write_csv(found.drop(columns="file"), out / "results.csv")
    notes = [read_json(folder / "sweep.json") for folder in sweeps]
    plans = [plan for note in notes for plan in note["plans"]]
    write_json({"task": notes[0]["task"], "plans": plans}, out / "sweep.json")
    places = [Platform(engine, 1, batch) for engine in sweep.TIMED_ON for batch in (1, 64)]
    sweep.time_all(out, places, sweep.task_of(out), click.echo)


if __name__ == "__main__":
    main()
