"""Shortcuts as additions again: equal in every form, on nets of every kind that slims."""

import copy
from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import residual_networks, scramble
from torch import nn

from rmprune.backends import Platform
from rmprune.convert import convert
from rmprune.errors import PruningError
from rmprune.layers import ChannelSelection, PartialActivation, ResidualBlock
from rmprune.lowering import (
    copied_channels,
    dense_weight,
    fastest,
    find_spans,
    kinds_of,
    lower,
    prepare,
)
from rmprune.measure import count_macs
from rmprune.models import create_model
from rmprune.removal import prune
from rmprune.rewrite import calibrate_bn, collapse
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn
from rmprune.store import load, save

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()
FORMS = ("plain", "selection", "convolution")


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1)
    )


def preferring(form):
    return lambda _, forms, __: form if form in forms else "convolution"


def pruned(model, threshold, example=X):
    slim = scramble(add_shortcut_bn(model)).to(example).eval()
    for name, module in slim.named_modules():
        if name.endswith("shortcut_bn"):
            module.weight.data.abs_()  # as they are after training: they begin positive
    apply_masks(slim, select(slim, threshold, lowering="auto"))
    return slim, collapse(prune(convert(slim, example, keep_bn=False)))


@settings(max_examples=150)
@given(residual_networks(), st.sampled_from([0.0, 0.3, 0.7, 1.1]), st.sampled_from(FORMS))
@pytest.mark.filterwarnings("ignore:all channels of layer")
def test_every_form_computes_the_same(model, threshold, form):
    slim, net = pruned(model, threshold)
    before = copy.deepcopy(net.state_dict())

    lowered = lower(net, X, preferring(form))

    assert_same(lowered(X), slim(X))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    blocks = [layer for layer in lowered if isinstance(layer, ResidualBlock)]
    forms = list(lowered.info["lowering"].values())
    assert len(blocks) == len(forms) - forms.count("plain")
    assert lowered.is_plain == (not blocks)
    selections = [b for b in blocks if not isinstance(b.added, nn.Conv2d)]
    assert len(selections) == forms.count("selection")


def test_an_addition_costs_what_the_residual_network_costs():
    """Nothing pruned: all that plain nets pay for their shortcuts is gone."""
    model = scramble(create_model("resnet20")).eval()
    x = torch.randn(1, 3, 32, 32)
    net = convert(model, x, keep_bn=False)
    lowered = lower(net, x, preferring("selection"))
    assert len(lowered.info["lowering"]) == 9
    assert count_macs(lowered, x) == count_macs(model, x) < count_macs(net, x)
    assert_same(lowered(x), model(x), 1e-4)


@pytest.mark.parametrize(("groups", "width"), [(1, 16), (4, 8)])
def test_grouped_middle_convolutions_are_dense_again(groups, width):
    """What conversion put into groups, to carry channels beside, is what it was."""
    bottleneck = torchvision.models.resnet.Bottleneck
    model = torchvision.models.ResNet(
        bottleneck, [2, 1, 1, 1], num_classes=5, groups=groups, width_per_group=width
    )
    model = scramble(model).double().eval()
    x = torch.randn(1, 3, 32, 32).double()
    lowered = lower(convert(model, x, keep_bn=False), x, preferring("selection"))
    assert set(lowered.info["lowering"].values()) == {"selection", "convolution"}
    assert count_macs(lowered, x) == count_macs(model, x)
    assert_same(lowered(x), model(x))


def test_what_only_the_shortcut_makes_is_not_computed():
    model = create_model("resnet20").double().eval()
    _, net = pruned(model, 0.7, torch.randn(1, 3, 16, 16).double())
    lowered = lower(net, torch.randn(1, 3, 16, 16).double(), preferring("selection"))
    passed = [b.passed for b in lowered if isinstance(b, ResidualBlock) and b.passed is not None]
    assert passed
    assert all(isinstance(selection, ChannelSelection) for selection in passed)
    assert count_macs(lowered, torch.zeros(1, 3, 16, 16).double()) < count_macs(
        net, torch.zeros(1, 3, 16, 16).double()
    )


def test_negative_factors_are_multiplied():
    model = create_model("resnet20").double().eval()
    slim = scramble(add_shortcut_bn(model)).double().eval()
    x = torch.randn(1, 3, 16, 16).double()
    lowered = lower(convert(slim, x, keep_bn=False), x, preferring("selection"))
    assert set(lowered.info["lowering"].values()) == {"selection"}
    scales = [b.added.scale for b in lowered if isinstance(b, ResidualBlock)]
    assert any(scale is not None and (scale < 0).any() for scale in scales)
    assert_same(lowered(x), slim(x))


def test_preparing_brings_channels_into_order():
    _, net = pruned(
        create_model("resnet20").double().eval(), 0.7, torch.randn(1, 3, 16, 16).double()
    )
    layers = prepare(list(net.named_children()))
    spans = find_spans(layers)
    assert spans
    for span in spans:
        assert kinds_of(layers, span) == sorted(kinds_of(layers, span))
        values = span.shortcut[span.shortcut != 0]
        assert (values == 1).all()


def test_copies_are_found_in_grouped_convolutions():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[1, 0, 1, 1] = 2.0  # reads channel 0
    conv.weight.data[2, 1, 1, 1] = 1.0  # reads channel 3
    conv.weight.data[3, 1, 0, 1] = 1.0  # not at the centre
    assert copied_channels(conv).tolist() == [-1, 0, 3, -1]
    assert dense_weight(conv).shape == (4, 4, 3, 3)
    assert dense_weight(conv)[2, 3, 1, 1] == 1
    x = torch.randn(1, 4, 5, 5)
    dense = nn.functional.conv2d(x, dense_weight(conv), padding=1)
    torch.testing.assert_close(dense, conv(x))


def test_carried_past_other_activations_stays_plain_or_equal():
    for carry in ("partial", "prelu"):
        model = scramble(create_model("mobilenetv2_rm")).double().eval()
        x = torch.randn(1, 3, 32, 32).double()
        net = convert(model, x, keep_bn=False, carry=carry)
        assert_same(lower(net, x, preferring("selection"))(x), model(x))


def test_the_fastest_form_is_chosen():
    model = scramble(create_model("resnet20")).eval()
    x = torch.randn(1, 3, 32, 32)
    net = convert(model, x, keep_bn=False)
    lowered = lower(net, x, fastest(x, Platform(batch_size=8), rounds=3, min_seconds=0.001))
    # Half of the MACs: whatever the noise, not all blocks can be faster as Dirac filters.
    assert set(lowered.info["lowering"].values()) != {"plain"}


def test_lowered_nets_are_saved_and_loaded(tmp_path):
    _, net = pruned(create_model("resnet20").eval(), 0.7, torch.randn(1, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    for form in ("selection", "convolution"):
        lowered = lower(net, x, preferring(form))
        save(lowered, tmp_path / "net.safetensors")
        again = load(tmp_path / "net.safetensors")
        assert str(again) == str(lowered)
        assert torch.equal(again(x), lowered(x))
        assert again.info == lowered.info
        assert again.widths == lowered.widths


def test_lowered_nets_are_not_pruned():
    _, net = pruned(create_model("resnet20").eval(), 0.3, torch.randn(1, 3, 16, 16))
    lowered = lower(net, torch.randn(1, 3, 16, 16), preferring("selection"))
    with pytest.raises(PruningError, match="prune the plain net"):
        prune(lowered)


@pytest.mark.parametrize("form", ["selection", "convolution"])
def test_lowered_nets_train_with_bns_inside_of_their_blocks(form):
    _, net = pruned(create_model("resnet20").double().eval(), 0.5, torch.randn(1, 3, 16, 16))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    lowered = lower(net, x[:1], preferring(form))
    assert not lowered.is_plain

    trained = calibrate_bn(lowered, [x[:2], x[2:]])

    torch.testing.assert_close(trained(x), lowered(x))
    for block in trained:
        layers = list(block.body) if isinstance(block, ResidualBlock) else []
        for conv, bn in pairwise(layers):
            assert isinstance(bn, nn.BatchNorm2d) == isinstance(conv, nn.Conv2d)
    # What training sees is normalised by the batch that was measured: it begins where it was.
    training = copy.deepcopy(trained).train()
    torch.testing.assert_close(training(x), lowered(x), rtol=1e-3, atol=1e-4)
    (training(x) ** 2).sum().backward()
    with torch.no_grad():
        for parameter in training.parameters():
            parameter -= 1e-3 * parameter.grad
    folded = collapse(training.eval())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(x), training(x))


def test_selections():
    x = torch.randn(2, 5, 6, 4)
    by_index = ChannelSelection(5, [3, 0], stride=2, scale=True, bias=True)
    by_index.scale.data, by_index.bias.data = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0])
    expected = x[:, [3, 0], ::2, ::2] * by_index.scale[:, None, None] + by_index.bias[:, None, None]
    torch.testing.assert_close(by_index(x), expected)
    by_slice = ChannelSelection(5, [2, 3])
    assert by_slice.is_slice
    assert not by_index.is_slice
    assert torch.equal(by_slice(x), x[:, 2:4])
    with pytest.raises(ValueError, match="0 to 4"):
        ChannelSelection(5, [5])


def test_partial_activations_in_bodies_are_cut():
    activation = PartialActivation("relu", 3)
    activation.keep(torch.tensor([0, 2]))
    assert activation.num_channels == 2
