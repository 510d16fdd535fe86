"""Channels of a plain net chosen by scale and removed: "plain pruning".

For networks that are no chains of residual blocks, so that no masks can be made in their
training form. Converted, they are lists, and there a channel concerns one convolution and its
reader. Its scale is |γ| of the BN that `rmprune.rewrite.calibrate_bn` puts behind the
convolution: the standard deviation of what the channel puts out. Of one trained BN that is its
own |γ|; of several that were added, as RepVGG's three, it is what they come to together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rmprune.costs import LayerCosts, sites
from rmprune.errors import PruningError, UsageError
from rmprune.grouping import even_masks, rounded
from rmprune.joints import joints_of
from rmprune.plain import PlainNet
from rmprune.removal import prune
from rmprune.selection import Masks


def plain_scales(net: PlainNet) -> dict[str, Tensor]:
    """Scales of the channels that can be removed, ``(channels,)`` by convolution.

    A channel that goes through depthwise convolutions has the smallest scale of all. Channels that
    a group norm normalises together go together: each has the mean of their scales.

    Raises:
        PruningError: A convolution has no BN.
    """
    scales = {}
    for joint in joints_of(net):
        for name, bn in joint.bns.items():
            if bn is None:
                raise PruningError(
                    f"layer {name!r} has no BN; give the net BNs with rmprune.rewrite.calibrate_bn"
                )
        weights = [bn.weight.detach().abs() for bn in joint.bns.values() if bn is not None]
        scale = torch.stack(weights).amin(0)
        for norm in joint.group_norms:
            groups = norm.by_group()
            scale[groups] = scale[groups].mean(1, keepdim=True)
        scales[joint.name] = scale
    return scales


def plain_savings(
    net: PlainNet, example_input: Tensor, layer_costs: LayerCosts
) -> dict[str, float]:
    """What the removal of one channel saves, by convolution, in the unit of the costs.

    Args:
        net: A plain net.
        example_input: ``(N, C, H, W)``.
        layer_costs: What one channel more costs each layer, see `rmprune.costs`.
    """
    costs = layer_costs(sites(net, example_input))
    return {
        joint.name: sum(costs[name].per_output for name in joint.bns)
        + costs[joint.consumer_name].per_input
        for joint in joints_of(net)
    }


def select_plain(
    net: PlainNet, threshold: float, scores: Mapping[str, Tensor], round_to: int = 1
) -> Masks:
    """Choose the channels whose score reaches a threshold; of every layer at least one.

    On either side of a convolution in groups all groups keep equally many channels, or none, see
    `rmprune.grouping.even_masks`; beside a group norm, too, they keep all.

    Args:
        net: With BNs, see `plain_scales`.
        threshold: On the scores.
        scores: ``(channels,)`` by convolution: the scales, or these over what is saved.
        round_to: Widths become a multiple of this: those with the largest scales come back,
            where there are enough; and with them all that a group norm normalises with them.

    Returns:
        Masks by convolution.

    Raises:
        UsageError: The threshold is negative or not a number, or there is no such multiple.
    """
    if not 0 <= threshold < math.inf:
        raise UsageError(f"the threshold must be finite and not negative, but it is {threshold}")
    if round_to < 1:
        raise UsageError(f"widths can be multiples of 1 or more, not of {round_to}")
    joints, scales = joints_of(net), plain_scales(net)
    groups = [joint.producer.groups for joint in joints] + [
        joint.consumer_groups for joint in joints[-1:]
    ]
    spared, forced = [], []
    for joint in joints:
        score = scores[joint.name]
        if joint.is_whole:
            score = torch.full_like(score, math.inf)
        elif not (score >= threshold).any():
            forced.append(joint.name)
            score = score.index_fill(0, scales[joint.name].argmax(), math.inf)
        spared.append(score)
    masks = even_masks(spared, groups, threshold)
    keep = {}
    for joint, mask in zip(joints, masks, strict=True):
        kept = torch.ones_like(mask)
        if not joint.is_whole:
            kept = rounded(mask, scales[joint.name], joint.sections, round_to)
        for norm in joint.group_norms:
            together = norm.by_group()
            kept[together] = kept[together].any(1, keepdim=True)
        keep[joint.name] = kept
    return Masks(keep, tuple(forced))


def remove_channels(net: PlainNet, masks: Masks) -> PlainNet:
    """The net without the channels that masks switch off; what they leave is folded on.

    A channel leaves act(β), the activation of its mean, to the bias of the layer that reads it,
    exact but for the border where that one pads; nothing where a squeeze-and-excitation gate
    lies between.
    """
    result = copy.deepcopy(net)
    with torch.no_grad():
        for joint in joints_of(result):
            off = ~masks.keep[joint.name].to(joint.producer.weight.device)
            for bn in joint.bns.values():
                assert bn is not None
                bn.weight[off] = 0
                if joint.gates:
                    bn.bias[off] = 0
            for gate in joint.gates:
                gate.get_parameter("weight0")[:, off] = 0  # it would read nothing but zeros
    return prune(result)
