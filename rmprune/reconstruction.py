"""What is left of a pruned model, fitted to what the whole model computes.

The last convolution of each block gets new weights by least squares on its inputs, so that
the block's sum comes as near as it can to the whole model's: after channel pruning by
reconstruction (He, Zhang & Sun 2017, arXiv 1707.06168, section 3.1), except that a block
also takes over from the blocks behind it that are gone. Where a ReLU follows and the whole model
is off, anything that is off will do (Zhang et al. 2016, arXiv 1505.06798, section 3.2). BNs
normalise by the batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.blocks import Unit, split_units
from rmprune.graph import Block, Layer, parse
from rmprune.holding import parameter

SAMPLES = 8192  # positions that each fit looks at
RIDGE = 1e-3  # of the inputs' mean square: how much the weights are held where they were
FITS = 1e-6  # of the sum's variance: an error not worth new weights

Sums = dict[str, Tensor]  # name of a block's addition to ``(channels, samples)``


def block_sums(slim: fx.GraphModule, batches: Sequence[Tensor]) -> Sums:
    """What each block of a model adds up to, at sampled positions.

    Args:
        slim: A slimmable model; its BNs normalise by the batch here.
        batches: Normalised images, ``(N, C, H, W)`` each.
    """
    sums = {}
    with torch.no_grad(), by_batch(slim):
        tensors = list(batches)
        for item in parse(slim).items:
            if isinstance(item, Layer):
                tensors = _through([item], tensors)
            else:
                bodies, sides = _through(item.body, tensors), _through(item.shortcut, tensors)
                tensors = [body + side for body, side in zip(bodies, sides, strict=True)]
                sums[item.add.name] = _sampled(tensors)
    return sums


def reconstruct(
    pruned: fx.GraphModule,
    sums: Sums,
    batches: Sequence[Tensor],
    among: Collection[str],
) -> list[Tensor]:
    """Fit the last convolutions of blocks to the sums of the whole model.

    Blocks are fitted one after the other, each on the inputs that those above now give.
    Running statistics stay as they are: such a model is for comparing with others by batch, and
    to fine-tune it is no better than to fine-tune the one that was not fitted.

    Args:
        pruned: A masked and narrowed model; its convolutions and BNs change.
        sums: Of the model before, from the same batches.
        batches: Normalised images, ``(N, C, H, W)`` each.
        among: Names of the additions of the blocks to fit.

    Returns:
        What the model now makes of the batches, ``(N, classes)`` each.
    """
    chain = parse(pruned)
    wanted = heirs(sums, chain.blocks)
    with torch.no_grad(), by_batch(pruned):
        tensors = list(batches)
        for item, follower in zip_longest(chain.items, chain.items[1:]):
            if isinstance(item, Layer):
                tensors = _through([item], tensors)
                continue
            rectified = isinstance(follower, Layer) and isinstance(follower.module, nn.ReLU)
            last = split_units(item.body)[-1]
            start = item.body.index(last.conv)
            hidden = _through(item.body[:start], tensors)
            sides = _through(item.shortcut, tensors)
            name = item.add.name
            if name in among and _can_be_fitted(item, last):
                _fit(last, hidden, _sampled(sides), sums[wanted[name]], rectified)
            bodies = _through(item.body[start:], hidden)
            tensors = [body + side for body, side in zip(bodies, sides, strict=True)]
    return tensors


def heirs(sums: Collection[str], blocks: Sequence[Block]) -> dict[str, str]:
    """Which sum each block has to give: its own, or that of the last block gone behind it.

    Args:
        sums: Names of the additions of the whole model, in order.
        blocks: Those of the pruned model.

    Returns:
        Name of a pruned model's addition to one of the whole model's.
    """
    left = {block.add.name for block in blocks}
    found: dict[str, str] = {}
    heir = None
    for name in sums:
        heir = name if name in left else heir
        if heir is not None:
            found[heir] = name
    return found


@contextmanager
def by_batch(model: nn.Module) -> Iterator[None]:
    """Let BNs normalise by the batch, and leave their running statistics alone."""
    bns = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(bn.training, bn.track_running_stats) for bn in bns]
    for bn in bns:
        bn.training, bn.track_running_stats = True, False
    try:
        yield
    finally:
        for bn, (training, tracks) in zip(bns, before, strict=True):
            bn.training, bn.track_running_stats = training, tracks


def _can_be_fitted(block: Block, last: Unit) -> bool:
    conv = last.kernel
    zeros = isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"
    if last.bn is None or conv.groups > 1 or not zeros:
        return False
    bns = [layer.module for layer in block.body if isinstance(layer.module, nn.BatchNorm2d)]
    return all(bool(bn.weight.any()) for bn in bns)


def _through(layers: Sequence[Layer], tensors: Sequence[Tensor]) -> list[Tensor]:
    for layer in layers:
        tensors = [layer.module(x) for x in tensors]
    return list(tensors)


def _sampled(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors ``(N, C, H, W, …)`` at sampled positions, ``(C · …, samples)``.

    The positions are the same for equal numbers of tensors of equal N, H and W.
    """
    samples = []
    for x in tensors:
        images, _, *size = x.shape[:4]
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(images * math.prod(size), generator=generator)
        chosen = chosen[: SAMPLES // len(tensors)].to(x.device)
        image, row, column = torch.unravel_index(chosen, (images, *size))
        samples.append(x[image, :, row, column].flatten(1))
    return torch.cat(samples).T


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution reads at each of its positions, ``(N, C, H, W, kh, kw)``; a view."""
    assert isinstance(conv.padding, tuple)
    (height, width) = conv.padding
    x = F.pad(x, (width, width, height, height))
    for axis, (kernel, stride, dilation) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return x


def _fit(
    unit: Unit, hidden: Sequence[Tensor], sides: Tensor, wanted: Tensor, rectified: bool
) -> None:
    """Give a convolution with a BN the weights that make most of what is wanted.

    Args:
        unit: The convolution and its BN.
        hidden: What it reads, ``(N, C, H, W)`` each.
        sides: What is added to it, ``(channels, samples)``.
        wanted: The sum, ``(channels, samples)``.
        rectified: Whether a ReLU reads the sum.
    """
    conv = unit.kernel
    assert unit.bn is not None
    bn = unit.bn.module
    assert isinstance(bn, nn.BatchNorm2d)
    kept = bn.weight != 0
    made = _sampled([bn(conv(x)) for x in hidden])
    if rectified:
        wanted = torch.where(wanted > 0, wanted, (made + sides).clamp(max=0))
    wanted = wanted - sides
    missing = (wanted - made).double()[kept]
    if not kept.any() or missing.square().mean() <= FITS * wanted.var():
        return
    inputs = _sampled([_patches(conv, x) for x in hidden]).double()
    inputs = inputs - inputs.mean(1, keepdim=True)
    gram = inputs @ inputs.T
    held = (RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    change = torch.linalg.solve(gram + held * torch.eye(len(gram)).to(gram), inputs @ missing.T).T

    old = conv.weight[kept].double().flatten(1)
    deviation = ((old @ inputs).var(1, correction=0) + bn.eps).sqrt()
    whole = old * (bn.weight[kept].double() / deviation)[:, None] + change
    # Rows keep their norms, beside which the BN's ε stays small.
    size = whole.norm(dim=1) / old.norm(dim=1)
    size = torch.where(size.isfinite() & (size > 0), size, 1)
    fitted = whole / size[:, None]
    var = (fitted @ inputs).var(1, correction=0)
    conv.weight[kept] = fitted.view_as(conv.weight[kept]).to(conv.weight)
    _put(bn, "weight", kept, size * (var + bn.eps).sqrt())
    _put(bn, "bias", kept, wanted[kept].double().mean(1))


def _put(bn: nn.BatchNorm2d, name: str, kept: Tensor, values: Tensor) -> None:
    target = parameter(bn, name)
    target[kept] = values.to(target)
