"""Initial weights for a network from an ONNX file, or from a dictionary, of another one.

First by name and shape, in which ones at the ends do not count. What is left over on both sides is matched by order,
but only if all of it pairs up: one after the other the same shapes, in the order in which the nodes of the network, and
of the file, read them. So a renamed network is recognised, and arrays of another one end up nowhere. The file may
contain operators that edgetrain lacks: only its arrays count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.errors import ModelError
from edgetrain.graph import Graph, Normalization
from edgetrain.onnx_io.names import NORMALIZATION, PRODUCER
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductOp

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class MatchReport:
    """What became of every array.

    Attributes:
        by_name: names found on both sides with the same shape; (C,) is that of (C, 1, 1).
        by_order: (name in the network, name in the file), matched by order and shape: all that names did not match.
        other_shape: names found on both sides with different shapes (they may also appear below).
        missing: names in the network that kept their values.
        unused: names in the file that were not used.
        thinned: names of sparse weights that have no room for all that is not zero in what matched.
        normalization: of inputs, which the weights were trained with; ``None`` if with none, or not told.
        tells_normalization: whether the source does: files of edgetrain's do, for networks with one input of as many
            channels.
    """

    by_name: tuple[str, ...]
    by_order: tuple[tuple[str, str], ...]
    other_shape: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    thinned: tuple[str, ...] = ()
    normalization: Normalization | None = field(default=None, compare=False)
    tells_normalization: bool = False

    def mark(self, graph: Graph) -> None:
        """Note in a graph that its weights are trained ones, and their normalisation of inputs, if that is told."""
        graph.trained = True
        if self.tells_normalization:
            graph.normalization = self.normalization

    def __str__(self) -> str:
        """Return one line per kind of match that occurs."""
        pairs = [f"{mine} from {theirs}" for mine, theirs in self.by_order]
        lines = [
            _line("matched by name", self.by_name),
            _line("matched by order and shape", pairs),
            _line("same name, different shape", self.other_shape),
            _line("left as they were", self.missing),
            _line("not used", self.unused),
            _line("sparse, without some of the weights given", self.thinned),
            "inputs are normalised as in the file" if self.normalization is not None else "",
        ]
        return "\n".join(line for line in lines if line)


def _line(title: str, names: tuple[str, ...] | list[str]) -> str:
    return f"{title} ({len(names)}): {', '.join(names)}" if names else ""


def match_parameters(
    graph: Graph, source: str | PathLike[str] | ModelProto | Mapping[str, ArrayLike]
) -> tuple[Arrays, MatchReport]:
    """Choose initial weights for a graph; the graph is not changed.

    Args:
        graph: the network that wants weights; arrays of products and normalisations take part, also frozen ones, and
            whatever else is trainable.
        source: path of an .onnx file, a model in memory, or arrays in ONNX layout by name.

    Returns:
        The matched float32 arrays by their names in the graph (copies), and what matched.

    Raises:
        ModelError: the file is bad, nothing matches, or arrays are left over while less than half of the network's
            weights (without biases and the like) match, as from another network; or an array holds something else
            than finite numbers.

    Example:
        >>> graph = Graph("tiny", input_shape=(3,))
        >>> weight = graph.parameter("fc.weight", np.zeros((2, 3)))
        >>> arrays, report = match_parameters(graph, {"head.weight": np.ones((2, 3), np.float32)})
        >>> print(report)
        matched by order and shape (1): fc.weight from head.weight
    """
    given, normalization, told_for = (source, None, 0) if isinstance(source, Mapping) else _read(source)
    tells = len(graph.inputs) == 1 and told_for == graph.input_shape[0]
    offered = {name: np.asarray(array) for name, array in given.items()}
    wanted = _wanted(graph)
    same = [n for n in wanted if n in offered and _sizes(offered[n]) == _sizes(graph.arrays[n])]
    rest = {name: graph.arrays[name] for name in wanted if name not in same}
    left_over = {name: array for name, array in offered.items() if name not in same}
    learned = {name: array for name, array in rest.items() if name in graph.trainable}
    by_order = _in_order(rest, left_over) or _in_order(learned, left_over)
    report = MatchReport(
        by_name=tuple(same),
        by_order=tuple(by_order.items()),
        other_shape=tuple(name for name in rest if name in offered),
        missing=tuple(name for name in rest if name not in by_order),
        unused=tuple(name for name in left_over if name not in by_order.values()),
        normalization=normalization if tells else None,
        tells_normalization=tells,
    )
    pairs = {name: name for name in same} | by_order
    weights = [name for name in wanted if graph.arrays[name].ndim > 1]
    if not pairs or (report.unused and sum(name in pairs for name in weights) < len(weights) / 2):
        raise ModelError(
            f"{f'only {len(pairs)}' if pairs else 'no'} weights match the graph '{graph.name}': "
            f"{_shapes(rest)} wanted, {_shapes(left_over)} found; give arrays of the same names and shapes and no "
            "others, or those of the same network under other names, all and in its order"
        )
    numbers = {mine: _numbers(theirs, offered[theirs]) for mine, theirs in pairs.items()}
    return {mine: array.reshape(graph.arrays[mine].shape) for mine, array in numbers.items()}, report


def _sizes(array: NDArray[Any]) -> tuple[int, ...]:
    """Return the shape without ones at its ends: a slope per channel is (C,) in files, (C, 1, 1) as the graph has it.

    Those in between tell apart kernels of 1x3 and 3x1.
    """
    shape = list(array.shape)
    while shape and shape[-1] == 1:
        del shape[-1]
    while shape and shape[0] == 1:
        del shape[0]
    return tuple(shape)


def _in_order(wanted: Mapping[str, NDArray[Any]], offered: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Return the offered name of every wanted array if the shapes are the same one after the other, else nothing.

    Offered scalars are passed over: bounds and factors that a file keeps among its weights.
    """
    names = [name for name, array in offered.items() if array.ndim]
    if [_sizes(offered[name]) for name in names] != [_sizes(array) for array in wanted.values()]:
        return {}
    return dict(zip(wanted, names, strict=True))


def _numbers(name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    """Return a copy as float32.

    Raises:
        ModelError: it holds something else than finite numbers.
    """
    if array.dtype.kind not in "fiu":
        raise ModelError(f"array '{name}' has dtype {array.dtype}, expected float32; convert it with astype")
    with np.errstate(over="ignore"):
        numbers = np.array(array, np.float32)
    if not np.isfinite(numbers).all():
        raise ModelError(f"array '{name}' holds NaN or infinite numbers; load weights from before they went astray")
    return numbers


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> str:
    most = 5
    shown = ", ".join(f"{name} {array.shape}" for name, array in list(arrays.items())[:most])
    return f"{shown}, and {len(arrays) - most} more" if len(arrays) > most else shown or "nothing"


def _wanted(graph: Graph) -> list[str]:
    """Names of the arrays that a layer learns, or has learned and keeps, in the order nodes read them."""
    read = [value.name for node in graph.nodes for value in node.inputs if value is not None]
    layers = [n for n in graph.nodes if n.op_type == "BatchNormalization" or isinstance(get_op(n.op_type), ProductOp)]
    kept = {value.name for node in layers for value in node.inputs[1:] if value is not None}
    wanted = graph.arrays.keys() & kept | graph.trainable
    return [name for name in dict.fromkeys([*read, *graph.arrays]) if name in wanted]


def _read(source: str | PathLike[str] | ModelProto) -> tuple[Arrays, Normalization | None, int]:
    """Return the float32 initializers and Constant nodes of a file, in the order its nodes read them.

    Beside them, as they are no weights, the mean and deviation by which edgetrain's files normalise inputs, and for how
    many channels: 0 if it is no such file, as its normalisation is not known.
    """
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
        arrays = {
            n: numpy_helper.to_array(tensors[n])
            for n in read
            if n in tensors and tensors[n].data_type == TensorProto.FLOAT
        }
    except Exception as error:  # a tensor shorter than its shape says, or external data that is not there
        raise ModelError(f"the weights in '{model.graph.name}' cannot be read: {error}") from error
    names = [f"{NORMALIZATION}.{part}" for part in ("mean", "std")]
    found = [_numbers(name, arrays.pop(name)).reshape(-1) for name in names if name in arrays]
    if len(found) == len(names):
        return arrays, Normalization(*found), len(found[0])
    sizes = [size.dim_value for value in model.graph.input[:1] for size in value.type.tensor_type.shape.dim]
    return arrays, None, sizes[1] if model.producer_name == PRODUCER and len(sizes) > 1 else 0
