"""ResNets for 32×32 images: He et al. 2016, section 4.2, and the CIFAR ResNet-18/34 of RMNet.

The deep, thin ones (20 to 110 layers: 16, 32, 64 channels) have parameter-free "option A"
shortcuts; the wide ones (18 and 34 layers: 64 to 512 channels) project with 1×1 convolutions.
Every network traces with ``torch.fx``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OptionAShortcut(nn.Module):
    """Subsample and pad with zero channels (He et al. 2016, option A).

    ``(N, in, H, W)`` to ``(N, out, ceil(H / stride), ceil(W / stride))``: the zero channels
    stand half in front and half behind, planes / 4 each where planes = ``out`` = 2 · ``in``.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.front = (n_out - n_in) // 2
        self.behind = n_out - n_in - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut's output."""
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, self.front, self.behind))


def projection_shortcut(n_in: int, n_out: int) -> nn.Sequential:
    """1×1 convolution of stride 2 and BN, as torchvision's ``downsample``."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1, 2, bias=False), nn.BatchNorm2d(n_out))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BN, plus a shortcut.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        downsample: The shortcut; None is the identity. With one, the first stride is 2.
    """

    def __init__(self, n_in: int, n_out: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        stride = 1 if downsample is None else 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        total: Tensor = self.relu2(y + shortcut)
        return total


class ResNet(nn.Module):
    """3×3 stem, stages of basic blocks, global average pooling, one linear layer.

    Args:
        blocks: Basic blocks in each stage.
        widths: Channels of each stage; every stage but the first begins with stride 2.
        num_classes: Outputs.
        projection: Shortcuts that change the shape: 1×1 convolutions with BN, or option A.
        head: Name of the linear layer in the state dict: published weights differ here.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        *,
        projection: bool = False,
        head: str = "linear",
    ) -> None:
        super().__init__()
        shortcut = projection_shortcut if projection else OptionAShortcut
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = tuple(f"layer{i}" for i in range(1, len(blocks) + 1))
        n_in = widths[0]
        for name, depth, width in zip(self.stages, blocks, widths, strict=True):
            first = BasicBlock(n_in, width, None if n_in == width else shortcut(n_in, width))
            rest = (BasicBlock(width, width) for _ in range(depth - 1))
            self.add_module(name, nn.Sequential(first, *rest))
            n_in = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = head
        self.add_module(head, nn.Linear(n_in, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        x = torch.flatten(self.avgpool(x), 1)
        logits: Tensor = self.get_submodule(self.head)(x)
        return logits


def thin_resnet(layers: int, num_classes: int = 10) -> ResNet:
    """ResNet of He et al. 2016, section 4.2: ``layers`` = 6n + 2, option-A shortcuts."""
    return ResNet([(layers - 2) // 6] * 3, [16, 32, 64], num_classes)


def wide_resnet(blocks: Sequence[int], num_classes: int = 10) -> ResNet:
    """ImageNet's ResNet with a 3×3 stem of stride 1 and no max-pooling; keys as torchvision's."""
    return ResNet(blocks, [64, 128, 256, 512], num_classes, projection=True, head="fc")
