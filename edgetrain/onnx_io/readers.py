"""One function per ONNX operator, and the table of all of them.

A reader looks at one node and adds nodes to the graph. Constants were folded
before, so a reader only sees nodes that depend on the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgetrain.graph import Value
from edgetrain.onnx_io.folding import static_shape, without_repeats
from edgetrain.onnx_io.names import DIVIDE_BY_STD, SUBTRACT_MEAN
from edgetrain.onnx_io.reading import Reading, Source

Reader = Callable[[Reading, Source], None]

_WINDOW = ("strides", "pads", "dilations", "auto_pad")
_BIAS_AFTER = ("Conv", "Gemm", "MatMul")


def _plain(*attributes: str) -> Reader:
    """Return a reader of an operator with one input that the graph has under the same name."""

    def read(r: Reading, node: Source) -> None:
        r.emit(node, node.op_type, [r.value(node).name], **node.only(*attributes))

    return read


def _identity(r: Reading, node: Source) -> None:
    if node.inputs[0] in r.probabilities:
        r.probabilities.add(node.outputs[0])
        r.values[node.outputs[0]] = r.values[node.inputs[0]]
    else:
        r.alias(node, r.value(node))


def _cast(r: Reading, node: Source) -> None:
    float32 = 1  # TensorProto.FLOAT
    if node.op_type == "Cast" and node.get("to") != float32:
        r.fail(node, "converts to another type than float32; edgetrain computes in float32")
    _identity(r, node)


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
    inputs: list[str | None] = [r.value(node).name, r.parameter(node, 1, trainable=True, scale=alpha)]
    if node.has(2) and beta:
        outputs = r.graph.arrays[str(inputs[1])].shape[0 if node.get("transB", 0) else 1]
        inputs.append(r.parameter(node, 2, trainable=True, shape=(outputs,), scale=beta))
    r.emit(node, "Gemm", inputs, **node.only("transB"))


def _matmul(r: Reading, node: Source) -> None:
    x = r.value(node)
    r.emit(node, "MatMul", [x.name, r.parameter(node, 1, trainable=True)])


def _batch_normalization(r: Reading, node: Source) -> None:
    if node.get("spatial", 1) == 0:
        r.fail(node, "spatial=0 (one average per pixel); only per-channel normalisation is supported")
    r.withhold(node, "running averages are kept inside the network")
    inputs: list[str | None] = [r.value(node).name]
    inputs += [r.parameter(node, i, trainable=i in (1, 2)) for i in range(1, 5)]
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


def _dropout(r: Reading, node: Source) -> None:
    r.withhold(node, "the mask is not a value of the graph")
    ratio = r.scalar(node, 1, "ratio")
    r.emit(node, "Dropout", [r.value(node).name], ratio=0.5 if ratio is None else ratio)


def _softmax(r: Reading, node: Source) -> None:
    x = r.value(node)
    axis = node.get("axis", -1 if r.opset >= 13 else 1)
    if len(x.shape) != 1 or axis not in (1, -1):
        r.fail(node, f"over axis {axis} of {x}; supported is a Softmax over (N, classes) at the end")
    r.alias(node, x)
    r.probabilities.add(node.outputs[0])


# --- pooling ---------------------------------------------------------------------------------------------------------


def _max_pool(r: Reading, node: Source) -> None:
    r.withhold(node, "the indices of the maxima are not a value of the graph")
    r.emit(node, "MaxPool", [r.value(node).name], **node.only("kernel_shape", *_WINDOW, "ceil_mode"))


def _global_max_pool(r: Reading, node: Source) -> None:
    x = r.value(node)
    r.emit(node, "MaxPool", [x.name], kernel_shape=list(x.shape[1:]))


def _reduce_mean(r: Reading, node: Source) -> None:
    x, axes = r.value(node), r.integers(node, 1, "axes")
    if not axes and node.get("noop_with_empty_axes", 0):
        r.alias(node, x)
        return
    rank = len(x.shape) + 1
    reduced = sorted(axis % rank for axis in axes or range(rank))
    if rank < 3 or reduced != list(range(2, rank)):
        r.fail(node, f"a mean over the axes {reduced} of {x}; supported is the mean over all spatial axes")
    if node.get("keepdims", 1):
        r.emit(node, "GlobalAveragePool", [x.name])
        return
    pooled = r.emit(node, "GlobalAveragePool", [x.name], part="pool")
    r.emit(node, "Flatten", [pooled], axis=1)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _operand(r: Reading, node: Source, index: int) -> str:
    """Return the name of one operand of Add or Mul, with constants put into the graph."""
    if not r.is_constant(node, index):
        return r.value(node, index).name
    other = r.value(node, 1 - index)
    array = r.constants[node.inputs[index]] = without_repeats(r.constants[node.inputs[index]], r.batch)
    if array.ndim > len(other.shape) and (array.ndim > len(other.shape) + 1 or array.shape[0] != 1):
        r.fail(node, f"a constant of shape {array.shape} with {other}: the batch dimension must stay free")
    return r.parameter(node, index, trainable=node.op_type == "Add" and _is_bias(r, array.size, other))


def _is_bias(r: Reading, size: int, value: Value) -> bool:
    """Whether a constant added to ``value`` is the bias of the layer before."""
    layer = r.graph.producer(value.name)
    if layer is None or layer.op_type not in _BIAS_AFTER or size == 1 or not value.shape:
        return False
    return size == value.shape[0 if layer.op_type == "Conv" else -1]


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
    shapes = {len(r.value(node, i).shape) for i in range(len(node.inputs))}
    if len(shapes) != 1:
        r.fail(node, "inputs of different rank: broadcasting would move the batch dimension")
    total = r.value(node).name
    if len(node.inputs) == 1:
        _identity(r, node)
    for i in range(1, len(node.inputs)):
        part = f"part{i}" if i < len(node.inputs) - 1 else ""
        total = r.emit(node, "Add", [total, r.value(node, i).name], part=part)


# --- shape -----------------------------------------------------------------------------------------------------------


def _concat(r: Reading, node: Source) -> None:
    parts = [r.value(node, i) for i in range(len(node.inputs))]
    axis = node.get("axis", 1) % (len(parts[0].shape) + 1)
    if len(parts) == 1:
        r.alias(node, parts[0])
    else:
        r.emit(node, "Concat", [part.name for part in parts], axis=axis)


def _pad(r: Reading, node: Source) -> None:
    x, pads = r.value(node), r.integers(node, 1, "pads")
    if node.get("mode", "constant") != "constant":
        r.fail(node, f"mode '{node.get('mode')}'; supported is 'constant'")
    rank = len(x.shape) + 1
    axes = [axis % rank for axis in r.integers(node, 3, "axes") or range(rank)]
    if pads is None or len(pads) != 2 * len(axes):
        r.fail(node, f"pads {pads} for the axes {axes}; expected two numbers per axis")
    full = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        full[axis], full[axis + rank] = pads[i], pads[i + len(axes)]
    if not any(full):
        r.alias(node, x)
        return
    if full[0] or full[rank]:
        r.fail(node, f"pads {full} would add samples to the batch")
    r.emit(node, "Pad", [x.name], pads=full, value=r.scalar(node, 2, "value") or 0.0)


def _to_shape(r: Reading, node: Source, x: Value, shape: list[int]) -> None:
    """Emit what gives a value the shape (without the batch dimension): nothing, Flatten, or Reshape."""
    if tuple(shape) == x.shape:
        r.alias(node, x)
    elif len(shape) == 1:
        r.emit(node, "Flatten", [x.name], axis=1)
    else:
        r.emit(node, "Reshape", [x.name], shape=shape)


def _flatten(r: Reading, node: Source) -> None:
    x = r.value(node)
    if node.get("axis", 1) % (len(x.shape) + 1) != 1:
        r.fail(node, f"axis {node.get('axis')} of {x} would merge other dimensions with the batch; supported is axis 1")
    _to_shape(r, node, x, [x.size])


def _reshape(r: Reading, node: Source) -> None:
    x, target = r.value(node), r.integers(node, 1, "shape") or []
    shape = static_shape(target, x.shape, r.batches, bool(node.get("allowzero", 0)))
    if shape is None:
        r.fail(node, f"from {x} to {target}: the batch dimension must stay first and whole")
    _to_shape(r, node, x, shape)


def _squeeze(r: Reading, node: Source) -> None:
    x, axes = r.value(node), r.integers(node, 1, "axes")
    rank = len(x.shape) + 1
    gone = {axis % rank for axis in axes} if axes is not None else {i + 1 for i, n in enumerate(x.shape) if n == 1}
    if 0 in gone or any(x.shape[axis - 1] != 1 for axis in gone):
        r.fail(node, f"removes the axes {sorted(gone)} of {x}; supported are axes of size 1 after the batch dimension")
    _to_shape(r, node, x, [n for i, n in enumerate(x.shape, start=1) if i not in gone])


def _unsqueeze(r: Reading, node: Source) -> None:
    x, axes = r.value(node), r.integers(node, 1, "axes") or []
    rank = len(x.shape) + 1 + len(axes)
    new = {axis % rank for axis in axes}
    if 0 in new:
        r.fail(node, f"adds an axis before the batch dimension of {x}")
    sizes = iter(x.shape)
    _to_shape(r, node, x, [1 if axis in new else next(sizes) for axis in range(1, rank)])


def _transpose(r: Reading, node: Source) -> None:
    x = r.value(node)
    perm = node.get("perm", list(range(len(x.shape) + 1))[::-1])
    moved = [axis for axis in perm[1:] if axis and x.shape[axis - 1] > 1]
    if perm[0] != 0 or moved != sorted(moved):
        r.fail(node, f"perm {perm} of {x} reorders data; supported are permutations that only move axes of size 1")
    _to_shape(r, node, x, [x.shape[axis - 1] for axis in perm[1:]])


def _expand(r: Reading, node: Source) -> None:
    x, target = r.value(node), r.integers(node, 1, "shape") or []
    sizes = zip(reversed(target), reversed(x.shape), strict=False)
    if len(target) > len(x.shape) + 1 or any(wanted not in (1, size) for wanted, size in sizes):
        r.fail(node, f"from {x} to {target}: supported is an Expand that changes nothing")
    _identity(r, node)


def _slice(r: Reading, node: Source) -> None:
    """Read a Slice that keeps everything, or every n-th pixel as shortcuts of residual networks do."""
    x, rank = r.value(node), len(r.value(node).shape) + 1
    starts, ends = r.integers(node, 1, "starts") or [], r.integers(node, 2, "ends") or []
    axes = [axis % rank for axis in r.integers(node, 3, "axes") or range(len(starts))]
    strides = [1] * rank
    for axis, start, end, step in zip(axes, starts, ends, r.integers(node, 4, "steps") or [1] * len(axes), strict=True):
        size = r.batch if axis == 0 else x.shape[axis - 1]
        if start % size or start >= size or end < size or step < 1:
            cut = f"[{start}:{end}:{step}] of axis {axis} of {x}"
            r.fail(node, f"{cut} drops data; supported are whole axes and steps over pixels")
        strides[axis] = step
    if max(strides) == 1:
        r.alias(node, x)
    elif max(strides[:2]) > 1:
        r.fail(node, f"steps {strides} over samples or channels; supported are steps over pixels")
    else:
        r.emit(node, "AveragePool", [x.name], kernel_shape=[1] * (rank - 2), strides=strides[2:])


def _shape(r: Reading, node: Source) -> None:
    sizes = np.array([r.batch, *r.value(node).shape], np.int64)
    r.constants[node.outputs[0]] = sizes[slice(node.get("start", 0), node.get("end"))]


def _size(r: Reading, node: Source) -> None:
    r.constants[node.outputs[0]] = np.array(r.batch * r.value(node).size, np.int64)


READERS: dict[str, Reader] = {
    "Add": _add_or_mul,
    "AveragePool": _plain("kernel_shape", *_WINDOW, "ceil_mode", "count_include_pad"),
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "CastLike": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _plain(),
    "GlobalMaxPool": _global_max_pool,
    "HardSigmoid": _plain("alpha", "beta"),
    "HardSwish": _plain(),
    "Identity": _identity,
    "LeakyRelu": _plain("alpha"),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _add_or_mul,
    "Neg": _neg,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _plain(),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _plain(),
    "Size": _size,
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Sub": _sub,
    "Sum": _sum,
    "Tanh": _plain(),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
