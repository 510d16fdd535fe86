"""A plain net: a network that is a list of layers, with nothing added to anything.

`rmprune.lowering` may put blocks with additions into the list, where these are faster; such
a net is measured, saved and exported like any other, and no longer plain.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Width:
    """Output channels of one layer: those it computes itself, and those it carries.

    Attributes:
        own: Channels of the residual network's own layer.
        reserved: Channels that are copied for later, and channels of zeros between groups.
        alternating: Whether own and reserved channels take turns; otherwise the reserved
            ones stand behind the own ones (of a grouped convolution: in each group).
    """

    own: int
    reserved: int = 0
    alternating: bool = False

    @property
    def total(self) -> int:
        """All output channels."""
        return self.own + self.reserved


class PlainNet(nn.Sequential):
    """An ``nn.Sequential`` of leaf modules that knows where its channels come from.

    Args:
        layers: The layers in order, by unique name.
        input_shape: ``(channels, height, width)`` of one image.
        converted_widths: Output channels of every convolution when the net was converted,
            by layer name; the reserved channels stand behind the layer's own. Of a net that a run
            pruned before it was converted, those before.
        widths: The same, as they are now.
        info: What else a user of the net must know, as JSON values: class names,
            normalisation, data set.
    """

    def __init__(
        self,
        layers: OrderedDict[str, nn.Module],
        input_shape: tuple[int, int, int] | None = None,
        converted_widths: dict[str, Width] | None = None,
        widths: dict[str, Width] | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(layers)
        self.input_shape = input_shape
        self.converted_widths = dict(converted_widths or {})
        self.widths = dict(widths or self.converted_widths)
        self.info = dict(info or {})

    @property
    def is_plain(self) -> bool:
        """Whether every layer is a leaf: nothing is added to anything."""
        return not any(list(layer.children()) for layer in self.children())

    def with_layers(
        self, layers: OrderedDict[str, nn.Module], widths: dict[str, Width] | None = None
    ) -> PlainNet:
        """The same net with other layers; what is known of its channels is kept."""
        return PlainNet(
            layers,
            self.input_shape,
            self.converted_widths,
            self.widths if widths is None else widths,
            self.info,
        )


def plain_name(path: str) -> str:
    """What a residual network's layer is called in its plain net, by the layer's path."""
    return path.replace(".", "_")
