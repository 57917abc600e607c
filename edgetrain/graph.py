"""The narrow waist: a static graph of ONNX operators.

Importers and model builders make a ``Graph``; autodiff, the planner and the
exporter read it. A graph is built in execution order, and every node is checked
the moment it is added.

Shapes are static. A value that has one entry per sample is *batched*; its
``shape`` leaves the batch dimension out: ``(C, H, W)`` for images, ``(C, W)`` for
1-D signals, ``(F,)`` after Flatten. Parameters and constants are not batched and
have their ONNX shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import GraphError, UsageError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A named array of a graph.

    Attributes:
        name: unique in its graph.
        shape: sizes without the batch dimension (see the module's docstring).
        batched: whether there is one such array per sample.
    """

    name: str
    shape: Shape
    batched: bool = True

    @property
    def size(self) -> int:
        """Number of elements (per sample when batched)."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return "x".join(["N"] * self.batched + [str(n) for n in self.shape]) or "scalar"


@dataclass(frozen=True)
class Node:
    """One operator applied to values; an input that an operator leaves out is ``None``."""

    op_type: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Value:
        """The first input.

        Raises:
            GraphError: the node has none.
        """
        return self.input(0)

    @property
    def y(self) -> Value:
        """The first output."""
        return self.outputs[0]

    def input(self, index: int) -> Value:
        """Return an input that must be there.

        Raises:
            GraphError: it is missing.
        """
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise GraphError(f"node '{self.name}' ({self.op_type}): input {index} is missing")
        return value

    def optional(self, index: int) -> Value | None:
        """Return an input, or ``None`` when it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute or a default."""
        return self.attributes.get(attribute, default)


@dataclass(frozen=True)
class Normalization:
    """Per-channel input normalisation ``(x - mean) / std``; both float32 of shape ``(C,)``.

    Raises:
        GraphError: they are no numbers of one shape ``(C,)``, a number is not finite, or a deviation not above 0.

    Example:
        >>> Normalization([0.5], [0.25]).mean
        array([0.5], dtype=float32)
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Check both, and take them as float32."""
        for name in ("mean", "std"):
            try:
                object.__setattr__(self, name, np.asarray(getattr(self, name), np.float32))
            except (TypeError, ValueError) as error:
                raise GraphError(f"Normalization: {name}={getattr(self, name)!r}, expected numbers (C,)") from error
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise GraphError(
                f"Normalization: mean of shape {self.mean.shape}, std of {self.std.shape}, expected (C,) of both"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise GraphError(
                f"inputs are normalised by the mean {self.mean} and the deviation {self.std}, expected finite numbers "
                "and deviations above 0; export the model again"
            )


# What every placeholder shows: its address tells a placeholder from any other array.
_NOTHING = np.zeros((), np.float32)


def placeholder(shape: Sequence[int]) -> NDArray[np.float32]:
    """Return zeros that take no memory, for a graph to hold where sparse weights are stored elsewhere."""
    return np.broadcast_to(_NOTHING, shape)


def is_placeholder(array: Any) -> bool:
    """Whether an array was made by ``placeholder``.

    Example:
        >>> is_placeholder(placeholder((2, 3))), is_placeholder(np.zeros((2, 3)))
        (True, False)
    """
    return isinstance(array, np.ndarray) and array.ctypes.data == _NOTHING.ctypes.data


class FixedNames(set[str]):
    """The names that a learner trains: its memory is laid out for them, so they no longer change.

    Raises:
        UsageError: from every method that would change them.
    """

    def _refuse(self, *_: Any) -> Any:
        raise UsageError("graph.trainable of a learner: what is trained was settled when the learner was made; take a "
                         "copy (learner.graph.copy()), change its trainable, and make another learner")  # fmt: skip

    add = discard = remove = pop = clear = update = _refuse
    difference_update = intersection_update = symmetric_difference_update = _refuse
    __ior__ = __iand__ = __isub__ = __ixor__ = _refuse


class Graph:
    """A network: values, nodes in execution order, and the arrays of its parameters.

    Args:
        name: of the model.
        input_shape: of a sample; ``None`` where ``add_input`` comes later.
        input_name: of that input.

    Raises:
        GraphError: a size that is not positive; also of ``add_input`` and ``parameter``, and for a name that is taken.

    Attributes:
        name: of the model.
        inputs, outputs: names of values.
        values: every value by name.
        nodes: in execution order.
        arrays: float32 arrays of parameters and constants by value name, in ONNX layout.
        trainable: names of the arrays that training may change.
        trained: whether the arrays come from a file or from training, not from a builder's random numbers.
        densities: shares of weights that there is room for, by weight, of arrays that are placeholders because a
            checkpoint's state brings them; a graph in a learner has none.
        normalization: input normalisation that belongs to the model, or ``None``.
        class_names: labels of the outputs, empty when unknown.
        softmax_output: whether users of the model get probabilities: the exported file ends in Softmax.
        log_softmax_output: whether they get their logarithms: it ends in LogSoftmax.
        channels_last: whether they give the input with its channels last, as files of Keras have it: the exported file
            begins with a Transpose. Here they are first.

    Example:
        >>> graph = Graph("tiny", input_shape=(3,))
        >>> weight = graph.parameter("fc.weight", np.ones((2, 3), np.float32))
        >>> logits = graph.add("Gemm", ["input", weight], name="fc", transB=1)
        >>> graph.set_outputs([logits])
        >>> graph.values[logits].shape
        (2,)
    """

    def __init__(self, name: str, input_shape: Iterable[int] | None = None, input_name: str = "input") -> None:
        self.name = name
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self.trainable: set[str] = set()
        self.trained = False
        self.densities: dict[str, float] = {}
        self.normalization: Normalization | None = None
        self.class_names: tuple[str, ...] = ()
        self.softmax_output = self.log_softmax_output = self.channels_last = False
        if input_shape is not None:
            self.add_input(input_name, input_shape)

    def name_classes(self, names: tuple[str, ...]) -> None:
        """Take names of the outputs from data, if there are none yet and those are as many: data may lack classes."""
        if not self.class_names and self.output_shape == (len(names),):
            self.class_names = names

    @property
    def input_shape(self) -> Shape:
        """Shape of the first input without the batch dimension."""
        return self.values[self.inputs[0]].shape

    @property
    def output_shape(self) -> Shape:
        """Shape of the first output without the batch dimension."""
        return self.values[self.outputs[0]].shape

    @property
    def num_classes(self) -> int:
        """Length of the first output, one vector per sample.

        Raises:
            GraphError: a sample has no vector: a single number, or maps.
        """
        if len(self.output_shape) != 1:
            shape = ", ".join(map(str, ("N", *self.output_shape)))
            raise GraphError(f"graph '{self.name}' gives outputs ({shape}), expected (N, classes): a vector of logits "
                             "for each sample; of other outputs there are logits() and the loss 'mse'")  # fmt: skip
        return self.output_shape[0]

    def add_value(self, value: Value) -> str:
        """Register a value and return its name.

        Raises:
            GraphError: the name is taken, or a size is not a positive integer.
        """
        if value.name in self.values:
            raise GraphError(f"graph '{self.name}': the value name '{value.name}' is used twice; names must be unique")
        if any(int(n) != n or n < 1 for n in value.shape):
            raise GraphError(f"value '{value.name}': shape {value.shape} is not static; every size must be at least 1")
        self.values[value.name] = value
        return value.name

    def add_input(self, name: str, shape: Iterable[int]) -> str:
        """Declare a batched input of the given shape without the batch dimension."""
        self.inputs.append(self.add_value(Value(name, tuple(int(n) for n in shape))))
        return name

    def parameter(self, name: str, array: Any, trainable: bool = True) -> str:
        """Add an array that is not batched; it is copied and stored as float32 in ONNX layout.

        Args:
            name: of the value and of the ONNX initializer.
            array: anything NumPy turns into float32, or a ``placeholder``, which stays one.
            trainable: ``False`` for running averages and constants.
        """
        data = array if is_placeholder(array) else np.array(array, dtype=np.float32, order="C")
        self.add_value(Value(name, data.shape, batched=False))
        self.arrays[name] = data
        if trainable:
            self.trainable.add(name)
        return name

    def add(
        self, op_type: str, inputs: Iterable[str | None], name: str | None = None, outputs: Iterable[str] | None = None,
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Append a node, infer the shapes of its outputs, and return the name of the first output.

        Args:
            op_type: an ONNX operator name that edgetrain has (see ``edgetrain.ops.known_ops()``).
            inputs: value names in ONNX order, ``None`` or ``""`` for one that is left out.
            name: of the node; made from the operator and a number by default.
            outputs: value names; made from the node's name by default.
            attributes: as ONNX names them.

        Raises:
            GraphError: unknown operator or value, or shapes and attributes that do not fit.
        """
        from edgetrain.ops import get_op  # ops are a floor above: they describe themselves to the graph

        op = get_op(op_type)
        node_name = name or f"{op_type.lower()}_{len(self.nodes)}"
        values = tuple(self._lookup(node_name, op_type, i) for i in inputs)
        draft = Node(op_type, node_name, values, (), attributes)
        op.check(draft)
        names = list(outputs) if outputs is not None else self._output_names(node_name, op.output_count(draft))
        made = tuple(Value(n, *described) for n, described in zip(names, op.infer(draft), strict=False))
        for value in made:
            self.add_value(value)
        self.nodes.append(Node(op_type, node_name, values, made, attributes))
        return names[0]

    def _output_names(self, node_name: str, count: int) -> list[str]:
        return [f"{node_name}.out" if i == 0 else f"{node_name}.out{i}" for i in range(count)]

    def _lookup(self, node: str, op_type: str, name: str | None) -> Value | None:
        if not name:
            return None
        if name not in self.values:
            raise GraphError(f"node '{node}' ({op_type}): no input '{name}' so far; add nodes in execution order")
        return self.values[name]

    def set_outputs(self, names: Iterable[str]) -> None:
        """Declare which values the network returns; the first holds the logits.

        Raises:
            GraphError: a name does not exist.
        """
        self.outputs = list(names)
        for name in self.outputs:
            if name not in self.values:
                raise GraphError(f"graph '{self.name}': the output '{name}' does not exist")

    def copy(self, share: bool = False) -> Graph:
        """Return a graph with arrays of its own; ``share``: with the same arrays, for who replaces them all."""
        twin = Graph(self.name)
        twin.inputs, twin.outputs = list(self.inputs), list(self.outputs)
        twin.values, twin.nodes = dict(self.values), list(self.nodes)
        twin.arrays = {name: a if share or is_placeholder(a) else a.copy() for name, a in self.arrays.items()}
        twin.trainable, twin.trained, twin.densities = set(self.trainable), self.trained, dict(self.densities)
        twin.normalization, twin.class_names = self.normalization, self.class_names
        twin.softmax_output, twin.log_softmax_output = self.softmax_output, self.log_softmax_output
        twin.channels_last = self.channels_last
        return twin

    def producer(self, value: str) -> Node | None:
        """Return the node that makes a value, or ``None`` for inputs and arrays."""
        return next((node for node in self.nodes if any(out.name == value for out in node.outputs)), None)

    def consumers(self, value: str) -> list[Node]:
        """Return the nodes that read a value, in execution order."""
        return [node for node in self.nodes if any(i is not None and i.name == value for i in node.inputs)]

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        return sum(self.arrays[name].size for name in self.trainable)

    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        from edgetrain.ops import get_op

        return sum(get_op(node.op_type).macs(node) for node in self.nodes)

    def summary(self) -> str:
        """Return a table of layers: operator, output shape, parameters, multiply-accumulates per sample."""
        from edgetrain.ops import get_op

        rows = [("layer", "operator", "output", "parameters", "MACs")]
        for node in self.nodes:
            count = sum(i.size for i in node.inputs if i is not None and i.name in self.trainable)
            rows.append((node.name, node.op_type, str(node.y), f"{count:,}", f"{get_op(node.op_type).macs(node):,}"))
        rows.append(("total", "", str(self.values[self.outputs[0]]), f"{self.parameter_count:,}", f"{self.macs():,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [_table_line(row, widths) for row in rows]
        return "\n".join([f"{self.name}: input {self.values[self.inputs[0]]}", *lines])


def _table_line(row: tuple[str, ...], widths: list[int]) -> str:
    left = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
    right = "  ".join(cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
    return f"{left}  {right}"
