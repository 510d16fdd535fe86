"""RGSNets: bottleneck ResNets with a ReLU and a group norm on their shortcuts.

Zhang et al., BMVC 2019. Of ``r = relu(x)``, which both paths of a block read:

    base  F(r) + GN(r)
    dual  the same, and inside of F a shortcut of h, what its 3×3 convolution reads: ``… + GN(h)``
    res   dual, plus the identity x

Where a block changes the shape the paper says nothing of its shortcut; here it is the usual
projection of r (1×1 convolution and BN), without a group norm and without the identity. The inner
shortcut is left out at stride 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

Variant = Literal["base", "dual", "res"]
VARIANTS: tuple[Variant, ...] = ("base", "dual", "res")
DEPTHS = {
    26: (2, 2, 2, 2),
    32: (2, 3, 3, 2),
    38: (3, 3, 3, 3),
    50: (3, 4, 6, 3),
    62: (3, 4, 10, 3),
    77: (3, 4, 15, 3),
}
EXPANSION = 4
GROUPS = 32  # of a net of full width


class RGSBottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions of ``relu(x)``, and its shortcuts.

    Args:
        n_in: Input channels.
        width: Channels inside; the output has four times as many.
        stride: Of the 3×3 convolution.
        groups: Of the group norms.
        variant: Which shortcuts there are.
    """

    def __init__(self, n_in: int, width: int, stride: int, groups: int, variant: Variant) -> None:
        super().__init__()
        n_out = EXPANSION * width
        self.relu = nn.ReLU()
        self.reduce = nn.Sequential(_conv_bn(n_in, width, 1), nn.ReLU())
        self.middle = _conv_bn(width, width, 3, stride)
        self.inner = nn.GroupNorm(groups, width) if variant != "base" and stride == 1 else None
        self.expand = nn.Sequential(nn.ReLU(), _conv_bn(width, n_out, 1))
        keeps_shape = n_in == n_out and stride == 1
        self.shortcut = (
            nn.GroupNorm(groups, n_out) if keeps_shape else _conv_bn(n_in, n_out, 1, stride)
        )
        self.adds_identity = variant == "res" and keeps_shape

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, 4 · width, H', W')``; no activation follows."""
        r = self.relu(x)
        h = self.reduce(r)
        y = self.middle(h)
        if self.inner is not None:
            y = y + self.inner(h)
        out: Tensor = self.expand(y) + self.shortcut(r)
        return out + x if self.adds_identity else out


def rgsnet(
    depths: tuple[int, ...],
    variant: Variant,
    num_classes: int,
    *,
    width: float = 1,
    imagenet: bool = False,
) -> nn.Sequential:
    """Build the network.

    Args:
        depths: Blocks in each stage; those of `DEPTHS` are the paper's.
        variant: Of the blocks.
        num_classes: Outputs.
        width: Of 64, 128, 256 and 512 channels inside the blocks of the four stages, and of the
            32 groups.
        imagenet: Whether the stem is 7×7 of stride 2 and max-pooling, or 3×3 for small images.
    """
    first, groups = round(64 * width), max(1, round(GROUPS * width))
    layers: list[nn.Module] = [_conv_bn(3, first, 3)]
    if imagenet:
        layers = [_conv_bn(3, first, 7, 2), nn.MaxPool2d(3, 2, 1)]
    n_in = first
    for stage, depth in enumerate(depths):
        for place in range(depth):
            stride = 2 if stage > 0 and place == 0 else 1
            layers.append(RGSBottleneck(n_in, first << stage, stride, groups, variant))
            n_in = EXPANSION * (first << stage)
    return nn.Sequential(
        *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, num_classes)
    )


def _conv_bn(n_in: int, n_out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{
        f"rgsnet{layers}_{variant}": partial(rgsnet, depths, variant)
        for layers, depths in DEPTHS.items()
        for variant in VARIANTS
    },
    **{
        f"rgsnet{layers}_{variant}_imagenet": partial(
            rgsnet, DEPTHS[layers], variant, imagenet=True
        )
        for layers in (26, 50)
        for variant in VARIANTS
    },
    **{
        f"rgsnet26_{variant}_quarter": partial(rgsnet, DEPTHS[26], variant, width=0.25)
        for variant in VARIANTS
    },
}
