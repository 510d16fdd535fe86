"""RMNeXt (RMNet, arXiv 2111.00687, section 5.4, Table 4): residual nets made to be plain.

A block is a ResNeXt bottleneck that is wide inside: conversion reserves its input beside the
(T - 1) · out channels of the grouped convolution, so that the plain net is T times as wide
inside as outside, in groups of equal width throughout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from rmprune.errors import UsageError
from rmprune.models.repvgg import RepBlock

WIDTHS = (64, 128, 256, 512)
THIN = (16, 32, 64)  # of the ResNets for CIFAR, with three stages
DEPTHS = {
    20: (2, 2, 2),
    26: (2, 2, 2, 2),
    41: (2, 3, 5, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
PUBLISHED = ("26x3_32", "41x4_8", "41x5_16", "50x5_32", "50x6_32", "101x6_16", "152x6_32")


class RMNeXtBlock(nn.Module):
    """1×1, grouped 3×3 and 1×1 convolutions, plus a shortcut.

    Args:
        n_in: Input channels.
        inner: Channels of the grouped convolution, in the residual form.
        n_out: Output channels.
        stride: Of the grouped convolution and of the shortcut.
        group_width: Channels of a group.
    """

    def __init__(self, n_in: int, inner: int, n_out: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        groups = inner // group_width
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        nn.init.zeros_(self.bn3.weight)  # a block begins as its shortcut
        self.downsample = None
        if n_in != n_out or stride != 1:
            conv = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(n_out))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        total: Tensor = self.relu3(y + (x if self.downsample is None else self.downsample(x)))
        return total


class RMNeXt(nn.Module):
    """A stem of RepVGG blocks, stages, global average pooling, one linear layer.

    Args:
        widths: Of each stage.
        depths: Blocks of each stage; every stage but the first begins with stride 2.
        expansion: T: inner channels of the plain form, over the outer ones.
        group_width: Channels of a group in the first stage; doubled from stage to stage.
        num_classes: Outputs.
        cifar: For 32×32 images: one stem block of stride 1 instead of two of stride 2.

    Raises:
        UsageError: The channels cannot be divided into such groups.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        expansion: int,
        group_width: int,
        num_classes: int = 10,
        cifar: bool = False,
    ) -> None:
        super().__init__()
        width = widths[0]
        if expansion < 2 or group_width < 1 or width % group_width:
            raise UsageError(
                f"RMNeXt needs T of at least 2 and groups that divide {width} channels, "
                f"not T = {expansion} and {group_width} channels a group"
            )
        stem = [RepBlock(3, width)] if cifar else [RepBlock(3, width, 2), RepBlock(width, width, 2)]
        blocks: list[nn.Module] = []
        n_in = width
        for stage, (out, depth) in enumerate(zip(widths, depths, strict=True)):
            for place in range(depth):
                stride = 2 if place == 0 and stage > 0 else 1
                inner = (expansion - 1) * out
                blocks.append(RMNeXtBlock(n_in, inner, out, stride, group_width * 2**stage))
                n_in = out
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(n_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.linear(self.flatten(self.pool(self.blocks(self.stem(x)))))
        return logits


def model_names() -> list[str]:
    """The published ones, for ImageNet and CIFAR; others of the same form can be built, too."""
    published = [f"rmnext{name}{form}" for name in PUBLISHED for form in ("", "_cifar")]
    return [*published, "rmnext20x3_8_thin"]


def builder_of(name: str) -> Callable[[int], RMNeXt] | None:
    """What builds ``rmnextLAYERSxT_GROUPWIDTH``, or None.

    With ``_cifar`` for small images; with ``_thin`` for small images and of three stages of 16, 32
    and 64 channels, as ResNet-20 has them.
    """
    match = re.fullmatch(r"rmnext(\d+)x(\d+)_(\d+)(_cifar|_thin)?", name)
    if match is None or int(match[1]) not in DEPTHS:
        return None
    depths, widths = DEPTHS[int(match[1])], THIN if match[4] == "_thin" else WIDTHS
    if len(depths) != len(widths):
        return None
    numbers = int(match[2]), int(match[3])
    return partial(RMNeXt, widths, depths, *numbers, cifar=match[4] is not None)
