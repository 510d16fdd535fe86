"""Physical removal of a plain net's dead channels, with what they leave behind folded on.

In a list, a channel concerns one layer that computes it and one that reads it, and depthwise
convolutions in between. It is dead if it is *constant* (its row, its filter or its scale is zero)
or *unread* (its column is zero); one death brings about others up and down the list, until
nothing changes. Where a convolution in groups is one of the two, what is left must fall into equal
groups again: into new ones (`rmprune.packing`), or each of the old ones loses as many channels.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rmprune.cutting import cut_channels, cut_connections
from rmprune.errors import PruningError, UsageError
from rmprune.grouping import strongest
from rmprune.joints import Joint, joints_of
from rmprune.packing import Groups, Prices, pack
from rmprune.plain import PlainNet, Width


def prune(net: PlainNet, threshold: float | None = None) -> PlainNet:
    """Remove the channels that a plain net does not need.

    Without a threshold only channels that are constant or unread go. A channel whose scale
    is 0 leaves act(β), which is added to the bias of the layer that reads it: nothing changes
    if it is 0, and otherwise only where that layer reads its zero padding. A channel that is
    constant because it reads nothing goes where that is exact.

    Args:
        net: As `rmprune.convert` returns it; left as it is.
        threshold: Channels whose scale ``|γ|`` lies under it are switched off first: they
            become the constant act(β). Needs the BNs (``convert(..., keep_bn=True)``).

    Returns:
        A smaller net in evaluation mode. Every layer keeps at least one channel; where groups
        are not equally full, channels of zeros fill them.

    Raises:
        UsageError: The threshold is negative or not a number.
        PruningError: A threshold is given but the net has no BNs behind its convolutions, or
            the net is not plain.

    Warns:
        UserWarning: A layer kept one channel though all of its channels are dead.
    """
    if not net.is_plain:
        raise PruningError(
            "this net has blocks with additions; prune the plain net that it was lowered from"
        )
    result = copy.deepcopy(net).eval()
    joints = joints_of(result)
    with torch.no_grad():
        if threshold is not None:
            _switch_off(joints, threshold)
        alive = [torch.ones(len(joint.producer.weight), dtype=torch.bool) for joint in joints]
        while True:
            before = [mask.clone() for mask in alive]
            for joint, mask in zip(joints, alive, strict=True):
                joint.fold_constants(mask)
            for joint, mask in reversed(list(zip(joints, alive, strict=True))):
                joint.silence_unread(mask)
            if all(torch.equal(*pair) for pair in zip(before, alive, strict=True)):
                break
        for joint, mask in zip(joints, alive, strict=True):
            _keep_one(joint, mask)
        kept = [_evenly(joint, mask) for joint, mask in zip(joints, alive, strict=True)]
        groups = _regroup(joints, alive, kept)
        _cut(result, joints, kept, groups)
    widths = {**result.widths, **_new_widths(result.widths, joints, alive, kept)}
    return _checked(result.with_layers(OrderedDict(result.named_children()), widths).eval())


def _switch_off(joints: list[Joint], threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise UsageError(f"the threshold must be finite and not negative, but it is {threshold}")
    for name, bn in (item for joint in joints for item in joint.bns.items()):
        if bn is None:
            raise PruningError(
                f"layer {name!r} has no BN, so its channels have no scales to compare "
                "with a threshold; prune the net that convert(..., keep_bn=True) gives"
            )
        bn.weight[bn.weight.abs() < threshold] = 0


def _keep_one(joint: Joint, alive: Tensor) -> None:
    """Let the channel with the largest scale (without BN, the first) stay if all are dead."""
    if alive.any():
        return
    bn = joint.bns[joint.name]
    best = 0 if bn is None else int(bn.weight.abs().argmax())
    alive[best] = True
    warnings.warn(
        f"all channels of layer {joint.name!r} are dead; one is kept, and the net's output "
        "no longer depends on its input there: a smaller threshold keeps more",
        stacklevel=3,
    )


def _evenly(joint: Joint, alive: Tensor) -> Tensor:
    """The channels that stay so that groups stay what they are, ``(n,)``: some dead ones, too."""
    if joint.sections == 1:
        return alive.nonzero().flatten()
    if joint.is_whole:
        return torch.arange(len(alive))
    parts = alive.view(joint.sections, -1)
    fullest = int(parts.sum(1).max())
    return strongest(parts.int(), fullest).flatten().nonzero().flatten()


def _regroup(
    joints: Sequence[Joint], alive: Sequence[Tensor], kept: list[Tensor]
) -> dict[str, int]:
    """New groups where they are cheaper; puts their channels into what is kept.

    Between layers without groups a convolution's channels can stand in any order.

    Returns:
        The number of groups by convolution.
    """
    groups: dict[str, int] = {}
    for here, (before, behind) in enumerate(pairwise(joints)):
        conv = behind.producer
        if conv.groups == 1 or before.consumer is not conv:
            continue
        if before.producer.groups > 1 or behind.consumer_groups > 1:
            continue
        if before.group_norms or behind.group_norms:
            continue
        lives = alive[here], alive[here + 1]
        if all(bool(mask.all()) for mask in lives):
            continue
        taps, used = conv.weight[0, 0].numel(), (conv.weight != 0).flatten(2).any(2).cpu()
        columns = behind.columns()[0]
        prices = Prices(taps, before.producer.weight[0].numel(), columns[:, 0].numel())
        found = pack(used, conv.groups, lives, prices)
        same = Groups(conv.groups, kept[here], kept[here + 1])
        if found is not None and found.cost(prices) < same.cost(prices):
            groups[behind.name] = found.number
            kept[here], kept[here + 1] = found.inputs, found.outputs
    return groups


def _cut(
    net: PlainNet, joints: Sequence[Joint], kept: Sequence[Tensor], groups: Mapping[str, int]
) -> None:
    """Cut all layers down to the channels that are kept."""
    outputs = {joint.name: channels for joint, channels in zip(joints, kept, strict=True)}
    inputs = {}
    for joint, channels in zip(joints, kept, strict=True):
        positions = torch.arange(joint.positions)
        inputs[joint.consumer_name] = (channels[:, None] * joint.positions + positions).flatten()
        for module in joint.between.values():
            cut_channels(module, channels.to(joint.producer.weight.device))
    for name in outputs.keys() | inputs.keys():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        number = layer.groups if isinstance(layer, nn.Conv2d) else 1
        reads = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        cut_connections(
            layer,
            outputs.get(name, torch.arange(len(layer.weight))),
            inputs.get(name, torch.arange(reads)),
            groups.get(name, number),
        )


def _new_widths(
    widths: dict[str, Width],
    joints: Sequence[Joint],
    alive: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> dict[str, Width]:
    """How many own and reserved channels are left in each layer; zeros count as reserved."""
    result: dict[str, Width] = {}
    for joint, mask, channels in zip(joints, alive, kept, strict=True):
        width = widths.get(joint.name, Width(len(mask)))
        own = torch.arange(len(mask)) % 2 == 0
        if not width.alternating:
            own = torch.arange(len(mask)) < width.own
        count = int(mask[own].sum())
        result |= dict.fromkeys(joint.bns, Width(count, len(channels) - count))
    return result


def _checked(net: PlainNet) -> PlainNet:
    """The net, after a forward pass has shown that its layers fit."""
    if net.input_shape is not None:
        like = next(net.parameters())
        with torch.no_grad():
            net(torch.zeros(1, *net.input_shape, device=like.device, dtype=like.dtype))
    return net
