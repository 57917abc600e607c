"""Operators that only move data: Reshape, Flatten, Concat, ChannelShuffle, Transpose, and Pad, which also cuts off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.arrays import map_sizes
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape
from edgetrain.ops.geometry import channels_of
from edgetrain.ops.registry import Array, Op, describe, register

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering


# Operators whose output may be the input's memory under another shape.
RESHAPES = ("Reshape", "Flatten")


@register
class Reshape(Op):
    """Give every sample another shape; attribute ``shape`` leaves the batch dimension out, one size may be -1."""

    name = "Reshape"
    attributes = ("shape",)

    def target(self, node: Node) -> Shape:
        """Return the per-sample output shape.

        Raises:
            GraphError: the number of elements changes.
        """
        shape = [int(n) for n in node.get("shape") or ()]
        if shape.count(-1) == 1:
            rest = math.prod(n for n in shape if n != -1)
            shape[shape.index(-1)] = node.x.size // max(1, rest)
        if math.prod(shape) != node.x.size:
            raise GraphError(f"{describe(node)}: {node.x.size} elements per sample do not fit the shape {shape}")
        return tuple(shape)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The target shape."""
        return [(self.target(node), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """NumPy's reshape."""
        return (inputs[0].reshape(inputs[0].shape[0], *node.y.shape),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Reshape back."""
        return [tape.add("Reshape", [grad_out[0]], like=node.x, shape=node.x.shape)]

    def lower(self, node: Node, low: Lowering) -> None:
        """Nothing when both share memory, else a copy."""
        low.copy(node.x, node.y)


@register
class Flatten(Reshape):
    """ONNX Flatten with ``axis=1``: one vector per sample."""

    name = "Flatten"
    attributes = ("axis",)

    def target(self, node: Node) -> Shape:
        """Return ``(F,)``.

        Raises:
            GraphError: another axis than 1.
        """
        axis = int(node.get("axis", 1))
        if axis not in (1, -len(node.x.shape)):
            raise GraphError(f"{describe(node)}: axis={axis}; only axis=1 keeps one vector per sample")
        return (node.x.size,)


@register
class Concat(Op):
    """ONNX Concat along the channels (``axis=1``)."""

    name = "Concat"
    arity = (1, 1024)
    attributes = ("axis",)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Channels add up.

        Raises:
            GraphError: another axis than that of the channels, or other sizes are not equal.
        """
        values = [v for v in node.inputs if v is not None]
        rank = len(node.x.shape)
        axis = int(node.get("axis", 1))
        if axis not in (1, -rank) or len({(v.shape[1:], v.batched) for v in values}) != 1 or rank == 0:
            raise GraphError(f"{describe(node)}: axis={axis}; only axis=1 of values with equal maps is supported")
        return [((sum(v.shape[0] for v in values), *node.x.shape[1:]), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """NumPy's concatenate."""
        return (np.concatenate(inputs, axis=1),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Each input's channels: those before and behind are cut off."""
        grads, start, others = [], 0, [0] * (len(node.x.shape) - 1)
        for value in node.inputs:
            assert value is not None
            behind = node.y.shape[0] - start - value.shape[0]
            pads = [0, -start, *others, 0, -behind, *others]
            grads.append(tape.add("Pad", [grad_out[0]], like=value, pads=pads) if tape.needs(value) else None)
            start += value.shape[0]
        return grads

    def lower(self, node: Node, low: Lowering) -> None:
        """One copy per input."""
        start = 0
        for value in node.inputs:
            assert value is not None
            low.copy_part(value, node.y, to=(start, 0, 0))
            start += channels_of(value)


@register
class ChannelShuffle(Op):
    """Channels dealt out: channel ``i`` of each of ``group`` runs of neighbours comes before channel ``i + 1`` of any.

    In ONNX files a Reshape to ``(N, group, C / group, H, W)``, a Transpose of the two, and a Reshape back.

    Source: Zhang, Zhou, Lin and Sun, ShuffleNet, CVPR 2018, section 3.1.
    """

    name = "ChannelShuffle"
    attributes = ("group",)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Same shape.

        Raises:
            GraphError: ``group`` does not divide the channels.
        """
        group, shape = int(node.get("group") or 0), node.x.shape
        if len(shape) != 3 or group < 1 or shape[0] % group:
            raise GraphError(f"{describe(node)}: group={group} for {node.x}, expected a divisor of its channels")
        return [(shape, True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """As in ONNX files."""
        count, channels, *size = inputs[0].shape
        group = int(node.get("group"))
        grouped = inputs[0].reshape(count, group, channels // group, *size)
        return (grouped.swapaxes(1, 2).reshape(inputs[0].shape),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Shuffle back."""
        group = node.x.shape[0] // int(node.get("group"))
        return [tape.add("ChannelShuffle", [grad_out[0]], like=node.x, group=group)]

    def lower(self, node: Node, low: Lowering) -> None:
        """A copy."""
        low.shuffle_channels(node.x, node.y, int(node.get("group")))


@register
class Transpose(Op):
    """ONNX Transpose of the axes of a sample: ``perm`` has the batch, which stays first, included."""

    name = "Transpose"
    attributes = ("perm",)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The sizes in their new order.

        Raises:
            GraphError: ``perm`` is no order of the axes that leaves the batch first, or there are more than three.
        """
        perm, rank = node.get("perm"), len(node.x.shape)
        if not 1 <= rank <= 3 or perm is None or [*sorted(perm)] != [*range(rank + 1)] or perm[0]:
            raise GraphError(f"{describe(node)}: perm={perm} of {node.x}, expected an order of up to three axes behind "
                             "the batch, which stays first")  # fmt: skip
        return [(tuple(node.x.shape[axis - 1] for axis in perm[1:]), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """NumPy's transpose."""
        return (np.transpose(inputs[0], node.get("perm")),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """The inverse order."""
        perm = [int(axis) for axis in np.argsort(node.get("perm"))]
        return [tape.add("Transpose", [grad_out[0]], like=node.x, perm=perm)]

    def lower(self, node: Node, low: Lowering) -> None:
        """A copy."""
        order = [axis - 1 for axis in node.get("perm")[1:]]
        low.transpose(node.x, node.y, {1: [0, 1, 2], 2: [2 * order[0], 1, 2 * order[-1]]}.get(len(order), order))


def _pad_axes(node: Node) -> list[tuple[int, int]]:
    """Return (before, behind) for channels, rows, columns.

    Raises:
        GraphError: the pads touch the batch, or have the wrong number.
    """
    rank = len(node.x.shape)
    pads = [int(n) for n in node.get("pads") or ()]
    if not 1 <= rank <= 3:
        raise GraphError(f"{describe(node)}: {node.x} has {rank} dimensions beside the batch, expected 1 to 3")
    if len(pads) != 2 * (rank + 1) or pads[0] or pads[rank + 1]:
        raise GraphError(f"{describe(node)}: pads={pads}, expected {2 * (rank + 1)} numbers that leave the batch alone")
    pairs = list(zip(pads[1 : rank + 1], pads[rank + 2 :], strict=True))
    return {1: [pairs[0], (0, 0), (0, 0)], 2: [pairs[0], (0, 0), pairs[-1]]}.get(rank, pairs)


@register
class Pad(Op):
    """ONNX Pad, constant mode; negative pads crop. Attributes ``pads`` (batch included) and ``value``."""

    name = "Pad"
    attributes = ("pads", "value")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Sizes plus pads."""
        sizes = map_sizes(node.x.shape)
        grown = tuple(n + a + b for n, (a, b) in zip(sizes, _pad_axes(node), strict=True))
        return [({1: grown[:1], 2: (grown[0], grown[2])}.get(len(node.x.shape), grown), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """NumPy's pad after cropping."""
        x = inputs[0].reshape(inputs[0].shape[0], *map_sizes(node.x.shape))
        axes = _pad_axes(node)
        inside = tuple(slice(max(0, -a), n - max(0, -b)) for n, (a, b) in zip(x.shape[1:], axes, strict=True))
        widths = [(0, 0), *[(max(0, a), max(0, b)) for a, b in axes]]
        y = np.pad(x[(slice(None), *inside)], widths, constant_values=node.get("value", 0.0))
        return (y.reshape(x.shape[0], *node.y.shape),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Pad by the negative amounts."""
        return [tape.add("Pad", [grad_out[0]], like=node.x, pads=[-int(n) for n in node.get("pads")], value=0.0)]

    def lower(self, node: Node, low: Lowering) -> None:
        """Fill, then copy the part that both have."""
        axes = _pad_axes(node)
        if any(a > 0 or b > 0 for a, b in axes):
            low.fill(node.y, float(node.get("value", 0.0)))
        skip, start = [max(0, -a) for a, _ in axes], [max(0, a) for a, _ in axes]
        sizes = [n - s - max(0, -b) for n, s, (_, b) in zip(map_sizes(node.x.shape), skip, axes, strict=True)]
        low.copy_part(
            node.x, node.y, (sizes[0], sizes[1], sizes[2]), (skip[0], skip[1], skip[2]), (start[0], start[1], start[2])
        )
