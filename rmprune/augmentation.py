"""Random changes of training images: whole batches at once, on the device where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as Pillow and torchvision take it
WHITE = 255.0


@dataclass(frozen=True)
class Augmentation:
    """What training does to its images.

    Attributes:
        padding: Black pixels on each side, of which a random crop may show as many.
        flip: Whether every second image, at random, is mirrored.
        color_jitter: Brightness, contrast and saturation are multiplied, in this order, by
            factors from ``[1 - color_jitter, 1 + color_jitter]``.
        cutout: Side in pixels of a square that is set to the mean colour, anywhere, so that a
            part of it may lie outside (DeVries and Taylor 2017, arXiv 1708.04552).
    """

    padding: int = 4
    flip: bool = True
    color_jitter: float = 0.0
    cutout: int = 0


@dataclass(frozen=True)
class Draws:
    """What is done to each of N images.

    Attributes:
        rows: Where in the padded image the crop begins, ``(N,)``.
        columns: The same, from the left.
        flipped: Whether the crop is mirrored, if that is wanted, ``(N,)`` of bool.
        factors: Of brightness, contrast and saturation, ``(N, 3)``; None without jitter.
        centres: Of the squares, as shares of height and width, ``(N, 2)``; None without cutout.
    """

    rows: Tensor
    columns: Tensor
    flipped: Tensor
    factors: Tensor | None
    centres: Tensor | None

    def at(self, positions: slice, device: torch.device) -> Draws:
        """Those of some of the images, on a device."""

        def chosen(values: Tensor) -> Tensor:
            return values[positions].to(device, non_blocking=True)

        return Draws(
            chosen(self.rows),
            chosen(self.columns),
            chosen(self.flipped),
            None if self.factors is None else chosen(self.factors),
            None if self.centres is None else chosen(self.centres),
        )


def draw(count: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """What to do with so many images, at random.

    Args:
        count: N.
        augmentation: What can be done.
        generator: On the CPU, where the draws are then, too.
    """
    rows, columns = torch.randint(0, 2 * augmentation.padding + 1, (2, count), generator=generator)
    flipped = torch.rand(count, generator=generator) < 0.5
    factors = centres = None
    if augmentation.color_jitter:
        spread = 2 * torch.rand(count, 3, generator=generator) - 1
        factors = 1 + augmentation.color_jitter * spread
    if augmentation.cutout:
        centres = torch.rand(count, 2, generator=generator)
    return Draws(rows, columns, flipped, factors, centres)


def crop_and_flip(images: Tensor, augmentation: Augmentation, draws: Draws) -> Tensor:
    """Move and mirror a batch, each image in its own way.

    Args:
        images: ``(N, C, H, W)``.
        augmentation: What to do.
        draws: On the same device.

    Returns:
        The same shape; a new tensor, if anything is to be done.
    """
    height, width = images.shape[2:]
    padding = augmentation.padding
    if padding:
        windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        every = torch.arange(len(images), device=images.device)
        images = windows[every, :, draws.rows, draws.columns]
    if augmentation.flip:
        images = torch.where(draws.flipped[:, None, None, None], images.flip(3), images)
    return images


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, then contrast, then saturation, as torchvision defines them.

    Args:
        images: ``(N, 3, H, W)``, RGB in [0, 255], floating point.
        factors: ``(N, 3)``; 1 leaves an image as it is.

    Returns:
        The same shape and range.
    """
    brightness, contrast, saturation = factors.to(images.dtype)[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, WHITE)
    mean_grey = _grey(images).mean((2, 3), keepdim=True)
    images = torch.lerp(mean_grey, images, contrast).clamp(0, WHITE)
    return torch.lerp(_grey(images), images, saturation).clamp(0, WHITE)


def _grey(images: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(GREY)).unsqueeze(1)


def cut_out(images: Tensor, size: int, centres: Tensor) -> Tensor:
    """Set a square of each image to zero.

    Args:
        images: ``(N, C, H, W)``.
        size: Of a side, in pixels.
        centres: As shares of height and width, ``(N, 2)``.

    Returns:
        The same shape.
    """
    inside = []
    for side, places in zip(images.shape[2:], centres.unbind(1), strict=True):
        begin = (places * side).floor() - size // 2
        offsets = torch.arange(side, device=images.device) - begin[:, None]
        inside.append((offsets >= 0) & (offsets < size))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)
