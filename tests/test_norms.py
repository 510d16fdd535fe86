"""Affine algebra against the modules themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import scramble
from torch import nn

from rmprune.graph import PadChannels, Subsample
from rmprune.norms import Moments, fold_shortcut, norm_of, norm_of_bn, normalised


@st.composite
def shortcuts(draw):
    """Random sequences of what a shortcut may consist of, and its input channels."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    channels = width = draw(st.integers(1, 4))
    layers = []
    for _ in range(draw(st.integers(0, 4))):
        match draw(st.sampled_from(["bn", "conv", "subsample", "pad"])):
            case "bn":
                layers.append(nn.BatchNorm2d(width, eps=draw(st.sampled_from([1e-5, 1e-2]))))
            case "conv":
                out, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
                layers.append(nn.Conv2d(width, out, 1, stride, bias=draw(st.booleans())))
                width = out
            case "subsample":
                layers.append(Subsample(2))
            case "pad":
                layers.append(PadChannels(1, 2))
                width += 3
    return scramble(nn.Sequential(*layers)).double().eval(), channels


@settings(max_examples=100)
@given(shortcuts())
def test_folded_shortcut_is_the_shortcut(drawn):
    shortcut, channels = drawn
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64)
    affine = fold_shortcut(list(shortcut), channels, x)
    sampled = x[:, :, :: affine.stride, :: affine.stride]
    found = torch.einsum("oi,nihw->nohw", affine.weight, sampled)
    found += affine.bias[:, None, None]
    torch.testing.assert_close(found, shortcut(x), rtol=0, atol=1e-10)


def test_norm_of_a_convolution_includes_its_bias():
    conv, bn = nn.Conv2d(3, 4, 1), scramble(nn.Sequential(nn.BatchNorm2d(4, eps=1e-2)))[0]
    conv, bn = conv.double(), bn.double().eval()
    norm = norm_of(bn, conv)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    without_bias = nn.functional.conv2d(x, conv.weight)
    expected = bn(conv(x))
    torch.testing.assert_close(norm.as_module()(without_bias), expected)
    slope, offset = norm.slope[:, None, None], norm.offset[:, None, None]
    torch.testing.assert_close(slope * without_bias + offset, expected)


def test_bn_without_statistics():
    with pytest.raises(ValueError, match="no running statistics"):
        norm_of_bn(nn.BatchNorm2d(3, track_running_stats=False))


def test_normalised_splits_exactly():
    torch.manual_seed(0)
    rows = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    rows[2] = 0
    offset, rest = torch.randn(2, 4, dtype=torch.float64)
    scale = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    rest[2] = offset[2]
    weight, norm = normalised(rows, offset, scale, rest)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = nn.functional.conv2d(x, rows, offset, padding=1)
    found = norm.as_module()(nn.functional.conv2d(x, weight, padding=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(norm.gamma, scale)
    assert torch.equal(norm.beta, rest)


def test_moments_over_batches_of_different_sizes():
    batches = [torch.randn(n, 3, 5, 4) * 3 + 7 for n in (4, 1, 2)]
    moments = Moments(3)
    for batch in batches:
        moments.add(batch)
    bn = moments.identity_bn()
    values = torch.cat(batches)
    torch.testing.assert_close(bn.running_mean.float(), values.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var.float(), values.var((0, 2, 3), correction=0))
    torch.testing.assert_close(bn.float()(values), values)


def test_moments_of_nothing_make_an_identity_too():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(Moments(3).identity_bn()(x), x)
