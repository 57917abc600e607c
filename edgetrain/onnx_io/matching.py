"""Initial weights for a network from an ONNX file, or from a dictionary, of another one.

First by name and shape. What is left over on both sides is then matched by order
and shape: the network's arrays in the order its nodes read them, each with the
first array not yet used that has the same shape, in the order the file's nodes
read them. The file may contain operators that edgetrain lacks: only its arrays count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import ModelError
from edgetrain.graph import Graph

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class MatchReport:
    """What became of every array.

    Attributes:
        by_name: names found on both sides with the same shape.
        by_order: (name in the network, name in the file), matched by order and shape.
        other_shape: names found on both sides with different shapes (they may also appear below).
        missing: names in the network that kept their values.
        unused: names in the file that were not used.
    """

    by_name: tuple[str, ...]
    by_order: tuple[tuple[str, str], ...]
    other_shape: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line per kind of match that occurs."""
        pairs = [f"{mine} from {theirs}" for mine, theirs in self.by_order]
        lines = [
            _line("matched by name", self.by_name),
            _line("matched by order and shape", pairs),
            _line("same name, different shape", self.other_shape),
            _line("left as they were", self.missing),
            _line("not used", self.unused),
        ]
        return "\n".join(line for line in lines if line)


def _line(title: str, names: tuple[str, ...] | list[str]) -> str:
    return f"{title} ({len(names)}): {', '.join(names)}" if names else ""


def match_parameters(
    graph: Graph, source: str | PathLike[str] | ModelProto | Mapping[str, NDArray[np.float32]]
) -> tuple[Arrays, MatchReport]:
    """Choose initial weights for a graph; the graph is not changed.

    Args:
        graph: the network that wants weights; trainable arrays and running averages take part.
        source: path of an .onnx file, a model in memory, or arrays in ONNX layout by name.

    Returns:
        The matched float32 arrays by their names in the graph (copies), and what matched.

    Raises:
        ModelError: the file is bad, or nothing matches.

    Example:
        >>> graph = Graph("tiny", input_shape=(3,))
        >>> weight = graph.parameter("fc.weight", np.zeros((2, 3)))
        >>> arrays, report = match_parameters(graph, {"head.weight": np.ones((2, 3), np.float32)})
        >>> print(report)
        matched by order and shape (1): fc.weight from head.weight
    """
    offered = dict(source) if isinstance(source, Mapping) else _arrays_of_file(source)
    offered = {name: np.asarray(array) for name, array in offered.items()}
    wanted = _wanted(graph)
    same = [name for name in wanted if name in offered and offered[name].shape == graph.arrays[name].shape]
    pairs = {name: name for name in same}
    unused = [name for name in offered if name not in pairs]
    for name in wanted:
        shape = graph.arrays[name].shape
        found = None if name in pairs else next((other for other in unused if offered[other].shape == shape), None)
        if found is not None:
            pairs[name] = found
            unused.remove(found)
    if not pairs:
        raise ModelError(
            f"no weights match the graph '{graph.name}': {_shapes(graph.arrays)} wanted, {_shapes(offered)} found"
        )
    report = MatchReport(
        by_name=tuple(same),
        by_order=tuple((mine, theirs) for mine, theirs in pairs.items() if mine not in same),
        other_shape=tuple(name for name in wanted if name in offered and name not in same),
        missing=tuple(name for name in wanted if name not in pairs),
        unused=tuple(unused),
    )
    return {mine: np.array(offered[theirs], np.float32) for mine, theirs in pairs.items()}, report


def _shapes(arrays: Mapping[str, NDArray[np.float32]], most: int = 5) -> str:
    shown = ", ".join(f"{name} {array.shape}" for name, array in list(arrays.items())[:most])
    return f"{shown}, and {len(arrays) - most} more" if len(arrays) > most else shown or "nothing"


def _wanted(graph: Graph) -> list[str]:
    """Names of the arrays that a layer learns, in the order nodes read them."""
    read = [value.name for node in graph.nodes for value in node.inputs if value is not None]
    averages = {n.inputs[i].name for n in graph.nodes if n.op_type == "BatchNormalization" for i in (3, 4)}  # type: ignore[union-attr]  # never None
    learned = graph.trainable | averages
    return [name for name in dict.fromkeys([*read, *graph.arrays]) if name in learned]


def _arrays_of_file(source: str | PathLike[str] | ModelProto) -> Arrays:
    """Return the float32 initializers and Constant nodes of a file, in the order its nodes read them."""
    from onnx import TensorProto, numpy_helper

    from edgetrain.onnx_io.importer import read_model

    model = read_model(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensors[node.output[0]] = attribute.t
    read = dict.fromkeys(name for node in model.graph.node for name in node.input)
    try:
        return {
            n: numpy_helper.to_array(tensors[n])
            for n in read
            if n in tensors and tensors[n].data_type == TensorProto.FLOAT
        }
    except Exception as error:  # a tensor shorter than its shape says, or external data that is not there
        raise ModelError(f"the weights in '{model.graph.name}' cannot be read: {error}") from error
