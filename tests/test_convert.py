import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Residual, residual_networks, scramble
from torch import nn

import rmprune
from rmprune.convert import convert
from rmprune.errors import ConversionError
from rmprune.measure import count_macs
from rmprune.models import create_model
from rmprune.rewrite import fold_bn

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0))  # not square


def assert_same(first, second, x=X, tolerance=1e-10):
    x = x.double()
    with torch.no_grad():
        expected = second(x)
        torch.testing.assert_close(
            first(x), expected, rtol=0, atol=tolerance * expected.abs().max().item()
        )


def is_plain(net):
    return isinstance(net, nn.Sequential) and not any(list(child.children()) for child in net)


@settings(max_examples=150)
@given(residual_networks(), st.sampled_from(["relu", "prelu"]), st.booleans())
def test_conversion_preserves_outputs(model, downsample, keep_bn):
    before = copy.deepcopy(model.state_dict())

    plain = convert(model, X, downsample=downsample, keep_bn=keep_bn)

    assert is_plain(plain)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in plain) == keep_bn
    assert_same(plain, model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet110", "resnet18"])
@pytest.mark.parametrize("downsample", ["relu", "prelu"])
def test_cifar_resnets_convert(name, downsample):
    model = scramble(create_model(name)).double().eval()
    assert_same(convert(model, X, downsample=downsample), model)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:resnet34"])
def test_torchvision_resnets_convert(name):
    model = scramble(create_model(name)).double().eval()
    x = torch.randn(1, 3, 40, 33)
    assert_same(convert(model, x), model, x)


def test_parameters_of_resnet20_are_the_papers():
    plain = convert(create_model("resnet20").eval(), X, keep_bn=False)
    assert sum(p.numel() for p in plain.parameters()) == 502_026


@pytest.mark.parametrize(
    ("downsample", "parameters"),
    [("relu", lambda c: 81 * c**2), ("prelu", lambda c: 108 * c**2 + 4 * c)],
)
@pytest.mark.parametrize("channels", [4, 16])
def test_downsample_block_has_the_parameters_of_the_appendix(downsample, parameters, channels):
    body = nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(2 * channels),
    )
    shortcut = nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), nn.BatchNorm2d(2 * channels)
    )
    stem = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU())
    model = scramble(nn.Sequential(stem, Residual(body, shortcut, False))).eval()

    plain = convert(model, X, downsample=downsample, keep_bn=False)

    own = [module for name, module in plain.named_children() if not name.startswith("_0")]
    found = sum(p.numel() for m in own for n, p in m.named_parameters() if n != "bias")
    stem_weights = 3 * channels
    assert found - stem_weights == parameters(channels)


def test_basic_block_costs_twice_its_macs():
    model = create_model("resnet20").eval()
    x = torch.zeros(1, 3, 32, 32)
    plain = convert(model, x)
    assert count_macs(plain, x) < 2 * count_macs(model, x)


def test_signed_input_is_carried_by_prelu():
    block = Residual(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)),
        None,
        False,
    )
    model = nn.Sequential(block).double().eval()
    plain = convert(model, X)
    assert [type(layer) for layer in plain if isinstance(layer, nn.PReLU)] == [nn.PReLU]
    assert_same(plain, model)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.PReLU(4), nn.PReLU()])
@pytest.mark.parametrize("signed", [True, False])
def test_other_activations(activation, signed):
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 3, 1)
    )
    stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity() if signed else nn.ReLU())
    model = scramble(nn.Sequential(stem, Residual(body, None, True))).double().eval()
    assert_same(convert(model, X), model)


def test_slimmable_scales_arrive_in_the_plain_net():
    model = scramble(create_model("resnet20")).eval()
    slim = rmprune.add_shortcut_bn(model, [X])
    plain = convert(slim, X)
    children = dict(plain.named_children())
    expected = torch.cat(
        [
            slim.get_submodule("layer2.1.bn1").weight.abs(),
            slim.get_submodule("layer2.1.shortcut_bn").weight.abs(),
        ]
    )
    torch.testing.assert_close(children["layer2_1_bn1"].weight.abs(), expected)
    merged = torch.maximum(
        slim.get_submodule("layer2.1.bn2").weight.abs(),
        slim.get_submodule("layer2.1.shortcut_bn").weight.abs(),
    )
    torch.testing.assert_close(children["layer2_1_bn2"].weight, merged)


class Functional(nn.Module):
    """A residual network that is written without modules for what has no weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = F.dropout(torch.relu(self.bn(self.conv1(x))), 0.5, self.training)
        x = torch.relu(torch.add(x, self.conv2(y)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


def test_functions_become_layers():
    model = scramble(Functional()).double().eval()
    plain = convert(model, X)
    assert is_plain(plain)
    assert_same(plain, model)


def test_fold_bn_equals():
    model = scramble(create_model("resnet20")).double().eval()
    plain = convert(model, X)
    folded = fold_bn(plain)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded)
    assert_same(folded, plain)


def block(*body, shortcut=None):
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), Residual(nn.Sequential(*body), shortcut, False)
    )


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSALS = {
    "training mode": (lambda: create_model("resnet20").train(), "training mode.*model.eval"),
    "no residual": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), "no residual block"),
    "untraceable": (Branches, "cannot trace"),
    "even kernel": (
        lambda: block(nn.Conv2d(4, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2)),
        "'2.body.0'.*kernels must be odd",
    ),
    "padding": (
        lambda: block(nn.Conv2d(4, 4, 3, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        "'2.body.0'.*padding",
    ),
    "groups": (
        lambda: block(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        "'2.body.0'.*grouped",
    ),
    "three convolutions": (
        lambda: block(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
        "3 convolutions",
    ),
    "normalisation": (
        lambda: block(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        "'2.body.1'.*GroupNorm",
    ),
    "pre-activation": (
        lambda: block(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
        "'2.body.0'",
    ),
    "activated body": (
        lambda: block(nn.Conv2d(4, 4, 1), nn.ReLU()),
        "'2.body.1'.*activation between",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_node_and_the_reason(case):
    build, message = REFUSALS[case]
    model = build()
    if case != "training mode":
        model.eval()
    with pytest.raises(ConversionError, match=message):
        convert(model, X)
