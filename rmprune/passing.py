"""Blocks that have lost their body and only pass on what they get.

What is left of such a block is ``ReLU(γ x̂ + β)`` of an x that is not negative: a scale and an
offset for each channel, which no neighbour can absorb through the ReLU, and which costs a
pass over the tensor. The scale can move up to where x is made, since it is positive; once
the offset is dropped, the block is the identity and can be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rmprune.graph import Block, Chain, Layer, PadChannels
from rmprune.holding import parameter

Paths = tuple[tuple[Layer, ...], ...]  # of which each makes an addend


def empty_blocks(chain: Chain, keep: Mapping[str, Tensor]) -> list[tuple[Block, Layer, Paths]]:
    """The blocks that masks leave nothing of but a scale between two ReLUs.

    Args:
        chain: Of a slimmable model.
        keep: Path of a BN to its mask, ``(channels,)`` of bool; see `rmprune.selection.Masks`.

    Returns:
        In order, each with the ReLU behind it, and the paths that make what it gets, up to
        their last layer.
    """
    found = []
    for place, item in enumerate(chain.items[:-1]):
        behind = chain.items[place + 1]
        if not (isinstance(item, Block) and isinstance(behind, Layer)):
            continue
        bns = [layer for layer in item.body if isinstance(layer.module, nn.BatchNorm2d)]
        off = any(not keep[bn.name].any() for bn in bns)
        identity = len(item.shortcut) == 1
        before = _makers(chain.items[:place])
        if off and identity and before and type(behind.module) is nn.ReLU:
            found.append((item, behind, before))
    return found


def _makers(items: Sequence[Layer | Block]) -> Paths:
    """The paths that make a tensor that is not negative; none if it may be, or is not theirs."""
    rest = list(items)
    passed: list[type[nn.Module]] = []
    while rest and isinstance(rest[-1], Layer) and type(rest[-1].module) in (nn.ReLU, nn.MaxPool2d):
        passed.append(type(rest.pop().module))  # type: ignore[union-attr]  # a Layer
    if nn.ReLU not in passed or not rest:
        return ()
    maker = rest[-1]
    if isinstance(maker, Block):
        return (maker.body, maker.shortcut)
    return ((maker,),) if isinstance(maker.module, nn.BatchNorm2d | nn.Conv2d) else ()


@torch.no_grad()
def pass_on(block: Block, makers: Paths) -> None:
    """Make an empty block the identity: its scales move up, its offsets are dropped.

    Scales are exact in both modes of the BNs above. A channel with a negative scale would be
    about constant behind the ReLU, and goes.

    Args:
        block: See `empty_blocks`. Its BNs change, under masks, too.
        makers: The paths that make what it gets; their last BNs or convolutions change.
    """
    head = block.shortcut[0].module
    assert isinstance(head, nn.BatchNorm2d)
    assert head.running_mean is not None
    assert head.running_var is not None
    deviation = (head.running_var + head.eps).sqrt()
    scale = (head.weight / deviation).clamp(min=0)
    for path in makers:
        _scale(path, scale)
    parameter(head, "weight").copy_(deviation)
    parameter(head, "bias").copy_(head.running_mean)
    last = next(layer.module for layer in block.body[::-1] if hasattr(layer.module, "running_mean"))
    for name in ("weight", "bias"):
        parameter(last, name).zero_()


def _scale(path: Sequence[Layer], scale: Tensor) -> None:
    """Multiply the channels ``(channels,)`` that a path makes."""
    for layer in reversed(path):
        module = layer.module
        if isinstance(module, PadChannels):
            scale = scale[module.front : len(scale) - module.back]
        elif isinstance(module, nn.BatchNorm2d | nn.Conv2d):
            for name in ("weight", "bias"):
                if getattr(module, name) is not None:
                    values = parameter(module, name)
                    values.mul_(scale.view(-1, *[1] * (values.ndim - 1)))
            return
