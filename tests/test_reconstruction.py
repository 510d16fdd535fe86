"""Least squares: as good as they can be, and nothing where nothing is wrong."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from strategies import residual_networks, scramble
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from rmprune import reconstruction
from rmprune.graph import parse
from rmprune.models import create_model
from rmprune.narrowing import narrow
from rmprune.reconstruction import block_sums, by_batch, heirs, reconstruct
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import add_shortcut_bn, scales_of

BATCHES = list(torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double())


@pytest.fixture(scope="module")
def slim():
    torch.manual_seed(0)  # fixtures of a module come before the seed of its tests
    model = scramble(create_model("resnet20")).double()
    update_bn(BATCHES, model)
    return add_shortcut_bn(model.eval(), BATCHES)


def pruned(slim, **off):
    """The model without some channels of some BNs."""
    keep = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scales_of(slim).items()}
    for name, channels in off.items():
        keep[name.replace("__", ".")][channels] = False
    model = copy.deepcopy(slim)
    apply_masks(model, Masks(keep))
    narrow(model, Masks(keep))
    return model


def error(model, sums):
    found, wanted = block_sums(model, BATCHES), heirs(sums, parse(model).blocks)
    return {name: (found[name] - sums[wanted[name]]).square().mean().item() for name in found}


def test_a_whole_model_stays(slim):
    model = pruned(slim)
    before = copy.deepcopy(model.state_dict())
    sums = block_sums(slim, BATCHES)
    reconstruct(model, sums, BATCHES, sums)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_no_linear_regression_is_better(slim, monkeypatch):
    """Of the first block that lost channels, against scikit-learn on the same patches."""
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-9)
    sums = block_sums(slim, BATCHES)
    model = pruned(slim, layer1__0__bn1=slice(0, 10))
    name = parse(model).blocks[0].add.name
    bad = error(model, sums)[name]
    with torch.no_grad(), by_batch(model):
        hidden = [
            model.layer1.get_submodule("0.relu1")(
                model.get_submodule("layer1.0.bn1")(model.get_submodule("layer1.0.conv1")(x))
            )
            for x in (model.relu(model.bn1(model.conv1(b))) for b in BATCHES)
        ]
        heads = [
            model.get_submodule("layer1.0.shortcut_bn")(model.relu(model.bn1(model.conv1(b))))
            for b in BATCHES
        ]
    columns = [F.unfold(h, 3, padding=1).unflatten(2, h.shape[2:]) for h in hidden]
    patches = reconstruction._sampled(columns).T.numpy()
    whole, made = sums[name], block_sums(model, BATCHES)[name]
    wanted = torch.where(whole > 0, whole, made.clamp(max=0))  # a ReLU reads it
    target = (wanted - reconstruction._sampled(heads)).T.numpy()
    best = LinearRegression().fit(patches, target)
    least = np.square(best.predict(patches) - target).mean()
    reconstruct(model, sums, BATCHES, sums)
    found = (block_sums(model, BATCHES)[name] - wanted).square().mean().item()
    assert least < bad
    assert found == pytest.approx(least, rel=0.02)  # samples are not all


def test_a_block_takes_over_from_the_one_behind(slim):
    sums = block_sums(slim, BATCHES)
    model = pruned(slim, layer2__1__bn1=slice(None), layer2__1__bn2=slice(None))
    added = list(sums)
    wanted = heirs(sums, parse(model).blocks)
    assert wanted[added[3]] == added[4]
    assert added[4] not in wanted
    before = error(model, sums)[added[3]]
    reconstruct(model, sums, BATCHES, sums)
    assert error(model, sums)[added[3]] < 0.9 * before


def test_what_the_fitted_model_makes(slim):
    sums = block_sums(slim, BATCHES)
    model = pruned(slim, layer1__0__bn1=slice(0, 8), layer3__1__bn1=slice(0, 32))
    outputs = reconstruct(model, sums, BATCHES, sums)
    with torch.no_grad(), by_batch(model):
        torch.testing.assert_close(outputs, [model(batch) for batch in BATCHES])


def test_only_what_is_named_changes(slim):
    sums = block_sums(slim, BATCHES)
    model = pruned(slim, layer1__0__bn1=slice(0, 8), layer3__1__bn1=slice(0, 32))
    before = copy.deepcopy(model.state_dict())
    reconstruct(model, sums, BATCHES, {parse(model).blocks[7].add.name})
    changed = {
        n.rpartition(".")[0] for n, v in model.state_dict().items() if not v.equal(before[n])
    }
    assert {name.partition(".parametrizations")[0] for name in changed} == {
        "layer3.1.conv2",
        "layer3.1.bn2",
    }


@settings(max_examples=30)
@given(residual_networks(), st.sampled_from([0.3, 0.8, 1.2]), st.sampled_from(["plain", "auto"]))
def test_random_networks(model, threshold, lowering):
    x = [torch.randn(4, 3, 13, 10).double()]
    slim = scramble(add_shortcut_bn(model)).double().eval()
    masks = select(slim, threshold, lowering=lowering)
    sums = block_sums(slim, x)
    left = copy.deepcopy(slim)
    apply_masks(left, masks)
    narrow(left, masks)
    statistics = {n: b.clone() for n, b in left.named_buffers()}
    training = left.training
    reconstruct(left, sums, x, sums)
    assert left.training == training
    for name, buffer in left.named_buffers():
        assert buffer.equal(statistics[name])
    assert torch.isfinite(left(x[0])).all()
    for name, mask in masks.keep.items():  # what is off stays off
        bn = dict(left.named_modules()).get(name)
        if bn is not None and len(bn.weight) == len(mask):
            assert not bn.weight[~mask].any()
            assert not bn.bias[~mask].any()
