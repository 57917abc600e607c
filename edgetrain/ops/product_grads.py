"""Both gradients of a convolution or fully connected layer at once, for weights that are lists of non-zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import reference
from edgetrain.ops.conv import Product, ProductGrad, as_kernels, as_maps
from edgetrain.ops.normalization import BatchNormalizationAgain, bounds_of
from edgetrain.ops.registry import NO_BORDER, Array, Border, register

if TYPE_CHECKING:
    from edgetrain.lowering import Lowering


@register
class ProductGrads(ProductGrad):
    """Both gradients: (x, grad_out, weights, addend | None[, scale, bias, mean, 1 / std]) -> (grad_x, grad_w).

    With the statistics of a batch normalisation ``x`` is its input, and the product's input is computed again from it,
    clipped to ``low`` and ``high``. ``addend`` is a map that is added to ``grad_x``, which takes over its memory.
    ``combining`` makes such nodes for weights that are lists.
    """

    name = "ProductGrads"
    arity = (4, 8)
    in_place = 3
    in_place_alone = True
    products = 2
    attributes = (*ProductGrad.attributes, "low", "high")

    def output_count(self, node: Node) -> int:
        """Two."""
        return 2

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The shapes of input and weights."""
        return [(node.x.shape, True), (node.input(2).shape, False)]

    def weights(self, node: Node) -> Value:
        """Return the weights of the forward node."""
        return node.input(2)

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        return self.geometry(node, node.x, node.input(2))

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``ProductInputGrad`` and ``ProductWeightGrad``."""
        g, (x, grad_out, w, addend, *statistics) = self.product(node), inputs
        if statistics:
            (x,) = BatchNormalizationAgain().reference(node, x, *statistics)
        grad_x = reference.conv_input_gradient(as_maps(grad_out), as_kernels(w, g), g)
        grad_w = reference.conv_weight_gradient(as_maps(x), as_maps(grad_out), g)
        grad_x = grad_x.reshape(x.shape) + (0 if addend is None else addend)
        return grad_x, grad_w.reshape(node.outputs[1].shape)

    def borders(self, node: Node) -> Sequence[Border]:
        """Zeros around the output gradient."""
        return [self.product(node).grad_border if i == 1 else NO_BORDER for i in range(len(node.inputs))]

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_sparse``; nothing to copy when the output took over the addend's memory."""
        addend = node.optional(3)
        if addend is not None:
            low.copy(addend, node.y)
        low.sparse_grads(node, self.product(node), bounds_of(node))
