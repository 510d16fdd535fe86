"""Networks in the formats that devices run, each compared with torch on real images.

``onnx``: for onnxruntime and whatever else reads ONNX, in float32 or int8. ``pt2``: for
``torch.export.load``, without rmprune. ``c``: C99 for microcontrollers, see `rmprune.c_source`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from rmprune.backends import Backend, Network, Platform, installed
from rmprune.batches import eval_batches
from rmprune.bench import bench
from rmprune.c_library import Run, compiled, find_compiler
from rmprune.c_source import CSource, c_source
from rmprune.composed import squeezed
from rmprune.data import Dataset, Split, calibration_images
from rmprune.equalization import absorb_offsets, equalize
from rmprune.errors import ExportError, StoreError, UsageError
from rmprune.extras import extra
from rmprune.onnx_graph import OnnxGraph, to_onnx
from rmprune.plain import PlainNet
from rmprune.quantization import quantize
from rmprune.rewrite import clamp_activations, fold_bn

Format = Literal["onnx", "pt2", "c"]
FORMATS: tuple[Format, ...] = get_args(Format)
TOLERANCE = 1e-4  # of the outputs' magnitude, in float32


class RawImages(nn.Module):
    """Normalises what a camera or a decoder gives.

    Args:
        mean: Of RGB in [0, 1], subtracted.
        std: Of RGB in [0, 1], divided by.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        mean64, std64 = (torch.tensor(list(v), dtype=torch.float64) for v in (mean, std))
        self.register_buffer("factor", (1 / (255 * std64)).float().view(1, -1, 1, 1))
        self.register_buffer("shift", (-mean64 / std64).float().view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, H, W, 3)`` of uint8, RGB, to ``(N, 3, H, W)`` of float32."""
        pixels = images.permute(0, 3, 1, 2).contiguous().float()
        return pixels * self.factor + self.shift


def fed_images(split: Split, data: Dataset, raw: RawImages | None) -> Tensor:
    """Images as an exported network takes them.

    Args:
        split: The images.
        data: Whose normalisation they get.
        raw: The network's own normalisation, if it has one.

    Returns:
        ``(N, 3, H, W)`` of float32, normalised; with ``raw``, ``(N, H, W, 3)`` of uint8.
    """
    if raw is not None:
        return split.images[:].permute(0, 2, 3, 1).contiguous()
    batches = eval_batches(split, 256, mean=data.mean, std=data.std, device=torch.device("cpu"))
    return torch.cat([images for images, _ in batches])


@dataclass(frozen=True)
class Exported:
    """What came of an export.

    Attributes:
        paths: The files.
        run: Computes ``(N, …)`` to ``(N, classes)`` from them; None where nothing here can.
        c: Sizes, if it is C.
        graph: The graph that was written; None of pt2.
        float_graph: The same before it was quantised, if it was.
    """

    paths: tuple[Path, ...]
    run: Run | None
    c: CSource | None = None
    graph: OnnxGraph | None = None
    float_graph: OnnxGraph | None = None


@dataclass(frozen=True)
class Agreement:
    """Outputs beside torch's.

    Attributes:
        images: Test images that were compared.
        difference: The largest, relative to the largest output.
        same_class: Images that both put into one class.
        accuracy: Share of the images that the exported network classifies correctly.
        torch_accuracy: Share that torch does, in float32.
    """

    images: int
    difference: float
    same_class: int
    accuracy: float
    torch_accuracy: float


@dataclass(frozen=True)
class Delivery:
    """Files for a device, and what is known of them.

    Attributes:
        paths: The files.
        c: Sizes, if it is C.
        agreement: None if nothing here can run them.
        timings: Of int8: the float32 graph and the int8 graph, see `rmprune.bench.bench`.
    """

    paths: tuple[Path, ...]
    c: CSource | None
    agreement: Agreement | None
    timings: pd.DataFrame | None


def deployable(net: nn.Module, raw: RawImages | None = None) -> nn.Module:
    """A network as it is exported: on the CPU, its BNs folded, and with its preprocessing."""
    net = clamp_activations(squeezed(copy.deepcopy(net).cpu().eval()))
    net = fold_bn(net) if isinstance(net, PlainNet) else fuse(net)
    return net if raw is None else nn.Sequential(raw, net).eval()


def export(
    net: nn.Module,
    form: Format,
    path: Path,
    example_input: Tensor,
    *,
    raw: RawImages | None = None,
    calibration: Iterable[Tensor] | None = None,
    reduce_range: bool = False,
    dynamic_batch: bool = False,
    info: dict[str, Any] | None = None,
) -> Exported:
    """Write a network in a format.

    Args:
        net: In evaluation mode; left as it is.
        form: ``onnx``, ``pt2`` or ``c``.
        path: Of the file; for C, of the header, beside which the source is put.
        example_input: ``(N, …)`` as the exported network takes it: N images, or N ≥ 2 of any
            number; uint8 ``(N, H, W, 3)`` with ``raw``.
        raw: Normalisation to put before the network.
        calibration: Training images like the example input, one a batch: quantise to int8.
        reduce_range: Of int8: see `rmprune.quantization.quantize`.
        dynamic_batch: Take any number of images.
        info: What else to write into the file.

    Raises:
        ExportError: The format cannot express the network or the options.
        UsageError: An extra is missing, or calibration images do not fit.
    """
    if form == "c" and (dynamic_batch or len(example_input) != 1):
        raise ExportError("C computes one image at a time; export to onnx or pt2 for batches")
    if form == "pt2" and calibration is not None:
        raise ExportError("pt2 is exported in float32; export int8 to onnx or c")
    images = None if calibration is None else list(calibration)
    if images and isinstance(net, PlainNet):
        normalised = images if raw is None else [raw(i) for i in images]
        plain = absorb_offsets(fold_bn(copy.deepcopy(net).cpu().eval()), normalised)
        net = equalize(plain, normalised)
    network = deployable(net, raw)
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"written by": f"rmprune {version('rmprune')}", **(info or {})}
    if form == "pt2":
        return _export_pt2(network, path, example_input, dynamic_batch, notes)
    graph, before = to_onnx(network, example_input, dynamic_batch), None
    if images is not None:
        before = OnnxGraph(graph)
        graph = quantize(graph, images, reduce_range=reduce_range)
    written = (_export_onnx if form == "onnx" else _export_c)(graph, path, notes)
    return replace(written, graph=OnnxGraph(graph), float_graph=before)


def _export_onnx(graph: Any, path: Path, notes: dict[str, Any]) -> Exported:
    onnx, runtime = extra("onnx", "ONNX"), extra("onnxruntime", "ONNX")
    for key, value in notes.items():
        graph.metadata_props.add(
            key=key, value=value if isinstance(value, str) else json.dumps(value)
        )
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batch = session.get_inputs()[0].shape[0]

    def run(images: Tensor) -> Tensor:
        pieces = [images] if isinstance(batch, str) else torch.split(images, batch)
        return torch.cat(
            [torch.from_numpy(session.run(None, {name: piece.numpy()})[0]) for piece in pieces]
        )

    return Exported((path,), run)


def _export_pt2(
    network: nn.Module, path: Path, example: Tensor, dynamic: bool, notes: dict[str, Any]
) -> Exported:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    files = {f"{key}.json": json.dumps(value) for key, value in notes.items()}
    torch.export.save(program, path, extra_files=files)
    loaded = torch.export.load(path).module()
    size = len(example)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            pieces = [images] if dynamic else torch.split(images, size)
            return torch.cat([loaded(piece) for piece in pieces])

    return Exported((path,), run)


def _export_c(graph: Any, path: Path, notes: dict[str, Any]) -> Exported:
    about = [f"{key}: {value}" for key, value in notes.items()]
    written = c_source(graph, path.stem, about)
    source = path.with_suffix(".c")
    path.with_suffix(".h").write_text(written.header, encoding="utf-8")
    source.write_text(written.source, encoding="utf-8")
    run = None if find_compiler() is None else compiled(written, path.stem)
    return Exported((path.with_suffix(".h"), source), run, written)


def deliver(
    net: nn.Module,
    form: Format,
    path: Path,
    data: Dataset,
    *,
    int8: bool = False,
    reduce_range: bool = False,
    embed_preprocessing: bool = False,
    batch_size: int = 1,
    images: int = 1000,
    calibration: int = 256,
) -> Delivery:
    """Write a network in a format, once it computes what torch does on real images.

    Args:
        net: In evaluation mode; left as it is.
        form: ``onnx``, ``pt2`` or ``c``.
        path: Of the file; for C, of the header. What is there stays until all is compared.
        data: What the net was trained for.
        int8: Quantise, calibrated on training images.
        reduce_range: See `rmprune.quantization.quantize`.
        embed_preprocessing: Take raw images, see `RawImages`.
        batch_size: Images at once; 0 is any number.
        images: Test images to compare on.
        calibration: Training images to calibrate on.

    Raises:
        ExportError: The outputs differ, or as `export` does.
        StoreError: Nothing can be written there.
        UsageError: There are too few images for a batch, or as `export` does.
    """
    raw = RawImages(data.mean, data.std) if embed_preprocessing else None
    size = batch_size or 2
    test = _whole_batches(data.test, images, size)
    fed = fed_images(test, data, raw)
    chosen = _whole_batches(calibration_images(data, calibration), calibration, size)
    batches = list(torch.split(fed_images(chosen, data, raw), size)) if int8 else None
    info = {"classes": data.classes, "mean": data.mean, "std": data.std, "data": data.name}
    with _folder_beside(path) as folder:
        done = export(
            net,
            form,
            folder / path.name,
            fed[:size].clone(),  # or all images would be saved in it
            raw=raw,
            calibration=batches,
            reduce_range=reduce_range,
            dynamic_batch=not batch_size,
            info=info,
        )
        agreement = None
        if done.run is not None:
            network = deployable(net, raw)
            with torch.no_grad():
                expected = torch.cat([network(piece) for piece in torch.split(fed, 256)])
            agreement = _agreement(expected, done.run(fed), test.labels)
            if not int8:
                _check_difference(agreement.difference)
        paths = tuple(file.replace(path.parent / file.name) for file in done.paths)
    timings = _int8_timings(done, form, fed[:1], size) if int8 else None
    return Delivery(paths, done.c, agreement, timings)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder for a while, from which files are moved to a path at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; name another place"
        ) from error
    with folder as name:
        yield Path(name)


def _whole_batches(split: Split, count: int, size: int) -> Split:
    """The first images, as many as fill batches; at least one batch."""
    kept = max(count // size, 1) * size
    if len(split.labels) < kept:
        kept = len(split.labels) // size * size
    if not kept:
        raise UsageError(f"{len(split.labels)} images are no batch of {size}")
    return split.at(slice(kept))


def _agreement(expected: Tensor, found: Tensor, labels: Tensor) -> Agreement:
    classes, others = expected.argmax(1), found.argmax(1)
    return Agreement(
        images=len(labels),
        difference=difference_of(expected, found),
        same_class=int((classes == others).sum()),
        accuracy=(others == labels).double().mean().item(),
        torch_accuracy=(classes == labels).double().mean().item(),
    )


def _int8_timings(done: Exported, form: Format, image: Tensor, size: int) -> pd.DataFrame | None:
    """int8 beside float32, where it would run; None if that cannot be had here."""
    backend: Backend = "c" if form == "c" else "onnxruntime"
    if backend not in installed() or done.graph is None or done.float_graph is None:
        return None
    graphs: dict[str, tuple[Network, Tensor]] = {
        "float32": (done.float_graph, image),
        "int8": (done.graph, image),
    }
    return bench(graphs, Platform(backend, 1, size), rounds=9)


def difference_of(expected: Tensor, found: Tensor) -> float:
    """The largest difference of outputs ``(N, classes)``, relative to the largest value."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


def _check_difference(difference: float) -> None:
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the exported network differs from torch by {difference:.1e} of the outputs' magnitude"
        )
