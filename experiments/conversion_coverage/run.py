"""Convert every residual classification network of torchvision, and families of timm's.

python experiments/conversion_coverage/run.py             # all, about half an hour
python experiments/conversion_coverage/run.py --only timm:seresnet50 --only torchvision:resnet152

Weights are random, BN statistics and affine parameters too. Each network is converted in a
process of its own; the rows of results.csv are replaced one by one, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import pandas as pd
import torch
from torch import nn

import rmprune
from rmprune.graph import trace
from rmprune.measure import count_macs, count_params
from rmprune.reports import environment
from rmprune.steps import Addition, read

RESULTS = Path(__file__).with_name("results.csv")
TABLE = Path(__file__).with_name("TABLE.md")
COLUMNS = {
    "model": "model",
    "additions": "additions",
    "params": "parameters, M",
    "plain_params": "plain",
    "macs": "MMACs",
    "plain_macs": "plain",
    "macs_ratio": "ratio",
    "float64_error": "error, float64",
    "float32_error": "float32",
    "carried": "carried",
    "seconds": "seconds",
}
TORCHVISION = """
resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d
wide_resnet50_2 wide_resnet101_2 mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2
mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1 efficientnet_b2
efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_s
efficientnet_v2_m efficientnet_v2_l regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf
regnet_x_8gf regnet_x_16gf regnet_x_32gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf
regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf
""".split()  # noqa: SIM905
TIMM = """
resnet18 resnet18d resnet26t resnet50d resnet50s resnext50_32x4d seresnet50 seresnext50_32x4d
legacy_seresnet18 wide_resnet50_2 resnetrs50 ecaresnet26t ecaresnet50d resnetv2_50 resnetblur18
skresnet18 res2net50_26w_4s regnetx_004 regnety_004 mobilenetv2_100 mobilenetv3_small_100
mobilenetv3_large_100 efficientnet_b0 tf_efficientnet_b0 mnasnet_100 semnasnet_100 spnasnet_100
fbnetc_100 hardcorenas_a rexnet_100 darknet53 cspresnet50 gernet_s repvgg_a0 xception41 dla34
resnest14d
""".split()  # noqa: SIM905
NAMES = [f"torchvision:{name}" for name in TORCHVISION] + [f"timm:{name}" for name in TIMM]


def randomise(model: nn.Module) -> nn.Module:
    """BN statistics and affine parameters that a wrong fold would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def convert_one(name: str, size: int) -> dict[str, object]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = randomise(rmprune.create_model(name, num_classes=1000)).eval()
    example = torch.randn(1, 3, size, size)
    row: dict[str, object] = {"model": name, "size": size, "params": count_params(model)}
    row["macs"] = count_macs(model, example)
    try:
        steps = read(trace(model)).steps
        row["additions"] = sum(isinstance(step.op, Addition) for step in steps)
        start = time.perf_counter()
        plain = rmprune.convert(model, example, keep_bn=False)
        row["seconds"] = round(time.perf_counter() - start, 1)
    except rmprune.RmpruneError as error:
        return {**row, "result": f"refused: {error}"}
    # Linux counts in KiB; what torch itself takes is not counted. Weights are float32.
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    weights = 4 * (count_params(model) + count_params(plain))
    with torch.no_grad():
        expected = model(example)
        error = ((plain(example) - expected).abs().max() / expected.abs().max()).item()
    leaves = not any(True for layer in plain for _ in layer.children())
    row |= {
        "result": "converted" if leaves else "not a list of leaf modules",
        "plain_params": count_params(plain),
        "plain_macs": count_macs(plain, example),
        "float64_error": f"{plain.info['float64_difference']:.1e}",
        "float32_error": f"{error:.1e}",
        "carried": " ".join(sorted({way["mode"] for way in plain.info["carried"]})),
        "peak_over_weights": round(peak / weights, 2),
    }
    row["macs_ratio"] = round(row["plain_macs"] / row["macs"], 2)
    return row


def as_markdown(table: pd.DataFrame) -> str:
    """What converts as a table, what does not as a list."""
    converted = table[table["result"] == "converted"]
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
    for row in converted.to_dict("records"):
        for key in ("params", "plain_params", "macs", "plain_macs"):
            row[key] = f"{row[key] / 1e6:.2f}"
        row["additions"] = f"{row['additions']:.0f}"
        row["carried"] = row["carried"] if isinstance(row["carried"], str) else "nothing"
        lines.append(f"| {' | '.join(str(row[key]) for key in COLUMNS)} |")
    others = table[table["result"] != "converted"].to_dict("records")
    lines += ["", *(f"- `{row['model']}`: {row['result']}" for row in others)]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--only", multiple=True, help="Names; by default all.")
@click.option("--size", default=64, show_default=True, help="Of the example image, in pixels.")
@click.option("--one", hidden=True)
def main(only: tuple[str, ...], size: int, one: str | None) -> None:
    if one is not None:
        row = convert_one(one, size) | environment(threads=torch.get_num_threads())
        old = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=["model"])
        table = pd.concat([old[old["model"] != one], pd.DataFrame([row])])
        table["order"] = table["model"].map({name: i for i, name in enumerate(NAMES)})
        table = table.sort_values("order").drop(columns="order")
        table.to_csv(RESULTS, index=False)
        TABLE.write_text(as_markdown(table))
        print(*(f"{key}={value}" for key, value in row.items() if key != "hardware"), flush=True)
        return
    done = set(pd.read_csv(RESULTS)["model"]) if RESULTS.exists() and not only else set()
    for name in only or NAMES:
        if name not in done:
            command = [sys.executable, __file__, "--one", name, "--size", str(size)]
            if subprocess.run(command, check=False).returncode:
                print(f"{name}: the process ended badly", flush=True)


if __name__ == "__main__":
    main()
