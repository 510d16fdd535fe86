"""One training loop, for sparsity training and for fine-tuning.

Data order, augmentation and dropout are functions of (seed, epoch) alone and the learning
rate is one of the step, so a run that resumes after an epoch goes on bit for bit (CPU, same
number of threads) from the model's and the optimizer's state.

Several processes (see `rmprune.processes`) train on parts of each batch, whose gradients
`DistributedDataParallel` averages; the batches are those of one process.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rmprune import processes
from rmprune.batches import batch_count, resident, train_batches
from rmprune.compilation import Compile, begin_step, compiled, is_worth_timing, pays, undone
from rmprune.data import Dataset
from rmprune.errors import TrainingError, UsageError
from rmprune.lessons import Lesson, key, lessons
from rmprune.measure import evaluate
from rmprune.progress import Track, no_progress
from rmprune.sync_bn import synchronized

Precision = Literal["auto", "float32", "bf16"]
Schedule = Literal["constant", "warmup", "ramp"]
STEPS_BETWEEN_LOSS_CHECKS = 50
CPU_VECTOR = 16  # floats of AVX-512; shorter ones elsewhere


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training.

    Attributes:
        epochs: Passes over the training images.
        lr: Highest learning rate: reached linearly over the warm-up, left along a cosine.
        batch_size: Images a step.
        warmup: Share of all steps.
        momentum: Of SGD, Nesterov's form.
        weight_decay: Of weights; not of biases and BN parameters.
        distillation: Share of the loss that asks for a teacher's outputs instead of the labels
            (Hinton et al. 2015, arXiv 1503.02531), where there is a teacher.
        temperature: Softens both outputs for that share.
        schedule: How a penalty rises over the training, see `penalty_share`.
        seed: Of data order, augmentation and dropout.
        precision: ``"bf16"`` autocasts; ``"auto"`` does so where it is faster, see
            `autocast_dtype`.
        compile: ``"on"``: `torch.compile` the model for training; ``"auto"`` does so where a few
            steps, timed with and without, say that it pays.
        color_jitter: See `rmprune.augmentation.Augmentation`.
        cutout: The same.
        sync_bn: Whether BNs normalise by the whole batch where several processes share it;
            otherwise each normalises by its part, and the first one's statistics are kept.
    """

    epochs: int
    lr: float = 0.1
    batch_size: int = 128
    warmup: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distillation: float = 0.7
    temperature: float = 4.0
    schedule: Schedule = "constant"
    seed: int = 0
    precision: Precision = "auto"
    compile: Compile = "auto"
    color_jitter: float = 0.0
    cutout: int = 0
    sync_bn: bool = False

    def __post_init__(self) -> None:
        limits = {"epochs": 0, "batch_size": 1, "lr": 0, "weight_decay": 0, "seed": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise UsageError(f"{name} must be finite and at least {least}, but it is {value}")


# The outputs ``(N, classes)`` for images ``(N, 3, H, W)``.
Teach = Callable[[Tensor], Tensor]
# The mean loss of a batch.
LossOf = Callable[[Lesson], Tensor]


class Pull(Protocol):
    """A penalty: what is added to gradients besides those of the loss."""

    def add_to_gradients(self, share: float = 1.0) -> None:
        """Add a share of the penalty's subgradient; gradients must not be scaled."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave.

    Attributes:
        epoch: Counted from 1.
        loss: Mean over the training batches, the penalty not included.
        test_accuracy: Share of the test images, after the epoch.
        lr: Of the epoch's last step.
    """

    epoch: int
    loss: float
    test_accuracy: float
    lr: float


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The learning rate of one step: linear warm-up, then half a cosine to zero."""
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def penalty_share(schedule: Schedule, progress: float) -> float:
    """How much of a penalty acts at some point of the training.

    Args:
        schedule: ``"constant"``: all of it; ``"warmup"``: it rises linearly over the first
            tenth; ``"ramp"``: over the first half.
        progress: Share of all steps done.
    """
    rise = {"constant": 0.0, "warmup": 0.1, "ramp": 0.5}[schedule]
    return 1.0 if progress >= rise else progress / rise


def total_step_size(config: TrainingConfig, data: Dataset) -> float:
    """How far a penalty's gradient of 1 moves a parameter in the whole training."""
    steps = config.epochs * batch_count(data.train, config.batch_size)
    total = sum(
        learning_rate(config, step, steps) * penalty_share(config.schedule, step / steps)
        for step in range(steps)
    )
    return total / (1 - config.momentum)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, or None for float32 throughout.

    ``"auto"`` takes bf16 on GPUs that compute it, and on CPUs with AMX. Those with AVX-512's bf16
    products alone train faster in float32.

    Raises:
        UsageError: The precision is unknown.
    """
    if precision == "float32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if precision != "auto":
        raise UsageError(f"unknown precision {precision!r}; known: auto, float32, bf16")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if device.type == "cpu" and _has_amx() else None


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """How to lay out a model to train it: channels_last, which is faster, wherever it is right.

    On CPUs oneDNN writes past its memory in the weight gradients of strided 1×1 convolutions in
    channels_last whose input has fewer channels than a vector has floats
    (https://github.com/uxlfoundation/oneDNN/issues/6035): they come out wrong, or it crashes.
    """
    narrow = any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < CPU_VECTOR
        for module in model.modules()
    )
    return torch.contiguous_format if device.type == "cpu" and narrow else torch.channels_last


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.SGD:
    """SGD over a model's parameters, with weight decay on convolutions and linear layers."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters()
        if isinstance(module, norms) or name.startswith("bias")
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if id(parameter) not in exempt]
    others = [parameter for parameter in parameters if id(parameter) in exempt]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=True,
    )


def distillation_loss(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(targets / T) ‖ softmax(outputs / T))`` (Hinton et al. 2015, section 2).

    Args:
        outputs: The student's, ``(N, classes)``.
        targets: The teacher's, ``(N, classes)``.
        temperature: T.

    Returns:
        The mean over the batch.
    """
    student, teacher = (F.log_softmax(t / temperature, dim=1) for t in (outputs, targets))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainingConfig,
    *,
    penalty: Pull | None = None,
    teacher: nn.Module | None = None,
    kept: Path | None = None,
    device: torch.device | str = "cpu",
    resume_from: dict[str, Any] | None = None,
    after_epoch: Callable[[EpochResult, dict[str, Any]], None] | None = None,
    track: Track = no_progress,
    note: Callable[[], str] = str,
) -> list[EpochResult]:
    """Train a model in place; it is left in evaluation mode.

    Args:
        model: Any network that maps ``(N, 3, H, W)`` to ``(N, classes)``.
        data: Images and how to augment them.
        config: See `TrainingConfig`.
        penalty: Sparsity's pull on the channel scales.
        teacher: A model whose outputs are to be learned too; it stays as it is.
        kept: A folder for the teacher's outputs, which trainings of the same data, augmentation,
            batch size and seed share; of one process only.
        device: Where to train; the model is moved there.
        resume_from: A state that ``after_epoch`` was given by an earlier run with the same
            arguments; training goes on behind that epoch.
        after_epoch: Called with every epoch's result and the state to resume from.
        track: Progress display.
        note: What else to show there of the model, behind the accuracy of the epoch before.

    Returns:
        The results of the epochs that this call trained.

    Raises:
        TrainingError: The loss is no longer finite.
        UsageError: There are more processes than images in a batch.
    """
    device = torch.device(device)
    data = replace(data, train=resident(data.train, device), test=resident(data.test, device))
    layout = memory_format(model, device)
    model.to(device).to(memory_format=layout)
    optimizer = make_optimizer(model, config)
    first_epoch, is_compiled = 0, None
    if resume_from is not None:
        model.load_state_dict(resume_from["model"])
        optimizer.load_state_dict(resume_from["optimizer"])
        first_epoch, is_compiled = resume_from["epoch"], resume_from["compiled"]
    dtype = autocast_dtype(config.precision, device)
    steps = batch_count(data.train, config.batch_size)
    batch = min(config.batch_size, len(data.train.labels))
    if teacher is not None:
        teacher = copy.deepcopy(teacher).eval().to(device).to(memory_format=layout)
    functions = partial(_functions, _shared(model, batch), teacher, config, device, dtype)
    if is_compiled is None:
        is_compiled = _should_compile(functions, model, data, config, device)
    loss_of, teach = functions(is_compiled)
    kept_as = None
    if kept is not None and teacher is not None and processes.count() == 1:
        kept_as = kept / key(teacher, _of_batches(data, config), device.type)
    results: list[EpochResult] = []
    for epoch in range(first_epoch, config.epochs):
        model.train()
        # Dropout draws from the global generator, for other images in every process.
        torch.manual_seed(_mixed(config.seed, epoch) + processes.rank())
        label = f"epoch {epoch + 1}/{config.epochs}"
        if results:
            label += f", accuracy {results[-1].test_accuracy:.1%}{note()}"
        meter = _Meter(batch)
        pairs = _epoch_batches(data, config, epoch, device, layout)
        path = None if kept_as is None else kept_as / f"{epoch}.safetensors"
        batches = track(lessons(pairs, teach, path), steps, label, meter.status)
        rates = [
            learning_rate(config, epoch * steps + step, config.epochs * steps)
            for step in range(steps)
        ]
        shares = [
            penalty_share(config.schedule, (epoch + step / steps) / config.epochs)
            for step in range(steps)
        ]
        with _normalising(model, config):
            loss = _train_epoch(batches, rates, shares, loss_of, optimizer, penalty, meter)
        accuracy = _accuracy(model, data, device, dtype, layout)
        result = EpochResult(epoch + 1, loss, accuracy, rates[-1])
        results.append(result)
        if after_epoch is not None:
            state = {
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "compiled": is_compiled,
            }
            after_epoch(result, state)
    model.eval()
    return results


def _shared(model: nn.Module, batch_size: int) -> nn.Module:
    """The model, with its gradients averaged over all processes."""
    if processes.count() == 1:
        return model
    if processes.count() > batch_size:
        raise UsageError(
            f"{processes.count()} processes cannot share batches of {batch_size} images; "
            "start fewer, or give a larger --batch-size"
        )
    return DistributedDataParallel(model)


def _accuracy(
    model: nn.Module,
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype | None,
    layout: torch.memory_format,
) -> float:
    """Share of the test images, of which every process takes its part."""
    images = len(data.test.labels)
    counts = (0, 0)
    if processes.rank() < images or images == 0:  # there may be fewer than processes
        counts = evaluate(
            model,
            data.test.at(processes.part(images)),
            mean=data.mean,
            std=data.std,
            device=device,
            autocast=dtype,
            memory_format=layout,
        )
    correct, evaluated = processes.total(torch.tensor(counts)).tolist()
    return float(correct / evaluated)


def _functions(
    model: nn.Module,
    teacher: nn.Module | None,
    config: TrainingConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    compile_it: bool,
) -> tuple[LossOf, Teach | None]:
    """What is minimised, and the teacher as a function."""

    def called(module: nn.Module) -> Teach:
        forward: Teach = compiled(module, device) if compile_it else module

        def outputs_of(images: Tensor) -> Tensor:
            if compile_it:
                begin_step(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                outputs = forward(images)
            return outputs.float()

        return outputs_of

    student = called(model)

    def loss_of(lesson: Lesson) -> Tensor:
        images, labels, targets = lesson
        outputs = student(images)
        loss = F.cross_entropy(outputs, labels)
        if targets is None:
            return loss
        distilled = distillation_loss(outputs, targets, config.temperature)
        return torch.lerp(loss, distilled, config.distillation)

    if teacher is None:
        return loss_of, None
    asked = called(teacher)

    def teach(images: Tensor) -> Tensor:
        with torch.no_grad():
            return asked(images).clone()  # results of a CUDA graph hold until the next step

    return loss_of, teach


def _should_compile(
    functions: Callable[[bool], tuple[LossOf, Teach | None]],
    model: nn.Module,
    data: Dataset,
    config: TrainingConfig,
    device: torch.device,
) -> bool:
    """Whether to compile the loss; measured if the config leaves it open."""
    steps = config.epochs * batch_count(data.train, config.batch_size)
    if config.compile != "auto" or not is_worth_timing(steps):
        return config.compile == "on"
    layout = memory_format(model, device)
    batch = next(_epoch_batches(data, config, 0, device, layout))

    def step(loss_of: LossOf, teach: Teach | None) -> float:
        loss = loss_of(next(lessons([batch], teach)))
        torch.autograd.backward(loss)
        model.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    model.train()
    with undone(model, device), _normalising(model, config):
        eager, compiled_step = (partial(step, *functions(choice)) for choice in (False, True))
        return pays(eager, compiled_step, steps)


def _normalising(model: nn.Module, config: TrainingConfig) -> AbstractContextManager[object]:
    """BNs that normalise by the batches of all processes inside, if that is wanted."""
    return synchronized(model) if config.sync_bn else nullcontext()


def _of_batches(data: Dataset, config: TrainingConfig) -> tuple[object, ...]:
    """Whatever decides over the batches of an epoch."""
    settings = (config.batch_size, config.seed, config.color_jitter, config.cutout)
    images = (data.train.digest(), data.augmentation, data.mean, data.std)
    return (*settings, config.precision, *images)


def _epoch_batches(
    data: Dataset,
    config: TrainingConfig,
    epoch: int,
    device: torch.device,
    layout: torch.memory_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    return train_batches(
        data.train,
        config.batch_size,
        generator=torch.Generator().manual_seed(_mixed(config.seed, epoch)),
        augmentation=replace(
            data.augmentation, color_jitter=config.color_jitter, cutout=config.cutout
        ),
        mean=data.mean,
        std=data.std,
        device=device,
        memory_format=layout,
        part=processes.part(config.batch_size),
    )


@dataclass
class _Meter:
    """How an epoch goes.

    Attributes:
        batch_size: Images that all processes together have in a step.
        steps: Taken so far.
        loss: Mean of this process's steps, when it was last looked at: that takes time on a GPU.
        begin: When the epoch began, in seconds.
    """

    batch_size: int
    steps: int = 0
    loss: float = math.nan
    begin: float = field(default_factory=time.perf_counter)

    def status(self) -> str:
        """For a progress bar."""
        rate = self.steps * self.batch_size / (time.perf_counter() - self.begin)
        return f"{rate:,.0f} images/s, loss {self.loss:.3f}"


def _train_epoch(
    batches: Iterable[Lesson],
    rates: Sequence[float],
    shares: Sequence[float],
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    penalty: Pull | None,
    meter: _Meter,
) -> float:
    """Take one step for each batch, learning rate and share; return the mean loss.

    Args:
        batches: This process's parts of them.
        rates: Learning rates.
        shares: Of the penalty.
        loss_of: Their mean loss.
        optimizer: Of all parameters.
        penalty: Added to the gradients.
        meter: Told of every step; knows how many images all processes together have in one.
    """
    total: Tensor | float = 0.0
    for step, (batch, rate, share) in enumerate(zip(batches, rates, shares, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        # The mean over processes is then the mean over the batch, however it was divided.
        loss = loss_of(batch) * (len(batch[1]) * processes.count() / meter.batch_size)
        torch.autograd.backward(loss)
        if penalty is not None:
            penalty.add_to_gradients(share)
        optimizer.step()
        total = total + loss.detach()
        if step % STEPS_BETWEEN_LOSS_CHECKS == 0 or step == len(rates) - 1:
            meter.loss = float(total) / (step + 1)
            _check_finite(meter.loss, max(rates))
        meter.steps += 1
    sums = processes.total(torch.as_tensor(total, dtype=torch.float64, device="cpu"))
    return float(sums) / len(rates) / processes.count()


def _check_finite(loss: float, rate: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is no longer finite, at learning rate {rate:.3g}; try a smaller --lr, "
            "--precision float32, or weights that are trained; the checkpoint of the epoch "
            "before is whole"
        )


def _mixed(seed: int, epoch: int) -> int:
    """One seed from two numbers; large odd factors keep (seed, epoch) pairs apart."""
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % 2**63
