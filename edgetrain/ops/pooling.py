"""Pooling. A window's divisor counts its padding or not; padding never wins a maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgetrain.arrays import map_sizes, packed_words
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import reference
from edgetrain.ops.conv import as_maps
from edgetrain.ops.geometry import Window, channels_of, out_shape, window_of
from edgetrain.ops.registry import Array, Op, describe, get_op, register

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering


@dataclass(frozen=True)
class Pool(Window):
    """A pool's window; ``include_pad`` counts padding in the average."""

    include_pad: bool = False

    def spans(self, axis: int) -> list[tuple[int, int, int]]:
        """Return (first pixel inside, how many taps inside, divisor) of every window position along an axis.

        The divisor of a window that ceil_mode lets reach beyond the padded map counts only
        what is inside it, as in PyTorch and ONNX.
        """
        found = []
        size, stride, dilation = self.size[axis], self.strides[axis], self.dilations[axis]
        kernel, before, behind = self.kernel[axis], self.pads[axis], self.pads[axis + 2]
        for position in range(self.out[axis]):
            start = position * stride - before
            inside = [start + k * dilation for k in range(kernel) if 0 <= start + k * dilation < size]
            padded = [k for k in range(kernel) if start + k * dilation < size + behind]
            found.append((inside[0] if inside else 0, len(inside), len(padded) if self.include_pad else len(inside)))
        return found

    @property
    def inside(self) -> bool:
        """Whether all windows lie wholly inside the map, their pixels side by side."""
        spans = [span for axis in (0, 1) for span in self.spans(axis)]
        whole = [self.kernel[axis] for axis in (0, 1) for _ in self.spans(axis)]
        return self.dilations == (1, 1) and [count for _, count, _ in spans] == whole

    @property
    def tiles(self) -> bool:
        """Whether the windows cover the map without gaps or overlap."""
        covered = tuple(n * k for n, k in zip(self.out, self.kernel, strict=True))
        return self.inside and self.strides == self.kernel and covered == self.size

    @property
    def position_bits(self) -> int:
        """Bits for the number of a pixel in a window: a power of two, so that 32 bits hold a whole number of them."""
        needed = (math.prod(self.kernel) - 1).bit_length()
        return next(bits for bits in (1, 2, 4, 8, 16, 32) if bits >= needed)

    @property
    def divisors(self) -> tuple[list[int], list[int]]:
        """Divisors per output row and per output column, at least 1."""
        rows, columns = ([max(1, d) for _, _, d in self.spans(axis)] for axis in (0, 1))
        return rows, columns


class PoolOp(Op):
    """What all pools share. Their additions and comparisons are not counted (``macs``)."""

    attributes: ClassVar[tuple[str, ...]] = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "auto_pad")

    def pool(self, node: Node, x: Value) -> Pool:
        """Return the window.

        Raises:
            GraphError: it does not fit the input.
        """
        window = window_of(node, x, tuple(int(n) for n in node.get("kernel_shape") or ()))
        return Pool(**vars(window), include_pad=bool(node.get("count_include_pad", 0)))

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """(C, H, W) -> (C, OH, OW).

        Raises:
            GraphError: the window does not fit the input, or lies in the padding alone somewhere.
        """
        pool = self.pool(node, node.x)
        if any(count == 0 for axis in (0, 1) for _, count, _ in pool.spans(axis)):
            raise GraphError(f"{describe(node)}: a window of {pool.kernel} lies in the padding alone; use smaller pads")
        return [(out_shape(channels_of(node.x), pool, len(node.x.shape) - 1), True)]


@register
class MaxPool(PoolOp):
    """ONNX MaxPool (first output only)."""

    name = "MaxPool"
    attributes = (*PoolOp.attributes, "storage_order")

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.max_pool``."""
        y = reference.max_pool(as_maps(inputs[0]), self.pool(node, node.x))
        return (y.reshape(y.shape[0], *node.y.shape),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.max_pool(node.x, node.y, self.pool(node, node.x))


@register
class MaxPoolTraining(MaxPool):
    """(x,) -> (y, positions): MaxPool that keeps, instead of its input and output, where each largest value was.

    Positions are small numbers, packed into words of 32 bits; as a value they have the shape (C, words). With them, and
    pools before the Relus, LeNet-5 at batch 32 plans 1.1 MiB of activations instead of 1.8, in steps 6 % shorter.
    """

    name = "MaxPoolTraining"
    training_only = True
    opaque = (1,)

    def output_count(self, node: Node) -> int:
        """Two."""
        return 2

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Shape of the pool, and words per channel."""
        ((shape, batched),) = super().infer(node)
        words = packed_words(math.prod(shape[1:]), self.pool(node, node.x).position_bits)
        return [(shape, batched), ((shape[0], words), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.max_pool`` and ``max_pool_positions``."""
        pool = self.pool(node, node.x)
        positions = reference.max_pool_positions(as_maps(inputs[0]), pool)
        return *super().reference(node, *inputs), reference.pack(positions, pool.position_bits)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """To the first largest pixel of each window."""
        return [tape.add("MaxPoolGrad", [node.outputs[1].name, grad_out[0]], like=node.x, forward=node)]

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.max_pool(node.x, node.y, self.pool(node, node.x), node.outputs[1])


class PoolGrad(Op):
    """Shared by pool gradients; attribute ``forward`` is the forward node."""

    training_only = True
    attributes: ClassVar[tuple[str, ...]] = ("forward", "like")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Shape of the forward input."""
        like: Value = node.get("like")
        return [(like.shape, True)]

    def pool(self, node: Node) -> Pool:
        """Return the forward window."""
        forward: Node = node.get("forward")
        op = get_op(forward.op_type)
        assert isinstance(op, PoolOp)
        return op.pool(forward, forward.x)


@register
class MaxPoolGrad(PoolGrad):
    """(positions, grad_out) -> grad_x."""

    name = "MaxPoolGrad"
    arity = (2, 2)

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.max_pool_gradient``."""
        pool, grad_out = self.pool(node), as_maps(inputs[1])
        positions = reference.unpack(inputs[0], pool.position_bits, grad_out.shape)
        grad = reference.max_pool_gradient(positions, grad_out, pool)
        return (grad.reshape(grad.shape[0], *node.get("like").shape),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.max_pool_gradient(node.x, node.input(1), node.y, self.pool(node))


@register
class AveragePool(PoolOp):
    """ONNX AveragePool."""

    name = "AveragePool"
    attributes: ClassVar[tuple[str, ...]] = (*PoolOp.attributes, "count_include_pad")

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.average_pool``."""
        y = reference.average_pool(as_maps(inputs[0]), self.pool(node, node.x))
        return (y.reshape(y.shape[0], *node.y.shape),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Evenly over each window."""
        return [tape.add("AveragePoolGrad", [grad_out[0]], like=node.x, forward=node)]

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.average_pool(node.x, node.y, self.pool(node, node.x))


@register
class AveragePoolGrad(PoolGrad):
    """(grad_out,) -> grad_x."""

    name = "AveragePoolGrad"

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.average_pool_gradient``."""
        grad = reference.average_pool_gradient(as_maps(inputs[0]), self.pool(node))
        return (grad.reshape(grad.shape[0], *node.y.shape),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.average_pool_gradient(node.x, node.y, self.pool(node))


@register
class GlobalAveragePool(AveragePool):
    """ONNX GlobalAveragePool: the average pool whose window is the map."""

    name = "GlobalAveragePool"
    attributes = ()

    def pool(self, node: Node, x: Value) -> Pool:
        """Return the window that covers the map."""
        size = map_sizes(x.shape)[1:]
        return Pool(size, (1, 1), (1, 1), (0, 0, 0, 0), size, (1, 1))

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """(C, H, W) -> (C, 1, 1)."""
        return [((channels_of(node.x), *[1] * (len(node.x.shape) - 1)), True)]
