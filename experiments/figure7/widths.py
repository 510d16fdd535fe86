"""How the time of a convolution follows its width: why fewer MACs need not be faster.

    python experiments/figure7/widths.py

Three 3×3 convolutions at 32×32 pixels, one image, one thread; writes widths.csv beside this file.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from rmprune.backends import Platform, installed, time_deployed
from rmprune.reports import environment
from rmprune.store import write_csv

WIDTHS = (8, 10, 12, 14, 15, 16, 20, 24, 28, 32)


def net_of(width: int) -> nn.Sequential:
    convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])


def main() -> None:
    rows = []
    for backend in installed():
        platform = Platform(backend)
        for width in WIDTHS:
            example = torch.zeros(1, width, 32, 32)
            timing = time_deployed({"net": net_of(width)}, example, platform, warn=False)["net"]
            figures = {"width": width, "latency_ms": timing.median_ms, "iqr_ms": timing.iqr_ms}
            rows.append({**figures, **environment(platform)})
    table = pd.DataFrame(rows)
    write_csv(table, Path(__file__).with_name("widths.csv"))
    print(table.pivot(index="width", columns="backend", values="latency_ms").round(3))


if __name__ == "__main__":
    main()
