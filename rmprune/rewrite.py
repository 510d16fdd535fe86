"""Rewrites of a plain net that leave its outputs as they are: walks over a list.

Each takes a `PlainNet` in evaluation mode and returns a new one; `clamp_activations` takes any
network, in place.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rmprune.layers import Clamp, ResidualBlock
from rmprune.norms import EPS, Moments, Norm, folded
from rmprune.plain import PlainNet


def fold_bn(net: PlainNet) -> PlainNet:
    """Fold every BN that stands behind a convolution into it, inside of blocks, too."""
    return net.with_layers(_folded_layers(net)).eval()


def _folded_layers(net: nn.Sequential) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    previous = ""
    for name, module in net.named_children():
        conv = layers.get(previous)
        if isinstance(module, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
            layers[previous] = folded(conv, module)
            continue
        if isinstance(module, ResidualBlock):
            body = nn.Sequential(_folded_layers(module.body))
            added, passed = copy.deepcopy((module.added, module.passed))
            layers[name] = ResidualBlock(body, added, passed)
        else:
            layers[name] = copy.deepcopy(module)
        previous = name
    return layers


def clamp_activations(net: nn.Module) -> nn.Module:
    """Replace activations that are clamps by such, see `rmprune.layers.Clamp`; in place."""
    dtypes = [tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()]
    for name, module in list(net.named_modules()):
        clamp = Clamp.of(module, dtypes[0]) if dtypes else None
        if clamp is not None:
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, clamp)
    return net


def calibrate_bn(net: PlainNet, calibration_batches: Iterable[Tensor]) -> PlainNet:
    """Give every convolution a BN whose statistics are measured, for training a net.

    In evaluation mode the net computes what it did, and in training mode it begins there
    (RMNet, appendix A.2: without BN the training of a plain net diverges). Kernels get the
    norm that random ones have, √2 for each output, and the BNs the factors: behind a BN a
    step of training turns a kernel the further, the smaller it is. Blocks with additions
    get theirs in the body; a convolution on the shortcut trains as it is, as in networks
    with pre-activation.

    Args:
        net: In evaluation mode. BNs behind its convolutions are folded first.
        calibration_batches: Normalised images, ``(N, C, H, W)`` each.
    """
    with torch.no_grad():
        return net.with_layers(_normalised_layers(fold_bn(net), list(calibration_batches))).eval()


def _normalised_layers(
    net: nn.Sequential, activations: list[Tensor]
) -> OrderedDict[str, nn.Module]:
    """Those of a list without BNs, with a BN behind each convolution.

    Args:
        net: In evaluation mode.
        activations: What goes into it, ``(N, C, H, W)`` each.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in net.named_children():
        inputs, activations = activations, [module(batch) for batch in activations]
        if isinstance(module, ResidualBlock):
            body = nn.Sequential(_normalised_layers(module.body, inputs))
            layers[name] = ResidualBlock(body, module.added, module.passed)
            continue
        layers[name] = module
        if isinstance(module, nn.Conv2d):
            moments = Moments(module.out_channels)
            for batch in activations:
                moments.add(batch)
            layers[name], bn = _normalised(module, *moments.mean_and_var())
            layers[f"{name}_bn"] = bn.to(module.weight)
    return layers


def _normalised(conv: nn.Conv2d, mean: Tensor, var: Tensor) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution as one with kernels of norm √2, and a BN with the statistics that its
    outputs then have. Mean and variance are those of the given convolution's outputs."""
    length = conv.weight.detach().flatten(1).norm(dim=1)
    factor = torch.where(length > 0, math.sqrt(2) / length, 1)
    bias = torch.zeros_like(factor) if conv.bias is None else conv.bias.detach()
    result = copy.deepcopy(conv)
    result.weight = nn.Parameter(conv.weight.detach() * factor[:, None, None, None])
    result.bias = None
    scale = factor.double().cpu()
    var = scale.square() * var + EPS
    norm = Norm(var.sqrt() / scale, mean, scale * (mean - bias.double().cpu()), var)
    return result, norm.as_module()


def collapse(net: PlainNet) -> PlainNet:
    """Fold BNs, then shrink what is pointwise: blocks that lost all their own channels.

    Such a block is a map of single channels between two ReLUs. Its two k×k convolutions
    become one 1×1 convolution, that one a depthwise layer where it is diagonal, and no
    layer at all where its factors are positive and its offsets are not: then
    ``relu(a · relu(z) + c) = relu(a z + c)`` folds into the layer before.
    """
    layers = list(fold_bn(net).named_children())
    layers = [(name, _without_empty_taps(module)) for name, module in layers]
    layers = _compose_pointwise(layers)
    layers = [(name, _as_depthwise(module)) for name, module in layers]
    layers = _absorb_diagonals(layers)
    kept = {name for name, _ in layers}
    widths = {name: width for name, width in net.widths.items() if name in kept}
    return net.with_layers(OrderedDict(layers), widths).eval()


def _without_empty_taps(module: nn.Module) -> nn.Module:
    """A convolution that reads only its centre tap, as a 1×1 convolution."""
    if not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1):
        return module
    rows, columns = module.kernel_size
    centre = module.weight[:, :, rows // 2, columns // 2].detach()
    same = tuple(d * (k // 2) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    only_centre = torch.count_nonzero(module.weight) == torch.count_nonzero(centre)
    if rows % 2 == 0 or columns % 2 == 0 or module.padding != same or not only_centre:
        return module
    return pointwise(centre[:, :, None, None], module.bias, module.stride, module.groups)


def pointwise(
    weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], groups: int = 1
) -> nn.Conv2d:
    """A 1×1 convolution with copies of a weight ``(out, in / groups, 1, 1)`` and a bias."""
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        1,
        (stride[0], stride[1]),
        groups=groups,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and _reads_one_pixel(module) and module.groups == 1


def _reads_one_pixel(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid")


def _compose_pointwise(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Join relu → 1×1 → relu → 1×1 where the second ReLU sees nothing negative."""
    result: list[tuple[str, nn.Module]] = []
    for name, module in layers:
        tail = [layer for _, layer in result[-3:]]
        if isinstance(module, nn.Conv2d) and _is_pointwise(module) and len(tail) == 3:
            before, first, between = tail
            if (
                isinstance(before, nn.ReLU)
                and isinstance(first, nn.Conv2d)
                and _is_pointwise(first)
                and isinstance(between, nn.ReLU | nn.PReLU)
                and _passes_non_negative(first)
            ):
                del result[-2:]
                module = _composed(first, module)
        result.append((name, module))
    return result


def _passes_non_negative(conv: nn.Conv2d) -> bool:
    """Whether a convolution of non-negative inputs has no negative outputs."""
    bias_is_fine = conv.bias is None or bool((conv.bias >= 0).all())
    return bias_is_fine and bool((conv.weight >= 0).all())


def _composed(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """``second(first(x))`` of two 1×1 convolutions, as one."""
    outer, inner = (conv.weight.detach()[:, :, 0, 0] for conv in (second, first))
    bias = outer.new_zeros(len(outer)) if second.bias is None else second.bias.detach()
    if first.bias is not None:
        bias = bias + outer @ first.bias.detach()
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return pointwise((outer @ inner)[:, :, None, None], bias, stride)


def _as_depthwise(module: nn.Module) -> nn.Module:
    """A diagonal 1×1 convolution as a depthwise one."""
    if not isinstance(module, nn.Conv2d) or not _is_pointwise(module):
        return module
    matrix = module.weight.detach()[:, :, 0, 0]
    diagonal = matrix.diagonal()
    if matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, torch.diag(diagonal)):
        return module
    return pointwise(diagonal[:, None, None, None], module.bias, module.stride, len(diagonal))


def _absorb_diagonals(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Fold conv → relu → diagonal → relu into conv → relu where that is exact."""
    result: list[tuple[str, nn.Module]] = []
    for position, (name, module) in enumerate(layers):
        follower = layers[position + 1][1] if position + 1 < len(layers) else None
        tail = [layer for _, layer in result[-2:]]
        if (
            len(tail) == 2
            and isinstance(tail[0], nn.Conv2d)
            and isinstance(tail[1], nn.ReLU)
            and isinstance(follower, nn.ReLU)
            and isinstance(module, nn.Conv2d)
            and _is_absorbable(module)
        ):
            source, _ = result[-2]
            result[-2:] = [(source, _scaled(tail[0], module))]
            continue
        result.append((name, module))
    return result


def _is_absorbable(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.stride == (1, 1)
    pointwise = _reads_one_pixel(conv) and bool((conv.weight > 0).all())
    # What is positive by rounding alone must not keep a layer alive.
    rounding = 8 * torch.finfo(conv.weight.dtype).eps
    return depthwise and pointwise and (conv.bias is None or bool((conv.bias <= rounding).all()))


def _scaled(conv: nn.Conv2d, diagonal: nn.Conv2d) -> nn.Conv2d:
    """A convolution with a per-channel factor and offset folded in."""
    factor = diagonal.weight.detach().flatten()
    bias = torch.zeros_like(factor) if conv.bias is None else conv.bias.detach() * factor
    offset = torch.zeros_like(factor) if diagonal.bias is None else diagonal.bias.detach()
    return with_weights(
        conv, conv.weight.detach() * factor[:, None, None, None], bias + offset, conv.groups
    )


def with_weights(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int = 1
) -> nn.Conv2d:
    """A convolution of the same geometry with other weights.

    Args:
        conv: Whose stride, padding and dilation it gets.
        weight: ``(out, in / groups, k, k)``.
        bias: ``(out,)`` or None.
        groups: Of the new one.
    """
    result = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        (conv.stride[0], conv.stride[1]),
        conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]),
        groups,
        device="meta",
    )
    result.weight = nn.Parameter(weight.detach().clone())
    result.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return result
