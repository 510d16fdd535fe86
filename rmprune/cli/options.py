"""Options that commands share, and the settings that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rmprune import backends, pruning
from rmprune.checkpoints import SlimConfig
from rmprune.errors import UsageError
from rmprune.models import model_names

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = SlimConfig()
PICTURES = (".png", ".svg", ".pdf")
EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def options(*names: str, of_a_run: bool = False) -> Callable[[Command], Command]:
    """Put the named options of a run on a command, with their help.

    Their defaults are shown, unless the run that a command goes on with has values for them.
    """
    shown = {"show_default": False} if of_a_run else {}
    return lambda command: functools.reduce(
        lambda done, name: click.option(
            f"--{name.replace('_', '-')}", **{"show_default": True, **OPTIONS[name], **shown}
        )(done),
        reversed(names),
        command,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "default": DEFAULTS.model,
        "help": f"{', '.join(model_names())}, torchvision:NAME or timm:NAME.",
    },
    "weights": {
        "type": EXISTING_FILE,
        "help": "Trained weights of the model: a state dict (.pt, .safetensors). "
        "Without them they are random.",
    },
    "data": {
        "default": DEFAULTS.data,
        "help": "digits (built in), cifar10, cifar100, or folder:PATH with PATH/train/CLASS/* and "
        "PATH/test/CLASS/* (or val).",
    },
    "data_root": {
        "type": FOLDER,
        "default": DEFAULTS.data_root,
        "help": "Where cifar10 and cifar100 lie or are downloaded to.",
    },
    "image_size": {
        "type": click.IntRange(min=1),
        "help": "Resize images to this many pixels; by default they stay as they are.",
    },
    "color_jitter": {
        "type": click.FloatRange(min=0, max=1),
        "default": DEFAULTS.color_jitter,
        "help": "Change brightness, contrast and saturation of training images by factors up to "
        "1 ± this.",
    },
    "cutout": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.cutout,
        "help": "Hide a square of so many pixels in each training image.",
    },
    "sparsity": {
        "type": click.FloatRange(min=0),
        "default": DEFAULTS.sparsity,
        "help": "λ of the L1 penalty on the BN scales. The papers train for 200 epochs with "
        "1e-4 to 1e-3; a short training needs more, about 2e-3 to 1e-2.",
    },
    "threshold": {
        "type": click.FloatRange(min=0),
        "default": DEFAULTS.threshold,
        "help": "Channels whose scale |γ| is smaller go.",
    },
    "target": {
        "metavar": "KIND=VALUE",
        "help": "Instead of a threshold: latency=0.5, macs=0.3 or params=0.2, shares of the "
        "original residual model's, or accuracy-drop=0.5, percentage points on held-out training "
        "images (--holdout). Channels go by their scale over what their removal saves.",
    },
    "importance": {
        "type": click.Choice(["scale", "group-norm", "loss"]),
        "default": DEFAULTS.importance,
        "help": "Let a target take channels by their scale; by the norm of all weights that go "
        "with them, as Torch-Pruning's group-norm pruner does; or by what the outputs lose without "
        "them, searched greedily. The latter two ask for no sparsity training.",
    },
    "round_to": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.round_to,
        "help": "Keep so many channels that widths are multiples of this: 8 or 16 for SIMD.",
    },
    "prune_steps": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.prune_steps,
        "help": "Reach the target in this many steps, with fine-tuning behind each.",
    },
    "schedule": {
        "type": click.Choice(["constant", "warmup", "ramp"]),
        "default": DEFAULTS.schedule,
        "help": "Let the penalty act from the begin, or rise over the first tenth or half.",
    },
    "cost": {
        "type": click.Choice(["macs", "params", "latency", "uniform"]),
        "default": DEFAULTS.cost,
        "help": "Penalise a channel by the multiply-adds, parameters or measured time that its "
        "removal saves, or all alike.",
    },
    "lowering": {
        "type": click.Choice(["plain", "auto"]),
        "default": DEFAULTS.lowering,
        "help": "plain: no additions in the net. auto: a block may have one again where that is "
        "faster on the backend.",
    },
    "backend": {
        "type": click.Choice(backends.BACKENDS),
        "default": DEFAULTS.backend,
        "help": "What the net shall run on, for all that is measured.",
    },
    "threads": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.threads,
        "help": "CPU threads for latencies.",
    },
    "latency_batch": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.latency_batch,
        "help": "Images at once for latencies.",
    },
    "holdout": {
        "type": click.FloatRange(min=0, max=1, max_open=True),
        "default": DEFAULTS.holdout,
        "help": "Share of the training images that no training sees, for accuracy-drop.",
    },
    "epochs": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.epochs,
        "help": "Epochs of sparsity training.",
    },
    "finetune_epochs": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.finetune_epochs,
        "help": "Epochs of fine-tuning under the masks.",
    },
    "distill": {
        "is_flag": True,
        "help": "Train towards the outputs of the model that the run began with, too: "
        "the one with --weights.",
    },
    "lr": {
        "type": click.FloatRange(min=0, min_open=True),
        "default": DEFAULTS.lr,
        "help": "Learning rate of the sparsity training.",
    },
    "finetune_lr": {
        "type": click.FloatRange(min=0, min_open=True),
        "default": DEFAULTS.finetune_lr,
        "help": "Learning rate of the fine-tuning.",
    },
    "batch_size": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.batch_size,
        "help": "Images a training step.",
    },
    "seed": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.seed,
        "help": "Of initial weights, data order and augmentation.",
    },
    "device": {
        "default": DEFAULTS.device,
        "help": "cpu, cuda, …; auto takes a GPU if there is one.",
    },
    "precision": {
        "type": click.Choice(["auto", "float32", "bf16"]),
        "default": DEFAULTS.precision,
        "help": "Of training; auto takes bf16 where it is faster: on GPUs, and CPUs with AMX.",
    },
    "compile": {
        "type": click.Choice(["auto", "off", "on"]),
        "default": DEFAULTS.compile,
        "help": "Compile the training step: faster after about a minute. auto times a few steps "
        "with and without, where the training is long and there is a C++ compiler.",
    },
    "sync_bn": {
        "is_flag": True,
        "help": "Under torchrun: let BNs normalise by the batch of all processes, as one process "
        "does, and not by their own part of it.",
    },
    "log": {
        "type": click.Choice(["csv", "tensorboard", "none"]),
        "default": DEFAULTS.log,
        "help": "Write loss, accuracy, learning rate and share of channels under the threshold "
        "after every epoch: to metrics.csv, and to event files, too, or not at all.",
    },
    "out": {"type": FOLDER, "default": Path("runs/slim"), "help": "Run folder."},
    "resume": {
        "is_flag": True,
        "help": "Go on with the run in --out, behind its last whole epoch.",
    },
}

TASK = ("data", "data_root", "image_size")
AUGMENTATION = ("color_jitter", "cutout")
HARDWARE = ("device", "precision", "compile", "sync_bn")
TRAINING = ("lr", "batch_size", "seed", *AUGMENTATION, *HARDWARE, "log")
SPARSITY = ("sparsity", "schedule", "cost", "holdout", "distill")
PLATFORM = ("lowering", "round_to", "backend", "threads", "latency_batch")
BUDGET = ("threshold", "target", "importance")


def config_of(settings: dict[str, Any]) -> SlimConfig:
    """The run that a command line asks for."""
    return SlimConfig(**plain_values(settings))


def check_budget(settings: dict[str, Any]) -> None:
    """Refuse a threshold beside a target, or beside an importance that it is not for."""
    if settings["target"] is not None and is_given("threshold"):
        raise UsageError("give either --threshold or --target, not both")
    if settings["target"] is None and settings["importance"] is not None:
        pruning.check_importance(settings["importance"])


def given_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that stand on the command line."""
    return plain_values({key: value for key, value in settings.items() if is_given(key)})


def is_given(option: str) -> bool:
    """Whether an option of the command that runs stands on the command line."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not click.core.ParameterSource.DEFAULT


def plain_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with paths as text, which config.json can hold."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
