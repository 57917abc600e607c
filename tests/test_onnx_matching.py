"""Initial weights from another network: by name and shape, or all of it by order; the report tells which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import edgetrain as et
from edgetrain.errors import ModelError
from edgetrain.graph import Graph, Normalization
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


def test_the_rest_matches_by_order_if_all_of_it_pairs_up() -> None:
    offered = {"b": 7 * ones(3, 3), "first": ones(3, 3), "bound": np.float32(6), "second": 2 * ones(3, 3)}
    arrays, report = match_parameters(network(a=(3, 3), b=(3, 3), c=(3, 3)), offered)
    assert {name: array[0, 0] for name, array in arrays.items()} == {"a": 1, "b": 7, "c": 2}
    assert (report.by_name, report.by_order) == (("b",), (("a", "first"), ("c", "second")))
    assert (report.missing, report.unused) == ((), ("bound",))
    assert "matched by order and shape (2): a from first, c from second" in str(report)


NOT_THE_SAME_NETWORK = {
    "one more": {"first": ones(3, 3), "second": ones(5, 3), "third": ones(5, 5)},
    "one less": {"first": ones(3, 3)},
    "another order": {"second": ones(5, 3), "first": ones(3, 3)},
    "another shape": {"first": ones(3, 3), "second": ones(6, 3)},
}


@pytest.mark.parametrize("offered", NOT_THE_SAME_NETWORK.values(), ids=NOT_THE_SAME_NETWORK)
def test_arrays_of_another_network_go_nowhere_by_their_order(offered: dict[str, NDArray[np.float32]]) -> None:
    graph = network(a=(3, 3), b=(5, 3))
    with pytest.raises(ModelError, match=r"no weights match the graph 'net': a \(3, 3\), b \(5, 3\) wanted, "):
        match_parameters(graph, offered)
    arrays, report = match_parameters(graph, {"a": 9 * ones(3, 3), **offered, "rest": ones(4, 4)})  # half of it by name
    assert list(arrays) == ["a"]
    assert (report.missing, report.unused) == (("b",), (*offered, "rest"))


def test_a_few_arrays_of_the_same_name_do_not_make_another_network_the_same() -> None:
    graph = network(a=(4, 4), b=(4, 4), fc=(3, 4))
    graph.parameter("fc.bias", np.zeros(3))
    few = {"a": ones(4, 4), "fc.bias": ones(3)}
    with pytest.raises(ModelError, match=r"2 weights match .* b \(4, 4\), fc \(3, 4\) wanted, fc \(3, 5\) found; give"):
        match_parameters(graph, few | {"fc": ones(3, 5)})
    assert set(match_parameters(graph, few)[0]) == few.keys()


BAD_ARRAYS = {
    "not a number": (np.full((3, 3), np.nan), "array 'a' holds NaN or infinite numbers"),
    "infinite": (np.full((3, 3), np.inf, np.float32), "array 'a' holds NaN or infinite numbers"),
    "beyond float32": (np.full((3, 3), 1e300), "array 'a' holds NaN or infinite numbers"),
    "text": (np.full((3, 3), "1"), "array 'a' has dtype <U1, expected float32"),
}


@pytest.mark.parametrize(("array", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_without_finite_numbers_are_refused(array: NDArray[np.generic], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        match_parameters(network(a=(3, 3)), {"a": array})


def test_order_is_that_of_the_nodes_not_of_the_initializers(tmp_path: Path) -> None:
    save_onnx(network(a=(3, 3), b=(3, 3)), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    tensors = list(model.graph.initializer)[::-1]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    _, report = match_parameters(network(x=(3, 3), y=(3, 3)), model)
    assert report.by_order == (("x", "a"), ("y", "b"))


def test_the_mean_and_deviation_of_inputs_are_no_weights(tmp_path: Path) -> None:
    graph = network(a=(3, 3))
    graph.normalization = Normalization(ones(3), ones(3))
    save_onnx(graph, tmp_path / "m.onnx")
    _, report = match_parameters(network(mine=(3, 3)), tmp_path / "m.onnx")
    assert (report.by_order, report.unused) == ((("mine", "a"),), ())
    assert report.normalization is not None and "inputs are normalised as in the file" in str(report)
    np.testing.assert_array_equal([report.normalization.mean, report.normalization.std], [ones(3)] * 2)


@pytest.mark.parametrize("number", [0, -1, np.nan, np.inf])
def test_deviations_that_nothing_can_be_divided_by_are_refused(tmp_path: Path, number: float) -> None:
    graph = network(a=(3, 3))
    graph.normalization = Normalization(ones(3), ones(3))
    save_onnx(graph, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    (tensor,) = [t for t in model.graph.initializer if t.name.endswith("normalization.std")]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(3, number, np.float32), tensor.name))
    onnx.save(model, tmp_path / "bad.onnx")
    for read in (et.load_onnx, lambda path: match_parameters(network(a=(3, 3)), path)):
        with pytest.raises(ModelError, match=r"normalised by the mean .* deviations above 0|NaN or infinite numbers"):
            read(tmp_path / "bad.onnx")


def test_weights_of_a_file_bring_the_normalisation_that_they_were_trained_with(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, (40, 1, 28, 28)).astype(np.float32)
    trained = et.Learner(et.models.lenet5(), batch_size=8)
    trained.fit((x, np.arange(40) % 10), 1)
    trained.export_onnx(tmp_path / "m.onnx")
    fresh, other = (et.Learner(et.models.lenet5(seed=seed), batch_size=8) for seed in (1, 2))
    other.fit((x + 5, np.arange(40) % 10), 1)  # has one of its own
    for learner in (fresh, other):
        learner.load_parameters(tmp_path / "m.onnx")
        np.testing.assert_array_equal(learner.logits(x), trained.logits(x))
    own = fresh.graph.normalization
    fresh.fit((x + 5, np.arange(40) % 10), 1)
    assert fresh.graph.normalization is own
    fresh.load_parameters(trained.parameters())  # arrays have none
    assert fresh.graph.normalization is own
    colours = et.Learner(et.models.lenet5((3, 28, 28)))
    report = colours.load_parameters(tmp_path / "m.onnx")
    assert "conv1.weight" in report.other_shape and colours.graph.normalization is None
    et.Learner(et.models.lenet5()).export_onnx(tmp_path / "raw.onnx")
    colours.graph.normalization = Normalization(ones(3), ones(3))
    colours.load_parameters(tmp_path / "raw.onnx")
    assert colours.graph.normalization is not None
    fresh.load_parameters(tmp_path / "raw.onnx")  # trained without any
    assert fresh.graph.normalization is None
    model = onnx.load(tmp_path / "raw.onnx")
    model.producer_name = "another"
    onnx.save(model, tmp_path / "foreign.onnx")
    other.load_parameters(tmp_path / "foreign.onnx")  # nobody knows
    assert other.graph.normalization is not None


def test_file_with_operators_that_cannot_be_trained() -> None:
    text = "(float[N,2] x) => (float[N,2] y) { e = Erf(x) c = Constant<value_float = 1.0>() y = MatMul(e, w) }"
    arrays, report = match_parameters(network(w=(2, 2), other=(5, 2)), net(text, w=3 * ones(2, 2)))
    np.testing.assert_array_equal(arrays["w"], 3 * ones(2, 2))
    assert report.missing == ("other",)


def test_sizes_of_one_are_no_other_shape() -> None:
    """Files hold a slope per channel as (C,), and shape it for its layer by an Unsqueeze."""
    text = "(float[N,2,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, k) s = Unsqueeze(slope, a) y = PRelu(c, s) }"
    files = [net(text, k=ones(2, 2, 1, 1), slope=np.float32(n) * ones(2), a=np.array([1, 2])) for n in (0.25, 0.5)]
    learner = et.Learner(et.load_onnx(files[0]))
    assert learner.load_parameters(files[1]).by_name == ("k", "slope")
    np.testing.assert_array_equal(learner.parameters()["slope"].ravel(), [0.5, 0.5])


@pytest.mark.parametrize(("mine", "theirs"), [((8, 8, 3, 1), (8, 8, 1, 3)), ((8, 3, 1), (8, 1, 3))])
def test_kernels_that_lie_otherwise_are_another_shape(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    graph = network(body=(4, 4))
    graph.parameter("k", np.zeros(mine))
    _, report = match_parameters(graph, {"body": ones(4, 4), "k": ones(*theirs)})
    assert (report.by_name, report.other_shape) == (("body",), ("k",))


def test_slopes_match_by_order_too() -> None:
    graph = network(k=(2, 2))
    graph.parameter("slope", np.zeros((2, 1, 1)))
    arrays, report = match_parameters(graph, {"c": ones(2, 2), "p": ones(2)})
    assert report.by_order == (("k", "c"), ("slope", "p"))
    assert arrays["slope"].shape == (2, 1, 1)


def test_same_name_with_another_shape_is_reported() -> None:
    _, report = match_parameters(network(body=(32, 32), fc=(3, 32)), {"body": ones(32, 32), "fc": ones(10, 32)})
    assert report.by_name == ("body",)
    assert report.other_shape == report.missing == report.unused == ("fc",)


def test_nothing_matches() -> None:
    with pytest.raises(ModelError, match=r"no weights match the graph 'net': fc \(3, 32\) wanted, a \(2,\) found"):
        match_parameters(network(fc=(3, 32)), {"a": ones(2)})


def test_frozen_weights_are_taken_too() -> None:
    graph = network(a=(3, 3), b=(3, 3))
    graph.trainable -= {"a"}
    arrays, report = match_parameters(graph, {"a": 7 * ones(3, 3), "b": 8 * ones(3, 3)})
    assert report.by_name == ("a", "b")
    assert (arrays["a"] == 7).all()
    _, report = match_parameters(graph, {"first": ones(3, 3), "second": ones(3, 3)})
    assert report.by_order == (("a", "first"), ("b", "second"))
    _, report = match_parameters(graph, {"other": ones(3, 3)})  # of what is learned alone
    assert report.by_order == (("b", "other"),)
