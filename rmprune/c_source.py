"""Networks as C99: one file without dependencies, static memory, no malloc.

Sums of int8 are 32 bits wide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from rmprune.arena import Life, Plan
from rmprune.c_graph import Array, Graph, Node, Tensor, read_graph
from rmprune.errors import ExportError

INFINITY = "INFINITY"

# One value from others; {0}, {1}, … are the inputs, other names the attributes.
UNARY = {
    "Relu": "({0} < 0 ? 0 : {0})",
    "LeakyRelu": "({0} < 0 ? {alpha} * {0} : {0})",
    "Sigmoid": "1.0f / (1.0f + expf(-{0}))",
    "HardSigmoid": "fminf(fmaxf({alpha} * {0} + {beta}, 0.0f), 1.0f)",
    "HardSwish": "{0} * fminf(fmaxf({0} / 6.0f + 0.5f, 0.0f), 1.0f)",
    "Tanh": "tanhf({0})",
    "Erf": "erff({0})",
    "Exp": "expf({0})",
    "Softplus": "log1pf(expf({0}))",
    "Sqrt": "sqrtf({0})",
    "Neg": "-{0}",
    "Gelu": "0.5f * {0} * (1.0f + erff(0.70710678f * {0}))",
    "GeluTanh": "0.5f * {0} * (1.0f + tanhf(0.79788456f * {0} * (1.0f + 0.044715f * {0} * {0})))",
    "Mish": "{0} * tanhf(log1pf(expf({0})))",
    "Cast": "(float){0}",
    "QuantizeLinear": "{0}",
    "DequantizeLinear": "{0}",
}
BROADCAST = {
    "Add": "{0} + {1}",
    "Sub": "{0} - {1}",
    "Mul": "{0} * {1}",
    "Div": "{0} / {1}",
    "PRelu": "({0} < 0 ? {1} * {0} : {0})",
    "Clip": "fminf(fmaxf({0}, {1}), {2})",
    "Min": "fminf({0}, {1})",
    "Max": "fmaxf({0}, {1})",
    "Where": "({0} != 0 ? {1} : {2})",
}
DEFAULTS = {"LeakyRelu": {"alpha": 0.01}, "HardSigmoid": {"alpha": 0.2, "beta": 0.5}}
C_TYPES = {"float32": "float", "int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t"}


class CSource(NamedTuple):
    """A network in C.

    Attributes:
        header: Text of ``NAME.h``.
        source: Text of ``NAME.c``.
        arena_bytes: Of the static arena, where all activations are.
        weight_bytes: Of all constants.
        outputs: Values that it gives.
    """

    header: str
    source: str
    arena_bytes: int
    weight_bytes: int
    outputs: int


def c_source(model: Any, name: str = "net", about: Sequence[str] = ()) -> CSource:
    """Write a network in C99.

    Args:
        model: An ``onnx.ModelProto`` for one image, with one input and one output.
        name: Prefix of the two files and of all that they define.
        about: Lines for the comment at the head of the header.

    Raises:
        ExportError: The graph has an operation, a shape or a type that there is no C for.
        UsageError: The extra ``onnx`` is not installed.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ExportError(f"{name!r} is no name in C; give letters, digits and underscores")
    return _Writer(name, read_graph(model), about).write()


def _load(tensor: Tensor, index: str) -> str:
    """C for the real value of an element."""
    element = f"{tensor.name}[{index}]"
    if tensor.scale is None:
        return element
    return f"({_float(tensor.scale.item())} * (float)({element} - {tensor.zero}))"


def _store(tensor: Tensor, index: str, value: str) -> str:
    """C that gives an element a real value."""
    if tensor.scale is None:
        return f"{tensor.name}[{index}] = {value};"
    scaled = f"({value}) / {_float(tensor.scale.item())}"
    return f"{tensor.name}[{index}] = to_i8({scaled}, {tensor.zero});"


def _float(value: float) -> str:
    """A number as C reads it back to the last bit of a float."""
    if math.isinf(value):
        return INFINITY if value > 0 else f"-{INFINITY}"
    text = f"{np.float32(value):.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


class _Writer:
    """Writes the two files."""

    def __init__(self, name: str, graph: Graph, about: Sequence[str]) -> None:
        self.name, self.graph, self.about = name, graph, about
        self.input, self.output = graph.input, graph.output
        self.kernels: set[str] = set()
        self.constants: dict[str, str] = {}
        self.weight_bytes = 0
        self.scratch: dict[str, Life] = {}

    def write(self) -> CSource:
        """All steps, then what they turned out to need."""
        steps = [self._step(index, node) for index, node in enumerate(self.graph.nodes)]
        plans = self.graph.arenas(self.scratch)
        total = sum(placed.bytes for placed in plans.values())
        return CSource(
            self._header(total),
            self._source(plans, steps),
            total,
            self.weight_bytes,
            self.output.size,
        )

    # What is computed.

    def _step(self, index: int, node: Node) -> list[str]:
        writers: dict[str, Callable[[Node, int], list[str]]] = {
            "Conv": self._conv,
            "Gemm": self._gemm,
            "Concat": self._concat,
            "Split": self._split,
            "Gather": self._gather,
            "Slice": self._slice,
            "Pad": self._pad,
            "Transpose": self._transpose,
            "ReduceMean": self._mean,
            "GlobalAveragePool": self._mean,
            "MaxPool": self._pool,
            "AveragePool": self._pool,
        }
        known = {*UNARY, *BROADCAST}
        if node.op in known:
            lines = self._elementwise(node)
        elif node.op in writers:
            lines = writers[node.op](node, index)
        else:
            advice = "export to onnx or pt2"
            if node.op == "BatchNormalization":  # of the shortcuts of a run's residual model
                advice = "export the run's net.safetensors, whose BNs are folded, or to onnx or pt2"
            raise ExportError(
                f"there is no C for the operation {node.op} of {node.name!r}; {advice}"
            )
        return [
            f"    /* {node.op}: {_shape(node.inputs[0])} to {_shape(node.outputs[0])} */",
            *lines,
        ]

    def _declare(self, name: str, value: Array) -> str:
        """A constant array, once."""
        if name not in self.constants:
            kind = C_TYPES[value.dtype.name]
            write = _float if value.dtype == np.float32 else str
            values = ", ".join(write(v) for v in value.ravel().tolist())
            self.constants[name] = f"static const {kind} {name}[{value.size}] = {{{values}}};"
            self.weight_bytes += value.nbytes
        return name

    def _elementwise(self, node: Node) -> list[str]:
        output = node.outputs[0]
        rank = len(output.shape)
        tanh = node.attributes.get("approximate") == b"tanh"
        expression = {**UNARY, **BROADCAST}["GeluTanh" if tanh else node.op]
        attributes = {**DEFAULTS.get(node.op, {}), **node.attributes}
        names = {k: _float(v) for k, v in attributes.items() if isinstance(v, int | float)}
        loads = []
        for tensor in node.inputs:
            if tensor.value is not None and tensor.size == 1:
                loads.append(_float(float(tensor.value.item())))
                continue
            if tensor.value is not None:
                self._declare(tensor.name, tensor.value)
            loads.append(_load(tensor, _index(_strides(tensor.shape, output.shape))))
        if node.op == "Clip" and len(loads) < 3:
            raise ExportError(f"{node.name}: a clip needs both limits")
        self._note(output)
        low, high = node.limits
        value = expression.format(*loads, **names)
        value = value if math.isinf(low) else f"fmaxf({value}, {_float(low)})"
        value = value if math.isinf(high) else f"fminf({value}, {_float(high)})"
        return _loops(output.shape, _store(output, _index(_strides(output.shape)), value), rank)

    def _note(self, output: Tensor) -> None:
        if output.scale is not None:
            self.kernels.add("to_i8")

    def _conv(self, node: Node, index: int) -> list[str]:
        x, w = node.inputs[:2]
        kernel = node.attributes.get("kernel_shape", list(w.shape[2:]))
        if len(kernel) != 2 or len(x.shape) != 4:
            raise ExportError(f"{node.name}: only convolutions of images are written in C")
        if node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise ExportError(f"{node.name}: give the padding in numbers")
        settings = [
            *x.shape[1:],
            *node.outputs[0].shape[1:],
            *kernel,
            *node.attributes.get("strides", (1, 1)),
            *node.attributes.get("pads", (0, 0, 0, 0))[:2],
            *node.attributes.get("dilations", (1, 1)),
            node.attributes.get("group", 1),
        ]
        return self._weighted(node, index, w, settings)

    def _gemm(self, node: Node, index: int) -> list[str]:
        x, w = node.inputs[:2]
        scaled = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
        if w.value is None or node.attributes.get("transA", 0) or scaled != (1.0, 1.0):
            raise ExportError(f"{node.name}: only linear layers are written in C")
        if not node.attributes.get("transB", 0):
            w = replace(w, value=np.ascontiguousarray(w.value.T), shape=w.shape[::-1])
        outputs, inputs = w.shape
        settings = [inputs, 1, 1, outputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
        if x.size != inputs:
            raise ExportError(f"{node.name}: it reads {inputs} values of {x.size}")
        return self._weighted(node, index, w, settings)

    def _weighted(self, node: Node, index: int, w: Tensor, settings: list[int]) -> list[str]:
        """A call of one of the convolutions."""
        x, output = node.inputs[0], node.outputs[0]
        assert w.value is not None
        outputs = settings[3]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        geometry = f"geometry{index}"
        numbers = ", ".join(map(str, settings))
        self.constants[geometry] = f"static const conv_t {geometry} = {{{numbers}}};"
        weights = self._declare(f"weight{index}", w.value)
        self.kernels.add("conv_t")
        low, high = node.limits
        if x.scale is None and w.scale is None and output.scale is None:
            value = np.zeros(outputs, np.float32) if bias is None else bias.value
            assert value is not None
            self.kernels.add("conv_f32")
            return [
                f"    conv_f32({x.name}, {weights}, {self._declare(f'bias{index}', value)}, "
                f"{output.name}, &{geometry}, {_float(low)}, {_float(high)});"
            ]
        if x.scale is None or w.scale is None:
            raise ExportError(
                f"{node.name}: its input and its weights must both be int8, or neither"
            )
        sums = np.zeros(outputs, np.int32) if bias is None else bias.value
        if sums is None or sums.dtype != np.int32:
            raise ExportError(f"{node.name}: an int8 layer needs a bias of int32")
        row = f"row{index}"
        self.scratch[row] = Life(4 * settings[5], index, index)
        unit = 1.0 if output.scale is None else float(output.scale.item())
        scale = (w.scale.astype(np.float64) * float(x.scale.item()) / unit).astype(np.float32)
        scales = self._declare(f"scale{index}", np.broadcast_to(scale, (outputs,)).copy())
        given = f"{x.name}, {weights}, {self._declare(f'bias{index}', sums)}, {scales}"
        limits = f"{_float(low / unit)}, {_float(high / unit)}"
        self.kernels |= {"conv_sum"}
        if output.scale is None:
            self.kernels.add("conv_i8_f32")
            return [
                f"    conv_i8_f32({given}, {output.name}, {row}, &{geometry}, {x.zero}, {limits});"
            ]
        self.kernels |= {"conv_i8", "to_i8"}
        return [
            f"    conv_i8({given}, {output.name}, {row}, &{geometry}, {x.zero}, {output.zero}, "
            f"{limits});"
        ]

    def _copied(self, source: Tensor, output: Tensor, index: str) -> list[str]:
        """Every element of an output from some place of one tensor."""
        self._note(output)
        here = _index(_strides(output.shape))
        return _loops(output.shape, _store(output, here, _load(source, index)), len(output.shape))

    def _concat(self, node: Node, _: int) -> list[str]:
        output, axis = node.outputs[0], node.attributes["axis"]
        self._note(output)
        strides = _strides(output.shape)
        lines, begin = [], 0
        for tensor in node.inputs:
            here = f"{begin * strides[axis]} + {_index(strides)}"
            value = _load(tensor, _index(_strides(tensor.shape)))
            lines += _loops(tensor.shape, _store(output, here, value), len(tensor.shape))
            begin += tensor.shape[axis]
        return lines

    def _split(self, node: Node, _: int) -> list[str]:
        source, axis = node.inputs[0], node.attributes.get("axis", 0)
        strides = _strides(source.shape)
        lines, begin = [], 0
        for output in node.outputs:
            lines += self._copied(source, output, f"{begin * strides[axis]} + {_index(strides)}")
            begin += output.shape[axis]
        return lines

    def _gather(self, node: Node, _: int) -> list[str]:
        source, indices = node.inputs
        axis = node.attributes.get("axis", 0)
        if indices.value is None or indices.value.ndim != 1:
            raise ExportError(f"{node.name}: it gathers by indices that are not constant")
        table = self._declare(indices.name, indices.value.astype(np.int32))
        strides = _strides(source.shape)
        terms = [
            f"{table}[i{d}] * {s}" if d == axis else f"i{d} * {s}" for d, s in enumerate(strides)
        ]
        return self._copied(source, node.outputs[0], " + ".join(terms))

    def _slice(self, node: Node, _: int) -> list[str]:
        source = node.inputs[0]
        starts, _ends, axes, steps = self._integers(node, 4)
        strides = _strides(source.shape)
        terms = [f"i{d} * {s}" for d, s in enumerate(strides)]
        for start, axis, step in zip(starts, axes, steps or [1] * len(starts), strict=True):
            here = start + source.shape[axis] if start < 0 else start
            terms[axis] = f"({min(here, source.shape[axis])} + i{axis} * {step}) * {strides[axis]}"
        return self._copied(source, node.outputs[0], " + ".join(terms))

    def _integers(self, node: Node, count: int) -> list[list[int]]:
        """The constant lists behind a node's first input; missing ones are empty."""
        values = [tensor.value for tensor in node.inputs[1:]]
        if any(value is None for value in values):
            raise ExportError(f"{node.name}: {node.op} by values that are not constant")
        lists = [np.asarray(value).ravel().tolist() for value in values]
        return [*lists, *([] for _ in range(count - len(lists)))]

    def _pad(self, node: Node, _: int) -> list[str]:
        source, output = node.inputs[0], node.outputs[0]
        if node.attributes.get("mode", b"constant") != b"constant":
            raise ExportError(f"{node.name}: only padding with a constant is written in C")
        pads, *rest = self._integers(node, 3)
        filled = float(rest[0][0]) if rest[0] else 0.0
        if len(node.inputs) > 3 or min(pads) < 0:
            raise ExportError(f"{node.name}: only padding of all axes is written in C")
        self._note(output)
        strides = _strides(output.shape)
        begin = sum(p * s for p, s in zip(pads[: len(strides)], strides, strict=True))
        here = f"{begin} + {_index(strides)}"
        value = _load(source, _index(_strides(source.shape)))
        return [
            *_loops(output.shape, _store(output, _index(strides), _float(filled)), len(strides)),
            *_loops(source.shape, _store(output, here, value), len(strides)),
        ]

    def _transpose(self, node: Node, _: int) -> list[str]:
        source, output = node.inputs[0], node.outputs[0]
        strides = _strides(source.shape)
        index = " + ".join(f"i{d} * {strides[p]}" for d, p in enumerate(node.attributes["perm"]))
        return self._copied(source, output, index)

    def _mean(self, node: Node, _: int) -> list[str]:
        source, output = node.inputs[0], node.outputs[0]
        axes = [2, 3]
        if node.op == "ReduceMean":
            axes = self._integers(node, 1)[0] if len(node.inputs) > 1 else node.attributes["axes"]
        if sorted(axis % 4 for axis in axes) != [2, 3] or len(source.shape) != 4:
            raise ExportError(f"{node.name}: only means over height and width are written in C")
        _, channels, height, width = source.shape
        area = height * width
        self._note(output)
        value = _load(source, f"c * {area} + i")
        return [
            f"    for (int c = 0; c < {channels}; ++c) {{",
            "        float sum = 0.0f;",
            f"        for (int i = 0; i < {area}; ++i)",
            f"            sum += {value};",
            f"        {_store(output, 'c', f'sum / {_float(area)}')}",
            "    }",
        ]

    def _pool(self, node: Node, _: int) -> list[str]:
        source, output = node.inputs[0], node.outputs[0]
        attributes = node.attributes
        if len(source.shape) != 4:
            raise ExportError(f"{node.name}: only pooling of images is written in C")
        rows, columns = attributes["kernel_shape"]
        down, right = attributes.get("strides", (1, 1))
        top, left, bottom, beyond = attributes.get("pads", (0, 0, 0, 0))
        if tuple(attributes.get("dilations", (1, 1))) != (1, 1):
            raise ExportError(f"{node.name}: dilated pooling is not written in C")
        _, channels, height, width = source.shape
        _, _, out_height, out_width = output.shape
        largest = node.op == "MaxPool"
        # What a window has of the image, and of its padding if that counts, but not of what lies
        # beyond, where ceil_mode lets windows end.
        counts_padding = bool(attributes.get("count_include_pad", 0)) and not largest
        counts_image = not counts_padding and not largest
        padded = f"count += v < {height + bottom} && h < {width + beyond};"
        here = f"(c * {height} + v) * {width} + h"
        add = (
            f"value = fmaxf(value, {_load(source, here)});"
            if largest
            else (f"value += {_load(source, here)};")
        )
        self._note(output)
        result = "value" if largest else "value / (float)count"
        there = f"(c * {out_height} + i) * {out_width} + j"
        return [
            f"    for (int c = 0; c < {channels}; ++c)",
            f"        for (int i = 0; i < {out_height}; ++i)",
            f"            for (int j = 0; j < {out_width}; ++j) {{",
            f"                float value = {'-INFINITY' if largest else '0.0f'};",
            *(["                int count = 0;"] if not largest else []),
            f"                for (int u = 0; u < {rows}; ++u)",
            f"                    for (int k = 0; k < {columns}; ++k) {{",
            f"                        const int v = i * {down} - {top} + u;",
            f"                        const int h = j * {right} - {left} + k;",
            *([f"                        {padded}"] if counts_padding else []),
            f"                        if (v < 0 || v >= {height} || h < 0 || h >= {width})",
            "                            continue;",
            *(["                        ++count;"] if counts_image else []),
            f"                        {add}",
            "                    }",
            f"                {_store(output, there, result)}",
            "            }",
        ]

    # The files.

    def _header(self, arena_bytes: int) -> str:
        upper = self.name.upper()
        # A path of data may have in it what begins or ends a comment.
        lines = [line.replace("*/", "* /").replace("/*", "/ *") for line in self.about]
        about = "".join(f" * {line}\n" for line in lines)
        return (
            f"/* {self.name}: a network as C99, written by rmprune.\n{about} */\n"
            f"#ifndef {upper}_H\n#define {upper}_H\n\n#include <stdint.h>\n\n"
            f"/* {_shape(self.input)} */\n#define {upper}_INPUT_SIZE {self.input.size}\n"
            f"/* {_shape(self.output)} */\n#define {upper}_OUTPUT_SIZE {self.output.size}\n"
            "/* Static memory for activations, and constants, in bytes. */\n"
            f"#define {upper}_ARENA_BYTES {arena_bytes}\n"
            f"#define {upper}_WEIGHT_BYTES {self.weight_bytes}\n\n"
            "/* Compute one image. Not reentrant: activations are static. */\n"
            f"void {self.name}_run(const {C_TYPES[self.input.dtype]} "
            f"input[{upper}_INPUT_SIZE], float output[{upper}_OUTPUT_SIZE]);\n\n#endif\n"
        )

    def _source(self, plans: dict[str, Plan], steps: Iterable[Sequence[str]]) -> str:
        upper = self.name.upper()
        arenas, places = [], []
        for dtype, placed in plans.items():
            kind, size = C_TYPES[dtype], np.dtype(dtype).itemsize
            arenas.append(f"static {kind} {dtype}_arena[{placed.bytes // size}];")
            places += [
                f"    {kind} *{name} = {dtype}_arena + {offset // size};"
                for name, offset in placed.offsets.items()
            ]
        parts = [
            f'#include "{self.name}.h"\n\n#include <math.h>\n#include <stddef.h>\n',
            _kernels(self.kernels),
            *self.constants.values(),
            "",
            *arenas,
            f"\nvoid {self.name}_run(const {C_TYPES[self.input.dtype]} "
            f"input[{upper}_INPUT_SIZE], float output[{upper}_OUTPUT_SIZE])\n{{",
            *places,
            f"    float *{self.output.name} = output;",
            *(line for step in steps for line in step),
            "}\n",
        ]
        return "\n".join(parts)


def _kernels(names: set[str]) -> str:
    text = files("rmprune").joinpath("c_kernels.c").read_text(encoding="utf-8")
    parts = dict(re.findall(r"//: (\w+)\n(.*?)(?=\n//: |\Z)", text, re.DOTALL))
    order = ["conv_t", "to_i8", "conv_f32", "conv_sum", "conv_i8", "conv_i8_f32"]
    return "\n".join(parts[name].rstrip() + "\n" for name in order if name in names)


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} " + " x ".join(map(str, tensor.shape[1:] or tensor.shape))


def _strides(shape: Sequence[int], among: Sequence[int] | None = None) -> list[int]:
    """Steps in memory along each axis; 0 where an axis is broadcast among others."""
    among = shape if among is None else among
    padded = (1,) * (len(among) - len(shape)) + tuple(shape)
    steps = [math.prod(padded[d + 1 :]) for d in range(len(padded))]
    return [0 if n == 1 else step for n, step in zip(padded, steps, strict=True)]


def _index(strides: Sequence[int]) -> str:
    terms = [f"i{d}" if s == 1 else f"i{d} * {s}" for d, s in enumerate(strides) if s]
    return " + ".join(terms) or "0"


def _loops(shape: Sequence[int], statement: str, rank: int) -> list[str]:
    """A statement for every element; axes of one element have no loop."""
    lines, depth = [], 1
    for d in range(rank):
        if shape[d] > 1:
            lines.append("    " * depth + f"for (int i{d} = 0; i{d} < {shape[d]}; ++i{d})")
            depth += 1
    fixed = [f"i{d}" for d in range(rank) if shape[d] == 1]
    for name in fixed:
        statement = re.sub(rf"\b{name}\b", "0", statement)
    return [*lines, "    " * depth + statement]
