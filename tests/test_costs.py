"""What channels cost: against removals counted by torch-pruning, and against measured tables."""

import copy

import pandas as pd
import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from strategies import residual_networks
from torch import nn

from rmprune.backends import Platform
from rmprune.convert import convert
from rmprune.costs import (
    body_savings,
    channel_savings,
    counted,
    latency_table,
    measured,
    relative,
    sites,
)
from rmprune.errors import UsageError
from rmprune.measure import count_macs, count_params
from rmprune.models import create_model
from rmprune.slimming import add_shortcut_bn, scale_parameters

IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def slim():
    return add_shortcut_bn(create_model("resnet20").eval())


def channels(slim):
    return {name: len(scale) for name, scale in scale_parameters(slim).items()}


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_savings_are_what_a_removal_saves(slim, cost):
    """Against torch-pruning: remove one channel of the plain net and count."""
    savings = channel_savings(slim, IMAGE, counted(cost), "plain")
    plain = convert(slim, IMAGE, keep_bn=False)

    def count(net):
        if cost == "macs":
            return count_macs(net, IMAGE)
        return sum(m.weight.numel() for m in net if isinstance(m, nn.Conv2d | nn.Linear))

    # A block's first BN, its shortcut BN, its last BN, in a stage and where the shape changes.
    places = {
        "layer1.1.bn1": ("layer1_1_conv1", 0),
        "layer1.1.shortcut_bn": ("layer1_1_conv1", 16),
        "layer1.1.bn2": ("layer1_1_conv2", 0),
        "layer2.0.shortcut_bn": ("layer2_0_conv1", 32),
        "layer3.2.bn2": ("layer3_2_conv2", 0),
    }
    for bn, (conv, channel) in places.items():
        net = copy.deepcopy(plain)
        graph = tp.DependencyGraph().build_dependency(net, IMAGE)
        module = dict(net.named_children())[conv]
        graph.get_pruning_group(module, tp.prune_conv_out_channels, [channel]).prune()
        assert savings[bn] == pytest.approx(count(plain) - count(net))


def test_savings_with_additions(slim):
    """A block's last BN and its shortcut BN share the column that reads their sum."""
    savings = channel_savings(slim, IMAGE, counted("params"), "auto")
    assert savings["layer1.1.bn1"] == 2 * 9 * 16
    assert savings["layer1.1.bn2"] == 9 * 16 + 9 * 16 / 2
    assert savings["layer1.1.shortcut_bn"] == 9 * 16 / 2
    assert savings["layer3.2.bn2"] == 9 * 64 + 10 / 2
    assert savings["bn1"] == 9 * 3 + 9 * 16
    assert savings.keys() == scale_parameters(slim).keys()


@pytest.mark.parametrize("lowering", ["plain", "auto"])
def test_a_body_saves_its_convolutions(slim, lowering):
    """Against the parameters of the network without them."""
    saved = body_savings(slim, IMAGE, counted("params"), lowering)
    net = convert(slim, IMAGE, keep_bn=False) if lowering == "plain" else slim
    prefixes = [name.removesuffix("conv2") for name in saved]
    assert len(prefixes) == 9
    for prefix in prefixes:
        start = prefix if lowering == "auto" else prefix.replace(".", "_")
        body = [m for n, m in net.named_modules() if n in (start + "conv1", start + "conv2")]
        assert saved[prefix + "conv2"] == sum(conv.weight.numel() for conv in body)


def test_blocks_that_are_composed_cost_what_they_are_squeezed_to():
    composed = add_shortcut_bn(create_model("orepa_resnet20").eval())
    plain = add_shortcut_bn(create_model("resnet20").eval())
    for savings in (channel_savings, body_savings):
        found, expected = (savings(m, IMAGE, counted("macs"), "auto") for m in (composed, plain))
        assert sorted(found.values()) == sorted(expected.values())


def test_channels_alone(slim):
    """An inner channel is half a row and half a column."""
    savings = channel_savings(slim, IMAGE, counted("uniform"), "auto")
    assert savings["layer1.1.bn1"] == 1
    assert body_savings(slim, IMAGE, counted("uniform"), "auto")["layer1.1.conv2"] == 32


@settings(max_examples=30)
@given(residual_networks())
def test_every_scale_has_a_saving(model):
    slim = add_shortcut_bn(model)
    x = torch.zeros(1, 3, 13, 10).double()
    for lowering in ("plain", "auto"):
        savings = channel_savings(slim, x, counted("macs"), lowering)
        assert savings.keys() <= scale_parameters(slim).keys()
        weights = relative(savings, channels(slim))
        assert weights.keys() == scale_parameters(slim).keys()
        assert min(weights.values()) > 0


def test_mean_weight_is_one(slim):
    weights = relative(channel_savings(slim, IMAGE, counted("macs"), "auto"), channels(slim))
    total = sum(weights[name] * count for name, count in channels(slim).items())
    assert total / sum(channels(slim).values()) == pytest.approx(1)


def test_sites_know_what_layers_read(slim):
    found = sites(slim, IMAGE)
    assert found["layer2.0.conv1"].input_shape == (16, 16, 16)
    assert found["layer2.0.conv1"].positions == 8 * 8
    assert found["linear"].input_shape == (64,)
    assert found["linear"].positions == 1


def test_a_latency_table_tells_what_channels_cost():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 1),
        nn.Flatten(),
        nn.Linear(64 * 16 * 16, 2),
    ).eval()
    table = latency_table(sites(net, IMAGE), Platform(), rounds=2, min_seconds=0.001)
    assert table["layer"].tolist() == ["0", "1", "2", "3", "5"]
    assert table["kernel"].tolist() == ["3×3", "3×3", "3×3", "1×1", "linear"]
    assert (table[["ms", "ms_half_outputs", "ms_half_inputs"]] > 0).all(axis=None)
    assert (table[["ms_per_output", "ms_per_input"]] >= 0).all(axis=None)
    costs = measured(table)(sites(net, IMAGE))
    row = table.iloc[1]
    assert costs["1"] == (row["ms_per_output"], row["ms_per_input"], row["ms"])
    assert row["ms_per_output"] == max(row["ms"] - row["ms_half_outputs"], 0) / 32


def test_a_latency_table_of_rounded_widths():
    """Sixteen channels go together or not at all, and none take no time."""
    net = nn.Sequential(nn.Conv2d(16, 48, 3, padding=1)).eval()
    table = latency_table(sites(net, torch.zeros(1, 16, 8, 8)), Platform(), 16, 2, 0.001)
    row = table.iloc[0]
    assert row["ms_half_inputs"] == 0
    assert row["ms_per_input"] == row["ms"] / 16
    assert row["ms_half_outputs"] > 0
    assert row["ms_per_output"] == max(row["ms"] - row["ms_half_outputs"], 0) / 32


def test_tables_of_other_models():
    table = pd.DataFrame({"layer": ["a"], "ms": [9], "ms_per_output": [1], "ms_per_input": [1]})
    with pytest.raises(UsageError, match="of another model: it lacks '0'"):
        measured(table)(sites(nn.Sequential(nn.Conv2d(3, 4, 1)), IMAGE))


def test_counting_costs_needs_no_change(slim):
    before = count_params(slim)
    sites(slim, IMAGE)
    assert count_params(slim) == before
    assert not any(module._forward_hooks for module in slim.modules())
