"""How deep can a plain net be trained, and how much may pass by? After RMNet's Figures 2 and 8.

    python experiments/depth_limit/run.py --data folder:PATH

Trains RepVGGs of several depths and reserving ratios, and ResNets of the same depths and widths
beside them, on images of 32×32 pixels, all alike. A row of results.csv is written as soon as it
is known; what stands there is not trained again. Draws figure2.png and figure8.png beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from rmprune.checkpoints import pick_device
from rmprune.data import Dataset, load_data
from rmprune.errors import TrainingError
from rmprune.measure import count_macs, count_params
from rmprune.models import ResNet
from rmprune.models.repvgg import DEEP, RepVGG, deep_stages
from rmprune.plots import BLUE, GREEN, GREY, ORANGE
from rmprune.reports import environment
from rmprune.store import write_csv
from rmprune.training import TrainingConfig, fit

HERE = Path(__file__).parent
COLOURS = dict(zip(DEEP, (BLUE, ORANGE, GREEN, GREY), strict=True))


@dataclass(frozen=True)
class Point:
    """One training; ``ratio`` is None for a ResNet."""

    data: str
    layers: int
    ratio: float | None
    width: int
    epochs: int
    lr: float
    batch_size: int
    seed: int

    def key(self) -> dict[str, Any]:
        family = "ResNet" if self.ratio is None else "RepVGG"
        return {"family": family, **vars(self), "ratio": self.ratio or 0.0}

    def model(self, classes: int) -> nn.Module:
        if self.ratio is not None:
            stages = deep_stages(self.layers, cifar=True, width=self.width)
            return RepVGG(stages, classes, self.ratio)
        # As many convolutions: one of the stem, and two a block.
        outer = DEEP[self.layers] // 2
        widths = [self.width * 2**stage for stage in range(4)]
        return ResNet([outer, outer + 1, outer + 1, outer], widths, classes, projection=True)


def trained(point: Point, data: Dataset, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(point.seed)
    model = point.model(len(data.classes))
    config = TrainingConfig(point.epochs, point.lr, point.batch_size, seed=point.seed)
    begin = time.perf_counter()
    try:
        last = fit(model, data, config, device=device)[-1]
    except TrainingError:  # a plain net may diverge: that is what is asked
        accuracy, loss = 1 / len(data.classes), float("nan")
    else:
        accuracy, loss = last.test_accuracy, last.loss
    image = torch.zeros(1, *data.image_shape)
    model.cpu().eval()
    where = environment()
    return {
        **point.key(),
        "accuracy": accuracy,
        "loss": loss,
        "seconds": time.perf_counter() - begin,
        "params": count_params(model),
        "macs": count_macs(model, image),
        **{key: where[key] for key in ("hardware", "gpu")},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def is_done(table: pd.DataFrame, point: Point) -> bool:
    same = pd.Series(data=True, index=table.index)
    for name, value in point.key().items():
        same &= table[name] == value
    return bool(same.any())


def axes_of(figure: Figure, xlabel: str) -> Any:
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel="test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def curve(axes: Any, rows: pd.DataFrame, x: str, **style: Any) -> None:
    """Means over seeds, and their standard deviations where there are several."""
    points = (100 * rows["accuracy"]).groupby(rows[x]).agg(["mean", "std"]).fillna(0)
    axes.errorbar(points.index, points["mean"], points["std"], marker="o", capsize=2, **style)


def draw(table: pd.DataFrame, folder: Path) -> None:
    figure = Figure(figsize=(4.0, 3.2), layout="constrained")
    axes = axes_of(figure, "layers")
    plain = table[table["ratio"] == 0]
    for family, colour in (("ResNet", ORANGE), ("RepVGG", BLUE)):
        curve(axes, plain[plain["family"] == family], "layers", color=colour, label=family)
    axes.legend(frameon=False)
    figure.savefig(folder / "figure2.png", dpi=200)

    figure = Figure(figsize=(4.0, 3.2), layout="constrained")
    axes = axes_of(figure, "reserving ratio")
    for layers, rows in table[table["family"] == "RepVGG"].groupby("layers"):
        curve(axes, rows, "ratio", color=COLOURS[int(str(layers))], label=f"{layers} layers")
    axes.legend(frameon=False)
    figure.savefig(folder / "figure8.png", dpi=200)


@click.command()
@click.option("--data", "source", default="cifar10", show_default=True)
@click.option("--layers", type=click.Choice([*map(str, DEEP)]), multiple=True)
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0, 0.25, 0.5, 0.75))
@click.option("--width", default=16, show_default=True, help="Of the first stage; the paper's: 64.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--lr", default=0.1, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE)
def main(
    source: str,
    layers: tuple[str, ...],
    ratios: tuple[float, ...],
    width: int,
    epochs: int,
    lr: float,
    batch_size: int,
    seeds: tuple[int, ...],
    device: str,
    out: Path,
) -> None:
    """By default 21, 37 and 69 layers: what two cores can train."""
    data, place = load_data(source), pick_device(device)
    path = out / "results.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for seed in seeds:
        for depth in map(int, layers or ("21", "37", "69")):
            for ratio in (None, *ratios):
                point = Point(source, depth, ratio, width, epochs, lr, batch_size, seed)
                if not table.empty and is_done(table, point):
                    continue
                row = trained(point, data, place)
                table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
                write_csv(table, path)
                family, share = row["family"], row["ratio"]
                print(f"{family}-{depth} ratio {share:g}: {row['accuracy']:.2%}", flush=True)
    draw(table, out)


if __name__ == "__main__":
    main()
