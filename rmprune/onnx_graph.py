"""Networks as ONNX graphs: the exporter without its noise, and extras that may be missing."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import StoreError, UsageError
from rmprune.extras import extra

INPUT, OUTPUT = "image", "logits"


@dataclass(frozen=True)
class OnnxGraph:
    """A network that is an ONNX graph with one input and one output.

    Attributes:
        proto: An ``onnx.ModelProto``.
    """

    proto: Any

    @classmethod
    def load(cls, path: Path) -> OnnxGraph:
        """Read a file.

        Raises:
            StoreError: It is no ONNX file, or has several inputs.
            UsageError: The extra ``onnx`` is not installed.
        """
        onnx = extra("onnx", "an ONNX file")
        try:
            proto = onnx.load(path)
            onnx.checker.check_model(proto)
        except Exception as error:  # protobuf's and onnx's own, which have no common base
            raise StoreError(f"{path} is not a readable ONNX file") from error
        given = {item.name for item in proto.graph.initializer}
        inputs = [item for item in proto.graph.input if item.name not in given]
        if len(inputs) != 1:
            raise StoreError(f"{path} has {len(inputs)} inputs; a network of images has one")
        return cls(proto)

    @property
    def batch_size(self) -> int | None:
        """Images that it takes at once; None is any number."""
        return self._shape[0]

    @property
    def _shape(self) -> tuple[int | None, ...]:
        dims = self.proto.graph.input[0].type.tensor_type.shape.dim
        return tuple(d.dim_value or None for d in dims)

    def example_input(self, image_shape: Sequence[int] | None = None) -> Tensor:
        """One image of noise, as the graph takes it.

        Args:
            image_shape: For graphs that do not say what they take.

        Raises:
            StoreError: The size of its images is not known.
        """
        onnx = extra("onnx", "an ONNX file")
        kind = self.proto.graph.input[0].type.tensor_type.elem_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        known = self._shape[1:]
        if None in known and len(image_shape or ()) != len(known):
            raise StoreError(
                "the ONNX graph does not say how large its images are; give --image-shape"
            )
        pairs = zip(known, image_shape or known, strict=False)
        sizes = [int(size or given or 0) for size, given in pairs]
        noise = torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0))
        return torch.from_numpy(
            (noise * 32 + 128 if dtype == "uint8" else noise).numpy().astype(dtype)
        )

    def for_batch(self, size: int) -> OnnxGraph:
        """The graph for batches of a size.

        Raises:
            UsageError: It was exported for batches of another one.
        """
        if self.batch_size == size:
            return self
        if self.batch_size is not None:
            raise UsageError(
                f"the ONNX graph is for batches of {self.batch_size}, not {size}; "
                "export it with --batch-size 0 for any number"
            )
        proto = copy.deepcopy(self.proto)
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = size
        del proto.graph.value_info[:]  # they speak of any number; inference finds them again
        return OnnxGraph(proto)


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
    # Of channels_last weights the exporter makes a pooling that gathers by index.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
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
