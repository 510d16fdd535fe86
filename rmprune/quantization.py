"""Static quantisation to int8 after training, by onnxruntime.

Weights get a scale for each output channel, activations one scale and zero point a tensor,
read off calibration images; QuantizeLinear and DequantizeLinear stand around every operation
(QDQ), so that the graph runs on any ONNX backend.

Weights are int8, activations uint8. On x86 onnxruntime 1.32 makes int8 activations uint8 itself
(QDQS8ToU8Transformer), but not those that several nodes read, and convolutions between the two
kinds are then computed in float32: a net with additions is several times slower.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rmprune.errors import UsageError
from rmprune.extras import extra
from rmprune.onnx_graph import INPUT


def quantize(model: Any, batches: Iterable[Tensor], *, reduce_range: bool = False) -> Any:
    """An int8 graph of a float32 one.

    Args:
        model: An ``onnx.ModelProto``.
        batches: What the graph reads, of the shape that it takes; representative images.
        reduce_range: Weights in 7 bits. x86 CPUs with AVX2 or AVX-512 but without VNNI add
            products of 8 bits in pairs to 16 bits, which overflow.

    Returns:
        The graph with QDQ pairs, an ``onnx.ModelProto``.

    Raises:
        UsageError: There are no images, they do not fit, or the extra ``onnx`` is missing.
    """
    tools = extra("onnxruntime.quantization", "int8")
    onnx = extra("onnx", "int8")
    images = [batch.numpy() for batch in batches]
    expected = [d.dim_value or d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    if not images:
        raise UsageError("int8 needs calibration images, and there are none")
    fits = (
        n in (0, m) or isinstance(m, str) for n, m in zip(images[0].shape, expected, strict=True)
    )
    if len(images[0].shape) != len(expected) or not all(fits):
        raise UsageError(
            f"calibration images are {images[0].shape}, but the network takes {tuple(expected)}"
        )

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._images: Iterator[Any] = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {INPUT: image}

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            prepared = Path(folder) / "prepared.onnx"
            onnx.save(model, before)
            tools.quant_pre_process(before, prepared, skip_symbolic_shape=True)
            tools.quantize_static(
                prepared,
                after,
                Reader(),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                reduce_range=reduce_range,
            )
            return onnx.load(after)
    finally:
        logging.root.setLevel(level)
