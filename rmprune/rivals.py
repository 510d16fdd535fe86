"""What rmprune is compared with: Torch-Pruning's pruners on the same residual network.

Sparse training and pruning are done as Torch-Pruning's documentation and benchmarks do them
(``pruner.update_regularizer()``, ``pruner.regularize(model)`` after ``backward``; global
pruning in small steps until the budget is met; Fang et al., CVPR 2023). Training, data,
distillation and measurements are the same code as rmprune's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from rmprune.blocks import has_slim_form
from rmprune.errors import PruningError
from rmprune.graph import PadChannels, Subsample, parse, trace
from rmprune.layers import is_depthwise
from rmprune.norms import fold_shortcut

Rival = Literal["torch-pruning:bn-scale", "torch-pruning:group-norm"]
STEPS = 200  # of which each removes an equal share of all channels


def with_convolved_shortcuts(model: nn.Module) -> fx.GraphModule:
    """An equal model whose option-A shortcuts are 1×1 convolutions with stride.

    Torch-Pruning 1.6.1 does not track channels through zero padding: after a step on such a
    network its linear layer is too narrow. The convolutions' weights are learnable.

    Args:
        model: In evaluation mode; left as it is.
    """
    traced = trace(model).eval()
    blocks = parse(traced).blocks if has_slim_form(traced) else ()
    for number, block in enumerate(blocks):
        modules = [layer.module for layer in block.shortcut]
        if not any(isinstance(module, PadChannels | Subsample) for module in modules):
            continue
        like = block.convolutions[0].module.weight
        assert isinstance(like, Tensor)
        shortcut = fold_shortcut(modules, like.shape[1], like)
        conv = nn.Conv2d(
            shortcut.weight.shape[1], len(shortcut.weight), 1, shortcut.stride, bias=False
        )
        conv.weight = nn.Parameter(shortcut.weight[:, :, None, None].clone())
        if shortcut.bias.any():
            conv.bias = nn.Parameter(shortcut.bias.clone())
        name = f"shortcut_conv{number}"
        traced.add_submodule(name, conv)
        with traced.graph.inserting_after(block.fork):
            node = traced.graph.call_module(name, (block.fork,))
        block.add.replace_input_with(block.shortcut[-1].node, node)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


class RivalPenalty:
    """The regularisation of a Torch-Pruning pruner, as `rmprune.training.fit` calls it."""

    def __init__(self, model: nn.Module, example_input: Tensor, rival: Rival, reg: float) -> None:
        self._model = model
        self._reg = reg
        self._pruner = make_pruner(model, example_input, rival)
        self._pruner.update_regularizer()

    def add_to_gradients(self, share: float = 1.0) -> None:
        """Add the pull of this step."""
        self._pruner.reg = share * self._reg
        self._pruner.regularize(self._model)


def make_pruner(
    model: nn.Module, example_input: Tensor, rival: Rival, round_to: int = 1
) -> tp.BNScalePruner | tp.GroupNormPruner:
    """A pruner as Torch-Pruning's benchmarks make it, with global pruning."""
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear)]
    options = {
        "global_pruning": True,
        "pruning_ratio": 1.0,
        "iterative_steps": STEPS,
        "round_to": round_to if round_to > 1 else None,
        "ignored_layers": outputs[-1:],
    }
    if rival == "torch-pruning:bn-scale":
        return tp.BNScalePruner(model, example_input, tp.importance.BNScaleImportance(), **options)
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    return tp.GroupNormPruner(model, example_input, importance, **options)


def prune_until(
    model: nn.Module,
    example_input: Tensor,
    rival: Rival,
    enough: Callable[[nn.Module], bool],
    round_to: int = 1,
) -> nn.Module:
    """Remove channels step by step until it is enough.

    Args:
        model: A trained residual network without option-A shortcuts; left as it is.
        example_input: ``(N, C, H, W)``.
        rival: Which pruner.
        enough: Looks at the model after every step.
        round_to: Widths become multiples of this, as Torch-Pruning does it.

    Raises:
        PruningError: The pruner removes all that it can, and it is not enough.
    """
    smaller = copy.deepcopy(model).eval()
    pruner = make_pruner(smaller, example_input, rival, round_to)
    while not enough(smaller):
        if pruner.current_step >= STEPS:
            raise PruningError(f"{rival} cannot make the network that small")
        for parameter in smaller.parameters():
            parameter.requires_grad_(True)
        pruner.step()
    with torch.no_grad():
        smaller(example_input)  # a removal that went wrong must not pass as a result
    return smaller


def least_importance(model: nn.Module, example_input: Tensor, rival: Rival) -> float:
    """The importance of the channel group that the pruner would remove next."""
    pruner = make_pruner(model, example_input, rival)
    groups = pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    )
    return min(float(pruner.estimate_importance(group).min()) for group in groups)


def load_pruned(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a network the weights of a narrower one of the same layers.

    Args:
        model: Of the full widths; changed in place.
        state: The narrower network's state dict.
    """
    for name, module in model.named_modules():
        depthwise = isinstance(module, nn.Conv2d) and is_depthwise(module)
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                setattr(module, kind, nn.Parameter(state[f"{name}.{kind}"]))
        if isinstance(module, nn.Conv2d):
            module.out_channels, per_group = module.weight.shape[:2]
            if depthwise:
                module.groups = module.out_channels
            module.in_channels = per_group * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
            for kind in ("running_mean", "running_var"):
                setattr(module, kind, state[f"{name}.{kind}"])
    model.load_state_dict(state)
    return model.eval()
