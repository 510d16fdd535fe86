import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rmprune.carrying import IDENTITY_FROM, Carrier, Interval, carrying_activation
from rmprune.errors import ConversionError
from rmprune.norms import Norm

ALL = (nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Mish())


def interval(lower, upper):
    return Interval(torch.tensor(lower).double(), torch.tensor(upper).double())


@pytest.mark.parametrize("kind", IDENTITY_FROM)
def test_activations_are_the_identity_from_there_on(kind):
    x = torch.linspace(IDENTITY_FROM[kind], 6 if "6" in kind.__name__ else 1000, 10_001).double()
    module = nn.Hardtanh(0, 1000) if kind is nn.Hardtanh else kind()
    torch.testing.assert_close(module(x), x, rtol=4e-16, atol=0)


@given(
    st.sampled_from([*ALL, nn.PReLU(init=-0.5), nn.PReLU(init=3.0), nn.Sigmoid(), nn.ELU()]),
    st.floats(-50, 50),
    st.floats(0, 60),
)
def test_intervals_hold_behind_activations(activation, start, length):
    x = torch.linspace(start, start + length, 501).double()
    found = interval([start], [start + length]).activated(activation.double())
    y = activation(x)
    assert found.lower - 1e-5 <= y.min()
    assert found.upper + 1e-12 >= y.max()


def test_intervals_know_no_bound_where_there_is_none():
    unknown = Interval.unknown(1, torch.zeros(1).double())
    found = unknown.activated(nn.SiLU())
    assert found.upper.item() == torch.inf
    assert -0.28 < found.lower.item() < -0.27
    assert unknown.activated(nn.ReLU6()).upper.item() == 6
    assert unknown.affine(torch.zeros(1).double(), torch.ones(1)).upper.item() == 1


@given(st.sampled_from([1, 2]), st.booleans(), st.integers(0, 99))
def test_intervals_hold_behind_convolutions(groups, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(4, 6, 3, padding=int(padded), groups=groups, bias=False).double()
    lower = torch.randn(4, generator=generator).double()
    upper = lower + torch.rand(4, generator=generator)
    norm = Norm(*(torch.randn(6, generator=generator).double() for _ in range(3)), torch.ones(6))
    x = lower[:, None, None] + (upper - lower)[:, None, None] * torch.rand(8, 4, 6, 6)
    y = norm.as_module().double()(conv(x)).transpose(0, 1).flatten(1)
    found = Interval(lower, upper).convolved(conv).normed(norm)
    assert (found.lower <= y.amin(1) + 1e-6).all()
    assert (found.upper >= y.amax(1) - 1e-6).all()


SEEN = torch.linspace(-2, 2, 12).view(1, 2, 3, 2).double()
NARROW, SIGNED = ([-3.0, -3.0], [3.0, 2.0]), ([-torch.inf] * 2, [torch.inf] * 2)


@pytest.mark.parametrize(
    ("activation", "bounds", "bound", "mode"),
    [
        (nn.ReLU(), ([0.0, 0.0], [torch.inf] * 2), "interval", "as is"),
        (nn.ReLU6(), ([0.0, 0.0], [torch.inf] * 2), "interval", "partial"),
        (nn.ReLU6(), ([0.0, 0.0], [6.0, 6.0]), "interval", "as is"),
        (nn.ReLU6(), NARROW, "interval", "shift"),
        (nn.ReLU(), NARROW, "interval", "shift"),
        (nn.ReLU(), SIGNED, "interval", "prelu"),
        (nn.ReLU(), SIGNED, "calibrated", "shift"),
        (nn.SiLU(), SIGNED, "interval", "partial"),
        (nn.SiLU(), SIGNED, "calibrated", "shift"),
        (nn.PReLU(), NARROW, "interval", "prelu"),
        (nn.Sigmoid(), NARROW, "interval", "partial"),
        (nn.ReLU(), ([-1e9, 0.0], [1e9, 1.0]), "interval", "prelu"),  # float32 would drown
    ],
)
def test_the_first_way_that_applies_is_taken(activation, bounds, bound, mode):
    carrier = Carrier("auto", bound)
    way = carrier.choose("act", activation, interval(*bounds), SEEN)
    assert way.mode == mode
    assert [entry["mode"] for entry in carrier.log] == [mode]
    x = SEEN * way.factor[:, None, None] + way.shift[:, None, None]
    acts = torch.zeros(2, dtype=torch.bool)
    layer = carrying_activation(activation, acts, way.mode, x)
    if mode == "as is":
        x = x.clamp(*bounds[0][:1], bounds[1][0])
    torch.testing.assert_close(layer(x), x, rtol=1e-14, atol=0)


def test_what_does_not_apply_is_refused():
    with pytest.raises(ConversionError, match=r"'act'.*SiLU by prelu"):
        Carrier("prelu", "interval").choose("act", nn.SiLU(), interval(*NARROW), SEEN)
    with pytest.raises(ConversionError, match=r"ReLU by shift.*calibrated"):
        Carrier("shift", "interval").choose("act", nn.ReLU(), interval(*SIGNED), SEEN)


def test_no_shift_where_zeros_are_padded_later():
    way = Carrier("auto", "interval").choose("act", nn.ReLU(), interval(*NARROW), SEEN, False)
    assert way.mode == "prelu"


def test_slopes_of_a_prelu_stay_with_their_channels():
    activation = nn.PReLU(2)
    with torch.no_grad():
        activation.weight.copy_(torch.tensor([0.5, -2.0]))
    acts = torch.tensor([False, True, False, True])
    layer = carrying_activation(activation, acts, "prelu", torch.zeros(1))
    assert layer.weight.tolist() == [1, 0.5, 1, -2]
