"""The layers of a net's list that torch lacks.

`PartialActivation`, `PartialGroupNorm` and `ChannelGate` act on some channels and pass the rest:
they are leaf modules, and nothing is added to anything inside of them. `ResidualBlock` does add;
only `rmprune.lowering` puts it into a net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Activations that `rmprune.convert` carries channels past; all are of each number by itself.
ACTIVATIONS = (
    *(nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.ELU, nn.Softplus),
)
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


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution that computes each channel from one channel alone."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels > 1
    )


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


class Clamp(nn.Module):
    """``min(max(x, lower), upper)``, with limits of its own for each channel.

    What a PReLU of slopes 0 and 1 computes, or a ReLU or ReLU6 on some channels. Runtimes compute
    it faster (experiments/mobilenetv2).

    Args:
        lower: ``(num_channels,)``; the least number of the dtype where there is no limit.
        upper: The same, the largest; None if no channel has one.
    """

    lower: Tensor
    upper: Tensor | None

    def __init__(self, lower: Tensor, upper: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("lower", lower[:, None, None])
        self.register_buffer("upper", None if upper is None else upper[:, None, None])

    @classmethod
    def of(cls, activation: nn.Module, dtype: torch.dtype) -> Clamp | None:
        """The clamp that computes what an activation does, or None."""
        match activation:
            case nn.PReLU(num_parameters=channels) if channels > 1:
                acts = activation.weight.detach() == 0
                if not bool((acts | (activation.weight == 1)).all()):
                    return None
            case PartialActivation(activation="relu" | "relu6"):
                acts = activation.acts
            case _:
                return None
        limits = torch.finfo(dtype)
        lower = torch.full(acts.shape, limits.min, dtype=dtype, device=acts.device)
        lower = lower.masked_fill(acts, 0.0)
        if getattr(activation, "activation", None) == "relu6":
            return cls(lower, torch.full_like(lower, limits.max).masked_fill(acts, 6.0))
        return cls(lower)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, num_channels, H, W)`` or ``(N, num_channels)`` to the same shape."""
        if x.ndim == 2:
            return self.forward(x[:, :, None, None])[:, :, 0, 0]
        x = torch.maximum(x, self.lower)
        return x if self.upper is None else torch.minimum(x, self.upper)


class PartialGroupNorm(nn.Module):
    """Group normalisation of some channels, without an affine map; the others pass.

    Every group gets mean 0 and variance 1 over its channels and all positions of an image (Wu
    and He, ECCV 2018, eq. 1 to 3).

    Args:
        num_channels: Of the input.
        num_groups: They are equally large.
        channels: Which ones, group by group.
        eps: Added to the variance.
    """

    indices: Tensor
    source: Tensor

    def __init__(
        self, num_channels: int, num_groups: int, channels: Sequence[int], eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.eps = eps
        self._set(num_channels, num_groups, tuple(channels))

    def _set(self, num_channels: int, num_groups: int, channels: tuple[int, ...]) -> None:
        inside = all(0 <= channel < num_channels for channel in channels)
        if not inside or len(set(channels)) < len(channels):
            raise ValueError(f"channels must be different ones of 0 to {num_channels - 1}")
        if len(channels) % max(num_groups, 1) or bool(num_groups) != bool(channels):
            raise ValueError(f"{len(channels)} channels make no {num_groups} equal groups")
        self.num_channels, self.num_groups, self.channels = num_channels, num_groups, channels
        # Known from the arguments: neither saved, nor made without values on the meta device.
        indices = torch.tensor(channels, dtype=torch.long, device="cpu")
        # Where each channel of the output stands when the normalised ones follow the input.
        source = torch.arange(num_channels, device="cpu")
        source[indices] = num_channels + torch.arange(len(channels), device="cpu")
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("source", source, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, num_channels, H, W)`` to the same shape."""
        if not self.channels:
            return x
        first, end = self.channels[0], self.channels[0] + len(self.channels)
        if self.channels == tuple(range(first, end)):
            chosen = F.group_norm(x[:, first:end], self.num_groups, eps=self.eps)
            parts = [x[:, :first], chosen, x[:, end:]]
            return torch.cat([part for part in parts if part.shape[1]], 1)
        chosen = F.group_norm(x.index_select(1, self.indices), self.num_groups, eps=self.eps)
        return torch.cat([x, chosen], 1).index_select(1, self.source)

    def by_group(self) -> Tensor:
        """The channels of every group, ``(num_groups, channels of one)``."""
        return self.indices.cpu().view(self.num_groups or 1, -1)

    def keep(self, channels: Tensor) -> None:
        """Cut out all channels but the given ones, ``(n,)``.

        Raises:
            ValueError: They are part of a group: what is left of it would have other statistics.
        """
        place = {channel: at for at, channel in enumerate(channels.tolist())}
        left = [[c for c in group if c in place] for group in self.by_group().tolist()]
        size = len(self.channels) // max(self.num_groups, 1)
        groups = [group for group in left if group]
        if any(len(group) < size for group in groups):
            raise ValueError("a group of a group norm is kept or removed as a whole")
        kept = tuple(place[channel] for group in groups for channel in group)
        self._set(len(channels), len(groups), kept)
        self.to(channels.device)

    def extra_repr(self) -> str:
        """What is shown between the brackets."""
        some = f"{len(self.channels)} of {self.num_channels} channels"
        return f"{self.num_groups} groups, {some}, eps={self.eps}"


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


class ChannelSelection(nn.Module):
    """Some channels of a tensor, at every stride-th position.

    A slice where the channels stand side by side, which costs nothing or one copy; else
    they are gathered by index.

    Args:
        in_channels: Of the input.
        channels: Which ones, in the order of the output.
        stride: In both directions.
        scale: Whether each is multiplied by a learnable number.
        bias: Whether a learnable number is added to each.
    """

    indices: Tensor

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        stride: int = 1,
        scale: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not channels or not all(0 <= channel < in_channels for channel in channels):
            raise ValueError(f"channels must be some of 0 to {in_channels - 1}")
        self.in_channels, self.channels, self.stride = in_channels, tuple(channels), stride
        self.scale = nn.Parameter(torch.ones(len(channels))) if scale else None
        self.bias = nn.Parameter(torch.zeros(len(channels))) if bias else None
        # Known from the arguments: neither saved, nor made without values on the meta device.
        indices = torch.tensor(self.channels, device="cpu")
        self.register_buffer("indices", indices, persistent=False)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return len(self.channels)

    @property
    def is_slice(self) -> bool:
        """Whether the channels stand side by side."""
        first = self.channels[0]
        return self.channels == tuple(range(first, first + len(self.channels)))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, len(channels), ceil(H / s), ceil(W / s))``."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.is_slice:
            x = x[:, self.channels[0] : self.channels[-1] + 1]
        else:
            x = x.index_select(1, self.indices)
        if self.scale is not None:
            x = x * self.scale[:, None, None]
        return x if self.bias is None else x + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """What is shown between the brackets."""
        how = "slice" if self.is_slice else "index"
        return f"{len(self.channels)} of {self.in_channels} channels by {how}, stride={self.stride}"


class ResidualBlock(nn.Module):
    """``F(x) + S(x)`` where each of F and S may miss some output channels.

    The output's channels are, in this order: those that F and S add up to, those of F
    alone, those of S alone.

    Args:
        body: F, a list of layers.
        added: S's part of the channels that F has too: the first ones of F.
        passed: S's part of the channels that F does not have.
    """

    def __init__(
        self,
        body: nn.Sequential,
        added: nn.Conv2d | ChannelSelection | None,
        passed: ChannelSelection | None,
    ) -> None:
        super().__init__()
        self.body, self.added, self.passed = body, added, passed
        # Known before the first image, so that the block can be traced.
        made = [layer.out_channels for layer in body if isinstance(layer, nn.Conv2d)][-1]
        self._both, self._all_added = 0, True
        if added is not None:
            self._both = added.out_channels
            self._all_added = self._both == made

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the shape of the sum."""
        out: Tensor = self.body(x)
        if self.added is not None:
            shortcut = self.added(x)
            if self._all_added:
                out = out + shortcut
            else:
                both = self._both
                out = torch.cat([out[:, :both] + shortcut, out[:, both:]], dim=1)
        return out if self.passed is None else torch.cat([out, self.passed(x)], dim=1)
