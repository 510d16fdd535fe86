"""Batches of images: shuffled, augmented, normalised, on the device that trains."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rmprune.augmentation import Augmentation, crop_and_flip, cut_out, draw, jitter
from rmprune.data import Split
from rmprune.errors import DataError
from rmprune.folders import ImageFiles, decoders

EVERYTHING = slice(None)
SEEDS = 2**62
RESIDENT_SHARE = 0.25  # of a GPU's free memory; the rest is for the model


def batch_count(split: Split, batch_size: int) -> int:
    """Batches of one epoch of `train_batches`."""
    return max(1, len(split.labels) // batch_size)


def train_batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator,
    augmentation: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    part: slice = EVERYTHING,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented and normalised batches; a last, smaller one is left out.

    Images in files are cropped at random scales by workers that decode them, too.

    Args:
        split: Images and labels.
        batch_size: Images in a batch; all, where the split has fewer.
        generator: On the CPU; the only source of randomness.
        augmentation: What to do with the images.
        mean: Subtracted from each channel of the images in [0, 1].
        std: Divides each channel afterwards.
        device: Where the batches go.
        dtype: Of the images.
        memory_format: Of the images.
        part: Which images of each batch, where several processes share it.

    Yields:
        Images ``(batch_size, 3, H, W)`` and labels ``(batch_size,)``, or the part of them.

    Raises:
        DataError: An image cannot be read.
    """
    order = torch.randperm(len(split.labels), generator=generator)
    size = min(batch_size, len(order))
    positions, changes, seeds = [], [], []
    for chosen in torch.split(order[: len(order) // size * size], size):
        positions.append(chosen[part])
        changes.append(draw(size, augmentation, generator).at(part, device))
        if isinstance(split.images, ImageFiles):
            seeds.append(torch.randint(SEEDS, (size,), generator=generator)[part])
    exact = _exact(dtype)
    shift, factor = _statistics(mean, std, device, exact)
    batches = _read(split, positions, seeds or None, device)
    for (pixels, labels), draws in zip(batches, changes, strict=True):
        values = crop_and_flip(pixels, augmentation, draws).to(exact)
        if draws.factors is not None:
            values = jitter(values, draws.factors)
        values = values.sub_(shift).div_(factor)
        if draws.centres is not None:
            values = cut_out(values, augmentation.cutout, draws.centres)
        # Last of all: CPUs do the steps before three times as fast where channels lie apart.
        yield values.to(dtype, memory_format=memory_format), labels


def eval_batches(
    split: Split,
    batch_size: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, normalised; the arguments are those of `train_batches`."""
    exact = _exact(dtype)
    shift, factor = _statistics(mean, std, device, exact)
    positions = torch.split(torch.arange(len(split.labels)), batch_size)
    for pixels, labels in _read(split, positions, None, device):
        values = pixels.to(exact).sub_(shift).div_(factor)
        yield values.to(dtype, memory_format=memory_format), labels


def resident(split: Split, device: torch.device) -> Split:
    """The images on a GPU, if they take at most a quarter of the memory that is free there.

    Args:
        split: Its batches are then made there.
        device: Where they are needed.
    """
    if device.type != "cuda" or isinstance(split.images, ImageFiles):
        return split
    free, _ = torch.cuda.mem_get_info(device)
    if split.images.nbytes > RESIDENT_SHARE * free:
        return split
    return Split(split.images.to(device), split.labels.to(device))


def _read(
    split: Split, positions: Sequence[Tensor], seeds: Sequence[Tensor] | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8, on the device; files are cropped by the seeds, if there are any."""
    labels = (split.labels[chosen.to(split.labels.device)] for chosen in positions)
    images = split.images
    if isinstance(images, ImageFiles):
        pixels: Iterator[Tensor] = _decoded(images, positions, seeds, pin=device.type == "cuda")
    else:
        pixels = (images[chosen.to(images.device)] for chosen in positions)
    for batch, classes in zip(pixels, labels, strict=True):
        # Bytes travel, not floats.
        yield batch.to(device, non_blocking=True), classes.to(device, non_blocking=True)


def _decoded(
    images: ImageFiles, positions: Sequence[Tensor], seeds: Sequence[Tensor] | None, *, pin: bool
) -> Iterator[Tensor]:
    """Batches of files, read by workers."""
    keys = (
        list(zip(chosen.tolist(), seeds[batch].tolist() if seeds else repeat(None), strict=False))
        for batch, chosen in enumerate(positions)
    )
    # A fork of this process would copy the locks of its threads: of torch, of OpenVINO.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        _Files(images),
        multiprocessing_context=context,
        batch_sampler=keys,
        num_workers=decoders(),
        collate_fn=_stacked,
        pin_memory=pin,
    )
    for batch in _quietly(loader):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _quietly(loader: DataLoader[Any]) -> Iterator[Any]:
    """A loader's batches, with the handler of SIGCHLD that was there before.

    torch leaves its own for good. With it a process that has used OpenVINO crashed when a compiler
    that it had started ended. Dead workers are still found: torch looks every few seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # which sets none there
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return batches


class _Files(torch.utils.data.Dataset[Tensor | DataError]):
    """Files for workers, whose exceptions would lose their one line on the way."""

    def __init__(self, images: ImageFiles) -> None:
        self._images = images

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor | DataError:
        try:
            return self._images.read(*key)
        except DataError as error:
            return error


def _stacked(items: list[Tensor | DataError]) -> Tensor | DataError:
    found = []
    for item in items:
        if isinstance(item, DataError):
            return item
        found.append(item)
    return torch.stack(found)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What to normalise in: at least float32, whatever the result."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What to subtract from, and to divide bytes by, ``(1, C, 1, 1)`` each."""
    shift, factor = (
        torch.tensor(values, dtype=torch.float64).mul(255).to(device, dtype).view(1, -1, 1, 1)
        for values in (mean, std)
    )
    return shift, factor
