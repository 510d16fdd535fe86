"""What a teacher says of the augmented images of a training, kept for trainings of the same images.

Data order and augmentation are functions of (seed, epoch), so that all fine-tunings of a sweep ask
the same teacher about the same images: one of them computes the outputs, the others read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.errors import StoreError
from rmprune.store import load_tensors, save_tensors

# An epoch of ImageNet has 5 GB of outputs, which are not worth their disk.
MOST_BYTES_AN_EPOCH = 2**26

# Images ``(N, 3, H, W)``, labels ``(N,)``, and a teacher's outputs ``(N, classes)``.
Lesson = tuple[Tensor, Tensor, Tensor | None]


def lessons(
    batches: Iterable[tuple[Tensor, Tensor]],
    teach: Callable[[Tensor], Tensor] | None,
    path: Path | None = None,
) -> Iterator[Lesson]:
    """Batches with a teacher's outputs.

    Args:
        batches: Images and labels, at least one, all of one size.
        teach: The teacher; None leaves its outputs out.
        path: Read if it exists and is whole, else written behind the last batch, unless it would
            be too large. It must have a name of its own for all that the outputs depend on, see
            `key`.
    """
    if teach is None:
        yield from ((images, labels, None) for images, labels in batches)
        return
    kept = _kept(path)
    if kept is not None:
        for (images, labels), outputs in zip(batches, kept, strict=True):
            yield images, labels, outputs.to(images.device, non_blocking=True)
        return
    said: list[Tensor] = []
    for images, labels in batches:
        outputs = teach(images)
        if path is not None and (len(said) + 1) * outputs.nbytes <= MOST_BYTES_AN_EPOCH:
            said.append(outputs)
        else:
            path, said = None, []
        yield images, labels, outputs
    if path is not None:
        save_tensors({"outputs": torch.stack(said)}, path)


def _kept(path: Path | None) -> Tensor | None:
    """The outputs in a file; None where there is none that can be read: they can be had again."""
    if path is None or not path.exists():
        return None
    try:
        return load_tensors(path)["outputs"]
    except (StoreError, KeyError):
        return None


def key(teacher: nn.Module, *settings: object) -> str:
    """A name for a teacher and all else that its outputs depend on."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
