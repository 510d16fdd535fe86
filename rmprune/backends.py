"""Where a net shall run, and how long it takes there.

Networks are timed as they would be deployed: for torch with every BN folded into the
convolution before it, elsewhere as the exported graph. All nets of one call run in turn, so
that their ratios can be trusted; see `rmprune.measure.latency`.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from rmprune.c_library import compiled, find_compiler
from rmprune.c_source import c_source
from rmprune.composed import squeezed
from rmprune.errors import UsageError
from rmprune.extras import extra
from rmprune.measure import Latency, WideSpreadWarning, latency
from rmprune.onnx_graph import OnnxGraph, to_onnx
from rmprune.rewrite import clamp_activations

Backend = Literal["torch", "onnxruntime", "openvino", "c"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
NEEDED: dict[Backend, tuple[str, ...]] = {
    "torch": (),
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnxscript"),
    "c": ("onnx", "onnxscript"),
}
Network = nn.Module | OnnxGraph


@dataclass(frozen=True)
class Platform:
    """What a latency is measured on, besides the hardware.

    Attributes:
        backend: ``"torch"`` (the net's device), or on the CPU ``"onnxruntime"`` (needs the
            extra ``onnx``), ``"openvino"`` (the extra ``openvino``), or ``"c"``
            (`rmprune.c_source`, one image after the other; ``onnx`` and a compiler).
        threads: Intra-op threads of the CPU.
        batch_size: Images in a forward pass.
    """

    backend: Backend = "torch"
    threads: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"unknown backend {self.backend!r}; known: {', '.join(BACKENDS)}")
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if self.backend == "c" and self.threads > 1:
            raise UsageError("the backend c computes with one thread; give --threads 1")

    @property
    def versions(self) -> str:
        """The backend and its version.

        Raises:
            UsageError: It is not installed.
        """
        if self.backend == "torch":
            return f"torch {torch.__version__}"
        if self.backend == "c":
            return f"c {_compiler_version()}"
        return f"{self.backend} {_library(self.backend).__version__}"


def installed() -> tuple[Backend, ...]:
    """The backends that can be used here."""
    return tuple(
        backend
        for backend, modules in NEEDED.items()
        if all(map(importlib.util.find_spec, modules)) and (backend != "c" or find_compiler())
    )


def _library(backend: Backend) -> Any:
    """The first of the modules that a backend needs; all of them can be imported then."""
    name = "openvino" if backend == "openvino" else "onnx"
    first, *_ = [extra(module, f"the backend {backend}", name) for module in NEEDED[backend]]
    return first


def _compiler_version() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise UsageError("the backend c needs a C compiler: cc, gcc or clang")
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.splitlines()[0]


ONE_IMAGE = Platform()  # torch, one thread


def time_deployed(
    models: Mapping[str, Network],
    example_input: Tensor | Mapping[str, Tensor],
    platform: Platform,
    *,
    rounds: int = 15,
    min_seconds: float = 0.1,
    warn: bool = True,
) -> dict[str, Latency]:
    """Time networks against each other as they would be deployed.

    Args:
        models: By name, on the example input's device and of its dtype; they stay as they are.
            One that is timed often can be what `deploy` made of it.
        example_input: ``(N, …)``, of all models or by name; its first image is repeated to
            the batch size.
        platform: What runs them.
        rounds: Samples per model.
        min_seconds: How long a sample lasts at least.
        warn: Whether to warn of samples that differ much.

    Raises:
        UsageError: The backend is not installed, or cannot run a network of that kind.
    """
    if isinstance(example_input, Tensor):
        example_input = dict.fromkeys(models, example_input)
    batches = {name: repeated(x, platform.batch_size) for name, x in example_input.items()}
    deployed = {name: deploy(model, batches[name], platform) for name, model in models.items()}
    with warnings.catch_warnings():
        if not warn:
            warnings.simplefilter("ignore", WideSpreadWarning)
        return latency(
            deployed,
            batches,
            threads=platform.threads,
            rounds=rounds,
            min_seconds=min_seconds,
            backend=platform.backend,
        )


def repeated(example_input: Tensor, batch_size: int) -> Tensor:
    """The first image of ``(N, …)``, as a batch of a size."""
    return example_input[:1].repeat_interleave(batch_size, dim=0)


def deploy(model: Network, batch: Tensor, platform: Platform) -> nn.Module:
    """A network in the form that a backend runs, for batches like the given one.

    What is in that form stays as it is.

    Raises:
        UsageError: The backend is not installed, or cannot run a network of that kind.
        ExportError: There is no C for some operation.
    """
    if isinstance(model, _Deployed):
        return model
    if platform.backend == "torch":
        if isinstance(model, OnnxGraph):
            raise UsageError(
                "torch does not run ONNX graphs; choose the backend onnxruntime, openvino or c"
            )
        return _folded(model)
    _library(platform.backend)  # which is refused by its own name, before an export is
    runner = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino, "c": _CLibrary}[platform.backend]
    return runner(graph_of(model, batch[:1] if platform.backend == "c" else batch), platform)


def graph_of(model: Network, batch: Tensor) -> OnnxGraph:
    """A network as the graph that is deployed, for batches like the given one."""
    if isinstance(model, OnnxGraph):
        return model.for_batch(len(batch))
    return OnnxGraph(to_onnx(_folded(model).cpu(), batch.cpu()))


def _folded(model: nn.Module) -> nn.Module:
    """A copy with its BNs folded where torch.fx can follow the network; else as it is."""
    model = clamp_activations(squeezed(copy.deepcopy(model))).eval()
    try:
        return fuse(model)
    except (TraceError, TypeError, RuntimeError):  # of control flow that depends on the input
        return model


class _Deployed(nn.Module):
    """A graph that something else than torch runs."""


class _OnnxRuntime(_Deployed):
    """A graph that onnxruntime runs on the CPU."""

    def __init__(self, graph: OnnxGraph, platform: Platform) -> None:
        super().__init__()
        onnxruntime = _library("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = platform.threads
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        """``(N, …)`` to what the network gives."""
        return torch.from_numpy(self._session.run(None, {self._input: x.cpu().numpy()})[0])


class _OpenVino(_Deployed):
    """A graph that OpenVINO runs on the CPU, in the precision that the graph has."""

    def __init__(self, graph: OnnxGraph, platform: Platform) -> None:
        super().__init__()
        openvino = _library("openvino")
        core = openvino.Core()
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": platform.threads,
            # Or it would compute in bf16 wherever the hardware does, unlike the others.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        model = core.read_model(model=graph.proto.SerializeToString())
        self._request: Any = core.compile_model(model, "CPU", options).create_infer_request()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, …)`` to what the network gives."""
        self._request.infer({0: x.cpu().numpy()}, share_inputs=True)
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy())


class _CLibrary(_Deployed):
    """A graph in C99, compiled for the CPU of this machine."""

    def __init__(self, graph: OnnxGraph, _: Platform) -> None:
        super().__init__()
        self._run = compiled(c_source(graph.proto), "net", "-march=native")

    def forward(self, x: Tensor) -> Tensor:
        """``(N, …)`` to what the network gives."""
        return self._run(x)
