"""Physical removal of a plain net's dead channels, with what they leave behind folded on.

In a list, a channel concerns one layer that computes it and one that reads it, and depthwise
convolutions in between. It is dead if it is *constant* (its row, its filter or its scale is zero)
or *unread* (its column is zero); one death brings about others up and down the list, until
nothing changes. Layers are then cut by torch-pruning's functions.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch_pruning as tp
from torch import Tensor, nn

from rmprune.errors import PruningError, UsageError
from rmprune.layers import ChannelGate, PartialActivation, PartialGroupNorm, is_depthwise
from rmprune.plain import PlainNet, Width

POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, PartialActivation),
)


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
        A smaller net in evaluation mode. Every layer keeps at least one channel.

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
            joint.remove(mask)
    widths = {**result.widths, **_new_widths(result.widths, joints, alive)}
    return _checked(result.with_layers(OrderedDict(result.named_children()), widths).eval())


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

    def columns(self) -> Tensor:
        """The consumer's weights, a view of shape ``(out, channels, positions)``."""
        weight = self.consumer.weight
        return weight.view(len(weight), len(self.producer.weight), -1)

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
            if isinstance(module, PartialGroupNorm):  # what it makes of a constant is none
                empty[list(module.channels)] = off[list(module.channels)] = False
        if not ((empty | off).cpu() & alive).any():
            return
        if _pads(self.consumer):
            empty &= values == 0  # nobody asked for these to go at the price of the border
        if self.gates:
            empty, off = empty & (values == 0), off & (values == 0)  # others are constant no more
        columns = self.columns()
        where = (empty | off) & alive.to(off.device)
        self._add_to_bias(columns[:, where].sum(2) @ values[where])
        columns[:, where] = 0

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
        unread = alive & (self.columns() == 0).all(2).all(0).cpu()
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

    def remove(self, alive: Tensor) -> None:
        """Cut the dead channels out of all layers concerned."""
        dead = torch.nonzero(~alive).flatten().tolist()
        if not dead:
            return
        positions = self.columns().shape[2]
        tp.prune_conv_out_channels(self.producer, dead)
        for module in self.between.values():
            if isinstance(module, nn.Conv2d):
                tp.prune_depthwise_conv_out_channels(module, dead)
            elif isinstance(module, nn.BatchNorm2d):
                tp.prune_batchnorm_out_channels(module, dead)
            elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
                tp.prune_prelu_out_channels(module, dead)
            elif isinstance(module, ChannelGate | PartialActivation | PartialGroupNorm):
                module.keep(torch.nonzero(alive).flatten().to(self.producer.weight.device))
        if isinstance(self.consumer, nn.Conv2d):
            tp.prune_conv_in_channels(self.consumer, dead)
        else:
            inputs = [channel * positions + p for channel in dead for p in range(positions)]
            tp.prune_linear_in_channels(self.consumer, inputs)


def joints_of(net: PlainNet) -> list[Joint]:
    """All places where channels can be removed: between two ungrouped layers."""
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
        if not isinstance(producer, nn.Conv2d) or producer.groups != 1:
            continue
        if isinstance(consumer, nn.Conv2d) and consumer.groups != 1:
            continue
        assert isinstance(consumer, nn.Conv2d | nn.Linear)
        bn = follower if isinstance(follower, nn.BatchNorm2d) else None
        between = dict(children[here + 1 : there])
        joints.append(Joint(name, producer, between, children[there][0], consumer, bn))
    return joints


def _pads(layer: nn.Module) -> bool:
    """Whether a layer reads zeros around its input, which are no channel's constant."""
    return isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid")


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


def _new_widths(
    widths: dict[str, Width], joints: list[Joint], alive: list[Tensor]
) -> dict[str, Width]:
    """How many own and reserved channels are left in each layer."""
    result: dict[str, Width] = {}
    for joint, mask in zip(joints, alive, strict=True):
        width = widths.get(joint.name, Width(len(mask)))
        own = torch.arange(len(mask)) % 2 == 0
        if not width.alternating:
            own = torch.arange(len(mask)) < width.own
        left = Width(int(mask[own].sum()), int(mask[~own].sum()))
        result |= dict.fromkeys(joint.bns, left)
    return result


def _checked(net: PlainNet) -> PlainNet:
    """The net, after a forward pass has shown that its layers fit."""
    if net.input_shape is not None:
        like = next(net.parameters())
        with torch.no_grad():
            net(torch.zeros(1, *net.input_shape, device=like.device, dtype=like.dtype))
    return net
