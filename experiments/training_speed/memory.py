"""How much memory a training needs besides its images.

    python experiments/training_speed/memory.py --data folder:cifar10

The data set must have been loaded before, or the peak is that of decoding it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pandas as pd

from rmprune.data import load_data
from rmprune.reports import environment

KIB = 1024


def peak_bytes(command: list[str]) -> int:
    """The largest resident set of a process, its shared pages among them; Linux counts KiB."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * KIB


@click.command()
@click.option("--data", "spec", default="digits", show_default=True, help="As in rmprune train.")
@click.option("--model", default="resnet20", show_default=True)
def main(spec: str, model: str) -> None:
    data = load_data(spec)
    images = sum(split.images[:].nbytes for split in (data.train, data.test))
    rows = []
    for choice in ("off", "on"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "rmprune", "train", "--model", model, "--data", spec]
            command += ["--epochs", "1", "--compile", choice, "--out", f"{folder}/run"]
            peak = peak_bytes(command)
        rows.append({"compile": choice, "peak_mb": peak / 1e6, "images_mb": images / 1e6})
    table = pd.DataFrame(rows).round(0)
    table["beyond_images_mb"] = table["peak_mb"] - table["images_mb"]
    print(table.to_string(index=False))
    settings = {"model": model, "data": spec, **environment()}
    table.assign(**settings).to_csv(Path(__file__).with_name("memory.csv"), index=False)


if __name__ == "__main__":
    main()
