"""Operators of unbiased gradient pruning, and of products that skip vectors of zeros in an error map.

- ``PrunedGradient``: a gradient -> the same, thinned out by chance without changing its expectation;
- ``ErrorLists``: an error map -> lists of its vectors of samples that are not zero;
- ``PooledErrorLists``: what comes to a max pool -> lists of the vectors that are not zero in the map before it;
- ``ListedInputGrad``, ``ListedWeightGrad``: the dense operators with the lists as one more input. They compute the
  same; how much they skip is seen at run time. Counted as saved is what pruning adds: not the vectors that are zero
  without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetrain.graph import Node, Shape
from edgetrain.ops.conv import Conv, Product, ProductGrad, ProductInputGrad, ProductWeightGrad
from edgetrain.ops.pooling import MaxPoolGrad
from edgetrain.ops.registry import NO_BORDER, Array, Border, Op, register

if TYPE_CHECKING:
    from edgetrain.lowering import Lowering


@register
class PrunedGradient(Op):
    """Set what is smaller than a threshold to 0 or to the threshold, by chance (Ye et al. 2020, section 3).

    Attributes: ``group``: ``"element"``: each number, or ``"lanes"``: each vector of samples by its L2 norm;
    ``factor`` of the threshold, times the mean size in the latest five steps; ``record``: number of the record;
    ``stream`` of the random numbers.
    """

    name = "PrunedGradient"
    in_place = 0
    training_only = True
    attributes = ("group", "factor", "record", "stream")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Same shape."""
        return [(node.x.shape, True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Without randomness the readable twin is the expectation: nothing. Pruning is tested by its statistics."""
        return (inputs[0],)

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.pruned_gradient(node)


@register
class ErrorLists(Op):
    """An error map -> lists of its vectors that are not zero.

    Attributes: those of the product; ``like``, the x of its weight gradient; ``record``; ``pruned``, the gradient that
    zeros come from; ``by_pixel``: whether an input gradient will read them, which goes by the channels of every pixel.
    """

    name = "ErrorLists"
    arity = (2, 2)
    training_only = True
    opaque = (0,)
    attributes = (*ProductGrad.attributes, "record", "pruned", "by_pixel")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """An opaque array, whose size depends on the number of samples."""
        return [((1,), False)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Nothing: the twins of the products read the error map."""
        return (inputs[0][:0],)

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        return ProductWeightGrad().geometry(node, node.get("like"), node.input(1))

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass, or two."""
        low.error_lists(node, self.product(node))


@register
class PooledErrorLists(MaxPoolGrad):
    """(positions, grad_out of the pool) -> lists of the vectors that are not zero in the error map before it, copied.

    The map is never written. Attributes: those of ``MaxPoolGrad``; ``conv``, the node whose output was pooled, and
    ``x``, what its weight gradient reads; ``record`` and ``pruned`` as in ``ErrorLists``.
    """

    name = "PooledErrorLists"
    opaque = (0,)
    attributes = (*MaxPoolGrad.attributes, "conv", "x", "record", "pruned")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """An opaque array, whose size depends on the number of samples; its readable twin is the error map."""
        return [((1,), False)]

    def product(self, node: Node) -> Product:
        """Return the sizes of the convolution."""
        return Conv().product(node.get("conv"))

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.pooled_error_lists(node, self.product(node), self.pool(node))


@register
class ListedInputGrad(ProductInputGrad):
    """(grad_out, weights, lists) -> grad_x."""

    name = "ListedInputGrad"
    arity = (3, 3)
    attributes = (*ProductInputGrad.attributes, "record")

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """As the dense gradient."""
        return super().reference(node, *inputs[:2])

    def borders(self, node: Node) -> Sequence[Border]:
        """None: only pixels that exist are listed."""
        return [NO_BORDER] * 3

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_listed``."""
        low.listed_input_grad(node, self.product(node))


@register
class ListedWeightGrad(ProductWeightGrad):
    """(x, grad_out, lists) -> grad_w, or (x, lists) where the lists hold the vectors (``PooledErrorLists``).

    Attribute ``covered``: in the second case, how many pixels of a channel the windows of the pool cover.
    """

    name = "ListedWeightGrad"
    arity = (2, 3)
    attributes = (*ProductWeightGrad.attributes, "record", "covered")

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """As the dense gradient."""
        return super().reference(node, *inputs[:2])

    def borders(self, node: Node) -> Sequence[Border]:
        """The padding that windows touch."""
        return [*super().borders(node), NO_BORDER][: len(node.inputs)]

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_listed``."""
        low.listed_weight_grad(node, self.product(node))
