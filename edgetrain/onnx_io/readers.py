"""One function per ONNX operator, and the table of all of them.

A reader looks at one node and adds nodes to the graph. Constants were folded
before, so a reader only sees nodes that depend on the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.graph import Value
from edgetrain.onnx_io import shapes
from edgetrain.onnx_io.folding import without_repeats
from edgetrain.onnx_io.names import DIVIDE_BY_STD, SLOPING, SUBTRACT_MEAN
from edgetrain.onnx_io.reading import Reading, Source

Reader = Callable[[Reading, Source], None]

_WINDOW = ("strides", "pads", "dilations", "auto_pad")
_BIAS_AFTER = ("Conv", "Gemm", "MatMul")


def _plain(*attributes: str) -> Reader:
    """Return a reader of an operator with one input that the graph has under the same name."""

    def read(r: Reading, node: Source) -> None:
        r.emit(node, node.op_type, [r.value(node).name], **node.only(*attributes))

    return read


def _cast(r: Reading, node: Source) -> None:
    float32 = 1  # TensorProto.FLOAT
    if node.op_type == "Cast" and node.get("to") != float32:
        r.fail(node, "converts to another type than float32; edgetrain computes in float32")
    if r.is_constant(node, 0):  # CastLike: what it shall be like is a value of the network, so float32
        r.constants[node.outputs[0]] = r.constants[node.inputs[0]].astype(np.float32)
        return
    shapes.read_identity(r, node)


# --- layers with weights ---------------------------------------------------------------------------------------------


def _conv(r: Reading, node: Source) -> None:
    x, weights = r.value(node), r.constant(node, 1)
    if weights is not None and weights.ndim not in (3, 4):
        r.fail(node, f"weights of shape {weights.shape}: {weights.ndim - 2}-D convolution; supported are 1-D and 2-D")
    inputs: list[str | None] = [x.name, r.parameter(node, 1, trainable=True)]
    if node.has(2):
        inputs.append(r.parameter(node, 2, trainable=True))
    r.emit(node, "Conv", inputs, **node.only(*_WINDOW, "group"))


def _gemm(r: Reading, node: Source) -> None:
    if node.get("transA", 0):
        r.fail(node, "transA=1 would make the batch a feature; only transA=0 is supported")
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    node, turned = _as_stored(r, node, bool(node.get("transB", 0)))
    inputs: list[str | None] = [r.value(node).name, r.parameter(node, 1, trainable=True, scale=alpha)]
    if node.has(2) and beta:
        outputs = r.graph.arrays[str(inputs[1])].shape[0 if turned else 1]
        inputs.append(r.parameter(node, 2, trainable=True, shape=(outputs,), scale=beta))
    r.emit(node, "Gemm", inputs, **_turning(turned))


def _matmul(r: Reading, node: Source) -> None:
    x = r.value(node)
    node, turned = _as_stored(r, node, turned=False)
    inputs: list[str | None] = [x.name, r.parameter(node, 1, trainable=True)]
    r.emit(node, "Gemm" if turned else "MatMul", inputs, **_turning(turned))


def _turning(turned: bool) -> dict[str, Any]:
    return {"transB": 1} if turned else {}


def _as_stored(r: Reading, node: Source, turned: bool) -> tuple[Source, bool]:
    """Let a fully connected layer read its weights as the file has them, whose name they keep.

    Returns:
        The node, and whether its weights are (outputs, inputs); ``turned``: whether they were.
    """
    stored = r.transposed.get(node.inputs[1]) if node.has(1) else None
    if stored is None:
        return node, turned
    return replace(node, inputs=(node.inputs[0], stored, *node.inputs[2:])), not turned


def _batch_normalization(r: Reading, node: Source) -> None:
    if node.get("spatial", 1) == 0:
        r.fail(node, "spatial=0 (one average per pixel); only per-channel normalisation is supported")
    r.withhold(node, "running averages are kept inside the network")
    inputs: list[str | None] = [r.value(node).name]
    inputs += [r.parameter(node, i, trainable=True) for i in (1, 2)]
    inputs += [r.running_average(node, i) for i in (3, 4)]
    r.emit(node, "BatchNormalization", inputs, **node.only("epsilon", "momentum"))


# --- activations -----------------------------------------------------------------------------------------------------


def _clip(r: Reading, node: Source) -> None:
    bounds = {"min": r.scalar(node, 1, "min"), "max": r.scalar(node, 2, "max")}
    given = {name: bound for name, bound in bounds.items() if bound is not None and math.isfinite(bound)}
    if not given:
        r.alias(node, r.value(node))
        return
    if len(given) == 2 and given["min"] > given["max"]:
        r.fail(node, f"min {given['min']} is above max {given['max']}")
    attributes: dict[str, Any] = {**given}
    r.emit(node, "Clip", [r.value(node).name], **attributes)


def _bound(bound: str) -> Reader:
    """Return a reader of the larger, or smaller, of a value and a number: a Clip with one ``bound``."""

    def read(r: Reading, node: Source) -> None:
        constants = [i for i in range(len(node.inputs)) if r.is_constant(node, i)]
        numbers = [r.constants[node.inputs[i]] for i in constants]
        if len(node.inputs) != 2 or len(constants) != 1 or numbers[0].size != 1 or not np.isfinite(numbers[0]).all():
            r.fail(node, "of values, or of more than one number; supported is one value with one number")
        limits: dict[str, Any] = {bound: float(numbers[0].reshape(-1)[0])}
        r.emit(node, "Clip", [r.value(node, 1 - constants[0]).name], **limits)

    return read


def _prelu(r: Reading, node: Source) -> None:
    """Read ``max(x, 0) + slope * min(x, 0)``, whose slope is trained; so it is written, and found again by its name."""
    x, slopes = r.value(node), r.constant(node, 1)
    per_channel = slopes is not None and slopes.ndim == 1 < len(x.shape) and slopes.size == x.shape[0] != x.shape[-1]
    if slopes is not None and per_channel:  # files older than the rules of broadcasting
        r.constants[node.inputs[1]] = slopes.reshape(-1, *[1] * (len(x.shape) - 1))
    slope = r.parameter(node, 1, trainable=True)
    positive = r.emit(node, "Relu", [x.name], part="positive")
    negative = r.emit(node, "Clip", [x.name], part="negative", max=0.0)
    r.emit(node, "Add", [positive, r.emit(node, "Mul", [negative, slope], part=SLOPING)])


def _selu(r: Reading, node: Source) -> None:
    """Read ``gamma * Elu(x)``; the defaults are those of ONNX."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    _scaled_elu(r, node, r.value(node).name, float(alpha), float(gamma))


def _celu(r: Reading, node: Source) -> None:
    """Read ``alpha * Elu(x / alpha)``, whose own alpha is 1."""
    alpha, x = float(node.get("alpha", 1.0)), r.value(node).name
    if alpha <= 0:
        r.fail(node, f"alpha is {alpha}, expected more than 0")
    if alpha != 1:
        reciprocal = r.place(f"{node.name}.reciprocal", np.array(1 / alpha, np.float32))
        x = r.emit(node, "Mul", [x, reciprocal], part="divided")
    _scaled_elu(r, node, x, 1.0, alpha)


def _scaled_elu(r: Reading, node: Source, x: str, alpha: float, factor: float) -> None:
    y = r.emit(node, "Elu", [x], part="" if factor == 1 else "unscaled", alpha=alpha)
    if factor != 1:
        r.emit(node, "Mul", [y, r.place(f"{node.name}.factor", np.array(factor, np.float32))])


def _dropout(r: Reading, node: Source) -> None:
    r.withhold(node, "the mask is not a value of the graph")
    ratio = r.scalar(node, 1, "ratio")
    r.emit(node, "Dropout", [r.value(node).name], ratio=0.5 if ratio is None else ratio)


def _softmax(r: Reading, node: Source) -> None:
    x = r.value(node)
    axis = node.get("axis", -1 if r.opset >= 13 else 1)
    if len(x.shape) != 1 or axis not in (1, -1):
        r.fail(node, f"over axis {axis} of {x}; supported is a {node.op_type} over (N, classes) at the end")
    r.alias(node, x)
    r.probabilities[node.outputs[0]] = node.op_type


# --- pooling ---------------------------------------------------------------------------------------------------------


def _max_pool(r: Reading, node: Source) -> None:
    r.withhold(node, "the indices of the maxima are not a value of the graph")
    r.emit(node, "MaxPool", [r.value(node).name], **node.only("kernel_shape", *_WINDOW, "ceil_mode"))


def _global_max_pool(r: Reading, node: Source) -> None:
    x = r.value(node)
    r.emit(node, "MaxPool", [x.name], kernel_shape=list(x.shape[1:]))


def _reduce_mean(r: Reading, node: Source) -> None:
    """Read a mean over all spatial axes, or over one of them (a pool as wide as the map)."""
    x, axes = r.value(node), r.integers(node, 1, "axes")
    if not axes and node.get("noop_with_empty_axes", 0):
        r.alias(node, x)
        return
    rank = len(x.shape) + 1
    reduced = sorted(axis % rank for axis in axes or range(rank))
    if reduced[0] < 2:
        r.fail(node, f"a mean over the axes {reduced} of {x}; supported are means over spatial axes (2 and higher)")
    part = "" if node.get("keepdims", 1) else "pool"
    if reduced == list(range(2, rank)):
        pooled = r.emit(node, "GlobalAveragePool", [x.name], part=part)
    else:
        kernel = [size if axis in reduced else 1 for axis, size in enumerate(x.shape[1:], start=2)]
        pooled = r.emit(node, "AveragePool", [x.name], part=part, kernel_shape=kernel)
    if part:
        kept = [size for axis, size in enumerate(x.shape, start=1) if axis not in reduced]
        shapes.to_shape(r, node, r.graph.values[pooled], kept)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _operand(r: Reading, node: Source, index: int) -> str:
    """Return the name of one operand of Add or Mul, with constants put into the graph."""
    if not r.is_constant(node, index):
        return r.value(node, index).name
    other = r.value(node, 1 - index)
    array = r.constants[node.inputs[index]]
    if array.ndim == len(other.shape) + 1:  # else the first axis is not that of the batch
        array = r.constants[node.inputs[index]] = without_repeats(array, r.batch)
    if array.ndim > len(other.shape) and (array.ndim > len(other.shape) + 1 or array.shape[0] != 1):
        r.fail(node, f"a constant of shape {array.shape} with {other}: the batch dimension must stay free")
    learned = _is_bias(r, array, other) if node.op_type == "Add" else node.name.endswith(f".{SLOPING}")
    return r.parameter(node, index, trainable=learned)


def _is_bias(r: Reading, array: NDArray[Any], value: Value) -> bool:
    """Whether a constant added to ``value`` is the bias of the layer before; one number without an axis is none."""
    layer = r.graph.producer(value.name)
    if layer is None or layer.op_type not in _BIAS_AFTER or not value.shape or not array.ndim:
        return False
    return bool(array.size == value.shape[0 if layer.op_type == "Conv" else -1])


def _both_batched(r: Reading, node: Source) -> bool:
    """Whether neither operand is a constant; checks that they line up at the batch dimension."""
    if r.is_constant(node, 0) or r.is_constant(node, 1):
        return False
    a, b = r.value(node, 0), r.value(node, 1)
    if len(a.shape) != len(b.shape):
        r.fail(node, f"{a} with {b}: broadcasting would move the batch dimension")
    return True


def _add_or_mul(r: Reading, node: Source) -> None:
    _both_batched(r, node)
    r.emit(node, node.op_type, [_operand(r, node, 0), _operand(r, node, 1)])


def _sub(r: Reading, node: Source) -> None:
    if node.name == SUBTRACT_MEAN and r.is_constant(node, 1):
        r.mean = r.constant(node, 1)
        r.alias(node, r.value(node))
    elif _both_batched(r, node) or r.is_constant(node, 0):
        minus_one = r.place("edgetrain.minus_one", np.array(-1, np.float32))
        negative = r.emit(node, "Mul", [r.value(node, 1).name, minus_one], part="negative")
        r.emit(node, "Add", [_operand(r, node, 0), negative])
    else:
        _with_changed_constant(r, node, "Add", "negative", np.negative)


def _div(r: Reading, node: Source) -> None:
    if node.name == DIVIDE_BY_STD and r.is_constant(node, 1):
        r.std = r.constant(node, 1)
        r.alias(node, r.value(node))
        return
    if not r.is_constant(node, 1):
        r.fail(node, "division by a value that depends on the network's input; supported is division by a constant")
    if not np.all(r.constants[node.inputs[1]]):
        r.fail(node, f"division by '{node.inputs[1]}', which contains zero")
    _with_changed_constant(r, node, "Mul", "reciprocal", np.reciprocal)


def _with_changed_constant(r: Reading, node: Source, op_type: str, what: str, change: np.ufunc) -> None:
    """Replace ``x - c`` by ``x + (-c)`` and ``x / c`` by ``x * (1 / c)``."""
    kept = r.constants[node.inputs[1]]
    r.constants[f"{node.inputs[1]}.{what}"] = change(kept)
    changed = Source(op_type, node.name, (node.inputs[0], f"{node.inputs[1]}.{what}"), node.outputs, {})
    _add_or_mul(r, changed)


def _neg(r: Reading, node: Source) -> None:
    minus_one = r.place("edgetrain.minus_one", np.array(-1, np.float32))
    r.emit(node, "Mul", [r.value(node).name, minus_one])


def _sum(r: Reading, node: Source) -> None:
    if len({len(r.value(node, i).shape) for i in range(len(node.inputs))}) != 1:
        r.fail(node, "inputs of different rank: broadcasting would move the batch dimension")
    total = r.value(node).name
    if len(node.inputs) == 1:
        shapes.read_identity(r, node)
    for i in range(1, len(node.inputs)):
        part = f"part{i}" if i < len(node.inputs) - 1 else ""
        total = r.emit(node, "Add", [total, r.value(node, i).name], part=part)


READERS: dict[str, Reader] = {
    "Add": _add_or_mul,
    "AveragePool": _plain("kernel_shape", *_WINDOW, "ceil_mode", "count_include_pad"),
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "CastLike": _cast,
    "Celu": _celu,
    "Clip": _clip,
    "Concat": shapes.read_concat,
    "Conv": _conv,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _plain("alpha"),
    "Expand": shapes.read_expand,
    "Flatten": shapes.read_flatten,
    "Gather": shapes.read_gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _plain(),
    "GlobalMaxPool": _global_max_pool,
    "HardSigmoid": _plain("alpha", "beta"),
    "HardSwish": _plain(),
    "Identity": shapes.read_identity,
    "LeakyRelu": _plain("alpha"),
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "Max": _bound("min"),
    "MaxPool": _max_pool,
    "Min": _bound("max"),
    "Mul": _add_or_mul,
    "Neg": _neg,
    "Pad": shapes.read_pad,
    "PRelu": _prelu,
    "ReduceMean": _reduce_mean,
    "Relu": _plain(),
    "Reshape": shapes.read_reshape,
    "Selu": _selu,
    "Shape": shapes.read_shape,
    "Sigmoid": _plain(),
    "Size": shapes.read_size,
    "Slice": shapes.read_slice,
    "Softmax": _softmax,
    "Split": shapes.read_split,
    "Squeeze": shapes.read_squeeze,
    "Sub": _sub,
    "Sum": _sum,
    "Tanh": _plain(),
    "Transpose": shapes.read_transpose,
    "Unsqueeze": shapes.read_unsqueeze,
}
