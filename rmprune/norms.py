"""Per-channel affine maps: BatchNorm in evaluation mode, and shortcuts made of it.

Tensors in, tensors out; nothing here knows of graphs. All values are float64 when the
modules are: `rmprune.convert` works on a float64 copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rmprune.graph import PadChannels, Subsample

EPS = nn.BatchNorm2d(1).eps


class Norm(NamedTuple):
    """``gamma * (z - mean) / sqrt(var) + beta``, each ``(channels,)``; var includes BN's eps.

    ``|gamma|`` is the channel's scale, and beta is the channel's mean, which is what remains
    of the channel when its scale is set to zero.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor

    @property
    def slope(self) -> Tensor:
        """``a`` in ``a z + c``."""
        return self.gamma / self.var.sqrt()

    @property
    def offset(self) -> Tensor:
        """``c`` in ``a z + c``."""
        return self.beta - self.slope * self.mean

    def as_module(self) -> nn.BatchNorm2d:
        """An evaluation-mode BN that does the same, whatever eps the values came with."""
        bn = nn.BatchNorm2d(len(self.gamma), EPS, device=self.gamma.device, dtype=self.gamma.dtype)
        state = {"weight": self.gamma, "bias": self.beta, "running_mean": self.mean}
        bn.load_state_dict({**state, "running_var": self.var - EPS}, strict=False)
        return bn.eval()

    def cat(self, other: Norm) -> Norm:
        """The norm of this one's channels followed by the other's."""
        return Norm(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


def norm_of(bn: nn.BatchNorm2d | None, conv: nn.Conv2d) -> Norm:
    """The norm that follows a convolution's *weights*: the convolution's bias is included.

    Without a BN, every scale is 1 and beta is the bias.
    """
    zero = conv.weight.new_zeros(conv.out_channels)
    bias = zero if conv.bias is None else conv.bias.detach()
    if bn is None:
        return Norm(zero + 1, bias, zero, zero + 1)
    norm = norm_of_bn(bn)
    return norm._replace(mean=norm.mean - bias)


def norm_of_bn(bn: nn.modules.batchnorm._BatchNorm) -> Norm:
    """A BN's parameters and running statistics, eps included in the variance.

    Raises:
        ValueError: The BN keeps no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("the BN has no running statistics (track_running_stats=False)")
    ones = torch.ones_like(bn.running_mean)
    gamma = ones if bn.weight is None else bn.weight.detach()
    beta = ones * 0 if bn.bias is None else bn.bias.detach()
    return Norm(gamma, beta, bn.running_mean, bn.running_var + bn.eps)


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution with the BN behind it folded in.

    A bias that is nothing but what rounding leaves of ``beta - slope * mean`` becomes zero:
    a channel that is copied stays a copy.
    """
    fused = fuse_conv_bn_eval(conv.eval(), bn.eval())
    norm = norm_of(bn, conv)
    terms = torch.maximum(norm.beta.abs(), (norm.slope * norm.mean).abs())
    with torch.no_grad():
        assert fused.bias is not None
        fused.bias[fused.bias.abs() <= 4 * torch.finfo(terms.dtype).eps * terms] = 0
    return fused


def normalised(rows: Tensor, offset: Tensor, scale: Tensor, rest: Tensor) -> tuple[Tensor, Norm]:
    """Split ``rows · x + offset`` into a convolution and the norm behind it.

    Args:
        rows: ``(out, in, k, k)``; a row whose scale is 0 must be all zero.
        offset: ``(out,)``.
        scale: ``(out,)``, not negative: what the norm's gamma shall be.
        rest: ``(out,)``: what the norm's beta shall be.

    Returns:
        The weight ``(out, in, k, k)`` of a convolution without bias, and the norm.
    """
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    norm = Norm(scale, rest, (rest - offset) / divisor, torch.ones_like(scale))
    return rows / divisor[:, None, None, None], norm


class Affine(NamedTuple):
    """A shortcut ``A x + c`` at every stride-th position.

    Attributes:
        weight: A, ``(out, in)``.
        bias: c, ``(out,)``.
        stride: In both directions.
        scale: ``(out,)``: the scale of the last BN that each output comes through; 1 without
            one, 0 where the output is a padded zero.
        rest: ``(out,)``: what remains of each output when its scale is 0.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    scale: Tensor
    rest: Tensor


def fold_shortcut(modules: Sequence[nn.Module], channels: int, like: Tensor) -> Affine:
    """Fold BNs, 1×1 convolutions, subsampling and channel padding into one affine map.

    Args:
        modules: As `rmprune.graph.is_pointwise_affine` accepts them; none for the identity.
        channels: Of the shortcut's input.
        like: A tensor of the dtype and device wanted.
    """
    weight = torch.eye(channels, dtype=like.dtype, device=like.device)
    bias, scale, rest, stride = like.new_zeros(channels), like.new_ones(channels), None, 1
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            norm = norm_of_bn(module)
            weight, bias = norm.slope[:, None] * weight, norm.slope * bias + norm.offset
            scale, rest = norm.gamma.abs(), norm.beta
        elif isinstance(module, Subsample):
            stride *= module.stride
        elif isinstance(module, PadChannels):
            padding = (module.front, module.back)
            weight = nn.functional.pad(weight, (0, 0, *padding))
            bias, scale = (nn.functional.pad(t, padding) for t in (bias, scale))
            rest = None if rest is None else nn.functional.pad(rest, padding)
        elif isinstance(module, nn.Conv2d):
            matrix = module.weight.detach()[:, :, 0, 0]
            weight, bias = matrix @ weight, matrix @ bias
            if module.bias is not None:
                bias = bias + module.bias.detach()
            stride *= module.stride[0]
            scale, rest = torch.ones_like(bias), None
    return Affine(weight, bias, stride, scale, bias if rest is None else rest)


class Moments:
    """Mean and variance of every channel over any number of batches, summed in float64.

    Without a batch they are 0 and 1.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, batch: Tensor) -> None:
        """Add the values of a batch, ``(N, C, H, W)``."""
        values = batch.detach().double()
        self.count += values.numel() // len(self.total)
        self.total += values.sum(dim=(0, 2, 3)).cpu()
        self.squares += values.square().sum(dim=(0, 2, 3)).cpu()

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """``(channels,)`` each, in float64 on the CPU."""
        if not self.count:
            return self.total, torch.ones_like(self.total)
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0)

    def identity_bn(self) -> nn.BatchNorm2d:
        """A BN with these statistics that leaves its input as it is: γ = √(σ² + ε), β = μ."""
        mean, var = self.mean_and_var()
        return Norm(gamma=(var + EPS).sqrt(), beta=mean, mean=mean, var=var + EPS).as_module()
