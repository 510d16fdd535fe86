"""When is a plain net faster than its residual network? After RMNet's Figure 11.

    python experiments/speed_ablation/run.py

Four RMNeXt blocks (RMNet, section 5.4: 1×1, grouped 3×3, 1×1; inner width (T - 1) · C) behind
one convolution, on images of 16×16 pixels, and the equal plain net that `rmprune.convert` makes
of them. One setting changes at a time. Both nets of a setting are timed in turn; medians of 15
rounds. Writes results.csv and figure11.png beside this file.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import click
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rmprune.backends import BACKENDS, Platform, installed, time_deployed
from rmprune.convert import convert
from rmprune.measure import count_macs
from rmprune.plots import BLUE, GREEN, GREY, ORANGE
from rmprune.reports import environment
from rmprune.store import write_csv

HERE = Path(__file__).parent
BASE = {"batch_size": 16, "width": 64, "expansion": 4, "group_width": 16}
VARIED = {
    "batch_size": (1, 2, 4, 8, 16, 32, 64, 128),
    "width": (16, 32, 64, 128, 256),
    "expansion": (2, 3, 4, 5, 6),
    "group_width": (1, 4, 8, 16, 32, 64),
}
TITLES = {
    "batch_size": "batch size",
    "width": "base width C",
    "expansion": "expansion T",
    "group_width": "channels per group",
}
STYLES = {"torch": (ORANGE, "o"), "onnxruntime": (BLUE, "s"), "openvino": (GREEN, "^")}


class Block(nn.Module):
    """``ReLU(x + F(x))`` with an inverted bottleneck F of grouped convolutions."""

    def __init__(self, width: int, expansion: int, group_width: int) -> None:
        super().__init__()
        inner = (expansion - 1) * width
        groups = inner // group_width
        self.body = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False),
            *(nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.body(x))


def network(width: int, expansion: int, group_width: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(3, width, 3, padding=1), relu=nn.ReLU()
    )
    for number in range(4):
        layers[f"block{number}"] = Block(width, expansion, group_width)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(width, 10)}
    return nn.Sequential(layers).eval()


def measured(backend: str, threads: int, setting: dict[str, int]) -> dict[str, object]:
    torch.manual_seed(0)
    shape = {key: value for key, value in setting.items() if key != "batch_size"}
    residual, example = network(**shape), torch.randn(1, 3, 16, 16)
    plain = convert(residual, example, keep_bn=False)
    platform = Platform(backend, threads, setting["batch_size"])
    nets = {"residual": residual, "plain": plain}
    timings = time_deployed(nets, example, platform, min_seconds=0.05, warn=False)
    pairs = zip(timings["residual"].samples_ms, timings["plain"].samples_ms, strict=True)
    ratios = pd.Series([old / new for old, new in pairs])
    return {
        "residual_ms": timings["residual"].median_ms,
        "plain_ms": timings["plain"].median_ms,
        "speedup": ratios.median(),
        "speedup_low": ratios.quantile(0.25),
        "speedup_high": ratios.quantile(0.75),
        "macs_ratio": count_macs(plain, example) / count_macs(residual, example),
    }


def draw(table: pd.DataFrame) -> Figure:
    """Four panels, one for each thing that varies."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    for axes, (varied, values) in zip(
        figure.subplots(1, 4, sharey=True), VARIED.items(), strict=True
    ):
        here = table[table["varied"] == varied]
        places = list(range(len(values)))
        for backend, rows in here.groupby("backend"):
            colour, marker = STYLES[str(backend)]
            axes.plot(places, rows["speedup"], color=colour, marker=marker, label=backend)
            axes.fill_between(
                places, rows["speedup_low"], rows["speedup_high"], color=colour, alpha=0.2
            )
        shares = here.drop_duplicates(varied)["macs_ratio"]
        axes.plot(places, 1 / shares, color=GREY, linestyle=":", label="MACs, residual / plain")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(places, [str(value) for value in values])
        axes.set_xlabel(TITLES[varied])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("speed-up, plain over residual")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[-1].legend(frameon=False, fontsize=7)
    return figure


@click.command()
@click.option("--threads", default=1, show_default=True)
def main(threads: int) -> None:
    rows = []
    for backend in (name for name in BACKENDS if name in installed() and name in STYLES):
        for varied, values in VARIED.items():
            for value in values:
                setting = {**BASE, varied: value}
                found = measured(backend, threads, setting)
                rows.append(
                    {
                        "varied": varied,
                        **setting,
                        **found,
                        **environment(Platform(backend, threads, setting["batch_size"])),
                        "backend": backend,
                    }
                )
                print(backend, varied, value, f"{found['speedup']:.2f}", flush=True)
    table = pd.DataFrame(rows)
    write_csv(table, HERE / "results.csv")
    draw(table).savefig(HERE / "figure11.png", dpi=200)


if __name__ == "__main__":
    main()
