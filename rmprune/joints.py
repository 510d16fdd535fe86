"""The places of a plain net where channels can go: between one weighted layer and the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rmprune.layers import (
    ACTIVATIONS,
    ChannelGate,
    PartialActivation,
    PartialGroupNorm,
    is_depthwise,
)
from rmprune.plain import PlainNet

POINTWISE = (*ACTIVATIONS, PartialActivation)


@dataclass(frozen=True)
class Joint:
    """A convolution, the layers of single channels behind it, and the layer that reads them.

    Attributes:
        name: Of the convolution.
        producer: The convolution.
        between: Activations, BNs, depthwise convolutions and the like, by name.
        consumer_name: Of the layer that reads what they give.
        consumer: That layer.
        consumer_bn: The BN directly behind it.
    """

    name: str
    producer: nn.Conv2d
    between: Mapping[str, nn.Module]
    consumer_name: str
    consumer: nn.Conv2d | nn.Linear
    consumer_bn: nn.BatchNorm2d | None

    @property
    def bns(self) -> dict[str, nn.BatchNorm2d | None]:
        """The BN directly behind each convolution, by the convolution's name."""
        layers = [(self.name, self.producer), *self.between.items(), ("", None)]
        return {
            name: follower if isinstance(follower, nn.BatchNorm2d) else None
            for (name, module), (_, follower) in pairwise(layers)
            if isinstance(module, nn.Conv2d)
        }

    @property
    def consumer_groups(self) -> int:
        """Groups of the consumer."""
        return self.consumer.groups if isinstance(self.consumer, nn.Conv2d) else 1

    @property
    def sections(self) -> int:
        """Equal parts of the channels that lie in one group each of producer and consumer."""
        return math.lcm(self.producer.groups, self.consumer_groups)

    @property
    def is_whole(self) -> bool:
        """Whether all channels must stay: groups of convolutions and of a norm lie across."""
        return self.sections > 1 and bool(self.group_norms)

    @property
    def positions(self) -> int:
        """How many numbers of each channel the consumer reads side by side: a flattened map."""
        channels = len(self.producer.weight)
        return 1 if isinstance(self.consumer, nn.Conv2d) else self.consumer.in_features // channels

    def columns(self) -> Tensor:
        """The consumer's weights, a view of ``(groups, out, channels, positions)``, of a group."""
        groups, weight = self.consumer_groups, self.consumer.weight
        channels = len(self.producer.weight) // groups
        return weight.view(groups, len(weight) // groups, channels, -1)

    def fold_constants(self, alive: Tensor) -> None:
        """Add what constant channels contribute to the consumer's bias; cut them off."""
        empty = (self.producer.weight.flatten(1) == 0).all(1)
        off = torch.zeros_like(empty)
        values = torch.zeros_like(self.producer.weight[:, 0, 0, 0])
        if self.producer.bias is not None:
            values = self.producer.bias.clone()
        for module in self.between.values():
            if isinstance(module, nn.Conv2d):
                if _pads(module):
                    empty &= values == 0  # others are constant inside only, not at the border
                empty |= off | (module.weight.flatten(1) == 0).all(1)
                off = torch.zeros_like(off)
                values = values * module.weight.flatten(1).sum(1)
                values += 0 if module.bias is None else module.bias
            elif isinstance(module, (*POINTWISE, nn.BatchNorm2d)):
                values = module(values[None, :, None, None]).flatten()
            if isinstance(module, nn.BatchNorm2d):
                off |= module.weight == 0
            if isinstance(module, PartialGroupNorm):
                groups = module.by_group().to(empty.device)
                # What it makes of a constant is none, but where the whole group is constant.
                moving = groups[~(empty | off)[groups].all(1)].flatten()
                empty[moving] = off[moving] = False
                values = module(values[None, :, None, None].expand(-1, -1, 1, 2))[0, :, 0, 0]
        if not ((empty | off).cpu() & alive).any():
            return
        if _pads(self.consumer):
            empty &= values == 0  # nobody asked for these to go at the price of the border
        if self.gates:
            empty, off = empty & (values == 0), off & (values == 0)  # others are constant no more
        columns = self.columns()
        where = ((empty | off) & alive.to(off.device)).view(len(columns), -1)
        constants = torch.where(where, values.view_as(where), 0)
        self._add_to_bias(torch.einsum("goi,gi->go", columns.sum(3), constants).flatten())
        columns.masked_fill_(where[:, None, :, None], 0)

    @property
    def gates(self) -> tuple[ChannelGate, ...]:
        """The squeeze-and-excitation gates in between."""
        return tuple(m for m in self.between.values() if isinstance(m, ChannelGate))

    @property
    def group_norms(self) -> tuple[PartialGroupNorm, ...]:
        """The group norms in between."""
        return tuple(m for m in self.between.values() if isinstance(m, PartialGroupNorm))

    def _add_to_bias(self, offset: Tensor) -> None:
        if self.consumer.bias is not None:
            self.consumer.bias += offset
        elif self.consumer_bn is not None and self.consumer_bn.running_mean is not None:
            self.consumer_bn.running_mean -= offset
        elif offset.any():
            self.consumer.bias = nn.Parameter(offset)

    def silence_unread(self, alive: Tensor) -> None:
        """Zero the rows that nobody reads, so that what they read may be unread too."""
        unread = alive & ~self.columns().any(3).any(1).flatten().cpu()
        for gate in self.gates:
            unread &= ~gate.squeezed().cpu()
        for norm in self.group_norms:  # its groups go as a whole, or their statistics change
            groups = norm.by_group()
            unread[groups] &= unread[groups].all(1, keepdim=True)
        alive &= ~unread
        where = unread.to(self.producer.weight.device)
        self.producer.weight[where] = 0
        if self.producer.bias is not None:
            self.producer.bias[where] = 0


def joints_of(net: PlainNet) -> list[Joint]:
    """All places where channels can be removed: between two layers that are not depthwise."""
    children = list(net.named_children())
    weighted = [
        i
        for i, (_, module) in enumerate(children)
        if isinstance(module, nn.Conv2d | nn.Linear) and not is_depthwise(module)
    ]
    joints = []
    for here, there in pairwise(weighted):
        name, producer = children[here]
        consumer = children[there][1]
        follower = children[there + 1][1] if there + 1 < len(children) else None
        if not isinstance(producer, nn.Conv2d):
            continue
        assert isinstance(consumer, nn.Conv2d | nn.Linear)
        bn = follower if isinstance(follower, nn.BatchNorm2d) else None
        between = dict(children[here + 1 : there])
        joints.append(Joint(name, producer, between, children[there][0], consumer, bn))
    return joints


def _pads(layer: nn.Module) -> bool:
    """Whether a layer reads zeros around its input, which are no channel's constant."""
    return isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid")
