"""ONNX graphs as lists of steps on tensors: what C source is written from.

Meant for what rmprune exports: convolutions, and what stands between them, for one image.
Tensors are float32, or int8 where the graph has QuantizeLinear and DequantizeLinear around
them, to int8 or uint8.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from rmprune.arena import Life, Plan, plan
from rmprune.errors import ExportError
from rmprune.extras import extra

Array = np.ndarray[Any, np.dtype[Any]]
CLAMPING = ("Conv", "Gemm", "Add")  # what can clamp its own results
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph.

    Attributes:
        name: Also in C.
        shape: With the batch, which is 1; of constants, any.
        dtype: ``float32``, ``int8``, ``uint8`` or ``int32``.
        scale: ``real = scale · (stored − zero)`` if it is int8: one number, or one a channel.
        zero: See scale.
        value: Of a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    scale: Array | None = None
    zero: int = 0
    value: Array | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of all elements."""
        return self.size * np.dtype(self.dtype).itemsize


class Node(NamedTuple):
    """An operation.

    Attributes:
        name: In the graph.
        op: Its ONNX type.
        inputs: That are there.
        outputs: All.
        attributes: By name.
        limits: Between which its results are clamped, in real values.
    """

    name: str
    op: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    attributes: dict[str, Any]
    limits: tuple[float, float] = (-math.inf, math.inf)


@dataclass
class Graph:
    """A network's steps.

    Attributes:
        input: What the caller gives.
        output: What the caller gets.
        nodes: In the order in which they run.
        tensors: By name in the ONNX graph.
    """

    input: Tensor
    output: Tensor
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def arenas(self, scratch: Mapping[str, Life] | None = None) -> dict[str, Plan]:
        """Where activations lie: an arena for each type, as C forbids one object to be of two.

        The output is not among them: the caller has a place for it.

        Args:
            scratch: What steps need besides, of int32.
        """
        begin = {t.name: i for i, node in enumerate(self.nodes) for t in node.outputs}
        end = {t.name: i for i, node in enumerate(self.nodes) for t in node.inputs}
        lives: dict[str, dict[str, Life]] = {"int32": dict(scratch)} if scratch else {}
        for tensor in (t for node in self.nodes for t in node.outputs):
            if tensor.name != self.output.name:
                life = Life(
                    tensor.bytes, begin[tensor.name], end.get(tensor.name, begin[tensor.name])
                )
                lives.setdefault(tensor.dtype, {})[tensor.name] = life
        return {dtype: plan(of_type) for dtype, of_type in lives.items()}


def arena_bytes(model: Any) -> int:
    """The static memory that a network's activations need, planned by when they live.

    Args:
        model: As `read_graph` takes it.

    Raises:
        ExportError: As `read_graph` does.
    """
    return sum(placed.bytes for placed in read_graph(model).arenas().values())


def read_graph(model: Any) -> Graph:
    """Read the steps of an ONNX graph.

    Constants are folded, shapes propagated, views are no steps; convolutions, linear layers and
    additions do the clamping of a ReLU or clip behind them.

    Args:
        model: An ``onnx.ModelProto`` for one image, with one input and one output.

    Raises:
        ExportError: It has several, or another batch, or int8 of a kind that is not supported.
        UsageError: The extra ``onnx`` is not installed.
    """
    onnx = extra("onnx", "C source")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input, *graph.output]
    }
    dtypes = {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        for value in [*graph.value_info, *graph.input, *graph.output]
        if value.type.tensor_type.elem_type
    }
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise ExportError("C source is for networks with one input and one output")
    constants = {
        item.name: np.asarray(onnx.numpy_helper.to_array(item)) for item in graph.initializer
    }

    def activation(name: str) -> Tensor:
        shape = shapes.get(name, ())
        if not shape or shape[0] != 1 or 0 in shape:
            raise ExportError(
                f"{name!r} has the shape {shape}; export for a fixed batch of one image"
            )
        return Tensor(_c_name(name), shape, dtypes.get(name, "float32"))

    first, last = graph.input[0].name, graph.output[0].name
    found = Graph(replace(activation(first), name="input"), activation(last))
    found.tensors = {name: _constant(name, value) for name, value in constants.items()}
    found.tensors[first] = found.input
    readers = Counter([last, *(name for node in graph.node for name in node.input)])
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            value = _value(onnx, attributes)
            found.tensors[node.output[0]] = _constant(node.output[0], value)
            continue
        inputs = [found.tensors[name] for name in node.input if name]
        folded = node.op_type == "DequantizeLinear" and inputs[0].value is not None
        outputs = [] if folded else [activation(name) for name in node.output if name]
        _enter(found, node, inputs, outputs, attributes, alone=readers[node.input[0]] == 1)
    result = found.tensors[last]
    if result.scale is not None:
        found.nodes.append(Node(last, "DequantizeLinear", [result], [found.output], {}))
    else:
        found.output = result
    found.nodes = _with_limits_in(found.nodes, found.output)
    return found


def _enter(
    found: Graph,
    node: Any,
    inputs: list[Tensor],
    outputs: list[Tensor],
    attributes: dict[str, Any],
    *,
    alone: bool,
) -> None:
    """Add a node to a graph, or what stands for its output if there is nothing to do.

    ``alone`` says that nothing else reads its first input.
    """
    match node.op_type:
        case "DequantizeLinear" if inputs[0].value is not None:
            scale, zero = inputs[1].value, inputs[2].value if len(inputs) > 2 else None
            assert scale is not None
            weight = replace(inputs[0], scale=scale)
            if zero is not None and zero.any():  # no weight: those are symmetric
                real = scale * (inputs[0].value.astype(np.float32) - zero)
                weight = replace(inputs[0], dtype="float32", value=real.astype(np.float32))
            found.tensors[node.output[0]] = weight
        case "DequantizeLinear" if inputs[0].scale is not None:
            found.tensors[node.output[0]] = inputs[0]
        case "QuantizeLinear":
            zero = inputs[2].value if len(inputs) > 2 else np.zeros((), np.uint8)
            assert zero is not None
            if zero.dtype not in (np.int8, np.uint8) or zero.size != 1:
                raise ExportError(f"{node.name}: activations must be 8 bits, one scale a tensor")
            middle = int(zero.item()) - (128 if zero.dtype == np.uint8 else 0)
            stored = replace(outputs[0], dtype="int8", scale=inputs[1].value, zero=middle)
            made = [i for i, step in enumerate(found.nodes) if step.outputs == inputs[:1]]
            if alone and made:  # written as int8 at once
                found.nodes[made[0]] = found.nodes[made[0]]._replace(outputs=[stored])
            else:
                found.nodes.append(Node(node.name, node.op_type, inputs[:1], [stored], {}))
            found.tensors[node.output[0]] = stored
        case op if op in VIEWS:
            found.tensors[node.output[0]] = replace(inputs[0], shape=outputs[0].shape)
        case _:
            found.nodes.append(Node(node.name, node.op_type, inputs, outputs, attributes))
            found.tensors |= dict(zip(node.output, outputs, strict=True))


def _constant(name: str, value: Array) -> Tensor:
    if value.dtype == np.bool_:
        value = value.astype(np.uint8)
    return Tensor(_c_name(name), value.shape, value.dtype.name, value=value)


def _c_name(name: str) -> str:
    return "t_" + re.sub(r"\W", "_", name)


def _with_limits_in(nodes: list[Node], output: Tensor) -> list[Node]:
    """Steps that clamp their results themselves, where a ReLU or clip comes next."""
    readers = Counter([output.name, *(t.name for node in nodes for t in node.inputs)])
    result: list[Node] = []
    for node in nodes:
        limits, made = _limits(node), None
        if limits is not None and readers[node.inputs[0].name] == 1:
            made = next((i for i, b in enumerate(result) if _clamps(b, node.inputs[0])), None)
        if limits is None or made is None:
            result.append(node)
        else:
            result[made] = result[made]._replace(outputs=node.outputs, limits=limits)
    return result


def _clamps(before: Node, value: Tensor) -> bool:
    """Whether a step makes a value that it can clamp itself."""
    made = before.outputs[0]
    return before.op in CLAMPING and made.name == value.name and made.scale is None


def _value(onnx: Any, attributes: Mapping[str, Any]) -> Array:
    """Of a Constant node."""
    ((kind, value),) = attributes.items()
    match kind:
        case "value":
            return np.asarray(onnx.numpy_helper.to_array(value))
        case "value_float" | "value_floats":
            return np.asarray(value, np.float32)
        case "value_int" | "value_ints":
            return np.asarray(value, np.int64)
    raise ExportError(f"there is no C for a constant with {kind}")


def _limits(node: Node) -> tuple[float, float] | None:
    if node.op == "Relu":
        return 0.0, math.inf
    if (
        node.op == "Clip"
        and len(node.inputs) == 3
        and all(t.value is not None for t in node.inputs[1:])
    ):
        low, high = (float(t.value.item()) for t in node.inputs[1:] if t.value is not None)
        return low, high
    return None
