"""Folders of images: small ones decoded once, large ones decoded whenever they are read.

Decoded images lie in a memory-mapped file and are served from it from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from rmprune.errors import DataError, UsageError, first_line
from rmprune.processes import cores
from rmprune.progress import Track

CACHE_LIMIT = 8 << 30  # bytes of decoded images above which files stay files


def decoders() -> int:
    """How many images this process reads at once."""
    return min(8, cores())


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that stay in their files; indexed like ``(N, 3, H, W)`` of uint8.

    Attributes:
        files: Paths as bytes, ``(N,)``: an array has no reference counts, which would make the
            workers that read it copy it page by page.
        image_size: Height and width in pixels that they are read at.
    """

    files: np.ndarray[Any, np.dtype[np.bytes_]]
    image_size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the array that they would be decoded to."""
        return len(self.files), 3, self.image_size, self.image_size

    def at(self, positions: Tensor | slice) -> ImageFiles:
        """Some of the files."""
        if isinstance(positions, Tensor):
            return ImageFiles(self.files[positions.numpy()], self.image_size)
        return ImageFiles(self.files[positions], self.image_size)

    def __getitem__(self, positions: Tensor | slice) -> Tensor:
        """Decode some of them.

        Raises:
            DataError: One cannot be read.
        """
        chosen = self.at(positions)
        with ThreadPoolExecutor(decoders()) as pool:
            return torch.stack(list(pool.map(chosen.read, range(len(chosen.files)))))

    def read(self, position: int, seed: int | None = None) -> Tensor:
        """Decode one.

        Args:
            position: Which.
            seed: Of a crop of random place, scale and shape (Szegedy et al. 2014,
                arXiv 1409.4842, section 6), resized; None takes the centre.

        Returns:
            ``(3, H, W)`` of uint8.

        Raises:
            DataError: It cannot be read.
        """
        file, size = Path(os.fsdecode(self.files[position])), self.image_size
        if seed is None:
            return torch.from_numpy(read_image(file, size).transpose(2, 0, 1).copy())
        crop = v2.RandomResizedCrop(size, antialias=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels: Tensor = crop(v2.functional.pil_to_tensor(_open(file)))
        return pixels


def open_images(
    folder: Path, classes: dict[str, list[Path]], image_size: int | None, track: Track
) -> Tensor | ImageFiles:
    """All images of a folder, class by class.

    Args:
        folder: For messages, and to know it again.
        classes: Its files.
        image_size: Height and width in pixels to resize them to; None keeps them.
        track: Shows the progress of decoding them for the first time.

    Returns:
        ``(N, 3, H, W)`` of uint8, memory-mapped, or their files if that were above `CACHE_LIMIT`.

    Raises:
        DataError: An image cannot be read, or has another size; or there is no space.
        UsageError: They are too many to be all looked at for their size.
    """
    files = [file for found in classes.values() for file in found]
    height, width = read_image(files[0], image_size).shape[:2]
    size = 3 * height * width * len(files)
    if size <= CACHE_LIMIT:
        return _cached_images(folder, files, image_size, track)
    if image_size is None:
        raise UsageError(
            f"{folder} has {size / 1e9:.0f} GB of pixels, too many to keep decoded; give "
            "--image-size, and they are read and resized in every epoch"
        )
    return ImageFiles(np.array([os.fsencode(file) for file in files]), image_size)


def listing(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class, in a fixed order."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}; images are expected as "
            f"{folder.parent}/train/CLASS/* and {folder.parent}/test/CLASS/* (or val)"
        )
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        files = {
            name: sorted(
                file for file in (folder / name).rglob("*") if file.suffix.lower() in endings
            )
            for name in classes
        }
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    if not classes:
        raise DataError(f"{folder} is empty; it needs one folder of images for each class")
    for name, found in files.items():
        if not found:
            raise DataError(f"class folder {folder / name} has no images ({', '.join(endings)})")
    return files


def cache_folder() -> Path:
    """Where decoded image folders are kept; follows ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmprune"


def _cached_images(folder: Path, files: list[Path], image_size: int | None, track: Track) -> Tensor:
    """All images, ``(N, 3, H, W)``, memory-mapped; decoded the first time."""
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
    shape = (3, *read_image(files[0], image_size).shape[:2])
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
        pixels = read_image(files[index], image_size)
        if pixels.shape[:2] != shape[1:]:
            raise DataError(
                f"images have different sizes: {files[index]} has {size_text(pixels.shape)} "
                f"pixels, {files[0]} {size_text(shape[1:])}; give --image-size"
            )
        images[index] = pixels.transpose(2, 0, 1)

    try:
        with ThreadPoolExecutor(decoders()) as pool:
            label = f"decode {folder.name}"
            for _ in track(pool.map(decode, range(len(files))), len(files), label):
                pass
        images.flush()
        temporary.replace(cache)
    finally:
        temporary.unlink(missing_ok=True)
    return images


def read_image(file: Path, image_size: int | None) -> np.ndarray[Any, Any]:
    """An image as ``(H, W, 3)`` of uint8, resized to ``image_size`` and cropped to a square."""
    colour = _open(file)
    if image_size is not None:
        colour = ImageOps.fit(colour, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(colour)


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # which "RGB" would clip to 255
                raise ValueError(f"pixels of mode {image.mode}, not of 8 bits a channel")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot read image {file} ({first_line(error)}); replace or remove it"
        ) from error


def size_text(shape: tuple[int, ...]) -> str:
    """Of ``(height, width, …)``, width first."""
    return f"{shape[1]}×{shape[0]}"
