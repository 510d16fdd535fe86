"""PNNH's blocks: plain layers that train like residual ones.

Zhang et al. 2024, "Peeking Behind the Curtains of Residual Learning" (arXiv 2402.08645). A block
computes ``y = ReLU(learner(x) + coder(x))``. The learner is trained and has the hidden channels
that the `Coder` leaves; the coder is frozen, and one for all blocks of a stage. In evaluation
mode a block equals plain layers whose weights are ``[learner; encoder]`` in the first and
``[learner | decoder]`` in the last: what `rmprune.convert` makes of it.

The paper leaves open which kernels a coder has, whether its two layers are tied, and what stands
in blocks that change the shape; see `Coding`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rmprune.models.cifar_resnet import OptionAShortcut
from rmprune.models.coder import Coder

Transition = Literal["learner", "coder", "full"]


@dataclass(frozen=True)
class Coding:
    """How the coders of a network are made.

    Attributes:
        kernel_size: Of encoder and decoder, odd.
        tied: Whether the decoder has the encoder's kernels, transposed.
        transition: What stands in a block that changes the shape, where the coder cannot read
            the input. ``"learner"``: it alone, as narrow as elsewhere. ``"coder"``: besides,
            the stage's coder of the input that is subsampled and padded with zero channels.
            ``"full"``: the learner alone, with all hidden channels.
    """

    kernel_size: int = 1
    tied: bool = False
    transition: Transition = "learner"


@dataclass(frozen=True)
class BlockKind:
    """What the blocks of a network are made of.

    Attributes:
        convolutions: Of a learner, for its input, hidden and output channels and its stride.
        hidden: Hidden channels of a block, for its input and output channels.
        coded: How many of them are the coder's.
    """

    convolutions: Callable[[int, int, int, int], Sequence[nn.Conv2d]]
    hidden: Callable[[int, int], int]
    coded: Callable[[int, int], int]

    def learner(
        self, n_in: int, n_out: int, stride: int = 1, coded: int = 0, norms: int = 1
    ) -> nn.Sequential:
        """Convolutions with ReLUs between them.

        Args:
            n_in: Input channels.
            n_out: Output channels.
            stride: Of the block.
            coded: Hidden channels that are left to the coder.
            norms: How many convolutions have a BN behind them, from the first one on: in PNNH
                one (appendix D).
        """
        convolutions = self.convolutions(n_in, self.hidden(n_in, n_out) - coded, n_out, stride)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for place, layer in enumerate(convolutions, 1):
            layers[f"conv{place}"] = layer
            if place <= norms:
                layers[f"bn{place}"] = nn.BatchNorm2d(layer.out_channels)
            if place < len(convolutions):
                layers[f"relu{place}"] = nn.ReLU()
        return nn.Sequential(layers)


def conv(n_in: int, n_out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the shape but for its stride, of random weights."""
    padding = kernel_size // 2
    layer = nn.Conv2d(n_in, n_out, kernel_size, stride, padding, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _basic(n_in: int, hidden: int, n_out: int, stride: int) -> list[nn.Conv2d]:
    return [conv(n_in, hidden, 3, stride), conv(hidden, n_out, 3)]


def _bottleneck(n_in: int, hidden: int, n_out: int, stride: int) -> list[nn.Conv2d]:
    return [conv(n_in, hidden, 1), conv(hidden, hidden, 3, stride), conv(hidden, n_out, 1)]


def _inverted(n_in: int, hidden: int, n_out: int, stride: int) -> list[nn.Conv2d]:
    depthwise = conv(hidden, hidden, 3, stride, groups=hidden)
    return [conv(n_in, hidden, 1), depthwise, conv(hidden, n_out, 1)]


# Plain, the 3×3 convolution of a bottleneck or inverted residual copies the coder's channels.
BASIC = BlockKind(_basic, lambda _, n_out: n_out, lambda _, n_out: n_out // 2)
BOTTLENECK = BlockKind(_bottleneck, lambda _, n_out: n_out // 4, lambda _, n_out: n_out // 8)
INVERTED_RESIDUAL = BlockKind(_inverted, lambda n_in, _: 6 * n_in, lambda _, n_out: n_out // 2)


class Block(nn.Module):
    """``y = ReLU(learner(x) + coder(entry(x)))``.

    Args:
        learner: Without an activation behind it.
        entry: Gives the coder's input the shape of the output; None leaves the coder out.
    """

    def __init__(self, learner: nn.Module, entry: nn.Module | None) -> None:
        super().__init__()
        self.learner = learner
        self.entry = entry
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, coder: nn.Module | None) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y = self.learner(x)
        if coder is not None and self.entry is not None:
            y = y + coder(self.entry(x))
        rectified: Tensor = self.relu(y)
        return rectified


class Stage(nn.Module):
    """Blocks one behind the other that share a coder.

    Args:
        blocks: In order.
        coder: For ``(N, out, H, W)``; None leaves the learners alone.
    """

    def __init__(self, blocks: Sequence[Block], coder: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.coder = coder

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        for block in self.blocks:
            x = block(x, self.coder)
        return x


def stage(
    kind: BlockKind, n_in: int, n_out: int, depth: int, stride: int, coding: Coding | None
) -> Stage:
    """A stage of plain blocks.

    Args:
        kind: Of its blocks.
        n_in: Input channels.
        n_out: Output channels.
        depth: How many blocks; the first one changes the shape.
        stride: Of the first block.
        coding: Of the coder. Without one the learners have all hidden channels, and a BN
            behind every convolution.
    """
    shapes = [(n_in, n_out, stride), *[(n_out, n_out, 1)] * (depth - 1)]
    if coding is None:
        return Stage([Block(kind.learner(*shape, norms=3), None) for shape in shapes])
    coded = kind.coded(n_out, n_out)
    blocks = []
    for shape in shapes:
        keeps_shape = shape == (n_out, n_out, 1)
        is_full = not keeps_shape and coding.transition == "full"
        learner = kind.learner(*shape, coded=0 if is_full else coded)
        entry: nn.Module | None = None
        if keeps_shape:
            entry = nn.Identity()
        elif coding.transition == "coder":
            entry = OptionAShortcut(*shape)
        blocks.append(Block(learner, entry))
    return Stage(blocks, Coder.of_images(n_out, coded, coding.kernel_size, coding.tied))


class PlainMlp(nn.Module):
    """A transformer's MLP with PNNH in place of its residual: ``y = learner(x) + coder(x)``.

    It reads tokens, which `rmprune.convert` does not take: `two_linear` is its plain form.

    Args:
        channels: Of a token.
        coder: From as many channels; one for all MLPs of a stage.
        expansion: Hidden channels over channels, the coder's included.
    """

    def __init__(self, channels: int, coder: Coder, expansion: int = 4) -> None:
        super().__init__()
        hidden = expansion * channels - coder.encoder.weight.shape[0]
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.coder = coder

    def forward(self, x: Tensor) -> Tensor:
        """``(…, channels)``; the shape is kept."""
        y: Tensor = self.fc2(self.coder.activation(self.fc1(x))) + self.coder(x)
        return y

    def two_linear(self) -> nn.Sequential:
        """Two linear layers around the activation that compute the same."""
        assert self.coder.decoder is not None  # only convolutions can be tied
        encoder, decoder = self.coder.encoder.weight, self.coder.decoder.weight
        hidden, channels = self.fc1.out_features + len(encoder), self.fc1.in_features
        first, second = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        with torch.no_grad():
            first.weight = nn.Parameter(torch.cat([self.fc1.weight, encoder]))
            first.bias = nn.Parameter(torch.cat([self.fc1.bias, encoder.new_zeros(len(encoder))]))
            second.weight = nn.Parameter(torch.cat([self.fc2.weight, decoder], 1))
            second.bias = nn.Parameter(self.fc2.bias.clone())
        return nn.Sequential(first, self.coder.activation, second)
