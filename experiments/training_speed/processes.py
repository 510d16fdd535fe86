"""Two processes of one thread beside one process of two threads, in turn.

    python experiments/training_speed/processes.py --data folder:cifar10

Every turn starts each anew, by torchrun, and takes the median of its epochs but the first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click
import pandas as pd
import torch

from rmprune import processes
from rmprune.checkpoints import calibration_batches
from rmprune.data import Split, load_data
from rmprune.models import create_model
from rmprune.reports import environment
from rmprune.slimming import Penalty, add_shortcut_bn, scale_parameters
from rmprune.training import TrainingConfig, fit

BATCH_SIZE = 128
EPOCHS = 4
LOOPS = {
    "one process, two threads": (1, 2, False),
    "two processes": (2, 1, False),
    "two processes, --sync-bn": (2, 1, True),
}


def loopback_bytes() -> int:
    """What this machine has sent to itself so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def work(spec: str, steps: int, sync_bn: bool) -> None:
    """One process's part: train, and let the first one print what it took."""
    with processes.joined():
        data = load_data(spec, image_size=32)
        count = steps * BATCH_SIZE
        train = Split(data.train.images[:count], data.train.labels[:count])
        small = Split(data.test.images[:2], data.test.labels[:2])
        data = replace(data, train=train, test=small)
        slim = add_shortcut_bn(
            create_model("resnet20", num_classes=len(data.classes)),
            calibration_batches(data, torch.device("cpu")),
        )
        scales = scale_parameters(slim)
        times, sent = [time.perf_counter()], [loopback_bytes()]

        def after_epoch(*_: object) -> None:
            times.append(time.perf_counter())
            sent.append(loopback_bytes())

        config = TrainingConfig(EPOCHS, 0.01, BATCH_SIZE, compile="off", sync_bn=sync_bn)
        penalty = Penalty(scales, 1e-4, dict.fromkeys(scales, 1.0))
        fit(slim, data, config, penalty=penalty, after_epoch=after_epoch)
        if processes.is_first():
            seconds = statistics.median(b - a for a, b in pairwise(times[1:]))
            volume = (sent[-1] - sent[1]) / (steps * (EPOCHS - 1))
            print(json.dumps({"images_per_s": count / seconds, "bytes_a_step": volume}))


@click.command()
@click.option("--data", "spec", default="digits", show_default=True, help="As in rmprune train.")
@click.option("--steps", default=40, show_default=True, help="Of an epoch.")
@click.option("--rounds", default=5, show_default=True)
def main(spec: str, steps: int, rounds: int) -> None:
    """Run all loops in turn and print medians and ratios."""
    rows = []
    for turn in range(rounds):
        for name, (count, threads, sync_bn) in LOOPS.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={count}", __file__, "work", spec, str(steps)]
            done = subprocess.run(
                [*command, str(int(sync_bn))],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
            rows.append({"loop": name, "turn": turn, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    medians = table.groupby("loop", sort=False)[["images_per_s", "bytes_a_step"]].median().round()
    medians["ratio"] = (medians["images_per_s"] / medians["images_per_s"].iloc[0]).round(3)
    print(medians.to_string())
    settings = environment() | {"data": spec, "steps": steps, "batch_size": BATCH_SIZE}
    table.assign(**settings).to_csv(Path(__file__).with_name("processes.csv"), index=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
    else:
        main()
