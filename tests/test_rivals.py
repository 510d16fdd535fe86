"""Rivals get what their documentation gives them, on a network equal to ours."""

import copy

import pytest
import torch
from strategies import scramble
from torch import nn

from rmprune.errors import PruningError
from rmprune.measure import count_macs
from rmprune.models import create_model
from rmprune.rivals import (
    RivalPenalty,
    least_importance,
    load_pruned,
    make_pruner,
    prune_until,
    with_convolved_shortcuts,
)

RIVALS = ["torch-pruning:bn-scale", "torch-pruning:group-norm"]
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return with_convolved_shortcuts(scramble(create_model("resnet20")).eval())


def test_convolved_shortcuts_change_nothing():
    original = scramble(create_model("resnet20")).double().eval()
    before = copy.deepcopy(original.state_dict())
    equal = with_convolved_shortcuts(original)
    assert sum(isinstance(m, nn.Conv2d) for m in equal.modules()) == 19 + 2
    torch.testing.assert_close(equal(X.double()), original(X.double()), rtol=0, atol=1e-10)
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("rival", RIVALS)
def test_pruning_until_a_budget_is_met(model, rival):
    before = count_macs(model, X)
    smaller = prune_until(model, X, rival, lambda net: count_macs(net, X) <= 0.5 * before)
    assert 0.4 * before < count_macs(smaller, X) <= 0.5 * before
    assert count_macs(model, X) == before
    assert smaller(X).shape == (2, 10)

    again = load_pruned(with_convolved_shortcuts(create_model("resnet20")), smaller.state_dict())
    torch.testing.assert_close(again(X), smaller(X), rtol=0, atol=0)
    assert count_macs(again, X) == count_macs(smaller, X)


def test_depthwise_convolutions_of_a_rivals_net_are_built_again():
    model = scramble(create_model("mobilenetv2_rm")).eval()
    before = count_macs(model, X)
    smaller = prune_until(model, X, RIVALS[0], lambda net: count_macs(net, X) <= 0.9 * before)
    again = load_pruned(create_model("mobilenetv2_rm"), smaller.state_dict())
    torch.testing.assert_close(again(X), smaller(X), rtol=0, atol=0)


@pytest.mark.parametrize("rival", RIVALS)
def test_pruning_until_no_group_lies_under_a_threshold(model, rival):
    threshold = least_importance(model, X, rival) * 1.5
    smaller = prune_until(model, X, rival, lambda net: least_importance(net, X, rival) >= threshold)
    assert count_macs(smaller, X) < count_macs(model, X)


@pytest.mark.parametrize("rival", RIVALS)
def test_regularisation_is_torch_prunings_own(model, rival):
    model.train()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        net(X).square().sum().backward()
    RivalPenalty(model, X, rival, 0.01).add_to_gradients(0.5)
    pruner = make_pruner(twin, X, rival)
    pruner.reg = 0.005
    pruner.regularize(twin)
    found, expected = ({n: p.grad for n, p in net.named_parameters()} for net in (model, twin))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rival", RIVALS)
def test_rounded_widths(model, rival):
    before = count_macs(model, X)
    smaller = prune_until(model, X, rival, lambda net: count_macs(net, X) <= 0.6 * before, 8)
    assert all(m.out_channels % 8 == 0 for m in smaller.modules() if isinstance(m, nn.Conv2d))


def test_budgets_out_of_reach(model):
    with pytest.raises(PruningError, match="bn-scale cannot make the network that small"):
        prune_until(model, X, RIVALS[0], lambda _: False)
