"""Which channels stay: from scales to masks, and masks held while a model is fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from rmprune.blocks import Unit, inner_tensors, split_units
from rmprune.costs import Lowering
from rmprune.errors import PruningError, UsageError
from rmprune.graph import Block, Layer, PadChannels, Subsample, parse
from rmprune.grouping import even_masks, rounded
from rmprune.holding import hold, parameter, release
from rmprune.layers import is_depthwise
from rmprune.norms import fold_shortcut
from rmprune.passing import empty_blocks, pass_on


@dataclass(frozen=True)
class Masks:
    """Channels to keep.

    Attributes:
        keep: Path of a BN, of a plain net name of a convolution, to its mask, ``(channels,)``
            of bool: True where a channel stays.
        forced: Those of which one channel was kept though all lie under the threshold.
    """

    keep: Mapping[str, Tensor]
    forced: tuple[str, ...] = ()

    def within(self, others: Masks) -> Masks:
        """The channels that both keep."""
        keep = {name: mask & others.keep[name] for name, mask in self.keep.items()}
        return Masks(keep, self.forced)

    @property
    def channels(self) -> int:
        """All channels that have a scale."""
        return sum(len(mask) for mask in self.keep.values())

    @property
    def removed(self) -> int:
        """Channels that are switched off."""
        return sum(int((~mask).sum()) for mask in self.keep.values())


def select(
    slim: fx.GraphModule,
    threshold: float,
    *,
    scores: Mapping[str, Tensor] | None = None,
    lowering: Lowering = "plain",
    round_to: int = 1,
    spared: Collection[str] = (),
) -> Masks:
    """Choose the channels whose score reaches a threshold.

    An inner channel of a block goes when its own score is under the threshold (of a depthwise
    convolution, when it is under it before or behind the convolution; beside one in wider groups
    each group keeps equally many or none, see `rmprune.grouping.even_masks`), a reserved
    channel when its shortcut BN's is or when the channel it would copy is gone, an output
    channel when neither the block's last BN nor its shortcut keeps it. A body that has lost
    a whole layer is lost altogether: its block then collapses. Where nothing at all would
    be left of a tensor, the channel with the largest scale stays.

    Args:
        slim: A slimmable model, see `rmprune.add_shortcut_bn`; left as it is.
        threshold: On the scores.
        scores: ``(channels,)`` for each BN, by path; see `rmprune.importance`. By default the
            scales, ``|γ|``.
        lowering: What the net is made for. In a ``"plain"`` net an output channel costs the
            same whether a block's body makes it, its shortcut, or both; with ``"auto"`` the
            body's part goes by its own scale, too.
        round_to: The channels that each convolution of the net computes become a multiple of
            this: those with the largest scales come back, where there are enough.
        spared: BNs that keep their largest scale even if all lie under the threshold.

    Raises:
        UsageError: The threshold is negative or not a number, or there is no such multiple.
        PruningError: A block has no shortcut BN, or its last convolution has no BN.
        ConversionError: The model is no chain of residual blocks.
    """
    if not 0 <= threshold < math.inf:
        raise UsageError(f"the threshold must be finite and not negative, but it is {threshold}")
    if round_to < 1:
        raise UsageError(f"widths can be multiples of 1 or more, not of {round_to}")
    selection = _Selection(threshold, scores, lowering, round_to, spared)
    for item in parse(slim).items:
        if isinstance(item, Block):
            selection.visit_block(item)
        else:
            selection.visit_layer(item)
    return Masks(selection.keep, tuple(selection.forced))


class _Selection:
    """A walk from input to output that knows which channels of the tensor at hand live."""

    def __init__(
        self,
        threshold: float,
        scores: Mapping[str, Tensor] | None,
        lowering: Lowering,
        round_to: int,
        spared: Collection[str],
    ) -> None:
        self.threshold = threshold
        self.scores = scores
        self.lowering = lowering
        self.round_to = round_to
        self.spared = spared
        self.keep: dict[str, Tensor] = {}
        self.forced: list[str] = []
        self.live: Tensor | None = None  # None: no BN seen yet, all channels live
        self.latest: tuple[str, ...] = ()  # BNs whose channels are those of the tensor at hand
        self.tied: tuple[str, ...] = ()  # those before the depthwise convolution just seen

    def visit_layer(self, layer: Layer) -> None:
        if isinstance(layer.module, nn.BatchNorm2d):
            mask = self._above(layer)
            if self.tied and self.live is not None:
                mask &= self.live
            self.live = self._rounded(layer, self._at_least_one(layer, mask))
            self.latest = (*self.tied, layer.name)
            self.keep |= dict.fromkeys(self.latest, self.live)
        elif isinstance(layer.module, nn.Conv2d):
            self.tied = self.latest if is_depthwise(layer.module) else ()
            if not self.tied:
                self.live = None
            self.latest = ()

    def visit_block(self, block: Block) -> None:
        units = split_units(block.body)
        last = _last_bn(units)
        head, *remainder = block.shortcut or (None,)
        if head is None or not isinstance(head.module, nn.BatchNorm2d):
            raise PruningError(
                f"the block at {block.add.name!r} has no shortcut BN; "
                "call rmprune.add_shortcut_bn(model, calibration_batches) first"
            )
        self.tied = self.latest = ()
        inner = self._inner(units)
        reserved = self._above(head)
        if self.live is not None:
            reserved &= self.live
        made = self._above(last)
        apart = self.lowering == "auto" and _receiver(block) is not None
        body_lives = all(bool(mask.any()) for mask, _ in inner.values())
        if apart:
            body_lives &= bool(made.any())
        if not body_lives and not reserved.any():
            inner, body_lives = self._inner(units, at_least_one=True), True
        besides = 0 if apart else int(reserved.sum())  # other rows of the same convolution
        for bns, (mask, sections) in inner.items():
            kept = mask & False
            if body_lives:
                kept = rounded(mask, _scale(bns[0]), sections, self.round_to, besides)
            self.keep |= dict.fromkeys((bn.name for bn in bns), kept)
        self.keep[head.name] = reserved

        made &= body_lives
        carried = self._shortcut_lives(remainder, reserved)
        if not (made | carried).any():
            made = self._at_least_one(last, made)
        if body_lives:
            made |= self._rounded(last, made | carried) & ~carried
        if body_lives and apart:
            made = self._rounded(last, made, among=carried)
        self.live = made | carried
        self.keep[last.name] = made if apart else self.live
        for layer in remainder:
            if isinstance(layer.module, nn.BatchNorm2d):
                self.keep[layer.name] = carried if apart else self.live

    def _shortcut_lives(self, remainder: list[Layer], reserved: Tensor) -> Tensor:
        """Which outputs of a shortcut are kept by it, ``(out,)``."""
        modules = [layer.module for layer in remainder]
        like = next((t for module in modules for t in module.parameters()), torch.ones(1))
        shortcut = fold_shortcut(modules, len(reserved), like)
        if any(isinstance(module, nn.Conv2d) for module in modules):
            if isinstance(modules[-1], nn.BatchNorm2d):
                kept = self._above(remainder[-1])
            else:  # no BN, no score of its own: its scale is 1
                least = self.threshold if self.scores is None else 0
                kept = (shortcut.scale >= least).cpu()
            return kept & reserved.any()
        return (shortcut.weight.cpu() != 0).float() @ reserved.float() > 0

    def _inner(
        self, units: Sequence[Unit], at_least_one: bool = False
    ) -> dict[tuple[Layer, ...], tuple[Tensor, int]]:
        """Masks of the channels inside of a body, by their BNs, with their number of sections."""
        runs, groups = _runs(units)
        tied, scores = [], []
        for run in runs:
            bns = tuple(unit.bn for unit in run if unit.bn is not None)
            score = torch.full((run[0].kernel.out_channels,), math.inf)  # without BN all stay
            if bns:
                score = torch.stack([self._score(bn) for bn in bns]).amin(0)
            if at_least_one and not (score >= self.threshold).any():
                self.forced.append(bns[0].name)
                score = score.index_fill(0, _scale(bns[0]).cpu().argmax(), math.inf)
            tied.append(bns)
            scores.append(score)
        masks = even_masks(scores, groups, self.threshold)
        sections = [math.lcm(*pair) for pair in pairwise(groups)]
        return {
            bns: (mask, number)
            for bns, mask, number in zip(tied, masks, sections, strict=True)
            if bns
        }

    def _score(self, layer: Layer) -> Tensor:
        score = (_scale(layer) if self.scores is None else self.scores[layer.name]).cpu()
        if layer.name in self.spared and not (score >= self.threshold).any():
            return score.index_fill(0, _scale(layer).cpu().argmax(), math.inf)
        return score

    def _above(self, layer: Layer) -> Tensor:
        return self._score(layer) >= self.threshold

    def _rounded(self, layer: Layer, mask: Tensor, among: Tensor | None = None) -> Tensor:
        """The mask with the next largest scales, so that the width is a multiple.

        Args:
            layer: The BN.
            mask: ``(channels,)`` of bool.
            among: Where channels may come back; everywhere if None.
        """
        missing = -int(mask.sum()) % self.round_to
        return with_more(mask, _scale(layer), missing, among)

    def _at_least_one(self, layer: Layer, mask: Tensor) -> Tensor:
        if mask.any():
            return mask
        self.forced.append(layer.name)
        only = torch.zeros_like(mask)
        only[_scale(layer).argmax()] = True
        return only


def with_more(mask: Tensor, scale: Tensor, missing: int, among: Tensor | None = None) -> Tensor:
    """A mask with the largest scales back that it switches off, if there are so many.

    Args:
        mask: ``(channels,)`` of bool.
        scale: ``(channels,)``.
        missing: How many come back.
        among: Where they may; everywhere if None.
    """
    free = ~mask if among is None else ~mask & among
    if missing == 0 or missing > int(free.sum()):
        return mask
    back = scale.cpu().masked_fill(~free, -1).topk(missing).indices
    return mask.index_fill(0, back, True)


def _scale(layer: Layer) -> Tensor:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().abs()


def inner_sections(units: Sequence[Unit]) -> dict[str, int]:
    """In how many sections the channels of each BN inside of a body come, by its path.

    Each of them keeps equally many; see `rmprune.grouping`.
    """
    runs, groups = _runs(units)
    return {
        unit.bn.name: math.lcm(*around)
        for run, around in zip(runs, pairwise(groups), strict=True)
        for unit in run
        if unit.bn is not None
    }


def _runs(units: Sequence[Unit]) -> tuple[list[list[Unit]], list[int]]:
    """The tensors inside of a body, and the groups of the convolutions around them, one more.

    A depthwise convolution counts as one group, since it loses channels one by one.
    """
    runs = inner_tensors(units)
    around = [run[0].kernel for run in runs] + [units[-1].kernel]
    return runs, [1 if is_depthwise(conv) else conv.groups for conv in around]


def _last_bn(units: list[Unit]) -> Layer:
    if units[-1].bn is None:
        raise PruningError(
            f"the last convolution of a block, {units[-1].conv.name!r}, has no BN: "
            "its channels have no scales to select by"
        )
    return units[-1].bn


def _receiver(block: Block) -> nn.BatchNorm2d | None:
    """The BN whose β stands for all that a shortcut adds, or None if a convolution is last."""
    tail = [layer.module for layer in block.shortcut]
    while tail and isinstance(tail[-1], PadChannels | Subsample):
        tail.pop()
    return tail[-1] if tail and isinstance(tail[-1], nn.BatchNorm2d) else None


def apply_masks(slim: fx.GraphModule, masks: Masks) -> None:
    """Switch channels off, and keep them off whatever an optimizer does.

    A channel that is off has γ = β = 0 in its BN (as parametrizations, so that neither
    momentum nor weight decay revives it), and then contributes exactly nothing: removing it
    later changes no output. The constant β that a switched-off shortcut channel would leave
    moves to the next BN behind it, and that of a block's last BN to a shortcut that keeps the
    channel. A block without a body becomes the identity where it can; see `rmprune.passing`.
    Masks may be applied again; the new ones replace the old.

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
        release(slim.get_submodule(name))
    for block in chain.blocks:
        if block.shortcut and block.shortcut[0].name in masks.keep:
            _move_constants(block, masks.keep[block.shortcut[0].name])
            _move_offsets(block, masks.keep)
    for name, mask in masks.keep.items():
        bn = slim.get_submodule(name)
        assert isinstance(bn, nn.BatchNorm2d)
        hold(bn, mask)
    for block, _, makers in reversed(empty_blocks(chain, masks.keep)):
        pass_on(block, makers)


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
        moved = fold_shortcut(remainder, len(constants), constants).weight @ constants
        parameter(last, "bias").add_(moved)
    parameter(head, "bias").sub_(constants)


@torch.no_grad()
def _move_offsets(block: Block, keep: Mapping[str, Tensor]) -> None:
    """Give what a body's switched-off outputs leave behind to the shortcut that goes on."""
    last = _last_bn(split_units(block.body))
    receiver, bn = _receiver(block), last.module
    assert isinstance(bn, nn.BatchNorm2d)
    if receiver is None:
        return
    names = [layer.name for layer in block.shortcut if layer.module is receiver]
    behind = [layer.module for layer in block.shortcut]
    behind = behind[behind.index(receiver) + 1 :]
    offsets = bn.bias * ~keep[last.name].to(bn.bias.device)
    matrix = fold_shortcut(behind, receiver.num_features, offsets).weight
    carried = matrix * keep[names[0]].to(matrix)
    parameter(receiver, "bias").add_(offsets @ carried)
    parameter(bn, "bias").sub_(offsets * (carried != 0).any(1))
