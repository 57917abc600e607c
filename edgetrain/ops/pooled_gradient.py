"""Operators that compute a convolution's gradients from what comes to the max pool behind it.

``edgetrain.pooled_errors`` puts them into training graphs in place of the pool's gradient and of the products that read
it:

- ``PooledErrors``: (positions, grad_out of the pool) -> lists of the numbers of the error map that are not 0;
- ``PooledInputGrad``, ``PooledWeightGrad``: the gradients of the convolution, from the lists.

They compute what the dense operators compute, and are counted as those: like Winograd's kernels they find the same
gradients in less time. Only what gradient pruning makes 0 besides counts as saved: ``record`` is the number of its
record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetrain.graph import Node, Shape
from edgetrain.ops.conv import Conv, Product, ProductInputGrad, ProductWeightGrad
from edgetrain.ops.pooling import MaxPoolGrad
from edgetrain.ops.registry import NO_BORDER, Border, register

if TYPE_CHECKING:
    from edgetrain.lowering import Lowering


@register
class PooledErrors(MaxPoolGrad):
    """(positions, grad_out) -> the error map before the pool, as lists.

    Attributes: those of ``MaxPoolGrad``; ``conv``, the node whose output was pooled.
    """

    name = "PooledErrors"
    opaque = (0,)
    attributes = (*MaxPoolGrad.attributes, "conv")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """An opaque array, whose size depends on the number of samples; its readable twin is the error map."""
        return [((1,), False)]

    def product(self, node: Node) -> Product:
        """Return the sizes of the convolution."""
        return Conv().product(node.get("conv"))

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pooled``."""
        low.pooled_errors(node, self.product(node), self.pool(node))


@register
class PooledInputGrad(ProductInputGrad):
    """(lists, weights) -> grad_x. Attributes ``windows``: of the pool, per channel; ``record``, see above."""

    name = "PooledInputGrad"
    takes_parameters = True
    attributes = (*ProductInputGrad.attributes, "windows", "record")

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
    attributes = (*ProductWeightGrad.attributes, "windows", "record")

    def borders(self, node: Node) -> Sequence[Border]:
        """None: the copy of x that is read has zeros around it."""
        return [NO_BORDER] * 2

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pooled``."""
        low.pooled_weight_grad(node, self.product(node))
