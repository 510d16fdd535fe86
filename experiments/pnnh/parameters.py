"""Parameters of PNNH's networks in every reading of the paper, beside what it states.

    python experiments/pnnh/parameters.py

Writes parameters.csv beside this file: millions; coders are counted once a stage.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import get_args

import click
import pandas as pd
import torch

from rmprune.models.pnnh import NETWORKS, plain_net, pnnh_net
from rmprune.models.pnnh_blocks import Coding, Transition
from rmprune.store import write_csv

HERE = Path(__file__).parent
# Network, classes, and the paper's parameters with PNNH in millions.
PUBLISHED = {
    "resnet110": (10, 0.88),
    "wrn28_10": (10, 18.3),
    "resnet18": (1000, 6.4),
    "resnet34": (1000, 11.4),
    "resnet50": (1000, 15.4),
}


def millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@click.command()
def main() -> None:
    # The coder adds no parameters to a block that changes the shape: as "learner".
    transitions = [name for name in get_args(Transition) if name != "coder"]
    rows = []
    for kernel_size, tied, transition in product((1, 3), (False, True), transitions):
        coding = Coding(kernel_size, tied, transition)
        row = {"coder": f"{kernel_size}×{kernel_size}", "tied": tied, "transition": transition}
        with torch.device("meta"):
            for name, (classes, _) in PUBLISHED.items():
                row[name] = millions(pnnh_net(NETWORKS[name], classes, coding))
        rows.append(row)
    with torch.device("meta"):
        plain = {
            name: millions(plain_net(NETWORKS[name], classes))
            for name, (classes, _) in PUBLISHED.items()
        }
    rows.append({"coder": "no PNNH", **plain})
    rows.append({"coder": "paper", **{name: count for name, (_, count) in PUBLISHED.items()}})
    table = pd.DataFrame(rows).round(3)
    write_csv(table, HERE / "parameters.csv")
    print(table.fillna("").to_string(index=False))


if __name__ == "__main__":
    main()
