"""Where a net shall run, and how long it takes there.

Networks are timed as they would be deployed: for torch with every BN folded into the
convolution before it, for onnxruntime as the exported graph. All nets of one call run in
turn, so that their ratios can be trusted; see `rmprune.measure.latency`.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from rmprune.errors import UsageError
from rmprune.measure import Latency, WideSpreadWarning, latency
from rmprune.onnx_graph import extra, to_onnx

Backend = Literal["torch", "onnxruntime"]


@dataclass(frozen=True)
class Platform:
    """What a latency is measured on, besides the hardware.

    Attributes:
        backend: ``"torch"`` (the net's device), or ``"onnxruntime"`` (the CPU; needs the
            extra ``onnx``).
        threads: Intra-op threads of the CPU.
        batch_size: Images in a forward pass.
    """

    backend: Backend = "torch"
    threads: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.backend not in ("torch", "onnxruntime"):
            raise UsageError(f"unknown backend {self.backend!r}; known: torch, onnxruntime")
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but it is {getattr(self, name)}")

    @property
    def versions(self) -> str:
        """The backend and its version."""
        if self.backend == "torch":
            return f"torch {torch.__version__}"
        return f"onnxruntime {extra('onnxruntime', 'the backend onnxruntime').__version__}"


def installed() -> tuple[Backend, ...]:
    """The backends that can be used here."""
    found = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
    return ("torch", "onnxruntime") if found else ("torch",)


ONE_IMAGE = Platform()  # torch, one thread


def time_deployed(
    models: Mapping[str, nn.Module],
    example_input: Tensor,
    platform: Platform,
    *,
    rounds: int = 15,
    min_seconds: float = 0.1,
    warn: bool = True,
) -> dict[str, Latency]:
    """Time networks against each other as they would be deployed.

    Args:
        models: By name, on the example input's device and of its dtype; they stay as they are.
        example_input: ``(N, …)``; its first image is repeated to the batch size.
        platform: What runs them.
        rounds: Samples per model.
        min_seconds: How long a sample lasts at least.
        warn: Whether to warn of samples that differ much.

    Raises:
        UsageError: The backend is not installed.
    """
    batch = example_input[:1].repeat_interleave(platform.batch_size, dim=0)
    deployed = {name: deploy(model, batch, platform) for name, model in models.items()}
    with warnings.catch_warnings():
        if not warn:
            warnings.simplefilter("ignore", WideSpreadWarning)
        return latency(
            deployed,
            batch,
            threads=platform.threads,
            rounds=rounds,
            min_seconds=min_seconds,
            backend=platform.backend,
        )


def deploy(model: nn.Module, batch: Tensor, platform: Platform) -> nn.Module:
    """A network in the form that a backend runs, for batches like the given one."""
    network = fuse(copy.deepcopy(model).eval())
    if platform.backend == "torch":
        return network
    return OnnxNetwork(network, batch, platform.threads)


class OnnxNetwork(nn.Module):
    """A network that onnxruntime runs on the CPU.

    Args:
        model: In evaluation mode.
        batch: ``(N, C, H, W)``, the only shape that it will take.
        threads: Intra-op.

    Raises:
        UsageError: The extra ``onnx`` is not installed.
    """

    def __init__(self, model: nn.Module, batch: Tensor, threads: int) -> None:
        super().__init__()
        onnxruntime = extra("onnxruntime", "the backend onnxruntime")
        graph = to_onnx(model.cpu(), batch.cpu())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to what the network gives."""
        return torch.from_numpy(self._session.run(None, {self._input: x.cpu().numpy()})[0])
