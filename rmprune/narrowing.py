"""Masked models without the inner channels that are off, so that fine-tuning costs less.

Channels inside of a block concern two convolutions and nothing else: they can go at once,
while the model is still residual and its other channels are held by masks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from rmprune.blocks import Unit, split_units
from rmprune.graph import parse
from rmprune.selection import Masks


def narrow(slim: fx.GraphModule, masks: Masks) -> Masks:
    """Cut the inner channels that masks switch off out of a slimmable model.

    Of a body that is switched off altogether one channel stays, held at zero; grouped
    convolutions stay as they are.

    Args:
        slim: The slimmable model that the masks were selected from, with or without them;
            changed in place. Under the masks its outputs stay what they are.
        masks: See `rmprune.selection.select`.

    Returns:
        The masks of the channels that the model still has.
    """
    keep = dict(masks.keep)
    for block in parse(slim).blocks:
        for unit, follower in pairwise(split_units(block.body)):
            if unit.bn is None or unit.kernel.groups > 1 or follower.kernel.groups > 1:
                continue
            mask = masks.keep[unit.bn.name]
            _cut(unit, follower, survivors(mask))
            keep[unit.bn.name] = mask[survivors(mask)]
    return Masks(keep, masks.forced)


def widen(masks: Masks, before: Masks) -> Masks:
    """Masks of a narrowed model as masks of the model that it was narrowed from.

    Args:
        masks: Of the narrowed model.
        before: The masks that it was narrowed by.
    """
    keep = {}
    for name, mask in masks.keep.items():
        if len(mask) == len(before.keep[name]):
            keep[name] = mask & before.keep[name]
        else:
            keep[name] = torch.zeros_like(before.keep[name])
            keep[name][survivors(before.keep[name])] = mask
    return Masks(keep, masks.forced)


def survivors(mask: Tensor) -> Tensor:
    """Which channels of a mask ``(channels,)`` narrowing leaves, ``(n,)``: one at least."""
    kept = mask.nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.long)


@torch.no_grad()
def _cut(unit: Unit, follower: Unit, kept: Tensor) -> None:
    assert unit.bn is not None
    assert isinstance(unit.bn.module, nn.BatchNorm2d)
    _take(unit.kernel, kept)
    unit.kernel.out_channels = len(kept)
    _take(unit.bn.module, kept)
    unit.bn.module.num_features = len(kept)
    activation = None if unit.activation is None else unit.activation.module
    if isinstance(activation, nn.PReLU) and activation.num_parameters > 1:
        _take(activation, kept)
        activation.num_parameters = len(kept)
    columns = follower.kernel.weight[:, kept.to(follower.kernel.weight.device)]
    follower.kernel.weight = nn.Parameter(columns.clone())
    follower.kernel.in_channels = len(kept)


def _take(module: nn.Module, kept: Tensor) -> None:
    """Keep some channels, the first dimension, of all that a module holds, masks included."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            rows = parameter[kept.to(parameter.device)].clone()
            setattr(owner, name, nn.Parameter(rows, parameter.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.ndim:
                setattr(owner, name, buffer[kept.to(buffer.device)].clone())
