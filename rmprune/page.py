"""One HTML page about a run or a sweep: figures, curves and layers, with nothing to fetch.

The page is a template with the results as JSON inside; all drawing is done by its script.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from rmprune import sweep
from rmprune.checkpoints import read_config
from rmprune.errors import UsageError
from rmprune.models import build_model
from rmprune.plain import PlainNet
from rmprune.plots import AXES, BLUE, CURVES, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from rmprune.reports import FORMATS, layer_table, records, residual_table
from rmprune.store import load

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)


def page(folder: Path) -> str:
    """The page of a run's folder, or of a sweep's.

    Raises:
        UsageError: The folder holds neither, or one that is not finished.
    """
    if (folder / "latencies.csv").exists():
        return _filled(_sweep_content(folder))
    if (folder / "report.csv").exists():
        return _filled(_run_content(folder))
    raise UsageError(
        f"{folder} has no report.csv of a run and no latencies.csv of a sweep: "
        "give the folder of a finished one"
    )


def _filled(content: dict[str, Any]) -> str:
    template = resources.files("rmprune").joinpath("page.html").read_text(encoding="utf-8")
    # A name in the data must not close the script that it stands in.
    text = json.dumps(_without_nan(content), allow_nan=False).replace("<", "\\u003c")
    return template.replace("@DATA@", text)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sweep_content(folder: Path) -> dict[str, Any]:
    rows = sweep.timed_results(folder).dropna(subset=["net"])
    places = rows[["backend", "batch_size"]].drop_duplicates().to_dict("records")
    axes = [
        {"key": f"speedup {p['backend']} {p['batch_size']}", "larger": True,
         "label": f"speed-up, {p['backend']}, batch {p['batch_size']}"}
        for p in places
    ]  # fmt: skip
    for key in ("removed_params", "macs_ratio"):
        label, larger = AXES[key]
        axes.append({"key": key, "label": label, "larger": larger})
    several = rows["model"].nunique() > 1
    points = [_sweep_point(str(net), own, several) for net, own in rows.groupby("net", sort=False)]
    task, layers, missing = sweep.task_of(folder), {}, []
    for row in records(rows.drop_duplicates("net")):
        if not sweep.net_path(folder, row).exists():
            missing.append(row["net"])
            continue
        net = sweep.load_net(folder, row, len(task.classes))
        model = build_model(row["model"], len(task.classes))
        layers[row["net"]] = _layers(net, model, task.image_shape)
    hardware = ", ".join(rows["hardware"].astype(str).unique())
    # A folder that is kept under version control may hold its small nets only.
    without = f"; {len(missing)} without files, so without layers" if missing else ""
    return {
        "title": f"Sweep {folder.resolve().name}",
        "subtitle": f"{len(points)} nets; latencies in one run a backend on {hardware}, "
        f"{rows['threads'].iloc[0]} thread{without}",
        "axes": axes,
        "points": points,
        "layers": layers,
        "curves": [
            _curve(path.parent.name, pd.read_csv(path), number)
            for number, path in enumerate(sorted(folder.glob("trainings/*/metrics.csv")))
        ],
    }


def _sweep_point(net: str, own: pd.DataFrame, several_models: bool) -> dict[str, Any]:
    row = own.iloc[0]
    name, colour, _ = CURVES.get((row["method"], row["lowering"]), ("original", GREY, ""))
    if several_models:
        name = f"{name}, {row['model']}"
    speeds = {
        f"speedup {backend} {batch}": float(speedup)
        for backend, batch, speedup in zip(
            own["backend"], own["batch_size"], own["speedup"], strict=True
        )
    }
    lines = [
        f"{name}  {row['level']}  λ={row['sparsity']:g}  seed {row['seed']}",
        f"accuracy   {row['accuracy']:.2%}",
        f"parameters {row['params']:,.0f} ({row['params_ratio']:.1%})",
        f"MMACs      {row['macs'] / 1e6:.2f} ({row['macs_ratio']:.1%})",
        *(f"{key.removeprefix('speedup ')}  {value:.2f}×" for key, value in speeds.items()),
    ]
    return {
        "id": net,
        "name": f"{name}, {row['level']}, λ={row['sparsity']:g}, seed {row['seed']}",
        "curve": name,
        "colour": colour,
        "accuracy": 100 * float(row["accuracy"]),
        "values": {
            **speeds,
            "removed_params": 1 - float(row["params_ratio"]),
            "macs_ratio": float(row["macs_ratio"]),
        },
        "text": "\n".join(lines),
    }


def _run_content(folder: Path) -> dict[str, Any]:
    table = pd.read_csv(folder / "report.csv")
    config = read_config(folder)
    assert config is not None
    axes = [
        {"key": "speedup", "label": AXES["speedup"][0], "larger": True},
        {"key": "macs", "label": "MACs", "larger": False},
        {"key": "params", "label": "parameters", "larger": False},
    ]
    points = []
    for number, row in enumerate(table.to_dict("records")):
        shown = {title: form.format(row[key]) for key, (title, form) in FORMATS.items()
                 if key in row and key != "macs"}  # fmt: skip
        points.append(
            {
                "id": str(row["model"]),
                "name": str(row["model"]),
                "curve": str(row["model"]),
                "colour": COLOURS[number % len(COLOURS)],
                "accuracy": 100 * float(row["accuracy"]),
                "values": {axis["key"]: float(row[axis["key"]]) for axis in axes},
                "text": "\n".join([str(row["model"]), *(f"{k}  {v}" for k, v in shown.items())]),
            }
        )
    net = load(folder / "net.safetensors")
    first = table.iloc[0]
    return {
        "title": f"{config.model} on {config.data}",
        "subtitle": f"sparsity {config.sparsity:g}, "
        f"{config.target or f'threshold {config.threshold:g}'}, seed {config.seed}; "
        f"{first['backend']} on {first['hardware']}, {first['threads']} thread",
        "axes": axes,
        "points": points,
        "layers": {str(table["model"].iloc[-1]): records(layer_table(net))},
        "curves": [
            _curve("training", pd.read_csv(path), 0)
            for path in folder.glob("metrics.csv")  # none with --log none
        ],
    }


def _layers(
    net: nn.Module, original: nn.Module, image_shape: tuple[int, int, int]
) -> list[dict[str, Any]]:
    if isinstance(net, PlainNet):
        return records(layer_table(net))
    return records(residual_table(net, original, image_shape))


def _curve(name: str, metrics: pd.DataFrame, number: int) -> dict[str, Any]:
    return {
        "name": name,
        "colour": COLOURS[number % len(COLOURS)],
        "epochs": list(range(1, len(metrics) + 1)),
        "accuracy": [100 * value for value in metrics["test_accuracy"]],
    }
