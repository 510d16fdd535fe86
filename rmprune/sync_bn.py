"""BNs that normalise by the batch of all processes, not only by their own part of it.

What `torch.nn.SyncBatchNorm` does on GPUs, on any device and without replacing modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.processes import count, total


@contextmanager
def synchronized(model: nn.Module) -> Iterator[None]:
    """Let the BNs of a model in training mode share their statistics meanwhile."""
    bns = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if count() > 1:
        for bn in bns:
            vars(bn)["forward"] = partial(_normalised, bn)  # of this module alone
    try:
        yield
    finally:
        for bn in bns:
            vars(bn).pop("forward", None)


class _Total(torch.autograd.Function):
    """The sum over all processes, for gradients too."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def _normalised(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What a BN computes in training, ``(N, C, H, W)`` to the same shape."""
    if not bn.training:
        return nn.BatchNorm2d.forward(bn, x)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    # Deviations from a mean that is nearly right: squares of x itself would lose digits.
    near = bn.running_mean.detach().clone()
    values = x.to(near.dtype) - near[:, None, None]
    sums = [values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]
    size = values.new_full((1,), x.numel() / x.shape[1])
    moments = _Total.apply(torch.cat([*sums, size]))
    size = moments[-1].detach()
    mean, square = (moments[:-1] / size).chunk(2)
    var = (square - mean.square()).clamp(min=0)
    with torch.no_grad():
        bn.num_batches_tracked += 1
        momentum = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
        bn.running_mean.lerp_(mean + near, momentum)
        bn.running_var.lerp_(var * size / (size - 1), momentum)
    result: Tensor = (values - mean[:, None, None]) * (var + bn.eps).rsqrt()[:, None, None]
    if bn.affine:
        result = result * bn.weight[:, None, None] + bn.bias[:, None, None]
    return result.to(x.dtype)
