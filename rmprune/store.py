"""Files that outlive a run: plain nets, checkpoints, JSON and CSV.

A saved net is one ``.safetensors`` file: the weights as tensors, the list of layers as JSON in
the metadata. Reading runs no code from a file and trusts nothing that stands in it. Writing is
atomic: whoever looks finds the old file or the new one, each whole.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import math
import os
import pickle
import uuid
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from rmprune.errors import StoreError, first_line
from rmprune.layers import (
    FUNCTIONS,
    ChannelGate,
    ChannelSelection,
    PartialActivation,
    PartialGroupNorm,
    ResidualBlock,
)
from rmprune.plain import PlainNet, Width

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 2  # 1 knew no blocks with additions
KEY = "rmprune"  # of the description in the metadata
_FIELDS = ("layers", "input_shape", "converted_widths", "widths", "info")
_MAX_HEADER = 100_000_000  # bytes; safetensors itself refuses longer ones
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.load(weights_only=True) rebuilds; exact types, for a subclass is pickled as itself.
_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device)
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)

_Check = Callable[[Any], bool]


def _integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _count(value: Any) -> bool:
    return _integer(value) and value >= 1


def _size(value: Any) -> bool:
    return _integer(value) and value >= 0


def _number(value: Any) -> bool:
    return _integer(value) or (type(value) is float and math.isfinite(value))


def _flag(value: Any) -> bool:
    return type(value) is bool


def _or(check: _Check, *words: str | None) -> _Check:
    return lambda value: check(value) or any(value is w or value == w for w in words)


def _each(check: _Check, length: int) -> _Check:
    return lambda value: (
        isinstance(value, (list, tuple)) and len(value) == length and all(map(check, value))
    )


def _pair(check: _Check) -> _Check:
    return lambda value: check(value) or _each(check, 2)(value)


def _function(value: Any) -> bool:
    return isinstance(value, str) and value in FUNCTIONS


def _list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, (list, tuple)) and all(map(check, value))


# What the constructors' arguments may be, as JSON values. Each is also an attribute of the
# layer; `bias` is the tensor or None there.
_ARGUMENTS: dict[str, _Check] = {
    **dict.fromkeys(("in_channels", "out_channels", "groups", "num_features"), _count),
    **dict.fromkeys(("in_features", "out_features", "num_parameters"), _count),
    **dict.fromkeys(("kernel_size", "stride", "dilation"), _pair(_count)),
    **dict.fromkeys(("scale", "bias", "affine", "track_running_stats", "inplace"), _flag),
    **dict.fromkeys(("ceil_mode", "return_indices", "count_include_pad"), _flag),
    **dict.fromkeys(("eps", "negative_slope", "init", "p", "alpha", "beta"), _number),
    **dict.fromkeys(("min_val", "max_val", "threshold"), _number),
    **dict.fromkeys(("start_dim", "end_dim"), _integer),
    "momentum": _or(_number, None),
    "padding": _or(_pair(_size), "same", "valid"),
    "divisor_override": _or(_count, None),
    "output_size": _pair(_or(_count, None)),
    "approximate": _or(lambda _: False, "none", "tanh"),
    "num_channels": _count,
    "num_groups": _size,
    "activation": _function,
    "sizes": _list_of(_count),
    "channels": _list_of(_size),
    "activations": _list_of(_function),
}
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode")
# Every layer that a file can hold: its class, and the names of its arguments.
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv2d": (nn.Conv2d, (*_CONV, "bias")),
    "BatchNorm2d": (
        nn.BatchNorm2d,
        ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    ),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "ReLU": (nn.ReLU, ("inplace",)),
    "ReLU6": (nn.ReLU6, ("inplace",)),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope", "inplace")),
    "PReLU": (nn.PReLU, ("num_parameters", "init")),
    "Hardswish": (nn.Hardswish, ("inplace",)),
    "Hardsigmoid": (nn.Hardsigmoid, ("inplace",)),
    "Sigmoid": (nn.Sigmoid, ()),
    "SiLU": (nn.SiLU, ("inplace",)),
    "GELU": (nn.GELU, ("approximate",)),
    "Hardtanh": (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    "ELU": (nn.ELU, ("alpha", "inplace")),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
    "MaxPool2d": (nn.MaxPool2d, (*_POOL, "dilation", "return_indices")),
    "AvgPool2d": (nn.AvgPool2d, (*_POOL, "count_include_pad", "divisor_override")),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d, ("output_size",)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    "Flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "Identity": (nn.Identity, ()),
    "Dropout": (nn.Dropout, ("p", "inplace")),
    "Mish": (nn.Mish, ("inplace",)),
    "Tanh": (nn.Tanh, ()),
    "ChannelGate": (ChannelGate, ("sizes", "activations")),
    "PartialActivation": (PartialActivation, ("activation", "num_channels")),
    "PartialGroupNorm": (PartialGroupNorm, ("num_channels", "num_groups", "channels", "eps")),
    "ChannelSelection": (ChannelSelection, ("in_channels", "channels", "stride", "scale", "bias")),
}
BLOCK = "ResidualBlock"  # the one entry that holds others


def save(net: nn.Sequential, path: Path | str) -> None:
    """Write a net whose children are all of `LAYERS` to one ``.safetensors`` file.

    A `PlainNet` keeps all that it knows; of a plain ``nn.Sequential`` only the layers are known.
    Tuples in ``info`` come back as lists. Hooks are not saved.

    Raises:
        StoreError: `load` could not build the net again, or the file cannot be written; a file
            that was there before is untouched then.
    """
    with _explained(f"cannot save {path}"):
        text = _to_json(_describe(net))
        _check_fit(_build(json.loads(text)), net.state_dict())
        data = safetensors.torch.save(_copies(net.state_dict()), {KEY: text})
    with _atomic(path) as handle:
        handle.write(data)


def load(path: Path | str) -> PlainNet:
    """Read a net that `save` wrote: on the CPU, in evaluation mode, parameters requiring grad.

    Raises:
        StoreError: The file is missing, damaged, of another kind or of a newer format.
    """
    with _explained(f"cannot load {path}"):
        data = _read_safetensors(Path(path))
        net = _build(_description(data))
        tensors = _tensors(data)
        _check_fit(net, tensors)
        net.load_state_dict(tensors, strict=True, assign=True)
    return net.eval()


def layers_of(net: nn.Sequential) -> str:
    """A net without its weights, as JSON: what `built` makes a net of.

    Raises:
        StoreError: `built` could not.
    """
    text = _to_json(_describe(net))
    _build(json.loads(text))
    return text


def built(layers: str, state: Mapping[str, Tensor]) -> PlainNet:
    """The net that `layers_of` described, with copies of its weights, in evaluation mode.

    Raises:
        StoreError: They do not fit.
    """
    net = _build(_from_json(layers))
    _check_fit(net, dict(state))
    net.load_state_dict(_copies(state), assign=True)
    return net.eval()


def save_tensors(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Write a state dict to a ``.safetensors`` file, for `load_tensors`.

    Raises:
        StoreError: The file cannot be written.
    """
    write_bytes(safetensors.torch.save(_copies(state)), path)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, on the CPU.

    Raises:
        StoreError: The file is missing, damaged or of another kind.
    """
    with _explained(f"cannot load {path}"):
        return _tensors(_read_safetensors(Path(path)))


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy for each name: safetensors refuses shared storage and other memory formats."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception as error:  # safetensors' own, and what unknown dtypes raise
        raise StoreError(
            f"it is cut off or damaged ({first_line(error)}); copy it again"
        ) from error
    return tensors


def save_checkpoint(state: dict[str, Any], path: Path | str) -> None:
    """Write tensors, numbers, text and containers of them to a file of ``torch.save``.

    Raises:
        StoreError: `load_checkpoint` would refuse a value, or the file cannot be written; a file
            that was there before is untouched then.
    """
    with _explained(f"cannot save {path}"):
        _check_loadable(state, "state")
    with _atomic(path) as handle:
        torch.save(state, handle)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, with all tensors on the CPU; no code is run.

    Raises:
        StoreError: The file is missing, damaged, of another kind, or holds Python objects.
    """
    with _explained(f"cannot load {path}"):
        head = _read(Path(path), 4)
        if head.startswith(b"\x80"):
            raise StoreError(
                "it is a bare pickle, which could run code; nothing in it was executed; give a "
                "checkpoint that rmprune wrote"
            )
        if head != b"PK\x03\x04":
            raise StoreError("it is not a checkpoint; give one that rmprune wrote")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error that follows says it better
                # torch.load does not look at the checksums.
                with zipfile.ZipFile(path) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise zipfile.BadZipFile(f"wrong checksum of {damaged!r}")
                state = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise StoreError(
                "it is damaged, or holds Python objects, which could run code; nothing in it was "
                "executed; give a checkpoint that rmprune wrote"
            ) from error
        except Exception as error:  # a damaged file can raise nearly anything
            raise StoreError(
                f"it is no checkpoint, is cut off or is damaged ({first_line(error)}); go back "
                "to an earlier one or start the run again"
            ) from error
        if not isinstance(state, dict):
            raise StoreError(
                f"it holds a {type(state).__name__}, not a checkpoint; give one that rmprune wrote"
            )
    return state


def write_json(value: Any, path: Path | str) -> None:
    """Write a JSON value, indented.

    Raises:
        StoreError: The value is not JSON (NaN and infinity are not), or cannot be written.
    """
    with _explained(f"cannot save {path}"):
        text = _to_json(value, indent=2)
    with _atomic(path) as handle:
        handle.write(f"{text}\n".encode())


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: The file is missing or not JSON.
    """
    with _explained(f"cannot load {path}"):
        return _from_json(_read(Path(path)))


def write_text(text: str, path: Path | str) -> None:
    """Write a text as UTF-8.

    Raises:
        StoreError: The file cannot be written.
    """
    with _atomic(path) as handle:
        handle.write(text.encode())


def write_csv(frame: pd.DataFrame, path: Path | str) -> None:
    """Write a table with its column names and without its index.

    Raises:
        StoreError: The file cannot be written.
    """
    write_bytes(frame.to_csv(index=False, lineterminator="\n").encode(), path)


def write_bytes(data: bytes, path: Path | str) -> None:
    """Write a file as it is.

    Raises:
        StoreError: The file cannot be written.
    """
    with _atomic(path) as handle:
        handle.write(data)


@contextmanager
def _atomic(path: Path | str) -> Iterator[BinaryIO]:
    """A handle to write to; its content takes the place of `path` when the block ends well."""
    target = Path(path).resolve()  # a symbolic link stays one
    kept = f"the previous {target.name} is untouched" if target.exists() else "nothing was written"
    if target.exists() and not target.is_file():
        raise StoreError(f"cannot write {path}: it is not a regular file; give the path of a file")
    temporary = target.with_name(f".rmprune-{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # or a power cut leaves the new name with no content
        temporary.replace(target)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save hides the OSError behind a RuntimeError
        if cause is None:
            raise
        if cause.errno in _NO_SPACE:
            raise StoreError(
                f"no space left to write {path} ({cause.strerror}): {kept}; free some space, or "
                "raise the limit, and try again"
            ) from error
        raise StoreError(f"cannot write {path}: {cause.strerror or cause}; {kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _explained(prefix: str) -> Iterator[None]:
    """Put what was being done in front of a reason."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{prefix}: {error}") from error


def _read(path: Path, size: int = -1) -> bytes:
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise StoreError(f"it is {what}; give the path of a file")
        with path.open("rb") as handle:
            return handle.read(size)
    except FileNotFoundError as error:
        raise StoreError("there is no such file; check the path") from error
    except OSError as error:
        raise StoreError(f"it cannot be read: {error.strerror or error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"not everything in it is a JSON value: {first_line(error)}") from error


def _from_json(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"it is cut off, damaged or not JSON ({first_line(error)})") from error


def _read_safetensors(path: Path) -> bytes:
    head = _read(path, 9)
    # The first 8 bytes are the header's length, whose lowest one may be a pickle's 0x80 by chance.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return _read(path)
    if head.startswith((b"PK\x03\x04", b"\x80")) and len(head) == 9:
        raise StoreError(
            "it is a pickle or a checkpoint of torch.save, which could run code; nothing in it was "
            "executed; give the .safetensors file of a net that rmprune saved"
        )
    if path.suffix == ".onnx":
        raise StoreError(
            "ONNX files can be timed by `rmprune bench`, but nothing else; give the .safetensors "
            "file that it was exported from"
        )
    raise StoreError(
        "it is not a safetensors file, or is cut off; give the file of a net that rmprune saved"
    )


def _description(data: bytes) -> Any:
    """The JSON value that describes the net, not checked yet."""
    header = _from_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        raise StoreError(
            "it is a safetensors file without rmprune's list of layers; if it holds the weights of "
            "a model, give it as that model's weights"
        )
    return _from_json(metadata[KEY])


def _describe(net: nn.Sequential) -> dict[str, Any]:
    if not isinstance(net, nn.Sequential) or type(net).forward is not nn.Sequential.forward:
        raise StoreError(
            f"a {type(net).__name__} is not a list of layers; convert it to a plain net first"
        )
    known = net if isinstance(net, PlainNet) else PlainNet(OrderedDict())
    if not _has_string_keys(known.info):
        raise StoreError("info has a key that is not a string, which JSON cannot keep; rename it")
    return {
        "format": FORMAT,
        "rmprune": _version(),
        # Not named_children(), which leaves out a layer that stands in the net a second time.
        "layers": [_describe_layer(name, layer) for name, layer in net._modules.items()],
        "input_shape": known.input_shape,
        "converted_widths": {name: asdict(w) for name, w in known.converted_widths.items()},
        "widths": {name: asdict(w) for name, w in known.widths.items()},
        "info": known.info,
    }


def _version() -> str:
    try:
        return importlib.metadata.version("rmprune")
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        return "unknown"


def _has_string_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _has_string_keys(v) for k, v in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_string_keys, value))


def _describe_layer(name: str, layer: nn.Module | None) -> dict[str, Any]:
    kind = type(layer).__name__
    if type(layer) is ResidualBlock:
        shortcuts = {"added": layer.added, "passed": layer.passed}
        return {
            "name": name,
            "type": BLOCK,
            "body": [_describe_layer(n, m) for n, m in layer.body._modules.items()],
            **{k: None if m is None else _describe_layer(k, m) for k, m in shortcuts.items()},
        }
    if isinstance(layer, nn.Module) and any(layer.children()):
        raise StoreError(f"layer {name!r} ({kind}) holds other layers; a plain net is a flat list")
    cls, names = LAYERS.get(kind, (None, ()))
    if type(layer) is not cls:
        raise StoreError(
            f"layer {name!r} is a {type(layer).__module__}.{kind}, and only these can be saved: "
            f"{', '.join(LAYERS)}"
        )
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise StoreError(
            f"layer {name!r} (Conv2d) has padding_mode={layer.padding_mode!r}; only 'zeros' can "
            "be saved"
        )
    arguments = {key: getattr(layer, key) for key in names}
    for key in {"scale", "bias"} & arguments.keys():  # tensors or None
        arguments[key] = arguments[key] is not None
    _check_arguments(name, kind, arguments)
    return {"name": name, "type": kind, "arguments": arguments}


def _check_arguments(name: str, kind: str, arguments: dict[str, Any]) -> None:
    for key in sorted(set(LAYERS[kind][1]) ^ arguments.keys()):
        fault = "has an unknown" if key in arguments else "lacks the"
        raise StoreError(f"layer {name!r} ({kind}) {fault} argument {key!r}")
    for key, value in arguments.items():
        if not _ARGUMENTS[key](value):
            raise StoreError(f"layer {name!r} ({kind}) cannot have {key}={value!r}")


def _build(description: Any) -> PlainNet:
    """The net that a JSON value describes, on the meta device: no size in it takes memory."""
    if not isinstance(description, dict) or not _count(description.get("format")):
        raise StoreError("its list of layers has no format version, so it is damaged")
    if description["format"] > FORMAT:
        writer = description.get("rmprune")
        raise StoreError(
            f"it has format {description['format']}, written by rmprune {writer!r}, and this "
            f"rmprune reads formats up to {FORMAT}; upgrade rmprune"
        )
    layers, shape, converted, widths, info = (description.get(field) for field in _FIELDS)
    if not _or(_each(_count, 3), None)(shape):
        raise StoreError(f"its input_shape is {shape!r}, not channels, height and width")
    if not isinstance(layers, list) or not isinstance(info, dict):
        raise StoreError("its list of layers or its info is missing, so it is damaged")
    built = _build_list(layers, _build_entry)
    return PlainNet(built, shape and tuple(shape), _widths(converted), _widths(widths), info)


def _build_list(
    entries: list[Any], build: Callable[[Any], tuple[str, nn.Module]]
) -> OrderedDict[str, nn.Module]:
    built: OrderedDict[str, nn.Module] = OrderedDict()
    for entry in entries:
        name, layer = build(entry)
        if name in built:
            raise StoreError(f"two layers have the name {name!r}")
        built[name] = layer
    return built


def _build_entry(entry: Any) -> tuple[str, nn.Module]:
    """A layer, or a block of layers; blocks do not stand in blocks."""
    if not isinstance(entry, dict) or entry.get("type") != BLOCK:
        return _build_layer(entry)
    if entry.keys() != {"name", "type", "body", "added", "passed"}:
        raise StoreError(f"an entry of the type {BLOCK} has not a body and its shortcuts")
    body = entry["body"]
    if not isinstance(body, list):
        raise StoreError(f"the body of a {BLOCK} is not a list of layers")
    layers = _build_list(body, _build_layer)
    added, passed = (
        None if entry[key] is None else _build_layer(entry[key])[1] for key in ("added", "passed")
    )
    if not (
        isinstance(added, nn.Conv2d | ChannelSelection | None)
        and isinstance(passed, ChannelSelection | None)
    ):
        raise StoreError(f"a shortcut of a {BLOCK} neither selects channels nor convolves them")
    if not any(isinstance(layer, nn.Conv2d) for layer in layers.values()):
        raise StoreError(f"the body of a {BLOCK} has no convolution")
    return _checked_name(entry["name"]), ResidualBlock(nn.Sequential(layers), added, passed)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name or "." in name or hasattr(_NAMELESS, name):
        raise StoreError(f"{name!r} cannot be the name of a layer; rename it")
    return name


def _build_layer(entry: Any) -> tuple[str, nn.Module]:
    if not isinstance(entry, dict) or entry.keys() != {"name", "type", "arguments"}:
        raise StoreError("an entry in its list of layers is not a name, a type and arguments")
    name, kind, arguments = _checked_name(entry["name"]), entry["type"], entry["arguments"]
    if not isinstance(kind, str) or kind not in LAYERS:
        raise StoreError(
            f"layer {name!r} has the unknown type {kind!r}; this rmprune knows {', '.join(LAYERS)}"
        )
    if not isinstance(arguments, dict):
        raise StoreError(f"layer {name!r} ({kind}) has no arguments")
    _check_arguments(name, kind, arguments)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        with torch.device("meta"):
            return name, LAYERS[kind][0](**values)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise StoreError(f"layer {name!r} ({kind}) cannot be made: {first_line(error)}") from error


_NAMELESS = PlainNet(OrderedDict())  # its attributes are names that no layer can have


def _widths(value: Any) -> dict[str, Width]:
    if not isinstance(value, dict) or not all(
        isinstance(w, dict)
        and {"own", "reserved"} <= w.keys() <= {"own", "reserved", "alternating"}
        and all(map(_size, (w["own"], w["reserved"])))
        and _flag(w.get("alternating", False))
        for w in value.values()
    ):
        raise StoreError("its widths are not numbers of own and reserved channels by layer name")
    return {name: Width(**width) for name, width in value.items()}


def _check_fit(net: PlainNet, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the ones that the layers' arguments ask for."""
    expected = net.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        fault = "belongs to none of the layers" if name in tensors else "is missing"
        raise StoreError(f"layers and tensors do not fit: tensor {name!r} {fault}")
    for name, want in expected.items():
        found = tensors[name]
        if found.is_meta:
            raise StoreError(f"tensor {name!r} is on the meta device and has no values to save")
        if found.shape != want.shape:
            raise StoreError(
                f"layers and tensors do not fit: tensor {name!r} has shape {tuple(found.shape)}, "
                f"its layer's arguments ask for {tuple(want.shape)}"
            )
        if found.dtype != want.dtype and not (
            found.is_floating_point() and want.is_floating_point()
        ):
            raise StoreError(
                f"layers and tensors do not fit: tensor {name!r} is {found.dtype}, its layer needs "
                + ("floating point" if want.is_floating_point() else str(want.dtype))
            )


def _check_loadable(value: Any, where: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would: better now than at ``--resume``."""
    if type(value) in _LEAVES or isinstance(value, Tensor):
        return
    if type(value) not in _CONTAINERS:
        raise StoreError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which could not be "
            "loaded again; store tensors, numbers, text and containers of them"
        )
    if isinstance(value, dict):
        for key, item in value.items():
            _check_loadable(key, f"a key of {where}")
            _check_loadable(item, f"{where}[{key!r}]")
    else:
        for index, item in enumerate(value):
            _check_loadable(item, f"{where}[{index}]")
