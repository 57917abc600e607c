"""Constant folding and dead-code removal, with the onnx package's own reference evaluator.

Exporters write shape arithmetic (Shape, Gather, Concat ...), transposed weights and
branches nobody takes. All of it depends on constants alone, so nothing here knows
what an operator means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Array = NDArray[Any]

# They have no inputs or constant ones, and yet no constant value.
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def evaluate(node: NodeProto, constants: Mapping[str, Array], opset: int) -> list[Array]:
    """Compute the outputs of a node whose inputs are all constants.

    Raises:
        Exception: whatever the reference evaluator raises for a node it cannot run.
    """
    from onnx import TypeProto, helper
    from onnx.reference import ReferenceEvaluator

    given = sorted({name for name in node.input if name})
    wanted = [name for name in node.output if name]
    untyped = {name: helper.make_value_info(name, TypeProto()) for name in [*given, *wanted]}
    graph = helper.make_graph([node], "fold", [untyped[n] for n in given], [untyped[n] for n in wanted])
    evaluator = ReferenceEvaluator(graph, opsets={"": opset})
    return [np.asarray(out) for out in evaluator.run(wanted, {name: constants[name] for name in given})]


def is_foldable(node: NodeProto, constants: Mapping[str, Array]) -> bool:
    """Return whether a node's outputs can be computed now."""
    if node.domain not in ("", "ai.onnx") or node.op_type in RANDOM_OPS | {"If", "Loop", "Scan"}:
        return False
    return all(name in constants for name in node.input if name)


def live_nodes(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes that the graph's outputs depend on, in the file's order."""
    needed = {out.name for out in graph.output}
    live: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            live.append(node)
    return live[::-1]


def _reads(node: NodeProto) -> set[str]:
    """Names that a node reads, those inside its branches included."""
    names = set(node.input)
    for attribute in node.attribute:
        for branch in [attribute.g, *attribute.graphs]:
            names.update(out.name for out in branch.output)
            names.update(name for inner in branch.node for name in _reads(inner))
    return names


def without_repeats(array: Array, batch: int) -> Array:
    """Undo an expansion over the batch: ``(batch, ...)`` of equal entries becomes ``(1, ...)``."""
    if array.ndim and array.shape[0] == batch and (array == array[:1]).all():
        return array[:1]
    return array


def static_shape(
    target: Sequence[int], source: Sequence[int], batches: Iterable[int], keep_zeros: bool
) -> list[int] | None:
    """Resolve the 0 and -1 entries of a Reshape.

    Args:
        target: the requested shape, batch dimension included.
        source: the shape now, without the batch dimension.
        batches: sizes that stand for the batch dimension.
        keep_zeros: whether 0 means a size of 0 (attribute ``allowzero``).

    Returns:
        The new shape without the batch dimension, or ``None`` when the batch dimension does not stay first.
    """
    sizes = list(target)
    for i, size in enumerate(sizes):
        if size == 0 and not keep_zeros and 0 < i <= len(source):
            sizes[i] = source[i - 1]
    stays = bool(sizes) and (sizes[0] in (0, -1) or sizes[0] in batches)
    total, rest = int(np.prod(source)), sizes[1:]
    if not stays or (sizes[0] == -1 and -1 in rest):
        return None
    known = int(np.prod([n for n in rest if n != -1]))
    rest = [total // known if n == -1 and known else n for n in rest]
    return rest if int(np.prod(rest)) == total else None
