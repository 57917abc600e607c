"""Reverse-mode differentiation, ahead of time: a graph in, a training graph out.

The backward pass is derived once per graph, as nodes of the same kind as the
forward pass, and only where a gradient is needed. What a gradient node reads is
what the forward pass must keep; nothing else is saved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetrain.errors import GraphError
from edgetrain.graph import Graph, Node, Value
from edgetrain.keeping import keep_less
from edgetrain.ops import get_op
from edgetrain.ops.activation import Clip

# Names that no exporter gives to a value of its own.
LABELS, TARGET = "edgetrain.labels", "edgetrain.target"
# Activations that only bound their input, and the bounds.
_BOUNDS: dict[str, Callable[[Node], tuple[float, float]]] = {
    "Relu": lambda node: (0.0, math.inf),
    "Clip": Clip().constants,
}
# Operators that behave differently while training.
_TRAINING = {
    "BatchNormalization": "BatchNormalizationTraining", "Dropout": "DropoutTraining", "MaxPool": "MaxPoolTraining",
}  # fmt: skip


@dataclass
class TrainingGraph:
    """A graph whose later nodes are its own backward pass.

    Attributes:
        graph: forward nodes, the loss, gradient nodes.
        forward_count: how many nodes come before the first gradient node (the loss included).
        losses, correct: names of the per-sample loss and of the per-sample 1 for a right answer.
        logits: name of the network's output.
        gradients: name of the gradient of every trainable array.
        again: by the name of a value that the backward pass computes once more, the forward pass's value.
        records: how many layers remember something from step to step, see ``kernels.codes.RECORD``.
        densities: share of the weights that there may be, by name, where not all exist.
    """

    graph: Graph
    forward_count: int
    losses: str
    correct: str
    logits: str
    gradients: dict[str, str] = field(default_factory=dict)
    again: dict[str, Value] = field(default_factory=dict)
    records: int = 0
    densities: dict[str, float] = field(default_factory=dict)


class Tape:
    """Adds gradient nodes to a training graph for the operators' gradient rules."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._needed = set(graph.trainable)
        for node in graph.nodes:
            if any(value is not None and value.name in self._needed for value in node.inputs):
                self._needed.update(out.name for out in node.outputs)

    def needs(self, value: Value) -> bool:
        """Whether a trainable array lies before this value."""
        return value.name in self._needed

    def add(self, op_type: str, inputs: Iterable[str | None], like: Value, **attributes: Any) -> str:
        """Append a gradient node whose output has the shape of ``like``; return its output's name.

        Raises:
            GraphError: the node does not fit.
        """
        return self.add_many(op_type, inputs, 1, like, **attributes)[0]

    def add_many(
        self, op_type: str, inputs: Iterable[str | None], outputs: int, like: Value, **attributes: Any
    ) -> list[str]:
        """Append a gradient node with several outputs; return their names."""
        name = f"grad.{like.name}.{len(self._graph.nodes)}"
        names = [f"{name}.{i}" if i else name for i in range(outputs)]
        if "like" in get_op(op_type).attributes:
            attributes["like"] = like
        self._graph.add(op_type, inputs, name=name, outputs=names, **attributes)
        return names


def training_graph(graph: Graph, loss: str = "cross_entropy", label_smoothing: float = 0.0) -> TrainingGraph:
    """Derive the training graph of a network.

    Args:
        graph: with one output, the logits ``(N, K)`` for cross-entropy.
        loss: ``"cross_entropy"`` or ``"mse"``.
        label_smoothing: share of the uniform distribution in the targets (cross-entropy only).

    Raises:
        GraphError: unknown loss, several outputs, an operator without gradient, or nothing to train.
    """
    if len(graph.outputs) > 1:
        raise GraphError(
            f"graph '{graph.name}' has the outputs {graph.outputs}, expected one, which the loss is of; export the "
            "network with that one alone"
        )
    if not graph.trainable:
        remedy = "add their names to graph.trainable" if graph.arrays else "load a model that has weights"
        raise GraphError(f"graph '{graph.name}': no trainable parameter; {remedy}")
    train = _forward(graph)
    if loss == "cross_entropy":
        train.add_value(Value(LABELS, ()))
        inputs = [graph.outputs[0], LABELS]
        train.add("SoftmaxCrossEntropyLoss", inputs, name="edgetrain.loss", label_smoothing=label_smoothing)
    elif loss == "mse":
        train.add_input(TARGET, graph.output_shape)
        train.add("MeanSquaredErrorLoss", [graph.outputs[0], TARGET], name="edgetrain.loss")
    else:
        raise GraphError(f"loss '{loss}' is unknown; expected 'cross_entropy' or 'mse'")
    *_, losses, correct = (value.name for value in train.nodes[-1].outputs)
    result = TrainingGraph(train, len(train.nodes), losses, correct, graph.outputs[0])
    result.gradients = _backward(train)
    result.again, added = keep_less(train, result.forward_count)
    result.forward_count += added
    return result


def _forward(graph: Graph) -> Graph:
    """Copy a network, with the training forms of its operators."""
    train = copy.copy(graph)  # the arrays stay shared: a second copy would count in no memory plan
    train.inputs, train.arrays, train.trainable = list(graph.inputs), dict(graph.arrays), set(graph.trainable)
    train.nodes, train.values = [], {n: v for n, v in graph.values.items() if graph.producer(n) is None}
    fusions = _fusions(graph)
    fused = [node for fusion in fusions for node in fusion.nodes]
    for number, node in enumerate(_pool_first(graph, fused)):
        fusion = next((fusion for fusion in fusions if node is fusion.last), None)
        if fusion is not None:
            _add_normalisation(train, fusion)
        elif not any(node is part for part in fused):
            op_type = _TRAINING.get(node.op_type, node.op_type)
            attributes, outputs = dict(node.attributes), [v.name for v in node.outputs]
            if op_type == "DropoutTraining":
                attributes["stream"] = number
            if op_type == "MaxPoolTraining":
                outputs += [f"edgetrain.positions.{node.y.name}"]
            train.add(op_type, [v.name if v else None for v in node.inputs], node.name, outputs, **attributes)
    return train


@dataclass(frozen=True)
class _Fusion:
    """A batch normalisation and what is done in its pass: the sum with another branch, and a Relu or Clip.

    Attributes:
        nodes: the normalisation, then what is fused with it, in order.
        addend: the other branch's value.
    """

    nodes: tuple[Node, ...]
    addend: Value | None

    @property
    def last(self) -> Node:
        """The node whose output the fused one has."""
        return self.nodes[-1]


def _fusions(graph: Graph) -> list[_Fusion]:
    """Return every batch normalisation with what can be done in its pass."""
    found, added = [], set()
    for norm in reversed(graph.nodes):  # of two branches that meet in a sum, the later one takes it
        if norm.op_type != "BatchNormalization":
            continue
        nodes, addend, reader = [norm], None, _only_reader(graph, norm)
        if reader is not None and reader.op_type == "Add" and reader.name not in added:
            addend = next((v for v in reader.inputs if v != norm.y), None)
            if addend is not None and addend.batched and addend.shape == norm.y.shape:
                nodes.append(reader)
                added.add(reader.name)
                reader = _only_reader(graph, reader)
            else:
                addend = None
        if reader is not None and reader.op_type in _BOUNDS:
            nodes.append(reader)
        found.append(_Fusion(tuple(nodes), addend))
    return found


def _only_reader(graph: Graph, node: Node) -> Node | None:
    """Return the node that alone reads another one's output."""
    readers = [] if node.y.name in graph.outputs else graph.consumers(node.y.name)
    return readers[0] if len(readers) == 1 else None


def _add_normalisation(train: Graph, fusion: _Fusion) -> None:
    norm, last = fusion.nodes[0], fusion.last
    attributes, inputs = dict(norm.attributes), [v.name if v else None for v in norm.inputs]
    if last.op_type in _BOUNDS:
        attributes["low"], attributes["high"] = _BOUNDS[last.op_type](last)
    if fusion.addend is not None:
        inputs.append(fusion.addend.name)
    outputs = [last.y.name, *(f"{norm.y.name}.{part}" for part in ("mean", "variance", "inverse_std"))]
    train.add("BatchNormalizationTraining", inputs, norm.name, outputs, **attributes)


def _pool_first(graph: Graph, fused: Sequence[Node]) -> list[Node]:
    """Return the nodes with max pools before the Relus and Clips that they alone read, which then have less to do.

    No bit of a result changes: both orders find the same value, and where the bound holds, no gradient passes.
    """
    nodes = list(graph.nodes)
    for i, bound in enumerate(nodes):
        readers = [] if bound in fused or bound.y.name in graph.outputs else graph.consumers(bound.y.name)
        if bound.op_type in _BOUNDS and [reader.op_type for reader in readers] == ["MaxPool"]:
            pool = readers[0]
            pooled = Value(f"edgetrain.unbounded.{pool.y.name}", pool.y.shape)
            nodes[i] = replace(pool, inputs=(bound.x,), outputs=(pooled,))
            nodes[nodes.index(pool)] = replace(bound, inputs=(pooled,), outputs=(pool.y,))
    return nodes


def _backward(train: Graph) -> dict[str, str]:
    """Append the reverse pass; return the gradient of every trainable array."""
    tape = Tape(train)
    grads: dict[str, str] = {}
    forward = list(train.nodes)
    for node in reversed(forward):
        grad_out = [grads.get(value.name) for value in node.outputs]
        if node is not forward[-1] and not any(grad_out):
            continue
        if not any(value is not None and tape.needs(value) for value in node.inputs):
            continue
        for value, grad in zip(node.inputs, get_op(node.op_type).gradient(node, grad_out, tape), strict=False):
            if value is not None and grad is not None and tape.needs(value):
                grads[value.name] = _accumulate(tape, grads.get(value.name), grad, value)
    missing = sorted(train.trainable - set(grads))
    if missing:
        raise GraphError(f"graph '{train.name}': the loss does not depend on {missing}; freeze or remove them")
    return {name: grads[name] for name in train.arrays if name in train.trainable}


def _accumulate(tape: Tape, total: str | None, grad: str, value: Value) -> str:
    """Add a gradient to what other consumers of the value contributed."""
    return grad if total is None else tape.add("Add", [total, grad], like=value)


def node_users(nodes: Sequence[Node]) -> dict[str, list[int]]:
    """Return for every value the positions of the nodes that read it, ascending."""
    users: dict[str, list[int]] = {}
    for position, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None:
                users.setdefault(value.name, []).append(position)
    return users
