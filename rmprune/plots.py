"""Pictures of runs and of conversions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Arc
from torch import nn

from rmprune.plain import PlainNet
from rmprune.steps import Steps, blocks

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
VERMILION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
STAGES = {"sparse": ("sparsity training", BLUE), "finetuned": ("fine-tuning", ORANGE)}

# Method and lowering to label, colour and marker: told apart without colour, too.
CURVES = {
    ("rm", "auto"): ("rmprune", BLUE, "o"),
    ("rm", "plain"): ("rmprune, plain net", SKY, "D"),
    ("slimming", "auto"): ("slimming (inner channels only)", GREEN, "s"),
    ("torch-pruning:bn-scale", "residual"): ("Torch-Pruning, BN scale", ORANGE, "^"),
    ("torch-pruning:group-norm", "residual"): ("Torch-Pruning, group norm", VERMILION, "v"),
}
LINES = ("-", "--", ":", "-.")  # of the first model, the second, …
# What can stand on the horizontal axis: its label, and whether a larger value is the better one.
AXES = {
    "speedup": ("measured speed-up over the original", True),
    "latency_ms": ("latency in ms", False),
    "images_per_second": ("images per second", True),
    "removed_params": ("ratio of removed parameters", True),
    "params_ratio": ("parameters, share of the original's", False),
    "macs_ratio": ("MACs, share of the original's", False),
}


def pareto_front(points: pd.DataFrame, x: str, y: str, larger: bool = True) -> pd.DataFrame:
    """The points that no other one beats in both columns, in the order of x.

    Args:
        points: A row a point.
        x: Column of what is paid or gained.
        y: Column of which more is better.
        larger: Whether more of x is better.
    """
    ordered = points.sort_values([x, y], ascending=[not larger, False])
    return ordered[ordered[y] > ordered[y].cummax().shift(fill_value=-math.inf)].sort_values(x)


def draw_sweep(rows: pd.DataFrame, x: str, title: str = "") -> Figure:
    """Draw accuracy against a cost, one curve for each method and model (RMNet, Figure 7).

    Every net is a small point; large ones are means over the seeds of a sweep, with their standard
    deviations, and the line joins those that no other one of the method and model beats.

    Args:
        rows: Of ``results.csv``, merged with those of one platform of ``latencies.csv`` for
            what concerns time.
        x: A key of `AXES`.
        title: Above the picture.
    """
    label, larger = AXES[x]
    rows = rows.assign(percent=100 * rows["accuracy"])
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    models = list(rows["model"].unique())
    for model in models:
        original = rows[(rows["method"] == "original") & (rows["model"] == model)]
        if original.empty:
            continue
        level = original["percent"].iloc[0]
        axes.axhline(level, color=GREY, linewidth=1, linestyle="--", zorder=0)
        axes.plot(original[x], original["percent"], "*", color="black", markersize=12)
        axes.annotate(
            f"{model if len(models) > 1 else 'original'}, {level:.2f} %",
            (original[x].iloc[0], level),
            textcoords="offset points",
            xytext=(8, 6) if larger else (-8, 6),
            ha="left" if larger else "right",
            fontsize=8,
        )
    for (place, model), (curve, (name, colour, marker)) in itertools.product(
        enumerate(models), CURVES.items()
    ):
        own = rows[rows["model"] == model]
        own = own[(own["method"] == curve[0]) & (own["lowering"] == curve[1])]
        if own.empty:
            continue
        axes.plot(own[x], own["percent"], marker, color=colour, markersize=3, alpha=0.5)
        alike = [key for key in ("sweep", "sparsity", "level") if key in own]
        points = own.groupby(alike).agg(
            x=(x, "mean"), y=("percent", "mean"), dx=(x, "std"), dy=("percent", "std")
        )
        seeds = own["seed"].nunique()
        axes.errorbar(
            points["x"],
            points["y"],
            yerr=points["dy"] if seeds > 1 else None,
            xerr=points["dx"] if seeds > 1 else None,
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=3,
            linewidth=1,
        )
        front = pareto_front(points, "x", "y", larger)
        axes.plot(
            front["x"],
            front["y"],
            color=colour,
            marker=marker,
            markersize=7,
            linestyle=LINES[place % len(LINES)],
            label=f"{name}, {model}" if len(models) > 1 else name,
        )
    axes.set(xlabel=label, ylabel="test accuracy in %", title=title)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_conversion(steps: Steps, net: PlainNet, path: Path) -> None:
    """Draw what conversion did: layers and additions before, own and reserved channels after.

    Args:
        steps: The residual network, as `rmprune.steps.read` reads it.
        net: Its plain net, with all layers that conversion gave it.
        path: File to write; its ending decides the format.
    """
    before = {s.name: s.op.out_channels for s in steps.steps if isinstance(s.op, nn.Conv2d)}
    after = net.converted_widths
    width = min(max(8.0, 0.16 * max(len(before), len(after))), 60.0)
    figure = Figure(figsize=(width, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1)

    places = {name: place for place, name in enumerate(before)}
    top.bar(range(len(before)), list(before.values()), color=BLUE, width=0.9)
    height = max(before.values(), default=1)
    for block in blocks(steps):
        first, last = places[block[0]] if block else 0, places[block[-1]] if block else 0
        middle, reach = (first + last) / 2, last - first + 1
        arc = Arc((middle, height * 1.05), reach, height * 0.25, theta1=0, theta2=180)
        arc.set(edgecolor=ORANGE, linewidth=1.5)
        top.add_patch(arc)
    top.set_ylim(0, height * 1.25)
    top.set(ylabel="output channels", title="Before: every arc is a shortcut that is added")

    own = [w.own for w in after.values()]
    bottom.bar(range(len(after)), own, color=BLUE, width=0.9, label="own channels")
    bottom.bar(
        range(len(after)),
        [w.reserved for w in after.values()],
        bottom=own,
        color=ORANGE,
        hatch="///",
        edgecolor="white",
        width=0.9,
        label="reserved channels",
    )
    bottom.set(ylabel="output channels", title="After: a list of layers, nothing is added")
    bottom.legend(frameon=False)
    for axes, names in ((top, list(before)), (bottom, list(after))):
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


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
    right.bar(places, before, color="#E8E8E8", width=0.9, label="before pruning")
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
