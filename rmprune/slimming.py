"""Sparsity training: BNs on the shortcuts, and the L1 penalty on channel scales.

Network slimming (Liu et al. 2017, section 3) adds ``λ Σ |γ|`` to the loss; RMNet (arXiv
2111.00687, section 4.2) gives the shortcuts a BN too, so that the channels that a block
reserves have scales of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, fx, nn

from rmprune.blocks import has_slim_form
from rmprune.graph import Block, parse, trace
from rmprune.norms import Moments


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


def slimmable(model: nn.Module, calibration_batches: Iterable[Tensor] = ()) -> nn.Module:
    """What is trained for sparsity: the slimmable model, see `add_shortcut_bn`.

    Of a network that is no chain of residual blocks it is a copy of the network as it is, in
    evaluation mode: its own BNs have the scales.
    """
    if has_slim_form(model):
        return add_shortcut_bn(model, calibration_batches)
    return copy.deepcopy(model).eval()


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


def scales_of(slim: nn.Module) -> dict[str, Tensor]:
    """``|γ|`` of every BN, by the BN's path; 0 where masks hold a channel off."""
    return {
        name: module.weight.detach().abs()
        for name, module in slim.named_modules()
        if isinstance(module, nn.BatchNorm2d) and isinstance(module.weight, Tensor)
    }


class Penalty:
    """The subgradient of ``Σ λ_c |γ_c|``, added to gradients after ``backward``.

    Args:
        scales: γ of every BN, by path.
        sparsity: λ of the mean channel, not negative.
        weights: Factor for each BN, by path; see `rmprune.costs.relative`.
    """

    def __init__(
        self, scales: Mapping[str, nn.Parameter], sparsity: float, weights: Mapping[str, float]
    ) -> None:
        self._scales: list[Tensor] = list(scales.values())
        self._strengths = [sparsity * weights[name] for name in scales]

    @torch.no_grad()
    def add_to_gradients(self, share: float = 1.0) -> None:
        """``g += share · λ sign(γ)`` for all BNs at once; gradients must not be scaled."""
        pulls = list(torch._foreach_sign(self._scales))
        torch._foreach_mul_(pulls, [share * strength for strength in self._strengths])
        gradients = [scale.grad for scale in self._scales if scale.grad is not None]
        assert len(gradients) == len(pulls)
        torch._foreach_add_(gradients, pulls)
