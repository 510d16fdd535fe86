"""A traced network as steps: every node as one operation of a few kinds.

What a graph says in many ways (modules, functions, methods, in place or not, constants worked
out on the way) is said in one way here, and squeeze-and-excitation gates are found. Names of
model classes play no part.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.composed import ComposedConv2d
from rmprune.errors import ConversionError
from rmprune.graph import ADDITIONS, as_module, is_identity, reads_shape
from rmprune.layers import OPEN, ChannelGate, function_name
from rmprune.norms import norm_of_bn

MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
SUBTRACTIONS = (operator.sub, torch.sub, "sub")
DIVISIONS = (operator.truediv, torch.div, "div")
SPLITS = (torch.split, torch.chunk, "split", "chunk")
RESHAPES = ("view", "reshape", "expand", "expand_as", "unsqueeze", "squeeze", torch.reshape)


@dataclass(frozen=True)
class Addition:
    """The sum of two tensors."""


@dataclass(frozen=True)
class Concatenation:
    """Channels behind each other."""


@dataclass(frozen=True)
class Slice:
    """Some of the channels: every ``step``-th, or one of ``parts`` equal ones."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None
    parts: int = 1
    part: int = 0

    def indices(self, channels: int) -> range:
        """The channels of a tensor that are meant."""
        size = -(-channels // self.parts)
        return range(channels)[self.part * size : (self.part + 1) * size][
            self.start : self.stop : self.step
        ]


@dataclass(frozen=True)
class Scaling:
    """``factor · x + offset``; each a number or ``(channels,)``."""

    factor: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Reshape:
    """A view of the values by other axes."""


@dataclass(frozen=True)
class Gate:
    """Squeeze and excitation of its input: the chain of steps from its mean to its gates."""

    chain: tuple[Step, ...]

    def layer(self, channels: int) -> ChannelGate:
        """The gate as one layer.

        Raises:
            ConversionError: The chain has a layer that a gate cannot have.
        """
        maps: list[tuple[Tensor, Tensor]] = []
        functions: list[str] = []
        size = channels
        for step in self.chain[1:]:
            op = step.op
            if isinstance(op, nn.Flatten | Reshape):
                continue
            weight = _matrix(op, size)
            if weight is not None:
                bias = getattr(op, "bias", None)
                bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
                maps.append((weight, bias.expand(len(weight))))
                functions.append("identity")
                size = len(weight)
            elif not maps or functions[-1] != "identity":
                raise _no_gate(step)
            elif isinstance(op, nn.modules.batchnorm._BatchNorm):
                norm = norm_of_bn(copy.deepcopy(op).double())
                weight, bias = maps[-1]
                maps[-1] = (norm.slope[:, None] * weight, norm.slope * bias + norm.offset)
            elif isinstance(op, nn.Module) and (name := function_name(op)) is not None:
                functions[-1] = name
            else:
                raise _no_gate(step)
        if not maps or functions[-1] not in OPEN or size != channels:
            raise _no_gate(self.chain[-1])
        sizes = (channels, *(len(weight) for weight, _ in maps))
        gate = ChannelGate(sizes, functions)
        for place, (weight, bias) in enumerate(maps):
            setattr(gate, f"weight{place}", nn.Parameter(weight.clone()))
            setattr(gate, f"bias{place}", nn.Parameter(bias.clone()))
        return gate.eval()


def _no_gate(step: Step) -> ConversionError:
    return ConversionError(
        step.name,
        f"{type(step.op).__name__} at this place of a squeeze-and-excitation gate",
        "a gate is a chain of 1×1 convolutions, linear layers, BNs and activations that ends "
        "in a sigmoid or hard sigmoid",
    )


def _matrix(op: object, channels: int) -> Tensor | None:
    """The matrix of a linear map of the channels' means, or None."""
    match op:
        case nn.Linear():
            return op.weight.detach().double()
        case nn.Conv2d(kernel_size=(1, 1), groups=1):
            return op.weight.detach().double()[:, :, 0, 0]
        case nn.Conv1d(in_channels=1, out_channels=1, padding=(int(padding),), stride=(1,)):
            taps = op.weight.detach().double()[0, 0]  # along the channels: one weight a diagonal
            index = torch.arange(channels, device=taps.device)
            tap = index[None, :] - index[:, None] + padding
            inside = (tap >= 0) & (tap < len(taps))
            return torch.where(inside, taps[tap.clamp(0, len(taps) - 1)], 0)
        case _:
            return None


@dataclass(frozen=True)
class Unknown:
    """What cannot be converted."""

    reason: str
    advice: str = "write it as an nn.Module layer, or keep it out of the network"


Operation = nn.Module | Addition | Concatenation | Slice | Scaling | Reshape | Gate | Unknown


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        node: The node that it comes from.
        name: The module's path, or the node's name.
        op: What is done. A module is the model's own, or a new one equal to a function.
        inputs: The nodes whose results are read.
    """

    node: fx.Node
    name: str
    op: Operation
    inputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Steps:
    """A network as `read` read it: steps in order, the input's node and the result's."""

    steps: tuple[Step, ...]
    source: fx.Node
    result: fx.Node


def read(graph_module: fx.GraphModule) -> Steps:
    """Read a traced network.

    Raises:
        ConversionError: It has not one input and one output tensor.
    """
    return _Reader(graph_module).read()


class _Reader:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.steps: dict[fx.Node, Step] = {}
        self.constants: dict[fx.Node, Any] = {}
        # A tensor that is changed in place lives in one storage under several nodes; readers
        # get the node that wrote there last.
        self.storage: dict[fx.Node, fx.Node] = {}
        self.latest: dict[fx.Node, fx.Node] = {}

    def read(self) -> Steps:
        nodes = list(self.graph_module.graph.nodes)
        sources = [node for node in nodes if node.op == "placeholder"]
        if len(sources) != 1:
            raise ConversionError("forward", f"the model has {len(sources)} inputs", "it needs one")
        self._write(sources[0])
        result = None
        for node in nodes:
            if node.op == "output":
                result = node.args[0]
            elif node.op != "placeholder":
                self._visit(node)
        if not isinstance(result, fx.Node) or result not in self.storage:
            raise ConversionError("output", "the model does not return one tensor of its input")
        return Steps(self._needed_for(self._resolve(result)), sources[0], self._resolve(result))

    def _needed_for(self, result: fx.Node) -> tuple[Step, ...]:
        """The steps that a result depends on, in order."""
        needed = {result}
        kept = []
        for step in reversed(self.steps.values()):
            if step.node in needed:
                needed.update(step.inputs)
                kept.append(step)
        return tuple(reversed(kept))

    def _write(self, node: fx.Node) -> None:
        self.storage[node] = node
        self.latest[node] = node

    def _resolve(self, node: fx.Node) -> fx.Node:
        return self.latest[self.storage[node]]

    def _visit(self, node: fx.Node) -> None:
        inputs = [source for source in node.all_input_nodes if source in self.storage]
        if not inputs:
            self._visit_constant(node)
            return
        if reads_shape(node):
            return
        if node.target in SPLITS:
            self.storage[node] = self.storage[inputs[0]]
            return
        op = self._operation(node, inputs)
        if isinstance(op, nn.Module) and is_identity(op):
            self.storage[node] = self.storage[inputs[0]]
            return
        sources = tuple(self._resolve(source) for source in inputs)
        if isinstance(op, Gate):
            sources = op.chain[0].inputs
        elif isinstance(op, Reshape):
            sources = sources[:1]  # expand_as reads the other one's shape
        name = str(node.target) if node.op == "call_module" else node.name
        self.steps[node] = Step(node, name, op, sources)
        self._write(node)
        if _is_in_place(node, op):
            self.storage[node] = self.storage[inputs[0]]
            self.latest[self.storage[node]] = node

    def _visit_constant(self, node: fx.Node) -> None:
        """Work out what does not depend on the input."""
        if any(source not in self.constants for source in node.all_input_nodes):
            return
        if node.op == "get_attr":
            value: Any = self.graph_module
            for part in str(node.target).split("."):
                value = getattr(value, part)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
            match node.op:
                case "call_function" if callable(node.target):
                    value = node.target(*args, **kwargs)
                case "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                case _:
                    value = self.graph_module.get_submodule(str(node.target))(*args, **kwargs)
        self.constants[node] = value

    def _operation(self, node: fx.Node, inputs: list[fx.Node]) -> Operation:
        if node.target in ADDITIONS and len(inputs) == 2 and node.kwargs.get("alpha", 1) == 1:
            return Addition()
        if node.target in MULTIPLICATIONS and len(inputs) == 2:
            return self._gate(node)
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            return Concatenation() if dim in (1, -3) else Unknown("only channels can be joined")
        if node.target in RESHAPES and as_module(self.graph_module, node) is None:
            return Reshape()
        if len(inputs) > 1:
            return Unknown(f"{_name(node)} of {len(inputs)} tensors is not supported")
        if node.target is operator.getitem:
            found = self._slice(node)
            if found is not None:
                return found
        scaling = self._scaling(node, inputs[0])
        if scaling is not None:
            return scaling
        if node.op == "call_module":
            composed = self.graph_module.get_submodule(str(node.target))
            if isinstance(composed, ComposedConv2d):
                return composed.as_conv(torch.float64)  # as exact as what is compared with it
        module = as_module(self.graph_module, node, self.constants)
        return (
            Unknown(f"the operation {_name(node)!r} is not supported") if module is None else module
        )

    def _slice(self, node: fx.Node) -> Operation | None:
        source: Any = node.args[0]
        index: Any = node.args[1]
        if isinstance(source, fx.Node) and source.target in SPLITS and isinstance(index, int):
            sizes: Any = source.args[1] if len(source.args) > 1 else source.kwargs.get("chunks")
            dim = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
            if dim not in (1, -3):
                return Unknown("only channels can be split")
            if source.target in (torch.chunk, "chunk"):
                return Slice(parts=sizes, part=index % sizes)
            if isinstance(sizes, int):
                return Slice(sizes * index, sizes * (index + 1) or None)
            index %= len(sizes)
            start = sum(sizes[:index])
            return Slice(start, start + sizes[index])
        if not isinstance(index, tuple) or any(isinstance(part, fx.Node) for part in index):
            return None
        index = tuple(part for part in index if part is not Ellipsis)
        whole = slice(None)
        others = [part for axis, part in enumerate(index) if axis != 1]
        if len(index) < 2 or not isinstance(index[1], slice) or index[1] == whole:
            return None
        chosen = index[1]
        return (
            Slice(chosen.start, chosen.stop, chosen.step)
            if others.count(whole) == len(others)
            else None
        )

    def _scaling(self, node: fx.Node, data: fx.Node) -> Scaling | None:
        """An arithmetic operation with a constant."""
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        other = right if left is data else left
        constant = self.constants.get(other) if isinstance(other, fx.Node) else other
        if isinstance(constant, bool) or not isinstance(constant, int | float | Tensor):
            return None
        value = torch.as_tensor(constant).detach()
        if value.numel() > 1 and (value.ndim < 3 or value.numel() != value.shape[-3]):
            return None
        value = value.flatten() if value.numel() > 1 else value.reshape(())
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if node.target in MULTIPLICATIONS:
            return Scaling(value, zero)
        if node.target in ADDITIONS:
            return Scaling(one, value)
        if node.target in SUBTRACTIONS:
            return Scaling(one, -value) if left is data else Scaling(-one, value)
        if node.target in DIVISIONS and left is data:
            return Scaling(one / value, zero)
        return None

    # Squeeze and excitation: a product of x with a chain of layers of x's mean.

    def _gate(self, node: fx.Node) -> Operation:
        left, right = (self._resolve(source) for source in node.all_input_nodes)
        chain = self._chain(right, left) or self._chain(left, right)
        if chain is None:
            return Unknown("a product of two tensors that is no squeeze-and-excitation gate")
        for step in chain:
            if len([user for user in step.node.users if not reads_shape(user)]) > 1:
                return Unknown("a layer of a squeeze-and-excitation gate is read from outside")
        for step in chain:
            del self.steps[step.node]
        return Gate(tuple(chain))

    def _chain(self, gate: fx.Node, data: fx.Node) -> list[Step] | None:
        """The steps from the mean of ``data`` to ``gate``, or None if there is no such chain."""
        chain: list[Step] = []
        node = gate
        while (step := self.steps.get(node)) is not None and len(step.inputs) == 1:
            chain.append(step)
            if _is_global_mean(step.op) and step.inputs[0] is data:
                return chain[::-1]
            node = step.inputs[0]
        return None


def blocks(steps: Steps) -> list[tuple[str, ...]]:
    """The convolutions between every addition and what its two terms have in common.

    Returns:
        Names of convolutions in order, one entry for each addition.
    """
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    found = []
    for step in steps.steps:
        terms = [before.get(node, frozenset()) | {node} for node in step.inputs]
        before[step.node] = frozenset().union(*terms)
        if isinstance(step.op, Addition):
            inside = before[step.node] - frozenset.intersection(*terms)
            found.append(
                tuple(
                    other.name
                    for other in steps.steps
                    if other.node in inside and isinstance(other.op, nn.Conv2d)
                )
            )
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _is_in_place(node: fx.Node, op: Operation) -> bool:
    by_module = node.op == "call_module" and getattr(op, "inplace", False)
    by_name = node.op != "call_module" and (
        _name(node).rstrip("_") != _name(node) or node.target in (operator.iadd, operator.imul)
    )
    return bool(by_module or by_name or node.kwargs.get("inplace"))


def _is_global_mean(op: Operation) -> bool:
    return isinstance(op, nn.AdaptiveAvgPool2d) and op.output_size in (1, (1, 1))
