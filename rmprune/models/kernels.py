"""Kernels of convolutions in sequence: the mathematics of squeezing a block.

After OREPA (Hu et al., CVPR 2022, section 3.2): convolutions one after the other are one, whose
kernel is theirs composed; convolutions beside each other are one, whose kernel is the sum of
theirs, centres aligned. Kernels are those of torch, ``(out, in / groups, height, width)``, and are
square. Tensors in, tensors out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def behind_pointwise(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """A 1×1 convolution, then a k×k one, both in as many groups.

    Args:
        first: ``(M, I / groups, 1, 1)``.
        second: ``(O, M / groups, k, k)``.
        groups: Of both.

    Returns:
        ``(O, I / groups, k, k)``.
    """
    inner = first.view(groups, -1, first.shape[1])
    outer = second.view(groups, -1, *second.shape[1:])
    return torch.einsum("gmi,gomhw->goihw", inner, outer).flatten(0, 1)


def separable(depthwise: Tensor, pointwise: Tensor, groups: int = 1) -> Tensor:
    """A depthwise convolution, then a 1×1 one in groups, with nothing in between.

    Args:
        depthwise: ``(I, m, k, k)``: m kernels for each input channel; as a layer's weight
            ``(I · m, 1, k, k)``.
        pointwise: ``(O, m · I / groups, 1, 1)``.
        groups: Of the second one; they divide I.

    Returns:
        ``(O, I / groups, k, k)``.
    """
    inner = depthwise.view(groups, -1, *depthwise.shape[1:])
    outer = pointwise.view(groups, len(pointwise) // groups, inner.shape[1], -1)
    return torch.einsum("gimhw,goim->goihw", inner, outer).flatten(0, 1)


def composed(first: Tensor, second: Tensor) -> Tensor:
    """A convolution, then another one of stride 1: exact where nothing is padded in between.

    A kernel that passes through the second convolution is correlated with it once more, so the
    second one must be turned around.

    Args:
        first: ``(M, I, a, a)``.
        second: ``(O, M, b, b)``.

    Returns:
        ``(O, I, a + b - 1, a + b - 1)``.
    """
    padding = second.shape[-1] - 1
    return F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=padding).transpose(0, 1)


def centred(kernel: Tensor, size: int) -> Tensor:
    """A kernel among zeros, ``(out, in, k, k)`` to ``(out, in, size, size)``; both odd."""
    around = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, (around, around, around, around))


def identity_kernel(out_channels: int, width: int) -> Tensor:
    """``(out_channels, width, 1, 1)``: channel i reads the channel i mod ``width`` of its group."""
    channels = torch.arange(out_channels)
    return (channels[:, None] % width == torch.arange(width)).float()[:, :, None, None]


def frequency_prior(out_channels: int, size: int) -> Tensor:
    """Cosines of rising frequency, down in the first half of the channels, across in the others.

    OREPA, section 3.1, after FcaNet; the frequencies begin at 1 as in the authors' code.

    Returns:
        ``(out_channels, 1, size, size)``.
    """
    half = out_channels / 2
    channel = torch.arange(out_channels)[:, None]
    frequency = torch.where(channel < half, channel + 1, channel + 1 - half)
    waves = torch.cos(math.pi * (torch.arange(size) + 0.5) * frequency / size)
    down, across = waves[:, None, :, None], waves[:, None, None, :]
    return torch.where((channel < half)[:, :, None, None], down, across).expand(-1, -1, size, size)
