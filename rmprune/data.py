"""Image data sets: images, classes, and what training may do to them.

Small data sets are arrays of uint8 in memory, large image folders stay files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from rmprune.augmentation import Augmentation
from rmprune.errors import DataError, UsageError, first_line
from rmprune.folders import ImageFiles, listing, open_images, size_text
from rmprune.progress import Track, no_progress

# The statistics that ImageNet models and the usual CIFAR weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
DIGITS_SIZE = 32  # pixels; the 8×8 originals would vanish in three stages of a ResNet


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: ``(N, 3, H, W)`` of uint8, in memory or in files.
        labels: ``(N,)``, int64.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def at(self, positions: Tensor | slice) -> Split:
        """Some of the images; files stay files."""
        images = self.images
        chosen = images.at(positions) if isinstance(images, ImageFiles) else images[positions]
        return Split(chosen, self.labels[positions])

    def digest(self) -> str:
        """A name for these images: of their pixels, or of the files' names and the size."""
        pixels = self.images
        array = pixels.files if isinstance(pixels, ImageFiles) else pixels.cpu().numpy()
        found = hashlib.sha256(repr(pixels.shape).encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
        return found.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one size.

    Attributes:
        name: As given to `load_data`.
        train: For training.
        test: For the published accuracy, and nothing else.
        classes: Names, in the order of the labels.
        mean: Of each colour channel, of images in [0, 1].
        std: The same.
        augmentation: What training does to its images.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(
    spec: str,
    *,
    root: Path = Path("data"),
    image_size: int | None = None,
    track: Track = no_progress,
) -> Dataset:
    """Load a data set by name.

    Args:
        spec: ``digits`` (scikit-learn's, embedded: 1,437 training and 360 test images),
            ``cifar10``, ``cifar100``, or ``folder:PATH`` with ``PATH/train/CLASS/*`` and
            ``PATH/test/CLASS/*`` (or ``val``).
        root: Where cifar10 and cifar100 lie or are downloaded to.
        image_size: Height and width in pixels that images are resized to (the shorter side,
            then the centre is cropped). None keeps them; in a folder all must then be alike.
        track: Shows the progress of decoding a folder for the first time.

    Raises:
        UsageError: No such data set.
        DataError: The images are missing, unreadable or at odds with each other.
    """
    kind, _, argument = spec.partition(":")
    if kind == "folder" and argument:
        return _load_folder(Path(argument), spec, image_size, track)
    if spec == "digits":
        data = _load_digits()
    elif spec in ("cifar10", "cifar100"):
        data = _load_cifar(spec, root)
    else:
        raise UsageError(
            f"unknown data {spec!r}; known: digits, cifar10, cifar100, folder:PATH "
            "(with PATH/train and PATH/test)"
        )
    if image_size is None or image_size == data.train.images.shape[-1]:
        return data
    train, test = (
        Split(_resized(split.images[:], image_size), split.labels)
        for split in (data.train, data.test)
    )
    return replace(data, train=train, test=test)


def _load_digits() -> Dataset:
    # Here, because importing scikit-learn takes a second that other data need not wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    images = _resized(grey, DIGITS_SIZE).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    chosen = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=bunch.target, random_state=0
    )
    train, test = (
        Split(images[index].contiguous(), labels[index]) for index in map(torch.from_numpy, chosen)
    )
    classes = tuple(str(name) for name in bunch.target_names)
    # A mirrored 2 is no digit.
    return Dataset("digits", train, test, classes, augmentation=Augmentation(2, flip=False))


def _resized(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _load_cifar(name: str, root: Path) -> Dataset:
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    try:
        parts = [source[name](root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # the network's, the disk's and torchvision's own
        raise DataError(
            f"{name} is not in {root} and cannot be downloaded ({first_line(error)}); "
            f"put it there, or unpack it as images and give folder:PATH"
        ) from error
    train, test = (
        Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
        )
        for part in parts
    )
    return Dataset(name, train, test, tuple(parts[0].classes))


def _load_folder(path: Path, spec: str, image_size: int | None, track: Track) -> Dataset:
    test_name = "test" if (path / "test").is_dir() else "val"
    listings = {name: listing(path / name) for name in ("train", test_name)}
    train_classes, test_classes = (list(found) for found in listings.values())
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))
        raise DataError(
            f"classes differ between {path / 'train'} and {path / test_name}: "
            f"{', '.join(odd[:5])} {'is' if len(odd) == 1 else 'are'} in one of them only"
        )
    splits = [
        Split(
            open_images(path / name, classes, image_size, track),
            torch.tensor([label for label, files in enumerate(classes.values()) for _ in files]),
        )
        for name, classes in listings.items()
    ]
    sizes = [tuple(split.images.shape[2:]) for split in splits]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"images in {path / 'train'} have {size_text(sizes[0])} pixels and those in "
            f"{path / test_name} {size_text(sizes[1])}; give --image-size"
        )
    return Dataset(spec, splits[0], splits[1], tuple(train_classes))


def hold_out(data: Dataset, share: float) -> tuple[Dataset, Split]:
    """Keep a share of the training images back, the same ones every time.

    Args:
        data: Left as it is.
        share: Of the training images, at least 0 and less than 1.

    Returns:
        The data with fewer training images, and the images held out.

    Raises:
        UsageError: The share leaves nothing to train with, or nothing to hold out.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the share to hold out must lie in [0, 1), but it is {share:g}")
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    count = round(share * len(order))
    if share > 0 and not 0 < count < len(order):
        raise UsageError(
            f"of {len(order)} training images a share of {share:g} is {count}, which leaves "
            f"nothing to {'measure' if count == 0 else 'train'} with; choose another --holdout"
        )
    kept, held = order[count:].sort().values, order[:count].sort().values
    if share == 0:
        return data, data.train.at(held)
    return replace(data, train=data.train.at(kept)), data.train.at(held)


def calibration_images(data: Dataset, count: int) -> Split:
    """Training images to measure on, the same ones whenever they are asked for.

    Args:
        data: With that many training images, or fewer: then all.
        count: How many.
    """
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    return data.train.at(order[:count])
