"""Ways to a plain net side by side: trained alike, converted, measured.

python experiments/plain_roads/run.py --data folder:cifar10 --epochs 2

What stands in results.csv is not trained again; all nets are timed in one run at the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from rmprune.backends import Platform, time_deployed
from rmprune.checkpoints import Task, pick_device
from rmprune.convert import convert
from rmprune.data import Dataset, load_data
from rmprune.measure import count_macs, count_params, evaluate
from rmprune.models import create_model
from rmprune.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from rmprune.reports import environment
from rmprune.store import write_csv
from rmprune.training import TrainingConfig, fit, make_optimizer, memory_format

HERE = Path(__file__).parent
# The ResNet that they are compared with, then the roads: label, colour, marker.
ROADS = {
    "resnet20": ("ResNet by RM", GREY, "*"),
    "repvgg20": ("RepVGG", SKY, "s"),
    "repvgg20_rm0.5": ("RepVGG with RM", BLUE, "o"),
    "rmnext20x3_8_thin": ("RMNeXt", "#F0E442", "X"),
    "orepa_resnet20": ("OREPA-ResNet by RM", VERMILION, "v"),
    "dbb_resnet20": ("DBB-ResNet by RM", ORANGE, "^"),
    "rgsnet26_base_quarter": ("RGSNet by RM", PURPLE, "D"),
    "pnnh_resnet20": ("PNNH", GREEN, "P"),
}
STEPS = 5  # timed of each
PANELS = {  # columns: label, and by what the values are divided
    "params": ("parameters of the plain net, millions", 1e6),
    "latency_ms": ("latency of the plain net, ms", 1),
    "images_per_s": ("images per second in training", 1),
}


def train(name: str, config: TrainingConfig, data: Dataset) -> dict[str, Any]:
    """Train one network and convert it; a row of results."""
    device = pick_device("auto")
    torch.manual_seed(config.seed)
    model = create_model(name, num_classes=len(data.classes))
    results = fit(model, data, config, device=device)
    model.cpu()
    example = Task.of(data).example_input()
    plain = convert(model, example, keep_bn=False)
    cpu = torch.device("cpu")
    correct, images = evaluate(plain, data.test, mean=data.mean, std=data.std, device=cpu)
    return {
        "model": name,
        "accuracy": correct / images,
        "loss": results[-1].loss,
        "training_params": count_params(model),
        "params": count_params(plain),
        "training_macs": count_macs(model, example),
        "macs": count_macs(plain, example),
    }


def training_step(name: str, batch_size: int, data: Dataset) -> Callable[[], None]:
    """A step of a network's training: forward, backward, SGD."""
    device = pick_device("auto")
    model = create_model(name, num_classes=len(data.classes)).train().to(device)
    model.to(memory_format=memory_format(model, device))
    optimizer = make_optimizer(model, TrainingConfig(1))
    images = Task.of(data).example_input(device).repeat(batch_size, 1, 1, 1)[:batch_size]
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)

    def step() -> None:
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device

    return step


def training_speed(names: Sequence[str], batch_size: int, data: Dataset) -> list[float]:
    """Images a second in training: medians of steps, all networks in turn."""
    steps = [training_step(name, batch_size, data) for name in names]
    seconds: list[list[float]] = [[] for _ in names]
    for turn in range(STEPS + 1):
        for step, taken in zip(steps, seconds, strict=True):
            began = time.perf_counter()
            step()
            if turn:  # the first of each is slower
                taken.append(time.perf_counter() - began)
    return [batch_size / statistics.median(taken) for taken in seconds]


def timed(table: pd.DataFrame, data: Dataset, platform: Platform) -> pd.DataFrame:
    """The table with latencies and training speeds, each measured of all in one run, in turn.

    Weights are random: time does not depend on them.
    """
    example = Task.of(data).example_input()
    nets = {
        name: convert(create_model(name, num_classes=len(data.classes)).eval(), example)
        for name in table["model"]
    }
    timings = time_deployed(nets, example, platform)
    return table.assign(
        latency_ms=[timings[name].median_ms for name in table["model"]],
        latency_iqr_ms=[timings[name].iqr_ms for name in table["model"]],
        backend=platform.backend,
        images_per_s=training_speed(table["model"], int(table["train_batch_size"][0]), data),
    )


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy against what a road costs, a panel each."""
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (column, (label, unit)) in zip(panels, PANELS.items(), strict=True):
        for row in table.to_dict("records"):
            name, colour, marker = ROADS.get(row["model"], (row["model"], "black", "x"))
            x, y = row[column] / unit, 100 * row["accuracy"]
            axes.plot(x, y, marker, color=colour, markersize=8, label=name)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


@click.command()
@click.option("--data", "spec", required=True, help="As in rmprune train.")
@click.option("--model", "models", multiple=True, default=tuple(ROADS), show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--lr", default=0.1, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--backend", type=click.Choice(["torch", "onnxruntime"]), default="onnxruntime")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE)
def main(
    spec: str,
    models: tuple[str, ...],
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    backend: Any,
    out: Path,
) -> None:
    data = load_data(spec, image_size=32)
    config = TrainingConfig(epochs, lr=lr, batch_size=batch_size, seed=seed, compile="off")
    platform = Platform(backend)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    settings = {"data": spec, "epochs": epochs, "lr": lr, "seed": seed}
    settings["train_batch_size"] = batch_size  # latencies have a batch size of their own
    for name in models:
        if any(row["model"] == name for row in rows):
            continue
        rows.append(train(name, config, data) | settings | environment())
        write_csv(pd.DataFrame(rows), path)
        print(f"{name}: {100 * rows[-1]['accuracy']:.2f} %", flush=True)
    table = timed(pd.DataFrame(rows), data, platform)
    write_csv(table, path)
    print(table[["model", "accuracy", *PANELS]].to_string(index=False))
    draw(table).savefig(out / "roads.png", dpi=200)


if __name__ == "__main__":
    main()
