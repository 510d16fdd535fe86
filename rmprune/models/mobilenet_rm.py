"""The MobileNetV2 that turns into MobileNetV1: RMNet, arXiv 2111.00687, sections 4.4 and 5.3.

Its inverted residual blocks are so wide that their hidden channels and the channels that
conversion reserves for the shortcut make up MobileNetV1's depthwise widths. Converted, with
its pairs of pointwise convolutions merged, it is MobileNetV1 layer for layer:

    rmprune.convert(create_model("mobilenetv2_rm").eval(), example_input, fuse="always")
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

# Hidden channels, output channels, blocks, stride of the first.
BLOCKS = (
    *((64, 64, 1, 2), (64, 64, 1, 1), (128, 128, 1, 2), (128, 128, 1, 1)),
    *((256, 256, 1, 2), (256, 256, 5, 1), (512, 512, 1, 2), (512, 512, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a residual where the shape is kept.

    Args:
        n_in: Input channels.
        hidden: Channels of the depthwise convolution.
        n_out: Output channels.
        stride: Of the depthwise convolution.
    """

    def __init__(self, n_in: int, hidden: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.expand = _conv_bn_relu(n_in, hidden, 1)
        self.depthwise = _conv_bn_relu(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, n_out, 1, bias=False), nn.BatchNorm2d(n_out))
        self.is_residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


def mobilenetv2_rm(num_classes: int) -> nn.Module:
    """Build the network, for 32×32 images, with random weights.

    It has ReLU, not ReLU6, so that its reserved channels can pass a PReLU.
    """
    layers: list[nn.Module] = [
        _conv_bn_relu(3, 32, 3),
        _conv_bn_relu(32, 32, 3, groups=32),
        nn.Sequential(nn.Conv2d(32, 512, 1, bias=False), nn.BatchNorm2d(512)),
    ]
    width = 512
    for hidden, out, count, stride in BLOCKS:
        for place in range(count):
            layers.append(InvertedResidual(width, hidden, out, stride if place == 0 else 1))
            width = out
    layers.append(_conv_bn_relu(width, 1024, 1))
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(1024, num_classes),
        )
    )


def _conv_bn_relu(
    n_in: int, n_out: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = kernel_size // 2
    conv = nn.Conv2d(n_in, n_out, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())
