"""Groups packed anew: nothing is lost, and nothing is cheaper."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmprune.packing import Prices, pack

PRICES = Prices(9, 5, 7)


@st.composite
def sparse_kernels(draw):
    groups, share, rows = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    used = torch.rand(groups * rows, share, generator=generator) < draw(st.sampled_from([0.3, 0.9]))
    alive = [torch.rand(groups * n, generator=generator) < 0.6 for n in (share, rows)]
    used &= alive[0].view(groups, share).repeat_interleave(rows, 0)
    used &= alive[1][:, None]
    return used, groups, tuple(alive)


def pairs(used, groups):
    """Connected channels, ``(input, output)``."""
    rows, share = len(used) // groups, used.shape[1]
    return {(r // rows * share + c, r) for r, c in used.nonzero().tolist()}


@settings(max_examples=150)
@given(sparse_kernels())
def test_every_connection_is_within_a_group(drawn):
    used, groups, alive = drawn
    found = pack(used, groups, alive, PRICES)
    if found is None:
        # The old groups would always do, if there is anything on both sides.
        assert not (alive[0].any() and alive[1].any())
        return
    for channels, mask in zip((found.inputs, found.outputs), alive, strict=True):
        assert len(channels.unique()) == len(channels) <= len(mask)
        assert set(mask.nonzero().flatten().tolist()) <= set(channels.tolist())
    of_input = {
        c: g for g, cs in enumerate(found.inputs.view(found.number, -1).tolist()) for c in cs
    }
    of_output = {
        c: g for g, cs in enumerate(found.outputs.view(found.number, -1).tolist()) for c in cs
    }
    assert all(of_input[i] == of_output[o] for i, o in pairs(used, groups))


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_groups_that_lose_alike_stay(dead):
    alive = torch.arange(4).repeat(3) >= dead, torch.arange(5).repeat(3) >= dead
    used = alive[0].view(3, 4).repeat_interleave(5, 0) & alive[1][:, None]
    found = pack(used, 3, alive, PRICES)
    assert found.number == 3
    for channels, mask in zip((found.inputs, found.outputs), alive, strict=True):
        assert torch.equal(channels, mask.nonzero().flatten())


def test_copies_fill_whole_groups():
    """A group of 4 is whole, two others hold five living copies: one of these groups is enough."""
    used = torch.cat([torch.ones(4, 4), torch.eye(4), torch.eye(4)]).bool()
    alive = torch.ones(12, dtype=torch.bool)
    alive[[4, 7, 9, 10]] = False
    used &= alive[:, None]
    found = pack(used, 3, (alive, alive), PRICES)
    assert found.number == 2
    assert found.inputs.tolist() == found.outputs.tolist() == [0, 1, 2, 3, 5, 6, 8, 11]


def test_no_partition_of_few_parts_is_cheaper():
    """All ways to put parts into bins, tried one by one."""
    sizes = [(3, 2), (1, 1), (1, 1), (1, 2), (1, 1)]
    used = torch.zeros(15, 3, dtype=torch.bool)  # 5 groups of 3 inputs and 3 outputs
    alive = torch.zeros(15, dtype=torch.bool), torch.zeros(15, dtype=torch.bool)
    for place, (inputs, outputs) in enumerate(sizes):
        used[3 * place : 3 * place + outputs, :inputs] = True
        alive[0][3 * place : 3 * place + inputs] = True
        alive[1][3 * place : 3 * place + outputs] = True
    costs = []
    for bins in itertools.product(range(5), repeat=5):
        number = max(bins) + 1
        loads = [
            [
                sum(s[side] for s, b in zip(sizes, bins, strict=True) if b == n)
                for n in range(number)
            ]
            for side in (0, 1)
        ]
        inputs, outputs = map(max, loads)
        if number * max(inputs, outputs) <= 15:
            costs.append(number * (9 * inputs * outputs + 5 * inputs + 7 * outputs))
    assert pack(used, 5, alive, PRICES).cost(PRICES) == min(costs)
