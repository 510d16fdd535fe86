"""Scores of channels by what is lost without them: a greedy search for the order to let them go.

Scores are what `rmprune.selection.select` compares with a threshold: the channels with the
lowest go first.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.blocks import inner_bns, split_units, streams
from rmprune.costs import Lowering
from rmprune.graph import Block, parse
from rmprune.narrowing import narrow, survivors
from rmprune.reconstruction import block_sums, heirs, reconstruct
from rmprune.selection import Masks, apply_masks, inner_sections, select
from rmprune.slimming import scales_of
from rmprune.training import distillation_loss

SHARE = 0.25  # of the channels of a layer or a stream go at once
TEMPERATURE = 4.0
LEAST_LEFT = 0.05  # of what a body costs goes with the last of it
REACH = 2  # blocks that are fitted: more took longer and put blocks in the same order


def by_loss(
    slim: fx.GraphModule,
    savings: Mapping[str, float],
    bodies: Mapping[str, float],
    batches: Sequence[Tensor],
    *,
    lowering: Lowering = "plain",
    round_to: int = 1,
) -> dict[str, Tensor]:
    """When each channel goes, if at every step goes what changes the outputs least for its cost.

    A greedy search after NetAdapt (Yang et al. 2018, arXiv 1804.03230, section 3): a step
    takes a share of the channels of a block's layer, those with the smallest scales, or of a
    stream, the tensor that the blocks of a stage add to, or all that is left of a block's body.
    Instead of training between the steps, what is left of the blocks that it concerns and the
    block behind are fitted to what the whole model computes; see `rmprune.reconstruction`. BNs
    normalise by the batch. What a step would change is measured again only when it is next to be
    taken, since it seldom becomes less.

    Args:
        slim: A slimmable model in evaluation mode; trained, but not for sparsity.
        savings: Of one channel of each BN, by path; see `rmprune.costs.channel_savings`. What
            saves nothing never goes.
        bodies: Of the whole body of each block, by the path of its last convolution, in the
            same unit; see `rmprune.costs.body_savings`.
        batches: Normalised images, ``(N, C, H, W)`` each, on the model's device.
        lowering: What the net is made for; of a ``"plain"`` one, reserved channels go too.
        round_to: Steps take multiples of so many channels.

    Returns:
        The scores of every BN, ``(channels,)``: ascending in the order of leaving; inf for
        channels that do not leave.
    """
    search = _Search(slim, savings, bodies, batches, lowering, round_to)
    waiting = [(-math.inf, -1, place) for place in range(len(search.places))]
    taken = 0
    while waiting:
        _, measured_at, place = heapq.heappop(waiting)
        step = search.step(search.places[place])
        if step is None:
            continue
        if measured_at < taken:
            price = search.price(search.places[place], step)
            heapq.heappush(waiting, (price, taken, place))
            continue
        taken += 1
        search.take(step, taken)
        heapq.heappush(waiting, (-math.inf, -1, place))
    return search.scores


def spare(
    scores: Mapping[str, Tensor], slim: fx.GraphModule, times: Mapping[str, int], round_to: int
) -> dict[str, Tensor]:
    """Scores of `by_loss` with which BNs stay that were to go.

    Args:
        scores: ``(channels,)`` by path of a BN.
        slim: The model that they are of.
        times: How often a BN was spared. At first the inner channels of a block keep their
            better half, then all stay.
        round_to: Of so many channels the half is a multiple.
    """
    inner, scales = inner_bns(parse(slim)), scales_of(slim)
    spared = dict(scores)
    for name, count in times.items():
        size = len(scores[name])
        kept = math.ceil(size / 2 / round_to) * round_to if name in inner else size
        kept = size if count > 1 else min(kept, size)
        spared[name] = scores[name].clone()
        spared[name][scales[name].cpu().topk(kept).indices] = math.inf
    return spared


@dataclass(frozen=True)
class _Place:
    """Where steps can be taken: the channels of one BN, or of several at once.

    Attributes:
        kind: A ``"layer"`` inside of a body, a whole ``"body"``, which goes at once, a
            ``"stream"`` (see `rmprune.blocks.streams`), or what a block has ``"reserved"``.
        bns: Paths, each with the channel of the place that the BN's first channel is.
        conv: The last convolution of a body.
        sections: Parts of a layer's channels that lose equally many, see `rmprune.grouping`.
    """

    kind: Literal["layer", "body", "stream", "reserved"]
    bns: Mapping[str, int]
    conv: str = ""
    sections: int = 1


Step = dict[str, Tensor]  # path of a BN to channels, those with the smallest scales first


class _Left(NamedTuple):
    """A model without some channels, the masks that made it, and what it loses."""

    model: fx.GraphModule
    masks: Masks
    loss: float


class _Search:
    """What has gone so far, and what would be lost next.

    Attributes:
        model: What is left, masked, narrowed and fitted.
        left: Channels of the whole model that it has, ``(n,)`` by the path of their BN.
    """

    def __init__(
        self,
        slim: fx.GraphModule,
        savings: Mapping[str, float],
        bodies: Mapping[str, float],
        batches: Sequence[Tensor],
        lowering: Lowering,
        round_to: int,
    ) -> None:
        self.model, self.batches = slim, batches
        self.savings, self.bodies = savings, bodies
        self.lowering, self.round_to = lowering, round_to
        scales = scales_of(slim)
        self.sizes = {name: len(scale) for name, scale in scales.items()}
        self.left = {name: torch.arange(size) for name, size in self.sizes.items()}
        self.scores = {
            name: torch.full((size,), math.inf, dtype=torch.float64)
            for name, size in self.sizes.items()
        }
        self.places = self._places(slim)
        self.sums = block_sums(slim, batches)
        self.expected = reconstruct(slim, self.sums, batches, among=())
        self.loss = 0.0

    def _places(self, slim: fx.GraphModule) -> list[_Place]:
        chain = parse(slim)
        places = [_Place("stream", stream) for stream in streams(chain)]
        for block in chain.blocks:
            units = split_units(block.body)
            bns = [unit.bn.name for unit in units if unit.bn is not None]
            inner = bns[:-1]
            sections = inner_sections(units)
            places += [_Place("layer", {name: 0}, sections=sections[name]) for name in inner]
            body = bns if self.lowering == "auto" else inner
            places.append(_Place("body", dict.fromkeys(body, 0), units[-1].conv.name))
            head = block.shortcut[0]
            if self.lowering == "plain" and isinstance(head.module, nn.BatchNorm2d):
                places.append(_Place("reserved", {head.name: 0}))
        return [place for place in places if any(self.savings[name] > 0 for name in place.bns)]

    def step(self, place: _Place) -> Step | None:
        """The channels that would go next; None if there are none left."""
        present = [name for name in place.bns if name in scales_of(self.model)]
        left = {name: torch.isinf(self.scores[name]) for name in present}
        if place.kind == "body":
            whole = {name: alive.nonzero().flatten() for name, alive in left.items()}
            return (
                whole if len(present) == len(place.bns) and all(map(len, whole.values())) else None
            )
        ranked = self._ranked(place, left)
        multiple = math.lcm(self.round_to, place.sections)
        size = math.ceil(self._width(place) * SHARE / multiple) * multiple
        if len(ranked) <= size and place.kind != "reserved":
            return None  # a body goes by a step of its own, a stream not at all
        goes = ranked[:size]
        step = {}
        for name, alive in left.items():
            own = goes - place.bns[name]
            own = own[(own >= 0) & (own < len(alive))]
            step[name] = own[alive[own]]
        return step if goes.numel() else None

    def _width(self, place: _Place) -> int:
        return max(self.sizes[name] + first for name, first in place.bns.items())

    def _ranked(self, place: _Place, left: Mapping[str, Tensor]) -> Tensor:
        """The channels of a place that are left, ``(n,)``, those with the smallest scales first.

        Of several sections the weakest of each come first, then the second weakest of each.
        """
        alive = torch.zeros(self._width(place), dtype=torch.bool)
        total, scales = torch.zeros(len(alive), dtype=torch.float64), scales_of(self.model)
        for name, there in left.items():
            first = place.bns[name]
            alive[first : first + len(there)] |= there
            total.index_add_(0, self.left[name] + first, scales[name].double().cpu())
        channels = alive.nonzero().flatten()
        channels = channels[total[channels].argsort(stable=True)]
        section = (channels * place.sections // len(alive))[:, None]
        rank = F.one_hot(section[:, 0], place.sections).cumsum(0).gather(1, section)
        return channels[rank[:, 0].argsort(stable=True)]

    def price(self, place: _Place, step: Step) -> float:
        """What a step adds to the loss, for what it saves."""
        return (self._without(step).loss - self.loss) / self._saved_by(place, step)

    def _saved_by(self, place: _Place, step: Step) -> float:
        channels = {name: len(gone) for name, gone in step.items()}
        if place.kind != "body":
            return sum(self.savings[name] * count for name, count in channels.items())
        credited = sum(
            self.savings[name] * (self.sizes[name] - count) for name, count in channels.items()
        )
        # What its channels were credited with is a slope, and can be more than there was.
        return max(self.bodies[place.conv] - credited, LEAST_LEFT * self.bodies[place.conv])

    def take(self, step: Step, number: int) -> None:
        """Let channels go, as the step of a number."""
        self.model, masks, self.loss = self._without(step)
        for name, channels in step.items():
            self.scores[name][channels] = float(number)
            if len(step) == 1:  # a part of the step may be enough
                self.scores[name][channels] += torch.arange(len(channels)).double() / len(channels)
        present = scales_of(self.model)
        for name, mask in masks.keep.items():
            if name in present and len(present[name]) < len(mask):
                self.left[name] = self.left[name][survivors(mask)]

    def _without(self, step: Step) -> _Left:
        """What is left without the channels of one more step."""
        stays = {
            name: torch.ones(len(scale), dtype=torch.float64)
            for name, scale in scales_of(self.model).items()
        }
        for name, channels in step.items():
            stays[name][torch.isin(self.left[name], channels)] = 0
        masks = select(self.model, 0.5, scores=stays, lowering=self.lowering)
        model = copy.deepcopy(self.model)
        apply_masks(model, masks)
        narrow(model, masks)
        before, after = (heirs(self.sums, parse(m).blocks) for m in (self.model, model))
        blocks = parse(model).blocks
        touched = [
            place
            for place, block in enumerate(blocks)
            if _has(block, step) or after[block.add.name] != before[block.add.name]
        ]
        reach = range(touched[0], max(touched[0] + REACH, touched[-1] + 1)) if touched else ()
        among = {block.add.name for place, block in enumerate(blocks) if place in reach}
        outputs = reconstruct(model, self.sums, self.batches, among)
        losses = [
            distillation_loss(found, expected, TEMPERATURE).item()
            for found, expected in zip(outputs, self.expected, strict=True)
        ]
        return _Left(model, masks, sum(losses) / len(losses))


def _has(block: Block, step: Step) -> bool:
    return any(layer.name in step for layer in (*block.body, *block.shortcut))
