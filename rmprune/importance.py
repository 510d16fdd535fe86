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

from rmprune.blocks import starts_with_bn, streams
from rmprune.graph import Block, Chain, Layer, parse
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
    share, streams too (see `rmprune.blocks.streams`), and no body is lost altogether. The BNs
    put at the heads of shortcuts are no weights of the network and do not count.

    Args:
        slim: A slimmable model; trained, but not for sparsity.
        round_to: So many channels of a tensor get one score, that of the best of them.

    Returns:
        The scores of every BN, ``(channels,)``, in [0, 1].
    """
    chain = parse(slim)
    scales = {name: scale.double().cpu() for name, scale in scales_of(slim).items()}
    squares = _squared_weights(chain, scales)
    tensors = streams(chain)
    streamed = {name for stream in tensors for name in stream}
    tensors += [{name: 0} for name in scales if name not in streamed]
    heads = {block.shortcut[0].name for block in chain.blocks if starts_with_bn(block)}
    scores: dict[str, Tensor] = {}
    for bns in tensors:
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


def _squared_weights(chain: Chain, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By BN, squares of its scales and of the weights that make its channels and that read them.

    What a block reads counts for the BN at the head of its shortcut, whose scales do not count.
    """
    squares = {name: torch.zeros_like(scale) for name, scale in scales.items()}

    def along(layers: Iterable[Layer], tensor: str | None = None) -> str | None:
        maker = None
        for layer in layers:
            module = layer.module
            if isinstance(module, nn.BatchNorm2d):
                tensor = layer.name
                if maker is not None:
                    squares[tensor] += _by_output(maker) + scales[tensor] ** 2
            elif isinstance(module, nn.Conv2d | nn.Linear):
                if tensor is not None:  # a linear layer may read several positions of a channel
                    read = _by_input(module)
                    squares[tensor] += read.reshape(len(squares[tensor]), -1).sum(1)
                maker, tensor = module, None
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
