import copy

import torch
from hypothesis import given, settings
from strategies import residual_networks, scramble

from rmprune.graph import parse
from rmprune.models import create_model
from rmprune.slimming import Penalty, add_shortcut_bn, scale_parameters

X = torch.randn(4, 3, 13, 10, generator=torch.Generator().manual_seed(1)).double()
IMAGE = torch.zeros(1, 3, 32, 32)


@settings(max_examples=50)
@given(residual_networks())
def test_shortcut_bns_leave_the_outputs(model):
    before = copy.deepcopy(model.state_dict())

    slim = add_shortcut_bn(model, [X])

    added = [n for n, m in slim.named_modules() if n.rpartition(".")[2].endswith("shortcut_bn")]
    assert len(added) == len(parse(slim).blocks) >= 1
    torch.testing.assert_close(slim(X), model(X), rtol=0, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_equal_in_float32_accuracy():
    model = scramble(create_model("resnet56")).eval()
    x = X.float()
    expected = model(x)
    scale = expected.abs().max().item()
    torch.testing.assert_close(add_shortcut_bn(model, [x])(x), expected, rtol=0, atol=1e-4 * scale)


def test_statistics_are_those_of_the_blocks_input():
    model = scramble(create_model("resnet20")).double().eval()
    seen = []
    model.layer1[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    slim = add_shortcut_bn(model, [X[:3], X[3:]])
    bn = slim.get_submodule("layer1.1.shortcut_bn")
    model(X)
    values = seen[-1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(bn.running_mean, values.mean(1))
    torch.testing.assert_close(bn.running_var, values.var(1, correction=0))


def test_penalty_is_the_gradient_of_the_l1_norm():
    slim = add_shortcut_bn(scramble(create_model("resnet20"))).train()
    scales = scale_parameters(slim)
    weights = {name: 0.5 + index for index, name in enumerate(scales)}
    torch.manual_seed(0)
    start = {name: torch.randn_like(scale) for name, scale in scales.items()}
    for name, scale in scales.items():
        scale.grad = start[name].clone()

    Penalty(scales, 1e-3, weights).add_to_gradients()

    found = {name: scale.grad - start[name] for name, scale in scales.items()}
    slim.zero_grad()
    sum(1e-3 * weights[name] * scale.abs().sum() for name, scale in scales.items()).backward()
    for name, scale in scales.items():
        torch.testing.assert_close(found[name], scale.grad, rtol=1e-4, atol=1e-7)


def test_every_bn_has_a_scale_and_shortcut_bns_are_included():
    slim = add_shortcut_bn(create_model("resnet20"))
    scales = scale_parameters(slim)
    assert len(scales) == 19 + 9
    assert sum("shortcut_bn" in name for name in scales) == 9
