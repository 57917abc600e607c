"""Convolution and fully connected layers: one gather-multiply, one gather-correlate, different offset tables.

Every product is ``y[channel][pixel] = sum over terms of weight[term][channel] * x[pixel + term]``:

- forward: a term is (input channel, kernel position), a pixel is an output pixel;
- input gradient: the output gradient is gathered; with stride s there are s x s
  phases, each a stride-1 product with the kernel positions that meet that phase;
- weight gradient: the sum runs over pixels and samples instead;
- a fully connected layer is a 1x1 convolution of 1x1 maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgetrain.arrays import Layout, map_sizes
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import reference
from edgetrain.ops.geometry import Pair, Window, channels_of, out_shape, window_of
from edgetrain.ops.registry import NO_BORDER, Array, Border, Op, describe, get_op, register

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering


@dataclass(frozen=True)
class Product(Window):
    """A convolution's sizes and the byte strides of its weights."""

    channels_in: int = 1
    channels_out: int = 1
    groups: int = 1
    weight_out: int = 4
    weight_in: int = 4
    weight_tap: int = 4

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.channels_in // self.groups

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        return self.channels_out // self.groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.channels_out * self.inputs * len(self.taps) * self.out[0] * self.out[1]

    def macs_of(self, outputs: int) -> int:
        """Return the multiply-accumulates per sample of so many output channels."""
        return self.macs // self.channels_out * outputs

    @property
    def grad_border(self) -> Border:
        """Zeros that the input gradient touches around the output gradient."""
        top, bottom = _reach(self, 0)
        left, right = _reach(self, 1)
        return (top, left, bottom, right)

    def forward_pixels(self, x: Layout, y: Layout) -> list[Pair]:
        """Return (input, output) byte offsets of every output pixel."""
        return [
            (h * self.strides[0] * x.row + w * self.strides[1] * x.pixel, h * y.row + w * y.pixel)
            for h in range(self.out[0])
            for w in range(self.out[1])
        ]

    def forward_terms(self, x: Layout) -> list[int]:
        """Return the byte offset into ``x`` of every (input channel of a group, kernel position)."""
        (down, right), (top, left) = self.dilations, self.pads[:2]
        return [
            x.at(c) + (i * down - top) * x.row + (j * right - left) * x.pixel
            for c in range(self.inputs)
            for i, j in self.taps
        ]

    def forward_sources(self) -> list[int]:
        """Return the byte offset into an output channel's weights of every (input channel, kernel position)."""
        return [c * self.weight_in + t * self.weight_tap for c in range(self.inputs) for t in range(len(self.taps))]

    def phases(self) -> list[Phase]:
        """Return the products that the input gradient consists of, one per phase of the stride."""
        rows, columns = (range(min(self.strides[axis], self.size[axis])) for axis in (0, 1))
        return [Phase(self, (row, column)) for row in rows for column in columns]


@dataclass(frozen=True)
class Phase:
    """The part of an input gradient at the input pixels ``first + n * stride``: a product of stride 1."""

    product: Product
    first: Pair

    @property
    def rows(self) -> range:
        """Rows of the input that belong to the phase."""
        return range(self.first[0], self.product.size[0], self.product.strides[0])

    @property
    def columns(self) -> range:
        """Columns of the input that belong to the phase."""
        return range(self.first[1], self.product.size[1], self.product.strides[1])

    @property
    def taps(self) -> list[tuple[int, int, int, int]]:
        """Kernel positions that meet these pixels, each with its offset in the output: (i, j, row, column)."""
        g, (row, column) = self.product, self.first
        return [(i, j, a, b) for i, a in _phase(g, 0, row) for j, b in _phase(g, 1, column)]

    def terms(self, grad: Layout) -> list[int]:
        """Return the byte offset into ``grad`` of every term: (kernel row, output channel of a group, kernel column).

        Rows come first, so that the terms of a pixel near the edge, whose windows lie partly outside, are neighbours.
        """
        return [grad.at(c) + a * grad.row + b * grad.pixel for c, _, _, a, b in self._in_order()]

    def sources(self) -> list[int]:
        """Return the byte offset into an input channel's weights of every term."""
        g = self.product
        return [c * g.weight_out + (i * g.kernel[1] + j) * g.weight_tap for c, i, j, _, _ in self._in_order()]

    def ranges(self) -> list[Pair]:
        """Return (first, behind the last) of the terms of every pixel; the others lie above or below the output."""
        g, rows = self.product, [a for _, a in _phase(self.product, 0, self.first[0])]
        size = g.outputs * len(self.taps) // max(1, len(rows))
        found = []
        for n in range(len(self.rows)):
            inside = [k for k, a in enumerate(rows) if 0 <= n + a < g.out[0]] or [0, -1]
            pair = (inside[0] * size, (inside[-1] + 1) * size)
            found += [pair] * len(self.columns)
        return found

    def _in_order(self) -> list[tuple[int, int, int, int, int]]:
        """Return (channel, kernel row and column, their offsets in the output) of every term."""
        rows = itertools.groupby(self.taps, key=lambda tap: tap[0])
        taps = [list(row) for _, row in rows]
        return [(c, *tap) for row in taps for c in range(self.product.outputs) for tap in row]

    def pixels(self, grad: Layout, out: Layout) -> list[Pair]:
        """Return (output gradient, input gradient) byte offsets of every pixel of the phase."""
        return [
            (n * grad.row + m * grad.pixel, h * out.row + w * out.pixel)
            for n, h in enumerate(self.rows)
            for m, w in enumerate(self.columns)
        ]


def _phase(g: Product, axis: int, first: int) -> list[Pair]:
    """Return (kernel position, offset in the output) that meet input pixels ``first + n * stride`` at output ``n``."""
    stride, dilation, pad = g.strides[axis], g.dilations[axis], g.pads[axis]
    places = [(k, first + pad - k * dilation) for k in range(g.kernel[axis])]
    return [(k, place // stride) for k, place in places if place % stride == 0]


def _reach(g: Product, axis: int) -> Pair:
    """Return how far before the first and behind the last output pixel the input gradient reads."""
    before, behind = 0, 0
    for first in range(min(g.strides[axis], g.size[axis])):
        steps = (g.size[axis] - first - 1) // g.strides[axis]
        for _, offset in _phase(g, axis, first):
            before = max(before, -offset)
            behind = max(behind, offset + steps - (g.out[axis] - 1))
    return before, behind


def conv_of(node: Node, x: Value, weight: Value) -> Product:
    """Work out the sizes of a Conv node.

    Raises:
        GraphError: weights, groups or bias do not fit the input.
    """
    if weight.batched or len(weight.shape) not in (3, 4):
        raise GraphError(f"{describe(node)}: weights must be a parameter (O, C/groups, [KH,] KW), got {weight}")
    groups, (outputs, inputs, *kernel) = int(node.get("group", 1)), weight.shape
    if tuple(node.get("kernel_shape") or kernel) != tuple(kernel):
        raise GraphError(f"{describe(node)}: kernel_shape={node.get('kernel_shape')} but the weights have {kernel}")
    channels = channels_of(x)
    if channels != inputs * groups:
        raise GraphError(f"{describe(node)}: {channels} input channels, expected {inputs} x {groups} groups")
    if outputs % groups:
        raise GraphError(f"{describe(node)}: {outputs} output channels (weights) not divisible by {groups} groups")
    window, taps = window_of(node, x, tuple(kernel)), int(np.prod(kernel))
    return Product(
        **vars(window), channels_in=channels, channels_out=outputs, groups=groups,
        weight_out=4 * inputs * taps, weight_in=4 * taps, weight_tap=4,
    )  # fmt: skip


def dense_of(node: Node, x: Value, weight: Value) -> Product:
    """Work out the sizes of a Gemm or MatMul node, as a 1x1 convolution.

    Raises:
        GraphError: the input is not a vector per sample, or the weights do not fit.
    """
    if not x.batched or len(x.shape) != 1 or weight.batched or len(weight.shape) != 2:
        raise GraphError(f"{describe(node)}: expected an input (N, F) and weights (F, O); flatten the input first")
    if any(float(node.get(a, 1.0)) != 1.0 for a in ("alpha", "beta")) or node.get("transA", 0):
        raise GraphError(f"{describe(node)}: alpha and beta must be 1 and transA 0; fold them into the weights")
    transposed = bool(node.get("transB", 0))
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    if inputs != x.shape[0]:
        raise GraphError(f"{describe(node)}: {x.shape[0]} features given, the weights expect {inputs}")
    strides = (4 * inputs, 4) if transposed else (4, 4 * outputs)
    return Product(
        (1, 1), (1, 1), (1, 1), NO_BORDER, (1, 1), (1, 1), channels_in=inputs, channels_out=outputs,
        weight_out=strides[0], weight_in=strides[1],
    )  # fmt: skip


class ProductOp(Op):
    """What Conv, Gemm and MatMul share. ``geometry(node, x, weight)`` is their only difference."""

    arity = (2, 3)
    products = 1

    def geometry(self, node: Node, x: Value, weight: Value) -> Product:
        """Return the sizes."""
        raise NotImplementedError

    def weights(self, node: Node) -> Value:
        """Return the weights."""
        return node.input(1)

    def product(self, node: Node) -> Product:
        """Return the sizes of a forward node."""
        return self.geometry(node, node.x, node.input(1))

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """(C, H, W) -> (O, OH, OW), or (F,) -> (O,).

        Raises:
            GraphError: input, weights, bias and attributes do not fit together.
        """
        g, bias = self.product(node), node.optional(2)
        if bias is not None and (bias.batched or bias.size != g.channels_out):
            raise GraphError(f"{describe(node)}: the bias must be a parameter of {g.channels_out} numbers, got {bias}")
        return [(out_shape(g.channels_out, g, len(node.x.shape) - 1), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.conv``."""
        g, (x, w) = self.product(node), inputs[:2]
        bias = inputs[2].reshape(-1) if len(inputs) > 2 else None
        y = reference.conv(as_maps(x), as_kernels(w, g), bias, g)
        return (y.reshape(x.shape[0], *node.y.shape),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Input, weight and bias gradients, each only when needed."""
        grad, (x, weight, bias) = grad_out[0], (node.x, node.input(1), node.optional(2))
        shared = {**node.attributes, "forward": node.op_type}
        grad_x = grad_w = grad_b = None
        if tape.needs(x):
            grad_x = tape.add("ProductInputGrad", [grad, weight.name], like=x, **shared)
        if tape.needs(weight):
            grad_w = tape.add("ProductWeightGrad", [x.name, grad], like=weight, **shared)
        if bias is not None and tape.needs(bias):
            grad_b = tape.add("SumTo", [grad], like=bias, per_channel=1)
        return [grad_x, grad_w, grad_b]

    def macs(self, node: Node) -> int:
        """Output pixels times weights."""
        return self.product(node).macs

    def borders(self, node: Node) -> Sequence[Border]:
        """The padding that windows touch."""
        return [self.product(node).border, NO_BORDER, NO_BORDER]

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_products``."""
        low.product(node, self.product(node))


def as_maps(x: Array) -> Array:
    """Reshape ``(N, C, ...)`` to ``(N, C, H, W)``."""
    return x.reshape(x.shape[0], *map_sizes(x.shape[1:]))


def as_kernels(w: Array, g: Product) -> Array:
    """Reshape weights to ``(O, C / groups, KH, KW)``."""
    if w.ndim == 2 and g.weight_out == 4:  # (inputs, outputs)
        w = w.T
    return w.reshape(g.channels_out, g.inputs, *g.kernel)


@register
class Conv(ProductOp):
    """ONNX Conv over ``(N, C, H, W)`` or ``(N, C, W)``: x, weights ``(O, C/group, ...)``, optional bias ``(O,)``."""

    name = "Conv"
    attributes = ("kernel_shape", "strides", "pads", "dilations", "group", "auto_pad")

    def geometry(self, node: Node, x: Value, weight: Value) -> Product:
        """See ``conv_of``."""
        return conv_of(node, x, weight)


@register
class Gemm(ProductOp):
    """ONNX Gemm: ``(N, F)`` times weights ``(F, O)``, or ``(O, F)`` with ``transB=1``, plus a bias."""

    name = "Gemm"
    attributes: ClassVar[tuple[str, ...]] = ("transA", "transB", "alpha", "beta")

    def geometry(self, node: Node, x: Value, weight: Value) -> Product:
        """See ``dense_of``."""
        return dense_of(node, x, weight)


@register
class MatMul(Gemm):
    """ONNX MatMul with a parameter: ``(N, F)`` times ``(F, O)``."""

    name = "MatMul"
    arity = (2, 2)
    attributes: ClassVar[tuple[str, ...]] = ()


class ProductGrad(Op):
    """Shared by both product gradients; attribute ``forward`` names the operator whose gradient this is.

    ``products``: how many of a forward product's size a node stands for.
    """

    arity = (2, 2)
    products = 1
    training_only = True
    attributes = (*Conv.attributes, *Gemm.attributes, "forward", "like")

    def geometry(self, node: Node, x: Value, weight: Value) -> Product:
        """Return the sizes of the forward node."""
        return conv_of(node, x, weight) if node.get("forward") == "Conv" else dense_of(node, x, weight)

    def weights(self, node: Node) -> Value:
        """Return the weights of the forward node."""
        return node.input(1)

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        raise NotImplementedError

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The shape of what the gradient is of."""
        like: Value = node.get("like")
        return [(like.shape, like.batched)]

    def macs(self, node: Node) -> int:
        """As many as the forward product, for each."""
        return self.products * self.product(node).macs


@register
class ProductInputGrad(ProductGrad):
    """Gradient of a product's input: (grad_out, weights) -> grad_x."""

    name = "ProductInputGrad"

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        return self.geometry(node, node.get("like"), node.input(1))

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.conv_input_gradient``."""
        g, (grad_out, w) = self.product(node), inputs
        grad = reference.conv_input_gradient(as_maps(grad_out), as_kernels(w, g), g)
        return (grad.reshape(grad_out.shape[0], *node.y.shape),)

    def borders(self, node: Node) -> Sequence[Border]:
        """Zeros around the output gradient."""
        return [self.product(node).grad_border, NO_BORDER]

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_products``."""
        low.product_input_grad(node, self.product(node))


@register
class ProductWeightGrad(ProductGrad):
    """Gradient of a product's weights, summed over the batch: (x, grad_out) -> grad_w."""

    name = "ProductWeightGrad"

    def weights(self, node: Node) -> Value:
        """Return the weights of the forward node."""
        like: Value = node.get("like")
        return like

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        return self.geometry(node, node.x, node.get("like"))

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.conv_weight_gradient``."""
        g, (x, grad_out) = self.product(node), inputs
        grad = reference.conv_weight_gradient(as_maps(x), as_maps(grad_out), g)
        inputs_first = node.get("forward") != "Conv" and not node.get("transB", 0)
        return (grad.reshape(g.channels_out, g.inputs).T if inputs_first else grad.reshape(node.y.shape),)

    def borders(self, node: Node) -> Sequence[Border]:
        """The padding that windows touch."""
        return [self.product(node).border, NO_BORDER]

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_products``."""
        low.product_weight_grad(node, self.product(node))


def weights_of(node: Node) -> Value | None:
    """Return the weights of a product or of one of its gradients, ``None`` for any other node."""
    op = get_op(node.op_type)
    return op.weights(node) if isinstance(op, (ProductOp, ProductGrad)) else None
