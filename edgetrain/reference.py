"""Run a graph with the readable twins of the kernels: slow, in any float dtype, and easy to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.autodiff import LABELS, TARGET, training_graph
from edgetrain.graph import Graph
from edgetrain.ops import get_op

Array = NDArray[Any]


def run_nodes(graph: Graph, values: dict[str, Array]) -> dict[str, Array]:
    """Compute all nodes of a graph, adding their outputs to ``values`` (batched values have the batch first)."""
    for node in graph.nodes:
        inputs = [values[v.name] for v in node.inputs if v is not None]
        results = get_op(node.op_type).reference(node, *inputs)
        values.update(zip((v.name for v in node.outputs), results, strict=True))
    return values


def _start(graph: Graph, x: ArrayLike | Mapping[str, ArrayLike], dtype: Any) -> dict[str, Array]:
    given = x if isinstance(x, Mapping) else {graph.inputs[0]: x}
    values = {name: np.asarray(array, dtype) for name, array in given.items()}
    if graph.normalization is not None:
        first, norm = values[graph.inputs[0]], graph.normalization
        wide = (1, -1, *[1] * (first.ndim - 2))
        values[graph.inputs[0]] = (first - norm.mean.reshape(wide)) / norm.std.reshape(wide).astype(dtype)
    return values | {name: array.astype(dtype) for name, array in graph.arrays.items()}


def evaluate(graph: Graph, x: ArrayLike | Mapping[str, ArrayLike], dtype: Any = np.float64) -> Array:
    """Return the first output ``(N, ...)`` in inference mode.

    Args:
        graph: the network.
        x: inputs ``(N, *input_shape)``, or a dict by name.
        dtype: to compute in.
    """
    return run_nodes(graph, _start(graph, x, dtype))[graph.outputs[0]]


def gradients(
    graph: Graph, x: ArrayLike | Mapping[str, ArrayLike], y: ArrayLike, loss: str = "cross_entropy",
    label_smoothing: float = 0.0, dtype: Any = np.float64,
) -> tuple[float, dict[str, Array]]:  # fmt: skip
    """Return the mean loss and its gradients by parameter name, in training mode; dropout keeps everything."""
    train = training_graph(graph, loss, label_smoothing)
    values = _start(graph, x, dtype)
    values |= {LABELS: np.asarray(y), TARGET: np.asarray(y, dtype)} if loss == "mse" else {LABELS: np.asarray(y)}
    values = run_nodes(train.graph, values)
    return float(values[train.losses].mean()), {name: values[grad] for name, grad in train.gradients.items()}
