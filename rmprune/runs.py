"""Runs: the stages of slimming, each reading from a folder what the one before wrote there.

    train     sparse.pt          slimmable model after sparsity training
    prune     masked.pt          the same with its masks, channels switched off
              pruned.safetensors the net of it, not fine-tuned
    finetune  finetuned.pt       the masked model, fine-tuned while still residual
              net.safetensors    the net of it: the result

Beside them stand ``config.json`` and ``metrics.csv`` (one row an epoch). A checkpoint tells
all that is needed to build its model again, so that every stage can be run by itself.

Of several processes (see `rmprune.processes`) the first one alone reads, selects and writes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from rmprune.blocks import has_slim_form
from rmprune.checkpoints import (
    LATER,
    Checkpoint,
    SlimConfig,
    Task,
    deploy,
    pick_device,
    run_calibration,
    trained_model,
)
from rmprune.convert import convert
from rmprune.data import Dataset, hold_out
from rmprune.equalization import equalize
from rmprune.errors import UsageError
from rmprune.logs import as_table, opened
from rmprune.lowering import Choose, likeliest
from rmprune.plain_pruning import check_by_scale
from rmprune.plots import plot_run
from rmprune.processes import agreed, is_first
from rmprune.progress import Track, no_progress
from rmprune.pruning import channel_weights, prune
from rmprune.reports import compare, environment
from rmprune.rewrite import calibrate_bn, collapse, fold_bn
from rmprune.slimming import Penalty, scale_parameters, scales_of, slimmable
from rmprune.store import load, save, write_csv, write_json
from rmprune.targets import Target
from rmprune.training import EpochResult, Pull, TrainingConfig, fit

PLAIN_LR = 5e-4  # at 5e-3 a pruned net of 99.7 % on the digits falls to 61 % in two epochs


def train(
    folder: Path, config: SlimConfig, data: Dataset, track: Track = no_progress
) -> Checkpoint:
    """Train for sparsity, going on where the folder's ``sparse.pt`` stands."""
    device = pick_device(config.device)
    path = folder / "sparse.pt"

    def begin() -> Checkpoint:
        if path.exists():
            asked = Checkpoint("sparse", config, Task.of(data), {})
            return asked.resumed(path, but=LATER)
        write_json(dataclasses.asdict(config), folder / "config.json")
        torch.manual_seed(config.seed)
        model = trained_model(config, len(data.classes)).to(device)
        task = Task.of(data)
        if not has_slim_form(model):  # what cannot be pruned shall be refused before training
            check_by_scale(config)
            convert(model.eval(), task.example_input(device))
        slim = slimmable(model, run_calibration(config, data, device)).cpu()
        return Checkpoint("sparse", config, task, slim.state_dict())

    checkpoint = agreed(begin)
    slim = checkpoint.build(device)
    weights = agreed(lambda: channel_weights(slim, config.cost, checkpoint.task, config, folder))
    penalty = Penalty(scale_parameters(slim), config.sparsity, weights)
    return fit_kept(slim, checkpoint, config.training(), data, path, device, track, penalty)


def prune_and_finetune(
    folder: Path,
    sparse: Checkpoint,
    config: SlimConfig,
    data: Dataset,
    track: Track = no_progress,
    kept: Path | None = None,
    lessons: Path | None = None,
) -> Checkpoint:
    """Select, switch off and fine-tune, in ``prune_steps`` steps; save the net.

    Each step but the last has a folder of its own, a target on the way (shares of cost fall
    by the same factor each time), and its part of the fine-tuning epochs. For ``kept`` see
    `rmprune.pruning.prune`, for ``lessons`` `fit_kept`.
    """
    steps, latest = config.prune_steps, sparse
    for step in range(1, steps + 1):
        here, on_the_way = folder, config
        if step < steps:
            assert config.target is not None
            target = Target.parse(config.target).after(step / steps)
            here, on_the_way = folder / f"step-{step}", replace(config, target=str(target))
        epochs = (
            config.finetune_epochs * step // steps - config.finetune_epochs * (step - 1) // steps
        )
        on_the_way = replace(on_the_way, finetune_epochs=epochs)
        # On the way nothing is delivered, so that forms need not be measured.
        choose = None if step == steps else likeliest
        select = partial(
            _pruned, latest, on_the_way, here, data, choose, kept if step == 1 else None
        )
        latest = finetune(here, agreed(select), on_the_way, data, track, lessons)
    return latest


def _pruned(
    latest: Checkpoint,
    config: SlimConfig,
    folder: Path,
    data: Dataset,
    choose: Choose | None,
    kept: Path | None,
) -> Checkpoint:
    """The masked model that a folder's fine-tuning began with, or a new one."""
    if (folder / "finetuned.pt").exists():
        return Checkpoint.load(folder / "masked.pt")  # a latency is never measured twice alike
    return prune(latest, config, folder, data, choose, kept)


def finetune(
    folder: Path,
    masked: Checkpoint,
    config: SlimConfig,
    data: Dataset,
    track: Track = no_progress,
    lessons: Path | None = None,
) -> Checkpoint:
    """Fine-tune under the masks, going on where ``finetuned.pt`` stands; save the net.

    What is fine-tuned already is fine-tuned anew from its weights on, for a folder of its own.
    """
    device = pick_device(config.device)
    path = folder / "finetuned.pt"
    if masked.stage not in ("masked", "finetuned"):
        raise UsageError(
            f"this checkpoint is {masked.stage}, and what is fine-tuned is the masked.pt that "
            "`rmprune prune` wrote"
        )
    weights = {name: getattr(masked, name) for name in ("model", "masks", "narrowed", "layers")}
    new = Checkpoint("finetuned", config, masked.task, **weights, forms=masked.forms)
    checkpoint = agreed(lambda: new.resumed(path))
    slim = checkpoint.build(device)
    checkpoint = fit_kept(
        slim, checkpoint, config.finetuning(), data, path, device, track, lessons=lessons
    )
    if is_first():
        save(deploy(checkpoint), folder / "net.safetensors")
    return checkpoint


def plain_paths(folder: Path, source: Path) -> tuple[Path, Path]:
    """Where `finetune_plain` keeps its checkpoint, and where it saves the net."""
    return folder / f"{source.stem}-plain.pt", folder / f"{source.stem}-finetuned.safetensors"


def finetune_plain(
    folder: Path, source: Path, config: SlimConfig, data: Dataset, track: Track = no_progress
) -> Checkpoint:
    """Fine-tune a saved net with all weights free, going on where its checkpoint stands.

    Channels are brought to one range first, and behind each convolution trains a BN of its own,
    which is folded again at the end.
    """
    device = pick_device(config.device)
    path, result = plain_paths(folder, source)
    images = run_calibration(config, data, device)
    # Channels of very different sizes would want learning rates of their own.
    net = calibrate_bn(equalize(fold_bn(load(source).to(device)), images), images)
    new = Checkpoint("plain", config, Task.of(data), net.state_dict())
    checkpoint = agreed(lambda: new.resumed(path))
    net.load_state_dict(checkpoint.model)
    checkpoint = fit_kept(net, checkpoint, config.finetuning(), data, path, device, track)
    if is_first():
        save(collapse(net).cpu(), result)
    return checkpoint


def report(
    folder: Path,
    sparse: Checkpoint,
    finetuned: Checkpoint,
    data: Dataset,
    track: Track = no_progress,
) -> pd.DataFrame:
    """Measure the model at the begin, after both trainings, and pruned; write table and picture."""
    config = sparse.config
    torch.manual_seed(config.seed)  # as `train` does, whose random weights these are
    net = load(folder / "net.safetensors")
    original = trained_model(config, len(data.classes)).eval()
    before, after = "residual", "residual, fine-tuned under masks"
    if finetuned.layers is not None:  # of a network that is no chain of residual blocks
        before, after = "training form", "plain, fine-tuned"
    models = {
        f"{before}, untrained" if config.weights is None else f"{before}, as given": original,
        f"{before}, after sparsity training": sparse.build(),
        after: finetuned.build(),
        "plain, pruned" if net.is_plain else "pruned": net,
    }
    example = finetuned.task.example_input()
    table = compare(models, example, data, platform=config.platform, track=track)
    write_csv(table.assign(**environment(config.platform)), folder / "report.csv")
    plot_run(as_table([*sparse.history, *finetuned.history]), net, folder / "run.png")
    return table


def fit_kept(
    model: nn.Module,
    start: Checkpoint,
    config: TrainingConfig,
    data: Dataset,
    path: Path,
    device: torch.device,
    track: Track,
    penalty: Pull | None = None,
    lessons: Path | None = None,
) -> Checkpoint:
    """Train from a checkpoint on; every epoch replaces the file at ``path``.

    A teacher's outputs are kept in the folder ``lessons``, see `rmprune.training.fit`.
    """
    latest = start
    teacher = None
    if start.config.distill:
        teacher = trained_model(start.config, len(data.classes))
    data, _ = hold_out(data, start.config.holdout)

    threshold = start.config.threshold

    def note() -> str:
        if start.stage != "sparse":
            return ""
        return f", {_share_under(model, threshold):.0%} of the channels under {threshold:g}"

    def keep() -> None:
        if is_first():
            latest.save(path)
        log(latest.history)

    def after_epoch(result: EpochResult, state: dict[str, Any]) -> None:
        nonlocal latest
        row = {"stage": start.stage, **dataclasses.asdict(result)}
        if start.stage == "sparse":
            row["under_threshold"] = _share_under(model, threshold)
        latest = replace(latest, **state, history=(*latest.history, row))
        keep()

    resume_from = None
    if start.optimizer is not None:
        resume_from = {
            "epoch": start.epoch,
            "model": start.model,
            "optimizer": start.optimizer,
            "compiled": start.compiled,
        }
    with opened(start.config.log, path.parent, start.stage, start.epoch) as log:
        fit(
            model,
            data,
            config,
            penalty=penalty,
            teacher=teacher,
            kept=lessons,
            device=device,
            resume_from=resume_from,
            after_epoch=after_epoch,
            track=track,
            note=note,
        )
        if latest is start:
            keep()
    return latest


def _share_under(slim: nn.Module, threshold: float) -> float:
    """The share of a model's channels whose scales are smaller than a threshold."""
    scales = torch.cat([scale.cpu() for scale in scales_of(slim).values()])
    return (scales < threshold).double().mean().item()
