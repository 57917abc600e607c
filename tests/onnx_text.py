"""Small ONNX networks written as text."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

Array = np.ndarray


def net(text: str, opset: int = 17, **arrays: Array) -> onnx.ModelProto:
    """Parse a network in ONNX's textual form; ``arrays`` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> net {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items())
    return model


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)
