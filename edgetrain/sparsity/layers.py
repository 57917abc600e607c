"""The layers of a network whose weights can be sparse, and how many weights each may have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgetrain.graph import Graph, Node, Shape
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductOp


@dataclass(frozen=True)
class SparseLayer:
    """A Conv, Gemm or MatMul with trainable weights of its own.

    Attributes:
        weight: name of its weights.
        node: name of the node.
        shape: of the weights in ONNX layout.
        inputs_first: the weights are ``(inputs, outputs)``.
        groups: of the convolution.
        macs: multiply-accumulates per sample of its dense forward product.
    """

    weight: str
    node: str
    shape: Shape
    inputs_first: bool
    groups: int
    macs: int

    @property
    def size(self) -> int:
        """Number of weights when dense."""
        return math.prod(self.shape)

    @property
    def taps(self) -> int:
        """Weights per (output channel, input channel)."""
        return math.prod(self.shape[2:])


def sparse_layers(graph: Graph, dense_first: bool = False, dense_last: bool = False) -> list[SparseLayer]:
    """Return the layers that may become sparse, in execution order.

    Left out are weights that several nodes share, weights that are not trained, and depthwise convolutions, which
    have one input channel per output (dense in RigL's MobileNets too: Evci et al. 2020, section 4.1).

    Args:
        graph: the network.
        dense_first, dense_last: whether the first and the last layer stay dense.
    """
    reasons = _reasons(graph, dense_first, dense_last)
    return [_described(node) for node, reason in reasons if not reason]


def dense_layers(graph: Graph, dense_first: bool = False, dense_last: bool = False) -> dict[str, str]:
    """Return why layers stay dense, by the name of their weights: what ``sparse_layers`` leaves out."""
    return {node.input(1).name: reason for node, reason in _reasons(graph, dense_first, dense_last) if reason}


def entries(size: int, density: float) -> int:
    """Return how many of ``size`` weights a density allows: rounded up, as SWAT's code does, and at least one."""
    return min(size, max(1, math.ceil(density * size - 1e-6)))


def shapes_of(layers: Sequence[SparseLayer]) -> dict[str, Shape]:
    """Return the shapes of the layers' weights by name."""
    return {layer.weight: layer.shape for layer in layers}


def _reasons(graph: Graph, dense_first: bool, dense_last: bool) -> list[tuple[Node, str]]:
    """Return every product with the reason why it stays dense, empty if it does not."""
    products = [node for node in graph.nodes if isinstance(get_op(node.op_type), ProductOp)]
    reasons = [_reason(graph, node) for node in products]
    if products and dense_last:
        reasons[-1] = reasons[-1] or "the last layer stays dense (dense_last)"
    if products and dense_first:
        reasons[0] = reasons[0] or "the first layer stays dense (dense_first)"
    return list(zip(products, reasons, strict=True))


def _reason(graph: Graph, node: Node) -> str:
    weight = node.input(1)
    if weight.name not in graph.trainable:
        return "its weights are not trained"
    if len(graph.consumers(weight.name)) > 1:
        return "several layers share its weights"
    if node.op_type == "Conv" and node.get("group", 1) > 1 and weight.shape[1] == 1:
        return "depthwise"
    return ""


def _described(node: Node) -> SparseLayer:
    weight = node.input(1)
    inputs_first = len(weight.shape) == 2 and not node.get("transB", 0)
    groups = int(node.get("group", 1)) if node.op_type == "Conv" else 1
    return SparseLayer(weight.name, node.name, weight.shape, inputs_first, groups, get_op(node.op_type).macs(node))
