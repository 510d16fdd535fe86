"""Channels brought to one range: nothing changes but what int8 can express."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import networks_of_all_pieces, residual_networks, scramble
from torch import nn

from rmprune.convert import convert
from rmprune.equalization import absorb_offsets, equalize
from rmprune.errors import ConversionError
from rmprune.export import deployable
from rmprune.layers import PartialActivation
from rmprune.lowering import lower
from rmprune.models import create_model
from rmprune.onnx_graph import to_onnx
from rmprune.quantization import quantize
from rmprune.rewrite import collapse
from rmprune.slimming import add_shortcut_bn

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def int8_error(net, expected):
    """Mean absolute difference of the int8 outputs, relative to the mean output."""
    runtime = pytest.importorskip("onnxruntime")
    graph = to_onnx(deployable(net), X[:1])
    # Or sums overflow on CPUs without VNNI.
    graph = quantize(graph, [image[None] for image in X], reduce_range=True)
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = torch.cat(
        [torch.from_numpy(session.run(None, {"image": image[None].numpy()})[0]) for image in X]
    )
    return ((found - expected).abs().mean() / expected.abs().mean()).item()


@settings(max_examples=40)
@given(residual_networks(), st.sampled_from(["plain", "selection", "convolution"]))
def test_equalized_nets_are_equal(model, form):
    x = torch.randn(3, 3, 13, 10).double()
    slim = scramble(add_shortcut_bn(model)).double().eval()
    plain = collapse(convert(slim, x, keep_bn=False))
    net = lower(plain, x, lambda _, forms, __: form if form in forms else "convolution")
    found = equalize(net, [x])
    torch.testing.assert_close(found(x), net(x), rtol=1e-9, atol=1e-9)
    y = x.flip(0) * 2
    torch.testing.assert_close(found(y), net(y), rtol=1e-9, atol=1e-9)


def test_equalized_channels_reach_one():
    model = scramble(create_model("resnet20")).eval()
    net = equalize(collapse(convert(model, X, keep_bn=False)), [X])
    x, layers = X, list(net.named_children())
    for (_, layer), (name, follower) in itertools.pairwise(layers):
        x = layer(x)
        if isinstance(follower, torch.nn.Conv2d):
            reach = x.abs().amax((0, 2, 3))
            assert reach.max() <= 1.001, name
            # A copy has the factor of what it is a copy of; the rest are at 1, if ever on.
            assert reach[reach > 0].median() > 0.2, name


@pytest.mark.parametrize("carry", ["auto", "partial"])
def test_other_activations_are_left_alone(carry):
    model = scramble(create_model("mobilenetv2_rm")).double().eval()
    net = convert(model, X.double(), keep_bn=False, carry=carry)
    torch.testing.assert_close(
        equalize(net, [X.double()])(X.double()), net(X.double()), rtol=1e-9, atol=1e-9
    )


def test_unequal_channels_lose_int8_and_equalising_saves_it():
    """Channels whose ranges differ by a thousand share one scale."""
    model = scramble(create_model("resnet20")).eval()
    net = collapse(convert(model, X, keep_bn=False))
    with torch.no_grad():
        layers = dict(net.named_children())
        for name in ("layer1_0_conv1", "layer2_1_conv1"):
            conv = layers[name]
            factor = torch.logspace(-1.5, 1.5, conv.out_channels)
            conv.weight.mul_(factor[:, None, None, None])
            conv.bias.mul_(factor)
            reader = layers[name.replace("conv1", "conv2")]
            reader.weight.div_(factor[None, :, None, None])
    with torch.no_grad():
        expected = net(X)

    assert int8_error(equalize(net, [X]), expected) < 0.5 * int8_error(net, expected)


def test_channels_that_are_hardly_ever_on_do_not_spoil_a_scale():
    """What reads them has large weights, which would set the step of all others in the row."""
    model = scramble(create_model("resnet20")).eval()
    net = collapse(convert(model, X, keep_bn=False))
    with torch.no_grad():
        layers = dict(net.named_children())
        for name in ("layer1_0_conv1", "layer2_1_conv1"):
            conv = layers[name]
            conv.weight[::3] *= 1e-5
            conv.bias[::3] *= 1e-5
            layers[name.replace("conv1", "conv2")].weight[:, ::3] *= 1e5
        expected = net(X)
    assert int8_error(equalize(net, [X]), expected) < 0.2 < int8_error(net, expected)


@settings(max_examples=60)
@given(networks_of_all_pieces(), st.sampled_from(["auto", "shift"]))
def test_absorbing_offsets_changes_nothing_on_these_images(model, carry):
    x = torch.randn(3, 3, 16, 12, generator=torch.Generator().manual_seed(2)).double()
    try:
        net = convert(model, x, keep_bn=False, carry=carry, bound="calibrated")
    except ConversionError:
        return
    net = collapse(net)
    expected = net(x)
    found = absorb_offsets(net, [x[:2], x[2:]])
    torch.testing.assert_close(found(x), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


class Block(nn.Module):
    """x + F(x), of 8 channels."""

    def __init__(self, activation):
        super().__init__()
        convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
        self.body = nn.Sequential(convs[0], activation, convs[1])

    def forward(self, x):
        return x + self.body(x)


def network(*activations):
    torch.manual_seed(0)
    blocks = map(Block, activations)
    layers = [nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(2048, 9)]
    return nn.Sequential(*layers).eval()


def test_carriers_fill_the_range_of_relu6():
    """Bounds that hold for every image are many times what tensors reach."""
    model = network(nn.ReLU6(), nn.ReLU6(), nn.ReLU6())
    net = convert(model, 10 * X, keep_bn=False, carry="shift", bound="calibrated")
    with torch.no_grad():
        expected = net(X)
        found = absorb_offsets(net, [X])
        torch.testing.assert_close(found(X), expected, rtol=1e-3, atol=1e-3)
        x = X
        for layer, follower in itertools.pairwise(found):
            x = layer(x)
            if isinstance(follower, nn.ReLU6):  # its own channels come first
                assert x[:, 8:].amax((0, 2, 3)).tolist() == pytest.approx([5.5] * 8, rel=1e-3)
                assert x[:, 8:].amin((0, 2, 3)).tolist() == pytest.approx([0.5] * 8, rel=1e-2)
    assert int8_error(found, expected) < 0.3 * int8_error(net, expected)


def test_far_offsets_leave_the_activation_out():
    """SiLU is the identity from 38 on: beside that offset int8 sees nothing else."""
    net = convert(network(nn.SiLU()), X, keep_bn=False, carry="shift", bound="calibrated")
    with torch.no_grad():
        expected = net(X)
    found = absorb_offsets(net, [X])
    assert any(isinstance(layer, PartialActivation) for layer in found)
    torch.testing.assert_close(found(X), expected, rtol=1e-4, atol=1e-4)
    assert int8_error(found, expected) < 0.3 * int8_error(net, expected)
