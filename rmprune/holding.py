"""BNs whose switched-off channels stay at zero, whatever an optimizer does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Held(nn.Module):
    """Keeps the switched-off channels of a parameter at exactly zero, at every step."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.mask


def hold(bn: nn.BatchNorm2d, mask: Tensor) -> None:
    """Hold γ and β at zero where a mask ``(channels,)`` is False, and only there."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(bn, name):
            _held(bn, name).mask.copy_(mask)
        else:
            held = _Held(mask.to(getattr(bn, name)))
            parametrize.register_parametrization(bn, name, held)
    bn.train(bn.training)  # new parametrizations come in training mode


@torch.no_grad()
def release(bn: nn.Module) -> None:
    """Let go of what masks hold, at the values that it has.

    The parametrizations stay: torch takes them from a module's class, which copies share.
    """
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(bn, name):
            held = _held(bn, name)
            parameter(bn, name).mul_(held.mask)
            held.mask.fill_(1)


def _held(bn: nn.Module, name: str) -> _Held:
    parametrizations = bn.get_submodule(f"parametrizations.{name}")
    assert isinstance(parametrizations, nn.ModuleList)
    held = parametrizations[0]
    assert isinstance(held, _Held)
    return held


def parameter(bn: nn.Module, name: str) -> Tensor:
    """What can be changed in place, whether masks hold it or not."""
    held = parametrize.is_parametrized(bn, name)
    return bn.get_parameter(f"parametrizations.{name}.original" if held else name)
