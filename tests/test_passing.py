"""Empty blocks: which are, and that nothing is lost when they are left out."""

import copy

import pytest
import torch
from strategies import scramble
from torch import nn

from rmprune.convert import convert
from rmprune.graph import parse
from rmprune.models import create_model
from rmprune.narrowing import narrow
from rmprune.passing import empty_blocks
from rmprune.rewrite import collapse
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import add_shortcut_bn, scales_of

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def slimmable(seed=0):
    """With scales of both signs, and shortcut BNs that are no identities."""
    torch.manual_seed(seed)
    return scramble(add_shortcut_bn(create_model("resnet20"))).double().eval()


def without(slim, *bodies, reserved_off=()):
    keep = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scales_of(slim).items()}
    for body in bodies:
        keep[f"{body}.bn1"][:] = keep[f"{body}.bn2"][:] = False
    for name, channel in reserved_off:
        keep[name][channel] = False
    return Masks(keep)


def names(slim, masks):
    return [block.add.name for block, *_ in empty_blocks(parse(slim), masks.keep)]


def test_blocks_that_only_scale_are_found():
    slim = slimmable()
    blocks = [block.add.name for block in parse(slim).blocks]
    # A strided block without a body still subsamples.
    masks = without(slim, "layer1.1", "layer2.0", "layer3.1", "layer3.2")
    assert names(slim, masks) == [blocks[1], blocks[7], blocks[8]]
    assert names(slim, without(slim)) == []


def test_another_activation_is_no_second_relu():
    model = create_model("resnet20")
    model.layer1[1].relu2 = nn.ReLU6()
    slim = add_shortcut_bn(model).eval()
    assert names(slim, without(slim, "layer1.1")) == []


@pytest.mark.parametrize("lowering", ["plain", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_the_masked_model_and_the_one_without_the_blocks_are_equal(seed, lowering):
    slim = slimmable(seed)
    scores = {
        n: torch.where(m, 1.0, 0.0)
        for n, m in without(
            slim,
            "layer1.0",
            "layer1.1",
            "layer2.0",
            "layer3.2",
            reserved_off=[("layer3.2.shortcut_bn", 5)],
        ).keep.items()
    }
    masks = select(slim, 0.5, scores=scores, lowering=lowering)
    apply_masks(slim, masks)
    expected = slim(X)
    left = narrow(slim, masks)
    assert "layer1.1.bn1" not in left.keep
    assert len(parse(slim).blocks) == 9 - 3
    assert not any(name.startswith("layer3.2") for name, _ in slim.named_modules())
    torch.testing.assert_close(slim(X), expected, rtol=1e-9, atol=1e-9)
    net = collapse(convert(slim, X, keep_bn=False))
    torch.testing.assert_close(net(X), expected, rtol=1e-9, atol=1e-9)


def test_scales_move_up_and_offsets_go():
    """Without offsets and negative scales there is nothing to lose."""
    slim = slimmable()
    for name, module in slim.named_modules():
        if name.endswith("shortcut_bn"):
            nn.init.uniform_(module.weight, 0.1, 2)
            with torch.no_grad():
                deviation = (module.running_var + module.eps).sqrt()
                module.bias.copy_(module.weight * module.running_mean / deviation)
    masks = without(slim, "layer1.0", "layer2.2", "layer3.1")
    reference = copy.deepcopy(slim)
    with torch.no_grad():
        for name in ("layer1.0", "layer2.2", "layer3.1"):
            reference.get_submodule(f"{name}.bn2").weight.zero_()
            reference.get_submodule(f"{name}.bn2").bias.zero_()
    apply_masks(slim, masks)
    narrow(slim, masks)
    torch.testing.assert_close(slim(X), reference(X), rtol=1e-9, atol=1e-9)


def test_gradients_reach_what_is_left():
    slim = slimmable()
    masks = without(slim, "layer1.1", "layer2.1", "layer2.2")
    apply_masks(slim, masks)
    narrow(slim, masks)
    slim.train()(X).square().mean().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())
    assert len(parse(slim).blocks) == 6
