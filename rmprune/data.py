"""Image data sets as uint8 arrays in memory, and batches of them.

A data set is two arrays, so that whole batches are shuffled, cropped and flipped at once.
Image folders are decoded once into a memory-mapped file and served from it from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from rmprune.errors import DataError, UsageError
from rmprune.progress import Track, no_progress

# The statistics that ImageNet models and the usual CIFAR weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
DIGITS_SIZE = 32  # pixels; the 8×8 originals would vanish in three stages of a ResNet
EVERYTHING = slice(None)
DECODERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: ``(N, 3, H, W)``, uint8.
        labels: ``(N,)``, int64.
    """

    images: Tensor
    labels: Tensor

    def at(self, indices: Tensor) -> Split:
        """Some of the images, ``(n,)`` by position."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the zero-padded image, and horizontal flip.

    Attributes:
        padding: Black pixels on each side, of which the crop may show as many.
        flip: Whether every second image, at random, is mirrored.
    """

    padding: int = 4
    flip: bool = True


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
    augmentation: Augmentation = Augmentation()

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
    return replace(
        data,
        train=Split(_resized(data.train.images, image_size), data.train.labels),
        test=Split(_resized(data.test.images, image_size), data.test.labels),
    )


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
            f"{name} is not in {root} and cannot be downloaded ({_first_line(error)}); "
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
    listings = {name: _listing(path / name) for name in ("train", test_name)}
    train_classes, test_classes = (list(listing) for listing in listings.values())
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))
        raise DataError(
            f"classes differ between {path / 'train'} and {path / test_name}: "
            f"{', '.join(odd[:5])} {'is' if len(odd) == 1 else 'are'} in one of them only"
        )
    splits = [
        Split(
            _cached_images(path / name, listing, image_size, track),
            torch.tensor([label for label, files in enumerate(listing.values()) for _ in files]),
        )
        for name, listing in listings.items()
    ]
    sizes = [tuple(split.images.shape[2:]) for split in splits]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"images in {path / 'train'} have {_size_text(sizes[0])} pixels and those in "
            f"{path / test_name} {_size_text(sizes[1])}; give --image-size"
        )
    return Dataset(spec, splits[0], splits[1], tuple(train_classes))


def _listing(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class, in a fixed order."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}; images are expected as "
            f"{folder.parent}/train/CLASS/* and {folder.parent}/test/CLASS/* (or val)"
        )
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        listing = {
            name: sorted(
                file for file in (folder / name).rglob("*") if file.suffix.lower() in endings
            )
            for name in classes
        }
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    if not classes:
        raise DataError(f"{folder} is empty; it needs one folder of images for each class")
    for name, files in listing.items():
        if not files:
            raise DataError(f"class folder {folder / name} has no images ({', '.join(endings)})")
    return listing


def cache_folder() -> Path:
    """Where decoded image folders are kept; follows ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmprune"


def _cached_images(
    folder: Path, listing: dict[str, list[Path]], image_size: int | None, track: Track
) -> Tensor:
    """All images of a folder, ``(N, 3, H, W)``, memory-mapped; decoded the first time."""
    files = [file for files in listing.values() for file in files]
    cache = cache_folder() / f"{_fingerprint(folder, files, image_size)}.npy"
    try:
        # Copy on write: the pages are shared, and nobody can damage the file through them.
        images = np.load(cache, mmap_mode="c")
        if images.shape[:2] == (len(files), 3) and images.dtype == np.uint8:
            return torch.from_numpy(images)
    except (OSError, ValueError):
        pass  # not there yet, or damaged
    return torch.from_numpy(_decode(folder, files, image_size, cache, track))


def _fingerprint(folder: Path, files: list[Path], image_size: int | None) -> str:
    """Changes when a file is added, removed or rewritten."""
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), image_size]).encode())
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        line = f"{file.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _decode(
    folder: Path, files: list[Path], image_size: int | None, cache: Path, track: Track
) -> np.ndarray[Any, Any]:
    shape = (3, *_read_image(files[0], image_size).shape[:2])
    temporary = cache.with_name(f"{cache.stem}-{uuid.uuid4().hex}.tmp")
    images: np.ndarray[Any, Any]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.uint8, shape=(len(files), *shape)
        )
        # A sparse file on a full disk would kill the process where it is written to.
        with temporary.open("rb+") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DataError(
            f"cannot keep the decoded images in {cache.parent} ({error.strerror}); free space "
            "there, or set XDG_CACHE_HOME to another folder"
        ) from error

    def decode(index: int) -> None:
        pixels = _read_image(files[index], image_size)
        if pixels.shape[:2] != shape[1:]:
            raise DataError(
                f"images have different sizes: {files[index]} has {_size_text(pixels.shape)} "
                f"pixels, {files[0]} {_size_text(shape[1:])}; give --image-size"
            )
        images[index] = pixels.transpose(2, 0, 1)

    try:
        with ThreadPoolExecutor(DECODERS) as pool:
            label = f"decode {folder.name}"
            for _ in track(pool.map(decode, range(len(files))), len(files), label):
                pass
        images.flush()
        temporary.replace(cache)
    finally:
        temporary.unlink(missing_ok=True)
    return images


def _read_image(file: Path, image_size: int | None) -> np.ndarray[Any, Any]:
    """An image as ``(H, W, 3)`` of uint8."""
    try:
        with Image.open(file) as image:
            colour = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot read image {file} ({_first_line(error)}); replace or remove it"
        ) from error
    if image_size is not None:
        colour = ImageOps.fit(colour, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(colour)


def _size_text(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def hold_out(data: Dataset, share: float) -> tuple[Dataset, Split]:
    """Keep a share of the training images back, the same ones every time.

    Args:
        data: Left as it is.
        share: Of the training images, at least 0 and less than 1.

    Returns:
        The data with fewer training images, and the images held out.

    Raises:
        UsageError: The share leaves nothing to train with.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the share to hold out must lie in [0, 1), but it is {share:g}")
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    kept = order[round(share * len(order)) :].sort().values
    held = order[: round(share * len(order))].sort().values
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

    Args:
        split: Images and labels.
        batch_size: Images in a batch; all, where the split has fewer.
        generator: On the CPU; the only source of randomness.
        augmentation: Crop and flip.
        mean: Subtracted from each channel of the images in [0, 1].
        std: Divides each channel afterwards.
        device: Where the batches go.
        dtype: Of the images.
        memory_format: Of the images.
        part: Which images of each batch, where several processes share it.

    Yields:
        Images ``(batch_size, 3, H, W)`` and labels ``(batch_size,)``, or the part of them.
    """
    normalise = _normaliser(mean, std, device, dtype, memory_format)
    order = torch.randperm(len(split.labels), generator=generator)
    size = min(batch_size, len(order))
    for start in range(0, len(order) - size + 1, size):
        index = order[start : start + size][part]
        draws = draw(size, augmentation, generator)
        images = augment(split.images[index], augmentation, *(drawn[part] for drawn in draws))
        yield normalise(images), split.labels[index].to(device)


def draw(
    count: int, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """What to do with so many images, at random.

    Args:
        count: N.
        augmentation: What can be done.
        generator: On the CPU.

    Returns:
        For `augment`: rows, columns and whether to flip, ``(N,)`` each.
    """
    rows, columns = torch.randint(0, 2 * augmentation.padding + 1, (2, count), generator=generator)
    return rows, columns, torch.rand(count, generator=generator) < 0.5


def augment(
    images: Tensor, augmentation: Augmentation, rows: Tensor, columns: Tensor, flipped: Tensor
) -> Tensor:
    """Crop and flip a batch, each image in its own way.

    Args:
        images: ``(N, C, H, W)``.
        augmentation: What to do.
        rows: Where in the padded image the crop begins, ``(N,)``.
        columns: The same, from the left.
        flipped: Whether to mirror the crop, if that is wanted, ``(N,)`` of bool.

    Returns:
        The same shape; a new tensor.
    """
    count, height, width = len(images), images.shape[2], images.shape[3]
    padding = augmentation.padding
    if padding:
        windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count), :, rows, columns]
    if augmentation.flip:
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    return images


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
    normalise = _normaliser(mean, std, device, dtype, memory_format)
    for start in range(0, len(split.labels), batch_size):
        chosen = slice(start, start + batch_size)
        yield normalise(split.images[chosen]), split.labels[chosen].to(device)


def _normaliser(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Callable[[Tensor], Tensor]:
    # Bytes travel to the device, and the arithmetic is at least float32 whatever the result.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shift, factor = (
        torch.tensor(values, dtype=torch.float64).mul(255).to(device, exact).view(1, -1, 1, 1)
        for values in (mean, std)
    )

    def normalise(images: Tensor) -> Tensor:
        values = images.to(device).to(exact, memory_format=memory_format)
        return values.sub_(shift).div_(factor).to(dtype)

    return normalise
