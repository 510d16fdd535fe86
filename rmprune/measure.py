"""What a network costs and how often it is right: the numbers that every result stands on.

One unit a quantity: parameters are counted, MACs are multiply-accumulates of one image,
latency is milliseconds of a forward pass of a whole batch, accuracy is a fraction. Nothing
here changes a model: modes (``train``, ``eval``) are put back as they were, module by module.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rmprune.batches import eval_batches
from rmprune.composed import squeezed
from rmprune.data import Dataset, Split
from rmprune.errors import UsageError
from rmprune.progress import Track, no_progress

WIDE_SPREAD = 0.10  # interquartile range over median from which a latency is doubtful


class WideSpreadWarning(UserWarning):
    """The samples of a latency differ so much that small differences mean nothing."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per forward pass of a whole batch, in evaluation mode.

    Attributes:
        median_ms: Median over the rounds.
        iqr_ms: Interquartile range over the rounds.
        samples_ms: One mean of consecutive passes per round, in the order measured.
        batch_size: Images in a pass.
        threads: Intra-op threads of the CPU.
        device: As torch names it.
        dtype: Of the input.
        backend: What ran the network.
    """

    median_ms: float
    iqr_ms: float
    samples_ms: tuple[float, ...]
    batch_size: int
    threads: int
    device: str
    dtype: str
    backend: str = "torch"


@dataclass(frozen=True)
class Report:
    """What one network costs and how often it is right.

    Attributes:
        params: As `count_params` counts.
        macs: Of one image, as `count_macs` counts.
        accuracy: Fraction of the test images classified correctly; None if not measured.
        correct: Test images classified correctly; None if not measured.
        images: Test images; None if not measured.
        latency: None if not measured.
    """

    params: int
    macs: int
    accuracy: float | None = None
    correct: int | None = None
    images: int | None = None
    latency: Latency | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = asdict(self)
        if self.latency is not None:
            values["latency"]["samples_ms"] = list(self.latency.samples_ms)
        return values


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def count_params(model: nn.Module) -> int:
    """Elements of all parameters, BN's scales and shifts among them.

    Buffers (BN's running statistics) are not counted; a shared parameter counts once.
    """
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of one image: half of what ``torch.utils.flop_counter`` counts.

    Convolutions and matrix products are counted, with taps that fall on padding. Biases, BN,
    activations, pooling and additions are not. A kernel that is composed of others counts as it
    is deployed, composed once.

    Args:
        model: Any network, on the input's device and of its dtype.
        example_input: ``(N, C, H, W)``; N is divided out.

    Raises:
        UsageError: The input holds no image.
    """
    images, model = _batch_size(example_input), squeezed(model)
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input)
    return int(counter.get_total_flops()) // (2 * images)


def layer_macs(net: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """MACs of one image in each layer that has no layers inside, as `count_macs` counts.

    Args:
        net: A net without functions of its own between its layers.
        input_shape: ``(channels, height, width)``.

    Returns:
        One entry per layer, by path, in order; 0 where nothing is counted. They sum to
        `count_macs`.
    """
    like = next(net.parameters(), torch.empty(0))
    x = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    with eval_mode(net), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    flops = counter.get_flop_counts()
    root = type(net).__name__
    return {
        name: sum(flops.get(f"{root}.{name}", {}).values()) // 2
        for name, layer in net.named_modules()
        if not any(layer.children())
    }


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str,
    batch_size: int = 100,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    track: Track = no_progress,
) -> tuple[int, int]:
    """Count the images of a split that a model classifies correctly.

    Args:
        model: On ``device`` and of ``dtype`` already; in evaluation mode meanwhile.
        split: Images and labels; every image counts once.
        mean: Subtracted from each channel of the images in [0, 1].
        std: Divides each channel afterwards.
        device: Where the model is.
        batch_size: Images in a forward pass.
        dtype: Of the images.
        autocast: Lower precision to run in (``torch.bfloat16``); None is full precision.
        memory_format: Of the images.
        track: Shows the progress over the batches.

    Returns:
        Images classified correctly, and images.

    Raises:
        UsageError: There is no image, or a label lies outside the model's outputs.
    """
    images = len(split.labels)
    if images == 0:
        raise UsageError("there is no image to evaluate on")
    device = torch.device(device)
    highest = int(split.labels.max())
    # Summed on the device, so that no batch waits for the one before it.
    correct = torch.zeros((), dtype=torch.int64, device=device)
    batches = eval_batches(
        split,
        batch_size,
        mean=mean,
        std=std,
        device=device,
        dtype=dtype,
        memory_format=memory_format,
    )
    precision = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with eval_mode(model), torch.inference_mode(), precision:
        for x, y in track(batches, math.ceil(images / batch_size), "evaluate"):
            logits = model(x)
            if highest >= logits.shape[1]:
                raise UsageError(
                    f"the model has {logits.shape[1]} outputs, but there is an image of class"
                    f" {highest}; choose the data set that it was trained for"
                )
            correct += (logits.argmax(1) == y).sum()
    return int(correct), images


def latency(
    models: Mapping[str, nn.Module],
    example_input: Tensor | Mapping[str, Tensor],
    *,
    threads: int = 1,
    rounds: int = 15,
    min_seconds: float = 0.1,
    backend: str = "torch",
) -> dict[str, Latency]:
    """Time models against each other in one run, in turn.

    Every round times every model once, beginning with the next one each time, so that a
    machine that slows down or speeds up does so for all; ratios within one call are what to
    trust. A first round is thrown away. On CUDA each timing waits for the device.

    Args:
        models: By name, on the input's device and of its dtype.
        example_input: ``(N, C, H, W)``, the batch to time; of all models or by name.
        threads: Intra-op threads of the CPU.
        rounds: Samples per model, at least 2.
        min_seconds: How long a sample lasts at least; several passes if one is shorter.
        backend: What runs the models, to be noted in the results.

    Raises:
        UsageError: No image, fewer than 2 rounds, or no thread.

    Warns:
        WideSpreadWarning: The interquartile range exceeds 10 % of the median.
    """
    inputs = (
        dict.fromkeys(models, example_input) if isinstance(example_input, Tensor) else example_input
    )
    batch_sizes = {name: _batch_size(x) for name, x in inputs.items()}
    if rounds < 2:
        raise UsageError(f"a spread needs at least 2 rounds of latency, not {rounds}")
    if threads < 1:
        raise UsageError(f"latency needs at least 1 thread, not {threads}")
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        samples = _interleaved(models, inputs, threads, rounds, min_seconds)
    results = {}
    for name, samples_ms in samples.items():
        lower, median, upper = statistics.quantiles(samples_ms, n=4, method="inclusive")
        if upper - lower > WIDE_SPREAD * median:
            warnings.warn(
                f"latency of {name}: the interquartile range is {(upper - lower) / median:.0%} of"
                " the median; leave the machine idle, or take more or longer rounds",
                WideSpreadWarning,
                stacklevel=2,
            )
        results[name] = Latency(
            median_ms=median,
            iqr_ms=upper - lower,
            samples_ms=tuple(samples_ms),
            batch_size=batch_sizes[name],
            threads=threads,
            device=str(inputs[name].device),
            dtype=str(inputs[name].dtype).removeprefix("torch."),
            backend=backend,
        )
    return results


def _interleaved(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    threads: int,
    rounds: int,
    min_seconds: float,
) -> dict[str, list[float]]:
    """Milliseconds per pass: one sample per model and round, in the models' order."""
    # Here, because importing it makes torch look for compilers and log what it does not find.
    from torch.utils.benchmark import Timer

    # Timer synchronises CUDA, sets and restores the threads, and runs at least two passes
    # before each timing, which fills the caches again after another model's turn.
    timers = {
        name: Timer("model(x)", globals={"model": model, "x": inputs[name]}, num_threads=threads)
        for name, model in models.items()
    }
    passes = {
        name: max(1, math.ceil(min_seconds / timer.timeit(1).median))
        for name, timer in timers.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(-1, rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds = timers[name].timeit(passes[name]).median
            if turn >= 0:
                samples[name].append(1000 * seconds)
    return samples


def measure(
    net: nn.Module,
    example_input: Tensor,
    data: Dataset | None = None,
    *,
    timed: bool = True,
    threads: int = 1,
    rounds: int = 15,
    min_seconds: float = 0.1,
    batch_size: int = 100,
    autocast: torch.dtype | None = None,
    track: Track = no_progress,
) -> Report:
    """Measure one network: parameters, MACs, accuracy on the whole test set, latency.

    Nets that are to be compared by latency belong into one call of `latency` instead.

    Args:
        net: On the example input's device and of its dtype.
        example_input: ``(N, C, H, W)``, the batch to time.
        data: Its test images are classified; None leaves the accuracy out.
        timed: Whether to measure the latency.

    The other options are those of `evaluate` and `latency`.

    Raises:
        UsageError: As `evaluate` and `latency` do.
    """
    correct = images = None
    if data is not None:
        correct, images = evaluate(
            net,
            data.test,
            mean=data.mean,
            std=data.std,
            device=example_input.device,
            batch_size=batch_size,
            dtype=example_input.dtype,
            autocast=autocast,
            track=track,
        )
    timing = None
    if timed:
        timing = latency(
            {"the net": net}, example_input, threads=threads, rounds=rounds, min_seconds=min_seconds
        )["the net"]
    return Report(
        params=count_params(net),
        macs=count_macs(net, example_input),
        accuracy=None if correct is None or images is None else correct / images,
        correct=correct,
        images=images,
        latency=timing,
    )


def _batch_size(example_input: Tensor) -> int:
    if example_input.ndim < 2 or len(example_input) == 0:
        shape = tuple(example_input.shape)
        raise UsageError(f"the example input must be a batch of at least one image, not {shape}")
    return len(example_input)
