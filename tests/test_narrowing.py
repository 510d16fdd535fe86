"""Narrowed models: the same outputs and gradients, and fewer channels to compute."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import residual_networks, scramble

from rmprune.measure import count_macs, count_params
from rmprune.models import create_model
from rmprune.narrowing import narrow, survivors, widen
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import add_shortcut_bn

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()


def masked(model, threshold):
    slim = scramble(add_shortcut_bn(model)).double().eval()
    masks = select(slim, threshold, lowering="auto")
    apply_masks(slim, masks)
    return slim, masks


@settings(max_examples=60)
@given(residual_networks(), st.sampled_from([0.0, 0.5, 1.0, 9.0]))
def test_outputs_stay(model, threshold):
    slim, masks = masked(model, threshold)
    expected = slim(X)
    left = narrow(slim, masks)
    torch.testing.assert_close(slim(X), expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    for name, mask in left.keep.items():
        assert slim.get_submodule(name).num_features == len(mask)
        assert left.removed <= masks.removed


def test_training_takes_the_same_steps():
    slim, masks = masked(create_model("resnet20"), 0.7)
    small = copy.deepcopy(slim)
    narrow(small, masks)
    assert count_macs(small, X) < count_macs(slim, X)
    assert count_params(small) < count_params(slim)
    for model in (slim, small):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for seed in range(3):
            x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.eval()
    torch.testing.assert_close(small(X), slim(X), rtol=1e-9, atol=1e-9)


def test_masks_can_be_lost_and_applied_again():
    """What was cut can be built again from a model without weights."""
    slim, masks = masked(create_model("resnet20"), 0.7)
    left = narrow(slim, masks)
    again = add_shortcut_bn(create_model("resnet20")).double()
    assert narrow(again, masks).keep.keys() == left.keep.keys()
    apply_masks(again, left)
    again.load_state_dict(slim.state_dict())
    assert torch.equal(again.eval()(X), slim(X))


def test_widening():
    before = Masks(
        {"inner": torch.tensor([False, True, True]), "outer": torch.tensor([True, False])}
    )
    after = Masks({"inner": torch.tensor([False, True]), "outer": torch.tensor([True, True])})
    wide = widen(after, before)
    assert wide.keep["inner"].tolist() == [False, False, True]
    assert wide.keep["outer"].tolist() == [True, False]
    assert survivors(torch.tensor([False, False])).tolist() == [0]


def test_kernels_that_are_composed_of_others_stay_whole():
    slim, masks = masked(create_model("orepa_resnet20"), 0.7)
    assert not all(mask.all() for mask in masks.keep.values())
    expected = slim(X)
    left = narrow(slim, masks)
    assert all(torch.equal(mask, masks.keep[name]) for name, mask in left.keep.items())
    torch.testing.assert_close(slim(X), expected, rtol=0, atol=1e-10 * expected.abs().max().item())
