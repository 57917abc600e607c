"""Readers of the ONNX operators that change shapes or nothing at all; the batch dimension must stay first."""

from __future__ import annotations

import numpy as np

from edgetrain.graph import Value
from edgetrain.onnx_io.folding import static_shape
from edgetrain.onnx_io.reading import Reading, Source


def read_identity(r: Reading, node: Source) -> None:
    """Let the output be the input; a Softmax or LogSoftmax stays recognisable behind it."""
    if node.inputs[0] in r.probabilities:
        r.probabilities[node.outputs[0]] = r.probabilities[node.inputs[0]]
        r.values[node.outputs[0]] = r.values[node.inputs[0]]
    else:
        r.alias(node, r.value(node))


def read_concat(r: Reading, node: Source) -> None:
    """Join batched values along the channels."""
    parts = [r.value(node, i) for i in range(len(node.inputs))]
    axis = node.get("axis", 1) % (len(parts[0].shape) + 1)
    if len(parts) == 1:
        r.alias(node, parts[0])
    else:
        r.emit(node, "Concat", [part.name for part in parts], axis=axis)


def read_pad(r: Reading, node: Source) -> None:
    """Gather pads for some axes into pads for all axes."""
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


def to_shape(r: Reading, node: Source, x: Value, shape: list[int]) -> None:
    """Emit what gives a value the shape (without the batch dimension): nothing, Flatten, or Reshape."""
    if tuple(shape) == x.shape:
        r.alias(node, x)
    elif len(shape) == 1:
        r.emit(node, "Flatten", [x.name], axis=1)
    else:
        r.emit(node, "Reshape", [x.name], shape=shape)


def read_flatten(r: Reading, node: Source) -> None:
    """Make one vector per sample."""
    x = r.value(node)
    if node.get("axis", 1) % (len(x.shape) + 1) != 1:
        r.fail(node, f"axis {node.get('axis')} of {x} would merge other dimensions with the batch; supported is axis 1")
    to_shape(r, node, x, [x.size])


def read_reshape(r: Reading, node: Source) -> None:
    """Resolve the target, in which the batch may be written as 0, -1, or a size."""
    x, target = r.value(node), r.integers(node, 1, "shape") or []
    shape = static_shape(target, x.shape, r.batches, bool(node.get("allowzero", 0)))
    if shape is None:
        r.fail(node, f"from {x} to {target}: the batch dimension must stay first and whole")
    to_shape(r, node, x, shape)


def read_squeeze(r: Reading, node: Source) -> None:
    """Drop axes of size 1."""
    x, axes = r.value(node), r.integers(node, 1, "axes")
    rank = len(x.shape) + 1
    gone = {axis % rank for axis in axes} if axes is not None else {i + 1 for i, n in enumerate(x.shape) if n == 1}
    if 0 in gone or any(x.shape[axis - 1] != 1 for axis in gone):
        r.fail(node, f"removes the axes {sorted(gone)} of {x}; supported are axes of size 1 after the batch dimension")
    to_shape(r, node, x, [n for i, n in enumerate(x.shape, start=1) if i not in gone])


def read_unsqueeze(r: Reading, node: Source) -> None:
    """Insert axes of size 1."""
    x, axes = r.value(node), r.integers(node, 1, "axes") or []
    rank = len(x.shape) + 1 + len(axes)
    new = {axis % rank for axis in axes}
    if 0 in new:
        r.fail(node, f"adds an axis before the batch dimension of {x}")
    sizes = iter(x.shape)
    to_shape(r, node, x, [1 if axis in new else next(sizes) for axis in range(1, rank)])


def read_transpose(r: Reading, node: Source) -> None:
    """Accept permutations that leave the data in place."""
    x = r.value(node)
    perm = node.get("perm", list(range(len(x.shape) + 1))[::-1])
    moved = [axis for axis in perm[1:] if axis and x.shape[axis - 1] > 1]
    if perm[0] != 0 or moved != sorted(moved):
        r.fail(node, f"perm {perm} of {x} reorders data; supported are permutations that only move axes of size 1")
    to_shape(r, node, x, [x.shape[axis - 1] for axis in perm[1:]])


def read_expand(r: Reading, node: Source) -> None:
    """Read an Expand of a sample's axes of size 1, a product with ones; most change nothing."""
    x, target = r.value(node), r.integers(node, 1, "shape") or []
    rank = len(x.shape)
    wanted = ([1] * rank + target)[len(target) :]  # of a sample, whose last axes they are
    grows = len(target) == rank + 1 and target[0] not in (1, r.batch, r.fixed_batch)  # the batch
    cut = any(size > 1 and n not in (1, size) for n, size in zip(wanted, x.shape, strict=True))
    if grows or cut or len(target) > rank + 1:
        told = ["N" if n == r.batch else n for n in target]
        r.fail(node, f"from {x} to {told}: supported is an Expand over axes of size 1 that leaves the batch alone")
    ones = [n if size == 1 else 1 for n, size in zip(wanted, x.shape, strict=True)]
    if max(ones, default=1) == 1:
        read_identity(r, node)
    else:
        r.emit(node, "Mul", [x.name, r.place(f"{node.name}.ones", np.ones(ones, np.float32))])


def read_slice(r: Reading, node: Source) -> None:
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


def read_shape(r: Reading, node: Source) -> None:
    """Answer with sizes, the marker standing for the batch."""
    sizes = np.array([r.batch, *r.value(node).shape], np.int64)
    r.constants[node.outputs[0]] = sizes[slice(node.get("start", 0), node.get("end"))]


def read_size(r: Reading, node: Source) -> None:
    """Answer with the number of elements, the marker standing for the batch."""
    r.constants[node.outputs[0]] = np.array(r.batch * r.value(node).size, np.int64)
