"""Tensors that wait for the same activation are computed side by side, in one plain layer."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import scramble
from torch import nn

from rmprune.convert import convert

X = torch.randn(2, 3, 13, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """``relu(Σ branches(x))``, or their concatenation with x."""

    def __init__(self, branches, joined=False):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.joined = joined

    def forward(self, x):
        outputs = [branch(x) for branch in self.branches]
        if self.joined:
            return torch.cat([x, *outputs], 1)
        total = x
        for output in outputs:
            total = total + output
        return total.relu()


def branch(channels, hidden, kernels, activation, stride=1):
    first, last = kernels
    return nn.Sequential(
        nn.Conv2d(channels, hidden, first, stride, first // 2),
        nn.BatchNorm2d(hidden),
        activation,
        nn.Conv2d(hidden, channels, last, 1, last // 2),
    )


def network(*blocks, channels=4):
    layers = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *blocks]
    return scramble(nn.Sequential(*layers)).double().eval()


def assert_same(first, second):
    x = torch.randn_like(X)
    with torch.no_grad():
        expected = second(x)
        atol = 1e-10 * expected.abs().max().item()
        torch.testing.assert_close(first(x), expected, rtol=0, atol=atol)


def convolutions(net):
    return [layer for layer in net if isinstance(layer, nn.Conv2d)]


def test_two_branches_take_one_layer():
    model = network(
        Branches([branch(4, 3, (3, 3), nn.ReLU()), branch(4, 2, (1, 3), nn.ReLU(inplace=True))])
    )
    plain = convert(model, X)
    assert_same(plain, model)
    stem, first, merge = convolutions(plain)
    assert (first.out_channels, merge.in_channels) == (3 + 2 + 4, 3 + 2 + 4)
    assert plain.widths["2_branches_0_0"].own == 5
    assert stem.out_channels == 4


def test_each_branch_keeps_the_scales_of_its_bn():
    branches = [branch(4, 3, (3, 3), nn.ReLU()), branch(4, 2, (1, 3), nn.ReLU())]
    plain = dict(convert(network(Branches(branches)), X).named_children())
    expected = torch.cat([one[1].weight.abs() for one in branches])
    torch.testing.assert_close(plain["2_branches_0_1"].weight[:5].abs(), expected)


def test_other_activations_and_slopes_stay_apart():
    for first, second in (
        (nn.ReLU(), nn.LeakyReLU(0.1)),
        (nn.LeakyReLU(0.2), nn.LeakyReLU(0.1)),
        (nn.PReLU(), nn.PReLU(init=0.1)),
    ):
        model = network(Branches([branch(4, 3, (3, 3), first), branch(4, 2, (1, 3), second)]))
        plain = convert(model, X)
        assert_same(plain, model)
        assert len(convolutions(plain)) == 4


def test_a_tensor_that_is_needed_without_the_activation_stays_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return self.other(x).relu() + y.relu() + 0.5 * y

    model = network(Twice())
    assert_same(convert(model, X), model)


@st.composite
def branched_networks(draw):
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    channels, blocks = 4, []
    for _ in range(draw(st.integers(1, 2))):
        branches = [
            branch(
                channels,
                draw(st.integers(1, 6)),
                draw(st.tuples(*[st.sampled_from([1, 3, 5])] * 2)),
                draw(st.sampled_from([nn.ReLU(), nn.ReLU(), nn.GELU(), nn.ReLU6()])),
            )
            for _ in range(draw(st.integers(2, 3)))
        ]
        blocks.append(Branches(branches))
    if draw(st.booleans()):
        joined = [branch(channels, 3, (3, 1), nn.ReLU()) for _ in range(2)]
        blocks.append(Branches(joined, joined=True))
    return network(*blocks)


@settings(max_examples=25)
@given(branched_networks())
def test_branched_networks_convert(model):
    assert_same(convert(model, X), model)
