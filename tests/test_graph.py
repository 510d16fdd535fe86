import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rmprune.errors import ConversionError
from rmprune.graph import Block, PadChannels, Subsample, parse, trace
from rmprune.models import create_model

CONV = nn.Conv2d(4, 4, 3, padding=1)


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("torchvision:resnet34", 16)])
def test_blocks_are_found_in_order(name, blocks):
    chain = parse(trace(create_model(name)))
    assert len(chain.blocks) == blocks
    assert [len(block.convolutions) for block in chain.blocks] == [2] * blocks
    assert [layer.name for layer in chain.blocks[0].convolutions] == [
        "layer1.0.conv1",
        "layer1.0.conv2",
    ]


def test_every_layer_of_the_model_is_in_the_chain():
    model = create_model("resnet20")
    found = {layer.name for layer in parse(trace(model)).layers()}
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    assert convs <= found


def test_option_a_is_subsampling_and_padding():
    block = parse(trace(create_model("resnet20"))).blocks[3]
    subsample, padding = (layer.module for layer in block.shortcut)
    assert isinstance(subsample, Subsample)
    assert isinstance(padding, PadChannels)
    assert (subsample.stride, padding.front, padding.back) == (2, 8, 8)
    x = torch.randn(2, 3, 7, 5)
    assert torch.equal(padding(subsample(x))[:, 8:11], x[:, :, ::2, ::2])


def test_the_model_stays_as_it_is():
    model = create_model("resnet20")
    graph_module = trace(model)
    graph_module.get_submodule("conv1").weight.data.zero_()
    assert model.conv1.weight.abs().sum() > 0


class Signs(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.stem, self.conv = stem, CONV

    def forward(self, x):
        x = self.stem(x)
        return self.conv(x) + x


class Odd(nn.Module):
    """Graphs that are no chain of blocks."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


REFUSALS = {
    "three readers": (lambda m, x: m.a(x) + m.b(x) + x, "read|operands"),
    "read from outside": (lambda m, x: (y := m.a(x)) + x + y, "operands|read"),
    "concatenation": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), "read by 2 nodes"),
    "no shortcut": (lambda m, x: m.a(x) + m.b(x), "neither operand is a shortcut"),
    "no convolution": (lambda _, x: x + F.pad(x, (0,) * 6), "has a convolution"),
    "unknown operation": (lambda m, x: torch.fft.fft2(m.a(x)).real, "fft"),
    "squeezing": (lambda m, x: m.a(x)[:, :, ::2, ::3], "getitem"),
    "reflections": (lambda m, x: F.pad(m.a(x), (1, 1, 1, 1), "reflect"), "pad"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_graphs_are_refused_by_node_and_reason(case):
    forward, message = REFUSALS[case]
    with pytest.raises(ConversionError, match=message) as caught:
        parse(trace(Odd(forward)))
    assert caught.value.node
    assert "\n" not in str(caught.value)


def test_two_inputs():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(ConversionError, match="the model has 2 inputs; it needs one"):
        parse(trace(Two()))


def test_a_block_has_a_fork_and_an_addition():
    (block,) = parse(trace(Signs(nn.ReLU()))).blocks
    assert isinstance(block, Block)
    assert block.shortcut == ()
    assert block.fork.name in ("stem", "relu")
