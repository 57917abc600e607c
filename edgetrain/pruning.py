"""Policies that thin out the error maps of the backward pass: which operators to put where in a training graph.

A policy rewrites the training graph that autodiff made; the engine does not know it. An error map is the gradient
of a product's output; both backward products read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgetrain.autodiff import TrainingGraph
from edgetrain.errors import UsageError
from edgetrain.graph import Graph, Node, Value
from edgetrain.ops.pruning import IMPORTANCE

_PRUNED = {"ProductInputGrad": "PrunedInputGrad", "ProductWeightGrad": "PrunedWeightGrad", "SumTo": "PrunedBiasGrad"}


class ErrorPruning:
    """Base class of the policies that thin out error maps."""

    def rewrite(self, train: TrainingGraph) -> None:
        """Insert this policy's operators into a training graph."""
        raise NotImplementedError


@dataclass(frozen=True)
class ErrorMapPruning(ErrorPruning):
    """Keep the most important channels of every error map (Wu et al. 2020, arXiv 2007.03213).

    Of a convolution's O output channels ``round(keep * O)`` are kept, at least one, chosen anew in every step by the
    L1 norm of the channel's error map over the batch. The gradients of input, weights and bias are computed from the
    kept channels alone; the others' weights and biases get a gradient of exactly 0. So their momentum still moves them
    and weight decay still shrinks them, as for any parameter whose gradient is 0. Batch normalisation is not
    touched: its gradients are computed before the choice.

    Convolutions with groups (depthwise ones) and fully connected layers are computed densely.

    Attributes:
        keep: share of the channels, above 0 and at most 1. With 1 nothing changes.
        importance: ``"error"``: L1 norm of the error map; ``"error_and_weights"``: that twice, plus the L1 norm of the
            channel's weights, both relative to the layer's sum; ``"random"``: the baseline, by chance.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> ErrorMapPruning(keep=0.5).importance
        'error'
    """

    keep: float = 0.7
    importance: str = "error"

    def __post_init__(self) -> None:
        if not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise UsageError(f"ErrorMapPruning: keep={self.keep!r}, expected a number above 0 and at most 1")
        if self.importance not in IMPORTANCE:
            raise UsageError(f"ErrorMapPruning: importance={self.importance!r}, expected one of {', '.join(IMPORTANCE)}")

    def rewrite(self, train: TrainingGraph) -> None:
        """Choose channels before the first gradient that reads an error map."""
        for stream, error_map in enumerate(error_maps(train)):
            channels = error_map.conv.input(1).shape[0]
            count = max(1, round(self.keep * channels))
            if count < channels:
                self._prune(train.graph, error_map, count, stream)

    def _prune(self, graph: Graph, error_map: ErrorMap, count: int, stream: int) -> None:
        conv = error_map.conv
        kept = Value(f"{error_map.value.name}.{conv.name}.kept", (count,), batched=False)
        graph.add_value(kept)
        choices = {"count": count, "importance": self.importance, "stream": stream, "like": conv.x}
        attributes = {**conv.attributes, "forward": conv.op_type, **choices}
        choice = Node("KeptChannels", kept.name, (error_map.value, conv.input(1)), (kept,), attributes)
        readers = [i for i, node in enumerate(graph.nodes) if error_map.read_by(node)]
        for i in readers:
            graph.nodes[i] = _pruned(graph.nodes[i], kept)
        graph.nodes.insert(readers[0], choice)


@dataclass(frozen=True)
class ErrorMap:
    """The gradient of a convolution's output: the convolution's node and the value."""

    conv: Node
    value: Value

    def read_by(self, node: Node) -> bool:
        """Whether a node computes a gradient of the convolution from this error map."""
        weight, bias = self.conv.input(1), self.conv.optional(2)
        if node.op_type == "ProductInputGrad":
            return node.x == self.value and node.input(1) == weight
        if node.op_type == "ProductWeightGrad":
            return node.input(1) == self.value and bool(node.get("like") == weight)
        return node.op_type == "SumTo" and node.x == self.value and bias is not None and bool(node.get("like") == bias)


def error_maps(train: TrainingGraph) -> list[ErrorMap]:
    """Return the error maps of all convolutions of one group that are trained, in the order of the backward pass."""
    forward = train.graph.nodes[: train.forward_count]
    convs = {node.input(1): node for node in forward if node.op_type == "Conv" and int(node.get("group", 1)) == 1}
    found: dict[tuple[str, str], ErrorMap] = {}
    for node in train.graph.nodes:
        if node.op_type in ("ProductInputGrad", "ProductWeightGrad"):
            inputs = node.op_type == "ProductInputGrad"
            value, weight = (node.x, node.input(1)) if inputs else (node.input(1), node.get("like"))
            if weight in convs:
                found.setdefault((value.name, weight.name), ErrorMap(convs[weight], value))
    return list(found.values())


def _pruned(node: Node, kept: Value) -> Node:
    attributes = {"like": node.get("like")} if node.op_type == "SumTo" else node.attributes
    return replace(node, op_type=_PRUNED[node.op_type], inputs=(*node.inputs, kept), attributes=attributes)
