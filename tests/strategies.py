"""Random residual networks, for property tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F


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
