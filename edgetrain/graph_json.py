"""A graph's structure as JSON, so that a checkpoint can rebuild the network without the code that built it.

Arrays of parameters are not part of it: they travel as tensors beside the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import GraphError
from edgetrain.graph import Graph, Node, Normalization


def graph_to_dict(graph: Graph) -> dict[str, Any]:
    """Return the structure of a graph as plain dicts, lists, strings and numbers.

    The ``steps`` repeat the calls that built the graph, in order, so a rebuilt graph equals the original down to
    the order of its values.

    Raises:
        GraphError: an attribute of a node is of a type that JSON lacks.

    Example:
        >>> graph_to_dict(Graph("tiny", input_shape=(3,)))["steps"]
        [{'input': 'input', 'shape': [3]}]
    """
    normalization = graph.normalization
    return {
        "name": graph.name,
        "steps": _steps(graph),
        "outputs": list(graph.outputs),
        "normalization": None if normalization is None else {
            "mean": [float(v) for v in normalization.mean], "std": [float(v) for v in normalization.std],
        },
        "class_names": list(graph.class_names),
        "softmax_output": graph.softmax_output,
        "log_softmax_output": graph.log_softmax_output,
        "channels_last": graph.channels_last,
        "trained": graph.trained,
    }  # fmt: skip


def graph_from_dict(table: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> Graph:
    """Rebuild a graph; every node is checked again as it is added.

    Args:
        table: as ``graph_to_dict`` returns it.
        arrays: every parameter and constant by name, in ONNX layout; they are copied.

    Raises:
        GraphError: a key or an array is missing, a shape differs, or a node is invalid.
    """
    try:
        graph = Graph(table["name"])
        for step in table["steps"]:
            _repeat(graph, step, arrays)
        graph.set_outputs(table["outputs"])
        graph.normalization = _normalization(table["normalization"])
        graph.class_names = tuple(table["class_names"])
        graph.softmax_output = bool(table["softmax_output"])
        graph.log_softmax_output = bool(table.get("log_softmax_output", False))  # older files lack it
        graph.channels_last = bool(table.get("channels_last", False))  # nor have they this
        graph.trained = bool(table.get("trained", False))  # not in files from before it was kept
    except (KeyError, TypeError, ValueError) as error:
        raise GraphError(f"stored graph: {error!r} while rebuilding it; the file is damaged") from error
    return graph


def _steps(graph: Graph) -> list[dict[str, Any]]:
    nodes = {out.name: node for node in graph.nodes for out in node.outputs[:1]}
    steps: list[dict[str, Any]] = []
    for value in graph.values.values():
        if value.name in graph.inputs:
            steps.append({"input": value.name, "shape": list(value.shape)})
        elif value.name in graph.arrays:
            trainable = value.name in graph.trainable
            steps.append({"parameter": value.name, "shape": list(value.shape), "trainable": trainable})
        elif value.name in nodes:
            steps.append(_node_step(nodes[value.name]))
    return steps


def _node_step(node: Node) -> dict[str, Any]:
    return {
        "node": node.name,
        "operator": node.op_type,
        "inputs": [None if value is None else value.name for value in node.inputs],
        "outputs": [value.name for value in node.outputs],
        "attributes": {key: _encode(node, key, value) for key, value in node.attributes.items()},
    }


def _repeat(graph: Graph, step: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> None:
    if "input" in step:
        graph.add_input(step["input"], step["shape"])
    elif "parameter" in step:
        name, array = step["parameter"], arrays[step["parameter"]]
        if list(array.shape) != step["shape"]:
            raise GraphError(f"stored graph: '{name}' has shape {array.shape}, expected {tuple(step['shape'])}")
        graph.parameter(name, array, step["trainable"])
    else:
        attributes = {key: _decode(value) for key, value in step["attributes"].items()}
        graph.add(step["operator"], step["inputs"], step["node"], step["outputs"], **attributes)


def _encode(node: Node, key: str, value: Any) -> Any:
    """Mark what JSON would confuse: a tuple must not come back as a list, nor an array as numbers."""
    if isinstance(value, tuple):
        return {"tuple": [_encode(node, key, item) for item in value]}
    if isinstance(value, list):
        return [_encode(node, key, item) for item in value]
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise GraphError(f"node '{node.name}' ({node.op_type}): attribute '{key}' is {type(value).__name__}, not storable")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_decode(item) for item in value["tuple"])
        return np.array(value["array"], dtype=value["dtype"])
    return value


def _normalization(table: Mapping[str, Any] | None) -> Normalization | None:
    if table is None:
        return None
    return Normalization(np.array(table["mean"], np.float32), np.array(table["std"], np.float32))
