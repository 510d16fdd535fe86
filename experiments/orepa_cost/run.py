"""What OREPA costs a training beside DBB and plain convolutions: memory and time of a step.

    python experiments/orepa_cost/run.py

Memory is what autograd saves for the backward pass, by hooks on saved tensors, each storage once,
without the parameters. It is counted on torch's meta device, at the paper's size, so that it is
the same on every machine. Time is measured on --device, the three networks in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmprune.models.unit_resnet import UNITS, imagenet_resnet
from rmprune.reports import environment

CLASSES = 1000
SAVING, FASTER = 0.70, 1.5  # OREPA's extra memory below DBB's; DBB's time over OREPA's


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes of all storages that a training step keeps for its backward pass."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor  # alive as long as the graph, so that no other storage gets its address

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)
    del loss
    return sum(size for address, size in kept.items() if address not in own)


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step: forward, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def interleaved_seconds(
    steps: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """One sample of each per round, beginning with another one each time; the first is dropped."""
    names, seconds = list(steps), {name: [] for name in steps}
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def batch(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, size, size, device=device)
    return images, torch.zeros(count, dtype=torch.long, device=device)


def spread(samples: Sequence[float]) -> float:
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return upper - lower


@click.command()
@click.option("--layers", default=18, show_default=True, type=click.Choice([18, 34, 50]))
@click.option("--batch-size", default=16, show_default=True, help="Images of a timed step.")
@click.option("--image-size", default=224, show_default=True, help="Pixels of a timed step.")
@click.option("--rounds", default=5, show_default=True, help="Timed steps of each network.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--threads", default=1, show_default=True, help="Of the CPU.")
def main(
    layers: int, batch_size: int, image_size: int, rounds: int, device: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    for kind in UNITS:
        with torch.device("meta"):
            model = imagenet_resnet(kind, layers, CLASSES)
        saved = saved_bytes(model, *batch(64, 224, "meta"))
        parameters = sum(p.numel() for p in model.parameters())
        rows.append({"kind": kind, "parameters": parameters, "saved_gib": saved / 2**30})
    timed = batch(batch_size, image_size, device)
    models = {kind: imagenet_resnet(kind, layers, CLASSES).to(device) for kind in UNITS}
    seconds = interleaved_seconds(
        {kind: step_of(model, *timed) for kind, model in models.items()}, rounds
    )
    table = pd.DataFrame(rows).set_index("kind")
    table["step_ms"] = [1000 * statistics.median(seconds[kind]) for kind in table.index]
    table["step_iqr_ms"] = [1000 * spread(seconds[kind]) for kind in table.index]
    extra = table["saved_gib"] - table.loc["plain", "saved_gib"]
    saving = 1 - extra["orepa"] / extra["dbb"]
    faster = table.loc["dbb", "step_ms"] / table.loc["orepa", "step_ms"]
    print(table.round(3).to_string())
    print(f"extra memory of OREPA below DBB's: {saving:.1%} (bar {SAVING:.0%})")
    print(f"steps of OREPA faster than DBB's: {faster:.2f} times (bar {FASTER})")
    settings = {"layers": layers, "batch_size": batch_size, "image_size": image_size}
    settings = environment() | settings | {"device": device, "threads": threads, "rounds": rounds}
    name = f"resnet{layers}-{torch.device(device).type}-{batch_size}x{image_size}.csv"
    table.reset_index().assign(**settings).to_csv(Path(__file__).with_name(name), index=False)


if __name__ == "__main__":
    main()
