"""Runs: the stages of slimming, each reading from a folder what the one before wrote there.

    train     sparse.pt          slimmable model after sparsity training
    prune     masked.pt          the same with its masks, channels switched off
              pruned.safetensors the net of it, not fine-tuned
    finetune  finetuned.pt       the masked model, fine-tuned while still residual
              net.safetensors    the net of it: the result

Beside them stand ``config.json`` and ``metrics.csv`` (one row an epoch). A checkpoint tells
all that is needed to build its model again, so that every stage can be run by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd
import torch
from torch import Tensor, fx, nn

from rmprune.backends import Backend, Platform, time_deployed
from rmprune.blocks import inner_bns
from rmprune.convert import convert
from rmprune.costs import (
    Cost,
    Lowering,
    channel_savings,
    counted,
    latency_table,
    measured,
    relative,
    sites,
)
from rmprune.data import Dataset, calibration_images, eval_batches, hold_out
from rmprune.errors import PruningError, StoreError, UsageError
from rmprune.graph import parse
from rmprune.importance import Importance, by_loss, by_scale, spare
from rmprune.lowering import Choose, Form, fastest, likeliest, lower
from rmprune.measure import count_macs, count_params, evaluate
from rmprune.models import create_model
from rmprune.narrowing import cut, move_statistics, narrow, widen
from rmprune.plain import PlainNet
from rmprune.plots import plot_run
from rmprune.progress import Track, no_progress
from rmprune.removal import prune as remove_dead_channels
from rmprune.reports import compare, environment
from rmprune.rewrite import calibrate_bn, collapse
from rmprune.selection import Masks, apply_masks, select
from rmprune.slimming import Penalty, add_shortcut_bn, scale_parameters, scales_of
from rmprune.store import (
    load,
    load_checkpoint,
    read_json,
    save,
    save_checkpoint,
    write_csv,
    write_json,
)
from rmprune.targets import TOLERANCE, Target, search, thresholds_of
from rmprune.training import (
    Compile,
    EpochResult,
    Precision,
    Pull,
    Schedule,
    TrainingConfig,
    fit,
)

Scope = Literal["all", "inner"]
CALIBRATION_IMAGES = 1024
IMPORTANCE_BATCHES = 2  # of 256 images
NOTHING: Mapping[str, int] = {}
DETOURS = 2  # around steps that pass a target by far
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
        schedule: How λ rises over the training, see `rmprune.training.penalty_share`.
        threshold: Channels with a smaller scale go.
        target: ``KIND=VALUE``, a budget instead of a threshold; see `rmprune.targets`.
        importance: What a target takes channels by: their ``"scale"``, or what is lost
            without them, the ``"loss"``; see `rmprune.importance`.
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
    """

    model: str = "resnet20"
    weights: str | None = None
    data: str = "digits"
    data_root: str = "data"
    image_size: int | None = None
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

    def __post_init__(self) -> None:
        for name in ("sparsity", "threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"{name} must be finite and not negative, but it is {getattr(self, name)}"
                )
        if self.distill and self.weights is None:
            raise UsageError("to distill, name the trained weights to learn from: --weights")
        if self.target is not None:
            Target.parse(self.target)
        elif self.prune_steps > 1:
            raise UsageError("channels go in several steps towards a --target; name one")

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
    """A slimmable model at some point of a run.

    Attributes:
        stage: ``sparse``, ``masked`` or ``finetuned``.
        config: Settings of the run.
        task: What the model is trained for.
        model: Its state dict.
        masks: Masks that it is held under, if any.
        narrowed: Masks of the whole model that channels and blocks were cut out by, if any; see
            `rmprune.narrowing`.
        forms: How blocks are lowered, by the name of their first layer; measured once, when
            channels are selected.
        epoch: Epochs trained in this stage.
        optimizer: The optimizer's state dict, if the stage trains.
        history: One row for each epoch of this stage.
    """

    stage: str
    config: SlimConfig
    task: Task
    model: dict[str, Any]
    masks: Masks | None = None
    narrowed: Masks | None = None
    forms: dict[str, Form] | None = None
    epoch: int = 0
    optimizer: dict[str, Any] | None = None
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
        if self.narrowed is not None:
            narrow(slim, self.narrowed)
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
    """Normalised training images for measuring BN statistics."""
    chosen = calibration_images(data, CALIBRATION_IMAGES)
    batches = eval_batches(
        chosen, 256, mean=data.mean, std=data.std, device=device, dtype=torch.float32
    )
    return [images for images, _ in batches]


def train(
    folder: Path, config: SlimConfig, data: Dataset, track: Track = no_progress
) -> Checkpoint:
    """Train for sparsity, going on where the folder's ``sparse.pt`` stands."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model = trained_model(config, len(data.classes))
    path = folder / "sparse.pt"
    write_json(dataclasses.asdict(config), folder / "config.json")
    if path.exists():
        checkpoint = Checkpoint.load(path)
        slim = checkpoint.build(device)
    else:
        slim = add_shortcut_bn(model.to(device), calibration_batches(data, device))
        checkpoint = Checkpoint("sparse", config, Task.of(data), slim.state_dict())
    weights = channel_weights(slim, config.cost, checkpoint.task, config, folder)
    penalty = Penalty(scale_parameters(slim), config.sparsity, weights)
    return fit_kept(slim, checkpoint, config.training(), data, path, device, track, penalty)


def channel_weights(
    slim: fx.GraphModule, cost: Cost, task: Task, config: SlimConfig, folder: Path
) -> dict[str, float]:
    """What a channel of each BN saves, relative to the mean channel; 0 out of scope.

    A latency table is measured once and kept in the folder.
    """
    weights = _all_weights(slim, cost, task, config, folder)
    within = weights.keys() if config.scope == "all" else inner_bns(parse(slim))
    return {name: weight if name in within else 0.0 for name, weight in weights.items()}


def _all_weights(
    slim: fx.GraphModule, cost: Cost, task: Task, config: SlimConfig, folder: Path
) -> dict[str, float]:
    channels = {name: len(scale) for name, scale in scales_of(slim).items()}
    if cost == "uniform":
        return dict.fromkeys(channels, 1.0)
    slim = copy.deepcopy(slim).cpu().eval()
    example = task.example_input()
    layer_costs = counted(cost)
    if cost == "latency":
        settings = (config.backend, config.threads, config.latency_batch, config.round_to)
        path = folder / f"latency-{'-'.join(map(str, settings))}.csv"
        if not path.exists():
            network = slim if config.lowering == "auto" else convert(slim, example)
            write_csv(
                latency_table(sites(network, example), config.platform, config.round_to), path
            )
        layer_costs = measured(pd.read_csv(path))
    return relative(channel_savings(slim, example, layer_costs, config.lowering), channels)


def prune(
    checkpoint: Checkpoint,
    config: SlimConfig,
    folder: Path,
    data: Dataset,
    choose: Choose | None = None,
) -> Checkpoint:
    """Select channels and switch them off; save the masked model and its net.

    Args:
        checkpoint: A slimmable model after training.
        config: Its ``threshold``, or its ``target``, says how many go.
        folder: To write to.
        data: For the statistics of BNs, and whose held-out images a target of accuracy is for.
        choose: See `deploy`.

    Raises:
        UsageError: No images were held out for a target of accuracy.
        PruningError: The target cannot be met.
    """
    slim = checkpoint.build()
    target = None if config.target is None else Target.parse(config.target)
    if target is None:
        check_importance(config.importance)
        masks = select(
            slim,
            config.threshold,
            scores=by_scale(
                slim, channel_weights(slim, "uniform", checkpoint.task, config, folder)
            ),
            lowering=config.lowering,
            round_to=config.round_to,
        )
        masked = _switched_off(slim, checkpoint, masks, config)
    else:
        masked = _masked_within(target, slim, checkpoint, config, folder, data, choose)
    masked = _with_statistics(masked, checkpoint, _calibration(config, data))
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
    masks = masked.narrowed
    if checkpoint.narrowed is not None:
        masks = cut(masks, slim, checkpoint.narrowed)
    move_statistics(model, slim, masks, calibration)
    return replace(masked, model=model.state_dict())


def _calibration(config: SlimConfig, data: Dataset) -> list[Tensor]:
    return calibration_batches(hold_out(data, config.holdout)[0], torch.device("cpu"))


def _masked_within(
    target: Target,
    slim: fx.GraphModule,
    checkpoint: Checkpoint,
    config: SlimConfig,
    folder: Path,
    data: Dataset,
    choose: Choose | None,
) -> Checkpoint:
    """The masked model that keeps the most channels within a target."""
    cost: Cost = target.kind if target.kind != "accuracy-drop" else config.cost
    savings = channel_weights(slim, cost, checkpoint.task, config, folder)
    if config.importance == "loss":
        device = pick_device(config.device)
        scores = by_loss(
            copy.deepcopy(slim).to(device),
            savings,
            calibration_batches(hold_out(data, config.holdout)[0], device)[:IMPORTANCE_BATCHES],
            lowering=config.lowering,
            round_to=config.round_to,
        )
    else:
        scores = by_scale(slim, savings)
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
        calibration = _calibration(config, data)
        return _smallest_within_drop(
            target.value / 100,
            masked,
            lambda found: _with_statistics(found, checkpoint, calibration),
            thresholds,
            config,
            data,
        )
    return _largest_within_budget(target, masked, thresholds, config, choose)


class _Masked(Protocol):
    def __call__(self, threshold: float, spared: Mapping[str, int] = NOTHING) -> Checkpoint:
        """The model with the channels under a threshold switched off."""


def _largest_within_budget(
    target: Target,
    masked: _Masked,
    thresholds: list[float],
    config: SlimConfig,
    choose: Choose | None,
) -> Checkpoint:
    """Search for the threshold; then name the forms chosen, whose cost is another, and again."""

    def ratio(checkpoint: Checkpoint) -> float:
        return deployed_ratio(target.kind, checkpoint, deploy(checkpoint, likeliest))

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


def deployed_ratio(kind: str, checkpoint: Checkpoint, net: nn.Module) -> float:
    """What a net costs, as a share of the cost of the original model of its run."""
    config, example = checkpoint.config, checkpoint.task.example_input()
    original = create_model(config.model, num_classes=len(checkpoint.task.classes)).eval()
    if kind == "params":
        return count_params(net) / count_params(original)
    if kind == "macs":
        return count_macs(net, example) / count_macs(original, example)
    timings = time_deployed(
        {"original": original, "net": net}, example, config.platform, rounds=9, warn=False
    )
    return timings["net"].median_ms / timings["original"].median_ms


def _smallest_within_drop(
    drop: float,
    masked: _Masked,
    settled: Callable[[Checkpoint], Checkpoint],
    thresholds: list[float],
    config: SlimConfig,
    data: Dataset,
) -> Checkpoint:
    """Raise the threshold as long as the masked model loses no more on held-out images."""
    if config.holdout == 0:
        raise UsageError(
            "a target of accuracy needs training images that no training has seen: "
            "train with --holdout 0.1, say"
        )
    _, held_out = hold_out(data, config.holdout)
    device = pick_device(config.device)

    def accuracy(checkpoint: Checkpoint) -> float:
        model = settled(checkpoint).build(device)
        correct, images = evaluate(model, held_out, mean=data.mean, std=data.std, device=device)
        return correct / images

    least = accuracy(masked(0.0)) - drop
    low, high = 0, len(thresholds)
    while high - low > 1:
        middle = (low + high) // 2
        if accuracy(masked(thresholds[middle])) >= least:
            low = middle
        else:
            high = middle
    return masked(thresholds[low])


def finetune(
    folder: Path,
    masked: Checkpoint,
    config: SlimConfig,
    data: Dataset,
    track: Track = no_progress,
) -> Checkpoint:
    """Fine-tune under the masks, going on where ``finetuned.pt`` stands; save the net."""
    device = pick_device(config.device)
    path = folder / "finetuned.pt"
    if path.exists():
        checkpoint = Checkpoint.load(path)
    else:
        checkpoint = replace(masked, stage="finetuned", config=config)
    slim = checkpoint.build(device)
    checkpoint = fit_kept(slim, checkpoint, config.finetuning(), data, path, device, track)
    save(deploy(checkpoint), folder / "net.safetensors")
    return checkpoint


def prune_and_finetune(
    folder: Path,
    sparse: Checkpoint,
    config: SlimConfig,
    data: Dataset,
    track: Track = no_progress,
) -> Checkpoint:
    """Select, switch off and fine-tune, in ``prune_steps`` steps; save the net.

    Each step but the last has a folder of its own, a target on the way (shares of cost fall
    by the same factor each time), and its part of the fine-tuning epochs.
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
        if (here / "finetuned.pt").exists():
            masked = Checkpoint.load(here / "masked.pt")  # a latency is never measured twice alike
        else:
            # On the way nothing is delivered, so that forms need not be measured.
            masked = prune(latest, on_the_way, here, data, None if step == steps else likeliest)
        latest = finetune(here, masked, on_the_way, data, track)
    return latest


def task_of(net: PlainNet) -> Task | None:
    """What a saved net was trained for, if it says so."""
    try:
        return Task.from_json(net.info)
    except KeyError:
        return None


def deploy(checkpoint: Checkpoint, choose: Choose | None = None) -> PlainNet:
    """The net of a checkpoint: converted, dead channels removed, BNs folded, lowered.

    Args:
        checkpoint: A slimmable model.
        choose: How to choose the forms that the checkpoint does not name, where the net may
            have additions; by default what its platform runs fastest.
    """
    config, example = checkpoint.config, checkpoint.task.example_input()
    net = collapse(remove_dead_channels(convert(checkpoint.build(), example, keep_bn=False)))
    origin = {"model": config.model, "image_size": config.image_size}
    net.info = {**origin, **dataclasses.asdict(checkpoint.task)}
    if config.lowering == "plain":
        return net
    known, decide = checkpoint.forms or {}, choose or fastest(example, config.platform)

    def form(name: str, forms: Sequence[Form], made: Callable[[Form], PlainNet]) -> Form:
        return known[name] if known.get(name) in forms else decide(name, forms, made)

    return lower(net, example, form)


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
    checkpoint = fit_kept(net, checkpoint, config.finetuning(), data, path, device, track)
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
    original = trained_model(config, len(data.classes)).eval()
    models = {
        "residual, untrained" if config.weights is None else "residual, as given": original,
        "residual, after sparsity training": sparse.build(),
        "residual, fine-tuned under masks": finetuned.build(),
        "plain, pruned" if net.is_plain else "pruned": net,
    }
    example = finetuned.task.example_input()
    table = compare(models, example, data, platform=config.platform, track=track)
    write_csv(table.assign(**environment(config.platform)), folder / "report.csv")
    plot_run(pd.read_csv(folder / "metrics.csv"), net, folder / "run.png")
    return table


def trained_model(config: SlimConfig, classes: int) -> nn.Module:
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


def fit_kept(
    model: nn.Module,
    start: Checkpoint,
    config: TrainingConfig,
    data: Dataset,
    path: Path,
    device: torch.device,
    track: Track,
    penalty: Pull | None = None,
) -> Checkpoint:
    """Train from a checkpoint on; every epoch replaces the file at ``path``."""
    latest = start
    teacher = None
    if start.config.distill:
        teacher = trained_model(start.config, len(data.classes))
    data, _ = hold_out(data, start.config.holdout)

    def after_epoch(result: EpochResult, state: dict[str, Any]) -> None:
        nonlocal latest
        row = {"stage": start.stage, **dataclasses.asdict(result)}
        latest = replace(latest, **state, history=(*latest.history, row))
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
        _write_metrics(path.with_name("metrics.csv"), latest)
    return latest


def _write_metrics(path: Path, checkpoint: Checkpoint) -> None:
    """Write the rows of a checkpoint's stage behind those of other stages."""
    columns = ["stage", *(field.name for field in dataclasses.fields(EpochResult))]
    rows = pd.DataFrame(list(checkpoint.history), columns=columns)
    if path.exists():
        earlier = pd.read_csv(path)
        parts = [earlier[earlier["stage"] != checkpoint.stage], rows]
        rows = pd.concat([part for part in parts if not part.empty] or [rows])
    write_csv(rows, path)
