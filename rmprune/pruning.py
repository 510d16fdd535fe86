"""Selecting channels of a run's model, by a threshold or within a budget; see `rmprune.targets`."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from rmprune.blocks import has_slim_form, inner_bns
from rmprune.budgets import layer_costs, ratio_to_original, smallest_within_drop
from rmprune.checkpoints import (
    Checkpoint,
    Scope,
    SlimConfig,
    Task,
    calibration_batches,
    deploy,
    pick_device,
    run_calibration,
)
from rmprune.composed import squeezed
from rmprune.convert import convert
from rmprune.costs import Cost, LayerCosts, body_savings, channel_savings, relative
from rmprune.data import Dataset, hold_out
from rmprune.errors import PruningError, UsageError
from rmprune.graph import parse
from rmprune.greedy import by_loss, spare
from rmprune.importance import Importance, by_group_norm, by_scale
from rmprune.lowering import Choose, Form, likeliest
from rmprune.narrowing import cut, move_statistics, narrow, widen
from rmprune.plain_pruning import plain_pruned
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import scales_of
from rmprune.store import load_tensors, save, save_tensors
from rmprune.targets import TOLERANCE, Target, search, thresholds_of

IMPORTANCE_BATCHES = 2  # of 256 images
NOTHING: Mapping[str, int] = {}
DETOURS = 2  # around steps that pass a target by far


def channel_weights(
    slim: nn.Module, cost: Cost, task: Task, config: SlimConfig, folder: Path
) -> dict[str, float]:
    """What a channel of each BN saves, relative to the mean channel; 0 out of scope.

    A latency table is measured once and kept in the folder. In a network that is no chain of
    residual blocks several BNs may feed one channel of the plain net: all weigh 1.
    """
    if not has_slim_form(slim):
        if config.scope == "inner":
            raise UsageError(f"{config.model} has no residual blocks with channels inside")
        return dict.fromkeys(scales_of(slim), 1.0)
    assert isinstance(slim, fx.GraphModule)
    return _within(config.scope, slim, _all_weights(slim, cost, task, config, folder))


def _within(scope: Scope, slim: fx.GraphModule, savings: Mapping[str, float]) -> dict[str, float]:
    """Savings of all BNs, those out of scope 0."""
    within = savings.keys() if scope == "all" else inner_bns(parse(slim))
    return {name: savings[name] if name in within else 0.0 for name in savings}


def _all_weights(
    slim: fx.GraphModule, cost: Cost, task: Task, config: SlimConfig, folder: Path
) -> dict[str, float]:
    channels = {name: len(scale) for name, scale in scales_of(slim).items()}
    if cost == "uniform":
        return dict.fromkeys(channels, 1.0)
    slim = copy.deepcopy(slim).cpu().eval()
    costs = _layer_costs(slim, cost, task, config, folder)
    savings = channel_savings(slim, task.example_input(), costs, config.lowering)
    return relative(savings, channels)


def _layer_costs(
    slim: fx.GraphModule, cost: Cost, task: Task, config: SlimConfig, folder: Path
) -> LayerCosts:
    def network() -> nn.Module:
        auto = config.lowering == "auto"
        return squeezed(slim) if auto else convert(slim, task.example_input())

    return layer_costs(cost, network, task, config, folder)


def prune(
    checkpoint: Checkpoint,
    config: SlimConfig,
    folder: Path,
    data: Dataset,
    choose: Choose | None = None,
    kept: Path | None = None,
) -> Checkpoint:
    """Select channels and switch them off; save the masked model and its net.

    Args:
        checkpoint: A slimmable model after training, or a plain net.
        config: Its ``threshold``, or its ``target``, says how many go.
        folder: To write to.
        data: For the statistics of BNs, and whose held-out images a target of accuracy is for.
        choose: See `deploy`.
        kept: Where latency tables and scores stand that do not depend on how much is to go, for
            all prunings of the checkpoint; by default the folder.

    Raises:
        UsageError: No images were held out for a target of accuracy.
        PruningError: The target cannot be met.
    """
    slim, kept = checkpoint.build(), kept or folder
    if not isinstance(slim, fx.GraphModule):
        return _delivered(plain_pruned(slim, checkpoint, config, kept, data), folder, choose)
    target = None if config.target is None else Target.parse(config.target)
    if target is None:
        check_importance(config.importance)
        masks = select(
            slim,
            config.threshold,
            scores=by_scale(slim, channel_weights(slim, "uniform", checkpoint.task, config, kept)),
            lowering=config.lowering,
            round_to=config.round_to,
        )
        masked = _switched_off(slim, checkpoint, masks, config)
    else:
        masked = _masked_within(target, slim, checkpoint, config, kept, data, choose)
    masked = _with_statistics(masked, checkpoint, run_calibration(config, data))
    return _delivered(masked, folder, choose)


def _delivered(masked: Checkpoint, folder: Path, choose: Choose | None) -> Checkpoint:
    """The checkpoint with the forms of its net, both saved."""
    net = deploy(masked, choose)
    masked = replace(masked, forms=net.info.get("lowering"))
    masked.save(folder / "masked.pt")
    save(net, folder / "pruned.safetensors")
    return masked


def check_importance(importance: Importance) -> None:
    """Refuse to compare anything but scales with a threshold."""
    if importance != "scale":
        raise UsageError(
            f"a threshold is on scales; to prune by --importance {importance}, name a --target"
        )


def _switched_off(
    slim: fx.GraphModule, checkpoint: Checkpoint, masks: Masks, config: SlimConfig
) -> Checkpoint:
    """The masked and narrowed model, whose BN statistics are still those of before."""
    if checkpoint.masks is not None:
        masks = masks.within(checkpoint.masks)
    masked = copy.deepcopy(slim)
    apply_masks(masked, masks)
    left = narrow(masked, masks)
    gone = masks if checkpoint.narrowed is None else widen(masks, checkpoint.narrowed)
    return Checkpoint("masked", config, checkpoint.task, masked.state_dict(), left, gone)


def _with_statistics(
    masked: Checkpoint, checkpoint: Checkpoint, calibration: list[Tensor]
) -> Checkpoint:
    """The masked model with the BN statistics that it has now, for those of a checkpoint."""
    assert masked.narrowed is not None
    slim, model = checkpoint.build(), masked.build()
    assert isinstance(slim, fx.GraphModule)
    assert isinstance(model, fx.GraphModule)
    masks = masked.narrowed
    if checkpoint.narrowed is not None:
        masks = cut(masks, slim, checkpoint.narrowed)
    move_statistics(model, slim, masks, calibration)
    return replace(masked, model=model.state_dict())


def _masked_within(
    target: Target,
    slim: fx.GraphModule,
    checkpoint: Checkpoint,
    config: SlimConfig,
    kept: Path,
    data: Dataset,
    choose: Choose | None,
) -> Checkpoint:
    """The masked model that keeps the most channels within a target."""
    cost: Cost = target.kind if target.kind != "accuracy-drop" else config.cost
    if config.importance == "loss":
        scores = _loss_scores(slim, cost, checkpoint.task, config, data, kept)
    elif config.importance == "group-norm":
        within = _within(config.scope, slim, dict.fromkeys(scales_of(slim), 1.0))
        scores = {
            name: score if within[name] else torch.full_like(score, math.inf)
            for name, score in by_group_norm(slim, config.round_to).items()
        }
    else:
        scores = by_scale(slim, channel_weights(slim, cost, checkpoint.task, config, kept))
    thresholds = thresholds_of(scores)

    def masked(threshold: float, spared: Mapping[str, int] = NOTHING) -> Checkpoint:
        left = scores
        if config.importance == "loss":  # one channel of a body that was to go is worth nothing
            left = spare(scores, slim, spared, config.round_to)
        masks = select(
            slim,
            threshold,
            scores=left,
            lowering=config.lowering,
            round_to=config.round_to,
            spared=spared,
        )
        return _switched_off(slim, checkpoint, masks, config)

    if target.kind == "accuracy-drop":
        calibration = run_calibration(config, data)
        return smallest_within_drop(
            target.value / 100,
            masked,
            lambda found: _with_statistics(found, checkpoint, calibration),
            thresholds,
            config,
            data,
        )
    of_original = ratio_to_original(target.kind, replace(checkpoint, config=config))
    return _largest_within_budget(target, masked, thresholds, config, choose, of_original)


def _loss_scores(
    slim: fx.GraphModule, cost: Cost, task: Task, config: SlimConfig, data: Dataset, kept: Path
) -> dict[str, Tensor]:
    """Scores of `by_loss`: the search takes minutes, so they are kept by what they depend on."""
    example, costs = task.example_input(), _layer_costs(slim, cost, task, config, kept)
    savings = _within(config.scope, slim, channel_savings(slim, example, costs, config.lowering))
    bodies = body_savings(slim, example, costs, config.lowering)
    images = (data.train.digest(), config.holdout)
    settings = (savings, bodies, config.lowering, config.round_to, *images)
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in slim.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    path = kept / f"scores-{digest.hexdigest()[:16]}.safetensors"
    if not path.exists():
        device = pick_device(config.device)
        model = squeezed(copy.deepcopy(slim)).to(device)
        assert isinstance(model, fx.GraphModule)
        scores = by_loss(
            model,
            savings,
            bodies,
            calibration_batches(hold_out(data, config.holdout)[0], device)[:IMPORTANCE_BATCHES],
            lowering=config.lowering,
            round_to=config.round_to,
        )
        save_tensors(scores, path)
    return load_tensors(path)


class _Masked(Protocol):
    def __call__(self, threshold: float, spared: Mapping[str, int] = NOTHING) -> Checkpoint:
        """The model with the channels under a threshold switched off."""


def _largest_within_budget(
    target: Target,
    masked: _Masked,
    thresholds: list[float],
    config: SlimConfig,
    choose: Choose | None,
    of_original: Callable[[nn.Module], float],
) -> Checkpoint:
    """Search for the threshold; then name the forms chosen, whose cost is another, and again."""

    def ratio(checkpoint: Checkpoint) -> float:
        return of_original(deploy(checkpoint, likeliest))

    def within(forms: dict[str, Form] | None) -> Checkpoint:
        def search_with(spared: Mapping[str, int]) -> tuple[Checkpoint, Checkpoint | None]:
            return search(
                thresholds,
                lambda threshold: replace(masked(threshold, spared), forms=forms),
                ratio,
                target.value,
                TOLERANCE[target.kind],
            )

        found, above = latest, _ = search_with(NOTHING)
        spared: Counter[str] = Counter()
        for _ in range(DETOURS):
            if above is None:
                break
            # One step more passes the target by far: go without it, and take others instead.
            spared.update(_changed(latest, above, config.importance))
            try:
                latest, above = search_with(spared)
            except PruningError:
                break
            found = max(found, latest, key=ratio)
        return found

    checkpoint = within(None)
    if config.lowering == "plain":
        return checkpoint
    if choose is not likeliest:
        checkpoint = replace(checkpoint, forms=deploy(checkpoint, choose).info["lowering"])
        least = target.value * (1 - TOLERANCE[target.kind])
        if not least <= ratio(checkpoint) <= target.value:
            checkpoint = within(checkpoint.forms)
    return replace(checkpoint, forms=deploy(checkpoint, likeliest).info["lowering"])


def _changed(found: Checkpoint, above: Checkpoint, importance: Importance) -> set[str]:
    """The BNs that lose channels by a step; by scales, all that have channels before it."""
    assert found.narrowed is not None
    assert above.narrowed is not None
    before, after = above.narrowed.keep, found.narrowed.keep
    if importance == "loss":
        return {name for name, mask in before.items() if not torch.equal(mask, after[name])}
    return {name for name, mask in before.items() if mask.any()}
