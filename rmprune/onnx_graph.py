"""Networks as ONNX graphs: the exporter without its noise, and extras that may be missing."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import UsageError

INPUT, OUTPUT = "image", "logits"


def extra(module: str, purpose: str, name: str = "onnx") -> ModuleType:
    """A module of an optional extra.

    Args:
        module: To import.
        purpose: What needs it.
        name: Of the extra.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs {module}; install it: pip install 'rmprune[{name}]'"
        ) from error


def to_onnx(model: nn.Module, batch: Tensor, dynamic_batch: bool = False) -> Any:
    """The graph of a network, an ``onnx.ModelProto``.

    Args:
        model: In evaluation mode, on the CPU.
        batch: ``(N, …)``, the shape that the graph takes; N ≥ 2 if it is dynamic.
        dynamic_batch: Whether it takes any N.

    Raises:
        UsageError: The extra ``onnx`` is not installed.
    """
    extra("onnxscript", "ONNX")
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of onnxscript's and torch's own deprecations
            program = torch.onnx.export(
                model,
                (batch,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},) if dynamic_batch else None,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model_proto
