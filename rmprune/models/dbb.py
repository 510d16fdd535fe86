"""Diverse Branch Block: branches with BNs of their own, merged when training is over.

Ding et al., "Diverse branch block", CVPR 2021: the offline rival of OREPA, which keeps the
activations of all branches while it trains. Nothing here merges: in evaluation mode every branch
is linear, and `rmprune.convert` makes one convolution of them as of all that is linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmprune.composed import ComposedConv2d
from rmprune.models.kernels import identity_kernel


class IdentityConv(ComposedConv2d):
    """A 1×1 convolution ``identity + delta`` whose delta begins at zero (and decays to it)."""

    identity: Tensor

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, groups=groups)
        identity = identity_kernel(channels, channels // groups)
        self.delta = nn.Parameter(torch.zeros_like(identity))
        self.register_buffer("identity", identity, persistent=False)

    def kernel(self) -> Tensor:
        """``(channels, channels / groups, 1, 1)``."""
        return self.identity + self.delta


class BNAndPad(nn.Module):
    """A BN, then a border of what the BN makes of zero.

    So a k×k convolution behind it sees what it would see if the image, and not the BN's
    output, were padded with zeros (Ding et al., section 3.2, transform III). While training
    the border stays out of the batch's statistics, and its values come from the running ones.

    Args:
        channels: Of the input.
        padding: Width of the border.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.bn, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, H + 2 · padding, W + 2 · padding)``."""
        p = self.padding
        if not self.training:
            y: Tensor = self.bn(F.pad(x, (p, p, p, p)))
            return y
        bn = self.bn
        y = F.pad(bn(x), (p, p, p, p))
        if p == 0:
            return y
        assert bn.running_mean is not None
        assert bn.running_var is not None
        slope = bn.weight.detach() / (bn.running_var + bn.eps).sqrt()
        border = (bn.bias.detach() - slope * bn.running_mean)[:, None, None]
        for edge in (slice(p), slice(-p, None)):
            y[:, :, edge, :] = border
            y[:, :, :, edge] = border
        return y


class DBB(nn.Module):
    """k×k, 1×1, 1×1-k×k and 1×1-average, each with a BN behind every layer, summed.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Odd.
        stride: In both directions.
        groups: Of all convolutions; fewer than output channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        n_in, n_out, k, p = in_channels, out_channels, kernel_size, kernel_size // 2
        self.origin = _conv_bn(n_in, n_out, k, stride, p, groups)
        self.pointwise = _conv_bn(n_in, n_out, 1, stride, 0, groups)
        self.sequence = nn.Sequential(
            IdentityConv(n_in, groups),
            BNAndPad(n_in, p),
            _conv_bn(n_in, n_out, k, stride, 0, groups),
        )
        self.average = nn.Sequential(
            nn.Conv2d(n_in, n_out, 1, groups=groups, bias=False),
            BNAndPad(n_out, p),
            nn.AvgPool2d(k, stride),
            nn.BatchNorm2d(n_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y: Tensor = self.origin(x) + self.pointwise(x) + self.sequence(x) + self.average(x)
        return y


def conv_bn(n_in: int, n_out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """One convolution, and the BN behind it."""
    return _conv_bn(n_in, n_out, kernel_size, stride, kernel_size // 2, 1)


def dbb_unit(n_in: int, n_out: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """A block where the authors put one; 1×1 and 7×7 convolutions stay as they are."""
    if kernel_size in (1, 7):
        return conv_bn(n_in, n_out, kernel_size, stride)
    return DBB(n_in, n_out, kernel_size, stride)


def _conv_bn(
    n_in: int, n_out: int, kernel_size: int, stride: int, padding: int, groups: int
) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))
