"""Which channels stay: from scales to masks, and masks held while a model is fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rmprune.blocks import Unit, split_units
from rmprune.errors import PruningError, UsageError
from rmprune.graph import Block, Layer, parse
from rmprune.norms import fold_shortcut


@dataclass(frozen=True)
class Masks:
    """Channels to keep.

    Attributes:
        keep: Path of a BN to its mask, ``(channels,)`` of bool: True where it stays.
        forced: BNs of which one channel was kept though all lie under the threshold.
    """

    keep: Mapping[str, Tensor]
    forced: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """All channels that have a scale."""
        return sum(len(mask) for mask in self.keep.values())

    @property
    def removed(self) -> int:
        """Channels that are switched off."""
        return sum(int((~mask).sum()) for mask in self.keep.values())


def select(slim: fx.GraphModule, threshold: float) -> Masks:
    """Choose the channels whose scale reaches a threshold.

    An inner channel of a block goes when its own scale is under the threshold, a reserved
    channel when its shortcut BN's is or when the channel it would copy is gone, an output
    channel when neither the block's last BN nor its shortcut keeps it. A body that has lost
    a whole layer is lost altogether: its block then collapses. Where nothing at all would
    be left of a tensor, the channel with the largest scale stays.

    Args:
        slim: A slimmable model, see `rmprune.add_shortcut_bn`; left as it is.
        threshold: On ``|γ|``.

    Raises:
        UsageError: The threshold is negative or not a number.
        PruningError: A block has no shortcut BN, or its last convolution has no BN.
        ConversionError: The model is no chain of residual blocks.
    """
    if not 0 <= threshold < math.inf:
        raise UsageError(f"the threshold must be finite and not negative, but it is {threshold}")
    selection = _Selection(threshold)
    for item in parse(slim).items:
        if isinstance(item, Block):
            selection.visit_block(item)
        else:
            selection.visit_layer(item)
    return Masks(selection.keep, tuple(selection.forced))


class _Selection:
    """A walk from input to output that knows which channels of the tensor at hand live."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.keep: dict[str, Tensor] = {}
        self.forced: list[str] = []
        self.live: Tensor | None = None  # None: no BN seen yet, all channels live

    def visit_layer(self, layer: Layer) -> None:
        if isinstance(layer.module, nn.BatchNorm2d):
            self.live = self._at_least_one(layer, self._above(layer))
            self.keep[layer.name] = self.live
        elif isinstance(layer.module, nn.Conv2d):
            self.live = None

    def visit_block(self, block: Block) -> None:
        units = split_units(block.body)
        last, bns = _last_bn(units), [unit.bn for unit in units[:-1] if unit.bn]
        head, *remainder = block.shortcut or (None,)
        if head is None or not isinstance(head.module, nn.BatchNorm2d):
            raise PruningError(
                f"the block at {block.add.name!r} has no shortcut BN; "
                "call rmprune.add_shortcut_bn(model, calibration_batches) first"
            )
        inner = {bn: self._above(bn) for bn in bns}
        reserved = self._above(head)
        if self.live is not None:
            reserved &= self.live
        body_lives = all(bool(mask.any()) for mask in inner.values())
        if not body_lives and not reserved.any():
            inner = {bn: self._at_least_one(bn, mask) for bn, mask in inner.items()}
            body_lives = True
        for bn, mask in inner.items():
            self.keep[bn.name] = mask & body_lives
        self.keep[head.name] = reserved

        output = self._above(last) & body_lives
        output |= self._shortcut_lives(remainder, reserved)
        output = self._at_least_one(last, output)
        for layer in (last, *remainder):
            if isinstance(layer.module, nn.BatchNorm2d):
                self.keep[layer.name] = output
        self.live = output

    def _shortcut_lives(self, remainder: list[Layer], reserved: Tensor) -> Tensor:
        """Which outputs of a shortcut are kept by it, ``(out,)``."""
        modules = [layer.module for layer in remainder]
        like = next((t for module in modules for t in module.parameters()), torch.ones(1))
        shortcut = fold_shortcut(modules, len(reserved), like)
        if any(isinstance(module, nn.Conv2d) for module in modules):
            return (shortcut.scale >= self.threshold).cpu() & reserved.any()
        return (shortcut.weight.cpu() != 0).float() @ reserved.float() > 0

    def _above(self, layer: Layer) -> Tensor:
        return (_scale(layer) >= self.threshold).cpu()

    def _at_least_one(self, layer: Layer, mask: Tensor) -> Tensor:
        if mask.any():
            return mask
        self.forced.append(layer.name)
        only = torch.zeros_like(mask)
        only[_scale(layer).argmax()] = True
        return only


def _scale(layer: Layer) -> Tensor:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().abs()


def _last_bn(units: list[Unit]) -> Layer:
    if units[-1].bn is None:
        raise PruningError(
            f"the last convolution of a block, {units[-1].conv.name!r}, has no BN: "
            "its channels have no scales to select by"
        )
    return units[-1].bn


class _Held(nn.Module):
    """Keeps the switched-off channels of a parameter at exactly zero, at every step."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.mask


def apply_masks(slim: fx.GraphModule, masks: Masks) -> None:
    """Switch channels off, and keep them off whatever an optimizer does.

    A channel that is off has γ = β = 0 in its BN (as parametrizations, so that neither
    momentum nor weight decay revives it), and then contributes exactly nothing: removing it
    later changes no output. The constant β that a switched-off shortcut channel would leave
    moves to the next BN behind it. Masks may be applied again; the new ones replace the old.

    Args:
        slim: The slimmable model that the masks were selected from; changed in place.
        masks: See `select`.

    Raises:
        PruningError: The masks are those of another model.
    """
    chain = parse(slim)
    bns = {layer.name: layer.module for layer in chain.layers() if layer.name in masks.keep}
    for name, mask in masks.keep.items():
        bn = bns.get(name)
        if not isinstance(bn, nn.BatchNorm2d) or bn.num_features != len(mask):
            raise PruningError(f"the masks are of another model: {name!r} does not fit")
    for name in bns:
        for parameter in ("weight", "bias"):
            if parametrize.is_parametrized(slim.get_submodule(name), parameter):
                parametrize.remove_parametrizations(slim.get_submodule(name), parameter)
    for block in chain.blocks:
        if block.shortcut and block.shortcut[0].name in masks.keep:
            _move_constants(block, masks.keep[block.shortcut[0].name])
    for name, mask in masks.keep.items():
        bn = slim.get_submodule(name)
        assert isinstance(bn, nn.BatchNorm2d)
        held = mask.to(bn.weight)
        for parameter in ("weight", "bias"):
            parametrize.register_parametrization(bn, parameter, _Held(held))
        bn.train(bn.training)  # the new parametrizations come in training mode


@torch.no_grad()
def _move_constants(block: Block, keep: Tensor) -> None:
    """Give what the switched-off channels of a shortcut BN leave behind to the next BN."""
    head, *remainder = (layer.module for layer in block.shortcut)
    last = _last_bn(split_units(block.body)).module
    assert isinstance(head, nn.BatchNorm2d)
    assert isinstance(last, nn.BatchNorm2d)
    constants = head.bias * ~keep.to(head.bias.device)
    before: list[nn.Module] = []
    for module in remainder:
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            moved = fold_shortcut(before, len(constants), constants).weight @ constants
            module.running_mean.sub_(moved)
            break
        before.append(module)
    else:
        last.bias.add_(fold_shortcut(remainder, len(constants), constants).weight @ constants)
    head.bias.sub_(constants)
