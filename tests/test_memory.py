"""Activation memory: against what the C source plans, and by hand."""

import pytest
import torch
from strategies import scramble

from rmprune.convert import convert
from rmprune.lowering import lower
from rmprune.memory import activation_memory
from rmprune.models import create_model

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain():
    return convert(scramble(create_model("resnet20")).eval(), X, keep_bn=False)


def test_a_plain_net_needs_a_layers_input_and_output(plain):
    table = activation_memory(plain, X).set_index("layer")
    assert table.loc["conv1", "bytes"] == 4 * 16 * 16 * 16
    assert table.loc["layer1_0_conv1", "live_bytes"] == 4 * (16 + 32) * 16 * 16
    assert table["live_bytes"].max() == table.attrs["arena_bytes"] == 4 * (16 + 32) * 16 * 16
    small = activation_memory(plain, X, bytes_per_value=1)
    assert small["live_bytes"].max() == table["live_bytes"].max() // 4


def test_a_blocks_input_lives_until_it_is_added(plain):
    net = lower(plain, X, lambda _, forms, __: "selection" if "selection" in forms else forms[0])
    table = activation_memory(net, X).set_index("layer")
    # Identity: the input, what the first convolution gives, and what the second one does.
    body = "layer1_0_conv1_block.layer1_0_conv2"
    assert table.loc[body, "live_bytes"] == 4 * (16 + 16 + 16) * 16 * 16


def test_against_the_arena_in_c(plain):
    pytest.importorskip("onnxscript")
    from rmprune.c_source import c_source
    from rmprune.export import deployable
    from rmprune.onnx_graph import to_onnx

    nets = {"plain": plain, "lowered": lower(plain, X, lambda _, forms, __: forms[0])}
    for name, net in nets.items():
        planned = c_source(to_onnx(deployable(net), X)).arena_bytes
        assert planned == pytest.approx(activation_memory(net, X).attrs["arena_bytes"], rel=0.4), (
            name
        )
    assert c_source(to_onnx(deployable(plain), X)).arena_bytes == 4 * (16 + 32) * 16 * 16
