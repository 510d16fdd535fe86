"""Plain-20 to Plain-110, Plain-18 to Plain-50 and WRN-28-10, with PNNH and without.

Zhang et al. 2024 (arXiv 2402.08645): ResNets without a residual connection. Those of 20, 56 and
110 layers and the wide one are for 32×32 images (He et al. 2016, section 4.2; Zagoruyko and
Komodakis 2016), those of 18, 34 and 50 for ImageNet. Where the paper leaves open how the coders
are made, see `rmprune.models.pnnh_blocks.Coding`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from rmprune.models.pnnh_blocks import BASIC, BOTTLENECK, BlockKind, Coding, conv, stage


@dataclass(frozen=True)
class Network:
    """The shape of a network.

    Attributes:
        kind: Of its blocks.
        depths: Blocks in each stage.
        widths: Output channels of each stage; every stage but the first begins with stride 2.
        stem: Output channels of the first layer.
        is_large: Whether that is a 7×7 convolution of stride 2 and a max-pooling, for ImageNet,
            or a 3×3 convolution.
    """

    kind: BlockKind
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: int
    is_large: bool = False


THIN, LARGE = (16, 32, 64), (64, 128, 256, 512)
NETWORKS: Mapping[str, Network] = {
    "resnet20": Network(BASIC, (3, 3, 3), THIN, 16),
    "resnet56": Network(BASIC, (9, 9, 9), THIN, 16),
    "resnet110": Network(BASIC, (18, 18, 18), THIN, 16),
    "resnet18": Network(BASIC, (2, 2, 2, 2), LARGE, 64, is_large=True),
    "resnet34": Network(BASIC, (3, 4, 6, 3), LARGE, 64, is_large=True),
    "resnet50": Network(BOTTLENECK, (3, 4, 6, 3), (256, 512, 1024, 2048), 64, is_large=True),
    "wrn28_10": Network(BASIC, (4, 4, 4), (160, 320, 640), 16),
}


def pnnh_net(network: Network, num_classes: int = 10, coding: Coding | None = None) -> nn.Module:
    """A plain network with PNNH, its coders not yet pretrained.

    Args:
        network: Its shape.
        num_classes: Outputs.
        coding: How the coders are made; untied 1×1 ones by default.
    """
    return _net(network, num_classes, Coding() if coding is None else coding)


def plain_net(network: Network, num_classes: int = 10) -> nn.Module:
    """A residual network without its shortcuts.

    Args:
        network: Its shape.
        num_classes: Outputs.
    """
    return _net(network, num_classes, None)


def _net(network: Network, num_classes: int, coding: Coding | None) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv(3, network.stem, *((7, 2) if network.is_large else (3, 1)))
    layers["bn1"], layers["relu"] = nn.BatchNorm2d(network.stem), nn.ReLU()
    if network.is_large:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    n_in = network.stem
    for place, (depth, width) in enumerate(zip(network.depths, network.widths, strict=True), 1):
        stride = 1 if place == 1 else 2
        layers[f"layer{place}"] = stage(network.kind, n_in, width, depth, stride, coding)
        n_in = width
    layers["avgpool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["linear"] = nn.Linear(n_in, num_classes)
    return nn.Sequential(layers)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"pnnh_{name}": partial(pnnh_net, network) for name, network in NETWORKS.items()},
    **{f"plain_{name}": partial(plain_net, network) for name, network in NETWORKS.items()},
}
