import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Residual, networks_of_all_pieces, residual_networks, scramble
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
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x + self.conv(x) if x.sum() > 0 else x


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x + self.left(x) * self.right(x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, y=None):  # noqa: ARG002
        return x + self.conv(x)


def conv(kernel=3, padding=None, **options):
    return nn.Conv2d(4, 4, kernel, padding=kernel // 2 if padding is None else padding, **options)


# What is refused: how to build it, and what the error must say.
REFUSALS = {
    "training mode": (lambda: create_model("resnet20").train(), "training mode.*model.eval"),
    "no residual": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), "no residual block"),
    "untraceable": (Branches, "'Branches'.*cannot trace.*must not branch"),
    "two inputs": (TwoInputs, "2 inputs"),
    "even kernel": (
        lambda: block(conv(2, padding=1), nn.ReLU(), conv(2, padding=0)),
        "'2.body.0'.*kernels must be odd",
    ),
    "padding": (
        lambda: block(conv(padding=2), nn.ReLU(), conv(padding=0)),
        "'2.body.0'.*padding",
    ),
    "reflected": (
        lambda: block(conv(padding_mode="reflect"), nn.ReLU(), conv()),
        "'2.body.0'.*'reflect' padding",
    ),
    "InstanceNorm": (
        lambda: block(conv(), nn.InstanceNorm2d(4), nn.ReLU(), conv()),
        "'2.body.1'.*InstanceNorm2d reads a whole tensor",
    ),
    "LayerNorm": (
        lambda: block(conv(), nn.LayerNorm([4, 13, 10]), conv()),
        "'2.body.1'.*LayerNorm reads a whole tensor",
    ),
    "max pooling": (
        lambda: block(conv(), nn.MaxPool2d(3, 1, 1), conv()),
        "'2.body.1'.*MaxPool2d reads a whole tensor",
    ),
    "no statistics": (
        lambda: block(conv(), nn.BatchNorm2d(4, track_running_stats=False), conv()),
        "'2.body.1'.*running statistics",
    ),
    "product": (Product, "'mul'.*gate"),
    "an activation with no name": (
        lambda: block(conv(), nn.BatchNorm2d(4), nn.ELU(), conv(), nn.BatchNorm2d(4)),
        "'2.body.2'.*ELU",
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


WIDE = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))


@given(
    networks_of_all_pieces(),
    st.sampled_from(["auto", "partial"]),
    st.sampled_from(["interval", "calibrated"]),
    st.sampled_from(["relu", "prelu"]),
    st.sampled_from(["auto", "always"]),
    st.booleans(),
)
def test_every_documented_piece_converts(model, carry, bound, downsample, fuse, keep_bn):
    """Random depth, widths, groups, strides, dilations, shortcuts, activations and gates."""
    options = {"carry": carry, "bound": bound, "downsample": downsample, "fuse": fuse}
    plain = convert(model, WIDE, keep_bn=keep_bn, **options)
    assert is_plain(plain)
    if bound == "interval":  # the bounds of the other hold for the example alone
        other = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(1))
        assert_same(plain, model, 3 * other, tolerance=1e-9)


MODERN = [
    *("resnet50", "mnasnet0_5", "mobilenet_v2"),
    *("mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf"),
    "regnet_y_400mf",
]


@pytest.mark.parametrize("name", MODERN)
def test_other_families_convert(name):
    """All of torchvision's and many of timm's are in experiments/conversion_coverage."""
    model = scramble(create_model(f"torchvision:{name}")).eval()
    x = torch.randn(1, 3, 64, 64)
    plain = convert(model, x, keep_bn=False)
    assert is_plain(plain)
    with torch.no_grad():
        expected = model(x)
        assert (plain(x) - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    "name",
    ["resnet18d", "seresnet50", "ecaresnet26t", "rexnet_100", "repvgg_a0", "res2net50_26w_4s"],
)
def test_timm_families_convert(name):
    pytest.importorskip("timm")
    model = scramble(create_model(f"timm:{name}")).eval()
    plain = convert(model, torch.randn(1, 3, 64, 64))
    assert is_plain(plain)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("torchvision:resnet50", 5.5), ("torchvision:resnext50_32x4d", 3.0), ("resnet20", 2.0)],
)
def test_middle_convolutions_are_grouped(name, limit):
    model = create_model(name).eval()
    x = torch.zeros(1, 3, 64, 64)
    plain = convert(model, x)
    assert count_macs(plain, x) <= limit * count_macs(model, x)


class PreActivation(nn.Module):
    """He et al. 2016, "Identity mappings in deep residual networks", figure 4 (e)."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + identity


@pytest.mark.parametrize("carry", ["auto", "prelu", "partial"])
def test_pre_activation_networks(carry):
    blocks = [PreActivation(4, 4, 1), PreActivation(4, 8, 2), PreActivation(8, 8, 1)]
    head = [nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *blocks, *head)
    model = scramble(model).double().eval()
    plain = convert(model, X, carry=carry)
    assert_same(plain, model)
    modes = {way["mode"] for way in plain.info["carried"]}
    assert modes <= {"as is", "prelu" if carry == "auto" else carry}


def driven_beyond_six():
    """A MobileNetV2 whose activations are cut off by ReLU6 in every layer."""
    model = scramble(create_model("torchvision:mobilenet_v2")).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(6)
    return model


@pytest.mark.parametrize(
    ("carry", "bound", "modes"),
    [
        ("auto", "interval", {"shift", "partial"}),
        ("shift", "interval", {"shift"}),
        ("shift", "calibrated", {"shift"}),
        ("partial", "interval", {"partial"}),
    ],
)
def test_relu6_is_not_relu(carry, bound, modes):
    model = driven_beyond_six()
    x = torch.randn(2, 3, 32, 32)
    reached = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0].max()))
        for module in model.modules()
        if isinstance(module, nn.ReLU6)
    ]
    model(x.double())
    assert min(reached) > 6
    for hook in hooks:
        hook.remove()
    plain = convert(model, x, carry=carry, bound=bound)
    assert_same(plain, model, x, tolerance=1e-9)
    ways = plain.info["carried"]
    assert {way["mode"] for way in ways} - {"as is"} <= modes
    assert all(way["bound"] == bound for way in ways if way["mode"] == "shift")


def test_relu6_cannot_be_carried_by_a_prelu():
    with pytest.raises(ConversionError, match="ReLU6 by prelu"):
        convert(driven_beyond_six(), torch.randn(1, 3, 32, 32), carry="prelu")


def test_intervals_hold_for_inputs_that_nobody_saw():
    model = driven_beyond_six()
    plain = convert(model, torch.randn(1, 3, 32, 32), carry="shift")
    assert_same(plain, model, 50 * torch.randn(2, 3, 32, 32), tolerance=1e-9)


MOBILENET_V1 = [
    *((32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)),
    *([(512, 512)] * 5),
    *((512, 1024), (1024, 1024)),
]


@pytest.mark.parametrize("carry", ["auto", "prelu", "partial"])
def test_mobilenet_v2_becomes_mobilenet_v1(carry):
    """RMNet, sections 4.4 and 5.3; MACs as the layers of MobileNetV1 add up."""
    model = scramble(create_model("mobilenetv2_rm")).eval()
    x = torch.randn(1, 3, 32, 32)
    assert count_macs(model, x) == 81_582_080
    plain = convert(model, x, carry=carry, fuse="always", keep_bn=False)
    convs = [layer for layer in plain if isinstance(layer, nn.Conv2d)]
    depthwise, pointwise = convs[1::2], convs[2::2]
    assert [(c.in_channels, c.out_channels) for c in pointwise] == MOBILENET_V1
    assert [c.groups for c in depthwise] == [inputs for inputs, _ in MOBILENET_V1]
    assert [c.stride[0] for c in depthwise] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert count_macs(plain, x) == 46_354_432
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-4)


def test_layers_in_place_do_not_change_the_example():
    model = nn.Sequential(nn.ReLU(inplace=True), *block(conv(), nn.ReLU(inplace=True), conv()))
    x = torch.randn(1, 3, 8, 8).double()
    before = x.clone()
    convert(model.double().eval(), x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_what_in_place_activations_do_to_the_shortcut():
    """The shortcut of ``x + conv(relu_(x))`` is relu(x), for relu_ has changed x."""
    model = block(nn.ReLU(inplace=True), conv())
    model[1] = nn.Identity()
    assert_same(convert(model.double().eval(), X), model)


def test_a_float32_network_with_prelus_between_blocks():
    """What is written is float32 again, what is computed with meanwhile float64."""
    block = create_model("resnet20").layer1[0]
    model = scramble(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(), block)).eval()
    x = torch.randn(2, 3, 8, 8)
    plain = convert(model, x)
    assert all(parameter.dtype == torch.float32 for parameter in plain.parameters())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)
