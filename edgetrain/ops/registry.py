"""What an operator must tell, and the table of all operators.

An operator keeps side by side everything the system asks about it: shape rule,
meaning (NumPy), gradient, cost, borders it wants around its inputs, and the
kernel calls that carry it out. Gradient operators (``ProductWeightGrad`` ...) are
operators like all others; they exist only in training graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape

if TYPE_CHECKING:
    from edgetrain.autodiff import Tape
    from edgetrain.lowering import Lowering

Array = NDArray[Any]
Border = tuple[int, int, int, int]  # zeros above, left, below, right of every map
NO_BORDER: Border = (0, 0, 0, 0)


class Op:
    """Base class of operators; one stateless instance per ONNX operator name.

    Attributes:
        name: ONNX operator name (or the name of a gradient operator).
        arity: smallest and largest number of inputs.
        in_place: index of the input whose memory the first output may take over, or ``None``.
        in_place_alone: whether that memory must be no other input's as well: for operators that read other places after
            they have written one.
        attributes: names of the attributes that are understood.
        training_only: whether it exists only in training graphs (not in ONNX files).
        writes_border: indices of the outputs around which its kernel for lanes of samples writes the zeros, too.
        opaque: indices of the outputs that hold bits, positions or lists instead of float32 numbers.
        takes_parameters: whether the first input may be a parameter instead of one array per sample.
    """

    name: ClassVar[str]
    arity: ClassVar[tuple[int, int]] = (1, 1)
    in_place: ClassVar[int | None] = None
    in_place_alone: ClassVar[bool] = False
    attributes: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[bool] = False
    writes_border: ClassVar[tuple[int, ...]] = ()
    opaque: ClassVar[tuple[int, ...]] = ()
    takes_parameters: ClassVar[bool] = False

    def check(self, node: Node) -> None:
        """Check the number of inputs, that the first is batched, and the attribute names.

        Raises:
            GraphError: names the node, the operator, and what was expected.
        """
        low, high = self.arity
        if not low <= len(node.inputs) <= high:
            raise GraphError(f"{describe(node)}: {len(node.inputs)} inputs, expected {low} to {high}")
        if not (self.takes_parameters or node.x.batched):
            raise GraphError(f"{describe(node)}: the first input is a parameter, expected one array per sample")
        for attribute in node.attributes:
            if attribute not in self.attributes:
                known = ", ".join(self.attributes) or "none"
                raise GraphError(f"{describe(node)}: unknown attribute '{attribute}'; known: {known}")

    def output_count(self, node: Node) -> int:
        """Return how many outputs the node has."""
        return 1

    def infer(self, node: Node) -> Sequence[tuple[Shape, bool]]:
        """Return ``(shape, batched)`` of every output.

        Raises:
            GraphError: the input shapes or the attributes do not fit.
        """
        raise NotImplementedError

    def reference(self, node: Node, *inputs: Array) -> tuple[Array, ...]:
        """Compute the outputs with NumPy, batch dimension first, in the dtype of the inputs."""
        raise NotImplementedError

    def gradient(self, node: Node, grad_out: Sequence[str | None], tape: Tape) -> Sequence[str | None]:
        """Add nodes that compute the gradients of the inputs; return their value names.

        Args:
            node: the forward node.
            grad_out: value name of the gradient of every output, ``None`` where none flows.
            tape: adds nodes, and tells which inputs need a gradient (``tape.needs``).

        Raises:
            GraphError: the operator has no gradient.
        """
        raise GraphError(f"{describe(node)}: the operator {node.op_type} has no gradient")

    def macs(self, node: Node) -> int:
        """Return the multiply-accumulates per sample."""
        return 0

    def borders(self, node: Node) -> Sequence[Border]:
        """Return the zero border wanted around each input (batched inputs only)."""
        return [NO_BORDER] * len(node.inputs)

    def lower(self, node: Node, low: Lowering) -> None:
        """Emit the kernel calls that compute the node."""
        raise NotImplementedError


_OPS: dict[str, Op] = {}


def register(cls: type[Op]) -> type[Op]:
    """Class decorator: enter an operator into the table.

    Raises:
        GraphError: the name is taken.
    """
    if cls.name in _OPS:
        first = type(_OPS[cls.name]).__name__
        raise GraphError(f"operator '{cls.name}' is registered twice: {first} and {cls.__name__}")
    _OPS[cls.name] = cls()
    return cls


def get_op(name: str) -> Op:
    """Return the operator of that name.

    Raises:
        GraphError: unknown; the message lists what exists.
    """
    if name not in _OPS:
        raise GraphError(f"unknown operator '{name}'; known: {', '.join(known_ops())}")
    return _OPS[name]


def known_ops(training_only: bool = False) -> list[str]:
    """Return the names of the operators that models may use, or of those that only training graphs have."""
    return sorted(name for name, op in _OPS.items() if op.training_only == training_only)


def describe(node: Node) -> str:
    """Return ``node 'name' (Operator) with inputs ...`` for error messages."""
    shapes = ", ".join("-" if value is None else str(value) for value in node.inputs)
    return f"node '{node.name}' ({node.op_type}) with inputs [{shapes}]"
