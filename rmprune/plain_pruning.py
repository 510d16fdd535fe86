"""Selecting channels of a run whose model is no chain of residual blocks: as a plain net.

The trained model is converted at once; selection, removal and fine-tuning go on with the list
of layers, whose weights are all free from then on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from rmprune.budgets import layer_costs, ratio_to_original, smallest_within_drop
from rmprune.checkpoints import Checkpoint, SlimConfig, deploy, run_calibration
from rmprune.convert import convert
from rmprune.costs import Cost, relative
from rmprune.data import Dataset
from rmprune.errors import UsageError
from rmprune.grouping import strongest
from rmprune.joints import joints_of
from rmprune.lowering import likeliest
from rmprune.plain import PlainNet
from rmprune.plain_selection import plain_savings, plain_scales, remove_channels, select_plain
from rmprune.rewrite import calibrate_bn
from rmprune.store import layers_of
from rmprune.targets import TOLERANCE, Target, search, thresholds_of

LEAST_KEPT = 1 / 8  # of a layer's channels, by a target: there is no way past a layer


def plain_pruned(
    model: nn.Module, checkpoint: Checkpoint, config: SlimConfig, kept: Path, data: Dataset
) -> Checkpoint:
    """The plain net of a model, without the channels that the run's budget takes.

    Args:
        model: In evaluation mode: the checkpoint's, or its plain net, which is pruned further.
        checkpoint: What was trained.
        config: Its ``threshold``, or its ``target``, says how many channels go.
        kept: The folder of the latency table.
        data: For the statistics of BNs, and whose held-out images a target of accuracy is for.

    Returns:
        A checkpoint that is ready to be fine-tuned: behind each convolution there is a BN.

    Raises:
        UsageError: Channels shall go by anything but scales, or no images were held out.
        PruningError: The target cannot be met.
        ConversionError: The model does not convert.
    """
    check_by_scale(config)
    example = checkpoint.task.example_input()
    net = model if isinstance(model, PlainNet) else convert(model, example, keep_bn=False)
    net = calibrate_bn(net, run_calibration(config, data))
    scores = plain_scales(net)

    def masked(threshold: float) -> Checkpoint:
        masks = select_plain(net, threshold, scores, config.round_to)
        left = remove_channels(net, masks)
        return Checkpoint(
            "masked",
            config,
            checkpoint.task,
            left.state_dict(),
            narrowed=masks,
            layers=layers_of(left),
        )

    if config.target is None:
        return masked(config.threshold)
    target = Target.parse(config.target)
    scores = _per_cost(scores, net, target, checkpoint, config, kept)
    thresholds = thresholds_of(scores)
    if target.kind == "accuracy-drop":
        return smallest_within_drop(
            target.value / 100, masked, lambda found: found, thresholds, config, data
        )

    of_original = ratio_to_original(target.kind, replace(checkpoint, config=config))

    def ratio(found: Checkpoint) -> float:
        return of_original(deploy(found, likeliest))

    found, _ = search(thresholds, masked, ratio, target.value, TOLERANCE[target.kind])
    return found


def _per_cost(
    scales: dict[str, Tensor],
    net: PlainNet,
    target: Target,
    checkpoint: Checkpoint,
    config: SlimConfig,
    kept: Path,
) -> dict[str, Tensor]:
    """Scales over what the removal of a channel saves; inf for those that must stay.

    Beside a convolution in groups an eighth of each group stays, so that none is empty.
    """
    cost: Cost = target.kind if target.kind != "accuracy-drop" else config.cost
    shares = dict.fromkeys(scales, 1.0)
    if cost != "uniform":
        costs = layer_costs(cost, lambda: net, checkpoint.task, config, kept)
        savings = plain_savings(net, checkpoint.task.example_input(), costs)
        shares = relative(savings, {name: len(scale) for name, scale in scales.items()})
    scores = {}
    for joint in joints_of(net):
        parts = scales[joint.name].view(joint.sections, -1)
        stay = strongest(parts, math.ceil(LEAST_KEPT * parts.shape[1]))
        scores[joint.name] = (parts / shares[joint.name]).masked_fill(stay, math.inf).flatten()
    return scores


def check_by_scale(config: SlimConfig) -> None:
    """Refuse any other importance than scales, which asks for a chain of residual blocks."""
    if config.importance != "scale":
        raise UsageError(
            f"{config.model} is no chain of residual blocks: it is pruned as a plain net, by "
            "--importance scale"
        )
