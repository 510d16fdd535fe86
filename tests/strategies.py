"""Random residual networks, for property tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rmprune.checkpoints import SlimConfig

SHORT = SlimConfig(  # of a run that takes seconds and is the same on every machine
    epochs=1,
    finetune_epochs=1,
    batch_size=32,
    lr=0.02,
    precision="float32",
    device="cpu",
    lowering="auto",
)


class OptionA(nn.Module):
    """Subsample and pad with zero channels."""

    def __init__(self, front: int, back: int) -> None:
        super().__init__()
        self.front, self.back = front, back

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.front, self.back))


class Residual(nn.Module):
    """y = relu(F(x) + S(x)), with the addition in either order."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, swap: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.swap = body, shortcut, swap
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        y = self.body(x)
        return self.relu(identity + y if self.swap else y + identity)


SHORTCUTS = ("identity", "projection", "projection without bn", "option a")


@st.composite
def residual_networks(
    draw: st.DrawFn, shortcuts: tuple[str, ...] = SHORTCUTS, two_convs: bool = False
) -> nn.Sequential:
    """Networks of basic blocks in float64, with scrambled BNs and in evaluation mode.

    Random depth, widths, strides, kernel sizes and shortcuts; 3 input channels, 5 classes.
    """
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(2, 7))
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=draw(st.booleans())),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    if draw(st.booleans()):
        layers.append(nn.MaxPool2d(3, 2, 1))
    for _ in range(draw(st.integers(1, 3))):
        block, width = _block(draw, width, draw(st.sampled_from(shortcuts)), two_convs)
        layers.append(block)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    return scramble(nn.Sequential(*layers)).double().eval()


def _block(draw: st.DrawFn, width: int, shortcut: str, two_convs: bool) -> tuple[nn.Module, int]:
    out = width if shortcut == "identity" else draw(st.integers(2, 7))
    stride = 1 if shortcut == "identity" else draw(st.sampled_from([1, 2]))
    side: nn.Module | None = None
    if shortcut == "option a":
        stride, front = 2, draw(st.integers(0, 2))
        back = draw(st.integers(0, 2))
        out, side = width + front + back, OptionA(front, back)
    elif shortcut != "identity":
        side = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=draw(st.booleans())))
        if shortcut == "projection":
            side.append(nn.BatchNorm2d(out))
    kernels = st.sampled_from([1, 3, 5])
    inner = draw(st.integers(1, 8))
    first, last = draw(kernels), draw(kernels)
    bias = draw(st.booleans())
    if not two_convs and draw(st.integers(0, 4)) == 0:
        body = [nn.Conv2d(width, out, first, stride, first // 2, bias=bias), nn.BatchNorm2d(out)]
    else:
        strides = (stride, 1) if draw(st.booleans()) else (1, stride)
        body = [
            nn.Conv2d(width, inner, first, strides[0], first // 2, bias=bias),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out, last, strides[1], last // 2, bias=bias),
            nn.BatchNorm2d(out, eps=1e-3),
        ]
    return Residual(nn.Sequential(*body), side, draw(st.booleans())), out


def scramble(model: nn.Module) -> nn.Module:
    """Give every BN statistics and affine parameters that a wrong fold would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model


# Networks of every piece that conversion is documented to rewrite.

ACTIVATIONS: tuple[Callable[[int], nn.Module], ...] = (
    lambda _: nn.ReLU(),
    lambda _: nn.ReLU(inplace=True),
    lambda _: nn.ReLU6(),
    lambda _: nn.LeakyReLU(0.1),
    lambda _: nn.PReLU(),
    nn.PReLU,
    lambda _: nn.Hardswish(),
    lambda _: nn.SiLU(),
    lambda _: nn.GELU(),
)


class Gated(nn.Module):
    """Squeeze and excitation, by modules or by functions."""

    def __init__(self, channels: int, gate: nn.Module, functional: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(channels // 2, 1), 1)
        self.expand = nn.Conv2d(max(channels // 2, 1), channels, 1)
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), nn.ReLU(), gate
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True) if self.functional else self.pool(x)
        gate = self.gate(self.expand(self.act(self.reduce(mean))))
        return x * gate if self.functional else gate * x


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropBody(nn.Module):
    """Stochastic depth, as many write it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) < 0.5)


class Sum(nn.Module):
    """y = F(x) + S(x), with no activation behind it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, way: int) -> None:
        super().__init__()
        self.body, self.shortcut, self.way = body, shortcut, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return self.body(x) + self.shortcut(x)
        if self.way == 1:
            return torch.add(self.shortcut(x), self.body(x))
        y = self.body(x)
        y += self.shortcut(x)
        return y


@st.composite
def networks_of_all_pieces(draw: st.DrawFn) -> nn.Sequential:
    """Residual networks in float64 and evaluation mode; 3 input channels, 4 classes."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(1, 4)) * draw(st.sampled_from([1, 2, 4]))
    layers: list[nn.Module] = [*_unit(draw, 3, width, stride=1, groups=False)]
    if draw(st.booleans()):
        layers.append(nn.MaxPool2d(3, 2, 1))
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([width, width, 2 * width, max(width // 2, 1)]))
        layers += _any_block(draw, width, out, depth=0)
        width = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return scramble(nn.Sequential(*layers)).double().eval()


def _any_block(draw: st.DrawFn, width: int, out: int, depth: int) -> list[nn.Module]:
    stride = draw(st.sampled_from([1, 1, 2])) if depth == 0 else 1
    first: list[nn.Module] = []
    if draw(st.integers(0, 3)) == 0:  # pre-activation
        first = [nn.BatchNorm2d(width), _activation(draw, width)]
    count = draw(st.integers(1, 3))
    strided = draw(st.integers(0, count - 1))
    widths = [width, *(draw(st.integers(1, 6)) for _ in range(count - 1)), out]
    body = list(first)
    for place in range(count):
        last = place == count - 1
        body += _unit(
            draw,
            widths[place],
            widths[place + 1],
            stride if place == strided else 1,
            bare=last and draw(st.booleans()),
        )
    if depth == 0 and draw(st.integers(0, 4)) == 0:
        body += _any_block(draw, out, out, depth=1)
    if draw(st.integers(0, 4)) == 0:
        body.append(LayerScale(out))
    body.append(draw(st.sampled_from([nn.Identity(), nn.Dropout(0.2), DropBody()])))
    block = Sum(
        nn.Sequential(*body), _any_shortcut(draw, width, out, stride), draw(st.integers(0, 2))
    )
    return [block, _activation(draw, out)] if draw(st.booleans()) else [block]


def _any_shortcut(draw: st.DrawFn, width: int, out: int, stride: int) -> nn.Module:
    if width == out and stride == 1:
        return nn.Identity()
    if out >= width and stride == 2 and draw(st.integers(0, 3)) == 0:
        return OptionA((out - width) // 2, out - width - (out - width) // 2)
    layers: list[nn.Module] = []
    if stride == 2 and draw(st.booleans()):
        layers.append(nn.AvgPool2d(2, 2))
        stride = 1
    layers.append(nn.Conv2d(width, out, 1, stride, bias=draw(st.booleans())))
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(out))
    return nn.Sequential(*layers)


def _unit(
    draw: st.DrawFn, width: int, out: int, stride: int, groups: bool = True, bare: bool = False
) -> list[nn.Module]:
    """A convolution and what follows it."""
    size = draw(st.sampled_from([1, 3, 3, 5, 7]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    shared = [g for g in range(1, width + 1) if width % g == out % g == 0] if groups else [1]
    layers: list[nn.Module] = [
        nn.Conv2d(
            width,
            out,
            size,
            stride,
            dilation * (size // 2),
            dilation,
            draw(st.sampled_from(shared)),
            draw(st.booleans()),
        )
    ]
    if draw(st.integers(0, 3)):
        layers.append(nn.BatchNorm2d(out))
    if not bare:
        layers.append(_activation(draw, out))
    if draw(st.integers(0, 3)) == 0:
        gate = draw(st.sampled_from([nn.Sigmoid(), nn.Hardsigmoid()]))
        layers.append(Gated(out, gate, draw(st.booleans())))
    return layers


def _activation(draw: st.DrawFn, channels: int) -> nn.Module:
    return draw(st.sampled_from(ACTIVATIONS))(channels)
