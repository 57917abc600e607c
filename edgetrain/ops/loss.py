"""Losses: the mean over the batch; each also reports the loss of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import reference
from edgetrain.ops.registry import Array, Op, describe, register

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering


@register
class SoftmaxCrossEntropyLoss(Op):
    """(logits ``(N, K)``, labels ``(N,)``) -> (probabilities, losses ``(N,)``, correct ``(N,)``).

    Label smoothing as Szegedy et al. 2016, section 7.
    """

    name = "SoftmaxCrossEntropyLoss"
    arity = (2, 2)
    training_only = True
    attributes = ("label_smoothing",)

    def output_count(self, node: Node) -> int:
        """Three."""
        return 3

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Probabilities as the logits, and two numbers per sample.

        Raises:
            GraphError: the logits are not one vector of at least 2 classes per sample.
        """
        if len(node.x.shape) != 1 or node.x.shape[0] < 2:
            raise GraphError(f"{describe(node)}: cross-entropy needs outputs (N, classes) with at least 2 classes")
        return [(node.x.shape, True), ((), True), ((), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """``-sum(target * log softmax)``."""
        logits, labels = inputs
        probabilities = reference.softmax(logits)
        targets = reference.smooth_targets(labels, logits.shape[1], float(node.get("label_smoothing", 0.0)))
        losses = -(targets * np.log(probabilities)).sum(1)
        return probabilities, losses, (logits.argmax(1) == labels).astype(logits.dtype)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """``(softmax - target) / N``."""
        shared = dict(node.attributes)
        return [tape.add("SoftmaxCrossEntropyLossGrad", [node.y.name, node.input(1).name], like=node.x, **shared), None]

    def lower(self, node: Node, low: Lowering) -> None:
        """Softmax, loss and accuracy in one pass."""
        low.cross_entropy(node, float(node.get("label_smoothing", 0.0)))


@register
class SoftmaxCrossEntropyLossGrad(Op):
    """(probabilities, labels) -> grad_logits."""

    name = "SoftmaxCrossEntropyLossGrad"
    arity = (2, 2)
    in_place = 0
    training_only = True
    attributes = ("label_smoothing", "like")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Shape of the logits."""
        return [(node.x.shape, True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """``(softmax - target) / N``."""
        probabilities, labels = inputs
        targets = reference.smooth_targets(labels, probabilities.shape[1], float(node.get("label_smoothing", 0.0)))
        return ((probabilities - targets) / len(labels),)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.cross_entropy_gradient(node, float(node.get("label_smoothing", 0.0)))


@register
class MeanSquaredErrorLoss(Op):
    """(y, target of the same shape) -> (losses ``(N,)``, correct ``(N,)`` = 0): the mean over all elements."""

    name = "MeanSquaredErrorLoss"
    arity = (2, 2)
    training_only = True

    def output_count(self, node: Node) -> int:
        """Two."""
        return 2

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Two numbers per sample.

        Raises:
            GraphError: output and target differ in shape.
        """
        if node.x.shape != node.input(1).shape:
            raise GraphError(f"{describe(node)}: output and target must have the same shape")
        return [((), True), ((), True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """``mean((y - target) ** 2)`` of every sample."""
        y, target = inputs
        losses = ((y - target) ** 2).reshape(len(y), -1).mean(1)
        return losses, np.zeros_like(losses)

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """``2 (y - target) / (N * size)``."""
        return [tape.add("MeanSquaredErrorLossGrad", [node.x.name, node.input(1).name], like=node.x), None]

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.squared_error(node)


@register
class MeanSquaredErrorLossGrad(Op):
    """(y, target) -> grad_y."""

    name = "MeanSquaredErrorLossGrad"
    arity = (2, 2)
    in_place = 0
    training_only = True
    attributes = ("like",)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Shape of y."""
        like: Value = node.get("like")
        return [(like.shape, True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """``2 (y - target) / (N * size)``."""
        y, target = inputs
        return (2 * (y - target) / y.size,)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.squared_error_gradient(node)
