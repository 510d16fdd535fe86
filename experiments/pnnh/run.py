"""Can a deep plain net be trained, and what must its coders have learned before?

    python experiments/pnnh/run.py --data folder:cifar10

Plain nets without shortcuts, alone and with PNNH (arXiv 2402.08645), whose coders were
pretrained on different inputs. Every variant is trained in the same way; one that is finished is
in results.csv, and is not trained again when the command is repeated. Draws results.png.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import click
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from rmprune.backends import Platform
from rmprune.data import Dataset, calibration_images, load_data
from rmprune.errors import TrainingError
from rmprune.models.coder import Pretext, pretrain_coders
from rmprune.models.pnnh import NETWORKS, plain_net, pnnh_net
from rmprune.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from rmprune.reports import environment
from rmprune.store import write_csv
from rmprune.training import EpochResult, TrainingConfig, fit

HERE = Path(__file__).parent
NO_CODER = "no PNNH"
VARIANTS = (NO_CODER, *get_args(Pretext))
COLOURS = dict(
    zip(VARIANTS, (GREY, "black", VERMILION, ORANGE, SKY, BLUE, GREEN, PURPLE), strict=False)
)


@dataclass(frozen=True)
class Setting:
    """What one training depends on; ``images`` is how many it sees in an epoch."""

    variant: str
    model: str
    data: str
    images: int
    epochs: int
    lr: float
    batch_size: int
    width: float
    seed: int


def build(setting: Setting, classes: int) -> nn.Module:
    """The network, as training begins."""
    torch.manual_seed(setting.seed)
    shape = NETWORKS[setting.model]
    widths = tuple(round(width * setting.width) for width in shape.widths)
    shape = replace(shape, widths=widths, stem=round(shape.stem * setting.width))
    if setting.variant == NO_CODER:
        return plain_net(shape, classes)
    model = pnnh_net(shape, classes)
    pretrain_coders(model, setting.variant)
    return model


def trained(setting: Setting, data: Dataset) -> list[dict[str, object]]:
    """A row for every epoch; what diverges has no loss and no accuracy from there on."""
    model = build(setting, len(data.classes))
    config = TrainingConfig(
        epochs=setting.epochs,
        lr=setting.lr,
        batch_size=setting.batch_size,
        seed=setting.seed,
        precision="float32",
        compile="off",
    )
    found: list[EpochResult] = []

    def keep(result: EpochResult, _: object) -> None:
        found.append(result)
        print(setting.variant, result.epoch, f"{result.loss:.3f}", result.test_accuracy, flush=True)

    begin = time.perf_counter()
    try:
        fit(model, data, config, after_epoch=keep)
    except TrainingError as error:
        print(setting.variant, error, flush=True)
    seconds = time.perf_counter() - begin
    parameters = {"parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds}
    diverged = [
        EpochResult(epoch, math.nan, math.nan, math.nan)
        for epoch in range(len(found) + 1, setting.epochs + 1)
    ]
    return [
        {
            **asdict(setting),
            "epoch": result.epoch,
            "loss": result.loss,
            "test_accuracy": result.test_accuracy,
            **parameters,
            **environment(Platform(batch_size=setting.batch_size)),
        }
        for result in [*found, *diverged]
    ]


def rows_of(table: pd.DataFrame, settings: Mapping[str, object]) -> pd.DataFrame:
    """The rows of some settings; none in an empty table."""
    for name, value in settings.items():
        table = table[table[name] == value] if len(table) else table
    return table


def draw(table: pd.DataFrame) -> Figure:
    """Final accuracies, and losses while training."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    shown = [variant for variant in VARIANTS if variant in set(table["variant"])]
    for place, variant in enumerate(reversed(shown)):
        rows = table[table["variant"] == variant].sort_values("epoch")
        accuracy = 100 * rows["test_accuracy"].iloc[-1]
        label = "diverged" if math.isnan(accuracy) else f"{accuracy:.1f}"
        bars.barh(place, accuracy, color=COLOURS[variant])
        bars.text(0 if math.isnan(accuracy) else accuracy, place, f" {label}", va="center")
        curves.plot(rows["epoch"], rows["loss"], color=COLOURS[variant], marker=".", label=variant)
    bars.set_yticks(range(len(shown)), list(reversed(shown)))
    bars.set_xlabel("test accuracy, %")
    bars.set_xlim(right=1.15 * 100 * table["test_accuracy"].max())
    curves.set_xlabel("epoch")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_ylabel("training loss")
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@click.command()
@click.option("--data", default="digits", show_default=True)
@click.option("--model", type=click.Choice(list(NETWORKS)), default="resnet56", show_default=True)
@click.option("--variant", "variants", type=click.Choice(VARIANTS), multiple=True, default=VARIANTS)
@click.option("--images", type=int, help="Training images; all by default.")
@click.option("--epochs", default=4, show_default=True)
@click.option("--lr", default=0.1, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--width", default=1.0, show_default=True, help="Factor for all widths.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE, help="Folder of the results.")
def main(
    data: str, variants: tuple[str, ...], images: int | None, out: Path, **options: object
) -> None:
    loaded = load_data(data)
    if images is not None:
        loaded = replace(loaded, train=calibration_images(loaded, images))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for variant in variants:
        count = len(loaded.train.labels)
        setting = Setting(variant=variant, data=data, images=count, **options)
        if rows_of(table, asdict(setting)).empty:
            table = pd.concat([table, pd.DataFrame(trained(setting, loaded))], ignore_index=True)
            write_csv(table, path)
    same = {"data": data, "images": count, **options}
    draw(rows_of(table, same)).savefig(out / "results.png", dpi=200)


if __name__ == "__main__":
    main()
