"""Tables of what was measured, and what they were measured on."""

from __future__ import annotations

import platform as machine
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rmprune.backends import ONE_IMAGE, Platform, time_deployed
from rmprune.data import Dataset
from rmprune.measure import count_params, layer_macs, measure
from rmprune.plain import PlainNet, Width
from rmprune.progress import T, Track, no_progress

FORMATS = {
    "accuracy": ("accuracy", "{:.2%}"),
    "params": ("params", "{:,}"),
    "macs": ("MMACs", "{:.2f}"),
    "latency_ms": ("latency ms", "{:.2f}"),
    "latency_iqr_ms": ("± IQR", "{:.2f}"),
    "speedup": ("speed-up", "{:.2f}×"),
    "images_per_second": ("images/s", "{:,.0f}"),
    "arena_bytes": ("arena", "{:,.0f}"),
    "measured_bytes": ("measured", "{:,.0f}"),
    "file_bytes": ("file", "{:,.0f}"),
    "largest_shift": ("largest shift", "{:.3g}"),
}


def compare(
    models: Mapping[str, nn.Module],
    example_input: Tensor,
    data: Dataset | None = None,
    *,
    platform: Platform = ONE_IMAGE,
    track: Track = no_progress,
) -> pd.DataFrame:
    """Measure nets side by side, their latencies in one run and in turn.

    Latencies are those of deployment, see `rmprune.backends`. Parameters and MACs are those
    of the nets as given.

    Args:
        models: By name, on the device of the example input; the first is the reference of
            the speed-ups.
        example_input: ``(N, C, H, W)``; its first image is timed.
        data: For the accuracy on all test images; None leaves it out.
        platform: What the latency is measured on.
        track: Progress display.

    Returns:
        A row for each net: ``model``, ``accuracy`` (share of the test images), ``params``,
        ``macs`` (of one image), ``latency_ms`` (median, whole batch), ``latency_iqr_ms``,
        ``speedup`` over the first net.
    """
    timings = time_deployed(models, example_input, platform)
    rows = []
    for name, model in models.items():
        report = measure(model, example_input, data, timed=False, track=_named(track, name))
        rows.append(
            {
                "model": name,
                "accuracy": report.accuracy,
                "params": report.params,
                "macs": report.macs,
                "latency_ms": timings[name].median_ms,
                "latency_iqr_ms": timings[name].iqr_ms,
            }
        )
    table = pd.DataFrame(rows)
    table["speedup"] = table["latency_ms"].iloc[0] / table["latency_ms"]
    return table


def _named(track: Track, name: str) -> Track:
    """A display that says which net it is about."""

    def named(
        iterable: Iterable[T], length: int, label: str, status: Callable[[], str] | None = None
    ) -> Iterable[T]:
        return track(iterable, length, f"{label}: {name}", status)

    return named


def environment(platform: Platform = ONE_IMAGE) -> dict[str, Any]:
    """What figures were measured on."""
    return {
        "hardware": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": platform.threads,
        "batch_size": platform.batch_size,
        "backend": platform.versions,
        "python": machine.python_version(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return machine.processor() or machine.machine()


def layer_table(net: PlainNet) -> pd.DataFrame:
    """What became of every layer.

    Returns:
        A row for each convolution and linear layer: ``layer``, ``channels_before`` and
        ``channels`` (outputs before pruning, and now), ``reserved_before`` and ``reserved``
        (how many of them are carried through a block), ``kernel``, ``params`` and, if the
        net knows its input shape, ``macs``. A convolution that is no longer there has 0 channels.
    """
    macs = {} if net.input_shape is None else layer_macs(net, net.input_shape)
    modules = {_own_name(path): module for path, module in net.named_modules()}
    macs = {_own_name(path): count for path, count in macs.items()}
    names = [n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
    gone = [name for name in net.converted_widths if name not in modules]
    order = list(net.converted_widths) + [n for n in names if n not in net.converted_widths]
    rows = []
    for name in order:
        module = modules.get(name)
        outputs = 0 if name in gone else int(getattr(module, "weight").shape[0])  # noqa: B009
        before = net.converted_widths.get(name, Width(outputs))
        rows.append(
            {
                "layer": name,
                "kernel": _kernel(module),
                "channels_before": before.total,
                "channels": outputs,
                "reserved_before": before.reserved,
                "reserved": net.widths[name].reserved if name in net.widths else 0,
                "params": 0 if module is None else count_params(module),
                "macs": macs.get(name, 0),
            }
        )
    return pd.DataFrame(rows)


def residual_table(
    net: nn.Module, original: nn.Module, input_shape: tuple[int, int, int]
) -> pd.DataFrame:
    """The columns of `layer_table` for a residual network that lost channels.

    Args:
        net: The network.
        original: The same before, whose layers have the same paths.
        input_shape: ``(channels, height, width)``.
    """
    before, macs = dict(original.named_modules()), layer_macs(net, input_shape)
    rows = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            other = before.get(name)
            full = other.weight if isinstance(other, nn.Conv2d | nn.Linear) else module.weight
            rows.append(
                {
                    "layer": name,
                    "kernel": _kernel(module),
                    "channels_before": len(full),
                    "channels": len(module.weight),
                    "reserved_before": 0,
                    "reserved": 0,
                    "params": count_params(module),
                    "macs": macs[name],
                }
            )
    return pd.DataFrame(rows)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by column name."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _own_name(path: str) -> str:
    """What a layer is called wherever it stands: a `ResidualBlock` has some inside."""
    return path.rpartition(".body.")[2]


def _kernel(module: nn.Module | None) -> str:
    if isinstance(module, nn.Conv2d):
        rows, columns = module.kernel_size
        grouped = f" in {module.groups} groups"
        if module.groups == 1:
            grouped = ""
        elif module.groups == module.in_channels:
            grouped = " depthwise"
        return f"{rows}×{columns}{grouped}"
    return "" if module is None else "linear"


def as_text(table: pd.DataFrame) -> str:
    """A table for a terminal, with figures in readable units.

    A column and its ``…_before`` become one: ``before → now``.
    """
    shown = pd.DataFrame()
    for column in table.columns:
        title, form = FORMATS.get(column, (column.replace("_", " "), "{}"))
        values = table[column] / 1e6 if column == "macs" else table[column]
        texts = ["–" if pd.isna(value) else form.format(value) for value in values]
        if f"{column}_before" in table:
            before = table[f"{column}_before"]
            texts = [f"{old} → {new}" for old, new in zip(before, texts, strict=True)]
        if not column.endswith("_before"):
            shown[title] = texts
    return shown.to_string(index=False)
