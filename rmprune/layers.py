"""The two layers of plain nets that torch lacks: both act on some channels and pass the rest.

Both are leaf modules: nothing is added to anything inside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
# An input from which on a gate is exactly 1, in float32 and float64.
OPEN = {"sigmoid": 40.0, "hardsigmoid": 3.0}


def function_name(module: nn.Module) -> str | None:
    """The name in `FUNCTIONS` of what an activation module computes, or None."""
    match module:
        case nn.ReLU():
            return "relu"
        case nn.Hardtanh(min_val=0, max_val=6):  # ReLU6 is one
            return "relu6"
        case nn.GELU():
            return "gelu" if module.approximate == "none" else "gelu_tanh"
        case nn.Hardswish() | nn.SiLU() | nn.Mish() | nn.Tanh() | nn.Sigmoid() | nn.Hardsigmoid():
            return type(module).__name__.lower()
        case nn.Identity():
            return "identity"
        case _:
            return None


class PartialActivation(nn.Module):
    """An activation on some channels; the others pass.

    Args:
        activation: A name in `FUNCTIONS`.
        num_channels: Of the input.

    The buffer ``acts``, ``(num_channels,)`` of bool, tells where the activation acts.
    """

    acts: Tensor

    def __init__(self, activation: str, num_channels: int) -> None:
        super().__init__()
        self.activation, self.num_channels = activation, num_channels
        self.register_buffer("acts", torch.ones(num_channels, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, num_channels, H, W)`` to the same shape."""
        return torch.where(self.acts[:, None, None], FUNCTIONS[self.activation](x), x)

    def keep(self, channels: Tensor) -> None:
        """Cut out all channels but the given ones, ``(n,)``."""
        self.acts = self.acts[channels]
        self.num_channels = len(channels)

    def extra_repr(self) -> str:
        """What is shown between the brackets."""
        return f"{self.activation}, {int(self.acts.sum())} of {self.num_channels} channels"


class ChannelGate(nn.Module):
    """Squeeze and excitation: ``x · f(mean of x over the positions)``.

    f is a chain of linear maps with an activation behind each (Hu et al. 2018, section 3:
    two maps, ReLU and sigmoid). A channel passes where its gate is exactly 1.

    Args:
        sizes: Widths from the input to the output of f; the first and the last are the
            channels of x.
        activations: A name in `FUNCTIONS` for each map.
    """

    def __init__(self, sizes: Sequence[int], activations: Sequence[str]) -> None:
        super().__init__()
        if len(sizes) != len(activations) + 1 or sizes[0] != sizes[-1]:
            raise ValueError(f"sizes {sizes} do not fit {len(activations)} activations")
        self.sizes, self.activations = tuple(sizes), tuple(activations)
        for step, (inputs, outputs) in enumerate(pairwise(sizes)):
            self.register_parameter(f"weight{step}", nn.Parameter(torch.zeros(outputs, inputs)))
            self.register_parameter(f"bias{step}", nn.Parameter(torch.zeros(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, sizes[0], H, W)`` to the same shape."""
        gate = x.mean((2, 3))
        for step, name in enumerate(self.activations):
            weight = self.get_parameter(f"weight{step}")
            gate = FUNCTIONS[name](F.linear(gate, weight, self.get_parameter(f"bias{step}")))
        return x * gate[:, :, None, None]

    def widened(self, channels: Tensor, total: int) -> ChannelGate:
        """The same gate among other channels, which pass.

        Args:
            channels: Where this gate's channels stand, ``(sizes[0],)``.
            total: Channels of the input.
        """
        last = len(self.activations) - 1
        wide = ChannelGate((total, *self.sizes[1:-1], total), self.activations)
        for place, name in enumerate(self.activations):
            weight = self.get_parameter(f"weight{place}").detach()
            bias = self.get_parameter(f"bias{place}").detach()
            if place == 0:
                weight = weight.new_zeros(len(weight), total).index_copy(1, channels, weight)
            if place == last:
                weight = weight.new_zeros(total, weight.shape[1]).index_copy(0, channels, weight)
                bias = bias.new_full((total,), OPEN[name]).index_copy(0, channels, bias)
            setattr(wide, f"weight{place}", nn.Parameter(weight.clone()))
            setattr(wide, f"bias{place}", nn.Parameter(bias.clone()))
        return wide.eval()

    def squeezed(self) -> Tensor:
        """Which channels any gate depends on, ``(sizes[0],)`` of bool."""
        return (self.get_parameter("weight0") != 0).any(0)

    def keep(self, channels: Tensor) -> None:
        """Cut out all channels but the given ones, ``(n,)``."""
        last = len(self.activations) - 1
        weights = {"weight0": self.get_parameter("weight0")[:, channels]}
        excite = weights.get(f"weight{last}", self.get_parameter(f"weight{last}"))
        weights |= {
            f"weight{last}": excite[channels],
            f"bias{last}": self.get_parameter(f"bias{last}")[channels],
        }
        for name, tensor in weights.items():
            setattr(self, name, nn.Parameter(tensor.detach().clone()))
        self.sizes = (len(channels), *self.sizes[1:-1], len(channels))

    def extra_repr(self) -> str:
        """What is shown between the brackets."""
        return f"{' → '.join(map(str, self.sizes))}, {', '.join(self.activations)}"
