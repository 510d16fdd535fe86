"""Reserving and merging: a residual network rewritten, exactly, as a list of plain layers.

A small compiler (after RMNet, arXiv 2111.00687, section 3). It walks over the network's steps
and keeps, for every tensor that a later step needs, a `Value`: how it follows linearly from
the *state*, the output of the plain layer written last. Whatever is linear only makes new
values. What is not makes the compiler write a convolution, whose output channels are

    own        the tensor that the activation reads, all linear steps merged into the kernels,
    reserved   copies (Dirac kernels) of what is needed later,

and then the activation, which must pass the reserved channels: see `rmprune.carrying`. So a
block ``y = F(x) + S(x)`` turns plain: its first convolution reserves x, and its last one adds
S(x) from the reserved channels at the centre tap. Where S has the same activation as F (the
coder of PNNH), both are computed side by side and need not be carried past each other.

The layers run on the example input, in float64, as they are written, and in the end the
output is compared with the network's own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from rmprune.carrying import Bound, Carrier, Carry, Interval, Way, carrying_activation
from rmprune.errors import ConversionError, UsageError, first_line
from rmprune.graph import GlobalMean, PadChannels, Subsample, trace
from rmprune.layers import ACTIVATIONS, PartialGroupNorm
from rmprune.layout import Downsample, Layout, weights_with_and_without_merging
from rmprune.linear import Geometry, Rows, Value, add, concatenate, join, sorted_unique
from rmprune.norms import folded, norm_of_bn
from rmprune.plain import PlainNet, Width, plain_name
from rmprune.rewrite import calibrate_bn
from rmprune.steps import (
    Addition,
    Concatenation,
    Gate,
    Operation,
    Scaling,
    Slice,
    Step,
    Steps,
    Unknown,
    read,
)

Fuse = Literal["auto", "always"]

TOLERANCE = 1e-9
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def convert(
    model: nn.Module,
    example_input: Tensor,
    *,
    downsample: Downsample = "relu",
    carry: Carry = "auto",
    bound: Bound = "interval",
    fuse: Fuse = "auto",
    keep_bn: bool = True,
    calibration_batches: Iterable[Tensor] = (),
) -> PlainNet:
    """Rewrite a residual network as an equal plain net.

    Args:
        model: In evaluation mode; left as it is. Any network that `torch.fx` can trace and
            whose residual paths are made of convolutions, BNs, activations, squeeze and
            excitation, group norms, average pooling, concatenations and additions.
        example_input: ``(N, C, H, W)``; the two nets are compared on it in float64.
        downsample: How a block whose shortcut changes the tensor is rewritten (RMNet,
            appendix A.1): ``"relu"`` carries x and puts the shortcut's weights into the
            merge (81·C² weights for C → 2C); ``"prelu"`` computes the shortcut first and
            carries its result (108·C² + 4·C).
        carry: How reserved channels that may be negative pass an activation, see
            `rmprune.carrying`; ``"auto"`` takes the first way that applies.
        bound: Where the bounds for shifting come from: ``"interval"`` arithmetic, which is
            always right, or ``"calibrated"``: twice what the example input shows.
        fuse: Whether a 1×1 convolution is merged with a linear layer before it: where that
            lowers the MACs, or ``"always"``.
        keep_bn: Keep a BN behind every convolution, for selecting channels by their scales
            and for training; otherwise fold them.
        calibration_batches: Normalised images, ``(N, C, H, W)`` each, for the statistics of
            the BNs that are kept. Without them a BN of the network keeps its own, and the
            BN of a channel that comes from none has mean 0 and variance 1: right as it
            stands, but training begins with a jump.

    Returns:
        A `PlainNet` of leaf modules on the model's device, in its dtype and evaluation mode.
        Its ``info`` tells how every activation's reserved channels are ``carried``, and the
        ``float64_difference`` of the outputs, relative to their magnitude.

    Raises:
        ConversionError: The model is in training mode, has no residual block, or has a part
            that cannot be rewritten; nothing is left residual in silence.
        UsageError: The model does not take the example input.
    """
    if any(module.training for module in model.modules()):
        raise ConversionError(
            type(model).__name__, "the model is in training mode", "call model.eval() first"
        )
    with torch.no_grad():
        # The copy in float64 is gone before the plain net comes: memory is what large nets lack.
        expected = _outputs(trace(model).double(), example_input.double())
        steps = read(trace(model, copied=False))
        if not any(isinstance(step.op, Addition) for step in steps.steps):
            raise ConversionError(type(model).__name__, "the network has no residual block")
        carrier = Carrier(carry, bound)
        dtype = next(model.parameters()).dtype
        compiler = _Compiler(
            steps, example_input.double(), carrier, downsample, fuse, keep_bn, dtype
        )
        plain = compiler.run()
        plain.info["float64_difference"] = check_equal(expected, compiler.state, "the plain net")
    batches = list(calibration_batches)
    return calibrate_bn(plain, batches) if keep_bn and batches else plain


def _outputs(model: nn.Module, example_input: Tensor) -> Tensor:
    try:
        outputs: Tensor = model(example_input.clone())  # a layer in place must not change it
    except RuntimeError as error:
        raise UsageError(
            f"the model fails on an input of shape {tuple(example_input.shape)}: "
            f"{first_line(error)}"
        ) from error
    return outputs


def check_equal(expected: Tensor, found: Tensor, name: str) -> float:
    """The largest difference of two nets' outputs, relative to the largest value.

    Args:
        expected: Output in float64 of the net that is right.
        found: That of the other one.
        name: What to call it in an error.

    Raises:
        ConversionError: They differ by more than 1e-9.
    """
    if expected.shape != found.shape:
        raise ConversionError(
            "output", f"{name}'s output is {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ConversionError(
            "output",
            f"{name} differs by {difference:.1e} of the output's magnitude in float64 from the "
            "net that it was made from",
        )
    return difference


class _Compiler:
    """Writes the plain layers; what it knows of the network is in `values` and `state`."""

    def __init__(
        self,
        steps: Steps,
        example: Tensor,
        carrier: Carrier,
        downsample: Downsample,
        fuse: Fuse,
        keep_bn: bool,
        dtype: torch.dtype,
    ) -> None:
        self.steps = steps
        self.carrier = carrier
        self.downsample = downsample
        self.fuse = fuse
        self.keep_bn = keep_bn
        self.dtype = dtype
        self.state = example.clone()  # a layer in place must not change the example
        self.interval = Interval.unknown(example.shape[1], example)
        self.layers: OrderedDict[str, nn.Module] = OrderedDict()
        self.widths: dict[str, Width] = {}
        self.written = 0
        self.waiting = list(steps.steps)
        self.input_shape = example.shape[1:]
        self.values = {steps.source: self._value_of_state()}
        self.readers: dict[fx.Node, int] = {}
        for step in steps.steps:
            for node in step.inputs:
                self.readers[node] = self.readers.get(node, 0) + 1
        self.readers[steps.result] = self.readers.get(steps.result, 0) + 1

    def run(self) -> PlainNet:
        """Compile all steps: whatever is linear first, for then a layer that must be written
        knows everything that is needed of the state that it replaces."""
        while self.waiting:
            if not self._do_next_linear():
                self._do_next_other()
        self._as_only_state(self.steps.result, "output", "the output")
        channels, height, width = self.input_shape
        net = PlainNet(self.layers, (channels, height, width), self.widths)
        net.info["carried"] = self.carrier.log
        return net.eval()

    def _do_next_linear(self) -> bool:
        """Do the first linear step that can be done; tells whether there was one."""
        for step in self.waiting:
            if self._ready(step):
                value = self._linear(step)
                if value is not None:
                    self._finish(step, value)
                    return True
        return False

    def _do_next_other(self) -> None:
        """Write the layers of the first step that can be done."""
        refusals = []
        # What depends on all positions comes last: right before the merge no activation is left
        # between that its signed results would have to be carried past.
        for step in sorted(self.waiting, key=lambda step: isinstance(step.op, nn.GroupNorm)):
            if self._ready(step):
                try:
                    self._do(step)
                except ConversionError as refusal:
                    # Another branch may have to go first, while the state has its resolution.
                    refusals.append(refusal)
                else:
                    return
        raise refusals[0]

    def _do(self, step: Step) -> None:
        if isinstance(step.op, Unknown):
            raise ConversionError(step.name, step.op.reason, step.op.advice)
        if isinstance(step.op, ACTIVATIONS) and self.state.ndim == 4:
            self._activate(step, step.op)
        elif isinstance(step.op, Gate):
            self._gate(step, step.op)
        elif isinstance(step.op, nn.GroupNorm) and self.state.ndim == 4:
            self._group_norm(step, step.op)
        elif self.state.ndim == 4 and (
            isinstance(step.op, nn.Conv2d | nn.AvgPool2d)
            or (isinstance(step.op, nn.ZeroPad2d) and _is_symmetric(step.op))
        ):
            self._write_value(step.inputs[0])
            value = self._linear(step)
            if value is None:
                raise ConversionError(step.name, f"{type(step.op).__name__} cannot be merged")
            self._finish(step, value)
        else:
            self._opaque(step)

    def _ready(self, step: Step) -> bool:
        return all(node in self.values for node in step.inputs)

    def _finish(self, step: Step, value: Value) -> None:
        """Enter a step's result; forget tensors that nobody reads any more."""
        self.waiting.remove(step)
        for node in step.inputs:
            self._release(node)
        self.values[step.node] = value

    def _release(self, node: fx.Node) -> None:
        self.readers[node] -= 1
        if self.readers[node] == 0:
            del self.values[node]

    # What is linear.

    def _linear(self, step: Step) -> Value | None:
        """The result of a linear step, or None if a layer must be written first."""
        if self.state.ndim != 4:
            return None
        values = [self.values[node] for node in step.inputs]
        match step.op:
            case Addition():
                self._check_alike(step, values)
                return add(values)
            case Concatenation():
                return concatenate(values)
            case Slice():
                indices = step.op.indices(values[0].channels)
                return values[0].select(
                    torch.tensor(indices, dtype=torch.long, device=self.state.device)
                )
            case Scaling(factor, offset):
                zero = torch.zeros_like(values[0].bias)
                return values[0].scaled(zero + factor.double(), zero + offset.double())
            case nn.Conv2d():
                return self._convolution(step, step.op, values[0])
            case bn if isinstance(bn, BATCH_NORMS):
                if bn.running_mean is None:
                    raise ConversionError(
                        step.name, "the BN keeps no running statistics", "use track_running_stats"
                    )
                return values[0].normed(norm_of_bn(copy.deepcopy(bn).double()), step.name)
            case Subsample():
                return values[0].pooled(Geometry(stride=(step.op.stride, step.op.stride)))
            case PadChannels():
                front, back, here = step.op.front, step.op.back, values[0].channels
                outside = torch.full((front + here + back,), -1, device=self.state.device)
                outside[front : front + here] = torch.arange(here)
                return values[0].select(outside)
            case nn.ZeroPad2d() if _is_symmetric(step.op):
                return values[0].pooled(Geometry(padding=(step.op.padding[2], step.op.padding[0])))
            case nn.AvgPool2d():
                return self._average(step.op, values[0])
            case _:
                return None

    def _check_alike(self, step: Step, values: Sequence[Value]) -> None:
        shapes = {(value.channels, *self._size(step, value)) for value in values}
        if len(shapes) > 1:
            raise ConversionError(
                step.name,
                f"it adds tensors of shapes {' and '.join(map(str, sorted(shapes)))}",
                "a shortcut must keep the shape of its block",
            )

    def _size(self, step: Step, value: Value) -> tuple[int, int]:
        """Height and width of a value."""
        sizes = {path.geometry.output_size(self._state_size()) for path in value.paths}
        if len(sizes) > 1:
            raise ConversionError(
                step.name,
                f"paths of different sizes meet there: {sorted(sizes)}",
                "kernels must be odd and the padding (k - 1) / 2",
            )
        return next(iter(sizes))

    def _state_size(self) -> tuple[int, int]:
        return self.state.shape[2], self.state.shape[3]

    def _convolution(self, step: Step, conv: nn.Conv2d, value: Value) -> Value | None:
        if conv.padding_mode != "zeros" and conv.padding not in ((0, 0), "valid"):
            raise ConversionError(step.name, f"{conv.padding_mode!r} padding", "pad with zeros")
        geometry = _geometry(step, conv)
        rows = Rows.of_conv(conv.weight.detach().double(), conv.groups, geometry)
        again = self.readers[step.inputs[0]] > 1
        if not self._pays(rows, value, again):
            return None
        bias = None if conv.bias is None else conv.bias.detach().double()
        return value.convolved(rows, bias, step.name)

    def _pays(self, rows: Rows, value: Value, again: bool) -> bool:
        """Whether a convolution should be merged with what is pending before it.

        Compares MACs with those of a layer written in between; ``again`` tells that the
        tensor between them is needed later too.
        """
        if len(value.paths) == 1 and value.paths[0].rows.reads_one:
            return True
        geometry = rows.geometry
        pending = max((path.geometry for path in value.paths), key=lambda g: g.taps)
        if geometry.taps > 1 and pending.taps > 1:
            return False
        if any(path.geometry.pads for path in value.paths if path.geometry.taps == 1):
            return True  # beside a padded layer nothing else could be reserved
        if self.fuse == "always" and geometry.taps == pending.taps == 1:
            return True
        besides = {node: other for node, other in self.values.items() if other is not value}
        merged, apart = weights_with_and_without_merging(
            value, rows, again, self._read(besides), self.state.shape[1]
        )
        return merged <= apart

    def _average(self, pool: nn.AvgPool2d, value: Value) -> Value | None:
        """Average pooling as a convolution with equal weights, where it is one."""
        geometry = Geometry(_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))
        if pool.divisor_override or (geometry.pads and not pool.count_include_pad):
            return None
        sizes = {path.geometry.output_size(self._state_size()) for path in value.paths}
        if len(sizes) != 1:
            return None
        size = next(iter(sizes))
        if pool.ceil_mode and any(
            (n + 2 * p - k) % s
            for n, p, k, s in zip(
                size, geometry.padding, geometry.kernel, geometry.stride, strict=True
            )
        ):
            return None
        return value.pooled(geometry)

    # What needs a layer.

    def _value_of_state(self) -> Value:
        channels = torch.arange(self.state.shape[1], device=self.state.device)
        return Value.of_state(channels, self.state, self.written)

    def _emit(self, name: str, module: nn.Module) -> str:
        """Write a layer in the network's dtype, once it has run in float64."""
        name = plain_name(name)
        while name in self.layers:
            name += "_"
        self.state = module.eval()(self.state)
        self.layers[name] = module.to(self.dtype)
        return name

    def _others(self, *nodes: fx.Node) -> dict[fx.Node, Value]:
        """The tensors that are needed besides one reading of each of some nodes."""
        return {
            other: value
            for other, value in self.values.items()
            if other not in nodes or self.readers[other] > 1
        }

    def _as_only_state(self, node: fx.Node, name: str, reader: str) -> None:
        """Write what is needed for the state to be a tensor and nothing else."""
        others = self._others(node)
        if others:
            raise ConversionError(
                name,
                f"{reader} reads a whole tensor while {next(iter(others)).name!r} is needed later",
                "only convolutions, activations and gates can stand inside a residual block",
            )
        if self.state.ndim != 4:
            return
        selected = self.values[node].selected()
        everything = torch.arange(self.state.shape[1], device=self.state.device)
        if selected is None or not torch.equal(selected, everything):
            self._write_value(node, alone=True)

    def _opaque(self, step: Step) -> None:
        """A layer that reads the whole state."""
        if not isinstance(step.op, nn.Module) or len(step.inputs) != 1:
            raise ConversionError(
                step.name,
                f"{type(step.op).__name__.lower()} of a tensor outside of a squeeze-and-excitation "
                "gate is not supported",
                "what converts is a convolutional network with (N, C, H, W) throughout",
            )
        if any(True for _ in step.op.children()):
            raise ConversionError(step.name, f"{type(step.op).__name__} is not a single layer")
        self._as_only_state(step.inputs[0], step.name, type(step.op).__name__)
        if isinstance(step.op, GlobalMean):
            self._emit(step.name, nn.AdaptiveAvgPool2d(1))
            self._emit(f"{step.name}_flatten", nn.Flatten())
        else:
            self._emit(step.name, copy.deepcopy(step.op).double())
        if not isinstance(step.op, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            self.interval = Interval.unknown(self.state.shape[1], self.state)
        self._finish(step, self._value_of_state())

    def _gate(self, step: Step, gate: Gate) -> None:
        """A squeeze-and-excitation gate that is exactly 1 for all other channels."""
        channels = self._own_channels(step)
        wide = gate.layer(len(channels)).widened(channels, self.state.shape[1])
        self._emit(step.name, wide)
        gated = self.interval.select(channels).with_zero()
        self.interval = self.interval.replaced(channels, gated)
        self._finish(step, Value.of_state(channels, self.state, self.written))

    def _group_norm(self, step: Step, norm: nn.GroupNorm) -> None:
        """A group norm beside which all other channels pass; its affine map is linear, and so
        joins the layer that reads it."""
        channels = self._own_channels(step)
        layer = PartialGroupNorm(
            self.state.shape[1], norm.num_groups, channels.tolist(), norm.eps
        ).to(self.state.device)
        self._emit(step.name, layer)
        unknown = Interval.unknown(len(channels), self.state)
        self.interval = self.interval.replaced(channels, unknown)
        value = Value.of_state(channels, self.state, self.written)
        if norm.weight is not None:
            factor, offset = norm.weight.detach().double(), norm.bias.detach().double()
            value = value.scaled(factor, offset)
        self._finish(step, value)

    def _own_channels(self, step: Step) -> Tensor:
        """The state's channels that a step's input consists of and nothing else reads."""
        node = step.inputs[0]
        channels = self.values[node].selected()
        if channels is None or self._is_read_elsewhere(step):
            channels, _ = self._write(node)
        return channels

    def _is_read_elsewhere(self, step: Step) -> bool:
        """Whether other tensors read the channels that a step would change in place."""
        channels = self.values[step.inputs[0]].selected()
        if channels is None:
            return False
        others = self._others(step.inputs[0])
        return any(bool(torch.isin(channels, value.read()).any()) for value in others.values())

    def _activate(self, step: Step, activation: nn.Module) -> None:
        """An activation of one tensor, and of those that wait for the same one and can be
        computed beside it; all others are carried past."""
        activation = copy.deepcopy(activation).double()
        if hasattr(activation, "inplace"):
            setattr(activation, "inplace", False)  # noqa: B010
        steps = [step, *self._alike(step)]
        nodes = [each.inputs[0] for each in steps]
        chosen = [self.values[node].selected() for node in nodes]
        way: Way | None = None
        if None not in chosen and not any(self._is_read_elsewhere(each) for each in steps):
            reserved = self._read(self._others(*nodes))
            way = self.carrier.in_place(step.name, activation, self.interval.select(reserved))
        if way is None:
            own, way = self._write(nodes[0], step, activation, together=nodes[1:])
            chosen = [own, *(self.values[node].selected() for node in nodes[1:])]
        places = [one for one in chosen if one is not None]
        channels = torch.cat(places)
        acts = torch.zeros(self.state.shape[1], dtype=torch.bool, device=self.state.device)
        acts[channels] = True
        slopes_each = isinstance(activation, nn.PReLU) and activation.num_parameters > 1
        mode = "prelu" if slopes_each or way is None else way.mode
        activated = self.interval.select(channels).activated(activation)
        self._emit(step.name, carrying_activation(activation, acts, mode, self.state))
        self.interval = self.interval.replaced(channels, activated)
        for each, where in zip(steps, places, strict=True):
            self._finish(each, Value.of_state(where, self.state, self.written))

    def _alike(self, step: Step) -> list[Step]:
        """Other steps that wait for the activation of a step, whose tensors one layer can
        compute with the step's, from no fewer channels than they have themselves."""
        together = [step]
        for other in self.waiting:
            if other in together or not self._ready(other) or not _same(other.op, step.op):
                continue
            nodes = [each.inputs[0] for each in (*together, other)]
            value = self.values[nodes[-1]]
            geometries = [path.geometry for node in nodes for path in self.values[node].paths]
            if (
                len(set(nodes)) == len(nodes)
                and self.readers[nodes[-1]] == 1
                and value.channels <= len(value.read())
                and join(geometries, self._state_size()) is not None
            ):
                together.append(other)
        return together[1:]

    def _read(self, values: dict[fx.Node, Value]) -> Tensor:
        """The state's channels that some values read."""
        none = torch.zeros(0, dtype=torch.long, device=self.state.device)
        return sorted_unique(torch.cat([none, *(value.read() for value in values.values())]))

    def _write_value(self, node: fx.Node, alone: bool = False) -> None:
        """Write a convolution behind which a tensor is a selection of the state's channels, or
        the state itself."""
        channels, _ = self._write(node, alone=alone)
        self.values[node] = Value.of_state(channels, self.state, self.written)

    def _write(
        self,
        node: fx.Node,
        step: Step | None = None,
        activation: nn.Module | None = None,
        alone: bool = False,
        together: Sequence[fx.Node] = (),
    ) -> tuple[Tensor, Way | None]:
        """Write a convolution and its BN.

        Args:
            node: The tensor to compute; all others that are needed are reserved.
            step: The activation's step, if one comes next.
            activation: It itself.
            alone: Whether the new state shall hold the tensor's channels in order and no others.
            together: Tensors to compute beside it, for the same activation.

        Returns:
            The tensor's channels in the new state, and how those are to be carried that the
            activation does not concern.
        """
        target = self.values[node]
        others = {other: self.values[other] for other in together}
        acting = target.channels + sum(value.channels for value in others.values())
        others |= self._others(node, *together)
        name = target.conv or node.name
        follower = self._follower(node) if others else None
        layout = Layout(name, target, others, self.state, self.downsample, follower, together)
        conv, norm, places = layout.layer(alone)
        interval = self.interval.convolved(conv).normed(norm)
        own, reserved = places[: target.channels], places[acting:]
        way = None
        factor, shift = torch.ones_like(norm.gamma), torch.zeros_like(norm.gamma)
        if step is not None and activation is not None:
            seen = norm.as_module()(conv(self.state))[:, reserved]
            way = self.carrier.choose(
                step.name, activation, interval.select(reserved), seen, layout.can_shift()
            )
            factor[reserved], shift[reserved] = way.factor, way.shift
            norm = norm._replace(gamma=factor * norm.gamma, beta=factor * norm.beta + shift)
        if self.keep_bn:
            name = self._emit(name, conv)
            self._emit(target.bn or f"{name}_bn", norm.as_module())
        else:
            name = self._emit(name, folded(conv, norm.as_module()))
        alternating = target.channels > 1 and bool(own[1] > 1) and conv.groups == 1
        self.widths[name] = Width(acting, conv.out_channels - acting, alternating)
        self.written += 1
        self.interval = interval.affine(factor, shift)
        self.values.update(layout.values(places, factor, shift, self.written))
        return own, way

    def _follower(self, node: fx.Node) -> nn.Conv2d | Addition | None:
        """What reads a tensor next, behind activations and gates: an addition, or a convolution
        that is not followed by one and so has to reserve channels itself."""
        step = self._reader(node)
        while step is not None and isinstance(step.op, (Gate, *ACTIVATIONS)):
            step = self._reader(step.node)
        if step is None or not isinstance(step.op, nn.Conv2d):
            return step.op if step is not None and isinstance(step.op, Addition) else None
        behind = self._reader(step.node)
        while behind is not None and isinstance(behind.op, BATCH_NORMS):
            behind = self._reader(behind.node)
        is_merge = behind is None or isinstance(behind.op, Addition)
        return None if is_merge else step.op

    def _reader(self, node: fx.Node) -> Step | None:
        """The one step that reads a node."""
        readers = [step for step in self.steps.steps if node in step.inputs]
        return readers[0] if len(readers) == 1 else None


def _same(first: Operation, second: Operation) -> bool:
    """Whether two operations are the same activation, without learned slopes."""
    if not isinstance(first, ACTIVATIONS) or not isinstance(second, type(first)):
        return False

    def settings(module: nn.Module) -> dict[str, object]:
        ignored = ("inplace", "training")
        return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in ignored}

    has_slopes = any(True for _ in first.parameters())
    return not has_slopes and settings(first) == settings(second)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _is_symmetric(pad: nn.ZeroPad2d) -> bool:
    left, right, above, below = pad.padding
    return left == right and above == below


def _geometry(step: Step, conv: nn.Conv2d) -> Geometry:
    """Of a convolution.

    Raises:
        ConversionError: It pads more behind than in front.
    """
    kernel, dilation = _pair(conv.kernel_size), _pair(conv.dilation)
    if conv.padding == "valid":
        padding = (0, 0)
    elif conv.padding == "same":
        around = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(amount % 2 for amount in around):
            raise ConversionError(
                step.name, f"kernel {kernel} with 'same' padding", "kernels must be odd"
            )
        padding = (around[0] // 2, around[1] // 2)
    else:
        padding = _pair(conv.padding)  # type: ignore[arg-type]
    dilation = (dilation[0] if kernel[0] > 1 else 1, dilation[1] if kernel[1] > 1 else 1)
    return Geometry(kernel, _pair(conv.stride), padding, dilation)
