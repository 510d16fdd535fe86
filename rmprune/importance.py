"""How much channels matter: by their scales for what they cost, or by all of their weights.

Scores are what `rmprune.selection.select` compares with a threshold: the channels with the
lowest go first. See `rmprune.greedy` for scores by what is lost without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, fx, nn

from rmprune.blocks import inner_tensors, split_units, starts_with_bn, streams
from rmprune.graph import Block, Chain, Layer, parse
from rmprune.layers import is_depthwise
from rmprune.slimming import scales_of

Importance = Literal["scale", "group-norm", "loss"]


def by_scale(slim: fx.GraphModule, savings: Mapping[str, float]) -> dict[str, Tensor]:
    """``|γ|`` over what one channel saves, ``(channels,)`` for each BN; inf if it saves nothing.

    Args:
        slim: A slimmable model, best after sparsity training.
        savings: Of one channel of each BN, by path; see `rmprune.costs`.
    """
    return {
        name: (scale / savings[name] if savings[name] > 0 else torch.full_like(scale, math.inf))
        for name, scale in ((n, s.double().cpu()) for n, s in scales_of(slim).items())
    }


def by_group_norm(slim: fx.GraphModule, round_to: int = 1) -> dict[str, Tensor]:
    """The norm of all weights that go with a channel, relative to the largest in its tensor.

    The squares of a channel's rows, columns and BN scales are added up over the layers that
    share it, as Torch-Pruning's group-norm pruner does (DepGraph: Fang et al. 2023, arXiv
    2301.12900, section 3.3), whatever the channel costs: so all tensors lose about the same
    share, streams too (see `rmprune.blocks.streams`), and some of each is left up to a threshold
    of 1. The BNs put at the heads of shortcuts are no weights of the network and do not count.

    Args:
        slim: A slimmable model; trained, but not for sparsity.
        round_to: So many channels of a tensor get one score, that of the best of them.

    Returns:
        The scores of every BN, ``(channels,)``, in [0, 1]; inf where no BN makes what a shortcut
        carries, as of the image.
    """
    chain = parse(slim)
    scales = {name: scale.double().cpu() for name, scale in scales_of(slim).items()}
    squares = _squared_weights(chain, scales)
    heads = {block.shortcut[0].name for block in chain.blocks if starts_with_bn(block)}
    scores: dict[str, Tensor] = {}
    for bns in _tensors(chain, scales):
        if bns.keys() <= heads:
            scores |= {name: torch.full_like(scales[name], math.inf) for name in bns}
            continue
        parts = {name: slice(at, at + len(scales[name])) for name, at in bns.items()}
        total = torch.zeros(max(part.stop for part in parts.values()), dtype=torch.float64)
        alive = torch.zeros(len(total), dtype=torch.bool)
        for place, (name, part) in enumerate(parts.items()):
            alive[part] |= scales[name] > 0
            if place > 0 or name not in heads:  # option A begins with channels of another stream
                total[part] += squares[name]
        total *= alive
        largest = total.max().clamp(min=torch.finfo(total.dtype).tiny)  # nothing may be left
        shared = _in_multiples(total / largest, round_to)
        for name, part in parts.items():
            scores[name] = torch.minimum(scores.get(name, shared[part]), shared[part])
    return scores


def _tensors(chain: Chain, names: Iterable[str]) -> list[dict[str, int]]:
    """Every tensor with channels of its own: its BNs, with the channel that their first one is."""
    tensors = streams(chain)
    for tied in _tied(chain):
        home = next((tensor for tensor in tensors if tensor.keys() & tied), None)
        if home is None:
            tensors.append(dict.fromkeys(tied, 0))
        else:
            first = next(home[name] for name in tied if name in home)
            home.update({name: first for name in tied if name not in home})
    placed = {name for tensor in tensors for name in tensor}
    return [*tensors, *({name: 0} for name in names if name not in placed)]


def _tied(chain: Chain) -> list[list[str]]:
    """The BNs before and behind depthwise convolutions, which have the same channels."""
    runs: list[list[str]] = [[]]
    for item in chain.items:
        if isinstance(item, Block):
            inside = inner_tensors(split_units(item.body))
            runs += [[unit.bn.name for unit in run if unit.bn is not None] for run in inside]
            runs.append([])
        elif isinstance(item.module, nn.BatchNorm2d):
            runs[-1].append(item.name)
        elif isinstance(item.module, nn.Conv2d) and not is_depthwise(item.module):
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _squared_weights(chain: Chain, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By BN, squares of its scales and of the weights that make its channels and that read them.

    What a block reads counts for the BN at the head of its shortcut, whose scales do not count.
    """
    squares = {name: torch.zeros_like(scale) for name, scale in scales.items()}

    def along(layers: Iterable[Layer], tensor: str | None = None) -> str | None:
        made = None
        for layer in layers:
            module = layer.module
            if isinstance(module, nn.BatchNorm2d):
                tensor = layer.name
                if made is not None:
                    squares[tensor] += made + scales[tensor] ** 2
                made = None
            elif isinstance(module, nn.Conv2d | nn.Linear):
                made = _by_output(module)
                if is_depthwise(module):  # Torch-Pruning leaves its weights out
                    made = torch.zeros_like(made)
                elif tensor is not None:  # a linear layer may read several positions of a channel
                    read = _by_input(module)
                    squares[tensor] += read.reshape(len(squares[tensor]), -1).sum(1)
                tensor = None
        return tensor

    tensor: str | None = None
    for in_block, items in groupby(chain.items, lambda item: isinstance(item, Block)):
        if not in_block:
            tensor = along((item for item in items if isinstance(item, Layer)), tensor)
            continue
        for block in items:
            assert isinstance(block, Block)
            along(block.shortcut)
            tensor = along(block.body, block.shortcut[0].name)
    return squares


def _by_output(layer: nn.Conv2d | nn.Linear) -> Tensor:
    return layer.weight.detach().double().cpu().square().flatten(1).sum(1)


def _by_input(layer: nn.Conv2d | nn.Linear) -> Tensor:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    squares = layer.weight.detach().double().cpu().square()
    by_kernel = squares.reshape(*squares.shape[:2], -1).sum(2)
    return by_kernel.view(groups, -1, by_kernel.shape[1]).sum(1).flatten()


def _in_multiples(scores: Tensor, round_to: int) -> Tensor:
    """Scores ``(n,)``, each that of the best of so many, so that a multiple of them is left."""
    order = scores.argsort(descending=True)
    best = torch.arange(len(order)) // round_to * round_to
    return torch.empty_like(scores).scatter(0, order, scores[order[best]])
