"""Element-wise activations, easiest first. All may overwrite their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.arrays import map_sizes, mask_words
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import codes, reference
from edgetrain.ops.registry import Array, Op, describe, get_op, register

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering

BIG = float(np.finfo(np.float32).max)


class Activation(Op):
    """``y = f(x)``: shape kept, gradient from the output, or from the input where ``saves_input``.

    Attributes:
        code: of the compiled function.
        saves_input: whether the gradient reads the input (which then cannot be overwritten).
    """

    in_place = 0
    code: int
    saves_input = False

    def constants(self, node: Node) -> tuple[float, float]:
        """Return the function's two constants."""
        return 0.0, 0.0

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Same shape."""
        return [(node.x.shape, node.x.batched)]

    def apply(self, x: Array, a: float, b: float) -> Array:
        """Compute the function."""
        raise NotImplementedError

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """Compute the derivative from the saved output (or input)."""
        raise NotImplementedError

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Apply the function."""
        return (self.apply(inputs[0], *self.constants(node)).astype(inputs[0].dtype),)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """``grad_out * f'``."""
        saved = node.x if self.saves_input else node.y
        return [tape.add("ActivationGrad", [saved.name, grad_out[0]], like=node.x, forward=node)]

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        a, b = self.constants(node)
        low.unary(node.x, node.y, self.code, a, b)


@register
class ActivationGrad(Op):
    """(saved, grad_out) -> grad_x for every activation; attribute ``forward`` is the forward node."""

    name = "ActivationGrad"
    arity = (2, 2)
    in_place = 1
    training_only = True
    attributes = ("forward", "like")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Shape of the forward input."""
        like: Value = node.get("like")
        return [(like.shape, like.batched)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Multiply with the derivative."""
        op = _activation(node)
        return (inputs[1] * op.slope(inputs[0], *op.constants(node.get("forward"))),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        op = _activation(node)
        low.unary_gradient(node.x, node.input(1), node.y, op.code, *op.constants(node.get("forward")))


@register
class ReluMask(Op):
    """y -> mask: one bit per number of a Relu's output, kept instead of the output where nobody else reads that.

    32 pixels of a channel share a word; as a value the mask has the shape (C, words), see ``arrays.mask_words``.
    """

    name = "ReluMask"
    training_only = True
    opaque = (0,)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Words per channel."""
        channels, rows, columns = map_sizes(node.x.shape)
        return [((channels, mask_words(rows * columns)), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Pack what is positive."""
        words = reference.pack(inputs[0] > 0, 1)
        return (np.pad(words, ((0, 0), (0, 0), (0, node.y.shape[1] - words.shape[2]))),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.keep_mask(node.x, node.y)


@register
class ReluMaskGrad(ActivationGrad):
    """(mask, grad_out) -> grad_x."""

    name = "ReluMaskGrad"

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Multiply with the mask."""
        return (inputs[1] * reference.unpack(inputs[0], 1, inputs[1].shape),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.apply_mask(node.x, node.input(1), node.y)


def _activation(node: Node) -> Activation:
    op = get_op(node.get("forward").op_type)
    assert isinstance(op, Activation)
    return op


@register
class Relu(Activation):
    """``max(x, 0)``; the derivative at 0 is 0, as in PyTorch."""

    name = "Relu"
    code = codes.RELU

    def apply(self, x: Array, a: float, b: float) -> Array:
        """``max(x, 0)``."""
        return np.maximum(x, 0)

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """1 where the output is positive."""
        return saved > 0


@register
class LeakyRelu(Activation):
    """``x`` where positive, else ``alpha * x``."""

    name = "LeakyRelu"
    attributes = ("alpha",)
    code = codes.LEAKY_RELU
    saves_input = True

    def constants(self, node: Node) -> tuple[float, float]:
        """``alpha`` (0.01)."""
        return float(node.get("alpha", 0.01)), 0.0

    def apply(self, x: Array, a: float, b: float) -> Array:
        """``x`` or ``alpha * x``."""
        return np.where(x > 0, x, a * x)

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """1 or ``alpha``."""
        return np.where(saved > 0, 1, a)


@register
class Elu(Activation):
    """``x`` where positive, else ``alpha * (exp(x) - 1)``.

    Source: Clevert, Unterthiner and Hochreiter, Fast and accurate deep network learning by exponential linear units,
    ICLR 2016, section 3. The slope is found from the output, so ``alpha`` must not be negative.
    """

    name = "Elu"
    attributes = ("alpha",)
    code = codes.ELU

    def constants(self, node: Node) -> tuple[float, float]:
        """``alpha`` (1)."""
        return float(node.get("alpha", 1.0)), 0.0

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Same shape.

        Raises:
            GraphError: ``alpha`` is negative.
        """
        if self.constants(node)[0] < 0:
            raise GraphError(f"{describe(node)}: alpha is {node.get('alpha')}, expected 0 or more")
        return super().infer(node)

    def apply(self, x: Array, a: float, b: float) -> Array:
        """``x`` or ``alpha * (exp(x) - 1)``."""
        return np.where(x > 0, x, a * np.expm1(np.minimum(x, 0)))

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """1, or ``y + alpha``."""
        return np.where(saved > 0, 1, saved + a)


@register
class Clip(Activation):
    """``min(max(x, min), max)``; ReLU6 is ``Clip(0, 6)``. No gradient at the bounds, as in PyTorch's hardtanh."""

    name = "Clip"
    attributes = ("min", "max")
    code = codes.CLIP

    def constants(self, node: Node) -> tuple[float, float]:
        """The bounds."""
        low, high = node.get("min"), node.get("max")
        return (-BIG if low is None else float(low)), (BIG if high is None else float(high))

    def apply(self, x: Array, a: float, b: float) -> Array:
        """Clip; the upper bound wins if they cross."""
        return np.minimum(np.maximum(x, a), b)

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """1 strictly between the bounds."""
        return (saved > a) & (saved < b)


@register
class Sigmoid(Activation):
    """``1 / (1 + exp(-x))``."""

    name = "Sigmoid"
    code = codes.SIGMOID

    def apply(self, x: Array, a: float, b: float) -> Array:
        """The logistic function."""
        return 1 / (1 + np.exp(-np.clip(x, -87, 88)))

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """``y (1 - y)``."""
        return saved * (1 - saved)


@register
class Tanh(Activation):
    """Hyperbolic tangent."""

    name = "Tanh"
    code = codes.TANH

    def apply(self, x: Array, a: float, b: float) -> Array:
        """``tanh(x)``."""
        return np.tanh(x)

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """``1 - y ** 2``."""
        return 1 - saved * saved


@register
class HardSigmoid(Activation):
    """``max(0, min(1, alpha * x + beta))``."""

    name = "HardSigmoid"
    attributes = ("alpha", "beta")
    code = codes.HARD_SIGMOID

    def constants(self, node: Node) -> tuple[float, float]:
        """``alpha`` (0.2) and ``beta`` (0.5)."""
        return float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))

    def apply(self, x: Array, a: float, b: float) -> Array:
        """A ramp from 0 to 1."""
        return np.clip(a * x + b, 0, 1)

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """``alpha`` on the ramp."""
        return np.where((saved > 0) & (saved < 1), a, 0)


@register
class HardSwish(Activation):
    """``x * max(0, min(1, x / 6 + 0.5))``."""

    name = "HardSwish"
    code = codes.HARD_SWISH
    saves_input = True

    def constants(self, node: Node) -> tuple[float, float]:
        """1/6 and 1/2."""
        return 1 / 6, 0.5

    def apply(self, x: Array, a: float, b: float) -> Array:
        """``x`` times a ramp."""
        return x * np.clip(a * x + b, 0, 1)

    def slope(self, saved: Array, a: float, b: float) -> Array:
        """``2 a x + b`` on the ramp, then 1; at the kinks as in PyTorch."""
        gate = a * saved + b
        return np.where(gate <= 0, 0, np.where(gate >= 1, 1, gate + a * saved))


@register
class Identity(Activation):
    """``y = x``."""

    name = "Identity"
    code = codes.AFFINE

    def constants(self, node: Node) -> tuple[float, float]:
        """Factor 1, offset 0."""
        return 1.0, 0.0

    def apply(self, x: Array, a: float, b: float) -> Array:
        """Nothing."""
        return x

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """The same gradient."""
        return [grad_out[0]]

    def lower(self, node: Node, low: Lowering) -> None:
        """Nothing to do when the output took over the input's memory."""
        if not low.same_memory(node.x, node.y):
            super().lower(node, low)
