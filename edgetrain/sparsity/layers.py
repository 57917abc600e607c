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
    products = [node for node in graph.nodes if isinstance(get_op(node.op_type), ProductOp)]
    chosen = products[1 if dense_first else 0 : len(products) - (1 if dense_last else 0)]
    return [_described(node) for node in chosen if _may_be_sparse(graph, node)]


def entries(size: int, density: float) -> int:
    """Return how many of ``size`` weights a density allows: rounded up, as SWAT's code does, and at least one."""
    return min(size, max(1, math.ceil(density * size - 1e-6)))


def shapes_of(layers: Sequence[SparseLayer]) -> dict[str, Shape]:
    """Return the shapes of the layers' weights by name."""
    return {layer.weight: layer.shape for layer in layers}


def _may_be_sparse(graph: Graph, node: Node) -> bool:
    weight = node.input(1).name
    depthwise = node.op_type == "Conv" and node.get("group", 1) > 1 and node.input(1).shape[1] == 1
    return weight in graph.trainable and len(graph.consumers(weight)) == 1 and not depthwise


def _described(node: Node) -> SparseLayer:
    weight = node.input(1)
    inputs_first = len(weight.shape) == 2 and not node.get("transB", 0)
    groups = int(node.get("group", 1)) if node.op_type == "Conv" else 1
    return SparseLayer(weight.name, node.name, weight.shape, inputs_first, groups, get_op(node.op_type).macs(node))
