"""Policies that thin out the error maps of the backward pass: which operators to put where in a training graph.

A policy rewrites the training graph that autodiff made; the engine does not know it. An error map is the gradient
of a product's output; both backward products read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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


# --- saved activations ---

# Room for vectors beyond the wanted density: thresholds hold for many steps while activations move.
_SLACK = 1.25


def compress_activations(
    train: TrainingGraph, densities: Mapping[str, float], refresh: int = 100, capacity: float | None = None
) -> dict[str, int]:
    """Let convolutions compute their weight gradient from the largest vectors of their input alone (SWAT).

    A vector is one pixel of the samples that lie in the lanes together; it is kept or dropped as a whole. What is kept
    for the backward pass is the list, not the input, unless something else reads that.

    Args:
        train: is changed: every ``ProductWeightGrad`` of a listed weight becomes a ``CompressActivation`` behind the
            node that makes x, and a ``CompressedWeightGrad``.
        densities: share of the vectors to keep, above 0 and at most 1, by the name of a convolution's weights.
            Convolutions with groups and fully connected layers stay as they are.
        refresh: steps after which thresholds are found anew.
        capacity: largest share there is memory for; 1.25 times the density by default. Give the largest density that
            will be set later.

    Returns:
        The number of every pruned weight's record. ``Parameters.buffers["records"]`` is float32 ``(records * RECORD,)``;
        its number ``DENSITY`` (``kernels.codes``) of a record is the share to keep and may be changed between steps;
        ``Parameters.buffers["tally"]`` is int64 ``(records * 2,)``: vectors kept in the latest step, and all vectors.
    """
    graph, records = train.graph, {}
    for error_map in error_maps(train):
        weight = error_map.conv.input(1)
        for node in [n for n in graph.nodes if n.op_type == "ProductWeightGrad" and error_map.read_by(n)]:
            if weight.name in densities:
                density = densities[weight.name]
                room = min(1.0, _SLACK * density if capacity is None else capacity)
                attributes = {
                    **node.attributes, "density": density, "capacity": room, "refresh": refresh,
                    "record": train.records, "grad_out": error_map.value,
                }  # fmt: skip
                _compress(train, node, attributes)
                records[weight.name] = train.records
                train.records += 1
    return records


def _compress(train: TrainingGraph, node: Node, attributes: Mapping[str, Any]) -> None:
    """Replace a weight gradient by one from lists, which are made right behind the node that makes x."""
    graph, lists = train.graph, Value(f"{node.y.name}.lists", (1,), batched=False)
    graph.add_value(lists)
    made = next((i for i, n in enumerate(graph.nodes) if node.x in n.outputs), -1)
    place = graph.nodes.index(node)
    graph.nodes[place] = replace(
        node, op_type="CompressedWeightGrad", inputs=(lists, node.input(1)), attributes={**attributes, "source": node.x}
    )
    graph.nodes.insert(made + 1, Node("CompressActivation", lists.name, (node.x,), (lists,), attributes))
    train.forward_count += made + 1 < train.forward_count
