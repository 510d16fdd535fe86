"""OREPA: squeezed blocks against their branches run one by one; published sizes; conversion."""

import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import scramble
from torch import nn

from rmprune.composed import squeezed
from rmprune.convert import convert
from rmprune.errors import ConversionError
from rmprune.export import deployable
from rmprune.measure import count_macs
from rmprune.models import create_model
from rmprune.models.dbb import dbb_unit
from rmprune.models.kernels import composed, frequency_prior
from rmprune.models.orepa import OREPA, DeepStem, OREPA1x1, orepa_unit, orepa_vgg
from rmprune.models.unit_resnet import basic_block, bottleneck, imagenet_resnet, unit_resnet
from rmprune.training import TrainingConfig, fit

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "orepa_cost" / "run.py"


def count(model):
    return sum(p.numel() for p in model.parameters())


def randomised(block):
    """No factor is 0 and no kernel the identity."""
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block.double()


def branch_by_branch(block, x, stride=None, padding=None):
    """An OREPA block as its paper draws it: every branch a network of its own, then the sum."""
    s = block.stride if stride is None else stride
    p = block.padding if padding is None else padding
    g, k, n_out = block.groups, block.size, block.out_channels
    first = block.identity + block.delta
    x = F.pad(x, (p, p, p, p))
    inside = slice(k // 2, -(k // 2) or None)
    branches = [
        F.conv2d(x, block.origin, None, s, groups=g),
        F.avg_pool2d(F.conv2d(x, block.average, groups=g), k, s),
        F.conv2d(F.conv2d(x, block.prior, groups=g), block.cosines, None, s, groups=n_out),
        F.conv2d(F.conv2d(x, first, groups=g), block.behind_delta, None, s, groups=g),
        F.conv2d(
            F.conv2d(x, block.depthwise.flatten(0, 1)[:, None], None, s, groups=block.in_channels),
            block.behind_depthwise,
            groups=g,
        ),
    ]
    if block.pointwise is not None:
        branches.append(F.conv2d(x[:, :, inside, inside], block.pointwise, None, s, groups=g))
    return sum(
        scale[:, None, None] * branch for scale, branch in zip(block.scales, branches, strict=True)
    )


def assert_close(found, expected):
    tolerance = 1e-10 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 5, 8]),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_squeezed_equals_its_branches(n_in, n_out, groups, size, stride, pointwise):
    block = randomised(OREPA(n_in * groups, n_out * groups, size, stride, groups, pointwise))
    x = torch.randn(2, n_in * groups, 9, 7, dtype=torch.float64)
    expected = branch_by_branch(block, x)
    assert_close(block(x), expected)
    assert_close(block.as_conv()(x), expected)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2]))
@settings(max_examples=20)
def test_squeezed_pointwise_block_equals_its_branches(n_in, n_out, stride):
    block = randomised(OREPA1x1(n_in, n_out, stride))
    x = torch.randn(2, n_in, 5, 4, dtype=torch.float64)
    sequence = F.conv2d(F.conv2d(x, block.first, None, stride), block.second)
    scales = block.scales[:, :, None, None]
    assert_close(
        block(x), scales[0] * F.conv2d(x, block.origin, None, stride) + scales[1] * sequence
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_squeezed_stem_equals_its_blocks(stride):
    """Whatever is padded is padded before the first block; strides come last."""
    stem = randomised(DeepStem(3, 5, stride))
    x = torch.randn(2, 3, 12, 9, dtype=torch.float64)
    y = F.pad(x, (3, 3, 3, 3))
    for place, block in enumerate(stem.blocks):
        y = branch_by_branch(block, y, stride if place == 2 else 1, padding=0)
    assert stem.kernel().shape == (5, 3, 7, 7)
    assert_close(stem(x), y)


def test_kernels_are_turned_around_when_composed():
    first, second = torch.randn(4, 3, 3, 3).double(), torch.randn(5, 4, 3, 3).double()
    x = torch.randn(1, 3, 8, 9).double()
    expected = F.conv2d(F.conv2d(x, first), second)
    assert_close(F.conv2d(x, composed(first, second)), expected)
    straight = F.conv2d(first.transpose(0, 1), second, padding=2).transpose(0, 1)
    assert (F.conv2d(x, straight) - expected).abs().max() > 0.1


@pytest.mark.parametrize("channels", [4, 5])
def test_frequency_prior_equals_the_loops_of_the_authors(channels):
    expected = torch.zeros(channels, 1, 3, 3)
    for i in range(channels):
        for h in range(3):
            for w in range(3):
                place, rank = (h, i + 1) if i < channels / 2 else (w, i + 1 - channels / 2)
                expected[i, 0, h, w] = math.cos(math.pi * (place + 0.5) * rank / 3)
    torch.testing.assert_close(frequency_prior(channels, 3), expected)


def test_blocks_begin_as_published():
    block = OREPA(8, 6)
    assert block.scales[:, 0].tolist() == [0.25, 0.25, 0, 0.5, 0.5, 1]
    assert not block.delta.any()
    bound = math.sqrt(6 / 72)  # kaiming uniform, a = 0, fan-in 8 · 9
    assert block.origin.abs().max() <= bound
    assert block.origin.abs().max() > 0.95 * bound
    assert OREPA1x1(8, 6).scales[:, 0].tolist() == [1, 0.5]


@pytest.mark.parametrize(
    ("unit", "parameters"),
    [((64, 64, 3), 128_000), ((64, 256, 1), 37_888), ((3, 64, 7, 2), 262_049)],
)
def test_parameters_of_blocks_are_the_published_ones(unit, parameters):
    assert count(orepa_unit(*unit)) == parameters


@pytest.mark.parametrize(("layers", "millions"), [(18, 37.76), (34, 71.72), (50, 68.58)])
def test_parameters_of_networks_are_the_published_ones(layers, millions):
    with torch.device("meta"):
        model = create_model(f"orepa_resnet{layers}_imagenet", num_classes=1000)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_training_step_keeps_little_more_than_that_of_plain_convolutions():
    """GiB at batch 64: what the specification counts for plain convolutions and DBB."""
    saved_bytes = runpy.run_path(str(EXPERIMENT))["saved_bytes"]
    found = {}
    for kind in ("plain", "dbb", "orepa"):
        with torch.device("meta"):
            model = imagenet_resnet(kind, 18, 1000)
            images, labels = torch.empty(64, 3, 224, 224), torch.empty(64, dtype=torch.long)
        found[kind] = saved_bytes(model, images, labels) / 2**30
    assert found["plain"] == pytest.approx(1.32, abs=0.005)
    assert found["dbb"] == pytest.approx(4.30, abs=0.005)
    assert found["orepa"] - found["plain"] <= 0.3 * (found["dbb"] - found["plain"])


def test_bytes_on_the_meta_device_are_those_of_the_cpu():
    saved_bytes = runpy.run_path(str(EXPERIMENT))["saved_bytes"]
    found = set()
    for device in ("meta", "cpu"):
        with torch.device(device):
            net = unit_resnet(
                [dbb_unit(3, 4, 3), nn.ReLU()], lambda *s: basic_block(*s, orepa_unit), (1,), 4, 3
            )
            found.add(saved_bytes(net, torch.ones(2, 3, 8, 8), torch.ones(2, dtype=torch.long)))
    assert len(found) == 1


def test_every_branch_but_the_priors_has_a_gradient_at_the_first_step():
    net = nn.Sequential(orepa_unit(3, 8, 7, 2), nn.ReLU(), orepa_unit(8, 8, 3), nn.ReLU())
    net.extend([orepa_unit(8, 12, 1), nn.ReLU(), orepa_unit(12, 8, 1)])
    net(torch.randn(4, 3, 16, 16)).square().mean().backward()
    still = {name for name, p in net.named_parameters() if not p.grad.any()}
    assert still == {name for name, _ in net.named_parameters() if name.endswith("prior")}
    assert len(still) == 4  # three blocks of the stem, and one more


@st.composite
def networks(draw):
    """Small residual networks of OREPA units, with scrambled BNs."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(2, 4))
    block = draw(st.sampled_from([basic_block, bottleneck]))
    stem = [orepa_unit(3, width, draw(st.sampled_from([3, 7])), draw(st.sampled_from([1, 2])))]
    depths = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    net = unit_resnet(
        [*stem, nn.ReLU()], lambda *sizes: block(*sizes, orepa_unit), depths, width, 4
    )
    return scramble(net).eval()


@given(networks(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25)
def test_networks_convert(net, keep_bn, dtype):
    """In float32, too: the kernels are worked out in float64, like all else."""
    net = net.to(dtype)
    x = torch.randn(2, 3, 13, 10, dtype=dtype)
    plain = convert(net, x, keep_bn=keep_bn)
    assert not any(list(layer.children()) for layer in plain)
    assert {type(layer) for layer in plain} <= {
        *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.PReLU, nn.AdaptiveAvgPool2d),
        *(nn.Flatten, nn.Linear),
    }
    assert plain.info["float64_difference"] < 1e-12
    if dtype == torch.float64:
        with torch.no_grad():
            assert_close(plain(x), net(x))


def test_a_plain_net_of_orepa_is_that_of_the_same_resnet():
    x = torch.randn(1, 3, 16, 12)
    nets = [convert(scramble(create_model(n)).eval(), x) for n in ("orepa_resnet20", "resnet20")]
    shapes = [[tuple(p.shape) for p in net.parameters()] for net in nets]
    assert shapes[0] == shapes[1]


def test_blocks_are_measured_and_exported_as_they_are_deployed():
    """Composing a kernel costs nothing for an image, and BNs fold into what it gives."""
    x = torch.randn(2, 3, 13, 10)
    model, usual = (scramble(create_model(n)).eval() for n in ("orepa_resnet20", "resnet20"))
    assert count_macs(model, x) == count_macs(usual, x)
    single = squeezed(model)
    torch.testing.assert_close(single(x), model(x), rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, OREPA) for m in model.modules())
    assert not any(isinstance(m, OREPA) for m in single.modules())
    assert squeezed(usual) is usual
    deployed = deployable(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-3, atol=1e-3)


def test_vgg_converts():
    """It has no shortcut beside a block, but sums within; RepVGG's 1×1 and BN go besides."""
    net = scramble(orepa_vgg((1, 2), (4, 6), 3)).double().eval()
    x = torch.randn(2, 3, 13, 10, dtype=torch.float64)
    plain = convert(net, x, keep_bn=False)
    assert sum(isinstance(layer, nn.Conv2d) for layer in plain) == 3
    assert_close(plain(x), net(x))
    assert create_model("orepa_vgg_a0")(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_block_without_residuals_is_no_residual_network():
    with pytest.raises(ConversionError, match="no residual block"):
        convert(nn.Sequential(orepa_unit(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8))


def test_learns_digits(tiny):
    net = unit_resnet(
        [orepa_unit(3, 8, 3), nn.ReLU()], lambda *s: basic_block(*s, orepa_unit), (1, 1), 8, 10
    )
    results = fit(net, tiny, TrainingConfig(4, lr=0.1, batch_size=8, precision="float32"))
    assert results[-1].loss < 0.9 * results[0].loss
