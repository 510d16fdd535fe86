import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from rmprune.layers import (
    FUNCTIONS,
    OPEN,
    ChannelGate,
    Clamp,
    PartialActivation,
    function_name,
)

X = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
}


def test_every_function_has_its_module():
    assert MODULES.keys() == FUNCTIONS.keys()
    for name, module in MODULES.items():
        assert function_name(module) == name
        assert torch.equal(FUNCTIONS[name](9 * X), module(9 * X))
    assert function_name(nn.Hardtanh(0, 6)) == "relu6"
    assert function_name(nn.Softplus()) is None


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_open_gates_are_exactly_one(name, dtype):
    assert FUNCTIONS[name](torch.tensor(OPEN[name], dtype=dtype)).item() == 1.0


def test_partial_activation_passes_the_others():
    layer = PartialActivation("silu", 6)
    layer.acts[[1, 4, 5]] = False
    y = layer(X)
    assert torch.equal(y[:, [1, 4, 5]], X[:, [1, 4, 5]])
    torch.testing.assert_close(y[:, [0, 2, 3]], F.silu(X[:, [0, 2, 3]]))
    layer.keep(torch.tensor([1, 2]))
    assert torch.equal(layer(X[:, [1, 2]]), y[:, [1, 2]])
    assert "silu, 1 of 2 channels" in str(layer)


def gate_of_torchvision():
    reference = torchvision.ops.SqueezeExcitation(6, 3).eval()
    gate = ChannelGate((6, 3, 6), ("relu", "sigmoid"))
    for place, conv in enumerate((reference.fc1, reference.fc2)):
        setattr(gate, f"weight{place}", nn.Parameter(conv.weight.detach()[:, :, 0, 0]))
        setattr(gate, f"bias{place}", nn.Parameter(conv.bias.detach()))
    return gate, reference


def test_gate_is_torchvisions():
    gate, reference = gate_of_torchvision()
    torch.testing.assert_close(gate(X), reference(X))


def test_a_widened_gate_lets_the_others_pass():
    gate, reference = gate_of_torchvision()
    places = torch.tensor([7, 1, 2, 5, 4, 0])
    x = 30 * torch.randn(2, 9, 5, 4)
    y = gate.widened(places, 9)(x)
    torch.testing.assert_close(y[:, places], reference(x[:, places]))
    assert torch.equal(y[:, [3, 6, 8]], x[:, [3, 6, 8]])


def test_a_gate_keeps_channels():
    gate, _ = gate_of_torchvision()
    with torch.no_grad():
        gate.weight0[:, [0, 3]] = 0
    assert gate.squeezed().tolist() == [False, True, True, False, True, True]
    y = gate(X)
    kept = torch.tensor([1, 2, 4, 5])
    gate.keep(kept)
    torch.testing.assert_close(gate(X[:, kept]), y[:, kept])
    assert gate.sizes == (4, 3, 4)


def test_a_gate_of_one_map_keeps_channels():
    gate = ChannelGate((3, 3), ("hardsigmoid",))
    nn.init.normal_(gate.weight0)
    with torch.no_grad():
        gate.weight0[:, 1] = 0
    x = X[:, :3]
    y = gate(x)
    gate.keep(torch.tensor([0, 2]))
    torch.testing.assert_close(gate(x[:, [0, 2]]), y[:, [0, 2]])


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        ChannelGate((6, 3), ("relu", "sigmoid"))


def test_a_clamp_computes_what_the_activation_does():
    x = 10 * torch.randn(2, 6, 4, 4)
    some = torch.tensor([True, False, True, True, False, False])
    prelu = nn.PReLU(6)
    prelu.weight = nn.Parameter((~some).float())
    activations = [prelu]
    for name in ("relu", "relu6"):
        activations.append(PartialActivation(name, 6))
        activations[-1].acts = some
    for activation in activations:
        for dtype in (torch.float32, torch.float64):
            clamp = Clamp.of(activation.to(dtype), dtype)
            assert torch.equal(clamp(x.to(dtype)), activation(x.to(dtype)))
            assert torch.equal(clamp(x[..., 0, 0].to(dtype)), clamp(x.to(dtype))[..., 0, 0])


def test_other_activations_are_no_clamps():
    partial = PartialActivation("silu", 6)
    for activation in (nn.ReLU(), nn.PReLU(1), nn.PReLU(6), partial, nn.Conv2d(6, 6, 1)):
        assert Clamp.of(activation, torch.float32) is None
