"""Models by name, and weights that are checked before they are put in."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from rmprune.errors import UsageError, WeightsError
from rmprune.models import pnnh, repvgg, rgsnet, rmnext, unit_resnet
from rmprune.models.cifar_resnet import thin_resnet, wide_resnet
from rmprune.models.coder import pretrain_coders
from rmprune.models.mobilenet_rm import mobilenetv2_rm

TORCHVISION = "torchvision:"
TIMM = "timm:"

Builder = Callable[[int], nn.Module]  # of a number of classes

_BUILDERS: dict[str, Builder] = {
    **{f"resnet{layers}": partial(thin_resnet, layers) for layers in (20, 32, 44, 56, 110)},
    "resnet18": partial(wide_resnet, (2, 2, 2, 2)),
    "resnet34": partial(wide_resnet, (3, 4, 6, 3)),
    "mobilenetv2_rm": mobilenetv2_rm,
    **unit_resnet.BUILDERS,
    **rgsnet.BUILDERS,
    **pnnh.BUILDERS,
}
_FAMILIES = (repvgg, rmnext)  # whose names hold numbers


def model_names() -> list[str]:
    """The names of rmprune's own models; ``torchvision:`` and ``timm:NAME`` go besides."""
    return [*_BUILDERS, *(name for family in _FAMILIES for name in family.model_names())]


def create_model(
    name: str, *, num_classes: int = 10, weights: Path | str | None = None
) -> nn.Module:
    """Build a model, in training mode.

    Args:
        name: One of :func:`model_names`, or ``torchvision:NAME`` or ``timm:NAME`` for a
            classification network of torchvision or timm.
        num_classes: Outputs of the last layer.
        weights: State dict to load: ``.safetensors``, or a file of ``torch.save``, read
            without running code from it. If None, random weights, of which frozen ones are
            pretrained.

    Raises:
        UsageError: The name is unknown or the number of classes is not positive.
        WeightsError: The file cannot be read or does not fit the model.
    """
    model = build_model(name, num_classes)
    if weights is None:
        pretrain_coders(model)
    else:
        path = Path(weights)
        state = read_state_dict(path)
        _check_fit(state, model, name, num_classes, path)
        # Only num_batches_tracked can be missing now; it plays no part with a fixed momentum.
        model.load_state_dict(state, strict=False)
    return model


def build_model(name: str, num_classes: int) -> nn.Module:
    """The same to put weights into: all of them are random.

    Raises:
        UsageError: The name is unknown or the number of classes is not positive.
    """
    if num_classes < 1:
        raise UsageError(f"a model needs at least one class, not {num_classes}")
    if (builder := _builder(name)) is None:
        raise UsageError(f"unknown model {name!r}; {_nearest(name)}")
    return builder(num_classes)


def _builder(name: str) -> Builder | None:
    """What builds a model, if there is one of this name."""
    short = name.partition(":")[2]
    if name.startswith(TORCHVISION) and short in _torchvision_names():
        make = torchvision.models.get_model
        return lambda classes: make(short, weights=None, num_classes=classes)
    if name.startswith(TIMM) and short in _timm_names():
        return lambda classes: _timm().create_model(short, num_classes=classes)
    found = (family.builder_of(name) for family in _FAMILIES)
    return _BUILDERS.get(name) or next((builder for builder in found if builder), None)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, without running code from the file.

    A state dict inside ``{"state_dict": ...}`` or ``{"model": ...}`` is unwrapped, and a
    ``module.`` in front of all keys (``nn.DataParallel``) is taken away.

    Raises:
        WeightsError: The file is missing, unreadable, or holds something else.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a directory; name the file with the weights")
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; check the path of the weights")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict; save model.state_dict() instead")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path} is no state dict: {key!r} is of type {type(value).__name__}, not a tensor;"
                " save model.state_dict() instead"
            )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file: {_one_line(error)}"
        ) from error
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # A warning about an odd file is followed by the error that says it better.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise nearly anything
        head = path.read_bytes()[:4]
        if "Unsupported" in str(error) and head.startswith((b"PK", b"\x80")):
            raise WeightsError(
                f"{path} holds Python objects, and loading them could run code, so nothing was"
                " loaded; save model.state_dict() instead of the model"
            ) from error
        raise WeightsError(
            f"{path} is damaged or is no file of torch.save; copy or export the weights again"
        ) from error


def _check_fit(
    state: Mapping[str, Tensor], model: nn.Module, name: str, num_classes: int, path: Path
) -> None:
    """Raise a WeightsError, in one line, unless the state dict fits the model."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    missing = [
        key for key in expected if key not in found and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in found if key not in expected]
    wrong = [key for key in expected if key in found and found[key] != expected[key]]
    faults = []
    if missing:
        faults.append(f"{_some(missing)} missing")
    if unexpected:
        faults.append(f"{_some(unexpected)} unexpected")
    if wrong:
        faults.append(
            _some(
                f"{key} is {found[key]} in the file but {expected[key]} in the model"
                for key in wrong
            )
        )
    if not faults:
        return
    # Only the number of rows differs, and in the model it is the number of classes.
    only_classes = not (missing or unexpected) and all(
        expected[key][:1] == (num_classes,) and expected[key][1:] == found[key][1:] for key in wrong
    )
    question = "is --num-classes right?" if only_classes else "is it the right model?"
    raise WeightsError(f"{path} does not fit {name}: {'; '.join(faults)}: {question}")


def _some(texts: Iterable[str], limit: int = 3) -> str:
    """The first ``limit`` texts, and how many more there are."""
    all_texts = list(texts)
    more = len(all_texts) - limit
    return ", ".join(all_texts[:limit]) + (f" and {more} more" if more > 0 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _torchvision_names() -> list[str]:
    # Only this module's own: segmentation and detection models take other arguments,
    # and fetch weights for their backbones.
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UsageError(
            "names that begin with 'timm:' need timm; install it: pip install 'rmprune[timm]'"
        ) from error


def _timm_names() -> list[str]:
    names: list[str] = _timm().list_models()
    return names


def _nearest(name: str) -> str:
    """What to type instead of an unknown name."""
    if name.startswith(TIMM):
        near = difflib.get_close_matches(name.removeprefix(TIMM).lower(), _timm_names(), n=3)
        return (
            f"did you mean {' or '.join(TIMM + other for other in near)}?"
            if near
            else ("timm.list_models() lists timm's")
        )
    if name in _torchvision_names():
        return f"did you mean {TORCHVISION}{name}?"
    known = model_names() + [TORCHVISION + other for other in _torchvision_names()]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose one of {', '.join(model_names())}, {TORCHVISION}NAME or {TIMM}NAME"
