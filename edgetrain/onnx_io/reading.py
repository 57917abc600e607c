"""What is known while one ONNX file is read: constants, values so far, and how to complain."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from edgetrain.errors import GraphError, ModelError, UnsupportedError
from edgetrain.graph import Graph, Normalization, Value
from edgetrain.onnx_io.folding import Array, evaluate, is_foldable, without_repeats

if TYPE_CHECKING:
    from onnx import NodeProto

# A weight that went through one of these is still that weight and keeps its name. Not Identity: PyTorch's exporter
# writes it between equal but independent weights (fresh BatchNormalization layers), which must not become one.
_KEEPS_NAME = frozenset({"Cast", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Source:
    """A node of the file: operator, name for messages, inputs, outputs, decoded attributes."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, node: NodeProto) -> Source:
        """Decode a node.

        Raises:
            ModelError: it has no output, or an attribute is not of the type that its operator has.
        """
        from onnx.helper import get_attribute_value

        if not node.output:
            raise ModelError(f"node '{node.name}' ({node.op_type}) has no output; the file is damaged, export it again")
        _check_attributes(node)
        attributes = {a.name: _decoded(get_attribute_value(a)) for a in node.attribute}
        prefix = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
        name = node.name or next((out for out in node.output if out), node.op_type)
        return cls(prefix + node.op_type, name, tuple(node.input), tuple(node.output), attributes)

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute or a default."""
        return self.attributes.get(attribute, default)

    def has(self, index: int) -> bool:
        """Return whether the node has that input."""
        return index < len(self.inputs) and bool(self.inputs[index])

    def only(self, *names: str) -> dict[str, Any]:
        """Return those of the named attributes that the file sets."""
        return {name: self.attributes[name] for name in names if name in self.attributes}


def check_text(message: Any, place: str) -> None:
    """Refuse names that are not text: protobuf hands bytes that are not UTF-8 over as they are.

    Args:
        message: of protobuf, with everything in it.
        place: names the file in the error.

    Raises:
        ModelError: there is one.
    """
    for entry, content in message.ListFields():
        if entry.type not in (entry.TYPE_MESSAGE, entry.TYPE_STRING):
            continue
        repeated = isinstance(content, Sequence) and not isinstance(content, (str, bytes))
        for part in content if repeated else [content]:
            if isinstance(part, bytes):
                raise ModelError(f"{place} is damaged: {entry.name} is {part!r}, expected text; export it again")
            if not isinstance(part, str):
                check_text(part, place)


def _check_attributes(node: NodeProto) -> None:
    """Refuse attributes of another type than the operator's: no reader expects a graph where a number belongs.

    Raises:
        ModelError: there is one.
    """
    for attribute in node.attribute:
        wanted = _attribute_types().get((node.op_type, attribute.name), attribute.type)
        if attribute.type != wanted or attribute.ref_attr_name:
            found = "a reference" if attribute.ref_attr_name else f"of type {_type_name(attribute.type)}"
            raise ModelError(
                f"node '{node.name}' ({node.op_type}): its attribute '{attribute.name}' is {found}, expected type "
                f"{_type_name(wanted)}; the file is damaged, export it again"
            )


@functools.cache
def _attribute_types() -> dict[tuple[str, str], int]:
    """Return the number of the type by operator and attribute; no operator we read has changed one since opset 6."""
    from onnx import defs

    schemas = sorted(defs.get_all_schemas_with_history(), key=lambda schema: schema.since_version)
    standard = [schema for schema in schemas if not schema.domain]
    # The stub of onnx does not know that its enumerations are numbers.
    return {(s.name, name): int(a.type) for s in standard for name, a in s.attributes.items()}  # type: ignore[call-overload]


def _type_name(number: int) -> str:
    from onnx import AttributeProto

    kinds = AttributeProto.AttributeType
    return kinds.Name(number).lower() if number in kinds.values() else str(number)


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if isinstance(value, (list, tuple)) else value


@dataclass
class Reading:
    """State of one import.

    Attributes:
        graph: what has been built so far.
        opset: version of the standard operators in the file.
        batch: a size that stands for the batch dimension inside folded shape arithmetic.
        fixed_batch: the batch size that the file fixes, ``None`` when it is free.
        constants: every array known by its ONNX name.
        origins: ONNX name of a folded weight -> the initializer it comes from.
        transposed: ONNX name of a folded matrix -> the one that it is the transpose of.
        values: ONNX name -> value of the graph.
        averages: names of running averages in the graph.
        probabilities: Softmax or LogSoftmax by the ONNX name of its output, whose entry in ``values`` is the logits.
        grouped: ONNX name of maps with their channels in groups -> the value, groups, and whether those are dealt out.
        withheld: ONNX name of an output that is not made -> the reason.
        channels_last: ONNX name of an input that is read with its last axis put first alone; "" if there is none.
        mean, std: of an input normalisation that edgetrain wrote.
    """

    graph: Graph
    opset: int
    batch: int
    fixed_batch: int | None = None
    constants: dict[str, Array] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    transposed: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    averages: set[str] = field(default_factory=set)
    probabilities: dict[str, str] = field(default_factory=dict)
    grouped: dict[str, tuple[Value, int, bool]] = field(default_factory=dict)
    withheld: dict[str, str] = field(default_factory=dict)
    channels_last: str = ""
    mean: Array | None = None
    std: Array | None = None

    def fail(self, node: Source, reason: str) -> NoReturn:
        """Refuse a node.

        Raises:
            UnsupportedError: always; names node, operator, opset and reason.
        """
        raise UnsupportedError(f"node '{node.name}' ({node.op_type}, opset {self.opset}): {reason}")

    def fold(self, node: NodeProto) -> bool:
        """Compute a node now if its inputs are constants; return whether that was possible.

        Raises:
            UnsupportedError: the onnx package cannot compute it.
        """
        if not is_foldable(node, self.constants):
            return False
        try:
            results = evaluate(node, self.constants, self.opset)
        except Exception as error:  # the reference evaluator raises anything, depending on the operator
            self.fail(Source.of(node), f"the constant expression cannot be computed: {error}")
        outputs = [name for name in node.output if name]
        self.constants.update(zip(outputs, results, strict=True))
        if node.op_type in _KEEPS_NAME and self.constants[node.input[0]].dtype.kind == "f":
            self.origins[outputs[0]] = self.origins.get(node.input[0], node.input[0])
        if node.op_type == "Transpose" and results[0].ndim == 2 and Source.of(node).get("perm", [1, 0]) == [1, 0]:
            self.transposed[outputs[0]] = node.input[0]
        return True

    def value(self, node: Source, index: int = 0) -> Value:
        """Return a batched input.

        Raises:
            UnsupportedError: it is a constant, or comes after a Softmax.
            ModelError: nothing in the file makes it.
        """
        name = node.inputs[index] if node.has(index) else ""
        if name in self.probabilities:
            kind = self.probabilities[name]
            self.fail(node, f"its input '{name}' comes from a {kind}, which is supported at the end of a network only")
        if name in self.constants:
            self.fail(node, f"input {index} ('{name}') is a constant; expected a value that depends on the input")
        if name in self.withheld:
            self.fail(node, self.withheld[name])
        if name not in self.values:
            raise ModelError(
                f"node '{node.name}' ({node.op_type}): no node before it makes its input {index} ('{name}')"
            )
        return self.graph.values[self.values[name]]

    def is_constant(self, node: Source, index: int) -> bool:
        """Return whether an input is known now."""
        return node.has(index) and node.inputs[index] in self.constants

    def constant(self, node: Source, index: int) -> Array | None:
        """Return a constant input, ``None`` when it is left out.

        Raises:
            UnsupportedError: it depends on the network's input.
        """
        if not node.has(index):
            return None
        if not self.is_constant(node, index):
            self.fail(
                node, f"input {index} ('{node.inputs[index]}') must be a constant, but depends on the network's input"
            )
        return self.constants[node.inputs[index]]

    def integers(self, node: Source, index: int, attribute: str) -> list[int] | None:
        """Return integers that older opsets give as an attribute and newer ones as an input."""
        if attribute in node.attributes:
            return [int(n) for n in np.atleast_1d(node.attributes[attribute])]
        array = self.constant(node, index)
        return None if array is None else [int(n) for n in array.reshape(-1)]

    def scalar(self, node: Source, index: int, attribute: str) -> float | None:
        """Return a number that older opsets give as an attribute and newer ones as an input."""
        if attribute in node.attributes:
            return float(node.attributes[attribute])
        array = self.constant(node, index)
        return None if array is None or not array.size else float(array.reshape(-1)[0])

    def parameter(
        self, node: Source, index: int, trainable: bool, shape: tuple[int, ...] | None = None, scale: float = 1.0
    ) -> str:
        """Put a constant input into the graph, once for all nodes that use it; return its name.

        Args:
            node: the node that reads it.
            index: of the input.
            trainable: whether training may change it.
            shape: broadcast to it first.
            scale: multiply by it first.

        Raises:
            UnsupportedError: not a constant, not float32, or the shape does not broadcast.
        """
        array = self.constant(node, index)
        name = node.inputs[index] if node.has(index) else f"input {index}"
        if array is None or array.dtype != np.float32:
            kind = "none" if array is None else array.dtype
            self.fail(node, f"'{name}' has the type {kind}; edgetrain computes in float32")
        if shape is not None and array.shape != shape:
            array = self._broadcast(node, name, array, shape)
        scaled = array if scale == 1.0 else array * np.float32(scale)
        return self.place(self.origins.get(name, name), scaled, trainable, otherwise=name)

    def _broadcast(self, node: Source, name: str, array: Array, shape: tuple[int, ...]) -> Array:
        squeezed = without_repeats(array, self.batch) if array.ndim > len(shape) else array
        while squeezed.ndim > len(shape) and squeezed.shape[0] == 1:
            squeezed = squeezed[0]
        try:
            return np.broadcast_to(squeezed, shape)
        except ValueError:
            self.fail(node, f"'{name}' has the shape {array.shape}; expected {shape}")

    def running_average(self, node: Source, index: int) -> str:
        """Put a running average into the graph, one array per node: files that store equal ones once do not mean it."""
        name = self.parameter(node, index, trainable=False)
        if name in self.averages | self.graph.trainable or self.graph.consumers(name):
            name = self.graph.parameter(f"{node.name}.average{index}", self.graph.arrays[name], trainable=False)
        self.averages.add(name)
        return name

    def place(self, name: str, array: Array, trainable: bool = False, otherwise: str = "") -> str:
        """Put an array into the graph under a free name; the same array again gives the same name.

        Raises:
            ModelError: no name is free.
        """
        arrays = self.graph.arrays
        for candidate in [name, otherwise or f"{name}.derived", *(f"{name}.{i}" for i in range(2, 1000))]:
            if candidate not in self.graph.values:
                return self.graph.parameter(candidate, array, trainable)
            same = candidate in arrays and np.array_equal(arrays[candidate], array, equal_nan=True)
            if same and not (trainable and candidate in self.averages):
                if trainable:
                    self.graph.trainable.add(candidate)
                return candidate
        raise ModelError(f"the name '{name}' is used for a thousand different arrays")

    def emit(self, node: Source, op_type: str, inputs: list[str | None], part: str = "", **attributes: Any) -> str:
        """Add a node to the graph; return the name of its output.

        Args:
            node: what it stands for.
            op_type: operator of the graph.
            inputs: names of values and arrays in the graph.
            part: suffix of a helper node; the last node of several has none and makes the ONNX output.
            attributes: as ONNX names them.

        Raises:
            UnsupportedError: the operator cannot do this.
        """
        suffix = f".{part}" if part else ""
        output = node.outputs[0] + suffix
        try:
            self.graph.add(op_type, inputs, name=node.name + suffix, outputs=[output], **attributes)
        except GraphError as error:
            self.fail(node, str(error).partition("]: ")[2] or str(error))  # the node is named by ``fail``
        if not part:
            self.values[output] = output
        return output

    def alias(self, node: Source, value: Value) -> None:
        """Let a node's output be a value that exists: the node does nothing."""
        self.values[node.outputs[0]] = value.name

    def withhold(self, node: Source, reason: str) -> None:
        """Remember why the outputs after the first do not exist, in case something reads them."""
        for name in node.outputs[1:]:
            self.withheld[name] = f"output '{name}' of node '{node.name}' ({node.op_type}) is not supported: {reason}"

    @property
    def normalization(self) -> Normalization | None:
        """The recognised input normalisation."""
        if self.mean is None or self.std is None:
            return None
        return Normalization(self.mean.reshape(-1).astype(np.float32), self.std.reshape(-1).astype(np.float32))

    @property
    def batches(self) -> set[int]:
        """Sizes that stand for the batch dimension."""
        return {self.batch} if self.fixed_batch is None else {self.batch, self.fixed_batch}
