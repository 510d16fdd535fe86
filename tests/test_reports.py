import re

import pandas as pd
import pytest
import torch
from strategies import scramble
from torch import nn

from rmprune.backends import Platform
from rmprune.convert import convert
from rmprune.measure import count_macs, count_params
from rmprune.models import create_model
from rmprune.plots import plot_run
from rmprune.removal import prune
from rmprune.reports import as_text, compare, environment, layer_table
from rmprune.rewrite import fold_bn

X = torch.zeros(1, 3, 32, 32)
pytestmark = pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning")


@pytest.fixture(scope="module")
def net():
    plain = convert(scramble(create_model("resnet20")).eval(), X)
    bn = dict(plain.named_children())["layer2_1_bn1"]
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias):
            tensor[:5] = 0
            tensor[-7:] = 0
    return fold_bn(prune(plain))


def test_layer_table_tells_what_became_of_every_layer(net):
    table = layer_table(net).set_index("layer")
    assert len(table) == 20
    row = table.loc["layer2_1_conv1"]
    assert (row["channels_before"], row["channels"]) == (64, 52)
    assert (row["reserved_before"], row["reserved"]) == (32, 25)
    assert row["params"] == 52 * 32 * 9 + 52
    assert table["macs"].sum() == count_macs(net, X)
    assert table["params"].sum() == count_params(net)


def test_layer_table_of_a_collapsed_layer(net):
    children = dict(net.named_children())
    del children["layer3_1_conv1"]
    from collections import OrderedDict

    shorter = net.with_layers(OrderedDict(children))
    shorter.input_shape = None
    table = layer_table(shorter).set_index("layer")
    assert table.loc["layer3_1_conv1", "channels"] == 0
    assert table.loc["layer3_1_conv1", "channels_before"] == 128


def test_compare_measures_all_in_one_run(tiny):
    torch.manual_seed(0)
    small = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
    big = nn.Sequential(nn.Conv2d(3, 64, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    big = nn.Sequential(big, nn.Linear(64, 10)).eval()
    table = compare({"big": big, "small": small}, torch.zeros(1, 3, 8, 8), tiny)
    assert table["model"].tolist() == ["big", "small"]
    assert table["params"].tolist() == [3 * 64 * 25 + 64 + 650, 40]
    assert table["speedup"][0] == 1
    assert table["speedup"][1] == pytest.approx(table["latency_ms"][0] / table["latency_ms"][1])
    assert table["accuracy"].between(0, 1).all()


def test_as_text_is_readable():
    table = pd.DataFrame(
        {
            "model": ["a", "b"],
            "accuracy": [0.91734, None],
            "params": [272474, 1],
            "macs": [40551040, 5],
            "latency_ms": [1.5, 0.751],
            "speedup": [1.0, 2.0],
        }
    )
    text = as_text(table)
    for part in ("91.73%", "–", "272,474", "40.55", "1.50", "0.75", "2.00×", "MMACs", "speed-up"):
        assert part in text


def test_environment_names_what_figures_depend_on():
    found = environment(Platform(threads=3))
    assert found["threads"] == 3
    assert found["hardware"]
    assert re.fullmatch(r"torch \d+\.\d+.*", found["backend"])


def test_plot_run(net, tmp_path):
    metrics = pd.DataFrame(
        {
            "stage": ["sparse"] * 3 + ["finetuned"] * 2,
            "epoch": [1, 2, 3, 1, 2],
            "test_accuracy": 0.5,
        }
    )
    plot_run(metrics, net, tmp_path / "deep" / "run.png")
    assert (tmp_path / "deep" / "run.png").read_bytes().startswith(b"\x89PNG")
