"""Training speed of rmprune against loops written by hand, in one run and in turn.

python experiments/training_speed/measure.py --data folder:cifar10
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from rmprune.checkpoints import calibration_batches
from rmprune.data import Dataset, Split, load_data
from rmprune.models import create_model
from rmprune.reports import environment
from rmprune.slimming import Penalty, add_shortcut_bn, scale_parameters
from rmprune.training import TrainingConfig, fit

BATCH_SIZE = 128
CPU = torch.device("cpu")


def hand_written(model: nn.Module, data: Dataset, *, bf16: bool, penalise: bool) -> None:
    """The shortest loop that trains: no augmentation, no schedule, no checks."""
    layout = torch.channels_last if bf16 else torch.contiguous_format
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (data.mean, data.std))
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    order = torch.randperm(len(data.train.labels))
    for index in order.split(BATCH_SIZE):
        images = ((data.train.images[index] / 255 - mean) / std).contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), data.train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        if penalise:
            for scale in scales:
                scale.grad.add_(scale.detach().sign(), alpha=1e-4)
        optimizer.step()


def rmprune_train(slim: nn.Module, penalty: Penalty, data: Dataset, compile_step: str) -> None:
    """What `rmprune train` runs, with everything that it does."""
    config = TrainingConfig(1, lr=0.01, batch_size=BATCH_SIZE, compile=compile_step)
    fit(slim, data, config, penalty=penalty, device=CPU)


@click.command()
@click.option("--data", "spec", default="digits", show_default=True, help="As in rmprune train.")
@click.option("--steps", default=40, show_default=True, help="Of each loop in each round.")
@click.option("--rounds", default=7, show_default=True)
def main(spec: str, steps: int, rounds: int) -> None:
    data = load_data(spec, image_size=32)
    repeats = -(-steps * BATCH_SIZE // len(data.train.labels))
    count = steps * BATCH_SIZE
    train = Split(
        data.train.images.repeat(repeats, 1, 1, 1)[:count],
        data.train.labels.repeat(repeats)[:count],
    )
    # One image to test: an epoch's evaluation is not what is timed here.
    data = replace(data, train=train, test=Split(data.test.images[:1], data.test.labels[:1]))

    def residual() -> nn.Module:
        return create_model("resnet20", num_classes=len(data.classes))

    def slimmable() -> tuple[nn.Module, Penalty]:
        slim = add_shortcut_bn(residual(), calibration_batches(data, CPU))
        scales = scale_parameters(slim)
        return slim, Penalty(scales, 1e-4, dict.fromkeys(scales, 1.0))

    by_hand, by_hand_slim, float32 = residual(), slimmable()[0], residual()
    loops = {
        "by hand, bf16": lambda: hand_written(by_hand, data, bf16=True, penalise=False),
        "by hand, bf16, slimmable": lambda: hand_written(
            by_hand_slim, data, bf16=True, penalise=True
        ),
        "by hand, float32": lambda: hand_written(float32, data, bf16=False, penalise=False),
    }
    ours = slimmable()
    loops["rmprune train --compile off"] = lambda: rmprune_train(*ours, data, "off")
    ours_compiled = slimmable()
    loops["rmprune train --compile on"] = lambda: rmprune_train(*ours_compiled, data, "on")

    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-1, rounds):  # the first round warms up and compiles
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)

    speeds = {name: count / statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, values in seconds.items():
        lower, _, upper = statistics.quantiles(values, n=4)
        row = {"loop": name, "images_per_s": round(speeds[name])}
        row["iqr_share"] = round((upper - lower) / statistics.median(values), 3)
        for rival in ("by hand, bf16", "by hand, bf16, slimmable", "by hand, float32"):
            row[f"ratio to {rival}"] = round(speeds[name] / speeds[rival], 3)
        rows.append(row)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    settings = {"data": spec, "steps": steps, "rounds": rounds, "batch_size": BATCH_SIZE}
    settings |= environment(threads=torch.get_num_threads())
    table.assign(**settings).to_csv(Path(__file__).with_name("results.csv"), index=False)


if __name__ == "__main__":
    main()
