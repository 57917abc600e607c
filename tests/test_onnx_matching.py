"""Initial weights from another network: by name and shape, then by order and shape; the report tells which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetrain.errors import ModelError
from edgetrain.graph import Graph
from edgetrain.onnx_io import match_parameters, save_onnx
from tests.onnx_text import net, ones


def network(**layers: tuple[int, int]) -> Graph:
    """Return fully connected layers by name, each with a weight (outputs, inputs)."""
    graph = Graph("net", input_shape=(next(iter(layers.values()))[1],))
    value = "input"
    for i, (name, shape) in enumerate(layers.items()):
        value = graph.add("Gemm", [value, graph.parameter(name, np.full(shape, i + 1.0))], transB=1)
    graph.set_outputs([value])
    return graph


def test_equal_names_and_shapes(tmp_path: Path) -> None:
    graph = network(a=(3, 3), b=(3, 3))
    save_onnx(graph, tmp_path / "m.onnx")
    arrays, report = match_parameters(graph, tmp_path / "m.onnx")
    assert report.by_name == ("a", "b")
    assert str(report) == "matched by name (2): a, b"
    np.testing.assert_array_equal(arrays["b"], 2 * ones(3, 3))


def test_the_rest_matches_by_order_and_shape() -> None:
    offered = {"b": 7 * ones(3, 3), "first": ones(3, 3), "second": 2 * ones(3, 3), "extra": ones(9)}
    arrays, report = match_parameters(network(a=(3, 3), b=(3, 3), c=(3, 3), d=(5, 3)), offered)
    assert {name: array[0, 0] for name, array in arrays.items()} == {"a": 1, "b": 7, "c": 2}
    assert (report.by_name, report.by_order) == (("b",), (("a", "first"), ("c", "second")))
    assert (report.missing, report.unused) == (("d",), ("extra",))
    assert "matched by order and shape (2): a from first, c from second" in str(report)


def test_order_is_that_of_the_nodes_not_of_the_initializers(tmp_path: Path) -> None:
    save_onnx(network(a=(3, 3), b=(3, 3)), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    tensors = list(model.graph.initializer)[::-1]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    _, report = match_parameters(network(x=(3, 3), y=(3, 3)), model)
    assert report.by_order == (("x", "a"), ("y", "b"))


def test_file_with_operators_that_cannot_be_trained() -> None:
    text = "(float[N,2] x) => (float[N,2] y) { e = Erf(x) c = Constant<value_float = 1.0>() y = MatMul(e, w) }"
    arrays, report = match_parameters(network(mine=(2, 2), other=(5, 2)), net(text, w=3 * ones(2, 2)))
    np.testing.assert_array_equal(arrays["mine"], 3 * ones(2, 2))
    assert report.missing == ("other",)


def test_same_name_with_another_shape_is_reported() -> None:
    graph = network(fc=(3, 32))
    offered = {"fc": ones(10, 32), "spare": ones(3, 32)}
    _, report = match_parameters(graph, offered)
    assert report.other_shape == ("fc",)
    assert report.by_order == (("fc", "spare"),)


def test_nothing_matches() -> None:
    with pytest.raises(ModelError, match=r"no weights match the graph 'net': fc \(3, 32\) wanted, a \(2,\) found"):
        match_parameters(network(fc=(3, 32)), {"a": ones(2)})
