"""Reserving and merging: residual blocks rewritten, exactly, as plain layers.

A block ``y = F(x) + S(x)`` with ``F = conv2 · relu · conv1`` becomes (RMNet, arXiv
2111.00687, section 3.2)

    conv1' = [conv1; Dirac]      reserve: x is copied behind F's own channels,
    relu                         the identity on x, which is not negative,
    conv2' = [conv2 | S]         merge: S is added from the copies at the centre tap.

A BN stands behind every convolution. Its ``|γ|`` is the scale of the BN that the channel
came from and its β is what remains of the channel without it, so that channels can be
selected in the plain net as in the residual one: own channels keep their BN, a reserved
channel has the shortcut BN's scale, an output the larger of its two BNs' scales.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rmprune.errors import ConversionError
from rmprune.graph import Block, Chain, Layer, is_identity, parse, trace
from rmprune.norms import Norm, at_centre, fold_shortcut, norm_of, norm_of_bn, normalised
from rmprune.plain import PlainNet, Width
from rmprune.rewrite import fold_bn

Downsample = Literal["relu", "prelu"]

TOLERANCE = 1e-9


def convert(
    model: nn.Module,
    example_input: Tensor,
    *,
    downsample: Downsample = "relu",
    keep_bn: bool = True,
) -> PlainNet:
    """Rewrite a residual network as an equal plain net.

    Args:
        model: In evaluation mode; left as it is. Any network that `rmprune.graph.parse`
            reads, with blocks of one or two convolutions.
        example_input: ``(N, C, H, W)``; the two nets are compared on it in float64.
        downsample: How a block whose shortcut changes the tensor is rewritten (RMNet,
            appendix A.1): ``"relu"`` carries x and puts the shortcut's weights into the
            merge (81·C² weights for C → 2C); ``"prelu"`` computes the shortcut first and
            carries its result through a PReLU (108·C² + 4·C).
        keep_bn: Keep a BN behind every convolution, for selecting channels by their scales
            and for training; otherwise fold them.

    Returns:
        A `PlainNet` of leaf modules on the model's device, in its dtype and evaluation mode.

    Raises:
        ConversionError: The model is in training mode, has no residual block, or has a part
            that cannot be rewritten; nothing is left residual in silence.
    """
    if any(module.training for module in model.modules()):
        raise ConversionError(
            type(model).__name__, "the model is in training mode", "call model.eval() first"
        )
    chain = parse(trace(model).double())
    if not chain.blocks:
        raise ConversionError(type(model).__name__, "the network has no residual block")
    plain = _build(chain, tuple(example_input.shape[1:]), downsample)
    _verify(chain.graph_module, plain, example_input.double())
    dtype = next(model.parameters()).dtype
    return (plain if keep_bn else fold_bn(plain)).to(dtype)


def channel_guards(chain: Chain) -> dict[str, tuple[str, ...]]:
    """The BNs whose scales decide over the output channels of every plain convolution.

    Returns:
        Path of a convolution in the residual model to paths of BNs: its own, and for the
        first convolution of a block the shortcut BN, for the last one the shortcut's own BN.
    """
    guards: dict[str, tuple[str, ...]] = {}
    for item in chain.items:
        if isinstance(item, Block):
            units = split_units(item.body)
            for unit in units:
                guards[unit.conv.name] = tuple(bn.name for bn in (unit.bn,) if bn is not None)
            bns = [bn.name for bn in item.shortcut if isinstance(bn.module, nn.BatchNorm2d)]
            reserved = bns[:1] if _starts_with_bn(item) else []
            guards[units[0].conv.name] += tuple(reserved)
            guards[units[-1].conv.name] += tuple(bns[len(reserved) :])
        elif isinstance(item.module, nn.Conv2d):
            last_conv = item.name
            guards[last_conv] = ()
        elif isinstance(item.module, nn.BatchNorm2d) and guards.get(last_conv) == ():
            guards[last_conv] = (item.name,)
    return guards


@dataclass(frozen=True)
class Unit:
    """A convolution with what follows it in a block's body."""

    conv: Layer
    bn: Layer | None
    activation: Layer | None

    @property
    def kernel(self) -> nn.Conv2d:
        """The convolution itself."""
        assert isinstance(self.conv.module, nn.Conv2d)
        return self.conv.module

    @property
    def norm(self) -> Norm:
        """What follows the convolution's weights: bias and BN."""
        bn = None if self.bn is None else self.bn.module
        assert bn is None or isinstance(bn, nn.BatchNorm2d)
        return norm_of(bn, self.kernel)


def split_units(body: Sequence[Layer]) -> list[Unit]:
    """Split a block's body into convolutions, each with its BN and activation.

    Raises:
        ConversionError: The body is not conv(-BN)(-activation)-…-conv(-BN).
    """
    units: list[Unit] = []
    for layer in body:
        last = units[-1] if units else None
        match layer.module:
            case module if is_identity(module):
                continue
            case nn.Conv2d():
                units.append(Unit(layer, None, None))
            case nn.BatchNorm2d() if last and last.bn is None and last.activation is None:
                units[-1] = Unit(last.conv, layer, None)
            case nn.ReLU() | nn.LeakyReLU() | nn.PReLU() if last and last.activation is None:
                units[-1] = Unit(last.conv, last.bn, layer)
            case module:
                raise ConversionError(
                    layer.name,
                    f"{type(module).__name__} at this place of a block is not supported",
                    "blocks are conv, BN, activation, …, conv, BN, then the addition",
                )
    if units[-1].activation is not None:
        raise ConversionError(
            units[-1].activation.name, "an activation between a block's last layer and its addition"
        )
    return units


def _starts_with_bn(block: Block) -> bool:
    return bool(block.shortcut) and isinstance(block.shortcut[0].module, nn.BatchNorm2d)


def _build(chain: Chain, input_shape: tuple[int, ...], downsample: Downsample) -> PlainNet:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    widths: dict[str, Width] = {}

    def emit(name: str, module: nn.Module, width: Width | None = None) -> None:
        name = name.replace(".", "_")
        while name in layers:
            name += "_"
        # A copy, since a model may call one module twice (torchvision's relu), and a list
        # must not hold it twice: named_children() passes over repetitions.
        layers[name] = copy.deepcopy(module)
        if width is not None:
            widths[name] = width

    for item in chain.items:
        if isinstance(item, Block):
            for name, module, width in _convert_block(item, downsample):
                emit(name, module, width)
        elif isinstance(item.module, nn.Conv2d):
            emit(item.name, item.module, Width(item.module.out_channels))
        elif isinstance(item.module, nn.BatchNorm2d):
            emit(item.name, norm_of_bn(item.module).as_module())
        elif not is_identity(item.module):
            if any(True for _ in item.module.children()):
                raise ConversionError(item.name, f"{type(item.module).__name__} is not a layer")
            emit(item.name, item.module)
    channels, height, width_ = input_shape
    return PlainNet(layers, (channels, height, width_), widths).eval()


def _convert_block(
    block: Block, downsample: Downsample
) -> list[tuple[str, nn.Module, Width | None]]:
    """The plain layers of one block: (name, module, width of a convolution)."""
    units = split_units(block.body)
    _check(block, units)
    first, last = units[0], units[-1]
    like = first.kernel.weight
    shortcut = [layer.module for layer in block.shortcut]
    channels = first.kernel.in_channels
    whole = fold_shortcut(shortcut, channels, like)
    strides = [unit.kernel.stride[0] for unit in units]
    if whole.stride != torch.tensor(strides).prod():
        raise ConversionError(
            block.add.name, f"the block strides by {strides}, its shortcut by {whole.stride}"
        )

    norm = last.norm
    rows = norm.slope[:, None, None, None] * last.kernel.weight.detach()
    scale = torch.maximum(norm.gamma.abs(), whole.scale)
    rest = norm.beta + whole.rest
    if len(units) == 1:
        weight = rows + at_centre(whole.weight, last.kernel.kernel_size[0])
        merged, merged_norm = normalised(weight, norm.offset + whole.bias, scale, rest)
        return _conv_bn(last, merged, merged_norm, Width(len(scale)), last.kernel.stride)

    if downsample == "prelu" and _changes_tensor(block):
        carried, offset = whole, norm.offset
        columns = torch.eye(len(whole.bias), dtype=like.dtype, device=like.device)
    else:
        # Carry |a|·x of the shortcut BN a·x + c: it is as non-negative as x, and its BN has
        # the shortcut BN's own |γ|.
        head = 1 if _starts_with_bn(block) else 0
        entry = fold_shortcut(shortcut[:head], channels, like)
        slope = entry.weight.diagonal()
        mean = slope.abs() * _mean_of(shortcut[:head], slope)
        carried = entry._replace(
            weight=torch.diag(slope.abs()), bias=torch.zeros_like(slope), rest=mean
        )
        remainder = fold_shortcut(shortcut[head:], channels, like)
        columns = remainder.weight * slope.sign()
        offset = norm.offset + remainder.weight @ entry.bias + remainder.bias

    kernel_size = first.kernel.kernel_size[0]
    dirac, dirac_norm = normalised(
        at_centre(carried.weight, kernel_size), carried.bias, carried.scale, carried.rest
    )
    own = first.kernel.weight.detach()
    reserving = torch.cat([own, dirac])
    merging = torch.cat([rows, at_centre(columns, last.kernel.kernel_size[0])], dim=1)
    merged, merged_norm = normalised(merging, offset, scale, rest)
    signed = not block.non_negative or carried is whole
    activation = _carrying_activation(first, len(own), len(dirac), signed)
    return [
        *_conv_bn(
            first,
            reserving,
            first.norm.cat(dirac_norm),
            Width(len(own), len(dirac)),
            first.kernel.stride,
        ),
        *activation,
        *_conv_bn(last, merged, merged_norm, Width(len(merged)), last.kernel.stride),
    ]


def _check(block: Block, units: Sequence[Unit]) -> None:
    """Refuse a block that would not convert exactly or not at a sensible cost."""
    if len(units) > 2:
        raise ConversionError(
            block.add.name, f"a block of {len(units)} convolutions; one and two are supported"
        )
    for unit in units:
        conv = unit.kernel
        size = conv.kernel_size[0]
        same = conv.dilation[0] * (size - 1) // 2
        if conv.groups != 1 or conv.padding_mode != "zeros" or conv.transposed:
            raise ConversionError(unit.conv.name, "grouped or otherwise special convolution")
        if size % 2 == 0 or conv.padding not in ((same, same), "same"):
            raise ConversionError(
                unit.conv.name,
                f"kernel {conv.kernel_size} with padding {conv.padding} does not copy its input",
                "kernels must be odd and the padding (k - 1) / 2",
            )
        if len({*conv.kernel_size}) + len({*conv.stride}) + len({*conv.dilation}) != 3:
            raise ConversionError(unit.conv.name, "kernel, stride or dilation is not square")
    if any(norm_stats_missing(layer.module) for layer in (*block.body, *block.shortcut)):
        raise ConversionError(block.add.name, "a BN of the block keeps no running statistics")


def norm_stats_missing(module: nn.Module) -> bool:
    """Whether a BN normalises by the batch even in evaluation mode."""
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is None


def _changes_tensor(block: Block) -> bool:
    return any(not isinstance(layer.module, nn.BatchNorm2d) for layer in block.shortcut)


def _mean_of(head: Sequence[nn.Module], like: Tensor) -> Tensor:
    """The running mean of a shortcut BN; zeros where there is none."""
    if head and isinstance(head[0], nn.BatchNorm2d):
        return norm_of_bn(head[0]).mean
    return torch.zeros_like(like)


def _carrying_activation(
    unit: Unit, own: int, reserved: int, signed: bool
) -> list[tuple[str, nn.Module, None]]:
    """An activation that acts on the own channels and passes the reserved ones."""
    if unit.activation is None:
        return []
    module = unit.activation.module
    if not signed and not isinstance(module, nn.PReLU):
        return [(unit.activation.name, module, None)]
    ones = unit.kernel.weight.new_ones(own + reserved)
    match module:
        case nn.ReLU():
            ones[:own] = 0
        case nn.LeakyReLU():
            ones[:own] = module.negative_slope
        case nn.PReLU():
            ones[:own] = module.weight.detach()
    prelu = nn.PReLU(len(ones), device=ones.device, dtype=ones.dtype)
    prelu.weight = nn.Parameter(ones)
    return [(unit.activation.name, prelu, None)]


def _conv_bn(
    unit: Unit, weight: Tensor, norm: Norm, width: Width, stride: tuple[int, ...]
) -> list[tuple[str, nn.Module, Width | None]]:
    source = unit.kernel
    conv = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (source.kernel_size[0], source.kernel_size[1]),
        (stride[0], stride[1]),
        source.padding
        if isinstance(source.padding, str)
        else (source.padding[0], source.padding[1]),
        (source.dilation[0], source.dilation[1]),
        bias=False,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight = nn.Parameter(weight)
    bn_name = unit.bn.name if unit.bn is not None else f"{unit.conv.name}_bn"
    return [(unit.conv.name, conv, width), (bn_name, norm.as_module(), None)]


def _verify(reference: nn.Module, plain: nn.Module, example_input: Tensor) -> None:
    """Compare the two nets in float64.

    Raises:
        ConversionError: They differ by more than 1e-9 of the output's magnitude.
    """
    with torch.no_grad():
        expected, found = reference(example_input), plain(example_input)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item():
        raise ConversionError(
            "output", f"the plain net differs from the residual one by {difference:.1e} in float64"
        )
