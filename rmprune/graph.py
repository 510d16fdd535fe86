"""A residual network read as a chain: single layers, and blocks ``y = F(x) + S(x)``.

Everything here works on the ``torch.fx`` graph, never on model classes, so that networks
convert alike whoever wrote them. `parse` is the one reader of graphs; conversion, shortcut
BNs, masks and costs are walks over its result.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.composed import ComposedConv2d
from rmprune.errors import ConversionError, first_line

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class Subsample(nn.Module):
    """``x[:, :, ::stride, ::stride]``: the first half of the option-A shortcut."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``."""
        return x[:, :, :: self.stride, :: self.stride]


class PadChannels(nn.Module):
    """Zero channels in front and behind: the second half of the option-A shortcut."""

    def __init__(self, front: int, back: int) -> None:
        super().__init__()
        self.front, self.back = front, back

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, front + C + back, H, W)``."""
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))


@dataclass(frozen=True)
class Layer:
    """One node of the graph as a module that does the same.

    Attributes:
        node: The node; its ``target`` is the module's path where it is a module.
        name: The module's path, or the node's name where it was a function.
        module: The model's own module (not a copy), or a new one equal to the function.
    """

    node: fx.Node
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Block:
    """A residual block ``y = F(x) + S(x)``.

    Attributes:
        fork: The node that computes x, read by both paths.
        body: F, from x on; at least one convolution.
        shortcut: S, from x on; empty for an identity shortcut.
        add: The addition.
    """

    fork: fx.Node
    body: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]
    add: fx.Node

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        """The convolutions of F, in order."""
        return tuple(layer for layer in self.body if isinstance(layer.module, nn.Conv2d))


@dataclass(frozen=True)
class Chain:
    """A network as `parse` read it.

    Attributes:
        graph_module: The traced network; its modules are those of the items.
        items: Layers and blocks from input to output.
    """

    graph_module: fx.GraphModule
    items: tuple[Layer | Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks, in order."""
        return tuple(item for item in self.items if isinstance(item, Block))

    def layers(self) -> Iterator[Layer]:
        """Every layer: those between the blocks, and each block's body, then its shortcut."""
        for item in self.items:
            if isinstance(item, Layer):
                yield item
            else:
                yield from item.body
                yield from item.shortcut


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node, and its code is not looked into."""
        return isinstance(m, ComposedConv2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, copied: bool = True) -> fx.GraphModule:
    """Trace a model, which stays as it is.

    Args:
        model: The network.
        copied: Whether the result shall have parameters of its own.

    Raises:
        ConversionError: `torch.fx` cannot follow the model's Python code.
    """
    if copied:
        model = copy.deepcopy(model)
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # fx raises whatever the model's own code raises on proxies
        raise ConversionError(
            type(model).__name__,
            f"torch.fx cannot trace the model ({first_line(error)})",
            "forward() must not branch on the values or sizes of tensors",
        ) from error


def parse(graph_module: fx.GraphModule) -> Chain:
    """Read a traced network as a chain of layers and residual blocks.

    Raises:
        ConversionError: The network is no such chain, or uses an operation that is not
            known here; the error names the node.
    """
    starts = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if len(starts) != 1:
        raise ConversionError("forward", f"the model has {len(starts)} inputs", "it needs one")
    blocks = {
        block.fork: block
        for node in graph_module.graph.nodes
        if is_addition(node)
        for block in [_block(graph_module, node)]
    }
    items: list[Layer | Block] = []
    node = starts[0]
    while True:
        if node in blocks:
            items.append(blocks[node])
            node = blocks[node].add
            continue
        users = _data_users(node)
        if len(users) != 1:
            raise ConversionError(
                node.name,
                f"its output is read by {len(users)} nodes, and they do not meet in one addition",
                "only chains of blocks F(x) + S(x) can be converted",
            )
        node = users[0]
        if node.op == "output":
            return Chain(graph_module, tuple(items))
        items.append(as_layer(graph_module, node))


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two tensors of the graph."""
    return node.target in ADDITIONS and len(node.all_input_nodes) == 2


def _data_users(node: fx.Node) -> list[fx.Node]:
    """Readers of a tensor's values; ``x.size(0)`` reads only its shape."""
    return [user for user in node.users if not reads_shape(user)]


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape alone, or works with such values."""
    if node.target in ("size", "dim", getattr) and node.op != "call_module":
        return True
    passes_on = node.target in (operator.getitem, operator.eq, operator.floordiv, torch._assert)
    return passes_on and bool(node.all_input_nodes) and reads_shape(node.all_input_nodes[0])


def _source(node: fx.Node) -> fx.Node | None:
    """The one tensor that a node computes from, or None if there are several or none."""
    sources = [source for source in node.all_input_nodes if not reads_shape(source)]
    return sources[0] if len(sources) == 1 else None


def _path_back(node: fx.Node) -> list[fx.Node]:
    """The node, its source, the source's source, … up to an addition or the input."""
    path = [node]
    while (source := _source(path[-1])) is not None:
        path.append(source)
    return path


def _block(graph_module: fx.GraphModule, add: fx.Node) -> Block:
    left, right = (_path_back(operand) for operand in add.all_input_nodes)
    fork = next((node for node in left if node in right), None)
    if fork is None:
        raise ConversionError(
            add.name,
            "its operands do not come from one tensor through two chains of layers",
            "nested additions and concatenations are not supported",
        )
    paths = []
    for path in (left, right):
        nodes = path[: path.index(fork)][::-1]
        for node in nodes:
            if len(_data_users(node)) != 1:
                raise ConversionError(
                    node.name, "it lies inside a block but is read from outside of its path"
                )
        paths.append(tuple(as_layer(graph_module, node) for node in nodes))
    if len(_data_users(fork)) != 2:
        raise ConversionError(
            fork.name, f"{len(_data_users(fork))} nodes read a block's input; two are supported"
        )
    shortcut, body = sorted(paths, key=lambda path: (not is_pointwise_affine(path), _effort(path)))
    if not is_pointwise_affine(shortcut):
        raise ConversionError(
            add.name, "neither operand is a shortcut of 1×1 convolutions, BNs or subsampling"
        )
    if not any(isinstance(layer.module, nn.Conv2d) for layer in body):
        raise ConversionError(add.name, "neither operand of the addition has a convolution")
    return Block(fork, body, shortcut, add)


def is_pointwise_affine(layers: Sequence[Layer]) -> bool:
    """Whether the layers are together ``A x + c`` at every position that they keep."""
    return all(
        isinstance(layer.module, nn.BatchNorm2d | Subsample | PadChannels)
        or (isinstance(layer.module, nn.Conv2d) and _is_pointwise(layer.module))
        for layer in layers
    )


def _effort(layers: Sequence[Layer]) -> tuple[bool, int, int]:
    """Of two paths that could both be a shortcut, the one with less to compute is it.

    If there is a shortcut BN at its head, it was the shortcut before that was put there.
    """
    has_shortcut_bn = bool(layers) and isinstance(layers[0].module, nn.BatchNorm2d)
    convolutions = sum(isinstance(layer.module, nn.Conv2d) for layer in layers)
    return not has_shortcut_bn, convolutions, len(layers)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def is_identity(module: nn.Module) -> bool:
    """Whether a module does nothing in evaluation mode."""
    return isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)


def as_layer(graph_module: fx.GraphModule, node: fx.Node) -> Layer:
    """The module that does what a node does.

    Raises:
        ConversionError: The node's operation is not known.
    """
    name = str(node.target) if node.op == "call_module" else node.name
    module = as_module(graph_module, node)
    if module is None:
        raise ConversionError(
            node.name,
            f"the operation {getattr(node.target, '__name__', node.target)!r} is not supported",
            "write it as an nn.Module layer, or keep it out of the network",
        )
    return Layer(node, name, module)


def as_module(
    graph_module: fx.GraphModule, node: fx.Node, constants: Mapping[fx.Node, Any] | None = None
) -> nn.Module | None:
    """A module that does what a node does to one tensor, or None if it is not known.

    Args:
        graph_module: Whose node it is.
        node: A call of a module, a function or a method.
        constants: Values of the nodes that do not depend on the input.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return module.as_conv() if isinstance(module, ComposedConv2d) else module
    known = constants or {}

    def value(argument: Any) -> Any:
        return fx.map_arg(argument, lambda n: known.get(n, n))

    arguments = [value(a) for a in node.args[1:]]
    keywords = {k: value(v) for k, v in node.kwargs.items() if k not in ("inplace", "training")}
    plain = [a for a in arguments if not isinstance(a, fx.Node)]
    match node.target:
        case F.relu | torch.relu | torch.relu_ | "relu" | "relu_":
            return nn.ReLU()
        case F.relu6:
            return nn.ReLU6()
        case F.leaky_relu:
            return nn.LeakyReLU(*plain[:1], **keywords)
        case F.hardswish:
            return nn.Hardswish()
        case F.silu:
            return nn.SiLU()
        case F.gelu:
            return nn.GELU(*plain, **keywords)
        case F.hardsigmoid:
            return nn.Hardsigmoid()
        case F.sigmoid | torch.sigmoid | "sigmoid" | "sigmoid_":
            return nn.Sigmoid()
        case torch.tanh | F.tanh | "tanh":
            return nn.Tanh()
        case F.dropout | F.dropout2d | "contiguous" | "clone":
            return nn.Identity()
        case F.adaptive_avg_pool2d:
            return nn.AdaptiveAvgPool2d(*plain, **keywords)
        case F.avg_pool2d if plain or keywords:
            return nn.AvgPool2d(*plain, **keywords)
        case F.max_pool2d | torch.max_pool2d if plain or keywords:
            return nn.MaxPool2d(*plain, **keywords)
        case F.conv2d | F.linear | F.batch_norm if all(map(_is_value, (*arguments, *keywords))):
            return _as_weighted(node.target, arguments, keywords)
        case torch.mean | "mean":
            return _as_mean(*plain, **keywords)
        case torch.flatten | "flatten" if plain == [1] or keywords == {"start_dim": 1}:
            return nn.Flatten()
        case "view" | "reshape" if plain == [-1] and _is_batch_size(node.args[1]):
            return nn.Flatten()
        case operator.getitem:
            return _as_subsample(node.args[1])
        case F.pad:
            return _as_padding(plain, keywords)
        case _:
            return nn.Identity() if _returns_its_input(node) else None


def _is_value(argument: Any) -> bool:
    return not isinstance(argument, fx.Node)


def _as_weighted(function: Any, arguments: Any, keywords: dict[str, Any]) -> nn.Module:
    """A layer with the weights that a function was called with."""
    signature = {
        F.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
        F.linear: ("weight", "bias"),
        F.batch_norm: (
            *("running_mean", "running_var", "weight", "bias"),
            *("training", "momentum", "eps"),
        ),
    }[function]
    given = {**dict(zip(signature, arguments, strict=False)), **keywords}
    weight: Any = given.get("weight")
    bias: Any = given.get("bias")
    layer: nn.Module
    if function is F.conv2d:
        outputs, inputs, *size = weight.shape
        inputs *= given.get("groups", 1)
        options = {k: given[k] for k in signature[2:] if k in given}
        layer = nn.Conv2d(inputs, outputs, tuple(size), device="meta", **options)
    elif function is F.linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    else:
        mean, var = given["running_mean"], given["running_var"]
        layer = nn.BatchNorm2d(len(mean), given.get("eps", 1e-5), device=mean.device)
        layer.running_mean, layer.running_var = mean, var
    layer.register_parameter("weight", None if weight is None else nn.Parameter(weight.detach()))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return layer.eval()


class GlobalMean(nn.AdaptiveAvgPool2d):
    """``(N, C, H, W)`` to ``(N, C)``: the mean over all positions, which drops the axes."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return super().forward(x).flatten(1)


def _as_mean(dim: Any = (), keepdim: bool = False) -> nn.Module | None:
    dims = {d % 4 for d in (dim if isinstance(dim, tuple | list) else (dim,))}
    if dims != {2, 3}:
        return None
    return nn.AdaptiveAvgPool2d(1) if keepdim else GlobalMean()


def _returns_its_input(node: fx.Node) -> bool:
    """Whether a function of one tensor and numbers is switched off, as stochastic depth is
    in evaluation mode: it then returns the very tensor that it was given."""
    if node.op != "call_function" or not callable(node.target) or len(node.all_input_nodes) != 1:
        return False
    x = torch.zeros(2, 4, 4, 4)
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: x)
        return node.target(*args, **kwargs) is x
    except Exception:  # whatever a stranger's function raises for such a tensor
        return False


def _is_batch_size(node: Any) -> bool:
    """Whether an argument is ``x.size(0)`` or ``x.shape[0]``."""
    if not isinstance(node, fx.Node):
        return False
    if node.target == "size":
        return node.args[1:] == (0,)
    return node.target is operator.getitem and node.args[1:] == (0,)


def _as_subsample(index: Any) -> nn.Module | None:
    if not isinstance(index, tuple) or len(index) != 4 or not isinstance(index[3], slice):
        return None
    step = index[3].step
    every = slice(None, None, step)
    return Subsample(step or 1) if index == (slice(None), slice(None), every, every) else None


def _as_padding(arguments: list[Any], keywords: dict[str, Any]) -> nn.Module | None:
    amounts, *rest = [*arguments, *keywords.values()]
    zeros = all(value in ("constant", 0, 0.0, None) for value in rest)
    if zeros and len(amounts) == 4:
        return nn.ZeroPad2d(tuple(amounts))
    if zeros and len(amounts) == 6 and tuple(amounts[:4]) == (0, 0, 0, 0):
        return PadChannels(amounts[4], amounts[5])
    return None
