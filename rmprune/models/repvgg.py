"""RepVGG (Ding et al. 2021, arXiv 2101.03697), alone and with reserving and merging.

Three branches with a BN each, a 3×3 and a 1×1 convolution and the identity, train better than
one and convert exactly into one 3×3 convolution. RMNet (arXiv 2111.00687, section 4.3, Figure 5)
lets deep ones train by reserving: in every other block a share of the channels passes by, and
the block computes the rest. Converted, the network has the same layers for every share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmprune.errors import UsageError


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride and may change the width."""

    width: int
    blocks: int
    stride: int


class RepBlock(nn.Module):
    """``relu(cat[x[:, :r], BN(3×3 x) + BN(1×1 x) + BN(x[:, r:])])``.

    Args:
        n_in: Input channels.
        n_out: Output channels. The identity branch is there where the shape stays.
        stride: Of both convolutions.
        groups: Of both convolutions.
        reserved: r, channels that pass by (RMNet, Figure 5); the convolutions then compute
            ``n_out - r``. Needs the identity's shape.
    """

    def __init__(
        self, n_in: int, n_out: int, stride: int = 1, groups: int = 1, reserved: int = 0
    ) -> None:
        super().__init__()
        computed = n_out - reserved
        self.conv3 = nn.Conv2d(n_in, computed, 3, stride, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(computed)
        self.conv1 = nn.Conv2d(n_in, computed, 1, stride, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(computed)
        keeps_shape = n_in == n_out and stride == 1
        self.bn0 = nn.BatchNorm2d(computed) if keeps_shape else None
        self.reserved = reserved
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        if self.bn0 is not None:
            y = y + self.bn0(x[:, self.reserved :] if self.reserved else x)
        if self.reserved:
            y = torch.cat([x[:, : self.reserved], y], 1)
        total: Tensor = self.relu(y)
        return total


class RepVGG(nn.Module):
    """Stages of RepBlocks, global average pooling, one linear layer.

    Args:
        stages: From input to output; the first block reads 3 channels.
        num_classes: Outputs.
        ratio: Share of the channels that a block reserves, in [0, 1): in each stage, of the
            blocks that keep the shape, the first of every pair. 0 is RepVGG.
        groups: Of every other block's convolutions, counted from the third block on.

    Raises:
        UsageError: The ratio is not in [0, 1).
    """

    def __init__(
        self, stages: Sequence[Stage], num_classes: int = 10, ratio: float = 0.0, groups: int = 1
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise UsageError(f"a block reserves a share in [0, 1) of its channels, not {ratio:g}")
        blocks: list[nn.Module] = []
        n_in = 3
        for width, count, stride in stages:
            for place in range(count):
                is_grouped = len(blocks) > 0 and len(blocks) % 2 == 0
                blocks.append(
                    RepBlock(
                        n_in,
                        width,
                        stride if place == 0 else 1,
                        groups if is_grouped else 1,
                        int(width * ratio) if place % 2 == 1 and place + 1 < count else 0,
                    )
                )
                n_in = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(n_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.linear(self.flatten(self.pool(self.blocks(x))))
        return logits


# Depths of Table 2; widths are 64, 128 and 256 times a, and 512 times b (Table 2, section 4.1).
A, B = (2, 4, 14, 1), (4, 6, 16, 1)
VARIANTS = {
    "repvgg_a0": (A, 0.75, 2.5, 1),
    "repvgg_a1": (A, 1, 2.5, 1),
    "repvgg_a2": (A, 1.5, 2.75, 1),
    "repvgg_b0": (B, 1, 2.5, 1),
    "repvgg_b1": (B, 2, 4, 1),
    "repvgg_b1g2": (B, 2, 4, 2),
    "repvgg_b1g4": (B, 2, 4, 4),
    "repvgg_b2": (B, 2.5, 5, 1),
    "repvgg_b2g2": (B, 2.5, 5, 2),
    "repvgg_b2g4": (B, 2.5, 5, 4),
    "repvgg_b3": (B, 3, 5, 1),
    "repvgg_b3g2": (B, 3, 5, 2),
    "repvgg_b3g4": (B, 3, 5, 4),
}
DEEP = {21: 4, 37: 8, 69: 16, 133: 32}  # layers to blocks of a stage besides its first
THIN = (20, 32, 44, 56, 110)


def imagenet_stages(depths: Sequence[int], a: float, b: float) -> list[Stage]:
    """Stages of RepVGG as published: every one begins with stride 2."""
    widths = [int(64 * a), int(128 * a), int(256 * a), int(512 * b)]
    rest = (Stage(width, depth, 2) for width, depth in zip(widths, depths, strict=True))
    return [Stage(min(64, widths[0]), 1, 2), *rest]


def deep_stages(layers: int, cifar: bool = False, width: int = 64) -> list[Stage]:
    """Stages of RMNet's RepVGG-21 to 133; the width doubles from stage to stage.

    Args:
        layers: A key of `DEEP`: convolutions of the ImageNet form.
        cifar: For 32×32 images: one stem block of stride 1 instead of two of stride 2.
        width: Of the first stage, 64 in the paper.
    """
    widths = [width, 2 * width, 4 * width, 8 * width]
    strides = [1 if cifar else 2, 2, 2, 2]
    rest = [
        Stage(width, DEEP[layers] + 1, stride)
        for width, stride in zip(widths, strides, strict=True)
    ]
    return rest if cifar else [Stage(width, 1, 2), *rest]


def thin_stages(layers: int) -> list[Stage]:
    """Depth and widths of the CIFAR ResNet of He et al. with ``layers`` = 6n + 2."""
    depth = (layers - 2) // 3
    return [Stage(16, depth + 1, 1), Stage(32, depth, 2), Stage(64, depth, 2)]


def model_names() -> list[str]:
    """Names without ``_rmRATIO``, which may follow each of the deep and the thin ones."""
    deep = [f"repvgg{layers}{form}" for layers in DEEP for form in ("", "_cifar")]
    return [*VARIANTS, *deep, *(f"repvgg{layers}" for layers in THIN)]


def builder_of(name: str) -> Callable[[int], RepVGG] | None:
    """What builds the RepVGG of a name for a number of classes, or None if there is none.

    ``repvgg_a0`` to ``repvgg_b3g4``; ``repvgg21`` to ``repvgg133`` of RMNet, ``repvgg21_cifar``
    for small images, ``repvgg20`` to ``repvgg110`` of ResNet-20's widths, and these with a
    reserving ratio: ``repvgg20_rm0.25``.
    """
    if name in VARIANTS:
        depths, a, b, groups = VARIANTS[name]
        return partial(RepVGG, imagenet_stages(depths, a, b), groups=groups)
    match = re.fullmatch(r"(repvgg(\d+)(_cifar)?)(?:_rm(0\.\d+|0))?", name)
    if match is None or match[1] not in model_names():
        return None
    layers, ratio = int(match[2]), float(match[4] or 0)
    stages = thin_stages(layers) if layers in THIN else deep_stages(layers, match[3] is not None)
    return partial(RepVGG, stages, ratio=ratio)
