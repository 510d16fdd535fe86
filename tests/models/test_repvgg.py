"""RepVGG and its reserving form: published sizes, exact conversion, one structure deployed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import scramble
from torch import nn

from rmprune.convert import convert
from rmprune.errors import UsageError
from rmprune.measure import count_macs, count_params
from rmprune.models import create_model, model_names
from rmprune.models.repvgg import RepBlock, RepVGG, Stage, deep_stages, thin_stages

X = torch.randn(2, 3, 21, 16, generator=torch.Generator().manual_seed(0))  # not square

# Training and deployed parameters in millions, ImageNet.
PARAMETERS = {
    "repvgg_a0": (9.11, 8.31),
    "repvgg_a1": (14.09, 12.79),
    "repvgg_a2": (28.21, 25.50),
    "repvgg_b0": (15.82, 14.34),
    "repvgg_b1": (57.42, 51.83),
    "repvgg_b1g2": (45.78, 41.36),
    "repvgg_b1g4": (39.97, 36.13),
    "repvgg_b2": (89.02, 80.32),
    "repvgg_b2g4": (61.76, 55.78),
    "repvgg_b3": (123.09, 110.96),
    "repvgg_b3g4": (83.83, 75.63),
}


def on_meta(name):
    with torch.device("meta"):
        return create_model(name, num_classes=1000).eval()


def deployed_parameters(model):
    """One biased 3×3 convolution for each block, and the linear layer."""
    convs = [b.conv3 for b in model.blocks]
    channels = [
        b.conv3.in_channels if b.bn0 is not None else b.bn3.num_features for b in model.blocks
    ]
    weights = (n * c.in_channels * 9 // c.groups for n, c in zip(channels, convs, strict=True))
    return sum(weights) + sum(channels) + count_params(model.linear)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_paper(name):
    model = on_meta(name)
    found = (count_params(model) / 1e6, deployed_parameters(model) / 1e6)
    assert found == pytest.approx(PARAMETERS[name], abs=0.006)


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg21_rm0.25"])
def test_conversion_gives_the_deployed_parameters(name):
    model = scramble(create_model(name, num_classes=1000)).eval()
    plain = convert(model, torch.randn(1, 3, 48, 40), keep_bn=False)
    assert count_params(plain) == deployed_parameters(model)
    assert all(c.kernel_size == (3, 3) for c in plain if isinstance(c, nn.Conv2d))
    assert plain.info["float64_difference"] < 1e-13


# GMACs in training, plain and reserving; deployed; deployed parameters in millions (SPECS of
# RMNet's code).
DEEP = {
    "repvgg21_rm0.25": (2.40, 2.14, 2.16, 14.64),
    "repvgg37_rm0.25": (4.46, 3.94, 4.01, 27.18),
    "repvgg69_rm0.5": (8.57, 6.51, 7.71, 52.25),
    "repvgg133_rm0.75": (16.79, 10.62, 15.11, 102.40),
}


def deployed(model):
    """The plain form's layers on the meta device, without weights."""
    layers = []
    for block in model.blocks:
        conv = block.conv3
        n_out = conv.out_channels + block.reserved
        layers += [nn.Conv2d(conv.in_channels, n_out, 3, conv.stride, 1, device="meta"), nn.ReLU()]
    return nn.Sequential(*layers, model.pool, model.flatten, model.linear)


@pytest.mark.parametrize("name", DEEP)
def test_sizes_of_the_deep_ones(name):
    image = torch.zeros(1, 3, 224, 224, device="meta")
    reserving, plain = on_meta(name), on_meta(name.split("_")[0])
    net = deployed(reserving)
    found = [count_macs(model, image) / 1e9 for model in (plain, reserving, net)]
    assert [*found, count_params(net) / 1e6] == pytest.approx(DEEP[name], abs=0.006)
    assert len(plain.blocks) == int(name[6:].split("_")[0])


@st.composite
def small_networks(draw):
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    stages = [
        Stage(4 * draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 2)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    ratio = draw(st.sampled_from([0, 0.25, 0.5, 0.75, 0.9]))
    groups = 1 if ratio else draw(st.sampled_from([1, 2, 4]))
    return scramble(RepVGG(stages, 5, ratio, groups)).double().eval()


@settings(max_examples=25)
@given(small_networks(), st.booleans())
def test_conversion_is_exact_and_writes_one_convolution_a_block(model, keep_bn):
    plain = convert(model, X, keep_bn=keep_bn)
    x = X.double()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(
            plain(x), expected, rtol=0, atol=1e-10 * expected.abs().max().item()
        )
    convs = [layer for layer in plain if isinstance(layer, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(3, 3)] * len(model.blocks)


def test_a_kernel_by_hand():
    """K3·t3 + pad(K1·t1) + identity·t0, bias Σ (β − μγ/σ), of RepVGG's section 3.3."""
    model = RepVGG([Stage(4, 2, 1)], 3)
    block = scramble(model).double().eval().blocks[1]
    kernel, bias = torch.zeros(4, 4, 3, 3).double(), torch.zeros(4).double()
    identity = torch.eye(4).double()[:, :, None, None]
    for weight, bn in (
        (block.conv3.weight, block.bn3),
        (nn.functional.pad(block.conv1.weight, (1, 1, 1, 1)), block.bn1),
        (nn.functional.pad(identity, (1, 1, 1, 1)), block.bn0),
    ):
        t = bn.weight / (bn.running_var + bn.eps).sqrt()
        kernel += t[:, None, None, None] * weight
        bias += bn.bias - t * bn.running_mean
    conv = dict(convert(model, X, keep_bn=False).named_children())["blocks_1_conv3"]
    torch.testing.assert_close(conv.weight, kernel, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv.bias, bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stages", [thin_stages(20), deep_stages(21, width=8)])
def test_the_deployed_net_is_the_same_for_every_ratio(stages):
    def structure(ratio):
        net = convert(RepVGG(stages, ratio=ratio).eval(), X[:1], keep_bn=False)
        return [(name, str(layer)) for name, layer in net.named_children()]

    assert all(structure(ratio) == structure(0) for ratio in (0.25, 0.5, 0.75))


def test_ratio_zero_is_repvgg():
    assert (
        create_model("repvgg20_rm0").state_dict().keys()
        == create_model("repvgg20").state_dict().keys()
    )
    assert not any(block.reserved for block in create_model("repvgg20_rm0").blocks)


def test_reserved_channels_pass_by():
    block = scramble(RepBlock(8, 8, reserved=6)).eval()
    x = torch.rand(2, 8, 5, 4)
    assert torch.equal(block(x)[:, :6], x[:, :6])
    assert block.conv3.weight.shape == (2, 8, 3, 3)


def test_every_other_block_reserves():
    blocks = create_model("repvgg37_rm0.25").blocks
    assert [block.reserved for block in blocks][:11] == [0, 0, 16, 0, 16, 0, 16, 0, 16, 0, 0]


def test_depth_and_widths_are_those_of_the_resnets():
    resnet = create_model("resnet32")
    widths = [m.out_channels for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    assert [block.conv3.out_channels for block in create_model("repvgg32").blocks] == widths
    assert thin_stages(20)[0] == Stage(16, 7, 1)


def test_forms_for_small_images_halve_three_times():
    model = create_model("repvgg21_cifar_rm0.5", num_classes=7).eval()
    assert model.blocks(X).shape == (2, 512, 3, 2)
    assert model(X).shape == (2, 7)
    assert [stage.width for stage in deep_stages(21, cifar=True, width=8)] == [8, 16, 32, 64]


def test_names():
    assert {*PARAMETERS, "repvgg133_cifar", "repvgg20"} <= set(model_names())
    for name in ("repvgg_a0_rm0.5", "repvgg22", "repvgg20_cifar", "repvgg21_rm1"):
        with pytest.raises(UsageError, match="unknown model"):
            create_model(name)
    with pytest.raises(UsageError, match=r"a share in \[0, 1\) of its channels, not 1"):
        RepVGG([Stage(4, 3, 1)], ratio=1)
