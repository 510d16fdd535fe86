"""RGSNet: its shortcuts as published, and as a list of layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import scramble
from torch import nn

from rmprune.convert import convert
from rmprune.layers import PartialGroupNorm
from rmprune.models import create_model
from rmprune.models.rgsnet import DEPTHS, VARIANTS, RGSBottleneck, rgsnet
from rmprune.training import TrainingConfig, fit

TINY = 1 / 16  # 4 to 32 channels inside, 2 groups


def scrambled(net):
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return scramble(net).double().eval()


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 2), min_size=1, max_size=2),
    st.sampled_from(VARIANTS),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["relu", "prelu"]),
)
@settings(max_examples=15)
def test_networks_convert(seed, depths, variant, imagenet, keep_bn, downsample):
    torch.manual_seed(seed)
    net = scrambled(rgsnet(depths, variant, 4, width=TINY, imagenet=imagenet))
    x = torch.randn(2, 3, 14, 11, dtype=torch.float64)
    plain = convert(net, x, keep_bn=keep_bn, downsample=downsample)
    assert not any(list(layer.children()) for layer in plain)
    for images in (x, 3 * torch.randn_like(x)):
        expected = net(images)
        tolerance = 1e-10 * expected.abs().max().item()
        torch.testing.assert_close(plain(images), expected, rtol=0, atol=tolerance)


def test_the_norm_stands_right_before_the_merge():
    """No activation would pass what it makes, and its affine map has joined the merge."""
    net = scrambled(rgsnet((2, 2), "base", 4, width=TINY))
    layers = list(convert(net, torch.randn(1, 3, 8, 8), keep_bn=False))
    places = [i for i, layer in enumerate(layers) if isinstance(layer, PartialGroupNorm)]
    assert [layers[i].num_groups for i in places] == [2, 2]
    for place in places:
        before, norm, merge = layers[place - 1 : place + 2]
        assert isinstance(before, nn.ReLU)
        assert len(norm.channels) == merge.out_channels
        assert merge.kernel_size == (1, 1)
        assert not list(norm.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_those_of_the_paper(variant):
    block = scrambled(RGSBottleneck(16, 4, 1, 2, variant))
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    r = F.relu(x)
    h = F.relu(block.reduce[0](r))
    y = block.middle(h)
    if variant != "base":
        y = y + F.group_norm(h, 2, block.inner.weight, block.inner.bias)
    shortcut = F.group_norm(r, 2, block.shortcut.weight, block.shortcut.bias)
    expected = block.expand[1](F.relu(y)) + shortcut + (x if variant == "res" else 0)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", DEPTHS)
def test_depths_and_groups(layers):
    with torch.device("meta"):
        net = create_model(f"rgsnet{layers}_dual")
    weighted = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    projections = 4
    assert len(weighted) - projections == layers
    assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {32}


def test_a_quarter_of_the_width_has_a_quarter_of_the_groups():
    net = create_model("rgsnet26_base_quarter")
    assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {8}
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_learns_digits(tiny):
    net = rgsnet((1, 1), "res", 10, width=TINY)
    results = fit(net, tiny, TrainingConfig(4, lr=0.1, batch_size=8, precision="float32"))
    assert results[-1].loss < 0.9 * results[0].loss
