"""What a target is measured by: a net's cost beside its original's, and accuracy kept back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from torch import nn

from rmprune.backends import deploy as deploy_on
from rmprune.backends import repeated, time_deployed
from rmprune.checkpoints import Checkpoint, SlimConfig, Task, pick_device
from rmprune.costs import Cost, LayerCosts, counted, latency_table, measured, sites
from rmprune.data import Dataset, hold_out
from rmprune.measure import count_macs, count_params, evaluate
from rmprune.models import build_model
from rmprune.store import write_csv


def layer_costs(
    cost: Cost, network: Callable[[], nn.Module], task: Task, config: SlimConfig, folder: Path
) -> LayerCosts:
    """What a channel more costs each layer; a latency table is measured once, in the folder.

    Args:
        cost: In which unit.
        network: Makes the network whose layers are timed.
        task: For the size of its input.
        config: Where it shall run.
        folder: Of the table.
    """
    if cost != "latency":
        return counted(cost)
    layers = sites(network(), task.example_input())
    # What was narrowed has other layers, and so have nets with additions and plain ones.
    shapes = [(name, *site.layer.weight.shape, *site.input_shape) for name, site in layers.items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    settings = (config.backend, config.threads, config.latency_batch, config.round_to)
    path = folder / f"latency-{'-'.join(map(str, (*settings, config.lowering, digest)))}.csv"
    if not path.exists():
        write_csv(latency_table(layers, config.platform, config.round_to), path)
    return measured(pd.read_csv(path))


def deployed_ratio(kind: str, checkpoint: Checkpoint, net: nn.Module) -> float:
    """What a net costs, as a share of the cost of the original model of its run."""
    return ratio_to_original(kind, checkpoint)(net)


def ratio_to_original(kind: str, checkpoint: Checkpoint) -> Callable[[nn.Module], float]:
    """What gives a net's cost as a share of the original model's; that is deployed once."""
    config, example = checkpoint.config, checkpoint.task.example_input()
    original = build_model(config.model, len(checkpoint.task.classes)).eval()
    if kind == "params":
        return lambda net: count_params(net) / count_params(original)
    if kind == "macs":
        return lambda net: count_macs(net, example) / count_macs(original, example)
    platform = config.platform
    deployed = deploy_on(original, repeated(example, platform.batch_size), platform)

    def timed(net: nn.Module) -> float:
        timings = time_deployed(
            {"original": deployed, "net": net}, example, platform, rounds=9, warn=False
        )
        return timings["net"].median_ms / timings["original"].median_ms

    return timed


def smallest_within_drop(
    drop: float,
    masked: Callable[[float], Checkpoint],
    settled: Callable[[Checkpoint], Checkpoint],
    thresholds: list[float],
    config: SlimConfig,
    data: Dataset,
) -> Checkpoint:
    """Raise the threshold as long as the masked model loses no more on held-out images.

    Args:
        drop: Of the share of images that are classified right.
        masked: The model with the channels under a threshold gone.
        settled: The same, ready to be evaluated.
        thresholds: Ascending, from 0 on.
        config: With the share that was held out.
        data: Whose held-out images count.
    """
    _, held_out = hold_out(data, config.holdout)
    device = pick_device(config.device)

    def accuracy(checkpoint: Checkpoint) -> float:
        model = settled(checkpoint).build(device)
        correct, images = evaluate(model, held_out, mean=data.mean, std=data.std, device=device)
        return correct / images

    least = accuracy(masked(0.0)) - drop
    low, high = 0, len(thresholds)
    while high - low > 1:
        middle = (low + high) // 2
        if accuracy(masked(thresholds[middle])) >= least:
            low = middle
        else:
            high = middle
    return masked(thresholds[low])
