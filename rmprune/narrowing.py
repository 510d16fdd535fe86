"""Masked models without the inner channels and the blocks that are off.

Channels inside of a block concern two convolutions and nothing else: they can go at once,
while the model is still residual and its other channels are held by masks. Fine-tuning then
costs less.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

from rmprune.blocks import Unit, split_units
from rmprune.cutting import cut_channels, cut_connections
from rmprune.graph import parse
from rmprune.grouping import groups_left
from rmprune.passing import empty_blocks
from rmprune.selection import Masks


def narrow(slim: fx.GraphModule, masks: Masks) -> Masks:
    """Cut the inner channels and the empty blocks of masks out of a slimmable model.

    Of a body that is switched off in a block that must stay one channel stays, held at zero.
    Convolutions whose groups would be unequal, or whose kernel is composed of others, stay as
    they are.

    Args:
        slim: The slimmable model that the masks were selected from, with or without them;
            changed in place. Under the masks its outputs stay what they are.
        masks: See `rmprune.selection.select`.

    Returns:
        The masks of the channels that the model still has.
    """
    for block, relu, _ in reversed(empty_blocks(parse(slim), masks.keep)):
        relu.node.replace_all_uses_with(block.fork)
    slim.graph.eliminate_dead_code()
    slim.delete_all_unused_submodules()
    slim.recompile()
    chain = parse(slim)
    present = {layer.name for layer in chain.layers()}
    keep = {name: mask for name, mask in masks.keep.items() if name in present}
    for block in chain.blocks:
        units = split_units(block.body)
        kept = _channels_left(units, masks, slim)
        _cut_body(units, kept)
        for unit, channels in zip(units[:-1], kept[1:], strict=False):
            if unit.bn is not None:
                keep[unit.bn.name] = keep[unit.bn.name][channels]
    return Masks(keep, masks.forced)


def widen(masks: Masks, before: Masks) -> Masks:
    """Masks of a narrowed model as masks of the model that it was narrowed from.

    Args:
        masks: Of the narrowed model.
        before: The masks that it was narrowed by.
    """
    keep = dict(before.keep)  # blocks that are gone have no masks any more
    for name, mask in masks.keep.items():
        if len(mask) == len(before.keep[name]):
            keep[name] = mask & before.keep[name]
        else:
            keep[name] = torch.zeros_like(before.keep[name])
            keep[name][survivors(before.keep[name])] = mask
    return Masks(keep, masks.forced)


def cut(masks: Masks, slim: fx.GraphModule, before: Masks) -> Masks:
    """What is left of masks for a narrowed model: the reverse of `widen`.

    Args:
        masks: Of the model that it was narrowed from.
        slim: The narrowed model.
        before: The masks that it was narrowed by.
    """
    bns = {n: m for n, m in slim.named_modules() if isinstance(m, nn.BatchNorm2d)}
    keep = {
        name: mask if len(mask) == bns[name].num_features else mask[survivors(before.keep[name])]
        for name, mask in masks.keep.items()
        if name in bns
    }
    return Masks(keep, masks.forced)


def survivors(mask: Tensor) -> Tensor:
    """Which channels of a mask ``(channels,)`` narrowing leaves, ``(n,)``: one at least."""
    kept = mask.nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.long)


def _channels_left(units: Sequence[Unit], masks: Masks, slim: fx.GraphModule) -> list[Tensor]:
    """The channels that stay: those that a body reads, then those behind each convolution.

    Returns:
        ``(channels,)`` of bool each.
    """
    kept = [torch.ones(units[0].kernel.in_channels, dtype=torch.bool)]
    for unit in units:
        mask = torch.ones(unit.kernel.out_channels, dtype=torch.bool)
        if unit.bn is not None and unit is not units[-1]:
            left = survivors(masks.keep[unit.bn.name])
            mask = torch.zeros_like(mask).index_fill(0, left, True)
        kept.append(mask)
    for place, unit in enumerate(units):
        if slim.get_submodule(unit.conv.name) is not unit.kernel:  # but composed of others
            _spare(kept, place)
    while None in (groups := _groups_left(units, kept)):
        _spare(kept, groups.index(None))  # which may make others unequal
    return kept


def _spare(kept: Sequence[Tensor], place: int) -> None:
    """Let a convolution keep all channels on both sides."""
    for mask in kept[place : place + 2]:
        mask.fill_(True)


def _groups_left(units: Sequence[Unit], kept: Sequence[Tensor]) -> list[int | None]:
    """The groups of every convolution of a body; None where they would be unequal."""
    sides = zip(units, pairwise(kept), strict=True)
    return [groups_left(unit.kernel.groups, *both) for unit, both in sides]


def _cut_body(units: Sequence[Unit], kept: Sequence[Tensor]) -> None:
    """Cut a body down to the channels that it reads and those behind each convolution."""
    groups_of = _groups_left(units, kept)
    for unit, groups, (read, made) in zip(units, groups_of, pairwise(kept), strict=True):
        if read.all() and made.all():
            continue
        assert groups is not None
        channels = made.nonzero().flatten()
        cut_connections(unit.kernel, channels, read.nonzero().flatten(), groups)
        for layer in (unit.bn, unit.activation):
            if layer is not None:
                cut_channels(layer.module, channels)


@torch.no_grad()
def move_statistics(
    narrowed: fx.GraphModule,
    slim: fx.GraphModule,
    masks: Masks,
    calibration_batches: Iterable[Tensor],
) -> None:
    """Give a masked and narrowed model the BN statistics that it has now.

    A switched-off channel leaves a constant, which the next BN has in its running mean. The
    statistics move by what the calibration batches show of the difference between the models:
    where masks change nothing, nothing moves.

    Args:
        narrowed: `slim` after `rmprune.apply_masks` and `narrow`, in evaluation mode; changed
            in place.
        slim: The model before.
        masks: Those that were applied.
        calibration_batches: Normalised images, ``(N, C, H, W)`` each.
    """
    batches = list(calibration_batches)
    before, after = (_with_batch_statistics(model, batches) for model in (slim, narrowed))
    narrow(before, masks)
    for name, (mean, var) in _statistics(after).items():
        bn = narrowed.get_submodule(name)
        old_mean, old_var = _statistics(before)[name]
        assert isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        bn.running_mean.add_(mean - old_mean)
        bn.running_var.mul_((var + bn.eps) / (old_var + bn.eps))


def _with_batch_statistics(model: fx.GraphModule, batches: Sequence[Tensor]) -> fx.GraphModule:
    """The model with the mean and variance that each BN sees, all normalising by the batch."""
    model = copy.deepcopy(model)
    update_bn(batches, model)
    return model


def _statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (module.running_mean, module.running_var)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and module.running_mean is not None
        and module.running_var is not None
    }
