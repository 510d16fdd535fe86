"""Masks: what is selected, that it stays off, and that the plain net agrees."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import residual_networks, scramble
from torch import nn

from rmprune.convert import convert
from rmprune.errors import PruningError, UsageError
from rmprune.graph import parse
from rmprune.models import create_model
from rmprune.removal import prune
from rmprune.rewrite import collapse
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import add_shortcut_bn, scale_parameters

X = torch.randn(2, 3, 13, 10, generator=torch.Generator().manual_seed(0)).double()
thresholds = st.sampled_from([0.0, 0.3, 0.7, 1.1, 1.4, 9.0])


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1)
    )


def slimmable(model):
    return scramble(add_shortcut_bn(model)).double().eval()


@settings(max_examples=200)
@given(residual_networks(), thresholds)
@pytest.mark.filterwarnings("ignore:all channels of layer")
def test_what_is_off_leaves_without_a_trace(model, threshold):
    slim = slimmable(model)
    masks = select(slim, threshold)
    apply_masks(slim, masks)

    plain = convert(slim, X)
    pruned = prune(plain)

    assert_same(pruned(X), slim(X))
    assert_same(collapse(pruned)(X), slim(X))
    # A block of one convolution merges at once, and no layer carries its shortcut's channels.
    if masks.removed and all(len(block.convolutions) == 2 for block in parse(slim).blocks):
        parameters = [sum(p.numel() for p in net.parameters()) for net in (pruned, plain)]
        assert parameters[0] < parameters[1]
    # Nothing that the masks switched off is left: own and reserved channels of each block.
    for block in parse(slim).blocks:
        units = [layer.name for layer in block.convolutions]
        name = units[0].replace(".", "_")
        if len(units) == 2 and name in pruned.widths:
            reserved = masks.keep[block.shortcut[0].name].sum()
            assert pruned.widths[name].reserved <= max(int(reserved), 1)


@settings(max_examples=100)
@given(residual_networks(), thresholds)
def test_selection_follows_the_scales(model, threshold):
    slim = slimmable(model)
    scales = {name: scale.abs() for name, scale in scale_parameters(slim).items()}

    masks = select(slim, threshold)

    follow_others = set()  # a block's last BN, and those of its shortcut
    for block in parse(slim).blocks:
        head = block.shortcut[0].name
        kept = masks.keep[head]
        assert not (kept & (scales[head] < threshold)).any()
        last = [layer.name for layer in block.body if isinstance(layer.module, nn.BatchNorm2d)][-1]
        follow_others |= {last, *(layer.name for layer in block.shortcut)}
        # An output whose own scale is high enough goes only with its whole block's body.
        own = scales[last] >= threshold
        bodies = [masks.keep[layer.name] for layer in block.body if layer.name in masks.keep]
        if all(bool(mask.any()) for mask in bodies[:-1]):
            assert not (own & ~masks.keep[last]).any()
        assert masks.keep[last].any()
    for name, mask in masks.keep.items():
        high = scales[name] >= threshold
        if name not in follow_others and name not in masks.forced:
            assert not (mask & ~high).any()


def test_threshold_zero_removes_nothing():
    masks = select(slimmable(create_model("resnet20")), 0)
    assert masks.removed == 0
    assert masks.channels == 976
    assert masks.forced == ()


def test_higher_thresholds_keep_fewer():
    slim = slimmable(create_model("resnet20"))
    removed = [select(slim, threshold).removed for threshold in (0.1, 0.4, 0.8, 1.2)]
    assert removed == sorted(set(removed))


def test_a_last_channel_is_kept_and_named():
    slim = slimmable(create_model("resnet20"))
    masks = select(slim, 100)
    assert "bn1" in masks.forced
    bn = slim.get_submodule("bn1")
    assert masks.keep["bn1"].nonzero().flatten().tolist() == [int(bn.weight.abs().argmax())]
    apply_masks(slim, masks)
    assert torch.isfinite(slim(X)).all()


def test_selecting_changes_nothing():
    slim = slimmable(create_model("resnet20"))
    before = copy.deepcopy(slim.state_dict())
    select(slim, 0.7)
    torch.testing.assert_close(slim.state_dict(), before, rtol=0, atol=0)


@settings(max_examples=60)
@given(residual_networks(), st.integers(0, 99))
def test_constants_of_shortcuts_move_on(model, seed):
    """γ = 0 alone and β kept is the reference; masks on shortcuts compute the same."""
    slim = slimmable(model)
    generator = torch.Generator().manual_seed(seed)
    heads = {block.shortcut[0].name for block in parse(slim).blocks}
    keep = {}
    reference = copy.deepcopy(slim)
    for name, scale in scale_parameters(reference).items():
        keep[name] = torch.ones(len(scale), dtype=torch.bool)
        if name in heads:
            keep[name] = torch.rand(len(scale), generator=generator) < 0.5
            with torch.no_grad():
                scale.mul_(keep[name])

    apply_masks(slim, Masks(keep))

    assert_same(slim(X), reference(X))


def test_channels_stay_off_whatever_the_optimizer_does():
    slim = slimmable(create_model("resnet20")).float()
    masks = select(slim, 0.7)
    apply_masks(slim, masks)
    slim.train()
    optimizer = torch.optim.SGD(
        slim.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2
    )
    before = slim.get_submodule("layer1.0.bn1").weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        slim(X.float()).logsumexp(1).sum().backward()
        optimizer.step()
    for name, mask in masks.keep.items():
        bn = slim.get_submodule(name)
        assert not bn.weight[~mask].any()
        assert not bn.bias[~mask].any()
    after = slim.get_submodule("layer1.0.bn1").weight
    kept = masks.keep["layer1.0.bn1"]
    assert (before[kept] != after[kept]).all()


def test_masks_can_be_applied_again():
    slim = slimmable(create_model("resnet20"))
    first, second = select(slim, 0.3), select(slim, 0.7)
    again = copy.deepcopy(slim)
    apply_masks(slim, first)
    apply_masks(slim, second)
    apply_masks(again, second)
    assert_same(slim(X), again(X))


def test_masks_of_another_model():
    masks = select(slimmable(create_model("resnet20")), 0.5)
    with pytest.raises(PruningError, match=r"the masks are of another model: 'layer1\.3\.bn1'"):
        apply_masks(
            slimmable(create_model("resnet20")),
            select(slimmable(create_model("resnet32")), 0.5),
        )
    with pytest.raises(PruningError, match="another model"):
        apply_masks(slimmable(create_model("resnet18")), masks)


@pytest.mark.parametrize("threshold", [-1e-9, float("nan")])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(UsageError, match="the threshold must be finite and not negative"):
        select(slimmable(create_model("resnet20")), threshold)


def test_models_without_shortcut_bns():
    traced = torch.fx.symbolic_trace(create_model("resnet20").eval())
    with pytest.raises(PruningError, match=r"no shortcut BN; call rmprune.add_shortcut_bn"):
        select(traced, 0.5)


@pytest.mark.parametrize("lowering", ["plain", "auto"])
def test_widths_become_multiples(lowering):
    slim = slimmable(create_model("resnet20"))
    x = torch.randn(1, 3, 16, 16).double()
    masks = select(slim, 0.6, lowering=lowering, round_to=8)
    apply_masks(slim, masks)
    pruned = prune(convert(slim, x, keep_bn=False))
    assert masks.removed > select(slim, 0, lowering=lowering).removed
    if lowering == "plain":
        widths = [layer.out_channels for layer in pruned if isinstance(layer, nn.Conv2d)]
        assert all(width % 8 == 0 for width in widths)
    else:
        inner = [mask for name, mask in masks.keep.items() if name.endswith("bn1")]
        assert all(int(mask.sum()) % 8 == 0 for mask in inner)
    assert_same(pruned(x), slim(x))


def test_multiples_of_nothing():
    with pytest.raises(UsageError, match="multiples of 1 or more, not of 0"):
        select(slimmable(create_model("resnet20")), 0.5, round_to=0)


def test_channels_around_depthwise_convolutions_go_together():
    slim = scramble(add_shortcut_bn(create_model("mobilenetv2_rm"))).eval()
    masks = select(slim, 0.75, round_to=8)
    for expand, depthwise in (
        ("features.0.1", "features.1.1"),
        ("features.3.expand.1", "features.3.depthwise.1"),
        ("features.4.expand.1", "features.4.depthwise.1"),
    ):
        assert torch.equal(masks.keep[expand], masks.keep[depthwise])
        scales = [slim.get_submodule(name).weight.abs() for name in (expand, depthwise)]
        both = (scales[0] >= 0.75) & (scales[1] >= 0.75)
        assert (masks.keep[expand] >= both).all()  # some come back for the multiple of 8
        assert masks.keep[expand].sum() - both.sum() < 8
    apply_masks(slim, masks)
    x = torch.randn(1, 3, 16, 16)
    net = prune(convert(slim, x, keep_bn=False))
    widths = [net.widths[f"features_{block}_depthwise_0"] for block in (3, 5, 7, 13)]
    assert all(width.total == width.own and width.total % 8 == 0 for width in widths)
