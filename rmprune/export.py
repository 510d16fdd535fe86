"""Networks in the formats that devices run, each compared with torch on real images.

``onnx``: for onnxruntime and whatever else reads ONNX, in float32 or int8. ``pt2``: for
``torch.export.load``, without rmprune. ``c``: C99 for microcontrollers, see `rmprune.c_source`.
"""

from __future__ import annotations

import copy
import ctypes
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from rmprune.c_source import CSource, c_source
from rmprune.data import Dataset, Split, eval_batches
from rmprune.equalization import equalize
from rmprune.errors import ExportError
from rmprune.onnx_graph import extra, to_onnx
from rmprune.plain import PlainNet
from rmprune.quantization import quantize
from rmprune.rewrite import fold_bn

Format = Literal["onnx", "pt2", "c"]
FORMATS: tuple[Format, ...] = get_args(Format)
TOLERANCE = 1e-4  # of the outputs' magnitude, in float32
Run = Callable[[Tensor], Tensor]


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
        return split.images.permute(0, 2, 3, 1).contiguous()
    batches = eval_batches(split, 256, mean=data.mean, std=data.std, device=torch.device("cpu"))
    return torch.cat([images for images, _ in batches])


@dataclass(frozen=True)
class Exported:
    """What came of an export.

    Attributes:
        paths: The files.
        run: Computes ``(N, …)`` to ``(N, classes)`` from them; None where nothing here can.
        c: Sizes, if it is C.
    """

    paths: tuple[Path, ...]
    run: Run | None
    c: CSource | None = None


def deployable(net: nn.Module, raw: RawImages | None = None) -> nn.Module:
    """A network as it is exported: on the CPU, its BNs folded, and with its preprocessing."""
    net = copy.deepcopy(net).cpu().eval()
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
        plain = copy.deepcopy(net).cpu().eval()
        net = equalize(fold_bn(plain), images if raw is None else [raw(i) for i in images])
    network = deployable(net, raw)
    notes = {"written by": f"rmprune {version('rmprune')}", **(info or {})}
    if form == "pt2":
        return _export_pt2(network, path, example_input, dynamic_batch, notes)
    graph = to_onnx(network, example_input, dynamic_batch)
    if images is not None:
        graph = quantize(graph, images)
    if form == "onnx":
        return _export_onnx(graph, path, notes)
    return _export_c(graph, path, notes)


def _export_onnx(graph: Any, path: Path, notes: dict[str, Any]) -> Exported:
    onnx, runtime = extra("onnx", "ONNX"), extra("onnxruntime", "ONNX")
    for key, value in notes.items():
        graph.metadata_props.add(
            key=key, value=value if isinstance(value, str) else json.dumps(value)
        )
    onnx.checker.check_model(graph, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".h").write_text(written.header, encoding="utf-8")
    source.write_text(written.source, encoding="utf-8")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    run = None if compiler is None else _compiled(compiler, source, written)
    return Exported((path.with_suffix(".h"), source), run, written)


def _compiled(compiler: str, source: Path, written: CSource) -> Run:
    """What a C file computes, by a library that exists while this process runs."""
    with tempfile.TemporaryDirectory(prefix="rmprune-") as folder:
        library = Path(folder) / f"{source.stem}.so"
        options = ["-std=c99", "-O3", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
        done = subprocess.run([compiler, *options], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            raise ExportError(f"{source} does not compile: {done.stderr.strip().splitlines()[0]}")
        function = getattr(ctypes.CDLL(str(library)), f"{source.stem}_run")

    def run(images: Tensor) -> Tensor:
        outputs = []
        for image in images.numpy():
            given, output = np.ascontiguousarray(image), np.zeros(written.outputs, np.float32)
            function(given.ctypes.data_as(ctypes.c_void_p), output.ctypes.data_as(ctypes.c_void_p))
            outputs.append(torch.from_numpy(output))
        return torch.stack(outputs)

    return run


def check(expected: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference of outputs, relative to the largest value.

    Args:
        expected: Torch's, ``(N, classes)``.
        found: The exported network's.
        tolerance: What is allowed.

    Raises:
        ExportError: It is more.
    """
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise ExportError(
            f"the exported network differs from torch by {difference:.1e} of the outputs' magnitude"
        )
    return difference
