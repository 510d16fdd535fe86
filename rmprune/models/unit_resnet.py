"""ResNets whose convolutions are units to choose: one convolution with its BN, OREPA, or DBB.

He et al. 2016 with ImageNet's stem and stages, and two forms for small images: ResNet-18 with a
3×3 stem, and ResNet-20 with its three thin stages and option-A shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from rmprune.models.cifar_resnet import OptionAShortcut
from rmprune.models.dbb import conv_bn, dbb_unit
from rmprune.models.orepa import orepa_unit, orepa_vgg

Unit = Callable[[int, int, int, int], nn.Module]  # input, output channels, kernel size, stride
UNITS: dict[str, Unit] = {"plain": conv_bn, "orepa": orepa_unit, "dbb": dbb_unit}
DEPTHS: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResidualUnits(nn.Module):
    """``relu(F(x) + S(x))``.

    Args:
        body: F, units with ReLUs in between.
        shortcut: S; None is the identity.
        out_channels: Of the sum.
    """

    def __init__(self, body: nn.Sequential, shortcut: nn.Module | None, out_channels: int) -> None:
        super().__init__()
        self.body, self.shortcut, self.out_channels = body, shortcut, out_channels
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y: Tensor = self.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))
        return y


def basic_block(
    n_in: int, width: int, stride: int, unit: Unit, option_a: bool = False
) -> ResidualUnits:
    """Two 3×3 units; a shortcut that changes the shape is no unit, as in the authors' networks.

    Args:
        n_in: Input channels.
        width: Output channels.
        stride: Of the first unit.
        unit: Makes them.
        option_a: Whether a shortcut that changes the shape has no parameters.
    """
    body = nn.Sequential(unit(n_in, width, 3, stride), nn.ReLU(), unit(width, width, 3, 1))
    shortcut: nn.Module | None = None
    if n_in != width:
        shortcut = OptionAShortcut(n_in, width) if option_a else conv_bn(n_in, width, 1, stride)
    return ResidualUnits(body, shortcut, width)


def bottleneck(n_in: int, width: int, stride: int, unit: Unit) -> ResidualUnits:
    """1×1, 3×3 and 1×1 units for ``4 · width`` channels; a projecting shortcut is a unit, too."""
    n_out = 4 * width
    body = nn.Sequential(
        *(unit(n_in, width, 1, 1), nn.ReLU(), unit(width, width, 3, stride), nn.ReLU()),
        unit(width, n_out, 1, 1),
    )
    return ResidualUnits(body, None if n_in == n_out else unit(n_in, n_out, 1, stride), n_out)


def unit_resnet(
    stem: Sequence[nn.Module],
    block: Callable[[int, int, int], ResidualUnits],
    depths: Sequence[int],
    width: int,
    num_classes: int,
) -> nn.Sequential:
    """A stem, stages of blocks that double the width, global average pooling, one linear layer.

    Args:
        stem: Layers that give ``width`` channels.
        block: Made of its input channels, width and first stride.
        depths: Blocks in each stage; every stage but the first begins with stride 2.
        width: Of the first stage.
        num_classes: Outputs.
    """
    blocks: list[nn.Module] = []
    n_in = width
    for stage, depth in enumerate(depths):
        for place in range(depth):
            made = block(n_in, width << stage, 2 if stage > 0 and place == 0 else 1)
            blocks.append(made)
            n_in = made.out_channels
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, num_classes)
    )


def imagenet_resnet(kind: str, layers: int, num_classes: int) -> nn.Sequential:
    """ResNet-18, 34 or 50 for ImageNet, of units of a kind in `UNITS`."""
    unit = UNITS[kind]
    block = partial(bottleneck if layers == 50 else basic_block, unit=unit)
    stem = [unit(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return unit_resnet(stem, block, DEPTHS[layers], 64, num_classes)


def cifar_resnet18(kind: str, num_classes: int) -> nn.Sequential:
    """ResNet-18 for small images, of units of a kind in `UNITS`; a 3×3 stem of stride 1."""
    unit = UNITS[kind]
    stem = [unit(3, 64, 3, 1), nn.ReLU()]
    return unit_resnet(stem, partial(basic_block, unit=unit), DEPTHS[18], 64, num_classes)


def cifar_resnet20(kind: str, num_classes: int) -> nn.Sequential:
    """ResNet-20, of units of a kind in `UNITS`; option-A shortcuts."""
    unit = UNITS[kind]
    block = partial(basic_block, unit=unit, option_a=True)
    return unit_resnet([unit(3, 16, 3, 1), nn.ReLU()], block, (3, 3, 3), 16, num_classes)


KINDS = ("orepa", "dbb")
BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"{kind}_resnet18": partial(cifar_resnet18, kind) for kind in KINDS},
    **{f"{kind}_resnet20": partial(cifar_resnet20, kind) for kind in KINDS},
    **{
        f"{kind}_resnet{layers}_imagenet": partial(imagenet_resnet, kind, layers)
        for kind in KINDS
        for layers in DEPTHS
    },
    "orepa_vgg_a0": partial(orepa_vgg, (1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)),
}
