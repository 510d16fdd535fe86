"""The parts of residual blocks that can be made slim, and the BNs that decide over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rmprune.errors import ConversionError
from rmprune.graph import Block, Chain, Layer, PadChannels, Subsample, is_identity, parse, trace
from rmprune.layers import is_depthwise
from rmprune.norms import Norm, norm_of


def has_slim_form(model: nn.Module) -> bool:
    """Whether a network is a chain of residual blocks whose channels BNs decide over.

    Such a network gets BNs on its shortcuts and is pruned under masks, still residual. What is
    not (three branches, slices that pass by, gates, concatenations) may convert all the same;
    then it is pruned as the plain net that it converts to, see `rmprune.plain_selection`.
    """
    try:
        blocks = parse(trace(model, copied=False)).blocks
        return bool(blocks) and all(split_units(b.body)[-1].bn is not None for b in blocks)
    except ConversionError:
        return False


def channel_guards(chain: Chain) -> dict[str, tuple[str, ...]]:
    """The BNs whose scales decide over the output channels of every plain convolution.

    Returns:
        Path of a convolution in the residual model to paths of BNs: its own, and for the
        first convolution of a block the shortcut BN, for the last one the shortcut's own BN.
    """
    guards: dict[str, tuple[str, ...]] = {}
    for item in chain.items:
        if isinstance(item, Block):
            units = split_units(item.body)
            for unit in units:
                guards[unit.conv.name] = tuple(bn.name for bn in (unit.bn,) if bn is not None)
            bns = [bn.name for bn in item.shortcut if isinstance(bn.module, nn.BatchNorm2d)]
            reserved = bns[:1] if starts_with_bn(item) else []
            guards[units[0].conv.name] += tuple(reserved)
            guards[units[-1].conv.name] += tuple(bns[len(reserved) :])
        elif isinstance(item.module, nn.Conv2d):
            last_conv = item.name
            guards[last_conv] = ()
        elif isinstance(item.module, nn.BatchNorm2d) and guards.get(last_conv) == ():
            guards[last_conv] = (item.name,)
    return guards


def inner_bns(chain: Chain) -> set[str]:
    """Paths of the BNs of channels that stay inside of a block's body."""
    units = (split_units(block.body)[:-1] for block in chain.blocks)
    return {unit.bn.name for body in units for unit in body if unit.bn is not None}


def streams(chain: Chain) -> list[dict[str, int]]:
    """The tensors that blocks add to, each by the BNs that can switch its channels off.

    A channel of a stream leaves the network when all of them have switched it off: the BNs that
    make it, and those at the heads of the shortcuts that carry it on.

    Returns:
        For each stream the paths of its BNs, in order, each with the channel of the stream that
        the BN's first channel is. Streams with a maker that is no BN are left out.
    """
    found: list[dict[str, int]] = []
    current: dict[str, int] | None = None
    for item in chain.items:
        if isinstance(item, Layer):
            if isinstance(item.module, nn.BatchNorm2d):
                current = {item.name: 0}
                found.append(current)
            elif isinstance(item.module, nn.Conv2d | nn.Linear):
                current = None
            continue
        last = split_units(item.body)[-1].bn
        head, *others = item.shortcut or (None,)
        if current is not None and head is not None:
            current[head.name] = 0
        if others:
            current = _begun(head, others)
            if current is not None and last is not None:
                found.append(current)
        if current is not None and last is not None:
            current[last.name] = 0
    return [stream for stream in found if len(stream) > 1]


def _begun(head: Layer | None, others: Sequence[Layer]) -> dict[str, int] | None:
    """A stream that begins behind a shortcut of these layers; None if no BN decides over it."""
    tail = others[-1]
    if isinstance(tail.module, nn.BatchNorm2d):
        return {tail.name: 0}
    if head is not None and all(isinstance(o.module, PadChannels | Subsample) for o in others):
        return {head.name: sum(o.module.front for o in others if isinstance(o.module, PadChannels))}
    return None


@dataclass(frozen=True)
class Unit:
    """A convolution with what follows it in a block's body."""

    conv: Layer
    bn: Layer | None
    activation: Layer | None

    @property
    def kernel(self) -> nn.Conv2d:
        """The convolution itself."""
        assert isinstance(self.conv.module, nn.Conv2d)
        return self.conv.module

    @property
    def norm(self) -> Norm:
        """What follows the convolution's weights: bias and BN."""
        bn = None if self.bn is None else self.bn.module
        assert bn is None or isinstance(bn, nn.BatchNorm2d)
        return norm_of(bn, self.kernel)


def split_units(body: Sequence[Layer]) -> list[Unit]:
    """Split a block's body into convolutions, each with its BN and activation.

    Raises:
        ConversionError: The body is not conv(-BN)(-activation)-…-conv(-BN).
    """
    units: list[Unit] = []
    for layer in body:
        last = units[-1] if units else None
        match layer.module:
            case module if is_identity(module):
                continue
            case nn.Conv2d():
                units.append(Unit(layer, None, None))
            case nn.BatchNorm2d() if last and last.bn is None and last.activation is None:
                units[-1] = Unit(last.conv, layer, None)
            case nn.ReLU() | nn.LeakyReLU() | nn.PReLU() if last and last.activation is None:
                units[-1] = Unit(last.conv, last.bn, layer)
            case module:
                raise ConversionError(
                    layer.name,
                    f"{type(module).__name__} at this place of a block is not supported",
                    "blocks are conv, BN, activation, …, conv, BN, then the addition",
                )
    if units[-1].activation is not None:
        raise ConversionError(
            units[-1].activation.name, "an activation between a block's last layer and its addition"
        )
    return units


def inner_tensors(units: Sequence[Unit]) -> list[list[Unit]]:
    """The tensors inside of a body: each convolution with the depthwise ones behind it."""
    tensors: list[list[Unit]] = []
    for unit in units[:-1]:
        if tensors and is_depthwise(unit.kernel):
            tensors[-1].append(unit)
        else:
            tensors.append([unit])
    return tensors


def starts_with_bn(block: Block) -> bool:
    """Whether there is a BN at the head of a block's shortcut."""
    return bool(block.shortcut) and isinstance(block.shortcut[0].module, nn.BatchNorm2d)
