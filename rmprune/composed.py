"""A convolution that is trained by other parameters than its kernel."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ComposedConv2d(nn.Module):
    """A convolution without bias whose kernel is worked out anew in every forward pass.

    For `rmprune.graph`, and so for conversion, it is the convolution that `as_conv` gives. A
    subclass has the parameters and says how the kernel follows from them.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: In both directions.
        padding: Zeros on all sides.
        groups: As of a convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.padding, self.groups = stride, padding, groups

    def kernel(self) -> Tensor:
        """``(out_channels, in_channels / groups, k, k)``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return F.conv2d(x, self.kernel(), None, self.stride, self.padding, 1, self.groups)

    @torch.no_grad()
    def as_conv(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """The same as one convolution.

        Args:
            dtype: Of the kernel, and of what it is worked out in; the parameters' own if None.
        """
        kernel = (self if dtype is None else copy.deepcopy(self).to(dtype)).kernel()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            (kernel.shape[2], kernel.shape[3]),
            self.stride,
            self.padding,
            groups=self.groups,
            bias=False,
            device="meta",
        )
        conv.weight = nn.Parameter(kernel)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """What is shown between the brackets."""
        options = f"stride={self.stride}, padding={self.padding}, groups={self.groups}"
        return f"{self.in_channels}, {self.out_channels}, {options}"


def squeezed(model: nn.Module) -> nn.Module:
    """A model as it is deployed: a copy whose blocks are the convolutions that they give.

    It is the model itself if there is no such block in it.
    """
    if not any(isinstance(module, ComposedConv2d) for module in model.modules()):
        return model
    return _squeeze(copy.deepcopy(model))


def _squeeze(module: nn.Module) -> nn.Module:
    if isinstance(module, ComposedConv2d):
        return module.as_conv()
    for name, child in module.named_children():
        setattr(module, name, _squeeze(child))
    return module
