"""Scores: what goes first is what is missed least for its cost."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import residual_networks, scramble
from torch.optim.swa_utils import update_bn

from rmprune.blocks import inner_bns
from rmprune.convert import convert
from rmprune.costs import body_savings, channel_savings, counted
from rmprune.graph import parse
from rmprune.greedy import _Search, by_loss, spare
from rmprune.models import create_model
from rmprune.removal import prune
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn, scales_of

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def slim():
    torch.manual_seed(0)  # fixtures of a module come before the seed of its tests
    model = scramble(create_model("resnet20")).double()
    update_bn([X], model)  # the statistics that a trained model would have
    return add_shortcut_bn(model.eval(), [X])


@pytest.fixture(scope="module")
def savings(slim):
    return channel_savings(slim, X, counted("macs"), "auto")


@pytest.fixture(scope="module")
def bodies(slim):
    return body_savings(slim, X, counted("macs"), "auto")


def with_masks(slim, masks):
    masked = copy.deepcopy(slim)
    apply_masks(masked, masks)
    return masked


def test_a_body_that_changes_nothing_goes_first(savings, bodies):
    torch.manual_seed(0)
    # More positions than weights that read them, or what is left makes up for anything.
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    model = scramble(create_model("resnet20")).double()
    idle = ("layer2.1", "layer1.2")
    for name in idle:
        torch.nn.init.zeros_(model.get_submodule(f"{name}.bn2").weight)
        torch.nn.init.zeros_(model.get_submodule(f"{name}.bn2").bias)
    update_bn([images], model)
    slim = add_shortcut_bn(model.eval(), [images])
    search = _Search(slim, savings, bodies, [images], "auto", 1)
    whole = {place.conv: place for place in search.places if place.kind == "body"}
    prices = {conv: search.price(place, search.step(place)) for conv, place in whole.items()}
    first = sorted(prices, key=prices.__getitem__)
    assert set(first[:2]) == {f"{name}.conv2" for name in idle}
    search.take(search.step(whole["layer2.1.conv2"]), 1)
    assert not select(slim, 2, scores=search.scores, lowering="auto").keep["layer2.1.bn1"].any()


def test_a_stream_loses_the_same_channels_everywhere(slim, savings, bodies):
    """Also those that reach it through an option-A shortcut, among zero channels."""
    search = _Search(slim, savings, bodies, [X], "auto", 8)
    stream = next(p for p in search.places if p.kind == "stream" and "layer3.0.bn2" in p.bns)
    step = search.step(stream)
    gone = step["layer3.0.bn2"]
    assert len(gone) == 16
    for name in ("layer3.1.bn2", "layer3.2.shortcut_bn", "layer3.2.bn2"):
        assert torch.equal(step[name], gone)
    inside = (gone >= 16) & (gone < 48)  # 32 channels, 16 zeros on either side
    assert torch.equal(step["layer3.0.shortcut_bn"], gone[inside] - 16)
    search.take(step, 1)
    masks = select(slim, 2, scores=search.scores, lowering="auto", round_to=8)
    net = prune(convert(with_masks(slim, masks), X))
    assert net.linear.in_features == 48


def test_the_first_step_is_the_best_of_all(slim, savings, bodies):
    """Against trying every one: a part of a layer or of a stream, or a whole body."""
    model = copy.deepcopy(slim)
    scores = by_loss(model, savings, bodies, [X], lowering="auto")
    first = {name: (score < 2) for name, score in scores.items() if (score < 2).any()}
    search = _Search(slim, savings, bodies, [X], "auto", 1)
    found = [(place, search.step(place)) for place in search.places]
    steps = [step for _, step in found if step is not None]
    prices = [search.price(place, step) for place, step in found if step is not None]
    best = steps[prices.index(min(prices))]
    assert {name: set(mask.nonzero().flatten().tolist()) for name, mask in first.items()} == {
        name: set(channels.tolist()) for name, channels in best.items()
    }
    for before, after in itertools.pairwise(sorted(scores, key=lambda n: scores[n].min().item())):
        assert scores[before].min() <= scores[after].min()


def test_channels_go_in_multiples(slim, savings, bodies):
    scores = by_loss(slim, savings, bodies, [X], lowering="auto", round_to=16)
    for name in inner_bns(parse(slim)):
        for threshold in torch.unique(scores[name]).tolist():
            masks = select(slim, threshold, scores=scores, lowering="auto", round_to=16)
            assert int(masks.keep[name].sum()) % 16 == 0


def test_what_is_spared_keeps_its_better_half_then_all(slim):
    scores = {name: torch.ones(len(scale)) for name, scale in scales_of(slim).items()}
    once = spare(scores, slim, {"layer2.1.bn1": 1, "layer2.1.bn2": 1, "layer1.0.bn1": 1}, 16)
    kept = torch.isinf(once["layer2.1.bn1"])
    assert kept.sum() == 16
    scale = scales_of(slim)["layer2.1.bn1"]
    assert scale[kept].min() >= scale[~kept].max()
    assert torch.isinf(once["layer2.1.bn2"]).all()
    assert torch.isinf(once["layer1.0.bn1"]).all()  # half of 16 is no multiple of 16
    assert torch.isinf(spare(scores, slim, {"layer2.1.bn1": 2}, 16)["layer2.1.bn1"]).all()
    assert torch.isfinite(scores["layer2.1.bn1"]).all()


def test_reserved_channels_cost_plain_nets_only(slim, savings, bodies):
    plain = channel_savings(slim, X, counted("macs"), "plain")
    plain_bodies = body_savings(slim, X, counted("macs"), "plain")
    search = _Search(slim, plain, plain_bodies, [X], "plain", 1)
    reserved = [place for place in search.places if place.kind == "reserved"]
    assert [name for place in reserved for name in place.bns] == [
        f"layer{stage}.{block}.shortcut_bn" for stage in (1, 2, 3) for block in (0, 1, 2)
    ]
    assert len(search.step(reserved[4])["layer2.1.shortcut_bn"]) == 8
    search = _Search(slim, savings, bodies, [X], "auto", 1)
    assert not any(place.kind == "reserved" for place in search.places)


@settings(max_examples=15)
@given(residual_networks(), st.sampled_from(["plain", "auto"]))
def test_random_networks(model, lowering):
    slim = scramble(add_shortcut_bn(model)).double().eval()
    x = torch.randn(2, 3, 13, 10).double()
    savings = channel_savings(slim, x, counted("macs"), lowering)
    savings = {name: savings.get(name, 1.0) for name in scales_of(slim)}
    bodies = body_savings(slim, x, counted("macs"), lowering)
    before = copy.deepcopy(slim.state_dict())
    scores = by_loss(slim, savings, bodies, [x], lowering=lowering)
    for name, score in scores.items():
        assert score.shape == scales_of(slim)[name].shape
        assert (score >= 1).all()
    torch.testing.assert_close(slim.state_dict(), before, rtol=0, atol=0)
    removed = [select(slim, t, scores=scores, lowering=lowering).removed for t in (0, 2, 4, 8, 1e9)]
    assert removed == sorted(removed)
