"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rmprune.plain import PlainNet

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
STAGES = {"sparse": ("sparsity training", BLUE), "finetuned": ("fine-tuning", ORANGE)}


def plot_run(metrics: pd.DataFrame, net: PlainNet, path: Path) -> None:
    """Draw a run: accuracy over its epochs, and every layer's channels before and after.

    Args:
        metrics: The rows of ``metrics.csv``.
        net: The pruned net.
        path: File to write; its ending decides the format.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    offset = 0
    for stage, (label, colour) in STAGES.items():
        rows = metrics[metrics["stage"] == stage]
        left.plot(offset + rows["epoch"], 100 * rows["test_accuracy"], color=colour, label=label)
        offset += len(rows)
    left.set(xlabel="epoch", ylabel="test accuracy in %", title="Training")
    left.legend(frameon=False)
    left.grid(alpha=0.3)

    names = list(net.converted_widths)
    places = range(len(names))
    before = [net.converted_widths[name].total for name in names]
    own = [net.widths[name].own if name in net.widths else 0 for name in names]
    reserved = [net.widths[name].reserved if name in net.widths else 0 for name in names]
    right.bar(places, before, color="#E8E8E8", width=0.9, label="as converted")
    right.bar(places, own, color=BLUE, width=0.9, label="own channels kept")
    right.bar(places, reserved, bottom=own, color=ORANGE, width=0.9, label="reserved kept")
    right.set(ylabel="output channels", title="Channels of the plain net, layer by layer")
    right.set_xticks(places, names, rotation=90, fontsize=6)
    right.margins(x=0.01)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
