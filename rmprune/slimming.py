"""Sparsity training: BNs on the shortcuts, and the L1 penalty on channel scales.

Network slimming (Liu et al. 2017, section 3) adds ``λ Σ |γ|`` to the loss; RMNet (arXiv
2111.00687, section 4.2) gives the shortcuts a BN too, so that the channels that a block
reserves have scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, fx, nn

from rmprune.blocks import channel_guards
from rmprune.convert import convert
from rmprune.errors import UsageError
from rmprune.graph import Block, Chain, parse, trace
from rmprune.measure import layer_macs
from rmprune.norms import Moments

Cost = Literal["macs", "uniform"]


def add_shortcut_bn(model: nn.Module, calibration_batches: Iterable[Tensor] = ()) -> fx.GraphModule:
    """Put a BN at the head of every shortcut: the slimmable model.

    The BN reads the block's input x, so that its channels are those that conversion will
    reserve, whatever the shortcut does to them afterwards. Its statistics are those of the
    calibration batches, with γ = √(σ² + ε) and β = μ: in evaluation mode the model computes
    what it did before, to rounding.

    Args:
        model: A residual network; left as it is.
        calibration_batches: Normalised images, ``(N, C, H, W)`` each, on the model's
            device. Without them mean 0 and variance 1 are put in: enough for loading the
            weights of a slimmable model into the result, not for training it.

    Returns:
        The slimmable model in evaluation mode; the new BNs are named ``….shortcut_bn``.

    Raises:
        ConversionError: The model is no chain of residual blocks.
    """
    slim = trace(model).eval()
    blocks = {_insert_identity(slim, block): block for block in parse(slim).blocks}
    slim.recompile()
    moments = {name: Moments(_kernel(block).shape[1]) for name, block in blocks.items()}
    with ExitStack() as stack:
        for name, record in moments.items():
            hook = slim.get_submodule(name).register_forward_pre_hook(_recorder(record))
            stack.callback(hook.remove)
        with torch.no_grad():
            for batch in calibration_batches:
                slim(batch)
    for name, block in blocks.items():
        slim.set_submodule(name, moments[name].identity_bn().to(_kernel(block)))
    return slim


def _kernel(block: Block) -> Tensor:
    """The weight ``(out, in, k, k)`` of a block's first convolution."""
    weight = block.convolutions[0].module.weight
    assert isinstance(weight, Tensor)
    return weight


def _recorder(moments: Moments) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def record(_: nn.Module, arguments: tuple[Tensor]) -> None:
        moments.add(arguments[0])

    return record


def _insert_identity(slim: fx.GraphModule, block: Block) -> str:
    """Put an identity at the head of a block's shortcut; return its name."""
    scope = block.convolutions[-1].name.rpartition(".")[0]
    name = f"{scope}.shortcut_bn" if scope else f"{block.add.name}_shortcut_bn"
    taken = {path for path, _ in slim.named_modules()}
    while name in taken:
        name += "_"
    slim.add_submodule(name, nn.Identity())
    with slim.graph.inserting_after(block.fork):
        head = slim.graph.call_module(name, (block.fork,))
    reader = block.shortcut[0].node if block.shortcut else block.add
    reader.replace_input_with(block.fork, head)
    return name


def scale_parameters(slim: nn.Module) -> dict[str, nn.Parameter]:
    """The γ of every BN, by the BN's path: what the penalty pulls to zero."""
    return {
        name: module.weight
        for name, module in slim.named_modules()
        if isinstance(module, nn.BatchNorm2d) and isinstance(module.weight, nn.Parameter)
    }


def penalty_weights(slim: fx.GraphModule, example_input: Tensor, cost: Cost) -> dict[str, float]:
    """How strongly each BN's scales are penalised, relative to the mean channel.

    Args:
        slim: A slimmable model.
        example_input: ``(N, C, H, W)``; its size decides the MACs.
        cost: ``"macs"``: by the MACs that removing a channel saves in the plain net (its
            row in one convolution and its column in the next); ``"uniform"``: all alike.

    Returns:
        Path of a BN to its weight; the mean over all channels is 1.
    """
    scales = scale_parameters(slim)
    if cost == "uniform":
        return dict.fromkeys(scales, 1.0)
    if cost != "macs":
        raise UsageError(f"unknown cost {cost!r}; known: macs, uniform")
    was_training = slim.training
    slim.eval()
    savings = _saved_macs(parse(slim), slim, example_input)
    slim.train(was_training)
    channels = sum(len(scales[name]) for name in savings)
    mean = sum(saving * len(scales[name]) for name, saving in savings.items()) / channels
    return {name: savings.get(name, mean) / mean for name in scales}


def _saved_macs(chain: Chain, slim: nn.Module, example_input: Tensor) -> dict[str, float]:
    """MACs of the plain net that one channel of each BN stands for."""
    plain = convert(slim, example_input[:1])
    assert plain.input_shape is not None
    macs = layer_macs(plain, plain.input_shape)
    weighted = [
        (name, module)
        for name, module in plain.named_children()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    saved: dict[str, float] = {}
    guards = {name.replace(".", "_"): bns for name, bns in channel_guards(chain).items()}
    for (name, module), (next_name, _) in pairwise(weighted):
        channels = len(module.weight)
        for bn in guards.get(name, ()):
            saved[bn] = (macs[name] + macs[next_name]) / channels
    return saved


class Penalty:
    """The subgradient of ``Σ λ_c |γ_c|``, added to gradients after ``backward``.

    Args:
        scales: γ of every BN, by path.
        sparsity: λ of the mean channel, not negative.
        weights: Factor for each BN, by path; see `penalty_weights`.
    """

    def __init__(
        self, scales: Mapping[str, nn.Parameter], sparsity: float, weights: Mapping[str, float]
    ) -> None:
        self._scales: list[Tensor] = list(scales.values())
        self._strengths = [sparsity * weights[name] for name in scales]

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """``g += λ sign(γ)`` for all BNs at once; gradients must not be scaled."""
        pulls = list(torch._foreach_sign(self._scales))
        torch._foreach_mul_(pulls, self._strengths)
        gradients = [scale.grad for scale in self._scales if scale.grad is not None]
        assert len(gradients) == len(pulls)
        torch._foreach_add_(gradients, pulls)
