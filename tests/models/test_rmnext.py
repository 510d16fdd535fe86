"""RMNeXt: published sizes of the plain form, and conversion that reaches it."""

import pytest
import torch
from strategies import scramble
from torch import nn

from rmprune.convert import convert
from rmprune.errors import UsageError
from rmprune.measure import count_macs, count_params
from rmprune.models import create_model, model_names
from rmprune.models.rmnext import WIDTHS, RMNeXt

# Plain form: parameters in millions and GMACs at 224×224 (RMNet, Table 4).
PLAIN = {
    "rmnext41x5_16": (23.976, 3.78),
    "rmnext50x5_32": (39.568, 6.87),
    "rmnext50x6_32": (47.577, 8.24),
    "rmnext101x6_16": (59.455, 11.08),
    "rmnext152x6_32": (126.916, 25.27),
}
# Parameters in millions, residual and plain: these two with 1000 and with CIFAR-10's classes.
BOTH = {"rmnext41x4_8": (11.243, 14.084), "rmnext26x3_32_cifar": (8.887, 12.049)}


def plain_layers(model):
    """The plain form on the meta device: the input is reserved in every block."""
    layers = []

    def add(n_in, n_out, size, stride=1, groups=1):
        conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, device="meta")
        layers.extend([conv, nn.ReLU()])

    for block in model.stem:
        add(block.conv3.in_channels, block.conv3.out_channels, 3, block.conv3.stride)
    for block in model.blocks:
        n_in = block.conv1.in_channels
        inner = block.conv1.out_channels + n_in
        group_width = block.conv2.in_channels // block.conv2.groups
        add(n_in, inner, 1)
        add(inner, inner, 3, block.conv2.stride, inner // group_width)
        add(inner, block.conv3.out_channels, 1)
    return nn.Sequential(*layers, model.pool, model.flatten, model.linear)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_sizes_of_the_paper(name):
    with torch.device("meta"):
        net = plain_layers(create_model(name, num_classes=1000).eval())
        macs = count_macs(net, torch.zeros(1, 3, 224, 224))
    assert count_params(net) / 1e6 == pytest.approx(PLAIN[name][0], rel=1e-4)
    assert macs / 1e9 == pytest.approx(PLAIN[name][1], rel=0.01)


@pytest.mark.parametrize("name", BOTH)
def test_conversion_gives_the_plain_form(name):
    model = scramble(create_model(name, num_classes=10 if "cifar" in name else 1000)).eval()
    plain = convert(model, torch.randn(1, 3, 36, 28), keep_bn=False)
    found = [str(layer) for layer in plain if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert found == [str(m) for m in plain_layers(model) if isinstance(m, nn.Conv2d | nn.Linear)]
    residual, as_plain = BOTH[name]
    assert count_params(model) / 1e6 == pytest.approx(residual, rel=0.01)
    assert count_params(plain) / 1e6 == pytest.approx(as_plain, rel=1e-4)


def test_conversion_is_exact():
    model = scramble(RMNeXt(WIDTHS, (1, 2, 1, 1), 3, 16, 5, cifar=True)).double().eval()
    x = torch.randn(2, 3, 21, 16).double()
    with torch.no_grad():
        expected = model(x)
        found = convert(model, x, keep_bn=False)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_forms_and_strides():
    assert create_model("rmnext26x2_64").stem(torch.zeros(1, 3, 40, 24)).shape == (1, 64, 10, 6)
    model = create_model("rmnext26x2_64_cifar", num_classes=7).eval()
    assert model.stem(torch.zeros(1, 3, 20, 12)).shape == (1, 64, 20, 12)
    assert model(torch.zeros(1, 3, 20, 12)).shape == (1, 7)


def test_group_widths_double_and_blocks_begin_as_their_shortcut():
    model = create_model("rmnext26x3_32")
    widths = [block.conv2.in_channels // block.conv2.groups for block in model.blocks]
    assert widths == [32, 32, 64, 64, 128, 128, 256, 256]
    block, x = model.blocks[1].train(), torch.rand(2, 64, 5, 4)
    assert torch.equal(block(x), x)


def test_names():
    assert {*PLAIN, *BOTH} <= set(model_names())
    with pytest.raises(UsageError, match="unknown model 'rmnext27x3_32'"):
        create_model("rmnext27x3_32")
    for name in ("rmnext26x1_32", "rmnext26x3_48"):
        with pytest.raises(UsageError, match="groups that divide 64 channels"):
            create_model(name)
