"""Masks that leave convolutions in equal groups, and what is left of their kernels; tensors only.

A convolution in groups stays one if every group keeps as many inputs as the others, and as many
outputs, or if the group goes as a whole. So the channels of a tensor between two convolutions come
in *sections*, the smallest parts that lie in one group of either: as many as the least common
multiple of their numbers of groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def even_masks(scores: Sequence[Tensor], groups: Sequence[int], threshold: float) -> list[Tensor]:
    """Choose the channels whose score reaches a threshold, in equal numbers by group.

    Channels that can only go together are judged together: the weakest of every section by the
    mean of their scores, then the second weakest, and so on. A group that has no channel over the
    threshold before the convolution, or none behind it, goes as a whole; the others are then
    judged without it. If that leaves no group, the one whose weaker side is strongest stays.

    Args:
        scores: ``(channels,)`` of the tensors between a sequence of convolutions, in order.
        groups: Of the convolutions, one more than tensors; each divides the channels beside it.
        threshold: On the scores.

    Returns:
        ``(channels,)`` of bool for each tensor, on the CPU. Without groups: where the score reaches
        the threshold.
    """
    sections = [math.lcm(*pair) for pair in pairwise(groups)]
    parts = [score.cpu().view(n, -1) for score, n in zip(scores, sections, strict=True)]
    masks = []
    for run in _runs(sections, groups):
        strength = [parts[place].amax(1) for place in run]
        if all(bool((s >= threshold).any()) for s in strength):
            strength = [torch.stack(strength).amin(0)] * len(run)
            strength[0][strength[0].argmax()] = math.inf
        for place, s in zip(run, strength, strict=True):
            masks.append(_even_mask(parts[place], s >= threshold, threshold))
    return masks


def _runs(sections: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
    """Tensors in order, together where a convolution between them has one group a section."""
    runs: list[list[int]] = []
    for place, number in enumerate(sections):
        if runs and groups[place] == number == sections[place - 1] and number > 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _even_mask(parts: Tensor, lives: Tensor, threshold: float) -> Tensor:
    """``(channels,)`` of bool from scores by section, of which some live."""
    means = parts[lives].sort(1).values.mean(0)
    width = max(int((means >= threshold).sum()), 1)
    return (strongest(parts, width) & lives[:, None]).flatten()


def rounded(mask: Tensor, scale: Tensor, sections: int, round_to: int, besides: int = 0) -> Tensor:
    """A mask with the largest scales back, so that all living sections have the same width.

    Args:
        mask: ``(channels,)`` of bool; a section that keeps nothing stays so.
        scale: ``(channels,)``.
        sections: Equal parts of the channels.
        round_to: The width of all becomes a multiple of this, where there are enough channels.
        besides: Channels that count to it, too.
    """
    parts = mask.view(sections, -1)
    lives, least = parts.any(1), int(parts.sum(1).max())
    living = int(lives.sum())
    widths = range(least, parts.shape[1] + 1)
    fitting = (width for width in widths if (living * width + besides) % round_to == 0)
    order = scale.detach().cpu().view(sections, -1).masked_fill(parts, math.inf)
    return (strongest(order, next(fitting, least)) & lives[:, None]).flatten()


def strongest(parts: Tensor, width: int) -> Tensor:
    """The largest of every row, ``(sections, channels)`` of bool."""
    order = parts.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(parts, dtype=torch.bool).scatter(1, order[:, :width], True)


def groups_left(groups: int, kept_in: Tensor, kept_out: Tensor) -> int | None:
    """In how many groups a convolution is that keeps some channels; None if it is not in any.

    Args:
        groups: Before.
        kept_in: ``(in,)`` of bool.
        kept_out: ``(out,)`` of bool.
    """
    counts = [kept.view(groups, -1).sum(1) for kept in (kept_in, kept_out)]
    lives = counts[0] > 0
    equal = all(bool((count[lives] == count.max()).all()) for count in counts)
    return int(lives.sum()) if equal and torch.equal(lives, counts[1] > 0) else None


def regrouped(
    weight: Tensor, groups: int, outputs: Tensor, inputs: Tensor, new_groups: int
) -> Tensor:
    """The kernels of a convolution between some of its channels, in other groups.

    Args:
        weight: ``(out, in / groups, k, k)``.
        groups: Of the convolution.
        outputs: ``(m,)``: the channels to keep, group by group.
        inputs: ``(n,)``, likewise.
        new_groups: Of what is left; they divide m and n.

    Returns:
        ``(m, n / new_groups, k, k)``, zero between channels that were in different groups.
    """
    share, rows = weight.shape[1], len(weight) // groups
    sources = inputs.view(new_groups, -1).repeat_interleave(len(outputs) // new_groups, 0)
    local = sources - (outputs // rows * share)[:, None]
    inside = (local >= 0) & (local < share)
    picked = weight[outputs[:, None], local.clamp(0, share - 1)]
    return picked * inside.view(*inside.shape, *[1] * (weight.dim() - 2))
