"""Operators that thin out operands of the backward pass; policies insert them into a training graph.

Error maps, by channels (``edgetrain.pruning.ErrorMapPruning``):

- ``KeptChannels``: (grad_out, weights) -> numbers of the channels to keep;
- ``PrunedBatchNormalizationGrad`` and its like: where a normalisation's gradient makes the error map, which channels
  to keep follows from its sums; the error map is computed for these alone;
- ``PrunedMaxPoolGrad``: where the gradient of a pool makes the error map, what comes to the pool is chosen from, and
  the error map is made of the kept channels alone;
- ``PrunedInputGrad``, ``PrunedWeightGrad``, ``PrunedBiasGrad``: the gradients of a product from the kept channels
  alone. Each is its dense operator with one more input, the list.

Saved activations (``edgetrain.saved_activations.compress_activations`` inserts them, for SWAT):

- ``CompressActivation``: x -> its largest numbers (``kernels/element_lists.py``), or the vectors of lanes with the
  largest norm (``kernels/vector_lists.py``), as lists. It stands right behind whatever makes x, so the dense x is given
  up when its last other reader is done;
- ``CompressedWeightGrad``: (lists, grad_out) -> gradient of all weights;
- ``ExpandActivation``: lists -> x with zeros instead of its smaller numbers, in the backward pass, for weight gradients
  from lists of errors;
- ``MaskActivation``: the same of x, in the forward pass, where lists of numbers do not pay. Of a normalised map that is
  computed again a ``BatchNormalizationGradAgain`` with a record makes it, in the backward pass.

Only products of one group: a depthwise convolution has nothing to share out between channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.kernels import reference
from edgetrain.kernels.codes import BY_CHANCE, BY_ERROR, BY_ERROR_AND_WEIGHTS
from edgetrain.ops.conv import Product, ProductGrad, ProductInputGrad, ProductWeightGrad, as_kernels
from edgetrain.ops.geometry import channels_of
from edgetrain.ops.normalization import (
    BatchNormalizationGrad,
    BatchNormalizationGradAgain,
    ResidualNormalizationGrad,
    ResidualNormalizationMaskGrad,
    bounds_of,
)
from edgetrain.ops.pooling import MaxPoolGrad
from edgetrain.ops.registry import NO_BORDER, Array, Border, Op, describe, register

if TYPE_CHECKING:
    from edgetrain.lowering import Lowering

IMPORTANCE = {"error": BY_ERROR, "error_and_weights": BY_ERROR_AND_WEIGHTS, "random": BY_CHANCE}
CHOICE = ("count", "importance", "stream")


@register
class KeptChannels(Op):
    """(grad_out, weights) -> numbers of the ``count`` channels to keep, ascending, float32 ``(count,)``.

    Attributes: ``count``; ``importance``, a key of ``IMPORTANCE``; ``stream`` of the random numbers; ``like``: the
    product's x; ``forward`` and the attributes of the product whose error map this is.
    """

    name = "KeptChannels"
    arity = (2, 2)
    training_only = True
    attributes = (*ProductGrad.attributes, *CHOICE)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """One number per kept channel.

        Raises:
            GraphError: ``count`` is not from 1 to the number of channels.
        """
        count, channels = int(node.get("count", 0)), channels_of(node.x)
        if not 1 <= count <= channels:
            raise GraphError(f"{describe(node)}: count={count}, expected 1 to {channels}, the channels")
        return [((count,), False)]

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        return ProductWeightGrad().geometry(node, node.get("like"), node.input(1))

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The channels with the highest scores; without randomness the first ones."""
        grad_out, weights = inputs
        count, how = int(node.get("count")), IMPORTANCE[node.get("importance", "error")]
        if how == BY_CHANCE:
            return (np.arange(count, dtype=grad_out.dtype),)
        scores = 2 * _share(np.abs(grad_out).sum(axis=(0, *range(2, grad_out.ndim))))
        if how == BY_ERROR_AND_WEIGHTS:
            scores = scores + _share(np.abs(as_kernels(weights, self.product(node))).sum((1, 2, 3)))
        best = np.argsort(-scores, kind="stable")[:count]
        return (np.sort(best).astype(grad_out.dtype),)

    def lower(self, node: Node, low: Lowering) -> None:
        """Scores, then the choice."""
        low.kept_channels(node, self.product(node))


def _share(norms: Array) -> Array:
    total = norms.sum()
    return norms / total if total > 0 else norms


def masked(grad_out: Array, kept: Array) -> Array:
    """Return a copy of (N, C, ...) with zeros in all channels but those whose numbers ``kept`` (count,) holds."""
    copy = np.zeros_like(grad_out)
    copy[:, kept.astype(int)] = grad_out[:, kept.astype(int)]
    return copy


@register
class PrunedInputGrad(ProductInputGrad):
    """Gradient of a product's input from the kept channels: (grad_out, weights, kept) -> grad_x."""

    name = "PrunedInputGrad"
    arity = (3, 3)

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The dense gradient with zeros in the other channels."""
        return super().reference(node, masked(inputs[0], inputs[2]), inputs[1])

    def borders(self, node: Node) -> Sequence[Border]:
        """Zeros around the output gradient."""
        return [*super().borders(node), NO_BORDER]

    def macs(self, node: Node) -> int:
        """The share of the kept channels."""
        return self.product(node).macs_of(node.input(2).size)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pruned``."""
        low.pruned_input_grad(node, self.product(node))


@register
class PrunedWeightGrad(ProductWeightGrad):
    """Gradient of a product's weights from the kept channels: (x, grad_out, kept) -> grad_w, 0 for the others."""

    name = "PrunedWeightGrad"
    arity = (3, 3)

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The dense gradient with zeros in the other channels."""
        return super().reference(node, inputs[0], masked(inputs[1], inputs[2]))

    def borders(self, node: Node) -> Sequence[Border]:
        """The padding that windows touch."""
        return [*super().borders(node), NO_BORDER]

    def macs(self, node: Node) -> int:
        """The share of the kept channels."""
        return self.product(node).macs_of(node.input(2).size)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pruned``."""
        low.pruned_weight_grad(node, self.product(node))


@register
class PrunedBiasGrad(Op):
    """Gradient of a bias from the kept channels: (grad_out, kept) -> grad_b, 0 for the others."""

    name = "PrunedBiasGrad"
    arity = (2, 2)
    training_only = True
    attributes = ("like",)

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The bias."""
        like: Value = node.get("like")
        return [(like.shape, False)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Sum over samples and pixels, with zeros in the other channels."""
        kept = masked(*inputs)
        return (kept.sum(axis=(0, *range(2, kept.ndim))).reshape(node.y.shape),)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pruned``."""
        low.pruned_bias_grad(node)


@register
class PrunedMaxPoolGrad(MaxPoolGrad):
    """Gradient of a max pool's input in the kept channels: (positions, grad_out, kept) -> grad_x.

    The others' is not written.
    """

    name = "PrunedMaxPoolGrad"
    arity = (3, 3)

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The whole gradient with zeros in the other channels."""
        positions, grad_out, kept = inputs
        return super().reference(node, positions, masked(grad_out, kept))

    def lower(self, node: Node, low: Lowering) -> None:
        """One pass."""
        low.max_pool_gradient(node.x, node.input(1), node.y, self.pool(node), node.input(2))


class _PrunedNormalization(Op):
    """A normalisation's gradient whose input gradient is computed for ``count`` channels alone; ``kept`` comes last.

    Chosen by the L2 norm of the input gradient, or by chance, see ``KeptChannels``; the others' is not written.
    """

    errors = 0  # which output is the error map

    def output_count(self, node: Node) -> int:
        """One more."""
        return super().output_count(node) + 1

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """One number per kept channel."""
        return [*super().infer(node), ((int(node.get("count")),), False)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Zeros in the other channels; without randomness the first ones are kept."""
        outputs, count = list(super().reference(node, *inputs)), int(node.get("count"))
        errors = outputs[self.errors]
        norms = (errors**2).sum(axis=(0, *range(2, errors.ndim)))
        if IMPORTANCE[node.get("importance")] == BY_CHANCE:
            norms = -np.arange(len(norms))
        kept = np.sort(np.argsort(-norms, kind="stable")[:count]).astype(outputs[0].dtype)
        outputs[self.errors] = masked(errors, kept)
        return *outputs, kept


@register
class PrunedBatchNormalizationGrad(_PrunedNormalization, BatchNormalizationGrad):
    """See ``BatchNormalizationGrad``, and ``kept``."""

    name = "PrunedBatchNormalizationGrad"
    attributes = (*BatchNormalizationGrad.attributes, *CHOICE)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``PrunedLowering.in_stages``."""
        low.batch_norm_gradient(node, bounds_of(node), kept=node.outputs[-1])


@register
class PrunedBatchNormalizationGradAgain(_PrunedNormalization, BatchNormalizationGradAgain):
    """See ``BatchNormalizationGradAgain``, and ``kept``."""

    name = "PrunedBatchNormalizationGradAgain"
    attributes = (*BatchNormalizationGradAgain.attributes, *CHOICE)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``PrunedLowering.in_stages``."""
        low.batch_norm_gradient(node, bounds_of(node), again=node.outputs[3], kept=node.outputs[-1])


@register
class PrunedResidualNormalizationGrad(_PrunedNormalization, ResidualNormalizationGrad):
    """See ``ResidualNormalizationGrad``, and ``kept``."""

    name = "PrunedResidualNormalizationGrad"
    attributes = (*ResidualNormalizationGrad.attributes, *CHOICE)
    errors = 1

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``PrunedLowering.in_stages``."""
        low.residual_norm_gradient(node, bounds_of(node), kept=node.outputs[-1])


@register
class PrunedResidualNormalizationMaskGrad(_PrunedNormalization, ResidualNormalizationMaskGrad):
    """See ``ResidualNormalizationMaskGrad``, and ``kept``."""

    name = "PrunedResidualNormalizationMaskGrad"
    attributes = (*ResidualNormalizationMaskGrad.attributes, *CHOICE)
    errors = 1

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``PrunedLowering.in_stages``."""
        low.residual_norm_gradient(node, bounds_of(node), bits=1, kept=node.outputs[-1])


@register
class CompressActivation(Op):
    """x -> lists of its largest numbers, or vectors of lanes by their L2 norm, for ``CompressedWeightGrad``.

    A threshold is found every ``refresh`` steps, and in between whenever more vectors than there is room for reach it;
    in all other steps the old one holds, so the density drifts a little (Raihan and Aamodt 2020, whose code keeps
    thresholds likewise). Vectors of zeros are never kept.

    Attributes: ``unit``: ``"element"`` or ``"lanes"``, or ``"stored"`` for numbers that ``ExpandActivation`` puts where
    they were, into the value ``expanded``; ``density``: share of them to keep, the initial one: kernels
    read it from the layer's record; ``capacity``: largest share there is room for; ``refresh`` in steps; ``record``:
    number of the record; ``like``: the weights; ``grad_out``: the value that the product will be computed with;
    ``forward`` and the attributes of the product.
    """

    name = "CompressActivation"
    training_only = True
    opaque = (0,)
    attributes = (*ProductGrad.attributes, "unit", "density", "capacity", "refresh", "record", "grad_out", "expanded")

    def product(self, node: Node) -> Product:
        """Return the sizes of the product that reads x."""
        return ProductWeightGrad().geometry(node, node.x, node.get("like"))

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """An opaque array, whose size depends on the number of samples."""
        return [((1,), False)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The input with zeros where it is not kept, the whole batch being one vector."""
        (x,) = inputs
        norms = (x**2).sum(0) if node.get("unit") == "lanes" else np.abs(x)
        count = max(1, math.ceil(float(node.get("density")) * norms.size))
        limit = max(np.sort(norms, axis=None)[-count], np.finfo(np.float32).tiny)
        return (np.where(norms >= limit, x, 0),)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pruned`` and ``lowering_elements``."""
        if node.get("unit") == "stored":
            low.store_elements(node)
            return
        compress = low.list_elements if node.get("unit") == "element" else low.compress_activation
        compress(node, self.product(node))


@register
class ExpandActivation(Op):
    """Lists of ``CompressActivation`` with the unit ``"stored"`` -> the map they were made of, zeros elsewhere.

    Attributes: ``like``: x; ``capacity``: the lists'.
    """

    name = "ExpandActivation"
    training_only = True
    takes_parameters = True
    attributes = ("like", "capacity")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """The shape of x."""
        return [(node.get("like").shape, True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """The readable twin of the lists is that map."""
        return (inputs[0],)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_elements``."""
        low.expand_elements(node)


@register
class CompressedWeightGrad(ProductWeightGrad):
    """Gradient of a product's weights from pruned activations: (lists, grad_out) -> grad_w; ``source`` is x."""

    name = "CompressedWeightGrad"
    takes_parameters = True
    attributes = (*CompressActivation.attributes, "source")

    def product(self, node: Node) -> Product:
        """Return the sizes of the forward node."""
        return self.geometry(node, node.get("source"), node.get("like"))

    def borders(self, node: Node) -> Sequence[Border]:
        """Zeros around the output gradient: an input pixel at the edge meets windows that do not exist."""
        by_element = node.get("unit") == "element"  # has zeros around a copy of its own
        return [NO_BORDER, NO_BORDER if by_element else self.product(node).grad_border]

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_pruned`` and ``lowering_elements``."""
        compute = low.element_weight_grad if node.get("unit") == "element" else low.compressed_weight_grad
        compute(node, self.product(node))


@register
class MaskActivation(Op):
    """The input with its largest numbers alone, one threshold over all; attributes as for ``CompressActivation``."""

    name = "MaskActivation"
    training_only = True
    writes_border = (0,)
    attributes = ("density", "capacity", "refresh", "record")

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Same shape."""
        return [(node.x.shape, True)]

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """See ``kernels.reference.largest``."""
        return (reference.largest(inputs[0], float(node.get("density"))),)

    def lower(self, node: Node, low: Lowering) -> None:
        """See ``lowering_elements``."""
        low.mask_activation(node)
