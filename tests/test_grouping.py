"""Masks that leave groups equal, against the rule written out, and kernels against dense ones."""

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmprune.grouping import even_masks, groups_left, regrouped, rounded


def dense(weight, groups):
    """``(out, in, k, k)``, one row after the other."""
    share, rows = weight.shape[1], len(weight) // groups
    full = weight.new_zeros(len(weight), share * groups, *weight.shape[2:])
    for row in range(len(weight)):
        first = row // rows * share
        full[row, first : first + share] = weight[row]
    return full


@st.composite
def scored(draw):
    """Scores of the tensors between some convolutions, and the groups of these."""
    groups = [draw(st.sampled_from([1, 1, 2, 3, 4])) for _ in range(draw(st.integers(1, 4)) + 1)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    widths = [math.lcm(*pair) * draw(st.integers(1, 4)) for pair in pairwise(groups)]
    return [torch.rand(width, generator=generator) for width in widths], groups


@settings(max_examples=80)
@given(scored(), st.floats(0, 1.1))
def test_groups_stay_equal(drawn, threshold):
    scores, groups = drawn
    masks = even_masks(scores, groups, threshold)
    for score, mask, around in zip(scores, masks, pairwise(groups), strict=True):
        above = score >= threshold
        assert mask.any() == above.any()
        if around == (1, 1):
            assert torch.equal(mask, above)
        sections = math.lcm(*around)
        for kept, part in zip(mask.view(sections, -1), score.view(sections, -1), strict=True):
            assert not kept.any() or kept.all() or part[kept].min() >= part[~kept].max()
        counts = mask.view(sections, -1).sum(1)
        assert len(counts[counts > 0].unique()) <= 1
    around = [math.lcm(*pair) for pair in pairwise(groups)]
    for number, (read, made), beside in zip(
        groups[1:-1], pairwise(masks), pairwise(around), strict=True
    ):
        if beside == (number, number) and all(mask.any() for mask in masks):
            assert groups_left(number, read, made) == int(read.view(number, -1).any(1).sum())


def test_channels_of_a_rank_are_judged_by_their_mean():
    score = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.8, 0.7])  # ranks: 0.1 0.3 | 0.5 0.7 | 0.9 0.8
    (mask,) = even_masks([score], [1, 2], 0.55)
    assert mask.tolist() == [False, True, True, False, True, True]
    (mask,) = even_masks([score], [1, 2], 0.65)
    assert mask.tolist() == [False, True, False, False, True, False]


def test_a_group_goes_as_a_whole_on_both_sides():
    before = torch.tensor([0.9, 0.8, 0.1, 0.1, 0.9, 0.1])
    behind = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1])
    masks = even_masks([before, behind], [1, 3, 1], 0.5)
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[4], [6, 7]]


def test_one_group_stays_if_no_group_lives_on_both_sides():
    masks = even_masks([torch.tensor([0.9, 0.2]), torch.tensor([0.3, 0.9])], [1, 2, 1], 0.5)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, False]]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 9999), st.integers(1, 9))
def test_rounding_widens_all_living_sections(sections, width, seed, round_to):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(sections * width, generator=generator)
    lives = torch.rand(sections, generator=generator) < 0.7
    lives[0] = True
    least = int(torch.randint(1, width + 1, (1,), generator=generator))
    mask = torch.zeros(sections, width, dtype=torch.bool)
    for row in lives.nonzero().flatten():
        mask[row, scale.view(sections, -1)[row].topk(least).indices] = True
    found = rounded(mask.flatten(), scale, sections, round_to).view(sections, -1)
    assert found[mask].all()
    assert not found[~lives].any()
    possible = [n for n in range(least, width + 1) if int(lives.sum()) * n % round_to == 0]
    assert (found.sum(1)[lives] == min(possible, default=least)).all()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9999))
def test_kernels_are_those_of_the_dense_convolution(groups, share, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * rows, share, 3, 1, generator=generator)
    new = int(torch.randint(1, 4, (1,), generator=generator))
    sizes = [max(n // new, 1) * new for n in (groups * rows, groups * share)]
    outputs, inputs = (
        torch.randint(0, most, (n,), generator=generator)
        for n, most in zip(sizes, (groups * rows, groups * share), strict=True)
    )
    found = regrouped(weight, groups, outputs, inputs, new)
    expected = dense(weight, groups)[outputs][:, inputs]
    within = dense(torch.ones_like(found), new)
    torch.testing.assert_close(dense(found, new), expected * within, rtol=0, atol=0)
