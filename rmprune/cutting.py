"""Layers reduced to some of their channels, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmprune.grouping import regrouped
from rmprune.layers import ChannelGate, PartialActivation, PartialGroupNorm


@torch.no_grad()
def cut_connections(
    layer: nn.Conv2d | nn.Linear, outputs: Tensor, inputs: Tensor, groups: int = 1
) -> None:
    """Keep some connections of a convolution or linear layer.

    Args:
        layer: A linear layer may read several positions of each channel, one after the other.
        outputs: Which channels it computes from now on, ``(m,)``, group by group.
        inputs: Which ones it reads, ``(n,)``, likewise.
        groups: Of what is left.
    """
    before = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight, device = layer.weight, layer.weight.device
    outputs, inputs = outputs.to(device), inputs.to(device)
    kept = regrouped(weight, before, outputs, inputs, groups).contiguous()
    layer.weight = nn.Parameter(kept, weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[outputs].clone(), layer.bias.requires_grad)
    if isinstance(layer, nn.Conv2d):
        layer.in_channels, layer.out_channels, layer.groups = len(inputs), len(outputs), groups
    else:
        layer.in_features, layer.out_features = len(inputs), len(outputs)


@torch.no_grad()
def cut_channels(layer: nn.Module, kept: Tensor) -> None:
    """Keep some channels of a layer that acts on each by itself.

    Args:
        layer: A BN, an activation, a depthwise convolution, a gate; others have no channels.
        kept: ``(n,)``, in their new order, on the layer's device.
    """
    match layer:
        case ChannelGate() | PartialActivation() | PartialGroupNorm():
            layer.keep(kept)
        case nn.Conv2d():
            _take(layer, kept)
            layer.in_channels = layer.out_channels = layer.groups = len(kept)
        case nn.BatchNorm2d():
            _take(layer, kept)
            layer.num_features = len(kept)
        case nn.PReLU() if layer.num_parameters > 1:
            _take(layer, kept)
            layer.num_parameters = len(kept)


def _take(module: nn.Module, kept: Tensor) -> None:
    """Keep some channels, the first dimension, of all that a module holds, masks included."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            rows = parameter[kept.to(parameter.device)].clone()
            setattr(owner, name, nn.Parameter(rows, parameter.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.ndim:
                setattr(owner, name, buffer[kept.to(buffer.device)].clone())
