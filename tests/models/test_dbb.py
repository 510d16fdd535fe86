"""DBB: published sizes, statistics while training, and conversion by what the compiler knows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import scramble
from torch import nn

from rmprune.convert import convert
from rmprune.models import create_model
from rmprune.models.dbb import DBB, BNAndPad, IdentityConv, dbb_unit
from rmprune.models.unit_resnet import basic_block, unit_resnet
from rmprune.training import TrainingConfig, fit


def assert_close(found, expected):
    tolerance = 1e-10 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("layers", "millions"), [(18, 26.29), (34, 49.90), (50, 40.68)])
def test_parameters_of_networks_are_the_published_ones(layers, millions):
    with torch.device("meta"):
        model = create_model(f"dbb_resnet{layers}_imagenet", num_classes=1000)
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.005)


def test_the_border_is_what_the_bn_makes_of_zero():
    layer = scramble(BNAndPad(4, 2)).double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    zero = layer.bn.eval()(torch.zeros(1, 4, 1, 1, dtype=torch.float64))
    layer.eval()
    expected = zero.expand(3, 4, 9, 10).clone()
    expected[:, :, 2:-2, 2:-2] = layer.bn(x)
    assert_close(layer(x), expected)


def test_the_border_is_no_part_of_the_statistics():
    layer, alone = BNAndPad(4, 1), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 6) + 2
    expected = alone(x)
    found = layer(x)
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], expected)
    torch.testing.assert_close(layer.bn.running_mean, alone.running_mean)
    slope = layer.bn.weight / (alone.running_var + alone.eps).sqrt()
    border = layer.bn.bias - slope * alone.running_mean
    torch.testing.assert_close(found[1, :, 0, 3], border)
    torch.testing.assert_close(found[1, :, 2, -1], border)


def test_branches_as_published():
    """Every branch at a pixel inside of the image, written out."""
    block = scramble(DBB(4, 6, groups=2)).double().eval()
    nn.init.normal_(block.sequence[0].delta)
    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    first = block.sequence[0].delta + torch.eye(2).repeat(2, 1)[:, :, None, None]
    inner = block.sequence[1].bn(F.conv2d(x, first, groups=2))
    average = block.average[1].bn(F.conv2d(x, block.average[0].weight, groups=2))
    expected = (
        block.origin(x)[:, :, 1:-1, 1:-1]
        + block.pointwise(x)[:, :, 1:-1, 1:-1]
        + block.sequence[2](inner)
        + block.average[3](F.avg_pool2d(average, 3, 1))
    )
    assert_close(block(x)[:, :, 1:-1, 1:-1], expected)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([3, 5]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_a_block_becomes_one_convolution(seed, n_in, n_out, groups, size, stride, keep_bn):
    """Its borders, too: the BN between a 1×1 and a k×k convolution is read beyond the image."""
    torch.manual_seed(seed)
    block = DBB(n_in * groups, n_out * groups, size, stride, groups)
    nn.init.normal_(block.sequence[0].delta)
    net = scramble(nn.Sequential(block)).double().eval()
    x = torch.randn(2, n_in * groups, 9, 7, dtype=torch.float64)
    plain = convert(net, x, keep_bn=keep_bn)
    kinds = [nn.Conv2d, nn.BatchNorm2d] if keep_bn else [nn.Conv2d]
    assert [type(layer) for layer in plain] == kinds
    assert plain[0].kernel_size == (size, size)
    assert plain[0].groups == groups
    assert_close(plain(x), net(x))


@settings(max_examples=8)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from([torch.float32, torch.float64])
)
def test_networks_convert(seed, width, dtype):
    torch.manual_seed(seed)
    net = unit_resnet(
        [dbb_unit(3, width, 3), nn.ReLU()], lambda *s: basic_block(*s, dbb_unit), (1, 2), width, 4
    )
    net = scramble(net).to(dtype).eval()
    x = torch.randn(2, 3, 13, 10, dtype=dtype)
    plain = convert(net, x, keep_bn=False)
    assert sum(isinstance(layer, nn.Conv2d) for layer in plain) == 7
    assert plain.info["float64_difference"] < 1e-12
    if dtype == torch.float64:
        assert_close(plain(x), net(x))


def test_a_plain_net_of_dbb_is_that_of_the_same_resnet():
    x = torch.randn(1, 3, 16, 12)
    nets = [convert(scramble(create_model(n)).eval(), x) for n in ("dbb_resnet20", "resnet20")]
    shapes = [[tuple(p.shape) for p in net.parameters()] for net in nets]
    assert shapes[0] == shapes[1]


def test_an_identity_begins_as_one():
    x = torch.randn(2, 6, 3, 4)
    assert torch.equal(IdentityConv(6, groups=2)(x), x)


def test_learns_digits(tiny):
    net = unit_resnet(
        [dbb_unit(3, 8, 3), nn.ReLU()], lambda *s: basic_block(*s, dbb_unit), (1, 1), 8, 10
    )
    results = fit(net, tiny, TrainingConfig(4, lr=0.1, batch_size=8, precision="float32"))
    assert results[-1].loss < 0.9 * results[0].loss
