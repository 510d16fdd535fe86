"""OREPA: blocks of linear branches that are one convolution in every training step.

Hu et al., "Online convolutional re-parameterization", CVPR 2022. A block is linearised: no branch
has a BN, each ends in a factor for every output channel, and one BN follows the sum. So it can
be squeezed into one kernel *before* the images pass, and costs the memory of one convolution.
Branches and initial values are those of the authors' code.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor, nn

from rmprune.composed import ComposedConv2d
from rmprune.models.kernels import (
    behind_pointwise,
    centred,
    composed,
    frequency_prior,
    identity_kernel,
    separable,
)

MULTIPLIER = 8  # depthwise kernels for each input channel
MANY_GROUPS = 4  # with more, the 1×1-k×k branch has twice the input's channels inside


class OREPA(ComposedConv2d):
    """k×k, 1×1-average, 1×1-frequency prior, 1×1-k×k, 1×1 and depthwise separable, summed.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Odd.
        stride: In both directions.
        groups: As of a convolution.
        pointwise: Whether there is the 1×1 branch; RepVGG's blocks have one of their own.

    ``scales``, ``(branches, out_channels)``, are the branches' factors, those of the 1×1 one last.
    """

    identity: Tensor
    cosines: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        pointwise: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, kernel_size // 2, groups)
        self.size = k = kernel_size
        width, inner = in_channels // groups, in_channels * (1 if groups <= MANY_GROUPS else 2)
        self.origin = _uniform(out_channels, width, k)
        self.average = _uniform(out_channels, width)
        self.prior = _uniform(out_channels, width)
        self.delta = nn.Parameter(torch.zeros(inner, width, 1, 1))
        self.behind_delta = _uniform(out_channels, inner // groups, k)
        self.pointwise = _uniform(out_channels, width) if pointwise else None
        # Variance by the fan-in of the layer, (in · 8, 1, k, k).
        depthwise = _uniform(in_channels * MULTIPLIER, 1, k).detach()
        self.depthwise = nn.Parameter(depthwise.view(in_channels, MULTIPLIER, k, k))
        self.behind_depthwise = _uniform(out_channels, width * MULTIPLIER)
        scales = torch.tensor([0.25, 0.25, 0.0, 0.5, 0.5, 1.0][: 6 if pointwise else 5])
        self.scales = nn.Parameter(scales[:, None].repeat(1, out_channels))
        # Known from the arguments, so not saved.
        self.register_buffer("identity", identity_kernel(inner, width), persistent=False)
        self.register_buffer("cosines", frequency_prior(out_channels, k), persistent=False)

    def kernel(self) -> Tensor:
        """``(out_channels, in_channels / groups, k, k)``.

        A branch's factors stand with its last weights, as the smallest tensors that they can.
        """
        origin, average, prior, behind_delta, separate, *centre = self.scales[..., None, None, None]
        first = self.identity + self.delta
        kernel: Tensor = (
            origin * self.origin
            + average * self.average / self.size**2
            + prior * self.prior * self.cosines
            + behind_pointwise(first, behind_delta * self.behind_delta, self.groups)
            + separable(self.depthwise, separate * self.behind_depthwise, self.groups)
        )
        if self.pointwise is None:
            return kernel
        return kernel + centred(centre[0] * self.pointwise, self.size)


class OREPA1x1(ComposedConv2d):
    """Rep-1×1, for bottlenecks: a 1×1 convolution and two in sequence, summed.

    Of the two in sequence the one that keeps the number of channels begins as the identity.
    ``scales``, ``(2, out_channels)``, are the branches' factors.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        narrow = min(in_channels, out_channels)
        self.origin = _uniform(out_channels, in_channels, a=1)
        first, second = torch.eye(narrow)[:, :, None, None], torch.eye(narrow)[:, :, None, None]
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)
        if out_channels > in_channels:
            self.second = _uniform(out_channels, narrow, a=1)
        else:
            self.first = _uniform(narrow, in_channels, a=1)
        self.scales = nn.Parameter(torch.tensor([[1.0], [0.5]]).repeat(1, out_channels))

    def kernel(self) -> Tensor:
        """``(out_channels, in_channels, 1, 1)``."""
        origin, sequence = self.scales[..., None, None, None]
        kernel: Tensor = origin * self.origin
        return kernel + behind_pointwise(self.first, sequence * self.second)


class DeepStem(ComposedConv2d):
    """A linear deep stem: 3×3 blocks in sequence as one convolution, 7×7 for three of them.

    Args:
        in_channels: Of the image.
        out_channels: Of every block.
        stride: Of the whole; the blocks inside have none.
        depth: How many blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, depth: int = 3) -> None:
        super().__init__(in_channels, out_channels, stride, depth)
        widths = [in_channels, *[out_channels] * depth]
        self.blocks = nn.ModuleList(OREPA(*pair) for pair in pairwise(widths))

    def kernel(self) -> Tensor:
        """``(out_channels, in_channels, 2 · depth + 1, 2 · depth + 1)``."""
        kernels = (block.kernel() for block in self.blocks if isinstance(block, OREPA))
        return reduce(composed, kernels)


def orepa_unit(n_in: int, n_out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """A block of the kind that the authors use for a kernel size, and the BN behind it."""
    block: nn.Module
    match kernel_size:
        case 1:
            block = OREPA1x1(n_in, n_out, stride)
        case 7:
            block = DeepStem(n_in, n_out, stride)
        case _:
            block = OREPA(n_in, n_out, kernel_size, stride)
    return nn.Sequential(block, nn.BatchNorm2d(n_out))


class OrepaVGGBlock(nn.Module):
    """RepVGG's block with OREPA in place of its 3×3: ``relu(BN(x) + BN(1×1) + BN(OREPA))``.

    The BN of x is there where the block keeps the shape.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(
            OREPA(n_in, n_out, 3, stride, pointwise=False), nn.BatchNorm2d(n_out)
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
        )
        self.identity = nn.BatchNorm2d(n_in) if n_in == n_out and stride == 1 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y: Tensor = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            y = y + self.identity(x)
        out: Tensor = self.relu(y)
        return out


def orepa_vgg(depths: tuple[int, ...], widths: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """A RepVGG of OREPA blocks: every stage begins with stride 2.

    Args:
        depths: Blocks in each stage; RepVGG-A has 1, 2, 4, 14, 1.
        widths: Channels of each stage.
        num_classes: Outputs.
    """
    blocks: list[nn.Module] = []
    n_in = 3
    for depth, width in zip(depths, widths, strict=True):
        for place in range(depth):
            blocks.append(OrepaVGGBlock(n_in, width, 2 if place == 0 else 1))
            n_in = width
    return nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, num_classes)
    )


def _uniform(n_out: int, n_in: int, size: int = 1, a: float = 0) -> nn.Parameter:
    weight = torch.empty(n_out, n_in, size, size)
    return nn.Parameter(nn.init.kaiming_uniform_(weight, a=a))
