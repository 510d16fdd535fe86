"""Rewrites leave outputs as they are, and do what they are for."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import residual_networks, scramble
from torch import nn

from rmprune.convert import convert
from rmprune.measure import count_macs
from rmprune.models import create_model
from rmprune.plain import PlainNet
from rmprune.removal import prune
from rmprune.rewrite import calibrate_bn, collapse, fold_bn
from rmprune.selection import Masks, apply_masks
from rmprune.slimming import add_shortcut_bn, scale_parameters

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1)
    )


def plain_of(*layers):
    names = OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers))
    return PlainNet(names).double().eval()


def conv1x1(weight, bias=None):
    matrix = torch.as_tensor(weight, dtype=torch.float64)
    conv = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1, bias=bias is not None)
    conv.weight = nn.Parameter(matrix[:, :, None, None])
    if bias is not None:
        conv.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float64))
    return conv


@settings(max_examples=30)
@given(residual_networks())
def test_folding_and_putting_bns_back(model):
    plain = convert(model, X)
    folded = fold_bn(plain)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded)
    assert_same(folded(X), plain(X))

    again = calibrate_bn(folded, [X])

    convs = sum(isinstance(layer, nn.Conv2d) for layer in again)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in again) == convs > 0
    assert_same(again(X), plain(X))
    assert_same(collapse(again)(X), plain(X))


def test_calibrated_bns_have_the_statistics_of_their_inputs():
    folded = convert(scramble(create_model("resnet20")).double().eval(), X, keep_bn=False)
    again = calibrate_bn(folded, [X[:1], X[1:]])
    values = X
    for layer in again[:9]:
        if isinstance(layer, nn.BatchNorm2d):
            torch.testing.assert_close(layer.running_mean, values.mean((0, 2, 3)))
            variance = values.var((0, 2, 3), correction=0)
            torch.testing.assert_close(layer.running_var, variance)
        elif isinstance(layer, nn.Conv2d):
            assert torch.allclose(
                layer.weight.flatten(1).norm(dim=1).square(), torch.tensor(2.0).double()
            )
        values = layer(values)


def test_calibrated_bns_begin_training_where_evaluation_is():
    """The same images, normalised by the batch or by the measured statistics."""
    model = scramble(create_model("resnet20")).double().eval()
    calibrated = convert(model, X, calibration_batches=[X])
    assert_same(calibrated(X), model(X))
    torch.testing.assert_close(calibrated.train()(X), model(X), rtol=1e-3, atol=1e-3)
    plain = convert(model, X)
    assert_same(plain(X), model(X))
    assert not torch.allclose(plain.train()(X), model(X), rtol=0.1, atol=0.1)


@settings(max_examples=100)
@given(residual_networks(two_convs=True), st.integers(0, 9999), st.sampled_from([0.3, 0.7]))
@pytest.mark.filterwarnings("ignore:all channels of layer")
def test_collapse_leaves_outputs_and_never_costs(model, seed, share):
    slim = scramble(add_shortcut_bn(model)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, scale in scale_parameters(slim).items():
        keep[name] = torch.rand(len(scale), generator=generator) < share
        if torch.rand((), generator=generator) < 0.3:
            keep[name][:] = "shortcut" in name  # whole layers off: blocks that collapse
    apply_masks(slim, Masks(keep))
    pruned = prune(convert(slim, X))

    collapsed = collapse(pruned)

    assert_same(collapsed(X), slim(X))
    assert count_macs(collapsed, X) <= count_macs(pruned, X)


def test_an_identity_block_vanishes():
    """A block that lost its body and whose shortcut is the identity is no layer at all."""
    model = scramble(create_model("resnet20")).double().eval()
    slim = add_shortcut_bn(model, [X])
    keep = {n: torch.ones(len(s), dtype=torch.bool) for n, s in scale_parameters(slim).items()}
    for name in ("layer1.1.bn1", "layer1.1.bn2"):
        keep[name][:] = False
    keep["layer1.1.bn2"][:] = True  # the outputs live on by the shortcut
    with torch.no_grad():
        slim.get_submodule("layer1.1.bn2").bias.zero_()
        slim.get_submodule("layer1.1.bn2").weight.zero_()
    apply_masks(slim, keep_masks := Masks(keep))
    assert keep_masks.removed == 16

    pruned = prune(convert(slim, X))
    net = collapse(pruned)

    assert_same(net(X), slim(X))
    convs = [name for name, layer in net.named_children() if isinstance(layer, nn.Conv2d)]
    assert not [name for name in convs if name.startswith("layer1_1")], convs
    assert net.converted_widths.keys() == pruned.converted_widths.keys()


def test_centre_only_kernels_become_pointwise():
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    with torch.no_grad():
        centre = conv.weight[:, :, 1, 1].clone()
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = centre
    net = plain_of(conv)
    x = torch.randn(1, 2, 7, 6, dtype=torch.float64)
    collapsed = collapse(net)
    assert collapsed[0].kernel_size == (1, 1)
    assert_same(collapsed(x), net(x))


def test_padding_stays():
    """What a convolution reads around its input is no pixel of its own."""
    padded = nn.Conv2d(2, 2, 1, padding=1)
    scaled = nn.Conv2d(2, 2, 1, padding=1, groups=2)
    even = nn.Conv2d(2, 2, 2, padding=1)
    with torch.no_grad():
        for parameter in (*padded.parameters(), scaled.weight):
            parameter.abs_()
        scaled.bias.fill_(-0.5)
        even.weight.zero_()
    x = torch.randn(1, 2, 7, 6, dtype=torch.float64)
    for layers in (
        (nn.ReLU(), padded, nn.ReLU(), nn.Conv2d(2, 2, 1)),
        (nn.Conv2d(2, 2, 3), nn.ReLU(), scaled, nn.ReLU()),
        (even,),
    ):
        net = plain_of(*layers)
        assert_same(collapse(net)(x), net(x))


def test_pointwise_layers_are_joined_only_where_nothing_is_cut_off():
    positive, mixed = conv1x1([[1.0, 2.0]], [0.5]), conv1x1([[1.0, -2.0]], [0.5])
    last = conv1x1([[-3.0], [1.0]], [1.0, 2.0])
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    for first, joined in ((positive, True), (mixed, False)):
        net = plain_of(nn.ReLU(), first, nn.ReLU(), last)
        collapsed = collapse(net)
        assert (len(collapsed) == 2) == joined
        assert_same(collapsed(x), net(x))


@pytest.mark.parametrize(
    ("factors", "offsets", "absorbed"),
    [
        ([2.0, 0.5], [0.0, 0.0], True),
        ([2.0, 0.5], [-1.0, 0.0], True),
        ([2.0, 0.5], [1.0, 0.0], False),  # lifts what the ReLU before cut off
        ([-2.0, 0.5], [0.0, 0.0], False),
    ],
)
def test_diagonals_fold_into_the_layer_before_where_that_is_exact(factors, offsets, absorbed):
    torch.manual_seed(0)
    diagonal = conv1x1(torch.diag(torch.tensor(factors)), offsets)
    net = plain_of(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), diagonal, nn.ReLU())
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    collapsed = collapse(net)
    assert (len(collapsed) == 2) == absorbed
    if not absorbed:
        assert collapsed[2].groups == 2
    assert_same(collapsed(x), net(x))
