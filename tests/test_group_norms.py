"""Group norms in residual networks: rewritten exactly, kept whole, saved, counted, exported."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Gated, Sum, scramble
from torch import nn

import rmprune
from rmprune.convert import convert
from rmprune.equalization import equalize
from rmprune.errors import ExportError
from rmprune.export import difference_of, export
from rmprune.layers import PartialGroupNorm
from rmprune.lowering import lower
from rmprune.measure import count_macs
from rmprune.memory import activation_memory
from rmprune.models.rgsnet import rgsnet
from rmprune.plain import PlainNet
from rmprune.plain_selection import plain_scales, remove_channels, select_plain
from rmprune.removal import prune
from rmprune.rewrite import calibrate_bn
from rmprune.store import built, layers_of

X = torch.randn(2, 3, 14, 11, generator=torch.Generator().manual_seed(0)).double()


def scrambled(net):
    for module in net.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return scramble(net).double().eval()


def assert_same(found, expected):
    tolerance = 1e-10 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# The layer.


@pytest.mark.parametrize("channels", [(0, 1, 2, 3), (2, 3, 4, 5), (5, 0, 3, 1), (0, 1, 2, 3, 4, 5)])
def test_some_channels_are_normalised_and_the_others_pass(channels):
    layer = PartialGroupNorm(6, 2, channels, eps=1e-3)
    x = torch.randn(3, 6, 4, 5)
    expected = x.clone()
    expected[:, channels] = F.group_norm(x[:, channels], 2, eps=1e-3)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    assert not torch.equal(layer(x), x)


def test_groups_are_kept_as_a_whole():
    layer = PartialGroupNorm(7, 2, (5, 0, 3, 1))
    x = torch.randn(3, 7, 4, 5)
    kept = torch.tensor([1, 3, 4, 6])
    smaller = copy.deepcopy(layer)
    smaller.keep(kept)
    assert (smaller.num_channels, smaller.num_groups, smaller.channels) == (4, 1, (1, 0))
    torch.testing.assert_close(smaller(x[:, kept]), layer(x)[:, kept])
    none = copy.deepcopy(layer)
    none.keep(torch.tensor([2, 4]))
    assert torch.equal(none(x[:, [2, 4]]), x[:, [2, 4]])
    with pytest.raises(ValueError, match="as a whole"):
        layer.keep(torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("groups", "channels"), [(2, (0, 1, 2)), (1, (0, 0)), (1, (0, 4)), (0, (1,)), (1, ())]
)
def test_what_makes_no_groups(groups, channels):
    with pytest.raises(ValueError, match=r"groups|different"):
        PartialGroupNorm(4, groups, channels)


# Conversion.


@st.composite
def networks(draw):
    """Blocks with group norms on shortcuts of all kinds, and inside."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.integers(1, 3))
    width = groups * draw(st.integers(1, 3))
    activation = draw(st.sampled_from([nn.ReLU, nn.ReLU6, nn.SiLU]))
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)]
    layers += [activation()] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 2))):
        out = groups * draw(st.integers(1, 3))
        stride = draw(st.sampled_from([1, 2]))
        norm = nn.GroupNorm(groups, out, affine=draw(st.booleans()))
        project = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        shortcuts = [
            [project, norm],
            [project, nn.ReLU(), norm],
            [nn.GroupNorm(groups, width), project],
        ]
        if out == width and stride == 1:
            shortcuts += [[norm], [nn.ReLU(), norm]] * 2
        inner = groups * draw(st.integers(1, 2))
        body = [nn.Conv2d(width, inner, 3, stride, 1), nn.BatchNorm2d(inner)]
        if draw(st.integers(0, 2)) == 0:
            body[1] = nn.GroupNorm(groups, inner)
        body += [activation(), nn.Conv2d(inner, out, draw(st.sampled_from([1, 3])), padding="same")]
        way = draw(st.integers(0, 1))
        block = Sum(nn.Sequential(*body), nn.Sequential(*draw(st.sampled_from(shortcuts))), way)
        layers += [block] + [activation()] * draw(st.integers(0, 1))
        width = out
    return scrambled(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    )


@given(networks(), st.sampled_from(["auto", "partial"]), st.booleans())
@settings(max_examples=40)
def test_group_norms_convert(net, carry, keep_bn):
    plain = convert(net, X, carry=carry, keep_bn=keep_bn)
    assert not any(list(layer.children()) for layer in plain)
    assert any(isinstance(layer, PartialGroupNorm) for layer in plain)
    assert_same(plain(X), net(X))
    assert_same(plain(0.1 * X.flip(0)), net(0.1 * X.flip(0)))


class Twice(nn.Module):
    """What a gate or a norm reads is read besides."""

    def __init__(self, layer):
        super().__init__()
        self.stem, self.layer, self.conv = nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.conv(F.relu(self.layer(x) + x) + x)


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), Gated(4, nn.Sigmoid(), False)])
def test_what_a_layer_changes_may_be_read_besides(layer):
    net = scrambled(Twice(layer))
    assert_same(convert(net, X)(X), net(X))


# What comes after conversion.


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    net = scrambled(rgsnet((2, 1), "res", 4, width=1 / 16))
    return convert(net, X, keep_bn=False)


def test_a_net_with_a_group_norm_is_saved(tmp_path, plain):
    rmprune.save(plain, tmp_path / "net.safetensors")
    assert torch.equal(rmprune.load(tmp_path / "net.safetensors")(X), plain(X))


def test_a_net_with_a_group_norm_is_built_again_from_its_layers(plain):
    again = built(layers_of(plain), plain.state_dict())
    for name, norm in again.named_modules():
        if isinstance(norm, PartialGroupNorm):
            assert torch.equal(norm.indices, plain.get_submodule(name).indices)
            assert torch.equal(norm.source, plain.get_submodule(name).source)
    assert torch.equal(again(X), plain(X))


def normalised(groups):
    """Six channels of which four are normalised in two groups, between two convolutions."""
    torch.manual_seed(0)
    layers = OrderedDict(
        first=nn.Conv2d(4, 6, 3, padding=1, groups=groups),
        norm=PartialGroupNorm(6, 2, (3, 0, 2, 5)),
        last=nn.Conv2d(6, 4, 1),
    )
    net = PlainNet(OrderedDict(stem=nn.Conv2d(3, 4, 1), **layers), (3, 14, 11))
    return calibrate_bn(net.double().eval(), [X])


def test_channels_of_a_group_are_selected_and_removed_together():
    net = normalised(groups=1)
    with torch.no_grad():
        net.stem_bn.weight.fill_(2)
        net.first_bn.weight.copy_(torch.tensor([0.1, 5, 7, 0.3, 5, 6]))
    masks = select_plain(net, 1.0, plain_scales(net))
    assert masks.keep["first"].tolist() == [False, True, True, False, True, True]
    smaller = remove_channels(net, masks)
    assert smaller.first.out_channels == 4
    assert smaller.norm.channels == (1, 3)
    with torch.no_grad():  # then these channels are constant, as those that were removed
        net.first_bn.weight[[0, 3]] = 0
    assert_same(smaller(X), net(X))


def test_rounding_brings_groups_back_as_a_whole():
    net = normalised(groups=1)
    with torch.no_grad():
        net.first_bn.weight.copy_(torch.tensor([0.5, 0.2, 7, 0.7, 0.4, 6]))
    masks = select_plain(net, 1.0, plain_scales(net), round_to=3)
    assert masks.keep["first"].tolist() == [True, False, True, True, False, True]
    assert remove_channels(net, masks).norm.channels == (2, 0, 1, 3)


def test_beside_convolutions_in_groups_channels_of_a_group_norm_stay():
    net = normalised(groups=2)
    masks = select_plain(net, 1e3, plain_scales(net))
    assert masks.keep["first"].all()
    assert "first" not in masks.forced
    assert remove_channels(net, masks).first.out_channels == 6


def test_costs(plain):
    """A group norm has no MACs and works in place."""
    without = [layer for layer in plain if not isinstance(layer, PartialGroupNorm)]
    assert count_macs(plain, X) == count_macs(nn.Sequential(*without), X) > 0
    named = [name for name, m in plain.named_children() if isinstance(m, PartialGroupNorm)]
    assert named
    assert not set(activation_memory(plain, X)["layer"]) & set(named)


def test_other_rewrites_leave_it(plain):
    assert_same(prune(plain)(X), plain(X))
    assert_same(equalize(plain, [X])(X), plain(X))
    lowered = lower(plain, X, lambda _, forms, __: next(iter(forms)))
    assert_same(lowered(X), plain(X))


@pytest.mark.parametrize("channels", [(0, 1, 2, 3), (3, 0, 2, 5)])
def test_channels_of_a_group_go_together(channels):
    """Of unread channels those alone whose whole group is unread; of constant ones none."""
    layers = OrderedDict(
        first=nn.Conv2d(3, 6, 1), norm=PartialGroupNorm(6, 2, channels), last=nn.Conv2d(6, 4, 1)
    )
    net = PlainNet(layers, (3, 14, 11)).double().eval()
    half, whole = channels[0], channels[2:]
    with torch.no_grad():
        net.last.weight[:, [half, *whole]] = 0
        net.first.weight[channels[1]] = 0  # a constant, until its group is normalised
    pruned = prune(net)
    assert pruned.first.out_channels == 4
    assert pruned.norm.num_groups == 1
    assert_same(pruned(X), net(X))


def test_onnx_knows_it_and_c_does_not(tmp_path, plain):
    pytest.importorskip("onnxruntime")
    net, x = copy.deepcopy(plain).float(), X.float()
    done = export(net, "onnx", tmp_path / "net.onnx", x[:1])
    assert difference_of(net(x[:1]), done.run(x[:1])) < 1e-5
    with pytest.raises(ExportError, match="Normalization"):
        export(net, "c", tmp_path / "net.c", x[:1])
