"""Values against the torch functions that they stand for."""

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from rmprune.linear import POINTWISE, Geometry, Rows, Value, add, concatenate, join
from rmprune.norms import Norm

X = torch.randn(2, 5, 12, 8, generator=torch.Generator().manual_seed(0)).double()
SIZE = (12, 8)


def value_of(x=X):
    return Value.of_state(torch.arange(x.shape[1]), x, 0)


def evaluate(value, x=X):
    """What a value stands for, by dense convolutions."""
    total = value.bias[:, None, None]
    for path in value.paths:
        rows = path.kernel()
        g = rows.geometry
        kernel = rows.matrix(torch.arange(x.shape[1]))
        y = F.conv2d(x, kernel, None, g.stride, g.padding, g.dilation)
        total = total + y + path.offset()[:, None, None]
    if value.norm is not None:
        total = total * value.norm.slope[:, None, None] + value.norm.offset[:, None, None]
    return total


def norm(channels):
    return Norm(*(torch.randn(channels).double() for _ in range(3)), torch.rand(channels) + 0.5)


def apply(norm, x):
    return x * norm.slope[:, None, None] + norm.offset[:, None, None]


geometries = st.builds(
    lambda kernel, stride, dilation: Geometry(
        (kernel, kernel),
        (stride, stride),
        (dilation * (kernel // 2),) * 2,
        (dilation if kernel > 1 else 1,) * 2,
    ),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
)


@given(geometries, st.sampled_from([1, 5]), st.booleans())
def test_convolutions(geometry, groups, with_norm):
    weight, bias = torch.randn(10, 5 // groups, *geometry.kernel).double(), torch.randn(10)
    value, x = value_of(), X
    if with_norm:  # a head with offsets, which cannot be padded
        head = norm(5)
        value, x = value.normed(head), apply(head, X)
    found = value.convolved(Rows.of_conv(weight, groups, geometry), bias, "conv")
    if found is None:
        assert with_norm
        assert geometry.pads
        return
    options = (geometry.stride, geometry.padding, geometry.dilation, groups)
    torch.testing.assert_close(evaluate(found), F.conv2d(x, weight, bias.double(), *options))


@given(geometries, st.sampled_from([1, 5]))
def test_a_convolution_before_or_behind_a_pointwise_one(geometry, groups):
    first = torch.randn(6, 5, 1, 1).double()
    second = torch.randn(10, 6, *geometry.kernel).double()
    g = (geometry.stride, geometry.padding, geometry.dilation)
    value = value_of().convolved(Rows.of_conv(first, 1, POINTWISE), None, "first")
    value = value.convolved(Rows.of_conv(second, 1, geometry), None, "second")
    torch.testing.assert_close(evaluate(value), F.conv2d(F.conv2d(X, first), second, None, *g))

    grouped = torch.randn(10, 5 // groups, *geometry.kernel).double()
    mixing = torch.randn(4, 10, 1, 1).double()
    value = value_of().convolved(Rows.of_conv(grouped, groups, geometry), None, "first")
    value = value.convolved(Rows.of_conv(mixing, 1, POINTWISE), None, "second")
    expected = F.conv2d(F.conv2d(X, grouped, None, *g, groups), mixing)
    torch.testing.assert_close(evaluate(value), expected)


def test_norms_scalings_sums_and_selections():
    value, n = value_of(), norm(5)
    mixed = value.normed(n).scaled(torch.arange(5.0).double())
    expected = apply(n, X) * torch.arange(5)[:, None, None]
    torch.testing.assert_close(evaluate(mixed), expected)
    torch.testing.assert_close(evaluate(mixed.normed(n)), apply(n, expected))
    torch.testing.assert_close(evaluate(add([mixed, value])), expected + X)
    joined = concatenate([value, mixed])
    torch.testing.assert_close(evaluate(joined), torch.cat([X, expected], 1))
    chosen = torch.tensor([7, -1, 2])
    zeros = torch.zeros_like(X[:, :1])
    torch.testing.assert_close(
        evaluate(joined.select(chosen)), torch.cat([expected[:, 2:3], zeros, X[:, 2:3]], 1)
    )


def test_scales_are_those_of_the_last_bn():
    n, other = norm(5), norm(5)
    value = value_of()
    assert torch.equal(value.scale, torch.ones(5).double())
    scaled = value.normed(n)
    assert torch.equal(scaled.scale, n.gamma.abs())
    assert torch.equal(scaled.rest, n.beta)
    both = add([scaled, value.normed(other)])
    assert torch.equal(both.scale, torch.maximum(n.gamma.abs(), other.gamma.abs()))
    assert torch.equal(both.rest, n.beta + other.beta)


def test_selected_names_the_channels_of_the_state():
    assert value_of().selected().tolist() == [0, 1, 2, 3, 4]
    assert value_of().select(torch.tensor([3, 1])).selected().tolist() == [3, 1]
    assert value_of().select(torch.tensor([3, -1])).selected() is None
    assert value_of().normed(norm(5)).selected() is None
    assert add([value_of(), value_of()]).selected() is None


@given(st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_pooling_behind_subsampling(first, kernel, stride):
    value = value_of().pooled(Geometry(stride=(first, first)))
    value = value.pooled(Geometry((kernel, kernel), (stride, stride)))
    expected = F.avg_pool2d(X[:, :, ::first, ::first], kernel, stride)
    torch.testing.assert_close(evaluate(value), expected)


@given(geometries, geometries)
def test_joint_kernels_read_what_either_reads(a, b):
    joint = join([a, b], SIZE)
    if a.stride != b.stride:
        assert joint is None
        return
    assert joint.output_size(SIZE) == a.output_size(SIZE)
    for axis in (0, 1):
        assert {*a.offsets(axis), *b.offsets(axis)} <= {*joint.offsets(axis)}


def test_kernels_of_other_output_sizes_do_not_join():
    assert join([POINTWISE, Geometry((3, 3))], SIZE) is None
    pool = Geometry((2, 2), (2, 2))
    assert join([Geometry(stride=(2, 2)), pool], (8, 8)) == pool
    before = Geometry((3, 3), (2, 2), (1, 1))
    assert join([before, pool], (8, 8)) == before
    assert join([Geometry((2, 2), padding=(1, 1)), pool], (8, 8)) is None
    assert join([Geometry(stride=(2, 2)), pool], (9, 9)) is None


@given(geometries, st.sampled_from([2, 3]))
def test_what_is_left_behind_a_subsampling(geometry, stride):
    whole = geometry.after(Geometry(stride=(stride, stride)))
    assert whole.behind((stride, stride)) == geometry
    assume(geometry.taps > 1 and geometry.dilation[0] % stride)
    assert geometry.behind((stride, stride)) is None
