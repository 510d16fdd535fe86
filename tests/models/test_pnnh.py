"""PNNH: parameters as published, coders that are pretrained and frozen, and the plain form."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import scramble
from torch import nn

from rmprune.checkpoints import Checkpoint, SlimConfig, Task
from rmprune.convert import convert
from rmprune.errors import ConversionError, UsageError
from rmprune.measure import count_params
from rmprune.models import create_model, registry
from rmprune.models.coder import Coder, pretrain_coders
from rmprune.models.pnnh import NETWORKS, Network, plain_net, pnnh_net
from rmprune.models.pnnh_blocks import (
    BASIC,
    BOTTLENECK,
    INVERTED_RESIDUAL,
    BlockKind,
    Coding,
    PlainMlp,
    conv,
)
from rmprune.slimming import slimmable
from rmprune.training import TrainingConfig, fit

X = torch.randn(2, 3, 13, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TINY = Network(BASIC, (2, 1), (8, 16), 8)
GROUPED = BlockKind(
    lambda n_in, hidden, n_out, stride: [
        conv(n_in, hidden, 1),
        conv(hidden, hidden, 3, stride, groups=4),
        conv(hidden, n_out, 1),
    ],
    lambda _, n_out: n_out,
    lambda _, n_out: n_out // 2,
)


def coders_of(model):
    return [module for module in model.modules() if isinstance(module, Coder)]


def assert_same(first, second, x):
    with torch.no_grad():
        expected = second(x)
        atol = 1e-10 * expected.abs().max().item()
        torch.testing.assert_close(first(x), expected, rtol=0, atol=atol)


def evaluated(model):
    """In float64, with weights of the coders that matter."""
    for coder in coders_of(model):
        for weight in coder.parameters():
            nn.init.normal_(weight, std=0.3)
    return scramble(model).double().eval()


@pytest.mark.parametrize(("name", "millions"), [("resnet18", 6.37), ("resnet34", 11.42)])
def test_parameters_are_the_papers(name, millions):
    with torch.device("meta"):
        model = pnnh_net(NETWORKS[name], 1000)
    assert count_params(model) / 1e6 == pytest.approx(millions, abs=0.005)


def test_parameters_without_pnnh_are_those_of_the_residual_network():
    plain = plain_net(NETWORKS["resnet56"])
    assert count_params(plain) == count_params(create_model("resnet56"))  # option A has none


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "wrn28_10"])
def test_shapes(name):
    with torch.device("meta"):
        x = torch.zeros(2, 3, 64, 48)
        assert pnnh_net(NETWORKS[name], 7)(x).shape == (2, 7)
        assert plain_net(NETWORKS[name], 7)(x).shape == (2, 7)


# The plain form.


@st.composite
def pnnh_networks(draw):
    """A network in float64 and evaluation mode, and whether its layers all join."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from([BASIC, BOTTLENECK, INVERTED_RESIDUAL, GROUPED]))
    first = draw(st.sampled_from([8, 16]))
    widths = (first, first * draw(st.sampled_from([1, 2])))
    depths = (2, draw(st.integers(1, 2)))  # one block has a coder at least
    transition = draw(st.sampled_from(["learner", "coder", "full"]))
    coding = Coding(draw(st.sampled_from([1, 3])), draw(st.booleans()), transition)
    model = evaluated(pnnh_net(Network(kind, depths, widths, 8), 4, coding))
    # A decoder of 3×3 is not carried past an activation, but computed before it; and strided, an
    # encoder of 3×3 reads other positions than the learner.
    return model, coding.kernel_size == 1 or (kind is BASIC and transition != "coder")


@settings(max_examples=25)
@given(pnnh_networks(), st.booleans())
def test_conversion_gives_the_plain_form(example, keep_bn):
    model, joins = example
    before = copy.deepcopy(model.state_dict())

    plain = convert(model, X, keep_bn=keep_bn)

    assert_same(plain, model, torch.randn(2, 3, 13, 10, dtype=torch.float64))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    if joins:
        layers = [type(layer) for layer in plain]
        learners = [block.learner for stage in model.children() for block in blocks_of(stage)]
        own = sum(isinstance(layer, nn.Conv2d) for chain in learners for layer in chain)
        assert layers.count(nn.Conv2d) == own + 1  # the stem
        assert nn.PReLU not in layers


def blocks_of(stage):
    return getattr(stage, "blocks", ())


def test_the_plain_layers_are_learner_and_coder_side_by_side():
    model = evaluated(pnnh_net(TINY))
    plain = dict(convert(model, X, keep_bn=False).named_children())
    block, coder = model.layer1.blocks[1], model.layer1.coder
    first = plain["layer1_blocks_1_learner_conv1"].weight
    second = plain["layer1_blocks_1_learner_conv2"].weight
    assert first.shape == second.shape == (8, 8, 3, 3)
    torch.testing.assert_close(first[4:, :, 1, 1], coder.encoder.weight[:, :, 0, 0])
    torch.testing.assert_close(second[:, :4], block.learner.conv2.weight)
    torch.testing.assert_close(second[:, 4:, 1, 1], coder.decoder.weight[:, :, 0, 0])
    assert second[:, 4:].count_nonzero() == coder.decoder.weight.numel()


def test_a_plain_network_needs_no_conversion():
    with pytest.raises(ConversionError, match="has no residual block"):
        convert(plain_net(TINY).eval(), X)


@settings(max_examples=10)
@given(st.sampled_from([2, 6, 8]), st.integers(1, 4), st.sampled_from([nn.GELU(), nn.ReLU()]))
def test_mlp_is_two_linear_layers(channels, expansion, activation):
    model = PlainMlp(channels, Coder.of_tokens(channels, channels // 2, activation), expansion)
    model = evaluated(model)
    plain = model.two_linear()
    assert [type(layer) for layer in plain] == [nn.Linear, type(activation), nn.Linear]
    assert plain[0].out_features == expansion * channels
    assert_same(plain, model, torch.randn(2, 5, channels, dtype=torch.float64))


def test_convert_refuses_tokens():
    model = PlainMlp(8, Coder.of_tokens(8, 4, nn.GELU())).eval()
    with pytest.raises(ConversionError, match="Linear reads a whole tensor while 'x' is needed"):
        convert(model, torch.randn(2, 5, 8))


# Coders.


def error_of(coder, x):
    with torch.no_grad():
        return (coder(x) - x).square().mean().item()


@pytest.mark.parametrize(
    ("coder", "shape"),
    [
        (lambda: Coder.of_images(8, 4), (1024, 8, 1, 1)),
        (lambda: Coder.of_images(8, 4, 3), (16, 8, 8, 8)),
        (lambda: Coder.of_images(8, 4, 3, tied=True), (16, 8, 8, 8)),
        (lambda: Coder.of_tokens(8, 4, nn.GELU()), (1024, 8)),
    ],
    ids=["1×1", "3×3", "tied", "tokens"],
)
def test_pretraining_restores_more_than_the_mean(coder, shape):
    coder = coder()
    before = [weight.clone() for weight in coder.parameters()]
    pretrain_coders(coder)
    x = torch.randn(shape).relu()
    assert error_of(coder, x) < 0.75 * x.var().item()  # x's mean alone leaves all of it
    assert not any(weight.requires_grad for weight in coder.parameters())
    assert all(weight.grad is None for weight in coder.parameters())
    assert all((old != new).any() for old, new in zip(before, coder.parameters(), strict=True))


def test_checkpoints_pretrain_nothing(monkeypatch):
    """Their coders have weights already, and pretraining takes seconds."""
    monkeypatch.setitem(registry._BUILDERS, "pnnh_tiny", partial(pnnh_net, TINY))
    trained = slimmable(create_model("pnnh_tiny").double())
    task = Task("digits", tuple("0123456789"), (3, 13, 10), (0.5,) * 3, (0.5,) * 3)
    checkpoint = Checkpoint("sparse", SlimConfig("pnnh_tiny"), task, trained.state_dict())

    def refuse(*_):
        raise AssertionError("pretrained in vain")

    monkeypatch.setattr(registry, "pretrain_coders", refuse)
    with pytest.raises(AssertionError, match="in vain"):
        create_model("pnnh_tiny")
    torch.testing.assert_close(checkpoint.build().double()(X), trained(X), rtol=0, atol=1e-5)


def test_pretraining_on_other_inputs_restores_those_better():
    error = {}
    for pretext in ("normal", "rectified normal"):
        torch.manual_seed(0)
        coder = Coder.of_images(8, 4)
        pretrain_coders(coder, pretext)
        error[pretext] = [error_of(coder, x) for x in signed_and_rectified()]
    assert error["normal"][0] < error["rectified normal"][0]
    assert error["rectified normal"][1] < error["normal"][1]


def signed_and_rectified():
    x = torch.randn(1024, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    return x, x.relu()


def test_a_coder_does_not_mind_the_scale_of_its_input():
    coder = Coder.of_images(8, 4, 3)
    x = torch.randn(1, 8, 5, 4).relu()
    torch.testing.assert_close(coder(16 * x), 16 * coder(x), rtol=0, atol=0)


def test_a_tied_coder_is_an_autoencoder_with_transposed_kernels():
    coder = Coder.of_images(6, 3, 3, tied=True).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    hidden = coder.encoder(x).relu()
    expected = nn.functional.conv_transpose2d(hidden, coder.encoder.weight, padding=1)
    torch.testing.assert_close(coder(x), expected)
    assert count_params(coder) == 6 * 3 * 9


def test_pretext_tasks_without_training():
    model = pnnh_net(TINY).eval()
    untrained = copy.deepcopy(model.state_dict())
    pretrain_coders(model, "untrained")
    torch.testing.assert_close(model.state_dict(), untrained, rtol=0, atol=0)
    x = torch.randn(2, 8, 5, 4).relu()
    pretrain_coders(model, "identity")
    coder, block = model.layer1.coder, model.layer1.blocks[1]
    assert torch.equal(coder(x)[:, :4], x[:, :4])
    assert not coder(x)[:, 4:].any()
    pretrain_coders(model, "none")
    assert torch.equal(block(x, coder), block.learner(x).relu())


def test_unknown_pretext_task():
    with pytest.raises(UsageError, match="unknown pretext task 'noise'; known: none, untrained"):
        pretrain_coders(pnnh_net(TINY), "noise")


def test_a_model_by_name_is_pretrained():
    model = create_model("pnnh_resnet20")
    x = torch.randn(256, 64, 1, 1).relu()
    assert error_of(coders_of(model)[-1], x) < 0.25


def test_pretraining_is_a_function_of_the_seed():
    coders = []
    for _ in range(2):
        torch.manual_seed(3)
        coders.append(Coder.of_images(4, 2))
        pretrain_coders(coders[-1])
    torch.testing.assert_close(*(coder.state_dict() for coder in coders), rtol=0, atol=0)


def test_saved_weights_take_their_coders_along(tmp_path):
    state = pnnh_net(NETWORKS["resnet20"]).state_dict()
    coders = [key for key in state if "coder" in key]
    assert len(coders) == 2 * 3  # one storage a stage
    save_file(state, tmp_path / "w.safetensors")
    torch.manual_seed(1)
    loaded = create_model("pnnh_resnet20", weights=tmp_path / "w.safetensors")
    assert all(torch.equal(loaded.state_dict()[key], state[key]) for key in coders)
    assert not any(p.requires_grad for c in coders_of(loaded) for p in c.parameters())


def test_training_leaves_the_coders_alone_and_learns(tiny):
    model = pnnh_net(TINY, 10)
    pretrain_coders(model)
    before = copy.deepcopy([coder.state_dict() for coder in coders_of(model)])
    config = TrainingConfig(epochs=15, lr=0.1, batch_size=8, precision="float32")
    results = fit(model, tiny, config)
    assert results[-1].loss < 0.8 * results[0].loss
    after = [coder.state_dict() for coder in coders_of(model)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
