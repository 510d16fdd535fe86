"""Runs: the stages of slimming, each reading from a folder what the one before wrote there.

    train     sparse.pt          slimmable model after sparsity training
    prune     masked.pt          the same with its masks, channels switched off
              pruned.safetensors the plain net of it, not fine-tuned
    finetune  finetuned.pt       the masked model, fine-tuned while still residual
              net.safetensors    the plain net of it: the result

Beside them stand ``config.json`` and ``metrics.csv`` (one row an epoch). A checkpoint tells
all that is needed to build its model again, so that every stage can be run by itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn

from rmprune.convert import convert
from rmprune.data import Dataset, Split, eval_batches
from rmprune.errors import StoreError, UsageError
from rmprune.models import create_model
from rmprune.plain import PlainNet
from rmprune.plots import plot_run
from rmprune.progress import Track, no_progress
from rmprune.removal import prune as remove_dead_channels
from rmprune.reports import compare, environment
from rmprune.rewrite import calibrate_bn, collapse
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import Cost, Penalty, add_shortcut_bn, penalty_weights, scale_parameters
from rmprune.store import (
    load,
    load_checkpoint,
    read_json,
    save,
    save_checkpoint,
    write_csv,
    write_json,
)
from rmprune.training import Compile, EpochResult, Precision, TrainingConfig, fit

CALIBRATION_IMAGES = 1024
PLAIN_LR = 5e-4  # at 5e-3 a pruned net of 99.7 % on the digits falls to 61 % in two epochs


@dataclass(frozen=True)
class SlimConfig:
    """Settings of a run; `rmprune slim --help` explains them.

    Attributes:
        model: A name that `rmprune.create_model` knows.
        weights: File with trained weights, or None to start from random ones.
        data: As `rmprune.data.load_data` takes it.
        data_root: Where named data sets lie or are put.
        image_size: To resize images to, in pixels; None leaves them as they are.
        sparsity: λ of the L1 penalty on channel scales.
        threshold: Channels with a smaller scale go.
        cost: How the penalty is spread, see `rmprune.slimming.penalty_weights`.
        epochs: Of sparsity training.
        finetune_epochs: Of fine-tuning under the masks.
        distill: Whether fine-tuning learns from the outputs of the model with ``weights``.
        lr: Learning rate of sparsity training.
        finetune_lr: Learning rate of fine-tuning.
        batch_size: Of both.
        seed: Of everything random.
        device: ``auto``, ``cpu``, ``cuda``, ….
        precision: ``auto``, ``float32`` or ``bf16``.
        compile: ``auto``, ``off`` or ``on``.
    """

    model: str = "resnet20"
    weights: str | None = None
    data: str = "digits"
    data_root: str = "data"
    image_size: int | None = None
    sparsity: float = 1e-4
    threshold: float = 5e-3
    cost: Cost = "macs"
    epochs: int = 30
    finetune_epochs: int = 30
    distill: bool = False
    lr: float = 0.1
    finetune_lr: float = 0.05
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        for name in ("sparsity", "threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"{name} must be finite and not negative, but it is {getattr(self, name)}"
                )
        if self.distill and self.weights is None:
            raise UsageError("to distill, name the trained weights to learn from: --weights")

    def training(self) -> TrainingConfig:
        """Settings of the sparsity training."""
        return TrainingConfig(
            self.epochs,
            self.lr,
            self.batch_size,
            seed=self.seed,
            precision=self.precision,
            compile=self.compile,
        )

    def finetuning(self) -> TrainingConfig:
        """Settings of the fine-tuning, which draws other batches than the training did."""
        return dataclasses.replace(
            self.training(),
            epochs=self.finetune_epochs,
            lr=self.finetune_lr,
            seed=self.seed + 1,
        )


@dataclass(frozen=True)
class Task:
    """What a net must know of the data it was trained for.

    Attributes:
        data: Name of the data set.
        classes: Their names, in the order of the outputs.
        image_shape: ``(3, H, W)``.
        mean: Of RGB in [0, 1], subtracted first.
        std: Of RGB in [0, 1], divided by.
    """

    data: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, data: Dataset) -> Task:
        """The task that a data set poses."""
        return cls(data.name, data.classes, data.image_shape, data.mean, data.std)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        """The task that ``dataclasses.asdict`` took apart; further keys are ignored."""
        names = [field.name for field in dataclasses.fields(cls)]
        known: dict[str, Any] = {
            name: tuple(value[name]) if isinstance(value[name], list) else value[name]
            for name in names
        }
        return cls(**known)

    def example_input(self, device: torch.device | str = "cpu") -> Tensor:
        """Two images of noise, ``(2, 3, H, W)``."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *self.image_shape, generator=generator).to(device)


@dataclass(frozen=True)
class Checkpoint:
    """A slimmable model at some point of a run.

    Attributes:
        stage: ``sparse``, ``masked`` or ``finetuned``.
        config: Settings of the run.
        task: What the model is trained for.
        model: Its state dict.
        masks: Masks that it is held under, if any.
        epoch: Epochs trained in this stage.
        optimizer: The optimizer's state dict, if the stage trains.
        history: One row for each epoch of this stage.
    """

    stage: str
    config: SlimConfig
    task: Task
    model: dict[str, Any]
    masks: Masks | None = None
    epoch: int = 0
    optimizer: dict[str, Any] | None = None
    history: tuple[dict[str, Any], ...] = ()

    def save(self, path: Path) -> None:
        """Write to a file; see `rmprune.store.save_checkpoint`."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("config", "task", "masks"):
            value = state[name]
            state[name] = None if value is None else dataclasses.asdict(value)
        save_checkpoint(state, path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            StoreError: The file is missing, damaged, or not a checkpoint of a run.
        """
        state = load_checkpoint(path)
        try:
            masks = state["masks"]
            return cls(
                **{
                    **state,
                    "config": SlimConfig(**state["config"]),
                    "task": Task(**state["task"]),
                    "masks": None if masks is None else Masks(**masks),
                }
            )
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is not a checkpoint of an rmprune run; give the sparse.pt, masked.pt "
                "or finetuned.pt of a run folder; a model's weights are given by --weights"
            ) from error

    def build(self, device: torch.device | str = "cpu") -> fx.GraphModule:
        """The slimmable model, with its weights and under its masks, in evaluation mode.

        Raises:
            StoreError: The weights are not those of a slimmable model.
        """
        if self.stage == "plain":
            raise StoreError(
                "this is a checkpoint of the fine-tuning of a plain net, kept for --resume; "
                "its result is the .safetensors file beside it"
            )
        model = create_model(self.config.model, num_classes=len(self.task.classes))
        slim = add_shortcut_bn(model)
        if self.masks is not None:
            apply_masks(slim, self.masks)
        slim.load_state_dict(self.model)
        return slim.to(device).eval()


def pick_device(name: str) -> torch.device:
    """``auto``: a GPU if there is one.

    Raises:
        UsageError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def calibration_batches(data: Dataset, device: torch.device) -> list[Tensor]:
    """Normalised training images for measuring BN statistics: the first of a fixed shuffle."""
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:CALIBRATION_IMAGES]
    split = Split(data.train.images[chosen], data.train.labels[chosen])
    batches = eval_batches(
        split, 256, mean=data.mean, std=data.std, device=device, dtype=torch.float32
    )
    return [images for images, _ in batches]


def train(
    folder: Path, config: SlimConfig, data: Dataset, track: Track = no_progress
) -> Checkpoint:
    """Train for sparsity, going on where the folder's ``sparse.pt`` stands."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model = _trained_model(config, len(data.classes))
    path = folder / "sparse.pt"
    write_json(dataclasses.asdict(config), folder / "config.json")
    if path.exists():
        checkpoint = Checkpoint.load(path)
        slim = checkpoint.build(device)
    else:
        slim = add_shortcut_bn(model.to(device), calibration_batches(data, device))
        checkpoint = Checkpoint("sparse", config, Task.of(data), slim.state_dict())
    weights = penalty_weights(slim, checkpoint.task.example_input(device), config.cost)
    penalty = Penalty(scale_parameters(slim), config.sparsity, weights)
    return _fit(slim, checkpoint, config.training(), data, path, device, track, penalty)


def prune(checkpoint: Checkpoint, threshold: float, folder: Path) -> Checkpoint:
    """Select channels and switch them off; save the masked model and its plain net."""
    slim = checkpoint.build()
    masks = select(slim, threshold)
    apply_masks(slim, masks)
    masked = Checkpoint(
        "masked",
        dataclasses.replace(checkpoint.config, threshold=threshold),
        checkpoint.task,
        slim.state_dict(),
        masks,
    )
    masked.save(folder / "masked.pt")
    save(deploy(masked), folder / "pruned.safetensors")
    return masked


def finetune(
    folder: Path,
    masked: Checkpoint,
    config: SlimConfig,
    data: Dataset,
    track: Track = no_progress,
) -> Checkpoint:
    """Fine-tune under the masks, going on where ``finetuned.pt`` stands; save the plain net."""
    device = pick_device(config.device)
    path = folder / "finetuned.pt"
    if path.exists():
        checkpoint = Checkpoint.load(path)
    else:
        checkpoint = dataclasses.replace(masked, stage="finetuned", config=config)
    slim = checkpoint.build(device)
    teacher = _trained_model(config, len(data.classes)) if config.distill else None
    checkpoint = _fit(
        slim, checkpoint, config.finetuning(), data, path, device, track, teacher=teacher
    )
    save(deploy(checkpoint), folder / "net.safetensors")
    return checkpoint


def task_of(net: PlainNet) -> Task | None:
    """What a saved net was trained for, if it says so."""
    try:
        return Task.from_json(net.info)
    except KeyError:
        return None


def deploy(checkpoint: Checkpoint) -> PlainNet:
    """The plain net of a checkpoint: converted, dead channels removed, BNs folded."""
    plain = convert(checkpoint.build(), checkpoint.task.example_input())
    net = collapse(remove_dead_channels(plain))
    net.info = {"model": checkpoint.config.model, **dataclasses.asdict(checkpoint.task)}
    return net


def plain_paths(folder: Path, source: Path) -> tuple[Path, Path]:
    """Where `finetune_plain` keeps its checkpoint, and where it saves the net."""
    return folder / f"{source.stem}-plain.pt", folder / f"{source.stem}-finetuned.safetensors"


def finetune_plain(
    folder: Path, source: Path, config: SlimConfig, data: Dataset, track: Track = no_progress
) -> Checkpoint:
    """Fine-tune a saved plain net with all weights free, going on where its checkpoint stands.

    Behind each convolution trains a BN of its own, which is folded again at the end.
    """
    device = pick_device(config.device)
    path, result = plain_paths(folder, source)
    net = calibrate_bn(load(source).to(device), calibration_batches(data, device))
    if path.exists():
        checkpoint = Checkpoint.load(path)
        net.load_state_dict(checkpoint.model)
    else:
        checkpoint = Checkpoint("plain", config, Task.of(data), net.state_dict())
    checkpoint = _fit(net, checkpoint, config.finetuning(), data, path, device, track)
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
    net = load(folder / "net.safetensors")
    original = _trained_model(config, len(data.classes)).eval()
    models = {
        "residual, untrained" if config.weights is None else "residual, as given": original,
        "residual, after sparsity training": sparse.build(),
        "residual, fine-tuned under masks": finetuned.build(),
        "plain, pruned": net,
    }
    table = compare(models, finetuned.task.example_input()[:1], data, track=track)
    write_csv(table.assign(**environment(threads=1)), folder / "report.csv")
    plot_run(pd.read_csv(folder / "metrics.csv"), net, folder / "run.png")
    return table


def _trained_model(config: SlimConfig, classes: int) -> nn.Module:
    """The model that a run starts from."""
    return create_model(config.model, num_classes=classes, weights=config.weights)


def read_config(folder: Path) -> SlimConfig | None:
    """The settings of the run that a folder holds, or None if it holds none."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return SlimConfig(**read_json(path))
    except TypeError as error:
        raise StoreError(f"{path} is not the config.json of an rmprune run") from error


def _fit(
    model: nn.Module,
    start: Checkpoint,
    config: TrainingConfig,
    data: Dataset,
    path: Path,
    device: torch.device,
    track: Track,
    penalty: Penalty | None = None,
    teacher: nn.Module | None = None,
) -> Checkpoint:
    """Train from a checkpoint on; every epoch replaces the file at ``path``."""
    latest = start

    def after_epoch(result: EpochResult, state: dict[str, Any]) -> None:
        nonlocal latest
        row = {"stage": start.stage, **dataclasses.asdict(result)}
        latest = dataclasses.replace(latest, **state, history=(*latest.history, row))
        latest.save(path)
        _write_metrics(path.with_name("metrics.csv"), latest)

    resume_from = None
    if start.optimizer is not None:
        resume_from = {
            "epoch": start.epoch,
            "model": start.model,
            "optimizer": start.optimizer,
        }
    fit(
        model,
        data,
        config,
        penalty=penalty,
        teacher=teacher,
        device=device,
        resume_from=resume_from,
        after_epoch=after_epoch,
        track=track,
    )
    if latest is start:
        latest.save(path)
    return latest


def _write_metrics(path: Path, checkpoint: Checkpoint) -> None:
    """Write the rows of a checkpoint's stage behind those of other stages."""
    rows = pd.DataFrame(list(checkpoint.history))
    if path.exists():
        earlier = pd.read_csv(path)
        rows = pd.concat([earlier[earlier["stage"] != checkpoint.stage], rows])
    write_csv(rows, path)
