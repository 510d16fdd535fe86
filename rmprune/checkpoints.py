"""What a run is made of: its settings, what its model is for, and the model at every stage."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from rmprune.backends import Backend, Platform
from rmprune.batches import eval_batches
from rmprune.compilation import Compile
from rmprune.convert import convert
from rmprune.costs import Cost, Lowering
from rmprune.data import Dataset, calibration_images, hold_out
from rmprune.errors import StoreError, UsageError, first_line
from rmprune.importance import Importance
from rmprune.logs import LogKind
from rmprune.lowering import Choose, Form, fastest, lower
from rmprune.models import build_model, create_model
from rmprune.narrowing import narrow
from rmprune.plain import PlainNet, Width
from rmprune.processes import local_device
from rmprune.removal import prune as remove_dead_channels
from rmprune.rewrite import collapse
from rmprune.selection import Masks, apply_masks
from rmprune.slimming import slimmable
from rmprune.store import built, load_checkpoint, read_json, save_checkpoint
from rmprune.targets import Target
from rmprune.training import Precision, Schedule, TrainingConfig

Scope = Literal["all", "inner"]
CALIBRATION_IMAGES = 1024
CALIBRATION_BATCH = 256
# Settings of how a training runs, on which what it learns does not depend, or hardly.
HOW = frozenset({"device", "data_root", "log", "compile", "precision", "sync_bn"})
# Settings of what comes after sparsity training.
LATER = frozenset(
    {"threshold", "target", "importance", "round_to", "prune_steps", "scope", "lowering"}
    | {"backend", "threads", "latency_batch", "finetune_epochs", "finetune_lr"}
)


@dataclass(frozen=True)
class SlimConfig:
    """Settings of a run; `rmprune slim --help` explains them.

    Attributes:
        model: A name that `rmprune.create_model` knows.
        weights: File with trained weights, or None to start from random ones.
        data: As `rmprune.data.load_data` takes it.
        data_root: Where named data sets lie or are put.
        image_size: To resize images to, in pixels; None leaves them as they are.
        color_jitter: Of training images, see `rmprune.augmentation.Augmentation`.
        cutout: The same.
        sparsity: λ of the L1 penalty on channel scales.
        schedule: How λ rises over the training, see `rmprune.training.penalty_share`.
        threshold: Channels with a smaller scale go.
        target: ``KIND=VALUE``, a budget instead of a threshold; see `rmprune.targets`.
        importance: What a target takes channels by: their ``"scale"``, the ``"group-norm"`` of
            all their weights (see `rmprune.importance`), or what is lost without them, the
            ``"loss"`` (see `rmprune.greedy`).
        round_to: Widths become multiples of this where there are channels to keep for it.
        prune_steps: In how many steps the target is reached, with fine-tuning behind each.
        cost: What a channel costs, for the penalty and for a target of accuracy.
        scope: Which channels may go: ``"all"``, or those ``"inner"`` to a block, as network
            slimming does in a residual network.
        lowering: Whether the net that comes out is plain, or may have additions again.
        backend: Where it shall run, see `rmprune.backends.Platform`.
        threads: It may use there.
        latency_batch: Images it gets at once there.
        holdout: Share of the training images kept back from all training.
        epochs: Of sparsity training.
        finetune_epochs: Of fine-tuning under the masks.
        distill: Whether training learns from the outputs of the model with ``weights``, too.
        lr: Learning rate of sparsity training.
        finetune_lr: Learning rate of fine-tuning.
        batch_size: Of both.
        seed: Of everything random.
        device: ``auto``, ``cpu``, ``cuda``, ….
        precision: ``auto``, ``float32`` or ``bf16``.
        compile: ``auto``, ``off`` or ``on``.
        sync_bn: Whether BNs share their statistics where several processes train.
        log: What is written down of every epoch, see `rmprune.logs`.
    """

    model: str = "resnet20"
    weights: str | None = None
    data: str = "digits"
    data_root: str = "data"
    image_size: int | None = None
    color_jitter: float = 0.0
    cutout: int = 0
    sparsity: float = 1e-4
    schedule: Schedule = "constant"
    threshold: float = 5e-3
    target: str | None = None
    importance: Importance = "scale"
    round_to: int = 1
    prune_steps: int = 1
    cost: Cost = "macs"
    scope: Scope = "all"
    lowering: Lowering = "plain"
    backend: Backend = "torch"
    threads: int = 1
    latency_batch: int = 1
    holdout: float = 0.0
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
    sync_bn: bool = False
    log: LogKind = "csv"

    def __post_init__(self) -> None:
        for name in ("sparsity", "threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"{name} must be finite and not negative, but it is {getattr(self, name)}"
                )
        if self.distill and self.weights is None:
            raise UsageError("to distill, name the trained weights to learn from: --weights")
        if self.target is not None:
            kind = Target.parse(self.target).kind
            if kind == "accuracy-drop" and self.holdout == 0:
                raise UsageError(
                    "a target of accuracy needs training images that no training has seen: "
                    "train with --holdout 0.1, say"
                )
            if kind == "accuracy-drop" and self.prune_steps > 1:
                raise UsageError(
                    "what an accuracy may drop by is for one step: leave --prune-steps out, or "
                    "give a --target of latency, macs or params"
                )
        elif self.prune_steps > 1:
            raise UsageError("channels go in several steps towards a --target; name one")
        # What these refuse shall be refused before any training.
        _ = self.training(), self.finetuning(), self.platform

    def changed(self, other: SlimConfig, but: Collection[str] = ()) -> list[str]:
        """What differs from other settings, as ``--option was VALUE``, but for some of them."""
        return [
            f"--{field.name.replace('_', '-')} was {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in but and getattr(self, field.name) != getattr(other, field.name)
        ]

    def training(self) -> TrainingConfig:
        """Settings of the sparsity training."""
        return TrainingConfig(
            self.epochs,
            self.lr,
            self.batch_size,
            schedule=self.schedule,
            seed=self.seed,
            precision=self.precision,
            compile=self.compile,
            color_jitter=self.color_jitter,
            cutout=self.cutout,
            sync_bn=self.sync_bn,
        )

    @property
    def platform(self) -> Platform:
        """Where the net shall run."""
        return Platform(self.backend, self.threads, self.latency_batch)

    def finetuning(self) -> TrainingConfig:
        """Settings of the fine-tuning, which draws other batches than the training did."""
        return replace(
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
    """A slimmable model, or the plain net that it became, at some point of a run.

    Attributes:
        stage: ``sparse``, ``masked`` or ``finetuned``.
        config: Settings of the run.
        task: What the model is trained for.
        model: Its state dict.
        masks: Masks that it is held under, if any.
        narrowed: Masks of the whole model that channels and blocks were cut out by, if any; see
            `rmprune.narrowing`. Of a plain net, masks of it before.
        layers: Of a plain net: its layers without weights, see `rmprune.store.layers_of`; a
            run has one from selection on where its model is no chain of residual blocks.
        forms: How blocks are lowered, by the name of their first layer; measured once, when
            channels are selected.
        epoch: Epochs trained in this stage.
        optimizer: The optimizer's state dict, if the stage trains.
        compiled: Whether the stage trains compiled, once it is known.
        history: One row for each epoch of this stage.
    """

    stage: str
    config: SlimConfig
    task: Task
    model: dict[str, Any]
    masks: Masks | None = None
    narrowed: Masks | None = None
    layers: str | None = None
    forms: dict[str, Form] | None = None
    epoch: int = 0
    optimizer: dict[str, Any] | None = None
    compiled: bool | None = None
    history: tuple[dict[str, Any], ...] = ()

    def save(self, path: Path) -> None:
        """Write to a file; see `rmprune.store.save_checkpoint`."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("config", "task", "masks", "narrowed"):
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
            masks = {name: state.get(name) for name in ("masks", "narrowed")}
            return cls(
                **{
                    **state,
                    "config": SlimConfig(**state["config"]),
                    "task": Task(**state["task"]),
                    **{name: value and Masks(**value) for name, value in masks.items()},
                }
            )
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is not a checkpoint of an rmprune run; give the sparse.pt, masked.pt "
                "or finetuned.pt of a run folder; a model's weights are given by --weights"
            ) from error

    def resumed(self, path: Path, but: Collection[str] = ()) -> Checkpoint:
        """The checkpoint at a path, to go on with, or this one where there is none.

        Args:
            path: Where the stage that begins with this checkpoint keeps its own.
            but: Settings that the stage does not depend on.

        Raises:
            UsageError: The one at the path was made with other settings.
        """
        if not path.exists():
            return self
        found = Checkpoint.load(path)
        changed = found.config.changed(self.config, {*HOW, *but})
        if found.stage != self.stage:
            changed = [f"it is {found.stage}", *changed]
        if changed:
            raise UsageError(
                f"{path} is of a run with other settings: {', '.join(changed)}; give those, or "
                "another --out"
            )
        return found

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The slimmable model, with its weights and under its masks, in evaluation mode.

        Where selection made a plain net of it, it is this `PlainNet`.

        Raises:
            StoreError: The weights are not those of a slimmable model.
        """
        if self.layers is not None:
            return built(self.layers, self.model).to(device)
        if self.stage == "plain":
            raise StoreError(
                "this is a checkpoint of the fine-tuning of a plain net, kept for --resume; "
                "its result is the .safetensors file beside it"
            )
        slim = slimmable(build_model(self.config.model, len(self.task.classes)))
        if isinstance(slim, fx.GraphModule):
            if self.narrowed is not None:
                narrow(slim, self.narrowed)
            if self.masks is not None:
                apply_masks(slim, self.masks)
        try:
            slim.load_state_dict(self.model)
        except RuntimeError as error:
            raise StoreError(
                f"these are no weights of {self.config.model} as rmprune trains it, but of "
                f"{self.stage!r}: {first_line(error)}"
            ) from error
        return slim.to(device).eval()


def task_of(net: PlainNet) -> Task | None:
    """What a saved net was trained for, if it says so."""
    try:
        return Task.from_json(net.info)
    except KeyError:
        return None


def read_config(folder: Path) -> SlimConfig | None:
    """The settings of the run that a folder holds, or None if it holds none."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return SlimConfig(**read_json(path))
    except TypeError as error:
        raise StoreError(f"{path} is not the config.json of an rmprune run") from error


def pick_device(name: str) -> torch.device:
    """``auto``: a GPU if there is one; of several processes, each takes its own.

    Raises:
        UsageError: There is no such device.
    """
    if name == "auto":
        return local_device() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def trained_model(config: SlimConfig, classes: int) -> nn.Module:
    """The model that a run starts from."""
    return create_model(config.model, num_classes=classes, weights=config.weights)


def calibration_batches(data: Dataset, device: torch.device) -> list[Tensor]:
    """Normalised training images for measuring BN statistics."""
    count = min(CALIBRATION_IMAGES, len(data.train.labels))
    if count % CALIBRATION_BATCH == 1:
        count = max(count - 1, 1)  # BNs cannot normalise one image of one pixel
    batches = eval_batches(
        calibration_images(data, count),
        CALIBRATION_BATCH,
        mean=data.mean,
        std=data.std,
        device=device,
        dtype=torch.float32,
    )
    return [images for images, _ in batches]


def run_calibration(
    config: SlimConfig, data: Dataset, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The same, of those images that a run trains on."""
    return calibration_batches(hold_out(data, config.holdout)[0], torch.device(device))


def deploy(checkpoint: Checkpoint, choose: Choose | None = None) -> PlainNet:
    """The net of a checkpoint: converted, dead channels removed, BNs folded, lowered.

    Args:
        checkpoint: A slimmable model, or a plain net.
        choose: How to choose the forms that the checkpoint does not name, where the net may
            have additions; by default what its platform runs fastest.
    """
    config, example = checkpoint.config, checkpoint.task.example_input()
    model = checkpoint.build()
    if isinstance(model, PlainNet):
        net = model
    else:
        net = convert(model, example, keep_bn=False)
        if checkpoint.narrowed is not None:
            net.converted_widths = dict(_whole_widths(config.model, checkpoint.task))
    net = collapse(remove_dead_channels(net))
    origin = {"model": config.model, "image_size": config.image_size}
    net.info = {**origin, **dataclasses.asdict(checkpoint.task)}
    if config.lowering == "plain":
        return net
    known, decide = checkpoint.forms or {}, choose or fastest(example, config.platform)

    def form(name: str, forms: Sequence[Form], made: Callable[[Form], PlainNet]) -> Form:
        return known[name] if known.get(name) in forms else decide(name, forms, made)

    return lower(net, example, form)


@functools.cache  # it does not depend on weights, and a search for a target deploys many nets
def _whole_widths(model: str, task: Task) -> Mapping[str, Width]:
    """Widths of a model's plain net with all of its channels."""
    slim = slimmable(build_model(model, len(task.classes)))
    return convert(slim, task.example_input(), keep_bn=False).converted_widths
