"""Figure 10 of RMNet: what a pruned net gains by fine-tuning, as a plain net or before.

python experiments/finetune_bn/run.py RUN --data folder:cifar10

RUN is a folder that `rmprune prune` wrote; what stands in results.csv is not trained again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.nn.utils import parametrize

from rmprune.checkpoints import Checkpoint, calibration_batches, pick_device, trained_model
from rmprune.convert import convert
from rmprune.data import Dataset, load_data
from rmprune.errors import TrainingError
from rmprune.plain import PlainNet
from rmprune.removal import prune
from rmprune.reports import environment
from rmprune.rewrite import calibrate_bn, collapse
from rmprune.store import write_csv
from rmprune.training import fit

HERE = Path(__file__).parent
VARIANTS = (
    "residual, masked",
    "plain, with BN",
    "plain, without BN",
    "plain, with BN, Dirac filters held",
)
LOST = 0.2  # an accuracy under which nothing is left to draw
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def plain_of(masked: Checkpoint) -> PlainNet:
    """The plain net of a masked model, without BNs."""
    net = convert(masked.build(), masked.task.example_input(), keep_bn=False)
    return collapse(prune(net))


class Fixed(nn.Module):
    """Rows of a parameter that no optimizer moves."""

    def __init__(self, values: torch.Tensor, free: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.detach().clone())
        self.register_buffer("free", free.view(-1, *[1] * (values.ndim - 1)))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.where(self.free, values, self.values)


def hold_dirac_filters(net: nn.Module) -> None:
    """Hold the filters that only pass a channel on, in a net with BNs."""
    for conv in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
        # One weight: a shortcut's scale is in it, so that it need not be 1.
        free = (conv.weight != 0).flatten(1).sum(1) != 1
        parametrize.register_parametrization(conv, "weight", Fixed(conv.weight, free))


def variant_of(name: str, masked: Checkpoint, data: Dataset) -> nn.Module:
    """The network to train."""
    if name == "residual, masked":
        return masked.build()
    net = plain_of(masked)
    if name == "plain, without BN":
        return net
    net = calibrate_bn(net, calibration_batches(data, torch.device("cpu")))
    if name == "plain, with BN, Dirac filters held":
        hold_dirac_filters(net)
    return net


def train(
    name: str, lr: float, epochs: int, masked: Checkpoint, data: Dataset, kept: Path
) -> list[dict]:
    """Fine-tune one variant; a row an epoch."""
    config = replace(masked.config, finetune_epochs=epochs, finetune_lr=lr)
    teacher = trained_model(config, len(data.classes)) if config.distill else None
    try:
        results = fit(
            variant_of(name, masked, data),
            data,
            config.finetuning(),
            teacher=teacher,
            kept=kept,
            device=pick_device(config.device),
        )
    except TrainingError as error:
        print(name, lr, error, flush=True)
        return [{"epoch": epoch + 1, "test_accuracy": float("nan")} for epoch in range(epochs)]
    return [{"epoch": r.epoch, "loss": r.loss, "test_accuracy": r.test_accuracy} for r in results]


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy against the epoch, a panel a learning rate."""
    rates = sorted(table["lr"].unique(), reverse=True)
    figure = Figure(figsize=(3.2 * len(rates), 3.0), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for axes, rate in zip(panels, rates, strict=True):
        lost = []
        for name, colour in zip(VARIANTS, COLOURS, strict=True):
            rows = table[(table["variant"] == name) & (table["lr"] == rate)]
            if not rows["test_accuracy"].iloc[-1] > LOST:
                lost.append(name)
                continue
            (handles[name],) = axes.plot(rows["epoch"], 100 * rows["test_accuracy"], color=colour)
        note = f"diverged: {'; '.join(lost)}" if lost else ""
        axes.text(0.97, 0.03, note, transform=axes.transAxes, ha="right", fontsize=7)
        axes.set_title(f"learning rate {rate:g}", fontsize=9)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(handles.values(), handles, frameon=False, fontsize=7, loc="center right")
    return figure


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", required=True, help="As in rmprune finetune.")
@click.option("--epochs", default=4, show_default=True)
@click.option("--lr", "rates", multiple=True, default=(0.02, 2e-3, 5e-4), show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE)
def main(run: Path, data: str, epochs: int, rates: tuple[float, ...], out: Path) -> None:
    masked = Checkpoint.load(run / "masked.pt")
    images = load_data(data)
    path = out / "results.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["variant", "lr"])
    for rate in rates:
        for name in VARIANTS:
            if ((table["variant"] == name) & (table["lr"] == rate)).any():
                continue
            rows = pd.DataFrame(train(name, rate, epochs, masked, images, run / "lessons"))
            rows = rows.assign(variant=name, lr=rate, **environment(masked.config.platform))
            table = pd.concat([table, rows], ignore_index=True)
            write_csv(table, path)
            print(name, rate, f"{100 * rows['test_accuracy'].iloc[-1]:.2f} %", flush=True)
    draw(table).savefig(out / "figure10.png", dpi=200)


if __name__ == "__main__":
    main()
