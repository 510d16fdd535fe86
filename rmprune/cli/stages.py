"""Commands that make a pruned net: slim, and its stages train, prune and finetune."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from rmprune import pruning, reports, runs
from rmprune.budgets import deployed_ratio
from rmprune.checkpoints import Checkpoint
from rmprune.cli.group import main
from rmprune.cli.opening import begin, check_same, load_images, open_net
from rmprune.cli.options import (
    AUGMENTATION,
    BUDGET,
    EXISTING,
    FOLDER,
    HARDWARE,
    PLATFORM,
    SPARSITY,
    TASK,
    TRAINING,
    check_budget,
    config_of,
    given_settings,
    is_given,
    options,
)
from rmprune.cli.words import progress_bar, say_size
from rmprune.errors import UsageError
from rmprune.processes import is_first
from rmprune.store import load
from rmprune.targets import TOLERANCE, Target


@main.command()
@options("model", "weights", *TASK, *SPARSITY, *BUDGET, "prune_steps", *PLATFORM)
@options("epochs", "finetune_epochs", "finetune_lr", *TRAINING, "out", "resume")
def slim(out: Path, resume: bool, **settings: Any) -> None:
    """Run the whole pipeline: train, select, fine-tune under masks, convert, remove, measure.

    Leaves in the run folder: net.safetensors (the pruned plain net), report.csv, run.png,
    metrics.csv, config.json and the checkpoints.
    """
    config = config_of(settings)
    check_budget(settings)
    data = begin(out, resume, config)
    sparse = runs.train(out, config, data, progress_bar)
    finished = runs.prune_and_finetune(out, sparse, config, data, progress_bar)
    if not is_first():
        return
    _say_selection(finished)
    table = runs.report(out, sparse, finished, data, progress_bar)
    click.echo(reports.as_text(table))
    click.echo(f"saved {out / 'net.safetensors'}, report.csv and run.png beside it")


@main.command()
@options("model", "weights", *TASK, *SPARSITY, *PLATFORM, "epochs", *TRAINING, "out", "resume")
def train(out: Path, resume: bool, **settings: Any) -> None:
    """Train for sparsity alone; `rmprune prune` goes on from it.

    A sparsity of 0 is plain training.
    """
    config = config_of(settings)
    data = begin(out, resume, config)
    checkpoint = runs.train(out, config, data, progress_bar)
    click.echo(f"test accuracy {_accuracy(checkpoint)}; saved {out / 'sparse.pt'}")


@main.command()
@click.argument("run", type=EXISTING)
@options("threshold", "target")
@options("importance", *PLATFORM, "data", "data_root", of_a_run=True)
@click.option(
    "--out", type=FOLDER, help="Folder to write.  [default: RUN/threshold-T or RUN/KIND-VALUE]"
)
def prune(run: Path, out: Path | None, **settings: Any) -> None:
    """Select channels of a sparse RUN, convert and remove, without training.

    Seconds; minutes where many nets must be timed or tried, for a target of latency or accuracy
    or with --importance loss.

    RUN is a folder of `rmprune train` or its sparse.pt; a finetuned.pt is pruned further. Any
    number of thresholds and targets can be tried on one training; `rmprune finetune` goes on
    from each. Where all channels of a tensor lie under the threshold, the one with the largest
    scale stays. Options that are not shown with a default are those of the run.
    """
    path = run / "sparse.pt" if run.is_dir() else run
    check_budget(settings)
    start = Checkpoint.load(path)
    budget = {"threshold": settings["threshold"], "target": settings["target"], "prune_steps": 1}
    config = dataclasses.replace(start.config, **{**given_settings(settings), **budget})
    level = f"threshold-{config.threshold:g}"
    if config.target is not None:
        level = config.target.replace("=", "-")
    out = out or path.parent / level
    if start.stage == "sparse" and start.epoch < start.config.epochs:
        click.echo(
            f"rmprune: note: {path} has trained {start.epoch} of {start.config.epochs} epochs; "
            "`rmprune train --resume` goes on",
            err=True,
        )
    images = load_images(config, start.task)
    masked = pruning.prune(start, config, out, images, kept=path.parent)
    _say_selection(masked)
    say_size(load(out / "pruned.safetensors"), out / "pruned.safetensors")
    kind = "" if config.target is None else Target.parse(config.target).kind
    if kind in TOLERANCE:
        ratio = deployed_ratio(kind, masked, load(out / "pruned.safetensors"))
        click.echo(f"{kind}: {ratio:.3f} of the original {config.model}'s")


@main.command()
@click.argument("run", type=EXISTING)
@click.option("--plain", is_flag=True, help="Fine-tune a saved net: RUN is a .safetensors file.")
@options("model", "weights", *TASK, "finetune_epochs", "distill", "finetune_lr", of_a_run=True)
@options("batch_size", "seed", *AUGMENTATION, *HARDWARE, "log", of_a_run=True)
@click.option("--out", type=FOLDER, help="Folder to write.  [default: the folder of RUN's files]")
@options("resume")
def finetune(run: Path, plain: bool, out: Path | None, resume: bool, **settings: Any) -> None:
    """Fine-tune what `rmprune prune` wrote, under its masks, and save the plain net of it.

    RUN is the folder or its masked.pt; or a finetuned.pt, from whose weights a new fine-tuning
    begins, in an --out of its own. With --plain it is a saved net, whose every weight is
    free: a BN is put behind each convolution and folded again at the end; the learning rate
    is then 5e-4 by default, since narrow plain nets lose what they know at larger ones, and
    --distill asks for the original, by --model and --weights or from the run in whose folder
    the net lies. Options that are not given are those of the run.
    """
    source = run / "masked.pt" if run.is_dir() and not plain else run
    if not source.exists():
        pruned = ", ".join(sorted(str(path.parent) for path in run.glob("*/masked.pt")))
        raise UsageError(
            f"{run} has no masked.pt; "
            + (f"give one of {pruned}" if pruned else f"select channels first: rmprune prune {run}")
        )
    folder = out or source.parent
    if (is_given("model") or is_given("weights")) and not (plain and settings["distill"]):
        raise UsageError(
            "--model and --weights name what a saved net learns from, with --plain --distill; "
            "a run knows its own"
        )
    if plain:
        _, task, config = open_net(source)
        config = dataclasses.replace(config, finetune_lr=runs.PLAIN_LR, distill=False)
        checkpoint_path, net_path = runs.plain_paths(folder, source)
    else:
        masked = Checkpoint.load(source)
        task, config = masked.task, masked.config
        checkpoint_path, net_path = folder / "finetuned.pt", folder / "net.safetensors"
        if source.resolve() == checkpoint_path.resolve():
            raise UsageError(
                f"{source} is fine-tuned; name another --out to train on from its weights, or "
                f"give {folder / 'masked.pt'} with --resume to go on with that fine-tuning"
            )
    config = dataclasses.replace(config, **given_settings(settings))
    if checkpoint_path.exists():
        check_same(Checkpoint.load(checkpoint_path).config, config, folder, resume)
    data = load_images(config, task)
    if plain:
        checkpoint = runs.finetune_plain(folder, source, config, data, progress_bar)
    else:
        checkpoint = runs.finetune(folder, masked, config, data, progress_bar)
    if is_first():
        click.echo(f"test accuracy {_accuracy(checkpoint)}")
        say_size(load(net_path), net_path)


def _say_selection(masked: Checkpoint) -> None:
    masks = masked.narrowed
    assert masks is not None
    click.echo(f"{masks.removed} of {masks.channels} channels are switched off")
    for name in masks.forced:
        click.echo(f"all channels of {name} would go; the largest stays")


def _accuracy(checkpoint: Checkpoint) -> str:
    if not checkpoint.history:
        return "not measured (no epoch was trained)"
    return f"{100 * checkpoint.history[-1]['test_accuracy']:.2f} %"
