"""Scores of channels by their scales and by all of their weights."""

import copy
import math

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import residual_networks, scramble
from torch import nn

from rmprune.blocks import streams
from rmprune.convert import convert
from rmprune.errors import UsageError
from rmprune.graph import parse
from rmprune.importance import by_group_norm, by_scale
from rmprune.models import create_model
from rmprune.pruning import check_importance
from rmprune.removal import prune
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn, scales_of

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def slim():
    torch.manual_seed(0)  # fixtures of a module come before the seed of its tests
    return add_shortcut_bn(scramble(create_model("resnet20")).double().eval(), [X])


def test_scales_over_savings(slim):
    savings = dict.fromkeys(scales_of(slim), 2.0) | {"bn1": 0.0}
    scores = by_scale(slim, savings)
    assert (scores["bn1"] == math.inf).all()
    torch.testing.assert_close(scores["layer1.0.bn1"], scales_of(slim)["layer1.0.bn1"] / 2)
    assert select(slim, 0.3, scores=scores).keep["bn1"].all()


def test_thresholds_are_on_scales():
    with pytest.raises(UsageError, match="name a --target"):
        check_importance("loss")


@settings(max_examples=15)
@given(residual_networks(shortcuts=("identity", "projection")))
def test_group_norms_are_those_of_torch_pruning(model):
    compare_with_torch_pruning(model, torch.randn(2, 3, 13, 10).double())


def compare_with_torch_pruning(model, example):
    scores = by_group_norm(add_shortcut_bn(model))
    (outputs,) = (m for m in model.modules() if isinstance(m, nn.Linear))
    graph = tp.DependencyGraph().build_dependency(model, example)
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    names = {module: name for name, module in model.named_modules()}
    compared = set()
    for group in graph.get_all_groups(ignored_layers=[outputs]):
        expected = importance(group).double()
        for dependency, _ in group:
            name = names.get(dependency.layer)
            if name in scores:
                torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=1e-5)
                compared.add(name)
    assert compared == set(names.values()) & scores.keys()


@pytest.mark.parametrize("name", ["mobilenetv2_rm", "torchvision:mnasnet1_0"])
def test_group_norms_beside_depthwise_convolutions(name):
    model = scramble(create_model(name)).double().eval()
    compare_with_torch_pruning(model, torch.randn(2, 3, 32, 32).double())


def test_what_no_bn_makes_stays():
    """As the image, which a RepVGG block in front reads and carries."""
    model = add_shortcut_bn(scramble(create_model("rmnext26x2_64_cifar")).double().eval(), [X])
    scores = by_group_norm(model)
    heads = [block.shortcut[0].name for block in parse(model).blocks]
    assert [name for name in heads if torch.isinf(scores[name]).any()] == heads[:1]
    masks = select(model, 0.9, scores=scores, lowering="auto")
    assert masks.keep[heads[0]].all()


def test_channels_carried_by_option_a_go_with_either_stream(slim):
    scores = by_group_norm(slim)
    before, behind = scores["bn1"], scores["layer2.0.bn2"]
    both = torch.minimum(before, behind[8:24])  # 16 channels, 8 zeros on either side
    torch.testing.assert_close(scores["layer2.0.shortcut_bn"], both)


@settings(max_examples=15)
@given(st.integers(1, 8), st.floats(0, 0.95))
def test_tensors_keep_multiples_and_no_body_goes(slim, round_to, threshold):
    scores = by_group_norm(slim, round_to)
    for stream in streams(parse(slim)):
        made = [name for name in stream if not name.endswith("shortcut_bn")]
        left = (scores[made[0]] >= threshold).sum()
        assert left > 0
        assert left % round_to in (0, len(scores[made[0]]) % round_to)
        assert all(torch.equal(scores[name], scores[made[0]]) for name in made)
    masks = select(slim, threshold, scores=scores, lowering="auto", round_to=round_to)
    assert all(masks.keep[f"layer{s}.{b}.bn1"].any() for s in (1, 2, 3) for b in (0, 1, 2))


def test_the_largest_norm_of_those_left_is_one(slim):
    model = copy.deepcopy(slim)
    bn = model.get_submodule("layer1.0.bn1")
    largest = by_group_norm(model)["layer1.0.bn1"].argmax()
    bn.weight.data[largest] = 0
    scores = by_group_norm(model)["layer1.0.bn1"]
    assert scores[largest] == 0
    assert scores.max() == 1
    bn.weight.data.zero_()
    assert (by_group_norm(model)["layer1.0.bn1"] == 0).all()


def test_what_is_off_has_no_norm():
    masked = add_shortcut_bn(scramble(create_model("resnet20")).double().eval(), [X])
    scores = by_group_norm(masked, 8)
    masks = select(masked, 0.9, scores=scores, lowering="auto", round_to=8)
    apply_masks(masked, masks)
    again = by_group_norm(masked, 8)
    for name in ("bn1", "layer1.0.bn1", "layer2.1.bn2", "layer3.2.bn2"):
        assert torch.equal(again[name] > 0, masks.keep[name])
    net = prune(convert(masked, X))
    assert net.linear.in_features == int(masks.keep["layer3.2.bn2"].sum())
