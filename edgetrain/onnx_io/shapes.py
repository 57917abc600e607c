"""Readers of the ONNX operators that change shapes or nothing at all; the batch dimension must stay first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgetrain.graph import Value
from edgetrain.onnx_io.folding import static_shape
from edgetrain.onnx_io.reading import Reading, Source


def read_identity(r: Reading, node: Source) -> None:
    """Let the output be the input; a Softmax, LogSoftmax or channels in groups stay recognisable behind it."""
    if node.inputs[0] in r.grouped:
        _keep_grouped(r, node, *r.grouped[node.inputs[0]])
    elif node.inputs[0] in r.probabilities:
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
    if node.get("axis", 1) not in (1, -len(x.shape) or 1):
        r.fail(node, f"axis {node.get('axis')} of {x} would merge other dimensions with the batch; supported is axis 1")
    to_shape(r, node, x, [x.size])


def read_reshape(r: Reading, node: Source) -> None:
    """Resolve the target, in which the batch may be written as 0, -1, or a size."""
    grouped = r.grouped.get(node.inputs[0])
    x, target = grouped[0] if grouped else r.value(node), r.integers(node, 1, "shape") or []
    source = _grouped_shape(*grouped) if grouped else x.shape
    shape = static_shape(target, source, r.batches, bool(node.get("allowzero", 0)))
    if shape is None:
        r.fail(node, f"from {x} to {target}: the batch dimension must stay first and whole")
    if grouped:
        _read_shuffle(r, node, shape, *grouped)
    elif len(shape) == 4 and len(x.shape) == 3 and shape[0] > 1 and tuple(shape[2:]) == x.shape[1:]:
        _keep_grouped(r, node, x, shape[0], dealt=False)
    else:
        to_shape(r, node, x, shape)


def _read_shuffle(r: Reading, node: Source, shape: list[int], x: Value, group: int, dealt: bool) -> None:
    """Read the Reshape that ends a channel shuffle."""
    if not dealt or tuple(shape) != x.shape:
        r.fail(node, _GROUPED)
    r.emit(node, "ChannelShuffle", [x.name], group=group)


_GROUPED = "channels in groups; supported is a channel shuffle: a Reshape, groups and their channels swapped, and back"


def _grouped_shape(x: Value, group: int, dealt: bool) -> tuple[int, ...]:
    per = x.shape[0] // group
    return ((per, group) if dealt else (group, per)) + x.shape[1:]


def _keep_grouped(r: Reading, node: Source, x: Value, group: int, dealt: bool) -> None:
    """Remember maps with their channels in groups, which only a channel shuffle reads."""
    r.grouped[node.outputs[0]] = x, group, dealt
    r.withheld[node.outputs[0]] = _GROUPED


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
    """Read permutations of a sample's axes, and those of a channel shuffle; many only move axes of size 1."""
    if node.inputs[0] in r.grouped and node.get("perm") == [0, 2, 1, 3, 4]:
        x, group, dealt = r.grouped[node.inputs[0]]
        if dealt:
            r.fail(node, _GROUPED)
        _keep_grouped(r, node, x, group, dealt=True)
        return
    x = r.value(node)
    if node.inputs[0] == r.channels_last:
        r.alias(node, x)
        return
    perm = node.get("perm", list(range(len(x.shape) + 1))[::-1])
    moved = [axis for axis in perm[1:] if axis and x.shape[axis - 1] > 1]
    if perm[0] != 0:
        r.fail(node, f"perm {perm} of {x}: the batch dimension must stay first")
    if moved == sorted(moved):
        to_shape(r, node, x, [x.shape[axis - 1] for axis in perm[1:]])
    else:
        r.emit(node, "Transpose", [x.name], perm=perm)


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


def read_split(r: Reading, node: Source) -> None:
    """Read a Split of the channels, or of an axis of the maps."""
    x, count = r.value(node), len(node.outputs)
    axis = node.get("axis", 0) % (len(x.shape) + 1)
    if axis == 0:
        r.fail(node, f"axis 0 of {x} is the batch; supported are the axes of a sample")
    size, sizes = x.shape[axis - 1], r.integers(node, 1, "split")
    if sizes is None:
        sizes = [min(-(-size // count), size - i * -(-size // count)) for i in range(count)]
    if len(sizes) != count or sum(sizes) != size or min(sizes) < 1:
        r.fail(node, f"sizes {sizes} for {count} outputs of axis {axis} of {x}")
    start = 0
    for name, part in zip(node.outputs, sizes, strict=True):
        if name:
            _cut(r, replace(node, name=f"{node.name}.{name}", outputs=(name,)), x, {axis: (start, start + part)})
        start += part


def _cut(r: Reading, node: Source, x: Value, kept: Mapping[int, tuple[int, int]]) -> None:
    """Keep a part of a value: from and up to which index, by axis."""
    rank = len(x.shape) + 1
    pads = [0] * (2 * rank)
    for axis, (start, end) in kept.items():
        pads[axis], pads[axis + rank] = -start, end - x.shape[axis - 1]
    if any(pads):
        r.emit(node, "Pad", [x.name], pads=pads, value=0.0)
    else:
        r.alias(node, x)


def read_gather(r: Reading, node: Source) -> None:
    """Read one index along an axis of a sample, as of the last step of a signal."""
    x, index = r.value(node), r.constant(node, 1)
    axis = node.get("axis", 0) % (len(x.shape) + 1)
    if axis == 0 or index is None or index.size != 1:
        told = "several indices" if axis else "samples of the batch"
        r.fail(node, f"{told} of {x}; supported is one index along an axis of a sample")
    before, size, behind = x.shape[: axis - 1], x.shape[axis - 1], x.shape[axis:]
    place = int(index.reshape(-1)[0])
    if not -size <= place < size:
        r.fail(node, f"index {place} of axis {axis} of {x}")
    part = replace(node, name=f"{node.name}.part", outputs=(f"{node.outputs[0]}.part",))
    _cut(r, part, x, {axis: (place % size, place % size + 1)})
    to_shape(r, node, r.value(replace(node, inputs=part.outputs)), [*before, *[1] * index.ndim, *behind])


def read_slice(r: Reading, node: Source) -> None:
    """Read a Slice of neighbours, or of every n-th pixel as in shortcuts of residual networks."""
    x, rank = r.value(node), len(r.value(node).shape) + 1
    starts, ends = r.integers(node, 1, "starts") or [], r.integers(node, 2, "ends") or []
    axes = [axis % rank for axis in r.integers(node, 3, "axes") or range(len(starts))]
    strides, kept = [1] * rank, {}
    for axis, start, end, step in zip(axes, starts, ends, r.integers(node, 4, "steps") or [1] * len(axes), strict=True):
        size = r.batch if axis == 0 else x.shape[axis - 1]
        first, last = (min(size, max(0, place + size) if place < 0 else place) for place in (start, end))
        whole = (first, last) == (0, size)
        if step < 1 or first >= last or not (whole or (axis and step == 1)):
            cut = f"[{start}:{end}:{step}] of axis {axis} of {x}"
            r.fail(node, f"{cut}; supported are neighbours along an axis of a sample, and steps over whole maps")
        strides[axis] = step
        if not whole:
            kept[axis] = first, last
    if max(strides) == 1:
        _cut(r, node, x, kept)
    elif max(strides[:2]) > 1 or kept:
        r.fail(node, f"steps {strides}; supported are steps over pixels, of whole maps")
    else:
        r.emit(node, "AveragePool", [x.name], kernel_shape=[1] * (rank - 2), strides=strides[2:])


def read_shape(r: Reading, node: Source) -> None:
    """Answer with sizes, the marker standing for the batch."""
    sizes = np.array([r.batch, *r.value(node).shape], np.int64)
    r.constants[node.outputs[0]] = sizes[slice(node.get("start", 0), node.get("end"))]


def read_size(r: Reading, node: Source) -> None:
    """Answer with the number of elements, the marker standing for the batch."""
    r.constants[node.outputs[0]] = np.array(r.batch * r.value(node).size, np.int64)
