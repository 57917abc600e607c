"""Sums and products of two values with broadcasting, and the sum that undoes broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import codes, reference
from edgetrain.ops.registry import Array, Op, describe, register

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering


def sample_shape(value: Value, node: Node) -> Shape:
    """Return a value's shape without the batch dimension; a parameter's batch dimension must be 1.

    Raises:
        GraphError: the parameter has more dimensions than the other operand, or a batch dimension other than 1.
    """
    rank = max(len(v.shape) for v in node.inputs if v is not None and v.batched)
    if value.batched or len(value.shape) <= rank:
        return value.shape
    if len(value.shape) == rank + 1 and value.shape[0] == 1:
        return value.shape[1:]
    raise GraphError(f"{describe(node)}: the constant {value} cannot be broadcast over single samples")


def padded_shape(value: Value, node: Node, rank: int) -> Shape:
    """Return the per-sample shape with leading ones up to ``rank``.

    Raises:
        GraphError: a batched value of lower rank would broadcast over the batch.
    """
    shape = sample_shape(value, node)
    if value.batched and len(shape) != rank:
        raise GraphError(f"{describe(node)}: batched operands must have the same number of dimensions")
    return (1,) * (rank - len(shape)) + shape


class Binary(Op):
    """``y = a op b``; shapes broadcast as in NumPy, one operand may be a parameter."""

    arity = (2, 2)
    in_place = 0
    takes_parameters = True
    code: int
    function: np.ufunc

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The broadcast shape.

        Raises:
            GraphError: the shapes do not broadcast as kernels can, or two parameters have different shapes.
        """
        a, b = node.x, node.input(1)
        if not a.batched and not b.batched:
            if a.shape != b.shape:
                raise GraphError(f"{describe(node)}: two parameters must have equal shapes; broadcast one beforehand")
            return [(a.shape, False)]
        rank = max(len(v.shape) for v in (a, b) if v.batched)
        shapes = [padded_shape(v, node, rank) for v in (a, b)]
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError:
            raise GraphError(f"{describe(node)}: the shapes do not broadcast; sizes must be equal or 1") from None
        # Kernels see (channels, rows, columns); the axes between the first and the last are one to them.
        if any(part[1:-1] != shape[1:-1] and max(part[1:-1]) > 1 for part in shapes):
            raise GraphError(f"{describe(node)}: the middle axes must all be equal or all be 1; reshape to fewer axes")
        return [(tuple(shape), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """NumPy's own broadcasting; a parameter of shape (1, ...) or lower rank aligns from the right."""
        return (self.function(*inputs),)

    def lower(self, node: Node, low: Lowering) -> None:
        """Parameters are expanded to lanes first."""
        low.binary(node, self.code)

    def back(self, tape: Tape, grad: str | None, operand: Value, node: Node) -> str | None:
        """Return the gradient of an operand: sum ``grad`` over the axes the operand was broadcast along."""
        if operand.batched and operand.shape == node.y.shape:
            return grad
        return tape.add("SumTo", [grad], like=operand)


@register
class Add(Binary):
    """ONNX Add."""

    name = "Add"
    code = codes.ADD
    function = np.add

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """The gradient itself, summed where an operand was broadcast."""
        operands = (node.x, node.input(1))
        return [self.back(tape, grad_out[0], v, node) if tape.needs(v) else None for v in operands]


@register
class Mul(Binary):
    """ONNX Mul."""

    name = "Mul"
    code = codes.MUL
    function = np.multiply

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """The gradient times the other operand, summed where this one was broadcast."""
        a, b = node.x, node.input(1)
        grads = []
        for operand, other in ((a, b), (b, a)):
            scaled = tape.add("Mul", [grad_out[0], other.name], like=node.y) if tape.needs(operand) else None
            grads.append(self.back(tape, scaled, operand, node) if scaled else None)
        return grads

    def macs(self, node: Node) -> int:
        """One per element."""
        return node.y.size


@register
class SumTo(Op):
    """Sum a gradient down to the shape of attribute ``like``: over broadcast axes, and over the batch for a parameter.

    With ``per_channel=1`` the parameter has one number per channel (a bias).
    """

    name = "SumTo"
    takes_parameters = True
    training_only = True
    attributes = ("like", "per_channel")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The shape of ``like``."""
        like: Value = node.get("like")
        return [(like.shape, like.batched)]

    def target(self, node: Node) -> Shape:
        """Return the per-sample shape summed to, of the rank of the input."""
        like: Value = node.get("like")
        rank = len(node.x.shape)
        if node.get("per_channel"):
            return (like.size, *[1] * (rank - 1))
        return padded_shape(like, Node("SumTo", node.name, (node.x,), ()), rank)

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.sum_to``; of a parameter's gradient a copy, so that every parameter has its own."""
        like: Value = node.get("like")
        if not node.x.batched:
            return (inputs[0].copy(),)
        batch = inputs[0].shape[0] if like.batched else 1
        total = reference.sum_to(inputs[0], (batch, *self.target(node)))
        return (total.reshape((*[batch] * like.batched, *like.shape)),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        if not node.x.batched:
            return low.copy_parameter(node.x, node.y)
        return low.sum_to(node.x, node.y, self.target(node))
