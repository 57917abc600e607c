"""Operators that compute a convolution's gradients from what comes to the max pool behind it.

``edgetrain.pooled_errors`` puts them into training graphs in place of the pool's gradient and of the products that read
it:

- ``PooledErrors``: (positions, grad_out of the pool) -> lists of the numbers of the error map that are not 0;
- ``PooledInputGrad``, ``PooledWeightGrad``: the gradients of the convolution, from the lists.

They compute what the dense operators compute, and are counted as those: like Winograd's kernels they find the same
gradients in less time. Only what pruning makes 0 besides counts as saved: ``record`` is the number of gradient
pruning's record, ``kept`` the number of channels that are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetrain.graph import Node, Shape
from edgetrain.ops.conv import Conv, Product, ProductInputGrad, ProductWeightGrad
from edgetrain.ops.pooling import MaxPoolGrad
from edgetrain.ops.pruning import masked
from edgetrain.ops.registry import NO_BORDER, Array, Border, register

if TYPE_CHECKING:
    from edgetrain.lowering import Lowering


@register
class PooledErrors(MaxPoolGrad):
    """(positions, grad_out, optionally kept) -> the error map before the pool, as lists.

    ``kept``: numbers of the channels to list (``KeptChannels``), the lists of all others are empty.

    Attributes: those of ``MaxPoolGrad``; ``conv``, the node whose output was pooled.
    """

    name = "PooledErrors"
    arity = (2, 3)
    opaque = (0,)
    attributes = (*MaxPoolGrad.attributes, "conv")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """An opaque array, whose size depends on the number of samples; its readable twin is the error map."""
        return [((1,), False)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The error map, with zeros in the channels that are not kept."""
        (grad,) = super().reference(node, *inputs[:2])
        return (masked(grad, inputs[2]) if len(inputs) > 2 else grad,)

    def product(self, node: Node) -> Product:
        """Return the sizes of the convolution."""
        return Conv().product(node.get("conv"))

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pooled``."""
        low.pooled_errors(node, self.product(node), self.pool(node))


@register
class PooledInputGrad(ProductInputGrad):
    """(lists, weights) -> grad_x. Attributes ``windows``: of the pool, per channel; ``record``, ``kept``: see above."""

    name = "PooledInputGrad"
    takes_parameters = True
    attributes = (*ProductInputGrad.attributes, "windows", "record", "kept")

    def macs(self, node: Node) -> int:
        """The share of the listed channels."""
        g = self.product(node)
        return g.macs_of(int(node.get("kept", g.channels_out)))

    def borders(self, node: Node) -> Sequence[Border]:
        """None: only pixels that exist are listed."""
        return [NO_BORDER] * 2

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pooled``."""
        low.pooled_input_grad(node, self.product(node))


@register
class PooledWeightGrad(ProductWeightGrad):
    """(x, lists) -> grad_w. Attributes as for ``PooledInputGrad``."""

    name = "PooledWeightGrad"
    attributes = (*ProductWeightGrad.attributes, "windows", "record", "kept")

    def macs(self, node: Node) -> int:
        """The share of the listed channels."""
        g = self.product(node)
        return g.macs_of(int(node.get("kept", g.channels_out)))

    def borders(self, node: Node) -> Sequence[Border]:
        """None: the copy of x that is read has zeros around it."""
        return [NO_BORDER] * 2

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pooled``."""
        low.pooled_weight_grad(node, self.product(node))
