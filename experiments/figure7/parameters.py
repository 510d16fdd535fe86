"""Accuracy against removed parameters: the nets that were made for few of them, and the rival's.

    python experiments/figure7/parameters.py

Writes parameters.png beside this file.
"""

from pathlib import Path

import pandas as pd

from rmprune.plots import draw_sweep

HERE = Path(__file__).parent
SWEEPS = ("resnet20", "resnet20-quarters", "resnet20-avx2")


def main() -> None:
    tables = [pd.read_csv(HERE / name / "results.csv").assign(folder=name) for name in SWEEPS]
    rows = pd.concat(tables, ignore_index=True)
    rows["sweep"] = rows["sweep"].fillna(rows["folder"])
    # The last folder has nets of the others again, which were timed beside its own.
    rows = rows[(rows["folder"] != SWEEPS[-1]) | rows["sweep"].isin(["group-norm", "rivals"])]
    greedy = (rows["method"] == "rm") & (rows["sweep"] != "group-norm")
    made_for_speed = greedy & ~rows["level"].str.startswith("params")
    rows = rows[(rows["lowering"] != "plain") & ~made_for_speed]
    rows = rows.assign(removed_params=1 - rows["params_ratio"])
    figure = draw_sweep(rows, "removed_params", "ResNet-20, CIFAR-10")
    figure.savefig(HERE / "parameters.png", dpi=200)


if __name__ == "__main__":
    main()
