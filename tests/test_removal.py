"""Removal against the unpruned net, and against torch-pruning's own graph."""

import copy
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import networks_of_all_pieces, residual_networks, scramble
from torch import nn

from rmprune.convert import convert
from rmprune.errors import PruningError, UsageError
from rmprune.layers import ACTIVATIONS
from rmprune.models import create_model
from rmprune.plain import PlainNet, Width
from rmprune.removal import prune
from rmprune.rewrite import fold_bn
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()
pytestmark = pytest.mark.filterwarnings("ignore:all channels of layer")


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1)
    )


def count(net):
    return sum(p.numel() for p in net.parameters())


def bns_of_convs(net):
    children = list(net)
    return [
        follower
        for layer, follower in pairwise(children)
        if isinstance(layer, nn.Conv2d) and isinstance(follower, nn.BatchNorm2d)
    ]


def switch_off(bns, share, seed, with_bias):
    """Set random scales to exactly 0, and β too if it shall go along."""
    generator = torch.Generator().manual_seed(seed)
    off = 0
    with torch.no_grad():
        for bn in bns:
            dead = torch.rand(bn.num_features, generator=generator) < share
            bn.weight[dead] = 0
            off += int(dead.sum())
            if with_bias:
                bn.bias[dead] = 0
    return off


@settings(max_examples=200)
@given(
    residual_networks(),
    st.sampled_from(["relu", "prelu"]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 9999),
)
def test_channels_that_are_zero_leave_without_a_trace(model, downsample, share, seed):
    plain = convert(model, X, downsample=downsample)
    off = switch_off(bns_of_convs(plain), share, seed, with_bias=True)
    before = copy.deepcopy(plain.state_dict())

    pruned = prune(plain)

    assert_same(pruned(X), plain(X))
    if share == 0.5 and off:
        assert count(pruned) < count(plain)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


@settings(max_examples=100)
@given(
    residual_networks(),
    st.sampled_from(["relu", "prelu"]),
    st.sampled_from([0.2, 0.6, 1.0]),
    st.integers(0, 9999),
    st.booleans(),
)
def test_constants_fold_exactly_in_the_interior(model, downsample, share, seed, folded):
    """Without padding every position is interior, and all of them must be exact."""
    plain = convert(model, X, downsample=downsample)
    for layer in plain:
        if isinstance(layer, nn.Conv2d):
            layer.padding = (0, 0)
    plain.input_shape = None
    switch_off(bns_of_convs(plain), share, seed, with_bias=False)
    if folded:
        plain = fold_bn(plain)
    x = torch.randn(1, 3, 210, 200, dtype=torch.float64)

    pruned = prune(plain)

    assert_same(pruned(x), plain(x))


@settings(max_examples=8)
@given(st.sampled_from([0.2, 0.6]), st.integers(0, 9999))
def test_removal_agrees_with_torch_prunings_graph(share, seed):
    plain = convert(scramble(create_model("resnet20")).double().eval(), X)
    inner = [layer for name, layer in plain.named_children() if name.endswith("_bn1")]
    switch_off(inner, share, seed, with_bias=True)
    reference = copy.deepcopy(plain)
    x = X[:1]
    for name, module in list(reference.named_children()):
        # A block's first layer, where one death brings about no other.
        if not name.endswith("_conv1"):
            continue
        bn = list(reference)[list(dict(reference.named_children())).index(name) + 1]
        dead = (bn.weight == 0).nonzero().flatten().tolist()
        if dead and len(dead) < bn.num_features:
            graph = tp.DependencyGraph().build_dependency(reference, x)
            graph.get_pruning_group(module, tp.prune_conv_out_channels, dead).prune()

    pruned = prune(plain)

    shapes = [[tuple(p.shape) for p in net.parameters()] for net in (pruned, reference)]
    assert shapes[0] == shapes[1]
    assert_same(pruned(X), reference(X))


@settings(max_examples=50)
@given(residual_networks(), st.sampled_from([0.3, 0.8, 5.0]))
def test_threshold_switches_off_and_removes_in_one_go(model, threshold):
    plain = convert(model, X)
    by_hand = copy.deepcopy(plain)
    with torch.no_grad():
        for bn in bns_of_convs(by_hand):
            bn.weight[bn.weight.abs() < threshold] = 0

    first, second = prune(plain, threshold), prune(by_hand)

    assert [p.shape for p in first.parameters()] == [p.shape for p in second.parameters()]
    assert_same(first(X), second(X), 0)


def test_nothing_dead_nothing_removed():
    plain = convert(scramble(create_model("resnet20")).double().eval(), X)
    pruned = prune(plain)
    assert count(pruned) == count(plain)
    assert_same(pruned(X), plain(X), 0)


def test_deaths_spread_both_ways():
    net = convert(scramble(create_model("resnet20")).double().eval(), X)
    children = dict(net.named_children())
    with torch.no_grad():
        children["layer1_0_conv2"].weight[:, 3] = 0  # nobody reads channel 3 of conv1
        children["layer1_1_conv1"].weight[:, 5] = 0  # nor channel 5 of conv2, copies included
    pruned = prune(net)
    # Channel 5 of conv2 was the only reader of the copy that block 0 carries, and the only
    # source of the one that block 1 does.
    assert pruned.widths["layer1_0_conv1"] == Width(15, 15)
    assert pruned.widths["layer1_1_conv1"] == Width(16, 15)
    assert pruned.widths["layer1_0_conv2"] == Width(15)
    assert_same(pruned(X), net(X))


def test_widths_tell_own_from_reserved():
    plain = convert(scramble(create_model("resnet20")).double().eval(), X)
    bn = dict(plain.named_children())["layer2_1_bn1"]
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias):
            tensor[:5] = 0
            tensor[-7:] = 0
    pruned = prune(plain)
    assert pruned.converted_widths["layer2_1_conv1"] == Width(32, 32)
    assert pruned.widths["layer2_1_conv1"] == Width(27, 25)


def test_a_linear_layer_behind_flattened_maps_loses_all_positions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 11 * 8, 4)
    )
    net = scramble(PlainNet(OrderedDict(net.named_children()), (3, 13, 10))).double().eval()
    with torch.no_grad():
        net[1].weight[2] = 0  # β stays, and is folded into the linear layer exactly
    pruned = prune(net)
    assert pruned[-1].in_features == 5 * 11 * 8
    assert_same(pruned(X), net(X))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_what_a_dead_channel_leaves_passes_every_activation(activation):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation(), nn.Conv2d(6, 4, 1)]
    net = scramble(PlainNet(OrderedDict(zip("abcd", layers, strict=True)), (3, 13, 10)))
    net = net.double().eval()
    with torch.no_grad():
        net.b.weight[2:4] = 0
    pruned = prune(net)
    assert pruned.a.out_channels == 4
    assert_same(pruned(X), net(X))


def test_a_layer_without_living_channels_keeps_one_and_warns():
    plain = convert(scramble(create_model("resnet20")).double().eval(), X)
    bn = dict(plain.named_children())["layer2_1_bn2"]
    with torch.no_grad():
        bn.weight.zero_()
    with pytest.warns(UserWarning, match="all channels of layer 'layer2_1_conv2' are dead"):
        pruned = prune(plain)
    assert pruned.widths["layer2_1_conv2"].total == 1


def test_negative_threshold():
    plain = convert(create_model("resnet20").eval(), X.float())
    with pytest.raises(UsageError, match="the threshold must be finite and not negative"):
        prune(plain, -1)


def test_threshold_without_bns():
    plain = convert(create_model("resnet20").eval(), X.float(), keep_bn=False)
    with pytest.raises(PruningError, match=r"'conv1' has no BN.*keep_bn=True"):
        prune(plain, 0.1)


@given(networks_of_all_pieces(), st.integers(0, 9999), st.sampled_from([0.2, 0.6, 1.0]))
@pytest.mark.filterwarnings("ignore:all channels of layer")
def test_zero_channels_leave_nets_of_all_pieces(model, seed, share):
    """Gates, activations of part of the channels, groups and alternating channels stay right."""
    x = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)).double()
    plain = convert(model, x)
    generator = torch.Generator().manual_seed(seed)
    for layer in plain:
        if isinstance(layer, nn.BatchNorm2d):
            off = torch.rand(layer.num_features, generator=generator) < share
            off[0] = False
            with torch.no_grad():
                layer.weight[off] = 0
                layer.bias[off] = 0

    pruned = prune(plain)

    assert_same(pruned(x), plain(x))
    for name, layer in pruned.named_children():
        if isinstance(layer, nn.Conv2d) and name in pruned.widths:
            assert pruned.widths[name].total == layer.out_channels


def depthwise_chain(draw):
    """Pointwise and depthwise convolutions in turn, with some of everything off."""
    layers, width = [], 3
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(2, 6))
        layers += [nn.Conv2d(width, out, draw(st.sampled_from([1, 3])), bias=draw(st.booleans()))]
        width = out
        for _ in range(draw(st.integers(0, 2))):
            kernel = draw(st.sampled_from([1, 3]))
            padding = draw(st.sampled_from([0, kernel // 2]))
            conv = nn.Conv2d(
                width, width, kernel, 1, padding, groups=width, bias=draw(st.booleans())
            )
            layers += [nn.BatchNorm2d(width), nn.ReLU(), conv]
        layers += [nn.BatchNorm2d(width), draw(st.sampled_from([nn.ReLU(), nn.Hardswish()]))]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    return PlainNet(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers)))


@given(st.data(), st.integers(0, 9999))
def test_depthwise_convolutions_lose_channels_exactly(data, seed):
    """Rows, filters and columns that are zero, and scales that are off with their shift."""
    net = scramble(depthwise_chain(data.draw)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                off = torch.rand(len(layer.weight), generator=generator) < 0.3
                layer.weight[off] = 0
                if isinstance(layer, nn.BatchNorm2d):
                    layer.bias[off] = 0
    x = torch.randn(2, 3, 14, 13, generator=generator).double()
    pruned = prune(net)
    assert_same(pruned(x), net(x))
    for conv, bn in zip(pruned, list(pruned)[1:], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            assert bn.num_features == conv.out_channels


@pytest.mark.parametrize("fuse", ["auto", "always"])
def test_mobilenet_loses_what_is_off(fuse):
    slim = scramble(add_shortcut_bn(create_model("mobilenetv2_rm"))).double().eval()
    masks = select(slim, 0.75)
    apply_masks(slim, masks)
    x = torch.randn(2, 3, 16, 16).double()
    plain = convert(slim, x, keep_bn=False, fuse=fuse)
    pruned = prune(plain)
    assert_same(pruned(x), slim(x), 1e-9)
    # Half of every layer's channels are off, each by itself: a quarter of the products is left.
    assert count(pruned) < 0.3 * count(plain)
    depthwise = [m for m in pruned if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
