"""Channels of plain nets: scales, savings, masks, and removal by masks."""

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Gated, Residual, scramble
from torch import nn

from rmprune.blocks import has_slim_form
from rmprune.convert import convert
from rmprune.costs import counted
from rmprune.errors import PruningError, UsageError
from rmprune.measure import count_macs, count_params
from rmprune.models import create_model
from rmprune.models.repvgg import RepVGG, Stage
from rmprune.plain import PlainNet
from rmprune.plain_selection import plain_savings, plain_scales, remove_channels, select_plain
from rmprune.rewrite import calibrate_bn
from rmprune.selection import Masks

pytestmark = pytest.mark.filterwarnings("ignore:all channels of layer")
X = torch.randn(4, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()


def repvgg(ratio=0.0):
    return scramble(RepVGG([Stage(8, 3, 1), Stage(12, 2, 2)], 5, ratio)).double().eval()


def calibrated(model):
    return calibrate_bn(convert(model, X, keep_bn=False), [X])


def chain(*layers):
    named = OrderedDict((f"l{i}", layer) for i, layer in enumerate(layers))
    return PlainNet(named, (3, 13, 10)).double().eval()


def test_which_networks_have_a_slim_form():
    assert has_slim_form(create_model("resnet20"))
    assert has_slim_form(create_model("mobilenetv2_rm"))
    assert has_slim_form(create_model("rmnext26x2_64_cifar"))
    assert not has_slim_form(create_model("repvgg20"))
    assert not has_slim_form(create_model("repvgg20_rm0.5"))


def test_scales_are_what_three_bns_come_to_together():
    model = repvgg()
    net = calibrated(model)
    seen = {}
    for number, block in enumerate(model.blocks):
        block.relu.register_forward_pre_hook(
            lambda _module, inputs, number=number: seen.update({number: inputs[0]})
        )
    with torch.no_grad():
        model(X)
    scales = plain_scales(net)
    assert len(scales) == len(model.blocks)
    for scale, y in zip(scales.values(), seen.values(), strict=True):
        expected = y.transpose(0, 1).flatten(1).std(1, correction=0)
        torch.testing.assert_close(scale, expected, rtol=1e-6, atol=1e-2)


def test_a_channel_that_all_its_bns_switched_off_has_no_scale():
    model = repvgg(0.5)
    block = model.blocks[2]  # reserves nothing
    for bn in (block.bn3, block.bn1, block.bn0):
        with torch.no_grad():
            bn.weight[3] = 0
    scale = plain_scales(calibrated(model))["blocks_2_conv3"]
    assert (scale < 0.01).nonzero().flatten().tolist() == [3]


@settings(max_examples=12)
@given(st.integers(0, 9999), st.sampled_from([0, 0.25, 0.5]), st.floats(0, 2), st.integers(1, 4))
def test_masks_keep_what_reaches_the_threshold(seed, ratio, threshold, round_to):
    torch.manual_seed(seed)
    net = calibrated(repvgg(ratio))
    scales = plain_scales(net)
    masks = select_plain(net, threshold, scales, round_to)
    for name, scale in scales.items():
        mask, above = masks.keep[name], scale >= threshold
        assert mask[above].all()
        assert mask[scale.argmax()]
        wanted = -(-max(int(above.sum()), 1) // round_to) * round_to
        assert int(mask.sum()) in (wanted, max(int(above.sum()), 1))
        assert scale[mask].min() >= scale[~mask].max() if (~mask).any() else True
    left = remove_channels(net, masks)
    sizes = {name: len(left.get_submodule(name).weight) for name in scales}
    assert all(sizes[name] <= int(mask.sum()) for name, mask in masks.keep.items())


def test_what_is_removed_leaves_its_mean():
    """Exact for 1×1 convolutions: a channel is its mean's activation from then on."""
    net = chain(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    net = calibrate_bn(scramble(net), [X])
    before = copy.deepcopy(net.state_dict())
    masks = Masks({"l0": torch.arange(6) % 2 == 0, "l3": torch.ones(4, dtype=torch.bool)})
    small = remove_channels(net, masks)

    constant = copy.deepcopy(net)
    with torch.no_grad():
        constant.get_submodule("l0_bn").weight[1::2] = 0
        torch.testing.assert_close(small(X), constant(X), rtol=0, atol=1e-10)
    assert small.get_submodule("l0").out_channels == small.get_submodule("l3").in_channels == 3
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_depthwise_convolutions_and_gates_go_along():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
        Gated(6, nn.Sigmoid(), False),
        nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), None, False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    net = calibrated(scramble(model).double().eval())
    scales = plain_scales(net)
    first = next(iter(scales))
    masks = select_plain(net, float(scales[first].median()) + 1e-9, scales)
    kept = int(masks.keep[first].sum())
    assert kept < 6
    small = remove_channels(net, masks)
    convs = [layer for layer in small if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs[:2]] == [kept, kept]
    assert small(X).shape == (4, 5)


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_savings_are_what_the_removal_of_a_channel_saves(cost):
    net = convert(repvgg(), X, keep_bn=False)
    savings = plain_savings(net, X, counted(cost))
    net = calibrate_bn(net, [X])

    def size(network):
        return count_macs(network, X[:1]) if cost == "macs" else weights(network)

    def weights(network):
        layers = (m for m in network if isinstance(m, nn.Conv2d | nn.Linear))
        return sum(layer.weight.numel() for layer in layers)

    scales = plain_scales(net)
    for name in scales:
        keep = {other: torch.ones(len(scale), dtype=torch.bool) for other, scale in scales.items()}
        keep[name][0] = False
        assert size(net) - size(remove_channels(net, Masks(keep))) == savings[name]


def test_removal_shrinks_the_net():
    net = calibrated(repvgg())
    masks = select_plain(net, 1.0, plain_scales(net))
    assert masks.removed > 0
    assert count_params(remove_channels(net, masks)) < count_params(net)


def test_errors():
    plain = convert(repvgg(), X, keep_bn=False)
    with pytest.raises(PruningError, match="layer 'blocks_0_conv3' has no BN"):
        plain_scales(plain)
    net = calibrate_bn(plain, [X])
    scales = plain_scales(net)
    with pytest.raises(UsageError, match="must be finite and not negative, but it is -1"):
        select_plain(net, -1.0, scales)
    with pytest.raises(UsageError, match="multiples of 1 or more, not of 0"):
        select_plain(net, 0.1, scales, 0)
