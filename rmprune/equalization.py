"""Channels brought to one range, so that a single int8 scale for a tensor serves them all.

After Nagel et al. 2019 (arXiv 1906.04721), with ranges measured instead of those of weights:

Cross-layer equalisation (section 4.1). ``f(a z) = a f(z)`` for a > 0 and f a ReLU: a channel's
factor moves from the layer that makes it into those that read it, and no output changes.
Copies that an addition takes have the factor of what they are copies of.

Absorbing high biases (section 4.1.3). A channel on which an activation is the identity needs no
larger offset than keeps it so. Conversion carries tensors as x + b with a b that is right for
every image (see `rmprune.carrying`); int8 keeps to what it was calibrated on anyway.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmprune.carrying import carrying_activation, identity_range
from rmprune.layers import (
    ChannelGate,
    ChannelSelection,
    PartialActivation,
    ResidualBlock,
    function_name,
)
from rmprune.plain import PlainNet

PASSING = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.modules.dropout._DropoutNd)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
LEAST = 1e-6  # of the median range, for channels that are never on
SLACK = 0.1  # of a channel's range, on either side, for images that calibration has not seen


@torch.no_grad()
def absorb_offsets(net: PlainNet, batches: Iterable[Tensor]) -> PlainNet:
    """A net whose carried channels have small offsets; equal on images like the given ones.

    Behind ReLU6 they fill its range. Where the offset of an activation that is the identity
    only far from zero (SiLU, GELU) would be larger than what it carries, the activation leaves
    these channels out instead.

    Args:
        net: In evaluation mode, its BNs folded; left as it is.
        batches: Normalised images, ``(N, C, H, W)`` each.
    """
    net = copy.deepcopy(net)
    layers, values = OrderedDict(net.named_children()), list(batches)
    names = list(layers)
    for name, follower, reader in zip(names, names[1:], names[2:], strict=False):
        layer, activation, reads = layers[name], layers[follower], layers[reader]
        if isinstance(layer, nn.Conv2d) and isinstance(reads, nn.Conv2d):
            change = _Offsets.of(layer, activation, reads, values)
            change.apply(layer, reads)
            layers[follower] = change.activation
        values = [layer(value) for value in values]
    return net.with_layers(layers).eval()


@dataclass(frozen=True)
class _Offsets:
    """What becomes of a layer's outputs x: ``factor · x + shift``, ``(channels,)`` each."""

    factor: Tensor
    shift: Tensor
    activation: nn.Module

    @classmethod
    def of(
        cls, layer: nn.Conv2d, activation: nn.Module, reader: nn.Conv2d, inputs: list[Tensor]
    ) -> _Offsets:
        """Those of the channels that pass as they are, on inputs of the layer."""
        floor, ceiling = identity_range(activation)
        values = [layer(x).transpose(0, 1).flatten(1) for x in inputs]
        lowest = torch.stack([v.amin(1) for v in values]).amin(0)
        highest = torch.stack([v.amax(1) for v in values]).amax(0)
        spread = highest - lowest
        carried = (lowest >= floor) & (highest <= ceiling) & (spread > 0)
        carried &= _apart_from_padding(reader)
        lowest, spread = lowest - SLACK * spread, (1 + 2 * SLACK) * spread
        factor = torch.ones_like(spread)
        if ceiling < torch.inf:
            factor = (ceiling - floor) / spread
        elif bool(carried.any()) and floor > spread[carried].max() and function_name(activation):
            activation = carrying_activation(activation, ~carried, "partial", factor)
            floor, lowest = 0.0, lowest + spread / 2
        shift = floor - factor * lowest
        return cls(factor.where(carried, 1.0), shift.where(carried, 0.0), activation)

    def apply(self, layer: nn.Conv2d, reader: nn.Conv2d) -> None:
        """Let a layer make the channels so, and their reader take them so."""
        for conv in (layer, reader):
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
        assert layer.bias is not None
        assert reader.bias is not None
        _divide_rows(layer, 1 / self.factor)
        layer.bias.add_(self.shift)
        _multiply_columns(reader, 1 / self.factor)
        reader.bias.sub_((reader.weight.sum((2, 3)) * _by_row(reader, self.shift)).sum(1))


def _apart_from_padding(conv: nn.Conv2d) -> Tensor:
    """Which input channels a convolution reads without their padding, ``(channels,)`` of bool."""
    if conv.padding in ((0, 0), "valid"):
        return torch.ones(conv.in_channels, dtype=torch.bool, device=conv.weight.device)
    others = conv.weight.detach() != 0
    reach = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    padding = reach if isinstance(conv.padding, str) else conv.padding
    # This tap stands on the image wherever the kernel does.
    row, column = (p // d for p, d in zip(padding, conv.dilation, strict=True))
    if all(p % d == 0 for p, d in zip(padding, conv.dilation, strict=True)):
        others[:, :, row : row + 1, column : column + 1] = False
    return ~others.any((2, 3)).view(conv.groups, -1, others.shape[1]).any(1).flatten()


@torch.no_grad()
def equalize(net: PlainNet, batches: Iterable[Tensor]) -> PlainNet:
    """An equal net whose channels reach values of about 1, each.

    Args:
        net: In evaluation mode, its BNs folded, with or without additions; left as it is.
        batches: Normalised images, ``(N, C, H, W)`` each, to measure ranges on.
    """
    net = copy.deepcopy(net)
    chains = _Chains(list(batches))
    names = chains.visit_all(net, None)
    if names is not None:
        chains.freeze(names)
    chains.rescale()
    return net


class _Chains:
    """A walk over a net that gives channels numbers, one for all that must have one factor."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values
        self.parent: list[int] = []
        self.reach: list[float] = []
        self.frozen: set[int] = set()
        self.changes: list[Callable[[Callable[[Tensor], Tensor]], None]] = []

    # Numbers of channels.

    def new(self, count: int) -> Tensor:
        """Numbers for channels that are tied to no other."""
        begin = len(self.parent)
        self.parent += range(begin, begin + count)
        self.reach += [0.0] * count
        return torch.arange(begin, begin + count)

    def root(self, number: int) -> int:
        """The number that stands for all that are tied to one."""
        while self.parent[number] != number:
            number = self.parent[number]
        return number

    def tie(self, some: Tensor, others: Tensor) -> None:
        """Give pairs of channels the same factor."""
        for a, b in zip(some.tolist(), others.tolist(), strict=True):
            self.parent[self.root(a)] = self.root(b)

    def freeze(self, names: Tensor) -> None:
        """Let channels be as they are."""
        self.frozen |= set(names.tolist())

    def note(self, names: Tensor | None) -> None:
        """Remember how far the present values reach."""
        if names is None:
            return
        reach = torch.stack([v.abs().transpose(0, 1).flatten(1).amax(1) for v in self.values])
        for number, value in zip(names.tolist(), reach.amax(0).tolist(), strict=True):
            self.reach[number] = max(self.reach[number], value)

    # The walk.

    def visit_all(self, layers: Iterable[nn.Module], names: Tensor | None) -> Tensor | None:
        """Walk on from channels of the given numbers (None: the image); return the last ones."""
        for layer in layers:
            names = self.visit(layer, names)
        return names

    def visit(self, layer: nn.Module, names: Tensor | None) -> Tensor | None:
        """Walk through one layer."""
        if isinstance(layer, ResidualBlock):
            return self._block(layer, names)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            self._reads(layer, names)
            self._run(layer)
            made = self.new(len(layer.weight))
            self.changes.append(lambda factor: _divide_rows(layer, factor(made)))
            return made
        if isinstance(layer, ChannelGate) and names is not None:
            weight = layer.get_parameter("weight0")
            self.changes.append(lambda factor: _set(weight, weight * factor(names)))
        elif not _is_homogeneous(layer) and names is not None:
            self.freeze(names)
        before = self.values[0].shape
        self._run(layer)
        if isinstance(layer, nn.Flatten) and names is not None:
            return names.repeat_interleave(self.values[0].shape[1] // before[1])
        return names

    def _reads(self, layer: nn.Conv2d | nn.Linear, names: Tensor | None) -> None:
        self.note(names)
        if names is not None:
            self.changes.append(lambda factor: _multiply_columns(layer, factor(names)))

    def _run(self, layer: nn.Module) -> None:
        self.values = [layer(value) for value in self.values]

    def _block(self, block: ResidualBlock, names: Tensor | None) -> Tensor:
        inputs, result = self.values, [block(value) for value in self.values]
        self.note(names)
        made = self.visit_all(block.body, names)
        assert made is not None
        self.note(made)
        # int8 has a scale for each summand, and for all channels before the activation.
        if block.added is not None:
            self.values = [block.added(value) for value in inputs]
            self.note(made[: block.added.out_channels])
            self._shortcut(block.added, names, made[: block.added.out_channels])
        if block.passed is not None:
            through = self.new(block.passed.out_channels)
            self.values = [block.passed(value) for value in inputs]
            self.note(through)
            self._shortcut(block.passed, names, through)
            made = torch.cat([made, through])
        self.values = result
        return made

    def _shortcut(
        self, layer: nn.Conv2d | ChannelSelection, names: Tensor | None, made: Tensor
    ) -> None:
        """What is added to channels of the given numbers, or becomes them."""
        if isinstance(layer, nn.Conv2d):
            if names is not None:
                self.changes.append(lambda factor: _multiply_columns(layer, factor(names)))
            self.changes.append(lambda factor: _divide_rows(layer, factor(made)))
            return
        if layer.bias is not None:
            bias = layer.bias
            self.changes.append(lambda factor: _set(bias, bias / factor(made)))
        if names is None:
            self.freeze(made)
            return
        source = names[layer.indices.cpu()]
        if layer.scale is None:
            self.tie(made, source)
        else:
            scale = layer.scale
            self.changes.append(lambda factor: _set(scale, scale * factor(source) / factor(made)))

    # The result.

    def rescale(self) -> None:
        """Divide what makes a channel by its factor, and multiply what reads it."""
        roots = [self.root(number) for number in range(len(self.parent))]
        reach = [0.0] * len(roots)
        for number, root in enumerate(roots):
            reach[root] = max(reach[root], self.reach[number])
        least = LEAST * float(torch.tensor([r for r in reach if r > 0] or [1.0]).median())
        frozen = {roots[number] for number in self.frozen}
        factors = torch.tensor(
            [1.0 if root in frozen else max(reach[root], least) for root in roots]
        )
        like = self.values[0]
        for change in self.changes:
            change(lambda names: factors[names].to(like))


def _is_homogeneous(layer: nn.Module) -> bool:
    if isinstance(layer, PartialActivation):
        return layer.activation == "relu"
    return isinstance(layer, (*PASSING, *POOLS, nn.Flatten, ChannelGate))


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _divide_rows(layer: nn.Conv2d | nn.Linear, factor: Tensor) -> None:
    layer.weight.div_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.div_(factor)


def _multiply_columns(layer: nn.Conv2d | nn.Linear, factor: Tensor) -> None:
    if isinstance(layer, nn.Linear):
        layer.weight.mul_(factor)
        return
    layer.weight.mul_(_by_row(layer, factor)[:, :, None, None])


def _by_row(conv: nn.Conv2d, values: Tensor) -> Tensor:
    """What belongs to input channels, ``(channels,)``, where each row reads: as its weights."""
    return values.view(conv.groups, -1).repeat_interleave(len(conv.weight) // conv.groups, 0)
