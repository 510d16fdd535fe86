"""Convolutions in groups through selection, narrowing and removal: nothing changes but the size."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Residual, scramble
from torch import nn

from rmprune.blocks import split_units
from rmprune.convert import convert
from rmprune.costs import body_savings, channel_savings, counted
from rmprune.graph import parse
from rmprune.greedy import by_loss
from rmprune.joints import joints_of
from rmprune.lowering import lower
from rmprune.measure import count_macs, count_params
from rmprune.models.repvgg import RepVGG, Stage
from rmprune.models.rmnext import RMNeXt
from rmprune.narrowing import narrow
from rmprune.plain import PlainNet
from rmprune.plain_selection import plain_scales, remove_channels, select_plain
from rmprune.removal import prune
from rmprune.rewrite import calibrate_bn, collapse
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import add_shortcut_bn

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()
pytestmark = pytest.mark.filterwarnings("ignore:all channels of layer")


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1)
    )


def plain_net(layers):
    named = OrderedDict((f"l{i}", layer) for i, layer in enumerate(layers))
    return scramble(PlainNet(named, (3, 13, 10))).double().eval()


@st.composite
def grouped_nets(draw):
    """Convolutions in groups one after the other, with depthwise ones in between."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    layers, width = [], 3
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, 4) if width % g == 0]))
        out = groups * draw(st.integers(1, 12 // groups))
        size, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
        bias = draw(st.booleans())
        layers += [
            nn.Conv2d(width, out, size, stride, size // 2, groups=groups, bias=bias),
            nn.BatchNorm2d(out),
            draw(st.sampled_from([nn.ReLU(), nn.PReLU(out), nn.Hardswish()])),
        ]
        if out > 1 and draw(st.integers(0, 3)) == 0:
            layers += [nn.Conv2d(out, out, 3, padding=1, groups=out), nn.BatchNorm2d(out)]
        width = out
    return plain_net([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)])


def switch_off(net, masks):
    """What removal by masks must equal: channels that are zero."""
    with torch.no_grad():
        for joint in joints_of(net):
            for bn in joint.bns.values():
                off = ~masks.keep.get(joint.name, torch.ones_like(bn.weight, dtype=torch.bool))
                bn.weight[off] = 0
                bn.bias[off] = 0


@settings(max_examples=40)
@given(grouped_nets(), st.sampled_from([0.2, 0.6, 0.9]), st.integers(0, 9999))
def test_dead_channels_leave_whatever_the_groups(net, share, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d | nn.Conv2d):
                off = torch.rand(len(layer.weight), generator=generator) < share
                layer.weight[off] = 0
                if layer.bias is not None:
                    layer.bias[off] = 0
    before = copy.deepcopy(net.state_dict())
    pruned = prune(net)
    assert_same(pruned(X), net(X))
    assert count_params(pruned) <= count_params(net)
    assert_same(prune(pruned)(X), net(X))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@settings(max_examples=30)
@given(grouped_nets(), st.floats(0, 1.6), st.sampled_from([1, 2, 4]))
def test_masks_of_equal_groups_are_removed_whole(net, threshold, round_to):
    scales = plain_scales(net)
    masks = select_plain(net, threshold, scales, round_to)
    switch_off(net, masks)
    small = remove_channels(net, masks)
    assert_same(small(X), net(X))
    for joint in joints_of(net):
        mask = masks.keep[joint.name]
        if mask.view(joint.sections, -1).any(1).all():  # no group is gone
            assert len(small.get_submodule(joint.name).weight) <= int(mask.sum())


def test_the_same_as_torch_pruning_where_groups_lose_the_same_channels():
    """Its convolutions lose the same places of every group."""
    net = plain_net(
        [
            *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 18, 3, 2, 1, groups=3), nn.BatchNorm2d(18), nn.ReLU()),
            *(nn.Conv2d(18, 7, 1), nn.BatchNorm2d(7), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)),
        ]
    )
    dead = {"l0": [1, 2, 5, 6, 9, 10], "l3": [0, 4, 6, 10, 12, 16]}
    reference = copy.deepcopy(net)
    masks = {}
    for name, channels in dead.items():
        conv = reference.get_submodule(name)
        masks[name] = torch.ones(conv.out_channels, dtype=torch.bool)
        masks[name][channels] = False
        graph = tp.DependencyGraph().build_dependency(reference, X)
        graph.get_pruning_group(conv, tp.prune_conv_out_channels, channels).prune()
    switch_off(net, Masks(masks))
    pruned = prune(net)
    assert [p.shape for p in pruned.parameters()] == [p.shape for p in reference.parameters()]
    assert_same(pruned(X), reference(X))
    assert_same(pruned(X), net(X))


@st.composite
def bottlenecks(draw):
    """Residual networks with a convolution in groups, of equal inputs and outputs or not."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    width = draw(st.integers(2, 6))
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(draw(st.integers(1, 2))):
        groups, stride = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
        before, behind = (groups * draw(st.integers(1, 4)) for _ in range(2))
        out = draw(st.sampled_from([width, 2 * width]))
        body = [
            *(nn.Conv2d(width, before, 1), nn.BatchNorm2d(before), nn.ReLU()),
            nn.Conv2d(before, behind, 3, stride, 1, groups=groups, bias=False),
            *(nn.BatchNorm2d(behind), nn.ReLU()),
            *(nn.Conv2d(behind, out, 1), nn.BatchNorm2d(out)),
        ]
        side = None
        if stride > 1 or out != width:
            side = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))
        layers.append(Residual(nn.Sequential(*body), side, False))
        width = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    return scramble(nn.Sequential(*layers)).double().eval()


@settings(max_examples=20)
@given(bottlenecks(), st.sampled_from([0.3, 0.7, 1.1]), st.sampled_from([1, 4]))
def test_masks_of_residual_networks_narrow_grouped_bodies(model, threshold, round_to):
    slim = scramble(add_shortcut_bn(model)).double().eval()
    masks = select(slim, threshold, round_to=round_to)
    apply_masks(slim, masks)
    expected = slim(X)
    narrow(slim, masks)
    assert_same(slim(X), expected)
    for block in parse(slim).blocks:
        units = split_units(block.body)
        kept = [masks.keep[unit.bn.name] for unit in units[:2]]
        assert [unit.kernel.out_channels for unit in units[:2]] == [
            max(int(mask.sum()), 1) for mask in kept
        ]
    assert_same(prune(convert(slim, X, keep_bn=False))(X), expected)


def rmnext():
    return scramble(RMNeXt([8, 16], [2, 1], 3, 4, 5, cifar=True)).double().eval()


def masked_rmnext():
    slim = scramble(add_shortcut_bn(rmnext())).double().eval()
    masks = select(slim, 0.75)
    apply_masks(slim, masks)
    return slim, masks


def test_copies_that_are_left_go_into_fewer_groups():
    slim, masks = masked_rmnext()
    plain = convert(slim, X, keep_bn=False)
    pruned = prune(plain)
    assert_same(pruned(X), slim(X))
    grouped = [name for name in plain.widths if plain.get_submodule(name).groups > 1]
    assert grouped
    for name in grouped:
        whole, left = plain.get_submodule(name), pruned.get_submodule(name)
        assert left.groups > 1
        assert left.weight.numel() < 0.5 * whole.weight.numel()
        assert pruned.widths[name].total == left.out_channels
        assert pruned.widths[name].own == int(
            masks.keep[name.replace("_", ".").replace("conv", "bn")].sum()
        )


def test_training_takes_the_same_steps():
    slim, masks = masked_rmnext()
    small = copy.deepcopy(slim)
    narrow(small, masks)
    assert count_macs(small, X) < 0.7 * count_macs(slim, X)
    for model in (slim, small):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for seed in range(2):
            x = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(seed)).double()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.eval()
    assert_same(small(X), slim(X), 1e-9)


def test_groups_survive_lowering():
    """What is put back beside additions is in groups again, and computes no copy."""
    slim, masks = masked_rmnext()
    expected = slim(X)
    narrow(slim, masks)
    net = collapse(prune(convert(slim, X, keep_bn=False)))
    lowered = lower(net, X, lambda _name, forms, _made: forms[0])
    assert_same(lowered(X), expected, 1e-9)
    assert not lowered.is_plain
    assert count_macs(lowered, X) <= count_macs(slim, X)


def test_the_search_by_the_loss_takes_equal_numbers_from_each_group():
    body = [
        *(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 10, 3, padding=1, groups=2), nn.BatchNorm2d(10), nn.ReLU()),
        *(nn.Conv2d(10, 4, 1), nn.BatchNorm2d(4)),
    ]
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        Residual(nn.Sequential(*body), None, False),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )
    slim = scramble(add_shortcut_bn(scramble(model))).double().eval()
    costs = counted("macs")
    savings = channel_savings(slim, X, costs, "auto")
    scores = by_loss(slim, savings, body_savings(slim, X, costs, "auto"), [X], lowering="auto")
    (block,) = parse(slim).blocks
    for unit in split_units(block.body)[:2]:
        goes = scores[unit.bn.name].view(2, -1).sort(1).values
        assert len(goes.unique()) > 2  # in several steps, each of as many from both groups
        assert torch.equal(goes[0].floor(), goes[1].floor())


def test_plain_nets_in_groups_become_small():
    """RepVGG's grouped form: half of each side of a grouped convolution, a quarter of it."""
    model = scramble(RepVGG([Stage(8, 1, 1), Stage(12, 3, 2)], 5, groups=2)).double().eval()
    net = calibrate_bn(convert(model, X, keep_bn=False), [X])
    grouped = [name for name, layer in net.named_children() if getattr(layer, "groups", 1) > 1]
    assert len(grouped) == 1
    scales = plain_scales(net)
    ranks = {
        name: scale.view(2, -1).argsort(1).argsort(1).flatten() / (len(scale) / 2)
        for name, scale in scales.items()
    }
    small = remove_channels(net, select_plain(net, 0.5, ranks))
    before, behind = net.get_submodule(grouped[0]), small.get_submodule(grouped[0])
    assert behind.groups == before.groups == 2
    assert behind.weight.numel() * 4 == before.weight.numel()
    assert small(X).shape == (2, 5)
