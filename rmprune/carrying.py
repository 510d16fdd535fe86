"""Carrying: how channels that a block reserves pass the activation of its other channels.

A tensor without negative values passes a ReLU as it is. What may be negative can

    shift     be carried as x + b with b ≥ max |x|, to be subtracted again later; ReLU6 also
              needs it scaled into [0, 6],
    prelu     pass a PReLU whose slope is 1 on it (RMNet, arXiv 2111.00687, section 3.3),
    partial   be left alone by an activation that acts on the other channels only.

Shifting needs bounds. Interval arithmetic gives bounds that hold for every input, but none
behind an activation that has no upper limit; calibration gives tight ones for inputs like the
example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmprune.errors import ConversionError
from rmprune.layers import PartialActivation, function_name
from rmprune.norms import Norm

Carry = Literal["auto", "shift", "prelu", "partial"]
Bound = Literal["interval", "calibrated"]

MARGIN = 2.0  # of a calibrated bound over the largest value seen
# Float32 rounds x + b to b · 6e-8: a bound far above the values themselves would drown them.
MAX_BOUND = 1024.0  # relative to the largest value seen
INFINITE = 1e30
ROUNDING = 1e-12  # by which bounds that were reached by arithmetic may be off
# From where on an activation is the identity, in float64 to the last bit or the one before.
IDENTITY_FROM: dict[type[nn.Module], float] = {
    nn.ReLU: 0.0,
    nn.ReLU6: 0.0,
    nn.Hardtanh: 0.0,
    nn.LeakyReLU: 0.0,
    nn.Hardswish: 3.0,
    nn.SiLU: 38.0,
    nn.GELU: 9.0,
}
# Where activations that fall and rise again are lowest: Hardswish, SiLU, GELU, Mish.
TURNING_POINTS = (-1.5, -1.2784645, -0.7517915, -1.1924)


@dataclass(frozen=True)
class Interval:
    """Bounds of every channel, ``(channels,)`` each; infinite where nothing is known."""

    lower: Tensor
    upper: Tensor

    @classmethod
    def unknown(cls, channels: int, like: Tensor) -> Interval:
        """No bounds."""
        infinite = torch.full((channels,), torch.inf, dtype=like.dtype, device=like.device)
        return cls(-infinite, infinite)

    def select(self, channels: Tensor) -> Interval:
        """Those of some channels."""
        return Interval(self.lower[channels], self.upper[channels])

    def replaced(self, channels: Tensor, new: Interval) -> Interval:
        """The same with other bounds for some channels."""
        return Interval(
            self.lower.index_copy(0, channels, new.lower),
            self.upper.index_copy(0, channels, new.upper),
        )

    def with_zero(self) -> Interval:
        """Wide enough to hold 0."""
        return Interval(self.lower.clamp(max=0), self.upper.clamp(min=0))

    def affine(self, factor: Tensor, shift: Tensor) -> Interval:
        """Of ``factor · x + shift``."""
        ends = [torch.where(factor == 0, 0, factor * end) for end in (self.lower, self.upper)]
        return Interval(torch.minimum(*ends) + shift, torch.maximum(*ends) + shift)

    def convolved(self, conv: nn.Conv2d) -> Interval:
        """Of the outputs of a convolution without bias."""
        inputs = self if conv.padding in ((0, 0), "valid") else self.with_zero()
        weight = conv.weight.view(conv.groups, -1, *conv.weight.shape[1:])
        rises, falls = weight.clamp(min=0).sum((3, 4)), (-weight).clamp(min=0).sum((3, 4))
        lower = inputs.lower.view(conv.groups, 1, -1)
        upper = inputs.upper.view(conv.groups, 1, -1)
        least = _products(rises, lower).sum(2) - _products(falls, upper).sum(2)
        most = _products(rises, upper).sum(2) - _products(falls, lower).sum(2)
        return Interval(least.flatten(), most.flatten())

    def normed(self, norm: Norm) -> Interval:
        """Of a BN's outputs."""
        return self.affine(norm.slope, norm.offset)

    def activated(self, activation: nn.Module) -> Interval:
        """Of an activation's outputs; it may fall before it rises, but turns only once."""
        low, high = (end.clamp(-INFINITE, INFINITE) for end in (self.lower, self.upper))
        points = [low, high, *(low.new_tensor(p).clamp(low, high) for p in (0, *TURNING_POINTS))]
        found = [activation(point[None, :, None, None]).flatten() for point in points]
        values = torch.stack(found)
        least, most = values.amin(0), values.amax(0)
        limit = INFINITE / 1e3
        return Interval(
            torch.where(least <= -limit, -torch.inf, least),
            torch.where(most >= limit, torch.inf, most),
        )


def _products(weights: Tensor, bounds: Tensor) -> Tensor:
    """Products in which 0 · ∞ is 0."""
    return torch.where(weights == 0, 0, weights * bounds)


@dataclass(frozen=True)
class Way:
    """How reserved channels pass one activation: they come as ``factor · x + shift``.

    Attributes:
        mode: ``"as is"``, ``"shift"``, ``"prelu"`` or ``"partial"``.
        factor: ``(channels,)``, positive.
        shift: ``(channels,)``.
    """

    mode: str
    factor: Tensor
    shift: Tensor


class Carrier:
    """Chooses how to carry, and notes what it chose in ``log``."""

    def __init__(self, carry: Carry, bound: Bound) -> None:
        self.carry, self.bound = carry, bound
        self.log: list[dict[str, Any]] = []

    def choose(
        self,
        name: str,
        activation: nn.Module,
        interval: Interval,
        seen: Tensor,
        can_shift: bool = True,
    ) -> Way:
        """The way past an activation.

        Args:
            name: Of the activation.
            activation: As the network has it.
            interval: Bounds of the reserved channels.
            seen: Their values on the example input, ``(N, channels, H, W)``.
            can_shift: Whether an offset can be taken away again.

        Raises:
            ConversionError: The way that was asked for is not open here.
        """
        asis = self.as_is(name, activation, interval)
        if asis is not None:
            return asis
        modes = self._modes(activation)
        for mode in modes:
            if mode == "shift" and not can_shift:
                continue
            way = self._try(mode, activation, interval, seen)
            if way is not None:
                return self._noted(name, way)
        raise ConversionError(
            name,
            f"reserved channels cannot be carried past {type(activation).__name__} "
            f"by {', '.join(modes)}",
            "carry='auto' tries all ways; shifting behind activations without an upper limit "
            "needs bound='calibrated'",
        )

    def as_is(self, name: str, activation: nn.Module, interval: Interval) -> Way | None:
        """The way of channels on which the activation is the identity anyway, or None."""
        floor, ceiling = identity_range(activation)
        lower, upper = interval.lower + ROUNDING, interval.upper - ROUNDING
        if bool((lower >= floor).all() and (upper <= ceiling).all()):
            ones = torch.ones_like(interval.lower)
            way = Way("as is", ones, ones - 1)
            return self._noted(name, way) if len(ones) else way
        return None

    def in_place(self, name: str, activation: nn.Module, interval: Interval) -> Way | None:
        """The way where no convolution comes before that could shift, or None."""
        way = self.as_is(name, activation, interval)
        modes = self._modes(activation)
        ones = torch.ones_like(interval.lower)
        for mode in modes if way is None else ():
            if mode != "shift" and _applies(mode, activation):
                return self._noted(name, Way(mode, ones, ones - 1))
        return way

    def _modes(self, activation: nn.Module) -> tuple[str, ...]:
        """The ways to try, in order."""
        if isinstance(activation, nn.PReLU):
            return ("prelu",)  # has slopes anyway
        if isinstance(activation, nn.LeakyReLU) and self.carry == "partial":
            return ("prelu",)  # a PReLU is what acts on part of the channels then
        return ("shift", "prelu", "partial") if self.carry == "auto" else (self.carry,)

    def _try(
        self, mode: str, activation: nn.Module, interval: Interval, seen: Tensor
    ) -> Way | None:
        if mode == "shift":
            return self._shift(activation, interval, seen)
        ones = torch.ones_like(interval.lower)
        return Way(mode, ones, ones - 1) if _applies(mode, activation) else None

    def _shift(self, activation: nn.Module, interval: Interval, seen: Tensor) -> Way | None:
        """A shift into the range in which the activation is the identity, or None."""
        floor, ceiling = identity_range(activation)
        largest = seen.abs().amax((0, 2, 3))
        lower, upper = interval.lower, interval.upper
        if self.bound == "calibrated":
            lower, upper = -MARGIN * largest, MARGIN * largest
        ones = torch.ones_like(lower)
        if ceiling == torch.inf:
            way = Way("shift", ones, (floor - lower).clamp(min=0))
        else:
            factor = ((ceiling - floor) / (upper - lower).clamp(min=1e-12)).clamp(max=1)
            way = Way("shift", factor, floor - factor * lower)
        relative = way.shift.abs() / way.factor
        if not bool(torch.isfinite(relative).all()):
            return None
        drowns = bool((relative > MAX_BOUND * largest.max()).any())
        return None if drowns and self.carry == "auto" else way

    def _noted(self, name: str, way: Way) -> Way:
        entry = {"activation": name, "mode": way.mode, "channels": len(way.factor)}
        if way.mode == "shift":
            entry |= {"bound": self.bound, "largest_shift": way.shift.max().item()}
        self.log.append(entry)
        return way


def identity_range(activation: nn.Module) -> tuple[float, float]:
    """From where to where an activation is the identity; empty if nowhere."""
    floor = IDENTITY_FROM.get(type(activation), torch.inf)
    if isinstance(activation, nn.PReLU):
        return torch.inf, torch.inf  # has slopes for all channels; it is widened in any case
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return (floor, activation.max_val) if activation.min_val <= 0 else (torch.inf, 0)
    return floor, torch.inf


def _applies(mode: str, activation: nn.Module) -> bool:
    if mode == "prelu":
        return isinstance(activation, nn.ReLU | nn.LeakyReLU | nn.PReLU)
    return function_name(activation) is not None


def carrying_activation(activation: nn.Module, acts: Tensor, mode: str, like: Tensor) -> nn.Module:
    """The activation of a plain net: on the given channels as the network's, others pass.

    Args:
        activation: As the network has it.
        acts: ``(channels,)`` of bool.
        mode: See `Way`.
        like: Of the dtype and device wanted.
    """
    if mode == "prelu":
        slopes = torch.ones(len(acts), dtype=like.dtype, device=like.device)
        match activation:
            case nn.ReLU():
                slopes[acts] = 0
            case nn.LeakyReLU():
                slopes[acts] = activation.negative_slope
            case nn.PReLU():
                slopes[acts] = activation.weight.detach().to(like)
        prelu = nn.PReLU(len(acts), device=like.device, dtype=like.dtype)
        prelu.weight = nn.Parameter(slopes)
        return prelu
    if mode == "partial":
        partial = PartialActivation(str(function_name(activation)), len(acts)).to(like.device)
        partial.acts.copy_(acts)
        return partial
    return activation
