"""Networks of any origin beside each other: time, memory and size on a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from rmprune.backends import Network, Platform, deploy, graph_of, repeated, time_deployed
from rmprune.c_graph import arena_bytes
from rmprune.c_source import c_source
from rmprune.errors import ExportError, UsageError
from rmprune.memory import resident_growth
from rmprune.models import create_model
from rmprune.onnx_graph import OnnxGraph
from rmprune.reports import environment
from rmprune.store import load

MEASURED = (
    *("net", "latency_ms", "latency_iqr_ms", "speedup", "images_per_second"),
    *("arena_bytes", "measured_bytes", "file_bytes"),
)
CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def open_network(
    name: str, image_shape: Sequence[int] | None = None, num_classes: int | None = None
) -> tuple[Network, Tensor]:
    """A network by the name of a file or of a model.

    Args:
        name: A net that rmprune saved, an ONNX file, or what `rmprune.create_model` knows.
        image_shape: ``(channels, height, width)`` for networks that do not know it; by
            default 3×224×224 for those of torchvision and timm, else 3×32×32.
        num_classes: Of models by name; by default 1000 for those of torchvision and timm,
            else 10.

    Returns:
        The network, and one image of noise for it, ``(1, …)``.

    Raises:
        UsageError: There is neither such a file nor such a model.
        StoreError: The file is not readable.
    """
    path = Path(name)
    if path.suffix in (".safetensors", ".onnx") and not path.exists():
        raise UsageError(f"there is no file {path}")
    if path.suffix == ".onnx":
        graph = OnnxGraph.load(path)
        return graph, graph.example_input(image_shape)
    if path.exists():
        net = load(path)
        return net, _noise(net.input_shape or image_shape or CIFAR)
    of_imagenet = ":" in name
    classes = num_classes or (1000 if of_imagenet else 10)
    model = create_model(name, num_classes=classes).eval()
    return model, _noise(image_shape or (IMAGENET if of_imagenet else CIFAR))


def _noise(shape: Sequence[int]) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def bench(
    networks: Mapping[str, tuple[Network, Tensor]],
    platform: Platform,
    *,
    rounds: int = 15,
    min_seconds: float = 0.1,
) -> pd.DataFrame:
    """Measure networks beside each other.

    Args:
        networks: By name, each with one image for it, ``(1, …)``.
        platform: What runs them.
        rounds: Samples of time per network.
        min_seconds: How long a sample lasts at least.

    Returns:
        A row a network: ``net``, ``latency_ms``, ``latency_iqr_ms``, ``speedup`` over the
        first, ``images_per_second``; ``arena_bytes``, the static memory that the activations
        of one image need in float32 or in the types of the graph, see `rmprune.arena.plan`;
        ``measured_bytes``, what resident memory rises by in the first pass of a batch;
        ``file_bytes`` of what is deployed; and the environment. None is what cannot be had.

    Raises:
        UsageError: There is no network, the backend is not installed, or does not run one.
        ExportError: There is no C for one.
    """
    if not networks:
        raise UsageError("name at least one network")
    for name, (network, _) in networks.items():
        if isinstance(network, OnnxGraph) and platform.backend == "torch":
            raise UsageError(
                f"{name} is an ONNX graph, which torch does not run; give --backend onnxruntime, "
                "openvino or c"
            )
    costs = [_costs(network, image, platform) for network, image in networks.values()]
    timings = time_deployed(
        {name: network for name, (network, _) in networks.items()},
        {name: image for name, (_, image) in networks.items()},
        platform,
        rounds=rounds,
        min_seconds=min_seconds,
    )
    first = next(iter(timings.values())).median_ms
    rows = [
        {
            "net": name,
            "latency_ms": timing.median_ms,
            "latency_iqr_ms": timing.iqr_ms,
            "speedup": first / timing.median_ms,
            "images_per_second": 1000 * platform.batch_size / timing.median_ms,
            **cost,
            **environment(platform),
            "backend": platform.backend,
            "version": platform.versions,
        }
        for (name, timing), cost in zip(timings.items(), costs, strict=True)
    ]
    return pd.DataFrame(rows)


def _costs(network: Network, image: Tensor, platform: Platform) -> dict[str, Any]:
    """What does not depend on the clock."""
    batch = repeated(image, platform.batch_size)
    return {
        "arena_bytes": _arena(network, image),
        "measured_bytes": _measured(network, batch, platform),
        "file_bytes": _file_bytes(network, batch, platform),
    }


def _arena(network: Network, image: Tensor) -> int | None:
    try:
        return arena_bytes(graph_of(network, image).proto)
    except (ExportError, UsageError):  # a graph for batches, or one that the planner cannot read
        return None


def _measured(network: Network, batch: Tensor, platform: Platform) -> int | None:
    if platform.backend == "c":
        return None  # its arena is static: all that would be seen is constants being read
    found = None
    for _ in range(2):  # the first time, libraries set up what they need once
        deployed = deploy(network, batch, platform)
        with torch.inference_mode():
            found = resident_growth(lambda run=deployed: run(batch))  # type: ignore[misc]
    return found


def _file_bytes(network: Network, batch: Tensor, platform: Platform) -> int:
    match platform.backend:
        case "torch":
            return len(safetensors.torch.save(dict(deploy(network, batch, platform).state_dict())))
        case "c":
            return c_source(graph_of(network, batch[:1]).proto).weight_bytes
        case _:
            return int(graph_of(network, batch).proto.ByteSize())
